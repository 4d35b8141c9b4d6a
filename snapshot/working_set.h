/* SPDX-License-Identifier: Apache-2.0 */
/*
 * working_set: what of a template its clones touch first, in that order, laid out in one piece. It
 * is the image IMAGE+ws with the file "hot" (little endian):
 *
 *      0   8  "VMMIGWS1"
 *      8  u32 entries, 1..WORKING_SET_MAX
 *     12  u32 zero
 *     16      per entry: u32 number of the file in IMAGE, u32 number of the chunk (64 KiB)
 *             zeros up to the next multiple of 4096, and 2048 more
 *             per entry: the chunk; what is beyond its file's end is zero
 *
 * The odd 2048 bytes are what makes it a copy: no page of it is a page of the template, so that it
 * is stored anew and in order, where the template's own pages lie scattered over the packs of many
 * images. Nothing is believed of it: each page must be what the template's recipe says (four bytes of its SHA-256,
 * which tell damage and mistakes; that nobody makes such an image on purpose is the agent's and the store's affair),
 * or what is left of the set is not used.
 *
 * Threads: any.
 */
#ifndef VMMIG_SNAPSHOT_WORKING_SET_H
#define VMMIG_SNAPSHOT_WORKING_SET_H

#include "repo/repo.h"
#include "snapshot/mount_wire.h"

enum { WORKING_SET_MAX = MOUNT_PAYLOAD_MAX / sizeof(struct mount_touch) };

/* Reads `len` bytes of a file of the template. */
typedef int working_set_read_fn(void *arg, unsigned file, uint64_t offset, void *out, size_t len,
                                struct vm_error **err);

/* Name of the image that holds it; REFUSED if that is too long to be one. */
int working_set_name(const char *image, char out[IMAGE_NAME_MAX + 1], struct vm_error **err);
/* Store it. CONFLICT if there is one already. Entries beyond a file's end are USAGE. */
int working_set_store(struct repo *r, const struct image *image, const struct mount_touch *list,
                      uint32_t n, working_set_read_fn *read, void *arg, struct vm_error **err);

struct working_set {
    struct mount_touch *list; /* owned */
    uint32_t n;
    uint64_t data; /* where in the file the first chunk begins */
    struct file_reader *reader; /* owned */
};
/* 1, or 0 if none is known of that image. */
int working_set_open(struct repo *r, const struct image *image, struct working_set *ret_set,
                     struct vm_error **err);
void working_set_finish(struct working_set *ws);

#endif

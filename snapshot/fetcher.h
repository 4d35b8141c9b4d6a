/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fetcher: the process vmmig-fetch, which reads a repository for the holder of a mount
 * (snapshot/mount_wire.h says what they say to each other). It keeps nothing that must survive: it
 * may end at any instant, and the holder starts another one. It ends when the holder closes the
 * connection.
 *
 * Memory: 1 MiB per thread (FETCHER_DEMAND + FETCHER_AHEAD), FETCHER_IMAGES_MAX images with what
 * repo/file_reader.h says of each file that is read, and for a working set being stored what a
 * writer of the repository takes.
 *
 * fetch_images.c keeps open images; fetch_main.c is the rest.
 */
#ifndef VMMIG_SNAPSHOT_FETCHER_H
#define VMMIG_SNAPSHOT_FETCHER_H

#include "repo/repo.h"
#include "snapshot/mount_wire.h"

enum { FETCHER_DEMAND = 8, FETCHER_AHEAD = 4, FETCHER_IMAGES_MAX = 32 };

/* ---- open images: any thread ---- */

struct fetch_images;
struct fetch_images *fetch_images_create(struct repo *r, struct vm_error **err);
void fetch_images_destroy(struct fetch_images *t);
/*
 * Which image that is: of that name and number, be it in the catalogue or only leased. NOT_FOUND.
 */
int fetch_image(struct fetch_images *t, const char *name, uint64_t number, struct image *ret_image,
                struct vm_error **err);
/* It is in the catalogue under its name, or was leased by the caller. */
void fetch_image_note(struct fetch_images *t, const struct image *image);
/* Is that the content there? `data`: whole pages, zero beyond the file's end. CORRUPT if not. */
int fetch_check(struct fetch_images *t, const struct image *image, unsigned file, uint64_t offset,
                const uint8_t *data, size_t len, struct vm_error **err);
int fetch_read(struct fetch_images *t, const char *name, uint64_t number, unsigned file,
               uint64_t offset, void *out, size_t len, struct vm_error **err);

#endif

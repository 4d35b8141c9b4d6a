/* SPDX-License-Identifier: Apache-2.0 */
/*
 * catalogue: the names of images, and who is writing. 256 maps "cat.00".."cat.ff", fixed for ever; a name
 * lives in the one that FNV-1a over its bytes, modulo 256, tells. Keys of each:
 *
 *     epoch        u64, little endian: how many collections were published
 *     n:NAME       an image (repo/image.h)
 *     w:NUMBER     a registered writer, 16 hexadecimal digits:
 *                  u64 the epoch it has acknowledged, u64 when it registered (seconds since 1970, shown only), u8
 *                  length of the parent's name (0: none here), the name, and the parent's value
 *
 * A writer registers before it looks anything up, in the shard of the name it will commit and in that of its
 * parent, the parent's first. Every change is one guarded update that compares the epoch; a
 * commit also compares its registration and that the name is free, sets the name and ends the
 * registration at once. An update that fails in an unknown way is read back; when in doubt the
 * registration is removed first, after which a commit under way can no longer succeed.
 *
 * After a crash a registration is left behind; it keeps what the writer stored from being collected until it is
 * fenced.
 *
 * Threads: any for what takes a store; a registration belongs to one thread at a time.
 */
#ifndef VMMIG_REPO_CATALOGUE_H
#define VMMIG_REPO_CATALOGUE_H

#include "repo/image.h"
#include "repo/store.h"

enum { CATALOGUE_SHARDS = 256 };

/* Make the shards of a new repository; those that are there stay. */
int catalogue_init(struct store *s, struct vm_error **err);

/* The image of that name. NOT_FOUND. */
int catalogue_find(struct store *s, const char *name, struct image *ret_image,
                   struct vm_error **err);
/* Call visit for every image, in no order. */
typedef int catalogue_visit_fn(const struct image *image, void *arg, struct vm_error **err);
int catalogue_list(struct store *s, catalogue_visit_fn *visit, void *arg, struct vm_error **err);
/* Remove the name; what it alone named is garbage from then on. NOT_FOUND. */
int catalogue_delete(struct store *s, const char *name, struct vm_error **err);

struct registration;

/*
 * Register a writer that is going to commit `name`, with `parent` (NULL: none) pinned until it ends.
 * CONFLICT if the name is taken, NOT_FOUND if the parent is gone.
 */
struct registration *catalogue_register(struct store *s, const char *name,
                                        const struct image *parent, struct vm_error **err);
uint64_t registration_number(const struct registration *r);
/*
 * Commit the image under the registered name, and end the registration. 0: it is committed and
 * durable. CONFLICT: the name was taken meanwhile. REFUSED: the writer was fenced. On any error
 * nothing was committed, but for UNREACHABLE and TIMEOUT whose message says that it may have been.
 */
int catalogue_commit(struct registration *r, const struct image *image, struct vm_error **err);
/* End it without a commit (nothing happens if it has ended), and free it. Takes NULL. */
void catalogue_unregister(struct registration *r);
DEFINE_CLEANUP(registration, struct registration *, catalogue_unregister)

#endif

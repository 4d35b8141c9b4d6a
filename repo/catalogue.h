/* SPDX-License-Identifier: Apache-2.0 */
/*
 * catalogue: the names of images, and who is writing. 256 maps "cat.00".."cat.ff", fixed for ever;
 * a name lives in the one that FNV-1a over its bytes, modulo 256, tells. Keys of each:
 *
 *     epoch        u64, little endian: how many collections were published
 *     n:NAME       an image (repo/image.h)
 *     l:NUMBER     a lease: u64 when it was taken (seconds since 1970, shown only), u8 length of
 *                  the holder's name, the name; then the image's name and value as in a pin
 *     w:NUMBER     a registered writer, in the shard of the name it will commit: u64 the epoch it
 *                  has acknowledged, u64 when it registered (seconds since 1970, shown only), the
 *                  name
 *     f:PACK       a pack's forwarding (repo/forwarding.h), in the shard of the name "pack.PACK"
 *     p:NUMBER     its parent pinned, in the parent's shard: u16 the shard of its w:NUMBER, u8
 *                  length of the parent's name, the name, its value
 *
 * A writer registers before it looks anything up, then pins its parent. Every update is guarded: a
 * registration by the epoch, a pin by the parent's existence, a commit by epoch and registration,
 * and by the name being free; it sets the name and ends the registration at once. An update that
 * fails in an unknown way is read back; when in doubt the registration is removed first, after
 * which a commit under way can no longer succeed. docs/repository-collection.md has the whole of
 * it.
 *
 * After a crash a registration is left behind; it keeps what the writer stored from being collected
 * until a collection fences it.
 *
 * Threads: any for what takes a store; a registration belongs to one thread at a time.
 */
#ifndef VMMIG_REPO_CATALOGUE_H
#define VMMIG_REPO_CATALOGUE_H

#include "repo/condemned.h"
#include "repo/image.h"
#include "repo/store.h"

enum { CATALOGUE_SHARDS = 256 };

/* Make the shards of a new repository; those that are there stay. */
int catalogue_init(struct store *s, struct vm_error **err);

/* The image of that name. NOT_FOUND. */
int catalogue_find(struct store *s, const char *name, struct image *ret_image,
                   struct vm_error **err);
/*
 * What has become of an image that was found before, and of which something is not there (any
 * more)? Collections replace its roots by others of the same content: then *ret_now has these.
 */
enum image_fate {
    IMAGE_GONE,  /* deleted, or there is another image of that name */
    IMAGE_MOVED, /* it has other roots */
    IMAGE_SAME,  /* it is as it was: what is not there is damage */
};
int catalogue_find_again(struct store *s, const struct image *was, struct image *ret_now,
                         enum image_fate *ret_fate, struct vm_error **err);
/*
 * Call visit for every image, in no order, and `damaged` for every entry that is none, or that a
 * later version wrote: the problem says what it is; the image's name, NULL if that is none. With
 * NULL for `damaged` it ends the listing; catalogue_skip passes over it and logs it.
 */
typedef int catalogue_visit_fn(const struct image *image, void *arg, struct vm_error **err);
typedef void catalogue_damaged_fn(const char *name, const struct vm_error *problem, void *arg);
int catalogue_list(struct store *s, catalogue_visit_fn *visit, catalogue_damaged_fn *damaged,
                   void *arg, struct vm_error **err);
void catalogue_skip(const char *name, const struct vm_error *problem, void *arg);
/* Remove the name; what it alone named is garbage from then on. NOT_FOUND. */
int catalogue_delete(struct store *s, const char *name, struct vm_error **err);
/* The same, of that very image: CONFLICT if the name has another one by now. */
int catalogue_delete_image(struct store *s, const struct image *image, struct vm_error **err);

/*
 * Remove entries that cannot be used (see catalogue_list), because their key, their value or their
 * place is damaged, by the name that was told of them: what is not printable is '?' in it, and a
 * lease's is its key. Never one that is whole. *ret_removed: there was one.
 */
int catalogue_delete_damaged(struct store *s, const char *name, bool *ret_removed,
                             struct vm_error **err);

/* ---- leases ---- */

struct lease {
    uint64_t number, taken_s;
    char holder[IMAGE_NAME_MAX + 1];
    struct image image; /* as it was when the lease was taken; it stays readable until the lease is
                           dropped */
};

/* Take a lease of the image. NOT_FOUND; CONFLICT if it is replaced all the time. */
int catalogue_lease(struct store *s, const char *name, const char *holder, struct lease *ret_lease,
                    struct vm_error **err);
/* Dropping what is not there (any more) is fine. */
int catalogue_lease_drop(struct store *s, const struct lease *lease, struct vm_error **err);
typedef int catalogue_lease_fn(const struct lease *lease, void *arg, struct vm_error **err);
int catalogue_leases(struct store *s, catalogue_lease_fn *visit, catalogue_damaged_fn *damaged,
                     void *arg, struct vm_error **err);

/* ---- writers ---- */

struct registration;

/*
 * Register a writer that is going to commit `name`, with `parent` (NULL: none) pinned until it
 * ends. CONFLICT if the name is taken, NOT_FOUND if the parent is gone.
 */
struct registration *catalogue_register(struct store *s, const char *name,
                                        const struct image *parent, struct vm_error **err);
/*
 * As catalogue_register, for a name that is now `before` (NULL: free) and is to become something
 * else in one write. CONFLICT, here or at the commit, if it is not that any more.
 */
struct registration *catalogue_register_replace(struct store *s, const char *name,
                                                const struct image *before,
                                                const struct image *parent, struct vm_error **err);
/*
 * As catalogue_register, for a writer that replaces the image's roots by others of the same
 * content; the image itself is its parent. CONFLICT, here or at the commit, if the name does not
 * have that value any more.
 */
struct registration *catalogue_register_swap(struct store *s, const struct image *image,
                                             struct vm_error **err);
/*
 * For a writer that sets the forwarding of a pack, which has the value `before` (empty: none) until
 * then; CONFLICT as above.
 */
struct registration *catalogue_register_forward(struct store *s, uint64_t pack,
                                                const struct buffer *before, struct vm_error **err);
uint64_t registration_number(const struct registration *r);
/*
 * What is condemned, by the epoch that was acknowledged last: nothing of it may be shared. Changed
 * by checkpoints.
 */
const struct object_set *registration_condemned(const struct registration *r);
/*
 * Has a new epoch begun? Then what of `shared` (all packs and trees that this writer shared so far)
 * is condemned is rescued, and the epoch acknowledged; *ret_changed says so. Nothing is shared
 * meanwhile. To be called every second or so: collections wait for it. REFUSED if the writer was
 * fenced.
 */
int registration_checkpoint(struct registration *r, const struct object_set *shared,
                            bool *ret_changed, struct vm_error **err);
/*
 * Commit the image under the registered name, and end the registration. 0: it is committed and
 * durable. CONFLICT: the name was taken meanwhile. REFUSED: the writer was fenced. On any error
 * nothing was committed, but for UNREACHABLE and TIMEOUT whose message says that it may have been.
 */
int catalogue_commit(struct registration *r, const struct image *image,
                     const struct object_set *shared, struct vm_error **err);
/* The same, of a registration for a forwarding. */
int catalogue_commit_forward(struct registration *r, const struct buffer *value,
                             const struct object_set *shared, struct vm_error **err);
/* End it without a commit (nothing happens if it has ended), and free it. Takes NULL. */
void catalogue_unregister(struct registration *r);
DEFINE_CLEANUP(registration, struct registration *, catalogue_unregister)

/* ---- for collectors ---- */

/* A registration as it was read; for catalogue_fence. */
struct registered {
    uint64_t number, epoch, registered_s;
    unsigned shard;
    char name[IMAGE_NAME_MAX + 1]; /* that it is going to commit; to be shown, escaped */
    const struct store_pair *pair; /* valid during the visit */
};
typedef int catalogue_registered_fn(const struct registered *r, void *arg, struct vm_error **err);
int catalogue_registered(struct store *s, catalogue_registered_fn *visit, void *arg,
                         struct vm_error **err);
/* Remove the registration if it still is as it was read: its commit can no longer succeed. */
int catalogue_fence(struct store *s, const struct registered *r, bool *ret_fenced,
                    struct vm_error **err);
/*
 * Call visit for every root: all names, then all leases, then all pins; in each shard in the order
 * of keys. An image that is deleted meanwhile may come or not.
 */
int catalogue_roots(struct store *s, catalogue_visit_fn *visit, void *arg, struct vm_error **err);
/* Is that still what its name, lease or pin holds? For a root that turns out to be unreadable. */
int catalogue_root_is_current(struct store *s, const struct image *root, bool *ret_current,
                              struct vm_error **err);
/* Erase pins whose writer is not registered any more; right at any time. */
int catalogue_drop_pins(struct store *s, struct vm_error **err);
/* Raise the epoch of every shard to `target`, where it is lower. */
int catalogue_raise_epochs(struct store *s, uint64_t target, struct vm_error **err);
/* A number that is given out once: for writers, and for condemned lists. */
int catalogue_next_number(struct store *s, uint64_t *ret_number, struct vm_error **err);

#endif

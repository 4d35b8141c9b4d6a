/* SPDX-License-Identifier: Apache-2.0 */
/*
 * condemned: the list of packs and trees that a collection is about to remove. At most one is open.
 *
 * Key "collection" of map "repository": "closed E" (E: the epoch of the list that was closed last),
 * or "open E NUMBER MAPS": that list is open, with epoch E. Numbers are 16 hexadecimal digits.
 *
 * The entries are in the first MAPS of the maps "condemned.00" to "condemned.3f", which exist from
 * init on: a full cluster creates no object, but lets keys of one that is there be set. MAPS grows
 * by one for each 50,000 entries, up to all 64. Key "NUMBER.OBJECT", OBJECT the name of a pack or
 * tree, is in the map that the object's number modulo MAPS tells, with value "c" while it is
 * condemned, "d" once a collector has begun to remove it; the key is gone when the object is, or
 * when it was rescued.
 *
 * docs/repository-collection.md tells when what is done. Threads: any.
 */
#ifndef VMMIG_REPO_CONDEMNED_H
#define VMMIG_REPO_CONDEMNED_H

#include "repo/number_set.h"
#include "repo/store.h"

struct condemned_list {
    uint64_t number, maps;
};

struct condemned_state {
    bool is_open;
    uint64_t epoch; /* of the open list, or of the one that was closed last */
    struct condemned_list list; /* if it is open */
};

/* Packs and trees. */
struct object_set {
    struct number_set packs, trees;
};

void object_set_finish(struct object_set *s);
static inline void object_set_cleanup(struct object_set *s)
{
    object_set_finish(s);
}
#define cleanup_object_set __attribute__((cleanup(object_set_cleanup)))

/* What key "collection" of a new repository is, to be set with the others. */
#define CONDEMNED_KEY "collection"
#define CONDEMNED_FIRST "closed 0000000000000001"

/* The empty maps of a new repository; those that are there stay as they are. */
int condemned_init(struct store *s, struct vm_error **err);

int condemned_read_state(struct store *s, struct condemned_state *ret_state, struct vm_error **err);
/* Add all entries of the open list, if there is one, condemned or being removed, to the set. */
int condemned_load_open(struct store *s, struct condemned_state *ret_state, struct object_set *set,
                        struct vm_error **err);
/*
 * Take these off the list. One that is off it already, and still exists, is safe: nothing is added
 * to a list. One that is being removed, or is gone, cannot be rescued any more: it is added to
 * *lost.
 */
int condemned_rescue(struct store *s, const struct condemned_list *list,
                     const struct object_set *objects, struct object_set *lost,
                     struct vm_error **err);

/* ---- for collectors ---- */

/*
 * Make the list of these objects under that number, which nobody knows of yet. Another collector
 * that takes it for one left behind sweeps entries away; those are not condemned, then.
 */
int condemned_make(struct store *s, uint64_t number, const struct object_set *objects,
                   struct condemned_list *ret_list, struct vm_error **err);
/*
 * Open it, if the state is still `started` (closed). *ret_open says whether it was; if not, its
 * entries are removed.
 */
int condemned_publish(struct store *s, const struct condemned_list *list,
                      const struct object_set *objects, const struct condemned_state *started,
                      bool *ret_open, struct vm_error **err);
/* All entries of the list, and which packs of these a collector has begun to remove. */
int condemned_load(struct store *s, const struct condemned_list *list, struct object_set *set,
                   struct number_set *claimed, struct vm_error **err);
/* Take marked objects off the list, as far as they are condemned. */
int condemned_spare(struct store *s, const struct condemned_list *list,
                    const struct object_set *marked, struct vm_error **err);
/* Claim n <= FORGET_BATCH entries for removal. */
enum condemned_claim {
    CONDEMNED_RESCUED, /* it is off the list */
    CONDEMNED_CLAIMED, /* by this call, another collector, or before a crash */
};
int condemned_claim(struct store *s, const struct condemned_list *list, bool is_pack,
                    const uint64_t *numbers, size_t n, enum condemned_claim *ret_claims,
                    struct vm_error **err);
/* The objects are gone: erase their entries. */
int condemned_erase(struct store *s, const struct condemned_list *list, bool is_pack,
                    const uint64_t *numbers, size_t n, struct vm_error **err);
/*
 * Close the list if it is empty. Nothing happens if it is not open any more.
 */
int condemned_close(struct store *s, const struct condemned_state *state, struct vm_error **err);
/* Remove what is left of lists that were never opened, by collectors that died. */
int condemned_sweep(struct store *s, struct vm_error **err);

#endif

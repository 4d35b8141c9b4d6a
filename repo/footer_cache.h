/* SPDX-License-Identifier: Apache-2.0 */
/*
 * footer_cache: what the packs that matter now hold, and where a page is among them.
 *
 * Pages that lie together in a pack tend to be needed together again. So one hit in the index loads
 * a pack's whole footer, and its neighbours are found here without asking again. A writer's own
 * packs are in it from their first record on.
 *
 * Memory: footers of at most `limit` bytes (42 to 50 bytes per page, with the table; the pinned ones
 * may go beyond it), the least recently hit ones leave. Threads: one, but for the fields of an own
 * footer that pack_writer.h fills in.
 */
#ifndef VMMIG_REPO_FOOTER_CACHE_H
#define VMMIG_REPO_FOOTER_CACHE_H

#include "repo/number_set.h"
#include "repo/pack.h"
#include "repo/quarantine.h"
#include "repo/store.h"

#include <stdatomic.h>

struct cached_footer {
    struct footer footer; /* own packs: records and ids have room for the maximum */
    bool own;             /* pack of this writer; never leaves while it is open */
    /* Own packs: records below this number have their offset and length. Others: UINT32_MAX. */
    _Atomic uint32_t n_laid;
    unsigned pins;     /* who keeps a pointer */
    uint64_t used_at;
    unsigned slot;
};

struct footer_cache;

struct footer_cache *footer_cache_create(struct store *s, size_t limit, struct vm_error **err);
void footer_cache_destroy(struct footer_cache *c);
DEFINE_CLEANUP(footer_cache, struct footer_cache *, footer_cache_destroy)

/* Is the pack here, or known to be unreadable? */
bool footer_cache_knows(const struct footer_cache *c, uint64_t pack);
/* The footer, if it is here. */
struct cached_footer *footer_cache_get(struct footer_cache *c, uint64_t pack);
/*
 * Load the footers of n packs that are not known. A pack that is missing or damaged is remembered
 * as unreadable: nothing is found in it. Errors of the store are errors.
 */
int footer_cache_load(struct footer_cache *c, const uint64_t *packs, size_t n,
                      struct vm_error **err);
/*
 * Nothing is found in these packs from now on, and none of them is loaded; replaces the set of the
 * former call. The set outlives the cache.
 */
void footer_cache_forbid(struct footer_cache *c, const struct number_set *packs);

/*
 * Nothing is found in the damaged records of what is loaded from now on. The quarantine outlives the
 * cache.
 */
void footer_cache_avoid(struct footer_cache *c, const struct quarantine *q);

/*
 * Keep to the limit. Only this and footer_cache_load let footers leave: hits stay good until the
 * next of them.
 */
void footer_cache_trim(struct footer_cache *c);

/* An empty footer of a pack that this writer is about to write; pinned once. */
struct cached_footer *footer_cache_begin_own(struct footer_cache *c, uint64_t pack,
                                             struct vm_error **err);
/* Append a record of n pages to an own footer; its number. Offset and length come later. */
uint32_t footer_cache_add_record(struct footer_cache *c, struct cached_footer *f,
                                 const struct page_id *ids, unsigned n, uint16_t mask);

/*
 * All records of an own footer have their places: unpin it, and give back the memory it did not
 * need.
 */
void footer_cache_end_own(struct cached_footer *f);

void footer_cache_pin(struct cached_footer *f);
void footer_cache_unpin(struct cached_footer *f);

struct footer_hit {
    struct cached_footer *footer;
    uint32_t page;
};
/* The places of a page, at most `max`. */
unsigned footer_cache_find(struct footer_cache *c, const struct page_id *id,
                           struct footer_hit *hits, unsigned max);

/*
 * Is the page the one behind `hit` in its pack? Moves hit there if so. What was stored together is
 * looked for in that order mostly, which spares a search.
 */
static inline bool footer_hit_is_next(struct footer_hit *hit, const struct page_id *id)
{
    const struct footer *f = hit->footer ? &hit->footer->footer : NULL;
    if (!f || hit->page + 1 >= f->n_pages || !page_id_equal(&f->ids[hit->page + 1], id))
        return false;
    hit->page++;
    return true;
}

/* The identity of page `page` of the record at `offset`; false if the footer has no such record. */
bool cached_footer_identity(const struct cached_footer *f, uint32_t offset, unsigned page,
                            struct page_id *ret_id);

/* Footers loaded from the store so far, for statistics. */
uint64_t footer_cache_loads(const struct footer_cache *c);

/*
 * Read and check the footers of n packs, without a cache: footers[i].n_records is 0, and
 * problems[i] says why, where the pack is missing (NULL) or damaged. The caller finishes footers
 * and frees problems.
 */
int footer_read_many(struct store *s, const uint64_t *packs, size_t n, struct footer *footers,
                     struct vm_error **problems, struct vm_error **err);

#endif

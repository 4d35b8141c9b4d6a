/* SPDX-License-Identifier: Apache-2.0 */
/*
 * dedup: decides for the pages of a segment (1 MiB of a file) which are shared and which are new.
 *
 * Pages are looked for in the footer cache; what is not there is asked for in the index, in one
 * batch for several segments, and the packs that it names are loaded. Then the bound on scatter
 * applies: the pages of a segment may lie in at most DEDUP_RECORDS_MAX records, the new ones
 * included, so that reading them back stays cheap; pages of the records with the fewest are stored
 * again instead. A segment whose pages are all found within the bound is left as it is: storing the
 * same data again stores nothing.
 *
 * Threads: one, the one that owns the footer cache; segments are hashed by workers.
 */
#ifndef VMMIG_REPO_DEDUP_H
#define VMMIG_REPO_DEDUP_H

#include "repo/footer_cache.h"
#include "repo/index.h"
#include "repo/recipe.h"
#include "repo/workers.h"

enum {
    SEGMENT_PAGES = 256,
    SEGMENT_BYTES = SEGMENT_PAGES * PAGE_BYTES,
    SEGMENT_EXTENTS = SEGMENT_PAGES / EXTENT_PAGES,
    DEDUP_RECORDS_MAX = 40,
    DEDUP_LOADS_MAX = 24, /* footers loaded for one batch of segments */
    DEDUP_BATCH = 8,      /* segments in one batch */
    EXTENT_WHOLE_MIN = 8, /* new pages from which an extent gets a record of its own */
};

enum page_state {
    PAGE_ABSENT,  /* not given: as before */
    PAGE_ZEROS,
    PAGE_UNKNOWN, /* given, not found */
    PAGE_KNOWN,   /* found: hits[i] */
    PAGE_AGAIN,   /* found, but to be stored again */
};

struct segment {
    struct job job;
    struct image_file *file;
    uint64_t number; /* the first byte is at number * SEGMENT_BYTES */
    uint8_t *data;
    bool given[SEGMENT_PAGES];

    /* What hashing found; given ends here. */
    enum page_state state[SEGMENT_PAGES];
    struct page_id ids[SEGMENT_PAGES];
    uint16_t
        mask[SEGMENT_EXTENTS]; /* pages that are not zero; 0 if not all of the extent is given */
    struct page_id extents[SEGMENT_EXTENTS]; /* dedup_extent_id */
    bool has_extent[SEGMENT_EXTENTS];
    struct footer_hit hits[SEGMENT_PAGES];

    /* What the pages were before, for an incremental writer; NULL if nothing is known. */
    const struct recipe_page *before;
};

/* Zeros, identities of pages, masks of extents; any worker. */
int segment_hash(struct segment *s, struct page_hasher *hasher, struct vm_error **err);
/* The masks alone; state and ids of the pages are known. */
void segment_find_extents(struct segment *s);

struct dedup;

/* At most records_max records per segment. */
struct dedup *dedup_create(struct index *index, struct footer_cache *cache, unsigned records_max,
                           struct vm_error **err);
void dedup_destroy(struct dedup *d);
DEFINE_CLEANUP(dedup, struct dedup *, dedup_destroy)

/* Look the pages of n <= DEDUP_BATCH hashed segments up, loading footers. */
int dedup_find(struct dedup *d, struct segment *const *segments, size_t n, struct vm_error **err);
/*
 * The identity of an extent whose mask is not 0. Where all pages are found nobody asks for it, so it
 * is made only then. NULL with *err.
 */
const struct page_id *dedup_extent_id(struct dedup *d, struct segment *s, unsigned extent,
                                      struct vm_error **err);
/*
 * Settle one segment: pages that became known meanwhile, which of several places, and the bound.
 * Afterwards every given page is ZERO, UNKNOWN (new), KNOWN or AGAIN (new).
 */
void dedup_settle(struct dedup *d, struct segment *s);
/*
 * Is every page of the extent that is not zero new, and are there enough of them for a record of
 * its own?
 */
bool segment_extent_is_whole(const struct segment *s, unsigned extent);
/* As dedup_settle for a single page, just before it is stored. */
void dedup_find_again(struct dedup *d, struct segment *s, unsigned page);

struct dedup_stat {
    uint64_t lookups, index_hits,
        again; /* keys asked for, found; pages stored again for the bound */
};
struct dedup_stat dedup_stat(const struct dedup *d);

#endif

/* SPDX-License-Identifier: Apache-2.0 */
#include "repo/dedup.h"

#include <stdlib.h>

enum {
    HITS_MAX = 4, /* places of one page that are considered */
    NEXT_WORTH = 16, /* known pages for each unknown one, or it is rather new */
    KEYS_MAX = DEDUP_BATCH * (SEGMENT_PAGES + SEGMENT_EXTENTS),
    TALLY_SIZE = 2 * SEGMENT_PAGES * HITS_MAX,
};

/* How many pages of a segment lie in one record. */
struct tally {
    struct cached_footer *footer; /* NULL: free */
    uint32_t record;
    unsigned pages; /* chosen to be read there */
    unsigned reach; /* without a choice yet, that could be */
    bool dropped;
};

/* Where a page could be read; n is 0 once one was chosen. */
struct places {
    unsigned n;
    struct footer_hit hits[HITS_MAX];
};

struct candidate {
    uint64_t pack;
    unsigned votes;
};

struct dedup {
    struct index *index;
    struct footer_cache *cache;
    struct page_hasher hasher;
    unsigned records_max;
    struct dedup_stat stat;
    struct index_entry keys[KEYS_MAX];
    struct candidate candidates[KEYS_MAX];
    size_t n_candidates;
    struct tally tally[TALLY_SIZE];
    struct places places[SEGMENT_PAGES];
};

struct dedup *dedup_create(struct index *index, struct footer_cache *cache, unsigned records_max,
                           struct vm_error **err)
{
    struct dedup *d = calloc(1, sizeof(*d));
    if (!d) {
        error_nomem(err);
        return NULL;
    }
    d->index = index;
    d->cache = cache;
    d->records_max = records_max;
    if (page_hasher_init(&d->hasher, err) < 0) {
        dedup_destroy(d);
        return NULL;
    }
    return d;
}

void dedup_destroy(struct dedup *d)
{
    if (!d)
        return;
    page_hasher_finish(&d->hasher);
    free(d);
}

struct dedup_stat dedup_stat(const struct dedup *d)
{
    return d->stat;
}

/* ---- hashing ---- */

static enum page_state state_of(const struct segment *s, unsigned i)
{
    if (!s->given[i])
        return PAGE_ABSENT;
    return page_all_zero(s->data + (size_t)i * PAGE_BYTES) ? PAGE_ZEROS : PAGE_UNKNOWN;
}

static uint16_t mask_of(const struct segment *s, unsigned extent)
{
    uint16_t mask = 0;
    for (unsigned i = 0; i < EXTENT_PAGES; i++) {
        enum page_state state = s->state[extent * EXTENT_PAGES + i];
        if (state == PAGE_ABSENT)
            return 0;
        mask |= (uint16_t)((state != PAGE_ZEROS) << i);
    }
    return mask;
}

void segment_find_extents(struct segment *s)
{
    for (unsigned i = 0; i < SEGMENT_EXTENTS; i++) {
        s->mask[i] = mask_of(s, i);
        s->has_extent[i] = false;
    }
}

int segment_hash(struct segment *s, struct page_hasher *hasher, struct vm_error **err)
{
    for (unsigned i = 0; i < SEGMENT_PAGES; i++)
        s->state[i] = state_of(s, i);
    for (unsigned i = 0, n; i < SEGMENT_PAGES; i += n + 1) {
        for (n = 0; i + n < SEGMENT_PAGES && s->state[i + n] == PAGE_UNKNOWN; n++)
            ;
        if (page_hasher_pages(hasher, s->data + (size_t)i * PAGE_BYTES, n, &s->ids[i], err) < 0)
            return -1;
    }
    segment_find_extents(s);
    return 0;
}

const struct page_id *dedup_extent_id(struct dedup *d, struct segment *s, unsigned extent,
                                      struct vm_error **err)
{
    struct page_id ids[EXTENT_PAGES];
    unsigned n = 0;
    if (s->has_extent[extent])
        return &s->extents[extent];
    for (unsigned i = 0; i < EXTENT_PAGES; i++)
        if (s->mask[extent] & 1u << i)
            ids[n++] = s->ids[extent * EXTENT_PAGES + i];
    if (page_hasher_extent(&d->hasher, ids, s->mask[extent], &s->extents[extent], err) < 0)
        return NULL;
    s->has_extent[extent] = true;
    return &s->extents[extent];
}

/* ---- finding ---- */

static void find_in_cache(struct dedup *d, struct segment *s)
{
    struct footer_hit last = {NULL, 0};
    for (unsigned i = 0; i < SEGMENT_PAGES; i++) {
        if (s->state[i] != PAGE_UNKNOWN)
            continue;
        if (footer_hit_is_next(&last, &s->ids[i]))
            s->hits[i] = last;
        else if (footer_cache_find(d->cache, &s->ids[i], &s->hits[i], 1))
            last = s->hits[i];
        else
            continue;
        s->state[i] = PAGE_KNOWN;
    }
}

static void vote(struct dedup *d, uint64_t pack)
{
    if (footer_cache_knows(d->cache, pack))
        return;
    for (size_t i = 0; i < d->n_candidates; i++) {
        if (d->candidates[i].pack == pack) {
            d->candidates[i].votes++;
            return;
        }
    }
    if (d->n_candidates < KEYS_MAX)
        d->candidates[d->n_candidates++] = (struct candidate){pack, 1};
}

/* The pack of a page's former content, if the page seems to be the same still. */
static void vote_before(struct dedup *d, const struct segment *s)
{
    for (unsigned i = 0; s->before && i < SEGMENT_PAGES; i++)
        if (s->state[i] == PAGE_UNKNOWN && s->before[i].len &&
            !memcmp(s->before[i].id, s->ids[i].bytes, sizeof(s->before[i].id)))
            vote(d, s->before[i].pack);
}

/* Keys of what is unknown in the segment, behind *n. */
static int add_keys(struct dedup *d, struct segment *s, size_t *n, struct vm_error **err)
{
    for (unsigned e = 0; e < SEGMENT_EXTENTS; e++) {
        unsigned unknown = 0;
        for (unsigned i = e * EXTENT_PAGES; i < (e + 1) * EXTENT_PAGES; i++) {
            if (s->state[i] != PAGE_UNKNOWN)
                continue;
            unknown++;
            if (index_samples(&s->ids[i]))
                d->keys[(*n)++] = index_entry_make(INDEX_PAGE, &s->ids[i], NULL, 0);
        }
        if (!unknown || !s->mask[e])
            continue;
        const struct page_id *extent = dedup_extent_id(d, s, e, err);
        if (!extent)
            return -1;
        d->keys[(*n)++] = index_entry_make(INDEX_EXTENT, extent, NULL, 0);
    }
    return 0;
}

static int by_votes(const void *a, const void *b)
{
    const struct candidate *x = a, *y = b;
    if (x->votes != y->votes)
        return x->votes < y->votes ? 1 : -1;
    return x->pack < y->pack ? 1 : -1;
}

static int load_candidates(struct dedup *d, struct vm_error **err)
{
    uint64_t packs[DEDUP_LOADS_MAX];
    size_t n = d->n_candidates < DEDUP_LOADS_MAX ? d->n_candidates : DEDUP_LOADS_MAX;
    qsort(d->candidates, d->n_candidates, sizeof(*d->candidates), by_votes);
    for (size_t i = 0; i < n; i++)
        packs[i] = d->candidates[i].pack;
    d->n_candidates = 0;
    return footer_cache_load(d->cache, packs, n, err);
}

/*
 * A writer gathers single new pages into records of their own, which may come into its next pack. So
 * where a few pages of a segment are missing, the packs behind those of its other pages are looked at.
 */
static void vote_next(struct dedup *d, struct segment *s)
{
    unsigned known = 0, unknown = 0;
    find_in_cache(d, s);
    for (unsigned i = 0; i < SEGMENT_PAGES; i++) {
        known += s->state[i] == PAGE_KNOWN;
        unknown += s->state[i] == PAGE_UNKNOWN;
    }
    if (!unknown || unknown > known / NEXT_WORTH)
        return;
    /* Footers were loaded since some of them were found: those that made room are not there any more. */
    for (unsigned i = 0; i < SEGMENT_PAGES; i++) {
        struct footer_hit hit;
        if (s->state[i] == PAGE_KNOWN && footer_cache_find(d->cache, &s->ids[i], &hit, 1) &&
            !hit.footer->own)
            vote(d, hit.footer->footer.pack + 1);
    }
}

int dedup_find(struct dedup *d, struct segment *const *segments, size_t n, struct vm_error **err)
{
    bool any_before = false;
    for (size_t i = 0; i < n; i++) {
        find_in_cache(d, segments[i]);
        vote_before(d, segments[i]);
        any_before |= segments[i]->before != NULL;
    }
    if (any_before) {
        if (load_candidates(d, err) < 0)
            return -1;
        for (size_t i = 0; i < n; i++)
            find_in_cache(d, segments[i]);
    }
    size_t n_keys = 0;
    for (size_t i = 0; i < n; i++)
        if (add_keys(d, segments[i], &n_keys, err) < 0)
            return -1;
    if (index_lookup(d->index, d->keys, n_keys, err) < 0)
        return -1;
    d->stat.lookups += n_keys;
    for (size_t i = 0; i < n_keys; i++) {
        if (d->keys[i].len != 8)
            continue;
        d->stat.index_hits++;
        vote(d, get_le64(d->keys[i].value));
    }
    if (load_candidates(d, err) < 0)
        return -1;
    for (size_t i = 0; i < n; i++)
        vote_next(d, segments[i]);
    return load_candidates(d, err);
}

/* ---- which place, and the bound on scatter ---- */

static struct tally *tally_of(struct dedup *d, const struct footer_hit *hit)
{
    uint32_t record = footer_record_of(&hit->footer->footer, hit->page);
    size_t i = (hit->footer->slot * 4099u + record) % TALLY_SIZE;
    while (d->tally[i].footer &&
           (d->tally[i].footer != hit->footer || d->tally[i].record != record))
        i = (i + 1) % TALLY_SIZE;
    if (!d->tally[i].footer)
        d->tally[i] = (struct tally){.footer = hit->footer, .record = record};
    return &d->tally[i];
}

static void choose(struct dedup *d, struct segment *s, unsigned i, const struct footer_hit *hit)
{
    s->hits[i] = *hit;
    d->places[i].n = 0;
    tally_of(d, hit)->pages++;
}

/* All places of the segment's pages; those with one only are chosen at once. */
static void find_places(struct dedup *d, struct segment *s)
{
    memset(d->tally, 0, sizeof(d->tally));
    for (unsigned i = 0; i < SEGMENT_PAGES; i++) {
        struct places *p = &d->places[i];
        p->n = 0;
        if (s->state[i] != PAGE_KNOWN && s->state[i] != PAGE_UNKNOWN)
            continue;
        p->n = footer_cache_find(d->cache, &s->ids[i], p->hits, HITS_MAX);
        s->state[i] = p->n ? PAGE_KNOWN : PAGE_UNKNOWN;
        if (p->n == 1)
            choose(d, s, i, &p->hits[0]);
    }
}

/* Pages that have a place in a record that is needed anyway go there. */
static void use_chosen_records(struct dedup *d, struct segment *s)
{
    for (unsigned i = 0; i < SEGMENT_PAGES; i++) {
        const struct footer_hit *best = NULL;
        unsigned most = 0;
        for (unsigned j = 0; j < d->places[i].n; j++) {
            unsigned pages = tally_of(d, &d->places[i].hits[j])->pages;
            if (pages > most) {
                most = pages;
                best = &d->places[i].hits[j];
            }
        }
        if (best)
            choose(d, s, i, best);
    }
}

/* The record in which most of the pages without a choice have a place; the newest of several. */
static struct tally *next_record(struct dedup *d)
{
    struct tally *best = NULL;
    for (size_t i = 0; i < TALLY_SIZE; i++)
        d->tally[i].reach = 0;
    for (unsigned i = 0; i < SEGMENT_PAGES; i++)
        for (unsigned j = 0; j < d->places[i].n; j++)
            tally_of(d, &d->places[i].hits[j])->reach++;
    for (size_t i = 0; i < TALLY_SIZE; i++) {
        struct tally *t = &d->tally[i];
        if (t->reach && (!best || t->reach > best->reach ||
                         (t->reach == best->reach &&
                          t->footer->footer.pack > best->footer->footer.pack)))
            best = t;
    }
    return best;
}

/* The fewest records that hold the segment's known pages, found greedily. */
static void choose_places(struct dedup *d, struct segment *s)
{
    struct tally *t;
    find_places(d, s);
    use_chosen_records(d, s);
    while ((t = next_record(d))) {
        for (unsigned i = 0; i < SEGMENT_PAGES; i++)
            for (unsigned j = 0; j < d->places[i].n; j++)
                if (tally_of(d, &d->places[i].hits[j]) == t)
                    choose(d, s, i, &d->places[i].hits[j]);
    }
}

static bool is_new(enum page_state state)
{
    return state == PAGE_UNKNOWN || state == PAGE_AGAIN;
}

bool segment_extent_is_whole(const struct segment *s, unsigned extent)
{
    unsigned n = 0;
    if (!s->mask[extent])
        return false;
    for (unsigned i = extent * EXTENT_PAGES; i < (extent + 1) * EXTENT_PAGES; i++) {
        if (s->state[i] == PAGE_KNOWN)
            return false;
        n += is_new(s->state[i]);
    }
    return n >= EXTENT_WHOLE_MIN;
}

/* Records that the new pages will fill; those in part are shared with the segments beside. */
static unsigned new_records(const struct segment *s)
{
    unsigned whole = 0, rest = 0;
    for (unsigned e = 0; e < SEGMENT_EXTENTS; e++) {
        bool is_whole = segment_extent_is_whole(s, e);
        whole += is_whole;
        for (unsigned i = e * EXTENT_PAGES; !is_whole && i < (e + 1) * EXTENT_PAGES; i++)
            rest += is_new(s->state[i]);
    }
    return whole + (rest ? rest / RECORD_PAGES_MAX + 2 : 0);
}

static void drop_record(struct dedup *d, struct segment *s, const struct tally *t)
{
    for (unsigned i = 0; i < SEGMENT_PAGES; i++) {
        if (s->state[i] == PAGE_KNOWN && s->hits[i].footer == t->footer &&
            footer_record_of(&t->footer->footer, s->hits[i].page) == t->record) {
            s->state[i] = PAGE_AGAIN;
            d->stat.again++;
        }
    }
}

void dedup_settle(struct dedup *d, struct segment *s)
{
    choose_places(d, s);
    unsigned n = 0;
    for (size_t i = 0; i < TALLY_SIZE; i++)
        n += d->tally[i].pages > 0;
    while (n && n + new_records(s) > d->records_max) {
        struct tally *least = NULL;
        for (size_t i = 0; i < TALLY_SIZE; i++) {
            struct tally *t = &d->tally[i];
            if (t->pages && !t->dropped && (!least || t->pages < least->pages))
                least = t;
        }
        drop_record(d, s, least);
        least->dropped = true;
        n--;
    }
}

void dedup_find_again(struct dedup *d, struct segment *s, unsigned page)
{
    if (s->state[page] == PAGE_UNKNOWN &&
        footer_cache_find(d->cache, &s->ids[page], &s->hits[page], 1))
        s->state[page] = PAGE_KNOWN;
}

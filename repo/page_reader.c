/* SPDX-License-Identifier: Apache-2.0 */
#include "repo/page_reader.h"
#include "repo/forwarding.h"
#include "repo/names.h"
#include "repo/quarantine.h"

#include "base/clock.h"

#include <stdlib.h>

enum {
    GAP_MAX = 32 << 10,   /* bytes that are read in vain rather than asking twice */
    RANGE_MAX = 1 << 20,  /* of one request */
    RANGES_MAX = RECIPE_LEAF_PAGES,
    PASSES_MAX = 4,       /* a place can be moved again while it is read */
    QUARANTINE_S = 60,    /* so old may be what is known of the quarantine */
};

struct wanted {
    const struct recipe_page *page;   /* where it is read */
    const struct recipe_page *origin; /* where the recipe says it is */
    unsigned to; /* position in the output */
};

struct range {
    uint64_t pack;
    uint32_t start, end;
    size_t first, n; /* of wanted */
    char name[OBJECT_NAME_SIZE];
};

struct page_reader {
    struct store *store;
    struct record_codec codec;
    struct page_reader_stat stat;
    struct buffer data;
    struct wanted wanted[RECIPE_LEAF_PAGES];
    struct wanted again[RECIPE_LEAF_PAGES]; /* to be read in the next pass */
    size_t n_again;
    struct recipe_page places[RECIPE_LEAF_PAGES]; /* of forwarded pages, by position */
    struct forwards *forwards;
    struct number_set gone; /* packs */
    struct quarantine quarantine;
    int64_t quarantine_until_ns;
    struct range ranges[RANGES_MAX];
    struct store_op ops[RANGES_MAX];
    uint8_t pages[RECORD_RAW_MAX];
};

struct page_reader *page_reader_create(struct store *s, struct vm_error **err)
{
    struct page_reader *r = calloc(1, sizeof(*r));
    if (!r) {
        error_nomem(err);
        return NULL;
    }
    r->store = s;
    r->forwards = forwards_create(s, err);
    if (!r->forwards || record_codec_init(&r->codec, RECORD_LZ4, 0, err) < 0) {
        page_reader_destroy(r);
        return NULL;
    }
    return r;
}

void page_reader_destroy(struct page_reader *r)
{
    if (!r)
        return;
    record_codec_finish(&r->codec);
    forwards_destroy(r->forwards);
    number_set_finish(&r->gone);
    quarantine_finish(&r->quarantine);
    buffer_finish(&r->data);
    free(r);
}

static int by_place(const void *a, const void *b)
{
    const struct recipe_page *x = ((const struct wanted *)a)->page;
    const struct recipe_page *y = ((const struct wanted *)b)->page;
    if (x->pack != y->pack)
        return x->pack < y->pack ? -1 : 1;
    if (x->offset != y->offset)
        return x->offset < y->offset ? -1 : 1;
    return (int)x->page - (int)y->page;
}

/*
 * The page is not at w->page, as `problem` says: in the next pass it is read where the forwarding
 * says, if that is another place. Takes the problem over.
 */
static int read_again(struct page_reader *r, const struct wanted *w, struct vm_error *problem,
                      struct vm_error **err)
{
    cleanup_error struct vm_error *kept = problem;
    for (int fresh = 0; fresh < 2; fresh++) {
        struct recipe_page place = *w->origin;
        bool found;
        if (fresh)
            forwards_forget(r->forwards);
        if (forwards_find(r->forwards, &place, &found, err) < 0)
            return -1;
        if (!found || (place.pack == w->page->pack && place.offset == w->page->offset))
            continue;
        r->places[w->to] = place;
        r->again[r->n_again++] = (struct wanted){&r->places[w->to], w->origin, w->to};
        return 0;
    }
    return error_propagate(err, steal_ptr(&kept));
}

static bool is_known_bad(const struct page_reader *r, const struct recipe_page *p)
{
    return number_set_has(&r->gone, p->pack) ||
           quarantine_has_record(&r->quarantine, p->pack, p->offset);
}

static int load_quarantine(struct page_reader *r, struct vm_error **err)
{
    int64_t now = clock_mono_ns();
    if (now < r->quarantine_until_ns)
        return 0;
    r->quarantine_until_ns = now + QUARANTINE_S * NSEC_PER_SEC;
    return quarantine_load(r->store, &r->quarantine, err);
}

static int put_off(struct page_reader *r, const struct wanted *w, struct vm_error **err)
{
    struct vm_error *problem = NULL;
    error_set(&problem, VM_ERROR_CORRUPT, "pack %016" PRIx64 "%s", w->page->pack,
              number_set_has(&r->gone, w->page->pack) ? " is gone"
                                                      : " is quarantined: it is damaged");
    return read_again(r, w, problem, err);
}

/* Zeros are written at once; the others become wanted, where they are known to be. */
static int want_pages(struct page_reader *r, const struct recipe_page *pages, size_t n,
                      uint8_t *out, size_t *ret_n, struct vm_error **err)
{
    size_t n_wanted = 0;
    r->n_again = 0;
    if (load_quarantine(r, err) < 0)
        return -1;
    for (size_t i = 0; i < n; i++) {
        struct wanted w = {&pages[i], &pages[i], (unsigned)i};
        if (!pages[i].len)
            memset(out + i * PAGE_BYTES, 0, PAGE_BYTES);
        else if (!is_known_bad(r, &pages[i]))
            r->wanted[n_wanted++] = w;
        else if (put_off(r, &w, err) < 0)
            return -1;
    }
    memcpy(r->wanted + n_wanted, r->again, r->n_again * sizeof(*r->again));
    *ret_n = n_wanted + r->n_again;
    r->n_again = 0;
    return 0;
}

static size_t make_ranges(struct page_reader *r, size_t n_wanted)
{
    size_t n = 0;
    for (size_t i = 0; i < n_wanted; i++) {
        const struct recipe_page *p = r->wanted[i].page;
        struct range *last = n ? &r->ranges[n - 1] : NULL;
        uint32_t end = p->offset + p->len;
        if (last && last->pack == p->pack && p->offset <= last->end + GAP_MAX &&
            end - last->start <= RANGE_MAX) {
            last->end = end > last->end ? end : last->end;
            last->n++;
            continue;
        }
        struct range *range = &r->ranges[n++];
        *range =
            (struct range){.pack = p->pack, .start = p->offset, .end = end, .first = i, .n = 1};
        object_name(PACK_PREFIX, p->pack, range->name);
    }
    return n;
}

static int read_ranges(struct page_reader *r, size_t n, struct vm_error **err)
{
    size_t total = 0;
    for (size_t i = 0; i < n; i++)
        total += r->ranges[i].end - r->ranges[i].start;
    buffer_reset(&r->data);
    uint8_t *to = buffer_grow(&r->data, total + 1);
    if (!to)
        return error_nomem(err);
    for (size_t i = 0; i < n; i++) {
        struct range *range = &r->ranges[i];
        r->ops[i] = (struct store_op){.kind = STORE_READ, .area = STORE_PACK, .name = range->name,
                                      .offset = range->start, .len = range->end - range->start,
                                      .out = to};
        to += range->end - range->start;
    }
    r->stat.requests += n;
    r->stat.bytes += total;
    return store_run(r->store, r->ops, n, err);
}

/* How many of the wanted pages from i on, at most n, lie in the record of the first. */
static size_t same_record(const struct wanted *w, size_t n)
{
    size_t i = 1;
    while (i < n && w[i].page->offset == w[0].page->offset)
        i++;
    return i;
}

/* All pages of one record that are wanted, into the output. */
static int take_record(struct page_reader *r, const struct range *range, const struct store_op *op,
                       const struct wanted *w, size_t n, uint8_t *out, struct vm_error **err)
{
    size_t start = w->page->offset - range->start;
    size_t left = op->ret_len > start ? op->ret_len - start : 0;
    size_t len = w->page->len < left ? w->page->len : left;
    unsigned n_pages;
    if (record_decode(&r->codec, (const uint8_t *)op->out + start, len, range->pack,
                      w->page->offset, r->pages, &n_pages, err) < 0)
        return -1;
    r->stat.records++;
    for (size_t i = 0; i < n; i++) {
        if (w[i].page->page >= n_pages)
            return error_set(err, VM_ERROR_CORRUPT,
                             "pack %016" PRIx64 ", record at %u: it has no page %u", range->pack,
                             w->page->offset, w[i].page->page);
        memcpy(out + (size_t)w[i].to * PAGE_BYTES, r->pages + (size_t)w[i].page->page * PAGE_BYTES,
               PAGE_BYTES);
    }
    return 0;
}

static int range_is_there(struct page_reader *r, const struct range *range,
                          const struct store_op *op, struct vm_error **problem)
{
    if (op->result == STORE_DONE)
        return 0;
    if (op->result == STORE_UNREADABLE)
        return error_set(problem, VM_ERROR_CORRUPT, "pack %016" PRIx64 ": the disk cannot read it",
                         range->pack);
    number_set_add(&r->gone, range->pack, NULL);
    return error_set(problem, VM_ERROR_CORRUPT, "pack %016" PRIx64 " is gone", range->pack);
}

static int take_range(struct page_reader *r, const struct range *range, const struct store_op *op,
                      uint8_t *out, struct vm_error **err)
{
    for (size_t i = 0; i < range->n;) {
        const struct wanted *w = &r->wanted[range->first + i];
        size_t n = same_record(w, range->n - i);
        struct vm_error *problem = NULL;
        bool bad = range_is_there(r, range, op, &problem) < 0 ||
                   take_record(r, range, op, w, n, out, &problem) < 0;
        for (size_t j = 0; bad && j < n; j++)
            if (read_again(r, &w[j], error_copy(problem), err) < 0) {
                error_free(problem);
                return -1;
            }
        error_free(problem);
        i += n;
    }
    return 0;
}

static int read_wanted(struct page_reader *r, size_t n, uint8_t *out, struct vm_error **err)
{
    qsort(r->wanted, n, sizeof(*r->wanted), by_place);
    size_t n_ranges = make_ranges(r, n);
    if (read_ranges(r, n_ranges, err) < 0)
        return -1;
    for (size_t i = 0; i < n_ranges; i++)
        if (take_range(r, &r->ranges[i], &r->ops[i], out, err) < 0)
            return -1;
    return 0;
}

int page_reader_read(struct page_reader *r, const struct recipe_page *pages, size_t n, uint8_t *out,
                     struct vm_error **err)
{
    size_t left;
    if (want_pages(r, pages, n, out, &left, err) < 0)
        return -1;
    for (int pass = 0; left && pass < PASSES_MAX; pass++) {
        if (read_wanted(r, left, out, err) < 0)
            return -1;
        left = r->n_again;
        memcpy(r->wanted, r->again, left * sizeof(*r->again));
        r->n_again = 0;
    }
    return left ? error_set(err, VM_ERROR_CORRUPT, "pack %016" PRIx64 " is moved all the time",
                            r->wanted[0].origin->pack)
                : 0;
}

struct page_reader_stat page_reader_stat(const struct page_reader *r)
{
    return r->stat;
}

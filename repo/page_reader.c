/* SPDX-License-Identifier: Apache-2.0 */
#include "repo/page_reader.h"
#include "repo/names.h"

#include <stdlib.h>

enum {
    GAP_MAX = 32 << 10,   /* bytes that are read in vain rather than asking twice */
    RANGE_MAX = 1 << 20,  /* of one request */
    RANGES_MAX = RECIPE_LEAF_PAGES,
};

struct wanted {
    const struct recipe_page *page;
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
    if (record_codec_init(&r->codec, RECORD_LZ4, 0, err) < 0) {
        free(r);
        return NULL;
    }
    return r;
}

void page_reader_destroy(struct page_reader *r)
{
    if (!r)
        return;
    record_codec_finish(&r->codec);
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

/* Zeros are written at once; the others are sorted by where they lie. */
static size_t sort_wanted(struct page_reader *r, const struct recipe_page *pages, size_t n,
                          uint8_t *out)
{
    size_t n_wanted = 0;
    for (size_t i = 0; i < n; i++) {
        if (pages[i].len)
            r->wanted[n_wanted++] = (struct wanted){&pages[i], (unsigned)i};
        else
            memset(out + i * PAGE_BYTES, 0, PAGE_BYTES);
    }
    qsort(r->wanted, n_wanted, sizeof(*r->wanted), by_place);
    return n_wanted;
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

static int take_range(struct page_reader *r, const struct range *range, const struct store_op *op,
                      uint8_t *out, struct vm_error **err)
{
    if (op->result != STORE_DONE)
        return error_set(err, VM_ERROR_CORRUPT, "pack %016" PRIx64 " is gone", range->pack);
    for (size_t i = 0; i < range->n;) {
        const struct wanted *w = &r->wanted[range->first + i];
        size_t n = same_record(w, range->n - i);
        if (take_record(r, range, op, w, n, out, err) < 0)
            return -1;
        i += n;
    }
    return 0;
}

int page_reader_read(struct page_reader *r, const struct recipe_page *pages, size_t n, uint8_t *out,
                     struct vm_error **err)
{
    size_t n_ranges = make_ranges(r, sort_wanted(r, pages, n, out));
    if (read_ranges(r, n_ranges, err) < 0)
        return -1;
    for (size_t i = 0; i < n_ranges; i++)
        if (take_range(r, &r->ranges[i], &r->ops[i], out, err) < 0)
            return -1;
    return 0;
}

struct page_reader_stat page_reader_stat(const struct page_reader *r)
{
    return r->stat;
}

/* SPDX-License-Identifier: Apache-2.0 */
#include "snapshot/gather.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

struct gather {
    struct image_writer *writer;
    pthread_mutex_t lock; /* guards what follows */
    struct segment *open[GATHER_SEGMENTS];
    uint64_t used[GATHER_SEGMENTS]; /* when, for the least recently used */
    unsigned pages[GATHER_SEGMENTS];
    uint64_t clock;
};

struct gather *gather_create(struct image_writer *w, struct vm_error **err)
{
    struct gather *g = calloc(1, sizeof(*g));
    if (!g) {
        error_nomem(err);
        return NULL;
    }
    g->writer = w;
    pthread_mutex_init(&g->lock, NULL);
    return g;
}

static void put(struct gather *g, unsigned slot)
{
    if (g->open[slot])
        image_writer_put(g->writer, steal_ptr(&g->open[slot]));
}

void gather_flush(struct gather *g)
{
    SCOPE_LOCK(&g->lock);
    for (unsigned i = 0; i < GATHER_SEGMENTS; i++)
        put(g, i);
}

void gather_destroy(struct gather *g)
{
    if (!g)
        return;
    gather_flush(g);
    pthread_mutex_destroy(&g->lock);
    free(g);
}

/* The slot with that segment; the one that was touched longest ago makes room. -1 on error. */
static int open_slot(struct gather *g, struct image_file *file, uint64_t number,
                     struct vm_error **err)
{
    unsigned oldest = 0;
    for (unsigned i = 0; i < GATHER_SEGMENTS; i++) {
        const struct segment *s = g->open[i];
        if (s && s->file == file && s->number == number) {
            g->used[i] = ++g->clock;
            return (int)i;
        }
        if (!s || (g->open[oldest] && g->used[i] < g->used[oldest]))
            oldest = i;
    }
    put(g, oldest);
    struct segment *s = image_writer_segment(g->writer, file, number, err);
    if (!s)
        return -1;
    g->open[oldest] = s;
    g->pages[oldest] = 0;
    g->used[oldest] = ++g->clock;
    return (int)oldest;
}

/* `len` bytes of one page; what is behind them is zero. */
static int put_page(struct gather *g, struct image_file *file, uint64_t number, const uint8_t *data,
                    size_t len, struct vm_error **err)
{
    int slot = open_slot(g, file, number / SEGMENT_PAGES, err);
    if (slot < 0)
        return -1;
    struct segment *s = g->open[slot];
    unsigned page = (unsigned)(number % SEGMENT_PAGES);
    uint8_t *to = s->data + (size_t)page * PAGE_BYTES;
    if (data)
        memcpy(to, data, len);
    memset(to + (data ? len : 0), 0, PAGE_BYTES - (data ? len : 0));
    g->pages[slot] += !s->given[page];
    s->given[page] = true;
    if (g->pages[slot] == SEGMENT_PAGES)
        put(g, (unsigned)slot);
    return 0;
}

int gather_page(struct gather *g, struct image_file *file, uint64_t number, const uint8_t *data,
                struct vm_error **err)
{
    SCOPE_LOCK(&g->lock);
    return put_page(g, file, number, data, PAGE_BYTES, err);
}

int gather_write(struct gather *g, struct image_file *file, uint64_t size, uint64_t offset,
                 const uint8_t *data, uint64_t len, struct vm_error **err)
{
    bool whole = offset % PAGE_BYTES == 0 && offset <= size && len <= size - offset &&
                 (len % PAGE_BYTES == 0 || offset + len == size);
    if (!whole)
        return error_set(err, VM_ERROR_PROTOCOL,
                         "%" PRIu64 " bytes at %" PRIu64 " are not whole pages of a disk of %" PRIu64
                         " bytes",
                         len, offset, size);
    for (uint64_t done = 0; done < len; done += PAGE_BYTES) {
        size_t n = len - done < PAGE_BYTES ? (size_t)(len - done) : PAGE_BYTES;
        SCOPE_LOCK(&g->lock);
        if (put_page(g, file, (offset + done) / PAGE_BYTES, data ? data + done : NULL, n, err) < 0)
            return -1;
    }
    return 0;
}

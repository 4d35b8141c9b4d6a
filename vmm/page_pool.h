/* SPDX-License-Identifier: Apache-2.0 */
/*
 * page_pool: bounded memory for a driver that receives guest pages: slabs into which the bytes
 * are read, and batches (vmm/page_batch.h) whose pages point into slabs, without a copy.
 *
 *     slab = page_pool_take_slab(pool, false)      with true: waits; keep nothing back meanwhile
 *                                                  that the holders of batches wait for
 *     ... read into slab->data ...
 *     batch = page_pool_take_batch(pool, channel, false)
 *     page_pool_fits(batch, ...), page_pool_add(batch, addr, slab, data)
 *     events->pages(arg, &batch->base)             whoever has it drops it with page_batch_unref
 *     page_pool_put_slab(pool, slab)               the reader is through with it
 *     page_pool_close(pool)
 *
 * A slab is free again when its reader put it back and the last batch with a page in it was
 * released. Free ones are used again last in, first out, so that a pool touches no more memory
 * than it needs.
 *
 * Memory: slabs as asked for, PAGE_POOL_BATCHES batches (550 KiB).
 *
 * Ownership: batches may outlive page_pool_close; the memory goes with the last of them.
 *
 * Threads: one reader calls everything but page_pool_stop and page_batch_unref, which are for
 * any.
 */
#ifndef VMMIG_VMM_PAGE_POOL_H
#define VMMIG_VMM_PAGE_POOL_H

#include "base/error.h"
#include "vmm/page_batch.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define PAGE_POOL_SLAB (1u << 20)
#define PAGE_POOL_BATCHES 128u
/* A batch pins at most this many slabs. */
#define PAGE_POOL_BATCH_SLABS 4u

struct page_pool;

struct page_slab {
    uint8_t *data; /* PAGE_POOL_SLAB bytes */
    /* The pool's own. */
    unsigned refs;
    struct page_slab *next;
};

struct pool_batch {
    struct page_batch base; /* first */
    unsigned zero_pages;
    /* The pool's own. */
    uint64_t highest;
    struct page_pool *pool;
    struct pool_batch *next;
    unsigned n_slabs;
    struct page_slab *slabs[PAGE_POOL_BATCH_SLABS];
};

/* `slabs` >= 2: a record may begin in one and end in the next. */
struct page_pool *page_pool_create(unsigned slabs, struct vm_error **err);
/* All slabs were put back, and all batches taken were handed over or unreferenced. NULL is fine. */
void page_pool_close(struct page_pool *pool);

/* NULL if none is free; with `wait`, only after page_pool_stop. */
struct page_slab *page_pool_take_slab(struct page_pool *pool, bool wait);
void page_pool_put_slab(struct page_pool *pool, struct page_slab *slab);
/* Does no batch point into it? */
bool page_pool_slab_unused(struct page_pool *pool, const struct page_slab *slab);
struct pool_batch *page_pool_take_batch(struct page_pool *pool, unsigned channel, bool wait);
/* Waits end, now and in future. */
void page_pool_stop(struct page_pool *pool);

/*
 * Can this page go into the batch: is there room, is it not in there already, does it not pin one
 * slab too many? data is NULL for a zero page, which pins none.
 */
bool page_pool_fits(const struct pool_batch *batch, uint64_t addr, const struct page_slab *slab,
                    const uint8_t *data);
/* Add a page that fits; data lies in slab. */
void page_pool_add(struct pool_batch *batch, uint64_t addr, struct page_slab *slab,
                   const uint8_t *data);
/* The slab stays until the batch goes. page_pool_add does it by itself. */
void page_pool_hold(struct pool_batch *batch, struct page_slab *slab);

#endif

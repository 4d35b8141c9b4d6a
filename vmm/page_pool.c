/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/page_pool.h"

#include "base/cleanup.h"

#include <errno.h>
#include <pthread.h>
#include <string.h>
#include <sys/mman.h>

struct page_pool {
    pthread_mutex_t lock;
    pthread_cond_t freed;
    bool stopped;
    unsigned users; /* the reader until close, and every batch that is out */

    unsigned n_slabs;
    uint8_t *memory;
    struct page_slab *slabs, *free_slabs;
    struct pool_batch *batches, *free_batches;
};

static void pool_free(struct page_pool *pool)
{
    pthread_mutex_destroy(&pool->lock);
    pthread_cond_destroy(&pool->freed);
    if (pool->memory)
        munmap(pool->memory, (size_t)pool->n_slabs * PAGE_POOL_SLAB);
    free(pool->slabs);
    free(pool->batches);
    free(pool);
}

static int pool_allocate(struct page_pool *pool, struct vm_error **err)
{
    pool->slabs = calloc(pool->n_slabs, sizeof(*pool->slabs));
    pool->batches = calloc(PAGE_POOL_BATCHES, sizeof(*pool->batches));
    if (!pool->slabs || !pool->batches)
        return error_nomem(err);
    /* Untouched slabs cost nothing. */
    void *memory = mmap(NULL, (size_t)pool->n_slabs * PAGE_POOL_SLAB, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        return error_errno(err, errno, "cannot get %u MiB for guest pages on their way",
                           pool->n_slabs);
    pool->memory = memory;
    return 0;
}

struct page_pool *page_pool_create(unsigned slabs, struct vm_error **err)
{
    struct page_pool *pool = calloc(1, sizeof(*pool));
    if (!pool) {
        error_nomem(err);
        return NULL;
    }
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->freed, NULL);
    pool->users = 1;
    pool->n_slabs = slabs;
    if (pool_allocate(pool, err) < 0) {
        pool_free(pool);
        return NULL;
    }
    for (unsigned i = slabs; i--;) {
        pool->slabs[i].data = pool->memory + (size_t)i * PAGE_POOL_SLAB;
        pool->slabs[i].next = pool->free_slabs;
        pool->free_slabs = &pool->slabs[i];
    }
    for (unsigned i = PAGE_POOL_BATCHES; i--;) {
        pool->batches[i].pool = pool;
        pool->batches[i].next = pool->free_batches;
        pool->free_batches = &pool->batches[i];
    }
    return pool;
}

/* Unlock, with one user less; the last one frees the pool. */
static void leave(struct page_pool *pool)
{
    bool last = --pool->users == 0;
    pthread_mutex_unlock(&pool->lock);
    if (last)
        pool_free(pool);
}

void page_pool_close(struct page_pool *pool)
{
    if (!pool)
        return;
    pthread_mutex_lock(&pool->lock);
    leave(pool);
}

void page_pool_stop(struct page_pool *pool)
{
    SCOPE_LOCK(&pool->lock);
    pool->stopped = true;
    pthread_cond_broadcast(&pool->freed);
}

struct page_slab *page_pool_take_slab(struct page_pool *pool, bool wait)
{
    SCOPE_LOCK(&pool->lock);
    while (!pool->free_slabs && wait && !pool->stopped)
        pthread_cond_wait(&pool->freed, &pool->lock);
    struct page_slab *slab = pool->free_slabs;
    if (slab) {
        pool->free_slabs = slab->next;
        slab->refs = 1;
    }
    return slab;
}

/* Under the lock. */
static void unref_slab(struct page_pool *pool, struct page_slab *slab)
{
    if (--slab->refs)
        return;
    slab->next = pool->free_slabs;
    pool->free_slabs = slab;
    pthread_cond_signal(&pool->freed);
}

void page_pool_put_slab(struct page_pool *pool, struct page_slab *slab)
{
    SCOPE_LOCK(&pool->lock);
    unref_slab(pool, slab);
}

bool page_pool_slab_unused(struct page_pool *pool, const struct page_slab *slab)
{
    SCOPE_LOCK(&pool->lock);
    return slab->refs == 1;
}

/* The last reference to a batch is gone. */
static void batch_release(struct page_batch *base)
{
    struct pool_batch *batch = (struct pool_batch *)base;
    struct page_pool *pool = batch->pool;
    pthread_mutex_lock(&pool->lock);
    for (unsigned i = 0; i < batch->n_slabs; i++)
        unref_slab(pool, batch->slabs[i]);
    batch->next = pool->free_batches;
    pool->free_batches = batch;
    pthread_cond_signal(&pool->freed);
    leave(pool);
}

struct pool_batch *page_pool_take_batch(struct page_pool *pool, unsigned channel, bool wait)
{
    SCOPE_LOCK(&pool->lock);
    while (!pool->free_batches && wait && !pool->stopped)
        pthread_cond_wait(&pool->freed, &pool->lock);
    struct pool_batch *batch = pool->free_batches;
    if (!batch)
        return NULL;
    pool->free_batches = batch->next;
    pool->users++;
    batch->base.release = batch_release;
    batch->base.channel = channel;
    batch->base.file = 0;
    batch->base.n = batch->zero_pages = batch->n_slabs = 0;
    atomic_store_explicit(&batch->base.refs, 1, memory_order_relaxed);
    return batch;
}

/* Pages come in stream order, so a slab that the batch pins already is the last one it pinned. */
static bool pins(const struct pool_batch *batch, const struct page_slab *slab)
{
    return batch->n_slabs && batch->slabs[batch->n_slabs - 1] == slab;
}

static bool contains(const struct pool_batch *batch, uint64_t addr)
{
    if (!batch->base.n || addr > batch->highest) /* the usual case: a round ascends */
        return false;
    for (unsigned i = 0; i < batch->base.n; i++) {
        if (batch->base.pages[i].addr == addr)
            return true;
    }
    return false;
}

bool page_pool_fits(const struct pool_batch *batch, uint64_t addr, const struct page_slab *slab,
                    const uint8_t *data)
{
    if (batch->base.n == PAGE_BATCH_MAX || contains(batch, addr))
        return false;
    return !data || batch->n_slabs < PAGE_POOL_BATCH_SLABS || pins(batch, slab);
}

void page_pool_hold(struct pool_batch *batch, struct page_slab *slab)
{
    SCOPE_LOCK(&batch->pool->lock);
    slab->refs++;
    batch->slabs[batch->n_slabs++] = slab;
}

void page_pool_add(struct pool_batch *batch, uint64_t addr, struct page_slab *slab,
                   const uint8_t *data)
{
    if (!data)
        batch->zero_pages++;
    else if (!pins(batch, slab))
        page_pool_hold(batch, slab);
    if (!batch->base.n || addr > batch->highest)
        batch->highest = addr;
    batch->base.pages[batch->base.n++] = (struct page_ref){addr, data};
}

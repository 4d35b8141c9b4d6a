/* SPDX-License-Identifier: Apache-2.0 */
/*
 * page_batch: guest pages on their way from a VMM's driver to an encoder, without a copy.
 *
 * A page is named by one 64-bit address: region << 48 | page number within the region, pages of
 * 4 KiB whatever the guest's or the backend's page size. The address space is cut into stripes of
 * 1 MiB; all pages of a stripe travel on the same channel for the whole migration
 * (page_stripe_channel), and a channel is first in, first out from the encoder to guest memory. So
 * two versions of a page can never overtake one another, whichever connection is faster, and the
 * per-page state of an encoder needs no lock.
 *
 * A batch holds pages of one channel, each page at most once, in the order in which the driver
 * found them. The memory behind `data` stays valid and unchanged until the last reference goes, or,
 * for a driver that maps guest memory, may be changed by the guest meanwhile: then the page is dirty
 * again and will come once more.
 *
 * Ownership: reference counted, any thread. The maker sets `release`, which gets the batch back
 * when the last reference is dropped.
 */
#ifndef VMMIG_VMM_PAGE_BATCH_H
#define VMMIG_VMM_PAGE_BATCH_H

#include "base/error.h"

#include <stdatomic.h>
#include <stdint.h>

#define GUEST_PAGE_SIZE 4096u
#define PAGE_BATCH_MAX 256u
#define PAGE_STRIPE_PAGES 256u
#define PAGE_REGION_SHIFT 48

struct page_ref {
    uint64_t addr;
    const uint8_t *data; /* GUEST_PAGE_SIZE bytes, or NULL: the page is all zero */
};

struct page_batch {
    atomic_uint refs;
    void (*release)(struct page_batch *batch);
    unsigned channel;
    unsigned n;
    /*
     * A file that holds the memory behind `data`, from the byte that is mapped at file_start on; 0: none. Who copies
     * the pages anyway reads them from there: that faults nothing into a mapping, and nothing has to be unmapped.
     */
    int file;
    uint64_t file_offset;
    const uint8_t *file_start;
    struct page_ref pages[PAGE_BATCH_MAX];
};

/*
 * Every page that has contents, once, at room + its place in the batch * GUEST_PAGE_SIZE: through
 * the batch's file if it has one. What a guest writes meanwhile is then in all that is done with
 * the page, or in nothing.
 */
int page_batch_copy(const struct page_batch *batch, uint8_t *room, struct vm_error **err);

static inline uint64_t page_addr(unsigned region, uint64_t page)
{
    return (uint64_t)region << PAGE_REGION_SHIFT | page;
}

static inline unsigned page_addr_region(uint64_t addr)
{
    return (unsigned)(addr >> PAGE_REGION_SHIFT);
}

static inline uint64_t page_addr_number(uint64_t addr)
{
    return addr & ((1ULL << PAGE_REGION_SHIFT) - 1);
}

static inline unsigned page_stripe_channel(uint64_t addr, unsigned n_channels)
{
    return (unsigned)((addr / PAGE_STRIPE_PAGES) % n_channels);
}

static inline void page_batch_ref(struct page_batch *batch)
{
    atomic_fetch_add_explicit(&batch->refs, 1, memory_order_relaxed);
}

static inline void page_batch_unref(struct page_batch *batch)
{
    if (batch && atomic_fetch_sub_explicit(&batch->refs, 1, memory_order_acq_rel) == 1)
        batch->release(batch);
}

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * page_history: what the encoder of one channel remembers of the pages that it sent, in bounded
 * memory.
 *
 *   sent bits   may the page be anything but zero at the destination? One bit per page, or per 2^k
 *               neighbours of a large guest. A wrong "yes" costs bytes; there is no wrong "no".
 *   hashes      of the page as last sent. Direct mapped; a page that had to make room is sent again.
 *   former      the page as last sent, byte for byte. Direct mapped; kept for pages that come often:
 *               a newcomer must be refused a few times before it displaces a page whose delta
 *               worked. So a sweep over more pages than fit does not wipe out the ones that do.
 *
 * A page is known by a dense index: its position among the pages of this channel's stripes.
 *
 * Threads: one. Memory: fixed at page_history_init.
 */
#ifndef VMMIG_MIGRATE_PAGE_HISTORY_H
#define VMMIG_MIGRATE_PAGE_HISTORY_H

#include "base/error.h"
#include "vmm/guest.h"
#include "vmm/page_batch.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* XXH3-128 of a page, mixed with its address: equal only for the same page and contents. */
struct page_hash {
    uint64_t low, high;
};

struct page_history {
    unsigned n_channels, channel, n_regions;
    struct page_history_region {
        uint64_t pages;
        uint64_t first_index;
    } *regions;
    uint64_t n_indices;

    unsigned char *sent;
    size_t sent_size;
    unsigned sent_shift; /* a bit stands for 2^sent_shift pages */

    struct page_hash *hashes;
    uint64_t n_hashes;

    uint8_t *former; /* n_former pages */
    struct page_former_slot {
        uint64_t owner; /* index + 1, 0: free */
        uint8_t merits; /* how many newcomers are refused */
    } *slots;
    uint64_t n_former;
};

/*
 * At most `memory` bytes are taken, never more than the guest's size makes sense of. all_sent: the
 * destination's memory may be anything to begin with. NO_SPACE without memory.
 */
int page_history_init(struct page_history *h, const struct guest_region *regions,
                      unsigned n_regions, unsigned channel, unsigned n_channels, size_t memory,
                      bool all_sent, struct vm_error **err);
void page_history_finish(struct page_history *h);
size_t page_history_memory(const struct page_history *h);

/* The index of a page; false if it is in no region or not this channel's. */
bool page_history_locate(const struct page_history *h, uint64_t addr, uint64_t *ret_index);

static inline bool page_history_sent(const struct page_history *h, uint64_t index)
{
    uint64_t bit = index >> h->sent_shift;
    return h->sent[bit / 8] >> (bit % 8) & 1;
}

static inline void page_history_set_sent(struct page_history *h, uint64_t index)
{
    uint64_t bit = index >> h->sent_shift;
    h->sent[bit / 8] |= (unsigned char)(1u << (bit % 8));
}

/* The page was sent as zero; neighbours that share its bit keep it. */
static inline void page_history_clear_sent(struct page_history *h, uint64_t index)
{
    if (!h->sent_shift)
        h->sent[index / 8] &= (unsigned char)~(1u << (index % 8));
}

/* Is this the hash that the page had when last sent? If not, it is from now on. */
static inline bool page_history_same(struct page_history *h, uint64_t index, struct page_hash hash)
{
    struct page_hash *last = &h->hashes[index % h->n_hashes];
    if (last->low == hash.low && last->high == hash.high)
        return true;
    *last = hash;
    return false;
}

/* The page as last sent, or NULL. Valid until the next call that changes it. */
const uint8_t *page_history_former(const struct page_history *h, uint64_t index);
/* The former version was of use / was not. */
void page_history_praise(struct page_history *h, uint64_t index, bool useful);
/* The page is sent with these contents: keep them if there is room, and in no case older ones. */
void page_history_keep(struct page_history *h, uint64_t index, const uint8_t *page);
/* The page is sent, and what is kept of it (if anything) becomes void. */
void page_history_drop(struct page_history *h, uint64_t index);

#endif

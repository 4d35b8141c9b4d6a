/* SPDX-License-Identifier: Apache-2.0 */
#include "migrate/page_history.h"

#include <stdlib.h>
#include <string.h>

/* How often a page whose delta worked refuses newcomers, and a page that was never tried. */
enum { MERITS_MAX = 16, MERITS_NEW = 1 };

static int init_regions(struct page_history *h, const struct guest_region *regions,
                        struct vm_error **err)
{
    h->regions = calloc(h->n_regions, sizeof(*h->regions));
    if (!h->regions)
        return error_nomem(err);
    for (unsigned i = 0; i < h->n_regions; i++) {
        uint64_t pages = regions[i].size / GUEST_PAGE_SIZE;
        if (regions[i].size % GUEST_PAGE_SIZE || pages > 1ULL << (PAGE_REGION_SHIFT - 8))
            return error_set(err, VM_ERROR_PROTOCOL, "guest region %u has an invalid size", i);
        uint64_t stripes = (pages + PAGE_STRIPE_PAGES - 1) / PAGE_STRIPE_PAGES;
        h->regions[i].pages = pages;
        h->regions[i].first_index = h->n_indices;
        h->n_indices += (stripes + h->n_channels - 1) / h->n_channels * PAGE_STRIPE_PAGES;
    }
    return 0;
}

static uint64_t min_u64(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

/* An eighth of the memory at most for the sent bits, a third of the rest for hashes. */
static void divide_memory(struct page_history *h, size_t memory)
{
    uint64_t indices = h->n_indices ? h->n_indices : 1;
    while (h->sent_shift < 63 && (indices >> h->sent_shift) / 8 + 1 > memory / 8)
        h->sent_shift++;
    h->sent_size = (indices >> h->sent_shift) / 8 + 1;
    memory -= h->sent_size;
    h->n_hashes = min_u64(indices, memory / 3 / sizeof(*h->hashes));
    memory -= h->n_hashes * sizeof(*h->hashes);
    h->n_former = min_u64(indices, memory / (GUEST_PAGE_SIZE + sizeof(*h->slots)));
}

int page_history_init(struct page_history *h, const struct guest_region *regions,
                      unsigned n_regions, unsigned channel, unsigned n_channels, size_t memory,
                      bool all_sent, struct vm_error **err)
{
    *h =
        (struct page_history){.n_channels = n_channels, .channel = channel, .n_regions = n_regions};
    if (init_regions(h, regions, err) < 0) {
        page_history_finish(h);
        return -1;
    }
    divide_memory(h, memory);
    /* calloc: what a small dirty set never touches takes no memory. */
    h->sent = calloc(1, h->sent_size);
    h->hashes = calloc(h->n_hashes, sizeof(*h->hashes));
    h->former = calloc(h->n_former, GUEST_PAGE_SIZE);
    h->slots = calloc(h->n_former, sizeof(*h->slots));
    if (!h->sent || !h->hashes || !h->former || !h->slots) {
        page_history_finish(h);
        return error_nomem(err);
    }
    if (all_sent)
        memset(h->sent, 0xff, h->sent_size);
    return 0;
}

void page_history_finish(struct page_history *h)
{
    free(h->regions);
    free(h->sent);
    free(h->hashes);
    free(h->former);
    free(h->slots);
    *h = (struct page_history){0};
}

size_t page_history_memory(const struct page_history *h)
{
    return h->n_regions * sizeof(*h->regions) + h->sent_size + h->n_hashes * sizeof(*h->hashes) +
           h->n_former * (GUEST_PAGE_SIZE + sizeof(*h->slots));
}

bool page_history_locate(const struct page_history *h, uint64_t addr, uint64_t *ret_index)
{
    unsigned region = page_addr_region(addr);
    uint64_t page = page_addr_number(addr);
    if (region >= h->n_regions || page >= h->regions[region].pages ||
        page_stripe_channel(addr, h->n_channels) != h->channel)
        return false;
    uint64_t stripe = page / PAGE_STRIPE_PAGES / h->n_channels;
    *ret_index =
        h->regions[region].first_index + stripe * PAGE_STRIPE_PAGES + page % PAGE_STRIPE_PAGES;
    return true;
}

const uint8_t *page_history_former(const struct page_history *h, uint64_t index)
{
    uint64_t slot = index % h->n_former;
    return h->slots[slot].owner == index + 1 ? h->former + slot * GUEST_PAGE_SIZE : NULL;
}

void page_history_praise(struct page_history *h, uint64_t index, bool useful)
{
    struct page_former_slot *slot = &h->slots[index % h->n_former];
    if (useful)
        slot->merits = MERITS_MAX;
    else if (slot->merits)
        slot->merits--;
}

void page_history_keep(struct page_history *h, uint64_t index, const uint8_t *page)
{
    uint64_t number = index % h->n_former;
    struct page_former_slot *slot = &h->slots[number];
    if (slot->owner != index + 1) {
        if (slot->owner && slot->merits) {
            slot->merits--;
            return;
        }
        slot->owner = index + 1;
        slot->merits = MERITS_NEW;
    }
    memcpy(h->former + number * GUEST_PAGE_SIZE, page, GUEST_PAGE_SIZE);
}

void page_history_drop(struct page_history *h, uint64_t index)
{
    struct page_former_slot *slot = &h->slots[index % h->n_former];
    if (slot->owner == index + 1)
        *slot = (struct page_former_slot){0};
}

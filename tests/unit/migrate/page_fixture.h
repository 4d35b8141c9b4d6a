/* SPDX-License-Identifier: Apache-2.0 */
/*
 * page_fixture: a guest to encode from and one to decode into, pages of many kinds, and batches of
 * them. Random, but the same for the same seed.
 */
#ifndef VMMIG_TESTS_PAGE_FIXTURE_H
#define VMMIG_TESTS_PAGE_FIXTURE_H

#include "migrate/page_decoder.h"
#include "migrate/page_encoder.h"

struct prng {
    uint64_t state;
};

uint64_t prng_next(struct prng *r);
static inline uint64_t prng_below(struct prng *r, uint64_t n)
{
    return prng_next(r) % n;
}

enum page_content {
    CONTENT_ZERO,
    CONTENT_TEXT,     /* words of a small vocabulary */
    CONTENT_KERNEL,   /* records with pointers, small numbers and zeros, as in a kernel's slabs */
    CONTENT_REPEATED, /* one byte, or one short pattern */
    CONTENT_SPARSE,   /* zero but for one byte, wherever it is */
    CONTENT_RANDOM,
    CONTENT_COUNT
};
extern const char *const page_content_names[CONTENT_COUNT];
void fill_page(struct prng *r, uint8_t *page, enum page_content content);
/* Change a few bytes. */
void touch_page(struct prng *r, uint8_t *page);

#define FIXTURE_REGIONS 3
struct fixture {
    struct guest_region source[FIXTURE_REGIONS], destination[FIXTURE_REGIONS];
    uint64_t size; /* bytes of all regions */
};

/* Regions of the given numbers of pages; shared memory that begins as zero. */
void fixture_init(struct fixture *f, const unsigned pages[FIXTURE_REGIONS]);
void fixture_finish(struct fixture *f);
uint8_t *fixture_page(struct guest_region *regions, uint64_t addr);

/* An empty batch on the heap for the channel; freed when the last reference goes. */
struct page_batch *batch_new(unsigned channel);
void batch_add(struct page_batch *batch, uint64_t addr, const uint8_t *data);

/*
 * Carry an encoded batch over, as a channel does. `cut` >= 0: the payload breaks off after so many
 * bytes, and nothing is committed.
 */
int deliver(struct page_decoder *dec, const struct encoded_batch *out, ssize_t cut,
            struct vm_error **err);

#endif

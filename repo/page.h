/* SPDX-License-Identifier: Apache-2.0 */
/*
 * page: what makes two pages the same. A page is 4096 bytes; its identity is the SHA-256 of them,
 * so that nobody can make two different pages that the repository takes for one. A page of zeros
 * has no identity: it is never stored. An extent is 16 pages, aligned.
 *
 * Threads: any; a page_hasher belongs to one thread at a time.
 */
#ifndef VMMIG_REPO_PAGE_H
#define VMMIG_REPO_PAGE_H

#include "base/error.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum {
    PAGE_BYTES = 4096,
    EXTENT_PAGES = 16,
    EXTENT_BYTES = EXTENT_PAGES * PAGE_BYTES,
    PAGE_ID_BYTES = 32,
};

struct page_id {
    uint8_t bytes[PAGE_ID_BYTES];
};

static inline bool page_id_equal(const struct page_id *a, const struct page_id *b)
{
    return !memcmp(a, b, sizeof(*a));
}

static inline bool page_all_zero(const void *page)
{
    const uint8_t *p = page;
    return !p[0] && !memcmp(p, p + 1, PAGE_BYTES - 1);
}

struct page_hasher {
    void *context, *digest;
    bool in_pairs; /* this processor hashes two pages at once */
};

int page_hasher_init(struct page_hasher *h, struct vm_error **err);
void page_hasher_finish(struct page_hasher *h);
/* SHA-256 of n bytes. */
int page_hasher_hash(struct page_hasher *h, const void *data, size_t n, struct page_id *ret_id,
                     struct vm_error **err);
/* The identities of n pages, one after the other in memory. */
int page_hasher_pages(struct page_hasher *h, const void *pages, unsigned n, struct page_id *ret_ids,
                      struct vm_error **err);
/*
 * The identity of an extent: SHA-256 over its 16 page identities, 32 bytes of zero for each page of
 * zeros. `ids` are those of the pages that the mask names, in order.
 */
int page_hasher_extent(struct page_hasher *h, const struct page_id *ids, uint16_t mask,
                       struct page_id *ret_id, struct vm_error **err);

#endif

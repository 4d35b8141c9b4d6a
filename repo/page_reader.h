/* SPDX-License-Identifier: Apache-2.0 */
/*
 * page_reader: pages from packs. Given where pages are, reads their records, those that lie close
 * together in one request, all requests at once; checks and decompresses them. What a pack that is
 * gone, a damaged record or a quarantined one held is read from where its forwarding says.
 *
 * Threads: a page_reader belongs to one thread at a time. Memory: the stored bytes of the pages
 * that one call asks for, and 64 KiB.
 */
#ifndef VMMIG_REPO_PAGE_READER_H
#define VMMIG_REPO_PAGE_READER_H

#include "repo/recipe.h"
#include "repo/record.h"
#include "repo/store.h"

struct page_reader;

struct page_reader *page_reader_create(struct store *s, struct vm_error **err);
void page_reader_destroy(struct page_reader *r);
DEFINE_CLEANUP(page_reader, struct page_reader *, page_reader_destroy)

/*
 * The content of n <= RECIPE_LEAF_PAGES pages, one after the other, into `out`. CORRUPT, with pack
 * and record in the message, if anything is damaged or gone and not forwarded; `out` is then not to
 * be used.
 */
int page_reader_read(struct page_reader *r, const struct recipe_page *pages, size_t n, uint8_t *out,
                     struct vm_error **err);

struct page_reader_stat {
    uint64_t requests, bytes, records; /* of the store; bytes read; records decompressed */
};
struct page_reader_stat page_reader_stat(const struct page_reader *r);

#endif

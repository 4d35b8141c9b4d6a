/* SPDX-License-Identifier: Apache-2.0 */
/*
 * page_blocks: memory of one size for batches on their way, used again and again. What malloc takes
 * for so much at a time are fresh pages of the kernel, which have to be cleared, faulted in and
 * given back; measured, that was a third of what sending guest memory out of a mapping cost.
 *
 * A block is PAGE_BLOCK_SIZE bytes. No more than `keep`, at most PAGE_BLOCKS_KEPT, of them are
 * kept; more are freed. The set lives until its maker has left it and every block has come back.
 * Threads: any.
 */
#ifndef VMMIG_MIGRATE_PAGE_BLOCKS_H
#define VMMIG_MIGRATE_PAGE_BLOCKS_H

#include "migrate/page_format.h"

#define PAGE_BLOCK_SIZE PAGE_PAYLOAD_MAX
#define PAGE_BLOCKS_KEPT 12

struct page_blocks;

/* NULL without memory. */
struct page_blocks *page_blocks_create(unsigned keep);
void page_blocks_leave(struct page_blocks *b); /* may be NULL */
/* NULL without memory. */
uint8_t *page_blocks_take(struct page_blocks *b);
void page_blocks_give(struct page_blocks *b, uint8_t *block); /* block may be NULL */

#endif

/* SPDX-License-Identifier: Apache-2.0 */
#include "migrate/page_blocks.h"

#include "base/cleanup.h"

#include <pthread.h>
#include <stdlib.h>

struct page_blocks {
    pthread_mutex_t lock;
    unsigned users; /* the maker, and every block that is out */
    unsigned keep, n_kept;
    uint8_t *kept[PAGE_BLOCKS_KEPT];
};

struct page_blocks *page_blocks_create(unsigned keep)
{
    struct page_blocks *b = calloc(1, sizeof(*b));
    if (!b)
        return NULL;
    pthread_mutex_init(&b->lock, NULL);
    b->users = 1;
    b->keep = keep < PAGE_BLOCKS_KEPT ? keep : PAGE_BLOCKS_KEPT;
    return b;
}

/* Unlock, with one user less; the last one frees everything. */
static void leave(struct page_blocks *b)
{
    bool last = --b->users == 0;
    pthread_mutex_unlock(&b->lock);
    if (!last)
        return;
    while (b->n_kept)
        free(b->kept[--b->n_kept]);
    pthread_mutex_destroy(&b->lock);
    free(b);
}

void page_blocks_leave(struct page_blocks *b)
{
    if (!b)
        return;
    pthread_mutex_lock(&b->lock);
    leave(b);
}

uint8_t *page_blocks_take(struct page_blocks *b)
{
    SCOPE_LOCK(&b->lock);
    uint8_t *block = b->n_kept ? b->kept[--b->n_kept] : malloc(PAGE_BLOCK_SIZE);
    b->users += block != NULL;
    return block;
}

void page_blocks_give(struct page_blocks *b, uint8_t *block)
{
    if (!block)
        return;
    pthread_mutex_lock(&b->lock);
    if (b->n_kept < b->keep)
        b->kept[b->n_kept++] = block;
    else
        free(block);
    leave(b);
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How the bare guest divides its memory.
 *
 * Memory is a list of regions, each cut into chunks of 1 MiB. In every region the same share of the
 * chunks is worked (rewritten again and again), evenly spread, so that the working set lies in each
 * region: above the PCI hole, in each NUMA node, in a DIMM plugged later. The rest are base pages,
 * written once.
 *
 * Each page has one owner, the vCPU that writes and checks it. Base chunks go round the vCPUs; of
 * the worked chunks every other belongs to one vCPU, and the others are shared out page by page, so
 * that the vCPUs write side by side.
 *
 * The last sequence number written to each worked page stands in a table of its own, at the start
 * of the region and before its first page.
 */
#ifndef VMMIG_BARE_MEMORY_H
#define VMMIG_BARE_MEMORY_H

#include <stdbool.h>
#include <stdint.h>

#define MEMORY_MAX_REGIONS 16
#define MEMORY_PAGE 4096
#define MEMORY_CHUNK_PAGES 256

struct memory_region {
    uint64_t start; /* of the first page */
    uint64_t pages;
    uint64_t *sequences;
};

struct memory {
    struct memory_region regions[MEMORY_MAX_REGIONS];
    unsigned region_count; /* grows; a region is complete before it counts */
    unsigned vcpus;
    uint64_t worked_part; /* worked_part of worked_whole chunks are worked */
    uint64_t worked_whole;
};

/* Where a walk through the pages of one owner stands. */
struct memory_cursor {
    unsigned vcpu;
    bool worked_only;
    unsigned region;
    uint64_t page; /* in the region; the next to look at */
};

struct memory_page {
    unsigned region;
    uint64_t address;
    bool worked;
    uint64_t *sequence; /* of a worked page: its place in the table */
};

/* Adds [start, end) without making it visible to other vCPUs; memory_publish() does that, once its
 * pages are filled. False if there is no place for it. worked_part and worked_whole must be set. */
bool memory_add(struct memory *memory, uint64_t start, uint64_t end);
void memory_publish(struct memory *memory);

/* The next page of the cursor's owner. False at the end, and the cursor is at the start again. */
bool memory_next(const struct memory *memory, struct memory_cursor *cursor,
                 struct memory_page *ret_page);

/* The page of a region, whoever owns it. */
void memory_page_at(const struct memory *memory, unsigned region, uint64_t page,
                    unsigned *ret_owner, struct memory_page *ret_page);

#endif

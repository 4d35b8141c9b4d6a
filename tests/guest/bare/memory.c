/* SPDX-License-Identifier: Apache-2.0 */
#include "memory.h"

/* How many of the first `chunk` chunks of a region are worked. */
static uint64_t worked_before(const struct memory *memory, uint64_t chunk)
{
    return chunk * memory->worked_part / memory->worked_whole;
}

bool memory_add(struct memory *memory, uint64_t start, uint64_t end)
{
    uint64_t chunks = (end - start) / MEMORY_PAGE / MEMORY_CHUNK_PAGES + 1;
    uint64_t table = worked_before(memory, chunks) * MEMORY_CHUNK_PAGES * sizeof(uint64_t);
    struct memory_region *region = &memory->regions[memory->region_count];

    table = (table + MEMORY_PAGE - 1) & ~(uint64_t)(MEMORY_PAGE - 1);
    if (memory->region_count == MEMORY_MAX_REGIONS || end - start <= table)
        return false;
    region->sequences = (uint64_t *)(uintptr_t)start;
    region->start = start + table;
    region->pages = (end - region->start) / MEMORY_PAGE;
    return true;
}

void memory_publish(struct memory *memory)
{
    __atomic_store_n(&memory->region_count, memory->region_count + 1, __ATOMIC_RELEASE);
}

void memory_page_at(const struct memory *memory, unsigned region, uint64_t page,
                    unsigned *ret_owner, struct memory_page *ret_page)
{
    const struct memory_region *in = &memory->regions[region];
    uint64_t chunk = page / MEMORY_CHUNK_PAGES;
    uint64_t ordinal = worked_before(memory, chunk);

    ret_page->region = region;
    ret_page->address = in->start + page * MEMORY_PAGE;
    ret_page->worked = worked_before(memory, chunk + 1) > ordinal;
    ret_page->sequence = 0;
    if (ret_page->worked)
        ret_page->sequence =
            &in->sequences[ordinal * MEMORY_CHUNK_PAGES + page % MEMORY_CHUNK_PAGES];
    if (!ret_page->worked)
        *ret_owner = (unsigned)(chunk % memory->vcpus);
    else if (ordinal % 2 == 0)
        *ret_owner = (unsigned)(ordinal / 2 % memory->vcpus);
    else
        *ret_owner = (unsigned)(page % memory->vcpus);
}

bool memory_next(const struct memory *memory, struct memory_cursor *cursor,
                 struct memory_page *ret_page)
{
    unsigned regions = __atomic_load_n(&memory->region_count, __ATOMIC_ACQUIRE);

    while (cursor->region < regions) {
        while (cursor->page < memory->regions[cursor->region].pages) {
            unsigned owner;

            memory_page_at(memory, cursor->region, cursor->page, &owner, ret_page);
            if (cursor->worked_only && !ret_page->worked) {
                cursor->page = (cursor->page / MEMORY_CHUNK_PAGES + 1) * MEMORY_CHUNK_PAGES;
                continue;
            }
            cursor->page++;
            if (owner == cursor->vcpu)
                return true;
        }
        cursor->region++;
        cursor->page = 0;
    }
    cursor->region = 0;
    cursor->page = 0;
    return false;
}

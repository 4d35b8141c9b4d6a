/* SPDX-License-Identifier: Apache-2.0 */
#include "writer.h"

enum {
    PORT = 0x300,
    ID = 0,
    ADDRESS = 4,
    PAGES = 8,
    COMPLETED = 12,
    SAVES = 16,
    ID_VALUE = 0x31525756,
    PAGE_BYTES = 4096,
    WORDS = 512,
    BATCH = 16,
    PATIENCE = 10000,
};

static uint64_t area; /* the device's notes; its pages follow */
static uint32_t page_count, next_page;

/* The first word that is not what the device writes, or WORDS. */
static unsigned compare(uint64_t address, uint64_t first_word)
{
    const uint64_t *words = (const void *)(uintptr_t)address;
    uint64_t sum = words[0] + words[1];
    unsigned i = 2;

    if (words[0] != first_word || words[1] != address)
        return words[0] != first_word ? 0 : 1;
    for (; i < WORDS - 1; i++) {
        uint64_t word = (first_word * 0x9e3779b97f4a7c15ull + address + i) * 0xbf58476d1ce4e5b9ull;

        if (words[i] != word)
            return i;
        sum += word;
    }
    return words[i] == sum ? WORDS : i;
}

void writer_init(struct platform_machine *machine, uint64_t pages)
{
    struct platform_range *last = &machine->ranges[machine->range_count - 1];
    uint64_t size = (1 + pages) * PAGE_BYTES;

    if (platform_port_read(PORT + ID) != ID_VALUE)
        platform_panic("no writer", platform_port_read(PORT + ID));
    if (last->end - last->start <= size)
        platform_panic("option writer", pages);
    last->end -= size;
    area = last->end;
    page_count = (uint32_t)pages;
    platform_port_write(PORT + ADDRESS, (uint32_t)(area / PAGE_BYTES));
    platform_port_write(PORT + PAGES, page_count);
    if (platform_port_read(PORT + PAGES) != page_count)
        platform_panic("the writer refused its pages", area);
}

uint32_t writer_completed(void)
{
    return platform_port_read(PORT + COMPLETED);
}

/* The newest number up to `completed` that was page's turn. */
static uint32_t newest(uint32_t completed, uint32_t page)
{
    return completed - (completed - page) % page_count;
}

/* The notes are written when the machine is saved, the guest standing. */
static uint64_t check_notes(writer_report_fn *report)
{
    uint32_t before = platform_port_read(PORT + SAVES);
    unsigned word = compare(area, before);

    if (word == WORDS || platform_port_read(PORT + SAVES) != before)
        return 0;
    report(area, before, *(const uint64_t *)(uintptr_t)area, word);
    return 1;
}

/* Checks up to BATCH pages from next_page on; those that were not in the device's hands meanwhile
 * count. */
static uint64_t check_batch(writer_report_fn *report, uint64_t *checked, uint32_t *ret_open)
{
    unsigned words[BATCH];
    uint64_t found[BATCH], wrong = 0;
    uint32_t count = page_count < BATCH ? page_count : BATCH, before = writer_completed(), after;

    for (uint32_t i = 0; i < count; i++) {
        uint32_t page = (next_page + i) % page_count;
        uint64_t address = area + (1 + (uint64_t)page) * PAGE_BYTES;

        words[i] = compare(address, newest(before, page));
        found[i] = *(const uint64_t *)(uintptr_t)address;
    }
    after = writer_completed();
    *ret_open = 0;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t page = (next_page + i) % page_count;

        if (newest(after + 1, page) !=
            newest(before, page)) { /* written meanwhile, or being written */
            ++*ret_open;
            continue;
        }
        ++*checked;
        if (words[i] != WORDS) {
            report(area + (1 + (uint64_t)page) * PAGE_BYTES, newest(before, page), found[i],
                   words[i]);
            wrong++;
        }
    }
    return wrong;
}

uint64_t writer_check(bool all, writer_report_fn *report, uint64_t *checked)
{
    uint64_t wrong = check_notes(report);
    uint32_t open, batches = all ? (page_count + BATCH - 1) / BATCH : 1;

    for (unsigned tries = 0; batches && tries < PATIENCE; tries++) {
        wrong += check_batch(report, checked, &open);
        if (open && all)
            continue; /* once more */
        next_page = (next_page + BATCH) % page_count;
        batches--;
    }
    if (batches)
        platform_panic("the writer is faster than its pages can be checked", batches);
    return wrong;
}

/* SPDX-License-Identifier: Apache-2.0 */
/* stream_maker: pieces of a QEMU migration stream, for tests, in the words of vmm/qemu_stream.h. */
#ifndef VMMIG_TESTS_UNIT_VMM_STREAM_MAKER_H
#define VMMIG_TESTS_UNIT_VMM_STREAM_MAKER_H

#include "base/bytes.h"
#include "vmm/page_batch.h"

#define MAKER_RAM_ID 2u

enum {
    MAKER_START = 1,
    MAKER_PART = 2,
    MAKER_END = 3,
    MAKER_FULL = 4,
    MAKER_ZERO = 0x02,
    MAKER_PAGE = 0x08,
    MAKER_EOS = 0x10,
    MAKER_CONTINUE = 0x20,
};

struct maker_block {
    const char *name;
    uint64_t size;
};

static inline void maker_name(struct buffer *b, const char *name)
{
    buffer_put_u8(b, (uint8_t)strlen(name));
    buffer_put(b, name, strlen(name));
}

static inline void maker_header(struct buffer *b, const char *machine)
{
    buffer_put_be32(b, 0x5145564d);
    buffer_put_be32(b, 3);
    if (machine) {
        buffer_put_u8(b, 0x07);
        buffer_put_be32(b, (uint32_t)strlen(machine));
        buffer_put(b, machine, strlen(machine));
    }
}

/* The header of a START or FULL section. */
static inline void maker_section(struct buffer *b, uint8_t type, uint32_t id, const char *name,
                                 uint32_t version)
{
    buffer_put_u8(b, type);
    buffer_put_be32(b, id);
    maker_name(b, name);
    buffer_put_be32(b, 0);
    buffer_put_be32(b, version);
}

static inline void maker_footer(struct buffer *b)
{
    buffer_put_u8(b, 0x7e);
    buffer_put_be32(b, MAKER_RAM_ID);
}

/* End of a section's records, and its footer. */
static inline void maker_eos(struct buffer *b)
{
    buffer_put_be64(b, MAKER_EOS);
    maker_footer(b);
}

/* START of memory with its block list, complete. */
static inline void maker_ram(struct buffer *b, const struct maker_block *blocks, unsigned n)
{
    uint64_t total = 0;
    for (unsigned i = 0; i < n; i++)
        total += blocks[i].size;
    maker_section(b, MAKER_START, MAKER_RAM_ID, "ram", 4);
    buffer_put_be64(b, total | 0x04);
    for (unsigned i = 0; i < n; i++) {
        maker_name(b, blocks[i].name);
        buffer_put_be64(b, blocks[i].size);
    }
    maker_eos(b);
}

/* PART or END of memory up to its records. */
static inline void maker_records(struct buffer *b, uint8_t type)
{
    buffer_put_u8(b, type);
    buffer_put_be32(b, MAKER_RAM_ID);
}

/* The byte of which page `page` of a block consists in this version. */
static inline uint8_t maker_fill(uint64_t page, unsigned version)
{
    return (uint8_t)(1 + (page * 31 + version * 7) % 255);
}

/* A page record; name NULL: CONTINUE. fill 0: a zero page. */
static inline void maker_page(struct buffer *b, const char *name, uint64_t page, uint8_t fill)
{
    uint64_t flags = (fill ? MAKER_PAGE : MAKER_ZERO) | (name ? 0 : MAKER_CONTINUE);
    buffer_put_be64(b, page * GUEST_PAGE_SIZE | flags);
    if (name)
        maker_name(b, name);
    if (fill) {
        uint8_t *p = buffer_grow(b, GUEST_PAGE_SIZE);
        if (p)
            memset(p, fill, GUEST_PAGE_SIZE);
    } else {
        buffer_put_u8(b, 0);
    }
}

/* What stands for the sections of devices behind memory. */
static inline void maker_devices(struct buffer *b, size_t n)
{
    maker_section(b, MAKER_FULL, 0, "timer", 2);
    for (size_t i = 0; i < n; i++)
        buffer_put_u8(b, (uint8_t)(i * 131 >> 3));
    buffer_put_u8(b, 0x00);
}

#endif

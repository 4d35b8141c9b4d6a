/* SPDX-License-Identifier: Apache-2.0 */
/*
 * pack: thousands of records in one object, which is created once and never changed. No I/O.
 *
 * On the store (little endian):
 *
 *     header   0  8   "VMMIGPK1"
 *              8  u64 the pack's number
 *             16  16  the repository's UUID
 *             32      records (repo/record.h), each at the next multiple of 8
 *     footer      for each record: u32 offset / 8, u32 length (header and payload), u8 pages, u8
 *                 codec, u16 mask (both as in the record)
 *                 for each page of each record, in order: its identity, 32 bytes
 *     trailer  0  u32 records
 *              4  u32 pages
 *              8  u64 the pack's number
 *             16  8   "VMMIGPKE"
 *             24  u64 XXH3-64 of footer and trailer up to here, seeded with the pack's number
 *
 * The footer begins at a multiple of 8; nothing stands behind the trailer. What a pack holds can be
 * told from the trailer and the footer alone.
 *
 * Reading: pack_trailer_parse on the last PACK_TRAILER bytes, then footer_parse on the footer.
 */
#ifndef VMMIG_REPO_PACK_H
#define VMMIG_REPO_PACK_H

#include "base/bytes.h"
#include "base/uuid.h"
#include "repo/record.h"

enum {
    PACK_HEADER = 32,
    PACK_TRAILER = 32,
    PACK_RECORD_ENTRY = 12,
    PACK_PAGES_MAX = 16384,
    PACK_RECORDS_MAX = 4096,
    PACK_BODY_MAX = 8 << 20, /* header and records */
    PACK_FOOTER_MAX = PACK_RECORDS_MAX * PACK_RECORD_ENTRY + PACK_PAGES_MAX * PAGE_ID_BYTES,
    PACK_MAX = PACK_BODY_MAX + PACK_FOOTER_MAX + PACK_TRAILER,
};

struct footer_record {
    uint32_t offset; /* in bytes */
    uint32_t len;
    uint16_t first_page; /* index of its first page's identity */
    uint16_t mask;
    uint8_t n_pages;
    uint8_t compression; /* enum record_compression */
};

/* What a pack holds. One allocation each for records and ids; footer_finish frees them. */
struct footer {
    uint64_t pack;
    uint32_t n_records, n_pages;
    struct footer_record *records;
    struct page_id *ids;
};

void footer_finish(struct footer *f);
/* The record that holds page i. */
uint32_t footer_record_of(const struct footer *f, uint32_t page);
/* The record at that offset, or NULL. */
const struct footer_record *footer_record_at(const struct footer *f, uint32_t offset);

/* Bytes of footer and trailer together. */
static inline size_t footer_size(uint32_t n_records, uint32_t n_pages)
{
    return (size_t)n_records * PACK_RECORD_ENTRY + (size_t)n_pages * PAGE_ID_BYTES + PACK_TRAILER;
}

/* The size of footer and trailer, from the pack's last PACK_TRAILER bytes. CORRUPT. */
int pack_trailer_parse(const uint8_t trailer[PACK_TRAILER], uint64_t pack, uint64_t pack_size,
                       size_t *ret_footer_size, struct vm_error **err);
/* `data` is footer and trailer, as they end a pack of pack_size bytes. CORRUPT. */
int footer_parse(const uint8_t *data, size_t len, uint64_t pack, uint64_t pack_size,
                 struct footer *ret_footer, struct vm_error **err);
/* Append footer and trailer. */
void footer_write(const struct footer *f, struct buffer *out);

void pack_header_write(uint8_t out[PACK_HEADER], uint64_t pack, const struct uuid *repository);
int pack_header_check(const uint8_t header[PACK_HEADER], uint64_t pack,
                      const struct uuid *repository, struct vm_error **err);

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * page_format: an encoded batch of guest pages, as it travels between two agents.
 * docs/migration-pages.md has the same with an example.
 *
 * A batch is two byte strings: `meta` says which pages come and how, `payload` holds their bytes.
 * The channel carries both lengths and the number of the batch. All integers are little endian.
 *
 *     meta    u32 magic        PAGE_META_MAGIC
 *             u16 n_pages      1 .. PAGE_BATCH_MAX
 *             u16 n_runs       1 .. n_pages
 *             u16 n_units      1 .. n_pages
 *             u16 reserved     0
 *             u32 payload_len  bytes of payload: the sum of the units' lengths
 *             n_runs  times    u64 first address, u32 count of pages (>= 1)
 *             n_units times    u8 kind, u8 reserved (0), u16 pages (>= 1), u32 length in payload
 *     payload the units' bytes, one after the other
 *
 * The runs name the pages, in the order of the contents: the first unit describes the first pages
 * of the first run, and so on; a unit may end inside a run and may span several. Both add up to
 * n_pages. No page is named twice, no run leaves its region. Addresses are those of
 * vmm/page_batch.h.
 *
 *     kind   pages    length            payload
 *     zero   1..256   0                 nothing: the pages become zero
 *     raw    1..256   4096 * pages      the pages
 *     lz4    1..16    < 4096 * pages    one LZ4 block
 *     delta  1        < 4096            u32 check, then one LZ4 block with a dictionary
 *     zstd   1..256   < 4096 * pages    one zstd frame
 *
 * The dictionary of a delta is the page as the receiver has it; check is the low 32 bits of
 * XXH3-128 of the page that comes out.
 *
 * Every compressed unit stands for itself, except that a delta depends on what was applied before.
 * So batches of a channel are applied in the order in which they were encoded, each exactly once;
 * migrate/page_decoder.h says what becomes of a batch that was cut on its way.
 *
 * Threads: functions without state.
 */
#ifndef VMMIG_MIGRATE_PAGE_FORMAT_H
#define VMMIG_MIGRATE_PAGE_FORMAT_H

#include "base/bytes.h"
#include "base/error.h"
#include "vmm/page_batch.h"

#define PAGE_META_MAGIC 0x31425056u /* "VPB1" */
#define PAGE_META_HEADER_SIZE 16
#define PAGE_META_RUN_SIZE 12
#define PAGE_META_UNIT_SIZE 8
#define PAGE_META_MAX                                                                              \
    (PAGE_META_HEADER_SIZE + PAGE_BATCH_MAX * (PAGE_META_RUN_SIZE + PAGE_META_UNIT_SIZE))

#define PAGE_LZ4_PAGES_MAX 16u
#define PAGE_DELTA_CHECK_SIZE 4
/* No payload is longer: what does not shrink goes raw. */
#define PAGE_PAYLOAD_MAX (PAGE_BATCH_MAX * GUEST_PAGE_SIZE)

/* What may become of a page. X(id, name, number in a unit or 0 if it is not sent at all). */
#define PAGE_KINDS(X)                                                                              \
    X(FRESH_ZERO, "fresh-zero", 0) /* zero, and zero at the destination already */                 \
    X(SAME, "same", 0)             /* as it was last sent */                                       \
    X(ZERO, "zero", 1)                                                                             \
    X(RAW, "raw", 2)                                                                               \
    X(LZ4, "lz4", 3)                                                                               \
    X(DELTA, "delta", 4)                                                                           \
    X(ZSTD, "zstd", 5)

enum page_kind {
#define X(id, name, number) PAGE_##id,
    PAGE_KINDS(X)
#undef X
        PAGE_KIND_COUNT
};

struct page_run {
    uint64_t addr;
    uint32_t count;
};

struct page_unit {
    enum page_kind kind;
    uint16_t pages;
    uint32_t len;
};

/* Meta as plain numbers. */
struct page_meta {
    unsigned n_pages, n_runs, n_units;
    uint32_t payload_len;
    struct page_run runs[PAGE_BATCH_MAX];
    struct page_unit units[PAGE_BATCH_MAX];
};

/* Name of a kind ("lz4"), for logs, statistics and tables. */
const char *page_kind_name(enum page_kind kind);

/* Are all GUEST_PAGE_SIZE bytes zero? Page aligned or not; returns early if not. */
bool page_is_zero(const uint8_t *page);

/* Bytes that page_meta_write needs. */
static inline size_t page_meta_size(const struct page_meta *meta)
{
    return PAGE_META_HEADER_SIZE + meta->n_runs * (size_t)PAGE_META_RUN_SIZE +
           meta->n_units * (size_t)PAGE_META_UNIT_SIZE;
}

/* Write meta to `out`, page_meta_size() bytes. */
void page_meta_write(const struct page_meta *meta, uint8_t *out);
/*
 * Read and validate everything that can be judged without knowing the guest: the rules above except
 * for the regions' sizes. PROTOCOL if one is broken; *ret_meta is then undefined. payload_len is
 * what the channel announced.
 */
int page_meta_read(const void *data, size_t len, size_t payload_len, struct page_meta *ret_meta,
                   struct vm_error **err);

#endif

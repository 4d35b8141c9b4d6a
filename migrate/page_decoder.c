/* SPDX-License-Identifier: Apache-2.0 */
#include "migrate/page_decoder.h"

#include "base/clock.h"
#include "migrate/checksum.h"
#include "vmm/guest_memory.h"

#include <lz4.h>
#include <string.h>
#include <sys/mman.h>
#include <zstd.h>

/* Where a page is. */
struct place {
    const struct guest_region *region;
    uint64_t offset;
};

struct page_decoder {
    struct page_decoder_config config;
    struct guest_region *regions;
    ZSTD_DCtx *zstd;
    uint8_t *payload; /* as received */
    uint8_t *plain;   /* what a unit decompresses to */
    bool begun, failed;
    struct page_meta meta; /* of the batch under way */
    struct place places[PAGE_BATCH_MAX];
    struct page_decoder_stats stats;
};

struct page_decoder *page_decoder_create(const struct page_decoder_config *config,
                                         struct vm_error **err)
{
    if (config->n_channels < 1 || config->channel >= config->n_channels ||
        config->n_regions > GUEST_REGIONS_MAX) {
        error_set(err, VM_ERROR_USAGE, "page decoder: channel %u of %u, %u regions",
                  config->channel, config->n_channels, config->n_regions);
        return NULL;
    }
    CLEANUP(page_decoder) struct page_decoder *dec = calloc(1, sizeof(*dec));
    if (!dec) {
        error_nomem(err);
        return NULL;
    }
    dec->config = *config;
    dec->regions = calloc(config->n_regions + 1, sizeof(*dec->regions));
    dec->zstd = ZSTD_createDCtx();
    dec->payload = malloc(PAGE_PAYLOAD_MAX);
    dec->plain = malloc(PAGE_PAYLOAD_MAX);
    if (!dec->regions || !dec->zstd || !dec->payload || !dec->plain) {
        error_nomem(err);
        return NULL;
    }
    if (config->n_regions)
        memcpy(dec->regions, config->regions, config->n_regions * sizeof(*dec->regions));
    dec->config.regions = dec->regions;
    return steal_ptr(&dec);
}

void page_decoder_destroy(struct page_decoder *dec)
{
    if (!dec)
        return;
    free(dec->regions);
    ZSTD_freeDCtx(dec->zstd);
    free(dec->payload);
    free(dec->plain);
    free(dec);
}

const struct page_decoder_stats *page_decoder_stats(const struct page_decoder *dec)
{
    return &dec->stats;
}

/* ---- begin ---- */

/* Where the pages of a run are; each must be mapped, in its region and of this channel. */
static int locate_run(const struct page_decoder *dec, const struct page_run *run,
                      struct place *ret_places, struct vm_error **err)
{
    unsigned number = page_addr_region(run->addr);
    uint64_t first = page_addr_number(run->addr);
    if (number >= dec->config.n_regions || !guest_region_is_reachable(&dec->regions[number]))
        return error_set(err, VM_ERROR_PROTOCOL, "invalid page batch: region %u does not exist",
                         number);
    const struct guest_region *region = &dec->regions[number];
    uint64_t size = region->size / GUEST_PAGE_SIZE;
    if (first >= size || run->count > size - first)
        return error_set(err, VM_ERROR_PROTOCOL, "invalid page batch: page %#llx is outside %s",
                         (unsigned long long)first, region->name);
    for (uint32_t i = 0; i < run->count; i++) {
        if (page_stripe_channel(run->addr + i, dec->config.n_channels) != dec->config.channel)
            return error_set(err, VM_ERROR_PROTOCOL,
                             "invalid page batch: page %#llx of %s belongs to another channel",
                             (unsigned long long)(first + i), region->name);
        ret_places[i] = (struct place){region, (first + i) * GUEST_PAGE_SIZE};
    }
    return 0;
}

int page_decoder_begin(struct page_decoder *dec, const void *meta, size_t meta_len,
                       size_t payload_len, struct iovec *ret_iov, unsigned *ret_n,
                       struct vm_error **err)
{
    int64_t start = clock_thread_cpu_ns();
    dec->begun = false;
    if (dec->failed)
        return error_set(err, VM_ERROR_FAILED, "a page batch before this one failed");
    if (page_meta_read(meta, meta_len, payload_len, &dec->meta, err) < 0)
        return -1;
    unsigned page = 0;
    for (unsigned i = 0; i < dec->meta.n_runs; i++) {
        if (locate_run(dec, &dec->meta.runs[i], dec->places + page, err) < 0)
            return -1;
        page += dec->meta.runs[i].count;
    }
    *ret_n = payload_len > 0;
    if (payload_len)
        ret_iov[0] = (struct iovec){dec->payload, payload_len};
    dec->begun = true;
    dec->stats.cpu_ns += clock_thread_cpu_ns() - start;
    return 0;
}

/* ---- commit ---- */

/* How many of the pages lie side by side, beginning with the first. */
static unsigned contiguous(const struct place *places, unsigned n)
{
    unsigned i = 1;
    while (i < n && places[i].region == places[0].region &&
           places[i].offset == places[0].offset + (uint64_t)i * GUEST_PAGE_SIZE)
        i++;
    return i;
}

static int put_pages(const struct place *places, unsigned n, const uint8_t *data,
                     struct vm_error **err)
{
    for (unsigned i = 0, run; i < n; i += run) {
        run = contiguous(places + i, n - i);
        if (guest_region_write(places[i].region, places[i].offset,
                               data + (size_t)i * GUEST_PAGE_SIZE, (size_t)run * GUEST_PAGE_SIZE,
                               err) < 0)
            return -1;
    }
    return 0;
}

/* Zero already, or made so. A hole stays one. */
static int clear_page(const struct page_decoder *dec, const struct place *at, struct vm_error **err)
{
    static const uint8_t zero[GUEST_PAGE_SIZE];
    const uint8_t *now;
    if (guest_region_look(at->region, at->offset, dec->plain, &now, err) < 0)
        return -1;
    return page_is_zero(now) ? 0
                             : guest_region_write(at->region, at->offset, zero, sizeof(zero), err);
}

/*
 * Where the kernel cannot give memory back (not shared memory, locked), it says so. But a hole that is less than a
 * huge page Linux before 5.19 reports as made, and leaves the page as it is; and a whole one would be anybody's then,
 * and the guest's reservation of it gone.
 */
static bool can_punch(const struct guest_region *region)
{
    return region->base && region->page_size == GUEST_PAGE_SIZE;
}

static int clear_pages(const struct page_decoder *dec, const struct place *places, unsigned n,
                       struct vm_error **err)
{
    for (unsigned i = 0, run; i < n; i += run) {
        run = contiguous(places + i, n - i);
        if (dec->config.may_punch && run >= PAGE_DECODER_PUNCH_MIN && can_punch(places[i].region) &&
            madvise(places[i].region->base + places[i].offset, (size_t)run * GUEST_PAGE_SIZE,
                    MADV_REMOVE) == 0)
            continue;
        for (unsigned j = i; j < i + run; j++)
            if (clear_page(dec, places + j, err) < 0)
                return -1;
    }
    return 0;
}

static bool decompress(struct page_decoder *dec, enum page_kind kind, const uint8_t *packed,
                       size_t len, uint8_t *out, size_t size)
{
    if (kind == PAGE_LZ4)
        return LZ4_decompress_safe((const char *)packed, (char *)out, (int)len, (int)size) ==
               (int)size;
    size_t n = ZSTD_decompressDCtx(dec->zstd, out, size, packed, len);
    return !ZSTD_isError(n) && n == size;
}

static int invalid(enum page_kind kind, struct vm_error **err)
{
    return error_set(err, VM_ERROR_PROTOCOL,
                     "invalid page batch: a %s unit does not yield its pages", page_kind_name(kind));
}

static int decode_block(struct page_decoder *dec, const struct page_unit *unit,
                        const uint8_t *packed, const struct place *places, struct vm_error **err)
{
    size_t size = (size_t)unit->pages * GUEST_PAGE_SIZE;
    if (!decompress(dec, unit->kind, packed, unit->len, dec->plain, size))
        return invalid(unit->kind, err);
    return put_pages(places, unit->pages, dec->plain, err);
}

static int decode_delta(struct page_decoder *dec, const struct page_unit *unit,
                        const uint8_t *packed, const struct place *at, struct vm_error **err)
{
    const uint8_t *former;
    if (guest_region_look(at->region, at->offset, dec->plain + GUEST_PAGE_SIZE, &former, err) < 0)
        return -1;
    int n =
        LZ4_decompress_safe_usingDict((const char *)packed + PAGE_DELTA_CHECK_SIZE,
                                      (char *)dec->plain, (int)unit->len - PAGE_DELTA_CHECK_SIZE,
                                      GUEST_PAGE_SIZE, (const char *)former, GUEST_PAGE_SIZE);
    if (n != (int)GUEST_PAGE_SIZE ||
        (uint32_t)checksum_128(dec->plain, GUEST_PAGE_SIZE).low64 != get_le32(packed))
        return invalid(unit->kind, err);
    return guest_region_write(at->region, at->offset, dec->plain, GUEST_PAGE_SIZE, err);
}

static int decode_unit(struct page_decoder *dec, const struct page_unit *unit,
                       const uint8_t *packed, const struct place *places, struct vm_error **err)
{
    switch (unit->kind) {
    case PAGE_ZERO:
        return clear_pages(dec, places, unit->pages, err);
    case PAGE_LZ4:
    case PAGE_ZSTD:
        return decode_block(dec, unit, packed, places, err);
    case PAGE_DELTA:
        return decode_delta(dec, unit, packed, places, err);
    case PAGE_RAW:
        return put_pages(places, unit->pages, packed, err);
    case PAGE_FRESH_ZERO: /* never in a unit */
    case PAGE_SAME:
    case PAGE_KIND_COUNT:
        break;
    }
    return invalid(unit->kind, err);
}

int page_decoder_commit(struct page_decoder *dec, struct vm_error **err)
{
    int64_t start = clock_thread_cpu_ns();
    if (!dec->begun)
        return error_set(err, VM_ERROR_FAILED, "there is no page batch to commit");
    dec->begun = false;
    const uint8_t *packed = dec->payload;
    unsigned page = 0;
    for (unsigned i = 0; i < dec->meta.n_units; i++) {
        const struct page_unit *unit = &dec->meta.units[i];
        if (decode_unit(dec, unit, packed, dec->places + page, err) < 0) {
            dec->failed = true;
            return -1;
        }
        packed += unit->len;
        page += unit->pages;
        dec->stats.kinds[unit->kind].pages += unit->pages;
        dec->stats.kinds[unit->kind].bytes_in += unit->len;
    }
    dec->stats.batches++;
    dec->stats.cpu_ns += clock_thread_cpu_ns() - start;
    return 0;
}

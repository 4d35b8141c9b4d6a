/* SPDX-License-Identifier: Apache-2.0 */
#include "migrate/page_decoder.h"

#include "base/clock.h"

#include <lz4.h>
#include <sys/mman.h>
#include <xxhash.h>
#include <zstd.h>

struct page_decoder {
    struct page_decoder_config config;
    struct guest_region *regions;
    ZSTD_DCtx *zstd;
    uint8_t *packed; /* received bytes of compressed units */
    uint8_t *plain;  /* what they decompress to, where that does not go into guest memory at once */
    bool begun, failed;
    struct page_meta meta;          /* of the batch under way */
    uint8_t *pages[PAGE_BATCH_MAX]; /* where each of its pages is */
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
    dec->packed = malloc(PAGE_PAYLOAD_MAX);
    dec->plain = malloc(PAGE_PAYLOAD_MAX);
    if (!dec->regions || !dec->zstd || !dec->packed || !dec->plain) {
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
    free(dec->packed);
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
                      uint8_t **ret_pages, struct vm_error **err)
{
    unsigned number = page_addr_region(run->addr);
    uint64_t first = page_addr_number(run->addr);
    if (number >= dec->config.n_regions || !dec->regions[number].base)
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
        ret_pages[i] = region->base + (first + i) * GUEST_PAGE_SIZE;
    }
    return 0;
}

static void add_iovec(struct iovec *iov, unsigned *n, uint8_t *data, size_t len)
{
    if (*n && (uint8_t *)iov[*n - 1].iov_base + iov[*n - 1].iov_len == data)
        iov[*n - 1].iov_len += len;
    else
        iov[(*n)++] = (struct iovec){data, len};
}

/* Raw pages to their place, the rest to `packed`, in the order of the payload. */
static unsigned place_payload(struct page_decoder *dec, struct iovec *ret_iov)
{
    unsigned n = 0, page = 0;
    size_t packed = 0;
    for (unsigned i = 0; i < dec->meta.n_units; i++) {
        const struct page_unit *unit = &dec->meta.units[i];
        if (unit->kind == PAGE_RAW) {
            for (unsigned j = 0; j < unit->pages; j++)
                add_iovec(ret_iov, &n, dec->pages[page + j], GUEST_PAGE_SIZE);
        } else if (unit->len) {
            add_iovec(ret_iov, &n, dec->packed + packed, unit->len);
            packed += unit->len;
        }
        page += unit->pages;
    }
    return n;
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
        if (locate_run(dec, &dec->meta.runs[i], dec->pages + page, err) < 0)
            return -1;
        page += dec->meta.runs[i].count;
    }
    *ret_n = place_payload(dec, ret_iov);
    dec->begun = true;
    dec->stats.cpu_ns += clock_thread_cpu_ns() - start;
    return 0;
}

/* ---- commit ---- */

/* How many of the pages lie side by side, beginning with the first. */
static unsigned contiguous(uint8_t *const *pages, unsigned n)
{
    unsigned i = 1;
    while (i < n && pages[i] == pages[0] + (size_t)i * GUEST_PAGE_SIZE)
        i++;
    return i;
}

static void clear_pages(const struct page_decoder *dec, uint8_t *const *pages, unsigned n)
{
    for (unsigned i = 0, run; i < n; i += run) {
        run = contiguous(pages + i, n - i);
        /* Where the kernel cannot give memory back (not shared memory, locked), it says so. */
        if (dec->config.may_punch && run >= PAGE_DECODER_PUNCH_MIN &&
            madvise(pages[i], (size_t)run * GUEST_PAGE_SIZE, MADV_REMOVE) == 0)
            continue;
        for (unsigned j = 0; j < run; j++) {
            if (!page_is_zero(pages[i + j]))
                memset(pages[i + j], 0, GUEST_PAGE_SIZE);
        }
    }
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

static bool decode_block(struct page_decoder *dec, const struct page_unit *unit,
                         const uint8_t *packed, uint8_t *const *pages)
{
    size_t size = (size_t)unit->pages * GUEST_PAGE_SIZE;
    if (contiguous(pages, unit->pages) == unit->pages)
        return decompress(dec, unit->kind, packed, unit->len, pages[0], size);
    if (!decompress(dec, unit->kind, packed, unit->len, dec->plain, size))
        return false;
    for (unsigned i = 0; i < unit->pages; i++)
        memcpy(pages[i], dec->plain + (size_t)i * GUEST_PAGE_SIZE, GUEST_PAGE_SIZE);
    return true;
}

static bool decode_delta(struct page_decoder *dec, const struct page_unit *unit,
                         const uint8_t *packed, uint8_t *page)
{
    int n =
        LZ4_decompress_safe_usingDict((const char *)packed + PAGE_DELTA_CHECK_SIZE,
                                      (char *)dec->plain, (int)unit->len - PAGE_DELTA_CHECK_SIZE,
                                      GUEST_PAGE_SIZE, (const char *)page, GUEST_PAGE_SIZE);
    if (n != (int)GUEST_PAGE_SIZE ||
        (uint32_t)XXH3_128bits(dec->plain, GUEST_PAGE_SIZE).low64 != get_le32(packed))
        return false;
    memcpy(page, dec->plain, GUEST_PAGE_SIZE);
    return true;
}

static bool decode_unit(struct page_decoder *dec, const struct page_unit *unit,
                        const uint8_t *packed, uint8_t *const *pages)
{
    switch (unit->kind) {
    case PAGE_ZERO:
        clear_pages(dec, pages, unit->pages);
        return true;
    case PAGE_LZ4:
    case PAGE_ZSTD:
        return decode_block(dec, unit, packed, pages);
    case PAGE_DELTA:
        return decode_delta(dec, unit, packed, pages[0]);
    case PAGE_RAW: /* has been received into its place */
        return true;
    case PAGE_FRESH_ZERO: /* never in a unit */
    case PAGE_SAME:
    case PAGE_KIND_COUNT:
        break;
    }
    return false;
}

int page_decoder_commit(struct page_decoder *dec, struct vm_error **err)
{
    int64_t start = clock_thread_cpu_ns();
    if (!dec->begun)
        return error_set(err, VM_ERROR_FAILED, "there is no page batch to commit");
    dec->begun = false;
    const uint8_t *packed = dec->packed;
    unsigned page = 0;
    for (unsigned i = 0; i < dec->meta.n_units; i++) {
        const struct page_unit *unit = &dec->meta.units[i];
        if (!decode_unit(dec, unit, packed, dec->pages + page)) {
            dec->failed = true;
            return error_set(err, VM_ERROR_PROTOCOL,
                             "invalid page batch: a %s unit does not yield its pages",
                             page_kind_name(unit->kind));
        }
        if (unit->kind != PAGE_RAW)
            packed += unit->len;
        page += unit->pages;
        dec->stats.kinds[unit->kind].pages += unit->pages;
        dec->stats.kinds[unit->kind].bytes_in += unit->len;
    }
    dec->stats.batches++;
    dec->stats.cpu_ns += clock_thread_cpu_ns() - start;
    return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
#include "migrate/page_encoder.h"

#include "base/clock.h"
#include "migrate/checksum.h"
#include "migrate/page_blocks.h"
#include "migrate/page_history.h"

#include <lz4.h>
#include <zstd.h>

/* Compressed at least to this share, or raw: what saves less is not worth decompressing. */
#define WORTH_PERCENT 97
/* A delta must cost less than this share of what its page would cost in the mode's own way. */
#define DELTA_PERCENT 75
#define DELTA_MAX (GUEST_PAGE_SIZE / 2)
/* Bytes of meta that a delta takes: a unit and, at worst, a run. */
#define DELTA_META (PAGE_META_UNIT_SIZE + PAGE_META_RUN_SIZE)
/* While no more than one delta in this many works, only one in as many is tried. */
#define DELTA_PATIENCE 16
/* Nothing is known yet: bytes that a page takes in a compressed block. */
#define BLOCK_BYTES_INITIAL 1400.0
#define BLOCK_BYTES_WEIGHT 0.1

/* Compressed bytes up to so many are copied into memory of their size; more travel in their block. */
#define PACKED_COPY_MAX (PAGE_BLOCK_SIZE / 4)

/* Measured: the context of level 3 with 1 MiB of input takes 1.3 MiB. */
#define ZSTD_MEMORY (3ul << 19)

/* A page that must travel. */
struct pending {
    uint64_t addr, index;
    const uint8_t *data;
    uint32_t check;
    bool again; /* was sent before, and not as zero */
};

/* The batch under way. Pages and units are listed in the order in which they will stand in meta. */
struct job {
    enum page_mode mode;
    struct pending pending[PAGE_BATCH_MAX];
    unsigned n_pending;
    uint64_t zero[PAGE_BATCH_MAX];
    unsigned n_zero;
    const struct pending *raw[PAGE_BATCH_MAX];
    unsigned n_raw;
    const struct pending *packed[PAGE_BATCH_MAX]; /* pages of the units below */
    unsigned n_packed;
    struct page_unit units[PAGE_BATCH_MAX];
    unsigned n_units;
    size_t packed_len; /* bytes in page_encoder.packed */
};

struct page_encoder {
    struct page_history history;
    bool mapped_source;
    struct page_hash zero_hash;
    LZ4_stream_t *lz4;
    ZSTD_CCtx *zstd;
    uint8_t *gather;                   /* pages of a block, side by side */
    struct page_blocks *blocks;
    uint8_t *packed;                   /* block: compressed bytes of the batch; NULL: given away */
    uint8_t *snapshot;                 /* block: the batch's pages, if mapped_source; likewise */
    unsigned delta_tries, delta_skips; /* failures in a row; pages skipped since */
    double block_bytes;                /* per page in compressed blocks, moving average */
    unsigned probes;
    struct page_encoder_stats stats;
    struct job job;
    struct page_meta meta;
};

const char *page_mode_name(enum page_mode mode)
{
    static const char *const names[PAGE_MODE_COUNT] = {"raw", "lz4", "zstd-1", "zstd-2", "zstd-3"};
    return (unsigned)mode < PAGE_MODE_COUNT ? names[mode] : "unknown";
}

static size_t fixed_memory(bool mapped_source)
{
    return sizeof(struct page_encoder) + sizeof(LZ4_stream_t) + ZSTD_MEMORY +
           (mapped_source ? 3 : 2) * (size_t)PAGE_PAYLOAD_MAX;
}

size_t page_encoder_memory(const struct page_encoder *enc)
{
    return fixed_memory(enc->mapped_source) + page_history_memory(&enc->history);
}

const struct page_encoder_stats *page_encoder_stats(const struct page_encoder *enc)
{
    return &enc->stats;
}

static struct page_hash hash_page(const uint8_t *page)
{
    XXH128_hash_t hash = checksum_128(page, GUEST_PAGE_SIZE);
    return (struct page_hash){hash.low64, hash.high64};
}

/* Odd factors: equal contents never look the same at two addresses. */
static struct page_hash bind_hash(struct page_hash hash, uint64_t index)
{
    hash.low ^= (index + 1) * 0x9E3779B97F4A7C15u;
    hash.high += (index + 1) * 0xC2B2AE3D27D4EB4Fu;
    return hash;
}

/* In place of those that went with the last batch. */
static int take_blocks(struct page_encoder *enc, struct vm_error **err)
{
    if (!enc->packed)
        enc->packed = page_blocks_take(enc->blocks);
    if (enc->mapped_source && !enc->snapshot)
        enc->snapshot = page_blocks_take(enc->blocks);
    return enc->packed && (enc->snapshot || !enc->mapped_source) ? 0 : error_nomem(err);
}

/*
 * Touch the memory of the highest level, which is that of all: else the kernel's time for it were
 * taken for what the first pages cost in that mode, 20 us each, and the mode be avoided for long.
 */
static void warm_up(struct page_encoder *enc)
{
    memset(enc->gather, 0, PAGE_PAYLOAD_MAX);
    memset(enc->packed, 0, PAGE_BLOCK_SIZE);
    ZSTD_compressCCtx(enc->zstd, enc->packed, PAGE_BLOCK_SIZE, enc->gather, PAGE_PAYLOAD_MAX,
                      PAGE_MODE_COUNT - PAGE_MODE_ZSTD_1);
}

struct page_encoder *page_encoder_create(const struct page_encoder_config *config,
                                         struct vm_error **err)
{
    static const uint8_t zero_page[GUEST_PAGE_SIZE];

    if (config->n_channels < 1 || config->n_channels > PAGE_ENCODER_CHANNELS_MAX ||
        config->channel >= config->n_channels || config->n_regions > GUEST_REGIONS_MAX) {
        error_set(err, VM_ERROR_USAGE, "page encoder: channel %u of %u, %u regions",
                  config->channel, config->n_channels, config->n_regions);
        return NULL;
    }
    CLEANUP(page_encoder) struct page_encoder *enc = calloc(1, sizeof(*enc));
    if (!enc) {
        error_nomem(err);
        return NULL;
    }
    size_t share =
        (config->memory ? config->memory : PAGE_ENCODER_MEMORY_DEFAULT) / config->n_channels;
    if (share < PAGE_ENCODER_MEMORY_MIN)
        share = PAGE_ENCODER_MEMORY_MIN;
    if (page_history_init(&enc->history, config->regions, config->n_regions, config->channel,
                          config->n_channels, share - fixed_memory(config->mapped_source),
                          !config->destination_zero, err) < 0)
        return NULL;
    enc->mapped_source = config->mapped_source;
    enc->zero_hash = hash_page(zero_page);
    enc->block_bytes = BLOCK_BYTES_INITIAL;
    enc->lz4 = LZ4_createStream();
    enc->zstd = ZSTD_createCCtx();
    enc->gather = malloc(PAGE_PAYLOAD_MAX);
    enc->blocks = page_blocks_create(PAGE_BLOCKS_KEPT / config->n_channels + 1);
    if (!enc->lz4 || !enc->zstd || !enc->gather || !enc->blocks) {
        error_nomem(err);
        return NULL;
    }
    if (take_blocks(enc, err) < 0)
        return NULL;
    warm_up(enc);
    return steal_ptr(&enc);
}

void page_encoder_destroy(struct page_encoder *enc)
{
    if (!enc)
        return;
    page_history_finish(&enc->history);
    LZ4_freeStream(enc->lz4);
    ZSTD_freeCCtx(enc->zstd);
    free(enc->gather);
    if (enc->blocks) {
        page_blocks_give(enc->blocks, enc->packed);
        page_blocks_give(enc->blocks, enc->snapshot);
    }
    page_blocks_leave(enc->blocks);
    free(enc);
}

/* ---- what need not be sent ---- */

static void count(struct page_encoder *enc, enum page_kind kind, unsigned pages, size_t bytes)
{
    enc->stats.kinds[kind].pages += pages;
    enc->stats.kinds[kind].bytes_out += bytes;
}

static void scan_zero(struct page_encoder *enc, uint64_t addr, uint64_t index)
{
    struct page_history *h = &enc->history;
    if (!page_history_sent(h, index)) {
        count(enc, PAGE_FRESH_ZERO, 1, 0);
    } else if (page_history_same(h, index, bind_hash(enc->zero_hash, index))) {
        count(enc, PAGE_SAME, 1, 0);
    } else {
        page_history_clear_sent(h, index);
        page_history_drop(h, index);
        enc->job.zero[enc->job.n_zero++] = addr;
    }
}

static void scan_page(struct page_encoder *enc, uint64_t addr, uint64_t index, const uint8_t *data)
{
    if (!data || page_is_zero(data)) {
        scan_zero(enc, addr, index);
        return;
    }
    struct page_hash hash = hash_page(data);
    bool again = page_history_sent(&enc->history, index);
    if (page_history_same(&enc->history, index, bind_hash(hash, index))) {
        count(enc, PAGE_SAME, 1, 0);
        return;
    }
    page_history_set_sent(&enc->history, index);
    enc->job.pending[enc->job.n_pending++] =
        (struct pending){addr, index, data, (uint32_t)hash.low, again};
}

static int scan(struct page_encoder *enc, const struct page_batch *batch, struct vm_error **err)
{
    if (batch->n > PAGE_BATCH_MAX)
        return error_set(err, VM_ERROR_PROTOCOL, "a batch of %u pages", batch->n);
    if (enc->mapped_source && page_batch_copy(batch, enc->snapshot, err) < 0)
        return -1;
    for (unsigned i = 0; i < batch->n; i++) {
        const struct page_ref *page = &batch->pages[i];
        const uint8_t *data = page->data;
        uint64_t index;
        if (!page_history_locate(&enc->history, page->addr, &index))
            return error_set(err, VM_ERROR_PROTOCOL,
                             "page %#llx of region %u is not in guest memory, or not of channel %u",
                             (unsigned long long)page_addr_number(page->addr),
                             page_addr_region(page->addr), enc->history.channel);
        if (data && enc->mapped_source)
            data = enc->snapshot + (size_t)i * GUEST_PAGE_SIZE;
        scan_page(enc, page->addr, index, data);
    }
    return 0;
}

/* ---- deltas ---- */

/* How long a delta may be; 0: do not even try. */
static int delta_limit(struct page_encoder *enc)
{
    if (enc->delta_tries >= DELTA_PATIENCE) {
        if (++enc->delta_skips < DELTA_PATIENCE)
            return 0;
        enc->delta_skips = 0;
    }
    double limit = enc->block_bytes * DELTA_PERCENT / 100 - DELTA_META;
    return (int)(limit > DELTA_MAX ? DELTA_MAX : limit);
}

static bool encode_delta(struct page_encoder *enc, const struct pending *p, const uint8_t *former)
{
    struct job *job = &enc->job;
    int limit = delta_limit(enc) - PAGE_DELTA_CHECK_SIZE;
    if (limit <= 0)
        return false;
    uint8_t *out = enc->packed + job->packed_len;
    LZ4_loadDict(enc->lz4, (const char *)former, GUEST_PAGE_SIZE);
    int n =
        LZ4_compress_fast_continue(enc->lz4, (const char *)p->data,
                                   (char *)out + PAGE_DELTA_CHECK_SIZE, GUEST_PAGE_SIZE, limit, 1);
    page_history_praise(&enc->history, p->index, n > 0);
    if (n <= 0) {
        enc->delta_tries++;
        return false;
    }
    enc->delta_tries = 0;
    put_le32(out, p->check);
    uint32_t len = (uint32_t)n + PAGE_DELTA_CHECK_SIZE;
    job->packed[job->n_packed++] = p;
    job->units[job->n_units++] = (struct page_unit){PAGE_DELTA, 1, len};
    job->packed_len += len;
    count(enc, PAGE_DELTA, 1, len);
    return true;
}

/*
 * Take the pages that a delta does for out of the pending ones, and keep the new versions. A page
 * sent for the first time is not kept: the first pass over all memory must not wipe out the cache.
 */
static unsigned encode_deltas(struct page_encoder *enc, const struct pending **ret_rest)
{
    struct job *job = &enc->job;
    unsigned n_rest = 0;
    for (unsigned i = 0; i < job->n_pending; i++) {
        const struct pending *p = &job->pending[i];
        const uint8_t *former = p->again ? page_history_former(&enc->history, p->index) : NULL;
        if (!former || !encode_delta(enc, p, former))
            ret_rest[n_rest++] = p;
        if (p->again)
            page_history_keep(&enc->history, p->index, p->data);
    }
    return n_rest;
}

/* ---- blocks ---- */

/* The pages as one string of bytes, without a copy where they lie side by side already. */
static const uint8_t *gather(struct page_encoder *enc, const struct pending **pages, unsigned n)
{
    unsigned i = 1;
    while (i < n && pages[i]->data == pages[0]->data + (size_t)i * GUEST_PAGE_SIZE)
        i++;
    if (i == n)
        return pages[0]->data;
    for (i = 0; i < n; i++)
        memcpy(enc->gather + (size_t)i * GUEST_PAGE_SIZE, pages[i]->data, GUEST_PAGE_SIZE);
    return enc->gather;
}

/* Compressed bytes in `out`, or 0 if they are more than `limit`. */
static size_t compress(struct page_encoder *enc, enum page_mode mode, const uint8_t *data,
                       size_t len, uint8_t *out, size_t limit)
{
    if (mode == PAGE_MODE_LZ4) {
        int n = LZ4_compress_fast_extState(enc->lz4, (const char *)data, (char *)out, (int)len,
                                           (int)limit, 1);
        return n > 0 ? (size_t)n : 0;
    }
    int level = 1 + (int)(mode - PAGE_MODE_ZSTD_1);
    size_t n = ZSTD_compressCCtx(enc->zstd, out, limit, data, len, level);
    return ZSTD_isError(n) ? 0 : n;
}

static void encode_block(struct page_encoder *enc, const struct pending **pages, unsigned n)
{
    struct job *job = &enc->job;
    enum page_kind kind = job->mode == PAGE_MODE_LZ4 ? PAGE_LZ4 : PAGE_ZSTD;
    size_t len = (size_t)n * GUEST_PAGE_SIZE;
    size_t packed = compress(enc, job->mode, gather(enc, pages, n), len,
                             enc->packed + job->packed_len, len * WORTH_PERCENT / 100);
    enc->block_bytes +=
        ((double)(packed ? packed : len) / n - enc->block_bytes) * BLOCK_BYTES_WEIGHT;
    if (!packed) {
        memcpy(job->raw + job->n_raw, pages, n * sizeof(*pages));
        job->n_raw += n;
        return;
    }
    memcpy(job->packed + job->n_packed, pages, n * sizeof(*pages));
    job->n_packed += n;
    job->units[job->n_units++] = (struct page_unit){kind, (uint16_t)n, (uint32_t)packed};
    job->packed_len += packed;
    count(enc, kind, n, packed);
}

static void encode_blocks(struct page_encoder *enc, const struct pending **pages, unsigned n)
{
    unsigned step = enc->job.mode == PAGE_MODE_LZ4 ? PAGE_LZ4_PAGES_MAX : PAGE_BATCH_MAX;
    for (unsigned i = 0; i < n; i += step)
        encode_block(enc, pages + i, n - i < step ? n - i : step);
}

/* Raw mode spends nothing on deltas; what is kept of these pages is outdated now. */
static void encode_raw(struct page_encoder *enc)
{
    struct job *job = &enc->job;
    for (unsigned i = 0; i < job->n_pending; i++) {
        job->raw[i] = &job->pending[i];
        if (job->pending[i].again)
            page_history_drop(&enc->history, job->pending[i].index);
    }
    job->n_raw = job->n_pending;
}

/* ---- assembly ---- */

static void meta_add_page(struct page_meta *meta, uint64_t addr)
{
    struct page_run *last = meta->n_runs ? &meta->runs[meta->n_runs - 1] : NULL;
    if (last && last->addr + last->count == addr)
        last->count++;
    else
        meta->runs[meta->n_runs++] = (struct page_run){addr, 1};
    meta->n_pages++;
}

static void meta_add_unit(struct page_meta *meta, struct page_unit unit)
{
    meta->units[meta->n_units++] = unit;
    meta->payload_len += unit.len;
}

/* Zero pages, raw pages, then all that is compressed, so that this is one piece of the payload. */
static void build_meta(struct page_encoder *enc)
{
    struct job *job = &enc->job;
    struct page_meta *meta = &enc->meta;
    meta->n_pages = meta->n_runs = meta->n_units = meta->payload_len = 0;
    for (unsigned i = 0; i < job->n_zero; i++)
        meta_add_page(meta, job->zero[i]);
    if (job->n_zero)
        meta_add_unit(meta, (struct page_unit){PAGE_ZERO, (uint16_t)job->n_zero, 0});
    for (unsigned i = 0; i < job->n_raw; i++)
        meta_add_page(meta, job->raw[i]->addr);
    if (job->n_raw)
        meta_add_unit(
            meta, (struct page_unit){PAGE_RAW, (uint16_t)job->n_raw, job->n_raw * GUEST_PAGE_SIZE});
    for (unsigned i = 0; i < job->n_packed; i++)
        meta_add_page(meta, job->packed[i]->addr);
    for (unsigned i = 0; i < job->n_units; i++)
        meta_add_unit(meta, job->units[i]);
    count(enc, PAGE_ZERO, job->n_zero, 0);
    count(enc, PAGE_RAW, job->n_raw, (size_t)job->n_raw * GUEST_PAGE_SIZE);
}

static void add_iovec(struct iovec *iov, unsigned *n, const uint8_t *data, size_t len)
{
    if (*n && (const uint8_t *)iov[*n - 1].iov_base + iov[*n - 1].iov_len == data)
        iov[*n - 1].iov_len += len;
    else
        iov[(*n)++] = (struct iovec){(void *)(uintptr_t)data, len};
}

/* The payload's pieces: raw pages where they are, then what was compressed, as one piece. */
static unsigned list_payload(struct page_encoder *enc, uint8_t *packed, struct iovec *iov)
{
    struct job *job = &enc->job;
    unsigned n = 0;
    for (unsigned i = 0; i < job->n_raw; i++)
        add_iovec(iov, &n, job->raw[i]->data, GUEST_PAGE_SIZE);
    if (job->packed_len)
        add_iovec(iov, &n, packed, job->packed_len);
    return n;
}

/* One allocation of exactly the size: iovecs, meta, compressed bytes if they are few. */
static int assemble(struct page_encoder *enc, struct encoded_batch *out, struct vm_error **err)
{
    struct job *job = &enc->job;
    size_t iov_size = (job->n_raw + 1) * sizeof(struct iovec);
    size_t meta_size = page_meta_size(&enc->meta);
    bool copied = job->packed_len <= PACKED_COPY_MAX, snapshot = enc->mapped_source && job->n_raw;
    size_t size = iov_size + meta_size + (copied ? job->packed_len : 0);
    uint8_t *memory = malloc(size);
    if (!memory)
        return error_nomem(err);

    struct iovec *iov = (struct iovec *)(void *)memory;
    uint8_t *meta = memory + iov_size;
    page_meta_write(&enc->meta, meta);
    *out = (struct encoded_batch){
        .meta = meta,
        .meta_len = meta_size,
        .payload = iov,
        .payload_len = enc->meta.payload_len,
        .n_pages = enc->meta.n_pages,
        .borrows_input = job->n_raw && !enc->mapped_source,
        .memory_size = size + (snapshot + !copied) * (size_t)PAGE_BLOCK_SIZE,
        .memory = memory,
        .blocks = enc->blocks,
        .snapshot = snapshot ? steal_ptr(&enc->snapshot) : NULL,
        .packed = copied ? NULL : steal_ptr(&enc->packed),
    };
    if (copied)
        memcpy(meta + meta_size, enc->packed, job->packed_len);
    out->n_payload = list_payload(enc, copied ? meta + meta_size : out->packed, iov);
    enc->stats.meta_bytes += meta_size;
    return 0;
}

int page_encoder_encode(struct page_encoder *enc, const struct page_batch *batch,
                        enum page_mode mode, struct encoded_batch *ret_out, struct vm_error **err)
{
    const struct pending *rest[PAGE_BATCH_MAX];
    struct job *job = &enc->job;
    int64_t wall = clock_mono_ns(), start = clock_thread_cpu_ns();

    job->mode = mode;
    job->n_pending = job->n_zero = job->n_raw = job->n_packed = job->n_units = 0;
    job->packed_len = 0;
    if (take_blocks(enc, err) < 0 || scan(enc, batch, err) < 0)
        return -1;
    int64_t scanned = clock_thread_cpu_ns(), delta_done = scanned, blocks_done = scanned;
    if (mode == PAGE_MODE_RAW) {
        encode_raw(enc);
    } else {
        unsigned n_rest = encode_deltas(enc, rest);
        delta_done = clock_thread_cpu_ns();
        encode_blocks(enc, rest, n_rest);
        blocks_done = clock_thread_cpu_ns();
    }
    *ret_out = (struct encoded_batch){0};
    build_meta(enc);
    if (enc->meta.n_pages && assemble(enc, ret_out, err) < 0)
        return -1;

    int64_t done = clock_thread_cpu_ns();
    enc->stats.kinds[PAGE_SAME].cpu_ns += scanned - start;
    enc->stats.kinds[PAGE_DELTA].cpu_ns += delta_done - scanned;
    enc->stats.kinds[mode == PAGE_MODE_LZ4 ? PAGE_LZ4 : PAGE_ZSTD].cpu_ns +=
        blocks_done - delta_done;
    enc->stats.kinds[PAGE_RAW].cpu_ns += done - blocks_done;
    ret_out->sample = (struct page_sample){
        .mode = mode,
        .pages = job->n_pending,
        .bytes = ret_out->meta_len + ret_out->payload_len,
        .scan_ns = scanned - start,
        .cpu_ns = done - start,
        .wall_ns = clock_mono_ns() - wall,
    };
    return 0;
}

/* Beside one another in the batch, as they would be in a block. */
void page_encoder_probe(struct page_encoder *enc, enum page_mode mode, bool next,
                        struct page_sample *ret_sample)
{
    const struct job *job = &enc->job;
    const struct pending *pages[PAGE_PROBE_PAGES];
    unsigned n = job->n_pending < PAGE_PROBE_PAGES ? job->n_pending : PAGE_PROBE_PAGES;
    *ret_sample = (struct page_sample){.mode = mode, .pages = n};
    if (!n)
        return;
    enc->probes += next;
    unsigned first = enc->probes * PAGE_PROBE_PAGES % (job->n_pending - n + 1);
    for (unsigned i = 0; i < n; i++)
        pages[i] = &job->pending[first + i];
    size_t len = (size_t)n * GUEST_PAGE_SIZE, packed = 0;
    uint8_t *out = enc->packed ? enc->packed : page_blocks_take(enc->blocks);
    int64_t wall = clock_mono_ns(), start = clock_thread_cpu_ns();
    if (mode != PAGE_MODE_RAW && out)
        packed = compress(enc, mode, gather(enc, pages, n), len, out, len * WORTH_PERCENT / 100);
    ret_sample->cpu_ns = clock_thread_cpu_ns() - start;
    ret_sample->wall_ns = clock_mono_ns() - wall;
    ret_sample->bytes = packed ? packed : len;
    enc->packed = out;
}

void encoded_batch_finish(struct encoded_batch *out)
{
    free(out->memory);
    if (out->blocks) {
        struct page_blocks *blocks = out->blocks;
        page_blocks_give(blocks, out->snapshot);
        page_blocks_give(blocks, out->packed);
    }
    *out = (struct encoded_batch){0};
}

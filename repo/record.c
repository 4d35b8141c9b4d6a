/* SPDX-License-Identifier: Apache-2.0 */
#include "repo/record.h"

#include "base/bytes.h"

#include <lz4.h>
#include <xxhash.h>
#include <zstd.h>

/* Worth it only if a decoder's work buys at least a sixteenth. */
static size_t good_enough(size_t raw)
{
    return raw - raw / 16;
}

int record_codec_init(struct record_codec *c, enum record_compression compression, int zstd_level,
                      struct vm_error **err)
{
    *c = (struct record_codec){.compression = compression, .zstd_level = zstd_level};
    c->zstd_out = ZSTD_createDCtx();
    c->lz4 = malloc((size_t)LZ4_sizeofState());
    if (compression == RECORD_ZSTD)
        c->zstd_in = ZSTD_createCCtx();
    if (c->zstd_out && c->lz4 && (c->zstd_in || compression != RECORD_ZSTD))
        return 0;
    record_codec_finish(c);
    return error_nomem(err);
}

void record_codec_finish(struct record_codec *c)
{
    ZSTD_freeCCtx(c->zstd_in);
    ZSTD_freeDCtx(c->zstd_out);
    free(c->lz4);
    *c = (struct record_codec){0};
}

static size_t compress(struct record_codec *c, const void *pages, size_t raw, uint8_t *out,
                       size_t room)
{
    if (c->compression == RECORD_LZ4) {
        int n = LZ4_compress_fast_extState(c->lz4, pages, (char *)out, (int)raw, (int)room, 1);
        return n > 0 ? (size_t)n : 0;
    }
    if (c->compression == RECORD_ZSTD) {
        size_t n = ZSTD_compressCCtx(c->zstd_in, out, room, pages, raw, c->zstd_level);
        return ZSTD_isError(n) ? 0 : n;
    }
    return 0;
}

size_t record_encode(struct record_codec *c, const void *pages, unsigned n_pages, uint16_t mask,
                     uint8_t *out)
{
    size_t raw = (size_t)n_pages * PAGE_BYTES;
    size_t payload = compress(c, pages, raw, out + RECORD_HEADER, good_enough(raw));
    enum record_compression compression = payload ? c->compression : RECORD_RAW;
    if (!payload) {
        memcpy(out + RECORD_HEADER, pages, raw);
        payload = raw;
    }
    put_le32(out + 8, (uint32_t)payload);
    out[12] = (uint8_t)compression;
    out[13] = (uint8_t)n_pages;
    put_le16(out + 14, mask);
    return RECORD_HEADER + payload;
}

static uint64_t checksum(const uint8_t *record, size_t len, uint64_t pack, uint64_t offset)
{
    return XXH3_64bits_withSeed(record + 8, len - 8, pack + offset);
}

void record_seal(uint8_t *record, size_t len, uint64_t pack, uint64_t offset)
{
    put_le64(record, checksum(record, len, pack, offset));
}

static int damaged(struct vm_error **err, uint64_t pack, uint64_t offset, const char *how)
{
    return error_set(err, VM_ERROR_CORRUPT, "pack %016llx, record at %llu: %s",
                     (unsigned long long)pack, (unsigned long long)offset, how);
}

int record_check(const uint8_t *record, size_t len, uint64_t pack, uint64_t offset,
                 struct record_info *ret_info, struct vm_error **err)
{
    if (len < RECORD_HEADER)
        return damaged(err, pack, offset, "it ends within its header");
    uint32_t payload = get_le32(record + 8);
    unsigned n_pages = record[13];
    uint16_t mask = get_le16(record + 14);
    if (record[12] > RECORD_ZSTD || !n_pages || n_pages > RECORD_PAGES_MAX ||
        payload > n_pages * PAGE_BYTES || !payload ||
        (record[12] == RECORD_RAW && payload != n_pages * PAGE_BYTES) ||
        (mask && (unsigned)__builtin_popcount(mask) != n_pages))
        return damaged(err, pack, offset, "its header makes no sense");
    if (payload > len - RECORD_HEADER)
        return damaged(err, pack, offset, "it ends too early");
    if (checksum(record, RECORD_HEADER + payload, pack, offset) != get_le64(record))
        return damaged(err, pack, offset, "its checksum is wrong");
    *ret_info = (struct record_info){payload, record[12], n_pages, mask};
    return 0;
}

int record_decode(struct record_codec *c, const uint8_t *record, size_t len, uint64_t pack,
                  uint64_t offset, uint8_t *out, unsigned *ret_n_pages, struct vm_error **err)
{
    struct record_info info;
    if (record_check(record, len, pack, offset, &info, err) < 0)
        return -1;
    const uint8_t *payload = record + RECORD_HEADER;
    size_t raw = (size_t)info.n_pages * PAGE_BYTES, got = 0;
    if (info.compression == RECORD_RAW) {
        memcpy(out, payload, raw);
        got = raw;
    } else if (info.compression == RECORD_LZ4) {
        int n =
            LZ4_decompress_safe((const char *)payload, (char *)out, (int)info.payload, (int)raw);
        got = n > 0 ? (size_t)n : 0;
    } else {
        got = ZSTD_decompressDCtx(c->zstd_out, out, raw, payload, info.payload);
    }
    if (got != raw)
        return damaged(err, pack, offset, "it does not decompress");
    *ret_n_pages = info.n_pages;
    return 0;
}

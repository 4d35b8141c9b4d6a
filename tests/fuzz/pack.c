/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Fuzzer of repo/pack and repo/record: arbitrary bytes as the end of a pack, and as a record.
 * Checksums are made right first, so that what is behind them is reached. Asserted: what is
 * accepted keeps to the bounds that the header promises, and is written again as the same bytes.
 */
#include "repo/pack.h"

#include <assert.h>
#include <xxhash.h>

/* Built by libFuzzer's driver. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { PACK = 7, BODY = 1 << 20 };

static void try_footer(const uint8_t *data, size_t size)
{
    struct footer f;
    uint8_t *copy = malloc(size + 1);
    memcpy(copy, data, size);
    if (size >= PACK_TRAILER) {
        put_le64(copy + size - 24, PACK);
        put_le64(copy + size - 8, XXH3_64bits_withSeed(copy, size - 8, PACK));
    }
    if (footer_parse(copy, size, PACK, BODY + size, &f, NULL) == 0) {
        struct buffer again = {0};
        uint32_t pages = 0;
        for (uint32_t i = 0; i < f.n_records; i++) {
            const struct footer_record *r = &f.records[i];
            assert(r->offset >= PACK_HEADER && r->offset % RECORD_ALIGN == 0);
            assert(r->offset + r->len <= BODY && r->first_page == pages);
            pages += r->n_pages;
            assert(footer_record_of(&f, pages - 1) == i);
        }
        assert(pages == f.n_pages && pages <= PACK_PAGES_MAX);
        footer_write(&f, &again);
        assert(again.len == size);
        buffer_finish(&again);
        footer_finish(&f);
    }
    free(copy);
}

static void try_record(const uint8_t *data, size_t size)
{
    static uint8_t out[RECORD_RAW_MAX];
    struct record_codec codec;
    unsigned n_pages;
    uint8_t *copy = malloc(size + 1);
    memcpy(copy, data, size);
    if (size > RECORD_HEADER) {
        uint32_t payload = get_le32(copy + 8);
        if (payload <= size - RECORD_HEADER)
            record_seal(copy, RECORD_HEADER + payload, PACK, 64);
    }
    assert(record_codec_init(&codec, RECORD_LZ4, 0, NULL) == 0);
    if (record_decode(&codec, copy, size, PACK, 64, out, &n_pages, NULL) == 0)
        assert(n_pages >= 1 && n_pages <= RECORD_PAGES_MAX);
    record_codec_finish(&codec);
    free(copy);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    try_footer(data, size);
    try_record(data, size);
    return 0;
}

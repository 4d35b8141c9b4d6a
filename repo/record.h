/* SPDX-License-Identifier: Apache-2.0 */
/*
 * record: up to sixteen pages that became new together, compressed as one block. No I/O.
 *
 * On the store (little endian, at a multiple of 8 bytes in its pack):
 *
 *      0  u64  XXH3-64 of all that follows, seeded with the pack's number + the record's offset
 *      8  u32  length of the payload
 *     12  u8   codec: 0 raw, 1 LZ4 block, 2 zstd frame
 *     13  u8   pages, 1..16
 *     14  u16  which pages of one aligned extent these are (bit 0: the first), if they are all of
 *              its pages that are not zero; 0 otherwise
 *     16       payload: the pages, one after the other, compressed
 *
 * The seed makes a record that is read at the wrong place a damaged one. Threads: any; a
 * record_codec belongs to one thread at a time.
 */
#ifndef VMMIG_REPO_RECORD_H
#define VMMIG_REPO_RECORD_H

#include "repo/page.h"

enum {
    RECORD_ALIGN = 8,
    RECORD_HEADER = 16,
    RECORD_PAGES_MAX = EXTENT_PAGES,
    RECORD_RAW_MAX = RECORD_PAGES_MAX * PAGE_BYTES,
    RECORD_MAX = RECORD_HEADER + RECORD_RAW_MAX, /* what does not shrink is stored raw */
};

enum record_compression { RECORD_RAW, RECORD_LZ4, RECORD_ZSTD };

struct record_codec {
    enum record_compression compression; /* what is tried */
    int zstd_level;
    void *zstd_in, *zstd_out, *lz4;
};

/* For encoding with that compression, and for decoding everything. */
int record_codec_init(struct record_codec *c, enum record_compression compression, int zstd_level,
                      struct vm_error **err);
void record_codec_finish(struct record_codec *c);

/*
 * Encode n_pages at `pages` into `out` of RECORD_MAX bytes, but for the checksum; returns the
 * length.
 */
size_t record_encode(struct record_codec *c, const void *pages, unsigned n_pages, uint16_t mask,
                     uint8_t *out);
/* Set the checksum, once pack and offset are known. `len` is what record_encode returned. */
void record_seal(uint8_t *record, size_t len, uint64_t pack, uint64_t offset);

/* What a record of that length takes in its pack. */
static inline uint32_t record_room(uint32_t len)
{
    return (len + RECORD_ALIGN - 1) / RECORD_ALIGN * RECORD_ALIGN;
}

/* The codec that an encoded record says. */
static inline enum record_compression record_compression(const uint8_t *record)
{
    return (enum record_compression)record[12];
}

struct record_info {
    uint32_t payload;
    enum record_compression compression;
    unsigned n_pages;
    uint16_t mask;
};

/* Check `len` bytes that were read at that place: header, lengths and checksum. CORRUPT. */
int record_check(const uint8_t *record, size_t len, uint64_t pack, uint64_t offset,
                 struct record_info *ret_info, struct vm_error **err);
/* record_check, then its pages into `out` of RECORD_RAW_MAX bytes. */
int record_decode(struct record_codec *c, const uint8_t *record, size_t len, uint64_t pack,
                  uint64_t offset, uint8_t *out, unsigned *ret_n_pages, struct vm_error **err);

#endif

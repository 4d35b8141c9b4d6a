/* SPDX-License-Identifier: Apache-2.0 */
/*
 * page_encoder: batches of guest pages in, encoded batches (migrate/page_format.h) out. One per
 * channel.
 *
 *     struct page_encoder_config config = {.regions = r, .n_regions = n, .channel = i,
 *                                          .n_channels = channels, .destination_zero = true};
 *     CLEANUP(page_encoder) struct page_encoder *enc = page_encoder_create(&config, &err);
 *
 *     struct encoded_batch out = {0};
 *     page_encoder_encode(enc, batch, policy_choose(...), &out, &err);
 *     if (!out.borrows_input)
 *         page_batch_unref(batch);              // else when the batch is acknowledged
 *     ... send meta and payload, again if need be, until they are acknowledged ...
 *     encoded_batch_finish(&out);
 *
 * What becomes of a page, cheapest first:
 *   fresh zero  zero, and nothing else was ever sent: the destination has it already; not sent
 *   same        the hash is that of the page when it was last sent; not sent
 *   zero        a name without contents
 *   delta       against the page as last sent, if that is at hand (not in raw mode)
 *   lz4, zstd   with its neighbours in the batch, as the mode says, where that saves 3 % or more
 *   raw         a pointer to the caller's bytes
 * A batch in which nothing is left to send has meta_len 0: there is nothing to be sent or
 * acknowledged.
 *
 * Contract with the channel: what is encoded is applied, exactly once and in the order of encoding.
 * The encoder remembers each page as sent from the moment that encode returns; if a batch can be
 * neither sent nor sent again, then the migration has failed, and so it has when encode fails.
 *
 * The hash is XXH3-128, stored whole and mixed with the page's address instead of a tag, so that an
 * entry takes 16 bytes. 64 bits would do against accidents (two versions of one page are compared,
 * there is no birthday), but a wrong "same" is silent corruption and the other half costs only
 * memory that is bounded anyway.
 *
 * Source memory that changes under the encoder (`mapped_source`): each page is copied once before
 * it is looked at, and everything, raw pages too, comes from the copy: what the encoder remembers
 * is what was sent, and the batch is never borrowed: the copies travel on with what was encoded. The guest's later
 * version is dirty and comes again. A page that was hashed and then sent from where it lies could
 * be another one when it leaves; the next time it is what was hashed it would pass for unchanged.
 * Nor does the copy cost anything: to read memory of a memfd into a block that stays in the cache
 * and hash it there takes 0.16 s of CPU for 1 GiB, to map it and hash it in place 0.23 s, since
 * every page of a mapping is faulted in and unmapped (tests/bench/reading.c).
 *
 * Memory. All encoders of a migration share `memory` bytes: hashes first (16 bytes a page), former
 * versions in the rest; one bit per page, or per 2^k pages of a large guest. An entry that had to
 * make room costs bytes on the wire, nothing else.
 *
 * Threads: one at a time per encoder. Different encoders are independent.
 * Errors: PROTOCOL for a page that is in no region or belongs to another channel; NO_SPACE without
 * memory.
 */
#ifndef VMMIG_MIGRATE_PAGE_ENCODER_H
#define VMMIG_MIGRATE_PAGE_ENCODER_H

#include "base/cleanup.h"
#include "base/error.h"
#include "migrate/page_format.h"
#include "vmm/guest.h"
#include "vmm/page_batch.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

struct page_encoder;

/* How pages that must travel are written. */
enum page_mode {
    PAGE_MODE_RAW,
    PAGE_MODE_LZ4,
    PAGE_MODE_ZSTD_1, /* the levels of zstd */
    PAGE_MODE_ZSTD_2,
    PAGE_MODE_ZSTD_3,
    PAGE_MODE_COUNT
};

#define PAGE_ENCODER_CHANNELS_MAX 16u
#define PAGE_ENCODER_MEMORY_DEFAULT (64ul << 20)
#define PAGE_ENCODER_MEMORY_MIN (5ul << 20) /* for each channel */
#define PAGE_PROBE_PAGES 16u

struct page_encoder_config {
    const struct guest_region *regions; /* only sizes are used; not kept */
    unsigned n_regions;
    unsigned channel, n_channels; /* of page_stripe_channel() */
    /* Bytes for all encoders of the migration together; 0: the default. At least
     * PAGE_ENCODER_MEMORY_MIN per channel are taken. */
    size_t memory;
    bool destination_zero; /* the destination's memory begins as all zero */
    bool mapped_source;    /* the bytes behind a batch may change while they are encoded */
};

/* An encoded batch. Zero-initialised is empty and valid. */
struct encoded_batch {
    const uint8_t *meta;
    size_t meta_len; /* 0: nothing to send */
    const struct iovec *payload;
    unsigned n_payload; /* at most PAGE_BATCH_MAX */
    size_t payload_len;
    unsigned n_pages;   /* named in meta */
    bool borrows_input; /* payload points into the input batch: keep that referenced */
    size_t memory_size; /* bytes that this holds itself */
    void *memory;
    struct page_blocks *blocks; /* whose two blocks these are; each may be NULL */
    uint8_t *snapshot, *packed;
    /* What policy_note_batch wants to know: pages that took the way of the mode, and their cost. */
    struct page_sample {
        enum page_mode mode;
        unsigned pages;  /* raw, delta, lz4, zstd */
        uint64_t bytes;  /* of meta and payload */
        int64_t scan_ns; /* CPU time to find what need not be sent: the same in every mode */
        int64_t cpu_ns;  /* CPU time, scan included */
        int64_t wall_ns;
    } sample;
};

/* Since creation, by enum page_kind. */
struct page_encoder_stats {
    struct {
        uint64_t pages;
        uint64_t bytes_out; /* payload; what comes in is pages * GUEST_PAGE_SIZE */
        int64_t cpu_ns;     /* what need not be sent is found in one pass: its time is at SAME */
    } kinds[PAGE_KIND_COUNT];
    uint64_t meta_bytes;
};

struct page_encoder *page_encoder_create(const struct page_encoder_config *config,
                                         struct vm_error **err);
void page_encoder_destroy(struct page_encoder *enc);
DEFINE_CLEANUP(page_encoder, struct page_encoder *, page_encoder_destroy)

/* Encode the batch into *ret_out, which must be empty. Takes no reference of the batch. */
int page_encoder_encode(struct page_encoder *enc, const struct page_batch *batch,
                        enum page_mode mode, struct encoded_batch *ret_out, struct vm_error **err);
/*
 * What up to PAGE_PROBE_PAGES of the last batch's pages take in some mode; nothing comes of it but
 * the figures. Between encode and the end of the batch's and the encoded batch's memory. Pages go
 * round from call to call when `next` is true. `sample->pages` is 0 if there was nothing to encode.
 */
void page_encoder_probe(struct page_encoder *enc, enum page_mode mode, bool next,
                        struct page_sample *ret_sample);
/* Free what it holds; it is empty then. */
void encoded_batch_finish(struct encoded_batch *out);

const struct page_encoder_stats *page_encoder_stats(const struct page_encoder *enc);
/* Bytes that the encoder holds (not: those it gave out). */
size_t page_encoder_memory(const struct page_encoder *enc);

/* "raw", "lz4", "zstd-1" ... */
const char *page_mode_name(enum page_mode mode);

#endif

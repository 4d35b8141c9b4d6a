/* SPDX-License-Identifier: Apache-2.0 */
/*
 * stream_frames: what travels on the channels of a copy (migrate/channel.h), by frame type.
 *
 *     channel 1..N   FRAME_PAGES    meta and payload as in migrate/page_format.h
 *     channel 0      FRAME_BYTES    the next bytes for the destination's loader
 *                    FRAME_BARRIER  le32 n, then n of le64: how many frames of channel 1..n were sent
 *                                   before. What follows is loaded only once all those are applied.
 *
 * FRAME_BYTES' meta: le32 length when decoded (1..STREAM_BYTES_MAX), le32 encoding (0 as it is, 1 LZ4
 * block). The payload is never longer than the decoded bytes. Pure; any thread.
 */
#ifndef VMMIG_MIGRATE_STREAM_FRAMES_H
#define VMMIG_MIGRATE_STREAM_FRAMES_H

#include "base/error.h"
#include "migrate/channel.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { FRAME_PAGES = 1, FRAME_BYTES = 2, FRAME_BARRIER = 3 };

#define STREAM_BYTES_MAX (1u << 20)
#define STREAM_BYTES_META 8
#define STREAM_BARRIER_META_MAX (4 + 8 * CHANNELS_MAX)

enum stream_encoding { STREAM_PLAIN = 0, STREAM_LZ4 = 1 };

struct stream_bytes {
    uint32_t length;
    enum stream_encoding encoding;
};

struct stream_barrier {
    unsigned n;
    uint64_t frames[CHANNELS_MAX];
};

void stream_bytes_pack(const struct stream_bytes *b, uint8_t meta[STREAM_BYTES_META]);
/* PROTOCOL if meta and payload_len do not fit together. */
int stream_bytes_unpack(const void *meta, size_t meta_len, size_t payload_len,
                        struct stream_bytes *ret_bytes, struct vm_error **err);
/* Returns the length of meta. */
size_t stream_barrier_pack(const struct stream_barrier *b, uint8_t meta[STREAM_BARRIER_META_MAX]);
int stream_barrier_unpack(const void *meta, size_t meta_len, unsigned channels,
                          struct stream_barrier *ret_barrier, struct vm_error **err);

#endif

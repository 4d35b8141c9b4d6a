/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The frame decoder: whatever the bytes are and however they are cut, it never holds more than
 * twice what arrived, and what it gives out encodes to the bytes that it took.
 */
#include "proto/frame.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void require(bool condition)
{
    if (!condition)
        abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    cleanup_frame_decoder struct frame_decoder d = {0};
    cleanup_buffer struct buffer again = {0};
    if (size < 1)
        return 0;
    size_t step = data[0] ? data[0] : size;
    data++;
    size--;
    size_t arrived = 0, given = 0;
    for (size_t at = 0; at < size; at += step) {
        size_t n = step < size - at ? step : size - at;
        struct cursor in = cursor_init(data + at, n);
        struct frame frame;
        int r;
        arrived += n;
        while ((r = frame_decode(&d, &in, &frame, NULL)) > 0) {
            require(frame.type && frame.len <= FRAME_PAYLOAD_MAX);
            require(frame_put(&again, frame.type, frame.data, frame.len, NULL) == 0);
            given = at + n - cursor_left(&in);
        }
        require(d.payload.cap <= 256 || d.payload.cap <= 2 * arrived);
        if (r < 0) {
            require(frame_decode(&d, &in, &frame, NULL) < 0 && !frame_decoder_is_idle(&d));
            break;
        }
        require(!cursor_left(&in));
    }
    require(again.len == given && (!given || !memcmp(again.data, data, given)));
    return 0;
}

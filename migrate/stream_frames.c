/* SPDX-License-Identifier: Apache-2.0 */
#include "migrate/stream_frames.h"

#include "base/bytes.h"

void stream_bytes_pack(const struct stream_bytes *b, uint8_t meta[STREAM_BYTES_META])
{
    put_le32(meta, b->length);
    put_le32(meta + 4, b->encoding);
}

int stream_bytes_unpack(const void *meta, size_t meta_len, size_t payload_len,
                        struct stream_bytes *ret_bytes, struct vm_error **err)
{
    struct cursor c = cursor_init(meta, meta_len);
    uint32_t length = cursor_le32(&c), encoding = cursor_le32(&c);
    if (c.failed || cursor_left(&c))
        return error_set(err, VM_ERROR_PROTOCOL, "a frame of bytes has %zu bytes of meta", meta_len);
    if (!length || length > STREAM_BYTES_MAX || payload_len > length || !payload_len)
        return error_set(err, VM_ERROR_PROTOCOL, "a frame of %zu bytes claims to hold %u",
                         payload_len, length);
    if (encoding > STREAM_LZ4 || (encoding == STREAM_PLAIN && payload_len != length))
        return error_set(err, VM_ERROR_PROTOCOL, "a frame of bytes has encoding %u", encoding);
    *ret_bytes = (struct stream_bytes){length, encoding};
    return 0;
}

size_t stream_barrier_pack(const struct stream_barrier *b, uint8_t meta[STREAM_BARRIER_META_MAX])
{
    put_le32(meta, b->n);
    for (unsigned i = 0; i < b->n; i++)
        put_le64(meta + 4 + 8 * (size_t)i, b->frames[i]);
    return 4 + 8 * (size_t)b->n;
}

int stream_barrier_unpack(const void *meta, size_t meta_len, unsigned channels,
                          struct stream_barrier *ret_barrier, struct vm_error **err)
{
    struct cursor c = cursor_init(meta, meta_len);
    struct stream_barrier b = {.n = cursor_le32(&c)};
    if (c.failed || b.n != channels || cursor_left(&c) != 8 * (size_t)b.n)
        return error_set(err, VM_ERROR_PROTOCOL, "a barrier over %u channels; there are %u", b.n,
                         channels);
    for (unsigned i = 0; i < b.n; i++)
        b.frames[i] = cursor_le64(&c);
    *ret_barrier = b;
    return 0;
}

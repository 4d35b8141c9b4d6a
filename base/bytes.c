/* SPDX-License-Identifier: Apache-2.0 */
#include "base/bytes.h"

void buffer_finish(struct buffer *b)
{
    free(b->data);
    *b = (struct buffer){.limit = b->limit};
}

void buffer_reset(struct buffer *b)
{
    b->len = 0;
    b->failed = false;
}

uint8_t *buffer_grow(struct buffer *b, size_t n)
{
    if (b->failed || n > SIZE_MAX / 2 - b->len || (b->limit && b->len + n > b->limit)) {
        b->failed = true;
        return NULL;
    }
    if (b->len + n > b->cap) {
        size_t cap = b->cap ? b->cap : 256;
        while (cap < b->len + n)
            cap *= 2;
        uint8_t *data = realloc(b->data, cap);
        if (!data) {
            b->failed = true;
            return NULL;
        }
        b->data = data;
        b->cap = cap;
    }
    uint8_t *p = b->data + b->len;
    b->len += n;
    return p;
}

void buffer_put(struct buffer *b, const void *p, size_t n)
{
    if (!n)
        return;
    uint8_t *to = buffer_grow(b, n);
    if (to)
        memcpy(to, p, n);
}

void buffer_put_u8(struct buffer *b, uint8_t v)
{
    buffer_put(b, &v, 1);
}

#define BUFFER_PUT(order, bits)                                                                    \
    void buffer_put_##order##bits(struct buffer *b, uint##bits##_t v)                              \
    {                                                                                              \
        uint8_t *to = buffer_grow(b, bits / 8);                                                    \
        if (to)                                                                                    \
            put_##order##bits(to, v);                                                              \
    }
BUFFER_PUT(le, 16)
BUFFER_PUT(le, 32)
BUFFER_PUT(le, 64)
BUFFER_PUT(be, 16)
BUFFER_PUT(be, 32)
BUFFER_PUT(be, 64)

void buffer_consume(struct buffer *b, size_t n)
{
    if (n > b->len)
        n = b->len;
    memmove(b->data, b->data + n, b->len - n);
    b->len -= n;
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * bytes: fixed-width integers in byte strings, and the two ends of a byte string: `struct buffer`
 * grows while it is written, `struct cursor` is read with every bound checked.
 *
 * Little endian is vmmig's own order (le), big endian QEMU's (be).
 */
#ifndef VMMIG_BASE_BYTES_H
#define VMMIG_BASE_BYTES_H

#include <endian.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define BYTES_ACCESS(bits)                                                                         \
    static inline uint##bits##_t get_le##bits(const void *p)                                       \
    {                                                                                              \
        uint##bits##_t v;                                                                          \
        memcpy(&v, p, sizeof(v));                                                                  \
        return le##bits##toh(v);                                                                   \
    }                                                                                              \
    static inline uint##bits##_t get_be##bits(const void *p)                                       \
    {                                                                                              \
        uint##bits##_t v;                                                                          \
        memcpy(&v, p, sizeof(v));                                                                  \
        return be##bits##toh(v);                                                                   \
    }                                                                                              \
    static inline void put_le##bits(void *p, uint##bits##_t v)                                     \
    {                                                                                              \
        v = htole##bits(v);                                                                        \
        memcpy(p, &v, sizeof(v));                                                                  \
    }                                                                                              \
    static inline void put_be##bits(void *p, uint##bits##_t v)                                     \
    {                                                                                              \
        v = htobe##bits(v);                                                                        \
        memcpy(p, &v, sizeof(v));                                                                  \
    }
BYTES_ACCESS(16)
BYTES_ACCESS(32)
BYTES_ACCESS(64)
#undef BYTES_ACCESS

/*
 * A growing byte string. Zero-initialised is empty and valid. An append that cannot get memory, or
 * would pass `limit` (0: none), sets `failed` and changes nothing; check it once, at the end.
 */
struct buffer {
    uint8_t *data;
    size_t len, cap;
    size_t limit;
    bool failed;
};

void buffer_finish(struct buffer *b); /* frees the memory; b is empty and usable again */
void buffer_reset(struct buffer *b);  /* len = 0, failed = false; keeps the memory */
/* Room for n more bytes; returns where they go (the caller fills them) or NULL. Grows len. */
uint8_t *buffer_grow(struct buffer *b, size_t n);
void buffer_put(struct buffer *b, const void *p, size_t n);
void buffer_put_u8(struct buffer *b, uint8_t v);
void buffer_put_le16(struct buffer *b, uint16_t v);
void buffer_put_le32(struct buffer *b, uint32_t v);
void buffer_put_le64(struct buffer *b, uint64_t v);
void buffer_put_be16(struct buffer *b, uint16_t v);
void buffer_put_be32(struct buffer *b, uint32_t v);
void buffer_put_be64(struct buffer *b, uint64_t v);
/* Drop the first n bytes. */
void buffer_consume(struct buffer *b, size_t n);
static inline void buffer_cleanup(struct buffer *b)
{
    buffer_finish(b);
}
#define cleanup_buffer __attribute__((cleanup(buffer_cleanup)))

/* A byte string being read. A read past the end returns 0 / NULL and sets `failed` for good. */
struct cursor {
    const uint8_t *p, *end;
    bool failed;
};

static inline struct cursor cursor_init(const void *data, size_t len)
{
    const uint8_t *p = len ? data : (const void *)""; /* NULL has no place behind it */
    return (struct cursor){p, p + len, false};
}

static inline size_t cursor_left(const struct cursor *c)
{
    return (size_t)(c->end - c->p);
}

/* The next n bytes, or NULL (failed). */
static inline const uint8_t *cursor_take(struct cursor *c, size_t n)
{
    if (c->failed || n > cursor_left(c)) {
        c->failed = true;
        return NULL;
    }
    const uint8_t *p = c->p;
    c->p += n;
    return p;
}

static inline uint8_t cursor_u8(struct cursor *c)
{
    const uint8_t *p = cursor_take(c, 1);
    return p ? *p : 0;
}

#define CURSOR_READ(order, bits)                                                                   \
    static inline uint##bits##_t cursor_##order##bits(struct cursor *c)                            \
    {                                                                                              \
        const uint8_t *p = cursor_take(c, bits / 8);                                               \
        return p ? get_##order##bits(p) : 0;                                                       \
    }
CURSOR_READ(le, 16)
CURSOR_READ(le, 32)
CURSOR_READ(le, 64)
CURSOR_READ(be, 16)
CURSOR_READ(be, 32)
CURSOR_READ(be, 64)
#undef CURSOR_READ

#endif

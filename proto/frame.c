/* SPDX-License-Identifier: Apache-2.0 */
#include "proto/frame.h"

void frame_decoder_finish(struct frame_decoder *d)
{
    buffer_finish(&d->payload);
    *d = (struct frame_decoder){0};
}

static int broken(struct frame_decoder *d, struct vm_error **err, const char *what)
{
    d->broken = true;
    return error_set(err, VM_ERROR_PROTOCOL, "the other side does not speak vmmig's protocol: %s",
                     what);
}

/* At most `want` of what is there, all of it moved to `to`; returns how much. */
static size_t move(struct cursor *in, size_t want, uint8_t *to)
{
    size_t n = want < cursor_left(in) ? want : cursor_left(in);
    if (n)
        memcpy(to, cursor_take(in, n), n);
    return n;
}

/* 1 once the header is complete and allowed. */
static int read_header(struct frame_decoder *d, struct cursor *in, struct vm_error **err)
{
    d->n_header += move(in, FRAME_HEADER_SIZE - d->n_header, d->header + d->n_header);
    /* Garbage is told from its first bytes, not after twelve that may never come. */
    uint8_t magic[4];
    put_le32(magic, FRAME_MAGIC);
    if (memcmp(d->header, magic, d->n_header < 4 ? d->n_header : 4))
        return broken(d, err, "a frame does not begin with its magic");
    if (d->n_header < FRAME_HEADER_SIZE)
        return 0;
    d->length = get_le32(d->header + 4);
    if (d->length > FRAME_PAYLOAD_MAX)
        return broken(d, err, "a frame is too long");
    if (!get_le16(d->header + 8) || get_le16(d->header + 10))
        return broken(d, err, "a frame has no type");
    return 1;
}

static void start_over(struct frame_decoder *d)
{
    d->n_header = 0;
    d->length = 0;
    d->complete = false;
    buffer_reset(&d->payload);
}

int frame_decode(struct frame_decoder *d, struct cursor *in, struct frame *ret_frame,
                 struct vm_error **err)
{
    if (d->broken)
        return broken(d, err, "an earlier frame was wrong");
    if (d->complete)
        start_over(d);
    if (d->n_header < FRAME_HEADER_SIZE) {
        int r = read_header(d, in, err);
        if (r <= 0)
            return r;
    }
    size_t want = d->length - d->payload.len;
    size_t n = want < cursor_left(in) ? want : cursor_left(in);
    uint8_t *to = n ? buffer_grow(&d->payload, n) : NULL;
    if (n && !to) {
        d->broken = true;
        return error_nomem(err);
    }
    move(in, n, to);
    if (d->payload.len < d->length)
        return 0;
    d->complete = true;
    *ret_frame = (struct frame){get_le16(d->header + 8), d->payload.data, d->length};
    return 1;
}

bool frame_decoder_is_idle(const struct frame_decoder *d)
{
    return !d->broken && (d->complete || !d->n_header);
}

/* Room for a whole frame; the header is written. NULL: *err says why, and out is unchanged. */
static uint8_t *put_header(struct buffer *out, uint16_t type, size_t n, struct vm_error **err)
{
    if (n > FRAME_PAYLOAD_MAX) {
        error_set(err, VM_ERROR_USAGE, "a message of %zu bytes is too long; the limit is %u", n,
                  FRAME_PAYLOAD_MAX);
        return NULL;
    }
    uint8_t *p = buffer_grow(out, FRAME_HEADER_SIZE + n);
    if (!p) {
        error_nomem(err);
        return NULL;
    }
    put_le32(p, FRAME_MAGIC);
    put_le32(p + 4, (uint32_t)n);
    put_le16(p + 8, type);
    put_le16(p + 10, 0);
    return p + FRAME_HEADER_SIZE;
}

int frame_put(struct buffer *out, uint16_t type, const void *payload, size_t n,
              struct vm_error **err)
{
    uint8_t *to = put_header(out, type, n, err);
    if (!to)
        return -1;
    if (n)
        memcpy(to, payload, n);
    return 0;
}

int frame_put_message(struct buffer *out, uint16_t type, const ProtobufCMessage *message,
                      struct vm_error **err)
{
    uint8_t *to = put_header(out, type, protobuf_c_message_get_packed_size(message), err);
    if (!to)
        return -1;
    protobuf_c_message_pack(message, to);
    return 0;
}

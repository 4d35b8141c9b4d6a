/* SPDX-License-Identifier: Apache-2.0 */
/*
 * frame: messages on a byte stream. The control sockets of both kinds (CLI to agent, agent to
 * agent) use it. No I/O: bytes in, frames out; frames in, bytes out.
 *
 *     struct frame_decoder d = {0};
 *     struct cursor in = cursor_init(bytes, n);           // as they came from the stream
 *     struct frame frame;
 *     while ((r = frame_decode(&d, &in, &frame, &err)) > 0)
 *         handle(frame.type, frame.data, frame.len);      // valid until the next call
 *     frame_decoder_finish(&d);
 *
 * On the wire, little endian:
 *
 *     le32 magic FRAME_MAGIC     le32 length of the payload, at most FRAME_PAYLOAD_MAX
 *     le16 type, not 0           le16 0, reserved                  payload
 *
 * Bounded: a decoder holds one frame at most, and never more memory than twice what has arrived of
 * it, whatever the length claims. A stream that broke the rules once stays broken: every further
 * call fails. Threads: one at a time per decoder.
 */
#ifndef VMMIG_PROTO_FRAME_H
#define VMMIG_PROTO_FRAME_H

#include "base/bytes.h"
#include "base/error.h"

#include <protobuf-c/protobuf-c.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define FRAME_MAGIC 0x474d4d56u /* "VMMG" */
#define FRAME_HEADER_SIZE 12
#define FRAME_PAYLOAD_MAX (1u << 20)

struct frame {
    uint16_t type;
    const uint8_t *data;
    size_t len;
};

/* Zero-initialised is valid: at the start of a stream. */
struct frame_decoder {
    uint8_t header[FRAME_HEADER_SIZE];
    size_t n_header;
    struct buffer payload;
    size_t length; /* of the payload that is being read */
    bool complete; /* the last frame was given out */
    bool broken;
};

void frame_decoder_finish(struct frame_decoder *d);
/*
 * Take bytes from `in` up to the end of the current frame. 1: *ret_frame is a frame, which stays
 * valid until the next call; call again, `in` may hold more. 0: `in` is used up and the frame is
 * not complete. -1: PROTOCOL, or out of memory.
 */
int frame_decode(struct frame_decoder *d, struct cursor *in, struct frame *ret_frame,
                 struct vm_error **err);
/* The stream may end here: no frame is half read. */
bool frame_decoder_is_idle(const struct frame_decoder *d);

/* Append one frame. USAGE if the payload is too large; nothing is appended then. */
int frame_put(struct buffer *out, uint16_t type, const void *payload, size_t n,
              struct vm_error **err);
int frame_put_message(struct buffer *out, uint16_t type, const ProtobufCMessage *message,
                      struct vm_error **err);

static inline void frame_decoder_cleanup(struct frame_decoder *d)
{
    frame_decoder_finish(d);
}
#define cleanup_frame_decoder __attribute__((cleanup(frame_decoder_cleanup)))

#endif

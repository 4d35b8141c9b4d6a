/* SPDX-License-Identifier: Apache-2.0 */
/*
 * channel_wire: the three things that travel on a channel's connection, as bytes. No I/O.
 *
 *     sender -> receiver   hello, once; then frames: header, meta, payload
 *     receiver -> sender   messages: the answer to the hello, then acknowledgements
 *
 * All integers little endian; docs/migration-wire.md has the layout. A parser takes bytes from
 * outside: it checks magic, bounds and sums before it gives anything out. Two kinds of failure:
 *
 *     PROTOCOL      the other side sends what the protocol does not allow
 *     UNREACHABLE   a sum does not match: damaged on the way; the connection is of no use
 */
#ifndef VMMIG_MIGRATE_CHANNEL_WIRE_H
#define VMMIG_MIGRATE_CHANNEL_WIRE_H

#include "base/error.h"
#include "migrate/channel.h"

#include <stddef.h>
#include <stdint.h>

#define CHANNEL_HEADER_SIZE 40
#define CHANNEL_HELLO_SIZE 56
#define CHANNEL_MESSAGE_SIZE 32 /* without its text */
#define CHANNEL_TEXT_MAX 512
#define CHANNEL_WIRE_VERSION 1
#define CHANNEL_TYPE_END 0xffff /* nothing comes behind it; neither meta nor payload */

struct channel_header {
    uint16_t type;
    uint64_t seq; /* 1, 2, 3 ... */
    uint32_t meta_len;
    uint32_t payload_len;
    uint64_t payload_sum; /* XXH3-64 */
};

/* Writes the header with its sum, which covers meta. */
void channel_header_write(uint8_t out[CHANNEL_HEADER_SIZE], const struct channel_header *header,
                          const void *meta);
/* PROTOCOL: bad magic, a length beyond its bound, an unknown type or flag. */
int channel_header_parse(const uint8_t in[CHANNEL_HEADER_SIZE], struct channel_header *ret_header,
                         struct vm_error **err);
/* After meta was read: does the sum match? UNREACHABLE if not. */
int channel_header_verify(const uint8_t in[CHANNEL_HEADER_SIZE], const void *meta,
                          struct vm_error **err);

void channel_hello_write(uint8_t out[CHANNEL_HELLO_SIZE], const struct channel_hello *hello);
int channel_hello_parse(const uint8_t in[CHANNEL_HELLO_SIZE], struct channel_hello *ret_hello,
                        struct vm_error **err);

enum channel_message_kind {
    CHANNEL_ANSWER = 1,  /* to the hello: go on behind `applied` */
    CHANNEL_APPLIED = 2, /* everything up to `applied` is; also sent as a sign of life */
    CHANNEL_WAIT = 3,    /* before the answer: still busy with the former connection */
    CHANNEL_REFUSED = 4, /* the end of the channel; error_kind and text say why */
};

struct channel_message {
    enum channel_message_kind kind;
    uint64_t applied;
    enum vm_error_kind error_kind; /* of REFUSED */
    char text[CHANNEL_TEXT_MAX + 1];
};

/* Returns its length on the wire. A text that is too long is cut. */
size_t channel_message_write(uint8_t out[CHANNEL_MESSAGE_SIZE + CHANNEL_TEXT_MAX],
                             const struct channel_message *message);
/*
 * The first message of `len` bytes: its length on the wire, 0 if more bytes are needed, or -1.
 * Control characters in its text become '?'.
 */
ssize_t channel_message_parse(const uint8_t *in, size_t len, struct channel_message *ret_message,
                              struct vm_error **err);

#endif

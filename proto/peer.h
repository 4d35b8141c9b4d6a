/* SPDX-License-Identifier: Apache-2.0 */
/*
 * peer: the messages between two agents (proto/peer.proto), checked before anybody looks at them.
 *
 * peer_unpack takes a frame's type and payload and returns the message only if every field of it is
 * within the limits below; a message that it returns needs no further check of lengths, counts,
 * ranges or presence: bytes fields have their exact size, strings their maximum and no control
 * characters, sub-messages that a message kind needs are there. Unknown fields of a newer peer are
 * ignored.
 *
 * Free what was returned with peer_message_finish. Threads: any.
 */
#ifndef VMMIG_PROTO_PEER_H
#define VMMIG_PROTO_PEER_H

#include "base/bytes.h"
#include "base/error.h"
#include "proto/peer.pb-c.h"

#include <stddef.h>

#define PEER_VERSION_MIN 1
#define PEER_VERSION_MAX 1
#define PEER_NAME_MAX 255      /* host, machine, node names */
#define PEER_TEXT_MAX 4096     /* error messages, paths */
#define PEER_ARGC_MAX 4096
#define PEER_ARG_MAX 65536
#define PEER_REGIONS_MAX 256
#define PEER_REGION_BYTES_MAX (1ULL << 46)
#define PEER_DISKS_MAX 256
#define PEER_CHANNELS_MAX 16
#define PEER_NICS_MAX 64
#define PEER_DEVICES_MAX 1024
#define PEER_DURATION_MAX_NS (100ULL * 366 * 86400 * 1000000000) /* so that times can be added to it */

struct peer_message {
    Vmmig__Peer__Type type;
    union {
        Vmmig__Peer__Hello *hello;
        Vmmig__Peer__HelloOk *hello_ok;
        Vmmig__Peer__Error *error;
        Vmmig__Peer__Handover *handover;
    };
};

/* PROTOCOL, with the name of the first field that is wrong. */
int peer_unpack(unsigned type, const void *data, size_t len, struct peer_message *ret_message,
                struct vm_error **err);
void peer_message_finish(struct peer_message *m);
/* The payload of the frame for a message; appended to out. */
void peer_pack(const ProtobufCMessage *message, struct buffer *out);
/* The highest version that both speak, 0 if there is none. */
unsigned peer_version_choose(const Vmmig__Peer__Hello *hello);

#endif

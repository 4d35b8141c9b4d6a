/* SPDX-License-Identifier: Apache-2.0 */
/*
 * unpack: a protobuf message of bounded size. A few bytes on the wire may stand for a structure of
 * a hundred: an array of a million empty messages would take 70 times the memory of its packet.
 * What a peer sends is unpacked with this.
 *
 * The message is freed with protobuf_c_message_free_unpacked(m, NULL).
 */
#ifndef VMMIG_PROTO_UNPACK_H
#define VMMIG_PROTO_UNPACK_H

#include <protobuf-c/protobuf-c.h>
#include <stddef.h>

/* Bytes of memory that a packed byte may take, all that is needed while unpacking included; and on top of them. */
enum { UNPACK_FACTOR = 16, UNPACK_SLACK = 64 << 10 };

/* NULL: malformed, or it would take more memory than that. */
ProtobufCMessage *unpack_message(const ProtobufCMessageDescriptor *kind, const void *data, size_t len);

#endif

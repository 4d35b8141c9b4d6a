/* SPDX-License-Identifier: Apache-2.0 */
/*
 * push_wire: what nbdkit_plugin.c says to the agent over a socket of their own, in the host's byte order: messages
 * that begin with struct push_message; WRITE is followed by its bytes. CLOSE is the last; a stream that ends
 * without it is not complete. Nothing is answered: a reader that is slow makes the writer wait.
 */
#ifndef VMMIG_SNAPSHOT_PUSH_WIRE_H
#define VMMIG_SNAPSHOT_PUSH_WIRE_H

#include <stdint.h>

#define PUSH_WRITE_MAX (1u << 20)

enum push_op { PUSH_WRITE = 1, PUSH_ZERO = 2, PUSH_CLOSE = 3 };

struct push_message {
    uint32_t op, zero;
    uint64_t offset, len;
};

#endif

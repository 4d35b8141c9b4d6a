/* SPDX-License-Identifier: Apache-2.0 */
#include "proto/unpack.h"

#include <stdlib.h>

static void *take(void *left, size_t size)
{
    size_t *bytes = left;
    if (size > *bytes)
        return NULL;
    *bytes -= size;
    return malloc(size);
}

/* What is given back before the end was needed meanwhile, and counts. */
static void give_back(void *left, void *p)
{
    (void)left;
    free(p);
}

ProtobufCMessage *unpack_message(const ProtobufCMessageDescriptor *kind, const void *data, size_t len)
{
    size_t left = len * UNPACK_FACTOR + UNPACK_SLACK;
    ProtobufCAllocator bounded = {.alloc = take, .free = give_back, .allocator_data = &left};
    return protobuf_c_message_unpack(kind, &bounded, len, data);
}

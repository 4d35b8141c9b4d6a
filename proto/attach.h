/* SPDX-License-Identifier: Apache-2.0 */
/*
 * attach: the messages between an agent and a VMM that links libvmmig-attach (proto/attach.proto), one per
 * packet, checked before anybody looks at them. No I/O.
 *
 *     attach_pack(type, &message.base, &buffer, &err)          a packet to send
 *     struct attach_message m;
 *     if (attach_unpack(packet, length, &m, &err) < 0) ...
 *     ... m.clear->first ...
 *     attach_message_finish(&m);
 *
 * A message that attach_unpack returns needs no further check of lengths, text, counts and numbers by
 * themselves: names are words, sizes are multiples of a page, slots neither too many nor too large, enums in range.
 * What depends on a slot (does the range lie in it?) is for whoever knows the slots. Threads: any.
 */
#ifndef VMMIG_PROTO_ATTACH_H
#define VMMIG_PROTO_ATTACH_H

#include "base/bytes.h"
#include "base/error.h"
#include "proto/attach.pb-c.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define ATTACH_VERSION_MIN 1
#define ATTACH_VERSION_MAX 1
#define ATTACH_PACKET_MAX (128u << 10)
#define ATTACH_SLOTS_MAX 32
#define ATTACH_FDS_MAX (ATTACH_SLOTS_MAX + 1) /* that come with one message */
#define ATTACH_SLOT_NAME_MAX 63
#define ATTACH_SLOT_BYTES_MAX (1ULL << 46)
#define ATTACH_WORD_MAX 255
#define ATTACH_TEXT_MAX 2048 /* of messages; a longer one is cut by its sender */
#define ATTACH_ARGC_MAX 256
#define ATTACH_ARGV_BYTES (64u << 10)
#define ATTACH_VCPUS_MAX 256
#define ATTACH_THROTTLE_MAX 99
#define ATTACH_RUNS_MAX 256
#define ATTACH_STATE_BYTES_MAX (256ULL << 20)
#define ATTACH_SOCKET_WORD "@socket@"
#define ATTACH_PAGE 4096u

/* X(type, member, message) */
#define ATTACH_MESSAGES(X)                                                                         \
    X(HELLO, hello, Hello)                                                                         \
    X(WELCOME, welcome, Welcome)                                                                   \
    X(ERROR, error, Error)                                                                         \
    X(OK, ok, Ok)                                                                                  \
    X(STATUS, empty, Empty)                                                                        \
    X(GET_MEMORY, empty, Empty)                                                                    \
    X(TRACK, empty, Empty)                                                                         \
    X(HARVEST, empty, Empty)                                                                       \
    X(CLEAR, clear, Clear)                                                                         \
    X(UNTRACK, empty, Empty)                                                                       \
    X(THROTTLE, throttle, Throttle)                                                                \
    X(PAUSE, empty, Empty)                                                                         \
    X(SAVE, empty, Empty)                                                                          \
    X(LOAD, load, Load)                                                                            \
    X(MAP_FILE, map_file, MapFile)                                                                 \
    X(RESUME, empty, Empty)                                                                        \
    X(RELEASE, empty, Empty)                                                                       \
    X(QUIT, empty, Empty)                                                                          \
    X(POPULATE, populate, Populate)                                                                \
    X(STATE, state, State)                                                                         \
    X(MEMORY, memory, Memory)                                                                      \
    X(HARVESTED, harvested, Harvested)                                                             \
    X(SAVED, saved, Saved)

/* What an agent may ask. X(type) */
#define ATTACH_REQUESTS(X)                                                                         \
    X(HELLO)                                                                                       \
    X(STATUS)                                                                                      \
    X(GET_MEMORY)                                                                                  \
    X(TRACK)                                                                                       \
    X(HARVEST)                                                                                     \
    X(CLEAR)                                                                                       \
    X(UNTRACK)                                                                                     \
    X(THROTTLE)                                                                                    \
    X(PAUSE)                                                                                       \
    X(SAVE)                                                                                        \
    X(LOAD)                                                                                        \
    X(MAP_FILE)                                                                                    \
    X(RESUME)                                                                                      \
    X(RELEASE)                                                                                     \
    X(QUIT)                                                                                        \
    X(POPULATE)

struct attach_message {
    Vmmig__Attach__Type type;
    union {
        ProtobufCMessage *any;
        Vmmig__Attach__Hello *hello;
        Vmmig__Attach__Welcome *welcome;
        Vmmig__Attach__Error *error;
        Vmmig__Attach__Clear *clear;
        Vmmig__Attach__Throttle *throttle;
        Vmmig__Attach__Populate *populate;
        Vmmig__Attach__Load *load;
        Vmmig__Attach__MapFile *map_file;
        Vmmig__Attach__State *state;
        Vmmig__Attach__Memory *memory;
        Vmmig__Attach__Harvested *harvested;
        Vmmig__Attach__Saved *saved;
    };
};

/*
 * Append one frame. `message` NULL: the type's message is empty. USAGE if it is none that may be sent.
 */
int attach_pack(unsigned type, const ProtobufCMessage *message, struct buffer *out,
                struct vm_error **err);
/*
 * A whole packet. PROTOCOL, with the first field that is wrong, also for anything behind the frame;
 * VERSION for a type that this version does not know.
 */
int attach_unpack(const void *packet, size_t len, struct attach_message *ret_message,
                  struct vm_error **err);
void attach_message_finish(struct attach_message *m);
static inline void attach_message_cleanup(struct attach_message *m)
{
    attach_message_finish(m);
}
#define cleanup_attach_message __attribute__((cleanup(attach_message_cleanup)))

/* "CLEAR", or "?" */
const char *attach_type_name(unsigned type);
/* The highest version that both speak, 0 if there is none. */
unsigned attach_version_choose(const Vmmig__Attach__Hello *hello);
/* 1 to ATTACH_SLOT_NAME_MAX of A-Z a-z 0-9 . _ - */
bool attach_slot_name_is_valid(const char *name);

#endif

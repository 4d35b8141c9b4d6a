/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The packets between an agent and a VMM that links libvmmig-attach. A packet that passes is what the header
 * promises, and may be sent in turn.
 */
#include "base/bytes.h"
#include "proto/attach.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void require(bool condition)
{
    if (!condition)
        abort();
}

static void check_promises(const struct attach_message *m)
{
    switch (m->type) {
    case VMMIG__ATTACH__TYPE__MEMORY:
        require(m->memory->n_slots <= ATTACH_SLOTS_MAX);
        for (size_t i = 0; i < m->memory->n_slots; i++) {
            require(attach_slot_name_is_valid(m->memory->slots[i]->name));
            require(m->memory->slots[i]->size % ATTACH_PAGE == 0);
            require(m->memory->slots[i]->size <= ATTACH_SLOT_BYTES_MAX);
        }
        break;
    case VMMIG__ATTACH__TYPE__THROTTLE:
        require(m->throttle->percent <= ATTACH_THROTTLE_MAX);
        break;
    case VMMIG__ATTACH__TYPE__SAVED:
        require(m->saved->size <= ATTACH_STATE_BYTES_MAX);
        break;
    case VMMIG__ATTACH__TYPE__WELCOME:
        require(m->welcome->n_vcpus <= ATTACH_VCPUS_MAX);
        require(m->welcome->n_incoming_argv <= ATTACH_ARGC_MAX);
        break;
    case VMMIG__ATTACH__TYPE__HELLO:
        require(attach_version_choose(m->hello) <= ATTACH_VERSION_MAX);
        break;
    default:
        break;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    cleanup_attach_message struct attach_message m = {0};
    cleanup_buffer struct buffer out = {0};
    if (attach_unpack(data, size, &m, NULL) < 0)
        return 0;
    check_promises(&m);
    /* It passes the check of its sender, too; unknown fields may have made it too long. */
    if (size < ATTACH_PACKET_MAX / 2)
        require(attach_pack(m.type, m.any, &out, NULL) == 0);
    return 0;
}

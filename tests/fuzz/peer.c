/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The checks of the messages between two agents. The first byte is the frame's type, the rest its
 * payload. A message that passes is what the header promises, and the agents' readers of definitions
 * and disk answers take what passed without harm.
 */
#include "base/bytes.h"
#include "proto/peer.h"
#include "vmm/qemu_definition.h"
#include "vmm/qemu_wire.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void require(bool condition)
{
    if (!condition)
        abort();
}

static void check_definition(const Vmmig__Peer__Definition *d)
{
    cleanup_qemu_definition struct qemu_definition definition = {0};
    require(d->n_argv && d->n_argv <= PEER_ARGC_MAX && d->n_version == 3 && d->boot.len == 16);
    require(d->n_ram && d->n_ram <= PEER_REGIONS_MAX && d->n_disks <= PEER_DISKS_MAX);
    for (size_t i = 0; i < d->n_ram; i++) {
        require(*d->ram[i]->block && d->ram[i]->size && d->ram[i]->size % 4096 == 0);
        require(d->ram[i]->size <= PEER_REGION_BYTES_MAX);
    }
    if (qemu_wire_unpack(d, &definition, NULL) == 0)
        qemu_definition_validate(&definition, NULL);
}

static void check_handover(const Vmmig__Peer__Handover *h)
{
    require(h->attempt.len == 16 && h->message <= 255 && strlen(h->vm) <= PEER_NAME_MAX);
    if (h->prepared)
        require(h->prepared->n_mapped <= PEER_REGIONS_MAX);
    if (!h->prepare)
        return;
    require(h->prepare->token.len == 16);
    require(h->prepare->channels && h->prepare->channels <= PEER_CHANNELS_MAX);
    for (size_t i = 0; i < h->prepare->n_offers; i++)
        require(h->prepare->offers[i]->disk < h->prepare->definition->n_disks);
    check_definition(h->prepare->definition);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct peer_message m = {0};
    if (size < 1 || peer_unpack(data[0], data + 1, size - 1, &m, NULL) < 0)
        return 0;
    if (m.type == VMMIG__PEER__TYPE__HANDOVER)
        check_handover(m.handover);
    else if (m.type == VMMIG__PEER__TYPE__HELLO)
        require(peer_version_choose(m.hello) <= PEER_VERSION_MAX);
    peer_message_finish(&m);
    return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * qemu_wire: a qemu_definition, and what is asked and answered about its disks, as messages of
 * proto/peer.proto and back. Unpacked definitions are checked with qemu_definition_validate.
 */
#ifndef VMMIG_VMM_QEMU_WIRE_H
#define VMMIG_VMM_QEMU_WIRE_H

#include "base/error.h"
#include "proto/peer.h"
#include "vmm/disk_identity.h"
#include "vmm/qemu_definition.h"

/*
 * A message that borrows every string from the definition, which must outlive it. Free it with
 * qemu_wire_free, not with protobuf's functions. NULL without memory.
 */
Vmmig__Peer__Definition *qemu_wire_pack(const struct qemu_definition *d, struct vm_error **err);
void qemu_wire_free(Vmmig__Peer__Definition *message);
/* A definition of its own memory: qemu_definition_finish it. */
int qemu_wire_unpack(const Vmmig__Peer__Definition *message, struct qemu_definition *ret_definition,
                     struct vm_error **err);

void qemu_wire_unpack_offer(const Vmmig__Peer__DiskOffer *message, struct disk_offer *ret_offer);
/* PROTOCOL if the text is longer than an answer may be. */
int qemu_wire_unpack_answer(const Vmmig__Peer__DiskAnswer *message, struct disk_answer *ret_answer,
                            struct vm_error **err);

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * qemu_disk_move: another place for a disk of a definition: its command line and its list of disks
 * name `to` afterwards, an absolute path or a RADOS block image (vmm/rbd_name.h), from whichever of
 * both. REFUSED, by name, for a disk that is neither, or that the command line does not name in a
 * way that can be changed. Pure.
 */
#ifndef VMMIG_VMM_QEMU_DISK_MOVE_H
#define VMMIG_VMM_QEMU_DISK_MOVE_H

#include "base/error.h"
#include "vmm/qemu_definition.h"

int qemu_disk_move(struct qemu_definition *d, unsigned disk, const char *to,
                   struct vm_error **err);

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * qemu_snapshot_sweep: names of what a snapshot puts into QEMU, shared by the files that put it in and take it
 * out. Nobody else includes it.
 */
#ifndef VMMIG_VMM_QEMU_SNAPSHOT_SWEEP_H
#define VMMIG_VMM_QEMU_SNAPSHOT_SWEEP_H

#include "vmm/qemu.h"

/* Of block nodes; a number follows. */
#define SNAPSHOT_ACCESS "vmmig-access"
#define SNAPSHOT_FILTER "vmmig-filter"
#define SNAPSHOT_SCRATCH "vmmig-scratch"
#define SNAPSHOT_TARGET "vmmig-target"
/* Of exports, and of the socket that they are for. */
#define SNAPSHOT_EXPORT "vmmig-export"
/* Of jobs. */
#define SNAPSHOT_JOB "vmmig-push"
/* An object that is there from before a guest is paused for a snapshot until it was seen to run again. */
#define SNAPSHOT_MARKER "vmmig-snapshot"

int snapshot_drop_marker(struct qemu *q, struct vm_error **err);

/* As qemu_snapshot_relieve. */
bool snapshot_relieve(struct qemu *q);

/* Put the device above that node. */
int snapshot_set_drive(struct qemu *q, const char *device, const char *node,
                       struct vm_error **err);

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * take_attach: snapshot_take (snapshot/snapshot.h) for the guests of VMMs that link
 * libvmmig-attach.
 *
 * The guest's memory is mapped here, and its VMM logs which pages are written. All of it is copied
 * into files without a name in scratch_dir while the guest runs, and what was written meanwhile
 * again, until little is left; then the guest is paused for that rest and its devices' state, and
 * goes on. Only after that are the files read, and stored. scratch_dir must have room for the
 * guest's memory. What did not change since the parent is read, and stored once.
 *
 * Refused by name: disk_only, and a guest agent (the agent knows of no disks of such a VMM); a VMM
 * that does not say how one is started that waits for its guest, since that snapshot could not be
 * restored. A guest that its VMM holds paused by itself is the agent's meanwhile, and its VMM's
 * again afterwards; if the agent dies in between it stays the agent's.
 *
 * Failure: the guest runs on, nothing is tracked, nothing is visible. If the guest cannot be set
 * going again, for half a minute, the error says so. The VMM's death ends it as VMM_DIED. If the
 * agent dies, tracking ends with its connection, and a guest that it had paused is set going by the
 * snapshot's guard, or the next agent.
 */
#ifndef VMMIG_SNAPSHOT_TAKE_ATTACH_H
#define VMMIG_SNAPSHOT_TAKE_ATTACH_H

#include "snapshot/snapshot.h"
#include "vmm/attach.h"

int take_attach(struct attach *a, const struct snapshot_params *params, struct snapshot_report *ret_report,
                struct vm_error **err);

#endif

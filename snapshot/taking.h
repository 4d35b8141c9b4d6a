/* SPDX-License-Identifier: Apache-2.0 */
/*
 * taking: what a snapshot that is being taken has, whichever VMM the guest is in: the image that is
 * written, the guest's memory on its way there, and what its caller is told.
 *
 *     taking_begin(s, parent, &err)              the image, which is nobody's until it is committed
 *     s->memory = memory_image_create(...)       unless disks alone are taken
 *     taking_start_memory(s, background, &err)   the VMM gives memory away
 *     taking_stop_memory(s, &err)
 *     taking_date(s)                             it is of now: the guest stands, or just stood
 *     taking_commit(s, &err)
 *     taking_finish(s)                           always; without a commit nothing of the image stays
 *
 * The caller fills p and report, and looks at the VM (vm, was_running) before it begins. Threads: one.
 */
#ifndef VMMIG_SNAPSHOT_TAKING_H
#define VMMIG_SNAPSHOT_TAKING_H

#include "snapshot/gather.h"
#include "snapshot/memory_image.h"
#include "snapshot/snapshot.h"

struct taking {
    const struct snapshot_params *p;
    struct qemu_json vm;
    struct snapshot_progress progress;
    struct snapshot_report *report;
    struct image_session *session;
    struct gather *gather;
    struct memory_image *memory; /* NULL: disks alone */
    bool was_running;
    bool sourcing; /* the VMM gives memory away */
};

void taking_tell(struct taking *s, enum snapshot_phase phase);
/* parent: its name is "" if there is none. */
int taking_begin(struct taking *s, const struct image *parent, struct vm_error **err);
/* background: as guest_source_params has it. */
int taking_start_memory(struct taking *s, bool background, struct vm_error **err);
/* 0 also if it does not. */
int taking_stop_memory(struct taking *s, struct vm_error **err);
void taking_date(struct taking *s);
/* Everything else has arrived: the state, the definition, and the commit. CANCELLED until then. */
int taking_commit(struct taking *s, struct vm_error **err);
void taking_finish(struct taking *s);

#endif

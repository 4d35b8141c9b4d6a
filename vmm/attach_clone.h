/* SPDX-License-Identifier: Apache-2.0 */
/*
 * attach_clone: a VMM that links libvmmig-attach and goes on from a saved state, its guest's memory
 * a private mapping of files that others map too.
 *
 *     attach_clone_spawn(&params, &timing, &err)
 *
 * It is started as one that waits for the guest of the definition, under a name of its own
 * (VMMIG_NAME_WORD), is given the files, loads the state, and runs if the guest was running.
 * REFUSED by name: a VMM that does not take files, or is another machine. Threads: any.
 */
#ifndef VMMIG_VMM_ATTACH_CLONE_H
#define VMMIG_VMM_ATTACH_CLONE_H

#include "vmm/attach.h"
#include "vmm/clone_timing.h"

struct attach_clone_params {
    const struct qemu_definition *definition;
    struct attach_launch launch; /* argv and cwd are the definition's */
    const int *ram_fds;          /* as many as definition.ram; they and state_fd stay the caller's */
    int state_fd;
};

/* When it fails nothing is left. */
struct attach *attach_clone_spawn(const struct attach_clone_params *params,
                                  struct clone_timing *ret_timing, struct vm_error **err);

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * supervisor: does somebody on this host look after a VM's process, who would start it again when
 * it has moved away? Its old command line on the shared disk, beside the guest that runs elsewhere:
 * that must never be.
 *
 *     supervisor_check(&process, note, &err)      before a send
 *
 * A unit of systemd, found by the process's cgroup, is asked for its Restart=: REFUSED if that, or
 * RestartForceExitStatus=, would start it again after it was killed, and when systemd does not
 * answer. A domain of libvirt's, found likewise, may go: libvirt starts nothing by itself. But it
 * would when it is told to, as by a cluster manager that misses the domain: the note says so. What
 * the agent itself belongs to is no such supervisor: the VMs that it started are in its cgroup.
 *
 * Others (a loop in a shell, a container's restart policy) cannot be seen from here. Threads: any;
 * takes as long as `systemctl show`.
 */
#ifndef VMMIG_AGENT_SUPERVISOR_H
#define VMMIG_AGENT_SUPERVISOR_H

#include "base/process.h"

#include <stdbool.h>

enum { SUPERVISOR_UNIT_MAX = 256, SUPERVISOR_NOTE_MAX = 176 };

enum supervisor_kind { SUPERVISOR_NONE, SUPERVISOR_SYSTEMD, SUPERVISOR_LIBVIRT };

struct supervisor {
    enum supervisor_kind kind;
    char unit[SUPERVISOR_UNIT_MAX]; /* "web1.service"; libvirt: the name of the domain's scope or
                                       folder */
    bool of_user;                   /* of the service manager of `uid` */
    unsigned uid;
};

/* note: "" or what the user should know. VMM_DIED if the process is gone. */
int supervisor_check(const struct process_identity *process, char out_note[SUPERVISOR_NOTE_MAX],
                     struct vm_error **err);

/* From what /proc/PID/cgroup says. Pure. */
struct supervisor supervisor_of_cgroup(const char *text);
/* From what `systemctl show` says of a unit: would it start the unit again after it was killed?
 * Pure. */
bool supervisor_restarts(const char *properties);

#endif

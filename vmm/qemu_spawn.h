/* SPDX-License-Identifier: Apache-2.0 */
/*
 * qemu_spawn: start a QEMU that outlives the agent (vmm/spawn.h says how it is set up). Its death is seen through
 * its identity and its QMP connection, as for a QEMU that was adopted.
 *
 * QMP: a listening socket is bound at qmp_path here and given to QEMU as one more monitor, so that it is
 * there before QEMU runs, and a restarted agent finds the VM by that path. Monitors of the user's argv stay
 * theirs. A file that a dead QEMU left at that path is replaced; a living listener is CONFLICT.
 *
 * A QEMU that ends before it answers becomes VMM_DIED with the last line that it wrote to its log. A failed
 * spawn leaves no process and no socket. Threads: any.
 */
#ifndef VMMIG_VMM_QEMU_SPAWN_H
#define VMMIG_VMM_QEMU_SPAWN_H

#include "base/error.h"
#include "base/process.h"
#include "vmm/spawn.h"

#include <stdbool.h>
#include <stddef.h>

#define QEMU_SPAWN_FDS_MAX 320
/* What vmmig adds to a command line for its own monitor is named by this id. */
#define QEMU_SPAWN_MONITOR_ID "vmmig-qmp"

struct qemu_launch {
    const char *binary;   /* path to execute */
    char *const *argv;    /* argv[0] included; -daemonize is left out, since the launch does that */
    const char *cwd;      /* NULL: "/" */
    bool foreign_cwd;     /* as in struct spawn_params */
    const char *qmp_path; /* at most 107 bytes */
    const char *log_path; /* standard output and error, appended; 0600 */
    const int *fds;       /* to inherit; they stay the caller's */
    unsigned n_fds;
    const char *user;     /* name of whom it runs as, with that user's groups; NULL or "": the agent's */
    /*
     * Folder of a cgroup to put it in (made if it is missing): its scope, so that the end of the agent's
     * service does not take it along, and where guest memory is charged. NULL: the agent's own.
     */
    const char *cgroup;
    int timeout_ms; /* until QMP answers; 0: 30 s */
    /*
     * The process is there, but waits before it becomes QEMU: what must outlive the agent is written
     * now. -1: it ends without having become one, and the spawn fails. If the agent dies in here, so
     * does the process. May be NULL.
     */
    int (*born)(const struct process_identity *process, void *arg, struct vm_error **err);
    void *born_arg;
};

/*
 * Start the process. *ret_fd is a connection to its QMP socket on which nothing was said yet (the greeting
 * comes once QEMU is ready, the end of file if it dies before).
 */
int qemu_spawn_process(const struct qemu_launch *launch, struct process_identity *ret_process,
                       int *ret_fd, struct vm_error **err);

#endif

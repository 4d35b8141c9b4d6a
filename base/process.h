/* SPDX-License-Identifier: Apache-2.0 */
/*
 * process: which process it is, for ever. A pid is reused; boot id, pid and start time together are
 * not. The hand-over and the journal name VMMs by this identity.
 */
#ifndef VMMIG_BASE_PROCESS_H
#define VMMIG_BASE_PROCESS_H

#include "base/error.h"
#include "base/uuid.h"

#include <stdbool.h>
#include <stdint.h>
#include <sys/stat.h>
#include <sys/types.h>

struct process_identity {
    struct uuid boot; /* /proc/sys/kernel/random/boot_id */
    int32_t pid;      /* in the agent's pid namespace */
    uint64_t start;   /* clock ticks since boot, field 22 of /proc/PID/stat */
};

/*
 * Identity of a running process. NOT_FOUND if there is none, or if it is a zombie; another kind
 * when that cannot be found out.
 */
int process_identify(pid_t pid, struct process_identity *ret_id, struct vm_error **err);
/*
 * Does that very process still run? A zombie does not. A process of another boot does not. Also
 * true when it cannot be found out (no descriptor is left): a process counts as dead only if it
 * certainly is.
 */
bool process_alive(const struct process_identity *id);
/*
 * SIGKILL to that very process (through a pidfd, so never to a reused pid), then wait until it is
 * gone, at most timeout_ms. 0 when it is certain that it does not run any more, also if it did not
 * before. TIMEOUT if it is still there (uninterruptible sleep).
 */
int process_kill(const struct process_identity *id, int timeout_ms, struct vm_error **err);
/*
 * Something that may have been the beginning of its end was seen, as a connection that it closed:
 * true if that very process has ended. Waits begins_ms for an end to begin, and timeout_ms in all
 * for one that has begun, since the kernel takes its time to take a large memory apart.
 */
bool process_has_ended(const struct process_identity *id, int begins_ms, int timeout_ms);
/* As whom it does what it does (its effective user). NOT_FOUND if there is none. */
int process_user(pid_t pid, uid_t *ret_user, struct vm_error **err);
/* Has it that very file open (device and inode; of a block device its number)? */
bool process_has_open(pid_t pid, const struct stat *file);
bool process_identity_equal(const struct process_identity *a, const struct process_identity *b);
/*
 * The argument vector of a process from /proc/PID/cmdline: *ret_argv is one allocation (free it)
 * and ends with NULL. At most 1 MiB.
 */
int process_argv(pid_t pid, char ***ret_argv, struct vm_error **err);

#endif

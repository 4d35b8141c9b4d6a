/* SPDX-License-Identifier: Apache-2.0 */
/*
 * spawn: start a VMM that outlives the agent.
 *
 * The new process is nobody's child but init's, in a session of its own, with nothing inherited but
 * the descriptors of `fds` (under the numbers that they have here, so that an argv may name them as
 * /proc/self/fd/N), /dev/null for standard input, and the log for output. Signals are at their
 * defaults, the environment holds PATH, HOME and LANG only.
 *
 *     fd = spawn_bind(path, SOCK_STREAM, &err)     its control socket: there before it runs
 *     spawn_process(&params, &process, &err)
 *
 * A failed spawn leaves no process. Threads: any; nothing but async-signal-safe calls happens between
 * fork and exec.
 */
#ifndef VMMIG_VMM_SPAWN_H
#define VMMIG_VMM_SPAWN_H

#include "base/error.h"
#include "base/process.h"

#include <stdbool.h>
#include <stddef.h>

#define SPAWN_MESSAGE_MAX 512

struct spawn_params {
    const char *binary;   /* path to execute */
    char *const *argv;    /* argv[0] included */
    const char *cwd;      /* NULL: "/" */
    /*
     * It is another host's word: entered by `user`, and not by the agent, who may enter more; "/" where it is not to be
     * had, since only relative names need it, which then fail by their own.
     */
    bool foreign_cwd;
    const char *log_path; /* standard output and error, appended; 0600 */
    const int *fds;       /* to inherit; they stay the caller's */
    unsigned n_fds;
    const char *user;     /* name of whom it runs as, with that user's groups; NULL or "": the agent's */
    /*
     * Folder of a cgroup to put it in (made if it is missing): its scope, so that the end of the agent's
     * service does not take it along, and where guest memory is charged. NULL: the agent's own.
     */
    const char *cgroup;
    /*
     * The process is there, but waits before it becomes the VMM: what must outlive the agent is written
     * now. -1: it ends without having become one, and the spawn fails. If the agent dies in here, so
     * does the process. May be NULL.
     */
    int (*born)(const struct process_identity *process, void *arg, struct vm_error **err);
    void *born_arg;
};

/*
 * Start it. One that ended at once is no error here: its identity is one that does not run any more, and
 * the log may say why.
 */
int spawn_process(const struct spawn_params *params, struct process_identity *ret_process,
                  struct vm_error **err);

/*
 * A Unix socket of that type, bound to the path with mode 0600, at which nobody listens yet. A file that a dead
 * VMM left there is replaced; a living listener is CONFLICT. The caller removes the path if need be.
 */
int spawn_bind(const char *path, int type, struct vm_error **err);

/*
 * The last line of the log from offset on that says why the program ended: of those that begin with
 * a program's name if there are any (hints follow them without it), and before "load of migration
 * failed". Control characters replaced; "" if there is none.
 */
void spawn_log_last_line(const char *log_path, size_t offset, char out[SPAWN_MESSAGE_MAX]);
/* Bytes in the log now, 0 if there is none. */
size_t spawn_log_size(const char *log_path);

#endif

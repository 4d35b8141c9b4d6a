/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cli_follow: stay with a job until it ends.
 *
 * On a terminal one line on standard error is rewritten; elsewhere a line is printed when the phase
 * changes and every few seconds. With --json nothing is said until the end. At the end the summary
 * or the JSON object goes to standard output.
 *
 * Ctrl-C: the job belongs to the agent, so the first one only leaves it. It says so and how to
 * cancel, and stays FOLLOW_GRACE_NS more, in which a second one cancels the job and waits for what
 * comes of it; a third one leaves at once.
 */
#ifndef VMMIG_TOOLS_CLI_FOLLOW_H
#define VMMIG_TOOLS_CLI_FOLLOW_H

#include "base/clock.h"
#include "tools/cli.h"
#include "client/client.h"

#define FOLLOW_GRACE_NS (3 * NSEC_PER_SEC)

/*
 * Block SIGINT, so that cli_follow decides about it; before the job begins. Returns the descriptor
 * for cli_follow (close it), or -1.
 */
int cli_follow_prepare(struct vm_error **err);
/*
 * Watch that job of the VM; `job` NULL: the one that runs, else the last. 0: done; -1: the job's
 * error, nothing printed but progress; above 0: exit status, everything having been said.
 */
int cli_follow(const struct cli *cli, struct client *c, const char *vm,
               const Vmmig__Control__Job *job, int signal_fd, struct vm_error **err);

/* For jobs that are not a VM's. */
struct cli_follow_hooks {
    bool ctrl_c_cancels; /* the first one already */
    /* Instead of the summary, for a job that is done: its exit status, or -1. */
    int (*conclude)(const Vmmig__Control__Job *job, void *arg, struct vm_error **err);
    void *arg;
};
int cli_follow_with(const struct cli *cli, struct client *c, const Vmmig__Control__Job *job,
                    const struct cli_follow_hooks *hooks, int signal_fd, struct vm_error **err);

/* The progress line alone, for work that is done in this process. Zero-initialise it. */
struct cli_progress {
    bool line_open;      /* the terminal's line holds progress */
    int64_t printed_ns;
    char phase[CONTROL_WORD_MAX + 1]; /* of the last plain line */
};
void cli_progress_show(struct cli_progress *p, const Vmmig__Control__Job *job);
void cli_progress_close(struct cli_progress *p);

#endif

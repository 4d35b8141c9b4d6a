/* SPDX-License-Identifier: Apache-2.0 */
/*
 * answers: jobs and VMs as messages of the control protocol. An answer holds what its message
 * points to: keep it where it is until the message was sent, then finish it. Threads: any.
 */
#ifndef VMMIG_AGENT_ANSWERS_H
#define VMMIG_AGENT_ANSWERS_H

#include "agent/agent.h"
#include "agent/driver.h"
#include "agent/transfer.h"
#include "base/clock.h"
#include "proto/control.h"

struct job_answer {
    Vmmig__Control__Job message;
    struct job_status status;
    Vmmig__Control__Error error;
    Vmmig__Control__Pages pages[JOB_ENC_COUNT], *page_list[JOB_ENC_COUNT];
    char error_text[CONTROL_TEXT_MAX + 1];
    Vmmig__Control__SnapshotResult snapshot;
    struct control_message result; /* any: NULL without one */
};

/* Takes the status over. */
void job_answer_init(struct job_answer *a, const struct job_status *status);
void job_answer_finish(struct job_answer *a);

struct vm_answer {
    Vmmig__Control__Vm message;
    struct vm *vm; /* NULL: it is arriving */
    char name[VM_NAME_MAX + 1];
    char detail[VM_DETAIL_MAX];
    struct driver_info info;
    struct job_answer job;
    Vmmig__Control__Handover handover;
    struct transfer_state transfer;
};

/* How long a VMM may take to say what it does; then it counts as unreachable. */
#define ANSWER_VMM_TIMEOUT_NS (2 * NSEC_PER_SEC)

/*
 * Takes the reference over. Asks the VMM for its state, until the deadline. `whole`: with command
 * line, socket and the last job, as the answer to STATUS; else with a running job only.
 */
void vm_answer_init(struct vm_answer *a, const struct agent *agent, struct vm *vm, bool whole,
                    int64_t deadline_ns);
/*
 * A VM of that name that is in a hand-over and not in the registry: it is being received, or is
 * being sent and the registry has lost it; false if there is none.
 */
bool vm_answer_init_arriving(struct vm_answer *a, const struct agent *agent, const char *name);
void vm_answer_finish(struct vm_answer *a);

static inline void job_answer_cleanup(struct job_answer *a)
{
    job_answer_finish(a);
}
static inline void vm_answer_cleanup(struct vm_answer *a)
{
    vm_answer_finish(a);
}
#define cleanup_job_answer __attribute__((cleanup(job_answer_cleanup)))
#define cleanup_vm_answer __attribute__((cleanup(vm_answer_cleanup)))

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * attempt_jobs: how the attempts of both ends show as jobs (agent/jobs.h). A job waits for its
 * attempt to settle, passes on the user's cancel, and shows what the copy measures.
 */
#ifndef VMMIG_AGENT_ATTEMPT_JOBS_H
#define VMMIG_AGENT_ATTEMPT_JOBS_H

#include "agent/attempt.h"
#include "agent/transfer.h"

/*
 * The source's attempt, up to a greeting with the destination: preflight, disks, dialling. Nothing
 * has changed when it fails.
 */
struct attempt *attempt_source_create(struct transfer *t, const struct transfer_params *params,
                                      int cancel_fd, struct vm_error **err);
/* Start it: the hand-over begins. */
int attempt_source_begin(struct attempt *a, struct vm_error **err);

/* A job that shows the attempt until it is settled; the job holds a reference. */
int attempt_job_start(struct attempt *a, enum job_kind kind, const char *peer,
                      struct vm_error **err);
/* The same, within the thread of a job that runs already. */
int attempt_job_run(struct job *job, struct attempt *a, struct vm_error **err);

#endif

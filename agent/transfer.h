/* SPDX-License-Identifier: Apache-2.0 */
/*
 * transfer: moving VMs between this agent and others, in both directions.
 *
 *     t = transfer_create(agent, &err)     opens the journal, reads certificates, takes up what a
 *                                          former agent left unfinished, listens for peers
 *     transfer_send(t, &params, &job, &err)
 *     transfer_resolve(t, "web1", ...)
 *     transfer_stop(t); transfer_destroy(t)
 *
 * A transfer is a job (agent/jobs.h): JOB_SEND here, JOB_RECEIVE at the other end; job_cancel works
 * on both. What becomes of the VM is decided by migrate/handover.h and survives a crash of the
 * agent; what a job knows does not.
 *
 * Threads: any. When the journal cannot tell whether its last write happened, the process exits
 * (status VM_ERROR_IN_DOUBT), so that its restart reads the truth.
 */
#ifndef VMMIG_AGENT_TRANSFER_H
#define VMMIG_AGENT_TRANSFER_H

#include "agent/agent.h"
#include "base/cleanup.h"
#include "base/error.h"
#include "migrate/conn.h"
#include "migrate/policy.h"

#include <stdbool.h>
#include <stdint.h>

#define TRANSFER_DOWNTIME_DEFAULT_MS 300
#define TRANSFER_CONNECTIONS_DEFAULT 2

struct transfer;

struct transfer_params {
    const char *vm;
    const char *to;            /* HOST[:PORT] */
    unsigned downtime_limit_ms; /* 0: TRANSFER_DOWNTIME_DEFAULT_MS */
    uint64_t max_bandwidth;    /* bytes a second; 0: what the configuration says */
    unsigned connections;      /* 0: TRANSFER_CONNECTIONS_DEFAULT */
    enum policy_compress compress;
    const char *dest_socket;   /* of a VMM that waits there; "": the agent there starts one */
    enum vm_driver dest_driver; /* of what kind that is */
    bool assume_shared;
    bool check; /* all that is checked before a page moves, and no page: a JOB_CHECK */
};

/*
 * Who an unfinished hand-over leaves the VM to, as far as this agent knows: for status and doctor.
 */
struct transfer_state {
    bool known;         /* there is an attempt that is not finished */
    bool in_doubt;      /* `resolve` has an effect */
    bool can_here, can_gone; /* `resolve` with that verdict has */
    bool settled;
    bool source;        /* this end */
    struct process_identity vmm;
    int64_t started_ns; /* wall clock */
    struct uuid attempt;
    char state[32];     /* name of the machine's state */
    char text[128];     /* what it means */
    char peer[ENDPOINT_TEXT_MAX + 1];
};

struct transfer *transfer_create(struct agent *agent, struct vm_error **err);
/*
 * No new transfers; threads end. What is unfinished stays in the journal for the next agent. False
 * if some threads did not end in time: the process can only exit then.
 */
bool transfer_stop(struct transfer *t);
void transfer_destroy(struct transfer *t);
DEFINE_CLEANUP(transfer, struct transfer *, transfer_destroy)

/* Begin to send a VM; the job goes on by itself. */
int transfer_send(struct transfer *t, const struct transfer_params *params, struct uuid *ret_job,
                  struct vm_error **err);
/*
 * An operator decides about a hand-over in doubt. `here`: the VM is to run here, the peer's host
 * `fenced` is off for certain and must be the attempt's peer (USAGE otherwise). Else: give up the
 * copy here. NOT_FOUND if nothing of that VM is in doubt, REFUSED if the verdict means nothing now.
 * Returns when the hand-over is settled, or when the copy here is gone and it still waits for the
 * peer; TIMEOUT, which says what was reached, if neither happens.
 *
 * Also about a VM that stands here while a record of the journal is damaged, which may have been of
 * its hand-over.
 */
int transfer_resolve(struct transfer *t, const char *vm, bool here, const char *fenced,
                     struct vm_error **err);
/* conn_context_complain() about what this host shows to its peers. */
void transfer_complain(struct transfer *t, char out[CONN_COMPLAINT_MAX], int64_t *ret_end);
/* The newest attempt of a VM that is not finished. */
void transfer_get_state(struct transfer *t, const char *vm, struct transfer_state *ret_state);
/*
 * May the VM be detached, or sent? CONFLICT while a hand-over of it is not settled.
 */
int transfer_check_free(struct transfer *t, const char *vm, struct vm_error **err);

#endif

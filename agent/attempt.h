/* SPDX-License-Identifier: Apache-2.0 */
/*
 * attempt: one attempt to move one VM, at either end: the hand-over machine (migrate/handover.h)
 * with a thread that executes its actions, and the table of all attempts of the agent. Internal to
 * the agent's transfer; the rest of the agent uses agent/transfer.h.
 *
 *     attempt_source.c        the source: preflight, the control connection, the copy
 *     attempt_destination.c   the destination: start a VMM, receive, load
 *     attempt.c               what both share: events, messages, the machine's actions, the table
 *     attempt_journal.c       its record
 *     attempt_vm.c            its VM: resume, kill
 *
 * Life. attempt_create puts it into the table; attempt_start begins its thread, which runs until
 * the hand-over is finished on both sides (long after it is settled, if the peer is away).
 * Everybody who holds a pointer holds a reference.
 *
 * Locks: `lock` of an attempt guards what is marked; the table's lock is taken before it, never
 * after.
 */
#ifndef VMMIG_AGENT_ATTEMPT_H
#define VMMIG_AGENT_ATTEMPT_H

#include "agent/agent.h"
#include "agent/places.h"
#include "agent/supervisor.h"
#include "base/fault.h"
#include "migrate/conn.h"
#include "migrate/handover.h"
#include "migrate/journal.h"
#include "migrate/peer_session.h"
#include "migrate/receiver.h"
#include "migrate/sender.h"
#include "vmm/disk_identity.h"
#include "vmm/qemu_definition.h"

#include <stdatomic.h>

#define ATTEMPT_EVENTS_MAX 64
#define ATTEMPT_MESSAGES_MAX 32 /* of them are messages of the peer */
/* That others have begun here and that are not finished, on both sides: each has a thread and a record. */
#define ATTEMPTS_OF_HOST_MAX 64
#define ATTEMPTS_OF_HOSTS_MAX 256
#define ATTEMPT_TIMER_MS 1000
/* Nanoseconds of a limit that no user sets; tests divide it. */
#define PATIENCE(ms) fault_patience_ns(ms)
#define ATTEMPT_KILL_TIMEOUT_MS 10000

struct attempt;
struct transfer;

/* What a role does about the actions that only it has. Called in the attempt's thread. */
struct attempt_role {
    void (*start_vm)(struct attempt *a);
    void (*start_transfer)(struct attempt *a);
    /* The copy ends, whatever its state; returns when its threads are gone. */
    void (*stop_transfer)(struct attempt *a);
    /* Put what the message needs beyond its name into it. Borrows from the attempt. */
    void (*fill)(struct attempt *a, enum handover_message message, Vmmig__Peer__Handover *out);
    /* What must be durable before that record is; -1 counts as a record that cannot be written. */
    int (*before_record)(struct attempt *a, enum handover_record record, struct vm_error **err);
    /* Once, when the machine has settled; again every second while it returns -1. */
    int (*settled)(struct attempt *a, struct vm_error **err);
    /*
     * The connection of a->guest has ended though the VMM lives, or there was none: connect to the VMM of the
     * record, if it answers by now.
     */
    void (*reconnect)(struct attempt *a);
    /* This agent began the copy, and nothing that has been done in it can have stopped the guest. */
    bool (*never_paused)(struct attempt *a);
    /* Every second: is the peer, or the copy, later than can be borne? */
    void (*tick)(struct attempt *a);
    /* Free the role's part. */
    void (*finish)(struct attempt *a);
};

struct source_part {
    char peer[ENDPOINT_TEXT_MAX + 1]; /* whom to dial */
    struct vm *vm; /* reference; NULL after recovery, if the registry does not know it */
    /* How to reach such a VM all the same; NULL: not. */
    enum vm_driver driver;
    char *socket_path;
    struct qemu_definition definition;
    char note[SUPERVISOR_NOTE_MAX];    /* for the user, from the beginning */
    struct disk_view view; /* as the VMM sees its disks */
    struct disk_offer *offers;
    uint32_t *offer_disks; /* index in definition.disks of each */
    unsigned n_offers;
    struct sender_params params; /* of the copy, with a reference to its guest; regions when the peer answered */
    bool assume_shared;
    bool check_only; /* once both ends agree, the attempt is undone */
    bool agreed;     /* so they did; under lock */
    char *dest_socket;
    struct guest_region *regions;
    int copy_cancel; /* latch: the copy ends */
    pthread_t link_thread, copy_thread;
    bool link_started, copy_started;
    int64_t offline_since_ns; /* no control connection; 0: there is one; under lock */
    struct sender *sender; /* under lock */
    uint64_t moved_bytes;    /* as of the last look while the guest stood */
    int64_t moved_at_ns;     /* when they grew last; 0: it does not stand */
    struct guest *watched;   /* a reference to the handle over which the guest was seen to stand, all sent; or NULL */
    unsigned resumes;        /* of that, then */
    atomic_bool woken;       /* it was set going here after COMMIT */
    Vmmig__Peer__Handover *prepared; /* the peer's answer; under lock */
    Vmmig__Peer__Prepare prepare_message;
};

struct destination_part {
    Vmmig__Peer__Handover *prepare; /* the source's request */
    struct qemu_definition definition;
    uint64_t claim; /* bytes of memory that the guest will need, from when that is known; under the table's lock */
    bool *mapped;
    unsigned n_mapped;
    struct disk_answer *answers;
    unsigned n_answers;
    enum vm_driver driver;
    char *socket_path;
    char **argv; /* how the VMM was started; one allocation */
    struct process_identity process; /* of the VMM; the work thread's until READY or its end */
    struct receiver *receiver; /* under lock */
    bool stopped;              /* no more receiving, also if it has not begun; under lock */
    unsigned serving;          /* connections inside it; under lock */
    int64_t served_ns;         /* when the last of them went; under lock */
    struct vm *vm;             /* once it is in the registry */
    pthread_t work_thread;
    bool work_started;
    Vmmig__Peer__Prepared prepared_message;
    Vmmig__Peer__Run run; /* as COMMIT says; under lock */
    int64_t load_ns;
};

struct attempt {
    struct transfer *transfer;
    const struct attempt_role *role;
    atomic_uint refs;
    struct uuid id;
    char vm_name[VM_NAME_MAX + 1];
    char peer_name[JOURNAL_PEER_MAX + 1]; /* destination: of the source's certificate */
    struct handover machine; /* the attempt's thread; state is copied below for others */
    struct journal_record record;
    bool recorded;           /* the journal has it */
    bool recovered;          /* a former agent's */
    bool blob_changed;       /* since it was written there */
    atomic_bool was_running; /* by its user's wish: whoever has it last lets it run */
    struct guest *guest;     /* reference; NULL while the VMM is not reached */
    bool loaded_early;       /* source: LOADED came before this side knew that all is sent */
    bool cont_sent;          /* since this agent started: a vCPU may have run */
    bool resume_unsure;      /* the answer to a `cont` was lost once */
    bool is_unfit;           /* the last record was not written since the role had a reason against it */
    bool stands;             /* source: all is sent, and no vCPU can have run since */
    int64_t paused_at_ns, commit_at_ns; /* monotonic; 0: not yet */
    int64_t rtt_ns;                     /* of the link to the destination; 0: not known */
    int64_t resume_took_ns;             /* from COMMIT to running vCPUs, as the destination says */
    int64_t state_since_ns;
    int cancel;              /* latch: everything of this attempt ends */
    pthread_t thread;

    pthread_mutex_t lock;    /* guards what follows */
    pthread_cond_t changed;
    enum handover_event events[ATTEMPT_EVENTS_MAX];
    unsigned first_event, n_events;
    enum handover_state state;
    bool is_settled, settled_done, stop;
    enum handover_state settled_in; /* of which the role has taken stock, if settled_done */
    enum handover_notice notice;
    bool has_notice;
    bool cancelled;          /* the user wished so */
    struct vm_error *reason; /* the first cause of a failure, for the user */
    struct vm_error *peer_reason; /* the first that the peer named */
    int64_t pause_ns;        /* how long the guest stood; -1: it did not, or is not known */
    struct peer_session *session; /* to the peer, NULL while there is none */
    int64_t heard_ns;        /* when the peer last said something of this attempt, or came up */
    struct job *job;         /* that shows it, NULL while there is none */

    union {
        struct source_part source;
        struct destination_part destination;
    };
    struct attempt *next; /* in the table */
};

struct transfer {
    struct agent *agent;
    struct conn_context *context;
    struct journal *journal;
    struct acceptor *listener;
    int listen_fd;
    int stop; /* latch */
    pthread_mutex_t lock; /* guards what follows */
    pthread_cond_t changed;
    struct attempt *attempts;
    struct places places;
};

struct attempt *attempt_create(struct transfer *t, const struct attempt_role *role,
                               const struct uuid *id, const char *vm_name, struct vm_error **err);
/* Take part in the table and begin. The caller keeps its reference. */
int attempt_start(struct attempt *a, struct vm_error **err);
/*
 * The same for an attempt of which nobody has heard: CONFLICT if the table or the journal has it.
 */
int attempt_start_new(struct attempt *a, struct vm_error **err);
struct attempt *attempt_ref(struct attempt *a);
void attempt_unref(struct attempt *a);
DEFINE_CLEANUP(attempt, struct attempt *, attempt_unref)
/* A reference to the attempt of that id, NULL if there is none in the table. */
struct attempt *attempt_find(struct transfer *t, const struct uuid *id);
/* The unsettled attempt of a VM, or one that is in doubt; NULL. */
struct attempt *attempt_find_of_vm(struct transfer *t, const char *vm_name);

/* Is there an unsettled attempt besides, to bring a VM of that name here? */
bool attempt_has_rival(struct attempt *a);

/* Any thread. Messages may be dropped when too much is waiting, as a network would. */
void attempt_post(struct attempt *a, enum handover_event event);
/* FAILED with its reason (owned by the call); the first reason stays. */
void attempt_fail(struct attempt *a, struct vm_error *reason);
void attempt_set_session(struct attempt *a, struct peer_session *session);
/*
 * The other end closed what this one was using: that is not the cause. Wait a moment for the peer
 * to say what was; takes `why` over and returns it.
 */
struct vm_error *attempt_await_cause(struct attempt *a, struct vm_error *why);
/* A message of the peer: keep what belongs to it, post its event. Takes what it keeps. */
void attempt_receive(struct attempt *a, Vmmig__Peer__Handover *message);
/*
 * A message of an attempt that is not in the table: answer over the session from the journal, or as
 * one that was never heard of. `peer` is the host as records of that role name it.
 */
void attempt_answer_stray(struct transfer *t, enum handover_role role, struct peer_session *session,
                          const char *peer, const Vmmig__Peer__Handover *message);
/* Wait until it is settled: 0, or TIMEOUT. */
int attempt_wait_settled(struct attempt *a, int64_t deadline_ns, struct vm_error **err);
/* What the user is told when it is settled: 0, or the error. */
int attempt_result(struct attempt *a, struct vm_error **err);
/* An attempt of the journal, at start. */
struct attempt *attempt_recover(struct transfer *t, const struct attempt_role *role,
                                const struct journal_record *record, struct vm_error **err);
/* With the lock held: from where nobody can undo it any more, a user's cancel is refused, and told why. */
void attempt_refuse_cancel(struct attempt *a);
extern const struct attempt_role attempt_source_role, attempt_destination_role;

/* attempt_journal.c: the attempt's thread. When nobody can tell what was written, the process ends. */
/* What recovery needs goes with the next record. */
int attempt_remember(struct attempt *a, enum vm_driver driver, const char *socket_path,
                     char *const *argv, const char *peer_address, struct vm_error **err);
/* Of a record that was read; NULL: it has none. */
Vmmig__Peer__Memory *attempt_memory(const struct journal_record *record);
/* Write that record: JOURNALED or JOURNAL_FAILED, with the reason in the attempt. */
enum handover_event attempt_journal(struct attempt *a, enum handover_record record);
/* Write the record of the present state again, with what is remembered now. */
int attempt_write_again(struct attempt *a, struct vm_error **err);

/* attempt_vm.c: the attempt's thread. */
/* The VMM's death is the cause of what follows, unless something else was before. */
void attempt_blame_death(struct attempt *a);
/* The VMM is dead: the event that this is to the machine. */
enum handover_event attempt_judge_death(struct attempt *a);
/* Let the guest run, if it is to: what came of it. False: the agent stops. */
bool attempt_resume_vm(struct attempt *a, enum handover_event *ret_event);
/* End the VMM. True: it is gone. */
bool attempt_kill_vm(struct attempt *a);

/* attempt_source.c */
/*
 * A VM that has moved away, if it is here still: no word of it any more, and no socket that was
 * made for it.
 */
int attempt_source_forget(struct transfer *t, const char *vm_name,
                          const struct process_identity *moved, struct vm_error **err);
int attempt_source_recover(struct attempt *a, const struct journal_record *record,
                           struct vm_error **err);
/* attempt_destination.c: a control connection whose greeting is done, and a data connection. */
void destination_serve_control(struct transfer *t, struct peer_session *session);
void destination_serve_channel(struct transfer *t, struct conn *conn);
int attempt_destination_recover(struct attempt *a, const struct journal_record *record,
                                struct vm_error **err);

#endif

/* SPDX-License-Identifier: Apache-2.0 */
#include "agent/attempt.h"

#include "agent/transfer.h"
#include "base/cond.h"
#include "base/fault.h"
#include "base/io.h"
#include "base/log.h"

#include <malloc.h>
#include <string.h>

/* A destination that gave up journals that, and ends its VMM, before it says why. */
enum { CAUSE_WAIT_MS = 1000 };

/* ---- Events ---- */

static bool is_message(enum handover_event event)
{
    return event < (enum handover_event)HANDOVER_MSG_COUNT;
}

_Static_assert(ATTEMPT_MESSAGES_MAX + HANDOVER_EV_COUNT <= ATTEMPT_EVENTS_MAX,
               "each local event has its place");

static bool is_queued(const struct attempt *a, enum handover_event event)
{
    for (unsigned i = 0; i < a->n_events; i++)
        if (a->events[(a->first_event + i) % ATTEMPT_EVENTS_MAX] == event)
            return true;
    return false;
}

/*
 * Local events must not be lost. Each stands in the queue at most once, which says all that it has
 * to say, and messages leave room for all of them.
 */
void attempt_post(struct attempt *a, enum handover_event event)
{
    SCOPE_LOCK(&a->lock);
    if (is_message(event) ? a->n_events >= ATTEMPT_MESSAGES_MAX : is_queued(a, event))
        return;
    a->events[(a->first_event + a->n_events++) % ATTEMPT_EVENTS_MAX] = event;
    pthread_cond_broadcast(&a->changed);
}

void attempt_fail(struct attempt *a, struct vm_error *reason)
{
    log_warn("attempt failed", "attempt=%s error=%s", uuid_text(&a->id),
             log_q(error_message(reason)));
    pthread_mutex_lock(&a->lock);
    if (a->reason)
        error_free(reason);
    else
        a->reason = reason;
    pthread_mutex_unlock(&a->lock);
    attempt_post(a, HANDOVER_EV_FAILED);
}

struct vm_error *attempt_await_cause(struct attempt *a, struct vm_error *why)
{
    int64_t deadline = clock_mono_ns() + PATIENCE(CAUSE_WAIT_MS);
    SCOPE_LOCK(&a->lock);
    if (why->kind != VM_ERROR_CANCELLED || a->cancelled)
        return why;
    while (!a->stop && !a->cancelled && !a->peer_reason &&
           cond_wait_until(&a->changed, &a->lock, deadline))
        ;
    if (!a->peer_reason)
        return why;
    error_free(why);
    return error_copy(a->peer_reason);
}

/* The next event, or TIMER when none came for a while. False: the agent stops. */
static bool next_event(struct attempt *a, int64_t timer_ns, enum handover_event *ret_event)
{
    SCOPE_LOCK(&a->lock);
    while (!a->n_events && !a->stop && cond_wait_until(&a->changed, &a->lock, timer_ns))
        ;
    if (a->stop)
        return false;
    if (!a->n_events) {
        *ret_event = HANDOVER_EV_TIMER;
        return true;
    }
    *ret_event = a->events[a->first_event];
    a->first_event = (a->first_event + 1) % ATTEMPT_EVENTS_MAX;
    a->n_events--;
    return true;
}

/* ---- Sessions and messages ---- */

void attempt_set_session(struct attempt *a, struct peer_session *session)
{
    struct peer_session *old;
    pthread_mutex_lock(&a->lock);
    old = a->session;
    if (session && session != old)
        a->heard_ns = clock_mono_ns();
    a->session = session ? peer_session_ref(session) : NULL;
    pthread_mutex_unlock(&a->lock);
    peer_session_unref(old);
}

static struct peer_session *current_session(struct attempt *a)
{
    SCOPE_LOCK(&a->lock);
    return a->session ? peer_session_ref(a->session) : NULL;
}

/* Fault points of every message: "handover.send.COMMIT", "handover.receive.COMMIT" ... */
static enum fault_result fault_send(enum handover_message message)
{
    switch ((int)message) {
#define X(id, ...)                                                                                 \
    case HANDOVER_MSG_##id:                                                                        \
        return FAULT("handover.send." #id);
        HANDOVER_MESSAGES(X)
#undef X
    }
    return FAULT_NONE;
}

static enum fault_result fault_receive(enum handover_message message)
{
    switch ((int)message) {
#define X(id, ...)                                                                                 \
    case HANDOVER_MSG_##id:                                                                        \
        return FAULT("handover.receive." #id);
        HANDOVER_MESSAGES(X)
#undef X
    }
    return FAULT_NONE;
}

static void send_message(struct attempt *a, enum handover_message message)
{
    CLEANUP(peer_session) struct peer_session *session = current_session(a);
    enum fault_result fault = fault_send(message);
    if (!session || fault == FAULT_DROP || fault == FAULT_ERROR)
        return;
    Vmmig__Peer__Handover m = VMMIG__PEER__HANDOVER__INIT;
    m.attempt = (ProtobufCBinaryData){sizeof(a->id.bytes), a->id.bytes};
    m.message = message;
    m.vm = a->vm_name;
    Vmmig__Peer__Error reason = VMMIG__PEER__ERROR__INIT;
    if (message == HANDOVER_MSG_NEVER || message == HANDOVER_MSG_ABORT) {
        SCOPE_LOCK(&a->lock);
        if (a->reason) {
            /* Set once and then left alone: safe to borrow. */
            reason.kind = (char *)(uintptr_t)error_kind_name(a->reason->kind);
            reason.message = a->reason->message;
            m.reason = &reason;
        }
    }
    a->role->fill(a, message, &m);
    log_debug("sending", "attempt=%s message=%s", uuid_text(&a->id),
              handover_message_name(message));
    for (int i = 0; i < (fault == FAULT_DUPLICATE ? 2 : 1); i++)
        if (!peer_session_send(session, &m))
            log_info("message lost", "message=%s", handover_message_name(message));
}

void attempt_receive(struct attempt *a, Vmmig__Peer__Handover *message)
{
    if (message->message >= HANDOVER_MSG_COUNT)
        return;
    enum handover_message m = (enum handover_message)message->message;
    enum fault_result fault = fault_receive(m);
    if (fault == FAULT_DROP || fault == FAULT_ERROR)
        return;
    log_debug("received", "attempt=%s message=%s", uuid_text(&a->id), handover_message_name(m));
    pthread_mutex_lock(&a->lock);
    a->heard_ns = clock_mono_ns();
    if (message->reason && !a->peer_reason) {
        error_set(&a->peer_reason, error_kind_parse(message->reason->kind), "the peer: %s",
                  message->reason->message);
        pthread_cond_broadcast(&a->changed);
    }
    if (message->reason && !a->reason && a->peer_reason)
        a->reason = error_copy(a->peer_reason);
    if (m == HANDOVER_MSG_RUNNING && message->duration_ns)
        a->resume_took_ns = (int64_t)message->duration_ns;
    if ((m == HANDOVER_MSG_COMMIT || m == HANDOVER_MSG_COMMIT_SOLE) &&
        a->role == &attempt_destination_role)
        a->destination.run = message->run;
    pthread_mutex_unlock(&a->lock);
    attempt_post(a, (enum handover_event)m);
    if (fault == FAULT_DUPLICATE)
        attempt_post(a, (enum handover_event)m);
}

/*
 * What this agent has to say about an attempt that is not in the table. False: nothing. UNKNOWN
 * means that there is no record: one that is damaged, or cannot be read, may be of a guest that is
 * here. One that is not settled is taken up, or will be by the next start of the agent, which then
 * knows more.
 */
static bool stray_machine(struct transfer *t, enum handover_role role, const struct uuid *id,
                          const char *peer, struct handover *ret_machine)
{
    struct journal_record record;
    cleanup_error struct vm_error *err = NULL;
    if (journal_get(t->journal, id, &record, &err) < 0) {
        if (err->kind != VM_ERROR_NOT_FOUND) {
            log_warn("nothing can be said of an attempt", "attempt=%s error=%s", uuid_text(id),
                     log_q(error_message(err)));
            return false;
        }
        handover_init(ret_machine, role);
        return true;
    }
    bool ours = !strcmp(record.peer, peer) && handover_record_role(record.record) == role &&
                handover_record_is_settled(record.record);
    if (ours)
        handover_recover(ret_machine, record.record,
                         record.vmm.pid && process_alive(&record.vmm));
    journal_record_finish(&record);
    return ours;
}

void attempt_answer_stray(struct transfer *t, enum handover_role role, struct peer_session *session,
                          const char *peer, const Vmmig__Peer__Handover *message)
{
    struct handover machine;
    struct handover_actions actions;
    struct uuid id;
    memcpy(id.bytes, message->attempt.data, sizeof(id.bytes));
    if (message->message >= HANDOVER_MSG_COUNT || !stray_machine(t, role, &id, peer, &machine))
        return;
    handover_step(&machine, (enum handover_event)message->message, &actions);
    for (int i = 0; i < actions.count; i++) {
        if (actions.list[i].kind != HANDOVER_ACT_SEND ||
            fault_send(actions.list[i].arg) == FAULT_DROP)
            continue;
        Vmmig__Peer__Handover answer = VMMIG__PEER__HANDOVER__INIT;
        answer.attempt = message->attempt;
        answer.message = actions.list[i].arg;
        answer.vm = message->vm;
        peer_session_send(session, &answer);
    }
}

/* ---- The journal ---- */

int attempt_remember(struct attempt *a, enum vm_driver driver, const char *socket_path,
                     char *const *argv, const char *peer_address, struct vm_error **err)
{
    Vmmig__Peer__Memory memory = VMMIG__PEER__MEMORY__INIT;
    memory.was_running = a->was_running;
    memory.driver = driver;
    memory.socket_path = (char *)(uintptr_t)(socket_path ? socket_path : "");
    memory.peer_address = (char *)(uintptr_t)(peer_address ? peer_address : "");
    memory.argv = (char **)(uintptr_t)argv;
    while (argv && argv[memory.n_argv])
        memory.n_argv++;
    cleanup_buffer struct buffer out = {.limit = JOURNAL_BLOB_MAX};
    peer_pack(&memory.base, &out);
    if (out.failed)
        return error_set(err, VM_ERROR_REFUSED, "the VM's command line is too long to remember");
    if (a->record.blob && a->record.blob_len == out.len &&
        !memcmp(a->record.blob, out.data, out.len))
        return 0;
    free(a->record.blob);
    a->record.blob = steal_ptr(&out.data);
    a->record.blob_len = out.len;
    a->blob_changed = true;
    return 0;
}

Vmmig__Peer__Memory *attempt_memory(const struct journal_record *record)
{
    return vmmig__peer__memory__unpack(NULL, record->blob_len, record->blob);
}

/* As the journal has stamped it; 0: it does not say. */
static int64_t started_ns_of(struct journal *journal, const struct uuid *attempt)
{
    struct journal_record r;
    if (journal_get(journal, attempt, &r, NULL) < 0)
        return 0;
    journal_record_finish(&r);
    return r.started_ns;
}

static int write_record(struct attempt *a, enum handover_record record, struct vm_error **err)
{
    struct journal *journal = a->transfer->journal;
    cleanup_error struct vm_error *damage = NULL;
    /* A record that may still be needed to recover carries the blob; a settled one need not. */
    bool settled = handover_record_is_settled(record);
    if (a->recorded && (settled || !a->blob_changed)) {
        if (journal_advance(journal, &a->id, record, &a->record.vmm, &damage) == 0)
            return 0;
        if (damage->kind != VM_ERROR_CORRUPT || !(settled || a->record.blob))
            return error_propagate(err, steal_ptr(&damage));
        log_error("what the disk made of a record is written anew", "attempt=%s error=%s",
                  uuid_text(&a->id), log_q(error_message(damage)));
    }
    a->record.record = record;
    if ((a->recorded ? journal_mend : journal_put)(journal, &a->record, err) < 0)
        return -1;
    a->blob_changed = false;
    if (!a->recorded) {
        int64_t started_ns = started_ns_of(journal, &a->id);
        SCOPE_LOCK(&a->lock);
        a->record.started_ns = started_ns;
    }
    a->recorded = true;
    return 0;
}

/* Fault points around every record: "handover.before.COMMIT", "handover.after.COMMIT" ... */
static enum fault_result fault_before(enum handover_record record)
{
    switch ((int)record) {
#define X(id, ...)                                                                                 \
    case HANDOVER_REC_##id:                                                                        \
        return FAULT("handover.before." #id);
        HANDOVER_RECORDS(X)
#undef X
    }
    return FAULT_NONE;
}

static void fault_after(enum handover_record record)
{
    switch ((int)record) {
#define X(id, ...)                                                                                 \
    case HANDOVER_REC_##id:                                                                        \
        (void)FAULT("handover.after." #id);                                                        \
        break;
        HANDOVER_RECORDS(X)
#undef X
    }
}

/* Nobody can tell whether it is on the disk: the next start of the agent reads what is. */
static void end_if_in_doubt(const struct vm_error *err)
{
    if (err->kind == VM_ERROR_IN_DOUBT)
        _exit(error_kind_status(VM_ERROR_IN_DOUBT));
}

int attempt_write_again(struct attempt *a, struct vm_error **err)
{
    struct vm_error *failed = NULL;
    if (write_record(a, a->record.record, &failed) == 0)
        return 0;
    end_if_in_doubt(failed);
    return error_propagate(err, failed);
}

static enum handover_event act_journal(struct attempt *a, enum handover_record record)
{
    struct vm_error *err = NULL;
    a->is_unfit = false;
    if (fault_before(record) == FAULT_ERROR) {
        error_errno(&err, fault_errno(), "the record %s", handover_record_name(record));
    } else if (a->role->before_record(a, record, &err) < 0) {
        a->is_unfit = true;
    } else if (write_record(a, record, &err) == 0) {
        fault_after(record);
        log_info("journalled", "attempt=%s record=%s", uuid_text(&a->id),
                 handover_record_name(record));
        return HANDOVER_EV_JOURNALED;
    }
    log_error("not journalled", "attempt=%s record=%s error=%s", uuid_text(&a->id),
              handover_record_name(record), log_q(error_message(err)));
    end_if_in_doubt(err);
    pthread_mutex_lock(&a->lock);
    if (a->reason)
        error_free(err);
    else
        a->reason = err;
    pthread_mutex_unlock(&a->lock);
    return HANDOVER_EV_JOURNAL_FAILED;
}

/* ---- The VM ---- */

/* How long, and how often, a VMM is asked anew at once whether its guest runs. */
enum { RESUME_RETRY_MS = 200, RESUME_TRIES = 5 };
enum { QUIT_TIMEOUT_MS = 2000 };

/* Its death is the cause of what follows, unless something else was before. */
static void blame_death(struct attempt *a)
{
    SCOPE_LOCK(&a->lock);
    if (!a->reason)
        error_set(&a->reason, VM_ERROR_VMM_DIED, "the VM's process %d ended", a->record.vmm.pid);
}

/*
 * The VMM is dead. If it died between the agent's look and the record RUN, or while that was
 * written, it was not started: the source has a copy that is as good. So has the destination of one
 * that died before its source, which undoes, let it run on.
 */
static enum handover_event judge_death(struct attempt *a)
{
    if (handover_takes(&a->machine, HANDOVER_EV_DIED_STANDING) && a->stands)
        return HANDOVER_EV_DIED_STANDING;
    if (a->cont_sent || a->machine.state != HANDOVER_DST_STARTING)
        return HANDOVER_EV_VM_GONE;
    blame_death(a);
    return HANDOVER_EV_RESUME_FAILED;
}

/*
 * What the VMM does now; -1 while it does not say. A connection that ended is made anew for the
 * next try.
 */
static int ask_status(struct attempt *a, struct guest_status *ret_status)
{
    cleanup_error struct vm_error *err = NULL;
    if (!a->guest)
        a->role->reconnect(a);
    if (!a->guest)
        return -1;
    if (guest_status(a->guest, ret_status, &err) == 0)
        return 0;
    log_warn("the VMM does not say what it does", "error=%s", log_q(error_message(err)));
    if (err->kind != VM_ERROR_TIMEOUT && err->kind != VM_ERROR_REFUSED &&
        process_alive(&a->record.vmm))
        a->role->reconnect(a);
    return -1;
}

static int send_cont(struct attempt *a, struct vm_error **err)
{
    a->cont_sent = true;
    a->stands = false;
    return guest_resume(a->guest, err);
}

/* A guest that is to stand is its VMM's again. If that cannot be told, it stands all the same. */
static void give_back(struct attempt *a)
{
    cleanup_error struct vm_error *err = NULL;
    if (!a->guest)
        a->role->reconnect(a);
    if (a->guest && guest_release(a->guest, &err) < 0)
        log_warn("the VMM does not take its guest back", "error=%s", log_q(error_message(err)));
}

/* One try: an event, or TIMER while nobody can tell. */
static enum handover_event try_resume(struct attempt *a)
{
    cleanup_error struct vm_error *err = NULL;
    struct guest_status status;
    bool stood = a->stands;
    if (!process_alive(&a->record.vmm))
        return judge_death(a);
    /* A VMM that does not answer any more runs its guest on: there is nothing to ask for. */
    if (!a->was_running)
        give_back(a);
    if (!a->was_running || a->role->never_paused(a))
        return HANDOVER_EV_RESUMED;
    if (ask_status(a, &status) < 0)
        return HANDOVER_EV_TIMER;
    if (status.state == GUEST_RUNNING) {
        a->cont_sent = true; /* by whomever */
        a->stands = false;
        return HANDOVER_EV_RESUMED;
    }
    if (FAULT("attempt.resume") == FAULT_ERROR) {
        error_set(&err, VM_ERROR_REFUSED, "attempt.resume: %s", strerror(fault_errno()));
    } else if (send_cont(a, &err) == 0 && FAULT("attempt.resumed") != FAULT_ERROR) {
        cleanup_error struct vm_error *quiet = NULL;
        if (guest_announce(a->guest, &quiet) < 0)
            log_warn("cannot announce the guest", "error=%s", log_q(error_message(quiet)));
        return HANDOVER_EV_RESUMED;
    }
    if (!err)
        error_set(&err, VM_ERROR_TIMEOUT, "attempt.resumed: %s", strerror(fault_errno()));
    log_error("cannot start the guest", "error=%s", log_q(error_message(err)));
    if (err->kind != VM_ERROR_REFUSED) {
        a->resume_unsure = true;
        return HANDOVER_EV_TIMER;
    }
    /* After an answer was lost, a later refusal proves nothing: a vCPU may have run in between. */
    if (a->resume_unsure)
        return HANDOVER_EV_RESUME_UNSURE;
    a->stands = stood;
    SCOPE_LOCK(&a->lock);
    if (!a->reason)
        a->reason = steal_ptr(&err);
    return HANDOVER_EV_RESUME_FAILED;
}

static void feed(struct attempt *a, enum handover_event event);

/*
 * The next try, within the action: while an answer may only be late, and for as long as the VMM's death would mean that no
 * vCPU started.
 */
static bool is_worth_a_wait(const struct attempt *a, unsigned tries)
{
    if (!a->cont_sent)
        return a->machine.state == HANDOVER_DST_STARTING;
    return tries < RESUME_TRIES;
}

/* False: the agent stops. */
static bool wait_for_next_try(struct attempt *a, unsigned tries)
{
    int64_t due = clock_mono_ns() +
                  PATIENCE(tries < RESUME_TRIES ? RESUME_RETRY_MS : ATTEMPT_TIMER_MS);
    SCOPE_LOCK(&a->lock);
    while (!a->stop && cond_wait_until(&a->changed, &a->lock, due))
        ;
    return !a->stop;
}

/*
 * That no vCPU started stays true of a VMM that dies before the event's turn would come. A source that has said meanwhile
 * that this is the only copy is heard before it is given up.
 */
static void feed_start_failed(struct attempt *a)
{
    pthread_mutex_lock(&a->lock);
    bool sole = is_queued(a, HANDOVER_EV_MSG_COMMIT_SOLE);
    pthread_mutex_unlock(&a->lock);
    if (sole)
        feed(a, HANDOVER_EV_MSG_COMMIT_SOLE);
    feed(a, HANDOVER_EV_RESUME_FAILED);
}

/* What cannot be told is left to the machine, which asks for another start, and hears what else happens. */
static void act_resume(struct attempt *a)
{
    enum handover_event event = try_resume(a);
    for (unsigned tries = 1; event == HANDOVER_EV_TIMER && is_worth_a_wait(a, tries); tries++) {
        if (!wait_for_next_try(a, tries))
            return;
        event = try_resume(a);
    }
    if (event == HANDOVER_EV_TIMER)
        event = HANDOVER_EV_RESUME_UNSURE;
    if (event == HANDOVER_EV_RESUMED && a->commit_at_ns)
        a->resume_took_ns = clock_mono_ns() - a->commit_at_ns;
    if (event == HANDOVER_EV_RESUME_FAILED)
        feed_start_failed(a);
    else
        attempt_post(a, event);
}

/*
 * The guest stands and will not run here (again): let the VMM clear up after itself, if it does so
 * at once.
 */
static void quit_vmm(struct attempt *a)
{
    int64_t deadline = clock_mono_ns() + PATIENCE(QUIT_TIMEOUT_MS);
    if (!a->guest)
        a->role->reconnect(a);
    if (!a->guest || guest_quit(a->guest, NULL) < 0)
        return;
    while (process_alive(&a->record.vmm) && clock_mono_ns() < deadline)
        usleep(1000);
}

/* If it is still there after the time, the machine's TIMER asks for it again. */
static void act_kill(struct attempt *a)
{
    cleanup_error struct vm_error *err = NULL;
    a->role->stop_transfer(a);
    if (FAULT("attempt.kill") == FAULT_ERROR)
        return;
    if (process_alive(&a->record.vmm))
        quit_vmm(a);
    if (a->record.vmm.pid && process_kill(&a->record.vmm, ATTEMPT_KILL_TIMEOUT_MS, &err) < 0) {
        log_error("cannot end the VMM", "pid=%d error=%s", a->record.vmm.pid,
                  log_q(error_message(err)));
        return;
    }
    (void)FAULT("attempt.killed");
    attempt_post(a, HANDOVER_EV_VM_GONE);
}

static void act_report(struct attempt *a, enum handover_notice notice)
{
    /* Nor was it tried: the reason says why. */
    if (notice == HANDOVER_NOTE_JOURNAL_FAILED && a->is_unfit)
        return;
    log_info("notice", "attempt=%s notice=%s text=%s", uuid_text(&a->id),
             handover_notice_name(notice), log_q(handover_notice_text(notice)));
    SCOPE_LOCK(&a->lock);
    a->notice = notice;
    a->has_notice = true;
    /* How long the guest stood: until the destination says that it ran. */
    if (notice == HANDOVER_NOTE_MOVED && a->paused_at_ns && a->commit_at_ns)
        a->pause_ns = a->resume_took_ns ? a->commit_at_ns + a->resume_took_ns - a->paused_at_ns
                                        : clock_mono_ns() - a->paused_at_ns;
}

/* ---- The machine ---- */

static void execute(struct attempt *a, struct handover_action action)
{
    switch ((enum handover_action_kind)action.kind) {
    case HANDOVER_ACT_JOURNAL:
        feed(a, act_journal(a, action.arg));
        break;
    case HANDOVER_ACT_SEND:
        if (action.arg == HANDOVER_MSG_COMMIT && !a->commit_at_ns)
            a->commit_at_ns = clock_mono_ns();
        send_message(a, action.arg);
        break;
    case HANDOVER_ACT_REPORT:
        act_report(a, action.arg);
        break;
    case HANDOVER_ACT_START_VM:
        a->role->start_vm(a);
        break;
    case HANDOVER_ACT_START_TRANSFER:
        a->role->start_transfer(a);
        break;
    case HANDOVER_ACT_STOP_TRANSFER:
        a->role->stop_transfer(a);
        break;
    case HANDOVER_ACT_RESUME_VM:
        act_resume(a);
        break;
    case HANDOVER_ACT_KILL_VM:
        act_kill(a);
        break;
    case HANDOVER_ACT_NONE:
    case HANDOVER_ACT_COUNT:
        break;
    }
}

/*
 * Tell those who wait, and let the role take stock once of each settled state: what has run here
 * may end.
 */
static void publish(struct attempt *a)
{
    bool settled = handover_is_settled(&a->machine);
    cleanup_error struct vm_error *err = NULL;
    bool done = settled && ((a->settled_done && a->settled_in == a->machine.state) ||
                            a->role->settled(a, &err) == 0);
    if (err)
        log_error("cannot take note of the outcome", "error=%s", log_q(error_message(err)));
    SCOPE_LOCK(&a->lock);
    a->state = a->machine.state;
    a->settled_done = done;
    a->settled_in = a->machine.state;
    a->is_settled = settled;
    pthread_cond_broadcast(&a->changed);
}

/*
 * The user's cancel and the peer's LOADED race for the decision: whichever is first closes the
 * door for the other.
 */
static enum handover_event arbitrate(struct attempt *a, enum handover_event event)
{
    if (event != HANDOVER_EV_MSG_LOADED || a->machine.state != HANDOVER_SRC_SENT)
        return event;
    SCOPE_LOCK(&a->lock);
    if (a->job && job_close_cancel(a->job, handover_notice_text(HANDOVER_NOTE_TOO_LATE), NULL) < 0)
        return HANDOVER_EV_CANCEL;
    return event;
}

void attempt_refuse_cancel(struct attempt *a)
{
    enum handover_notice why;
    const struct handover now = {.state = a->state};
    if (a->job && handover_refuses_cancel(&now, &why))
        job_close_cancel(a->job, handover_notice_text(why), NULL);
}

/* What others see while the actions of the new state are executed. */
static void show_state(struct attempt *a)
{
    SCOPE_LOCK(&a->lock);
    a->state = a->machine.state;
    attempt_refuse_cancel(a);
}

/*
 * Plausible shortcuts, which the tests must notice (base/fault.h, "mistake"): they take the place
 * of a row of the table.
 */
static bool make_mistake(struct attempt *a, enum handover_event event)
{
    enum handover_state state = a->machine.state;
    if (state == HANDOVER_SRC_COMMITTED && event == HANDOVER_EV_TIMER &&
        FAULT("mistake.resume-without-never") == FAULT_MISTAKE) {
        a->machine.state = HANDOVER_SRC_RESUMING;
        act_resume(a);
        return true;
    }
    if (state == HANDOVER_DST_LOADED && event != HANDOVER_EV_MSG_COMMIT &&
        FAULT("mistake.run-on-loaded") == FAULT_MISTAKE) {
        act_journal(a, HANDOVER_REC_RUN);
        a->machine.state = HANDOVER_DST_STARTING;
        act_resume(a);
        return true;
    }
    if (state == HANDOVER_DST_LOADED && event == HANDOVER_EV_MSG_COMMIT &&
        FAULT("mistake.running-before-run") == FAULT_MISTAKE)
        send_message(a, HANDOVER_MSG_RUNNING);
    return false;
}

/*
 * The destination may have loaded everything before the thread that sent it has said so. The machine knows no LOADED
 * before TRANSFERRED, and the destination would repeat it a second later only, while the guest stands.
 */
static bool keep_for_later(struct attempt *a, enum handover_event event)
{
    if (event != HANDOVER_EV_MSG_LOADED || a->machine.state != HANDOVER_SRC_SENDING)
        return false;
    a->loaded_early = true;
    return true;
}

static void feed(struct attempt *a, enum handover_event event)
{
    struct handover_actions actions;
    enum handover_state before = a->machine.state;
    if (make_mistake(a, event) || keep_for_later(a, event))
        return;
    event = arbitrate(a, event);
    if (a->machine.role == HANDOVER_DESTINATION && before == HANDOVER_DST_LOADED &&
        event == HANDOVER_EV_MSG_COMMIT)
        a->commit_at_ns = clock_mono_ns();
    if (!handover_step(&a->machine, event, &actions))
        return;
    if (a->machine.state != before) {
        a->state_since_ns = clock_mono_ns();
        log_info("hand-over", "attempt=%s from=%s event=%s to=%s", uuid_text(&a->id),
                 handover_state_name(before), handover_event_name(event),
                 handover_state_name(a->machine.state));
    }
    if (!a->machine.pending)
        show_state(a);
    for (int i = 0; i < actions.count; i++)
        execute(a, actions.list[i]);
    if (!a->machine.pending)
        publish(a);
    if (a->loaded_early && a->machine.state == HANDOVER_SRC_SENT) {
        a->loaded_early = false;
        attempt_post(a, HANDOVER_EV_MSG_LOADED);
    }
}

/* True: no other is left. */
static bool remove_from_table(struct attempt *a)
{
    struct transfer *t = a->transfer;
    SCOPE_LOCK(&t->lock);
    for (struct attempt **p = &t->attempts; *p; p = &(*p)->next) {
        if (*p == a) {
            *p = a->next;
            break;
        }
    }
    pthread_cond_broadcast(&t->changed);
    return !t->attempts;
}

/* Its death is the cause of what follows, unless it is ended by us or because of something else. */
static void note_death(struct attempt *a)
{
    enum handover_state state = a->machine.state;
    bool on_its_own = state == HANDOVER_SRC_PREPARING || state == HANDOVER_SRC_SENDING ||
                      state == HANDOVER_SRC_SENT || state == HANDOVER_DST_PREPARED ||
                      state == HANDOVER_DST_LOADED;
    if (on_its_own)
        blame_death(a);
}

/*
 * A VMM's death outranks every other event: what the copy reports because of it, or what the peer
 * says meanwhile, must not be judged as if the VMM lived.
 */
static void feed_with_death_first(struct attempt *a, enum handover_event event)
{
    if (a->record.vmm.pid && event != HANDOVER_EV_VM_GONE && !process_alive(&a->record.vmm)) {
        note_death(a);
        feed(a, judge_death(a));
    }
    feed(a, event);
}

static void *attempt_main(void *arg)
{
    struct attempt *a = arg;
    enum handover_event event;
    char id[UUID_TEXT_SIZE];
    log_set_thread_context(uuid_format(&a->id, id), a->vm_name);
    int64_t timer = clock_mono_ns() + PATIENCE(ATTEMPT_TIMER_MS);
    while (next_event(a, timer, &event)) {
        if (event == HANDOVER_EV_TIMER) {
            timer = clock_mono_ns() + PATIENCE(ATTEMPT_TIMER_MS);
            if (handover_is_settled(&a->machine) && !a->settled_done)
                publish(a);
            a->role->tick(a);
        }
        feed_with_death_first(a, event);
        if (handover_is_finished(&a->machine) && a->settled_done)
            break;
    }
    io_latch_set(a->cancel);
    a->role->stop_transfer(a);
    attempt_set_session(a, NULL);
    pthread_mutex_lock(&a->lock);
    a->is_settled = a->is_settled || a->stop;
    pthread_cond_broadcast(&a->changed);
    pthread_mutex_unlock(&a->lock);
    bool last = remove_from_table(a);
    attempt_unref(a);
    /*
     * malloc keeps what the many threads of a migration have freed; an agent that idles needs none
     * of it.
     */
    if (last)
        malloc_trim(0);
    return NULL;
}

/* ---- Life ---- */

struct attempt *attempt_create(struct transfer *t, const struct attempt_role *role,
                               const struct uuid *id, const char *vm_name, struct vm_error **err)
{
    CLEANUP(attempt) struct attempt *a = calloc(1, sizeof(*a));
    if (!a) {
        error_nomem(err);
        return NULL;
    }
    atomic_init(&a->refs, 1);
    a->transfer = t;
    a->role = role;
    a->state_since_ns = clock_mono_ns();
    a->id = *id;
    a->pause_ns = -1;
    snprintf(a->vm_name, sizeof(a->vm_name), "%s", vm_name);
    a->record.attempt = *id;
    snprintf(a->record.vm, sizeof(a->record.vm), "%s", vm_name);
    pthread_mutex_init(&a->lock, NULL);
    cond_init(&a->changed);
    handover_init(&a->machine,
                  role == &attempt_source_role ? HANDOVER_SOURCE : HANDOVER_DESTINATION);
    a->state = a->machine.state;
    a->cancel = io_latch_new(err);
    return a->cancel < 0 ? NULL : steal_ptr(&a);
}

/* With the table's lock held. */
static int start_locked(struct attempt *a, struct vm_error **err)
{
    struct transfer *t = a->transfer;
    a->next = t->attempts;
    attempt_ref(a);
    int failed = pthread_create(&a->thread, NULL, attempt_main, a);
    if (failed) {
        attempt_unref(a);
        return error_errno(err, failed, "cannot start a thread");
    }
    t->attempts = a;
    pthread_detach(a->thread);
    return 0;
}

int attempt_start(struct attempt *a, struct vm_error **err)
{
    SCOPE_LOCK(&a->transfer->lock);
    return start_locked(a, err);
}

int attempt_start_new(struct attempt *a, struct vm_error **err)
{
    struct transfer *t = a->transfer;
    struct journal_record record;
    cleanup_error struct vm_error *missing = NULL;
    SCOPE_LOCK(&t->lock);
    for (struct attempt *other = t->attempts; other; other = other->next)
        if (uuid_equal(&other->id, &a->id))
            return error_set(err, VM_ERROR_CONFLICT, "attempt %s has begun already",
                             uuid_text(&a->id));
    if (journal_get(t->journal, &a->id, &record, &missing) == 0) {
        journal_record_finish(&record);
        return error_set(err, VM_ERROR_CONFLICT, "attempt %s is in the journal already",
                         uuid_text(&a->id));
    }
    if (missing->kind != VM_ERROR_NOT_FOUND)
        return error_propagate(err, steal_ptr(&missing));
    return start_locked(a, err);
}

struct attempt *attempt_ref(struct attempt *a)
{
    atomic_fetch_add(&a->refs, 1);
    return a;
}

void attempt_unref(struct attempt *a)
{
    if (!a || atomic_fetch_sub(&a->refs, 1) != 1)
        return;
    a->role->finish(a);
    guest_unref(a->guest);
    peer_session_unref(a->session);
    error_free(a->reason);
    error_free(a->peer_reason);
    free(a->record.blob);
    close_fd(&a->cancel);
    pthread_cond_destroy(&a->changed);
    pthread_mutex_destroy(&a->lock);
    free(a);
}

struct attempt *attempt_find(struct transfer *t, const struct uuid *id)
{
    SCOPE_LOCK(&t->lock);
    for (struct attempt *a = t->attempts; a; a = a->next)
        if (uuid_equal(&a->id, id))
            return attempt_ref(a);
    return NULL;
}

struct attempt *attempt_find_of_vm(struct transfer *t, const char *vm_name)
{
    SCOPE_LOCK(&t->lock);
    struct attempt *found = NULL;
    for (struct attempt *a = t->attempts; a; a = a->next) {
        if (strcmp(a->vm_name, vm_name))
            continue;
        pthread_mutex_lock(&a->lock);
        bool settled = a->is_settled;
        pthread_mutex_unlock(&a->lock);
        if (!found || !settled)
            found = a;
        if (!settled)
            break;
    }
    return found ? attempt_ref(found) : NULL;
}

bool attempt_has_rival(struct attempt *a)
{
    bool found = false;
    SCOPE_LOCK(&a->transfer->lock);
    for (struct attempt *other = a->transfer->attempts; other && !found; other = other->next) {
        if (other == a || other->role != &attempt_destination_role || strcmp(other->vm_name, a->vm_name))
            continue;
        pthread_mutex_lock(&other->lock);
        found = !other->is_settled;
        pthread_mutex_unlock(&other->lock);
    }
    return found;
}

int attempt_wait_settled(struct attempt *a, int64_t deadline_ns, struct vm_error **err)
{
    SCOPE_LOCK(&a->lock);
    while (!a->is_settled)
        if (!cond_wait_until(&a->changed, &a->lock, deadline_ns))
            return error_set(err, VM_ERROR_TIMEOUT, "the hand-over is not settled yet");
    return 0;
}

int attempt_result(struct attempt *a, struct vm_error **err)
{
    SCOPE_LOCK(&a->lock);
    if (a->stop && !handover_is_finished(&a->machine))
        return error_set(err, VM_ERROR_CANCELLED,
                         "the agent stopped; its next start finishes or undoes the hand-over");
    switch (a->state) {
    case HANDOVER_SRC_DONE:
    case HANDOVER_DST_RUNNING:
    case HANDOVER_DST_CLOSED:
        if (!a->has_notice || a->notice != HANDOVER_NOTE_ENDED)
            return 0;
        return error_set(err, VM_ERROR_VMM_DIED, "%s", handover_notice_text(a->notice));
    default:
        if (a->reason)
            return error_propagate(err, error_copy(a->reason));
        if (a->has_notice && a->notice == HANDOVER_NOTE_LOST)
            return error_set(err, VM_ERROR_VMM_DIED, "%s", handover_notice_text(a->notice));
        return error_set(err, a->cancelled ? VM_ERROR_CANCELLED : VM_ERROR_FAILED, "%s",
                         a->cancelled ? "cancelled; the VM stays at the source"
                                      : "undone; the VM stays at the source");
    }
}

struct attempt *attempt_recover(struct transfer *t, const struct attempt_role *role,
                                const struct journal_record *record, struct vm_error **err)
{
    CLEANUP(attempt) struct attempt *a = attempt_create(t, role, &record->attempt, record->vm, err);
    if (!a)
        return NULL;
    a->record.vmm = record->vmm;
    memcpy(a->record.peer, record->peer, sizeof(a->record.peer));
    a->record.started_ns = record->started_ns;
    a->recorded = true;
    snprintf(a->peer_name, sizeof(a->peer_name), "%s", record->peer);
    bool alive = record->vmm.pid && process_alive(&record->vmm);
    handover_recover(&a->machine, record->record, alive);
    a->state = a->machine.state;
    a->is_settled = handover_is_settled(&a->machine);
    if ((role == &attempt_source_role ? attempt_source_recover : attempt_destination_recover)(
            a, record, err) < 0)
        return NULL;
    log_info("recovered", "attempt=%s record=%s state=%s vmm_alive=%d", uuid_text(&a->id),
             handover_record_name(record->record), handover_state_name(a->state), alive);
    attempt_post(a, HANDOVER_EV_TIMER);
    return steal_ptr(&a);
}

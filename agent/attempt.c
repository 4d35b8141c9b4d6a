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
enum { SETTLE_TIMEOUT_MS = 10000, SETTLE_STEP_MS = 100 };

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

/* ---- Actions ---- */

static void feed(struct attempt *a, enum handover_event event);

/*
 * That no vCPU started stays true of a VMM that dies before the event's turn would come. A source
 * that has said meanwhile that this is the only copy is heard before it is given up.
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

static void act_resume(struct attempt *a)
{
    enum handover_event event;
    if (!attempt_resume_vm(a, &event))
        return;
    if (event == HANDOVER_EV_RESUME_FAILED)
        feed_start_failed(a);
    else
        attempt_post(a, event);
}

/* If it is still there after the time, the machine's TIMER asks for it again. */
static void act_kill(struct attempt *a)
{
    if (attempt_kill_vm(a))
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
    /* How long the guest stood: COMMIT went its way, and the destination says how long it took from there. */
    if (notice == HANDOVER_NOTE_MOVED && a->paused_at_ns && a->commit_at_ns)
        a->pause_ns = a->resume_took_ns ? a->commit_at_ns + a->rtt_ns / 2 + a->resume_took_ns - a->paused_at_ns
                                        : clock_mono_ns() - a->paused_at_ns;
}

/* ---- The machine ---- */

static void execute(struct attempt *a, struct handover_action action)
{
    switch ((enum handover_action_kind)action.kind) {
    case HANDOVER_ACT_JOURNAL:
        feed(a, attempt_journal(a, action.arg));
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
        attempt_journal(a, HANDOVER_REC_RUN);
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
        attempt_blame_death(a);
}

/*
 * A VMM's death outranks every other event: what the copy reports because of it, or what the peer
 * says meanwhile, must not be judged as if the VMM lived.
 */
static void feed_with_death_first(struct attempt *a, enum handover_event event)
{
    if (a->record.vmm.pid && event != HANDOVER_EV_VM_GONE && !process_alive(&a->record.vmm)) {
        note_death(a);
        feed(a, attempt_judge_death(a));
    }
    feed(a, event);
}

static bool is_stopped(struct attempt *a)
{
    SCOPE_LOCK(&a->lock);
    return a->stop;
}

/* The registry of a new agent connects to its VMs: to this one before anything is asked of it, or decided. */
static void wait_for_registry(struct attempt *a)
{
    int64_t deadline = clock_mono_ns() + SETTLE_TIMEOUT_MS * NSEC_PER_MSEC;
    while (!vms_settle_one(a->transfer->agent->vms, a->vm_name, SETTLE_STEP_MS) && !is_stopped(a) &&
           clock_mono_ns() < deadline)
        ;
}

static void *attempt_main(void *arg)
{
    struct attempt *a = arg;
    enum handover_event event;
    char id[UUID_TEXT_SIZE];
    log_set_thread_context(uuid_format(&a->id, id), a->vm_name);
    if (a->recovered)
        wait_for_registry(a);
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
        if (a->role == &attempt_source_role && a->source.agreed)
            return 0; /* it was to be undone */
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
    a->recorded = a->recovered = true;
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

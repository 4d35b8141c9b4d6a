/* SPDX-License-Identifier: Apache-2.0 */
#include "migrate/handover.h"

/*
 * The table. Read a row as: in this state, on this event, write this record (or none), then go
 * there and do that; if the record cannot be written, go there and do that instead.
 */
#define SEND(id) {HANDOVER_ACT_SEND, HANDOVER_MSG_##id}
#define REPORT(id) {HANDOVER_ACT_REPORT, HANDOVER_NOTE_##id}
#define DO(id) {HANDOVER_ACT_##id, 0}
#define GO(to, ...) {HANDOVER_##to, {__VA_ARGS__}}
#define ON(from, event, then)                                                                      \
    {HANDOVER_##from, HANDOVER_EV_##event, HANDOVER_REC_NONE, then, {HANDOVER_##from, {{0}}}}
#define WRITE(from, event, record, then, otherwise)                                                \
    {HANDOVER_##from, HANDOVER_EV_##event, HANDOVER_REC_##record, then, otherwise}

/* The source gives up before COMMIT: once ABORTING is recorded only its own copy counts. */
#define UNDO(from, event)                                                                          \
    WRITE(from, event, ABORTING, GO(SRC_RESUMING, DO(STOP_TRANSFER), DO(RESUME_VM)),               \
          GO(SRC_REVERTING, DO(STOP_TRANSFER), SEND(ABORT), REPORT(JOURNAL_FAILED)))
/* The same when the destination has just said that it has nothing: safe without a record. */
#define UNDO_AGREED(from, event)                                                                   \
    WRITE(from, event, ABORTING, GO(SRC_RESUMING, DO(STOP_TRANSFER), DO(RESUME_VM)),               \
          GO(SRC_RESUMING, DO(STOP_TRANSFER), DO(RESUME_VM)))
/* The VM runs again, or is dead: either way the attempt is over for the source's copy. */
#define SETTLE(from, event, notice)                                                                \
    WRITE(from, event, ABORTED, GO(SRC_ABORTED, SEND(ABORT), REPORT(notice)),                      \
          GO(SRC_SETTLING, SEND(ABORT), REPORT(notice)))
/* It died as it was when it was sent: what the destination has, if it has all, is as good. */
#define ASK_AGAIN(from)                                                                            \
    WRITE(from, DIED_STANDING, SENDING, GO(SRC_ORPHANED, SEND(ASK)), GO(SRC_STALLED))
#define REPLY(from, message, answer) ON(from, MSG_##message, GO(from, SEND(answer)))
#define STAY(from) GO(from, REPORT(JOURNAL_FAILED))

static const struct handover_row table[] = {
    /* Source: preparing and copying. */
    WRITE(SRC_NONE, START, SENDING, GO(SRC_PREPARING, SEND(PREPARE)), STAY(SRC_NONE)),
    REPLY(SRC_NONE, PREPARED, UNKNOWN),
    REPLY(SRC_NONE, LOADED, UNKNOWN),
    REPLY(SRC_NONE, RUNNING, UNKNOWN),
    REPLY(SRC_NONE, NEVER, UNKNOWN),
    REPLY(SRC_NONE, ENDED, UNKNOWN),

    ON(SRC_PREPARING, TIMER, GO(SRC_PREPARING, SEND(PREPARE))),
    ON(SRC_PREPARING, MSG_PREPARED, GO(SRC_SENDING, DO(START_TRANSFER))),
    UNDO(SRC_PREPARING, FAILED),
    UNDO(SRC_PREPARING, CANCEL),
    UNDO(SRC_PREPARING, MSG_REFUSED),
    UNDO_AGREED(SRC_PREPARING, MSG_NEVER),
    SETTLE(SRC_PREPARING, VM_GONE, LOST),

    ON(SRC_SENDING, TRANSFERRED, GO(SRC_SENT)),
    UNDO(SRC_SENDING, FAILED),
    UNDO(SRC_SENDING, CANCEL),
    UNDO_AGREED(SRC_SENDING, MSG_NEVER),
    ON(SRC_SENDING, VM_GONE, GO(SRC_ORPHANED, DO(STOP_TRANSFER), SEND(ASK))),

    /* Source: the decision. */
    WRITE(SRC_SENT, MSG_LOADED, COMMIT, GO(SRC_COMMITTED, SEND(COMMIT)),
          GO(SRC_REVERTING, DO(STOP_TRANSFER), SEND(ABORT), REPORT(JOURNAL_FAILED))),
    ON(SRC_SENT, TIMER, GO(SRC_SENT, SEND(ASK))),
    UNDO(SRC_SENT, FAILED),
    UNDO(SRC_SENT, CANCEL),
    UNDO_AGREED(SRC_SENT, MSG_NEVER),
    UNDO_AGREED(SRC_SENT, MSG_UNKNOWN),
    ON(SRC_SENT, VM_GONE, GO(SRC_ORPHANED, SEND(ASK))),

    /* Source: undoing. Without a record of it only a destination without a copy lets it resume. */
    WRITE(SRC_REVERTING, TIMER, ABORTING, GO(SRC_RESUMING, DO(STOP_TRANSFER), DO(RESUME_VM)),
          GO(SRC_REVERTING, SEND(ABORT))),
    UNDO_AGREED(SRC_REVERTING, MSG_NEVER),
    UNDO_AGREED(SRC_REVERTING, MSG_UNKNOWN),
    UNDO_AGREED(SRC_REVERTING, RESOLVE_HERE),
    ON(SRC_REVERTING, VM_GONE, GO(SRC_ORPHANED, SEND(ASK))),

    SETTLE(SRC_RESUMING, RESUMED, UNDONE),
    SETTLE(SRC_RESUMING, VM_GONE, LOST),
    ASK_AGAIN(SRC_RESUMING),
    ON(SRC_RESUMING, RESUME_FAILED, GO(SRC_STALLED, REPORT(START_FAILED))),
    ON(SRC_RESUMING, RESUME_UNSURE, GO(SRC_STALLED, REPORT(START_FAILED))),
    ON(SRC_STALLED, TIMER, GO(SRC_RESUMING, DO(RESUME_VM))),
    SETTLE(SRC_STALLED, VM_GONE, LOST),
    ASK_AGAIN(SRC_STALLED),
    WRITE(SRC_SETTLING, TIMER, ABORTED, GO(SRC_ABORTED, SEND(ABORT)),
          GO(SRC_SETTLING, SEND(ABORT))),

    ON(SRC_ABORTED, TIMER, GO(SRC_ABORTED, SEND(ABORT))),
    REPLY(SRC_ABORTED, PREPARED, ABORT),
    REPLY(SRC_ABORTED, LOADED, ABORT),
    WRITE(SRC_ABORTED, MSG_NEVER, SRC_CLOSED, GO(SRC_CLOSED, SEND(FINISHED)), STAY(SRC_ABORTED)),
    WRITE(SRC_ABORTED, MSG_UNKNOWN, SRC_CLOSED, GO(SRC_CLOSED, SEND(FINISHED)), STAY(SRC_ABORTED)),
    WRITE(SRC_ABORTED, MSG_ENDED, SRC_CLOSED, GO(SRC_CLOSED, SEND(FINISHED)), STAY(SRC_ABORTED)),
    WRITE(SRC_ABORTED, MSG_RUNNING, SRC_CLOSED, GO(SRC_CLOSED, SEND(FINISHED), REPORT(CONFLICT)),
          STAY(SRC_ABORTED)),

    /* Source: its VMM died before COMMIT was recorded. */
    ON(SRC_ORPHANED, TIMER, GO(SRC_ORPHANED, SEND(ASK))),
    WRITE(SRC_ORPHANED, MSG_LOADED, COMMIT, GO(SRC_COMMITTED_SOLE, SEND(COMMIT_SOLE)),
          STAY(SRC_ORPHANED)),
    WRITE(SRC_ORPHANED, MSG_NEVER, SRC_CLOSED, GO(SRC_CLOSED, SEND(FINISHED), REPORT(LOST)),
          STAY(SRC_ORPHANED)),
    WRITE(SRC_ORPHANED, MSG_UNKNOWN, SRC_CLOSED, GO(SRC_CLOSED, SEND(FINISHED), REPORT(LOST)),
          STAY(SRC_ORPHANED)),
    WRITE(SRC_ORPHANED, MSG_RUNNING, DONE, GO(SRC_DONE, SEND(FINISHED), REPORT(MOVED)),
          STAY(SRC_ORPHANED)),
    WRITE(SRC_ORPHANED, MSG_ENDED, DONE, GO(SRC_DONE, SEND(FINISHED), REPORT(ENDED)),
          STAY(SRC_ORPHANED)),
    ON(SRC_ORPHANED, CANCEL, GO(SRC_ORPHANED, REPORT(TOO_LATE))),
    WRITE(SRC_ORPHANED, RESOLVE_GONE, ABORTED, GO(SRC_ABORTED, SEND(ABORT), REPORT(LOST)),
          STAY(SRC_ORPHANED)),

    /* Source: in doubt. It runs again only on NEVER, or by an operator's word. */
    ON(SRC_COMMITTED, TIMER, GO(SRC_COMMITTED, SEND(COMMIT))),
    REPLY(SRC_COMMITTED, LOADED, COMMIT),
    ON(SRC_COMMITTED, MSG_RUNNING, GO(SRC_DISCARDING, REPORT(MOVED), DO(KILL_VM))),
    ON(SRC_COMMITTED, MSG_ENDED, GO(SRC_DISCARDING, REPORT(ENDED), DO(KILL_VM))),
    WRITE(SRC_COMMITTED, MSG_NEVER, ABORTING, GO(SRC_RESUMING, DO(STOP_TRANSFER), DO(RESUME_VM)),
          STAY(SRC_COMMITTED)),
    ON(SRC_COMMITTED, MSG_UNKNOWN, GO(SRC_COMMITTED, REPORT(PEER_FORGOT))),
    ON(SRC_COMMITTED, VM_GONE, GO(SRC_COMMITTED_SOLE, SEND(COMMIT_SOLE))),
    ON(SRC_COMMITTED, CANCEL, GO(SRC_COMMITTED, REPORT(TOO_LATE))),
    WRITE(SRC_COMMITTED, RESOLVE_HERE, ABORTING,
          GO(SRC_RESUMING, DO(STOP_TRANSFER), DO(RESUME_VM)), STAY(SRC_COMMITTED)),
    ON(SRC_COMMITTED, RESOLVE_GONE, GO(SRC_COMMITTED, DO(KILL_VM))),

    ON(SRC_COMMITTED_SOLE, TIMER, GO(SRC_COMMITTED_SOLE, SEND(COMMIT_SOLE))),
    REPLY(SRC_COMMITTED_SOLE, LOADED, COMMIT_SOLE),
    WRITE(SRC_COMMITTED_SOLE, MSG_RUNNING, DONE, GO(SRC_DONE, SEND(FINISHED), REPORT(MOVED)),
          STAY(SRC_COMMITTED_SOLE)),
    WRITE(SRC_COMMITTED_SOLE, MSG_ENDED, DONE, GO(SRC_DONE, SEND(FINISHED), REPORT(ENDED)),
          STAY(SRC_COMMITTED_SOLE)),
    WRITE(SRC_COMMITTED_SOLE, MSG_NEVER, SRC_CLOSED, GO(SRC_CLOSED, SEND(FINISHED), REPORT(LOST)),
          STAY(SRC_COMMITTED_SOLE)),
    ON(SRC_COMMITTED_SOLE, MSG_UNKNOWN, GO(SRC_COMMITTED_SOLE, REPORT(PEER_FORGOT))),
    ON(SRC_COMMITTED_SOLE, CANCEL, GO(SRC_COMMITTED_SOLE, REPORT(TOO_LATE))),
    WRITE(SRC_COMMITTED_SOLE, RESOLVE_GONE, DONE, GO(SRC_DONE, SEND(FINISHED)),
          STAY(SRC_COMMITTED_SOLE)),

    ON(SRC_DISCARDING, TIMER, GO(SRC_DISCARDING, DO(KILL_VM))),
    WRITE(SRC_DISCARDING, VM_GONE, DONE, GO(SRC_DONE, SEND(FINISHED)), STAY(SRC_DISCARDING)),
    ON(SRC_DISCARDING, CANCEL, GO(SRC_DISCARDING, REPORT(TOO_LATE))),

    /* Source: finished. */
    REPLY(SRC_DONE, PREPARED, FINISHED),
    REPLY(SRC_DONE, LOADED, FINISHED),
    REPLY(SRC_DONE, RUNNING, FINISHED),
    REPLY(SRC_DONE, NEVER, FINISHED),
    REPLY(SRC_DONE, ENDED, FINISHED),
    REPLY(SRC_CLOSED, PREPARED, FINISHED),
    REPLY(SRC_CLOSED, LOADED, FINISHED),
    REPLY(SRC_CLOSED, RUNNING, FINISHED),
    REPLY(SRC_CLOSED, NEVER, FINISHED),
    REPLY(SRC_CLOSED, ENDED, FINISHED),

    /* Destination: preparing and receiving. */
    WRITE(DST_NONE, MSG_PREPARE, PREPARING, GO(DST_PREPARING, DO(START_VM)),
          GO(DST_NONE, SEND(REFUSED), REPORT(JOURNAL_FAILED))),
    REPLY(DST_NONE, ASK, UNKNOWN),
    REPLY(DST_NONE, COMMIT, UNKNOWN),
    REPLY(DST_NONE, COMMIT_SOLE, UNKNOWN),
    REPLY(DST_NONE, ABORT, UNKNOWN),

    WRITE(DST_PREPARING, READY, PREPARING, GO(DST_PREPARED, SEND(PREPARED)),
          GO(DST_KILLING, REPORT(JOURNAL_FAILED), DO(KILL_VM))),
    ON(DST_PREPARING, FAILED, GO(DST_KILLING, DO(KILL_VM))),
    ON(DST_PREPARING, CANCEL, GO(DST_KILLING, DO(KILL_VM))),
    ON(DST_PREPARING, VM_GONE, GO(DST_KILLING, DO(KILL_VM))),
    ON(DST_PREPARING, MSG_ABORT, GO(DST_KILLING, DO(KILL_VM))),
    ON(DST_PREPARING, MSG_FINISHED, GO(DST_KILLING, DO(KILL_VM))),

    ON(DST_PREPARED, TIMER, GO(DST_PREPARED, SEND(PREPARED))),
    REPLY(DST_PREPARED, PREPARE, PREPARED),
    REPLY(DST_PREPARED, ASK, PREPARED),
    WRITE(DST_PREPARED, LOAD_DONE, LOADED, GO(DST_LOADED, SEND(LOADED)),
          GO(DST_KILLING, REPORT(JOURNAL_FAILED), DO(KILL_VM))),
    ON(DST_PREPARED, FAILED, GO(DST_KILLING, DO(KILL_VM))),
    ON(DST_PREPARED, CANCEL, GO(DST_KILLING, DO(KILL_VM))),
    ON(DST_PREPARED, VM_GONE, GO(DST_KILLING, DO(KILL_VM))),
    ON(DST_PREPARED, MSG_ABORT, GO(DST_KILLING, DO(KILL_VM))),
    ON(DST_PREPARED, MSG_FINISHED, GO(DST_KILLING, DO(KILL_VM))),
    ON(DST_PREPARED, MSG_UNKNOWN, GO(DST_KILLING, DO(KILL_VM))),

    /* Destination: loaded. RUN is the point of no return. */
    ON(DST_LOADED, TIMER, GO(DST_LOADED, SEND(LOADED))),
    REPLY(DST_LOADED, ASK, LOADED),
    WRITE(DST_LOADED, MSG_COMMIT, RUN, GO(DST_STARTING, DO(RESUME_VM)),
          GO(DST_KILLING, REPORT(JOURNAL_FAILED), DO(KILL_VM))),
    WRITE(DST_LOADED, MSG_COMMIT_SOLE, RUN, GO(DST_RESTARTING, DO(RESUME_VM)), STAY(DST_LOADED)),
    WRITE(DST_LOADED, RESOLVE_HERE, RUN, GO(DST_RESTARTING, DO(RESUME_VM)), STAY(DST_LOADED)),
    ON(DST_LOADED, MSG_ABORT, GO(DST_KILLING, DO(KILL_VM))),
    ON(DST_LOADED, RESOLVE_GONE, GO(DST_KILLING, DO(KILL_VM))),
    ON(DST_LOADED, VM_GONE, GO(DST_KILLING, DO(KILL_VM))),
    ON(DST_LOADED, MSG_UNKNOWN, GO(DST_LOADED, REPORT(PEER_FORGOT))),
    ON(DST_LOADED, MSG_FINISHED, GO(DST_LOADED, REPORT(PEER_FORGOT))),
    ON(DST_LOADED, CANCEL, GO(DST_LOADED, REPORT(CANCEL_AT_SOURCE))),

    /* Destination: starting. A first start that surely failed is taken back: the source waits. */
    WRITE(DST_STARTING, RESUMED, RUNNING, GO(DST_RUNNING, SEND(RUNNING)),
          GO(DST_STARTED, SEND(RUNNING), REPORT(JOURNAL_FAILED))),
    WRITE(DST_STARTING, RESUME_FAILED, REVOKED,
          GO(DST_REVOKING, REPORT(START_FAILED), DO(KILL_VM)),
          GO(DST_STALLED, REPORT(START_FAILED))),
    ON(DST_STARTING, RESUME_UNSURE, GO(DST_STALLED, REPORT(START_FAILED))),
    WRITE(DST_STARTING, VM_GONE, ENDED, GO(DST_ENDED, SEND(ENDED), REPORT(ENDED)),
          GO(DST_ENDED, SEND(ENDED), REPORT(ENDED))),
    ON(DST_STARTING, MSG_COMMIT_SOLE, GO(DST_RESTARTING)),
    ON(DST_STARTING, CANCEL, GO(DST_STARTING, REPORT(TOO_LATE))),
    WRITE(DST_RESTARTING, RESUMED, RUNNING, GO(DST_RUNNING, SEND(RUNNING)),
          GO(DST_STARTED, SEND(RUNNING), REPORT(JOURNAL_FAILED))),
    ON(DST_RESTARTING, RESUME_FAILED, GO(DST_STALLED, REPORT(START_FAILED))),
    ON(DST_RESTARTING, RESUME_UNSURE, GO(DST_STALLED, REPORT(START_FAILED))),
    WRITE(DST_RESTARTING, VM_GONE, ENDED, GO(DST_ENDED, SEND(ENDED), REPORT(ENDED)),
          GO(DST_ENDED, SEND(ENDED), REPORT(ENDED))),
    ON(DST_RESTARTING, CANCEL, GO(DST_RESTARTING, REPORT(TOO_LATE))),
    ON(DST_STALLED, TIMER, GO(DST_RESTARTING, DO(RESUME_VM))),
    ON(DST_STALLED, CANCEL, GO(DST_STALLED, REPORT(TOO_LATE))),
    WRITE(DST_STALLED, VM_GONE, ENDED, GO(DST_ENDED, SEND(ENDED), REPORT(ENDED)),
          GO(DST_ENDED, SEND(ENDED), REPORT(ENDED))),
    WRITE(DST_STARTED, TIMER, RUNNING, GO(DST_RUNNING, SEND(RUNNING)),
          GO(DST_STARTED, SEND(RUNNING))),
    ON(DST_STARTED, CANCEL, GO(DST_STARTED, REPORT(TOO_LATE))),
    WRITE(DST_STARTED, VM_GONE, ENDED, GO(DST_ENDED, SEND(ENDED), REPORT(ENDED)),
          GO(DST_ENDED, SEND(ENDED), REPORT(ENDED))),

    /* Destination: it owns the VM. */
    ON(DST_RUNNING, TIMER, GO(DST_RUNNING, SEND(RUNNING))),
    REPLY(DST_RUNNING, COMMIT, RUNNING),
    REPLY(DST_RUNNING, COMMIT_SOLE, RUNNING),
    REPLY(DST_RUNNING, ABORT, RUNNING),
    REPLY(DST_RUNNING, ASK, RUNNING),
    WRITE(DST_RUNNING, VM_GONE, ENDED, GO(DST_ENDED, SEND(ENDED)), GO(DST_ENDED, SEND(ENDED))),
    WRITE(DST_RUNNING, MSG_FINISHED, DST_CLOSED, GO(DST_CLOSED), STAY(DST_RUNNING)),
    WRITE(DST_RUNNING, MSG_UNKNOWN, DST_CLOSED, GO(DST_CLOSED), STAY(DST_RUNNING)),
    ON(DST_ENDED, TIMER, GO(DST_ENDED, SEND(ENDED))),
    REPLY(DST_ENDED, COMMIT, ENDED),
    REPLY(DST_ENDED, COMMIT_SOLE, ENDED),
    REPLY(DST_ENDED, ABORT, ENDED),
    REPLY(DST_ENDED, ASK, ENDED),
    WRITE(DST_ENDED, MSG_FINISHED, DST_CLOSED, GO(DST_CLOSED), STAY(DST_ENDED)),
    WRITE(DST_ENDED, MSG_UNKNOWN, DST_CLOSED, GO(DST_CLOSED), STAY(DST_ENDED)),

    /*
     * Destination: it does not, and never will. NEVER need not be on disk for that: a record before
     * RUN, or REVOKED, with a VMM that is dead for good is recovered as a state that knows only
     * NEVER.
     */
    ON(DST_KILLING, TIMER, GO(DST_KILLING, DO(KILL_VM))),
    WRITE(DST_KILLING, VM_GONE, NEVER, GO(DST_NEVER, SEND(NEVER)), GO(DST_NEVER, SEND(NEVER))),
    ON(DST_REVOKING, TIMER, GO(DST_REVOKING, DO(KILL_VM))),
    WRITE(DST_REVOKING, VM_GONE, NEVER, GO(DST_NEVER, SEND(NEVER)), GO(DST_NEVER, SEND(NEVER))),
    ON(DST_NEVER, TIMER, GO(DST_NEVER, SEND(NEVER))),
    REPLY(DST_NEVER, PREPARE, NEVER),
    REPLY(DST_NEVER, COMMIT, NEVER),
    REPLY(DST_NEVER, COMMIT_SOLE, NEVER),
    REPLY(DST_NEVER, ABORT, NEVER),
    REPLY(DST_NEVER, ASK, NEVER),
    WRITE(DST_NEVER, MSG_FINISHED, DST_CLOSED, GO(DST_CLOSED), STAY(DST_NEVER)),
    WRITE(DST_NEVER, MSG_UNKNOWN, DST_CLOSED, GO(DST_CLOSED), STAY(DST_NEVER)),

    /* Destination: finished. Only a message that was delayed for long can still come. */
    REPLY(DST_CLOSED, COMMIT, UNKNOWN),
    REPLY(DST_CLOSED, COMMIT_SOLE, UNKNOWN),
    REPLY(DST_CLOSED, ABORT, UNKNOWN),
    REPLY(DST_CLOSED, ASK, UNKNOWN),
};

#define ROWS (sizeof(table) / sizeof(table[0]))

static const struct {
    const char *name, *text;
    enum handover_record record;
    bool settled, in_doubt;
} states[] = {
#define X(id, record, settled, in_doubt, text)                                                     \
    [HANDOVER_##id] = {#id, text, HANDOVER_REC_##record, settled, in_doubt},
    HANDOVER_STATES(X)
#undef X
};

static const struct {
    const char *name;
    enum handover_role role;
    enum handover_state if_alive, if_dead;
    bool settled;
} records[HANDOVER_REC_COUNT] = {
#define X(id, number, role, if_alive, if_dead, settled)                                            \
    [number] = {#id, HANDOVER_##role, HANDOVER_##if_alive, HANDOVER_##if_dead, settled},
    HANDOVER_RECORDS(X)
#undef X
};

void handover_init(struct handover *h, enum handover_role role)
{
    *h = (struct handover){
        .role = role, .state = role == HANDOVER_SOURCE ? HANDOVER_SRC_NONE : HANDOVER_DST_NONE};
}

void handover_recover(struct handover *h, enum handover_record record, bool vm_alive)
{
    *h = (struct handover){.role = records[record].role,
                           .state = vm_alive ? records[record].if_alive : records[record].if_dead};
}

static const struct handover_row *find_row(enum handover_state state, enum handover_event event)
{
    for (size_t i = 0; i < ROWS; i++) {
        if (table[i].state == state && table[i].event == event)
            return &table[i];
    }
    return NULL;
}

static void take(struct handover *h, const struct handover_outcome *outcome,
                 struct handover_actions *ret_actions)
{
    h->state = outcome->state;
    for (int i = 0; i < HANDOVER_ACTIONS_MAX && outcome->actions[i].kind; i++)
        ret_actions->list[ret_actions->count++] = outcome->actions[i];
}

bool handover_step(struct handover *h, enum handover_event event,
                   struct handover_actions *ret_actions)
{
    ret_actions->count = 0;
    if (h->pending) {
        if (event != HANDOVER_EV_JOURNALED && event != HANDOVER_EV_JOURNAL_FAILED)
            return false;
        const struct handover_row *row = h->pending;
        h->pending = NULL;
        take(h, event == HANDOVER_EV_JOURNALED ? &row->then : &row->otherwise, ret_actions);
        return true;
    }
    const struct handover_row *row = find_row(h->state, event);
    if (!row)
        return false;
    if (row->record == HANDOVER_REC_NONE) {
        take(h, &row->then, ret_actions);
        return true;
    }
    h->pending = row;
    ret_actions->count = 1;
    ret_actions->list[0] = (struct handover_action){HANDOVER_ACT_JOURNAL, (uint8_t)row->record};
    return true;
}

bool handover_takes(const struct handover *h, enum handover_event event)
{
    return !h->pending && find_row(h->state, event);
}

bool handover_refuses_cancel(const struct handover *h, enum handover_notice *ret_why)
{
    const struct handover_row *row = find_row(h->state, HANDOVER_EV_CANCEL);
    if (!row || row->then.state != h->state)
        return false;
    *ret_why = row->then.actions[0].arg;
    return true;
}

bool handover_is_settled(const struct handover *h)
{
    return !h->pending && states[h->state].settled;
}

bool handover_is_in_doubt(const struct handover *h)
{
    return states[h->state].in_doubt;
}

bool handover_is_finished(const struct handover *h)
{
    switch (h->state) {
    case HANDOVER_SRC_NONE:
    case HANDOVER_SRC_DONE:
    case HANDOVER_SRC_CLOSED:
    case HANDOVER_DST_NONE:
    case HANDOVER_DST_CLOSED:
        return !h->pending;
    default:
        return false;
    }
}

enum handover_role handover_record_role(enum handover_record record)
{
    return records[record].role;
}

bool handover_record_is_settled(enum handover_record record)
{
    return records[record].settled;
}

bool handover_record_is_valid(unsigned number)
{
    return number < HANDOVER_REC_COUNT && records[number].name;
}

const char *handover_state_name(enum handover_state state)
{
    return states[state].name;
}

const char *handover_state_text(enum handover_state state)
{
    return states[state].text;
}

enum handover_record handover_state_record(enum handover_state state)
{
    return states[state].record;
}

const char *handover_record_name(enum handover_record record)
{
    if (record == HANDOVER_REC_ANY)
        return "ANY";
    return record == HANDOVER_REC_NONE ? "NONE" : records[record].name;
}

const char *handover_message_name(enum handover_message message)
{
    static const char *const names[] = {
#define X(id, ...) #id,
        HANDOVER_MESSAGES(X)
#undef X
    };
    return names[message];
}

const char *handover_event_name(enum handover_event event)
{
    static const char *const names[] = {
#define X(id, ...) "MSG_" #id,
#define Y(id, ...) #id,
        HANDOVER_MESSAGES(X) HANDOVER_LOCAL_EVENTS(Y)
#undef X
#undef Y
    };
    return names[event];
}

const char *handover_action_name(enum handover_action_kind kind)
{
    static const char *const names[] = {
        "NONE",
#define X(id, ...) #id,
        HANDOVER_ACTIONS(X)
#undef X
    };
    return names[kind];
}

const char *handover_notice_name(enum handover_notice notice)
{
    static const char *const names[] = {
#define X(id, ...) #id,
        HANDOVER_NOTICES(X)
#undef X
    };
    return names[notice];
}

const char *handover_notice_text(enum handover_notice notice)
{
    static const char *const texts[] = {
#define X(id, text) text,
        HANDOVER_NOTICES(X)
#undef X
    };
    return texts[notice];
}

const struct handover_row *handover_table(size_t *ret_count)
{
    *ret_count = ROWS;
    return table;
}

/* SPDX-License-Identifier: Apache-2.0 */
#include "world.h"

#include <string.h>

bool world_row_taken[256][2];

#define BIT(m) (uint16_t)(1u << (m))

void world_init(struct world *w)
{
    memset(w, 0, sizeof(*w));
    w->side[SRC] = (struct side){.up = 1, .state = HANDOVER_SRC_NONE, .vm = VM_RUNS};
    w->side[DST] = (struct side){.up = 1, .state = HANDOVER_DST_NONE, .vm = VM_ABSENT};
}

static bool alive(const struct side *s)
{
    return s->vm != VM_ABSENT && s->vm != VM_DEAD;
}

static bool idle(const struct side *s)
{
    return s->up && !s->actions[0].kind;
}

static void breaks(struct world *w, enum rule rule)
{
    if (!w->broken)
        w->broken = (uint8_t)rule;
}

static bool source_gave_up(const struct world *w)
{
    const struct side *s = &w->side[SRC];
    return (s->record == HANDOVER_REC_ABORTING && w->s_stands != STANDS) ||
           s->record == HANDOVER_REC_ABORTED ||
           s->state == HANDOVER_SRC_REVERTING || w->s_said_abort || w->s_ran_on;
}

/*
 * A VMM that died unseen before RUN was recorded has not started: the next record takes that back.
 * If it cannot be written, or the agent crashes before, a second fault has made it a start.
 */
static void lose_dead_start(struct world *w)
{
    const struct side *d = &w->side[DST];
    w->d_died_with_run |= d->record == HANDOVER_REC_RUN && w->d_died;
    w->may_be_lost |= w->d_died_with_run;
}

/*
 * A source that died unseen as it was sent: that its agent does not know yet that all is, crashes
 * before it writes that down, or cannot write that it undoes, is a second fault.
 */
static void lose_dead_copy(struct world *w, bool gives_up)
{
    if (!gives_up || alive(&w->side[SRC]))
        return;
    w->may_be_lost = 1;
    w->d_has_only = 0;
}

static void destination_fails(struct world *w)
{
    w->d_failed = 1;
    lose_dead_start(w);
}

/* That no vCPU started stays true of a VMM that has died since. */
static bool has_not_started(const struct side *s, int role)
{
    return role == DST && s->answer == HANDOVER_EV_RESUME_FAILED;
}

/* What the death of its VMM is to an agent. */
static enum handover_event death(const struct world *w, int role)
{
    const struct handover h = {.role = (enum handover_role)role, .state = w->side[role].state};
    return role == SRC && w->s_stands == STANDS && handover_takes(&h, HANDOVER_EV_DIED_STANDING)
               ? HANDOVER_EV_DIED_STANDING
               : HANDOVER_EV_VM_GONE;
}

/* ---- The machines ---- */

static void note_row(const struct handover *h, enum handover_event event, bool failed)
{
    size_t count;
    const struct handover_row *rows = handover_table(&count);
    for (size_t i = 0; i < count; i++) {
        if (rows[i].state == h->state && rows[i].event == event)
            world_row_taken[i][failed] = true;
    }
}

static void check_records(struct world *w)
{
    for (int i = 0; i < 2; i++) {
        enum handover_record promised = handover_state_record(w->side[i].state);
        if (w->side[i].up && promised != HANDOVER_REC_ANY && promised != w->side[i].record &&
            !w->wiped)
            breaks(w, RULE_RECORD_UNTRUE);
    }
}

/* Feed an event to one machine. `can_write`: a record that it wants to write can be written. */
static bool feed(struct world *w, int role, enum handover_event event, bool can_write)
{
    struct side *s = &w->side[role];
    struct handover h = {.role = (enum handover_role)role, .state = s->state};
    struct handover before = h;
    struct handover_actions actions;
    if (!handover_step(&h, event, &actions))
        return false;
    bool failed = false;
    if (actions.count == 1 && actions.list[0].kind == HANDOVER_ACT_JOURNAL) {
        failed = !can_write;
        if (can_write)
            s->record = actions.list[0].arg;
        else if (role == DST)
            destination_fails(w);
        else
            lose_dead_copy(w, s->state == HANDOVER_SRC_SENT);
        handover_step(&h, failed ? HANDOVER_EV_JOURNAL_FAILED : HANDOVER_EV_JOURNALED, &actions);
    } else if (!can_write) {
        return false; /* nothing to write: the same as can_write */
    }
    note_row(&before, event, failed);
    s->state = (uint8_t)h.state;
    memset(s->actions, 0, sizeof(s->actions));
    int n = 0;
    for (int i = 0; i < actions.count; i++) {
        if (actions.list[i].kind == HANDOVER_ACT_REPORT)
            continue;
        if (handover_is_settled(&before) && actions.list[i].kind != HANDOVER_ACT_SEND &&
            before.state != HANDOVER_DST_NONE)
            breaks(w, RULE_SETTLED_TOUCHES_VM);
        s->actions[n++] = actions.list[i];
    }
    w->d_knows_sole |= w->side[DST].state == HANDOVER_DST_RESTARTING;
    check_records(w);
    return true;
}

/* ---- The VMMs ---- */

static void vm_ends(struct world *w, int role)
{
    struct side *s = &w->side[role];
    s->vm = VM_DEAD;
    s->cont = s->answer = 0;
    s->gone = s->up;
    if (role == DST && w->copy != COPY_NONE)
        w->copy = COPY_BROKEN;
}

static void vm_dies(struct world *w, int role)
{
    const struct side *s = &w->side[SRC], *d = &w->side[DST];
    if (role == SRC) {
        bool safe = d->vm == VM_RUNS || (d->vm == VM_LOADED && !source_gave_up(w) &&
                                         d->state != HANDOVER_DST_KILLING &&
                                         d->state != HANDOVER_DST_REVOKING);
        w->may_be_lost |= !safe;
        w->d_has_only |= safe;
    } else {
        w->d_died = 1;
        w->d_died_with_run |=
            d->record == HANDOVER_REC_RUN || d->record == HANDOVER_REC_RUNNING;
        w->may_be_lost |= w->d_died_with_run || s->vm == VM_DEAD;
    }
    vm_ends(w, role);
}

static void vm_runs(struct world *w, int role)
{
    struct side *s = &w->side[role];
    if (w->side[!role].vm == VM_RUNS)
        breaks(w, RULE_TWO_RUN);
    if (!w->operator_spoke && (role == SRC ? w->d_ran : w->s_ran_on))
        breaks(w, RULE_STALE_START);
    if (role == DST && s->vm != VM_LOADED && s->vm != VM_RUNS)
        breaks(w, RULE_INCOMPLETE_START);
    if (role == SRC && s->vm != VM_RUNS && w->copy == COPY_SENT)
        w->s_ran_on = 1;
    if (role == DST)
        w->d_ran = 1;
    s->vm = VM_RUNS;
}

/* ---- Actions ---- */

static void kill_vm(struct world *w, int role)
{
    struct side *s = &w->side[role];
    if (role == SRC && !w->d_ran && !w->d_died_with_run && !w->operator_spoke)
        breaks(w, RULE_KILLED_LAST_COPY);
    if (role == DST && !w->operator_spoke) {
        bool excused = (source_gave_up(w) && !w->d_has_only) || alive(&w->side[SRC]) ||
                       (w->d_failed && !w->d_knows_sole);
        if (s->vm == VM_RUNS || (s->vm == VM_LOADED && !excused))
            breaks(w, RULE_KILLED_LAST_COPY);
        w->may_be_lost |= s->vm == VM_LOADED && !alive(&w->side[SRC]);
    }
    if (alive(s))
        vm_ends(w, role);
    s->gone = 1;
}

static void execute(struct world *w, int role)
{
    struct side *s = &w->side[role];
    struct handover_action action = s->actions[0];
    memmove(s->actions, s->actions + 1, sizeof(s->actions) - sizeof(s->actions[0]));
    memset(&s->actions[WORLD_ACTIONS - 1], 0, sizeof(s->actions[0]));
    switch ((enum handover_action_kind)action.kind) {
    case HANDOVER_ACT_SEND:
        w->net[!role] |= BIT(action.arg);
        w->s_said_abort |= action.arg == HANDOVER_MSG_ABORT;
        break;
    case HANDOVER_ACT_START_VM:
        s->vm = VM_PAUSED;
        if (w->copy != COPY_NONE)
            w->copy = COPY_BROKEN;
        break;
    case HANDOVER_ACT_START_TRANSFER:
        if (w->copy == COPY_NONE)
            w->copy = COPY_RUNNING;
        break;
    case HANDOVER_ACT_STOP_TRANSFER:
        if (w->copy == COPY_RUNNING || w->copy == COPY_PAUSED)
            w->copy = COPY_BROKEN;
        break;
    case HANDOVER_ACT_RESUME_VM:
        s->cont = alive(s);
        s->gone |= !alive(s);
        if (role == SRC && alive(s) && w->s_stands == STANDS)
            w->s_stands = STOOD_UNTIL_CONT;
        if (!alive(s) && s->state == HANDOVER_DST_STARTING)
            s->answer = HANDOVER_EV_RESUME_FAILED;
        break;
    case HANDOVER_ACT_KILL_VM:
        kill_vm(w, role);
        break;
    default:
        break;
    }
}

/* ---- Crashes ---- */

static void crash(struct world *w, int role)
{
    struct side *s = &w->side[role];
    if (role == DST) {
        lose_dead_start(w);
    } else {
        lose_dead_copy(w, s->record == HANDOVER_REC_ABORTING);
        w->s_stands = NOT_KNOWN;
    }
    s->up = s->answer = s->gone = 0;
    s->state = role == SRC ? HANDOVER_SRC_NONE : HANDOVER_DST_NONE;
    memset(s->actions, 0, sizeof(s->actions));
    if (role == SRC && (w->copy == COPY_RUNNING || w->copy == COPY_PAUSED))
        w->copy = COPY_BROKEN;
    if (role == DST && w->copy != COPY_NONE && s->vm != VM_LOADED && s->vm != VM_RUNS)
        w->copy = COPY_BROKEN;
}

static void restart(struct world *w, int role)
{
    struct side *s = &w->side[role];
    struct handover h;
    handover_init(&h, (enum handover_role)role);
    if (s->record)
        handover_recover(&h, s->record, alive(s));
    s->up = 1;
    s->state = (uint8_t)h.state;
}

/* ---- All moves ---- */

struct walk {
    void (*visit)(const struct world *next, void *arg);
    void *arg;
    const struct world *from;
};

static void emit(const struct walk *walk, const struct world *next)
{
    walk->visit(next, walk->arg);
}

/* `base` with the event fed, with and without a journal that works. False if it means nothing. */
static bool emit_event(const struct walk *walk, const struct world *base, int role,
                       enum handover_event event)
{
    struct world next = *base;
    if (!feed(&next, role, event, true))
        return false;
    emit(walk, &next);
    next = *base;
    if (feed(&next, role, event, false))
        emit(walk, &next);
    return true;
}

static void agent_moves(const struct walk *walk, int role)
{
    const struct side *s = &walk->from->side[role];
    struct world next = *walk->from;
    if (s->up && s->actions[0].kind) {
        execute(&next, role);
        emit(walk, &next);
    }
    if (!idle(s))
        return;
    /* A death between the look and the record is not seen. */
    if (s->gone && s->state == HANDOVER_DST_LOADED &&
        walk->from->net[role] & BIT(HANDOVER_MSG_COMMIT))
        emit_event(walk, &next, role, HANDOVER_EV_MSG_COMMIT);
    if (s->gone && (s->state == HANDOVER_SRC_SENDING || s->state == HANDOVER_SRC_SENT)) {
        lose_dead_copy(&next, s->state == HANDOVER_SRC_SENDING);
        emit_event(walk, &next, role, HANDOVER_EV_CANCEL);
        emit_event(walk, &next, role, HANDOVER_EV_FAILED);
        next = *walk->from;
    }
    if (s->gone && !has_not_started(s, role)) {
        next.side[role].gone = 0;
        if (!emit_event(walk, &next, role, death(&next, role)))
            emit(walk, &next);
        return; /* it outranks messages and orders */
    }
    if (s->answer) {
        next.side[role].answer = 0;
        emit_event(walk, &next, role, s->answer);
    }
    if (s->gone)
        return;
    next = *walk->from;
    emit_event(walk, &next, role, HANDOVER_EV_TIMER);
    emit_event(walk, &next, role, HANDOVER_EV_CANCEL);
    emit_event(walk, &next, role, HANDOVER_EV_FAILED);
    for (int m = 0; m < HANDOVER_MSG_COUNT; m++) {
        if (walk->from->net[role] & BIT(m))
            emit_event(walk, &next, role, (enum handover_event)m);
    }
}

static void copy_moves(const struct walk *walk)
{
    const struct world *w = walk->from;
    const struct side *s = &w->side[SRC], *d = &w->side[DST];
    struct world next = *w;
    if (idle(s) && s->state == HANDOVER_SRC_NONE && s->vm == VM_RUNS && !w->wiped)
        emit_event(walk, &next, SRC, HANDOVER_EV_START);
    if (idle(s) && s->state == HANDOVER_SRC_SENDING && w->copy == COPY_RUNNING &&
        s->vm == VM_RUNS) {
        next.side[SRC].vm = VM_PAUSED;
        next.copy = COPY_PAUSED;
        emit(walk, &next);
        next = *w;
    }
    if (idle(s) && s->state == HANDOVER_SRC_SENDING && w->copy == COPY_PAUSED &&
        s->vm == VM_PAUSED) {
        next.copy = COPY_SENT;
        emit(walk, &next);
        next = *w;
    }
    if (idle(s) && s->state == HANDOVER_SRC_SENDING && w->copy == COPY_SENT && s->vm == VM_PAUSED) {
        next.s_stands = STANDS;
        emit_event(walk, &next, SRC, HANDOVER_EV_TRANSFERRED);
        next = *w;
    }
    if (idle(d) && d->state == HANDOVER_DST_PREPARING && d->vm == VM_PAUSED)
        emit_event(walk, &next, DST, HANDOVER_EV_READY);
    if (idle(d) && d->state == HANDOVER_DST_PREPARED && d->vm == VM_PAUSED &&
        w->copy == COPY_SENT) {
        next.side[DST].vm = VM_LOADED;
        emit_event(walk, &next, DST, HANDOVER_EV_LOAD_DONE);
    }
}

/* To a `cont`: it may take effect yet, or none will. */
static void lose_answer(const struct walk *walk, int role)
{
    struct world next = *walk->from;
    next.side[role].answer = HANDOVER_EV_RESUME_UNSURE;
    if (role == SRC)
        next.s_stands = NOT_KNOWN;
    emit(walk, &next);
    next.side[role].cont = 0;
    emit(walk, &next);
}

static void fault_moves(const struct walk *walk, int role)
{
    const struct world *w = walk->from;
    const struct side *s = &w->side[role];
    struct world next = *w;
    if (s->cont) {
        next.side[role].cont = 0;
        struct world failed = next;
        vm_runs(&next, role);
        next.side[role].answer = s->up ? HANDOVER_EV_RESUMED : 0;
        emit(walk, &next);
        if (s->vm != VM_RUNS) {
            failed.d_failed |= role == DST;
            if (role == SRC && w->s_stands == STOOD_UNTIL_CONT)
                failed.s_stands = STANDS;
            failed.side[role].answer = s->up ? HANDOVER_EV_RESUME_FAILED : 0;
            emit(walk, &failed);
        }
        if (s->up)
            lose_answer(walk, role);
    }
    next = *w;
    if (alive(s)) {
        vm_dies(&next, role);
        emit(walk, &next);
    }
    next = *w;
    if (s->up)
        crash(&next, role);
    else
        restart(&next, role);
    emit(walk, &next);
    next = *w;
    if (!w->wiped && !s->up && s->vm == VM_DEAD) { /* it loses its journal, and its connections */
        next.wiped = 1;
        next.side[role].record = HANDOVER_REC_NONE;
        next.net[SRC] = next.net[DST] = 0;
        emit(walk, &next);
    }
}

/* An operator resolves here when the other host is down, its VMM dead. */
static void operator_moves(const struct walk *walk, int role)
{
    const struct world *w = walk->from;
    const struct side *s = &w->side[role], *other = &w->side[!role];
    struct world next = *w;
    next.operator_spoke = 1;
    if (!idle(s) || s->gone || other->up)
        return;
    if (!alive(other))
        emit_event(walk, &next, role, HANDOVER_EV_RESOLVE_HERE);
    emit_event(walk, &next, role, HANDOVER_EV_RESOLVE_GONE);
}

void world_successors(const struct world *w, void (*visit)(const struct world *next, void *arg),
                      void *arg)
{
    struct walk walk = {visit, arg, w};
    copy_moves(&walk);
    for (int role = 0; role < 2; role++) {
        agent_moves(&walk, role);
        fault_moves(&walk, role);
        operator_moves(&walk, role);
    }
}

/* ---- The end of faults ---- */

/* Something that happens by itself: true if it did. */
static bool settle_one(struct world *w, int role)
{
    struct side *s = &w->side[role];
    if (s->actions[0].kind) {
        execute(w, role);
    } else if (s->gone && !has_not_started(s, role)) {
        s->gone = 0;
        feed(w, role, death(w, role), true);
    } else if (s->cont) {
        s->cont = 0;
        vm_runs(w, role);
        s->answer = HANDOVER_EV_RESUMED;
    } else if (s->answer) {
        enum handover_event event = s->answer;
        s->answer = 0;
        feed(w, role, event, true);
    } else if (w->net[role]) {
        int m = __builtin_ctz(w->net[role]);
        w->net[role] &= (uint16_t)~BIT(m);
        feed(w, role, (enum handover_event)m, true);
    } else {
        return false;
    }
    return true;
}

static bool copy_one(struct world *w)
{
    struct side *s = &w->side[SRC], *d = &w->side[DST];
    bool sending = s->state == HANDOVER_SRC_SENDING;
    bool copying = sending || s->state == HANDOVER_SRC_PREPARING || s->state == HANDOVER_SRC_SENT;
    bool receiving = d->state == HANDOVER_DST_PREPARING || d->state == HANDOVER_DST_PREPARED;
    if (w->copy == COPY_BROKEN && copying)
        return feed(w, SRC, HANDOVER_EV_FAILED, true);
    if (receiving && (w->copy == COPY_BROKEN ||
                      (w->copy == COPY_NONE && !sending && s->state != HANDOVER_SRC_PREPARING)))
        return feed(w, DST, HANDOVER_EV_FAILED, true);
    if (sending && w->copy == COPY_RUNNING && s->vm == VM_RUNS) {
        s->vm = VM_PAUSED;
        w->copy = COPY_PAUSED;
        return true;
    }
    if (sending && w->copy == COPY_PAUSED && s->vm == VM_PAUSED) {
        w->copy = COPY_SENT;
        return true;
    }
    if (sending && w->copy == COPY_SENT && s->vm == VM_PAUSED) {
        w->s_stands = STANDS;
        return feed(w, SRC, HANDOVER_EV_TRANSFERRED, true);
    }
    if (d->state == HANDOVER_DST_PREPARING && d->vm == VM_PAUSED)
        return feed(w, DST, HANDOVER_EV_READY, true);
    if (d->state == HANDOVER_DST_PREPARED && d->vm == VM_PAUSED && w->copy == COPY_SENT) {
        d->vm = VM_LOADED;
        return feed(w, DST, HANDOVER_EV_LOAD_DONE, true);
    }
    return false;
}

static bool finished(const struct world *w)
{
    for (int i = 0; i < 2; i++) {
        struct handover h = {.role = (enum handover_role)i, .state = w->side[i].state};
        if (!handover_is_finished(&h))
            return false;
    }
    return true;
}

static bool stands(const struct side *s)
{
    return alive(s) && s->vm != VM_RUNS;
}

bool world_calms_down(const struct world *from)
{
    struct world w = *from;
    w.calm = 1;
    w.net[SRC] = w.net[DST] = 0;
    for (int i = 0; i < 2; i++) {
        if (!w.side[i].up)
            restart(&w, i);
    }
    for (int rounds = 0; rounds < 12; rounds++) {
        for (int steps = 0; settle_one(&w, SRC) || settle_one(&w, DST) || copy_one(&w); steps++) {
            if (steps > 100)
                return false;
        }
        if (w.broken)
            return false;
        if (finished(&w))
            return !stands(&w.side[SRC]) && !stands(&w.side[DST]) &&
                   (w.side[SRC].vm == VM_RUNS || w.side[DST].vm == VM_RUNS || w.may_be_lost);
        feed(&w, SRC, HANDOVER_EV_TIMER, true);
        feed(&w, DST, HANDOVER_EV_TIMER, true);
    }
    return false;
}

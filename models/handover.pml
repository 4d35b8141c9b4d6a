/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The hand-over of one VM: both agents, both VMMs, both journals and the network between them.
 * The agents' steps are not written here: handover_table prints them from the table that the
 * agents execute (migrate/handover.c), and this file includes them. It adds the world around them.
 *
 * Every move of the do-loop at the end is one atomic step, so all interleavings are explored. The
 * world is as hostile as it can be, without counting, until it "calms":
 *
 *   network   A message once sent may arrive at any time from then on, in any order, any number of
 *             times, or never.
 *   agents    Crash between any two actions, any number of times; a record being written at the
 *             crash is on disk or not; a `cont` that was sent before may take effect after.
 *   journals  Any write may fail, with nothing written.
 *   VMMs      Die at any moment; `cont` fails at will, its answer is lost at will (it takes effect
 *             later, or never), and with -DLOCKS=1 it fails when the other holds the image locks. Without LOCKS they fence nothing, as on RBD: the journal alone must keep
 *             the promise.
 *   hosts     A host that dies is a VMM that dies and an agent that crashes; it may never come
 *             back.
 *   users     Cancel at either end at any time. An operator resolves only when the other host is
 *             fenced.
 *   disks     (-DWIPE) A host that died may come back with an empty journal; the connections died
 *             with it, so that nothing sent before arrives after.
 *
 * Once calm, what is up answers, nothing is lost, and TIMER comes only when nothing else can
 * happen.
 *
 * Properties:
 *   P1  No two copies run, at no instant.
 *   P2  No stale copy starts: not the source's once the destination's ran, not the destination's
 *       once the source's ran on. (An operator's word overrides P2, never P1.)
 *   P3  A copy starts only with all its memory and state.
 *   P4  Nobody kills the last complete copy; the guest is lost only to the death of a VMM that held
 *       the sole complete copy or had RUN, to a start that failed at the one while the other was
 *       dead, or to an operator's word. Two things count as the first: the death of the source's
 *       VMM once the source, which undoes, has told the destination to discard what it loaded, has
 *       sent its own VM a `cont` that was not surely refused, or does not know that all was sent;
 *       and that of a VMM between its agent's look and the record ABORTING or RUN, if that agent
 *       then crashes before it has written what the death means, or cannot write ABORTING, or that
 *       it takes RUN back.
 *   P5  Calm implies that the run ends: both sides finished, by themselves, with exactly one copy
 *       running (unless P4 lost it); by an operator only if a host or a journal never came back.
 *   P6  What a state says about the journal and the VM is true: what status says of a hand-over
 *       that waits never concerns a VM that runs.
 *   P7  No `cont` meets the other's image locks, also where nothing enforces them.
 *
 * -DMISTAKE_... seeds a mistake, which must be caught.
 */
#ifndef LOCKS
#define LOCKS 0
#endif

#define DEAD 0
#define PAUSED 1 /* source: stopped or postmigrate; destination: incoming, not loaded */
#define RUNS 2
#define LOADED 3 /* destination: complete, verified, paused */
#define ABSENT 4 /* destination: none was started */

/* ---- Seeded mistakes: rows that a careless programmer might have written. ---- */

#ifdef MISTAKE_RESUME_WITHOUT_NEVER
#define s_MISTAKES :: s_state == SRC_COMMITTED && event == EV_TIMER -> \
    s_state = SRC_RESUMING; s_act[0] = ACT_RESUME_VM;
#endif
#ifdef MISTAKE_RUN_ON_LOADED
#define d_MISTAKES :: d_state == DST_LOADED && event == EV_TIMER -> \
    d_write(REC_RUN); d_state = DST_STARTING; d_act[0] = ACT_RESUME_VM;
#endif
#ifdef MISTAKE_RUNNING_BEFORE_RUN
#define d_MISTAKES :: d_state == DST_LOADED && event == EV_MSG_COMMIT -> \
    d_state = DST_STARTING; d_act[0] = ACT_SEND + MSG_RUNNING; d_act[1] = ACT_JOURNAL; \
    d_act[2] = ACT_RESUME_VM;
#endif
#ifdef MISTAKE_RESUME_BEFORE_ABORTING
#define s_MISTAKES :: s_state == SRC_SENT && event == EV_CANCEL -> \
    s_state = SRC_RESUMING; s_act[0] = ACT_RESUME_VM;
#endif
#ifdef MISTAKE_NEVER_WITHOUT_REVOKED
#define d_MISTAKES :: d_state == DST_STARTING && event == EV_RESUME_FAILED -> \
    d_state = DST_REVOKING; d_act[0] = ACT_KILL_VM;
#endif
#ifdef MISTAKE_REFUSAL_AFTER_A_LOST_ANSWER
#define d_MISTAKES :: d_state == DST_STARTING && event == EV_RESUME_UNSURE -> \
    d_write(REC_REVOKED); d_state = DST_REVOKING; d_act[0] = ACT_KILL_VM;
#endif
#ifdef MISTAKE_RESUME_WITHOUT_RECORD
#define s_MISTAKES :: s_state == SRC_COMMITTED && event == EV_MSG_NEVER -> \
    s_state = SRC_RESUMING; s_act[0] = ACT_RESUME_VM;
#endif
#ifdef MISTAKE_RESUME_ON_UNKNOWN
#define s_MISTAKES :: s_state == SRC_COMMITTED && event == EV_MSG_UNKNOWN -> \
    s_state = SRC_RESUMING; s_act[0] = ACT_RESUME_VM;
#endif
#ifdef MISTAKE_NEVER_BEFORE_KILL
#define d_MISTAKES :: d_state == DST_STARTING && event == EV_RESUME_FAILED -> \
    d_write(REC_NEVER); d_state = DST_NEVER; d_act[0] = ACT_SEND + MSG_NEVER;
#endif
#ifdef MISTAKE_ORPHAN_GIVES_UP
#define s_MISTAKES :: s_state == SRC_SENT && event == EV_VM_GONE -> \
    s_write(REC_ABORTED); s_state = SRC_ABORTED; s_act[0] = ACT_SEND + MSG_ABORT;
#endif
#ifdef MISTAKE_GIVE_UP_SOLE_COPY
#define d_MISTAKES :: d_state == DST_RESTARTING && event == EV_RESUME_FAILED -> \
    d_write(REC_REVOKED); d_state = DST_REVOKING; d_act[0] = ACT_KILL_VM;
#endif
#ifdef MISTAKE_ASK_AFTER_CONT
#define s_MISTAKES :: s_state == SRC_RESUMING && event == EV_VM_GONE && copy == COPY_SENT -> \
    s_write(REC_SENDING); s_state = SRC_ORPHANED; s_act[0] = ACT_SEND + MSG_ASK;
#endif
#ifndef s_MISTAKES
#define s_MISTAKES :: false -> skip
#endif
#ifndef d_MISTAKES
#define d_MISTAKES :: false -> skip
#endif

/* A record can fail to be written as long as faults happen. */
#define can_fail (!calm)
#define s_alive (s_vm != DEAD)
#define d_alive (d_vm != DEAD && d_vm != ABSENT)
#include "handover_table.pml"

mtype = {COPY_NONE, COPY_RUNNING, COPY_PAUSED, COPY_SENT, COPY_BROKEN};

/* The agents: up, state, record on disk, actions still to execute. */
bool s_up = true, d_up = true;
byte s_state = SRC_NONE, d_state = DST_NONE;
byte s_journal = REC_NONE, d_journal = REC_NONE;
byte s_act[3], d_act[3];
/* What the world has for them: an answer to RESUME_VM (an event, or 0), a death, a tick. */
byte s_answer, d_answer;
bool s_gone, d_gone, s_tick, d_tick;

/* The VMMs, and a `cont` that lies in their socket. */
byte s_vm = RUNS, d_vm = ABSENT;
bool s_cont, d_cont;
mtype copy = COPY_NONE;
byte lock_of = 1; /* image locks: 0 nobody, 1 source, 2 destination */

/* Messages that may still arrive, one bit each. */
short net;
#define BIT(m) (1 << (m))
#define FROM_SOURCE_UNKNOWN 13 /* UNKNOWN is the one message of both sides */
#define FOR_SOURCE (BIT(MSG_PREPARED) | BIT(MSG_LOADED) | BIT(MSG_RUNNING) | BIT(MSG_NEVER) \
    | BIT(MSG_ENDED) | BIT(MSG_UNKNOWN) | BIT(MSG_REFUSED))
#define FOR_DESTINATION (BIT(MSG_PREPARE) | BIT(MSG_ASK) | BIT(MSG_COMMIT) | BIT(MSG_COMMIT_SOLE) \
    | BIT(MSG_ABORT) | BIT(MSG_FINISHED) | BIT(FROM_SOURCE_UNKNOWN))

bool calm, s_lost, d_lost, wiped;

/* What really happened, for the properties. */
bool d_ran, d_died, d_died_with_run, d_has_only, d_knows_sole, d_failed;
bool s_ran_on, s_said_abort, may_be_lost, operator_spoke;

/* Does the source's VM stand as it was sent? Its agent knows, as long as it lives. */
mtype = {NOT_KNOWN, STANDS, STOOD_UNTIL_CONT};
mtype s_stands = NOT_KNOWN;

/* Registers of one step; zero between steps. */
byte event, who, action;

/* The death of its VMM outranks every other event: the agent looks before it listens. */
#ifdef MISTAKE_DEATH_COMES_LATE
#define s_looks false
#else
#define s_looks true
#endif
#define s_hears (s_idle && !(s_gone && s_looks))
#define d_hears (d_idle && !d_gone)
/* A death between the look and the record is not seen. */
#define s_hears_late (s_hears || (s_idle && (s_state == SRC_SENDING || s_state == SRC_SENT)))
#define d_hears_late (d_hears || (d_idle && d_state == DST_LOADED))
/* What the death of the source's VMM is to its agent. */
#ifdef MISTAKE_DEAD_RETURN_IS_LOST
#define s_death EV_VM_GONE
#else
#define s_death (s_stands == STANDS && (s_state == SRC_RESUMING || s_state == SRC_STALLED) -> \
    EV_DIED_STANDING : EV_VM_GONE)
#endif
/* That no vCPU started stays true of a VMM that has died since: then it outranks the death. */
#define d_has_not_started (d_answer == EV_RESUME_FAILED)
#define s_idle (s_up && s_act[0] == 0)
#define d_idle (d_up && d_act[0] == 0)

/* The source has given up: its own copy is the only one that counts, if it lives. */
#define s_gave_up ((s_journal == REC_ABORTING && s_stands != STANDS) || s_journal == REC_ABORTED \
    || s_state == SRC_REVERTING || s_said_abort || s_ran_on)

#ifdef MISTAKE_JOURNAL_NOT_SYNCED
/* The record on disk lags behind by one write until it happens to be flushed. */
byte s_disk = REC_NONE, d_disk = REC_NONE;
inline s_write(rec) { s_disk = s_journal; s_journal = rec }
inline d_write(rec) { d_disk = d_journal; d_journal = rec }
#else
inline s_write(rec) { s_journal = rec }
inline d_write(rec) { d_journal = rec }
#endif
inline s_write_failed() { s_loses_dead_copy(s_state == SRC_SENT) }
inline d_write_failed()
{
    d_failed = true;
    d_loses_dead_start()
}

/* ---- The VMMs. ---- */

inline s_vmm_runs()
{
    assert(d_vm != RUNS);                    /* P1 */
    assert(!d_ran || operator_spoke);        /* P2 */
    if
    :: s_vm != RUNS && copy == COPY_SENT -> s_ran_on = true
    :: else
    fi;
    s_vm = RUNS;
    lock_of = 1
}

inline d_vmm_runs()
{
    assert(s_vm != RUNS);                    /* P1 */
    assert(!s_ran_on || operator_spoke);     /* P2 */
    assert(d_vm == LOADED || d_vm == RUNS);  /* P3 */
    d_vm = RUNS;
    d_ran = true;
    lock_of = 2
}

inline s_vmm_ends()
{
    s_vm = DEAD;
    s_cont = false;
    s_answer = 0;
    s_gone = s_up;
    lock_of = (lock_of == 1 -> 0 : lock_of)
}

inline d_vmm_ends()
{
    d_vm = DEAD;
    d_cont = false;
    d_answer = 0;
    d_gone = d_up;
    lock_of = (lock_of == 2 -> 0 : lock_of);
    copy = (copy != COPY_NONE -> COPY_BROKEN : copy)
}

/* A VMM that died unseen before RUN was recorded has not started: the next record takes that back.
 * If it cannot be written, or the agent crashes before, a second fault has made it a start. */
inline d_loses_dead_start()
{
    d_died_with_run = d_died_with_run || (d_journal == REC_RUN && d_died);
    may_be_lost = may_be_lost || d_died_with_run
}

/* A source that died unseen as it was sent: that its agent does not know yet that all is, crashes
 * before it writes that down, or cannot write that it undoes, is a second fault. */
inline s_loses_dead_copy(gives_up)
{
    if
    :: s_vm == DEAD && (gives_up) -> may_be_lost = true; d_has_only = false
    :: else
    fi
}

/* Deaths that nobody here caused may cost the guest, if P4 says so. */
inline s_vmm_dies()
{
    if
    :: d_vm == RUNS || (d_vm == LOADED && !s_gave_up && d_state != DST_KILLING
                        && d_state != DST_REVOKING) -> d_has_only = true
    :: else -> may_be_lost = true
    fi;
    s_vmm_ends()
}

inline d_vmm_dies()
{
    d_died = true;
    d_died_with_run = d_died_with_run || d_journal == REC_RUN || d_journal == REC_RUNNING;
    may_be_lost = may_be_lost || d_died_with_run || s_vm == DEAD;
    d_vmm_ends()
}

/* ---- Actions. ---- */

inline s_execute()
{
    action = s_act[0];
    s_act[0] = s_act[1];
    s_act[1] = s_act[2];
    s_act[2] = 0;
    if
    :: action == ACT_SEND + MSG_UNKNOWN -> net = net | BIT(FROM_SOURCE_UNKNOWN)
    :: action >= ACT_SEND && action != ACT_SEND + MSG_UNKNOWN -> 
       net = net | BIT(action - ACT_SEND);
       s_said_abort = s_said_abort || action == ACT_SEND + MSG_ABORT
    :: action == ACT_START_TRANSFER -> copy = (copy == COPY_NONE -> COPY_RUNNING : copy)
    :: action == ACT_STOP_TRANSFER ->
       copy = ((copy == COPY_RUNNING || copy == COPY_PAUSED) -> COPY_BROKEN : copy)
    :: action == ACT_RESUME_VM ->
       s_cont = s_alive;
       s_gone = s_gone || !s_alive;
       s_stands = (s_alive && s_stands == STANDS -> STOOD_UNTIL_CONT : s_stands)
    :: action == ACT_KILL_VM ->
       assert(d_ran || d_died_with_run || operator_spoke); /* P4 */
       if
       :: s_vm != DEAD -> s_vmm_ends()
       :: else
       fi;
       s_gone = true
    fi;
    action = 0
}

inline d_execute()
{
    action = d_act[0];
    d_act[0] = d_act[1];
    d_act[1] = d_act[2];
    d_act[2] = 0;
    if
    :: action >= ACT_SEND ->
       net = net | BIT(action - ACT_SEND)
    :: action == ACT_START_VM ->
       d_vm = PAUSED;
       copy = (copy != COPY_NONE -> COPY_BROKEN : copy) /* that was for another VMM */
    :: action == ACT_RESUME_VM ->
       d_cont = d_alive;
       d_gone = d_gone || !d_alive;
#ifndef MISTAKE_DEAD_START_ENDS
       d_answer = (!d_alive && d_state == DST_STARTING -> EV_RESUME_FAILED : d_answer)
#endif
#ifdef MISTAKE_RUNNING_BEFORE_RUN
    :: action == ACT_JOURNAL -> d_write(REC_RUN)
#endif
    :: action == ACT_KILL_VM ->
       /* P4: a complete copy goes if the source gave it up, or has its own, or both failed. */
       assert(d_vm != LOADED || (s_gave_up && !d_has_only) || s_vm != DEAD || operator_spoke ||
              (d_failed && !d_knows_sole));
       assert(d_vm != RUNS || operator_spoke); /* P4 */
       may_be_lost = may_be_lost || (d_vm == LOADED && s_vm == DEAD);
       if
       :: d_alive -> d_vmm_ends()
       :: else
       fi;
       d_gone = true
    fi;
    action = 0
}

/* ---- Crashes and restarts. ---- */

inline s_crash()
{
    s_loses_dead_copy(s_journal == REC_ABORTING);
    s_up = false;
    s_stands = NOT_KNOWN;
    s_state = SRC_NONE;
    s_act[0] = 0; s_act[1] = 0; s_act[2] = 0;
    s_answer = 0;
    s_gone = false;
    copy = ((copy == COPY_RUNNING || copy == COPY_PAUSED) -> COPY_BROKEN : copy)
}

inline d_crash()
{
    d_loses_dead_start();
    d_up = false;
    d_state = DST_NONE;
    d_act[0] = 0; d_act[1] = 0; d_act[2] = 0;
    d_answer = 0;
    d_gone = false;
    /* What was on its way to this agent is lost; what was loaded is in the VMM. */
    copy = (copy != COPY_NONE && d_vm != LOADED && d_vm != RUNS -> COPY_BROKEN : copy)
}

inline s_restart()
{
    s_up = true;
    source_recover()
}

inline d_restart()
{
    d_up = true;
    destination_recover()
}

/* ---- The end. ---- */

/* Something will happen without anybody repeating himself. */
#define s_times_out (s_up && (d_lost || copy == COPY_BROKEN) \
    && (s_state == SRC_PREPARING || s_state == SRC_SENDING || s_state == SRC_SENT))
#define d_times_out (d_up && (s_lost || copy == COPY_BROKEN || (copy == COPY_NONE \
    && s_state != SRC_PREPARING && s_state != SRC_SENDING)) \
    && (d_state == DST_PREPARING || d_state == DST_PREPARED))
#define work_left (net != 0 || s_times_out || d_times_out || s_cont || d_cont \
    || (s_up && (s_act[0] != 0 || s_answer != 0 || s_gone || s_tick || s_state == SRC_SENDING)) \
    || (d_up && (d_act[0] != 0 || d_answer != 0 || d_gone || d_tick || d_state == DST_PREPARING \
                 || (d_state == DST_PREPARED && copy == COPY_SENT))))

/* With the other host gone for good nobody confirms: then a settled state is an end, too. */
#define s_ended (s_lost || s_state == SRC_NONE || s_state == SRC_DONE || s_state == SRC_CLOSED \
    || (d_lost && s_state == SRC_ABORTED))
#define d_ended (d_lost || d_state == DST_NONE || d_state == DST_CLOSED \
    || (s_lost && (d_state == DST_RUNNING || d_state == DST_NEVER || d_state == DST_ENDED)))
#define ended (calm && !work_left && s_ended && d_ended)
#define stuck (calm && !work_left && !(s_ended && d_ended))

/* Only an operator can go on: he who would answer is gone for good, or has forgotten. */
#define s_needs_operator (s_up && !d_alive && (d_lost || wiped) && (s_state == SRC_COMMITTED \
    || s_state == SRC_COMMITTED_SOLE || s_state == SRC_ORPHANED))
#define d_needs_operator (d_up && s_vm == DEAD && (s_lost || wiped) && d_state == DST_LOADED)

/* P6. A mistake is to be caught by the promise itself, if it breaks more than this. */
inline check_records()
{
#if !defined(MISTAKE) || defined(MISTAKE_RESUME_WITHOUT_RECORD)
    assert(s_state != SRC_COMMITTED || s_vm != RUNS); /* P6 */
#endif
#ifndef MISTAKE
    assert(s_state != SRC_COMMITTED || s_journal == REC_COMMIT);
    assert(s_state != SRC_COMMITTED_SOLE || s_journal == REC_COMMIT);
    assert(s_state != SRC_ABORTED || s_journal == REC_ABORTED);
    assert(s_state != SRC_DONE || s_journal == REC_DONE);
    assert(d_state != DST_LOADED || d_journal == REC_LOADED);
    assert(d_state != DST_STARTING || d_journal == REC_RUN);
    assert(d_state != DST_RESTARTING || d_journal == REC_RUN);
    assert(d_state != DST_RUNNING || d_journal == REC_RUNNING)
#else
    skip
#endif
}

#define S 1
#define D 2

inline s_gives_up(why)
{
    s_loses_dead_copy(s_gone && s_state == SRC_SENDING && s_looks);
    event = why;
    who = S
}

/* A message arrives; once calm, it does so once. */
inline s_receives(m)
{
    event = m;
    who = S;
    net = (calm -> net & ~BIT(m) : net)
}

inline d_receives(m)
{
    event = m;
    who = D;
    net = (calm -> net & ~BIT(m) : net)
}

/* P7. With mistakes it is for the locks to hold. */
inline meets_no_lock(owner)
{
#ifndef MISTAKE
    assert(lock_of != owner || operator_spoke)
#else
    skip
#endif
}

/* `cont` comes to its end in the source's QEMU; the answer goes to the agent if it lives. */
inline s_cont_ends()
{
    s_cont = false;
    meets_no_lock(2);
    if
    :: s_vm == RUNS || !LOCKS || lock_of != 2 ->
       s_vmm_runs();
       s_answer = (s_up -> EV_RESUMED : 0)
    :: s_vm != RUNS && (!calm || (LOCKS && lock_of == 2)) ->
       s_stands = (s_stands == STOOD_UNTIL_CONT -> STANDS : s_stands);
       s_answer = (s_up -> EV_RESUME_FAILED : 0)
    fi
}

inline d_cont_ends()
{
    d_cont = false;
    meets_no_lock(1);
    if
    :: d_vm == RUNS || !LOCKS || lock_of != 1 ->
       d_vmm_runs();
       d_answer = (d_up -> EV_RESUMED : 0)
    :: d_vm != RUNS && (!calm || (LOCKS && lock_of == 1)) ->
       d_failed = true;
       d_answer = (d_up -> EV_RESUME_FAILED : 0)
    fi
}

/* The answer to a `cont` is lost: it may take effect yet, or none will. */
inline s_cont_is_unsure()
{
    s_answer = EV_RESUME_UNSURE;
    s_stands = NOT_KNOWN;
    if
    :: true
    :: s_cont = false
    fi
}

inline d_cont_is_unsure()
{
    d_answer = EV_RESUME_UNSURE;
    if
    :: true
    :: d_cont = false
    fi
}

/* Faults end, all hosts that will ever come back are up. */
active proctype calms_down()
{
    atomic {
        !calm;
        calm = true;
        net = 0;
        if
        :: s_up
        :: !s_up -> s_restart()
        :: !s_up && s_vm == DEAD -> s_lost = true
        fi;
        if
        :: d_up
        :: !d_up -> d_restart()
        :: !d_up && !d_alive && !s_lost -> d_lost = true
        fi
    }
accept_calm: /* P5: staying here is an acceptance cycle, blocking here an invalid end state */
    ended;
    assert(s_vm == RUNS || d_vm == RUNS || may_be_lost || operator_spoke); /* P4, P5 */
    /* P5: and no VMM is left that stands. */
    assert(s_lost || d_lost || operator_spoke || wiped
           || ((s_vm == RUNS || s_vm == DEAD) && (d_vm == RUNS || d_vm == DEAD || d_vm == ABSENT)))
}

active proctype world()
{
end:
    do
    :: atomic {
        if
        /* The agents. */
        :: s_up && s_act[0] != 0 -> s_execute()
        :: d_up && d_act[0] != 0 -> d_execute()
        :: s_hears && s_state == SRC_NONE && s_vm == RUNS && !calm && !wiped ->
           event = EV_START; who = S
        :: s_idle && s_gone -> s_gone = false; event = s_death; who = S
        :: d_idle && d_gone && !d_has_not_started -> d_gone = false; event = EV_VM_GONE; who = D
        :: s_hears && s_answer != 0 -> event = s_answer; s_answer = 0; who = S
        :: (d_hears || (d_idle && d_has_not_started)) && d_answer != 0 ->
           event = d_answer; d_answer = 0; who = D
        :: s_hears && (s_tick || !calm) -> s_tick = false; event = EV_TIMER; who = S
        :: d_hears && (d_tick || !calm) -> d_tick = false; event = EV_TIMER; who = D
#ifndef MISTAKE_NOBODY_REPEATS
        :: stuck && !s_needs_operator && !d_needs_operator -> s_tick = s_up; d_tick = d_up
#endif

        /* The network. */
        :: s_hears && (net & BIT(MSG_REFUSED)) -> s_receives(MSG_REFUSED)
        :: s_hears && (net & BIT(MSG_PREPARED)) -> s_receives(MSG_PREPARED)
        :: s_hears && (net & BIT(MSG_LOADED)) -> s_receives(MSG_LOADED)
        :: s_hears && (net & BIT(MSG_RUNNING)) -> s_receives(MSG_RUNNING)
        :: s_hears && (net & BIT(MSG_NEVER)) -> s_receives(MSG_NEVER)
        :: s_hears && (net & BIT(MSG_ENDED)) -> s_receives(MSG_ENDED)
        :: s_hears && (net & BIT(MSG_UNKNOWN)) -> s_receives(MSG_UNKNOWN)
        :: d_hears && (net & BIT(MSG_PREPARE)) -> d_receives(MSG_PREPARE)
        :: d_hears && (net & BIT(MSG_ASK)) -> d_receives(MSG_ASK)
        :: d_hears_late && (net & BIT(MSG_COMMIT)) -> d_receives(MSG_COMMIT)
        :: d_hears && (net & BIT(MSG_COMMIT_SOLE)) -> d_receives(MSG_COMMIT_SOLE)
        :: d_hears && (net & BIT(MSG_ABORT)) -> d_receives(MSG_ABORT)
        :: d_hears && (net & BIT(MSG_FINISHED)) -> d_receives(MSG_FINISHED)
        :: d_hears && (net & BIT(FROM_SOURCE_UNKNOWN)) ->
           d_receives(FROM_SOURCE_UNKNOWN);
           event = EV_MSG_UNKNOWN
        :: calm && s_lost && (net & FOR_SOURCE) -> net = net & ~FOR_SOURCE
        :: calm && d_lost && (net & FOR_DESTINATION) -> net = net & ~FOR_DESTINATION

        /* Copying. */
        :: s_hears && s_state == SRC_SENDING && copy == COPY_RUNNING && s_vm == RUNS ->
           s_vm = PAUSED;
           copy = COPY_PAUSED
        :: s_hears && s_state == SRC_SENDING && copy == COPY_PAUSED && s_vm == PAUSED ->
           copy = COPY_SENT;
           lock_of = 0
        :: s_hears && s_state == SRC_SENDING && copy == COPY_SENT && s_vm == PAUSED ->
           s_stands = STANDS;
           event = EV_TRANSFERRED; who = S
        :: s_hears_late && (!calm || s_times_out) -> s_gives_up(EV_FAILED)
        :: d_hears && d_state == DST_PREPARING && d_vm == PAUSED -> event = EV_READY; who = D
        :: d_hears && d_state == DST_PREPARED && d_vm == PAUSED && copy == COPY_SENT ->
           d_vm = LOADED;
           event = EV_LOAD_DONE; who = D
        :: d_hears && (!calm || d_times_out) -> event = EV_FAILED; who = D

        /* The VMMs. */
        :: s_cont -> s_cont_ends()
        :: d_cont -> d_cont_ends()
        :: s_cont && s_up && !calm -> s_cont_is_unsure()
        :: d_cont && d_up && !calm -> d_cont_is_unsure()
        :: !calm && s_vm != DEAD -> s_vmm_dies()
        :: !calm && d_alive -> d_vmm_dies()

        /* Crashes. */
        :: !calm && s_up -> s_crash()
        :: !calm && d_up -> d_crash()
        :: !calm && !s_up -> s_restart()
        :: !calm && !d_up -> d_restart()
#ifdef MISTAKE_JOURNAL_NOT_SYNCED
        :: !calm && !s_up && s_vm == DEAD && s_journal != s_disk -> s_journal = s_disk
        :: !calm && !d_up && d_vm == DEAD && d_journal != d_disk -> d_journal = d_disk
#endif
#ifdef WIPE
        :: !calm && !wiped && !s_up && s_vm == DEAD -> wiped = true; s_journal = REC_NONE; net = 0
        :: !calm && !wiped && !d_up && d_vm == DEAD -> wiped = true; d_journal = REC_NONE; net = 0
#endif

        /* Users, and an operator who has fenced the other host. */
        :: s_hears_late && !calm -> s_gives_up(EV_CANCEL)
        :: d_hears && !calm -> event = EV_CANCEL; who = D
        :: s_hears && !d_alive && (s_state == SRC_COMMITTED || s_state == SRC_REVERTING ||
                                   s_state == SRC_COMMITTED_SOLE || s_state == SRC_ORPHANED) &&
           (calm -> stuck && s_needs_operator : !d_up) ->
           event = (s_state == SRC_COMMITTED || s_state == SRC_REVERTING -> EV_RESOLVE_HERE
                    : EV_RESOLVE_GONE);
           who = S; operator_spoke = true
        :: s_hears && s_state == SRC_COMMITTED && (calm -> stuck && s_needs_operator : !d_up) ->
           event = EV_RESOLVE_GONE; who = S; operator_spoke = true
        :: d_hears && d_state == DST_LOADED && s_vm == DEAD &&
           (calm -> stuck && d_needs_operator : !s_up) ->
           event = EV_RESOLVE_HERE; who = D; operator_spoke = true
        :: d_hears && d_state == DST_LOADED &&
           (calm -> stuck && d_needs_operator : !s_up) ->
           event = EV_RESOLVE_GONE; who = D; operator_spoke = true
        fi;
        if
        :: who == S -> source_step()
        :: who == D -> destination_step()
        :: else
        fi;
        /* Replaying a trail (spin -t) prints this. */
        printf("agent %d event %d | source %d record %d vm %d | destination %d record %d vm %d\n",
               who, event, s_state, s_journal, s_vm, d_state, d_journal, d_vm);
        d_knows_sole = d_knows_sole || d_state == DST_RESTARTING;
        event = 0;
        who = 0;
        check_records()
       }
    od
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * handover: who runs the guest. The state machines of the two sides of one attempt to move one VM,
 * as a pure function over one constant table: no I/O, no allocation, no clock.
 * docs/hand-over.md explains the protocol; models/handover.pml includes this table and proves it.
 *
 * Calling sequence. The agent keeps one `struct handover` per attempt and feeds it events. Each
 * event yields actions, which the agent executes in their order; what becomes of them comes back as
 * events.
 *
 *     struct handover h;
 *     handover_init(&h, HANDOVER_SOURCE);
 *     enum handover_event event = HANDOVER_EV_START;
 *     for (;;) {
 *         struct handover_actions actions;
 *         handover_step(&h, event, &actions);
 *         for (int i = 0; i < actions.count; i++)
 *             execute(&actions.list[i]);
 *         event = next_event();
 *     }
 *
 * Rules for the agent:
 *   - HANDOVER_ACT_JOURNAL is always alone in its list and synchronous: write and sync the record,
 *     then feed JOURNALED or JOURNAL_FAILED before anything else. JOURNAL_FAILED means that the
 *     record is surely not in the journal. When nobody can tell (journal_put says IN_DOUBT) the
 *     agent must exit: its restart reads what is there.
 *   - RESUME_VM is answered by RESUMED, RESUME_FAILED, RESUME_UNSURE or VM_GONE; KILL_VM by VM_GONE.
 *     VM_GONE is fed whenever the VMM's process is known to be gone for good (its boot id, pid and
 *     start time do not run), and again after each KILL_VM.
 *   - VM_GONE outranks every other event but RESUME_FAILED: before feeding one, look whether the
 *     VMM lives (process_alive), and feed VM_GONE first if it does not. A source whose VMM has died
 *     must not take the end of its stream for FAILED: the destination may hold the only copy.
 *   - A source that undoes feeds DIED_STANDING instead of VM_GONE, where that has a row, if it has
 *     fed TRANSFERRED, or would have, since it started, and sent no `cont` since (but one that was
 *     surely refused), nor saw the VM run: the destination's copy is not older than the VM.
 *   - RESUME_FAILED is fed only when it is certain that no vCPU started (QMP answered, the run
 *     state is paused, no RESUME event was seen), and at once. After an answer that was lost a later
 *     refusal proves nothing, since a vCPU may have run in between: that, like a VMM that does not
 *     answer any more after a `cont`, is RESUME_UNSURE. In DST_STARTING RESUME_FAILED is also the answer for a
 *     VMM that is dead, if no `cont` was ever sent to it: it died between the look and the record
 *     RUN, and was not started.
 *   - SEND waits a moment at most and may lose the message: whoever needs an answer repeats itself
 *     on TIMER.
 *     Feed TIMER to every unfinished attempt every second or so, and as soon as a connection to the
 *     peer comes up.
 *   - A message of an attempt is fed only if it came from the host that the record names,
 *     authenticated. A message whose attempt has no machine goes to one that handover_init has just
 *     made.
 *   - An event without a row in the current state is ignored (handover_step returns false); it is
 *     always safe to feed one, also from a hostile peer.
 *   - One VMM takes part in a new attempt, in a snapshot or in `detach` only while
 *     handover_is_settled() of all its attempts: a settled machine never pauses, resumes or kills
 *     it.
 *
 * After a restart: handover_recover() from the record and from whether the recorded VMM lives; then
 * feed TIMER. A record without a VMM (pid 0) counts as dead.
 *
 * Threads: one at a time per machine.
 */
#ifndef VMMIG_MIGRATE_HANDOVER_H
#define VMMIG_MIGRATE_HANDOVER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum handover_role { HANDOVER_SOURCE, HANDOVER_DESTINATION };

/*
 * States. X(id, record, settled, in doubt, what status tells the user). The record is what the
 * journal holds while the state lasts; ANY where several are possible, NONE where there is none.
 * Settled: no row from here on touches the VM. In doubt: it waits for the peer, and an operator
 * may have to `resolve`.
 */
#define HANDOVER_STATES(X)                                                                         \
    X(SRC_NONE, NONE, true, false, "no such attempt")                                              \
    X(SRC_PREPARING, SENDING, false, false, "waiting for the destination to prepare")              \
    X(SRC_SENDING, SENDING, false, false, "copying")                                               \
    X(SRC_SENT, SENDING, false, false, "everything sent, waiting for the destination to load it")  \
    X(SRC_REVERTING, SENDING, false, true, "undoing: cannot record it yet")                        \
    X(SRC_RESUMING, ANY, false, false, "undoing: starting the VM again")                           \
    X(SRC_STALLED, ANY, false, false, "undone, but the VM does not start: trying again")           \
    X(SRC_SETTLING, ANY, false, false, "undone: recording it")                                     \
    X(SRC_ABORTED, ABORTED, true, false, "undone: waiting for the destination to confirm")         \
    X(SRC_ORPHANED, SENDING, false, true, "the VMM died: asking for the destination's copy")       \
    X(SRC_COMMITTED, COMMIT, false, true, "committed: the destination is to answer, the VM waits") \
    X(SRC_COMMITTED_SOLE, COMMIT, false, true, "committed: the destination has the only copy")     \
    X(SRC_DISCARDING, COMMIT, false, false, "runs at the destination: removing the old copy")      \
    X(SRC_DONE, DONE, true, false, "moved to the destination")                                     \
    X(SRC_CLOSED, SRC_CLOSED, true, false, "undone; the destination confirmed")                    \
    X(DST_NONE, NONE, true, false, "no such attempt")                                              \
    X(DST_PREPARING, PREPARING, false, false, "preparing a VMM")                                   \
    X(DST_PREPARED, PREPARING, false, false, "receiving")                                          \
    X(DST_LOADED, LOADED, false, true, "loaded: the source is to commit or abort")                 \
    X(DST_STARTING, RUN, false, false, "starting the VM")                                          \
    X(DST_RESTARTING, RUN, false, false, "owned, but the VM does not run yet: starting it")        \
    X(DST_STALLED, RUN, false, false, "owned, but the VM does not start: trying again")            \
    X(DST_STARTED, RUN, false, false, "runs: recording it")                                        \
    X(DST_RUNNING, RUNNING, true, false, "runs here")                                              \
    X(DST_ENDED, ANY, true, false, "the VM ended here")                                            \
    X(DST_KILLING, ANY, false, false, "removing the copy")                                         \
    X(DST_REVOKING, REVOKED, false, false, "the VM could not start: removing the copy")            \
    X(DST_NEVER, ANY, true, false, "never ran here: telling the source")                           \
    X(DST_CLOSED, DST_CLOSED, true, false, "finished; the source knows")

/*
 * Records of the journal. X(id, number, role, state after a restart with the recorded VMM alive,
 * and with it dead, settled). Never renumber: the numbers are on disk. A settled record needs only
 * its identity, no blob.
 */
#define HANDOVER_RECORDS(X)                                                                        \
    X(SENDING, 1, SOURCE, SRC_REVERTING, SRC_ORPHANED, false)                                      \
    X(ABORTING, 2, SOURCE, SRC_STALLED, SRC_SETTLING, false)                                       \
    X(ABORTED, 3, SOURCE, SRC_ABORTED, SRC_ABORTED, true)                                          \
    X(COMMIT, 4, SOURCE, SRC_COMMITTED, SRC_COMMITTED_SOLE, false)                                 \
    X(DONE, 5, SOURCE, SRC_DONE, SRC_DONE, true)                                                   \
    X(SRC_CLOSED, 6, SOURCE, SRC_CLOSED, SRC_CLOSED, true)                                         \
    X(PREPARING, 7, DESTINATION, DST_KILLING, DST_KILLING, false)                                  \
    X(LOADED, 8, DESTINATION, DST_LOADED, DST_KILLING, false)                                      \
    X(RUN, 9, DESTINATION, DST_STALLED, DST_ENDED, false)                                          \
    X(RUNNING, 10, DESTINATION, DST_RUNNING, DST_ENDED, true)                                      \
    X(ENDED, 11, DESTINATION, DST_ENDED, DST_ENDED, true)                                          \
    X(REVOKED, 12, DESTINATION, DST_REVOKING, DST_REVOKING, false)                                 \
    X(NEVER, 13, DESTINATION, DST_NEVER, DST_NEVER, true)                                          \
    X(DST_CLOSED, 14, DESTINATION, DST_CLOSED, DST_CLOSED, true)

/* Messages. X(id, sent by, meaning). */
#define HANDOVER_MESSAGES(X)                                                                       \
    X(PREPARE, SOURCE, "have a VMM waiting, paused")                                               \
    X(ASK, SOURCE, "what do you have?")                                                            \
    X(COMMIT, SOURCE, "run it; I run it only if you say NEVER")                                    \
    X(COMMIT_SOLE, SOURCE, "run it; my copy is gone")                                              \
    X(ABORT, SOURCE, "discard it")                                                                 \
    X(FINISHED, SOURCE, "I know how it ended and need no further answer")                          \
    X(REFUSED, DESTINATION, "I cannot prepare it now")                                             \
    X(PREPARED, DESTINATION, "a VMM waits; send")                                                  \
    X(LOADED, DESTINATION, "all of it is here, verified; commit or abort?")                        \
    X(RUNNING, DESTINATION, "it runs here; discard yours")                                         \
    X(NEVER, DESTINATION, "it never ran here and never will")                                      \
    X(ENDED, DESTINATION, "it was started here and is gone; discard yours")                        \
    X(UNKNOWN, BOTH, "I have no record of this attempt")

/* What happens to a machine besides messages. X(id, meaning). */
#define HANDOVER_LOCAL_EVENTS(X)                                                                   \
    X(START, "source: move this VM")                                                               \
    X(READY, "destination: the VMM waits, paused")                                                 \
    X(TRANSFERRED, "source: paused, the VMM has completed, every byte is with the channels")       \
    X(LOAD_DONE, "destination: memory and state are complete, verified, loaded, paused")           \
    X(FAILED, "preparing, sending or receiving failed for good")                                   \
    X(CANCEL, "the user cancels")                                                                  \
    X(JOURNALED, "the record is on disk")                                                          \
    X(JOURNAL_FAILED, "the record is surely not on disk")                                          \
    X(RESUMED, "the VM has the run state that it had before")                                      \
    X(RESUME_FAILED, "surely no vCPU started")                                                     \
    X(RESUME_UNSURE, "the VM does not run, or does not say; nobody can tell whether it has")       \
    X(VM_GONE, "the VMM's process is gone for good")                                               \
    X(DIED_STANDING, "source: as VM_GONE, and no vCPU can have run since all was sent")            \
    X(TIMER, "time to repeat")                                                                     \
    X(RESOLVE_HERE, "operator: the peer's host is fenced; the VM is to run here")                  \
    X(RESOLVE_GONE, "operator: give up the copy that is here")

/* What the agent does. X(id, meaning). */
#define HANDOVER_ACTIONS(X)                                                                        \
    X(JOURNAL, "write and sync the record `arg`")                                                  \
    X(SEND, "send the message `arg` to the peer")                                                  \
    X(REPORT, "tell the user, and the log, the notice `arg`")                                      \
    X(START_VM, "destination: check, then start a VMM, paused; READY or FAILED")                   \
    X(START_TRANSFER, "source: copy until TRANSFERRED or FAILED")                                  \
    X(STOP_TRANSFER, "source: close the channels, cancel the VMM's migration")                     \
    X(RESUME_VM, "the run state that the VM had before (nothing if it has it), announce-self")     \
    X(KILL_VM, "stop receiving; the VMM of the record has to quit, then SIGKILL until it is gone")

/* What the user is told. X(id, text). */
#define HANDOVER_NOTICES(X)                                                                        \
    X(MOVED, "the VM runs at the destination")                                                     \
    X(UNDONE, "the VM stays at the source")                                                        \
    X(ENDED, "the VM was started at the destination and ended there")                              \
    X(LOST, "the VM died, and no other complete copy of it exists")                                \
    X(TOO_LATE, "too late to cancel: only the destination decides now")                            \
    X(CANCEL_AT_SOURCE, "loaded completely: cancel at the source")                                 \
    X(START_FAILED, "the VM could not be started")                                                 \
    X(JOURNAL_FAILED, "the journal cannot be written")                                             \
    X(PEER_FORGOT, "the peer has no record of this attempt: an operator must resolve it")          \
    X(CONFLICT, "an operator started the VM at the peer as well: check that only one runs")

#define X(id, ...) HANDOVER_##id,
enum handover_state { HANDOVER_STATES(X) HANDOVER_STATE_COUNT };
#undef X

enum handover_record {
    HANDOVER_REC_NONE = 0,
#define X(id, number, ...) HANDOVER_REC_##id = number,
    HANDOVER_RECORDS(X)
#undef X
        HANDOVER_REC_COUNT,
    HANDOVER_REC_ANY /* of a state only: several are possible */
};

#define X(id, ...) HANDOVER_MSG_##id,
enum handover_message { HANDOVER_MESSAGES(X) HANDOVER_MSG_COUNT };
#undef X

/* A message received is the event of its name: HANDOVER_EV_MSG_COMMIT = HANDOVER_MSG_COMMIT. */
#define X(id, ...) HANDOVER_EV_MSG_##id,
#define Y(id, ...) HANDOVER_EV_##id,
enum handover_event { HANDOVER_MESSAGES(X) HANDOVER_LOCAL_EVENTS(Y) HANDOVER_EV_COUNT };
#undef X
#undef Y

#define X(id, ...) HANDOVER_ACT_##id,
enum handover_action_kind { HANDOVER_ACT_NONE, HANDOVER_ACTIONS(X) HANDOVER_ACT_COUNT };
#undef X

#define X(id, ...) HANDOVER_NOTE_##id,
enum handover_notice { HANDOVER_NOTICES(X) HANDOVER_NOTE_COUNT };
#undef X

struct handover_action {
    uint8_t kind; /* enum handover_action_kind */
    uint8_t arg;  /* record, message or notice; 0 for the others */
};

#define HANDOVER_ACTIONS_MAX 3

struct handover_actions {
    int count;
    struct handover_action list[HANDOVER_ACTIONS_MAX];
};

/* Where a row leads: the state, and what is done on the way. Unused actions are ACT_NONE. */
struct handover_outcome {
    enum handover_state state;
    struct handover_action actions[HANDOVER_ACTIONS_MAX];
};

/*
 * One row of the table: in `state`, on `event`, write `record` (if not NONE), then take `then`; or
 * `otherwise`, if the record could not be written.
 */
struct handover_row {
    enum handover_state state;
    enum handover_event event;
    enum handover_record record;
    struct handover_outcome then;
    struct handover_outcome otherwise;
};

struct handover {
    enum handover_role role;
    enum handover_state state;
    const struct handover_row *pending; /* a record is being written; NULL if not */
};

/* A machine without a record: for a new attempt, and to answer messages of unknown ones. */
void handover_init(struct handover *h, enum handover_role role);
/* The machine of a record that the journal held when the agent started; is its VMM alive? */
void handover_recover(struct handover *h, enum handover_record record, bool vm_alive);
/*
 * Feed one event; the actions to execute go to *ret_actions (count 0 if none). False: the event
 * means nothing in this state and nothing changed. While a record is pending only JOURNALED and
 * JOURNAL_FAILED mean something.
 */
bool handover_step(struct handover *h, enum handover_event event,
                   struct handover_actions *ret_actions);

/* Does the event mean something now? */
bool handover_takes(const struct handover *h, enum handover_event event);
/* A user's cancel would change nothing any more; what to tell him. */
bool handover_refuses_cancel(const struct handover *h, enum handover_notice *ret_why);
/* No row from here on touches the VM: it may take part in another operation. */
bool handover_is_settled(const struct handover *h);
/* Waits for the peer; `resolve` has an effect. */
bool handover_is_in_doubt(const struct handover *h);
/* Finished: nothing left to send, TIMER is not needed any more. */
bool handover_is_finished(const struct handover *h);

enum handover_role handover_record_role(enum handover_record record);
bool handover_record_is_settled(enum handover_record record);
/* A record whose number this version knows and that may stand in a journal. */
bool handover_record_is_valid(unsigned number);

/* Stable names ("SRC_COMMITTED", "COMMIT", ...) and texts; never NULL. */
const char *handover_state_name(enum handover_state state);
const char *handover_state_text(enum handover_state state);
const char *handover_record_name(enum handover_record record);
const char *handover_message_name(enum handover_message message);
const char *handover_event_name(enum handover_event event);
const char *handover_action_name(enum handover_action_kind kind);
const char *handover_notice_name(enum handover_notice notice);
const char *handover_notice_text(enum handover_notice notice);
/* The record that stands in the journal in this state (see HANDOVER_STATES). */
enum handover_record handover_state_record(enum handover_state state);

/* The whole table, for the model's generator, the documentation and the tests. */
const struct handover_row *handover_table(size_t *ret_count);

#endif

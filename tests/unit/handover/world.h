/* SPDX-License-Identifier: Apache-2.0 */
/*
 * world: two hand-over machines (the real ones), their VMMs, journals and the network, as one small
 * value whose every successor can be listed. It is to the C code what models/handover.pml is to the
 * model, and its hostility is described there: messages that were sent may arrive at any time, any
 * number of times, or never; agents crash between any two actions; writes and starts fail; VMMs
 * die; operators resolve when the other host is down.
 *
 * A rule of the promise that a move breaks is named in `broken` of the successor.
 */
#ifndef VMMIG_TESTS_HANDOVER_WORLD_H
#define VMMIG_TESTS_HANDOVER_WORLD_H

#include "migrate/handover.h"

enum { SRC, DST };
enum vm { VM_ABSENT, VM_DEAD, VM_PAUSED, VM_LOADED, VM_RUNS };
enum stands { NOT_KNOWN, STANDS, STOOD_UNTIL_CONT };
enum copy { COPY_NONE, COPY_RUNNING, COPY_PAUSED, COPY_SENT, COPY_BROKEN };

#define WORLD_ACTIONS HANDOVER_ACTIONS_MAX

struct side {
    uint8_t up, state, record;
    struct handover_action actions[WORLD_ACTIONS]; /* still to execute; kind 0: none */
    uint8_t answer;                                /* event that answers RESUME_VM, 0: none */
    uint8_t gone;                                  /* VM_GONE is to be fed */
    uint8_t vm, cont;                              /* cont: one lies in the VMM's socket */
};

struct world {
    struct side side[2];
    uint8_t copy;
    uint8_t calm, wiped, operator_spoke;
    /* What really happened: see models/handover.pml. */
    uint8_t d_ran, d_died, d_died_with_run, d_failed, d_knows_sole, d_has_only;
    uint8_t s_ran_on, s_said_abort, may_be_lost;
    uint8_t s_stands; /* enum stands: does the source's VM stand as it was sent? As its agent knows */
    uint8_t broken; /* enum rule */
    uint16_t net[2]; /* to the source, to the destination: a bit per message */
};

enum rule {
    RULE_KEPT,
    RULE_TWO_RUN,
    RULE_STALE_START,
    RULE_INCOMPLETE_START,
    RULE_KILLED_LAST_COPY,
    RULE_RECORD_UNTRUE,
    RULE_SETTLED_TOUCHES_VM
};

void world_init(struct world *w);
/* Call visit with every world that one move leads to. */
void world_successors(const struct world *w, void (*visit)(const struct world *next, void *arg),
                      void *arg);
/*
 * Let faults end and everybody answer: play until nothing happens any more. False if it does not
 * come to an end, or to a bad one, without an operator.
 */
bool world_calms_down(const struct world *w);

/* Rows that some step took: [row][0] recorded or nothing to record, [row][1] the record failed. */
extern bool world_row_taken[256][2];

#endif

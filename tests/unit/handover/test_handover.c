/* SPDX-License-Identifier: Apache-2.0 */
/* The hand-over machine: the form of its table, and every run of two of them in a hostile world. */
#include "world.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>
#include <cmocka.h>

/* ---- The table ---- */

static bool of_source(enum handover_state state)
{
    return strncmp(handover_state_name(state), "SRC_", 4) == 0;
}

static bool touches_vm(const struct handover_action *a)
{
    return a->kind == HANDOVER_ACT_RESUME_VM || a->kind == HANDOVER_ACT_KILL_VM;
}

static void each_state_and_event_has_one_row(void **state)
{
    (void)state;
    size_t n;
    const struct handover_row *rows = handover_table(&n);
    assert_true(n <= sizeof(world_row_taken) / sizeof(world_row_taken[0]));
    for (size_t i = 0; i < n; i++) {
        for (size_t j = 0; j < i; j++) {
            if (rows[i].state == rows[j].state && rows[i].event == rows[j].event)
                fail_msg("%s twice on %s", handover_state_name(rows[i].state),
                         handover_event_name(rows[i].event));
        }
    }
}

static bool sender_may_send(bool source, enum handover_message message)
{
    static const enum { SOURCE, DESTINATION, BOTH } senders[] = {
#define X(id, sender, text) [HANDOVER_MSG_##id] = sender,
        HANDOVER_MESSAGES(X)
#undef X
    };
    return senders[message] == BOTH || (senders[message] == SOURCE) == source;
}

static void check_outcome(const struct handover_row *row, const struct handover_outcome *outcome)
{
    bool source = of_source(row->state);
    struct handover before = {.state = row->state}, after = {.state = outcome->state};
    assert_int_equal(of_source(outcome->state), source);
    for (int i = 0; i < HANDOVER_ACTIONS_MAX && outcome->actions[i].kind; i++) {
        const struct handover_action *a = &outcome->actions[i];
        bool last = i + 1 == HANDOVER_ACTIONS_MAX || !outcome->actions[i + 1].kind;
        assert_int_not_equal(a->kind, HANDOVER_ACT_JOURNAL);
        if (a->kind == HANDOVER_ACT_SEND)
            assert_true(sender_may_send(source, a->arg));
        if (touches_vm(a) || a->kind == HANDOVER_ACT_START_VM)
            assert_true(last);
        if (touches_vm(a))
            assert_false(handover_is_settled(&before) || handover_is_settled(&after));
    }
}

static void rows_send_their_own_messages_and_end_with_what_can_fail(void **state)
{
    (void)state;
    size_t n;
    const struct handover_row *rows = handover_table(&n);
    for (size_t i = 0; i < n; i++) {
        check_outcome(&rows[i], &rows[i].then);
        check_outcome(&rows[i], &rows[i].otherwise);
        if (rows[i].record != HANDOVER_REC_NONE)
            assert_int_equal(handover_record_role(rows[i].record),
                             of_source(rows[i].state) ? HANDOVER_SOURCE : HANDOVER_DESTINATION);
    }
}

/* So a VM whose attempts are all settled can be moved again, whatever crashes then. */
static void what_is_settled_stays_settled(void **state)
{
    (void)state;
    size_t n;
    const struct handover_row *rows = handover_table(&n);
    for (size_t i = 0; i < n; i++) {
        struct handover from = {.state = rows[i].state}, then = {.state = rows[i].then.state},
                        otherwise = {.state = rows[i].otherwise.state};
        bool begins = from.state == HANDOVER_SRC_NONE || from.state == HANDOVER_DST_NONE;
        if (!handover_is_settled(&from) || begins)
            continue;
        assert_true(handover_is_settled(&then) && handover_is_settled(&otherwise));
    }
    for (int r = 1; r < HANDOVER_REC_COUNT; r++) {
        for (int vm_alive = 0; vm_alive < 2; vm_alive++) {
            struct handover h;
            handover_recover(&h, r, vm_alive);
            assert_int_equal(h.role, handover_record_role(r));
            if (handover_record_is_settled(r))
                assert_true(handover_is_settled(&h));
        }
    }
}

static void nothing_is_heard_while_a_record_is_written(void **state)
{
    (void)state;
    struct handover h;
    struct handover_actions actions;
    handover_init(&h, HANDOVER_DESTINATION);
    assert_true(handover_step(&h, HANDOVER_EV_MSG_PREPARE, &actions));
    assert_int_equal(actions.count, 1);
    assert_int_equal(actions.list[0].kind, HANDOVER_ACT_JOURNAL);
    assert_int_equal(actions.list[0].arg, HANDOVER_REC_PREPARING);
    for (int e = 0; e < HANDOVER_EV_COUNT; e++) {
        if (e == HANDOVER_EV_JOURNALED || e == HANDOVER_EV_JOURNAL_FAILED)
            continue;
        assert_false(handover_step(&h, e, &actions));
        assert_int_equal(actions.count, 0);
    }
    assert_true(handover_step(&h, HANDOVER_EV_JOURNALED, &actions));
    assert_int_equal(h.state, HANDOVER_DST_PREPARING);
    assert_int_equal(actions.list[0].kind, HANDOVER_ACT_START_VM);
    assert_false(handover_step(&h, HANDOVER_EV_JOURNALED, &actions));
}

static void numbers_on_disk_do_not_change(void **state)
{
    (void)state;
    assert_int_equal(HANDOVER_REC_SENDING, 1);
    assert_int_equal(HANDOVER_REC_COMMIT, 4);
    assert_int_equal(HANDOVER_REC_RUN, 9);
    assert_int_equal(HANDOVER_REC_NEVER, 13);
    assert_int_equal(HANDOVER_REC_DST_CLOSED, 14);
    assert_false(handover_record_is_valid(0));
    assert_false(handover_record_is_valid(15));
    assert_false(handover_record_is_valid(1000));
}

/* ---- All runs ---- */

#define SLOTS (1u << 24)

struct search {
    struct world *queue;
    size_t head, tail, room;
    uint32_t *slots; /* index into queue + 1; 0: free */
    const struct world *from;
    size_t transitions;
};

static void report(const struct world *w, const char *what)
{
    static const char *const rules[] = {"",
                                        "two run",
                                        "a stale copy starts",
                                        "an incomplete copy starts",
                                        "the last copy is killed",
                                        "a state's record is untrue",
                                        "a settled machine touches the VM"};
    fail_msg("%s%s: source %s (record %s, vm %d, up %d), destination %s (record %s, vm %d, up %d)",
             what, rules[w->broken], handover_state_name(w->side[SRC].state),
             handover_record_name(w->side[SRC].record), w->side[SRC].vm, w->side[SRC].up,
             handover_state_name(w->side[DST].state), handover_record_name(w->side[DST].record),
             w->side[DST].vm, w->side[DST].up);
}

static void remember(const struct world *next, void *arg)
{
    struct search *search = arg;
    search->transitions++;
    if (next->broken)
        report(next, "");
    size_t slot = XXH3_64bits(next, sizeof(*next)) % SLOTS;
    while (search->slots[slot]) {
        if (!memcmp(&search->queue[search->slots[slot] - 1], next, sizeof(*next)))
            return;
        slot = (slot + 1) % SLOTS;
    }
    assert_true(search->tail < SLOTS / 2);
    if (search->tail == search->room) {
        search->room *= 2;
        search->queue = realloc(search->queue, search->room * sizeof(*next));
        assert_non_null(search->queue);
    }
    search->queue[search->tail++] = *next;
    search->slots[slot] = (uint32_t)search->tail;
}

static void no_run_breaks_the_promise_and_every_run_ends(void **state)
{
    (void)state;
    struct search search = {.room = 1 << 16};
    search.queue = malloc(search.room * sizeof(*search.queue));
    search.slots = calloc(SLOTS, sizeof(*search.slots));
    assert_non_null(search.queue);
    assert_non_null(search.slots);
    struct world first;
    world_init(&first);
    remember(&first, &search);
    while (search.head < search.tail) {
        struct world w = search.queue[search.head++];
        if (!w.operator_spoke && !w.wiped && !world_calms_down(&w))
            report(&w, "does not end well");
        world_successors(&w, remember, &search);
    }
    print_message("%zu states, %zu transitions\n", search.tail, search.transitions);
    free(search.queue);
    free(search.slots);

    size_t n;
    const struct handover_row *rows = handover_table(&n);
    for (size_t i = 0; i < n; i++) {
        bool both = rows[i].record != HANDOVER_REC_NONE;
        if (!world_row_taken[i][0] || (both && !world_row_taken[i][1]))
            fail_msg("never taken: %s on %s%s", handover_state_name(rows[i].state),
                     handover_event_name(rows[i].event),
                     world_row_taken[i][0] ? " with a journal that fails" : "");
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(each_state_and_event_has_one_row),
        cmocka_unit_test(rows_send_their_own_messages_and_end_with_what_can_fail),
        cmocka_unit_test(what_is_settled_stays_settled),
        cmocka_unit_test(nothing_is_heard_while_a_record_is_written),
        cmocka_unit_test(numbers_on_disk_do_not_change),
        cmocka_unit_test(no_run_breaks_the_promise_and_every_run_ends),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

/* SPDX-License-Identifier: Apache-2.0 */
/* A guest that dirties a working set at a rate, moved over a link of a rate: does the judge pause it
 * when it should? */
#include "base/clock.h"
#include "migrate/converge.h"

#include <setjmp.h>
#include <stdint.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#define MB 1e6

struct world {
    double memory, working_set, dirty_rate, link_rate;
    double throttle_step; /* percent that the VMM adds when a round did not get shorter */
    bool cheap_rounds;
};

struct outcome {
    enum converge_verdict verdict;
    unsigned rounds;
    double seconds, pause_ms, throttle;
};

static struct outcome simulate(const struct world *w, double limit_ms)
{
    struct converge c;
    struct outcome o = {0};
    double to_send = w->memory;
    converge_init(&c, (int64_t)(limit_ms * 1e6), w->cheap_rounds, 0);
    for (o.rounds = 1; o.rounds < 1000; o.rounds++) {
        struct converge_input in = {.now_ns = (int64_t)(o.seconds * 1e9),
                                    .round = o.rounds,
                                    .remaining = (uint64_t)to_send,
                                    .drain_rate = (uint64_t)w->link_rate,
                                    .in_flight_ns = 10 * NSEC_PER_MSEC,
                                    .fixed_ns = 10 * NSEC_PER_MSEC,
                                    .throttle_percent = (unsigned)o.throttle};
        o.verdict = converge_judge(&c, &in);
        if (o.verdict != CONVERGE_CONTINUE) {
            o.pause_ms = (double)c.predicted_ns / 1e6;
            return o;
        }
        double t = to_send / w->link_rate, rate = w->dirty_rate * (1 - o.throttle / 100);
        double dirtied = rate * t < w->working_set ? rate * t : w->working_set;
        if (o.rounds > 1 && dirtied >= to_send * 0.5 && o.throttle + w->throttle_step <= 99)
            o.throttle += w->throttle_step;
        o.seconds += t;
        to_send = dirtied;
    }
    return o;
}

static void an_idle_guest_is_paused_shortly(void **state)
{
    (void)state;
    struct world w = {.memory = 1000 * MB, .working_set = 4 * MB, .dirty_rate = 2 * MB, .link_rate = 100 * MB};
    struct outcome o = simulate(&w, 300);
    assert_int_equal(o.verdict, CONVERGE_PAUSE);
    assert_true(o.rounds <= 5);
    assert_true(o.pause_ms < 40);
}

static void refinement_is_worth_its_time_only(void **state)
{
    (void)state;
    /* The dirty set is constant: another round would not shorten the pause. */
    struct world w = {.memory = 1000 * MB, .working_set = 20 * MB, .dirty_rate = 1000 * MB, .link_rate = 100 * MB};
    struct outcome o = simulate(&w, 300);
    assert_int_equal(o.verdict, CONVERGE_PAUSE);
    assert_true(o.seconds < 10 * 1.11 + 0.2);
}

/* All that it works on is within the limit after the first pass; two rounds, a sixth of the time,
 * leave little of it. */
static void a_fast_link_is_worth_some_rounds(void **state)
{
    (void)state;
    struct world w = {.memory = 2000 * MB, .working_set = 260 * MB, .dirty_rate = 200 * MB, .link_rate = 1000 * MB,
                      .cheap_rounds = true};
    struct outcome o = simulate(&w, 300);
    assert_int_equal(o.verdict, CONVERGE_PAUSE);
    assert_true(o.pause_ms < 60);
    assert_true(o.seconds < 2.4);
}

static void a_busy_guest_within_the_link_converges(void **state)
{
    (void)state;
    struct world w = {.memory = 512 * MB, .working_set = 64 * MB, .dirty_rate = 20 * MB, .link_rate = 110 * MB};
    struct outcome o = simulate(&w, 300);
    assert_int_equal(o.verdict, CONVERGE_PAUSE);
    assert_true(o.pause_ms <= 300);
}

static void a_guest_faster_than_the_link_needs_the_throttle(void **state)
{
    (void)state;
    struct world w = {.memory = 512 * MB, .working_set = 64 * MB, .dirty_rate = 200 * MB, .link_rate = 110 * MB,
                      .throttle_step = 10};
    struct outcome o = simulate(&w, 300);
    assert_int_equal(o.verdict, CONVERGE_PAUSE);
    assert_true(o.throttle > 0);
    assert_true(o.pause_ms <= 300);
}

static void what_never_converges_is_paused_at_its_best(void **state)
{
    (void)state;
    struct world w = {.memory = 512 * MB, .working_set = 64 * MB, .dirty_rate = 1e5 * MB, .link_rate = 10 * MB};
    struct outcome o = simulate(&w, 300);
    assert_int_equal(o.verdict, CONVERGE_PAUSE_OVER);
    assert_true(o.pause_ms > 300);
    struct world throttled = w;
    throttled.throttle_step = 33;
    o = simulate(&throttled, 300);
    assert_int_equal(o.verdict, CONVERGE_PAUSE_OVER);
    assert_true(o.rounds < 20);
}

/* One round was lucky, and none is again: that is not waited for. */
static void a_round_that_was_better_does_not_come_again(void **state)
{
    (void)state;
    for (unsigned throttle = 0; throttle <= 99; throttle += 99) {
        struct converge c;
        struct converge_input in = {.drain_rate = 100000000, .throttle_percent = throttle};
        enum converge_verdict verdict = CONVERGE_CONTINUE;
        converge_init(&c, 20 * NSEC_PER_MSEC, true, 0);
        for (in.round = 2; in.round < 1000 && verdict == CONVERGE_CONTINUE; in.round++) {
            in.remaining = in.round == 3 ? 10000000 : 20000000;
            in.now_ns += NSEC_PER_SEC / 5;
            verdict = converge_judge(&c, &in);
        }
        assert_int_equal(verdict, CONVERGE_PAUSE_OVER);
        assert_true(in.round < (throttle ? 40 : 300));
    }
}

static void the_first_pass_is_never_interrupted(void **state)
{
    (void)state;
    struct converge c;
    converge_init(&c, NSEC_PER_SEC, false, 0);
    struct converge_input in = {.round = 1, .remaining = 4096, .drain_rate = 1000000000};
    assert_int_equal(converge_judge(&c, &in), CONVERGE_CONTINUE);
}

static void an_unknown_rate_never_fits(void **state)
{
    (void)state;
    struct converge c;
    converge_init(&c, NSEC_PER_SEC, false, 0);
    struct converge_input in = {.now_ns = NSEC_PER_SEC, .round = 2, .remaining = 1 << 20};
    assert_int_equal(converge_judge(&c, &in), CONVERGE_CONTINUE);
    assert_true(c.predicted_ns > 3600 * NSEC_PER_SEC);
}

/* What waits on the way alone, 3 ms, is worth a round where rounds are cheap, and none where they are not. */
static void a_cheap_round_empties_what_is_on_the_way(void **state)
{
    (void)state;
    for (int cheap = 0; cheap < 2; cheap++) {
        struct converge c;
        struct converge_input in = {.now_ns = NSEC_PER_SEC,
                                    .round = 2,
                                    .drain_rate = 1 << 30,
                                    .in_flight_ns = 3 * NSEC_PER_MSEC};
        converge_init(&c, 300 * NSEC_PER_MSEC, cheap, 0);
        assert_int_equal(converge_judge(&c, &in), cheap ? CONVERGE_CONTINUE : CONVERGE_PAUSE);
        in.in_flight_ns = NSEC_PER_MSEC / 2;
        in.round = 3;
        assert_int_equal(converge_judge(&c, &in), CONVERGE_PAUSE);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(an_idle_guest_is_paused_shortly),
        cmocka_unit_test(refinement_is_worth_its_time_only),
        cmocka_unit_test(a_fast_link_is_worth_some_rounds),
        cmocka_unit_test(a_busy_guest_within_the_link_converges),
        cmocka_unit_test(a_guest_faster_than_the_link_needs_the_throttle),
        cmocka_unit_test(what_never_converges_is_paused_at_its_best),
        cmocka_unit_test(a_round_that_was_better_does_not_come_again),
        cmocka_unit_test(the_first_pass_is_never_interrupted),
        cmocka_unit_test(an_unknown_rate_never_fits),
        cmocka_unit_test(a_cheap_round_empties_what_is_on_the_way),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

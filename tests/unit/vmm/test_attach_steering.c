/* SPDX-License-Identifier: Apache-2.0 */
/* Guests that write at a rate, copied over links of a rate and a latency: which of them are throttled? */
#include "base/clock.h"
#include "proto/attach.h"
#include "vmm/attach_steering.h"

#include <setjmp.h>
#include <stdint.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#define MS NSEC_PER_MSEC

/* Pages a millisecond. */
struct world {
    double working_set, writes, link;
    double rtt_ms, limit_ms;
};

struct outcome {
    unsigned percent;
    double transfer_ms; /* of the last round's pages */
};

static struct outcome copy(const struct world *w, unsigned rounds)
{
    struct attach_steering s = {.limit_ns = (int64_t)(w->limit_ms * MS)};
    struct outcome o = {0};
    double carried = w->working_set;
    for (unsigned i = 2; i < rounds; i++) {
        o.transfer_ms = carried / w->link;
        double took = o.transfer_ms + w->rtt_ms, writes = w->writes * (1 - o.percent / 100.0);
        took = took < ATTACH_ROUND_MIN_MS ? ATTACH_ROUND_MIN_MS : took;
        double left = writes * took < w->working_set ? writes * took : w->working_set;
        struct attach_round round = {.number = i,
                                     .carried = (uint64_t)carried,
                                     .left = (uint64_t)left,
                                     .took_ns = (int64_t)(took * MS),
                                     .rtt_ns = (int64_t)(w->rtt_ms * MS)};
        o.percent = attach_steer(&s, &round);
        carried = left;
    }
    return o;
}

static void a_guest_faster_than_the_link_is_throttled_until_it_fits(void **state)
{
    (void)state;
    double limits[] = {20, 50, 300, 3000};
    for (unsigned i = 0; i < sizeof(limits) / sizeof(*limits); i++) {
        struct world w = {.working_set = 100000, .writes = 100, .link = 12, .limit_ms = limits[i]};
        struct outcome o = copy(&w, 60);
        assert_true(o.percent >= 80);
        assert_true(o.transfer_ms < limits[i]);
    }
}

/* As much is written in each round as in the one before: rounds come to stand wherever they are. */
static void rounds_that_stand_above_the_limit_are_an_obstacle(void **state)
{
    (void)state;
    struct world w = {.working_set = 300, .writes = 1000, .link = 12, .limit_ms = 24}; /* 25 ms */
    assert_true(copy(&w, 10).percent >= 20);
    w.limit_ms = 300;
    assert_int_equal(copy(&w, 10).percent, 0);
}

static void a_guest_that_writes_little_is_not_throttled(void **state)
{
    (void)state;
    double limits[] = {1, 20, 300}, rtts[] = {0, 1, 40, 300};
    for (unsigned i = 0; i < 3; i++)
        for (unsigned k = 0; k < 4; k++) {
            struct world w = {
                .working_set = 10000, .writes = 0.25, .link = 12, .rtt_ms = rtts[k], .limit_ms = limits[i]};
            assert_int_equal(copy(&w, 60).percent, 0);
        }
}

static void a_long_link_that_is_too_slow_is_an_obstacle_too(void **state)
{
    (void)state;
    struct world w = {.working_set = 10000, .writes = 100, .link = 12, .rtt_ms = 40, .limit_ms = 300};
    assert_true(copy(&w, 60).percent >= 80);
}

static struct attach_round lost_round(unsigned number)
{
    return (struct attach_round){.number = number, .carried = 100, .left = 100, .took_ns = 1000 * MS};
}

static void it_takes_two_in_a_row_and_goes_by_steps_to_the_end(void **state)
{
    (void)state;
    struct attach_steering s = {.limit_ns = 300 * MS};
    struct attach_round first = lost_round(1), lost = lost_round(2), won = lost;
    won.left = 50;
    assert_int_equal(attach_steer(&s, &first), 0);
    assert_int_equal(attach_steer(&s, &lost), 0);
    assert_int_equal(attach_steer(&s, &won), 0);
    assert_int_equal(attach_steer(&s, &lost), 0);
    unsigned expected[] = {20, 20, 30, 30, 40, 40, 50, 50, 60, 60, 70, 70, 80, 80, 90, 90, 99, 99, 99};
    for (unsigned i = 0; i < sizeof(expected) / sizeof(*expected); i++)
        assert_int_equal(attach_steer(&s, &lost), expected[i]);
    assert_int_equal(attach_steer(&s, &won), ATTACH_THROTTLE_MAX);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_guest_faster_than_the_link_is_throttled_until_it_fits),
        cmocka_unit_test(rounds_that_stand_above_the_limit_are_an_obstacle),
        cmocka_unit_test(a_guest_that_writes_little_is_not_throttled),
        cmocka_unit_test(a_long_link_that_is_too_slow_is_an_obstacle_too),
        cmocka_unit_test(it_takes_two_in_a_row_and_goes_by_steps_to_the_end),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

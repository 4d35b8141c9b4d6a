/* SPDX-License-Identifier: Apache-2.0 */
#include "migrate/cores.h"

#include "base/clock.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <unistd.h>
#include <cmocka.h>

/* In 60 ms: so much of all cores' time was idle, so much of a core was ours. */
static bool full_of(unsigned cores, double idle_share, double own_cores)
{
    const struct cores_times before = {.now_ns = 7, .idle_ns = 100, .own_ns = 1000};
    const double ns = CORES_INTERVAL_MS * NSEC_PER_MSEC;
    struct cores_times after = {.now_ns = before.now_ns + (int64_t)ns,
                                .idle_ns = before.idle_ns + (int64_t)(idle_share * cores * ns),
                                .own_ns = before.own_ns + (int64_t)(own_cores * ns)};
    return cores_judge(&before, &after, cores);
}

static bool full(double idle_share, double own_cores)
{
    return full_of(4, idle_share, own_cores);
}

/* The kernel's steps of 10 ms are large beside what two cores do in 60. */
static void a_step_more_or_less_says_nothing(void **state)
{
    for (int steps = 0; steps < 12; steps++)
        assert_true(full_of(2, steps / 12.0, 0.9) == (steps <= 3));
}

static void they_limit_when_none_is_idle_and_we_use_them(void **state)
{
    assert_true(full(0, 2));
    assert_true(full(0.05, 0.3));
    assert_false(full(0.25, 2));  /* one is free */
    assert_false(full(0, 0.05));  /* others' work: we wait for something else */
    assert_false(full(0.9, 0.05));
}

static void an_idle_machine_is_seen(void **state)
{
    struct cores_watch w = {0};
    assert_true(cores_are_full(&w)); /* nothing is known */
    usleep((CORES_INTERVAL_MS + 20) * 1000);
    assert_false(cores_are_full(&w)); /* this process slept */
    w.full = true;
    assert_true(cores_are_full(&w)); /* not judged anew so soon */
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(they_limit_when_none_is_idle_and_we_use_them),
        cmocka_unit_test(a_step_more_or_less_says_nothing),
        cmocka_unit_test(an_idle_machine_is_seen),
    };
    return cmocka_run_group_tests_name("cores", tests, NULL, NULL);
}

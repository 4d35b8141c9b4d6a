/* SPDX-License-Identifier: Apache-2.0 */
/* The measured rate, and the shared limit. */
#include "base/clock.h"
#include "base/io.h"
#include "migrate/rate_limit.h"
#include "migrate/rate_meter.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <unistd.h>

#include <cmocka.h>

#define MS NSEC_PER_MSEC

/* ---- Meter ---- */

static void test_a_busy_link_is_measured(void **state)
{
    struct rate_meter m = {0};
    rate_meter_begin(&m, 0);
    for (int i = 1; i <= 100; i++)
        rate_meter_acked(&m, i * MS, 10000, true);
    assert_int_equal(m.rate, 10000000);
}

static void test_idle_time_does_not_count(void **state)
{
    struct rate_meter m = {0};
    for (int i = 0; i < 100; i++) {
        rate_meter_begin(&m, i * 100 * MS);
        rate_meter_acked(&m, (i * 100 + 1) * MS, 10000, false);
    }
    assert_int_equal(m.rate, 10000000);
}

static void feed(struct rate_meter *m, int64_t *now, uint64_t bytes_per_ms, bool starved)
{
    for (int i = 0; i < 1000; i++) {
        *now += MS;
        if (starved)
            rate_meter_starved(m);
        rate_meter_acked(m, *now, bytes_per_ms, true);
    }
}

static void test_a_slower_link_lowers_the_rate_and_a_slow_sender_does_not(void **state)
{
    struct rate_meter m = {0};
    int64_t now = 0;
    rate_meter_begin(&m, now);
    feed(&m, &now, 10000, false);
    feed(&m, &now, 1000, true);
    assert_int_equal(m.rate, 10000000);
    feed(&m, &now, 20000, true);
    assert_in_range(m.rate, 19900000, 20000000);
    feed(&m, &now, 1000, false);
    assert_in_range(m.rate, 1000000, 1010000);
}

static void test_an_outage_does_not_count(void **state)
{
    struct rate_meter m = {0};
    int64_t now = 0;
    rate_meter_begin(&m, now);
    feed(&m, &now, 10000, false);
    now += 5000 * MS;
    rate_meter_reset_interval(&m, now);
    feed(&m, &now, 10000, false);
    assert_int_equal(m.rate, 10000000);
}

/* ---- Limit ---- */

static void test_no_limit(void **state)
{
    struct rate_limit limit;
    rate_limit_init(&limit, 0);
    for (int i = 0; i < 1000; i++)
        assert_true(rate_limit_reserve(&limit, 1 << 30) <= clock_mono_ns());
    rate_limit_finish(&limit);
}

/* What is granted lies at the rate, from the burst on. */
static void test_reservations(void **state)
{
    struct rate_limit limit;
    rate_limit_init(&limit, 100000000); /* 100 MB/s: the burst is 10 ms, 1 MB */
    int64_t begin = clock_mono_ns(), last = 0;
    for (int i = 0; i < 16; i++)
        last = rate_limit_reserve(&limit, 1000000);
    int64_t until = clock_mono_ns();
    assert_in_range(last - begin, 150 * MS - 1, 150 * MS + (until - begin) + 1);
    rate_limit_set(&limit, 1000000000); /* the debt is forgotten */
    assert_true(rate_limit_reserve(&limit, 1000000) <= clock_mono_ns());
    assert_int_equal(rate_limit_get(&limit), 1000000000);
    rate_limit_finish(&limit);
}

static void test_waits_end(void **state)
{
    struct rate_limit limit;
    int latch = io_latch_new(NULL);
    struct vm_error *err = NULL;
    rate_limit_init(&limit, 1000);
    assert_int_equal(rate_limit_wait(&limit, 1000, INT64_MAX, latch, NULL), 0);
    rate_limit_reserve(&limit, 1000000);
    assert_int_equal(rate_limit_wait(&limit, 1, clock_mono_ns() + 20 * MS, latch, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_TIMEOUT);
    error_clear(&err);
    io_latch_set(latch);
    assert_int_equal(rate_limit_wait(&limit, 1, INT64_MAX, latch, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_CANCELLED);
    error_free(err);
    rate_limit_finish(&limit);
    close(latch);
}

struct taker {
    struct rate_limit *limit;
    int64_t until;
    unsigned taken;
};

static void *take_thread(void *arg)
{
    struct taker *t = arg;
    while (clock_mono_ns() < t->until) {
        rate_limit_wait(t->limit, 65536, INT64_MAX, -1, NULL);
        t->taken++;
    }
    return NULL;
}

static void test_threads_share_evenly(void **state)
{
    struct rate_limit limit;
    pthread_t threads[4];
    struct taker takers[4];
    rate_limit_init(&limit, 200u * 65536);
    int64_t until = clock_mono_ns() + 500 * MS;
    for (int i = 0; i < 4; i++) {
        takers[i] = (struct taker){&limit, until, 0};
        pthread_create(&threads[i], NULL, take_thread, &takers[i]);
    }
    unsigned total = 0;
    for (int i = 0; i < 4; i++) {
        pthread_join(threads[i], NULL);
        total += takers[i].taken;
    }
    assert_in_range(total, 40, 110); /* a busy machine may grant less, never more */
    for (int i = 0; i < 4; i++)
        assert_in_range(takers[i].taken, total / 4 - 5, total / 4 + 5);
    rate_limit_finish(&limit);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_busy_link_is_measured),
        cmocka_unit_test(test_idle_time_does_not_count),
        cmocka_unit_test(test_a_slower_link_lowers_the_rate_and_a_slow_sender_does_not),
        cmocka_unit_test(test_an_outage_does_not_count),
        cmocka_unit_test(test_no_limit),
        cmocka_unit_test(test_reservations),
        cmocka_unit_test(test_waits_end),
        cmocka_unit_test(test_threads_share_evenly),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

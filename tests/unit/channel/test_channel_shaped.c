/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Channels over TCP on a link of the kernel's: slow, and cut without anybody being told. The link
 * is the loopback of a network namespace of this process, shaped by tc; without permission the
 * tests are skipped, loudly.
 */
#include "certs.h"
#include "pair.h"

#include "base/clock.h"
#include "base/io.h"

#include <sched.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include <cmocka.h>

static bool have_link;

static int setup(void **state)
{
    have_link = unshare(CLONE_NEWNET) == 0 && system("ip link set lo up mtu 1500") == 0 &&
                system("tc qdisc replace dev lo root tbf rate 1gbit burst 100kb latency 10ms") == 0;
    return certs_setup(state);
}

static void need_link(void)
{
    if (have_link)
        return;
    print_message("SKIPPED: needs root, ip and tc\n");
    skip();
}

static void shape(const char *how)
{
    char command[128];
    snprintf(command, sizeof(command), "tc qdisc replace dev lo root tbf %s", how);
    assert_int_equal(system(command), 0);
}

#define CUT "rate 8bit burst 1 latency 1ms" /* no packet is that short */

static void finish(struct pair *p)
{
    struct vm_error *err = NULL;
    if (channel_sender_end(p->sender, in_ms(20000), &err) < 0)
        fail_msg("%s", error_message(err));
    pair_check(p);
    pair_destroy(p);
}

static void *sending_thread(void *arg)
{
    struct pair *p = arg;
    for (unsigned i = 0; i < 1200; i++) /* 60 MB: five seconds */
        if (pair_try_send(p, 50000, NULL) < 0)
            break;
    return NULL;
}

static uint64_t acked(struct pair *p)
{
    struct channel_sender_stats stats;
    channel_sender_get_stats(p->sender, &stats);
    return stats.bytes_acked;
}

/* The link is cut in mid-copy for longer than the stall limit; what was sent before is kept. */
static void test_a_cut_link(void **state)
{
    need_link();
    shape("rate 100mbit burst 30kb latency 50ms");
    struct pair_settings settings = {.tcp = true,
                                     .dial = certs_context("a", "a", "elsewhere"),
                                     .accept = certs_context("a", "a", "localhost")};
    struct pair *p = pair_create(&settings);
    struct channel_sender_stats stats;
    pthread_t thread;
    channel_sender_set_window_time(p->sender, 100, 262144, 8 << 20);
    pthread_create(&thread, NULL, sending_thread, p);
    while (acked(p) < 5000000)
        io_wait(-1, 0, in_ms(10), -1, NULL);
    int64_t begin = clock_mono_ns();
    shape(CUT);
    do {
        io_wait(-1, 0, in_ms(10), -1, NULL);
        channel_sender_get_stats(p->sender, &stats);
    } while (!stats.outage_ns);
    int64_t noticed = clock_mono_ns();
    io_wait(-1, 0, in_ms(1000), -1, NULL);
    uint64_t before = acked(p);
    shape("rate 100mbit burst 30kb latency 50ms");
    int64_t healed = clock_mono_ns();
    while (acked(p) == before)
        io_wait(-1, 0, in_ms(10), -1, NULL);
    int64_t again = clock_mono_ns();
    print_message("cut noticed after %lld ms, going on %lld ms after it was mended\n",
                  (long long)((noticed - begin) / NSEC_PER_MSEC),
                  (long long)((again - healed) / NSEC_PER_MSEC));
    assert_in_range((noticed - begin) / NSEC_PER_MSEC, 1000, 2500);
    assert_in_range((again - healed) / NSEC_PER_MSEC, 0, 3000);
    pthread_join(thread, NULL);
    channel_sender_get_stats(p->sender, &stats);
    assert_true(stats.reconnects >= 1);
    assert_in_range(stats.rate, 8000000, 13000000);
    finish(p);
    conn_context_destroy(settings.dial);
    conn_context_destroy(settings.accept);
}

/* One frame takes twice the stall limit: the link is slow, not dead. */
static void test_one_megabit(void **state)
{
    need_link();
    shape("rate 1mbit burst 3kb latency 300ms");
    struct pair *p = pair_create(&(struct pair_settings){.tcp = true});
    int64_t begin = clock_mono_ns();
    pair_send(p, 1, 2 * 125 * CHANNEL_STALL_MS);
    struct vm_error *err = NULL;
    if (channel_sender_flush(p->sender, in_ms(20000), &err) < 0)
        fail_msg("%s", error_message(err));
    assert_true(clock_mono_ns() - begin > 2 * CHANNEL_STALL_MS * NSEC_PER_MSEC);
    assert_int_equal(p->connections, 1);
    struct channel_sender_stats stats;
    channel_sender_get_stats(p->sender, &stats);
    assert_in_range(stats.rate, 90000, 130000);
    finish(p);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_cut_link),
        cmocka_unit_test(test_one_megabit),
    };
    return cmocka_run_group_tests(tests, setup, certs_teardown);
}

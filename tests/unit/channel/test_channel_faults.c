/* SPDX-License-Identifier: Apache-2.0 */
/* Channels with their own fault points armed; needs a build with -Dfaults=true. */
#include "pair.h"

#include "base/fault.h"

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

#ifdef VMMIG_FAULTS

/* The fault is over with the connection that it cost. */
static struct link_plan disarm(void *arg, unsigned n)
{
    if (n)
        fault_arm("", NULL);
    return LINK_CLEAN;
}

static void arm(const char *spec)
{
    struct vm_error *err = NULL;
    if (fault_arm(spec, &err) < 0)
        fail_msg("%s", error_message(err));
}

static void end(struct pair *p, const char *spec)
{
    struct vm_error *err = NULL;
    if (channel_sender_end(p->sender, in_ms(20000), &err) < 0)
        fail_msg("%s: %s", spec, error_message(err));
    fault_arm("", NULL);
}

static void test_faults_that_cost_a_connection(void **state)
{
    static const char *const specs[] = {
        "channel.send=drop@7",           "channel.send=error@7",  "channel.send=corrupt@7",
        "channel.ack=error@1",           "channel.ack=corrupt@1", "conn.read=error:ECONNRESET@1",
        "conn.write=error:ECONNRESET@1",
    };
    for (size_t i = 0; i < sizeof(specs) / sizeof(*specs); i++) {
        struct channel_sender_stats stats;
        struct pair *p = pair_create(&(struct pair_settings){.plan = disarm});
        assert_int_equal(channel_sender_wait_open(p->sender, in_ms(5000), NULL), 0);
        arm(specs[i]);
        pair_send(p, 30, 1000);
        end(p, specs[i]);
        pair_check(p);
        channel_sender_get_stats(p->sender, &stats);
        if (stats.reconnects != 1)
            fail_msg("%s: %d reconnects", specs[i], (int)stats.reconnects);
        pair_destroy(p);
    }
}

static void test_faults_that_cost_nothing(void **state)
{
    static const char *const specs[] = {"channel.ack=duplicate@*", "channel.send=delay:5@*",
                                        "channel.ack=delay:5@*"};
    for (size_t i = 0; i < sizeof(specs) / sizeof(*specs); i++) {
        struct channel_sender_stats stats;
        struct pair *p = pair_create(&(struct pair_settings){0});
        arm(specs[i]);
        pair_send(p, 30, 1000);
        end(p, specs[i]);
        pair_check(p);
        channel_sender_get_stats(p->sender, &stats);
        assert_int_equal(stats.bytes_resent, 0);
        assert_int_equal(stats.reconnects, 0);
        pair_destroy(p);
    }
}

/* With no acknowledgement getting through, the answers to new connections stand in for them. */
static void test_without_acknowledgements(void **state)
{
    struct channel_sender_stats stats;
    struct pair *p = pair_create(&(struct pair_settings){0});
    arm("channel.ack=drop@*");
    pair_send(p, 30, 1000);
    end(p, "channel.ack=drop@*");
    pair_check(p);
    channel_sender_get_stats(p->sender, &stats);
    assert_true(stats.reconnects >= 1);
    assert_int_equal(stats.bytes_resent, 0);
    pair_destroy(p);
}

/* The counters see what should never be: every frame is sent twice, on purpose. */
static void test_frames_sent_twice_are_counted(void **state)
{
    struct channel_sender_stats sent;
    struct channel_receiver_stats received;
    struct pair *p = pair_create(&(struct pair_settings){0});
    arm("channel.send=duplicate@*");
    pair_send(p, 30, 1000);
    end(p, "channel.send=duplicate@*");
    assert_int_equal(p->applied, 30);
    channel_sender_get_stats(p->sender, &sent);
    channel_receiver_get_stats(p->receiver, &received);
    assert_int_equal(sent.bytes_resent, sent.bytes_acked);
    assert_int_equal(sent.reconnects, 0);
    pair_stop(p);
    assert_in_range(received.frames_repeated, 30, 31); /* END's second copy may not be read */
    pair_destroy(p);
}

static void test_connecting_fails(void **state)
{
    struct vm_error *err = NULL;
    struct pair *p = pair_create(&(struct pair_settings){.outage_limit_ns = 500000000});
    assert_int_equal(channel_sender_wait_open(p->sender, in_ms(5000), NULL), 0);
    arm("channel.connect=error:ECONNRESET@*,channel.send=drop@*");
    pair_send(p, 1, 10);
    assert_int_equal(channel_sender_flush(p->sender, in_ms(5000), &err), -1);
    fault_arm("", NULL);
    assert_int_equal(err->kind, VM_ERROR_TIMEOUT);
    assert_string_equal(err->message, "channel 3 had no working connection for 500 ms "
                                      "(channel.connect: Connection reset by peer)");
    error_free(err);
    pair_destroy(p);
}

#else

static void test_faults_are_compiled_in(void **state)
{
    print_message("SKIPPED: this build has no fault points (-Dfaults=true)\n");
    skip();
}

#endif

int main(void)
{
    const struct CMUnitTest tests[] = {
#ifdef VMMIG_FAULTS
        cmocka_unit_test(test_faults_that_cost_a_connection),
        cmocka_unit_test(test_faults_that_cost_nothing),
        cmocka_unit_test(test_without_acknowledgements),
        cmocka_unit_test(test_frames_sent_twice_are_counted),
        cmocka_unit_test(test_connecting_fails),
#else
        cmocka_unit_test(test_faults_are_compiled_in),
#endif
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

/* SPDX-License-Identifier: Apache-2.0 */
/* Channels over a link that is cut, hangs, is slow, or is not there. */
#include "pair.h"

#include "base/clock.h"
#include "base/io.h"
#include "migrate/channel_wire.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum {
    HELLO_BYTES = 8 + CHANNEL_HELLO_SIZE,       /* the connection's preamble, then the channel's hello */
    ANSWER_BYTES = 8 + CHANNEL_MESSAGE_SIZE,
    FRAME_OVERHEAD = CHANNEL_HEADER_SIZE + 16,
    LANES = 16,
};

static void flush_and_end(struct pair *p)
{
    struct vm_error *err = NULL;
    if (channel_sender_flush(p->sender, in_ms(20000), &err) < 0 ||
        channel_sender_end(p->sender, in_ms(20000), &err) < 0)
        fail_msg("flush: %s", error_message(err));
    pair_check(p);
}

static void test_frames_arrive(void **state)
{
    struct pair *p = pair_create(&(struct pair_settings){0});
    assert_int_equal(channel_sender_wait_open(p->sender, in_ms(5000), NULL), 0);
    pair_send(p, 20, 0);
    pair_send(p, 20, 1);
    pair_send(p, 20, 100000);
    pair_send(p, 2, CHANNEL_PAYLOAD_MAX);
    flush_and_end(p);
    pair_stop(p);
    assert_true(p->ended);
    assert_int_equal(p->connections, 1);
    pair_destroy(p);
}

static void test_frames_beyond_the_bounds_are_refused(void **state)
{
    struct pair *p = pair_create(&(struct pair_settings){0});
    static uint8_t meta[CHANNEL_META_MAX + 1];
    struct iovec half[3] = {{meta, 1}, {meta, CHANNEL_PAYLOAD_MAX}, {meta, SIZE_MAX}};
    struct channel_frame frames[] = {
        {.type = CHANNEL_TYPE_MAX + 1},
        {.type = CHANNEL_TYPE_END},
        {.meta = meta, .meta_len = sizeof(meta)},
        {.payload = half, .n_payload = CHANNEL_IOV_MAX + 1},
        {.payload = half, .n_payload = -1},
        {.payload = half, .n_payload = 2},
        {.payload = half, .n_payload = 3},
    };
    for (size_t i = 0; i < sizeof(frames) / sizeof(*frames); i++) {
        struct vm_error *err = NULL;
        assert_int_equal(channel_sender_send(p->sender, &frames[i], &err), -1);
        assert_int_equal(err->kind, VM_ERROR_USAGE);
        error_free(err);
    }
    pair_send(p, 1, 10);
    flush_and_end(p);
    pair_destroy(p);
}

/* ---- Cut at every byte ---- */

struct cuts {
    unsigned first, step, last; /* connection n is cut at byte first + n * step, none after last */
    bool backward;
};

static struct link_plan cut_plan(void *arg, unsigned n)
{
    const struct cuts *c = arg;
    struct link_plan plan = LINK_CLEAN;
    unsigned at = c->first + n * c->step;
    if (at <= c->last)
        *(c->backward ? &plan.cut_backward : &plan.cut_forward) = at;
    return plan;
}

/* One channel that loses its first connections at one byte after another, while frames go on. */
static void run_through_cuts(struct cuts cuts[LANES], unsigned frame_len)
{
    struct pair *pairs[LANES];
    for (unsigned i = 0; i < LANES; i++)
        pairs[i] = pair_create(
            &(struct pair_settings){.plan = cut_plan, .plan_arg = &cuts[i]});
    bool busy = true;
    for (unsigned round = 0; busy; round++) {
        busy = false;
        for (unsigned i = 0; i < LANES; i++) {
            if (cuts[i].first + pairs[i]->connections * cuts[i].step > cuts[i].last + cuts[i].step)
                continue;
            busy = true;
            pair_send(pairs[i], 3, frame_len);
        }
        for (unsigned i = 0; i < LANES; i++) {
            struct vm_error *err = NULL;
            if (channel_sender_flush(pairs[i]->sender, in_ms(20000), &err) < 0)
                fail_msg("lane %u: %s", i, error_message(err));
        }
    }
    uint64_t reconnects = 0, resent = 0;
    for (unsigned i = 0; i < LANES; i++) {
        struct channel_sender_stats stats;
        flush_and_end(pairs[i]);
        channel_sender_get_stats(pairs[i]->sender, &stats);
        reconnects += stats.reconnects;
        resent += stats.bytes_resent;
        pair_destroy(pairs[i]);
    }
    print_message("%d connections lost and made again, %d bytes sent again\n", (int)reconnects,
                  (int)resent);
    assert_true(reconnects > 0);
}

static void test_cut_at_every_byte_to_the_receiver(void **state)
{
    struct cuts cuts[LANES];
    for (unsigned i = 0; i < LANES; i++)
        cuts[i] = (struct cuts){i, LANES, HELLO_BYTES + 3 * (FRAME_OVERHEAD + 24), false};
    run_through_cuts(cuts, 24);
}

static void test_cut_at_every_byte_to_the_sender(void **state)
{
    struct cuts cuts[LANES];
    for (unsigned i = 0; i < LANES; i++)
        cuts[i] = (struct cuts){i, LANES, ANSWER_BYTES + 3 * CHANNEL_MESSAGE_SIZE, true};
    run_through_cuts(cuts, 24);
}

/* The window keeps many frames in flight when the connection goes: only what is missing is sent. */
static struct link_plan cut_large(void *arg, unsigned n)
{
    struct link_plan plan = LINK_CLEAN;
    if (n < 12)
        plan.cut_forward = 300000 + n * 77777;
    return plan;
}

static void test_cut_with_many_frames_in_flight(void **state)
{
    struct pair *p = pair_create(&(struct pair_settings){.plan = cut_large});
    for (unsigned i = 0; i < 120; i++)
        pair_send(p, 1, 1000 * (i % 90));
    flush_and_end(p);
    assert_true(p->connections >= 8);
    assert_true(p->aborted > 0);
    pair_destroy(p);
}

/* The last acknowledgement of all is lost: the sender asks again, and the answer tells it. */
static struct link_plan cut_after_end(void *arg, unsigned n)
{
    struct link_plan plan = LINK_CLEAN;
    if (n == 0)
        plan.hold_backward = ANSWER_BYTES, plan.hold_ms = 100000,
        plan.cut_forward = HELLO_BYTES + FRAME_OVERHEAD + 10 + CHANNEL_HEADER_SIZE;
    return plan;
}

static void test_lost_acknowledgement_of_the_end(void **state)
{
    struct pair *p = pair_create(&(struct pair_settings){.plan = cut_after_end});
    pair_send(p, 1, 10);
    struct vm_error *err = NULL;
    if (channel_sender_end(p->sender, in_ms(10000), &err) < 0)
        fail_msg("%s", error_message(err));
    assert_int_equal(p->connections, 2);
    pair_check(p);
    pair_destroy(p);
}

/* ---- Stalls ---- */

static struct link_plan hang_first(void *arg, unsigned n)
{
    struct link_plan plan = LINK_CLEAN;
    if (n == 0)
        plan.hang_forward = HELLO_BYTES + 50000;
    return plan;
}

/* A dead link is noticed after the stall limit; the receiver's half-open end is taken over. */
static void test_a_dead_link_is_replaced(void **state)
{
    struct pair *p = pair_create(&(struct pair_settings){.plan = hang_first});
    int64_t begin = clock_mono_ns();
    pair_send(p, 20, 10000);
    flush_and_end(p);
    int64_t took = (clock_mono_ns() - begin) / NSEC_PER_MSEC;
    assert_in_range(took, CHANNEL_STALL_MS - 100, CHANNEL_STALL_MS + 1500);
    assert_int_equal(p->connections, 2);
    pair_destroy(p);
}

static void block_commit(void *arg, uint64_t number)
{
    if (number == 3)
        io_wait(*(int *)arg, 1 /* POLLIN */, in_ms(20000), -1, NULL);
}

/* A receiver that is busy for longer than the stall limit is not taken for dead. */
static void test_a_busy_receiver_is_waited_for(void **state)
{
    int go = io_latch_new(NULL);
    struct pair *p =
        pair_create(&(struct pair_settings){.on_commit = block_commit, .commit_arg = &go});
    pair_send(p, 5, 1000);
    assert_int_equal(channel_sender_flush(p->sender, in_ms(2 * CHANNEL_STALL_MS), NULL), -1);
    assert_int_equal(p->applied, 2);
    io_latch_set(go);
    flush_and_end(p);
    assert_int_equal(p->connections, 1);
    pair_destroy(p);
    close(go);
}

static struct link_plan cut_first_while_busy(void *arg, unsigned n)
{
    struct link_plan plan = LINK_CLEAN;
    if (n == 0)
        plan.cut_forward = HELLO_BYTES + 3 * (FRAME_OVERHEAD + 1000) + 10;
    return plan;
}

/* The connection is lost while the receiver applies a frame: the new one waits for its end. */
static void test_taking_over_from_a_busy_receiver(void **state)
{
    int go = io_latch_new(NULL);
    struct pair *p = pair_create(&(struct pair_settings){
        .plan = cut_first_while_busy, .on_commit = block_commit, .commit_arg = &go});
    pair_send(p, 10, 1000);
    /* Longer than one attempt may take without a word of the receiver. */
    assert_int_equal(channel_sender_flush(p->sender, in_ms(2500), NULL), -1);
    assert_int_equal(p->connections, 2);
    assert_int_equal(p->applied, 2);
    io_latch_set(go);
    flush_and_end(p);
    assert_int_equal(p->connections, 2);
    pair_destroy(p);
    close(go);
}

static struct link_plan slow_plan(void *arg, unsigned n)
{
    struct link_plan plan = LINK_CLEAN;
    plan.rate = 125000; /* 1 Mbit/s */
    return plan;
}

/* A frame that takes longer than the stall limit gets through, on one connection. */
static void test_a_slow_link_is_not_a_dead_one(void **state)
{
    struct pair *p = pair_create(&(struct pair_settings){.plan = slow_plan});
    pair_send(p, 2, 300000);
    flush_and_end(p);
    assert_int_equal(p->connections, 1);
    pair_destroy(p);
}

/* ---- Limits ---- */

static struct link_plan no_link(void *arg, unsigned n)
{
    struct link_plan plan = LINK_CLEAN;
    plan.refuse = true;
    return plan;
}

static void test_an_outage_beyond_the_limit_ends_the_channel(void **state)
{
    struct pair *p = pair_create(
        &(struct pair_settings){.plan = no_link, .outage_limit_ns = NSEC_PER_SEC});
    struct vm_error *err = NULL;
    int64_t begin = clock_mono_ns();
    pair_send(p, 1, 10);
    assert_int_equal(channel_sender_flush(p->sender, in_ms(10000), &err), -1);
    assert_int_equal(err->kind, VM_ERROR_TIMEOUT);
    assert_string_equal(err->message, "channel 3 had no working connection for 1000 ms (the test's "
                                      "link is down)");
    assert_in_range((clock_mono_ns() - begin) / NSEC_PER_MSEC, 800, 2000);
    error_clear(&err);
    assert_int_equal(p->released, 1);
    assert_int_equal(pair_try_send(p, 10, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_TIMEOUT);
    assert_int_equal(p->released, 2);
    error_free(err);
    pair_destroy(p);
}

/* Connections that are made and break before anything gets through do not stop the clock. */
static struct link_plan useless_link(void *arg, unsigned n)
{
    struct link_plan plan = LINK_CLEAN;
    plan.cut_forward = HELLO_BYTES + 20;
    return plan;
}

static void test_useless_connections_do_not_extend_an_outage(void **state)
{
    struct pair *p = pair_create(
        &(struct pair_settings){.plan = useless_link, .outage_limit_ns = NSEC_PER_SEC});
    struct vm_error *err = NULL;
    pair_send(p, 1, 10);
    assert_int_equal(channel_sender_flush(p->sender, in_ms(10000), &err), -1);
    assert_int_equal(err->kind, VM_ERROR_TIMEOUT);
    assert_string_equal(err->message, "channel 3 had no working connection for 1000 ms (each broke "
                                      "before a frame got through)");
    assert_int_equal(p->applied, 0);
    error_free(err);
    pair_destroy(p);
}

static void test_a_wrong_token_is_denied(void **state)
{
    struct pair *p = pair_create(&(struct pair_settings){.wrong_token = true});
    struct vm_error *err = NULL;
    assert_int_equal(channel_sender_wait_open(p->sender, in_ms(5000), &err), -1);
    assert_int_equal(err->kind, VM_ERROR_DENIED);
    assert_string_equal(err->message,
                        "the receiver ended channel 3: the channel's token is wrong");
    error_free(err);
    pair_stop(p);
    assert_null(p->receiver_error);
    pair_destroy(p);
}

static void test_the_receivers_error_reaches_the_sender(void **state)
{
    struct pair *p = pair_create(&(struct pair_settings){.fail_commit_at = 4});
    struct vm_error *err = NULL;
    pair_send(p, 4, 100);
    assert_int_equal(channel_sender_flush(p->sender, in_ms(5000), &err), -1);
    assert_int_equal(err->kind, VM_ERROR_NO_SPACE);
    assert_string_equal(err->message, "the receiver ended channel 3: no room for frame 4");
    assert_int_equal(p->released, 4);
    error_free(err);
    pair_stop(p);
    assert_int_equal(p->applied, 3);
    assert_int_equal(p->receiver_error->kind, VM_ERROR_NO_SPACE);
    pair_destroy(p);
}

static void *set_latch_thread(void *arg)
{
    io_latch_set(*(int *)arg);
    return NULL;
}

/* A sender that is blocked by the window is freed by the latch. */
static void test_cancel(void **state)
{
    int cancel = io_latch_new(NULL), go = io_latch_new(NULL);
    struct pair *p = pair_create(&(struct pair_settings){
        .cancel_fd = cancel, .on_commit = block_commit, .commit_arg = &go});
    channel_sender_set_window(p->sender, 10000);
    struct vm_error *err = NULL;
    pthread_t thread;
    pair_send(p, 3, 100);
    pthread_create(&thread, NULL, set_latch_thread, &cancel);
    while (pair_try_send(p, 5000, &err) == 0)
        ;
    assert_int_equal(err->kind, VM_ERROR_CANCELLED);
    pthread_join(thread, NULL);
    error_free(err);
    io_latch_set(go);
    pair_stop(p);
    assert_int_equal(p->released, p->sent);
    pair_destroy(p);
    close(cancel);
    close(go);
}

/* ---- Window, rate ---- */

static void test_the_window_bounds_what_is_in_flight(void **state)
{
    int go = io_latch_new(NULL);
    struct pair *p =
        pair_create(&(struct pair_settings){.on_commit = block_commit, .commit_arg = &go});
    channel_sender_set_window(p->sender, 50000);
    pair_send(p, 2, 1000);
    assert_int_equal(channel_sender_flush(p->sender, in_ms(5000), NULL), 0);
    struct channel_sender_stats stats;
    /* Frame 3 stays unacknowledged. These just fit, the one that passes the bound included. */
    pair_send(p, 6, 9000);
    channel_sender_get_stats(p->sender, &stats);
    assert_int_equal(stats.bytes_unacked, 6 * (9000 + FRAME_OVERHEAD));
    assert_int_equal(stats.window, 50000);
    pthread_t thread;
    pthread_create(&thread, NULL, set_latch_thread, &go);
    pair_send(p, 100, 9000); /* blocks until the receiver goes on */
    channel_sender_get_stats(p->sender, &stats);
    assert_true(stats.bytes_unacked <= 50000 + 9000 + FRAME_OVERHEAD);
    pthread_join(thread, NULL);
    flush_and_end(p);
    pair_destroy(p);
    close(go);
}

static struct link_plan ten_megabytes(void *arg, unsigned n)
{
    struct link_plan plan = LINK_CLEAN;
    plan.rate = 10000000;
    return plan;
}

static void test_the_rate_is_measured_and_the_window_follows(void **state)
{
    struct pair *p = pair_create(&(struct pair_settings){.plan = ten_megabytes});
    channel_sender_set_window_time(p->sender, 50, 65536, 8 << 20);
    pair_send(p, 400, 32768);
    assert_int_equal(channel_sender_flush(p->sender, in_ms(20000), NULL), 0);
    struct channel_sender_stats stats;
    channel_sender_get_stats(p->sender, &stats);
    assert_in_range(stats.rate, 7000000, 13000000);
    assert_in_range(stats.window, 350000, 650000);
    flush_and_end(p);
    pair_destroy(p);
}

static void test_the_limit_is_kept(void **state)
{
    struct rate_limit limit;
    rate_limit_init(&limit, 10000000);
    struct pair *a = pair_create(&(struct pair_settings){.limit = &limit});
    struct pair *b = pair_create(&(struct pair_settings){.limit = &limit});
    int64_t begin = clock_mono_ns();
    for (int i = 0; i < 20; i++) {
        pair_send(a, 1, 250000);
        pair_send(b, 1, 250000);
    }
    flush_and_end(a);
    flush_and_end(b);
    double took = (double)(clock_mono_ns() - begin) / 1e9;
    print_message("10 MB at 10 MB/s took %.2f s\n", took);
    assert_true(took > 0.95 && took < 1.6);
    pair_destroy(a);
    pair_destroy(b);
    rate_limit_finish(&limit);
}

static void test_destroy_while_connecting(void **state)
{
    struct pair *p = pair_create(&(struct pair_settings){.plan = no_link});
    pair_send(p, 3, 10);
    pair_stop(p);
    assert_int_equal(p->released, 3);
    pair_destroy(p);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_frames_arrive),
        cmocka_unit_test(test_frames_beyond_the_bounds_are_refused),
        cmocka_unit_test(test_cut_at_every_byte_to_the_receiver),
        cmocka_unit_test(test_cut_at_every_byte_to_the_sender),
        cmocka_unit_test(test_cut_with_many_frames_in_flight),
        cmocka_unit_test(test_lost_acknowledgement_of_the_end),
        cmocka_unit_test(test_a_dead_link_is_replaced),
        cmocka_unit_test(test_a_busy_receiver_is_waited_for),
        cmocka_unit_test(test_taking_over_from_a_busy_receiver),
        cmocka_unit_test(test_a_slow_link_is_not_a_dead_one),
        cmocka_unit_test(test_an_outage_beyond_the_limit_ends_the_channel),
        cmocka_unit_test(test_useless_connections_do_not_extend_an_outage),
        cmocka_unit_test(test_a_wrong_token_is_denied),
        cmocka_unit_test(test_the_receivers_error_reaches_the_sender),
        cmocka_unit_test(test_cancel),
        cmocka_unit_test(test_the_window_bounds_what_is_in_flight),
        cmocka_unit_test(test_the_rate_is_measured_and_the_window_follows),
        cmocka_unit_test(test_the_limit_is_kept),
        cmocka_unit_test(test_destroy_while_connecting),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

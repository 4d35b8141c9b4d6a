/* SPDX-License-Identifier: Apache-2.0 */
/* What a channel carries, its window and rate, and how it ends. */
#include "pair.h"

#include "base/clock.h"
#include "base/io.h"
#include "migrate/channel_wire.h"

#include <poll.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum {
    HELLO_BYTES = 8 + CHANNEL_HELLO_SIZE, /* the connection's preamble, then the channel's hello */
    FRAME_OVERHEAD = CHANNEL_HEADER_SIZE + 16,
};

static void test_frames_arrive(void **state)
{
    struct pair *p = pair_create(&(struct pair_settings){0});
    assert_int_equal(channel_sender_wait_open(p->sender, in_ms(5000), NULL), 0);
    pair_send(p, 20, 0);
    pair_send(p, 20, 1);
    pair_send(p, 20, 100000);
    pair_send(p, 2, CHANNEL_PAYLOAD_MAX);
    pair_end(p);
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
    pair_end(p);
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
    struct pair *p =
        pair_create(&(struct pair_settings){.plan = no_link, .outage_limit_ns = NSEC_PER_SEC});
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
    struct pair *p =
        pair_create(&(struct pair_settings){.plan = useless_link, .outage_limit_ns = NSEC_PER_SEC});
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
    assert_string_equal(err->message, "the receiver ended channel 3: the channel's token is wrong");
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

static void block_commit(void *arg, uint64_t number)
{
    if (number == 3)
        io_wait(*(int *)arg, POLLIN, in_ms(20000), -1, NULL);
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
    struct pair *p = pair_create(
        &(struct pair_settings){.cancel_fd = cancel, .on_commit = block_commit, .commit_arg = &go});
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

static void *send_twenty_thread(void *arg)
{
    for (int i = 0; i < 20; i++)
        if (pair_try_send(arg, 9000, NULL) < 0)
            break;
    return NULL;
}

static void test_the_window_bounds_what_is_in_flight(void **state)
{
    int go = io_latch_new(NULL);
    struct pair *p =
        pair_create(&(struct pair_settings){.on_commit = block_commit, .commit_arg = &go});
    struct channel_sender_stats stats;
    pthread_t thread;
    channel_sender_set_window(p->sender, 50000);
    pair_send(p, 2, 1000);
    assert_int_equal(channel_sender_flush(p->sender, in_ms(5000), NULL), 0);
    /* The receiver stands at frame 3, so none of these is acknowledged. */
    pthread_create(&thread, NULL, send_twenty_thread, p);
    do
        channel_sender_get_stats(p->sender, &stats);
    while (stats.bytes_unacked <= 50000);
    io_wait(-1, 0, in_ms(100), -1, NULL); /* time to send more, if the window did not hold */
    channel_sender_get_stats(p->sender, &stats);
    assert_int_equal(stats.bytes_unacked, 6 * (9000 + FRAME_OVERHEAD));
    assert_int_equal(stats.window, 50000);
    io_latch_set(go);
    pthread_join(thread, NULL);
    pair_end(p);
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
    assert_in_range(stats.cpu_ns, 100 * NSEC_PER_USEC, NSEC_PER_SEC); /* 13 MB through a socket */
    pair_end(p);
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
    pair_end(a);
    pair_end(b);
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

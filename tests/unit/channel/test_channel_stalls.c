/* SPDX-License-Identifier: Apache-2.0 */
/* Links that hang or crawl, and receivers that are busy: which of them is dead? */
#include "pair.h"

#include "base/clock.h"
#include "base/io.h"
#include "migrate/channel_wire.h"

#include <poll.h>
#include <setjmp.h>
#include <stdarg.h>
#include <unistd.h>

#include <cmocka.h>

enum {
    HELLO_BYTES = 8 + CHANNEL_HELLO_SIZE, /* the connection's preamble, then the channel's hello */
    FRAME_OVERHEAD = CHANNEL_HEADER_SIZE + 16,
};

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
    pair_end(p);
    int64_t took = (clock_mono_ns() - begin) / NSEC_PER_MSEC;
    assert_in_range(took, CHANNEL_STALL_MS - 100, CHANNEL_STALL_MS + 1500);
    assert_int_equal(p->connections, 2);
    pair_destroy(p);
}

static void block_commit(void *arg, uint64_t number)
{
    if (number == 3)
        io_wait(*(int *)arg, POLLIN, in_ms(20000), -1, NULL);
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
    pair_end(p);
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
    pair_end(p);
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
    pair_send(p, 1, 300000);
    pair_end(p);
    assert_int_equal(p->connections, 1);
    pair_destroy(p);
}

static struct link_plan silent_plan(void *arg, unsigned n)
{
    struct link_plan plan = slow_plan(arg, n);
    plan.hold_backward = 8 + CHANNEL_MESSAGE_SIZE; /* nothing behind the answer */
    plan.hold_ms = 2 * CHANNEL_STALL_MS;
    return plan;
}

/* With the way back clogged, bytes that leave are the sign of life. */
static void test_bytes_that_leave_are_a_sign_of_life(void **state)
{
    struct pair *p = pair_create(&(struct pair_settings){.plan = silent_plan});
    pair_send(p, 1, 600000);
    pair_end(p);
    assert_int_equal(p->connections, 1);
    pair_destroy(p);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_dead_link_is_replaced),
        cmocka_unit_test(test_a_busy_receiver_is_waited_for),
        cmocka_unit_test(test_taking_over_from_a_busy_receiver),
        cmocka_unit_test(test_a_slow_link_is_not_a_dead_one),
        cmocka_unit_test(test_bytes_that_leave_are_a_sign_of_life),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

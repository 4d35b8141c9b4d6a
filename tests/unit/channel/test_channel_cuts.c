/* SPDX-License-Identifier: Apache-2.0 */
/* Connections that are cut at every byte, in both directions. */
#include "pair.h"

#include "migrate/channel_wire.h"

#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>

enum {
    HELLO_BYTES = 8 + CHANNEL_HELLO_SIZE, /* the connection's preamble, then the channel's hello */
    ANSWER_BYTES = 8 + CHANNEL_MESSAGE_SIZE,
    FRAME_OVERHEAD = CHANNEL_HEADER_SIZE + 16,
    LANES = 16,
};

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
        pairs[i] = pair_create(&(struct pair_settings){.plan = cut_plan, .plan_arg = &cuts[i]});
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
        pair_end(pairs[i]);
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
    pair_end(p);
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

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_cut_at_every_byte_to_the_receiver),
        cmocka_unit_test(test_cut_at_every_byte_to_the_sender),
        cmocka_unit_test(test_cut_with_many_frames_in_flight),
        cmocka_unit_test(test_lost_acknowledgement_of_the_end),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

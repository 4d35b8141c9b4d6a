/* SPDX-License-Identifier: Apache-2.0 */
/* Channels over TLS: what they promise holds there as well. */
#include "certs.h"
#include "pair.h"

#include "base/clock.h"

#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>

static struct pair *create(struct pair_settings settings)
{
    settings.dial = certs_context("a", "a", "elsewhere");
    settings.accept = certs_context("a", "a", "localhost");
    return pair_create(&settings);
}

static void flush_and_finish(struct pair *p)
{
    struct vm_error *err = NULL;
    struct conn_context *dial = p->settings.dial, *accept = p->settings.accept;
    if (channel_sender_end(p->sender, in_ms(20000), &err) < 0)
        fail_msg("%s", error_message(err));
    pair_check(p);
    pair_destroy(p);
    conn_context_destroy(dial);
    conn_context_destroy(accept);
}

static void test_frames_arrive(void **state)
{
    struct pair *p = create((struct pair_settings){0});
    for (size_t len = 0; len < 70000; len = len * 2 + 1)
        pair_send(p, 5, len);
    pair_send(p, 3, CHANNEL_PAYLOAD_MAX);
    flush_and_finish(p);
}

/* The first connections are cut in the handshake, then in the frames. */
static struct link_plan cut_plan(void *arg, unsigned n)
{
    struct link_plan plan = LINK_CLEAN;
    if (n < 6)
        plan.cut_forward = 1 + n * 400;
    else if (n < 20)
        plan.cut_forward = 5000 + (n - 6) * 30000;
    else if (n < 26)
        plan.cut_backward = 2400 + n * 10;
    return plan;
}

static void test_cuts(void **state)
{
    struct pair *p = create((struct pair_settings){.plan = cut_plan});
    for (unsigned i = 0; i < 200 || p->connections < 20; i++)
        pair_send(p, 1, 700 * (i % 90));
    assert_in_range(p->connections, 20, 27);
    flush_and_finish(p);
}

static struct link_plan flip_plan(void *arg, unsigned n)
{
    struct link_plan plan = LINK_CLEAN;
    if (n < 8)
        plan.flip_forward = 3000 + n * 7001; /* record headers, bodies, tags */
    return plan;
}

/* What the network damages costs a connection, and is never applied. */
static void test_damaged_bytes(void **state)
{
    struct pair *p = create((struct pair_settings){.plan = flip_plan});
    for (unsigned i = 0; i < 200 || p->connections < 9; i++)
        pair_send(p, 1, 1000);
    flush_and_finish(p);
}

static void test_a_receiver_of_another_cluster(void **state)
{
    struct pair_settings settings = {.dial = certs_context("a", "a", "elsewhere"),
                                     .accept = certs_context("b", "b", "localhost")};
    struct pair *p = pair_create(&settings);
    struct vm_error *err = NULL;
    assert_int_equal(channel_sender_wait_open(p->sender, in_ms(10000), &err), -1);
    assert_int_equal(err->kind, VM_ERROR_DENIED); /* at once, not after the outage limit */
    error_free(err);
    pair_destroy(p);
    conn_context_destroy(settings.dial);
    conn_context_destroy(settings.accept);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_frames_arrive),
        cmocka_unit_test(test_cuts),
        cmocka_unit_test(test_damaged_bytes),
        cmocka_unit_test(test_a_receiver_of_another_cluster),
    };
    return cmocka_run_group_tests(tests, certs_setup, certs_teardown);
}

/* SPDX-License-Identifier: Apache-2.0 */
#include "base/clock.h"
#include "base/queue.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

enum { ITEMS = 10000 };

static void *consume(void *arg)
{
    struct queue *q = arg;
    uintptr_t expected = 1;
    for (void *item; (item = queue_get(q)); expected++)
        if ((uintptr_t)item != expected)
            return (void *)expected;
    return expected == ITEMS + 1 ? NULL : (void *)expected;
}

static void items_come_out_in_order_and_the_bound_holds(void **state)
{
    (void)state;
    CLEANUP(queue) struct queue *q = queue_create(3, NULL, NULL);
    pthread_t thread;
    void *wrong;
    pthread_create(&thread, NULL, consume, q);
    for (uintptr_t i = 1; i <= ITEMS; i++) {
        assert_true(queue_put(q, (void *)i));
        assert_true(queue_length(q) <= 3);
    }
    queue_close(q);
    assert_false(queue_put(q, q));
    pthread_join(thread, &wrong);
    assert_null(wrong);
}

static void *drain_slowly(void *arg)
{
    struct queue *q = arg;
    for (int *item; (item = queue_get(q));) {
        usleep(20000);
        *item = 1;
    }
    return NULL;
}

static void idle_means_that_the_last_item_was_dealt_with(void **state)
{
    (void)state;
    CLEANUP(queue) struct queue *q = queue_create(8, NULL, NULL);
    pthread_t thread;
    int done = 0;
    pthread_create(&thread, NULL, drain_slowly, q);
    queue_put(q, &done);
    assert_true(queue_wait_idle(q));
    assert_int_equal(done, 1);
    queue_close(q);
    pthread_join(thread, NULL);
}

static void *put_until_aborted(void *arg)
{
    while (queue_put(arg, arg))
        ;
    return NULL;
}

static void abort_frees_a_waiting_producer(void **state)
{
    (void)state;
    CLEANUP(queue) struct queue *q = queue_create(1, NULL, NULL);
    pthread_t thread;
    pthread_create(&thread, NULL, put_until_aborted, q);
    while (!queue_length(q))
        ;
    queue_abort(q);
    pthread_join(thread, NULL);
    assert_null(queue_get(q));
    assert_false(queue_wait_idle(q));
}

static void a_deadline_ends_the_wait(void **state)
{
    (void)state;
    CLEANUP(queue) struct queue *q = queue_create(1, NULL, NULL);
    bool ended = true;
    assert_null(queue_get_until(q, clock_mono_ns() + 5 * NSEC_PER_MSEC, &ended));
    assert_false(ended);
    queue_close(q);
    assert_null(queue_get_until(q, INT64_MAX, &ended));
    assert_true(ended);
}

enum { PRODUCERS = 3, CONSUMERS = 3 };

static void *produce(void *arg)
{
    for (uintptr_t i = 1; i <= ITEMS; i++)
        queue_put(arg, (void *)i);
    return NULL;
}

static void *sum_up(void *arg)
{
    uintptr_t sum = 0;
    for (void *item; (item = queue_get(arg));)
        sum += (uintptr_t)item;
    return (void *)sum;
}

/* With room for one item, everybody waits for somebody all the time. */
static void nobody_waits_for_ever_among_many(void **state)
{
    (void)state;
    CLEANUP(queue) struct queue *q = queue_create(1, NULL, NULL);
    pthread_t producers[PRODUCERS], consumers[CONSUMERS];
    uintptr_t sum = 0;
    for (int i = 0; i < CONSUMERS; i++)
        pthread_create(&consumers[i], NULL, sum_up, q);
    for (int i = 0; i < PRODUCERS; i++)
        pthread_create(&producers[i], NULL, produce, q);
    for (int i = 0; i < PRODUCERS; i++)
        pthread_join(producers[i], NULL);
    queue_close(q);
    for (int i = 0; i < CONSUMERS; i++) {
        void *one;
        pthread_join(consumers[i], &one);
        sum += (uintptr_t)one;
    }
    assert_int_equal(sum, (uintptr_t)PRODUCERS * ITEMS * (ITEMS + 1) / 2);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(items_come_out_in_order_and_the_bound_holds),
        cmocka_unit_test(idle_means_that_the_last_item_was_dealt_with),
        cmocka_unit_test(abort_frees_a_waiting_producer),
        cmocka_unit_test(a_deadline_ends_the_wait),
        cmocka_unit_test(nobody_waits_for_ever_among_many),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

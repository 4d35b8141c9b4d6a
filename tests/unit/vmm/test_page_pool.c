/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/page_pool.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>
#include <cmocka.h>

enum { SLABS = 6 };

static void a_slab_is_free_when_its_last_batch_is_released(void **state)
{
    (void)state;
    struct page_pool *pool = page_pool_create(2, NULL);
    struct page_slab *slab = page_pool_take_slab(pool, false);
    struct page_slab *other = page_pool_take_slab(pool, false);
    assert_null(page_pool_take_slab(pool, false));
    memset(slab->data, 1, PAGE_POOL_SLAB);
    memset(other->data, 2, PAGE_POOL_SLAB);
    assert_int_equal(slab->data[PAGE_POOL_SLAB - 1], 1);

    struct pool_batch *a = page_pool_take_batch(pool, 3, false);
    struct pool_batch *b = page_pool_take_batch(pool, 0, false);
    page_pool_add(a, page_addr(0, 1), slab, slab->data);
    page_pool_add(a, page_addr(0, 2), slab, slab->data + GUEST_PAGE_SIZE);
    page_pool_add(b, page_addr(0, 9), slab, slab->data);
    assert_int_equal(a->base.channel, 3);
    assert_int_equal(a->base.n, 2);
    assert_false(page_pool_slab_unused(pool, slab));
    assert_true(page_pool_slab_unused(pool, other));

    page_pool_put_slab(pool, slab);
    page_batch_unref(&a->base);
    assert_null(page_pool_take_slab(pool, false));
    page_batch_ref(&b->base);
    page_batch_unref(&b->base);
    assert_null(page_pool_take_slab(pool, false));
    page_batch_unref(&b->base);
    assert_ptr_equal(page_pool_take_slab(pool, false), slab);
    page_pool_put_slab(pool, slab);
    page_pool_put_slab(pool, other);
    page_pool_close(pool);
}

static void a_batch_takes_a_page_once_and_pins_few_slabs(void **state)
{
    (void)state;
    struct page_pool *pool = page_pool_create(SLABS, NULL);
    struct pool_batch *batch = page_pool_take_batch(pool, 0, false);
    struct page_slab *slabs[SLABS];
    for (unsigned i = 0; i < SLABS; i++) {
        slabs[i] = page_pool_take_slab(pool, false);
        bool fits = page_pool_fits(batch, 100 - i, slabs[i], slabs[i]->data);
        assert_int_equal(fits, i < PAGE_POOL_BATCH_SLABS);
        if (fits)
            page_pool_add(batch, 100 - i, slabs[i], slabs[i]->data);
    }
    struct page_slab *last = slabs[PAGE_POOL_BATCH_SLABS - 1];
    assert_true(page_pool_fits(batch, 1, last, last->data));
    assert_true(page_pool_fits(batch, 1, slabs[5], NULL)); /* a zero page pins none */
    for (unsigned i = 0; i < PAGE_POOL_BATCH_SLABS; i++)
        assert_false(page_pool_fits(batch, 100 - i, last, NULL));
    for (uint64_t addr = 1000; batch->base.n < PAGE_BATCH_MAX; addr++) {
        assert_true(page_pool_fits(batch, addr, slabs[5], NULL));
        page_pool_add(batch, addr, slabs[5], NULL);
    }
    assert_false(page_pool_fits(batch, 1, last, NULL));
    assert_int_equal(batch->zero_pages, PAGE_BATCH_MAX - PAGE_POOL_BATCH_SLABS);
    for (unsigned i = 0; i < SLABS; i++)
        page_pool_put_slab(pool, slabs[i]);
    page_batch_unref(&batch->base);
    page_pool_close(pool);
}

static void batches_are_bounded_and_begin_empty(void **state)
{
    (void)state;
    struct page_pool *pool = page_pool_create(2, NULL);
    struct pool_batch *batches[PAGE_POOL_BATCHES];
    for (unsigned i = 0; i < PAGE_POOL_BATCHES; i++) {
        batches[i] = page_pool_take_batch(pool, 0, false);
        assert_non_null(batches[i]);
    }
    assert_null(page_pool_take_batch(pool, 0, false));
    page_pool_add(batches[7], 5, NULL, NULL);
    page_batch_unref(&batches[7]->base);
    batches[7] = page_pool_take_batch(pool, 1, false);
    assert_int_equal(batches[7]->base.n, 0);
    assert_int_equal(batches[7]->zero_pages, 0);
    assert_true(page_pool_fits(batches[7], 5, NULL, NULL));
    page_pool_close(pool); /* the batches are still out */
    for (unsigned i = 0; i < PAGE_POOL_BATCHES; i++)
        page_batch_unref(&batches[i]->base);
}

static void *wait_for_slab(void *pool)
{
    return page_pool_take_slab(pool, true);
}

static void waits_end_with_a_release_or_with_stop(void **state)
{
    (void)state;
    struct page_pool *pool = page_pool_create(2, NULL);
    struct page_slab *slab = page_pool_take_slab(pool, false), *other;
    other = page_pool_take_slab(pool, false);
    for (int stop = 0; stop < 2; stop++) {
        pthread_t waiter;
        pthread_create(&waiter, NULL, wait_for_slab, pool);
        if (stop)
            page_pool_stop(pool);
        else
            page_pool_put_slab(pool, slab);
        void *got;
        pthread_join(waiter, &got);
        assert_ptr_equal(got, stop ? NULL : slab);
    }
    assert_null(page_pool_take_slab(pool, true));
    page_pool_put_slab(pool, slab);
    page_pool_put_slab(pool, other);
    page_pool_close(pool);
    page_pool_close(NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_slab_is_free_when_its_last_batch_is_released),
        cmocka_unit_test(a_batch_takes_a_page_once_and_pins_few_slabs),
        cmocka_unit_test(batches_are_bounded_and_begin_empty),
        cmocka_unit_test(waits_end_with_a_release_or_with_stop),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

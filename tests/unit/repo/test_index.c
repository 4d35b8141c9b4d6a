/* SPDX-License-Identifier: Apache-2.0 */
#include "tests/unit/repo/repo_test.h"
#include "repo/index.h"
#include "repo/names.h"
#include "repo/store_fault.h"

#include <pthread.h>

static struct store *s;
static struct index *x;
static char place[512];

static int setup(void **state)
{
    s = test_store_open(test_place(place));
    struct vm_error *err = NULL;
    char value[INDEX_INIT_VALUE];
    struct store_pair set = {.value = value};
    assert_int_equal(index_init(s, &set.key, value, &err), 0);
    set.len = strlen(value);
    struct store_op op = {.kind = STORE_UPDATE, .area = STORE_MAP, .name = REPOSITORY_MAP,
                          .presence = STORE_NEW, .sets = &set, .n_sets = 1};
    store_run(s, &op, 1, &err);
    assert_ok(err);
    x = index_open(s, &err);
    assert_ok(err);
    return 0;
}

static int teardown(void **state)
{
    index_close(x);
    store_close(s);
    test_place_remove(place);
    return 0;
}

static struct index_entry entry(uint64_t number, const uint64_t *value)
{
    struct page_id id;
    test_fill_random(&id, sizeof(id), number + 1);
    return index_entry_make(INDEX_EXTENT, &id, value, value ? 8 : 0);
}

static void insert_range(struct index *to, uint64_t from, uint64_t n)
{
    cleanup_error struct vm_error *err = NULL;
    cleanup_free struct index_entry *entries = calloc(n, sizeof(*entries));
    for (uint64_t i = 0; i < n; i++)
        entries[i] = entry(from + i, &(uint64_t){from + i + 1000000});
    index_insert(to, entries, n, &err);
    assert_ok(err);
}

/* How many of the range are there; a wrong value fails the test. */
static unsigned found_in_range(struct index *in, uint64_t from, uint64_t n)
{
    cleanup_error struct vm_error *err = NULL;
    cleanup_free struct index_entry *entries = calloc(n, sizeof(*entries));
    unsigned found = 0;
    for (uint64_t i = 0; i < n; i++)
        entries[i] = entry(from + i, NULL);
    index_lookup(in, entries, n, &err);
    assert_ok(err);
    for (uint64_t i = 0; i < n; i++) {
        found += entries[i].len == 8;
        if (entries[i].len)
            assert_int_equal(get_le64(entries[i].value), from + i + 1000000);
    }
    return found;
}

static void what_was_inserted_is_found(void **state)
{
    insert_range(x, 0, 3000);
    assert_int_equal(found_in_range(x, 0, 3000), 3000);
    assert_int_equal(found_in_range(x, 3000, 500), 0);
}

static void a_later_entry_replaces(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    struct index_entry e = entry(1, &(uint64_t){7}), again = entry(1, &(uint64_t){8});
    struct index_entry look = entry(1, NULL);
    index_insert(x, &e, 1, &err);
    index_insert(x, &again, 1, &err);
    index_lookup(x, &look, 1, &err);
    assert_ok(err);
    assert_int_equal(get_le64(look.value), 8);
}

static void only_the_named_value_is_erased(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    insert_range(x, 0, 100);
    struct index_entry stale = entry(1, &(uint64_t){7}), right = entry(2, &(uint64_t){1000002});
    index_erase(x, &stale, 1, &err);
    index_erase(x, &right, 1, &err);
    assert_ok(err);
    assert_int_equal(found_in_range(x, 0, 100), 99);
    assert_int_equal(found_in_range(x, 1, 1), 1);
}

static void shards_split_and_nothing_is_lost(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    struct index_stat stat;
    const uint64_t n = test_on_ceph() ? 120000 : 200000, step = 4000;
    struct index *other = index_open(s, &err), *stale = index_open(s, &err);
    index_limit_shards(x, 1500);
    for (uint64_t i = 0; i < n; i += step)
        insert_range(x, i, step);
    index_stat(x, &stat, &err);
    assert_ok(err);
    assert_true(stat.shards > INDEX_SHARDS_FIRST + 3);
    assert_true(stat.keys > n * 8 / 10 && stat.keys < n * 12 / 10);
    for (uint64_t i = 0; i < n; i += step)
        assert_int_equal(found_in_range(x, i, step), step);
    /* A client that knew the index before it split finds and writes all the same. */
    assert_int_equal(found_in_range(other, 0, step), step);
    index_close(other);
    index_close(x);
    x = index_open(s, &err);
    insert_range(stale, n, step);
    assert_int_equal(found_in_range(x, n, step), step);
    index_close(stale);
}

/* Whoever splits ends in the middle of it: whoever comes next finishes it. */
static void a_split_that_was_not_finished_is(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    struct store *faulty = store_fault_create(test_store_open(place), &err);
    struct index *dying = index_open(faulty, &err);
    struct index_stat stat;
    uint64_t n = 0;
    assert_ok(err);
    index_limit_shards(dying, 100);
    store_fault_arm(faulty, "update.repository=unknown", &err); /* the number is raised, and then */
    while (!err) {
        struct index_entry e = entry(n, &(uint64_t){n + 1000000});
        index_insert(dying, &e, 1, &err);
        n++;
    }
    assert_int_equal(err->kind, VM_ERROR_TIMEOUT);
    error_clear(&err);
    index_close(dying);
    store_close(faulty);
    struct index *next = index_open(s, &err);
    index_stat(next, &stat, &err);
    assert_ok(err);
    assert_int_equal(stat.shards, INDEX_SHARDS_FIRST + 1);
    insert_range(next, n, 2000);
    assert_int_equal(found_in_range(next, n, 2000), 2000);
    assert_int_equal(found_in_range(next, 0, n - 1), n - 1);
    index_close(next);
    next = index_open(s, &err); /* without trying eight times at each look */
    struct store *counted = store_fault_create(test_store_open(place), &err);
    struct index *looking = index_open(counted, &err);
    found_in_range(looking, 0, 500);
    assert_true(store_fault_passages(counted, "get.index") <= INDEX_SHARDS_FIRST + 1);
    index_close(looking);
    store_close(counted);
    index_close(next);
}

struct inserter {
    struct index *x;
    uint64_t from;
};

static void *insert_many(void *arg)
{
    struct inserter *i = arg;
    for (int step = 0; step < 20; step++)
        insert_range(i->x, i->from + 2000ul * (unsigned)step, 2000);
    return NULL;
}

static void writers_at_once_may_split(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    struct inserter inserters[3];
    pthread_t threads[3];
    for (unsigned i = 0; i < 3; i++) {
        inserters[i] = (struct inserter){index_open(s, &err), i * 1000000ul};
        index_limit_shards(inserters[i].x, 1000);
        pthread_create(&threads[i], NULL, insert_many, &inserters[i]);
    }
    unsigned found = 0;
    for (unsigned i = 0; i < 3; i++) {
        pthread_join(threads[i], NULL);
        index_close(inserters[i].x);
    }
    for (unsigned i = 0; i < 3; i++)
        found += found_in_range(x, i * 1000000ul, 40000);
    /* A split may lose what is written in its window: a hint, but there must be few of them. */
    assert_in_range(found, 120000 * 99 / 100, 120000);
}

static void a_lost_shard_costs_only_its_hints(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    insert_range(x, 0, 1600);
    assert_int_equal(store_remove(s, STORE_MAP, "index.000003", &err), STORE_DONE);
    assert_in_range(found_in_range(x, 0, 1600), 1400, 1599);
    insert_range(x, 0, 1600);
    assert_int_equal(found_in_range(x, 0, 1600), 1600);
    assert_ok(err);
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(what_was_inserted_is_found),
        TEST(a_later_entry_replaces),
        TEST(only_the_named_value_is_erased),
        TEST(a_split_that_was_not_finished_is),
        TEST(shards_split_and_nothing_is_lost),
        TEST(writers_at_once_may_split),
        TEST(a_lost_shard_costs_only_its_hints),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

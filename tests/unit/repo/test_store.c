/* SPDX-License-Identifier: Apache-2.0 */
/* One suite for every driver of the store. */
#include "tests/unit/repo/repo_test.h"

#include <pthread.h>

static struct store *s;
static char place[512];

static int setup(void **state)
{
    (void)state;
    s = test_store_open(test_place(place));
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    store_close(s);
    test_place_remove(place);
    return 0;
}

static enum store_result create(const char *name, const char *text)
{
    cleanup_error struct vm_error *err = NULL;
    enum store_result r = store_create(s, STORE_PACK, name, text, strlen(text), &err);
    assert_ok(err);
    return r;
}

static void assert_content(enum store_area area, const char *name, const char *text)
{
    cleanup_error struct vm_error *err = NULL;
    cleanup_buffer struct buffer b = {0};
    assert_int_equal(store_read_all(s, area, name, 1 << 20, &b, &err), STORE_DONE);
    assert_ok(err);
    assert_int_equal(b.len, strlen(text));
    if (b.len)
        assert_memory_equal(b.data, text, b.len);
}

static void an_object_is_created_once(void **state)
{
    assert_int_equal(create("pack.1", "first"), STORE_DONE);
    assert_int_equal(create("pack.1", "second"), STORE_EXISTS);
    assert_content(STORE_PACK, "pack.1", "first");
}

static void a_range_is_read_up_to_the_end(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    char out[16];
    size_t len = 99;
    create("pack.1", "0123456789");
    assert_int_equal(store_read(s, STORE_PACK, "pack.1", 3, out, 4, &len, &err), STORE_DONE);
    assert_int_equal(len, 4);
    assert_memory_equal(out, "3456", 4);
    assert_int_equal(store_read(s, STORE_PACK, "pack.1", 7, out, 16, &len, &err), STORE_DONE);
    assert_int_equal(len, 3);
    assert_int_equal(store_read(s, STORE_PACK, "pack.1", 50, out, 16, &len, &err), STORE_DONE);
    assert_int_equal(len, 0);
    assert_int_equal(store_read(s, STORE_PACK, "pack.2", 0, out, 16, &len, &err), STORE_MISSING);
    assert_ok(err);
}

static void what_is_given_is_stored_and_the_buffer_empty(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    cleanup_buffer struct buffer b = {0};
    buffer_put(&b, "a text", 6);
    assert_int_equal(store_create_given(s, STORE_PACK, "pack.1", &b, &err), STORE_DONE);
    assert_content(STORE_PACK, "pack.1", "a text");
    assert_int_equal(b.len, 0);
    buffer_put(&b, "another", 7);
    assert_int_equal(store_create_given(s, STORE_PACK, "pack.1", &b, &err), STORE_EXISTS);
    assert_content(STORE_PACK, "pack.1", "a text");
    assert_int_equal(b.len, 0);
    assert_ok(err);
}

static void what_is_removed_is_gone(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    cleanup_buffer struct buffer b = {0};
    create("pack.1", "x");
    assert_int_equal(store_remove(s, STORE_PACK, "pack.1", &err), STORE_DONE);
    assert_int_equal(store_remove(s, STORE_PACK, "pack.1", &err), STORE_MISSING);
    assert_int_equal(store_read_all(s, STORE_PACK, "pack.1", 9, &b, &err), STORE_MISSING);
    assert_ok(err);
    assert_int_equal(create("pack.1", "again"), STORE_DONE);
}

static void an_empty_object_is_one(void **state)
{
    assert_int_equal(create("pack.1", ""), STORE_DONE);
    assert_content(STORE_PACK, "pack.1", "");
}

static void an_object_larger_than_asked_for_is_damage(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    cleanup_buffer struct buffer b = {0};
    create("pack.1", "0123456789");
    assert_int_equal(store_read_all(s, STORE_PACK, "pack.1", 9, &b, &err), STORE_FAILED);
    assert_int_equal(err->kind, VM_ERROR_CORRUPT);
}

struct names {
    char text[8][STORE_NAME_MAX + 1];
    size_t n;
};

static int collect(const char *name, void *arg, struct vm_error **err)
{
    struct names *names = arg;
    assert_true(names->n < 8);
    snprintf(names->text[names->n++], STORE_NAME_MAX + 1, "%s", name);
    return 0;
}

static int by_text(const void *a, const void *b)
{
    return strcmp(a, b);
}

static void listing_shows_what_has_the_prefix(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    struct names names = {0};
    create("pack.2", "x");
    create("pack.1", "x");
    create("other.1", "x");
    assert_int_equal(store_list(s, STORE_PACK, "pack.", collect, &names, &err), 0);
    qsort(names.text, names.n, sizeof(*names.text), by_text);
    assert_int_equal(names.n, 2);
    assert_string_equal(names.text[0], "pack.1");
    assert_string_equal(names.text[1], "pack.2");
}

static int refuse(const char *name, void *arg, struct vm_error **err)
{
    (*(int *)arg)++;
    return error_set(err, VM_ERROR_FAILED, "enough of %s", name);
}

static void a_visitor_ends_a_listing_with_its_error(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    int calls = 0;
    create("pack.2", "x");
    create("pack.1", "x");
    assert_int_equal(store_list(s, STORE_PACK, "", refuse, &calls, &err), -1);
    assert_int_equal(calls, 1);
    assert_int_equal(err->kind, VM_ERROR_FAILED);
}

/* ---- maps ---- */

static enum store_result update(const char *map, enum store_presence presence, const char *cmp_key,
                                const char *cmp_value, const char *key, const char *value)
{
    cleanup_error struct vm_error *err = NULL;
    struct store_pair compare = {cmp_key, cmp_value, cmp_value ? strlen(cmp_value) : 0};
    struct store_pair set = {key, value, value ? strlen(value) : 0};
    struct store_op op = {.kind = STORE_UPDATE, .area = STORE_MAP, .name = map,
                          .presence = presence, .compares = &compare, .n_compares = cmp_key != NULL,
                          .sets = &set, .n_sets = key && value, .erases = &key,
                          .n_erases = key && !value};
    store_run(s, &op, 1, &err);
    assert_ok(err);
    return op.result;
}

static void assert_value(const char *map, const char *key, const char *value)
{
    cleanup_error struct vm_error *err = NULL;
    cleanup_buffer struct buffer b = {0};
    assert_int_equal(store_get(s, map, key, &b, &err), STORE_DONE);
    assert_ok(err);
    assert_int_equal(b.len, strlen(value));
    if (b.len)
        assert_memory_equal(b.data, value, b.len);
}

static void a_map_comes_into_being_as_asked(void **state)
{
    assert_int_equal(update("cat.0", STORE_PRESENT, NULL, NULL, "k", "v"), STORE_MISSING);
    assert_int_equal(update("cat.0", STORE_NEW, NULL, NULL, "k", "v"), STORE_DONE);
    assert_int_equal(update("cat.0", STORE_NEW, NULL, NULL, "k", "w"), STORE_EXISTS);
    assert_value("cat.0", "k", "v");
    assert_int_equal(update("cat.0", STORE_PRESENT, NULL, NULL, "k", "w"), STORE_DONE);
    assert_value("cat.0", "k", "w");
    assert_int_equal(update("cat.1", STORE_EITHER, NULL, NULL, "k", "v"), STORE_DONE);
    assert_int_equal(update("cat.1", STORE_EITHER, NULL, NULL, "l", "v"), STORE_DONE);
    assert_int_equal(update("cat.2", STORE_NEW, NULL, NULL, NULL, NULL), STORE_DONE);
    assert_int_equal(update("cat.2", STORE_NEW, NULL, NULL, NULL, NULL), STORE_EXISTS);
    assert_value("cat.2", "k", "");
}

static void a_guard_that_does_not_hold_changes_nothing(void **state)
{
    update("cat.0", STORE_NEW, NULL, NULL, "epoch", "7");
    assert_int_equal(update("cat.0", STORE_PRESENT, "epoch", "8", "name", "x"), STORE_MISMATCH);
    assert_value("cat.0", "name", "");
    assert_int_equal(update("cat.0", STORE_PRESENT, "epoch", "7", "name", "x"), STORE_DONE);
    assert_int_equal(update("cat.0", STORE_PRESENT, "epoch", "77", "name", NULL), STORE_MISMATCH);
    assert_value("cat.0", "name", "x");
}

static void a_missing_key_compares_as_empty(void **state)
{
    update("cat.0", STORE_NEW, NULL, NULL, "a", "1");
    assert_int_equal(update("cat.0", STORE_PRESENT, "b", NULL, "b", "1"), STORE_DONE);
    assert_int_equal(update("cat.0", STORE_PRESENT, "b", NULL, "b", "2"), STORE_MISMATCH);
    assert_int_equal(update("cat.0", STORE_PRESENT, "gone", "x", "b", "2"), STORE_MISMATCH);
    assert_value("cat.0", "b", "1");
    assert_int_equal(update("cat.0", STORE_PRESENT, "b", "1", "b", NULL), STORE_DONE);
    assert_value("cat.0", "b", "");
    assert_int_equal(update("cat.0", STORE_PRESENT, NULL, NULL, "b", NULL), STORE_DONE);
}

static void many_keys_come_in_one_answer(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    enum { N = STORE_KEYS_MAX };
    static char keys[N][16], values[N][16];
    static struct store_pair sets[N], asked[N];
    for (int i = 0; i < N; i++) {
        snprintf(keys[i], 16, "k%05d", i * 7919 % N);
        snprintf(values[i], 16, "v%d", i);
        sets[i] = (struct store_pair){keys[i], values[i], strlen(values[i])};
        asked[i].key = i % 2 ? keys[i] : "absent";
    }
    struct store_op ops[2] = {
        {.kind = STORE_UPDATE, .area = STORE_MAP, .name = "index.0", .presence = STORE_EITHER,
         .sets = sets, .n_sets = N},
        {.kind = STORE_GET, .area = STORE_MAP, .name = "index.0", .pairs = asked, .n_pairs = N},
    };
    assert_int_equal(store_run(s, &ops[0], 1, &err), 0);
    assert_int_equal(store_run(s, &ops[1], 1, &err), 0);
    for (int i = 0; i < N; i++) {
        assert_int_equal(asked[i].len, i % 2 ? strlen(values[i]) : 0);
        if (asked[i].len)
            assert_memory_equal(asked[i].value, values[i], asked[i].len);
    }
    store_ops_finish(ops, 2);
    ops[1].n_pairs = N + 1;
    assert_int_equal(store_run(s, &ops[1], 1, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_USAGE);
}

struct seen {
    char text[4096];
};

static int note(const struct store_pair *pair, void *arg, struct vm_error **err)
{
    struct seen *seen = arg;
    size_t n = strlen(seen->text);
    snprintf(seen->text + n, sizeof(seen->text) - n, "%s=%.*s ", pair->key, (int)pair->len,
             (const char *)pair->value);
    return 0;
}

static void a_scan_goes_in_order_and_keeps_to_its_prefix(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    struct seen seen = {{0}};
    static const char *const keys[] = {"n:b", "n:a", "m:z", "o:a", "n:", "n:a1"};
    for (size_t i = 0; i < 6; i++)
        update("cat.0", STORE_EITHER, NULL, NULL, keys[i], "v");
    update("cat.00", STORE_EITHER, NULL, NULL, "n:other-map", "v");
    assert_int_equal(store_scan(s, "cat.0", "n:", note, &seen, &err), STORE_DONE);
    assert_string_equal(seen.text, "n:=v n:a=v n:a1=v n:b=v ");
    seen.text[0] = 0;
    assert_int_equal(store_scan(s, "cat.0", NULL, note, &seen, &err), STORE_DONE);
    assert_string_equal(seen.text, "m:z=v n:=v n:a=v n:a1=v n:b=v o:a=v ");
    assert_int_equal(store_scan(s, "cat.9", NULL, note, &seen, &err), STORE_MISSING);
    assert_ok(err);
}

static void a_scan_is_bounded_and_resumes_behind_a_key(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    for (char c = 'a'; c <= 'e'; c++)
        update("cat.0", STORE_EITHER, NULL, NULL, (char[]){'k', c, 0}, "v");
    struct store_op op = {.kind = STORE_SCAN, .area = STORE_MAP, .name = "cat.0", .after = "kb",
                          .prefix = "k", .max = 2};
    assert_int_equal(store_run(s, &op, 1, &err), 0);
    assert_int_equal(op.n_ret_pairs, 2);
    assert_string_equal(op.ret_pairs[0].key, "kc");
    assert_string_equal(op.ret_pairs[1].key, "kd");
    assert_true(op.ret_more);
    op.after = "kd";
    assert_int_equal(store_run(s, &op, 1, &err), 0);
    assert_int_equal(op.n_ret_pairs, 1);
    assert_false(op.ret_more);
    store_ops_finish(&op, 1);
}

enum { SCANNED_MAPS = 150, SCANNED_KEYS = 40 };

struct seen_maps {
    unsigned n[SCANNED_MAPS], others;
};

/* Key i of map m is the ith that comes. */
static int count_in_order(size_t map, const struct store_pair *pair, void *arg,
                          struct vm_error **err)
{
    struct seen_maps *seen = arg;
    char want[16];
    snprintf(want, sizeof(want), "k%02u", seen->n[map]++);
    seen->others += strcmp(want, pair->key) != 0 || pair->len != 2 ||
                    get_le16(pair->value) != map;
    return 0;
}

static void many_maps_are_scanned_at_once(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    static char names[SCANNED_MAPS][16], keys[SCANNED_KEYS][8];
    static const char *list[SCANNED_MAPS];
    static struct seen_maps seen;
    struct store_pair sets[SCANNED_KEYS];
    size_t missing = 0;
    memset(&seen, 0, sizeof(seen));
    for (unsigned m = 0; m < SCANNED_MAPS; m++) {
        uint8_t value[2];
        put_le16(value, (uint16_t)m);
        snprintf(names[m], sizeof(names[m]), "cat.%u", m);
        list[m] = names[m];
        for (unsigned i = 0; i < SCANNED_KEYS; i++) {
            snprintf(keys[i], sizeof(keys[i]), i ? "k%02u" : "x%02u", i ? i - 1 : 0);
            sets[i] = (struct store_pair){keys[i], value, sizeof(value)};
        }
        /* More than comes in one step; a few; or none of that prefix. */
        struct store_op op = {.kind = STORE_UPDATE, .area = STORE_MAP, .name = names[m],
                              .presence = STORE_EITHER, .sets = sets,
                              .n_sets = m % 7 ? 1 + m % 3 : SCANNED_KEYS};
        store_run(s, &op, 1, &err);
        assert_ok(err);
    }
    assert_int_equal(store_scan_many(s, list, SCANNED_MAPS, "k", count_in_order, &seen, &missing,
                                     &err),
                     STORE_DONE);
    assert_int_equal(seen.others, 0);
    for (unsigned m = 0; m < SCANNED_MAPS; m++)
        assert_int_equal(seen.n[m], m % 7 ? m % 3 : SCANNED_KEYS - 1);
    assert_int_equal(store_remove(s, STORE_MAP, "cat.77", &err), STORE_DONE);
    assert_int_equal(store_scan_many(s, list, SCANNED_MAPS, "z", count_in_order, &seen, &missing,
                                     &err),
                     STORE_MISSING);
    assert_int_equal(missing, 77);
    assert_int_equal(store_scan_many(s, list, SCANNED_MAPS, "z", count_in_order, &seen, NULL,
                                     &err),
                     STORE_DONE);
    assert_ok(err);
}

static void a_map_is_removed_with_its_keys(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    struct names names = {0};
    update("index.1", STORE_NEW, NULL, NULL, "a", "1");
    update("index.2", STORE_NEW, NULL, NULL, "a", "1");
    assert_int_equal(store_remove(s, STORE_MAP, "index.1", &err), STORE_DONE);
    assert_int_equal(store_remove(s, STORE_MAP, "index.1", &err), STORE_MISSING);
    assert_int_equal(update("index.1", STORE_PRESENT, NULL, NULL, "a", "1"), STORE_MISSING);
    assert_value("index.2", "a", "1");
    assert_int_equal(store_list(s, STORE_MAP, "index.", collect, &names, &err), 0);
    assert_int_equal(names.n, 1);
    assert_string_equal(names.text[0], "index.2");
}

/* ---- batches and threads ---- */

static void answers_of_a_batch_are_each_their_own(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    create("pack.1", "one");
    enum { N = 150 };
    static struct store_op ops[N];
    static char out[N][8];
    for (int i = 0; i < N; i++)
        ops[i] = (struct store_op){.kind = STORE_READ, .area = STORE_PACK, .out = out[i], .len = 8,
                                   .name = i % 3 ? "pack.1" : "pack.absent"};
    assert_int_equal(store_run(s, ops, N, &err), 0);
    for (int i = 0; i < N; i++) {
        assert_int_equal(ops[i].result, i % 3 ? STORE_DONE : STORE_MISSING);
        assert_int_equal(ops[i].ret_len, i % 3 ? 3 : 0);
    }
}

enum { THREADS = 4, ROUNDS = 25 };

static void *increment(void *arg)
{
    for (int done = 0; done < ROUNDS;) {
        struct vm_error *err = NULL;
        struct buffer b = {0};
        char value[16] = "", next[16];
        store_get(s, "counter", "n", &b, &err);
        memcpy(value, b.data, b.len);
        buffer_finish(&b);
        snprintf(next, sizeof(next), "%d", atoi(value) + 1);
        struct store_pair compare = {"n", value, strlen(value)}, set = {"n", next, strlen(next)};
        struct store_op op = {.kind = STORE_UPDATE, .area = STORE_MAP, .name = "counter",
                              .compares = &compare, .n_compares = 1, .sets = &set, .n_sets = 1};
        store_run(s, &op, 1, &err);
        done += op.result == STORE_DONE;
        if (err)
            abort();
    }
    return NULL;
}

static void guarded_updates_of_many_lose_none(void **state)
{
    pthread_t threads[THREADS];
    update("counter", STORE_NEW, NULL, NULL, "n", "0");
    for (int i = 0; i < THREADS; i++)
        pthread_create(&threads[i], NULL, increment, NULL);
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    char total[16];
    snprintf(total, sizeof(total), "%d", THREADS * ROUNDS);
    assert_value("counter", "n", total);
}

static void *create_contended(void *arg)
{
    cleanup_error struct vm_error *err = NULL;
    return (void *)(uintptr_t)store_create(s, STORE_PACK, "contended", arg, 1, &err);
}

static void one_of_several_creators_wins(void **state)
{
    pthread_t threads[THREADS];
    static char texts[THREADS][2] = {"a", "b", "c", "d"};
    int won = -1;
    for (int i = 0; i < THREADS; i++)
        pthread_create(&threads[i], NULL, create_contended, texts[i]);
    for (int i = 0; i < THREADS; i++) {
        void *result;
        pthread_join(threads[i], &result);
        if ((uintptr_t)result == STORE_DONE) {
            assert_int_equal(won, -1);
            won = i;
        } else {
            assert_int_equal((uintptr_t)result, STORE_EXISTS);
        }
    }
    assert_content(STORE_PACK, "contended", texts[won]);
}

static void content_outlives_the_client(void **state)
{
    create("pack.1", "kept");
    update("cat.0", STORE_NEW, NULL, NULL, "k", "kept");
    store_close(s);
    s = test_store_open(place);
    assert_content(STORE_PACK, "pack.1", "kept");
    assert_value("cat.0", "k", "kept");
}

static void arguments_outside_the_limits_are_refused(void **state)
{
    static char long_name[80], long_key[300];
    memset(long_name, 'n', sizeof(long_name) - 1);
    memset(long_key, 'k', sizeof(long_key) - 1);
    struct store_pair bad_keys[] = {{long_key, "v", 1}, {"", "v", 1}, {"a\n", "v", 1}, {"k", "", 0},
                                    {"k", "v", STORE_VALUE_MAX + 1}};
    for (size_t i = 0; i < 5; i++) {
        cleanup_error struct vm_error *err = NULL;
        struct store_op op = {.kind = STORE_UPDATE, .area = STORE_MAP, .name = "cat.0",
                              .presence = STORE_EITHER, .sets = &bad_keys[i], .n_sets = 1};
        assert_int_equal(store_run(s, &op, 1, &err), -1);
        assert_int_equal(err->kind, VM_ERROR_USAGE);
    }
    static const char *const bad_names[] = {"", "a/b", "../a", ".x", "a b", long_name};
    for (size_t i = 0; i < 6; i++) {
        cleanup_error struct vm_error *err = NULL;
        assert_int_equal(store_create(s, STORE_PACK, bad_names[i], "x", 1, &err), STORE_FAILED);
        assert_int_equal(err->kind, VM_ERROR_USAGE);
    }
    cleanup_error struct vm_error *err = NULL;
    assert_int_equal(store_create(s, STORE_MAP, "x", "x", 1, &err), STORE_FAILED);
    assert_int_equal(err->kind, VM_ERROR_USAGE);
}

static void ballast_is_taken_and_refilled(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    assert_int_equal(store_ballast_take(s, &err), 0);
    assert_int_equal(store_ballast_refill(s, &err), 0);
    assert_int_equal(store_ballast_refill(s, &err), 0);
    assert_int_equal(store_ballast_take(s, &err), 0);
    assert_ok(err);
}

static void the_space_is_told(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    struct store_space space;
    assert_int_equal(store_space(s, &space, &err), 0);
    assert_true(space.total > 0 && space.available <= space.total);
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(an_object_is_created_once),
        TEST(a_range_is_read_up_to_the_end),
        TEST(what_is_given_is_stored_and_the_buffer_empty),
        TEST(what_is_removed_is_gone),
        TEST(an_empty_object_is_one),
        TEST(an_object_larger_than_asked_for_is_damage),
        TEST(listing_shows_what_has_the_prefix),
        TEST(a_visitor_ends_a_listing_with_its_error),
        TEST(a_map_comes_into_being_as_asked),
        TEST(a_guard_that_does_not_hold_changes_nothing),
        TEST(a_missing_key_compares_as_empty),
        TEST(many_keys_come_in_one_answer),
        TEST(a_scan_goes_in_order_and_keeps_to_its_prefix),
        TEST(a_scan_is_bounded_and_resumes_behind_a_key),
        TEST(many_maps_are_scanned_at_once),
        TEST(a_map_is_removed_with_its_keys),
        TEST(answers_of_a_batch_are_each_their_own),
        TEST(guarded_updates_of_many_lose_none),
        TEST(one_of_several_creators_wins),
        TEST(content_outlives_the_client),
        TEST(arguments_outside_the_limits_are_refused),
        TEST(ballast_is_taken_and_refilled),
        TEST(the_space_is_told),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

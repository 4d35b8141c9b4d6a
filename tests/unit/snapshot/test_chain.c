/* SPDX-License-Identifier: Apache-2.0 */
/* Names of snapshots, and which of them a rule keeps. */
#include "repo/copy.h"
#include "snapshot/chain.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

enum { DAY = 86400 };

static void names_are_checked(void **state)
{
    (void)state;
    char image[IMAGE_NAME_MAX + 1], vm[VM_NAME_MAX + 1], name[SNAPSHOT_NAME_MAX + 1];
    static const char *const bad[] = {"", "-a", ".a", "a b", "a@b", "a/b", "a:b",
                                      "0123456789012345678901234567890123456789012345678"};
    for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); i++) {
        cleanup_error struct vm_error *err = NULL;
        assert_int_equal(snapshot_image_name("web1", bad[i], image, &err), -1);
        assert_int_equal(err->kind, VM_ERROR_USAGE);
    }
    assert_int_equal(snapshot_image_name("web1", "night-1.x", image, NULL), 0);
    assert_string_equal(image, "web1@night-1.x");
    assert_int_equal(snapshot_split_name(image, vm, name, NULL), 0);
    assert_string_equal(vm, "web1");
    assert_string_equal(name, "night-1.x");
    assert_int_equal(snapshot_split_name("debian12:v3", vm, name, NULL), -1);
    assert_int_equal(snapshot_split_name("@x", vm, name, NULL), -1);
    assert_int_equal(snapshot_split_name("a@b@c", vm, name, NULL), -1);
}

/* Which are kept, as a string of their letters. */
static void expect(const uint64_t *times, size_t n, struct snapshot_rule rule, const char *kept)
{
    struct snapshot_entry list[16] = {0};
    bool drop[16];
    char got[17] = "", *end = got;
    for (size_t i = 0; i < n; i++)
        list[i].created_s = times[i];
    snapshot_choose(list, n, &rule, drop);
    for (size_t i = 0; i < n; i++)
        if (!drop[i])
            *end++ = (char)('a' + i);
    assert_string_equal(got, kept);
}

static void rules_keep_what_they_say(void **state)
{
    (void)state;
    /* Thursday 1970-01-01 twice, Saturday, Sunday, Monday twice, Tuesday. */
    static const uint64_t t[] = {10,      20,          2 * DAY,     3 * DAY + 5,
                                 4 * DAY, 4 * DAY + 9, 5 * DAY + 1};
    expect(t, 7, (struct snapshot_rule){.last = 2}, "fg");
    expect(t, 7, (struct snapshot_rule){.last = 100}, "abcdefg");
    expect(t, 7, (struct snapshot_rule){.daily = 3}, "dfg");
    expect(t, 7, (struct snapshot_rule){.daily = 100}, "bcdfg");
    expect(t, 7, (struct snapshot_rule){.weekly = 2}, "dg");
    expect(t, 7, (struct snapshot_rule){.weekly = 9}, "dg");
    expect(t, 7, (struct snapshot_rule){.last = 3, .daily = 4, .weekly = 1}, "cdefg");
    expect(t, 0, (struct snapshot_rule){.last = 1}, "");
}

static void a_list_is_cut_to_the_newest_of_all_vms(void **state)
{
    (void)state;
    struct snapshot_entry list[] = {{.vm = "a", .writer = 7}, {.vm = "a", .writer = 9}, {.vm = "b", .writer = 2},
                                    {.vm = "b", .writer = 8}, {.vm = "c", .writer = 1}};
    size_t n = 5;
    assert_int_equal(snapshot_list_limit(list, &n, 5, NULL), 0);
    assert_int_equal(n, 5);
    assert_int_equal(snapshot_list_limit(list, &n, 3, NULL), 0);
    assert_int_equal(n, 3);
    assert_int_equal(list[0].writer, 7);
    assert_int_equal(list[1].writer, 9);
    assert_int_equal(list[2].writer, 8);
}

/* ---- clocks ---- */

static struct repo *new_repo(const char *folder, const char *name)
{
    char url[96];
    snprintf(url, sizeof(url), "dir:%s/%s", folder, name);
    assert_int_equal(repo_init(url, &(struct repo_init_options){0}, NULL), 0);
    struct repo *r = repo_open(url, NULL);
    assert_non_null(r);
    return r;
}

/* A snapshot that was committed when the clock said so. */
static void store(struct repo *r, const char *name, uint64_t clock_s)
{
    struct import_report report;
    struct image as = {.created_s = clock_s};
    struct image_session *s = image_session_begin(r, name, NULL, NULL);
    assert_non_null(s);
    assert_non_null(image_session_file(s, SNAPSHOT_DEFINITION_FILE, PAGE_BYTES, NULL));
    image_session_describe(s, &as);
    assert_int_equal(image_session_commit(s, &report, NULL), 0);
    image_session_end(s);
}

static void expect_list(struct repo *r, const char *const *names, size_t n)
{
    cleanup_free struct snapshot_entry *list = NULL;
    cleanup_free struct image *newest = calloc(1, sizeof(*newest));
    bool drop[16];
    size_t got;
    assert_int_equal(snapshot_list(r, "web1", &list, &got, NULL), 0);
    assert_int_equal(got, n);
    for (size_t i = 0; i < n; i++)
        assert_string_equal(list[i].name, names[i]);
    snapshot_choose(list, n, &(struct snapshot_rule){.last = 1}, drop);
    assert_false(drop[n - 1]);
    assert_true(drop[0]);
    assert_int_equal(snapshot_newest(r, "web1", newest, NULL), 0);
    assert_string_equal(strchr(newest->name, '@') + 1, names[n - 1]);
}

static void the_newest_is_the_last_whatever_the_clock_said(void **state)
{
    (void)state;
    static const char *const names[] = {"c", "a", "b"};
    char folder[] = "/tmp/vmmig-chain-XXXXXX", command[96];
    struct copy_report report;
    assert_non_null(mkdtemp(folder));
    struct repo *r = new_repo(folder, "one"), *copy = new_repo(folder, "two");
    store(r, "web1@c", 5000);
    store(r, "web1@a", 9000); /* on a host whose clock is ahead */
    store(r, "web1@b", 6000); /* back on the first */
    expect_list(r, names, 3);
    assert_int_equal(repo_copy(r, copy, NULL, NULL, &report, NULL), 0);
    expect_list(copy, names, 3);
    repo_close(copy);
    repo_close(r);
    snprintf(command, sizeof(command), "rm -rf %s", folder);
    assert_int_equal(system(command), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(names_are_checked),
        cmocka_unit_test(rules_keep_what_they_say),
        cmocka_unit_test(a_list_is_cut_to_the_newest_of_all_vms),
        cmocka_unit_test(the_newest_is_the_last_whatever_the_clock_said),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

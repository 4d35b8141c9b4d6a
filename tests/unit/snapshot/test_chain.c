/* SPDX-License-Identifier: Apache-2.0 */
/* Names of snapshots, and which of them a rule keeps. */
#include "snapshot/chain.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

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
    char got[17] = "";
    for (size_t i = 0; i < n; i++)
        list[i].created_s = times[i];
    snapshot_choose(list, n, &rule, drop);
    for (size_t i = 0; i < n; i++)
        if (!drop[i])
            strncat(got, &"abcdefghijklmnop"[i], 1);
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

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(names_are_checked),
        cmocka_unit_test(rules_keep_what_they_say),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

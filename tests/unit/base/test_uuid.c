/* SPDX-License-Identifier: Apache-2.0 */
#include "base/uuid.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

static void text_and_back(void **state)
{
    (void)state;
    struct uuid u, again;
    assert_true(uuid_parse("0123ABCD-ef01-4567-89ab-cdef01234567", &u));
    assert_string_equal(uuid_text(&u), "0123abcd-ef01-4567-89ab-cdef01234567");
    assert_true(uuid_parse(uuid_text(&u), &again));
    assert_true(uuid_equal(&u, &again));
}

static void anything_else_is_not_a_uuid(void **state)
{
    (void)state;
    static const char *const bad[] = {"", "0123abcd", "0123abcd-ef01-4567-89ab-cdef0123456",
                                      "0123abcd-ef01-4567-89ab-cdef012345678",
                                      "0123abcdef014567089ab0cdef0123456789",
                                      "0123abcg-ef01-4567-89ab-cdef01234567",
                                      "{123abcd-ef01-4567-89ab-cdef01234567"};
    struct uuid u;
    for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); i++)
        assert_false(uuid_parse(bad[i], &u));
}

static void fresh_ones_differ_and_are_version_4(void **state)
{
    (void)state;
    struct uuid a = uuid_new(), b = uuid_new(), nil = {{0}};
    assert_false(uuid_equal(&a, &b));
    assert_int_equal(a.bytes[6] >> 4, 4);
    assert_int_equal(a.bytes[8] >> 6, 2);
    assert_false(uuid_is_nil(&a));
    assert_true(uuid_is_nil(&nil));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(text_and_back),
        cmocka_unit_test(anything_else_is_not_a_uuid),
        cmocka_unit_test(fresh_ones_differ_and_are_version_4),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

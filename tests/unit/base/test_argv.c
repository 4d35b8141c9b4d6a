/* SPDX-License-Identifier: Apache-2.0 */
#include "base/argv.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

static void a_copy_stands_alone(void **state)
{
    (void)state;
    char name[] = "qemu", empty[] = "", last[] = "-S";
    char *words[] = {name, empty, last, NULL};
    assert_int_equal(argv_count(words), 3);
    char **copy = argv_copy(words, 3);
    memset(name, 'x', 4);
    assert_string_equal(copy[0], "qemu");
    assert_string_equal(copy[1], "");
    assert_string_equal(copy[2], "-S");
    assert_null(copy[3]);
    free(copy); /* all of it: a leak is seen by the sanitizer */
}

static void a_part_and_nothing(void **state)
{
    (void)state;
    char first[] = "a", second[] = "b";
    char *words[] = {first, second};
    char **copy = argv_copy(words, 1);
    assert_int_equal(argv_count(copy), 1);
    free(copy);
    copy = argv_copy(words, 0);
    assert_int_equal(argv_count(copy), 0);
    free(copy);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_copy_stands_alone),
        cmocka_unit_test(a_part_and_nothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

/* SPDX-License-Identifier: Apache-2.0 */
#include "base/error.h"

#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

static int open_disk(struct vm_error **err)
{
    return error_errno(err, ENOENT, "cannot open %s", "/disk");
}

static void context_is_added_while_unwinding(void **state)
{
    (void)state;
    cleanup_error struct vm_error *err = NULL;
    assert_int_equal(open_disk(&err), -1);
    assert_int_equal(error_wrap(&err, "vm %s", "web1"), -1);
    assert_string_equal(error_message(err),
                        "vm web1: cannot open /disk: No such file or directory");
    assert_int_equal(err->kind, VM_ERROR_NOT_FOUND);
    assert_int_equal(err->sys_errno, ENOENT);
}

static void a_caller_may_ignore_the_error(void **state)
{
    (void)state;
    error_clear(NULL);
    assert_int_equal(open_disk(NULL), -1);
    assert_int_equal(error_wrap(NULL, "x"), -1);
    assert_string_equal(error_message(NULL), "no error");
}

static void kinds_have_distinct_names_and_statuses(void **state)
{
    (void)state;
    for (int i = 0; i < VM_ERROR_KIND_COUNT; i++) {
        assert_int_equal(error_kind_parse(error_kind_name(i)), i);
        for (int j = 0; j < i; j++)
            assert_int_not_equal(error_kind_status(i), error_kind_status(j));
    }
    assert_int_equal(error_kind_parse("something newer"), VM_ERROR_FAILED);
}

static void out_of_memory_is_an_error_that_needs_no_memory(void **state)
{
    (void)state;
    struct vm_error *err = NULL;
    error_nomem(&err);
    error_wrap(&err, "context");
    error_set_kind(&err, VM_ERROR_FAILED);
    assert_string_equal(error_message(err), "out of memory");
    assert_int_equal(err->kind, VM_ERROR_NO_SPACE);
    error_clear(&err);
    assert_null(err);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(context_is_added_while_unwinding),
        cmocka_unit_test(a_caller_may_ignore_the_error),
        cmocka_unit_test(kinds_have_distinct_names_and_statuses),
        cmocka_unit_test(out_of_memory_is_an_error_that_needs_no_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

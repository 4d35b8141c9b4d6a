/* SPDX-License-Identifier: Apache-2.0 */
#include "tests/unit/repo/repo_test.h"
#include "repo/store_fault.h"

#include <errno.h>

static struct store *s;
static char place[512];

static int setup(void **state)
{
    s = store_fault_create(test_store_open(test_place(place)), NULL);
    return s ? 0 : -1;
}

static int teardown(void **state)
{
    store_close(s);
    test_place_remove(place);
    return 0;
}

static void arm(const char *spec)
{
    cleanup_error struct vm_error *err = NULL;
    store_fault_arm(s, spec, &err);
    assert_ok(err);
}

static enum store_result create(const char *name, struct vm_error **err)
{
    return store_create(s, STORE_PACK, name, "12345678", 8, err);
}

static size_t stored(const char *name)
{
    char out[16];
    size_t len = 0;
    store_read(s, STORE_PACK, name, 0, out, sizeof(out), &len, NULL);
    return len;
}

static void an_error_acts_at_its_passage_alone(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    arm("create.pack=error:ENOSPC@2");
    assert_int_equal(create("pack.1", &err), STORE_DONE);
    assert_int_equal(create("other.2", &err), STORE_DONE);
    assert_int_equal(create("pack.2", &err), STORE_FAILED);
    assert_int_equal(err->kind, VM_ERROR_NO_SPACE);
    assert_int_equal(stored("pack.2"), 0);
    assert_int_equal(create("pack.3", NULL), STORE_DONE);
    assert_int_equal(store_fault_passages(s, "create.pack"), 3);
    assert_int_equal(store_fault_passages(s, "create.any"), 4);
}

static void the_other_actions_do_what_they_say(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    arm("create.torn=torn, create.lost=lost, create.doubt=unknown");
    assert_int_equal(create("torn.1", &err), STORE_DONE);
    assert_int_equal(stored("torn.1"), 4);
    assert_int_equal(create("lost.1", &err), STORE_DONE);
    assert_int_equal(stored("lost.1"), 0);
    assert_int_equal(create("doubt.1", &err), STORE_FAILED);
    assert_int_equal(err->kind, VM_ERROR_TIMEOUT);
    assert_int_equal(stored("doubt.1"), 8);

    char out[8];
    size_t len;
    arm("read.any=flip@*");
    store_read(s, STORE_PACK, "doubt.1", 0, out, 8, &len, NULL);
    assert_memory_equal(out, "12341678", 8);
}

static void a_spec_outside_the_grammar_is_refused(void **state)
{
    static const char *const bad[] = {"create.pack", "create=error", "create.x=explode",
                                      "create.x=error@0"};
    for (int i = 0; i < 4; i++) {
        cleanup_error struct vm_error *err = NULL;
        assert_int_equal(store_fault_arm(s, bad[i], &err), -1);
        assert_int_equal(err->kind, VM_ERROR_USAGE);
    }
}

static size_t before_second[2];

static void look_before_second(void)
{
    before_second[0] = stored("pack.0");
    before_second[1] = stored("pack.1");
}

static store_fault_between_fn *at_second(const struct store_op *op, void *arg)
{
    char *seen = arg;
    if (op->kind != STORE_CREATE)
        return NULL;
    strcat(strcat(seen, op->name), " ");
    return !strcmp(op->name, "pack.1") ? look_before_second : NULL;
}

static void the_hook_sees_each_operation_and_comes_between(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    char seen[64] = "";
    static const char *const names[] = {"pack.0", "pack.1", "pack.2"};
    struct store_op ops[3];
    for (int i = 0; i < 3; i++)
        ops[i] = (struct store_op){.kind = STORE_CREATE, .area = STORE_PACK, .name = names[i],
                                   .data = "12345678", .len = 8};
    store_fault_set_hook(s, at_second, seen);
    store_run(s, ops, 3, &err);
    assert_ok(err);
    assert_string_equal(seen, "pack.0 pack.1 pack.2 ");
    assert_int_equal(before_second[0], 8);
    assert_int_equal(before_second[1], 0);
    for (int i = 0; i < 3; i++)
        assert_int_equal(stored(names[i]), 8);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(an_error_acts_at_its_passage_alone, setup, teardown),
        cmocka_unit_test_setup_teardown(the_other_actions_do_what_they_say, setup, teardown),
        cmocka_unit_test_setup_teardown(a_spec_outside_the_grammar_is_refused, setup, teardown),
        cmocka_unit_test_setup_teardown(the_hook_sees_each_operation_and_comes_between, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

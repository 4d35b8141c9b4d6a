/* SPDX-License-Identifier: Apache-2.0 */
/* Built with fault points, whatever the rest of the build has. */
#include "base/fault.h"

#include "base/clock.h"

#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>
#include <cmocka.h>

static enum fault_result pass(void)
{
    return FAULT("test.point");
}

static enum fault_result pass_other(void)
{
    return FAULT("test.other");
}

static void a_point_does_nothing_until_it_is_armed(void **state)
{
    (void)state;
    assert_int_equal(fault_arm("", NULL), 0);
    assert_int_equal(pass(), FAULT_NONE);
    assert_int_equal(fault_arm("test.point=drop", NULL), 0);
    assert_int_equal(pass_other(), FAULT_NONE);
    assert_int_equal(pass(), FAULT_DROP);
    assert_int_equal(pass(), FAULT_NONE); /* the first passage only */
}

static void the_nth_passage_or_every_one(void **state)
{
    (void)state;
    assert_int_equal(fault_arm("test.point=duplicate@3,test.other=corrupt@*", NULL), 0);
    for (int i = 1; i <= 4; i++) {
        assert_int_equal(pass(), i == 3 ? FAULT_DUPLICATE : FAULT_NONE);
        assert_int_equal(pass_other(), FAULT_CORRUPT);
    }
}

static void an_error_has_its_errno(void **state)
{
    (void)state;
    assert_int_equal(fault_arm("test.point=error:ENOSPC", NULL), 0);
    assert_int_equal(pass(), FAULT_ERROR);
    assert_int_equal(fault_errno(), ENOSPC);
    assert_int_equal(fault_arm("test.point=error", NULL), 0);
    assert_int_equal(pass(), FAULT_ERROR);
    assert_int_equal(fault_errno(), EIO);
}

static void a_delay_sleeps(void **state)
{
    (void)state;
    assert_int_equal(fault_arm("test.point=delay:20", NULL), 0);
    int64_t before = clock_mono_ns();
    assert_int_equal(pass(), FAULT_NONE);
    assert_true(clock_mono_ns() - before >= 20 * NSEC_PER_MSEC);
}

static void a_crash_is_kill_9(void **state)
{
    (void)state;
    int status;
    pid_t pid = fork();
    if (pid == 0) {
        fault_arm("test.point=crash", NULL);
        pass();
        _exit(0);
    }
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_true(WIFSIGNALED(status));
    assert_int_equal(WTERMSIG(status), SIGKILL);
}

static void a_typing_error_is_not_a_test_that_passes(void **state)
{
    (void)state;
    static const char *const bad[] = {"test.pont=drop", "test.point", "test.point=explode"};
    for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); i++) {
        cleanup_error struct vm_error *err = NULL;
        assert_int_equal(fault_arm(bad[i], &err), -1);
        assert_int_equal(err->kind, VM_ERROR_USAGE);
    }
    cleanup_error struct vm_error *err = NULL;
    setenv("VMMIG_FAULTS", "test.pont=drop", 1);
    assert_int_equal(fault_init(&err), -1);
    assert_string_equal(error_message(err), "VMMIG_FAULTS: no fault point is named 'test.pont'");
    setenv("VMMIG_FAULTS", "test.point=drop", 1);
    assert_int_equal(fault_init(NULL), 0);
    assert_int_equal(pass(), FAULT_DROP);
    unsetenv("VMMIG_FAULTS");
}

static void find_other(const struct fault_point *point, void *arg)
{
    if (!strcmp(point->name, "test.other"))
        *(struct fault_point *)arg = *point;
}

static struct fault_point look(void)
{
    struct fault_point found = {NULL};
    assert_int_equal(fault_list(find_other, &found, NULL), 0);
    assert_non_null(found.name);
    return found;
}

static void the_points_can_be_listed(void **state)
{
    (void)state;
    assert_int_equal(fault_arm("test.other=drop@2", NULL), 0);
    assert_string_equal(look().armed, "drop@2");
    pass_other();
    assert_int_equal(look().acted, 0);
    pass_other();
    assert_int_equal(look().acted, 1);
    assert_int_equal(fault_arm("", NULL), 0);
    assert_string_equal(look().armed, "");
}

static void *pass_in_a_thread(void *arg)
{
    *(enum fault_result *)arg = pass_other();
    return NULL;
}

static void what_holds_goes_on_when_it_is_disarmed(void **state)
{
    (void)state;
    pthread_t thread;
    enum fault_result result = FAULT_ERROR;
    assert_int_equal(fault_arm("test.other=hold", NULL), 0);
    assert_int_equal(pthread_create(&thread, NULL, pass_in_a_thread, &result), 0);
    while (!look().holds)
        usleep(1000);
    assert_int_equal(result, FAULT_ERROR);
    assert_int_equal(fault_arm("", NULL), 0);
    pthread_join(thread, NULL);
    assert_int_equal(result, FAULT_NONE);
}

static void wall_time_can_jump(void **state)
{
    (void)state;
    int64_t before = clock_wall_ns();
    assert_int_equal(fault_arm("clock.wall=jump:-3600000@*", NULL), 0);
    assert_true(clock_wall_ns() < before - 3500 * NSEC_PER_SEC);
    assert_int_equal(fault_arm("", NULL), 0);
    assert_true(clock_wall_ns() >= before);
}

static void patience_is_divided(void **state)
{
    (void)state;
    assert_int_equal(fault_patience_ns(1000), NSEC_PER_SEC);
    setenv("VMMIG_PATIENCE", "4", 1);
    assert_int_equal(fault_init(NULL), 0);
    assert_int_equal(fault_patience_ns(1000), NSEC_PER_SEC / 4);
    cleanup_error struct vm_error *err = NULL;
    setenv("VMMIG_PATIENCE", "none", 1);
    assert_int_equal(fault_init(&err), -1);
    assert_int_equal(err->kind, VM_ERROR_USAGE);
    unsetenv("VMMIG_PATIENCE");
    assert_int_equal(fault_init(NULL), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_point_does_nothing_until_it_is_armed),
        cmocka_unit_test(the_nth_passage_or_every_one),
        cmocka_unit_test(an_error_has_its_errno),
        cmocka_unit_test(a_delay_sleeps),
        cmocka_unit_test(a_crash_is_kill_9),
        cmocka_unit_test(a_typing_error_is_not_a_test_that_passes),
        cmocka_unit_test(the_points_can_be_listed),
        cmocka_unit_test(what_holds_goes_on_when_it_is_disarmed),
        cmocka_unit_test(wall_time_can_jump),
        cmocka_unit_test(patience_is_divided),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

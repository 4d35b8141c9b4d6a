/* SPDX-License-Identifier: Apache-2.0 */
/* The QEMU driver with real QEMUs: attach, launch, pause, resume, and how a source ends. */
#include "live.h"

#include <string.h>
#include <sys/stat.h>

static void test_spawn_and_attach(void **state)
{
    struct vm_error *err = NULL;
    struct qemu *q = live_spawn("a", &err, "-m", "64", "-S", NULL);
    if (!q)
        fail_msg("%s", error_message(err));
    assert_int_equal(qmp_version(qemu_qmp(q))->major >= 7, 1);
    assert_run_state(q, GUEST_PAUSED);
    struct process_identity process = qemu_guest(q)->process;
    assert_true(process_alive(&process));
    qemu_destroy(q); /* as when the agent ends */
    assert_true(process_alive(&process));

    q = qemu_attach(live_path("a", ".qmp"), 5000, &err);
    if (!q)
        fail_msg("%s", error_message(err));
    assert_true(process_identity_equal(&process, &qemu_guest(q)->process));
    live_end(q);
    assert_false(process_alive(&process));
}

static void test_spawn_failures(void **state)
{
    struct vm_error *err = NULL;
    struct stat st;
    assert_null(live_spawn("a", &err, "-drive", "file=/nonexistent/disk.raw", NULL));
    assert_error(&err, VM_ERROR_VMM_DIED, "Could not open '/nonexistent/disk.raw'");
    assert_int_equal(stat(live_path("a", ".qmp"), &st), -1);

    char *argv[] = {(char[]){"x"}, NULL};
    struct qemu_launch launch = {.binary = "/nonexistent/qemu",
                                 .argv = argv,
                                 .qmp_path = live_path("a", ".qmp"),
                                 .log_path = live_path("a", ".log")};
    assert_null(qemu_spawn(&launch, &err));
    assert_error(&err, VM_ERROR_NOT_FOUND, "cannot run /nonexistent/qemu");
    launch.binary = LIVE_BINARY;
    launch.cwd = "/nonexistent/folder";
    assert_null(qemu_spawn(&launch, &err));
    assert_error(&err, VM_ERROR_NOT_FOUND, "cannot enter the folder /nonexistent/folder");
    launch.cwd = "/";
    launch.user = "no-such-user";
    assert_null(qemu_spawn(&launch, &err));
    assert_error(&err, VM_ERROR_NOT_FOUND, "no user no-such-user");
    launch.user = NULL;
    launch.binary = "/bin/cat"; /* not a QEMU: it ends, or says nothing */
    assert_null(qemu_spawn(&launch, &err));
    assert_error(&err, VM_ERROR_VMM_DIED, "cat");
}

static void test_pause_resume(void **state)
{
    struct vm_error *err = NULL;
    struct qemu *q = live_spawn("a", &err, "-m", "64", NULL);
    assert_non_null(q);
    assert_run_state(q, GUEST_RUNNING);
    assert_ok(guest_pause(qemu_guest(q), why));
    assert_run_state(q, GUEST_PAUSED);
    assert_ok(guest_pause(qemu_guest(q), why));
    assert_ok(guest_resume(qemu_guest(q), why));
    assert_run_state(q, GUEST_RUNNING);
    assert_ok(guest_resume(qemu_guest(q), why));
    assert_ok(guest_announce(qemu_guest(q), why));
    assert_ok(guest_kill(qemu_guest(q), 5000, why));
    struct guest_status status;
    assert_int_equal(guest_status(qemu_guest(q), &status, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_VMM_DIED);
    error_clear(&err);
    assert_int_equal(guest_resume(qemu_guest(q), &err), -1);
    assert_int_equal(err->kind, VM_ERROR_VMM_DIED);
    error_clear(&err);
    live_end(q);
}

static void test_move_and_back(void **state)
{
    struct live_move m = {.populate = true};
    struct vm_error *err = NULL;
    char loader[160];
    snprintf(loader, sizeof(loader), "loader,file=%s,addr=0x1000000,force-raw=on",
             live_path("random", ".bin"));
    struct qemu *q = live_spawn("a", &err, "-M", "q35", "-m", "128", "-device", loader, "-S", NULL);
    if (!q)
        fail_msg("%s", error_message(err));
    assert_ok(live_move(&m, q, "b", why));
    assert_true(m.memory_done);
    assert_run_state(q, GUEST_POSTMIGRATE);
    assert_run_state(m.to, GUEST_PAUSED);
    assert_same_memory(q, m.to, 0, 64 << 20);
    assert_true(m.bytes < 4 << 20);
    /* The hand-over is undone: the source goes on. */
    assert_ok(guest_resume(qemu_guest(q), why));
    assert_run_state(q, GUEST_RUNNING);
    live_move_finish(&m);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        live_test(test_spawn_and_attach),
        live_test(test_spawn_failures),
        live_test(test_pause_resume),
        live_test(test_move_and_back),
    };
    return cmocka_run_group_tests(tests, live_setup, live_teardown);
}

/* SPDX-License-Identifier: Apache-2.0 */
/* libvmmig-attach, and callbacks of the VMM that fail, or hang. No KVM needed. */
#include "tests/unit/dirtylog/library_fixture.h"

#include "base/clock.h"

#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>
#include <cmocka.h>

static void callbacks_that_fail_are_reported(void **state)
{
    struct toy_vmm *v = new_vmm();
    struct vm_error *err = NULL;
    CLEANUP(attach) struct attach *a = agent_of(v);
    struct guest *g = attach_guest(a);
    vmmig_set_state(v->attach, VMMIG_RUNNING, NULL);
    v->fail[TOY_PAUSE] = -EIO;
    assert_int_equal(guest_pause(g, &err), -1);
    assert_string_equal(error_message(err), "the VMM's callback `pause` failed: Input/output error");
    assert_int_equal(err->kind, VM_ERROR_FAILED);
    error_clear(&err);
    struct guest_status status;
    assert_int_equal(guest_status(g, &status, &err), 0);
    assert_int_equal(status.state, GUEST_RUNNING);
    v->fail[TOY_PAUSE] = 0;
    assert_int_equal(guest_pause(g, &err), 0);
    v->fail[TOY_RESUME] = -EAGAIN;
    assert_int_equal(guest_resume(g, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_REFUSED); /* no vCPU ran: it may be taken back */
    error_clear(&err);
    assert_int_equal(guest_status(g, &status, &err), 0);
    assert_int_equal(status.state, GUEST_PAUSED);
    v->fail[TOY_RESUME] = 0;
    assert_int_equal(guest_resume(g, &err), 0);
    toy_vmm_destroy(v);
}

static void wait_for_state(struct guest *g, enum guest_run_state state, unsigned *calls_of_resume)
{
    struct guest_status status;
    int64_t deadline = clock_mono_ns() + 10 * NSEC_PER_SEC;
    do {
        assert_true(clock_mono_ns() < deadline);
        assert_int_equal(guest_status(g, &status, NULL), 0);
    } while (status.state != state || !*calls_of_resume);
}

static void a_pause_that_hangs_is_taken_back(void **state)
{
    struct toy_vmm *v = new_impatient_vmm();
    struct vm_error *err = NULL;
    CLEANUP(attach) struct attach *a = agent_of(v);
    struct guest *g = attach_guest(a);
    vmmig_set_state(v->attach, VMMIG_RUNNING, NULL);
    atomic_store(&v->running, true);
    atomic_store(&v->hang[TOY_PAUSE], true);
    assert_int_equal(guest_pause(g, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_TIMEOUT);
    assert_string_equal(error_message(err), "the VMM's callback `pause` has not returned for 0.2 s");
    error_clear(&err);
    assert_int_equal(guest_pause(g, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_CONFLICT);
    assert_string_equal(error_message(err), "the VMM's callback `pause` has not returned yet");
    error_clear(&err);
    atomic_store(&v->hang[TOY_PAUSE], false);
    wait_for_state(g, GUEST_RUNNING, (unsigned *)(void *)&v->calls[TOY_RESUME]);
    while (!atomic_load(&v->running))
        sched_yield(); /* the call is counted when it begins */
    toy_vmm_destroy(v);
}

/* It was the VMM's user who had the guest stand. */
static void a_late_pause_sets_no_guest_going_that_stood(void **state)
{
    struct toy_vmm *v = new_impatient_vmm();
    struct vm_error *err = NULL;
    CLEANUP(attach) struct attach *a = agent_of(v);
    struct guest_status status;
    vmmig_set_state(v->attach, VMMIG_PAUSED, NULL);
    atomic_store(&v->hang[TOY_PAUSE], true);
    assert_int_equal(guest_pause(attach_guest(a), &err), -1);
    assert_int_equal(err->kind, VM_ERROR_TIMEOUT);
    error_clear(&err);
    atomic_store(&v->hang[TOY_PAUSE], false);
    while (!atomic_load(&v->released))
        sched_yield();
    assert_int_equal(atomic_load(&v->calls[TOY_RESUME]), 0);
    assert_int_equal(guest_status(attach_guest(a), &status, NULL), 0);
    assert_int_equal(status.state, GUEST_PAUSED);
    toy_vmm_destroy(v);
}

/* What the agent has it holds against the VMM, until it gives it back; then it is the VMM's to run. */
static void a_guest_that_is_released_is_the_vmms(void **state)
{
    struct toy_vmm *v = new_vmm();
    struct vm_error *err = NULL;
    struct guest_status status;
    CLEANUP(attach) struct attach *a = agent_of(v);
    struct guest *g = attach_guest(a);
    vmmig_set_state(v->attach, VMMIG_RUNNING, NULL);
    assert_int_equal(guest_release(g, &err), -1);
    assert_string_equal(error_message(err), "RELEASE is out of order: the guest does not stand");
    error_clear(&err);
    assert_int_equal(guest_pause(g, &err), 0);
    for (int released = 0; released < 2; released++) {
        assert_int_equal(atomic_load(&v->released), released);
        vmmig_set_state(v->attach, VMMIG_RUNNING, NULL);
        assert_int_equal(guest_status(g, &status, &err), 0);
        assert_int_equal(status.state, released ? GUEST_RUNNING : GUEST_PAUSED);
        if (!released)
            assert_int_equal(guest_release(g, &err), 0);
    }
    vmmig_set_state(v->attach, VMMIG_PAUSED, NULL);
    assert_int_equal(guest_release(g, &err), 0); /* it is already */
    assert_int_equal(atomic_load(&v->calls[TOY_RESUME]), 0);
    toy_vmm_destroy(v);
}

static int64_t cpu_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return t.tv_sec * NSEC_PER_SEC + t.tv_nsec;
}

/* An agent that cannot be let in now waits at the door, and nobody runs in circles meanwhile. */
static void a_vmm_out_of_descriptors_stays_calm(void **state)
{
    struct toy_vmm *v = new_vmm();
    struct rlimit before, none;
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strcpy(address.sun_path, v->path);
    assert_return_code(getrlimit(RLIMIT_NOFILE, &before), errno);
    none = before;
    none.rlim_cur = (rlim_t)fd + 1; /* the lowest that was free */
    assert_return_code(setrlimit(RLIMIT_NOFILE, &none), errno);
    assert_return_code(connect(fd, (struct sockaddr *)&address, sizeof(address)), errno);
    hello(fd);
    int64_t used = cpu_ns();
    struct pollfd p = {.fd = fd, .events = POLLIN};
    assert_int_equal(poll(&p, 1, 500), 0);
    assert_true(cpu_ns() - used < 100 * NSEC_PER_MSEC);
    assert_return_code(setrlimit(RLIMIT_NOFILE, &before), errno);
    expect_type(fd, VMMIG__ATTACH__TYPE__WELCOME);
    close(fd);
    toy_vmm_destroy(v);
}

static void a_save_that_hangs_does_not_keep_the_guest(void **state)
{
    struct toy_vmm *v = new_impatient_vmm();
    struct guest_status status;
    char text[256];
    vmmig_set_state(v->attach, VMMIG_RUNNING, NULL);
    int fd = dial(v->path);
    hello(fd);
    expect_type(fd, VMMIG__ATTACH__TYPE__WELCOME);
    ask(fd, VMMIG__ATTACH__TYPE__PAUSE, NULL);
    expect_type(fd, VMMIG__ATTACH__TYPE__OK);
    atomic_store(&v->hang[TOY_SAVE], true);
    ask(fd, VMMIG__ATTACH__TYPE__SAVE, NULL);
    assert_int_equal(listen_for(fd, text), VMMIG__ATTACH__TYPE__ERROR);
    assert_string_equal(text, "timeout: the VMM's callback `save` has not returned for 0.2 s");
    ask(fd, VMMIG__ATTACH__TYPE__RESUME, NULL);
    expect_type(fd, VMMIG__ATTACH__TYPE__OK);
    CLEANUP(attach) struct attach *a = agent_of(v);
    assert_int_equal(guest_status(attach_guest(a), &status, NULL), 0);
    assert_int_equal(status.state, GUEST_RUNNING);
    close(fd);
    toy_vmm_destroy(v);
}

static void a_guest_stays_paused_without_its_agent(void **state)
{
    struct toy_vmm *v = new_vmm();
    struct guest_status status;
    vmmig_set_state(v->attach, VMMIG_RUNNING, NULL);
    struct attach *a = agent_of(v);
    assert_int_equal(guest_pause(attach_guest(a), NULL), 0);
    attach_destroy(a);
    a = agent_of(v);
    assert_int_equal(guest_status(attach_guest(a), &status, NULL), 0);
    assert_int_equal(status.state, GUEST_PAUSED);
    assert_int_equal(atomic_load(&v->calls[TOY_RESUME]), 0);
    assert_int_equal(guest_quit(attach_guest(a), NULL), 0);
    assert_true(atomic_load(&v->quit));
    attach_destroy(a);
    toy_vmm_destroy(v);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(callbacks_that_fail_are_reported),
        cmocka_unit_test(a_pause_that_hangs_is_taken_back),
        cmocka_unit_test(a_late_pause_sets_no_guest_going_that_stood),
        cmocka_unit_test(a_guest_that_is_released_is_the_vmms),
        cmocka_unit_test(a_vmm_out_of_descriptors_stays_calm),
        cmocka_unit_test(a_save_that_hangs_does_not_keep_the_guest),
        cmocka_unit_test(a_guest_stays_paused_without_its_agent),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

/* SPDX-License-Identifier: Apache-2.0 */
/* libvmmig-attach, and callbacks of the VMM that fail, or hang. No KVM needed. */
#include "tests/unit/dirtylog/library_fixture.h"

#include "base/clock.h"
#include "dirtylog/attach_internal.h"
#include "vmm/attach_private.h"

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

static bool is_held(struct attach *a)
{
    enum attach_stands stands;
    assert_int_equal(attach_query_stands(a, &stands, NULL), 0);
    return stands != ATTACH_STANDS_NOT && stands != ATTACH_STANDS_VMMS;
}

static void expect_failed(int result, struct vm_error **err, enum vm_error_kind kind, const char *text)
{
    assert_int_equal(result, -1);
    assert_string_equal(error_message(*err), text);
    assert_int_equal((*err)->kind, kind);
    error_clear(err);
}

/* A VMM that did not take its guest back is told again. */
static void a_release_that_failed_is_said_again(void **state)
{
    struct toy_vmm *v = new_vmm();
    struct vm_error *err = NULL;
    CLEANUP(attach) struct attach *a = agent_of(v);
    struct guest *g = attach_guest(a);
    vmmig_set_state(v->attach, VMMIG_PAUSED, NULL);
    assert_int_equal(guest_pause(g, &err), 0);
    v->fail[TOY_RELEASE] = -EIO;
    expect_failed(guest_release(g, &err), &err, VM_ERROR_FAILED,
                  "the VMM's callback `release` failed: Input/output error");
    assert_true(is_held(a));
    v->fail[TOY_RELEASE] = 0;
    assert_int_equal(guest_release(g, &err), 0);
    assert_true(atomic_load(&v->released) && !is_held(a));
    toy_vmm_destroy(v);
}

/* Whether it took the guest back is known when it returns; asked before, the library says so, and
 * asks no second time. */
static void a_release_that_hangs_is_waited_for(void **state)
{
    for (int fails = 0; fails < 2; fails++) {
        struct toy_vmm *v = new_impatient_vmm();
        struct vm_error *err = NULL;
        CLEANUP(attach) struct attach *a = agent_of(v);
        struct guest *g = attach_guest(a);
        vmmig_set_state(v->attach, VMMIG_PAUSED, NULL);
        assert_int_equal(guest_pause(g, &err), 0);
        atomic_store(&v->hang[TOY_RELEASE], true);
        v->fail[TOY_RELEASE] = fails ? -EIO : 0;
        expect_failed(guest_release(g, &err), &err, VM_ERROR_TIMEOUT,
                      "the VMM's callback `release` has not returned for 0.2 s");
        expect_failed(guest_release(g, &err), &err, VM_ERROR_CONFLICT,
                      "the VMM's callback `release` has not returned yet");
        assert_int_equal(atomic_load(&v->calls[TOY_RELEASE]), 1);
        atomic_store(&v->hang[TOY_RELEASE], false);
        int64_t deadline = clock_mono_ns() + 10 * NSEC_PER_SEC;
        while (guest_release(g, &err) < 0) {
            assert_true(clock_mono_ns() < deadline);
            if (err->kind == VM_ERROR_FAILED)
                v->fail[TOY_RELEASE] = 0; /* the late one had failed, and it was called again */
            error_clear(&err);
        }
        assert_true(atomic_load(&v->released) && !is_held(a));
        assert_int_equal(atomic_load(&v->calls[TOY_RELEASE]), fails ? 3 : 1);
        toy_vmm_destroy(v);
    }
}

static struct toy_vmm *new_vmm_that_pauses_first(unsigned callback_timeout_ms)
{
    struct toy_vmm like = {.sizes = {MIB, 4 * MIB},
                           .params = {.callback_timeout_ms = callback_timeout_ms, .pauses_first = true}};
    struct toy_vmm *v = toy_vmm_create_incoming(&like);
    atomic_store(&v->running, true);
    vmmig_set_state(v->attach, VMMIG_RUNNING, NULL);
    return v;
}

static enum guest_run_state state_of(struct attach *a)
{
    struct guest_status status;
    assert_int_equal(guest_status(attach_guest(a), &status, NULL), 0);
    return status.state;
}

/* It waited for a device in vain, say, and its vCPUs stand by then. */
static void what_a_pause_that_failed_has_stopped_goes_on(void **state)
{
    struct toy_vmm *v = new_vmm_that_pauses_first(10000);
    struct vm_error *err = NULL;
    static const char failed[] = "the VMM's callback `pause` failed: Input/output error";
    CLEANUP(attach) struct attach *a = agent_of(v);
    struct guest *g = attach_guest(a);
    v->fail[TOY_PAUSE] = -EIO;
    expect_failed(guest_pause(g, &err), &err, VM_ERROR_FAILED, failed);
    assert_true(atomic_load(&v->running));
    assert_int_equal(state_of(a), GUEST_RUNNING);
    assert_false(is_held(a));
    /* One that does not go on either is said to stand, so that somebody asks again. */
    v->fail[TOY_RESUME] = -EIO;
    expect_failed(guest_pause(g, &err), &err, VM_ERROR_FAILED, failed);
    assert_false(atomic_load(&v->running));
    assert_int_equal(state_of(a), GUEST_PAUSED);
    v->fail[TOY_RESUME] = 0;
    assert_int_equal(guest_resume(g, &err), 0);
    assert_true(atomic_load(&v->running));
    assert_int_equal(state_of(a), GUEST_RUNNING);
    toy_vmm_destroy(v);
}

static void a_guest_whose_pause_hangs_is_not_taken_for_running(void **state)
{
    for (int asked = 0; asked < 2; asked++) {
        struct toy_vmm *v = new_vmm_that_pauses_first(200);
        struct vm_error *err = NULL;
        CLEANUP(attach) struct attach *a = agent_of(v);
        atomic_store(&v->hang[TOY_PAUSE], true);
        expect_failed(guest_pause(attach_guest(a), &err), &err, VM_ERROR_TIMEOUT,
                      "the VMM's callback `pause` has not returned for 0.2 s");
        assert_false(atomic_load(&v->running));
        assert_int_equal(state_of(a), GUEST_PAUSED);
        if (asked) {
            assert_int_equal(guest_resume(attach_guest(a), &err), 0);
            assert_int_equal(state_of(a), GUEST_RUNNING);
            assert_true(atomic_load(&v->running));
        }
        atomic_store(&v->hang[TOY_PAUSE], false);
        int64_t deadline = clock_mono_ns() + 10 * NSEC_PER_SEC;
        while (!atomic_load(&v->running) || state_of(a) != GUEST_RUNNING ||
               atomic_load(&v->calls[TOY_RESUME]) < (unsigned)asked + 1)
            assert_true(clock_mono_ns() < deadline);
        toy_vmm_destroy(v);
    }
}

static void a_broken_guest_is_told_as_such(void **state)
{
    struct toy_vmm *v = new_vmm();
    struct vm_error *err = NULL;
    struct guest_status status;
    struct qemu_definition d = {0};
    CLEANUP(attach) struct attach *a = agent_of(v);
    struct guest *g = attach_guest(a);
    vmmig_set_state(v->attach, VMMIG_RUNNING, NULL);
    assert_int_equal(guest_pause(g, &err), 0);
    vmmig_set_state(v->attach, VMMIG_BROKEN, "triple fault");
    expect_failed(guest_pause(g, &err), &err, VM_ERROR_REFUSED, "the guest is broken (triple fault)");
    expect_failed(attach_order(&a->client, VMMIG__ATTACH__TYPE__SAVE, NULL, &err), &err, VM_ERROR_REFUSED,
                  "the guest is broken (triple fault)");
    expect_failed(attach_define(a, &d, &err), &err, VM_ERROR_REFUSED,
                  "the guest is broken (triple fault): it can be neither moved nor snapshotted");
    assert_int_equal(guest_release(g, &err), 0);
    assert_int_equal(guest_status(g, &status, &err), 0);
    assert_int_equal(status.state, GUEST_BROKEN);
    assert_string_equal(status.detail, "triple fault");
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

/* Be it that it runs again, be it that its user had paused it. */
static void a_save_that_hangs_does_not_keep_the_guest(void **state)
{
    for (int ran = 0; ran < 2; ran++) {
        struct toy_vmm *v = new_impatient_vmm();
        char text[256];
        vmmig_set_state(v->attach, ran ? VMMIG_RUNNING : VMMIG_PAUSED, NULL);
        int fd = dial(v->path);
        hello(fd);
        expect_type(fd, VMMIG__ATTACH__TYPE__WELCOME);
        ask(fd, VMMIG__ATTACH__TYPE__PAUSE, NULL);
        expect_type(fd, VMMIG__ATTACH__TYPE__OK);
        atomic_store(&v->hang[TOY_SAVE], true);
        ask(fd, VMMIG__ATTACH__TYPE__SAVE, NULL);
        assert_int_equal(listen_for(fd, text), VMMIG__ATTACH__TYPE__ERROR);
        assert_string_equal(text, "timeout: the VMM's callback `save` has not returned for 0.2 s");
        ask(fd, ran ? VMMIG__ATTACH__TYPE__RESUME : VMMIG__ATTACH__TYPE__RELEASE, NULL);
        expect_type(fd, VMMIG__ATTACH__TYPE__OK);
        CLEANUP(attach) struct attach *a = agent_of(v);
        assert_int_equal(state_of(a), ran ? GUEST_RUNNING : GUEST_PAUSED);
        assert_int_equal(atomic_load(&v->released), !ran);
        close(fd);
        toy_vmm_destroy(v);
    }
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

/* ---- The end ---- */

static void *destroy(void *arg)
{
    struct toy_vmm *v = arg;
    vmmig_destroy(v->attach);
    atomic_store(&v->quit, true);
    return NULL;
}

/* The VMM's `arg` is there as long as a callback has it, and no longer. */
static void the_end_waits_for_a_callback(void **state)
{
    struct toy_vmm *v = new_impatient_vmm();
    struct vm_error *err = NULL;
    pthread_t thread;
    struct attach *a = agent_of(v);
    vmmig_set_state(v->attach, VMMIG_RUNNING, NULL);
    atomic_store(&v->hang[TOY_PAUSE], true);
    assert_int_equal(guest_pause(attach_guest(a), &err), -1);
    assert_int_equal(err->kind, VM_ERROR_TIMEOUT);
    error_clear(&err);
    assert_int_equal(pthread_create(&thread, NULL, destroy, v), 0);
    while (access(v->path, F_OK) == 0)
        sched_yield(); /* it has begun */
    usleep(100000);    /* in which it could end */
    assert_false(atomic_load(&v->quit));
    atomic_store(&v->hang[TOY_PAUSE], false);
    pthread_join(thread, NULL);
    v->attach = NULL;
    unsigned calls = atomic_load(&v->calls[TOY_RESUME]);
    assert_int_equal(calls, 1); /* what it had paused so late goes on */
    attach_destroy(a);
    usleep(100000);
    assert_int_equal(atomic_load(&v->calls[TOY_RESUME]), calls);
    toy_vmm_destroy(v);
}

/* ---- vCPUs that are throttled ---- */

/* Slice after slice begins before the thread has woken. */
static void *hurry(void *arg)
{
    struct attach_throttle *t = arg;
    int64_t deadline = clock_mono_ns() + 60 * NSEC_PER_SEC;
    for (int64_t until; clock_mono_ns() < deadline && (until = atomic_load(&t->sleep_until_ns));)
        atomic_compare_exchange_strong(&t->sleep_until_ns, &until, clock_mono_ns() + NSEC_PER_SEC);
    return NULL;
}

static void a_vcpu_sleeps_no_longer_than_its_slice(void **state)
{
    struct attach_throttle t = {.percent = 99};
    pthread_t thread;
    attach_throttle_init(&t);
    atomic_store(&t.sleep_until_ns, clock_mono_ns() + NSEC_PER_SEC);
    int64_t started = clock_mono_ns();
    assert_int_equal(pthread_create(&thread, NULL, hurry, &t), 0);
    attach_throttle_sleep(&t);
    assert_true(clock_mono_ns() - started < 30 * NSEC_PER_SEC);
    atomic_store(&t.sleep_until_ns, 0);
    pthread_join(thread, NULL);
    pthread_cond_destroy(&t.changed);
    pthread_mutex_destroy(&t.lock);
}

static void count_kick(void *arg, unsigned vcpu)
{
    atomic_fetch_add((atomic_uint *)arg, 1);
}

/* Or it would be kicked out of the guest again before it has run. */
static void a_slice_waits_for_vcpus_that_wake_late(void **state)
{
    static const int no_vcpus[1];
    struct vmmig_error error;
    char path[64];
    atomic_uint kicks = 0;
    snprintf(path, sizeof(path), "/tmp/vmmig-late-%d", getpid());
    struct vmmig_config config = {.size = VMMIG_CONFIG_SIZE,
                                  .socket_path = path,
                                  .vmm = "late",
                                  .machine = "late",
                                  .tracking = VMMIG_TRACKING_PLAIN,
                                  .vm_fd = -1,
                                  .vcpu_fds = no_vcpus,
                                  .n_vcpus = 1,
                                  .arg = &kicks};
    memset(&config.callbacks, 1, sizeof(config.callbacks)); /* never called, but: */
    config.callbacks.log = NULL;
    config.callbacks.kick = count_kick;
    struct vmmig_attach *a;
    assert_int_equal(vmmig_create(&config, &a, &error), 0);
    pthread_mutex_lock(&a->throttle.lock);
    a->throttle.sleepers++;
    pthread_mutex_unlock(&a->throttle.lock);
    assert_int_equal(attach_throttle_set(a, 99, NULL), 0);
    while (!atomic_load(&kicks))
        sched_yield();
    int64_t slices = clock_mono_ns() + 500 * NSEC_PER_MSEC;
    while (clock_mono_ns() < slices)
        usleep(1000);
    assert_int_equal(atomic_load(&kicks), 1);
    pthread_mutex_lock(&a->throttle.lock);
    a->throttle.sleepers--;
    pthread_cond_broadcast(&a->throttle.changed);
    pthread_mutex_unlock(&a->throttle.lock);
    while (atomic_load(&kicks) < 3) {
        vmmig_vcpu_enter(a, 0); /* as its thread does */
        vmmig_vcpu_exit(a, 0, 0);
    }
    vmmig_destroy(a);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(callbacks_that_fail_are_reported),
        cmocka_unit_test(a_pause_that_hangs_is_taken_back),
        cmocka_unit_test(a_late_pause_sets_no_guest_going_that_stood),
        cmocka_unit_test(a_guest_that_is_released_is_the_vmms),
        cmocka_unit_test(a_release_that_failed_is_said_again),
        cmocka_unit_test(a_release_that_hangs_is_waited_for),
        cmocka_unit_test(what_a_pause_that_failed_has_stopped_goes_on),
        cmocka_unit_test(a_guest_whose_pause_hangs_is_not_taken_for_running),
        cmocka_unit_test(a_broken_guest_is_told_as_such),
        cmocka_unit_test(a_vmm_out_of_descriptors_stays_calm),
        cmocka_unit_test(a_save_that_hangs_does_not_keep_the_guest),
        cmocka_unit_test(a_guest_stays_paused_without_its_agent),
        cmocka_unit_test(the_end_waits_for_a_callback),
        cmocka_unit_test(a_vcpu_sleeps_no_longer_than_its_slice),
        cmocka_unit_test(a_slice_waits_for_vcpus_that_wake_late),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

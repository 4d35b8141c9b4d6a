/* SPDX-License-Identifier: Apache-2.0 */
/* The attach driver against VMMs that die, are others than they should be, or say what makes no
 * sense. No KVM needed. */
#include "tests/unit/dirtylog/library_fixture.h"
#include "vmm/attach_private.h"

#include <errno.h>
#include <linux/sched.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>
#include <cmocka.h>

/* ---- VMMs that die, and those that are none ---- */

static void a_vmm_that_dies_is_named(void **state)
{
    struct vm_error *err = NULL;
    int ready[2];
    assert_return_code(pipe(ready), 0);
    pid_t pid = fork();
    if (pid == 0) {
        struct toy_vmm *v = new_vmm();
        vmmig_set_state(v->attach, VMMIG_RUNNING, NULL);
        if (write(ready[1], v->path, sizeof(v->path)) < 0)
            _exit(1);
        for (;;)
            pause();
    }
    char path[64];
    assert_int_equal(read(ready[0], path, sizeof(path)), sizeof(path));
    CLEANUP(attach) struct attach *a = attach_connect(path, 1000, &err);
    assert_non_null(a);
    assert_int_equal(attach_guest(a)->process.pid, pid);
    kill(pid, SIGKILL);
    char expected[64];
    snprintf(expected, sizeof(expected), "the VM's process %d ended", pid);
    for (int i = 0; i < 2; i++) {
        assert_int_equal(guest_pause(attach_guest(a), &err), -1);
        assert_int_equal(err->kind, VM_ERROR_VMM_DIED);
        assert_string_equal(error_message(err), expected);
        error_clear(&err);
    }
    waitpid(pid, NULL, 0);
    unlink(path);
    close(ready[0]);
    close(ready[1]);
}

static void a_qemu_is_told_from_such_a_vmm(void **state)
{
    struct vm_error *err = NULL;
    char path[64];
    snprintf(path, sizeof(path), "/tmp/vmmig-stream-%d", getpid());
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strcpy(address.sun_path, path);
    assert_return_code(bind(fd, (struct sockaddr *)&address, sizeof(address)), 0);
    assert_return_code(listen(fd, 1), 0);
    assert_null(attach_connect(path, 1000, &err));
    assert_int_equal(err->kind, VM_ERROR_REFUSED);
    assert_int_equal(err->sys_errno, EPROTOTYPE);
    error_clear(&err);
    struct qemu_definition d = {.machine = (char[]){"toy/1"}};
    assert_null(attach_sink_connect(&d, path, 1000, &err));
    assert_int_equal(err->kind, VM_ERROR_REFUSED);
    assert_non_null(strstr(error_message(err), "is a QEMU's socket"));
    error_clear(&err);
    close(fd);
    unlink(path);
}

static void a_destination_must_be_the_same_machine_and_wait(void **state)
{
    struct toy_vmm *v = new_vmm();
    struct vm_error *err = NULL;
    struct qemu_definition d = {.machine = (char[]){"other/7"}};
    assert_null(attach_sink_connect(&d, v->path, 1000, &err));
    assert_string_equal(error_message(err), "the VMM prepared for the guest is another machine: 'toy/1', "
                                            "not 'other/7'");
    error_clear(&err);
    d.machine = (char[]){"toy/1"};
    assert_null(attach_sink_connect(&d, v->path, 1000, &err));
    assert_string_equal(error_message(err),
                        "the VMM prepared for the guest has 2 memory slots, the guest 0");
    error_clear(&err);
    vmmig_set_state(v->attach, VMMIG_RUNNING, NULL);
    assert_null(attach_sink_connect(&d, v->path, 1000, &err));
    assert_string_equal(error_message(err), "the VMM prepared for the guest does not wait for one");
    error_clear(&err);
    toy_vmm_destroy(v);
}

/* The agent keeps something for each page: a VMM must not make that as large as it likes. */
static void memory_beyond_all_measure_is_refused(void **state)
{
    uint64_t most = (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE) * ATTACH_OVERCOMMIT;
    struct toy_vmm like = {.sizes = {MIB}};
    for (int too_much = 0; too_much < 2; too_much++) {
        struct vm_error *err = NULL;
        cleanup_qemu_definition struct qemu_definition d = {0};
        like.sizes[1] = most - (too_much ? 0 : MIB);
        struct toy_vmm *v = toy_vmm_create_incoming(&like);
        vmmig_set_state(v->attach, VMMIG_RUNNING, NULL);
        CLEANUP(attach) struct attach *a = agent_of(v);
        assert_int_equal(attach_define(a, &d, &err), too_much ? -1 : 0);
        char text[128];
        snprintf(text, sizeof(text),
                 "the guest's memory slots are %llu bytes, more than 16 times the memory of this host",
                 (unsigned long long)(like.sizes[0] + like.sizes[1]));
        assert_string_equal(error_message(err), too_much ? text : "no error");
        if (too_much)
            assert_int_equal(err->kind, VM_ERROR_REFUSED);
        error_clear(&err);
        toy_vmm_destroy(v);
    }
}

/* ---- A VMM whose answers make no sense ---- */

enum { UNASKED, GARBLED, ANOTHER, GOOD, KINDS_OF_ANSWERS };

struct babbler {
    int listener;
    atomic_uint welcomed; /* connections whose greeting is complete */
};

static void say(int fd, unsigned type, const ProtobufCMessage *message)
{
    cleanup_buffer struct buffer out = {0};
    attach_pack(type, message, &out, NULL);
    send(fd, out.data, out.len, MSG_NOSIGNAL);
}

static void babble(struct babbler *b, int fd, unsigned kind)
{
    char request[256];
    Vmmig__Attach__Welcome w = VMMIG__ATTACH__WELCOME__INIT;
    Vmmig__Attach__State now = VMMIG__ATTACH__STATE__INIT;
    w.version = ATTACH_VERSION_MAX;
    w.pid = 1;
    w.n_vcpus = 1;
    w.vmm = w.machine = w.tracking = (char[]){"babbler"};
    now.state = VMMIG__ATTACH__RUN_STATE__RUN_RUNNING;
    if (recv(fd, request, sizeof(request), 0) <= 0)
        return;
    say(fd, VMMIG__ATTACH__TYPE__WELCOME, &w.base);
    if (kind == UNASKED)
        say(fd, VMMIG__ATTACH__TYPE__OK, NULL);
    atomic_fetch_add(&b->welcomed, 1);
    while (recv(fd, request, sizeof(request), 0) > 0) {
        if (kind == GARBLED)
            send(fd, "VMMG and nonsense", 17, MSG_NOSIGNAL);
        else
            say(fd, kind == ANOTHER ? VMMIG__ATTACH__TYPE__OK : VMMIG__ATTACH__TYPE__STATE,
                kind == ANOTHER ? NULL : &now.base);
    }
}

static void *babbler_main(void *arg)
{
    struct babbler *b = arg;
    for (unsigned kind = 0; kind < KINDS_OF_ANSWERS; kind++) {
        int fd = accept(b->listener, NULL, NULL);
        babble(b, fd, kind);
        close(fd);
    }
    return NULL;
}

/* None of it is taken for an answer; the connection after that is as good as a first one. */
static void answers_that_make_no_sense_end_what_was_asked(void **state)
{
    static const char *const said[] = {[UNASKED] = "the VMM said something that it was not asked",
                                       [GARBLED] = "",
                                       [ANOTHER] = "the VMM answered OK, not STATE"};
    struct babbler b = {.listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0)};
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct vm_error *err = NULL;
    struct guest_status status;
    pthread_t thread;
    snprintf(address.sun_path, sizeof(address.sun_path), "/tmp/vmmig-babbler-%d", getpid());
    assert_return_code(bind(b.listener, (struct sockaddr *)&address, sizeof(address)), errno);
    assert_return_code(listen(b.listener, 1), errno);
    assert_int_equal(pthread_create(&thread, NULL, babbler_main, &b), 0);
    struct attach *a = attach_connect(address.sun_path, 5000, &err);
    assert_string_equal(error_message(err), "no error");
    while (!atomic_load(&b.welcomed))
        sched_yield();
    for (unsigned kind = 0; kind < GOOD; kind++) {
        assert_int_equal(guest_status(attach_guest(a), &status, &err), -1);
        assert_int_equal(err->kind, VM_ERROR_PROTOCOL);
        assert_non_null(strstr(error_message(err), said[kind]));
        error_clear(&err);
    }
    assert_int_equal(guest_status(attach_guest(a), &status, &err), 0);
    assert_int_equal(status.state, GUEST_RUNNING);
    attach_destroy(a);
    pthread_join(thread, NULL);
    close(b.listener);
    unlink(address.sun_path);
}

/* ---- Whose process it is ---- */

/* A process of that number, which nobody has; 0: whatever number. */
static pid_t process_with(pid_t number)
{
    struct clone_args args = {.exit_signal = SIGCHLD};
    if (number) {
        args.set_tid = (uintptr_t)&number;
        args.set_tid_size = 1;
    }
    return (pid_t)syscall(SYS_clone3, &args, sizeof(args));
}

/* A process of that user's that listened at the socket, and has ended. Its number. */
static pid_t listen_and_end(int socket, uid_t user)
{
    pid_t pid = process_with(0);
    if (pid == 0) {
        bool listens = syscall(SYS_setresuid, user, user, user) == 0 && listen(socket, 1) == 0;
        _exit(!listens);
    }
    int status;
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_int_equal(status, 0);
    return pid;
}

/* Another process of this number, root's. 0: somebody else was faster. */
static pid_t take_number(pid_t number)
{
    pid_t pid = process_with(number);
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        for (;;)
            pause();
    }
    if (pid < 0)
        assert_int_equal(errno, EEXIST);
    return pid < 0 ? 0 : pid;
}

static bool kernel_has_peerpidfd(void)
{
    int ends[2], pidfd = -1;
    socklen_t n = sizeof(pidfd);
    assert_return_code(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, ends), errno);
    bool has = getsockopt(ends[0], SOL_SOCKET, 77 /* SO_PEERPIDFD */, &pidfd, &n) == 0;
    close(ends[0]);
    close(ends[1]);
    if (has)
        close(pidfd);
    return has;
}

/* Who listened has ended, and a process that never heard of it has its number: nothing would be
 * right about that VMM. */
static void a_number_that_is_anothers_now_is_no_vmm(void **state)
{
    enum { OTHER = 65534 };
    if (geteuid() != 0) {
        print_message("SKIPPED: only root can choose the number of a process\n");
        skip();
    }
    for (int roots = 0; roots < (kernel_has_peerpidfd() ? 2 : 1); roots++) {
        struct sockaddr_un address = {.sun_family = AF_UNIX};
        struct vm_error *err = NULL;
        char expected[256];
        int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
        snprintf(address.sun_path, sizeof(address.sun_path), "/tmp/vmmig-number-%d-%d", getpid(), roots);
        assert_return_code(bind(fd, (struct sockaddr *)&address, sizeof(address)), errno);
        pid_t number, pid;
        do
            pid = take_number(number = listen_and_end(fd, roots ? 0 : OTHER));
        while (!pid);
        assert_int_equal(pid, number);
        assert_null(attach_connect(address.sun_path, 5000, &err));
        assert_int_equal(err->kind, VM_ERROR_REFUSED);
        snprintf(expected, sizeof(expected),
                 "%s: the process that listened here has ended, and %d is another's number now",
                 address.sun_path, number);
        assert_string_equal(error_message(err), expected);
        error_clear(&err);
        /* Kernels before 6.5 say whose it was, and no more. */
        assert_int_equal(attach_check_listener(-1, pid, OTHER, &err), -1);
        assert_int_equal(err->kind, VM_ERROR_REFUSED);
        error_clear(&err);
        assert_int_equal(attach_check_listener(-1, pid, 0, &err), 0);
        kill(pid, SIGKILL);
        waitpid(pid, NULL, 0);
        assert_int_equal(attach_check_listener(-1, pid, OTHER, &err), -1);
        assert_int_equal(err->kind, VM_ERROR_NOT_FOUND);
        error_clear(&err);
        close(fd);
        unlink(address.sun_path);
    }
}

/* A large guest's log takes its time, to be switched and to be read. */
static void a_large_guests_log_is_waited_for(void **state)
{
    static const unsigned types[] = {VMMIG__ATTACH__TYPE__TRACK, VMMIG__ATTACH__TYPE__HARVEST,
                                     VMMIG__ATTACH__TYPE__UNTRACK};
    struct attach_client c = {.memory = 0};
    int usual = attach_client_patience_ms(&c, VMMIG__ATTACH__TYPE__STATUS);
    for (unsigned i = 0; i < 3; i++) {
        atomic_store(&c.memory, 0);
        assert_int_equal(attach_client_patience_ms(&c, types[i]), usual);
        atomic_store(&c.memory, 1ull << 40);
        assert_true(attach_client_patience_ms(&c, types[i]) >= usual + 1024 * 12);
    }
    assert_int_equal(attach_client_patience_ms(&c, VMMIG__ATTACH__TYPE__STATUS), usual);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_vmm_that_dies_is_named),
        cmocka_unit_test(a_qemu_is_told_from_such_a_vmm),
        cmocka_unit_test(a_destination_must_be_the_same_machine_and_wait),
        cmocka_unit_test(memory_beyond_all_measure_is_refused),
        cmocka_unit_test(answers_that_make_no_sense_end_what_was_asked),
        cmocka_unit_test(a_number_that_is_anothers_now_is_no_vmm),
        cmocka_unit_test(a_large_guests_log_is_waited_for),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

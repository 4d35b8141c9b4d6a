/* SPDX-License-Identifier: Apache-2.0 */
#include "agent/vms.h"

#include "agent/vm_record.h"
#include "base/clock.h"
#include "base/io.h"

#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <setjmp.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <cmocka.h>

#define LONG_NS (20 * NSEC_PER_SEC)

/* The VMMs of these tests are processes that wait; their guests have no driver behind them. */

static char *const vm_argv[] = {(char[]){"/usr/bin/vmm"}, (char[]){""}, (char[]){"a b"}, NULL};

struct fixture {
    char dir[64];
    pid_t child;
    int died;               /* latch */
    int speaks;             /* latch: the VM "silent" is connected to only then */
    atomic_bool reachable;
    atomic_uint connects;
    pid_t lie;              /* connect answers as this process */
};

static pid_t spawn_waiter(void)
{
    pid_t pid = fork();
    if (pid == 0) {
        for (;;)
            pause();
    }
    assert_true(pid > 0);
    return pid;
}

static void end_waiter(pid_t pid)
{
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
}

static atomic_int guests; /* that there are */

static void guest_free(struct guest *g)
{
    atomic_fetch_sub(&guests, 1);
    free(g);
}

/* The VMM answers when this latch is set, or at once if there is none. */
static int answer_latch = -1;
static atomic_uint times_asked;

static int guest_answer(struct guest *g, struct guest_status *ret_status, struct vm_error **err)
{
    (void)g;
    unsigned time = atomic_fetch_add(&times_asked, 1) + 1;
    if (answer_latch >= 0)
        io_wait(answer_latch, POLLIN, INT64_MAX, -1, NULL);
    if (time == 99)
        return error_set(err, VM_ERROR_VMM_DIED, "gone");
    *ret_status = (struct guest_status){.state = GUEST_PAUSED};
    return 0;
}

static const struct guest_ops ops = {.driver = "test", .destroy = guest_free,
                                     .status = guest_answer};

static struct guest *make_guest(pid_t pid)
{
    struct guest *g = calloc(1, sizeof(*g));
    atomic_fetch_add(&guests, 1);
    g->ops = &ops;
    assert_int_equal(process_identify(pid, &g->process, NULL), 0);
    return g;
}

static struct guest *connect_to(const struct vm_definition *d, void *arg, struct vm_error **err)
{
    struct fixture *f = arg;
    atomic_fetch_add(&f->connects, 1);
    if (!strcmp(d->name, "silent"))
        io_wait(f->speaks, POLLIN, INT64_MAX, -1, NULL);
    if (!atomic_load(&f->reachable)) {
        error_set(err, VM_ERROR_TIMEOUT, "QMP does not answer");
        return NULL;
    }
    return make_guest(f->lie ? f->lie : d->process.pid);
}

static void on_death(const struct vm_definition *d, void *arg)
{
    struct fixture *f = arg;
    assert_string_equal(d->name, "web1");
    io_latch_set(f->died);
}

static void describe(const struct vm_definition *d, char out[VM_DETAIL_MAX], void *arg)
{
    (void)d;
    (void)arg;
    strcpy(out, "it said goodbye");
}

static int set_up(void **state)
{
    struct fixture *f = calloc(1, sizeof(*f));
    strcpy(f->dir, "/tmp/vmmig-test-vms.XXXXXX");
    assert_non_null(mkdtemp(f->dir));
    f->child = spawn_waiter();
    f->died = io_latch_new(NULL);
    f->speaks = io_latch_new(NULL);
    atomic_init(&f->reachable, true);
    *state = f;
    return 0;
}

static int tear_down(void **state)
{
    struct fixture *f = *state;
    char command[128];
    end_waiter(f->child);
    close_fd(&f->died);
    close_fd(&f->speaks);
    snprintf(command, sizeof(command), "rm -r %s", f->dir);
    assert_int_equal(system(command), 0);
    free(f);
    return 0;
}

static struct vms *open_registry(struct fixture *f)
{
    struct vms_params p = {.state_dir = f->dir, .max = 3, .connect = connect_to,
                           .describe_end = describe, .died = on_death, .arg = f};
    struct vms *vms = vms_open(&p, NULL);
    assert_non_null(vms);
    assert_true(vms_settle(vms, 20000));
    return vms;
}

static struct vm_definition define(const char *name, pid_t pid)
{
    static char path[] = "/run/vm.qmp";
    struct vm_definition d = {.origin = VM_ORIGIN_RUN, .argv = (char **)(uintptr_t)vm_argv,
                              .driver = VM_DRIVER_ATTACH, .socket_path = path,
                              .since_ns = 12345};
    snprintf(d.name, sizeof(d.name), "%s", name);
    assert_int_equal(process_identify(pid, &d.process, NULL), 0);
    return d;
}

static int add(struct vms *vms, const char *name, pid_t pid, struct vm_error **err)
{
    struct vm_definition d = define(name, pid);
    CLEANUP(guest) struct guest *guest = make_guest(pid);
    int r = vms_add(vms, &d, &guest, err);
    assert_true(r == 0 ? !guest : guest != NULL);
    return r;
}

static void a_vm_is_found_again_by_the_next_agent(void **state)
{
    struct fixture *f = *state;
    struct vms *vms = open_registry(f);
    assert_int_equal(add(vms, "web1", f->child, NULL), 0);
    vms_close(vms);
    vms = open_registry(f);
    {
        CLEANUP(vm) struct vm *vm = vms_get_present(vms, "web1", NULL);
        assert_non_null(vm);
        assert_int_equal(atomic_load(&f->connects), 1);
        CLEANUP(guest) struct guest *guest = vm_guest(vm);
        assert_non_null(guest);
        const struct vm_definition *d = vm_definition(vm);
        assert_string_equal(d->name, "web1");
        assert_int_equal(d->origin, VM_ORIGIN_RUN);
        assert_int_equal(d->driver, VM_DRIVER_ATTACH);
        assert_string_equal(d->socket_path, "/run/vm.qmp");
        assert_int_equal(d->process.pid, f->child);
        assert_int_equal(d->since_ns, 12345);
        assert_string_equal(d->argv[0], "/usr/bin/vmm");
        assert_string_equal(d->argv[1], "");
        assert_string_equal(d->argv[2], "a b");
        assert_null(d->argv[3]);
    }
    vms_close(vms);
}

static void a_death_is_noticed(void **state)
{
    struct fixture *f = *state;
    char detail[VM_DETAIL_MAX];
    CLEANUP(vms) struct vms *vms = open_registry(f);
    assert_int_equal(add(vms, "web1", f->child, NULL), 0);
    kill(f->child, SIGKILL);
    assert_int_equal(io_wait(f->died, POLLIN, clock_mono_ns() + LONG_NS, -1, NULL), 0);
    CLEANUP(vm) struct vm *vm = vms_get(vms, "web1", NULL);
    assert_int_equal(vm_presence(vm), VM_ENDED);
    assert_string_equal(vm_detail(vm, detail), "it said goodbye");
    cleanup_error struct vm_error *err = NULL;
    assert_null(vms_get_present(vms, "web1", &err));
    assert_int_equal(err->kind, VM_ERROR_VMM_DIED);
    assert_string_equal(error_message(err), "VM web1 has ended: it said goodbye");
    /* The name can be used again. */
    assert_int_equal(vms_check_free(vms, "web1", NULL), 0);
    pid_t next = spawn_waiter();
    assert_int_equal(add(vms, "web1", next, NULL), 0);
    CLEANUP(vm) struct vm *fresh = vms_get_present(vms, "web1", NULL);
    assert_non_null(fresh);
    assert_int_equal(vm_definition(fresh)->process.pid, next);
    end_waiter(next);
}

static void a_vm_that_died_unseen_is_known_as_ended(void **state)
{
    struct fixture *f = *state;
    struct vms *vms = open_registry(f);
    assert_int_equal(add(vms, "web1", f->child, NULL), 0);
    vms_close(vms);
    end_waiter(f->child);
    vms = open_registry(f);
    {
        CLEANUP(vm) struct vm *vm = vms_get(vms, "web1", NULL);
        assert_int_equal(vm_presence(vm), VM_ENDED);
        assert_int_equal(atomic_load(&f->connects), 0);
    }
    vms_close(vms);
    f->child = spawn_waiter();
}

static void a_vmm_that_does_not_answer_is_tried_again(void **state)
{
    struct fixture *f = *state;
    struct vms *vms = open_registry(f);
    assert_int_equal(add(vms, "web1", f->child, NULL), 0);
    vms_close(vms);
    atomic_store(&f->reachable, false);
    vms = open_registry(f);
    cleanup_error struct vm_error *err = NULL;
    assert_null(vms_get_present(vms, "web1", &err));
    assert_int_equal(err->kind, VM_ERROR_UNREACHABLE);
    assert_string_equal(error_message(err), "VM web1 does not answer: QMP does not answer");
    CLEANUP(vm) struct vm *vm = vms_get(vms, "web1", NULL);
    assert_null(vm_guest(vm));
    atomic_store(&f->reachable, true);
    int64_t deadline = clock_mono_ns() + LONG_NS;
    while (vm_presence(vm) != VM_PRESENT && clock_mono_ns() < deadline)
        poll(NULL, 0, 10);
    assert_int_equal(vm_presence(vm), VM_PRESENT);
    CLEANUP(guest) struct guest *guest = vm_guest(vm);
    assert_non_null(guest);
    vms_close(vms);
}

/* Nobody waits for a VMM that says nothing: not a VM that is adopted, nor one that dies. */
static void a_silent_vmm_delays_no_other(void **state)
{
    struct fixture *f = *state;
    struct guest *none = NULL;
    struct vms *vms = open_registry(f);
    pid_t silent = spawn_waiter();
    struct vm_definition first = define("silent", silent), second = define("web1", f->child);
    assert_int_equal(vms_add(vms, &first, &none, NULL), 0);
    while (!atomic_load(&f->connects))
        poll(NULL, 0, 10);
    assert_int_equal(vms_add(vms, &second, &none, NULL), 0);
    {
        CLEANUP(vm) struct vm *vm = vms_get(vms, "web1", NULL);
        vms_reconnect(vms, vm, NULL);
        assert_int_equal(vm_presence(vm), VM_PRESENT);
    }
    kill(f->child, SIGKILL);
    assert_int_equal(io_wait(f->died, POLLIN, clock_mono_ns() + LONG_NS, -1, NULL), 0);
    io_latch_set(f->speaks);
    vms_close(vms);
    end_waiter(silent);
}

static void another_process_at_the_socket_is_not_adopted(void **state)
{
    struct fixture *f = *state;
    char detail[VM_DETAIL_MAX];
    struct vms *vms = open_registry(f);
    assert_int_equal(add(vms, "web1", f->child, NULL), 0);
    vms_close(vms);
    f->lie = getpid();
    vms = open_registry(f);
    {
        CLEANUP(vm) struct vm *vm = vms_get(vms, "web1", NULL);
        assert_int_equal(vm_presence(vm), VM_UNREACHABLE);
        assert_string_equal(vm_detail(vm, detail), "another process answers at /run/vm.qmp");
    }
    vms_close(vms);
}

static void names_and_processes_are_unique(void **state)
{
    struct fixture *f = *state;
    CLEANUP(vms) struct vms *vms = open_registry(f);
    pid_t other = spawn_waiter(), third = spawn_waiter(), fourth = spawn_waiter();
    cleanup_error struct vm_error *name = NULL, *process = NULL, *full = NULL;
    assert_int_equal(add(vms, "web1", f->child, NULL), 0);
    assert_int_equal(add(vms, "web1", other, &name), -1);
    assert_int_equal(name->kind, VM_ERROR_CONFLICT);
    assert_int_equal(add(vms, "web2", f->child, &process), -1);
    assert_int_equal(process->kind, VM_ERROR_CONFLICT);
    assert_int_equal(add(vms, "a", other, NULL), 0);
    assert_int_equal(add(vms, "z", third, NULL), 0);
    assert_int_equal(add(vms, "b", fourth, &full), -1);
    assert_int_equal(full->kind, VM_ERROR_NO_SPACE);
    struct vm **list;
    unsigned n;
    assert_int_equal(vms_list(vms, &list, &n, NULL), 0);
    assert_int_equal(n, 3);
    assert_string_equal(vm_definition(list[0])->name, "a");
    assert_string_equal(vm_definition(list[1])->name, "web1");
    assert_string_equal(vm_definition(list[2])->name, "z");
    for (unsigned i = 0; i < n; i++)
        vm_put(list[i]);
    free(list);
    end_waiter(fourth);
    assert_int_equal(vms_remove(vms, "a", NULL), 0);
    assert_int_equal(vms_remove(vms, "z", NULL), 0);
    end_waiter(other);
    end_waiter(third);
}

static void a_removed_vm_is_forgotten_and_runs_on(void **state)
{
    struct fixture *f = *state;
    struct vms *vms = open_registry(f);
    assert_int_equal(add(vms, "web1", f->child, NULL), 0);
    CLEANUP(vm) struct vm *held = vms_get(vms, "web1", NULL);
    assert_int_equal(vms_remove(vms, "web1", NULL), 0);
    assert_int_equal(vms_remove(vms, "web1", NULL), -1);
    assert_null(vms_get(vms, "web1", NULL));
    assert_int_equal(kill(f->child, 0), 0);
    vms_close(vms);
    CLEANUP(guest) struct guest *guest = vm_guest(held); /* valid until the last reference */
    assert_non_null(guest);
    vms = open_registry(f);
    assert_null(vms_get(vms, "web1", NULL));
    vms_close(vms);
}

static void a_vmm_that_hangs_is_waited_for_until_the_deadline(void **state)
{
    struct fixture *f = *state;
    struct guest_status status;
    struct vms *vms = open_registry(f);
    assert_int_equal(add(vms, "web1", f->child, NULL), 0);
    struct vm *vm = vms_get(vms, "web1", NULL);
    atomic_store(&times_asked, 0);
    assert_int_equal(vm_status(vm, clock_mono_ns() + LONG_NS, &status, NULL), 0);
    assert_int_equal(status.state, GUEST_PAUSED);
    assert_int_equal(atomic_load(&times_asked), 1);
    answer_latch = io_latch_new(NULL);
    for (int i = 0; i < 3; i++) {
        cleanup_error struct vm_error *err = NULL;
        assert_int_equal(vm_status(vm, clock_mono_ns() + NSEC_PER_MSEC, &status, &err), -1);
        assert_int_equal(err->kind, VM_ERROR_TIMEOUT);
    }
    while (atomic_load(&times_asked) < 2)
        sched_yield(); /* the thread that asks may not have had a CPU yet */
    vm_ask(vm);
    while (atomic_load(&times_asked) < 2) /* its thread may come late */
        sched_yield();
    assert_int_equal(atomic_load(&times_asked),
                     2); /* one thread waits, however often it is asked */
    io_latch_set(answer_latch);
    assert_int_equal(vm_status(vm, clock_mono_ns() + LONG_NS, &status, NULL), 0);
    atomic_store(&times_asked, 98);
    cleanup_error struct vm_error *err = NULL;
    assert_int_equal(vm_status(vm, clock_mono_ns() + LONG_NS, &status, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_VMM_DIED);
    close_fd(&answer_latch);
    vm_put(vm);
    vms_close(vms);
}

/* Is it the VM's guest? */
static bool has_guest(struct vm *vm, const struct guest *wanted)
{
    CLEANUP(guest) struct guest *guest = vm_guest(vm);
    return guest == wanted;
}

/* A VMM that lives is connected to again; who uses the guest of the old connection may go on. */
static void a_connection_that_ended_is_made_anew(void **state)
{
    struct fixture *f = *state;
    struct guest_status status;
    cleanup_error struct vm_error *err = NULL;
    struct vms *vms = open_registry(f);
    assert_int_equal(add(vms, "web1", f->child, NULL), 0);
    struct vm *vm = vms_get_present(vms, "web1", NULL);
    assert_non_null(vm);
    struct guest *first = vm_guest(vm);
    atomic_store(&times_asked, 98);
    assert_int_equal(vm_status(vm, clock_mono_ns() + LONG_NS, &status, &err), -1);
    int64_t deadline = clock_mono_ns() + LONG_NS;
    while (has_guest(vm, first) && clock_mono_ns() < deadline)
        poll(NULL, 0, 10); /* the keeper tries within seconds */
    assert_int_equal(vm_presence(vm), VM_PRESENT);
    assert_int_equal(vm_status(vm, clock_mono_ns() + LONG_NS, &status, NULL), 0);
    assert_int_equal(guest_status(first, &status, NULL), 0); /* is there still */

    struct guest *second = vm_guest(vm);
    vms_reconnect(vms, vm, first); /* somebody has */
    assert_true(has_guest(vm, second));
    vms_reconnect(vms, vm, second);
    struct guest *third = vm_guest(vm);
    assert_ptr_not_equal(third, second);
    assert_int_equal(vm_presence(vm), VM_PRESENT);
    atomic_store(&f->reachable, false);
    vms_reconnect(vms, vm, third);
    assert_true(has_guest(vm, third));
    assert_int_equal(vm_presence(vm), VM_UNREACHABLE);
    guest_unref(first);
    guest_unref(second);
    guest_unref(third);
    vm_put(vm);
    vms_close(vms);
}

/* However often that is: a guest holds a descriptor, and perhaps its VM's memory. */
static void guests_of_former_connections_end_with_who_uses_them(void **state)
{
    struct fixture *f = *state;
    int before = atomic_load(&guests);
    struct vms *vms = open_registry(f);
    assert_int_equal(add(vms, "web1", f->child, NULL), 0);
    struct vm *vm = vms_get_present(vms, "web1", NULL);
    struct guest *used = vm_guest(vm);
    for (int i = 0; i < 100; i++) {
        CLEANUP(guest) struct guest *lost = vm_guest(vm);
        vms_reconnect(vms, vm, lost);
        assert_false(has_guest(vm, lost));
    }
    assert_int_equal(atomic_load(&f->connects), 100);
    assert_int_equal(atomic_load(&guests) - before, 2); /* the VM's, and that which is used */
    guest_unref(used);
    assert_int_equal(atomic_load(&guests) - before, 1);
    vm_put(vm);
    vms_close(vms);
    assert_int_equal(atomic_load(&guests), before);
}

/* An answer over a connection that was replaced meanwhile says nothing of the new one. */
static void a_late_answer_of_a_former_connection_is_not_held_against_the_new_one(void **state)
{
    struct fixture *f = *state;
    struct guest_status status;
    cleanup_error struct vm_error *late = NULL;
    struct vms *vms = open_registry(f);
    assert_int_equal(add(vms, "web1", f->child, NULL), 0);
    struct vm *vm = vms_get_present(vms, "web1", NULL);
    CLEANUP(guest) struct guest *lost = vm_guest(vm);
    answer_latch = io_latch_new(NULL);
    atomic_store(&times_asked, 98);
    assert_int_equal(vm_status(vm, clock_mono_ns() + NSEC_PER_MSEC, &status, &late), -1);
    assert_int_equal(late->kind, VM_ERROR_TIMEOUT);
    while (atomic_load(&times_asked) < 99)
        sched_yield(); /* the thread that asks may not have had a CPU yet */
    vms_reconnect(vms, vm, lost);
    io_latch_set(answer_latch);
    vm_status(vm, clock_mono_ns() + LONG_NS, &status, NULL); /* "gone", or what the new one says after that */
    assert_int_equal(vm_presence(vm), VM_PRESENT);
    close_fd(&answer_latch);
    vm_put(vm);
    vms_close(vms);
}

/* After a restart of the agent, of a VM that nobody had to reach. */
static void a_vm_without_a_guest_is_adopted(void **state)
{
    struct fixture *f = *state;
    struct guest *none = NULL;
    struct vms *vms = open_registry(f);
    struct vm_definition d = define("web1", f->child);
    assert_int_equal(vms_add(vms, &d, &none, NULL), 0);
    struct vm *vm = vms_get(vms, "web1", NULL);
    int64_t deadline = clock_mono_ns() + LONG_NS;
    while (vm_presence(vm) != VM_PRESENT && clock_mono_ns() < deadline)
        poll(NULL, 0, 10);
    CLEANUP(guest) struct guest *guest = vm_guest(vm);
    assert_non_null(guest);
    vm_put(vm);
    vms_close(vms);
}

static void record_path(const struct fixture *f, char out[128])
{
    snprintf(out, 128, "%s/vms/web1.vm", f->dir);
}

static void damaged_records_are_put_aside(void **state)
{
    struct fixture *f = *state;
    char path[128], aside[160], byte;
    struct stat st;
    struct vms *vms = open_registry(f);
    assert_int_equal(add(vms, "web1", f->child, NULL), 0);
    vms_close(vms);
    record_path(f, path);
    snprintf(aside, sizeof(aside), "%s.damaged", path);
    assert_int_equal(stat(path, &st), 0);
    assert_int_equal(st.st_mode & 0777, 0600);
    /* Every single byte, flipped: never another VM, never a crash, always put aside. */
    for (off_t at = 0; at < st.st_size; at++) {
        int fd = open(path, O_RDWR);
        assert_int_equal(pread(fd, &byte, 1, at), 1);
        byte ^= 0x20;
        assert_int_equal(pwrite(fd, &byte, 1, at), 1);
        struct vm_definition *list;
        unsigned n;
        char folder[96];
        snprintf(folder, sizeof(folder), "%s/vms", f->dir);
        assert_int_equal(vm_record_read_all(folder, 3, &list, &n, NULL), 0);
        assert_int_equal(n, 0);
        free(list);
        assert_int_equal(rename(aside, path), 0);
        byte ^= 0x20;
        assert_int_equal(pwrite(fd, &byte, 1, at), 1);
        close(fd);
    }
    vms = open_registry(f);
    CLEANUP(vm) struct vm *vm = vms_get_present(vms, "web1", NULL);
    assert_non_null(vm);
    vms_close(vms);
}

static void a_record_under_another_name_is_not_that_vm(void **state)
{
    struct fixture *f = *state;
    char path[128], other[160];
    struct vms *vms = open_registry(f);
    assert_int_equal(add(vms, "web1", f->child, NULL), 0);
    vms_close(vms);
    record_path(f, path);
    snprintf(other, sizeof(other), "%s/vms/web2.vm", f->dir);
    assert_int_equal(rename(path, other), 0);
    vms = open_registry(f);
    assert_null(vms_get(vms, "web2", NULL));
    assert_null(vms_get(vms, "web1", NULL));
    vms_close(vms);
}

static void a_write_that_was_cut_off_leaves_nothing(void **state)
{
    struct fixture *f = *state;
    char path[128];
    struct vms *vms = open_registry(f);
    vms_close(vms);
    snprintf(path, sizeof(path), "%s/vms/web1.vm.77.tmp", f->dir);
    int fd = open(path, O_WRONLY | O_CREAT, 0600);
    assert_int_equal(write(fd, "half", 4), 4);
    close(fd);
    vms = open_registry(f);
    assert_null(vms_get(vms, "web1", NULL));
    assert_int_equal(access(path, F_OK), -1);
    vms_close(vms);
}

static off_t size_of(const char *path)
{
    struct stat st;
    return stat(path, &st) < 0 ? -1 : st.st_size;
}

/* The record comes to stand in the room that was kept for it, which is gone afterwards. */
static void room_for_a_record_is_kept(void **state)
{
    struct fixture *f = *state;
    char path[128], room[128];
    struct stat before, after;
    struct vms *vms = open_registry(f);
    struct vm_definition d = define("web1", f->child);
    record_path(f, path);
    snprintf(room, sizeof(room), "%s/vms/web1.vm.room", f->dir);
    assert_int_equal(vms_reserve(vms, &d, NULL), 0);
    vms_release(vms, "web1");
    assert_int_equal(size_of(room), -1);
    assert_int_equal(vms_reserve(vms, &d, NULL), 0);
    assert_int_equal(stat(room, &before), 0);
    assert_int_equal(add(vms, "web1", f->child, NULL), 0);
    assert_int_equal(stat(path, &after), 0);
    assert_int_equal(after.st_ino, before.st_ino);
    assert_true(after.st_size <= before.st_size);
    assert_int_equal(size_of(room), -1);
    assert_int_equal(vms_reserve(vms, &d, NULL), 0);
    vms_close(vms);
    vms = open_registry(f); /* an agent that ended in between keeps none */
    assert_int_equal(size_of(room), -1);
    CLEANUP(vm) struct vm *vm = vms_get_present(vms, "web1", NULL);
    assert_non_null(vm);
    vms_close(vms);
}

/*
 * kill -9 while VMs are added and removed in a loop: the next agent finds each record whole or not
 * at all, and those that were reported as added are there.
 */
static void a_crash_loses_nothing_that_was_reported(void **state)
{
    struct fixture *f = *state;
    for (int round = 0; round < 10; round++) {
        int reported[2];
        char last = 0;
        assert_int_equal(pipe(reported), 0);
        pid_t agent = fork();
        if (agent == 0) {
            struct vms_params p = {.state_dir = f->dir, .max = 3, .connect = connect_to, .arg = f};
            struct vms *vms = vms_open(&p, NULL);
            if (!vms)
                _exit(1);
            vms_remove(vms, "web1", NULL);
            for (;;) {
                if (add(vms, "web1", f->child, NULL) < 0 || write(reported[1], "A", 1) != 1 ||
                    write(reported[1], "r", 1) != 1 || vms_remove(vms, "web1", NULL) < 0 ||
                    write(reported[1], "R", 1) != 1 || write(reported[1], "a", 1) != 1)
                    _exit(1);
            }
        }
        close(reported[1]);
        /* Let it get somewhere else each time, counted in steps and not in time. */
        for (int i = 0; i < 3 + round * 5; i++)
            assert_int_equal(read(reported[0], &last, 1), 1);
        kill(agent, SIGKILL);
        waitpid(agent, NULL, 0);
        char more;
        while (read(reported[0], &more, 1) == 1)
            last = more;
        close(reported[0]);
        struct vms *vms = open_registry(f);
        CLEANUP(vm) struct vm *vm = vms_get(vms, "web1", NULL);
        if (last == 'A') /* added; the removal had not begun */
            assert_non_null(vm);
        if (last == 'R')
            assert_null(vm);
        vms_close(vms);
    }
}

int main(void)
{
#define WITH_FIXTURE(test) cmocka_unit_test_setup_teardown(test, set_up, tear_down)
    const struct CMUnitTest tests[] = {
        WITH_FIXTURE(a_vm_is_found_again_by_the_next_agent),
        WITH_FIXTURE(a_death_is_noticed),
        WITH_FIXTURE(a_vm_that_died_unseen_is_known_as_ended),
        WITH_FIXTURE(a_vmm_that_does_not_answer_is_tried_again),
        WITH_FIXTURE(another_process_at_the_socket_is_not_adopted),
        WITH_FIXTURE(names_and_processes_are_unique),
        WITH_FIXTURE(a_removed_vm_is_forgotten_and_runs_on),
        WITH_FIXTURE(a_vmm_that_hangs_is_waited_for_until_the_deadline),
        WITH_FIXTURE(a_silent_vmm_delays_no_other),
        WITH_FIXTURE(a_connection_that_ended_is_made_anew),
        WITH_FIXTURE(guests_of_former_connections_end_with_who_uses_them),
        WITH_FIXTURE(a_late_answer_of_a_former_connection_is_not_held_against_the_new_one),
        WITH_FIXTURE(a_vm_without_a_guest_is_adopted),
        WITH_FIXTURE(damaged_records_are_put_aside),
        WITH_FIXTURE(a_record_under_another_name_is_not_that_vm),
        WITH_FIXTURE(a_write_that_was_cut_off_leaves_nothing),
        WITH_FIXTURE(room_for_a_record_is_kept),
        WITH_FIXTURE(a_crash_loses_nothing_that_was_reported),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

/* SPDX-License-Identifier: Apache-2.0 */
#include "agent/vms.h"

#include "agent/vm_record.h"
#include "base/argv.h"
#include "base/cond.h"
#include "base/io.h"
#include "base/log.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>

#define RETRY_NS (3 * NSEC_PER_SEC)

struct vm {
    atomic_uint refs;
    struct vm_definition definition;
    int pidfd; /* -1: the process was gone already */
    pthread_mutex_t adopt_lock; /* one connects at a time; before `lock`, never with that of `vms` */
    pthread_mutex_t lock; /* guards what follows */
    bool adopting; /* a thread connects */
    bool tried;    /* one has: it may have got no answer */
    enum vm_presence presence;
    struct guest *guest; /* of the last connection; once there is one, there always is */
    char detail[VM_DETAIL_MAX];
    pthread_cond_t asked_cond;
    bool asking;      /* a thread waits for the VMM's answer */
    unsigned answers; /* how many came, so that a waiter knows a new one */
    struct guest_status status;    /* the last answer */
    struct vm_error *status_error; /* or why there was none */
};

struct vms {
    struct vms_params params;
    char *folder;
    pthread_t keeper;
    bool keeper_runs;
    int wake_fd; /* the list changed, or closing */
    pthread_mutex_t lock; /* guards what follows; taken before a vm's lock */
    pthread_cond_t changed;
    unsigned adopting; /* threads that connect */
    bool all_begun;    /* every VM of the start has its thread */
    struct vm **list; /* sorted by name, params.max long */
    unsigned n;
    bool settled, closing;
};

const char *vm_origin_name(enum vm_origin origin)
{
    switch (origin) {
#define X(id, number, name)                                                                        \
    case VM_ORIGIN_##id:                                                                           \
        return name;
        VM_ORIGINS(X)
#undef X
    }
    return "?";
}

const char *vm_driver_name(enum vm_driver driver)
{
    switch (driver) {
#define X(id, number, name)                                                                        \
    case VM_DRIVER_##id:                                                                           \
        return name;
        VM_DRIVERS(X)
#undef X
    }
    return "?";
}

void vm_definition_finish(struct vm_definition *d)
{
    free(d->argv);
    free(d->socket_path);
    *d = (struct vm_definition){0};
}

int vm_definition_copy(const struct vm_definition *d, struct vm_definition *ret_copy,
                       struct vm_error **err)
{
    struct vm_definition copy = *d;
    copy.argv = argv_copy(d->argv, argv_count(d->argv));
    copy.socket_path = strdup(d->socket_path);
    if (!copy.argv || !copy.socket_path) {
        vm_definition_finish(&copy);
        return error_nomem(err);
    }
    *ret_copy = copy;
    return 0;
}

static struct vm *vm_ref(struct vm *vm)
{
    atomic_fetch_add(&vm->refs, 1);
    return vm;
}

void vm_put(struct vm *vm)
{
    if (!vm || atomic_fetch_sub(&vm->refs, 1) != 1)
        return;
    guest_unref(vm->guest);
    vm_definition_finish(&vm->definition);
    close_fd(&vm->pidfd);
    error_free(vm->status_error);
    pthread_cond_destroy(&vm->asked_cond);
    pthread_mutex_destroy(&vm->lock);
    pthread_mutex_destroy(&vm->adopt_lock);
    free(vm);
}

const struct vm_definition *vm_definition(const struct vm *vm)
{
    return &vm->definition;
}

/* Reading takes the lock, which const callers cannot see. */
static pthread_mutex_t *lock_of(const struct vm *vm)
{
    return (pthread_mutex_t *)(uintptr_t)&vm->lock;
}

enum vm_presence vm_presence(const struct vm *vm)
{
    SCOPE_LOCK(lock_of(vm));
    return vm->presence;
}

struct guest *vm_guest(const struct vm *vm)
{
    SCOPE_LOCK(lock_of(vm));
    return guest_ref(vm->guest);
}

const char *vm_detail(const struct vm *vm, char out[VM_DETAIL_MAX])
{
    SCOPE_LOCK(lock_of(vm));
    return strcpy(out, vm->detail);
}

static void set_presence(struct vm *vm, enum vm_presence presence, const char *detail)
{
    SCOPE_LOCK(&vm->lock);
    if (vm->presence == VM_ENDED)
        return; /* for good */
    vm->presence = presence;
    snprintf(vm->detail, sizeof(vm->detail), "%s", detail);
}

/* Asking a VMM: in a thread, since one that hangs answers late or never. */

static bool connection_ended(const struct vm_error *err)
{
    return err->kind == VM_ERROR_UNREACHABLE || err->kind == VM_ERROR_VMM_DIED ||
           err->kind == VM_ERROR_PROTOCOL;
}

static void *ask_thread(void *arg)
{
    CLEANUP(vm) struct vm *vm = arg;
    CLEANUP(guest) struct guest *guest = vm_guest(vm);
    struct guest_status status = {0};
    struct vm_error *err = NULL;
    guest_status(guest, &status, &err);
    SCOPE_LOCK(&vm->lock);
    /* The keeper connects again, unless somebody has, or it is the process that has gone. */
    if (err && connection_ended(err) && vm->presence == VM_PRESENT && vm->guest == guest) {
        vm->presence = VM_UNREACHABLE;
        snprintf(vm->detail, sizeof(vm->detail), "%s", error_message(err));
    }
    error_free(vm->status_error);
    vm->status_error = err;
    vm->status = status;
    vm->asking = false;
    vm->answers++;
    pthread_cond_broadcast(&vm->asked_cond);
    return NULL;
}

/* With the lock held: have a thread ask, unless one does. */
static int ask_locked(struct vm *vm, struct vm_error **err)
{
    pthread_t thread;
    pthread_attr_t detached;
    if (vm->asking)
        return 0;
    pthread_attr_init(&detached);
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    int failed = pthread_create(&thread, &detached, ask_thread, vm_ref(vm));
    pthread_attr_destroy(&detached);
    if (failed) {
        atomic_fetch_sub(&vm->refs, 1); /* never the last: the caller has one */
        return error_errno(err, failed, "cannot start a thread");
    }
    vm->asking = true;
    return 0;
}

void vm_ask(struct vm *vm)
{
    SCOPE_LOCK(&vm->lock);
    ask_locked(vm, NULL);
}

int vm_status(struct vm *vm, int64_t deadline_ns, struct guest_status *ret_status,
              struct vm_error **err)
{
    SCOPE_LOCK(&vm->lock);
    unsigned before = vm->answers;
    if (ask_locked(vm, err) < 0)
        return -1;
    while (vm->answers == before && cond_wait_until(&vm->asked_cond, &vm->lock, deadline_ns))
        ;
    if (vm->answers == before)
        return error_set(err, VM_ERROR_TIMEOUT, "the VMM does not answer");
    if (vm->status_error)
        return error_propagate(err, error_copy(vm->status_error));
    *ret_status = vm->status;
    return 0;
}

/* A VM of that definition, with one reference; its presence is UNREACHABLE or ENDED. */
static struct vm *make_vm(const struct vm_definition *d, struct vm_error **err)
{
    CLEANUP(vm) struct vm *vm = calloc(1, sizeof(*vm));
    if (!vm) {
        error_nomem(err);
        return NULL;
    }
    atomic_init(&vm->refs, 1);
    pthread_mutex_init(&vm->adopt_lock, NULL);
    pthread_mutex_init(&vm->lock, NULL);
    cond_init(&vm->asked_cond);
    vm->pidfd = -1;
    if (vm_definition_copy(d, &vm->definition, err) < 0)
        return NULL;
    vm->pidfd = (int)syscall(SYS_pidfd_open, d->process.pid, 0);
    if (vm->pidfd < 0 && errno != ESRCH) {
        error_errno(err, errno, "cannot watch process %d", d->process.pid);
        return NULL;
    }
    /* The pidfd is of whoever has the pid now: only then compare. */
    if (vm->pidfd < 0 || !process_alive(&d->process)) {
        close_fd(&vm->pidfd);
        vm->presence = VM_ENDED;
    } else {
        vm->presence = VM_UNREACHABLE;
    }
    return steal_ptr(&vm);
}

/* Where name is in the list, or where it would be. */
static unsigned place_of(const struct vms *vms, const char *name, bool *ret_found)
{
    unsigned low = 0, high = vms->n;
    *ret_found = false;
    while (low < high) {
        unsigned middle = (low + high) / 2;
        int order = strcmp(vms->list[middle]->definition.name, name);
        if (order == 0) {
            *ret_found = true;
            return middle;
        }
        if (order < 0)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static void insert_at(struct vms *vms, unsigned place, struct vm *vm)
{
    memmove(vms->list + place + 1, vms->list + place, (vms->n - place) * sizeof(*vms->list));
    vms->list[place] = vm;
    vms->n++;
}

static void remove_at(struct vms *vms, unsigned place)
{
    struct vm *vm = vms->list[place];
    memmove(vms->list + place, vms->list + place + 1,
            (vms->n - place - 1) * sizeof(*vms->list));
    vms->n--;
    vm_put(vm);
}

/* The keeper: adopts, retries, notices deaths. */

static void adopt_locked(struct vms *vms, struct vm *vm)
{
    const struct vm_definition *d = &vm->definition;
    cleanup_error struct vm_error *err = NULL;
    CLEANUP(guest) struct guest *guest = vms->params.connect(d, vms->params.arg, &err);
    if (guest && !process_identity_equal(&guest->process, &d->process))
        error_set(&err, VM_ERROR_REFUSED, "another process answers at %s", d->socket_path);
    if (err) {
        log_warn("a VM does not answer", "vm=%s reason=%s", d->name, log_q(error_message(err)));
        set_presence(vm, VM_UNREACHABLE, error_message(err));
        return;
    }
    SCOPE_LOCK(&vm->lock);
    if (vm->presence == VM_ENDED)
        return;
    struct guest *former = vm->guest;
    vm->guest = guest;
    guest = former; /* goes after the lock, with whoever uses it last */
    vm->presence = VM_PRESENT;
    vm->detail[0] = 0;
    log_info("adopted a VM", "vm=%s pid=%d", d->name, d->process.pid);
}

static void adopt(struct vms *vms, struct vm *vm)
{
    SCOPE_LOCK(&vm->adopt_lock);
    if (vm_presence(vm) == VM_UNREACHABLE) /* or somebody was quicker */
        adopt_locked(vms, vm);
}

void vms_reconnect(struct vms *vms, struct vm *vm, struct guest *lost)
{
    pthread_mutex_lock(&vm->lock);
    bool current = vm->guest == lost;
    if (current && vm->presence == VM_PRESENT)
        vm->presence = VM_UNREACHABLE;
    pthread_mutex_unlock(&vm->lock);
    if (current)
        adopt(vms, vm);
}

static void set_ended(struct vms *vms, struct vm *vm)
{
    const struct vm_definition *d = &vm->definition;
    char detail[VM_DETAIL_MAX] = "";
    if (vms->params.describe_end)
        vms->params.describe_end(d, detail, vms->params.arg);
    set_presence(vm, VM_ENDED, *detail ? detail : "its process ended");
    log_info("a VM ended", "vm=%s pid=%d detail=%s", d->name, d->process.pid, log_q(detail));
}

static bool is_listed(struct vms *vms, const struct vm *vm)
{
    bool found;
    SCOPE_LOCK(&vms->lock);
    unsigned place = place_of(vms, vm->definition.name, &found);
    return found && vms->list[place] == vm;
}

/* Its process is gone. One that was removed meanwhile is nobody's concern. */
static void bury(struct vms *vms, struct vm *vm)
{
    if (!is_listed(vms, vm))
        return;
    set_ended(vms, vm);
    if (vms->params.died)
        vms->params.died(&vm->definition, vms->params.arg);
}

/* References to all VMs now; NULL without memory. */
static struct vm **list_refs(struct vms *vms, unsigned *ret_n)
{
    SCOPE_LOCK(&vms->lock);
    struct vm **copy = malloc((vms->n + 1) * sizeof(*copy));
    for (unsigned i = 0; copy && i < vms->n; i++)
        copy[i] = vm_ref(vms->list[i]);
    *ret_n = copy ? vms->n : 0;
    return copy;
}

static bool is_closing(struct vms *vms)
{
    SCOPE_LOCK(&vms->lock);
    return vms->closing;
}

/* With the lock held: all that were known at the start have been tried once. */
static void see_if_settled(struct vms *vms)
{
    vms->settled = vms->settled || (vms->all_begun && !vms->adopting);
    pthread_cond_broadcast(&vms->changed);
}

struct adoption {
    struct vms *vms;
    struct vm *vm; /* reference */
};

static bool begin_adopting(struct vms *vms, struct vm *vm)
{
    SCOPE_LOCK(&vms->lock);
    pthread_mutex_lock(&vm->lock);
    bool begin = vm->presence == VM_UNREACHABLE && !vm->adopting;
    vm->adopting = vm->adopting || begin;
    pthread_mutex_unlock(&vm->lock);
    vms->adopting += begin;
    return begin;
}

/* The reference goes before the last one is counted out: vms_close frees the registry then. */
static void end_adopting(struct adoption *a)
{
    pthread_mutex_lock(&a->vm->lock);
    a->vm->adopting = false;
    a->vm->tried = true;
    pthread_mutex_unlock(&a->vm->lock);
    vm_put(a->vm);
    SCOPE_LOCK(&a->vms->lock);
    a->vms->adopting--;
    see_if_settled(a->vms);
}

static void *adopt_main(void *arg)
{
    struct adoption a = *(struct adoption *)arg;
    free(arg);
    adopt(a.vms, a.vm);
    end_adopting(&a);
    return NULL;
}

/* In a thread of its own: a VMM that is silent delays nobody else. */
static void start_adopting(struct vms *vms, struct vm *vm)
{
    pthread_t thread;
    if (!begin_adopting(vms, vm))
        return;
    struct adoption here = {vms, vm_ref(vm)}, *theirs = malloc(sizeof(*theirs));
    if (theirs)
        *theirs = here;
    if (theirs && pthread_create(&thread, NULL, adopt_main, theirs) == 0) {
        pthread_detach(thread);
        return;
    }
    log_warn("no thread to connect to a VM", "vm=%s", vm->definition.name);
    free(theirs);
    end_adopting(&here);
}

static void adopt_all(struct vms *vms, struct vm **list, unsigned n)
{
    for (unsigned i = 0; i < n && !is_closing(vms); i++)
        start_adopting(vms, list[i]);
    SCOPE_LOCK(&vms->lock);
    vms->all_begun = true;
    see_if_settled(vms);
}

/* Wait for a death, a change of the list, or the time to try again. */
static void watch(struct vms *vms, struct vm **list, unsigned n, int64_t until_ns)
{
    struct pollfd *p = calloc(n + 1, sizeof(*p));
    if (!p)
        return;
    p[0] = (struct pollfd){.fd = vms->wake_fd, .events = POLLIN};
    for (unsigned i = 0; i < n; i++)
        p[i + 1] = (struct pollfd){
            .fd = vm_presence(list[i]) == VM_ENDED ? -1 : list[i]->pidfd, .events = POLLIN};
    poll(p, n + 1, clock_ms_until(until_ns));
    eventfd_t ignored;
    if (p[0].revents)
        eventfd_read(vms->wake_fd, &ignored);
    for (unsigned i = 0; i < n; i++)
        if (p[i + 1].revents)
            bury(vms, list[i]);
    free(p);
}

static void *keeper_thread(void *arg)
{
    struct vms *vms = arg;
    int64_t retry_ns = 0; /* when those that do not answer are tried again */
    while (!is_closing(vms)) {
        unsigned n;
        struct vm **list = list_refs(vms, &n);
        if (clock_mono_ns() >= retry_ns) {
            adopt_all(vms, list, n);
            retry_ns = clock_mono_ns() + RETRY_NS;
        }
        /* A connection that ended shows when somebody asks: then it is made anew. */
        watch(vms, list, n, n || !list ? retry_ns : INT64_MAX);
        for (unsigned i = 0; i < n; i++)
            vm_put(list[i]);
        free(list);
    }
    return NULL;
}

static void wake_keeper(struct vms *vms)
{
    eventfd_write(vms->wake_fd, 1);
}

/* Records to VMs. One whose process is gone is known as ENDED at once. */
static int load(struct vms *vms, struct vm_error **err)
{
    struct vm_definition *list = NULL;
    unsigned n = 0;
    int r = vm_record_read_all(vms->folder, vms->params.max, &list, &n, err);
    for (unsigned i = 0; i < n; i++) {
        bool found;
        struct vm *vm = r < 0 ? NULL : make_vm(&list[i], err);
        if (!vm)
            r = -1;
        else
            insert_at(vms, place_of(vms, list[i].name, &found), vm);
        if (vm && vm->presence == VM_ENDED)
            set_ended(vms, vm);
        vm_definition_finish(&list[i]);
    }
    free(list);
    return r;
}

struct vms *vms_open(const struct vms_params *params, struct vm_error **err)
{
    CLEANUP(vms) struct vms *vms = calloc(1, sizeof(*vms));
    if (!vms) {
        error_nomem(err);
        return NULL;
    }
    vms->params = *params;
    vms->wake_fd = -1;
    pthread_mutex_init(&vms->lock, NULL);
    cond_init(&vms->changed);
    vms->list = calloc(params->max, sizeof(*vms->list));
    if (!vms->list || asprintf(&vms->folder, "%s/vms", params->state_dir) < 0) {
        error_nomem(err);
        return NULL;
    }
    vms->wake_fd = io_latch_new(err);
    if (vms->wake_fd < 0 || io_make_folders(vms->folder, 0700, err) < 0 || load(vms, err) < 0)
        return NULL;
    int failed = pthread_create(&vms->keeper, NULL, keeper_thread, vms);
    if (failed) {
        error_errno(err, failed, "cannot start a thread");
        return NULL;
    }
    vms->keeper_runs = true;
    return steal_ptr(&vms);
}

void vms_close(struct vms *vms)
{
    if (!vms)
        return;
    if (vms->keeper_runs) {
        pthread_mutex_lock(&vms->lock);
        vms->closing = true;
        pthread_mutex_unlock(&vms->lock);
        wake_keeper(vms);
        pthread_join(vms->keeper, NULL);
        pthread_mutex_lock(&vms->lock);
        while (vms->adopting)
            pthread_cond_wait(&vms->changed, &vms->lock);
        pthread_mutex_unlock(&vms->lock);
    }
    while (vms->n)
        remove_at(vms, vms->n - 1);
    free(vms->list);
    free(vms->folder);
    close_fd(&vms->wake_fd);
    pthread_cond_destroy(&vms->changed);
    pthread_mutex_destroy(&vms->lock);
    free(vms);
}

bool vms_settle(struct vms *vms, int timeout_ms)
{
    int64_t deadline = clock_mono_ns() + timeout_ms * NSEC_PER_MSEC;
    SCOPE_LOCK(&vms->lock);
    while (!vms->settled && cond_wait_until(&vms->changed, &vms->lock, deadline))
        ;
    return vms->settled;
}

/* With the lock held. */
static bool was_tried(const struct vms *vms, const char *name)
{
    bool found;
    unsigned place = place_of(vms, name, &found);
    if (!found)
        return true;
    struct vm *vm = vms->list[place];
    SCOPE_LOCK(&vm->lock);
    return vm->tried || vm->presence != VM_UNREACHABLE;
}

bool vms_settle_one(struct vms *vms, const char *name, int timeout_ms)
{
    int64_t deadline = clock_mono_ns() + timeout_ms * NSEC_PER_MSEC;
    SCOPE_LOCK(&vms->lock);
    while (!was_tried(vms, name) && cond_wait_until(&vms->changed, &vms->lock, deadline))
        ;
    return was_tried(vms, name);
}

/* With the lock held. */
static int check_free(struct vms *vms, const char *name, struct vm_error **err)
{
    bool found;
    unsigned place = place_of(vms, name, &found);
    if (found && vm_presence(vms->list[place]) != VM_ENDED)
        return error_set(err, VM_ERROR_CONFLICT, "a VM named %s is here already", name);
    if (!found && vms->n == vms->params.max)
        return error_set(err, VM_ERROR_NO_SPACE,
                         "there are %u VMs here already (max-vms); detach those that have ended",
                         vms->n);
    return 0;
}

int vms_check_free(struct vms *vms, const char *name, struct vm_error **err)
{
    SCOPE_LOCK(&vms->lock);
    return check_free(vms, name, err);
}

static int check_process_unknown(struct vms *vms, const struct vm_definition *d,
                                 struct vm_error **err)
{
    for (unsigned i = 0; i < vms->n; i++)
        if (process_identity_equal(&vms->list[i]->definition.process, &d->process))
            return error_set(err, VM_ERROR_CONFLICT, "process %d is here already, as VM %s",
                             d->process.pid, vms->list[i]->definition.name);
    return 0;
}

int vms_add(struct vms *vms, const struct vm_definition *d, struct guest **guest,
            struct vm_error **err)
{
    if (vm_name_check(d->name, err) < 0)
        return -1;
    CLEANUP(vm) struct vm *vm = make_vm(d, err);
    if (!vm)
        return -1;
    if (vm->presence == VM_ENDED)
        return error_set(err, VM_ERROR_VMM_DIED, "VM %s: its process %d ended", d->name,
                         d->process.pid);
    SCOPE_LOCK(&vms->lock);
    if (check_free(vms, d->name, err) < 0 || check_process_unknown(vms, d, err) < 0)
        return -1;
    if (vm_record_write(vms->folder, d, err) < 0)
        return error_wrap(err, "VM %s", d->name);
    bool found;
    unsigned place = place_of(vms, d->name, &found);
    if (found)
        remove_at(vms, place);
    vm->presence = *guest ? VM_PRESENT : VM_UNREACHABLE;
    vm->guest = steal_ptr(guest);
    insert_at(vms, place, steal_ptr(&vm));
    wake_keeper(vms);
    return 0;
}

int vms_reserve(struct vms *vms, const struct vm_definition *d, struct vm_error **err)
{
    return vm_name_check(d->name, err) < 0 ? -1 : vm_record_reserve(vms->folder, d, err);
}

void vms_release(struct vms *vms, const char *name)
{
    vm_record_release(vms->folder, name);
}

int vms_remove(struct vms *vms, const char *name, struct vm_error **err)
{
    bool found;
    SCOPE_LOCK(&vms->lock);
    unsigned place = place_of(vms, name, &found);
    if (!found)
        return error_set(err, VM_ERROR_NOT_FOUND, "there is no VM named %s here", name);
    if (vm_record_remove(vms->folder, name, err) < 0)
        return error_wrap(err, "VM %s", name);
    remove_at(vms, place);
    wake_keeper(vms);
    return 0;
}

struct vm *vms_get(struct vms *vms, const char *name, struct vm_error **err)
{
    bool found;
    SCOPE_LOCK(&vms->lock);
    unsigned place = place_of(vms, name, &found);
    if (found)
        return vm_ref(vms->list[place]);
    error_set(err, VM_ERROR_NOT_FOUND, "there is no VM named %s here", name);
    return NULL;
}

struct vm *vms_get_present(struct vms *vms, const char *name, struct vm_error **err)
{
    char detail[VM_DETAIL_MAX];
    CLEANUP(vm) struct vm *vm = vms_get(vms, name, err);
    if (!vm)
        return NULL;
    switch (vm_presence(vm)) {
    case VM_PRESENT:
        return steal_ptr(&vm);
    case VM_UNREACHABLE:
        error_set(err, VM_ERROR_UNREACHABLE, "VM %s does not answer: %s", name,
                  vm_detail(vm, detail));
        return NULL;
    case VM_ENDED:
        error_set(err, VM_ERROR_VMM_DIED, "VM %s has ended: %s", name, vm_detail(vm, detail));
        return NULL;
    }
    return NULL;
}

int vms_list(struct vms *vms, struct vm ***ret_vms, unsigned *ret_n, struct vm_error **err)
{
    struct vm **list = list_refs(vms, ret_n);
    if (!list)
        return error_nomem(err);
    *ret_vms = list;
    return 0;
}

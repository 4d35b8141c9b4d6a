/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Each callback runs in a thread of its own, so that one that hangs takes nothing with it. Its caller waits for
 * it until the deadline, and then leaves it alone ("abandoned").
 */
#include "base/fault.h"
#include "dirtylog/attach_internal.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>

struct call {
    struct vmmig_attach *attach;
    enum attach_call which;
    int fd;
    /* Under call_lock: */
    bool done, abandoned;
    int result;
};

static const char *const call_names[] = {
#define X(id, name) #name,
    ATTACH_CALLS(X)
#undef X
};

static int call_vmm(const struct call *c)
{
    const struct vmmig_callbacks *cb = &c->attach->config.callbacks;
    void *arg = c->attach->config.arg;
    switch (c->which) {
    case ATTACH_CALL_PAUSE:
        return cb->pause(arg);
    case ATTACH_CALL_RESUME:
        return cb->resume(arg);
    case ATTACH_CALL_RELEASE:
        return cb->release(arg);
    case ATTACH_CALL_SAVE:
        return cb->save(arg, c->fd);
    case ATTACH_CALL_LOAD:
        return cb->load(arg, c->fd);
    case ATTACH_CALL_QUIT:
        return cb->quit(arg);
    }
    return -EINVAL;
}

/* Fault points "library.call.pause", "library.called.pause": before and after the callback. */
static int invoke(const struct call *c)
{
    switch (c->which) {
#define X(id, name)                                                                                \
    case ATTACH_CALL_##id: {                                                                       \
        int r = FAULT("library.call." #name) == FAULT_ERROR ? -fault_errno() : call_vmm(c);        \
        (void)FAULT("library.called." #name);                                                      \
        return r;                                                                                  \
    }
        ATTACH_CALLS(X)
#undef X
    }
    return -EINVAL;
}

/*
 * A guest that it paused so late, or in part, goes on if it ran before, and is the VMM's again if
 * that had paused it. One that does not go on is held: whoever asks next has it go on.
 */
static void take_pause_back(struct vmmig_attach *a)
{
    pthread_mutex_lock(&a->state_lock);
    bool ran = a->state == VMMIG_RUNNING || a->pause_hangs, held = a->held;
    pthread_mutex_unlock(&a->state_lock);
    if (ran && a->config.callbacks.resume(a->config.arg) == 0)
        attach_set_state(a, VMMIG_RUNNING, false);
    else if (ran)
        attach_hold(a);
    else if (!held && a->config.callbacks.release)
        a->config.callbacks.release(a->config.arg);
}

/* Nobody waits for it any more. A guest that it resumed so late runs. */
static void take_back(struct call *c)
{
    struct vmmig_attach *a = c->attach;
    attach_log(a, "the callback `%s` returned after its caller had gone", call_names[c->which]);
    if (c->which == ATTACH_CALL_PAUSE)
        take_pause_back(a);
    if (c->which == ATTACH_CALL_RELEASE)
        attach_released(a, c->result == 0);
    if (c->result == 0 && c->which == ATTACH_CALL_RESUME)
        attach_set_state(a, VMMIG_RUNNING, false);
}

static void free_call(struct call *c)
{
    close_fd(&c->fd);
    free(c);
}

static void *call_main(void *arg)
{
    struct call *c = arg;
    struct vmmig_attach *a = c->attach;
    c->result = invoke(c);
    pthread_mutex_lock(&a->call_lock);
    bool abandoned = c->abandoned;
    c->done = true;
    pthread_cond_broadcast(&a->call_changed);
    pthread_mutex_unlock(&a->call_lock);
    if (abandoned)
        take_back(c);
    SCOPE_LOCK(&a->call_lock);
    a->abandoned -= abandoned;
    a->calls--;
    pthread_cond_broadcast(&a->call_changed);
    if (abandoned)
        free_call(c);
    return NULL;
}

static int begin(struct call *c, struct vm_error **err)
{
    struct vmmig_attach *a = c->attach;
    pthread_t thread;
    pthread_attr_t detached;
    pthread_mutex_lock(&a->call_lock);
    /* To give the guest back need not wait for what hangs. */
    unsigned room = c->which == ATTACH_CALL_RESUME || c->which == ATTACH_CALL_RELEASE ? 2 : 1;
    const char *hanging = a->abandoned >= room ? a->abandoned_name : NULL;
    a->calls += !hanging;
    pthread_mutex_unlock(&a->call_lock);
    if (hanging)
        return error_set(err, VM_ERROR_CONFLICT, "the VMM's callback `%s` has not returned yet",
                         hanging);
    pthread_attr_init(&detached);
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    int failed = pthread_create(&thread, &detached, call_main, c);
    pthread_attr_destroy(&detached);
    if (!failed)
        return 0;
    SCOPE_LOCK(&a->call_lock);
    a->calls--;
    return error_errno(err, failed, "cannot start a thread");
}

/* True: it returned. */
static bool wait_done(struct call *c, int64_t deadline_ns)
{
    struct vmmig_attach *a = c->attach;
    SCOPE_LOCK(&a->call_lock);
    while (!c->done && cond_wait_until(&a->call_changed, &a->call_lock, deadline_ns))
        ;
    if (c->done)
        return true;
    c->abandoned = true;
    a->abandoned++;
    a->abandoned_name = call_names[c->which];
    return false;
}

static int report(const struct call *c, struct vm_error **err)
{
    if (c->result == 0)
        return 0;
    error_errno(err, c->result < 0 ? -c->result : EIO, "the VMM's callback `%s` failed",
                call_names[c->which]);
    /* A guest that was not resumed is known to stand: whoever asked for it may take it back. */
    return error_set_kind(err, c->which == ATTACH_CALL_RESUME ? VM_ERROR_REFUSED : VM_ERROR_FAILED);
}

int attach_call(struct vmmig_attach *a, enum attach_call which, int fd, struct vm_error **err)
{
    struct call *c = calloc(1, sizeof(*c));
    if (!c)
        return error_nomem(err);
    *c = (struct call){.attach = a, .which = which};
    c->fd = fd < 0 ? -1 : fcntl(fd, F_DUPFD_CLOEXEC, 0);
    int64_t limit = fault_patience_ns(a->config.callback_timeout_ms);
    int64_t deadline = clock_mono_ns() + limit;
    if (begin(c, err) < 0) {
        free_call(c);
        return -1;
    }
    if (!wait_done(c, deadline))
        return error_set(err, VM_ERROR_TIMEOUT, "the VMM's callback `%s` has not returned for %.1f s",
                         call_names[which], (double)limit / 1e9);
    int r = report(c, err);
    /* Its thread only counts down now; it looks at `abandoned`, which it has read already. */
    pthread_mutex_lock(&a->call_lock);
    while (a->calls > a->abandoned)
        pthread_cond_wait(&a->call_changed, &a->call_lock);
    pthread_mutex_unlock(&a->call_lock);
    free_call(c);
    return r;
}

void attach_call_drain(struct vmmig_attach *a)
{
    SCOPE_LOCK(&a->call_lock);
    while (a->calls)
        pthread_cond_wait(&a->call_changed, &a->call_lock);
}

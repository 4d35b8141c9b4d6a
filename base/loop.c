/* SPDX-License-Identifier: Apache-2.0 */
#include "base/loop.h"

#include "base/clock.h"
#include "base/io.h"

#include <errno.h>
#include <event2/event.h>
#include <pthread.h>
#include <stdbool.h>
#include <sys/eventfd.h>

struct posted {
    loop_fn *fn;
    void *arg;
    struct posted *next;
};

struct loop {
    struct event_base *base;
    struct loop_watch *wakeup;
    int wakeup_fd;
    pthread_mutex_t lock; /* guards what follows */
    struct posted *first, **last;
    bool stop;
};

struct loop_watch {
    struct loop *loop;
    struct event *event;
    int fd;
    loop_fd_fn *fd_fn;
    loop_fn *fn;
    void *arg;
};

static short to_libevent(int events)
{
    return (short)((events & LOOP_READ ? EV_READ : 0) | (events & LOOP_WRITE ? EV_WRITE : 0) |
                   EV_PERSIST);
}

static void on_fd(evutil_socket_t fd, short what, void *arg)
{
    struct loop_watch *w = arg;
    w->fd_fn(fd, (what & EV_READ ? LOOP_READ : 0) | (what & EV_WRITE ? LOOP_WRITE : 0), w->arg);
}

static void on_timer_or_signal(evutil_socket_t fd, short what, void *arg)
{
    struct loop_watch *w = arg;
    (void)fd;
    (void)what;
    w->fn(w->arg);
}

static struct loop_watch *add_watch(struct loop *loop, int fd, short what,
                                    event_callback_fn callback, const struct timeval *interval,
                                    struct vm_error **err)
{
    struct loop_watch *w = calloc(1, sizeof(*w));
    if (!w) {
        error_nomem(err);
        return NULL;
    }
    w->loop = loop;
    w->fd = fd;
    w->event = event_new(loop->base, fd, what, callback, w);
    if (!w->event || event_add(w->event, interval) < 0) {
        error_set(err, VM_ERROR_SYSTEM, "the event loop cannot watch descriptor %d", fd);
        loop_watch_destroy(w);
        return NULL;
    }
    return w;
}

struct loop_watch *loop_watch_fd(struct loop *loop, int fd, int events, loop_fd_fn *fn, void *arg,
                                 struct vm_error **err)
{
    struct loop_watch *w = add_watch(loop, fd, to_libevent(events), on_fd, NULL, err);
    if (!w)
        return NULL;
    w->fd_fn = fn;
    w->arg = arg;
    return w;
}

int loop_watch_set_events(struct loop_watch *w, int events, struct vm_error **err)
{
    event_del(w->event);
    if (!events)
        return 0;
    if (event_assign(w->event, w->loop->base, w->fd, to_libevent(events), on_fd, w) < 0 ||
        event_add(w->event, NULL) < 0)
        return error_set(err, VM_ERROR_SYSTEM, "the event loop cannot watch descriptor %d", w->fd);
    return 0;
}

struct loop_watch *loop_watch_timer(struct loop *loop, int64_t interval_ns, loop_fn *fn, void *arg,
                                    struct vm_error **err)
{
    struct timeval interval = {interval_ns / NSEC_PER_SEC,
                               interval_ns % NSEC_PER_SEC / NSEC_PER_USEC};
    struct loop_watch *w = add_watch(loop, -1, EV_PERSIST, on_timer_or_signal, &interval, err);
    if (!w)
        return NULL;
    w->fn = fn;
    w->arg = arg;
    return w;
}

struct loop_watch *loop_watch_signal(struct loop *loop, int signum, loop_fn *fn, void *arg,
                                     struct vm_error **err)
{
    struct loop_watch *w =
        add_watch(loop, signum, EV_SIGNAL | EV_PERSIST, on_timer_or_signal, NULL, err);
    if (!w)
        return NULL;
    w->fn = fn;
    w->arg = arg;
    return w;
}

void loop_watch_destroy(struct loop_watch *w)
{
    if (!w)
        return;
    if (w->event)
        event_free(w->event);
    free(w);
}

static struct posted *take_posted(struct loop *loop, bool *ret_stop)
{
    SCOPE_LOCK(&loop->lock);
    struct posted *first = loop->first;
    loop->first = NULL;
    loop->last = &loop->first;
    *ret_stop = loop->stop;
    return first;
}

static void on_wakeup(int fd, int ready, void *arg)
{
    struct loop *loop = arg;
    eventfd_t count;
    bool stop;
    (void)ready;
    eventfd_read(fd, &count);
    struct posted *p = take_posted(loop, &stop);
    while (p) {
        struct posted *next = p->next;
        p->fn(p->arg);
        free(p);
        p = next;
    }
    if (stop)
        event_base_loopbreak(loop->base);
}

struct loop *loop_create(struct vm_error **err)
{
    CLEANUP(loop) struct loop *loop = calloc(1, sizeof(*loop));
    if (!loop) {
        error_nomem(err);
        return NULL;
    }
    pthread_mutex_init(&loop->lock, NULL);
    loop->last = &loop->first;
    loop->wakeup_fd = io_latch_new(err);
    if (loop->wakeup_fd < 0)
        return NULL;
    loop->base = event_base_new();
    if (!loop->base) {
        error_set(err, VM_ERROR_SYSTEM, "cannot make an event loop");
        return NULL;
    }
    loop->wakeup = loop_watch_fd(loop, loop->wakeup_fd, LOOP_READ, on_wakeup, loop, err);
    return loop->wakeup ? steal_ptr(&loop) : NULL;
}

void loop_destroy(struct loop *loop)
{
    if (!loop)
        return;
    loop_watch_destroy(loop->wakeup);
    if (loop->base)
        event_base_free(loop->base);
    close_fd(&loop->wakeup_fd);
    while (loop->first) {
        struct posted *next = loop->first->next;
        free(loop->first);
        loop->first = next;
    }
    pthread_mutex_destroy(&loop->lock);
    free(loop);
}

int loop_run(struct loop *loop, struct vm_error **err)
{
    if (event_base_loop(loop->base, EVLOOP_NO_EXIT_ON_EMPTY) < 0)
        return error_set(err, VM_ERROR_SYSTEM, "the event loop failed");
    return 0;
}

void loop_stop(struct loop *loop)
{
    pthread_mutex_lock(&loop->lock);
    loop->stop = true;
    pthread_mutex_unlock(&loop->lock);
    eventfd_write(loop->wakeup_fd, 1);
}

int loop_post(struct loop *loop, loop_fn *fn, void *arg, struct vm_error **err)
{
    struct posted *p = malloc(sizeof(*p));
    if (!p)
        return error_nomem(err);
    *p = (struct posted){fn, arg, NULL};
    pthread_mutex_lock(&loop->lock);
    *loop->last = p;
    loop->last = &p->next;
    pthread_mutex_unlock(&loop->lock);
    eventfd_write(loop->wakeup_fd, 1);
    return 0;
}

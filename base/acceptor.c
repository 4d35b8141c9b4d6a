/* SPDX-License-Identifier: Apache-2.0 */
#include "base/acceptor.h"

#include "base/clock.h"
#include "base/log.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

struct acceptor {
    struct loop *loop;
    struct loop_watch *watch, *rest; /* rest: while it does not look */
    acceptor_fn *fn;
    void *arg;
};

static void on_rested(void *arg)
{
    struct acceptor *a = arg;
    cleanup_error struct vm_error *err = NULL;
    loop_watch_destroy(steal_ptr(&a->rest));
    if (loop_watch_set_events(a->watch, LOOP_READ, &err) < 0)
        log_error("connections are not taken any more", "error=%s", log_q(error_message(err)));
}

/* Without a timer it goes on to spin, rather than never to look again. */
static void rest(struct acceptor *a, int why)
{
    log_warn("a connection cannot be taken now", "error=%s", log_q(strerror(why)));
    a->rest =
        loop_watch_timer(a->loop, ACCEPTOR_REST_MS * NSEC_PER_MSEC, on_rested, a, NULL);
    if (a->rest)
        loop_watch_set_events(a->watch, 0, NULL);
}

static void on_ready(int listener, int ready, void *arg)
{
    struct acceptor *a = arg;
    (void)ready;
    int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
    if (fd >= 0)
        a->fn(fd, a->arg);
    else if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM)
        rest(a, errno);
}

struct acceptor *acceptor_create(struct loop *loop, int listener, acceptor_fn *fn, void *arg,
                                 struct vm_error **err)
{
    CLEANUP(acceptor) struct acceptor *a = calloc(1, sizeof(*a));
    if (!a) {
        error_nomem(err);
        return NULL;
    }
    *a = (struct acceptor){.loop = loop, .fn = fn, .arg = arg};
    a->watch = loop_watch_fd(loop, listener, LOOP_READ, on_ready, a, err);
    return a->watch ? steal_ptr(&a) : NULL;
}

void acceptor_destroy(struct acceptor *a)
{
    if (!a)
        return;
    loop_watch_destroy(a->watch);
    loop_watch_destroy(a->rest);
    free(a);
}

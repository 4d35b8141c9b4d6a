/* SPDX-License-Identifier: Apache-2.0 */
/* Fetchers: starting them, giving them work, taking it back when they die. */
#include "base/cleanup.h"
#include "base/clock.h"
#include "base/log.h"
#include "snapshot/holder.h"

#include <errno.h>
#include <signal.h>
#include <spawn.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>

#define RETRY_NS (300 * NSEC_PER_MSEC)
#define RESTART_MIN_NS (100 * NSEC_PER_MSEC)
#define RESTART_MAX_NS (5 * NSEC_PER_SEC)

struct fetcher {
    struct holder *holder;
    int fd;
    pid_t pid;
    struct loop_watch *watch;
    bool ready;    /* it said HELLO */
    bool retiring; /* gets no more work; its successor is there */
    unsigned in_flight;
};

struct fetchers {
    struct fetcher list[HOLDER_FETCHERS_MAX];
    struct task *tasks, **tail; /* all that have no answer yet, oldest first */
    unsigned n_tasks;
    uint32_t next_id;
    int64_t start_at_ns, pause_ns; /* when the next fetcher is started */
    bool refreshing;
    struct mount_packet packet;
};

extern char **environ;

/* ---- tasks ---- */

struct task *task_new(struct holder *h, enum mount_type type, const char *name, task_fn *done)
{
    struct fetchers *f = h->fetchers;
    unsigned most = type == MOUNT_FETCH ? HOLDER_FETCHES_MAX : HOLDER_TASKS_MAX;
    struct task *t = f->n_tasks < most ? calloc(1, sizeof(*t)) : NULL;
    if (!t)
        return NULL;
    t->message = mount_message(type, ++f->next_id, name);
    t->done = done;
    return t;
}

static void task_free(struct holder *h, struct task *t)
{
    h->fetchers->n_tasks--;
    if (t->image)
        t->image->tasks--;
    free(t->payload);
    free(t);
}

static void unlink_task(struct fetchers *f, struct task *t)
{
    struct task **p = &f->tasks;
    while (*p != t)
        p = &(*p)->next;
    *p = t->next;
    if (f->tail == &t->next)
        f->tail = p;
}

static void end_task(struct holder *h, struct task *t, const struct mount_packet *answer)
{
    unlink_task(h->fetchers, t);
    t->done(h, t, answer);
    task_free(h, t);
}

/* An answer of our own. */
static void fail_task(struct holder *h, struct task *t, enum vm_error_kind kind, const char *text)
{
    struct mount_packet p;
    p.m = mount_message(MOUNT_FAILED, t->message.id, NULL);
    p.m.kind = kind;
    p.m.payload_len = (uint32_t)snprintf((char *)p.payload, 200, "%s", text);
    end_task(h, t, &p);
}

static struct fetcher *choose(struct fetchers *f)
{
    struct fetcher *best = NULL;
    for (int i = 0; i < HOLDER_FETCHERS_MAX; i++) {
        struct fetcher *x = &f->list[i];
        if (x->ready && !x->retiring && x->in_flight < HOLDER_IN_FLIGHT &&
            (!best || x->in_flight < best->in_flight))
            best = x;
    }
    return best;
}

static void drop_fetcher(struct holder *h, struct fetcher *x, const char *why);

static bool is_keeping(const struct fetchers *f)
{
    for (const struct task *t = f->tasks; t; t = t->next)
        if (t->at && t->message.type == MOUNT_KEEP)
            return true;
    return false;
}

/*
 * Whoever gets KEEP drops what is not in its list. So that is made when it is sent (the fetcher knows what it leases
 * itself from then on), and no other fetcher is there that might be leasing, nor is one started before the answer.
 */
static bool list_leases(struct holder *h, struct task *t)
{
    unsigned fetchers = 0;
    for (int i = 0; i < HOLDER_FETCHERS_MAX; i++)
        fetchers += h->fetchers->list[i].fd >= 0;
    uint64_t *list = fetchers == 1 ? calloc(h->n_images + 1, sizeof(*list)) : NULL;
    uint32_t n = 0;
    if (!list)
        return false;
    for (struct image_dir *d = h->images; d; d = d->next)
        if (d->lease)
            list[n++] = d->lease;
    free(t->payload);
    t->payload = list;
    t->message.count = n;
    t->message.payload_len = n * (uint32_t)sizeof(*list);
    if (t->message.payload_len <= MOUNT_PAYLOAD_MAX)
        return true;
    log_warn("leases of an earlier mount are not looked for: too many are held", "held=%u", n);
    return false;
}

static bool send_task(struct holder *h, struct task *t)
{
    struct fetcher *x = choose(h->fetchers);
    cleanup_error struct vm_error *err = NULL;
    if (!x)
        return false;
    if (mount_send(x->fd, &t->message, t->payload, t->fds, t->n_fds, &err) < 0) {
        if (err->sys_errno != EAGAIN && err->sys_errno != ENOBUFS)
            drop_fetcher(h, x, error_message(err));
        return false;
    }
    t->at = x;
    x->in_flight++;
    return true;
}

static void send_waiting(struct holder *h)
{
    int64_t now = clock_mono_ns();
    for (struct task *t = h->fetchers->tasks; t; t = t->next)
        if (!t->at && t->not_before_ns <= now &&
            (t->message.type != MOUNT_KEEP || list_leases(h, t)) && !send_task(h, t))
            return;
}

void task_submit(struct holder *h, struct task *t)
{
    struct fetchers *f = h->fetchers;
    *f->tail = t;
    f->tail = &t->next;
    f->n_tasks++;
    if (t->image)
        t->image->tasks++;
    send_waiting(h);
}

void tasks_withdraw(struct holder *h, struct image_dir *d)
{
    for (struct task *t = h->fetchers->tasks, *next; t; t = next) {
        next = t->next;
        if (!t->at && t->image == d && t->message.type == MOUNT_FETCH)
            fail_task(h, t, VM_ERROR_CANCELLED, "nobody wants it any more");
    }
}

static bool is_transient(int kind)
{
    return kind == VM_ERROR_UNREACHABLE || kind == VM_ERROR_TIMEOUT || kind == VM_ERROR_NO_SPACE ||
           kind == VM_ERROR_SYSTEM || kind == VM_ERROR_CANCELLED;
}

static void take_answer(struct holder *h, struct fetcher *x, const struct mount_packet *p)
{
    struct task *t = h->fetchers->tasks;
    while (t && (t->message.id != p->m.id || t->at != x))
        t = t->next;
    if (!t) {
        if (p->m.type == MOUNT_OK && p->m.number && *p->m.name) /* a LEASE that was given up */
            tree_drop_lease(h, p->m.name, p->m.number);
        return;
    }
    if (p->m.type == MOUNT_HAVE || (p->m.type == MOUNT_NAMES && !(p->m.flags & MOUNT_LAST))) {
        t->done(h, t, p);
        return;
    }
    x->in_flight--;
    if (p->m.type == MOUNT_FAILED && t->transient_retry && is_transient(p->m.kind)) {
        if (p->m.kind == VM_ERROR_NO_SPACE) /* fetchers write nowhere else */
            images_make_room(h);
        else
            log_warn("the repository did not answer; trying again", "reason=%s",
                     log_q((const char *)p->payload));
        t->at = NULL;
        t->not_before_ns = clock_mono_ns() + RETRY_NS;
        return;
    }
    end_task(h, t, p);
}

/* ---- processes ---- */

static void close_fetcher(struct fetcher *x)
{
    loop_watch_destroy(x->watch);
    close_fd(&x->fd);
    *x = (struct fetcher){.fd = -1};
}

static void drop_fetcher(struct holder *h, struct fetcher *x, const char *why)
{
    struct fetchers *f = h->fetchers;
    if (x->fd < 0)
        return;
    if (!x->retiring)
        log_warn("a fetcher ended", "pid=%d reason=%s", x->pid, log_q(why));
    for (struct task *t = f->tasks; t; t = t->next)
        if (t->at == x)
            t->at = NULL; /* asked again of the next */
    bool had_successor = x->retiring;
    kill(x->pid, SIGKILL);
    close_fetcher(x);
    if (!had_successor && f->start_at_ns == INT64_MAX)
        f->start_at_ns = clock_mono_ns() + f->pause_ns;
}

static void kept(struct holder *h, struct task *t, const struct mount_packet *answer)
{
    (void)h;
    (void)t;
    if (answer->m.type == MOUNT_FAILED)
        log_warn("leases of an earlier mount could not be looked for", "reason=%s",
                 log_q((const char *)answer->payload));
    else if (answer->m.count)
        log_info("leases of an earlier mount were dropped", "count=%u", answer->m.count);
}

/* Tell it which leases are held; what else this host's mount once took is dropped. */
static void send_leases(struct holder *h)
{
    for (const struct task *t = h->fetchers->tasks; t; t = t->next)
        if (t->message.type == MOUNT_KEEP)
            return; /* it is sent again */
    struct task *t = task_new(h, MOUNT_KEEP, NULL, kept);
    if (t)
        task_submit(h, t);
}

static void greet(struct holder *h, struct fetcher *x, const struct mount_packet *p)
{
    struct fetchers *f = h->fetchers;
    if (p->m.type != MOUNT_HELLO || p->m.version != MOUNT_WIRE_VERSION) {
        drop_fetcher(h, x, "it speaks another version");
        return;
    }
    x->ready = true;
    f->pause_ns = RESTART_MIN_NS;
    unsigned others = fetchers_connected(h, NULL) - 1;
    log_info("a fetcher is ready", "pid=%d", x->pid);
    for (int i = 0; i < HOLDER_FETCHERS_MAX; i++)
        if (f->refreshing && &f->list[i] != x && f->list[i].fd >= 0) {
            f->list[i].retiring = true;
            shutdown(f->list[i].fd, SHUT_WR); /* it answers what it has, and ends */
        }
    f->refreshing = false;
    if (!others)
        send_leases(h);
    send_waiting(h);
}

static void on_packet(int fd, int ready, void *arg)
{
    struct fetcher *x = arg;
    struct holder *h = x->holder;
    struct mount_packet *p = &h->fetchers->packet;
    (void)ready;
    for (int i = 0; i < 64 && x->fd == fd; i++) {
        cleanup_error struct vm_error *err = NULL;
        int r = mount_receive(fd, p, NULL, 0, NULL, &err);
        if (r < 0 && err->sys_errno == EAGAIN)
            break;
        if (r <= 0) {
            drop_fetcher(h, x, r < 0 ? error_message(err) : "it closed its connection");
            break;
        }
        if (x->ready)
            take_answer(h, x, p);
        else
            greet(h, x, p);
    }
    send_waiting(h);
}

static int spawn(struct holder *h, int socket, pid_t *ret_pid, struct vm_error **err)
{
    const struct holder_options *o = &h->options;
    char fd[16];
    const char *argv[] = {o->fetcher, "--socket", fd,       "--repository", o->repository,
                          "--owner",  o->owner,   "--life", h->life,        NULL};
    snprintf(fd, sizeof(fd), "%d", 3);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, socket, 3);
    posix_spawn_file_actions_addclosefrom_np(&actions, 4);
    int failed = posix_spawn(ret_pid, o->fetcher, &actions, NULL, (char **)(uintptr_t)argv, environ);
    posix_spawn_file_actions_destroy(&actions);
    return failed ? error_errno(err, failed, "cannot start %s", o->fetcher) : 0;
}

static int start_one(struct holder *h, struct vm_error **err)
{
    struct fetchers *f = h->fetchers;
    struct fetcher *x = f->list;
    while (x < f->list + HOLDER_FETCHERS_MAX && x->fd >= 0)
        x++;
    if (x == f->list + HOLDER_FETCHERS_MAX)
        return error_set(err, VM_ERROR_CONFLICT, "too many fetchers are ending");
    int pair[2];
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0)
        return error_errno(err, errno, "cannot make a socket pair");
    cleanup_close int ours = pair[0], theirs = pair[1];
    if (fcntl(ours, F_SETFL, O_NONBLOCK) < 0 || spawn(h, theirs, &x->pid, err) < 0)
        return -1;
    x->holder = h;
    x->fd = steal_fd(&ours);
    x->ready = x->retiring = false;
    x->in_flight = 0;
    x->watch = loop_watch_fd(h->loop, x->fd, LOOP_READ, on_packet, x, err);
    h->state.fetcher_starts++;
    return x->watch ? 0 : -1;
}

static void on_child(void *arg)
{
    (void)arg;
    while (waitpid(-1, NULL, WNOHANG) > 0)
        ;
}

int fetchers_start(struct holder *h, struct vm_error **err)
{
    struct fetchers *f = h->fetchers = calloc(1, sizeof(*f));
    if (!f)
        return error_nomem(err);
    for (int i = 0; i < HOLDER_FETCHERS_MAX; i++)
        f->list[i].fd = -1;
    f->tail = &f->tasks;
    f->pause_ns = RESTART_MIN_NS;
    f->start_at_ns = INT64_MAX;
    if (!loop_watch_signal(h->loop, SIGCHLD, on_child, NULL, err))
        return -1;
    return start_one(h, err);
}

void fetchers_stop(struct holder *h)
{
    struct fetchers *f = h->fetchers;
    if (!f)
        return;
    f->start_at_ns = INT64_MAX;
    for (int i = 0; i < HOLDER_FETCHERS_MAX; i++)
        if (f->list[i].fd >= 0)
            close_fetcher(&f->list[i]); /* they end by themselves at the end of file */
    while (f->tasks) {
        struct task *t = f->tasks;
        f->tasks = t->next;
        task_free(h, t);
    }
    free(f);
    h->fetchers = NULL;
}

void fetchers_tick(struct holder *h, int64_t now_ns)
{
    struct fetchers *f = h->fetchers;
    cleanup_error struct vm_error *err = NULL;
    if (now_ns >= f->start_at_ns && !is_keeping(f)) {
        f->start_at_ns = INT64_MAX;
        f->pause_ns = f->pause_ns * 2 > RESTART_MAX_NS ? RESTART_MAX_NS : f->pause_ns * 2;
        if (start_one(h, &err) < 0) {
            log_error("no fetcher can be started", "reason=%s", log_q(error_message(err)));
            f->start_at_ns = now_ns + f->pause_ns;
        }
    }
    for (struct task *t = f->tasks; t;) {
        if (!t->deadline_ns || t->deadline_ns > now_ns) {
            t = t->next;
            continue;
        }
        if (t->at)
            t->at->in_flight--;
        fail_task(h, t, VM_ERROR_TIMEOUT, "the repository did not answer in time");
        t = f->tasks; /* others may have gone with it */
    }
    send_waiting(h);
}

void fetchers_refresh(struct holder *h)
{
    h->fetchers->refreshing = true;
    h->fetchers->start_at_ns = 0;
    fetchers_tick(h, clock_mono_ns());
}

unsigned fetchers_connected(const struct holder *h, pid_t *ret_newest)
{
    unsigned n = 0;
    for (int i = 0; i < HOLDER_FETCHERS_MAX; i++)
        if (h->fetchers->list[i].ready && !h->fetchers->list[i].retiring) {
            n++;
            if (ret_newest)
                *ret_newest = h->fetchers->list[i].pid;
        }
    return n;
}

/* SPDX-License-Identifier: Apache-2.0 */
#include "agent/control.h"

#include "agent/attempt.h"
#include "agent/requests.h"
#include "base/acceptor.h"
#include "base/clock.h"
#include "base/io.h"
#include "base/log.h"
#include "proto/frame.h"

#include <errno.h>
#include <grp.h>
#include <poll.h>
#include <pthread.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#define HELLO_TIMEOUT_NS (10 * NSEC_PER_SEC)
#define WRITE_TIMEOUT_NS (30 * NSEC_PER_SEC)
#define SETTLE_TIMEOUT_NS (10 * NSEC_PER_SEC)
enum { SETTLE_STEP_MS = 100, BACKLOG = 64, READ_SIZE = 16384, GROUPS_MAX = 1024, VERSION_TEXT_MAX = 64 };

struct control_session {
    struct control *control;
    int fd;
    uid_t uid;
    char peer[CONTROL_WORD_MAX + 1]; /* host of the client; "": this one */
    struct frame_decoder decoder;
    struct cursor in; /* of `bytes`, what is not decoded yet */
    uint8_t bytes[READ_SIZE];
    int passed_fd; /* came with the request that is read or handled; -1 */
    bool gone; /* the client cannot be reached any more */
};

struct control_group {
    bool set;
    gid_t gid;
};

struct control {
    struct agent *agent;
    int fd;
    struct acceptor *acceptor;
    int stop_fd;
    struct control_group drivers, publishers;
    pthread_mutex_t lock; /* guards what follows */
    pthread_cond_t ended;
    unsigned n_sessions;
};

struct agent *control_agent(struct control_session *s)
{
    return s->control->agent;
}

int control_take_fd(struct control_session *s)
{
    return steal_fd(&s->passed_fd);
}

uid_t control_peer_uid(const struct control_session *s)
{
    return s->uid;
}

bool control_peer_is_owner(const struct control_session *s)
{
    return s->uid == 0 || s->uid == geteuid();
}

int control_stop_fd(const struct control_session *s)
{
    return s->control->stop_fd;
}

int control_reply(struct control_session *s, unsigned type, const ProtobufCMessage *message,
                  struct vm_error **err)
{
    cleanup_buffer struct buffer out = {0};
    if (control_check(type, message, err) < 0 || frame_put_message(&out, type, message, err) < 0)
        return -1;
    if (io_write_full(s->fd, out.data, out.len, clock_mono_ns() + WRITE_TIMEOUT_NS, -1, err) < 0) {
        s->gone = true;
        return -1;
    }
    return 0;
}

static void reply_error(struct control_session *s, const struct vm_error *error)
{
    char kind[CONTROL_WORD_MAX + 1], text[CONTROL_TEXT_MAX + 1];
    Vmmig__Control__Error m = VMMIG__CONTROL__ERROR__INIT;
    snprintf(kind, sizeof(kind), "%s", error_kind_name(error->kind));
    snprintf(text, sizeof(text), "%s", error_message(error));
    field_make_text(text, CONTROL_TEXT_MAX);
    m.kind = kind;
    m.message = text;
    cleanup_error struct vm_error *ignored = NULL;
    control_reply(s, VMMIG__CONTROL__TYPE__ERROR, &m.base, &ignored);
}

/* Some bytes, and a descriptor if one came with them. */
static ssize_t read_some(struct control_session *s, int64_t deadline_ns, struct vm_error **err)
{
    int fd = -1, n_fds = 0;
    if (io_wait(s->fd, POLLIN, deadline_ns, s->control->stop_fd, err) < 0)
        return -1;
    ssize_t n = io_recv_fds(s->fd, s->bytes, sizeof(s->bytes), &fd, 1, &n_fds, err);
    if (n >= 0 && n_fds) {
        close_fd(&s->passed_fd);
        s->passed_fd = fd;
    }
    return n;
}

/* The next frame. 1, 0 at a proper end of the stream, -1. */
static int read_frame(struct control_session *s, struct frame *ret, int64_t deadline_ns,
                      struct vm_error **err)
{
    for (;;) {
        int r = frame_decode(&s->decoder, &s->in, ret, err);
        if (r)
            return r;
        ssize_t n = read_some(s, deadline_ns, err);
        if (n < 0)
            return -1;
        if (n == 0 && frame_decoder_is_idle(&s->decoder))
            return 0;
        if (n == 0)
            return error_set(err, VM_ERROR_PROTOCOL,
                             "the client closed in the middle of a message");
        s->in = cursor_init(s->bytes, (size_t)n);
    }
}

static int check_host(const struct control_session *s, const Vmmig__Control__Hello *m, struct vm_error **err)
{
    if (*s->peer && !config_obeys(s->control->agent->config, s->peer))
        return error_set(err, VM_ERROR_DENIED,
                         "host %s may not drive this agent: it is no control-peer in the configuration here", s->peer);
    if (*s->peer && *m->agent)
        return error_set(err, VM_ERROR_DENIED, "an agent passes on what is said on its own host only");
    if (*m->agent && !control_peer_is_owner(s))
        return error_set(err, VM_ERROR_DENIED, "the agents of other hosts are for root to drive");
    return 0;
}

/* What follows is said to another agent. 0 when that is over. */
static int pass_on(struct control_session *s, Vmmig__Control__Hello *m, struct vm_error **err)
{
    struct agent *agent = control_agent(s);
    cleanup_free char *to = strdup(m->agent);
    cleanup_buffer struct buffer hello = {0};
    if (!to)
        return error_nomem(err);
    int64_t deadline = clock_mono_ns() + (int64_t)agent->config->connect_timeout_ms * NSEC_PER_MSEC;
    CLEANUP(conn)
    struct conn *conn =
        conn_dial(agent->transfer->context, to, CONN_AGENT, deadline, s->control->stop_fd, err);
    if (!conn)
        return -1;
    *m->agent = 0;
    if (frame_put_message(&hello, VMMIG__CONTROL__TYPE__HELLO, &m->base, err) < 0 ||
        conn_write_full(conn, hello.data, hello.len, deadline, s->control->stop_fd, err) < 0)
        return -1;
    log_info("a client drives another agent", "agent=%s uid=%u", log_q(to), s->uid);
    /* Whatever ends it, the client may have half an answer: nothing more is said. */
    cleanup_error struct vm_error *lost = NULL;
    if (conn_relay(conn, s->fd, s->control->stop_fd, &lost) < 0)
        log_warn("the other agent was lost", "agent=%s error=%s", log_q(to), log_q(error_message(lost)));
    return 0;
}

/* HELLO and its answer; 0 at an end of the stream before anything was said. */
static int greet(struct control_session *s, struct vm_error **err)
{
    struct frame frame;
    cleanup_control_message struct control_message m = {0};
    int r = read_frame(s, &frame, clock_mono_ns() + HELLO_TIMEOUT_NS, err);
    if (r <= 0)
        return r;
    if (control_unpack(frame.type, frame.data, frame.len, &m, err) < 0)
        return -1;
    if (m.type != VMMIG__CONTROL__TYPE__HELLO)
        return error_set(err, VM_ERROR_PROTOCOL, "HELLO is expected first, not %s",
                         control_type_name(m.type));
    unsigned version = control_version_choose(m.hello);
    if (!version)
        return error_set(err, VM_ERROR_VERSION,
                         "this agent speaks versions %d to %d of the control protocol, the client "
                         "%u to %u",
                         CONTROL_VERSION_MIN, CONTROL_VERSION_MAX, m.hello->version_min,
                         m.hello->version_max);
    if (check_host(s, m.hello, err) < 0)
        return -1;
    if (*m.hello->agent)
        return pass_on(s, m.hello, err);
    char software[] = "vmmig " VMMIG_VERSION;
    Vmmig__Control__Welcome w = VMMIG__CONTROL__WELCOME__INIT;
    w.version = version;
    w.software = software;
    w.host = control_agent(s)->config->host;
    return control_reply(s, VMMIG__CONTROL__TYPE__WELCOME, &w.base, err) < 0 ? -1 : 1;
}

/* One request. -1: the connection cannot go on; the client was told if *err was set. */
static int serve_one(struct control_session *s, const struct frame *frame, struct vm_error **err)
{
    cleanup_control_message struct control_message m = {0};
    cleanup_error struct vm_error *failure = NULL;
    if (control_unpack(frame->type, frame->data, frame->len, &m, &failure) < 0) {
        if (failure->kind != VM_ERROR_VERSION)
            return error_propagate(err, steal_ptr(&failure));
    } else if (!control_type_is_request(m.type) || m.type == VMMIG__CONTROL__TYPE__HELLO) {
        return error_set(err, VM_ERROR_PROTOCOL, "%s is not a request", control_type_name(m.type));
    } else if (request_handle(s, &m, &failure) == 0) {
        return s->gone ? -1 : 0;
    }
    if (!s->gone && failure)
        reply_error(s, failure);
    return s->gone ? -1 : 0;
}

/* A new agent answers when it has asked its VMs, so that its users find them as they are. */
static void wait_for_registry(const struct control_session *s)
{
    const struct control *c = s->control;
    int64_t deadline = clock_mono_ns() + SETTLE_TIMEOUT_NS;
    while (!vms_settle(c->agent->vms, SETTLE_STEP_MS) && !io_latch_is_set(c->stop_fd) && clock_mono_ns() < deadline)
        ;
}

static void serve(struct control_session *s)
{
    cleanup_error struct vm_error *err = NULL;
    struct frame frame;
    int r = greet(s, &err);
    if (r > 0)
        wait_for_registry(s);
    while (r > 0) {
        r = read_frame(s, &frame, INT64_MAX, &err);
        if (r > 0 && serve_one(s, &frame, &err) < 0)
            r = -1;
        close_fd(&s->passed_fd);
    }
    if (r == 0 || !err || s->gone)
        return;
    if (err->kind == VM_ERROR_CANCELLED) {
        error_clear(&err);
        error_set(&err, VM_ERROR_UNREACHABLE, "the agent is stopping");
    } else {
        log_warn("control connection closed", "uid=%u reason=%s", s->uid,
                 log_q(error_message(err)));
    }
    reply_error(s, err);
}

static void *session_thread(void *arg)
{
    struct control_session *s = arg;
    struct control *c = s->control;
    serve(s);
    frame_decoder_finish(&s->decoder);
    close_fd(&s->passed_fd);
    close_fd(&s->fd);
    free(s);
    pthread_mutex_lock(&c->lock);
    c->n_sessions--;
    pthread_cond_broadcast(&c->ended);
    pthread_mutex_unlock(&c->lock);
    return NULL;
}

static bool is_in_group(int fd, gid_t primary, gid_t group)
{
    gid_t groups[GROUPS_MAX];
    socklen_t size = sizeof(groups);
    if (primary == group)
        return true;
    if (getsockopt(fd, SOL_SOCKET, SO_PEERGROUPS, groups, &size) < 0)
        return false;
    for (size_t i = 0; i < size / sizeof(*groups); i++)
        if (groups[i] == group)
            return true;
    return false;
}

static int check_peer(const struct control *c, int fd, uid_t *ret_uid, struct vm_error **err)
{
    struct ucred peer;
    socklen_t size = sizeof(peer);
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) < 0)
        return error_errno(err, errno, "cannot tell who connects");
    *ret_uid = peer.uid;
    if (peer.uid == 0 || peer.uid == geteuid() ||
        (c->drivers.set && is_in_group(fd, peer.gid, c->drivers.gid)))
        return 0;
    return error_set(
        err, VM_ERROR_DENIED,
        "user %u may not drive this agent; ask to be made a member of its control-group", peer.uid);
}

int control_check_publisher(struct control_session *s, struct vm_error **err)
{
    const struct control *c = s->control;
    struct ucred peer;
    socklen_t size = sizeof(peer);
    if (!c->publishers.set)
        return 0;
    if (getsockopt(s->fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) < 0)
        return error_errno(err, errno, "cannot tell who asks");
    if (peer.uid == 0 || peer.uid == geteuid() || is_in_group(s->fd, peer.gid, c->publishers.gid))
        return 0;
    return error_set(err, VM_ERROR_DENIED, "user %u may not do this; ask to be made a member of group %s", peer.uid,
                     c->agent->config->publish_group);
}

/* One place among the sessions, if there is one. Others cannot keep root from a `cancel` or `resolve`. */
static int take_place(struct control *c, uid_t uid, struct vm_error **err)
{
    SCOPE_LOCK(&c->lock);
    if (c->n_sessions >= c->agent->config->max_clients + (uid == 0 ? CONTROL_PLACES_OF_ROOT : 0))
        return error_set(err, VM_ERROR_CONFLICT,
                         "the agent talks to %u clients already (max-clients); try again",
                         c->n_sessions);
    c->n_sessions++;
    return 0;
}

static int start_thread(struct control_session *s, struct vm_error **err)
{
    pthread_t thread;
    pthread_attr_t detached;
    pthread_attr_init(&detached);
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    int failed = pthread_create(&thread, &detached, session_thread, s);
    pthread_attr_destroy(&detached);
    return failed ? error_errno(err, failed, "cannot start a thread") : 0;
}

static void admit(struct control_session *s)
{
    struct control *c = s->control;
    cleanup_error struct vm_error *err = NULL;
    if (check_peer(c, s->fd, &s->uid, &err) == 0 && take_place(c, s->uid, &err) == 0) {
        if (start_thread(s, &err) == 0)
            return;
        pthread_mutex_lock(&c->lock);
        c->n_sessions--;
        pthread_mutex_unlock(&c->lock);
    }
    log_warn("control connection refused", "uid=%u reason=%s", s->uid, log_q(error_message(err)));
    reply_error(s, err);
    close_fd(&s->fd);
    free(s);
}

/* Takes fd over, also on failure. */
static struct control_session *new_session(struct control *c, int client)
{
    cleanup_close int fd = client;
    struct control_session *s = calloc(1, sizeof(*s));
    if (!s)
        return NULL;
    s->control = c;
    s->fd = steal_fd(&fd);
    s->passed_fd = -1;
    s->in = cursor_init(s->bytes, 0);
    return s;
}

static void on_connection(int client, void *arg)
{
    struct control_session *s = new_session(arg, client);
    if (s)
        admit(s);
}

void control_serve_peer(struct control *c, struct conn *conn, int stop_fd)
{
    int ends[2];
    cleanup_error struct vm_error *err = NULL;
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) < 0) {
        log_warn("no socket for the client of another host", "errno=%d", errno);
        return;
    }
    cleanup_close int near = ends[0];
    struct control_session *s = new_session(c, ends[1]);
    if (!s)
        return;
    snprintf(s->peer, sizeof(s->peer), "%s", conn_peer_name(conn));
    log_info("a client of another host", "peer=%s", log_q(s->peer));
    admit(s);
    if (conn_relay(conn, near, stop_fd, &err) < 0)
        log_warn("the client of another host was lost", "error=%s", log_q(error_message(err)));
}

/* A file that nobody listens at may go. */
static int remove_stale_socket(const struct sockaddr_un *address, struct vm_error **err)
{
    cleanup_close int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return error_errno(err, errno, "socket");
    if (connect(fd, (const struct sockaddr *)address, sizeof(*address)) == 0)
        return error_set(err, VM_ERROR_CONFLICT, "another agent answers on %s", address->sun_path);
    if (errno == ENOENT)
        return 0;
    if (errno != ECONNREFUSED || unlink(address->sun_path) < 0)
        return error_errno(err, errno, "cannot replace %s", address->sun_path);
    return 0;
}

/* Looked up once, by the thread that starts: the C library's answer is not for several. */
static int find_group(const char *key, const char *name, struct control_group *ret, struct vm_error **err)
{
    *ret = (struct control_group){.set = *name};
    const struct group *group = *name ? getgrnam(name) : NULL;
    if (*name && !group)
        return error_set(err, VM_ERROR_NOT_FOUND, "%s: there is no group named %s", key, name);
    if (group)
        ret->gid = group->gr_gid;
    return 0;
}

static int set_access(struct control *c, const char *path, struct vm_error **err)
{
    const struct config *config = c->agent->config;
    if (find_group("control-group", config->control_group, &c->drivers, err) < 0 ||
        find_group("publish-group", config->publish_group, &c->publishers, err) < 0)
        return -1;
    /* Else 0600, from the umask at bind. */
    if (c->drivers.set && (chown(path, (uid_t)-1, c->drivers.gid) < 0 || chmod(path, 0660) < 0))
        return error_errno(err, errno, "cannot give %s to group %s", path, config->control_group);
    return 0;
}

static int open_socket(struct control *c, struct vm_error **err)
{
    const char *path = c->agent->config->control_socket;
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof(address.sun_path), "%s", path);
    if (remove_stale_socket(&address, err) < 0)
        return -1;
    c->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (c->fd < 0)
        return error_errno(err, errno, "socket");
    mode_t before = umask(0177);
    int bound = bind(c->fd, (struct sockaddr *)&address, sizeof(address));
    umask(before);
    if (bound < 0) {
        error_errno(err, errno, "cannot make the control socket %s", path);
        close_fd(&c->fd); /* the file there is not ours to remove */
        return -1;
    }
    if (set_access(c, path, err) < 0)
        return -1;
    if (listen(c->fd, BACKLOG) < 0)
        return error_errno(err, errno, "cannot listen on %s", path);
    return 0;
}

struct control *control_start(struct agent *agent, struct vm_error **err)
{
    CLEANUP(control) struct control *c = calloc(1, sizeof(*c));
    if (!c) {
        error_nomem(err);
        return NULL;
    }
    c->agent = agent;
    c->fd = c->stop_fd = -1;
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&c->ended, &monotonic);
    pthread_condattr_destroy(&monotonic);
    pthread_mutex_init(&c->lock, NULL);
    c->stop_fd = io_latch_new(err);
    if (c->stop_fd < 0 || open_socket(c, err) < 0)
        return NULL;
    c->acceptor = acceptor_create(agent->loop, c->fd, on_connection, c, err);
    return c->acceptor ? steal_ptr(&c) : NULL;
}

bool control_stop(struct control *c, int timeout_ms)
{
    int64_t deadline = clock_mono_ns() + timeout_ms * NSEC_PER_MSEC;
    struct timespec until = {deadline / NSEC_PER_SEC, deadline % NSEC_PER_SEC};
    acceptor_destroy(steal_ptr(&c->acceptor));
    io_latch_set(c->stop_fd);
    SCOPE_LOCK(&c->lock);
    while (c->n_sessions)
        if (pthread_cond_timedwait(&c->ended, &c->lock, &until))
            break;
    return !c->n_sessions;
}

void control_destroy(struct control *c)
{
    if (!c)
        return;
    acceptor_destroy(c->acceptor);
    if (c->fd >= 0)
        unlink(c->agent->config->control_socket);
    close_fd(&c->fd);
    close_fd(&c->stop_fd);
    pthread_cond_destroy(&c->ended);
    pthread_mutex_destroy(&c->lock);
    free(c);
}

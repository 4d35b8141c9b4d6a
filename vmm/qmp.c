/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/qmp.h"

#include "base/bytes.h"
#include "base/clock.h"
#include "base/fault.h"
#include "base/io.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>

enum { READ_CHUNK = 4096, REPLY_ERROR_TEXT_MAX = 1024 };

/* A command that waits for its reply; on the stack of its caller. */
struct waiter {
    json_int_t id;
    json_t *reply; /* the whole message; NULL until it is there */
    struct waiter *next;
};

struct qmp {
    int fd;
    char *name; /* of the socket, for errors */
    struct qmp_version version;
    qmp_event_fn *on_event;
    void *event_arg;
    pthread_t reader;

    pthread_mutex_t write_lock; /* one command goes out at a time */
    pthread_mutex_t fd_lock;    /* one descriptor is under way at a time; taken before write_lock */

    pthread_mutex_t lock; /* all below; taken last */
    pthread_cond_t changed;
    bool greeted;
    struct vm_error *closed; /* why the connection ended; NULL while it lives */
    json_int_t next_id;
    struct waiter *waiters;
};

const char *qmp_string(const json_t *j, const char *key)
{
    const char *s = json_string_value(json_object_get(j, key));
    return s ? s : "";
}

json_int_t qmp_integer(const json_t *j, const char *key)
{
    return json_integer_value(json_object_get(j, key));
}

bool qmp_bool(const json_t *j, const char *key)
{
    return json_is_true(json_object_get(j, key));
}

/* The connection is over; the first reason stays. Takes `why`. */
static void close_with(struct qmp *q, struct vm_error *why)
{
    shutdown(q->fd, SHUT_RDWR);
    SCOPE_LOCK(&q->lock);
    if (q->closed)
        error_free(why);
    else
        q->closed = why;
    pthread_cond_broadcast(&q->changed);
}

/* Under q->lock. */
static int closed_error(struct qmp *q, struct vm_error **err)
{
    return error_propagate(err, error_copy(q->closed));
}

/* The reader's side. */

static int take_greeting(struct qmp *q, const json_t *message, struct vm_error **err)
{
    const json_t *greeting = json_object_get(message, "QMP");
    const json_t *version = json_object_get(greeting, "version");
    const json_t *numbers = json_object_get(version, "qemu");
    if (!json_is_object(numbers))
        return error_set(err, VM_ERROR_PROTOCOL, "%s does not speak QMP: no greeting", q->name);
    SCOPE_LOCK(&q->lock);
    q->version.major = (int)qmp_integer(numbers, "major");
    q->version.minor = (int)qmp_integer(numbers, "minor");
    q->version.micro = (int)qmp_integer(numbers, "micro");
    snprintf(q->version.package, sizeof(q->version.package), "%s", qmp_string(version, "package"));
    q->greeted = true;
    pthread_cond_broadcast(&q->changed);
    return 0;
}

/* The reply changes hands: jansson's reference counts are not for two threads. */
static void take_reply(struct qmp *q, json_t **message)
{
    json_int_t id = qmp_integer(*message, "id");
    SCOPE_LOCK(&q->lock);
    for (struct waiter *w = q->waiters; w; w = w->next)
        if (w->id == id && !w->reply) {
            w->reply = steal_ptr(message);
            pthread_cond_broadcast(&q->changed);
            return;
        }
}

static int64_t event_time_ns(const json_t *stamp)
{
    int64_t now = clock_mono_ns();
    json_int_t seconds = qmp_integer(stamp, "seconds"), microseconds = qmp_integer(stamp, "microseconds");
    if (seconds < 0 || seconds >= INT64_MAX / NSEC_PER_SEC || microseconds < 0 || microseconds > 999999)
        return now;
    int64_t age = clock_wall_ns() - (seconds * NSEC_PER_SEC + microseconds * NSEC_PER_USEC);
    return age >= 0 && age <= QMP_EVENT_AGE_MAX_NS ? now - age : now;
}

static int take_line(struct qmp *q, const char *line, size_t n, struct vm_error **err)
{
    json_error_t where;
    CLEANUP(json) json_t *message = json_loadb(line, n, 0, &where);
    if (!json_is_object(message))
        return error_set(err, VM_ERROR_PROTOCOL, "%s does not speak QMP: malformed JSON", q->name);
    const char *event = json_string_value(json_object_get(message, "event"));
    /* A QEMU that starts can send an event before it greets. */
    if (!q->greeted && !event)
        return take_greeting(q, message, err);
    if (event) {
        if (q->on_event)
            q->on_event(event, json_object_get(message, "data"),
                        event_time_ns(json_object_get(message, "timestamp")), q->event_arg);
        return 0;
    }
    if (!json_object_get(message, "return") && !json_is_object(json_object_get(message, "error")))
        return error_set(err, VM_ERROR_PROTOCOL,
                         "%s does not speak QMP: neither event, return nor error", q->name);
    take_reply(q, &message);
    return 0;
}

/* Every whole line of the buffer. `scanned`: the bytes in which there is no newline. */
static int take_lines(struct qmp *q, struct buffer *in, size_t *scanned, struct vm_error **err)
{
    size_t begin = 0;
    for (;;) {
        uint8_t *newline = memchr(in->data + *scanned, '\n', in->len - *scanned);
        if (!newline)
            break;
        size_t n = (size_t)(newline - in->data) - begin;
        const char *line = (const char *)in->data + begin;
        begin = *scanned = begin + n + 1;
        if (strspn(line, " \t\r") < n && take_line(q, line, n, err) < 0)
            return -1;
    }
    buffer_consume(in, begin);
    *scanned = in->len;
    return 0;
}

static int read_messages(struct qmp *q, struct vm_error **err)
{
    cleanup_buffer struct buffer in = {.limit = QMP_LINE_MAX};
    size_t scanned = 0;
    for (;;) {
        uint8_t *to = buffer_grow(&in, READ_CHUNK);
        if (!to)
            return error_set(err, VM_ERROR_PROTOCOL, "%s sent a line of more than %u bytes",
                             q->name, QMP_LINE_MAX);
        ssize_t n = io_read_some(q->fd, to, READ_CHUNK, INT64_MAX, -1, err);
        in.len -= READ_CHUNK - (size_t)(n > 0 ? n : 0);
        if (n < 0 && (*err)->sys_errno == ECONNRESET) { /* it was killed, and had more to read */
            error_clear(err);
            n = 0;
        }
        if (n < 0)
            return error_wrap(err, "%s", q->name);
        if (n == 0)
            return error_set(err, VM_ERROR_VMM_DIED, "%s: QEMU closed the connection", q->name);
        if (take_lines(q, &in, &scanned, err) < 0)
            return -1;
    }
}

static void *reader_main(void *arg)
{
    struct qmp *q = arg;
    struct vm_error *why = NULL;
    read_messages(q, &why);
    if (why->kind == VM_ERROR_UNREACHABLE || why->kind == VM_ERROR_SYSTEM)
        error_set_kind(&why, VM_ERROR_VMM_DIED);
    close_with(q, why);
    if (q->on_event)
        q->on_event(NULL, NULL, clock_mono_ns(), q->event_arg);
    return NULL;
}

/* The callers' side. */

static void init_locks(struct qmp *q)
{
    pthread_mutex_init(&q->write_lock, NULL);
    pthread_mutex_init(&q->fd_lock, NULL);
    pthread_mutex_init(&q->lock, NULL);
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&q->changed, &attr);
    pthread_condattr_destroy(&attr);
}

static void finish_locks(struct qmp *q)
{
    pthread_cond_destroy(&q->changed);
    pthread_mutex_destroy(&q->lock);
    pthread_mutex_destroy(&q->fd_lock);
    pthread_mutex_destroy(&q->write_lock);
}

/* Under q->lock: false when the deadline passed. */
static bool wait_changed(struct qmp *q, int64_t deadline_ns)
{
    struct timespec at = {deadline_ns / NSEC_PER_SEC, deadline_ns % NSEC_PER_SEC};
    return pthread_cond_timedwait(&q->changed, &q->lock, &at) != ETIMEDOUT;
}

static int wait_greeting(struct qmp *q, int64_t deadline_ns, struct vm_error **err)
{
    SCOPE_LOCK(&q->lock);
    while (!q->greeted && !q->closed)
        if (!wait_changed(q, deadline_ns) && !q->greeted && !q->closed)
            return error_set(err, VM_ERROR_TIMEOUT,
                             "%s does not greet: not QMP, or another client holds this monitor",
                             q->name);
    return q->closed ? closed_error(q, err) : 0;
}

static int send_command(struct qmp *q, const char *text, size_t n, int fd, int64_t deadline_ns,
                        struct vm_error **err)
{
    SCOPE_LOCK(&q->write_lock);
    /* The descriptor goes with the first byte, since QEMU forgets it with the next byte read. */
    if (fd >= 0) {
        if (io_send_fds(q->fd, text, n, &fd, 1, err) < 0)
            return -1;
        return 0;
    }
    return io_write_full(q->fd, text, n, deadline_ns, -1, err);
}

static void forget_waiter(struct qmp *q, const struct waiter *gone)
{
    for (struct waiter **w = &q->waiters; *w; w = &(*w)->next)
        if (*w == gone) {
            *w = gone->next;
            return;
        }
}

/* Put the command on the wire. A failed write ends the connection: half a command may be out. */
static int post(struct qmp *q, struct waiter *w, const char *command, json_t *args, int fd,
                int64_t deadline_ns, struct vm_error **err)
{
    CLEANUP(json) json_t *owned = args;
    {
        SCOPE_LOCK(&q->lock);
        if (q->closed)
            return closed_error(q, err);
        w->id = ++q->next_id;
        w->next = q->waiters;
        q->waiters = w;
    }
    CLEANUP(json) json_t *message = json_pack("{s:s, s:I}", "execute", command, "id", w->id);
    if (message && owned && json_object_set(message, "arguments", owned) < 0)
        return error_nomem(err);
    cleanup_free char *text = message ? json_dumps(message, JSON_COMPACT) : NULL;
    if (!text)
        return error_nomem(err);
    size_t n = strlen(text);
    text[n] = '\n'; /* in the place of the NUL */
    struct vm_error *failed = NULL;
    if (send_command(q, text, n + 1, fd, deadline_ns, &failed) == 0)
        return 0;
    if (failed->kind != VM_ERROR_TIMEOUT)
        error_set_kind(&failed, VM_ERROR_VMM_DIED);
    error_wrap(&failed, "%s: cannot send %s", q->name, command);
    close_with(q, error_copy(failed));
    return error_propagate(err, failed);
}

static int wait_reply(struct qmp *q, struct waiter *w, const char *command, int64_t deadline_ns,
                      struct vm_error **err)
{
    SCOPE_LOCK(&q->lock);
    while (!w->reply && !q->closed)
        if (!wait_changed(q, deadline_ns) && !w->reply && !q->closed)
            return error_set(err, VM_ERROR_TIMEOUT, "%s: QEMU did not answer %s in time", q->name,
                             command);
    return w->reply ? 0 : closed_error(q, err);
}

/* An error is one line, whatever QEMU says. */
static void copy_line(char out[REPLY_ERROR_TEXT_MAX], const char *text)
{
    snprintf(out, REPLY_ERROR_TEXT_MAX, "%s", text);
    for (char *c = out; *c; c++)
        if ((unsigned char)*c < ' ' || *c == 0x7f)
            *c = ' ';
}

static int read_reply(const char *command, json_t *reply, json_t **ret, struct vm_error **err)
{
    const json_t *failed = json_object_get(reply, "error");
    if (failed) {
        char desc[REPLY_ERROR_TEXT_MAX], class[REPLY_ERROR_TEXT_MAX];
        copy_line(desc, qmp_string(failed, "desc"));
        copy_line(class, qmp_string(failed, "class"));
        return error_set(err, VM_ERROR_REFUSED, "QEMU refuses %s: %s (%s)", command, desc, class);
    }
    if (ret)
        *ret = json_incref(json_object_get(reply, "return"));
    return 0;
}

/* Fault points of the commands that matter, "qmp.cont", and of their answers, "qmp.cont.answer". */
#define FAULT_COMMANDS(X)                                                                          \
    X("stop")                                                                                      \
    X("cont")                                                                                      \
    X("migrate")                                                                                   \
    X("migrate_cancel")                                                                            \
    X("migrate-incoming")                                                                          \
    X("query-status")                                                                              \
    X("quit")

/* REFUSED, as QEMU would. */
static int fault_command(const char *command, struct vm_error **err)
{
#define X(name)                                                                                    \
    if (!strcmp(command, name) && FAULT("qmp." name) == FAULT_ERROR)                               \
        return error_set(err, VM_ERROR_REFUSED, "qmp." name ": %s", strerror(fault_errno()));
    FAULT_COMMANDS(X)
#undef X
    (void)command;
    (void)err;
    return 0;
}

static int fault_malformed(struct qmp *q, const char *command, struct vm_error **err)
{
    struct vm_error *why = NULL;
    error_set(&why, VM_ERROR_PROTOCOL, "qmp.%s: the answer is malformed", command);
    close_with(q, error_copy(why));
    return error_propagate(err, why);
}

/* The command has an effect, its answer is lost, or (corrupt) such that the connection ends. */
static int fault_answer(struct qmp *q, const char *command, struct vm_error **err)
{
#define X(name)                                                                                    \
    if (!strcmp(command, name)) {                                                                  \
        enum fault_result fault = FAULT("qmp." name ".answer");                                    \
        if (fault == FAULT_ERROR || fault == FAULT_DROP)                                           \
            return error_set(err, VM_ERROR_TIMEOUT, "qmp." name ": the answer was lost");          \
        if (fault == FAULT_CORRUPT)                                                                \
            return fault_malformed(q, command, err);                                               \
    }
    FAULT_COMMANDS(X)
#undef X
    (void)q;
    (void)command;
    (void)err;
    return 0;
}

static int execute(struct qmp *q, const char *command, json_t *args, int fd, int timeout_ms,
                   json_t **ret, struct vm_error **err)
{
    int64_t deadline_ns = clock_mono_ns() + timeout_ms * NSEC_PER_MSEC;
    struct waiter w = {0};
    if (fault_command(command, err) < 0) {
        json_decref(args);
        return -1;
    }
    int rc = post(q, &w, command, args, fd, deadline_ns, err);
    if (rc == 0)
        rc = wait_reply(q, &w, command, deadline_ns, err);
    {
        SCOPE_LOCK(&q->lock);
        forget_waiter(q, &w);
    }
    CLEANUP(json) json_t *reply = w.reply;
    if (rc < 0 || fault_answer(q, command, err) < 0)
        return -1;
    return read_reply(command, reply, ret, err);
}

int qmp_execute(struct qmp *q, const char *command, json_t *args, int timeout_ms, json_t **ret,
                struct vm_error **err)
{
    return execute(q, command, args, -1, timeout_ms, ret, err);
}

int qmp_execute_fd(struct qmp *q, const char *command, json_t *args, int fd, int timeout_ms,
                   json_t **ret, struct vm_error **err)
{
    SCOPE_LOCK(&q->fd_lock);
    return execute(q, command, args, fd, timeout_ms, ret, err);
}

/* Opening and closing. */

static int start_reader(struct qmp *q, struct vm_error **err)
{
    int rc = pthread_create(&q->reader, NULL, reader_main, q);
    return rc ? error_errno(err, rc, "cannot start a thread for %s", q->name) : 0;
}

static struct qmp *new_qmp(int fd, const char *name, qmp_event_fn *on_event, void *arg,
                           struct vm_error **err)
{
    cleanup_close int owned = fd;
    struct qmp *q = calloc(1, sizeof(*q));
    char *copy = strdup(name);
    if (!q || !copy) {
        free(q);
        free(copy);
        error_nomem(err);
        return NULL;
    }
    q->fd = steal_fd(&owned);
    q->name = copy;
    q->on_event = on_event;
    q->event_arg = arg;
    init_locks(q);
    return q;
}

static void free_qmp(struct qmp *q)
{
    finish_locks(q);
    close_fd(&q->fd);
    error_free(q->closed);
    free(q->name);
    free(q);
}

struct qmp *qmp_open(int fd, const char *name, int timeout_ms, qmp_event_fn *on_event, void *arg,
                     struct vm_error **err)
{
    int64_t deadline_ns = clock_mono_ns() + timeout_ms * NSEC_PER_MSEC;
    struct qmp *q = new_qmp(fd, name, on_event, arg, err);
    if (!q)
        return NULL;
    if (start_reader(q, err) < 0) {
        free_qmp(q);
        return NULL;
    }
    if (wait_greeting(q, deadline_ns, err) < 0 ||
        qmp_execute(q, "qmp_capabilities", NULL, clock_ms_until(deadline_ns) + 1, NULL, err) < 0) {
        qmp_destroy(q);
        return NULL;
    }
    return q;
}

void qmp_destroy(struct qmp *q)
{
    if (!q)
        return;
    struct vm_error *why = NULL;
    error_set(&why, VM_ERROR_CANCELLED, "%s: the connection was closed here", q->name);
    close_with(q, why);
    pthread_join(q->reader, NULL);
    free_qmp(q);
}

/* A name that does not fit into sun_path is reached through a descriptor of the file. */
static int fill_address(const char *path, struct sockaddr_un *address, int *ret_fd,
                        struct vm_error **err)
{
    *address = (struct sockaddr_un){.sun_family = AF_UNIX};
    if (strlen(path) < sizeof(address->sun_path)) {
        strcpy(address->sun_path, path);
        return 0;
    }
    int fd = open(path, O_PATH | O_CLOEXEC);
    if (fd < 0)
        return error_errno(err, errno, "cannot open the QMP socket %s", path);
    snprintf(address->sun_path, sizeof(address->sun_path), "/proc/self/fd/%d", fd);
    *ret_fd = fd;
    return 0;
}

/* Never waits longer than the deadline, although a full backlog blocks connect(2). */
static int connect_before(int fd, const struct sockaddr_un *address, int64_t deadline_ns)
{
    struct timeval limit = {.tv_usec = 1000};
    int ms = clock_ms_until(deadline_ns);
    if (ms > 0)
        limit = (struct timeval){ms / 1000, ms % 1000 * 1000};
    if (setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit)) < 0)
        return -1;
    if (connect(fd, (const struct sockaddr *)address, sizeof(*address)) < 0)
        return -1;
    limit = (struct timeval){0};
    return setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit));
}

struct qmp *qmp_connect(const char *path, int timeout_ms, qmp_event_fn *on_event, void *arg,
                        struct vm_error **err)
{
    int64_t deadline_ns = clock_mono_ns() + timeout_ms * NSEC_PER_MSEC;
    cleanup_close int path_fd = -1;
    struct sockaddr_un address;
    if (FAULT("qmp.connect") == FAULT_ERROR) {
        error_errno(err, fault_errno(), "cannot connect to the QMP socket %s", path);
        return NULL;
    }
    if (fill_address(path, &address, &path_fd, err) < 0)
        return NULL;
    cleanup_close int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0) {
        error_errno(err, errno, "cannot make a socket");
        return NULL;
    }
    if (connect_before(fd, &address, deadline_ns) < 0) {
        if (errno == EAGAIN)
            error_set(err, VM_ERROR_TIMEOUT, "%s: other clients wait for this monitor", path);
        else if (errno == EPROTOTYPE)
            error_set(err, VM_ERROR_REFUSED,
                      "%s is no QMP socket: a VMM that links libvmmig-attach may have it", path);
        else
            error_errno(err, errno, "cannot connect to the QMP socket %s", path);
        return NULL;
    }
    return qmp_open(steal_fd(&fd), path, clock_ms_until(deadline_ns) + 1, on_event, arg, err);
}

const struct qmp_version *qmp_version(const struct qmp *q)
{
    return &q->version;
}

int qmp_peer_pid(const struct qmp *q, pid_t *ret_pid, struct vm_error **err)
{
    struct ucred peer;
    socklen_t n = sizeof(peer);
    if (getsockopt(q->fd, SOL_SOCKET, SO_PEERCRED, &peer, &n) < 0)
        return error_errno(err, errno, "%s: cannot tell which process answers", q->name);
    if (peer.pid <= 0)
        return error_set(err, VM_ERROR_REFUSED,
                         "%s: the process behind it is in a pid namespace out of sight", q->name);
    *ret_pid = peer.pid;
    return 0;
}

bool qmp_is_closed(struct qmp *q)
{
    SCOPE_LOCK(&q->lock);
    return q->closed != NULL;
}

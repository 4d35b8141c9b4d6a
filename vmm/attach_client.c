/* SPDX-License-Identifier: Apache-2.0 */
#include "base/argv.h"
#include "base/fault.h"
#include "base/io.h"
#include "vmm/attach_private.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>

/*
 * Longer than the library lets a callback of the VMM take. To switch a dirty log on or off took 7
 * ms for each GiB, and to read it up to 12, where that protects pages anew, of which most are
 * seldom dirty: ten times 7 for a machine that has other things to do.
 */
enum { REQUEST_TIMEOUT_MS = 15000, LOG_TIMEOUT_MS_PER_GIB = 70 };

/* Kernels of 6.5 and later; libcs are behind. */
#ifndef SO_PEERPIDFD
#define SO_PEERPIDFD 77
#endif

int attach_client_patience_ms(struct attach_client *c, unsigned type)
{
    bool log = type == VMMIG__ATTACH__TYPE__TRACK || type == VMMIG__ATTACH__TYPE__UNTRACK ||
               type == VMMIG__ATTACH__TYPE__HARVEST;
    return REQUEST_TIMEOUT_MS + (log ? (int)(atomic_load(&c->memory) >> 30) * LOG_TIMEOUT_MS_PER_GIB : 0);
}

void attach_answer_finish(struct attach_answer *a)
{
    for (int i = 0; i < a->n_fds; i++)
        close_fd(&a->fds[i]);
    a->n_fds = 0;
    attach_message_finish(&a->message);
}

/* ---- Packets ---- */

static int send_packet(int fd, unsigned type, const ProtobufCMessage *message, int passed,
                       struct vm_error **err)
{
    cleanup_buffer struct buffer out = {0};
    if (attach_pack(type, message, &out, err) < 0)
        return -1;
    return io_send_fds(fd, out.data, out.len, &passed, passed >= 0, err);
}

static int receive_packet(int fd, int64_t deadline_ns, struct attach_answer *a,
                          struct vm_error **err)
{
    cleanup_free uint8_t *packet = malloc(ATTACH_PACKET_MAX);
    if (!packet)
        return error_nomem(err);
    if (io_wait(fd, POLLIN, deadline_ns, -1, err) < 0)
        return -1;
    ssize_t n = io_recv_fds(fd, packet, ATTACH_PACKET_MAX, a->fds, ATTACH_FDS_MAX, &a->n_fds, err);
    if (n < 0)
        return -1;
    if (!n)
        return error_set(err, VM_ERROR_UNREACHABLE, "the VMM closed the connection");
    return attach_unpack(packet, (size_t)n, &a->message, err);
}

/* The answer that was asked for, or the VMM's error as ours: 1, it made sense, and the connection
 * is as good as before. */
static int judge_answer(const struct attach_answer *a, unsigned expected, struct vm_error **err)
{
    if (a->message.type == expected)
        return 0;
    if (a->message.type != VMMIG__ATTACH__TYPE__ERROR) {
        error_set(err, VM_ERROR_PROTOCOL, "the VMM answered %s, not %s",
                  attach_type_name(a->message.type), attach_type_name(expected));
        return -1;
    }
    error_set(err, error_kind_parse(a->message.error->kind), "%s", a->message.error->message);
    return 1;
}

/* ---- Requests ---- */

/* Fault points "attach.send.PAUSE" and "attach.receive.PAUSE": as a request goes out, as its answer came in. */
static enum fault_result fault_send(unsigned type)
{
    switch (type) {
#define X(id)                                                                                      \
    case VMMIG__ATTACH__TYPE__##id:                                                                \
        return FAULT("attach.send." #id);
        ATTACH_REQUESTS(X)
#undef X
    default:
        return FAULT_NONE;
    }
}

static enum fault_result fault_receive(unsigned type)
{
    switch (type) {
#define X(id)                                                                                      \
    case VMMIG__ATTACH__TYPE__##id:                                                                \
        return FAULT("attach.receive." #id);
        ATTACH_REQUESTS(X)
#undef X
    default:
        return FAULT_NONE;
    }
}

static int break_connection(struct vm_error **err)
{
    return error_set(err, VM_ERROR_UNREACHABLE, "the connection to the VMM broke");
}

/* An answer belongs to the request before it: what came unasked would be taken for the next one's. */
static int check_silent(int fd, struct vm_error **err)
{
    char byte;
    if (recv(fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT) <= 0)
        return 0; /* nothing, or the end, which sending finds out */
    return error_set(err, VM_ERROR_PROTOCOL, "the VMM said something that it was not asked");
}

/* The answer, whatever it is. */
static int exchange(int fd, unsigned type, const ProtobufCMessage *message, int passed,
                    int64_t deadline_ns, struct attach_answer *a, struct vm_error **err)
{
    enum fault_result fault = fault_send(type);
    if (fault == FAULT_ERROR)
        return break_connection(err);
    if (check_silent(fd, err) < 0)
        return -1;
    for (int n = fault == FAULT_DROP ? 0 : fault == FAULT_DUPLICATE ? 2 : 1; n > 0; n--)
        if (send_packet(fd, type, message, passed, err) < 0)
            return -1;
    if (receive_packet(fd, deadline_ns, a, err) < 0)
        return -1;
    fault = fault_receive(type);
    if (fault == FAULT_ERROR)
        return break_connection(err);
    if (fault != FAULT_DROP)
        return 0;
    attach_answer_finish(a);
    return receive_packet(fd, deadline_ns, a, err);
}

/* ---- The connection ---- */

static int dial(const char *path, struct vm_error **err)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof(address.sun_path))
        return error_set(err, VM_ERROR_USAGE, "the socket's name is too long: %s", path);
    strcpy(address.sun_path, path);
    cleanup_close int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return error_errno(err, errno, "cannot make a socket");
    if (connect(fd, (const struct sockaddr *)&address, sizeof(address)) == 0)
        return steal_fd(&fd);
    if (errno != EPROTOTYPE)
        return error_errno(err, errno, "cannot connect to %s", path);
    error_errno(err, EPROTOTYPE, "%s is no socket of a VMM that links libvmmig-attach", path);
    return error_set_kind(err, VM_ERROR_REFUSED);
}

static void info_finish(struct attach_info *i)
{
    free(i->vmm);
    free(i->machine);
    free(i->tracking);
    free(i->incoming_argv);
    *i = (struct attach_info){0};
}

static int keep_info(struct attach_info *to, const Vmmig__Attach__Welcome *w, struct vm_error **err)
{
    struct attach_info i = {.vmm = strdup(w->vmm),
                            .machine = strdup(w->machine),
                            .tracking = strdup(w->tracking),
                            .n_vcpus = w->n_vcpus,
                            .takes_files = w->takes_files,
                            .state_bytes = w->state_bytes,
                            .populates = w->populates,
                            .incoming_argv = argv_copy(w->incoming_argv, w->n_incoming_argv)};
    if (!i.vmm || !i.machine || !i.tracking || !i.incoming_argv) {
        info_finish(&i);
        return error_nomem(err);
    }
    info_finish(to);
    *to = i;
    return 0;
}

int attach_check_listener(int fd, pid_t pid, uid_t uid, struct vm_error **err)
{
    uid_t user;
    cleanup_close int pidfd = -1;
    socklen_t n = sizeof(pidfd);
    if (fd >= 0 && getsockopt(fd, SOL_SOCKET, SO_PEERPIDFD, &pidfd, &n) == 0) {
        struct pollfd end = {.fd = pidfd, .events = POLLIN};
        if (poll(&end, 1, 0) == 0)
            return 0;
    } else if (fd < 0 || errno == ENOPROTOOPT) {
        /* A root's process may have become another user's since it listened. */
        if (process_user(pid, &user, err) < 0)
            return -1;
        if (!uid || user == uid)
            return 0;
    } else if (errno == EMFILE || errno == ENFILE) {
        return error_errno(err, errno, "cannot tell which process the VMM is");
    }
    return error_set(err, VM_ERROR_REFUSED,
                     "the process that listened here has ended, and %d is another's number now",
                     pid);
}

/* The process behind the socket, as the kernel knows it: that it still is that one is looked at last. */
static int identify(int fd, struct process_identity *ret, uid_t *ret_uid, struct vm_error **err)
{
    struct ucred peer;
    socklen_t n = sizeof(peer);
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &n) < 0)
        return error_errno(err, errno, "cannot tell which process the VMM is");
    if (peer.pid <= 0)
        return error_set(err, VM_ERROR_REFUSED,
                         "the VMM lives in a pid namespace that cannot be seen from here");
    *ret_uid = peer.uid;
    return process_identify(peer.pid, ret, err) < 0 ? -1 : attach_check_listener(fd, peer.pid, peer.uid, err);
}

static int greet(struct attach_client *c, int fd, int64_t deadline_ns, struct vm_error **err)
{
    static char software[] = "vmmig " VMMIG_VERSION;
    cleanup_attach_answer struct attach_answer a = {.n_fds = 0};
    struct process_identity process;
    uid_t uid = (uid_t)-1;
    Vmmig__Attach__Hello hello = VMMIG__ATTACH__HELLO__INIT;
    hello.version_min = ATTACH_VERSION_MIN;
    hello.version_max = ATTACH_VERSION_MAX;
    hello.software = software;
    if (identify(fd, &process, &uid, err) < 0 ||
        exchange(fd, VMMIG__ATTACH__TYPE__HELLO, &hello.base, -1, deadline_ns, &a, err) < 0 ||
        judge_answer(&a, VMMIG__ATTACH__TYPE__WELCOME, err) != 0)
        return -1;
    if (c->process.pid && !process_identity_equal(&c->process, &process))
        return error_set(err, VM_ERROR_VMM_DIED, "another VMM has the socket now");
    c->process = process;
    c->uid = uid;
    /* The same VMM says the same again; others may be reading it. */
    return c->info.vmm ? 0 : keep_info(&c->info, a.message.welcome, err);
}

static int connect_client(struct attach_client *c, int64_t deadline_ns, struct vm_error **err)
{
    cleanup_close int fd = dial(c->path, err);
    if (fd < 0)
        return -1;
    if (greet(c, fd, deadline_ns, err) < 0)
        return error_wrap(err, "%s", c->path);
    c->fd = steal_fd(&fd);
    return 0;
}

int attach_client_open(struct attach_client *c, const char *path, int timeout_ms,
                       struct vm_error **err)
{
    *c = (struct attach_client){.path = strdup(path), .fd = -1};
    pthread_mutex_init(&c->lock, NULL);
    if (c->path && connect_client(c, clock_mono_ns() + timeout_ms * NSEC_PER_MSEC, err) == 0)
        return 0;
    int failed = c->path ? -1 : error_nomem(err);
    attach_client_finish(c);
    return failed;
}

void attach_client_finish(struct attach_client *c)
{
    close_fd(&c->fd);
    info_finish(&c->info);
    free(c->path);
    pthread_mutex_destroy(&c->lock);
}

void attach_client_pin(struct attach_client *c, bool pinned)
{
    SCOPE_LOCK(&c->lock);
    c->pinned = pinned;
}

bool attach_client_connected(struct attach_client *c)
{
    SCOPE_LOCK(&c->lock);
    return c->fd >= 0;
}

/* ---- What others ask for ---- */

/* The connection is lost, or of no use any more: is it the VMM that ended? */
static int explain_loss(struct attach_client *c, struct vm_error **err)
{
    bool timed_out = err && *err && (*err)->kind == VM_ERROR_TIMEOUT;
    close_fd(&c->fd);
    if (process_has_ended(&c->process, timed_out ? 0 : GUEST_END_BEGINS_MS, GUEST_END_TIMEOUT_MS)) {
        error_clear(err);
        return error_set(err, VM_ERROR_VMM_DIED, "the VM's process %d ended", c->process.pid);
    }
    return timed_out ? error_wrap(err, "the VMM does not answer") : -1;
}

static int ensure_connected(struct attach_client *c, int64_t deadline_ns, struct vm_error **err)
{
    if (c->fd >= 0)
        return 0;
    if (!process_alive(&c->process))
        return error_set(err, VM_ERROR_VMM_DIED, "the VM's process %d ended", c->process.pid);
    if (c->pinned)
        return error_set(err, VM_ERROR_UNREACHABLE, "the connection to the VMM was lost");
    return connect_client(c, deadline_ns, err);
}

int attach_request(struct attach_client *c, unsigned type, const ProtobufCMessage *message, int fd,
                   unsigned expected, struct attach_answer *ret_answer, struct vm_error **err)
{
    cleanup_attach_answer struct attach_answer a = {.n_fds = 0};
    int64_t deadline = clock_mono_ns() + fault_patience_ns(attach_client_patience_ms(c, type));
    SCOPE_LOCK(&c->lock);
    if (ensure_connected(c, deadline, err) < 0)
        return -1;
    if (exchange(c->fd, type, message, fd, deadline, &a, err) < 0)
        return explain_loss(c, err);
    int judged = judge_answer(&a, expected, err);
    if (judged < 0)
        close_fd(&c->fd);
    if (judged != 0)
        return -1;
    if (ret_answer) {
        *ret_answer = a;
        a = (struct attach_answer){.n_fds = 0};
    }
    return 0;
}

int attach_order(struct attach_client *c, unsigned type, const ProtobufCMessage *message,
                 struct vm_error **err)
{
    return attach_request(c, type, message, -1, VMMIG__ATTACH__TYPE__OK, NULL, err);
}

/* SPDX-License-Identifier: Apache-2.0 */
/* The thread that serves agents: proto/attach.proto, V's side. */
#include "dirtylog/attach_internal.h"

#include "base/fault.h"
#include "base/io.h"
#include "proto/fields.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

/* After which a connection that could not be accepted is tried again. */
enum { ACCEPT_AGAIN_MS = 200 };

/* ---- The socket ---- */

static int new_socket(struct vm_error **err)
{
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        error_errno(err, errno, "cannot make a socket");
    return fd;
}

/* Remove a socket file behind which nobody listens any more. */
static int remove_stale(const struct sockaddr_un *address, struct vm_error **err)
{
    struct stat st;
    if (lstat(address->sun_path, &st) < 0)
        return 0;
    if (!S_ISSOCK(st.st_mode))
        return error_set(err, VM_ERROR_CONFLICT, "%s exists and is not a socket",
                         address->sun_path);
    cleanup_close int fd = new_socket(err);
    if (fd < 0)
        return -1;
    if (connect(fd, (const struct sockaddr *)address, sizeof(*address)) == 0 || errno != ECONNREFUSED)
        return error_set(err, VM_ERROR_CONFLICT, "another VM has the socket %s", address->sun_path);
    unlink(address->sun_path);
    return 0;
}

static bool is_inherited(const char *path)
{
    return !strncmp(path, VMMIG_SOCKET_FD, strlen(VMMIG_SOCKET_FD));
}

/* "fd:N". To listen at it, even if somebody did before, makes it this process's: agents see who listens. */
static int listen_inherited(const char *path, struct vm_error **err)
{
    char *end;
    const char *number = path + strlen(VMMIG_SOCKET_FD);
    long fd = strtol(number, &end, 10);
    int type = 0;
    socklen_t n = sizeof(type);
    struct sockaddr_un address = {.sun_family = AF_UNSPEC};
    socklen_t address_n = sizeof(address);
    if (end == number || *end || fd < 0 || fd > INT_MAX)
        return error_set(err, VM_ERROR_USAGE, "%s does not name a descriptor", path);
    if (getsockopt((int)fd, SOL_SOCKET, SO_TYPE, &type, &n) < 0 || type != SOCK_SEQPACKET ||
        getsockname((int)fd, (struct sockaddr *)&address, &address_n) < 0 ||
        address.sun_family != AF_UNIX)
        return error_set(err, VM_ERROR_USAGE, "%s is not a Unix socket for packets", path);
    if (io_set_nonblocking((int)fd, true, err) < 0)
        return -1;
    if (fcntl((int)fd, F_SETFD, FD_CLOEXEC) < 0 || listen((int)fd, ATTACH_CONNECTIONS_MAX) < 0)
        return error_errno(err, errno, "cannot listen at %s", path);
    return (int)fd;
}

static int listen_at(const char *path, struct vm_error **err)
{
    if (is_inherited(path))
        return listen_inherited(path, err);
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof(address.sun_path), "%s", path);
    cleanup_close int fd = new_socket(err);
    if (fd < 0 || remove_stale(&address, err) < 0)
        return -1;
    /* Bound with no permission for others from the first instant. */
    if (fchmod(fd, 0600) < 0 || bind(fd, (const struct sockaddr *)&address, sizeof(address)) < 0 ||
        listen(fd, ATTACH_CONNECTIONS_MAX) < 0)
        return error_errno(err, errno, "cannot listen at %s", path);
    return steal_fd(&fd);
}

/* ---- Fault points "library.receive.PAUSE" and "library.answer.PAUSE" ---- */

static enum fault_result fault_receive(unsigned type)
{
    switch (type) {
#define X(id)                                                                                      \
    case VMMIG__ATTACH__TYPE__##id:                                                                \
        return FAULT("library.receive." #id);
        ATTACH_REQUESTS(X)
#undef X
    default:
        return FAULT_NONE;
    }
}

static enum fault_result fault_answer(unsigned type)
{
    switch (type) {
#define X(id)                                                                                      \
    case VMMIG__ATTACH__TYPE__##id:                                                                \
        return FAULT("library.answer." #id);
        ATTACH_REQUESTS(X)
#undef X
    default:
        return FAULT_NONE;
    }
}

/* ---- Answers ---- */

static int answer_with_fds(struct attach_connection *c, unsigned type,
                           const ProtobufCMessage *message, const int *fds, int n_fds,
                           struct vm_error **err)
{
    cleanup_buffer struct buffer out = {0};
    if (attach_pack(type, message, &out, err) < 0)
        return -1;
    enum fault_result fault = fault_answer(c->request);
    if (fault == FAULT_ERROR)
        shutdown(c->fd, SHUT_RDWR);
    if (fault == FAULT_CORRUPT)
        out.data[0] ^= 1;
    for (int n = fault == FAULT_DROP ? 0 : fault == FAULT_DUPLICATE ? 2 : 1; n > 0; n--)
        if (io_send_fds(c->fd, out.data, out.len, fds, n_fds, err) < 0)
            return -1;
    return 0;
}

static int answer(struct attach_connection *c, unsigned type, const ProtobufCMessage *message,
                  struct vm_error **err)
{
    return answer_with_fds(c, type, message, NULL, 0, err);
}

static int answer_ok(struct attach_connection *c, struct vm_error **err)
{
    return answer(c, VMMIG__ATTACH__TYPE__OK, NULL, err);
}

/* False: the agent cannot be told either. */
static bool answer_error(struct attach_connection *c, const struct vm_error *why)
{
    char text[ATTACH_TEXT_MAX + 1];
    Vmmig__Attach__Error m = VMMIG__ATTACH__ERROR__INIT;
    snprintf(text, sizeof(text), "%s", error_message(why));
    field_make_text(text, ATTACH_TEXT_MAX);
    m.kind = (char *)(uintptr_t)error_kind_name(why->kind);
    m.message = text;
    return answer(c, VMMIG__ATTACH__TYPE__ERROR, &m.base, NULL) == 0;
}

/* ---- Requests ---- */

struct request {
    struct vmmig_attach *attach;
    struct attach_connection *connection;
    const struct attach_message *message;
    int fd; /* that came with it, or -1 */
};

static int out_of_order(const struct request *r, const char *why, struct vm_error **err)
{
    return error_set(err, VM_ERROR_CONFLICT, "%s is out of order: %s",
                     attach_type_name(r->message->type), why);
}

/* In the VMM's own word. */
static int check_unbroken(const struct request *r, struct vm_error **err)
{
    struct vmmig_attach *a = r->attach;
    SCOPE_LOCK(&a->state_lock);
    if (a->state != VMMIG_BROKEN)
        return 0;
    return a->detail[0] ? error_set(err, VM_ERROR_REFUSED, "the guest is broken (%s)", a->detail)
                        : error_set(err, VM_ERROR_REFUSED, "the guest is broken");
}

static enum vmmig_run_state state_of(struct vmmig_attach *a, bool *ret_held)
{
    SCOPE_LOCK(&a->state_lock);
    *ret_held = a->held;
    return a->state;
}

static int handle_hello(const struct request *r, struct vm_error **err)
{
    const struct vmmig_config *c = &r->attach->config;
    Vmmig__Attach__Welcome m = VMMIG__ATTACH__WELCOME__INIT;
    m.version = attach_version_choose(r->message->hello);
    if (!m.version)
        return error_set(err, VM_ERROR_VERSION,
                         "this VMM speaks versions %d to %d of the attach protocol, the agent %u to %u",
                         ATTACH_VERSION_MIN, ATTACH_VERSION_MAX, r->message->hello->version_min,
                         r->message->hello->version_max);
    m.vmm = (char *)(uintptr_t)c->vmm;
    m.machine = (char *)(uintptr_t)c->machine;
    m.pid = getpid();
    m.n_vcpus = c->n_vcpus;
    m.tracking = (char *)(uintptr_t)vmmig_tracking_name(c->tracking);
    m.incoming_argv = (char **)(uintptr_t)c->incoming_argv;
    while (c->incoming_argv && c->incoming_argv[m.n_incoming_argv])
        m.n_incoming_argv++;
    m.takes_files = c->takes_files;
    m.populates = true;
    m.state_bytes = c->state_bytes;
    if (answer(r->connection, VMMIG__ATTACH__TYPE__WELCOME, &m.base, err) < 0)
        return -1;
    r->connection->greeted = true;
    return 0;
}

static int handle_status(const struct request *r, struct vm_error **err)
{
    struct vmmig_attach *a = r->attach;
    char detail[ATTACH_DETAIL_MAX];
    Vmmig__Attach__State m = VMMIG__ATTACH__STATE__INIT;
    pthread_mutex_lock(&a->state_lock);
    m.state = (Vmmig__Attach__RunState)a->state;
    m.held = a->held;
    m.before = (Vmmig__Attach__RunState)(a->held ? a->before : 0);
    memcpy(detail, a->detail, sizeof(detail));
    pthread_mutex_unlock(&a->state_lock);
    field_make_text(detail, sizeof(detail) - 1);
    m.detail = detail;
    m.tracking = atomic_load(&a->memory.tracking);
    pthread_mutex_lock(&a->throttle.lock);
    m.throttle_percent = a->throttle.percent;
    pthread_mutex_unlock(&a->throttle.lock);
    return answer(r->connection, VMMIG__ATTACH__TYPE__STATE, &m.base, err);
}

static int handle_get_memory(const struct request *r, struct vm_error **err)
{
    struct attach_memory *m = &r->attach->memory;
    Vmmig__Attach__Memory out = VMMIG__ATTACH__MEMORY__INIT;
    Vmmig__Attach__Slot slots[VMMIG_SLOTS_MAX], *list[VMMIG_SLOTS_MAX];
    int fds[ATTACH_FDS_MAX], n_fds = 0;
    SCOPE_LOCK(&m->memory_lock);
    if (!m->n_slots)
        return error_set(err, VM_ERROR_REFUSED, "the VMM has not told its memory slots");
    for (unsigned i = 0; i < m->n_slots; i++) {
        struct attach_slot *s = &m->slots[i];
        vmmig__attach__slot__init(&slots[i]);
        slots[i].name = s->slot.name;
        slots[i].size = s->slot.size;
        slots[i].page_size = s->page_size;
        slots[i].memfd_offset = s->slot.memfd_offset;
        slots[i].bitmap_offset = s->bitmap_offset;
        slots[i].guest_address = s->slot.guest_address;
        list[i] = &slots[i];
        if (s->maps_file) /* an agent that does not know of this finds a descriptor too few */
            slots[i].private_at = (uintptr_t)s->slot.host;
        else
            fds[n_fds++] = s->slot.memfd;
    }
    fds[n_fds++] = m->bitmap_fd;
    out.slots = list;
    out.n_slots = m->n_slots;
    out.bitmap_size = m->bitmap_size;
    out.generation = m->told;
    return answer_with_fds(r->connection, VMMIG__ATTACH__TYPE__MEMORY, &out.base, fds, n_fds, err);
}

static int handle_track(const struct request *r, struct vm_error **err)
{
    if (attach_memory_track(&r->attach->memory, r->attach->config.record_path, &r->connection->tracks, err) < 0)
        return -1;
    return answer_ok(r->connection, err);
}

static int need_tracking(const struct request *r, struct vm_error **err)
{
    return r->connection->tracks ? 0 : out_of_order(r, "this agent has not begun to track", err);
}

static int handle_harvest(const struct request *r, struct vm_error **err)
{
    Vmmig__Attach__Harvested m = VMMIG__ATTACH__HARVESTED__INIT;
    if (need_tracking(r, err) < 0 || check_unbroken(r, err) < 0 ||
        attach_memory_harvest(&r->attach->memory, r->connection->tracks, &m.pages, &m.ring_full, err) < 0)
        return -1;
    return answer(r->connection, VMMIG__ATTACH__TYPE__HARVESTED, &m.base, err);
}

static int handle_clear(const struct request *r, struct vm_error **err)
{
    const Vmmig__Attach__Clear *m = r->message->clear;
    if (need_tracking(r, err) < 0 || check_unbroken(r, err) < 0 ||
        attach_memory_clear(&r->attach->memory, r->connection->tracks, m->slot, m->first, m->pages, err) < 0)
        return -1;
    return answer_ok(r->connection, err);
}

/* What another connection tracks since the slots changed is none of its business. */
static void end_tracking(struct vmmig_attach *a, struct attach_connection *c)
{
    if (a->throttles == c)
        attach_throttle_set(a, 0, NULL);
    if (c->tracks)
        attach_memory_untrack(&a->memory, c->tracks);
    c->tracks = 0;
}

static int handle_untrack(const struct request *r, struct vm_error **err)
{
    end_tracking(r->attach, r->connection);
    return answer_ok(r->connection, err);
}

static int handle_throttle(const struct request *r, struct vm_error **err)
{
    if (need_tracking(r, err) < 0 ||
        attach_memory_check(&r->attach->memory, r->connection->tracks, err) < 0 ||
        attach_throttle_set(r->attach, r->message->throttle->percent, err) < 0)
        return -1;
    r->attach->throttles = r->connection;
    return answer_ok(r->connection, err);
}

/*
 * A `pause` that failed may have stopped some of the guest, and one that hangs all of it. Until it is known to run it
 * counts as standing, so that the agent goes on asking for that.
 */
static void undo_pause(struct vmmig_attach *a, const struct vm_error *why)
{
    if (why->kind == VM_ERROR_CONFLICT)
        return; /* it was not called */
    bool hangs = why->kind == VM_ERROR_TIMEOUT;
    if (!hangs && attach_call(a, ATTACH_CALL_RESUME, -1, NULL) == 0)
        return;
    attach_hold(a);
    SCOPE_LOCK(&a->state_lock);
    a->pause_hangs = hangs;
}

static int handle_pause(const struct request *r, struct vm_error **err)
{
    struct vmmig_attach *a = r->attach;
    struct vm_error *failed = NULL;
    bool held;
    enum vmmig_run_state state = state_of(a, &held);
    if (state == VMMIG_INCOMING)
        return out_of_order(r, "no guest was loaded yet", err);
    if (check_unbroken(r, err) < 0)
        return -1;
    /* Throttled vCPUs must not make the pause wait for them. */
    if (attach_throttle_set(a, 0, err) < 0)
        return -1;
    if (attach_call(a, ATTACH_CALL_PAUSE, -1, &failed) < 0) {
        if (state == VMMIG_RUNNING)
            undo_pause(a, failed);
        return error_propagate(err, failed);
    }
    attach_hold(a);
    return answer_ok(r->connection, err);
}

static int handle_resume(const struct request *r, struct vm_error **err)
{
    struct vmmig_attach *a = r->attach;
    bool held;
    enum vmmig_run_state state = state_of(a, &held);
    if (state == VMMIG_INCOMING)
        return error_set(err, VM_ERROR_REFUSED, "the guest has not been loaded yet");
    if (state == VMMIG_BROKEN)
        return error_set(err, VM_ERROR_REFUSED, "the guest is broken and cannot run");
    if (attach_call(a, ATTACH_CALL_RESUME, -1, err) < 0)
        return -1;
    attach_set_state(a, VMMIG_RUNNING, false);
    return answer_ok(r->connection, err);
}

/* One that failed is to be said again. */
static int release(struct vmmig_attach *a, struct vm_error **err)
{
    struct vm_error *failed = NULL;
    if (!a->config.callbacks.release)
        return 0;
    pthread_mutex_lock(&a->state_lock);
    a->releasing = true;
    pthread_mutex_unlock(&a->state_lock);
    int r = attach_call(a, ATTACH_CALL_RELEASE, -1, &failed);
    if (r == 0 || failed->kind != VM_ERROR_TIMEOUT)
        attach_released(a, r == 0);
    return r == 0 ? 0 : error_propagate(err, failed);
}

static bool is_releasing(struct vmmig_attach *a)
{
    SCOPE_LOCK(&a->state_lock);
    return a->releasing;
}

/* The VMM may set the guest going from within the callback. */
static int handle_release(const struct request *r, struct vm_error **err)
{
    struct vmmig_attach *a = r->attach;
    bool held;
    enum vmmig_run_state state = state_of(a, &held);
    if (is_releasing(a))
        return error_set(err, VM_ERROR_CONFLICT, "the VMM's callback `release` has not returned yet");
    if (state != VMMIG_PAUSED && state != VMMIG_BROKEN)
        return out_of_order(r, "the guest does not stand", err);
    if (!held)
        return answer_ok(r->connection, err);
    attach_set_state(a, VMMIG_PAUSED, false);
    return release(a, err) < 0 ? -1 : answer_ok(r->connection, err);
}

static int handle_save(const struct request *r, struct vm_error **err)
{
    struct stat st;
    Vmmig__Attach__Saved m = VMMIG__ATTACH__SAVED__INIT;
    bool held;
    if (check_unbroken(r, err) < 0)
        return -1;
    if (state_of(r->attach, &held) != VMMIG_PAUSED || !held)
        return out_of_order(r, "the guest was not paused before", err);
    cleanup_close int fd = memfd_create("vmmig-state", MFD_CLOEXEC);
    if (fd < 0)
        return error_errno(err, errno, "cannot make a file for the guest's state");
    if (attach_call(r->attach, ATTACH_CALL_SAVE, fd, err) < 0)
        return -1;
    if (fstat(fd, &st) < 0 || (uint64_t)st.st_size > VMMIG_STATE_MAX)
        return error_set(err, VM_ERROR_FAILED, "the VMM wrote %llu bytes of state; %u are allowed",
                         (unsigned long long)st.st_size, VMMIG_STATE_MAX);
    m.size = (uint64_t)st.st_size;
    return answer_with_fds(r->connection, VMMIG__ATTACH__TYPE__SAVED, &m.base, &fd, 1, err);
}

static int handle_map_file(const struct request *r, struct vm_error **err)
{
    struct vmmig_attach *a = r->attach;
    bool held;
    if (state_of(a, &held) != VMMIG_INCOMING)
        return out_of_order(r, "this VMM does not wait for a guest", err);
    if (!a->config.takes_files)
        return error_set(err, VM_ERROR_REFUSED, "this VMM does not let the guest's memory be a template's");
    const Vmmig__Attach__MapFile *m = r->message->map_file;
    return attach_memory_map_file(&a->memory, m->memory, m->slot, r->fd, err) < 0 ? -1 : answer_ok(r->connection, err);
}

static int handle_load(const struct request *r, struct vm_error **err)
{
    struct vmmig_attach *a = r->attach;
    bool held;
    if (state_of(a, &held) != VMMIG_INCOMING)
        return out_of_order(r, "this VMM does not wait for a guest", err);
    if (r->fd < 0 || lseek(r->fd, 0, SEEK_SET) < 0)
        return error_set(err, VM_ERROR_PROTOCOL, "no file of the guest's state came along");
    uint64_t filled = r->message->load->memory;
    if (attach_memory_check_told(&a->memory, filled, err) < 0 || attach_call(a, ATTACH_CALL_LOAD, r->fd, err) < 0 ||
        attach_memory_check_told(&a->memory, filled, err) < 0)
        return -1;
    attach_hold(a);
    return answer_ok(r->connection, err);
}

static int handle_populate(const struct request *r, struct vm_error **err)
{
    const Vmmig__Attach__Populate *m = r->message->populate;
    bool held;
    if (state_of(r->attach, &held) != VMMIG_INCOMING)
        return out_of_order(r, "this VMM does not wait for a guest", err);
    for (size_t i = 0; i < m->n_runs; i++)
        if (attach_memory_populate(&r->attach->memory, m->memory, m->runs[i]->slot, m->runs[i]->first,
                                   m->runs[i]->pages, err) < 0)
            return -1;
    return answer_ok(r->connection, err);
}

static int handle_quit(const struct request *r, struct vm_error **err)
{
    bool held;
    if (state_of(r->attach, &held) == VMMIG_RUNNING || !held)
        return out_of_order(r, "the guest was not paused before", err);
    if (!r->attach->config.callbacks.quit)
        return error_set(err, VM_ERROR_REFUSED, "this VMM does not end by itself");
    return attach_call(r->attach, ATTACH_CALL_QUIT, -1, err) < 0 ? -1 : answer_ok(r->connection, err);
}

static const struct {
    Vmmig__Attach__Type type;
    int (*handle)(const struct request *r, struct vm_error **err);
} handlers[] = {
    {VMMIG__ATTACH__TYPE__HELLO, handle_hello},       {VMMIG__ATTACH__TYPE__STATUS, handle_status},
    {VMMIG__ATTACH__TYPE__GET_MEMORY, handle_get_memory}, {VMMIG__ATTACH__TYPE__TRACK, handle_track},
    {VMMIG__ATTACH__TYPE__HARVEST, handle_harvest},   {VMMIG__ATTACH__TYPE__CLEAR, handle_clear},
    {VMMIG__ATTACH__TYPE__UNTRACK, handle_untrack},   {VMMIG__ATTACH__TYPE__THROTTLE, handle_throttle},
    {VMMIG__ATTACH__TYPE__PAUSE, handle_pause},       {VMMIG__ATTACH__TYPE__RESUME, handle_resume},
    {VMMIG__ATTACH__TYPE__QUIT, handle_quit},         {VMMIG__ATTACH__TYPE__POPULATE, handle_populate},
    {VMMIG__ATTACH__TYPE__SAVE, handle_save},         {VMMIG__ATTACH__TYPE__LOAD, handle_load},
    {VMMIG__ATTACH__TYPE__MAP_FILE, handle_map_file}, {VMMIG__ATTACH__TYPE__RELEASE, handle_release},
};

static int handle(const struct request *r, struct vm_error **err)
{
    Vmmig__Attach__Type type = r->message->type;
    enum fault_result fault = fault_receive(type);
    if (fault == FAULT_DROP)
        return 0;
    if (fault == FAULT_ERROR)
        return error_errno(err, fault_errno(), "library.receive.%s", attach_type_name(type));
    if (!r->connection->greeted && type != VMMIG__ATTACH__TYPE__HELLO)
        return error_set(err, VM_ERROR_PROTOCOL, "%s came before HELLO", attach_type_name(type));
    if (r->connection->greeted && type == VMMIG__ATTACH__TYPE__HELLO)
        return error_set(err, VM_ERROR_PROTOCOL, "HELLO came twice");
    for (size_t i = 0; i < sizeof(handlers) / sizeof(*handlers); i++)
        if (handlers[i].type == type)
            return handlers[i].handle(r, err);
    return error_set(err, VM_ERROR_PROTOCOL, "%s is no request", attach_type_name(type));
}

/* ---- Connections ---- */

static void drop(struct vmmig_attach *a, struct attach_connection *c)
{
    if (c->fd < 0)
        return;
    end_tracking(a, c);
    close_fd(&c->fd);
    *c = (struct attach_connection){.fd = -1};
}

/* One packet and its answer. False: the connection is of no more use. */
static bool serve_packet(struct vmmig_attach *a, struct attach_connection *c, uint8_t *packet)
{
    cleanup_attach_message struct attach_message m = {0};
    cleanup_error struct vm_error *err = NULL;
    int fd = -1, n_fds = 0;
    ssize_t n = io_recv_fds(c->fd, packet, ATTACH_PACKET_MAX, &fd, 1, &n_fds, &err);
    if (n == 0)
        return false;
    cleanup_close int passed = n > 0 && n_fds ? fd : -1;
    if (n > 0 && attach_unpack(packet, (size_t)n, &m, &err) == 0) {
        struct request r = {a, c, &m, passed};
        c->request = m.type;
        if (handle(&r, &err) == 0)
            return true;
    }
    attach_log(a, "agent's request %s: %s", attach_type_name(m.type), error_message(err));
    return answer_error(c, err) && err->kind != VM_ERROR_PROTOCOL && err->kind != VM_ERROR_VERSION &&
           n > 0;
}

static bool is_welcome_user(const struct vmmig_attach *a, int fd)
{
    struct ucred peer;
    socklen_t n = sizeof(peer);
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &n) < 0)
        return false;
    return peer.uid == 0 || peer.uid == geteuid() ||
           (a->config.agent_uid != (uid_t)-1 && peer.uid == a->config.agent_uid);
}

/* False: it cannot be done now, for lack of descriptors, say. */
static bool accept_one(struct vmmig_attach *a)
{
    struct attach_connection incoming = {
        .fd = accept4(a->listen_fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK)};
    cleanup_error struct vm_error *err = NULL;
    if (incoming.fd < 0)
        return errno == EAGAIN || errno == EINTR || errno == ECONNABORTED;
    for (unsigned i = 0; is_welcome_user(a, incoming.fd) && i < ATTACH_CONNECTIONS_MAX; i++) {
        if (a->connections[i].fd < 0) {
            a->connections[i] = incoming;
            return true;
        }
    }
    if (is_welcome_user(a, incoming.fd))
        error_set(&err, VM_ERROR_CONFLICT, "%d agents are attached to this VMM already",
                  ATTACH_CONNECTIONS_MAX);
    else
        error_set(&err, VM_ERROR_DENIED, "this user may not attach to the VMM");
    answer_error(&incoming, err);
    close(incoming.fd);
    return true;
}

static void *server_main(void *arg)
{
    struct vmmig_attach *a = arg;
    cleanup_free uint8_t *packet = malloc(ATTACH_PACKET_MAX);
    struct pollfd p[ATTACH_CONNECTIONS_MAX + 2];
    bool accepts = true;
    while (packet) {
        p[0] = (struct pollfd){.fd = a->stop, .events = POLLIN};
        p[1] = (struct pollfd){.fd = accepts ? a->listen_fd : -1, .events = POLLIN};
        for (unsigned i = 0; i < ATTACH_CONNECTIONS_MAX; i++)
            p[i + 2] = (struct pollfd){.fd = a->connections[i].fd, .events = POLLIN};
        if (poll(p, ATTACH_CONNECTIONS_MAX + 2, accepts ? -1 : ACCEPT_AGAIN_MS) < 0)
            continue;
        if (p[0].revents)
            break;
        for (unsigned i = 0; i < ATTACH_CONNECTIONS_MAX; i++)
            if (p[i + 2].revents && !serve_packet(a, &a->connections[i], packet))
                drop(a, &a->connections[i]);
        accepts = !p[1].revents || accept_one(a);
    }
    for (unsigned i = 0; i < ATTACH_CONNECTIONS_MAX; i++)
        drop(a, &a->connections[i]);
    return NULL;
}

int attach_server_listen(struct vmmig_attach *a, struct vm_error **err)
{
    for (unsigned i = 0; i < ATTACH_CONNECTIONS_MAX; i++)
        a->connections[i].fd = -1;
    a->listen_fd = listen_at(a->config.socket_path, err);
    return a->listen_fd < 0 ? -1 : 0;
}

int attach_server_start(struct vmmig_attach *a, struct vm_error **err)
{
    if (a->server_started)
        return 0;
    /* The VMM's signals are none of this thread's business. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failed = pthread_create(&a->server, NULL, server_main, a);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    a->server_started = !failed;
    return failed ? error_errno(err, failed, "cannot start a thread") : 0;
}

void attach_server_stop(struct vmmig_attach *a)
{
    if (a->server_started) {
        io_latch_set(a->stop);
        pthread_join(a->server, NULL);
    }
    a->server_started = false;
    if (a->listen_fd >= 0 && !is_inherited(a->config.socket_path))
        unlink(a->config.socket_path);
    close_fd(&a->listen_fd);
}

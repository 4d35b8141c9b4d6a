/* SPDX-License-Identifier: Apache-2.0 */
#include "client/client.h"

#include "base/clock.h"
#include "base/io.h"
#include "proto/frame.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>

#define HELLO_TIMEOUT_NS (10 * NSEC_PER_SEC)
#define SEND_TIMEOUT_NS (10 * NSEC_PER_SEC)

enum { READ_SIZE = 16384 };

struct client {
    int fd;
    bool is_remote;
    struct frame_decoder decoder;
    struct cursor in; /* of `bytes`, what is not decoded yet */
    uint8_t bytes[READ_SIZE];
    struct control_message welcome;
};

static int connect_to(struct client *c, const char *path, struct vm_error **err)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof(address.sun_path))
        return error_set(err, VM_ERROR_USAGE,
                         "--socket: the path of a socket has at most %zu bytes",
                         sizeof(address.sun_path) - 1);
    strcpy(address.sun_path, path);
    c->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (c->fd < 0)
        return error_errno(err, errno, "socket");
    if (connect(c->fd, (struct sockaddr *)&address, sizeof(address)) == 0)
        return 0;
    if (errno == EACCES)
        return error_set(err, VM_ERROR_DENIED,
                         "%s is not yours to use; be root or a member of the agent's control-group",
                         path);
    return error_set(err, VM_ERROR_UNREACHABLE,
                     "no agent answers on %s; start vmmigd or pass --socket", path);
}

static int greet(struct client *c, const char *agent, struct vm_error **err)
{
    char software[] = "vmmig " VMMIG_VERSION;
    Vmmig__Control__Hello hello = VMMIG__CONTROL__HELLO__INIT;
    hello.version_min = CONTROL_VERSION_MIN;
    hello.version_max = CONTROL_VERSION_MAX;
    hello.software = software;
    if (agent)
        hello.agent = client_word(agent);
    /* An agent that refuses closes at once, and its reason is worth more than a failed write. */
    client_send(c, VMMIG__CONTROL__TYPE__HELLO, &hello.base, NULL);
    return client_receive(c, VMMIG__CONTROL__TYPE__WELCOME,
                          clock_mono_ns() + (agent ? CLIENT_CALL_NS : HELLO_TIMEOUT_NS), -1, &c->welcome, err);
}

struct client *client_open(const struct client_target *target, struct vm_error **err)
{
    CLEANUP(client) struct client *c = calloc(1, sizeof(*c));
    if (!c) {
        error_nomem(err);
        return NULL;
    }
    c->fd = -1;
    c->in = cursor_init(c->bytes, 0);
    c->is_remote = target->agent;
    if (connect_to(c, target->socket, err) < 0)
        return NULL;
    if (greet(c, target->agent, err) < 0) {
        error_wrap(err, "%s", target->agent ? target->agent : target->socket);
        return NULL;
    }
    return steal_ptr(&c);
}

void client_close(struct client *c)
{
    if (!c)
        return;
    close_fd(&c->fd);
    frame_decoder_finish(&c->decoder);
    control_message_finish(&c->welcome);
    free(c);
}

int client_send(struct client *c, unsigned type, const ProtobufCMessage *request,
                    struct vm_error **err)
{
    return client_send_fd(c, type, request, -1, err);
}

int client_send_fd(struct client *c, unsigned type, const ProtobufCMessage *request,
                       int fd, struct vm_error **err)
{
    cleanup_buffer struct buffer out = {0};
    if (fd >= 0 && c->is_remote)
        return error_set(err, VM_ERROR_REFUSED,
                         "a file of this host cannot be given to the agent of another; do this there");
    if (control_check(type, request, err) < 0 ||
        frame_put_message(&out, (uint16_t)type, request, err) < 0)
        return -1;
    /* The descriptor goes with the first byte. */
    size_t sent = fd >= 0;
    if (sent && io_send_fds(c->fd, out.data, 1, &fd, 1, err) < 0)
        return -1;
    return io_write_full(c->fd, out.data + sent, out.len - sent, clock_mono_ns() + SEND_TIMEOUT_NS,
                         -1, err);
}

static int read_frame(struct client *c, int64_t deadline_ns, int cancel_fd, struct frame *ret,
                      struct vm_error **err)
{
    for (;;) {
        int r = frame_decode(&c->decoder, &c->in, ret, err);
        if (r)
            return r < 0 ? -1 : 0;
        ssize_t n = io_read_some(c->fd, c->bytes, sizeof(c->bytes), deadline_ns, cancel_fd, err);
        if (n < 0)
            return -1;
        if (n == 0)
            return error_set(err, VM_ERROR_UNREACHABLE, "the agent closed the connection");
        c->in = cursor_init(c->bytes, (size_t)n);
    }
}

int client_receive(struct client *c, unsigned want, int64_t deadline_ns, int cancel_fd,
                       struct control_message *ret_answer, struct vm_error **err)
{
    struct frame frame;
    cleanup_control_message struct control_message m = {0};
    if (read_frame(c, deadline_ns, cancel_fd, &frame, err) < 0 ||
        control_unpack(frame.type, frame.data, frame.len, &m, err) < 0)
        return -1;
    if (m.type == VMMIG__CONTROL__TYPE__ERROR)
        return error_set(err, error_kind_parse(m.error->kind), "%s", m.error->message);
    if (want != CLIENT_ANY && m.type != want)
        return error_set(err, VM_ERROR_PROTOCOL, "the agent answered %s where %s was expected",
                         control_type_name(m.type), control_type_name(want));
    *ret_answer = m;
    m.any = NULL;
    return 0;
}

int64_t client_deadline_ns(unsigned type)
{
    bool late = type == VMMIG__CONTROL__TYPE__CLONE || type == VMMIG__CONTROL__TYPE__TEMPLATE_PUBLISH;
    return late ? INT64_MAX : clock_mono_ns() + CLIENT_CALL_NS;
}

int client_call(struct client *c, unsigned type, const ProtobufCMessage *request,
                    unsigned want, struct control_message *ret_answer, struct vm_error **err)
{
    if (client_send(c, type, request, err) < 0)
        return -1;
    return client_receive(c, want, client_deadline_ns(type), -1, ret_answer, err);
}

const char *client_software(const struct client *c)
{
    return c->welcome.welcome->software;
}

int client_ask(const struct client_target *target, unsigned type, const ProtobufCMessage *request, unsigned want,
            struct control_message *ret_answer, struct vm_error **err)
{
    CLEANUP(client) struct client *c = client_open(target, err);
    return c ? client_call(c, type, request, want, ret_answer, err) : -1;
}

char *client_word(const char *text)
{
    return (char *)(uintptr_t)text;
}

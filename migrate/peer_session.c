/* SPDX-License-Identifier: Apache-2.0 */
#include "migrate/peer_session.h"

#include "base/clock.h"
#include "base/fault.h"
#include "base/log.h"
#include "proto/frame.h"

#include <stdatomic.h>
#include <string.h>

#define SOFTWARE "vmmig " VMMIG_VERSION

struct peer_session {
    atomic_uint refs;
    struct conn *conn;
    pthread_mutex_t send_lock;
    char host[PEER_NAME_MAX + 1];
    /* The receiving thread's: */
    struct frame_decoder decoder;
    uint8_t bytes[16384];
    struct cursor pending; /* part of `bytes` that is not decoded yet */
};

static struct peer_session *make_session(struct conn *conn, struct vm_error **err)
{
    struct peer_session *s = calloc(1, sizeof(*s));
    if (!s) {
        conn_destroy(conn);
        error_nomem(err);
        return NULL;
    }
    atomic_init(&s->refs, 1);
    s->conn = conn;
    pthread_mutex_init(&s->send_lock, NULL);
    return s;
}

struct peer_session *peer_session_ref(struct peer_session *s)
{
    atomic_fetch_add(&s->refs, 1);
    return s;
}

void peer_session_unref(struct peer_session *s)
{
    if (!s || atomic_fetch_sub(&s->refs, 1) != 1)
        return;
    conn_destroy(s->conn);
    frame_decoder_finish(&s->decoder);
    pthread_mutex_destroy(&s->send_lock);
    free(s);
}

const char *peer_session_peer(const struct peer_session *s)
{
    return conn_peer_name(s->conn);
}

void peer_session_shutdown(struct peer_session *s)
{
    conn_shutdown(s->conn);
}

static int send_message(struct peer_session *s, unsigned type, const ProtobufCMessage *message,
                        int64_t deadline_ns, struct vm_error **err)
{
    cleanup_buffer struct buffer out = {0};
    if (frame_put_message(&out, (uint16_t)type, message, err) < 0)
        return -1;
    SCOPE_LOCK(&s->send_lock);
    return conn_write_full(s->conn, out.data, out.len, deadline_ns, -1, err);
}

/* The next message of any type: 1, 0 at the end, -1. */
static int receive_any(struct peer_session *s, int64_t deadline_ns, int cancel_fd,
                       struct peer_message *ret_message, struct vm_error **err)
{
    for (;;) {
        struct frame frame;
        int got = frame_decode(&s->decoder, &s->pending, &frame, err);
        if (got > 0)
            got = peer_unpack(frame.type, frame.data, frame.len, ret_message, err) < 0 ? -1 : 1;
        if (got)
            return got < 0 ? error_wrap(err, "%s", conn_peer_address(s->conn)) : 1;
        ssize_t n = conn_read_some(s->conn, s->bytes, sizeof(s->bytes), deadline_ns, cancel_fd, err);
        if (n <= 0)
            return (int)n;
        s->pending = cursor_init(s->bytes, (size_t)n);
    }
}

/* The first message, HELLO or the answer to it, must be of this type. */
static int receive_type(struct peer_session *s, Vmmig__Peer__Type type, int64_t deadline_ns,
                        int cancel_fd, struct peer_message *ret_message, struct vm_error **err)
{
    struct peer_message m = {0};
    int got = receive_any(s, deadline_ns, cancel_fd, &m, err);
    if (got < 0)
        return -1;
    if (got == 0)
        return error_set(err, VM_ERROR_UNREACHABLE, "the peer closed the connection");
    if (m.type == type) {
        *ret_message = m;
        return 0;
    }
    if (m.type == VMMIG__PEER__TYPE__ERROR)
        error_set(err, error_kind_parse(m.error->kind), "%s", m.error->message);
    else
        error_set(err, VM_ERROR_PROTOCOL, "the peer's first message is not its greeting");
    peer_message_finish(&m);
    return -1;
}

static char *lend(const char *text)
{
    return (char *)(uintptr_t)text;
}

static int greet(struct peer_session *s, const char *host, int64_t deadline_ns, int cancel_fd,
                 struct vm_error **err)
{
    Vmmig__Peer__Hello hello = VMMIG__PEER__HELLO__INIT;
    hello.version_min = PEER_VERSION_MIN;
    hello.version_max = PEER_VERSION_MAX;
    hello.software = lend(SOFTWARE);
    hello.host = lend(host);
    struct peer_message answer;
    if (send_message(s, VMMIG__PEER__TYPE__HELLO, &hello.base, deadline_ns, err) < 0 ||
        receive_type(s, VMMIG__PEER__TYPE__HELLO_OK, deadline_ns, cancel_fd, &answer, err) < 0)
        return -1;
    snprintf(s->host, sizeof(s->host), "%s", answer.hello_ok->host);
    peer_message_finish(&answer);
    return 0;
}

static void send_error(struct peer_session *s, const struct vm_error *why, int64_t deadline_ns)
{
    Vmmig__Peer__Error message = VMMIG__PEER__ERROR__INIT;
    message.kind = lend(error_kind_name(why->kind));
    message.message = lend(why->message);
    send_message(s, VMMIG__PEER__TYPE__ERROR, &message.base, deadline_ns, NULL);
}

static int answer_greeting(struct peer_session *s, const char *host, int64_t deadline_ns,
                           int cancel_fd, struct vm_error **err)
{
    struct peer_message hello;
    if (receive_type(s, VMMIG__PEER__TYPE__HELLO, deadline_ns, cancel_fd, &hello, err) < 0)
        return -1;
    Vmmig__Peer__HelloOk answer = VMMIG__PEER__HELLO_OK__INIT;
    answer.version = peer_version_choose(hello.hello);
    answer.software = lend(SOFTWARE);
    answer.host = lend(host);
    snprintf(s->host, sizeof(s->host), "%s", hello.hello->host);
    struct vm_error *refusal = NULL;
    if (!answer.version)
        error_set(&refusal, VM_ERROR_VERSION,
                  "%s speaks protocol versions %d to %d, the peer %u to %u; upgrade the older one",
                  SOFTWARE, PEER_VERSION_MIN, PEER_VERSION_MAX, hello.hello->version_min,
                  hello.hello->version_max);
    peer_message_finish(&hello);
    if (refusal) {
        send_error(s, refusal, deadline_ns);
        return error_propagate(err, refusal);
    }
    return send_message(s, VMMIG__PEER__TYPE__HELLO_OK, &answer.base, deadline_ns, err);
}

struct peer_session *peer_session_open(struct conn_context *ctx, const char *address,
                                       const char *host, int64_t deadline_ns, int cancel_fd,
                                       struct vm_error **err)
{
    struct conn *conn = conn_dial(ctx, address, CONN_CONTROL, deadline_ns, cancel_fd, err);
    CLEANUP(peer_session) struct peer_session *s = conn ? make_session(conn, err) : NULL;
    if (!s || greet(s, host, deadline_ns, cancel_fd, err) < 0)
        return NULL;
    return steal_ptr(&s);
}

struct peer_session *peer_session_accept(struct conn *conn, const char *host, int64_t deadline_ns,
                                         int cancel_fd, struct vm_error **err)
{
    CLEANUP(peer_session) struct peer_session *s = make_session(conn, err);
    if (!s || answer_greeting(s, host, deadline_ns, cancel_fd, err) < 0)
        return NULL;
    return steal_ptr(&s);
}

int peer_session_receive(struct peer_session *s, int64_t deadline_ns, int cancel_fd,
                         struct peer_message *ret_message, struct vm_error **err)
{
    struct peer_message m = {0};
    int got = receive_any(s, deadline_ns, cancel_fd, &m, err);
    if (got <= 0)
        return got;
    if (FAULT("peer.receive") == FAULT_ERROR) {
        peer_message_finish(&m);
        return error_errno(err, fault_errno(), "peer.receive");
    }
    if (m.type == VMMIG__PEER__TYPE__HANDOVER) {
        *ret_message = m;
        return 1;
    }
    if (m.type == VMMIG__PEER__TYPE__ERROR)
        error_set(err, error_kind_parse(m.error->kind), "%s", m.error->message);
    else
        error_set(err, VM_ERROR_PROTOCOL, "the peer greeted twice");
    peer_message_finish(&m);
    return -1;
}

bool peer_session_send(struct peer_session *s, const Vmmig__Peer__Handover *message)
{
    int64_t deadline = clock_mono_ns() + PEER_SEND_TIMEOUT_MS * NSEC_PER_MSEC;
    cleanup_error struct vm_error *err = NULL;
    enum fault_result fault = FAULT("peer.send");
    if (fault == FAULT_DROP)
        return true;
    if (fault == FAULT_ERROR) {
        conn_shutdown(s->conn);
        return false;
    }
    for (int i = 0; i < (fault == FAULT_DUPLICATE ? 2 : 1); i++) {
        if (send_message(s, VMMIG__PEER__TYPE__HANDOVER, &message->base, deadline, &err) < 0) {
            log_warn("control connection lost", "error=%s", log_q(error_message(err)));
            conn_shutdown(s->conn);
            return false;
        }
    }
    return true;
}

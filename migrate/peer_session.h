/* SPDX-License-Identifier: Apache-2.0 */
/*
 * peer_session: one control connection between two agents, from its HELLO on. Hand-over messages go
 * both ways at any time (proto/peer.proto).
 *
 *     dialling:   s = peer_session_open(ctx, "host2:16550", host, deadline, cancel, &err);
 *     listening:  s = peer_session_accept(conn, host, deadline, cancel, &err);      takes conn over
 *     one thread: while ((r = peer_session_receive(s, cancel, &message, &err)) > 0) ...
 *     others:     peer_session_send(s, handover)
 *     all:        peer_session_unref(s)
 *
 * A session is reference counted. Sending never waits long: what cannot be given to the kernel within
 * PEER_SEND_TIMEOUT_MS breaks the connection, and the message is lost, which hand-over allows for.
 * A peer that sends nothing is fine; one whose host is gone is noticed by TCP's keep-alive.
 */
#ifndef VMMIG_MIGRATE_PEER_SESSION_H
#define VMMIG_MIGRATE_PEER_SESSION_H

#include "base/cleanup.h"
#include "base/error.h"
#include "migrate/conn.h"
#include "proto/peer.h"

#define PEER_SEND_TIMEOUT_MS 2000

struct peer_session;

/* Dial and exchange HELLO. `host` is what this host calls itself. NULL on failure. */
struct peer_session *peer_session_open(struct conn_context *ctx, const char *address,
                                       const char *host, int64_t deadline_ns, int cancel_fd,
                                       struct vm_error **err);
/* The other side of it. conn is the session's, also on failure. */
struct peer_session *peer_session_accept(struct conn *conn, const char *host, int64_t deadline_ns,
                                         int cancel_fd, struct vm_error **err);
struct peer_session *peer_session_ref(struct peer_session *s);
void peer_session_unref(struct peer_session *s);
DEFINE_CLEANUP(peer_session, struct peer_session *, peer_session_unref)

/* The name in the peer's certificate; "" without TLS. */
const char *peer_session_peer(const struct peer_session *s);
/*
 * The next message, within the deadline (INT64_MAX: whenever it comes): 1, or 0 when the peer closed
 * the connection, or -1. One thread. Only HANDOVER comes out; an ERROR of the peer's becomes an error.
 */
int peer_session_receive(struct peer_session *s, int64_t deadline_ns, int cancel_fd,
                         struct peer_message *ret_message, struct vm_error **err);
/* False if it could not be sent; the connection is broken then. Any thread. */
bool peer_session_send(struct peer_session *s, const Vmmig__Peer__Handover *message);
/* Break the connection: receive returns. Any thread. */
void peer_session_shutdown(struct peer_session *s);

#endif

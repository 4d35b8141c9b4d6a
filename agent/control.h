/* SPDX-License-Identifier: Apache-2.0 */
/*
 * control: the socket at which the agent is driven (proto/control.proto).
 *
 *     CLEANUP(control) struct control *c = control_start(agent, &err);   accepts in agent's loop
 *     ... loop_run ...
 *     if (!control_stop(c, 5000)) _exit(...);
 *
 * Each connection has a thread of its own, in which requests are handled one after the other
 * (agent/requests.h). Who may connect: root, the agent's own user, and members of control-group; by
 * the file's mode and, independently, by the credentials that the kernel gives for the peer. And root of the hosts
 * that control-peer lists, through the agents of both: a HELLO that names another agent makes its session pass
 * everything on.
 * A socket file left by a dead agent is replaced; that of a living one is CONFLICT.
 * A request may carry one descriptor, with its first byte; one that nobody takes is closed.
 * Bound: max-clients connections, and CONTROL_PLACES_OF_ROOT more that only root takes; one more is told so and closed.
 * A client that says nothing for 10 s at the start, or that breaks the protocol, is closed.
 * The first requests to a new agent wait, for 10 s at most, until it has asked each of its VMs how it is.
 */
#ifndef VMMIG_AGENT_CONTROL_H
#define VMMIG_AGENT_CONTROL_H

#include "agent/agent.h"
#include "migrate/conn.h"
#include "proto/control.h"

enum { CONTROL_PLACES_OF_ROOT = 4 };

struct control;
struct control_session;

struct control *control_start(struct agent *agent, struct vm_error **err);
/* No more connections; end those that are there. True when all threads ended within the time. */
bool control_stop(struct control *c, int timeout_ms);
/* After control_stop said true. Removes the socket file. */
void control_destroy(struct control *c);
DEFINE_CLEANUP(control, struct control *, control_destroy)

/*
 * Root of another host, whose agent shows a certificate of that name, talks through `conn` from here on: as root
 * of this one, if control-peer lists that host; else he is told that it does not. Returns when he has gone.
 */
void control_serve_peer(struct control *c, struct conn *conn, int stop_fd);

/* For the handlers of requests, in the session's thread. */
struct agent *control_agent(struct control_session *s);
/* Send one answer. -1: the client is gone; the handler gives up. */
int control_reply(struct control_session *s, unsigned type, const ProtobufCMessage *message,
                  struct vm_error **err);
/* The descriptor that came with the request, which is the caller's from then on; -1: none. */
int control_take_fd(struct control_session *s);
uid_t control_peer_uid(const struct control_session *s);
/* Is the client root or the agent's own user, and not just a member of the control group? */
bool control_peer_is_owner(const struct control_session *s);
/* A latch: the agent stops. */
int control_stop_fd(const struct control_session *s);

/* 0 if the client is root, the agent's own user, or a member of publish-group (none: anybody who is
 * connected); DENIED. */
int control_check_publisher(struct control_session *s, struct vm_error **err);

#endif

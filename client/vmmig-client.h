/* SPDX-License-Identifier: Apache-2.0 */
/*
 * vmmig-client: drive an agent from a program. The `vmmig` command uses the same code.
 *
 *     struct vmmig_failure f;
 *     struct vmmig_client *c = vmmig_client_open(VMMIG_CLIENT_SOCKET, &f);
 *
 *     Vmmig__Control__Snapshot request = VMMIG__CONTROL__SNAPSHOT__INIT;
 *     request.vm = "web1";
 *     request.name = "nightly";
 *     struct vmmig_answer a;
 *     vmmig_client_ask(c, VMMIG__CONTROL__TYPE__SNAPSHOT, &request.base, VMMIG__CONTROL__TYPE__JOB, &a, &f);
 *     const Vmmig__Control__Job *job = (const void *)a.message;
 *     ...
 *     vmmig_answer_finish(&a);
 *     vmmig_client_close(c);
 *
 * Messages and their order are those of control.proto; vmmig-control.pb-c.h declares them, docs/control-api.md walks
 * through them. Requests and answers are checked (names, lengths, ranges) before they are sent or given out.
 *
 * Errors: functions return 0, or -1 (NULL) with *failure filled in: what the agent said, or why it could not be asked.
 * After a failure that the agent told, the connection stays usable; after any other, close it.
 *
 * Threads: one at a time per connection. Link with -lvmmig-client (pkg-config vmmig-client). The library keeps no
 * state of its own, prints nothing and touches no signal: ignore SIGPIPE if your program does not.
 */
#ifndef VMMIG_CLIENT_VMMIG_CLIENT_H
#define VMMIG_CLIENT_VMMIG_CLIENT_H

#include <vmmig-control.pb-c.h>

#ifdef __cplusplus
extern "C" {
#endif

#define VMMIG_CLIENT_SOCKET "/run/vmmig/control.sock" /* where an agent listens if its configuration says nothing */

struct vmmig_client;

struct vmmig_failure {
    int status;      /* the exit status that the vmmig command has for this kind */
    char kind[24];   /* "not-found", "conflict", ...: stable */
    char text[2304]; /* one line for people */
};

struct vmmig_answer {
    unsigned type;                   /* VMMIG__CONTROL__TYPE__... */
    const ProtobufCMessage *message; /* of that type */
    void *owned;                     /* the library's */
};

/* Connect, and agree on a version. */
struct vmmig_client *vmmig_client_open(const char *socket_path, struct vmmig_failure *failure);
/* NULL is fine. Jobs that were begun go on. */
void vmmig_client_close(struct vmmig_client *client);
/* `fd` goes with a request that carries a descriptor, and stays the caller's; -1: none. */
int vmmig_client_send(struct vmmig_client *client, unsigned type, const ProtobufCMessage *request,
                      int fd, struct vmmig_failure *failure);
/* The next answer, of whatever type; an ERROR of the agent is a failure. timeout_ms -1: none. */
int vmmig_client_receive(struct vmmig_client *client, int timeout_ms,
                         struct vmmig_answer *ret_answer, struct vmmig_failure *failure);
/* Both, for a request with one answer, which must be of type `want`. Waits for at most two minutes; for the answer to
 * CLONE and TEMPLATE_PUBLISH, which wait for storage, as long as it takes. */
int vmmig_client_ask(struct vmmig_client *client, unsigned type, const ProtobufCMessage *request,
                     unsigned want, struct vmmig_answer *ret_answer, struct vmmig_failure *failure);
void vmmig_answer_finish(struct vmmig_answer *answer);

#ifdef __cplusplus
}
#endif
#endif

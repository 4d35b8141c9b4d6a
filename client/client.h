/* SPDX-License-Identifier: Apache-2.0 */
/*
 * client: a connection to an agent's control socket.
 *
 *     CLEANUP(client) struct client *c = client_open(&(struct client_target){.socket = path}, &err);
 *     client_call(c, VMMIG__CONTROL__TYPE__LIST, &list.base, VMMIG__CONTROL__TYPE__VMS,
 * &answer, &err);
 *     ... answer.vms->n_vms ...
 *     control_message_finish(&answer);
 *
 * An ERROR of the agent becomes the error of the call, with the agent's kind and words. Threads:
 * one.
 */
#ifndef VMMIG_CLIENT_CLIENT_H
#define VMMIG_CLIENT_CLIENT_H

#include "base/cleanup.h"
#include "base/clock.h"
#include "base/error.h"
#include "proto/control.h"

#include <stdint.h>

struct client;

/* Whom to talk to. */
struct client_target {
    const char *socket; /* of the agent of this host */
    const char *agent;  /* HOST[:PORT] of the one that it passes everything on to; NULL: itself */
};

#define CLIENT_ANY 0u /* as a type: whatever comes */
#define CLIENT_CALL_NS (120 * NSEC_PER_SEC)

/*
 * Connect and agree on a version. UNREACHABLE when no agent answers there, DENIED when it may not.
 */
struct client *client_open(const struct client_target *target, struct vm_error **err);
void client_close(struct client *c);
DEFINE_CLEANUP(client, struct client *, client_close)

int client_send(struct client *c, unsigned type, const ProtobufCMessage *request,
                    struct vm_error **err);
/* The same with a descriptor, which stays the caller's; -1: none. REFUSED of the agent of another host. */
int client_send_fd(struct client *c, unsigned type, const ProtobufCMessage *request,
                       int fd, struct vm_error **err);
/*
 * The next answer, which must be of type `want`, or CLIENT_ANY. Ends with CANCELLED when cancel_fd (-1: none)
 * becomes readable; the connection stays usable then, and the call can be repeated.
 */
int client_receive(struct client *c, unsigned want, int64_t deadline_ns, int cancel_fd,
                       struct control_message *ret_answer, struct vm_error **err);
/*
 * Send and receive. Requests that the agent answers late (a VM that boots) are waited for, for CLIENT_CALL_NS; those
 * whose work is limited by the agent alone (clones, which wait for storage; a large template that is published) without
 * limit.
 */
int64_t client_deadline_ns(unsigned type);
int client_call(struct client *c, unsigned type, const ProtobufCMessage *request,
                    unsigned want, struct control_message *ret_answer, struct vm_error **err);
/* The whole at once: connect, send, receive one answer of type `want`. */
int client_ask(const struct client_target *target, unsigned type, const ProtobufCMessage *request, unsigned want,
            struct control_message *ret_answer, struct vm_error **err);
/* protobuf-c's strings are not const, though packing does not change them. */
char *client_word(const char *text);
/* What the agent said when it greeted. */
const char *client_software(const struct client *c);

#endif

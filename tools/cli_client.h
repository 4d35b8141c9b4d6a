/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cli_client: a connection to an agent's control socket.
 *
 *     CLEANUP(cli_client) struct cli_client *c = cli_client_open(path, &err);
 *     cli_client_call(c, VMMIG__CONTROL__TYPE__LIST, &list.base, VMMIG__CONTROL__TYPE__VMS,
 * &answer, &err);
 *     ... answer.vms->n_vms ...
 *     control_message_finish(&answer);
 *
 * An ERROR of the agent becomes the error of the call, with the agent's kind and words. Threads:
 * one.
 */
#ifndef VMMIG_TOOLS_CLI_CLIENT_H
#define VMMIG_TOOLS_CLI_CLIENT_H

#include "base/cleanup.h"
#include "base/error.h"
#include "proto/control.h"

#include <stdint.h>

struct cli_client;

/*
 * Connect and agree on a version. UNREACHABLE when no agent answers there, DENIED when it may not.
 */
struct cli_client *cli_client_open(const char *socket_path, struct vm_error **err);
void cli_client_close(struct cli_client *c);
DEFINE_CLEANUP(cli_client, struct cli_client *, cli_client_close)

int cli_client_send(struct cli_client *c, unsigned type, const ProtobufCMessage *request,
                    struct vm_error **err);
/* The same with a descriptor, which stays the caller's; -1: none. */
int cli_client_send_fd(struct cli_client *c, unsigned type, const ProtobufCMessage *request,
                       int fd, struct vm_error **err);
/*
 * The next answer, which must be of type `want`. Ends with CANCELLED when cancel_fd (-1: none)
 * becomes readable; the connection stays usable then, and the call can be repeated.
 */
int cli_client_receive(struct cli_client *c, unsigned want, int64_t deadline_ns, int cancel_fd,
                       struct control_message *ret_answer, struct vm_error **err);
/* Send and receive. Requests that the agent answers late (a VM that boots) are waited for. */
int cli_client_call(struct cli_client *c, unsigned type, const ProtobufCMessage *request,
                    unsigned want, struct control_message *ret_answer, struct vm_error **err);
/* The whole at once: connect to that socket, send, receive one answer of type `want`. */
int cli_ask(const char *socket_path, unsigned type, const ProtobufCMessage *request, unsigned want,
            struct control_message *ret_answer, struct vm_error **err);
/* protobuf-c's strings are not const, though packing does not change them. */
char *cli_word(const char *text);
/* What the agent said when it greeted. */
const char *cli_client_software(const struct cli_client *c);

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/* libvmmig-client: what vmmig-client.h promises, out of client/client.h. */
#include <vmmig-client.h>

#include "base/clock.h"
#include "client/client.h"

#include <stdio.h>
#include <stdlib.h>

struct vmmig_client {
    struct client *client;
};

static int fail(struct vmmig_failure *failure, struct vm_error *err)
{
    enum vm_error_kind kind = err ? err->kind : VM_ERROR_FAILED;
    *failure = (struct vmmig_failure){.status = error_kind_status(kind)};
    snprintf(failure->kind, sizeof(failure->kind), "%s", error_kind_name(kind));
    snprintf(failure->text, sizeof(failure->text), "%s", error_message(err));
    error_free(err);
    return -1;
}

struct vmmig_client *vmmig_client_open(const char *socket_path, struct vmmig_failure *failure)
{
    struct vm_error *err = NULL;
    struct vmmig_client *c = calloc(1, sizeof(*c));
    if (!c)
        error_nomem(&err);
    else if ((c->client = client_open(&(struct client_target){.socket = socket_path}, &err)))
        return c;
    free(c);
    fail(failure, err);
    return NULL;
}

void vmmig_client_close(struct vmmig_client *c)
{
    if (c)
        client_close(c->client);
    free(c);
}

int vmmig_client_send(struct vmmig_client *c, unsigned type, const ProtobufCMessage *request, int fd,
                      struct vmmig_failure *failure)
{
    struct vm_error *err = NULL;
    return client_send_fd(c->client, type, request, fd, &err) < 0 ? fail(failure, err) : 0;
}

static int receive(struct vmmig_client *c, unsigned want, int64_t deadline_ns,
                   struct vmmig_answer *ret_answer, struct vm_error **err)
{
    struct control_message *m = calloc(1, sizeof(*m));
    if (!m)
        return error_nomem(err);
    if (client_receive(c->client, want, deadline_ns, -1, m, err) < 0) {
        free(m);
        return -1;
    }
    *ret_answer = (struct vmmig_answer){.type = m->type, .message = m->any, .owned = m};
    return 0;
}

int vmmig_client_receive(struct vmmig_client *c, int timeout_ms, struct vmmig_answer *ret_answer,
                         struct vmmig_failure *failure)
{
    struct vm_error *err = NULL;
    int64_t deadline = timeout_ms < 0 ? INT64_MAX : clock_mono_ns() + timeout_ms * NSEC_PER_MSEC;
    return receive(c, CLIENT_ANY, deadline, ret_answer, &err) < 0 ? fail(failure, err) : 0;
}

int vmmig_client_ask(struct vmmig_client *c, unsigned type, const ProtobufCMessage *request,
                     unsigned want, struct vmmig_answer *ret_answer, struct vmmig_failure *failure)
{
    struct vm_error *err = NULL;
    return client_send(c->client, type, request, &err) < 0 ||
                   receive(c, want, client_deadline_ns(type), ret_answer, &err) < 0
               ? fail(failure, err)
               : 0;
}

void vmmig_answer_finish(struct vmmig_answer *answer)
{
    if (answer->owned)
        control_message_finish(answer->owned);
    free(answer->owned);
    *answer = (struct vmmig_answer){0};
}

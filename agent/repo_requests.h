/* SPDX-License-Identifier: Apache-2.0 */
/*
 * repo_requests: REPO, the commands about the agent's repository (repo/service.h). What takes long
 * becomes a job; the rest is answered in the session's thread.
 *
 * The agent may have more rights than the client, a member of the control group. So it opens no
 * path that a client names: what is imported and exported comes as a descriptor that the client
 * opened, and a copy to another repository is for root and the agent's own user alone.
 */
#ifndef VMMIG_AGENT_REPO_REQUESTS_H
#define VMMIG_AGENT_REPO_REQUESTS_H

#include "agent/control.h"

int repo_request_handle(struct control_session *s, const struct control_message *m,
                        struct vm_error **err);

#endif

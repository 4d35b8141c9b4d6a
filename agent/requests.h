/* SPDX-License-Identifier: Apache-2.0 */
/*
 * requests: what each request of the control protocol does. Called in the session's thread with a
 * checked message; may block. Sends its answers itself (control_reply); -1 with *err set becomes
 * the ERROR answer.
 */
#ifndef VMMIG_AGENT_REQUESTS_H
#define VMMIG_AGENT_REQUESTS_H

#include "agent/control.h"

int request_handle(struct control_session *s, const struct control_message *m,
                   struct vm_error **err);

#endif

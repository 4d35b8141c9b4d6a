/* SPDX-License-Identifier: Apache-2.0 */
/*
 * snapshots: the requests about snapshots (proto/control.proto), and their jobs. A snapshot or a restore is the one
 * job of its VM: `send` and others are refused meanwhile, and the reverse.
 *
 * Handlers run in the session's thread and answer it; jobs in their own.
 */
#ifndef VMMIG_AGENT_SNAPSHOTS_H
#define VMMIG_AGENT_SNAPSHOTS_H

#include "agent/control.h"
#include "agent/vms.h"
#include "snapshot/frozen.h"

/* Who thaws file systems that a snapshot froze (snapshot/frozen.h). */
struct thawer snapshots_thawer(const struct config *config);
/* Is it noted that the file systems of the guest in that VMM are frozen, or may be? */
bool snapshots_is_frozen(const struct config *config, const struct process_identity *process);
/*
 * A guest whose file systems are frozen comes into that VMM: noted now, so that no crash forgets
 * it, they are thawed when it is there. Or it never comes, and the note goes. NOT_FOUND: the VMM's
 * command line names no socket of the guest's agent.
 */
int snapshots_expect_frozen(const struct config *config, const struct process_identity *process, char *const *argv,
                            struct vm_error **err);
void snapshots_thaw_frozen(const struct config *config, const struct process_identity *process);
void snapshots_forget_frozen(const struct config *config, const struct process_identity *process);
/* driver_connect, and what a snapshot that an agent died of has left is settled first. For vms_params. */
struct guest *snapshots_connect(const struct vm_definition *d, void *arg, struct vm_error **err);
/*
 * Before a VM may change hands: whenever an agent connects to a VMM, what a snapshot that was cut short left in it, or
 * in a note of it, lets a guest that stands go on. It is settled now. -1: the VM must stay; CONFLICT while the guard of
 * that snapshot is at it.
 */
int snapshots_clear(const struct config *config, const struct vm_definition *d, struct guest *guest,
                    struct vm_error **err);
int snapshots_handle_take(struct control_session *s, const struct control_message *m,
                          struct vm_error **err);
int snapshots_handle_list(struct control_session *s, const struct control_message *m,
                          struct vm_error **err);
int snapshots_handle_delete(struct control_session *s, const struct control_message *m,
                            struct vm_error **err);
int snapshots_handle_prune(struct control_session *s, const struct control_message *m,
                           struct vm_error **err);
int snapshots_handle_restore(struct control_session *s, const struct control_message *m,
                             struct vm_error **err);

#endif

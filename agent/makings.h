/* SPDX-License-Identifier: Apache-2.0 */
/*
 * makings: what a clone or a restored VM consists of before it is a VM of this agent: so that
 * nothing of it is left when the agent dies meanwhile.
 *
 *     making_begin(&m, config, "web2", &err)
 *     making_lease(&m, holder, &err)                     before it is taken
 *     making_file(&m, path, &err)                        when it was made
 *     launch.born = making_born, .born_arg = &m          its process, before it becomes a VMM
 *     ... vms_add: from here on it is a VM ...
 *     making_end(&m)                                     also when it failed, and everything was
 * taken back making_leave(&m, agent, made)                      or a lease or an image in Ceph
 * could not be yet
 *
 *     agent.makings = makings_start(agent, &err), makings_finish(...)   at the agent's start, and
 * its end
 *
 * A file of notes STATE_DIR/making/NAME, a line each. After a crash of the agent makings_start
 * decides upon it, once: if the VM of that name is not that process, it kills that, and removes
 * files and folders, if they are the very ones (device, inode and birth), so never what somebody
 * else put there since. What remains to be done, of images in Ceph and leases, since Ceph and the
 * repository may be away, becomes another note, NAME~NUMBER, which a thread acts upon at once and
 * each minute, until it is done. A file that was made and not yet noted stays, empty: that is
 * better than to remove what is not ours. Notes are not synced: a crash of the host takes the
 * process along, and may leave files.
 *
 * Threads: a making is one thread's.
 */
#ifndef VMMIG_AGENT_MAKINGS_H
#define VMMIG_AGENT_MAKINGS_H

#include "agent/agent.h"
#include "base/process.h"

#include <stdbool.h>

struct making {
    int fd;
    char path[4096];
};

#define MAKING_NONE ((struct making){.fd = -1})

int making_begin(struct making *m, const struct config *config, const char *vm,
                 struct vm_error **err);
int making_lease(struct making *m, const char *holder, struct vm_error **err);
/* A file or an empty folder; of several the later goes first. */
int making_file(struct making *m, const char *path, struct vm_error **err);
/* An image in Ceph, and its id (snapshot/rbd_image.h), before it is made or gets that name. */
int making_image(struct making *m, const char *name, const char *id, struct vm_error **err);
int making_socket(struct making *m, const char *path, struct vm_error **err);
int making_cgroup(struct making *m, const char *path, struct vm_error **err);
/* arg is the making (vmm/spawn.h). */
int making_born(const struct process_identity *process, void *arg, struct vm_error **err);
/* Of one that was never begun, too, as is the next. */
void making_end(struct making *m);
/* made: the VM is there, and its images stay. */
void making_leave(struct making *m, struct agent *agent, bool made);

struct makings;

struct makings *makings_start(struct agent *agent, struct vm_error **err);
/* Waits for the thread, a while: false if it is still asking a repository that does not answer. */
bool makings_finish(struct makings *m);

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * clones: the requests about templates, clones and the mount (proto/control.proto). They are
 * answered when they are done: a clone takes as long as its VMM needs to start.
 *
 * Handlers run in the session's thread.
 */
#ifndef VMMIG_AGENT_CLONES_H
#define VMMIG_AGENT_CLONES_H

#include "agent/control.h"
#include "agent/config.h"
#include "snapshot/mount.h"
#include "vmm/qemu_definition.h"

/* The mount as the configuration says; its leases are known by an id in the state folder. */
struct mount *clones_create_mount(const struct config *config, struct vm_error **err);
/* Is it a file of the mount? Such a one is known by its name. */
bool clones_is_mounted(struct agent *agent, const struct qemu_disk *disk);
/*
 * A VM is to arrive here. If its disks are overlays on files of the mount, that is mounted now, and has them: NOT_FOUND
 * by the template's name if not. From the VMM's start on the template is leased. REFUSED if such a file is of an image
 * that is no template's version: its content may be another one here.
 */
int clones_show_templates(struct agent *agent, const struct qemu_definition *d,
                          struct vm_error **err);

int clones_handle_publish(struct control_session *s, const struct control_message *m,
                          struct vm_error **err);
int clones_handle_list(struct control_session *s, const struct control_message *m,
                       struct vm_error **err);
int clones_handle_show(struct control_session *s, const struct control_message *m,
                       struct vm_error **err);
int clones_handle_delete(struct control_session *s, const struct control_message *m,
                         struct vm_error **err);
int clones_handle_clone(struct control_session *s, const struct control_message *m,
                        struct vm_error **err);
int clones_handle_mount(struct control_session *s, const struct control_message *m,
                        struct vm_error **err);
int clones_handle_unmount(struct control_session *s, const struct control_message *m,
                          struct vm_error **err);

#endif

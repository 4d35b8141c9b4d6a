/* SPDX-License-Identifier: Apache-2.0 */
/*
 * qemu_settings: capabilities and parameters of QEMU's migration are its user's. What the driver needs otherwise it
 * sets, and sets it back when it is done.
 *
 *     qemu_settings_use(q, on, values, &err)     keeps what was set, if nothing is kept yet; then sets
 *     ... a migration, a snapshot ...
 *     qemu_settings_restore(q)                   once QEMU migrates no more; nothing if nothing is kept
 *
 * A crash of the agent in between leaves QEMU as the driver wants it. Threads: any.
 */
#ifndef VMMIG_VMM_QEMU_SETTINGS_H
#define VMMIG_VMM_QEMU_SETTINGS_H

#include "vmm/qemu.h"

/* Turn every capability but these (ended by NULL) off, and set the parameters; takes `values`. */
int qemu_settings_use(struct qemu *q, const char *const *on, json_t *values, struct vm_error **err);
/* What cannot be set back is logged. */
void qemu_settings_restore(struct qemu *q);
/* Forget what is kept, if something is. */
void qemu_settings_drop(struct qemu *q);

#endif

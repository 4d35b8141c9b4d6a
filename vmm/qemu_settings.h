/* SPDX-License-Identifier: Apache-2.0 */
/*
 * qemu_settings: capabilities and parameters of QEMU's migration are its user's. What the driver needs otherwise it
 * sets, and sets it back when it is done.
 *
 *     qemu_settings_use(q, on, values, &err)     keeps what was set, if nothing is kept yet; then sets
 *     ... a migration, a snapshot ...
 *     qemu_settings_restore(q)                   once QEMU migrates no more; nothing if nothing is kept
 *
 * What is kept stands in QEMU itself, too (an object QEMU_SETTINGS_NOTE of its own), so that it lives as long as what
 * it is about. After a crash in between the next agent recovers it, and sets it back as soon as QEMU migrates no more.
 * Threads: any.
 */
#ifndef VMMIG_VMM_QEMU_SETTINGS_H
#define VMMIG_VMM_QEMU_SETTINGS_H

#include "vmm/qemu.h"

#define QEMU_SETTINGS_NOTE "vmmig-settings"

/* Turn every capability but these (ended by NULL) off, and set the parameters; takes `values`. */
int qemu_settings_use(struct qemu *q, const char *const *on, json_t *values, struct vm_error **err);
/* What cannot be set back is logged. */
void qemu_settings_restore(struct qemu *q);
/*
 * What a former agent kept, if it did not come to set it back. QEMU may still be about to find out that nobody reads
 * what it sends: then a thread waits for that, which the next use ends. A QEMU that waits for its guest keeps what is
 * set until it is restored. Failures are logged.
 */
void qemu_settings_recover(struct qemu *q);
/* The end of the handle: forget what is kept, and end the thread. QEMU's own note stays. */
void qemu_settings_finish(struct qemu *q);

#endif

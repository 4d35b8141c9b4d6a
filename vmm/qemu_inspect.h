/* SPDX-License-Identifier: Apache-2.0 */
/*
 * qemu_inspect: what a QEMU is, asked over QMP. Shared by preflight and verify; used within vmm/ only.
 * Every function fills the part of the definition that its name says, and leaves the rest.
 */
#ifndef VMMIG_VMM_QEMU_INSPECT_H
#define VMMIG_VMM_QEMU_INSPECT_H

#include "vmm/qemu.h"
#include "vmm/qemu_definition.h"

/* machine, accel, version */
int qemu_inspect_machine(struct qemu *q, struct qemu_definition *d, struct vm_error **err);
/* n_cpus, cpu_model, cpu_features */
int qemu_inspect_cpus(struct qemu *q, struct qemu_definition *d, struct vm_error **err);
/* devices, sorted by path */
int qemu_inspect_devices(struct qemu *q, struct qemu_definition *d, struct vm_error **err);

/* A RAM block as `info ramblock` shows it. */
struct qemu_ram_block {
    char name[GUEST_REGION_NAME_MAX];
    uint64_t page_size, used;
};
/* All of them: an allocated array; free it. */
int qemu_inspect_ram_blocks(struct qemu *q, struct qemu_ram_block **ret_blocks, unsigned *ret_n,
                            struct vm_error **err);
/* The block of a memory backend: its id, or its QOM path, as the machine names blocks. NULL: none. */
const struct qemu_ram_block *qemu_find_ram_block(const struct qemu_ram_block *blocks, unsigned n,
                                                 const char *name);
/* strdup to *to after freeing it. */
int qemu_set_text(char **to, const char *text, struct vm_error **err);

#endif

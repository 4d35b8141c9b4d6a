/* SPDX-License-Identifier: Apache-2.0 */
/*
 * qemu_memory: the memory of a guest that is about to arrive: one memfd per region, mapped here, inherited by
 * its QEMU, and a way to have pages charged to QEMU (vmm/qemu.h, "Charging").
 *
 *     struct qemu_memory *m = qemu_memory_create("web1", definition, &err);
 *     qemu_memory_fds(m)                     into the command line, and inherited
 *     ... QEMU runs ...
 *     qemu_memory_bind(m, &process, &err)    find QEMU's mappings, close the descriptors
 *     qemu_memory_populate(m, addrs, n, &err)
 *
 * Mappings are shared, not reserved, not in core dumps; nothing is touched here. Threads: populate any, the rest one.
 */
#ifndef VMMIG_VMM_QEMU_MEMORY_H
#define VMMIG_VMM_QEMU_MEMORY_H

#include "base/cleanup.h"
#include "base/error.h"
#include "base/process.h"
#include "vmm/guest.h"
#include "vmm/qemu_definition.h"

struct qemu_memory;

/* NO_SPACE when there are not enough huge pages. */
struct qemu_memory *qemu_memory_create(const char *vm, const struct qemu_definition *d,
                                       struct vm_error **err);
/* Unmapped as well: only the list of regions. */
struct qemu_memory *qemu_memory_create_unmapped(const struct qemu_definition *d,
                                                struct vm_error **err);
void qemu_memory_destroy(struct qemu_memory *m);
DEFINE_CLEANUP(qemu_memory, struct qemu_memory *, qemu_memory_destroy)

const struct guest_region *qemu_memory_regions(const struct qemu_memory *m, unsigned *ret_n);
/* As many as regions; valid until bind. */
const int *qemu_memory_fds(const struct qemu_memory *m);
int qemu_memory_bind(struct qemu_memory *m, const struct process_identity *process,
                     struct vm_error **err);
int qemu_memory_populate(struct qemu_memory *m, const uint64_t *addrs, unsigned n,
                         struct vm_error **err);

#endif

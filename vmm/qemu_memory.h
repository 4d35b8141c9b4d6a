/* SPDX-License-Identifier: Apache-2.0 */
/*
 * qemu_memory: the memory of a guest that is about to arrive. What others share with QEMU and what is of huge
 * pages is a memfd per region, mapped here and inherited by QEMU, with a way to have its pages charged to QEMU
 * (vmm/qemu.h, "Charging"). All else is QEMU's own private memory, written in its own mapping: that is what the
 * guest had before, it may be of transparent huge pages, and a page of it costs less than one of a memfd
 * (vmm/guest_memory.h). Where this process may not reach QEMU's memory, that is a memfd as well.
 *
 *     struct qemu_memory *m = qemu_memory_create("web1", definition, &err);
 *     qemu_memory_fds(m)                     into the command line, and inherited; -1: QEMU makes its own
 *     ... QEMU runs ...
 *     qemu_memory_bind(m, q, &err)           find QEMU's mappings, close the descriptors
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
#include "vmm/qemu.h"
#include "vmm/qemu_definition.h"

struct qemu_memory;

/* NO_SPACE when there are not enough huge pages. */
struct qemu_memory *qemu_memory_create(const char *vm, const struct qemu_definition *d,
                                       struct vm_error **err);
/* Of a QEMU that is there already: only the list of regions, until bind. */
struct qemu_memory *qemu_memory_create_unmapped(const struct qemu_definition *d,
                                                struct vm_error **err);
void qemu_memory_destroy(struct qemu_memory *m);
DEFINE_CLEANUP(qemu_memory, struct qemu_memory *, qemu_memory_destroy)

const struct guest_region *qemu_memory_regions(const struct qemu_memory *m, unsigned *ret_n);
/* As many as regions; valid until bind. */
const int *qemu_memory_fds(const struct qemu_memory *m);
/* What cannot be found stays out of reach, where it is QEMU's own. */
int qemu_memory_bind(struct qemu_memory *m, struct qemu *q, struct vm_error **err);
int qemu_memory_populate(struct qemu_memory *m, const uint64_t *addrs, unsigned n,
                         struct vm_error **err);

#endif

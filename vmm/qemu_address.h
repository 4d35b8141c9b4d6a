/* SPDX-License-Identifier: Apache-2.0 */
/*
 * qemu_address: where a QEMU has its guest's memory in its own address space, as it says itself: a
 * region's guest-physical address out of `info mtree -f`, and what `gpa2hva` makes of it. Each answer
 * is checked against /proc/PID/maps before it is believed.
 *
 * Needs the right to reach another process's memory (CAP_SYS_PTRACE); qemu_address_may says whether
 * this process has it. Threads: as the QEMU's.
 */
#ifndef VMMIG_VMM_QEMU_ADDRESS_H
#define VMMIG_VMM_QEMU_ADDRESS_H

#include "vmm/guest.h"
#include "vmm/qemu.h"

#include <stdbool.h>

bool qemu_address_may(void);
/*
 * `process_fd`: QEMU's pidfd, which outlives the regions. Sets `remote` and `process` of each
 * region that can be written so; the others stay as they are, and the log says why. -1 only if QEMU
 * does not answer.
 */
int qemu_address_find(struct qemu *q, int process_fd, struct guest_region *regions, unsigned n,
                      struct vm_error **err);

/* The steps, for tests. */

/* A range of guest-physical addresses at which `region` lies from byte `offset` on. */
struct qemu_address_range {
    uint64_t start, offset;
};
/* One for a region named so, in the flat view of the guest's memory; false if there is none. */
bool qemu_address_parse_tree(const char *text, const char *region,
                             struct qemu_address_range *ret_range);
/* "Host virtual address for 0x0 (pc.ram) is 0x7f...": the address, if the name is the region's. */
bool qemu_address_parse_host(const char *text, const char *region, uint64_t *ret_address);

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * qemu_disks: the block graph of a running VM, compared with its command line, or with that of the
 * QEMU which was prepared for its guest. Pure: a graph comes as the replies of
 * query-named-block-nodes and query-block. Used within vmm/ only.
 *
 * Every file that the VM has open, other than a backing file of an image, must be named by the
 * command line, and every file that the command line names must be open. A difference is REFUSED
 * and names the disk and both files: a destination started from the stale command line would run on
 * the wrong disk without an error.
 */
#ifndef VMMIG_VMM_QEMU_DISKS_H
#define VMMIG_VMM_QEMU_DISKS_H

#include "vmm/qemu_argv.h"
#include "vmm/qemu_definition.h"

#include <jansson.h>

/* Add the disks to the definition. */
int qemu_disks_list(const json_t *nodes, const json_t *backends, struct qemu_definition *d,
                    struct vm_error **err);
/* Those that were listed. */
int qemu_disks_compare(const struct qemu_argv *argv, const json_t *backends,
                       const struct qemu_definition *d, struct vm_error **err);

/* Was the graph, as it was listed before, left as it is? REFUSED, by the first disk that differs. */
int qemu_disks_check_same(const struct qemu_definition *before, const struct qemu_definition *now,
                          struct vm_error **err);

/*
 * Which disk of `here`, a QEMU with the same devices, is which of the VM? ret_pairs[i], for each
 * writable d->disks[i], is an index in here->disks. REFUSED, by name, unless each has one, which is
 * writable, and none is left over.
 */
int qemu_disks_pair(const struct qemu_definition *d, const struct qemu_definition *here,
                    unsigned *ret_pairs, struct vm_error **err);

#endif

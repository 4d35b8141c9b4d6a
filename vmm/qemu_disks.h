/* SPDX-License-Identifier: Apache-2.0 */
/*
 * qemu_disks: a command line compared with the block graph of the running VM. Pure: the graph comes as the
 * replies of query-named-block-nodes and query-block. Used within vmm/ only.
 *
 * Every file that the VM has open, other than a backing file of an image, must be named by the command line,
 * and every file that the command line names must be open. A difference is REFUSED and names the disk and both
 * files: a destination started from the stale command line would run on the wrong disk without an error.
 */
#ifndef VMMIG_VMM_QEMU_DISKS_H
#define VMMIG_VMM_QEMU_DISKS_H

#include "vmm/qemu_argv.h"
#include "vmm/qemu_definition.h"

#include <jansson.h>

/* Add the disks to the definition. */
int qemu_disks_compare(const struct qemu_argv *argv, const json_t *nodes, const json_t *backends,
                       struct qemu_definition *d, struct vm_error **err);

#endif

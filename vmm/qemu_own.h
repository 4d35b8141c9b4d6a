/* SPDX-License-Identifier: Apache-2.0 */
/*
 * qemu_own: paths of its own for a VM whose command line is another one's: so that a second QEMU of
 * it takes no socket away from the first, and writes into no file of its.
 *
 * What QEMU makes gets another path: sockets at which it listens (-qmp, -monitor, -serial, -vnc,
 * -chardev, ...), and files that it writes. The former VM's name in a path's last part becomes the
 * new one; where it is not in it, "NAME-" is put before that. Pure; any thread.
 */
#ifndef VMMIG_VMM_QEMU_OWN_H
#define VMMIG_VMM_QEMU_OWN_H

#include "vmm/qemu_argv.h"
#include "vmm/qemu_definition.h"

struct qemu_own {
    const char *former; /* "": not known */
    const char *name;
    /* So does what others make: pipes and sockets that it connects to, of -chardev if the former
     * name is in their path. */
    bool connects;
};

/* The option of that number, whatever it is. */
int qemu_own_option(const struct qemu_own *own, struct qemu_argv *a, unsigned i, struct vm_error **err);
/* All options of a definition's command line. */
int qemu_own_definition(const struct qemu_own *own, struct qemu_definition *d, struct vm_error **err);

#endif

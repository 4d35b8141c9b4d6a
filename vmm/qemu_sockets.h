/* SPDX-License-Identifier: Apache-2.0 */
/*
 * qemu_sockets: the Unix sockets at which a QEMU of a command line would listen (-qmp, -monitor, -serial, -vnc,
 * -chardev, ...). QEMU removes whatever socket is at such a path before it listens there itself: that of another VM
 * whose command line names the same one, too, which then cannot be reached any more. Threads: any.
 */
#ifndef VMMIG_VMM_QEMU_SOCKETS_H
#define VMMIG_VMM_QEMU_SOCKETS_H

#include "base/error.h"

/*
 * REFUSED, with the option's path, if somebody listens at one of them on this host. A socket that nobody listens at any
 * more is none. Relative paths refer to `cwd`. To find out, each is connected to, and closed at once.
 */
int qemu_sockets_check_free(char *const *argv, const char *cwd, struct vm_error **err);

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * activation: programs that take over a socket which listens already, as systemd hands it to them: nbdkit, qemu-nbd. Who
 * made the socket has connected before they run, or is sure that nobody else can.
 *
 *     const char *argv[] = {"qemu-nbd", "--", path, NULL};
 *     if (activation_spawn(argv, &listener, 1, false, &pid, err) < 0) ...
 *
 * The program has fds[0], which listens, as ACTIVATION_LISTENER, and the others of fds behind it; /dev/null as standard
 * input; no signal blocked. They stay the caller's, too. detached: it has a session of its own, so that a terminal's
 * Ctrl-C does not reach it, and its output goes nowhere; else it has the caller's. The caller waits for it (*ret_pid).
 * -1 with an error, and *ret_pid as it was, if it cannot be run. Threads: any.
 */
#ifndef VMMIG_BASE_ACTIVATION_H
#define VMMIG_BASE_ACTIVATION_H

#include "base/error.h"

#include <stdbool.h>
#include <sys/types.h>

enum { ACTIVATION_LISTENER = 3, ACTIVATION_FDS_MAX = 2 };

int activation_spawn(const char *const *argv, const int *fds, unsigned n, bool detached, pid_t *ret_pid,
                     struct vm_error **err);

#endif

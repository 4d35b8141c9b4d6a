/* SPDX-License-Identifier: Apache-2.0 */
/*
 * write_protection: lift from outside what a VMM's background snapshot left on its memory.
 *
 *     write_protection_lift(&process, &found, &err)      its threads that wait for a page go on
 *
 * QEMU 7.2 protects the guest's memory with userfaultfd while a background snapshot is under way,
 * and lifts that at the snapshot's good end only: when it fails (its stream breaks off, it is
 * cancelled), the next write of the guest, or of QEMU itself on the guest's behalf, waits for ever.
 * A userfaultfd works on the memory of who made it, whoever holds it: so it is borrowed from the
 * process (pidfd_getfd, which needs the right to trace it), the protection is taken away, and who
 * waits is woken. What happens in that memory is not touched.
 *
 * Not while a snapshot is under way that somebody wants: it would no longer be of one instant.
 * Idempotent. Threads: any.
 */
#ifndef VMMIG_VMM_WRITE_PROTECTION_H
#define VMMIG_VMM_WRITE_PROTECTION_H

#include "base/error.h"
#include "base/process.h"

#include <stdbool.h>

/*
 * *ret_found: some memory was protected. A process that is gone has none. REFUSED or SYSTEM if the kernel does not
 * let us, and the guest stays as it is.
 */
int write_protection_lift(const struct process_identity *process, bool *ret_found,
                          struct vm_error **err);

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fault: named points at which a test makes the program fail.
 *
 *     if (FAULT("journal.commit") == FAULT_ERROR)
 *         return error_errno(err, fault_errno(), "cannot commit the journal");
 *
 * A point does nothing until it is armed (VMMIG_FAULTS in the environment, or fault_arm) with
 *
 *     NAME=ACTION[:ARGUMENT][@N]      several separated by commas; @N: at the Nth passage (default 1st),
 *                                     @*: at every passage
 *
 *     crash         the process ends at once, as by kill -9
 *     error[:ERRNO] FAULT() returns FAULT_ERROR, fault_errno() the errno (default EIO)
 *     delay:MS      the thread sleeps
 *     hang          the thread sleeps for ever
 *     drop          FAULT() returns FAULT_DROP: the caller loses the message
 *     duplicate     FAULT() returns FAULT_DUPLICATE: the caller sends it twice
 *     corrupt       FAULT() returns FAULT_CORRUPT: the caller flips a byte
 *
 * Crash, delay and hang act inside FAULT(); a caller handles those of the other actions that make
 * sense at its point, and ignores the rest. Without -Dfaults=true (never in a release) FAULT() is
 * the constant FAULT_NONE and the names are not in the binary. Threads: any.
 */
#ifndef VMMIG_BASE_FAULT_H
#define VMMIG_BASE_FAULT_H

#include "base/error.h"

enum fault_result { FAULT_NONE, FAULT_ERROR, FAULT_DROP, FAULT_DUPLICATE, FAULT_CORRUPT };

#ifdef VMMIG_FAULTS
#define FAULT(name)                                                                                \
    ({                                                                                             \
        static const char *const fault_name_                                                       \
            __attribute__((section("vmmig_faults"), used)) = (name);                               \
        fault_hit(fault_name_);                                                                    \
    })
enum fault_result fault_hit(const char *name);
/* errno of the last FAULT_ERROR in this thread. */
int fault_errno(void);
/* Arm points by the grammar above; "" disarms all. A name that no point bears is an error. */
int fault_arm(const char *spec, struct vm_error **err);
/* Call visit for every point compiled in, in no order; a name may come more than once. */
void fault_list(void (*visit)(const char *name, void *arg), void *arg);
#else
#define FAULT(name) FAULT_NONE
static inline int fault_errno(void)
{
    return 0;
}
#endif

/* Arm from VMMIG_FAULTS. In a build without faults a set variable is an error, not ignored. */
int fault_init(struct vm_error **err);

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fault: named points at which a test makes the program fail.
 *
 *     if (FAULT("journal.write") == FAULT_ERROR)
 *         return error_errno(err, fault_errno(), "journal: cannot write");
 *
 * A point does nothing until it is armed (VMMIG_FAULTS in the environment, or fault_arm) with
 *
 *     NAME=ACTION[:ARGUMENT][@N]      several separated by commas; @N: at the Nth passage (default
 *                                     the first), @*: at every passage
 *
 *     crash         the process ends at once, as by kill -9
 *     error[:ERRNO] FAULT() returns FAULT_ERROR, fault_errno() the errno (default EIO)
 *     delay:MS      the thread sleeps
 *     hang          the thread sleeps for ever
 *     hold          the thread sleeps until other faults are armed, or none: a test does meanwhile
 *                   what is to happen at this point
 *     drop          FAULT() returns FAULT_DROP: the caller loses the message
 *     duplicate     FAULT() returns FAULT_DUPLICATE: the caller sends it twice
 *     corrupt       FAULT() returns FAULT_CORRUPT: the caller flips a byte
 *     jump:MS       of a clock: it goes wrong by that much
 *     mistake       FAULT() returns FAULT_MISTAKE at points named mistake.*: the program does what
 *                   a careless programmer might have written, for tests that must notice
 *
 * Crash, delay, hang and hold act inside FAULT(); a caller handles those of the other actions that
 * make sense at its point, and ignores the rest. A running agent lists and arms points by `vmmig
 * debug faults`. A program that nobody can ask, as a VMM is, appends NAME=ACTION to the file that
 * VMMIG_FAULTS_TOLD in the environment names, before a fault acts. Without -Dfaults=true (never in
 * a release) FAULT() is the constant FAULT_NONE and the names are not in the binary. Threads: any.
 *
 * Patience. Limits after which the program gives up or tries again are told by fault_patience_ns;
 * with faults compiled in, VMMIG_PATIENCE=N in the environment divides them, so that a test does
 * not wait for minutes. It does not touch what a user sets.
 */
#ifndef VMMIG_BASE_FAULT_H
#define VMMIG_BASE_FAULT_H

#include "base/clock.h"
#include "base/error.h"

#include <stdbool.h>

enum fault_result {
    FAULT_NONE,
    FAULT_ERROR,
    FAULT_DROP,
    FAULT_DUPLICATE,
    FAULT_CORRUPT,
    FAULT_JUMP,
    FAULT_MISTAKE
};

#define FAULT_SPEC_MAX 1024 /* bytes of one specification */

/* A point as `fault_list` shows it. */
struct fault_point {
    const char *name;
    char armed[80];  /* "crash@2"; empty: not armed */
    unsigned acted;  /* how often it acted since it was armed */
    bool holds;      /* a thread sleeps there now */
};

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
/* Milliseconds of the last FAULT_JUMP in this thread. */
int fault_jump_ms(void);
int64_t fault_patience_ns(int64_t ms);
#else
#define FAULT(name) fault_none()
static inline enum fault_result fault_none(void)
{
    return FAULT_NONE;
}
static inline int fault_errno(void)
{
    return 0;
}
static inline int64_t fault_patience_ns(int64_t ms)
{
    return ms * NSEC_PER_MSEC;
}
#endif

/*
 * Arm points by the grammar above, instead of all that were armed; "" and "none" disarm all. USAGE
 * for a name that no point bears; VERSION in a build without fault points.
 */
int fault_arm(const char *spec, struct vm_error **err);
/* Call visit for every point compiled in, sorted by name, each name once. */
typedef void fault_visit(const struct fault_point *point, void *arg);
int fault_list(fault_visit *visit, void *arg, struct vm_error **err);

/* Arm from VMMIG_FAULTS. In a build without faults a set variable is an error, not ignored; so is
 * VMMIG_PATIENCE. */
int fault_init(struct vm_error **err);

#endif

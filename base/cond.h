/* SPDX-License-Identifier: Apache-2.0 */
/* cond: condition variables whose deadlines are monotonic nanoseconds, as everywhere (base/clock.h). */
#ifndef VMMIG_BASE_COND_H
#define VMMIG_BASE_COND_H

#include "base/clock.h"

#include <errno.h>
#include <pthread.h>
#include <stdbool.h>

static inline void cond_init(pthread_cond_t *cond)
{
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(cond, &monotonic);
    pthread_condattr_destroy(&monotonic);
}

/* False once the deadline has passed; INT64_MAX waits for ever. As always, look at the state again. */
static inline bool cond_wait_until(pthread_cond_t *cond, pthread_mutex_t *lock, int64_t deadline_ns)
{
    if (deadline_ns == INT64_MAX)
        return pthread_cond_wait(cond, lock) == 0;
    struct timespec t = {deadline_ns / NSEC_PER_SEC, deadline_ns % NSEC_PER_SEC};
    return pthread_cond_timedwait(cond, lock, &t) != ETIMEDOUT;
}

#endif

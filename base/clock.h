/* SPDX-License-Identifier: Apache-2.0 */
/*
 * clock: the two clocks. Durations and deadlines are monotonic nanoseconds; wall time is only shown.
 * With fault points compiled in, the point clock.wall makes wall time wrong (base/fault.h).
 */
#ifndef VMMIG_BASE_CLOCK_H
#define VMMIG_BASE_CLOCK_H

#include <stdint.h>
#include <time.h>

#define NSEC_PER_USEC 1000LL
#define NSEC_PER_MSEC 1000000LL
#define NSEC_PER_SEC 1000000000LL

static inline int64_t clock_read_ns(clockid_t id)
{
    struct timespec t;
    clock_gettime(id, &t);
    return t.tv_sec * NSEC_PER_SEC + t.tv_nsec;
}

static inline int64_t clock_mono_ns(void)
{
    return clock_read_ns(CLOCK_MONOTONIC);
}

#ifdef VMMIG_FAULTS
int64_t clock_wall_ns(void); /* base/fault.c */
#else
static inline int64_t clock_wall_ns(void)
{
    return clock_read_ns(CLOCK_REALTIME);
}
#endif

/* CPU time of the calling thread. */
static inline int64_t clock_thread_cpu_ns(void)
{
    return clock_read_ns(CLOCK_THREAD_CPUTIME_ID);
}

/* Milliseconds from now until the deadline for poll(2): at least 0, rounded up; -1 for "never". */
static inline int clock_ms_until(int64_t deadline_ns)
{
    if (deadline_ns == INT64_MAX)
        return -1;
    int64_t left = deadline_ns - clock_mono_ns();
    if (left <= 0)
        return 0;
    left = (left + NSEC_PER_MSEC - 1) / NSEC_PER_MSEC;
    return left > 1000000000 ? 1000000000 : (int)left;
}

#endif

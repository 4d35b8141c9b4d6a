/* SPDX-License-Identifier: Apache-2.0 */
#include "migrate/cores.h"

#include "base/cleanup.h"
#include "base/clock.h"

#include <stdio.h>
#include <time.h>
#include <unistd.h>

/*
 * Full: no more of the time is idle, and this agent has used at least so much of one core. Measured: raw pages
 * over 1 Gbit/s take 0.08. The kernel counts idle time in steps of 10 ms: on two cores that a migration kept busy each
 * look saw none, one or two of them, now and then three.
 */
#define IDLE_SHARE_MAX 0.1
#define IDLE_NOISE_NS (20 * NSEC_PER_MSEC)
#define OWN_CORES_MIN 0.2

static bool look(struct cores_times *ret)
{
    double up, idle;
    struct timespec own;
    cleanup_fclose FILE *f = fopen("/proc/uptime", "re");
    if (!f || fscanf(f, "%lf %lf", &up, &idle) != 2 ||
        clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &own) < 0)
        return false;
    *ret = (struct cores_times){clock_mono_ns(), (int64_t)(idle * 1e9),
                                own.tv_sec * NSEC_PER_SEC + own.tv_nsec};
    return true;
}

bool cores_judge(const struct cores_times *before, const struct cores_times *after, unsigned cores)
{
    double time = (double)(after->now_ns - before->now_ns);
    return (double)(after->idle_ns - before->idle_ns) <= IDLE_SHARE_MAX * time * cores + IDLE_NOISE_NS &&
           (double)(after->own_ns - before->own_ns) >= OWN_CORES_MIN * time;
}

bool cores_are_full(struct cores_watch *w)
{
    struct cores_times now;
    if (w->known && clock_mono_ns() - w->last.now_ns < CORES_INTERVAL_MS * NSEC_PER_MSEC)
        return w->full;
    if (!look(&now))
        return false;
    w->full = !w->known || cores_judge(&w->last, &now, (unsigned)sysconf(_SC_NPROCESSORS_ONLN));
    w->known = true;
    w->last = now;
    return w->full;
}

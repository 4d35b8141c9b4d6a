/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cores: is it this host's cores that limit a migration? They do when none is idle and this agent
 * is among those who keep them busy. Compression would then take more of what is lacking.
 *
 *     struct cores_watch watch = {0};
 *     every few milliseconds:
 *         if (cores_are_full(&watch)) ...
 *
 * Judged anew every CORES_INTERVAL_MS; before the first time the answer is yes. A host that is full
 * of others' work, while this agent waits for a slow link, is not full in this sense. Where the
 * kernel does not tell (no /proc/uptime) the answer is no. One thread.
 */
#ifndef VMMIG_MIGRATE_CORES_H
#define VMMIG_MIGRATE_CORES_H

#include <stdbool.h>
#include <stdint.h>

#define CORES_INTERVAL_MS 60 /* the kernel counts idle time in steps of 10 ms */

/* What a look saw: times since boot, or since the process began, of all cores together. */
struct cores_times {
    int64_t now_ns, idle_ns, own_ns;
};

struct cores_watch {
    struct cores_times last;
    bool known, full;
};

bool cores_are_full(struct cores_watch *w);
/* The judgement itself, of two looks on a machine with so many cores. */
bool cores_judge(const struct cores_times *before, const struct cores_times *after, unsigned cores);

#endif

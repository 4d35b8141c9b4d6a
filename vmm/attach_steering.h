/* SPDX-License-Identifier: Apache-2.0 */
/*
 * attach_steering: how much of their time the vCPUs of a guest that is copied lose, so that the
 * copy comes to an end. A pure judge: it is told of each round that has ended, and answers.
 *
 *     struct attach_steering s = {.limit_ns = downtime limit};
 *     percent = attach_steer(&s, &round);
 *
 * A round counts against the guest when it left at least half as much dirty as it carried, and its
 * pages took long to transfer: a quarter of the limit or more, without the link's latency. What
 * takes less is no obstacle to a pause within the limit; and over a long idle link each round lasts
 * a round trip, whatever the guest does. After two such rounds one after the other vCPUs lose 20 %
 * of their time, then 10 % more each time, up to ATTACH_THROTTLE_MAX.
 *
 * The latency is taken for two of the least round trips that were seen: one that a round needs at
 * the least, and one for the links whose round trips vary.
 */
#ifndef VMMIG_VMM_ATTACH_STEERING_H
#define VMMIG_VMM_ATTACH_STEERING_H

#include <stdint.h>

/* Of a copy without a limit: a snapshot's. */
#define ATTACH_STEERING_LIMIT_MS 120
/* No round of a guest that writes next to nothing lasts longer over a short link: vmm/attach_source.c waits as long. */
#define ATTACH_ROUND_MIN_MS 5

struct attach_steering {
    int64_t limit_ns; /* 0: none */
    unsigned strikes;
    unsigned percent; /* what was answered last */
};

struct attach_round {
    unsigned number; /* 1: all memory, which says nothing of the guest's pace */
    uint64_t carried, left; /* pages */
    int64_t took_ns;
    int64_t rtt_ns; /* 0: unknown, or short */
};

unsigned attach_steer(struct attach_steering *s, const struct attach_round *round);

#endif

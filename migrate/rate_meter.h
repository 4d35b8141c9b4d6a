/* SPDX-License-Identifier: Apache-2.0 */
/*
 * rate_meter: how fast a link takes bytes, from acknowledgements.
 *
 * Only time in which something was outstanding counts. An interval in which the sender ran out of
 * bytes says that the link is at least as fast as measured, so it may raise the estimate but not
 * lower it. No clock of its own, no lock: the caller's.
 */
#ifndef VMMIG_MIGRATE_RATE_METER_H
#define VMMIG_MIGRATE_RATE_METER_H

#include <stdbool.h>
#include <stdint.h>

struct rate_meter {
    uint64_t rate; /* bytes a second; 0: unknown */
    bool busy;
    bool starved;
    int64_t busy_since; /* start of the present stretch, or of the interval if that is later */
    int64_t busy_ns;    /* former stretches of this interval */
    uint64_t bytes;     /* acknowledged in this interval */
};

/* Something is outstanding from now on. */
void rate_meter_begin(struct rate_meter *m, int64_t now);
/* n bytes were acknowledged; is anything outstanding still? */
void rate_meter_acked(struct rate_meter *m, int64_t now, uint64_t n, bool still_busy);
/* The sender has nothing to send although it might. */
void rate_meter_starved(struct rate_meter *m);
/* The connection was lost: what it was doing meanwhile says nothing. */
void rate_meter_reset_interval(struct rate_meter *m, int64_t now);

#endif

/* SPDX-License-Identifier: Apache-2.0 */
#include "migrate/rate_meter.h"

#include "base/clock.h"

enum { INTERVAL_MS = 20, OLD_WEIGHT = 3, NEW_WEIGHT = 1 };

void rate_meter_begin(struct rate_meter *m, int64_t now)
{
    if (m->busy)
        return;
    m->busy = true;
    m->busy_since = now;
}

void rate_meter_reset_interval(struct rate_meter *m, int64_t now)
{
    m->busy_since = now;
    m->busy_ns = 0;
    m->bytes = 0;
    m->starved = false;
}

void rate_meter_starved(struct rate_meter *m)
{
    m->starved = true;
}

void rate_meter_acked(struct rate_meter *m, int64_t now, uint64_t n, bool still_busy)
{
    m->bytes += n;
    int64_t busy_ns = m->busy_ns + (m->busy ? now - m->busy_since : 0);
    if (busy_ns >= INTERVAL_MS * NSEC_PER_MSEC) {
        uint64_t sample = (uint64_t)((double)m->bytes * (double)NSEC_PER_SEC / (double)busy_ns);
        if (!m->rate)
            m->rate = sample;
        else if (!m->starved || sample > m->rate)
            m->rate = (m->rate * OLD_WEIGHT + sample * NEW_WEIGHT) / (OLD_WEIGHT + NEW_WEIGHT);
        rate_meter_reset_interval(m, now);
    } else {
        m->busy_ns = busy_ns;
        m->busy_since = now;
    }
    m->busy = still_busy;
}

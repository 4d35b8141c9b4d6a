/* SPDX-License-Identifier: Apache-2.0 */
#include "migrate/rate_limit.h"

#include "base/cleanup.h"
#include "base/clock.h"

#include <poll.h>

void rate_limit_init(struct rate_limit *limit, uint64_t bytes_per_second)
{
    pthread_mutex_init(&limit->lock, NULL);
    limit->rate = bytes_per_second;
    limit->paid_until = 0;
}

void rate_limit_finish(struct rate_limit *limit)
{
    pthread_mutex_destroy(&limit->lock);
}

void rate_limit_set(struct rate_limit *limit, uint64_t bytes_per_second)
{
    SCOPE_LOCK(&limit->lock);
    limit->rate = bytes_per_second;
    limit->paid_until = 0; /* debts at the old rate are forgotten */
}

uint64_t rate_limit_get(struct rate_limit *limit)
{
    SCOPE_LOCK(&limit->lock);
    return limit->rate;
}

static int64_t time_for(uint64_t bytes, uint64_t rate)
{
    return (int64_t)((double)bytes * (double)NSEC_PER_SEC / (double)rate);
}

int64_t rate_limit_reserve(struct rate_limit *limit, size_t n)
{
    SCOPE_LOCK(&limit->lock);
    int64_t now = clock_mono_ns();
    if (!limit->rate)
        return now;
    int64_t burst = time_for(RATE_LIMIT_BURST_MIN, limit->rate);
    if (burst < RATE_LIMIT_BURST_MS * NSEC_PER_MSEC)
        burst = RATE_LIMIT_BURST_MS * NSEC_PER_MSEC;
    if (limit->paid_until < now - burst)
        limit->paid_until = now - burst; /* a full bucket */
    int64_t from = limit->paid_until + time_for(n, limit->rate);
    limit->paid_until = from;
    return from < now ? now : from;
}

int rate_limit_wait(struct rate_limit *limit, size_t n, int64_t deadline_ns, int cancel_fd,
                    struct vm_error **err)
{
    int64_t from = rate_limit_reserve(limit, n);
    for (;;) {
        int64_t now = clock_mono_ns();
        if (now >= from)
            return 0;
        if (now >= deadline_ns)
            return error_set(err, VM_ERROR_TIMEOUT, "the rate limit left no room in time");
        struct pollfd p = {.fd = cancel_fd, .events = POLLIN};
        if (poll(&p, 1, clock_ms_until(from < deadline_ns ? from : deadline_ns)) > 0)
            return error_set(err, VM_ERROR_CANCELLED, "cancelled");
    }
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * rate_limit: a limit in bytes a second that several threads share (`--max-bandwidth`).
 *
 * A bucket that refills at the rate and holds RATE_LIMIT_BURST_MS worth of it (at least
 * RATE_LIMIT_BURST_MIN bytes). Requests are served in the order in which they come, so threads that
 * ask for pieces of equal size get equal shares. Keep pieces small (64 KiB): a piece is
 * granted whole.
 *
 * Threads: any. A new rate holds for the requests that come after it. Rate 0: no limit.
 */
#ifndef VMMIG_MIGRATE_RATE_LIMIT_H
#define VMMIG_MIGRATE_RATE_LIMIT_H

#include "base/error.h"

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

#define RATE_LIMIT_BURST_MS 10
#define RATE_LIMIT_BURST_MIN 65536

struct rate_limit {
    pthread_mutex_t lock;
    uint64_t rate;     /* bytes a second */
    int64_t paid_until; /* when the bucket will have paid for everything granted so far */
};

void rate_limit_init(struct rate_limit *limit, uint64_t bytes_per_second);
void rate_limit_finish(struct rate_limit *limit);
void rate_limit_set(struct rate_limit *limit, uint64_t bytes_per_second);
uint64_t rate_limit_get(struct rate_limit *limit);
/* Grant n bytes and return from when on they may be sent (monotonic ns). Never waits. */
int64_t rate_limit_reserve(struct rate_limit *limit, size_t n);
/* Grant n bytes and wait until they may be sent: 0, or TIMEOUT or CANCELLED (base/io.h). */
int rate_limit_wait(struct rate_limit *limit, size_t n, int64_t deadline_ns, int cancel_fd,
                    struct vm_error **err);

#endif

/* SPDX-License-Identifier: Apache-2.0 */
#include "repo/progress.h"

#include "base/clock.h"
#include "base/io.h"

enum { INTERVAL_MS = 250 };

void progress_init(struct progress *p, const struct repo_control *control, uint64_t total)
{
    *p = (struct progress){.control = control, .now = {.total = total}};
    pthread_mutex_init(&p->lock, NULL);
}

void progress_finish(struct progress *p)
{
    pthread_mutex_destroy(&p->lock);
}

int progress_add(struct progress *p, uint64_t n, uint64_t stored, struct vm_error **err)
{
    SCOPE_LOCK(&p->lock);
    p->now.done += n;
    if (stored != UINT64_MAX)
        p->now.stored = stored;
    if (!p->control)
        return 0;
    if (p->control->cancel_fd >= 0 && io_latch_is_set(p->control->cancel_fd))
        return error_set(err, VM_ERROR_CANCELLED, "cancelled on request");
    int64_t now = clock_mono_ns();
    if (p->control->progress && now >= p->next_ns) {
        p->next_ns = now + INTERVAL_MS * NSEC_PER_MSEC;
        p->control->progress(&p->now, p->control->arg);
    }
    return 0;
}

void progress_restart(struct progress *p, uint64_t total)
{
    SCOPE_LOCK(&p->lock);
    p->now.done = 0;
    p->now.total = total;
}

void progress_end(struct progress *p, uint64_t stored)
{
    p->now.done = p->now.total;
    p->now.stored = stored;
    if (p->control && p->control->progress)
        p->control->progress(&p->now, p->control->arg);
}

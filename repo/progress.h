/* SPDX-License-Identifier: Apache-2.0 */
/*
 * progress: calls a repo_control's function now and then, and looks at its cancel latch. Threads:
 * any.
 */
#ifndef VMMIG_REPO_PROGRESS_H
#define VMMIG_REPO_PROGRESS_H

#include "repo/repo.h"

struct progress {
    const struct repo_control *control; /* NULL: nothing is called */
    pthread_mutex_t lock;
    int64_t next_ns;
    struct repo_progress now;
};

void progress_init(struct progress *p, const struct repo_control *control, uint64_t total);
void progress_finish(struct progress *p);
/*
 * `n` more (bytes, or objects) are done; stored: UINT64_MAX if unchanged. CANCELLED if the latch is
 * set.
 */
int progress_add(struct progress *p, uint64_t n, uint64_t stored, struct vm_error **err);
/* There is another total, of which nothing is done yet. */
void progress_restart(struct progress *p, uint64_t total);
/* The last call, with everything done. */
void progress_end(struct progress *p, uint64_t stored);

#endif

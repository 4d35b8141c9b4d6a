/* SPDX-License-Identifier: Apache-2.0 */
/*
 * repo_control: how a call that takes long tells its progress and is cancelled. Threads: see below.
 */
#ifndef VMMIG_REPO_REPO_CONTROL_H
#define VMMIG_REPO_REPO_CONTROL_H

#include <stdint.h>

struct repo_progress {
    uint64_t done, total; /* bytes of the image */
    uint64_t stored;      /* bytes added to the store so far */
};
/* Called about four times a second and at the end, by a thread of the call. */
typedef void repo_progress_fn(const struct repo_progress *progress, void *arg);

struct repo_control {
    repo_progress_fn *progress; /* may be NULL */
    void *arg;
    int cancel_fd; /* -1 for none; once it is readable (base/io.h) the call ends with CANCELLED */
};

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * workers: threads that hash, compress and decompress, and the first failure of a group of threads.
 *
 * A job runs once, in any worker, in no order; it gets the worker's own hasher, codec and scratch
 * memory. A job does not wait for another job. Threads: any may submit.
 */
#ifndef VMMIG_REPO_WORKERS_H
#define VMMIG_REPO_WORKERS_H

#include "base/cleanup.h"
#include "repo/record.h"

#include <pthread.h>

struct worker {
    struct page_hasher hasher;
    struct record_codec codec;
    uint8_t scratch[RECORD_MAX];
};

struct job;
typedef void worker_job_fn(struct worker *worker, struct job *job);

/* The first member of what the job works on; the caller's memory, in use until fn was called. */
struct job {
    worker_job_fn *fn;
};

struct workers;

/* n threads (0: one per processor); records are encoded with that compression. */
struct workers *workers_create(unsigned n, enum record_compression compression, int zstd_level,
                               struct vm_error **err);
/* Runs what was submitted, then ends the threads. */
void workers_destroy(struct workers *w);
DEFINE_CLEANUP(workers, struct workers *, workers_destroy)
/* Waits while 64 jobs per worker are waiting. */
void workers_submit(struct workers *w, struct job *job, worker_job_fn *fn);

/* The first error among threads that work together; the others end when they see it. */
struct failure {
    pthread_mutex_t lock;
    _Atomic bool failed;
    struct vm_error *error;
};

void failure_init(struct failure *f);
void failure_finish(struct failure *f);
/* Takes the error over; only the first is kept. */
void failure_set(struct failure *f, struct vm_error *error);
static inline bool failure_is_set(const struct failure *f)
{
    return f->failed;
}
/* -1 with a copy of the error; 0 if there was none. */
int failure_report(struct failure *f, struct vm_error **err);

#endif

/* SPDX-License-Identifier: Apache-2.0 */
#include "repo/workers.h"

#include "base/queue.h"

#include <stdlib.h>
#include <unistd.h>

enum { WORKERS_MAX = 24, QUEUE_PER_WORKER = 64 };

struct workers {
    struct queue *jobs;
    unsigned n;
    pthread_t threads[WORKERS_MAX];
    struct worker *workers[WORKERS_MAX];
};

struct start {
    struct workers *all;
    struct worker *self;
};

static void *work(void *arg)
{
    struct start *start = arg;
    struct queue *jobs = start->all->jobs;
    struct worker *self = start->self;
    free(start);
    struct job *job;
    while ((job = queue_get(jobs)))
        job->fn(self, job);
    return NULL;
}

static void free_worker(struct worker *w)
{
    if (!w)
        return;
    page_hasher_finish(&w->hasher);
    record_codec_finish(&w->codec);
    free(w);
}

static int start_worker(struct workers *w, enum record_compression compression, int zstd_level,
                        struct vm_error **err)
{
    struct worker *self = calloc(1, sizeof(*self));
    struct start *start = malloc(sizeof(*start));
    if (!self || !start) {
        free(self);
        free(start);
        return error_nomem(err);
    }
    *start = (struct start){w, self};
    if (page_hasher_init(&self->hasher, err) < 0 ||
        record_codec_init(&self->codec, compression, zstd_level, err) < 0) {
        free(start);
        free_worker(self);
        return -1;
    }
    int failed = pthread_create(&w->threads[w->n], NULL, work, start);
    if (failed) {
        free(start);
        free_worker(self);
        return error_errno(err, failed, "cannot start a thread");
    }
    w->workers[w->n++] = self;
    return 0;
}

struct workers *workers_create(unsigned n, enum record_compression compression, int zstd_level,
                               struct vm_error **err)
{
    long processors = sysconf(_SC_NPROCESSORS_ONLN);
    if (!n)
        n = processors > 1 ? (unsigned)processors : 1;
    if (n > WORKERS_MAX)
        n = WORKERS_MAX;
    struct workers *w = calloc(1, sizeof(*w));
    if (!w) {
        error_nomem(err);
        return NULL;
    }
    w->jobs = queue_create(n * QUEUE_PER_WORKER, NULL, err);
    if (!w->jobs) {
        free(w);
        return NULL;
    }
    while (w->n < n) {
        if (start_worker(w, compression, zstd_level, err) < 0) {
            workers_destroy(w);
            return NULL;
        }
    }
    return w;
}

void workers_destroy(struct workers *w)
{
    if (!w)
        return;
    queue_close(w->jobs);
    for (unsigned i = 0; i < w->n; i++) {
        pthread_join(w->threads[i], NULL);
        free_worker(w->workers[i]);
    }
    queue_destroy(w->jobs);
    free(w);
}

void workers_submit(struct workers *w, struct job *job, worker_job_fn *fn)
{
    job->fn = fn;
    queue_put(w->jobs, job);
}

/* ---- failure ---- */

void failure_init(struct failure *f)
{
    *f = (struct failure){.failed = false};
    pthread_mutex_init(&f->lock, NULL);
}

void failure_finish(struct failure *f)
{
    error_clear(&f->error);
    pthread_mutex_destroy(&f->lock);
}

void failure_set(struct failure *f, struct vm_error *error)
{
    SCOPE_LOCK(&f->lock);
    error_propagate(f->failed ? NULL : &f->error, error);
    f->failed = true;
}

int failure_report(struct failure *f, struct vm_error **err)
{
    SCOPE_LOCK(&f->lock);
    if (!f->failed)
        return 0;
    return err ? error_propagate(err, error_copy(f->error)) : -1;
}

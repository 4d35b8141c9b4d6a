/* SPDX-License-Identifier: Apache-2.0 */
#include "agent/jobs.h"

#include "base/clock.h"
#include "base/io.h"
#include "base/log.h"

#include <poll.h>
#include <pthread.h>
#include <string.h>

enum { CLAIMS_MAX = 512 }; /* a request for clones takes up to 64 */

struct job {
    struct job_table *table;
    struct job *next; /* newer first */
    int cancel_fd; /* latch: end early */
    int done_fd;   /* latch: the job ended */
    unsigned waiters;
    job_run_fn *run;
    void *arg;
    void (*free_arg)(void *arg);
    const char *closed;       /* why it cannot be cancelled any more */
    bool stopping;            /* cancelled by job_table_stop */
    int64_t started_mono_ns;
    struct job_status status; /* elapsed_ns is set when it ends */
};

struct claim {
    char vm[VM_NAME_MAX + 1];
    const char *what;
    job_claim_cancel_fn *cancel; /* NULL: it cannot be */
    void *arg;
};

struct job_table {
    pthread_mutex_t lock; /* guards everything below, and what may change in a job */
    pthread_cond_t ended;
    struct job *first;
    unsigned n_running, n_ended, max_running;
    struct claim claims[CLAIMS_MAX];
    unsigned n_claims;
    bool stopped;
};

#define X(id, name, ...) name,
static const char *const kind_names[] = {JOB_KINDS(X)};
static const char *const phase_names[] = {JOB_PHASES(X)};
static const char *const encoding_names[] = {JOB_ENCODINGS(X)};
#undef X
#define X(id, name, text) text,
static const char *const phase_texts[] = {JOB_PHASES(X)};
#undef X

const char *job_kind_name(enum job_kind kind)
{
    return kind_names[kind];
}

const char *job_phase_name(enum job_phase phase)
{
    return phase_names[phase];
}

const char *job_phase_text(enum job_phase phase)
{
    return phase_texts[phase];
}

const char *job_encoding_name(enum job_encoding encoding)
{
    return encoding_names[encoding];
}

void job_status_finish(struct job_status *status)
{
    error_free(status->error);
    status->error = NULL;
    free(status->result);
    status->result = NULL;
}

static void job_destroy(struct job *job)
{
    if (!job)
        return;
    close_fd(&job->cancel_fd);
    close_fd(&job->done_fd);
    job_status_finish(&job->status);
    free(job);
}
DEFINE_CLEANUP(job, struct job *, job_destroy)

struct job_table *job_table_create(unsigned max_running, struct vm_error **err)
{
    struct job_table *t = calloc(1, sizeof(*t));
    if (!t) {
        error_nomem(err);
        return NULL;
    }
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&t->ended, &monotonic);
    pthread_condattr_destroy(&monotonic);
    pthread_mutex_init(&t->lock, NULL);
    t->max_running = max_running;
    return t;
}

static bool has_ended(const struct job *job)
{
    return job->status.state != JOB_STATE_RUNNING;
}

void job_table_destroy(struct job_table *t)
{
    if (!t)
        return;
    while (t->first) {
        struct job *job = t->first;
        t->first = job->next;
        job_destroy(job);
    }
    pthread_cond_destroy(&t->ended);
    pthread_mutex_destroy(&t->lock);
    free(t);
}

bool job_table_stop(struct job_table *t, int timeout_ms)
{
    int64_t deadline = clock_mono_ns() + timeout_ms * NSEC_PER_MSEC;
    struct timespec until = {deadline / NSEC_PER_SEC, deadline % NSEC_PER_SEC};
    SCOPE_LOCK(&t->lock);
    t->stopped = true;
    for (struct job *job = t->first; job; job = job->next) {
        if (has_ended(job))
            continue;
        job->stopping = true;
        io_latch_set(job->cancel_fd);
    }
    while (t->n_running)
        if (pthread_cond_timedwait(&t->ended, &t->lock, &until))
            break;
    return !t->n_running;
}

/* With the lock held: forget the jobs that ended first, beyond the history. */
static void prune(struct job_table *t)
{
    while (t->n_ended > JOB_HISTORY_MAX) {
        struct job **oldest = NULL;
        for (struct job **p = &t->first; *p; p = &(*p)->next)
            if (has_ended(*p) && !(*p)->waiters)
                oldest = p;
        if (!oldest)
            return;
        struct job *job = *oldest;
        *oldest = job->next;
        t->n_ended--;
        job_destroy(job);
    }
}

static struct job *running_job_of(struct job_table *t, const char *vm)
{
    for (struct job *job = t->first; *vm && job; job = job->next)
        if (!has_ended(job) && !strcmp(job->status.vm, vm))
            return job;
    return NULL;
}

static struct claim *claim_of(struct job_table *t, const char *vm)
{
    for (unsigned i = 0; i < t->n_claims; i++)
        if (!strcmp(t->claims[i].vm, vm))
            return &t->claims[i];
    return NULL;
}

/* With the lock held: CONFLICT if somebody works on that VM. */
static int check_free(struct job_table *t, const char *vm, struct vm_error **err)
{
    const struct job *job = running_job_of(t, vm);
    const struct claim *claim = claim_of(t, vm);
    if (t->stopped)
        return error_set(err, VM_ERROR_UNREACHABLE, "the agent is stopping");
    if (job)
        return error_set(err, VM_ERROR_CONFLICT,
                         "%s: %s is under way; wait for it, or say `vmmig cancel %s`", vm,
                         job_kind_name(job->status.kind), vm);
    if (claim && claim->cancel)
        return error_set(err, VM_ERROR_CONFLICT, "%s: %s is under way; wait for it, or say `vmmig cancel %s`", vm,
                         claim->what, vm);
    if (claim)
        return error_set(err, VM_ERROR_CONFLICT, "%s: %s is under way", vm, claim->what);
    return 0;
}

int job_claim(struct job_table *t, const char *vm, const char *what, struct vm_error **err)
{
    return job_claim_cancellable(t, vm, what, NULL, NULL, err);
}

int job_claim_cancellable(struct job_table *t, const char *vm, const char *what, job_claim_cancel_fn *cancel, void *arg,
                          struct vm_error **err)
{
    if (vm_name_check(vm, err) < 0)
        return -1;
    SCOPE_LOCK(&t->lock);
    if (check_free(t, vm, err) < 0)
        return -1;
    if (t->n_claims == CLAIMS_MAX)
        return error_set(err, VM_ERROR_CONFLICT, "too many requests at once; try again");
    struct claim *c = &t->claims[t->n_claims++];
    strcpy(c->vm, vm);
    c->what = what;
    c->cancel = cancel;
    c->arg = arg;
    return 0;
}

static int nothing_to_cancel(const char *vm, struct vm_error **err)
{
    return error_set(err, VM_ERROR_NOT_FOUND, "%s: nothing is under way that could be cancelled", vm);
}

int job_cancel_claim(struct job_table *t, const char *vm, struct vm_error **err)
{
    SCOPE_LOCK(&t->lock);
    const struct claim *claim = claim_of(t, vm);
    if (!claim || !claim->cancel)
        return nothing_to_cancel(vm, err);
    return claim->cancel(claim->arg, err) < 0 ? error_wrap(err, "%s", vm) : 0;
}

void job_release(struct job_table *t, const char *vm)
{
    SCOPE_LOCK(&t->lock);
    struct claim *c = claim_of(t, vm);
    if (c)
        *c = t->claims[--t->n_claims];
}

/* With the lock held: an ended job that nobody waits for needs no descriptors any more. */
static void close_latches(struct job *job)
{
    if (!has_ended(job) || job->waiters)
        return;
    close_fd(&job->cancel_fd);
    close_fd(&job->done_fd);
}

/* The job's result becomes visible; its thread touches neither job nor table after that. */
static void end(struct job *job, int result, struct vm_error *err)
{
    struct job_table *t = job->table;
    SCOPE_LOCK(&t->lock);
    struct job_status *s = &job->status;
    s->elapsed_ns = clock_mono_ns() - job->started_mono_ns;
    s->state = result == 0 ? JOB_STATE_DONE
               : err && err->kind == VM_ERROR_CANCELLED ? JOB_STATE_CANCELLED
                                                        : JOB_STATE_FAILED;
    s->error = err;
    s->cancelling = false;
    t->n_running--;
    t->n_ended++;
    io_latch_set(job->done_fd);
    close_latches(job);
    pthread_cond_broadcast(&t->ended);
}

static void *job_thread(void *arg)
{
    struct job *job = arg;
    char id[UUID_TEXT_SIZE];
    struct vm_error *err = NULL;
    log_set_thread_context(uuid_format(&job->status.id, id), job->status.vm);
    log_info("job begins", "kind=%s peer=%s", job_kind_name(job->status.kind),
             log_q(job->status.peer));
    int result = job->run(job, job->arg, &err);
    if (result < 0)
        log_warn("job failed", "error=%s reason=%s",
                 err ? error_kind_name(err->kind) : "failed", log_q(error_message(err)));
    else
        log_info("job done");
    if (job->free_arg)
        job->free_arg(job->arg);
    end(job, result, err);
    return NULL;
}

/* Detached: a thread that ended gives its stack back at once, not when the history forgets the
 * job. */
static int start_thread(struct job *job, struct vm_error **err)
{
    pthread_t thread;
    pthread_attr_t detached;
    pthread_attr_init(&detached);
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    int failed = pthread_create(&thread, &detached, job_thread, job);
    pthread_attr_destroy(&detached);
    return failed ? error_errno(err, failed, "cannot start a thread") : 0;
}

static struct job *make_job(struct job_table *t, const struct job_params *p, struct vm_error **err)
{
    CLEANUP(job) struct job *job = calloc(1, sizeof(*job));
    if (!job) {
        error_nomem(err);
        return NULL;
    }
    job->table = t;
    job->cancel_fd = job->done_fd = -1;
    job->run = p->run;
    job->arg = p->arg;
    job->free_arg = p->free_arg;
    struct job_status *s = &job->status;
    s->id = p->id ? *p->id : uuid_new();
    s->kind = p->kind;
    snprintf(s->vm, sizeof(s->vm), "%s", p->vm ? p->vm : "");
    snprintf(s->peer, sizeof(s->peer), "%s", p->peer ? p->peer : "");
    s->started_ns = clock_wall_ns();
    s->progress.predicted_pause_ns = s->progress.pause_ns = -1;
    job->started_mono_ns = clock_mono_ns();
    job->cancel_fd = io_latch_new(err);
    if (job->cancel_fd < 0)
        return NULL;
    job->done_fd = io_latch_new(err);
    return job->done_fd < 0 ? NULL : steal_ptr(&job);
}

static struct job *find(struct job_table *t, const struct uuid *id)
{
    for (struct job *job = t->first; job; job = job->next)
        if (uuid_equal(&job->status.id, id))
            return job;
    return NULL;
}

int job_start(struct job_table *t, const struct job_params *params, struct uuid *ret_id,
              struct vm_error **err)
{
    if (params->vm && vm_name_check(params->vm, err) < 0)
        return -1;
    CLEANUP(job) struct job *job = make_job(t, params, err);
    if (!job)
        return -1;
    struct uuid id = job->status.id;
    SCOPE_LOCK(&t->lock);
    if (check_free(t, params->vm ? params->vm : "", err) < 0)
        return -1;
    if (find(t, &id))
        return error_set(err, VM_ERROR_CONFLICT, "job %s exists already", uuid_text(&id));
    if (t->n_running == t->max_running)
        return error_set(err, VM_ERROR_CONFLICT,
                         "%u jobs are under way already (max-jobs); wait for one to end",
                         t->n_running);
    if (start_thread(job, err) < 0)
        return -1;
    job->next = t->first;
    t->first = steal_ptr(&job);
    t->n_running++;
    prune(t);
    if (ret_id)
        *ret_id = id;
    return 0;
}

int job_cancel_fd(const struct job *job)
{
    return job->cancel_fd;
}

bool job_is_cancelled(const struct job *job)
{
    return io_latch_is_set(job->cancel_fd);
}

bool job_is_stopping(const struct job *job)
{
    SCOPE_LOCK(&job->table->lock);
    return job->stopping;
}

int job_close_cancel(struct job *job, const char *why, struct vm_error **err)
{
    SCOPE_LOCK(&job->table->lock);
    if (job_is_cancelled(job))
        return error_set(err, VM_ERROR_CANCELLED, "cancelled");
    job->closed = why;
    return 0;
}

int job_set_result(struct job *job, const void *data, size_t len, struct vm_error **err)
{
    if (len > JOB_RESULT_MAX)
        return error_set(err, VM_ERROR_FAILED, "the result is too large to be kept");
    void *copy = malloc(len ? len : 1);
    if (!copy)
        return error_nomem(err);
    if (len)
        memcpy(copy, data, len);
    SCOPE_LOCK(&job->table->lock);
    free(job->status.result);
    job->status.result = copy;
    job->status.result_len = len;
    return 0;
}

void job_update(struct job *job, const struct job_progress *progress)
{
    SCOPE_LOCK(&job->table->lock);
    job->status.progress = *progress;
}

/* With the lock held. */
static int cancel(struct job *job, const char *name, struct vm_error **err)
{
    if (job->closed)
        return error_set(err, VM_ERROR_REFUSED, "%s: %s", name, job->closed);
    job->status.cancelling = true;
    io_latch_set(job->cancel_fd);
    return 0;
}

int job_cancel_id(struct job_table *t, const struct uuid *id, struct vm_error **err)
{
    SCOPE_LOCK(&t->lock);
    struct job *job = find(t, id);
    if (!job || has_ended(job))
        return error_set(err, VM_ERROR_NOT_FOUND, job ? "job %s has ended" : "no job %s is known",
                         uuid_text(id));
    return cancel(job, uuid_text(id), err);
}

int job_cancel(struct job_table *t, const char *vm, struct uuid *ret_id, struct vm_error **err)
{
    SCOPE_LOCK(&t->lock);
    struct job *job = running_job_of(t, vm);
    if (!job)
        return nothing_to_cancel(vm, err);
    if (cancel(job, vm, err) < 0)
        return -1;
    if (ret_id)
        *ret_id = job->status.id;
    return 0;
}

/* With the lock held: the job as it is now. The error is copied. */
static void snapshot(const struct job *job, struct job_status *ret)
{
    *ret = job->status;
    if (!has_ended(job))
        ret->elapsed_ns = clock_mono_ns() - job->started_mono_ns;
    ret->error = ret->error ? error_copy(ret->error) : NULL;
    const void *result = ret->result;
    ret->result = result ? malloc(ret->result_len ? ret->result_len : 1) : NULL;
    if (ret->result && ret->result_len)
        memcpy(ret->result, result, ret->result_len);
}

int job_get(struct job_table *t, const struct uuid *id, struct job_status *ret_status,
            struct vm_error **err)
{
    SCOPE_LOCK(&t->lock);
    const struct job *job = find(t, id);
    if (!job)
        return error_set(err, VM_ERROR_NOT_FOUND, "no job %s is known", uuid_text(id));
    snapshot(job, ret_status);
    return 0;
}

int job_get_of_vm(struct job_table *t, const char *vm, struct job_status *ret_status,
                  struct vm_error **err)
{
    SCOPE_LOCK(&t->lock);
    const struct job *job = running_job_of(t, vm);
    for (const struct job *j = t->first; j && !job; j = j->next)
        if (!strcmp(j->status.vm, vm))
            job = j;
    if (!job)
        return error_set(err, VM_ERROR_NOT_FOUND, "no job of VM %s is known", vm);
    snapshot(job, ret_status);
    return 0;
}

/* Find the job and keep it in the table until unpin. */
static struct job *pin(struct job_table *t, const struct uuid *id, struct vm_error **err)
{
    SCOPE_LOCK(&t->lock);
    struct job *job = find(t, id);
    if (job)
        job->waiters++;
    else
        error_set(err, VM_ERROR_NOT_FOUND, "no job %s is known", uuid_text(id));
    return job;
}

static void unpin(struct job *job)
{
    SCOPE_LOCK(&job->table->lock);
    job->waiters--;
    close_latches(job);
}

int job_wait(struct job_table *t, const struct uuid *id, int64_t deadline_ns, int cancel_fd,
             struct vm_error **err)
{
    struct job *job = pin(t, id, err);
    if (!job)
        return -1;
    int r = job->done_fd < 0 ? 0 : io_wait(job->done_fd, POLLIN, deadline_ns, cancel_fd, err);
    unpin(job);
    return r;
}

void job_each(struct job_table *t, void (*visit)(const struct job_status *status, void *arg),
              void *arg)
{
    SCOPE_LOCK(&t->lock);
    for (const struct job *job = t->first; job; job = job->next) {
        cleanup_job_status struct job_status s;
        snapshot(job, &s);
        visit(&s, arg);
    }
}

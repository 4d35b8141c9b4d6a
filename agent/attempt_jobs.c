/* SPDX-License-Identifier: Apache-2.0 */
#include "agent/attempt_jobs.h"

#include "base/clock.h"
#include "base/io.h"
#include "base/log.h"

#include <string.h>

enum { SHOW_INTERVAL_MS = 100 };

static const enum job_encoding encoding_of_kind[PAGE_KIND_COUNT] = {
    [PAGE_FRESH_ZERO] = JOB_ENC_ZERO, [PAGE_ZERO] = JOB_ENC_ZERO,   [PAGE_SAME] = JOB_ENC_SAME,
    [PAGE_DELTA] = JOB_ENC_DELTA,     [PAGE_LZ4] = JOB_ENC_LZ4,     [PAGE_ZSTD] = JOB_ENC_ZSTD,
    [PAGE_RAW] = JOB_ENC_RAW,
};

static enum job_phase phase_of(enum handover_state state, bool paused)
{
    switch (state) {
    case HANDOVER_SRC_SENDING:
    case HANDOVER_DST_PREPARED:
        return paused ? JOB_PHASE_PAUSED : JOB_PHASE_COPYING;
    case HANDOVER_SRC_SENT:
    case HANDOVER_DST_LOADED:
        return JOB_PHASE_PAUSED;
    case HANDOVER_SRC_COMMITTED:
    case HANDOVER_SRC_COMMITTED_SOLE:
    case HANDOVER_SRC_ORPHANED:
        return JOB_PHASE_DECIDING;
    case HANDOVER_SRC_DISCARDING:
    case HANDOVER_SRC_DONE:
    case HANDOVER_DST_STARTING:
    case HANDOVER_DST_RESTARTING:
    case HANDOVER_DST_STALLED:
    case HANDOVER_DST_STARTED:
    case HANDOVER_DST_RUNNING:
    case HANDOVER_DST_ENDED:
    case HANDOVER_DST_CLOSED:
        return JOB_PHASE_FINISHING;
    case HANDOVER_SRC_REVERTING:
    case HANDOVER_SRC_RESUMING:
    case HANDOVER_SRC_STALLED:
    case HANDOVER_SRC_SETTLING:
    case HANDOVER_SRC_ABORTED:
    case HANDOVER_SRC_CLOSED:
    case HANDOVER_DST_KILLING:
    case HANDOVER_DST_REVOKING:
    case HANDOVER_DST_NEVER:
        return JOB_PHASE_UNDOING;
    case HANDOVER_SRC_NONE:
    case HANDOVER_SRC_PREPARING:
    case HANDOVER_DST_NONE:
    case HANDOVER_DST_PREPARING:
    case HANDOVER_STATE_COUNT:
        break; /* no `default`: the compiler names a state that is missing */
    }
    return JOB_PHASE_PREPARING;
}

static void add_pages(struct job_progress *to, const struct page_encoder_stats *from)
{
    for (int k = 0; k < PAGE_KIND_COUNT; k++) {
        to->pages[encoding_of_kind[k]].pages += from->kinds[k].pages;
        to->pages[encoding_of_kind[k]].wire_bytes += from->kinds[k].bytes_out;
    }
}

static void add_copy(struct job_progress *to, const struct sender_progress *p)
{
    to->round = p->source.round;
    to->total = p->source.total;
    to->remaining = p->source.remaining;
    to->dirty_rate = p->source.dirty_rate;
    to->working_set = p->source.working_set;
    to->throttle_percent = p->source.throttle_percent;
    to->throttle_max_percent = p->throttle_max_percent;
    to->link_rate = p->link_rate;
    to->wire_bytes = p->wire_bytes;
    to->resent_bytes = p->acked_resent_bytes;
    to->opaque_bytes = p->stream_bytes;
    to->connections = p->connected;
    to->reconnects = p->reconnects;
    to->predicted_pause_ns = p->predicted_pause_ns;
    add_pages(to, &p->pages);
    if (p->limit_missed)
        snprintf(to->note, sizeof(to->note),
                 "the downtime limit cannot be met; paused at the best moment");
    else if (p->source.one_round)
        snprintf(to->note, sizeof(to->note),
                 "TCG of QEMU before 9.0 loses writes in further rounds: paused after the first");
    else if (p->throttle_max_percent)
        snprintf(to->note, sizeof(to->note), "throttled the guest by up to %u %% to converge",
                 p->throttle_max_percent);
}

static void add_note(struct job_progress *to, const char *note)
{
    size_t n = strlen(to->note);
    if (*note)
        snprintf(to->note + n, sizeof(to->note) - n, "%s%s", n ? "; " : "", note);
}

static void show(struct job *job, struct attempt *a)
{
    struct job_progress progress = {.predicted_pause_ns = -1, .pause_ns = -1};
    struct sender_progress copy = {0};
    bool have_copy = false;
    pthread_mutex_lock(&a->lock);
    enum handover_state state = a->state;
    progress.pause_ns = a->pause_ns;
    if (a->role == &attempt_source_role && a->source.sender) {
        sender_progress(a->source.sender, &copy);
        have_copy = true;
    } else if (a->role == &attempt_destination_role && a->destination.receiver) {
        struct receiver_stats stats;
        receiver_stats(a->destination.receiver, &stats);
        progress.wire_bytes = stats.wire_bytes;
    }
    pthread_mutex_unlock(&a->lock);
    if (have_copy)
        add_copy(&progress, &copy);
    if (a->role == &attempt_source_role)
        add_note(&progress, a->source.note);
    progress.phase = phase_of(state, copy.paused_at_ns != 0);
    job_update(job, &progress);
}

/* The user's wish goes through the machine, which may find it too late. */
static void pass_cancel(struct job *job, struct attempt *a, bool *passed)
{
    if (*passed || !job_is_cancelled(job) || job_is_stopping(job))
        return;
    *passed = true;
    pthread_mutex_lock(&a->lock);
    a->cancelled = true;
    pthread_mutex_unlock(&a->lock);
    attempt_post(a, HANDOVER_EV_CANCEL);
}

int attempt_job_run(struct job *job, struct attempt *a, struct vm_error **err)
{
    bool cancel_passed = false;
    pthread_mutex_lock(&a->lock);
    a->job = job;
    attempt_refuse_cancel(a);
    pthread_mutex_unlock(&a->lock);
    while (attempt_wait_settled(a, clock_mono_ns() + SHOW_INTERVAL_MS * NSEC_PER_MSEC, NULL) < 0) {
        show(job, a);
        pass_cancel(job, a, &cancel_passed);
        if (job_is_stopping(job))
            break;
    }
    pthread_mutex_lock(&a->lock);
    a->job = NULL;
    pthread_mutex_unlock(&a->lock);
    show(job, a);
    return attempt_result(a, err);
}

static int run(struct job *job, void *arg, struct vm_error **err)
{
    return attempt_job_run(job, arg, err);
}

static void drop(void *arg)
{
    attempt_unref(arg);
}

int attempt_job_start(struct attempt *a, enum job_kind kind, const char *peer,
                      struct vm_error **err)
{
    struct job_params params = {.kind = kind,
                                .vm = a->vm_name,
                                .peer = peer,
                                .run = run,
                                .arg = attempt_ref(a),
                                .free_arg = drop};
    if (job_start(a->transfer->agent->jobs, &params, NULL, err) == 0)
        return 0;
    attempt_unref(a);
    return -1;
}

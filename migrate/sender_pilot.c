/* SPDX-License-Identifier: Apache-2.0 */
/* The sender's pilot: measures, pauses the guest, waits for the end. */
#include "migrate/sender_state.h"

#include "base/clock.h"
#include "base/cond.h"
#include "base/io.h"
#include "base/log.h"
#include "migrate/converge.h"
#include "migrate/cores.h"

enum { PILOT_INTERVAL_MS = 10 };
/* The device state's loading and the hand-over's synced writes; of a QEMU, the device state's way, too. */
#define FIXED_PAUSE_NS (20 * NSEC_PER_MSEC)
#define FIXED_PAUSE_MAPPED_NS (8 * NSEC_PER_MSEC)

struct pilot {
    struct converge converge;
    int64_t last_ns;
    uint64_t last_memory, last_zero;
    uint64_t last_acked_pages, last_acked_bytes;
    int64_t last_blocked_ns, last_carrying_ns;
    struct cores_watch cores;
    double drain_rate; /* bytes of non-zero guest memory a second */
    uint64_t last_sent;
    int64_t last_send_cpu_ns;
    enum page_mode mode;
    bool paused;
    bool ahead; /* channels may hold more */
};

void sender_read_channels(struct sender *s, struct link_totals *ret, struct sender_progress *p)
{
    *ret = (struct link_totals){0};
    p->wire_bytes = p->resent_bytes = p->acked_resent_bytes = 0;
    p->connected = p->reconnects = 0;
    uint64_t bytes_rate = 0;
    SCOPE_LOCK(&s->lock);
    for (unsigned i = 0; i <= s->params.channels && s->channels[i]; i++) {
        struct channel_sender_stats st;
        channel_sender_get_stats(s->channels[i], &st);
        *(i ? &ret->rate : &bytes_rate) += st.rate;
        ret->unacked += st.bytes_unacked;
        ret->acked += st.bytes_acked;
        ret->sent += st.bytes_sent;
        ret->send_cpu_ns += st.cpu_ns;
        ret->carrying_ns += i ? st.carrying_ns : 0;
        if (st.outage_ns > ret->outage_ns)
            ret->outage_ns = st.outage_ns;
        if (st.rtt_ns > ret->rtt_ns)
            ret->rtt_ns = st.rtt_ns;
        p->wire_bytes += st.bytes_sent;
        p->resent_bytes += st.bytes_resent;
        p->acked_resent_bytes += st.bytes_acked_resent;
        p->connected += !st.outage_ns;
        p->reconnects += (unsigned)st.reconnects;
        if (!i)
            p->stream_bytes = st.bytes_sent;
    }
    /* Of what little there is else nothing could be measured. */
    ret->rate += p->stream_bytes > p->wire_bytes / 2 ? bytes_rate : 0;
    p->link_rate = ret->rate;
}

/* All memory that the driver gave, in pages: that which goes through the loader, too. */
static uint64_t memory_given(struct sender *s)
{
    return atomic_load(&s->pages_given) + atomic_load(&s->bytes_given) / GUEST_PAGE_SIZE;
}

/*
 * How fast memory that is not zero leaves. Stretches of zero pages say nothing about that, nor does an
 * interval in which the VMM had nothing to give.
 */
static void measure_drain(struct sender *s, struct pilot *pilot, int64_t now)
{
    uint64_t memory = memory_given(s), zero = atomic_load(&s->zero_pages_given);
    uint64_t given = memory - pilot->last_memory, zeros = zero - pilot->last_zero;
    int64_t elapsed = now - pilot->last_ns;
    if (elapsed < 40 * NSEC_PER_MSEC && given < 16 * PAGE_BATCH_MAX)
        return;
    if (given > zeros * 2 && elapsed > NSEC_PER_MSEC) {
        double rate = (double)(given - zeros) * GUEST_PAGE_SIZE * 1e9 / (double)elapsed;
        pilot->drain_rate = pilot->drain_rate ? pilot->drain_rate * 0.7 + rate * 0.3 : rate;
    }
    pilot->last_memory = memory;
    pilot->last_zero = zero;
    pilot->last_ns = now;
}

static void tell_policy(struct sender *s, struct pilot *pilot, const struct link_totals *link,
                        int64_t interval_ns)
{
    uint64_t pages = atomic_load(&s->pages_acked), bytes = atomic_load(&s->page_bytes_acked);
    int64_t blocked = (int64_t)atomic_load(&s->blocked_ns);
    bool full = cores_are_full(&pilot->cores);
    /* Pages cost nothing to come by: workers that wait while every core is busy with this migration wait for one. */
    bool for_cores = full && s->params.guest->ops->mapped_source;
    struct policy_link_sample sample = {.interval_ns = interval_ns,
                                        .bytes = bytes - pilot->last_acked_bytes,
                                        .pages = pages - pilot->last_acked_pages,
                                        .blocked_ns = for_cores ? 0 : blocked - pilot->last_blocked_ns,
                                        .carrying_ns = link->carrying_ns - pilot->last_carrying_ns,
                                        .cores_full = full};
    pilot->last_acked_bytes = bytes;
    pilot->last_acked_pages = pages;
    pilot->last_blocked_ns = blocked;
    pilot->last_carrying_ns = link->carrying_ns;
    uint64_t sent = link->sent - pilot->last_sent;
    int64_t send_cpu_ns = link->send_cpu_ns - pilot->last_send_cpu_ns;
    pilot->last_sent = link->sent;
    pilot->last_send_cpu_ns = link->send_cpu_ns;
    SCOPE_LOCK(&s->policy_lock);
    if (send_cpu_ns > 0) /* not when a channel's thread has just ended */
        policy_note_send(&s->policy, sent, send_cpu_ns);
    policy_note_link(&s->policy, &sample);
    if (pilot->mode != s->policy.mode)
        log_debug("pages go in another way", "mode=%s link_mbps=%.0f",
                  page_mode_name(s->policy.mode), s->policy.link_rate * 8 / 1e6);
    pilot->mode = s->policy.mode;
}

/* While the link's rate is not known, what waits for it shows whether it limits. */
static void set_windows(struct sender *s, struct pilot *pilot,
                        const struct guest_source_progress *source)
{
    pthread_mutex_lock(&s->policy_lock);
    bool known = s->policy.link_measured > 0;
    pthread_mutex_unlock(&s->policy_lock);
    bool far = (double)source->remaining > pilot->drain_rate * SENDER_FAR_MS / 1000;
    bool ahead = known && far && source->round < 2 && !pilot->paused;
    if (ahead == pilot->ahead)
        return;
    pilot->ahead = ahead;
    unsigned ms = ahead ? SENDER_AHEAD_MS : SENDER_IN_FLIGHT_MS;
    for (unsigned i = 1; i <= s->params.channels; i++)
        channel_sender_set_window_time(s->channels[i], ms, SENDER_WINDOW_MIN, SENDER_WINDOW_MAX);
}

static int64_t in_flight_ns(const struct link_totals *link)
{
    return link->rate ? (int64_t)((double)link->unacked * 1e9 / (double)link->rate) : 0;
}

/*
 * Pages that wait for an encoder, and bytes that wait for channel 0. Where rounds are cheap one more empties the queues
 * of pages, which hold several milliseconds' worth; a QEMU fills them again meanwhile.
 */
static int64_t queued_ns(struct sender *s, const struct pilot *pilot)
{
    if (pilot->drain_rate < 1)
        return 0;
    uint64_t out = atomic_load(&s->bytes_out); /* before the other, which is never less */
    uint64_t queued = atomic_load(&s->bytes_given) - out;
    if (s->params.guest->ops->mapped_source) {
        out = atomic_load(&s->pages_out);
        queued += (atomic_load(&s->pages_given) - out) * GUEST_PAGE_SIZE;
    }
    return (int64_t)((double)queued * 1e9 / pilot->drain_rate);
}

/*
 * What a pause takes of itself, and the device state's way. QEMU, which does not say how much that is, has little. The
 * last pages, LOADED and COMMIT go through the link one after the other.
 */
static int64_t fixed_ns(struct sender *s, const struct pilot *pilot, const struct guest_source_progress *source,
                        const struct link_totals *link)
{
    int64_t fixed = s->params.guest->ops->mapped_source ? FIXED_PAUSE_MAPPED_NS : FIXED_PAUSE_NS;
    fixed += 3 * link->rtt_ns / 2;
    double rate = link->rate ? (double)link->rate : pilot->drain_rate;
    return rate > 0 ? fixed + (int64_t)((double)source->state_bytes * 1e9 / rate) : fixed;
}

/*
 * Does the guest stand by its user's wish? He may stop it and let it go on while it is copied. What the VMM itself
 * does for the copy's end is not his.
 */
static int ask_run_state(struct sender *s, struct vm_error **err)
{
    struct guest_status status;
    struct vm_error *failed = NULL;
    if (guest_status(s->params.guest, &status, &failed) < 0) {
        bool later = failed->kind == VM_ERROR_TIMEOUT;
        return later ? error_free(failed), 0 : error_propagate(err, failed);
    }
    SCOPE_LOCK(&s->lock);
    bool runs = status.state == GUEST_RUNNING ||
                (s->progress.runs && (status.state != GUEST_PAUSED || status.finishing));
    if (runs != s->progress.runs)
        log_info("the guest's user changed its run state", "runs=%d", runs);
    s->progress.runs = runs;
    return 0;
}

/* Who has it stand, or go on? Asked when something is to be found out. */
static int follow_user(struct sender *s, struct pilot *pilot,
                       const struct guest_source_progress *source, struct vm_error **err)
{
    if (!pilot->paused && (source->paused_at_ns || !s->progress.runs) && ask_run_state(s, err) < 0)
        return -1;
    pilot->paused |= source->paused_at_ns && s->progress.runs;
    return 0;
}

static bool is_recorded(struct sender *s)
{
    SCOPE_LOCK(&s->lock);
    return s->recorded_runs == s->progress.runs;
}

static int pause_guest(struct sender *s, struct pilot *pilot, bool missed, struct vm_error **err)
{
    if (ask_run_state(s, err) < 0)
        return -1;
    if (!is_recorded(s))
        return 0; /* the next look is soon */
    pilot->paused = true;
    int64_t now = clock_mono_ns();
    pthread_mutex_lock(&s->lock);
    s->progress.paused_at_ns = now;
    s->progress.limit_missed = missed;
    pthread_mutex_unlock(&s->lock);
    log_info("pausing the guest", "predicted_ms=%.1f limit_missed=%d",
             (double)pilot->converge.predicted_ns / 1e6, missed);
    return guest_pause(s->params.guest, err);
}

static int judge(struct sender *s, struct pilot *pilot, const struct guest_source_progress *source,
                 const struct link_totals *link, struct vm_error **err)
{
    if (pilot->paused || (!s->params.was_running && !s->progress.runs))
        return 0;
    struct converge_input in = {.now_ns = clock_mono_ns(),
                                .round = source->round,
                                .remaining = source->remaining,
                                .drain_rate = (uint64_t)pilot->drain_rate,
                                .in_flight_ns = in_flight_ns(link) + queued_ns(s, pilot),
                                .fixed_ns = fixed_ns(s, pilot, source, link),
                                .throttle_percent = source->throttle_percent};
    enum converge_verdict verdict = converge_judge(&pilot->converge, &in);
    return verdict == CONVERGE_CONTINUE
               ? 0
               : pause_guest(s, pilot, verdict == CONVERGE_PAUSE_OVER, err);
}

/* One look at everything. */
static int pilot_step(struct sender *s, struct pilot *pilot, int64_t interval_ns,
                      struct vm_error **err)
{
    struct guest_source_progress source = {0};
    struct sender_progress p = {0};
    struct link_totals link;
    if (io_latch_is_set(s->halt))
        return error_set(err, VM_ERROR_CANCELLED, "cancelled");
    cleanup_error struct vm_error *unanswered = NULL;
    if (guest_source_progress(s->params.guest, &source, &unanswered) < 0) {
        /* A VMM that waits for the link while it writes its state answers later. */
        if (unanswered->kind != VM_ERROR_TIMEOUT)
            return error_propagate(err, steal_ptr(&unanswered));
        source = s->progress.source;
    }
    sender_read_channels(s, &link, &p);
    if (follow_user(s, pilot, &source, err) < 0)
        return -1;
    measure_drain(s, pilot, clock_mono_ns());
    tell_policy(s, pilot, &link, interval_ns);
    set_windows(s, pilot, &source);
    if (judge(s, pilot, &source, &link, err) < 0)
        return -1;
    SCOPE_LOCK(&s->lock);
    struct sender_progress *to = &s->progress;
    if (source.throttle_percent > to->throttle_max_percent)
        to->throttle_max_percent = source.throttle_percent;
    to->source = source;
    if (!to->paused_at_ns && to->runs)
        to->paused_at_ns = source.paused_at_ns;
    to->mode = pilot->mode;
    to->link_rate = p.link_rate;
    to->wire_bytes = p.wire_bytes;
    to->resent_bytes = p.resent_bytes;
    to->acked_resent_bytes = p.acked_resent_bytes;
    to->stream_bytes = p.stream_bytes;
    to->connected = p.connected;
    to->reconnects = p.reconnects;
    to->predicted_pause_ns =
        pilot->converge.predicted_ns == INT64_MAX ? -1 : pilot->converge.predicted_ns;
    return 0;
}

/* Until the next look is due, a round begins, or it is over. True: it is over. */
static bool pilot_wait(struct sender *s)
{
    int64_t due = clock_mono_ns() + PILOT_INTERVAL_MS * NSEC_PER_MSEC;
    SCOPE_LOCK(&s->lock);
    while (!s->source_done && !s->failed && !s->new_round &&
           cond_wait_until(&s->changed, &s->lock, due))
        ;
    s->new_round = false;
    return s->source_done || s->failed;
}

int sender_pilot_run(struct sender *s, struct vm_error **err)
{
    struct pilot pilot = {.last_ns = clock_mono_ns()};
    converge_init(&pilot.converge, s->params.downtime_limit_ns, s->params.guest->ops->mapped_source, pilot.last_ns);
    int64_t before = pilot.last_ns;
    while (!pilot_wait(s)) {
        int64_t now = clock_mono_ns();
        if (pilot_step(s, &pilot, now - before, err) < 0)
            return -1;
        before = now;
    }
    return 0;
}

void sender_note_pause(struct sender *s)
{
    struct guest_source_progress source;
    if (guest_source_progress(s->params.guest, &source, NULL) < 0)
        return;
    SCOPE_LOCK(&s->lock);
    s->progress.source = source;
    if (source.paused_at_ns && s->progress.runs)
        s->progress.paused_at_ns = source.paused_at_ns;
}

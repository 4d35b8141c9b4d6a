/* SPDX-License-Identifier: Apache-2.0 */
/* The user's half of a channel's sending side; see channel_sender_state.h. */
#include "migrate/channel.h"

#include "base/clock.h"
#include "base/io.h"
#include "migrate/channel_sender_state.h"
#include "migrate/checksum.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>

enum { WINDOW_RTT_SLACK_MS = 10 /* what the receiver takes, on top of the round trips */ };

/* ---- Life ---- */

void channel_sender_release(struct pending *list)
{
    while (list) {
        struct pending *p = list;
        list = p->next;
        if (p->release)
            p->release(p->release_arg);
        free(p);
    }
}

static int start(struct channel_sender *s, struct vm_error **err)
{
    s->stop_fd = io_latch_new(err);
    if (s->stop_fd < 0)
        return -1;
    s->wake_fd = io_latch_new(err);
    if (s->wake_fd < 0)
        return -1;
    s->halt_fd = io_latch_either(s->stop_fd, s->params.cancel_fd, err);
    if (s->halt_fd < 0)
        return -1;
    int failed = pthread_create(&s->thread, NULL, channel_sender_thread, s);
    return failed ? error_errno(err, failed, "cannot start a thread") : 0;
}

static void free_sender(struct channel_sender *s)
{
    channel_sender_release(s->head);
    error_free(s->error);
    close_fd(&s->stop_fd);
    close_fd(&s->wake_fd);
    close_fd(&s->halt_fd);
    pthread_cond_destroy(&s->changed);
    pthread_mutex_destroy(&s->lock);
    free(s);
}

struct channel_sender *channel_sender_create(const struct channel_sender_params *params,
                                             struct vm_error **err)
{
    struct channel_sender *s = calloc(1, sizeof(*s));
    if (!s) {
        error_nomem(err);
        return NULL;
    }
    s->params = *params;
    if (!s->params.outage_limit_ns)
        s->params.outage_limit_ns = CHANNEL_OUTAGE_LIMIT_MS * NSEC_PER_MSEC;
    s->stop_fd = s->wake_fd = s->halt_fd = -1;
    s->window = CHANNEL_WINDOW_DEFAULT;
    s->attempt_ns = CHANNEL_ATTEMPT_MIN_MS * NSEC_PER_MSEC;
    s->disconnected_since = clock_mono_ns();
    pthread_mutex_init(&s->lock, NULL);
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&s->changed, &attr);
    pthread_condattr_destroy(&attr);
    if (start(s, err) < 0) {
        free_sender(s);
        return NULL;
    }
    return s;
}

void channel_sender_destroy(struct channel_sender *s)
{
    if (!s)
        return;
    io_latch_set(s->stop_fd);
    pthread_join(s->thread, NULL);
    free_sender(s);
}

/* ---- Queue ---- */

static size_t window_now(const struct channel_sender *s)
{
    if (!s->window_ms)
        return s->window;
    int64_t span = s->window_ms * NSEC_PER_MSEC;
    int64_t least = 2 * s->stats.rtt_ns + WINDOW_RTT_SLACK_MS * NSEC_PER_MSEC;
    double bytes = (double)s->meter.rate * (double)(span > least ? span : least) / 1e9;
    if (bytes < (double)s->window_min)
        return s->window_min;
    return bytes > (double)s->window_max ? s->window_max : (size_t)bytes;
}

static bool has_room(const struct channel_sender *s)
{
    return !s->head ||
           (s->stats.bytes_unacked <= window_now(s) && s->n_pending < CHANNEL_FRAMES_MAX);
}

/* Wait for a change: 0, or -1 at the deadline. The lock is held. */
static int wait_changed(struct channel_sender *s, int64_t deadline_ns)
{
    if (deadline_ns == INT64_MAX)
        return pthread_cond_wait(&s->changed, &s->lock) ? -1 : 0;
    struct timespec t = {deadline_ns / NSEC_PER_SEC, deadline_ns % NSEC_PER_SEC};
    return pthread_cond_timedwait(&s->changed, &s->lock, &t) ? -1 : 0;
}

static int report_failure(struct channel_sender *s, struct vm_error **err)
{
    return error_propagate(err, error_copy(s->error));
}

int channel_sender_wait_open(struct channel_sender *s, int64_t deadline_ns, struct vm_error **err)
{
    SCOPE_LOCK(&s->lock);
    while (!s->open && !s->error)
        if (wait_changed(s, deadline_ns) < 0 && !s->open && !s->error)
            return error_set(err, VM_ERROR_TIMEOUT, "channel %u was not answered in time",
                             s->params.id.number);
    return s->error ? report_failure(s, err) : 0;
}

static int check_frame(const struct channel_frame *frame, size_t *ret_payload_len,
                       struct vm_error **err)
{
    size_t payload_len = 0;
    bool fits = frame->type <= CHANNEL_TYPE_MAX && frame->meta_len <= CHANNEL_META_MAX &&
                frame->n_payload >= 0 && frame->n_payload <= CHANNEL_IOV_MAX;
    for (int i = 0; fits && i < frame->n_payload; i++) {
        fits = frame->payload[i].iov_len <= CHANNEL_PAYLOAD_MAX - payload_len;
        payload_len += frame->payload[i].iov_len;
    }
    if (!fits)
        return error_set(err, VM_ERROR_USAGE, "a frame beyond a channel's bounds");
    *ret_payload_len = payload_len;
    return 0;
}

/* The frame as the queue holds it, but for its number. NULL: out of memory. */
static struct pending *make_pending(const struct channel_frame *frame, size_t payload_len)
{
    int n_iov = 2 + frame->n_payload;
    struct pending *p = calloc(1, sizeof(*p) + sizeof(*p->iov) * (size_t)n_iov);
    if (!p)
        return NULL;
    p->total = CHANNEL_HEADER_SIZE + frame->meta_len + payload_len;
    p->release = frame->release;
    p->release_arg = frame->release_arg;
    p->n_iov = n_iov;
    p->iov[0] = (struct iovec){p->header, CHANNEL_HEADER_SIZE};
    p->iov[1] = (struct iovec){(void *)(uintptr_t)frame->meta, frame->meta_len};
    if (frame->n_payload)
        memcpy(p->iov + 2, frame->payload, sizeof(*p->iov) * (size_t)frame->n_payload);
    return p;
}

/* Number it and put it into the queue. The lock is held. */
static void append(struct channel_sender *s, struct pending *p)
{
    int64_t now = clock_mono_ns();
    if (!s->head)
        s->busy_since = now;
    if (s->tail)
        s->tail->next = p;
    else
        s->head = p;
    s->tail = p;
    if (!s->at.frame && s->open)
        s->at.frame = p;
    s->n_pending++;
    s->stats.frames++;
    s->stats.bytes_unacked += p->total;
    rate_meter_begin(&s->meter, now);
    if (s->sleeping)
        eventfd_write(s->wake_fd, 1);
}

static int enqueue(struct channel_sender *s, const struct channel_frame *frame, size_t payload_len,
                   struct vm_error **err)
{
    struct channel_header header = {.type = frame->type,
                                    .meta_len = (uint32_t)frame->meta_len,
                                    .payload_len = (uint32_t)payload_len,
                                    .payload_sum = checksum_pieces(frame->payload, frame->n_payload)};
    struct pending *p = make_pending(frame, payload_len);
    if (!p)
        return error_nomem(err);
    SCOPE_LOCK(&s->lock);
    while (!s->error && !has_room(s)) {
        p->waited = true;
        wait_changed(s, INT64_MAX);
    }
    if (s->error || s->ending) {
        free(p);
        return s->error ? report_failure(s, err)
                        : error_set(err, VM_ERROR_USAGE, "the channel was ended");
    }
    p->seq = header.seq = ++s->last_seq;
    channel_header_write(p->header, &header, frame->meta);
    s->ending = frame->type == CHANNEL_TYPE_END;
    append(s, p);
    return 0;
}

int channel_sender_send(struct channel_sender *s, const struct channel_frame *frame,
                        struct vm_error **err)
{
    size_t payload_len = 0;
    if (check_frame(frame, &payload_len, err) == 0 && enqueue(s, frame, payload_len, err) == 0)
        return 0;
    if (frame->release)
        frame->release(frame->release_arg);
    return -1;
}

/* Is something of the queue still ours? The lock is held. */
static bool holds_frames(const struct channel_sender *s)
{
    return s->releasing || (s->head && !s->error);
}

int channel_sender_flush(struct channel_sender *s, int64_t deadline_ns, struct vm_error **err)
{
    SCOPE_LOCK(&s->lock);
    while (holds_frames(s))
        if (wait_changed(s, deadline_ns) < 0 && holds_frames(s))
            return error_set(err, VM_ERROR_TIMEOUT,
                             "%llu bytes of channel %u were not acknowledged in time",
                             (unsigned long long)s->stats.bytes_unacked, s->params.id.number);
    return s->error ? report_failure(s, err) : 0;
}

int channel_sender_begin_end(struct channel_sender *s, struct vm_error **err)
{
    struct channel_frame end = {.type = CHANNEL_TYPE_END};
    return enqueue(s, &end, 0, err);
}

int channel_sender_end(struct channel_sender *s, int64_t deadline_ns, struct vm_error **err)
{
    return channel_sender_begin_end(s, err) < 0 ? -1 : channel_sender_flush(s, deadline_ns, err);
}

void channel_sender_set_window(struct channel_sender *s, size_t bytes)
{
    SCOPE_LOCK(&s->lock);
    s->window = bytes;
    s->window_ms = 0;
    pthread_cond_broadcast(&s->changed);
}

void channel_sender_set_window_time(struct channel_sender *s, unsigned ms, size_t min, size_t max)
{
    SCOPE_LOCK(&s->lock);
    s->window_ms = ms;
    s->window_min = min;
    s->window_max = max;
    pthread_cond_broadcast(&s->changed);
}

/* 0: the thread has ended. */
static int64_t thread_cpu_ns(const struct channel_sender *s)
{
    clockid_t clock;
    struct timespec t;
    if (pthread_getcpuclockid(s->thread, &clock) || clock_gettime(clock, &t) < 0)
        return 0;
    return t.tv_sec * NSEC_PER_SEC + t.tv_nsec;
}

void channel_sender_get_stats(struct channel_sender *s, struct channel_sender_stats *ret_stats)
{
    SCOPE_LOCK(&s->lock);
    *ret_stats = s->stats;
    ret_stats->window = window_now(s);
    ret_stats->rate = s->meter.rate;
    ret_stats->cpu_ns = thread_cpu_ns(s);
    ret_stats->outage_ns = s->disconnected_since ? clock_mono_ns() - s->disconnected_since : 0;
}

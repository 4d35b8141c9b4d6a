/* SPDX-License-Identifier: Apache-2.0 */
/* The thread of a channel's sending side; see channel_sender_state.h. */
#include "migrate/channel_sender_state.h"

#include "base/clock.h"
#include "base/fault.h"
#include "base/io.h"
#include "base/log.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/eventfd.h>

enum {
    SLICE = 256 << 10,        /* written between two looks at the acknowledgements */
    LIMITED_SLICE = 64 << 10, /* the same under a rate limit */
    SLICE_IOV = 128,
    MESSAGES_MAX = 64, /* read between two looks at everything else: a receiver may send them without end */
};

/* ---- Acknowledgements ---- */

/* Remove what is acknowledged up to seq. The lock is held; the caller releases the list without it.
 */
static struct pending *take_acked(struct channel_sender *s, uint64_t seq, int64_t now)
{
    struct pending *list = s->head, *last = NULL;
    uint64_t bytes = 0;
    while (s->head && s->head->seq <= seq) {
        last = s->head;
        s->head = last->next;
        s->n_pending--;
        s->stats.frames_acked++;
        bytes += last->total;
    }
    s->applied = seq;
    if (!last)
        return NULL;
    last->next = NULL;
    if (!s->head)
        s->tail = NULL;
    s->stats.bytes_unacked -= bytes;
    s->stats.bytes_acked += bytes;
    int64_t delay = now - last->written_at;
    s->stats.ack_delay_ns = s->stats.ack_delay_ns ? (3 * s->stats.ack_delay_ns + delay) / 4 : delay;
    rate_meter_acked(&s->meter, now, bytes, s->head != NULL);
    s->finished = s->ending && !s->head;
    pthread_cond_broadcast(&s->changed);
    return list;
}

/* Without the lock; whoever flushes waits for this as well. */
static void give_back(struct channel_sender *s, struct pending *list)
{
    channel_sender_release(list);
    SCOPE_LOCK(&s->lock);
    s->releasing = false;
    pthread_cond_broadcast(&s->changed);
}

static void apply_ack(struct channel_sender *s, uint64_t seq)
{
    int64_t now = clock_mono_ns(), carrying = s->carrying_ns + conn_carrying_ns(s->conn);
    pthread_mutex_lock(&s->lock);
    s->stats.carrying_ns = carrying;
    bool progress = seq > s->applied;
    struct pending *list = take_acked(s, seq, now);
    bool idle = !s->head;
    s->releasing = list != NULL;
    pthread_mutex_unlock(&s->lock);
    if (list)
        give_back(s, list);
    if (progress || idle)
        s->outage_since = 0;
}

/* The end of the channel by an error, which the call takes over. */
static void fail(struct channel_sender *s, struct vm_error *why)
{
    pthread_mutex_lock(&s->lock);
    s->error = why;
    struct pending *list = s->head;
    s->head = s->tail = s->at.frame = NULL;
    s->n_pending = 0;
    s->releasing = true;
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->lock);
    give_back(s, list);
}

/* ---- Messages of the receiver ---- */

/* What a new connection may mend. */
static bool mendable(const struct channel_sender *s, const struct vm_error *err)
{
    return !s->refused && (err->kind == VM_ERROR_UNREACHABLE || err->kind == VM_ERROR_TIMEOUT ||
                           err->kind == VM_ERROR_SYSTEM);
}

/* The next message, if it has come: 1, else 0, or -1. */
static int next_message(struct channel_sender *s, struct channel_message *ret_message,
                        struct vm_error **err)
{
    for (;;) {
        ssize_t used = channel_message_parse(s->in, s->in_len, ret_message, err);
        if (used > 0) {
            s->in_len -= (size_t)used;
            memmove(s->in, s->in + used, s->in_len);
            return 1;
        }
        if (used < 0)
            return -1;
        ssize_t got = conn_try_read(s->conn, s->in + s->in_len, sizeof(s->in) - s->in_len, err);
        if (got == CONN_AGAIN)
            return 0;
        if (got == 0)
            error_set(err, VM_ERROR_UNREACHABLE, "the receiver closed the connection");
        if (got <= 0)
            return -1;
        s->in_len += (size_t)got;
    }
}

/* The receiver has ended the channel. Its words become the error. */
static int set_refused(struct channel_sender *s, const struct channel_message *m,
                       struct vm_error **err)
{
    s->refused = true;
    return error_set(err, m->error_kind, "the receiver ended channel %u: %s", s->params.id.number,
                     m->text);
}

static int handle_applied(struct channel_sender *s, uint64_t seq, struct vm_error **err)
{
    pthread_mutex_lock(&s->lock);
    uint64_t sent = s->at.frame ? s->at.frame->seq - 1 : s->last_seq;
    s->heard = seq;
    pthread_mutex_unlock(&s->lock);
    if (s->at.copies && seq == sent + 1)
        return 0; /* the fault's second copy is still being read from this frame's memory */
    if (seq > sent || seq < s->applied)
        return error_set(err, VM_ERROR_PROTOCOL,
                         "the receiver acknowledges frame %llu of channel %u, but %llu is sent and "
                         "%llu was acknowledged",
                         (unsigned long long)seq, s->params.id.number, (unsigned long long)sent,
                         (unsigned long long)s->applied);
    apply_ack(s, seq);
    return 0;
}

/* What has come, up to MESSAGES_MAX at once: 1 if that many were there, and there may be more; else 0, or -1. */
static int read_messages(struct channel_sender *s, struct vm_error **err)
{
    for (int n = 0; n < MESSAGES_MAX; n++) {
        struct channel_message m;
        int got = next_message(s, &m, err);
        if (got <= 0)
            return got;
        s->last_sign = clock_mono_ns();
        if (m.kind == CHANNEL_REFUSED)
            return set_refused(s, &m, err);
        if (m.kind != CHANNEL_APPLIED)
            return error_set(err, VM_ERROR_PROTOCOL, "the receiver answers what was not asked");
        if (handle_applied(s, m.applied, err) < 0)
            return -1;
    }
    return 1;
}

/* ---- Writing ---- */

static void rewind_frame(struct channel_sender *s)
{
    s->at.offset = s->at.index_offset = 0;
    s->at.index = 0;
}

/* The link had run dry although there was room in the window: the user is slower than the link. */
static void note_starvation(struct channel_sender *s)
{
    const struct pending *p = s->at.frame;
    if (p->waited || p->reached || conn_bytes_queued(s->conn))
        return;
    SCOPE_LOCK(&s->lock);
    rate_meter_starved(&s->meter);
}

static int begin_frame(struct channel_sender *s, struct vm_error **err)
{
    struct pending *p = s->at.frame;
    note_starvation(s);
    memcpy(s->at.header, p->header, sizeof(s->at.header));
    if (s->at.copies)
        return 0;
    switch (FAULT("channel.send")) {
    case FAULT_ERROR:
        return error_set(err, VM_ERROR_UNREACHABLE, "channel.send: %s", strerror(fault_errno()));
    case FAULT_DROP:
        return error_set(err, VM_ERROR_UNREACHABLE, "channel.send: connection dropped");
    case FAULT_CORRUPT:
        s->at.header[CHANNEL_HEADER_SIZE - 1] ^= 1;
        break;
    case FAULT_DUPLICATE:
        s->at.copies = 2;
        break;
    default:
        break;
    }
    return 0;
}

/* The next bytes of the frame, at most `max`. */
static int build_slice(const struct channel_sender *s, struct iovec out[SLICE_IOV], size_t max)
{
    const struct pending *p = s->at.frame;
    size_t offset = s->at.index_offset;
    int n = 0;
    for (int i = s->at.index; i < p->n_iov && n < SLICE_IOV && max; i++) {
        size_t left = p->iov[i].iov_len - offset;
        size_t len = left < max ? left : max;
        const uint8_t *base = i ? p->iov[i].iov_base : s->at.header;
        if (len)
            out[n++] = (struct iovec){(void *)(uintptr_t)(base + offset), len};
        max -= len;
        offset = 0;
    }
    return n;
}

static void count_written(struct channel_sender *s, size_t taken)
{
    struct pending *p = s->at.frame;
    SCOPE_LOCK(&s->lock);
    s->stats.bytes_sent += taken;
    if (s->at.offset < p->reached) {
        size_t again = p->reached - s->at.offset;
        s->stats.bytes_resent += again < taken ? again : taken;
    }
    if (p->seq <= s->heard)
        s->stats.bytes_acked_resent += taken;
    if (s->at.offset + taken > p->reached)
        p->reached = s->at.offset + taken;
}

static void advance_position(struct channel_sender *s, size_t taken)
{
    struct pending *p = s->at.frame;
    s->at.offset += taken;
    while (s->at.index < p->n_iov && taken >= p->iov[s->at.index].iov_len - s->at.index_offset) {
        taken -= p->iov[s->at.index].iov_len - s->at.index_offset;
        s->at.index++;
        s->at.index_offset = 0;
    }
    s->at.index_offset += taken;
    if (s->at.offset < p->total)
        return;
    rewind_frame(s);
    SCOPE_LOCK(&s->lock);
    p->written_at = clock_mono_ns();
    if (p->seq > s->written_seq)
        s->written_seq = p->seq;
    if (!s->at.copies || !--s->at.copies)
        s->at.frame = p->next;
}

/* How many bytes may be written now; 0: not before s->allowed_from. */
static size_t ask_limit(struct channel_sender *s)
{
    if (!s->params.limit)
        return SLICE;
    if (!s->allowance) {
        size_t left = s->at.frame->total - s->at.offset;
        s->allowance = left < LIMITED_SLICE ? left : LIMITED_SLICE;
        s->allowed_from = rate_limit_reserve(s->params.limit, s->allowance);
    }
    return clock_mono_ns() >= s->allowed_from ? s->allowance : 0;
}

/* One slice of the frame at the write position. */
static int write_slice(struct channel_sender *s, struct vm_error **err)
{
    size_t max = ask_limit(s);
    if (!max)
        return 0;
    if (!s->at.offset && begin_frame(s, err) < 0)
        return -1;
    struct iovec iov[SLICE_IOV];
    ssize_t taken = conn_try_writev(s->conn, iov, build_slice(s, iov, max), err);
    if (taken == CONN_AGAIN)
        return 0;
    if (taken < 0)
        return -1;
    count_written(s, (size_t)taken);
    if (s->params.limit)
        s->allowance -= (size_t)taken;
    advance_position(s, (size_t)taken);
    return 0;
}

/* ---- Connecting ---- */

static bool halted(const struct channel_sender *s)
{
    return io_latch_is_set(s->halt_fd);
}

static void drop_conn(struct channel_sender *s)
{
    if (s->conn)
        s->carrying_ns += conn_carrying_ns(s->conn);
    conn_destroy(s->conn);
    s->conn = NULL;
    s->in_len = 0;
}

static int send_hello(struct channel_sender *s, int64_t deadline_ns, struct vm_error **err)
{
    uint8_t out[CHANNEL_HELLO_SIZE];
    pthread_mutex_lock(&s->lock);
    struct channel_hello hello = {.id = s->params.id, .first_seq = s->applied + 1};
    pthread_mutex_unlock(&s->lock);
    channel_hello_write(out, &hello);
    return conn_write_full(s->conn, out, sizeof(out), deadline_ns, s->halt_fd, err);
}

/* Wait for the answer; while the receiver says that it is busy, the deadline moves on. */
static int await_answer(struct channel_sender *s, int64_t deadline_ns, int64_t last_deadline_ns,
                        uint64_t *ret_applied, struct vm_error **err)
{
    for (;;) {
        struct channel_message m;
        int got = next_message(s, &m, err);
        if (got < 0)
            return -1;
        if (!got) {
            if (io_wait(conn_fd(s->conn), conn_poll_events(s->conn, false), deadline_ns, s->halt_fd,
                        err) < 0)
                return -1;
            if (conn_try_flush(s->conn, err) == -1)
                return -1;
            continue;
        }
        switch (m.kind) {
        case CHANNEL_ANSWER:
            *ret_applied = m.applied;
            return 0;
        case CHANNEL_REFUSED:
            return set_refused(s, &m, err);
        case CHANNEL_WAIT:
            deadline_ns = clock_mono_ns() + s->attempt_ns;
            if (deadline_ns > last_deadline_ns)
                deadline_ns = last_deadline_ns;
            break;
        case CHANNEL_APPLIED:
            return error_set(err, VM_ERROR_PROTOCOL, "the receiver acknowledges before it answers");
        }
    }
}

/* Go on behind what the receiver has. */
static int resume_behind(struct channel_sender *s, uint64_t applied, struct vm_error **err)
{
    if (applied < s->applied || applied > s->written_seq)
        return error_set(err, VM_ERROR_PROTOCOL,
                         "the receiver of channel %u is at frame %llu, but %llu is sent and %llu "
                         "was acknowledged",
                         s->params.id.number, (unsigned long long)applied,
                         (unsigned long long)s->written_seq, (unsigned long long)s->applied);
    int64_t rtt = conn_rtt_ns(s->conn);
    pthread_mutex_lock(&s->lock);
    s->heard = applied;
    s->stats.rtt_ns = rtt;
    s->stats.reconnects += s->open;
    s->open = true;
    s->disconnected_since = 0;
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->lock);
    apply_ack(s, applied);
    SCOPE_LOCK(&s->lock);
    s->at.frame = s->head;
    s->at.copies = 0;
    rewind_frame(s);
    rate_meter_reset_interval(&s->meter, clock_mono_ns());
    return 0;
}

static int connect_once(struct channel_sender *s, int64_t deadline_ns, int64_t last_deadline_ns,
                        struct vm_error **err)
{
    uint64_t applied = 0;
    if (FAULT("channel.connect") == FAULT_ERROR)
        return error_errno(err, fault_errno(), "channel.connect");
    if (s->params.connect(s->params.connect_arg, deadline_ns, s->halt_fd, &s->conn, err) < 0)
        return -1;
    if (send_hello(s, deadline_ns, err) < 0 ||
        await_answer(s, deadline_ns, last_deadline_ns, &applied, err) < 0 ||
        resume_behind(s, applied, err) < 0) {
        drop_conn(s);
        return -1;
    }
    s->last_sign = clock_mono_ns();
    s->drained = conn_bytes_drained(s->conn);
    s->attempt_ns = CHANNEL_ATTEMPT_MIN_MS * NSEC_PER_MSEC;
    return 0;
}

static void wait_before_retry(const struct channel_sender *s)
{
    struct pollfd p = {.fd = s->halt_fd, .events = POLLIN};
    poll(&p, 1, CHANNEL_RETRY_MS);
}

/* 0 when connected or halted; -1 when the channel is at its end. */
static int connect_again(struct channel_sender *s, struct vm_error **err)
{
    if (!s->outage_since)
        s->outage_since = clock_mono_ns();
    int64_t last_deadline = s->outage_since + s->params.outage_limit_ns;
    cleanup_error struct vm_error *why = NULL;
    while (!halted(s)) {
        int64_t now = clock_mono_ns();
        if (now >= last_deadline)
            return error_set(
                err, VM_ERROR_TIMEOUT, "channel %u had no working connection for %lld ms (%s)",
                s->params.id.number, (long long)(s->params.outage_limit_ns / NSEC_PER_MSEC),
                why ? error_message(why) : "each broke before a frame got through");
        int64_t deadline = now + s->attempt_ns;
        error_clear(&why);
        if (connect_once(s, deadline < last_deadline ? deadline : last_deadline, last_deadline,
                         &why) == 0) {
            log_debug("channel connected", "attempt=%s channel=%u",
                      uuid_text(&s->params.id.attempt), s->params.id.number);
            return 0;
        }
        if (halted(s))
            return 0;
        if (!mendable(s, why))
            return error_propagate(err, steal_ptr(&why));
        if (why->kind == VM_ERROR_TIMEOUT && s->attempt_ns < CHANNEL_ATTEMPT_MAX_MS * NSEC_PER_MSEC)
            s->attempt_ns += s->attempt_ns / 2;
        wait_before_retry(s);
    }
    return 0;
}

/* ---- The channel's thread ---- */

/* TIMEOUT if the link seems dead while something is outstanding. */
static int check_stall(struct channel_sender *s, struct vm_error **err)
{
    pthread_mutex_lock(&s->lock);
    bool outstanding = s->head != NULL;
    int64_t since = s->busy_since;
    pthread_mutex_unlock(&s->lock);
    if (!outstanding)
        return 0;
    int64_t now = clock_mono_ns();
    if (since < s->last_sign)
        since = s->last_sign;
    if (now - since < CHANNEL_BEAT_MS * NSEC_PER_MSEC)
        return 0;
    uint64_t drained = conn_bytes_drained(s->conn);
    if (drained > s->drained) {
        s->drained = drained;
        s->last_sign = now;
        return 0;
    }
    if (now - since < CHANNEL_STALL_MS * NSEC_PER_MSEC)
        return 0;
    return error_set(err, VM_ERROR_TIMEOUT, "%s gave no sign of life for %d ms",
                     conn_peer_address(s->conn), CHANNEL_STALL_MS);
}

struct readiness {
    bool readable, writable, halted;
};

/* Wait until there is something to do; `more`: there is, of what was read already. */
static int wait_for_work(struct channel_sender *s, bool more, struct readiness *ret_ready,
                         struct vm_error **err)
{
    pthread_mutex_lock(&s->lock);
    bool to_write = s->at.frame != NULL, outstanding = s->head != NULL;
    s->sleeping = !to_write;
    pthread_mutex_unlock(&s->lock);

    bool held_back = to_write && !ask_limit(s);
    int64_t until = outstanding ? clock_mono_ns() + CHANNEL_BEAT_MS * NSEC_PER_MSEC : INT64_MAX;
    if (held_back && s->allowed_from < until)
        until = s->allowed_from;
    struct pollfd p[] = {
        {.fd = conn_fd(s->conn), .events = conn_poll_events(s->conn, to_write && !held_back)},
        {.fd = s->wake_fd, .events = POLLIN},
        {.fd = s->halt_fd, .events = POLLIN},
    };
    int n = poll(p, 3, more ? 0 : clock_ms_until(until));
    if (n < 0 && errno != EINTR)
        return error_errno(err, errno, "poll");
    if (p[1].revents) {
        eventfd_t count;
        eventfd_read(s->wake_fd, &count);
    }
    ret_ready->readable = more || p[0].revents & (POLLIN | POLLHUP | POLLERR);
    ret_ready->writable = p[0].revents & POLLOUT;
    ret_ready->halted = p[2].revents;
    return 0;
}

/* Write what may be written. A receiver that refused and closed is heard before the broken pipe. */
static int write_some(struct channel_sender *s, bool to_write, struct vm_error **err)
{
    struct vm_error *why = NULL, *said = NULL;
    if (conn_try_flush(s->conn, &why) != -1 && (!to_write || write_slice(s, &why) == 0))
        return 0;
    if (mendable(s, why) && read_messages(s, &said) < 0 && !mendable(s, said)) {
        error_free(why);
        return error_propagate(err, said);
    }
    error_free(said);
    return error_propagate(err, why);
}

/* Serve the connection until it breaks (-1), the channel ends, or it is halted. */
static int serve(struct channel_sender *s, struct vm_error **err)
{
    struct readiness ready = {.readable = true, .writable = true};
    while (!ready.halted) {
        int more = ready.readable ? read_messages(s, err) : 0;
        if (more < 0)
            return -1;
        pthread_mutex_lock(&s->lock);
        bool finished = s->finished, to_write = s->at.frame != NULL;
        s->sleeping = false;
        pthread_mutex_unlock(&s->lock);
        if (finished)
            return 0;
        if (ready.writable && write_some(s, to_write, err) < 0)
            return -1;
        if (check_stall(s, err) < 0 || wait_for_work(s, more, &ready, err) < 0)
            return -1;
    }
    return 0;
}

static void note_loss(struct channel_sender *s, const struct vm_error *why)
{
    log_warn("connection of a channel lost; connecting again", "attempt=%s channel=%u error=%s",
             uuid_text(&s->params.id.attempt), s->params.id.number, log_q(error_message(why)));
    int64_t now = clock_mono_ns();
    bool no_progress = s->outage_since != 0;
    if (!s->outage_since)
        s->outage_since = now;
    pthread_mutex_lock(&s->lock);
    s->disconnected_since = now;
    pthread_mutex_unlock(&s->lock);
    if (no_progress)
        wait_before_retry(s);
}

static bool finished(struct channel_sender *s)
{
    SCOPE_LOCK(&s->lock);
    return s->finished;
}

void *channel_sender_thread(void *arg)
{
    struct channel_sender *s = arg;
    pthread_setname_np(pthread_self(), "vmmig-channel");
    struct vm_error *err = NULL;
    while (!halted(s) && !finished(s)) {
        if (connect_again(s, &err) < 0)
            break;
        if (!s->conn || serve(s, &err) == 0)
            continue; /* halted or finished */
        drop_conn(s);
        bool over = finished(s); /* the last acknowledgement may come with the connection's end */
        if (!over && !mendable(s, err))
            break;
        if (!over)
            note_loss(s, err);
        error_clear(&err);
    }
    drop_conn(s);
    if (!err && !finished(s) && !io_latch_is_set(s->stop_fd))
        error_set(&err, VM_ERROR_CANCELLED, "cancelled");
    if (err)
        fail(s, err);
    return NULL;
}

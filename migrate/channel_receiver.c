/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The receiving side of a channel. The thread in channel_receiver_run reads frames and applies
 * them; a second one per connection, the acker, writes acknowledgements, so that the sender hears
 * from us also while a frame is being applied.
 */
#include "migrate/channel.h"

#include "base/clock.h"
#include "base/fault.h"
#include "base/io.h"
#include "base/log.h"
#include "migrate/channel_wire.h"
#include "migrate/checksum.h"

#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

enum {
    BUFFER_SIZE = 64 << 10, /* read ahead */
    ACK_FRAMES = 8,         /* acknowledge after so many frames */
    ACK_BYTES = 1 << 20,    /* or so many bytes, if the sender never pauses */
    ACK_TIMEOUT_MS = 5000,  /* a sender that takes no acknowledgement for so long is gone */
    REFUSAL_TIMEOUT_MS = 2000,
};

struct channel_receiver {
    struct channel_receiver_params params;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    /* Guarded by the lock: */
    uint64_t applied;
    bool ended;
    bool serving;           /* a thread owns everything below the line */
    uint64_t newest;        /* counts calls of run; only the newest may wait for its turn */
    struct conn *conn;      /* of the serving thread */
    struct vm_error *error; /* the channel is at its end */
    bool ack_wanted, acker_stop;
    struct channel_receiver_stats stats;

    atomic_int_fast64_t heard_ns; /* channel_receiver_heard_ns */

    /* ---- the serving thread's ---- */
    unsigned unacked_frames;
    size_t unacked_bytes;
    size_t begin, end; /* of what is read ahead */
    uint8_t header[CHANNEL_HEADER_SIZE];
    uint8_t meta[CHANNEL_META_MAX];
    uint8_t buffer[BUFFER_SIZE];
    struct iovec iov[CHANNEL_IOV_MAX + 1]; /* the payload's places, and the buffer behind */
};

/* ---- Hello ---- */

int channel_hello_receive(struct conn *conn, struct channel_hello *ret_hello, int64_t deadline_ns,
                          int cancel_fd, struct vm_error **err)
{
    uint8_t in[CHANNEL_HELLO_SIZE];
    if (conn_read_full(conn, in, sizeof(in), deadline_ns, cancel_fd, err) < 0)
        return -1;
    return channel_hello_parse(in, ret_hello, err);
}

static int send_message(struct conn *conn, const struct channel_message *m, int64_t deadline_ns,
                        int cancel_fd, struct vm_error **err)
{
    uint8_t out[CHANNEL_MESSAGE_SIZE + CHANNEL_TEXT_MAX];
    size_t len = channel_message_write(out, m);
    return conn_write_full(conn, out, len, deadline_ns, cancel_fd, err);
}

int channel_hello_refuse(struct conn *conn, const struct vm_error *reason, int64_t deadline_ns,
                         int cancel_fd, struct vm_error **err)
{
    struct channel_message m = {.kind = CHANNEL_REFUSED, .error_kind = reason->kind};
    snprintf(m.text, sizeof(m.text), "%s", reason->message);
    return send_message(conn, &m, deadline_ns, cancel_fd, err);
}

static void refuse(struct channel_receiver *r, struct conn *conn, const struct vm_error *reason)
{
    int64_t deadline = clock_mono_ns() + REFUSAL_TIMEOUT_MS * NSEC_PER_MSEC;
    channel_hello_refuse(conn, reason, deadline, r->params.cancel_fd, NULL);
}

/* Takes the same time wherever the tokens differ. */
static bool same_token(const struct channel_token *a, const struct channel_token *b)
{
    unsigned difference = 0;
    for (size_t i = 0; i < sizeof(a->bytes); i++)
        difference |= a->bytes[i] ^ b->bytes[i];
    return !difference;
}

static bool same_channel(const struct channel_id *a, const struct channel_id *b)
{
    bool token = same_token(&a->token, &b->token);
    return token && uuid_equal(&a->attempt, &b->attempt) && a->number == b->number;
}

/* ---- Acknowledgements ---- */

static int send_applied(struct conn *conn, uint64_t applied, int cancel_fd)
{
    struct channel_message m = {.kind = CHANNEL_APPLIED, .applied = applied};
    uint8_t out[CHANNEL_MESSAGE_SIZE + CHANNEL_TEXT_MAX];
    size_t len = channel_message_write(out, &m);
    switch (FAULT("channel.ack")) {
    case FAULT_ERROR:
        return -1;
    case FAULT_DROP:
        return 0;
    case FAULT_CORRUPT:
        out[len - 1] ^= 1;
        break;
    case FAULT_DUPLICATE:
        memcpy(out + len, out, len);
        len *= 2;
        break;
    default:
        break;
    }
    int64_t deadline = clock_mono_ns() + ACK_TIMEOUT_MS * NSEC_PER_MSEC;
    return conn_write_full(conn, out, len, deadline, cancel_fd, NULL);
}

/* Wait until an acknowledgement is due: true, or false at the end. The lock is held. */
static bool wait_ack_due(struct channel_receiver *r)
{
    int64_t beat = clock_mono_ns() + CHANNEL_BEAT_MS * NSEC_PER_MSEC;
    struct timespec t = {beat / NSEC_PER_SEC, beat % NSEC_PER_SEC};
    while (!r->ack_wanted && !r->acker_stop)
        if (pthread_cond_timedwait(&r->changed, &r->lock, &t))
            break;
    return r->ack_wanted || !r->acker_stop;
}

static void *acker_thread(void *arg)
{
    struct channel_receiver *r = arg;
    pthread_setname_np(pthread_self(), "vmmig-acker");
    pthread_mutex_lock(&r->lock);
    while (wait_ack_due(r)) {
        uint64_t applied = r->applied;
        struct conn *conn = r->conn;
        r->ack_wanted = false;
        pthread_mutex_unlock(&r->lock);
        int sent = send_applied(conn, applied, r->params.cancel_fd);
        pthread_mutex_lock(&r->lock);
        if (sent < 0) {
            conn_shutdown(conn); /* ends the reading thread's wait, too */
            break;
        }
    }
    pthread_mutex_unlock(&r->lock);
    return NULL;
}

static void want_ack(struct channel_receiver *r)
{
    if (!r->unacked_frames)
        return;
    r->unacked_frames = 0;
    r->unacked_bytes = 0;
    SCOPE_LOCK(&r->lock);
    r->ack_wanted = true;
    pthread_cond_broadcast(&r->changed);
}

/* ---- Reading ---- */

/* Wait for bytes; what was applied until now is acknowledged first. */
static ssize_t read_some(struct channel_receiver *r, const struct iovec *iov, int n,
                         struct vm_error **err)
{
    for (;;) {
        ssize_t got = conn_try_readv(r->conn, iov, n, err);
        if (got > 0)
            atomic_store(&r->heard_ns, clock_mono_ns());
        if (got > 0)
            return got;
        if (got == 0)
            return error_set(err, VM_ERROR_UNREACHABLE, "%s closed the connection",
                             conn_peer_address(r->conn));
        if (got != CONN_AGAIN)
            return -1;
        want_ack(r);
        if (io_wait(conn_fd(r->conn), POLLIN, INT64_MAX, r->params.cancel_fd, err) < 0)
            return -1;
    }
}

/* Take up to n bytes of what is read ahead. */
static size_t take_ahead(struct channel_receiver *r, void *out, size_t n)
{
    size_t ahead = r->end - r->begin;
    if (n > ahead)
        n = ahead;
    memcpy(out, r->buffer + r->begin, n);
    r->begin += n;
    return n;
}

static int read_small(struct channel_receiver *r, void *out, size_t n, struct vm_error **err)
{
    char *p = out;
    for (;;) {
        size_t taken = take_ahead(r, p, n);
        p += taken;
        n -= taken;
        if (!n)
            return 0;
        struct iovec all = {r->buffer, sizeof(r->buffer)};
        ssize_t got = read_some(r, &all, 1, err);
        if (got < 0)
            return -1;
        r->begin = 0;
        r->end = (size_t)got;
    }
}

/* Fill r->iov[0..n), straight from the connection; what comes behind is read ahead. */
static int read_payload(struct channel_receiver *r, int n, struct vm_error **err)
{
    struct iovec *iov = r->iov, *last = r->iov + n;
    while (iov < last) {
        size_t taken = take_ahead(r, iov->iov_base, iov->iov_len);
        iov->iov_base = (char *)iov->iov_base + taken;
        iov->iov_len -= taken;
        if (!iov->iov_len) {
            iov++;
            continue;
        }
        *last = (struct iovec){r->buffer, sizeof(r->buffer)};
        ssize_t got = read_some(r, iov, (int)(last - iov) + 1, err);
        if (got < 0)
            return -1;
        r->begin = r->end = 0;
        while (iov < last && (size_t)got >= iov->iov_len) {
            got -= (ssize_t)iov->iov_len;
            iov++;
        }
        if (iov < last) {
            iov->iov_base = (char *)iov->iov_base + got;
            iov->iov_len -= (size_t)got;
        } else {
            r->end = (size_t)got;
        }
    }
    return 0;
}

static int skip_payload(struct channel_receiver *r, size_t n, struct vm_error **err)
{
    while (n) {
        size_t step = n < sizeof(r->meta) ? n : sizeof(r->meta);
        if (read_small(r, r->meta, step, err) < 0)
            return -1;
        n -= step;
    }
    return 0;
}

/* ---- Frames ---- */

/* What a failure means for the channel. */
enum outcome { GO_ON, LOST, FATAL };

static enum outcome outcome_of(const struct vm_error *err)
{
    bool lost = err->kind == VM_ERROR_UNREACHABLE || err->kind == VM_ERROR_TIMEOUT ||
                err->kind == VM_ERROR_SYSTEM;
    return lost ? LOST : FATAL;
}

/* The places that the user named must hold the payload exactly. */
static int check_places(const struct iovec *iov, int n, size_t payload_len, struct vm_error **err)
{
    size_t total = 0;
    for (int i = 0; i < n && i < CHANNEL_IOV_MAX; i++)
        total += iov[i].iov_len;
    if (n > CHANNEL_IOV_MAX || total != payload_len)
        return error_set(err, VM_ERROR_FAILED, "a frame of %zu bytes was given room for %zu",
                         payload_len, total);
    return 0;
}

/* Between begin and commit. */
static enum outcome fill_places(struct channel_receiver *r, const struct channel_header *h, int n,
                                struct vm_error **err)
{
    struct iovec places[CHANNEL_IOV_MAX];
    memcpy(places, r->iov, sizeof(*places) * (size_t)n);
    if (read_payload(r, n, err) < 0)
        return outcome_of(*err);
    if (checksum_pieces(places, n) == h->payload_sum)
        return GO_ON;
    error_set(err, VM_ERROR_UNREACHABLE, "a frame was damaged on the way");
    return LOST;
}

static enum outcome commit(struct channel_receiver *r, struct vm_error **err)
{
    atomic_store(&r->heard_ns, INT64_MAX);
    int applied = r->params.ops.commit(r->params.arg, err);
    atomic_store(&r->heard_ns, clock_mono_ns());
    return applied < 0 ? FATAL : GO_ON;
}

static enum outcome apply_frame(struct channel_receiver *r, const struct channel_header *h,
                                struct vm_error **err)
{
    const struct channel_receiver_ops *ops = &r->params.ops;
    if (h->type == CHANNEL_TYPE_END)
        return GO_ON;
    int n = ops->begin(r->params.arg, h->type, r->meta, h->meta_len, h->payload_len, r->iov, err);
    if (n < 0 || check_places(r->iov, n, h->payload_len, err) < 0)
        return FATAL;
    enum outcome outcome = fill_places(r, h, n, err);
    if (outcome != GO_ON) {
        if (ops->abort)
            ops->abort(r->params.arg);
        return outcome;
    }
    return commit(r, err);
}

static void count_frame(struct channel_receiver *r, const struct channel_header *h, bool repeated)
{
    size_t total = CHANNEL_HEADER_SIZE + h->meta_len + h->payload_len;
    r->unacked_frames++;
    r->unacked_bytes += total;
    SCOPE_LOCK(&r->lock);
    if (repeated) {
        r->stats.frames_repeated++;
        return;
    }
    r->applied = h->seq;
    r->ended = h->type == CHANNEL_TYPE_END;
    r->stats.frames_applied++;
    r->stats.bytes_applied += total;
}

static enum outcome read_header(struct channel_receiver *r, struct channel_header *ret_header,
                                struct vm_error **err)
{
    if (read_small(r, r->header, sizeof(r->header), err) < 0)
        return outcome_of(*err);
    if (channel_header_parse(r->header, ret_header, err) < 0)
        return FATAL;
    if (read_small(r, r->meta, ret_header->meta_len, err) < 0 ||
        channel_header_verify(r->header, r->meta, err) < 0)
        return outcome_of(*err);
    return GO_ON;
}

static enum outcome handle_frame(struct channel_receiver *r, struct vm_error **err)
{
    struct channel_header h;
    enum outcome outcome = read_header(r, &h, err);
    if (outcome != GO_ON)
        return outcome;
    bool repeated = h.seq <= r->applied;
    if (!repeated && h.seq != r->applied + 1) {
        error_set(err, VM_ERROR_PROTOCOL, "frame %llu of channel %u came where %llu was due",
                  (unsigned long long)h.seq, r->params.id.number,
                  (unsigned long long)r->applied + 1);
        return FATAL;
    }
    if (repeated)
        outcome = skip_payload(r, h.payload_len, err) < 0 ? outcome_of(*err) : GO_ON;
    else
        outcome = apply_frame(r, &h, err);
    if (outcome != GO_ON)
        return outcome;
    count_frame(r, &h, repeated);
    if (r->unacked_frames >= ACK_FRAMES || r->unacked_bytes >= ACK_BYTES || r->ended)
        want_ack(r);
    return GO_ON;
}

/* Frames until the end, a loss, or an error. */
static enum outcome serve_frames(struct channel_receiver *r, struct vm_error **err)
{
    enum outcome outcome = GO_ON;
    r->begin = r->end = 0;
    r->unacked_frames = 0;
    r->unacked_bytes = 0;
    while (outcome == GO_ON && !r->ended)
        outcome = handle_frame(r, err);
    return outcome;
}

/* ---- One connection at a time ---- */

/* Our turn has come: true. Meanwhile the sender hears that we are busy. */
static bool take_turn(struct channel_receiver *r, struct conn *conn)
{
    struct channel_message wait = {.kind = CHANNEL_WAIT};
    pthread_mutex_lock(&r->lock);
    uint64_t mine = ++r->newest;
    if (r->serving)
        conn_shutdown(r->conn);
    pthread_cond_broadcast(&r->changed); /* a former one that waits for its turn gives up */
    while (r->serving && r->newest == mine) {
        int64_t beat = clock_mono_ns() + CHANNEL_BEAT_MS * NSEC_PER_MSEC;
        struct timespec t = {beat / NSEC_PER_SEC, beat % NSEC_PER_SEC};
        if (!pthread_cond_timedwait(&r->changed, &r->lock, &t))
            continue;
        pthread_mutex_unlock(&r->lock);
        int sent = send_message(conn, &wait, beat + REFUSAL_TIMEOUT_MS * NSEC_PER_MSEC,
                                r->params.cancel_fd, NULL);
        pthread_mutex_lock(&r->lock);
        if (sent < 0)
            break;
    }
    bool mine_now = !r->serving && r->newest == mine;
    if (mine_now) {
        r->serving = true;
        r->conn = conn;
        r->stats.connections++;
        r->ack_wanted = r->acker_stop = false;
    }
    pthread_mutex_unlock(&r->lock);
    return mine_now;
}

static void give_turn_up(struct channel_receiver *r)
{
    SCOPE_LOCK(&r->lock);
    r->serving = false;
    r->conn = NULL;
    pthread_cond_broadcast(&r->changed);
}

static enum outcome answer(struct channel_receiver *r, const struct channel_hello *hello,
                           struct vm_error **err)
{
    if (r->error) {
        error_propagate(err, error_copy(r->error));
        return FATAL;
    }
    if (hello->first_seq > r->applied + 1) {
        error_set(err, VM_ERROR_PROTOCOL,
                  "channel %u: the sender's first frame is %llu, but %llu is due",
                  r->params.id.number, (unsigned long long)hello->first_seq,
                  (unsigned long long)r->applied + 1);
        return FATAL;
    }
    struct channel_message m = {.kind = CHANNEL_ANSWER, .applied = r->applied};
    int64_t deadline = clock_mono_ns() + CONN_USER_TIMEOUT_MS * NSEC_PER_MSEC;
    if (send_message(r->conn, &m, deadline, r->params.cancel_fd, err) < 0)
        return outcome_of(*err);
    return GO_ON;
}

/* Between the turn and its end: answer, then frames, with the acker beside. */
static enum outcome serve(struct channel_receiver *r, const struct channel_hello *hello,
                          struct vm_error **err)
{
    enum outcome outcome = answer(r, hello, err);
    if (outcome != GO_ON || r->ended)
        return outcome;
    pthread_t acker;
    int failed = pthread_create(&acker, NULL, acker_thread, r);
    if (failed) {
        error_errno(err, failed, "cannot start a thread");
        return FATAL;
    }
    outcome = serve_frames(r, err);
    pthread_mutex_lock(&r->lock);
    r->acker_stop = true;
    pthread_cond_broadcast(&r->changed);
    pthread_mutex_unlock(&r->lock);
    if (outcome == LOST)
        conn_shutdown(r->conn); /* the acker may be waiting for it */
    pthread_join(acker, NULL);
    return outcome;
}

int channel_receiver_run(struct channel_receiver *r, struct conn *conn,
                         const struct channel_hello *hello, struct vm_error **err)
{
    cleanup_error struct vm_error *why = NULL;
    if (!same_channel(&r->params.id, &hello->id)) {
        error_set(&why, VM_ERROR_DENIED, "the channel's token is wrong");
        refuse(r, conn, why);
        log_warn("a channel with a wrong token was refused", "peer=%s", conn_peer_address(conn));
        return CHANNEL_LOST;
    }
    if (!take_turn(r, conn))
        return CHANNEL_LOST;
    atomic_store(&r->heard_ns, clock_mono_ns());
    enum outcome outcome = serve(r, hello, &why);
    if (outcome == FATAL) {
        refuse(r, conn, why);
        SCOPE_LOCK(&r->lock);
        if (!r->error)
            r->error = error_copy(why);
    } else if (outcome == LOST) {
        log_info("connection of a channel lost", "attempt=%s channel=%u error=%s",
                 uuid_text(&r->params.id.attempt), r->params.id.number, log_q(error_message(why)));
    }
    give_turn_up(r);
    if (outcome == FATAL)
        return error_propagate(err, steal_ptr(&why));
    return outcome == LOST ? CHANNEL_LOST : CHANNEL_ENDED;
}

/* ---- Life ---- */

struct channel_receiver *channel_receiver_create(const struct channel_receiver_params *params,
                                                 struct vm_error **err)
{
    struct channel_receiver *r = calloc(1, sizeof(*r));
    if (!r) {
        error_nomem(err);
        return NULL;
    }
    r->params = *params;
    pthread_mutex_init(&r->lock, NULL);
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&r->changed, &attr);
    pthread_condattr_destroy(&attr);
    return r;
}

void channel_receiver_destroy(struct channel_receiver *r)
{
    if (!r)
        return;
    error_free(r->error);
    pthread_cond_destroy(&r->changed);
    pthread_mutex_destroy(&r->lock);
    free(r);
}

void channel_receiver_get_stats(struct channel_receiver *r,
                                struct channel_receiver_stats *ret_stats)
{
    SCOPE_LOCK(&r->lock);
    *ret_stats = r->stats;
}

int64_t channel_receiver_heard_ns(struct channel_receiver *r)
{
    return atomic_load(&r->heard_ns);
}

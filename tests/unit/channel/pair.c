/* SPDX-License-Identifier: Apache-2.0 */
#include "pair.h"

#include "base/bytes.h"
#include "base/clock.h"
#include "base/io.h"
#include "migrate/channel_wire.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include <cmocka.h>

enum { CHUNK = 16384, RELAY_TICK_MS = 20 };

int64_t in_ms(int ms)
{
    return clock_mono_ns() + ms * NSEC_PER_MSEC;
}

/* ---- The link ---- */

struct relay {
    struct pair *pair;
    struct link_plan plan;
    int near, far; /* the sender's end, the receiver's end */
    uint64_t forward, backward;
    int64_t hold_until, started;
    bool hung;
};

/* How many bytes may pass now before something happens; 0: none. */
static size_t may_pass(struct relay *r, bool is_forward)
{
    uint64_t done = is_forward ? r->forward : r->backward;
    uint64_t cut = is_forward ? r->plan.cut_forward : r->plan.cut_backward;
    uint64_t left = cut - done;
    if (r->hung)
        return 0;
    if (is_forward && r->plan.hang_forward - r->forward < left)
        left = r->plan.hang_forward - r->forward;
    if (!is_forward && r->backward >= r->plan.hold_backward) {
        if (!r->hold_until)
            r->hold_until = in_ms(r->plan.hold_ms);
        if (clock_mono_ns() < r->hold_until)
            return 0;
    }
    if (is_forward && r->plan.rate) {
        int64_t elapsed = clock_mono_ns() - r->started;
        uint64_t allowed = (uint64_t)((double)r->plan.rate * (double)elapsed / 1e9);
        uint64_t room = allowed > r->forward ? allowed - r->forward : 0;
        left = room < left ? room : left;
    }
    return left < CHUNK ? (size_t)left : CHUNK;
}

/* False: the link is at its end. */
static bool pass_on(struct relay *r, bool is_forward)
{
    char data[CHUNK];
    size_t max = may_pass(r, is_forward);
    if (!max)
        return true;
    ssize_t n = recv(is_forward ? r->near : r->far, data, max, MSG_DONTWAIT);
    if (n == 0 || (n < 0 && errno != EAGAIN))
        return false;
    if (n < 0)
        return true;
    if (is_forward && r->plan.flip_forward - r->forward < (uint64_t)n)
        data[r->plan.flip_forward - r->forward] ^= 1;
    if (io_write_full(is_forward ? r->far : r->near, data, (size_t)n, in_ms(20000), r->pair->stop,
                      NULL) < 0)
        return false;
    *(is_forward ? &r->forward : &r->backward) += (uint64_t)n;
    if (r->forward >= r->plan.hang_forward)
        r->hung = true;
    return r->forward < r->plan.cut_forward && r->backward < r->plan.cut_backward;
}

static void *relay_thread(void *arg)
{
    struct relay *r = arg;
    r->started = clock_mono_ns();
    bool up = r->plan.cut_forward && r->plan.cut_backward;
    r->hung = !r->plan.hang_forward;
    while (up && !io_latch_is_set(r->pair->stop)) {
        struct pollfd p[] = {{.fd = r->near, .events = may_pass(r, true) ? POLLIN : 0},
                             {.fd = r->far, .events = may_pass(r, false) ? POLLIN : 0},
                             {.fd = r->pair->stop, .events = POLLIN}};
        poll(p, 3, RELAY_TICK_MS);
        up = pass_on(r, true) && pass_on(r, false);
        if (r->hung && (p[0].revents & POLLHUP))
            up = false; /* the sender gave this connection up */
    }
    close(r->near);
    /* A dead link tells the receiver nothing: its end stays open until the test's end. */
    if (r->hung)
        io_wait(r->pair->stop, POLLIN, INT64_MAX, -1, NULL);
    close(r->far);
    free(r);
    return NULL;
}

/* ---- The receiving end ---- */

static uint8_t byte_of(uint64_t number, size_t i)
{
    return (uint8_t)(number * 131 + i * 7 + (i >> 8));
}

static int frame_begin(void *arg, uint16_t type, const void *meta, size_t meta_len,
                       size_t payload_len, struct iovec *ret_iov, struct vm_error **err)
{
    struct pair *p = arg;
    if (meta_len != 16 || type != get_le64(meta) % 7)
        return error_set(err, VM_ERROR_CORRUPT, "a frame's meta is not what was sent");
    p->number = get_le64(meta);
    p->len = payload_len;
    if (p->number != p->applied + 1 || get_le64((const uint8_t *)meta + 8) != payload_len)
        return error_set(err, VM_ERROR_CORRUPT, "frame %d came after %d", (int)p->number,
                         (int)p->applied);
    free(p->got);
    p->got = malloc(payload_len + 1);
    /* Three places, one of them empty. */
    size_t third = payload_len / 3;
    ret_iov[0] = (struct iovec){p->got, third};
    ret_iov[1] = (struct iovec){p->got + third, 0};
    ret_iov[2] = (struct iovec){p->got + third, payload_len - third};
    return 3;
}

static int frame_commit(void *arg, struct vm_error **err)
{
    struct pair *p = arg;
    if (p->number == p->settings.fail_commit_at)
        return error_set(err, VM_ERROR_NO_SPACE, "no room for frame %d", (int)p->number);
    for (size_t i = 0; i < p->len; i++)
        if (p->got[i] != byte_of(p->number, i))
            return error_set(err, VM_ERROR_CORRUPT, "byte %zu of frame %d differs", i,
                             (int)p->number);
    if (p->settings.on_commit)
        p->settings.on_commit(p->settings.commit_arg, p->number);
    p->applied++;
    return 0;
}

static void frame_abort(void *arg)
{
    struct pair *p = arg;
    p->aborted++;
}

struct arrival {
    struct pair *pair;
    int fd;
};

static void *serve_thread(void *arg)
{
    struct arrival a = *(struct arrival *)arg;
    struct pair *p = a.pair;
    free(arg);
    struct channel_hello hello;
    struct conn_context *ctx = p->settings.accept ? p->settings.accept : p->plain;
    CLEANUP(conn) struct conn *conn = conn_accept(ctx, a.fd, INT64_MAX, p->stop, NULL);
    if (!conn || conn_purpose(conn) != CONN_CHANNEL ||
        channel_hello_receive(conn, &hello, INT64_MAX, p->stop, NULL) < 0)
        return NULL;
    struct vm_error *err = NULL;
    int result = channel_receiver_run(p->receiver, conn, &hello, &err);
    if (result == CHANNEL_ENDED)
        p->ended = true;
    pthread_mutex_lock(&p->lock);
    if (result < 0 && !p->receiver_error)
        p->receiver_error = err;
    else
        error_free(err);
    pthread_mutex_unlock(&p->lock);
    return NULL;
}

static void start_thread(struct pair *p, void *(*fn)(void *), void *arg)
{
    pthread_mutex_lock(&p->lock);
    if (p->n_threads >= 2 * PAIR_CONNECTIONS_MAX ||
        pthread_create(&p->threads[p->n_threads], NULL, fn, arg))
        abort();
    p->n_threads++;
    pthread_mutex_unlock(&p->lock);
}

static void start_serving(struct pair *p, int fd)
{
    struct arrival *arrival = malloc(sizeof(*arrival));
    *arrival = (struct arrival){p, fd};
    start_thread(p, serve_thread, arrival);
}

static void *listen_thread(void *arg)
{
    struct pair *p = arg;
    while (io_wait(p->listener, POLLIN, INT64_MAX, p->stop, NULL) == 0) {
        int fd = accept4(p->listener, NULL, NULL, SOCK_CLOEXEC);
        if (fd >= 0)
            start_serving(p, fd);
    }
    return NULL;
}

static void start_listening(struct pair *p)
{
    struct sockaddr_in at;
    socklen_t len = sizeof(at);
    struct vm_error *err = NULL;
    p->listener = conn_listen("127.0.0.1:0", &err);
    if (p->listener < 0)
        fail_msg("%s", error_message(err));
    getsockname(p->listener, (struct sockaddr *)&at, &len);
    snprintf(p->address, sizeof(p->address), "127.0.0.1:%d", ntohs(at.sin_port));
    start_thread(p, listen_thread, p);
}

/* ---- The sending end ---- */

static int dial_through_relay(struct pair *p, struct link_plan plan)
{
    int near[2], far[2];
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, near) < 0 ||
        socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, far) < 0)
        abort();
    struct relay *relay = calloc(1, sizeof(*relay));
    *relay = (struct relay){.pair = p, .plan = plan, .near = near[1], .far = far[0]};
    start_thread(p, relay_thread, relay);
    start_serving(p, far[1]);
    return near[0];
}

static int pair_connect(void *arg, int64_t deadline_ns, int cancel_fd, struct conn **ret_conn,
                        struct vm_error **err)
{
    struct pair *p = arg;
    struct conn_context *ctx = p->settings.dial ? p->settings.dial : p->plain;
    unsigned n = atomic_fetch_add(&p->connections, 1);
    struct link_plan plan =
        p->settings.plan ? p->settings.plan(p->settings.plan_arg, n) : LINK_CLEAN;
    if (plan.refuse)
        return error_set(err, VM_ERROR_UNREACHABLE, "the test's link is down");
    if (p->settings.tcp)
        *ret_conn = conn_dial(ctx, p->address, CONN_CHANNEL, deadline_ns, cancel_fd, err);
    else
        *ret_conn = conn_dial_fd(ctx, dial_through_relay(p, plan), "localhost", CONN_CHANNEL,
                                 deadline_ns, cancel_fd, err);
    return *ret_conn ? 0 : -1;
}

struct pair *pair_create(const struct pair_settings *settings)
{
    struct pair *p = calloc(1, sizeof(*p));
    p->settings = *settings;
    p->plain = conn_context_create(&(struct conn_settings){.insecure_plain = true}, NULL);
    p->stop = io_latch_new(NULL);
    pthread_mutex_init(&p->lock, NULL);
    p->listener = -1;
    if (settings->tcp)
        start_listening(p);
    p->id = (struct channel_id){uuid_new(), channel_token_new(), 3};
    struct channel_receiver_params receiver = {
        .id = p->id,
        .ops = {.begin = frame_begin, .commit = frame_commit, .abort = frame_abort},
        .arg = p,
        .cancel_fd = p->stop};
    struct channel_sender_params sender = {.id = p->id,
                                           .connect = pair_connect,
                                           .connect_arg = p,
                                           .limit = settings->limit,
                                           .outage_limit_ns = settings->outage_limit_ns,
                                           .cancel_fd =
                                               settings->cancel_fd ? settings->cancel_fd : -1};
    if (settings->wrong_token)
        sender.id.token = channel_token_new();
    p->receiver = channel_receiver_create(&receiver, NULL);
    p->sender = channel_sender_create(&sender, NULL);
    assert_non_null(p->sender);
    return p;
}

struct sent_frame {
    struct pair *pair;
    uint8_t meta[16];
    uint8_t payload[];
};

static void release_frame(void *arg)
{
    struct sent_frame *f = arg;
    f->pair->released++;
    memset(f->meta, 0xee, sizeof(f->meta)); /* whoever still reads it sends rubbish */
    free(f);
}

int pair_try_send(struct pair *p, size_t len, struct vm_error **err)
{
    struct sent_frame *f = malloc(sizeof(*f) + len);
    uint64_t number = ++p->sent;
    f->pair = p;
    put_le64(f->meta, number);
    put_le64(f->meta + 8, len);
    for (size_t i = 0; i < len; i++)
        f->payload[i] = byte_of(number, i);
    struct iovec iov[] = {{f->payload, len / 2}, {f->payload + len / 2, len - len / 2}};
    struct channel_frame frame = {.type = (uint16_t)(number % 7),
                                  .meta = f->meta,
                                  .meta_len = sizeof(f->meta),
                                  .payload = iov,
                                  .n_payload = 2,
                                  .release = release_frame,
                                  .release_arg = f};
    return channel_sender_send(p->sender, &frame, err);
}

void pair_send(struct pair *p, unsigned n, size_t len)
{
    for (unsigned i = 0; i < n; i++) {
        struct vm_error *err = NULL;
        if (pair_try_send(p, len, &err) < 0)
            fail_msg("send: %s", error_message(err));
    }
}

void pair_check(struct pair *p)
{
    struct channel_sender_stats sender;
    struct channel_receiver_stats receiver;
    channel_sender_get_stats(p->sender, &sender);
    channel_receiver_get_stats(p->receiver, &receiver);
    assert_int_equal(p->applied, p->sent);
    assert_int_equal(p->released, p->sent);
    assert_int_equal(sender.bytes_acked_resent, 0);
    assert_int_equal(receiver.frames_repeated, 0);
    assert_int_equal(sender.bytes_unacked, 0);
    assert_int_equal(sender.frames_acked, sender.frames);
    assert_int_equal(sender.bytes_sent - sender.bytes_resent, sender.bytes_acked);
    assert_int_equal(receiver.bytes_applied, sender.bytes_acked);
}

void pair_end(struct pair *p)
{
    struct vm_error *err = NULL;
    if (channel_sender_flush(p->sender, in_ms(20000), &err) < 0 ||
        channel_sender_end(p->sender, in_ms(20000), &err) < 0)
        fail_msg("%s", error_message(err));
    pair_check(p);
}

/* The thread number i, if there is one; the listener's thread adds to them until it is joined. */
static bool thread_at(struct pair *p, unsigned i, pthread_t *ret_thread)
{
    SCOPE_LOCK(&p->lock);
    *ret_thread = p->threads[i];
    return i < p->n_threads;
}

void pair_stop(struct pair *p)
{
    pthread_t thread;
    channel_sender_destroy(p->sender);
    p->sender = NULL;
    io_latch_set(p->stop);
    for (unsigned i = 0; thread_at(p, i, &thread); i++)
        pthread_join(thread, NULL);
    p->n_threads = 0;
    close_fd(&p->listener);
}

void pair_destroy(struct pair *p)
{
    pair_stop(p);
    channel_receiver_destroy(p->receiver);
    conn_context_destroy(p->plain);
    error_free(p->receiver_error);
    pthread_mutex_destroy(&p->lock);
    close(p->stop);
    free(p->got);
    free(p);
}

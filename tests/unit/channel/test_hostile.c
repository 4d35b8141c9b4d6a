/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Channels against peers made by hand, who send what the protocol does not allow: to a receiver,
 * to a sender, and to the parsers.
 */
#include "pair.h"

#include "base/bytes.h"
#include "base/clock.h"
#include "base/fault.h"
#include "base/io.h"
#include "migrate/channel_wire.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cmocka.h>
#include <xxhash.h>

/* ---- A receiver, and a sender made by hand ---- */

struct victim {
    struct channel_receiver *receiver;
    struct channel_id id;
    struct conn_context *ctx;
    struct conn *conn; /* the receiver's end of the present connection */
    int fd;            /* ours */
    pthread_t thread;
    int result;
    struct vm_error *err;
    unsigned begun, committed, aborted;
    uint8_t payload[4096];
};

static int count_begin(void *arg, uint16_t type, const void *meta, size_t meta_len,
                       size_t payload_len, struct iovec *ret_iov, struct vm_error **err)
{
    struct victim *v = arg;
    v->begun++;
    assert_true(payload_len <= sizeof(v->payload));
    ret_iov[0] = (struct iovec){v->payload, payload_len};
    return 1;
}

static int count_commit(void *arg, struct vm_error **err)
{
    ((struct victim *)arg)->committed++;
    return 0;
}

static void count_abort(void *arg)
{
    ((struct victim *)arg)->aborted++;
}

static void *run_thread(void *arg)
{
    struct victim *v = arg;
    struct channel_hello hello;
    v->result = channel_hello_receive(v->conn, &hello, in_ms(5000), -1, &v->err);
    if (v->result == 0)
        v->result = channel_receiver_run(v->receiver, v->conn, &hello, &v->err);
    conn_shutdown(v->conn);
    return NULL;
}

static void victim_init(struct victim *v)
{
    memset(v, 0, sizeof(*v));
    v->id = (struct channel_id){uuid_new(), channel_token_new(), 5};
    v->ctx = conn_context_create(&(struct conn_settings){.insecure_plain = true}, NULL);
    struct channel_receiver_params params = {
        .id = v->id,
        .ops = {.begin = count_begin, .commit = count_commit, .abort = count_abort},
        .arg = v,
        .cancel_fd = -1};
    v->receiver = channel_receiver_create(&params, NULL);
}

static void victim_finish(struct victim *v)
{
    channel_receiver_destroy(v->receiver);
    conn_context_destroy(v->ctx);
}

static void put(struct victim *v, const void *data, size_t n)
{
    assert_int_equal(io_write_full(v->fd, data, n, in_ms(5000), -1, NULL), 0);
}

static struct channel_message get(struct victim *v)
{
    struct channel_message m = {0};
    uint8_t in[CHANNEL_MESSAGE_SIZE + CHANNEL_TEXT_MAX];
    assert_int_equal(io_read_full(v->fd, in, CHANNEL_MESSAGE_SIZE, in_ms(5000), -1, NULL), 0);
    size_t text = get_le32(in + 16);
    assert_int_equal(io_read_full(v->fd, in + CHANNEL_MESSAGE_SIZE, text, in_ms(5000), -1, NULL),
                     0);
    assert_int_equal(channel_message_parse(in, CHANNEL_MESSAGE_SIZE + text, &m, NULL),
                     CHANNEL_MESSAGE_SIZE + text);
    return m;
}

/* A connection up to where the hello is due. */
static void open_conn(struct victim *v)
{
    int fds[2];
    uint8_t preamble[8];
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM, 0, fds), 0);
    v->fd = fds[0];
    v->err = NULL;
    put(v, "VMMG\x01\x02\0", 8);
    v->conn = conn_accept(v->ctx, fds[1], in_ms(5000), -1, NULL);
    assert_non_null(v->conn);
    assert_int_equal(io_read_full(v->fd, preamble, 8, in_ms(5000), -1, NULL), 0);
    pthread_create(&v->thread, NULL, run_thread, v);
}

static void put_hello(struct victim *v, uint64_t first_seq)
{
    uint8_t out[CHANNEL_HELLO_SIZE];
    channel_hello_write(out, &(struct channel_hello){v->id, first_seq});
    put(v, out, sizeof(out));
}

/* And up to where frames are due. */
static void open_channel(struct victim *v, uint64_t expected_applied)
{
    open_conn(v);
    put_hello(v, 1);
    struct channel_message m = get(v);
    assert_int_equal(m.kind, CHANNEL_ANSWER);
    assert_int_equal(m.applied, expected_applied);
}

static void close_conn(struct victim *v)
{
    shutdown(v->fd, SHUT_WR); /* the receiver's thread ends at the latest now */
    pthread_join(v->thread, NULL);
    conn_destroy(v->conn);
    close(v->fd);
}

static void assert_run_fails(struct victim *v, enum vm_error_kind kind, const char *text)
{
    close_conn(v);
    assert_int_equal(v->result, -1);
    if (!strstr(v->err->message, text))
        fail_msg("\"%s\" does not say \"%s\"", v->err->message, text);
    assert_int_equal(v->err->kind, kind);
    error_free(v->err);
}

static void assert_run_lost(struct victim *v)
{
    close_conn(v);
    assert_null(v->err);
    assert_int_equal(v->result, CHANNEL_LOST);
}

static size_t make_frame(uint8_t out[256], uint64_t seq, const char *payload)
{
    size_t len = strlen(payload);
    struct channel_header h = {.type = 1,
                               .seq = seq,
                               .meta_len = 4,
                               .payload_len = (uint32_t)len,
                               .payload_sum = XXH3_64bits(payload, len)};
    channel_header_write(out, &h, "meta");
    memcpy(out + CHANNEL_HEADER_SIZE, "meta", 4);
    memcpy(out + CHANNEL_HEADER_SIZE + 4, payload, len);
    return CHANNEL_HEADER_SIZE + 4 + len;
}

static void put_frame(struct victim *v, uint64_t seq, const char *payload)
{
    uint8_t out[256];
    put(v, out, make_frame(out, seq, payload));
}

/* Acknowledgements until `applied`. */
static void await_applied(struct victim *v, uint64_t applied)
{
    for (;;) {
        struct channel_message m = get(v);
        assert_int_equal(m.kind, CHANNEL_APPLIED);
        assert_true(m.applied <= applied);
        if (m.applied == applied)
            return;
    }
}

static void test_repeated_frames_are_skipped(void **state)
{
    struct victim v;
    struct channel_receiver_stats stats;
    victim_init(&v);
    open_channel(&v, 0);
    put_frame(&v, 1, "one");
    put_frame(&v, 1, "another one");
    put_frame(&v, 2, "two");
    put_frame(&v, 1, "one");
    put_frame(&v, 2, "two");
    put_frame(&v, 3, "three");
    await_applied(&v, 3);
    assert_run_lost(&v);
    channel_receiver_get_stats(v.receiver, &stats);
    assert_int_equal(v.committed, 3);
    assert_int_equal(stats.frames_applied, 3);
    assert_int_equal(stats.frames_repeated, 3);
    victim_finish(&v);
}

static void test_a_gap_ends_the_channel(void **state)
{
    struct victim v;
    victim_init(&v);
    open_channel(&v, 0);
    put_frame(&v, 1, "one");
    put_frame(&v, 3, "three");
    struct channel_message m;
    do
        m = get(&v);
    while (m.kind == CHANNEL_APPLIED);
    assert_int_equal(m.kind, CHANNEL_REFUSED);
    assert_int_equal(m.error_kind, VM_ERROR_PROTOCOL);
    assert_string_equal(m.text, "frame 3 of channel 5 came where 2 was due");
    assert_run_fails(&v, VM_ERROR_PROTOCOL, "frame 3 of channel 5 came where 2 was due");
    assert_int_equal(v.committed, 1);
    /* For good: the next connection hears the same. */
    open_conn(&v);
    put_hello(&v, 1);
    m = get(&v);
    assert_int_equal(m.kind, CHANNEL_REFUSED);
    assert_run_fails(&v, VM_ERROR_PROTOCOL, "frame 3 of channel 5 came where 2 was due");
    victim_finish(&v);
}

static void test_frames_of_the_past_do_not_hide_a_gap(void **state)
{
    struct victim v;
    victim_init(&v);
    open_conn(&v);
    put_hello(&v, 2); /* says that it has given frame 1 up */
    struct channel_message m = get(&v);
    assert_int_equal(m.kind, CHANNEL_REFUSED);
    assert_run_fails(&v, VM_ERROR_PROTOCOL, "the sender's first frame is 2, but 1 is due");
    victim_finish(&v);
}

/* A damaged frame costs the connection, not the channel, and nothing of it is applied. */
static void test_damaged_frames(void **state)
{
    struct victim v;
    uint8_t frame[256];
    victim_init(&v);
    size_t len = make_frame(frame, 1, "payload");
    for (size_t i = 8; i < len; i++) {
        if (i >= 16 && i < 24)
            continue; /* lengths: the frame would end elsewhere */
        open_channel(&v, 0);
        frame[i] ^= 0x10;
        put(&v, frame, len);
        frame[i] ^= 0x10;
        assert_run_lost(&v);
    }
    assert_int_equal(v.committed, 0);
    assert_int_equal(v.begun, v.aborted);
    open_channel(&v, 0);
    put(&v, frame, len);
    await_applied(&v, 1);
    assert_run_lost(&v);
    assert_int_equal(v.committed, 1);
    victim_finish(&v);
}

static void test_headers_that_lie(void **state)
{
    static const struct {
        size_t at;
        uint8_t bytes[4];
        size_t n;
        const char *text;
    } lies[] = {
        {0, "XXXX", 4, "no frame where one should begin"},
        {4, {0xfe, 0xff}, 2, "a frame has the unknown type 65534"},
        {4, {0x00, 0x80}, 2, "a frame has the unknown type 32768"},
        {4, {0xff, 0xff}, 2, "the frame that ends a channel is not empty"},
        {6, {1, 0}, 2, "a frame has unknown flags"},
        {16, {1, 0, 1, 0}, 4, "a frame of 65537 and 7 bytes is too long"},
        {16, {0xff, 0xff, 0xff, 0xff}, 4, "is too long"},
        {20, {1, 0, 0x40, 0}, 4, "a frame of 4 and 4194305 bytes is too long"},
        {20, {0xff, 0xff, 0xff, 0xff}, 4, "is too long"},
    };
    for (size_t i = 0; i < sizeof(lies) / sizeof(*lies); i++) {
        struct victim v;
        uint8_t frame[256];
        victim_init(&v);
        size_t len = make_frame(frame, 1, "payload");
        memcpy(frame + lies[i].at, lies[i].bytes, lies[i].n);
        put_le64(frame + 32, XXH3_64bits_withSeed("meta", 4, XXH3_64bits(frame, 32)));
        open_channel(&v, 0);
        put(&v, frame, len);
        assert_run_fails(&v, VM_ERROR_PROTOCOL, lies[i].text);
        assert_int_equal(v.begun, 0);
        victim_finish(&v);
    }
}

static void test_hellos(void **state)
{
    static const struct {
        size_t at;
        uint8_t byte;
        bool sum_again;
        enum vm_error_kind kind;
        const char *text;
    } bad[] = {
        {0, 'x', true, VM_ERROR_PROTOCOL, "does not begin with its hello"},
        {4, 9, true, VM_ERROR_VERSION, "a channel of version 9, this side has version 1"},
        {6, CHANNELS_MAX, true, VM_ERROR_PROTOCOL, "hello has number 64"},
        {40, 0, true, VM_ERROR_PROTOCOL, "frame 0"},
        {30, 1, false, VM_ERROR_UNREACHABLE, "hello was damaged on the way"},
    };
    for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); i++) {
        struct victim v;
        uint8_t out[CHANNEL_HELLO_SIZE];
        victim_init(&v);
        open_conn(&v);
        channel_hello_write(out, &(struct channel_hello){v.id, 1});
        out[bad[i].at] = bad[i].byte == out[bad[i].at] ? bad[i].byte + 1 : bad[i].byte;
        if (bad[i].sum_again)
            put_le64(out + 48, XXH3_64bits(out, 48));
        put(&v, out, sizeof(out));
        assert_run_fails(&v, bad[i].kind, bad[i].text);
        victim_finish(&v);
    }
}

/* A stranger with a wrong token neither gets in nor disturbs the channel that is at work. */
static void test_a_stranger_does_no_harm(void **state)
{
    struct victim v;
    victim_init(&v);
    open_channel(&v, 0);
    put_frame(&v, 1, "one");
    await_applied(&v, 1);
    for (int i = 0; i < 3; i++) {
        struct victim stranger = {.receiver = v.receiver, .id = v.id, .ctx = v.ctx};
        if (i == 0)
            stranger.id.token.bytes[15] ^= 1;
        if (i == 1)
            stranger.id.attempt.bytes[0] ^= 1;
        if (i == 2)
            stranger.id.number++;
        open_conn(&stranger);
        put_hello(&stranger, 1);
        struct channel_message m = get(&stranger);
        assert_int_equal(m.kind, CHANNEL_REFUSED);
        assert_int_equal(m.error_kind, VM_ERROR_DENIED);
        assert_run_lost(&stranger);
    }
    put_frame(&v, 2, "two");
    await_applied(&v, 2);
    assert_run_lost(&v);
    victim_finish(&v);
}

/* A second connection of the same channel ends the first, and goes on where that was. */
static void test_a_new_connection_takes_over(void **state)
{
    struct victim v;
    victim_init(&v);
    open_channel(&v, 0);
    put_frame(&v, 1, "one");
    await_applied(&v, 1);
    uint8_t frame[256];
    size_t len = make_frame(frame, 2, "two");
    put(&v, frame, len - 1); /* half open, in the midst of a frame */
    struct victim next = {.receiver = v.receiver, .id = v.id, .ctx = v.ctx};
    open_conn(&next);
    put_hello(&next, 2);
    struct channel_message m = get(&next);
    assert_int_equal(m.kind, CHANNEL_ANSWER);
    assert_int_equal(m.applied, 1);
    assert_run_lost(&v);
    put_frame(&next, 2, "two");
    await_applied(&next, 2);
    assert_run_lost(&next);
    assert_int_equal(v.committed, 2);
    victim_finish(&v);
}

/* ---- A sender, and a receiver made by hand ---- */

struct dupe {
    struct conn_context *ctx;
    struct channel_sender *sender;
    int fds[2];
    unsigned connections;
    /* What the hand-made receiver says after the preamble. */
    struct channel_message say[3];
    unsigned n_say;
    bool damaged;
};

static int dupe_connect(void *arg, int64_t deadline_ns, int cancel_fd, struct conn **ret_conn,
                        struct vm_error **err)
{
    struct dupe *d = arg;
    uint8_t out[CHANNEL_MESSAGE_SIZE + CHANNEL_TEXT_MAX];
    if (d->connections++)
        close(d->fds[1]);
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM, 0, d->fds), 0);
    assert_int_equal(io_write_full(d->fds[1], "VMMG\x01\0\0", 8, deadline_ns, -1, NULL), 0);
    for (unsigned i = 0; i < d->n_say; i++) {
        size_t len = channel_message_write(out, &d->say[i]);
        out[len - 1] ^= d->damaged;
        assert_int_equal(io_write_full(d->fds[1], out, len, deadline_ns, -1, NULL), 0);
    }
    *ret_conn = conn_dial_fd(d->ctx, d->fds[0], "x", CONN_CHANNEL, deadline_ns, cancel_fd, err);
    return *ret_conn ? 0 : -1;
}

static void dupe_init(struct dupe *d)
{
    d->ctx = conn_context_create(&(struct conn_settings){.insecure_plain = true}, NULL);
    struct channel_sender_params params = {.id = {uuid_new(), channel_token_new(), 5},
                                           .connect = dupe_connect,
                                           .connect_arg = d,
                                           .outage_limit_ns = NSEC_PER_SEC,
                                           .cancel_fd = -1};
    d->sender = channel_sender_create(&params, NULL);
}

static void dupe_finish(struct dupe *d)
{
    channel_sender_destroy(d->sender);
    close(d->fds[1]);
    conn_context_destroy(d->ctx);
}

static void assert_sender_fails(struct dupe d, enum vm_error_kind kind, const char *text)
{
    struct vm_error *err = NULL;
    dupe_init(&d);
    channel_sender_send(d.sender, &(struct channel_frame){.type = 1}, NULL);
    assert_int_equal(channel_sender_flush(d.sender, in_ms(5000), &err), -1);
    if (!strstr(err->message, text))
        fail_msg("\"%s\" does not say \"%s\"", err->message, text);
    assert_int_equal(err->kind, kind);
    error_free(err);
    dupe_finish(&d);
}

static void test_receivers_that_lie(void **state)
{
    const struct channel_message answer = {.kind = CHANNEL_ANSWER};
    assert_sender_fails((struct dupe){.say = {{.kind = CHANNEL_ANSWER, .applied = 1}}, .n_say = 1},
                        VM_ERROR_PROTOCOL, "is at frame 1, but 0 is sent");
    assert_sender_fails(
        (struct dupe){.say = {answer, {.kind = CHANNEL_APPLIED, .applied = 99}}, .n_say = 2},
        VM_ERROR_PROTOCOL, "acknowledges frame 99");
    assert_sender_fails((struct dupe){.say = {{.kind = CHANNEL_APPLIED}}, .n_say = 1},
                        VM_ERROR_PROTOCOL, "acknowledges before it answers");
    assert_sender_fails((struct dupe){.say = {answer, answer}, .n_say = 2}, VM_ERROR_PROTOCOL,
                        "answers what was not asked");
    assert_sender_fails((struct dupe){.say = {answer, {.kind = CHANNEL_WAIT}}, .n_say = 2},
                        VM_ERROR_PROTOCOL, "answers what was not asked");
    /* Its words are shown, but cannot forge a line. */
    assert_sender_fails((struct dupe){.say = {{.kind = CHANNEL_REFUSED,
                                               .error_kind = VM_ERROR_NOT_FOUND,
                                               .text = "no\nsuch\x1b attempt"}},
                                      .n_say = 1},
                        VM_ERROR_NOT_FOUND, "the receiver ended channel 5: no?such? attempt");
    /* A refusal is the end, whatever kind it claims to be. */
    assert_sender_fails((struct dupe){.say = {{.kind = CHANNEL_REFUSED,
                                               .error_kind = VM_ERROR_UNREACHABLE,
                                               .text = "try again"}},
                                      .n_say = 1},
                        VM_ERROR_UNREACHABLE, "try again");
    /* Damage is not the receiver's lie: connect again, until the limit. */
    assert_sender_fails((struct dupe){.say = {answer}, .n_say = 1, .damaged = true},
                        VM_ERROR_TIMEOUT, "was damaged on the way");
    /* Silence. */
    assert_sender_fails((struct dupe){.n_say = 0}, VM_ERROR_TIMEOUT,
                        "no working connection for 1000 ms");
}

/* A receiver that forgot what it had acknowledged (it was started anew) ends the channel. */
static void test_a_receiver_that_forgot(void **state)
{
    struct dupe d = {.say = {{.kind = CHANNEL_ANSWER}}, .n_say = 1};
    struct vm_error *err = NULL;
    uint8_t out[CHANNEL_MESSAGE_SIZE + CHANNEL_TEXT_MAX];
    dupe_init(&d);
    channel_sender_send(d.sender, &(struct channel_frame){.type = 1}, NULL);
    uint8_t in[8 + CHANNEL_HELLO_SIZE + CHANNEL_HEADER_SIZE];
    assert_int_equal(channel_sender_wait_open(d.sender, in_ms(5000), NULL), 0);
    assert_int_equal(io_read_full(d.fds[1], in, sizeof(in), in_ms(5000), -1, NULL), 0);
    size_t len = channel_message_write(
        out, &(struct channel_message){.kind = CHANNEL_APPLIED, .applied = 1});
    assert_int_equal(io_write_full(d.fds[1], out, len, in_ms(5000), -1, NULL), 0);
    assert_int_equal(channel_sender_flush(d.sender, in_ms(5000), NULL), 0);
    shutdown(d.fds[1], SHUT_RDWR);
    channel_sender_send(d.sender, &(struct channel_frame){.type = 1}, NULL);
    assert_int_equal(channel_sender_flush(d.sender, in_ms(5000), &err), -1);
    assert_int_equal(err->kind, VM_ERROR_PROTOCOL);
    assert_non_null(strstr(err->message, "is at frame 0, but"));
    error_free(err);
    dupe_finish(&d);
}

#ifdef VMMIG_FAULTS
static void note_hold(const struct fault_point *point, void *arg)
{
    if (!strcmp(point->name, "channel.send"))
        *(bool *)arg = point->holds;
}

/* The sender's thread stands before the first byte of a frame. */
static void wait_held(void)
{
    int64_t deadline = in_ms(20000);
    for (bool held = false; !held;) {
        assert_int_equal(fault_list(note_hold, &held, NULL), 0);
        assert_true(clock_mono_ns() < deadline);
        usleep(1000);
    }
}

static int unread_of(int fd)
{
    int n = 0;
    assert_int_equal(ioctl(fd, FIONREAD, &n), 0);
    return n;
}

/* What it says without end is no reason not to send: the next frame begins with most of it unread. */
static void test_a_receiver_that_never_pauses(void **state)
{
    static uint8_t out[4000 * CHANNEL_MESSAGE_SIZE];
    struct dupe d = {.say = {{.kind = CHANNEL_ANSWER}}, .n_say = 1};
    size_t len = 0;
    while (len + CHANNEL_MESSAGE_SIZE <= sizeof(out))
        len += channel_message_write(out + len, &(struct channel_message){.kind = CHANNEL_APPLIED});
    dupe_init(&d);
    assert_int_equal(channel_sender_wait_open(d.sender, in_ms(5000), NULL), 0);
    assert_int_equal(fault_arm("channel.send=hold", NULL), 0);
    channel_sender_send(d.sender, &(struct channel_frame){.type = 1}, NULL);
    wait_held();
    channel_sender_send(d.sender, &(struct channel_frame){.type = 1}, NULL);
    assert_int_equal(io_write_full(d.fds[1], out, len, in_ms(5000), -1, NULL), 0);
    assert_int_equal(fault_arm("channel.send=hold", NULL), 0); /* on to the second one */
    wait_held();
    assert_in_range(unread_of(d.fds[0]), len / 2, len);
    assert_int_equal(fault_arm("", NULL), 0);
    dupe_finish(&d);
}
#endif

/* ---- The parsers ---- */

static void test_messages(void **state)
{
    uint8_t out[CHANNEL_MESSAGE_SIZE + CHANNEL_TEXT_MAX];
    struct channel_message m = {
        .kind = CHANNEL_REFUSED, .error_kind = VM_ERROR_NO_SPACE, .applied = 7};
    memset(m.text, 'x', CHANNEL_TEXT_MAX);
    size_t len = channel_message_write(out, &m);
    struct channel_message got;
    assert_int_equal(len, sizeof(out));
    for (size_t i = 0; i < len; i++)
        assert_int_equal(channel_message_parse(out, i, &got, NULL), 0);
    assert_int_equal(channel_message_parse(out, len, &got, NULL), len);
    assert_int_equal(got.applied, 7);
    assert_int_equal(got.error_kind, VM_ERROR_NO_SPACE);
    assert_string_equal(got.text, m.text);
    put_le32(out + 16, CHANNEL_TEXT_MAX + 1);
    assert_int_equal(channel_message_parse(out, len, &got, NULL), -1);
    len = channel_message_write(out, &(struct channel_message){.kind = CHANNEL_APPLIED});
    put_le16(out + 4, 5);
    put_le64(out + 24, XXH3_64bits_withSeed(out + 32, 0, XXH3_64bits(out, 24)));
    assert_int_equal(channel_message_parse(out, len, &got, NULL), -1);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_repeated_frames_are_skipped),
        cmocka_unit_test(test_a_gap_ends_the_channel),
        cmocka_unit_test(test_frames_of_the_past_do_not_hide_a_gap),
        cmocka_unit_test(test_damaged_frames),
        cmocka_unit_test(test_headers_that_lie),
        cmocka_unit_test(test_hellos),
        cmocka_unit_test(test_a_stranger_does_no_harm),
        cmocka_unit_test(test_a_new_connection_takes_over),
        cmocka_unit_test(test_receivers_that_lie),
#ifdef VMMIG_FAULTS
        cmocka_unit_test(test_a_receiver_that_never_pauses),
#endif
        cmocka_unit_test(test_a_receiver_that_forgot),
        cmocka_unit_test(test_messages),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

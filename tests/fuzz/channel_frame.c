/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Fuzzer of what arrives on a channel. The first byte of the input chooses:
 *
 *     'h'  a hello
 *     'm'  messages of the receiver, as a byte string that comes in pieces
 *     'p'  a connection's preamble
 *     'f'  frames: a receiver that is served these bytes over a socket, its sums mended or not
 *
 * Asserted: what a parser gives out is within its bounds and comes back as the same bytes; the
 * receiver begins, commits and aborts frames in pairs, and in order, whatever comes.
 */
#include "migrate/channel_wire.h"

#include "base/bytes.h"
#include "base/io.h"
#include "base/log.h"

#include <assert.h>
#include <sys/socket.h>
#include <xxhash.h>

/* Built by libFuzzer's driver. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void fuzz_hello(const uint8_t *data, size_t size)
{
    uint8_t in[CHANNEL_HELLO_SIZE], out[CHANNEL_HELLO_SIZE];
    struct channel_hello hello;
    if (size < sizeof(in))
        return;
    memcpy(in, data, sizeof(in));
    put_le64(in + 48, XXH3_64bits(in, 48)); /* else no mutation gets past the sum */
    if (channel_hello_parse(in, &hello, NULL) < 0)
        return;
    assert(hello.id.number < CHANNELS_MAX && hello.first_seq);
    channel_hello_write(out, &hello);
    assert(!memcmp(in, out, sizeof(in)));
}

static void mend_message(uint8_t *in, size_t len)
{
    if (len < CHANNEL_MESSAGE_SIZE)
        return;
    uint32_t text = get_le32(in + 16);
    if (text > CHANNEL_TEXT_MAX || len < CHANNEL_MESSAGE_SIZE + text)
        return;
    put_le64(in + 24, XXH3_64bits_withSeed(in + CHANNEL_MESSAGE_SIZE, text, XXH3_64bits(in, 24)));
}

static void fuzz_messages(const uint8_t *data, size_t size)
{
    uint8_t in[4096];
    struct channel_message m;
    size_t at = 0;
    if (size > sizeof(in))
        size = sizeof(in);
    memcpy(in, data, size);
    for (;;) {
        mend_message(in + at, size - at);
        ssize_t used = channel_message_parse(in + at, size - at, &m, NULL);
        if (used <= 0)
            return;
        assert((size_t)used <= size - at && strlen(m.text) <= CHANNEL_TEXT_MAX);
        assert(m.kind >= CHANNEL_ANSWER && m.kind <= CHANNEL_REFUSED);
        assert(m.error_kind < VM_ERROR_KIND_COUNT);
        for (const char *c = m.text; *c; c++)
            assert((unsigned char)*c >= ' ');
        at += (size_t)used;
    }
}

struct sink {
    unsigned begun, ended;
    uint8_t payload[65536];
};

static int sink_begin(void *arg, uint16_t type, const void *meta, size_t meta_len,
                      size_t payload_len, struct iovec *ret_iov, struct vm_error **err)
{
    struct sink *s = arg;
    assert(s->begun == s->ended);
    assert(type <= CHANNEL_TYPE_MAX && meta_len <= CHANNEL_META_MAX &&
           payload_len <= CHANNEL_PAYLOAD_MAX);
    for (size_t i = 0; i < meta_len; i++)
        (void)((const volatile uint8_t *)meta)[i];
    if (payload_len > sizeof(s->payload))
        return error_set(err, VM_ERROR_REFUSED, "too much for this test");
    s->begun++;
    ret_iov[0] = (struct iovec){s->payload, payload_len / 2};
    ret_iov[1] = (struct iovec){s->payload + payload_len / 2, payload_len - payload_len / 2};
    return 2;
}

static int sink_commit(void *arg, struct vm_error **err)
{
    ((struct sink *)arg)->ended++;
    return 0;
}

static void sink_abort(void *arg)
{
    ((struct sink *)arg)->ended++;
}

/* Make the sums of frames right, as far as frames can be told apart; a bit of the sum decides. */
static void mend_frames(uint8_t *in, size_t size)
{
    struct channel_header h;
    for (size_t at = 0; size - at >= CHANNEL_HEADER_SIZE;) {
        uint8_t *header = in + at;
        if (channel_header_parse(header, &h, NULL) < 0)
            return;
        size_t left = size - at - CHANNEL_HEADER_SIZE;
        if (h.meta_len > left || h.payload_len > left - h.meta_len)
            return;
        uint8_t *meta = header + CHANNEL_HEADER_SIZE;
        if (header[24] & 1)
            put_le64(header + 24, XXH3_64bits(meta + h.meta_len, h.payload_len));
        if (header[39] & 1)
            put_le64(header + 32, XXH3_64bits_withSeed(meta, h.meta_len, XXH3_64bits(header, 32)));
        at += CHANNEL_HEADER_SIZE + h.meta_len + h.payload_len;
    }
}

/* The listening end of a connection on which these bytes came and no more will; NULL if refused. */
static struct conn *accept_bytes(const uint8_t *data, size_t size, int *ret_peer)
{
    static struct conn_context *ctx;
    int fds[2], room = 1 << 20;
    if (!ctx) {
        log_set_level(LOG_LEVEL_ERROR);
        ctx = conn_context_create(&(struct conn_settings){.insecure_plain = true}, NULL);
    }
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, fds) < 0)
        abort();
    setsockopt(fds[0], SOL_SOCKET, SO_SNDBUF, &room, sizeof(room));
    io_write_full(fds[0], data, size, INT64_MAX, -1, NULL);
    shutdown(fds[0], SHUT_WR);
    *ret_peer = fds[0];
    return conn_accept(ctx, fds[1], INT64_MAX, -1, NULL);
}

static void fuzz_preamble(const uint8_t *data, size_t size)
{
    cleanup_close int peer = -1;
    CLEANUP(conn) struct conn *conn = accept_bytes(data, size < 64 ? size : 64, &peer);
    assert(!conn || (conn_purpose(conn) >= CONN_CONTROL && conn_purpose(conn) <= CONN_AGENT));
}

static void fuzz_frames(const uint8_t *data, size_t size)
{
    static uint8_t in[100000] = "VMMG\x01\x02\0";
    cleanup_close int peer = -1;
    if (size > sizeof(in) - 8)
        return;
    memcpy(in + 8, data, size);
    mend_frames(in + 8, size);
    struct sink *sink = calloc(1, sizeof(*sink));
    struct channel_receiver_params params = {
        .id = {.number = 1},
        .ops = {.begin = sink_begin, .commit = sink_commit, .abort = sink_abort},
        .arg = sink,
        .cancel_fd = -1};
    struct channel_receiver *receiver = channel_receiver_create(&params, NULL);
    struct channel_hello hello = {.id = params.id, .first_seq = 1};
    struct conn *conn = accept_bytes(in, size + 8, &peer);
    assert(conn);
    struct vm_error *err = NULL;
    int result = channel_receiver_run(receiver, conn, &hello, &err);
    assert((result == -1) == (err != NULL));
    struct channel_receiver_stats stats;
    channel_receiver_get_stats(receiver, &stats);
    assert(sink->begun == sink->ended && stats.frames_applied <= sink->begun + 1);
    error_free(err);
    conn_destroy(conn);
    channel_receiver_destroy(receiver);
    free(sink);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (!size)
        return 0;
    if (*data == 'h')
        fuzz_hello(data + 1, size - 1);
    else if (*data == 'm')
        fuzz_messages(data + 1, size - 1);
    else if (*data == 'p')
        fuzz_preamble(data + 1, size - 1);
    else if (*data == 'f')
        fuzz_frames(data + 1, size - 1);
    return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/* Connections: addresses, passing on, how they break, and bytes under load from two threads. */
#include "certs.h"
#include "meeting.h"

#include "base/io.h"
#include "migrate/address.h"
#include "migrate/tls.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cmocka.h>

static void test_two_hosts_of_a_cluster_meet(void **state)
{
    struct conn_context *near = certs_context("a", "a", "elsewhere");
    struct conn_context *far = certs_context("a", "a", "localhost");
    struct meeting m;
    meet(&m, near, far);
    assert_null(m.dial_err);
    assert_null(m.accept_err);
    assert_string_equal(conn_peer_name(m.dialled), "localhost");
    assert_string_equal(conn_peer_name(m.accepted), "elsewhere");
    assert_string_equal(conn_peer_address(m.dialled), m.address);
    assert_non_null(strstr(conn_cipher(m.dialled), "TLS_"));
    assert_int_equal(conn_purpose(m.accepted), CONN_CONTROL);
    char text[5] = "";
    assert_int_equal(conn_write_full(m.dialled, "ping", 5, in_ms(1000), -1, NULL), 0);
    assert_int_equal(conn_read_full(m.accepted, text, 5, in_ms(1000), -1, NULL), 0);
    assert_string_equal(text, "ping");
    assert_int_equal(conn_shutdown_write(m.dialled, in_ms(1000), -1, NULL), 0);
    assert_int_equal(conn_read_some(m.accepted, text, 5, in_ms(1000), -1, NULL), 0);
    assert_int_equal(conn_write_full(m.accepted, "pong", 5, in_ms(1000), -1, NULL), 0);
    assert_int_equal(conn_read_full(m.dialled, text, 5, in_ms(1000), -1, NULL), 0);
    assert_string_equal(text, "pong");
    part(&m);
    conn_context_destroy(near);
    conn_context_destroy(far);
}

/* ---- Passing on ---- */

struct relay {
    struct conn *conn;
    int fd, cancel_fd, result;
    struct vm_error *err;
    pthread_t thread;
};

static void *relay_thread(void *arg)
{
    struct relay *r = arg;
    r->result = conn_relay(r->conn, r->fd, r->cancel_fd, &r->err);
    close(r->fd);
    conn_shutdown(r->conn);
    return NULL;
}

/* Two sockets, `ends`, with a connection between them that both sides pass on. */
static void open_way(struct meeting *m, struct relay relays[2], int ends[2], const int cancel_fds[2])
{
    struct conn_context *near = certs_context("a", "a", "elsewhere"), *far = certs_context("a", "a", "localhost");
    meet(m, near, far);
    assert_non_null(m->dialled);
    conn_context_destroy(near);
    conn_context_destroy(far);
    for (int i = 0; i < 2; i++) {
        int pair[2];
        assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM, 0, pair), 0);
        ends[i] = pair[0];
        relays[i] = (struct relay){.conn = i ? m->accepted : m->dialled, .fd = pair[1], .cancel_fd = cancel_fds[i]};
        pthread_create(&relays[i].thread, NULL, relay_thread, &relays[i]);
    }
}

enum { WAY_BYTES = 3 << 20 };

struct load {
    int fd;
    unsigned seed;
    pthread_t thread;
};

static void *write_load(void *arg)
{
    struct load *l = arg;
    for (unsigned done = 0; done < WAY_BYTES; done += 4096) {
        uint8_t bytes[4096];
        memset(bytes, (int)(l->seed + done / 4096), sizeof(bytes));
        assert_int_equal(io_write_full(l->fd, bytes, sizeof(bytes), in_ms(20000), -1, NULL), 0);
    }
    return NULL;
}

static void read_load(int fd, unsigned seed)
{
    uint8_t bytes[4096], expected[4096];
    for (unsigned done = 0; done < WAY_BYTES; done += 4096) {
        memset(expected, (int)(seed + done / 4096), sizeof(expected));
        assert_int_equal(io_read_full(fd, bytes, sizeof(bytes), in_ms(20000), -1, NULL), 0);
        assert_memory_equal(bytes, expected, sizeof(bytes));
    }
}

/* All of it, both ways at once; then the end. */
static void test_everything_is_passed_on(void **state)
{
    struct meeting m;
    struct relay relays[2];
    int ends[2];
    char byte;
    open_way(&m, relays, ends, (const int[2]){-1, -1});
    struct load loads[2] = {{ends[0], 1, 0}, {ends[1], 7, 0}};
    for (int i = 0; i < 2; i++)
        pthread_create(&loads[i].thread, NULL, write_load, &loads[i]);
    read_load(ends[1], 1);
    read_load(ends[0], 7);
    for (int i = 0; i < 2; i++)
        pthread_join(loads[i].thread, NULL);
    assert_int_equal(io_write_full(ends[0], "last", 4, in_ms(1000), -1, NULL), 0);
    close(ends[0]);
    char last[4];
    assert_int_equal(io_read_full(ends[1], last, 4, in_ms(10000), -1, NULL), 0);
    assert_memory_equal(last, "last", 4);
    assert_int_equal(io_read_some(ends[1], &byte, 1, in_ms(10000), -1, NULL), 0);
    for (int i = 0; i < 2; i++) {
        pthread_join(relays[i].thread, NULL);
        assert_int_equal(relays[i].result, 0);
    }
    close(ends[1]);
    part(&m);
}

static void test_passing_on_is_cancelled(void **state)
{
    struct meeting m;
    struct relay relays[2];
    int ends[2], latches[2] = {io_latch_new(NULL), -1};
    open_way(&m, relays, ends, latches);
    io_latch_set(latches[0]);
    for (int i = 0; i < 2; i++) {
        pthread_join(relays[i].thread, NULL);
        close(ends[i]);
    }
    assert_int_equal(relays[0].result, -1);
    assert_error(relays[0].err, VM_ERROR_CANCELLED, "cancelled");
    error_free(relays[0].err);
    error_free(relays[1].err); /* it was cut off, or not: that is the other's affair */
    close(latches[0]);
    part(&m);
}

/* ---- Addresses ---- */

static void test_addresses(void **state)
{
    static const struct {
        const char *text, *host, *port;
    } good[] = {
        {"host2", "host2", "1"},
        {"host2:77", "host2", "77"},
        {"a-b.c_d", "a-b.c_d", "1"},
        {"192.0.2.1", "192.0.2.1", "1"},
        {"192.0.2.1:9", "192.0.2.1", "9"},
        {"2001:db8::1", "2001:db8::1", "1"},
        {"[2001:db8::1]:9", "2001:db8::1", "9"},
        {"[::1]", "::1", "1"},
    };
    static const char *const bad[] = {
        "",       ":",      ":77",   "host:",     "host:x", "host:65536", "host:123456",  "[::1",
        "[::1]x", "[::1]:", "1:2:3", "[host]:1x", "ho st",  "host/x",     "[fe80::zz]:1", "unix:",
        "a:-1",   "a:+1",
    };
    struct address a;
    for (size_t i = 0; i < sizeof(good) / sizeof(*good); i++) {
        assert_int_equal(address_parse(good[i].text, "1", &a, NULL), 0);
        assert_string_equal(a.host, good[i].host);
        assert_string_equal(a.port, good[i].port);
    }
    for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); i++) {
        struct vm_error *err = NULL;
        if (address_parse(bad[i], "1", &a, &err) == 0)
            fail_msg("%s was taken for an address", bad[i]);
        assert_int_equal(err->kind, VM_ERROR_USAGE);
        error_free(err);
    }
    char long_name[400];
    memset(long_name, 'a', sizeof(long_name));
    long_name[399] = 0;
    assert_int_equal(address_parse(long_name, "1", &a, NULL), -1);
}

static void test_a_listener_of_both_families(void **state)
{
    struct meeting m;
    struct conn_context *ctx = plain_context();
    char address[40];
    if (access("/proc/net/if_inet6", R_OK) < 0) {
        print_message("SKIPPED: no IPv6\n");
        skip();
    }
    for (int i = 0; i < 2; i++) {
        meeting_open_at(&m, "[::]:0", ctx, accept_thread);
        snprintf(address, sizeof(address), "%s%s", i ? "[::1]" : "127.0.0.1",
                 strchr(m.address, ':'));
        m.dialled = conn_dial(ctx, address, CONN_CONTROL, in_ms(5000), -1, &m.dial_err);
        if (!m.dialled)
            fail_msg("%s", error_message(m.dial_err));
        assert_string_equal(conn_peer_address(m.dialled), address);
        pthread_join(m.thread, NULL);
        assert_non_null(m.accepted);
        const char *dialler = i ? "[::1]:" : "127.0.0.1:";
        assert_int_equal(strncmp(conn_peer_address(m.accepted), dialler, strlen(dialler)), 0);
        part(&m);
    }
    conn_context_destroy(ctx);
}

static void dial_fails(const char *address, int cancel, int ms, enum vm_error_kind kind,
                       const char *text)
{
    struct vm_error *err = NULL;
    struct conn_context *ctx = plain_context();
    assert_null(conn_dial(ctx, address, CONN_CONTROL, in_ms(ms), cancel, &err));
    assert_error(err, kind, text);
    error_free(err);
    conn_context_destroy(ctx);
}

static void test_a_closed_port(void **state)
{
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t len = sizeof(at);
    char address[32];
    int fd = socket(AF_INET, SOCK_STREAM, 0); /* bound and not listening */
    assert_int_equal(bind(fd, (struct sockaddr *)&at, sizeof(at)), 0);
    getsockname(fd, (struct sockaddr *)&at, &len);
    snprintf(address, sizeof(address), "127.0.0.1:%d", ntohs(at.sin_port));
    dial_fails(address, -1, 5000, VM_ERROR_UNREACHABLE, "is vmmigd running there?");
    close(fd);
}

/* Accepts nothing and answers no SYN: its queue is full. */
static void test_a_host_that_does_not_answer(void **state)
{
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t len = sizeof(at);
    char address[32];
    int listener = socket(AF_INET, SOCK_STREAM, 0), waiting[3];
    assert_int_equal(bind(listener, (struct sockaddr *)&at, sizeof(at)), 0);
    assert_int_equal(listen(listener, 0), 0);
    getsockname(listener, (struct sockaddr *)&at, &len);
    for (int i = 0; i < 3; i++) {
        waiting[i] = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
        connect(waiting[i], (struct sockaddr *)&at, sizeof(at));
    }
    snprintf(address, sizeof(address), "127.0.0.1:%d", ntohs(at.sin_port));
    dial_fails(address, -1, 300, VM_ERROR_TIMEOUT, "does not answer; check the network");
    int cancel = io_latch_new(NULL);
    io_latch_set(cancel);
    dial_fails(address, cancel, 5000, VM_ERROR_CANCELLED, "cancelled");
    close(cancel);
    for (int i = 0; i < 3; i++)
        close(waiting[i]);
    close(listener);
}

static void *in_an_empty_network(void *arg)
{
    bool *skipped = arg;
    *skipped = unshare(CLONE_NEWNET) < 0;
    if (*skipped)
        return NULL;
    dial_fails("192.0.2.1", -1, 5000, VM_ERROR_UNREACHABLE, "no route to 192.0.2.1");
    dial_fails("no-such-host.invalid", -1, 5000, VM_ERROR_UNREACHABLE,
               "host no-such-host.invalid is unknown");
    return NULL;
}

static void test_no_route_and_no_such_name(void **state)
{
    pthread_t thread;
    bool skipped;
    pthread_create(&thread, NULL, in_an_empty_network, &skipped);
    pthread_join(thread, NULL);
    if (skipped) {
        print_message("SKIPPED: no permission for a network namespace\n");
        skip();
    }
}

static void test_unix_sockets_are_plain(void **state)
{
    char path[100];
    snprintf(path, sizeof(path), "unix:%s/socket", certs_dir);
    struct vm_error *err = NULL;
    struct conn_context *tls = certs_context("a", "a", "localhost");
    assert_null(conn_dial(tls, path, CONN_CONTROL, in_ms(1000), -1, &err));
    assert_error(err, VM_ERROR_DENIED, "plain connection, which needs insecure-plain");
    error_free(err);
    struct meeting m = {.accept_ctx = plain_context(), .listener = conn_listen(path, NULL)};
    assert_true(m.listener >= 0);
    pthread_create(&m.thread, NULL, accept_thread, &m);
    m.dialled = conn_dial(m.accept_ctx, path, CONN_CHANNEL, in_ms(1000), -1, &m.dial_err);
    pthread_join(m.thread, NULL);
    assert_non_null(m.dialled);
    assert_int_equal(conn_purpose(m.accepted), CONN_CHANNEL);
    assert_string_equal(conn_peer_address(m.dialled), "unix");
    part(&m);
    conn_context_destroy(tls);
    conn_context_destroy(m.accept_ctx);
}

/* ---- Breaking ---- */

/* The default action of SIGPIPE would end this program. */
static void write_to_a_closed_peer(struct conn_context *near, struct conn_context *far)
{
    struct meeting m;
    static char data[1 << 20];
    struct vm_error *err = NULL;
    meet(&m, near, far);
    conn_destroy(m.accepted);
    m.accepted = NULL;
    while (conn_write_full(m.dialled, data, sizeof(data), in_ms(5000), -1, &err) == 0)
        ;
    assert_int_equal(err->kind, VM_ERROR_UNREACHABLE);
    error_free(err);
    part(&m);
    conn_context_destroy(near);
    conn_context_destroy(far);
}

static void test_no_sigpipe(void **state)
{
    write_to_a_closed_peer(plain_context(), plain_context());
    write_to_a_closed_peer(certs_context("a", "a", "elsewhere"),
                           certs_context("a", "a", "localhost"));
}

/* An end without close_notify may be an attacker's: not an orderly one. */
static void test_a_truncated_tls_connection(void **state)
{
    struct conn_context *near = certs_context("a", "a", "elsewhere");
    struct conn_context *far = certs_context("a", "a", "localhost");
    struct meeting m;
    struct vm_error *err = NULL;
    char byte;
    meet(&m, near, far);
    shutdown(conn_fd(m.dialled), SHUT_WR);
    assert_int_equal(conn_read_some(m.accepted, &byte, 1, in_ms(1000), -1, &err), -1);
    assert_error(err, VM_ERROR_UNREACHABLE, "closed the connection");
    error_free(err);
    part(&m);
    conn_context_destroy(near);
    conn_context_destroy(far);
}

static void *shutdown_thread(void *arg)
{
    conn_shutdown(arg);
    return NULL;
}

static void test_shutdown_ends_waits(void **state)
{
    struct conn_context *near = certs_context("a", "a", "elsewhere");
    struct conn_context *far = certs_context("a", "a", "localhost");
    struct meeting m;
    struct vm_error *err = NULL;
    pthread_t thread;
    char byte;
    meet(&m, near, far);
    assert_int_equal(conn_read_some(m.accepted, &byte, 1, in_ms(10), -1, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_TIMEOUT);
    error_clear(&err);
    pthread_create(&thread, NULL, shutdown_thread, m.accepted);
    assert_int_equal(conn_read_some(m.accepted, &byte, 1, INT64_MAX, -1, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_UNREACHABLE);
    pthread_join(thread, NULL);
    error_free(err);
    part(&m);
    conn_context_destroy(near);
    conn_context_destroy(far);
}

/* ---- Two threads on each of two ends ---- */

enum { HAMMER_BYTES = 24 << 20 };

struct hammer {
    struct conn *conn;
    unsigned seed;
    bool failed;
};

static uint8_t pattern(unsigned seed, size_t i)
{
    return (uint8_t)((i * 2654435761u + seed) >> 13);
}

static void *hammer_writer(void *arg)
{
    struct hammer *h = arg;
    static const size_t sizes[] = {1, 16384, 100, 70000, 4096, 16383, 300000, 7};
    cleanup_free uint8_t *data = malloc(HAMMER_BYTES);
    for (size_t i = 0; i < HAMMER_BYTES; i++)
        data[i] = pattern(h->seed, i);
    size_t at = 0;
    for (unsigned turn = 0; at < HAMMER_BYTES && !h->failed; turn++) {
        size_t n = sizes[turn % 8];
        n = n < HAMMER_BYTES - at ? n : HAMMER_BYTES - at;
        struct iovec iov[3] = {
            {data + at, n / 3}, {data + at + n / 3, 0}, {data + at + n / 3, n - n / 3}};
        h->failed = conn_writev_full(h->conn, iov, 3, in_ms(20000), -1, NULL) < 0;
        at += n;
    }
    return NULL;
}

static void *hammer_reader(void *arg)
{
    struct hammer *h = arg;
    static const size_t sizes[] = {1, 70000, 3, 16384, 250000};
    cleanup_free uint8_t *data = malloc(250000);
    size_t at = 0;
    for (unsigned turn = 0; at < HAMMER_BYTES && !h->failed; turn++) {
        size_t n = sizes[turn % 5];
        n = n < HAMMER_BYTES - at ? n : HAMMER_BYTES - at;
        h->failed = conn_read_full(h->conn, data, n, in_ms(20000), -1, NULL) < 0;
        for (size_t i = 0; i < n && !h->failed; i++)
            h->failed = data[i] != pattern(h->seed, at + i);
        at += n;
    }
    return NULL;
}

static void hammer(struct conn_context *near, struct conn_context *far)
{
    struct meeting m;
    meet(&m, near, far);
    struct hammer h[4] = {{m.dialled, 1, false},
                          {m.accepted, 1, false},
                          {m.accepted, 2, false},
                          {m.dialled, 2, false}};
    pthread_t threads[4];
    for (int i = 0; i < 4; i++)
        pthread_create(&threads[i], NULL, i % 2 ? hammer_reader : hammer_writer, &h[i]);
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
    for (int i = 0; i < 4; i++)
        assert_false(h[i].failed);
    part(&m);
    conn_context_destroy(near);
    conn_context_destroy(far);
}

static void test_both_threads_on_one_connection(void **state)
{
    hammer(plain_context(), plain_context());
    hammer(certs_context("a", "a", "elsewhere"), certs_context("a", "a", "localhost"));
}

/* ---- Keys ---- */

static struct tls_context *tls_context_of(const char *host)
{
    char files[3][128];
    snprintf(files[0], 128, "%s/a/ca.crt", certs_dir);
    snprintf(files[1], 128, "%s/a/%s.crt", certs_dir, host);
    snprintf(files[2], 128, "%s/a/%s.key", certs_dir, host);
    return tls_context_create(&(struct tls_files){files[0], files[1], files[2], NULL}, NULL);
}

/* A connection goes on over a change of its key. */
static void test_a_key_is_changed(void **state)
{
    int fds[2];
    char in[8];
    struct iovec iov[2] = {{in, 3}, {in + 3, 5}};
    struct tls_context *ctx = tls_context_of("localhost");
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM, 0, fds), 0);
    struct tls_stream *near = tls_stream_create(ctx, fds[0], "localhost", "far", NULL);
    struct tls_stream *far = tls_stream_create(ctx, fds[1], NULL, "near", NULL);
    int near_done = TLS_AGAIN, far_done = TLS_AGAIN;
    while (near_done == TLS_AGAIN || far_done == TLS_AGAIN) {
        near_done = near_done == TLS_AGAIN ? tls_handshake(near, NULL) : near_done;
        far_done = far_done == TLS_AGAIN ? tls_handshake(far, NULL) : far_done;
    }
    assert_int_equal(near_done, 0);
    assert_int_equal(far_done, 0);
    for (int i = 0; i < 3; i++) {
        uint64_t before = tls_bytes_written(near);
        assert_int_equal(tls_writev(near, &(struct iovec){(char[]){"abcdefgh"}, 8}, 1, NULL), 8);
        uint64_t plain = tls_bytes_written(near) - before;
        assert_int_equal(tls_readv(far, iov, 2, NULL), 8);
        assert_memory_equal(in, "abcdefgh", 8);
        assert_int_equal(tls_update_key(near, NULL), 0);
        assert_int_equal(tls_writev(near, &(struct iovec){(char[]){"ABCDEFGH"}, 8}, 1, NULL), 8);
        assert_true(tls_bytes_written(near) - before > 2 * plain); /* the change is a record */
        assert_int_equal(tls_readv(far, iov, 2, NULL), 8);
        assert_memory_equal(in, "ABCDEFGH", 8);
    }
    tls_stream_destroy(near);
    tls_stream_destroy(far);
    tls_context_destroy(ctx);
    close(fds[0]);
    close(fds[1]);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_two_hosts_of_a_cluster_meet),
        cmocka_unit_test(test_everything_is_passed_on),
        cmocka_unit_test(test_passing_on_is_cancelled),
        cmocka_unit_test(test_addresses),
        cmocka_unit_test(test_a_listener_of_both_families),
        cmocka_unit_test(test_a_closed_port),
        cmocka_unit_test(test_a_host_that_does_not_answer),
        cmocka_unit_test(test_no_route_and_no_such_name),
        cmocka_unit_test(test_unix_sockets_are_plain),
        cmocka_unit_test(test_no_sigpipe),
        cmocka_unit_test(test_a_truncated_tls_connection),
        cmocka_unit_test(test_shutdown_ends_waits),
        cmocka_unit_test(test_both_threads_on_one_connection),
        cmocka_unit_test(test_a_key_is_changed),
    };
    return cmocka_run_group_tests(tests, certs_setup, certs_teardown);
}

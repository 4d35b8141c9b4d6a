/* SPDX-License-Identifier: Apache-2.0 */
/* Connections: who is let in, what each failure says, and bytes under load from two threads. */
#include "certs.h"

#include "base/bytes.h"
#include "base/clock.h"
#include "base/io.h"
#include "migrate/address.h"
#include "migrate/tls.h"
#include "tools/pki.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

static int64_t in_ms(int ms)
{
    return clock_mono_ns() + ms * NSEC_PER_MSEC;
}

static struct conn_context *plain_context(void)
{
    return conn_context_create(&(struct conn_settings){.insecure_plain = true}, NULL);
}

/* ---- Two ends over TCP on loopback ---- */

struct meeting {
    int listener;
    char address[32];
    struct conn_context *accept_ctx;
    struct conn *accepted, *dialled;
    struct vm_error *accept_err, *dial_err;
    pthread_t thread;
};

static void *accept_thread(void *arg)
{
    struct meeting *m = arg;
    io_wait(m->listener, POLLIN, in_ms(5000), -1, NULL);
    int fd = accept4(m->listener, NULL, NULL, SOCK_CLOEXEC);
    m->accepted = conn_accept(m->accept_ctx, fd, in_ms(5000), -1, &m->accept_err);
    return NULL;
}

/* Listen; `fn` is the thread that accepts. */
static void meeting_open_at(struct meeting *m, const char *at, struct conn_context *accept_ctx,
                            void *(*fn)(void *))
{
    struct sockaddr_in6 bound; /* the port lies where it does for IPv4 */
    socklen_t len = sizeof(bound);
    *m = (struct meeting){.accept_ctx = accept_ctx};
    m->listener = conn_listen(at, NULL);
    assert_true(m->listener >= 0);
    getsockname(m->listener, (struct sockaddr *)&bound, &len);
    snprintf(m->address, sizeof(m->address), "127.0.0.1:%d", ntohs(bound.sin6_port));
    pthread_create(&m->thread, NULL, fn, m);
}

static void meeting_open(struct meeting *m, struct conn_context *accept_ctx, void *(*fn)(void *))
{
    meeting_open_at(m, "127.0.0.1:0", accept_ctx, fn);
}

static int raw_dial(const struct meeting *m)
{
    struct address a;
    assert_int_equal(address_parse(m->address, CONN_DEFAULT_PORT, &a, NULL), 0);
    int fd = address_connect(&a, in_ms(5000), -1, NULL);
    assert_true(fd >= 0);
    io_set_nonblocking(fd, false, NULL);
    return fd;
}

static void meet(struct meeting *m, struct conn_context *dial, struct conn_context *accept)
{
    meeting_open(m, accept, accept_thread);
    m->dialled = conn_dial(dial, m->address, CONN_CONTROL, in_ms(5000), -1, &m->dial_err);
    pthread_join(m->thread, NULL);
}

static void part(struct meeting *m)
{
    conn_destroy(m->dialled);
    conn_destroy(m->accepted);
    error_free(m->dial_err);
    error_free(m->accept_err);
    close(m->listener);
}

static void assert_error(struct vm_error *err, enum vm_error_kind kind, const char *text)
{
    assert_non_null(err);
    if (!strstr(err->message, text))
        fail_msg("\"%s\" does not say \"%s\"", err->message, text);
    assert_int_equal(err->kind, kind);
    assert_null(strchr(err->message, '\n'));
}

/* Both sides refuse; what each says. */
static void assert_refused(struct conn_context *dial, struct conn_context *accept,
                           enum vm_error_kind dial_kind, const char *dial_text,
                           enum vm_error_kind accept_kind, const char *accept_text)
{
    struct meeting m;
    meet(&m, dial, accept);
    assert_null(m.dialled);
    assert_null(m.accepted);
    assert_error(m.dial_err, dial_kind, dial_text);
    assert_error(m.accept_err, accept_kind, accept_text);
    part(&m);
    conn_context_destroy(dial);
    conn_context_destroy(accept);
}

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

/* ---- Who is not let in ---- */

static void test_a_listener_of_another_ca(void **state)
{
    assert_refused(certs_context("a", "a", "localhost"), certs_context("a", "b", "localhost"),
                   VM_ERROR_DENIED, "the certificate of 127.0.0.1 is of another CA than",
                   VM_ERROR_DENIED, "does not accept this host's certificate: it is of another CA");
}

static void test_a_dialler_of_another_ca(void **state)
{
    assert_refused(certs_context("a", "b", "localhost"), certs_context("a", "a", "localhost"),
                   VM_ERROR_DENIED, "does not accept this host's certificate: it is of another CA",
                   VM_ERROR_DENIED, "is of another CA than");
}

static void test_an_expired_listener(void **state)
{
    assert_refused(certs_context("a", "a", "localhost"), certs_context("a", "a", "old"),
                   VM_ERROR_DENIED, "has expired on 20", VM_ERROR_DENIED,
                   "does not accept this host's certificate: it has expired");
}

static void test_an_expired_dialler(void **state)
{
    assert_refused(certs_context("a", "a", "old"), certs_context("a", "a", "localhost"),
                   VM_ERROR_DENIED, "does not accept this host's certificate: it has expired",
                   VM_ERROR_DENIED, "has expired on 20");
}

static void test_a_certificate_of_the_future(void **state)
{
    assert_refused(certs_context("a", "a", "localhost"), certs_context("a", "a", "early"),
                   VM_ERROR_DENIED, "is not valid yet; set the clocks", VM_ERROR_DENIED,
                   "does not accept this host's certificate");
}

static void test_another_hosts_certificate(void **state)
{
    assert_refused(certs_context("a", "a", "localhost"), certs_context("a", "a", "elsewhere"),
                   VM_ERROR_DENIED,
                   "the certificate of 127.0.0.1 is for elsewhere, not for 127.0.0.1",
                   VM_ERROR_DENIED, "does not accept this host's certificate");
}

static void test_plain_to_tls(void **state)
{
    assert_refused(plain_context(), certs_context("a", "a", "localhost"), VM_ERROR_DENIED,
                   "speaks TLS and this side is set to insecure-plain", VM_ERROR_DENIED,
                   "does not speak TLS; a plain connection is not accepted");
}

static void test_tls_to_plain(void **state)
{
    assert_refused(certs_context("a", "a", "localhost"), plain_context(), VM_ERROR_DENIED,
                   "does not speak TLS; a plain connection is not accepted", VM_ERROR_DENIED,
                   "speaks TLS and this side is set to insecure-plain");
}

static void accept_stranger(int tls_minor, const char *host, enum vm_error_kind kind,
                            const char *text)
{
    struct meeting m;
    struct conn_context *far = certs_context("a", "a", "localhost");
    meeting_open(&m, far, accept_thread);
    certs_stranger(raw_dial(&m), true, tls_minor, host);
    pthread_join(m.thread, NULL);
    assert_null(m.accepted);
    assert_error(m.accept_err, kind, text);
    part(&m);
    conn_context_destroy(far);
}

static void test_a_dialler_without_certificate(void **state)
{
    accept_stranger(3, NULL, VM_ERROR_DENIED, "shows no certificate");
}

static void test_a_dialler_of_tls_1_2(void **state)
{
    accept_stranger(2, "elsewhere", VM_ERROR_VERSION, "speaks TLS 1.2 or older");
}

static void *old_server_thread(void *arg)
{
    struct meeting *m = arg;
    io_wait(m->listener, POLLIN, in_ms(5000), -1, NULL);
    certs_stranger(accept4(m->listener, NULL, NULL, SOCK_CLOEXEC), false, 2, "localhost");
    return NULL;
}

static void test_a_listener_of_tls_1_2(void **state)
{
    struct meeting m;
    struct conn_context *near = certs_context("a", "a", "elsewhere");
    meeting_open(&m, NULL, old_server_thread);
    m.dialled = conn_dial(near, m.address, CONN_CONTROL, in_ms(5000), -1, &m.dial_err);
    pthread_join(m.thread, NULL);
    assert_null(m.dialled);
    assert_error(m.dial_err, VM_ERROR_VERSION, "does not speak TLS 1.3");
    part(&m);
    conn_context_destroy(near);
}

/* What a stranger writes first, and what the listener says of it. */
static void accept_bytes(struct conn_context *far, const void *bytes, size_t n,
                         enum vm_error_kind kind, const char *text)
{
    struct meeting m;
    meeting_open(&m, far, accept_thread);
    int fd = raw_dial(&m);
    assert_int_equal(io_write_full(fd, bytes, n, in_ms(1000), -1, NULL), 0);
    shutdown(fd, SHUT_WR);
    pthread_join(m.thread, NULL);
    close(fd);
    assert_null(m.accepted);
    assert_error(m.accept_err, kind, text);
    part(&m);
    conn_context_destroy(far);
}

static void test_strangers_bytes(void **state)
{
    static const char http[] = "GET / HTTP/1.1\r\nHost: x\r\n\r\n";
    static const char zeros[4096];
    static const char hello[] = "\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00"; /* of one byte */
    const char *tls_host = "localhost";
    accept_bytes(certs_context("a", "a", tls_host), http, sizeof(http), VM_ERROR_DENIED,
                 "does not speak TLS");
    accept_bytes(certs_context("a", "a", tls_host), zeros, sizeof(zeros), VM_ERROR_DENIED,
                 "does not speak TLS");
    accept_bytes(certs_context("a", "a", tls_host), hello, sizeof(hello) - 1, VM_ERROR_PROTOCOL,
                 "broke the TLS protocol");
    accept_bytes(certs_context("a", "a", tls_host), "", 0, VM_ERROR_UNREACHABLE,
                 "closed the connection");
    accept_bytes(plain_context(), http, sizeof(http), VM_ERROR_PROTOCOL, "is no vmmig agent");
    accept_bytes(plain_context(), "VMMG\x02\x01\0", 8, VM_ERROR_VERSION,
                 "speaks version 2 of the protocol and this side version 1");
    accept_bytes(plain_context(), "VMMG\x01\x63\0", 8, VM_ERROR_PROTOCOL, "unknown purpose 99");
    accept_bytes(plain_context(), "VMM", 3, VM_ERROR_UNREACHABLE, "closed the connection");
}

static void test_a_listener_of_another_version(void **state)
{
    struct meeting m;
    int fds[2];
    uint8_t hello[8];
    struct conn_context *ctx = plain_context();
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM, 0, fds), 0);
    assert_int_equal(io_write_full(fds[1], "VMMG\x07\x01\0", 8, in_ms(1000), -1, NULL), 0);
    m.dial_err = NULL;
    assert_null(conn_dial_fd(ctx, fds[0], "x", CONN_CHANNEL, in_ms(1000), -1, &m.dial_err));
    assert_error(m.dial_err, VM_ERROR_VERSION, "run the same release of vmmig on both hosts");
    assert_int_equal(io_read_full(fds[1], hello, 8, in_ms(1000), -1, NULL), 0);
    assert_memory_equal(hello, "VMMG\x01\x02\0", 8);
    error_free(m.dial_err);
    close(fds[1]);
    conn_context_destroy(ctx);
}

/* ---- Settings ---- */

static void test_settings(void **state)
{
    static const struct {
        struct conn_settings settings;
        enum vm_error_kind kind;
        const char *text;
    } bad[] = {
        {{NULL, NULL, NULL, NULL, false}, VM_ERROR_USAGE, "CA, certificate and key are needed"},
        {{"/x", "/x", NULL, NULL, false}, VM_ERROR_USAGE, "CA, certificate and key are needed"},
        {{"/x", "/x", "/x", NULL, true}, VM_ERROR_USAGE, "exclude each other"},
        {{NULL, NULL, NULL, "/x", true}, VM_ERROR_USAGE, "exclude each other"},
        {{"/dev/null", "/dev/null", "/dev/null", NULL, false}, VM_ERROR_DENIED, "holds no CA"},
    };
    for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); i++) {
        struct vm_error *err = NULL;
        assert_null(conn_context_create(&bad[i].settings, &err));
        assert_error(err, bad[i].kind, bad[i].text);
        error_free(err);
    }
}

static void copy_file(const char *from, const char *to)
{
    char command[512];
    snprintf(command, sizeof(command), "cp %s/%s %s/%s.new && mv %s/%s.new %s/%s", certs_dir, from,
             certs_dir, to, certs_dir, to, certs_dir, to);
    assert_int_equal(system(command), 0);
}

/* Certificates that were renewed come into use without a restart; broken ones do not. */
static void test_files_are_read_again(void **state)
{
    copy_file("a/old.crt", "a/mine.crt");
    copy_file("a/old.key", "a/mine.key");
    struct conn_context *near = certs_context("a", "a", "elsewhere");
    struct conn_context *far = certs_context("a", "a", "mine");
    struct meeting m;
    meet(&m, near, far);
    assert_error(m.dial_err, VM_ERROR_DENIED, "has expired");
    part(&m);
    copy_file("a/localhost.crt", "a/mine.crt"); /* the key does not match yet */
    meet(&m, near, far);
    assert_error(m.dial_err, VM_ERROR_DENIED, "has expired");
    part(&m);
    copy_file("a/localhost.key", "a/mine.key");
    meet(&m, near, far);
    assert_non_null(m.dialled);
    part(&m);
    conn_context_destroy(near);
    conn_context_destroy(far);
}

static void remove_file(const char *name)
{
    char path[128];
    snprintf(path, sizeof(path), "%s/%s", certs_dir, name);
    assert_int_equal(unlink(path), 0);
}

/* The context of a host that has no certificate yet. */
static struct conn_context *bare_context(void)
{
    copy_file("a/localhost.crt", "a/mine.crt");
    copy_file("a/localhost.key", "a/mine.key");
    remove_file("a/mine.crt");
    return certs_context("a", "a", "mine");
}

/* Either end may be without certificates; both say so. Once they are there they are used. */
static void test_certificates_that_come_later(void **state)
{
    struct conn_context *near = certs_context("a", "a", "elsewhere"), *far = bare_context();
    struct meeting m;
    meet(&m, near, far);
    assert_null(m.dialled);
    assert_null(m.accepted);
    assert_error(m.dial_err, VM_ERROR_DENIED, "127.0.0.1 has no certificates yet");
    assert_error(m.accept_err, VM_ERROR_DENIED, "`vmmig pki issue` makes it: cannot read ");
    part(&m);
    meeting_open(&m, near, accept_thread);
    assert_null(conn_dial(far, m.address, CONN_CONTROL, in_ms(5000), -1, &m.dial_err));
    assert_error(m.dial_err, VM_ERROR_DENIED, "this host has no certificate; `vmmig pki issue` makes it");
    pthread_join(m.thread, NULL);
    part(&m);
    copy_file("a/localhost.crt", "a/mine.crt");
    meet(&m, near, far);
    assert_non_null(m.dialled);
    part(&m);
    conn_context_destroy(near);
    conn_context_destroy(far);
}

/* What there is to say of a host's certificate, so many days before it ends. */
static void assert_complaint(struct conn_context *ctx, int64_t end, int days_before, const char *text)
{
    char complaint[CONN_COMPLAINT_MAX];
    int64_t told;
    conn_context_complain(ctx, end - days_before * 86400, complaint, &told);
    if (text && !strstr(complaint, text))
        fail_msg("\"%s\" does not say \"%s\"", complaint, text);
    if (!text)
        assert_string_equal(complaint, "");
    assert_int_equal(told, end);
}

static void test_a_certificate_that_is_about_to_end(void **state)
{
    struct conn_context *ctx = certs_context("a", "a", "localhost"), *plain = plain_context();
    char complaint[CONN_COMPLAINT_MAX];
    int64_t end;
    conn_context_complain(ctx, time(NULL), complaint, &end);
    assert_string_equal(complaint, "");
    assert_in_range(end, time(NULL) + 824 * 86400, time(NULL) + 826 * 86400);
    assert_complaint(ctx, end, 31, NULL);
    assert_complaint(ctx, end, 29, "this host's certificate ends on 20");
    assert_complaint(ctx, end, 0, "this host's certificate has expired on 20");
    assert_complaint(plain, 0, 0, NULL);
    conn_context_destroy(ctx);
    conn_context_destroy(plain);
    struct conn_context *bare = bare_context();
    assert_complaint(bare, 0, 0, "this host has no certificate; `vmmig pki issue` makes it");
    conn_context_destroy(bare);
}

static void revoke_host(const char *cluster, const char *host)
{
    struct vm_error *err = NULL;
    char dir[128];
    snprintf(dir, sizeof(dir), "%s/%s", certs_dir, cluster);
    if (pki_revoke(dir, host, &err) < 0)
        fail_msg("%s", error_message(err));
}

/* The context of a host of cluster a that heeds the list of revoked certificates in `crl`. */
static struct conn_context *heeding_context(const char *host, const char *crl)
{
    char files[4][128];
    snprintf(files[0], 128, "%s/a/ca.crt", certs_dir);
    snprintf(files[1], 128, "%s/a/%s.crt", certs_dir, host);
    snprintf(files[2], 128, "%s/a/%s.key", certs_dir, host);
    snprintf(files[3], 128, "%s/%s", certs_dir, crl);
    struct vm_error *err = NULL;
    struct conn_context *ctx = conn_context_create(
        &(struct conn_settings){files[0], files[1], files[2], files[3], false}, &err);
    if (!ctx)
        fail_msg("%s", error_message(err));
    return ctx;
}

/* From the moment that its certificate is in the list of the other side, whoever dials. */
static void test_a_host_that_was_revoked(void **state)
{
    struct conn_context *trusted = heeding_context("localhost", "a/ca.crl");
    struct conn_context *stolen = certs_context("a", "a", "stolen");
    struct meeting m;
    revoke_host("a", "old"); /* anybody: there is a list now */
    meet(&m, stolen, trusted);
    assert_non_null(m.dialled);
    part(&m);
    revoke_host("a", "stolen");
    meet(&m, stolen, trusted);
    assert_error(m.dial_err, VM_ERROR_DENIED, "does not accept this host's certificate: it was revoked");
    assert_error(m.accept_err, VM_ERROR_DENIED, " was revoked (");
    part(&m);
    meet(&m, trusted, stolen);
    assert_error(m.dial_err, VM_ERROR_DENIED, "the certificate of 127.0.0.1 was revoked (");
    part(&m);
    conn_context_destroy(trusted);
    conn_context_destroy(stolen);
}

/* No list, or another CA's, is not taken for an empty one. */
static void test_a_list_that_is_missing_or_anothers(void **state)
{
    struct conn_context *near = certs_context("a", "a", "elsewhere");
    struct conn_context *without = heeding_context("localhost", "a/nowhere.crl");
    struct meeting m;
    meet(&m, near, without);
    assert_error(m.accept_err, VM_ERROR_DENIED, "no list of revoked certificates; `vmmig pki revoke` makes it");
    part(&m);
    conn_context_destroy(without);
    revoke_host("b", "old");
    struct conn_context *others = heeding_context("localhost", "b/ca.crl");
    meet(&m, near, others);
    assert_error(m.accept_err, VM_ERROR_DENIED, "was revoked is not known: ");
    part(&m);
    conn_context_destroy(others);
    conn_context_destroy(near);
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
        cmocka_unit_test(test_a_listener_of_another_ca),
        cmocka_unit_test(test_a_dialler_of_another_ca),
        cmocka_unit_test(test_an_expired_listener),
        cmocka_unit_test(test_an_expired_dialler),
        cmocka_unit_test(test_a_certificate_of_the_future),
        cmocka_unit_test(test_another_hosts_certificate),
        cmocka_unit_test(test_plain_to_tls),
        cmocka_unit_test(test_tls_to_plain),
        cmocka_unit_test(test_a_dialler_without_certificate),
        cmocka_unit_test(test_a_dialler_of_tls_1_2),
        cmocka_unit_test(test_a_listener_of_tls_1_2),
        cmocka_unit_test(test_strangers_bytes),
        cmocka_unit_test(test_a_listener_of_another_version),
        cmocka_unit_test(test_settings),
        cmocka_unit_test(test_files_are_read_again),
        cmocka_unit_test(test_certificates_that_come_later),
        cmocka_unit_test(test_a_certificate_that_is_about_to_end),
        cmocka_unit_test(test_a_host_that_was_revoked),
        cmocka_unit_test(test_a_list_that_is_missing_or_anothers),
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

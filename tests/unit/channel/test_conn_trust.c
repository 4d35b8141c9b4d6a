/* SPDX-License-Identifier: Apache-2.0 */
/* Who is let in: certificates, their files, and strangers; and what each refusal says. */
#include "certs.h"
#include "meeting.h"

#include "base/io.h"
#include "migrate/tls.h"
#include "tools/pki.h"

#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

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

int main(void)
{
    const struct CMUnitTest tests[] = {
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
    };
    return cmocka_run_group_tests(tests, certs_setup, certs_teardown);
}

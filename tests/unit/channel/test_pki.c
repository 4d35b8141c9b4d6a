/* SPDX-License-Identifier: Apache-2.0 */
/* Certificates of a new cluster: what is in them, who may read them, what is never replaced. */
#include "tools/pki.h"

#include "base/io.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>
#include <openssl/pem.h>
#include <openssl/x509v3.h>

static char dir[64];

static int setup(void **state)
{
    strcpy(dir, "/tmp/vmmig-pki-XXXXXX");
    assert_non_null(mkdtemp(dir));
    return 0;
}

static int teardown(void **state)
{
    char command[96];
    snprintf(command, sizeof(command), "rm -rf %s", dir);
    return system(command);
}

static const char *path_of(const char *cluster, const char *file, char out[256])
{
    snprintf(out, 256, "%s/%s/%s", dir, cluster, file);
    return out;
}
#define PATH(cluster, file) path_of(cluster, file, (char[256]){0})

static void init(const char *cluster)
{
    struct vm_error *err = NULL;
    if (pki_init(PATH(cluster, ""), &err) < 0)
        fail_msg("%s", error_message(err));
}

static int issue(const char *cluster, struct pki_host host, struct vm_error **err)
{
    return pki_issue(PATH(cluster, ""), &host, err);
}

static X509 *load(const char *cluster, const char *file)
{
    FILE *f = fopen(PATH(cluster, file), "r");
    assert_non_null(f);
    X509 *cert = PEM_read_X509(f, NULL, NULL, NULL);
    assert_non_null(cert);
    fclose(f);
    return cert;
}

static int days_left(X509 *cert)
{
    int days, seconds;
    ASN1_TIME_diff(&days, &seconds, NULL, X509_get0_notAfter(cert));
    return days;
}

static void assert_mode(const char *cluster, const char *file, mode_t mode)
{
    struct stat st;
    assert_int_equal(stat(PATH(cluster, file), &st), 0);
    assert_int_equal(st.st_mode & 0777, mode);
}

/* The host's certificate is accepted for `purpose` by whoever trusts this CA alone. */
static bool accepted(X509 *ca, X509 *cert, int purpose)
{
    X509_STORE *store = X509_STORE_new();
    X509_STORE_CTX *ctx = X509_STORE_CTX_new();
    X509_STORE_add_cert(store, ca);
    X509_STORE_set_flags(store, X509_V_FLAG_X509_STRICT);
    X509_STORE_CTX_init(ctx, store, cert, NULL);
    X509_STORE_CTX_set_purpose(ctx, purpose);
    bool ok = X509_verify_cert(ctx) == 1;
    X509_STORE_CTX_free(ctx);
    X509_STORE_free(store);
    return ok;
}

static void test_a_cluster_and_its_host(void **state)
{
    static const char *const ips[] = {"192.0.2.7", "2001:db8::7"};
    init("one");
    assert_int_equal(issue("one", (struct pki_host){.name = "host2", .ips = ips, .n_ips = 2}, NULL),
                     0);
    X509 *ca = load("one", "ca.crt"), *host = load("one", "host2.crt");
    assert_true(accepted(ca, host, X509_PURPOSE_SSL_SERVER));
    assert_true(accepted(ca, host, X509_PURPOSE_SSL_CLIENT));
    assert_false(accepted(host, host, X509_PURPOSE_SSL_SERVER)); /* a host is no CA */
    assert_int_equal(X509_check_host(host, "host2", 0, 0, NULL), 1);
    assert_int_equal(X509_check_host(host, "host3", 0, 0, NULL), 0);
    assert_int_equal(X509_check_ip_asc(host, "192.0.2.7", 0), 1);
    assert_int_equal(X509_check_ip_asc(host, "2001:db8::7", 0), 1);
    assert_int_equal(X509_check_ip_asc(host, "192.0.2.8", 0), 0);
    assert_in_range(days_left(host), PKI_HOST_DAYS - 1, PKI_HOST_DAYS);
    assert_in_range(days_left(ca), PKI_CA_DAYS - 1, PKI_CA_DAYS);
    assert_int_equal(EVP_PKEY_get_bits(X509_get0_pubkey(host)), 256);
    assert_mode("one", "ca.key", 0600);
    assert_mode("one", "host2.key", 0600);
    assert_mode("one", "", 0700);
    X509_free(ca);
    X509_free(host);
}

static void test_a_host_that_is_an_address(void **state)
{
    init("address");
    assert_int_equal(issue("address", (struct pki_host){.name = "192.0.2.9", .days = 30}, NULL), 0);
    X509 *host = load("address", "192.0.2.9.crt");
    assert_int_equal(X509_check_ip_asc(host, "192.0.2.9", 0), 1);
    assert_in_range(days_left(host), 29, 30);
    X509_free(host);
}

static void test_certificates_of_two_clusters_do_not_mix(void **state)
{
    init("left");
    init("right");
    assert_int_equal(issue("left", (struct pki_host){.name = "host"}, NULL), 0);
    X509 *ca = load("right", "ca.crt"), *host = load("left", "host.crt");
    assert_false(accepted(ca, host, X509_PURPOSE_SSL_SERVER));
    X509_free(ca);
    X509_free(host);
}

static void test_nothing_is_replaced_unasked(void **state)
{
    struct vm_error *err = NULL;
    char *before, *after;
    init("keep");
    assert_int_equal(pki_init(PATH("keep", ""), &err), -1);
    assert_int_equal(err->kind, VM_ERROR_CONFLICT);
    assert_non_null(strstr(err->message, "ca.crt exists; choose another folder"));
    error_clear(&err);
    assert_int_equal(issue("keep", (struct pki_host){.name = "host"}, NULL), 0);
    assert_int_equal(io_read_file(PATH("keep", "host.crt"), 65536, &before, NULL, NULL), 0);
    assert_int_equal(issue("keep", (struct pki_host){.name = "host"}, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_CONFLICT);
    error_clear(&err);
    assert_int_equal(io_read_file(PATH("keep", "host.crt"), 65536, &after, NULL, NULL), 0);
    assert_string_equal(before, after);
    free(after);
    assert_int_equal(issue("keep", (struct pki_host){.name = "host", .replace = true}, NULL), 0);
    assert_int_equal(io_read_file(PATH("keep", "host.crt"), 65536, &after, NULL, NULL), 0);
    assert_string_not_equal(before, after);
    free(before);
    free(after);
    /* A key alone, as a crash leaves it, is not replaced either. */
    assert_int_equal(unlink(PATH("keep", "host.crt")), 0);
    assert_int_equal(issue("keep", (struct pki_host){.name = "host"}, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_CONFLICT);
    error_free(err);
}

static void test_what_is_no_host(void **state)
{
    static const char *const names[] = {"",   "a b",  "../../etc/x",  "a/b",  ".", "..",
                                        "-x", "a..b", "x,IP:1.2.3.4", "a\nb", "*", "*.example.com",
                                        "ca", "x."};
    static const char *const bad_ip[] = {"192.0.2"};
    init("names");
    for (size_t i = 0; i < sizeof(names) / sizeof(*names); i++) {
        struct vm_error *err = NULL;
        if (issue("names", (struct pki_host){.name = names[i]}, &err) == 0)
            fail_msg("\"%s\" was taken for a host", names[i]);
        assert_int_equal(err->kind, VM_ERROR_USAGE);
        error_free(err);
    }
    assert_int_equal(
        issue("names", (struct pki_host){.name = "a", .ips = bad_ip, .n_ips = 1}, NULL), -1);
    assert_int_equal(issue("names", (struct pki_host){.name = "a", .days = PKI_CA_DAYS + 1}, NULL),
                     -1);
}

/* A certificate never outlives its CA. */
static void test_the_end_of_the_ca(void **state)
{
    init("end");
    assert_int_equal(issue("end", (struct pki_host){.name = "a", .days = PKI_CA_DAYS}, NULL), 0);
    X509 *ca = load("end", "ca.crt"), *host = load("end", "a.crt");
    assert_true(ASN1_TIME_compare(X509_get0_notAfter(host), X509_get0_notAfter(ca)) <= 0);
    X509_free(ca);
    X509_free(host);
}

static void assert_issue_fails(const char *cluster, enum vm_error_kind kind, const char *text)
{
    struct vm_error *err = NULL;
    assert_int_equal(issue(cluster, (struct pki_host){.name = "host"}, &err), -1);
    if (!strstr(err->message, text))
        fail_msg("\"%s\" does not say \"%s\"", err->message, text);
    assert_int_equal(err->kind, kind);
    error_free(err);
}

static void test_a_ca_that_is_none(void **state)
{
    assert_issue_fails("nowhere", VM_ERROR_NOT_FOUND, "make one with `vmmig pki init`");
    init("broken");
    init("other");
    assert_int_equal(rename(PATH("other", "ca.key"), PATH("broken", "ca.key")), 0);
    assert_issue_fails("broken", VM_ERROR_CORRUPT, "are not a CA's certificate and its key");
    assert_issue_fails("other", VM_ERROR_NOT_FOUND, "the CA's key is needed");
    assert_int_equal(io_write_file_durably(PATH("broken", "ca.key"), "x", 1, 0600, NULL), 0);
    assert_issue_fails("broken", VM_ERROR_CORRUPT, "is no key in PEM form");
    assert_int_equal(io_write_file_durably(PATH("broken", "ca.crt"), "x", 1, 0600, NULL), 0);
    assert_issue_fails("broken", VM_ERROR_CORRUPT, "is no certificate in PEM form");
}

static int revoke_host(const char *cluster, const char *host, struct vm_error **err)
{
    return pki_revoke(PATH(cluster, ""), host, err);
}

static X509_CRL *load_list(const char *cluster)
{
    FILE *f = fopen(PATH(cluster, "ca.crl"), "r");
    assert_non_null(f);
    X509_CRL *crl = PEM_read_X509_CRL(f, NULL, NULL, NULL);
    fclose(f);
    assert_non_null(crl);
    return crl;
}

/* The list names what was revoked, the one of a name that was issued again too, and is the CA's. */
static void test_certificates_that_are_revoked(void **state)
{
    struct vm_error *err = NULL;
    X509_REVOKED *entry;
    init("revoke");
    assert_int_equal(issue("revoke", (struct pki_host){.name = "a"}, NULL), 0);
    assert_int_equal(issue("revoke", (struct pki_host){.name = "b"}, NULL), 0);
    X509 *first = load("revoke", "a.crt"), *good = load("revoke", "b.crt"), *ca = load("revoke", "ca.crt");
    assert_int_equal(revoke_host("revoke", "a", NULL), 0);
    assert_int_equal(revoke_host("revoke", "a", &err), -1);
    assert_int_equal(err->kind, VM_ERROR_CONFLICT);
    error_clear(&err);
    assert_int_equal(issue("revoke", (struct pki_host){.name = "a", .replace = true}, NULL), 0);
    X509 *second = load("revoke", "a.crt");
    X509_CRL *crl = load_list("revoke");
    assert_int_equal(X509_CRL_get0_by_cert(crl, &entry, first), 1);
    assert_int_equal(X509_CRL_get0_by_cert(crl, &entry, second), 0);
    X509_CRL_free(crl);
    assert_int_equal(revoke_host("revoke", "a", NULL), 0);
    crl = load_list("revoke");
    assert_int_equal(X509_CRL_get0_by_cert(crl, &entry, first), 1);
    assert_int_equal(X509_CRL_get0_by_cert(crl, &entry, second), 1);
    assert_int_equal(X509_CRL_get0_by_cert(crl, &entry, good), 0);
    assert_int_equal(X509_CRL_verify(crl, X509_get0_pubkey(ca)), 1);
    assert_int_equal(ASN1_TIME_compare(X509_CRL_get0_nextUpdate(crl), X509_get0_notAfter(ca)), 0);
    X509_CRL_free(crl);
    X509_free(first);
    X509_free(second);
    X509_free(good);
    X509_free(ca);
}

static void assert_revoke_fails(const char *cluster, const char *host, enum vm_error_kind kind, const char *text)
{
    struct vm_error *err = NULL;
    assert_int_equal(revoke_host(cluster, host, &err), -1);
    if (!strstr(err->message, text))
        fail_msg("\"%s\" does not say \"%s\"", err->message, text);
    assert_int_equal(err->kind, kind);
    error_free(err);
}

static void test_what_cannot_be_revoked(void **state)
{
    init("ours");
    init("theirs");
    assert_int_equal(issue("theirs", (struct pki_host){.name = "host"}, NULL), 0);
    assert_int_equal(revoke_host("theirs", "host", NULL), 0);
    assert_revoke_fails("ours", "host", VM_ERROR_NOT_FOUND, "host.crt");
    assert_revoke_fails("ours", "../x", VM_ERROR_USAGE, "neither a host name");
    assert_int_equal(rename(PATH("theirs", "host.crt"), PATH("ours", "host.crt")), 0);
    assert_revoke_fails("ours", "host", VM_ERROR_REFUSED, "the certificate of host is of another CA");
    assert_int_equal(issue("ours", (struct pki_host){.name = "other"}, NULL), 0);
    assert_int_equal(rename(PATH("theirs", "ca.crl"), PATH("ours", "ca.crl")), 0);
    assert_revoke_fails("ours", "other", VM_ERROR_CORRUPT, "ca.crl is no list of this CA's");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_cluster_and_its_host),
        cmocka_unit_test(test_a_host_that_is_an_address),
        cmocka_unit_test(test_certificates_of_two_clusters_do_not_mix),
        cmocka_unit_test(test_nothing_is_replaced_unasked),
        cmocka_unit_test(test_what_is_no_host),
        cmocka_unit_test(test_the_end_of_the_ca),
        cmocka_unit_test(test_a_ca_that_is_none),
        cmocka_unit_test(test_certificates_that_are_revoked),
        cmocka_unit_test(test_what_cannot_be_revoked),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}

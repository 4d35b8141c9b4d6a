/* SPDX-License-Identifier: Apache-2.0 */
#include "certs.h"

#include "base/cleanup.h"
#include "tools/pki.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <openssl/pem.h>
#include <openssl/ssl.h>

char certs_dir[64];

static const char *path_of(const char *cluster, const char *file, char out[256])
{
    snprintf(out, 256, "%s/%s/%s", certs_dir, cluster, file);
    return out;
}
#define PATH(cluster, file) path_of(cluster, file, (char[256]){0})

static void must(int ret, struct vm_error *err)
{
    if (ret < 0)
        fail_msg("%s", error_message(err));
}

static void make_cluster(const char *name)
{
    static const char *const ips[] = {"127.0.0.1", "::1"};
    struct vm_error *err = NULL;
    const char *dir = PATH(name, "");
    must(pki_init(dir, &err), err);
    must(pki_issue(dir, &(struct pki_host){.name = "localhost", .ips = ips, .n_ips = 2}, &err),
         err);
    must(pki_issue(dir, &(struct pki_host){.name = "elsewhere"}, &err), err);
    must(pki_issue(dir, &(struct pki_host){.name = "stolen", .ips = ips, .n_ips = 2}, &err), err);
    must(pki_issue(dir, &(struct pki_host){.name = "old", .ips = ips, .n_ips = 2}, &err), err);
    must(pki_issue(dir, &(struct pki_host){.name = "early", .ips = ips, .n_ips = 2}, &err), err);
}

int certs_setup(void **state)
{
    snprintf(certs_dir, sizeof(certs_dir), "/tmp/vmmig-certs-XXXXXX");
    assert_non_null(mkdtemp(certs_dir));
    make_cluster("a");
    make_cluster("b");
    certs_make_expired("a", "old");
    certs_make_early("a", "early");
    return 0;
}

int certs_teardown(void **state)
{
    char command[128];
    snprintf(command, sizeof(command), "rm -rf %s", certs_dir);
    return system(command);
}

struct conn_context *certs_context(const char *ca_cluster, const char *cluster, const char *host)
{
    char cert[64], key[64];
    snprintf(cert, sizeof(cert), "%s.crt", host);
    snprintf(key, sizeof(key), "%s.key", host);
    struct vm_error *err = NULL;
    struct conn_settings settings = {.ca_file = PATH(ca_cluster, "ca.crt"),
                                     .cert_file = PATH(cluster, cert),
                                     .key_file = PATH(cluster, key)};
    struct conn_context *ctx = conn_context_create(&settings, &err);
    must(ctx ? 0 : -1, err);
    return ctx;
}

static EVP_PKEY *load_ca_key(const char *cluster)
{
    cleanup_fclose FILE *f = fopen(PATH(cluster, "ca.key"), "r");
    return PEM_read_PrivateKey(f, NULL, NULL, NULL);
}

/* Set the times of a certificate and sign it again. */
static void set_times(const char *cluster, const char *host, long begin, long end)
{
    char name[64];
    snprintf(name, sizeof(name), "%s.crt", host);
    FILE *f = fopen(PATH(cluster, name), "r");
    X509 *cert = PEM_read_X509(f, NULL, NULL, NULL);
    fclose(f);
    EVP_PKEY *key = load_ca_key(cluster);
    X509_gmtime_adj(X509_getm_notBefore(cert), begin);
    X509_gmtime_adj(X509_getm_notAfter(cert), end);
    assert_true(X509_sign(cert, key, EVP_sha256()) > 0);
    f = fopen(PATH(cluster, name), "w");
    assert_int_equal(PEM_write_X509(f, cert), 1);
    fclose(f);
    X509_free(cert);
    EVP_PKEY_free(key);
}

void certs_make_expired(const char *cluster, const char *host)
{
    set_times(cluster, host, -172800, -86400);
}

void certs_make_early(const char *cluster, const char *host)
{
    set_times(cluster, host, 86400, 172800);
}

bool certs_stranger(int fd, bool dial, int tls_minor, const char *host)
{
    char cert[64], key[64];
    SSL_CTX *ctx = SSL_CTX_new(TLS_method());
    SSL_CTX_set_max_proto_version(ctx, tls_minor == 3 ? TLS1_3_VERSION : TLS1_2_VERSION);
    if (host) {
        snprintf(cert, sizeof(cert), "%s.crt", host);
        snprintf(key, sizeof(key), "%s.key", host);
        SSL_CTX_use_certificate_chain_file(ctx, PATH("a", cert));
        SSL_CTX_use_PrivateKey_file(ctx, PATH("a", key), SSL_FILETYPE_PEM);
    }
    SSL *ssl = SSL_new(ctx);
    SSL_set_fd(ssl, fd);
    bool done = (dial ? SSL_connect(ssl) : SSL_accept(ssl)) == 1;
    char byte;
    if (done)
        SSL_read(ssl, &byte, 1); /* until the other side is through with us */
    SSL_free(ssl);
    SSL_CTX_free(ctx);
    close(fd);
    return done;
}

/* SPDX-License-Identifier: Apache-2.0 */
#include "tools/pki.h"

#include "base/cleanup.h"
#include "base/io.h"

#include <arpa/inet.h>
#include <errno.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

#include <openssl/bio.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/rand.h>
#include <openssl/x509v3.h>

enum {
    SERIAL_BYTES = 16,
    SECONDS_PER_DAY = 86400,
    BACKDATED_S = 3600, /* for hosts whose clock is a little behind */
    NAME_MAX_LEN = 253,
    COMMON_NAME_MAX = 64,
    SAN_MAX = 4096,
    IPS_MAX = 32,
};

static void key_free(EVP_PKEY **key)
{
    EVP_PKEY_free(*key);
}

static void cert_free(X509 **cert)
{
    X509_free(*cert);
}

static void bio_free(BIO **bio)
{
    BIO_free(*bio);
}

static void crl_free(X509_CRL **crl)
{
    X509_CRL_free(*crl);
}

#define cleanup_key __attribute__((cleanup(key_free)))
#define cleanup_cert __attribute__((cleanup(cert_free)))
#define cleanup_bio __attribute__((cleanup(bio_free)))
#define cleanup_crl __attribute__((cleanup(crl_free)))

struct authority {
    X509 *cert;
    EVP_PKEY *key;
};

static void authority_finish(struct authority *ca)
{
    X509_free(ca->cert);
    EVP_PKEY_free(ca->key);
}

static int set_openssl_error(const char *what, struct vm_error **err)
{
    unsigned long code = ERR_peek_error();
    const char *reason = code ? ERR_reason_error_string(code) : NULL;
    ERR_clear_error();
    return error_set(err, VM_ERROR_SYSTEM, "%s (%s)", what, reason ? reason : "no reason given");
}

/* ---- Files ---- */

static int make_path(const char *dir, const char *name, const char *suffix, char **ret_path,
                     struct vm_error **err)
{
    return asprintf(ret_path, "%s/%s%s", dir, name, suffix) < 0 ? error_nomem(err) : 0;
}

static int refuse_existing(const char *path, const char *advice, struct vm_error **err)
{
    struct stat st;
    if (lstat(path, &st) == 0)
        return error_set(err, VM_ERROR_CONFLICT, "%s exists; %s", path, advice);
    return errno == ENOENT ? 0 : error_errno(err, errno, "cannot look at %s", path);
}

static int write_bio(const char *path, BIO *bio, mode_t mode, struct vm_error **err)
{
    char *data;
    long len = BIO_get_mem_data(bio, &data);
    return io_write_file_durably(path, data, (size_t)len, mode, err);
}

static int write_key(const char *path, EVP_PKEY *key, struct vm_error **err)
{
    cleanup_bio BIO *bio = BIO_new(BIO_s_secmem());
    if (!bio || PEM_write_bio_PKCS8PrivateKey(bio, key, NULL, NULL, 0, NULL, NULL) != 1)
        return set_openssl_error("cannot encode a key", err);
    return write_bio(path, bio, 0600, err);
}

static int write_cert(const char *path, X509 *cert, struct vm_error **err)
{
    cleanup_bio BIO *bio = BIO_new(BIO_s_mem());
    if (!bio || PEM_write_bio_X509(bio, cert) != 1)
        return set_openssl_error("cannot encode a certificate", err);
    return write_bio(path, bio, 0644, err);
}

/* A PEM file as a BIO over its bytes, which *ret_data keeps. */
static BIO *open_pem(const char *path, char **ret_data, struct vm_error **err)
{
    size_t len;
    if (io_read_file(path, 1 << 20, ret_data, &len, err) < 0)
        return NULL;
    BIO *bio = BIO_new_mem_buf(*ret_data, (int)len);
    if (!bio)
        error_nomem(err);
    return bio;
}

static int no_pass_phrase(char *buf, int size, int rwflag, void *arg)
{
    return -1;
}

static int load_authority(const char *dir, struct authority *ret_ca, struct vm_error **err)
{
    cleanup_free char *cert_path = NULL, *key_path = NULL, *cert_pem = NULL, *key_pem = NULL;
    if (make_path(dir, "ca", ".crt", &cert_path, err) < 0 ||
        make_path(dir, "ca", ".key", &key_path, err) < 0)
        return -1;
    cleanup_bio BIO *cert_bio = open_pem(cert_path, &cert_pem, err);
    if (!cert_bio)
        return error_wrap(err, "no CA in %s; make one with `vmmig pki init`", dir);
    cleanup_bio BIO *key_bio = open_pem(key_path, &key_pem, err);
    if (!key_bio)
        return error_wrap(err, "the CA's key is needed");
    ret_ca->cert = PEM_read_bio_X509(cert_bio, NULL, no_pass_phrase, NULL);
    ret_ca->key = PEM_read_bio_PrivateKey(key_bio, NULL, no_pass_phrase, NULL);
    ERR_clear_error();
    if (!ret_ca->cert)
        return error_set(err, VM_ERROR_CORRUPT, "%s is no certificate in PEM form", cert_path);
    if (!ret_ca->key)
        return error_set(err, VM_ERROR_CORRUPT, "%s is no key in PEM form, or has a pass phrase",
                         key_path);
    if (X509_check_private_key(ret_ca->cert, ret_ca->key) != 1 ||
        X509_check_ca(ret_ca->cert) != 1) {
        ERR_clear_error();
        return error_set(err, VM_ERROR_CORRUPT, "%s and %s are not a CA's certificate and its key",
                         cert_path, key_path);
    }
    return 0;
}

/* ---- Certificates ---- */

static int set_serial(X509 *cert, struct vm_error **err)
{
    uint8_t bytes[SERIAL_BYTES];
    if (RAND_bytes(bytes, sizeof(bytes)) != 1)
        return set_openssl_error("no random numbers", err);
    bytes[0] = (bytes[0] & 0x7f) | 0x40; /* positive, and always of the same length */
    BIGNUM *number = BN_bin2bn(bytes, sizeof(bytes), NULL);
    bool set = number && BN_to_ASN1_INTEGER(number, X509_get_serialNumber(cert));
    BN_free(number);
    return set ? 0 : error_nomem(err);
}

static int set_times(X509 *cert, unsigned days, const X509 *issuer, struct vm_error **err)
{
    if (!X509_gmtime_adj(X509_getm_notBefore(cert), -BACKDATED_S) ||
        !X509_time_adj_ex(X509_getm_notAfter(cert), (int)days, 0, NULL))
        return error_nomem(err);
    if (!issuer)
        return 0;
    /* A certificate is of no use beyond its issuer's end, nor before its beginning. */
    const ASN1_TIME *end = X509_get0_notAfter(issuer), *begin = X509_get0_notBefore(issuer);
    if (X509_cmp_current_time(end) < 0)
        return error_set(err, VM_ERROR_DENIED, "the CA has expired; a new cluster CA is needed");
    if (ASN1_TIME_compare(X509_get0_notAfter(cert), end) > 0)
        X509_set1_notAfter(cert, end);
    if (ASN1_TIME_compare(X509_get0_notBefore(cert), begin) < 0)
        X509_set1_notBefore(cert, begin);
    return 0;
}

static int add_extension(X509 *cert, X509 *issuer, int nid, const char *value,
                         struct vm_error **err)
{
    X509V3_CTX ctx;
    X509V3_set_ctx(&ctx, issuer, cert, NULL, NULL, 0);
    X509_EXTENSION *extension = X509V3_EXT_conf_nid(NULL, &ctx, nid, value);
    bool added = extension && X509_add_ext(cert, extension, -1) == 1;
    X509_EXTENSION_free(extension);
    return added ? 0 : set_openssl_error("cannot add an extension to a certificate", err);
}

/* A certificate of `key` without extensions; issuer NULL: for itself. */
static X509 *new_cert(EVP_PKEY *key, const char *name, unsigned days, X509 *issuer,
                      struct vm_error **err)
{
    cleanup_cert X509 *cert = X509_new();
    if (!cert) {
        error_nomem(err);
        return NULL;
    }
    X509_NAME *subject = X509_get_subject_name(cert);
    if (X509_set_version(cert, X509_VERSION_3) != 1 || X509_set_pubkey(cert, key) != 1 ||
        X509_NAME_add_entry_by_txt(subject, "CN", MBSTRING_UTF8, (const uint8_t *)name, -1, -1,
                                   0) != 1 ||
        X509_set_issuer_name(cert, issuer ? X509_get_subject_name(issuer) : subject) != 1) {
        set_openssl_error("cannot make a certificate", err);
        return NULL;
    }
    if (set_serial(cert, err) < 0 || set_times(cert, days, issuer, err) < 0)
        return NULL;
    return steal_ptr(&cert);
}

static int sign(X509 *cert, EVP_PKEY *key, struct vm_error **err)
{
    if (X509_sign(cert, key, EVP_sha256()) <= 0)
        return set_openssl_error("cannot sign a certificate", err);
    return 0;
}

static EVP_PKEY *new_key(struct vm_error **err)
{
    EVP_PKEY *key = EVP_EC_gen("P-256");
    if (!key)
        set_openssl_error("cannot make a key", err);
    return key;
}

int pki_init(const char *dir, struct vm_error **err)
{
    cleanup_free char *cert_path = NULL, *key_path = NULL;
    if (make_path(dir, "ca", ".crt", &cert_path, err) < 0 ||
        make_path(dir, "ca", ".key", &key_path, err) < 0 || io_make_folders(dir, 0700, err) < 0)
        return -1;
    const char *advice = "choose another folder: a new CA would shut every host of the old one out";
    if (refuse_existing(cert_path, advice, err) < 0 || refuse_existing(key_path, advice, err) < 0)
        return -1;
    cleanup_key EVP_PKEY *key = new_key(err);
    if (!key)
        return -1;
    cleanup_cert X509 *cert = new_cert(key, "vmmig cluster CA", PKI_CA_DAYS, NULL, err);
    if (!cert ||
        add_extension(cert, cert, NID_basic_constraints, "critical,CA:TRUE,pathlen:0", err) < 0 ||
        add_extension(cert, cert, NID_key_usage, "critical,keyCertSign,cRLSign", err) < 0 ||
        add_extension(cert, cert, NID_subject_key_identifier, "hash", err) < 0 ||
        sign(cert, key, err) < 0)
        return -1;
    return write_key(key_path, key, err) < 0 ? -1 : write_cert(cert_path, cert, err);
}

/* ---- Hosts ---- */

static bool is_ip(const char *text)
{
    uint8_t binary[sizeof(struct in6_addr)];
    return inet_pton(AF_INET, text, binary) == 1 || inet_pton(AF_INET6, text, binary) == 1;
}

static bool is_dns_name(const char *name)
{
    size_t len = strlen(name);
    const char *alphabet = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.";
    if (!len || len > NAME_MAX_LEN || strspn(name, alphabet) != len)
        return false;
    return *name != '.' && *name != '-' && name[len - 1] != '.' && !strstr(name, "..");
}

static int check_name(const char *name, struct vm_error **err)
{
    if (!is_ip(name) && !is_dns_name(name))
        return error_set(err, VM_ERROR_USAGE, "\"%s\" is neither a host name nor an IP address",
                         name);
    if (!strcmp(name, "ca"))
        return error_set(err, VM_ERROR_USAGE, "a host cannot be named \"ca\" here");
    return 0;
}

static int check_host(const struct pki_host *host, struct vm_error **err)
{
    if (check_name(host->name, err) < 0)
        return -1;
    if (host->days > PKI_CA_DAYS)
        return error_set(err, VM_ERROR_USAGE, "%u days is too long; at most %d", host->days,
                         PKI_CA_DAYS);
    if (host->n_ips > IPS_MAX)
        return error_set(err, VM_ERROR_USAGE, "at most %d addresses", IPS_MAX);
    for (unsigned i = 0; i < host->n_ips; i++)
        if (!is_ip(host->ips[i]))
            return error_set(err, VM_ERROR_USAGE, "\"%s\" is no IP address", host->ips[i]);
    return 0;
}

/* Everything in it was checked, so that nothing can break out of its field. */
static void format_san(const struct pki_host *host, char out[SAN_MAX])
{
    int used = snprintf(out, SAN_MAX, "%s:%s", is_ip(host->name) ? "IP" : "DNS", host->name);
    for (unsigned i = 0; i < host->n_ips; i++)
        used += snprintf(out + used, SAN_MAX - (size_t)used, ",IP:%s", host->ips[i]);
}

static X509 *new_host_cert(const struct pki_host *host, EVP_PKEY *key, const struct authority *ca,
                           struct vm_error **err)
{
    char san[SAN_MAX], common_name[COMMON_NAME_MAX + 1];
    format_san(host, san);
    snprintf(common_name, sizeof(common_name), "%.*s", COMMON_NAME_MAX, host->name);
    unsigned days = host->days ? host->days : PKI_HOST_DAYS;
    cleanup_cert X509 *cert = new_cert(key, common_name, days, ca->cert, err);
    if (!cert ||
        add_extension(cert, ca->cert, NID_basic_constraints, "critical,CA:FALSE", err) < 0 ||
        add_extension(cert, ca->cert, NID_key_usage, "critical,digitalSignature", err) < 0 ||
        add_extension(cert, ca->cert, NID_ext_key_usage, "serverAuth,clientAuth", err) < 0 ||
        add_extension(cert, ca->cert, NID_subject_key_identifier, "hash", err) < 0 ||
        add_extension(cert, ca->cert, NID_authority_key_identifier, "keyid:always", err) < 0 ||
        add_extension(cert, ca->cert, NID_subject_alt_name, san, err) < 0 ||
        sign(cert, ca->key, err) < 0)
        return NULL;
    return steal_ptr(&cert);
}

int pki_issue(const char *dir, const struct pki_host *host, struct vm_error **err)
{
    cleanup_free char *cert_path = NULL, *key_path = NULL;
    __attribute__((cleanup(authority_finish))) struct authority ca = {0};
    if (check_host(host, err) < 0 || load_authority(dir, &ca, err) < 0 ||
        make_path(dir, host->name, ".crt", &cert_path, err) < 0 ||
        make_path(dir, host->name, ".key", &key_path, err) < 0)
        return -1;
    const char *advice = "to renew it, say --replace";
    if (!host->replace &&
        (refuse_existing(cert_path, advice, err) < 0 || refuse_existing(key_path, advice, err) < 0))
        return -1;
    cleanup_key EVP_PKEY *key = new_key(err);
    if (!key)
        return -1;
    cleanup_cert X509 *cert = new_host_cert(host, key, &ca, err);
    if (!cert || write_key(key_path, key, err) < 0)
        return -1;
    return write_cert(cert_path, cert, err);
}

/* ---- Revocation ---- */

static X509 *load_host_cert(const char *dir, const char *host, struct vm_error **err)
{
    cleanup_free char *path = NULL, *pem = NULL;
    if (make_path(dir, host, ".crt", &path, err) < 0)
        return NULL;
    cleanup_bio BIO *bio = open_pem(path, &pem, err);
    if (!bio)
        return NULL;
    X509 *cert = PEM_read_bio_X509(bio, NULL, no_pass_phrase, NULL);
    ERR_clear_error();
    if (!cert)
        error_set(err, VM_ERROR_CORRUPT, "%s is no certificate in PEM form", path);
    return cert;
}

/* The list at `path`, or a new one of the CA if there is none. */
static X509_CRL *load_list(const char *path, const struct authority *ca, struct vm_error **err)
{
    cleanup_free char *pem = NULL;
    cleanup_error struct vm_error *why = NULL;
    cleanup_crl X509_CRL *crl = NULL;
    cleanup_bio BIO *bio = open_pem(path, &pem, &why);
    if (!bio && why->kind != VM_ERROR_NOT_FOUND) {
        error_propagate(err, steal_ptr(&why));
        return NULL;
    }
    crl = bio ? PEM_read_bio_X509_CRL(bio, NULL, no_pass_phrase, NULL) : X509_CRL_new();
    ERR_clear_error();
    if (bio && (!crl || X509_CRL_verify(crl, ca->key) != 1)) {
        ERR_clear_error();
        error_set(err, VM_ERROR_CORRUPT, "%s is no list of this CA's", path);
        return NULL;
    }
    if (!crl || X509_CRL_set_version(crl, X509_CRL_VERSION_2) != 1 ||
        X509_CRL_set_issuer_name(crl, X509_get_subject_name(ca->cert)) != 1 ||
        X509_CRL_set1_nextUpdate(crl, X509_get0_notAfter(ca->cert)) != 1) {
        set_openssl_error("cannot make a list of revoked certificates", err);
        return NULL;
    }
    return steal_ptr(&crl);
}

static int add_to_list(X509_CRL *crl, X509 *cert, struct vm_error **err)
{
    ASN1_TIME *now = X509_gmtime_adj(NULL, -BACKDATED_S);
    X509_REVOKED *entry = X509_REVOKED_new();
    bool added = now && entry &&
                 X509_REVOKED_set_serialNumber(entry, X509_get_serialNumber(cert)) == 1 &&
                 X509_REVOKED_set_revocationDate(entry, now) == 1 &&
                 X509_CRL_set1_lastUpdate(crl, now) == 1 && X509_CRL_add0_revoked(crl, entry) == 1;
    ASN1_TIME_free(now);
    if (added)
        return 0;
    X509_REVOKED_free(entry);
    return set_openssl_error("cannot add to a list of revoked certificates", err);
}

static int write_list(const char *path, X509_CRL *crl, EVP_PKEY *key, struct vm_error **err)
{
    cleanup_bio BIO *bio = BIO_new(BIO_s_mem());
    if (!bio || X509_CRL_sort(crl) != 1 || X509_CRL_sign(crl, key, EVP_sha256()) <= 0 ||
        PEM_write_bio_X509_CRL(bio, crl) != 1)
        return set_openssl_error("cannot encode a list of revoked certificates", err);
    return write_bio(path, bio, 0644, err);
}

int pki_revoke(const char *dir, const char *host, struct vm_error **err)
{
    cleanup_free char *path = NULL;
    __attribute__((cleanup(authority_finish))) struct authority ca = {0};
    if (check_name(host, err) < 0 || load_authority(dir, &ca, err) < 0 ||
        make_path(dir, "ca", ".crl", &path, err) < 0)
        return -1;
    cleanup_cert X509 *cert = load_host_cert(dir, host, err);
    if (!cert)
        return -1;
    if (X509_verify(cert, ca.key) != 1) {
        ERR_clear_error();
        return error_set(err, VM_ERROR_REFUSED, "the certificate of %s is of another CA", host);
    }
    cleanup_crl X509_CRL *crl = load_list(path, &ca, err);
    X509_REVOKED *entry;
    if (!crl)
        return -1;
    if (X509_CRL_get0_by_cert(crl, &entry, cert) != 0)
        return error_set(err, VM_ERROR_CONFLICT, "the certificate of %s is revoked already", host);
    return add_to_list(crl, cert, err) < 0 ? -1 : write_list(path, crl, ca.key, err);
}

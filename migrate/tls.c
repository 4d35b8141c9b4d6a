/* SPDX-License-Identifier: Apache-2.0 */
#include "migrate/tls.h"

#include "base/cleanup.h"
#include "base/log.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>

#include <openssl/err.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>

enum {
    RECORD_MAX = 16384,
    OUT_SLACK = 64 << 10,  /* a record's overhead, a handshake's flight */
    IN_MAX = 64 << 10,     /* read ahead from the socket */
    READ_STEP = 256 << 10, /* at most, under the lock */
};

enum { CA, CERT, KEY, CRL, FILES };

/* A fatal handshake_failure, as a record of its own. */
const uint8_t tls_alert_no_certificate[7] = {0x15, 0x03, 0x03, 0x00, 0x02, 0x02, 0x28};

/* ---- Context ---- */

struct file_state {
    dev_t dev;
    ino_t ino;
    off_t size;
    struct timespec mtime;
};

struct tls_context {
    pthread_mutex_t lock;
    char *files[FILES]; /* the CRL's may be NULL */
    struct file_state states[FILES];
    SSL_CTX *ssl_ctx;
    BIO_METHOD *bio_method;
};

/* OpenSSL's reason for the last failure in this thread; the queue is emptied. */
static const char *last_reason(void)
{
    unsigned long code = ERR_peek_error();
    const char *reason = code ? ERR_reason_error_string(code) : NULL;
    ERR_clear_error();
    return reason ? reason : "no reason given";
}

static void read_file_states(const struct tls_context *ctx, struct file_state states[FILES])
{
    memset(states, 0, sizeof(*states) * FILES);
    for (int i = 0; i < FILES; i++) {
        struct stat st;
        if (ctx->files[i] && stat(ctx->files[i], &st) == 0)
            states[i] = (struct file_state){st.st_dev, st.st_ino, st.st_size, st.st_mtim};
    }
}

static bool same_file_states(const struct file_state *a, const struct file_state *b)
{
    for (int i = 0; i < FILES; i++)
        if (a[i].dev != b[i].dev || a[i].ino != b[i].ino || a[i].size != b[i].size ||
            a[i].mtime.tv_sec != b[i].mtime.tv_sec || a[i].mtime.tv_nsec != b[i].mtime.tv_nsec)
            return false;
    return true;
}

/* A key with a pass phrase fails to load, instead of asking a terminal. */
static int no_pass_phrase(char *buf, int size, int rwflag, void *arg)
{
    return -1;
}

static bool cpu_has_aes(void)
{
#if defined(__x86_64__)
    return __builtin_cpu_supports("aes") && __builtin_cpu_supports("pclmul");
#else
    return true; /* servers of other architectures have it */
#endif
}

/* What makes each of the files. */
static const char *const makers[FILES] = {
    [CA] = "this host has no certificates; `vmmig pki init` and `vmmig pki issue` make them",
    [CERT] = "this host has no certificate; `vmmig pki issue` makes it",
    [KEY] = "this host has no key; `vmmig pki issue` makes it",
    [CRL] = "no list of revoked certificates; `vmmig pki revoke` makes it",
};

static int check_readable(char *const files[FILES], struct vm_error **err)
{
    for (int i = 0; i < FILES; i++) {
        cleanup_close int fd = files[i] ? open(files[i], O_RDONLY | O_CLOEXEC) : -1;
        int why = errno;
        if (fd >= 0 || !files[i])
            continue;
        error_errno(err, why, "cannot read %s", files[i]);
        return why == ENOENT ? error_wrap(err, "%s", makers[i]) : -1;
    }
    return 0;
}

/* From then on a certificate counts only if the list of its CA does not have it. */
static int load_crl(SSL_CTX *c, const char *file, struct vm_error **err)
{
    X509_LOOKUP *lookup = X509_STORE_add_lookup(SSL_CTX_get_cert_store(c), X509_LOOKUP_file());
    if (!lookup || X509_load_crl_file(lookup, file, X509_FILETYPE_PEM) < 1)
        return error_set(err, VM_ERROR_DENIED,
                         "%s holds no list of revoked certificates in PEM form (%s)", file,
                         last_reason());
    X509_VERIFY_PARAM_set_flags(SSL_CTX_get0_param(c), X509_V_FLAG_CRL_CHECK);
    return 0;
}

static int load_files(SSL_CTX *c, char *const files[FILES], struct vm_error **err)
{
    if (check_readable(files, err) < 0)
        return -1;
    if (SSL_CTX_load_verify_file(c, files[CA]) != 1)
        return error_set(err, VM_ERROR_DENIED, "%s holds no CA certificate in PEM form (%s)",
                         files[CA], last_reason());
    if (SSL_CTX_use_certificate_chain_file(c, files[CERT]) != 1)
        return error_set(err, VM_ERROR_DENIED, "%s holds no certificate in PEM form (%s)",
                         files[CERT], last_reason());
    if (SSL_CTX_use_PrivateKey_file(c, files[KEY], SSL_FILETYPE_PEM) != 1 ||
        SSL_CTX_check_private_key(c) != 1)
        return error_set(err, VM_ERROR_DENIED, "%s is not the key of %s (%s)", files[KEY],
                         files[CERT], last_reason());
    return files[CRL] ? load_crl(c, files[CRL], err) : 0;
}

static SSL_CTX *make_ssl_ctx(char *const files[FILES], struct vm_error **err)
{
    SSL_CTX *c = SSL_CTX_new(TLS_method());
    if (!c) {
        error_nomem(err);
        return NULL;
    }
    const char *ciphers = cpu_has_aes() ? "TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:"
                                          "TLS_CHACHA20_POLY1305_SHA256"
                                        : "TLS_CHACHA20_POLY1305_SHA256:TLS_AES_128_GCM_SHA256:"
                                          "TLS_AES_256_GCM_SHA384";
    SSL_CTX_set_default_passwd_cb(c, no_pass_phrase);
    SSL_CTX_set_options(c, SSL_OP_NO_TICKET | SSL_OP_NO_COMPRESSION | SSL_OP_NO_RENEGOTIATION);
    SSL_CTX_set_session_cache_mode(c, SSL_SESS_CACHE_OFF);
    SSL_CTX_set_mode(c, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
    SSL_CTX_set_read_ahead(c, 1);
    SSL_CTX_set_default_read_buffer_len(c, IN_MAX);
    if (SSL_CTX_set_min_proto_version(c, TLS1_3_VERSION) != 1 ||
        SSL_CTX_set_ciphersuites(c, ciphers) != 1 || SSL_CTX_set_num_tickets(c, 0) != 1) {
        error_set(err, VM_ERROR_SYSTEM, "this OpenSSL does not offer TLS 1.3 (%s)", last_reason());
    } else if (load_files(c, files, err) == 0) {
        return c;
    }
    SSL_CTX_free(c);
    return NULL;
}

/* The present SSL_CTX with a reference, made anew if the files changed. */
static SSL_CTX *present_ssl_ctx(struct tls_context *ctx, struct vm_error **err)
{
    SCOPE_LOCK(&ctx->lock);
    struct file_state states[FILES];
    read_file_states(ctx, states);
    if (!ctx->ssl_ctx || !same_file_states(states, ctx->states)) {
        cleanup_error struct vm_error *why = NULL;
        SSL_CTX *fresh = make_ssl_ctx(ctx->files, &why);
        if (!fresh && !ctx->ssl_ctx) {
            error_propagate(err, steal_ptr(&why));
            error_set_kind(err, VM_ERROR_DENIED);
            return NULL;
        }
        if (!fresh) {
            log_warn("changed certificates do not load; the former ones stay in use", "error=%s",
                     log_q(error_message(why)));
        } else {
            SSL_CTX_free(ctx->ssl_ctx);
            ctx->ssl_ctx = fresh;
            memcpy(ctx->states, states, sizeof(states));
        }
    }
    SSL_CTX_up_ref(ctx->ssl_ctx);
    return ctx->ssl_ctx;
}

static BIO_METHOD *make_bio_method(void);

int tls_context_check(struct tls_context *ctx, int64_t *ret_end, struct vm_error **err)
{
    struct tm end = {0};
    SSL_CTX *c = present_ssl_ctx(ctx, err);
    if (!c)
        return -1;
    ASN1_TIME_to_tm(X509_get0_notAfter(SSL_CTX_get0_certificate(c)), &end);
    SSL_CTX_free(c);
    *ret_end = timegm(&end);
    return 0;
}

static int copy_names(const struct tls_files *files, char *ret_files[FILES], struct vm_error **err)
{
    const char *const names[FILES] = {files->ca, files->cert, files->key, files->crl};
    for (int i = 0; i < FILES; i++) {
        ret_files[i] = names[i] ? strdup(names[i]) : NULL;
        if (names[i] && !ret_files[i])
            return error_nomem(err);
    }
    return 0;
}

/* Whoever has no other host yet needs no certificates: they may come later. */
static int look_at_files(struct tls_context *ctx, struct vm_error **err)
{
    struct vm_error *why = NULL;
    int64_t end;
    if (tls_context_check(ctx, &end, &why) == 0)
        return 0;
    if (why->sys_errno != ENOENT)
        return error_propagate(err, why);
    log_warn("no VM is sent to another host, and none is taken, until there are certificates",
             "error=%s", log_q(error_message(why)));
    error_free(why);
    return 0;
}

struct tls_context *tls_context_create(const struct tls_files *files, struct vm_error **err)
{
    struct tls_context *ctx = calloc(1, sizeof(*ctx));
    if (!ctx) {
        error_nomem(err);
        return NULL;
    }
    pthread_mutex_init(&ctx->lock, NULL);
    ctx->bio_method = make_bio_method();
    if (!ctx->bio_method)
        error_nomem(err);
    else if (copy_names(files, ctx->files, err) == 0 && look_at_files(ctx, err) == 0)
        return ctx;
    tls_context_destroy(ctx);
    return NULL;
}

void tls_context_destroy(struct tls_context *ctx)
{
    if (!ctx)
        return;
    SSL_CTX_free(ctx->ssl_ctx);
    BIO_meth_free(ctx->bio_method);
    for (int i = 0; i < FILES; i++)
        free(ctx->files[i]);
    pthread_mutex_destroy(&ctx->lock);
    free(ctx);
}

/* ---- Stream ---- */

struct tls_stream {
    pthread_mutex_t lock; /* everything below but the strings */
    SSL *ssl;
    int fd;
    char *host, *peer; /* host: NULL on the listening side */
    char *ca_file, *crl_file; /* for messages; crl_file may be NULL */
    char *peer_name;
    bool established;        /* the handshake is over */
    char refused_names[512]; /* of the certificate that was not accepted */
    char refused_end[32];
    int read_errno; /* of the last failed recv */
    bool read_eof;
    struct vm_error *read_error; /* met after bytes that had to be returned first */
    uint32_t records;            /* written with the present key */
    uint64_t written;
    size_t out_begin, out_end; /* encrypted, not yet taken by the kernel */
    uint8_t out[TLS_OUT_MAX + OUT_SLACK];
    uint8_t gather[RECORD_MAX]; /* small pieces become one record */
};

static int bio_write(BIO *bio, const char *data, size_t n, size_t *ret_n)
{
    struct tls_stream *s = BIO_get_data(bio);
    BIO_clear_retry_flags(bio);
    if (sizeof(s->out) - s->out_end < n && s->out_begin) {
        memmove(s->out, s->out + s->out_begin, s->out_end - s->out_begin);
        s->out_end -= s->out_begin;
        s->out_begin = 0;
    }
    size_t room = sizeof(s->out) - s->out_end;
    if (!room) {
        BIO_set_retry_write(bio);
        return 0;
    }
    *ret_n = n < room ? n : room;
    memcpy(s->out + s->out_end, data, *ret_n);
    s->out_end += *ret_n;
    return 1;
}

static int bio_read(BIO *bio, char *out, size_t n, size_t *ret_n)
{
    struct tls_stream *s = BIO_get_data(bio);
    BIO_clear_retry_flags(bio);
    ssize_t got;
    do {
        got = recv(s->fd, out, n, MSG_DONTWAIT);
    } while (got < 0 && errno == EINTR);
    if (got > 0) {
        *ret_n = (size_t)got;
        return 1;
    }
    if (got == 0)
        s->read_eof = true;
    else if (errno == EAGAIN || errno == EWOULDBLOCK)
        BIO_set_retry_read(bio);
    else
        s->read_errno = errno;
    return 0;
}

static long bio_ctrl(BIO *bio, int command, long number, void *arg)
{
    struct tls_stream *s = BIO_get_data(bio);
    if (command == BIO_CTRL_EOF)
        return s->read_eof;
    return command == BIO_CTRL_FLUSH || command == BIO_CTRL_DUP;
}

static BIO_METHOD *make_bio_method(void)
{
    BIO_METHOD *m = BIO_meth_new(BIO_get_new_index() | BIO_TYPE_SOURCE_SINK, "vmmig connection");
    if (m) {
        BIO_meth_set_write_ex(m, bio_write);
        BIO_meth_set_read_ex(m, bio_read);
        BIO_meth_set_ctrl(m, bio_ctrl);
    }
    return m;
}

/* ---- Names in certificates ---- */

static bool append_name(char *out, size_t size, const GENERAL_NAME *name)
{
    char text[256] = "";
    if (name->type == GEN_DNS) {
        const ASN1_IA5STRING *dns = name->d.dNSName;
        snprintf(text, sizeof(text), "%.*s", ASN1_STRING_length(dns),
                 (const char *)ASN1_STRING_get0_data(dns));
    } else if (name->type == GEN_IPADD) {
        int n = ASN1_STRING_length(name->d.iPAddress);
        if (n != 4 && n != 16)
            return false;
        inet_ntop(n == 4 ? AF_INET : AF_INET6, ASN1_STRING_get0_data(name->d.iPAddress), text,
                  sizeof(text));
    } else {
        return false;
    }
    size_t used = strlen(out);
    snprintf(out + used, size - used, "%s%s", used ? ", " : "", text);
    return true;
}

/* The names of a certificate's SAN, DNS names first; at most `max` of them. */
static void list_names(X509 *cert, int max, char *out, size_t size)
{
    out[0] = 0;
    GENERAL_NAMES *names = X509_get_ext_d2i(cert, NID_subject_alt_name, NULL, NULL);
    int listed = 0;
    for (int pass = 0; pass < 2; pass++) {
        for (int i = 0; i < sk_GENERAL_NAME_num(names) && listed < max; i++) {
            const GENERAL_NAME *name = sk_GENERAL_NAME_value(names, i);
            if ((name->type == GEN_DNS) == (pass == 0) && append_name(out, size, name))
                listed++;
        }
    }
    GENERAL_NAMES_free(names);
}

/* OpenSSL forgets a certificate that it refused: keep what a message about it needs. */
static int note_refused(int ok, X509_STORE_CTX *store)
{
    SSL *ssl = X509_STORE_CTX_get_ex_data(store, SSL_get_ex_data_X509_STORE_CTX_idx());
    struct tls_stream *s = BIO_get_data(SSL_get_rbio(ssl));
    X509 *cert = X509_STORE_CTX_get_current_cert(store);
    struct tm end;
    if (ok || !cert)
        return ok;
    list_names(cert, 4, s->refused_names, sizeof(s->refused_names));
    if (ASN1_TIME_to_tm(X509_get0_notAfter(cert), &end) == 1)
        strftime(s->refused_end, sizeof(s->refused_end), "%Y-%m-%d", &end);
    return ok;
}

/* The dialling side verifies that the certificate names the host. */
static int expect_host(SSL *ssl, const char *host)
{
    struct in6_addr binary;
    X509_VERIFY_PARAM *param = SSL_get0_param(ssl);
    X509_VERIFY_PARAM_set_hostflags(param, X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS |
                                               X509_CHECK_FLAG_NEVER_CHECK_SUBJECT);
    if (inet_pton(AF_INET, host, &binary) == 1 || inet_pton(AF_INET6, host, &binary) == 1)
        return X509_VERIFY_PARAM_set1_ip_asc(param, host);
    return X509_VERIFY_PARAM_set1_host(param, host, 0) == 1 &&
           SSL_ctrl(ssl, SSL_CTRL_SET_TLSEXT_HOSTNAME, TLSEXT_NAMETYPE_host_name,
                    (void *)(uintptr_t)host) == 1; /* the macro for it casts const away */
}

struct tls_stream *tls_stream_create(struct tls_context *ctx, int fd, const char *host,
                                     const char *peer, struct vm_error **err)
{
    SSL_CTX *c = present_ssl_ctx(ctx, err);
    if (!c)
        return NULL;
    struct tls_stream *s = calloc(1, sizeof(*s));
    if (s) {
        pthread_mutex_init(&s->lock, NULL);
        s->fd = fd;
        s->ssl = SSL_new(c);
        s->peer = strdup(peer);
        s->host = host ? strdup(host) : NULL;
        s->ca_file = strdup(ctx->files[CA]);
        s->crl_file = ctx->files[CRL] ? strdup(ctx->files[CRL]) : NULL;
    }
    SSL_CTX_free(c);
    BIO *bio = BIO_new(ctx->bio_method);
    if (!s || !s->ssl || !bio || !s->peer || !s->ca_file || (host && !s->host) ||
        (ctx->files[CRL] && !s->crl_file)) {
        error_nomem(err);
        BIO_free(bio);
        tls_stream_destroy(s);
        return NULL;
    }
    BIO_set_data(bio, s);
    BIO_set_init(bio, 1);
    SSL_set_bio(s->ssl, bio, bio);
    SSL_set_verify(s->ssl, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, note_refused);
    if (!host) {
        SSL_set_accept_state(s->ssl);
        return s;
    }
    SSL_set_connect_state(s->ssl);
    if (!expect_host(s->ssl, host)) {
        error_set(err, VM_ERROR_USAGE, "%s is no host name", host);
        ERR_clear_error();
        tls_stream_destroy(s);
        return NULL;
    }
    return s;
}

void tls_stream_destroy(struct tls_stream *s)
{
    if (!s)
        return;
    SSL_free(s->ssl);
    error_free(s->read_error);
    free(s->host);
    free(s->peer);
    free(s->ca_file);
    free(s->crl_file);
    free(s->peer_name);
    pthread_mutex_destroy(&s->lock);
    free(s);
}

/* ---- Errors ---- */

static int set_untrusted(struct tls_stream *s, long verify, struct vm_error **err)
{
    const char *names = s->refused_names, *date = s->refused_end;
    switch (verify) {
    case X509_V_ERR_CERT_HAS_EXPIRED:
        return error_set(err, VM_ERROR_DENIED,
                         "the certificate of %s has expired%s%s; issue a new one with "
                         "`vmmig pki issue`, or set the clocks right",
                         s->peer, *date ? " on " : "", date);
    case X509_V_ERR_CERT_NOT_YET_VALID:
        return error_set(err, VM_ERROR_DENIED,
                         "the certificate of %s is not valid yet; set the clocks of both hosts "
                         "right",
                         s->peer);
    case X509_V_ERR_HOSTNAME_MISMATCH:
    case X509_V_ERR_IP_ADDRESS_MISMATCH:
        return error_set(err, VM_ERROR_DENIED,
                         "the certificate of %s is for %s, not for %s; dial a name that it has, or "
                         "issue one for this name",
                         s->peer, *names ? names : "no host at all", s->host ? s->host : "?");
    case X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT_LOCALLY:
    case X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT:
    case X509_V_ERR_UNABLE_TO_VERIFY_LEAF_SIGNATURE:
    case X509_V_ERR_SELF_SIGNED_CERT_IN_CHAIN:
    case X509_V_ERR_DEPTH_ZERO_SELF_SIGNED_CERT:
    case X509_V_ERR_CERT_SIGNATURE_FAILURE:
        return error_set(err, VM_ERROR_DENIED,
                         "the certificate of %s is of another CA than %s; both hosts need "
                         "certificates of the same cluster",
                         s->peer, s->ca_file);
    case X509_V_ERR_CERT_REVOKED:
        return error_set(err, VM_ERROR_DENIED,
                         "the certificate of %s was revoked (%s); `vmmig pki issue --replace` makes "
                         "another, if that host is to be trusted again",
                         s->peer, s->crl_file);
    case X509_V_ERR_UNABLE_TO_GET_CRL:
    case X509_V_ERR_CRL_SIGNATURE_FAILURE:
    case X509_V_ERR_CRL_HAS_EXPIRED:
    case X509_V_ERR_CRL_NOT_YET_VALID:
        return error_set(err, VM_ERROR_DENIED,
                         "whether the certificate of %s was revoked is not known: %s is no valid list "
                         "of the CA in %s (%s)",
                         s->peer, s->crl_file, s->ca_file, X509_verify_cert_error_string(verify));
    default:
        return error_set(err, VM_ERROR_DENIED, "the certificate of %s is not accepted: %s", s->peer,
                         X509_verify_cert_error_string(verify));
    }
}

/* What OpenSSL's reasons mean to a user; the peer's name goes before. */
static const struct {
    int reason;
    enum vm_error_kind kind;
    bool before_only; /* it means this during the handshake only */
    const char *text;
} reasons[] = {
    {SSL_R_PEER_DID_NOT_RETURN_A_CERTIFICATE, VM_ERROR_DENIED, true,
     " shows no certificate; give it one of this cluster's CA"},
    {SSL_R_TLSV13_ALERT_CERTIFICATE_REQUIRED, VM_ERROR_DENIED, false,
     " demands a certificate and this host showed none"},
    {SSL_R_TLSV1_ALERT_UNKNOWN_CA, VM_ERROR_DENIED, false,
     " does not accept this host's certificate: it is of another CA than its own"},
    {SSL_R_SSLV3_ALERT_CERTIFICATE_EXPIRED, VM_ERROR_DENIED, false,
     " does not accept this host's certificate: it has expired; issue a new one with "
     "`vmmig pki issue`, or set the clocks right"},
    {SSL_R_SSLV3_ALERT_CERTIFICATE_REVOKED, VM_ERROR_DENIED, false,
     " does not accept this host's certificate: it was revoked"},
    {SSL_R_SSLV3_ALERT_HANDSHAKE_FAILURE, VM_ERROR_DENIED, true,
     " has no certificates yet; `vmmig pki issue` makes them, and its log says which"},
    {SSL_R_SSLV3_ALERT_BAD_CERTIFICATE, VM_ERROR_DENIED, false,
     " does not accept this host's certificate; its log says why"},
    {SSL_R_SSLV3_ALERT_CERTIFICATE_UNKNOWN, VM_ERROR_DENIED, false,
     " does not accept this host's certificate; its log says why"},
    {SSL_R_SSLV3_ALERT_UNSUPPORTED_CERTIFICATE, VM_ERROR_DENIED, false,
     " does not accept this host's certificate: it is not for this use"},
    {SSL_R_TLSV1_ALERT_PROTOCOL_VERSION, VM_ERROR_VERSION, true, " does not speak TLS 1.3"},
    {SSL_R_UNSUPPORTED_PROTOCOL, VM_ERROR_VERSION, true,
     " speaks TLS 1.2 or older; TLS 1.3 is required"},
    {SSL_R_WRONG_VERSION_NUMBER, VM_ERROR_DENIED, true,
     " does not speak TLS; a plain connection is not accepted"},
    {SSL_R_HTTP_REQUEST, VM_ERROR_DENIED, true,
     " does not speak TLS; a plain connection is not accepted"},
    {SSL_R_UNEXPECTED_EOF_WHILE_READING, VM_ERROR_UNREACHABLE, false, " closed the connection"},
};

static int set_tls_error(struct tls_stream *s, struct vm_error **err)
{
    unsigned long code = ERR_peek_error();
    int reason = ERR_GET_LIB(code) == ERR_LIB_SSL ? ERR_GET_REASON(code) : 0;
    long verify = SSL_get_verify_result(s->ssl);
    /* What the verification met on its way may have been put before its own reason. */
    if (reason == SSL_R_CERTIFICATE_VERIFY_FAILED || (!s->established && verify != X509_V_OK)) {
        ERR_clear_error();
        return set_untrusted(s, verify, err);
    }
    for (size_t i = 0; i < sizeof(reasons) / sizeof(*reasons); i++) {
        if (reasons[i].reason != reason || (s->established && reasons[i].before_only))
            continue;
        ERR_clear_error();
        return error_set(err, reasons[i].kind, "%s%s", s->peer, reasons[i].text);
    }
    if (s->established)
        return error_set(err, VM_ERROR_UNREACHABLE,
                         "the connection to %s was damaged on the way (%s)", s->peer,
                         last_reason());
    return error_set(err, VM_ERROR_PROTOCOL, "%s broke the TLS protocol (%s)", s->peer,
                     last_reason());
}

/* What a failed SSL call means: TLS_AGAIN, 0 for close_notify, or -1 and an error. */
static int explain(struct tls_stream *s, int ret, struct vm_error **err)
{
    switch (SSL_get_error(s->ssl, ret)) {
    case SSL_ERROR_WANT_READ:
    case SSL_ERROR_WANT_WRITE:
        return TLS_AGAIN;
    case SSL_ERROR_ZERO_RETURN:
        return 0;
    case SSL_ERROR_SSL:
        return set_tls_error(s, err);
    default:
        ERR_clear_error();
        if (s->read_errno == ETIMEDOUT)
            return error_set(err, VM_ERROR_TIMEOUT, "%s does not answer any more", s->peer);
        if (s->read_errno && s->read_errno != ECONNRESET)
            return error_errno(err, s->read_errno, "cannot read from %s", s->peer);
        return error_set(err, VM_ERROR_UNREACHABLE, "%s closed the connection", s->peer);
    }
}

/* ---- Bytes ---- */

static int flush_locked(struct tls_stream *s, struct vm_error **err)
{
    while (s->out_begin < s->out_end) {
        ssize_t put = send(s->fd, s->out + s->out_begin, s->out_end - s->out_begin,
                           MSG_DONTWAIT | MSG_NOSIGNAL);
        if (put < 0 && errno == EINTR)
            continue;
        if (put < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
            return TLS_AGAIN;
        if (put < 0)
            return error_errno(err, errno, "cannot write to %s", s->peer);
        s->out_begin += (size_t)put;
        s->written += (uint64_t)put;
    }
    s->out_begin = s->out_end = 0;
    return 0;
}

int tls_flush(struct tls_stream *s, struct vm_error **err)
{
    SCOPE_LOCK(&s->lock);
    return flush_locked(s, err);
}

bool tls_has_output(struct tls_stream *s)
{
    SCOPE_LOCK(&s->lock);
    return s->out_begin < s->out_end;
}

uint64_t tls_bytes_written(struct tls_stream *s)
{
    SCOPE_LOCK(&s->lock);
    return s->written;
}

static int keep_peer_name(struct tls_stream *s, struct vm_error **err)
{
    char name[256] = "";
    X509 *cert = SSL_get1_peer_certificate(s->ssl);
    if (cert)
        list_names(cert, 1, name, sizeof(name));
    X509_free(cert);
    s->peer_name = strdup(name);
    return s->peer_name ? 0 : error_nomem(err);
}

int tls_handshake(struct tls_stream *s, struct vm_error **err)
{
    SCOPE_LOCK(&s->lock);
    ERR_clear_error();
    int ret = SSL_do_handshake(s->ssl);
    if (ret != 1) {
        ret = explain(s, ret, err);
        if (ret == -1)
            flush_locked(s, NULL); /* the alert; the handshake's own error is what counts */
        else if (flush_locked(s, err) == -1)
            return -1;
        return ret ? ret
                   : error_set(err, VM_ERROR_UNREACHABLE, "%s closed the connection", s->peer);
    }
    s->established = true;
    if (!s->peer_name && keep_peer_name(s, err) < 0)
        return -1;
    return flush_locked(s, err);
}

ssize_t tls_readv(struct tls_stream *s, const struct iovec *iov, int n, struct vm_error **err)
{
    SCOPE_LOCK(&s->lock);
    if (s->read_error)
        return error_propagate(err, steal_ptr(&s->read_error));
    size_t got = 0, offset = 0;
    ERR_clear_error();
    for (int i = 0; i < n && got < READ_STEP;) {
        size_t step;
        if (offset == iov[i].iov_len) {
            i++;
            offset = 0;
            continue;
        }
        int ret =
            SSL_read_ex(s->ssl, (char *)iov[i].iov_base + offset, iov[i].iov_len - offset, &step);
        if (ret == 1) {
            got += step;
            offset += step;
            continue;
        }
        struct vm_error *why = NULL;
        ret = explain(s, ret, &why);
        flush_locked(
            s, NULL); /* an alert or an answer to a key change; a broken pipe shows elsewhere */
        if (!got && ret == -1)
            return error_propagate(err, why);
        if (!got)
            return ret;
        s->read_error = why;
        break;
    }
    return (ssize_t)got;
}

/* The next record's worth of iov from (*index, *offset) on: in place, or gathered from small
 * pieces. */
static size_t next_record(struct tls_stream *s, const struct iovec *iov, int n, int *index,
                          size_t *offset, const uint8_t **ret_data)
{
    size_t gathered = 0;
    while (*index < n && gathered < RECORD_MAX) {
        const uint8_t *p = (const uint8_t *)iov[*index].iov_base + *offset;
        size_t left = iov[*index].iov_len - *offset;
        size_t step = left < RECORD_MAX - gathered ? left : RECORD_MAX - gathered;
        if (!gathered && step == RECORD_MAX) {
            *ret_data = p;
            *offset += step;
            return step;
        }
        if (step)
            memcpy(s->gather + gathered, p, step);
        gathered += step;
        *offset += step;
        if (*offset == iov[*index].iov_len) {
            (*index)++;
            *offset = 0;
        }
    }
    *ret_data = s->gather;
    return gathered;
}

static int update_key_locked(struct tls_stream *s, struct vm_error **err)
{
    s->records = 0;
    if (SSL_key_update(s->ssl, SSL_KEY_UPDATE_NOT_REQUESTED) != 1)
        return error_set(err, VM_ERROR_SYSTEM, "cannot change the key of %s (%s)", s->peer,
                         last_reason());
    return 0;
}

int tls_update_key(struct tls_stream *s, struct vm_error **err)
{
    SCOPE_LOCK(&s->lock);
    return update_key_locked(s, err);
}

ssize_t tls_writev(struct tls_stream *s, const struct iovec *iov, int n, struct vm_error **err)
{
    SCOPE_LOCK(&s->lock);
    int flushed = flush_locked(s, err);
    if (flushed < 0)
        return flushed;
    size_t taken = 0, offset = 0;
    int index = 0;
    ERR_clear_error();
    /* The buffer has room for every record begun here, so a write is never half done. */
    while (s->out_end < TLS_OUT_MAX) {
        const uint8_t *data;
        size_t len = next_record(s, iov, n, &index, &offset, &data), put;
        if (!len)
            break;
        if (++s->records > TLS_RECORDS_PER_KEY && update_key_locked(s, err) < 0)
            return -1;
        int ret = SSL_write_ex(s->ssl, data, len, &put);
        if (ret != 1 || put != len) {
            if (explain(s, ret, err) == -1)
                return -1;
            return error_set(err, VM_ERROR_UNREACHABLE, "the connection to %s is shut down",
                             s->peer);
        }
        taken += len;
    }
    return flush_locked(s, err) == -1 ? -1 : (ssize_t)taken;
}

int tls_close_notify(struct tls_stream *s, struct vm_error **err)
{
    SCOPE_LOCK(&s->lock);
    ERR_clear_error();
    int ret = SSL_shutdown(s->ssl);
    if (ret < 0 && explain(s, ret, err) == -1)
        return -1;
    return flush_locked(s, err);
}

const char *tls_peer_name(const struct tls_stream *s)
{
    return s->peer_name ? s->peer_name : "";
}

const char *tls_cipher(const struct tls_stream *s)
{
    return SSL_get_cipher_name(s->ssl);
}

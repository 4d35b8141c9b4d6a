/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tls: mutual TLS 1.3 over a connected socket, for migrate/conn.c alone. Nothing here waits.
 *
 * A context holds the credentials and reads the files again when they change. Files that are not
 * there (yet) are no error of the context: no stream can be made until they are. A stream is one
 * connection's state; its calls return TLS_AGAIN when the socket must become ready first (POLLIN,
 * and POLLOUT while tls_has_output). Encrypted bytes are gathered in a buffer of TLS_OUT_MAX, so
 * that many records leave with one system call; tls_flush pushes what the kernel did not take yet.
 *
 * Threads: one stream may be read by one thread and written by another; OpenSSL's state is guarded
 * by a mutex that is never held across a wait. A context may be used by all threads.
 */
#ifndef VMMIG_MIGRATE_TLS_H
#define VMMIG_MIGRATE_TLS_H

#include "base/error.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

#define TLS_AGAIN (-2)
#define TLS_OUT_MAX (128u << 10)
/* AES-GCM keys wear out after 2^24.5 records (RFC 8446, 5.5); ours are changed well before. */
#define TLS_RECORDS_PER_KEY (1u << 22)

struct tls_context;
struct tls_stream;

struct tls_files {
    const char *ca, *cert, *key; /* PEM */
    const char *crl;             /* PEM, certificates of the CA that were revoked; NULL: none was */
};

struct tls_context *tls_context_create(const struct tls_files *files, struct vm_error **err);
void tls_context_destroy(struct tls_context *ctx);
/*
 * Can streams be made? DENIED while the files are missing. *ret_end: when the certificate ends, as time(2) counts; one
 * that has ended is none of this call's errors.
 */
int tls_context_check(struct tls_context *ctx, int64_t *ret_end, struct vm_error **err);

/* A listening side that has no certificates says this and closes: the dialling side's error tells of it. */
extern const uint8_t tls_alert_no_certificate[7];

/*
 * host: whom the dialling side expects at the other end; NULL: the listening side. peer: how
 * messages name the other end. fd stays the caller's.
 */
struct tls_stream *tls_stream_create(struct tls_context *ctx, int fd, const char *host,
                                     const char *peer, struct vm_error **err);
void tls_stream_destroy(struct tls_stream *s);

/* 0 when done, TLS_AGAIN, or -1; then the alert that tells the peer was sent, if it could be. */
int tls_handshake(struct tls_stream *s, struct vm_error **err);
/* Bytes read into the pieces of iov; 0 after the peer's close_notify; TLS_AGAIN or -1. */
ssize_t tls_readv(struct tls_stream *s, const struct iovec *iov, int n, struct vm_error **err);
/* Bytes taken: a prefix of iov; TLS_AGAIN or -1. */
ssize_t tls_writev(struct tls_stream *s, const struct iovec *iov, int n, struct vm_error **err);
/* 0 when the kernel has everything, TLS_AGAIN or -1. */
int tls_flush(struct tls_stream *s, struct vm_error **err);
bool tls_has_output(struct tls_stream *s);
/* Queue a close_notify; flush it. */
int tls_close_notify(struct tls_stream *s, struct vm_error **err);
/* Change the key for what is written from here on. */
int tls_update_key(struct tls_stream *s, struct vm_error **err);
/* Encrypted bytes given to the kernel. */
uint64_t tls_bytes_written(struct tls_stream *s);
/* After the handshake; valid as long as the stream. */
const char *tls_peer_name(const struct tls_stream *s);
const char *tls_cipher(const struct tls_stream *s);

#endif

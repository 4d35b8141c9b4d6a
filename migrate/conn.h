/* SPDX-License-Identifier: Apache-2.0 */
/*
 * conn: one connection between two agents, mutual TLS 1.3 or, for tests, plain.
 *
 *     struct conn_context *ctx = conn_context_create(&settings, &err);      one per process
 *
 *     dialling:   conn = conn_dial(ctx, "host2", CONN_CONTROL, deadline, cancel, &err);
 *     listening:  fd = conn_listen("0.0.0.0", &err);
 *                 conn = conn_accept(ctx, accept4(fd, ...), deadline, cancel, &err);
 *                 switch (conn_purpose(conn)) ...
 *     both:       conn_read_full, conn_writev_full, ...; conn_shutdown; conn_destroy
 *
 * Plain or TLS. **Plain is spoken if and only if `insecure_plain` is set in the settings**, then
 * by every connection of that context, over any address; it is for tests and benchmarks, on
 * loopback and between network namespaces. Without the flag every connection is TLS: a plain peer
 * is refused on either side, and no code path falls back. TLS is 1.3 only. Both sides show a
 * certificate of the cluster's CA; the dialling side also verifies that the listener's certificate
 * names the host that it dialled (DNS name or IP address in the SAN). There is no session
 * resumption, so each connection verifies certificates anew. The files are read again when
 * they change; while the new ones do not load (half written), the old ones stay in use and a
 * warning is logged. A context may be made before there are files: with another warning; until they
 * exist each conn_dial and conn_accept is DENIED, and the peer that dials is told.
 *
 * With crl_file a peer whose certificate is in that list is DENIED.
 *
 * When conn_dial or conn_accept returns, both sides have verified each other: after TLS each sends
 * a preamble (docs/migration-wire.md) with the protocol's version and the connection's purpose.
 *
 * Threads. A context may be used by all. On one connection one thread may read while another
 * writes; conn_shutdown may come from any. conn_destroy only when no other call is under way.
 * Waiting: deadlines and cancel latches as in base/io.h. No call raises SIGPIPE.
 *
 * Errors, each with a line that says what to do:
 *
 *     UNREACHABLE  name unknown, no route, port closed, the peer closed or reset the connection
 *     TIMEOUT      no answer within the deadline, or TCP gave up (CONN_USER_TIMEOUT_MS)
 *     DENIED       certificate missing, expired, revoked, of another CA, not for that host; or a plain peer
 *     VERSION      the peer speaks another version of the protocol
 *     PROTOCOL     the peer is no vmmig agent
 *     USAGE        a malformed address, credentials missing
 *     CANCELLED    the latch was set
 *
 * Memory: under 512 KiB per TLS connection, none to speak of for a plain one.
 */
#ifndef VMMIG_MIGRATE_CONN_H
#define VMMIG_MIGRATE_CONN_H

#include "base/cleanup.h"
#include "base/error.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

#define CONN_DEFAULT_PORT "16550"
#define CONN_VERSION 1
/* Data that TCP cannot deliver for this long breaks the connection. Whoever uses it gives up, or makes another, when
 * it thinks fit: a migration survives the loss of its connections. */
#define CONN_USER_TIMEOUT_MS 30000

struct conn_context;
struct conn;

struct conn_settings {
    const char *ca_file;   /* PEM; certificates of the cluster's CA */
    const char *cert_file; /* PEM; this host's certificate, intermediates behind it */
    const char *key_file;  /* PEM */
    const char *crl_file;  /* PEM; the CA's list of revoked certificates; NULL: none */
    bool insecure_plain;   /* see above; excludes the files */
};

/* What the dialling side wants; the number is on the wire. */
enum conn_purpose {
    CONN_CONTROL = 1, /* protobuf messages */
    CONN_CHANNEL = 2, /* a data channel, migrate/channel.h */
    CONN_AGENT = 3,   /* the listening agent's own control protocol, proto/control.proto */
};

/* Reads the files. `settings` is copied. */
struct conn_context *conn_context_create(const struct conn_settings *settings,
                                         struct vm_error **err);
/* After the last of its connections. */
void conn_context_destroy(struct conn_context *ctx);
/*
 * What is wrong with this host's certificate, or soon will be: it is missing, has expired, or does within
 * CONN_CERTIFICATE_DAYS of `now` (as time(2) counts). "": nothing. *ret_end: when it ends; 0: there is none.
 */
#define CONN_CERTIFICATE_DAYS 30
#define CONN_COMPLAINT_MAX 512
void conn_context_complain(struct conn_context *ctx, int64_t now, char out[CONN_COMPLAINT_MAX], int64_t *ret_end);

/*
 * Connect, verify, exchange preambles. `address` is HOST, HOST:PORT, IPv4, IPv6, [IPv6]:PORT, or
 * unix:PATH (plain only). A name with several addresses is tried in order, the deadline shared.
 */
struct conn *conn_dial(struct conn_context *ctx, const char *address, enum conn_purpose purpose,
                       int64_t deadline_ns, int cancel_fd, struct vm_error **err);
/* The same over a connected stream socket that already exists. Takes fd over, also on failure. */
struct conn *conn_dial_fd(struct conn_context *ctx, int fd, const char *host,
                          enum conn_purpose purpose, int64_t deadline_ns, int cancel_fd,
                          struct vm_error **err);
/* The listening side of it, for a socket from accept(2). Takes fd over, also on failure. */
struct conn *conn_accept(struct conn_context *ctx, int fd, int64_t deadline_ns, int cancel_fd,
                         struct vm_error **err);
/*
 * A listening, non-blocking socket. `address` as for conn_dial; port 0 lets the kernel choose.
 * "[::]" listens on IPv4 as well.
 */
int conn_listen(const char *address, struct vm_error **err);

enum conn_purpose conn_purpose(const struct conn *conn);
/* First DNS name, else IP address, of the peer's certificate; "" on a plain connection. */
const char *conn_peer_name(const struct conn *conn);
/* "192.0.2.7:16550", "[2001:db8::7]:16550" or "unix"; for messages. */
const char *conn_peer_address(const struct conn *conn);
/* "TLS_AES_128_GCM_SHA256", or "plain". */
const char *conn_cipher(const struct conn *conn);

/* Between 1 and n bytes; 0 when the peer ended its half in good order (conn_shutdown_write). */
ssize_t conn_read_some(struct conn *conn, void *out, size_t n, int64_t deadline_ns, int cancel_fd,
                       struct vm_error **err);
/* Exactly n bytes; an end before that is UNREACHABLE. */
int conn_read_full(struct conn *conn, void *out, size_t n, int64_t deadline_ns, int cancel_fd,
                   struct vm_error **err);
/* All of it is given to the kernel. After a failure, TIMEOUT too, part may have been: shut down. */
int conn_write_full(struct conn *conn, const void *data, size_t n, int64_t deadline_ns,
                    int cancel_fd, struct vm_error **err);
/* All of iov, which is consumed (modified). */
int conn_writev_full(struct conn *conn, struct iovec *iov, int n, int64_t deadline_ns,
                     int cancel_fd, struct vm_error **err);

/*
 * Without waiting, for a thread with a poll of its own:
 *
 *     CONN_AGAIN        nothing now; poll conn_fd() for conn_poll_events()
 *     otherwise         as above
 *
 * conn_try_writev takes a prefix of iov (which it does not modify) and returns its length; some
 * of it may wait inside: until conn_try_flush has returned 0, conn_poll_events asks for POLLOUT.
 * Always try to read before polling: decrypted bytes may wait inside, too.
 */
#define CONN_AGAIN (-2)
ssize_t conn_try_read(struct conn *conn, void *out, size_t n, struct vm_error **err);
/* Into several pieces; the bytes read may end within any of them. */
ssize_t conn_try_readv(struct conn *conn, const struct iovec *iov, int n, struct vm_error **err);
ssize_t conn_try_writev(struct conn *conn, const struct iovec *iov, int n, struct vm_error **err);
int conn_try_flush(struct conn *conn, struct vm_error **err);
int conn_fd(const struct conn *conn);
/* POLLIN, and POLLOUT if want_write or bytes wait inside. */
short conn_poll_events(const struct conn *conn, bool want_write);

/*
 * Bytes that have left this host for good, as far as the kernel knows: given to it and confirmed by
 * the peer's kernel. It grows as long as the link is alive, however slow.
 */
uint64_t conn_bytes_drained(const struct conn *conn);
/* Bytes given to the kernel and not yet confirmed by the peer's. */
uint64_t conn_bytes_queued(const struct conn *conn);
/* The least round trip that the kernel has seen of late; 0 where it does not measure one. */
int64_t conn_rtt_ns(const struct conn *conn);
/*
 * Time since the connection was made in which the link carried bytes, or was to: they waited for nothing at the peer,
 * whose kernel had room for more. Counted in ticks of the kernel (1-10 ms). Where it does not count, all time.
 */
int64_t conn_carrying_ns(const struct conn *conn);

/*
 * Pass everything on between the connection and a stream socket, both ways, until either end closes its own: 0. What
 * came before that arrives.
 */
int conn_relay(struct conn *conn, int fd, int cancel_fd, struct vm_error **err);

/* No more will be written; the peer reads up to here, then 0. Reading goes on. */
int conn_shutdown_write(struct conn *conn, int64_t deadline_ns, int cancel_fd,
                        struct vm_error **err);
/* Break it at once, from any thread: waits end, later calls fail with UNREACHABLE. */
void conn_shutdown(struct conn *conn);
void conn_destroy(struct conn *conn);

DEFINE_CLEANUP(conn, struct conn *, conn_destroy)
DEFINE_CLEANUP(conn_context, struct conn_context *, conn_context_destroy)

#endif

/* SPDX-License-Identifier: Apache-2.0 */
#include "migrate/conn.h"

#include "base/clock.h"
#include "base/fault.h"
#include "base/io.h"
#include "base/log.h"
#include "migrate/address.h"
#include "migrate/tls.h"

#include <errno.h>
#include <limits.h>
#include <linux/sockios.h>
#include <netinet/in.h>
#include <linux/tcp.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <time.h>

_Static_assert(CONN_AGAIN == TLS_AGAIN, "one value for both");

enum {
    PREAMBLE_SIZE = 8,
    STATUS_OK = 0,
    STATUS_VERSION = 1,
    STATUS_REFUSED = 2,
    STATUS_NEEDS_TLS = 3,
    LINGER_MS = 1000,
    SECONDS_PER_DAY = 86400,
    RELAY_SIZE = 16384,
    KEEPALIVE_IDLE_S = 10,
    KEEPALIVE_INTERVAL_S = 5,
    KEEPALIVE_COUNT = 4,
    NOT_SENT_MAX = 512 << 10, /* what waits unsent in the kernel; more would only age there */
};

static const char preamble_magic[4] = "VMMG";

struct conn_context {
    struct tls_context *tls; /* NULL: plain */
};

struct conn {
    int fd;
    struct tls_stream *tls; /* NULL: plain */
    enum conn_purpose purpose;
    atomic_bool shut;
    atomic_uint_fast64_t plain_written;
    char address[ADDRESS_TEXT_MAX];
};

struct conn_context *conn_context_create(const struct conn_settings *settings,
                                         struct vm_error **err)
{
    bool files = settings->ca_file || settings->cert_file || settings->key_file || settings->crl_file;
    if (settings->insecure_plain && files) {
        error_set(err, VM_ERROR_USAGE, "insecure-plain and certificates exclude each other");
        return NULL;
    }
    if (!settings->insecure_plain &&
        (!settings->ca_file || !settings->cert_file || !settings->key_file)) {
        error_set(err, VM_ERROR_USAGE,
                  "CA, certificate and key are needed; `vmmig pki` makes them");
        return NULL;
    }
    struct conn_context *ctx = calloc(1, sizeof(*ctx));
    if (!ctx) {
        error_nomem(err);
        return NULL;
    }
    if (settings->insecure_plain) {
        log_warn("connections between agents are NOT ENCRYPTED (insecure-plain)");
        return ctx;
    }
    struct tls_files names = {settings->ca_file, settings->cert_file, settings->key_file,
                              settings->crl_file};
    ctx->tls = tls_context_create(&names, err);
    if (!ctx->tls) {
        free(ctx);
        return NULL;
    }
    return ctx;
}

void conn_context_destroy(struct conn_context *ctx)
{
    if (!ctx)
        return;
    tls_context_destroy(ctx->tls);
    free(ctx);
}

void conn_context_complain(struct conn_context *ctx, int64_t now, char out[CONN_COMPLAINT_MAX], int64_t *ret_end)
{
    cleanup_error struct vm_error *err = NULL;
    *out = 0;
    *ret_end = 0;
    if (!ctx->tls)
        return;
    if (tls_context_check(ctx->tls, ret_end, &err) < 0) {
        snprintf(out, CONN_COMPLAINT_MAX, "%s", error_message(err));
        return;
    }
    if (*ret_end - now > CONN_CERTIFICATE_DAYS * SECONDS_PER_DAY)
        return;
    char day[32] = "";
    time_t end = (time_t)*ret_end;
    struct tm tm;
    strftime(day, sizeof(day), "%Y-%m-%d", gmtime_r(&end, &tm));
    snprintf(out, CONN_COMPLAINT_MAX, "this host's certificate %s on %s; `vmmig pki issue --replace` makes another",
             *ret_end > now ? "ends" : "has expired", day);
}

/* ---- Sockets ---- */

static int set_option(int fd, int level, int option, int value, struct vm_error **err)
{
    if (setsockopt(fd, level, option, &value, sizeof(value)) < 0)
        return error_errno(err, errno, "cannot set socket option %d", option);
    return 0;
}

static int set_tcp_options(int fd, struct vm_error **err)
{
    int domain = AF_UNSPEC;
    socklen_t len = sizeof(domain);
    getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &len);
    if (domain != AF_INET && domain != AF_INET6)
        return 0;
    static const struct {
        int level, option, value;
    } options[] = {
        {IPPROTO_TCP, TCP_NODELAY, 1},
        {SOL_SOCKET, SO_KEEPALIVE, 1},
        {IPPROTO_TCP, TCP_KEEPIDLE, KEEPALIVE_IDLE_S},
        {IPPROTO_TCP, TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S},
        {IPPROTO_TCP, TCP_KEEPCNT, KEEPALIVE_COUNT},
        {IPPROTO_TCP, TCP_USER_TIMEOUT, CONN_USER_TIMEOUT_MS},
        {IPPROTO_TCP, TCP_NOTSENT_LOWAT, NOT_SENT_MAX},
    };
    for (size_t i = 0; i < sizeof(options) / sizeof(*options); i++)
        if (set_option(fd, options[i].level, options[i].option, options[i].value, err) < 0)
            return -1;
    return 0;
}

/* Takes fd over, also on failure. */
static struct conn *new_conn(struct conn_context *ctx, int fd, const char *host,
                             struct vm_error **err)
{
    struct conn *conn = calloc(1, sizeof(*conn));
    if (!conn) {
        close(fd);
        error_nomem(err);
        return NULL;
    }
    conn->fd = fd;
    address_of_peer(fd, conn->address);
    if (set_tcp_options(fd, err) == 0) {
        if (!ctx->tls)
            return conn;
        conn->tls = tls_stream_create(ctx->tls, fd, host, host ? host : conn->address, err);
        if (conn->tls)
            return conn;
    }
    conn_destroy(conn);
    return NULL;
}

void conn_destroy(struct conn *conn)
{
    if (!conn)
        return;
    tls_stream_destroy(conn->tls);
    close(conn->fd);
    free(conn);
}

void conn_shutdown(struct conn *conn)
{
    atomic_store(&conn->shut, true);
    shutdown(conn->fd, SHUT_RDWR);
}

enum conn_purpose conn_purpose(const struct conn *conn)
{
    return conn->purpose;
}

const char *conn_peer_name(const struct conn *conn)
{
    return conn->tls ? tls_peer_name(conn->tls) : "";
}

const char *conn_peer_address(const struct conn *conn)
{
    return conn->address;
}

const char *conn_cipher(const struct conn *conn)
{
    return conn->tls ? tls_cipher(conn->tls) : "plain";
}

int conn_fd(const struct conn *conn)
{
    return conn->fd;
}

uint64_t conn_bytes_queued(const struct conn *conn)
{
    int queued = 0;
    return ioctl(conn->fd, SIOCOUTQ, &queued) < 0 || queued < 0 ? 0 : (uint64_t)queued;
}

uint64_t conn_bytes_drained(const struct conn *conn)
{
    uint64_t queued = conn_bytes_queued(conn);
    uint64_t written = conn->tls ? tls_bytes_written(conn->tls) : atomic_load(&conn->plain_written);
    return written > queued ? written - queued : 0;
}

int64_t conn_rtt_ns(const struct conn *conn)
{
    struct tcp_info info = {0};
    socklen_t len = sizeof(info);
    if (getsockopt(conn->fd, IPPROTO_TCP, TCP_INFO, &info, &len) < 0 || info.tcpi_rtt == UINT32_MAX)
        return 0;
    uint32_t rtt_us = info.tcpi_rtt;
    if (len > offsetof(struct tcp_info, tcpi_min_rtt) && info.tcpi_min_rtt < rtt_us)
        rtt_us = info.tcpi_min_rtt;
    return rtt_us * NSEC_PER_USEC;
}

int64_t conn_carrying_ns(const struct conn *conn)
{
    struct tcp_info info = {0};
    socklen_t len = sizeof(info);
    if (getsockopt(conn->fd, IPPROTO_TCP, TCP_INFO, &info, &len) < 0 ||
        len < offsetof(struct tcp_info, tcpi_sndbuf_limited))
        return clock_mono_ns();
    return (int64_t)(info.tcpi_busy_time - info.tcpi_rwnd_limited) * NSEC_PER_USEC;
}

/* ---- Bytes, without waiting ---- */

static int check_shut(struct conn *conn, struct vm_error **err)
{
    if (!atomic_load(&conn->shut))
        return 0;
    return error_set(err, VM_ERROR_UNREACHABLE, "the connection to %s is shut down", conn->address);
}

static struct msghdr plain_message(const struct iovec *iov, int n)
{
    return (struct msghdr){.msg_iov = (struct iovec *)(uintptr_t)iov,
                           .msg_iovlen = (size_t)(n < IOV_MAX ? n : IOV_MAX)};
}

/* The outcome of a plain send or recv that failed: CONN_AGAIN, or -1 and an error. */
static int plain_failure(struct conn *conn, int errnum, const char *what, struct vm_error **err)
{
    if (errnum == EAGAIN || errnum == EWOULDBLOCK)
        return CONN_AGAIN;
    if (errnum == ECONNRESET || errnum == EPIPE)
        return error_set(err, VM_ERROR_UNREACHABLE, "%s closed the connection", conn->address);
    if (errnum == ETIMEDOUT)
        return error_set(err, VM_ERROR_TIMEOUT, "%s does not answer any more", conn->address);
    return error_errno(err, errnum, "cannot %s %s", what, conn->address);
}

ssize_t conn_try_readv(struct conn *conn, const struct iovec *iov, int n, struct vm_error **err)
{
    if (check_shut(conn, err) < 0)
        return -1;
    if (FAULT("conn.read") == FAULT_ERROR)
        return error_errno(err, fault_errno(), "cannot read from %s", conn->address);
    if (conn->tls)
        return tls_readv(conn->tls, iov, n, err);
    struct msghdr msg = plain_message(iov, n);
    ssize_t got;
    do {
        got = recvmsg(conn->fd, &msg, MSG_DONTWAIT);
    } while (got < 0 && errno == EINTR);
    return got >= 0 ? got : plain_failure(conn, errno, "read from", err);
}

ssize_t conn_try_read(struct conn *conn, void *out, size_t n, struct vm_error **err)
{
    struct iovec iov = {out, n};
    return conn_try_readv(conn, &iov, 1, err);
}

ssize_t conn_try_writev(struct conn *conn, const struct iovec *iov, int n, struct vm_error **err)
{
    if (check_shut(conn, err) < 0)
        return -1;
    if (FAULT("conn.write") == FAULT_ERROR)
        return error_errno(err, fault_errno(), "cannot write to %s", conn->address);
    if (conn->tls)
        return tls_writev(conn->tls, iov, n, err);
    struct msghdr msg = plain_message(iov, n);
    ssize_t put;
    do {
        put = sendmsg(conn->fd, &msg, MSG_DONTWAIT | MSG_NOSIGNAL);
    } while (put < 0 && errno == EINTR);
    if (put < 0)
        return plain_failure(conn, errno, "write to", err);
    atomic_fetch_add(&conn->plain_written, (uint64_t)put);
    return put;
}

int conn_try_flush(struct conn *conn, struct vm_error **err)
{
    return conn->tls ? tls_flush(conn->tls, err) : 0;
}

short conn_poll_events(const struct conn *conn, bool want_write)
{
    bool out = want_write || (conn->tls && tls_has_output(conn->tls));
    return (short)(POLLIN | (out ? POLLOUT : 0));
}

/* ---- Bytes, waiting ---- */

ssize_t conn_read_some(struct conn *conn, void *out, size_t n, int64_t deadline_ns, int cancel_fd,
                       struct vm_error **err)
{
    for (;;) {
        ssize_t got = conn_try_read(conn, out, n, err);
        if (got != CONN_AGAIN)
            return got;
        if (io_wait(conn->fd, POLLIN, deadline_ns, cancel_fd, err) < 0)
            return error_wrap(err, "%s", conn->address);
    }
}

int conn_read_full(struct conn *conn, void *out, size_t n, int64_t deadline_ns, int cancel_fd,
                   struct vm_error **err)
{
    char *p = out;
    while (n) {
        ssize_t got = conn_read_some(conn, p, n, deadline_ns, cancel_fd, err);
        if (got < 0)
            return -1;
        if (got == 0)
            return error_set(err, VM_ERROR_UNREACHABLE, "%s closed the connection", conn->address);
        p += got;
        n -= (size_t)got;
    }
    return 0;
}

int conn_write_full(struct conn *conn, const void *data, size_t n, int64_t deadline_ns,
                    int cancel_fd, struct vm_error **err)
{
    struct iovec iov = {(void *)(uintptr_t)data, n};
    return conn_writev_full(conn, &iov, 1, deadline_ns, cancel_fd, err);
}

/* Drop the first `taken` bytes of *iov. */
static void advance(struct iovec **iov, int *n, size_t taken)
{
    while (*n && taken >= (*iov)->iov_len) {
        taken -= (*iov)->iov_len;
        (*iov)++;
        (*n)--;
    }
    if (*n) {
        (*iov)->iov_base = (char *)(*iov)->iov_base + taken;
        (*iov)->iov_len -= taken;
    }
}

int conn_writev_full(struct conn *conn, struct iovec *iov, int n, int64_t deadline_ns,
                     int cancel_fd, struct vm_error **err)
{
    for (;;) {
        advance(&iov, &n, 0);
        ssize_t taken = n ? conn_try_writev(conn, iov, n, err) : conn_try_flush(conn, err);
        if (taken == -1)
            return -1;
        if (taken == CONN_AGAIN) {
            if (io_wait(conn->fd, POLLOUT, deadline_ns, cancel_fd, err) < 0)
                return error_wrap(err, "%s", conn->address);
        } else if (!n) {
            return 0;
        } else {
            advance(&iov, &n, (size_t)taken);
        }
    }
}

int conn_shutdown_write(struct conn *conn, int64_t deadline_ns, int cancel_fd,
                        struct vm_error **err)
{
    if (conn->tls) {
        if (tls_close_notify(conn->tls, err) == -1 ||
            conn_writev_full(conn, NULL, 0, deadline_ns, cancel_fd, err) < 0)
            return -1;
    }
    if (shutdown(conn->fd, SHUT_WR) < 0)
        return error_errno(err, errno, "cannot shut down the connection to %s", conn->address);
    return 0;
}

/* ---- Passing on ---- */

/* Bytes on their way from one end to the other. */
struct passage {
    size_t begin, end;
    bool closed; /* by the end that they come from */
    uint8_t bytes[RELAY_SIZE];
};

static bool is_empty(const struct passage *p)
{
    return p->begin == p->end;
}

/* `got`: what a read returned. */
static void fill(struct passage *p, ssize_t got)
{
    p->begin = 0;
    p->end = got > 0 ? (size_t)got : 0;
    p->closed = got == 0;
}

/* What the peer has sent, as far as the socket takes it. */
static int relay_in(struct conn *conn, int fd, struct passage *p, struct vm_error **err)
{
    for (;;) {
        if (is_empty(p)) {
            ssize_t got = p->closed ? CONN_AGAIN : conn_try_read(conn, p->bytes, sizeof(p->bytes), err);
            if (got == -1)
                return -1;
            if (got == CONN_AGAIN)
                return 0;
            fill(p, got);
            continue;
        }
        ssize_t put = send(fd, p->bytes + p->begin, p->end - p->begin, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (put < 0 && (errno == EAGAIN || errno == EINTR))
            return 0;
        if (put < 0) { /* nobody reads there any more */
            fill(p, 0);
            return 0;
        }
        p->begin += (size_t)put;
    }
}

/* And the other way. */
static int relay_out(struct conn *conn, int fd, struct passage *p, struct vm_error **err)
{
    for (;;) {
        if (is_empty(p)) {
            ssize_t got = p->closed ? -1 : recv(fd, p->bytes, sizeof(p->bytes), MSG_DONTWAIT);
            if (got < 0 && (p->closed || errno == EAGAIN || errno == EINTR))
                return 0;
            fill(p, got < 0 ? 0 : got);
            continue;
        }
        struct iovec iov = {p->bytes + p->begin, p->end - p->begin};
        ssize_t taken = conn_try_writev(conn, &iov, 1, err);
        if (taken < 0)
            return taken == CONN_AGAIN ? 0 : -1;
        p->begin += (size_t)taken;
    }
}

static int wait_for_either(struct conn *conn, int fd, const struct passage *in, const struct passage *out,
                           int cancel_fd, struct vm_error **err)
{
    struct pollfd fds[] = {
        {conn->fd, conn_poll_events(conn, !is_empty(out)), 0},
        {fd, (short)((is_empty(out) ? POLLIN : 0) | (is_empty(in) ? 0 : POLLOUT)), 0},
        {cancel_fd, POLLIN, 0},
    };
    if (!is_empty(in))
        fds[0].events &= ~POLLIN; /* there is no room for more */
    if (poll(fds, 3, -1) < 0 && errno != EINTR)
        return error_errno(err, errno, "poll");
    return fds[2].revents ? error_set(err, VM_ERROR_CANCELLED, "cancelled") : 0;
}

int conn_relay(struct conn *conn, int fd, int cancel_fd, struct vm_error **err)
{
    cleanup_free struct passage *in = calloc(1, sizeof(*in)), *out = calloc(1, sizeof(*out));
    if (!in || !out)
        return error_nomem(err);
    for (;;) {
        if (relay_in(conn, fd, in, err) < 0 || relay_out(conn, fd, out, err) < 0)
            return -1;
        if (in->closed && is_empty(in))
            return 0;
        if (out->closed && is_empty(out))
            return conn_shutdown_write(conn, clock_mono_ns() + LINGER_MS * NSEC_PER_MSEC, cancel_fd, err);
        if (wait_for_either(conn, fd, in, out, cancel_fd, err) < 0)
            return -1;
    }
}

/* ---- Becoming a connection ---- */

static int shake_hands(struct conn *conn, int64_t deadline_ns, int cancel_fd, struct vm_error **err)
{
    if (!conn->tls)
        return 0;
    for (;;) {
        int ret = tls_handshake(conn->tls, err);
        if (ret != TLS_AGAIN)
            return ret;
        if (io_wait(conn->fd, conn_poll_events(conn, false), deadline_ns, cancel_fd, err) < 0)
            return error_wrap(err, "%s", conn->address);
    }
}

static int write_preamble(struct conn *conn, uint8_t word, int64_t deadline_ns, int cancel_fd,
                          struct vm_error **err)
{
    uint8_t out[PREAMBLE_SIZE] = {0};
    memcpy(out, preamble_magic, sizeof(preamble_magic));
    out[4] = CONN_VERSION;
    out[5] = word;
    return conn_write_full(conn, out, sizeof(out), deadline_ns, cancel_fd, err);
}

/* An ill-matched pair of settings is told apart from a stranger. */
static int set_no_preamble(struct conn *conn, const uint8_t *in, struct vm_error **err)
{
    bool looks_like_tls = (in[0] == 0x15 || in[0] == 0x16) && in[1] == 0x03;
    if (looks_like_tls && !conn->tls)
        return error_set(err, VM_ERROR_DENIED,
                         "%s speaks TLS and this side is set to insecure-plain; set both alike",
                         conn->address);
    return error_set(err, VM_ERROR_PROTOCOL, "%s is no vmmig agent", conn->address);
}

static int check_preamble(struct conn *conn, const uint8_t *in, struct vm_error **err)
{
    if (memcmp(in, preamble_magic, sizeof(preamble_magic)))
        return set_no_preamble(conn, in, err);
    if (in[4] != CONN_VERSION)
        return error_set(err, VM_ERROR_VERSION,
                         "%s speaks version %u of the protocol and this side version %u; run the "
                         "same release of vmmig on both hosts",
                         conn->address, in[4], CONN_VERSION);
    return 0;
}

static int read_answer(struct conn *conn, int64_t deadline_ns, int cancel_fd, struct vm_error **err)
{
    uint8_t in[PREAMBLE_SIZE];
    if (conn_read_full(conn, in, sizeof(in), deadline_ns, cancel_fd, err) < 0 ||
        check_preamble(conn, in, err) < 0)
        return -1;
    if (in[5] == STATUS_NEEDS_TLS)
        return error_set(err, VM_ERROR_DENIED,
                         "%s speaks TLS and this side is set to insecure-plain; set both alike",
                         conn->address);
    if (in[5] == STATUS_VERSION)
        return error_set(err, VM_ERROR_VERSION, "%s does not speak version %u of the protocol",
                         conn->address, CONN_VERSION);
    if (in[5] != STATUS_OK)
        return error_set(err, VM_ERROR_DENIED, "%s refused the connection", conn->address);
    return 0;
}

static int dial_handshake(struct conn *conn, enum conn_purpose purpose, int64_t deadline_ns,
                          int cancel_fd, struct vm_error **err)
{
    conn->purpose = purpose;
    if (shake_hands(conn, deadline_ns, cancel_fd, err) < 0)
        return -1;
    /* A refusal of our certificate comes as an alert after our side of the handshake; it says more
     * than the broken pipe that a write may meet. */
    struct vm_error *unsent = NULL;
    write_preamble(conn, (uint8_t)purpose, deadline_ns, cancel_fd, &unsent);
    int ret = read_answer(conn, deadline_ns, cancel_fd, err);
    error_free(unsent);
    return ret;
}

struct conn *conn_dial_fd(struct conn_context *ctx, int fd, const char *host,
                          enum conn_purpose purpose, int64_t deadline_ns, int cancel_fd,
                          struct vm_error **err)
{
    CLEANUP(conn) struct conn *conn = new_conn(ctx, fd, host, err);
    if (!conn || dial_handshake(conn, purpose, deadline_ns, cancel_fd, err) < 0)
        return NULL;
    return steal_ptr(&conn);
}

struct conn *conn_dial(struct conn_context *ctx, const char *address, enum conn_purpose purpose,
                       int64_t deadline_ns, int cancel_fd, struct vm_error **err)
{
    struct address a;
    if (address_parse(address, CONN_DEFAULT_PORT, &a, err) < 0)
        return NULL;
    if (a.is_unix && ctx->tls) {
        error_set(err, VM_ERROR_DENIED,
                  "%s: a Unix socket is a plain connection, which needs insecure-plain", address);
        return NULL;
    }
    if (FAULT("conn.dial") == FAULT_ERROR) {
        error_errno(err, fault_errno(), "cannot connect to %s", address);
        return NULL;
    }
    int fd = address_connect(&a, deadline_ns, cancel_fd, err);
    if (fd < 0)
        return NULL;
    return conn_dial_fd(ctx, fd, a.host, purpose, deadline_ns, cancel_fd, err);
}

/*
 * Before a refused connection is closed: let the peer read why. Closing while it still sends would
 * reset the connection, and the reset overtakes the alert.
 */
static void linger(int fd, int cancel_fd)
{
    int64_t deadline = clock_mono_ns() + LINGER_MS * NSEC_PER_MSEC;
    char waste[4096];
    size_t drained = 0;
    shutdown(fd, SHUT_WR);
    while (drained < (64 << 10)) {
        ssize_t got = io_read_some(fd, waste, sizeof(waste), deadline, cancel_fd, NULL);
        if (got <= 0)
            return;
        drained += (size_t)got;
    }
}

/* A plain peer of our own kind is told; its preamble begins as no TLS record does. */
static int refuse_plain(struct conn *conn, int64_t deadline_ns, int cancel_fd,
                        struct vm_error **err)
{
    char first = 0;
    if (io_wait(conn->fd, POLLIN, deadline_ns, cancel_fd, err) < 0)
        return error_wrap(err, "%s", conn->address);
    if (recv(conn->fd, &first, 1, MSG_PEEK | MSG_DONTWAIT) != 1 || first != *preamble_magic)
        return 0;
    uint8_t out[PREAMBLE_SIZE] = {[4] = CONN_VERSION, [5] = STATUS_NEEDS_TLS};
    memcpy(out, preamble_magic, sizeof(preamble_magic));
    io_write_full(conn->fd, out, sizeof(out), deadline_ns, cancel_fd, NULL);
    return error_set(err, VM_ERROR_DENIED,
                     "%s does not speak TLS; a plain connection is not accepted", conn->address);
}

static int accept_handshake(struct conn *conn, int64_t deadline_ns, int cancel_fd,
                            struct vm_error **err)
{
    uint8_t in[PREAMBLE_SIZE];
    if (conn->tls && refuse_plain(conn, deadline_ns, cancel_fd, err) < 0)
        return -1;
    if (shake_hands(conn, deadline_ns, cancel_fd, err) < 0 ||
        conn_read_full(conn, in, sizeof(in), deadline_ns, cancel_fd, err) < 0)
        return -1;
    if (check_preamble(conn, in, err) < 0) {
        bool version = !memcmp(in, preamble_magic, sizeof(preamble_magic));
        write_preamble(conn, version ? STATUS_VERSION : STATUS_REFUSED, deadline_ns, cancel_fd,
                       NULL);
        return -1;
    }
    if (in[5] < CONN_CONTROL || in[5] > CONN_AGENT) {
        write_preamble(conn, STATUS_REFUSED, deadline_ns, cancel_fd, NULL);
        return error_set(err, VM_ERROR_PROTOCOL, "%s opened a connection of unknown purpose %u",
                         conn->address, in[5]);
    }
    conn->purpose = in[5];
    return write_preamble(conn, STATUS_OK, deadline_ns, cancel_fd, err);
}

struct conn *conn_accept(struct conn_context *ctx, int fd, int64_t deadline_ns, int cancel_fd,
                         struct vm_error **err)
{
    int64_t end;
    if (ctx->tls && tls_context_check(ctx->tls, &end, err) < 0) {
        io_write_full(fd, tls_alert_no_certificate, sizeof(tls_alert_no_certificate), deadline_ns,
                      cancel_fd, NULL);
        linger(fd, cancel_fd);
        close(fd);
        return NULL;
    }
    CLEANUP(conn) struct conn *conn = new_conn(ctx, fd, NULL, err);
    if (!conn)
        return NULL;
    if (accept_handshake(conn, deadline_ns, cancel_fd, err) < 0) {
        linger(conn->fd, cancel_fd);
        return NULL;
    }
    return steal_ptr(&conn);
}

int conn_listen(const char *address, struct vm_error **err)
{
    struct address a;
    if (address_parse(address, CONN_DEFAULT_PORT, &a, err) < 0)
        return -1;
    return address_listen(&a, err);
}

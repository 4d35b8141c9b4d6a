/* SPDX-License-Identifier: Apache-2.0 */
#include "migrate/address.h"

#include "base/cleanup.h"
#include "base/clock.h"
#include "base/io.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netdb.h>
#include <poll.h>
#include <stdatomic.h>
#include <stddef.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/un.h>

enum { LISTEN_BACKLOG = 128 };

/* ---- Parsing ---- */

static int set_malformed(const char *text, struct vm_error **err)
{
    return error_set(err, VM_ERROR_USAGE,
                     "\"%s\" is no address; write HOST, HOST:PORT, IPv4, IPv6 or [IPv6]:PORT",
                     text);
}

static bool valid_port(const char *port)
{
    size_t n = strlen(port);
    return n >= 1 && n <= 5 && strspn(port, "0123456789") == n && atoi(port) <= 65535;
}

static bool valid_host(const char *host)
{
    struct in6_addr binary;
    if (strchr(host, ':'))
        return inet_pton(AF_INET6, host, &binary) == 1;
    return *host && !host[strspn(host, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
                                       "0123456789.-_")];
}

int address_parse(const char *text, const char *default_port, struct address *ret_address,
                  struct vm_error **err)
{
    struct address a = {.is_unix = !strncmp(text, "unix:", 5)};
    const char *host = text, *end = text + strlen(text), *port = default_port;
    const char *colon = strchr(text, ':');
    if (a.is_unix) {
        host += 5;
        if ((size_t)(end - host) >= sizeof(((struct sockaddr_un *)0)->sun_path) || host == end)
            return error_set(err, VM_ERROR_USAGE, "\"%s\" is no path of a socket", text);
    } else if (*text == '[') {
        host++;
        end = strchr(host, ']');
        if (!end || (end[1] && end[1] != ':'))
            return set_malformed(text, err);
        if (end[1])
            port = end + 2;
    } else if (colon && !strchr(colon + 1, ':')) {
        end = colon;
        port = colon + 1;
    }
    if ((size_t)(end - host) >= sizeof(a.host) || !valid_port(port))
        return set_malformed(text, err);
    memcpy(a.host, host, (size_t)(end - host));
    memcpy(a.port, port, strlen(port));
    if (!a.is_unix && !valid_host(a.host))
        return set_malformed(text, err);
    *ret_address = a;
    return 0;
}

void address_of_peer(int fd, char ret_text[ADDRESS_TEXT_MAX])
{
    struct sockaddr_storage peer = {0};
    socklen_t len = sizeof(peer);
    char host[INET6_ADDRSTRLEN + 16] = "", port[8] = "";
    const char *shown = host;
    if (getpeername(fd, (struct sockaddr *)&peer, &len) < 0)
        snprintf(ret_text, ADDRESS_TEXT_MAX, "a closed connection");
    else if (peer.ss_family == AF_UNIX)
        snprintf(ret_text, ADDRESS_TEXT_MAX, "unix");
    else if (getnameinfo((struct sockaddr *)&peer, len, host, sizeof(host), port, sizeof(port),
                         NI_NUMERICHOST | NI_NUMERICSERV))
        snprintf(ret_text, ADDRESS_TEXT_MAX, "an unknown address");
    else {
        if (!strncmp(host, "::ffff:", 7) && strchr(host, '.'))
            shown += 7; /* IPv4 on a socket of both families */
        snprintf(ret_text, ADDRESS_TEXT_MAX, strchr(shown, ':') ? "[%s]:%s" : "%s:%s", shown, port);
    }
}

/* ---- Resolving ---- */

struct lookup {
    atomic_int refs; /* the caller and the thread; the last one frees */
    struct address address;
    int done_fd;
    atomic_int status; /* published after `found` */
    struct addrinfo *found;
};

static void lookup_unref(struct lookup *l)
{
    if (atomic_fetch_sub(&l->refs, 1) > 1)
        return;
    if (l->found)
        freeaddrinfo(l->found);
    close_fd(&l->done_fd);
    free(l);
}

static void *lookup_thread(void *arg)
{
    struct lookup *l = arg;
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM};
    struct addrinfo *found = NULL;
    int status = getaddrinfo(l->address.host, l->address.port, &hints, &found);
    l->found = found;
    atomic_store(&l->status, status);
    io_latch_set(l->done_fd);
    lookup_unref(l);
    return NULL;
}

static struct lookup *lookup_start(const struct address *a, struct vm_error **err)
{
    struct lookup *l = calloc(1, sizeof(*l));
    if (!l) {
        error_nomem(err);
        return NULL;
    }
    l->address = *a;
    l->refs = 2;
    l->done_fd = io_latch_new(err);
    pthread_t thread;
    int failed = l->done_fd < 0 ? 0 : pthread_create(&thread, NULL, lookup_thread, l);
    if (failed)
        error_errno(err, failed, "cannot start a thread");
    if (l->done_fd < 0 || failed) {
        l->refs = 1;
        lookup_unref(l);
        return NULL;
    }
    pthread_detach(thread);
    return l;
}

static int resolve(const struct address *a, int64_t deadline_ns, int cancel_fd,
                   struct addrinfo **ret_found, struct vm_error **err)
{
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM,
                             .ai_flags = AI_NUMERICHOST | AI_NUMERICSERV};
    if (getaddrinfo(a->host, a->port, &hints, ret_found) == 0)
        return 0;
    struct lookup *l = lookup_start(a, err);
    if (!l)
        return -1;
    int ret = io_wait(l->done_fd, POLLIN, deadline_ns, cancel_fd, err);
    if (ret < 0) {
        error_wrap(err, "looking up %s", a->host);
    } else if (l->status) {
        ret = error_set(err, VM_ERROR_UNREACHABLE, "host %s is unknown (%s); check the name",
                        a->host, gai_strerror(l->status));
    } else {
        *ret_found = l->found;
        l->found = NULL;
    }
    lookup_unref(l);
    return ret;
}

/* ---- Connecting ---- */

static int set_connect_error(const struct address *a, int errnum, struct vm_error **err)
{
    switch (errnum) {
    case ECONNREFUSED:
        return error_set(err, VM_ERROR_UNREACHABLE,
                         "nobody listens at %s port %s; is vmmigd running there?", a->host,
                         a->port);
    case EHOSTUNREACH:
    case ENETUNREACH:
        return error_set(err, VM_ERROR_UNREACHABLE,
                         "no route to %s; check the address and the network", a->host);
    case ETIMEDOUT:
        return error_set(err, VM_ERROR_TIMEOUT,
                         "%s port %s does not answer; check the network and firewalls", a->host,
                         a->port);
    default:
        return error_errno(err, errnum, "cannot connect to %s port %s", a->host, a->port);
    }
}

static int connect_one(const struct address *a, int family, const struct sockaddr *to,
                       socklen_t len, int64_t deadline_ns, int cancel_fd, struct vm_error **err)
{
    cleanup_close int fd = socket(family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return error_errno(err, errno, "cannot make a socket");
    if (connect(fd, to, len) == 0)
        return steal_fd(&fd);
    if (errno != EINPROGRESS)
        return set_connect_error(a, errno, err);
    struct vm_error *why = NULL;
    if (io_wait(fd, POLLOUT, deadline_ns, cancel_fd, &why) < 0) {
        bool late = why->kind == VM_ERROR_TIMEOUT;
        if (!late)
            return error_propagate(err, why);
        error_free(why);
        return set_connect_error(a, ETIMEDOUT, err);
    }
    int failed = 0;
    socklen_t failed_len = sizeof(failed);
    getsockopt(fd, SOL_SOCKET, SO_ERROR, &failed, &failed_len);
    return failed ? set_connect_error(a, failed, err) : steal_fd(&fd);
}

static struct sockaddr_un unix_sockaddr(const struct address *a)
{
    struct sockaddr_un path = {.sun_family = AF_UNIX};
    memcpy(path.sun_path, a->host, strlen(a->host));
    return path;
}

int address_connect(const struct address *a, int64_t deadline_ns, int cancel_fd,
                    struct vm_error **err)
{
    if (a->is_unix) {
        struct sockaddr_un path = unix_sockaddr(a);
        return connect_one(a, AF_UNIX, (struct sockaddr *)&path, sizeof(path), deadline_ns,
                           cancel_fd, err);
    }
    struct addrinfo *found;
    if (resolve(a, deadline_ns, cancel_fd, &found, err) < 0)
        return -1;
    int left = 0, fd = -1;
    for (struct addrinfo *i = found; i; i = i->ai_next)
        left++;
    struct vm_error *why = NULL;
    for (struct addrinfo *i = found; i && fd < 0; i = i->ai_next, left--) {
        int64_t until = deadline_ns, now = clock_mono_ns();
        if (deadline_ns != INT64_MAX && deadline_ns > now)
            until = now + (deadline_ns - now) / left;
        error_clear(&why);
        fd = connect_one(a, i->ai_family, i->ai_addr, i->ai_addrlen, until, cancel_fd, &why);
        if (fd < 0 && why->kind == VM_ERROR_CANCELLED)
            break;
    }
    freeaddrinfo(found);
    if (fd < 0)
        return error_propagate(err, why);
    error_free(why);
    return fd;
}

/* ---- Listening ---- */

static int listen_at(const struct address *a, int family, const struct sockaddr *at, socklen_t len,
                     struct vm_error **err)
{
    cleanup_close int fd = socket(family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    int on = 1, off = 0;
    if (fd < 0)
        return error_errno(err, errno, "cannot make a socket");
    if (family != AF_UNIX && setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on)) < 0)
        return error_errno(err, errno, "cannot set SO_REUSEADDR");
    if (family == AF_INET6 && setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof(off)) < 0)
        return error_errno(err, errno, "cannot clear IPV6_V6ONLY");
    if (bind(fd, at, len) < 0 || listen(fd, LISTEN_BACKLOG) < 0)
        return error_errno(err, errno, "cannot listen at %s port %s", a->host, a->port);
    return steal_fd(&fd);
}

static bool lacks_ipv6(void)
{
    cleanup_close int fd = socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0);
    return fd < 0 && errno == EAFNOSUPPORT;
}

int address_listen(const struct address *a, struct vm_error **err)
{
    if (a->is_unix) {
        struct sockaddr_un path = unix_sockaddr(a);
        return listen_at(a, AF_UNIX, (struct sockaddr *)&path, sizeof(path), err);
    }
    struct address at = *a;
    if (!strcmp(a->host, "::") && lacks_ipv6())
        strcpy(at.host, "0.0.0.0");
    struct addrinfo *found;
    if (resolve(&at, INT64_MAX, -1, &found, err) < 0)
        return -1;
    int fd = listen_at(a, found->ai_family, found->ai_addr, found->ai_addrlen, err);
    freeaddrinfo(found);
    return fd;
}

/* SPDX-License-Identifier: Apache-2.0 */
#include "meeting.h"

#include "base/io.h"
#include "migrate/address.h"

#include <arpa/inet.h>
#include <poll.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cmocka.h>

struct conn_context *plain_context(void)
{
    return conn_context_create(&(struct conn_settings){.insecure_plain = true}, NULL);
}

void *accept_thread(void *arg)
{
    struct meeting *m = arg;
    io_wait(m->listener, POLLIN, in_ms(5000), -1, NULL);
    int fd = accept4(m->listener, NULL, NULL, SOCK_CLOEXEC);
    m->accepted = conn_accept(m->accept_ctx, fd, in_ms(5000), -1, &m->accept_err);
    return NULL;
}

/* Listen; `fn` is the thread that accepts. */
void meeting_open_at(struct meeting *m, const char *at, struct conn_context *accept_ctx,
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

void meeting_open(struct meeting *m, struct conn_context *accept_ctx, void *(*fn)(void *))
{
    meeting_open_at(m, "127.0.0.1:0", accept_ctx, fn);
}

int raw_dial(const struct meeting *m)
{
    struct address a;
    assert_int_equal(address_parse(m->address, CONN_DEFAULT_PORT, &a, NULL), 0);
    int fd = address_connect(&a, in_ms(5000), -1, NULL);
    assert_true(fd >= 0);
    io_set_nonblocking(fd, false, NULL);
    return fd;
}

void meet(struct meeting *m, struct conn_context *dial, struct conn_context *accept)
{
    meeting_open(m, accept, accept_thread);
    m->dialled = conn_dial(dial, m->address, CONN_CONTROL, in_ms(5000), -1, &m->dial_err);
    pthread_join(m->thread, NULL);
}

void part(struct meeting *m)
{
    conn_destroy(m->dialled);
    conn_destroy(m->accepted);
    error_free(m->dial_err);
    error_free(m->accept_err);
    close(m->listener);
}

void assert_error(struct vm_error *err, enum vm_error_kind kind, const char *text)
{
    assert_non_null(err);
    if (!strstr(err->message, text))
        fail_msg("\"%s\" does not say \"%s\"", err->message, text);
    assert_int_equal(err->kind, kind);
    assert_null(strchr(err->message, '\n'));
}

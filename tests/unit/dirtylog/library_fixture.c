/* SPDX-License-Identifier: Apache-2.0 */
#include "tests/unit/dirtylog/library_fixture.h"

#include "base/io.h"

#include <errno.h>
#include <poll.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>
#include <cmocka.h>

/* ---- VMMs ---- */

struct toy_vmm *new_vmm_with(unsigned callback_timeout_ms)
{
    struct toy_vmm like = {.sizes = {MIB, 4 * MIB},
                           .params = {.callback_timeout_ms = callback_timeout_ms}};
    return toy_vmm_create_incoming(&like);
}

struct toy_vmm *new_vmm(void)
{
    return new_vmm_with(10000);
}

struct toy_vmm *new_impatient_vmm(void)
{
    return new_vmm_with(200);
}

struct attach *agent_of(const struct toy_vmm *v)
{
    struct vm_error *err = NULL;
    struct attach *a = attach_connect(v->path, 10000, &err);
    assert_string_equal(error_message(err), "no error");
    return a;
}

/* ---- What is said at their socket ---- */

int dial(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    strcpy(address.sun_path, path);
    assert_return_code(connect(fd, (struct sockaddr *)&address, sizeof(address)), 0);
    return fd;
}

void send_raw(int fd, const void *data, size_t n)
{
    assert_int_equal(send(fd, data, n, MSG_NOSIGNAL), (ssize_t)n);
}

void ask(int fd, unsigned type, const ProtobufCMessage *message)
{
    cleanup_buffer struct buffer out = {0};
    assert_int_equal(attach_pack(type, message, &out, NULL), 0);
    send_raw(fd, out.data, out.len);
}

void hello(int fd)
{
    Vmmig__Attach__Hello m = VMMIG__ATTACH__HELLO__INIT;
    m.version_min = m.version_max = 1;
    ask(fd, VMMIG__ATTACH__TYPE__HELLO, &m.base);
}

unsigned listen_for(int fd, char text[256])
{
    static uint8_t packet[ATTACH_PACKET_MAX];
    cleanup_attach_message struct attach_message m = {0};
    int fds[ATTACH_FDS_MAX], n_fds;
    struct pollfd p = {.fd = fd, .events = POLLIN};
    assert_int_equal(poll(&p, 1, 5000), 1);
    ssize_t n = io_recv_fds(fd, packet, sizeof(packet), fds, ATTACH_FDS_MAX, &n_fds, NULL);
    if (n <= 0)
        return 0;
    for (int i = 0; i < n_fds; i++)
        close(fds[i]);
    assert_int_equal(attach_unpack(packet, (size_t)n, &m, NULL), 0);
    text[0] = 0;
    if (m.type == VMMIG__ATTACH__TYPE__ERROR)
        snprintf(text, 256, "%s: %s", m.error->kind, m.error->message);
    return m.type;
}

void expect_error(int fd, const char *expected)
{
    char text[256];
    assert_int_equal(listen_for(fd, text), VMMIG__ATTACH__TYPE__ERROR);
    assert_string_equal(text, expected);
}

void expect_type(int fd, unsigned type)
{
    char text[256];
    unsigned got = listen_for(fd, text);
    assert_string_equal(text, "");
    assert_int_equal(got, type);
}

void expect_end(int fd)
{
    char text[256];
    assert_int_equal(listen_for(fd, text), 0);
    close(fd);
}

/* SPDX-License-Identifier: Apache-2.0 */
#include "base/cleanup.h"
#include "snapshot/mount_wire.h"

#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>
#include <sys/socket.h>
#include <cmocka.h>

static void names_come_back(void **state)
{
    static const char *const names[] = {"debian12", "a/b@c:d", "t:debian12@00ff", "x+y.z-_"};
    (void)state;
    for (size_t i = 0; i < sizeof(names) / sizeof(*names); i++) {
        char folder[3 * MOUNT_NAME_MAX + 1], back[MOUNT_NAME_MAX + 1];
        mount_escape(names[i], folder);
        assert_null(strchr(folder, '/'));
        assert_int_equal(mount_unescape(folder, back), 0);
        assert_string_equal(back, names[i]);
    }
    char out[MOUNT_NAME_MAX + 1], longest[MOUNT_NAME_MAX + 2];
    static const char *const bad[] = {"a%", "a%2", "a%41", "%%", ""};
    for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); i++)
        assert_int_equal(mount_unescape(bad[i], out), -1);
    memset(longest, 'a', sizeof(longest) - 1);
    longest[sizeof(longest) - 1] = 0;
    assert_int_equal(mount_unescape(longest, out), -1);
}

static void messages_come_back(void **state)
{
    static struct mount_packet p;
    int pair[2], fd = -1, n_fds = 0;
    (void)state;
    assert_int_equal(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair), 0);
    struct mount_message m = mount_message(MOUNT_FETCH, 7, "web1@monday");
    m.payload_len = 5;
    assert_int_equal(mount_send(pair[0], &m, "hello", &pair[1], 1, NULL), 0);
    assert_int_equal(mount_receive(pair[1], &p, &fd, 1, &n_fds, NULL), 1);
    assert_int_equal(n_fds, 1);
    close(fd);
    assert_int_equal(p.m.id, 7);
    assert_string_equal(p.m.name, "web1@monday");
    assert_string_equal((char *)p.payload, "hello");
    close(pair[0]);
    assert_int_equal(mount_receive(pair[1], &p, &fd, 1, &n_fds, NULL), 0);
    close(pair[1]);
}

/* Lengths that do not fit, a name without an end, descriptors that nobody asked for. */
static void malformed_ones_are_refused(void **state)
{
    static struct mount_packet p;
    struct mount_message m = mount_message(MOUNT_FIND, 1, "x");
    int pair[2];
    (void)state;
    assert_int_equal(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair), 0);
    for (int i = 0; i < 4; i++) {
        struct mount_message bad = m;
        size_t size = sizeof(bad);
        if (i == 0)
            size = 3;
        if (i == 1)
            bad.payload_len = 1;
        if (i == 2)
            memset(bad.name, 'a', sizeof(bad.name));
        cleanup_error struct vm_error *err = NULL;
        if (i < 3)
            assert_int_equal(send(pair[0], &bad, size, 0), (ssize_t)size);
        else
            assert_int_equal(mount_send(pair[0], &m, NULL, pair, 2, NULL), 0);
        int before = dup(0);
        close(before);
        assert_int_equal(mount_receive(pair[1], &p, NULL, 0, NULL, &err), -1);
        assert_int_equal(err->kind, VM_ERROR_PROTOCOL);
        int after = dup(0);
        close(after);
        assert_int_equal(before, after);
    }
    close(pair[0]);
    close(pair[1]);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(names_come_back),
        cmocka_unit_test(messages_come_back),
        cmocka_unit_test(malformed_ones_are_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

/* SPDX-License-Identifier: Apache-2.0 */
/* Sockets of a command line that somebody else has. */
#include "vmm/qemu_sockets.h"

#include "base/cleanup.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cmocka.h>

static char folder[] = "/tmp/vmmig-sockets-XXXXXX";

static const char *path_of(const char *name)
{
    static char path[128];
    snprintf(path, sizeof(path), "%s/%s", folder, name);
    return path;
}

static int listen_at(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strcpy(address.sun_path, path);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_int_equal(bind(fd, (struct sockaddr *)&address, sizeof(address)), 0);
    assert_int_equal(listen(fd, 1), 0);
    return fd;
}

static int check(const char *option, const char *value, struct vm_error **err)
{
    char program[] = "qemu-system-x86_64", name[32], text[256];
    char *argv[] = {program, name, text, NULL};
    snprintf(name, sizeof(name), "%s", option);
    snprintf(text, sizeof(text), "%s", value);
    return qemu_sockets_check_free(argv, folder, err);
}

static void expect_taken(const char *option, const char *value)
{
    struct vm_error *err = NULL;
    assert_int_equal(check(option, value, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_REFUSED);
    assert_non_null(strstr(error_message(err), "away from a program that listens there"));
    error_free(err);
}

static void expect_free(const char *option, const char *value)
{
    struct vm_error *err = NULL;
    if (check(option, value, &err) < 0)
        fail_msg("%s", error_message(err));
}

static void test_somebody_listens(void **state)
{
    char text[200];
    int fd = listen_at(path_of("a"));
    snprintf(text, sizeof(text), "unix:%s,server=on,wait=off", path_of("a"));
    expect_taken("-qmp", text);
    expect_taken("-serial", text);
    expect_taken("-qmp", "unix:a,server");
    snprintf(text, sizeof(text), "socket,id=c,path=%s,server=on,wait=off", path_of("a"));
    expect_taken("-chardev", text);
    for (int i = 0; i < 4; i++) /* too many wait for him */
        expect_taken("-chardev", text);
    /* As its client QEMU takes nothing away. */
    snprintf(text, sizeof(text), "socket,id=c,path=%s", path_of("a"));
    expect_free("-chardev", text);
    snprintf(text, sizeof(text), "unix:%s,server=off", path_of("a"));
    expect_free("-serial", text);
    close(fd);
    unlink(path_of("a"));
}

static void test_nobody_listens(void **state)
{
    int fd = listen_at(path_of("b"));
    close(fd);
    expect_free("-qmp", "unix:b,server=on"); /* it is there */
    expect_free("-qmp", "unix:c,server=on");
    expect_free("-serial", "stdio");
    expect_free("-drive", "file=b,format=raw");
    unlink(path_of("b"));
}

static int make_folder(void **state)
{
    return mkdtemp(folder) ? 0 : -1;
}

static int remove_folder(void **state)
{
    return rmdir(folder);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_somebody_listens),
                                       cmocka_unit_test(test_nobody_listens)};
    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}

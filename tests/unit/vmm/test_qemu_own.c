/* SPDX-License-Identifier: Apache-2.0 */
/* What a second QEMU of a command line makes itself. */
#include "vmm/qemu_own.h"

#include "base/cleanup.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

/* The value that the option gets in a VM "back", which was "web1". */
static char *own(const char *option, const char *value, bool connects)
{
    char *words[] = {(char *)(uintptr_t)"qemu", (char *)(uintptr_t)option, (char *)(uintptr_t)value, NULL};
    const struct qemu_own how = {"web1", "back", connects};
    cleanup_qemu_argv struct qemu_argv a = {0};
    assert_int_equal(qemu_argv_parse(words, &a, NULL), 0);
    assert_int_equal(a.n, 1);
    assert_int_equal(qemu_own_option(&how, &a, 0, NULL), 0);
    return strdup(a.options[0].value);
}

static void check(const char *option, const char *value, bool connects, const char *expected)
{
    cleanup_free char *made = own(option, value, connects);
    assert_string_equal(made, expected);
}

static void where_it_listens(void **state)
{
    (void)state;
    for (int connects = 0; connects < 2; connects++) {
        check("-qmp", "unix:/run/web1.qmp,server=on,wait=off", connects, "unix:/run/back.qmp,server=on,wait=off");
        check("-monitor", "unix:/run/mon,server,nowait", connects, "unix:/run/back-mon,server,nowait");
        check("-vnc", "unix:/run/web1/vnc", connects, "unix:/run/web1/back-vnc");
        check("-chardev", "socket,id=b,path=/run/b,server=on", connects, "socket,id=b,path=/run/back-b,server=on");
        check("-qmp", "unix:web1,server=on", connects, "unix:back,server=on");
    }
}

static void what_it_writes(void **state)
{
    (void)state;
    for (int connects = 0; connects < 2; connects++) {
        check("-serial", "file:/log/web1.txt", connects, "file:/log/back.txt");
        check("-chardev", "file,id=d,path=/log/out", connects, "file,id=d,path=/log/back-out");
    }
}

static void what_it_connects_to(void **state)
{
    (void)state;
    check("-serial", "unix:/run/web1.console", false, "unix:/run/web1.console");
    check("-serial", "unix:/run/web1.console,server=off", false, "unix:/run/web1.console,server=off");
    check("-serial", "pipe:/run/web1.pipe", false, "pipe:/run/web1.pipe");
    check("-chardev", "socket,id=a,path=/run/web1.a", false, "socket,id=a,path=/run/web1.a");
    check("-serial", "unix:/run/web1.console", true, "unix:/run/back.console");
    check("-chardev", "socket,id=a,path=/run/web1.a", true, "socket,id=a,path=/run/back.a");
    check("-chardev", "socket,id=c,path=/run/collector", true, "socket,id=c,path=/run/collector");
}

static void what_is_no_path(void **state)
{
    (void)state;
    check("-vnc", "127.0.0.1:3", true, "127.0.0.1:3");
    check("-serial", "mon:stdio", true, "mon:stdio");
    check("-name", "web1", true, "web1");
    check("-chardev", "socket,id=t,host=web1,port=7,server=on", true, "socket,id=t,host=web1,port=7,server=on");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(where_it_listens),
        cmocka_unit_test(what_it_writes),
        cmocka_unit_test(what_it_connects_to),
        cmocka_unit_test(what_is_no_path),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

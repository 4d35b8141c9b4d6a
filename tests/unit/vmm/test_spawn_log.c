/* SPDX-License-Identifier: Apache-2.0 */
/* Which line of a VMM's log says why it ended. */
#include "vmm/spawn.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <cmocka.h>

static const struct {
    const char *log, *expected;
} table[] = {
    {"", ""},
    {"\n\r\n", ""},
    {"terminating on signal 15\n", "terminating on signal 15"},
    {"one\ntwo\r\n\n", "two"},
    {"qemu: unsupported machine type\nUse -machine help to list supported machines\n",
     "qemu: unsupported machine type"},
    {"qemu: first\nqemu: second\na hint\n", "qemu: second"},
    {"qemu: Unknown savevm section\nqemu: load of migration failed: Invalid argument\n",
     "qemu: Unknown savevm section"},
    {"qemu: load of migration failed: Invalid argument\n",
     "qemu: load of migration failed: Invalid argument"},
    {"time 12:30: no program\n", "time 12:30: no program"},
    {"bell\a and \033[1m\n", "bell? and ?[1m"},
};

static void the_line_that_says_why_is_found(void **state)
{
    char path[] = "/tmp/test_spawn_log.XXXXXX", out[SPAWN_MESSAGE_MAX];
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    for (unsigned i = 0; i < sizeof(table) / sizeof(*table); i++) {
        size_t n = strlen(table[i].log);
        assert_int_equal(ftruncate(fd, 0), 0);
        assert_int_equal(pwrite(fd, "qemu: of another run\n", 21, 0), 21);
        assert_int_equal(pwrite(fd, table[i].log, n, 21), n);
        spawn_log_last_line(path, 21, out);
        assert_string_equal(out, table[i].expected);
    }
    close(fd);
    unlink(path);
    spawn_log_last_line(path, 0, out);
    assert_string_equal(out, "");
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(the_line_that_says_why_is_found)};
    return cmocka_run_group_tests_name("spawn_log", tests, NULL, NULL);
}

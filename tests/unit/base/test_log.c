/* SPDX-License-Identifier: Apache-2.0 */
#include "base/log.h"

#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <cmocka.h>

static int pipes[2], real_stderr;

/* What was logged since the last call. */
static const char *logged(void)
{
    static char text[8192];
    ssize_t n = read(pipes[0], text, sizeof(text) - 1);
    text[n < 0 ? 0 : n] = 0;
    return text;
}

static int capture(void **state)
{
    (void)state;
    unsetenv("JOURNAL_STREAM");
    if (pipe2(pipes, O_NONBLOCK) < 0)
        return -1;
    real_stderr = dup(STDERR_FILENO);
    dup2(pipes[1], STDERR_FILENO);
    return 0;
}

static int release(void **state)
{
    (void)state;
    dup2(real_stderr, STDERR_FILENO);
    close(real_stderr);
    close(pipes[0]);
    close(pipes[1]);
    return 0;
}

static void a_line_has_time_level_message_and_fields(void **state)
{
    (void)state;
    log_info("round done", "round=%u pages=%lu", 2u, 812ul);
    const char *line = logged();
    assert_memory_equal(line, "ts=20", 5);
    assert_non_null(strstr(line, "Z level=info msg=\"round done\" round=2 pages=812\n"));
    log_warn("alone");
    assert_non_null(strstr(logged(), "level=warn msg=\"alone\"\n"));
}

static void the_threads_job_and_vm_are_added(void **state)
{
    (void)state;
    log_set_thread_context("7f3a", "web1");
    log_error("x");
    assert_non_null(strstr(logged(), "level=error job=7f3a vm=web1 msg=\"x\"\n"));
    log_set_thread_context(NULL, NULL);
    log_error("x");
    assert_null(strstr(logged(), "job="));
}

static void what_is_below_the_level_is_not_said(void **state)
{
    (void)state;
    enum log_level level;
    log_debug("quiet");
    assert_string_equal(logged(), "");
    assert_true(log_level_parse("debug", &level));
    log_set_level(level);
    log_debug("loud");
    assert_non_null(strstr(logged(), "level=debug"));
    log_set_level(LOG_LEVEL_INFO);
    assert_false(log_level_parse("louder", &level));
}

static void text_from_outside_cannot_forge_a_line(void **state)
{
    (void)state;
    log_info("peer said", "text=%s",
             log_q("a\"b\\c\nts=2026 level=error msg=\"forged\"\x1b[2J\x7f"));
    const char *line = logged();
    assert_ptr_equal(strchr(line, '\n'), line + strlen(line) - 1); /* one line */
    assert_null(strchr(line, '\x1b'));
    assert_null(strchr(line, '\x7f'));
    assert_non_null(strstr(line, "text=\"a\\\"b\\\\c\\x0a"));
    assert_null(strstr(line, "\" msg=\"forged\""));
}

static void long_lines_are_cut_and_stay_lines(void **state)
{
    (void)state;
    char *much = malloc(10000);
    memset(much, 'x', 9999);
    much[9999] = 0;
    log_info("long", "text=%s", much);
    const char *line = logged();
    assert_true(strlen(line) <= 2048);
    assert_int_equal(line[strlen(line) - 1], '\n');
    log_info("quoted", "text=%s", log_q(much));
    line = logged();
    assert_true(strlen(line) < 400);
    assert_memory_equal(line + strlen(line) - 2, "\"\n", 2);
    free(much);
}

static void under_systemd_the_priority_stands_first(void **state)
{
    (void)state;
    setenv("JOURNAL_STREAM", "1:2", 1);
    log_warn("x");
    assert_string_equal(logged(), "<4>level=warn msg=\"x\"\n");
    unsetenv("JOURNAL_STREAM");
}

int main(void)
{
#define CAPTURED(test) cmocka_unit_test_setup_teardown(test, capture, release)
    const struct CMUnitTest tests[] = {
        CAPTURED(a_line_has_time_level_message_and_fields),
        CAPTURED(the_threads_job_and_vm_are_added),
        CAPTURED(what_is_below_the_level_is_not_said),
        CAPTURED(text_from_outside_cannot_forge_a_line),
        CAPTURED(long_lines_are_cut_and_stay_lines),
        CAPTURED(under_systemd_the_priority_stands_first),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

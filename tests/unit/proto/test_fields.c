/* SPDX-License-Identifier: Apache-2.0 */
#include "proto/fields.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

static void names_of_vms(void **state)
{
    (void)state;
    char name[VM_NAME_MAX + 2];
    static const char *const good[] = {"a", "web1", "Web_1.test-2", "0", "_"};
    static const char *const bad[] = {"",    ".",     "..",   "-x",      ".hidden", "a/b",
                                      "a b", "a\nb", "a\x80", "w\xc3\xa9"};
    for (size_t i = 0; i < sizeof(good) / sizeof(*good); i++)
        assert_true(vm_name_is_valid(good[i]));
    for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); i++)
        assert_false(vm_name_is_valid(bad[i]));
    memset(name, 'x', sizeof(name));
    name[VM_NAME_MAX] = 0;
    assert_true(vm_name_is_valid(name));
    name[VM_NAME_MAX] = 'x';
    name[VM_NAME_MAX + 1] = 0;
    cleanup_error struct vm_error *err = NULL;
    assert_int_equal(vm_name_check(name, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_USAGE);
}

static void assert_endpoint(const char *text, const char *host, unsigned port, const char *again)
{
    struct endpoint e;
    assert_int_equal(endpoint_parse(text, 7, &e, NULL), 0);
    assert_string_equal(e.host, host);
    assert_int_equal(e.port, port);
    assert_string_equal(endpoint_text(&e), again);
}

static void addresses_of_hosts(void **state)
{
    (void)state;
    assert_endpoint("host2", "host2", 7, "host2:7");
    assert_endpoint("host2.example:80", "host2.example", 80, "host2.example:80");
    assert_endpoint("10.0.0.1", "10.0.0.1", 7, "10.0.0.1:7");
    assert_endpoint("[fd00::1]:65535", "fd00::1", 65535, "[fd00::1]:65535");
    assert_endpoint("[fd00::1]", "fd00::1", 7, "[fd00::1]:7");
    assert_endpoint("fe80::1%eth0", "fe80::1%eth0", 7, "[fe80::1%eth0]:7");
    static const char *const bad[] = {
        "",          ":80",        "host:",      "host:0",      "host:65536", "host:80x",
        "[fd00::1",  "[host]:80",  "[fd00::1]x", "[fd00::1]:x", "-o:80",      "a b",
        "host:+80",  "ho\nst",     "user@host",  "host:080808", "[]:80",      "host/x"};
    for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); i++) {
        cleanup_error struct vm_error *err = NULL;
        struct endpoint e;
        assert_int_equal(endpoint_parse(bad[i], 7, &e, &err), -1);
        assert_int_equal(err->kind, VM_ERROR_USAGE);
    }
}

static void the_longest_address_fits_its_text(void **state)
{
    (void)state;
    char text[ENDPOINT_TEXT_MAX + 2];
    struct endpoint e;
    memset(text, 'a', sizeof(text));
    text[1] = ':';
    text[ENDPOINT_HOST_MAX - 1] = ':';
    text[ENDPOINT_HOST_MAX] = 0;
    assert_int_equal(endpoint_parse(text, 65535, &e, NULL), 0);
    assert_int_equal(strlen(endpoint_text(&e)), ENDPOINT_TEXT_MAX);
    text[ENDPOINT_HOST_MAX] = 'a';
    text[ENDPOINT_HOST_MAX + 1] = 0;
    assert_int_equal(endpoint_parse(text, 65535, &e, NULL), -1);
}

static void text_that_is_shown(void **state)
{
    (void)state;
    static const char *const good[] = {"plain", "gr\xc3\xbc\xc3\x9f", "\xe2\x82\xac",
                                       "\xf0\x9f\x98\x80"};
    static const char *const bad[] = {"a\nb",         "\x1b[31m",         "a\x7f",
                                      "\xc3",         "\xc0\x80",         "\xed\xa0\x80",
                                      "\xf8\x88\x80", "\xf4\x90\x80\x80", "\xc2\x9b",
                                      "\xe2\x80\xae", "\xff",             "\xe0\x9f\xbf",
                                      "\xf0\x8f\xbf\xbf"};
    for (size_t i = 0; i < sizeof(good) / sizeof(*good); i++)
        assert_int_equal(field_check_text("it", good[i], 1, 10, NULL), 0);
    for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); i++) {
        cleanup_error struct vm_error *err = NULL;
        assert_int_equal(field_check_text("it", bad[i], 1, 10, &err), -1);
        assert_string_equal(error_message(err), "it is not printable UTF-8");
    }
    assert_int_equal(field_check_text("it", "", 1, 10, NULL), -1);
    assert_int_equal(field_check_text("it", "", 0, 10, NULL), 0);
    assert_int_equal(field_check_text("it", "12345678901", 1, 10, NULL), -1);
}

static void text_is_made_showable(void **state)
{
    (void)state;
    char bad[] = "a\x1b[1m\xc3\xbc\xff\n";
    field_make_text(bad, 20);
    assert_string_equal(bad, "a?[1m\xc3\xbc??");
    char cut[] = "abc\xc3\xbc";
    field_make_text(cut, 4);
    assert_string_equal(cut, "abc"); /* never half a character */
    char fits[] = "abc\xc3\xbc";
    field_make_text(fits, 5);
    assert_string_equal(fits, "abc\xc3\xbc");
}

static void command_lines_are_bounded(void **state)
{
    (void)state;
    char **argv = calloc(FIELD_ARGV_MAX + 1, sizeof(*argv));
    char *big = malloc(FIELD_ARGV_BYTES + 1);
    char word[] = "qemu", empty[] = "";
    for (int i = 0; i <= FIELD_ARGV_MAX; i++)
        argv[i] = word;
    assert_int_equal(field_check_argv("argv", argv, FIELD_ARGV_MAX, NULL), 0);
    assert_int_equal(field_check_argv("argv", argv, FIELD_ARGV_MAX + 1, NULL), -1);
    assert_int_equal(field_check_argv("argv", argv, 0, NULL), -1);
    memset(big, 'x', FIELD_ARGV_BYTES);
    big[FIELD_ARGV_BYTES] = 0;
    argv[1] = big;
    assert_int_equal(field_check_argv("argv", argv, 2, NULL), -1);
    argv[1] = empty;
    assert_int_equal(field_check_argv("argv", argv, 2, NULL), 0);
    argv[0] = empty;
    assert_int_equal(field_check_argv("argv", argv, 2, NULL), -1);
    free(big);
    free(argv);
}

static void paths_are_absolute(void **state)
{
    (void)state;
    assert_int_equal(field_check_path("path", "/run/x.qmp", NULL), 0);
    assert_int_equal(field_check_path("path", "run/x.qmp", NULL), -1);
    assert_int_equal(field_check_path("path", "", NULL), -1);
    assert_int_equal(field_check_path("path", "/a\nb", NULL), -1);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(names_of_vms),
        cmocka_unit_test(addresses_of_hosts),
        cmocka_unit_test(the_longest_address_fits_its_text),
        cmocka_unit_test(text_that_is_shown),
        cmocka_unit_test(text_is_made_showable),
        cmocka_unit_test(command_lines_are_bounded),
        cmocka_unit_test(paths_are_absolute),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

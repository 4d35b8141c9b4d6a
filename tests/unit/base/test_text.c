/* SPDX-License-Identifier: Apache-2.0 */
#include "base/text.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

static void numbers(void **state)
{
    (void)state;
    uint64_t v;
    assert_int_equal(text_parse_u64("0", &v, NULL), 0);
    assert_int_equal(text_parse_u64("18446744073709551615", &v, NULL), 0);
    assert_true(v == UINT64_MAX);
    static const char *const bad[] = {"", "-1", "+1", " 1", "1 ", "0x10", "1.5",
                                      "18446744073709551616", "99999999999999999999999"};
    for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); i++)
        assert_int_equal(text_parse_u64(bad[i], &v, NULL), -1);
}

static void rates(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        uint64_t bytes;
    } good[] = {
        {"0", 0},           {"123", 123},        {"100M", 100000000},  {"1G", 1000000000},
        {"1g", 1000000000}, {"64MiB", 67108864}, {"1GiB", 1073741824}, {"1gbit", 125000000},
        {"2.5gbit", 312500000}, {"8bit", 1},     {"10K/s", 10000},     {"1.5T", 1500000000000},
        {"100MBIT", 12500000},
    };
    static const char *const bad[] = {"", "M", "1MB", "1Mb", "-1M", "1 M", "1.M", ".5M", "1e9",
                                      "1Gbits", "9999999T", "1/s/s", "nan", "inf"};
    uint64_t v;
    for (size_t i = 0; i < sizeof(good) / sizeof(*good); i++) {
        assert_int_equal(text_parse_rate(good[i].text, &v, NULL), 0);
        assert_true(v == good[i].bytes);
    }
    for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); i++) {
        cleanup_error struct vm_error *err = NULL;
        assert_int_equal(text_parse_rate(bad[i], &v, &err), -1);
        assert_int_equal(err->kind, VM_ERROR_USAGE);
    }
}

static void the_nearest_word(void **state)
{
    (void)state;
    static const char *const words[] = {"list", "send", "status", "cancel", "connections", NULL};
    assert_string_equal(text_nearest("lst", words), "list");
    assert_string_equal(text_nearest("sned", words), "send");
    assert_string_equal(text_nearest("stat", words), "status"); /* a beginning */
    assert_string_equal(text_nearest("conections", words), "connections");
    assert_null(text_nearest("xyzzy", words));
    assert_null(text_nearest("", words));
    char huge[1000];
    memset(huge, 'a', sizeof(huge) - 1);
    huge[sizeof(huge) - 1] = 0;
    assert_null(text_nearest(huge, words));
}

static char *wrap(const char *text, int column, int indent)
{
    char *out = NULL;
    size_t size;
    FILE *f = open_memstream(&out, &size);
    text_wrap(f, text, column, indent);
    fclose(f);
    return out;
}

static void lines_are_wrapped(void **state)
{
    (void)state;
    char text[400] = "";
    for (int i = 0; i < 60; i++)
        strcat(text, "words ");
    char *out = wrap(text, 10, 4);
    bool first = true;
    for (char *line = strtok(out, "\n"); line; line = strtok(NULL, "\n"), first = false) {
        assert_true(strlen(line) + (first ? 10 : 0) <= TEXT_COLUMNS);
        if (!first)
            assert_memory_equal(line, "    words", 9);
    }
    free(out);
    out = wrap("one\n\n    two\nthree", 0, 2);
    assert_string_equal(out, "one\n\n      two\n  three\n");
    free(out);
}

static void sizes(void **state)
{
    (void)state;
    assert_string_equal(text_size(0), "0 B");
    assert_string_equal(text_size(999), "999 B");
    assert_string_equal(text_size(1536), "1.5 KiB");
    assert_string_equal(text_size(5ULL << 30), "5.0 GiB");
    assert_string_equal(text_size(512ULL << 20), "512 MiB");
    assert_string_equal(text_size(UINT64_MAX), "16.0 EiB");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(numbers),           cmocka_unit_test(rates),
        cmocka_unit_test(the_nearest_word),  cmocka_unit_test(lines_are_wrapped),
        cmocka_unit_test(sizes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

/* SPDX-License-Identifier: Apache-2.0 */
#include "base/options.h"

#include "base/text.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

struct target {
    const char *to;
    uint64_t limit, rate;
    unsigned compress;
    bool force;
    unsigned paths;
};

static int count_paths(const struct option *o, const char *value, void *member,
                       struct vm_error **err)
{
    (void)o;
    (void)value;
    (void)err;
    ++*(unsigned *)member;
    return 0;
}

#define MEMBER(m) .offset = offsetof(struct target, m)
static const struct option rows[] = {
    {"to", "HOST", option_parse_text, MEMBER(to), .required = true, .text = "Where to"},
    {"limit", "MS", option_parse_u64, MEMBER(limit), .min = 1, .max = 1000, .unit = "ms",
     .def = "300", .text = "How long"},
    {"rate", "RATE", option_parse_rate, MEMBER(rate), .min = 100, .max = 1000000,
     .text = "How fast"},
    {"compress", "auto|lz4|none", option_parse_choice, MEMBER(compress), .choices = "auto|lz4|none",
     .def = "auto", .text = "How"},
    {"force", NULL, option_parse_flag, MEMBER(force), .text = "Really"},
    {"path", "P", count_paths, MEMBER(paths), .repeatable = true, .text = "Many"},
    {NULL}};

#define MAX_WORDS 12

/* Parse words, a NULL at the end. */
static int parse(struct target *t, struct positionals *p, struct vm_error **err, const char *first,
                 ...)
{
    static char copies[MAX_WORDS][100];
    char *argv[MAX_WORDS + 1];
    int argc = 0;
    va_list args;
    va_start(args, first);
    for (const char *w = first; w && argc < MAX_WORDS; w = va_arg(args, const char *)) {
        argv[argc] = strcpy(copies[argc], w);
        argc++;
    }
    va_end(args);
    argv[argc] = NULL;
    *t = (struct target){0};
    if (options_set_defaults(rows, t, err) < 0)
        return -1;
    return options_parse(rows, argc, argv, t, p, err);
}

static void values_flags_and_positionals_in_any_order(void **state)
{
    (void)state;
    struct target t;
    struct positionals p;
    assert_int_equal(parse(&t, &p, NULL, "web1", "--to", "host2", "--force", "--rate=10K", "x",
                           "--compress", "none", "--path", "a", "--path=b", NULL), 0);
    assert_string_equal(t.to, "host2");
    assert_true(t.force);
    assert_int_equal(t.limit, 300);
    assert_int_equal(t.rate, 10000);
    assert_int_equal(t.compress, 2);
    assert_int_equal(t.paths, 2);
    assert_int_equal(p.n, 2);
    assert_string_equal(p.list[0], "web1");
    assert_string_equal(p.list[1], "x");
    assert_null(p.rest);
}

static void the_rest_is_left_alone(void **state)
{
    (void)state;
    struct target t;
    struct positionals p;
    assert_int_equal(parse(&t, &p, NULL, "--to=h", "--", "--force", "-x", NULL), 0);
    assert_false(t.force);
    assert_int_equal(p.n_rest, 2);
    assert_string_equal(p.rest[0], "--force");
    assert_null(p.rest[2]);
}

static void values_may_look_like_options_behind_an_equals_sign(void **state)
{
    (void)state;
    struct target t;
    struct positionals p;
    assert_int_equal(parse(&t, &p, NULL, "--to=--force", NULL), 0);
    assert_string_equal(t.to, "--force");
    assert_int_equal(parse(&t, &p, NULL, "--to", "-", NULL), 0);
}

static void assert_error(const struct vm_error *err, const char *message)
{
    assert_string_equal(error_message(err), message);
    assert_int_equal(err->kind, VM_ERROR_USAGE);
}

static void errors_are_one_clear_line(void **state)
{
    (void)state;
    static const struct {
        const char *words[3], *message;
    } cases[] = {
        {{"--limt", "5"}, "there is no option --limt; did you mean --limit?"},
        {{"--zzz"}, "there is no option --zzz"},
        {{"-t", "h"}, "there is no option -t; options begin with --"},
        {{"--to"}, "--to needs a value: --to HOST"},
        {{"--to", "--force"}, "--to needs a value: --to HOST"},
        {{"--to", "--"}, "--to needs a value: --to HOST"},
        {{"--to="}, "--to : it is empty"},
        {{"--force=yes"}, "--force takes no value"},
        {{"--force", "--force"}, "--force is given twice"},
        {{"--limit", "0"}, "--limit 0: at least 1 is allowed"},
        {{"--limit", "1001"}, "--limit 1001: at most 1000 is allowed"},
        {{"--limit", "5s"}, "--limit 5s: a number is expected"},
        {{"--rate", "1MB"},
         "--rate 1MB: a rate in bytes a second is expected, as 100M, 1G, 64MiB or 1gbit"},
        {{"--compress", "gzip"}, "--compress gzip: one of auto|lz4|none is expected"},
        {{"--compress", "lz"}, "--compress lz: one of auto|lz4|none is expected"},
        {{"web1"}, "--to HOST is required"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
        cleanup_error struct vm_error *err = NULL;
        struct target t;
        struct positionals p;
        assert_int_equal(parse(&t, &p, &err, cases[i].words[0], cases[i].words[1],
                               cases[i].words[2], NULL), -1);
        assert_error(err, cases[i].message);
    }
}

static void too_many_positionals_are_an_error(void **state)
{
    (void)state;
    cleanup_error struct vm_error *err = NULL;
    struct target t;
    struct positionals p;
    assert_int_equal(parse(&t, &p, &err, "a", "b", "c", "d", "e", NULL), -1);
    assert_error(err, "unexpected argument 'e'");
}

static void help_comes_from_the_rows(void **state)
{
    (void)state;
    char *text = NULL;
    size_t size;
    FILE *out = open_memstream(&text, &size);
    options_print_help(out, rows, "--");
    options_print_manual(out, rows, "--");
    fclose(out);
    assert_non_null(
        strstr(text, "  --limit MS              How long. Between 1 and 1000 ms. Default:"));
    assert_non_null(strstr(text, "`--to HOST`\n:   Where to.\n"));
    for (const struct option *o = rows; o->name; o++)
        assert_non_null(strstr(text, o->name));
    for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n"))
        assert_true(strlen(line) <= TEXT_COLUMNS);
    free(text);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(values_flags_and_positionals_in_any_order),
        cmocka_unit_test(the_rest_is_left_alone),
        cmocka_unit_test(values_may_look_like_options_behind_an_equals_sign),
        cmocka_unit_test(errors_are_one_clear_line),
        cmocka_unit_test(too_many_positionals_are_an_error),
        cmocka_unit_test(help_comes_from_the_rows),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

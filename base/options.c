/* SPDX-License-Identifier: Apache-2.0 */
#include "base/options.h"

#include "base/text.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

enum { TEXT_COLUMN = 26 };

int option_parse_flag(const struct option *o, const char *value, void *member,
                      struct vm_error **err)
{
    (void)o;
    bool yes = !strcmp(value, "yes");
    if (!yes && strcmp(value, "no"))
        return error_set(err, VM_ERROR_USAGE, "yes or no is expected");
    *(bool *)member = yes;
    return 0;
}

int option_parse_text(const struct option *o, const char *value, void *member,
                      struct vm_error **err)
{
    (void)o;
    if (!*value)
        return error_set(err, VM_ERROR_USAGE, "it is empty");
    *(const char **)member = value;
    return 0;
}

static int check_bounds(const struct option *o, uint64_t value, struct vm_error **err)
{
    if (value < o->min)
        return error_set(err, VM_ERROR_USAGE, "at least %" PRIu64 " is allowed", o->min);
    if (value > o->max)
        return error_set(err, VM_ERROR_USAGE, "at most %" PRIu64 " is allowed", o->max);
    return 0;
}

int option_parse_u64(const struct option *o, const char *value, void *member,
                     struct vm_error **err)
{
    uint64_t number;
    if (text_parse_u64(value, &number, err) < 0 || check_bounds(o, number, err) < 0)
        return -1;
    *(uint64_t *)member = number;
    return 0;
}

int option_parse_rate(const struct option *o, const char *value, void *member,
                      struct vm_error **err)
{
    uint64_t rate;
    if (text_parse_rate(value, &rate, err) < 0 || check_bounds(o, rate, err) < 0)
        return -1;
    *(uint64_t *)member = rate;
    return 0;
}

int option_parse_size(const struct option *o, const char *value, void *member,
                      struct vm_error **err)
{
    static const char units[] = "KMGT";
    char *end;
    errno = 0;
    unsigned long long n = strtoull(value, &end, 10);
    const char *unit = *end ? strchr(units, *end) : NULL;
    unsigned shift = unit ? 10 * (unsigned)(unit - units + 1) : 0;
    if (end == value || *value < '0' || *value > '9' || errno || (*end && (!unit || end[1])) ||
        n > UINT64_MAX >> shift)
        return error_set(err, VM_ERROR_USAGE, "a size in bytes is expected, as 512M or 4G");
    if (check_bounds(o, n << shift, err) < 0)
        return -1;
    *(uint64_t *)member = n << shift;
    return 0;
}

int option_parse_choice(const struct option *o, const char *value, void *member,
                        struct vm_error **err)
{
    unsigned place = 0;
    for (const char *word = o->choices;; place++) {
        size_t n = strcspn(word, "|");
        if (strlen(value) == n && !strncmp(word, value, n)) {
            *(unsigned *)member = place;
            return 0;
        }
        if (!word[n])
            return error_set(err, VM_ERROR_USAGE, "one of %s is expected", o->choices);
        word += n + 1;
    }
}

static void *member_of(const struct option *o, void *target)
{
    return (char *)target + o->offset;
}

int options_set_defaults(const struct option *rows, void *target, struct vm_error **err)
{
    for (const struct option *o = rows; o->name; o++)
        if (o->def && o->parse(o, o->def, member_of(o, target), err) < 0)
            return error_wrap(err, "default of %s", o->name);
    return 0;
}

int option_set(const struct option *o, const char *prefix, const char *value, void *target,
               struct vm_error **err)
{
    if (o->parse(o, value, member_of(o, target), err) == 0)
        return 0;
    error_wrap(err, "%s%s %s", prefix, o->name, value);
    return error_set_kind(err, VM_ERROR_USAGE);
}

const struct option *option_find(const struct option *rows, const char *prefix, const char *name,
                                 struct vm_error **err)
{
    const char *names[OPTIONS_MAX + 1];
    size_t n = 0;
    for (const struct option *o = rows; o->name; o++) {
        if (!strcmp(o->name, name))
            return o;
        if (n < OPTIONS_MAX)
            names[n++] = o->name;
    }
    names[n] = NULL;
    const char *nearest = text_nearest(name, names);
    if (nearest)
        error_set(err, VM_ERROR_USAGE, "there is no option %s%.64s; did you mean %s%s?", prefix,
                  name, prefix, nearest);
    else
        error_set(err, VM_ERROR_USAGE, "there is no option %s%.64s", prefix, name);
    return NULL;
}

/* One option of a command line; *at moves past a value that is an argument of its own. */
static int parse_one(const struct option *rows, int argc, char **argv, int *at, void *target,
                     bool *seen, struct vm_error **err)
{
    char name[64];
    const char *word = argv[*at] + 2;
    const char *equals = strchr(word, '=');
    size_t n = equals ? (size_t)(equals - word) : strlen(word);
    snprintf(name, sizeof(name), "%.*s", (int)n, word);
    const struct option *o = option_find(rows, "--", name, err);
    if (!o)
        return -1;
    if (seen[o - rows] && !o->repeatable)
        return error_set(err, VM_ERROR_USAGE, "--%s is given twice", name);
    seen[o - rows] = true;
    if (!o->argument && equals)
        return error_set(err, VM_ERROR_USAGE, "--%s takes no value", name);
    if (!o->argument)
        return option_set(o, "--", "yes", target, err);
    /* A value that begins with -- is more likely a forgotten one; --name=value takes any. */
    if (!equals && (*at + 1 == argc || !strncmp(argv[*at + 1], "--", 2)))
        return error_set(err, VM_ERROR_USAGE, "--%s needs a value: --%s %s", name, name,
                         o->argument);
    return option_set(o, "--", equals ? equals + 1 : argv[++*at], target, err);
}

int options_parse(const struct option *rows, int argc, char **argv, void *target,
                  struct positionals *ret_positionals, struct vm_error **err)
{
    struct positionals p = {0};
    bool seen[OPTIONS_MAX] = {false};
    for (int i = 0; i < argc; i++) {
        if (!strcmp(argv[i], "--")) {
            p.rest = argv + i + 1;
            p.n_rest = argc - i - 1;
            break;
        }
        if (!strncmp(argv[i], "--", 2)) {
            if (parse_one(rows, argc, argv, &i, target, seen, err) < 0)
                return -1;
            continue;
        }
        if (argv[i][0] == '-' && argv[i][1])
            return error_set(err, VM_ERROR_USAGE, "there is no option %.64s; options begin with --",
                             argv[i]);
        if (p.n == POSITIONALS_MAX)
            return error_set(err, VM_ERROR_USAGE, "unexpected argument '%.64s'", argv[i]);
        p.list[p.n++] = argv[i];
    }
    for (const struct option *o = rows; o->name; o++)
        if (o->required && !seen[o - rows])
            return error_set(err, VM_ERROR_USAGE, "--%s %s is required", o->name, o->argument);
    *ret_positionals = p;
    return 0;
}

/* What the help says of a row: its text, its choices, bounds and default. */
static void describe(const struct option *o, char *out, size_t size)
{
    size_t n = (size_t)snprintf(out, size, "%s.", o->text);
    if (o->max && o->unit && n < size)
        n += (size_t)snprintf(out + n, size - n, " Between %" PRIu64 " and %" PRIu64 " %s.", o->min,
                              o->max, o->unit);
    if (o->def && *o->def && o->argument && n < size)
        n += (size_t)snprintf(out + n, size - n, " Default: %s.", o->def);
    if (o->repeatable && n < size)
        snprintf(out + n, size - n, " May be repeated.");
}

void options_print_help(FILE *out, const struct option *rows, const char *prefix)
{
    char text[1024];
    for (const struct option *o = rows; o->name; o++) {
        int column = fprintf(out, o->argument ? "  %s%s %s" : "  %s%s", prefix, o->name,
                             o->argument);
        if (column > TEXT_COLUMN - 2) {
            fputc('\n', out);
            column = 0;
        }
        fprintf(out, "%*s", TEXT_COLUMN - column, "");
        describe(o, text, sizeof(text));
        text_wrap(out, text, TEXT_COLUMN, TEXT_COLUMN);
    }
}

void options_print_manual(FILE *out, const struct option *rows, const char *prefix)
{
    char text[1024];
    for (const struct option *o = rows; o->name; o++) {
        fprintf(out, o->argument ? "\n`%s%s %s`\n:   " : "\n`%s%s`\n:   ", prefix, o->name,
                o->argument);
        describe(o, text, sizeof(text));
        text_wrap(out, text, 4, 4);
    }
}

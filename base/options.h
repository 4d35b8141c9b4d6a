/* SPDX-License-Identifier: Apache-2.0 */
/*
 * options: settings as rows of a table, for command lines and configuration files. From a row come
 * the parser, the bounds, the default, the help and the manual; there is no second list of them.
 *
 *     static const struct option rows[] = {
 *         {"downtime-limit", "MS", .parse = option_parse_u64, .min = 1, .max = 3600000, .def =
 * "300",
 *          .offset = offsetof(struct send, downtime_ms), .text = "Longest pause of the guest"},
 *         {NULL}};
 *     options_set_defaults(rows, &send, &err);
 *     options_parse(rows, argc, argv, &send, &positionals, &err);
 *
 * Errors are of kind USAGE and name the option. Strings that option_parse_text stores are those of
 * argv or of the row, not copies. Threads: any.
 */
#ifndef VMMIG_BASE_OPTIONS_H
#define VMMIG_BASE_OPTIONS_H

#include "base/error.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

struct option;
/* Check `value` and store it in the member. The caller puts the option's name before the error. */
typedef int option_parse_fn(const struct option *o, const char *value, void *member,
                            struct vm_error **err);

struct option {
    const char *name;
    const char *argument; /* what the help calls its value; NULL: a flag, which has none */
    option_parse_fn *parse;
    uint64_t min, max;    /* of numbers and rates */
    const char *unit;     /* of numbers, for the help */
    const char *def;      /* its default, parsed like any value; NULL: the member stays as it is */
    const char *choices;  /* "auto|lz4|zstd|none", for option_parse_choice */
    size_t offset;        /* of the member in the target */
    bool repeatable;
    bool required;
    const char *text;     /* the help; sentences */
};

option_parse_fn option_parse_flag;   /* bool; a file says yes or no */
option_parse_fn option_parse_text;   /* const char *, not empty */
option_parse_fn option_parse_u64;    /* uint64_t between min and max */
option_parse_fn option_parse_rate;   /* uint64_t bytes a second between min and max */
option_parse_fn option_parse_size;   /* uint64_t bytes, as 4096, 512M, 4G, between min and max */
option_parse_fn option_parse_choice; /* unsigned: the place of the word in choices */

#define OPTIONS_MAX 48
#define POSITIONALS_MAX 4

/* What is left of a command line when the options are taken out. */
struct positionals {
    const char *list[POSITIONALS_MAX];
    int n;
    char **rest; /* what stood behind `--`, ended by NULL as argv is; NULL without `--` */
    int n_rest;
};

int options_set_defaults(const struct option *rows, void *target, struct vm_error **err);
/*
 * Options `--name value`, `--name=value` and `--flag` anywhere before `--`. An unknown one is an
 * error that suggests the nearest; so are one given twice and a required one that is missing.
 */
int options_parse(const struct option *rows, int argc, char **argv, void *target,
                  struct positionals *ret_positionals, struct vm_error **err);
/* Set one option; the error names it as `prefix` and its name. */
int option_set(const struct option *o, const char *prefix, const char *value, void *target,
               struct vm_error **err);
/* The row of that name. NOT_FOUND becomes USAGE "no such option", with the nearest. */
const struct option *option_find(const struct option *rows, const char *prefix, const char *name,
                                 struct vm_error **err);

/* Help for all rows, `prefix` ("--" or "") before each name. 80 columns. */
void options_print_help(FILE *out, const struct option *rows, const char *prefix);
/* The same in Markdown: a definition list, a blank line before each item. */
void options_print_manual(FILE *out, const struct option *rows, const char *prefix);

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * qemu_argv: QEMU command lines as data. Pure: no I/O.
 *
 * Syntax. An argument is `-name value`, `--name value`, `-name` for those in a table of options without
 * a value, or a disk image (kept under the name ""). An option that is not in the table of either kind is
 * REFUSED by name: guessing whether it takes a value would shift everything behind it.
 * Values are `key=value,key=value` with `,,` for a comma, a first value without a key for the option's
 * implied key, a lone `key` for key=on; or a JSON object (-object, -device, -blockdev, ...), whose members
 * are read as dotted keys.
 *
 *     cleanup_qemu_argv struct qemu_argv a = {0};
 *     qemu_argv_parse(argv, &a, &err);
 *     for (unsigned i = 0; i < a.n; i++)
 *         if (!strcmp(a.options[i].name, "device"))
 *             qemu_props_parse(a.options[i].value, "driver", &props, &err);
 */
#ifndef VMMIG_VMM_QEMU_ARGV_H
#define VMMIG_VMM_QEMU_ARGV_H

#include "base/error.h"

#include <stdbool.h>
#include <stdint.h>

struct qemu_option {
    char *name;  /* without dashes, under its canonical name; "" for a disk image */
    char *value; /* NULL if the option has none */
};

struct qemu_argv {
    char *program;
    struct qemu_option *options;
    unsigned n, cap;
};

int qemu_argv_parse(char *const *argv, struct qemu_argv *ret_argv, struct vm_error **err);
/* Back to an array for exec: one allocation, NULL at the end; free it. NULL without memory. */
char **qemu_argv_format(const struct qemu_argv *a);
void qemu_argv_finish(struct qemu_argv *a);
static inline void qemu_argv_cleanup(struct qemu_argv *a)
{
    qemu_argv_finish(a);
}
#define cleanup_qemu_argv __attribute__((cleanup(qemu_argv_cleanup)))

/* Append a copy; the value is made by a format, or NULL. */
int qemu_argv_add(struct qemu_argv *a, const char *name, const char *value, struct vm_error **err);
void qemu_argv_remove(struct qemu_argv *a, unsigned index);
/* Replace the value of an option; takes `value` over. */
void qemu_argv_set(struct qemu_argv *a, unsigned index, char *value);

/* The key under which the option's first value stands ("driver" of -device); NULL if it has none. */
const char *qemu_option_implied_key(const char *name);

struct qemu_prop {
    char *key, *value;
};

/* An option's properties in their order. A key may come several times; the last one counts. */
struct qemu_props {
    struct qemu_prop *list;
    unsigned n, cap;
    bool json; /* it was written as JSON */
};

int qemu_props_parse(const char *text, const char *implied_key, struct qemu_props *ret_props,
                     struct vm_error **err);
void qemu_props_finish(struct qemu_props *p);
static inline void qemu_props_cleanup(struct qemu_props *p)
{
    qemu_props_finish(p);
}
#define cleanup_qemu_props __attribute__((cleanup(qemu_props_cleanup)))
/* The value; NULL if it is not there. */
const char *qemu_props_get(const struct qemu_props *p, const char *key);
int qemu_props_set(struct qemu_props *p, const char *key, const char *value, struct vm_error **err);
void qemu_props_remove(struct qemu_props *p, const char *key);
/* As key=value text; the property `implied_key` (may be NULL) first, without its key. Free it. */
char *qemu_props_format(const struct qemu_props *p, const char *implied_key);
/* "on", "yes", "true", "y", or a lone key. */
bool qemu_props_is_on(const struct qemu_props *p, const char *key);
/* "512", "512M", "0x20000000": bytes, a bare number times `unit`. False if it is not a size. */
bool qemu_size_parse(const char *text, uint64_t unit, uint64_t *ret_bytes);

#endif

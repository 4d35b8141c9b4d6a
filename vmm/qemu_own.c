/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/qemu_own.h"

#include "base/cleanup.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* NULL without memory. always: also where the former name is not in it. */
static char *own_path(const struct qemu_own *own, const char *path, bool always)
{
    const char *slash = strrchr(path, '/'), *base = slash ? slash + 1 : path;
    const char *at = *own->former ? strstr(base, own->former) : NULL;
    char *made;
    if (at)
        return asprintf(&made, "%.*s%s%s", (int)(at - path), path, own->name, at + strlen(own->former)) < 0 ? NULL
                                                                                                            : made;
    if (!always)
        return strdup(path);
    return asprintf(&made, "%.*s%s-%s", (int)(base - path), path, own->name, base) < 0 ? NULL : made;
}

static bool is_listener(const struct qemu_props *p)
{
    return qemu_props_is_on(p, "server");
}

/* ---- -chardev ---- */

static bool makes_own(const struct qemu_own *own, const struct qemu_props *p, bool *ret_always)
{
    const char *backend = qemu_props_get(p, "backend");
    bool socket = backend && !strcmp(backend, "socket");
    *ret_always = backend && (!strcmp(backend, "file") || (socket && is_listener(p)));
    return *ret_always || (own->connects && (socket || (backend && !strcmp(backend, "pipe"))));
}

static int own_chardev(const struct qemu_own *own, struct qemu_argv *a, unsigned i, struct vm_error **err)
{
    cleanup_qemu_props struct qemu_props p = {0};
    const char *implied = qemu_option_implied_key(a->options[i].name);
    if (qemu_props_parse(a->options[i].value, implied, &p, err) < 0)
        return -1;
    bool always;
    const char *path = qemu_props_get(&p, "path");
    if (!path || !makes_own(own, &p, &always))
        return 0;
    cleanup_free char *fresh = own_path(own, path, always);
    if (!fresh || qemu_props_set(&p, "path", fresh, err) < 0)
        return fresh ? -1 : error_nomem(err);
    char *text = qemu_props_format(&p, implied);
    if (!text)
        return error_nomem(err);
    qemu_argv_set(a, i, text);
    return 0;
}

/* ---- "unix:PATH,server=on", "file:PATH": -qmp, -serial, -monitor and their like ---- */

/* Does it name what QEMU makes? VNC always listens. */
static bool text_is_made(const struct qemu_option *o, const char *options)
{
    cleanup_qemu_props struct qemu_props p = {0};
    if (!strncmp(o->value, "file:", 5) || !strcmp(o->name, "vnc"))
        return true;
    return !strncmp(o->value, "unix:", 5) && *options &&
           qemu_props_parse(options + 1, NULL, &p, NULL) == 0 && is_listener(&p);
}

static int own_text(const struct qemu_own *own, struct qemu_argv *a, unsigned i, struct vm_error **err)
{
    static const char *const prefixes[] = {"unix:", "file:", "pipe:"};
    const struct qemu_option *o = &a->options[i];
    for (size_t k = 0; k < sizeof(prefixes) / sizeof(*prefixes); k++) {
        size_t n = strlen(prefixes[k]);
        if (strncmp(o->value, prefixes[k], n))
            continue;
        const char *options = o->value + n + strcspn(o->value + n, ",");
        if (!own->connects && !text_is_made(o, options))
            return 0;
        cleanup_free char *path = strndup(o->value + n, (size_t)(options - o->value) - n);
        cleanup_free char *fresh = path ? own_path(own, path, true) : NULL;
        char *made;
        if (!fresh || asprintf(&made, "%s%s%s", prefixes[k], fresh, options) < 0)
            return error_nomem(err);
        qemu_argv_set(a, i, made);
        return 0;
    }
    return 0;
}

int qemu_own_option(const struct qemu_own *own, struct qemu_argv *a, unsigned i, struct vm_error **err)
{
    static const char *const texts[] = {"qmp", "qmp-pretty", "monitor", "serial", "parallel", "gdb", "vnc"};
    const struct qemu_option *o = &a->options[i];
    if (!o->value)
        return 0;
    if (!strcmp(o->name, "chardev"))
        return own_chardev(own, a, i, err);
    for (size_t k = 0; k < sizeof(texts) / sizeof(*texts); k++)
        if (!strcmp(o->name, texts[k]))
            return own_text(own, a, i, err);
    return 0;
}

int qemu_own_definition(const struct qemu_own *own, struct qemu_definition *d, struct vm_error **err)
{
    cleanup_qemu_argv struct qemu_argv a = {0};
    if (qemu_argv_parse(d->argv, &a, err) < 0)
        return -1;
    for (unsigned i = 0; i < a.n; i++)
        if (qemu_own_option(own, &a, i, err) < 0)
            return -1;
    char **argv = qemu_argv_format(&a);
    if (!argv)
        return error_nomem(err);
    free(d->argv);
    d->argv = argv;
    return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/rbd_name.h"

#include <stdio.h>
#include <string.h>

/* Copy up to one of `stops` (not escaped), which *at then stands on. False if it does not fit. */
static bool take_part(const char **at, const char *stops, char *out, size_t size)
{
    size_t n = 0;
    for (; **at && !strchr(stops, **at); ++*at) {
        if (**at == '\\' && (*at)[1])
            ++*at;
        if (n + 1 >= size)
            return false;
        out[n++] = **at;
    }
    out[n] = 0;
    return true;
}

static bool take_options(const char *at, struct rbd_name *name)
{
    while (*at == ':') {
        char option[512];
        at++;
        if (!take_part(&at, ":", option, sizeof(option)))
            return false;
        if (!strncmp(option, "conf=", 5) &&
            snprintf(name->conf, sizeof(name->conf), "%s", option + 5) >= (int)sizeof(name->conf))
            return false;
        if (!strncmp(option, "id=", 3) &&
            snprintf(name->user, sizeof(name->user), "%s", option + 3) >= (int)sizeof(name->user))
            return false;
    }
    return !*at;
}

static bool parse_plain(const char *at, struct rbd_name *name)
{
    if (!take_part(&at, "/", name->pool, sizeof(name->pool)) || *at != '/')
        return false;
    at++;
    if (!take_part(&at, "/@:", name->image, sizeof(name->image)))
        return false;
    if (*at == '/') {
        at++;
        memcpy(name->space, name->image, sizeof(name->space));
        if (!take_part(&at, "@:", name->image, sizeof(name->image)))
            return false;
    }
    if (*at == '@') {
        at++;
        if (!take_part(&at, ":", name->snapshot, sizeof(name->snapshot)))
            return false;
    }
    return *name->pool && *name->image && take_options(at, name);
}

static bool copy_prop(const struct qemu_props *p, const char *prefix, const char *key, char *out,
                      size_t size)
{
    char path[128];
    snprintf(path, sizeof(path), "%s%s", prefix, key);
    const char *value = qemu_props_get(p, path);
    return snprintf(out, size, "%s", value ? value : "") < (int)size;
}

bool rbd_name_from_props(const struct qemu_props *p, const char *prefix, struct rbd_name *ret)
{
    struct rbd_name name = {0};
    char driver[16];
    if (!copy_prop(p, prefix, "driver", driver, sizeof(driver)) || strcmp(driver, "rbd") ||
        !copy_prop(p, prefix, "pool", name.pool, sizeof(name.pool)) ||
        !copy_prop(p, prefix, "namespace", name.space, sizeof(name.space)) ||
        !copy_prop(p, prefix, "image", name.image, sizeof(name.image)) ||
        !copy_prop(p, prefix, "snapshot", name.snapshot, sizeof(name.snapshot)) ||
        !copy_prop(p, prefix, "conf", name.conf, sizeof(name.conf)) ||
        !copy_prop(p, prefix, "user", name.user, sizeof(name.user)) || !*name.pool || !*name.image)
        return false;
    *ret = name;
    return true;
}

bool rbd_name_parse(const char *filename, struct rbd_name *ret)
{
    struct rbd_name name = {0};
    if (!strncmp(filename, "rbd:", 4)) {
        if (!parse_plain(filename + 4, &name))
            return false;
        *ret = name;
        return true;
    }
    if (strncmp(filename, "json:", 5))
        return false;
    cleanup_qemu_props struct qemu_props p = {0};
    if (qemu_props_parse(filename + 5, NULL, &p, NULL) < 0 || !p.json)
        return false;
    return rbd_name_from_props(&p, "", ret) || rbd_name_from_props(&p, "file.", ret);
}

/* Append `before` and the text, with backslashes before what would end it; nothing if it is "". */
static bool append(char *out, size_t *at, const char *before, const char *text)
{
    size_t n = *at;
    if (!*text)
        return true;
    for (; *before && n + 1 < RBD_NAME_TEXT_MAX; before++)
        out[n++] = *before;
    for (; *text && n + 2 < RBD_NAME_TEXT_MAX; text++) {
        if (strchr("/@:\\", *text))
            out[n++] = '\\';
        out[n++] = *text;
    }
    out[n] = 0;
    *at = n;
    return !*before && !*text;
}

bool rbd_name_format(const struct rbd_name *name, char out[RBD_NAME_TEXT_MAX])
{
    size_t at = 0;
    return append(out, &at, "rbd:", name->pool) && append(out, &at, "/", name->space) &&
           append(out, &at, "/", name->image) && append(out, &at, "@", name->snapshot) &&
           append(out, &at, ":id=", name->user) && append(out, &at, ":conf=", name->conf);
}

bool rbd_name_equal(const struct rbd_name *a, const struct rbd_name *b)
{
    return !strcmp(a->pool, b->pool) && !strcmp(a->space, b->space) &&
           !strcmp(a->image, b->image) && !strcmp(a->snapshot, b->snapshot);
}

bool rbd_name_same_file(const char *a, const char *b)
{
    struct rbd_name x, y;
    return !strcmp(a, b) || (rbd_name_parse(a, &x) && rbd_name_parse(b, &y) && rbd_name_equal(&x, &y) &&
                             (!*x.conf || !*y.conf || !strcmp(x.conf, y.conf)));
}

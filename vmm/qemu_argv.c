/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/qemu_argv.h"

#include "base/bytes.h"
#include "base/cleanup.h"

#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Options without a value, of QEMU 7.2 to 10.x. */
static const char *const flags[] = {
    "S",
    "async-teardown",
    "audio-help",
    "daemonize",
    "enable-kvm",
    "enable-sync-profile",
    "full-screen",
    "h",
    "help",
    "mem-prealloc",
    "no-acpi",
    "no-fd-bootchk",
    "no-hpet",
    "no-reboot",
    "no-shutdown",
    "no-user-config",
    "nodefaults",
    "nographic",
    "old-param",
    "only-migratable",
    "portrait",
    "preconfig",
    "s",
    "semihosting",
    "singlestep",
    "snapshot",
    "usb",
    "version",
    "win2k-hack",
    "xen-attach",
    "xen-domid-restrict",
};

/* Options with a value, and the key of a value's first part that has none. */
static const struct {
    const char *name, *implied_key;
} valued[] = {
    {"accel", "accel"},
    {"acpitable", NULL},
    {"action", NULL},
    {"add-fd", NULL},
    {"append", NULL},
    {"audio", "driver"},
    {"audiodev", "driver"},
    {"bios", NULL},
    {"blockdev", "driver"},
    {"boot", "order"},
    {"cdrom", NULL},
    {"chardev", "backend"},
    {"chroot", NULL},
    {"compat", NULL},
    {"cpu", NULL},
    {"D", NULL},
    {"d", NULL},
    {"debugcon", NULL},
    {"device", "driver"},
    {"dfilter", NULL},
    {"display", "type"},
    {"drive", NULL},
    {"dtb", NULL},
    {"dump-vmstate", NULL},
    {"echr", NULL},
    {"fda", NULL},
    {"fdb", NULL},
    {"fsdev", "fsdriver"},
    {"fw_cfg", "name"},
    {"g", NULL},
    {"gdb", NULL},
    {"global", "driver"},
    {"hda", NULL},
    {"hdb", NULL},
    {"hdc", NULL},
    {"hdd", NULL},
    {"icount", "shift"},
    {"incoming", NULL},
    {"initrd", NULL},
    {"iscsi", NULL},
    {"k", NULL},
    {"kernel", NULL},
    {"L", NULL},
    {"loadvm", NULL},
    {"m", "size"},
    {"machine", "type"},
    {"mem-path", NULL},
    {"mon", "chardev"},
    {"monitor", NULL},
    {"msg", NULL},
    {"mtdblock", NULL},
    {"name", "guest"},
    {"net", "type"},
    {"netdev", "type"},
    {"nic", "type"},
    {"numa", "type"},
    {"object", "qom-type"},
    {"option-rom", "romfile"},
    {"overcommit", NULL},
    {"parallel", NULL},
    {"pflash", NULL},
    {"pidfile", NULL},
    {"plugin", "file"},
    {"prom-env", NULL},
    {"qmp", NULL},
    {"qmp-pretty", NULL},
    {"qtest", NULL},
    {"qtest-log", NULL},
    {"readconfig", NULL},
    {"rotate", NULL},
    {"rtc", "base"},
    {"run-with", NULL},
    {"runas", NULL},
    {"sandbox", "enable"},
    {"sd", NULL},
    {"seed", NULL},
    {"semihosting-config", "enable"},
    {"serial", NULL},
    {"set", NULL},
    {"shim", NULL},
    {"smbios", NULL},
    {"smp", "cpus"},
    {"spice", NULL},
    {"tpmdev", "type"},
    {"trace", "enable"},
    {"usbdevice", NULL},
    {"uuid", NULL},
    {"vga", NULL},
    {"virtfs", "fsdriver"},
    {"vnc", "vnc"},
    {"watchdog-action", NULL},
    {"xen-domid", NULL},
};

static const struct {
    const char *alias, *name;
} aliases[] = {{"M", "machine"}};

static bool is_flag(const char *name)
{
    for (size_t i = 0; i < sizeof(flags) / sizeof(*flags); i++)
        if (!strcmp(flags[i], name))
            return true;
    return false;
}

static bool is_valued(const char *name)
{
    for (size_t i = 0; i < sizeof(valued) / sizeof(*valued); i++)
        if (!strcmp(valued[i].name, name))
            return true;
    return false;
}

const char *qemu_option_implied_key(const char *name)
{
    for (size_t i = 0; i < sizeof(valued) / sizeof(*valued); i++)
        if (!strcmp(valued[i].name, name))
            return valued[i].implied_key;
    return NULL;
}

/* The command line. */

/* Room for one more element of `size` in an array; false without memory. */
static bool grow(void **list, unsigned n, unsigned *cap, size_t size)
{
    if (n < *cap)
        return true;
    unsigned more = *cap ? *cap * 2 : 16;
    void *bigger = realloc(*list, more * size);
    if (!bigger)
        return false;
    *list = bigger;
    *cap = more;
    return true;
}

int qemu_argv_add(struct qemu_argv *a, const char *name, const char *value, struct vm_error **err)
{
    cleanup_free char *n = strdup(name);
    cleanup_free char *v = value ? strdup(value) : NULL;
    if (!n || (value && !v) || !grow((void **)&a->options, a->n, &a->cap, sizeof(*a->options)))
        return error_nomem(err);
    a->options[a->n++] = (struct qemu_option){steal_ptr(&n), steal_ptr(&v)};
    return 0;
}

void qemu_argv_remove(struct qemu_argv *a, unsigned index)
{
    free(a->options[index].name);
    free(a->options[index].value);
    a->n--;
    memmove(&a->options[index], &a->options[index + 1], (a->n - index) * sizeof(*a->options));
}

void qemu_argv_set(struct qemu_argv *a, unsigned index, char *value)
{
    free(a->options[index].value);
    a->options[index].value = value;
}

void qemu_argv_finish(struct qemu_argv *a)
{
    while (a->n)
        qemu_argv_remove(a, a->n - 1);
    free(a->options);
    free(a->program);
    *a = (struct qemu_argv){0};
}

static const char *canonical_name(const char *name)
{
    for (size_t i = 0; i < sizeof(aliases) / sizeof(*aliases); i++)
        if (!strcmp(aliases[i].alias, name))
            return aliases[i].name;
    return name;
}

/* One option at *at; moves *at behind it. */
static int parse_option(char *const **at, struct qemu_argv *a, struct vm_error **err)
{
    const char *arg = *(*at)++;
    if (arg[0] != '-')
        return qemu_argv_add(a, "", arg, err);
    const char *name = canonical_name(arg + (arg[1] == '-' ? 2 : 1));
    if (is_flag(name))
        return qemu_argv_add(a, name, NULL, err);
    if (!is_valued(name))
        return error_set(err, VM_ERROR_REFUSED,
                         "the command line has the option %s, which vmmig does not know", arg);
    if (!**at)
        return error_set(err, VM_ERROR_USAGE, "the option %s has no value", arg);
    return qemu_argv_add(a, name, *(*at)++, err);
}

int qemu_argv_parse(char *const *argv, struct qemu_argv *ret_argv, struct vm_error **err)
{
    if (!argv[0])
        return error_set(err, VM_ERROR_USAGE, "the command line is empty");
    cleanup_qemu_argv struct qemu_argv a = {.program = strdup(argv[0])};
    if (!a.program)
        return error_nomem(err);
    for (char *const *at = argv + 1; *at;)
        if (parse_option(&at, &a, err) < 0)
            return -1;
    *ret_argv = a;
    a = (struct qemu_argv){0};
    return 0;
}

char **qemu_argv_format(const struct qemu_argv *a)
{
    size_t count = 2, bytes = strlen(a->program) + 1;
    for (unsigned i = 0; i < a->n; i++) {
        const struct qemu_option *o = &a->options[i];
        count += 2;
        bytes += strlen(o->name) + 2 + (o->value ? strlen(o->value) + 1 : 0);
    }
    char **argv = malloc(count * sizeof(*argv) + bytes);
    if (!argv)
        return NULL;
    char *text = (char *)(argv + count), **out = argv;
    *out++ = text;
    text = stpcpy(text, a->program) + 1;
    for (unsigned i = 0; i < a->n; i++) {
        const struct qemu_option *o = &a->options[i];
        if (*o->name) {
            *out++ = text;
            *text = '-';
            text = stpcpy(text + 1, o->name) + 1;
        }
        if (o->value) {
            *out++ = text;
            text = stpcpy(text, o->value) + 1;
        }
    }
    *out = NULL;
    return argv;
}

/* Properties. */

static int add_prop(struct qemu_props *p, const char *key, size_t key_len, const char *value,
                    struct vm_error **err)
{
    cleanup_free char *k = strndup(key, key_len);
    cleanup_free char *v = strdup(value);
    if (!k || !v || !grow((void **)&p->list, p->n, &p->cap, sizeof(*p->list)))
        return error_nomem(err);
    p->list[p->n++] = (struct qemu_prop){steal_ptr(&k), steal_ptr(&v)};
    return 0;
}

void qemu_props_finish(struct qemu_props *p)
{
    for (unsigned i = 0; i < p->n; i++) {
        free(p->list[i].key);
        free(p->list[i].value);
    }
    free(p->list);
    *p = (struct qemu_props){0};
}

const char *qemu_props_get(const struct qemu_props *p, const char *key)
{
    for (unsigned i = p->n; i-- > 0;)
        if (!strcmp(p->list[i].key, key))
            return p->list[i].value;
    return NULL;
}

void qemu_props_remove(struct qemu_props *p, const char *key)
{
    unsigned kept = 0;
    for (unsigned i = 0; i < p->n; i++) {
        if (strcmp(p->list[i].key, key)) {
            p->list[kept++] = p->list[i];
            continue;
        }
        free(p->list[i].key);
        free(p->list[i].value);
    }
    p->n = kept;
}

int qemu_props_set(struct qemu_props *p, const char *key, const char *value, struct vm_error **err)
{
    cleanup_free char *copy = strdup(value);
    if (!copy)
        return error_nomem(err);
    for (unsigned i = p->n; i-- > 0;)
        if (!strcmp(p->list[i].key, key)) {
            free(p->list[i].value);
            p->list[i].value = steal_ptr(&copy);
            return 0;
        }
    return add_prop(p, key, strlen(key), value, err);
}

bool qemu_props_is_on(const struct qemu_props *p, const char *key)
{
    const char *v = qemu_props_get(p, key);
    return v && (!strcmp(v, "on") || !strcmp(v, "yes") || !strcmp(v, "true") || !strcmp(v, "y"));
}

/* A value up to a comma that is not doubled, NUL behind it; *at moves behind that comma. */
static int take_value(const char **at, struct buffer *value, struct vm_error **err)
{
    const char *c = *at;
    for (; *c && (*c != ',' || c[1] == ','); c++) {
        buffer_put_u8(value, (uint8_t)*c);
        c += *c == ',';
    }
    *at = *c ? c + 1 : c;
    buffer_put_u8(value, 0);
    return value->failed ? error_nomem(err) : 0;
}

/* One "key=value", a lone "key", or, where a key is implied, a lone value: as QEMU tells them
 * apart. */
static int parse_prop(const char **at, const char *implied_key, struct qemu_props *p,
                      struct vm_error **err)
{
    cleanup_buffer struct buffer value = {0};
    const char *key = *at;
    size_t key_len = strcspn(key, "=,");
    if (key[key_len] != '=' && implied_key) {
        if (take_value(at, &value, err) < 0)
            return -1;
        return add_prop(p, implied_key, strlen(implied_key), (const char *)value.data, err);
    }
    if (!key_len)
        return error_set(err, VM_ERROR_USAGE, "malformed option in the command line: %.80s", key);
    *at = key + key_len + (key[key_len] != 0);
    if (key[key_len] != '=')
        return add_prop(p, key, key_len, "on", err);
    if (take_value(at, &value, err) < 0)
        return -1;
    return add_prop(p, key, key_len, (const char *)value.data, err);
}

static int add_json(struct qemu_props *p, const char *prefix, const json_t *value,
                    struct vm_error **err);

static int add_json_member(struct qemu_props *p, const char *prefix, const char *key,
                           const json_t *value, struct vm_error **err)
{
    char *path;
    if (asprintf(&path, "%s%s%s", prefix, *prefix ? "." : "", key) < 0)
        return error_nomem(err);
    cleanup_free char *owned = path;
    return add_json(p, owned, value, err);
}

static int add_json(struct qemu_props *p, const char *prefix, const json_t *value,
                    struct vm_error **err)
{
    char text[64];
    const char *key;
    json_t *member;
    size_t i;
    switch (json_typeof(value)) {
    case JSON_OBJECT:
        json_object_foreach((json_t *)(uintptr_t)value, key,
                            member) if (add_json_member(p, prefix, key, member, err) < 0) return -1;
        return 0;
    case JSON_ARRAY:
        json_array_foreach(value, i, member)
        {
            snprintf(text, sizeof(text), "%zu", i);
            if (add_json_member(p, prefix, text, member, err) < 0)
                return -1;
        }
        return 0;
    case JSON_STRING:
        return add_prop(p, prefix, strlen(prefix), json_string_value(value), err);
    case JSON_INTEGER:
        snprintf(text, sizeof(text), "%lld", (long long)json_integer_value(value));
        return add_prop(p, prefix, strlen(prefix), text, err);
    case JSON_REAL:
        snprintf(text, sizeof(text), "%.17g", json_real_value(value));
        return add_prop(p, prefix, strlen(prefix), text, err);
    case JSON_TRUE:
        return add_prop(p, prefix, strlen(prefix), "on", err);
    case JSON_FALSE:
        return add_prop(p, prefix, strlen(prefix), "off", err);
    case JSON_NULL:
        return add_prop(p, prefix, strlen(prefix), "", err);
    }
    return 0;
}

int qemu_props_parse(const char *text, const char *implied_key, struct qemu_props *ret_props,
                     struct vm_error **err)
{
    cleanup_qemu_props struct qemu_props p = {0};
    if (text[0] == '{') {
        json_error_t where;
        json_t *j = json_loads(text, 0, &where);
        int rc =
            j ? add_json(&p, "", j, err)
              : error_set(err, VM_ERROR_USAGE, "malformed JSON in the command line: %.80s", text);
        json_decref(j);
        if (rc < 0)
            return -1;
        p.json = true;
    } else {
        for (const char *at = text; *at; implied_key = NULL)
            if (parse_prop(&at, implied_key, &p, err) < 0)
                return -1;
    }
    *ret_props = p;
    p = (struct qemu_props){0};
    return 0;
}

static void put_escaped(struct buffer *out, const char *value)
{
    for (; *value; value++) {
        buffer_put_u8(out, (uint8_t)*value);
        if (*value == ',')
            buffer_put_u8(out, ',');
    }
}

static void put_prop(struct buffer *out, const char *key, const char *value)
{
    if (out->len)
        buffer_put_u8(out, ',');
    if (key) {
        buffer_put(out, key, strlen(key));
        buffer_put_u8(out, '=');
    }
    put_escaped(out, value);
}

char *qemu_props_format(const struct qemu_props *p, const char *implied_key)
{
    cleanup_buffer struct buffer out = {0};
    const char *first = implied_key ? qemu_props_get(p, implied_key) : NULL;
    /* What would be read as something else keeps its key. */
    bool bare = first && *first && *first != '{' && first[strcspn(first, "=,")] != '=';
    if (first)
        put_prop(&out, bare ? NULL : implied_key, first);
    for (unsigned i = 0; i < p->n; i++)
        if (!first || strcmp(p->list[i].key, implied_key))
            put_prop(&out, p->list[i].key, p->list[i].value);
    buffer_put_u8(&out, 0);
    return out.failed ? NULL : (char *)steal_ptr(&out.data);
}

bool qemu_size_parse(const char *text, uint64_t unit, uint64_t *ret_bytes)
{
    static const char suffixes[] = "BKMGTPE";
    if (text[0] < '0' || text[0] > '9')
        return false;
    char *end;
    errno = 0;
    bool hex = text[0] == '0' && (text[1] == 'x' || text[1] == 'X');
    unsigned long long whole = strtoull(text, &end, hex ? 16 : 10);
    double fraction = 0;
    if (*end == '.' && !hex)
        fraction = strtod(end, &end);
    if (errno)
        return false;
    if (*end) {
        const char *suffix = strchr(suffixes, *end >= 'a' && *end <= 'z' ? *end - 32 : *end);
        if (!suffix || end[1])
            return false;
        unit = 1ULL << (10 * (suffix - suffixes));
    }
    if (unit && whole > UINT64_MAX / unit)
        return false;
    *ret_bytes = whole * unit + (uint64_t)(fraction * (double)unit);
    return true;
}

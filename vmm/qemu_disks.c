/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/qemu_disks.h"

#include "base/cleanup.h"
#include "vmm/qemu_disk_move.h"
#include "vmm/qemu_inspect.h"
#include "vmm/qmp.h"
#include "vmm/rbd_name.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum kind { KIND_LAYER, KIND_PATH, KIND_OTHER, KIND_NONE, KIND_REFUSED };

/* Block drivers: layers over others, and the ends, where data is. */
static const struct {
    const char *driver;
    enum kind kind;
} drivers[] = {
    {"raw", KIND_LAYER},          {"qcow2", KIND_LAYER},       {"qcow", KIND_LAYER},
    {"qed", KIND_LAYER},          {"vmdk", KIND_LAYER},        {"vdi", KIND_LAYER},
    {"vhdx", KIND_LAYER},         {"vpc", KIND_LAYER},         {"luks", KIND_LAYER},
    {"parallels", KIND_LAYER},    {"dmg", KIND_LAYER},         {"bochs", KIND_LAYER},
    {"cloop", KIND_LAYER},        {"throttle", KIND_LAYER},    {"copy-on-read", KIND_LAYER},
    {"quorum", KIND_LAYER},       {"preallocate", KIND_LAYER}, {"blkdebug", KIND_LAYER},
    {"blklogwrites", KIND_LAYER}, {"blkreplay", KIND_LAYER},   {"blkverify", KIND_LAYER},
    {"file", KIND_PATH},          {"host_device", KIND_PATH},  {"host_cdrom", KIND_PATH},
    {"rbd", KIND_OTHER},          {"nbd", KIND_OTHER},         {"iscsi", KIND_OTHER},
    {"nfs", KIND_OTHER},          {"http", KIND_OTHER},        {"https", KIND_OTHER},
    {"ftp", KIND_OTHER},          {"ftps", KIND_OTHER},        {"ssh", KIND_OTHER},
    {"gluster", KIND_OTHER},      {"null-co", KIND_NONE},      {"null-aio", KIND_NONE},
};

static enum kind kind_of(const char *driver)
{
    for (size_t i = 0; i < sizeof(drivers) / sizeof(*drivers); i++)
        if (!strcmp(drivers[i].driver, driver))
            return drivers[i].kind;
    return KIND_REFUSED;
}

static bool is_image_option(const char *name)
{
    static const char *const names[] = {"",    "fda",   "fdb",    "hda",      "hdb", "hdc",
                                        "hdd", "cdrom", "pflash", "mtdblock", "sd"};
    for (size_t i = 0; i < sizeof(names) / sizeof(*names); i++)
        if (!strcmp(names[i], name))
            return true;
    return false;
}

static const char *without_protocol(const char *file)
{
    return strncmp(file, "file:", 5) ? file : file + 5;
}

/* Absolute, without "." components and doubled slashes; ".." stays. False without memory or room.
 */
static bool normal_path(const char *cwd, const char *file, char out[QEMU_STRING_MAX])
{
    char whole[QEMU_STRING_MAX];
    file = without_protocol(file);
    int n = *file == '/' ? snprintf(whole, sizeof(whole), "%s", file)
                         : snprintf(whole, sizeof(whole), "%s/%s", cwd, file);
    if (n >= (int)sizeof(whole))
        return false;
    size_t len = 0;
    for (const char *at = whole; *at;) {
        size_t part = strcspn(at, "/");
        if (part && !(part == 1 && *at == '.')) {
            out[len++] = '/';
            memcpy(out + len, at, part);
            len += part;
        }
        at += part + (at[part] == '/');
    }
    out[len] = 0;
    return true;
}

/* What of the command line is being looked for, or at. */
struct search {
    const struct qemu_definition *d; /* for its cwd */
    const char *file, *driver, *node;
    bool found;
};

static void match_text(struct search *s, const char *text)
{
    char a[QEMU_STRING_MAX], b[QEMU_STRING_MAX];
    if (kind_of(s->driver) == KIND_PATH)
        s->found |=
            normal_path(s->d->cwd, text, a) && normal_path(s->d->cwd, s->file, b) && !strcmp(a, b);
    else
        s->found |= !strcmp(text, s->file);
    struct rbd_name x, y;
    s->found |= rbd_name_parse(text, &x) && rbd_name_parse(s->file, &y) && rbd_name_equal(&x, &y);
}

static bool is_last_part(const char *key, const char *part)
{
    const char *dot = strrchr(key, '.');
    return !strcmp(dot ? dot + 1 : key, part);
}

/* The file that a property names, or NULL. */
static const char *prop_file(const char *option, const struct qemu_prop *prop)
{
    if (is_last_part(prop->key, "filename"))
        return prop->value;
    return !strcmp(option, "drive") && !strcmp(prop->key, "file") && *prop->value ? prop->value
                                                                                  : NULL;
}

static void match_rbd(struct search *s, const struct qemu_props *p, const char *driver_key)
{
    char prefix[128];
    struct rbd_name x, y;
    snprintf(prefix, sizeof(prefix), "%.*s", (int)(strlen(driver_key) - strlen("driver")),
             driver_key);
    s->found |=
        rbd_name_from_props(p, prefix, &x) && rbd_name_parse(s->file, &y) && rbd_name_equal(&x, &y);
}

static int match_props(struct search *s, const char *option, const struct qemu_props *p,
                       struct vm_error **err)
{
    for (unsigned i = 0; i < p->n; i++) {
        const char *file = prop_file(option, &p->list[i]);
        if (file && !strncmp(file, "json:", 5)) {
            cleanup_qemu_props struct qemu_props inner = {0};
            if (qemu_props_parse(file + 5, NULL, &inner, err) < 0 ||
                match_props(s, "blockdev", &inner, err) < 0)
                return -1;
        }
        if (file)
            match_text(s, file);
        if (is_last_part(p->list[i].key, "driver"))
            match_rbd(s, p, p->list[i].key);
        /* Where file names cannot be compared, a node of the command line is known by its name. */
        if (is_last_part(p->list[i].key, "node-name") && kind_of(s->driver) != KIND_PATH)
            s->found |= !strcmp(p->list[i].value, s->node);
    }
    return 0;
}

static int match_option(struct search *s, const struct qemu_option *o, struct vm_error **err)
{
    if (is_image_option(o->name)) {
        match_text(s, o->value);
        return 0;
    }
    if (strcmp(o->name, "drive") && strcmp(o->name, "blockdev"))
        return 0;
    cleanup_qemu_props struct qemu_props p = {0};
    if (qemu_props_parse(o->value, qemu_option_implied_key(o->name), &p, err) < 0)
        return -1;
    return match_props(s, o->name, &p, err);
}

static int is_on_command_line(const struct qemu_argv *argv, struct search *s, struct vm_error **err)
{
    for (unsigned i = 0; i < argv->n && !s->found; i++)
        if (match_option(s, &argv->options[i], err) < 0)
            return -1;
    return s->found;
}

/* The graph. */

/* Which disk of the guest has this file: its image, or an image behind it. */
static const json_t *find_backend(const json_t *backends, const char *file, bool *ret_behind)
{
    size_t i;
    json_t *b;
    json_array_foreach((json_t *)(uintptr_t)backends, i, b)
    {
        const json_t *inserted = json_object_get(b, "inserted");
        const json_t *image = json_object_get(inserted, "image");
        *ret_behind = false;
        if (rbd_name_same_file(qmp_string(inserted, "file"), file))
            return b;
        for (; image; image = json_object_get(image, "backing-image"), *ret_behind = true)
            if (rbd_name_same_file(qmp_string(image, "filename"), file))
                return b;
    }
    return NULL;
}

/* What the user calls the disk. */
static void name_disk(const json_t *backend, const char *node, const char *file, char out[256])
{
    static const char peripheral[] = "/machine/peripheral/";
    const char *device = qmp_string(backend, "device");
    const char *qdev = qmp_string(backend, "qdev");
    if (*device)
        snprintf(out, 256, "%s", device);
    else if (!strncmp(qdev, peripheral, strlen(peripheral)))
        snprintf(out, 256, "%.*s", (int)strcspn(qdev + strlen(peripheral), "/"),
                 qdev + strlen(peripheral));
    else
        snprintf(out, 256, "%s", *node && *node != '#' ? node : *qdev ? qdev : file);
}

/* The file of the disk's chain that the command line does name; "" if none. */
static int find_stale(const struct qemu_argv *argv, const struct qemu_definition *d,
                      const json_t *backend, const char **ret_file, struct vm_error **err)
{
    const json_t *image = json_object_get(json_object_get(backend, "inserted"), "image");
    *ret_file = "";
    for (; image; image = json_object_get(image, "backing-image")) {
        struct search s = {d, qmp_string(image, "filename"), "file", "", false};
        int found = is_on_command_line(argv, &s, err);
        if (found < 0)
            return -1;
        if (found) {
            *ret_file = s.file;
            return 0;
        }
    }
    return 0;
}

static int refuse_stale(const struct qemu_argv *argv, const struct qemu_definition *d,
                        const json_t *backend, const struct qemu_disk *disk, struct vm_error **err)
{
    const char *stale;
    if (find_stale(argv, d, backend, &stale, err) < 0)
        return -1;
    if (*stale)
        return error_set(
            err, VM_ERROR_REFUSED,
            "disk %s: the command line names %s, but the VM runs on %s (a snapshot taken "
            "since it started?): prepare the destination yourself and name it with "
            "--dest-qmp",
            disk->name, stale, disk->file);
    return error_set(
        err, VM_ERROR_REFUSED,
        "disk %s: the VM has %s open, which its command line does not name (plugged or "
        "changed since it started?): prepare the destination yourself and name it with "
        "--dest-qmp",
        disk->name, disk->file);
}

/* See qemu_disk.device. */
static const char *device_of(const json_t *backend)
{
    static const char named[] = "/machine/peripheral";
    const char *qdev = qmp_string(backend, "qdev"), *drive = qmp_string(backend, "device");
    return strncmp(qdev, named, strlen(named)) && *drive ? drive : qdev;
}

static int fill_disk(struct qemu_disk *disk, const json_t *node, const json_t *backend,
                     struct vm_error **err)
{
    char name[256];
    const char *file = qmp_string(node, "file");
    const json_t *inserted = json_object_get(backend, "inserted");
    bool top = rbd_name_same_file(qmp_string(inserted, "file"), file);
    name_disk(backend, qmp_string(node, "node-name"), file, name);
    disk->writable = !qmp_bool(node, "ro");
    disk->cached = !qmp_bool(json_object_get(node, "cache"), "direct");
    return qemu_set_text(&disk->name, name, err) < 0 ||
                   qemu_set_text(&disk->node, qmp_string(node, "node-name"), err) < 0 ||
                   qemu_set_text(&disk->file, file, err) < 0 ||
                   qemu_set_text(&disk->driver, qmp_string(node, "drv"), err) < 0 ||
                   qemu_set_text(&disk->format, top ? qmp_string(inserted, "drv") : "", err) < 0 ||
                   qemu_set_text(&disk->device, device_of(backend), err) < 0
               ? -1
               : 0;
}

static int take_node(const json_t *node, const json_t *backends, struct qemu_definition *d,
                     struct vm_error **err)
{
    const char *driver = qmp_string(node, "drv"), *file = qmp_string(node, "file");
    enum kind kind = kind_of(driver);
    if (kind == KIND_LAYER || kind == KIND_NONE)
        return 0;
    if (kind == KIND_REFUSED)
        return error_set(err, VM_ERROR_REFUSED,
                         "block node %s has the driver '%s', which vmmig cannot move",
                         qmp_string(node, "node-name"), driver);
    if (d->n_disks == QEMU_DISKS_MAX)
        return error_set(err, VM_ERROR_REFUSED, "the VM has more than %d disks", QEMU_DISKS_MAX);
    struct qemu_disk *disk = qemu_definition_add_disk(d);
    if (!disk)
        return error_nomem(err);
    bool behind = false;
    const json_t *backend = find_backend(backends, file, &behind);
    if (fill_disk(disk, node, backend, err) < 0)
        return -1;
    disk->backing = behind && !disk->writable;
    return 0;
}

int qemu_disks_list(const json_t *nodes, const json_t *backends, struct qemu_definition *d,
                    struct vm_error **err)
{
    size_t i;
    json_t *node;
    json_array_foreach((json_t *)(uintptr_t)nodes, i,
                       node) if (take_node(node, backends, d, err) < 0) return -1;
    return 0;
}

static int check_named(const struct qemu_argv *argv, const struct qemu_disk *disk,
                       const json_t *backends, const struct qemu_definition *d,
                       struct vm_error **err)
{
    bool behind;
    struct search s = {d, disk->file, disk->driver, disk->node, false};
    int found = disk->backing /* the image names it */ ? 1 : is_on_command_line(argv, &s, err);
    if (found)
        return found < 0 ? -1 : 0;
    return refuse_stale(argv, d, find_backend(backends, disk->file, &behind), disk, err);
}

/* The other direction: files of the command line that the VM has not open. */

static int check_open(const struct qemu_definition *d, const char *file, struct vm_error **err)
{
    char a[QEMU_STRING_MAX], b[QEMU_STRING_MAX];
    if (!strncmp(file, "json:", 5))
        return 0; /* compared member by member where the VM has it open */
    for (unsigned i = 0; i < d->n_disks; i++) {
        if (!strcmp(d->disks[i].file, file))
            return 0;
        if (kind_of(d->disks[i].driver) == KIND_PATH && normal_path(d->cwd, file, a) &&
            normal_path(d->cwd, d->disks[i].file, b) && !strcmp(a, b))
            return 0;
        struct rbd_name x, y;
        if (rbd_name_parse(file, &x) && rbd_name_parse(d->disks[i].file, &y) &&
            rbd_name_equal(&x, &y))
            return 0;
    }
    return error_set(
        err, VM_ERROR_REFUSED,
        "the command line names %s, which the VM has not open any more (a medium ejected "
        "or a disk unplugged?): prepare the destination yourself and name it with "
        "--dest-qmp",
        file);
}

static int check_option_open(const struct qemu_definition *d, const struct qemu_option *o,
                             struct vm_error **err)
{
    if (is_image_option(o->name))
        return check_open(d, o->value, err);
    if (strcmp(o->name, "drive") && strcmp(o->name, "blockdev"))
        return 0;
    cleanup_qemu_props struct qemu_props p = {0};
    if (qemu_props_parse(o->value, qemu_option_implied_key(o->name), &p, err) < 0)
        return -1;
    for (unsigned i = 0; i < p.n; i++) {
        const char *file = prop_file(o->name, &p.list[i]);
        if (file && check_open(d, file, err) < 0)
            return -1;
    }
    return 0;
}

int qemu_disks_compare(const struct qemu_argv *argv, const json_t *backends,
                       const struct qemu_definition *d, struct vm_error **err)
{
    for (unsigned i = 0; i < d->n_disks; i++)
        if (check_named(argv, &d->disks[i], backends, d, err) < 0)
            return -1;
    for (unsigned k = 0; k < argv->n; k++)
        if (check_option_open(d, &argv->options[k], err) < 0)
            return -1;
    return 0;
}

/* ---- the same disks, later ---- */

static bool is_same_node(const struct qemu_disk *a, const struct qemu_disk *b)
{
    return !strcmp(a->node, b->node) && !strcmp(a->file, b->file) &&
           !strcmp(a->driver, b->driver) && a->writable == b->writable;
}

static bool has_node(const struct qemu_definition *d, const struct qemu_disk *disk)
{
    for (unsigned i = 0; i < d->n_disks; i++)
        if (is_same_node(&d->disks[i], disk))
            return true;
    return false;
}

int qemu_disks_check_same(const struct qemu_definition *before, const struct qemu_definition *now,
                          struct vm_error **err)
{
    for (unsigned i = 0; i < now->n_disks; i++)
        if (!has_node(before, &now->disks[i]))
            return error_set(err, VM_ERROR_REFUSED,
                             "disk %s was changed while the VM was copied: it has %s open now, for "
                             "%s (a snapshot?)",
                             now->disks[i].name, now->disks[i].file,
                             now->disks[i].writable ? "writing" : "reading");
    for (unsigned i = 0; i < before->n_disks; i++)
        if (!has_node(now, &before->disks[i]))
            return error_set(err, VM_ERROR_REFUSED,
                             "disk %s was changed while the VM was copied: it has %s no longer open",
                             before->disks[i].name, before->disks[i].file);
    return 0;
}

/* ---- the same disks in another QEMU ---- */

/* How many files of that device does it write? A disk of several images has some of them beside the
 * first. */
static unsigned count_of_device(const struct qemu_definition *d, const char *device)
{
    unsigned n = 0;
    for (unsigned i = 0; i < d->n_disks; i++)
        n += d->disks[i].writable && d->disks[i].device && !strcmp(d->disks[i].device, device);
    return n;
}

static bool is_same_name(const struct qemu_definition *d, const struct qemu_disk *disk,
                         const struct qemu_definition *here, const struct qemu_disk *candidate)
{
    char a[QEMU_STRING_MAX], b[QEMU_STRING_MAX];
    if (kind_of(disk->driver) == KIND_PATH)
        return normal_path(d->cwd, disk->file, a) && normal_path(here->cwd, candidate->file, b) &&
               !strcmp(a, b);
    return rbd_name_same_file(disk->file, candidate->file);
}

/* By its device; a file of which no device tells, or one of several of a device, by its name. */
static struct qemu_disk *find_counterpart(const struct qemu_definition *d,
                                          const struct qemu_disk *disk,
                                          const struct qemu_definition *here)
{
    const char *device = disk->device ? disk->device : "";
    bool one = *device && count_of_device(d, device) == 1 && count_of_device(here, device) == 1;
    for (unsigned i = 0; i < here->n_disks; i++) {
        struct qemu_disk *k = &here->disks[i];
        if (k->writable && !strcmp(k->device, device) && (one || is_same_name(d, disk, here, k)))
            return k;
    }
    return NULL;
}

int qemu_disks_pair(const struct qemu_definition *d, const struct qemu_definition *here,
                    unsigned *ret_pairs, struct vm_error **err)
{
    bool used[QEMU_DISKS_MAX] = {false};
    for (unsigned i = 0; i < d->n_disks; i++) {
        const struct qemu_disk *disk = &d->disks[i];
        if (!disk->writable)
            continue;
        const struct qemu_disk *found = find_counterpart(d, disk, here);
        if (!found || used[found - here->disks])
            return error_set(
                err, VM_ERROR_REFUSED,
                "disk %s (%s): the QEMU that was prepared has no such disk open for writing",
                disk->name, disk->file);
        ret_pairs[i] = (unsigned)(found - here->disks);
        used[found - here->disks] = true;
    }
    for (unsigned i = 0; i < here->n_disks; i++)
        if (here->disks[i].writable && !used[i])
            return error_set(err, VM_ERROR_REFUSED,
                             "disk %s: the QEMU that was prepared has %s open for writing, which "
                             "is no disk of the VM",
                             here->disks[i].name, here->disks[i].file);
    return 0;
}

/* ---- another place for a disk ---- */

struct move {
    const struct qemu_definition *d;
    const struct qemu_disk *disk;
    const char *to;
    struct rbd_name from_rbd, to_rbd; /* pool "": it is a path */
    unsigned moved;
};

static bool is_path_to_path(const struct move *m)
{
    return !*m->from_rbd.pool && !*m->to_rbd.pool;
}

static bool names_disk(const struct move *m, const char *file)
{
    char a[QEMU_STRING_MAX], b[QEMU_STRING_MAX];
    struct rbd_name name;
    if (*m->from_rbd.pool)
        return !strncmp(file, "rbd:", 4) && rbd_name_parse(file, &name) &&
               rbd_name_equal(&name, &m->from_rbd);
    return normal_path(m->d->cwd, file, a) && normal_path(m->d->cwd, m->disk->file, b) && !strcmp(a, b);
}

/* Of a node that has a file or an image open: what says which, and how that kind is opened. */
static bool is_of_place(const char *member)
{
    static const char *const names[] = {
        "filename", "aio",      "locking", "pr-manager", "drop-cache", "x-check-cache-dropped", "aio-max-batch",
        "pool",     "namespace", "image",  "snapshot",   "conf",       "user",                  "key-secret",
        "size"};
    static const char *const groups[] = {"server.", "encrypt.", "auth-client-required"};
    for (size_t i = 0; i < sizeof(names) / sizeof(*names); i++)
        if (!strcmp(member, names[i]))
            return true;
    for (size_t i = 0; i < sizeof(groups) / sizeof(*groups); i++)
        if (!strncmp(member, groups[i], strlen(groups[i])))
            return true;
    return false;
}

static int put_member(struct qemu_props *p, const char *prefix, const char *member, const char *value,
                      struct vm_error **err)
{
    char key[256];
    snprintf(key, sizeof(key), "%.100s%s", prefix, member);
    return *value ? qemu_props_set(p, key, value, err) : 0;
}

/* The node whose members begin with `prefix` has `to` open. */
static int set_place(struct move *m, struct qemu_props *p, const char *prefix, struct vm_error **err)
{
    const struct rbd_name *to = &m->to_rbd;
    size_t n = strlen(prefix);
    for (unsigned i = p->n; i > 0; i--) {
        char key[256];
        snprintf(key, sizeof(key), "%s", p->list[i - 1].key);
        if (!strncmp(key, prefix, n) && is_of_place(key + n)) {
            qemu_props_remove(p, key);
            i = p->n + 1; /* several may have gone */
        }
    }
    m->moved++;
    if (!*to->pool)
        return put_member(p, prefix, "driver", "file", err) < 0 ? -1
                                                                 : put_member(p, prefix, "filename", m->to, err);
    return put_member(p, prefix, "driver", "rbd", err) < 0 || put_member(p, prefix, "pool", to->pool, err) < 0 ||
                   put_member(p, prefix, "namespace", to->space, err) < 0 ||
                   put_member(p, prefix, "image", to->image, err) < 0 ||
                   put_member(p, prefix, "user", to->user, err) < 0
               ? -1
               : put_member(p, prefix, "conf", to->conf, err);
}

/* The members of the node to which `key` belongs begin with that. */
static void prefix_of(const char *key, char out[128])
{
    const char *dot = strrchr(key, '.');
    snprintf(out, 128, "%.*s", dot ? (int)(dot + 1 - key) : 0, key);
}

/* Does this property say that its node is the disk's? *ret_whole: its value alone has to be replaced. */
static bool is_disk(const struct move *m, const char *option, const struct qemu_props *p, unsigned i,
                    bool *ret_whole)
{
    char prefix[128];
    struct rbd_name name;
    const struct qemu_prop *prop = &p->list[i];
    const char *file = prop_file(option, prop);
    *ret_whole = file && (is_path_to_path(m) || !is_last_part(prop->key, "filename"));
    if (file)
        return names_disk(m, file);
    prefix_of(prop->key, prefix);
    return *m->from_rbd.pool && is_last_part(prop->key, "driver") && rbd_name_from_props(p, prefix, &name) &&
           rbd_name_equal(&name, &m->from_rbd);
}

static int move_props(struct move *m, const char *option, struct qemu_props *p, struct vm_error **err)
{
    for (unsigned i = 0; i < p->n; i++) {
        bool whole;
        char prefix[128];
        if (!is_disk(m, option, p, i, &whole))
            continue;
        prefix_of(p->list[i].key, prefix);
        if (!whole)
            return set_place(m, p, prefix, err);
        char *value = strdup(m->to);
        if (!value)
            return error_nomem(err);
        free(p->list[i].value);
        p->list[i].value = value;
        m->moved++;
    }
    return 0;
}

static int set_option(struct qemu_argv *a, unsigned i, char *text, struct vm_error **err)
{
    if (!text)
        return error_nomem(err);
    qemu_argv_set(a, i, text);
    return 0;
}

static int move_option(struct move *m, struct qemu_argv *a, unsigned i, struct vm_error **err)
{
    const struct qemu_option *o = &a->options[i];
    unsigned before = m->moved;
    if (is_image_option(o->name)) {
        if (!names_disk(m, o->value))
            return 0;
        m->moved++;
        return set_option(a, i, strdup(m->to), err);
    }
    if (strcmp(o->name, "drive") && strcmp(o->name, "blockdev"))
        return 0;
    cleanup_qemu_props struct qemu_props p = {0};
    if (qemu_props_parse(o->value, qemu_option_implied_key(o->name), &p, err) < 0 ||
        move_props(m, o->name, &p, err) < 0)
        return -1;
    return m->moved > before
               ? set_option(a, i, qemu_props_format(&p, qemu_option_implied_key(o->name)), err)
               : 0;
}

int qemu_disk_move(struct qemu_definition *d, unsigned disk, const char *to, struct vm_error **err)
{
    struct qemu_disk *k = &d->disks[disk];
    struct move m = {.d = d, .disk = k, .to = to};
    cleanup_qemu_argv struct qemu_argv a = {0};
    bool from_rbd = !strcmp(k->driver, "rbd");
    if (*to != '/' && !rbd_name_parse(to, &m.to_rbd))
        return error_set(err, VM_ERROR_USAGE, "%s is neither a path nor a RADOS block image", to);
    if (from_rbd ? !rbd_name_parse(k->file, &m.from_rbd) : strcmp(k->driver, "file"))
        return error_set(err, VM_ERROR_REFUSED,
                         "disk %s (%s) cannot be put elsewhere: it is no file, but a %s", k->name,
                         k->file, k->driver);
    if (qemu_argv_parse(d->argv, &a, err) < 0)
        return -1;
    for (unsigned i = 0; i < a.n; i++)
        if (move_option(&m, &a, i, err) < 0)
            return -1;
    if (!m.moved)
        return error_set(err, VM_ERROR_REFUSED,
                         "disk %s (%s) cannot be put elsewhere: the command line does not name it "
                         "plainly",
                         k->name, k->file);
    char **argv = qemu_argv_format(&a);
    if (!argv)
        return error_nomem(err);
    free(d->argv);
    d->argv = argv;
    return qemu_set_text(&k->file, to, err) < 0
               ? -1
               : qemu_set_text(&k->driver, *to == '/' ? "file" : "rbd", err);
}

/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/qemu_portable.h"

#include "base/cleanup.h"
#include "vmm/qemu_spawn.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static bool starts_with(const char *text, const char *prefix)
{
    return !strncmp(text, prefix, strlen(prefix));
}

static bool in_list(const char *text, const char *const *list)
{
    for (; *list; list++)
        if (!strcmp(text, *list))
            return true;
    return false;
}

static const char *or_empty(const char *text)
{
    return text ? text : "";
}

/* What cannot move. */

static const struct {
    const char *option, *why;
    bool rebuilt; /* matters only where the command line is made anew */
} unmovable_options[] = {
    {"snapshot", "its disks are temporary files of this host", false},
    {"readconfig", "it hides options in a file", true},
    {"chroot", "names of files mean something else inside", true},
    {"add-fd", "an inherited descriptor cannot be passed on to another host", true},
    {"preconfig", "the machine is not built yet", false},
    {"dump-vmstate", "it is not a VM", false},
    {"xen-attach", "it is a Xen domain", false},
};

static const struct {
    const char *prefix, *why;
} unmovable_types[] = {
    {"vfio-", "a device of this host is passed through (VFIO)"},
    {"usb-host", "a USB device of this host is passed through"},
    {"ivshmem", "memory is shared with others on this host"},
    {"nvdimm", "persistent memory of this host"},
    {"sev-", "memory is encrypted by this host (SEV)"},
    {"tdx-", "memory is encrypted by this host (TDX)"},
    {"s390-pv-", "memory is protected by this host"},
    {"pef-", "memory is protected by this host"},
    {"memory-backend-epc", "SGX enclaves cannot leave this host"},
};

static const char *const fd_keys[] = {"fd", "fds", "vhostfd", "vhostfds", "sock_fd", NULL};
static const char *const fd_paths[] = {"/dev/fdset/", "/dev/fd/", "/proc/self/fd/", NULL};

static int refuse(struct vm_error **err, const char *option, const char *value, const char *why)
{
    return error_set(err, VM_ERROR_REFUSED, "-%s%s%.200s cannot move: %s", option,
                     *value ? " " : "", value, why);
}

static bool is_memory_object(const struct qemu_option *o, const struct qemu_props *p)
{
    return !strcmp(o->name, "object") &&
           starts_with(or_empty(qemu_props_get(p, "qom-type")), "memory-backend-");
}

static bool is_own_monitor(const struct qemu_option *o, const struct qemu_props *p)
{
    const char *key = !strcmp(o->name, "chardev") ? "id"
                      : !strcmp(o->name, "mon")   ? "chardev"
                                                  : NULL;
    return key && !strcmp(or_empty(qemu_props_get(p, key)), QEMU_SPAWN_MONITOR_ID);
}

/* One whose value is properties; the others are taken as text. */
static bool has_props(const char *name)
{
    static const char *const names[] = {
        "machine",  "device", "object", "netdev", "nic",  "net",      "chardev", "mon",
        "blockdev", "drive",  "fsdev",  "virtfs", "numa", "run-with", "m",       NULL};
    return in_list(name, names);
}

static int parse_props(const struct qemu_option *o, struct qemu_props *ret, struct vm_error **err)
{
    if (!o->value || !has_props(o->name))
        return 0;
    return qemu_props_parse(o->value, qemu_option_implied_key(o->name), ret, err);
}

static int check_type(const struct qemu_option *o, const char *type, struct vm_error **err)
{
    for (size_t i = 0; i < sizeof(unmovable_types) / sizeof(*unmovable_types); i++)
        if (starts_with(type, unmovable_types[i].prefix))
            return refuse(err, o->name, type, unmovable_types[i].why);
    return 0;
}

static int check_descriptors(const struct qemu_option *o, const struct qemu_props *p,
                             struct vm_error **err)
{
    static const char why[] = "an inherited descriptor cannot be passed on to another host";
    for (unsigned i = 0; i < p->n; i++) {
        const char *last = strrchr(p->list[i].key, '.');
        last = last ? last + 1 : p->list[i].key;
        if (in_list(last, fd_keys) ||
            (!strcmp(last, "type") && last > p->list[i].key && !strcmp(p->list[i].value, "fd")))
            return refuse(err, o->name, o->value, why);
    }
    for (const char *const *path = fd_paths; o->value && *path; path++)
        if (strstr(o->value, *path))
            return refuse(err, o->name, o->value, why);
    return 0;
}

static int check_option(const struct qemu_option *o, bool rebuilt, struct vm_error **err)
{
    for (size_t i = 0; i < sizeof(unmovable_options) / sizeof(*unmovable_options); i++)
        if (!strcmp(o->name, unmovable_options[i].option) &&
            (rebuilt || !unmovable_options[i].rebuilt))
            return refuse(err, o->name, or_empty(o->value), unmovable_options[i].why);
    cleanup_qemu_props struct qemu_props p = {0};
    if (parse_props(o, &p, err) < 0)
        return -1;
    if (is_own_monitor(o, &p))
        return 0;
    if (!strcmp(o->name, "device") &&
        check_type(o, or_empty(qemu_props_get(&p, "driver")), err) < 0)
        return -1;
    if (!strcmp(o->name, "object") &&
        check_type(o, or_empty(qemu_props_get(&p, "qom-type")), err) < 0)
        return -1;
    if (!strcmp(o->name, "machine") && (qemu_props_get(&p, "confidential-guest-support") ||
                                        qemu_props_get(&p, "memory-encryption")))
        return refuse(err, o->name, o->value, "memory is encrypted by this host");
    if (rebuilt && !strcmp(o->name, "run-with") && qemu_props_get(&p, "chroot"))
        return refuse(err, o->name, o->value, "names of files mean something else inside");
    if (is_memory_object(o, &p)) {
        if (qemu_props_is_on(&p, "pmem"))
            return refuse(err, o->name, o->value, "persistent memory of this host");
        return 0; /* its descriptor or file stays behind: the destination gets memory of its own */
    }
    return rebuilt && strcmp(o->name, "mem-path") ? check_descriptors(o, &p, err) : 0;
}

int qemu_argv_check_movable(const struct qemu_argv *argv, bool rebuilt, struct vm_error **err)
{
    for (unsigned i = 0; i < argv->n; i++)
        if (check_option(&argv->options[i], rebuilt, err) < 0)
            return -1;
    return 0;
}

int qemu_device_check_movable(const struct qemu_device *device, struct vm_error **err)
{
    static const char child[] = "child<";
    const char *type = device->type + (starts_with(device->type, child) ? strlen(child) : 0);
    for (size_t i = 0; i < sizeof(unmovable_types) / sizeof(*unmovable_types); i++)
        if (starts_with(type, unmovable_types[i].prefix))
            return error_set(err, VM_ERROR_REFUSED, "device %.200s (%.*s) cannot move: %s",
                             device->path, (int)strcspn(type, ">"), type, unmovable_types[i].why);
    return 0;
}

/* The portable command line. */

struct builder {
    const struct qemu_argv *from;
    const struct qemu_memory_facts *facts;
    struct qemu_argv *to;
    bool prealloc; /* -mem-prealloc */
    bool *emitted; /* per backend fact */
    unsigned n_files;
};

/* Belongs to a host, to one start of QEMU, or is decided anew by the destination. */
static bool is_dropped(const char *name)
{
    static const char *const names[] = {"daemonize",    "S",       "incoming",
                                        "loadvm",       "runas",   "mem-path",
                                        "mem-prealloc", "pidfile", NULL};
    return in_list(name, names);
}

static int find_backend(const struct qemu_memory_facts *facts, const char *id)
{
    for (unsigned i = 0; i < facts->n_backends; i++)
        if (!strcmp(facts->backends[i].id, id))
            return (int)i;
    return -1;
}

static const struct qemu_memory_device_fact *find_device(const struct qemu_memory_facts *facts,
                                                         const char *memdev)
{
    for (unsigned i = 0; i < facts->n_devices; i++)
        if (!strcmp(facts->devices[i].memdev, memdev))
            return &facts->devices[i];
    return NULL;
}

static int add_props(struct qemu_argv *to, const char *name, const struct qemu_props *p,
                     struct vm_error **err)
{
    cleanup_free char *text = qemu_props_format(p, qemu_option_implied_key(name));
    return text ? qemu_argv_add(to, name, text, err) : error_nomem(err);
}

static int set_number(struct qemu_props *p, const char *key, uint64_t value, struct vm_error **err)
{
    char text[32];
    snprintf(text, sizeof(text), "%" PRIu64, value);
    return qemu_props_set(p, key, text, err);
}

/* What of a user's backend has a meaning for memory of our own. */
static bool is_kept_of_backend(const char *key)
{
    static const char *const keys[] = {"policy", "prealloc", "prealloc-threads", "prealloc-context",
                                       "merge",  "dump",     "reserve",          NULL};
    return in_list(key, keys) || starts_with(key, "host-nodes");
}

/* Is the block called after the backend's QOM path, not its id? */
static bool is_path_name(const struct qemu_backend_fact *f)
{
    char tail[GUEST_REGION_NAME_MAX + 16];
    size_t n = (size_t)snprintf(tail, sizeof(tail), "/objects/%s", f->id), all = strlen(f->block);
    return all >= n && !strcmp(f->block + all - n, tail);
}

/* One backend; `given` (may be NULL) is what the source's command line said of it. */
static int emit_backend(struct builder *b, unsigned index, const struct qemu_props *given,
                        struct vm_error **err)
{
    const struct qemu_backend_fact *f = &b->facts->backends[index];
    cleanup_qemu_props struct qemu_props p = {0};
    if (qemu_props_set(&p, "qom-type", "memory-backend-file", err) < 0 ||
        qemu_props_set(&p, "id", f->id, err) < 0 || set_number(&p, "size", f->size, err) < 0 ||
        qemu_props_set(&p, "share", f->shared || f->page_size != GUEST_PAGE_SIZE ? "on" : "off",
                       err) < 0 ||
        qemu_props_set(&p, "x-use-canonical-path-for-ramblock-id", is_path_name(f) ? "on" : "off",
                       err) < 0)
        return -1;
    for (unsigned i = 0; given && i < given->n; i++)
        if (is_kept_of_backend(given->list[i].key) &&
            qemu_props_set(&p, given->list[i].key, given->list[i].value, err) < 0)
            return -1;
    if ((b->prealloc || f->prealloc) && qemu_props_set(&p, "prealloc", "on", err) < 0)
        return -1;
    b->emitted[index] = true;
    return add_props(b->to, "object", &p, err);
}

static int emit_memory_object(struct builder *b, const struct qemu_props *p, struct vm_error **err)
{
    const char *id = or_empty(qemu_props_get(p, "id"));
    int index = find_backend(b->facts, id);
    if (index < 0)
        return 0; /* it was unplugged */
    return emit_backend(b, (unsigned)index, p, err);
}

static int emit_machine(struct builder *b, struct qemu_props *p, struct vm_error **err)
{
    qemu_props_remove(p, "type");
    qemu_props_remove(p, "memory-backend");
    return p->n ? add_props(b->to, "machine", p, err) : 0;
}

static int place_memory_device(struct qemu_props *p, const struct qemu_memory_device_fact *f,
                               struct vm_error **err)
{
    if (f->slot >= 0 && set_number(p, "slot", (uint64_t)f->slot, err) < 0)
        return -1;
    return set_number(p, f->slot >= 0 ? "addr" : "memaddr", f->addr, err);
}

static int emit_device(struct builder *b, const struct qemu_option *o, struct qemu_props *p,
                       struct vm_error **err)
{
    const char *memdev = qemu_props_get(p, "memdev");
    if (!memdev)
        return qemu_argv_add(b->to, o->name, o->value, err);
    const struct qemu_memory_device_fact *f = find_device(b->facts, memdev);
    if (!f)
        return 0; /* it was unplugged */
    if (place_memory_device(p, f, err) < 0)
        return -1;
    return add_props(b->to, o->name, p, err);
}

/* QEMU empties the file of a chardev that it opens: at the destination it goes on where it is. */
static int emit_file_chardev(struct builder *b, const struct qemu_option *o, const char *path,
                             struct vm_error **err)
{
    char id[32], reference[48];
    snprintf(id, sizeof(id), "vmmig-file%u", b->n_files++);
    snprintf(reference, sizeof(reference), "chardev:%s", id);
    cleanup_qemu_props struct qemu_props p = {0};
    if (qemu_props_set(&p, "backend", "file", err) < 0 || qemu_props_set(&p, "id", id, err) < 0 ||
        qemu_props_set(&p, "path", path, err) < 0 || qemu_props_set(&p, "append", "on", err) < 0 ||
        add_props(b->to, "chardev", &p, err) < 0)
        return -1;
    return qemu_argv_add(b->to, o->name, reference, err);
}

static bool is_word(const char *text, size_t n, const char *key)
{
    size_t len = strlen(key);
    return n >= len && !strncmp(text, key, len) && (n == len || text[len] == '=');
}

/*
 * "unix:PATH,server=on", "socket,id=...,server": by default QEMU waits, before anything else, for
 * somebody who connects. The VM has had that somebody long ago, or was told not to wait: the next
 * one does not. *ret: that text, allocated; NULL if there is nothing to say of it.
 */
static int without_waiting(const struct qemu_option *o, char **ret, struct vm_error **err)
{
    static const char *const names[] = {"qmp",    "qmp-pretty", "monitor",  "serial",
                                        "parallel", "debugcon",   "chardev", NULL};
    const char *text = or_empty(o->value);
    bool server = false;
    *ret = NULL;
    if (!in_list(o->name, names))
        return 0;
    cleanup_free char *made = calloc(1, strlen(text) + sizeof(",wait=off"));
    if (!made)
        return error_nomem(err);
    size_t len = 0;
    for (const char *at = text; *at;) {
        size_t n = strcspn(at, ","); /* ",," within a name: an empty word, which is kept */
        server |= is_word(at, n, "server") && strncmp(at, "server=off", 10) && strncmp(at, "server=no", 9);
        if (is_word(at, n, "nowait") || !strncmp(at, "wait=off", 8) || !strncmp(at, "wait=no", 7))
            return 0;
        if (!is_word(at, n, "wait")) {
            memcpy(made + len, at, n + (at[n] == ','));
            len += n + (at[n] == ',');
        }
        at += n + (at[n] == ',');
    }
    if (!server)
        return 0;
    if (len && made[len - 1] == ',')
        len--;
    strcpy(made + len, ",wait=off");
    *ret = steal_ptr(&made);
    return 0;
}

static int emit_text(struct builder *b, const struct qemu_option *o, struct vm_error **err)
{
    cleanup_free char *text = NULL;
    if (without_waiting(o, &text, err) < 0)
        return -1;
    return qemu_argv_add(b->to, o->name, text ? text : o->value, err);
}

static int emit_option(struct builder *b, const struct qemu_option *o, struct vm_error **err)
{
    static const char *const serial_like[] = {"serial", "parallel", "debugcon", "monitor", NULL};
    if (is_dropped(o->name))
        return 0;
    if (in_list(o->name, serial_like) && starts_with(o->value, "file:"))
        return emit_file_chardev(b, o, o->value + strlen("file:"), err);
    cleanup_qemu_props struct qemu_props p = {0};
    if (parse_props(o, &p, err) < 0)
        return -1;
    if (is_own_monitor(o, &p))
        return 0;
    if (!strcmp(o->name, "machine"))
        return emit_machine(b, &p, err);
    if (is_memory_object(o, &p))
        return emit_memory_object(b, &p, err);
    if (!strcmp(o->name, "device"))
        return emit_device(b, o, &p, err);
    if (!strcmp(o->name, "chardev") && !strcmp(or_empty(qemu_props_get(&p, "backend")), "file")) {
        if (qemu_props_set(&p, "append", "on", err) < 0)
            return -1;
        return add_props(b->to, o->name, &p, err);
    }
    return emit_text(b, o, err);
}

static int emit_machine_type(struct builder *b, struct vm_error **err)
{
    cleanup_qemu_props struct qemu_props p = {0};
    if (qemu_props_set(&p, "type", b->facts->machine, err) < 0)
        return -1;
    if (*b->facts->main_backend &&
        qemu_props_set(&p, "memory-backend", b->facts->main_backend, err) < 0)
        return -1;
    return add_props(b->to, "machine", &p, err);
}

/* Memory that was plugged while the VM ran: the backend, then the device where the guest sees it.
 */
static int emit_plugged(struct builder *b, unsigned index, struct vm_error **err)
{
    const char *id = b->facts->backends[index].id;
    if (emit_backend(b, index, NULL, err) < 0)
        return -1;
    const struct qemu_memory_device_fact *f = find_device(b->facts, id);
    if (!f)
        return 0;
    if (strcmp(f->driver, "pc-dimm"))
        return error_set(err, VM_ERROR_REFUSED,
                         "memory device %s (%s) was plugged while the VM ran: only pc-dimm can be "
                         "rebuilt at the destination; unplug it",
                         *f->id ? f->id : id, f->driver);
    cleanup_qemu_props struct qemu_props p = {0};
    if (qemu_props_set(&p, "driver", f->driver, err) < 0 ||
        (*f->id && qemu_props_set(&p, "id", f->id, err) < 0) ||
        qemu_props_set(&p, "memdev", id, err) < 0 || place_memory_device(&p, f, err) < 0 ||
        (f->node > 0 && set_number(&p, "node", (uint64_t)f->node, err) < 0))
        return -1;
    return add_props(b->to, "device", &p, err);
}

static int build_portable(struct builder *b, struct vm_error **err)
{
    for (unsigned i = 0; i < b->from->n; i++)
        b->prealloc |= !strcmp(b->from->options[i].name, "mem-prealloc");
    if (emit_machine_type(b, err) < 0)
        return -1;
    for (unsigned i = 0; i < b->from->n; i++)
        if (emit_option(b, &b->from->options[i], err) < 0)
            return -1;
    for (unsigned i = 0; i < b->facts->n_backends; i++)
        if (!b->emitted[i] && emit_plugged(b, i, err) < 0)
            return -1;
    return 0;
}

int qemu_argv_portable(const struct qemu_argv *argv, const struct qemu_memory_facts *facts,
                       struct qemu_argv *ret_argv, struct vm_error **err)
{
    if (qemu_argv_check_movable(argv, true, err) < 0)
        return -1;
    cleanup_free bool *emitted = calloc(facts->n_backends + 1, sizeof(*emitted));
    cleanup_qemu_argv struct qemu_argv to = {.program = strdup(argv->program)};
    if (!emitted || !to.program)
        return error_nomem(err);
    struct builder b = {.from = argv, .facts = facts, .to = &to, .emitted = emitted};
    if (build_portable(&b, err) < 0)
        return -1;
    *ret_argv = to;
    to = (struct qemu_argv){0};
    return 0;
}

int qemu_argv_of_memory(const char *program, const struct qemu_memory_facts *facts,
                        struct qemu_argv *ret_argv, struct vm_error **err)
{
    cleanup_free bool *emitted = calloc(facts->n_backends + 1, sizeof(*emitted));
    cleanup_qemu_argv struct qemu_argv to = {.program = strdup(program)};
    if (!emitted || !to.program)
        return error_nomem(err);
    struct builder b = {.facts = facts, .to = &to, .emitted = emitted};
    for (unsigned i = 0; i < facts->n_backends; i++)
        if (emit_backend(&b, i, NULL, err) < 0)
            return -1;
    *ret_argv = to;
    to = (struct qemu_argv){0};
    return 0;
}

/* The destination's command line. */

static int find_ram(const struct qemu_definition *d, const char *backend)
{
    for (unsigned i = 0; i < d->n_ram; i++)
        if (!strcmp(d->ram[i].backend, backend))
            return (int)i;
    return -1;
}

/* The memory object at option o, checked against definition->ram: its index, or -1. */
static int match_ram(const struct qemu_definition *d, const struct qemu_props *p,
                     struct vm_error **err)
{
    const char *id = or_empty(qemu_props_get(p, "id"));
    int index = find_ram(d, id);
    uint64_t size = 0;
    if (index < 0)
        return error_set(err, VM_ERROR_PROTOCOL, "memory backend '%.64s' has no region", id);
    if (strcmp(or_empty(qemu_props_get(p, "qom-type")), "memory-backend-file") ||
        qemu_props_get(p, "mem-path"))
        return error_set(err, VM_ERROR_PROTOCOL, "memory backend '%.64s' is not portable", id);
    if (!qemu_size_parse(or_empty(qemu_props_get(p, "size")), 1, &size) ||
        size != d->ram[index].size)
        return error_set(err, VM_ERROR_PROTOCOL,
                         "memory backend '%.64s' has another size than its "
                         "region",
                         id);
    return index;
}

int qemu_argv_check_memory(const struct qemu_definition *d, struct vm_error **err)
{
    cleanup_qemu_argv struct qemu_argv a = {0};
    cleanup_free bool *seen = calloc(d->n_ram + 1, sizeof(*seen));
    if (!seen)
        return error_nomem(err);
    if (qemu_argv_parse(d->argv, &a, err) < 0)
        return -1;
    for (unsigned i = 0; i < a.n; i++) {
        cleanup_qemu_props struct qemu_props p = {0};
        if (parse_props(&a.options[i], &p, err) < 0)
            return -1;
        if (!is_memory_object(&a.options[i], &p))
            continue;
        int index = match_ram(d, &p, err);
        if (index < 0)
            return -1;
        if (seen[index])
            return error_set(err, VM_ERROR_PROTOCOL, "memory backend '%.64s' is there twice",
                             d->ram[index].backend);
        seen[index] = true;
    }
    for (unsigned i = 0; i < d->n_ram; i++)
        if (!seen[i])
            return error_set(err, VM_ERROR_PROTOCOL, "region '%.64s' has no memory backend",
                             d->ram[i].block);
    return 0;
}

bool qemu_argv_is_private(const struct qemu_definition *d, unsigned index)
{
    cleanup_qemu_argv struct qemu_argv a = {0};
    if (d->ram[index].page_size != GUEST_PAGE_SIZE || qemu_argv_parse(d->argv, &a, NULL) < 0)
        return false;
    for (unsigned i = 0; i < a.n; i++) {
        cleanup_qemu_props struct qemu_props p = {0};
        if (parse_props(&a.options[i], &p, NULL) == 0 && is_memory_object(&a.options[i], &p) &&
            !strcmp(or_empty(qemu_props_get(&p, "id")), d->ram[index].backend))
            return !strcmp(or_empty(qemu_props_get(&p, "share")), "off");
    }
    return false;
}

static int place_memory(struct qemu_props *p, int fd, struct vm_error **err)
{
    char path[48];
    if (fd < 0)
        return qemu_props_set(p, "qom-type", "memory-backend-ram", err);
    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    return qemu_props_set(p, "share", "on", err) < 0 ? -1
                                                     : qemu_props_set(p, "mem-path", path, err);
}

static const char *map_name(const struct qemu_place *place, const char *name)
{
    for (unsigned i = 0; i < place->n_maps; i++)
        if (!strcmp(place->maps[i].from, name))
            return place->maps[i].to;
    return name;
}

static int map_net(const struct qemu_place *place, struct qemu_props *p, bool *ret_changed,
                   struct vm_error **err)
{
    static const char *const keys[] = {"ifname", "br", NULL};
    for (const char *const *key = keys; *key; key++) {
        const char *name = qemu_props_get(p, *key);
        const char *here = name ? map_name(place, name) : NULL;
        if (!name || !strcmp(name, here))
            continue;
        if (qemu_props_set(p, *key, here, err) < 0)
            return -1;
        *ret_changed = true;
    }
    return 0;
}

static int place_option(const struct qemu_definition *d, const struct qemu_place *place,
                        struct qemu_argv *a, unsigned i, struct vm_error **err)
{
    static const char *const nets[] = {"netdev", "nic", "net", NULL};
    const struct qemu_option *o = &a->options[i];
    cleanup_qemu_props struct qemu_props p = {0};
    bool changed = false;
    if (parse_props(o, &p, err) < 0)
        return -1;
    if (is_memory_object(o, &p)) {
        changed = true;
        if (place_memory(&p, place->fds[find_ram(d, qemu_props_get(&p, "id"))], err) < 0)
            return -1;
    } else if (in_list(o->name, nets) && map_net(place, &p, &changed, err) < 0) {
        return -1;
    }
    if (!changed)
        return 0;
    char *text = qemu_props_format(&p, qemu_option_implied_key(o->name));
    if (!text)
        return error_nomem(err);
    qemu_argv_set(a, i, text);
    return 0;
}

int qemu_argv_destination(const struct qemu_definition *d, const struct qemu_place *place,
                          char ***ret_argv, struct vm_error **err)
{
    cleanup_qemu_argv struct qemu_argv a = {0};
    if (qemu_argv_check_memory(d, err) < 0 || qemu_argv_parse(d->argv, &a, err) < 0 ||
        qemu_argv_check_movable(&a, true, err) < 0)
        return -1;
    for (unsigned i = a.n; i-- > 0;)
        if (is_dropped(a.options[i].name))
            qemu_argv_remove(&a, i);
    for (unsigned i = 0; i < a.n; i++)
        if (place_option(d, place, &a, i, err) < 0)
            return -1;
    if ((!place->boots && qemu_argv_add(&a, "incoming", "defer", err) < 0) ||
        qemu_argv_add(&a, "S", NULL, err) < 0)
        return -1;
    *ret_argv = qemu_argv_format(&a);
    return *ret_argv ? 0 : error_nomem(err);
}

/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/qemu_preflight.h"

#include "base/cleanup.h"
#include "vmm/qemu_argv.h"
#include "vmm/qemu_disks.h"
#include "vmm/qemu_inspect.h"
#include "vmm/qemu_internal.h"
#include "vmm/qemu_portable.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

/* A link of /proc/PID, without what the kernel appends when the file was replaced. */
static int read_link(struct qemu *q, const char *name, char out[QEMU_STRING_MAX],
                     struct vm_error **err)
{
    static const char deleted[] = " (deleted)";
    char path[48];
    snprintf(path, sizeof(path), "/proc/%d/%s", q->guest.process.pid, name);
    ssize_t n = readlink(path, out, QEMU_STRING_MAX - 1);
    if (n < 0)
        return error_errno(err, errno, "cannot read %s", path);
    out[n] = 0;
    size_t tail = strlen(deleted);
    if ((size_t)n > tail && !strcmp(out + n - tail, deleted))
        out[(size_t)n - tail] = 0;
    return 0;
}

static int read_process(struct qemu *q, struct qemu_definition *d, struct qemu_argv *ret_argv,
                        struct vm_error **err)
{
    char text[QEMU_STRING_MAX];
    cleanup_free char **argv = NULL;
    d->boot = q->guest.process.boot;
    if (process_argv(q->guest.process.pid, &argv, err) < 0 ||
        qemu_argv_parse(argv, ret_argv, err) < 0)
        return -1;
    if (read_link(q, "cwd", text, err) < 0 || qemu_set_text(&d->cwd, text, err) < 0 ||
        read_link(q, "exe", text, err) < 0)
        return -1;
    return qemu_set_text(&d->binary, strrchr(text, '/') ? strrchr(text, '/') + 1 : text, err);
}

static int check_blockers(struct qemu *q, struct vm_error **err)
{
    char status[32];
    CLEANUP(json) json_t *info = NULL;
    CLEANUP(json) json_t *jobs = NULL;
    if (qemu_query_migration(q, status, &info, err) < 0 ||
        qemu_command(q, "query-block-jobs", NULL, &jobs, err) < 0)
        return -1;
    const char *why =
        json_string_value(json_array_get(json_object_get(info, "blocked-reasons"), 0));
    if (why)
        return error_set(err, VM_ERROR_REFUSED, "QEMU does not let this VM migrate: %.400s", why);
    if (json_array_size(jobs))
        return error_set(err, VM_ERROR_REFUSED,
                         "the block job '%s' (%s) is running: wait for it, or "
                         "cancel it",
                         qmp_string(json_array_get(jobs, 0), "device"),
                         qmp_string(json_array_get(jobs, 0), "type"));
    return 0;
}

/* Devices by id: the command line against the running VM. */

static bool has_device_option(const struct qemu_argv *argv, const char *id)
{
    for (unsigned i = 0; i < argv->n; i++) {
        cleanup_qemu_props struct qemu_props p = {0};
        if (strcmp(argv->options[i].name, "device") ||
            qemu_props_parse(argv->options[i].value, "driver", &p, NULL) < 0)
            continue;
        const char *own = qemu_props_get(&p, "id");
        if (own && !strcmp(own, id))
            return true;
    }
    return false;
}

static bool is_memory_device(const char *type)
{
    return !strcmp(type, "child<pc-dimm>") || !strncmp(type, "child<virtio-mem", 16);
}

static int check_plugged(const struct qemu_argv *argv, const struct qemu_definition *d,
                         struct vm_error **err)
{
    static const char folder[] = "/machine/peripheral/";
    for (unsigned i = 0; i < d->n_devices; i++) {
        const struct qemu_device *device = &d->devices[i];
        if (strncmp(device->path, folder, strlen(folder)) || is_memory_device(device->type))
            continue;
        const char *id = device->path + strlen(folder);
        if (!has_device_option(argv, id))
            return error_set(err, VM_ERROR_REFUSED,
                             "device %s (%.*s) was plugged while the VM ran: unplug it, or prepare "
                             "the destination yourself and name it with --dest-qmp",
                             id, (int)strcspn(device->type + 6, ">"), device->type + 6);
    }
    return 0;
}

static bool has_device(const struct qemu_definition *d, const char *id)
{
    for (unsigned i = 0; i < d->n_devices; i++) {
        const char *name = strrchr(d->devices[i].path, '/');
        if (name && !strcmp(name + 1, id))
            return true;
    }
    return false;
}

static int check_unplugged(const struct qemu_argv *argv, const struct qemu_definition *d,
                           struct vm_error **err)
{
    for (unsigned i = 0; i < argv->n; i++) {
        cleanup_qemu_props struct qemu_props p = {0};
        if (strcmp(argv->options[i].name, "device"))
            continue;
        if (qemu_props_parse(argv->options[i].value, "driver", &p, err) < 0)
            return -1;
        const char *id = qemu_props_get(&p, "id");
        if (id && !qemu_props_get(&p, "memdev") && !has_device(d, id))
            return error_set(
                err, VM_ERROR_REFUSED,
                "device %s of the command line was unplugged while the VM ran: prepare "
                "the destination yourself and name it with --dest-qmp",
                id);
    }
    return 0;
}

/* Memory. Facts point into these replies. */

struct memory {
    json_t *backends, *devices, *main;
    struct qemu_ram_block *blocks;
    unsigned n_blocks;
    struct qemu_backend_fact *backend_facts;
    struct qemu_memory_device_fact *device_facts;
    struct qemu_memory_facts facts;
};

static void memory_finish(struct memory *m)
{
    json_decref(m->backends);
    json_decref(m->devices);
    json_decref(m->main);
    free(m->blocks);
    free(m->backend_facts);
    free(m->device_facts);
}

static const char *last_part(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

static int ask_memory(struct qemu *q, struct memory *m, struct vm_error **err)
{
    struct vm_error *lacking = NULL;
    if (qemu_command(q, "query-memdev", NULL, &m->backends, err) < 0 ||
        qemu_command(q, "query-memory-devices", NULL, &m->devices, err) < 0 ||
        qemu_inspect_ram_blocks(q, &m->blocks, &m->n_blocks, err) < 0)
        return -1;
    if (qemu_command(q, "qom-get",
                     json_pack("{s:s, s:s}", "path", "/machine", "property", "memory-backend"),
                     &m->main, &lacking) < 0 &&
        lacking->kind != VM_ERROR_REFUSED)
        return error_propagate(err, lacking);
    error_free(lacking);
    m->backend_facts = calloc(json_array_size(m->backends) + 1, sizeof(*m->backend_facts));
    m->device_facts = calloc(json_array_size(m->devices) + 1, sizeof(*m->device_facts));
    if (!m->backend_facts || !m->device_facts)
        return error_nomem(err);
    m->facts.backends = m->backend_facts;
    m->facts.devices = m->device_facts;
    m->facts.main_backend = json_is_string(m->main) ? last_part(json_string_value(m->main)) : "";
    return 0;
}

static int take_memory_devices(struct memory *m, struct vm_error **err)
{
    size_t i;
    json_t *entry;
    json_array_foreach(m->devices, i, entry)
    {
        const json_t *data = json_object_get(entry, "data");
        const char *type = qmp_string(entry, "type");
        bool dimm = !strcmp(type, "dimm");
        if (!dimm && strcmp(type, "virtio-mem"))
            return error_set(err, VM_ERROR_REFUSED, "memory device '%s' (%s) cannot move",
                             qmp_string(data, "id"), type);
        m->device_facts[m->facts.n_devices++] = (struct qemu_memory_device_fact){
            .id = qmp_string(data, "id"),
            .driver = dimm ? "pc-dimm" : "virtio-mem-pci",
            .memdev = last_part(qmp_string(data, "memdev")),
            .addr = (uint64_t)qmp_integer(data, dimm ? "addr" : "memaddr"),
            .slot = dimm ? qmp_integer(data, "slot") : -1,
            .node = qmp_integer(data, "node"),
        };
    }
    return 0;
}

/* Is the backend guest memory: the machine's, a NUMA node's, or a memory device's? */
static bool is_used(const struct memory *m, const struct qemu_argv *argv, const char *id)
{
    if (!strcmp(m->facts.main_backend, id))
        return true;
    for (unsigned i = 0; i < m->facts.n_devices; i++)
        if (!strcmp(m->facts.devices[i].memdev, id))
            return true;
    for (unsigned i = 0; i < argv->n; i++) {
        cleanup_qemu_props struct qemu_props p = {0};
        if (strcmp(argv->options[i].name, "numa") ||
            qemu_props_parse(argv->options[i].value, "type", &p, NULL) < 0)
            continue;
        const char *memdev = qemu_props_get(&p, "memdev");
        if (memdev && !strcmp(memdev, id))
            return true;
    }
    return false;
}

/* Blocks are called after the backend, after its QOM path, or after a device and one of these. */
static const struct qemu_ram_block *find_block(const struct memory *m, const char *id)
{
    const struct qemu_ram_block *block = qemu_find_ram_block(m->blocks, m->n_blocks, id);
    for (unsigned i = 0; i < m->n_blocks && !block; i++)
        if (!strcmp(last_part(m->blocks[i].name), id))
            block = &m->blocks[i];
    return block;
}

static int take_backends(struct memory *m, const struct qemu_argv *argv, struct qemu_definition *d,
                         struct vm_error **err)
{
    size_t i;
    json_t *entry;
    json_array_foreach(m->backends, i, entry)
    {
        const char *id = qmp_string(entry, "id");
        if (!is_used(m, argv, id))
            continue;
        const struct qemu_ram_block *block = find_block(m, id);
        uint64_t size = (uint64_t)qmp_integer(entry, "size");
        if (!block || block->used != size)
            return error_set(err, VM_ERROR_REFUSED,
                             "memory backend '%s' has no RAM block of its size", id);
        m->backend_facts[m->facts.n_backends++] = (struct qemu_backend_fact){
            id,
            block->name,
            size,
            block->page_size,
            qmp_bool(entry, "prealloc"),
            qmp_bool(entry, "share")};
        struct qemu_ram *ram = qemu_definition_add_ram(d);
        if (!ram)
            return error_nomem(err);
        ram->size = size;
        ram->page_size = block->page_size;
        d->memory += size;
        if (qemu_set_text(&ram->block, block->name, err) < 0 ||
            qemu_set_text(&ram->backend, id, err) < 0)
            return -1;
    }
    return 0;
}

/* Nothing of the guest's memory may be missing from the list. */
static int check_whole(struct qemu *q, const struct qemu_definition *d, struct vm_error **err)
{
    CLEANUP(json) json_t *sizes = NULL;
    if (qemu_command(q, "query-memory-size-summary", NULL, &sizes, err) < 0)
        return -1;
    uint64_t whole = (uint64_t)qmp_integer(sizes, "base-memory") +
                     (uint64_t)qmp_integer(sizes, "plugged-memory");
    if (d->memory < whole)
        return error_set(err, VM_ERROR_REFUSED,
                         "only %" PRIu64 " MiB of the guest's %" PRIu64
                         " MiB of memory are in memory "
                         "backends",
                         d->memory >> 20, whole >> 20);
    return 0;
}

static int make_argv(struct qemu *q, const struct qemu_argv *argv, bool prepared,
                     struct qemu_definition *d, struct vm_error **err)
{
    __attribute__((cleanup(memory_finish))) struct memory m = {0};
    cleanup_qemu_argv struct qemu_argv portable = {0};
    if (ask_memory(q, &m, err) < 0 || take_memory_devices(&m, err) < 0 ||
        take_backends(&m, argv, d, err) < 0 || check_whole(q, d, err) < 0)
        return -1;
    m.facts.machine = d->machine;
    if ((prepared ? qemu_argv_of_memory(argv->program, &m.facts, &portable, err)
                  : qemu_argv_portable(argv, &m.facts, &portable, err)) < 0)
        return -1;
    d->argv = qemu_argv_format(&portable);
    return d->argv ? 0 : error_nomem(err);
}

/* Disks and NICs. */

/* argv NULL: they are compared with nothing. */
static int take_disks(struct qemu *q, const struct qemu_argv *argv, struct qemu_definition *d,
                      struct vm_error **err)
{
    CLEANUP(json) json_t *nodes = NULL;
    CLEANUP(json) json_t *backends = NULL;
    if (qemu_command(q, "query-named-block-nodes", json_pack("{s:b}", "flat", 1), &nodes, err) <
            0 ||
        qemu_command(q, "query-block", NULL, &backends, err) < 0 ||
        qemu_disks_list(nodes, backends, d, err) < 0)
        return -1;
    return argv ? qemu_disks_compare(argv, backends, d, err) : 0;
}

int qemu_check_kept(struct qemu *q, const struct qemu_definition *d, struct vm_error **err)
{
    cleanup_qemu_definition struct qemu_definition now = {0};
    char state[32];
    if (qemu_query_run_state(q, state, err) < 0 || take_disks(q, NULL, &now, err) < 0)
        return -1;
    if (strcmp(state, "postmigrate"))
        return error_set(err, VM_ERROR_REFUSED, "the guest was set going while it was handed over");
    return qemu_disks_check_same(d, &now, err);
}

static int take_nic(const struct qemu_option *o, struct qemu_definition *d, struct vm_error **err)
{
    cleanup_qemu_props struct qemu_props p = {0};
    if (qemu_props_parse(o->value, "type", &p, err) < 0)
        return -1;
    const char *kind = qemu_props_get(&p, "type"), *id = qemu_props_get(&p, "id");
    const char *name = qemu_props_get(&p, "ifname");
    name = name ? name : qemu_props_get(&p, "br");
    if (!kind || !strcmp(kind, "none") || !strcmp(kind, "nic"))
        return 0;
    struct qemu_nic *nic = d->n_nics < QEMU_NICS_MAX ? qemu_definition_add_nic(d) : NULL;
    if (!nic)
        return error_set(err, VM_ERROR_REFUSED, "the VM has more than %d NICs", QEMU_NICS_MAX);
    return qemu_set_text(&nic->id, id ? id : "", err) < 0 ||
                   qemu_set_text(&nic->kind, kind, err) < 0 ||
                   qemu_set_text(&nic->name, name ? name : "", err) < 0
               ? -1
               : 0;
}

static int take_nics(const struct qemu_argv *argv, struct qemu_definition *d, struct vm_error **err)
{
    static const char *const names[] = {"netdev", "nic", "net"};
    for (unsigned i = 0; i < argv->n; i++)
        for (size_t k = 0; k < sizeof(names) / sizeof(*names); k++)
            if (!strcmp(argv->options[i].name, names[k]) && take_nic(&argv->options[i], d, err) < 0)
                return -1;
    return 0;
}

/* Which folder a QEMU is in can only be seen by an agent that may do all that it may: ask where it
 * matters. */
static int read_folder(struct qemu *q, struct qemu_definition *d, struct vm_error **err)
{
    char cwd[QEMU_STRING_MAX] = "/";
    bool matters = false;
    for (unsigned i = 0; i < d->n_disks; i++)
        matters |= d->disks[i].writable && d->disks[i].file[0] != '/';
    return matters && read_link(q, "cwd", cwd, err) < 0 ? -1 : qemu_set_text(&d->cwd, cwd, err);
}

int qemu_prepared_disks(struct qemu *q, const struct qemu_definition *d,
                        struct qemu_definition *ret_here, struct vm_error **err)
{
    cleanup_qemu_definition struct qemu_definition here = {0}, paired = {0};
    unsigned pairs[QEMU_DISKS_MAX];
    if (take_disks(q, NULL, &here, err) < 0 || read_folder(q, &here, err) < 0 ||
        qemu_disks_pair(d, &here, pairs, err) < 0)
        return -1;
    for (unsigned i = 0; i < d->n_disks; i++) {
        struct qemu_disk *to = qemu_definition_add_disk(&paired);
        if (!to)
            return error_nomem(err);
        if (!d->disks[i].writable)
            continue;
        struct qemu_disk *from = &here.disks[pairs[i]];
        if (qemu_check_cache(d, &d->disks[i], err) < 0 || qemu_check_cache(d, from, err) < 0)
            return -1;
        *to = *from;
        *from = (struct qemu_disk){0};
    }
    paired.cwd = steal_ptr(&here.cwd);
    *ret_here = paired;
    paired = (struct qemu_definition){0};
    return 0;
}

static int check_devices_movable(const struct qemu_definition *d, struct vm_error **err)
{
    for (unsigned i = 0; i < d->n_devices; i++)
        if (qemu_device_check_movable(&d->devices[i], err) < 0)
            return -1;
    return 0;
}

int qemu_preflight(struct qemu *q, bool prepared, struct qemu_definition *ret_definition,
                   struct vm_error **err)
{
    cleanup_qemu_definition struct qemu_definition d = {0};
    cleanup_qemu_argv struct qemu_argv argv = {0};
    if (qemu_check_can_move(q, &d.state, err) < 0 || read_process(q, &d, &argv, err) < 0 ||
        qemu_argv_check_movable(&argv, !prepared, err) < 0 || check_blockers(q, err) < 0 ||
        qemu_inspect_machine(q, &d, err) < 0 || qemu_inspect_cpus(q, &d, err) < 0 ||
        qemu_inspect_devices(q, &d, err) < 0 || check_devices_movable(&d, err) < 0)
        return -1;
    if (!prepared && (check_plugged(&argv, &d, err) < 0 || check_unplugged(&argv, &d, err) < 0))
        return -1;
    if (make_argv(q, &argv, prepared, &d, err) < 0 ||
        take_disks(q, prepared ? NULL : &argv, &d, err) < 0 || take_nics(&argv, &d, err) < 0)
        return -1;
    if (qemu_definition_validate(&d, err) < 0)
        return error_set_kind(err, VM_ERROR_REFUSED);
    *ret_definition = d;
    d = (struct qemu_definition){0};
    return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/qemu_json.h"

#include "base/cleanup.h"
#include "vmm/attach.h"
#include "vmm/qmp.h"

#include <ctype.h>
#include <string.h>

enum { VERSION = 1 };

static const char *vmm_of(const struct qemu_definition *d)
{
    return attach_is_definition(d) ? "attach" : "qemu";
}

/* ---- names of files ---- */

static bool file_is_good(const char *name)
{
    size_t n = strlen(name);
    if (!n || n > QEMU_JSON_FILE_MAX || *name == '.' || *name == '-')
        return false;
    for (const char *c = name; *c; c++)
        if (!isascii(*c) || (!isalnum((unsigned char)*c) && !strchr("._-", *c)))
            return false;
    return true;
}

static int make_lists(struct qemu_json *vm, struct vm_error **err)
{
    vm->ram_files = calloc(vm->definition.n_ram + 1, sizeof(*vm->ram_files));
    vm->disk_files = calloc(vm->definition.n_disks + 1, sizeof(*vm->disk_files));
    return vm->ram_files && vm->disk_files ? 0 : error_nomem(err);
}

int qemu_json_name_files(struct qemu_json *vm, struct vm_error **err)
{
    if (make_lists(vm, err) < 0)
        return -1;
    for (unsigned i = 0; i < vm->definition.n_ram; i++) {
        char *out = vm->ram_files[i];
        int n = i ? snprintf(out, QEMU_JSON_FILE_MAX + 1, "memory.%s.raw",
                             vm->definition.ram[i].backend)
                  : snprintf(out, QEMU_JSON_FILE_MAX + 1, "memory.raw");
        for (char *c = out; *c; c++)
            if (!isascii(*c) || (!isalnum((unsigned char)*c) && !strchr("._-", *c)))
                *c = '_';
        if (n > QEMU_JSON_FILE_MAX)
            return error_set(err, VM_ERROR_REFUSED,
                             "memory backend %.64s has too long a name to be saved",
                             vm->definition.ram[i].backend);
    }
    for (unsigned i = 0, n = 0; i < vm->definition.n_disks; i++)
        if (!vm->definition.disks[i].backing)
            snprintf(vm->disk_files[i], QEMU_JSON_FILE_MAX + 1, "disk%u.raw", n++);
    return 0;
}

void qemu_json_finish(struct qemu_json *vm)
{
    qemu_definition_finish(&vm->definition);
    free(vm->ram_files);
    free(vm->disk_files);
    *vm = (struct qemu_json){0};
}

/* ---- writing ---- */

/* A path may hold bytes that are not UTF-8; json_string gives NULL then, and the pack fails. */
static json_t *write_lists(const struct qemu_json *vm)
{
    const struct qemu_definition *d = &vm->definition;
    json_t *argv = json_array(), *ram = json_array(), *disks = json_array(), *nics = json_array(),
           *devices = json_array();
    size_t n_disks = 0;
    for (char *const *a = d->argv; *a; a++)
        json_array_append_new(argv, json_string(*a));
    for (unsigned i = 0; i < d->n_ram; i++)
        json_array_append_new(ram, json_pack("{s:s, s:s, s:I, s:I, s:I, s:s}", "block", d->ram[i].block,
                                             "backend", d->ram[i].backend, "size",
                                             (json_int_t)d->ram[i].size, "page_size",
                                             (json_int_t)d->ram[i].page_size, "guest_address",
                                             (json_int_t)d->ram[i].guest_address, "image_file",
                                             vm->ram_files[i]));
    for (unsigned i = 0; i < d->n_disks; i++) {
        const struct qemu_disk *k = &d->disks[i];
        if (k->backing)
            continue;
        n_disks++;
        json_array_append_new(
            disks, json_pack("{s:s, s:s, s:s, s:s, s:s, s:b, s:b, s:s}", "name", k->name, "node",
                             k->node, "file", k->file, "driver", k->driver, "format", k->format,
                             "writable", k->writable, "cached", k->cached, "image_file",
                             vm->disk_files[i]));
    }
    for (unsigned i = 0; i < d->n_nics; i++)
        json_array_append_new(nics, json_pack("{s:s, s:s, s:s}", "id", d->nics[i].id, "kind",
                                              d->nics[i].kind, "name", d->nics[i].name));
    for (unsigned i = 0; i < d->n_devices; i++)
        json_array_append_new(devices, json_pack("{s:s, s:s}", "path", d->devices[i].path, "type",
                                                 d->devices[i].type));
    size_t n_argv = 0;
    while (d->argv[n_argv])
        n_argv++;
    bool whole = json_array_size(argv) == n_argv && json_array_size(ram) == d->n_ram &&
                 json_array_size(disks) == n_disks && json_array_size(nics) == d->n_nics &&
                 json_array_size(devices) == d->n_devices;
    json_t *all = json_pack("{s:o, s:o, s:o, s:o, s:o}", "argv", argv, "ram", ram, "disks", disks,
                            "nics", nics, "devices", devices);
    if (whole)
        return all;
    json_decref(all);
    return NULL;
}

char *qemu_json_write(const struct qemu_json *vm, struct vm_error **err)
{
    const struct qemu_definition *d = &vm->definition;
    char boot[UUID_TEXT_SIZE];
    CLEANUP(json) json_t *lists = write_lists(vm);
    CLEANUP(json)
    json_t *o = json_pack(
        "{s:s, s:i, s:s, s:s, s:s, s:s, s:s, s:[i,i,i], s:s, s:s, s:s, s:s, s:I, s:s, s:I, s:b}",
        "format", "vmmig-vm", "version", VERSION, "vmm", vmm_of(d), "name", vm->name, "boot",
        uuid_format(&d->boot, boot), "binary", d->binary, "cwd", d->cwd, "qemu_version",
        d->version[0], d->version[1], d->version[2], "machine", d->machine, "accel", d->accel,
        "cpu_model", d->cpu_model, "cpu_features", d->cpu_features, "cpus", (json_int_t)d->n_cpus,
        "state", d->state == GUEST_RUNNING ? "running" : "paused", "memory",
        (json_int_t)d->memory, "frozen", vm->frozen);
    if (!lists || !o || json_object_update(o, lists) < 0) {
        error_set(err, VM_ERROR_REFUSED,
                  "the VM's command line or a name in it is not UTF-8 and cannot be saved");
        return NULL;
    }
    char *text = json_dumps(o, JSON_INDENT(1));
    if (text && strlen(text) <= QEMU_JSON_MAX)
        return text;
    error_set(err, VM_ERROR_NO_SPACE, "the VM's definition is too large to be saved");
    free(text);
    return NULL;
}

/* ---- reading ---- */

static bool take(char **to, const json_t *o, const char *key)
{
    *to = strdup(qmp_string(o, key));
    return *to != NULL;
}

static bool read_argv(const json_t *list, struct qemu_definition *d)
{
    size_t n = json_array_size(list), bytes = (n + 1) * sizeof(char *);
    for (size_t i = 0; i < n; i++) {
        const char *text = json_string_value(json_array_get(list, i));
        bytes += text ? strlen(text) + 1 : 1;
    }
    d->argv = malloc(bytes);
    if (!d->argv)
        return false;
    char *to = (char *)(d->argv + n + 1);
    for (size_t i = 0; i < n; i++) {
        const char *text = json_string_value(json_array_get(list, i));
        d->argv[i] = to;
        to = stpcpy(to, text ? text : "") + 1;
    }
    d->argv[n] = NULL;
    return true;
}

static bool read_ram(const json_t *list, struct qemu_definition *d)
{
    size_t i;
    json_t *o;
    json_array_foreach(list, i, o)
    {
        struct qemu_ram *r = qemu_definition_add_ram(d);
        if (!r || !take(&r->block, o, "block") || !take(&r->backend, o, "backend"))
            return false;
        r->size = (uint64_t)qmp_integer(o, "size");
        r->page_size = (uint64_t)qmp_integer(o, "page_size");
        r->guest_address = (uint64_t)qmp_integer(o, "guest_address");
    }
    return true;
}

static bool read_disks(const json_t *list, struct qemu_definition *d)
{
    size_t i;
    json_t *o;
    json_array_foreach(list, i, o)
    {
        struct qemu_disk *k = qemu_definition_add_disk(d);
        if (!k || !take(&k->name, o, "name") || !take(&k->node, o, "node") ||
            !take(&k->file, o, "file") || !take(&k->driver, o, "driver") ||
            !take(&k->format, o, "format"))
            return false;
        k->writable = qmp_bool(o, "writable");
        k->cached = qmp_bool(o, "cached");
    }
    return true;
}

static bool read_devices(const json_t *o, struct qemu_definition *d)
{
    size_t i;
    json_t *item;
    json_array_foreach(json_object_get(o, "nics"), i, item)
    {
        struct qemu_nic *n = qemu_definition_add_nic(d);
        if (!n || !take(&n->id, item, "id") || !take(&n->kind, item, "kind") ||
            !take(&n->name, item, "name"))
            return false;
    }
    json_array_foreach(json_object_get(o, "devices"), i, item)
    {
        struct qemu_device *v = qemu_definition_add_device(d);
        if (!v || !take(&v->path, item, "path") || !take(&v->type, item, "type"))
            return false;
    }
    return true;
}

static bool read_definition(const json_t *o, struct qemu_definition *d)
{
    const json_t *version = json_object_get(o, "qemu_version");
    for (size_t i = 0; i < 3; i++)
        d->version[i] = (int)(json_integer_value(json_array_get(version, i)) & 0xffff);
    json_int_t cpus = qmp_integer(o, "cpus");
    d->n_cpus = cpus > 0 && cpus < 65536 ? (unsigned)cpus : 0;
    d->state = strcmp(qmp_string(o, "state"), "running") ? GUEST_PAUSED : GUEST_RUNNING;
    d->memory = (uint64_t)qmp_integer(o, "memory");
    return take(&d->binary, o, "binary") && take(&d->cwd, o, "cwd") &&
           take(&d->machine, o, "machine") && take(&d->accel, o, "accel") &&
           take(&d->cpu_model, o, "cpu_model") && take(&d->cpu_features, o, "cpu_features") &&
           read_argv(json_object_get(o, "argv"), d) && read_ram(json_object_get(o, "ram"), d) &&
           read_disks(json_object_get(o, "disks"), d) && read_devices(o, d);
}

/* The names of the list's members in the image, each once. */
static int read_files(const json_t *list, unsigned n, bool may_lack,
                      char (*files)[QEMU_JSON_FILE_MAX + 1], struct vm_error **err)
{
    for (unsigned i = 0; i < n; i++) {
        const char *file = qmp_string(json_array_get(list, i), "image_file");
        if (!*file && may_lack)
            continue;
        if (!file_is_good(file))
            return error_set(err, VM_ERROR_CORRUPT, "\"%.70s\" is no name of a file", file);
        for (unsigned k = 0; k < i; k++)
            if (!strcmp(files[k], file))
                return error_set(err, VM_ERROR_CORRUPT, "file %s is named twice", file);
        strcpy(files[i], file);
    }
    return 0;
}

static int read_object(const json_t *o, struct qemu_json *vm, struct vm_error **err)
{
    if (strcmp(qmp_string(o, "format"), "vmmig-vm"))
        return error_set(err, VM_ERROR_CORRUPT, "it is not a VM's definition");
    if (qmp_integer(o, "version") != VERSION)
        return error_set(err, VM_ERROR_VERSION, "a later version of vmmig wrote it");
    const char *vmm = qmp_string(o, "vmm");
    if (strcmp(vmm, "qemu") && strcmp(vmm, "attach"))
        return error_set(err, VM_ERROR_REFUSED, "the VM is of another kind than this vmmig knows: %.40s", vmm);
    size_t disks = json_array_size(json_object_get(o, "disks")),
           ram = json_array_size(json_object_get(o, "ram"));
    if (disks > QEMU_DISKS_MAX || ram > GUEST_REGIONS_MAX ||
        json_array_size(json_object_get(o, "nics")) > QEMU_NICS_MAX ||
        json_array_size(json_object_get(o, "devices")) > QEMU_DEVICES_MAX)
        return error_set(err, VM_ERROR_CORRUPT, "its lists are too long");
    snprintf(vm->name, sizeof(vm->name), "%s", qmp_string(o, "name"));
    vm->frozen = qmp_bool(o, "frozen");
    if (!read_definition(o, &vm->definition) || make_lists(vm, err) < 0)
        return error_nomem(err);
    if (strcmp(vmm, vmm_of(&vm->definition)))
        return error_set(err, VM_ERROR_CORRUPT, "its VMM and its accelerator do not agree");
    if (!uuid_parse(qmp_string(o, "boot"), &vm->definition.boot))
        return error_set(err, VM_ERROR_CORRUPT, "its boot id is none");
    if (qemu_definition_validate(&vm->definition, err) < 0)
        return error_set_kind(err, VM_ERROR_CORRUPT);
    return read_files(json_object_get(o, "ram"), vm->definition.n_ram, false, vm->ram_files,
                      err) < 0 ||
                   read_files(json_object_get(o, "disks"), vm->definition.n_disks, true,
                              vm->disk_files, err) < 0
               ? -1
               : 0;
}

int qemu_json_read(const char *text, size_t len, struct qemu_json *ret_vm, struct vm_error **err)
{
    json_error_t why;
    if (len > QEMU_JSON_MAX)
        return error_set(err, VM_ERROR_CORRUPT, "vm.json is too large");
    CLEANUP(json) json_t *o = json_loadb(text, len, JSON_REJECT_DUPLICATES, &why);
    if (!o)
        return error_set(err, VM_ERROR_CORRUPT, "vm.json: line %d: %.100s", why.line, why.text);
    cleanup_qemu_json struct qemu_json vm = {0};
    if (read_object(o, &vm, err) < 0)
        return error_wrap(err, "vm.json");
    *ret_vm = vm;
    vm = (struct qemu_json){0};
    return 0;
}

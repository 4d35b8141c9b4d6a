/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/qemu_definition.h"

#include "base/cleanup.h"
#include "vmm/attach.h"
#include "vmm/qemu_portable.h"

#include <stdlib.h>
#include <string.h>

void qemu_definition_finish(struct qemu_definition *d)
{
    for (unsigned i = 0; i < d->n_ram; i++) {
        free(d->ram[i].block);
        free(d->ram[i].backend);
    }
    for (unsigned i = 0; i < d->n_disks; i++) {
        free(d->disks[i].name);
        free(d->disks[i].node);
        free(d->disks[i].file);
        free(d->disks[i].driver);
        free(d->disks[i].format);
        free(d->disks[i].device);
    }
    for (unsigned i = 0; i < d->n_nics; i++) {
        free(d->nics[i].id);
        free(d->nics[i].kind);
        free(d->nics[i].name);
    }
    for (unsigned i = 0; i < d->n_devices; i++) {
        free(d->devices[i].path);
        free(d->devices[i].type);
    }
    free(d->ram);
    free(d->disks);
    free(d->nics);
    free(d->devices);
    free(d->binary);
    free(d->argv);
    free(d->cwd);
    free(d->machine);
    free(d->accel);
    free(d->cpu_model);
    free(d->cpu_features);
    *d = (struct qemu_definition){0};
}

#define DEFINE_ADD(what, list, count)                                                              \
    struct qemu_##what *qemu_definition_add_##what(struct qemu_definition *d)                      \
    {                                                                                              \
        struct qemu_##what *more = realloc(d->list, (d->count + 1) * sizeof(*more));               \
        if (!more)                                                                                 \
            return NULL;                                                                           \
        d->list = more;                                                                            \
        more[d->count] = (struct qemu_##what){0};                                                  \
        return &more[d->count++];                                                                  \
    }
DEFINE_ADD(ram, ram, n_ram)
DEFINE_ADD(disk, disks, n_disks)
DEFINE_ADD(nic, nics, n_nics)
DEFINE_ADD(device, devices, n_devices)
#undef DEFINE_ADD

/* A string that may be shown and logged: there, bounded, without control characters. */
static int check_text(const char *what, const char *text, size_t max, struct vm_error **err)
{
    if (!text)
        return error_set(err, VM_ERROR_PROTOCOL, "the definition does not name %s", what);
    if (strlen(text) > max)
        return error_set(err, VM_ERROR_PROTOCOL, "%s of the definition is too long", what);
    for (const char *c = text; *c; c++)
        if ((unsigned char)*c < ' ' || *c == 0x7f)
            return error_set(err, VM_ERROR_PROTOCOL, "%s of the definition has control characters",
                             what);
    return 0;
}

static int check_name(const char *what, const char *text, size_t max, struct vm_error **err)
{
    if (check_text(what, text, max, err) < 0)
        return -1;
    return *text ? 0 : error_set(err, VM_ERROR_PROTOCOL, "%s of the definition is empty", what);
}

static int check_argv(const struct qemu_definition *d, struct vm_error **err)
{
    size_t bytes = 0, n = 0;
    if (!d->argv || !d->argv[0])
        return error_set(err, VM_ERROR_PROTOCOL, "the definition has no command line");
    for (; d->argv[n]; n++) {
        bytes += strlen(d->argv[n]) + 1;
        if (n >= QEMU_ARGS_MAX || bytes > QEMU_ARGS_BYTES_MAX)
            return error_set(err, VM_ERROR_PROTOCOL, "the command line is too long");
        if (check_text("an argument", d->argv[n], QEMU_ARGS_BYTES_MAX, err) < 0)
            return -1;
    }
    return 0;
}

static int check_ram(const struct qemu_definition *d, struct vm_error **err)
{
    uint64_t sum = 0;
    if (d->n_ram > GUEST_REGIONS_MAX)
        return error_set(err, VM_ERROR_PROTOCOL, "more than %d memory regions", GUEST_REGIONS_MAX);
    for (unsigned i = 0; i < d->n_ram; i++) {
        const struct qemu_ram *r = &d->ram[i];
        if (check_name("a memory block", r->block, GUEST_REGION_NAME_MAX - 1, err) < 0 ||
            check_name("a memory backend", r->backend, GUEST_REGION_NAME_MAX - 1, err) < 0)
            return -1;
        bool power_of_two = r->page_size && !(r->page_size & (r->page_size - 1));
        if (!power_of_two || r->page_size < GUEST_PAGE_SIZE || !r->size || r->size % r->page_size ||
            r->size > (1ULL << PAGE_REGION_SHIFT) || r->size > UINT64_MAX / 2 - sum)
            return error_set(err, VM_ERROR_PROTOCOL, "memory block '%.64s' has an impossible size",
                             r->block);
        sum += r->size;
        for (unsigned k = 0; k < i; k++)
            if (!strcmp(d->ram[k].block, r->block) || !strcmp(d->ram[k].backend, r->backend))
                return error_set(err, VM_ERROR_PROTOCOL, "memory block '%.64s' is there twice",
                                 r->block);
    }
    if (sum != d->memory)
        return error_set(err, VM_ERROR_PROTOCOL, "the memory blocks do not add up");
    return 0;
}

static int check_disks(const struct qemu_definition *d, struct vm_error **err)
{
    if (d->n_disks > QEMU_DISKS_MAX)
        return error_set(err, VM_ERROR_PROTOCOL, "more than %d disks", QEMU_DISKS_MAX);
    for (unsigned i = 0; i < d->n_disks; i++) {
        const struct qemu_disk *k = &d->disks[i];
        if (check_name("a disk", k->name, QEMU_STRING_MAX, err) < 0 ||
            check_text("a block node", k->node, QEMU_STRING_MAX, err) < 0 ||
            check_name("a disk's file", k->file, QEMU_STRING_MAX - 1, err) < 0 ||
            check_name("a disk's driver", k->driver, 64, err) < 0 ||
            check_text("a disk's format", k->format, 64, err) < 0 ||
            check_text("a disk's device", k->device ? k->device : "", QEMU_STRING_MAX, err) < 0)
            return -1;
    }
    return 0;
}

static int check_lists(const struct qemu_definition *d, struct vm_error **err)
{
    if (d->n_nics > QEMU_NICS_MAX || d->n_devices > QEMU_DEVICES_MAX)
        return error_set(err, VM_ERROR_PROTOCOL, "too many devices");
    for (unsigned i = 0; i < d->n_nics; i++)
        if (check_text("a NIC", d->nics[i].id, QEMU_STRING_MAX, err) < 0 ||
            check_text("a NIC's kind", d->nics[i].kind, 64, err) < 0 ||
            check_text("a NIC's name", d->nics[i].name, QEMU_STRING_MAX, err) < 0)
            return -1;
    for (unsigned i = 0; i < d->n_devices; i++)
        if (check_text("a device", d->devices[i].path, QEMU_STRING_MAX, err) < 0 ||
            check_text("a device's type", d->devices[i].type, QEMU_STRING_MAX, err) < 0)
            return -1;
    return 0;
}

int qemu_definition_validate(const struct qemu_definition *d, struct vm_error **err)
{
    if (check_name("the binary", d->binary, 255, err) < 0 || check_argv(d, err) < 0 ||
        check_name("the working folder", d->cwd, QEMU_STRING_MAX - 1, err) < 0 ||
        check_name("the machine type", d->machine, 255, err) < 0 ||
        check_name("the accelerator", d->accel, 32, err) < 0 ||
        check_name("the CPU model", d->cpu_model, 255, err) < 0 ||
        check_text("the CPU's features", d->cpu_features, 4 * QEMU_STRING_MAX, err) < 0)
        return -1;
    if (strchr(d->binary, '/'))
        return error_set(err, VM_ERROR_PROTOCOL, "the binary '%.64s' is not a file name",
                         d->binary);
    if (d->cwd[0] != '/')
        return error_set(err, VM_ERROR_PROTOCOL, "the working folder is not an absolute path");
    if (d->state != GUEST_RUNNING && d->state != GUEST_PAUSED)
        return error_set(err, VM_ERROR_PROTOCOL, "the guest is neither running nor paused");
    if (check_ram(d, err) < 0 || check_disks(d, err) < 0 || check_lists(d, err) < 0)
        return -1;
    /* The command line of a VMM that is no QEMU is its own business. */
    return attach_is_definition(d) ? 0 : qemu_argv_check_memory(d, err);
}

uint64_t qemu_definition_memory(const struct qemu_definition *d, uint64_t page_size)
{
    uint64_t sum = 0;
    for (unsigned i = 0; i < d->n_ram; i++)
        sum += d->ram[i].page_size == page_size ? d->ram[i].size : 0;
    return sum;
}

int qemu_definition_regions(const struct qemu_definition *d, struct guest_region **ret_regions,
                            unsigned *ret_n, struct vm_error **err)
{
    struct guest_region *regions = calloc(d->n_ram + 1, sizeof(*regions));
    if (!regions)
        return error_nomem(err);
    for (unsigned i = 0; i < d->n_ram; i++) {
        snprintf(regions[i].name, sizeof(regions[i].name), "%s", d->ram[i].block);
        regions[i].size = d->ram[i].size;
        regions[i].page_size = d->ram[i].page_size;
    }
    *ret_regions = regions;
    *ret_n = d->n_ram;
    return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/qemu_wire.h"

#include "base/argv.h"
#include "base/cleanup.h"

#include <string.h>

/* One allocation holds the message, its arrays and its sub-messages; nothing in it is owned. */
struct packed {
    Vmmig__Peer__Definition message;
    uint32_t version[3];
};

static char *lend(const char *text)
{
    return (char *)(uintptr_t)(text ? text : "");
}

/* Room for n sub-messages behind their array of pointers, or NULL. */
#define MAKE_ARRAY(type, n, init_value)                                                            \
    ({                                                                                             \
        type **array_ = calloc(1, (n) * (sizeof(type *) + sizeof(type)) + 1);                      \
        type *items_ = array_ ? (type *)(array_ + (n)) : NULL;                                     \
        for (unsigned i_ = 0; array_ && i_ < (n); i_++) {                                          \
            items_[i_] = (type)init_value;                                                         \
            array_[i_] = &items_[i_];                                                              \
        }                                                                                          \
        array_;                                                                                    \
    })

static void pack_ram(const struct qemu_definition *d, Vmmig__Peer__Definition *m)
{
    for (unsigned i = 0; i < d->n_ram; i++) {
        m->ram[i]->block = lend(d->ram[i].block);
        m->ram[i]->backend = lend(d->ram[i].backend);
        m->ram[i]->size = d->ram[i].size;
        m->ram[i]->page_size = d->ram[i].page_size;
        m->ram[i]->guest_address = d->ram[i].guest_address;
    }
}

static void pack_disks(const struct qemu_definition *d, Vmmig__Peer__Definition *m)
{
    for (unsigned i = 0; i < d->n_disks; i++) {
        m->disks[i]->name = lend(d->disks[i].name);
        m->disks[i]->node = lend(d->disks[i].node);
        m->disks[i]->file = lend(d->disks[i].file);
        m->disks[i]->driver = lend(d->disks[i].driver);
        m->disks[i]->format = lend(d->disks[i].format);
        m->disks[i]->writable = d->disks[i].writable;
        m->disks[i]->cached = d->disks[i].cached;
        m->disks[i]->device = lend(d->disks[i].device);
    }
}

static void pack_devices(const struct qemu_definition *d, Vmmig__Peer__Definition *m)
{
    for (unsigned i = 0; i < d->n_nics; i++) {
        m->nics[i]->id = lend(d->nics[i].id);
        m->nics[i]->kind = lend(d->nics[i].kind);
        m->nics[i]->name = lend(d->nics[i].name);
    }
    for (unsigned i = 0; i < d->n_devices; i++) {
        m->devices[i]->path = lend(d->devices[i].path);
        m->devices[i]->type = lend(d->devices[i].type);
    }
}

static bool make_arrays(const struct qemu_definition *d, Vmmig__Peer__Definition *m)
{
    m->n_ram = d->n_ram;
    m->ram = MAKE_ARRAY(Vmmig__Peer__Ram, d->n_ram, VMMIG__PEER__RAM__INIT);
    m->n_disks = d->n_disks;
    m->disks = MAKE_ARRAY(Vmmig__Peer__Disk, d->n_disks, VMMIG__PEER__DISK__INIT);
    m->n_nics = d->n_nics;
    m->nics = MAKE_ARRAY(Vmmig__Peer__Nic, d->n_nics, VMMIG__PEER__NIC__INIT);
    m->n_devices = d->n_devices;
    m->devices = MAKE_ARRAY(Vmmig__Peer__Device, d->n_devices, VMMIG__PEER__DEVICE__INIT);
    return m->ram && m->disks && m->nics && m->devices;
}

Vmmig__Peer__Definition *qemu_wire_pack(const struct qemu_definition *d, struct vm_error **err)
{
    struct packed *p = calloc(1, sizeof(*p));
    if (!p) {
        error_nomem(err);
        return NULL;
    }
    Vmmig__Peer__Definition *m = &p->message;
    vmmig__peer__definition__init(m);
    if (!make_arrays(d, m)) {
        qemu_wire_free(m);
        error_nomem(err);
        return NULL;
    }
    m->boot = (ProtobufCBinaryData){sizeof(d->boot.bytes), (uint8_t *)(uintptr_t)d->boot.bytes};
    m->binary = lend(d->binary);
    m->argv = d->argv;
    while (d->argv[m->n_argv])
        m->n_argv++;
    m->cwd = lend(d->cwd);
    for (int i = 0; i < 3; i++)
        p->version[i] = (uint32_t)d->version[i];
    m->version = p->version;
    m->n_version = 3;
    m->machine = lend(d->machine);
    m->accel = lend(d->accel);
    m->cpu_model = lend(d->cpu_model);
    m->cpu_features = lend(d->cpu_features);
    m->n_cpus = d->n_cpus;
    m->running = d->state == GUEST_RUNNING;
    m->memory = d->memory;
    pack_ram(d, m);
    pack_disks(d, m);
    pack_devices(d, m);
    return m;
}

void qemu_wire_free(Vmmig__Peer__Definition *message)
{
    if (!message)
        return;
    free(message->ram);
    free(message->disks);
    free(message->nics);
    free(message->devices);
    free((struct packed *)message); /* its first member */
}

/* Copy a string; false without memory. */
static bool keep(char **to, const char *from)
{
    *to = strdup(from);
    return *to != NULL;
}

static bool unpack_argv(const Vmmig__Peer__Definition *m, struct qemu_definition *d)
{
    d->argv = argv_copy(m->argv, m->n_argv);
    return d->argv != NULL;
}

static bool unpack_ram(const Vmmig__Peer__Definition *m, struct qemu_definition *d)
{
    for (size_t i = 0; i < m->n_ram; i++) {
        struct qemu_ram *to = qemu_definition_add_ram(d);
        if (!to || !keep(&to->block, m->ram[i]->block) || !keep(&to->backend, m->ram[i]->backend))
            return false;
        to->size = m->ram[i]->size;
        to->page_size = m->ram[i]->page_size;
        to->guest_address = m->ram[i]->guest_address;
    }
    return true;
}

static bool unpack_disks(const Vmmig__Peer__Definition *m, struct qemu_definition *d)
{
    for (size_t i = 0; i < m->n_disks; i++) {
        const Vmmig__Peer__Disk *from = m->disks[i];
        struct qemu_disk *to = qemu_definition_add_disk(d);
        if (!to || !keep(&to->name, from->name) || !keep(&to->node, from->node) ||
            !keep(&to->file, from->file) || !keep(&to->driver, from->driver) ||
            !keep(&to->format, from->format) || !keep(&to->device, from->device))
            return false;
        to->writable = from->writable;
        to->cached = from->cached;
    }
    return true;
}

static bool unpack_devices(const Vmmig__Peer__Definition *m, struct qemu_definition *d)
{
    for (size_t i = 0; i < m->n_nics; i++) {
        struct qemu_nic *to = qemu_definition_add_nic(d);
        if (!to || !keep(&to->id, m->nics[i]->id) || !keep(&to->kind, m->nics[i]->kind) ||
            !keep(&to->name, m->nics[i]->name))
            return false;
    }
    for (size_t i = 0; i < m->n_devices; i++) {
        struct qemu_device *to = qemu_definition_add_device(d);
        if (!to || !keep(&to->path, m->devices[i]->path) || !keep(&to->type, m->devices[i]->type))
            return false;
    }
    return true;
}

int qemu_wire_unpack(const Vmmig__Peer__Definition *m, struct qemu_definition *ret_definition,
                     struct vm_error **err)
{
    cleanup_qemu_definition struct qemu_definition d = {
        .n_cpus = m->n_cpus,
        .memory = m->memory,
        .state = m->running ? GUEST_RUNNING : GUEST_PAUSED,
    };
    memcpy(d.boot.bytes, m->boot.data, sizeof(d.boot.bytes));
    for (int i = 0; i < 3; i++)
        d.version[i] = (int)(m->version[i] & 0xffff);
    if (!keep(&d.binary, m->binary) || !keep(&d.cwd, m->cwd) || !keep(&d.machine, m->machine) ||
        !keep(&d.accel, m->accel) || !keep(&d.cpu_model, m->cpu_model) ||
        !keep(&d.cpu_features, m->cpu_features) || !unpack_argv(m, &d) || !unpack_ram(m, &d) ||
        !unpack_disks(m, &d) || !unpack_devices(m, &d))
        return error_nomem(err);
    if (qemu_definition_validate(&d, err) < 0)
        return -1;
    *ret_definition = d;
    d = (struct qemu_definition){0};
    return 0;
}

void qemu_wire_unpack_offer(const Vmmig__Peer__DiskOffer *message, struct disk_offer *ret_offer)
{
    *ret_offer = (struct disk_offer){.proof = (enum disk_proof)message->proof};
    memcpy(ret_offer->nonce.bytes, message->nonce.data, sizeof(ret_offer->nonce.bytes));
}

int qemu_wire_unpack_answer(const Vmmig__Peer__DiskAnswer *message, struct disk_answer *ret_answer,
                            struct vm_error **err)
{
    struct disk_answer a = {
        .inode = message->inode, .size = message->size, .device = message->device};
    if (strlen(message->text) >= sizeof(a.text))
        return error_set(err, VM_ERROR_PROTOCOL, "the peer's answer about a disk is too long");
    memcpy(a.secret.bytes, message->secret.data, sizeof(a.secret.bytes));
    memcpy(a.boot.bytes, message->boot.data, sizeof(a.boot.bytes));
    strcpy(a.text, message->text);
    *ret_answer = a;
    return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * qemu_definition: what one running QEMU guest is, in a form that another host can build again. Plain
 * data: qemu_preflight makes it at the source, it travels to the destination, and qemu_dest_check,
 * qemu_sink_spawn and qemu_verify use it there. Strings are owned by the definition, UTF-8, without control
 * characters; NULL only where it is said. After it came from a peer: qemu_definition_validate.
 */
#ifndef VMMIG_VMM_QEMU_DEFINITION_H
#define VMMIG_VMM_QEMU_DEFINITION_H

#include "base/error.h"
#include "base/uuid.h"
#include "vmm/guest.h"

#include <stdbool.h>
#include <stdint.h>

#define QEMU_ARGS_MAX 4096
#define QEMU_ARGS_BYTES_MAX (256u << 10)
#define QEMU_DISKS_MAX 256
#define QEMU_NICS_MAX 64
#define QEMU_DEVICES_MAX 1024
#define QEMU_STRING_MAX 4096 /* of any one string, argv apart; cpu_features: four times that */

/* Guest memory behind a memory backend: a region of the migration (vmm/guest.h), in that order. */
struct qemu_ram {
    char *block;        /* its name in the migration stream, "pc.ram", "/objects/mem1" */
    char *backend;      /* id of the memory backend, "pc.ram", "mem1" */
    uint64_t size;
    uint64_t page_size; /* 4096, or that of hugetlb */
    uint64_t guest_address; /* of an attach VMM's slot; QEMU's machine type decides */
};

struct qemu_disk {
    char *name;     /* what the user calls it: device, drive or node */
    char *node;     /* the block node that has the file open */
    char *file;     /* what is open now: a path, or the driver's own name of it */
    char *driver;   /* of that node: "file", "host_device", "rbd", ... */
    char *format;   /* of the image: "raw", "qcow2", ... */
    bool writable;
    bool cached;    /* goes through the host's page cache */
    bool backing;   /* a file behind another disk's image, which names it; known on the VM's own host alone */
    /*
     * The guest's device, by which a disk of another QEMU with the same devices is this one: a path of QEMU's object
     * tree, or the drive's name where that path depends on the command line's order. NULL or "": not known.
     */
    char *device;
};

struct qemu_nic {
    char *id;     /* of the backend; "" if it has none */
    char *kind;   /* "tap", "bridge", "user", ... */
    char *name;   /* of the tap or bridge on the source's host; "" if it has none */
};

/* A device as QEMU names it: "/machine/peripheral/net0", "child<virtio-net-pci>". */
struct qemu_device {
    char *path;
    char *type;
};

struct qemu_definition {
    struct uuid boot;  /* of the host it came from (base/process.h) */
    char *binary;      /* file name of the executable, without its folder */
    /*
     * The command line without what belongs to a host: versioned machine type, hot-plugged memory in
     * it, memory backends without a place (qemu_argv.h), no monitor of vmmig's. argv[0] first, NULL last.
     */
    char **argv;
    char *cwd;         /* relative names in argv refer to it */
    int version[3];    /* of QEMU: major, minor, micro */
    char *machine;     /* "pc-q35-7.2" */
    char *accel;       /* "kvm" or "tcg" */
    char *cpu_model;   /* QOM type of the CPUs: "host-x86_64-cpu" */
    char *cpu_features;/* what the guest sees of the CPU, as QEMU reports it; "" if it does not */
    unsigned n_cpus;
    enum guest_run_state state; /* RUNNING or PAUSED */
    uint64_t memory;   /* sum of `ram` */

    struct qemu_ram *ram;
    unsigned n_ram;
    struct qemu_disk *disks;
    unsigned n_disks;
    struct qemu_nic *nics;
    unsigned n_nics;
    struct qemu_device *devices;
    unsigned n_devices;
};

/* Free everything; the definition is all zero afterwards. A zeroed one is fine. */
void qemu_definition_finish(struct qemu_definition *d);
static inline void qemu_definition_cleanup(struct qemu_definition *d)
{
    qemu_definition_finish(d);
}
#define cleanup_qemu_definition __attribute__((cleanup(qemu_definition_cleanup)))

/*
 * Every bound above, every string, and that ram, argv and memory agree with each other. PROTOCOL.
 * For a definition from a peer, before anything else is done with it.
 */
int qemu_definition_validate(const struct qemu_definition *d, struct vm_error **err);

/* Bytes of its memory that lie in pages of that size. */
uint64_t qemu_definition_memory(const struct qemu_definition *d, uint64_t page_size);

/* The regions of both sides: an allocated array (free it) of n_ram, unmapped. */
int qemu_definition_regions(const struct qemu_definition *d, struct guest_region **ret_regions,
                            unsigned *ret_n, struct vm_error **err);

/* Append zeroed element; NULL without memory. For whoever fills a definition. */
struct qemu_ram *qemu_definition_add_ram(struct qemu_definition *d);
struct qemu_disk *qemu_definition_add_disk(struct qemu_definition *d);
struct qemu_nic *qemu_definition_add_nic(struct qemu_definition *d);
struct qemu_device *qemu_definition_add_device(struct qemu_definition *d);

#endif

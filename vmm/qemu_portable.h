/* SPDX-License-Identifier: Apache-2.0 */
/*
 * qemu_portable: from the command line of a running QEMU to that of the one which takes its guest. Pure:
 * facts in, command line out.
 *
 *     source        qemu_argv_portable(&argv, &facts, &portable)   into definition.argv
 *     destination   qemu_argv_destination(definition, &place, &argv)
 *
 * Portable: the machine type with its version; every memory backend as memory-backend-file, share=on where
 * others share it or its pages are huge, else share=off, with id, size and block name of the running VM but no
 * mem-path; a plain -m, -mem-path and -mem-prealloc
 * turned into such a backend; hot-plugged memory as -object and -device with slot and address; files that QEMU
 * would truncate (-serial file:, -chardev file) opened for appending; -daemonize, -loadvm, -incoming, -S,
 * -runas and vmmig's monitor gone.
 *
 * Destination: share=on and mem-path=/proc/self/fd/N for each backend that has a file, memory-backend-ram for the
 * others, names of taps and bridges mapped, -incoming defer unless it boots, -S.
 */
#ifndef VMMIG_VMM_QEMU_PORTABLE_H
#define VMMIG_VMM_QEMU_PORTABLE_H

#include "base/error.h"
#include "vmm/qemu_argv.h"
#include "vmm/qemu_definition.h"

/* A memory backend as the running VM has it. */
struct qemu_backend_fact {
    const char *id;
    const char *block; /* name in the stream: the id or its QOM path, after a device's path or not */
    uint64_t size;
    uint64_t page_size;
    bool prealloc;
    bool shared; /* with another process */
};

/* A memory device as the running VM has it. */
struct qemu_memory_device_fact {
    const char *id;     /* "" if it has none */
    const char *driver; /* "pc-dimm", "virtio-mem-pci" */
    const char *memdev; /* id of its backend */
    uint64_t addr;
    int64_t slot, node; /* slot -1: it has none */
};

struct qemu_memory_facts {
    const char *machine;      /* versioned machine type */
    const char *main_backend; /* id of the backend of the machine's own RAM; "": memory is NUMA nodes' */
    const struct qemu_backend_fact *backends;
    unsigned n_backends;
    const struct qemu_memory_device_fact *devices;
    unsigned n_devices;
};

/* What a host calls a tap or bridge that the source's command line names `from`. */
struct qemu_name_map {
    const char *from, *to;
};

/* Where the destination's memory is: fds[i] is the file of definition->ram[i], -1 if QEMU makes its own. */
struct qemu_place {
    const int *fds;
    const struct qemu_name_map *maps;
    unsigned n_maps;
    bool boots; /* no guest comes: it starts anew */
};

/* REFUSED by name for what cannot be moved (see qemu_preflight.h). */
int qemu_argv_portable(const struct qemu_argv *argv, const struct qemu_memory_facts *facts,
                       struct qemu_argv *ret_argv, struct vm_error **err);
/* *ret_argv: one allocation, NULL at the end; free it. */
int qemu_argv_destination(const struct qemu_definition *d, const struct qemu_place *place,
                          char ***ret_argv, struct vm_error **err);
/* May QEMU make the memory of definition->ram[index] by itself, private and of small pages? */
bool qemu_argv_is_private(const struct qemu_definition *d, unsigned index);
/* Does every block of definition->ram have its backend in definition->argv, and no other? PROTOCOL. */
int qemu_argv_check_memory(const struct qemu_definition *d, struct vm_error **err);
/* The backends alone, as above: all that is said of a VM whose destination was prepared, and has a
 * command line. */
int qemu_argv_of_memory(const char *program, const struct qemu_memory_facts *facts,
                        struct qemu_argv *ret_argv, struct vm_error **err);
/*
 * REFUSED, by name, if the command line says something that cannot move; `rebuilt`: or something of
 * which no other can be made for the destination.
 */
int qemu_argv_check_movable(const struct qemu_argv *argv, bool rebuilt, struct vm_error **err);
/* The same of a device of the running VM, by its type: "child<vfio-pci>". */
int qemu_device_check_movable(const struct qemu_device *device, struct vm_error **err);

#endif

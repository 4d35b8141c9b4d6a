/* SPDX-License-Identifier: Apache-2.0 */
/*
 * qemu_json: vm.json, the definition of a VM that lies in a repository (docs/snapshot-format.md).
 *
 *     text = qemu_json_write(&vm, &err)                       free it
 *     qemu_json_read(text, len, &vm, &err)                    qemu_json_finish(&vm)
 *
 * Besides the definition it says in which file of the image each memory block and each disk is.
 * What is read was validated (qemu_definition_validate), names of files included; members that are
 * not known are ignored. Pure; any thread.
 */
#ifndef VMMIG_VMM_QEMU_JSON_H
#define VMMIG_VMM_QEMU_JSON_H

#include "base/error.h"
#include "vmm/qemu_definition.h"

#define QEMU_JSON_MAX (4u << 20) /* bytes of a vm.json */
#define QEMU_JSON_FILE_MAX 64    /* bytes of the name of a file of an image */

struct qemu_json {
    char name[65];                     /* of the VM when it was saved; "" if not known */
    bool frozen; /* file systems stood frozen at the instant: who lets the guest go on has to thaw them */
    struct qemu_definition definition; /* owned */
    /* Parallel to definition.ram and definition.disks; owned; "" for a disk that is not saved. */
    char (*ram_files)[QEMU_JSON_FILE_MAX + 1];
    char (*disk_files)[QEMU_JSON_FILE_MAX + 1];
};

/*
 * Give the files their names: memory.raw is the block of the machine's own RAM (the first), others
 * are memory.BACKEND.raw; disks are disk0.raw, disk1.raw, ... in the order of the definition. A backing file has no
 * name, and is not written: who saves a disk saves what the guest sees of it.
 */
int qemu_json_name_files(struct qemu_json *vm, struct vm_error **err);
char *qemu_json_write(const struct qemu_json *vm, struct vm_error **err);
/* CORRUPT if it is no such text; VERSION if a later vmmig wrote it. */
int qemu_json_read(const char *text, size_t len, struct qemu_json *ret_vm, struct vm_error **err);
void qemu_json_finish(struct qemu_json *vm);
static inline void qemu_json_cleanup(struct qemu_json *vm)
{
    qemu_json_finish(vm);
}
#define cleanup_qemu_json __attribute__((cleanup(qemu_json_cleanup)))

#endif

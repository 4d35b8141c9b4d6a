/* SPDX-License-Identifier: Apache-2.0 */
/*
 * qemu_preflight: may this guest move, and what exactly is it? Asked before a page moves, on both
 * sides.
 *
 *     source:       qemu_preflight(q, prepared, &definition, &err)
 *                   ... the copy, until the guest stands ...
 *                   qemu_check_kept(q, &definition, &err)
 *     destination:  qemu_definition_validate(&definition, &err)
 *                   qemu_dest_check(&definition, &host, &err)
 *                   qemu_sink_spawn(...), which ends with qemu_verify
 *     or, prepared: qemu_sink_attach(...), likewise
 *                   qemu_prepared_disks(q, &definition, &here, &err)
 *
 * A command line grows stale: disks are snapshotted and devices are plugged while the VM runs. So
 * the source compares it with the running VM over QMP. Memory that was plugged is put into the
 * destination's command line; every other difference is REFUSED by name, as is what cannot move at
 * all: VFIO, ivshmem, nvdimm, SEV and TDX, inherited descriptors (except vmmig's own), options read
 * from files, -snapshot, chroot, and whatever QEMU itself reports as a reason that blocks
 * migration.
 *
 * Where the user prepared the destination's QEMU, nothing is made of the VM's command line: how
 * stale it is, which files it hides options in and which descriptors it inherited does not matter.
 * What cannot move at all is refused there, too. Then it is the disks which that QEMU has open that
 * have to be the VM's, device by device.
 *
 * qemu_verify then compares the destination's QEMU, once it waits, with the definition: machine,
 * devices with their types and order, RAM, CPUs with their features, accelerator. It finds whatever
 * a command line does not show.
 */
#ifndef VMMIG_VMM_QEMU_PREFLIGHT_H
#define VMMIG_VMM_QEMU_PREFLIGHT_H

#include "base/error.h"
#include "vmm/qemu.h"
#include "vmm/qemu_definition.h"

/*
 * The source's part; `prepared`: a QEMU waits for the guest. The guest runs on. On success fill
 * *ret (qemu_definition_finish it).
 */
int qemu_preflight(struct qemu *q, bool prepared, struct qemu_definition *ret_definition,
                   struct vm_error **err);

/*
 * All of the guest was copied: does it still stand as it was sent, with the disks of its definition? While it is copied
 * QEMU lets its user snapshot a disk or move it elsewhere, and the destination has what was open
 * before. REFUSED, by name.
 */
int qemu_check_kept(struct qemu *q, const struct qemu_definition *d, struct vm_error **err);

/* What the destination's agent says of its host. */
struct qemu_host {
    const char *binary;  /* the QEMU that the configuration allows for definition->binary */
    const char *user;    /* as in struct qemu_launch */
    bool assume_shared;  /* the user takes the disks on himself: host-cached disks are let pass */
    uint64_t promised;       /* of the memory that is available, for guests that are arriving */
    const char *scratch_dir; /* for the socket and log of a short-lived probe */
};

/*
 * Can this host take it? The binary is there, the accelerator is usable, memory (or huge pages) is
 * free, every disk file exists, a disk that goes through the page cache does not come from another
 * host (REFUSED without assume_shared: what one host has cached the other does not see), nobody
 * listens where the VM's own sockets will be (qemu_sockets.h). Whether QEMU has the machine type it
 * says itself when it is started for the guest: to ask before would cost every migration the start
 * of one QEMU more.
 */
int qemu_dest_check(const struct qemu_definition *d, const struct qemu_host *host,
                    struct vm_error **err);
/*
 * `failed` is why a QEMU started for the guest did not come up. If that binary, run anew without a machine, does not
 * know the machine type, then *err says so, else it is `failed` itself, which is taken over. Returns -1.
 */
int qemu_dest_explain(const struct qemu_definition *d, const struct qemu_host *host,
                      struct vm_error *failed, struct vm_error **err);

/* Is the QEMU that waits the one of the definition? REFUSED with the first difference. */
int qemu_verify(struct qemu *q, const struct qemu_definition *d, struct vm_error **err);
/*
 * The disks of a prepared QEMU, for the proof that they are the VM's (disk_identity.h):
 * ret_here->disks[i] is that which it has in place of the writable d->disks[i], and all zero for
 * the others; relative names refer to ret_here->cwd. REFUSED, by name, unless every writable disk
 * has one and it writes no other; and if one goes through a host's page cache, and comes from
 * another host.
 */
int qemu_prepared_disks(struct qemu *q, const struct qemu_definition *d,
                        struct qemu_definition *ret_here, struct vm_error **err);
/* Its CPUs alone, which a clone's must be as well: a guest uses what it found when it booted. */
int qemu_verify_cpus(struct qemu *q, const struct qemu_definition *d, struct vm_error **err);

#endif

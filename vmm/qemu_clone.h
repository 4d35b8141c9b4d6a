/* SPDX-License-Identifier: Apache-2.0 */
/*
 * qemu_clone: a QEMU that goes on from a saved state, its memory a private mapping of files that
 * others map too.
 *
 *     qemu_clone_argv(&params, &notes, &argv, &err)       pure
 *     struct qemu *q = qemu_clone_spawn(&params, argv, &timing, &err);
 *
 * The command line is the saved one with: every memory backend on its file, share=off; each disk a
 * qcow2 overlay; fresh -uuid, VM generation ID and MAC addresses; -name; paths of sockets and
 * output files of its own (vmm/qemu_own.h, also of what it connects to); NICs on taps by the names
 * that `taps` says. REFUSED by name: a tap that nobody gave another name (two VMs cannot share it),
 * and what cannot move (vmm/qemu_portable.h). USAGE: a name in `taps` that no NIC on a tap has.
 *
 * USAGE: `memory` is not more than it has by a multiple of QEMU_CLONE_MEMORY_STEP. REFUSED: the
 * command line does not say that memory can be plugged in (-m ...,slots=N,maxmem=SIZE).
 *
 * `notes` tells what the running guest does not notice of its new identity: a guest without a
 * vmgenid device is not told that it is a clone. Nor does it look at a NIC's MAC again before its
 * driver starts anew: `macs` says which the guest has, and which it is to take over.
 *
 * The state is loaded by QEMU itself from `state_fd` (a file), without a page; the guest runs when
 * it was running. Threads: any.
 */
#ifndef VMMIG_VMM_QEMU_CLONE_H
#define VMMIG_VMM_QEMU_CLONE_H

#include "vmm/clone_timing.h"
#include "vmm/qemu.h"
#include "vmm/qemu_json.h"

#define QEMU_CLONE_NOTE_MAX 256
#define QEMU_CLONE_NOTES_MAX 8
#define QEMU_CLONE_MACS_MAX 16 /* REFUSED: more NICs that are to have new ones */
#define QEMU_MAC_SIZE 18
#define QEMU_CLONE_MEMORY_STEP (128ull << 20) /* what Linux takes at once on x86 */

struct qemu_clone_params {
    const char *name;
    const struct qemu_json *vm;
    const char *const *ram_paths;  /* as many as vm->definition.ram */
    const char *const *disk_paths; /* as disks: an overlay (qcow2); NULL: not replaced */
    const struct qemu_name_map *taps; /* id of the netdev, name of the tap */
    unsigned n_taps;
    bool keep_macs;
    uint64_t memory;            /* what qemu_clone_grow will be asked for; 0: it will not be */
    int state_fd;               /* stays the caller's */
    struct qemu_launch launch;  /* argv and fds are ignored */
};

struct qemu_clone_mac {
    char from[QEMU_MAC_SIZE], to[QEMU_MAC_SIZE];
};

struct qemu_clone_notes {
    char text[QEMU_CLONE_NOTES_MAX][QEMU_CLONE_NOTE_MAX];
    unsigned n;
    struct qemu_clone_mac macs[QEMU_CLONE_MACS_MAX];
    unsigned n_macs;
};

/* *ret_argv: one allocation, NULL at the end; free it. */
int qemu_clone_argv(const struct qemu_clone_params *params, struct qemu_clone_notes *ret_notes,
                    char ***ret_argv, struct vm_error **err);
/* When it fails nothing is left. */
struct qemu *qemu_clone_spawn(const struct qemu_clone_params *params, char *const *argv,
                              struct clone_timing *ret_timing, struct vm_error **err);
/*
 * Which of the saved disks stands first on the command line: the definition has them in an order of QEMU's own. Those
 * that the guest cannot write, as a CD, do not count. REFUSED: there is none. Pure.
 */
int qemu_clone_first_disk(const struct qemu_json *vm, unsigned *ret_disk, struct vm_error **err);
/* A larger disk: the running guest is told. */
int qemu_clone_resize(struct qemu *q, const char *disk_path, uint64_t size, struct vm_error **err);
/*
 * More memory, as one DIMM that is plugged into the running guest: `size` is what it has then. REFUSED with QEMU's
 * reason where it has no slot or no room for it. Whether the guest makes use of it is its own affair.
 */
int qemu_clone_grow(struct qemu *q, uint64_t size, struct vm_error **err);

#endif

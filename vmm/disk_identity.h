/* SPDX-License-Identifier: Apache-2.0 */
/*
 * disk_identity: proof that a disk of the definition is the same one on both hosts.
 * Without it a destination that has another file under the same name would run on the wrong disk,
 * without an error.
 *
 *   both          disk_identity_view(pid, cwd, &view)            whose names they are
 *   source        disk_identity_offer(disk, view, &offer)        a question; for a file, also a
 *                                                                fresh file beside it
 *   destination   disk_identity_answer(disk, view, &offer, &answer)
 *   source        disk_identity_check(disk, view, &offer, &answer)   REFUSED unless it is proved
 *   source        disk_identity_withdraw(&offer)                 always; removes that file
 *
 * How, by the driver that has the disk open:
 *   file          the destination reads a random secret back that the source put into a file beside
 *                 the image, and both see the same inode number. Works on NFS. Not the same size: an
 *                 image grows while its guest runs.
 *   host_device   the same boot of the same kernel and the same device number; or else the same
 *                 world-wide or LVM identifier, and size
 *   rbd           cluster id (fsid of the configuration that QEMU was given), pool, namespace and
 *                 image by their names: within a cluster they mean one image at a time, and ids
 *                 asked for by name would say no more
 *   others        cannot be proved: REFUSED without --assume-shared, which the caller handles by
 *                 not asking
 * A file that is only read (what is behind an overlay, a medium) may lie on both hosts: it is the same one if its
 * size is, and what both read of it: all of up to 4 MiB; of a larger one the first and last MiB, and 32 pages in
 * between at places that the question's nonce chooses.
 * A file or device that is looked at is also the one that the view's process has open: its name may
 * mean another one since (REFUSED).
 *
 * A crash of the source's agent can leave the file `.vmmig-proof-UUID` behind (32 bytes); the next
 * offer beside the same image removes those that are older than a day. What is for the wire is
 * plain data; text fields end with NUL. Threads: any.
 */
#ifndef VMMIG_VMM_DISK_IDENTITY_H
#define VMMIG_VMM_DISK_IDENTITY_H

#include "base/error.h"
#include "base/uuid.h"
#include "vmm/qemu_definition.h"

#include <stdint.h>
#include <sys/types.h>

#define DISK_IDENTITY_TEXT_MAX 512

/* X(id, number on the wire, name) */
#define DISK_PROOFS(X)                                                                             \
    X(NONCE, 1, "nonce file")                                                                      \
    X(DEVICE, 2, "block device")                                                                   \
    X(RBD, 3, "rbd image")                                                                         \
    X(CONTENT, 4, "file that is only read")
#define X(id, number, name) DISK_PROOF_##id = number,
enum disk_proof { DISK_PROOFS(X) };
#undef X

struct disk_offer {
    enum disk_proof proof;
    struct uuid nonce;  /* names the file beside the image: ".vmmig-proof-UUID"; chooses pages */
    /* The source's alone, not for the wire: */
    struct uuid secret; /* what is in the file */
    int folder;         /* that the file is in; -1 if there is none */
};

struct disk_answer {
    struct uuid secret;  /* what was read: of the file beside the image, or a sum of the content */
    uint64_t inode;      /* of a file */
    uint64_t size;       /* of a block device, or a file that is only read */
    struct uuid boot;
    uint64_t device;     /* major and minor, as stat(2) has them */
    char text[DISK_IDENTITY_TEXT_MAX]; /* path of a file; identifier of a block device;
                                          fsid/pool/namespace/image */
};

#define DISK_IDENTITY_ROOT_MAX 32

/* What names mean. */
struct disk_view {
    const char *cwd;                   /* what a relative name refers to; borrowed */
    pid_t user;                        /* has the disks open; 0: nobody has yet */
    char root[DISK_IDENTITY_ROOT_MAX]; /* names, and links, are looked up within it: "" for this
                                          process's own view, or "/proc/PID/root" */
};

/* As `pid` sees them, which has the disks open: other mounts or another root directory, maybe. */
int disk_identity_view(pid_t pid, const char *cwd, struct disk_view *ret, struct vm_error **err);

/* Is there a proof for it? Of those that are written there must be. */
bool disk_identity_is_provable(const struct qemu_disk *disk);
int disk_identity_offer(const struct qemu_disk *disk, const struct disk_view *view,
                        struct disk_offer *ret_offer, struct vm_error **err);
int disk_identity_answer(const struct qemu_disk *disk, const struct disk_view *view,
                         const struct disk_offer *offer, struct disk_answer *ret_answer,
                         struct vm_error **err);
int disk_identity_check(const struct qemu_disk *disk, const struct disk_view *view,
                        const struct disk_offer *offer, const struct disk_answer *answer,
                        struct vm_error **err);
/* Disks that no block node of QEMU is (vhost-user-blk and its like): REFUSED, for none can be proved. */
int disk_identity_check_devices(const struct qemu_device *devices, unsigned n, struct vm_error **err);
void disk_identity_withdraw(struct disk_offer *offer);

/* Does a block device's identifier name one device of the world? */
bool disk_identity_is_worldwide(const char *identifier);
const char *disk_proof_name(enum disk_proof proof);

#endif

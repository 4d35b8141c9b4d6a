/* SPDX-License-Identifier: Apache-2.0 */
/*
 * snapshot: a running VM as one image of a repository: disks and memory of the same instant, device
 * state, and the VM's definition (docs/snapshot-format.md). It is called VM@NAME.
 *
 *     snapshot_take(&params, &report, &err)         the guest runs on; its pause is the switch
 * alone snapshot_restore (snapshot/restore.h)         a VM from one snapshot_list, snapshot_prune
 * (snapshot/chain.h)
 *
 * How. Filters are put below the disks, the guest is paused, they take effect, QEMU write-protects
 * memory and lets the guest go on. Then memory comes through a migration stream and disks through
 * an NBD server of ours (snapshot/disk_target.h), while the guest runs. All of it becomes visible
 * with one commit at the end.
 *
 * Where QEMU cannot write-protect memory (no userfaultfd, or the guest is paused, and QEMU would
 * let it run) memory is copied before the instant, into a file without a name in scratch_dir, which
 * must have room for all of it; file systems are frozen for as long as that takes, if there is an
 * agent in the guest, but for 20 s at most: then they are thawed, and `note` says so; or the
 * snapshot fails, if the agent was named. A paused guest stays paused, in QEMU's run state
 * `postmigrate`: it goes on with `cont`, but QEMU cannot give its memory away again before.
 *
 * VMMs that link libvmmig-attach: snapshot/take_attach.h.
 *
 * Parent: the VM's newest snapshot. Memory is read whole, and shares what did not change. Of disks
 * only what was written since is read, if QEMU noted it since that very snapshot; else they are
 * read whole and `note` says so.
 *
 * A clone that was never snapshotted: its parent is the template, and of disks only what lies in
 * its overlays is read.
 *
 * Failure, of whatever: the guest runs on, nothing is visible, nothing is left in QEMU. The first
 * cause is reported: a full repository, an nbdkit that died, a scratch file system without room. A
 * failed or cancelled snapshot of memory is read to its end, which takes seconds: QEMU 7.2, whose
 * stream breaks off, leaves the memory write-protected. Crash of the agent: nothing is visible, and
 * the guest runs on at once, since the snapshot's guard (snapshot/guard.h) outlives the agent.
 *
 * Refused by name: what cannot be moved (vmm/qemu_preflight.h), disks that QEMU cannot snapshot,
 * memory that cannot be told apart, a guest in `postmigrate`.
 *
 * Memory of the agent: what a writer of the repository takes (repo/repo.h), 24 MiB for the stream,
 * 1 MiB per disk. Device state is at most SNAPSHOT_STATE_MAX, and lies in a file without a name.
 * Threads: any; one VM once at a time (the caller's claim).
 */
#ifndef VMMIG_SNAPSHOT_SNAPSHOT_H
#define VMMIG_SNAPSHOT_SNAPSHOT_H

#include "base/error.h"
#include "proto/fields.h"
#include "repo/repo.h"
#include "snapshot/guard.h"
#include "snapshot/mount.h"
#include "vmm/guest.h"

#define SNAPSHOT_STATE_FILE "device.state"
#define SNAPSHOT_DEFINITION_FILE "vm.json"
#define SNAPSHOT_STATE_MAX (1ull << 30)
#define SNAPSHOT_NAME_MAX 48 /* of NAME, without the NUL */
#define SNAPSHOT_NOTE_MAX 256

enum snapshot_phase {
    SNAPSHOT_PREPARING,  /* looking at the VM and its last snapshot */
    SNAPSHOT_SWITCHING,  /* the guest is paused for an instant */
    SNAPSHOT_COPYING,    /* storing disks and memory while the guest runs */
    SNAPSHOT_COMMITTING, /* making the snapshot visible */
};

struct snapshot_progress {
    enum snapshot_phase phase;
    uint64_t memory_total, memory_done; /* bytes */
    uint64_t disk_total, disk_done;     /* bytes that are to be read, and were */
    uint64_t stored;                    /* bytes added to the repository */
    int64_t pause_ns;                   /* -1: not yet */
};

struct snapshot_params {
    struct guest *guest;
    const char *vm, *name;
    struct repo *repo;
    bool disk_only;
    const char *guest_agent; /* its socket; NULL: that of the command line, if there is one */
    const char *scratch_dir; /* a folder of the agent's */
    const char *socket_dir;  /* another, for sockets; made if it is missing */
    const char *plugin;      /* path of nbdkit-vmmig-plugin.so */
    const struct mount *mount; /* where clones' templates are; NULL: nowhere */
    struct guard_params guard;
    int cancel_fd;
    /* Called often, by the calling thread. */
    void (*progress)(void *arg, const struct snapshot_progress *p);
    void *arg;
};

struct snapshot_report {
    char image[IMAGE_NAME_MAX + 1], parent[IMAGE_NAME_MAX + 1]; /* parent "": none */
    uint64_t memory_bytes, disk_bytes;  /* of the guest */
    uint64_t disk_read;                 /* bytes of disks that were read */
    uint64_t stored;                    /* bytes added to the repository */
    int64_t pause_ns;
    unsigned frozen;                    /* file systems that held still */
    char note[SNAPSHOT_NOTE_MAX];       /* what a user should know; "" */
};

/* USAGE with the rule: 1 to 48 of A-Z a-z 0-9 . _ -, not beginning with '-' or '.'. */
int snapshot_name_check(const char *name, struct vm_error **err);
/* "VM@NAME" in `out`; both are checked. */
int snapshot_image_name(const char *vm, const char *name, char out[IMAGE_NAME_MAX + 1],
                        struct vm_error **err);
/* The other direction: USAGE if it is no such name. */
int snapshot_split_name(const char *image, char ret_vm[VM_NAME_MAX + 1],
                        char ret_name[SNAPSHOT_NAME_MAX + 1], struct vm_error **err);

int snapshot_take(const struct snapshot_params *params, struct snapshot_report *ret_report,
                  struct vm_error **err);

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * clone: a running VM from a template, in a blink: its disks are qcow2 overlays upon the mounted
 * template's, its memory a private mapping of the mounted template's. One of a VMM that links
 * libvmmig-attach has no disks: it gets its memory and a name.
 *
 *     clone_start(&params, &clone, &err)                the guest runs
 *     ... it becomes a VM of the agent's ...
 *     clone_tell(&params, &clone)                       it is thawed, and told its MAC addresses:
 * may take 15 s clone_finish(&clone)
 *
 * The template's files are opened first, which leases it: from then on it may be deleted. Overlays
 * are DIR/NAME/diskN.qcow2, with the mount's path of the version (t:NAME@DIGEST) as their backing
 * file, which is the same on every host that mounts at the same place. An empty overlay of each
 * disk is kept as a model per version (MODEL-DIR/t:NAME@DIGEST-FILE.qcow2), since copying is faster
 * than making; what a model refers to is looked at before it is used.
 *
 * Failure: nothing is left, neither process nor overlay nor lease. NOT_FOUND: no such template;
 * CONFLICT: DIR/NAME is there already; NO_SPACE: no room for the overlay; REFUSED:
 * vmm/qemu_clone.h, vmm/attach_clone.h, or a disk that was not saved. Threads: any.
 */
#ifndef VMMIG_SNAPSHOT_CLONE_H
#define VMMIG_SNAPSHOT_CLONE_H

#include "repo/repo.h"
#include "repo/template.h"
#include "snapshot/frozen.h"
#include "snapshot/mount.h"
#include "vmm/qemu_clone.h"

struct clone_params {
    struct repo *repo;
    struct mount *mount;
    const char *template; /* NAME:TAG or NAME@DIGEST */
    const char *name;     /* of the clone */
    const char *disk_dir; /* DIR */
    const char *model_dir;
    const struct qemu_name_map *taps;
    unsigned n_taps;
    bool keep_macs;
    uint64_t disk_size;   /* of the command line's first disk that can be written; 0: as it was */
    uint64_t memory;      /* of the guest, plugged in; 0: as it was */
    /* Fill what launches have in common, of either kind of VMM; qmp_path is where its socket goes. */
    int (*prepare)(void *arg, const struct qemu_definition *d, struct qemu_launch *launch,
                   struct vm_error **err);
    /* A file or a folder was made. May be NULL. */
    int (*made)(void *arg, const char *path, struct vm_error **err);
    void *arg;
    struct thawer thawer; /* of a guest whose file systems stood frozen */
    uid_t uid; /* who owns overlays */
    gid_t gid;
};

struct clone {
    struct template template;
    struct guest *guest; /* the caller's */
    char **argv;
    char *cwd;
    struct qemu_clone_notes notes;
    struct clone_timing timing;
    bool running, frozen; /* frozen: its file systems, which is noted (snapshot/frozen.h) */
};

int clone_start(const struct clone_params *params, struct clone *ret_clone, struct vm_error **err);
/* What fails is noted. */
void clone_tell(const struct clone_params *params, struct clone *c);
/* The guest is not touched. */
void clone_finish(struct clone *c);
/* Remove the models of templates that are gone. */
void clone_sweep_models(struct repo *r, const char *model_dir);
/* Remove the overlays of a clone that does not run (any more), and their folder. */
void clone_remove_disks(const char *disk_dir, const char *name);

#endif

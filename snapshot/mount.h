/* SPDX-License-Identifier: Apache-2.0 */
/*
 * mount: the agent's side of a mount (snapshot/holder.h is the other): the holder is started once
 * and found again by its socket, whatever becomes of the agent.
 *
 *     CLEANUP(mount) struct mount *m = mount_create(&setup, &err);
 *     mount_ensure(m, &err);                    start the holder, or adopt the one that is there
 *     mount_path(m, "t:debian12@0f..", "memory.raw", path)
 *     mount_bind(m, "/mnt/images", uid, &err)   the same tree at one more place, read-only
 *
 * A holder that is adopted gets the setup's cache-size and read-timeout. One that is adopted and
 * whose fetchers are of another version of vmmig gets new ones (MOUNT_REFRESH); the holder itself
 * stays as it is until nobody uses the mount. A dead holder leaves an unusable mount point, which
 * is replaced; guests that mapped it have died with it.
 *
 * The holder is nobody's child, in a session and, where the configuration names cgroups, a cgroup
 * of its own, so that the end of the agent's service does not take it along. Threads: any.
 */
#ifndef VMMIG_SNAPSHOT_MOUNT_H
#define VMMIG_SNAPSHOT_MOUNT_H

#include "base/cleanup.h"
#include "snapshot/mount_wire.h"

#include <stdbool.h>

struct mount_setup {
    const char *repository; /* URL */
    const char *folder;     /* where it is mounted; made if it is missing */
    const char *cache;      /* folder */
    uint64_t cache_size, read_timeout_ms, record_ms;
    const char *control;    /* the holder's socket */
    const char *log;        /* the holder's output, appended */
    const char *owner;      /* of its leases: unique to this host, the same for all its holders */
    const char *group;      /* who may read, besides root; "" for nobody */
    const char *cgroup;     /* "" for the agent's */
    const char *libexec;    /* folder of vmmig-mount and vmmig-fetch */
};

struct mount;

/* Copies the setup; starts nothing. */
struct mount *mount_create(const struct mount_setup *setup, struct vm_error **err);
/* The holder stays. */
void mount_destroy(struct mount *m);
DEFINE_CLEANUP(mount, struct mount *, mount_destroy)

/*
 * CONFLICT if the holder that is there shows another repository, or shows it elsewhere, and is in use; or if a mount
 * is there whose holder is not the one at `control`. UNREACHABLE, TIMEOUT: the holder lives and does not answer.
 */
int mount_ensure(struct mount *m, struct vm_error **err);
/* Of the holder: NOT_FOUND if there is none. */
int mount_status(struct mount *m, struct mount_state *ret_state, struct vm_error **err);
/* End the holder; CONFLICT while files are in use. 0 also if there is none. */
int mount_stop(struct mount *m, struct vm_error **err);
/* The path of a file of an image below the mount. */
void mount_path(const struct mount *m, const char *image, const char *file, char out[4096]);
/* The other direction: would that be the path of a file of an image? */
bool mount_parse(const struct mount *m, const char *path, char ret_image[MOUNT_NAME_MAX + 1],
                 char ret_file[MOUNT_FILE_NAME_MAX + 1]);
/*
 * And has process `pid` that very file open? A name that got another image since is another file.
 */
bool mount_has(const struct mount *m, const char *path, pid_t pid, char ret_image[MOUNT_NAME_MAX + 1],
               char ret_file[MOUNT_FILE_NAME_MAX + 1]);
/* `dir` must be an empty folder, and that of `owner` unless that is root. */
int mount_bind(struct mount *m, const char *dir, uid_t owner, struct vm_error **err);
/* What was bound there goes. REFUSED if that is no tree of images; CONFLICT while it is in use. */
int mount_unbind(const char *dir, struct vm_error **err);

#endif

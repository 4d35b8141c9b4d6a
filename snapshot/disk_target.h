/* SPDX-License-Identifier: Apache-2.0 */
/*
 * disk_target: the far end of a disk that QEMU pushes: an nbdkit with our plugin listens at a
 * socket for one client, and what it is given arrives here and goes into an image's file.
 *
 *     t = disk_target_create(&params, &err)              QEMU's NBD server listens at
 * params.socket_path
 *     ... QEMU writes, and disconnects ...
 *     disk_target_finish(t, deadline, cancel_fd, &err)   everything has arrived
 *     disk_target_destroy(t)                             always: nbdkit is gone
 *
 * If the image's writer fails, QEMU gets an I/O error; disk_target_error tells the cause. An nbdkit
 * that dies is an error of QEMU's job, and of finish. It dies with the agent.
 *
 * Memory: 1 MiB. Threads: one of its own; all calls from one.
 */
#ifndef VMMIG_SNAPSHOT_DISK_TARGET_H
#define VMMIG_SNAPSHOT_DISK_TARGET_H

#include "snapshot/gather.h"

#include <sys/types.h>

struct disk_target;

struct disk_target_params {
    struct gather *gather;
    struct image_file *file;
    uint64_t size;
    const char *plugin; /* path of nbdkit-vmmig-plugin.so */
    const char *socket_path; /* one that a dead agent left there is replaced */
    uid_t user;              /* who may connect, beside us */
};

struct disk_target *disk_target_create(const struct disk_target_params *params, struct vm_error **err);
int disk_target_finish(struct disk_target *t, int64_t deadline_ns, int cancel_fd,
                       struct vm_error **err);
/* Why it takes nothing more; NULL if it does. Valid as long as t. */
const struct vm_error *disk_target_error(struct disk_target *t);
/* Bytes that QEMU wrote, zeros among them. */
uint64_t disk_target_bytes(struct disk_target *t);
void disk_target_destroy(struct disk_target *t);
DEFINE_CLEANUP(disk_target, struct disk_target *, disk_target_destroy)

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * disk_file: a disk image that is made and then written once.
 *
 *     disk_file_make(path, "qcow2", size, made, arg, cancel_fd, &err)   fails if there is a file already
 *     f = disk_file_open(path, "qcow2", cancel_fd, &err)
 *     disk_file_write(f, offset, data, len, &err)      zeros where nothing was written
 *     disk_file_finish(f, &err)                        all of it is on its way to the disk; frees f
 *
 * raw: a sparse file. Other formats, and RADOS block images ("rbd:POOL/IMAGE" for a path): made by qemu-img, written
 * through a qemu-nbd of ours (snapshot/qemu_nbd.h), for as long as their storage needs: a latch, or -1, ends that with
 * CANCELLED. Threads: one.
 */
#ifndef VMMIG_SNAPSHOT_DISK_FILE_H
#define VMMIG_SNAPSHOT_DISK_FILE_H

#include "base/cleanup.h"
#include "base/error.h"

#include <stddef.h>
#include <stdint.h>

struct disk_file;

/*
 * `made` is called when there is something at the path; from then on that is the caller's, also when this fails. It is
 * not for RADOS block images: of one of those there may be something as soon as this is called.
 */
typedef int disk_file_made(void *arg, struct vm_error **err);
int disk_file_make(const char *path, const char *format, uint64_t size, disk_file_made *made, void *arg,
                   int cancel_fd, struct vm_error **err);
struct disk_file *disk_file_open(const char *path, const char *format, int cancel_fd, struct vm_error **err);
int disk_file_write(struct disk_file *f, uint64_t offset, const void *data, size_t len,
                    struct vm_error **err);
int disk_file_finish(struct disk_file *f, struct vm_error **err);
void disk_file_close(struct disk_file *f); /* as it is */
DEFINE_CLEANUP(disk_file, struct disk_file *, disk_file_close)

#endif

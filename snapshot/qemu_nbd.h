/* SPDX-License-Identifier: Apache-2.0 */
/*
 * qemu_nbd: an image that a qemu-nbd of ours writes.
 *
 *     q = qemu_nbd_start(path, "qcow2", cancel_fd, &err)
 *     qemu_nbd_write(q, offset, data, len, &err)
 *     qemu_nbd_finish(q, &err)                 all of it is written, and nobody has the image open any more
 *     qemu_nbd_stop(q)                         always; as it is, if it was not finished
 *
 * Each of them waits for as long as the image's storage needs, and ends with CANCELLED when the latch cancel_fd is set
 * (base/io.h; -1: never). One that does not end by itself within QEMU_NBD_END_MS is killed. Threads: one.
 */
#ifndef VMMIG_SNAPSHOT_QEMU_NBD_H
#define VMMIG_SNAPSHOT_QEMU_NBD_H

#include "base/cleanup.h"
#include "base/error.h"

#include <stddef.h>
#include <stdint.h>

enum { QEMU_NBD_END_MS = 3000 };

struct qemu_nbd;

struct qemu_nbd *qemu_nbd_start(const char *path, const char *format, int cancel_fd, struct vm_error **err);
int qemu_nbd_write(struct qemu_nbd *q, uint64_t offset, const void *data, size_t len, struct vm_error **err);
int qemu_nbd_finish(struct qemu_nbd *q, struct vm_error **err);
void qemu_nbd_stop(struct qemu_nbd *q); /* NULL is fine */
DEFINE_CLEANUP(qemu_nbd, struct qemu_nbd *, qemu_nbd_stop)

#endif

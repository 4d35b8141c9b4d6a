/* SPDX-License-Identifier: Apache-2.0 */
/*
 * attach_reader: the memory of another process, read by a process of its own. What lies behind a
 * page there may be a file system that does not answer: that of a template whose store is away, or
 * one of a VMM that means harm. The kernel lets nobody who reads such a page go, not even for a
 * SIGKILL. So it is not the agent that reads it, but a child, which is left to itself when the
 * agent waits no longer; it ends when it can. The other process, and what it does to its memory
 * meanwhile, does not wait for it.
 *
 *     CLEANUP(attach_reader) struct attach_reader *r = attach_reader_create(pid, fd, &err);    of
 * /proc/PID/mem attach_reader_read(r, stretches, n, out, cancel_fd, &err);
 *
 * Errors: VMM_DIED once the process is gone; CANCELLED; TIMEOUT after ATTACH_READER_LIMIT_MS
 * without an answer. After an error nothing more can be read. Threads: one at a time. Memory:
 * ATTACH_READER_BYTES_MAX.
 */
#ifndef VMMIG_VMM_ATTACH_READER_H
#define VMMIG_VMM_ATTACH_READER_H

#include "base/cleanup.h"
#include "base/error.h"
#include "vmm/page_batch.h"

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define ATTACH_READER_BYTES_MAX (PAGE_BATCH_MAX * GUEST_PAGE_SIZE) /* of one call */
#define ATTACH_READER_STRETCHES_MAX PAGE_BATCH_MAX
#define ATTACH_READER_LIMIT_MS 60000

struct attach_reader;

struct attach_stretch {
    uint64_t address, size;
};

/* fd stays the caller's, who may close it. */
struct attach_reader *attach_reader_create(pid_t pid, int fd, struct vm_error **err);
void attach_reader_destroy(struct attach_reader *r);
DEFINE_CLEANUP(attach_reader, struct attach_reader *, attach_reader_destroy)

/* The stretches as they are now, one after the other, into `out`. */
int attach_reader_read(struct attach_reader *r, const struct attach_stretch *stretches, unsigned n, uint8_t *out,
                       int cancel_fd, struct vm_error **err);

#endif

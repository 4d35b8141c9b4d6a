/* SPDX-License-Identifier: Apache-2.0 */
/*
 * source: the bytes of a disk image that is to be imported: a raw file or block device, or any
 * format of QEMU's, read through a qemu-nbd of our own.
 *
 * Threads: one. Memory: none to speak of.
 */
#ifndef VMMIG_REPO_SOURCE_H
#define VMMIG_REPO_SOURCE_H

#include "base/cleanup.h"
#include "base/error.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct source;

/*
 * In two steps, so that a process can open what another one then reads. prepare opens the file with
 * the rights of the caller and gives a descriptor: of the file itself if it is raw, else of a
 * socket at which a qemu-nbd serves it read-only until the socket is closed by all who have it,
 * whether or not anybody spoke over it. open_fd takes such a descriptor, which may come from
 * somebody less privileged: it opens no path, and runs nothing.
 * `format` NULL: looked for. `name`: of the file, in messages.
 *
 * USAGE or REFUSED for what repo.h says, CORRUPT for an image that QEMU cannot make sense of.
 */
int source_prepare(const char *path, const char *format, int *ret_fd, struct vm_error **err);
/* The descriptor stays the caller's. */
struct source *source_open_fd(int fd, const char *name, struct vm_error **err);
void source_close(struct source *s);
DEFINE_CLEANUP(source, struct source *, source_close)
uint64_t source_size(const struct source *s);

/*
 * The extent at `offset` (which is less than the size): *ret_len bytes from there on are zero, or
 * are not known to be. At least 1, at most the rest.
 */
int source_extent(struct source *s, uint64_t offset, uint64_t *ret_len, bool *ret_zero,
                  struct vm_error **err);
int source_read(struct source *s, uint64_t offset, void *out, size_t len, struct vm_error **err);

#endif

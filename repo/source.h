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
 * `format` NULL: looked for. USAGE or REFUSED for what repo.h says, CORRUPT for an image that QEMU
 * cannot make sense of.
 */
struct source *source_open(const char *path, const char *format, struct vm_error **err);
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

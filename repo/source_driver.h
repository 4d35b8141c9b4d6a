/* SPDX-License-Identifier: Apache-2.0 */
/* source_driver: what is behind repo/source.h. */
#ifndef VMMIG_REPO_SOURCE_DRIVER_H
#define VMMIG_REPO_SOURCE_DRIVER_H

#include "repo/source.h"

struct source_driver {
    void (*close)(struct source *s);
    int (*extent)(struct source *s, uint64_t offset, uint64_t *ret_len, bool *ret_zero,
                  struct vm_error **err);
    int (*read)(struct source *s, uint64_t offset, void *out, size_t len, struct vm_error **err);
};

/* The first member of a driver's own struct. */
struct source {
    const struct source_driver *driver;
    uint64_t size;
};

/* On descriptors that stay the caller's. */
struct source *source_raw_open(int fd, const char *name, struct vm_error **err);
struct source *source_nbd_open(int fd, const char *name, struct vm_error **err);

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * dirtylog_driver: what a driver of dirtylog/dirtylog.h implements. Internal to dirtylog/.
 *
 * dirtylog.c checks arguments, registers slots with and without logging, counts and records; a driver
 * does what is left. All calls but vcpu_exit come from one thread at a time.
 */
#ifndef VMMIG_DIRTYLOG_DIRTYLOG_DRIVER_H
#define VMMIG_DIRTYLOG_DIRTYLOG_DRIVER_H

#include "dirtylog/dirtylog.h"

#include <stdatomic.h>
#include <stdio.h>

struct dirtylog_driver {
    enum dirtylog_kind kind;
    bool uses_kvm; /* slots are registered with KVM_MEM_LOG_DIRTY_PAGES while it is started */
    int (*create)(struct dirtylog *log, const struct dirtylog_params *params, struct vm_error **err);
    void (*destroy)(struct dirtylog *log);
    /* Optional: log->slots are set, but nothing is logged yet. */
    int (*start)(struct dirtylog *log, struct vm_error **err);
    /* Optional: nothing is logged any more. */
    void (*stop)(struct dirtylog *log);
    int (*begin_harvest)(struct dirtylog *log, struct vm_error **err); /* optional */
    /* OR what was written since into bitmap. */
    int (*harvest)(struct dirtylog *log, unsigned slot, uint64_t *bitmap, struct vm_error **err);
    /* Optional: a driver whose harvest has protected the pages already needs none. */
    int (*clear)(struct dirtylog *log, unsigned slot, uint64_t first, uint64_t n,
                 const uint64_t *bitmap, struct vm_error **err);
    bool (*vcpu_exit)(struct dirtylog *log, unsigned vcpu, uint32_t exit_reason); /* optional */
};

struct dirtylog {
    const struct dirtylog_driver *driver;
    struct dirtylog_params params; /* vcpu_fds is our own copy; trace_path is not kept */
    bool started;
    struct dirtylog_slot slots[DIRTYLOG_SLOTS_MAX];
    unsigned n_slots;
    uint64_t *scratch; /* as large as the bitmap of the largest slot */
    void *state;       /* the driver's own */
    FILE *record;
    atomic_uint_fast64_t ring_full;
    uint64_t pages, harvests;
};

extern const struct dirtylog_driver dirtylog_bitmap_driver, dirtylog_plain_driver,
    dirtylog_ring_driver, dirtylog_trace_driver;

/* CONFLICT if the slot is not there (any more), else SYSTEM. */
int dirtylog_ioctl_failed(const struct dirtylog *log, unsigned slot, const char *what,
                          struct vm_error **err);

#endif

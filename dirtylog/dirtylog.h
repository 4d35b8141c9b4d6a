/* SPDX-License-Identifier: Apache-2.0 */
/*
 * dirtylog: which pages of a VM were written since one last asked. It runs inside the VMM, since KVM
 * answers these ioctls to no other process. One interface, four drivers:
 *
 *     bitmap  KVM_GET_DIRTY_LOG and KVM_CLEAR_DIRTY_LOG with manual protect (Linux 5.7): reading and write
 *             protecting are two steps, so pages are protected in pieces, each just before it is copied.
 *     ring    one ring of page numbers per vCPU (Linux 5.11). Cost follows the pages written, not
 *             the memory. Excludes the bitmap ioctls for the life of the VM.
 *     plain   KVM_GET_DIRTY_LOG alone: reads and protects at once. For any kernel.
 *     trace   no KVM: replays a recording (below), for tests without /dev/kvm.
 *
 *     kind = DIRTYLOG_AUTO;
 *     dirtylog_prepare(vm_fd, &kind, 0, &err)        before the first vCPU is made
 *     log = dirtylog_create(&params, &err)           when all vCPUs are there
 *     dirtylog_start(log, slots, n, &err)            the guest runs on, now with its writes logged
 *     dirtylog_harvest(log, slot, bitmap, &err)      for every slot: ORs bits of written pages into the bitmap
 *     dirtylog_clear(log, slot, first, n, bitmap)    before those pages are copied
 *     dirtylog_stop(log)
 *
 * Rules. (1) After start nothing is known: the first round is every page, whatever harvest says.
 * (2) A page is copied only after its bit was harvested and then cleared, in this order: a write that the
 * copy missed then sets the bit again. (3) Only bits of pages that will be copied are cleared. (4) harvest
 * never forgets: a bit that was harvested and not cleared may or may not come again; whoever harvests
 * keeps it. (5) What the VMM writes itself is not in any log.
 *
 * A full ring makes a vCPU leave KVM_RUN with KVM_EXIT_DIRTY_RING_FULL: its thread calls
 * dirtylog_vcpu_exit, which takes the entries over, so the next harvest has them.
 *
 * Slots are a copy of what the VMM registered; start and stop register them again with and without
 * KVM_MEM_LOG_DIRTY_PAGES. Bitmaps have a bit per page of 4 KiB, least significant first, in 64-bit words;
 * bits beyond the end of a slot stay zero.
 *
 * A recording is text: "vmmig-trace 1", a line "slots PAGES...", then per round a line "round" and lines
 * "SLOT FIRST COUNT" of pages written. dirtylog_record writes it from any driver's harvests. The
 * replay changes the first word of each page named, as a guest would have, and reports it.
 *
 * Threads: dirtylog_vcpu_exit from any vCPU's, at any time between create and destroy; everything else from
 * one thread at a time. Memory: a bitmap of the largest slot; with the ring two of all slots, and
 * 16 bytes per entry of all rings.
 * Errors: SYSTEM with the ioctl's errno; CONFLICT when a slot is not what was registered; REFUSED for a
 * driver that the host lacks.
 */
#ifndef VMMIG_DIRTYLOG_DIRTYLOG_H
#define VMMIG_DIRTYLOG_DIRTYLOG_H

#include "base/cleanup.h"
#include "base/error.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define DIRTYLOG_PAGE 4096u
#define DIRTYLOG_SLOTS_MAX 32
#define DIRTYLOG_VCPUS_MAX 256
/* Pages are cleared in multiples of it, but for the end of a slot (KVM's rule). */
#define DIRTYLOG_CLEAR_ALIGN 64u
#define DIRTYLOG_RING_ENTRIES_DEFAULT 16384u
#define DIRTYLOG_RING_ENTRIES_MIN 1024u

/* Numbers are those of enum vmmig_tracking. X(id, number, name) */
#define DIRTYLOG_KINDS(X)                                                                          \
    X(AUTO, 0, "auto")                                                                             \
    X(BITMAP, 1, "bitmap")                                                                         \
    X(RING, 2, "ring")                                                                             \
    X(PLAIN, 3, "plain")                                                                           \
    X(TRACE, 4, "trace")

#define X(id, number, name) DIRTYLOG_##id = number,
enum dirtylog_kind { DIRTYLOG_KINDS(X) };
#undef X

struct dirtylog_slot {
    uint32_t id;    /* KVM's number of it */
    uint32_t flags; /* that it is registered with, without KVM_MEM_LOG_DIRTY_PAGES */
    uint64_t guest_address, size;
    void *host;
};

struct dirtylog_params {
    enum dirtylog_kind kind; /* as dirtylog_prepare said */
    int vm_fd;               /* stays the caller's, as do the others; -1 with a trace */
    const int *vcpu_fds;     /* copied */
    unsigned n_vcpus;
    unsigned ring_entries;   /* as given to dirtylog_prepare */
    const char *trace_path;  /* of the recording to replay */
    /*
     * Make a vCPU leave KVM_RUN soon, and tell whether it is in there. May be NULL: then what the
     * processor still buffers shows up in a later harvest.
     */
    void (*kick)(void *arg, unsigned vcpu);
    bool (*in_guest)(void *arg, unsigned vcpu);
    void *arg;
};

struct dirtylog_stats {
    uint64_t ring_full;    /* exits because a ring was full */
    uint64_t pages;        /* bits harvested */
    uint64_t harvests;
};

struct dirtylog;

const char *dirtylog_kind_name(enum dirtylog_kind kind);
/* False if it is none of these. */
bool dirtylog_kind_parse(const char *name, enum dirtylog_kind *ret_kind);

/*
 * Choose a driver (AUTO: bitmap, else plain) or check the one that *kind names, and switch on what it needs
 * in the VM. ring_entries: a power of two, 0 for the default.
 */
int dirtylog_prepare(int vm_fd, enum dirtylog_kind *kind, unsigned ring_entries,
                     struct vm_error **err);

struct dirtylog *dirtylog_create(const struct dirtylog_params *params, struct vm_error **err);
/* Stops it first, if need be. NULL is fine. */
void dirtylog_destroy(struct dirtylog *log);
DEFINE_CLEANUP(dirtylog, struct dirtylog *, dirtylog_destroy)

/* When it fails nothing is logged. */
int dirtylog_start(struct dirtylog *log, const struct dirtylog_slot *slots, unsigned n,
                   struct vm_error **err);
bool dirtylog_is_started(const struct dirtylog *log);
/*
 * One round: dirtylog_begin_harvest once, then dirtylog_harvest for each slot. `bitmap` has
 * dirtylog_words(size) words.
 */
int dirtylog_begin_harvest(struct dirtylog *log, struct vm_error **err);
int dirtylog_harvest(struct dirtylog *log, unsigned slot, uint64_t *bitmap, struct vm_error **err);
/*
 * Have the pages first..first+n, as far as their bits in `bitmap` are set, write protected again. `first`
 * and n are multiples of DIRTYLOG_CLEAR_ALIGN, but for an n up to the end of the slot. `bitmap` is that
 * of the whole slot, and stays as it is.
 */
int dirtylog_clear(struct dirtylog *log, unsigned slot, uint64_t first, uint64_t n,
                   const uint64_t *bitmap, struct vm_error **err);
/* Also after errors. The slots are still KVM's: one that was removed would be made anew. */
void dirtylog_stop(struct dirtylog *log);

/* A vCPU left KVM_RUN with this exit reason. True: that was the log's business; run on. */
bool dirtylog_vcpu_exit(struct dirtylog *log, unsigned vcpu, uint32_t exit_reason);

/* From the next start on, write what is harvested into a file, which is replaced. */
int dirtylog_record(struct dirtylog *log, const char *path, struct vm_error **err);

void dirtylog_get_stats(struct dirtylog *log, struct dirtylog_stats *ret_stats);

static inline size_t dirtylog_words(uint64_t size)
{
    return (size_t)((size / DIRTYLOG_PAGE + 63) / 64);
}

#endif

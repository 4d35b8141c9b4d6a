/* SPDX-License-Identifier: Apache-2.0 */
/*
 * guest: the one interface through which the rest of vmmig sees a virtual machine, whatever its
 * VMM. Drivers: QEMU (vmm/qemu.h). The engines in migrate/ use nothing else of a driver.
 *
 * Two halves. A *source* gives its memory away:
 *
 *     guest_source_start(g, &params, &events, arg)  pages and bytes arrive in `events`, round by round
 *     guest_source_progress(g, &p)                  remaining, dirty rate, throttle: asked at any time
 *     guest_pause(g)                                by the engine, when it predicts a short enough pause
 *     ... events->memory_done, then bytes of device state, then events->done
 *     guest_source_stop(g)                          always, whatever happened; the driver's threads are gone
 *     guest_resume(g), guest_release(g) or guest_kill(g)    the engine decides
 *
 * A *sink* takes it; it is a VMM that waits for an incoming guest, paused:
 *
 *     guest_sink_regions(g, ...)                    its memory, into which the engine decodes pages
 *     guest_sink_bytes(g, data, n)                  what the VMM's own loader gets, in order
 *     guest_sink_finish(g, deadline)                loaded completely, and paused
 *     guest_resume(g), guest_release(g) or guest_kill(g)
 *
 * Ownership: handles are reference counted. Who made one has a reference, guest_ref takes another, and
 * guest_unref gives one back; with the last the handle is freed, and its connection closed. It never touches the
 * VMM. Threads: every call may come from any thread, several at once, guest_unref not from a callback
 * of the driver's; calls on one half are made by one engine at a time. Times in
 * nanoseconds, memory in bytes unless a name says otherwise. Errors: VMM_DIED once the process is
 * gone, TIMEOUT when it does not answer, REFUSED with the VMM's own words when it refuses.
 * A crash of the agent leaves the VMM running; a new agent attaches again and finds by
 * guest_status what the VMM was doing.
 */
#ifndef VMMIG_VMM_GUEST_H
#define VMMIG_VMM_GUEST_H

#include "base/cleanup.h"
#include "base/error.h"
#include "base/process.h"
#include "vmm/page_batch.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define GUEST_REGIONS_MAX 256
#define GUEST_REGION_NAME_MAX 256 /* with the NUL */
/* A VMM's connection ends before its process does. One that lives on is asked for something meanwhile. */
enum { GUEST_END_BEGINS_MS = 500, GUEST_END_TIMEOUT_MS = 5000 };

struct guest;

enum guest_run_state {
    GUEST_RUNNING,
    GUEST_PAUSED,      /* by somebody's request; also a VM that was started paused */
    GUEST_INCOMING,    /* waits for a migration, nothing loaded yet */
    GUEST_POSTMIGRATE, /* gave its state away completely; `resume` makes it go on from there */
    GUEST_BROKEN,      /* I/O error, internal error, shut down, panicked: `detail` has the VMM's word */
};

struct guest_status {
    enum guest_run_state state;
    char detail[32]; /* the VMM's own name of the state */
    bool migrating;  /* the VMM says that an outgoing migration is under way */
    bool finishing;  /* GUEST_PAUSED by the VMM itself, which gives its last away */
};

/* A stretch of guest memory, as the VMM's migration stream names it. */
struct guest_region {
    char name[GUEST_REGION_NAME_MAX];
    uint64_t size;      /* bytes, a multiple of GUEST_PAGE_SIZE */
    uint64_t page_size; /* of the memory behind it: 4096, or that of hugetlb */
    uint8_t *base;      /* where it is mapped in this process; NULL if it is not */
    /*
     * A file that is the same memory, from byte file_offset on, or 0. Pages are written through it: that costs a
     * third of a fault in our mapping, and memory that runs out is an error and no signal. Looking at a hole there does
     * not fill it.
     */
    int file;
    uint64_t file_offset;
    /*
     * Where the VMM itself has it, in process `process`; 0 if that is not known or may not be used.
     * vmm/guest_memory.h writes through it before all else, and only while that process lives:
     * `process_fd` is its pidfd, for its number may be another's one day. Of huge pages, whose file
     * cannot be written, it is `base`, in this process (process_fd is -1): the kernel's word that
     * there is no memory is an error then, and no signal.
     */
    uint64_t remote;
    int process, process_fd;
    /*
     * A sink's, when it was made: it is known to hold nothing but zeros. Not of a VMM that somebody else started:
     * its memory may be a file with contents, or have firmware in it.
     */
    bool zero;
};

struct guest_source_params {
    unsigned channels;        /* pages are sorted by page_stripe_channel(addr, channels) */
    uint64_t max_bandwidth;   /* bytes a second out of the VMM, 0: no limit */
    int64_t downtime_limit_ns; /* for a driver that throttles the guest by itself, for a pause no longer; 0: none */
    /*
     * Names of the regions whose pages come as pages, in the order of their region numbers. Those of
     * any other region stay in the bytes. NULL: none, everything is bytes.
     */
    const struct guest_region *regions;
    unsigned n_regions;
    /*
     * The memory of one instant: from the start on the VMM prepares; then, while the guest stands, it is told to go
     * (QEMU: qemu_source_go), protects the memory against being written, lets the guest go on by itself, and gives
     * each page once, before the guest may change it. The bytes of device state are of the same instant. `done`
     * succeeds with the guest in whatever state it then is. `regions` stay the caller's until `done`. For QEMU
     * qemu_snapshot_can_protect comes before.
     */
    bool background;
};

/*
 * Called in the driver's own threads. May block: that is the back-pressure that makes the VMM wait.
 * -1 ends the source with that error.
 */
struct guest_source_events {
    /* Takes over one reference of batch. Calls for the same channel come one after the other. */
    int (*pages)(void *arg, struct page_batch *batch, struct vm_error **err);
    /* The next bytes for the destination's loader. */
    int (*bytes)(void *arg, const void *data, size_t n, struct vm_error **err);
    /*
     * May be NULL: then `bytes`. The same of bytes that stay as they are as long as somebody has a reference of holder,
     * of which this takes one over, and which has no pages.
     */
    int (*held_bytes)(void *arg, const void *data, size_t n, struct page_batch *holder, struct vm_error **err);
    /*
     * The guest is paused and its last page was given to `pages`: the bytes from here on may be
     * loaded only when all pages are in place.
     */
    int (*memory_done)(void *arg, struct vm_error **err);
    /*
     * The end, once: err is NULL when the VMM confirmed that it gave everything away and is in
     * GUEST_POSTMIGRATE, else the reason (the callee frees it).
     */
    void (*done)(void *arg, struct vm_error *err);
    /* A new round begins (2, 3, ...): the dirty log was read again. From the driver's thread. */
    void (*round)(void *arg, unsigned round);
    /*
     * May be NULL. Asked by a driver that can choose when its log is read (ops->mapped_source), before each reading
     * while the guest runs: returns when all pages that were given are where they belong, or the engine has paused the
     * guest. So a round finds what is left, all of it, and nothing is on its way to be overtaken. *ret_rtt_ns: the
     * link's least round trip; 0: unknown.
     */
    int (*settle)(void *arg, int64_t *ret_rtt_ns, struct vm_error **err);
    /*
     * Background, may be NULL: the stream is about to begin; `fd` is the end from which this process reads it, and
     * stays the driver's. As long as somebody holds a copy, the VMM does not see this process die. -1: it does
     * not begin.
     */
    int (*opened)(void *arg, int fd, struct vm_error **err);
};

struct guest_source_progress {
    unsigned round;           /* 1 is the first pass over all memory */
    uint64_t total;           /* bytes of guest memory */
    uint64_t remaining;       /* bytes known to be dirty and not yet given out */
    uint64_t dirty_rate;      /* bytes a second, as last measured; 0 while unknown */
    uint64_t zero_pages;      /* pages that the VMM itself found to be zero */
    uint64_t bytes_out;       /* bytes read from the VMM so far */
    unsigned throttle_percent; /* how much of the vCPUs' time the VMM takes away, 0: none */
    int64_t paused_at_ns;     /* monotonic: when the vCPUs came to stand; 0: they run */
    /*
     * This VMM loses writes when it reads its dirty log a second time while the guest runs. It pauses
     * the guest by itself at the end of the first round, whatever the limit.
     */
    bool one_round;
    uint64_t state_bytes;     /* of its devices, as far as it says so */
    uint64_t working_set;     /* bytes written at least once since the first round; 0: not known */
};

struct guest_ops {
    const char *driver; /* "qemu" */
    /*
     * Pages of batches lie in the guest's own memory, and change while it runs: whoever looks at one twice
     * copies it first. A page that changed is dirty again, and comes again.
     */
    bool mapped_source;
    /* While it is a source the VMM may stop its guest without being told to (struct
     * guest_source_progress: one_round). */
    bool pauses_by_itself;
    void (*destroy)(struct guest *g);
    int (*status)(struct guest *g, struct guest_status *ret_status, struct vm_error **err);
    int (*pause)(struct guest *g, struct vm_error **err);
    int (*resume)(struct guest *g, struct vm_error **err);
    int64_t (*resumed_at_ns)(struct guest *g); /* NULL: the answer to resume says as much */
    int (*release)(struct guest *g, struct vm_error **err); /* NULL: there is nothing to give back */
    unsigned (*resumes)(struct guest *g); /* NULL: the VMM does not report it */
    int (*source_start)(struct guest *g, const struct guest_source_params *params,
                        const struct guest_source_events *events, void *arg, struct vm_error **err);
    int (*source_progress)(struct guest *g, struct guest_source_progress *ret_progress,
                           struct vm_error **err);
    int (*source_stop)(struct guest *g, struct vm_error **err);
    int (*announce)(struct guest *g, struct vm_error **err);
    int (*quit)(struct guest *g, struct vm_error **err);
    int (*sink_populate)(struct guest *g, const uint64_t *addrs, unsigned n, struct vm_error **err);
    int (*sink_regions)(struct guest *g, const struct guest_region **ret_regions, unsigned *ret_n);
    int (*sink_bytes)(struct guest *g, const void *data, size_t n, int64_t deadline_ns,
                      int cancel_fd, struct vm_error **err);
    int (*sink_finish)(struct guest *g, int64_t deadline_ns, int cancel_fd, struct vm_error **err);
};

/* What a driver's own struct begins with. */
struct guest {
    const struct guest_ops *ops;
    struct process_identity process;
    atomic_uint more_refs; /* besides the first; 0 when it is made */
};

static inline struct guest *guest_ref(struct guest *g)
{
    if (g)
        atomic_fetch_add(&g->more_refs, 1);
    return g;
}

static inline void guest_unref(struct guest *g)
{
    if (g && atomic_fetch_sub(&g->more_refs, 1) == 0)
        g->ops->destroy(g);
}
DEFINE_CLEANUP(guest, struct guest *, guest_unref)

static inline int guest_status(struct guest *g, struct guest_status *ret_status,
                               struct vm_error **err)
{
    return g->ops->status(g, ret_status, err);
}

/* Stop the vCPUs; returns when they stand and pending I/O is drained. Fine if they stood already. */
static inline int guest_pause(struct guest *g, struct vm_error **err)
{
    return g->ops->pause(g, err);
}

/*
 * Let the vCPUs run. From GUEST_POSTMIGRATE this takes the guest back: disks are activated first. If
 * it fails before a vCPU ran, the error says so and the guest stands.
 */
static inline int guest_resume(struct guest *g, struct vm_error **err)
{
    return g->ops->resume(g, err);
}

/*
 * Monotonic: when its vCPUs last began to run, as the VMM says; its answers may come later, since
 * then it has to do with its guest. 0: it does not say.
 */
static inline int64_t guest_resumed_at_ns(struct guest *g)
{
    return g->ops->resumed_at_ns ? g->ops->resumed_at_ns(g) : 0;
}

/*
 * Instead of guest_resume, of a guest that is to stand: whoever manages the VMM may set it going,
 * as he could before the engine had it. Fine if he could already.
 */
static inline int guest_release(struct guest *g, struct vm_error **err)
{
    return g->ops->release ? g->ops->release(g, err) : 0;
}

/*
 * How often the guest was set going since this handle was made, by whomever, as far as the VMM has reported it: asks
 * nothing. 0 of a VMM that does not.
 */
static inline unsigned guest_resumes(struct guest *g)
{
    return g->ops->resumes ? g->ops->resumes(g) : 0;
}

/* Begin to give the memory away. The guest runs on. */
static inline int guest_source_start(struct guest *g, const struct guest_source_params *params,
                                     const struct guest_source_events *events, void *arg,
                                     struct vm_error **err)
{
    return g->ops->source_start(g, params, events, arg, err);
}

static inline int guest_source_progress(struct guest *g, struct guest_source_progress *ret_progress,
                                        struct vm_error **err)
{
    return g->ops->source_progress(g, ret_progress, err);
}

/*
 * End it, complete or not: the VMM is told to give up what is still under way, the driver's threads are
 * joined, `done` was called. Does not resume a guest that the engine paused, nor one that was
 * paused before.
 */
static inline int guest_source_stop(struct guest *g, struct vm_error **err)
{
    return g->ops->source_stop(g, err);
}

/* Make the guest known at its new place (gratuitous ARP, RARP). */
static inline int guest_announce(struct guest *g, struct vm_error **err)
{
    return g->ops->announce(g, err);
}

/* The sink's regions: into which the engine may write, vmm/guest_memory.h says. Valid as long as g. */
static inline int guest_sink_regions(struct guest *g, const struct guest_region **ret_regions,
                                     unsigned *ret_n)
{
    return g->ops->sink_regions(g, ret_regions, ret_n);
}

/*
 * Have the pages at `addrs` (vmm/page_batch.h) present before they are written here, so that the VMM's
 * cgroup is charged for them and not the agent's. Where the driver has no need of that (NULL), nothing
 * happens. A failure means only that the agent is charged.
 */
static inline int guest_sink_populate(struct guest *g, const uint64_t *addrs, unsigned n,
                                      struct vm_error **err)
{
    return g->ops->sink_populate ? g->ops->sink_populate(g, addrs, n, err) : 0;
}

static inline int guest_sink_bytes(struct guest *g, const void *data, size_t n,
                                   int64_t deadline_ns, int cancel_fd, struct vm_error **err)
{
    return g->ops->sink_bytes(g, data, n, deadline_ns, cancel_fd, err);
}

static inline int guest_sink_finish(struct guest *g, int64_t deadline_ns, int cancel_fd,
                                    struct vm_error **err)
{
    return g->ops->sink_finish(g, deadline_ns, cancel_fd, err);
}

/*
 * Ask the VMM to end by itself, so that it removes its sockets and pid file. Only for a guest that
 * stands; whether it did end, guest_kill makes sure.
 */
static inline int guest_quit(struct guest *g, struct vm_error **err)
{
    return g->ops->quit(g, err);
}

/* SIGKILL, and wait until the process is certainly gone. */
static inline int guest_kill(struct guest *g, int timeout_ms, struct vm_error **err)
{
    return process_kill(&g->process, timeout_ms, err);
}

#endif

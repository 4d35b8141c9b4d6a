/* SPDX-License-Identifier: Apache-2.0 */
/*
 * qemu_source: reads QEMU's outgoing migration stream from a socket and turns it into the
 * `pages`, `bytes` and `memory_done` of guest_source_events, without copying page data. QMP is
 * not its business: the driver (vmm/qemu.h) tells QEMU to migrate into the socket and asks it
 * about the end.
 *
 *     qemu_source_socketpair(&ours, &qemus, err)
 *     ... QMP getfd with `qemus`, then close it here: otherwise the end of file never comes
 *     qemu_source_create(&params, err)             the thread begins to read
 *     ... QMP migrate
 *     ... events->pages, bytes, memory_done, then params.ended, all from the source's one thread
 *     qemu_source_destroy(s)                       stops it wherever it is, and joins the thread
 *
 * Ownership and memory. Page data stays where it was read, in slabs of 1 MiB out of a pool of
 * `pool_bytes` (vmm/page_pool.h); a slab is free again when the last batch that points into it
 * was released. So a source holds at most pool_bytes, 550 KiB of batches, and 150 KiB of its
 * own. Batches may outlive the source. When slabs or batches run out, the thread hands over
 * every batch that it had begun, and waits: whoever holds batches must not wait for further ones
 * before it releases.
 *
 * Batches. A page is in a batch at most once; if it comes again, that begins the next batch. A
 * batch is handed over
 *
 *   - when it is full, or points into PAGE_POOL_BATCH_SLABS slabs and needs another,
 *   - at the end of a stripe, once it holds QEMU_SOURCE_BATCH_GOOD pages,
 *   - before memory_done, before any wait for memory, and when the socket gave nothing for
 *     QEMU_SOURCE_IDLE_MS.
 *
 * Bytes are gathered up to QEMU_SOURCE_BYTES_MAX and handed over then, or with all batches. So many
 * at once (memory that goes through the destination's loader) are not copied, if the callee knows
 * held_bytes: they are of a slab that their holder pins as a batch does.
 *
 * Order. Batches of a channel come in the order of the stream, `bytes` too. Nothing is said
 * about a batch and bytes relative to one another, except: memory_done comes after all batches
 * and after the bytes up to the end of the memory section, and all further bytes come after it.
 * A stream whose memory cannot be told apart (qemu_stream.h, "opaque"; or params.opaque) comes
 * as bytes altogether; its memory_done comes at the end of the file, just before `ended`.
 *
 * Errors of `ended`: NULL at an end of file after the memory section (whether QEMU gave
 * everything away only QMP can tell); CANCELLED after qemu_source_destroy; FAILED when QEMU
 * closed the stream before the memory was complete; PROTOCOL and REFUSED for what the parser or
 * the comparison of regions found; whatever a callback returned. After a crash of the agent
 * nothing is left: QEMU sees its socket close and gives the migration up.
 */
#ifndef VMMIG_VMM_QEMU_SOURCE_H
#define VMMIG_VMM_QEMU_SOURCE_H

#include "base/cleanup.h"
#include "base/error.h"
#include "vmm/guest.h"
#include "vmm/page_pool.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define QEMU_SOURCE_POOL_DEFAULT (24u << 20)
#define QEMU_SOURCE_POOL_MIN (2u * PAGE_POOL_SLAB)
#define QEMU_SOURCE_BATCH_GOOD 128u
#define QEMU_SOURCE_BYTES_MAX 65536u
#define QEMU_SOURCE_IDLE_MS 2
#define QEMU_SOURCE_CHANNELS_MAX 64u

struct qemu_source;

struct qemu_source_params {
    int fd;            /* the stream, a socket; duplicated, so it stays the caller's */
    unsigned channels; /* 1..QEMU_SOURCE_CHANNELS_MAX */
    size_t pool_bytes; /* at least QEMU_SOURCE_POOL_MIN; 0: QEMU_SOURCE_POOL_DEFAULT */
    /*
     * The regions whose pages come as pages; copied. Region number i of a page's address is
     * regions[i]. Each must be a block of the stream, of the same size (REFUSED otherwise).
     */
    const struct guest_region *regions;
    unsigned n_regions;
    bool opaque; /* do not parse: everything is bytes */
    /*
     * The stream of a background snapshot (qemu_stream.h). It is always read to its end, whatever failed, also in
     * destroy: QEMU would leave the guest's memory write-protected otherwise.
     */
    bool background;

    /* pages, bytes and memory_done are called with `arg`; done and round are not called. */
    const struct guest_source_events *events;
    void *arg;
    /* The stream's end, once, last of all callbacks, from the source's thread. Owns err. */
    void (*ended)(void *ended_arg, struct vm_error *err);
    void *ended_arg;
};

struct qemu_source_counters {
    uint64_t bytes_read; /* out of the socket */
    uint64_t pages;      /* given to `pages`, zero pages included */
    uint64_t zero_pages; /* of these, those that QEMU marked as zero */
    uint64_t rest_bytes; /* given to `bytes` */
    bool opaque; /* everything comes as bytes: asked for, or for the reason that was logged */
};

/*
 * A stream's two ends, close-on-exec: ours to read, QEMU's to write. The buffer between them stays
 * at the kernel's default of 208 KiB: 1 and 4 MiB made nothing faster, and what lies there when the
 * guest is paused adds to the pause.
 */
int qemu_source_socketpair(int *ret_ours, int *ret_qemus, struct vm_error **err);

struct qemu_source *qemu_source_create(const struct qemu_source_params *params,
                                       struct vm_error **err);
/* Any thread, at any time until destroy. */
void qemu_source_counters(struct qemu_source *s, struct qemu_source_counters *ret_counters);
/*
 * Stop reading, wait for the thread, free. `ended` was called when this returns. A callback that
 * blocks must be made to return by its owner first. Never from within a callback. NULL is fine.
 */
void qemu_source_destroy(struct qemu_source *s);
DEFINE_CLEANUP(qemu_source, struct qemu_source *, qemu_source_destroy)

#endif

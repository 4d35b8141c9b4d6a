/* SPDX-License-Identifier: Apache-2.0 */
/*
 * qemu_stream: parser of QEMU's migration stream, version 3, as unmodified QEMU >= 7.2 writes it
 * for a pre-copy migration of an x86 guest. No I/O: bytes in, events out.
 *
 *     p = qemu_stream_create(&events, arg, err)
 *     qemu_stream_feed(p, data, len, &consumed, err)     again and again; what was not consumed
 *                                                        comes again, first, with more behind it
 *     qemu_stream_end(p, err)                            at the end: was the memory complete?
 *     qemu_stream_destroy(p)
 *
 * It splits the stream in two: the pages of *mapped* blocks of memory (the callee of `blocks`
 * says which these are), and the *rest*, which the destination's loader gets: the same stream
 * with the records of those pages left out, and nothing changed. That is a sound stream. A
 * record with CONTINUE belongs to the block that was named last, in whichever section. If that
 * block is not mapped, then the record which named it is in rest as well, and no other name came
 * between. If no page is taken out, rest is the stream byte for byte.
 *
 * Behind the memory's END section everything is rest: sections of devices carry no length. For
 * the same reason a device's section that comes before it cannot be skipped (virtio-mem of QEMU
 * >= 8.0, dirty bitmaps, VFIO). Then:
 *
 *   - while no page was taken out, the parser reports `opaque`, and everything from there on is
 *     rest, pages of mapped blocks too. Rest is then the whole stream, unchanged. In a pre-copy
 *     migration QEMU begins every section that it writes piece by piece before the first page,
 *     so this is where it happens.
 *   - after that it is an error (REFUSED). To go on, the remainder would have to be loaded after
 *     all pages taken out so far, while the guest still runs; and CONTINUE records in it would
 *     go to the wrong block, which nobody would notice before the guest does.
 *
 * With QEMU's capability background-snapshot (qemu_stream_set_background) memory has no END
 * section: its pages come in any order, each once, and the first section in one piece behind them
 * is that of a device. There memory ends, and that section and all behind it are rest. Nothing of
 * the memory comes after it, so that no CONTINUE can go astray.
 *
 * Speed. Page data is not looked at and not copied; the pointers in events lie in the bytes fed
 * and are valid during the call. No record is longer than QEMU_STREAM_RECORD_MAX: fed that many
 * bytes or more, the parser consumes some. Memory: one block of 80 KiB.
 *
 * Errors: PROTOCOL for what version 3 does not allow, lengths, offsets, names and counts out of
 * bounds included; REFUSED for a feature that this parser cannot split (the message names the
 * capability to turn off); FAILED for an early end; and whatever a callback returned, unchanged.
 * After an error only destroy is allowed. The events do not depend on how the bytes were cut
 * into feeds, save that rest comes in other pieces, and before an error perhaps not up to the
 * record at fault.
 *
 * Threads: one at a time.
 */
#ifndef VMMIG_VMM_QEMU_STREAM_H
#define VMMIG_VMM_QEMU_STREAM_H

#include "base/cleanup.h"
#include "base/error.h"
#include "vmm/guest.h"

#include <stddef.h>
#include <stdint.h>

/* A page record: flags and offset, the longest block name, a page. */
#define QEMU_STREAM_RECORD_MAX (8u + 1u + 255u + GUEST_PAGE_SIZE)

/* The number of a block that is not mapped. */
#define QEMU_STREAM_UNMAPPED (-1)

struct qemu_stream;

struct qemu_stream_block {
    char name[GUEST_REGION_NAME_MAX]; /* printable ASCII */
    uint64_t used_length;             /* bytes, whole pages */
    int region;                       /* set by `blocks`: its number in `page`, or UNMAPPED */
};

/* All are needed. -1 ends the feed with that error. */
struct qemu_stream_events {
    /* The machine type that the destination must have. Not called if the stream has none. */
    int (*machine)(void *arg, const char *name, struct vm_error **err);
    /* The list of memory blocks, once, at most GUEST_REGIONS_MAX. All are UNMAPPED at first. */
    int (*blocks)(void *arg, struct qemu_stream_block *blocks, unsigned n, struct vm_error **err);
    /* GUEST_PAGE_SIZE bytes at `offset` of a mapped block, or NULL: they are zero. */
    int (*page)(void *arg, unsigned region, uint64_t offset, const uint8_t *data,
                struct vm_error **err);
    /* The next bytes for the destination; n > 0. */
    int (*rest)(void *arg, const void *data, size_t n, struct vm_error **err);
    /* All pages and the rest up to the end of the memory's END section have been reported. */
    int (*memory_end)(void *arg, struct vm_error **err);
    /* All is rest from here on, because of a section of that name; no memory_end will come. */
    int (*opaque)(void *arg, const char *section, struct vm_error **err);
};

struct qemu_stream *qemu_stream_create(const struct qemu_stream_events *events, void *arg,
                                       struct vm_error **err);
void qemu_stream_destroy(struct qemu_stream *p);
DEFINE_CLEANUP(qemu_stream, struct qemu_stream *, qemu_stream_destroy)

/* The stream is that of a background snapshot. Before the first feed. */
void qemu_stream_set_background(struct qemu_stream *p);

/*
 * Consume as many whole records as there are. *ret_consumed <= len is set on success. Bytes left
 * over are fewer than QEMU_STREAM_RECORD_MAX.
 */
int qemu_stream_feed(struct qemu_stream *p, const void *data, size_t len, size_t *ret_consumed,
                     struct vm_error **err);
/* The stream is over: FAILED unless the memory was complete or the stream opaque. */
int qemu_stream_end(const struct qemu_stream *p, struct vm_error **err);

#endif

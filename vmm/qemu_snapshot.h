/* SPDX-License-Identifier: Apache-2.0 */
/*
 * qemu_snapshot: the writable disks of a running QEMU as they are at one instant, pushed out while
 * the guest runs on.
 *
 *     s = qemu_snapshot_create(q, &definition, &err)        which disks; REFUSED by name if one
 * cannot be taken qemu_snapshot_prepare(s, &params, &err)               filters and targets are
 * made; the guest runs on
 *     ... guest_source_start with .background, for memory: QEMU prepares to protect it ...
 *     qemu_snapshot_switch(s, &err)                         the guest stands: this is the instant
 *     ... qemu_source_go, or guest_resume: the guest runs on ...
 *     qemu_snapshot_push(s, &err)                           QEMU begins to write into the targets
 *     qemu_snapshot_wait(s, deadline, cancel_fd, &p, &err)  1: all is written, 0: the deadline
 * passed qemu_snapshot_finish(s, committed, &err)              always: everything is taken out
 * again, s is freed
 *     ... when it has failed: qemu_snapshot_relieve(s), then guest_source_stop, which may take
 * long, then finish ...
 *
 * Where memory cannot be write-protected it is copied first, by an ordinary migration that ends
 * with the guest paused:
 *
 *     qemu_snapshot_mark(s, &err)                           from here on a sweep would let the
 * guest go on
 *     ... guest_source_start, guest_pause, done: the guest stands in `postmigrate` ...
 *     qemu_snapshot_switch_migrated(s, &params, &err)       disks are taken back, filters are made
 * and put in
 *     ... guest_resume, push, wait, finish as above ...
 *
 * How. Below each disk's device comes a copy-before-write filter, whose old data goes to a file
 * without a name in `scratch_dir`. If that fails (no space), the filter gives up
 * (on-cbw-error=break-snapshot): the snapshot fails, the guest notices nothing. QEMU is the client
 * of an NBD server (`nbd_sockets`), and never a server. It gets there by a path through the folder
 * of the socket, which it is given: when the server dies QEMU connects again, and that path leads
 * to nothing then. A QEMU that may not (LSMs, no /proc) is given a connection, and would connect to
 * the number of that descriptor again, whatever it has there by then (7.2): so targets are the
 * first to go (qemu_snapshot_sweep.c).
 *
 * Incremental. From the instant on a bitmap "PREFIX-NUMBER" (that of the disk in the definition) at
 * each disk notes what is written. When the snapshot was committed, the bitmaps of all others go,
 * else this one's do. A later snapshot that names it as `parent` reads what is noted. Bitmaps are
 * lost when QEMU ends, or the guest moves: qemu_snapshot_has_bitmap.
 *
 * Overlays. Of a disk whose image is one (`backing`) the caller may ask for what it has of its own
 * (`layers`), if it has the rest already.
 *
 * Crash of the agent: QEMU's jobs fail since their targets are gone, and filters stay.
 * qemu_snapshot_sweep takes them out, and lets a guest go on that was paused for the switch: called
 * by who sees the agent die, and when a QEMU is adopted.
 *
 * Names in QEMU: nodes, jobs, bitmaps and one object, all beginning with "vmmig-". Threads: one at
 * a time.
 */
#ifndef VMMIG_VMM_QEMU_SNAPSHOT_H
#define VMMIG_VMM_QEMU_SNAPSHOT_H

#include "vmm/qemu.h"
#include "vmm/qemu_definition.h"

#define QEMU_SNAPSHOT_DISKS_MAX 32
#define QEMU_SNAPSHOT_PREFIX_MAX 64 /* of the name of a bitmap */

struct qemu_snapshot;

struct qemu_snapshot_disk {
    unsigned number; /* in definition.disks */
    uint64_t size;   /* bytes, as the guest sees it */
    /* The raw file, with none behind it, upon which the disk's image is an overlay; "" if it is on no such file. */
    char backing[QEMU_STRING_MAX];
    uint64_t backing_size;
    bool incremental; /* set by prepare: only what changed since the parent is pushed */
};

struct qemu_snapshot_params {
    char *const *nbd_sockets; /* per disk: a path at which its server listens. It is gone when QEMU has connected */
    const char *scratch_dir; /* a folder on a file system with O_TMPFILE */
    const char *bitmap;      /* prefix of the new bitmaps' names */
    const char *parent;      /* prefix of the former ones'; NULL: whole disks are read */
    const bool *layers;      /* per disk: push what its image itself has, and not what is behind it; NULL: none */
};

struct qemu_snapshot_progress {
    uint64_t done, total; /* bytes of all disks that are to be read */
};

struct qemu_snapshot *qemu_snapshot_create(struct qemu *q, const struct qemu_definition *d,
                                           struct vm_error **err);
const struct qemu_snapshot_disk *qemu_snapshot_disks(const struct qemu_snapshot *s,
                                                     unsigned *ret_n);
/* Does every disk have a sound bitmap with that prefix? */
bool qemu_snapshot_has_bitmap(const struct qemu_snapshot *s, const char *prefix);
int qemu_snapshot_prepare(struct qemu_snapshot *s, const struct qemu_snapshot_params *params,
                          struct vm_error **err);
int qemu_snapshot_switch(struct qemu_snapshot *s, struct vm_error **err);
int qemu_snapshot_mark(struct qemu_snapshot *s, struct vm_error **err);
/* Filters that are there before a migration ends make it fail: so they are made here, while the guest stands. */
int qemu_snapshot_switch_migrated(struct qemu_snapshot *s,
                                  const struct qemu_snapshot_params *params, struct vm_error **err);
int qemu_snapshot_push(struct qemu_snapshot *s, struct vm_error **err);
int qemu_snapshot_wait(struct qemu_snapshot *s, int64_t deadline_ns, int cancel_fd,
                       struct qemu_snapshot_progress *ret_progress, struct vm_error **err);
/*
 * What cannot wait until memory was given away: a guest that was paused goes on, and QEMU lets go of targets (whose
 * server may have died: qemu_snapshot_sweep.c says what QEMU does then). True if the guest runs. NULL is fine.
 */
bool qemu_snapshot_relieve(struct qemu_snapshot *s);
/* NULL is fine. */
int qemu_snapshot_finish(struct qemu_snapshot *s, bool committed, struct vm_error **err);

/*
 * After guest_source_start with .background: the guest stands, protect its memory, save the state of devices, let the
 * guest go on, and give the memory away.
 */
int qemu_source_go(struct qemu *q, struct vm_error **err);
/*
 * Wait until QEMU let the guest go on by itself (background). FAILED if its migration ends before; the guest may
 * run or stand then.
 */
int qemu_snapshot_wait_resumed(struct qemu *q, int64_t deadline_ns, struct vm_error **err);
/* How long the guest stood when it last stood, from event to event; 0: not yet. */
int64_t qemu_snapshot_pause_ns(struct qemu *q);
/*
 * Can QEMU write-protect the guest's memory here? REFUSED with QEMU's reason if it cannot. It is set up for that
 * then: guest_source_start with .background has nothing more to ask while the guest stands.
 */
int qemu_snapshot_can_protect(struct qemu *q, struct vm_error **err);
/*
 * A background snapshot whose agent died may still be under way, read to its end by its guard: wait for that.
 * CONFLICT if QEMU migrates for another reason.
 */
int qemu_snapshot_wait_former(struct qemu *q, int64_t deadline_ns, int cancel_fd,
                              struct vm_error **err);
/* Take out what a snapshot that was cut short left behind, memory that stayed write-protected
 * included. *ret_found: there was something. */
int qemu_snapshot_sweep(struct qemu *q, bool *ret_found, struct vm_error **err);
/*
 * Before its guest may change hands: a sweep lets a guest that stands go on, and every new connection sweeps. So
 * nothing may be left that one would take out; what there is, is taken out now. -1: the guest must stay.
 */
int qemu_snapshot_clear(struct qemu *q, struct vm_error **err);

#endif

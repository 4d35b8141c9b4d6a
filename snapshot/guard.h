/* SPDX-License-Identifier: Apache-2.0 */
/*
 * guard: a small process beside each snapshot that is being taken. It does nothing as long as the agent lives; if
 * the agent dies it does at once what the guest cannot wait for until the next agent starts.
 *
 *     g = guard_start(&params, &err)          before anything is put into QEMU
 *     guard_stream(g, fd, &err)               QEMU is about to write the guest's memory, which is read from fd
 *     guard_end(g)                            nothing of the snapshot is left in QEMU
 *
 * It holds a copy of the end of QEMU's stream. When the agent is gone (its socket to the guard is closed without a
 * word) it
 *   - reads the stream to its end, for nobody: so QEMU finishes, and lifts the write-protection of the guest's memory;
 *   - connects to QEMU and takes out what the snapshot put in; a guest that was paused for it goes on
 *     (qemu_snapshot_sweep);
 *   - thaws the guest's file systems, if it is noted that they are frozen (snapshot/frozen.h);
 * and ends. If another agent was faster and has QEMU's monitor, that agent does the second. If the guard is killed
 * instead, the agent is not disturbed. If both are, the stream breaks off, and QEMU 7.2 leaves the memory protected,
 * so that the guest, and with it perhaps QEMU's monitor, waits for ever: the next agent finds the note that the guard
 * was started with, and does what the guard would have done:
 *
 *     guard_settle_before(note, &process, &err)    before it connects to the VM: lifts the protection
 *     guard_settle(note, &thawer, guest)           when it is connected: the rest, and removes the note
 *
 * Beside a VMM that links libvmmig-attach (params.attach) it has less to do: what was tracked is no more when the
 * agent is gone, and there is no stream; a guest that was paused goes on, or is its
 * VMM's again if that had it stand before (attach_let_go). The next agent ends that guard before it
 * connects, and looks for itself: never is there one that sets a guest going which another agent has paused.
 *
 * Its output goes to the log. Memory: a few MiB. Threads: one at a time.
 */
#ifndef VMMIG_SNAPSHOT_GUARD_H
#define VMMIG_SNAPSHOT_GUARD_H

#include "base/cleanup.h"
#include "base/process.h"
#include "snapshot/frozen.h"
#include "vmm/guest.h"

enum { GUARD_PATH_MAX = 4096 };

/* What the agent says: one packet each (SOCK_SEQPACKET), the letter and then its text. */
enum guard_word {
    GUARD_STREAM = 's', /* with a descriptor */
    GUARD_END = 'e'
};

struct guard;

struct guard_params {
    struct thawer thawer;    /* the program, its log, and where it is noted what is frozen */
    const char *socket_path; /* of the VM that is snapshotted: QMP, or that of the attach library */
    struct process_identity process; /* its VMM */
    const char *note_path; /* a file that is there as long as the snapshot may have left something */
    bool attach; /* the VMM links libvmmig-attach */
};

struct guard *guard_start(const struct guard_params *params, struct vm_error **err);
int guard_stream(struct guard *g, int fd, struct vm_error **err);
/* Waits until the process is gone. NULL is fine. */
void guard_end(struct guard *g);
DEFINE_CLEANUP(guard, struct guard *, guard_end)

/*
 * Of that VMM, if there is a note of it: end its guard, if the VMM links libvmmig-attach; else, if
 * the guard is dead, lift its memory's protection. 0 if there is nothing to be done.
 */
int guard_settle_before(const char *note_path, const struct process_identity *process,
                        struct vm_error **err);
/* There is a note of that VMM, and the guard that it names lives. */
bool guard_lives(const char *note_path, const struct process_identity *vmm);
/* The note is there, and is that of this guard: nobody has taken over. */
bool guard_is_noted(const char *note_path, const struct process_identity *vmm, pid_t guard);
/* The rest, and the note is gone. */
void guard_settle(const char *note_path, const struct thawer *thawer, struct guest *guest);

#endif

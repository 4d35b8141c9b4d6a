/* SPDX-License-Identifier: Apache-2.0 */
/*
 * guard: a small process beside each snapshot that is being taken. It does nothing as long as the agent lives; if
 * the agent dies it does at once what the guest cannot wait for until the next agent starts.
 *
 *     g = guard_start(&params, &err)          before anything is put into QEMU
 *     guard_frozen(g, path, &err)             the guest's file systems are about to be frozen through that socket
 *     guard_stream(g, fd, &err)               QEMU is about to write the guest's memory, which is read from fd
 *     guard_frozen(g, NULL, &err)             they are thawed
 *     guard_end(g)                            nothing of the snapshot is left in QEMU
 *
 * It holds a copy of the end of QEMU's stream. When the agent is gone (its socket to the guard is closed without a
 * word) it
 *   - reads the stream to its end, for nobody: so QEMU finishes, and lifts the write-protection of the guest's memory;
 *   - connects to QEMU and takes out what the snapshot put in; a guest that was paused for it goes on
 *     (qemu_snapshot_sweep);
 *   - thaws the guest's file systems;
 * and ends. If another agent was faster and has QEMU's monitor, that agent does the second. If the guard is killed
 * instead, the agent is not disturbed. If both are, the stream breaks off, and QEMU 7.2 leaves the memory protected,
 * so that the guest, and with it perhaps QEMU's monitor, waits for ever: the next agent finds the note that the guard
 * was started with, and does what the guard would have done:
 *
 *     guard_settle_memory(note, &process, &err)    before it connects to the VM: lifts the protection
 *     guard_settle(note, &process)                 when it is connected: thaws, and removes the note
 *
 * Its output goes to the log. Memory: a few MiB. Threads: one at a time.
 */
#ifndef VMMIG_SNAPSHOT_GUARD_H
#define VMMIG_SNAPSHOT_GUARD_H

#include "base/cleanup.h"
#include "base/process.h"

enum { GUARD_PATH_MAX = 4096 };

/* What the agent says: one packet each (SOCK_SEQPACKET), the letter and then its text. */
enum guard_word {
    GUARD_STREAM = 's', /* with a descriptor */
    GUARD_FROZEN = 'f', /* and the path of the guest agent's socket; none: they are thawed */
    GUARD_END = 'e'
};

struct guard;

struct guard_params {
    const char *binary;   /* path of vmmig-guard */
    const char *log_path; /* appended */
    const char *qmp_path; /* of the VM that is snapshotted */
    struct process_identity process; /* its VMM */
    const char *note_path; /* a file that is there as long as the snapshot may have left something */
};

struct guard *guard_start(const struct guard_params *params, struct vm_error **err);
int guard_stream(struct guard *g, int fd, struct vm_error **err);
int guard_frozen(struct guard *g, const char *guest_agent, struct vm_error **err);
/* Waits until the process is gone. NULL is fine. */
void guard_end(struct guard *g);
DEFINE_CLEANUP(guard, struct guard *, guard_end)

/*
 * Of that VMM, if there is a note of it and its guard is dead: lift its memory's protection. 0 if there is nothing
 * to be done.
 */
int guard_settle_memory(const char *note_path, const struct process_identity *process,
                        struct vm_error **err);
void guard_settle(const char *note_path, const struct process_identity *process);

#endif

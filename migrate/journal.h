/* SPDX-License-Identifier: Apache-2.0 */
/*
 * journal: what an agent must not forget about its hand-overs, one record per attempt, in LMDB.
 *
 *     CLEANUP(journal) struct journal *j = journal_open("/var/lib/vmmig/journal", &err);
 *     journal_put(j, &record, &err);                   a new attempt, with its blob
 *     journal_advance(j, &attempt, HANDOVER_REC_COMMIT, NULL, &err);
 *     journal_each(j, visit, arg, &err);               recovery, doctor
 *
 * Durability. When journal_put, journal_advance or journal_remove returns 0, the change is on the
 * disk (fdatasync of the data, then of the page that names it): a crash of the agent or of the host
 * does not undo it; so are, when journal_open returns, the file of a new journal and the folders
 * that it made. When one returns -1, the journal is as it was before, except for an error of kind
 * IN_DOUBT: the last write of the commit failed, and nobody can tell what the disk holds. From then
 * on every call fails so, and the agent must exit; its restart reads the truth.
 *
 * Room. The file has its full size (JOURNAL_MAP_SIZE, allocated) from the first open, so that a
 * disk that fills up later does not take the journal with it; its first JOURNAL_WRITTEN_SIZE have
 * been written, so that a commit there waits for its own bytes alone. New attempts are refused with
 * NO_SPACE when JOURNAL_RECORDS_MAX stand in the journal or less than a reserve is free, and so is
 * a blob that grows. journal_advance fits into the reserve: it does not write the blob again.
 * journal_put of an attempt that exists does, for which the free pages must lie together: it may
 * find no room in a journal that is nearly full.
 *
 * Forgetting. A record whose hand-over is finished on both sides (DONE, and the two CLOSED) is
 * history: the oldest beyond JOURNAL_HISTORY_MAX are pruned when a new attempt is put. NEVER,
 * ENDED, RUNNING and ABORTED are kept until the peer has confirmed (docs/hand-over.md,
 * "Forgetting"); they lose their blob, and then take less than 450 bytes. Forgetting one is never
 * unsafe: the agent answers UNKNOWN, and on UNKNOWN nobody starts a copy that the peer might run.
 *
 * Order. Stamps are the wall clock's, but never older than those that stand in the journal already:
 * when a clock that was ahead is set right, what comes after is still newer, by a nanosecond each,
 * until the time has caught up.
 *
 * A record read from disk is validated; one that is damaged is reported, never returned. Two agents
 * cannot open one journal (flock). Threads: any; calls exclude each other.
 */
#ifndef VMMIG_MIGRATE_JOURNAL_H
#define VMMIG_MIGRATE_JOURNAL_H

#include "base/cleanup.h"
#include "base/error.h"
#include "base/process.h"
#include "base/uuid.h"
#include "migrate/handover.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define JOURNAL_VM_NAME_MAX 64     /* bytes, without the NUL */
#define JOURNAL_PEER_MAX 255       /* bytes, without the NUL: host[:port] */
#define JOURNAL_BLOB_MAX (256 << 10)
#define JOURNAL_MAP_SIZE (32 << 20)
#define JOURNAL_WRITTEN_SIZE (2 << 20)
#define JOURNAL_RECORDS_MAX 4096
#define JOURNAL_HISTORY_MAX 256

struct journal;

struct journal_record {
    struct uuid attempt;
    enum handover_record record; /* its role follows: handover_record_role() */
    char vm[JOURNAL_VM_NAME_MAX + 1];
    char peer[JOURNAL_PEER_MAX + 1];  /* the host at the other end; others are not heard */
    struct process_identity vmm;      /* pid 0: none was started yet */
    int64_t started_ns, changed_ns; /* wall clock: order of journal_each, what is pruned first */
    /* What the agent needs to go on after a restart, in a format of its own (bounded). */
    void *blob;
    size_t blob_len;
};

/* Open or create the journal in the folder `path` (made if missing, 0700). CONFLICT: another
 * agent has it. CORRUPT: not a journal, or damaged as a whole. VERSION: of a newer vmmig. */
struct journal *journal_open(const char *path, struct vm_error **err);
void journal_close(struct journal *j);
DEFINE_CLEANUP(journal, struct journal *, journal_close)

/*
 * Write the whole record with its blob, new or not. changed_ns is set by the call, started_ns, too,
 * once. NO_SPACE for a new attempt, or for a blob that is longer than before. USAGE if a field does
 * not fit or the record is NONE; CONFLICT if the attempt exists with the other role; CORRUPT if it
 * exists and is damaged.
 */
int journal_put(struct journal *j, const struct journal_record *record, struct vm_error **err);
/*
 * The same, also over a damaged record: for who has lived through the whole attempt, and so knows
 * all of it.
 */
int journal_mend(struct journal *j, const struct journal_record *record, struct vm_error **err);
/*
 * Change the record of an attempt, and its VMM unless `vmm` is NULL; the rest stays, except that a
 * settled record loses its blob. NOT_FOUND, CORRUPT, or CONFLICT if it has the other role.
 */
int journal_advance(struct journal *j, const struct uuid *attempt, enum handover_record record,
                    const struct process_identity *vmm, struct vm_error **err);
/* The record of an attempt; journal_record_finish it. NOT_FOUND, CORRUPT. */
int journal_get(struct journal *j, const struct uuid *attempt, struct journal_record *ret_record,
                struct vm_error **err);
/*
 * Visit every record, oldest attempt first. A damaged one is visited with `damage` set (the
 * attempt is valid, nothing else is). The visitor returns 0 to go on, or -1 with an error, which
 * ends the walk. It may call the journal. `record` is the walk's.
 */
typedef int journal_visit(const struct journal_record *record, const struct vm_error *damage,
                          void *arg, struct vm_error **err);
int journal_each(struct journal *j, journal_visit *visit, void *arg, struct vm_error **err);
/* Forget an attempt, whatever its record: an operator's order. NOT_FOUND. */
int journal_remove(struct journal *j, const struct uuid *attempt, struct vm_error **err);
void journal_record_finish(struct journal_record *record);

#endif

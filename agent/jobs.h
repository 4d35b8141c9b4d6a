/* SPDX-License-Identifier: Apache-2.0 */
/*
 * jobs: what takes long and concerns one VM, or the repository. A job runs in a thread of its own, can be watched and
 * cancelled, and is remembered for some time after it ended.
 *
 *     struct job_params p = {.kind = JOB_SEND, .vm = "web1", .peer = "host2:16550",
 *                            .run = send_run, .arg = s, .free_arg = send_destroy};
 *     job_start(table, &p, &id, &err);                  CONFLICT while another job has the VM
 *
 *     static int send_run(struct job *job, void *arg, struct vm_error **err)
 *     {
 *         ... io_wait(fd, POLLIN, deadline, job_cancel_fd(job), err) ...
 *         job_update(job, &progress);                   as often as it likes; cheap
 *         if (job_close_cancel(job, "too late ...", err) < 0)
 *             return undo();                            it was cancelled before
 *         return 0;                                     or -1 with the error: the job's result
 *     }
 *
 * A job without a VM is one of the repository; any number of them run beside the others, up to
 * max_running. job_set_result keeps what it found out for those who watch it.
 *
 * One job per VM at a time; the name need not be that of a VM which exists here (JOB_RECEIVE).
 * job_claim does the same for what is short and needs no thread.
 *
 * Ownership: from a successful job_start on the table owns arg, and calls free_arg in the job's
 * thread after run returned. If job_start fails, arg is still the caller's. Log lines of the job's
 * thread carry the job's id and VM. Bounds: max_running threads, JOB_HISTORY_MAX jobs that ended
 * (oldest forgotten first). Threads: any. A crash of the agent forgets all jobs; what must survive
 * is in the journal.
 */
#ifndef VMMIG_AGENT_JOBS_H
#define VMMIG_AGENT_JOBS_H

#include "base/cleanup.h"
#include "base/error.h"
#include "base/uuid.h"
#include "proto/fields.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define JOB_HISTORY_MAX 256
#define JOB_RESULT_MAX (512 << 10)
#define JOB_NOTE_MAX 256 /* with the NUL */
#define JOB_IMAGE_MAX 129 /* with the NUL; IMAGE_NAME_MAX of repo/image.h */

/* X(id, stable name) */
#define JOB_KINDS(X)                                                                               \
    X(SEND, "send")                                                                                \
    X(RECEIVE, "receive")                                                                          \
    X(CHECK, "check")                                                                              \
    X(SNAPSHOT, "snapshot")                                                                        \
    X(RESTORE, "restore")\
    X(IMPORT, "import")                                                                            \
    X(EXPORT, "export")                                                                            \
    X(GC, "gc")                                                                                    \
    X(SCRUB, "scrub")                                                                              \
    X(REBUILD_INDEX, "rebuild-index")                                                              \
    X(COPY, "copy")

/* X(id, stable name, text) */
#define JOB_PHASES(X)                                                                              \
    X(PREPARING, "preparing", "checking both sides")                                               \
    X(COPYING, "copying", "copying memory while the guest runs")                                   \
    X(PAUSED, "paused", "the guest is paused; sending the rest")                                   \
    X(DECIDING, "deciding", "committed; waiting for the destination's answer")                     \
    X(FINISHING, "finishing", "moved; removing the old copy")                                      \
    X(UNDOING, "undoing", "undone; the guest goes on at the source")                               \
    X(SWITCHING, "switching", "the guest is paused for an instant")                                \
    X(STORING, "storing", "storing disks and memory while the guest runs")                         \
    X(COMMITTING, "committing", "making the snapshot visible")                                     \
    X(WRITING, "writing", "writing the disks")                                                     \
    X(LOADING, "loading", "loading memory and device state")\
    X(WORKING, "working", "under way")

/* How a page went over the wire. X(id, stable name) */
#define JOB_ENCODINGS(X)                                                                           \
    X(ZERO, "zero")                                                                                \
    X(SAME, "same")                                                                                \
    X(DELTA, "delta")                                                                              \
    X(LZ4, "lz4")                                                                                  \
    X(ZSTD, "zstd")                                                                                \
    X(RAW, "raw")

#define X(id, ...) JOB_##id,
enum job_kind { JOB_KINDS(X) JOB_KIND_COUNT };
#undef X
#define X(id, ...) JOB_PHASE_##id,
enum job_phase { JOB_PHASES(X) JOB_PHASE_COUNT };
#undef X
#define X(id, ...) JOB_ENC_##id,
enum job_encoding { JOB_ENCODINGS(X) JOB_ENC_COUNT };
#undef X
enum job_state { JOB_STATE_RUNNING, JOB_STATE_DONE, JOB_STATE_FAILED, JOB_STATE_CANCELLED };

/* Of a snapshot that is taken or restored. */
struct job_snapshot {
    char image[JOB_IMAGE_MAX], parent[JOB_IMAGE_MAX];
    uint64_t memory_bytes, disk_bytes; /* of the guest */
    uint64_t disk_read_bytes;          /* that were read of its disks */
    uint64_t stored_bytes;             /* added to the repository */
    unsigned frozen;                   /* file systems that held still */
};

struct job_progress {
    enum job_phase phase;
    unsigned round;
    uint64_t total;           /* bytes of guest memory */
    uint64_t remaining;       /* bytes */
    uint64_t dirty_rate;      /* bytes a second */
    uint64_t working_set;     /* bytes written at least once since the first round; 0: not known */
    uint64_t link_rate;       /* bytes a second on the wire, as measured now */
    uint64_t wire_bytes;      /* sent, everything included */
    uint64_t resent_bytes;    /* acknowledged and yet sent again: always 0 */
    uint64_t stored_bytes;    /* added to the repository */
    uint64_t opaque_bytes;    /* device state, and memory that could not be sent page by page */
    struct {
        uint64_t pages;       /* of 4 KiB */
        uint64_t wire_bytes;
    } pages[JOB_ENC_COUNT];
    unsigned throttle_percent;
    unsigned throttle_max_percent; /* the most so far */
    unsigned connections;     /* that work now */
    unsigned reconnects;
    int64_t predicted_pause_ns; /* -1: not known yet */
    int64_t pause_ns;         /* how long the guest stood; -1: it was not paused yet */
    struct job_snapshot snapshot;
    char note[JOB_NOTE_MAX];  /* what a user should know: "throttling the guest to converge" */
};

struct job_table;
struct job;

typedef int job_run_fn(struct job *job, void *arg, struct vm_error **err);

struct job_params {
    enum job_kind kind;
    const char *vm;          /* NULL: of the repository */
    const char *peer;        /* shown: the other host, or the image; may be NULL */
    const struct uuid *id;   /* NULL: a fresh one */
    job_run_fn *run;
    void *arg;
    void (*free_arg)(void *arg); /* may be NULL */
};

/* A job as it was at one instant. */
struct job_status {
    struct uuid id;
    enum job_kind kind;
    enum job_state state;
    char vm[VM_NAME_MAX + 1];
    char peer[ENDPOINT_TEXT_MAX + 1];
    bool cancelling;          /* cancel was asked for and the job still runs */
    int64_t started_ns;       /* wall clock */
    int64_t elapsed_ns;       /* until now, or until it ended */
    struct job_progress progress;
    struct vm_error *error;   /* unless it is running or done; freed by job_status_finish */
    void *result;             /* of job_set_result, or NULL; freed by job_status_finish */
    size_t result_len;
};

struct job_table *job_table_create(unsigned max_running, struct vm_error **err);
/* All jobs must have ended (job_table_stop). */
void job_table_destroy(struct job_table *t);
DEFINE_CLEANUP(job_table, struct job_table *, job_table_destroy)
/*
 * No new jobs; cancel those that run, also those that closed their latch (a stop of the agent is
 * not a user's wish: they must end soon, and leave to the journal what they cannot finish). True
 * when all ended within the time. If false the threads still run: the process can only exit.
 */
bool job_table_stop(struct job_table *t, int timeout_ms);

int job_start(struct job_table *t, const struct job_params *params, struct uuid *ret_id,
              struct vm_error **err);
/* Keep jobs and other claims off a VM for a while. `what` ("detach") is a constant. */
int job_claim(struct job_table *t, const char *vm, const char *what, struct vm_error **err);
/*
 * One that can be cancelled: `cancel` is called with arg, under the table's lock, until
 * job_release: it does not wait, and does not call the table. -1: it is too late.
 */
typedef int job_claim_cancel_fn(void *arg, struct vm_error **err);
int job_claim_cancellable(struct job_table *t, const char *vm, const char *what, job_claim_cancel_fn *cancel, void *arg,
                          struct vm_error **err);
/* Ask whoever claimed that VM to end. NOT_FOUND if it cannot be cancelled, or nobody did. */
int job_cancel_claim(struct job_table *t, const char *vm, struct vm_error **err);
void job_release(struct job_table *t, const char *vm);

/* For the job itself, from any of its threads. */
/* A latch (base/io.h): readable once the job is to end early. */
int job_cancel_fd(const struct job *job);
bool job_is_cancelled(const struct job *job);
/* Only the agent's stop, no user, set the latch. */
bool job_is_stopping(const struct job *job);
/*
 * The point of no return: from here job_cancel is answered with REFUSED and `why` (a constant).
 * -1 with CANCELLED if it was cancelled before: nothing is closed then.
 */
int job_close_cancel(struct job *job, const char *why, struct vm_error **err);
/* At most JOB_RESULT_MAX bytes, copied; a later result replaces it. */
int job_set_result(struct job *job, const void *data, size_t len, struct vm_error **err);
void job_update(struct job *job, const struct job_progress *progress);

/* As job_cancel, of the job with that id. NOT_FOUND if it is not known or has ended. */
int job_cancel_id(struct job_table *t, const struct uuid *id, struct vm_error **err);
/* The running job of a VM: ask it to end. NOT_FOUND if none runs. ret_id may be NULL. */
int job_cancel(struct job_table *t, const char *vm, struct uuid *ret_id, struct vm_error **err);
int job_get(struct job_table *t, const struct uuid *id, struct job_status *ret_status,
            struct vm_error **err);
/* The running job of a VM, else the last that ended; NOT_FOUND if none is known. */
int job_get_of_vm(struct job_table *t, const char *vm, struct job_status *ret_status,
                  struct vm_error **err);
/* Wait until the job ended: 0, TIMEOUT, CANCELLED (cancel_fd, or -1), NOT_FOUND. */
int job_wait(struct job_table *t, const struct uuid *id, int64_t deadline_ns, int cancel_fd,
             struct vm_error **err);
/* Visit all jobs, newest first; the visitor must not call the table. */
void job_each(struct job_table *t, void (*visit)(const struct job_status *status, void *arg),
              void *arg);
void job_status_finish(struct job_status *status);

const char *job_kind_name(enum job_kind kind);
const char *job_phase_name(enum job_phase phase);
const char *job_phase_text(enum job_phase phase);
const char *job_encoding_name(enum job_encoding encoding);

static inline void job_status_cleanup(struct job_status *s)
{
    job_status_finish(s);
}
#define cleanup_job_status __attribute__((cleanup(job_status_cleanup)))

#endif

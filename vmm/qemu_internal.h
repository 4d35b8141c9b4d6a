/* SPDX-License-Identifier: Apache-2.0 */
/*
 * qemu_internal: what the files of the QEMU driver share. Nobody else includes it.
 *
 * Lock order: source_lock, then lock. Neither is held during a QMP command, except source_lock in
 * qemu_outgoing.c.
 */
#ifndef VMMIG_VMM_QEMU_INTERNAL_H
#define VMMIG_VMM_QEMU_INTERNAL_H

#include "vmm/qemu.h"

#include <pthread.h>

#define QEMU_STREAM_FD "vmmig-migrate" /* QEMU's name of the descriptor that it writes its stream to */

struct outgoing; /* qemu_outgoing.c */
struct sink;     /* qemu_sink.c */

struct qemu {
    struct guest guest;
    struct qmp *qmp;
    char *log_path; /* of one that was started here, else NULL */
    size_t log_offset;

    /* What QEMU reported by itself; written by the QMP reader. */
    pthread_mutex_t lock;
    pthread_cond_t changed;
    int poke;             /* eventfd, readable when any of these changed: for waits that can be cancelled */
    char migration[32];   /* the last status of a MIGRATION event */
    unsigned pass;        /* of the last MIGRATION_PASS */
    unsigned resumes;     /* RESUME events so far */
    int64_t stopped_at_ns; /* of the last STOP, 0 after RESUME */
    int64_t resumed_at_ns; /* of the last RESUME, 0: none */
    int64_t last_pause_ns; /* from the STOP to the RESUME before */
    bool closed;          /* the QMP connection ended */

    pthread_mutex_t source_lock;
    struct outgoing *outgoing;
    pthread_mutex_t settings_lock; /* guards what follows, also during the commands; taken after source_lock */
    json_t *kept_capabilities, *kept_parameters; /* of the user's; NULL: nothing was changed (vmm/qemu_settings.h) */
    bool settings_noted;    /* QEMU has the note */
    bool settings_recovered; /* they are a former agent's, and the thread is to set them back */
    bool has_settler;
    pthread_t settler;
    struct sink *sink;
};

/* qmp_execute with the usual limit; a lost connection is explained (qemu_explain). */
int qemu_command(struct qemu *q, const char *command, json_t *args, json_t **ret,
                 struct vm_error **err);
/*
 * *err came from a lost connection: wait until the process ended and say what it said last; if it
 * runs on, UNREACHABLE. Other kinds stay. Returns -1.
 */
int qemu_explain(struct qemu *q, struct vm_error **err);
/* Status of the migration as QEMU has it now ("" : there was none); *ret (may be NULL) gets all of it. */
int qemu_query_migration(struct qemu *q, char ret_status[32], json_t **ret, struct vm_error **err);
bool qemu_migration_is_under_way(const char *status);
/* Name of the run state. */
int qemu_query_run_state(struct qemu *q, char ret_state[32], struct vm_error **err);
/* RUNNING or PAUSED, and not migrating already: else CONFLICT or REFUSED. ret_state may be NULL. */
int qemu_check_can_move(struct qemu *q, enum guest_run_state *ret_state, struct vm_error **err);
/* Give a descriptor to QEMU under a name; fd stays the caller's. */
int qemu_give_fd(struct qemu *q, const char *name, int fd, struct vm_error **err);
void qemu_forget_fd(struct qemu *q, const char *name);
/* Under q->lock: false when the deadline passed. */
bool qemu_wait_changed(struct qemu *q, int64_t deadline_ns);

/* REFUSED if a disk of d's VM, or one here in its place, is written through a page cache, and d
 * came from another host. */
int qemu_check_cache(const struct qemu_definition *d, const struct qemu_disk *disk,
                     struct vm_error **err);

/* The parts of guest_ops in other files. */
int qemu_source_start(struct guest *g, const struct guest_source_params *params,
                      const struct guest_source_events *events, void *arg, struct vm_error **err);
int qemu_source_progress(struct guest *g, struct guest_source_progress *ret_progress,
                         struct vm_error **err);
int qemu_source_stop(struct guest *g, struct vm_error **err);
/* Lift the bandwidth limit of a migration under way, if it has one. */
int qemu_source_hurry(struct qemu *q, struct vm_error **err);
int qemu_sink_regions(struct guest *g, const struct guest_region **ret_regions, unsigned *ret_n);
int qemu_sink_bytes(struct guest *g, const void *data, size_t n, int64_t deadline_ns,
                    int cancel_fd, struct vm_error **err);
int qemu_sink_finish(struct guest *g, int64_t deadline_ns, int cancel_fd, struct vm_error **err);
void qemu_sink_destroy(struct sink *s);

#endif

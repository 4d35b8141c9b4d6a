/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The source half of the QEMU driver. Three threads meet here: the reader of the stream
 * (qemu_source) calls the engine with pages and bytes; the QMP reader notes passes and states in
 * struct qemu; and one thread per migration (watch_main) tells the engine of rounds, finds out how
 * it ended, and says so.
 */
#include "base/clock.h"
#include "base/io.h"
#include "base/log.h"
#include "vmm/qemu_gate.h"
#include "vmm/qemu_internal.h"
#include "vmm/qemu_settings.h"
#include "vmm/qemu_snapshot.h"
#include "vmm/qemu_source.h"
#include "vmm/write_protection.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>

static const char fd_name[] = QEMU_STREAM_FD;
#define CONFIRM_TIMEOUT_NS (30 * NSEC_PER_SEC)
#define ASK_AGAIN_NS (20 * NSEC_PER_MSEC)
#define PREPARE_TIMEOUT_NS (30 * NSEC_PER_SEC)
enum { PROGRESS_TIMEOUT_MS = 2000 };

struct outgoing {
    struct qemu *q;
    struct guest_source_events events;
    void *arg;
    struct qemu_source *source;
    int ours; /* our end of the stream */
    bool limited;
    bool one_round; /* see loses_writes() */
    bool background;
    /* Background, until qemu_source_go: */
    struct qemu_gate gate;
    struct guest_source_params waiting;
    bool asked;   /* QEMU was told to migrate */
    bool started; /* the threads are there */
    pthread_t watcher;

    /* Under q->lock. */
    bool ended, stopping;
    struct vm_error *end_error;    /* of the stream */
    struct vm_error *settle_error; /* QEMU did not give the migration up */
};

static void on_stream_ended(void *arg, struct vm_error *err)
{
    struct outgoing *o = arg;
    SCOPE_LOCK(&o->q->lock);
    o->ended = true;
    o->end_error = err;
    pthread_cond_broadcast(&o->q->changed);
}

/* The watcher. */

static bool is_stopping(struct outgoing *o)
{
    SCOPE_LOCK(&o->q->lock);
    return o->stopping;
}

static void wait_a_little(struct qemu *q, int64_t deadline_ns)
{
    int64_t until = clock_mono_ns() + ASK_AGAIN_NS;
    SCOPE_LOCK(&q->lock);
    qemu_wait_changed(q, until < deadline_ns ? until : deadline_ns);
}

/* Until QEMU says of its migration that it is over; asked anew at every event. */
static int wait_settled(struct qemu *q, char ret_status[32], json_t **ret, struct vm_error **err)
{
    int64_t deadline_ns = clock_mono_ns() + CONFIRM_TIMEOUT_NS;
    for (;;) {
        CLEANUP(json) json_t *info = NULL;
        if (qemu_query_migration(q, ret_status, &info, err) < 0)
            return -1;
        if (!qemu_migration_is_under_way(ret_status)) {
            *ret = steal_ptr(&info);
            return 0;
        }
        if (clock_mono_ns() >= deadline_ns)
            return error_set(err, VM_ERROR_TIMEOUT, "QEMU's migration stays '%s'", ret_status);
        wait_a_little(q, deadline_ns);
    }
}

/* The stream is complete: has QEMU given everything away? */
static int confirm(struct outgoing *o, struct vm_error **err)
{
    char status[32], state[32];
    CLEANUP(json) json_t *info = NULL;
    if (wait_settled(o->q, status, &info, err) < 0)
        return -1;
    if (strcmp(status, "completed")) {
        const char *why = qmp_string(info, "error-desc");
        return error_set(err, VM_ERROR_FAILED, "QEMU's migration ended as '%s'%s%.400s", status,
                         *why ? ": " : "", why);
    }
    if (o->background)
        return 0;
    if (qemu_query_run_state(o->q, state, err) < 0)
        return -1;
    if (strcmp(state, "postmigrate"))
        return error_set(err, VM_ERROR_FAILED,
                         "QEMU's migration is complete, but the guest is '%s', not 'postmigrate'",
                         state);
    return 0;
}

/* Have QEMU give up. First the stream: QEMU answers nobody while it cannot write device state into
 * it. */
static void give_up(struct outgoing *o)
{
    char status[32];
    struct vm_error *err = NULL;
    CLEANUP(json) json_t *info = NULL;
    if (!o->background) { /* that one was read to its end */
        shutdown(o->ours, SHUT_RDWR);
        qmp_execute(o->q->qmp, "migrate_cancel", NULL, QMP_TIMEOUT_MS, NULL, NULL);
    }
    bool settled = wait_settled(o->q, status, &info, &err) == 0;
    if (settled && o->background && strcmp(status, "completed") != 0)
        settled = write_protection_lift(&o->q->guest.process, &(bool){0}, &err) == 0;
    if (settled || err->kind == VM_ERROR_VMM_DIED) {
        error_free(err);
        return;
    }
    SCOPE_LOCK(&o->q->lock);
    o->settle_error = err;
}

/* QEMU closed the stream too early: it ended, or it has a reason. */
static void ask_why(struct outgoing *o, struct vm_error **err)
{
    char status[32];
    CLEANUP(json) json_t *info = NULL;
    struct vm_error *died = NULL;
    if ((*err)->kind != VM_ERROR_FAILED)
        return;
    if (qemu_query_migration(o->q, status, &info, &died) < 0) {
        error_clear(err);
        *err = died;
        return;
    }
    const char *why = qmp_string(info, "error-desc");
    if (*why)
        error_wrap(err, "%.400s", why);
}

static void finish(struct outgoing *o)
{
    struct vm_error *err = NULL;
    {
        SCOPE_LOCK(&o->q->lock);
        if (o->ended)
            err = steal_ptr(&o->end_error);
        else
            error_set(&err, VM_ERROR_VMM_DIED, "QEMU's connection was lost during the migration");
    }
    bool failed = true;
    if (err) {
        ask_why(o, &err);
        qemu_explain(o->q, &err);
    } else {
        failed = confirm(o, &err) < 0;
    }
    if (failed)
        give_up(o);
    if (failed && is_stopping(o) && err->kind != VM_ERROR_VMM_DIED) {
        error_clear(&err);
        error_set(&err, VM_ERROR_CANCELLED, "the migration was stopped");
    }
    o->events.done(o->arg, err);
}

static void *watch_main(void *arg)
{
    struct outgoing *o = arg;
    struct qemu *q = o->q;
    unsigned told = 1; /* round 1 is there from the beginning */
    for (;;) {
        unsigned pass;
        {
            SCOPE_LOCK(&q->lock);
            while (!o->ended && !q->closed && q->pass <= told)
                pthread_cond_wait(&q->changed, &q->lock);
            pass = q->pass;
        }
        if (pass <= told)
            break;
        told = pass;
        if (o->events.round)
            o->events.round(o->arg, pass);
    }
    finish(o);
    return NULL;
}

/* Beginning. */

/*
 * Before QEMU 9.0 TCG does not notice that the dirty log was read: a page that its TLB knows as
 * dirty is written on and never marked again. So what is written after the second reading is lost,
 * unless the guest stands. (Fixed by "physmem: Fix migration dirty bitmap coherency with TCG memory
 * access".)
 */
static int loses_writes(struct qemu *q, bool *ret_loses, struct vm_error **err)
{
    CLEANUP(json) json_t *kvm = NULL;
    if (qemu_command(q, "query-kvm", NULL, &kvm, err) < 0)
        return -1;
    *ret_loses = !json_is_true(json_object_get(kvm, "enabled")) && qmp_version(q->qmp)->major < 9;
    return 0;
}

/*
 * With a downtime limit of 0 QEMU reads its log again only when everything was sent, and then it
 * has paused the guest: one round. With 1 ms it goes on, round by round, until we pause the guest.
 */
static int set_parameters(struct qemu *q, const struct guest_source_params *params, bool one_round,
                          struct vm_error **err)
{
    static const char *const on[] = {"events", "auto-converge", NULL};
    json_t *values = json_pack(
        "{s:I, s:i, s:i, s:i, s:i, s:s, s:s}", "max-bandwidth", (json_int_t)params->max_bandwidth,
        "downtime-limit", one_round ? 0 : 1, "cpu-throttle-initial", 20, "cpu-throttle-increment",
        10, "max-cpu-throttle", 99, "tls-creds", "", "tls-hostname", "");
    return qemu_settings_use(q, on, values, err);
}

/* The socket; QEMU has its end. */
static int open_stream(struct outgoing *o, struct vm_error **err)
{
    cleanup_close int qemus = -1;
    if (qemu_source_socketpair(&o->ours, &qemus, err) < 0 ||
        (o->background && qemu_gate_fits(qmp_version(o->q->qmp)) &&
         qemu_gate_close(&o->gate, qemus, err) < 0) ||
        qemu_give_fd(o->q, fd_name, qemus, err) < 0)
        return -1;
    return o->background && o->events.opened ? o->events.opened(o->arg, o->ours, err) : 0;
}

/* Begin to read it. */
static int read_stream(struct outgoing *o, const struct guest_source_params *params,
                       struct vm_error **err)
{
    struct qemu_source_params source = {
        .fd = o->ours,
        .channels = params->channels,
        .regions = params->regions,
        .n_regions = params->n_regions,
        .background = params->background,
        .events = &o->events,
        .arg = o->arg,
        .ended = on_stream_ended,
        .ended_arg = o,
    };
    o->source = qemu_source_create(&source, err);
    return o->source ? 0 : -1;
}

static int ask_to_migrate(struct outgoing *o, struct vm_error **err)
{
    struct qemu *q = o->q;
    char uri[32];
    snprintf(uri, sizeof(uri), "fd:%s", fd_name);
    {
        SCOPE_LOCK(&q->lock);
        q->pass = 0;
        q->migration[0] = 0;
    }
    if (qemu_command(q, "migrate", json_pack("{s:s}", "uri", uri), NULL, err) < 0)
        return -1;
    o->asked = true;
    return 0;
}

static int start_watcher(struct outgoing *o, struct vm_error **err)
{
    int rc = pthread_create(&o->watcher, NULL, watch_main, o);
    o->started = !rc;
    if (!rc)
        return 0;
    give_up(o);
    return error_errno(err, rc, "cannot start a thread");
}

/* The guest runs; QEMU prepares what it can. */
static int start_background(struct outgoing *o, struct vm_error **err)
{
    if (open_stream(o, err) < 0)
        return -1;
    if (o->gate.fd < 0)
        return 0;
    if (ask_to_migrate(o, err) < 0)
        return -1;
    if (!qemu_gate_wait(&o->gate, o->q->guest.process.pid, clock_mono_ns() + PREPARE_TIMEOUT_NS))
        log_warn("QEMU's preparation of a snapshot was not seen to end; the pause may be long",
                 "pid=%d", o->q->guest.process.pid);
    return 0;
}

static int start(struct outgoing *o, const struct guest_source_params *params,
                 struct vm_error **err)
{
    return o->background ? start_background(o, err)
           : open_stream(o, err) < 0 || read_stream(o, params, err) < 0 ||
                   ask_to_migrate(o, err) < 0
               ? -1
               : start_watcher(o, err);
}

static int skip_filler(struct outgoing *o, struct vm_error **err)
{
    char filler[4096];
    for (uint64_t left = o->gate.filler; left;) {
        size_t n = left < sizeof(filler) ? (size_t)left : sizeof(filler);
        if (io_read_full(o->ours, filler, n, clock_mono_ns() + CONFIRM_TIMEOUT_NS, -1, err) < 0)
            return -1;
        left -= n;
    }
    return 0;
}

static int let_in(struct outgoing *o, struct vm_error **err)
{
    qemu_gate_open(&o->gate);
    if (skip_filler(o, err) < 0 || read_stream(o, &o->waiting, err) < 0 ||
        (!o->asked && ask_to_migrate(o, err) < 0))
        return -1;
    return start_watcher(o, err);
}

int qemu_source_go(struct qemu *q, struct vm_error **err)
{
    SCOPE_LOCK(&q->source_lock);
    if (!q->outgoing || q->outgoing->started)
        return error_set(err, VM_ERROR_CONFLICT, "no background snapshot waits");
    return let_in(q->outgoing, err);
}

static void free_outgoing(struct outgoing *o)
{
    qemu_gate_open(&o->gate);
    qemu_source_destroy(o->source);
    close_fd(&o->ours);
    error_free(o->end_error);
    error_free(o->settle_error);
    free(o);
}

int qemu_source_start(struct guest *g, const struct guest_source_params *params,
                      const struct guest_source_events *events, void *arg, struct vm_error **err)
{
    struct qemu *q = qemu_from_guest(g);
    SCOPE_LOCK(&q->source_lock);
    if (q->outgoing)
        return error_set(err, VM_ERROR_CONFLICT, "this VM is already being migrated");
    bool one_round = false;
    cleanup_free struct outgoing *made = calloc(1, sizeof(*made));
    if (!made)
        return error_nomem(err);
    /* For a background snapshot qemu_snapshot_can_protect has asked. */
    if (!params->background &&
        (qemu_check_can_move(q, NULL, err) < 0 || loses_writes(q, &one_round, err) < 0 ||
         set_parameters(q, params, one_round, err) < 0))
        return -1;
    struct outgoing *o = steal_ptr(&made);
    *o = (struct outgoing){.q = q,
                           .events = *events,
                           .arg = arg,
                           .ours = -1,
                           .limited = params->max_bandwidth != 0,
                           .one_round = one_round,
                           .background = params->background,
                           .gate = QEMU_GATE_NONE,
                           .waiting = *params};
    if (start(o, params, err) < 0) {
        qemu_forget_fd(q, fd_name);
        free_outgoing(o);
        qemu_settings_restore(q);
        return -1;
    }
    q->outgoing = o;
    return 0;
}

int qemu_source_hurry(struct qemu *q, struct vm_error **err)
{
    SCOPE_LOCK(&q->source_lock);
    if (!q->outgoing || !q->outgoing->limited)
        return 0;
    q->outgoing->limited = false;
    return qemu_command(q, "migrate-set-parameters", json_pack("{s:i}", "max-bandwidth", 0), NULL,
                        err);
}

/* Progress and end. */

static uint64_t counter(const json_t *j, const char *key)
{
    json_int_t v = qmp_integer(j, key);
    return v > 0 ? (uint64_t)v : 0;
}

int qemu_source_progress(struct guest *g, struct guest_source_progress *ret_progress,
                         struct vm_error **err)
{
    struct qemu *q = qemu_from_guest(g);
    struct qemu_source_counters counters;
    CLEANUP(json) json_t *info = NULL;
    bool one_round;
    {
        SCOPE_LOCK(&q->source_lock);
        if (!q->outgoing)
            return error_set(err, VM_ERROR_CONFLICT, "this VM is not being migrated");
        qemu_source_counters(q->outgoing->source, &counters);
        one_round = q->outgoing->one_round;
    }
    if (qmp_execute(q->qmp, "query-migrate", NULL, PROGRESS_TIMEOUT_MS, &info, err) < 0)
        return qemu_explain(q, err);
    const json_t *ram = json_object_get(info, "ram");
    uint64_t rounds = counter(ram, "dirty-sync-count");
    uint64_t page_size = counter(ram, "page-size");
    *ret_progress = (struct guest_source_progress){
        .round = rounds ? (unsigned)rounds : 1,
        .total = counter(ram, "total"),
        .remaining = counter(ram, "remaining"),
        .dirty_rate = counter(ram, "dirty-pages-rate") * (page_size ? page_size : GUEST_PAGE_SIZE),
        .zero_pages = counters.zero_pages,
        .bytes_out = counters.bytes_read,
        .throttle_percent = (unsigned)counter(info, "cpu-throttle-percentage"),
        .one_round = one_round,
    };
    SCOPE_LOCK(&q->lock);
    ret_progress->paused_at_ns = q->stopped_at_ns;
    return 0;
}

/*
 * A background snapshot that was not told to go. One that QEMU has begun is read to its end like any other; if even
 * that fails its stream breaks off, and what QEMU then leaves protected is lifted.
 */
static void end_waiting(struct outgoing *o)
{
    if (!o->asked) {
        qemu_forget_fd(o->q, fd_name);
        return;
    }
    if (let_in(o, NULL) == 0)
        return;
    shutdown(o->ours, SHUT_RDWR);
    give_up(o);
}

int qemu_source_stop(struct guest *g, struct vm_error **err)
{
    struct qemu *q = qemu_from_guest(g);
    struct outgoing *o;
    {
        /* Not held while the threads end: the engine may ask for progress in a callback. */
        SCOPE_LOCK(&q->source_lock);
        o = steal_ptr(&q->outgoing);
    }
    if (!o)
        return 0;
    if (!o->started)
        end_waiting(o);
    {
        SCOPE_LOCK(&q->lock);
        o->stopping = true;
        /* An end that was reached already is not disturbed: the watcher finds out how it was. */
        if (!o->ended && !o->background)
            shutdown(o->ours, SHUT_RDWR);
    }
    qemu_source_destroy(steal_ptr(&o->source));
    if (o->started)
        pthread_join(o->watcher, NULL);
    struct vm_error *unsettled = steal_ptr(&o->settle_error);
    free_outgoing(o);
    qemu_settings_restore(q);
    return unsettled ? error_propagate(err, unsettled) : 0;
}

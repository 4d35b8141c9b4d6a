/* SPDX-License-Identifier: Apache-2.0 */
#include "agent/transfer.h"

#include "agent/attempt.h"
#include "agent/attempt_jobs.h"
#include "agent/control.h"
#include "base/acceptor.h"
#include "base/cond.h"
#include "base/io.h"
#include "base/log.h"
#include "migrate/address.h"

#include <arpa/inet.h>
#include <errno.h>
#include <stdatomic.h>
#include <string.h>

#define ASK_OTHERS_NS (2 * NSEC_PER_SEC)
enum { GREETING_TIMEOUT_MS = 10000, STOP_TIMEOUT_MS = 15000 };

#define NSEC(ms) ((int64_t)(ms) * NSEC_PER_MSEC)

/* ---- Sending ---- */

struct send_job {
    struct transfer *t;
    struct transfer_params params;
    char *vm, *to, *dest_socket;
};

static void send_job_free(void *arg)
{
    struct send_job *s = arg;
    free(s->vm);
    free(s->to);
    free(s->dest_socket);
    free(s);
}

static int send_run(struct job *job, void *arg, struct vm_error **err)
{
    struct send_job *s = arg;
    job_update(job, &(struct job_progress){.predicted_pause_ns = -1, .pause_ns = -1});
    CLEANUP(attempt)
    struct attempt *a = attempt_source_create(s->t, &s->params, job_cancel_fd(job), err);
    if (!a || attempt_source_begin(a, err) < 0)
        return -1;
    return attempt_job_run(job, a, err);
}

int transfer_check_free(struct transfer *t, const char *vm, struct vm_error **err)
{
    CLEANUP(attempt) struct attempt *a = attempt_find_of_vm(t, vm);
    if (!a)
        return 0;
    pthread_mutex_lock(&a->lock);
    bool settled = a->is_settled;
    enum handover_state state = a->state;
    pthread_mutex_unlock(&a->lock);
    if (settled)
        return 0;
    return error_set(err, VM_ERROR_CONFLICT, "a hand-over of VM '%s' is not finished: %s", vm,
                     handover_state_text(state));
}

int transfer_send(struct transfer *t, const struct transfer_params *params, struct uuid *ret_job,
                  struct vm_error **err)
{
    struct endpoint endpoint;
    if (params->check && params->dest_socket && *params->dest_socket)
        return error_set(err, VM_ERROR_USAGE,
                         "a check would end the VMM that waits at the destination: leave one of them out");
    if (params->connections > SENDER_CHANNELS_MAX)
        return error_set(err, VM_ERROR_USAGE, "at most %d connections", SENDER_CHANNELS_MAX);
    if (endpoint_parse(params->to, DEFAULT_PEER_PORT, &endpoint, err) < 0 ||
        transfer_check_free(t, params->vm, err) < 0)
        return -1;
    struct send_job *s = calloc(1, sizeof(*s));
    if (!s)
        return error_nomem(err);
    s->t = t;
    s->params = *params;
    s->params.vm = s->vm = strdup(params->vm);
    s->params.to = s->to = strdup(params->to);
    s->params.dest_socket = s->dest_socket = strdup(params->dest_socket ? params->dest_socket : "");
    struct job_params job = {.kind = params->check ? JOB_CHECK : JOB_SEND,
                             .vm = s->vm,
                             .peer = s->to,
                             .run = send_run,
                             .arg = s,
                             .free_arg = send_job_free};
    if (!s->vm || !s->to || !s->dest_socket) {
        send_job_free(s);
        return error_nomem(err);
    }
    if (job_start(t->agent->jobs, &job, ret_job, err) < 0) {
        send_job_free(s);
        return -1;
    }
    return 0;
}

/* ---- The operator ---- */

static int check_fenced(const struct attempt *a, const char *fenced, struct vm_error **err)
{
    struct endpoint named, peer;
    if (endpoint_parse(fenced, DEFAULT_PEER_PORT, &named, err) < 0 ||
        endpoint_parse(a->record.peer, DEFAULT_PEER_PORT, &peer, err) < 0)
        return -1;
    return strcmp(named.host, peer.host)
               ? error_set(err, VM_ERROR_USAGE,
                           "the host to fence is '%s', not '%s': say --i-fenced %s", peer.host,
                           named.host, peer.host)
               : 0;
}

static struct handover machine_of(struct attempt *a)
{
    SCOPE_LOCK(&a->lock);
    return (struct handover){.role = a->machine.role, .state = a->state};
}

/* Settled, or waiting for the peer again, in another state than before. */
static int wait_for_effect(struct attempt *a, enum handover_state before, struct vm_error **err)
{
    int64_t deadline = clock_mono_ns() + NSEC(STOP_TIMEOUT_MS);
    SCOPE_LOCK(&a->lock);
    for (;;) {
        struct handover now = {.role = a->machine.role, .state = a->state};
        if (a->is_settled || (now.state != before && handover_is_in_doubt(&now)))
            return 0;
        if (!cond_wait_until(&a->changed, &a->lock, deadline))
            return error_set(err, VM_ERROR_TIMEOUT, "decided, but not settled yet: %s",
                             handover_state_text(now.state));
    }
}

static int resolve_attempt(struct attempt *a, bool here, const char *fenced, struct vm_error **err)
{
    enum handover_event event = here ? HANDOVER_EV_RESOLVE_HERE : HANDOVER_EV_RESOLVE_GONE;
    struct handover machine = machine_of(a);
    if (!handover_takes(&machine, event))
        return error_set(err, VM_ERROR_REFUSED, "%s means nothing to the hand-over of VM '%s': %s",
                         here ? "--here" : "--gone", a->vm_name,
                         handover_state_text(machine.state));
    if (here && check_fenced(a, fenced, err) < 0)
        return -1;
    attempt_post(a, event);
    return wait_for_effect(a, machine.state, err);
}

struct damage {
    unsigned n;
    struct uuid attempt; /* of the last */
};

static int count_damage(const struct journal_record *record, const struct vm_error *damage,
                        void *arg, struct vm_error **err)
{
    struct damage *d = arg;
    (void)err;
    if (damage) {
        d->n++;
        d->attempt = record->attempt;
    }
    return 0;
}

/* The copy here is to run on, or is given up. */
static int decide_vm(struct transfer *t, struct vm *vm, bool here, struct vm_error **err)
{
    const struct vm_definition *d = vm_definition(vm);
    if (!here)
        return process_kill(&d->process, ATTEMPT_KILL_TIMEOUT_MS, err) < 0
                   ? -1
                   : attempt_source_forget(t, d->name, &d->process, err);
    CLEANUP(guest) struct guest *guest = vm_guest(vm);
    if (guest_resume(guest, err) < 0)
        return -1;
    cleanup_error struct vm_error *quiet = NULL;
    if (guest_announce(guest, &quiet) < 0)
        log_warn("cannot announce the guest", "error=%s", log_q(error_message(quiet)));
    return 0;
}

/* Does any other VM here stand, or not answer, so that the damaged record may be of its hand-over? */
static bool another_may_be_meant(struct transfer *t, const char *name)
{
    struct vm **list;
    unsigned n;
    bool found = false;
    int64_t deadline = clock_mono_ns() + ASK_OTHERS_NS;
    if (vms_list(t->agent->vms, &list, &n, NULL) < 0)
        return true;
    for (unsigned i = 0; i < n; i++) {
        CLEANUP(vm) struct vm *vm = list[i];
        struct guest_status status;
        if (found || !strcmp(vm_definition(vm)->name, name) || vm_presence(vm) == VM_ENDED)
            continue;
        found = vm_presence(vm) != VM_PRESENT || vm_status(vm, deadline, &status, NULL) < 0 ||
                status.state != GUEST_RUNNING;
    }
    free(list);
    return found;
}

/*
 * A VM that stands, and no attempt knows why, but a record is damaged: it was sent, and nobody here
 * can tell how far that went. What the operator decides makes the record needless, if it is the
 * only one, and of no other VM's.
 */
static int resolve_damaged(struct transfer *t, const char *name, bool here, struct vm_error **err)
{
    struct damage damage = {0};
    struct guest_status status;
    if (journal_each(t->journal, count_damage, &damage, err) < 0)
        return -1;
    CLEANUP(vm) struct vm *vm = damage.n ? vms_get_present(t->agent->vms, name, NULL) : NULL;
    if (!vm)
        return error_set(err, VM_ERROR_NOT_FOUND, "no hand-over of VM '%s' is unfinished", name);
    CLEANUP(guest) struct guest *guest = vm_guest(vm);
    if (guest_status(guest, &status, err) < 0)
        return -1;
    if (status.state == GUEST_RUNNING)
        return error_set(err, VM_ERROR_REFUSED,
                         "VM '%s' runs here, and no hand-over of it is unfinished", name);
    bool is_its = damage.n == 1 && !another_may_be_meant(t, name);
    if (decide_vm(t, vm, here, err) < 0)
        return -1;
    return is_its ? journal_remove(t->journal, &damage.attempt, err) : 0;
}

int transfer_resolve(struct transfer *t, const char *vm, bool here, const char *fenced,
                     struct vm_error **err)
{
    CLEANUP(attempt) struct attempt *a = attempt_find_of_vm(t, vm);
    struct handover machine = a ? machine_of(a) : (struct handover){.state = HANDOVER_SRC_NONE};
    log_warn("an operator decides", "vm=%s here=%d fenced=%s", vm, here,
             log_q(fenced ? fenced : ""));
    return handover_is_settled(&machine) ? resolve_damaged(t, vm, here, err)
                                         : resolve_attempt(a, here, fenced, err);
}

void transfer_get_state(struct transfer *t, const char *vm, struct transfer_state *ret_state)
{
    *ret_state = (struct transfer_state){0};
    CLEANUP(attempt) struct attempt *a = attempt_find_of_vm(t, vm);
    if (!a)
        return;
    SCOPE_LOCK(&a->lock);
    struct handover machine = {.role = a->machine.role, .state = a->state};
    ret_state->known = true;
    ret_state->settled = a->is_settled;
    ret_state->in_doubt = handover_is_in_doubt(&machine);
    ret_state->can_here = handover_takes(&machine, HANDOVER_EV_RESOLVE_HERE);
    ret_state->can_gone = handover_takes(&machine, HANDOVER_EV_RESOLVE_GONE);
    ret_state->source = a->role == &attempt_source_role;
    ret_state->vmm = a->record.vmm;
    ret_state->started_ns = a->record.started_ns;
    ret_state->attempt = a->id;
    snprintf(ret_state->state, sizeof(ret_state->state), "%s", handover_state_name(a->state));
    snprintf(ret_state->text, sizeof(ret_state->text), "%s", handover_state_text(a->state));
    snprintf(ret_state->peer, sizeof(ret_state->peer), "%s", a->record.peer);
}

void transfer_complain(struct transfer *t, char out[CONN_COMPLAINT_MAX], int64_t *ret_end)
{
    conn_context_complain(t->context, clock_wall_ns() / NSEC_PER_SEC, out, ret_end);
    field_make_text(out, CONN_COMPLAINT_MAX - 1);
}

/* ---- Peers that connect ---- */

struct incoming {
    struct transfer *t;
    struct place *place;
    int fd;
};

static void leave_place(struct transfer *t, struct place *place)
{
    SCOPE_LOCK(&t->lock);
    places_leave(&t->places, place);
    pthread_cond_broadcast(&t->changed);
}

/* NULL if it is no host of the cluster, or has too many connections already. */
static struct conn *welcome(const struct incoming *in, int64_t deadline_ns, struct vm_error **err)
{
    struct transfer *t = in->t;
    CLEANUP(conn) struct conn *conn = conn_accept(t->context, in->fd, deadline_ns, t->stop, err);
    if (!conn)
        return NULL;
    SCOPE_LOCK(&t->lock);
    return places_know(&t->places, in->place, conn_peer_name(conn), err) < 0 ? NULL : steal_ptr(&conn);
}

static void serve(const struct incoming *in)
{
    struct transfer *t = in->t;
    cleanup_error struct vm_error *err = NULL;
    int64_t deadline = clock_mono_ns() + NSEC(GREETING_TIMEOUT_MS);
    CLEANUP(conn) struct conn *conn = welcome(in, deadline, &err);
    if (conn && conn_purpose(conn) == CONN_CHANNEL) {
        destination_serve_channel(t, conn);
        return;
    }
    if (conn && conn_purpose(conn) == CONN_AGENT) {
        struct control *control = atomic_load(&t->agent->control);
        if (control) /* else it is for another second that the agent is not ready */
            control_serve_peer(control, conn, t->stop);
        return;
    }
    CLEANUP(peer_session)
    struct peer_session *session =
        conn ? peer_session_accept(steal_ptr(&conn), t->agent->config->host, deadline, t->stop,
                                   &err)
             : NULL;
    if (session)
        destination_serve_control(t, session);
    else
        log_warn("peer refused", "error=%s", log_q(error_message(err)));
}

static void *incoming_main(void *arg)
{
    struct incoming in = *(struct incoming *)arg;
    free(arg);
    log_set_thread_context(NULL, NULL);
    serve(&in);
    leave_place(in.t, in.place);
    return NULL;
}

/* Whoever has an IPv6 address has the 2^64 beside it as well. */
static void name_stranger(int fd, char out[ADDRESS_TEXT_MAX])
{
    struct sockaddr_storage peer = {0};
    socklen_t len = sizeof(peer);
    struct in6_addr *address = &((struct sockaddr_in6 *)&peer)->sin6_addr;
    if (getpeername(fd, (struct sockaddr *)&peer, &len) == 0 && peer.ss_family == AF_INET6 &&
        !IN6_IS_ADDR_V4MAPPED(address)) {
        memset(address->s6_addr + 8, 0, 8);
        inet_ntop(AF_INET6, address, out, ADDRESS_TEXT_MAX);
        return;
    }
    address_of_peer(fd, out);
    char *port = strrchr(out, ':');
    if (port)
        *port = 0;
}

static struct place *find_place(struct transfer *t, int fd, struct vm_error **err)
{
    char address[ADDRESS_TEXT_MAX];
    name_stranger(fd, address);
    SCOPE_LOCK(&t->lock);
    return places_enter(&t->places, address, fd, err);
}

static int start_serving(struct transfer *t, int fd, struct place *place, struct vm_error **err)
{
    pthread_t thread;
    struct incoming *in = malloc(sizeof(*in));
    if (!in)
        return error_nomem(err);
    *in = (struct incoming){t, place, fd};
    int failed = pthread_create(&thread, NULL, incoming_main, in);
    if (failed) {
        free(in);
        return error_errno(err, failed, "cannot start a thread");
    }
    pthread_detach(thread);
    return 0;
}

static void on_peer(int peer, void *arg)
{
    struct transfer *t = arg;
    cleanup_close int fd = peer;
    cleanup_error struct vm_error *err = NULL;
    struct place *place = find_place(t, fd, &err);
    if (place && start_serving(t, fd, place, &err) == 0) {
        steal_fd(&fd);
        return;
    }
    if (place)
        leave_place(t, place);
    log_warn("a connection was dropped", "error=%s", log_q(error_message(err)));
}

static int listen_for_peers(struct transfer *t, struct vm_error **err)
{
    const struct config *c = t->agent->config;
    if (!*c->listen.host)
        return 0;
    t->listen_fd = conn_listen(endpoint_text(&c->listen), err);
    if (t->listen_fd < 0)
        return -1;
    t->listener = acceptor_create(t->agent->loop, t->listen_fd, on_peer, t, err);
    return t->listener ? 0 : -1;
}

/* ---- What a former agent left ---- */

static int take_up(const struct journal_record *record, const struct vm_error *damage, void *arg,
                   struct vm_error **err)
{
    struct transfer *t = arg;
    cleanup_error struct vm_error *failure = NULL;
    if (damage) {
        log_error("a damaged record of the journal is left alone", "attempt=%s error=%s",
                  uuid_text(&record->attempt), log_q(error_message(damage)));
        return 0;
    }
    struct handover probe;
    handover_recover(&probe, record->record, false);
    if (handover_is_finished(&probe) && handover_record_is_settled(record->record)) {
        /* The agent that wrote this may have died before it forgot the VM. */
        if (record->record == HANDOVER_REC_DONE &&
            attempt_source_forget(t, record->vm, &record->vmm, &failure) < 0)
            log_error("cannot forget a VM that has moved", "vm=%s error=%s", record->vm,
                      log_q(error_message(failure)));
        return 0;
    }
    bool source = handover_record_role(record->record) == HANDOVER_SOURCE;
    CLEANUP(attempt)
    struct attempt *a = attempt_recover(
        t, source ? &attempt_source_role : &attempt_destination_role, record, &failure);
    if (!a || attempt_start(a, &failure) < 0)
        return error_propagate(err, steal_ptr(&failure));
    if (!handover_record_is_settled(record->record) &&
        attempt_job_start(a, source ? JOB_SEND : JOB_RECEIVE, record->peer, &failure) < 0)
        log_warn("an unfinished hand-over does not show as a job", "error=%s",
                 log_q(error_message(failure)));
    return 0;
}

/* ---- Life ---- */

static int open_parts(struct transfer *t, struct vm_error **err)
{
    const struct config *c = t->agent->config;
    cleanup_free char *path = NULL;
    struct conn_settings settings = {.ca_file = c->ca_file,
                                     .cert_file = c->cert_file,
                                     .key_file = c->key_file,
                                     .crl_file = c->crl_file,
                                     .insecure_plain = c->insecure_plain};
    if (asprintf(&path, "%s/journal", c->state_dir) < 0) {
        path = NULL;
        return error_nomem(err);
    }
    t->journal = journal_open(path, err);
    if (!t->journal)
        return -1;
    t->context = conn_context_create(&settings, err);
    return t->context ? 0 : -1;
}

struct transfer *transfer_create(struct agent *agent, struct vm_error **err)
{
    CLEANUP(transfer) struct transfer *t = calloc(1, sizeof(*t));
    if (!t) {
        error_nomem(err);
        return NULL;
    }
    t->agent = agent;
    t->listen_fd = -1;
    pthread_mutex_init(&t->lock, NULL);
    cond_init(&t->changed);
    t->stop = io_latch_new(err);
    if (t->stop < 0 || open_parts(t, err) < 0)
        return NULL;
    if (journal_each(t->journal, take_up, t, err) < 0 || listen_for_peers(t, err) < 0) {
        transfer_stop(t);
        return NULL;
    }
    return steal_ptr(&t);
}

static bool all_ended(struct transfer *t)
{
    return !t->attempts && !places_taken(&t->places);
}

bool transfer_stop(struct transfer *t)
{
    acceptor_destroy(t->listener);
    t->listener = NULL;
    close_fd(&t->listen_fd);
    io_latch_set(t->stop);
    int64_t deadline = clock_mono_ns() + NSEC(STOP_TIMEOUT_MS);
    SCOPE_LOCK(&t->lock);
    for (struct attempt *a = t->attempts; a; a = a->next) {
        pthread_mutex_lock(&a->lock);
        a->stop = true;
        pthread_cond_broadcast(&a->changed);
        pthread_mutex_unlock(&a->lock);
        io_latch_set(a->cancel);
    }
    while (!all_ended(t) && cond_wait_until(&t->changed, &t->lock, deadline))
        ;
    if (!all_ended(t))
        log_warn("some transfers did not end in time");
    return all_ended(t);
}

void transfer_destroy(struct transfer *t)
{
    if (!t)
        return;
    acceptor_destroy(t->listener);
    close_fd(&t->listen_fd);
    conn_context_destroy(t->context);
    journal_close(t->journal);
    close_fd(&t->stop);
    pthread_cond_destroy(&t->changed);
    pthread_mutex_destroy(&t->lock);
    free(t);
}

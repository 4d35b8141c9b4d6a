/* SPDX-License-Identifier: Apache-2.0 */
#include "agent/attempt.h"
#include "agent/attempt_jobs.h"
#include "agent/clones.h"
#include "agent/driver.h"
#include "agent/snapshots.h"

#include "base/cond.h"
#include "base/fault.h"
#include "base/io.h"
#include "base/log.h"
#include "vmm/qemu_wire.h"

#include <poll.h>
#include <string.h>

enum { DIAL_TIMEOUT_MS = 5000, REDIAL_MS = 1000 };
/* The destination has to start a VMM; then, while the guest stands, to load it. */
enum { PREPARE_TIMEOUT_MS = 60000, LOADED_TIMEOUT_MS = 30000 };
/* While the guest stands a destination that cannot be reached is not waited for any longer. */
enum { STANDING_OFFLINE_MS = 5000 };
/* Nor one that is there, and takes nothing. As long as it may load, for it may be about as busy. */
enum { STANDING_STUCK_MS = LOADED_TIMEOUT_MS };
/* A peer that is asked every second answers sooner, unless the link was cut. */
enum { SILENT_MS = 3000 };

#define NSEC(ms) ((int64_t)(ms) * NSEC_PER_MSEC)

/* ---- The control connection: dialled again and again until the hand-over is finished ---- */

static bool may_pass(const struct vm_error *err)
{
    return err->kind == VM_ERROR_UNREACHABLE || err->kind == VM_ERROR_TIMEOUT ||
           err->kind == VM_ERROR_SYSTEM;
}

static void keep_prepared(struct attempt *a, struct peer_message *m)
{
    SCOPE_LOCK(&a->lock);
    if (!m->handover->prepared || a->source.prepared)
        return;
    a->source.prepared = m->handover;
    m->handover = NULL;
}

/* An earlier attempt's last word was not heard there. One that lives has a link of its own. */
static void hear_of_another(struct attempt *a, struct peer_session *session,
                            const Vmmig__Peer__Handover *h)
{
    struct uuid id;
    memcpy(id.bytes, h->attempt.data, sizeof(id.bytes));
    CLEANUP(attempt) struct attempt *known = attempt_find(a->transfer, &id);
    if (!known)
        attempt_answer_stray(a->transfer, HANDOVER_SOURCE, session, a->source.peer, h);
}

static void receive_until_broken(struct attempt *a, struct peer_session *session)
{
    cleanup_error struct vm_error *err = NULL;
    struct peer_message m;
    while (peer_session_receive(session, INT64_MAX, a->cancel, &m, &err) > 0) {
        Vmmig__Peer__Handover *h = m.handover;
        if (!memcmp(h->attempt.data, a->id.bytes, sizeof(a->id.bytes))) {
            bool prepared = h->message == HANDOVER_MSG_PREPARED;
            if (prepared)
                keep_prepared(a, &m);
            attempt_receive(a, h);
        } else {
            hear_of_another(a, session, h);
        }
        peer_message_finish(&m);
    }
    if (!io_latch_is_set(a->cancel))
        log_warn("control connection lost", "peer=%s error=%s", a->source.peer,
                 log_q(error_message(err)));
}

static void set_online(struct attempt *a, struct peer_session *session)
{
    attempt_set_session(a, session);
    SCOPE_LOCK(&a->lock);
    a->source.offline_since_ns = session ? 0 : clock_mono_ns();
}

static bool before_prepared(struct attempt *a)
{
    SCOPE_LOCK(&a->lock);
    return a->state == HANDOVER_SRC_PREPARING;
}

static void *link_main(void *arg)
{
    struct attempt *a = arg;
    char id[UUID_TEXT_SIZE];
    log_set_thread_context(uuid_format(&a->id, id), a->vm_name);
    while (!io_latch_is_set(a->cancel)) {
        struct vm_error *err = NULL;
        pthread_mutex_lock(&a->lock);
        CLEANUP(peer_session)
        struct peer_session *session = a->session ? peer_session_ref(a->session) : NULL;
        pthread_mutex_unlock(&a->lock);
        if (!session)
            session = peer_session_open(a->transfer->context, a->source.peer,
                                        a->transfer->agent->config->host,
                                        clock_mono_ns() + PATIENCE(DIAL_TIMEOUT_MS), a->cancel,
                                        &err);
        if (session) {
            set_online(a, session);
            attempt_post(a, HANDOVER_EV_TIMER);
            receive_until_broken(a, session);
            set_online(a, NULL);
        } else if (!may_pass(err) && before_prepared(a)) {
            attempt_fail(a, steal_ptr(&err));
        }
        error_free(err);
        io_wait(a->cancel, POLLIN, clock_mono_ns() + PATIENCE(REDIAL_MS), -1, NULL);
    }
    return NULL;
}

/* ---- The copy ---- */

static int dial_channel(void *arg, int64_t deadline_ns, int cancel_fd, struct conn **ret_conn,
                        struct vm_error **err)
{
    struct attempt *a = arg;
    *ret_conn = conn_dial(a->transfer->context, a->source.peer, CONN_CHANNEL, deadline_ns,
                          cancel_fd, err);
    return *ret_conn ? 0 : -1;
}

/* The destination's proof that its disks are ours. */
static int check_disks(struct attempt *a, const Vmmig__Peer__Prepared *answer,
                       struct vm_error **err)
{
    struct source_part *s = &a->source;
    if (answer->n_answers != s->n_offers)
        return error_set(err, VM_ERROR_PROTOCOL, "the peer answered about %zu of %u disks",
                         answer->n_answers, s->n_offers);
    for (unsigned i = 0; i < s->n_offers; i++) {
        struct disk_answer proof;
        if (qemu_wire_unpack_answer(answer->answers[i], &proof, err) < 0 ||
            disk_identity_check(&s->definition.disks[s->offer_disks[i]], &s->view, &s->offers[i],
                                &proof, err) < 0)
            return -1;
    }
    return 0;
}

/* The regions whose pages go as pages: those that the destination has mapped. */
static int choose_regions(struct attempt *a, const Vmmig__Peer__Prepared *answer,
                          struct vm_error **err)
{
    struct source_part *s = &a->source;
    unsigned n;
    if (qemu_definition_regions(&s->definition, &s->regions, &n, err) < 0)
        return -1;
    if (answer->n_mapped != n)
        return error_set(err, VM_ERROR_PROTOCOL, "the peer answered about %zu of %u regions",
                         answer->n_mapped, n);
    unsigned kept = 0;
    for (unsigned i = 0; i < n; i++)
        if (answer->mapped[i])
            s->regions[kept++] = s->regions[i];
    s->params.regions = s->regions;
    s->params.n_regions = kept;
    s->params.destination_zero = answer->zero;
    return 0;
}

static void withdraw_offers(struct source_part *s)
{
    for (unsigned i = 0; i < s->n_offers; i++)
        disk_identity_withdraw(&s->offers[i]);
}

/* Whoever sets the guest going from now on does so behind the hand-over's back. */
static void watch_for_resume(struct source_part *s, struct guest *guest)
{
    guest_unref(s->watched);
    s->watched = guest_ref(guest);
    s->resumes = guest_resumes(guest);
}

/* The end of what is checked before a page moves. */
static int agree(struct attempt *a, struct vm_error **err)
{
    struct source_part *s = &a->source;
    const Vmmig__Peer__Prepared *answer = s->prepared->prepared;
    int checked = check_disks(a, answer, err);
    withdraw_offers(s);
    return checked < 0 ? -1 : choose_regions(a, answer, err);
}

static int copy(struct attempt *a, struct vm_error **err)
{
    struct source_part *s = &a->source;
    struct sender *sender = sender_create(&s->params, err);
    if (!sender)
        return -1;
    pthread_mutex_lock(&a->lock);
    s->sender = sender;
    pthread_mutex_unlock(&a->lock);
    if (sender_run(sender, err) < 0)
        return -1;
    watch_for_resume(s, s->params.guest); /* from before it is seen to stand */
    if (driver_check_kept(s->params.guest, &s->definition, err) < 0)
        return -1;
    if (FAULT("attempt.copied") == FAULT_ERROR)
        return error_errno(err, fault_errno(), "attempt.copied");
    struct sender_progress p;
    sender_progress(sender, &p);
    a->paused_at_ns = p.paused_at_ns;
    a->rtt_ns = p.rtt_ns;
    return 0;
}

/* Its user may have stopped it meanwhile, or let it go on: so it stays. Others look at it when this thread is done. */
static void note_run_state(struct attempt *a)
{
    struct sender_progress p;
    if (!a->source.sender)
        return;
    sender_progress(a->source.sender, &p);
    a->was_running = p.runs;
}

static void *copy_main(void *arg)
{
    struct attempt *a = arg;
    struct vm_error *err = NULL;
    char id[UUID_TEXT_SIZE];
    log_set_thread_context(uuid_format(&a->id, id), a->vm_name);
    int agreed = agree(a, &err);
    if (agreed == 0 && a->source.check_only) {
        pthread_mutex_lock(&a->lock);
        a->source.agreed = true;
        pthread_mutex_unlock(&a->lock);
        attempt_post(a, HANDOVER_EV_CANCEL);
        return NULL;
    }
    int copied = agreed < 0 ? -1 : copy(a, &err);
    note_run_state(a);
    a->stands = copied == 0; /* read once this thread has been waited for */
    if (copied < 0)
        attempt_fail(a, io_latch_is_set(a->source.copy_cancel) ? err : attempt_await_cause(a, err));
    else
        attempt_post(a, HANDOVER_EV_TRANSFERRED);
    return NULL;
}

static void start_transfer(struct attempt *a)
{
    struct vm_error *err = NULL;
    pthread_mutex_lock(&a->lock);
    bool answered = a->source.prepared != NULL;
    pthread_mutex_unlock(&a->lock);
    int failed = answered ? pthread_create(&a->source.copy_thread, NULL, copy_main, a) : 0;
    a->source.copy_started = answered && !failed;
    if (a->source.copy_started)
        return;
    if (answered)
        error_errno(&err, failed, "cannot start a thread");
    else
        error_set(&err, VM_ERROR_PROTOCOL, "the peer is prepared, but does not say for what");
    attempt_fail(a, err);
}

static void stop_transfer(struct attempt *a)
{
    io_latch_set(a->source.copy_cancel);
    if (a->source.copy_started)
        pthread_join(a->source.copy_thread, NULL);
    a->source.copy_started = false;
    withdraw_offers(&a->source); /* of a destination that did not come to answer them */
    if (io_latch_is_set(a->cancel) && a->source.link_started) {
        pthread_join(a->source.link_thread, NULL);
        a->source.link_started = false;
    }
}

/* ---- The role ---- */

static void start_vm(struct attempt *a)
{
    (void)a; /* no row of the source's asks for it */
}

/*
 * After a restart the registry has lost its word of the VM (a damaged file), but the journal says
 * how its VMM is reached: it is the registry's again, as one that was attached.
 */
static int register_again(struct attempt *a, struct vm_error **err)
{
    struct source_part *s = &a->source;
    struct vms *vms = a->transfer->agent->vms;
    cleanup_vm_definition struct vm_definition d = {.argv = NULL};
    CLEANUP(guest) struct guest *guest = NULL;
    if (driver_adopt(s->driver, a->vm_name, s->socket_path, &d, &guest, err) < 0)
        return -1;
    if (!process_identity_equal(&d.process, &a->record.vmm))
        return error_set(err, VM_ERROR_REFUSED, "another process, %d, answers at %s",
                         d.process.pid, s->socket_path);
    if (vms_add(vms, &d, &guest, err) < 0)
        return -1;
    s->vm = vms_get(vms, a->vm_name, err);
    log_warn("a VM that the registry had lost is known again", "vm=%s pid=%d", a->vm_name,
             d.process.pid);
    return s->vm ? 0 : -1;
}

/* The registry adopts the VMs that it knows some time after a restart. */
static void reconnect(struct attempt *a)
{
    struct source_part *s = &a->source;
    cleanup_error struct vm_error *err = NULL;
    if (!s->vm && s->socket_path && register_again(a, &err) < 0)
        log_warn("cannot reach the VMM yet", "error=%s", log_q(error_message(err)));
    if (s->vm && a->guest)
        vms_reconnect(a->transfer->agent->vms, s->vm, a->guest);
    guest_unref(steal_ptr(&a->guest));
    if (s->vm)
        a->guest = vm_guest(s->vm);
}

/* Asked when the copy has ended. */
static bool never_paused(struct attempt *a)
{
    struct sender_progress p = {0};
    const struct guest *guest = a->source.params.guest; /* NULL: another agent began it */
    SCOPE_LOCK(&a->lock);
    if (a->source.sender)
        sender_progress(a->source.sender, &p);
    return guest && !guest->ops->pauses_by_itself && !p.paused_at_ns;
}

static void fill(struct attempt *a, enum handover_message message, Vmmig__Peer__Handover *out)
{
    if (message == HANDOVER_MSG_PREPARE)
        out->prepare = &a->source.prepare_message;
    if (message == HANDOVER_MSG_COMMIT || message == HANDOVER_MSG_COMMIT_SOLE)
        out->run = a->was_running ? VMMIG__PEER__RUN__RUNS : VMMIG__PEER__RUN__STANDS;
}

static int remember(struct attempt *a, struct vm_error **err)
{
    const struct vm_definition *d = vm_definition(a->source.vm);
    return attempt_remember(a, d->driver, d->socket_path, NULL, a->source.peer, err);
}

/* What was sent is not the guest any more. */
static bool has_run_since(struct attempt *a)
{
    struct source_part *s = &a->source;
    if (!s->watched || guest_resumes(s->watched) == s->resumes)
        return false;
    a->stands = false;
    return true;
}

/* A COMMIT that is repeated after a restart says the same; and a guest is taken back as its user had it. */
static int before_record(struct attempt *a, enum handover_record record, struct vm_error **err)
{
    if (record == HANDOVER_REC_COMMIT && a->machine.state == HANDOVER_SRC_SENT && has_run_since(a))
        return error_set(err, VM_ERROR_REFUSED, "the guest was set going while it was handed over");
    if ((record != HANDOVER_REC_COMMIT && record != HANDOVER_REC_ABORTING) || !a->source.vm)
        return 0;
    if (record == HANDOVER_REC_ABORTING)
        note_run_state(a);
    return remember(a, err);
}

/* While it is copied. An agent that is started again takes the guest back as the record says. */
static void record_run_state(struct attempt *a, bool runs)
{
    struct vm_error *err = NULL;
    a->was_running = runs;
    if (remember(a, &err) < 0 || attempt_write_again(a, &err) < 0)
        attempt_fail(a, err);
    else
        sender_note_recorded(a->source.sender, runs);
}

int attempt_source_forget(struct transfer *t, const char *vm_name,
                          const struct process_identity *moved, struct vm_error **err)
{
    struct vms *vms = t->agent->vms;
    CLEANUP(vm) struct vm *vm = vms_get(vms, vm_name, NULL);
    if (!vm || !process_identity_equal(&vm_definition(vm)->process, moved))
        return 0;
    driver_remove_socket(vm_definition(vm));
    return vms_remove(vms, vm_name, err);
}

static int settled(struct attempt *a, struct vm_error **err)
{
    struct source_part *s = &a->source;
    enum handover_state state = a->machine.state;
    bool stays = state == HANDOVER_SRC_ABORTED || state == HANDOVER_SRC_CLOSED;
    if (state == HANDOVER_SRC_ABORTED && s->params.guest)
        driver_source_release(s->params.guest); /* that of the copy, whatever was connected since */
    if (stays && !s->vm && s->socket_path && process_alive(&a->record.vmm))
        return register_again(a, err);
    if (state != HANDOVER_SRC_DONE)
        return 0;
    return attempt_source_forget(a->transfer, a->vm_name, &a->record.vmm, err);
}

static void fail_when_late(struct attempt *a, int64_t since_ns, int64_t limit_ns, const char *what)
{
    struct vm_error *err = NULL;
    if (!since_ns || clock_mono_ns() - since_ns < limit_ns)
        return;
    error_set(&err, VM_ERROR_TIMEOUT, "%s for %.1f s", what, (double)limit_ns / NSEC_PER_SEC);
    attempt_fail(a, err);
}

/* The copy, while the guest stands: without a connection, or with some over which nothing moves. */
static void watch_standing_copy(struct attempt *a, const struct sender_progress *p)
{
    struct source_part *s = &a->source;
    int64_t now = clock_mono_ns();
    if (!s->moved_at_ns || p->moved_bytes != s->moved_bytes)
        s->moved_at_ns = now;
    s->moved_bytes = p->moved_bytes;
    fail_when_late(a, p->outage_ns ? now - p->outage_ns : 0, NSEC(STANDING_OFFLINE_MS),
                   "the link was lost while the guest stood,");
    fail_when_late(a, s->moved_at_ns, PATIENCE(STANDING_STUCK_MS),
                   "the destination took nothing while the guest stood,");
}

static bool expects_an_answer(enum handover_state state)
{
    return state == HANDOVER_SRC_SENT || state == HANDOVER_SRC_REVERTING ||
           state == HANDOVER_SRC_ORPHANED || state == HANDOVER_SRC_COMMITTED ||
           state == HANDOVER_SRC_COMMITTED_SOLE || state == HANDOVER_SRC_ABORTED;
}

/*
 * TCP finds out that a cut has ended as late again as it was long, and the guest may stand
 * meanwhile. A connection that is silent is given up: the next is there as soon as the link is.
 */
static void give_up_silent_link(struct attempt *a)
{
    SCOPE_LOCK(&a->lock);
    if (!a->session || !expects_an_answer(a->machine.state) ||
        clock_mono_ns() - a->heard_ns < PATIENCE(SILENT_MS))
        return;
    log_warn("the peer is silent; its connection is made anew", "peer=%s", a->source.peer);
    peer_session_shutdown(a->session);
    a->heard_ns = clock_mono_ns();
}

/* 1: it runs, or ran; 0: it stands; -1: its VMM does not say. */
static int was_woken(struct attempt *a, struct guest *guest)
{
    struct source_part *s = &a->source;
    struct guest_status status;
    if (s->watched == guest)
        return guest_resumes(guest) != s->resumes;
    unsigned resumes = guest_resumes(guest);
    if (guest_status(guest, &status, NULL) < 0)
        return -1;
    watch_for_resume(s, guest);
    s->resumes = resumes;
    return status.state == GUEST_RUNNING;
}

/*
 * In doubt nothing runs here. The VMM's other monitors do not know that; its guest stands again as
 * soon as that is seen, and an operator hears of it: the peer's copy may run, and does not have
 * what this one did meanwhile.
 */
static void keep_standing(struct attempt *a)
{
    struct source_part *s = &a->source;
    cleanup_error struct vm_error *err = NULL;
    CLEANUP(guest) struct guest *guest = s->vm ? vm_guest(s->vm) : guest_ref(a->guest);
    if (!guest || was_woken(a, guest) <= 0)
        return;
    s->woken = true;
    a->stands = false;
    log_error("somebody set the guest going, which was handed over and is in doubt",
              "vm=%s peer=%s", a->vm_name, s->peer);
    watch_for_resume(s, guest);
    if (guest_pause(guest, &err) == 0)
        return;
    guest_unref(steal_ptr(&s->watched)); /* it is asked again */
    log_error("it could not be stopped", "vm=%s error=%s", a->vm_name, log_q(error_message(err)));
}

static void tick(struct attempt *a)
{
    give_up_silent_link(a);
    if (a->machine.state == HANDOVER_SRC_COMMITTED)
        keep_standing(a);
    struct sender_progress copy_progress = {0};
    pthread_mutex_lock(&a->lock);
    int64_t offline = a->source.offline_since_ns;
    if (a->source.sender)
        sender_progress(a->source.sender, &copy_progress);
    bool copies = a->source.sender && a->machine.state == HANDOVER_SRC_SENDING;
    pthread_mutex_unlock(&a->lock);
    if (copies && copy_progress.runs != a->was_running)
        record_run_state(a, copy_progress.runs);
    if (copies && copy_progress.paused_at_ns) {
        watch_standing_copy(a, &copy_progress);
    } else if (a->machine.state == HANDOVER_SRC_PREPARING) {
        fail_when_late(a, a->state_since_ns, PATIENCE(PREPARE_TIMEOUT_MS),
                       "the destination did not become ready");
    } else if (a->machine.state == HANDOVER_SRC_SENT) {
        fail_when_late(a, offline, NSEC(STANDING_OFFLINE_MS),
                       "the destination could not be reached while the guest stood");
        fail_when_late(a, a->state_since_ns, PATIENCE(LOADED_TIMEOUT_MS),
                       "the destination did not finish loading");
    }
}

static void finish(struct attempt *a)
{
    struct source_part *s = &a->source;
    if (s->link_started) { /* and the attempt's own thread could not be started */
        io_latch_set(a->cancel);
        pthread_join(s->link_thread, NULL);
    }
    withdraw_offers(s);
    sender_destroy(s->sender);
    guest_unref(s->params.guest);
    guest_unref(s->watched);
    if (s->prepared)
        vmmig__peer__handover__free_unpacked(s->prepared, NULL);
    qemu_wire_free(s->prepare_message.definition);
    for (size_t i = 0; i < s->prepare_message.n_offers; i++)
        free(s->prepare_message.offers[i]);
    free(s->prepare_message.offers);
    qemu_definition_finish(&s->definition);
    free(s->offers);
    free(s->offer_disks);
    free(s->regions);
    free(s->dest_socket);
    free(s->socket_path);
    close_fd(&s->copy_cancel);
    vm_put(s->vm);
}

const struct attempt_role attempt_source_role = {.start_vm = start_vm,
                                                 .start_transfer = start_transfer,
                                                 .stop_transfer = stop_transfer,
                                                 .fill = fill,
                                                 .before_record = before_record,
                                                 .settled = settled,
                                                 .tick = tick,
                                                 .reconnect = reconnect,
                                                 .never_paused = never_paused,
                                                 .finish = finish};

/* ---- Beginning ---- */

static int start_link(struct attempt *a, struct vm_error **err)
{
    int failed = pthread_create(&a->source.link_thread, NULL, link_main, a);
    a->source.link_started = !failed;
    return failed ? error_errno(err, failed, "cannot start a thread") : 0;
}

/* Firmware is in the guest's memory, which goes along. */
static bool is_firmware(const struct qemu_disk *disk)
{
    const char *device = disk->device ? disk->device : "";
    return !strncmp(device, "pflash", strlen("pflash")) ||
           !strncmp(device, "/machine/system.flash", strlen("/machine/system.flash"));
}

/* Of what is only read the user answers for a destination that he prepared, and for what lies in no file. */
static bool is_to_be_proved(struct attempt *a, const struct qemu_disk *disk)
{
    return disk->writable ||
           (!*a->source.dest_socket && disk_identity_is_provable(disk) && !is_firmware(disk) &&
            !clones_is_mounted(a->transfer->agent, disk));
}

/* A question for every disk that is to be proved, to be answered by the destination. */
static int make_offers(struct attempt *a, struct vm_error **err)
{
    struct source_part *s = &a->source;
    const struct qemu_definition *d = &s->definition;
    Vmmig__Peer__Prepare *m = &s->prepare_message;
    if (disk_identity_check_devices(d->devices, d->n_devices, err) < 0)
        return -1;
    s->offers = calloc(d->n_disks + 1, sizeof(*s->offers));
    s->offer_disks = calloc(d->n_disks + 1, sizeof(*s->offer_disks));
    m->offers = calloc(d->n_disks + 1, sizeof(*m->offers));
    if (!s->offers || !s->offer_disks || !m->offers)
        return error_nomem(err);
    for (uint32_t i = 0; i < d->n_disks; i++) {
        if (!is_to_be_proved(a, &d->disks[i]))
            continue;
        struct disk_offer *offer = &s->offers[s->n_offers];
        if (!s->n_offers && disk_identity_view(a->guest->process.pid, d->cwd, &s->view, err) < 0)
            return -1;
        if (disk_identity_offer(&d->disks[i], &s->view, offer, err) < 0)
            return -1;
        s->offer_disks[s->n_offers++] = i;
        Vmmig__Peer__DiskOffer *question = malloc(sizeof(*question));
        if (!question)
            return error_nomem(err);
        vmmig__peer__disk_offer__init(question);
        question->disk = i;
        question->proof = offer->proof;
        question->nonce =
            (ProtobufCBinaryData){sizeof(offer->nonce.bytes), offer->nonce.bytes};
        m->offers[m->n_offers++] = question;
    }
    return 0;
}

/* What the destination is asked for, from the running VM. */
static int describe(struct attempt *a, const struct transfer_params *p, struct vm_error **err)
{
    struct source_part *s = &a->source;
    bool prepared = p->dest_socket && *p->dest_socket;
    if (driver_define(a->guest, prepared, p->dest_driver, &s->definition, err) < 0)
        return -1;
    a->was_running = s->definition.state == GUEST_RUNNING;
    Vmmig__Peer__Prepare *m = &s->prepare_message;
    vmmig__peer__prepare__init(m);
    s->dest_socket = strdup(p->dest_socket ? p->dest_socket : "");
    if (!s->dest_socket)
        return error_nomem(err);
    m->definition = qemu_wire_pack(&s->definition, err);
    if (!m->definition || (!p->assume_shared && make_offers(a, err) < 0))
        return -1;
    m->channels = s->params.channels;
    m->token = (ProtobufCBinaryData){sizeof(s->params.token.bytes), s->params.token.bytes};
    m->assume_shared = p->assume_shared;
    m->frozen = snapshots_is_frozen(a->transfer->agent->config, &a->guest->process);
    m->dest_socket = s->dest_socket;
    return 0;
}

/* 0: none. */
static uint64_t lesser_limit(uint64_t a, uint64_t b)
{
    return a && (!b || a < b) ? a : b;
}

static void set_params(struct attempt *a, const struct transfer_params *p)
{
    const struct config *config = a->transfer->agent->config;
    a->source.params = (struct sender_params){
        .guest = guest_ref(a->guest),
        .attempt = a->id,
        .token = channel_token_new(),
        .channels = p->connections ? p->connections : TRANSFER_CONNECTIONS_DEFAULT,
        .compress = p->compress,
        .downtime_limit_ns =
            NSEC(p->downtime_limit_ms ? p->downtime_limit_ms : TRANSFER_DOWNTIME_DEFAULT_MS),
        .max_bandwidth = lesser_limit(p->max_bandwidth, config->max_bandwidth),
        .outage_limit_ns = NSEC(config->peer_timeout_ms),
        .cores = (double)sysconf(_SC_NPROCESSORS_ONLN),
        .connect = dial_channel,
        .connect_arg = a,
        .cancel_fd = a->source.copy_cancel};
}

struct attempt *attempt_source_create(struct transfer *t, const struct transfer_params *p,
                                      int cancel_fd, struct vm_error **err)
{
    struct uuid id = uuid_new();
    struct endpoint endpoint;
    if (endpoint_parse(p->to, DEFAULT_PEER_PORT, &endpoint, err) < 0)
        return NULL;
    CLEANUP(attempt) struct attempt *a = attempt_create(t, &attempt_source_role, &id, p->vm, err);
    if (!a)
        return NULL;
    struct source_part *s = &a->source;
    s->copy_cancel = io_latch_new(err);
    if (s->copy_cancel < 0)
        return NULL;
    s->vm = vms_get_present(t->agent->vms, p->vm, err);
    if (!s->vm)
        return NULL;
    a->guest = vm_guest(s->vm);
    a->record.vmm = a->guest->process;
    if (snapshots_clear(t->agent->config, vm_definition(s->vm), a->guest, err) < 0)
        return NULL;
    if (strlen(endpoint_format(&endpoint, s->peer)) > JOURNAL_PEER_MAX) {
        error_set(err, VM_ERROR_USAGE, "the name of host '%s' is too long", p->to);
        return NULL;
    }
    strcpy(a->record.peer, s->peer);
    s->check_only = p->check;
    set_params(a, p);
    if (supervisor_check(&a->guest->process, s->note, err) < 0 || describe(a, p, err) < 0)
        return NULL;
    s->params.was_running = a->was_running;
    int64_t deadline = clock_mono_ns() + NSEC(t->agent->config->connect_timeout_ms);
    CLEANUP(peer_session)
    struct peer_session *session =
        peer_session_open(t->context, s->peer, t->agent->config->host, deadline, cancel_fd, err);
    if (!session || remember(a, err) < 0)
        return NULL;
    attempt_set_session(a, session);
    return steal_ptr(&a);
}

int attempt_source_begin(struct attempt *a, struct vm_error **err)
{
    attempt_post(a, HANDOVER_EV_START);
    return start_link(a, err) < 0 ? -1 : attempt_start(a, err);
}

int attempt_source_recover(struct attempt *a, const struct journal_record *record,
                           struct vm_error **err)
{
    struct source_part *s = &a->source;
    Vmmig__Peer__Memory *memory = attempt_memory(record);
    s->copy_cancel = io_latch_new(err);
    if (s->copy_cancel < 0)
        return -1;
    snprintf(s->peer, sizeof(s->peer), "%s", record->peer);
    if (memory) {
        a->was_running = memory->was_running;
        s->driver = memory->driver == VM_DRIVER_ATTACH ? VM_DRIVER_ATTACH : VM_DRIVER_QEMU;
        s->socket_path = *memory->socket_path ? strdup(memory->socket_path) : NULL;
        vmmig__peer__memory__free_unpacked(memory, NULL);
    }
    s->offline_since_ns = clock_mono_ns();
    s->vm = vms_get(a->transfer->agent->vms, a->vm_name, NULL);
    if (s->vm && !process_identity_equal(&vm_definition(s->vm)->process, &record->vmm))
        vm_put(steal_ptr(&s->vm));
    return start_link(a, err);
}

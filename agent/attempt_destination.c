/* SPDX-License-Identifier: Apache-2.0 */
#include "agent/attempt.h"
#include "agent/attempt_jobs.h"
#include "agent/clones.h"
#include "agent/driver.h"
#include "agent/snapshots.h"

#include "base/argv.h"
#include "base/cond.h"
#include "base/fault.h"
#include "base/io.h"
#include "base/log.h"
#include "vmm/guest_memory.h"
#include "vmm/qemu_wire.h"

#include <string.h>

/* How much longer than the source this side waits for connections to come back, or for anything to come over them. */
enum { IDLE_MARGIN_MS = 10000 };
#define FORMER_JOB_TIMEOUT_NS (5 * NSEC_PER_SEC)

#define NSEC(ms) ((int64_t)(ms) * NSEC_PER_MSEC)

/* ---- A VMM that waits for the guest ---- */

/*
 * The VMM's process is there, and waits before it becomes the VMM. From here on a crash of the
 * agent must not forget it; the attempt's own thread writes no record before this one's end.
 */
static int remember_birth(const struct process_identity *process, void *arg, struct vm_error **err)
{
    struct attempt *a = arg;
    struct journal_record born = a->record;
    born.vmm = *process;
    born.record = HANDOVER_REC_PREPARING;
    (void)FAULT("attempt.born");
    if (journal_put(a->transfer->journal, &born, err) < 0)
        return -1;
    (void)FAULT("attempt.recorded");
    return 0;
}

/* What it will still take. Under the table's lock. */
static uint64_t outstanding(struct attempt *a)
{
    struct destination_part *d = &a->destination;
    SCOPE_LOCK(&a->lock);
    if (a->state != HANDOVER_DST_PREPARING && a->state != HANDOVER_DST_PREPARED)
        return 0;
    uint64_t has = d->receiver ? receiver_memory(d->receiver) : 0;
    return d->claim > has ? d->claim - has : 0;
}

/* The kernel counts memory as available that is promised to guests which are arriving: how much? From now on others see
 * this one's, too. */
static uint64_t claim_memory(struct attempt *a)
{
    struct transfer *t = a->transfer;
    uint64_t promised = 0;
    SCOPE_LOCK(&t->lock);
    /* Of ordinary memory: huge pages are the kernel's to promise. */
    a->destination.claim = qemu_definition_memory(&a->destination.definition, GUEST_PAGE_SIZE);
    for (struct attempt *other = t->attempts; other; other = other->next)
        if (other != a && other->role == &attempt_destination_role)
            promised += outstanding(other);
    return promised;
}

static struct guest *make_sink(struct attempt *a, struct vm_error **err)
{
    struct destination_part *d = &a->destination;
    const Vmmig__Peer__Prepare *p = d->prepare->prepare;
    struct driver_birth birth = {remember_birth, a};
    struct vm_error *failed = NULL;
    if (*p->dest_socket)
        return driver_sink_adopt(&d->definition, p->dest_socket, err);
    if (FAULT("attempt.spawn") == FAULT_ERROR) {
        error_errno(err, fault_errno(), "attempt.spawn");
        return NULL;
    }
    struct guest *guest = driver_sink_start(a->transfer->agent->config, a->vm_name, &d->definition,
                                            p->assume_shared, claim_memory(a), &birth, &failed);
    /* No VM has died, though a VMM ended: this host lacks what the command line asks for. */
    if (!guest && failed->kind == VM_ERROR_VMM_DIED)
        error_set_kind(&failed, VM_ERROR_REFUSED);
    if (!guest)
        error_propagate(err, failed);
    return guest;
}

/* `here`: the disks that this host has as those of the definition. */
static int answer_disks(struct attempt *a, const struct qemu_definition *here,
                        const struct disk_view *view, struct vm_error **err)
{
    struct destination_part *d = &a->destination;
    const Vmmig__Peer__Prepare *p = d->prepare->prepare;
    d->answers = calloc(p->n_offers + 1, sizeof(*d->answers));
    if (!d->answers)
        return error_nomem(err);
    for (size_t i = 0; i < p->n_offers; i++) {
        struct disk_offer offer;
        qemu_wire_unpack_offer(p->offers[i], &offer);
        if (!here->disks[p->offers[i]->disk].file)
            return error_set(err, VM_ERROR_PROTOCOL,
                             "a proof was asked for of a disk that is not written");
        if (disk_identity_answer(&here->disks[p->offers[i]->disk], view, &offer, &d->answers[i],
                                 err) < 0)
            return -1;
        d->n_answers++;
    }
    return 0;
}

/* Of a VMM that was prepared it is the disks which it has open. */
static int answer_prepared_disks(struct attempt *a, struct vm_error **err)
{
    struct destination_part *d = &a->destination;
    cleanup_qemu_definition struct qemu_definition here = {0};
    struct disk_view view;
    if (d->prepare->prepare->assume_shared)
        return 0;
    if (driver_sink_disks(a->guest, &d->definition, &here, err) < 0)
        return -1;
    /* Nor has this agent to be allowed to see what that process sees. */
    if (!d->prepare->prepare->n_offers)
        return 0;
    return disk_identity_view(a->guest->process.pid, here.cwd, &view, err) < 0
               ? -1
               : answer_disks(a, &here, &view, err);
}

/* The VMM that the guest will be in, and the disks that it will have. */
static int make_vmm(struct attempt *a, struct vm_error **err)
{
    struct destination_part *d = &a->destination;
    const struct disk_view own = {.cwd = d->definition.cwd};
    bool prepared = *d->prepare->prepare->dest_socket;
    if (!prepared && answer_disks(a, &d->definition, &own, err) < 0)
        return -1;
    a->guest = make_sink(a, err);
    if (!a->guest)
        return -1;
    if (prepared && answer_prepared_disks(a, err) < 0) {
        driver_sink_release(a->guest); /* it is the user's, and goes on waiting */
        return -1;
    }
    d->process = a->guest->process;
    return 0;
}

/* The PREPARED message: which regions are mapped, and the answers about the disks. */
static int make_prepared(struct attempt *a, struct vm_error **err)
{
    struct destination_part *d = &a->destination;
    Vmmig__Peer__Prepared *m = &d->prepared_message;
    const struct guest_region *regions;
    vmmig__peer__prepared__init(m);
    guest_sink_regions(a->guest, &regions, &d->n_mapped);
    d->mapped = calloc(d->n_mapped + 1, sizeof(*d->mapped));
    m->mapped = calloc(d->n_mapped + 1, sizeof(*m->mapped));
    m->answers = calloc(d->n_answers + 1, sizeof(*m->answers));
    if (!d->mapped || !m->mapped || !m->answers)
        return error_nomem(err);
    m->zero = true;
    for (; m->n_mapped < d->n_mapped; m->n_mapped++) {
        const struct guest_region *r = &regions[m->n_mapped];
        m->mapped[m->n_mapped] = guest_region_is_reachable(r);
        m->zero = m->zero && (r->zero || !guest_region_is_reachable(r));
    }
    for (; m->n_answers < d->n_answers; m->n_answers++) {
        struct disk_answer *answer = &d->answers[m->n_answers];
        Vmmig__Peer__DiskAnswer *to = malloc(sizeof(*to));
        if (!to)
            return error_nomem(err);
        vmmig__peer__disk_answer__init(to);
        to->secret = (ProtobufCBinaryData){sizeof(answer->secret.bytes), answer->secret.bytes};
        to->boot = (ProtobufCBinaryData){sizeof(answer->boot.bytes), answer->boot.bytes};
        to->inode = answer->inode;
        to->size = answer->size;
        to->device = answer->device;
        to->text = answer->text;
        m->answers[m->n_answers] = to;
    }
    return 0;
}

/* A source that is away for so long before everything is here has given up, or will ask again. */
static int64_t silence_limit_ns(const struct attempt *a)
{
    return NSEC(a->transfer->agent->config->peer_timeout_ms) + PATIENCE(IDLE_MARGIN_MS);
}

static int make_receiver(struct attempt *a, struct vm_error **err)
{
    struct destination_part *d = &a->destination;
    const Vmmig__Peer__Prepare *p = d->prepare->prepare;
    const struct guest_region *regions;
    unsigned n, kept = 0, numbers[GUEST_REGIONS_MAX];
    struct guest_region mapped[GUEST_REGIONS_MAX];
    guest_sink_regions(a->guest, &regions, &n);
    for (unsigned i = 0; i < n && i < GUEST_REGIONS_MAX; i++) {
        if (!guest_region_is_reachable(&regions[i]))
            continue;
        numbers[kept] = i;
        mapped[kept++] = regions[i];
    }
    struct receiver_params params = {.guest = a->guest,
                                     .attempt = a->id,
                                     .channels = p->channels,
                                     .regions = mapped,
                                     .n_regions = kept,
                                     .sink_regions = numbers,
                                     .charge_vmm = *a->transfer->agent->config->vm_cgroup != 0,
                                     .idle_limit_ns = silence_limit_ns(a),
                                     .cancel_fd = a->cancel};
    memcpy(params.token.bytes, p->token.data, sizeof(params.token.bytes));
    struct receiver *r = receiver_create(&params, err);
    if (!r)
        return -1;
    SCOPE_LOCK(&a->lock);
    d->receiver = r;
    if (d->stopped) /* while the VMM was being started */
        receiver_stop(r);
    return 0;
}

/* What the registry will know of the VM when it runs here. */
static struct vm_definition future_vm(const struct attempt *a,
                                      const struct process_identity *process)
{
    const struct destination_part *d = &a->destination;
    struct vm_definition def = {.origin = VM_ORIGIN_RECEIVED,
                                .argv = d->argv,
                                .driver = d->driver,
                                .socket_path = d->socket_path,
                                .process = *process,
                                .since_ns = clock_wall_ns()};
    snprintf(def.name, sizeof(def.name), "%s", a->vm_name);
    return def;
}

/* Here they will have to be thawed. */
static int expect_frozen(struct attempt *a, struct vm_error **err)
{
    struct destination_part *d = &a->destination;
    if (!d->prepare->prepare->frozen ||
        snapshots_expect_frozen(a->transfer->agent->config, &d->process, d->argv, err) == 0)
        return 0;
    error_wrap(err, "its file systems are frozen for a snapshot, and could not be thawed here");
    return error_set_kind(err, VM_ERROR_REFUSED);
}

static int prepare(struct attempt *a, struct vm_error **err)
{
    struct destination_part *d = &a->destination;
    const Vmmig__Peer__Prepare *p = d->prepare->prepare;
    if (vms_check_free(a->transfer->agent->vms, a->vm_name, err) < 0 ||
        qemu_wire_unpack(p->definition, &d->definition, err) < 0)
        return -1;
    a->was_running = d->definition.state == GUEST_RUNNING;
    if (clones_show_templates(a->transfer->agent, &d->definition, err) < 0 || make_vmm(a, err) < 0)
        return -1;
    if (process_argv(a->guest->process.pid, &d->argv, err) < 0 ||
        attempt_remember(a, d->driver, d->socket_path, d->argv, NULL, err) < 0 ||
        expect_frozen(a, err) < 0)
        return -1;
    struct vm_definition def = future_vm(a, &d->process);
    if (vms_reserve(a->transfer->agent->vms, &def, err) < 0)
        return -1;
    return make_prepared(a, err) < 0 ? -1 : make_receiver(a, err);
}

/* ---- The copy, from the VMM's start to a loaded guest ---- */

/*
 * A source has one attempt at a time. It knows that the one before this is undone a little sooner than the job of that
 * has ended here.
 */
static void wait_for_former_job(struct attempt *a)
{
    struct job_table *jobs = a->transfer->agent->jobs;
    cleanup_job_status struct job_status former = {0};
    if (job_get_of_vm(jobs, a->vm_name, &former, NULL) == 0 && former.kind == JOB_RECEIVE &&
        former.state == JOB_STATE_RUNNING && !strcmp(former.peer, a->peer_name))
        job_wait(jobs, &former.id, clock_mono_ns() + FORMER_JOB_TIMEOUT_NS, a->cancel, NULL);
}

static void *work_main(void *arg)
{
    struct attempt *a = arg;
    struct vm_error *err = NULL;
    char id[UUID_TEXT_SIZE];
    log_set_thread_context(uuid_format(&a->id, id), a->vm_name);
    wait_for_former_job(a);
    if (attempt_job_start(a, JOB_RECEIVE, a->peer_name, &err) < 0 || prepare(a, &err) < 0) {
        attempt_fail(a, err);
        return NULL;
    }
    (void)FAULT("attempt.ready");
    attempt_post(a, HANDOVER_EV_READY);
    if (receiver_wait(a->destination.receiver, &err) < 0) {
        attempt_fail(a, err);
        return NULL;
    }
    struct receiver_stats stats;
    receiver_stats(a->destination.receiver, &stats);
    a->destination.load_ns = stats.load_ns;
    if (FAULT("attempt.loaded") == FAULT_ERROR) {
        error_errno(&err, fault_errno(), "attempt.loaded");
        attempt_fail(a, err);
        return NULL;
    }
    attempt_post(a, HANDOVER_EV_LOAD_DONE);
    return NULL;
}

static void start_vm(struct attempt *a)
{
    struct vm_error *err = NULL;
    int failed = pthread_create(&a->destination.work_thread, NULL, work_main, a);
    a->destination.work_started = !failed;
    if (failed) {
        error_errno(&err, failed, "cannot start a thread");
        attempt_fail(a, err);
    }
}

static void start_transfer(struct attempt *a)
{
    (void)a; /* no row of the destination's asks for it */
}

/* The work thread is done with the VMM's start: from here on the attempt's own thread knows it. */
static void adopt_process(struct attempt *a)
{
    SCOPE_LOCK(&a->lock);
    if (a->destination.process.pid)
        a->record.vmm = a->destination.process;
}

static void stop_transfer(struct attempt *a)
{
    struct destination_part *d = &a->destination;
    pthread_mutex_lock(&a->lock);
    d->stopped = true;
    struct receiver *r = d->receiver;
    pthread_mutex_unlock(&a->lock);
    if (r)
        receiver_stop(r);
    if (d->work_started)
        pthread_join(d->work_thread, NULL);
    d->work_started = false;
    adopt_process(a);
    pthread_mutex_lock(&a->lock);
    r = d->receiver;
    d->receiver = NULL; /* no connection enters it any more */
    while (d->serving) {
        pthread_mutex_unlock(&a->lock);
        if (r)
            receiver_stop(r);
        pthread_mutex_lock(&a->lock);
        cond_wait_until(&a->changed, &a->lock, clock_mono_ns() + NSEC(100));
    }
    pthread_mutex_unlock(&a->lock);
    receiver_destroy(r);
}

/* ---- The role ---- */

static void fill(struct attempt *a, enum handover_message message, Vmmig__Peer__Handover *out)
{
    if (message == HANDOVER_MSG_PREPARED)
        out->prepared = &a->destination.prepared_message;
    if (message == HANDOVER_MSG_LOADED)
        out->duration_ns = (uint64_t)a->destination.load_ns;
    if (message == HANDOVER_MSG_RUNNING)
        out->duration_ns = (uint64_t)a->resume_took_ns;
}

/* The registry's own handle, if it has the VM already (from before a restart). */
static bool use_registered(struct attempt *a)
{
    struct destination_part *d = &a->destination;
    CLEANUP(vm) struct vm *known = vms_get(a->transfer->agent->vms, a->vm_name, NULL);
    if (!known || !process_identity_equal(&vm_definition(known)->process, &a->record.vmm))
        return false;
    if (!d->vm)
        d->vm = steal_ptr(&known);
    if (!a->guest)
        a->guest = vm_guest(d->vm);
    return true;
}

/* The VM becomes this agent's own, for good. */
static int register_vm(struct attempt *a, struct vm_error **err)
{
    struct destination_part *d = &a->destination;
    struct vms *vms = a->transfer->agent->vms;
    if (use_registered(a))
        return 0;
    struct vm_definition def = future_vm(a, &a->record.vmm);
    if (!a->guest) /* after a restart, of a guest that is not to run: nobody needed it until now */
        a->role->reconnect(a);
    CLEANUP(guest) struct guest *guest = guest_ref(a->guest);
    if (vms_add(vms, &def, &guest, err) < 0)
        return -1;
    d->vm = vms_get(vms, a->vm_name, NULL);
    return 0;
}

/* Where the VMM will listen: what a crash leaves there is removed after it. */
static int remember_socket(struct attempt *a, struct vm_error **err)
{
    struct destination_part *d = &a->destination;
    const Vmmig__Peer__Prepare *p = d->prepare->prepare;
    const struct qemu_definition asked = {.accel = p->definition->accel}; /* which says the kind */
    d->driver = driver_of_definition(&asked);
    d->socket_path = *p->dest_socket
                         ? strdup(p->dest_socket)
                         : driver_socket_path(a->transfer->agent->config, a->vm_name, d->driver);
    if (!d->socket_path)
        return error_nomem(err);
    return attempt_remember(a, d->driver, d->socket_path, NULL, NULL, err);
}

/*
 * A VM of this name that is here, or arrives, and is why the attempt was refused, has its socket in the same place.
 */
static bool name_is_anothers(struct attempt *a)
{
    if (attempt_has_rival(a))
        return true;
    CLEANUP(vm) struct vm *known = vms_get(a->transfer->agent->vms, a->vm_name, NULL);
    return known && vm_presence(known) != VM_ENDED &&
           !process_identity_equal(&vm_definition(known)->process, &a->record.vmm);
}

/* Not that of a VMM which the user prepared; known from its name, also after a restart. */
static bool socket_is_ours(struct attempt *a)
{
    const struct destination_part *d = &a->destination;
    cleanup_free char *ours =
        driver_socket_path(a->transfer->agent->config, a->vm_name, d->driver);
    return d->socket_path && ours && !strcmp(d->socket_path, ours);
}

static void remove_leftovers(struct attempt *a)
{
    struct destination_part *d = &a->destination;
    if (name_is_anothers(a))
        return;
    if (d->argv) /* else it came to no VMM */
        vms_release(a->transfer->agent->vms, a->vm_name);
    if (socket_is_ours(a))
        unlink(d->socket_path);
}

/* The source's last word about it goes for PREPARE's; a restart of this agent must know it, too. */
static int take_run_state(struct attempt *a, struct vm_error **err)
{
    struct destination_part *d = &a->destination;
    pthread_mutex_lock(&a->lock);
    Vmmig__Peer__Run run = d->run;
    pthread_mutex_unlock(&a->lock);
    if (run == VMMIG__PEER__RUN__AS_PREPARED || a->was_running == (run == VMMIG__PEER__RUN__RUNS))
        return 0;
    a->was_running = run == VMMIG__PEER__RUN__RUNS;
    return attempt_remember(a, d->driver, d->socket_path, d->argv, NULL, err);
}

/*
 * PREPARING is written three times: with the socket's name, with the VMM's process before it
 * becomes one, and with all that is to be remembered once the VMM waits. RUN is not written for a
 * VMM that is dead. Once RUNNING is on record, the journal forgets how to reach the VM: the
 * registry must know it. It forgets that with NEVER and ENDED, too: what the dead VMM left is
 * removed before.
 */
static int before_record(struct attempt *a, enum handover_record record, struct vm_error **err)
{
    if (record == HANDOVER_REC_PREPARING && !a->recorded)
        return remember_socket(a, err);
    if (record == HANDOVER_REC_PREPARING)
        adopt_process(a);
    if (record == HANDOVER_REC_RUN && !process_alive(&a->record.vmm))
        return error_set(err, VM_ERROR_VMM_DIED, "the VM's process %d ended", a->record.vmm.pid);
    if ((record == HANDOVER_REC_NEVER || record == HANDOVER_REC_ENDED) && !a->destination.vm)
        remove_leftovers(a);
    if (record == HANDOVER_REC_RUN)
        return take_run_state(a, err);
    return record == HANDOVER_REC_RUNNING ? register_vm(a, err) : 0;
}

/*
 * A handle whose connection is of no use any more; the VMM has loaded everything, nothing is
 * received by it.
 */
static void drop_guest(struct attempt *a)
{
    stop_transfer(a);
    guest_unref(steal_ptr(&a->guest));
}

/*
 * Its VMM is dead. The record may wait for the source's last word for as long as that host is away;
 * the guest's memory must not, which we had mapped, or which a later move from here had, of the VM
 * that this attempt brought.
 */
static void let_go(struct attempt *a)
{
    drop_guest(a);
    remove_leftovers(a);
    snapshots_forget_frozen(a->transfer->agent->config, &a->record.vmm);
    vm_put(steal_ptr(&a->destination.vm));
}

static int settled(struct attempt *a, struct vm_error **err)
{
    switch (a->machine.state) {
    case HANDOVER_DST_NEVER:
    case HANDOVER_DST_ENDED:
        let_go(a);
        return 0;
    case HANDOVER_DST_RUNNING:
        /* From here on its memory is its VMM's alone. */
        stop_transfer(a);
        if (a->guest)
            driver_sink_release(a->guest);
        snapshots_thaw_frozen(a->transfer->agent->config, &a->record.vmm);
        return 0;
    default:
        return 0;
    }
}

static void reconnect(struct attempt *a)
{
    cleanup_error struct vm_error *err = NULL;
    if (a->guest && a->destination.vm)
        vms_reconnect(a->transfer->agent->vms, a->destination.vm, a->guest);
    if (a->guest)
        drop_guest(a);
    if (use_registered(a))
        return;
    struct destination_part *d = &a->destination;
    struct guest *guest =
        d->socket_path ? driver_reconnect(d->driver, d->socket_path, &a->record.vmm, &err) : NULL;
    if (!guest) {
        log_warn("cannot reach the VMM yet", "error=%s", log_q(error_message(err)));
        return;
    }
    a->guest = guest;
}

static bool never_paused(struct attempt *a)
{
    (void)a; /* it waits, paused */
    return false;
}

static int64_t later(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

/* The receiver looks after its own connections; here nothing at all is left of the source. */
static void tick(struct attempt *a)
{
    if (a->machine.state != HANDOVER_DST_PREPARING && a->machine.state != HANDOVER_DST_PREPARED)
        return;
    pthread_mutex_lock(&a->lock);
    bool alone = !a->session && !a->destination.serving;
    int64_t since = later(a->state_since_ns, later(a->heard_ns, a->destination.served_ns));
    pthread_mutex_unlock(&a->lock);
    if (!alone || clock_mono_ns() - since < silence_limit_ns(a))
        return;
    struct vm_error *err = NULL;
    error_set(&err, VM_ERROR_TIMEOUT, "the source was not heard of for %d s",
              (int)(silence_limit_ns(a) / NSEC_PER_SEC));
    attempt_fail(a, err);
}

static void finish(struct attempt *a)
{
    struct destination_part *d = &a->destination;
    Vmmig__Peer__Prepared *m = &d->prepared_message;
    for (size_t i = 0; i < m->n_answers; i++)
        free(m->answers[i]);
    free(m->answers);
    free(m->mapped);
    free(d->mapped);
    free(d->answers);
    free(d->argv);
    free(d->socket_path);
    if (d->prepare)
        vmmig__peer__handover__free_unpacked(d->prepare, NULL);
    qemu_definition_finish(&d->definition);
    vm_put(d->vm);
}

const struct attempt_role attempt_destination_role = {.start_vm = start_vm,
                                                      .start_transfer = start_transfer,
                                                      .stop_transfer = stop_transfer,
                                                      .fill = fill,
                                                      .before_record = before_record,
                                                      .settled = settled,
                                                      .reconnect = reconnect,
                                                      .never_paused = never_paused,
                                                      .tick = tick,
                                                      .finish = finish};

int attempt_destination_recover(struct attempt *a, const struct journal_record *record,
                                struct vm_error **err)
{
    struct destination_part *d = &a->destination;
    Vmmig__Peer__Memory *memory = attempt_memory(record);
    vmmig__peer__prepared__init(&d->prepared_message);
    if (!memory)
        return 0;
    a->was_running = memory->was_running;
    d->socket_path = strdup(memory->socket_path);
    d->driver = memory->driver == VM_DRIVER_ATTACH ? VM_DRIVER_ATTACH : VM_DRIVER_QEMU;
    d->argv = argv_copy(memory->argv, memory->n_argv);
    vmmig__peer__memory__free_unpacked(memory, NULL);
    if (record->record == HANDOVER_REC_PREPARING)
        error_set(&a->reason, VM_ERROR_FAILED, "the agent was restarted before everything had arrived");
    return d->socket_path && d->argv ? 0 : error_nomem(err);
}

/* ---- Connections of the source ---- */

/* No attempt begins: there is no record of it, and nothing to be forgotten. */
static void refuse(struct peer_session *session, const Vmmig__Peer__Handover *prepare,
                   const struct vm_error *why)
{
    log_warn("a migration is refused", "peer=%s error=%s", log_q(peer_session_peer(session)),
             log_q(error_message(why)));
    Vmmig__Peer__Error reason = VMMIG__PEER__ERROR__INIT;
    Vmmig__Peer__Handover answer = VMMIG__PEER__HANDOVER__INIT;
    reason.kind = (char *)(uintptr_t)error_kind_name(why->kind);
    reason.message = (char *)(uintptr_t)error_message(why);
    answer.attempt = prepare->attempt;
    answer.message = HANDOVER_MSG_REFUSED;
    answer.vm = prepare->vm;
    answer.reason = &reason;
    peer_session_send(session, &answer);
}

/* One host's attempts must not fill the journal, nor take the threads that others need. */
static int check_room(struct transfer *t, const char *peer, struct vm_error **err)
{
    unsigned all = 0, its = 0;
    SCOPE_LOCK(&t->lock);
    for (const struct attempt *a = t->attempts; a; a = a->next) {
        bool from_others = a->role == &attempt_destination_role;
        all += from_others;
        its += from_others && !strcmp(a->peer_name, peer);
    }
    if (its >= ATTEMPTS_OF_HOST_MAX)
        return error_set(err, VM_ERROR_REFUSED, "%u migrations from %s are not finished here", its,
                         *peer ? peer : "such hosts");
    if (all >= ATTEMPTS_OF_HOSTS_MAX)
        return error_set(err, VM_ERROR_REFUSED, "%u migrations are not finished here", all);
    return 0;
}

/* A new attempt, from its PREPARE; m loses the message. NULL: refused, and logged. */
static struct attempt *begin(struct transfer *t, struct peer_session *session,
                             struct peer_message *m)
{
    cleanup_error struct vm_error *err = NULL;
    struct uuid id;
    memcpy(id.bytes, m->handover->attempt.data, sizeof(id.bytes));
    if (vm_name_check(m->handover->vm, &err) < 0 ||
        check_room(t, peer_session_peer(session), &err) < 0) {
        refuse(session, m->handover, err);
        return NULL;
    }
    CLEANUP(attempt)
    struct attempt *a = attempt_create(t, &attempt_destination_role, &id, m->handover->vm, &err);
    if (!a)
        return NULL;
    vmmig__peer__prepared__init(&a->destination.prepared_message);
    a->destination.prepare = m->handover;
    m->handover = NULL;
    snprintf(a->peer_name, sizeof(a->peer_name), "%s", peer_session_peer(session));
    snprintf(a->record.peer, sizeof(a->record.peer), "%s", a->peer_name);
    attempt_set_session(a, session);
    if (attempt_start_new(a, &err) < 0) {
        log_error("cannot begin an attempt", "error=%s", log_q(error_message(err)));
        return NULL;
    }
    attempt_post(a, HANDOVER_EV_MSG_PREPARE);
    return steal_ptr(&a);
}

/* Also what it cannot read. */
static bool journal_knows(struct transfer *t, const struct uuid *id)
{
    struct journal_record record;
    cleanup_error struct vm_error *missing = NULL;
    if (journal_get(t->journal, id, &record, &missing) < 0)
        return missing->kind != VM_ERROR_NOT_FOUND;
    journal_record_finish(&record);
    return true;
}

static void handle(struct transfer *t, struct peer_session *session, struct peer_message *m)
{
    struct uuid id;
    memcpy(id.bytes, m->handover->attempt.data, sizeof(id.bytes));
    CLEANUP(attempt) struct attempt *a = attempt_find(t, &id);
    if (!a && m->handover->message == HANDOVER_MSG_PREPARE && m->handover->prepare &&
        !journal_knows(t, &id)) {
        attempt_unref(begin(t, session, m));
        return;
    }
    if (!a) {
        if (m->handover->message < HANDOVER_MSG_COUNT)
            attempt_answer_stray(t, HANDOVER_DESTINATION, session, peer_session_peer(session),
                                 m->handover);
        return;
    }
    if (a->role != &attempt_destination_role || strcmp(a->peer_name, peer_session_peer(session))) {
        log_warn("message of a foreign attempt ignored", "peer=%s",
                 log_q(peer_session_peer(session)));
        return;
    }
    attempt_set_session(a, session);
    attempt_receive(a, m->handover);
}

/*
 * A source that has finished does not come back to an attempt whose last word was lost: what still
 * waits for that word asks again over the next connection from that host.
 */
static void speak_up(struct transfer *t, struct peer_session *session)
{
    SCOPE_LOCK(&t->lock);
    for (struct attempt *a = t->attempts; a; a = a->next) {
        if (a->role != &attempt_destination_role ||
            strcmp(a->peer_name, peer_session_peer(session)))
            continue;
        pthread_mutex_lock(&a->lock);
        bool waits = !a->session && a->is_settled;
        if (waits)
            a->session = peer_session_ref(session);
        pthread_mutex_unlock(&a->lock);
        if (waits)
            attempt_post(a, HANDOVER_EV_TIMER);
    }
}

void destination_serve_control(struct transfer *t, struct peer_session *session)
{
    cleanup_error struct vm_error *err = NULL;
    struct peer_message m;
    speak_up(t, session);
    while (peer_session_receive(session, INT64_MAX, t->stop, &m, &err) > 0) {
        handle(t, session, &m);
        peer_message_finish(&m);
    }
    if (err && !io_latch_is_set(t->stop))
        log_info("control connection ended", "peer=%s error=%s",
                 log_q(peer_session_peer(session)), log_q(error_message(err)));
    /* Attempts that answer here have nobody to answer to until the source comes again. */
    SCOPE_LOCK(&t->lock);
    for (struct attempt *a = t->attempts; a; a = a->next) {
        pthread_mutex_lock(&a->lock);
        if (a->session == session) {
            a->session = NULL;
            peer_session_unref(session);
        }
        pthread_mutex_unlock(&a->lock);
    }
}

/* Nothing is received any more, or yet: what is known of the reason. */
static void explain_absence(struct attempt *a, struct vm_error **err)
{
    SCOPE_LOCK(&a->lock);
    if (a->reason)
        error_propagate(err, error_copy(a->reason));
    else if (a->cancelled)
        error_set(err, VM_ERROR_CANCELLED, "cancelled there");
    else if (a->state == HANDOVER_DST_LOADED)
        error_set(err, VM_ERROR_FAILED, "the agent was restarted when everything had arrived");
}

void destination_serve_channel(struct transfer *t, struct conn *conn)
{
    cleanup_error struct vm_error *err = NULL;
    struct channel_hello hello;
    int64_t deadline = clock_mono_ns() + NSEC(5000);
    if (channel_hello_receive(conn, &hello, deadline, t->stop, &err) < 0) {
        log_warn("data connection refused", "error=%s", log_q(error_message(err)));
        return;
    }
    CLEANUP(attempt) struct attempt *a = attempt_find(t, &hello.id.attempt);
    struct receiver *r = NULL;
    if (a && a->role == &attempt_destination_role &&
        !strcmp(a->peer_name, conn_peer_name(conn))) {
        pthread_mutex_lock(&a->lock);
        r = a->destination.receiver;
        a->destination.serving += r != NULL;
        pthread_mutex_unlock(&a->lock);
        if (!r)
            explain_absence(a, &err);
    }
    if (!r) {
        if (!err)
            error_set(&err, VM_ERROR_NOT_FOUND, "the destination does not expect this migration");
        channel_hello_refuse(conn, err, deadline, t->stop, NULL);
        return;
    }
    receiver_serve(r, conn, &hello);
    SCOPE_LOCK(&a->lock);
    a->destination.serving--;
    a->destination.served_ns = clock_mono_ns();
    pthread_cond_broadcast(&a->changed);
}

/* SPDX-License-Identifier: Apache-2.0 */
#include "agent/answers.h"

#include <string.h>

/* protobuf-c's strings are not const, though packing does not change them. */
static char *word(const char *text)
{
    return (char *)(uintptr_t)text;
}

static void set_error(struct job_answer *a)
{
    const struct vm_error *e = a->status.error;
    if (!e)
        return;
    vmmig__control__error__init(&a->error);
    snprintf(a->error_text, sizeof(a->error_text), "%s", error_message(e));
    field_make_text(a->error_text, CONTROL_TEXT_MAX);
    a->error.kind = word(error_kind_name(e->kind));
    a->error.message = a->error_text;
    a->message.error = &a->error;
}

static void set_progress(struct job_answer *a)
{
    struct job_progress *p = &a->status.progress;
    Vmmig__Control__Job *m = &a->message;
    m->phase = word(job_phase_name(p->phase));
    m->phase_text = word(job_phase_text(p->phase));
    m->round = p->round;
    m->total = p->total;
    m->remaining = p->remaining;
    m->dirty_rate = p->dirty_rate;
    m->working_set = p->working_set;
    m->link_rate = p->link_rate;
    m->wire_bytes = p->wire_bytes;
    m->resent_bytes = p->resent_bytes;
    m->opaque_bytes = p->opaque_bytes;
    m->stored_bytes = p->stored_bytes;
    m->throttle_percent = p->throttle_percent;
    m->throttle_max_percent = p->throttle_max_percent;
    m->connections = p->connections;
    m->reconnects = p->reconnects;
    m->predicted_pause_ns = p->predicted_pause_ns;
    m->pause_ns = p->pause_ns;
    p->note[JOB_NOTE_MAX - 1] = 0;
    field_make_text(p->note, CONTROL_WORD_MAX);
    m->note = p->note;
    for (unsigned i = 0; i < JOB_ENC_COUNT; i++) {
        vmmig__control__pages__init(&a->pages[i]);
        a->pages[i].encoding = word(job_encoding_name(i));
        a->pages[i].pages = p->pages[i].pages;
        a->pages[i].wire_bytes = p->pages[i].wire_bytes;
        a->page_list[i] = &a->pages[i];
    }
    m->pages = a->page_list;
    m->n_pages = JOB_ENC_COUNT;
}

static void set_snapshot(struct job_answer *a)
{
    struct job_snapshot *p = &a->status.progress.snapshot;
    Vmmig__Control__SnapshotResult *m = &a->snapshot;
    if (!*p->image)
        return;
    vmmig__control__snapshot_result__init(m);
    m->image = p->image;
    m->parent = p->parent;
    m->memory_bytes = p->memory_bytes;
    m->disk_bytes = p->disk_bytes;
    m->disk_read_bytes = p->disk_read_bytes;
    m->stored_bytes = p->stored_bytes;
    m->frozen = p->frozen;
    a->message.snapshot = m;
}

/* What a job of the repository found out; kept packed, as its service said it. */
static void set_result(struct job_answer *a)
{
    const struct job_status *s = &a->status;
    if (s->result && control_unpack(VMMIG__CONTROL__TYPE__REPO_RESULT, s->result, s->result_len,
                                    &a->result, NULL) == 0)
        a->message.result = a->result.repo_result;
}

void job_answer_init(struct job_answer *a, const struct job_status *status)
{
    Vmmig__Control__Job *m = &a->message;
    a->status = *status;
    vmmig__control__job__init(m);
    m->id = (ProtobufCBinaryData){sizeof(a->status.id.bytes), a->status.id.bytes};
    m->kind = word(job_kind_name(status->kind));
    m->vm = a->status.vm;
    m->peer = a->status.peer;
    field_make_text(m->peer, ENDPOINT_TEXT_MAX);
    m->state = (Vmmig__Control__JobState)status->state;
    m->cancelling = status->cancelling;
    m->started_ns = status->started_ns;
    m->elapsed_ns = status->elapsed_ns;
    a->result = (struct control_message){0};
    set_error(a);
    set_progress(a);
    set_snapshot(a);
    set_result(a);
}

void job_answer_finish(struct job_answer *a)
{
    job_status_finish(&a->status);
    control_message_finish(&a->result);
}

static const char *run_state_name(enum guest_run_state state)
{
    switch (state) {
    case GUEST_RUNNING:
        return "running";
    case GUEST_PAUSED:
        return "paused";
    case GUEST_INCOMING:
        return "incoming";
    case GUEST_POSTMIGRATE:
        return "postmigrate";
    case GUEST_BROKEN:
        return "broken";
    }
    return "unknown";
}

/* What its VMM is, if it was ever there. */
static void set_info(struct vm_answer *a)
{
    CLEANUP(guest) struct guest *g = vm_guest(a->vm);
    if (!g)
        return;
    driver_get_info(g, &a->info);
    field_make_text(a->info.vmm, sizeof(a->info.vmm) - 1);
    field_make_text(a->info.tracking, sizeof(a->info.tracking) - 1);
    a->message.vmm = a->info.vmm;
    a->message.tracking = a->info.tracking;
}

/* What it does now: its VMM's answer, or why there is none. */
static void set_state(struct vm_answer *a, int64_t deadline_ns)
{
    Vmmig__Control__Vm *m = &a->message;
    struct guest_status status;
    cleanup_error struct vm_error *err = NULL;
    enum vm_presence presence = vm_presence(a->vm);
    m->presence = (Vmmig__Control__Presence)presence;
    m->detail = a->detail;
    vm_detail(a->vm, a->detail);
    if (presence != VM_PRESENT) {
        m->state = word(presence == VM_ENDED ? "ended" : "unreachable");
    } else if (vm_status(a->vm, deadline_ns, &status, &err) < 0) {
        m->presence = VMMIG__CONTROL__PRESENCE__UNREACHABLE;
        m->state = word("unreachable");
        snprintf(a->detail, sizeof(a->detail), "%s", error_message(err));
    } else {
        m->state = word(run_state_name(status.state));
        snprintf(a->detail, sizeof(a->detail), "%s", status.detail);
    }
    field_make_text(a->detail, sizeof(a->detail) - 1);
}

static void set_job(struct vm_answer *a, struct job_table *jobs, bool whole)
{
    struct job_status status;
    if (job_get_of_vm(jobs, a->message.vm, &status, NULL) < 0)
        return;
    if (!whole && status.state != JOB_STATE_RUNNING) {
        job_status_finish(&status);
        return;
    }
    job_answer_init(&a->job, &status);
    a->message.job = &a->job.message;
}

/* A hand-over that is not finished, if there is one. */
static void set_handover(struct vm_answer *a, struct transfer *transfer)
{
    struct transfer_state *t = &a->transfer;
    transfer_get_state(transfer, a->message.vm, t);
    if (!t->known)
        return;
    Vmmig__Control__Handover *m = &a->handover;
    vmmig__control__handover__init(m);
    m->attempt = (ProtobufCBinaryData){sizeof(t->attempt.bytes), t->attempt.bytes};
    m->state = t->state;
    m->text = t->text;
    m->peer = t->peer;
    m->in_doubt = t->in_doubt;
    m->can_here = t->can_here;
    m->can_gone = t->can_gone;
    m->settled = t->settled;
    a->message.handover = m;
}

void vm_answer_init(struct vm_answer *a, const struct agent *agent, struct vm *vm, bool whole,
                    int64_t deadline_ns)
{
    const struct vm_definition *d = vm_definition(vm);
    Vmmig__Control__Vm *m = &a->message;
    a->vm = vm;
    vmmig__control__vm__init(m);
    m->vm = word(d->name);
    m->origin = word(vm_origin_name(d->origin));
    m->driver = word(vm_driver_name(d->driver));
    m->pid = d->process.pid;
    m->since_ns = d->since_ns;
    if (whole) {
        *(d->driver == VM_DRIVER_QEMU ? &m->qmp_path : &m->socket_path) = d->socket_path;
        m->argv = d->argv;
        while (d->argv[m->n_argv])
            m->n_argv++;
    }
    set_info(a);
    set_state(a, deadline_ns);
    set_job(a, agent->jobs, whole);
    set_handover(a, agent->transfer);
}

bool vm_answer_init_arriving(struct vm_answer *a, const struct agent *agent, const char *name)
{
    Vmmig__Control__Vm *m = &a->message;
    vmmig__control__vm__init(m);
    snprintf(a->name, sizeof(a->name), "%s", name);
    m->vm = a->name;
    m->origin = word(vm_origin_name(VM_ORIGIN_RECEIVED));
    m->presence = VMMIG__CONTROL__PRESENCE__UNREACHABLE;
    m->state = word("arriving");
    set_job(a, agent->jobs, false);
    set_handover(a, agent->transfer);
    if (!m->job && (!m->handover || m->handover->settled))
        return false;
    const struct transfer_state *t = &a->transfer;
    if (t->known) {
        m->pid = t->vmm.pid;
        m->since_ns = t->started_ns;
    }
    if (t->known && t->source) { /* it was here before, and the registry does not know it any more */
        m->origin = word(vm_origin_name(VM_ORIGIN_ATTACHED));
        m->state = word("unreachable");
    }
    return true;
}

void vm_answer_finish(struct vm_answer *a)
{
    if (a->message.job)
        job_answer_finish(&a->job);
    vm_put(a->vm);
    a->vm = NULL;
}

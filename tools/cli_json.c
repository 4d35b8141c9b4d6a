/* SPDX-License-Identifier: Apache-2.0 */
#include "tools/cli_print.h"

#include "base/clock.h"
#include "base/uuid.h"

#include <string.h>

static json_t *milliseconds(int64_t ns)
{
    return ns < 0 ? json_null() : json_real((double)ns / NSEC_PER_MSEC);
}

json_t *cli_json_instant(int64_t wall_ns)
{
    char text[40], stamp[32];
    time_t seconds = (time_t)(wall_ns / NSEC_PER_SEC);
    struct tm tm;
    gmtime_r(&seconds, &tm);
    strftime(stamp, sizeof(stamp), "%Y-%m-%dT%H:%M:%S", &tm);
    snprintf(text, sizeof(text), "%s.%03dZ", stamp, (int)(wall_ns % NSEC_PER_SEC / NSEC_PER_MSEC));
    return json_string(text);
}

/* Text from the agent; a command line may hold bytes that are not UTF-8. */
static json_t *string(const char *text)
{
    json_t *exact = json_string(text);
    if (exact)
        return exact;
    char *copy = strdup(text);
    if (!copy)
        return NULL;
    field_make_text(copy, strlen(copy));
    json_t *made = json_string(copy);
    free(copy);
    return made;
}

static json_t *text_or_null(const char *text)
{
    return *text ? string(text) : json_null();
}

static json_t *number(uint64_t value)
{
    return json_integer((json_int_t)value);
}

json_t *cli_json_error(const struct vm_error *error)
{
    return json_pack("{s:{s:s, s:o}}", "error", "kind", error_kind_name(error->kind), "message",
                     string(error_message(error)));
}

static json_t *pages(const Vmmig__Control__Job *job)
{
    json_t *object = json_object();
    for (size_t i = 0; i < job->n_pages; i++)
        json_object_set_new(object, job->pages[i]->encoding,
                            json_pack("{s:o, s:o}", "pages", number(job->pages[i]->pages),
                                      "wire_bytes", number(job->pages[i]->wire_bytes)));
    return object;
}

static const char *state_name(Vmmig__Control__JobState state)
{
    switch (state) {
    case VMMIG__CONTROL__JOB_STATE__RUNNING:
        return "running";
    case VMMIG__CONTROL__JOB_STATE__DONE:
        return "done";
    case VMMIG__CONTROL__JOB_STATE__FAILED:
        return "failed";
    case VMMIG__CONTROL__JOB_STATE__CANCELLED:
        return "cancelled";
    default:
        return "?";
    }
}

static json_t *snapshot(const Vmmig__Control__SnapshotResult *s)
{
    if (!s)
        return json_null();
    return json_pack("{s:o, s:o, s:o, s:o, s:o, s:o, s:o}", "image", string(s->image), "parent",
                     *s->parent ? string(s->parent) : json_null(), "memory_bytes",
                     number(s->memory_bytes), "disk_bytes", number(s->disk_bytes),
                     "disk_read_bytes", number(s->disk_read_bytes), "stored_bytes",
                     number(s->stored_bytes), "frozen", number(s->frozen));
}

json_t *cli_json_job(const Vmmig__Control__Job *j)
{
    struct uuid id;
    memcpy(id.bytes, j->id.data, sizeof(id.bytes));
    json_t *error = j->error ? json_pack("{s:o, s:o}", "kind", string(j->error->kind), "message",
                                         string(j->error->message))
                             : json_null();
    return json_pack(
        "{s:o, s:o, s:o, s:o, s:s, s:b, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, "
        "s:o, "
        "s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o}",
        "job", string(uuid_text(&id)), "kind", string(j->kind), "vm",
        *j->vm ? string(j->vm) : json_null(), "peer", string(j->peer), "state",
        state_name(j->state), "cancelling", (int)j->cancelling, "started",
        cli_json_instant(j->started_ns), "elapsed_ms", milliseconds(j->elapsed_ns), "error", error,
        "phase", string(j->phase), "round", number(j->round), "total_bytes", number(j->total),
        "remaining_bytes", number(j->remaining), "dirty_rate", number(j->dirty_rate), "working_set_bytes",
        j->working_set ? number(j->working_set) : json_null(), "link_rate",
        number(j->link_rate), "wire_bytes", number(j->wire_bytes), "resent_bytes",
        number(j->resent_bytes), "opaque_bytes", number(j->opaque_bytes), "pages", pages(j),
        "throttle_percent", number(j->throttle_percent), "throttle_max_percent",
        number(j->throttle_max_percent), "connections", number(j->connections), "reconnects",
        number(j->reconnects), "predicted_pause_ms", milliseconds(j->predicted_pause_ns),
        "pause_ms", milliseconds(j->pause_ns), "note", string(j->note), "snapshot",
        snapshot(j->snapshot), "stored_bytes", number(j->stored_bytes));
}

json_t *cli_json_jobs(const Vmmig__Control__JobList *jobs)
{
    json_t *list = json_array();
    for (size_t i = 0; i < jobs->n_jobs; i++)
        json_array_append_new(list, cli_json_job(jobs->jobs[i]));
    return json_pack("{s:o}", "jobs", list);
}

static const char *presence_name(Vmmig__Control__Presence presence)
{
    return presence == VMMIG__CONTROL__PRESENCE__PRESENT       ? "present"
           : presence == VMMIG__CONTROL__PRESENCE__UNREACHABLE ? "unreachable"
                                                               : "ended";
}

static json_t *handover(const Vmmig__Control__Handover *h)
{
    struct uuid id;
    if (!h)
        return json_null();
    memcpy(id.bytes, h->attempt.data, sizeof(id.bytes));
    return json_pack("{s:o, s:o, s:o, s:o, s:b, s:b, s:b, s:b}", "attempt",
                     string(uuid_text(&id)), "state", string(h->state), "text", string(h->text),
                     "peer", string(h->peer), "in_doubt", (int)h->in_doubt, "can_here",
                     (int)h->can_here, "can_gone", (int)h->can_gone, "settled", (int)h->settled);
}

json_t *cli_json_vm(const Vmmig__Control__Vm *vm)
{
    json_t *argv = json_array();
    for (size_t i = 0; i < vm->n_argv; i++)
        json_array_append_new(argv, string(vm->argv[i]));
    json_t *object = json_pack(
        "{s:o, s:o, s:s, s:o, s:o, s:i, s:o, s:o, s:o, s:o, s:o, s:o}", "vm", string(vm->vm), "state",
        string(vm->state), "presence", presence_name(vm->presence), "detail", string(vm->detail),
        "origin", string(vm->origin), "pid", (int)vm->pid, "since", cli_json_instant(vm->since_ns),
        "driver", string(vm->driver), "vmm", text_or_null(vm->vmm), "tracking", text_or_null(vm->tracking), "job",
        vm->job ? cli_json_job(vm->job) : json_null(), "handover", handover(vm->handover));
    bool whole = *vm->qmp_path || *vm->socket_path;
    if (object && whole) {
        json_object_set_new(object, *vm->qmp_path ? "qmp" : "socket",
                            string(*vm->qmp_path ? vm->qmp_path : vm->socket_path));
        json_object_set(object, "argv", argv);
    }
    json_decref(argv);
    return object;
}

json_t *cli_json_vms(const Vmmig__Control__Vms *vms)
{
    json_t *list = json_array();
    for (size_t i = 0; i < vms->n_vms; i++)
        json_array_append_new(list, cli_json_vm(vms->vms[i]));
    return json_pack("{s:o}", "vms", list);
}

json_t *cli_json_agent(const Vmmig__Control__Agent *a)
{
    return json_pack("{s:o, s:o, s:i, s:o, s:o, s:o, s:o, s:o, s:o, s:o}", "software", string(a->software),
                     "host", string(a->host), "pid", (int)a->pid, "started",
                     cli_json_instant(a->started_ns), "listen", *a->listen ? string(a->listen) : json_null(), "vms",
                     number(a->n_vms), "jobs_running", number(a->n_jobs), "rss_anon_bytes",
                     number(a->rss_anon), "certificate_ends",
                     a->certificate_ends_ns ? cli_json_instant(a->certificate_ends_ns) : json_null(), "certificate",
                     *a->certificate ? string(a->certificate) : json_null());
}

static const char *owner_name(Vmmig__Control__Owner owner)
{
    static const char *const names[] = {"unknown", "here", "peer", "undecided", "nobody"};
    return names[owner];
}

static json_t *finding(const Vmmig__Control__Finding *f)
{
    struct uuid id;
    json_t *attempt = json_null();
    if (f->attempt.len) {
        memcpy(id.bytes, f->attempt.data, sizeof(id.bytes));
        attempt = string(uuid_text(&id));
    }
    return json_pack("{s:o, s:s, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:i, s:b}", "vm",
                     text_or_null(f->vm), "owner", owner_name(f->owner), "owner_host",
                     text_or_null(f->host), "why", string(f->why), "advice",
                     text_or_null(f->advice), "attempt", attempt, "role", text_or_null(f->role),
                     "record", text_or_null(f->record), "state", text_or_null(f->state), "peer",
                     text_or_null(f->peer), "changed",
                     f->changed_ns ? cli_json_instant(f->changed_ns) : json_null(), "pid", (int)f->pid,
                     "vmm_runs", (int)f->vmm_runs);
}

json_t *cli_json_diagnosis(const Vmmig__Control__Diagnosis *d)
{
    json_t *list = json_array();
    for (size_t i = 0; i < d->n_findings; i++)
        json_array_append_new(list, finding(d->findings[i]));
    return json_pack("{s:o, s:o, s:o}", "host", string(d->host), "findings", list, "certificate",
                     *d->certificate ? string(d->certificate) : json_null());
}

json_t *cli_json_faults(const Vmmig__Control__FaultPoints *points)
{
    json_t *list = json_array();
    for (size_t i = 0; i < points->n_points; i++) {
        const Vmmig__Control__FaultPoint *p = points->points[i];
        json_array_append_new(list, json_pack("{s:o, s:o, s:o, s:b}", "name", string(p->name),
                                              "armed", text_or_null(p->armed), "acted",
                                              number(p->acted), "holds", (int)p->holds));
    }
    return json_pack("{s:o}", "points", list);
}

int cli_print_json(json_t *object, struct vm_error **err)
{
    if (!object)
        return error_nomem(err);
    int failed = json_dumpf(object, stdout, JSON_INDENT(2) | JSON_REAL_PRECISION(9));
    json_decref(object);
    if (failed || putchar('\n') == EOF)
        return error_set(err, VM_ERROR_SYSTEM, "cannot write to standard output");
    return 0;
}

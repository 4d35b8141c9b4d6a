/* SPDX-License-Identifier: Apache-2.0 */
#include "tools/cli_print.h"

#include "base/clock.h"
#include "base/text.h"
#include "base/uuid.h"

#include <inttypes.h>
#include <stdarg.h>
#include <string.h>

#define PAGE_BYTES 4096

/* Seconds and milliseconds of a duration, as "12.345 s" or "87 ms". */
static const char *duration(int64_t ns, char out[32])
{
    if (ns < 0)
        snprintf(out, 32, "unknown");
    else if (ns < NSEC_PER_SEC)
        snprintf(out, 32, "%.0f ms", (double)ns / NSEC_PER_MSEC);
    else
        snprintf(out, 32, "%.1f s", (double)ns / NSEC_PER_SEC);
    return out;
}
#define duration_text(ns) duration(ns, (char[32]){0})

static const char *local_time(int64_t wall_ns, char out[40])
{
    time_t seconds = (time_t)(wall_ns / NSEC_PER_SEC);
    struct tm tm;
    localtime_r(&seconds, &tm);
    strftime(out, 40, "%Y-%m-%d %H:%M:%S", &tm);
    return out;
}
#define local_time_text(ns) local_time(ns, (char[40]){0})

/* Append to a line of limited size. */
__attribute__((format(printf, 3, 4))) static void append(char *out, size_t size, const char *fmt,
                                                         ...)
{
    size_t n = strlen(out);
    va_list args;
    va_start(args, fmt);
    vsnprintf(out + n, size - n, fmt, args);
    va_end(args);
}

static uint64_t pages_sent(const Vmmig__Control__Job *j)
{
    uint64_t n = 0;
    for (size_t i = 0; i < j->n_pages; i++)
        n += j->pages[i]->pages;
    return n;
}

/* Bytes that an encoding kept off the wire. */
static uint64_t saved_by(const Vmmig__Control__Pages *p)
{
    uint64_t plain = p->pages * PAGE_BYTES;
    return plain > p->wire_bytes ? plain - p->wire_bytes : 0;
}

/* "zero 40% same 12%", of all bytes that the pages are. */
static void append_saved(const Vmmig__Control__Job *j, char *out, size_t size, const char *between)
{
    double all = (double)pages_sent(j) * PAGE_BYTES;
    const char *before = "";
    for (size_t i = 0; i < j->n_pages; i++) {
        double percent = all > 0 ? 100 * (double)saved_by(j->pages[i]) / all : 0;
        if (percent < 0.5)
            continue;
        append(out, size, "%s%s %.0f%%", before, j->pages[i]->encoding, percent);
        before = between;
    }
}

/* What a job's total and remaining count: most count bytes. */
static const char *text_amount(const Vmmig__Control__Job *j, uint64_t n, char out[32])
{
    bool objects = !strcmp(j->kind, "gc") || !strcmp(j->kind, "rebuild-index");
    if (objects)
        snprintf(out, 32, "%" PRIu64 " object%s", n, n == 1 ? "" : "s");
    else
        snprintf(out, 32, "%s", text_size(n));
    return out;
}

/*
 * "import debian12 [#####     ]  52% of 2.0 GiB, 512 MiB/s, 6.2:1, 180 MiB stored", or
 * "gc [#####     ]  52% of 120 objects, 40 objects/s"
 */
static void format_repo_progress(const Vmmig__Control__Job *j, char *out, size_t size)
{
    enum { BAR = 10 };
    char text[32];
    uint64_t done = j->total - (j->remaining < j->total ? j->remaining : j->total);
    double part = j->total ? (double)done / (double)j->total : 0;
    append(out, size, *j->peer ? "%s %s" : "%s", j->kind, j->peer);
    if (!j->total)
        return;
    append(out, size, " [%-*.*s] %3.0f%% of %s", BAR, (int)(part * BAR), "##########", 100 * part,
           text_amount(j, j->total, text));
    if (j->elapsed_ns > NSEC_PER_SEC / 10)
        append(out, size, ", %s/s",
               text_amount(j, (uint64_t)((double)done * NSEC_PER_SEC / (double)j->elapsed_ns),
                           text));
    if (j->stored_bytes)
        append(out, size, ", %.1f:1, %s stored", (double)done / (double)j->stored_bytes,
               text_size(j->stored_bytes));
}

void cli_format_progress(const Vmmig__Control__Job *j, char *out, size_t size)
{
    *out = 0;
    if (!*j->vm) {
        format_repo_progress(j, out, size);
        return;
    }
    append(out, size, "%s", j->phase);
    if (j->round)
        append(out, size, " round %u", j->round);
    if (j->total)
        append(out, size, ", %s left", text_size(j->remaining));
    if (j->total && !j->snapshot && j->round > 1) /* in the first round nothing was looked at again */
        append(out, size, ", dirty %s/s", text_size(j->dirty_rate));
    if (j->wire_bytes)
        append(out, size, ", link %s/s", text_size(j->link_rate));
    if (j->predicted_pause_ns >= 0)
        append(out, size, ", pause ~%s", duration_text(j->predicted_pause_ns));
    if (j->throttle_percent)
        append(out, size, ", throttle %u%%", j->throttle_percent);
    if (pages_sent(j)) {
        append(out, size, ", saved ");
        size_t before = strlen(out);
        append_saved(j, out, size, " ");
        if (strlen(out) == before)
            append(out, size, "0%%");
    }
    if (*j->note)
        append(out, size, " (%s)", j->note);
}

static void print_traffic(FILE *out, const Vmmig__Control__Job *j)
{
    char saved[256] = "";
    append_saved(j, saved, sizeof(saved), ", ");
    fprintf(out, "  on the wire    %s", text_size(j->wire_bytes));
    if (j->total)
        fprintf(out, " for %s of memory", text_size(j->total));
    fprintf(out, "\n  saved          %s\n", *saved ? saved : "nothing");
    if (j->reconnects || j->resent_bytes)
        fprintf(out, "  reconnected    %u times, %s sent again\n", j->reconnects,
                text_size(j->resent_bytes));
}

/* Of a snapshot: what it is of, and what it took. */
static void print_snapshot(FILE *out, const Vmmig__Control__SnapshotResult *s)
{
    if (s->memory_bytes)
        fprintf(out, "  memory         %s\n", text_size(s->memory_bytes));
    fprintf(out, "  disks          %s", text_size(s->disk_bytes));
    if (s->disk_read_bytes < s->disk_bytes)
        fprintf(out, ", of which %s were read", text_size(s->disk_read_bytes));
    fprintf(out, "\n  stored         %s", text_size(s->stored_bytes));
    fprintf(out, *s->parent ? ", since %s\n" : "\n", s->parent);
    if (s->frozen)
        fprintf(out, "  frozen         %u file systems\n", s->frozen);
}

void cli_print_summary(FILE *out, const Vmmig__Control__Job *j)
{
    if (j->state == VMMIG__CONTROL__JOB_STATE__DONE && !strcmp(j->kind, "check"))
        fprintf(out, "%s can be sent to %s; nothing was moved\n", j->vm, j->peer);
    else if (j->state == VMMIG__CONTROL__JOB_STATE__DONE && !strcmp(j->kind, "send"))
        fprintf(out, "%s runs at %s now\n", j->vm, j->peer);
    else if (j->state == VMMIG__CONTROL__JOB_STATE__DONE && !strcmp(j->kind, "snapshot"))
        fprintf(out, "%s is stored\n", j->peer);
    else if (j->state == VMMIG__CONTROL__JOB_STATE__DONE && !strcmp(j->kind, "restore"))
        fprintf(out, "%s is restored from %s\n", j->vm, j->peer);
    else
        fprintf(out, "%s of %s: %s\n", j->kind, j->vm,
                j->state == VMMIG__CONTROL__JOB_STATE__DONE        ? "done"
                : j->state == VMMIG__CONTROL__JOB_STATE__CANCELLED ? "cancelled"
                : j->state == VMMIG__CONTROL__JOB_STATE__RUNNING   ? "under way"
                                                                   : "failed");
    fprintf(out, "  total time     %s\n", duration_text(j->elapsed_ns));
    if (j->pause_ns >= 0)
        fprintf(out, "  guest's pause  %s\n", duration_text(j->pause_ns));
    if (j->round)
        fprintf(out, "  rounds         %u\n", j->round);
    if (j->snapshot && !strcmp(j->kind, "snapshot"))
        print_snapshot(out, j->snapshot);
    if (!j->snapshot && strcmp(j->kind, "check"))
        print_traffic(out, j);
    if (j->throttle_max_percent)
        fprintf(out, "  throttled      by up to %u%%\n", j->throttle_max_percent);
    if (*j->note)
        fprintf(out, "  note           %s\n", j->note);
}

/* What is under way, in a few words. */
static void format_job(const Vmmig__Control__Job *j, char *out, size_t size)
{
    *out = 0;
    bool from = !strcmp(j->kind, "receive") || !strcmp(j->kind, "restore");
    append(out, size, "%s %s %s: %s", j->kind, from ? "from" : "to", j->peer, j->phase);
    if (j->total && !strcmp(j->phase, "copying"))
        append(out, size, ", round %u, %s left", j->round, text_size(j->remaining));
}

static void format_doing(const Vmmig__Control__Vm *vm, char *out, size_t size)
{
    *out = 0;
    if (vm->handover && vm->handover->in_doubt)
        append(out, size, "in doubt, see `vmmig status %s`", vm->vm);
    else if (vm->job && vm->job->state == VMMIG__CONTROL__JOB_STATE__RUNNING)
        format_job(vm->job, out, size);
    else if (vm->presence != VMMIG__CONTROL__PRESENCE__PRESENT)
        append(out, size, "%s", vm->detail);
}

void cli_print_vms(FILE *out, const Vmmig__Control__Vms *vms)
{
    int width = 4;
    for (size_t i = 0; i < vms->n_vms; i++)
        if ((int)strlen(vms->vms[i]->vm) > width)
            width = (int)strlen(vms->vms[i]->vm);
    if (!vms->n_vms) {
        fputs("no VMs here\n", out);
        return;
    }
    fprintf(out, "%-*s  %-11s  %7s  %s\n", width, "NAME", "STATE", "PID", "DOING");
    for (size_t i = 0; i < vms->n_vms; i++) {
        char doing[512];
        format_doing(vms->vms[i], doing, sizeof(doing));
        int n = fprintf(out, "%-*s  %-11s  %7d", width, vms->vms[i]->vm, vms->vms[i]->state,
                        vms->vms[i]->pid);
        fprintf(out, n > 0 && *doing ? "  %s\n" : "%s\n", doing);
    }
}

static void print_handover(FILE *out, const Vmmig__Control__Handover *h, const char *vm)
{
    fprintf(out, "  hand-over  with %s: %s\n", h->peer, h->text);
    if (!h->in_doubt)
        return;
    if (h->can_here)
        fprintf(out, "             if that host is gone for good, and fenced, run it here:\n"
                     "             `vmmig resolve %s --here --i-fenced HOST`\n", vm);
    if (h->can_gone)
        fprintf(out, "             to give up the copy that is here:\n"
                     "             `vmmig resolve %s --gone`\n", vm);
}

/* How a copy that is under way converges. */
static void print_copy(FILE *out, const Vmmig__Control__Job *j)
{
    if (!j->total)
        return;
    fprintf(out, "  dirty      %s/s", text_size(j->dirty_rate));
    if (j->working_set)
        fprintf(out, ", working set %s", text_size(j->working_set));
    fprintf(out, "\n  link       %s/s\n", text_size(j->link_rate));
    if (j->predicted_pause_ns >= 0)
        fprintf(out, "  pause      %s, as predicted\n", duration_text(j->predicted_pause_ns));
    if (j->throttle_percent)
        fprintf(out, "  throttled  by %u%%\n", j->throttle_percent);
    if (*j->note)
        fprintf(out, "  note       %s\n", j->note);
}

void cli_print_vm(FILE *out, const Vmmig__Control__Vm *vm)
{
    fprintf(out, "%s\n  state      %s", vm->vm, vm->state);
    fprintf(out, *vm->detail && strcmp(vm->detail, vm->state) ? " (%s)\n" : "%s\n",
            strcmp(vm->detail, vm->state) ? vm->detail : "");
    fprintf(out, "  process    %d\n  since      %s (%s)\n", vm->pid, local_time_text(vm->since_ns),
            vm->origin);
    if (*vm->qmp_path)
        fprintf(out, "  qmp        %s\n", vm->qmp_path);
    if (*vm->socket_path)
        fprintf(out, "  socket     %s\n", vm->socket_path);
    if (*vm->vmm)
        fprintf(out, "  VMM        %s, which tracks by %s\n", vm->vmm, vm->tracking);
    if (vm->handover)
        print_handover(out, vm->handover, vm->vm);
    if (!vm->job)
        return;
    char line[512];
    format_job(vm->job, line, sizeof(line));
    if (vm->job->state == VMMIG__CONTROL__JOB_STATE__RUNNING) {
        fprintf(out, "  job        %s\n", line);
        print_copy(out, vm->job);
    } else if (vm->job->error)
        fprintf(out, "  last job   %s to %s: %s\n", vm->job->kind, vm->job->peer,
                vm->job->error->message);
    else
        fprintf(out, "  last job   %s, done\n", vm->job->kind);
}

void cli_print_jobs(FILE *out, const Vmmig__Control__JobList *jobs)
{
    static const char *const states[] = {"running", "done", "failed", "cancelled"};
    if (!jobs->n_jobs)
        fputs("no jobs\n", out);
    for (size_t i = 0; i < jobs->n_jobs; i++) {
        const Vmmig__Control__Job *j = jobs->jobs[i];
        fprintf(out, "%s  %-9s  %-7s  %s", local_time_text(j->started_ns), states[j->state],
                j->kind, j->vm);
        fprintf(out, *j->peer ? (*j->vm ? "  %s" : "%s") : "%s", j->peer);
        if (!*j->vm && j->state == VMMIG__CONTROL__JOB_STATE__RUNNING) {
            struct uuid id;
            memcpy(id.bytes, j->id.data, sizeof(id.bytes));
            fprintf(out, "  %s", uuid_text(&id));
        }
        fprintf(out, j->error ? ": %s\n" : "%s\n", j->error ? j->error->message : "");
    }
}

static void print_finding(FILE *out, const Vmmig__Control__Finding *f, const char *here)
{
    const char *name = *f->vm ? f->vm : "(a damaged record)";
    switch (f->owner) {
    case VMMIG__CONTROL__OWNER__OWNER_HERE:
        fprintf(out, "%s: this host (%s) owns it\n", name, here);
        break;
    case VMMIG__CONTROL__OWNER__OWNER_PEER:
        fprintf(out, "%s: %s owns it\n", name, f->host);
        break;
    case VMMIG__CONTROL__OWNER__OWNER_UNDECIDED:
        fprintf(out, "%s: undecided between %s and %s\n", name, here, f->peer);
        break;
    case VMMIG__CONTROL__OWNER__OWNER_NOBODY:
        fprintf(out, "%s: nobody owns it\n", name);
        break;
    default:
        fprintf(out, "%s: unknown\n", name);
        break;
    }
    fputs("  why      ", out);
    text_wrap(out, f->why, 11, 11);
    if (*f->advice) {
        fputs("  to do    ", out);
        text_wrap(out, f->advice, 11, 11);
    }
    if (*f->record)
        fprintf(out, "  journal  %s, as %s of a hand-over with %s, written %s\n", f->record, f->role,
                f->peer, local_time_text(f->changed_ns));
    if (f->pid)
        fprintf(out, "  process  %d, which %s\n", f->pid, f->vmm_runs ? "runs" : "is gone");
}

void cli_print_diagnosis(FILE *out, const Vmmig__Control__Diagnosis *d)
{
    if (!d->n_findings)
        fputs("no VMs here, and none in the journal\n", out);
    for (size_t i = 0; i < d->n_findings; i++)
        print_finding(out, d->findings[i], d->host);
    if (*d->certificate)
        fprintf(out, "%s: %s\n", d->host, d->certificate);
}

void cli_print_faults(FILE *out, const Vmmig__Control__FaultPoints *points)
{
    for (size_t i = 0; i < points->n_points; i++) {
        const Vmmig__Control__FaultPoint *p = points->points[i];
        fputs(p->name, out);
        if (*p->armed)
            fprintf(out, "=%s  acted %u times%s", p->armed, p->acted, p->holds ? ", holds" : "");
        fputc('\n', out);
    }
}

void cli_print_agent(FILE *out, const Vmmig__Control__Agent *a)
{
    fprintf(out, "%s\n  agent      %s, process %d, since %s\n", a->host, a->software, a->pid,
            local_time_text(a->started_ns));
    fprintf(out, "  peers      %s\n", *a->listen ? a->listen : "none: it takes no VMs");
    if (*a->certificate)
        fprintf(out, "  NOTE       %s\n", a->certificate);
    fprintf(out, "  VMs        %u\n  jobs       %u under way\n", a->n_vms, a->n_jobs);
    fprintf(out, "  memory     %s of its own\n", text_size(a->rss_anon));
}

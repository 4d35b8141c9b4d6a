/* SPDX-License-Identifier: Apache-2.0 */
#include "proto/control.h"

#include "base/fault.h"
#include "proto/unpack.h"

#include <string.h>

static int out_of_range(const char *what, struct vm_error **err)
{
    return error_set(err, VM_ERROR_PROTOCOL, "%s is out of range", what);
}

static int check_name(const char *name, struct vm_error **err)
{
    if (vm_name_check(name, err) < 0)
        return error_set_kind(err, VM_ERROR_PROTOCOL);
    return 0;
}

static int check_word(const char *what, const char *text, struct vm_error **err)
{
    return field_check_text(what, text, 0, CONTROL_WORD_MAX, err);
}

static int check_welcome(const Vmmig__Control__Welcome *m, struct vm_error **err)
{
    if (m->version < CONTROL_VERSION_MIN || m->version > CONTROL_VERSION_MAX)
        return error_set(
            err, VM_ERROR_VERSION,
            "the agent speaks version %u of the control protocol, this command %d to %d",
            m->version, CONTROL_VERSION_MIN, CONTROL_VERSION_MAX);
    if (check_word("the software's name", m->software, err) < 0)
        return -1;
    return check_word("the host's name", m->host, err);
}

static int check_error(const Vmmig__Control__Error *m, struct vm_error **err)
{
    if (field_check_text("the kind of error", m->kind, 1, CONTROL_WORD_MAX, err) < 0)
        return -1;
    return field_check_text("the error's message", m->message, 1, CONTROL_TEXT_MAX, err);
}

static int check_run(const Vmmig__Control__Run *m, struct vm_error **err)
{
    if (check_name(m->vm, err) < 0 ||
        (*m->cwd && field_check_path("the working directory", m->cwd, err) < 0))
        return -1;
    return field_check_argv("the VM's command line", m->argv, m->n_argv, err);
}

static int check_attach(const Vmmig__Control__Attach *m, struct vm_error **err)
{
    if (check_name(m->vm, err) < 0)
        return -1;
    if (!*m->qmp_path == !*m->socket_path)
        return error_set(err, VM_ERROR_PROTOCOL,
                         "exactly one of a QMP socket and a VMM's own socket must be named");
    if (*m->socket_path)
        return field_check_path("the path of the VMM's socket", m->socket_path, err);
    return field_check_path("the path of the QMP socket", m->qmp_path, err);
}

static int check_list(const Vmmig__Control__List *m, struct vm_error **err)
{
    (void)m;
    (void)err;
    return 0;
}

static int check_status(const Vmmig__Control__Status *m, struct vm_error **err)
{
    return check_name(m->vm, err);
}

static int check_detach(const Vmmig__Control__Detach *m, struct vm_error **err)
{
    return check_name(m->vm, err);
}

static int check_info(const Vmmig__Control__Info *m, struct vm_error **err)
{
    (void)m;
    (void)err;
    return 0;
}

static int check_host(const char *what, const char *text, struct vm_error **err)
{
    struct endpoint e;
    if (endpoint_parse(text, DEFAULT_PEER_PORT, &e, err) < 0) {
        error_wrap(err, "%s", what);
        return error_set_kind(err, VM_ERROR_PROTOCOL);
    }
    return 0;
}

static int check_hello(const Vmmig__Control__Hello *m, struct vm_error **err)
{
    if (!m->version_min || m->version_min > m->version_max)
        return out_of_range("the range of versions", err);
    if (*m->agent && check_host("agent", m->agent, err) < 0)
        return -1;
    return check_word("the software's name", m->software, err);
}

static int check_send(const Vmmig__Control__Send *m, struct vm_error **err)
{
    if (check_name(m->vm, err) < 0 || check_host("the destination", m->to, err) < 0)
        return -1;
    if (m->downtime_limit_ms > CONTROL_DOWNTIME_MS_MAX)
        return out_of_range("the downtime limit", err);
    if (m->max_bandwidth &&
        (m->max_bandwidth < CONTROL_BANDWIDTH_MIN || m->max_bandwidth > CONTROL_BANDWIDTH_MAX))
        return out_of_range("the maximum bandwidth", err);
    if (m->connections > CONTROL_CONNECTIONS_MAX)
        return out_of_range("the number of connections", err);
    if ((unsigned)m->compress > VMMIG__CONTROL__COMPRESS__COMPRESS_ZSTD)
        return out_of_range("the compression", err);
    if (*m->dest_qmp && *m->dest_socket)
        return error_set(err, VM_ERROR_PROTOCOL, "two sockets of a prepared VMM are named");
    if (*m->dest_socket)
        return field_check_path("the destination VMM's socket", m->dest_socket, err);
    return *m->dest_qmp ? field_check_path("the destination's QMP socket", m->dest_qmp, err) : 0;
}

static int check_cancel(const Vmmig__Control__Cancel *m, struct vm_error **err)
{
    if (!m->job.len == !*m->vm)
        return error_set(err, VM_ERROR_PROTOCOL, "either a job or a VM is to be named");
    return m->job.len ? field_check_uuid("the job's id", m->job.data, m->job.len, err)
                      : check_name(m->vm, err);
}

static int check_resolve(const Vmmig__Control__Resolve *m, struct vm_error **err)
{
    if (check_name(m->vm, err) < 0)
        return -1;
    switch (m->verdict) {
    case VMMIG__CONTROL__VERDICT__HERE:
        return check_host("the fenced host", m->fenced_host, err);
    case VMMIG__CONTROL__VERDICT__GONE:
        return *m->fenced_host ? check_host("the fenced host", m->fenced_host, err) : 0;
    default:
        return out_of_range("the verdict", err);
    }
}

static int check_jobs(const Vmmig__Control__Jobs *m, struct vm_error **err)
{
    (void)m;
    (void)err;
    return 0;
}

static int check_watch(const Vmmig__Control__Watch *m, struct vm_error **err)
{
    bool by_id = m->job.len, by_vm = *m->vm;
    if (by_id == by_vm)
        return error_set(err, VM_ERROR_PROTOCOL, "either a job or a VM is to be named");
    if (m->interval_ms &&
        (m->interval_ms < CONTROL_INTERVAL_MS_MIN || m->interval_ms > CONTROL_INTERVAL_MS_MAX))
        return out_of_range("the interval", err);
    return by_id ? field_check_uuid("the job's id", m->job.data, m->job.len, err)
                 : check_name(m->vm, err);
}

static int check_doctor(const Vmmig__Control__Doctor *m, struct vm_error **err)
{
    return *m->vm ? check_name(m->vm, err) : 0;
}

static int check_faults(const Vmmig__Control__Faults *m, struct vm_error **err)
{
    return field_check_text("the faults", m->arm, 0, FAULT_SPEC_MAX, err);
}

static int check_finding(const Vmmig__Control__Finding *m, struct vm_error **err)
{
    if ((*m->vm && check_name(m->vm, err) < 0) ||
        (m->attempt.len &&
         field_check_uuid("the attempt", m->attempt.data, m->attempt.len, err) < 0) ||
        check_word("the role", m->role, err) < 0 || check_word("the record", m->record, err) < 0 ||
        check_word("the state", m->state, err) < 0)
        return -1;
    if ((unsigned)m->owner > VMMIG__CONTROL__OWNER__OWNER_NOBODY)
        return out_of_range("the owner", err);
    if (field_check_text("the reason", m->why, 1, CONTROL_TEXT_MAX, err) < 0 ||
        field_check_text("the advice", m->advice, 0, CONTROL_TEXT_MAX, err) < 0 ||
        field_check_text("the owner", m->host, 0, ENDPOINT_TEXT_MAX, err) < 0)
        return -1;
    return field_check_text("the peer", m->peer, 0, ENDPOINT_TEXT_MAX, err);
}

static int check_diagnosis(const Vmmig__Control__Diagnosis *m, struct vm_error **err)
{
    if (m->n_findings > CONTROL_FINDINGS_MAX)
        return out_of_range("the number of findings", err);
    for (size_t i = 0; i < m->n_findings; i++)
        if (check_finding(m->findings[i], err) < 0)
            return -1;
    return field_check_text("the complaint about a certificate", m->certificate, 0, CONTROL_TEXT_MAX, err) < 0
               ? -1
               : check_word("the host's name", m->host, err);
}

static int check_fault_points(const Vmmig__Control__FaultPoints *m, struct vm_error **err)
{
    if (m->n_points > CONTROL_FAULTS_MAX)
        return out_of_range("the number of fault points", err);
    for (size_t i = 0; i < m->n_points; i++)
        if (check_word("a fault point's name", m->points[i]->name, err) < 0 ||
            check_word("what is armed", m->points[i]->armed, err) < 0)
            return -1;
    return 0;
}

/* ---- snapshots ---- */

static int check_snapshot(const Vmmig__Control__Snapshot *m, struct vm_error **err)
{
    if (check_name(m->vm, err) < 0 || check_word("the snapshot's name", m->name, err) < 0)
        return -1;
    return *m->guest_agent
               ? field_check_path("the socket of the guest's agent", m->guest_agent, err)
               : 0;
}

static int check_snapshot_list(const Vmmig__Control__SnapshotList *m, struct vm_error **err)
{
    if (*m->vm && check_name(m->vm, err) < 0)
        return -1;
    return check_word("the snapshot", m->image, err);
}

static int check_snapshot_delete(const Vmmig__Control__SnapshotDelete *m, struct vm_error **err)
{
    return check_word("the snapshot", m->image, err);
}

static int check_snapshot_prune(const Vmmig__Control__SnapshotPrune *m, struct vm_error **err)
{
    if (check_name(m->vm, err) < 0)
        return -1;
    if (m->keep_last > CONTROL_KEEP_MAX || m->keep_daily > CONTROL_KEEP_MAX ||
        m->keep_weekly > CONTROL_KEEP_MAX)
        return out_of_range("the number to keep", err);
    return m->keep_last || m->keep_daily || m->keep_weekly
               ? 0
               : error_set(err, VM_ERROR_PROTOCOL, "nothing says how many to keep");
}

static int check_restore(const Vmmig__Control__Restore *m, struct vm_error **err)
{
    if (check_word("the snapshot", m->image, err) < 0 || (*m->as && check_name(m->as, err) < 0))
        return -1;
    return !*m->disk_dir                       ? 0
           : !strncmp(m->disk_dir, "rbd:", 4) ? field_check_text("the pool for disks", m->disk_dir, 5,
                                                                FIELD_PATH_MAX, err)
                                              : field_check_path("the folder for disks", m->disk_dir, err);
}

static int check_snapshot_info(const Vmmig__Control__SnapshotInfo *m, struct vm_error **err)
{
    if (check_word("the snapshot", m->image, err) < 0 || check_name(m->vm, err) < 0 ||
        check_word("the snapshot's name", m->name, err) < 0 ||
        check_word("the parent", m->parent, err) < 0)
        return -1;
    if (m->n_files > CONTROL_SNAPSHOTS_MAX)
        return out_of_range("the number of files", err);
    for (size_t i = 0; i < m->n_files; i++)
        if (check_word("the file", m->files[i]->name, err) < 0)
            return -1;
    return 0;
}

static int check_snapshots(const Vmmig__Control__Snapshots *m, struct vm_error **err)
{
    if (m->n_snapshots > CONTROL_SNAPSHOTS_MAX)
        return out_of_range("the number of snapshots", err);
    for (size_t i = 0; i < m->n_snapshots; i++)
        if (check_snapshot_info(m->snapshots[i], err) < 0)
            return -1;
    return 0;
}

static int check_snapshot_result(const Vmmig__Control__SnapshotResult *m, struct vm_error **err)
{
    return check_word("the snapshot", m->image, err) < 0
               ? -1
               : check_word("the parent", m->parent, err);
}

static int check_pages(const Vmmig__Control__Job *m, struct vm_error **err)
{
    if (m->n_pages > 16)
        return out_of_range("the number of encodings", err);
    for (size_t i = 0; i < m->n_pages; i++)
        if (check_word("the name of an encoding", m->pages[i]->encoding, err) < 0)
            return -1;
    return 0;
}

/* ---- the repository ---- */

static int check_repo(const Vmmig__Control__Repo *m, struct vm_error **err)
{
    if (!m->verb || (unsigned)m->verb > VMMIG__CONTROL__REPO_VERB__IMAGE_DIFF)
        return out_of_range("the verb", err);
    if (m->fence_after_ms > CONTROL_FENCE_MS_MAX)
        return out_of_range("the time after which writers are fenced", err);
    if (check_word("the image", m->image, err) < 0 || check_word("the image", m->other, err) < 0 ||
        check_word("the file", m->file, err) < 0 || check_word("the parent", m->parent, err) < 0 ||
        check_word("the data pool", m->data_pool, err) < 0 ||
        field_check_text("the path", m->path, 0, FIELD_PATH_MAX, err) < 0)
        return -1;
    return field_check_text("the URL", m->to, 0, FIELD_PATH_MAX, err);
}

static int check_image(const Vmmig__Control__Image *m, struct vm_error **err)
{
    if (check_word("the image", m->name, err) < 0 || check_word("the parent", m->parent, err) < 0)
        return -1;
    if (m->n_files > CONTROL_PARTS_MAX)
        return out_of_range("the number of files", err);
    for (size_t i = 0; i < m->n_files; i++)
        if (check_word("the file", m->files[i]->name, err) < 0)
            return -1;
    return 0;
}

static int check_sizes(const Vmmig__Control__ImageSizes *m, struct vm_error **err)
{
    if (m->n_sharers_shown > CONTROL_PARTS_MAX)
        return out_of_range("the number of sharers", err);
    for (size_t i = 0; i < m->n_sharers_shown; i++)
        if (check_word("the image", m->sharers_shown[i]->name, err) < 0)
            return -1;
    return 0;
}

static int check_repo_stat(const Vmmig__Control__RepoStat *m, struct vm_error **err)
{
    if (field_check_uuid("the repository's id", m->uuid.data, m->uuid.len, err) < 0)
        return -1;
    if (check_word("the holder", m->oldest_lease_holder, err) < 0 ||
        check_word("the image", m->oldest_lease_image, err) < 0)
        return -1;
    return field_check_text("the URL", m->url, 0, FIELD_PATH_MAX, err);
}

static int check_repo_result(const Vmmig__Control__RepoResult *m, struct vm_error **err)
{
    if (m->n_images > CONTROL_PARTS_MAX || m->n_stretches > CONTROL_PARTS_MAX ||
        m->n_counts > CONTROL_PARTS_MAX || m->n_findings > CONTROL_PARTS_MAX)
        return out_of_range("the number of parts", err);
    if ((m->stat && check_repo_stat(m->stat, err) < 0) ||
        (m->sizes && check_sizes(m->sizes, err) < 0))
        return -1;
    for (size_t i = 0; i < m->n_images; i++)
        if (check_image(m->images[i], err) < 0)
            return -1;
    for (size_t i = 0; i < m->n_stretches; i++)
        if (check_word("the file", m->stretches[i]->file, err) < 0)
            return -1;
    for (size_t i = 0; i < m->n_counts; i++)
        if (check_word("the count", m->counts[i]->name, err) < 0)
            return -1;
    for (size_t i = 0; i < m->n_findings; i++)
        if (field_check_text("the finding", m->findings[i]->what, 0, CONTROL_TEXT_MAX, err) < 0)
            return -1;
    return 0;
}

static int check_job(const Vmmig__Control__Job *m, struct vm_error **err)
{
    if (field_check_uuid("the job's id", m->id.data, m->id.len, err) < 0 ||
        (*m->vm && check_name(m->vm, err) < 0) ||
        check_word("the job's kind", m->kind, err) < 0 ||
        field_check_text("the peer", m->peer, 0, ENDPOINT_TEXT_MAX, err) < 0 ||
        check_word("the job's phase", m->phase, err) < 0 ||
        check_word("the job's phase", m->phase_text, err) < 0 ||
        check_word("the job's note", m->note, err) < 0)
        return -1;
    if ((unsigned)m->state > VMMIG__CONTROL__JOB_STATE__CANCELLED)
        return out_of_range("the job's state", err);
    if ((m->error && check_error(m->error, err) < 0) ||
        (m->result && check_repo_result(m->result, err) < 0))
        return -1;
    if (m->snapshot && check_snapshot_result(m->snapshot, err) < 0)
        return -1;
    return check_pages(m, err);
}

static int check_handover(const Vmmig__Control__Handover *m, struct vm_error **err)
{
    if (field_check_uuid("the attempt", m->attempt.data, m->attempt.len, err) < 0 ||
        check_word("the hand-over's state", m->state, err) < 0 ||
        check_word("the hand-over's state", m->text, err) < 0)
        return -1;
    return field_check_text("the peer", m->peer, 0, ENDPOINT_TEXT_MAX, err);
}

static int check_vm(const Vmmig__Control__Vm *m, struct vm_error **err)
{
    if (check_name(m->vm, err) < 0 || check_word("the VM's origin", m->origin, err) < 0 ||
        check_word("the VM's state", m->state, err) < 0 ||
        field_check_text("the VM's detail", m->detail, 0, CONTROL_TEXT_MAX, err) < 0)
        return -1;
    if ((unsigned)m->presence > VMMIG__CONTROL__PRESENCE__ENDED)
        return out_of_range("the VM's presence", err);
    if ((*m->qmp_path && field_check_path("the QMP socket", m->qmp_path, err) < 0) ||
        (*m->socket_path && field_check_path("the VMM's socket", m->socket_path, err) < 0) ||
        (*m->driver && check_word("the VM's driver", m->driver, err) < 0) ||
        field_check_text("the VMM's name", m->vmm, 0, CONTROL_TEXT_MAX, err) < 0 ||
        field_check_text("the VMM's tracking", m->tracking, 0, CONTROL_WORD_MAX, err) < 0)
        return -1;
    if (m->n_argv && field_check_argv("the VM's command line", m->argv, m->n_argv, err) < 0)
        return -1;
    if (m->handover && check_handover(m->handover, err) < 0)
        return -1;
    return m->job ? check_job(m->job, err) : 0;
}

static int check_vms(const Vmmig__Control__Vms *m, struct vm_error **err)
{
    if (m->n_vms > CONTROL_VMS_MAX)
        return out_of_range("the number of VMs", err);
    for (size_t i = 0; i < m->n_vms; i++)
        if (check_vm(m->vms[i], err) < 0)
            return -1;
    return 0;
}

static int check_agent(const Vmmig__Control__Agent *m, struct vm_error **err)
{
    if (check_word("the software's name", m->software, err) < 0 ||
        check_word("the host's name", m->host, err) < 0)
        return -1;
    return field_check_text("the agent's address", m->listen, 0, ENDPOINT_TEXT_MAX, err) < 0
               ? -1
               : field_check_text("the complaint about a certificate", m->certificate, 0, CONTROL_TEXT_MAX, err);
}

static int check_job_list(const Vmmig__Control__JobList *m, struct vm_error **err)
{
    if (m->n_jobs > CONTROL_JOBS_MAX)
        return out_of_range("the number of jobs", err);
    for (size_t i = 0; i < m->n_jobs; i++)
        if (check_job(m->jobs[i], err) < 0)
            return -1;
    return 0;
}

static int check_ok(const Vmmig__Control__Ok *m, struct vm_error **err)
{
    (void)m;
    (void)err;
    return 0;
}

/* Names of images and templates; the repository knows their rules. */
static int check_ref(const char *what, const char *name, struct vm_error **err)
{
    return field_check_text(what, name, 1, CONTROL_WORD_MAX, err);
}

static int check_template_publish(const Vmmig__Control__TemplatePublish *m, struct vm_error **err)
{
    return check_ref("the snapshot", m->image, err) < 0
               ? -1
               : check_ref("the template", m->template_, err);
}

static int check_template_list(const Vmmig__Control__TemplateList *m, struct vm_error **err)
{
    return check_word("the template", m->after, err);
}

static int check_template_show(const Vmmig__Control__TemplateShow *m, struct vm_error **err)
{
    return check_ref("the template", m->template_, err);
}

static int check_template_delete(const Vmmig__Control__TemplateDelete *m, struct vm_error **err)
{
    return check_ref("the template", m->template_, err);
}

static int check_clone(const Vmmig__Control__Clone *m, struct vm_error **err)
{
    if (check_ref("the template", m->template_, err) < 0 || check_name(m->as, err) < 0)
        return -1;
    if (m->count > CONTROL_CLONES_MAX)
        return out_of_range("the number of clones", err);
    if (m->n_sets > CONTROL_SETTINGS_MAX)
        return out_of_range("the number of settings", err);
    for (size_t i = 0; i < m->n_sets; i++)
        if (field_check_text("a setting", m->sets[i]->key, 1, CONTROL_WORD_MAX, err) < 0 ||
            field_check_text("a setting", m->sets[i]->value, 1, CONTROL_WORD_MAX, err) < 0)
            return -1;
    return 0;
}

static int check_mount(const Vmmig__Control__Mount *m, struct vm_error **err)
{
    return field_check_path("the folder", m->dir, err);
}

static int check_unmount(const Vmmig__Control__Unmount *m, struct vm_error **err)
{
    return field_check_path("the folder", m->dir, err);
}

static int check_templates(const Vmmig__Control__Templates *m, struct vm_error **err)
{
    if (m->n_templates > CONTROL_TEMPLATES_MAX)
        return out_of_range("the number of templates", err);
    for (size_t i = 0; i < m->n_templates; i++) {
        const Vmmig__Control__TemplateInfo *t = m->templates[i];
        const char *const words[] = {t->template_, t->name, t->tag, t->digest, t->source};
        for (size_t k = 0; k < sizeof(words) / sizeof(*words); k++)
            if (check_word("a template", words[k], err) < 0)
                return -1;
    }
    return 0;
}

static int check_clones(const Vmmig__Control__Clones *m, struct vm_error **err)
{
    if (m->n_clones > CONTROL_CLONES_MAX)
        return out_of_range("the number of clones", err);
    for (size_t i = 0; i < m->n_clones; i++) {
        const Vmmig__Control__CloneInfo *c = m->clones[i];
        if (check_name(c->vm, err) < 0 || check_word("the template", c->template_, err) < 0)
            return -1;
        if (c->n_notes > CONTROL_SETTINGS_MAX)
            return out_of_range("the number of notes", err);
        for (size_t k = 0; k < c->n_notes; k++)
            if (field_check_text("a note", c->notes[k], 1, CONTROL_TEXT_MAX, err) < 0)
                return -1;
    }
    return 0;
}

static int check_mounted(const Vmmig__Control__Mounted *m, struct vm_error **err)
{
    if (field_check_path("the folder", m->dir, err) < 0)
        return -1;
    return field_check_text("the repository", m->repository, 1, CONTROL_TEXT_MAX, err);
}

/* The table calls each check through one type. */
#define X(id, member, Name, request)                                                               \
    static int check_any_##member(const ProtobufCMessage *m, struct vm_error **err)                \
    {                                                                                              \
        return check_##member((const Vmmig__Control__##Name *)m, err);                             \
    }
CONTROL_MESSAGES(X)
#undef X

static const struct kind {
    unsigned type;
    const char *name;
    const ProtobufCMessageDescriptor *descriptor;
    int (*check)(const ProtobufCMessage *m, struct vm_error **err);
    bool request;
} kinds[] = {
#define X(id, member, Name, request)                                                               \
    {VMMIG__CONTROL__TYPE__##id, #id, &vmmig__control__##member##__descriptor,                     \
     check_any_##member, request},
    CONTROL_MESSAGES(X)
#undef X
};

static const struct kind *find_kind(unsigned type)
{
    for (size_t i = 0; i < sizeof(kinds) / sizeof(*kinds); i++)
        if (kinds[i].type == type)
            return &kinds[i];
    return NULL;
}

int control_check(unsigned type, const ProtobufCMessage *message, struct vm_error **err)
{
    const struct kind *k = find_kind(type);
    if (!k)
        return error_set(err, VM_ERROR_VERSION, "the control protocol has no message %u here",
                         type);
    if (k->check(message, err) < 0)
        return error_wrap(err, "message %s", k->name);
    return 0;
}

int control_unpack(unsigned type, const void *data, size_t len, struct control_message *ret_message,
                   struct vm_error **err)
{
    const struct kind *k = find_kind(type);
    if (!k)
        return control_check(type, NULL, err);
    ProtobufCMessage *m = unpack_message(k->descriptor, data, len);
    if (!m)
        return error_set(err, VM_ERROR_PROTOCOL, "message %s is malformed", k->name);
    if (control_check(type, m, err) < 0) {
        protobuf_c_message_free_unpacked(m, NULL);
        return -1;
    }
    ret_message->type = type;
    ret_message->any = m;
    return 0;
}

void control_message_finish(struct control_message *m)
{
    if (m->any)
        protobuf_c_message_free_unpacked(m->any, NULL);
    *m = (struct control_message){0};
}

const char *control_type_name(unsigned type)
{
    const struct kind *k = find_kind(type);
    return k ? k->name : "?";
}

bool control_type_is_request(unsigned type)
{
    const struct kind *k = find_kind(type);
    return k && k->request;
}

unsigned control_version_choose(const Vmmig__Control__Hello *hello)
{
    unsigned version =
        hello->version_max < CONTROL_VERSION_MAX ? hello->version_max : CONTROL_VERSION_MAX;
    return version >= hello->version_min && version >= CONTROL_VERSION_MIN ? version : 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
#include "agent/requests.h"

#include "agent/answers.h"
#include "agent/clones.h"
#include "agent/doctor.h"
#include "agent/driver.h"
#include "agent/repo_requests.h"
#include "agent/snapshots.h"
#include "agent/transfer.h"
#include "base/clock.h"
#include "base/fault.h"
#include "base/io.h"
#include "base/log.h"

#include <string.h>

enum { KILL_TIMEOUT_MS = 10000, WATCH_INTERVAL_MS = 1000 };

static int reply_job_of(struct control_session *s, struct job_status *status,
                        struct vm_error **err)
{
    cleanup_job_answer struct job_answer a = {0};
    job_answer_init(&a, status);
    return control_reply(s, VMMIG__CONTROL__TYPE__JOB, &a.message.base, err);
}

static int reply_vm(struct control_session *s, const char *name, struct vm_error **err)
{
    struct agent *agent = control_agent(s);
    struct vm *vm = vms_get(agent->vms, name, err);
    if (!vm)
        return -1;
    cleanup_vm_answer struct vm_answer a = {0};
    vm_answer_init(&a, agent, vm, true, clock_mono_ns() + ANSWER_VMM_TIMEOUT_NS);
    return control_reply(s, VMMIG__CONTROL__TYPE__VM, &a.message.base, err);
}

/* The VM is ours to keep; if that fails, end what we started, leave what we found. */
static int keep(struct agent *agent, struct vm_definition *d, struct guest *guest,
                struct vm_error **err)
{
    CLEANUP(guest) struct guest *owned = guest;
    if (vms_add(agent->vms, d, &owned, err) == 0)
        return 0;
    if (d->origin == VM_ORIGIN_RUN)
        guest_kill(owned, KILL_TIMEOUT_MS, NULL);
    return -1;
}

static int run_claimed(struct control_session *s, const Vmmig__Control__Run *m,
                       struct vm_error **err)
{
    struct agent *agent = control_agent(s);
    cleanup_vm_definition struct vm_definition d = {0};
    struct guest *guest;
    cleanup_free char **argv = calloc(m->n_argv + 1, sizeof(*argv));
    if (!argv)
        return error_nomem(err);
    memcpy(argv, m->argv, m->n_argv * sizeof(*argv));
    if (vms_check_free(agent->vms, m->vm, err) < 0 ||
        driver_run(agent->config, m->vm, argv, m->cwd, &d, &guest, err) < 0 ||
        keep(agent, &d, guest, err) < 0)
        return -1;
    log_info("started a VM", "vm=%s pid=%d", m->vm, d.process.pid);
    return reply_vm(s, m->vm, err);
}

static int handle_run(struct control_session *s, const struct control_message *m,
                      struct vm_error **err)
{
    struct job_table *jobs = control_agent(s)->jobs;
    if (job_claim(jobs, m->run->vm, "run", err) < 0)
        return -1;
    int r = run_claimed(s, m->run, err);
    job_release(jobs, m->run->vm);
    return r;
}

static int attach_claimed(struct control_session *s, const Vmmig__Control__Attach *m,
                          struct vm_error **err)
{
    struct agent *agent = control_agent(s);
    cleanup_vm_definition struct vm_definition d = {0};
    struct guest *guest;
    enum vm_driver driver = *m->socket_path ? VM_DRIVER_ATTACH : VM_DRIVER_QEMU;
    const char *path = *m->socket_path ? m->socket_path : m->qmp_path;
    if (vms_check_free(agent->vms, m->vm, err) < 0 ||
        driver_adopt(driver, m->vm, path, &d, &guest, err) < 0 || keep(agent, &d, guest, err) < 0)
        return -1;
    log_info("attached a VM", "vm=%s pid=%d", m->vm, d.process.pid);
    return reply_vm(s, m->vm, err);
}

static int handle_attach(struct control_session *s, const struct control_message *m,
                         struct vm_error **err)
{
    struct job_table *jobs = control_agent(s)->jobs;
    if (job_claim(jobs, m->attach->vm, "attach", err) < 0)
        return -1;
    int r = attach_claimed(s, m->attach, err);
    job_release(jobs, m->attach->vm);
    return r;
}

/* The answer to LIST while it grows. */
struct vm_list {
    const struct agent *agent;
    struct vm_answer *answers;
    Vmmig__Control__Vm **messages;
    unsigned n, max;
};

static bool is_in_list(const struct vm_list *l, const char *name)
{
    for (unsigned i = 0; i < l->n; i++)
        if (!strcmp(l->messages[i]->vm, name))
            return true;
    return false;
}

/* Names of VMs that are arriving; bounded, since the job table must not be called while it is
 * walked. */
struct arriving {
    char names[CONFIG_JOBS_MAX][VM_NAME_MAX + 1];
    unsigned n;
};

static void note_arriving(const struct job_status *status, void *arg)
{
    struct arriving *a = arg;
    if (status->state == JOB_STATE_RUNNING && status->kind == JOB_RECEIVE && a->n < CONFIG_JOBS_MAX)
        strcpy(a->names[a->n++], status->vm);
}

static void add_arriving(struct vm_list *l)
{
    struct arriving arriving = {.n = 0};
    job_each(l->agent->jobs, note_arriving, &arriving);
    for (unsigned i = 0; i < arriving.n && l->n < l->max; i++)
        if (!is_in_list(l, arriving.names[i]) &&
            vm_answer_init_arriving(&l->answers[l->n], l->agent, arriving.names[i])) {
            l->messages[l->n] = &l->answers[l->n].message;
            l->n++;
        }
}

static int handle_list(struct control_session *s, const struct control_message *m,
                       struct vm_error **err)
{
    const struct agent *agent = control_agent(s);
    struct vm **vms;
    unsigned n;
    (void)m;
    if (vms_list(agent->vms, &vms, &n, err) < 0)
        return -1;
    unsigned max = n + CONFIG_JOBS_MAX < CONTROL_VMS_MAX ? n + CONFIG_JOBS_MAX : CONTROL_VMS_MAX;
    cleanup_free struct vm_answer *answers = calloc(max, sizeof(*answers));
    cleanup_free Vmmig__Control__Vm **messages = calloc(max, sizeof(*messages));
    struct vm_list list = {agent, answers, messages, 0, answers && messages ? max : 0};
    for (unsigned i = 0; i < n; i++)
        if (vm_presence(vms[i]) == VM_PRESENT)
            vm_ask(vms[i]);
    int64_t deadline_ns = clock_mono_ns() + ANSWER_VMM_TIMEOUT_NS;
    for (unsigned i = 0; i < n; i++) {
        if (list.n == list.max) {
            vm_put(vms[i]);
            continue;
        }
        vm_answer_init(&answers[list.n], agent, vms[i], false, deadline_ns);
        messages[list.n] = &answers[list.n].message;
        list.n++;
    }
    free(vms);
    if (!list.max)
        return error_nomem(err);
    add_arriving(&list);
    Vmmig__Control__Vms answer = VMMIG__CONTROL__VMS__INIT;
    answer.vms = messages;
    answer.n_vms = list.n;
    int r = control_reply(s, VMMIG__CONTROL__TYPE__VMS, &answer.base, err);
    for (unsigned i = 0; i < list.n; i++)
        vm_answer_finish(&answers[i]);
    return r;
}

/* Where a VM that is not here any more went, for the error's text. */
static int explain_absence(struct job_table *jobs, const char *name, struct vm_error **err)
{
    cleanup_job_status struct job_status status = {0};
    if (job_get_of_vm(jobs, name, &status, NULL) == 0 && status.kind == JOB_SEND &&
        status.state == JOB_STATE_DONE && err && *err && (*err)->kind == VM_ERROR_NOT_FOUND) {
        error_clear(err);
        return error_set(err, VM_ERROR_NOT_FOUND, "VM %s is not here any more: it was sent to %s",
                         name, status.peer);
    }
    return -1;
}

static int handle_status(struct control_session *s, const struct control_message *m,
                         struct vm_error **err)
{
    struct agent *agent = control_agent(s);
    cleanup_error struct vm_error *failure = NULL;
    if (reply_vm(s, m->status->vm, &failure) == 0)
        return 0;
    cleanup_vm_answer struct vm_answer a = {0};
    if (failure->kind == VM_ERROR_NOT_FOUND && vm_answer_init_arriving(&a, agent, m->status->vm))
        return control_reply(s, VMMIG__CONTROL__TYPE__VM, &a.message.base, err);
    error_propagate(err, steal_ptr(&failure));
    return explain_absence(agent->jobs, m->status->vm, err);
}

static int detach_claimed(struct control_session *s, const char *name, struct vm_error **err)
{
    struct agent *agent = control_agent(s);
    struct vm *vm = vms_get(agent->vms, name, err);
    if (!vm)
        return explain_absence(agent->jobs, name, err);
    cleanup_vm_answer struct vm_answer a = {0};
    vm_answer_init(&a, agent, vm, true, clock_mono_ns() + ANSWER_VMM_TIMEOUT_NS);
    if (transfer_check_free(agent->transfer, name, err) < 0 ||
        vms_remove(agent->vms, name, err) < 0)
        return -1;
    /* The socket of a VMM that the agent started would otherwise be left for ever. */
    if (vm_presence(vm) == VM_ENDED)
        driver_remove_socket(vm_definition(vm));
    log_info("detached a VM", "vm=%s", name);
    return control_reply(s, VMMIG__CONTROL__TYPE__VM, &a.message.base, err);
}

static int handle_detach(struct control_session *s, const struct control_message *m,
                         struct vm_error **err)
{
    struct job_table *jobs = control_agent(s)->jobs;
    if (job_claim(jobs, m->detach->vm, "detach", err) < 0)
        return -1;
    int r = detach_claimed(s, m->detach->vm, err);
    job_release(jobs, m->detach->vm);
    return r;
}

/* Memory of its own, without guests' memory that it maps; 0 if the kernel does not say. */
static uint64_t read_rss_anon(void)
{
    cleanup_free char *text = NULL;
    unsigned long kib = 0;
    if (io_read_file("/proc/self/status", 1 << 16, &text, NULL, NULL) < 0)
        return 0;
    const char *line = strstr(text, "RssAnon:");
    return line && sscanf(line, "RssAnon: %lu kB", &kib) == 1 ? (uint64_t)kib << 10 : 0;
}

static void count_running(const struct job_status *status, void *arg)
{
    *(unsigned *)arg += status->state == JOB_STATE_RUNNING;
}

static int handle_info(struct control_session *s, const struct control_message *m,
                       struct vm_error **err)
{
    struct agent *agent = control_agent(s);
    char software[] = "vmmig " VMMIG_VERSION, empty[] = "";
    struct vm **list;
    unsigned n, running = 0;
    (void)m;
    if (vms_list(agent->vms, &list, &n, err) < 0)
        return -1;
    for (unsigned i = 0; i < n; i++)
        vm_put(list[i]);
    free(list);
    job_each(agent->jobs, count_running, &running);
    char listen[ENDPOINT_TEXT_MAX + 1];
    Vmmig__Control__Agent a = VMMIG__CONTROL__AGENT__INIT;
    a.software = software;
    a.host = agent->config->host;
    a.pid = getpid();
    a.started_ns = agent->started_ns;
    endpoint_format(&agent->config->listen, listen);
    a.listen = *agent->config->listen.host ? listen : empty;
    a.n_vms = n;
    a.n_jobs = running;
    a.rss_anon = read_rss_anon();
    char certificate[CONN_COMPLAINT_MAX];
    int64_t end;
    transfer_complain(agent->transfer, certificate, &end);
    a.certificate = certificate;
    a.certificate_ends_ns = end * NSEC_PER_SEC;
    return control_reply(s, VMMIG__CONTROL__TYPE__AGENT, &a.base, err);
}

static enum policy_compress compress_of(Vmmig__Control__Compress compress)
{
    switch (compress) {
    case VMMIG__CONTROL__COMPRESS__COMPRESS_NONE:
        return POLICY_NONE;
    case VMMIG__CONTROL__COMPRESS__COMPRESS_LZ4:
        return POLICY_LZ4;
    case VMMIG__CONTROL__COMPRESS__COMPRESS_ZSTD:
        return POLICY_ZSTD;
    default:
        return POLICY_AUTO;
    }
}

static int handle_send(struct control_session *s, const struct control_message *m,
                       struct vm_error **err)
{
    struct agent *agent = control_agent(s);
    struct uuid id;
    struct job_status status;
    struct transfer_params params = {
        .vm = m->send->vm,
        .to = m->send->to,
        .downtime_limit_ms = m->send->downtime_limit_ms,
        .max_bandwidth = m->send->max_bandwidth,
        .connections = m->send->connections,
        .compress = compress_of(m->send->compress),
        .dest_socket = *m->send->dest_socket ? m->send->dest_socket : m->send->dest_qmp,
        .dest_driver = *m->send->dest_socket ? VM_DRIVER_ATTACH : VM_DRIVER_QEMU,
        .assume_shared = m->send->assume_shared,
        .check = m->send->check,
    };
    /* An unknown VM is said now, not by a job that fails. */
    CLEANUP(vm) struct vm *vm = vms_get_present(agent->vms, m->send->vm, err);
    if (!vm)
        return explain_absence(agent->jobs, m->send->vm, err);
    if (transfer_send(agent->transfer, &params, &id, err) < 0 ||
        job_get(agent->jobs, &id, &status, err) < 0)
        return -1;
    return reply_job_of(s, &status, err);
}

static int handle_resolve(struct control_session *s, const struct control_message *m,
                          struct vm_error **err)
{
    struct agent *agent = control_agent(s);
    bool here = m->resolve->verdict == VMMIG__CONTROL__VERDICT__HERE;
    if (transfer_resolve(agent->transfer, m->resolve->vm, here, m->resolve->fenced_host, err) < 0)
        return -1;
    log_warn("an operator decided a hand-over", "vm=%s verdict=%s fenced=%s", m->resolve->vm,
             here ? "here" : "gone", log_q(m->resolve->fenced_host));
    Vmmig__Control__Ok done = VMMIG__CONTROL__OK__INIT;
    return control_reply(s, VMMIG__CONTROL__TYPE__OK, &done.base, err);
}

/* There is no job of that VM, as the error says: perhaps it is being cloned. */
static int cancel_claim(struct control_session *s, const char *name, struct vm_error **err)
{
    struct agent *agent = control_agent(s);
    Vmmig__Control__Ok done = VMMIG__CONTROL__OK__INIT;
    error_clear(err);
    if (job_cancel_claim(agent->jobs, name, err) == 0)
        return control_reply(s, VMMIG__CONTROL__TYPE__OK, &done.base, err);
    CLEANUP(vm) struct vm *vm = vms_get(agent->vms, name, NULL);
    if (vm || (*err)->kind != VM_ERROR_NOT_FOUND)
        return -1;
    error_clear(err);
    return error_set(err, VM_ERROR_NOT_FOUND, "there is no VM named %s here", name);
}

static int handle_cancel(struct control_session *s, const struct control_message *m,
                         struct vm_error **err)
{
    struct agent *agent = control_agent(s);
    const char *name = m->cancel->vm;
    struct uuid id;
    struct job_status status;
    if (m->cancel->job.len) {
        memcpy(id.bytes, m->cancel->job.data, sizeof(id.bytes));
        if (job_cancel_id(agent->jobs, &id, err) < 0 ||
            job_get(agent->jobs, &id, &status, err) < 0)
            return -1;
        return reply_job_of(s, &status, err);
    }
    if (job_cancel(agent->jobs, name, &id, err) < 0)
        return (*err)->kind == VM_ERROR_NOT_FOUND ? cancel_claim(s, name, err) : -1;
    if (job_get(agent->jobs, &id, &status, err) < 0)
        return -1;
    return reply_job_of(s, &status, err);
}

static int handle_doctor(struct control_session *s, const struct control_message *m,
                         struct vm_error **err)
{
    cleanup_diagnosis struct diagnosis d = {0};
    if (doctor_examine(control_agent(s), m->doctor->vm, &d, err) < 0)
        return -1;
    return control_reply(s, VMMIG__CONTROL__TYPE__DIAGNOSIS, &d.message.base, err);
}

struct fault_list_answer {
    Vmmig__Control__FaultPoint points[CONTROL_FAULTS_MAX];
    Vmmig__Control__FaultPoint *list[CONTROL_FAULTS_MAX];
    char armed[CONTROL_FAULTS_MAX][sizeof(((struct fault_point *)0)->armed)];
    size_t n;
};

static void add_point(const struct fault_point *p, void *arg)
{
    struct fault_list_answer *a = arg;
    if (a->n == CONTROL_FAULTS_MAX)
        return;
    Vmmig__Control__FaultPoint *m = a->list[a->n] = &a->points[a->n];
    vmmig__control__fault_point__init(m);
    strcpy(a->armed[a->n], p->armed);
    m->name = (char *)(uintptr_t)p->name;
    m->armed = a->armed[a->n++];
    m->acted = p->acted;
    m->holds = p->holds;
}

static int handle_faults(struct control_session *s, const struct control_message *m,
                         struct vm_error **err)
{
    cleanup_free struct fault_list_answer *a = calloc(1, sizeof(*a));
    if (!a)
        return error_nomem(err);
    if ((m->faults->set && fault_arm(m->faults->arm, err) < 0) ||
        fault_list(add_point, a, err) < 0)
        return -1;
    Vmmig__Control__FaultPoints answer = VMMIG__CONTROL__FAULT_POINTS__INIT;
    answer.points = a->list;
    answer.n_points = a->n;
    return control_reply(s, VMMIG__CONTROL__TYPE__FAULT_POINTS, &answer.base, err);
}

struct job_list {
    struct job_answer *answers;
    Vmmig__Control__Job **messages;
    unsigned n;
};

static void add_to_list(const struct job_status *status, void *arg)
{
    struct job_list *list = arg;
    if (list->n == CONTROL_JOBS_MAX)
        return;
    struct job_status own = *status; /* the visitor's error is not ours */
    own.error = status->error ? error_copy(status->error) : NULL;
    own.result = NULL; /* WATCH tells it */
    job_answer_init(&list->answers[list->n], &own);
    list->messages[list->n] = &list->answers[list->n].message;
    list->n++;
}

static int handle_jobs(struct control_session *s, const struct control_message *m,
                       struct vm_error **err)
{
    (void)m;
    cleanup_free struct job_answer *answers = calloc(CONTROL_JOBS_MAX, sizeof(*answers));
    cleanup_free Vmmig__Control__Job **messages = calloc(CONTROL_JOBS_MAX, sizeof(*messages));
    if (!answers || !messages)
        return error_nomem(err);
    struct job_list list = {answers, messages, 0};
    job_each(control_agent(s)->jobs, add_to_list, &list);
    Vmmig__Control__JobList answer = VMMIG__CONTROL__JOB_LIST__INIT;
    answer.jobs = messages;
    answer.n_jobs = list.n;
    int r = control_reply(s, VMMIG__CONTROL__TYPE__JOB_LIST, &answer.base, err);
    for (unsigned i = 0; i < list.n; i++)
        job_answer_finish(&answers[i]);
    return r;
}

/* Report the job until it ended. */
static int watch(struct control_session *s, const struct uuid *id, int64_t interval_ns,
                 struct vm_error **err)
{
    struct job_table *jobs = control_agent(s)->jobs;
    for (;;) {
        struct job_status status;
        if (job_get(jobs, id, &status, err) < 0)
            return -1;
        bool ended = status.state != JOB_STATE_RUNNING;
        if (reply_job_of(s, &status, err) < 0)
            return -1;
        if (ended)
            return 0;
        cleanup_error struct vm_error *not_yet = NULL;
        if (job_wait(jobs, id, clock_mono_ns() + interval_ns, control_stop_fd(s), &not_yet) == 0)
            continue;
        if (not_yet->kind == VM_ERROR_CANCELLED)
            return error_set(err, VM_ERROR_UNREACHABLE, "the agent is stopping");
        if (not_yet->kind != VM_ERROR_TIMEOUT)
            return error_propagate(err, steal_ptr(&not_yet));
    }
}

static int handle_watch(struct control_session *s, const struct control_message *m,
                        struct vm_error **err)
{
    const Vmmig__Control__Watch *w = m->watch;
    struct uuid id;
    if (w->job.len) {
        memcpy(id.bytes, w->job.data, sizeof(id.bytes));
    } else {
        cleanup_job_status struct job_status status = {0};
        if (job_get_of_vm(control_agent(s)->jobs, w->vm, &status, err) < 0)
            return -1;
        id = status.id;
    }
    int64_t ms = w->interval_ms ? w->interval_ms : WATCH_INTERVAL_MS;
    return watch(s, &id, ms * NSEC_PER_MSEC, err);
}

static const struct {
    Vmmig__Control__Type type;
    int (*handle)(struct control_session *s, const struct control_message *m,
                  struct vm_error **err);
} handlers[] = {
    {VMMIG__CONTROL__TYPE__RUN, handle_run},       {VMMIG__CONTROL__TYPE__ATTACH, handle_attach},
    {VMMIG__CONTROL__TYPE__LIST, handle_list},     {VMMIG__CONTROL__TYPE__STATUS, handle_status},
    {VMMIG__CONTROL__TYPE__DETACH, handle_detach}, {VMMIG__CONTROL__TYPE__INFO, handle_info},
    {VMMIG__CONTROL__TYPE__SEND, handle_send},     {VMMIG__CONTROL__TYPE__RESOLVE, handle_resolve},
    {VMMIG__CONTROL__TYPE__CANCEL, handle_cancel}, {VMMIG__CONTROL__TYPE__JOBS, handle_jobs},
    {VMMIG__CONTROL__TYPE__WATCH, handle_watch},   {VMMIG__CONTROL__TYPE__DOCTOR, handle_doctor},
    {VMMIG__CONTROL__TYPE__FAULTS, handle_faults},
    {VMMIG__CONTROL__TYPE__TEMPLATE_PUBLISH, clones_handle_publish},
    {VMMIG__CONTROL__TYPE__TEMPLATE_LIST, clones_handle_list},
    {VMMIG__CONTROL__TYPE__TEMPLATE_SHOW, clones_handle_show},
    {VMMIG__CONTROL__TYPE__TEMPLATE_DELETE, clones_handle_delete},
    {VMMIG__CONTROL__TYPE__CLONE, clones_handle_clone},
    {VMMIG__CONTROL__TYPE__MOUNT, clones_handle_mount},
    {VMMIG__CONTROL__TYPE__UNMOUNT, clones_handle_unmount},
    {VMMIG__CONTROL__TYPE__SNAPSHOT, snapshots_handle_take},
    {VMMIG__CONTROL__TYPE__SNAPSHOT_LIST, snapshots_handle_list},
    {VMMIG__CONTROL__TYPE__SNAPSHOT_DELETE, snapshots_handle_delete},
    {VMMIG__CONTROL__TYPE__SNAPSHOT_PRUNE, snapshots_handle_prune},
    {VMMIG__CONTROL__TYPE__RESTORE, snapshots_handle_restore},
    {VMMIG__CONTROL__TYPE__REPO, repo_request_handle},
};

int request_handle(struct control_session *s, const struct control_message *m,
                   struct vm_error **err)
{
    for (size_t i = 0; i < sizeof(handlers) / sizeof(*handlers); i++)
        if (handlers[i].type == m->type)
            return handlers[i].handle(s, m, err);
    return error_set(err, VM_ERROR_VERSION, "this agent does not know the request %s",
                     control_type_name(m->type));
}

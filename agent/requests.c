/* SPDX-License-Identifier: Apache-2.0 */
#include "agent/requests.h"

#include "agent/answers.h"
#include "agent/driver.h"
#include "base/clock.h"
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
    vm_answer_init(&a, agent->jobs, vm, true);
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
    if (vms_check_free(agent->vms, m->vm, err) < 0 ||
        driver_attach(m->vm, m->qmp_path, &d, &guest, err) < 0 || keep(agent, &d, guest, err) < 0)
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

static int handle_list(struct control_session *s, const struct control_message *m,
                       struct vm_error **err)
{
    struct agent *agent = control_agent(s);
    struct vm **list;
    unsigned n;
    (void)m;
    if (vms_list(agent->vms, &list, &n, err) < 0)
        return -1;
    cleanup_free struct vm_answer *answers = calloc(n + 1, sizeof(*answers));
    cleanup_free Vmmig__Control__Vm **messages = calloc(n + 1, sizeof(*messages));
    bool room = answers && messages;
    Vmmig__Control__Vms vms = VMMIG__CONTROL__VMS__INIT;
    for (unsigned i = 0; i < n; i++) {
        if (!room) {
            vm_put(list[i]);
            continue;
        }
        vm_answer_init(&answers[i], agent->jobs, list[i], false);
        messages[i] = &answers[i].message;
    }
    free(list);
    if (!room)
        return error_nomem(err);
    vms.vms = messages;
    vms.n_vms = n;
    int r = control_reply(s, VMMIG__CONTROL__TYPE__VMS, &vms.base, err);
    for (unsigned i = 0; i < n; i++)
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
    if (reply_vm(s, m->status->vm, err) == 0)
        return 0;
    return explain_absence(control_agent(s)->jobs, m->status->vm, err);
}

static int detach_claimed(struct control_session *s, const char *name, struct vm_error **err)
{
    struct agent *agent = control_agent(s);
    struct vm *vm = vms_get(agent->vms, name, err);
    if (!vm)
        return explain_absence(agent->jobs, name, err);
    cleanup_vm_answer struct vm_answer a = {0};
    vm_answer_init(&a, agent->jobs, vm, true);
    if (vms_remove(agent->vms, name, err) < 0)
        return -1;
    /* The socket of a VMM that the agent started would otherwise be left for ever. */
    const struct vm_definition *d = vm_definition(vm);
    if (vm_presence(vm) == VM_ENDED && d->origin != VM_ORIGIN_ATTACHED)
        unlink(d->qmp_path);
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
    return control_reply(s, VMMIG__CONTROL__TYPE__AGENT, &a.base, err);
}

static int handle_cancel(struct control_session *s, const struct control_message *m,
                         struct vm_error **err)
{
    struct agent *agent = control_agent(s);
    const char *name = m->cancel->vm;
    struct uuid id;
    struct job_status status;
    if (job_cancel(agent->jobs, name, &id, err) < 0) {
        CLEANUP(vm) struct vm *vm = vms_get(agent->vms, name, NULL);
        if (vm || !err || (*err)->kind != VM_ERROR_NOT_FOUND)
            return -1;
        error_clear(err);
        return error_set(err, VM_ERROR_NOT_FOUND, "there is no VM named %s here", name);
    }
    if (job_get(agent->jobs, &id, &status, err) < 0)
        return -1;
    return reply_job_of(s, &status, err);
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
    {VMMIG__CONTROL__TYPE__CANCEL, handle_cancel}, {VMMIG__CONTROL__TYPE__JOBS, handle_jobs},
    {VMMIG__CONTROL__TYPE__WATCH, handle_watch},
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

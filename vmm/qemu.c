/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/qemu.h"

#include "base/clock.h"
#include "base/io.h"
#include "vmm/qemu_internal.h"
#include "vmm/qemu_settings.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/stat.h>

enum { SPAWN_TIMEOUT_MS = 30000, QUIT_TIMEOUT_MS = 1000 };

/* QMP commands. */

int qemu_explain(struct qemu *q, struct vm_error **err)
{
    if (!err || !*err || (*err)->kind != VM_ERROR_VMM_DIED)
        return -1;
    if (!process_has_ended(&q->guest.process, GUEST_END_BEGINS_MS, GUEST_END_TIMEOUT_MS)) {
        error_set_kind(err, VM_ERROR_UNREACHABLE);
        return error_wrap(err, "QEMU (process %d) still runs, but QMP is lost",
                          q->guest.process.pid);
    }
    char line[SPAWN_MESSAGE_MAX] = "";
    if (q->log_path)
        spawn_log_last_line(q->log_path, q->log_offset, line);
    if (!q->log_path)
        return -1;
    error_clear(err);
    return error_set(err, VM_ERROR_VMM_DIED, "QEMU ended%s%s", *line ? ": " : " and said nothing",
                     line);
}

int qemu_command(struct qemu *q, const char *command, json_t *args, json_t **ret,
                 struct vm_error **err)
{
    if (qmp_execute(q->qmp, command, args, QMP_TIMEOUT_MS, ret, err) < 0)
        return qemu_explain(q, err);
    return 0;
}

int qemu_query_migration(struct qemu *q, char ret_status[32], json_t **ret, struct vm_error **err)
{
    CLEANUP(json) json_t *info = NULL;
    if (qemu_command(q, "query-migrate", NULL, &info, err) < 0)
        return -1;
    snprintf(ret_status, 32, "%s", qmp_string(info, "status"));
    if (ret)
        *ret = steal_ptr(&info);
    return 0;
}

bool qemu_migration_is_under_way(const char *status)
{
    static const char *const ended[] = {"", "none", "completed", "failed", "cancelled"};
    for (size_t i = 0; i < sizeof(ended) / sizeof(*ended); i++)
        if (!strcmp(status, ended[i]))
            return false;
    return true;
}

int qemu_query_run_state(struct qemu *q, char ret_state[32], struct vm_error **err)
{
    CLEANUP(json) json_t *info = NULL;
    if (qemu_command(q, "query-status", NULL, &info, err) < 0)
        return -1;
    snprintf(ret_state, 32, "%s", qmp_string(info, "status"));
    return 0;
}

int qemu_check_can_move(struct qemu *q, enum guest_run_state *ret_state, struct vm_error **err)
{
    struct guest_status status;
    if (guest_status(&q->guest, &status, err) < 0)
        return -1;
    if (status.migrating)
        return error_set(err, VM_ERROR_CONFLICT, "QEMU is already migrating this VM elsewhere");
    if (status.state != GUEST_RUNNING && status.state != GUEST_PAUSED)
        return error_set(err, VM_ERROR_REFUSED, "a VM in run state '%s' cannot be migrated",
                         status.detail);
    if (ret_state)
        *ret_state = status.state;
    return 0;
}

int qemu_give_fd(struct qemu *q, const char *name, int fd, struct vm_error **err)
{
    if (qmp_execute_fd(q->qmp, "getfd", json_pack("{s:s}", "fdname", name), fd, QMP_TIMEOUT_MS,
                       NULL, err) < 0)
        return qemu_explain(q, err);
    return 0;
}

void qemu_forget_fd(struct qemu *q, const char *name)
{
    qmp_execute(q->qmp, "closefd", json_pack("{s:s}", "fdname", name), QMP_TIMEOUT_MS, NULL, NULL);
}

/* Events, in the QMP reader's thread. */

static void note_resume(struct qemu *q, int64_t at_ns)
{
    q->resumes++;
    q->resumed_at_ns = at_ns;
    if (q->stopped_at_ns)
        q->last_pause_ns = at_ns - q->stopped_at_ns;
    q->stopped_at_ns = 0;
}

static void on_event(const char *event, json_t *data, int64_t at_ns, void *arg)
{
    struct qemu *q = arg;
    uint64_t one = 1;
    {
        SCOPE_LOCK(&q->lock);
        if (!event)
            q->closed = true;
        else if (!strcmp(event, "MIGRATION"))
            snprintf(q->migration, sizeof(q->migration), "%s", qmp_string(data, "status"));
        else if (!strcmp(event, "MIGRATION_PASS"))
            q->pass = (unsigned)qmp_integer(data, "pass");
        else if (!strcmp(event, "STOP"))
            q->stopped_at_ns = at_ns;
        else if (!strcmp(event, "RESUME"))
            note_resume(q, at_ns);
        pthread_cond_broadcast(&q->changed);
    }
    /* Fails only when the counter is full, and then it is readable. */
    if (write(q->poke, &one, sizeof(one)) < 0)
        return;
}

bool qemu_wait_changed(struct qemu *q, int64_t deadline_ns)
{
    struct timespec at = {deadline_ns / NSEC_PER_SEC, deadline_ns % NSEC_PER_SEC};
    return pthread_cond_timedwait(&q->changed, &q->lock, &at) != ETIMEDOUT;
}

/* guest_ops. */

static struct qemu *of(struct guest *g)
{
    return (struct qemu *)g;
}

static enum guest_run_state run_state(const char *name)
{
    static const struct {
        const char *name;
        enum guest_run_state state;
    } states[] = {
        {"running", GUEST_RUNNING},         {"paused", GUEST_PAUSED},
        {"prelaunch", GUEST_PAUSED},        {"finish-migrate", GUEST_PAUSED},
        {"save-vm", GUEST_PAUSED},          {"inmigrate", GUEST_INCOMING},
        {"postmigrate", GUEST_POSTMIGRATE},
    };
    for (size_t i = 0; i < sizeof(states) / sizeof(*states); i++)
        if (!strcmp(states[i].name, name))
            return states[i].state;
    return GUEST_BROKEN;
}

static int qemu_status(struct guest *g, struct guest_status *ret_status, struct vm_error **err)
{
    struct guest_status status = {0};
    char migration[32];
    if (qemu_query_run_state(of(g), status.detail, err) < 0 ||
        qemu_query_migration(of(g), migration, NULL, err) < 0)
        return -1;
    status.state = run_state(status.detail);
    status.migrating = status.state != GUEST_INCOMING && qemu_migration_is_under_way(migration);
    status.finishing = !strcmp(status.detail, "finish-migrate");
    *ret_status = status;
    return 0;
}

static int qemu_pause(struct guest *g, struct vm_error **err)
{
    char state[32];
    if (qemu_source_hurry(of(g), err) < 0 || qemu_command(of(g), "stop", NULL, NULL, err) < 0 ||
        qemu_query_run_state(of(g), state, err) < 0)
        return -1;
    if (run_state(state) == GUEST_RUNNING)
        return error_set(err, VM_ERROR_FAILED, "QEMU was told to stop the guest, and it runs on");
    return 0;
}

static unsigned count_resumes(struct qemu *q)
{
    SCOPE_LOCK(&q->lock);
    return q->resumes;
}

/*
 * `cont` was refused, or the guest does not run after it. REFUSED is said only if surely no vCPU
 * ran in between: QEMU answers, the guest stands, and no RESUME was reported (events come before
 * the answer).
 */
static int resume_failed(struct qemu *q, unsigned resumes, struct vm_error **err)
{
    char state[32];
    if ((*err)->kind != VM_ERROR_REFUSED)
        return -1;
    if (qemu_query_run_state(q, state, NULL) < 0 || run_state(state) == GUEST_RUNNING ||
        count_resumes(q) != resumes)
        return error_set_kind(err, VM_ERROR_FAILED);
    return error_wrap(err, "the guest stays %s", state);
}

static int qemu_resume(struct guest *g, struct vm_error **err)
{
    struct qemu *q = of(g);
    struct vm_error *failed = NULL;
    char state[32];
    if (qemu_query_run_state(q, state, err) < 0)
        return -1;
    if (run_state(state) == GUEST_RUNNING)
        return 0;
    if (run_state(state) == GUEST_INCOMING)
        return error_set(err, VM_ERROR_REFUSED, "the guest has not been loaded yet");
    unsigned resumes = count_resumes(q);
    if (qemu_command(q, "cont", NULL, NULL, &failed) < 0) {
        resume_failed(q, resumes, &failed);
        return error_propagate(err, failed);
    }
    if (qemu_query_run_state(q, state, err) < 0)
        return -1;
    if (run_state(state) == GUEST_RUNNING || count_resumes(q) != resumes)
        return 0;
    return error_set(err, VM_ERROR_REFUSED, "QEMU was told to run the guest, and it stays %s",
                     state);
}

static int64_t qemu_resumed_at_ns(struct guest *g)
{
    SCOPE_LOCK(&of(g)->lock);
    return of(g)->resumed_at_ns;
}

static unsigned qemu_resumes(struct guest *g)
{
    return count_resumes(of(g));
}

static int qemu_announce(struct guest *g, struct vm_error **err)
{
    json_t *timing =
        json_pack("{s:i, s:i, s:i, s:i}", "initial", 50, "max", 550, "rounds", 5, "step", 100);
    return qemu_command(of(g), "announce-self", timing, NULL, err);
}

static int qemu_quit(struct guest *g, struct vm_error **err)
{
    if (qmp_execute(of(g)->qmp, "quit", NULL, QUIT_TIMEOUT_MS, NULL, err) < 0)
        return qemu_explain(of(g), err);
    return 0;
}

static int sink_populate(struct guest *g, const uint64_t *addrs, unsigned n, struct vm_error **err)
{
    return qemu_sink_populate(of(g), addrs, n, err);
}

static void destroy(struct guest *g)
{
    struct qemu *q = of(g);
    qemu_source_stop(g, NULL);
    qemu_sink_destroy(q->sink);
    qemu_settings_finish(q);
    qmp_destroy(q->qmp);
    close_fd(&q->poke);
    pthread_cond_destroy(&q->changed);
    pthread_mutex_destroy(&q->lock);
    pthread_mutex_destroy(&q->settings_lock);
    pthread_mutex_destroy(&q->source_lock);
    free(q->log_path);
    free(q);
}

static const struct guest_ops ops = {
    .driver = "qemu",
    .pauses_by_itself = true,
    .destroy = destroy,
    .status = qemu_status,
    .pause = qemu_pause,
    .resume = qemu_resume,
    .resumed_at_ns = qemu_resumed_at_ns,
    .resumes = qemu_resumes,
    .source_start = qemu_source_start,
    .source_progress = qemu_source_progress,
    .source_stop = qemu_source_stop,
    .announce = qemu_announce,
    .quit = qemu_quit,
    .sink_populate = sink_populate,
    .sink_regions = qemu_sink_regions,
    .sink_bytes = qemu_sink_bytes,
    .sink_finish = qemu_sink_finish,
};

struct guest *qemu_guest(struct qemu *q)
{
    return &q->guest;
}

struct qemu *qemu_from_guest(struct guest *g)
{
    return g->ops == &ops ? of(g) : NULL;
}

struct qmp *qemu_qmp(struct qemu *q)
{
    return q->qmp;
}

void qemu_destroy(struct qemu *q)
{
    if (q)
        destroy(&q->guest);
}

/* Making a handle. */

static struct qemu *new_qemu(struct vm_error **err)
{
    cleanup_close int poke = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (poke < 0) {
        error_errno(err, errno, "cannot make an eventfd");
        return NULL;
    }
    struct qemu *q = calloc(1, sizeof(*q));
    if (!q) {
        error_nomem(err);
        return NULL;
    }
    q->guest.ops = &ops;
    q->poke = steal_fd(&poke);
    pthread_mutex_init(&q->lock, NULL);
    pthread_mutex_init(&q->source_lock, NULL);
    pthread_mutex_init(&q->settings_lock, NULL);
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&q->changed, &attr);
    pthread_condattr_destroy(&attr);
    return q;
}

static int check_version(struct qemu *q, struct vm_error **err)
{
    const struct qmp_version *v = qmp_version(q->qmp);
    if (v->major > 7 || (v->major == 7 && v->minor >= 2))
        return 0;
    return error_set(err, VM_ERROR_REFUSED, "QEMU %d.%d.%d is too old: vmmig needs 7.2 or later",
                     v->major, v->minor, v->micro);
}

/* The kernel's word on who listens may mean a relay; a descriptor arrives only at QEMU itself. */
static int prove_process(struct qemu *q, pid_t pid, struct vm_error **err)
{
    static const char name[] = "vmmig-proof";
    struct stat st;
    cleanup_close int fd = memfd_create(name, MFD_CLOEXEC);
    if (fd < 0 || fstat(fd, &st) < 0)
        return error_errno(err, errno, "cannot make a memfd");
    if (qemu_give_fd(q, name, fd, err) < 0)
        return -1;
    bool found = process_has_open(pid, &st);
    qemu_forget_fd(q, name);
    if (!found)
        return error_set(err, VM_ERROR_REFUSED,
                         "process %d listens on the QMP socket, but is not the QEMU behind it",
                         pid);
    return 0;
}

struct qemu *qemu_attach(const char *qmp_path, int timeout_ms, struct vm_error **err)
{
    CLEANUP(qemu) struct qemu *q = new_qemu(err);
    pid_t pid;
    if (!q)
        return NULL;
    q->qmp = qmp_connect(qmp_path, timeout_ms, on_event, q, err);
    if (!q->qmp || qmp_peer_pid(q->qmp, &pid, err) < 0 ||
        process_identify(pid, &q->guest.process, err) < 0 || check_version(q, err) < 0 ||
        prove_process(q, pid, err) < 0) {
        error_wrap(err, "cannot attach to %s", qmp_path);
        return NULL;
    }
    return steal_ptr(&q);
}

struct qemu *qemu_spawn(const struct qemu_launch *launch, struct vm_error **err)
{
    int fd, timeout_ms = launch->timeout_ms ? launch->timeout_ms : SPAWN_TIMEOUT_MS;
    CLEANUP(qemu) struct qemu *q = new_qemu(err);
    if (!q)
        return NULL;
    q->log_path = strdup(launch->log_path);
    q->log_offset = spawn_log_size(launch->log_path);
    if (!q->log_path) {
        error_nomem(err);
        return NULL;
    }
    if (qemu_spawn_process(launch, &q->guest.process, &fd, err) < 0)
        return NULL;
    q->qmp = qmp_open(fd, launch->qmp_path, timeout_ms, on_event, q, err);
    if (!q->qmp)
        qemu_explain(q, err);
    if (!q->qmp || check_version(q, err) < 0) {
        process_kill(&q->guest.process, GUEST_END_TIMEOUT_MS, NULL);
        unlink(launch->qmp_path);
        error_wrap(err, "cannot start %s", launch->binary);
        return NULL;
    }
    return steal_ptr(&q);
}

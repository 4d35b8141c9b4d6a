/* SPDX-License-Identifier: Apache-2.0 */
#include "agent/snapshots.h"

#include "agent/answers.h"
#include "agent/driver.h"
#include "agent/makings.h"
#include "agent/repository.h"
#include "agent/transfer.h"
#include "base/clock.h"
#include "base/fault.h"
#include "base/io.h"
#include "base/log.h"
#include "snapshot/chain.h"
#include "snapshot/restore.h"

#include <poll.h>
#include <string.h>
#include <unistd.h>

enum { RESTORE_KILL_MS = 10000, RESTORE_QUIT_MS = 1000, PATH_BYTES = 4096 };

/* ---- taking one ---- */

struct take_job {
    struct agent *agent;
    struct vm *vm;
    char vm_name[VM_NAME_MAX + 1], name[SNAPSHOT_NAME_MAX + 1], image[IMAGE_NAME_MAX + 1];
    char *guest_agent; /* NULL: look for it */
    bool disk_only;
    struct job *job;
    struct job_progress progress;
};

static void take_job_free(void *arg)
{
    struct take_job *t = arg;
    vm_put(t->vm);
    free(t->guest_agent);
    free(t);
}

static enum job_phase phase_of(enum snapshot_phase phase)
{
    static const enum job_phase phases[] = {
        [SNAPSHOT_PREPARING] = JOB_PHASE_PREPARING,
        [SNAPSHOT_SWITCHING] = JOB_PHASE_SWITCHING,
        [SNAPSHOT_COPYING] = JOB_PHASE_STORING,
        [SNAPSHOT_COMMITTING] = JOB_PHASE_COMMITTING,
    };
    return phases[phase];
}

static void on_progress(void *arg, const struct snapshot_progress *p)
{
    struct take_job *t = arg;
    t->progress.phase = phase_of(p->phase);
    t->progress.total = p->memory_total + p->disk_total;
    t->progress.remaining = t->progress.total - p->memory_done - p->disk_done;
    t->progress.pause_ns = p->pause_ns;
    t->progress.snapshot.stored_bytes = p->stored;
    job_update(t->job, &t->progress);
}

static void report(struct take_job *t, const struct snapshot_report *r)
{
    struct job_snapshot *s = &t->progress.snapshot;
    strcpy(s->parent, r->parent);
    s->memory_bytes = r->memory_bytes;
    s->disk_bytes = r->disk_bytes;
    s->disk_read_bytes = r->disk_read;
    s->stored_bytes = r->stored;
    s->frozen = r->frozen;
    t->progress.pause_ns = r->pause_ns;
    t->progress.remaining = 0;
    snprintf(t->progress.note, sizeof(t->progress.note), "%s", r->note);
    job_update(t->job, &t->progress);
}

struct thawer snapshots_thawer(const struct config *config)
{
    return (struct thawer){config->libexec_dir, config->log_dir, config->runtime_dir};
}

bool snapshots_is_frozen(const struct config *config, const struct process_identity *process)
{
    char path[FROZEN_PATH_MAX];
    struct thawer thawer = snapshots_thawer(config);
    frozen_path(&thawer, process, path);
    return frozen_is_noted(path);
}

int snapshots_expect_frozen(const struct config *config, const struct process_identity *process, char *const *argv,
                            struct vm_error **err)
{
    char link[32], cwd[PATH_BYTES];
    struct thawer thawer = snapshots_thawer(config);
    snprintf(link, sizeof(link), "/proc/%d/cwd", process->pid);
    ssize_t n = readlink(link, cwd, sizeof(cwd) - 1);
    cwd[n < 0 ? 0 : n] = 0;
    return frozen_expect(&thawer, process, argv, cwd, err);
}

void snapshots_thaw_frozen(const struct config *config, const struct process_identity *process)
{
    struct thawer thawer = snapshots_thawer(config);
    cleanup_error struct vm_error *err = NULL;
    if (snapshots_is_frozen(config, process) && frozen_thaw_later(&thawer, process, &err) < 0)
        log_error("the guest's file systems stay frozen", "pid=%d error=%s", process->pid, log_q(error_message(err)));
}

void snapshots_forget_frozen(const struct config *config, const struct process_identity *process)
{
    char path[FROZEN_PATH_MAX];
    struct thawer thawer = snapshots_thawer(config);
    frozen_path(&thawer, process, path);
    frozen_forget(path);
}

/* Of a snapshot that is being taken (snapshot/guard.h). */
static void make_note_path(const struct config *config, const char *vm, char out[PATH_BYTES])
{
    snprintf(out, PATH_BYTES, "%s/%s.snapshot", config->runtime_dir, vm);
}

struct guest *snapshots_connect(const struct vm_definition *d, void *arg, struct vm_error **err)
{
    const struct config *config = arg;
    char note[PATH_BYTES];
    make_note_path(config, d->name, note);
    if (guard_settle_before(note, &d->process, err) < 0)
        return NULL;
    struct guest *guest = driver_connect(d, arg, err);
    struct thawer thawer = snapshots_thawer(config);
    if (guest)
        guard_settle(note, &thawer, guest);
    return guest;
}

int snapshots_clear(const struct config *config, const struct vm_definition *d, struct guest *guest,
                    struct vm_error **err)
{
    char note[PATH_BYTES];
    make_note_path(config, d->name, note);
    if (d->driver == VM_DRIVER_QEMU && guard_lives(note, &d->process))
        return error_set(err, VM_ERROR_CONFLICT,
                         "a snapshot of VM %s was cut short and is being taken out of it; try again in a moment",
                         d->name);
    if (guard_settle_before(note, &d->process, err) < 0 || driver_clear(guest, err) < 0)
        return -1;
    struct thawer thawer = snapshots_thawer(config);
    guard_settle(note, &thawer, guest);
    return 0;
}

static int take_run(struct job *job, void *arg, struct vm_error **err)
{
    struct take_job *t = arg;
    const struct config *config = t->agent->config;
    const struct vm_definition *vm = vm_definition(t->vm);
    char note[PATH_BYTES], sockets[PATH_BYTES];
    struct snapshot_report r;
    make_note_path(config, t->vm_name, note);
    snprintf(sockets, sizeof(sockets), "%s/nbd", config->runtime_dir);
    CLEANUP(guest) struct guest *guest = vm_guest(t->vm);
    struct snapshot_params p = {.guest = guest,
                                .vm = t->vm_name,
                                .name = t->name,
                                .disk_only = t->disk_only,
                                .guest_agent = t->guest_agent,
                                .scratch_dir = config->scratch_dir,
                                .socket_dir = sockets,
                                .plugin = config->nbdkit_plugin,
                                .mount = t->agent->mount,
                                .guard = {snapshots_thawer(config), vm->socket_path, vm->process, note, false},
                                .cancel_fd = job_cancel_fd(job),
                                .progress = on_progress,
                                .arg = t};
    t->job = job;
    t->progress.predicted_pause_ns = t->progress.pause_ns = -1;
    strcpy(t->progress.snapshot.image, t->image);
    job_update(job, &t->progress);
    p.repo = repository_get(t->agent->repository, err);
    if (!p.repo || io_make_folders(p.scratch_dir, 0700, err) < 0 || snapshot_take(&p, &r, err) < 0)
        return -1;
    report(t, &r);
    return 0;
}

/* What can be said now is not left to a job that fails. */
static int check_take(struct agent *agent, const Vmmig__Control__Snapshot *m, struct take_job *t,
                      struct vm_error **err)
{
    if (snapshot_image_name(m->vm, m->name, t->image, err) < 0)
        return -1;
    t->agent = agent;
    strcpy(t->vm_name, m->vm);
    strcpy(t->name, m->name);
    t->disk_only = m->disk_only;
    t->vm = vms_get_present(agent->vms, m->vm, err);
    if (!t->vm || transfer_check_free(agent->transfer, m->vm, err) < 0)
        return -1;
    if (*m->guest_agent && !(t->guest_agent = strdup(m->guest_agent)))
        return error_nomem(err);
    return 0;
}

static int reply_job(struct control_session *s, const struct uuid *id, struct vm_error **err)
{
    struct job_status status;
    if (job_get(control_agent(s)->jobs, id, &status, err) < 0)
        return -1;
    cleanup_job_answer struct job_answer a = {0};
    job_answer_init(&a, &status);
    return control_reply(s, VMMIG__CONTROL__TYPE__JOB, &a.message.base, err);
}

int snapshots_handle_take(struct control_session *s, const struct control_message *m,
                          struct vm_error **err)
{
    struct agent *agent = control_agent(s);
    struct uuid id;
    struct take_job *t = calloc(1, sizeof(*t));
    if (!t)
        return error_nomem(err);
    struct job_params job = {.kind = JOB_SNAPSHOT,
                             .vm = t->vm_name,
                             .peer = t->image,
                             .run = take_run,
                             .arg = t,
                             .free_arg = take_job_free};
    if (check_take(agent, m->snapshot, t, err) < 0 || job_start(agent->jobs, &job, &id, err) < 0) {
        take_job_free(t);
        return -1;
    }
    return reply_job(s, &id, err);
}

/* ---- lists ---- */

/* Snapshots as messages. What they point to lies beside them. */
struct info_list {
    struct {
        Vmmig__Control__SnapshotInfo message;
        char image[IMAGE_NAME_MAX + 1];
    } *items;
    Vmmig__Control__SnapshotInfo **messages;
    size_t n, left_out;
};

static void info_list_finish(struct info_list *l)
{
    free(l->items);
    free(l->messages);
}

static int info_list_init(struct info_list *l, size_t cap, struct vm_error **err)
{
    l->items = calloc(cap + 1, sizeof(*l->items));
    l->messages = calloc(cap + 1, sizeof(*l->messages));
    return l->items && l->messages ? 0 : error_nomem(err);
}

static Vmmig__Control__SnapshotInfo *info_list_add(struct info_list *l, struct snapshot_entry *e)
{
    Vmmig__Control__SnapshotInfo *m = &l->items[l->n].message;
    char *image = l->items[l->n].image;
    snprintf(image, IMAGE_NAME_MAX + 1, "%s@%s", e->vm, e->name);
    vmmig__control__snapshot_info__init(m);
    m->image = image;
    m->vm = e->vm;
    m->name = e->name;
    m->parent = e->parent;
    m->created_ns = (int64_t)e->created_s * NSEC_PER_SEC;
    m->size = e->size;
    m->stored = e->stored;
    m->memory = e->memory;
    return l->messages[l->n++] = m;
}

static int info_list_reply(struct control_session *s, struct info_list *l, struct vm_error **err)
{
    Vmmig__Control__Snapshots answer = VMMIG__CONTROL__SNAPSHOTS__INIT;
    answer.snapshots = l->messages;
    answer.n_snapshots = l->n;
    answer.left_out = l->left_out;
    return control_reply(s, VMMIG__CONTROL__TYPE__SNAPSHOTS, &answer.base, err);
}

static int reply_list(struct control_session *s, struct snapshot_entry *list, size_t n,
                      struct vm_error **err)
{
    __attribute__((cleanup(info_list_finish))) struct info_list l = {0};
    size_t all = n;
    if (snapshot_list_limit(list, &n, CONTROL_SNAPSHOTS_MAX, err) < 0 || info_list_init(&l, n, err) < 0)
        return -1;
    l.left_out = all - n;
    for (size_t i = 0; i < n; i++)
        info_list_add(&l, &list[i]);
    return info_list_reply(s, &l, err);
}

/* One of them, as the list has it. NOT_FOUND. */
static int find_one(struct repo *r, const char *image, struct snapshot_entry *ret,
                    struct vm_error **err)
{
    char vm[VM_NAME_MAX + 1], name[SNAPSHOT_NAME_MAX + 1];
    cleanup_free struct snapshot_entry *list = NULL;
    size_t n;
    if (snapshot_split_name(image, vm, name, err) < 0 || snapshot_list(r, vm, &list, &n, err) < 0)
        return -1;
    for (size_t i = 0; i < n; i++)
        if (!strcmp(list[i].name, name)) {
            *ret = list[i];
            return 0;
        }
    return error_set(err, VM_ERROR_NOT_FOUND, "there is no snapshot %s", image);
}

static int reply_with_files(struct control_session *s, struct repo *r, const char *name,
                            struct vm_error **err)
{
    __attribute__((cleanup(info_list_finish))) struct info_list l = {0};
    struct snapshot_entry e;
    Vmmig__Control__SnapshotFile files[IMAGE_FILES_MAX], *list[IMAGE_FILES_MAX];
    cleanup_free struct image *image = calloc(1, sizeof(*image));
    if (!image)
        return error_nomem(err);
    if (find_one(r, name, &e, err) < 0 || catalogue_find(repo_store(r), name, image, err) < 0 ||
        info_list_init(&l, 1, err) < 0)
        return -1;
    Vmmig__Control__SnapshotInfo *m = info_list_add(&l, &e);
    for (unsigned i = 0; i < image->n_files; i++) {
        vmmig__control__snapshot_file__init(&files[i]);
        files[i].name = image->files[i].name;
        files[i].size = image->files[i].size;
        list[i] = &files[i];
    }
    m->files = list;
    m->n_files = image->n_files;
    return info_list_reply(s, &l, err);
}

int snapshots_handle_list(struct control_session *s, const struct control_message *m,
                          struct vm_error **err)
{
    cleanup_free struct snapshot_entry *list = NULL;
    size_t n;
    struct repo *r = repository_get(control_agent(s)->repository, err);
    if (!r)
        return -1;
    if (*m->snapshot_list->image)
        return reply_with_files(s, r, m->snapshot_list->image, err);
    return snapshot_list(r, *m->snapshot_list->vm ? m->snapshot_list->vm : NULL, &list, &n, err) < 0
               ? -1
               : reply_list(s, list, n, err);
}

/* ---- deleting ---- */

int snapshots_handle_delete(struct control_session *s, const struct control_message *m,
                            struct vm_error **err)
{
    struct snapshot_entry e;
    struct repo *r = repository_get(control_agent(s)->repository, err);
    if (!r || find_one(r, m->snapshot_delete->image, &e, err) < 0 ||
        snapshot_delete(r, m->snapshot_delete->image, err) < 0)
        return -1;
    log_info("deleted a snapshot", "image=%s", log_q(m->snapshot_delete->image));
    return reply_list(s, &e, 1, err);
}

static int drop(struct repo *r, const struct snapshot_entry *e, struct vm_error **err)
{
    char image[IMAGE_NAME_MAX + 1];
    struct vm_error *failed = NULL;
    snprintf(image, sizeof(image), "%s@%s", e->vm, e->name);
    if (snapshot_delete(r, image, &failed) == 0) {
        log_info("deleted a snapshot that no rule keeps", "image=%s", image);
        return 0;
    }
    if (failed->kind != VM_ERROR_NOT_FOUND) /* somebody else was faster */
        return error_propagate(err, failed);
    error_free(failed);
    return 0;
}

int snapshots_handle_prune(struct control_session *s, const struct control_message *m,
                           struct vm_error **err)
{
    const Vmmig__Control__SnapshotPrune *p = m->snapshot_prune;
    struct snapshot_rule rule = {p->keep_last, p->keep_daily, p->keep_weekly};
    cleanup_free struct snapshot_entry *list = NULL;
    size_t n, kept = 0;
    struct repo *r = repository_get(control_agent(s)->repository, err);
    if (!r || snapshot_list(r, p->vm, &list, &n, err) < 0)
        return -1;
    cleanup_free bool *dropped = calloc(n + 1, sizeof(*dropped));
    if (!dropped)
        return error_nomem(err);
    snapshot_choose(list, n, &rule, dropped);
    for (size_t i = 0; i < n; i++) {
        if (!dropped[i])
            continue;
        if (!p->dry_run && drop(r, &list[i], err) < 0)
            return error_wrap(err, "after %zu snapshots were deleted, %s@%s was not", kept, list[i].vm, list[i].name);
        list[kept++] = list[i];
    }
    return reply_list(s, list, kept, err);
}

/* ---- restoring one ---- */

struct restore_job {
    struct agent *agent;
    struct repo *repo;
    char image[IMAGE_NAME_MAX + 1], vm[VM_NAME_MAX + 1];
    char *disk_dir; /* NULL: where they were */
    bool paused;
    struct making making;
    struct job *job;
    struct job_progress progress;
};

static void restore_job_free(void *arg)
{
    struct restore_job *t = arg;
    free(t->disk_dir);
    free(t);
}

static void show_restore(struct restore_job *t, enum job_phase phase)
{
    t->progress.phase = phase;
    job_update(t->job, &t->progress);
}

static void on_restore_progress(void *arg, uint64_t done, uint64_t total)
{
    struct restore_job *t = arg;
    t->progress.total = total;
    t->progress.remaining = total - done;
    job_update(t->job, &t->progress);
}

/* The VM becomes this agent's own. */
static int keep_restored(struct restore_job *t, struct guest **guest, struct vm_error **err)
{
    cleanup_free char **argv = NULL;
    enum vm_driver driver = driver_of(*guest);
    cleanup_free char *socket = driver_socket_path(t->agent->config, t->vm, driver);
    if (!socket)
        return error_nomem(err);
    if (process_argv((*guest)->process.pid, &argv, err) < 0)
        return -1;
    struct vm_definition d = {.origin = VM_ORIGIN_RESTORED,
                              .argv = argv,
                              .driver = driver,
                              .socket_path = socket,
                              .process = (*guest)->process,
                              .since_ns = clock_wall_ns()};
    strcpy(d.name, t->vm);
    return vms_add(t->agent->vms, &d, guest, err);
}

/* Whoever comes when we are gone thaws it. */
static void expect_frozen(struct restore_job *t, const struct restore *r, const struct guest *guest)
{
    const struct qemu_definition *d = restore_definition(r);
    struct thawer thawer = snapshots_thawer(t->agent->config);
    if (restore_is_frozen(r))
        frozen_expect(&thawer, &guest->process, d->argv, d->cwd, NULL); /* thaw says what fails */
}

static void thaw(struct restore_job *t, const struct restore *r, const struct guest *guest)
{
    cleanup_error struct vm_error *frozen = NULL;
    struct thawer thawer = snapshots_thawer(t->agent->config);
    if (restore_thaw(r, guest, &thawer, !t->paused, &frozen) == 0)
        return;
    log_warn("a restored guest is not thawed", "vm=%s error=%s", t->vm, log_q(error_message(frozen)));
    snprintf(t->progress.note, sizeof(t->progress.note), "%s", error_message(frozen));
}

/* It is no VM of this agent's yet. */
static void end_vm(struct restore_job *t, struct guest *guest)
{
    cleanup_free char *socket = driver_socket_path(t->agent->config, t->vm, driver_of(guest));
    guest_quit(guest, NULL); /* which closes its disks; Ceph counts a dead user for a while */
    for (int i = 0; i < RESTORE_QUIT_MS && process_alive(&guest->process); i++)
        poll(NULL, 0, 1);
    guest_kill(guest, RESTORE_KILL_MS, NULL);
    if (socket)
        unlink(socket);
    struct vm_definition d = {.origin = VM_ORIGIN_RESTORED, .driver = driver_of(guest)};
    strcpy(d.name, t->vm);
    driver_forget_dead(&d, (void *)(uintptr_t)t->agent->config);
    guest_unref(guest);
}

static int write_disks(struct restore_job *t, struct restore *r, struct vm_error **err)
{
    struct restore_control c = {job_cancel_fd(t->job), on_restore_progress, t};
    show_restore(t, JOB_PHASE_WRITING);
    return restore_fill_disks(r, &c, err);
}

static int load(struct restore_job *t, struct restore *r, struct guest *guest,
                struct vm_error **err)
{
    struct restore_control c = {job_cancel_fd(t->job), on_restore_progress, t};
    show_restore(t, JOB_PHASE_LOADING);
    return restore_load(r, guest, &c, err);
}

/* Room for the VM's record, before anything is started. */
static int reserve(struct restore_job *t, const struct qemu_definition *d, struct vm_error **err)
{
    struct vm_definition future = {.origin = VM_ORIGIN_RESTORED, .argv = d->argv, .driver = driver_of_definition(d)};
    cleanup_free char *socket = driver_socket_path(t->agent->config, t->vm, future.driver);
    if (!socket)
        return error_nomem(err);
    future.socket_path = socket;
    strcpy(future.name, t->vm);
    return vms_reserve(t->agent->vms, &future, err);
}

/* A VMM that waits, and everything into it; or one that boots from what is there. It stands. */
static struct guest *make_vm(struct restore_job *t, struct restore *r, struct vm_error **err)
{
    const struct config *config = t->agent->config;
    const struct qemu_definition *d = restore_definition(r);
    struct driver_birth birth = {making_born, &t->making};
    if (reserve(t, d, err) < 0)
        return NULL;
    /* Disks first: what the VMM may open, and its user own, is written by nobody else any more. */
    if (write_disks(t, r, err) < 0 || restore_give_disks(r, config->vm_user, err) < 0)
        return NULL;
    if (restore_boots(r))
        return driver_boot(config, t->vm, d, &birth, err);
    struct guest *guest = driver_sink_start(config, t->vm, d, true, 0, &birth, err);
    if (!guest || load(t, r, guest, err) == 0)
        return guest;
    end_vm(t, guest);
    return NULL;
}

static int let_run(struct restore_job *t, const struct restore *r, struct guest *guest, struct vm_error **err)
{
    if (job_close_cancel(t->job, "too late: the VM is restored", err) < 0)
        return -1;
    expect_frozen(t, r, guest);
    driver_sink_release(guest);
    return t->paused ? guest_release(guest, err) : guest_resume(guest, err);
}

/* When it fails nothing of the VM is left. */
static int restore_into(struct restore_job *t, struct restore *r, struct vm_error **err)
{
    struct guest *guest = make_vm(t, r, err);
    if (!guest)
        return -1;
    CLEANUP(guest) struct guest *held = guest_ref(guest);
    /* It is a VM of this agent as soon as it runs: what comes then takes long, and may not cost it. */
    if (let_run(t, r, guest, err) == 0 && keep_restored(t, &guest, err) == 0) {
        restore_keep(r);
        FAULT("restore.kept");
        thaw(t, r, held);
        return 0;
    }
    snapshots_forget_frozen(t->agent->config, &guest->process);
    end_vm(t, guest);
    return -1;
}

static int note_disk(void *arg, const char *path, const char *image, struct vm_error **err)
{
    struct restore_job *t = arg;
    if ((image ? making_image(&t->making, path, image, err) : making_file(&t->making, path, err)) < 0)
        return -1;
    FAULT("restore.disk");
    return 0;
}

static int make_disks(struct restore_job *t, struct restore *r, struct vm_error **err)
{
    if (restore_make_disks(r, note_disk, t, err) < 0)
        return -1;
    FAULT("restore.made");
    return 0;
}

static int note_socket(struct restore_job *t, const struct restore *r, struct vm_error **err)
{
    cleanup_free char *socket = driver_socket_path(t->agent->config, t->vm,
                                                   driver_of_definition(restore_definition(r)));
    char cgroup[PATH_BYTES];
    snprintf(cgroup, sizeof(cgroup), "%s/%s", t->agent->config->vm_cgroup, t->vm);
    if (*t->agent->config->vm_cgroup && making_cgroup(&t->making, cgroup, err) < 0)
        return -1;
    return socket ? making_socket(&t->making, socket, err) : error_nomem(err);
}

static int restore_opened(struct restore_job *t, struct restore *r, struct vm_error **err)
{
    if (note_socket(t, r, err) < 0 || restore_name(r, t->vm, err) < 0 ||
        restore_place_disks(r, t->vm, t->disk_dir, t->agent->config->vm_user, err) < 0 ||
        make_disks(t, r, err) < 0 || restore_into(t, r, err) < 0)
        return -1;
    t->progress.snapshot.memory_bytes = restore_boots(r) ? 0 : restore_definition(r)->memory;
    return 0;
}

/* *ret_all: nothing is left to be taken back. */
static int restore_noted(struct restore_job *t, bool *ret_all, struct vm_error **err)
{
    char holder[IMAGE_NAME_MAX + 1];
    struct uuid unique = uuid_new();
    snprintf(holder, sizeof(holder), "restore of %s %s", t->vm, uuid_text(&unique));
    if (making_lease(&t->making, holder, err) < 0)
        return -1;
    struct restore *r = restore_open(t->repo, t->image, holder, job_cancel_fd(t->job), err);
    *ret_all = false; /* nobody knows whether there is a lease */
    if (!r)
        return -1;
    int done = restore_opened(t, r, err);
    *ret_all = restore_close(r);
    if (done < 0)
        vms_release(t->agent->vms, t->vm);
    return done;
}

static int restore_run(struct job *job, void *arg, struct vm_error **err)
{
    struct restore_job *t = arg;
    bool all = true;
    t->job = job;
    t->making = MAKING_NONE;
    t->progress.predicted_pause_ns = t->progress.pause_ns = -1;
    strcpy(t->progress.snapshot.image, t->image);
    show_restore(t, JOB_PHASE_PREPARING);
    /* Again, now that nobody else can make a VM of that name. */
    int r = vms_check_free(t->agent->vms, t->vm, err) < 0 ||
                    making_begin(&t->making, t->agent->config, t->vm, err) < 0
                ? -1
                : restore_noted(t, &all, err);
    if (all)
        making_end(&t->making);
    else
        making_leave(&t->making, t->agent, r == 0);
    if (r < 0)
        return error_wrap(err, "restore %s", t->image);
    job_update(job, &t->progress);
    return 0;
}

static int check_restore(struct agent *agent, const Vmmig__Control__Restore *m,
                         struct restore_job *t, struct vm_error **err)
{
    char vm[VM_NAME_MAX + 1], name[SNAPSHOT_NAME_MAX + 1];
    struct snapshot_entry e;
    t->agent = agent;
    t->paused = m->paused;
    t->repo = repository_get(agent->repository, err);
    if (!t->repo || snapshot_split_name(m->image, vm, name, err) < 0 ||
        find_one(t->repo, m->image, &e, err) < 0)
        return -1;
    snprintf(t->image, sizeof(t->image), "%s@%s", vm, name);
    strcpy(t->vm, *m->as ? m->as : vm);
    if (*m->disk_dir && !(t->disk_dir = strdup(m->disk_dir)))
        return error_nomem(err);
    return vms_check_free(agent->vms, t->vm, err);
}

int snapshots_handle_restore(struct control_session *s, const struct control_message *m,
                             struct vm_error **err)
{
    struct agent *agent = control_agent(s);
    struct uuid id;
    struct restore_job *t = calloc(1, sizeof(*t));
    if (!t)
        return error_nomem(err);
    struct job_params job = {.kind = JOB_RESTORE,
                             .vm = t->vm,
                             .peer = t->image,
                             .run = restore_run,
                             .arg = t,
                             .free_arg = restore_job_free};
    if (check_restore(agent, m->restore, t, err) < 0 || job_start(agent->jobs, &job, &id, err) < 0) {
        restore_job_free(t);
        return -1;
    }
    return reply_job(s, &id, err);
}

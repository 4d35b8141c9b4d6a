/* SPDX-License-Identifier: Apache-2.0 */
#include "agent/clones.h"

#include "agent/driver.h"
#include "agent/makings.h"
#include "agent/repository.h"
#include "agent/snapshots.h"
#include "agent/transfer.h"
#include "base/clock.h"
#include "base/fault.h"
#include "base/io.h"
#include "base/log.h"
#include "snapshot/clone.h"

#include <errno.h>
#include <grp.h>
#include <pthread.h>
#include <pwd.h>
#include <string.h>

enum { KILL_TIMEOUT_MS = 10000, OWNER_BYTES = 128, REF_BYTES = 128 };

/* ---- the mount ---- */

/* Who takes this mount's leases: the same for ever; which holder of it, the holder adds. */
static int make_owner(const struct config *config, char out[OWNER_BYTES], struct vm_error **err)
{
    char path[4096];
    cleanup_free char *text = NULL;
    size_t len = 0;
    struct uuid id;
    snprintf(path, sizeof(path), "%s/mount.id", config->state_dir);
    cleanup_error struct vm_error *absent = NULL;
    if (io_read_file(path, UUID_TEXT_SIZE, &text, &len, &absent) < 0 || !uuid_parse(text, &id)) {
        id = uuid_new();
        if (io_write_file_durably(path, uuid_text(&id), UUID_TEXT_SIZE - 1, 0600, err) < 0)
            return -1;
    }
    snprintf(out, OWNER_BYTES, "mount of %.48s %s", config->host, uuid_text(&id));
    return 0;
}

/* Numbers of the user whom VMs run as. */
static int find_vm_user(const struct config *config, uid_t *ret_uid, gid_t *ret_gid,
                        struct vm_error **err)
{
    *ret_uid = geteuid();
    *ret_gid = getegid();
    if (!*config->vm_user)
        return 0;
    char text[16384];
    struct passwd entry, *user = NULL;
    int rc = getpwnam_r(config->vm_user, &entry, text, sizeof(text), &user);
    if (!user)
        return rc ? error_errno(err, rc, "vm-user: cannot look up user %s", config->vm_user)
                  : error_set(err, VM_ERROR_NOT_FOUND, "vm-user: there is no user named %s", config->vm_user);
    *ret_uid = user->pw_uid;
    *ret_gid = user->pw_gid;
    return 0;
}

struct mount *clones_create_mount(const struct config *config, struct vm_error **err)
{
    char control[4096], log[4096], cgroup[4096] = "", owner[OWNER_BYTES];
    uid_t uid;
    gid_t gid;
    if (make_owner(config, owner, err) < 0 || find_vm_user(config, &uid, &gid, err) < 0)
        return NULL;
    const struct group *group = *config->vm_user ? getgrgid(gid) : NULL;
    snprintf(control, sizeof(control), "%s/mount.sock", config->runtime_dir);
    snprintf(log, sizeof(log), "%s/mount.log", config->log_dir);
    if (*config->vm_cgroup)
        snprintf(cgroup, sizeof(cgroup), "%s/vmmig-mount", config->vm_cgroup);
    struct mount_setup setup = {
        .repository = config->repository,
        .folder = config->mount_dir,
        .cache = config->cache_dir,
        .cache_size = config->cache_size,
        .read_timeout_ms = config->disk_timeout_ms,
        .record_ms = config->record_ms,
        .control = control,
        .log = log,
        .owner = owner,
        .group = group ? group->gr_name : "",
        .cgroup = cgroup,
        .libexec = config->libexec_dir,
    };
    return mount_create(&setup, err);
}

bool clones_is_mounted(struct agent *agent, const struct qemu_disk *disk)
{
    char image[MOUNT_NAME_MAX + 1], file[MOUNT_FILE_NAME_MAX + 1];
    return mount_parse(agent->mount, disk->file, image, file);
}

static int show_file(struct agent *agent, const struct qemu_disk *disk, struct vm_error **err)
{
    char image[MOUNT_NAME_MAX + 1], file[MOUNT_FILE_NAME_MAX + 1];
    if (disk->writable || !mount_parse(agent->mount, disk->file, image, file))
        return 0;
    if (!template_is_version(image))
        return error_set(err, VM_ERROR_REFUSED,
                         "disk %s lies on image %s of a repository, which may be another one here: only "
                         "templates stay what they are",
                         disk->name, image);
    if (!repository_get(agent->repository, err) || mount_ensure(agent->mount, err) < 0)
        return error_wrap(err, "disk %s lies on template %s", disk->name, image + 2);
    if (access(disk->file, R_OK) == 0)
        return 0;
    return errno == ENOENT
               ? error_set(err, VM_ERROR_NOT_FOUND,
                           "disk %s lies on template %s, which the repository of this host (%s) has not",
                           disk->name, image + 2, agent->config->repository)
               : error_errno(err, errno, "disk %s: %s", disk->name, disk->file);
}

int clones_show_templates(struct agent *agent, const struct qemu_definition *d,
                          struct vm_error **err)
{
    for (unsigned i = 0; i < d->n_disks; i++)
        if (show_file(agent, &d->disks[i], err) < 0)
            return -1;
    return 0;
}

static int reply_mounted(struct control_session *s, const char *dir, struct vm_error **err)
{
    struct mount_state state;
    Vmmig__Control__Mounted m = VMMIG__CONTROL__MOUNTED__INIT;
    if (mount_status(control_agent(s)->mount, &state, err) < 0)
        return -1;
    m.dir = (char *)(uintptr_t)dir;
    m.repository = state.repository;
    m.pid = state.pid;
    m.fetchers = state.fetchers;
    m.open_files = state.open_files;
    m.leases = state.leases;
    m.cache_used = state.cache_used;
    m.cache_limit = state.cache_limit;
    m.reads = state.reads;
    m.waits = state.waits;
    m.fetched_bytes = state.fetched_bytes;
    m.prefetched_bytes = state.prefetched_bytes;
    m.failed_reads = state.failed_reads;
    m.cache_full = state.cache_full;
    return control_reply(s, VMMIG__CONTROL__TYPE__MOUNTED, &m.base, err);
}

int clones_handle_mount(struct control_session *s, const struct control_message *m,
                        struct vm_error **err)
{
    struct agent *agent = control_agent(s);
    bool own = !strcmp(m->mount->dir, agent->config->mount_dir);
    /* Without a repository there is nothing to show: say so now. */
    if (!repository_get(agent->repository, err) ||
        (own ? mount_ensure(agent->mount, err) : mount_bind(agent->mount, m->mount->dir, control_peer_uid(s), err)) < 0)
        return -1;
    if (!own)
        log_info("mounted the repository", "dir=%s", log_q(m->mount->dir));
    return reply_mounted(s, m->mount->dir, err);
}

int clones_handle_unmount(struct control_session *s, const struct control_message *m,
                          struct vm_error **err)
{
    struct agent *agent = control_agent(s);
    const char *dir = m->unmount->dir;
    Vmmig__Control__Ok done = VMMIG__CONTROL__OK__INIT;
    if ((!strcmp(dir, agent->config->mount_dir) ? mount_stop(agent->mount, err)
                                                : mount_unbind(dir, err)) < 0)
        return -1;
    return control_reply(s, VMMIG__CONTROL__TYPE__OK, &done.base, err);
}

/* ---- templates ---- */

static const char *model_dir(const struct config *config, char out[4096])
{
    snprintf(out, 4096, "%s/models", config->state_dir);
    return out;
}

struct template_answer {
    Vmmig__Control__TemplateInfo info;
    struct template template;
    char ref[REF_BYTES];
};

struct template_list {
    struct template_answer **list;
    size_t n;
    const char *after; /* "": all of them */
};

static int add_template(const struct template *t, void *arg, struct vm_error **err)
{
    struct template_list *l = arg;
    char ref[REF_BYTES];
    snprintf(ref, sizeof(ref), "%s%c%s", t->name, *t->tag ? ':' : '@', *t->tag ? t->tag : t->digest);
    if (strcmp(ref, l->after) <= 0)
        return 0;
    struct template_answer *a = calloc(1, sizeof(*a));
    struct template_answer **list = a ? realloc(l->list, (l->n + 1) * sizeof(*list)) : NULL;
    if (!list) {
        free(a);
        return error_nomem(err);
    }
    l->list = list;
    vmmig__control__template_info__init(&a->info);
    a->template = *t;
    strcpy(a->ref, ref);
    a->info.template_ = a->ref;
    a->info.name = a->template.name;
    a->info.tag = a->template.tag;
    a->info.digest = a->template.digest;
    a->info.source = a->template.source;
    a->info.size = t->size;
    a->info.published_ns = (int64_t)t->published_s * NSEC_PER_SEC;
    a->info.working_set = t->has_working_set;
    l->list[l->n++] = a;
    return 0;
}

static int by_name(const void *a, const void *b)
{
    const struct template_answer *const *x = a, *const *y = b;
    return strcmp((*x)->ref, (*y)->ref);
}

static int send_templates(struct control_session *s, const struct template_list *l, struct vm_error **err)
{
    Vmmig__Control__TemplateInfo *infos[CONTROL_TEMPLATES_MAX];
    Vmmig__Control__Templates m = VMMIG__CONTROL__TEMPLATES__INIT;
    m.n_templates = l->n < CONTROL_TEMPLATES_MAX ? l->n : CONTROL_TEMPLATES_MAX;
    for (size_t i = 0; i < m.n_templates; i++)
        infos[i] = &l->list[i]->info;
    m.templates = infos;
    m.left_out = l->n - m.n_templates;
    return control_reply(s, VMMIG__CONTROL__TYPE__TEMPLATES, &m.base, err);
}

/* Sends the list, if r is 0, and frees it. */
static int reply_templates(struct control_session *s, struct template_list *l, int r,
                           struct vm_error **err)
{
    if (l->n)
        qsort(l->list, l->n, sizeof(*l->list), by_name);
    if (r == 0)
        r = send_templates(s, l, err);
    for (size_t i = 0; i < l->n; i++)
        free(l->list[i]);
    free(l->list);
    return r;
}

static struct store *get_store(struct control_session *s, struct vm_error **err)
{
    struct repo *r = repository_get(control_agent(s)->repository, err);
    return r ? repo_store(r) : NULL;
}

int clones_handle_publish(struct control_session *s, const struct control_message *m,
                          struct vm_error **err)
{
    struct template_list list = {.after = ""};
    struct template t;
    if (control_check_publisher(s, err) < 0)
        return -1;
    struct store *store = get_store(s, err);
    if (!store ||
        template_publish(store, m->template_publish->image, m->template_publish->template_, &t,
                         err) < 0)
        return -1;
    log_info("published a template", "template=%s digest=%s source=%s",
             m->template_publish->template_, t.digest, t.source);
    return reply_templates(s, &list, add_template(&t, &list, err), err);
}

int clones_handle_list(struct control_session *s, const struct control_message *m,
                       struct vm_error **err)
{
    struct template_list list = {.after = m->template_list->after};
    struct store *store = get_store(s, err);
    return store ? reply_templates(s, &list, template_list(store, add_template, &list, err), err)
                 : -1;
}

int clones_handle_show(struct control_session *s, const struct control_message *m,
                       struct vm_error **err)
{
    struct template_list list = {.after = ""};
    struct template t;
    struct store *store = get_store(s, err);
    if (!store || template_find(store, m->template_show->template_, &t, NULL, err) < 0)
        return -1;
    return reply_templates(s, &list, add_template(&t, &list, err), err);
}

int clones_handle_delete(struct control_session *s, const struct control_message *m,
                         struct vm_error **err)
{
    Vmmig__Control__Ok done = VMMIG__CONTROL__OK__INIT;
    if (control_check_publisher(s, err) < 0)
        return -1;
    struct repo *r = repository_get(control_agent(s)->repository, err);
    char models[4096];
    if (!r || template_delete(repo_store(r), m->template_delete->template_, err) < 0)
        return -1;
    clone_sweep_models(r, model_dir(control_agent(s)->config, models));
    log_info("deleted a template", "template=%s", m->template_delete->template_);
    return control_reply(s, VMMIG__CONTROL__TYPE__OK, &done.base, err);
}

/* ---- clones ---- */

struct cloning {
    struct agent *agent;
    const Vmmig__Control__Clone *m;
    struct repo *repo;
    struct qemu_name_map taps[CONTROL_SETTINGS_MAX];
    unsigned n_taps;
    bool keep_macs;
    char model_dir[4096];
    uid_t uid;
    gid_t gid;
    struct driver_place place; /* of the one that is being started */
    struct making making;
    pthread_mutex_t lock; /* guards these three */
    bool cancelled, done;
    struct process_identity process; /* that makes no VM of the agent yet; pid 0: none */
    char name[VM_NAME_MAX + 16];
    unsigned n; /* that run */
    char names[CONTROL_CLONES_MAX][VM_NAME_MAX + 1];
    struct qemu_clone_notes notes[CONTROL_CLONES_MAX];
    char *note_list[CONTROL_CLONES_MAX][QEMU_CLONE_NOTES_MAX];
    char refs[CONTROL_CLONES_MAX][REF_BYTES];
    Vmmig__Control__CloneInfo infos[CONTROL_CLONES_MAX], *list[CONTROL_CLONES_MAX];
};

static int take_settings(struct cloning *c, struct vm_error **err)
{
    for (size_t i = 0; i < c->m->n_sets; i++) {
        const char *key = c->m->sets[i]->key, *value = c->m->sets[i]->value;
        if (strcmp(key, "mac")) {
            c->taps[c->n_taps++] = (struct qemu_name_map){key, value};
            continue;
        }
        if (strcmp(value, "auto") && strcmp(value, "keep"))
            return error_set(err, VM_ERROR_USAGE, "--set mac=%.40s: auto or keep is expected",
                             value);
        c->keep_macs = !strcmp(value, "keep");
    }
    return 0;
}

/* Room for the VM's record, before anything is started. The clone's own command line differs from this one by names. */
static int reserve(struct cloning *c, const struct qemu_definition *d, struct vm_error **err)
{
    struct vm_definition future = {.origin = VM_ORIGIN_RUN,
                                   .argv = d->argv,
                                   .driver = driver_of_definition(d),
                                   .socket_path = c->place.socket_path};
    strcpy(future.name, c->name);
    return vms_reserve(c->agent->vms, &future, err);
}

/* ---- cancelling ---- */

static const char cancelled[] = "cancelled";

/* Whoever waits for the VMM that is being started learns that it has ended. */
static int cancel(void *arg, struct vm_error **err)
{
    struct cloning *c = arg;
    SCOPE_LOCK(&c->lock);
    if (c->done)
        return error_set(err, VM_ERROR_REFUSED, "too late: the clone runs");
    c->cancelled = true;
    if (c->process.pid)
        process_kill(&c->process, 0, NULL);
    return 0;
}

static bool is_cancelled(struct cloning *c)
{
    SCOPE_LOCK(&c->lock);
    return c->cancelled;
}

/* -1: it was cancelled before. Of all that is being cloned. */
static int close_cancel(struct cloning *c, struct vm_error **err)
{
    SCOPE_LOCK(&c->lock);
    c->done = !c->cancelled;
    return c->done ? 0 : error_set(err, VM_ERROR_CANCELLED, cancelled);
}

static int note_process(const struct process_identity *process, void *arg, struct vm_error **err)
{
    struct cloning *c = arg;
    SCOPE_LOCK(&c->lock);
    if (c->cancelled)
        return error_set(err, VM_ERROR_CANCELLED, cancelled);
    c->process = *process;
    return making_born(process, &c->making, err);
}

static void forget_process(struct cloning *c)
{
    SCOPE_LOCK(&c->lock);
    c->process.pid = 0;
}

/* What all launches on this host have in common. */
static int prepare_launch(void *arg, const struct qemu_definition *d, struct qemu_launch *launch,
                          struct vm_error **err)
{
    struct cloning *c = arg;
    const struct config *config = c->agent->config;
    *launch = (struct qemu_launch){.binary = driver_find_binary(config, d, err), .user = config->vm_user};
    if (!launch->binary)
        return -1;
    driver_place_finish(&c->place);
    c->place.socket_path = driver_socket_path(config, c->name, driver_of_definition(d));
    if (!c->place.socket_path ||
        asprintf(&c->place.log_path, "%s/%s.log", config->log_dir, c->name) < 0)
        return error_nomem(err);
    if (*config->vm_cgroup &&
        asprintf(&c->place.cgroup, "%s/%s", config->vm_cgroup, c->name) < 0)
        return error_nomem(err);
    if (making_socket(&c->making, c->place.socket_path, err) < 0 ||
        (c->place.cgroup && making_cgroup(&c->making, c->place.cgroup, err) < 0) || reserve(c, d, err) < 0)
        return -1;
    launch->born = note_process;
    launch->born_arg = c;
    launch->qmp_path = c->place.socket_path;
    launch->log_path = c->place.log_path;
    launch->cgroup = c->place.cgroup;
    return 0;
}

static void describe(struct cloning *c, const struct clone *made, int64_t asked_ns)
{
    unsigned i = c->n;
    Vmmig__Control__CloneInfo *info = &c->infos[i];
    vmmig__control__clone_info__init(info);
    strcpy(c->names[i], c->name);
    snprintf(c->refs[i], REF_BYTES, "%s@%s", made->template.name, made->template.digest);
    c->notes[i] = made->notes;
    for (unsigned k = 0; k < made->notes.n; k++)
        c->note_list[i][k] = c->notes[i].text[k];
    info->vm = c->names[i];
    info->pid = made->guest->process.pid;
    info->template_ = c->refs[i];
    info->start_ns = made->timing.running_ns - made->timing.spawned_ns;
    info->total_ns = clock_mono_ns() - asked_ns;
    info->notes = c->note_list[i];
    info->n_notes = made->notes.n;
    c->list[i] = info;
}

/* Nothing of it is left. */
static void end_clone(struct cloning *c, const struct vm_definition *d, struct guest *guest)
{
    guest_kill(guest, KILL_TIMEOUT_MS, NULL);
    unlink(d->socket_path);
    driver_forget_dead(d, (void *)(uintptr_t)c->agent->config);
    snapshots_forget_frozen(c->agent->config, &d->process);
    clone_remove_disks(c->agent->config->clone_dir, d->name);
}

/* Into the registry. */
static int keep(struct cloning *c, const struct clone *made, struct vm_error **err)
{
    cleanup_vm_definition struct vm_definition copy = {0};
    struct guest *guest = guest_ref(made->guest);
    struct vm_definition d = {.origin = VM_ORIGIN_RUN,
                              .argv = made->argv,
                              .driver = driver_of(guest),
                              .socket_path = c->place.socket_path,
                              .process = guest->process,
                              .since_ns = clock_wall_ns()};
    strcpy(d.name, c->name);
    if (vm_definition_copy(&d, &copy, err) == 0 && vms_add(c->agent->vms, &copy, &guest, err) == 0)
        return 0;
    end_clone(c, &d, guest);
    guest_unref(guest);
    return -1;
}

static int note_made(void *arg, const char *path, struct vm_error **err)
{
    struct cloning *c = arg;
    return making_file(&c->making, path, err);
}

static int clone_claimed(struct cloning *c, int64_t asked_ns, struct vm_error **err)
{
    struct clone made;
    struct clone_params params = {
        .repo = c->repo,
        .mount = c->agent->mount,
        .template = c->m->template_,
        .name = c->name,
        .disk_dir = c->agent->config->clone_dir,
        .model_dir = c->model_dir,
        .taps = c->taps,
        .n_taps = c->n_taps,
        .keep_macs = c->keep_macs,
        .disk_size = c->m->disk_size,
        .memory = c->m->memory,
        .prepare = prepare_launch,
        .made = note_made,
        .arg = c,
        .thawer = snapshots_thawer(c->agent->config),
        .uid = c->uid,
        .gid = c->gid,
    };
    if (vms_check_free(c->agent->vms, c->name, err) < 0 ||
        making_begin(&c->making, c->agent->config, c->name, err) < 0 ||
        clone_start(&params, &made, err) < 0)
        return -1;
    /* It is a VM of this agent as soon as it runs: what it is told takes long, and may not cost it. */
    CLEANUP(guest) struct guest *guest = made.guest;
    forget_process(c);
    int r = keep(c, &made, err);
    if (r == 0) {
        clone_tell(&params, &made);
        describe(c, &made, asked_ns);
        (void)FAULT("clone.kept");
        log_info("cloned a VM", "vm=%s template=%s pid=%d start_us=%lld", c->name, c->refs[c->n],
                 c->infos[c->n].pid, (long long)(c->infos[c->n].start_ns / 1000));
        c->n++;
    }
    clone_finish(&made);
    return r;
}

static int clone_one(struct cloning *c, int64_t asked_ns, struct vm_error **err)
{
    c->making = MAKING_NONE;
    int r = clone_claimed(c, asked_ns, err);
    forget_process(c);
    if (r < 0) {
        vms_release(c->agent->vms, c->name);
        if (c->place.cgroup)
            rmdir(c->place.cgroup);
    }
    making_end(&c->making);
    return r;
}

/* One of several failed: the others go, too. Nobody else did anything with them: they are claimed still. */
static void undo(struct cloning *c)
{
    for (unsigned i = 0; i < c->n; i++) {
        CLEANUP(vm) struct vm *vm = vms_get(c->agent->vms, c->names[i], NULL);
        CLEANUP(guest) struct guest *guest = vm ? vm_guest(vm) : NULL;
        if (!guest || guest->process.pid != c->infos[i].pid) /* it ended, and another has its name */
            continue;
        end_clone(c, vm_definition(vm), guest);
        vms_remove(c->agent->vms, c->names[i], NULL);
    }
}

static unsigned count_of(const struct cloning *c)
{
    return c->m->count ? c->m->count : 1;
}

static void name_clone(struct cloning *c, unsigned i)
{
    if (c->m->count)
        snprintf(c->name, sizeof(c->name), "%s-%u", c->m->as, i + 1);
    else
        snprintf(c->name, sizeof(c->name), "%s", c->m->as);
}

/* All of them, so that the first is nobody else's while the last is being made. *ret_n are. */
static int claim(struct cloning *c, unsigned *ret_n, struct vm_error **err)
{
    for (*ret_n = 0; *ret_n < count_of(c); ++*ret_n) {
        name_clone(c, *ret_n);
        if (vm_name_check(c->name, err) < 0 ||
            job_claim_cancellable(c->agent->jobs, c->name, "clone", cancel, c, err) < 0)
            return error_wrap(err, "clone %s", c->name);
    }
    return 0;
}

static void release(struct cloning *c, unsigned n)
{
    for (unsigned i = 0; i < n; i++) {
        name_clone(c, i);
        job_release(c->agent->jobs, c->name);
    }
}

/* Why it failed is that its VMM was killed, or whatever: it was cancelled. */
static int explain(struct cloning *c, struct vm_error **err)
{
    if (!is_cancelled(c))
        return error_wrap(err, "clone %s", c->name);
    error_clear(err);
    return error_set(err, VM_ERROR_CANCELLED, "clone %s: %s", c->name, cancelled);
}

static int make_all(struct cloning *c, struct vm_error **err)
{
    int r = 0;
    for (unsigned i = 0; r == 0 && i < count_of(c); i++) {
        name_clone(c, i);
        r = is_cancelled(c) ? error_set(err, VM_ERROR_CANCELLED, cancelled) : clone_one(c, clock_mono_ns(), err);
    }
    if (r == 0 && close_cancel(c, err) == 0)
        return 0;
    undo(c);
    return explain(c, err);
}

static int clone_all(struct cloning *c, struct vm_error **err)
{
    unsigned claimed;
    int r = claim(c, &claimed, err) < 0 ? -1 : make_all(c, err);
    release(c, claimed);
    return r;
}

int clones_handle_clone(struct control_session *s, const struct control_message *m,
                        struct vm_error **err)
{
    struct agent *agent = control_agent(s);
    struct cloning *c = calloc(1, sizeof(*c));
    if (!c)
        return error_nomem(err);
    c->agent = agent;
    c->m = m->clone;
    pthread_mutex_init(&c->lock, NULL);
    model_dir(agent->config, c->model_dir);
    c->repo = repository_get(agent->repository, err);
    int r = !c->repo || take_settings(c, err) < 0 ||
                    find_vm_user(agent->config, &c->uid, &c->gid, err) < 0
                ? -1
                : clone_all(c, err);
    if (r == 0) {
        Vmmig__Control__Clones answer = VMMIG__CONTROL__CLONES__INIT;
        answer.clones = c->list;
        answer.n_clones = c->n;
        r = control_reply(s, VMMIG__CONTROL__TYPE__CLONES, &answer.base, err);
    }
    driver_place_finish(&c->place);
    pthread_mutex_destroy(&c->lock);
    free(c);
    return r;
}

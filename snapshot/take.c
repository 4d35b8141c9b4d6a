/* SPDX-License-Identifier: Apache-2.0 */
#include "snapshot/snapshot.h"

#include "base/clock.h"
#include "base/fault.h"
#include "base/io.h"
#include "base/log.h"
#include "base/process.h"
#include "repo/template.h"
#include "snapshot/chain.h"
#include "snapshot/disk_target.h"
#include "snapshot/guest_agent.h"
#include "snapshot/take_attach.h"
#include "snapshot/taking.h"
#include "vmm/qemu.h"
#include "vmm/qemu_preflight.h"
#include "vmm/qemu_snapshot.h"
#include "vmm/qemu_settings.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define GUEST_AGENT_NS (10 * NSEC_PER_SEC)
#define STILL_NS (20 * NSEC_PER_SEC)
#define FORMER_NS (120 * NSEC_PER_SEC)
#define RESUME_NS (30 * NSEC_PER_SEC)
#define PRECOPY_LOOK_NS (5 * NSEC_PER_MSEC)
#define TARGET_NS (60 * NSEC_PER_SEC)
#define STEP_NS (100 * NSEC_PER_MSEC)

enum { PRECOPY_REST = 16 << 20, PRECOPY_ROUNDS = 8 };

struct take {
    struct taking s;
    struct qemu *qemu;

    struct qemu_snapshot *disks;
    unsigned n_disks;
    struct disk_target *targets[QEMU_SNAPSHOT_DISKS_MAX];
    struct guest_agent *guest_agent;
    char frozen[FROZEN_PATH_MAX]; /* the note of it */
    struct vm_error *stands;      /* why they could not be thawed */
    struct guard *guard;
    bool precopy; /* memory is copied before the instant, since it cannot be write-protected */
    char *sockets[QEMU_SNAPSHOT_DISKS_MAX]; /* at which targets wait for QEMU */
    char prefix[QEMU_SNAPSHOT_PREFIX_MAX], parent_prefix[QEMU_SNAPSHOT_PREFIX_MAX];
    bool layers[QEMU_SNAPSHOT_DISKS_MAX]; /* disks that are overlays upon the parent's, and read as such */
};

static void note(struct take *t, const char *text)
{
    char *out = t->s.report->note;
    size_t n = strlen(out);
    snprintf(out + n, SNAPSHOT_NOTE_MAX - n, "%s%s", n ? "; " : "", text);
}

/* ---- before the instant ---- */

/* How memory is taken: write-protected, if QEMU can do that to a guest that runs. */
static int choose_way(struct take *t, struct vm_error **err)
{
    cleanup_error struct vm_error *cannot = NULL;
    char text[SNAPSHOT_NOTE_MAX];
    if (t->s.p->disk_only)
        return 0;
    t->precopy = true;
    if (!t->s.was_running)
        return 0;
    if (qemu_snapshot_can_protect(t->qemu, &cannot) == 0) {
        t->precopy = false;
        return 0;
    }
    if (cannot->kind != VM_ERROR_REFUSED)
        return error_propagate(err, steal_ptr(&cannot));
    snprintf(text, sizeof(text), "memory was copied before the pause, since it cannot be "
             "write-protected: %.120s", error_message(cannot));
    note(t, text);
    return 0;
}

static int look_at_vm(struct take *t, struct vm_error **err)
{
    struct qemu_definition *d = &t->s.vm.definition;
    struct guest_status status;
    if (guest_status(t->s.p->guest, &status, err) < 0)
        return -1;
    if (status.state == GUEST_POSTMIGRATE)
        return error_set(err, VM_ERROR_REFUSED,
                         "the guest stands as QEMU last gave its memory away, for a snapshot or a migration, and "
                         "QEMU does that once: resume it first");
    snprintf(t->s.vm.name, sizeof(t->s.vm.name), "%s", t->s.p->vm);
    if (qemu_snapshot_wait_former(t->qemu, clock_mono_ns() + FORMER_NS, t->s.p->cancel_fd, err) < 0 ||
        qemu_preflight(t->qemu, false, d, err) < 0 || qemu_json_name_files(&t->s.vm, err) < 0)
        return -1;
    for (unsigned i = 0; i < d->n_disks; i++)
        if (!d->disks[i].writable)
            t->s.vm.disk_files[i][0] = 0;
    t->s.was_running = d->state == GUEST_RUNNING;
    return choose_way(t, err);
}

/*
 * The names of a snapshot's bitmaps: no other image of this repository, and no other repository, has them.
 */
static void bitmap_prefix(const struct repo *r, uint64_t writer, char out[QEMU_SNAPSHOT_PREFIX_MAX])
{
    const struct uuid *u = repo_uuid(r);
    snprintf(out, QEMU_SNAPSHOT_PREFIX_MAX, "vmmig-%02x%02x%02x%02x%02x%02x-%" PRIx64, u->bytes[0],
             u->bytes[1], u->bytes[2], u->bytes[3], u->bytes[4], u->bytes[5], writer);
}

/* Do the parent's disks have the sizes of those that are here? */
static bool sizes_fit(const struct take *t, const struct image *parent)
{
    unsigned n;
    const struct qemu_snapshot_disk *disks = qemu_snapshot_disks(t->disks, &n);
    for (unsigned i = 0; i < n; i++) {
        const struct image_entry *e = image_find_file(parent, t->s.vm.disk_files[disks[i].number]);
        if (!e || e->size != disks[i].size)
            return false;
    }
    return true;
}

/* Is the disk of a clone: an overlay on a file of a template's version, whose content never changes? */
static bool is_cloned(const struct take *t, const struct qemu_snapshot_disk *disk,
                      char ret_image[IMAGE_NAME_MAX + 1], char ret_file[IMAGE_FILE_NAME_MAX + 1])
{
    return t->s.p->mount && *disk->backing &&
           mount_has(t->s.p->mount, disk->backing, t->s.p->guest->process.pid, ret_image, ret_file) &&
           template_is_version(ret_image);
}

/* A clone's disks have the names that they have in the template. */
static void name_cloned(struct take *t)
{
    unsigned n;
    const struct qemu_snapshot_disk *disks = qemu_snapshot_disks(t->disks, &n);
    char image[IMAGE_NAME_MAX + 1], file[IMAGE_FILE_NAME_MAX + 1];
    for (unsigned i = 0; i < n; i++) {
        char *name = t->s.vm.disk_files[disks[i].number];
        if (!is_cloned(t, &disks[i], image, file) || strlen(file) > QEMU_JSON_FILE_MAX)
            continue;
        for (unsigned k = 0; k < t->s.vm.definition.n_disks; k++)
            if (k != disks[i].number && !strcmp(t->s.vm.disk_files[k], file))
                strcpy(t->s.vm.disk_files[k], name);
        memmove(name, file, strlen(file) + 1);
    }
}

/* Does the disk differ from what that image has in its file of the same name by its overlay alone? */
static bool is_layer_upon(const struct take *t, const struct qemu_snapshot_disk *disk,
                          const struct image *image)
{
    char found[IMAGE_NAME_MAX + 1], file[IMAGE_FILE_NAME_MAX + 1];
    if (!is_cloned(t, disk, found, file) || strcmp(found, image->name) ||
        strcmp(file, t->s.vm.disk_files[disk->number]))
        return false;
    const struct image_entry *e = image_find_file(image, file);
    return e && e->size == disk->backing_size && e->size <= disk->size;
}

/* *ret_template: the version that the first of its cloned disks is upon; its name is "" if there is none. */
static int find_template(struct take *t, struct image *ret_template, struct vm_error **err)
{
    unsigned n;
    const struct qemu_snapshot_disk *disks = qemu_snapshot_disks(t->disks, &n);
    char image[IMAGE_NAME_MAX + 1], file[IMAGE_FILE_NAME_MAX + 1];
    cleanup_error struct vm_error *gone = NULL;
    ret_template->name[0] = 0;
    for (unsigned i = 0; i < n; i++) {
        if (!is_cloned(t, &disks[i], image, file))
            continue;
        if (catalogue_find(repo_store(t->s.p->repo), image, ret_template, &gone) == 0)
            return 0;
        ret_template->name[0] = 0;
        if (gone->kind != VM_ERROR_NOT_FOUND)
            return error_propagate(err, steal_ptr(&gone));
        note(t, "disks were read whole: their template was deleted");
        return 0;
    }
    return 0;
}

/* Without a note of what was written since the last snapshot: what is known from the template. 1: something is. */
static int choose_layers(struct take *t, struct image *parent, struct vm_error **err)
{
    unsigned n, found = 0;
    const struct qemu_snapshot_disk *disks = qemu_snapshot_disks(t->disks, &n);
    cleanup_free struct image *template = malloc(sizeof(*template));
    if (!template)
        return error_nomem(err);
    if (find_template(t, template, err) < 0)
        return -1;
    for (unsigned i = 0; *template->name && i < n; i++)
        found += t->layers[i] = is_layer_upon(t, &disks[i], template);
    if (found)
        *parent = *template;
    return found > 0;
}

/* *ret_prefix stays empty if the disks have to be read whole, or by their layers. */
static int choose_parent(struct take *t, struct image *parent,
                         char ret_prefix[QEMU_SNAPSHOT_PREFIX_MAX], struct vm_error **err)
{
    char prefix[QEMU_SNAPSHOT_PREFIX_MAX];
    ret_prefix[0] = 0;
    if (snapshot_newest(t->s.p->repo, t->s.p->vm, parent, err) < 0)
        return -1;
    bitmap_prefix(t->s.p->repo, parent->writer, prefix);
    if (parent->name[0] && qemu_snapshot_has_bitmap(t->disks, prefix) && sizes_fit(t, parent)) {
        memcpy(ret_prefix, prefix, sizeof(prefix));
        return 0;
    }
    int r = choose_layers(t, parent, err);
    if (r)
        return r < 0 ? -1 : 0;
    if (parent->name[0] && t->n_disks)
        note(t, "disks were read whole: QEMU has no note of what was written since the last "
                "snapshot");
    return 0;
}

static int open_targets(struct take *t, struct vm_error **err)
{
    unsigned n;
    uid_t user = 0;
    const struct qemu_snapshot_disk *disks = qemu_snapshot_disks(t->disks, &n);
    if (n && (process_user(t->s.p->guest->process.pid, &user, err) < 0 ||
              io_make_folders(t->s.p->socket_dir, 0711, err) < 0))
        return -1;
    for (unsigned i = 0; i < n; i++) {
        const char *name = t->s.vm.disk_files[disks[i].number];
        if (asprintf(&t->sockets[i], "%s/%s-%u", t->s.p->socket_dir, t->s.p->vm, i) < 0) {
            t->sockets[i] = NULL;
            return error_nomem(err);
        }
        struct disk_target_params p = {.gather = t->s.gather,
                                       .file =
                                           image_session_file(t->s.session, name, disks[i].size, err),
                                       .size = disks[i].size,
                                       .plugin = t->s.p->plugin,
                                       .socket_path = t->sockets[i],
                                       .user = user};
        if (!p.file || !(t->targets[i] = disk_target_create(&p, err)))
            return -1;
        t->s.report->disk_bytes += disks[i].size;
    }
    return 0;
}

static struct qemu_snapshot_params disk_params(const struct take *t)
{
    return (struct qemu_snapshot_params){.nbd_sockets = t->sockets,
                                         .scratch_dir = t->s.p->scratch_dir,
                                         .bitmap = t->prefix,
                                         .layers = t->layers,
                                         .parent = *t->parent_prefix ? t->parent_prefix : NULL};
}

static int begin_image(struct take *t, struct vm_error **err)
{
    cleanup_free struct image *parent = calloc(1, sizeof(*parent));
    if (!parent)
        return error_nomem(err);
    t->disks = qemu_snapshot_create(t->qemu, &t->s.vm.definition, err);
    if (!t->disks)
        return -1;
    qemu_snapshot_disks(t->disks, &t->n_disks);
    name_cloned(t);
    if (choose_parent(t, parent, t->parent_prefix, err) < 0 || taking_begin(&t->s, parent, err) < 0)
        return -1;
    bitmap_prefix(t->s.p->repo, image_session_number(t->s.session), t->prefix);
    return 0;
}

static int prepare_disks(struct take *t, struct vm_error **err)
{
    t->guard = guard_start(&t->s.p->guard, err);
    if (!t->guard || open_targets(t, err) < 0)
        return -1;
    if (t->precopy)
        return qemu_snapshot_mark(t->disks, err);
    struct qemu_snapshot_params disks = disk_params(t);
    return qemu_snapshot_prepare(t->disks, &disks, err);
}

static int open_image(struct take *t, struct vm_error **err)
{
    if (begin_image(t, err) < 0 || prepare_disks(t, err) < 0)
        return -1;
    struct memory_image_setup memory = {.vm = t->s.vm.ram_files ? &t->s.vm : NULL,
                                        .session = t->s.session,
                                        .gather = t->s.gather,
                                        .scratch_dir = t->s.p->scratch_dir,
                                        .guard = t->guard,
                                        .repeats = t->precopy};
    if (t->s.p->disk_only)
        return 0;
    t->s.report->memory_bytes = t->s.vm.definition.memory;
    t->s.memory = memory_image_create(&memory, err);
    return t->s.memory ? 0 : -1;
}

/* ---- the instant ---- */

/*
 * What an earlier snapshot could not thaw is thawed first: what is frozen already cannot be frozen.
 * A path of the command line, which may be a snapshot's, is the VM's own; one that the user names
 * may be anybody's.
 */
static int freeze_through(struct take *t, const char *path, struct vm_error **err)
{
    int64_t deadline = clock_mono_ns() + GUEST_AGENT_NS;
    const struct process_identity *vmm = t->s.p->guest_agent ? NULL : &t->s.p->guest->process;
    t->guest_agent = guest_agent_open(path, vmm, deadline, err);
    if (!t->guest_agent)
        return -1;
    if (frozen_is_noted(t->frozen)) {
        if (guest_agent_thaw(t->guest_agent, deadline, err) < 0)
            return error_wrap(err, "still frozen since an earlier snapshot");
        frozen_forget(t->frozen);
    }
    if (frozen_note(t->frozen, path, err) < 0)
        return -1;
    int r = guest_agent_freeze(t->guest_agent, deadline, &t->s.report->frozen, err);
    if (!guest_agent_is_frozen(t->guest_agent))
        frozen_forget(t->frozen);
    return r;
}

/* If it fails somebody else goes on trying, and t->stands is what the guest's user should know. */
static void thaw(struct take *t)
{
    const struct guard_params *guard = &t->s.p->guard;
    cleanup_error struct vm_error *nobody = NULL;
    CLEANUP(guest_agent) struct guest_agent *ga = steal_ptr(&t->guest_agent);
    if (!ga || !guest_agent_is_frozen(ga))
        return;
    if (guest_agent_thaw(ga, clock_mono_ns() + GUEST_AGENT_NS, &t->stands) == 0)
        frozen_forget(t->frozen);
    else if (frozen_thaw_later(&guard->thawer, &guard->process, &nobody) < 0)
        error_wrap(&t->stands, "the guest's file systems may still be frozen: thaw them by hand (%s)",
                   error_message(nobody));
    else
        error_wrap(&t->stands, "the guest's file systems may still be frozen; trying again to thaw them "
                               "until they are");
}

/* File systems hold still: must be so if the user named the agent, is good to have if not. */
static int freeze(struct take *t, struct vm_error **err)
{
    cleanup_error struct vm_error *failed = NULL;
    char text[SNAPSHOT_NOTE_MAX];
    cleanup_free char *found =
        t->s.p->guest_agent || !t->s.was_running
            ? NULL
            : guest_agent_find(t->s.vm.definition.argv, t->s.vm.definition.cwd);
    const char *path = t->s.p->guest_agent ? t->s.p->guest_agent : found;
    if (!path)
        return 0;
    if (!t->s.was_running)
        return error_set(err, VM_ERROR_REFUSED, "the guest is paused: its agent cannot answer");
    if (freeze_through(t, path, &failed) == 0)
        return 0;
    if (t->s.p->guest_agent)
        return error_propagate(err, steal_ptr(&failed));
    snprintf(text, sizeof(text), "file systems were not frozen: %s", error_message(failed));
    note(t, text);
    thaw(t);
    return 0;
}

/* What the instant will find: looked at before it, since whoever else tries to thaw may succeed after it. */
static int hold_still(struct take *t, struct vm_error **err)
{
    if (freeze(t, err) < 0)
        return -1;
    t->s.vm.frozen = frozen_is_noted(t->frozen);
    return 0;
}

static int go_on(struct take *t, struct vm_error **err)
{
    if (!t->s.memory)
        return t->s.was_running ? guest_resume(t->s.p->guest, err) : 0;
    if (qemu_source_go(t->qemu, err) < 0)
        return -1;
    FAULT("snapshot.protecting");
    return qemu_snapshot_wait_resumed(t->qemu, clock_mono_ns() + RESUME_NS, err);
}

static int switch_protected(struct take *t, struct vm_error **err)
{
    return (t->s.memory && taking_start_memory(&t->s, !t->precopy, err) < 0) || hold_still(t, err) < 0 ||
                   qemu_snapshot_switch(t->disks, err) < 0
               ? -1
               : go_on(t, err);
}

/* What is left is little, or will not become less: time to pause the guest, unless QEMU does so itself. */
static bool is_enough(const struct guest_source_progress *p)
{
    return !p->one_round && p->round > 1 &&
           (p->remaining <= PRECOPY_REST || p->round > PRECOPY_ROUNDS);
}

/* Whatever writes in the guest waits: for that long it may, and then a snapshot without that is better. */
static int limit_stillness(struct take *t, int64_t since_ns, struct vm_error **err)
{
    if (!t->guest_agent || clock_mono_ns() < since_ns + STILL_NS)
        return 0;
    if (t->s.p->guest_agent)
        return error_set(
            err, VM_ERROR_TIMEOUT,
            "file systems would stand still for longer than %d s, until memory is copied",
            (int)(STILL_NS / NSEC_PER_SEC));
    thaw(t);
    t->s.vm.frozen = frozen_is_noted(t->frozen);
    t->s.report->frozen = 0;
    note(t, "file systems did not stand still: memory took too long to copy");
    return 0;
}

/* Until QEMU gave all memory away and the guest stands. */
static int copy_before(struct take *t, struct vm_error **err)
{
    bool paused = !t->s.was_running;
    int64_t since_ns = clock_mono_ns();
    for (;;) {
        struct guest_source_progress p;
        if (limit_stillness(t, since_ns, err) < 0)
            return -1;
        int r = memory_image_wait(t->s.memory, clock_mono_ns() + PRECOPY_LOOK_NS, t->s.p->cancel_fd, err);
        if (r)
            return r < 0 ? -1 : 0;
        if (!paused && guest_source_progress(t->s.p->guest, &p, NULL) == 0 && is_enough(&p)) {
            if (guest_pause(t->s.p->guest, err) < 0)
                return -1;
            paused = true;
            FAULT("snapshot.paused");
        }
        taking_tell(&t->s, SNAPSHOT_SWITCHING);
    }
}

/* File systems hold still while memory is copied: nobody can say before when QEMU will pause the guest. */
static int switch_copied(struct take *t, struct vm_error **err)
{
    if (hold_still(t, err) < 0 || taking_start_memory(&t->s, !t->precopy, err) < 0 ||
        copy_before(t, err) < 0 || taking_stop_memory(&t->s, err) < 0)
        return -1;
    struct qemu_snapshot_params disks = disk_params(t);
    if (qemu_snapshot_switch_migrated(t->disks, &disks, err) < 0)
        return -1;
    return t->s.was_running ? guest_resume(t->s.p->guest, err) : 0;
}

static int switch_over(struct take *t, struct vm_error **err)
{
    taking_tell(&t->s, SNAPSHOT_SWITCHING);
    if ((t->precopy ? switch_copied(t, err) : switch_protected(t, err)) < 0)
        return -1;
    taking_date(&t->s);
    thaw(t);
    t->s.report->pause_ns = t->s.was_running ? qemu_snapshot_pause_ns(t->qemu) : 0;
    t->s.progress.pause_ns = t->s.report->pause_ns;
    return 0;
}

/* ---- after ---- */

/* A target that failed tells more than QEMU does about it. */
static int check_targets(struct take *t, struct vm_error **err)
{
    for (unsigned i = 0; i < t->n_disks; i++) {
        const struct vm_error *failed = t->targets[i] ? disk_target_error(t->targets[i]) : NULL;
        if (failed) {
            error_clear(err);
            return error_propagate(err, error_copy(failed));
        }
    }
    return -1;
}

static int copy(struct take *t, struct vm_error **err)
{
    bool memory = !t->s.memory || t->precopy, disks = !t->n_disks;
    if (qemu_snapshot_push(t->disks, err) < 0)
        return check_targets(t, err);
    if (t->precopy && memory_image_store_pages(t->s.memory, t->s.p->cancel_fd, err) < 0)
        return -1;
    while (!memory || !disks) {
        struct qemu_snapshot_progress p;
        int64_t until = clock_mono_ns() + STEP_NS;
        int r = disks ? 1 : qemu_snapshot_wait(t->disks, until, t->s.p->cancel_fd, &p, err);
        if (r < 0)
            return check_targets(t, err);
        if (!disks) {
            t->s.progress.disk_done = p.done;
            t->s.progress.disk_total = p.total;
        }
        disks = r;
        r = memory ? 1 : memory_image_wait(t->s.memory, disks ? until : 0, t->s.p->cancel_fd, err);
        if (r < 0)
            return -1;
        memory = r;
        taking_tell(&t->s, SNAPSHOT_COPYING);
    }
    FAULT("snapshot.copied");
    return 0;
}

/* QEMU lets go of the disks' targets; what it wrote has arrived then. */
static int detach(struct take *t, struct vm_error **err)
{
    bool found;
    if (taking_stop_memory(&t->s, err) < 0 || qemu_snapshot_sweep(t->qemu, &found, err) < 0)
        return -1;
    for (unsigned i = 0; i < t->n_disks; i++) {
        if (disk_target_finish(t->targets[i], clock_mono_ns() + TARGET_NS, t->s.p->cancel_fd, err) < 0)
            return -1;
        t->s.report->disk_read += disk_target_bytes(t->targets[i]);
    }
    return 0;
}

static int run(struct take *t, struct vm_error **err)
{
    taking_tell(&t->s, SNAPSHOT_PREPARING);
    return look_at_vm(t, err) < 0 || open_image(t, err) < 0 || switch_over(t, err) < 0 ||
                   copy(t, err) < 0 || detach(t, err) < 0
               ? -1
               : taking_commit(&t->s, err);
}

/* The guest runs, whatever happened; what else fails here is only logged, but that its file systems stand. */
static void clean_up(struct take *t, bool committed, struct vm_error **err)
{
    cleanup_error struct vm_error *failed = NULL;
    /* The rest of a large memory takes long: before it comes what the guest waits for. */
    if (!committed && qemu_snapshot_relieve(t->disks))
        thaw(t);
    if (!committed)
        FAULT("snapshot.failed");
    if (taking_stop_memory(&t->s, &failed) < 0)
        log_warn("memory's migration does not end", "error=%s", log_q(error_message(failed)));
    error_clear(&failed);
    if (qemu_snapshot_finish(t->disks, committed, &failed) < 0)
        log_warn("a snapshot leaves something in QEMU", "error=%s", log_q(error_message(failed)));
    qemu_settings_restore(t->qemu);
    thaw(t);
    if (t->stands && committed)
        note(t, error_message(t->stands));
    else if (t->stands)
        error_wrap(err, "%s, after", error_message(t->stands));
    error_clear(&t->stands);
    guard_end(t->guard);
    for (unsigned i = 0; i < t->n_disks; i++) {
        disk_target_destroy(t->targets[i]);
        free(t->sockets[i]);
    }
    taking_finish(&t->s);
}

static int take_qemu(struct qemu *q, const struct snapshot_params *params, struct snapshot_report *ret_report,
                     struct vm_error **err)
{
    struct snapshot_report report = {.pause_ns = -1};
    struct take t = {.s = {.p = params, .report = &report, .progress = {.pause_ns = -1}}, .qemu = q};
    struct vm_error *failed = NULL;
    frozen_path(&params->guard.thawer, &params->guard.process, t.frozen);
    int r = run(&t, &failed);
    clean_up(&t, r == 0, &failed);
    if (r < 0)
        return error_propagate(err, failed);
    *ret_report = report;
    return 0;
}

int snapshot_take(const struct snapshot_params *params, struct snapshot_report *ret_report,
                  struct vm_error **err)
{
    char image[IMAGE_NAME_MAX + 1];
    if (snapshot_image_name(params->vm, params->name, image, err) < 0)
        return -1;
    struct qemu *q = qemu_from_guest(params->guest);
    int r = q ? take_qemu(q, params, ret_report, err)
              : take_attach(attach_from_guest(params->guest), params, ret_report, err);
    return r < 0 ? error_wrap(err, "snapshot %s", image) : 0;
}

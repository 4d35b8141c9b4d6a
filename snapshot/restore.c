/* SPDX-License-Identifier: Apache-2.0 */
#include "snapshot/restore.h"

#include "base/clock.h"
#include "base/fault.h"
#include "base/io.h"
#include "base/log.h"
#include "snapshot/disk_file.h"
#include "snapshot/rbd_image.h"
#include "snapshot/snapshot.h"
#include "vmm/attach.h"
#include "vmm/guest_memory.h"
#include "vmm/qemu_disk_move.h"
#include "vmm/qemu_json.h"
#include "vmm/qemu_own.h"
#include "vmm/rbd_name.h"

#include <errno.h>
#include <limits.h>
#include <pwd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { PIECE = 1 << 20, BLOCK = 65536 };
#define LOAD_NS (120 * NSEC_PER_SEC)

struct restore {
    struct repo *repo;
    struct lease lease;
    bool leased, keep, boots, draft_stays;
    struct run_tool_limits limits; /* of what makes images */
    struct qemu_json vm;
    bool made[QEMU_DISKS_MAX]; /* by us */
    char (*ids)[RBD_IMAGE_ID_MAX]; /* of those that are images in Ceph, else "" */
    uint64_t done, total;
    uint8_t *buffer;
};

static const struct image_entry *entry(const struct restore *r, const char *name,
                                       struct vm_error **err)
{
    const struct image_entry *e = image_find_file(&r->lease.image, name);
    if (!e)
        error_set(err, VM_ERROR_CORRUPT, "snapshot %s has no file %s", r->lease.image.name, name);
    return e;
}

static struct file_reader *reader_of(struct restore *r, const struct image_entry *e,
                                     struct vm_error **err)
{
    return file_reader_create(repo_store(r->repo), &e->root, e->size, err);
}

/* ---- opening ---- */

static int read_definition(struct restore *r, struct vm_error **err)
{
    const struct image_entry *e = image_find_file(&r->lease.image, SNAPSHOT_DEFINITION_FILE);
    if (!e)
        return error_set(err, VM_ERROR_REFUSED, "%s is not a snapshot of a VM",
                         r->lease.image.name);
    if (e->size > QEMU_JSON_MAX)
        return error_set(err, VM_ERROR_CORRUPT, "the definition in %s is too large",
                         r->lease.image.name);
    CLEANUP(file_reader) struct file_reader *reader = reader_of(r, e, err);
    cleanup_free char *text = malloc(e->size + 1);
    if (!reader)
        return -1;
    if (!text)
        return error_nomem(err);
    if (file_reader_read(reader, 0, text, e->size, err) < 0)
        return -1;
    return qemu_json_read(text, e->size, &r->vm, err);
}

/* Memory files are the blocks, byte for byte. */
static int check_memory(struct restore *r, struct vm_error **err)
{
    const struct qemu_definition *d = &r->vm.definition;
    for (unsigned i = 0; i < d->n_ram; i++) {
        const struct image_entry *e = entry(r, r->vm.ram_files[i], err);
        if (!e)
            return -1;
        if (e->size != d->ram[i].size)
            return error_set(err, VM_ERROR_CORRUPT, "%s of snapshot %s is not the VM's memory",
                             e->name, r->lease.image.name);
        r->total += e->size;
    }
    return 0;
}

static int check_files(struct restore *r, struct vm_error **err)
{
    const struct qemu_definition *d = &r->vm.definition;
    r->boots = !image_find_file(&r->lease.image, SNAPSHOT_STATE_FILE);
    if (!r->boots && check_memory(r, err) < 0)
        return -1;
    for (unsigned i = 0; i < d->n_disks; i++) {
        const struct image_entry *e =
            *r->vm.disk_files[i] ? entry(r, r->vm.disk_files[i], err) : NULL;
        if (*r->vm.disk_files[i] && !e)
            return -1;
        r->total += e ? e->size : 0;
    }
    return 0;
}

bool restore_boots(const struct restore *r)
{
    return r->boots;
}

struct restore *restore_open(struct repo *repo, const char *image, const char *holder, int cancel_fd,
                             struct vm_error **err)
{
    CLEANUP(restore) struct restore *r = calloc(1, sizeof(*r));
    if (!r || !(r->buffer = malloc(PIECE))) {
        error_nomem(err);
        return NULL;
    }
    r->repo = repo;
    r->limits.cancel_fd = cancel_fd;
    if (catalogue_lease(repo_store(repo), image, holder, &r->lease, err) < 0)
        return NULL;
    r->leased = true;
    if (read_definition(r, err) < 0 || check_files(r, err) < 0)
        return NULL;
    r->ids = calloc(r->vm.definition.n_disks + 1, sizeof(*r->ids));
    if (r->ids)
        return steal_ptr(&r);
    error_nomem(err);
    return NULL;
}

/* What is left is removed later; who waits for the restore's end, perhaps since Ceph is away, does
 * not wait for that. */
static const struct run_tool_limits removal = {RESTORE_REMOVE_S, -1};

/* False: it stays. */
static bool remove_disk(const struct restore *r, unsigned i)
{
    const char *file = r->vm.definition.disks[i].file;
    cleanup_error struct vm_error *failed = NULL;
    if (!rbd_image_is(file)) {
        unlink(file);
        return true;
    }
    if (rbd_image_remove(file, r->ids[i], &removal, &failed) == 0)
        return true;
    log_warn("an image of a VM that was not restored stays there for now", "error=%s", log_q(error_message(failed)));
    return false;
}

static int drop_lease(const struct restore *r, struct vm_error **err)
{
    return FAULT("restore.lease") == FAULT_ERROR ? error_errno(err, fault_errno(), "restore.lease")
                                                 : catalogue_lease_drop(repo_store(r->repo), &r->lease, err);
}

bool restore_close(struct restore *r)
{
    cleanup_error struct vm_error *failed = NULL;
    if (!r)
        return true;
    bool all = !r->draft_stays;
    for (unsigned i = 0; i < r->vm.definition.n_disks && !r->keep; i++)
        if (r->made[i] && (all || !rbd_image_is(r->vm.definition.disks[i].file)))
            all = remove_disk(r, i) && all;
    if (r->leased && drop_lease(r, &failed) < 0) {
        log_warn("a lease stays in the repository for now", "image=%s error=%s",
                 log_q(r->lease.image.name), log_q(error_message(failed)));
        all = false;
    }
    qemu_json_finish(&r->vm);
    free(r->ids);
    free(r->buffer);
    free(r);
    return all;
}

const struct qemu_definition *restore_definition(const struct restore *r)
{
    return &r->vm.definition;
}

bool restore_is_frozen(const struct restore *r)
{
    return r->vm.frozen && !r->boots;
}

int restore_thaw(const struct restore *r, const struct guest *guest, const struct thawer *thawer, bool runs,
                 struct vm_error **err)
{
    const struct qemu_definition *d = &r->vm.definition;
    return restore_is_frozen(r)
               ? frozen_thaw_restored(thawer, &guest->process, d->argv, d->cwd, runs, err)
               : 0;
}

void restore_keep(struct restore *r)
{
    r->keep = true;
}

int restore_name(struct restore *r, const char *vm, struct vm_error **err)
{
    const struct qemu_own own = {r->vm.name, vm, false};
    return !strcmp(own.former, vm) || attach_is_definition(&r->vm.definition)
               ? 0
               : qemu_own_definition(&own, &r->vm.definition, err);
}

/* ---- disks ---- */

/* VM-diskN in "rbd:POOL[/NAMESPACE]", before its options; .FORMAT behind it if that is not raw. */
static char *place_in_ceph(const char *folder, const char *vm, unsigned i, const char *format)
{
    char *to;
    size_t n = strlen("rbd:");
    while (folder[n] && folder[n] != ':')
        n += folder[n] == '\\' && folder[n + 1] ? 2 : 1;
    bool raw = !strcmp(format, "raw");
    return asprintf(&to, "%.*s/%s-disk%u%s%s%s", (int)n, folder, vm, i, raw ? "" : ".", raw ? "" : format,
                    folder + n) < 0
               ? NULL
               : to;
}

static char *place_of(const struct restore *r, unsigned i, const char *vm, const char *folder)
{
    const struct qemu_disk *k = &r->vm.definition.disks[i];
    const char *format = *k->format ? k->format : "raw";
    char *to = NULL;
    if (folder && rbd_image_is(folder))
        return place_in_ceph(folder, vm, i, format);
    int n = folder            ? asprintf(&to, "%s/%s-disk%u.%s", folder, vm, i, format)
            : *k->file == '/' ? asprintf(&to, "%s", k->file)
                              : asprintf(&to, "%s/%s", r->vm.definition.cwd, k->file);
    return n < 0 ? NULL : to;
}

static int check_nothing_there(const struct restore *r, const struct qemu_disk *k, struct vm_error **err)
{
    struct stat st;
    char id[RBD_IMAGE_ID_MAX];
    cleanup_error struct vm_error *absent = NULL;
    bool there;
    if (!rbd_image_is(k->file)) {
        there = lstat(k->file, &st) == 0;
    } else {
        there = rbd_image_id(k->file, &r->limits, id, &absent) == 0;
        if (!there && absent->kind != VM_ERROR_NOT_FOUND)
            return error_propagate(err, steal_ptr(&absent));
    }
    return there ? error_set(err, VM_ERROR_CONFLICT,
                             "disk %s: there is %s already: remove it, or say --disk-dir", k->name, k->file)
                 : 0;
}

/* One that was in Ceph and shall be there again: the command line names it, and we do as QEMU and `rbd` do. */
static int keep_in_ceph(const struct restore *r, struct qemu_disk *k, struct vm_error **err)
{
    struct rbd_name name;
    char text[RBD_NAME_TEXT_MAX];
    if (!rbd_name_parse(k->file, &name) || *name.snapshot || !rbd_name_format(&name, text))
        return error_set(err, VM_ERROR_REFUSED, "disk %s (%s) is no image that could be made: say --disk-dir",
                         k->name, k->file);
    char *file = strdup(text);
    if (!file)
        return error_nomem(err);
    free(k->file);
    k->file = file;
    return check_nothing_there(r, k, err);
}

/* Ours, if there is none. */
static int find_user(const char *user, uid_t *ret_uid, gid_t *ret_gid, struct vm_error **err)
{
    struct passwd entry_of, *found = NULL;
    char text[4096];
    *ret_uid = geteuid();
    *ret_gid = getegid();
    if (!user || !*user)
        return 0;
    if (getpwnam_r(user, &entry_of, text, sizeof(text), &found) || !found)
        return error_set(err, VM_ERROR_NOT_FOUND, "there is no user %s", user);
    *ret_uid = found->pw_uid;
    *ret_gid = found->pw_gid;
    return 0;
}

/*
 * Where the snapshot says, which whoever may write to the repository has written: so nothing is made there that the VM
 * itself might not make.
 */
static int check_is_its(const char *path, const char *user, const char *disk, struct vm_error **err)
{
    struct stat st;
    uid_t uid;
    gid_t gid;
    char folder[PATH_MAX];
    const char *slash = strrchr(path, '/');
    if (find_user(user, &uid, &gid, err) < 0)
        return -1;
    snprintf(folder, sizeof(folder), "%.*s/", slash ? (int)(slash - path) : 0, path);
    if (uid == geteuid())
        return 0;
    if (stat(folder, &st) < 0)
        return error_errno(err, errno, "disk %s: %s", disk, folder);
    return (st.st_uid == uid && st.st_mode & S_IWUSR) || (st.st_gid == gid && st.st_mode & S_IWGRP) ||
                   st.st_mode & S_IWOTH
               ? 0
               : error_set(err, VM_ERROR_REFUSED,
                           "disk %s was %s, where the user of VMs (%s) may make nothing: say --disk-dir", disk, path,
                           user);
}

static int place_disk(struct restore *r, unsigned i, const char *vm, const char *folder, const char *user,
                      struct vm_error **err)
{
    struct qemu_disk *k = &r->vm.definition.disks[i];
    if (!folder && !strcmp(k->driver, "rbd"))
        return keep_in_ceph(r, k, err);
    cleanup_free char *to = place_of(r, i, vm, folder);
    if (!to)
        return error_nomem(err);
    if (!folder && check_is_its(to, user, k->name, err) < 0)
        return -1;
    return qemu_disk_move(&r->vm.definition, i, to, err) < 0 ? -1 : check_nothing_there(r, k, err);
}

static int check_folder(const char *folder, struct vm_error **err)
{
    struct stat st;
    if (!folder || rbd_image_is(folder))
        return 0;
    if (stat(folder, &st) < 0)
        return error_errno(err, errno, "--disk-dir %s", folder);
    return S_ISDIR(st.st_mode) ? 0 : error_set(err, VM_ERROR_USAGE, "--disk-dir %s is not a folder", folder);
}

int restore_place_disks(struct restore *r, const char *vm, const char *folder, const char *user,
                        struct vm_error **err)
{
    if (check_folder(folder, err) < 0)
        return -1;
    for (unsigned i = 0; i < r->vm.definition.n_disks; i++)
        if (*r->vm.disk_files[i] && place_disk(r, i, vm, folder, user, err) < 0)
            return -1;
    return 0;
}

int restore_give_disks(const struct restore *r, const char *user, struct vm_error **err)
{
    uid_t uid;
    gid_t gid;
    if (find_user(user, &uid, &gid, err) < 0)
        return -1;
    for (unsigned i = 0; i < r->vm.definition.n_disks; i++) {
        const char *file = r->vm.definition.disks[i].file;
        if (r->made[i] && !rbd_image_is(file) && lchown(file, uid, gid) < 0)
            return error_errno(err, errno, "cannot give %s to its user", file);
    }
    return 0;
}

struct disk_making {
    struct restore *restore;
    unsigned i;
    restore_note *note;
    void *arg;
};

/* From here on it is removed if the VM does not come. */
static int disk_is_there(void *arg, struct vm_error **err)
{
    struct disk_making *m = arg;
    m->restore->made[m->i] = true;
    return m->note(m->arg, m->restore->vm.definition.disks[m->i].file, NULL, err);
}

static int make_file(struct disk_making *m, const char *format, uint64_t size, struct vm_error **err)
{
    return disk_file_make(m->restore->vm.definition.disks[m->i].file, format, size, disk_is_there, m,
                          m->restore->limits.cancel_fd, err);
}

/*
 * An image has an id only when it is there, and until then nobody could tell whose it is: so it is
 * made under a name that says so, and gets its own when its id is noted.
 */
static int draft_image(struct disk_making *m, const char *draft, const char *format, uint64_t size,
                       struct vm_error **err)
{
    struct restore *r = m->restore;
    const char *name = r->vm.definition.disks[m->i].file;
    if (m->note(m->arg, draft, RBD_IMAGE_ANY, err) < 0 ||
        disk_file_make(draft, format, size, NULL, NULL, r->limits.cancel_fd, err) < 0)
        return -1;
    FAULT("restore.drafted");
    if (rbd_image_id(draft, &r->limits, r->ids[m->i], err) < 0 || m->note(m->arg, name, r->ids[m->i], err) < 0)
        return -1;
    r->made[m->i] = true;
    return rbd_image_rename(draft, name, &r->limits, err);
}

static int make_image(struct disk_making *m, const char *format, uint64_t size, struct vm_error **err)
{
    const char *name = m->restore->vm.definition.disks[m->i].file;
    char draft[RBD_NAME_TEXT_MAX];
    cleanup_error struct vm_error *stays = NULL;
    if (rbd_image_draft(name, draft, err) < 0)
        return -1;
    if (draft_image(m, draft, format, size, err) == 0)
        return 0;
    if (rbd_image_remove(draft, RBD_IMAGE_ANY, &removal, &stays) < 0) {
        log_warn("an image of a VM that was not restored stays there for now", "error=%s", log_q(error_message(stays)));
        m->restore->draft_stays = true;
    }
    return error_wrap(err, "cannot make %s", name);
}

int restore_make_disks(struct restore *r, restore_note *note, void *arg, struct vm_error **err)
{
    for (unsigned i = 0; i < r->vm.definition.n_disks; i++) {
        const struct qemu_disk *k = &r->vm.definition.disks[i];
        const char *format = *k->format ? k->format : "raw";
        const struct image_entry *e = entry(r, r->vm.disk_files[i], NULL);
        struct disk_making making = {r, i, note, arg};
        if (e && (rbd_image_is(k->file) ? make_image(&making, format, e->size, err)
                                        : make_file(&making, format, e->size, err)) < 0)
            return -1;
    }
    return 0;
}

/* ---- content ---- */

typedef int write_fn(void *arg, uint64_t offset, const uint8_t *data, size_t len,
                     struct vm_error **err);

static bool is_zero(const uint8_t *data, size_t len)
{
    return !*data && !memcmp(data, data + 1, len - 1);
}

/* Blocks that are not zero, as many at a time as lie side by side. */
static int write_runs(const uint8_t *data, size_t n, uint64_t at, size_t block, write_fn *write,
                      void *arg, struct vm_error **err)
{
    for (size_t i = 0, run = 0; i < n; i = run) {
        size_t start = i;
        for (; start < n && is_zero(data + start, n - start < block ? n - start : block); start += block)
            ;
        for (run = start; run < n && !is_zero(data + run, n - run < block ? n - run : block); run += block)
            ;
        size_t end = run < n ? run : n;
        if (start < end && write(arg, at + start, data + start, end - start, err) < 0)
            return -1;
    }
    return 0;
}

static int pour(struct restore *r, const struct image_entry *e, size_t block, write_fn *write,
                void *arg, const struct restore_control *c, struct vm_error **err)
{
    CLEANUP(file_reader) struct file_reader *reader = reader_of(r, e, err);
    uint64_t start = 0, len = 0, before = r->done;
    if (!reader)
        return -1;
    for (uint64_t at = 0;;) {
        if (at >= start + len) {
            if (file_reader_next_data(reader, at, &start, &len, err) < 0)
                return -1;
            if (!len)
                break;
            at = start;
        }
        uint64_t left = start + len - at;
        size_t n = left < PIECE ? (size_t)left : PIECE;
        if (io_latch_is_set(c->cancel_fd))
            return error_set(err, VM_ERROR_CANCELLED, "cancelled");
        if (file_reader_read(reader, at, r->buffer, n, err) < 0)
            return -1;
        if (write_runs(r->buffer, n, at, block, write, arg, err) < 0)
            return -1;
        at += n;
        r->done = before + at;
        c->progress(c->arg, r->done, r->total);
    }
    r->done = before + e->size;
    return 0;
}

static int write_disk(void *arg, uint64_t offset, const uint8_t *data, size_t len,
                      struct vm_error **err)
{
    return disk_file_write(arg, offset, data, len, err);
}

int restore_fill_disks(struct restore *r, const struct restore_control *c, struct vm_error **err)
{
    for (unsigned i = 0; i < r->vm.definition.n_disks; i++) {
        const struct qemu_disk *k = &r->vm.definition.disks[i];
        if (!r->made[i])
            continue;
        CLEANUP(disk_file)
        struct disk_file *f = disk_file_open(k->file, *k->format ? k->format : "raw", c->cancel_fd, err);
        if (!f || pour(r, entry(r, r->vm.disk_files[i], NULL), BLOCK, write_disk, f, c, err) < 0 ||
            disk_file_finish(steal_ptr(&f), err) < 0)
            return -1;
    }
    FAULT("restore.filled");
    return 0;
}

struct memory {
    struct guest *guest;
    const struct guest_region *region;
    unsigned number;
};

/* Pages side by side, a piece at most. */
static int write_pages(void *arg, uint64_t offset, const uint8_t *data, size_t len,
                       struct vm_error **err)
{
    struct memory *m = arg;
    uint64_t addrs[PIECE / GUEST_PAGE_SIZE];
    unsigned n = 0;
    for (; n < len / GUEST_PAGE_SIZE; n++)
        addrs[n] = page_addr(m->number, offset / GUEST_PAGE_SIZE + n);
    guest_sink_populate(m->guest, addrs, n, NULL); /* else it counts as the agent's memory */
    return guest_region_write(m->region, offset, data, len, err);
}

static int load_memory(struct restore *r, struct guest *guest, const struct restore_control *c,
                       struct vm_error **err)
{
    const struct guest_region *regions;
    unsigned n;
    if (guest_sink_regions(guest, &regions, &n) < 0 || n != r->vm.definition.n_ram)
        return error_set(err, VM_ERROR_FAILED, "the VM that waits has other memory");
    for (unsigned i = 0; i < n; i++) {
        struct memory m = {guest, &regions[i], i};
        if (!guest_region_is_reachable(&regions[i]) ||
            regions[i].size != r->vm.definition.ram[i].size)
            return error_set(err, VM_ERROR_FAILED, "the memory %s of the VM that waits cannot be reached",
                             regions[i].name);
        if (pour(r, entry(r, r->vm.ram_files[i], NULL), GUEST_PAGE_SIZE, write_pages, &m, c, err) < 0)
            return -1;
    }
    return 0;
}

static int load_state(struct restore *r, struct guest *guest, const struct restore_control *c,
                      struct vm_error **err)
{
    const struct image_entry *e = entry(r, SNAPSHOT_STATE_FILE, err);
    CLEANUP(file_reader) struct file_reader *reader = e ? reader_of(r, e, err) : NULL;
    int64_t deadline = clock_mono_ns() + LOAD_NS;
    if (!reader)
        return -1;
    for (uint64_t at = 0; at < e->size;) {
        size_t n = e->size - at < PIECE ? (size_t)(e->size - at) : PIECE;
        if (file_reader_read(reader, at, r->buffer, n, err) < 0 ||
            guest_sink_bytes(guest, r->buffer, n, deadline, c->cancel_fd, err) < 0)
            return -1;
        at += n;
    }
    return guest_sink_finish(guest, deadline, c->cancel_fd, err);
}

int restore_load(struct restore *r, struct guest *guest, const struct restore_control *c,
                 struct vm_error **err)
{
    if (load_memory(r, guest, c, err) < 0)
        return -1;
    FAULT("restore.memory");
    return load_state(r, guest, c, err);
}

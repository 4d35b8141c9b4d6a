/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/qemu_snapshot.h"

#include "base/clock.h"
#include "base/fault.h"
#include "base/io.h"
#include "base/log.h"
#include "vmm/qemu_internal.h"
#include "vmm/qemu_snapshot_sweep.h"
#include "vmm/rbd_name.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/statvfs.h>
#include <sys/un.h>

enum { GRANULARITY = 65536, CBW_TIMEOUT_S = 30, NAME_MAX_TEXT = 96, SOCKET_PATH_MAX = 300, SCRATCH_FULL = 1 << 20 };
#define LOOK_AGAIN_NS (50 * NSEC_PER_MSEC)

struct disk {
    char device[QEMU_STRING_MAX]; /* QOM path of the device that has it */
    char node[64];
    char name[64]; /* for messages */
};

struct qemu_snapshot {
    struct qemu *q;
    bool was_running, marked, prepared;
    bool layers[QEMU_SNAPSHOT_DISKS_MAX];
    char bitmap[QEMU_SNAPSHOT_PREFIX_MAX + 1], parent[QEMU_SNAPSHOT_PREFIX_MAX + 1];
    unsigned n;
    struct qemu_snapshot_disk disks[QEMU_SNAPSHOT_DISKS_MAX];
    struct disk places[QEMU_SNAPSHOT_DISKS_MAX];
    json_t *nodes; /* as query-named-block-nodes said at first */
    char scratch_dir[PATH_MAX];
};

static const char *number(char out[NAME_MAX_TEXT], const char *prefix, unsigned i)
{
    snprintf(out, NAME_MAX_TEXT, "%s%u", prefix, i);
    return out;
}
#define NAME(prefix, i) number((char[NAME_MAX_TEXT]){0}, SNAPSHOT_##prefix, i)

static const char *bitmap_name(char out[NAME_MAX_TEXT], const char *prefix, unsigned i)
{
    snprintf(out, NAME_MAX_TEXT, "%s-%u", prefix, i);
    return out;
}
#define BITMAP(prefix, i) bitmap_name((char[NAME_MAX_TEXT]){0}, prefix, i)

/* ---- which disks ---- */

static int cannot(const struct qemu_disk *disk, const char *why, struct vm_error **err)
{
    return error_set(err, VM_ERROR_REFUSED, "disk %s (%s) cannot be snapshotted: %s", disk->name,
                     disk->file, why);
}

/* The guest's own access to a device of the host goes past QEMU's block layer. */
static int check_device(struct qemu *q, const struct qemu_disk *disk, const char *device,
                        struct vm_error **err)
{
    CLEANUP(json) json_t *type = NULL;
    if (qemu_command(q, "qom-get", json_pack("{s:s, s:s}", "path", device, "property", "type"),
                     &type, err) < 0)
        return -1;
    const char *name = json_is_string(type) ? json_string_value(type) : "";
    if (!strcmp(name, "scsi-generic") || !strcmp(name, "scsi-block"))
        return cannot(disk, "it is a host device passed through to the guest", err);
    return 0;
}

/* The part of the VM that has this file as its image; NULL if none has. */
static const json_t *find_backend(const json_t *backends, const char *file)
{
    size_t i;
    json_t *b;
    json_array_foreach((json_t *)(uintptr_t)backends, i, b)
    {
        if (rbd_name_same_file(qmp_string(json_object_get(b, "inserted"), "file"), file))
            return b;
    }
    return NULL;
}

/* Plain cases only: QEMU's name of anything else is no path. */
static void look_behind(struct qemu_snapshot_disk *disk, const json_t *image)
{
    const json_t *behind = json_object_get(image, "backing-image");
    const char *file = qmp_string(behind, "filename");
    json_int_t size = qmp_integer(behind, "virtual-size");
    if (*file != '/' || size <= 0 || strcmp(qmp_string(behind, "format"), "raw") ||
        json_object_get(behind, "backing-image"))
        return;
    snprintf(disk->backing, sizeof(disk->backing), "%s", file);
    disk->backing_size = (uint64_t)size;
}

static int take_disk(struct qemu_snapshot *s, const struct qemu_definition *d, unsigned which,
                     const json_t *backends, struct vm_error **err)
{
    const struct qemu_disk *disk = &d->disks[which];
    const json_t *b = find_backend(backends, disk->file);
    const json_t *inserted = json_object_get(b, "inserted");
    const char *device = qmp_string(b, "qdev"), *node = qmp_string(inserted, "node-name");
    json_int_t size = qmp_integer(json_object_get(inserted, "image"), "virtual-size");
    if (!b)
        return cannot(disk,
                      "it is open for writing, and no disk of the guest is that file (a node without a device, or "
                      "the data file of another image?)",
                      err);
    if (!*device)
        return cannot(disk, "no device of the guest has it", err);
    if (size <= 0 || !*node)
        return cannot(disk, "QEMU does not say how large it is", err);
    if (s->n == QEMU_SNAPSHOT_DISKS_MAX)
        return error_set(err, VM_ERROR_REFUSED, "the VM has more than %d writable disks",
                         QEMU_SNAPSHOT_DISKS_MAX);
    if (check_device(s->q, disk, device, err) < 0)
        return -1;
    struct disk *place = &s->places[s->n];
    snprintf(place->device, sizeof(place->device), "%s", device);
    snprintf(place->node, sizeof(place->node), "%s", node);
    snprintf(place->name, sizeof(place->name), "%.60s", disk->name);
    s->disks[s->n] = (struct qemu_snapshot_disk){.number = which, .size = (uint64_t)size};
    look_behind(&s->disks[s->n++], json_object_get(inserted, "image"));
    return 0;
}

static int find_disks(struct qemu_snapshot *s, const struct qemu_definition *d,
                      struct vm_error **err)
{
    CLEANUP(json) json_t *backends = NULL;
    if (qemu_command(s->q, "query-block", NULL, &backends, err) < 0 ||
        qemu_command(s->q, "query-named-block-nodes", json_pack("{s:b}", "flat", 1), &s->nodes,
                     err) < 0)
        return -1;
    for (unsigned i = 0; i < d->n_disks; i++)
        if (d->disks[i].writable && take_disk(s, d, i, backends, err) < 0)
            return -1;
    return 0;
}

static void free_snapshot(struct qemu_snapshot *s)
{
    if (!s)
        return;
    json_decref(s->nodes);
    free(s);
}
DEFINE_CLEANUP(qemu_snapshot, struct qemu_snapshot *, free_snapshot)

struct qemu_snapshot *qemu_snapshot_create(struct qemu *q, const struct qemu_definition *d,
                                           struct vm_error **err)
{
    bool found;
    CLEANUP(qemu_snapshot) struct qemu_snapshot *s = calloc(1, sizeof(*s));
    if (!s) {
        error_nomem(err);
        return NULL;
    }
    s->q = q;
    s->was_running = d->state == GUEST_RUNNING;
    if (qemu_snapshot_sweep(q, &found, err) < 0 || find_disks(s, d, err) < 0)
        return NULL;
    return steal_ptr(&s);
}

const struct qemu_snapshot_disk *qemu_snapshot_disks(const struct qemu_snapshot *s, unsigned *ret_n)
{
    *ret_n = s->n;
    return s->disks;
}

static bool has_bitmap(const struct qemu_snapshot *s, unsigned i, const char *prefix)
{
    size_t k, m;
    json_t *node, *bitmap;
    json_array_foreach(s->nodes, k, node)
    {
        if (strcmp(qmp_string(node, "node-name"), s->places[i].node))
            continue;
        json_array_foreach(json_object_get(node, "dirty-bitmaps"), m, bitmap)
        {
            if (!strcmp(qmp_string(bitmap, "name"), BITMAP(prefix, s->disks[i].number)))
                return qmp_bool(bitmap, "recording") && !qmp_bool(bitmap, "busy") &&
                       !qmp_bool(bitmap, "inconsistent");
        }
    }
    return false;
}

bool qemu_snapshot_has_bitmap(const struct qemu_snapshot *s, const char *prefix)
{
    for (unsigned i = 0; i < s->n; i++)
        if (!has_bitmap(s, i, prefix))
            return false;
    return true;
}

/* ---- before the instant ---- */

/* Into a set of descriptors: its number, and that of the descriptor within QEMU. */
static int lend_fd(struct qemu_snapshot *s, int fd, int64_t *ret_set, int64_t *ret_number, struct vm_error **err)
{
    CLEANUP(json) json_t *set = NULL;
    if (qmp_execute_fd(s->q->qmp, "add-fd", NULL, fd, QMP_TIMEOUT_MS, &set, err) < 0)
        return qemu_explain(s->q, err);
    *ret_set = qmp_integer(set, "fdset-id");
    *ret_number = qmp_integer(set, "fd");
    return 0;
}

/* What QEMU has opened through it stays open. */
static void take_fd_back(struct qemu_snapshot *s, int64_t set)
{
    qmp_execute(s->q->qmp, "remove-fd", json_pack("{s:I}", "fdset-id", (json_int_t)set), QMP_TIMEOUT_MS, NULL, NULL);
}

/* Where the filter keeps old data: a sparse file without a name. */
static int add_scratch(struct qemu_snapshot *s, unsigned i, const char *folder,
                       struct vm_error **err)
{
    char path[48];
    int64_t set, within;
    cleanup_close int fd = open(folder, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    if (fd < 0 || ftruncate(fd, (off_t)s->disks[i].size) < 0)
        return error_errno(err, errno, "cannot make a file for a snapshot's old data in %s", folder);
    if (lend_fd(s, fd, &set, &within, err) < 0)
        return -1;
    snprintf(path, sizeof(path), "/dev/fdset/%" PRId64, set);
    json_t *node = json_pack("{s:s, s:s, s:{s:s, s:s, s:s, s:s}}", "driver", "raw", "node-name",
                             NAME(SCRATCH, i), "file", "driver", "file", "filename", path,
                             "locking", "off", "discard", "unmap");
    int r = qemu_command(s->q, "blockdev-add", node, NULL, err);
    take_fd_back(s, set);
    return r;
}

/* type and key: of QEMU's SocketAddress. */
static int add_target_at(struct qemu_snapshot *s, unsigned i, const char *type, const char *key, const char *value,
                         struct vm_error **err)
{
    json_t *node = json_pack("{s:s, s:s, s:{s:s, s:s}}", "driver", "nbd", "node-name",
                             NAME(TARGET, i), "server", "type", type, key, value);
    return qemu_command(s->q, "blockdev-add", node, NULL, err);
}

static int add_target_by_folder(struct qemu_snapshot *s, unsigned i, int folder, const char *name,
                                struct vm_error **err)
{
    char path[SOCKET_PATH_MAX];
    int64_t set, within;
    if (FAULT("snapshot.path") == FAULT_ERROR)
        return error_errno(err, fault_errno(), "snapshot.path");
    if (lend_fd(s, folder, &set, &within, err) < 0)
        return -1;
    snprintf(path, sizeof(path), "/proc/self/fd/%" PRId64 "/%s", within, name);
    int r = add_target_at(s, i, "unix", "path", path, err);
    take_fd_back(s, set);
    return r;
}

static int connect_there(int folder, const char *name, struct vm_error **err)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    cleanup_close int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    int n = snprintf(address.sun_path, sizeof(address.sun_path), "/proc/self/fd/%d/%s", folder, name);
    if (n >= (int)sizeof(address.sun_path))
        return error_set(err, VM_ERROR_USAGE, "the name of a socket is too long: %s", name);
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof(address)) < 0)
        return error_errno(err, errno, "cannot connect to nbdkit, which takes disks out of QEMU");
    return steal_fd(&fd);
}

static int add_target_by_connection(struct qemu_snapshot *s, unsigned i, int folder, const char *name,
                                    struct vm_error **err)
{
    cleanup_close int fd = connect_there(folder, name, err);
    if (fd < 0 || qemu_give_fd(s->q, NAME(TARGET, i), fd, err) < 0)
        return -1;
    if (add_target_at(s, i, "fd", "str", NAME(TARGET, i), err) == 0)
        return 0;
    qemu_forget_fd(s->q, NAME(TARGET, i));
    return -1;
}

static int add_target(struct qemu_snapshot *s, unsigned i, const char *socket_path, struct vm_error **err)
{
    cleanup_error struct vm_error *cannot_go = NULL;
    char folder_path[PATH_MAX];
    const char *name = strrchr(socket_path, '/') + 1;
    snprintf(folder_path, sizeof(folder_path), "%.*s", (int)(name - socket_path), socket_path);
    cleanup_close int folder = open(folder_path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (folder < 0)
        return error_errno(err, errno, "cannot open %s", folder_path);
    int r = add_target_by_folder(s, i, folder, name, &cannot_go);
    if (r < 0) {
        log_info("QEMU cannot go to a disk's target by a path, and gets a connection", "error=%s",
                 log_q(error_message(cannot_go)));
        r = add_target_by_connection(s, i, folder, name, err);
    }
    unlinkat(folder, name, 0);
    return r;
}

/* It does nothing until the device is put above it. */
static int add_filter(struct qemu_snapshot *s, unsigned i, struct vm_error **err)
{
    json_t *node = json_pack("{s:s, s:s, s:s, s:s, s:s, s:i}", "driver", "copy-before-write",
                             "node-name", NAME(FILTER, i), "file", s->places[i].node, "target",
                             NAME(SCRATCH, i), "on-cbw-error", "break-snapshot", "cbw-timeout",
                             CBW_TIMEOUT_S);
    return qemu_command(s->q, "blockdev-add", node, NULL, err);
}

static json_t *bitmap_args(const char *node, const char *name, bool disabled)
{
    return json_pack("{s:s, s:s, s:i, s:b}", "node", node, "name", name, "granularity", GRANULARITY,
                     "disabled", disabled);
}

static int prepare_disk(struct qemu_snapshot *s, unsigned i, const struct qemu_snapshot_params *p,
                        struct vm_error **err)
{
    s->disks[i].incremental = p->parent && has_bitmap(s, i, p->parent);
    if (add_target(s, i, p->nbd_sockets[i], err) < 0 || add_scratch(s, i, p->scratch_dir, err) < 0 ||
        add_filter(s, i, err) < 0 ||
        /* What it notes before the instant is read once too often, and not missed. */
        qemu_command(s->q, "block-dirty-bitmap-add",
                     bitmap_args(s->places[i].node, BITMAP(p->bitmap, s->disks[i].number), false), NULL, err) < 0)
        return error_wrap(err, "disk %s", s->places[i].name);
    return 0;
}

int qemu_snapshot_mark(struct qemu_snapshot *s, struct vm_error **err)
{
    if (!s->was_running || s->marked)
        return 0;
    s->prepared = true; /* there is something to be taken out */
    if (qemu_command(s->q, "object-add",
                     json_pack("{s:s, s:s, s:s}", "qom-type", "secret", "id", SNAPSHOT_MARKER, "data",
                               "running"),
                     NULL, err) < 0)
        return -1;
    s->marked = true;
    return 0;
}

int qemu_snapshot_prepare(struct qemu_snapshot *s, const struct qemu_snapshot_params *p,
                          struct vm_error **err)
{
    s->prepared = true;
    snprintf(s->scratch_dir, sizeof(s->scratch_dir), "%s", p->scratch_dir);
    snprintf(s->bitmap, sizeof(s->bitmap), "%s", p->bitmap);
    snprintf(s->parent, sizeof(s->parent), "%s", p->parent ? p->parent : "");
    if (p->layers)
        memcpy(s->layers, p->layers, s->n * sizeof(*s->layers));
    int r = qemu_snapshot_mark(s, err);
    for (unsigned i = 0; i < s->n && r == 0; i++)
        r = prepare_disk(s, i, p, err);
    FAULT("snapshot.prepared");
    return r;
}

/* ---- the instant, and after ---- */

static int insert_filters(struct qemu_snapshot *s, struct vm_error **err)
{
    for (unsigned i = 0; i < s->n; i++)
        if (snapshot_set_drive(s->q, s->places[i].device, NAME(FILTER, i), err) < 0)
            return error_wrap(err, "disk %s cannot be snapshotted", s->places[i].name);
    if (FAULT("snapshot.switched") == FAULT_ERROR)
        return error_errno(err, fault_errno(), "snapshot.switched");
    return 0;
}

int qemu_snapshot_switch(struct qemu_snapshot *s, struct vm_error **err)
{
    if (s->was_running && qemu_command(s->q, "stop", NULL, NULL, err) < 0)
        return -1;
    FAULT("snapshot.paused");
    return insert_filters(s, err);
}

/*
 * A migration gave the disks up. A disk is taken back when somebody exports it; nobody ever connects to the socket at
 * which QEMU listens for that.
 */
static int activate_disks(struct qemu_snapshot *s, struct vm_error **err)
{
    struct sockaddr_un any = {.sun_family = AF_UNIX};
    cleanup_close int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || bind(fd, (struct sockaddr *)&any, sizeof(any.sun_family)) < 0 ||
        listen(fd, 1) < 0)
        return error_errno(err, errno, "cannot make a socket");
    if (qemu_give_fd(s->q, SNAPSHOT_EXPORT, fd, err) < 0)
        return -1;
    if (qemu_command(s->q, "nbd-server-start",
                     json_pack("{s:{s:s, s:{s:s}}}", "addr", "type", "fd", "data", "str",
                               SNAPSHOT_EXPORT),
                     NULL, err) < 0) {
        qemu_forget_fd(s->q, SNAPSHOT_EXPORT);
        return error_wrap(err, "disks cannot be taken back after memory was copied");
    }
    int r = 0;
    for (unsigned i = 0; i < s->n && r == 0; i++)
        r = qemu_command(s->q, "block-export-add",
                         json_pack("{s:s, s:s, s:s, s:b}", "type", "nbd", "id", NAME(EXPORT, i),
                                   "node-name", s->places[i].node, "writable", 0),
                         NULL, err);
    /* With its server the exports go. */
    return qemu_command(s->q, "nbd-server-stop", NULL, NULL, r < 0 ? NULL : err) < 0 ? -1 : r;
}

int qemu_snapshot_switch_migrated(struct qemu_snapshot *s,
                                  const struct qemu_snapshot_params *params, struct vm_error **err)
{
    FAULT("snapshot.migrated");
    return (s->n && activate_disks(s, err) < 0) || qemu_snapshot_prepare(s, params, err) < 0
               ? -1
               : insert_filters(s, err);
}

static int add_access(struct qemu_snapshot *s, unsigned i, struct vm_error **err)
{
    const char *access = NAME(ACCESS, i);
    json_t *node = json_pack("{s:s, s:s, s:s}", "driver", "snapshot-access", "node-name", access,
                             "file", NAME(FILTER, i));
    if (qemu_command(s->q, "blockdev-add", node, NULL, err) < 0)
        return -1;
    if (!s->disks[i].incremental)
        return 0;
    json_t *merge = json_pack("{s:s, s:s, s:[{s:s, s:s}]}", "node", access, "target", "changed",
                              "bitmaps", "node", s->places[i].node, "name", BITMAP(s->parent, s->disks[i].number));
    if (qemu_command(s->q, "block-dirty-bitmap-add", bitmap_args(access, "changed", true), NULL,
                     err) == 0)
        return qemu_command(s->q, "block-dirty-bitmap-merge", merge, NULL, err);
    json_decref(merge);
    return -1;
}

static int begin_job(struct qemu_snapshot *s, unsigned i, struct vm_error **err)
{
    json_t *job = json_pack("{s:s, s:s, s:s, s:s, s:b}", "device", NAME(ACCESS, i), "target",
                            NAME(TARGET, i), "job-id", NAME(JOB, i), "sync",
                            s->disks[i].incremental ? "bitmap"
                            : s->layers[i]          ? "top"
                                                    : "full",
                            "auto-dismiss", 0);
    if (job && s->disks[i].incremental) {
        json_object_set_new(job, "bitmap", json_string("changed"));
        json_object_set_new(job, "bitmap-mode", json_string("never"));
    }
    return qemu_command(s->q, "blockdev-backup", job, NULL, err);
}

int qemu_snapshot_push(struct qemu_snapshot *s, struct vm_error **err)
{
    /* Who pauses the guest from here on means it. */
    if (s->marked && snapshot_drop_marker(s->q, err) < 0)
        return -1;
    for (unsigned i = 0; i < s->n; i++)
        if (add_access(s, i, err) < 0 || begin_job(s, i, err) < 0)
            return error_wrap(err, "disk %s", s->places[i].name);
    FAULT("snapshot.pushing");
    return 0;
}

/* A filter that could not keep what the guest overwrote lets nobody read the former data any more. */
static int fail_job(const struct qemu_snapshot *s, const char *disk, const char *said, struct vm_error **err)
{
    struct statvfs room;
    if (strcmp(said, strerror(EACCES)) != 0)
        return error_set(err, VM_ERROR_FAILED, "QEMU cannot push disk %s: %.300s", disk, said);
    bool full = statvfs(s->scratch_dir, &room) == 0 && room.f_bavail * room.f_frsize < SCRATCH_FULL;
    return error_set(err, full ? VM_ERROR_NO_SPACE : VM_ERROR_FAILED,
                     "disk %s: what the guest overwrote meanwhile could not be kept in %s%s", disk, s->scratch_dir,
                     full ? ", which is full" : "");
}

/* 1: all jobs are over, 0: not yet. */
static int look(struct qemu_snapshot *s, struct qemu_snapshot_progress *p, struct vm_error **err)
{
    CLEANUP(json) json_t *jobs = NULL;
    unsigned over = 0, seen = 0;
    size_t i;
    json_t *job;
    *p = (struct qemu_snapshot_progress){0};
    if (qemu_command(s->q, "query-jobs", NULL, &jobs, err) < 0)
        return -1;
    json_array_foreach(jobs, i, job)
    {
        const char *id = qmp_string(job, "id"), *failed = qmp_string(job, "error");
        if (strncmp(id, SNAPSHOT_JOB, strlen(SNAPSHOT_JOB)) != 0)
            continue;
        unsigned k = (unsigned)strtoul(id + strlen(SNAPSHOT_JOB), NULL, 10);
        if (*failed)
            return fail_job(s, k < s->n ? s->places[k].name : id, failed, err);
        over += !strcmp(qmp_string(job, "status"), "concluded");
        seen++;
        p->done += (uint64_t)qmp_integer(job, "current-progress");
        p->total += (uint64_t)qmp_integer(job, "total-progress");
    }
    if (seen < s->n)
        return error_set(err, VM_ERROR_FAILED, "a job that pushes a disk was removed from QEMU");
    return over == s->n;
}

int qemu_snapshot_wait(struct qemu_snapshot *s, int64_t deadline_ns, int cancel_fd,
                       struct qemu_snapshot_progress *ret_progress, struct vm_error **err)
{
    for (;;) {
        uint64_t events;
        cleanup_error struct vm_error *waited = NULL;
        if (read(s->q->poke, &events, sizeof(events)) < 0 && errno != EAGAIN)
            return error_errno(err, errno, "cannot wait for QEMU");
        int done = look(s, ret_progress, err);
        int64_t now = clock_mono_ns();
        if (done || now >= deadline_ns)
            return done;
        int64_t until = now + LOOK_AGAIN_NS;
        if (io_wait(s->q->poke, POLLIN, until < deadline_ns ? until : deadline_ns, cancel_fd,
                    &waited) < 0 &&
            waited->kind != VM_ERROR_TIMEOUT)
            return error_propagate(err, steal_ptr(&waited));
    }
}

/* ---- the end ---- */

/* Of one disk: keep the bitmap of this snapshot alone, or of all others. */
static int drop_bitmaps(struct qemu_snapshot *s, unsigned i, const json_t *node, bool committed,
                        struct vm_error **err)
{
    size_t k;
    json_t *bitmap;
    json_array_foreach(json_object_get(node, "dirty-bitmaps"), k, bitmap)
    {
        const char *name = qmp_string(bitmap, "name");
        bool ours = !strcmp(name, BITMAP(s->bitmap, s->disks[i].number));
        if (strncmp(name, "vmmig-", 6) != 0 || ours == committed)
            continue;
        if (qemu_command(s->q, "block-dirty-bitmap-remove",
                         json_pack("{s:s, s:s}", "node", s->places[i].node, "name", name), NULL,
                         err) < 0)
            return -1;
    }
    return 0;
}

static int settle_bitmaps(struct qemu_snapshot *s, bool committed, struct vm_error **err)
{
    CLEANUP(json) json_t *nodes = NULL;
    size_t k;
    json_t *node;
    if (qemu_command(s->q, "query-named-block-nodes", json_pack("{s:b}", "flat", 1), &nodes, err) <
        0)
        return -1;
    for (unsigned i = 0; i < s->n; i++)
        json_array_foreach(nodes, k, node)
        {
            if (!strcmp(qmp_string(node, "node-name"), s->places[i].node) &&
                drop_bitmaps(s, i, node, committed, err) < 0)
                return -1;
        }
    return 0;
}

bool qemu_snapshot_relieve(struct qemu_snapshot *s)
{
    return s && s->prepared && snapshot_relieve(s->q);
}

int qemu_snapshot_finish(struct qemu_snapshot *s, bool committed, struct vm_error **err)
{
    CLEANUP(qemu_snapshot) struct qemu_snapshot *owned = s;
    bool found;
    if (!s || !s->prepared)
        return 0;
    if (qemu_snapshot_sweep(s->q, &found, err) < 0)
        return error_wrap(err, "the snapshot's filters cannot be taken out of QEMU");
    FAULT("snapshot.swept");
    return settle_bitmaps(s, committed, err);
}

/* SPDX-License-Identifier: Apache-2.0 */
#include "snapshot/clone.h"

#include "base/cleanup.h"
#include "base/clock.h"
#include "base/fault.h"
#include "base/io.h"
#include "base/log.h"
#include "snapshot/guest_agent.h"
#include "snapshot/run_tool.h"
#include "vmm/attach_clone.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <linux/fs.h>

#define MACS_TIMEOUT_NS (5 * NSEC_PER_SEC)
enum { KILL_TIMEOUT_MS = 5000, PATH_BYTES = 4096, COPY_BYTES = 1 << 20, QCOW2_HEAD = 32, MODEL_MAKING_S = 600 };

struct making {
    const struct clone_params *p;
    struct template template;
    struct qemu_json vm;
    int *fds; /* of the memory and disk files: they hold the lease until QEMU has them open */
    unsigned n_fds;
    int state_fd;
    char **ram_paths, **disk_paths;
    char folder[PATH_BYTES];
    bool folder_made;
    unsigned grown; /* the disk that is to become larger */
};

/* ---- the template's files ---- */

static int open_file(struct making *m, const char *file, struct vm_error **err)
{
    char path[PATH_BYTES];
    mount_path(m->p->mount, m->template.image, file, path);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd >= 0)
        return fd;
    if (errno != ENOENT)
        return error_errno(err, errno, "cannot open %s of template %s", file, m->p->template);
    struct mount_state state;
    if (mount_status(m->p->mount, &state, err) < 0) /* somebody unmounted it meanwhile */
        return error_wrap(err, "template %s cannot be opened", m->p->template);
    return error_set(err, VM_ERROR_NOT_FOUND, "template %s is gone, or has no file %s", m->p->template, file);
}

static int read_definition(struct making *m, struct vm_error **err)
{
    char path[PATH_BYTES];
    cleanup_free char *text = NULL;
    size_t len;
    mount_path(m->p->mount, m->template.image, "vm.json", path);
    if (io_read_file(path, QEMU_JSON_MAX, &text, &len, err) < 0 ||
        qemu_json_read(text, len, &m->vm, err) < 0)
        return error_wrap(err, "template %s", m->p->template);
    return 0;
}

static char *path_of(struct making *m, const char *file)
{
    char path[PATH_BYTES];
    mount_path(m->p->mount, m->template.image, file, path);
    return strdup(path);
}

/* From here on the template is leased, as long as one of these is open. */
static int open_files(struct making *m, struct vm_error **err)
{
    const struct qemu_definition *d = &m->vm.definition;
    m->fds = calloc(d->n_ram + d->n_disks + 1, sizeof(*m->fds));
    m->ram_paths = calloc(d->n_ram + 1, sizeof(char *));
    m->disk_paths = calloc(d->n_disks + 1, sizeof(char *));
    if (!m->fds || !m->ram_paths || !m->disk_paths)
        return error_nomem(err);
    for (unsigned i = 0; i < d->n_ram; i++) {
        m->fds[m->n_fds] = open_file(m, m->vm.ram_files[i], err);
        if (m->fds[m->n_fds] < 0)
            return -1;
        m->n_fds++;
        if (!(m->ram_paths[i] = path_of(m, m->vm.ram_files[i])))
            return error_nomem(err);
    }
    for (unsigned i = 0; i < d->n_disks; i++) {
        if (!*m->vm.disk_files[i]) {
            if (d->disks[i].writable)
                return error_set(err, VM_ERROR_REFUSED,
                                 "disk %s was not saved with template %s, and cannot be shared",
                                 d->disks[i].name, m->p->template);
            continue;
        }
        m->fds[m->n_fds] = open_file(m, m->vm.disk_files[i], err);
        if (m->fds[m->n_fds] < 0)
            return -1;
        m->n_fds++;
    }
    return 0;
}

/* Said before anything is made. */
static int check_disk_size(struct making *m, struct vm_error **err)
{
    struct stat st;
    char path[PATH_BYTES];
    if (!m->p->disk_size)
        return 0;
    if (attach_is_definition(&m->vm.definition))
        return error_set(err, VM_ERROR_REFUSED, "template %s has no disk to make larger",
                         m->p->template);
    if (qemu_clone_first_disk(&m->vm, &m->grown, err) < 0)
        return error_wrap(err, "--disk-size: template %s", m->p->template);
    mount_path(m->p->mount, m->template.image, m->vm.disk_files[m->grown], path);
    if (stat(path, &st) < 0)
        return error_errno(err, errno, "%s", path);
    if (m->p->disk_size < (uint64_t)st.st_size)
        return error_set(err, VM_ERROR_USAGE,
                         "--disk-size: the disk of template %s cannot become smaller than it is",
                         m->p->template);
    return 0;
}

/* ---- overlays ---- */

static int make_empty(const struct making *m, const char *backing, const char *path, struct vm_error **err)
{
    const char *argv[] = {"qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", backing,
                          path, NULL};
    char what[256];
    snprintf(what, sizeof(what), "make an overlay in %.180s", m->p->model_dir);
    cleanup_free char *said = run_tool(argv, what, NULL, err);
    if (said)
        return 0;
    unlink(path);
    return -1;
}

static uint64_t big_endian(const uint8_t *from, size_t n)
{
    uint64_t value = 0;
    while (n--)
        value = value << 8 | *from++;
    return value;
}

/* Is that an overlay upon that file, of its size? */
static bool is_upon(const char *path, const char *backing)
{
    uint8_t head[QCOW2_HEAD];
    char found[PATH_BYTES];
    struct stat st;
    cleanup_close int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || pread(fd, head, sizeof(head), 0) != (ssize_t)sizeof(head) ||
        memcmp(head, "QFI\xfb", 4) || stat(backing, &st) < 0)
        return false;
    uint64_t at = big_endian(head + 8, 8), len = big_endian(head + 16, 4);
    uint64_t size = big_endian(head + 24, 8);
    return len == strlen(backing) && len < sizeof(found) &&
           pread(fd, found, len, (off_t)at) == (ssize_t)len && !memcmp(found, backing, len) &&
           size == ((uint64_t)st.st_size + 511) / 512 * 512;
}

/* The image of which that is a model. */
static bool image_of_model(const char *name, char ret_image[IMAGE_NAME_MAX + 1])
{
    const char *digest = strchr(name, '@');
    size_t n = digest ? (size_t)(digest - name) + TEMPLATE_DIGEST_SIZE : 0;
    if (!n || n > IMAGE_NAME_MAX || strlen(name) < n || name[n] != '-')
        return false;
    snprintf(ret_image, IMAGE_NAME_MAX + 1, "%.*s", (int)n, name);
    return template_is_version(ret_image);
}

/* One that is being made is younger. */
static bool is_old(const char *path)
{
    struct stat st;
    return stat(path, &st) == 0 && S_ISREG(st.st_mode) &&
           st.st_mtime + MODEL_MAKING_S < clock_wall_ns() / NSEC_PER_SEC;
}

void clone_sweep_models(struct repo *r, const char *model_dir)
{
    char path[PATH_BYTES], name[IMAGE_NAME_MAX + 1];
    cleanup_free struct image *image = malloc(sizeof(*image));
    DIR *dir = image ? opendir(model_dir) : NULL;
    for (struct dirent *e; dir && (e = readdir(dir));) {
        cleanup_error struct vm_error *gone = NULL;
        snprintf(path, sizeof(path), "%s/%s", model_dir, e->d_name);
        if (*e->d_name == '.' ? !is_old(path) :
            (image_of_model(e->d_name, name) &&
             (catalogue_find(repo_store(r), name, image, &gone) == 0 ||
              gone->kind != VM_ERROR_NOT_FOUND)))
            continue;
        unlink(path);
    }
    if (dir)
        closedir(dir);
}

/* To the disk, and then to its name: a model that is there after a crash is whole. */
static int keep_model(const char *fresh, const char *path, struct vm_error **err)
{
    cleanup_close int fd = open(fresh, O_RDONLY | O_CLOEXEC);
    if (fd >= 0 && fsync(fd) == 0 && rename(fresh, path) == 0)
        return 0;
    error_errno(err, errno, "cannot make %s", path);
    unlink(fresh);
    return -1;
}

/* An empty overlay upon the disk, made once per version. */
static int make_model(struct making *m, unsigned disk, char out[PATH_BYTES], struct vm_error **err)
{
    char fresh[PATH_BYTES + 64];
    cleanup_free char *backing = path_of(m, m->vm.disk_files[disk]);
    struct uuid unique = uuid_new();
    if (!backing)
        return error_nomem(err);
    snprintf(out, PATH_BYTES, "%s/%s-%s.qcow2", m->p->model_dir, m->template.image,
             m->vm.disk_files[disk]);
    if (is_upon(out, backing))
        return 0;
    if (io_make_folders(m->p->model_dir, 0700, err) < 0)
        return -1;
    clone_sweep_models(m->p->repo, m->p->model_dir);
    snprintf(fresh, sizeof(fresh), "%s/.%.8s", m->p->model_dir, uuid_text(&unique));
    return make_empty(m, backing, fresh, err) < 0 ? -1 : keep_model(fresh, out, err);
}

static int copy_bytes(int from, int to, const char *path, struct vm_error **err)
{
    cleanup_free uint8_t *data = malloc(COPY_BYTES);
    ssize_t n;
    if (ioctl(to, FICLONE, from) == 0)
        return 0;
    if (!data)
        return error_nomem(err);
    while ((n = read(from, data, COPY_BYTES)) > 0)
        for (ssize_t at = 0, put; at < n; at += put) {
            put = write(to, data + at, (size_t)(n - at));
            if (put <= 0)
                return error_errno(err, put < 0 ? errno : ENOSPC, "cannot write the overlay %s",
                                   path);
        }
    return n < 0 ? error_errno(err, errno, "cannot read an overlay's model") : 0;
}

static int tell_made(const struct making *m, const char *path, struct vm_error **err)
{
    return m->p->made ? m->p->made(m->p->arg, path, err) : 0;
}

static int make_overlay(struct making *m, unsigned disk, struct vm_error **err)
{
    char model[PATH_BYTES], path[PATH_BYTES + 64];
    if (make_model(m, disk, model, err) < 0)
        return -1;
    snprintf(path, sizeof(path), "%s/disk%u.qcow2", m->folder, disk);
    cleanup_close int from = open(model, O_RDONLY | O_CLOEXEC);
    cleanup_close int to = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (from < 0 || to < 0)
        return error_errno(err, errno, "cannot make the overlay %s", path);
    if (tell_made(m, path, err) < 0)
        return -1;
    if (FAULT("clone.overlay") == FAULT_ERROR)
        return error_errno(err, fault_errno(), "cannot write the overlay %s", path);
    if (copy_bytes(from, to, path, err) < 0)
        return -1;
    if (fchown(to, m->p->uid, m->p->gid) < 0)
        return error_errno(err, errno, "cannot give %s to its user", path);
    m->disk_paths[disk] = strdup(path);
    return m->disk_paths[disk] ? 0 : error_nomem(err);
}

static bool has_disks(const struct making *m)
{
    unsigned n = 0;
    for (unsigned i = 0; i < m->vm.definition.n_disks; i++)
        n += *m->vm.disk_files[i] != 0;
    return n;
}

static int make_overlays(struct making *m, struct vm_error **err)
{
    if (!has_disks(m))
        return 0;
    snprintf(m->folder, sizeof(m->folder), "%s/%s", m->p->disk_dir, m->p->name);
    if (io_make_folders(m->p->disk_dir, 0755, err) < 0)
        return -1;
    if (mkdir(m->folder, 0700) < 0)
        return errno == EEXIST
                   ? error_set(err, VM_ERROR_CONFLICT,
                               "%s is there: the disks of a former clone; remove it, or take "
                               "another name",
                               m->folder)
                   : error_errno(err, errno, "cannot make %s", m->folder);
    m->folder_made = true;
    if (tell_made(m, m->folder, err) < 0)
        return -1;
    if (chown(m->folder, m->p->uid, m->p->gid) < 0)
        return error_errno(err, errno, "cannot give %s to its user", m->folder);
    for (unsigned i = 0; i < m->vm.definition.n_disks; i++)
        if (*m->vm.disk_files[i] && make_overlay(m, i, err) < 0)
            return -1;
    return 0;
}

void clone_remove_disks(const char *disk_dir, const char *name)
{
    char path[PATH_BYTES];
    for (unsigned i = 0; i < QEMU_DISKS_MAX; i++) {
        snprintf(path, sizeof(path), "%s/%s/disk%u.qcow2", disk_dir, name, i);
        unlink(path); /* those that were not saved have none */
    }
    snprintf(path, sizeof(path), "%s/%s", disk_dir, name);
    rmdir(path);
}

/* ---- starting ---- */

static void note(struct clone *c, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void note(struct clone *c, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    if (c->notes.n < QEMU_CLONE_NOTES_MAX)
        vsnprintf(c->notes.text[c->notes.n++], QEMU_CLONE_NOTE_MAX, format, args);
    va_end(args);
}

/* Its agent, if it is there, has the running guest take its MAC addresses over. */
static int take_macs_over(const struct clone *c, struct vm_error **err)
{
    int64_t deadline = clock_mono_ns() + MACS_TIMEOUT_NS;
    cleanup_free char *path = guest_agent_find(c->argv, c->cwd);
    if (!path)
        return error_set(err, VM_ERROR_NOT_FOUND, "no agent of it is known");
    CLEANUP(guest_agent) struct guest_agent *ga = guest_agent_open(path, &c->guest->process, deadline, err);
    if (!ga)
        return -1;
    for (unsigned i = 0; i < c->notes.n_macs; i++)
        if (guest_agent_set_mac(ga, c->notes.macs[i].from, c->notes.macs[i].to, deadline, err) < 0)
            return error_wrap(err, "%s", c->notes.macs[i].from);
    return 0;
}

void clone_tell(const struct clone_params *params, struct clone *c)
{
    cleanup_error struct vm_error *frozen = NULL, *kept = NULL;
    FAULT("clone.telling");
    if (c->frozen &&
        frozen_thaw_restored(&params->thawer, &c->guest->process, c->argv, c->cwd, c->running, &frozen) < 0)
        note(c, "%s", error_message(frozen));
    if (!c->notes.n_macs)
        return;
    if (!c->running)
        note(c, "the guest, which is paused, has the MAC address that it had until its NIC's driver starts anew");
    else if (take_macs_over(c, &kept) < 0)
        note(c, "the running guest keeps its MAC address until its NIC's driver or the guest starts anew: %s",
             error_message(kept));
}

void clone_finish(struct clone *c)
{
    free(steal_ptr(&c->argv));
    free(steal_ptr(&c->cwd));
}

/* What clone_tell needs; whoever comes if the agent dies before that thaws the guest. */
static int remember(const struct making *m, struct clone *c, struct vm_error **err)
{
    c->cwd = strdup(m->vm.definition.cwd ? m->vm.definition.cwd : "/");
    if (!c->cwd)
        return error_nomem(err);
    c->frozen = m->vm.frozen;
    if (c->frozen)
        frozen_expect(&m->p->thawer, &c->guest->process, c->argv, c->cwd, NULL); /* clone_tell says what fails */
    return 0;
}

static int launch_qemu(struct making *m, const struct qemu_launch *common, struct clone *c,
                       struct vm_error **err)
{
    struct qemu_clone_params params = {
        .name = m->p->name,
        .vm = &m->vm,
        .ram_paths = (const char *const *)m->ram_paths,
        .disk_paths = (const char *const *)m->disk_paths,
        .taps = m->p->taps,
        .n_taps = m->p->n_taps,
        .keep_macs = m->p->keep_macs,
        .memory = m->p->memory,
        .state_fd = m->state_fd,
        .launch = *common,
    };
    if (qemu_clone_argv(&params, &c->notes, &c->argv, err) < 0)
        return -1;
    (void)FAULT("clone.spawn");
    struct qemu *q = qemu_clone_spawn(&params, c->argv, &c->timing, err);
    if (!q)
        return -1;
    c->guest = qemu_guest(q);
    (void)FAULT("clone.spawned");
    return (m->p->disk_size &&
            qemu_clone_resize(q, m->disk_paths[m->grown], m->p->disk_size, err) < 0) ||
                   (m->p->memory && qemu_clone_grow(q, m->p->memory, err) < 0)
               ? -1
               : remember(m, c, err);
}

/* Of such a VMM's command line only its name is known to belong to the clone. */
static int check_attach(const struct making *m, struct vm_error **err)
{
    const struct clone_params *p = m->p;
    if (p->n_taps)
        return error_set(err, VM_ERROR_REFUSED, "--set %s: nothing is known of NICs of template %s",
                         p->taps[0].from, p->template);
    return p->memory ? error_set(err, VM_ERROR_REFUSED,
                                 "--memory: template %s is not of QEMU, and keeps the memory it has",
                                 p->template)
                     : 0;
}

static int launch_attach(struct making *m, const struct qemu_launch *common, struct clone *c,
                         struct vm_error **err)
{
    struct attach_clone_params params = {
        .definition = &m->vm.definition,
        .launch = {.spawn = {.binary = common->binary,
                             .log_path = common->log_path,
                             .user = common->user,
                             .cgroup = common->cgroup,
                             .born = common->born,
                             .born_arg = common->born_arg},
                   .socket_path = common->qmp_path,
                   .name = m->p->name},
        .ram_fds = m->fds, /* the first of them */
        .state_fd = m->state_fd,
    };
    if (check_attach(m, err) < 0)
        return -1;
    (void)FAULT("clone.spawn");
    struct attach *a = attach_clone_spawn(&params, &c->timing, err);
    if (!a)
        return -1;
    c->guest = attach_guest(a);
    (void)FAULT("clone.spawned");
    note(c, "the guest keeps what else it has of an identity: %s gets a name of its own",
         attach_info(a)->vmm);
    return process_argv(c->guest->process.pid, &c->argv, err) < 0 ? -1 : remember(m, c, err);
}

static int launch(struct making *m, struct clone *c, struct vm_error **err)
{
    struct qemu_launch common = {.binary = NULL};
    const struct qemu_definition *d = &m->vm.definition;
    if (m->p->prepare(m->p->arg, d, &common, err) < 0)
        return -1;
    c->running = d->state == GUEST_RUNNING;
    if ((attach_is_definition(d) ? launch_attach : launch_qemu)(m, &common, c, err) == 0)
        return 0;
    if (!c->guest)
        return -1;
    guest_kill(c->guest, KILL_TIMEOUT_MS, NULL);
    unlink(common.qmp_path);
    guest_unref(steal_ptr(&c->guest));
    return -1;
}

static int make(struct making *m, struct clone *c, struct vm_error **err)
{
    if (template_find(repo_store(m->p->repo), m->p->template, &m->template, NULL, err) < 0 ||
        mount_ensure(m->p->mount, err) < 0)
        return -1;
    (void)FAULT("clone.found");
    m->state_fd = open_file(m, "device.state", err);
    if (m->state_fd < 0)
        return -1;
    (void)FAULT("clone.leased");
    return read_definition(m, err) < 0 || open_files(m, err) < 0 || check_disk_size(m, err) < 0 ||
                   make_overlays(m, err) < 0
               ? -1
               : launch(m, c, err);
}

static void finish(struct making *m)
{
    for (unsigned i = 0; i < m->n_fds; i++)
        close(m->fds[i]);
    for (unsigned i = 0; m->ram_paths && i < m->vm.definition.n_ram; i++)
        free(m->ram_paths[i]);
    for (unsigned i = 0; m->disk_paths && i < m->vm.definition.n_disks; i++)
        free(m->disk_paths[i]);
    free(m->ram_paths);
    free(m->disk_paths);
    free(m->fds);
    close_fd(&m->state_fd);
    qemu_json_finish(&m->vm);
}

int clone_start(const struct clone_params *params, struct clone *ret_clone, struct vm_error **err)
{
    struct making m = {.p = params, .state_fd = -1};
    struct clone c = {.guest = NULL};
    int r = make(&m, &c, err);
    if (r < 0) {
        clone_finish(&c);
        if (m.folder_made)
            clone_remove_disks(params->disk_dir, params->name);
    } else {
        c.template = m.template;
        *ret_clone = c;
    }
    finish(&m);
    return r;
}

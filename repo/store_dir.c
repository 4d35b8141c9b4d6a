/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The folder of a dir: repository:
 *
 *     packs/XX/NAME   one file per pack; XX spreads them over 256 folders by a hash of the name
 *     blobs/XX/NAME   likewise
 *     maps/           the LMDB environment; its keys are MAP NUL KEY, and MAP NUL for the map
 *                     itself
 *     ballast         space set aside
 *
 * A file is written under no name (O_TMPFILE), synced, and linked to its name, so that a crash
 * leaves nothing behind and nobody sees a part of it.
 */
#include "repo/store_driver.h"
#include "repo/store_dir_env.h"

#include "base/io.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/vfs.h>
#include <unistd.h>

enum { SUBFOLDERS = 256, BALLAST_SIZE = 16 << 20 };

struct store_dir {
    struct store store;
    int folder_fd;
    struct dir_env *env;
};

static struct store_dir *dir_of(struct store *s)
{
    return (struct store_dir *)s;
}

/* ---- files ---- */

static unsigned subfolder_of(const char *name)
{
    unsigned h = 2166136261u;
    for (; *name; name++)
        h = (h ^ (unsigned char)*name) * 16777619u;
    return (h ^ h >> 8 ^ h >> 16) % SUBFOLDERS;
}

enum { PATH_SIZE = STORE_NAME_MAX + 16 };

static const char *area_folder(enum store_area area)
{
    return area == STORE_PACK ? "packs" : "blobs";
}

static const char *object_path(enum store_area area, const char *name, char out[PATH_SIZE])
{
    snprintf(out, PATH_SIZE, "%s/%02x/%s", area_folder(area), subfolder_of(name), name);
    return out;
}

static int open_subfolder(struct store_dir *d, const struct store_op *op, struct vm_error **err)
{
    char path[PATH_SIZE];
    snprintf(path, sizeof(path), "%s/%02x", area_folder(op->area), subfolder_of(op->name));
    int fd = openat(d->folder_fd, path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return error_errno(err, errno, "cannot open folder %s", path);
    return fd;
}

/* A nameless synced file with the operation's content. */
static int write_nameless(int folder, const struct store_op *op, struct vm_error **err)
{
    cleanup_close int fd = openat(folder, ".", O_TMPFILE | O_WRONLY | O_CLOEXEC, 0600);
    if (fd < 0)
        return error_errno(err, errno, "cannot make a file for %s", op->name);
    for (size_t done = 0; done < op->len;) {
        ssize_t n = write(fd, (const char *)op->data + done, op->len - done);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return error_errno(err, errno, "cannot write %s", op->name);
        done += (size_t)n;
    }
    if (fdatasync(fd) < 0)
        return error_errno(err, errno, "cannot sync %s", op->name);
    return steal_fd(&fd);
}

static int link_nameless(int fd, int folder, const char *name)
{
    char proc[32];
    snprintf(proc, sizeof(proc), "/proc/self/fd/%d", fd);
    return linkat(AT_FDCWD, proc, folder, name, AT_SYMLINK_FOLLOW);
}

static int sync_folder(int folder, const char *name, struct vm_error **err)
{
    return fsync(folder) < 0 ? error_errno(err, errno, "cannot sync the folder of %s", name) : 0;
}

static int run_create(struct store_dir *d, struct store_op *op, struct vm_error **err)
{
    cleanup_close int folder = open_subfolder(d, op, err);
    if (folder < 0)
        return -1;
    cleanup_close int fd = write_nameless(folder, op, err);
    if (fd < 0)
        return -1;
    if (link_nameless(fd, folder, op->name) < 0) {
        if (errno != EEXIST)
            return error_errno(err, errno, "cannot name %s", op->name);
        op->result = STORE_EXISTS;
        return 0;
    }
    if (sync_folder(folder, op->name, err) < 0)
        return -1;
    op->result = STORE_DONE;
    return 0;
}

/* Its folder is synced by sync_removals. */
static int run_remove(struct store_dir *d, struct store_op *op, struct vm_error **err)
{
    char path[PATH_SIZE];
    if (unlinkat(d->folder_fd, object_path(op->area, op->name, path), 0) == 0) {
        op->result = STORE_DONE;
        return 0;
    }
    if (errno != ENOENT)
        return error_errno(err, errno, "cannot remove %s", op->name);
    op->result = STORE_MISSING;
    return 0;
}

/*
 * Once all are unlinked: most file systems then make all of them durable with the first folder that
 * is synced.
 */
static int sync_removals(struct store_dir *d, struct store_op *ops, size_t n, struct vm_error **err)
{
    int result = 0;
    for (size_t i = 0; i < n; i++) {
        if (ops[i].area == STORE_MAP || ops[i].kind != STORE_REMOVE || ops[i].result != STORE_DONE)
            continue;
        cleanup_close int folder = open_subfolder(d, &ops[i], result ? NULL : err);
        if (folder >= 0 && sync_folder(folder, ops[i].name, result ? NULL : err) == 0)
            continue;
        ops[i].result = STORE_FAILED;
        result = -1;
    }
    return result;
}

static int read_range(int fd, struct store_op *op, struct vm_error **err)
{
    while (op->ret_len < op->len) {
        ssize_t n = pread(fd, (char *)op->out + op->ret_len, op->len - op->ret_len,
                          (off_t)(op->offset + op->ret_len));
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && store_answer_unreadable(op, errno))
            return 0;
        if (n < 0)
            return error_errno(err, errno, "cannot read %s", op->name);
        if (!n)
            break;
        op->ret_len += (size_t)n;
    }
    op->result = STORE_DONE;
    return 0;
}

static int run_read(struct store_dir *d, struct store_op *op, struct vm_error **err)
{
    char path[PATH_SIZE];
    cleanup_close int fd =
        openat(d->folder_fd, object_path(op->area, op->name, path), O_RDONLY | O_CLOEXEC);
    if (fd < 0 && errno == ENOENT) {
        op->result = STORE_MISSING;
        return 0;
    }
    if (fd < 0 && store_answer_unreadable(op, errno))
        return 0;
    if (fd < 0)
        return error_errno(err, errno, "cannot open %s", op->name);
    return read_range(fd, op, err);
}

static int run_size(struct store_dir *d, struct store_op *op, struct vm_error **err)
{
    char path[PATH_SIZE];
    struct stat st;
    if (fstatat(d->folder_fd, object_path(op->area, op->name, path), &st, 0) < 0) {
        if (store_answer_unreadable(op, errno))
            return 0;
        if (errno != ENOENT)
            return error_errno(err, errno, "cannot look at %s", op->name);
        op->result = STORE_MISSING;
        return 0;
    }
    op->ret_size = (uint64_t)st.st_size;
    op->result = STORE_DONE;
    return 0;
}

static int run_file(struct store_dir *d, struct store_op *op, struct vm_error **err)
{
    switch (op->kind) {
    case STORE_CREATE:
        return run_create(d, op, err);
    case STORE_READ:
        return run_read(d, op, err);
    case STORE_SIZE:
        return run_size(d, op, err);
    default:
        return run_remove(d, op, err);
    }
}

static bool changes_map(const struct store_op *op)
{
    return op->area == STORE_MAP && (op->kind == STORE_UPDATE || op->kind == STORE_REMOVE);
}

static int dir_run(struct store *s, struct store_op *ops, size_t n, struct vm_error **err)
{
    struct store_dir *d = dir_of(s);
    struct vm_error *first = NULL;
    bool any_change = false, any_look = false;
    for (size_t i = 0; i < n; i++) {
        struct vm_error *one = NULL;
        if (ops[i].area == STORE_MAP) {
            any_change |= changes_map(&ops[i]);
            any_look |= !changes_map(&ops[i]);
        } else if (run_file(d, &ops[i], &one) < 0) {
            error_propagate(first ? NULL : &first, one);
        }
    }
    struct vm_error *one = NULL;
    if (sync_removals(d, ops, n, &one) < 0)
        error_propagate(first ? NULL : &first, one);
    one = NULL;
    if (any_change && dir_env_change(d->env, ops, n, changes_map, &one) < 0)
        error_propagate(first ? NULL : &first, one);
    one = NULL;
    if (any_look && dir_env_look(d->env, ops, n, &one) < 0)
        error_propagate(first ? NULL : &first, one);
    return first ? error_propagate(err, first) : 0;
}

/* ---- listing ---- */

static int list_subfolder(struct store_dir *d, const char *path, const char *prefix,
                          store_list_fn *visit, void *arg, struct vm_error **err)
{
    int fd = openat(d->folder_fd, path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *dir = fd < 0 ? NULL : fdopendir(fd);
    if (!dir) {
        int open_errno = errno;
        close_fd(&fd);
        return error_errno(err, open_errno, "cannot list %s", path);
    }
    int result = 0;
    struct dirent *entry;
    while (!result && (errno = 0, entry = readdir(dir))) {
        if (entry->d_name[0] != '.' && !strncmp(entry->d_name, prefix, strlen(prefix)))
            result = visit(entry->d_name, arg, err);
    }
    if (!result && errno)
        result = error_errno(err, errno, "cannot list %s", path);
    closedir(dir);
    return result;
}

static int dir_list(struct store *s, enum store_area area, const char *prefix, store_list_fn *visit,
                    void *arg, struct vm_error **err)
{
    struct store_dir *d = dir_of(s);
    if (area == STORE_MAP)
        return dir_env_list(d->env, prefix, visit, arg, err);
    for (unsigned i = 0; i < SUBFOLDERS; i++) {
        char path[PATH_SIZE];
        snprintf(path, sizeof(path), "%s/%02x", area_folder(area), i);
        if (list_subfolder(d, path, prefix, visit, arg, err) < 0)
            return -1;
    }
    return 0;
}

static int dir_space(struct store *s, struct store_space *ret_space, struct vm_error **err)
{
    struct statvfs fs;
    if (fstatvfs(dir_of(s)->folder_fd, &fs) < 0)
        return error_errno(err, errno, "cannot tell the space of the file system");
    *ret_space = (struct store_space){.total = (uint64_t)fs.f_blocks * fs.f_frsize,
                                      .available = (uint64_t)fs.f_bavail * fs.f_frsize};
    return 0;
}

/* ---- ballast ---- */

static int dir_ballast_take(struct store *s, struct vm_error **err)
{
    struct store_dir *d = dir_of(s);
    if (unlinkat(d->folder_fd, "ballast", 0) < 0 && errno != ENOENT)
        return error_errno(err, errno, "cannot remove the ballast");
    return 0;
}

static int dir_ballast_refill(struct store *s, struct vm_error **err)
{
    struct store_dir *d = dir_of(s);
    cleanup_close int fd = openat(d->folder_fd, "ballast", O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0)
        return error_errno(err, errno, "cannot make the ballast");
    int failed = posix_fallocate(fd, 0, BALLAST_SIZE);
    if (failed) {
        unlinkat(d->folder_fd, "ballast", 0);
        return error_errno(err, failed, "cannot fill the ballast");
    }
    return 0;
}

/* ---- opening ---- */

static int dir_set_data_pool(struct store *s, const char *pool, struct vm_error **err)
{
    return error_set(err, VM_ERROR_USAGE, "%s: only a rados: repository has a data pool",
                     store_text(s));
}

static void dir_close(struct store *s)
{
    struct store_dir *d = dir_of(s);
    dir_env_release(d->env);
    close_fd(&d->folder_fd);
    free(d);
}

static const struct store_driver dir_driver = {
    .close = dir_close,
    .set_data_pool = dir_set_data_pool,
    .run = dir_run,
    .list = dir_list,
    .space = dir_space,
    .ballast_take = dir_ballast_take,
    .ballast_refill = dir_ballast_refill,
};

/* LMDB maps its file and locks by process: on a file system of several hosts both go wrong. */
static int refuse_network_file_system(int fd, const char *path, struct vm_error **err)
{
    static const struct {
        unsigned long magic;
        const char *name;
    } refused[] = {
        {0x6969, "NFS"},        {0xff534d42, "CIFS"},    {0xfe534d42, "SMB"},
        {0x517b, "SMB"},        {0x00c36400, "CephFS"},  {0x65735546, "FUSE"},
        {0x01021997, "9p"},     {0x5346414f, "AFS"},     {0x6b414653, "AFS"},
        {0x01161970, "GFS2"},   {0x7461636f, "OCFS2"},   {0x0bd00bd0, "Lustre"},
        {0x47504653, "GPFS"},   {0x73757245, "Coda"},    {0x19830326, "BeeGFS"},
    };
    struct statfs fs;
    if (fstatfs(fd, &fs) < 0)
        return error_errno(err, errno, "cannot tell the file system of %s", path);
    for (size_t i = 0; i < sizeof(refused) / sizeof(*refused); i++)
        if ((unsigned long)fs.f_type == refused[i].magic)
            return error_set(err, VM_ERROR_REFUSED,
                             "%s is on %s; a dir: repository needs a local file system", path,
                             refused[i].name);
    return 0;
}

static int make_folder(int at, const char *path, struct vm_error **err)
{
    if (mkdirat(at, path, 0700) < 0 && errno != EEXIST)
        return error_errno(err, errno, "cannot make folder %s", path);
    return 0;
}

static int make_layout(int folder, struct vm_error **err)
{
    static const enum store_area areas[] = {STORE_PACK, STORE_BLOB};
    if (make_folder(folder, "maps", err) < 0)
        return -1;
    for (size_t a = 0; a < 2; a++) {
        if (make_folder(folder, area_folder(areas[a]), err) < 0)
            return -1;
        for (unsigned i = 0; i < SUBFOLDERS; i++) {
            char path[PATH_SIZE];
            snprintf(path, sizeof(path), "%s/%02x", area_folder(areas[a]), i);
            if (make_folder(folder, path, err) < 0)
                return -1;
        }
        cleanup_close int fd = openat(folder, area_folder(areas[a]), O_RDONLY | O_CLOEXEC);
        if (fd < 0 || fsync(fd) < 0)
            return error_errno(err, errno, "cannot sync folder %s", area_folder(areas[a]));
    }
    return fsync(folder) < 0 ? error_errno(err, errno, "cannot sync the folder") : 0;
}

/* The folders above, of which some may be new: as far up as we may look. */
static int sync_above(int folder, const char *path, struct vm_error **err)
{
    cleanup_close int at = fcntl(folder, F_DUPFD_CLOEXEC, 0);
    struct stat below, here;
    while (at >= 0 && fstat(at, &below) == 0) {
        int above = openat(at, "..", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        close(at);
        at = above;
        if (at < 0 || fstat(at, &here) < 0 ||
            (here.st_ino == below.st_ino && here.st_dev == below.st_dev))
            break;
        if (fsync(at) < 0 && errno != EINVAL && errno != EROFS)
            return error_errno(err, errno, "cannot sync a folder above %s", path);
    }
    return 0;
}

static int sync_maps(int folder, struct vm_error **err)
{
    cleanup_close int maps = openat(folder, "maps", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    return maps < 0 || fsync(maps) < 0 ? error_errno(err, errno, "cannot sync folder maps") : 0;
}

/* A name that was mistyped must not fill a folder of somebody else's. One that was begun is gone on with. */
static int check_is_empty(int folder, const char *path, struct vm_error **err)
{
    static const char *const ours[] = {".", "..", "blobs", "packs", "maps", "ballast", "lost+found"};
    if (faccessat(folder, "maps", F_OK, 0) == 0)
        return 0;
    int fd = openat(folder, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *entries = fd < 0 ? NULL : fdopendir(fd);
    if (!entries) {
        close_fd(&fd);
        return error_errno(err, errno, "cannot read folder %s", path);
    }
    bool others = false;
    for (const struct dirent *e; (e = readdir(entries)) && !others;) {
        others = true;
        for (size_t i = 0; i < sizeof(ours) / sizeof(*ours); i++)
            others &= strcmp(e->d_name, ours[i]) != 0;
    }
    closedir(entries);
    return others ? error_set(err, VM_ERROR_CONFLICT,
                              "folder %s is not empty and holds no repository; name another, which may be a new one",
                              path)
                  : 0;
}

static int open_folder(const struct repo_url *url, int flags, struct vm_error **err)
{
    bool create = flags & STORE_OPEN_CREATE;
    if (create && io_make_folders(url->path, 0700, err) < 0)
        return -1;
    cleanup_close int fd = open(url->path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0 && errno == ENOENT)
        return error_set(
            err, VM_ERROR_NOT_FOUND,
            "there is no folder %s; \"vmmig repo init\" makes it, and a repository in it",
            url->path);
    if (fd < 0)
        return error_errno(err, errno, "cannot open folder %s", url->path);
    if (create && check_is_empty(fd, url->path, err) < 0)
        return -1;
    if (refuse_network_file_system(fd, url->path, err) < 0)
        return -1;
    if (create && (make_layout(fd, err) < 0 || sync_above(fd, url->path, err) < 0))
        return error_wrap(err, "%s", url->path);
    if (faccessat(fd, "maps", F_OK, 0) < 0)
        return error_set(err, VM_ERROR_NOT_FOUND,
                         "folder %s holds no repository; \"vmmig repo init\" makes one", url->path);
    return steal_fd(&fd);
}

struct store *store_dir_open(const struct repo_url *url, int flags, struct vm_error **err)
{
    cleanup_close int folder = open_folder(url, flags, err);
    if (folder < 0)
        return NULL;
    struct dir_env *env = dir_env_acquire(url->path, err);
    if (!env)
        return NULL;
    struct store_dir *d = calloc(1, sizeof(*d));
    if (!d)
        error_nomem(err);
    if (!d || ((flags & STORE_OPEN_CREATE) && sync_maps(folder, err) < 0)) {
        dir_env_release(env);
        free(d);
        return NULL;
    }
    d->store.driver = &dir_driver;
    d->env = env;
    d->folder_fd = steal_fd(&folder);
    return &d->store;
}

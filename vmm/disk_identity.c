/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/disk_identity.h"

#include "base/cleanup.h"
#include "base/io.h"
#include "base/process.h"
#include "vmm/rbd_name.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <xxhash.h>

#define PREFIX ".vmmig-proof-"
#define DEFAULT_CEPH_CONF "/etc/ceph/ceph.conf"
enum { CONTENT_WHOLE_MAX = 4 << 20, CONTENT_END = 1 << 20, CONTENT_SAMPLES = 32, CONTENT_STEP = 4096 };
enum { STALE_AFTER_S = 24 * 3600, CONF_MAX = 1 << 20, SYSFS_TEXT_MAX = 256, LINKS_MAX = 40 };

const char *disk_proof_name(enum disk_proof proof)
{
    switch (proof) {
#define X(id, number, name)                                                                        \
    case DISK_PROOF_##id:                                                                          \
        return name;
        DISK_PROOFS(X)
#undef X
    }
    return "unknown";
}

static int proof_of(const struct qemu_disk *disk, enum disk_proof *ret, struct vm_error **err)
{
    static const struct {
        const char *driver;
        enum disk_proof written, read;
    } proofs[] = {{"file", DISK_PROOF_NONCE, DISK_PROOF_CONTENT},
                  {"host_device", DISK_PROOF_DEVICE, DISK_PROOF_DEVICE},
                  {"rbd", DISK_PROOF_RBD, DISK_PROOF_RBD}};
    for (size_t i = 0; i < sizeof(proofs) / sizeof(*proofs); i++)
        if (!strcmp(disk->driver, proofs[i].driver)) {
            *ret = disk->writable ? proofs[i].written : proofs[i].read;
            return 0;
        }
    return error_set(
        err, VM_ERROR_REFUSED,
        "disk %s (%s): there is no way to prove that both hosts have the same one; say "
        "--assume-shared if they do",
        disk->name, disk->driver);
}

int disk_identity_check_devices(const struct qemu_device *devices, unsigned n, struct vm_error **err)
{
    static const char child[] = "child<";
    static const char *const disks[] = {"vhost-user-blk", "vhost-user-scsi", "vhost-scsi",
                                        "vhost-user-fs"};
    for (unsigned i = 0; i < n; i++) {
        const char *type = devices[i].type;
        type += strncmp(type, child, strlen(child)) ? 0 : strlen(child);
        for (size_t k = 0; k < sizeof(disks) / sizeof(*disks); k++)
            if (!strncmp(type, disks[k], strlen(disks[k])))
                return error_set(err, VM_ERROR_REFUSED,
                                 "device %.200s (%.*s): there is no way to prove that both hosts "
                                 "have the same disk behind it; say --assume-shared if they do",
                                 devices[i].path, (int)strcspn(type, ">"), type);
    }
    return 0;
}

bool disk_identity_is_provable(const struct qemu_disk *disk)
{
    enum disk_proof proof;
    return proof_of(disk, &proof, NULL) == 0;
}

/* "CWD/FILE", or FILE if that is absolute. */
static int full_path(const char *cwd, const char *file, char out[QEMU_STRING_MAX],
                     struct vm_error **err)
{
    bool absolute = *file == '/';
    int n =
        snprintf(out, QEMU_STRING_MAX, "%s%s%s", absolute ? "" : cwd, absolute ? "" : "/", file);
    return n < QEMU_STRING_MAX ? 0
                               : error_set(err, VM_ERROR_USAGE, "the name %s is too long", file);
}

/* If it is a symbolic link: replace it by what it says. 1 if so, 0 if it is none. */
static int follow(const char *root, char path[QEMU_STRING_MAX], struct vm_error **err)
{
    char target[QEMU_STRING_MAX], next[QEMU_STRING_MAX];
    cleanup_close int fd = io_open_within(root, path, O_PATH | O_NOFOLLOW);
    ssize_t n = fd < 0 ? -1 : readlinkat(fd, "", target, sizeof(target) - 1);
    if (fd < 0 || (n < 0 && errno != ENOENT && errno != EINVAL))
        return error_errno(err, errno, "cannot find %s", path);
    if (n < 0)
        return 0;
    target[n] = 0;
    const char *slash = strrchr(path, '/');
    int folder = *target == '/' || !slash ? 0 : (int)(slash + 1 - path);
    if (snprintf(next, sizeof(next), "%.*s%s", folder, path, target) >= (int)sizeof(next))
        return error_set(err, VM_ERROR_USAGE, "the name %s is too long", path);
    strcpy(path, next);
    return 1;
}

/* The folder that an image is really in: QEMU follows symbolic links, and two names of one file are
 * the same disk. */
static int open_folder(const char *root, const char *image, struct vm_error **err)
{
    char path[QEMU_STRING_MAX];
    int links = 0, followed;
    snprintf(path, sizeof(path), "%s", image);
    while ((followed = follow(root, path, err)) > 0)
        if (++links > LINKS_MAX)
            return error_errno(err, ELOOP, "cannot find %s", image);
    if (followed < 0)
        return -1;
    char *slash = strrchr(path, '/');
    if (!slash)
        return error_set(err, VM_ERROR_USAGE, "%s is not a file name", path);
    slash[slash == path] = 0;
    int fd = io_open_within(root, path, O_RDONLY | O_DIRECTORY);
    return fd < 0 ? error_errno(err, errno, "cannot open the folder of %s", image) : fd;
}

int disk_identity_view(pid_t pid, const char *cwd, struct disk_view *ret, struct vm_error **err)
{
    char mounts[32];
    struct stat own_mounts, its_mounts, own_top, its_top;
    struct disk_view view = {.cwd = cwd, .user = pid};
    snprintf(view.root, sizeof(view.root), "/proc/%d/root", pid);
    snprintf(mounts, sizeof(mounts), "/proc/%d/ns/mnt", pid);
    if (stat("/proc/self/ns/mnt", &own_mounts) < 0 || stat(mounts, &its_mounts) < 0 ||
        stat("/", &own_top) < 0 || stat(view.root, &its_top) < 0)
        return error_errno(err, errno, "cannot find out which files process %d sees", pid);
    if (own_mounts.st_ino == its_mounts.st_ino && own_top.st_dev == its_top.st_dev &&
        own_top.st_ino == its_top.st_ino)
        view.root[0] = 0;
    *ret = view;
    return 0;
}

static void nonce_name(const struct uuid *nonce, char out[64])
{
    snprintf(out, 64, PREFIX "%s", uuid_text(nonce));
}

/* Proofs that a crashed agent left behind. */
static void remove_stale(int folder)
{
    int own = openat(folder, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *dir = own >= 0 ? fdopendir(own) : NULL;
    if (!dir) {
        close_fd(&own);
        return;
    }
    struct dirent *entry;
    while ((entry = readdir(dir))) {
        struct uuid nonce;
        struct stat st;
        if (strncmp(entry->d_name, PREFIX, strlen(PREFIX)) ||
            !uuid_parse(entry->d_name + strlen(PREFIX), &nonce))
            continue;
        if (fstatat(folder, entry->d_name, &st, AT_SYMLINK_NOFOLLOW) == 0 &&
            time(NULL) - st.st_mtime > STALE_AFTER_S)
            unlinkat(folder, entry->d_name, 0);
    }
    closedir(dir);
}

static int write_nonce(int folder, const struct disk_offer *offer, struct vm_error **err)
{
    char name[64], text[UUID_TEXT_SIZE];
    nonce_name(&offer->nonce, name);
    cleanup_close int fd =
        openat(folder, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (fd < 0)
        return error_errno(err, errno,
                           "cannot write a proof beside the image, as the agent has to (NFS: "
                           "export it with no_root_squash; or say --assume-shared)");
    uuid_format(&offer->secret, text);
    /* On NFS another host sees what was written once it was synced. */
    if (write(fd, text, UUID_TEXT_SIZE - 1) == UUID_TEXT_SIZE - 1 && fsync(fd) == 0)
        return 0;
    int saved = errno;
    unlinkat(folder, name, 0);
    return error_errno(err, saved, "cannot write a proof");
}

static int offer_nonce(const struct qemu_disk *disk, const struct disk_view *view,
                       struct disk_offer *offer, struct vm_error **err)
{
    char path[QEMU_STRING_MAX];
    if (full_path(view->cwd, disk->file, path, err) < 0)
        return -1;
    cleanup_close int folder = open_folder(view->root, path, err);
    if (folder < 0)
        return -1;
    remove_stale(folder);
    if (write_nonce(folder, offer, err) < 0)
        return error_wrap(err, "disk %s", disk->name);
    offer->folder = steal_fd(&folder);
    return 0;
}

int disk_identity_offer(const struct qemu_disk *disk, const struct disk_view *view,
                        struct disk_offer *ret_offer, struct vm_error **err)
{
    struct disk_offer offer = {.nonce = uuid_new(), .secret = uuid_new(), .folder = -1};
    if (proof_of(disk, &offer.proof, err) < 0)
        return -1;
    if (offer.proof == DISK_PROOF_NONCE && offer_nonce(disk, view, &offer, err) < 0)
        return -1;
    *ret_offer = offer;
    return 0;
}

void disk_identity_withdraw(struct disk_offer *offer)
{
    char name[64];
    nonce_name(&offer->nonce, name);
    if (offer->folder >= 0)
        unlinkat(offer->folder, name, 0);
    close_fd(&offer->folder);
}

/* What a host sees of a disk. Both sides describe, the source compares. */

/* What is behind a name, which may mean another file than when QEMU opened it. */
static int look_at_open(const struct disk_view *view, const char *path, int fd, struct stat *st,
                        struct vm_error **err)
{
    if (fstat(fd, st) < 0)
        return error_errno(err, errno, "cannot look at %s", path);
    if (!view->user || process_has_open(view->user, st))
        return 0;
    return error_set(err, VM_ERROR_REFUSED,
                     "%s is not what QEMU has open under that name: it was replaced since",
                     path);
}

static int describe_file(const struct disk_view *view, const char *path, struct disk_answer *a,
                         struct vm_error **err)
{
    struct stat st;
    cleanup_close int fd = io_look_at(view->root, path, S_IFREG, err);
    if (fd < 0 || look_at_open(view, path, fd, &st, err) < 0)
        return -1;
    snprintf(a->text, sizeof(a->text), "%.511s", path);
    a->inode = st.st_ino;
    return 0;
}

static int add_to_sum(int fd, off_t at, size_t n, XXH3_state_t *sum)
{
    char page[CONTENT_STEP];
    while (n > 0) {
        ssize_t got = pread(fd, page, n < sizeof(page) ? n : sizeof(page), at);
        if (got <= 0)
            return got < 0 ? -1 : (errno = EIO, -1); /* it became shorter */
        XXH3_128bits_update(sum, page, (size_t)got);
        at += got;
        n -= (size_t)got;
    }
    return 0;
}

/* Pages that nobody could choose beforehand. */
static int add_samples(int fd, off_t size, const struct uuid *nonce, XXH3_state_t *sum)
{
    for (unsigned i = 0; i < CONTENT_SAMPLES; i++) {
        uint64_t at = XXH3_64bits_withSeed(nonce->bytes, sizeof(nonce->bytes), i) %
                      ((uint64_t)size / CONTENT_STEP);
        if (add_to_sum(fd, (off_t)at * CONTENT_STEP, CONTENT_STEP, sum) < 0)
            return -1;
    }
    return add_to_sum(fd, 0, CONTENT_END, sum) < 0
               ? -1
               : add_to_sum(fd, size - CONTENT_END, CONTENT_END, sum);
}

static int describe_content(const struct disk_view *view, const char *path,
                            const struct uuid *nonce, struct disk_answer *a, struct vm_error **err)
{
    struct stat st;
    cleanup_close int fd = io_open_type(view->root, path, S_IFREG, err);
    if (fd < 0 || look_at_open(view, path, fd, &st, err) < 0)
        return -1;
    XXH3_state_t *sum = XXH3_createState();
    if (!sum)
        return error_nomem(err);
    XXH3_128bits_reset(sum);
    int rc = st.st_size <= CONTENT_WHOLE_MAX ? add_to_sum(fd, 0, (size_t)st.st_size, sum)
                                             : add_samples(fd, st.st_size, nonce, sum);
    int saved = errno;
    XXH128_canonical_t canonical;
    XXH128_canonicalFromHash(&canonical, XXH3_128bits_digest(sum));
    XXH3_freeState(sum);
    if (rc < 0)
        return error_errno(err, saved, "cannot read %s", path);
    memcpy(a->secret.bytes, canonical.digest, sizeof(a->secret.bytes));
    snprintf(a->text, sizeof(a->text), "%.511s", path);
    a->size = (uint64_t)st.st_size;
    return 0;
}

/* A line of sysfs; "" if there is none. */
static void read_sysfs(const char *path, char out[SYSFS_TEXT_MAX])
{
    out[0] = 0;
    cleanup_close int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? -1 : read(fd, out, SYSFS_TEXT_MAX - 1);
    out[n > 0 ? n : 0] = 0;
    out[strcspn(out, "\n")] = 0;
}

/* Disks that an emulator has made up for a host which is a VM itself are called alike everywhere. */
bool disk_identity_is_worldwide(const char *identifier)
{
    static const char *const made_up[] = {"QEMU HARDDISK", "QEMU DVD-ROM", "VBOX HARDDISK"};
    for (size_t i = 0; i < sizeof(made_up) / sizeof(*made_up); i++)
        if (strstr(identifier, made_up[i]))
            return false;
    return *identifier != 0;
}

/* An identifier that travels with the device: world-wide name, or device mapper's UUID (LVM,
 * multipath). "": none. */
static void device_identifier(dev_t device, char out[DISK_IDENTITY_TEXT_MAX])
{
    static const char *const files[] = {"dm/uuid", "wwid", "device/wwid"};
    char path[128], text[SYSFS_TEXT_MAX] = "";
    out[0] = 0;
    for (size_t i = 0; i < sizeof(files) / sizeof(*files) && !*text; i++) {
        snprintf(path, sizeof(path), "/sys/dev/block/%u:%u/%s", major(device), minor(device),
                 files[i]);
        read_sysfs(path, text);
        if (!disk_identity_is_worldwide(text))
            *text = 0;
    }
    snprintf(out, DISK_IDENTITY_TEXT_MAX, "%s", text);
}

static int describe_device(const struct disk_view *view, const char *path, struct disk_answer *a,
                           struct vm_error **err)
{
    struct stat st;
    cleanup_close int fd = io_open_type(view->root, path, S_IFBLK, err);
    if (fd < 0 || look_at_open(view, path, fd, &st, err) < 0)
        return -1;
    if (ioctl(fd, BLKGETSIZE64, &a->size) < 0)
        return error_errno(err, errno, "cannot ask the size of %s", path);
    a->device = st.st_rdev;
    device_identifier(st.st_rdev, a->text);
    return 0;
}

/* The value of `fsid = ...` in a Ceph configuration, of whatever section; false if it has none. */
static bool find_fsid(const char *conf, struct uuid *ret)
{
    for (const char *line = conf; line; line = strchr(line, '\n')) {
        line += *line == '\n';
        line += strspn(line, " \t");
        if (strncmp(line, "fsid", 4))
            continue;
        const char *value = line + 4 + strspn(line + 4, " \t");
        if (*value != '=')
            continue;
        char text[UUID_TEXT_SIZE];
        value += 1 + strspn(value + 1, " \t");
        snprintf(text, sizeof(text), "%s", value);
        if (uuid_parse(text, ret) && !isxdigit((unsigned char)value[UUID_TEXT_SIZE - 1]))
            return true;
    }
    return false;
}

static int describe_rbd(const struct qemu_disk *disk, const struct disk_view *view,
                        struct disk_answer *a, struct vm_error **err)
{
    struct rbd_name name;
    struct uuid fsid;
    char path[QEMU_STRING_MAX];
    cleanup_free char *conf = NULL;
    size_t n;
    if (!rbd_name_parse(disk->file, &name))
        return error_set(err, VM_ERROR_REFUSED, "disk %s: cannot tell which RBD image %s is",
                         disk->name, disk->file);
    cleanup_close int fd = -1;
    if (full_path(view->cwd, *name.conf ? name.conf : DEFAULT_CEPH_CONF, path, err) < 0 ||
        (fd = io_open_type(view->root, path, S_IFREG, err)) < 0 ||
        io_read_all(fd, path, CONF_MAX, &conf, &n, err) < 0)
        return error_wrap(err, "disk %s", disk->name);
    if (!find_fsid(conf, &fsid))
        return error_set(
            err, VM_ERROR_REFUSED,
            "disk %s: %s does not say which cluster it is (fsid); say --assume-shared if "
            "both hosts mean the same one",
            disk->name, path);
    snprintf(a->text, sizeof(a->text), "%s/%.128s/%.128s/%.128s", uuid_text(&fsid), name.pool,
             name.space, name.image);
    return 0;
}

static int describe(const struct qemu_disk *disk, const struct disk_offer *offer,
                    const struct disk_view *view, struct disk_answer *a, struct vm_error **err)
{
    char path[QEMU_STRING_MAX];
    struct process_identity self;
    if (process_identify(getpid(), &self, err) < 0)
        return -1;
    a->boot = self.boot;
    if (offer->proof == DISK_PROOF_RBD)
        return describe_rbd(disk, view, a, err);
    if (full_path(view->cwd, disk->file, path, err) < 0)
        return -1;
    int rc = offer->proof == DISK_PROOF_NONCE    ? describe_file(view, path, a, err)
             : offer->proof == DISK_PROOF_DEVICE ? describe_device(view, path, a, err)
                                                 : describe_content(view, path, &offer->nonce, a,
                                                                    err);
    return rc < 0 ? error_wrap(err, "disk %s", disk->name) : 0;
}

static int read_nonce(const struct qemu_disk *disk, const struct disk_view *view,
                      const struct disk_offer *offer, struct disk_answer *a, struct vm_error **err)
{
    char path[QEMU_STRING_MAX], name[64], text[UUID_TEXT_SIZE] = "";
    if (full_path(view->cwd, disk->file, path, err) < 0)
        return -1;
    cleanup_close int folder = open_folder(view->root, path, err);
    if (folder < 0)
        return -1;
    nonce_name(&offer->nonce, name);
    cleanup_close int fd = openat(folder, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0)
        return error_set(
            err, VM_ERROR_REFUSED,
            "disk %s: %s is another file here than on the other host (the proof beside that one is "
            "not here): it has to lie on storage that both see under this name",
            disk->name, path);
    if (read(fd, text, UUID_TEXT_SIZE - 1) != UUID_TEXT_SIZE - 1 || !uuid_parse(text, &a->secret))
        return error_set(err, VM_ERROR_REFUSED, "disk %s: the proof beside %s is damaged",
                         disk->name, path);
    return 0;
}

int disk_identity_answer(const struct qemu_disk *disk, const struct disk_view *view,
                         const struct disk_offer *offer, struct disk_answer *ret_answer,
                         struct vm_error **err)
{
    struct disk_answer answer = {0};
    enum disk_proof proof = DISK_PROOF_NONCE;
    if (proof_of(disk, &proof, err) < 0)
        return -1;
    if (proof != offer->proof)
        return error_set(err, VM_ERROR_REFUSED,
                         "disk %s: %s is not the one of the other host, which is opened as a %s",
                         disk->name, disk->file, disk_proof_name(offer->proof));
    if (describe(disk, offer, view, &answer, err) < 0 ||
        (proof == DISK_PROOF_NONCE && read_nonce(disk, view, offer, &answer, err) < 0))
        return -1;
    *ret_answer = answer;
    return 0;
}

static int not_the_same(const struct qemu_disk *disk, const struct disk_answer *there,
                        const char *what, struct vm_error **err)
{
    bool named = *there->text && strcmp(there->text, disk->file);
    return error_set(err, VM_ERROR_REFUSED,
                     "disk %s: %s is not the same one on both hosts%s%.400s: %s (--assume-shared "
                     "overrides this)",
                     disk->name, disk->file, named ? ", there it is " : "",
                     named ? there->text : "", what);
}

int disk_identity_check(const struct qemu_disk *disk, const struct disk_view *view,
                        const struct disk_offer *offer, const struct disk_answer *answer,
                        struct vm_error **err)
{
    struct disk_answer own = {0};
    if (describe(disk, offer, view, &own, err) < 0)
        return -1;
    switch (offer->proof) {
    case DISK_PROOF_NONCE:
        if (!uuid_equal(&answer->secret, &offer->secret))
            return not_the_same(disk, answer, "the destination did not find the proof", err);
        if (answer->inode != own.inode)
            return not_the_same(disk, answer, "the inode differs", err);
        return 0;
    case DISK_PROOF_DEVICE:
        if (uuid_equal(&answer->boot, &own.boot) && answer->device == own.device)
            return 0;
        if (!*own.text || strncmp(answer->text, own.text, sizeof(own.text)))
            return not_the_same(disk, answer, "no world-wide or LVM identifier shows that it is",
                                err);
        return answer->size == own.size ? 0 : not_the_same(disk, answer, "the size differs", err);
    case DISK_PROOF_CONTENT:
        if (answer->size != own.size || !uuid_equal(&answer->secret, &own.secret))
            return not_the_same(disk, answer, "the contents differ", err);
        return 0;
    case DISK_PROOF_RBD:
        if (strncmp(answer->text, own.text, sizeof(own.text)))
            return not_the_same(disk, answer, "cluster, pool or image differ", err);
        return 0;
    }
    return error_set(err, VM_ERROR_PROTOCOL, "disk %s: a proof of an unknown kind", disk->name);
}

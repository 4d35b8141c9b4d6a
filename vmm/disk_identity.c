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

#define PREFIX ".vmmig-proof-"
#define DEFAULT_CEPH_CONF "/etc/ceph/ceph.conf"
enum { STALE_AFTER_S = 24 * 3600, CONF_MAX = 1 << 20, SYSFS_TEXT_MAX = 256 };

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
        enum disk_proof proof;
    } proofs[] = {
        {"file", DISK_PROOF_NONCE}, {"host_device", DISK_PROOF_DEVICE}, {"rbd", DISK_PROOF_RBD}};
    for (size_t i = 0; i < sizeof(proofs) / sizeof(*proofs); i++)
        if (!strcmp(disk->driver, proofs[i].driver)) {
            *ret = proofs[i].proof;
            return 0;
        }
    return error_set(
        err, VM_ERROR_REFUSED,
        "disk %s (%s): there is no way to prove that both hosts have the same one; say "
        "--assume-shared if they do",
        disk->name, disk->driver);
}

/* "ROOT/CWD/FILE", or "ROOT/FILE" for an absolute name. */
static int full_path(const char *root, const char *cwd, const char *file, char out[QEMU_STRING_MAX],
                     struct vm_error **err)
{
    bool absolute = *file == '/';
    int n = snprintf(out, QEMU_STRING_MAX, "%s%s%s%s", root, absolute ? "" : cwd,
                     absolute ? "" : "/", file);
    return n < QEMU_STRING_MAX ? 0
                               : error_set(err, VM_ERROR_USAGE, "the name %s is too long", file);
}

/*
 * The folder that an image is really in: QEMU follows symbolic links, and two names of one file are
 * the same disk. (Within another mount namespace links that are absolute lead out of `root`: then
 * the folder of the name as it is given has to do.)
 */
static int open_folder(const char *path, const char *root, char out_name[NAME_MAX + 1],
                       struct vm_error **err)
{
    cleanup_free char *real = *root ? strdup(path) : realpath(path, NULL);
    if (!real)
        return error_errno(err, errno, "cannot find %s", path);
    char *slash = strrchr(real, '/');
    if (!slash || strlen(slash + 1) > NAME_MAX)
        return error_set(err, VM_ERROR_USAGE, "%s is not a file name", path);
    strcpy(out_name, slash + 1);
    *slash = 0;
    int fd = open(*real ? real : "/", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        error_errno(err, errno, "cannot open the folder of %s", path);
    return fd;
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
        return error_errno(err, errno, "cannot write a proof");
    uuid_format(&offer->secret, text);
    /* On NFS another host sees what was written once it was synced. */
    if (write(fd, text, UUID_TEXT_SIZE - 1) == UUID_TEXT_SIZE - 1 && fsync(fd) == 0)
        return 0;
    int saved = errno;
    unlinkat(folder, name, 0);
    return error_errno(err, saved, "cannot write a proof");
}

/* Where the proof is: in the folder that was opened, or, in another mount namespace, by the image's
 * name. */
static int name_proof(int folder, const char *image, const char *root, struct disk_offer *offer,
                      struct vm_error **err)
{
    char proc[32], name[64], place[QEMU_STRING_MAX];
    ssize_t n = strrchr(image, '/') - image;
    nonce_name(&offer->nonce, name);
    snprintf(proc, sizeof(proc), "/proc/self/fd/%d", folder);
    memcpy(place, image, (size_t)n);
    if (!*root)
        n = readlink(proc, place, sizeof(place) - 1);
    if (n < 0)
        return error_errno(err, errno, "cannot find the folder of %s", image);
    place[n] = 0;
    if (snprintf(offer->path, sizeof(offer->path), "%s/%s", place, name) >=
        (int)sizeof(offer->path))
        return error_set(err, VM_ERROR_USAGE, "the name %s is too long", image);
    return 0;
}

static int offer_nonce(const struct qemu_disk *disk, const char *cwd, const char *root,
                       struct disk_offer *offer, struct vm_error **err)
{
    char path[QEMU_STRING_MAX], base[NAME_MAX + 1];
    if (full_path(root, cwd, disk->file, path, err) < 0)
        return -1;
    cleanup_close int folder = open_folder(path, root, base, err);
    if (folder < 0)
        return -1;
    remove_stale(folder);
    if (name_proof(folder, path, root, offer, err) < 0 || write_nonce(folder, offer, err) < 0)
        return error_wrap(err, "disk %s", disk->name);
    return 0;
}

int disk_identity_offer(const struct qemu_disk *disk, const char *cwd, const char *root,
                        struct disk_offer *ret_offer, struct vm_error **err)
{
    struct disk_offer offer = {.nonce = uuid_new(), .secret = uuid_new()};
    if (proof_of(disk, &offer.proof, err) < 0)
        return -1;
    if (offer.proof == DISK_PROOF_NONCE && offer_nonce(disk, cwd, root, &offer, err) < 0)
        return -1;
    *ret_offer = offer;
    return 0;
}

void disk_identity_withdraw(struct disk_offer *offer)
{
    if (offer->path[0])
        unlink(offer->path);
    offer->path[0] = 0;
}

/* What a host sees of a disk. Both sides describe, the source compares. */

static int describe_file(const char *path, struct disk_answer *a, struct vm_error **err)
{
    struct stat st;
    if (stat(path, &st) < 0)
        return error_errno(err, errno, "cannot look at %s", path);
    if (!S_ISREG(st.st_mode))
        return error_set(err, VM_ERROR_REFUSED, "%s is not a file", path);
    a->inode = st.st_ino;
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

/* An identifier that travels with the device: world-wide name, or device mapper's UUID (LVM,
 * multipath). */
static void device_identifier(dev_t device, char out[DISK_IDENTITY_TEXT_MAX])
{
    static const char *const files[] = {"dm/uuid", "wwid", "device/wwid"};
    char path[128], text[SYSFS_TEXT_MAX] = "";
    out[0] = 0;
    for (size_t i = 0; i < sizeof(files) / sizeof(*files) && !*text; i++) {
        snprintf(path, sizeof(path), "/sys/dev/block/%u:%u/%s", major(device), minor(device),
                 files[i]);
        read_sysfs(path, text);
    }
    snprintf(out, DISK_IDENTITY_TEXT_MAX, "%s", text);
}

static int describe_device(const char *path, struct disk_answer *a, struct vm_error **err)
{
    struct stat st;
    cleanup_close int fd = io_open_type(path, S_IFBLK, err);
    if (fd < 0)
        return -1;
    if (fstat(fd, &st) < 0 || ioctl(fd, BLKGETSIZE64, &a->size) < 0)
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

static int describe_rbd(const struct qemu_disk *disk, const char *root, struct disk_answer *a,
                        struct vm_error **err)
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
    if (full_path(root, "", *name.conf ? name.conf : DEFAULT_CEPH_CONF, path, err) < 0 ||
        (fd = io_open_type(path, S_IFREG, err)) < 0 ||
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

static int describe(const struct qemu_disk *disk, enum disk_proof proof, const char *cwd,
                    const char *root, struct disk_answer *a, struct vm_error **err)
{
    char path[QEMU_STRING_MAX];
    struct process_identity self;
    if (process_identify(getpid(), &self, err) < 0)
        return -1;
    a->boot = self.boot;
    if (proof == DISK_PROOF_RBD)
        return describe_rbd(disk, root, a, err);
    if (full_path(root, cwd, disk->file, path, err) < 0)
        return -1;
    return proof == DISK_PROOF_NONCE ? describe_file(path, a, err) : describe_device(path, a, err);
}

static int read_nonce(const struct qemu_disk *disk, const char *cwd, const struct disk_offer *offer,
                      struct disk_answer *a, struct vm_error **err)
{
    char path[QEMU_STRING_MAX], base[NAME_MAX + 1], name[64], text[UUID_TEXT_SIZE] = "";
    if (full_path("", cwd, disk->file, path, err) < 0)
        return -1;
    cleanup_close int folder = open_folder(path, "", base, err);
    if (folder < 0)
        return -1;
    nonce_name(&offer->nonce, name);
    cleanup_close int fd = openat(folder, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0)
        return error_set(
            err, VM_ERROR_REFUSED,
            "disk %s: %s is not the one of the other host: the proof beside that one is "
            "not here",
            disk->name, path);
    if (read(fd, text, UUID_TEXT_SIZE - 1) != UUID_TEXT_SIZE - 1 || !uuid_parse(text, &a->secret))
        return error_set(err, VM_ERROR_REFUSED, "disk %s: the proof beside %s is damaged",
                         disk->name, path);
    return 0;
}

int disk_identity_answer(const struct qemu_disk *disk, const char *cwd,
                         const struct disk_offer *offer, struct disk_answer *ret_answer,
                         struct vm_error **err)
{
    struct disk_answer answer = {0};
    enum disk_proof proof;
    if (proof_of(disk, &proof, err) < 0)
        return -1;
    if (proof != offer->proof)
        return error_set(err, VM_ERROR_PROTOCOL, "disk %s: a proof of the wrong kind was asked for",
                         disk->name);
    if (describe(disk, proof, cwd, "", &answer, err) < 0 ||
        (proof == DISK_PROOF_NONCE && read_nonce(disk, cwd, offer, &answer, err) < 0))
        return -1;
    *ret_answer = answer;
    return 0;
}

static int not_the_same(const struct qemu_disk *disk, const char *what, struct vm_error **err)
{
    return error_set(
        err, VM_ERROR_REFUSED,
        "disk %s: %s is not the same one on both hosts: %s (--assume-shared overrides this)",
        disk->name, disk->file, what);
}

int disk_identity_check(const struct qemu_disk *disk, const char *cwd, const char *root,
                        const struct disk_offer *offer, const struct disk_answer *answer,
                        struct vm_error **err)
{
    struct disk_answer own = {0};
    if (describe(disk, offer->proof, cwd, root, &own, err) < 0)
        return -1;
    switch (offer->proof) {
    case DISK_PROOF_NONCE:
        if (!uuid_equal(&answer->secret, &offer->secret))
            return not_the_same(disk, "the destination did not find the proof", err);
        if (answer->inode != own.inode || answer->size != own.size)
            return not_the_same(disk, "the inode or the size differs", err);
        return 0;
    case DISK_PROOF_DEVICE:
        if (uuid_equal(&answer->boot, &own.boot) && answer->device == own.device)
            return 0;
        if (!*own.text || strncmp(answer->text, own.text, sizeof(own.text)))
            return not_the_same(disk, "no world-wide or LVM identifier shows that it is", err);
        return answer->size == own.size ? 0 : not_the_same(disk, "the size differs", err);
    case DISK_PROOF_RBD:
        if (strncmp(answer->text, own.text, sizeof(own.text)))
            return not_the_same(disk, "cluster, pool or image differ", err);
        return 0;
    }
    return error_set(err, VM_ERROR_PROTOCOL, "disk %s: a proof of an unknown kind", disk->name);
}

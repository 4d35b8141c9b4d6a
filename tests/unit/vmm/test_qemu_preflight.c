/* SPDX-License-Identifier: Apache-2.0 */
/* What a preflight finds out about a running QEMU, and what it refuses, by name. */
#include "live.h"

#include "base/io.h"
#include "vmm/disk_identity.h"

#include <fcntl.h>
#include <string.h>
#include <sys/fsuid.h>
#include <sys/stat.h>
#include <sys/wait.h>

enum { MIB = 1 << 20, RUNTIME_DIR_MAX = 107 - 13 /* "/control.sock" */ };

#define SPAWN(...)                                                                                 \
    ({                                                                                             \
        struct vm_error *spawn_err_ = NULL;                                                        \
        struct qemu *spawned_ = live_spawn("a", &spawn_err_, "-M", "q35", "-m",                    \
                                           "64,slots=2,maxmem=1G", "-S", __VA_ARGS__, NULL);       \
        if (!spawned_)                                                                             \
            fail_msg("%s", error_message(spawn_err_));                                             \
        spawned_;                                                                                  \
    })

/* A file name in the scratch folder, and the file. */
static const char *make_disk(const char *name)
{
    const char *path = live_path(name, ".raw");
    cleanup_close int fd = open(path, O_CREAT | O_RDWR, 0600);
    assert_int_equal(ftruncate(fd, 4 * MIB), 0);
    return path;
}

/* Format into one of a few static texts. */
static const char *text(const char *format, ...) __attribute__((format(printf, 1, 2)));
static const char *text(const char *format, ...)
{
    static char texts[32][400];
    static unsigned next;
    char *out = texts[next++ % 32];
    va_list args;
    va_start(args, format);
    vsnprintf(out, sizeof(texts[0]), format, args);
    va_end(args);
    return out;
}

static void run(struct qemu *q, const char *command, const char *arguments)
{
    json_decref(live_qmp(q, command, arguments));
}

static void expect_refusal(struct qemu *q, const char *message)
{
    struct qemu_definition d = {0};
    struct vm_error *err = NULL;
    assert_int_equal(qemu_preflight(q, false, &d, &err), -1);
    assert_error(&err, VM_ERROR_REFUSED, message);
    assert_null(d.argv);
}

static void expect_pass(struct qemu *q)
{
    cleanup_qemu_definition struct qemu_definition d = {0};
    assert_ok(qemu_preflight(q, false, &d, why));
}

static void test_definition(void **state)
{
    cleanup_qemu_definition struct qemu_definition d = {0};
    const char *disk = make_disk("d0");
    struct qemu *q =
        SPAWN("-drive", text("file=%s,format=raw,if=none,id=root,cache=none", disk), "-device",
              "virtio-blk-pci,drive=root,id=vda", "-smp", "2", "-netdev", "user,id=n0", "-device",
              "virtio-net-pci,netdev=n0", "-cdrom", make_disk("cd"));
    assert_ok(qemu_preflight(q, false, &d, why));
    assert_string_equal(d.binary, "qemu-system-x86_64");
    assert_string_equal(d.cwd, live_dir);
    assert_true(!strncmp(d.machine, "pc-q35-", 7));
    assert_string_equal(d.accel, "tcg");
    assert_string_equal(d.cpu_model, "qemu64-x86_64-cpu");
    assert_non_null(strstr(d.cpu_features, ".EDX="));
    assert_int_equal(d.n_cpus, 2);
    assert_int_equal(d.state, GUEST_PAUSED);
    assert_int_equal(d.memory, 64 * MIB);
    assert_int_equal(d.n_ram, 1);
    assert_string_equal(d.ram[0].block, "pc.ram");
    assert_int_equal(d.n_disks, 2);
    const struct qemu_disk *root = !strcmp(d.disks[0].name, "root") ? &d.disks[0] : &d.disks[1];
    assert_string_equal(root->name, "root");
    assert_string_equal(root->file, disk);
    assert_string_equal(root->driver, "file");
    assert_string_equal(root->format, "raw");
    assert_true(root->writable && !root->cached);
    const struct qemu_disk *cd = root == d.disks ? &d.disks[1] : &d.disks[0];
    assert_true(!cd->writable && cd->cached);
    assert_int_equal(d.n_nics, 1);
    assert_string_equal(d.nics[0].kind, "user");
    assert_int_equal(d.n_devices, 2);
    live_end(q);
}

static void test_stale_disks(void **state)
{
    const char *disk = make_disk("d0"), *other = make_disk("d1");
    struct qemu *q =
        SPAWN("-blockdev", text("driver=raw,node-name=n0,file.driver=file,file.filename=%s", disk),
              "-device", "virtio-blk-pci,drive=n0,id=vda", "-drive",
              text("if=none,id=cd,media=cdrom,file=%s", make_disk("iso")), "-device",
              "ide-cd,drive=cd,id=cd0");
    expect_pass(q);
    /* A live snapshot: the command line's file is only the base now. */
    run(q, "blockdev-snapshot-sync",
        text("{\"node-name\": \"n0\", \"snapshot-file\": \"%s\", \"snapshot-node-name\": \"s0\"}",
             live_path("snap", ".qcow2")));
    expect_refusal(q, text("disk vda: the command line names %s, but the VM runs on %s", disk,
                           live_path("snap", ".qcow2")));
    live_end(q);

    q = SPAWN("-blockdev", text("driver=file,node-name=n0,filename=%s", disk));
    run(q, "blockdev-add",
        text("{\"driver\": \"file\", \"node-name\": \"n1\", \"filename\": \"%s\"}", other));
    expect_refusal(
        q, text("disk n1: the VM has %s open, which its command line does not name", other));
    run(q, "blockdev-del", "{\"node-name\": \"n1\"}");
    expect_pass(q);
    run(q, "blockdev-del", "{\"node-name\": \"n0\"}");
    expect_refusal(q, text("names %s, which the VM has not open any more", disk));
    live_end(q);

    q = SPAWN("-cdrom", text("%s/./iso.raw", live_dir));
    expect_pass(q);
    run(q, "blockdev-change-medium",
        text("{\"device\": \"ide2-cd0\", \"filename\": \"%s\"}", other));
    expect_refusal(q, "disk ide2-cd0: the VM has");
    run(q, "eject", "{\"device\": \"ide2-cd0\"}");
    expect_refusal(q, "which the VM has not open any more");
    live_end(q);
}

static void test_plugged_devices(void **state)
{
    struct qemu *q =
        SPAWN("-device", "pcie-root-port,id=rp1,chassis=1", "-device", "virtio-rng-pci,id=cold");
    expect_pass(q);
    run(q, "device_add", "{\"driver\": \"virtio-rng-pci\", \"id\": \"hot\", \"bus\": \"rp1\"}");
    expect_refusal(q, "device hot (virtio-rng-pci) was plugged while the VM ran");
    live_end(q);
}

/* A device without an id is seen by comparing with the destination's QEMU. */
static void test_anonymous_device(void **state)
{
    struct live_move m = {0};
    struct vm_error *err = NULL;
    struct qemu *q = SPAWN("-device", "pcie-root-port,id=rp1,chassis=1");
    run(q, "device_add", "{\"driver\": \"virtio-rng-pci\", \"bus\": \"rp1\"}");
    assert_int_equal(live_prepare(&m, q, "b", &err), -1);
    assert_error(&err, VM_ERROR_REFUSED,
                 "it lacks /machine/peripheral-anon/device[0] child<virtio-rng-pci>");
    live_move_finish(&m);
}

static void test_plugged_cpu(void **state)
{
    struct live_move m = {0};
    struct vm_error *err = NULL;
    struct qemu *q = SPAWN("-smp", "1,sockets=2,maxcpus=2");
    run(q, "device_add",
        "{\"driver\": \"qemu64-x86_64-cpu\", \"socket-id\": 1, \"core-id\": 0, "
        "\"thread-id\": 0}");
    assert_int_equal(live_prepare(&m, q, "b", &err), -1);
    assert_error(&err, VM_ERROR_REFUSED, "the number of CPUs is '1', not '2'");
    live_move_finish(&m);
}

static void test_refused_by_command_line(void **state)
{
    const char *disk = make_disk("d0");
    struct qemu *q = SPAWN("-object", "memory-backend-ram,id=sh,size=1M,share=on", "-device",
                           "ivshmem-plain,memdev=sh");
    expect_refusal(q, "ivshmem-plain cannot move");
    live_end(q);
    q = SPAWN("-snapshot", "-drive", text("file=%s,format=raw,if=virtio", disk));
    expect_refusal(q, "-snapshot cannot move");
    live_end(q);
    q = SPAWN("-fsdev", text("local,id=f,path=%s,security_model=none", live_dir), "-device",
              "virtio-9p-pci,fsdev=f,mount_tag=t");
    expect_pass(q); /* QEMU objects only while the guest has it mounted */
    live_end(q);
}

static void test_block_job(void **state)
{
    const char *disk = make_disk("d0"), *target = make_disk("d1");
    struct qemu *q = SPAWN("-drive", text("file=%s,format=raw,if=none,id=root", disk), "-drive",
                           text("file=%s,format=raw,if=none,id=other", target));
    run(q, "drive-mirror",
        text("{\"device\": \"root\", \"job-id\": \"copy\", \"sync\": \"full\", "
             "\"target\": \"%s\", \"speed\": 1}",
             live_path("mirror", ".raw")));
    expect_refusal(q, "the block job 'copy' (mirror) is running");
    live_end(q);
}

/* The destination's host. */

static void expect_unfit(struct qemu_definition *d, const struct qemu_host *host,
                         enum vm_error_kind kind, const char *message)
{
    struct vm_error *err = NULL;
    assert_int_equal(qemu_dest_check(d, host, &err), -1);
    assert_error(&err, kind, message);
}

/* Of a QEMU that was started for the guest and ended. */
static void expect_explanation(const struct qemu_definition *d, const struct qemu_host *host,
                               enum vm_error_kind kind, const char *message)
{
    struct vm_error *err = NULL, *failed = NULL;
    error_set(&failed, VM_ERROR_VMM_DIED, "it ended");
    assert_int_equal(qemu_dest_explain(d, host, failed, &err), -1);
    assert_error(&err, kind, message);
}

static void set(char **field, const char *value)
{
    free(*field);
    *field = strdup(value);
}

static void test_destination_host(void **state)
{
    cleanup_qemu_definition struct qemu_definition d = {0};
    struct qemu_host host = {.binary = LIVE_BINARY, .scratch_dir = live_dir};
    const char *disk = make_disk("d0");
    struct qemu *q = SPAWN("-drive", text("file=%s,format=raw,if=none,id=root", disk));
    assert_ok(qemu_preflight(q, false, &d, why));
    assert_ok(qemu_dest_check(&d, &host, why));

    host.binary = "/nonexistent/qemu";
    expect_unfit(&d, &host, VM_ERROR_NOT_FOUND, "cannot run /nonexistent/qemu");
    host.binary = LIVE_BINARY;

    /* From another host, through its page cache. */
    struct uuid boot = d.boot;
    d.boot = uuid_new();
    expect_unfit(&d, &host, VM_ERROR_REFUSED, "goes through a host's page cache");
    host.assume_shared = true;
    assert_ok(qemu_dest_check(&d, &host, why));
    host.assume_shared = false;
    d.disks[0].cached = false;
    assert_ok(qemu_dest_check(&d, &host, why));
    d.boot = boot;

    assert_int_equal(rename(disk, live_path("moved", ".raw")), 0);
    expect_unfit(&d, &host, VM_ERROR_NOT_FOUND, "disk root: ");
    assert_int_equal(rename(live_path("moved", ".raw"), disk), 0);

    d.ram[0].size = d.memory = 1ULL << 46;
    expect_unfit(&d, &host, VM_ERROR_NO_SPACE, "67108864 MiB of memory");
    d.ram[0].size = 1ULL << 40;
    d.ram[0].page_size = 2 * MIB;
    expect_unfit(&d, &host, VM_ERROR_NO_SPACE, "524288 huge pages of 2048 KiB");
    d.ram[0].page_size = 16 * MIB;
    expect_unfit(&d, &host, VM_ERROR_REFUSED, "no huge pages of 16384 KiB");
    d.ram[0].page_size = 4096;
    d.ram[0].size = d.memory = 64 * MIB;

    expect_explanation(&d, &host, VM_ERROR_VMM_DIED, "it ended");
    set(&d.machine, "pc-q35-99.0");
    expect_explanation(&d, &host, VM_ERROR_REFUSED, "does not have the machine type pc-q35-99.0");
    /* In the longest folder in which the agent's own socket has room. */
    char folder[RUNTIME_DIR_MAX + 1];
    int at = snprintf(folder, sizeof(folder), "%s/", live_dir);
    memset(folder + at, 'x', sizeof(folder) - 1 - (size_t)at);
    folder[RUNTIME_DIR_MAX] = 0;
    assert_int_equal(mkdir(folder, 0755), 0);
    host.scratch_dir = folder;
    expect_explanation(&d, &host, VM_ERROR_REFUSED, "does not have the machine type pc-q35-99.0");
    assert_int_equal(rmdir(folder), 0);
    live_end(q);
}

/* Disks. */

static int prove_as_seen(const struct disk_view *view, const struct qemu_disk *there,
                         const struct qemu_disk *here, struct vm_error **err)
{
    const struct disk_view other = {.cwd = live_dir};
    struct disk_offer offer;
    struct disk_answer answer;
    if (disk_identity_offer(there, view, &offer, err) < 0)
        return -1;
    int rc = disk_identity_answer(here, &other, &offer, &answer, err);
    if (rc == 0)
        rc = disk_identity_check(there, view, &offer, &answer, err);
    disk_identity_withdraw(&offer);
    return rc;
}

static int prove(const struct qemu_disk *there, const struct qemu_disk *here, struct vm_error **err)
{
    return prove_as_seen(&(struct disk_view){.cwd = live_dir}, there, here, err);
}

static struct qemu_disk disk_named(const char *driver, const char *file)
{
    return (struct qemu_disk){(char *)(uintptr_t) "root",
                              (char *)(uintptr_t) "n0",
                              (char *)(uintptr_t)file,
                              (char *)(uintptr_t)driver,
                              (char *)(uintptr_t) "raw",
                              true,
                              false};
}

static void expect_other(const struct qemu_disk *there, const struct qemu_disk *here,
                         const char *message)
{
    struct vm_error *err = NULL;
    assert_int_equal(prove(there, here, &err), -1);
    assert_error(&err, VM_ERROR_REFUSED, message);
}

static unsigned count_proofs(void)
{
    unsigned n = 0;
    char command[128], line[256];
    snprintf(command, sizeof(command), "ls -A %s", live_dir);
    FILE *f = popen(command, "r");
    while (fgets(line, sizeof(line), f))
        n += !strncmp(line, ".vmmig-proof-", 13);
    pclose(f);
    return n;
}

static void test_file_identity(void **state)
{
    struct qemu_disk disk = disk_named("file", make_disk("d0"));
    struct qemu_disk relative = disk_named("file", "d0.raw");
    struct qemu_disk sibling = disk_named("file", make_disk("d1"));
    assert_ok(prove(&disk, &disk, why));
    assert_ok(prove(&disk, &relative, why));
    /* The same name in another folder, a copy; and another file of the same folder and size. */
    assert_int_equal(mkdir(live_path("copy", ""), 0700), 0);
    char copy[200];
    snprintf(copy, sizeof(copy), "%s/d0.raw", live_path("copy", ""));
    cleanup_close int fd = open(copy, O_CREAT | O_RDWR, 0600);
    assert_int_equal(ftruncate(fd, 4 * MIB), 0);
    struct qemu_disk elsewhere = disk_named("file", copy);
    expect_other(&disk, &elsewhere, "the proof beside that one is not here");
    expect_other(&disk, &sibling, "the inode differs");
    /* A link is followed to where the image is. */
    assert_int_equal(symlink(disk.file, live_path("copy", "/link")), 0);
    assert_int_equal(symlink("link", live_path("copy", "/relative")), 0);
    assert_int_equal(symlink("loop", live_path("copy", "/loop")), 0);
    static const char *const roots[] = {"", "/proc/self/root"};
    for (size_t i = 0; i < sizeof(roots) / sizeof(*roots); i++) {
        struct qemu_disk link = disk_named("file", live_path("copy", "/link"));
        struct qemu_disk second = disk_named("file", live_path("copy", "/relative"));
        struct qemu_disk loop = disk_named("file", live_path("copy", "/loop"));
        struct disk_view view = {.cwd = live_dir};
        struct vm_error *err = NULL;
        snprintf(view.root, sizeof(view.root), "%s", roots[i]);
        assert_ok(prove_as_seen(&view, &link, &disk, why));
        assert_ok(prove_as_seen(&view, &disk, &second, why));
        assert_int_equal(prove_as_seen(&view, &loop, &disk, &err), -1);
        assert_error(&err, VM_ERROR_SYSTEM, "Too many levels of symbolic links");
    }
    assert_int_equal(count_proofs(), 0);
    /* The answer's secret must be the one that was written. */
    struct disk_offer offer;
    struct disk_answer answer;
    struct vm_error *err = NULL;
    const struct disk_view view = {.cwd = live_dir};
    assert_ok(disk_identity_offer(&disk, &view, &offer, why));
    assert_int_equal(count_proofs(), 1);
    assert_ok(disk_identity_answer(&disk, &view, &offer, &answer, why));
    answer.secret.bytes[3] ^= 1;
    assert_int_equal(disk_identity_check(&disk, &view, &offer, &answer, &err), -1);
    assert_error(&err, VM_ERROR_REFUSED, "did not find the proof");
    disk_identity_withdraw(&offer);
    assert_int_equal(count_proofs(), 0);
}

/* As root is on NFS that is exported as it is by default. */
static void test_a_folder_that_the_agent_may_not_write(void **state)
{
    const struct disk_view view = {.cwd = live_dir};
    struct qemu_disk disk = disk_named("file", make_disk("d0"));
    struct disk_offer offer;
    struct vm_error *err = NULL;
    assert_int_equal(chmod(live_dir, 0755), 0);
    setfsuid(65534);
    int rc = disk_identity_offer(&disk, &view, &offer, &err);
    setfsuid(0);
    assert_int_equal(rc, -1);
    assert_error(&err, VM_ERROR_DENIED, "NFS: export it with no_root_squash");
}

static void test_names_of_block_devices(void **state)
{
    assert_true(disk_identity_is_worldwide("naa.5000c500a1b2c3d4"));
    assert_true(disk_identity_is_worldwide("LVM-Yb3fOhGmXcGMfDoHbQ0kE9wDV3KzfvYv"));
    assert_false(disk_identity_is_worldwide("t10.ATA     QEMU HARDDISK                           QM00003"));
    assert_false(disk_identity_is_worldwide(""));
}

/* An image grows while its guest writes, between the two looks, too. */
static void test_an_image_that_grows(void **state)
{
    struct qemu_disk disk = disk_named("file", make_disk("d0"));
    const struct disk_view view = {.cwd = live_dir};
    struct disk_offer offer;
    struct disk_answer answer;
    assert_ok(disk_identity_offer(&disk, &view, &offer, why));
    assert_ok(disk_identity_answer(&disk, &view, &offer, &answer, why));
    assert_int_equal(truncate(disk.file, 8 * MIB), 0);
    assert_ok(disk_identity_check(&disk, &view, &offer, &answer, why));
    disk_identity_withdraw(&offer);
}

/* What is only read may be a copy. */
static void test_a_copy_that_is_only_read(void **state)
{
    static const off_t sizes[] = {0, 3 * MIB, 64 * MIB + 512};
    for (size_t i = 0; i < sizeof(sizes) / sizeof(*sizes); i++) {
        struct qemu_disk base = disk_named("file", make_disk("d0"));
        struct qemu_disk copy = disk_named("file", make_disk("d1"));
        base.writable = copy.writable = false;
        assert_int_equal(truncate(base.file, sizes[i]) | truncate(copy.file, sizes[i]), 0);
        assert_ok(prove(&base, &copy, why));
        struct qemu_disk written = copy;
        written.writable = true;
        expect_other(&base, &written, "which is opened as a file that is only read");
        cleanup_close int fd = open(copy.file, O_RDWR | O_CLOEXEC);
        off_t last = sizes[i] ? sizes[i] - 1 : 0;
        assert_int_equal(pwrite(fd, "x", 1, last), 1); /* of an empty one the size */
        expect_other(&base, &copy, "the contents differ");
        assert_int_equal(pwrite(fd, "\0", 1, last), 1);
        if (!sizes[i])
            continue;
        assert_ok(prove(&base, &copy, why));
        /* Another image of the same size, but for its ends. */
        char other[4096];
        memset(other, 'x', sizeof(other));
        for (off_t at = 2 * MIB; at + MIB + 4096 < sizes[i]; at += sizeof(other))
            assert_int_equal(pwrite(fd, other, sizeof(other), at), sizeof(other));
        if (sizes[i] > 4 * MIB)
            expect_other(&base, &copy, "the contents differ");
    }
}

/* Both hosts would find the new file under the name, and agree. */
static void test_an_image_that_was_replaced(void **state)
{
    struct qemu_disk disk = disk_named("file", make_disk("d0"));
    struct disk_view view;
    struct vm_error *err = NULL;
    int fd = open(disk.file, O_RDWR | O_CLOEXEC);
    pid_t user = fork();
    if (!user) {
        pause();
        _exit(0);
    }
    close(fd);
    assert_ok(disk_identity_view(user, live_dir, &view, why));
    assert_ok(prove_as_seen(&view, &disk, &disk, why));
    assert_int_equal(rename(make_disk("d1"), disk.file), 0);
    assert_int_equal(prove_as_seen(&view, &disk, &disk, &err), -1);
    assert_error(&err, VM_ERROR_REFUSED, "is not what QEMU has open under that name");
    kill(user, SIGKILL);
    waitpid(user, NULL, 0);
}

static void test_a_disk_that_qemu_does_not_see(void **state)
{
    char path[] = "/machine/peripheral/fast", type[] = "child<vhost-user-blk-pci>", nic[] = "child<virtio-net-pci>";
    struct qemu_device devices[] = {{path, nic}, {path, type}};
    struct vm_error *err = NULL;
    assert_ok(disk_identity_check_devices(devices, 1, why));
    assert_int_equal(disk_identity_check_devices(devices, 2, &err), -1);
    assert_error(&err, VM_ERROR_REFUSED,
                 "device /machine/peripheral/fast (vhost-user-blk-pci): there is no way to prove that both hosts have "
                 "the same disk behind it; say --assume-shared if they do");
}

/* A QEMU in a mount namespace of its own, where this process sees another file under that name, or
 * none. */
static void test_mount_namespace(void **state)
{
    char script[1200], folder[160], disk[200], drive[260];
    snprintf(folder, sizeof(folder), "%s", live_path("ns", ""));
    snprintf(disk, sizeof(disk), "%s/d.raw", folder);
    snprintf(drive, sizeof(drive), "file=%s/links/l.raw,format=raw,if=virtio,id=root", folder);
    snprintf(script, sizeof(script),
             "mount -t tmpfs none %s && truncate -s 4M %s && mkdir %s/links && ln -s %s %s/links/l.raw && "
             "exec " LIVE_BINARY " \"$@\"",
             folder, disk, folder, disk, folder);
    assert_int_equal(mkdir(folder, 0700), 0);
    char *argv[] = {(char[]){"unshare"},
                    (char[]){"-m"},
                    (char[]){"sh"},
                    (char[]){"-c"},
                    script,
                    (char[]){"sh"},
                    (char[]){"-accel"},
                    (char[]){"tcg"},
                    (char[]){"-nodefaults"},
                    (char[]){"-display"},
                    (char[]){"none"},
                    (char[]){"-S"},
                    (char[]){"-drive"},
                    drive,
                    NULL};
    struct qemu_launch launch = {.binary = "/usr/bin/unshare",
                                 .argv = argv,
                                 .qmp_path = live_path("a", ".qmp"),
                                 .log_path = live_path("a", ".log")};
    struct vm_error *err = NULL;
    struct qemu *q = live_note(qemu_spawn(&launch, &err));
    if (!q)
        fail_msg("%s", error_message(err));
    qemu_destroy(q);
    q = qemu_attach(launch.qmp_path, 5000, &err);
    if (!q)
        fail_msg("%s", error_message(err));
    cleanup_qemu_definition struct qemu_definition d = {0};
    assert_ok(qemu_preflight(q, false, &d, why));
    assert_string_equal(d.binary, "qemu-system-x86_64");
    assert_int_equal(d.n_disks, 1);

    struct disk_view its, own;
    assert_ok(disk_identity_view(qemu_guest(q)->process.pid, d.cwd, &its, why));
    assert_string_equal(its.root, text("/proc/%d/root", qemu_guest(q)->process.pid));
    assert_ok(disk_identity_view(getpid(), d.cwd, &own, why));
    assert_string_equal(own.root, "");
    struct disk_offer offer;
    struct disk_answer answer;
    assert_ok(disk_identity_offer(&d.disks[0], &its, &offer, why));
    /* The proof is beside the image to which the link leads there. */
    const char *proof = text("%s%s/.vmmig-proof-%s", its.root, folder, uuid_text(&offer.nonce));
    struct stat st;
    assert_int_equal(stat(proof, &st), 0);
    assert_ok(disk_identity_answer(&d.disks[0], &its, &offer, &answer, why));
    assert_ok(disk_identity_check(&d.disks[0], &its, &offer, &answer, why));
    assert_int_equal(mkdir(text("%s/links", folder), 0700), 0);
    assert_int_equal(symlink(disk, text("%s/links/l.raw", folder)), 0);
    cleanup_close int other = open(disk, O_CREAT | O_RDWR, 0600);
    assert_int_equal(ftruncate(other, 4 * MIB), 0);
    assert_int_equal(disk_identity_answer(&d.disks[0], &own, &offer, &answer, &err), -1);
    assert_error(&err, VM_ERROR_REFUSED, "the proof beside that one is not here");
    disk_identity_withdraw(&offer);
    assert_int_equal(stat(proof, &st), -1);
    live_end(q);
}

static void test_rbd_identity(void **state)
{
    static const char conf_a[] =
        "[global]\n fsid = 0c6ba9ae-9f9c-4d47-9d3a-3d5c3a3d6a11\nmon_host = a\n";
    static const char conf_b[] = "[global]\nfsid=1c6ba9ae-9f9c-4d47-9d3a-3d5c3a3d6a11\n";
    static const char conf_c[] = "[global]\nmon_host = a\n";
    assert_ok(io_write_file_durably(live_path("a", ".conf"), conf_a, strlen(conf_a), 0600, why));
    assert_ok(io_write_file_durably(live_path("b", ".conf"), conf_b, strlen(conf_b), 0600, why));
    assert_ok(io_write_file_durably(live_path("c", ".conf"), conf_c, strlen(conf_c), 0600, why));
    struct qemu_disk a =
        disk_named("rbd", text("rbd:vms/web1:id=x:conf=%s", live_path("a", ".conf")));
    struct qemu_disk same = disk_named(
        "rbd",
        text("json:{\"driver\": \"rbd\", \"pool\": \"vms\", \"image\": \"web1\", \"conf\": \"%s\"}",
             live_path("a", ".conf")));
    struct qemu_disk image =
        disk_named("rbd", text("rbd:vms/web2:conf=%s", live_path("a", ".conf")));
    struct qemu_disk space =
        disk_named("rbd", text("rbd:vms/ns/web1:conf=%s", live_path("a", ".conf")));
    struct qemu_disk cluster =
        disk_named("rbd", text("rbd:vms/web1:conf=%s", live_path("b", ".conf")));
    struct qemu_disk unknown =
        disk_named("rbd", text("rbd:vms/web1:conf=%s", live_path("c", ".conf")));
    assert_int_equal(mkfifo(live_path("d", ".conf"), 0600), 0);
    struct qemu_disk waits =
        disk_named("rbd", text("rbd:vms/web1:conf=%s", live_path("d", ".conf")));
    assert_ok(prove(&a, &same, why));
    expect_other(&a, &waits, "is not a file");
    expect_other(&a, &image, "cluster, pool or image differ");
    expect_other(&a, &space, "cluster, pool or image differ");
    expect_other(&a, &cluster, "cluster, pool or image differ");
    expect_other(&a, &unknown, "does not say which cluster it is");
}

static void test_other_identities(void **state)
{
    struct qemu_disk nbd = disk_named("nbd", "nbd://localhost/disk");
    expect_other(&nbd, &nbd, "no way to prove");
    struct qemu_disk device = disk_named("host_device", make_disk("d0"));
    expect_other(&device, &device, "is not a block device");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        live_test(test_definition),      live_test(test_stale_disks),
        live_test(test_plugged_devices), live_test(test_anonymous_device),
        live_test(test_plugged_cpu),     live_test(test_refused_by_command_line),
        live_test(test_block_job),       live_test(test_destination_host),
        live_test(test_file_identity),   live_test(test_a_folder_that_the_agent_may_not_write),
        live_test(test_names_of_block_devices),
        live_test(test_an_image_that_grows),
        live_test(test_an_image_that_was_replaced), live_test(test_a_copy_that_is_only_read),
        live_test(test_a_disk_that_qemu_does_not_see), live_test(test_mount_namespace),
        live_test(test_rbd_identity),    live_test(test_other_identities),
    };
    return cmocka_run_group_tests(tests, live_setup, live_teardown);
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Guests of every shape that the driver knows, moved from one QEMU to another: pages straight into
 * mapped memory, the rest through QEMU's own loader. Memory is compared as the guest sees it.
 */
#include "live.h"

#include "base/clock.h"
#include "base/io.h"
#include "vmm/qemu_address.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

enum { MIB = 1 << 20 };
#define HUGE_PAGES "/proc/sys/vm/nr_hugepages"

static char *loader(void)
{
    static char text[160];
    snprintf(text, sizeof(text), "loader,file=%s,addr=0x1000000,force-raw=on",
             live_path("random", ".bin"));
    return text;
}

/* Move it, compare `size` bytes of memory from 0, and move it once more: an argv of vmmig's own. */
static void move_twice(struct qemu *q, uint64_t size)
{
    struct live_move first = {0}, second = {0};
    assert_ok(live_move(&first, q, "b", why));
    assert_same_memory(q, first.to, 0, size);
    assert_run_state(first.to, GUEST_PAUSED);
    assert_ok(live_move(&second, first.to, "c", why));
    assert_same_memory(q, second.to, 0, size);
    first.to = NULL; /* the second has it */
    live_move_finish(&second);
    live_move_finish(&first);
}

#define SPAWN(...)                                                                                 \
    ({                                                                                             \
        struct vm_error *spawn_err_ = NULL;                                                        \
        struct qemu *spawned_ = live_spawn("a", &spawn_err_, __VA_ARGS__, NULL);                   \
        if (!spawned_)                                                                             \
            fail_msg("%s", error_message(spawn_err_));                                             \
        spawned_;                                                                                  \
    })

static void test_default_machine(void **state)
{
    move_twice(SPAWN("-m", "128", "-device", loader(), "-S"), 64 * MIB);
}

static void test_two_numa_nodes(void **state)
{
    move_twice(SPAWN("-M", "q35", "-m", "128", "-smp", "2", "-object",
                     "memory-backend-ram,id=m0,size=64M", "-object",
                     "memory-backend-memfd,id=m1,size=64M,share=on", "-numa",
                     "node,nodeid=0,cpus=0,memdev=m0", "-numa", "node,nodeid=1,cpus=1,memdev=m1",
                     "-device", loader(), "-S"),
               128 * MIB);
}

static void test_named_backend(void **state)
{
    move_twice(SPAWN("-M", "q35,memory-backend=ours", "-m", "64", "-object",
                     "{\"qom-type\": \"memory-backend-ram\", \"id\": \"ours\", \"size\": 67108864, "
                     "\"x-use-canonical-path-for-ramblock-id\": true}",
                     "-device", loader(), "-S"),
               64 * MIB);
}

static void test_mem_path(void **state)
{
    move_twice(SPAWN("-m", "64", "-mem-path", live_dir, "-mem-prealloc", "-device", loader(), "-S"),
               64 * MIB);
}

static void test_vga_and_cpus(void **state)
{
    move_twice(SPAWN("-M", "q35", "-m", "64", "-smp", "2", "-vga", "std", "-device",
                     "virtio-rng-pci", "-device", "qemu-xhci,id=usb", "-device", loader(), "-S"),
               64 * MIB);
}

/* The memory that a QEMU has behind a memory-backend-memfd, mapped. */
static char *map_memfd_of(struct qemu *q, size_t size)
{
    char path[64], link[256];
    for (int fd = 3; fd < 128; fd++) {
        snprintf(path, sizeof(path), "/proc/%d/fd/%d", qemu_guest(q)->process.pid, fd);
        ssize_t n = readlink(path, link, sizeof(link) - 1);
        link[n > 0 ? n : 0] = 0;
        if (!strstr(link, "/memfd:memory-backend-memfd"))
            continue;
        cleanup_close int own = open(path, O_RDWR | O_CLOEXEC);
        char *base = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, own, 0);
        assert_ptr_not_equal(base, MAP_FAILED);
        return base;
    }
    fail_msg("the QEMU has no memfd");
    return NULL;
}

static void test_hot_plugged_memory(void **state)
{
    struct qemu *q = SPAWN("-M", "q35", "-m", "64,slots=4,maxmem=1G", "-device", loader(), "-S");
    json_decref(live_qmp(q, "object-add",
                         "{\"qom-type\": \"memory-backend-memfd\", "
                         "\"id\": \"plugged\", \"size\": 134217728}"));
    json_decref(live_qmp(q, "device_add",
                         "{\"driver\": \"pc-dimm\", \"id\": \"dimm9\", "
                         "\"memdev\": \"plugged\", \"slot\": 2}"));
    /* A backend that nothing uses is no memory of the guest. */
    json_decref(live_qmp(q, "object-add",
                         "{\"qom-type\": \"memory-backend-ram\", "
                         "\"id\": \"unused\", \"size\": 134217728}"));
    char *memory = map_memfd_of(q, 128 * MIB);
    for (int i = 0; i < 128 * MIB; i += 4096)
        memory[i] = (char)(i / 4096 % 251);
    munmap(memory, 128 * MIB);
    struct live_move first = {0}, second = {0};
    assert_ok(live_move(&first, q, "b", why));
    assert_same_memory(q, first.to, 4ULL << 30, 128 * MIB);
    json_t *devices = live_qmp(first.to, "query-memory-devices", "");
    const json_t *data = json_object_get(json_array_get(devices, 0), "data");
    assert_string_equal(qmp_string(data, "id"), "dimm9");
    assert_int_equal(qmp_integer(data, "slot"), 2);
    json_decref(devices);
    assert_ok(live_move(&second, first.to, "c", why));
    assert_same_memory(q, second.to, 4ULL << 30, 128 * MIB);
    first.to = NULL;
    live_move_finish(&second);
    live_move_finish(&first);
}

static long huge_pages_before = -1;

static long read_huge_pages(void)
{
    long n = -1;
    cleanup_fclose FILE *f = fopen(HUGE_PAGES, "re");
    return f && fscanf(f, "%ld", &n) == 1 ? n : -1;
}

static void write_huge_pages(long n)
{
    cleanup_fclose FILE *f = fopen(HUGE_PAGES, "we");
    if (f)
        fprintf(f, "%ld\n", n);
}

static int give_back_huge_pages(void **state)
{
    int rc = live_kill_all(state);
    if (huge_pages_before >= 0)
        write_huge_pages(huge_pages_before);
    return rc;
}

static void test_huge_pages(void **state)
{
    enum { PAGES = 3 * 32 };
    huge_pages_before = read_huge_pages();
    write_huge_pages(huge_pages_before + PAGES);
    if (huge_pages_before < 0 || read_huge_pages() != huge_pages_before + PAGES) {
        print_message("SKIPPED: cannot get %d huge pages\n", PAGES);
        skip();
    }
    struct qemu *q =
        SPAWN("-m", "64", "-object", "memory-backend-memfd,id=h,size=64M,hugetlb=on,hugetlbsize=2M",
              "-machine", "memory-backend=h", "-device", loader(), "-S");
    struct live_move m = {0};
    assert_ok(live_move(&m, q, "b", why));
    assert_int_equal(m.regions[0].page_size, 2 * MIB);
    assert_same_memory(q, m.to, 0, 64 * MIB);
    live_move_finish(&m);
}

static void copy_file(const char *from, const char *to)
{
    char *data;
    size_t n;
    assert_ok(io_read_file(from, 32 * MIB, &data, &n, why));
    assert_ok(io_write_file_durably(to, data, n, 0600, why));
    free(data);
}

static void test_ovmf_and_disks(void **state)
{
    struct stat st;
    if (stat("/usr/share/OVMF/OVMF_CODE_4M.fd", &st) < 0) {
        print_message("SKIPPED: ovmf is not installed\n");
        skip();
    }
    char vars[256], disk[256];
    copy_file("/usr/share/OVMF/OVMF_VARS_4M.fd", live_path("vars", ".fd"));
    cleanup_close int fd = open(live_path("disk", ".raw"), O_CREAT | O_RDWR, 0600);
    assert_int_equal(ftruncate(fd, 16 * MIB), 0);
    snprintf(vars, sizeof(vars), "if=pflash,format=raw,file=%s", live_path("vars", ".fd"));
    struct qemu *q = SPAWN("-M", "q35", "-m", "128", "-drive",
                           "if=pflash,format=raw,readonly=on,file=/usr/share/OVMF/OVMF_CODE_4M.fd",
                           "-drive", vars, "-blockdev",
                           "driver=raw,node-name=d0,file.driver=file,file.filename=./disk.raw",
                           "-device", "virtio-blk-pci,drive=d0,id=vda");
    snprintf(disk, sizeof(disk), "%s", live_path("disk", ".raw"));
    struct live_move m = {0};
    assert_ok(live_move(&m, q, "b", why));
    assert_same_memory(q, m.to, 0, 128 * MIB);
    assert_int_equal(m.definition.n_disks, 3);
    assert_int_equal(m.definition.state, GUEST_RUNNING);
    /* The destination runs: it has activated its disks, which the source gave up. */
    assert_ok(guest_resume(qemu_guest(m.to), why));
    assert_run_state(m.to, GUEST_RUNNING);
    live_move_finish(&m);
}

/*
 * The hand-over is undone: the loaded destination has not touched the disks, so the source goes on.
 * Then the destination cannot start any more, and says that no vCPU ran.
 */
static void test_undone_with_a_disk(void **state)
{
    struct live_move m = {0};
    struct vm_error *err = NULL;
    cleanup_close int fd = open(live_path("disk", ".raw"), O_CREAT | O_RDWR, 0600);
    assert_int_equal(ftruncate(fd, 16 * MIB), 0);
    struct qemu *q = SPAWN("-m", "64", "-drive", "file=disk.raw,format=raw,if=virtio");
    assert_ok(live_move(&m, q, "b", why));
    assert_ok(guest_resume(qemu_guest(q), why));
    assert_run_state(q, GUEST_RUNNING);
    assert_int_equal(guest_resume(qemu_guest(m.to), &err), -1);
    assert_error(&err, VM_ERROR_REFUSED, "the guest stays paused");
    assert_run_state(m.to, GUEST_PAUSED);
    live_move_finish(&m);
}

/* A section of a device before RAM's end: the stream is relayed as it is. */
static void test_virtio_mem(void **state)
{
    struct qemu *q = SPAWN(
        "-M", "q35", "-m", "64,maxmem=1G", "-object", "memory-backend-ram,id=vm0,size=256M",
        "-device", "virtio-mem-pci,id=vmem,memdev=vm0,requested-size=0", "-device", loader(), "-S");
    struct live_move m = {0};
    assert_ok(live_move(&m, q, "b", why));
    assert_same_memory(q, m.to, 0, 64 * MIB);
    live_move_finish(&m);
}

/* The control plane's own destination: pages go into its own mapping, or all through its loader. */
static void move_to_prepared(bool by_loader)
{
    struct vm_error *err = NULL;
    struct qemu *q = SPAWN("-M", "q35", "-m", "64", "-device", loader());
    struct qemu *prepared = live_spawn("p", &err, "-M", "q35", "-m", "64", "-device", loader(),
                                       "-incoming", "defer", NULL);
    assert_non_null(prepared);
    qemu_destroy(prepared); /* somebody else's */
    struct live_move m = {.dest_qmp = live_path("p", ".qmp"), .by_loader = by_loader};
    assert_ok(live_move(&m, q, "p", why));
    assert_null(m.regions[0].base);
    assert_int_equal(m.regions[0].remote != 0, qemu_address_may());
    assert_true(by_loader ? m.bytes > 8 * MIB : m.bytes < 8 * MIB);
    assert_run_state(m.to, GUEST_PAUSED);
    assert_same_memory(q, m.to, 0, 64 * MIB);
    live_move_finish(&m);
}

static void test_prepared_destination(void **state)
{
    move_to_prepared(false);
}

static void test_prepared_destination_loads(void **state)
{
    move_to_prepared(true);
}

/* Its owner did not say -S, and the guest was never paused: it must not start at the end of
 * loading. */
static void test_prepared_destination_waits(void **state)
{
    struct vm_error *err = NULL;
    struct qemu *q = SPAWN("-m", "64", "-device", loader());
    qemu_destroy(
        live_spawn("p", &err, "-m", "64", "-device", loader(), "-incoming", "defer", NULL));
    struct live_move m = {.dest_qmp = live_path("p", ".qmp")};
    assert_ok(live_prepare(&m, q, "p", why));
    assert_ok(live_start(&m, why));
    assert_ok(live_wait(&m, why));
    assert_ok(guest_source_stop(qemu_guest(q), why));
    assert_ok(guest_sink_finish(qemu_guest(m.to), clock_mono_ns() + 20 * NSEC_PER_SEC, -1, why));
    assert_run_state(m.to, GUEST_PAUSED);
    assert_ok(guest_resume(qemu_guest(m.to), why));
    assert_run_state(m.to, GUEST_RUNNING);
    live_move_finish(&m);
}

/* The user's QEMU is left as it was. */
static void refuse_prepared(const char *text, struct qemu *prepared)
{
    struct vm_error *err = NULL;
    json_decref(live_qmp(prepared, "migrate-set-capabilities",
                         "{\"capabilities\": [{\"capability\": \"xbzrle\", \"state\": true}]}"));
    json_t *before = live_qmp(prepared, "query-migrate-capabilities", "");
    struct qemu *q = SPAWN("-M", "q35", "-m", "64", "-device", "virtio-rng-pci,id=rng", "-S");
    qemu_destroy(prepared);
    struct live_move m = {.dest_qmp = live_path("p", ".qmp")};
    assert_int_equal(live_prepare(&m, q, "p", &err), -1);
    assert_error(&err, VM_ERROR_REFUSED, text);
    m.to = qemu_attach(live_path("p", ".qmp"), 5000, &err);
    assert_non_null(m.to);
    json_t *after = live_qmp(m.to, "query-migrate-capabilities", "");
    assert_true(json_equal(before, after));
    json_decref(before);
    json_decref(after);
    live_move_finish(&m);
}

static void test_unfit_destinations(void **state)
{
    struct vm_error *err = NULL;
    refuse_prepared("must wait with -incoming defer",
                    live_spawn("p", &err, "-M", "q35", "-m", "64", "-S", NULL));
    refuse_prepared("machine type is 'pc-i440fx-",
                    live_spawn("p", &err, "-m", "64", "-incoming", "defer", NULL));
    refuse_prepared("the number of CPUs is '2', not '1'",
                    live_spawn("p", &err, "-M", "q35", "-m", "64", "-smp", "2", "-device",
                               "virtio-rng-pci,id=rng", "-incoming", "defer", NULL));
    refuse_prepared("it lacks /machine/peripheral/rng child<virtio-rng-pci>",
                    live_spawn("p", &err, "-M", "q35", "-m", "64", "-incoming", "defer", NULL));
    refuse_prepared("the VM lacks its /machine/peripheral/more child<virtio-rng-pci>",
                    live_spawn("p", &err, "-M", "q35", "-m", "64", "-device",
                               "virtio-rng-pci,id=rng", "-device", "virtio-rng-pci,id=more",
                               "-incoming", "defer", NULL));
    refuse_prepared("memory block pc.ram has 128 MiB",
                    live_spawn("p", &err, "-M", "q35", "-m", "128", "-device",
                               "virtio-rng-pci,id=rng", "-incoming", "defer", NULL));
    refuse_prepared("the CPU that this host offers is not the guest's",
                    live_spawn("p", &err, "-M", "q35", "-m", "64", "-cpu", "qemu64,-nx", "-device",
                               "virtio-rng-pci,id=rng", "-incoming", "defer", NULL));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        live_test(test_default_machine),
        live_test(test_two_numa_nodes),
        live_test(test_named_backend),
        live_test(test_mem_path),
        live_test(test_vga_and_cpus),
        live_test(test_hot_plugged_memory),
        cmocka_unit_test_teardown(test_huge_pages, give_back_huge_pages),
        live_test(test_ovmf_and_disks),
        live_test(test_undone_with_a_disk),
        live_test(test_prepared_destination_waits),
        live_test(test_virtio_mem),
        live_test(test_prepared_destination),
        live_test(test_prepared_destination_loads),
        live_test(test_unfit_destinations),
    };
    return cmocka_run_group_tests(tests, live_setup, live_teardown);
}

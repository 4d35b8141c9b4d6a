/* SPDX-License-Identifier: Apache-2.0 */
/* Command lines: their syntax, what becomes of them at the destination, and what is refused. */
#include "vmm/qemu_argv.h"
#include "vmm/qemu_definition.h"
#include "vmm/qemu_portable.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

/* Split at blanks, "\\ " is a blank. The result is one allocation. */
static char **split(const char *text)
{
    char **argv = calloc(64, sizeof(*argv) + strlen(text) + 1);
    char *out = (char *)(argv + 64);
    size_t n = 0;
    while (*text) {
        assert_true(n < 63);
        argv[n++] = out;
        for (; *text && *text != ' '; text++) {
            text += text[0] == '\\' && text[1] == ' ';
            *out++ = *text;
        }
        *out++ = 0;
        text += *text == ' ';
    }
    return argv;
}

static char *join(char *const *argv)
{
    char *text = calloc(1, 8192);
    for (; *argv; argv++) {
        strcat(text, *argv);
        if (argv[1])
            strcat(text, " ");
    }
    return text;
}

static void test_parse_and_format(void **state)
{
    static const struct {
        const char *in, *out; /* out NULL: as in */
    } cases[] = {
        {"qemu", NULL},
        {"qemu -m 512 -S", NULL},
        {"qemu --m 512 --daemonize", "qemu -m 512 -daemonize"},
        {"qemu -M q35 -enable-kvm -nographic disk.img",
         "qemu -machine q35 -enable-kvm -nographic disk.img"},
        {"qemu -append -S", NULL}, /* a value that looks like an option */
        {"qemu -D log -d int -s -h", NULL},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
        struct vm_error *err = NULL;
        cleanup_qemu_argv struct qemu_argv a = {0};
        char **argv = split(cases[i].in);
        if (qemu_argv_parse(argv, &a, &err) < 0)
            fail_msg("%s: %s", cases[i].in, error_message(err));
        char **again = qemu_argv_format(&a);
        char *text = join(again);
        assert_string_equal(text, cases[i].out ? cases[i].out : cases[i].in);
        free(text);
        free(again);
        free(argv);
    }
}

static void test_parse_errors(void **state)
{
    static const struct {
        const char *in;
        enum vm_error_kind kind;
        const char *text;
    } cases[] = {
        {"", VM_ERROR_USAGE, "empty"},
        {"qemu -m", VM_ERROR_USAGE, "-m has no value"},
        {"qemu -frobnicate 3", VM_ERROR_REFUSED, "-frobnicate, which vmmig does not know"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
        struct vm_error *err = NULL;
        cleanup_qemu_argv struct qemu_argv a = {0};
        char **argv = split(cases[i].in);
        assert_int_equal(qemu_argv_parse(argv, &a, &err), -1);
        assert_int_equal(err->kind, cases[i].kind);
        assert_non_null(strstr(error_message(err), cases[i].text));
        error_free(err);
        free(argv);
    }
}

static void test_props(void **state)
{
    static const struct {
        const char *text, *implied, *key, *value; /* value NULL: not there */
    } cases[] = {
        {"q35,accel=kvm", "type", "type", "q35"},
        {"q35,accel=kvm", "type", "accel", "kvm"},
        {"accel=kvm", "type", "type", NULL},
        {"file=a,,b=c,if=none", NULL, "file", "a,b=c"},
        {"file=x,readonly", NULL, "readonly", "on"},
        {"a=1,a=2", NULL, "a", "2"},
        {"a,,b=c,d=e", "type", "type", "a,b=c"},
        {"a,fd=7", NULL, "fd", "7"},
        {"a=1,", NULL, "a", "1"},
        {"a=1,,,b", NULL, "a", "1,"},
        {"b=2,type={x", "type", "type", "{x"},
        {"", "type", "type", NULL},
        {"socket,id=c,path=/x,server=on", "backend", "path", "/x"},
        {"{\"driver\": \"raw\", \"file\": {\"driver\": \"file\", \"filename\": \"a,b\"}}", "driver",
         "file.filename", "a,b"},
        {"{\"a\": [1, {\"b\": true}], \"c\": null}", NULL, "a.1.b", "on"},
        {"{\"a\": [1, {\"b\": true}], \"c\": null}", NULL, "a.0", "1"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
        struct vm_error *err = NULL;
        cleanup_qemu_props struct qemu_props p = {0};
        assert_int_equal(qemu_props_parse(cases[i].text, cases[i].implied, &p, &err), 0);
        const char *value = qemu_props_get(&p, cases[i].key);
        if (!cases[i].value)
            assert_null(value);
        else if (!value || strcmp(value, cases[i].value))
            fail_msg("%s: %s is '%s'", cases[i].text, cases[i].key, value ? value : "(none)");
        /* Written and read again it says the same. */
        char *text = qemu_props_format(&p, cases[i].implied);
        cleanup_qemu_props struct qemu_props again = {0};
        assert_int_equal(qemu_props_parse(text, cases[i].implied, &again, &err), 0);
        value = qemu_props_get(&again, cases[i].key);
        assert_int_equal(!value, !cases[i].value);
        if (value)
            assert_string_equal(value, cases[i].value);
        free(text);
    }
    static const char *const malformed[] = {"{\"a\": ", "a,,fd=7", "=x"};
    for (size_t i = 0; i < sizeof(malformed) / sizeof(*malformed); i++) {
        struct vm_error *err = NULL;
        cleanup_qemu_props struct qemu_props p = {0};
        assert_int_equal(qemu_props_parse(malformed[i], NULL, &p, &err), -1);
        assert_int_equal(err->kind, VM_ERROR_USAGE);
        error_free(err);
    }
}

static void test_sizes(void **state)
{
    static const struct {
        const char *text;
        uint64_t unit, bytes; /* 0: not a size */
    } cases[] = {
        {"512", 1 << 20, 512 << 20},
        {"512M", 1, 512 << 20},
        {"1g", 1, 1 << 30},
        {"0x1000", 1, 4096},
        {"1.5G", 1, 3ULL << 29},
        {"4096", 1, 4096},
        {"-1", 1, 0},
        {"12Q", 1, 0},
        {"12MB", 1, 0},
        {"", 1, 0},
        {"99999999999E", 1, 0},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
        uint64_t bytes = 0;
        bool ok = qemu_size_parse(cases[i].text, cases[i].unit, &bytes);
        if (ok != (cases[i].bytes != 0) || bytes != cases[i].bytes)
            fail_msg("%s: %d, %llu", cases[i].text, ok, (unsigned long long)bytes);
    }
}

/* Portable command lines. */

#define MAIN                                                                                       \
    {                                                                                              \
        "pc.ram", "pc.ram", 64 << 20, 4096, false                                                  \
    }
#define BACKEND(type, share, id, size)                                                             \
    "-object memory-backend-" type ",id=" id ",size=" size ",share=" share                         \
    ",x-use-canonical-path-for-ramblock-id=off"
#define RAM(id, size) BACKEND("file", "off", id, size)
#define FILE_RAM(id, size) BACKEND("file", "on", id, size)

struct portable_case {
    const char *in, *out;
    struct qemu_backend_fact backends[4];
    struct qemu_memory_device_fact devices[4];
    const char *main_backend;
};

static const struct
    portable_case
        portable_cases
            [] =
                {
                    {"qemu -m 64 -daemonize -pidfile /run/a.pid -S -incoming tcp:0:4444 -loadvm s "
                     "-runas u",
                     "qemu -machine pc-q35-7.2,memory-backend=pc.ram -m 64 " RAM("pc.ram",
                                                                                 "67108864"),
                     {MAIN},
                     {{0}},
                     "pc.ram"},
                    /* The version replaces the alias; the rest of -machine stays. */
                    {"qemu -M q35,accel=kvm -machine smm=off -cpu host,-arch-capabilities",
                     "qemu -machine pc-q35-7.2,memory-backend=pc.ram -machine accel=kvm -machine "
                     "smm=off -cpu "
                     "host,-arch-capabilities " RAM("pc.ram", "67108864"),
                     {MAIN},
                     {{0}},
                     "pc.ram"},
                    {"qemu -mem-path /dev/hugepages -mem-prealloc",
                     "qemu -machine pc-q35-7.2,memory-backend=pc.ram " FILE_RAM(
                         "pc.ram", "67108864") ",prealloc=on",
                     {{"pc.ram", "pc.ram", 64 << 20, 2 << 20, false}},
                     {{0}},
                     "pc.ram"},
                    /* Two nodes; a backend that is not there any more goes. */
                    {"qemu -object memory-backend-ram,id=m0,size=32M -object "
                     "memory-backend-memfd,id=m1,size=32M,share=on,hugetlb=on,prealloc=on,host-"
                     "nodes=0,policy=bind -object "
                     "memory-backend-ram,id=gone,size=1G -numa node,memdev=m0 -numa node,memdev=m1 "
                     "-object "
                     "rng-random,id=r",
                     "qemu -machine pc-q35-7.2 " RAM("m0", "33554432") " " FILE_RAM(
                         "m1", "33554432") ",prealloc=on,host-nodes=0,policy=bind -numa "
                                           "node,memdev=m0 -numa node,memdev=m1 -object "
                                           "rng-random,id=r",
                     {{"m0", "m0", 32 << 20, 4096, false}, {"m1", "m1", 32 << 20, 2 << 20, true}},
                     {{0}},
                     ""},
                    /* Blocks named after the QOM path. */
                    {"qemu -object memory-backend-ram,id=x,size=64M -machine memory-backend=x",
                     "qemu -machine pc-q35-7.2,memory-backend=x -object "
                     "memory-backend-file,id=x,size=67108864,"
                     "share=off,x-use-canonical-path-for-ramblock-id=on",
                     {{"x", "/objects/x", 64 << 20, 4096, false}},
                     {{0}},
                     "x"},
                    /* A DIMM of the command line keeps its place, a plugged one gets its own. */
                    {
                        "qemu -object memory-backend-ram,id=d0,size=64M -device "
                        "pc-dimm,memdev=d0,id=dimm0",
                        "qemu -machine pc-q35-7.2,memory-backend=pc.ram " RAM(
                            "d0", "67108864") " -device "
                                              "pc-dimm,memdev=d0,id=dimm0,slot=0,addr="
                                              "4294967296 " RAM("pc.ram",
                                                                "67108864") " " RAM("d1", "6710886"
                                                                                          "4") " -"
                                                                                               "dev"
                                                                                               "ice"
                                                                                               " pc"
                                                                                               "-di"
                                                                                               "mm,"
                                                                                               "id="
                                                                                               "dim"
                                                                                               "m1,"
                                                                                               "mem"
                                                                                               "dev"
                                                                                               "=d1"
                                                                                               ",sl"
                                                                                               "ot="
                                                                                               "3,"
                                                                                               "add"
                                                                                               "r="
                                                                                               "858"
                                                                                               "993"
                                                                                               "459"
                                                                                               "2,"
                                                                                               "nod"
                                                                                               "e="
                                                                                               "1",
                        {{"d0", "d0", 64 << 20, 4096, false},
                         MAIN,
                         {"d1", "d1", 64 << 20, 4096, false}},
                        {{"dimm0", "pc-dimm", "d0", 4ULL << 30, 0, 0},
                         {"dimm1", "pc-dimm", "d1", 8ULL << 30, 3, 1}},
                        "pc.ram"},
                    {"qemu -object memory-backend-ram,id=vm0,size=64M -device "
                     "virtio-mem-pci,id=v,memdev=vm0,requested-size=1G",
                     "qemu -machine pc-q35-7.2 " RAM(
                         "vm0", "67108864") " -device "
                                            "virtio-mem-pci,id=v,memdev=vm0,requested-size=1G,"
                                            "memaddr=4294967296",
                     {{"vm0", "0000:00:01.0/vm0", 64 << 20, 4096, false}},
                     {{"v", "virtio-mem-pci", "vm0", 4ULL << 30, -1, 0}},
                     ""},
                    /* Files that QEMU would empty. */
                    {"qemu -serial file:/log,1 -monitor none -chardev file,id=c,path=/x -chardev "
                     "null,id=n -serial "
                     "stdio",
                     "qemu -machine pc-q35-7.2 -chardev file,id=vmmig-file0,path=/log,,1,append=on "
                     "-serial "
                     "chardev:vmmig-file0 -monitor none -chardev file,id=c,path=/x,append=on "
                     "-chardev null,id=n "
                     "-serial stdio",
                     {{0}},
                     {{0}},
                     ""},
                    /* What vmmig added at the source. */
                    {"qemu -qmp unix:/u,server=on -chardev "
                     "socket,id=vmmig-qmp,fd=9,server=on,wait=off -mon "
                     "chardev=vmmig-qmp,mode=control -object "
                     "memory-backend-file,id=pc.ram,size=64M,share=on,mem-path="
                     "/proc/self/fd/8 -incoming defer -S",
                     "qemu -machine pc-q35-7.2,memory-backend=pc.ram -qmp unix:/u,server=on,wait=off " RAM(
                         "pc.ram", "67108864"),
                     {MAIN},
                     {{0}},
                     "pc.ram"},
                    /* Nobody comes whom a QEMU that waits could wait for. */
                    {"qemu -monitor tcp:h:1,server -serial unix:/s,wait=on,server=yes -chardev "
                     "socket,id=c,server=on,path=/a,,b -chardev socket,id=d,path=/d -qmp "
                     "unix:/q,wait=off,server=on -monitor telnet:h:2,server,nowait -serial "
                     "unix:/t,server=off -name server",
                     "qemu -machine pc-q35-7.2 -monitor tcp:h:1,server,wait=off -serial "
                     "unix:/s,server=yes,wait=off -chardev socket,id=c,server=on,path=/a,,b,wait=off "
                     "-chardev socket,id=d,path=/d -qmp unix:/q,wait=off,server=on -monitor "
                     "telnet:h:2,server,nowait -serial unix:/t,server=off -name server",
                     {{0}},
                     {{0}},
                     ""},
};

static struct qemu_memory_facts facts_of(const struct portable_case *c)
{
    struct qemu_memory_facts f = {.machine = "pc-q35-7.2",
                                  .main_backend = c->main_backend,
                                  .backends = c->backends,
                                  .devices = c->devices};
    while (f.n_backends < 4 && c->backends[f.n_backends].id)
        f.n_backends++;
    while (f.n_devices < 4 && c->devices[f.n_devices].id)
        f.n_devices++;
    return f;
}

static char *make_portable(const char *in, const struct qemu_memory_facts *facts,
                           struct vm_error **err)
{
    cleanup_qemu_argv struct qemu_argv a = {0}, portable = {0};
    char **argv = split(in);
    int rc = qemu_argv_parse(argv, &a, err);
    free(argv);
    if (rc < 0 || qemu_argv_portable(&a, facts, &portable, err) < 0)
        return NULL;
    argv = qemu_argv_format(&portable);
    char *text = join(argv);
    free(argv);
    return text;
}

static void test_portable(void **state)
{
    for (size_t i = 0; i < sizeof(portable_cases) / sizeof(*portable_cases); i++) {
        const struct portable_case *c = &portable_cases[i];
        struct qemu_memory_facts facts = facts_of(c);
        struct vm_error *err = NULL;
        char *text = make_portable(c->in, &facts, &err);
        if (!text)
            fail_msg("%s: %s", c->in, error_message(err));
        assert_string_equal(text, c->out);
        /* What is portable stays what it is. */
        char *again = make_portable(text, &facts, &err);
        if (!again)
            fail_msg("%s: %s", text, error_message(err));
        if (!strstr(c->in, "dimm0") && strcmp(again, text))
            fail_msg("again:\n%s\n%s", text, again);
        free(again);
        free(text);
    }
}

static void test_refused(void **state)
{
    static const struct {
        const char *in, *text;
    } cases[] = {
        {"-device vfio-pci,host=01:00.0", "VFIO"},
        {"-device {\"driver\":\"vfio-pci\",\"host\":\"01:00.0\"}", "VFIO"},
        {"-device ivshmem-plain,memdev=m", "shared with others"},
        {"-device nvdimm,memdev=m", "persistent memory"},
        {"-object memory-backend-file,id=m,mem-path=/pmem,pmem=on", "persistent memory"},
        {"-object sev-guest,id=s", "SEV"},
        {"-object tdx-guest,id=s", "TDX"},
        {"-machine q35,confidential-guest-support=s", "encrypted"},
        {"-machine q35,memory-encryption=s", "encrypted"},
        {"-add-fd fd=3,set=1", "inherited descriptor"},
        {"-netdev tap,id=n,fd=7", "inherited descriptor"},
        {"-netdev tap,id=n,fds=7:8", "inherited descriptor"},
        {"-netdev tap,id=n,ifname=t,vhostfd=7", "inherited descriptor"},
        {"-nic tap,fd=3", "inherited descriptor"},
        {"-netdev stream,id=n,addr.type=fd,addr.str=7", "inherited descriptor"},
        {"-chardev socket,id=c,fd=5,server=on", "inherited descriptor"},
        {"-drive file=/dev/fdset/1,if=virtio", "inherited descriptor"},
        {"-drive file=/proc/self/fd/3", "inherited descriptor"},
        {"-blockdev {\"driver\":\"file\",\"filename\":\"/dev/fdset/2\",\"node-name\":\"n\"}",
         "inherited descriptor"},
        {"-cdrom /dev/fd/9", "inherited descriptor"},
        {"-fsdev proxy,id=f,sock_fd=4", "inherited descriptor"},
        {"-snapshot", "temporary files"},
        {"-readconfig /etc/vm.conf", "hides options"},
        {"-chroot /var/empty", "files mean something else"},
        {"-run-with chroot=/var/empty", "files mean something else"},
    };
    struct qemu_memory_facts facts = {.machine = "pc-q35-7.2", .main_backend = ""};
    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
        char text[512];
        struct vm_error *err = NULL;
        snprintf(text, sizeof(text), "qemu -m 64 %s -S", cases[i].in);
        assert_null(make_portable(text, &facts, &err));
        if (err->kind != VM_ERROR_REFUSED || !strstr(error_message(err), cases[i].text))
            fail_msg("%s: %s", cases[i].in, error_message(err));
        error_free(err);
    }
}

static void test_plugged_virtio_mem_is_refused(void **state)
{
    struct qemu_backend_fact backend = {"vm0", "vm0", 64 << 20, 4096, false};
    struct qemu_memory_device_fact device = {"v", "virtio-mem-pci", "vm0", 4ULL << 30, -1, 0};
    struct qemu_memory_facts facts = {.machine = "m",
                                      .main_backend = "",
                                      .backends = &backend,
                                      .n_backends = 1,
                                      .devices = &device,
                                      .n_devices = 1};
    struct vm_error *err = NULL;
    assert_null(make_portable("qemu", &facts, &err));
    assert_non_null(strstr(error_message(err), "memory device v (virtio-mem-pci) was plugged"));
    error_free(err);
}

/* The destination. */

static struct qemu_definition make_definition(const char *argv)
{
    static struct qemu_ram ram[2];
    static char a[] = "pc.ram", b[] = "d1", binary[] = "qemu", cwd[] = "/",
                machine[] = "pc-q35-7.2", accel[] = "tcg", cpu[] = "qemu64-x86_64-cpu",
                features[] = "";
    ram[0] = (struct qemu_ram){a, a, 64 << 20, 4096};
    ram[1] = (struct qemu_ram){b, b, 32 << 20, 4096};
    return (struct qemu_definition){.binary = binary,
                                    .argv = split(argv),
                                    .cwd = cwd,
                                    .machine = machine,
                                    .accel = accel,
                                    .cpu_model = cpu,
                                    .cpu_features = features,
                                    .n_cpus = 1,
                                    .state = GUEST_PAUSED,
                                    .memory = 96 << 20,
                                    .ram = ram,
                                    .n_ram = 2};
}

static void test_destination(void **state)
{
    struct vm_error *err = NULL;
    struct qemu_definition d =
        make_definition("qemu -machine pc-q35-7.2 " FILE_RAM("d1", "33554432") " " RAM(
            "pc.ram", "67108864") " -netdev tap,id=n0,ifname=tap7,br=br0 -nic bridge,br=br9 "
                                  "-netdev user,id=u -daemonize");
    const int fds[] = {-1, 12};
    const struct qemu_name_map maps[] = {{"tap7", "vnet3"}, {"br9", "lan"}};
    struct qemu_place place = {fds, maps, 2};
    char **argv;
    assert_int_equal(qemu_definition_validate(&d, &err), 0);
    assert_true(qemu_argv_is_private(&d, 0));
    assert_false(qemu_argv_is_private(&d, 1));
    assert_int_equal(qemu_argv_destination(&d, &place, &argv, &err), 0);
    char *text = join(argv);
    assert_string_equal(
        text, "qemu -machine pc-q35-7.2 " FILE_RAM(
                  "d1", "33554432") ",mem-path=/proc/self/fd/12 " BACKEND("ram", "off", "pc.ram",
                                                                          "67108864") " "
                                        "-netdev tap,id=n0,ifname=vnet3,br=br0 -nic bridge,br=lan "
                                        "-netdev user,id=u "
                                        "-incoming defer -S");
    free(text);
    free(argv);
    free(d.argv);
}

/* A definition that does not fit together, as a hostile peer would send it. */
static void test_hostile_definitions(void **state)
{
    static const struct {
        const char *argv, *text;
    } cases[] = {
        {"qemu " RAM("pc.ram", "67108864"), "region 'd1' has no memory backend"},
        {"qemu " RAM("pc.ram", "67108864") " " RAM("d1", "33554432") " " RAM("evil", "4096"),
         "memory backend 'evil' has no region"},
        {"qemu " RAM("pc.ram", "67108864") " " RAM("d1", "33554432") " " RAM("d1", "33554432"),
         "'d1' is there twice"},
        {"qemu " RAM("pc.ram", "67108864") " " RAM("d1", "33554433"), "another size"},
        {"qemu " RAM("pc.ram", "67108864") " -object memory-backend-ram,id=d1,size=32M",
         "not portable"},
        {"qemu " RAM("pc.ram", "67108864") " " RAM("d1", "33554432") ",mem-path=/etc/shadow",
         "not portable"},
        {"qemu -bogus", "does not know"},
        {"qemu -name \x1b[31m", "control characters"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
        struct vm_error *err = NULL;
        struct qemu_definition d = make_definition(cases[i].argv);
        assert_int_equal(qemu_definition_validate(&d, &err), -1);
        if (!strstr(error_message(err), cases[i].text))
            fail_msg("%s: %s", cases[i].argv, error_message(err));
        error_free(err);
        free(d.argv);
    }
}

static void expect_invalid(const struct qemu_definition *d, const char *text)
{
    struct vm_error *err = NULL;
    assert_int_equal(qemu_definition_validate(d, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_PROTOCOL);
    if (!strstr(error_message(err), text))
        fail_msg("expected '%s', got '%s'", text, error_message(err));
    error_free(err);
}

static void test_hostile_fields(void **state)
{
    static char slash[] = "bin/qemu", relative[] = "tmp", huge[QEMU_STRING_MAX + 1];
    const struct qemu_definition good =
        make_definition("qemu " RAM("pc.ram", "67108864") " " RAM("d1", "33554432"));
    struct qemu_definition d = good;
    struct vm_error *err = NULL;
    assert_int_equal(qemu_definition_validate(&d, &err), 0);
    memset(huge, 'x', QEMU_STRING_MAX);
#define WITH(change, text)                                                                         \
    d = good;                                                                                      \
    change;                                                                                        \
    expect_invalid(&d, text)
    WITH(d.memory--, "do not add up");
    WITH(d.binary = slash, "not a file name");
    WITH(d.binary = NULL, "does not name the binary");
    WITH(d.cwd = relative, "not an absolute path");
    WITH(d.cwd = huge, "too long");
    WITH(d.state = GUEST_BROKEN, "neither running nor paused");
    WITH(d.n_ram = GUEST_REGIONS_MAX + 1, "more than 256 memory regions");
    WITH(d.n_disks = QEMU_DISKS_MAX + 1, "more than 256 disks");
    WITH(d.n_devices = QEMU_DEVICES_MAX + 1, "too many devices");
    WITH(d.argv = NULL, "no command line");
    struct qemu_ram *ram = good.ram, saved = *ram;
    WITH(ram->page_size = 3000, "impossible size");
    *ram = saved;
    WITH(ram->page_size = 2048, "impossible size");
    *ram = saved;
    WITH(ram->size += 1, "impossible size");
    *ram = saved;
    WITH(ram->size = 1ULL << 63, "impossible size");
    *ram = saved;
    WITH(ram->block = NULL, "does not name a memory block");
    *ram = saved;
    WITH(ram->block = good.ram[1].block, "there twice");
    *ram = saved;
#undef WITH
    free(good.argv);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_parse_and_format),
        cmocka_unit_test(test_parse_errors),
        cmocka_unit_test(test_props),
        cmocka_unit_test(test_sizes),
        cmocka_unit_test(test_portable),
        cmocka_unit_test(test_refused),
        cmocka_unit_test(test_plugged_virtio_mem_is_refused),
        cmocka_unit_test(test_destination),
        cmocka_unit_test(test_hostile_definitions),
        cmocka_unit_test(test_hostile_fields),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

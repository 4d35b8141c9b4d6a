/* SPDX-License-Identifier: Apache-2.0 */
/* libvmmig-attach against VMMs that get something wrong, and agents that do. No KVM needed but where it says so. */
#include "base/clock.h"
#include "base/io.h"
#include "proto/attach.h"
#include "tests/unit/dirtylog/toy_vmm.h"
#include "vmm/attach.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include <cmocka.h>

/* ---- Slots that are wrong ---- */

enum { MIB = 1 << 20 };

struct piece {
    struct vmmig_slot slot;
    int fd;
    void *host;
};

static struct piece new_piece(const char *name, uint32_t number, uint64_t address, uint64_t size,
                              unsigned flags)
{
    struct piece p = {.fd = memfd_create("piece", MFD_CLOEXEC | flags)};
    assert_return_code(ftruncate(p.fd, (off_t)size), 0);
    p.host = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, p.fd, 0);
    p.slot = (struct vmmig_slot){.kvm_slot = number,
                                 .guest_address = address,
                                 .size = size,
                                 .host = p.host,
                                 .memfd = p.fd};
    snprintf(p.slot.name, sizeof(p.slot.name), "%s", name);
    return p;
}

static void end_piece(struct piece *p, uint64_t size)
{
    munmap(p->host, size);
    close(p->fd);
}

/* A VMM without KVM, with memory of its own. */
static struct toy_vmm *new_vmm_with(unsigned callback_timeout_ms)
{
    struct toy_vmm like = {.sizes = {MIB, 4 * MIB},
                           .params = {.callback_timeout_ms = callback_timeout_ms}};
    return toy_vmm_create_incoming(&like);
}

/* Its callbacks return, if late on a busy machine. */
static struct toy_vmm *new_vmm(void)
{
    return new_vmm_with(10000);
}

/* One that is going to hang. */
static struct toy_vmm *new_impatient_vmm(void)
{
    return new_vmm_with(200);
}

static void expect_refused(struct vmmig_attach *a, const struct vmmig_slot *slots, unsigned n,
                           const char *text)
{
    struct vmmig_error error = {0};
    assert_int_equal(vmmig_set_slots(a, slots, n, &error), -1);
    assert_string_equal(error.text, text);
    assert_int_equal(error.code, EINVAL);
}

static void wrong_slots_are_refused_by_name(void **state)
{
    struct toy_vmm *v = new_vmm();
    struct piece a = new_piece("a", 0, 0, 4 * MIB, MFD_ALLOW_SEALING);
    struct piece b = new_piece("b", 1, 4ull << 30, 4 * MIB, MFD_ALLOW_SEALING);
    struct piece unsealed = new_piece("unsealed", 0, 0, MIB, 0);
    struct vmmig_slot s[2] = {a.slot, b.slot};
    struct vmmig_error error;

    assert_int_equal(vmmig_set_slots(v->attach, s, 2, &error), 0);
    s[1].guest_address = 2 * MIB;
    expect_refused(v->attach, s, 2, "memory slots a and b overlap in the guest");
    s[1] = a.slot;
    s[1].guest_address = 1ull << 30;
    s[1].kvm_slot = 5;
    snprintf(s[1].name, sizeof(s[1].name), "c");
    s[1].memfd_offset = 2 * MIB;
    s[1].size = MIB;
    expect_refused(v->attach, s, 2, "memory slots a and c overlap in their memfd");
    s[1] = b.slot;
    s[1].kvm_slot = 0;
    expect_refused(v->attach, s, 2, "memory slots a and b have one name or number");
    s[1] = b.slot;
    s[1].memfd_offset = 2 * MIB;
    expect_refused(v->attach, s, 2, "memory slot b needs 6291456 bytes of its memfd, which has 4194304");
    s[1] = b.slot;
    s[1].size = MIB + 5;
    expect_refused(v->attach, s, 2,
                   "memory slot b: address and size must be multiples of 4096, and not zero");
    expect_refused(v->attach, &unsealed.slot, 1,
                   "memory slot unsealed: its memory is no memfd that was made with MFD_ALLOW_SEALING");
    s[0].name[0] = '/';
    expect_refused(v->attach, s, 1, "a memory slot's name is 1 to 63 letters, digits or . _ -");
    expect_refused(v->attach, s, 0, "0 memory slots; 1 to 32 are possible");
    s[0] = a.slot;
    s[0].host = b.host;
    char text[128];
    snprintf(text, sizeof(text), "memory slot a: its memfd is not mapped, shared, at %p", b.host);
    expect_refused(v->attach, s, 1, text);
    void *private = mmap(NULL, 4 * MIB, PROT_READ | PROT_WRITE, MAP_PRIVATE, a.fd, 0);
    s[0].host = private;
    snprintf(text, sizeof(text), "memory slot a: its memfd is not mapped, shared, at %p", private);
    expect_refused(v->attach, s, 1, text);
    munmap(private, 4 * MIB);

    /* Nothing can be migrated until the slots are right again. */
    struct vm_error *err = NULL;
    CLEANUP(attach) struct attach *agent = attach_connect(v->path, 1000, &err);
    struct qemu_definition d = {0};
    assert_int_equal(attach_define(agent, &d, &err), -1);
    assert_string_equal(error_message(err), "the VMM has not told its memory slots");
    error_clear(&err);
    /* What was accepted cannot shrink any more. */
    assert_int_equal(ftruncate(a.fd, MIB), -1);

    end_piece(&a, 4 * MIB);
    end_piece(&b, 4 * MIB);
    end_piece(&unsealed, MIB);
    toy_vmm_destroy(v);
}

static void a_wrong_configuration_is_refused(void **state)
{
    struct vmmig_error error;
    struct vmmig_attach *a;
    struct vmmig_config config = {.size = VMMIG_CONFIG_SIZE - 8};
    assert_int_equal(vmmig_create(&config, &a, &error), -1);
    assert_non_null(strstr(error.text, "build the VMM anew"));
    config.size = VMMIG_CONFIG_SIZE;
    assert_int_equal(vmmig_create(&config, &a, &error), -1);
    assert_string_equal(error.text, "a callback is missing");
    memset(&config.callbacks, 1, sizeof(config.callbacks)); /* never called */
    config.callbacks.log = NULL;
    config.n_vcpus = 1;
    config.socket_path = "/tmp/x";
    config.vmm = "toy 1";
    assert_int_equal(vmmig_create(&config, &a, &error), -1);
    assert_string_equal(error.text, "config.machine is missing");
    config.machine = "toy/1";
    assert_int_equal(vmmig_create(&config, &a, &error), -1);
    assert_string_equal(error.text, "config.tracking is not what vmmig_prepare_vm said");
    config.tracking = VMMIG_TRACKING_BITMAP;
    assert_int_equal(vmmig_create(&config, &a, &error), -1);
    assert_string_equal(error.text, "config.vcpu_fds is missing");
}

/* An agent that starts a VMM connects as soon as it can: what it is told then must be complete. */
static void agents_are_answered_when_memory_was_told(void **state)
{
    struct piece p = new_piece("low", 0, 0, MIB, MFD_ALLOW_SEALING);
    struct vmmig_error error = {0};
    struct vmmig_attach *a = NULL;
    struct vm_error *err = NULL;
    struct guest_status status;
    static const int none[1];
    char path[64];
    snprintf(path, sizeof(path), "/tmp/vmmig-early-%d", getpid());
    struct vmmig_config config = {.size = VMMIG_CONFIG_SIZE,
                                  .socket_path = path,
                                  .vmm = "early",
                                  .machine = "toy/1",
                                  .state = VMMIG_INCOMING,
                                  .tracking = VMMIG_TRACKING_PLAIN,
                                  .vm_fd = -1,
                                  .vcpu_fds = none,
                                  .n_vcpus = 1};
    memset(&config.callbacks, 1, sizeof(config.callbacks)); /* never called */
    config.callbacks.log = NULL;
    config.state = VMMIG_BROKEN;
    assert_int_equal(vmmig_create(&config, &a, &error), -1);
    assert_non_null(strstr(error.text, "config.state"));
    config.state = VMMIG_INCOMING;
    assert_int_equal(vmmig_create(&config, &a, &error), 0);
    assert_null(attach_connect(path, 50, &err));
    assert_int_equal(err->kind, VM_ERROR_TIMEOUT);
    error_clear(&err);
    assert_int_equal(vmmig_set_slots(a, &p.slot, 1, &error), 0);
    CLEANUP(attach) struct attach *agent = attach_connect(path, 5000, &err);
    assert_non_null(agent);
    assert_int_equal(guest_status(attach_guest(agent), &status, &err), 0);
    assert_int_equal(status.state, GUEST_INCOMING);
    vmmig_destroy(a);
    end_piece(&p, MIB);
}

static void a_living_socket_is_not_taken_away(void **state)
{
    struct toy_vmm *v = new_vmm();
    struct vmmig_error error = {0};
    struct vmmig_attach *second;
    struct stat st;
    static const int none[1];
    struct vmmig_config config = {.size = VMMIG_CONFIG_SIZE,
                                  .socket_path = v->path,
                                  .vmm = "second",
                                  .machine = "toy/1",
                                  .tracking = VMMIG_TRACKING_PLAIN,
                                  .vm_fd = -1,
                                  .vcpu_fds = none,
                                  .n_vcpus = 1};
    /* Callbacks that are never called. */
    memset(&config.callbacks, 1, sizeof(config.callbacks));
    config.callbacks.log = NULL;
    assert_int_equal(vmmig_create(&config, &second, &error), -1);
    assert_int_equal(error.code, EBUSY);
    assert_non_null(strstr(error.text, "another VM has the socket"));
    assert_int_equal(stat(v->path, &st), 0);
    assert_int_equal(st.st_mode & 0777, 0600);
    /* A dead one is. */
    char path[64];
    snprintf(path, sizeof(path), "%s", v->path);
    toy_vmm_destroy(v);
    assert_int_equal(access(path, F_OK), -1);
    int fd = socket(AF_UNIX, SOCK_SEQPACKET, 0);
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strcpy(address.sun_path, path);
    assert_return_code(bind(fd, (struct sockaddr *)&address, sizeof(address)), 0);
    close(fd);
    config.socket_path = path;
    assert_int_equal(vmmig_create(&config, &second, &error), 0);
    vmmig_destroy(second);
}

/* As an agent starts a VMM: the socket is bound by another process, and whoever listens is the VMM. */
static void an_inherited_socket_is_used(void **state)
{
    char path[64], name[16];
    struct toy_vmm *like = new_vmm();
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(path, sizeof(path), "/tmp/vmmig-inherited-%d", getpid());
    strcpy(address.sun_path, path);
    int fd = socket(AF_UNIX, SOCK_SEQPACKET, 0);
    assert_return_code(bind(fd, (struct sockaddr *)&address, sizeof(address)), 0);
    snprintf(name, sizeof(name), VMMIG_SOCKET_FD "%d", fd);
    struct vm_error *err = NULL;
    assert_null(attach_connect(path, 1000, &err)); /* nobody listens yet */
    assert_int_equal(err->sys_errno, ECONNREFUSED);
    error_clear(&err);
    like->params.socket = name;
    struct toy_vmm *v = toy_vmm_create_incoming(like);
    struct attach *a = attach_connect(path, 1000, &err);
    assert_string_equal(error_message(err), "no error");
    assert_int_equal(attach_guest(a)->process.pid, getpid());
    attach_destroy(a);
    toy_vmm_destroy(v);
    assert_int_equal(access(path, F_OK), 0); /* it belongs to whoever made it */
    unlink(path);
    toy_vmm_destroy(like);
}

static void what_is_no_socket_for_packets_is_refused(void **state)
{
    static const char *const names[] = {"fd:", "fd:x", "fd:99999", "fd:-1"};
    struct vmmig_error error = {0};
    struct vmmig_attach *a;
    char stream[16];
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    snprintf(stream, sizeof(stream), "fd:%d", fd);
    struct vmmig_config config = {.size = VMMIG_CONFIG_SIZE,
                                  .vmm = "x",
                                  .machine = "x",
                                  .tracking = VMMIG_TRACKING_PLAIN,
                                  .vm_fd = -1,
                                  .vcpu_fds = &fd,
                                  .n_vcpus = 1};
    memset(&config.callbacks, 1, sizeof(config.callbacks));
    config.callbacks.log = NULL;
    for (unsigned i = 0; i < 5; i++) {
        config.socket_path = i < 4 ? names[i] : stream;
        assert_int_equal(vmmig_create(&config, &a, &error), -1);
        assert_int_equal(error.code, EINVAL);
        assert_non_null(strstr(error.text, config.socket_path));
    }
    close(fd);
}

/* ---- Agents that are wrong ---- */

static int dial(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    strcpy(address.sun_path, path);
    assert_return_code(connect(fd, (struct sockaddr *)&address, sizeof(address)), 0);
    return fd;
}

static void send_raw(int fd, const void *data, size_t n)
{
    assert_int_equal(send(fd, data, n, MSG_NOSIGNAL), (ssize_t)n);
}

static void ask(int fd, unsigned type, const ProtobufCMessage *message)
{
    cleanup_buffer struct buffer out = {0};
    assert_int_equal(attach_pack(type, message, &out, NULL), 0);
    send_raw(fd, out.data, out.len);
}

static void hello(int fd)
{
    Vmmig__Attach__Hello m = VMMIG__ATTACH__HELLO__INIT;
    m.version_min = m.version_max = 1;
    ask(fd, VMMIG__ATTACH__TYPE__HELLO, &m.base);
}

/* The type of the next answer, 0 at the end; an ERROR's text in `text`. */
static unsigned listen_for(int fd, char text[256])
{
    static uint8_t packet[ATTACH_PACKET_MAX];
    cleanup_attach_message struct attach_message m = {0};
    int fds[ATTACH_FDS_MAX], n_fds;
    struct pollfd p = {.fd = fd, .events = POLLIN};
    assert_int_equal(poll(&p, 1, 5000), 1);
    ssize_t n = io_recv_fds(fd, packet, sizeof(packet), fds, ATTACH_FDS_MAX, &n_fds, NULL);
    if (n <= 0)
        return 0;
    for (int i = 0; i < n_fds; i++)
        close(fds[i]);
    assert_int_equal(attach_unpack(packet, (size_t)n, &m, NULL), 0);
    text[0] = 0;
    if (m.type == VMMIG__ATTACH__TYPE__ERROR)
        snprintf(text, 256, "%s: %s", m.error->kind, m.error->message);
    return m.type;
}

static void expect_error(int fd, const char *expected)
{
    char text[256];
    assert_int_equal(listen_for(fd, text), VMMIG__ATTACH__TYPE__ERROR);
    assert_string_equal(text, expected);
}

static void expect_type(int fd, unsigned type)
{
    char text[256];
    unsigned got = listen_for(fd, text);
    assert_string_equal(text, "");
    assert_int_equal(got, type);
}

static void expect_end(int fd)
{
    char text[256];
    assert_int_equal(listen_for(fd, text), 0);
    close(fd);
}

static void messages_out_of_order_are_answered(void **state)
{
    struct toy_vmm *v = new_vmm();
    Vmmig__Attach__Clear clear = VMMIG__ATTACH__CLEAR__INIT;
    Vmmig__Attach__Throttle throttle = VMMIG__ATTACH__THROTTLE__INIT;
    Vmmig__Attach__Load load = VMMIG__ATTACH__LOAD__INIT;
    clear.pages = 64;

    int fd = dial(v->path);
    ask(fd, VMMIG__ATTACH__TYPE__TRACK, NULL);
    expect_error(fd, "protocol: TRACK came before HELLO");
    expect_end(fd);

    fd = dial(v->path);
    hello(fd);
    expect_type(fd, VMMIG__ATTACH__TYPE__WELCOME);
    ask(fd, VMMIG__ATTACH__TYPE__HARVEST, NULL);
    expect_error(fd, "conflict: HARVEST is out of order: this agent has not begun to track");
    ask(fd, VMMIG__ATTACH__TYPE__CLEAR, &clear.base);
    expect_error(fd, "conflict: CLEAR is out of order: this agent has not begun to track");
    ask(fd, VMMIG__ATTACH__TYPE__THROTTLE, &throttle.base);
    expect_error(fd, "conflict: THROTTLE is out of order: this agent has not begun to track");
    ask(fd, VMMIG__ATTACH__TYPE__PAUSE, NULL);
    expect_error(fd, "conflict: PAUSE is out of order: no guest was loaded yet");
    ask(fd, VMMIG__ATTACH__TYPE__RESUME, NULL);
    expect_error(fd, "refused: the guest has not been loaded yet");
    ask(fd, VMMIG__ATTACH__TYPE__SAVE, NULL);
    expect_error(fd, "conflict: SAVE is out of order: the guest was not paused before");
    ask(fd, VMMIG__ATTACH__TYPE__QUIT, NULL);
    expect_error(fd, "conflict: QUIT is out of order: the guest was not paused before");
    ask(fd, VMMIG__ATTACH__TYPE__LOAD, &load.base);
    expect_error(fd, "protocol: no file of the guest's state came along");
    expect_end(fd);
    assert_false(atomic_load(&v->quit));
    for (unsigned i = 0; i < TOY_STEPS; i++)
        assert_int_equal(atomic_load(&v->calls[i]), 0);

    vmmig_set_state(v->attach, VMMIG_RUNNING, NULL);
    fd = dial(v->path);
    hello(fd);
    expect_type(fd, VMMIG__ATTACH__TYPE__WELCOME);
    ask(fd, VMMIG__ATTACH__TYPE__LOAD, &load.base);
    expect_error(fd, "conflict: LOAD is out of order: this VMM does not wait for a guest");
    ask(fd, VMMIG__ATTACH__TYPE__SAVE, NULL);
    expect_error(fd, "conflict: SAVE is out of order: the guest was not paused before");
    ask(fd, VMMIG__ATTACH__TYPE__OK, NULL);
    expect_error(fd, "protocol: OK is no request");
    expect_end(fd);
    toy_vmm_destroy(v);
}

/* Has slot `slot` become a mapping of a file of that size? Asks without one if it is 0. */
static int ask_to_map(int fd, unsigned slot, uint64_t size)
{
    cleanup_buffer struct buffer out = {0};
    Vmmig__Attach__MapFile m = VMMIG__ATTACH__MAP_FILE__INIT;
    int file = memfd_create("template", MFD_CLOEXEC);
    m.slot = slot;
    assert_return_code(ftruncate(file, (off_t)size), 0);
    assert_int_equal(pwrite(file, "template", 8, 0), 8);
    assert_int_equal(attach_pack(VMMIG__ATTACH__TYPE__MAP_FILE, &m.base, &out, NULL), 0);
    assert_int_equal(io_send_fds(fd, out.data, out.len, &file, size ? 1 : 0, NULL), 0);
    return file;
}

static int greet(const struct toy_vmm *v)
{
    int fd = dial(v->path);
    hello(fd);
    expect_type(fd, VMMIG__ATTACH__TYPE__WELCOME);
    return fd;
}

static void populate(int fd, unsigned slot, uint64_t first, uint64_t pages)
{
    Vmmig__Attach__Populate m = VMMIG__ATTACH__POPULATE__INIT;
    Vmmig__Attach__Run run = VMMIG__ATTACH__RUN__INIT, *runs[] = {&run};
    run.slot = slot;
    run.first = first;
    run.pages = pages;
    m.runs = runs;
    m.n_runs = 1;
    ask(fd, VMMIG__ATTACH__TYPE__POPULATE, &m.base);
}

/* What the VMM says of its memory: one descriptor for each slot that has a file of its own, and the bitmap's. */
static void expect_private(int fd, const void *private_0, const void *private_1)
{
    static uint8_t packet[65536];
    int fds[ATTACH_FDS_MAX], n_fds;
    struct attach_message m;
    ask(fd, VMMIG__ATTACH__TYPE__GET_MEMORY, NULL);
    ssize_t n = io_recv_fds(fd, packet, sizeof(packet), fds, ATTACH_FDS_MAX, &n_fds, NULL);
    assert_true(n > 0);
    for (int i = 0; i < n_fds; i++)
        close(fds[i]);
    assert_int_equal(attach_unpack(packet, (size_t)n, &m, NULL), 0);
    assert_int_equal(m.type, VMMIG__ATTACH__TYPE__MEMORY);
    assert_int_equal(n_fds, 1 + !private_0 + !private_1);
    assert_int_equal(m.memory->slots[0]->private_at, (uintptr_t)private_0);
    assert_int_equal(m.memory->slots[1]->private_at, (uintptr_t)private_1);
    attach_message_finish(&m);
}

static void memory_of_a_template_is_private(void **state)
{
    struct toy_vmm *v = new_vmm();
    char byte = 0;
    int fd = greet(v);
    close(ask_to_map(fd, 7, v->sizes[0]));
    expect_error(fd, "usage: there is no memory slot 7");
    int file = ask_to_map(fd, 0, v->sizes[0]);
    expect_type(fd, VMMIG__ATTACH__TYPE__OK);
    assert_memory_equal(v->memory[0], "template", 8);
    v->memory[0][0] = 'T';
    assert_int_equal(pread(file, &byte, 1, 0), 1);
    assert_int_equal(byte, 't');
    expect_private(fd, v->memory[0], NULL);
    populate(fd, 0, 0, 64);
    expect_error(fd, "refused: memory slot low is a template's");
    struct vmmig_error error;
    assert_int_equal(vmmig_set_slots(v->attach, v->slots, 2, &error), 0); /* the same, as when others came */
    expect_private(fd, v->memory[0], NULL);
    struct vmmig_slot shapeless[2] = {v->slots[0], v->slots[1]};
    shapeless[1].size = 1;
    assert_int_equal(vmmig_set_slots(v->attach, shapeless, 2, &error), -1);
    assert_int_equal(vmmig_set_slots(v->attach, v->slots, 2, &error), 0); /* a mistake is not for ever */
    expect_private(fd, v->memory[0], NULL);
    close(file);
    close(ask_to_map(fd, 1, 0));
    expect_error(fd, "protocol: the file for memory slot high is none, or not as large as it");
    expect_end(fd);
    fd = greet(v);
    close(ask_to_map(fd, 1, v->sizes[1] + 4096));
    expect_error(fd, "protocol: the file for memory slot high is none, or not as large as it");
    expect_end(fd);
    vmmig_set_state(v->attach, VMMIG_RUNNING, NULL);
    fd = greet(v);
    close(ask_to_map(fd, 1, v->sizes[1]));
    expect_error(fd, "conflict: MAP_FILE is out of order: this VMM does not wait for a guest");
    close(fd);
    toy_vmm_destroy(v);
}

static void a_vmm_that_takes_no_files_says_so(void **state)
{
    struct toy_vmm like = {.sizes = {MIB, 4 * MIB}, .params = {.takes_no_files = true}};
    struct toy_vmm *v = toy_vmm_create_incoming(&like);
    int fd = greet(v);
    close(ask_to_map(fd, 0, v->sizes[0]));
    expect_error(fd, "refused: this VMM does not let the guest's memory be a template's");
    close(fd);
    toy_vmm_destroy(v);
}

static void garbage_ends_its_connection_only(void **state)
{
    struct toy_vmm *v = new_vmm();
    static const char *const garbage[] = {"x", "VMMG", "GET / HTTP/1.0\r\n\r\n"};
    int good = dial(v->path);
    hello(good);
    expect_type(good, VMMIG__ATTACH__TYPE__WELCOME);
    for (size_t i = 0; i < sizeof(garbage) / sizeof(*garbage); i++) {
        char text[256];
        int fd = dial(v->path);
        send_raw(fd, garbage[i], strlen(garbage[i]));
        assert_int_equal(listen_for(fd, text), VMMIG__ATTACH__TYPE__ERROR);
        assert_memory_equal(text, "protocol:", 9);
        expect_end(fd);
    }
    /* Two messages in one packet. */
    cleanup_buffer struct buffer two = {0};
    attach_pack(VMMIG__ATTACH__TYPE__STATUS, NULL, &two, NULL);
    attach_pack(VMMIG__ATTACH__TYPE__STATUS, NULL, &two, NULL);
    int fd = dial(v->path);
    hello(fd);
    expect_type(fd, VMMIG__ATTACH__TYPE__WELCOME);
    send_raw(fd, two.data, two.len);
    expect_error(fd, "protocol: a packet is not exactly one message");
    expect_end(fd);
    /* More descriptors than any message has. */
    int fds[3] = {0, 1, 2};
    fd = dial(v->path);
    assert_int_equal(io_send_fds(fd, two.data, two.len / 2, fds, 3, NULL), 0);
    expect_error(fd, "protocol: more descriptors were passed than expected");
    expect_end(fd);
    ask(good, VMMIG__ATTACH__TYPE__STATUS, NULL);
    expect_type(good, VMMIG__ATTACH__TYPE__STATE);
    close(good);
    toy_vmm_destroy(v);
}

static void versions_are_negotiated(void **state)
{
    struct toy_vmm *v = new_vmm();
    Vmmig__Attach__Hello m = VMMIG__ATTACH__HELLO__INIT;
    int fd = dial(v->path);
    m.version_min = 2;
    m.version_max = 9;
    ask(fd, VMMIG__ATTACH__TYPE__HELLO, &m.base);
    expect_error(fd, "version: this VMM speaks versions 1 to 1 of the attach protocol, the agent 2 to 9");
    expect_end(fd);
    fd = dial(v->path);
    m.version_min = 1;
    ask(fd, VMMIG__ATTACH__TYPE__HELLO, &m.base);
    expect_type(fd, VMMIG__ATTACH__TYPE__WELCOME);
    close(fd);
    toy_vmm_destroy(v);
}

static uint64_t pages_of(int memfd)
{
    struct stat st;
    assert_return_code(fstat(memfd, &st), errno);
    return (uint64_t)st.st_blocks * 512 / 4096;
}

static void memory_is_got_by_a_vmm_that_waits(void **state)
{
    struct toy_vmm *v = new_vmm();
    int fd = dial(v->path);
    hello(fd);
    expect_type(fd, VMMIG__ATTACH__TYPE__WELCOME);
    assert_int_equal(pages_of(v->memfds[1]), 0);
    populate(fd, 1, 100, 256);
    expect_type(fd, VMMIG__ATTACH__TYPE__OK);
    assert_int_equal(pages_of(v->memfds[1]), 256);
    populate(fd, 1, 1024 - 10, 11);
    expect_error(fd, "usage: memory slot high ends before page 1025");
    populate(fd, 2, 0, 1);
    expect_error(fd, "usage: there is no memory slot 2");
    assert_int_equal(pages_of(v->memfds[1]), 256);
    vmmig_set_state(v->attach, VMMIG_RUNNING, NULL);
    populate(fd, 0, 0, 1);
    expect_error(fd, "conflict: POPULATE is out of order: this VMM does not wait for a guest");
    close(fd);
    toy_vmm_destroy(v);
}

static void other_users_are_turned_away(void **state)
{
    if (geteuid() != 0) {
        print_message("SKIPPED: only root can become another user\n");
        skip();
    }
    struct toy_vmm *v = new_vmm();
    assert_return_code(chmod(v->path, 0666), 0);
    /* This thread alone: the VMM's stays root's. */
    assert_return_code(syscall(SYS_setresuid, -1, 65534, -1), 0);
    int fd = dial(v->path);
    assert_return_code(syscall(SYS_setresuid, -1, 0, -1), 0);
    expect_error(fd, "denied: this user may not attach to the VMM");
    expect_end(fd);
    toy_vmm_destroy(v);
}

static void no_more_than_four_agents_attach(void **state)
{
    struct toy_vmm *v = new_vmm();
    int fds[5];
    for (int i = 0; i < 5; i++) {
        fds[i] = dial(v->path);
        if (i == 4)
            break;
        hello(fds[i]);
        expect_type(fds[i], VMMIG__ATTACH__TYPE__WELCOME);
    }
    expect_error(fds[4], "conflict: 4 agents are attached to this VMM already");
    expect_end(fds[4]);
    for (int i = 0; i < 4; i++)
        close(fds[i]);
    toy_vmm_destroy(v);
}

/* ---- Callbacks that fail, or hang ---- */

static struct attach *agent_of(const struct toy_vmm *v)
{
    struct vm_error *err = NULL;
    struct attach *a = attach_connect(v->path, 10000, &err);
    assert_string_equal(error_message(err), "no error");
    return a;
}

static void callbacks_that_fail_are_reported(void **state)
{
    struct toy_vmm *v = new_vmm();
    struct vm_error *err = NULL;
    CLEANUP(attach) struct attach *a = agent_of(v);
    struct guest *g = attach_guest(a);
    vmmig_set_state(v->attach, VMMIG_RUNNING, NULL);
    v->fail[TOY_PAUSE] = -EIO;
    assert_int_equal(guest_pause(g, &err), -1);
    assert_string_equal(error_message(err), "the VMM's callback `pause` failed: Input/output error");
    assert_int_equal(err->kind, VM_ERROR_FAILED);
    error_clear(&err);
    struct guest_status status;
    assert_int_equal(guest_status(g, &status, &err), 0);
    assert_int_equal(status.state, GUEST_RUNNING);
    v->fail[TOY_PAUSE] = 0;
    assert_int_equal(guest_pause(g, &err), 0);
    v->fail[TOY_RESUME] = -EAGAIN;
    assert_int_equal(guest_resume(g, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_REFUSED); /* no vCPU ran: it may be taken back */
    error_clear(&err);
    assert_int_equal(guest_status(g, &status, &err), 0);
    assert_int_equal(status.state, GUEST_PAUSED);
    v->fail[TOY_RESUME] = 0;
    assert_int_equal(guest_resume(g, &err), 0);
    toy_vmm_destroy(v);
}

static void wait_for_state(struct guest *g, enum guest_run_state state, unsigned *calls_of_resume)
{
    struct guest_status status;
    int64_t deadline = clock_mono_ns() + 10 * NSEC_PER_SEC;
    do {
        assert_true(clock_mono_ns() < deadline);
        assert_int_equal(guest_status(g, &status, NULL), 0);
    } while (status.state != state || !*calls_of_resume);
}

static void a_pause_that_hangs_is_taken_back(void **state)
{
    struct toy_vmm *v = new_impatient_vmm();
    struct vm_error *err = NULL;
    CLEANUP(attach) struct attach *a = agent_of(v);
    struct guest *g = attach_guest(a);
    vmmig_set_state(v->attach, VMMIG_RUNNING, NULL);
    atomic_store(&v->running, true);
    atomic_store(&v->hang[TOY_PAUSE], true);
    assert_int_equal(guest_pause(g, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_TIMEOUT);
    assert_string_equal(error_message(err), "the VMM's callback `pause` has not returned for 0.2 s");
    error_clear(&err);
    assert_int_equal(guest_pause(g, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_CONFLICT);
    assert_string_equal(error_message(err), "the VMM's callback `pause` has not returned yet");
    error_clear(&err);
    atomic_store(&v->hang[TOY_PAUSE], false);
    wait_for_state(g, GUEST_RUNNING, (unsigned *)(void *)&v->calls[TOY_RESUME]);
    while (!atomic_load(&v->running))
        sched_yield(); /* the call is counted when it begins */
    toy_vmm_destroy(v);
}

/* It was the VMM's user who had the guest stand. */
static void a_late_pause_sets_no_guest_going_that_stood(void **state)
{
    struct toy_vmm *v = new_impatient_vmm();
    struct vm_error *err = NULL;
    CLEANUP(attach) struct attach *a = agent_of(v);
    struct guest_status status;
    vmmig_set_state(v->attach, VMMIG_PAUSED, NULL);
    atomic_store(&v->hang[TOY_PAUSE], true);
    assert_int_equal(guest_pause(attach_guest(a), &err), -1);
    assert_int_equal(err->kind, VM_ERROR_TIMEOUT);
    error_clear(&err);
    atomic_store(&v->hang[TOY_PAUSE], false);
    while (!atomic_load(&v->released))
        sched_yield();
    assert_int_equal(atomic_load(&v->calls[TOY_RESUME]), 0);
    assert_int_equal(guest_status(attach_guest(a), &status, NULL), 0);
    assert_int_equal(status.state, GUEST_PAUSED);
    toy_vmm_destroy(v);
}

/* What the agent has it holds against the VMM, until it gives it back; then it is the VMM's to run. */
static void a_guest_that_is_released_is_the_vmms(void **state)
{
    struct toy_vmm *v = new_vmm();
    struct vm_error *err = NULL;
    struct guest_status status;
    CLEANUP(attach) struct attach *a = agent_of(v);
    struct guest *g = attach_guest(a);
    vmmig_set_state(v->attach, VMMIG_RUNNING, NULL);
    assert_int_equal(guest_release(g, &err), -1);
    assert_string_equal(error_message(err), "RELEASE is out of order: the guest does not stand");
    error_clear(&err);
    assert_int_equal(guest_pause(g, &err), 0);
    for (int released = 0; released < 2; released++) {
        assert_int_equal(atomic_load(&v->released), released);
        vmmig_set_state(v->attach, VMMIG_RUNNING, NULL);
        assert_int_equal(guest_status(g, &status, &err), 0);
        assert_int_equal(status.state, released ? GUEST_RUNNING : GUEST_PAUSED);
        if (!released)
            assert_int_equal(guest_release(g, &err), 0);
    }
    vmmig_set_state(v->attach, VMMIG_PAUSED, NULL);
    assert_int_equal(guest_release(g, &err), 0); /* it is already */
    assert_int_equal(atomic_load(&v->calls[TOY_RESUME]), 0);
    toy_vmm_destroy(v);
}

static int64_t cpu_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return t.tv_sec * NSEC_PER_SEC + t.tv_nsec;
}

/* An agent that cannot be let in now waits at the door, and nobody runs in circles meanwhile. */
static void a_vmm_out_of_descriptors_stays_calm(void **state)
{
    struct toy_vmm *v = new_vmm();
    struct rlimit before, none;
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strcpy(address.sun_path, v->path);
    assert_return_code(getrlimit(RLIMIT_NOFILE, &before), errno);
    none = before;
    none.rlim_cur = (rlim_t)fd + 1; /* the lowest that was free */
    assert_return_code(setrlimit(RLIMIT_NOFILE, &none), errno);
    assert_return_code(connect(fd, (struct sockaddr *)&address, sizeof(address)), errno);
    hello(fd);
    int64_t used = cpu_ns();
    struct pollfd p = {.fd = fd, .events = POLLIN};
    assert_int_equal(poll(&p, 1, 500), 0);
    assert_true(cpu_ns() - used < 100 * NSEC_PER_MSEC);
    assert_return_code(setrlimit(RLIMIT_NOFILE, &before), errno);
    expect_type(fd, VMMIG__ATTACH__TYPE__WELCOME);
    close(fd);
    toy_vmm_destroy(v);
}

static void a_save_that_hangs_does_not_keep_the_guest(void **state)
{
    struct toy_vmm *v = new_impatient_vmm();
    struct guest_status status;
    char text[256];
    vmmig_set_state(v->attach, VMMIG_RUNNING, NULL);
    int fd = dial(v->path);
    hello(fd);
    expect_type(fd, VMMIG__ATTACH__TYPE__WELCOME);
    ask(fd, VMMIG__ATTACH__TYPE__PAUSE, NULL);
    expect_type(fd, VMMIG__ATTACH__TYPE__OK);
    atomic_store(&v->hang[TOY_SAVE], true);
    ask(fd, VMMIG__ATTACH__TYPE__SAVE, NULL);
    assert_int_equal(listen_for(fd, text), VMMIG__ATTACH__TYPE__ERROR);
    assert_string_equal(text, "timeout: the VMM's callback `save` has not returned for 0.2 s");
    ask(fd, VMMIG__ATTACH__TYPE__RESUME, NULL);
    expect_type(fd, VMMIG__ATTACH__TYPE__OK);
    CLEANUP(attach) struct attach *a = agent_of(v);
    assert_int_equal(guest_status(attach_guest(a), &status, NULL), 0);
    assert_int_equal(status.state, GUEST_RUNNING);
    close(fd);
    toy_vmm_destroy(v);
}

static void a_guest_stays_paused_without_its_agent(void **state)
{
    struct toy_vmm *v = new_vmm();
    struct guest_status status;
    vmmig_set_state(v->attach, VMMIG_RUNNING, NULL);
    struct attach *a = agent_of(v);
    assert_int_equal(guest_pause(attach_guest(a), NULL), 0);
    attach_destroy(a);
    a = agent_of(v);
    assert_int_equal(guest_status(attach_guest(a), &status, NULL), 0);
    assert_int_equal(status.state, GUEST_PAUSED);
    assert_int_equal(atomic_load(&v->calls[TOY_RESUME]), 0);
    assert_int_equal(guest_quit(attach_guest(a), NULL), 0);
    assert_true(atomic_load(&v->quit));
    attach_destroy(a);
    toy_vmm_destroy(v);
}

/* ---- VMMs that die, and those that are none ---- */

static void a_vmm_that_dies_is_named(void **state)
{
    struct vm_error *err = NULL;
    int ready[2];
    assert_return_code(pipe(ready), 0);
    pid_t pid = fork();
    if (pid == 0) {
        struct toy_vmm *v = new_vmm();
        vmmig_set_state(v->attach, VMMIG_RUNNING, NULL);
        if (write(ready[1], v->path, sizeof(v->path)) < 0)
            _exit(1);
        for (;;)
            pause();
    }
    char path[64];
    assert_int_equal(read(ready[0], path, sizeof(path)), sizeof(path));
    CLEANUP(attach) struct attach *a = attach_connect(path, 1000, &err);
    assert_non_null(a);
    assert_int_equal(attach_guest(a)->process.pid, pid);
    kill(pid, SIGKILL);
    char expected[64];
    snprintf(expected, sizeof(expected), "the VM's process %d ended", pid);
    for (int i = 0; i < 2; i++) {
        assert_int_equal(guest_pause(attach_guest(a), &err), -1);
        assert_int_equal(err->kind, VM_ERROR_VMM_DIED);
        assert_string_equal(error_message(err), expected);
        error_clear(&err);
    }
    waitpid(pid, NULL, 0);
    unlink(path);
    close(ready[0]);
    close(ready[1]);
}

static void a_qemu_is_told_from_such_a_vmm(void **state)
{
    struct vm_error *err = NULL;
    char path[64];
    snprintf(path, sizeof(path), "/tmp/vmmig-stream-%d", getpid());
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strcpy(address.sun_path, path);
    assert_return_code(bind(fd, (struct sockaddr *)&address, sizeof(address)), 0);
    assert_return_code(listen(fd, 1), 0);
    assert_null(attach_connect(path, 1000, &err));
    assert_int_equal(err->kind, VM_ERROR_REFUSED);
    assert_int_equal(err->sys_errno, EPROTOTYPE);
    error_clear(&err);
    struct qemu_definition d = {.machine = (char[]){"toy/1"}};
    assert_null(attach_sink_connect(&d, path, 1000, &err));
    assert_int_equal(err->kind, VM_ERROR_REFUSED);
    assert_non_null(strstr(error_message(err), "is a QEMU's socket"));
    error_clear(&err);
    close(fd);
    unlink(path);
}

static void a_destination_must_be_the_same_machine_and_wait(void **state)
{
    struct toy_vmm *v = new_vmm();
    struct vm_error *err = NULL;
    struct qemu_definition d = {.machine = (char[]){"other/7"}};
    assert_null(attach_sink_connect(&d, v->path, 1000, &err));
    assert_string_equal(error_message(err), "the VMM prepared for the guest is another machine: 'toy/1', "
                                            "not 'other/7'");
    error_clear(&err);
    d.machine = (char[]){"toy/1"};
    assert_null(attach_sink_connect(&d, v->path, 1000, &err));
    assert_string_equal(error_message(err),
                        "the VMM prepared for the guest has 2 memory slots, the guest 0");
    error_clear(&err);
    vmmig_set_state(v->attach, VMMIG_RUNNING, NULL);
    assert_null(attach_sink_connect(&d, v->path, 1000, &err));
    assert_string_equal(error_message(err), "the VMM prepared for the guest does not wait for one");
    error_clear(&err);
    toy_vmm_destroy(v);
}

/* The agent keeps something for each page: a VMM must not make that as large as it likes. */
static void memory_beyond_all_measure_is_refused(void **state)
{
    uint64_t most = (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE) * ATTACH_OVERCOMMIT;
    struct toy_vmm like = {.sizes = {MIB}};
    for (int too_much = 0; too_much < 2; too_much++) {
        struct vm_error *err = NULL;
        cleanup_qemu_definition struct qemu_definition d = {0};
        like.sizes[1] = most - (too_much ? 0 : MIB);
        struct toy_vmm *v = toy_vmm_create_incoming(&like);
        vmmig_set_state(v->attach, VMMIG_RUNNING, NULL);
        CLEANUP(attach) struct attach *a = agent_of(v);
        assert_int_equal(attach_define(a, &d, &err), too_much ? -1 : 0);
        char text[128];
        snprintf(text, sizeof(text),
                 "the guest's memory slots are %llu bytes, more than 16 times the memory of this host",
                 (unsigned long long)(like.sizes[0] + like.sizes[1]));
        assert_string_equal(error_message(err), too_much ? text : "no error");
        if (too_much)
            assert_int_equal(err->kind, VM_ERROR_REFUSED);
        error_clear(&err);
        toy_vmm_destroy(v);
    }
}

/* ---- A VMM whose answers make no sense ---- */

enum { UNASKED, GARBLED, ANOTHER, GOOD, KINDS_OF_ANSWERS };

struct babbler {
    int listener;
    atomic_uint welcomed; /* connections whose greeting is complete */
};

static void say(int fd, unsigned type, const ProtobufCMessage *message)
{
    cleanup_buffer struct buffer out = {0};
    attach_pack(type, message, &out, NULL);
    send(fd, out.data, out.len, MSG_NOSIGNAL);
}

static void babble(struct babbler *b, int fd, unsigned kind)
{
    char request[256];
    Vmmig__Attach__Welcome w = VMMIG__ATTACH__WELCOME__INIT;
    Vmmig__Attach__State now = VMMIG__ATTACH__STATE__INIT;
    w.version = ATTACH_VERSION_MAX;
    w.pid = 1;
    w.n_vcpus = 1;
    w.vmm = w.machine = w.tracking = (char[]){"babbler"};
    now.state = VMMIG__ATTACH__RUN_STATE__RUN_RUNNING;
    if (recv(fd, request, sizeof(request), 0) <= 0)
        return;
    say(fd, VMMIG__ATTACH__TYPE__WELCOME, &w.base);
    if (kind == UNASKED)
        say(fd, VMMIG__ATTACH__TYPE__OK, NULL);
    atomic_fetch_add(&b->welcomed, 1);
    while (recv(fd, request, sizeof(request), 0) > 0) {
        if (kind == GARBLED)
            send(fd, "VMMG and nonsense", 17, MSG_NOSIGNAL);
        else
            say(fd, kind == ANOTHER ? VMMIG__ATTACH__TYPE__OK : VMMIG__ATTACH__TYPE__STATE,
                kind == ANOTHER ? NULL : &now.base);
    }
}

static void *babbler_main(void *arg)
{
    struct babbler *b = arg;
    for (unsigned kind = 0; kind < KINDS_OF_ANSWERS; kind++) {
        int fd = accept(b->listener, NULL, NULL);
        babble(b, fd, kind);
        close(fd);
    }
    return NULL;
}

/* None of it is taken for an answer; the connection after that is as good as a first one. */
static void answers_that_make_no_sense_end_what_was_asked(void **state)
{
    static const char *const said[] = {[UNASKED] = "the VMM said something that it was not asked",
                                       [GARBLED] = "",
                                       [ANOTHER] = "the VMM answered OK, not STATE"};
    struct babbler b = {.listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0)};
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct vm_error *err = NULL;
    struct guest_status status;
    pthread_t thread;
    snprintf(address.sun_path, sizeof(address.sun_path), "/tmp/vmmig-babbler-%d", getpid());
    assert_return_code(bind(b.listener, (struct sockaddr *)&address, sizeof(address)), errno);
    assert_return_code(listen(b.listener, 1), errno);
    assert_int_equal(pthread_create(&thread, NULL, babbler_main, &b), 0);
    struct attach *a = attach_connect(address.sun_path, 5000, &err);
    assert_string_equal(error_message(err), "no error");
    while (!atomic_load(&b.welcomed))
        sched_yield();
    for (unsigned kind = 0; kind < GOOD; kind++) {
        assert_int_equal(guest_status(attach_guest(a), &status, &err), -1);
        assert_int_equal(err->kind, VM_ERROR_PROTOCOL);
        assert_non_null(strstr(error_message(err), said[kind]));
        error_clear(&err);
    }
    assert_int_equal(guest_status(attach_guest(a), &status, &err), 0);
    assert_int_equal(status.state, GUEST_RUNNING);
    attach_destroy(a);
    pthread_join(thread, NULL);
    close(b.listener);
    unlink(address.sun_path);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(wrong_slots_are_refused_by_name),
        cmocka_unit_test(a_wrong_configuration_is_refused),
        cmocka_unit_test(agents_are_answered_when_memory_was_told),
        cmocka_unit_test(a_living_socket_is_not_taken_away),
        cmocka_unit_test(an_inherited_socket_is_used),
        cmocka_unit_test(what_is_no_socket_for_packets_is_refused),
        cmocka_unit_test(messages_out_of_order_are_answered),
        cmocka_unit_test(memory_of_a_template_is_private),
        cmocka_unit_test(a_vmm_that_takes_no_files_says_so),
        cmocka_unit_test(garbage_ends_its_connection_only),
        cmocka_unit_test(versions_are_negotiated),
        cmocka_unit_test(memory_is_got_by_a_vmm_that_waits),
        cmocka_unit_test(other_users_are_turned_away),
        cmocka_unit_test(no_more_than_four_agents_attach),
        cmocka_unit_test(callbacks_that_fail_are_reported),
        cmocka_unit_test(a_pause_that_hangs_is_taken_back),
        cmocka_unit_test(a_late_pause_sets_no_guest_going_that_stood),
        cmocka_unit_test(a_guest_that_is_released_is_the_vmms),
        cmocka_unit_test(a_vmm_out_of_descriptors_stays_calm),
        cmocka_unit_test(a_save_that_hangs_does_not_keep_the_guest),
        cmocka_unit_test(a_guest_stays_paused_without_its_agent),
        cmocka_unit_test(a_vmm_that_dies_is_named),
        cmocka_unit_test(a_qemu_is_told_from_such_a_vmm),
        cmocka_unit_test(a_destination_must_be_the_same_machine_and_wait),
        cmocka_unit_test(memory_beyond_all_measure_is_refused),
        cmocka_unit_test(answers_that_make_no_sense_end_what_was_asked),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

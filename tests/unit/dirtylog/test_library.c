/* SPDX-License-Identifier: Apache-2.0 */
/* libvmmig-attach against VMMs that get something wrong: their slots, their configuration, their
 * socket. No KVM needed. */
#include "tests/unit/dirtylog/library_fixture.h"

#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>
#include <cmocka.h>

/* ---- Slots that are wrong ---- */

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
    s[1] = a.slot; /* the same memory, at the same address, as a vCPU sees it in SMM */
    s[1].kvm_slot = 1 << 16;
    snprintf(s[1].name, sizeof(s[1].name), "smm");
    expect_refused(v->attach, s, 2,
                   "memory slot smm is of KVM's address space 1: guests with SMM cannot be migrated");
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

/* All that vmmig_create looks at is as it should be. */
static struct vmmig_config right_config(void)
{
    static const int vcpus[VMMIG_VCPUS_MAX];
    static const char *const argv[] = {"/usr/bin/toy", VMMIG_SOCKET_WORD, NULL};
    struct vmmig_config c = {.size = VMMIG_CONFIG_SIZE,
                             .socket_path = "fd:99999", /* which there is not: looked at last */
                             .vmm = "toy 1",
                             .machine = "toy/1",
                             .state = VMMIG_RUNNING,
                             .tracking = VMMIG_TRACKING_BITMAP,
                             .vm_fd = -1,
                             .vcpu_fds = vcpus,
                             .n_vcpus = VMMIG_VCPUS_MAX,
                             .callback_timeout_ms = VMMIG_CALLBACK_SECONDS * 1000,
                             .incoming_argv = argv,
                             .state_bytes = VMMIG_STATE_MAX};
    memset(&c.callbacks, 1, sizeof(c.callbacks)); /* never called */
    c.callbacks.log = NULL;
    return c;
}

static void expect_config(const struct vmmig_config *config, const char *text)
{
    struct vmmig_error error = {0};
    struct vmmig_attach *a;
    assert_int_equal(vmmig_create(config, &a, &error), -1);
    assert_string_equal(error.text, text);
    assert_int_equal(error.code, EINVAL);
}

#define EXPECT_CONFIG(text, ...)                                                                   \
    do {                                                                                           \
        struct vmmig_config c = right_config();                                                    \
        __VA_ARGS__;                                                                               \
        expect_config(&c, text);                                                                   \
    } while (0)

static void a_wrong_configuration_is_refused(void **state)
{
    char longest[109], word[257];
    memset(longest, 'x', sizeof(longest));
    memset(word, 'x', sizeof(word));
    longest[108] = word[256] = 0;
    const char *const bad_argv[] = {"/usr/bin/toy", "bad\n", NULL};
    char size[128];
    snprintf(size, sizeof(size), "config.size is %zu; the library that is loaded has %zu: build the VMM anew",
             VMMIG_CONFIG_SIZE - 8, VMMIG_CONFIG_SIZE);
    EXPECT_CONFIG(size, c.size -= 8);
    EXPECT_CONFIG("config.callbacks.pause is missing", c.callbacks.pause = NULL);
    EXPECT_CONFIG("config.callbacks.resume is missing", c.callbacks.resume = NULL);
    EXPECT_CONFIG("config.callbacks.save is missing", c.callbacks.save = NULL);
    EXPECT_CONFIG("config.callbacks.load is missing", c.callbacks.load = NULL);
    EXPECT_CONFIG("config.callbacks.kick is missing", c.callbacks.kick = NULL);
    EXPECT_CONFIG("config.vmm is missing", c.vmm = NULL);
    EXPECT_CONFIG("config.vmm is missing", c.vmm = "");
    EXPECT_CONFIG("config.vmm is longer than 255 bytes", c.vmm = word);
    EXPECT_CONFIG("config.machine is missing", c.machine = NULL);
    EXPECT_CONFIG("config.machine is longer than 255 bytes", c.machine = word);
    EXPECT_CONFIG("config.machine is not printable UTF-8", c.machine = "a\nb");
    EXPECT_CONFIG("config.tracking is not what vmmig_prepare_vm said", c.tracking = VMMIG_TRACKING_AUTO);
    EXPECT_CONFIG("config.tracking is not what vmmig_prepare_vm said", c.tracking = VMMIG_TRACKING_TRACE + 1);
    EXPECT_CONFIG("config.vcpu_fds is missing", c.vcpu_fds = NULL);
    EXPECT_CONFIG("config.state_bytes is more than 268435456", c.state_bytes++);
    EXPECT_CONFIG("config.socket_path is missing or longer than 107 bytes", c.socket_path = NULL);
    EXPECT_CONFIG("config.socket_path is missing or longer than 107 bytes", c.socket_path = longest);
    EXPECT_CONFIG("0 vCPUs; 1 to 256 are possible", c.n_vcpus = 0);
    EXPECT_CONFIG("257 vCPUs; 1 to 256 are possible", c.n_vcpus++);
    EXPECT_CONFIG("config.state is none of VMMIG_RUNNING, VMMIG_PAUSED and VMMIG_INCOMING", c.state = VMMIG_BROKEN);
    EXPECT_CONFIG("config.callback_timeout_ms is more than 10 s", c.callback_timeout_ms++);
    EXPECT_CONFIG("config.incoming_argv: message WELCOME: an argument is not printable UTF-8",
                  c.incoming_argv = bad_argv);
    /* And nothing else was wrong with it. */
    EXPECT_CONFIG("fd:99999 is not a Unix socket for packets", c.state_bytes = 0);
}

/* 107 bytes are no mistake: the longest that there is. */
static void the_longest_name_of_a_socket_is_taken(void **state)
{
    char path[108] = "/tmp/";
    struct vmmig_error error = {0};
    struct vmmig_attach *a;
    struct stat st;
    memset(path + 5, 'x', sizeof(path) - 6);
    struct vmmig_config c = right_config();
    c.socket_path = path;
    assert_int_equal(vmmig_create(&c, &a, &error), 0);
    assert_return_code(lstat(path, &st), errno);
    vmmig_destroy(a);
    assert_int_equal(lstat(path, &st), -1);
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

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(wrong_slots_are_refused_by_name),
        cmocka_unit_test(a_wrong_configuration_is_refused),
        cmocka_unit_test(the_longest_name_of_a_socket_is_taken),
        cmocka_unit_test(agents_are_answered_when_memory_was_told),
        cmocka_unit_test(a_living_socket_is_not_taken_away),
        cmocka_unit_test(an_inherited_socket_is_used),
        cmocka_unit_test(what_is_no_socket_for_packets_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

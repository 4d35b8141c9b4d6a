/* SPDX-License-Identifier: Apache-2.0 */
/* libvmmig-attach against agents that get something wrong. No KVM needed. */
#include "tests/unit/dirtylog/library_fixture.h"

#include "base/io.h"

#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <cmocka.h>

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

/* What an agent filled, or was about to fill, is the memory that it was told of. */
static void slots_that_change_under_a_guest_that_arrives_are_noticed(void **state)
{
    struct toy_vmm *v = new_vmm(), *like = new_vmm();
    struct vm_error *err = NULL;
    struct vmmig_error error;
    const struct guest_region *regions;
    const uint64_t page = page_addr(1, 3);
    unsigned n;
    struct vmmig_slot slots[2] = {v->slots[0], v->slots[1]};
    slots[1].memfd = memfd_create("other", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    assert_return_code(ftruncate(slots[1].memfd, 4 * MIB), errno);
    slots[1].host = mmap(NULL, 4 * MIB, PROT_READ | PROT_WRITE, MAP_SHARED, slots[1].memfd, 0);
    vmmig_set_state(like->attach, VMMIG_PAUSED, NULL);
    CLEANUP(attach) struct attach *source = attach_connect(like->path, 10000, &err);
    cleanup_qemu_definition struct qemu_definition d = {0};
    assert_int_equal(attach_define(source, &d, &err), 0);
    CLEANUP(attach) struct attach *a = attach_sink_connect(&d, v->path, 10000, &err);
    assert_string_equal(error_message(err), "no error");
    assert_int_equal(guest_sink_regions(attach_guest(a), &regions, &n), 0);
    assert_int_equal(guest_sink_populate(attach_guest(a), &page, 1, &err), 0);
    memset(regions[1].base, 1, GUEST_PAGE_SIZE);
    assert_int_equal(vmmig_set_slots(v->attach, slots, 2, &error), 0);
    for (int load = 0; load < 2; load++) {
        assert_int_equal(load ? guest_sink_finish(attach_guest(a), INT64_MAX, -1, &err)
                              : guest_sink_populate(attach_guest(a), &page, 1, &err),
                         -1);
        assert_int_equal(err->kind, VM_ERROR_CONFLICT);
        assert_string_equal(error_message(err), "the VMM changed its memory slots while it waited for the guest");
        error_clear(&err);
    }
    assert_int_equal(atomic_load(&v->calls[TOY_LOAD]), 0);
    assert_int_equal(pages_of(slots[1].memfd), 0);
    CLEANUP(attach) struct attach *again = attach_sink_connect(&d, v->path, 10000, &err);
    assert_string_equal(error_message(err), "no error");
    assert_int_equal(guest_sink_finish(attach_guest(again), INT64_MAX, -1, &err), 0);
    assert_int_equal(atomic_load(&v->calls[TOY_LOAD]), 1);
    toy_vmm_destroy(v);
    toy_vmm_destroy(like);
    munmap(slots[1].host, 4 * MIB);
    close(slots[1].memfd);
}

/* A connection of that user's. This thread alone becomes him: the VMM's stays root's. */
static int dial_as(const struct toy_vmm *v, uid_t user)
{
    assert_return_code(chmod(v->path, 0666), 0);
    assert_return_code(syscall(SYS_setresuid, -1, user, -1), 0);
    int fd = dial(v->path);
    assert_return_code(syscall(SYS_setresuid, -1, 0, -1), 0);
    return fd;
}

static void other_users_are_turned_away(void **state)
{
    enum { OTHER = 65534, AGENT = 65533 };
    if (geteuid() != 0) {
        print_message("SKIPPED: only root can become another user\n");
        skip();
    }
    struct toy_vmm *v = new_vmm();
    struct toy_vmm like = {.sizes = {MIB, 4 * MIB}, .params = {.agent_uid = AGENT}};
    struct toy_vmm *open = toy_vmm_create_incoming(&like);
    for (int i = 0; i < 3; i++) {
        int fd = dial_as(i ? open : v, i < 2 ? OTHER : AGENT);
        if (i < 2) {
            expect_error(fd, "denied: this user may not attach to the VMM");
            expect_end(fd);
            continue;
        }
        hello(fd);
        expect_type(fd, VMMIG__ATTACH__TYPE__WELCOME);
        close(fd);
    }
    toy_vmm_destroy(open);
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

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(messages_out_of_order_are_answered),
        cmocka_unit_test(memory_of_a_template_is_private),
        cmocka_unit_test(a_vmm_that_takes_no_files_says_so),
        cmocka_unit_test(garbage_ends_its_connection_only),
        cmocka_unit_test(versions_are_negotiated),
        cmocka_unit_test(memory_is_got_by_a_vmm_that_waits),
        cmocka_unit_test(slots_that_change_under_a_guest_that_arrives_are_noticed),
        cmocka_unit_test(other_users_are_turned_away),
        cmocka_unit_test(no_more_than_four_agents_attach),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

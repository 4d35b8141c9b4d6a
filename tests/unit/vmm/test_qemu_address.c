/* SPDX-License-Identifier: Apache-2.0 */
/* What QEMU says of where its guest's memory is; whole moves are in test_qemu_moves.c. */
#include "vmm/guest_memory.h"
#include "vmm/qemu_address.h"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
#include <cmocka.h>

static const char tree[] =
    "FlatView #0\n AS \"I/O\", root: io\n Root memory region: io\n"
    "  0000000000000000-0000000000000007 (prio 0, i/o): dma-chan\n\n"
    "FlatView #1\r\n AS \"VGA\", root: bus master container\r\n Root memory region: system\r\n"
    "  0000000000000000-00000000000000ff (prio 0, ram): elsewhere\r\n\r\n"
    "FlatView #2\r\n AS \"cpu-memory-0\", root: system\r\n AS \"memory\", root: system\r\n"
    " Root memory region: system\r\n"
    "  0000000000000000-000000000009ffff (prio 0, rom): pc.ram\r\n"
    "  00000000000a0000-00000000000bffff (prio 1, i/o): vga-lowmem\r\n"
    "  0000000000100000-000000007fffffff (prio 0, ram): pc.ram @0000000000100000 KVM\r\n"
    "  0000000100000000-000000017fffffff (prio 0, ram): pc.ram @0000000080000000 KVM\r\n"
    "  0000000180000000-000000018fffffff (prio 0, ram): /objects/d1\r\n"
    "  0000000190000000-0000000190ffffff (prio 0, ram): d2 KVM\r\n";

static void expect(const char *region, uint64_t start, uint64_t offset)
{
    struct qemu_address_range range = {1, 1};
    assert_true(qemu_address_parse_tree(tree, region, &range));
    assert_int_equal(range.start, start);
    assert_int_equal(range.offset, offset);
}

static void test_tree(void **state)
{
    (void)state;
    struct qemu_address_range range;
    expect("pc.ram", 0x100000, 0x100000);
    expect("/objects/d1", 0x180000000, 0);
    expect("0000:00:01.0/d2", 0x190000000, 0);
    /* Another part of a name, another view, nothing at all. */
    assert_false(qemu_address_parse_tree(tree, "xd2", &range));
    assert_false(qemu_address_parse_tree(tree, "ram", &range));
    assert_false(qemu_address_parse_tree(tree, "elsewhere", &range));
    assert_false(qemu_address_parse_tree("", "pc.ram", &range));
    assert_false(qemu_address_parse_tree("FlatView #0\n AS \"memory\", root: system\n  00-", "pc.ram",
                                         &range));
}

static void test_host(void **state)
{
    (void)state;
    uint64_t at = 0;
    static const char said[] = "Host virtual address for 0x100000 (pc.ram) is 0x7f0000200000\r\n";
    assert_true(qemu_address_parse_host(said, "pc.ram", &at));
    assert_int_equal(at, 0x7f0000200000);
    assert_false(qemu_address_parse_host(said, "d1", &at));
    assert_false(qemu_address_parse_host("No memory is mapped at address 0x1\r\n", "pc.ram", &at));
    assert_false(qemu_address_parse_host("Memory at address 0x1 is not RAM (pc.ram) is", "pc.ram", &at));
}

/* The VMM ended, and its number went to another process: here, to this one. */
static void test_a_number_that_is_anothers(void **state)
{
    (void)state;
    uint8_t page[GUEST_PAGE_SIZE] = {1}, room[GUEST_PAGE_SIZE];
    const uint8_t *seen;
    struct vm_error *err = NULL;
    int pid = fork();
    if (!pid)
        pause();
    cleanup_close int pidfd = (int)syscall(SYS_pidfd_open, pid, 0);
    assert_true(pidfd >= 0);
    struct guest_region r = {.name = "pc.ram", .size = sizeof(page), .remote = (uintptr_t)page,
                             .process = getpid(), .process_fd = pidfd};
    assert_int_equal(guest_region_write(&r, 0, "\2", 1, &err), 0);
    assert_int_equal(page[0], 2);
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
    assert_int_equal(guest_region_write(&r, 0, "\3", 1, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_VMM_DIED);
    assert_int_equal(page[0], 2);
    error_clear(&err);
    assert_int_equal(guest_region_look(&r, 0, room, &seen, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_VMM_DIED);
    error_clear(&err);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_tree), cmocka_unit_test(test_host),
                                       cmocka_unit_test(test_a_number_that_is_anothers)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}

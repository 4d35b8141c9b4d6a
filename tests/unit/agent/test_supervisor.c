/* SPDX-License-Identifier: Apache-2.0 */
/* Which supervisor a process has, by its cgroup, and whether that would start it again. */
#include "agent/supervisor.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include <cmocka.h>

static void expect(const char *cgroup, enum supervisor_kind kind, const char *unit)
{
    struct supervisor s = supervisor_of_cgroup(cgroup);
    assert_int_equal(s.kind, kind);
    assert_string_equal(s.unit, unit);
}

static void units_are_found_in_cgroups(void **state)
{
    expect("0::/system.slice/web1.service\n", SUPERVISOR_SYSTEMD, "web1.service");
    expect("0::/system.slice/system-vm.slice/vm@web1.service/qemu\n", SUPERVISOR_SYSTEMD,
           "vm@web1.service");
    expect("12:memory:/\n4:pids:/system.slice/web1.service\n1:name=systemd:/system.slice/"
           "web1.service\n0::/\n",
           SUPERVISOR_SYSTEMD, "web1.service");
    expect("0::/user.slice/user-1000.slice/session-4.scope\n", SUPERVISOR_NONE, "");
    expect("0::/system.slice/docker-1234.scope\n", SUPERVISOR_NONE, "");
    expect("0::/system.slice/agent.service/web1.scope\n", SUPERVISOR_NONE, "");
    expect("0::/vmmig.slice/web1\n", SUPERVISOR_NONE, "");
    expect("0::/.service\n", SUPERVISOR_NONE, "");
    expect("0::/\n", SUPERVISOR_NONE, "");
    expect("", SUPERVISOR_NONE, "");
    expect("nonsense\n:\n::", SUPERVISOR_NONE, "");
}

static void units_of_a_user_are_his_managers(void **state)
{
    struct supervisor s = supervisor_of_cgroup(
        "0::/user.slice/user-1000.slice/user@1000.service/app.slice/web1.service\n");
    assert_int_equal(s.kind, SUPERVISOR_SYSTEMD);
    assert_string_equal(s.unit, "web1.service");
    assert_true(s.of_user);
    assert_int_equal(s.uid, 1000);
    expect("0::/user.slice/user-1000.slice/user@1000.service/init.scope\n", SUPERVISOR_NONE, "");
    assert_false(supervisor_of_cgroup("0::/system.slice/web1.service\n").of_user);
}

static void domains_of_libvirt_are_found(void **state)
{
    expect("0::/machine.slice/machine-qemu\\x2d1\\x2dweb1.scope/libvirt/emulator\n",
           SUPERVISOR_LIBVIRT, "machine-qemu\\x2d1\\x2dweb1.scope");
    expect("5:memory:/machine/qemu-1-web1.libvirt-qemu\n", SUPERVISOR_LIBVIRT,
           "qemu-1-web1.libvirt-qemu");
    expect("0::/system.slice/libvirtd.service\n", SUPERVISOR_LIBVIRT, "libvirtd.service");
}

static void what_a_unit_says_decides(void **state)
{
    static const char *const again[] = {"always", "on-failure", "on-abnormal", "on-abort",
                                        "a later word"};
    static const char *const never[] = {"no", "on-success", "on-watchdog"};
    char text[128];
    for (size_t i = 0; i < sizeof(again) / sizeof(*again); i++) {
        snprintf(text, sizeof(text), "Restart=%s\nRestartForceExitStatus=\n", again[i]);
        assert_true(supervisor_restarts(text));
    }
    for (size_t i = 0; i < sizeof(never) / sizeof(*never); i++) {
        snprintf(text, sizeof(text), "RestartForceExitStatus=\nRestart=%s\n", never[i]);
        assert_false(supervisor_restarts(text));
    }
    assert_true(supervisor_restarts("Restart=no\nRestartForceExitStatus=SIGKILL\n"));
    assert_true(supervisor_restarts("RestartForceExitStatus=\n"));
    assert_true(supervisor_restarts(""));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(units_are_found_in_cgroups),
        cmocka_unit_test(units_of_a_user_are_his_managers),
        cmocka_unit_test(domains_of_libvirt_are_found),
        cmocka_unit_test(what_a_unit_says_decides),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

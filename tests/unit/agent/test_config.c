/* SPDX-License-Identifier: Apache-2.0 */
#include "agent/config.h"

#include "base/text.h"

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>
#include <sys/stat.h>
#include <cmocka.h>

static void defaults_are_complete(void **state)
{
    (void)state;
    CLEANUP(config) struct config *c = config_load(NULL, NULL);
    assert_non_null(c);
    assert_string_equal(c->state_dir, "/var/lib/vmmig");
    assert_string_equal(c->control_socket, "/run/vmmig/control.sock");
    assert_string_equal(c->control_group, "");
    assert_string_equal(c->listen.host, "::");
    assert_int_equal(c->listen.port, DEFAULT_PEER_PORT);
    assert_string_equal(config_find_vmm(c, "qemu-system-x86_64"), "/usr/bin/qemu-system-x86_64");
    assert_int_equal(c->log_level, LOG_LEVEL_INFO);
    assert_false(c->insecure_plain);
    assert_true(*c->host);
}

static void a_file_sets_every_kind_of_value(void **state)
{
    (void)state;
    CLEANUP(config)
    struct config *c = config_parse("x.conf",
                                    "# a comment\n"
                                    "\n"
                                    "  host =  host1  \r\n"
                                    "runtime-dir = /run/other\n"
                                    "listen = 10.0.0.1:7000\n"
                                    "vmm = /opt/qemu/bin/qemu-kvm\n"
                                    "vmm = /usr/local/bin/qemu\n"
                                    "attach-vmm = /opt/bin/vmmig-vmm\n"
                                    "map tap0 = tap7\n"
                                    "map   br0=br1\n"
                                    "max-jobs = 3\n"
                                    "max-bandwidth = 1gbit\n"
                                    "insecure-plain = yes\n"
                                    "log-level = debug\n"
                                    "vm-user = nobody",
                                    NULL);
    assert_non_null(c);
    assert_string_equal(c->host, "host1");
    assert_string_equal(c->control_socket, "/run/other/control.sock");
    assert_string_equal(c->listen.host, "10.0.0.1");
    assert_int_equal(c->listen.port, 7000);
    assert_int_equal(c->vmms.n, 2); /* the default list is replaced */
    assert_null(config_find_vmm(c, "/usr/bin/qemu-system-x86_64"));
    assert_string_equal(config_find_vmm(c, "qemu-kvm"), "/opt/qemu/bin/qemu-kvm");
    assert_string_equal(config_find_vmm(c, "/usr/local/bin/qemu"), "/usr/local/bin/qemu");
    assert_null(config_find_vmm(c, "/tmp/qemu-kvm"));
    assert_null(config_find_vmm(c, "../bin/qemu-kvm"));
    assert_string_equal(config_find_attach_vmm(c, "vmmig-vmm"), "/opt/bin/vmmig-vmm");
    assert_null(config_find_attach_vmm(c, "qemu-kvm")); /* two lists, two kinds of command lines */
    assert_null(config_find_vmm(c, "vmmig-vmm"));
    assert_string_equal(config_map_name(c, "tap0"), "tap7");
    assert_string_equal(config_map_name(c, "br0"), "br1");
    assert_string_equal(config_map_name(c, "tap1"), "tap1");
    assert_int_equal(c->max_jobs, 3);
    assert_int_equal(c->max_bandwidth, 125000000);
    assert_true(c->insecure_plain);
    assert_null(c->ca_file);
    assert_null(c->key_file);
    assert_int_equal(c->log_level, LOG_LEVEL_DEBUG);
    assert_string_equal(c->vm_user, "nobody");
}

static void none_switches_off(void **state)
{
    (void)state;
    CLEANUP(config)
    struct config *c =
        config_parse("x", "listen = none\nvm-cgroup = none\ncontrol-group = none\n", NULL);
    assert_non_null(c);
    assert_string_equal(c->listen.host, "");
    assert_string_equal(c->vm_cgroup, "");
}

static void errors_name_file_line_and_rule(void **state)
{
    (void)state;
    static const struct {
        const char *text, *message;
    } cases[] = {
        {"host = a\nhots = b\n", "x:2: there is no option hots; did you mean host?"},
        {"zzzz = b\n", "x:1: there is no option zzzz"},
        {"host\n", "x:1: `key = value` is expected"},
        {"max-jobs = 0\n", "x:1: max-jobs 0: at least 1 is allowed"},
        {"max-jobs = 65\n", "x:1: max-jobs 65: at most 64 is allowed"},
        {"max-jobs = many\n", "x:1: max-jobs many: a number is expected"},
        {"max-jobs = 1\nmax-jobs = 2\n", "x:2: max-jobs is given twice"},
        {"state-dir = var\n", "x:1: state-dir var: it is not an absolute path"},
        {"listen = [::1\n",
         "x:1: listen [::1: not an address: HOST, HOST:PORT or [IPV6]:PORT expected"},
        {"insecure-plain = maybe\n", "x:1: insecure-plain maybe: yes or no is expected"},
        {"map tap0\n", "x:1: `key = value` is expected"},
        {"map = tap0\n", "x:1: map tap0: map NAME = NAME is expected"},
        {"map a/b = c\n",
         "x:1: map a/b = c: network devices have names of 1 to 15 characters"},
        {"map a = b\nmap a = c\n", "x:2: map a = c: a is mapped twice"},
        {"log-level = loud\n",
         "x:1: log-level loud: one of error, warn, info, debug is expected"},
        {"insecure-plain = yes\nkey = /k\n",
         "x: insecure-plain and key exclude each other: leave one out"},
        {"vmm = qemu\n", "x:1: vmm qemu: it is not an absolute path"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
        cleanup_error struct vm_error *err = NULL;
        assert_null(config_parse("x", cases[i].text, &err));
        assert_string_equal(error_message(err), cases[i].message);
        assert_int_equal(err->kind, VM_ERROR_USAGE);
    }
}

static void a_socket_path_that_cannot_be_bound_is_said_at_once(void **state)
{
    (void)state;
    char text[300];
    cleanup_error struct vm_error *err = NULL;
    snprintf(text, sizeof(text), "runtime-dir = /%0120d\n", 0);
    assert_null(config_parse("x", text, &err));
    assert_non_null(strstr(error_message(err), "at most 107 bytes"));
}

static void lists_are_bounded(void **state)
{
    (void)state;
    char text[8192] = "";
    cleanup_error struct vm_error *err = NULL;
    for (int i = 0; i <= CONFIG_LIST_MAX; i++)
        snprintf(text + strlen(text), sizeof(text) - strlen(text), "map t%d = u%d\n", i, i);
    assert_null(config_parse("x", text, &err));
    assert_string_equal(error_message(err), "x:65: map t64 = u64: at most 64 may be listed");
}

static void a_missing_or_huge_file_is_an_error(void **state)
{
    (void)state;
    cleanup_error struct vm_error *err = NULL, *zero = NULL;
    assert_null(config_load("/nonexistent.conf", &err));
    assert_int_equal(err->kind, VM_ERROR_NOT_FOUND);
    assert_null(config_load("/dev/zero", &zero));
    assert_int_equal(zero->kind, VM_ERROR_REFUSED);
}

/*
 * Uncomment every key of the sample that has a default: it must be accepted, and be the defaults.
 */
static void the_sample_is_valid_and_says_the_defaults(void **state)
{
    (void)state;
    char *text = NULL;
    size_t size;
    FILE *out = open_memstream(&text, &size);
    config_print_sample(out);
    fclose(out);
    char enabled[16384] = "";
    unsigned keys = 0;
    for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n")) {
        assert_true(strlen(line) <= TEXT_COLUMNS);
        const char *value = strstr(line, " = ");
        if (line[0] != '#' || line[1] == ' ' || !value || line[1] == 'm')
            continue;
        if (value[3] >= 'A' && value[3] <= 'Z')
            continue; /* no default: the placeholder */
        strcat(enabled, line + 1);
        strcat(enabled, "\n");
        keys++;
    }
    free(text);
    assert_true(keys >= 14);
    CLEANUP(config) struct config *c = config_parse("sample", enabled, NULL);
    assert_non_null(c);
    assert_string_equal(c->state_dir, "/var/lib/vmmig");
    assert_string_equal(c->listen.host, "::");
}

static void the_help_fits_a_terminal(void **state)
{
    (void)state;
    char *text = NULL;
    size_t size;
    FILE *out = open_memstream(&text, &size);
    config_print_help(out);
    fclose(out);
    for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n"))
        assert_true(strlen(line) <= TEXT_COLUMNS);
    free(text);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(defaults_are_complete),
        cmocka_unit_test(a_file_sets_every_kind_of_value),
        cmocka_unit_test(none_switches_off),
        cmocka_unit_test(errors_name_file_line_and_rule),
        cmocka_unit_test(a_socket_path_that_cannot_be_bound_is_said_at_once),
        cmocka_unit_test(lists_are_bounded),
        cmocka_unit_test(a_missing_or_huge_file_is_an_error),
        cmocka_unit_test(the_sample_is_valid_and_says_the_defaults),
        cmocka_unit_test(the_help_fits_a_terminal),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

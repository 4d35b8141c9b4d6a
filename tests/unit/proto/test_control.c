/* SPDX-License-Identifier: Apache-2.0 */
#include "proto/control.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#define ID_BYTES 16
static uint8_t id_bytes[ID_BYTES + 1];

/*
 * Pack, unpack: what the other side would say. Returns the kind of the error, or -1 if it is fine.
 */
static int judge(unsigned type, const ProtobufCMessage *message)
{
    cleanup_error struct vm_error *err = NULL;
    cleanup_control_message struct control_message m = {0};
    size_t n = protobuf_c_message_get_packed_size(message);
    uint8_t *data = malloc(n + 1);
    protobuf_c_message_pack(message, data);
    int r = control_unpack(type, data, n, &m, &err);
    free(data);
    if (r < 0)
        assert_null(m.any);
    return r < 0 ? (int)err->kind : -1;
}
#define JUDGE(type, m) judge(VMMIG__CONTROL__TYPE__##type, &(m).base)
#define FINE -1

#define TEXT(s) ((char[]){s})

static void sends(void **state)
{
    (void)state;
    Vmmig__Control__Send m = VMMIG__CONTROL__SEND__INIT;
    m.vm = TEXT("web1");
    m.to = TEXT("host2");
    assert_int_equal(JUDGE(SEND, m), FINE);
    m.vm = TEXT("../web1");
    assert_int_equal(JUDGE(SEND, m), VM_ERROR_PROTOCOL);
    m.vm = TEXT("web1");
    m.to = TEXT("");
    assert_int_equal(JUDGE(SEND, m), VM_ERROR_PROTOCOL);
    m.to = TEXT("[fd00::1]:1");
    m.downtime_limit_ms = CONTROL_DOWNTIME_MS_MAX + 1;
    assert_int_equal(JUDGE(SEND, m), VM_ERROR_PROTOCOL);
    m.downtime_limit_ms = CONTROL_DOWNTIME_MS_MAX;
    m.max_bandwidth = CONTROL_BANDWIDTH_MIN - 1;
    assert_int_equal(JUDGE(SEND, m), VM_ERROR_PROTOCOL);
    m.max_bandwidth = UINT64_MAX;
    assert_int_equal(JUDGE(SEND, m), VM_ERROR_PROTOCOL);
    m.max_bandwidth = CONTROL_BANDWIDTH_MAX;
    m.connections = CONTROL_CONNECTIONS_MAX + 1;
    assert_int_equal(JUDGE(SEND, m), VM_ERROR_PROTOCOL);
    m.connections = CONTROL_CONNECTIONS_MAX;
    m.compress = (Vmmig__Control__Compress)4;
    assert_int_equal(JUDGE(SEND, m), VM_ERROR_PROTOCOL);
    m.compress = (Vmmig__Control__Compress)-1;
    assert_int_equal(JUDGE(SEND, m), VM_ERROR_PROTOCOL);
    m.compress = VMMIG__CONTROL__COMPRESS__COMPRESS_ZSTD;
    m.dest_qmp = TEXT("relative");
    assert_int_equal(JUDGE(SEND, m), VM_ERROR_PROTOCOL);
    m.dest_qmp = TEXT("/run/web1.qmp");
    assert_int_equal(JUDGE(SEND, m), FINE);
    m.dest_socket = TEXT("/run/web1.vmm");
    assert_int_equal(JUDGE(SEND, m), VM_ERROR_PROTOCOL); /* both */
    m.dest_qmp = TEXT("");
    assert_int_equal(JUDGE(SEND, m), FINE);
    m.dest_socket = TEXT("relative");
    assert_int_equal(JUDGE(SEND, m), VM_ERROR_PROTOCOL);
}

static void verdicts(void **state)
{
    (void)state;
    Vmmig__Control__Resolve m = VMMIG__CONTROL__RESOLVE__INIT;
    m.vm = TEXT("web1");
    assert_int_equal(JUDGE(RESOLVE, m), VM_ERROR_PROTOCOL);
    m.verdict = VMMIG__CONTROL__VERDICT__HERE;
    assert_int_equal(JUDGE(RESOLVE, m), VM_ERROR_PROTOCOL); /* which host is fenced? */
    m.fenced_host = TEXT("host2");
    assert_int_equal(JUDGE(RESOLVE, m), FINE);
    m.verdict = VMMIG__CONTROL__VERDICT__GONE;
    m.fenced_host = TEXT("");
    assert_int_equal(JUDGE(RESOLVE, m), FINE);
    m.verdict = (Vmmig__Control__Verdict)3;
    assert_int_equal(JUDGE(RESOLVE, m), VM_ERROR_PROTOCOL);
}

static void watches(void **state)
{
    (void)state;
    Vmmig__Control__Watch m = VMMIG__CONTROL__WATCH__INIT;
    assert_int_equal(JUDGE(WATCH, m), VM_ERROR_PROTOCOL); /* neither */
    m.vm = TEXT("web1");
    assert_int_equal(JUDGE(WATCH, m), FINE);
    m.job = (ProtobufCBinaryData){ID_BYTES, id_bytes};
    assert_int_equal(JUDGE(WATCH, m), VM_ERROR_PROTOCOL); /* both */
    m.vm = TEXT("");
    assert_int_equal(JUDGE(WATCH, m), FINE);
    m.job.len = ID_BYTES + 1;
    assert_int_equal(JUDGE(WATCH, m), VM_ERROR_PROTOCOL);
    m.job.len = ID_BYTES;
    m.interval_ms = CONTROL_INTERVAL_MS_MIN - 1;
    assert_int_equal(JUDGE(WATCH, m), VM_ERROR_PROTOCOL);
}

static void runs_and_attaches(void **state)
{
    (void)state;
    Vmmig__Control__Run run = VMMIG__CONTROL__RUN__INIT;
    char *argv[] = {TEXT("qemu"), TEXT("-m")};
    run.vm = TEXT("web1");
    assert_int_equal(JUDGE(RUN, run), VM_ERROR_PROTOCOL);
    run.argv = argv;
    run.n_argv = 2;
    assert_int_equal(JUDGE(RUN, run), FINE);
    run.cwd = TEXT("here");
    assert_int_equal(JUDGE(RUN, run), VM_ERROR_PROTOCOL);
    run.cwd = TEXT("/here");
    assert_int_equal(JUDGE(RUN, run), FINE);
    Vmmig__Control__Attach attach = VMMIG__CONTROL__ATTACH__INIT;
    attach.vm = TEXT("web1");
    assert_int_equal(JUDGE(ATTACH, attach), VM_ERROR_PROTOCOL);
    attach.qmp_path = TEXT("/run/web1.qmp");
    assert_int_equal(JUDGE(ATTACH, attach), FINE);
    attach.socket_path = TEXT("/run/web1.vmm");
    assert_int_equal(JUDGE(ATTACH, attach), VM_ERROR_PROTOCOL); /* both */
    attach.qmp_path = TEXT("");
    assert_int_equal(JUDGE(ATTACH, attach), FINE);
    attach.socket_path = TEXT("web1.vmm");
    assert_int_equal(JUDGE(ATTACH, attach), VM_ERROR_PROTOCOL);
}

static void greetings(void **state)
{
    (void)state;
    Vmmig__Control__Hello m = VMMIG__CONTROL__HELLO__INIT;
    assert_int_equal(JUDGE(HELLO, m), VM_ERROR_PROTOCOL);
    m.version_min = 2;
    m.version_max = 1;
    assert_int_equal(JUDGE(HELLO, m), VM_ERROR_PROTOCOL);
    m.version_min = 1;
    m.version_max = 9;
    m.software = TEXT("a\nb");
    assert_int_equal(JUDGE(HELLO, m), VM_ERROR_PROTOCOL);
    m.software = TEXT("vmmig 0.1.0");
    assert_int_equal(JUDGE(HELLO, m), FINE);
    assert_int_equal(control_version_choose(&m), CONTROL_VERSION_MAX);
    m.version_min = CONTROL_VERSION_MAX + 1;
    assert_int_equal(control_version_choose(&m), 0);
    Vmmig__Control__Welcome w = VMMIG__CONTROL__WELCOME__INIT;
    w.version = CONTROL_VERSION_MAX + 1;
    assert_int_equal(JUDGE(WELCOME, w), VM_ERROR_VERSION);
}

static void answers_are_checked_as_well(void **state)
{
    (void)state;
    Vmmig__Control__Job job = VMMIG__CONTROL__JOB__INIT;
    Vmmig__Control__Error error = VMMIG__CONTROL__ERROR__INIT;
    Vmmig__Control__Vm vm = VMMIG__CONTROL__VM__INIT;
    Vmmig__Control__Vm *all[] = {&vm};
    Vmmig__Control__Vms vms = VMMIG__CONTROL__VMS__INIT;
    job.vm = TEXT("web1");
    assert_int_equal(JUDGE(JOB, job), VM_ERROR_PROTOCOL);
    job.id = (ProtobufCBinaryData){ID_BYTES, id_bytes};
    assert_int_equal(JUDGE(JOB, job), FINE);
    job.state = (Vmmig__Control__JobState)4;
    assert_int_equal(JUDGE(JOB, job), VM_ERROR_PROTOCOL);
    job.state = VMMIG__CONTROL__JOB_STATE__FAILED;
    job.error = &error;
    assert_int_equal(JUDGE(JOB, job), VM_ERROR_PROTOCOL);
    error.kind = TEXT("failed");
    error.message = TEXT("\x1b]0;owned\x07");
    assert_int_equal(JUDGE(JOB, job), VM_ERROR_PROTOCOL);
    vm.vm = TEXT("web1");
    vm.job = &job;
    vms.vms = all;
    vms.n_vms = 1;
    assert_int_equal(JUDGE(VMS, vms), VM_ERROR_PROTOCOL); /* down through VM, job, error */
    error.message = TEXT("no");
    assert_int_equal(JUDGE(VMS, vms), FINE);
    vm.presence = (Vmmig__Control__Presence)3;
    assert_int_equal(JUDGE(VMS, vms), VM_ERROR_PROTOCOL);
}

static void unknown_types_are_a_matter_of_version(void **state)
{
    (void)state;
    cleanup_error struct vm_error *err = NULL;
    struct control_message m;
    assert_int_equal(control_unpack(9999, "", 0, &m, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_VERSION);
    assert_false(control_type_is_request(9999));
    assert_false(control_type_is_request(VMMIG__CONTROL__TYPE__JOB));
    assert_true(control_type_is_request(VMMIG__CONTROL__TYPE__SEND));
    assert_string_equal(control_type_name(VMMIG__CONTROL__TYPE__JOB_LIST), "JOB_LIST");
}

static void garbage_is_malformed(void **state)
{
    (void)state;
    cleanup_error struct vm_error *err = NULL;
    struct control_message m;
    assert_int_equal(control_unpack(VMMIG__CONTROL__TYPE__SEND, "\xff\xff\xff", 3, &m, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_PROTOCOL);
    assert_string_equal(error_message(err), "message SEND is malformed");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sends),
        cmocka_unit_test(verdicts),
        cmocka_unit_test(watches),
        cmocka_unit_test(runs_and_attaches),
        cmocka_unit_test(greetings),
        cmocka_unit_test(answers_are_checked_as_well),
        cmocka_unit_test(unknown_types_are_a_matter_of_version),
        cmocka_unit_test(garbage_is_malformed),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

/* SPDX-License-Identifier: Apache-2.0 */
/* Hand-over messages of a peer: numbers with which nothing can be done do not come in. */
#include "proto/peer.h"
#include "proto/unpack.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <cmocka.h>

static void expect(uint64_t duration_ns, int run, const char *complaint)
{
    uint8_t attempt[16] = {1};
    char name[] = "web1";
    struct peer_message back;
    cleanup_error struct vm_error *err = NULL;
    cleanup_buffer struct buffer out = {0};
    Vmmig__Peer__Handover m = VMMIG__PEER__HANDOVER__INIT;
    m.attempt = (ProtobufCBinaryData){sizeof(attempt), attempt};
    m.vm = name;
    m.duration_ns = duration_ns;
    m.run = run;
    peer_pack(&m.base, &out);
    int r = peer_unpack(VMMIG__PEER__TYPE__HANDOVER, out.data, out.len, &back, &err);
    assert_string_equal(error_message(err), complaint ? complaint : "no error");
    if (r == 0)
        peer_message_finish(&back);
}

static void durations_and_run_states_have_a_range(void **state)
{
    (void)state;
    expect(0, 0, NULL);
    expect(PEER_DURATION_MAX_NS, 2, NULL);
    expect(PEER_DURATION_MAX_NS + 1, 0, "the peer's message is malformed: duration");
    expect(UINT64_MAX, 0, "the peer's message is malformed: duration");
    expect(0, 3, "the peer's message is malformed: run state");
}

/* An empty answer about a disk is two bytes, and a structure of a hundred. */
static void a_packet_takes_a_bounded_multiple_of_its_size(void **state)
{
    enum { N = 500000 };
    uint8_t attempt[16] = {1};
    Vmmig__Peer__DiskAnswer nothing = VMMIG__PEER__DISK_ANSWER__INIT;
    Vmmig__Peer__Prepared prepared = VMMIG__PEER__PREPARED__INIT;
    Vmmig__Peer__Handover m = VMMIG__PEER__HANDOVER__INIT;
    cleanup_error struct vm_error *err = NULL;
    cleanup_buffer struct buffer out = {0};
    struct peer_message back;
    (void)state;
    m.attempt = (ProtobufCBinaryData){sizeof(attempt), attempt};
    m.prepared = &prepared;
    prepared.n_answers = N;
    prepared.answers = calloc(N, sizeof(*prepared.answers));
    assert_non_null(prepared.answers);
    for (size_t i = 0; i < N; i++)
        prepared.answers[i] = &nothing;
    peer_pack(&m.base, &out);
    free(prepared.answers);
    assert_int_equal(peer_unpack(VMMIG__PEER__TYPE__HANDOVER, out.data, out.len, &back, &err), -1);
    assert_string_equal(error_message(err), "the peer's message is malformed: hand-over");
}

static void a_long_command_line_is_unpacked(void **state)
{
    enum { N = 60000 };
    static char word[] = "-device";
    Vmmig__Peer__Definition m = VMMIG__PEER__DEFINITION__INIT;
    cleanup_buffer struct buffer out = {0};
    (void)state;
    m.n_argv = N;
    m.argv = calloc(N, sizeof(*m.argv));
    assert_non_null(m.argv);
    for (size_t i = 0; i < N; i++)
        m.argv[i] = word;
    peer_pack(&m.base, &out);
    free(m.argv);
    ProtobufCMessage *back = unpack_message(m.base.descriptor, out.data, out.len);
    assert_non_null(back);
    assert_int_equal(((Vmmig__Peer__Definition *)back)->n_argv, N);
    protobuf_c_message_free_unpacked(back, NULL);
}

static void the_highest_version_of_both_is_spoken(void **state)
{
    Vmmig__Peer__Hello hello = VMMIG__PEER__HELLO__INIT;
    Vmmig__Peer__HelloOk answer = VMMIG__PEER__HELLO_OK__INIT;
    cleanup_error struct vm_error *err = NULL;
    cleanup_buffer struct buffer out = {0};
    struct peer_message back;
    (void)state;
    hello.version_min = PEER_VERSION_MIN;
    hello.version_max = PEER_VERSION_MAX + 7;
    assert_int_equal(peer_version_choose(&hello), PEER_VERSION_MAX);
    hello.version_min = PEER_VERSION_MAX + 1;
    assert_int_equal(peer_version_choose(&hello), 0);
    answer.version = PEER_VERSION_MAX + 1;
    peer_pack(&answer.base, &out);
    assert_int_equal(peer_unpack(VMMIG__PEER__TYPE__HELLO_OK, out.data, out.len, &back, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_VERSION);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(durations_and_run_states_have_a_range),
        cmocka_unit_test(a_packet_takes_a_bounded_multiple_of_its_size),
        cmocka_unit_test(a_long_command_line_is_unpacked),
        cmocka_unit_test(the_highest_version_of_both_is_spoken),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

/* SPDX-License-Identifier: Apache-2.0 */
/* Hand-over messages of a peer: numbers with which nothing can be done do not come in. */
#include "proto/peer.h"

#include <setjmp.h>
#include <stdarg.h>
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

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(durations_and_run_states_have_a_range)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}

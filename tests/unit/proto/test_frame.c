/* SPDX-License-Identifier: Apache-2.0 */
#include "proto/frame.h"

#include "proto/control.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <cmocka.h>

#define MANY 5

/* Frames of sizes 0, 1, 1000, the largest, 3. */
static const size_t sizes[MANY] = {0, 1, 1000, FRAME_PAYLOAD_MAX, 3};

static void put_many(struct buffer *out)
{
    uint8_t *payload = malloc(FRAME_PAYLOAD_MAX);
    for (size_t i = 0; i < FRAME_PAYLOAD_MAX; i++)
        payload[i] = (uint8_t)(i * 7 + i / 251);
    for (unsigned i = 0; i < MANY; i++)
        assert_int_equal(frame_put(out, (uint16_t)(i + 1), payload, sizes[i], NULL), 0);
    free(payload);
}

/* Decode all of `bytes`, given to the decoder in pieces of `step`; returns how many frames came
 * out. */
static unsigned decode_in_steps(const struct buffer *bytes, size_t step)
{
    cleanup_frame_decoder struct frame_decoder d = {0};
    unsigned n = 0;
    for (size_t at = 0; at < bytes->len; at += step) {
        size_t piece = step < bytes->len - at ? step : bytes->len - at;
        struct cursor in = cursor_init(bytes->data + at, piece);
        struct frame frame;
        int r;
        while ((r = frame_decode(&d, &in, &frame, NULL)) > 0) {
            assert_int_equal(frame.type, n + 1);
            assert_int_equal(frame.len, sizes[n]);
            if (frame.len > 999)
                assert_int_equal(frame.data[999], (uint8_t)(999 * 7 + 999 / 251));
            n++;
        }
        assert_int_equal(r, 0);
        assert_int_equal(cursor_left(&in), 0);
    }
    assert_true(frame_decoder_is_idle(&d));
    return n;
}

static void frames_come_out_however_the_bytes_are_cut(void **state)
{
    (void)state;
    cleanup_buffer struct buffer bytes = {0};
    put_many(&bytes);
    const size_t steps[] = {1, 2, 11, 12, 13, 4096, bytes.len};
    for (size_t i = 0; i < sizeof(steps) / sizeof(*steps); i++)
        assert_int_equal(decode_in_steps(&bytes, steps[i]), MANY);
}

static void assert_refused(const uint8_t *bytes, size_t n, const char *why)
{
    cleanup_frame_decoder struct frame_decoder d = {0};
    cleanup_error struct vm_error *err = NULL, *again = NULL;
    struct cursor in = cursor_init(bytes, n);
    struct frame frame;
    assert_int_equal(frame_decode(&d, &in, &frame, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_PROTOCOL);
    assert_non_null(strstr(error_message(err), why));
    assert_false(frame_decoder_is_idle(&d));
    /* Broken for good, also for bytes that would be fine. */
    cleanup_buffer struct buffer good = {0};
    frame_put(&good, 1, "x", 1, NULL);
    in = cursor_init(good.data, good.len);
    assert_int_equal(frame_decode(&d, &in, &frame, &again), -1);
}

static void what_is_no_frame_is_refused_at_the_first_wrong_byte(void **state)
{
    (void)state;
    uint8_t header[FRAME_HEADER_SIZE];
    assert_refused((const uint8_t *)"GET / HTTP/1.1\r\n", 1, "magic");
    put_le32(header, FRAME_MAGIC);
    put_le32(header + 4, FRAME_PAYLOAD_MAX + 1);
    put_le16(header + 8, 1);
    put_le16(header + 10, 0);
    assert_refused(header, sizeof(header), "too long");
    put_le32(header + 4, 0);
    put_le16(header + 8, 0);
    assert_refused(header, sizeof(header), "no type");
    put_le16(header + 8, 1);
    put_le16(header + 10, 1);
    assert_refused(header, sizeof(header), "no type");
}

static void nothing_is_not_an_end(void **state)
{
    (void)state;
    cleanup_frame_decoder struct frame_decoder d = {0};
    struct cursor nothing = {0};
    struct frame frame;
    assert_int_equal(frame_decode(&d, &nothing, &frame, NULL), 0);
    assert_true(frame_decoder_is_idle(&d));
}

static void memory_follows_what_arrived_not_what_was_claimed(void **state)
{
    (void)state;
    cleanup_frame_decoder struct frame_decoder d = {0};
    uint8_t bytes[FRAME_HEADER_SIZE + 100] = {0};
    struct frame frame;
    put_le32(bytes, FRAME_MAGIC);
    put_le32(bytes + 4, FRAME_PAYLOAD_MAX);
    put_le16(bytes + 8, 1);
    struct cursor in = cursor_init(bytes, sizeof(bytes));
    assert_int_equal(frame_decode(&d, &in, &frame, NULL), 0);
    assert_true(d.payload.cap <= 256);
    assert_false(frame_decoder_is_idle(&d));
}

static void a_payload_that_is_too_long_is_not_sent(void **state)
{
    (void)state;
    cleanup_buffer struct buffer out = {0};
    cleanup_error struct vm_error *err = NULL;
    uint8_t *payload = calloc(1, FRAME_PAYLOAD_MAX + 1);
    frame_put(&out, 1, "x", 1, NULL);
    size_t before = out.len;
    assert_int_equal(frame_put(&out, 1, payload, FRAME_PAYLOAD_MAX + 1, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_USAGE);
    assert_int_equal(out.len, before);
    assert_false(out.failed);
    free(payload);
}

static void a_message_travels(void **state)
{
    (void)state;
    cleanup_buffer struct buffer out = {0};
    cleanup_frame_decoder struct frame_decoder d = {0};
    cleanup_control_message struct control_message m = {0};
    char name[] = "web1";
    Vmmig__Control__Status status = VMMIG__CONTROL__STATUS__INIT;
    status.vm = name;
    assert_int_equal(
        frame_put_message(&out, VMMIG__CONTROL__TYPE__STATUS, &status.base, NULL), 0);
    struct cursor in = cursor_init(out.data, out.len);
    struct frame frame;
    assert_int_equal(frame_decode(&d, &in, &frame, NULL), 1);
    assert_int_equal(control_unpack(frame.type, frame.data, frame.len, &m, NULL), 0);
    assert_string_equal(m.status->vm, "web1");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(frames_come_out_however_the_bytes_are_cut),
        cmocka_unit_test(what_is_no_frame_is_refused_at_the_first_wrong_byte),
        cmocka_unit_test(nothing_is_not_an_end),
        cmocka_unit_test(memory_follows_what_arrived_not_what_was_claimed),
        cmocka_unit_test(a_payload_that_is_too_long_is_not_sent),
        cmocka_unit_test(a_message_travels),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

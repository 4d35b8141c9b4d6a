/* SPDX-License-Identifier: Apache-2.0 */
#include "base/bytes.h"

#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

static void what_is_written_is_read_in_both_orders(void **state)
{
    (void)state;
    cleanup_buffer struct buffer b = {0};
    buffer_put_u8(&b, 0xab);
    buffer_put_le16(&b, 0x1234);
    buffer_put_be16(&b, 0x1234);
    buffer_put_le32(&b, 0x12345678);
    buffer_put_be32(&b, 0x12345678);
    buffer_put_le64(&b, 0x123456789abcdef0);
    buffer_put_be64(&b, 0x123456789abcdef0);
    buffer_put(&b, "xyz", 3);
    assert_false(b.failed);
    assert_int_equal(b.data[1], 0x34);
    assert_int_equal(b.data[3], 0x12);
    struct cursor c = cursor_init(b.data, b.len);
    assert_int_equal(cursor_u8(&c), 0xab);
    assert_int_equal(cursor_le16(&c), 0x1234);
    assert_int_equal(cursor_be16(&c), 0x1234);
    assert_int_equal(cursor_le32(&c), 0x12345678);
    assert_int_equal(cursor_be32(&c), 0x12345678);
    assert_true(cursor_le64(&c) == 0x123456789abcdef0);
    assert_true(cursor_be64(&c) == 0x123456789abcdef0);
    assert_memory_equal(cursor_take(&c, 3), "xyz", 3);
    assert_int_equal(cursor_left(&c), 0);
    assert_false(c.failed);
}

static void a_cursor_never_reads_past_its_end(void **state)
{
    (void)state;
    const uint8_t three[] = {1, 2, 3};
    struct cursor c = cursor_init(three, sizeof(three));
    assert_int_equal(cursor_le32(&c), 0);
    assert_true(c.failed);
    /* Failed for good, also for what would fit. */
    assert_int_equal(cursor_u8(&c), 0);
    assert_null(cursor_take(&c, 0));
    c = cursor_init(three, sizeof(three));
    assert_null(cursor_take(&c, SIZE_MAX));
    assert_true(c.failed);
}

static void a_cursor_over_nothing_has_nothing(void **state)
{
    (void)state;
    struct cursor c = cursor_init(NULL, 0);
    assert_int_equal(cursor_left(&c), 0);
    assert_non_null(cursor_take(&c, 0));
    assert_false(c.failed);
    assert_null(cursor_take(&c, 1));
    assert_true(c.failed);
}

static void a_buffer_keeps_its_limit(void **state)
{
    (void)state;
    cleanup_buffer struct buffer b = {.limit = 10};
    buffer_put(&b, "12345678", 8);
    assert_false(b.failed);
    buffer_put_le32(&b, 1);
    assert_true(b.failed);
    assert_int_equal(b.len, 8); /* nothing was changed */
    buffer_put_u8(&b, 1);
    assert_int_equal(b.len, 8); /* failed until reset */
    buffer_reset(&b);
    assert_false(b.failed);
    buffer_put(&b, "1234567890", 10);
    assert_false(b.failed);
    assert_null(buffer_grow(&b, SIZE_MAX));
    assert_true(b.failed);
}

static void the_front_can_be_dropped(void **state)
{
    (void)state;
    cleanup_buffer struct buffer b = {0};
    buffer_put(&b, "abcdef", 6);
    buffer_consume(&b, 4);
    assert_int_equal(b.len, 2);
    assert_memory_equal(b.data, "ef", 2);
    buffer_consume(&b, 99);
    assert_int_equal(b.len, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_is_written_is_read_in_both_orders),
        cmocka_unit_test(a_cursor_never_reads_past_its_end),
        cmocka_unit_test(a_cursor_over_nothing_has_nothing),
        cmocka_unit_test(a_buffer_keeps_its_limit),
        cmocka_unit_test(the_front_can_be_dropped),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

/* SPDX-License-Identifier: Apache-2.0 */
/* A state that vmmig-vmm is given comes from outside: whatever it holds is refused, or harmless. */
#include "tools/vmmig-vmm/vmm.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include <cmocka.h>

enum { FILE_HEADER = 16, SECTION_HEADER = 16, SUM = 8, RATE = 100000 };

static struct options options = {.memory = 32u << 20, .below_4g = 16u << 20};
static struct memory memory;
static struct vmmig_attach *attach; /* nothing is marked: no writer runs */

static struct writer new_writer(void)
{
    struct writer w = {.rate = RATE, .memory = &memory, .attach = &attach};
    pthread_mutex_init(&w.lock, NULL);
    return w;
}

/* A state of a VMM without KVM, as a file. */
static int new_file(void)
{
    struct state s;
    struct serial serial;
    struct writer w = new_writer();
    int fd = memfd_create("state", MFD_CLOEXEC);
    assert_int_equal(serial_open(&serial, "null"), 0);
    serial.state.n_in = 5;
    memcpy(serial.state.in, "hello", 5);
    w.state = (struct writer_state){.address = FOUR_GIB, .completed = 7, .saves = 1};
    state_begin(&s);
    serial_save(&serial, &s);
    writer_save(&w, &s);
    assert_int_equal(state_write(&s, fd), 0);
    state_finish(&s);
    return fd;
}

static void read_file(struct state *s)
{
    int fd = new_file();
    assert_int_equal(state_read(s, fd), 0);
    close(fd);
}

static void fix_sum(struct state *s)
{
    uint64_t h = 0xcbf29ce484222325u;
    for (size_t i = 0; i < s->size - SUM; i++)
        h = (h ^ s->bytes[i]) * 0x100000001b3u;
    memcpy(s->bytes + s->size - SUM, &h, SUM);
}

static void what_was_saved_is_loaded(void **unused)
{
    struct state s;
    struct serial serial;
    struct writer w = new_writer();
    uint8_t byte;
    read_file(&s);
    assert_int_equal(serial_open(&serial, "null"), 0);
    assert_int_equal(serial_load(&serial, &s), 0);
    assert_int_equal(writer_load(&w, &s), 0);
    for (unsigned i = 0; i < 5; i++) {
        serial_read(&serial, SERIAL_PORT, &byte);
        assert_int_equal(byte, "hello"[i]);
    }
    assert_int_equal(writer_read(&w, WRITER_COMPLETED), 7);
    assert_int_equal(writer_read(&w, WRITER_SAVES), 2);
    state_finish(&s);
}

static void any_flipped_bit_is_noticed(void **unused)
{
    struct state s;
    read_file(&s);
    for (size_t i = 0; i < s.size * 8; i++) {
        s.bytes[i / 8] ^= (uint8_t)(1 << i % 8);
        assert_int_equal(state_check(s.bytes, s.size), -1);
        s.bytes[i / 8] ^= (uint8_t)(1 << i % 8);
    }
    for (size_t n = 0; n < s.size; n++)
        assert_int_equal(state_check(s.bytes, n), -1);
    assert_int_equal(state_check(s.bytes, s.size), 0);
    state_finish(&s);
}

/* Somebody who wishes us ill makes the checksum fit. Then what is accepted must do no harm. */
static void a_hostile_state_does_no_harm(void **unused)
{
    static const uint8_t values[] = {0, 1, 2, 0x7f, 0x80, 0xff};
    struct state s;
    unsigned accepted = 0;
    read_file(&s);
    for (size_t i = 0; i < (s.size - SUM) * sizeof(values); i++) {
        struct serial serial;
        struct writer w = new_writer();
        uint8_t *at = &s.bytes[i / sizeof(values)], before = *at, byte;
        *at = values[i % sizeof(values)];
        fix_sum(&s);
        assert_int_equal(serial_open(&serial, "null"), 0);
        if (state_check(s.bytes, s.size) == 0 && serial_load(&serial, &s) == 0 &&
            writer_load(&w, &s) == 0) {
            accepted++;
            for (unsigned port = 0; port < SERIAL_PORTS; port++)
                for (unsigned n = 0; n < SERIAL_FIFO; n++)
                    serial_read(&serial, SERIAL_PORT + port, &byte);
            for (unsigned n = 0; n < 2 * SERIAL_FIFO; n++)
                serial_write(&serial, SERIAL_PORT, (uint8_t)n);
            assert_true(!w.state.pages ||
                        memory_at(&memory, w.state.address, (1 + (uint64_t)w.state.pages) * PAGE));
        }
        *at = before;
    }
    assert_true(accepted > 100);
    state_finish(&s);
}

static void put(uint8_t *at, uint64_t value)
{
    memcpy(at, &value, sizeof(value));
}

static void sections_that_do_not_fit_are_refused(void **unused)
{
    static const uint64_t sizes[] = {UINT64_MAX, UINT64_MAX - SECTION_HEADER, 1ull << 32, 0};
    struct state s;
    size_t n;
    read_file(&s);
    assert_null(state_get(&s, STATE_SERIAL, 0, 1, 2, &n));
    assert_null(state_get(&s, STATE_REGS, 0, 0, 4096, &n));
    assert_null(state_get(&s, STATE_SERIAL, 1, 0, 4096, &n));
    for (unsigned i = 0; i < sizeof(sizes) / sizeof(*sizes); i++) {
        struct state bad;
        read_file(&bad);
        put(bad.bytes + FILE_HEADER + 8, sizes[i]);
        fix_sum(&bad);
        assert_int_equal(state_check(bad.bytes, bad.size), -1);
        state_finish(&bad);
    }
    state_finish(&s);
}

static void a_device_is_given_no_memory_that_is_none(void **unused)
{
    static const uint32_t pages[] = {WRITER_PAGES_MAX + 1, UINT32_MAX, 4096};
    struct writer w = new_writer();
    for (unsigned i = 0; i < 3; i++) {
        writer_write(&w, WRITER_ADDRESS, UINT32_MAX);
        writer_write(&w, WRITER_PAGES, pages[i]);
        assert_int_equal(writer_read(&w, WRITER_PAGES), 0);
        writer_write(&w, WRITER_ADDRESS, FOUR_GIB / PAGE - 1); /* the hole */
        writer_write(&w, WRITER_PAGES, 1);
        assert_int_equal(writer_read(&w, WRITER_PAGES), 0);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_was_saved_is_loaded),
        cmocka_unit_test(any_flipped_bit_is_noticed),
        cmocka_unit_test(a_hostile_state_does_no_harm),
        cmocka_unit_test(sections_that_do_not_fit_are_refused),
        cmocka_unit_test(a_device_is_given_no_memory_that_is_none),
    };
    if (memory_create(&memory, &options) < 0)
        return 1;
    return cmocka_run_group_tests(tests, NULL, NULL);
}

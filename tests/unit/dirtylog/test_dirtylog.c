/* SPDX-License-Identifier: Apache-2.0 */
/* The drivers of the dirty log against a guest that really runs, each by itself. */
#include "tests/unit/dirtylog/tiny_vm.h"

#include <poll.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>
#include <cmocka.h>

enum { PAGES = 8192, WORDS = PAGES / 64 };
#define DATA_SIZE ((uint64_t)PAGES * DIRTYLOG_PAGE)

struct world {
    struct tiny_vm *vm;
    struct dirtylog *log;
    uint64_t own[4];         /* bitmap of slot 0 */
    uint64_t bitmap[WORDS];  /* of the data */
    atomic_bool kicks_end;
    uint8_t *mirror;         /* what a migration would have at the destination */
};

static enum dirtylog_kind kind; /* of the group that runs */

static bool on_exit_reason(void *arg, unsigned vcpu, uint32_t reason)
{
    return dirtylog_vcpu_exit(arg, vcpu, reason);
}

static void begin(struct world *w, unsigned vcpus, unsigned ring_entries)
{
    struct vm_error *err = NULL;
    memset(w, 0, sizeof(*w));
    w->vm = tiny_vm_create(&(struct tiny_vm_params){
        .kind = kind, .ring_entries = ring_entries, .vcpus = vcpus, .data_size = DATA_SIZE});
    struct dirtylog_params params = {.kind = tiny_vm_kind(w->vm),
                                     .vm_fd = tiny_vm_fd(w->vm),
                                     .vcpu_fds = tiny_vm_vcpu_fds(w->vm),
                                     .n_vcpus = vcpus,
                                     .ring_entries = ring_entries,
                                     .kick = tiny_vm_kick,
                                     .in_guest = tiny_vm_in_guest,
                                     .arg = w->vm};
    w->log = dirtylog_create(&params, &err);
    assert_string_equal(error_message(err), "no error");
    tiny_vm_on_exit(w->vm, NULL, on_exit_reason, w->log);
    w->mirror = calloc(1, DATA_SIZE);
}

static void end(struct world *w)
{
    tiny_vm_stop(w->vm);
    dirtylog_destroy(w->log);
    tiny_vm_destroy(w->vm);
    free(w->mirror);
}

static void start(struct world *w)
{
    struct vm_error *err = NULL;
    dirtylog_start(w->log, tiny_vm_slots(w->vm), 2, &err);
    assert_string_equal(error_message(err), "no error");
}

static void harvest(struct world *w)
{
    struct vm_error *err = NULL;
    dirtylog_begin_harvest(w->log, &err);
    dirtylog_harvest(w->log, 0, w->own, &err);
    dirtylog_harvest(w->log, TINY_VM_DATA_SLOT, w->bitmap, &err);
    assert_string_equal(error_message(err), "no error");
}

static void clear_range(struct world *w, uint64_t first, uint64_t n)
{
    struct vm_error *err = NULL;
    dirtylog_clear(w->log, TINY_VM_DATA_SLOT, first, n, w->bitmap, &err);
    assert_string_equal(error_message(err), "no error");
}

/* Forget what was found, having cleared it. */
static void clear_all(struct world *w)
{
    clear_range(w, 0, PAGES);
    memset(w->bitmap, 0, sizeof(w->bitmap));
}

static bool is_set(const struct world *w, uint64_t page)
{
    return w->bitmap[page / 64] >> (page % 64) & 1;
}

/* The first round is everything: whatever the log says before it was cleared once does not count. */
static void begin_tracking(struct world *w)
{
    start(w);
    memset(w->bitmap, 0xff, sizeof(w->bitmap));
    harvest(w);
    clear_all(w);
}

static void written_pages_are_found_and_no_others(void **state)
{
    struct world w;
    begin(&w, 1, 0);
    begin_tracking(&w);
    tiny_vm_write(w.vm, 0, 3, 1);
    tiny_vm_write(w.vm, 0, 1000, 200);
    tiny_vm_write(w.vm, 0, PAGES - 1, 1);
    harvest(&w);
    for (uint64_t i = 0; i < PAGES; i++)
        assert_int_equal(is_set(&w, i), i == 3 || (i >= 1000 && i < 1200) || i == PAGES - 1);
    clear_all(&w);
    harvest(&w);
    for (uint64_t i = 0; i < PAGES; i++)
        assert_false(is_set(&w, i));
    end(&w);
}

static void a_page_that_is_written_again_comes_again(void **state)
{
    struct world w;
    begin(&w, 1, 0);
    begin_tracking(&w);
    for (int round = 0; round < 5; round++) {
        tiny_vm_write(w.vm, 0, 64, 2);
        harvest(&w);
        assert_true(is_set(&w, 64) && is_set(&w, 65));
        clear_all(&w);
    }
    end(&w);
}

static void a_write_between_harvest_and_clear_is_in_the_copy(void **state)
{
    struct world w;
    begin(&w, 1, 0);
    begin_tracking(&w);
    tiny_vm_write(w.vm, 0, 10, 1);
    harvest(&w);
    tiny_vm_write(w.vm, 0, 10, 1);
    clear_range(&w, 0, 64);
    uint64_t copied = tiny_vm_count(w.vm, 10);
    memset(w.bitmap, 0, sizeof(w.bitmap));
    harvest(&w);
    assert_true(copied == 2 || is_set(&w, 10));
    /* The other order, copy and then clear, is what loses a write where clearing is a step of its own. */
    if (kind == DIRTYLOG_BITMAP) {
        tiny_vm_write(w.vm, 0, 20, 1);
        harvest(&w);
        copied = tiny_vm_count(w.vm, 20);
        tiny_vm_write(w.vm, 0, 20, 1);
        clear_all(&w);
        harvest(&w);
        assert_true(copied == 1 && !is_set(&w, 20));
    }
    end(&w);
}

static void what_is_not_cleared_is_not_forgotten(void **state)
{
    struct world w;
    begin(&w, 1, 0);
    begin_tracking(&w);
    tiny_vm_write(w.vm, 0, 0, 256);
    harvest(&w);
    clear_range(&w, 64, 64);
    memset(w.bitmap + 1, 0, 8);
    harvest(&w); /* adds to the bitmap */
    for (uint64_t i = 0; i < 256; i++)
        assert_int_equal(is_set(&w, i), i < 64 || i >= 128);
    tiny_vm_write(w.vm, 0, 100, 1);
    harvest(&w);
    assert_true(is_set(&w, 100));
    end(&w);
}

static void tracking_starts_and_stops_any_number_of_times(void **state)
{
    struct world w;
    struct vm_error *err = NULL;
    begin(&w, 1, 0);
    for (int i = 0; i < 3; i++) {
        begin_tracking(&w);
        tiny_vm_write(w.vm, 0, 5, 1);
        harvest(&w);
        assert_true(is_set(&w, 5));
        dirtylog_stop(w.log);
        tiny_vm_write(w.vm, 0, 0, PAGES);
        assert_int_equal(dirtylog_begin_harvest(w.log, &err), -1);
        assert_string_equal(error_message(err), "dirty pages are not being tracked");
        error_clear(&err);
    }
    end(&w);
}

static void a_full_ring_loses_nothing(void **state)
{
    struct world w;
    struct dirtylog_stats stats;
    begin(&w, 1, DIRTYLOG_RING_ENTRIES_MIN);
    begin_tracking(&w);
    tiny_vm_write(w.vm, 0, 0, PAGES);
    harvest(&w);
    for (uint64_t i = 0; i < PAGES; i++)
        assert_true(is_set(&w, i));
    dirtylog_get_stats(w.log, &stats);
    if (kind == DIRTYLOG_RING)
        assert_true(stats.ring_full > 0);
    else
        assert_int_equal(stats.ring_full, 0);
    end(&w);
}

/* What the engine does, without a network: the mirror is the destination. */
static void copy_dirty(struct world *w, unsigned drop_word)
{
    for (unsigned word = 0; word < WORDS; word++) {
        if (!w->bitmap[word])
            continue;
        clear_range(w, word * 64, 64);
        for (unsigned bit = 0; bit < 64; bit++) {
            size_t at = (word * 64 + bit) * (size_t)DIRTYLOG_PAGE;
            if (is_set(w, word * 64 + bit) && word != drop_word)
                memcpy(w->mirror + at, tiny_vm_data(w->vm) + at, DIRTYLOG_PAGE);
        }
        w->bitmap[word] = 0;
    }
}

static void wait_for_pass(struct tiny_vm *vm, unsigned vcpu)
{
    uint64_t before = tiny_vm_passes(vm, vcpu);
    while (tiny_vm_passes(vm, vcpu) == before)
        sched_yield();
}

/* Signals at any time, as the vCPUs of a VMM get them. */
static void *kick_on(void *arg)
{
    struct world *w = arg;
    for (unsigned i = 0; !atomic_load(&w->kicks_end); i++)
        tiny_vm_kick(w->vm, i % 2);
    return NULL;
}

/* Another process that stops this one and lets it go on, again and again: that cannot be blocked. */
static pid_t stop_and_go(int *ret_end)
{
    int ends[2];
    pid_t us = getpid();
    assert_int_equal(pipe(ends), 0);
    pid_t child = fork();
    if (child == 0) {
        close(ends[1]);
        for (struct pollfd p = {ends[0], POLLIN, 0}; poll(&p, 1, 1) == 0;) {
            kill(us, SIGSTOP);
            usleep(300);
            kill(us, SIGCONT);
        }
        _exit(0);
    }
    close(ends[0]);
    *ret_end = ends[1];
    return child;
}

enum disturbance { QUIET, KICKS, STOPS };

/* Two vCPUs write at full speed, each its own pages and both a shared range. True: all arrived. */
static bool migrate(struct world *w, unsigned drop_word, enum disturbance disturbance)
{
    pthread_t kicker;
    pid_t stopper = 0;
    int stopper_end = -1;
    tiny_vm_write(w->vm, 0, 0, PAGES);
    start(w);
    memset(w->bitmap, 0xff, sizeof(w->bitmap));
    tiny_vm_run_free(w->vm, 0, 0, PAGES / 2);
    tiny_vm_run_free(w->vm, 1, PAGES / 4, PAGES / 2);
    if (disturbance == KICKS)
        assert_int_equal(pthread_create(&kicker, NULL, kick_on, w), 0);
    if (disturbance == STOPS)
        stopper = stop_and_go(&stopper_end);
    for (int round = 0; round < 3; round++) {
        copy_dirty(w, UINT32_MAX);
        wait_for_pass(w->vm, 0);
        wait_for_pass(w->vm, 1);
        harvest(w);
    }
    if (disturbance == KICKS) {
        atomic_store(&w->kicks_end, true);
        pthread_join(kicker, NULL);
    }
    if (stopper) {
        close(stopper_end);
        waitpid(stopper, NULL, 0);
    }
    tiny_vm_stop(w->vm);
    harvest(w);
    copy_dirty(w, drop_word);
    return !memcmp(w->mirror, tiny_vm_data(w->vm), DATA_SIZE);
}

static void memory_of_a_busy_guest_arrives_whole(void **state)
{
    for (int i = 0; i < 3; i++) {
        struct world w;
        begin(&w, 2, i ? 0 : DIRTYLOG_RING_ENTRIES_MIN);
        assert_true(migrate(&w, UINT32_MAX, QUIET));
        end(&w);
    }
}

static bool arrives_whole(enum disturbance disturbance)
{
    struct world w;
    begin(&w, 2, DIRTYLOG_RING_ENTRIES_MIN);
    bool whole = migrate(&w, UINT32_MAX, disturbance);
    end(&w);
    return whole;
}

/* KVM stops half-way through a reset of the rings when the thread that asks for it has a signal to take. */
static void signals_lose_nothing(void **state)
{
    for (int i = 0; i < (kind == DIRTYLOG_RING ? 4 : 1); i++)
        assert_true(arrives_whole(KICKS));
}

static void a_vmm_that_is_stopped_and_continued_loses_nothing(void **state)
{
    for (int i = 0; i < (kind == DIRTYLOG_RING ? 2 : 1); i++)
        assert_true(arrives_whole(STOPS));
}

/* The tests above would notice. */
static void one_dropped_run_is_noticed(void **state)
{
    struct world w;
    begin(&w, 2, 0);
    assert_false(migrate(&w, PAGES / 4 / 64, QUIET));
    end(&w);
}

static void a_slot_that_changed_is_a_conflict(void **state)
{
    struct world w;
    struct vm_error *err = NULL;
    struct dirtylog_slot wrong[2];
    begin(&w, 1, 0);
    memcpy(wrong, tiny_vm_slots(w.vm), sizeof(wrong));
    wrong[1].size -= 2 << 20;
    assert_int_equal(dirtylog_start(w.log, wrong, 2, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_CONFLICT);
    assert_string_equal(error_message(err), "cannot switch logging: memory slot 1 is not what it was "
                                            "when tracking began");
    error_clear(&err);
    assert_false(dirtylog_is_started(w.log));
    start(&w); /* nothing was left behind */
    end(&w);
}

static void arguments_are_checked(void **state)
{
    struct world w;
    struct vm_error *err = NULL;
    begin(&w, 1, 0);
    start(&w);
    static const uint64_t bad[][2] = {{1, 64}, {0, 63}, {0, 0}, {PAGES, 64}, {64, PAGES}};
    for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); i++) {
        assert_int_equal(dirtylog_clear(w.log, 1, bad[i][0], bad[i][1], w.bitmap, &err), -1);
        assert_int_equal(err->kind, VM_ERROR_USAGE);
        error_clear(&err);
    }
    assert_int_equal(dirtylog_harvest(w.log, 2, w.bitmap, &err), -1);
    error_clear(&err);
    assert_int_equal(dirtylog_start(w.log, tiny_vm_slots(w.vm), 2, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_CONFLICT);
    error_clear(&err);
    end(&w);
}

/* A recording of a real guest, replayed without one. */
static void a_recording_replays(void **state)
{
    struct world w;
    struct vm_error *err = NULL;
    char path[] = "/tmp/vmmig-trace-XXXXXX";
    close(mkstemp(path));
    begin(&w, 1, 0);
    assert_int_equal(dirtylog_record(w.log, path, &err), 0);
    start(&w);
    harvest(&w);
    clear_all(&w);
    tiny_vm_write(w.vm, 0, 7, 3);
    harvest(&w);
    clear_all(&w);
    harvest(&w);
    end(&w);

    uint8_t *memory[2] = {calloc(1, 1 << 20), calloc(1, DATA_SIZE)};
    struct dirtylog_slot slots[2] = {{0, 0, 0, 1 << 20, memory[0]}, {1, 0, 0, DATA_SIZE, memory[1]}};
    struct dirtylog_params params = {.kind = DIRTYLOG_TRACE, .vm_fd = -1, .trace_path = path};
    memset(&w, 0, sizeof(w));
    w.log = dirtylog_create(&params, &err);
    assert_string_equal(error_message(err), "no error");
    for (int again = 0; again < 2; again++) {
        assert_int_equal(dirtylog_start(w.log, slots, 2, &err), 0);
        harvest(&w);
        memset(w.bitmap, 0, sizeof(w.bitmap));
        uint64_t before = *(uint64_t *)(void *)(memory[1] + 8 * DIRTYLOG_PAGE);
        harvest(&w);
        for (uint64_t i = 0; i < PAGES; i++)
            assert_int_equal(is_set(&w, i), i >= 7 && i < 10);
        assert_int_equal(*(uint64_t *)(void *)(memory[1] + 8 * DIRTYLOG_PAGE), before + 1);
        memset(w.bitmap, 0, sizeof(w.bitmap));
        for (int past_the_end = 0; past_the_end < 3; past_the_end++)
            harvest(&w);
        for (uint64_t i = 0; i < PAGES; i++)
            assert_false(is_set(&w, i));
        dirtylog_stop(w.log);
    }
    dirtylog_destroy(w.log);
    free(memory[0]);
    free(memory[1]);
    unlink(path);
}

static int run_group(enum dirtylog_kind which)
{
    char name[32];
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(written_pages_are_found_and_no_others),
        cmocka_unit_test(a_page_that_is_written_again_comes_again),
        cmocka_unit_test(a_write_between_harvest_and_clear_is_in_the_copy),
        cmocka_unit_test(what_is_not_cleared_is_not_forgotten),
        cmocka_unit_test(tracking_starts_and_stops_any_number_of_times),
        cmocka_unit_test(a_full_ring_loses_nothing),
        cmocka_unit_test(memory_of_a_busy_guest_arrives_whole),
        cmocka_unit_test(signals_lose_nothing),
        cmocka_unit_test(a_vmm_that_is_stopped_and_continued_loses_nothing),
        cmocka_unit_test(one_dropped_run_is_noticed),
        cmocka_unit_test(a_slot_that_changed_is_a_conflict),
        cmocka_unit_test(arguments_are_checked),
        cmocka_unit_test(a_recording_replays),
    };
    kind = which;
    snprintf(name, sizeof(name), "dirtylog %s", dirtylog_kind_name(which));
    return cmocka_run_group_tests_name(name, tests, NULL, NULL);
}

int main(void)
{
    if (!tiny_vm_available())
        return 77;
    return run_group(DIRTYLOG_BITMAP) + run_group(DIRTYLOG_RING) + run_group(DIRTYLOG_PLAIN);
}

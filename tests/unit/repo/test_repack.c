/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Repacking: what is alive moves to new packs, readers find it by forwardings, recipes are settled,
 * and what is not needed any more goes. Beside that: forwardings as values.
 */
enum { SIZE = 24 * 1024 * 1024, CONTENT = 2 * SIZE };

#include "tests/unit/repo/repo_collected.h"
#include "repo/collect.h"
#include "repo/forwarding.h"
#include "repo/names.h"
#include "repo/scrub.h"

#include "base/clock.h"

static const struct collect_options plain = {.fence_after_ns = 60 * NSEC_PER_SEC,
                                             .control.cancel_fd = -1};
static const struct collect_options repack = {.repack = true, .fence_after_ns = 60 * NSEC_PER_SEC,
                                              .control.cancel_fd = -1};
static const struct collect_options recompress = {
    .repack = true, .recompress = true, .fence_after_ns = 60 * NSEC_PER_SEC,
    .control.cancel_fd = -1};

static struct collect_report collect(const struct collect_options *o)
{
    cleanup_error struct vm_error *err = NULL;
    struct collect_report report = {0};
    repo_collect(gc, o, &report, &err);
    assert_ok(err);
    return report;
}

static struct repo_stat stat_of(void)
{
    struct repo_stat stat;
    assert_int_equal(repo_stat(repo, &stat, NULL), 0);
    return stat;
}

static int count_forwarding(const struct forwarding *f, void *arg, struct vm_error **err)
{
    ++*(unsigned *)arg;
    return 0;
}

static unsigned forwardings(void)
{
    unsigned n = 0;
    cleanup_error struct vm_error *err = NULL;
    forwarding_list(repo_store(repo), count_forwarding, &n, &err);
    assert_ok(err);
    return n;
}

static void no_finding(enum scrub_kind kind, const char *what, void *arg)
{
    print_error("scrub found: %s\n", what);
}

static void assert_clean(void)
{
    cleanup_error struct vm_error *err = NULL;
    struct scrub_report report;
    repo_scrub(repo, NULL, no_finding, NULL, &report, &err);
    assert_ok(err);
    assert_int_equal(report.damaged + report.images_touched, 0);
}

/* Two images in one import each, of which every second segment is the other's. */
static void store_half_dead(void)
{
    cleanup_free uint8_t *mixed = malloc(SIZE);
    store_image("whole", content);
    memcpy(mixed, content, SIZE);
    for (size_t at = 0; at < SIZE; at += 2 * MIB)
        memcpy(mixed + at, content + SIZE + at, MIB);
    store_image("mixed", mixed);
    delete_image("whole");
    assert_image("mixed", mixed);
}

static void assert_mixed(void)
{
    cleanup_free uint8_t *mixed = malloc(SIZE);
    memcpy(mixed, content, SIZE);
    for (size_t at = 0; at < SIZE; at += 2 * MIB)
        memcpy(mixed + at, content + SIZE + at, MIB);
    assert_image("mixed", mixed);
}

/* ---- forwardings as values ---- */

static void a_forwarding_is_read_as_it_was_written(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    struct forward_run runs[] = {{64, 0, 4, {.pack = 7, .offset = 32, .len = 800, .page = 2}},
                                 {64, 5, 1, {.pack = 8, .offset = 40, .len = 80, .page = 0}},
                                 {640, 0, 16, {.pack = 7, .offset = 832, .len = 65552, .page = 0}}};
    struct forwarding f = {.pack = 99, .runs = runs, .n = 3}, got;
    cleanup_buffer struct buffer value = {0};
    forwarding_write(&f, &value, &err);
    assert_ok(err);
    assert_int_equal(forwarding_read(99, value.data, value.len, &got, &err), 0);
    assert_int_equal(got.n, 3);
    struct recipe_page p = {.pack = 99, .offset = 64, .len = 4000, .page = 3};
    assert_true(forwarding_find(&got, &p));
    assert_true(p.pack == 7 && p.offset == 32 && p.len == 800 && p.page == 5);
    p = (struct recipe_page){.pack = 99, .offset = 64, .page = 4};
    assert_false(forwarding_find(&got, &p));
    p = (struct recipe_page){.pack = 99, .offset = 32, .page = 0};
    assert_false(forwarding_find(&got, &p));
    p = (struct recipe_page){.pack = 99, .offset = 640, .page = 15};
    assert_true(forwarding_find(&got, &p) && p.page == 15 && p.len == 65552);
    /* More runs take the place of those that have the same pages. */
    struct forward_run more[] = {{64, 4, 2, {.pack = 9, .offset = 32, .len = 80, .page = 1}}};
    assert_int_equal(forwarding_merge(&got, more, 1, &err), 0);
    assert_int_equal(got.n, 3);
    p = (struct recipe_page){.pack = 99, .offset = 64, .page = 5};
    assert_true(forwarding_find(&got, &p) && p.pack == 9 && p.page == 2);
    forwarding_finish(&got);
    for (size_t i = 0; i < value.len; i++) { /* any flipped byte is seen */
        value.data[i] ^= 1;
        assert_int_equal(forwarding_read(99, value.data, value.len, &got, NULL), -1);
        value.data[i] ^= 1;
    }
    for (size_t n = 0; n < value.len; n++)
        assert_int_equal(forwarding_read(99, value.data, n, &got, NULL), -1);
    assert_int_equal(forwarding_read(98, value.data, value.len, &got, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_CORRUPT);
}

/* ---- repacking ---- */

static void what_is_alive_moves_and_stays_readable(void **state)
{
    store_half_dead();
    collect(&plain);
    struct repo_stat before = stat_of();
    struct collect_report report = collect(&repack);
    assert_true(report.repacked > 0 && report.repacked_to < report.repacked_from * 3 / 4);
    assert_int_equal(report.settled, 1);
    assert_true(stat_of().pack_bytes < before.pack_bytes * 3 / 4);
    assert_mixed();
    assert_clean();
    /* Recipes name the new places: the forwardings go. */
    assert_true(forwardings() > 0);
    collect(&plain);
    assert_int_equal(forwardings(), 0);
    assert_mixed();
    assert_clean();
    assert_int_equal(collect(&repack).repacked, 0);
    delete_image("mixed");
    collect(&plain);
    assert_int_equal(stat_of().packs + stat_of().trees, 0);
}

static void a_repository_is_compressed_again_once(void **state)
{
    store_image("a", content);
    struct repo_stat before = stat_of();
    struct collect_report report = collect(&recompress);
    assert_int_equal(report.repacked, before.packs);
    assert_true(stat_of().pack_bytes < before.pack_bytes);
    assert_image("a", content);
    report = collect(&recompress);
    assert_int_equal(report.repacked, 0);
    assert_int_equal(forwardings(), 0);
    assert_image("a", content);
    /* New imports share with what was repacked. */
    struct import_report again;
    assert_int_equal(put_all(repo, "b", NULL, content, SIZE, &again, NULL), 0);
    assert_int_equal(again.written.pages_new, 0);
    assert_clean();
}

static int count_difference(const struct image_difference *d, void *arg, struct vm_error **err)
{
    *(uint64_t *)arg += d->len;
    return 0;
}

static void images_are_compared_across_forwardings(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    uint64_t differing = 0;
    store_image("a", content);
    store_fault_arm(watched, "create.tree=error:ENOSPC@*", &err); /* recipes keep the old places */
    assert_int_equal(collect(&recompress).settled, 0);
    store_fault_arm(watched, "", &err);
    assert_true(forwardings() > 0);
    store_image("b", content); /* at the new places */
    assert_int_equal(image_diff(repo, "a", "b", count_difference, &differing, &err), 0);
    assert_ok(err);
    assert_int_equal(differing, 0);
    content[SIZE / 2] ^= 1;
    store_image("c", content);
    assert_int_equal(image_diff(repo, "c", "a", count_difference, &differing, &err), 0);
    assert_int_equal(differing, PAGE_BYTES);
}

static void a_lease_reads_by_forwarding(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    static struct lease lease;
    cleanup_free uint8_t *got = malloc(SIZE);
    store_image("a", content);
    catalogue_lease(repo_store(repo), "a", "web1", &lease, &err);
    assert_ok(err);
    CLEANUP(file_reader)
    struct file_reader *f =
        file_reader_create(repo_store(repo), &lease.image.files[0].root, SIZE, &err);
    assert_int_equal(file_reader_read(f, 0, got, MIB, &err), 0);
    delete_image("a");
    assert_true(collect(&recompress).repacked > 0);
    for (int i = 0; i < 3; i++) {
        collect(&recompress);
        assert_int_equal(file_reader_read(f, 0, got, SIZE, &err), 0);
        assert_memory_equal(got, content, SIZE);
        assert_true(forwardings() > 0);
    }
    catalogue_lease_drop(repo_store(repo), &lease, &err);
    assert_ok(err);
    collect(&plain);
    assert_int_equal(stat_of().packs + stat_of().trees + forwardings(), 0);
}

/* Forwarded once, and its target repacked again: no chains, the lease still reads. */
static void a_target_is_repacked_again(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    static struct lease lease;
    cleanup_free uint8_t *got = malloc(SIZE), *half = calloc(1, SIZE);
    for (size_t at = 0; at < SIZE; at += 2 * MIB)
        memcpy(half + at, content + at, MIB);
    store_image("a", content);
    store_image("half", half);
    catalogue_lease(repo_store(repo), "half", "web1", &lease, &err);
    assert_ok(err);
    collect(&recompress);
    delete_image("a");
    delete_image("half");
    /* What the lease's forwardings name is half dead now. */
    assert_true(collect(&repack).repacked > 0);
    for (int i = 0; i < 2; i++) {
        CLEANUP(file_reader)
        struct file_reader *f =
            file_reader_create(repo_store(repo), &lease.image.files[0].root, SIZE, &err);
        assert_int_equal(file_reader_read(f, 0, got, SIZE, &err), 0);
        assert_memory_equal(got, half, SIZE);
        collect(&plain);
    }
    catalogue_lease_drop(repo_store(repo), &lease, &err);
    assert_ok(err);
    collect(&plain);
    assert_int_equal(stat_of().packs + stat_of().trees + forwardings(), 0);
}

/* A reader that began before everything moved, twice, and its recipes with it. */
static void a_reader_without_a_lease_goes_on(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    cleanup_free uint8_t *got = malloc(SIZE);
    static struct image image;
    store_image("a", content);
    catalogue_find(repo_store(repo), "a", &image, &err);
    assert_ok(err);
    CLEANUP(file_reader)
    struct file_reader *f = file_reader_open(repo_store(repo), &image, &image.files[0], &err);
    assert_int_equal(file_reader_read(f, 0, got, MIB, &err), 0);
    collect(&recompress);
    collect(&plain);
    collect(&plain);
    assert_int_equal(forwardings(), 0);
    assert_int_equal(file_reader_read(f, 0, got, SIZE, &err), 0);
    assert_ok(err);
    assert_memory_equal(got, content, SIZE);
    /* Another image of that name is not that image. */
    delete_image("a");
    store_image("a", content + SIZE);
    collect(&plain);
    collect(&recompress);
    assert_int_equal(file_reader_read(f, 0, got, SIZE, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_NOT_FOUND);
}

static void a_full_store_leaves_packs_as_they_are(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    store_half_dead();
    collect(&plain);
    struct repo_stat before = stat_of();
    store_fault_arm(watched, "create.pack=error:ENOSPC@*", &err);
    assert_ok(err);
    struct collect_report report = collect(&repack);
    store_fault_arm(watched, "", &err);
    assert_true(report.repack_lacked_space);
    assert_int_equal(report.repacked, 0);
    assert_int_equal(stat_of().packs, before.packs);
    assert_mixed();
    assert_true(collect(&repack).repacked > 0);
    assert_mixed();
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_forwarding_is_read_as_it_was_written),
        cmocka_unit_test_setup_teardown(what_is_alive_moves_and_stays_readable, setup, teardown),
        cmocka_unit_test_setup_teardown(a_repository_is_compressed_again_once, setup, teardown),
        cmocka_unit_test_setup_teardown(images_are_compared_across_forwardings, setup, teardown),
        cmocka_unit_test_setup_teardown(a_lease_reads_by_forwarding, setup, teardown),
        cmocka_unit_test_setup_teardown(a_target_is_repacked_again, setup, teardown),
        cmocka_unit_test_setup_teardown(a_reader_without_a_lease_goes_on, setup, teardown),
        cmocka_unit_test_setup_teardown(a_full_store_leaves_packs_as_they_are, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

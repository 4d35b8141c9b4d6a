/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Repacking: what is alive moves to new packs, readers find it by forwardings, recipes are settled,
 * and what is not needed any more goes. Beside that: forwardings as values.
 */
enum { SIZE = 24 * 1024 * 1024, CONTENT = 2 * SIZE };

#include "tests/unit/repo/repo_collected.h"
#include "repo/collect.h"
#include "repo/copy.h"
#include "repo/forwarding.h"
#include "repo/names.h"
#include "repo/scrub.h"
#include "repo/template.h"

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
    assert_int_equal(report.damaged + report.images_touched + report.forwardings, 0);
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

/* It would go into recipes, which refuse it. */
static void a_forwarding_to_where_no_record_can_be_makes_no_sense(void **state)
{
    static const struct forward_run runs[] = {
        {64, 0, 4, {.pack = 7, .offset = 24, .len = 800}},                     /* in the header */
        {64, 0, 4, {.pack = 7, .offset = 8 * MIB, .len = 800}},                /* behind the end */
        {64, 0, 4, {.pack = 7, .offset = 8 * MIB - 792, .len = 800}},          /* beyond it */
        {64, 0, 4, {.pack = 7, .offset = 32, .len = 8 * 65535}},               /* too large */
        {64, 0, 4, {.pack = 7, .offset = 32, .len = 16}},                      /* no payload */
        {64, 0, 4, {.pack = 7, .offset = 32, .len = 800, .page = 13}},
        {24, 0, 4, {.pack = 7, .offset = 32, .len = 800}},
        {8 * MIB + 8, 0, 4, {.pack = 7, .offset = 32, .len = 800}},
    };
    for (size_t i = 0; i < sizeof(runs) / sizeof(*runs); i++) {
        cleanup_error struct vm_error *err = NULL;
        struct forward_run run = runs[i];
        struct forwarding f = {.pack = 99, .runs = &run, .n = 1}, got;
        cleanup_buffer struct buffer value = {0};
        forwarding_write(&f, &value, &err);
        assert_ok(err);
        assert_int_equal(forwarding_read(99, value.data, value.len, &got, &err), -1);
        assert_int_equal(err->kind, VM_ERROR_CORRUPT);
    }
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

/* ---- while an image's recipes are replaced ---- */

/* Recipes of all images lead through forwardings. */
static void repack_without_settling(void)
{
    cleanup_error struct vm_error *err = NULL;
    store_fault_arm(watched, "create.tree=error:ENOSPC@*", &err);
    assert_int_equal(collect(&recompress).settled, 0);
    store_fault_arm(watched, "", &err);
    assert_true(forwardings() > 0);
}

/* Then neither the recipes nor the packs are there that anybody read of before. */
static void settle_all(void)
{
    cleanup_error struct vm_error *err = NULL;
    struct collect_report report;
    for (int i = 0; i < 3; i++) {
        repo_collect(repo, &plain, &report, &err);
        assert_ok(err);
    }
    assert_int_equal(forwardings(), 0);
}

static void settle_before(struct between *b, const char *name, enum store_op_kind kind,
                          unsigned nth)
{
    *b = (struct between){name, kind, settle_all, NULL, nth, 0};
    store_fault_set_hook(watched, run_between, b);
}

static void settled(const struct between *b)
{
    store_fault_set_hook(watched, NULL, NULL);
    assert_int_equal(b->nth, 0);
}

static void a_child_begins_while_its_parent_is_settled(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    struct between b;
    store_image("a", content);
    repack_without_settling();
    settle_before(&b, "repository", STORE_UPDATE, 1); /* the parent is found by then */
    CLEANUP(image_session) struct image_session *s = image_session_begin(gc, "child", "a", &err);
    assert_ok(err);
    settled(&b);
    struct image_file *f = image_session_file(s, "disk0.raw", SIZE, &err);
    memcpy(content, content + SIZE, MIB);
    put(s, f, 0, content);
    image_session_commit(s, NULL, &err);
    assert_ok(err);
    assert_image("child", content);
    image_session_end(s);
    s = image_session_begin(gc, "other", "gone", &err);
    assert_int_equal(err->kind, VM_ERROR_NOT_FOUND);
}

static void images_are_compared_while_they_are_settled(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    for (unsigned nth = 1; nth < 5; nth += 2) {
        struct between b;
        uint64_t differing = 0;
        make_content(content, CONTENT, nth + 1);
        store_image("a", content);
        memset(content + SIZE - MIB, 1, MIB);
        store_image("b", content);
        repack_without_settling();
        settle_before(&b, "tree.", STORE_READ, nth);
        image_diff(gc, "a", "b", count_difference, &differing, &err);
        assert_ok(err);
        settled(&b);
        assert_int_equal(differing, MIB);
        delete_image("a");
        delete_image("b");
    }
}

static void an_image_is_published_while_it_is_settled(void **state)
{
    static const char *const files[] = {"vm.json", "device.state", "memory.raw"};
    cleanup_error struct vm_error *err = NULL;
    struct template t;
    for (int i = 0; i < 2; i++) {
        make_content(content, CONTENT, (uint64_t)i + 2);
        CLEANUP(image_session) struct image_session *s = image_session_begin(repo, "vm", NULL, &err);
        for (size_t k = 0; k < 3; k++)
            put(s, image_session_file(s, files[k], MIB, &err), 0, content + k * MIB);
        image_session_commit(s, NULL, &err);
        assert_ok(err);
        repack_without_settling();
        struct between b;
        if (i)
            settle_before(&b, "tree.", STORE_READ, 2);
        else
            settle_before(&b, "repository", STORE_UPDATE, 1);
        template_publish(repo_store(gc), "vm", i ? "deb:2" : "deb:1", &t, &err);
        assert_ok(err);
        settled(&b);
        struct scrub_report report;
        repo_scrub(repo, NULL, no_finding, NULL, &report, &err);
        assert_int_equal(report.images, 3);
        assert_int_equal(report.images_touched, 0);
        template_delete(repo_store(repo), i ? "deb:2" : "deb:1", &err);
        delete_image("vm");
    }
}

static void an_image_is_shown_while_it_is_settled(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    struct image_show before, after;
    struct between b;
    /* In the middle of the image, and of the other one, whose records are new then. */
    for (unsigned nth = 3; nth < 12; nth += 8) {
        make_content(content, CONTENT, nth);
        store_image("a", content);
        memcpy(content, content + SIZE, MIB);
        store_image("b", content);
        repack_without_settling();
        settle_before(&b, "tree.", STORE_READ, nth);
        assert_int_equal(image_show(gc, "a", &before, &err), 0);
        settled(&b);
        assert_int_equal(image_show(gc, "a", &after, &err), 0);
        assert_int_equal(before.sizes.data_bytes, after.sizes.data_bytes);
        assert_int_equal(after.n_sharers, 1);
        if (nth == 3) {
            assert_int_equal(before.sizes.stored_bytes, after.sizes.stored_bytes);
            assert_int_equal(before.sizes.shared_bytes, after.sizes.shared_bytes);
        }
        assert_int_equal(before.sizes.unreadable, 0);
        free(before.sharers);
        free(after.sharers);
        delete_image("a");
        delete_image("b");
    }
}

static void delete_b(void)
{
    delete_image("b");
    settle_all();
}

static void an_image_is_shown_though_another_is_gone_or_damaged(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    struct image_show show;
    static struct image other;
    store_image("a", content);
    store_image("b", content + SIZE);
    struct between b = {"tree.", STORE_READ, delete_b, NULL, 9, 0};
    store_fault_set_hook(watched, run_between, &b);
    assert_int_equal(image_show(gc, "a", &show, &err), 0);
    settled(&b);
    assert_int_equal(show.n_sharers + show.sizes.unreadable + show.sizes.estimated, 0);
    store_image("b", content + SIZE);
    catalogue_find(repo_store(repo), "b", &other, &err);
    store_remove(repo_store(repo), STORE_BLOB, tree_name(other.files[0].root.tree), &err);
    assert_ok(err);
    assert_int_equal(image_show(gc, "a", &show, &err), 0);
    assert_int_equal(show.sizes.unreadable, 1);
    assert_true(show.sizes.estimated);
    assert_int_equal(image_show(gc, "b", &show, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_NOT_FOUND);
}

/* Before recipes, footers and records are read. */
static void an_image_is_copied_while_it_is_settled(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    static const struct {
        const char *name;
        unsigned nth;
    } moments[] = {{"tree.", 1}, {"tree.", 3}, {"pack.", 1}, {"pack.", 6}};
    const struct repo_control control = {.cancel_fd = -1};
    char there[512];
    cleanup_free uint8_t *got = malloc(SIZE);
    for (size_t i = 0; i < sizeof(moments) / sizeof(*moments); i++) {
        struct copy_report report;
        struct between b;
        make_content(content, CONTENT, i + 2);
        store_image("a", content);
        repack_without_settling();
        repo_init(test_place(there), NULL, &err);
        CLEANUP(repo) struct repo *to = repo_open(there, &err);
        assert_ok(err);
        settle_before(&b, moments[i].name, STORE_READ, moments[i].nth);
        repo_copy(gc, to, NULL, &control, &report, &err);
        assert_ok(err);
        settled(&b);
        assert_int_equal(get_all(to, "a", got, SIZE, &err), 0);
        assert_memory_equal(got, content, SIZE);
        test_place_remove(there);
        delete_image("a");
    }
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
    cleanup_free uint8_t *half = calloc(1, SIZE);
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
        assert_lease(&lease, half);
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
    /* Of a leaf that it has read. */
    const unsigned pages[] = {7, 2};
    assert_int_equal(file_reader_pages(f, 0, pages, 2, got, &err), 0);
    assert_memory_equal(got, content + 7 * PAGE_BYTES, PAGE_BYTES);
    assert_memory_equal(got + PAGE_BYTES, content + 2 * PAGE_BYTES, PAGE_BYTES);
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

/* ---- forwardings beside packs that stay ---- */

static int check_targets(const struct forwarding *f, void *arg, struct vm_error **err)
{
    for (size_t i = 0; i < f->n; i++) {
        struct store_op size = {.kind = STORE_SIZE, .area = STORE_PACK,
                                .name = pack_name(f->runs[i].to.pack)};
        assert_int_equal(store_run(repo_store(repo), &size, 1, err), 0);
        *(unsigned *)arg += size.result != STORE_DONE;
    }
    return 0;
}

/* Runs of forwardings that lead to packs that are gone. */
static unsigned lost_runs(void)
{
    unsigned n = 0;
    assert_int_equal(forwarding_list(repo_store(repo), check_targets, &n, NULL), 0);
    return n;
}

static int least_pack(const char *name, void *arg, struct vm_error **err)
{
    char *least = arg;
    if (!*least || strcmp(name, least) < 0)
        strcpy(least, name);
    return 0;
}

/* One bit of the first record of the first pack. */
static void damage_first_pack(void)
{
    cleanup_error struct vm_error *err = NULL;
    char name[STORE_NAME_MAX + 1] = "";
    cleanup_buffer struct buffer pack = {0};
    struct store *s = repo_store(repo);
    store_list(s, STORE_PACK, PACK_PREFIX, least_pack, name, &err);
    store_read_all(s, STORE_PACK, name, 64 * MIB, &pack, &err);
    assert_ok(err);
    pack.data[2000] ^= 16;
    store_remove(s, STORE_PACK, name, &err);
    store_create(s, STORE_PACK, name, pack.data, pack.len, &err);
    assert_ok(err);
}

/* n MiB; the first one alone, whose pack is then known when the others are looked up. */
static void put_content(struct image_session *s, struct image_file *f, unsigned n)
{
    for (unsigned i = 0; i < n; i++) {
        put(s, f, i, content);
        if (!i || i == n - 1)
            wait_pages(s, (i + 1) * MIB / PAGE_BYTES);
    }
    memset(content + n * MIB, 0, SIZE - n * MIB);
}

/* Of an image that is committed with `content`: it stays whole, whatever is collected. */
static void commit_and_collect(struct image_session *s, const char *name)
{
    cleanup_error struct vm_error *err = NULL;
    image_session_commit(s, NULL, &err);
    assert_ok(err);
    assert_image(name, content);
    for (int i = 0; i < 4; i++) {
        collect(i < 2 ? &plain : &recompress);
        assert_image(name, content);
    }
}

/*
 * A pack with a damaged record stays when the others are moved. A writer shares it; the images that
 * needed what was moved go.
 */
static void a_writer_shares_what_a_damaged_record_keeps(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    CLEANUP(image_session) struct image_session *s = NULL;
    struct scrub_report found;
    store_image("a", content);
    put_all(repo, "c", NULL, content, 64 << 10, NULL, &err); /* leads to the damaged pack alone */
    damage_first_pack();
    repo_scrub(repo, NULL, no_finding, NULL, &found, &err);
    assert_ok(err);
    assert_int_equal(found.images_touched, 2);
    struct repo_stat before = stat_of();
    struct collect_report report = collect(&recompress);
    assert_true(report.repacked < before.packs && forwardings() > report.repacked);
    struct image_file *f = begin(&s, "n", "c");
    put_content(s, f, 4);
    delete_image("a");
    delete_image("c");
    assert_true(collect(&plain).condemned > 0);
    assert_int_equal(lost_runs(), 0);
    commit_and_collect(s, "n");
}

static void rescue_all(void)
{
    CLEANUP(image_session) struct image_session *s = image_session_begin(repo, "x", "mixed", NULL);
    assert_non_null(s);
}

/* Before the first claim of something that was repacked: its forwarding is there. */
static store_fault_between_fn *before_claim(const struct store_op *op, void *arg)
{
    bool *done = arg;
    if (*done || op->kind != STORE_UPDATE || strncmp(op->name, "condemned.", 10) != 0 ||
        !op->n_sets || op->sets->len != 1 || *(const char *)op->sets->value != 'd')
        return NULL;
    *done = true;
    return rescue_all;
}

/* Half of each pack is forwarded, and the packs are there: a child had begun. They are leased. */
static void forward_packs_that_stay(struct lease *lease)
{
    cleanup_error struct vm_error *err = NULL;
    bool done = false;
    store_half_dead();
    catalogue_lease(repo_store(repo), "mixed", "web1", lease, &err);
    assert_ok(err);
    store_fault_set_hook(watched, before_claim, &done);
    struct collect_report report = collect(&repack);
    store_fault_set_hook(watched, NULL, NULL);
    assert_true(done);
    assert_int_equal(report.repacked, 0);
    assert_true(forwardings() > 0);
}

/* The same, and the image names the new places. */
static void leave_forwarded_packs(struct lease *lease)
{
    forward_packs_that_stay(lease);
    collect(&plain);
    assert_mixed();
}

static void a_writer_shares_what_was_forwarded_and_stayed(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    static struct lease lease;
    CLEANUP(image_session) struct image_session *s = NULL;
    leave_forwarded_packs(&lease);
    struct image_file *f = begin(&s, "n", NULL);
    put_content(s, f, 6);
    catalogue_lease_drop(repo_store(repo), &lease, &err);
    assert_ok(err);
    delete_image("mixed");
    assert_true(collect(&plain).condemned > 0);
    assert_int_equal(lost_runs(), 0);
    commit_and_collect(s, "n");
}

static int remove_targets(const struct forwarding *f, void *arg, struct vm_error **err)
{
    for (size_t i = 0; i < f->n; i++)
        store_remove(repo_store(repo), STORE_PACK, pack_name(f->runs[i].to.pack), err);
    return 0;
}

/* However it came about: what a forwarding names must be there before anybody relies on it. */
static void a_forwarding_to_nowhere_is_not_followed(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    static struct lease lease;
    CLEANUP(image_session) struct image_session *s = NULL;
    leave_forwarded_packs(&lease);
    struct image_file *f = begin(&s, "n", NULL);
    put_content(s, f, 6);
    catalogue_lease_drop(repo_store(repo), &lease, &err);
    delete_image("mixed");
    forwarding_list(repo_store(repo), remove_targets, NULL, &err);
    assert_ok(err);
    assert_true(lost_runs() > 0);
    struct scrub_report found;
    repo_scrub(repo, NULL, no_finding, NULL, &found, &err);
    assert_ok(err);
    assert_int_equal(found.forwardings, forwardings());
    assert_int_equal(found.damaged, 0);
    commit_and_collect(s, "n");
    assert_int_equal(lost_runs(), 0);
    assert_clean();
}

static int first_target(const struct forwarding *f, void *arg, struct vm_error **err)
{
    *(struct recipe_page *)arg = f->runs[0].to;
    return 0;
}

/* What one forwarding leads to is damaged, and known to be. */
static struct scrub_report damage_a_target(void)
{
    cleanup_error struct vm_error *err = NULL;
    cleanup_buffer struct buffer pack = {0};
    struct store *s = repo_store(repo);
    struct recipe_page to;
    struct scrub_report found;
    forwarding_list(s, first_target, &to, &err);
    store_read_all(s, STORE_PACK, pack_name(to.pack), 64 * MIB, &pack, &err);
    assert_ok(err);
    pack.data[to.offset + 40] ^= 1;
    test_overwrite(s, STORE_PACK, pack_name(to.pack), pack.data, pack.len);
    repo_scrub(repo, NULL, no_finding, NULL, &found, &err);
    assert_ok(err);
    assert_int_equal(found.damaged, 1);
    return found;
}

static void recipes_are_not_moved_to_what_is_quarantined(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    static struct lease lease;
    forward_packs_that_stay(&lease);
    assert_int_equal(damage_a_target().images_touched, 0);
    catalogue_lease_drop(repo_store(repo), &lease, &err);
    assert_ok(err);
    for (int i = 0; i < 4; i++) {
        collect(i < 2 ? &plain : &recompress);
        assert_mixed();
    }
}

static void packs_are_not_dropped_for_what_is_quarantined(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    static struct lease lease;
    cleanup_free uint8_t *want = malloc(SIZE);
    leave_forwarded_packs(&lease);
    get_all(repo, "mixed", want, SIZE, &err);
    assert_ok(err);
    assert_int_equal(damage_a_target().images_touched, 1); /* the lease has the old places */
    for (int i = 0; i < 3; i++) {
        collect(&recompress);
        assert_lease(&lease, want);
    }
}

/* ---- beside a repacking that does not come to its end ---- */

static void a_child_of_what_is_being_repacked_is_written(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    struct collect_report report;
    store_image("a", content);
    store_fault_arm(watched, "remove.pack=error@*", &err); /* the collector dies there */
    assert_int_equal(repo_collect(gc, &recompress, &report, &err), -1);
    error_clear(&err);
    store_fault_arm(watched, "", &err);
    for (int i = 0; i < 2; i++) {
        CLEANUP(image_session) struct image_session *s = NULL;
        struct image_file *f = begin(&s, i ? "second" : "first", i ? "first" : "a");
        memcpy(content + i * MIB, content + SIZE + i * MIB, MIB);
        put(s, f, (unsigned)i, content); /* the rest it keeps */
        image_session_commit(s, NULL, &err);
        assert_ok(err);
    }
    delete_image("a");
    assert_image("second", content);
    for (int i = 0; i < 3; i++) {
        assert_int_equal(collect(&recompress).adopted, !i);
        assert_image("second", content);
    }
    assert_clean();
}

static int quarantine_one(const char *name, void *arg, struct vm_error **err)
{
    const uint32_t between_records = PACK_HEADER + 8;
    uint64_t pack = 0;
    assert_true(object_number(PACK_PREFIX, name, &pack));
    return quarantine_set(repo_store(repo), pack, &between_records, 1, err);
}

/* The packs are gone, but what is known of them is not: there is nothing to repack. */
static void a_collector_that_dies_behind_a_removal_leaves_no_list_open(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    cleanup_free uint8_t *want = malloc(SIZE);
    static struct lease lease;
    struct collect_report report;
    struct condemned_state now;
    store_half_dead();
    get_all(repo, "mixed", want, SIZE, &err);
    catalogue_lease(repo_store(repo), "mixed", "web1", &lease, &err);
    store_list(repo_store(repo), STORE_PACK, PACK_PREFIX, quarantine_one, NULL, &err);
    assert_ok(err);
    store_fault_arm(watched, "update.quarantine=error", &err);
    assert_int_equal(repo_collect(gc, &repack, &report, &err), -1);
    error_clear(&err);
    store_fault_arm(watched, "", &err);
    condemned_read_state(repo_store(repo), &now, &err);
    assert_ok(err);
    assert_true(now.is_open);
    assert_true(collect(&repack).adopted);
    condemned_read_state(repo_store(repo), &now, &err);
    assert_ok(err);
    assert_false(now.is_open);
    assert_lease(&lease, want);
}

static void a_forwarding_to_too_many_packs_is_not_set(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    static struct forward_run runs[FORWARD_PACKS_MAX + 1];
    const struct forwarding f = {.pack = 0x700001, .runs = runs, .n = FORWARD_PACKS_MAX + 1};
    bool set = true;
    for (unsigned i = 0; i < f.n; i++)
        runs[i] = (struct forward_run){PACK_HEADER + 64 * i, 0, 1,
                                       {.pack = 0x800000 + i, .offset = PACK_HEADER, .len = 64}};
    assert_int_equal(forwarding_commit(repo_store(repo), &f, &set, &err), 0);
    assert_ok(err);
    assert_false(set);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_forwarding_is_read_as_it_was_written),
        cmocka_unit_test(a_forwarding_to_where_no_record_can_be_makes_no_sense),
        cmocka_unit_test_setup_teardown(what_is_alive_moves_and_stays_readable, setup, teardown),
        cmocka_unit_test_setup_teardown(a_repository_is_compressed_again_once, setup, teardown),
        cmocka_unit_test_setup_teardown(images_are_compared_across_forwardings, setup, teardown),
        cmocka_unit_test_setup_teardown(a_child_begins_while_its_parent_is_settled, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(images_are_compared_while_they_are_settled, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(an_image_is_published_while_it_is_settled, setup, teardown),
        cmocka_unit_test_setup_teardown(an_image_is_shown_while_it_is_settled, setup, teardown),
        cmocka_unit_test_setup_teardown(an_image_is_shown_though_another_is_gone_or_damaged, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(an_image_is_copied_while_it_is_settled, setup, teardown),
        cmocka_unit_test_setup_teardown(a_lease_reads_by_forwarding, setup, teardown),
        cmocka_unit_test_setup_teardown(a_target_is_repacked_again, setup, teardown),
        cmocka_unit_test_setup_teardown(a_reader_without_a_lease_goes_on, setup, teardown),
        cmocka_unit_test_setup_teardown(a_writer_shares_what_a_damaged_record_keeps, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(a_writer_shares_what_was_forwarded_and_stayed, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(a_forwarding_to_nowhere_is_not_followed, setup, teardown),
        cmocka_unit_test_setup_teardown(recipes_are_not_moved_to_what_is_quarantined, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(packs_are_not_dropped_for_what_is_quarantined, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(a_child_of_what_is_being_repacked_is_written, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(a_collector_that_dies_behind_a_removal_leaves_no_list_open,
                                        setup, teardown),
        cmocka_unit_test_setup_teardown(a_forwarding_to_too_many_packs_is_not_set, setup, teardown),
        cmocka_unit_test_setup_teardown(a_full_store_leaves_packs_as_they_are, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

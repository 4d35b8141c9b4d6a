/* SPDX-License-Identifier: Apache-2.0 */
/* Whole images in and out of a repository, over either driver. */
#include "tests/unit/repo/repo_faulty.h"
#include "repo/names.h"

#include <pthread.h>

/* ---- round trips ---- */

static void what_goes_in_comes_out(void **state)
{
    static const size_t sizes[] = {1, 4095, 4096, 65537, 3 * MIB + 5, (size_t)IMAGE_MIB * MIB};
    for (unsigned i = 0; i < 6; i++) {
        char name[16];
        make_content(content, (size_t)IMAGE_MIB * MIB, i + 1);
        snprintf(name, sizeof(name), "image%u", i);
        store_image(name, NULL, content, sizes[i]);
        assert_image(name, content, sizes[i]);
    }
    assert_int_equal(registrations(), 0);
}

static void any_range_can_be_read(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    static uint8_t out[6 * MIB];
    const size_t size = 9 * MIB + 100;
    struct image image;
    uint64_t random = 7;
    make_content(content, size, 1);
    store_image("a", NULL, content, size);
    CLEANUP(file_reader) struct file_reader *r = open_file("a", &image);
    for (int i = 0; i < 60; i++) {
        size_t at = test_random(&random) % size, len = test_random(&random) % sizeof(out);
        len = i % 2 ? len % 5000 : len;
        len = len < size - at ? len : size - at;
        assert_int_equal(file_reader_read(r, at, out, len, &err), 0);
        assert_memory_equal(out, content + at, len);
    }
    assert_int_equal(file_reader_read(r, size - 1, out, 2, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_USAGE);
}

static void zeros_take_no_space(void **state)
{
    memset(content, 0, 16 * MIB);
    struct import_report report = store_image("zeros", NULL, content, 16 * MIB);
    assert_int_equal(report.written.bytes_stored, 0);
    assert_image("zeros", content, 16 * MIB);
    content[9 * MIB] = 1;
    report = store_image("one", NULL, content, 16 * MIB);
    assert_in_range(report.written.bytes_stored, 1, 4000);
    assert_image("one", content, 16 * MIB);

    struct image image;
    uint64_t start, len;
    CLEANUP(file_reader) struct file_reader *r = open_file("one", &image);
    assert_int_equal(file_reader_next_data(r, 0, &start, &len, NULL), 0);
    assert_int_equal(start, 8 * MIB);
    assert_int_equal(len, 4 * MIB);
    assert_int_equal(file_reader_next_data(r, 12 * MIB, &start, &len, NULL), 0);
    assert_int_equal(len, 0);
}

/* ---- deduplication ---- */

static void the_same_again_stores_next_to_nothing(void **state)
{
    const size_t size = (size_t)IMAGE_MIB * MIB;
    make_content(content, size, 1);
    struct import_report first = store_image("a", NULL, content, size);
    struct import_report again = store_image("b", NULL, content, size);
    assert_true(first.written.bytes_stored > size / 4);
    assert_true(again.written.bytes_stored < size / 1000);
    assert_image("b", content, size);
}

static void pages_are_shared_wherever_they_lie(void **state)
{
    const size_t size = 16 * MIB, pages = size / PAGE_BYTES;
    cleanup_free uint8_t *moved = malloc(size);
    make_content(content, size, 1);
    /* As in a guest's page cache: runs of a few pages, anywhere. */
    for (size_t i = 0; i < pages; i++) {
        size_t run = i / 8, from = (run * 7919 % (pages / 8)) * 8 + i % 8;
        memcpy(moved + i * PAGE_BYTES, content + from * PAGE_BYTES, PAGE_BYTES);
    }
    store_image("disk", NULL, content, size);
    struct import_report report = store_image("memory", NULL, moved, size);
    uint64_t data = report.written.pages_shared + report.written.pages_new;
    assert_true(report.written.pages_shared > data * 7 / 10);
    assert_image("memory", moved, size);
}

static void reading_back_is_bounded(void **state)
{
    const size_t size = 8 * MIB, pages = size / PAGE_BYTES;
    cleanup_free uint8_t *moved = malloc(size);
    struct image image;
    make_content(content, size, 1);
    for (size_t i = 0; i < pages; i++) /* the worst case: every page from another record */
        memcpy(moved + i * PAGE_BYTES, content + i * 1237 % pages * PAGE_BYTES, PAGE_BYTES);
    store_image("a", NULL, content, size);
    struct import_report report = store_image("b", NULL, moved, size);
    assert_true(report.written.pages_again > 0);
    CLEANUP(file_reader) struct file_reader *r = open_file("b", &image);
    cleanup_free struct recipe_leaf *leaf = malloc(sizeof(*leaf));
    for (unsigned segment = 0; segment < size / SEGMENT_BYTES; segment++) {
        const unsigned per_leaf = RECIPE_LEAF_PAGES / SEGMENT_PAGES;
        unsigned records = 0, first = segment % per_leaf * SEGMENT_PAGES;
        assert_int_equal(file_reader_leaf(r, segment / per_leaf, leaf, NULL), 0);
        for (unsigned i = first; i < first + SEGMENT_PAGES; i++) {
            bool seen = !leaf->pages[i].len;
            for (unsigned j = first; j < i && !seen; j++)
                seen = leaf->pages[j].pack == leaf->pages[i].pack &&
                       leaf->pages[j].offset == leaf->pages[i].offset;
            records += !seen;
        }
        assert_in_range(records, 1, DEDUP_RECORDS_MAX);
    }
    /* The bound is no reason to store the same again and again. */
    report = store_image("c", NULL, moved, size);
    assert_int_equal(report.written.pages_again, 0);
    assert_image("b", moved, size);
}

/*
 * What a writer finds in one pack is still there when the cache, which holds no more, has let its
 * footer go for that of another: with pages of the other, and a new one, in its midst.
 */
static void a_footer_that_made_room_is_not_asked_any_more(void **state)
{
    enum { PACK_MIB = 4, ROUNDS = 5, SIZE = (ROUNDS + 1) * PACK_MIB * MIB };
    cleanup_error struct vm_error *err = NULL;
    cleanup_free uint8_t *mixed = malloc(SIZE), *other = malloc(PACK_MIB * MIB), *out = malloc(SIZE);
    test_fill_random(mixed, PACK_MIB * MIB, 1);
    test_fill_random(other, PACK_MIB * MIB, 2);
    for (size_t i = 1; i <= ROUNDS; i++)
        memcpy(mixed + i * PACK_MIB * MIB, mixed, PACK_MIB * MIB);
    store_image("one", NULL, mixed, PACK_MIB * MIB);
    store_image("other", NULL, other, PACK_MIB * MIB);
    for (size_t at = (size_t)ROUNDS * PACK_MIB * MIB; at < SIZE; at += MIB) {
        memcpy(mixed + at, other + at % (PACK_MIB * MIB), EXTENT_BYTES);
        test_fill_random(mixed + at + MIB / 2, PAGE_BYTES, at);
    }
    repo_tune(repo, &(struct repo_tuning){.cache_bytes = 75000}); /* for 1638 pages, of 1024 each */
    struct import_report report = store_image("mixed", NULL, mixed, SIZE);
    assert_true(report.written.footers_loaded >= 2);
    get_all(repo, "mixed", out, SIZE, &err);
    assert_ok(err);
    assert_memory_equal(out, mixed, SIZE);
}

/* ---- versions ---- */

static void a_version_writes_what_changed(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    const size_t size = (size_t)IMAGE_MIB * MIB;
    make_content(content, size, 1);
    store_image("monday", NULL, content, size);
    CLEANUP(image_session)
    struct image_session *s = image_session_begin(repo, "tuesday", "monday", &err);
    struct image_file *f = image_session_file(s, "disk0.raw", size, &err);
    assert_ok(err);
    test_fill_random(content + 5 * MIB, 8192, 99);
    struct segment *seg = image_writer_segment(image_session_writer(s), f, 5, &err);
    memcpy(seg->data, content + 5 * MIB, 8192);
    seg->given[0] = seg->given[1] = true;
    image_writer_put(image_session_writer(s), seg);
    struct import_report report;
    image_session_commit(s, &report, &err);
    assert_ok(err);
    assert_int_equal(report.written.pages_new, 2);
    assert_true(report.written.bytes_stored < 8192 + 30000);
    assert_image("tuesday", content, size);
    assert_int_equal(registrations(), 0);
}

static void segments_come_in_any_order_and_the_last_counts(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    /* More leaves than are kept open, so that some are read back. */
    enum { SIZE = 100 * MIB, SEGMENTS = SIZE / SEGMENT_BYTES };
    cleanup_free uint8_t *big = malloc(SIZE);
    make_content(big, SIZE, 3);
    CLEANUP(image_session) struct image_session *s = image_session_begin(repo, "a", NULL, &err);
    struct image_file *f = image_session_file(s, "disk0.raw", SIZE, &err);
    static uint8_t wrong[SEGMENT_BYTES];
    memset(wrong, 1, sizeof(wrong));
    for (unsigned i = 0; i < SEGMENTS; i += 3)
        put_segment(s, f, i, wrong, SEGMENT_BYTES);
    for (unsigned i = 0; i < SEGMENTS; i++)
        put_segment(s, f, i * 37 % SEGMENTS, big + i * 37ul % SEGMENTS * SEGMENT_BYTES,
                    SEGMENT_BYTES);
    image_session_commit(s, NULL, &err);
    assert_ok(err);
    assert_image("a", big, SIZE);
}

static void a_version_may_be_larger(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    const uint64_t small = 3 * MIB, large = (2048ull + 8) * MIB; /* another depth of the tree */
    make_content(content, small, 1);
    store_image("a", NULL, content, small);
    CLEANUP(image_session) struct image_session *s = image_session_begin(repo, "b", "a", &err);
    struct image_file *f = image_session_file(s, "disk0.raw", large, &err);
    assert_ok(err);
    put_segment(s, f, large / MIB - 1, content + 4096, 1000);
    image_session_commit(s, NULL, &err);
    assert_ok(err);
    static uint8_t out[4 * MIB], zeros[4096];
    struct image image;
    CLEANUP(file_reader) struct file_reader *r = open_file("b", &image);
    assert_int_equal(file_reader_read(r, 0, out, 4 * MIB, &err), 0);
    assert_memory_equal(out, content, small);
    assert_memory_equal(out + small, zeros, sizeof(zeros));
    assert_int_equal(file_reader_read(r, large - MIB, out, 4096, &err), 0);
    assert_memory_equal(out, content + 4096, 1000);
    assert_memory_equal(out + 1000, zeros, 3000);
}

/* ---- names ---- */

static void a_name_is_taken_once(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    make_content(content, MIB, 1);
    store_image("a", NULL, content, MIB);
    assert_int_equal(put_all(repo, "a", NULL, content, MIB, NULL, &err), -1);
    assert_string_equal(error_message(err), "there is an image a already");
    assert_int_equal(err->kind, VM_ERROR_CONFLICT);
    assert_int_equal(catalogue_delete(repo_store(repo), "a", NULL), 0);
    assert_false(image_exists("a"));
    error_clear(&err);
    assert_int_equal(catalogue_delete(repo_store(repo), "a", &err), -1);
    assert_int_equal(err->kind, VM_ERROR_NOT_FOUND);
    store_image("a", NULL, content, MIB);
}

static void of_two_writers_of_a_name_one_wins(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    make_content(content, MIB, 1);
    CLEANUP(image_session) struct image_session *s = image_session_begin(repo, "a", NULL, &err);
    struct image_file *f = image_session_file(s, "disk0.raw", 2 * MIB, &err);
    put_segment(s, f, 0, content, MIB);
    store_image("a", NULL, content, MIB);
    assert_int_equal(image_session_commit(s, NULL, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_CONFLICT);
    assert_image("a", content, MIB);
}

static void names_are_checked(void **state)
{
    static const char *const bad[] = {"", "/", "a/", "/a", "a//b", ".a", "-a", "a/.b", "a b", "a\n",
                                      "\xc3\xa4"};
    static const char *const good[] = {"a", "web1@nightly", "debian12:v3", "team/a.b_c-d+e"};
    for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); i++) {
        cleanup_error struct vm_error *err = NULL;
        assert_null(image_session_begin(repo, bad[i], NULL, &err));
        assert_int_equal(err->kind, VM_ERROR_USAGE);
    }
    for (size_t i = 0; i < sizeof(good) / sizeof(*good); i++)
        assert_int_equal(image_name_check(good[i], NULL), 0);
}

static int note_name(const struct image *image, void *arg, struct vm_error **err)
{
    strcat(strcat(arg, image->name), " ");
    return 0;
}

static void a_list_shows_every_image(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    char names[256] = "";
    make_content(content, MIB, 1);
    store_image("one", NULL, content, MIB);
    store_image("two", "one", content, MIB);
    catalogue_list(repo_store(repo), note_name, NULL, names, &err);
    assert_ok(err);
    assert_true(!strcmp(names, "one two ") || !strcmp(names, "two one "));
    assert_int_equal(registrations(), 0);
}

/* ---- many at once ---- */

struct writer {
    char name[16];
    const uint8_t *from;
    struct repo *repo;
    bool done;
};

enum { WRITERS = 4, WRITER_BYTES = 8 * MIB };

static void *write_image(void *arg)
{
    struct writer *w = arg;
    w->done = put_all(w->repo, w->name, NULL, w->from, WRITER_BYTES, NULL, NULL) == 0;
    return NULL;
}

static void writers_at_once_share_one_repository(void **state)
{
    struct writer writers[WRITERS];
    pthread_t threads[WRITERS];
    struct vm_error *err = NULL;
    make_content(content, (size_t)IMAGE_MIB * MIB, 1);
    for (int i = 0; i < WRITERS; i++) {
        writers[i] = (struct writer){.from = content + i * 4 * MIB, .repo = repo_open(place, &err)};
        assert_ok(err);
        snprintf(writers[i].name, sizeof(writers[i].name), "image%d", i);
        pthread_create(&threads[i], NULL, write_image, &writers[i]);
    }
    for (int i = 0; i < WRITERS; i++) {
        pthread_join(threads[i], NULL);
        assert_true(writers[i].done);
        repo_close(writers[i].repo);
        assert_image(writers[i].name, writers[i].from, WRITER_BYTES);
    }
    assert_int_equal(registrations(), 0);
}

/* ---- comparing ---- */

struct differences {
    struct image_difference seen[8];
    unsigned n;
};

static int note_difference(const struct image_difference *d, void *arg, struct vm_error **err)
{
    struct differences *all = arg;
    assert_true(all->n < 8);
    all->seen[all->n++] = *d;
    return 0;
}

static void differences_are_found_by_identity(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    struct differences d = {.n = 0};
    make_content(content, 12 * MIB, 1);
    store_image("a", NULL, content, 12 * MIB);
    test_fill_random(content + 6 * MIB, 8192, 7);
    test_fill_random(content + 11 * MIB + 4096 * 3, 10, 8);
    memset(content + 12 * MIB, 0, 100); /* as what lies behind the end of "a" */
    store_image("b", NULL, content, 12 * MIB + 100);
    image_diff(repo, "a", "b", note_difference, &d, &err);
    assert_ok(err);
    assert_int_equal(d.n, 2);
    assert_int_equal(d.seen[0].offset, 6 * MIB);
    assert_int_equal(d.seen[0].len, 8192);
    assert_int_equal(d.seen[1].offset, 11 * MIB + 4096 * 3);
    assert_int_equal(d.seen[1].len, 4096);
    d.n = 0;
    image_diff(repo, "b", "b", note_difference, &d, &err);
    assert_int_equal(d.n, 0);
    assert_int_equal(image_diff(repo, "b", "none", note_difference, &d, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_NOT_FOUND);
}

static void sizes_tell_what_is_shared_with_whom(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    make_content(content, 12 * MIB, 1);
    store_image("a", NULL, content, 8 * MIB);
    store_image("b", NULL, content + 4 * MIB, 8 * MIB);
    make_content(content, MIB, 77);
    store_image("c", NULL, content, MIB);
    struct image_show show;
    image_show(repo, "a", &show, &err);
    assert_ok(err);
    assert_int_equal(show.sizes.virtual_bytes, 8 * MIB);
    assert_false(show.sizes.estimated);
    assert_int_equal(show.n_sharers, 1);
    assert_string_equal(show.sharers[0].name, "b");
    assert_int_equal(show.sharers[0].bytes, show.sizes.shared_bytes);
    assert_int_equal(show.sizes.unique_bytes + show.sizes.shared_bytes, show.sizes.stored_bytes);
    assert_true(show.sizes.shared_bytes > show.sizes.stored_bytes * 4 / 10 &&
                show.sizes.shared_bytes < show.sizes.stored_bytes * 6 / 10);
    free(show.sharers);
}

/* ---- opening ---- */

static void a_repository_is_made_once(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    assert_int_equal(repo_init(place, NULL, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_CONFLICT);
    assert_non_null(strstr(error_message(err), "there is a repository already"));
}

static void another_format_is_refused(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    struct store_pair set = {"format", "2", 1};
    struct store_op op = {.kind = STORE_UPDATE, .area = STORE_MAP, .name = REPOSITORY_MAP,
                          .sets = &set, .n_sets = 1};
    store_run(repo_store(repo), &op, 1, &err);
    assert_ok(err);
    assert_null(repo_open(place, &err));
    assert_int_equal(err->kind, VM_ERROR_VERSION);
}

static void a_place_without_repository_is_told(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    char empty[512];
    store_close(test_store_open(test_place(empty)));
    assert_null(repo_open(empty, &err));
    assert_int_equal(err->kind, VM_ERROR_NOT_FOUND);
    assert_non_null(strstr(error_message(err), "vmmig repo init"));
    test_place_remove(empty);
    error_clear(&err);
    assert_null(repo_open("dir:/nowhere/at/all", &err));
    assert_int_equal(err->kind, VM_ERROR_NOT_FOUND);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(what_goes_in_comes_out),
        TEST(any_range_can_be_read),
        TEST(zeros_take_no_space),
        TEST(the_same_again_stores_next_to_nothing),
        TEST(pages_are_shared_wherever_they_lie),
        TEST(reading_back_is_bounded),
        TEST(a_footer_that_made_room_is_not_asked_any_more),
        TEST(a_version_writes_what_changed),
        TEST(segments_come_in_any_order_and_the_last_counts),
        TEST(a_version_may_be_larger),
        TEST(a_name_is_taken_once),
        TEST(of_two_writers_of_a_name_one_wins),
        TEST(names_are_checked),
        TEST(a_list_shows_every_image),
        TEST(writers_at_once_share_one_repository),
        TEST(differences_are_found_by_identity),
        TEST(sizes_tell_what_is_shared_with_whom),
        TEST(a_repository_is_made_once),
        TEST(another_format_is_refused),
        TEST(a_place_without_repository_is_told),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

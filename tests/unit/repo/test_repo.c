/* SPDX-License-Identifier: Apache-2.0 */
/* Whole images in and out of a repository, over either driver, with failures on the way. */
#include "tests/unit/repo/repo_images.h"
#include "repo/names.h"
#include "repo/scrub.h"
#include "repo/store_fault.h"

#include "base/io.h"

#include <pthread.h>

enum { IMAGE_MIB = 24 };

static struct repo *repo;
static struct store *faulty;
static char place[512];
static uint8_t *content; /* IMAGE_MIB */

static void open_repo(void)
{
    struct vm_error *err = NULL;
    faulty = store_fault_create(test_store_open(place), &err);
    assert_ok(err);
    repo = repo_open_store(faulty, &err);
    assert_ok(err);
}

static int setup(void **state)
{
    struct vm_error *err = NULL;
    repo_init(test_place(place), NULL, &err);
    assert_ok(err);
    open_repo();
    content = malloc((size_t)IMAGE_MIB * MIB);
    return 0;
}

static int teardown(void **state)
{
    free(content);
    repo_close(repo);
    test_place_remove(place);
    return 0;
}

static void arm(const char *spec)
{
    cleanup_error struct vm_error *err = NULL;
    store_fault_arm(faulty, spec, &err);
    assert_ok(err);
}

static void put_segment(struct image_session *s, struct image_file *f, uint64_t number,
                        const uint8_t *from, size_t len)
{
    struct vm_error *err = NULL;
    struct segment *seg = image_writer_segment(image_session_writer(s), f, number, &err);
    assert_ok(err);
    memset(seg->data, 0, SEGMENT_BYTES);
    memcpy(seg->data, from, len);
    for (size_t i = 0; i * PAGE_BYTES < len; i++)
        seg->given[i] = true;
    image_writer_put(image_session_writer(s), seg);
}

static struct import_report store_image(const char *name, const char *parent, const uint8_t *from,
                                        size_t size)
{
    cleanup_error struct vm_error *err = NULL;
    struct import_report report = {0};
    put_all(repo, name, parent, from, size, &report, &err);
    assert_ok(err);
    return report;
}

static struct file_reader *open_file(const char *name, struct image *image)
{
    struct vm_error *err = NULL;
    catalogue_find(repo_store(repo), name, image, &err);
    assert_ok(err);
    struct file_reader *r = file_reader_create(repo_store(repo), &image->files[0].root,
                                               image->files[0].size, &err);
    assert_ok(err);
    return r;
}

static int read_image(const char *name, uint8_t *out, size_t size, struct vm_error **err)
{
    struct image image;
    CLEANUP(file_reader) struct file_reader *r = open_file(name, &image);
    assert_int_equal(file_reader_size(r), size);
    return file_reader_read(r, 0, out, size, err);
}

static void assert_image(const char *name, const uint8_t *want, size_t size)
{
    cleanup_error struct vm_error *err = NULL;
    cleanup_free uint8_t *got = malloc(size);
    memset(got, 0xaa, size);
    read_image(name, got, size, &err);
    assert_ok(err);
    assert_memory_equal(got, want, size);
}

static bool image_exists(const char *name)
{
    struct image image;
    return catalogue_find(repo_store(repo), name, &image, NULL) == 0;
}

static int count_pair(const struct store_pair *pair, void *arg, struct vm_error **err)
{
    (*(unsigned *)arg)++;
    return 0;
}

static unsigned registrations(void)
{
    unsigned n = 0;
    for (unsigned i = 0; i < CATALOGUE_SHARDS; i++) {
        char name[16];
        snprintf(name, sizeof(name), "cat.%02x", i);
        assert_int_equal(store_scan(repo_store(repo), name, "w:", count_pair, &n, NULL),
                         STORE_DONE);
    }
    return n;
}

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
    catalogue_list(repo_store(repo), note_name, names, &err);
    assert_ok(err);
    assert_true(!strcmp(names, "one two ") || !strcmp(names, "two one "));
    assert_int_equal(registrations(), 0);
}

/* ---- failures ---- */

static void a_failed_write_leaves_nothing_visible(void **state)
{
    static const struct {
        const char *fault;
        enum vm_error_kind kind;
    } cases[] = {
        {"create.pack=error:ENOSPC@1", VM_ERROR_NO_SPACE},
        {"create.pack=error:EIO@2", VM_ERROR_SYSTEM},
        {"create.pack=unknown@2", VM_ERROR_TIMEOUT},
        {"create.tree=error:ENOSPC", VM_ERROR_NO_SPACE},
        {"update.index=error:ENOSPC@5", VM_ERROR_NO_SPACE},
        {"get.index=error", VM_ERROR_SYSTEM},
        {"update.cat=error:ENOSPC@1", VM_ERROR_NO_SPACE}, /* registering */
        {"update.cat=error:ENOSPC@2", VM_ERROR_NO_SPACE}, /* committing */
        {"update.repository=error", VM_ERROR_SYSTEM},
    };
    const size_t size = (size_t)IMAGE_MIB * MIB;
    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
        cleanup_error struct vm_error *err = NULL;
        make_content(content, size, i + 1); /* else it would share with the former's garbage */
        arm(cases[i].fault);
        assert_int_equal(put_all(repo, "a", NULL, content, size, NULL, &err), -1);
        assert_int_equal(err->kind, cases[i].kind);
        arm("");
        assert_false(image_exists("a"));
        assert_int_equal(registrations(), 0);
    }
    store_image("a", NULL, content, size);
    assert_image("a", content, size);
}

static void found_nothing(enum scrub_kind kind, const char *what, void *arg)
{
    fail_msg("a scrub finds %s", what);
}

static void what_may_only_be_read_is_scrubbed(void **state)
{
    static const char *const cases[] = {"update.scrub=error:EACCES@*", "update.scrub=error:ENOSPC@*"};
    make_content(content, MIB, 1);
    store_image("a", NULL, content, MIB);
    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
        cleanup_error struct vm_error *err = NULL;
        struct scrub_report report;
        arm(cases[i]);
        assert_int_equal(repo_scrub(repo, NULL, found_nothing, NULL, &report, &err), 0);
        assert_ok(err);
        assert_true(report.packs > 0 && !report.damaged);
        arm("");
    }
}

static void a_commit_whose_answer_is_lost_is_read_back(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    make_content(content, MIB, 1);
    arm("update.cat=unknown@2");
    assert_int_equal(put_all(repo, "a", NULL, content, MIB, NULL, &err), 0);
    assert_ok(err);
    assert_true(image_exists("a"));
    assert_int_equal(registrations(), 0);
    /* Not committed, and not to be found out either: said so. */
    arm("update.cat=error:ETIMEDOUT@2, update.cat=error@3");
    assert_int_equal(put_all(repo, "b", NULL, content, MIB, NULL, &err), -1);
    assert_non_null(strstr(error_message(err), "image b may or may not be committed"));
    assert_int_equal(err->kind, VM_ERROR_TIMEOUT);
}

static void what_is_given_up_leaves_no_registration(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    make_content(content, 8 * MIB, 1);
    store_image("parent", NULL, content, MIB);
    struct image_session *s = image_session_begin(repo, "a", "parent", &err);
    assert_ok(err);
    assert_in_range(registrations(), 1, 2);
    struct image_file *f = image_session_file(s, "disk0.raw", 8 * MIB, &err);
    for (unsigned i = 0; i < 8; i++)
        put_segment(s, f, i, content + i * MIB, MIB);
    image_session_end(s);
    assert_int_equal(registrations(), 0);
    assert_false(image_exists("a"));
}

/* ---- damage ---- */

static int take_first(const char *name, void *arg, struct vm_error **err)
{
    strcpy(arg, name);
    return error_set(err, VM_ERROR_FAILED, "enough");
}

enum damage { FLIP, CUT, LOSE };

static void damage(enum store_area area, const char *prefix, enum damage how, size_t at)
{
    struct store *s = repo_store(repo);
    char name[STORE_NAME_MAX + 1];
    cleanup_error struct vm_error *err = NULL;
    cleanup_buffer struct buffer b = {0};
    assert_int_equal(store_list(s, area, prefix, take_first, name, NULL), -1);
    assert_int_equal(store_read_all(s, area, name, 64 * MIB, &b, &err), STORE_DONE);
    if (how == FLIP)
        b.data[at] ^= 1;
    if (how == LOSE)
        store_remove(s, area, name, &err);
    else
        test_overwrite(s, area, name, b.data, how == CUT ? at : b.len);
    assert_ok(err);
}

static void damage_is_named_and_never_returned(void **state)
{
    static const struct {
        enum store_area area;
        const char *prefix;
        enum damage how;
        size_t at;
        const char *says;
    } cases[] = {
        {STORE_PACK, "pack.", FLIP, 5000, "its checksum is wrong"},
        {STORE_PACK, "pack.", CUT, 5000, "it ends too early"},
        {STORE_PACK, "pack.", CUT, 40, "it ends within its header"},
        {STORE_PACK, "pack.", LOSE, 0, "is gone"},
        {STORE_BLOB, "tree.", FLIP, 100, "its checksum is wrong"},
        {STORE_BLOB, "tree.", CUT, 100, "it ends too early"},
        {STORE_BLOB, "tree.", LOSE, 0, "is gone"},
    };
    const size_t size = 3 * MIB;
    cleanup_free uint8_t *out = malloc(size);
    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
        cleanup_error struct vm_error *err = NULL;
        teardown(NULL);
        setup(NULL);
        make_content(content, size, 1);
        store_image("a", NULL, content, size);
        damage(cases[i].area, cases[i].prefix, cases[i].how, cases[i].at);
        assert_int_equal(read_image("a", out, size, &err), -1);
        assert_non_null(strstr(error_message(err), cases[i].says));
        /*
         * The index still names what is lost: storing the same content again does not rely on it.
         */
        if (cases[i].how != FLIP) {
            store_image("again", NULL, content, size);
            assert_image("again", content, size);
        }
    }
}

struct findings {
    char text[2048];
};

static void note_finding(enum scrub_kind kind, const char *what, void *arg)
{
    struct findings *f = arg;
    size_t n = strlen(f->text);
    snprintf(f->text + n, sizeof(f->text) - n, "%s%s\n", kind == SCRUB_IMAGE ? "image " : "", what);
}

static struct scrub_report scrub(struct findings *f)
{
    cleanup_error struct vm_error *err = NULL;
    struct scrub_report report;
    f->text[0] = 0;
    repo_scrub(repo, NULL, note_finding, f, &report, &err);
    assert_ok(err);
    return report;
}

static void a_scrub_of_a_sound_repository_finds_nothing(void **state)
{
    struct findings f;
    make_content(content, 12 * MIB, 1);
    store_image("a", NULL, content, 12 * MIB);
    store_image("b", "a", content, 8 * MIB);
    struct scrub_report report = scrub(&f);
    assert_string_equal(f.text, "");
    assert_int_equal(report.images, 2);
    assert_true(report.packs > 0 && report.records > 100 && report.pages > 2000);
    assert_int_equal(report.damaged + report.images_touched, 0);
}

static void a_scrub_names_damage_and_the_images_it_touches(void **state)
{
    static const struct {
        enum store_area area;
        const char *prefix;
        enum damage how;
        size_t at;
        const char *says;
    } cases[] = {
        {STORE_PACK, "pack.", FLIP, 5000, "its checksum is wrong\n"},
        {STORE_PACK, "pack.", FLIP, 20, "its header is not that of this pack"},
        {STORE_PACK, "pack.", CUT, 5000, "it does not end as a pack does\n"},
        {STORE_PACK, "pack.", CUT, 0, "it is too short\n"},
        {STORE_PACK, "pack.", LOSE, 0, "which images need, is gone\n"},
        {STORE_BLOB, "tree.", FLIP, 100, "its checksum is wrong\n"},
        {STORE_BLOB, "tree.", LOSE, 0, "is gone\n"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
        struct findings f;
        teardown(NULL);
        setup(NULL);
        make_content(content, 3 * MIB, 1);
        store_image("a", NULL, content, 3 * MIB);
        damage(cases[i].area, cases[i].prefix, cases[i].how, cases[i].at);
        store_image("c", NULL, (const uint8_t *)"other", 5);
        struct scrub_report report = scrub(&f);
        assert_non_null(strstr(f.text, cases[i].says));
        assert_non_null(strstr(f.text, "image a\n"));
        assert_null(strstr(f.text, "image c\n"));
        assert_int_equal(report.images_touched, 1);
        assert_true(report.damaged >= 1);
    }
}

static void every_image_that_shares_a_damaged_node_is_named(void **state)
{
    struct findings f;
    make_content(content, 9 * MIB, 1);
    store_image("a", NULL, content, 9 * MIB);
    store_image("b", NULL, content, 9 * MIB); /* the same nodes */
    damage(STORE_PACK, "pack.", FLIP, 5000);
    struct scrub_report report = scrub(&f);
    assert_int_equal(report.images_touched, 2);
    assert_int_equal(report.damaged, 1);
    assert_non_null(strstr(f.text, "image a\n"));
    assert_non_null(strstr(f.text, "image b\n"));
}

static void what_a_lease_alone_keeps_is_named(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    static struct lease lease, other;
    struct findings f;
    make_content(content, 3 * MIB, 1);
    store_image("a", NULL, content, 3 * MIB);
    catalogue_lease(repo_store(repo), "a", "web1", &lease, &err);
    assert_ok(err);
    damage(STORE_PACK, "pack.", FLIP, 5000);
    assert_int_equal(scrub(&f).images_touched, 1); /* the image's own name tells */
    assert_null(strstr(f.text, "leased"));
    catalogue_delete(repo_store(repo), "a", &err);
    assert_ok(err);
    assert_int_equal(scrub(&f).images_touched, 1);
    assert_non_null(strstr(f.text, "image a, as leased by web1\n"));
    store_image("b", NULL, (const uint8_t *)"other", 5);
    catalogue_lease(repo_store(repo), "b", "web2", &other, &err);
    catalogue_lease_drop(repo_store(repo), &lease, &err);
    assert_ok(err);
    assert_int_equal(scrub(&f).images_touched, 0);
}

static void the_index_is_made_anew_from_what_is_there(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    const size_t size = 16 * MIB;
    struct rebuild_report report;
    make_content(content, size, 1);
    store_image("a", NULL, content, size);
    for (unsigned i = 0; i < INDEX_SHARDS_FIRST; i++) {
        char name[OBJECT_NAME_SIZE];
        snprintf(name, sizeof(name), "index.%06x", i);
        assert_int_equal(store_remove(repo_store(repo), STORE_MAP, name, &err), STORE_DONE);
    }
    repo_rebuild_index(repo, NULL, &report, &err);
    assert_ok(err);
    assert_true(report.packs > 0 && report.entries > size / EXTENT_BYTES);
    assert_int_equal(report.unreadable, 0);
    struct import_report again = store_image("b", NULL, content, size);
    assert_true(again.written.bytes_stored < size / 1000);
    assert_true(again.written.nodes_shared > 0);
}

static void a_pack_under_anothers_name_is_damage(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    cleanup_buffer struct buffer b = {0};
    struct store *s = repo_store(repo);
    make_content(content, 2 * MIB, 1);
    store_image("a", NULL, content, MIB);
    store_image("b", NULL, content + MIB, MIB);
    uint64_t first = 1 << NUMBER_COUNT_BITS | 1, second = 2 << NUMBER_COUNT_BITS | 1;
    assert_int_equal(store_read_all(s, STORE_PACK, pack_name(second), 64 * MIB, &b, &err),
                     STORE_DONE);
    test_overwrite(s, STORE_PACK, pack_name(first), b.data, b.len);
    cleanup_free uint8_t *out = malloc(MIB);
    assert_int_equal(read_image("a", out, MIB, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_CORRUPT);
    assert_image("b", content + MIB, MIB);
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

/* Whatever the index says of trees that this very writer is filling. */
static void a_node_is_not_where_the_index_says(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    cleanup_object_set struct object_set condemned = {{0}, {0}}, shared = {{0}, {0}};
    const uint64_t writer = 77, tree = writer << NUMBER_COUNT_BITS | 1;
    static uint8_t nodes[2][4000];
    const struct recipe_ref lies[] = {{tree, 0x7ffffff0, sizeof(nodes[1]), 1},
                                      {tree, 0xfffffff8, sizeof(nodes[1]), 1},
                                      {tree, TREE_HEADER + sizeof(nodes[0]), sizeof(nodes[1]), 1},
                                      {tree, TREE_HEADER, sizeof(nodes[1]), 1}};
    struct page_hasher h;
    page_hasher_init(&h, &err);
    memset(nodes, 1, sizeof(nodes));
    for (unsigned i = 0; i < sizeof(lies) / sizeof(*lies); i++) {
        struct page_id id;
        struct recipe_ref ref;
        uint8_t value[RECIPE_REF_BYTES];
        cleanup_buffer struct buffer got = {0};
        CLEANUP(tree_writer)
        struct tree_writer *tw =
            tree_writer_create(repo_store(repo), repo_index(repo), repo_uuid(repo), writer,
                               &condemned.trees, &shared.trees, &err);
        tree_writer_add(tw, nodes[0], sizeof(nodes[0]), false, &ref, &err);
        assert_int_equal(ref.tree, tree);
        nodes[1][0] = i == 3 ? 1 : 2; /* at last one that is there, but for its checksum */
        page_hasher_hash(&h, nodes[1], sizeof(nodes[1]), &id, &err);
        recipe_ref_write(&lies[i], value);
        struct index_entry e = index_entry_make(INDEX_NODE, &id, value, sizeof(value));
        index_insert(repo_index(repo), &e, 1, &err);
        tree_writer_add(tw, nodes[1], sizeof(nodes[1]), true, &ref, &err);
        assert_ok(err);
        assert_int_equal(ref.offset, TREE_HEADER + sizeof(nodes[0]));
        tree_writer_read(tw, &ref, &got, &err);
        assert_ok(err);
        assert_memory_equal(got.data, nodes[1], sizeof(nodes[1]));
    }
    page_hasher_finish(&h);
}

static void a_next_number_that_makes_no_sense_is_damage(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    struct store_pair set = {"number", "77", 2};
    struct store_op op = {.kind = STORE_UPDATE, .area = STORE_MAP, .name = "repository",
                          .sets = &set, .n_sets = 1};
    store_run(repo_store(repo), &op, 1, &err);
    assert_ok(err);
    assert_null(image_session_begin(repo, "a", NULL, &err));
    assert_int_equal(err->kind, VM_ERROR_CORRUPT);
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

#define TEST(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(a_node_is_not_where_the_index_says),
        TEST(a_next_number_that_makes_no_sense_is_damage),
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
        TEST(a_failed_write_leaves_nothing_visible),
        TEST(what_may_only_be_read_is_scrubbed),
        TEST(a_commit_whose_answer_is_lost_is_read_back),
        TEST(what_is_given_up_leaves_no_registration),
        TEST(damage_is_named_and_never_returned),
        TEST(a_scrub_of_a_sound_repository_finds_nothing),
        TEST(a_scrub_names_damage_and_the_images_it_touches),
        TEST(every_image_that_shares_a_damaged_node_is_named),
        TEST(what_a_lease_alone_keeps_is_named),
        TEST(the_index_is_made_anew_from_what_is_there),
        TEST(a_pack_under_anothers_name_is_damage),
        TEST(writers_at_once_share_one_repository),
        TEST(differences_are_found_by_identity),
        TEST(sizes_tell_what_is_shared_with_whom),
        TEST(a_repository_is_made_once),
        TEST(another_format_is_refused),
        TEST(a_place_without_repository_is_told),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

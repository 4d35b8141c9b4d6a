/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What fails leaves nothing half done; what is damaged is named and never returned. Over either
 * driver.
 */
#include "tests/unit/repo/repo_faulty.h"
#include "repo/names.h"
#include "repo/scrub.h"
#include "repo/source.h"

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

struct damage_case {
    enum store_area area;
    const char *prefix;
    enum damage how;
    size_t at;
    const char *says;
};

static void damage_is_named_and_never_returned(void **state)
{
    static const struct damage_case cases[] = {
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
    static const struct damage_case cases[] = {
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

/* ---- what the disks cannot read ---- */

/* The pack of image a, which has one; b has others. */
static char *two_images(char spec[128])
{
    char name[STORE_NAME_MAX + 1] = "";
    make_content(content, 6 * MIB, 1);
    store_image("a", NULL, content, 3 * MIB);
    assert_int_equal(store_list(repo_store(repo), STORE_PACK, "pack.", take_first, name, NULL), -1);
    store_image("b", NULL, content + 3 * MIB, 3 * MIB);
    snprintf(spec, 128, "read.%s=error:EIO@*", name);
    return spec;
}

static void a_scrub_goes_on_behind_what_cannot_be_read(void **state)
{
    struct findings f;
    char spec[128];
    arm(two_images(spec));
    struct scrub_report report = scrub(&f);
    assert_non_null(strstr(f.text, "the disk cannot read pack."));
    assert_non_null(strstr(f.text, "image a\n"));
    assert_null(strstr(f.text, "image b\n"));
    assert_int_equal(report.images_touched, 1);
    assert_int_equal(report.damaged, 1);
    assert_true(report.packs > 0); /* those of b */
    cleanup_free uint8_t *out = malloc(3 * MIB);
    cleanup_error struct vm_error *err = NULL;
    assert_int_equal(read_image("a", out, 3 * MIB, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_CORRUPT);
    assert_image("b", content + 3 * MIB, 3 * MIB);
    arm(""); /* a disk that thought better of it */
    assert_int_equal(scrub(&f).damaged, 0);
}

static void what_cannot_be_read_is_stored_again(void **state)
{
    char spec[128];
    arm(two_images(spec));
    store_image("again", NULL, content, 3 * MIB);
    assert_image("again", content, 3 * MIB);
    /* The same of recipes. */
    arm("read.tree=error:EIO@*");
    store_image("once-more", NULL, content, 3 * MIB);
    cleanup_free uint8_t *out = malloc(3 * MIB);
    cleanup_error struct vm_error *err = NULL;
    assert_int_equal(read_image("once-more", out, 3 * MIB, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_CORRUPT);
    arm("");
    assert_image("once-more", content, 3 * MIB);
}

/* ---- what the store should not say ---- */

static void a_pool_that_is_gone_is_told(void **state)
{
    static const char *const points[] = {"create.pack=missing", "create.tree=missing"};
    make_content(content, 3 * MIB, 1);
    for (int i = 0; i < 2; i++) {
        cleanup_error struct vm_error *err = NULL;
        arm(points[i]);
        assert_int_equal(put_all(repo, "a", NULL, content, 3 * MIB, NULL, &err), -1);
        assert_int_equal(err->kind, VM_ERROR_NOT_FOUND);
        assert_non_null(strstr(error_message(err), "the pool that it belongs to is gone"));
        arm("");
    }
}

/* 257 keys at the beginning of the hash space: as if there were 2^40. */
static void the_index_does_not_decide_how_much_memory_is_taken(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    char keys[257][INDEX_KEY_TEXT + 1];
    struct store_pair sets[257];
    for (unsigned i = 0; i < 257; i++) {
        snprintf(keys[i], sizeof(keys[i]), "e------%06u", i);
        sets[i] = (struct store_pair){keys[i], "12345678", 8};
    }
    struct store_op op = {.kind = STORE_UPDATE, .area = STORE_MAP, .name = "index.00000f",
                          .sets = sets, .n_sets = 257};
    store_run(repo_store(repo), &op, 1, &err);
    assert_ok(err);
    assert_int_equal(op.result, STORE_DONE);
    make_content(content, 3 * MIB, 1);
    store_image("a", NULL, content, 3 * MIB);
    assert_image("a", content, 3 * MIB);
}

static int note_lease(const struct lease *lease, void *arg, struct vm_error **err)
{
    *(struct lease *)arg = *lease;
    return 0;
}

static void a_lease_whose_answer_is_lost_is_no_lease(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    static struct lease lease;
    struct findings f;
    store_image("a", NULL, (const uint8_t *)"one", 3);
    arm("update.cat=unknown");
    assert_int_equal(catalogue_lease(repo_store(repo), "a", "web1", &lease, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_TIMEOUT);
    arm("");
    error_clear(&err);
    lease.number = 0;
    catalogue_leases(repo_store(repo), note_lease, NULL, &lease, &err);
    assert_ok(err);
    assert_int_equal(lease.number, 0);
    assert_int_equal(scrub(&f).images_touched, 0);
}

static void a_file_that_shrinks_has_no_hole_there(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    char path[] = "/tmp/vmmig-shrinks.XXXXXX";
    cleanup_close int fd = mkstemp(path);
    unlink(path);
    uint64_t len;
    bool zero;
    assert_int_equal(ftruncate(fd, 4 * MIB), 0);
    assert_int_equal(pwrite(fd, content, MIB, 0), MIB);
    struct source *s = source_open_fd(fd, "disk.raw", &err);
    assert_ok(err);
    assert_int_equal(source_extent(s, 2 * MIB, &len, &zero, &err), 0);
    assert_true(zero && len == 2 * MIB); /* a hole up to the end */
    assert_int_equal(ftruncate(fd, MIB), 0);
    assert_int_equal(source_extent(s, 2 * MIB, &len, &zero, &err), -1);
    assert_string_equal(error_message(err), "disk.raw shrank while it was read");
    source_close(s);
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

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(a_node_is_not_where_the_index_says),
        TEST(a_next_number_that_makes_no_sense_is_damage),
        TEST(a_failed_write_leaves_nothing_visible),
        TEST(what_may_only_be_read_is_scrubbed),
        TEST(a_commit_whose_answer_is_lost_is_read_back),
        TEST(what_is_given_up_leaves_no_registration),
        TEST(damage_is_named_and_never_returned),
        TEST(a_scrub_of_a_sound_repository_finds_nothing),
        TEST(a_scrub_names_damage_and_the_images_it_touches),
        TEST(a_scrub_goes_on_behind_what_cannot_be_read),
        TEST(what_cannot_be_read_is_stored_again),
        TEST(a_pool_that_is_gone_is_told),
        TEST(the_index_does_not_decide_how_much_memory_is_taken),
        TEST(a_lease_whose_answer_is_lost_is_no_lease),
        TEST(a_file_that_shrinks_has_no_hole_there),
        TEST(every_image_that_shares_a_damaged_node_is_named),
        TEST(what_a_lease_alone_keeps_is_named),
        TEST(the_index_is_made_anew_from_what_is_there),
        TEST(a_pack_under_anothers_name_is_damage),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

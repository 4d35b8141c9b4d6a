/* SPDX-License-Identifier: Apache-2.0 */
#include "repo/collect.h"
#include "repo/template.h"
#include "tests/unit/repo/repo_images.h"

#include <pthread.h>

static char url[512];
static struct repo *repo;
static const uint8_t *alike; /* the first page of a snapshot's memory, if not NULL */

static int setup(void **state)
{
    struct vm_error *err = NULL;
    (void)state;
    repo_init(test_place(url), &(struct repo_init_options){0}, &err);
    assert_ok(err);
    repo = repo_open(url, &err);
    assert_ok(err);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    repo_close(repo);
    test_place_remove(url);
    return 0;
}

/* A snapshot of a running VM whose memory is made from `seed`. */
static void snapshot(const char *name, uint64_t seed)
{
    static const char *const files[] = {"disk0.raw", "memory.raw", "device.state", "vm.json"};
    struct vm_error *err = NULL;
    struct import_report report;
    CLEANUP(image_session) struct image_session *s = image_session_begin(repo, name, NULL, &err);
    assert_ok(err);
    for (size_t i = 0; i < 4; i++) {
        struct image_file *f = image_session_file(s, files[i], MIB, &err);
        struct segment *segment = image_writer_segment(image_session_writer(s), f, 0, &err);
        assert_ok(err);
        make_content(segment->data, MIB, i == 1 ? seed : 77 + i);
        if (alike && i == 1)
            memcpy(segment->data, alike, PAGE_BYTES);
        memset(segment->given, true, sizeof(segment->given));
        image_writer_put(image_session_writer(s), segment);
    }
    image_session_commit(s, &report, &err);
    assert_ok(err);
}

static struct template publish(const char *source, const char *name)
{
    struct vm_error *err = NULL;
    struct template t;
    template_publish(repo_store(repo), source, name, &t, &err);
    assert_ok(err);
    return t;
}

/* The error's kind, its message being one line. */
static enum vm_error_kind fails(int result, struct vm_error **err)
{
    assert_int_equal(result, -1);
    assert_null(strchr(error_message(*err), '\n'));
    enum vm_error_kind kind = (*err)->kind;
    error_clear(err);
    return kind;
}

static int count(const struct template *t, void *arg, struct vm_error **err)
{
    (void)t, (void)err;
    ++*(unsigned *)arg;
    return 0;
}

static unsigned listed(void)
{
    unsigned n = 0;
    assert_int_equal(template_list(repo_store(repo), count, &n, NULL), 0);
    return n;
}

static void tags_move_and_digests_stay(void **state)
{
    struct vm_error *err = NULL;
    struct template found;
    char by_digest[100];
    (void)state;
    snapshot("web1@a", 1);
    snapshot("web1@b", 2);
    struct template a = publish("web1@a", "debian12:v1");
    struct template b = publish("web1@b", "debian12:v1");
    assert_string_not_equal(a.digest, b.digest);
    template_find(repo_store(repo), "debian12:v1", &found, NULL, &err);
    assert_ok(err);
    assert_string_equal(found.digest, b.digest);
    assert_string_equal(found.source, "web1@b");
    snprintf(by_digest, sizeof(by_digest), "debian12@%.10s", a.digest);
    template_find(repo_store(repo), by_digest, &found, NULL, &err);
    assert_ok(err);
    assert_string_equal(found.digest, a.digest);
    assert_int_equal(listed(), 2); /* the tag, and the version that has none any more */
    /* The same content is the same version, under whatever tag. */
    assert_string_equal(publish("web1@a", "debian12:v0").digest, a.digest);
    assert_string_equal(publish("web1@a", "debian12:v0").digest, a.digest);
}

static void what_is_published_outlives_its_snapshot(void **state)
{
    struct vm_error *err = NULL;
    struct collect_report report;
    cleanup_free uint8_t *want = malloc(MIB), *got = malloc(MIB);
    cleanup_free struct image *image = malloc(sizeof(*image));
    (void)state;
    struct template t = publish("web1@a", "keep:1"), found;
    catalogue_delete(repo_store(repo), "web1@a", &err);
    assert_ok(err);
    repo_collect(repo, &(struct collect_options){.control.cancel_fd = -1}, &report, &err);
    assert_ok(err);
    template_find(repo_store(repo), "keep:1", &found, image, &err);
    assert_ok(err);
    assert_string_equal(found.digest, t.digest);
    const struct image_entry *memory = image_find_file(image, "memory.raw");
    CLEANUP(file_reader)
    struct file_reader *r = file_reader_open(repo_store(repo), image, memory, &err);
    assert_ok(err);
    file_reader_read(r, 0, got, MIB, &err);
    assert_ok(err);
    make_content(want, MIB, 1);
    assert_memory_equal(want, got, MIB);
}

static void deleting(void **state)
{
    struct store *s = repo_store(repo);
    struct vm_error *err = NULL;
    struct template t = publish("web1@b", "gone:1"), found;
    char version[100];
    (void)state;
    publish("web1@b", "gone:2");
    snprintf(version, sizeof(version), "gone@%s", t.digest);
    assert_int_equal(fails(template_delete(s, version, &err), &err), VM_ERROR_REFUSED);
    template_delete(s, "gone:1", &err);
    assert_ok(err);
    assert_int_equal(template_find(s, version, &found, NULL, NULL), 0); /* :2 stands for it */
    template_delete(s, "gone:2", &err);
    assert_ok(err);
    assert_int_equal(fails(template_find(s, version, &found, NULL, &err), &err),
                     VM_ERROR_NOT_FOUND);
    assert_int_equal(fails(template_delete(s, "gone:2", &err), &err), VM_ERROR_NOT_FOUND);
}

static void a_tag_whose_version_is_gone(void **state)
{
    struct vm_error *err = NULL;
    struct template t = publish("web1@b", "left:1"), found;
    (void)state;
    catalogue_delete(repo_store(repo), t.image, &err);
    assert_ok(err);
    assert_int_equal(fails(template_find(repo_store(repo), "left:1", &found, NULL, &err), &err),
                     VM_ERROR_NOT_FOUND);
    unsigned before = listed();
    template_delete(repo_store(repo), "left:1", &err);
    assert_ok(err);
    assert_int_equal(listed(), before - 1);
    publish("web1@b", "left:2");
    catalogue_delete(repo_store(repo), t.image, &err);
    assert_ok(err);
    publish("web1@b", "left:2");
    template_find(repo_store(repo), "left:2", &found, NULL, &err);
    assert_ok(err);
}

enum { RACES = 12 };

static void *publish_and_delete(void *name)
{
    struct template t;
    for (int i = 0; i < RACES; i++) {
        struct vm_error *err = NULL;
        if (template_publish(repo_store(repo), "web1@a", name, &t, &err) < 0)
            return err;
        if (template_delete(repo_store(repo), name, &err) < 0)
            return err;
    }
    struct vm_error *err = NULL;
    template_publish(repo_store(repo), "web1@a", name, &t, &err);
    return err;
}

/* Two tags of one version come and go; the one that is left has it. */
static void publishing_while_another_deletes(void **state)
{
    static char name[] = "race:1", other[] = "race:2";
    (void)state;
    snapshot("web1@a", 1);
    for (int i = 0; i < RACES; i++) {
        pthread_t thread;
        struct template found;
        struct vm_error *err = NULL;
        void *failed;
        assert_int_equal(pthread_create(&thread, NULL, publish_and_delete, other), 0);
        err = publish_and_delete(name);
        pthread_join(thread, &failed);
        assert_ok(err);
        assert_ok((struct vm_error *)failed);
        template_find(repo_store(repo), name, &found, NULL, &err);
        assert_ok(err);
        template_find(repo_store(repo), other, &found, NULL, &err);
        assert_ok(err);
        template_delete(repo_store(repo), other, &err);
        assert_ok(err);
        template_find(repo_store(repo), name, &found, NULL, &err);
        assert_ok(err);
    }
}

/* Two pages whose identities begin with the same four bytes. */
static void find_alike(uint8_t pages[2][PAGE_BYTES])
{
    enum { SLOTS = 1 << 20 };
    struct page_hasher h;
    struct page_id id;
    cleanup_free struct alike { uint32_t id, seed; } *seen = calloc(SLOTS, sizeof(*seen));
    assert_non_null(seen);
    page_hasher_init(&h, NULL);
    for (uint32_t seed = 1; seed < SLOTS; seed++) {
        put_le32(pages[0], seed);
        page_hasher_hash(&h, pages[0], PAGE_BYTES, &id, NULL);
        uint32_t start = get_le32(id.bytes);
        uint32_t slot = start % SLOTS;
        for (; seen[slot].seed && seen[slot].id != start; slot = (slot + 1) % SLOTS)
            ;
        if (seen[slot].seed) {
            put_le32(pages[1], seen[slot].seed);
            break;
        }
        seen[slot] = (struct alike){start, seed};
    }
    page_hasher_finish(&h);
}

static void the_digest_is_of_whole_identities(void **state)
{
    static uint8_t pages[2][PAGE_BYTES];
    (void)state;
    find_alike(pages);
    assert_memory_not_equal(pages[0], pages[1], PAGE_BYTES);
    alike = pages[0];
    snapshot("alike@a", 5);
    alike = pages[1];
    snapshot("alike@b", 5);
    struct template a = publish("alike@a", "alike:a");
    struct template b = publish("alike@b", "alike:b");
    assert_string_not_equal(a.digest, b.digest);
    alike = NULL;
}

static void bad_input(void **state)
{
    static const char *const names[] = {"", "debian12", "debian12:", ":v1", "a/b:v1", "a:b:c",
                                        "-a:b", "a@xyz", "a@0123", "t:a:b", "a:b@c"};
    struct template t;
    struct vm_error *err = NULL;
    (void)state;
    for (size_t i = 0; i < sizeof(names) / sizeof(*names); i++) {
        assert_int_equal(fails(template_publish(repo_store(repo), "web1@b", names[i], &t, &err), &err),
                         VM_ERROR_USAGE);
            assert_int_equal(template_find(repo_store(repo), names[i], &t, NULL, NULL), -1);
    }
    assert_int_equal(fails(template_publish(repo_store(repo), "nobody@x", "a:b", &t, &err), &err),
                     VM_ERROR_NOT_FOUND);
    uint8_t page[PAGE_BYTES] = {1};
    struct import_report report;
    assert_int_equal(put_all(repo, "plain", NULL, page, sizeof(page), &report, NULL), 0);
    assert_int_equal(fails(template_publish(repo_store(repo), "plain", "a:b", &t, &err), &err),
                     VM_ERROR_REFUSED);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(tags_move_and_digests_stay),
        cmocka_unit_test(what_is_published_outlives_its_snapshot),
        cmocka_unit_test(deleting),
        cmocka_unit_test(a_tag_whose_version_is_gone),
        cmocka_unit_test(publishing_while_another_deletes),
        cmocka_unit_test(the_digest_is_of_whole_identities),
        cmocka_unit_test(bad_input),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}

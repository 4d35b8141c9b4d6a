/* SPDX-License-Identifier: Apache-2.0 */
/*
 * repo_faulty: a repository for each test, over a store that can be made to fail, and images in and
 * out of it.
 */
#ifndef VMMIG_TESTS_REPO_FAULTY_H
#define VMMIG_TESTS_REPO_FAULTY_H

#include "tests/unit/repo/repo_images.h"
#include "repo/store_fault.h"

enum { IMAGE_MIB = 24 };

static struct repo *repo;
static struct store *faulty;
static char place[512];
static uint8_t *content; /* IMAGE_MIB */

static inline void open_repo(void)
{
    struct vm_error *err = NULL;
    faulty = store_fault_create(test_store_open(place), &err);
    assert_ok(err);
    repo = repo_open_store(faulty, &err);
    assert_ok(err);
}

static inline int setup(void **state)
{
    struct vm_error *err = NULL;
    repo_init(test_place(place), NULL, &err);
    assert_ok(err);
    open_repo();
    content = malloc((size_t)IMAGE_MIB * MIB);
    return 0;
}

static inline int teardown(void **state)
{
    free(content);
    repo_close(repo);
    test_place_remove(place);
    return 0;
}

static inline void arm(const char *spec)
{
    cleanup_error struct vm_error *err = NULL;
    store_fault_arm(faulty, spec, &err);
    assert_ok(err);
}

static inline void put_segment(struct image_session *s, struct image_file *f, uint64_t number,
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

static inline struct import_report store_image(const char *name, const char *parent,
                                               const uint8_t *from, size_t size)
{
    cleanup_error struct vm_error *err = NULL;
    struct import_report report = {0};
    put_all(repo, name, parent, from, size, &report, &err);
    assert_ok(err);
    return report;
}

static inline struct file_reader *open_file(const char *name, struct image *image)
{
    struct vm_error *err = NULL;
    catalogue_find(repo_store(repo), name, image, &err);
    assert_ok(err);
    struct file_reader *r = file_reader_create(repo_store(repo), &image->files[0].root,
                                               image->files[0].size, &err);
    assert_ok(err);
    return r;
}

static inline int read_image(const char *name, uint8_t *out, size_t size, struct vm_error **err)
{
    struct image image;
    CLEANUP(file_reader) struct file_reader *r = open_file(name, &image);
    assert_int_equal(file_reader_size(r), size);
    return file_reader_read(r, 0, out, size, err);
}

static inline void assert_image(const char *name, const uint8_t *want, size_t size)
{
    cleanup_error struct vm_error *err = NULL;
    cleanup_free uint8_t *got = malloc(size);
    memset(got, 0xaa, size);
    read_image(name, got, size, &err);
    assert_ok(err);
    assert_memory_equal(got, want, size);
}

static inline bool image_exists(const char *name)
{
    struct image image;
    return catalogue_find(repo_store(repo), name, &image, NULL) == 0;
}

static inline int count_pair(const struct store_pair *pair, void *arg, struct vm_error **err)
{
    (*(unsigned *)arg)++;
    return 0;
}

static inline unsigned registrations(void)
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

#define TEST(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

#endif

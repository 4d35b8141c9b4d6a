/* SPDX-License-Identifier: Apache-2.0 */
/*
 * repo_collected: a repository of made-up images that is collected by somebody whose operations
 * can be watched and made to fail. The test defines, before it includes this, SIZE, the bytes of an
 * image, and CONTENT, those of the content that images are made of.
 */
#ifndef VMMIG_TESTS_REPO_COLLECTED_H
#define VMMIG_TESTS_REPO_COLLECTED_H

#include "tests/unit/repo/repo_images.h"
#include "repo/store_fault.h"

#include <sched.h>

static struct repo *repo;   /* the users' */
static struct repo *gc;     /* the collector's, over `watched` */
static struct store *watched;
static char place[512];
static uint8_t *content;

static inline int setup(void **state)
{
    struct vm_error *err = NULL;
    repo_init(test_place(place), NULL, &err);
    assert_ok(err);
    repo = repo_open(place, &err);
    assert_ok(err);
    watched = store_fault_create(test_store_open(place), &err);
    gc = repo_open_store(watched, &err);
    assert_ok(err);
    content = malloc(CONTENT);
    make_content(content, CONTENT, 1);
    return 0;
}

static inline int teardown(void **state)
{
    free(content);
    repo_close(gc);
    repo_close(repo);
    test_place_remove(place);
    return 0;
}

static inline void store_image(const char *name, const uint8_t *from)
{
    cleanup_error struct vm_error *err = NULL;
    put_all(repo, name, NULL, from, SIZE, NULL, &err);
    assert_ok(err);
}

static inline void delete_image(const char *name)
{
    cleanup_error struct vm_error *err = NULL;
    catalogue_delete(repo_store(repo), name, &err);
    assert_ok(err);
}

static inline void assert_image(const char *name, const uint8_t *want)
{
    cleanup_error struct vm_error *err = NULL;
    cleanup_free uint8_t *got = malloc(SIZE);
    get_all(repo, name, got, SIZE, &err);
    assert_ok(err);
    assert_memory_equal(got, want, SIZE);
}

/* What a lease of one image's reads. */
static inline void assert_lease(const struct lease *lease, const uint8_t *want)
{
    cleanup_error struct vm_error *err = NULL;
    cleanup_free uint8_t *got = malloc(SIZE);
    CLEANUP(file_reader)
    struct file_reader *f = file_reader_create(repo_store(repo), &lease->image.files[0].root, SIZE, &err);
    assert_ok(err);
    assert_int_equal(file_reader_read(f, 0, got, SIZE, &err), 0);
    assert_memory_equal(got, want, SIZE);
}

/* ---- a writer at work ---- */

static inline struct image_file *begin(struct image_session **ret, const char *name,
                                       const char *parent)
{
    struct vm_error *err = NULL;
    *ret = image_session_begin(repo, name, parent, &err);
    assert_ok(err);
    struct image_file *f = image_session_file(*ret, "disk0.raw", SIZE, &err);
    assert_ok(err);
    return f;
}

static inline void put(struct image_session *s, struct image_file *f, unsigned number,
                       const uint8_t *from)
{
    struct vm_error *err = NULL;
    struct segment *seg = image_writer_segment(image_session_writer(s), f, number, &err);
    assert_ok(err);
    memcpy(seg->data, from + number * MIB, MIB);
    memset(seg->given, true, sizeof(seg->given));
    image_writer_put(image_session_writer(s), seg);
}

/* Until the sequencer has settled so many pages. */
static inline void wait_pages(struct image_session *s, uint64_t n)
{
    struct image_writer_stat stat;
    do {
        image_writer_stat(image_session_writer(s), &stat);
        sched_yield();
    } while (stat.pages_zero + stat.pages_shared + stat.pages_new < n);
}

/*
 * Runs before the nth operation of the kind on an object of that name, and with that prefix of
 * keys.
 */
struct between {
    const char *name;
    enum store_op_kind kind;
    void (*run)(void);
    const char *prefix; /* NULL: any */
    _Atomic unsigned nth; /* 0 once it has run */
    _Atomic unsigned passed;
};

static inline store_fault_between_fn *run_between(const struct store_op *op, void *arg)
{
    struct between *b = arg;
    if (op->kind != b->kind || strncmp(op->name, b->name, strlen(b->name)) != 0 ||
        (b->prefix && (!op->prefix || strcmp(op->prefix, b->prefix) != 0)))
        return NULL;
    if (++b->passed != b->nth)
        return NULL;
    b->nth = 0;
    return b->run;
}

#endif

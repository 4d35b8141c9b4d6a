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

#endif

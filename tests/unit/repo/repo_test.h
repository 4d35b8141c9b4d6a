/* SPDX-License-Identifier: Apache-2.0 */
/*
 * repo_test: what the tests of repo/ share. They run over `dir` in a temporary folder, or, with
 * VMMIG_TEST_CEPH_CONF set (tests/ceph/cluster.py does), over pool "images" of that cluster, in a
 * namespace of their own.
 */
#ifndef VMMIG_TESTS_REPO_TEST_H
#define VMMIG_TESTS_REPO_TEST_H

#include "repo/store.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include <cmocka.h>

#define assert_ok(err) assert_string_equal(error_message(err), error_message(NULL))

/* What no part of the product does: another content for an object. */
static inline void test_overwrite(struct store *s, enum store_area area, const char *name,
                                  const void *data, size_t len)
{
    struct vm_error *err = NULL;
    assert_int_equal(store_remove(s, area, name, &err), STORE_DONE);
    assert_int_equal(store_create(s, area, name, data, len, &err), STORE_DONE);
    assert_ok(err);
}

static inline bool test_on_ceph(void)
{
    return getenv("VMMIG_TEST_CEPH_CONF") != NULL;
}

/* The URL of an empty place; a folder is removed by test_place_remove. */
static inline const char *test_place(char out[512])
{
    static int serial;
    if (test_on_ceph()) {
        snprintf(out, 512, "rados:images/test-%lld-%d-%d?conf=%s", (long long)time(NULL), getpid(),
                 ++serial, getenv("VMMIG_TEST_CEPH_CONF"));
        return out;
    }
    /* Memory, where there is some to write to: what fsync does has its own test. */
    char folder[64];
    snprintf(folder, sizeof(folder), "%s/vmmig-test.XXXXXX",
             access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/var/tmp");
    assert_non_null(mkdtemp(folder));
    snprintf(out, 512, "dir:%s", folder);
    return out;
}

static inline void test_place_remove(const char *url)
{
    if (!strstr(url, "/vmmig-test."))
        return;
    char command[600];
    snprintf(command, sizeof(command), "rm -rf '%s'", url + 4);
    assert_int_equal(system(command), 0);
}

static inline struct store *test_store_open(const char *text)
{
    struct vm_error *err = NULL;
    struct repo_url url;
    repo_url_parse(text, &url, &err);
    assert_ok(err);
    struct store *s = store_open(&url, STORE_OPEN_CREATE, &err);
    assert_ok(err);
    repo_url_finish(&url);
    return s;
}

/* Reproducible bytes: xorshift64*, never the clock. */
static inline uint64_t test_random(uint64_t *state)
{
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return *state * 2685821657736338717ULL;
}

static inline void test_fill_random(void *out, size_t n, uint64_t seed)
{
    uint64_t state = seed * 0x9e3779b97f4a7c15ULL + 1;
    uint8_t *p = out;
    for (size_t i = 0; i < n; i += 8) {
        uint64_t v = test_random(&state);
        memcpy(p + i, &v, n - i < 8 ? n - i : 8);
    }
}

#endif

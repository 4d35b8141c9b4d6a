/* SPDX-License-Identifier: Apache-2.0 */
/* A folder that is made is on the disk: the folder that names it is synced (noted by -Wl,--wrap). */
#include "base/io.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <cmocka.h>

enum { SYNCED_MAX = 16 };

static ino_t synced[SYNCED_MAX];
static unsigned n_synced;

int __real_fsync(int fd);
int __wrap_fsync(int fd);

int __wrap_fsync(int fd)
{
    struct stat st;
    assert_int_equal(fstat(fd, &st), 0);
    assert_true(n_synced < SYNCED_MAX);
    synced[n_synced++] = st.st_ino;
    return __real_fsync(fd);
}

static bool is_synced(const char *root, const char *folder)
{
    char path[256];
    struct stat st;
    snprintf(path, sizeof(path), "%s%s", root, folder);
    assert_int_equal(stat(path, &st), 0);
    for (unsigned i = 0; i < n_synced; i++)
        if (synced[i] == st.st_ino)
            return true;
    return false;
}

static void each_new_folder_is_named_on_the_disk(void **state)
{
    char root[] = "/tmp/vmmig-sync-XXXXXX", path[256];
    struct vm_error *err = NULL;
    (void)state;
    assert_non_null(mkdtemp(root));
    snprintf(path, sizeof(path), "%s/a/b/c", root);
    assert_int_equal(io_make_folders(path, 0700, &err), 0);
    assert_true(is_synced(root, ""));
    assert_true(is_synced(root, "/a"));
    assert_true(is_synced(root, "/a/b"));
    n_synced = 0;
    assert_int_equal(io_make_folders(path, 0700, &err), 0);
    assert_int_equal(n_synced, 0); /* they were there */
    for (size_t end = strlen(path); end > strlen(root); end = (size_t)(strrchr(path, '/') - path)) {
        path[end] = 0;
        assert_int_equal(rmdir(path), 0);
    }
    assert_int_equal(rmdir(root), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(each_new_folder_is_named_on_the_disk),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

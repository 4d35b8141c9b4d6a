/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the dir driver promises about crashes hangs on the order of three calls: content synced,
 * then named, then the folder synced; and on commits of maps that wait for the disk. They are
 * wrapped here (-Wl,--wrap) and noted.
 */
#include "tests/unit/repo/repo_test.h"

#include <lmdb.h>
#include <sys/stat.h>

int __real_fdatasync(int fd);
int __real_fsync(int fd);
int __real_linkat(int from, const char *path, int to, const char *name, int flags);
int __real_renameat(int from, const char *path, int to, const char *name);
int __real_unlinkat(int at, const char *name, int flags);
int __real_mdb_txn_commit(MDB_txn *txn);
int __wrap_fdatasync(int fd);
int __wrap_fsync(int fd);
int __wrap_linkat(int from, const char *path, int to, const char *name, int flags);
int __wrap_renameat(int from, const char *path, int to, const char *name);
int __wrap_unlinkat(int at, const char *name, int flags);

int __wrap_mdb_txn_commit(MDB_txn *txn);

static char calls[256];

static void note(const char *call, int fd)
{
    struct stat st;
    if (fd < 0 || (fstat(fd, &st) == 0 && S_ISDIR(st.st_mode)))
        strcat(calls, fd < 0 ? "" : "folder ");
    strcat(strcat(calls, call), "; ");
}

int __wrap_fdatasync(int fd)
{
    note("fdatasync", fd);
    return __real_fdatasync(fd);
}

int __wrap_fsync(int fd)
{
    note("fsync", fd);
    return __real_fsync(fd);
}

int __wrap_linkat(int from, const char *path, int to, const char *name, int flags)
{
    note("link", -1);
    return __real_linkat(from, path, to, name, flags);
}

int __wrap_renameat(int from, const char *path, int to, const char *name)
{
    note("rename", -1);
    return __real_renameat(from, path, to, name);
}

int __wrap_unlinkat(int at, const char *name, int flags)
{
    note("unlink", -1);
    return __real_unlinkat(at, name, flags);
}

/* Whether LMDB waits for data and head alike, says the environment. */
int __wrap_mdb_txn_commit(MDB_txn *txn)
{
    unsigned flags;
    assert_int_equal(mdb_env_get_flags(mdb_txn_env(txn), &flags), 0);
    note(flags & (MDB_NOSYNC | MDB_NOMETASYNC | MDB_MAPASYNC) ? "loose commit" : "commit", -1);
    return __real_mdb_txn_commit(txn);
}

static void a_change_of_a_map_is_synced(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    char place[512];
    struct store *s = test_store_open(test_place(place));
    struct store_pair set = {"key", "value", 5};
    struct store_op op = {.kind = STORE_UPDATE, .area = STORE_MAP, .name = "map",
                          .presence = STORE_EITHER, .sets = &set, .n_sets = 1};
    calls[0] = 0;
    store_run(s, &op, 1, &err);
    assert_ok(err);
    assert_string_equal(calls, "commit; ");
    store_close(s);
    test_place_remove(place);
}

static void content_is_synced_before_it_is_named(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    char place[512];
    struct store *s = test_store_open(test_place(place));
    calls[0] = 0;
    assert_int_equal(store_create(s, STORE_PACK, "pack.1", "x", 1, &err), STORE_DONE);
    assert_string_equal(calls, "fdatasync; link; folder fsync; ");
    calls[0] = 0;
    assert_int_equal(store_remove(s, STORE_PACK, "pack.1", &err), STORE_DONE);
    assert_string_equal(calls, "unlink; folder fsync; ");
    assert_ok(err);
    store_close(s);
    test_place_remove(place);
}

int main(void)
{
    unsetenv("VMMIG_TEST_CEPH_CONF");
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(content_is_synced_before_it_is_named),
        cmocka_unit_test(a_change_of_a_map_is_synced),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

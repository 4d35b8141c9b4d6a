/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the dir driver promises about crashes hangs on the order of three calls: content synced,
 * then named, then the folder synced; and on commits of maps that wait for the disk. They are
 * wrapped here (-Wl,--wrap) and noted.
 */
#include "tests/unit/repo/repo_test.h"

#include <errno.h>
#include <lmdb.h>
#include <sys/stat.h>

int __real_fdatasync(int fd);
int __real_fsync(int fd);
int __real_linkat(int from, const char *path, int to, const char *name, int flags);
int __real_renameat(int from, const char *path, int to, const char *name);
int __real_unlinkat(int at, const char *name, int flags);
int __real_mdb_txn_commit(MDB_txn *txn);
ssize_t __real_pread64(int fd, void *out, size_t n, off_t at);
ssize_t __wrap_pread64(int fd, void *out, size_t n, off_t at);
int __wrap_fdatasync(int fd);
int __wrap_fsync(int fd);
int __wrap_linkat(int from, const char *path, int to, const char *name, int flags);
int __wrap_renameat(int from, const char *path, int to, const char *name);
int __wrap_unlinkat(int at, const char *name, int flags);

int __wrap_mdb_txn_commit(MDB_txn *txn);

static char calls[256];
static int pread_errno;

ssize_t __wrap_pread64(int fd, void *out, size_t n, off_t at)
{
    errno = pread_errno;
    return pread_errno ? -1 : __real_pread64(fd, out, n, at);
}

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

/* An answer, of that object alone: the rest of the batch is read. */
static void what_the_disk_cannot_read_is_told(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    char place[512], out[8];
    calls[0] = 0;
    struct store *s = test_store_open(test_place(place));
    store_create(s, STORE_PACK, "pack.1", "x", 1, &err);
    struct store_op op = {.kind = STORE_READ, .area = STORE_PACK, .name = "pack.1", .out = out,
                          .len = 8};
    pread_errno = EIO;
    assert_int_equal(store_run(s, &op, 1, &err), 0);
    assert_int_equal(op.result, STORE_UNREADABLE);
    size_t len;
    assert_int_equal(store_read(s, STORE_PACK, "pack.1", 0, out, 8, &len, &err), STORE_FAILED);
    assert_int_equal(err->kind, VM_ERROR_CORRUPT);
    assert_string_equal(error_message(err), "the disk cannot read pack.1");
    error_clear(&err);
    pread_errno = ENOMEM;
    assert_int_equal(store_run(s, &op, 1, &err), -1);
    pread_errno = 0;
    error_clear(&err);
    assert_int_equal(store_run(s, &op, 1, &err), 0);
    assert_int_equal(op.result, STORE_DONE);
    store_close(s);
    test_place_remove(place);
}

/* ---- keys that vmmig does not write ---- */

static void put_raw(const char *place, const char *key, size_t key_len, const void *value, size_t len)
{
    char path[600];
    MDB_env *env;
    MDB_txn *txn;
    MDB_dbi dbi;
    snprintf(path, sizeof(path), "%s/maps", place + 4);
    assert_int_equal(mdb_env_create(&env), 0);
    mdb_env_set_mapsize(env, (size_t)1 << 30);
    assert_int_equal(mdb_env_open(env, path, 0, 0600), 0);
    assert_int_equal(mdb_txn_begin(env, NULL, 0, &txn), 0);
    assert_int_equal(mdb_dbi_open(txn, NULL, 0, &dbi), 0);
    assert_int_equal(mdb_put(txn, dbi, &(MDB_val){key_len, (void *)(uintptr_t)key},
                             &(MDB_val){len, (void *)(uintptr_t)value}, 0), 0);
    assert_int_equal(__real_mdb_txn_commit(txn), 0);
    mdb_env_close(env);
}

static int visit_nothing(const struct store_pair *pair, void *arg, struct vm_error **err)
{
    ++*(int *)arg;
    return 0;
}

/* None of them gets out of the store: they would not fit where keys are kept. */
static void keys_that_vmmig_cannot_have_written_are_damage(void **state)
{
    static char large[STORE_VALUE_MAX + 1], wide[400];
    memset(wide, 'a', sizeof(wide));
    memcpy(wide, "map", 4);
    const struct {
        const char *key;
        size_t key_len, len;
    } cases[] = {
        {wide, 4 + STORE_KEY_MAX + 1, 1}, {wide, sizeof(wide), 1}, {"map\0a\0b", 7, 1},
        {"map\0a", 5, sizeof(large)},     {"map\0a", 5, 0},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
        cleanup_error struct vm_error *err = NULL;
        char place[512];
        int n = 0;
        calls[0] = 0;
        store_close(test_store_open(test_place(place)));
        put_raw(place, "map", 4, "", 1);
        put_raw(place, cases[i].key, cases[i].key_len, large, cases[i].len);
        struct store *s = test_store_open(place);
        assert_int_equal(store_scan(s, "map", NULL, visit_nothing, &n, &err), STORE_FAILED);
        assert_int_equal(err->kind, VM_ERROR_CORRUPT);
        assert_non_null(strstr(error_message(err), "map map "));
        assert_int_equal(n, 0);
        store_close(s);
        test_place_remove(place);
    }
}

int main(void)
{
    unsetenv("VMMIG_TEST_CEPH_CONF");
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(content_is_synced_before_it_is_named),
        cmocka_unit_test(a_change_of_a_map_is_synced),
        cmocka_unit_test(what_the_disk_cannot_read_is_told),
        cmocka_unit_test(keys_that_vmmig_cannot_have_written_are_damage),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

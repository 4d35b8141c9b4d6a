/* SPDX-License-Identifier: Apache-2.0 */
#include "repo/store_dir_env.h"
#include "repo/store_driver.h"

#include <errno.h>
#include <fcntl.h>
#include <lmdb.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>

/* Address space, not memory or disk: an environment never grows beyond it. */
#define MAP_SIZE ((size_t)256 << 30)

enum {
    MAX_READERS = 1022,
    DB_KEY_MAX = STORE_NAME_MAX + 1 + STORE_KEY_MAX,
    RESERVE = 1 << 20,     /* blocks behind the end of what is used */
    NO_SPACE_LEFT = 1 << 20, /* with less available a short write has no other cause */
};

struct dir_env {
    struct dir_env *next;
    dev_t dev;
    ino_t ino;
    int users;
    MDB_env *env;
    MDB_dbi dbi;
    int fd;           /* of the file, LMDB's */
    off_t reserved;   /* up to there blocks are allocated; changed by the one writer at a time */
};

static pthread_mutex_t envs_lock = PTHREAD_MUTEX_INITIALIZER;
static struct dir_env *envs;

static int fail(struct vm_error **err, int rc, const char *what)
{
    if (rc == MDB_MAP_FULL)
        return error_errno(err, ENOSPC, "%s: the map of the repository is full", what);
    if (rc > 0)
        return error_errno(err, rc, "%s", what);
    enum vm_error_kind kind = rc == MDB_CORRUPTED || rc == MDB_PAGE_NOTFOUND || rc == MDB_INVALID
                                  ? VM_ERROR_CORRUPT
                              : rc == MDB_VERSION_MISMATCH ? VM_ERROR_VERSION
                                                           : VM_ERROR_SYSTEM;
    return error_set(err, kind, "%s: %s", what, mdb_strerror(rc));
}

/* LMDB calls a write that was cut short for want of space EIO. */
static int fail_change(const struct dir_env *env, struct vm_error **err, int rc)
{
    struct statvfs fs;
    if (rc == EIO && !fstatvfs(env->fd, &fs) &&
        (uint64_t)fs.f_bavail * fs.f_frsize < NO_SPACE_LEFT)
        rc = ENOSPC;
    return fail(err, rc, "cannot change the repository's maps");
}

/* As far as the disk has it: what is not there now is tried again by the next change. */
static void reserve(struct dir_env *env)
{
    MDB_envinfo info;
    MDB_stat stat;
    if (mdb_env_info(env->env, &info) || mdb_env_stat(env->env, &stat))
        return;
    off_t end = (off_t)(info.me_last_pgno + 1) * stat.ms_psize + RESERVE;
    if (env->reserved < end - RESERVE / 2 &&
        !fallocate(env->fd, FALLOC_FL_KEEP_SIZE, 0, end))
        env->reserved = end;
}

/* ---- environments of this process ---- */

static int open_env(const char *path, struct dir_env *e, struct vm_error **err)
{
    static const char what[] = "cannot open the repository's maps";
    MDB_txn *txn = NULL;
    int rc = mdb_env_create(&e->env);
    if (rc)
        return fail(err, rc, what);
    mdb_env_set_mapsize(e->env, MAP_SIZE);
    mdb_env_set_maxreaders(e->env, MAX_READERS);
    rc = mdb_env_open(e->env, path, MDB_NOTLS | MDB_NORDAHEAD, 0600);
    if (!rc) {
        int dead = 0;
        mdb_reader_check(e->env, &dead);
        rc = mdb_txn_begin(e->env, NULL, 0, &txn);
    }
    if (!rc)
        rc = mdb_dbi_open(txn, NULL, 0, &e->dbi);
    if (!rc)
        rc = mdb_txn_commit(txn);
    else if (txn)
        mdb_txn_abort(txn);
    if (!rc)
        rc = mdb_env_get_fd(e->env, &e->fd);
    if (rc) {
        mdb_env_close(e->env);
        return fail(err, rc, what);
    }
    return 0;
}

struct dir_env *dir_env_acquire(const char *folder, struct vm_error **err)
{
    cleanup_free char *path = NULL;
    if (asprintf(&path, "%s/maps", folder) < 0) {
        error_nomem(err);
        return NULL;
    }
    SCOPE_LOCK(&envs_lock);
    struct stat st;
    if (stat(path, &st) < 0) {
        error_errno(err, errno, "cannot open %s", path);
        return NULL;
    }
    for (struct dir_env *e = envs; e; e = e->next) {
        if (e->dev == st.st_dev && e->ino == st.st_ino) {
            e->users++;
            return e;
        }
    }
    cleanup_free struct dir_env *e = calloc(1, sizeof(*e));
    if (!e) {
        error_nomem(err);
        return NULL;
    }
    if (open_env(path, e, err) < 0)
        return NULL;
    e->dev = st.st_dev;
    e->ino = st.st_ino;
    e->users = 1;
    e->next = envs;
    envs = e;
    return steal_ptr(&e);
}

void dir_env_release(struct dir_env *env)
{
    if (!env)
        return;
    SCOPE_LOCK(&envs_lock);
    if (--env->users)
        return;
    struct dir_env **at = &envs;
    while (*at != env)
        at = &(*at)->next;
    *at = env->next;
    mdb_env_close(env->env);
    free(env);
}

/* ---- keys ---- */

struct db_key {
    char bytes[DB_KEY_MAX + 1];
    MDB_val val;
};

/* MAP NUL KEY; with key "" the entry that stands for the map itself. */
static MDB_val *make_key(struct db_key *k, const char *map, const char *key)
{
    size_t n = strlen(map) + 1;
    memcpy(k->bytes, map, n);
    size_t m = strlen(key);
    memcpy(k->bytes + n, key, m);
    k->val = (MDB_val){n + m, k->bytes};
    return &k->val;
}

static int map_exists(struct dir_env *env, MDB_txn *txn, const char *map)
{
    struct db_key k;
    MDB_val value;
    return mdb_get(txn, env->dbi, make_key(&k, map, ""), &value);
}

/* ---- changes ---- */

static int compare_one(struct dir_env *env, MDB_txn *txn, const char *map,
                       const struct store_pair *want, bool *ret_same)
{
    struct db_key k;
    MDB_val value = {0};
    int rc = mdb_get(txn, env->dbi, make_key(&k, map, want->key), &value);
    if (rc && rc != MDB_NOTFOUND)
        return rc;
    size_t len = rc ? 0 : value.mv_size;
    *ret_same = len == want->len && (!len || !memcmp(value.mv_data, want->value, len));
    return 0;
}

/* 0 and a result if the operation ends here; the result stays FAILED if it may go on. */
static int check_guards(struct dir_env *env, MDB_txn *txn, struct store_op *op)
{
    int rc = map_exists(env, txn, op->name);
    if (rc && rc != MDB_NOTFOUND)
        return rc;
    if (rc == MDB_NOTFOUND && op->presence == STORE_PRESENT)
        op->result = STORE_MISSING;
    if (!rc && op->presence == STORE_NEW)
        op->result = STORE_EXISTS;
    for (size_t i = 0; i < op->n_compares && op->result == STORE_FAILED; i++) {
        bool same = false;
        rc = compare_one(env, txn, op->name, &op->compares[i], &same);
        if (rc)
            return rc;
        if (!same)
            op->result = STORE_MISMATCH;
    }
    return 0;
}

static int put(struct dir_env *env, MDB_txn *txn, const char *map, const char *key,
               const void *data, size_t len)
{
    struct db_key k;
    MDB_val value = {len, (void *)(uintptr_t)data};
    return mdb_put(txn, env->dbi, make_key(&k, map, key), &value, 0);
}

static int update(struct dir_env *env, MDB_txn *txn, struct store_op *op)
{
    int rc = check_guards(env, txn, op);
    if (rc || op->result != STORE_FAILED)
        return rc;
    rc = put(env, txn, op->name, "", "", 1);
    for (size_t i = 0; !rc && i < op->n_erases; i++) {
        struct db_key k;
        rc = mdb_del(txn, env->dbi, make_key(&k, op->name, op->erases[i]), NULL);
        rc = rc == MDB_NOTFOUND ? 0 : rc;
    }
    for (size_t i = 0; !rc && i < op->n_sets; i++)
        rc = put(env, txn, op->name, op->sets[i].key, op->sets[i].value, op->sets[i].len);
    if (!rc)
        op->result = STORE_DONE;
    return rc;
}

static bool belongs_to(const MDB_val *key, const char *map)
{
    size_t n = strlen(map) + 1;
    return key->mv_size >= n && !memcmp(key->mv_data, map, n);
}

static int remove_map(struct dir_env *env, MDB_txn *txn, struct store_op *op)
{
    struct db_key k;
    MDB_cursor *cursor;
    int rc = mdb_cursor_open(txn, env->dbi, &cursor);
    if (rc)
        return rc;
    MDB_val *key = make_key(&k, op->name, ""), value;
    op->result = STORE_MISSING;
    for (rc = mdb_cursor_get(cursor, key, &value, MDB_SET_RANGE); !rc && belongs_to(key, op->name);
         rc = mdb_cursor_get(cursor, key, &value, MDB_NEXT)) {
        op->result = STORE_DONE;
        rc = mdb_cursor_del(cursor, 0);
        if (rc)
            break;
    }
    mdb_cursor_close(cursor);
    return rc == MDB_NOTFOUND ? 0 : rc;
}

int dir_env_change(struct dir_env *env, struct store_op *ops, size_t n,
                   bool (*are_changes)(const struct store_op *op), struct vm_error **err)
{
    MDB_txn *txn;
    int rc = mdb_txn_begin(env->env, NULL, 0, &txn);
    if (rc)
        return fail(err, rc, "cannot change the repository's maps");
    reserve(env); /* within the transaction: one process at a time */
    for (size_t i = 0; !rc && i < n; i++)
        if (are_changes(&ops[i]))
            rc = ops[i].kind == STORE_UPDATE ? update(env, txn, &ops[i])
                                             : remove_map(env, txn, &ops[i]);
    if (rc)
        mdb_txn_abort(txn);
    else
        rc = mdb_txn_commit(txn);
    if (!rc)
        return 0;
    for (size_t i = 0; i < n; i++)
        if (are_changes(&ops[i]))
            ops[i].result = STORE_FAILED;
    return fail_change(env, err, rc);
}

/* ---- looking ---- */

static int get(struct dir_env *env, MDB_txn *txn, struct store_op *op, struct vm_error **err)
{
    for (size_t i = 0; i < op->n_pairs; i++) {
        struct db_key k;
        MDB_val value;
        int rc = mdb_get(txn, env->dbi, make_key(&k, op->name, op->pairs[i].key), &value);
        if (rc == MDB_NOTFOUND)
            continue;
        if (rc)
            return fail(err, rc, op->name);
        if (store_answer_pair(op, op->pairs[i].key, strlen(op->pairs[i].key), value.mv_data,
                              value.mv_size, err) < 0)
            return -1;
    }
    return 0;
}

static const char *scan_start(const struct store_op *op)
{
    const char *prefix = op->prefix ? op->prefix : "";
    return op->after && strcmp(op->after, prefix) > 0 ? op->after : prefix;
}

static int scan_with(MDB_cursor *cursor, struct store_op *op, struct vm_error **err)
{
    struct db_key start;
    MDB_val *key = make_key(&start, op->name, scan_start(op)), value;
    size_t skip = strlen(op->name) + 1, prefix = op->prefix ? strlen(op->prefix) : 0;
    int rc = mdb_cursor_get(cursor, key, &value, MDB_SET_RANGE);
    for (; !rc && belongs_to(key, op->name); rc = mdb_cursor_get(cursor, key, &value, MDB_NEXT)) {
        const char *text = (const char *)key->mv_data + skip;
        size_t len = key->mv_size - skip;
        if (!len || (op->after && len == strlen(op->after) && !memcmp(text, op->after, len)))
            continue;
        if (len < prefix || (prefix && memcmp(text, op->prefix, prefix)))
            return 0;
        if (op->n_ret_pairs == op->max) {
            op->ret_more = true;
            return 0;
        }
        if (store_answer_pair(op, text, len, value.mv_data, value.mv_size, err) < 0)
            return -1;
    }
    return rc && rc != MDB_NOTFOUND ? fail(err, rc, op->name) : 0;
}

static int scan(struct dir_env *env, MDB_txn *txn, struct store_op *op, struct vm_error **err)
{
    MDB_cursor *cursor;
    int rc = mdb_cursor_open(txn, env->dbi, &cursor);
    if (rc)
        return fail(err, rc, op->name);
    op->ret_more = false;
    int done = scan_with(cursor, op, err);
    mdb_cursor_close(cursor);
    return done;
}

static int look(struct dir_env *env, MDB_txn *txn, struct store_op *op, struct vm_error **err)
{
    int rc = map_exists(env, txn, op->name);
    if (rc == MDB_NOTFOUND) {
        op->result = STORE_MISSING;
        return 0;
    }
    if (rc)
        return fail(err, rc, op->name);
    if ((op->kind == STORE_GET ? get : scan)(env, txn, op, err) < 0)
        return -1;
    if (store_answer_done(op, err) < 0)
        return -1;
    op->result = STORE_DONE;
    return 0;
}

int dir_env_look(struct dir_env *env, struct store_op *ops, size_t n, struct vm_error **err)
{
    MDB_txn *txn;
    struct vm_error *first = NULL;
    int rc = mdb_txn_begin(env->env, NULL, MDB_RDONLY, &txn);
    if (rc)
        return fail(err, rc, "cannot read the repository's maps");
    for (size_t i = 0; i < n; i++) {
        struct vm_error *one = NULL;
        if ((ops[i].kind == STORE_GET || ops[i].kind == STORE_SCAN) &&
            look(env, txn, &ops[i], &one) < 0)
            error_propagate(first ? NULL : &first, one);
    }
    mdb_txn_abort(txn);
    return first ? error_propagate(err, first) : 0;
}

/* ---- listing ---- */

/* The first map whose name is greater than `after` (or the first of all), with the prefix. */
static int next_map(struct dir_env *env, const char *after, const char *prefix,
                    char ret_name[STORE_NAME_MAX + 1], struct vm_error **err)
{
    MDB_txn *txn;
    MDB_cursor *cursor;
    int rc = mdb_txn_begin(env->env, NULL, MDB_RDONLY, &txn);
    if (rc)
        return fail(err, rc, "cannot list the repository's maps");
    rc = mdb_cursor_open(txn, env->dbi, &cursor);
    ret_name[0] = 0;
    if (!rc) {
        struct db_key start;
        MDB_val *key = make_key(&start, *after ? after : prefix, ""), value;
        if (*after) /* behind every key of that map: its name, then 1 instead of NUL */
            start.bytes[key->mv_size - 1] = 1;
        else
            key->mv_size--; /* the prefix without the NUL */
        rc = mdb_cursor_get(cursor, key, &value, key->mv_size ? MDB_SET_RANGE : MDB_FIRST);
        if (!rc && key->mv_size >= strlen(prefix) && !memcmp(key->mv_data, prefix, strlen(prefix)))
            snprintf(ret_name, STORE_NAME_MAX + 1, "%s", (const char *)key->mv_data);
        mdb_cursor_close(cursor);
    }
    mdb_txn_abort(txn);
    return rc && rc != MDB_NOTFOUND ? fail(err, rc, "cannot list the repository's maps") : 0;
}

int dir_env_list(struct dir_env *env, const char *prefix, store_list_fn *visit, void *arg,
                 struct vm_error **err)
{
    char name[STORE_NAME_MAX + 1] = "", next[STORE_NAME_MAX + 1];
    for (;;) {
        if (next_map(env, name, prefix, next, err) < 0)
            return -1;
        if (!next[0])
            return 0;
        strcpy(name, next);
        if (visit(name, arg, err) < 0)
            return -1;
    }
}

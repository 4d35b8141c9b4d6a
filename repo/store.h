/* SPDX-License-Identifier: Apache-2.0 */
/*
 * store: where a repository keeps its objects. Two drivers, `dir` and `rados`, promise the same.
 *
 * An object has a name and belongs to one area:
 *
 *     STORE_PACK   whole objects of some MiB, never changed; on Ceph in the data pool, which may be
 *                  erasure coded
 *     STORE_BLOB   whole objects, never or rarely changed; on Ceph in the replicated pool
 *     STORE_MAP    maps from text keys to byte strings; on Ceph the omap of objects in that pool
 *
 * Names of blobs and maps are disjoint by convention (repo/names.h). Values are never empty, so
 * that a missing key and an empty value are the same thing, as in Ceph's comparison.
 *
 * Calling sequence
 *
 *     struct store *s = store_open(&url, 0, &err);
 *     struct store_op ops[2] = {store_op_read(STORE_PACK, "pack.1", 0, 4096, buf), ...};
 *     if (store_run(s, ops, 2, &err) < 0) ...
 *     if (ops[0].result == STORE_MISSING) ...
 *     store_ops_finish(ops, 2);
 *     store_close(s);
 *
 * store_run starts every operation of the batch, in no order, and waits for all. What is an answer
 * rather than a failure (no such object, a guard that does not hold, a sector that cannot be read)
 * is in `result`, and store_run still returns 0. If an operation fails, its result is STORE_FAILED
 * and store_run returns -1 with the error of the first that did; the results of the others are
 * valid. A failed STORE_CREATE, REMOVE or UPDATE may have happened: the caller reads back what
 * matters.
 *
 * Durability. When store_run returns, what it created, removed and updated survives a
 * crash of any client and, as far as the disks keep fsync's promise, of the host. Each operation is
 * atomic: readers and crashes see the whole of it or nothing.
 *
 * Errors. NO_SPACE on a full disk, pool or quota: writes fail at once instead of waiting, removals
 * still work. DENIED without the rights, UNREACHABLE or TIMEOUT when the cluster does not answer.
 *
 * Limits, checked: names 64 bytes, keys 255 bytes without control characters, values 64 KiB,
 * objects 64 MiB, STORE_KEYS_MAX keys in one operation. Memory: the caller's buffers, what GET and
 * SCAN return, and for rados at most 64 operations in flight per call.
 *
 * Threads: any number may use one store at the same time. After fork only exec is allowed.
 */
#ifndef VMMIG_REPO_STORE_H
#define VMMIG_REPO_STORE_H

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/error.h"
#include "repo/url.h"

enum {
    STORE_NAME_MAX = 64,
    STORE_KEY_MAX = 255,
    STORE_VALUE_MAX = 64 << 10,
    STORE_OBJECT_MAX = 64 << 20,
    STORE_KEYS_MAX = 1024,
};

enum store_area { STORE_PACK, STORE_BLOB, STORE_MAP };

enum store_result {
    STORE_FAILED,   /* the error says why */
    STORE_DONE,
    STORE_MISSING,  /* no such object */
    STORE_EXISTS,   /* CREATE, and UPDATE with STORE_NEW: the object is there already */
    STORE_MISMATCH, /* UPDATE: a comparison does not hold; nothing was changed */
    STORE_UNREADABLE, /* READ, SIZE: the disks cannot read it (EIO): it is as good as damaged */
};

enum store_op_kind {
    STORE_CREATE,  /* PACK, BLOB: a new object; EXISTS if the name is taken */
    STORE_READ,    /* PACK, BLOB: up to len bytes from offset; fewer only at the end; MISSING */
    STORE_SIZE,    /* PACK, BLOB: the size in bytes; MISSING */
    STORE_REMOVE,  /* any area: MISSING if it is not there (any more) */
    STORE_GET,     /* MAP: the values of given keys; MISSING if the object is */
    STORE_SCAN, /* MAP: keys in byte order behind a key, with a prefix; MISSING if the object is */
    STORE_UPDATE, /* MAP: compare, then set and erase, all or nothing */
};

/* UPDATE on a map that does not exist: */
enum store_presence {
    STORE_PRESENT, /* MISSING */
    STORE_NEW,     /* create it; EXISTS if it does */
    STORE_EITHER,  /* create it if need be */
};

/* One key and a value; a value of length 0 means "no such key" where keys are compared or got. */
struct store_pair {
    const char *key;
    const void *value;
    size_t len;
};

struct store_op {
    enum store_op_kind kind;
    enum store_area area;
    const char *name;
    enum store_result result;

    /* CREATE: the content. READ: where it goes; ret_len bytes came. */
    const void *data;
    struct buffer *given; /* CREATE: store_create_given's, of which data and len are the content */
    void *out;
    uint64_t offset;
    size_t len;
    size_t ret_len;
    uint64_t ret_size; /* SIZE */

    /* GET: pairs[].key are asked for, value and len answered. */
    struct store_pair *pairs;
    size_t n_pairs;

    /*
     * SCAN: after (NULL: from the start), prefix (NULL: any), at most `max` (<= STORE_KEYS_MAX)
     * pairs.
     */
    const char *after;
    const char *prefix;
    size_t max;
    struct store_pair *ret_pairs; /* owned by the op */
    size_t n_ret_pairs;
    bool ret_more; /* keys with that prefix remain behind the last */

    /* UPDATE */
    enum store_presence presence;
    const struct store_pair *compares, *sets;
    size_t n_compares, n_sets;
    const char *const *erases;
    size_t n_erases;

    struct buffer arena; /* what GET and SCAN returned; owned by the op */
};

struct store;

enum { STORE_OPEN_CREATE = 1 }; /* dir: make the folder and the environment if they are not there */

/*
 * NOT_FOUND if the folder or pool does not exist; REFUSED for a network file system. A cluster that
 * does not answer within 30 s is UNREACHABLE; an operation on it that takes 120 s is TIMEOUT.
 */
struct store *store_open(const struct repo_url *url, int flags, struct vm_error **err);
void store_close(struct store *s);
/* The URL, for messages. */
const char *store_text(const struct store *s);

/* rados: keep packs in that pool. dir: USAGE. Before the first operation on packs. */
int store_set_data_pool(struct store *s, const char *pool, struct vm_error **err);

int store_run(struct store *s, struct store_op *ops, size_t n, struct vm_error **err);
/* Free what the operations own. They may be run again afterwards. */
void store_ops_finish(struct store_op *ops, size_t n);

/*
 * Call visit for every object of the area whose name begins with prefix, in no order; objects that
 * come or go meanwhile may be left out or named. visit returns 0 to go on, -1 (with *err) to end.
 */
typedef int store_list_fn(const char *name, void *arg, struct vm_error **err);
int store_list(struct store *s, enum store_area area, const char *prefix, store_list_fn *visit,
               void *arg, struct vm_error **err);

struct store_space {
    uint64_t total, available; /* bytes of the file system, or of the cluster, raw: before it makes copies */
};
int store_space(struct store *s, struct store_space *ret_space, struct vm_error **err);

/*
 * Ballast is space set aside that a collection gives free first, so that deleting works on a
 * full disk. take: give it free (0 also if there is none). refill: set it aside again; NO_SPACE if
 * there is none to set aside, which is for the caller to ignore.
 */
int store_ballast_take(struct store *s, struct vm_error **err);
int store_ballast_refill(struct store *s, struct vm_error **err);

DEFINE_CLEANUP(store, struct store *, store_close)

/*
 * Single operations, as batches of one. The result, STORE_FAILED with *err; what cannot be read
 * fails as CORRUPT.
 */
enum store_result store_create(struct store *s, enum store_area area, const char *name,
                               const void *data, size_t len, struct vm_error **err);
/*
 * As store_create, with the content of a buffer, which is empty afterwards whatever the result. A
 * driver that has to copy it (librados does) frees the buffer's memory before it waits, so that no
 * pack is in memory twice.
 */
enum store_result store_create_given(struct store *s, enum store_area area, const char *name,
                                     struct buffer *content, struct vm_error **err);
enum store_result store_remove(struct store *s, enum store_area area, const char *name,
                               struct vm_error **err);
enum store_result store_read(struct store *s, enum store_area area, const char *name,
                             uint64_t offset, void *out, size_t len, size_t *ret_len,
                             struct vm_error **err);
/* The whole object, at most max bytes (more is CORRUPT), appended to *out. */
enum store_result store_read_all(struct store *s, enum store_area area, const char *name,
                                 size_t max, struct buffer *out, struct vm_error **err);
/* Append the value of one key to *out; nothing if there is no such key. */
enum store_result store_get(struct store *s, const char *name, const char *key, struct buffer *out,
                            struct vm_error **err);

/*
 * Call visit for every pair with that prefix (NULL: any) of n maps, in each map in order of the
 * keys; `map` is its place in `names`. Several maps are read at once, at most STORE_KEYS_MAX pairs of
 * all together. MISSING, with its place, for a map that is not there; where ret_missing is NULL such
 * a map is passed over. visit may run operations of its own.
 */
typedef int store_pairs_fn(size_t map, const struct store_pair *pair, void *arg,
                           struct vm_error **err);
enum store_result store_scan_many(struct store *s, const char *const *names, size_t n,
                                  const char *prefix, store_pairs_fn *visit, void *arg,
                                  size_t *ret_missing, struct vm_error **err);
/* The same of one map; MISSING if it is not there. */
typedef int store_pair_fn(const struct store_pair *pair, void *arg, struct vm_error **err);
enum store_result store_scan(struct store *s, const char *name, const char *prefix,
                             store_pair_fn *visit, void *arg, struct vm_error **err);

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A rados: repository: packs in the data pool, everything else in the pool of the URL, all in the
 * namespace of the URL. The pool's "full try" flag makes writes to a full cluster fail with ENOSPC,
 * where they would otherwise hang, and lets removals through.
 */
#include "repo/store_driver.h"

#include <errno.h>
#include <pthread.h>
#include <rados/librados.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/*
 * SETS_IN_FLIGHT: librados has each value that is set in a page of its own until the operation ends.
 */
enum { IN_FLIGHT = 64, SETS_IN_FLIGHT = 512, BALLAST_OBJECTS = 4, BALLAST_SIZE = 4 << 20, LIST_STEP = 256 };

struct store_rados {
    struct store store;
    rados_t cluster;
    rados_ioctx_t meta; /* blobs and maps */
    rados_ioctx_t data; /* packs; the same as meta without a data pool of its own */
    char *name_space;
    pthread_mutex_t copying;
};

static struct store_rados *rados_of(struct store *s)
{
    return (struct store_rados *)s;
}

static int fail(struct vm_error **err, int rc, const char *what, const char *name)
{
    int errnum = -rc;
    error_errno(err, errnum, "%s %s", what, name);
    if (errnum == ESHUTDOWN || errnum == ENOTCONN)
        error_set_kind(err, VM_ERROR_UNREACHABLE);
    return -1;
}

/* ---- one operation in flight ---- */

struct flight {
    struct store_op *op;
    rados_completion_t done;
    rados_write_op_t write;
    rados_read_op_t read;
    rados_omap_iter_t iter;
    unsigned char more;
    int rc; /* of the sub-operation that reads keys */
    uint64_t size;
    time_t mtime;
};

static rados_ioctx_t pool_of(const struct store_rados *r, enum store_area area)
{
    return area == STORE_PACK ? r->data : r->meta;
}

/* librados has a copy afterwards; one copy at a time, so that one only is there twice. */
static void copy_content(struct store_rados *r, struct flight *f)
{
    SCOPE_LOCK(&r->copying);
    rados_write_op_write_full(f->write, f->op->data, f->op->len);
    if (f->op->given)
        buffer_finish(f->op->given);
}

static int start_content(struct store_rados *r, struct flight *f)
{
    struct store_op *op = f->op;
    f->write = rados_create_write_op();
    rados_write_op_create(f->write, LIBRADOS_CREATE_EXCLUSIVE, NULL);
    copy_content(r, f);
    return rados_aio_write_op_operate(f->write, pool_of(r, op->area), f->done, op->name, NULL, 0);
}

static int start_get(struct store_rados *r, struct flight *f)
{
    struct store_op *op = f->op;
    const char *keys[STORE_KEYS_MAX];
    size_t lens[STORE_KEYS_MAX];
    for (size_t i = 0; i < op->n_pairs; i++) {
        keys[i] = op->pairs[i].key;
        lens[i] = strlen(keys[i]);
    }
    f->read = rados_create_read_op();
    rados_read_op_omap_get_vals_by_keys2(f->read, keys, op->n_pairs, lens, &f->iter, &f->rc);
    return rados_aio_read_op_operate(f->read, r->meta, f->done, op->name, 0);
}

static int start_scan(struct store_rados *r, struct flight *f)
{
    struct store_op *op = f->op;
    f->read = rados_create_read_op();
    rados_read_op_omap_get_vals2(f->read, op->after ? op->after : "", op->prefix ? op->prefix : "",
                                 op->max, &f->iter, &f->more, &f->rc);
    return rados_aio_read_op_operate(f->read, r->meta, f->done, op->name, 0);
}

static void add_sets(rados_write_op_t write, const struct store_op *op)
{
    const char *keys[STORE_KEYS_MAX], *values[STORE_KEYS_MAX];
    size_t key_lens[STORE_KEYS_MAX], lens[STORE_KEYS_MAX];
    for (size_t i = 0; i < op->n_erases; i++) {
        keys[i] = op->erases[i];
        key_lens[i] = strlen(keys[i]);
    }
    if (op->n_erases)
        rados_write_op_omap_rm_keys2(write, keys, key_lens, op->n_erases);
    for (size_t i = 0; i < op->n_sets; i++) {
        keys[i] = op->sets[i].key;
        key_lens[i] = strlen(keys[i]);
        values[i] = op->sets[i].value;
        lens[i] = op->sets[i].len;
    }
    if (op->n_sets)
        rados_write_op_omap_set2(write, keys, values, key_lens, lens, op->n_sets);
}

static int start_update(struct store_rados *r, struct flight *f)
{
    struct store_op *op = f->op;
    f->write = rados_create_write_op();
    if (op->presence == STORE_PRESENT)
        rados_write_op_assert_exists(f->write);
    else
        rados_write_op_create(f->write, op->presence == STORE_NEW ? LIBRADOS_CREATE_EXCLUSIVE
                                                                  : LIBRADOS_CREATE_IDEMPOTENT,
                              NULL);
    for (size_t i = 0; i < op->n_compares; i++) {
        const struct store_pair *c = &op->compares[i];
        rados_write_op_omap_cmp2(f->write, c->key, LIBRADOS_CMPXATTR_OP_EQ, c->len ? c->value : "",
                                 strlen(c->key), c->len, NULL);
    }
    add_sets(f->write, op);
    return rados_aio_write_op_operate(f->write, r->meta, f->done, op->name, NULL, 0);
}

static int start(struct store_rados *r, struct flight *f)
{
    struct store_op *op = f->op;
    int rc = rados_aio_create_completion2(NULL, NULL, &f->done);
    if (rc < 0)
        return rc;
    switch (op->kind) {
    case STORE_CREATE:
        return start_content(r, f);
    case STORE_READ:
        return rados_aio_read(pool_of(r, op->area), op->name, f->done, op->out, op->len,
                              op->offset);
    case STORE_SIZE:
        return rados_aio_stat(pool_of(r, op->area), op->name, f->done, &f->size, &f->mtime);
    case STORE_REMOVE:
        return rados_aio_remove(pool_of(r, op->area), op->name, f->done);
    case STORE_GET:
        return start_get(r, f);
    case STORE_SCAN:
        return start_scan(r, f);
    case STORE_UPDATE:
        return start_update(r, f);
    }
    return -EINVAL;
}

static int take_pairs(struct flight *f, struct vm_error **err)
{
    for (;;) {
        char *key, *value;
        size_t key_len, len;
        int rc = rados_omap_get_next2(f->iter, &key, &value, &key_len, &len);
        if (rc < 0)
            return fail(err, rc, "cannot read keys of", f->op->name);
        if (!key)
            break;
        if (store_answer_pair(f->op, key, key_len, value, len, err) < 0)
            return -1;
    }
    f->op->ret_more = f->more;
    return store_answer_done(f->op, err);
}

/* What librados answered, as a result of the interface. */
static int take_answer(struct flight *f, int rc, struct vm_error **err)
{
    struct store_op *op = f->op;
    if (rc >= 0 && f->iter && f->rc < 0)
        rc = f->rc;
    if (rc == -ENOENT) {
        op->result = STORE_MISSING;
        return 0;
    }
    if (rc == -EEXIST && (op->kind == STORE_CREATE || op->kind == STORE_UPDATE)) {
        op->result = STORE_EXISTS;
        return 0;
    }
    if (rc == -ECANCELED && op->kind == STORE_UPDATE) {
        op->result = STORE_MISMATCH;
        return 0;
    }
    if (rc < 0 && store_answer_unreadable(op, -rc))
        return 0;
    if (rc < 0)
        return fail(err, rc, op->kind == STORE_READ || op->kind >= STORE_GET ? "cannot access"
                                                                            : "cannot change",
                    op->name);
    op->ret_len = op->kind == STORE_READ ? (size_t)rc : 0;
    op->ret_size = f->size;
    if (f->iter && take_pairs(f, err) < 0)
        return -1;
    op->result = STORE_DONE;
    return 0;
}

static void finish(struct flight *f)
{
    if (f->iter)
        rados_omap_get_end(f->iter);
    if (f->write)
        rados_release_write_op(f->write);
    if (f->read)
        rados_release_read_op(f->read);
    if (f->done)
        rados_aio_release(f->done);
}

static int rados_run_some(struct store_rados *r, struct store_op *ops, size_t n,
                          struct vm_error **ret_first)
{
    struct flight flights[IN_FLIGHT];
    int rcs[IN_FLIGHT];
    memset(flights, 0, n * sizeof(*flights));
    for (size_t i = 0; i < n; i++) {
        flights[i].op = &ops[i];
        rcs[i] = start(r, &flights[i]);
    }
    for (size_t i = 0; i < n; i++) {
        struct flight *f = &flights[i];
        struct vm_error *one = NULL;
        if (rcs[i] >= 0) {
            rados_aio_wait_for_complete(f->done);
            rcs[i] = rados_aio_get_return_value(f->done);
        }
        if (take_answer(f, rcs[i], &one) < 0)
            error_propagate(*ret_first ? NULL : ret_first, one);
        finish(f);
    }
    return *ret_first ? -1 : 0;
}

/* How many operations from the first on run together. */
static size_t step_size(const struct store_op *ops, size_t n)
{
    size_t step = 1, sets = ops[0].n_sets;
    while (step < n && step < IN_FLIGHT && sets + ops[step].n_sets <= SETS_IN_FLIGHT)
        sets += ops[step++].n_sets;
    return step;
}

static int rados_run(struct store *s, struct store_op *ops, size_t n, struct vm_error **err)
{
    struct vm_error *first = NULL;
    for (size_t i = 0, step; i < n; i += step) {
        step = step_size(ops + i, n - i);
        rados_run_some(rados_of(s), ops + i, step, &first);
    }
    return first ? error_propagate(err, first) : 0;
}

/* ---- listing ---- */

static int visit_items(const rados_object_list_item *items, int n, const char *prefix,
                       store_list_fn *visit, void *arg, struct vm_error **err)
{
    for (int i = 0; i < n; i++) {
        char name[STORE_NAME_MAX + 1];
        if (items[i].oid_length > STORE_NAME_MAX)
            continue;
        memcpy(name, items[i].oid, items[i].oid_length);
        name[items[i].oid_length] = 0;
        if (!strncmp(name, prefix, strlen(prefix)) && visit(name, arg, err) < 0)
            return -1;
    }
    return 0;
}

static int rados_list(struct store *s, enum store_area area, const char *prefix,
                      store_list_fn *visit, void *arg, struct vm_error **err)
{
    rados_ioctx_t pool = pool_of(rados_of(s), area);
    rados_object_list_cursor at = rados_object_list_begin(pool), end = rados_object_list_end(pool);
    rados_object_list_cursor next = rados_object_list_begin(pool); /* librados fills it in */
    int result = 0;
    while (!result && !rados_object_list_is_end(pool, at)) {
        rados_object_list_item items[LIST_STEP];
        int n = rados_object_list(pool, at, end, LIST_STEP, NULL, 0, items, &next);
        if (n < 0) {
            result = fail(err, n, "cannot list", store_text(s));
            break;
        }
        result = visit_items(items, n, prefix, visit, arg, err);
        rados_object_list_free((size_t)n, items);
        rados_object_list_cursor passed = at;
        at = next;
        next = passed;
    }
    rados_object_list_cursor_free(pool, next);
    rados_object_list_cursor_free(pool, at);
    rados_object_list_cursor_free(pool, end);
    return result;
}

static int rados_space(struct store *s, struct store_space *ret_space, struct vm_error **err)
{
    struct rados_cluster_stat_t stat;
    int rc = rados_cluster_stat(rados_of(s)->cluster, &stat);
    if (rc < 0)
        return fail(err, rc, "cannot tell the space of", store_text(s));
    *ret_space = (struct store_space){.total = stat.kb * 1024, .available = stat.kb_avail * 1024};
    return 0;
}

/* ---- ballast ---- */

static void ballast_name(int i, char out[32])
{
    snprintf(out, 32, "ballast.%d", i);
}

static int rados_ballast_take(struct store *s, struct vm_error **err)
{
    for (int i = 0; i < BALLAST_OBJECTS; i++) {
        char name[32];
        ballast_name(i, name);
        if (store_remove(s, STORE_BLOB, name, err) == STORE_FAILED)
            return -1;
    }
    return 0;
}

static int rados_ballast_refill(struct store *s, struct vm_error **err)
{
    char names[BALLAST_OBJECTS][32];
    struct store_op sizes[BALLAST_OBJECTS];
    for (int i = 0; i < BALLAST_OBJECTS; i++) {
        ballast_name(i, names[i]);
        sizes[i] = (struct store_op){.kind = STORE_SIZE, .area = STORE_BLOB, .name = names[i]};
    }
    if (store_run(s, sizes, BALLAST_OBJECTS, err) < 0)
        return -1;
    cleanup_free void *zeros = calloc(1, BALLAST_SIZE);
    if (!zeros)
        return error_nomem(err);
    for (int i = 0; i < BALLAST_OBJECTS; i++)
        if (sizes[i].result == STORE_MISSING &&
            store_create(s, STORE_BLOB, names[i], zeros, BALLAST_SIZE, err) == STORE_FAILED)
            return -1;
    return 0;
}

/* ---- opening ---- */

static rados_ioctx_t open_pool(struct store_rados *r, const char *pool, struct vm_error **err)
{
    rados_ioctx_t io;
    int rc = rados_ioctx_create(r->cluster, pool, &io);
    if (rc == -ENOENT) {
        error_set(err, VM_ERROR_NOT_FOUND, "the cluster has no pool \"%s\"", pool);
        return NULL;
    }
    if (rc < 0) {
        fail(err, rc, "cannot open pool", pool);
        return NULL;
    }
    rados_ioctx_set_namespace(io, r->name_space);
    rados_set_pool_full_try(io);
    return io;
}

static int rados_set_data_pool(struct store *s, const char *pool, struct vm_error **err)
{
    struct store_rados *r = rados_of(s);
    rados_ioctx_t io = open_pool(r, pool, err);
    if (!io)
        return error_wrap(err, "data pool");
    if (r->data != r->meta)
        rados_ioctx_destroy(r->data);
    r->data = io;
    return 0;
}

static void rados_close(struct store *s)
{
    struct store_rados *r = rados_of(s);
    if (r->data && r->data != r->meta)
        rados_ioctx_destroy(r->data);
    if (r->meta)
        rados_ioctx_destroy(r->meta);
    if (r->cluster)
        rados_shutdown(r->cluster);
    free(r->name_space);
    pthread_mutex_destroy(&r->copying);
    free(r);
}

static const struct store_driver rados_driver = {
    .close = rados_close,
    .set_data_pool = rados_set_data_pool,
    .run = rados_run,
    .list = rados_list,
    .space = rados_space,
    .ballast_take = rados_ballast_take,
    .ballast_refill = rados_ballast_refill,
};

/* Limits of a wait. An operation that timed out may still happen: callers read back. */
static int set_limits(rados_t cluster, struct vm_error **err)
{
    static const char *const limits[][2] = {
        {"client_mount_timeout", "30"},
        {"rados_mon_op_timeout", "30"},
        {"rados_osd_op_timeout", "120"},
    };
    for (size_t i = 0; i < sizeof(limits) / sizeof(*limits); i++) {
        int rc = rados_conf_set(cluster, limits[i][0], limits[i][1]);
        if (rc < 0)
            return fail(err, rc, "cannot set", limits[i][0]);
    }
    return 0;
}

static int connect_cluster(struct store_rados *r, const struct repo_url *url, struct vm_error **err)
{
    int rc = rados_create(&r->cluster, url->id);
    if (rc < 0) {
        r->cluster = NULL;
        return fail(err, rc, "cannot prepare Ceph user", url->id);
    }
    rc = rados_conf_read_file(r->cluster, url->conf);
    if (rc < 0)
        return fail(err, rc, "cannot read Ceph's configuration",
                    url->conf ? url->conf : "/etc/ceph/ceph.conf");
    if (set_limits(r->cluster, err) < 0)
        return -1;
    rc = rados_connect(r->cluster);
    if (rc < 0) {
        rados_shutdown(r->cluster);
        r->cluster = NULL;
    }
    if (rc == -ETIMEDOUT)
        return error_set(err, VM_ERROR_UNREACHABLE, "no monitor of the Ceph cluster answers");
    if (rc == -ENOENT)
        return error_set(err, VM_ERROR_DENIED, "there is no key of Ceph user \"%s\"", url->id);
    return rc < 0 ? fail(err, rc, "cannot connect to Ceph as", url->id) : 0;
}

struct store *store_rados_open(const struct repo_url *url, int flags, struct vm_error **err)
{
    (void)flags;
    struct store_rados *r = calloc(1, sizeof(*r));
    if (!r) {
        error_nomem(err);
        return NULL;
    }
    pthread_mutex_init(&r->copying, NULL);
    r->store.driver = &rados_driver;
    r->name_space = strdup(url->name_space);
    if (!r->name_space || connect_cluster(r, url, err) < 0 ||
        !(r->meta = r->data = open_pool(r, url->pool, err))) {
        if (!r->name_space)
            error_nomem(err);
        rados_close(&r->store);
        return NULL;
    }
    return &r->store;
}

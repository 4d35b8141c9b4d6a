/* SPDX-License-Identifier: Apache-2.0 */
#include "repo/store_driver.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct store *store_open(const struct repo_url *url, int flags, struct vm_error **err)
{
    struct store *s = url->scheme == REPO_URL_DIR ? store_dir_open(url, flags, err)
                                                  : store_rados_open(url, flags, err);
    if (!s)
        return NULL;
    s->text = strdup(url->text);
    if (!s->text) {
        store_close(s);
        error_nomem(err);
        return NULL;
    }
    return s;
}

void store_close(struct store *s)
{
    if (!s)
        return;
    free(s->text);
    s->driver->close(s);
}

const char *store_text(const struct store *s)
{
    return s->text ? s->text : "the repository";
}

int store_set_data_pool(struct store *s, const char *pool, struct vm_error **err)
{
    return s->driver->set_data_pool(s, pool, err);
}

/* ---- checks before a driver sees an operation ---- */

static bool name_is_good(const char *name)
{
    size_t n = strlen(name);
    if (!n || n > STORE_NAME_MAX || name[0] == '.')
        return false;
    for (size_t i = 0; i < n; i++)
        if (name[i] <= ' ' || name[i] == '/' || name[i] == 0x7f)
            return false;
    return true;
}

static bool key_text_is_good(const char *key, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if ((unsigned char)key[i] < ' ')
            return false;
    return n > 0 && n <= STORE_KEY_MAX;
}

static bool key_is_good(const char *key)
{
    return key_text_is_good(key, strlen(key));
}

static int check_pairs(const struct store_pair *pairs, size_t n, size_t min_len,
                       struct vm_error **err)
{
    for (size_t i = 0; i < n; i++) {
        if (!key_is_good(pairs[i].key))
            return error_set(err, VM_ERROR_USAGE, "\"%.80s\" is no key of a map", pairs[i].key);
        if (pairs[i].len < min_len || pairs[i].len > STORE_VALUE_MAX)
            return error_set(err, VM_ERROR_USAGE, "the value of \"%.80s\" has %zu bytes",
                             pairs[i].key, pairs[i].len);
    }
    return 0;
}

static int check_map_op(const struct store_op *op, struct vm_error **err)
{
    if (op->n_pairs > STORE_KEYS_MAX || op->max > STORE_KEYS_MAX ||
        op->n_compares + op->n_sets + op->n_erases > STORE_KEYS_MAX)
        return error_set(err, VM_ERROR_USAGE, "more than %d keys in one operation", STORE_KEYS_MAX);
    for (size_t i = 0; op->kind == STORE_GET && i < op->n_pairs; i++)
        if (!key_is_good(op->pairs[i].key))
            return error_set(err, VM_ERROR_USAGE, "\"%.80s\" is no key of a map", op->pairs[i].key);
    for (size_t i = 0; i < op->n_erases; i++)
        if (!key_is_good(op->erases[i]))
            return error_set(err, VM_ERROR_USAGE, "\"%.80s\" is no key of a map", op->erases[i]);
    if (op->kind == STORE_SCAN && !op->max)
        return error_set(err, VM_ERROR_USAGE, "a scan for no keys");
    if (check_pairs(op->compares, op->n_compares, 0, err) < 0)
        return -1;
    return check_pairs(op->sets, op->n_sets, 1, err);
}

static int check_op(const struct store_op *op, struct vm_error **err)
{
    bool on_map = op->area == STORE_MAP;
    bool map_kind = op->kind >= STORE_GET;
    if (!name_is_good(op->name))
        return error_set(err, VM_ERROR_USAGE, "\"%.80s\" is no name of an object", op->name);
    if (op->kind == STORE_REMOVE)
        return 0;
    if (on_map != map_kind)
        return error_set(err, VM_ERROR_USAGE, "object %s: not an operation of its area", op->name);
    if (map_kind)
        return check_map_op(op, err);
    if (op->kind != STORE_READ && op->len > STORE_OBJECT_MAX)
        return error_set(err, VM_ERROR_USAGE, "object %s: larger than %d bytes", op->name,
                         STORE_OBJECT_MAX);
    return 0;
}

static bool makes_object(const struct store_op *op)
{
    return op->kind == STORE_CREATE ||
           (op->kind == STORE_UPDATE && op->presence != STORE_PRESENT);
}

/* What would make an object cannot miss it: so says Ceph when the pool is gone. */
static int no_place(struct store_op *op, struct vm_error **err)
{
    op->result = STORE_FAILED;
    return error_set(err, VM_ERROR_NOT_FOUND,
                     "cannot make object %s: the pool that it belongs to is gone", op->name);
}

int store_run(struct store *s, struct store_op *ops, size_t n, struct vm_error **err)
{
    for (size_t i = 0; i < n; i++) {
        store_ops_finish(&ops[i], 1);
        ops[i].result = STORE_FAILED;
        ops[i].ret_len = 0;
    }
    for (size_t i = 0; i < n; i++)
        if (check_op(&ops[i], err) < 0)
            return -1;
    if (!n || s->driver->run(s, ops, n, err) < 0)
        return n ? -1 : 0;
    for (size_t i = 0; i < n; i++)
        if (ops[i].result == STORE_MISSING && makes_object(&ops[i]))
            return no_place(&ops[i], err);
    return 0;
}

void store_ops_finish(struct store_op *ops, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        buffer_finish(&ops[i].arena);
        free(ops[i].ret_pairs);
        ops[i].ret_pairs = NULL;
        ops[i].n_ret_pairs = 0;
    }
}

/* ---- answers ---- */

bool store_answer_unreadable(struct store_op *op, int errnum)
{
    if (errnum != EIO || (op->kind != STORE_READ && op->kind != STORE_SIZE))
        return false;
    op->result = STORE_UNREADABLE;
    return true;
}

/* In the arena: le32 key length, le32 value length, key, NUL, value; one after the other. */
int store_answer_pair(struct store_op *op, const char *key, size_t key_len, const void *value,
                      size_t len, struct vm_error **err)
{
    if (!key_text_is_good(key, key_len) || !len || len > STORE_VALUE_MAX)
        return error_set(err, VM_ERROR_CORRUPT,
                         "map %s has a key or value that vmmig cannot have written", op->name);
    buffer_put_le32(&op->arena, (uint32_t)key_len);
    buffer_put_le32(&op->arena, (uint32_t)len);
    buffer_put(&op->arena, key, key_len);
    buffer_put_u8(&op->arena, 0);
    buffer_put(&op->arena, value, len);
    op->n_ret_pairs++;
    return op->arena.failed ? error_nomem(err) : 0;
}

static int compare_pairs(const void *a, const void *b)
{
    return strcmp(((const struct store_pair *)a)->key, ((const struct store_pair *)b)->key);
}

int store_answer_done(struct store_op *op, struct vm_error **err)
{
    size_t n = op->n_ret_pairs;
    struct store_pair *found = calloc(n + 1, sizeof(*found));
    if (!found)
        return error_nomem(err);
    struct cursor c = cursor_init(op->arena.data, op->arena.len);
    for (size_t i = 0; i < n; i++) {
        size_t key_len = cursor_le32(&c), len = cursor_le32(&c);
        found[i].key = (const char *)cursor_take(&c, key_len + 1);
        found[i].value = cursor_take(&c, len);
        found[i].len = len;
    }
    if (op->kind == STORE_SCAN) {
        op->ret_pairs = found;
        return 0;
    }
    qsort(found, n, sizeof(*found), compare_pairs);
    for (size_t i = 0; i < op->n_pairs; i++) {
        const struct store_pair *hit =
            bsearch(&op->pairs[i], found, n, sizeof(*found), compare_pairs);
        op->pairs[i].value = hit ? hit->value : NULL;
        op->pairs[i].len = hit ? hit->len : 0;
    }
    free(found);
    op->n_ret_pairs = 0;
    return 0;
}

/* ---- the rest of the interface ---- */

int store_list(struct store *s, enum store_area area, const char *prefix, store_list_fn *visit,
               void *arg, struct vm_error **err)
{
    return s->driver->list(s, area, prefix, visit, arg, err);
}

int store_space(struct store *s, struct store_space *ret_space, struct vm_error **err)
{
    return s->driver->space(s, ret_space, err);
}

int store_ballast_take(struct store *s, struct vm_error **err)
{
    return s->driver->ballast_take(s, err);
}

int store_ballast_refill(struct store *s, struct vm_error **err)
{
    return s->driver->ballast_refill(s, err);
}

static enum store_result run_one(struct store *s, struct store_op *op, struct vm_error **err)
{
    store_run(s, op, 1, err);
    if (op->result == STORE_UNREADABLE) {
        op->result = STORE_FAILED;
        error_set(err, VM_ERROR_CORRUPT, "the disk cannot read %s", op->name);
    }
    return op->result;
}

enum store_result store_create(struct store *s, enum store_area area, const char *name,
                               const void *data, size_t len, struct vm_error **err)
{
    struct store_op op = {
        .kind = STORE_CREATE, .area = area, .name = name, .data = data, .len = len};
    return run_one(s, &op, err);
}

enum store_result store_create_given(struct store *s, enum store_area area, const char *name,
                                     struct buffer *content, struct vm_error **err)
{
    struct store_op op = {.kind = STORE_CREATE, .area = area, .name = name, .data = content->data,
                          .len = content->len, .given = content};
    enum store_result result = run_one(s, &op, err);
    buffer_reset(content);
    return result;
}

enum store_result store_remove(struct store *s, enum store_area area, const char *name,
                               struct vm_error **err)
{
    struct store_op op = {.kind = STORE_REMOVE, .area = area, .name = name};
    return run_one(s, &op, err);
}

enum store_result store_read(struct store *s, enum store_area area, const char *name,
                             uint64_t offset, void *out, size_t len, size_t *ret_len,
                             struct vm_error **err)
{
    struct store_op op = {.kind = STORE_READ, .area = area, .name = name, .offset = offset,
                          .out = out, .len = len};
    enum store_result result = run_one(s, &op, err);
    if (result == STORE_DONE)
        *ret_len = op.ret_len;
    return result;
}

enum store_result store_read_all(struct store *s, enum store_area area, const char *name,
                                 size_t max, struct buffer *out, struct vm_error **err)
{
    struct store_op size = {.kind = STORE_SIZE, .area = area, .name = name};
    if (run_one(s, &size, err) != STORE_DONE)
        return size.result;
    if (size.ret_size > max) {
        error_set(err, VM_ERROR_CORRUPT, "object %s has %llu bytes, more than the %zu it may have",
                  name, (unsigned long long)size.ret_size, max);
        return STORE_FAILED;
    }
    size_t start = out->len, got = 0;
    if (!size.ret_size)
        return STORE_DONE;
    uint8_t *to = buffer_grow(out, size.ret_size);
    if (!to) {
        error_nomem(err);
        return STORE_FAILED;
    }
    enum store_result result = store_read(s, area, name, 0, to, size.ret_size, &got, err);
    out->len = start + (result == STORE_DONE ? got : 0);
    return result;
}

enum store_result store_get(struct store *s, const char *name, const char *key, struct buffer *out,
                            struct vm_error **err)
{
    struct store_pair pair = {.key = key};
    struct store_op op = {
        .kind = STORE_GET, .area = STORE_MAP, .name = name, .pairs = &pair, .n_pairs = 1};
    enum store_result result = run_one(s, &op, err);
    if (result == STORE_DONE)
        buffer_put(out, pair.value, pair.len);
    store_ops_finish(&op, 1);
    if (out->failed) {
        error_nomem(err);
        return STORE_FAILED;
    }
    return result;
}

/* ---- scans ---- */

enum { SCANS_MAX = 64 };

/* How far the scan of one map has come. */
struct place {
    size_t map;
    bool begun;
    char after[STORE_KEY_MAX + 1];
};

struct scan {
    struct store *store;
    const char *const *names;
    size_t n_names, next; /* the first that has not begun */
    const char *prefix;
    store_pairs_fn *visit;
    void *arg;
    size_t *ret_missing;
    size_t n; /* of the maps that are being read */
    struct place places[SCANS_MAX];
    struct store_op ops[SCANS_MAX];
};

static void begin_scans(struct scan *scan)
{
    for (; scan->n < SCANS_MAX && scan->next < scan->n_names; scan->next++)
        scan->places[scan->n++] = (struct place){.map = scan->next};
    for (size_t i = 0; i < scan->n; i++) {
        const struct place *p = &scan->places[i];
        scan->ops[i] = (struct store_op){.kind = STORE_SCAN, .area = STORE_MAP,
                                         .name = scan->names[p->map], .prefix = scan->prefix,
                                         .after = p->begun ? p->after : NULL,
                                         .max = STORE_KEYS_MAX / scan->n};
    }
}

static enum store_result take_scan(struct scan *scan, size_t i, struct vm_error **err)
{
    struct place *p = &scan->places[i];
    const struct store_op *op = &scan->ops[i];
    if (op->result == STORE_MISSING && scan->ret_missing) {
        *scan->ret_missing = p->map;
        return STORE_MISSING;
    }
    for (size_t k = 0; k < op->n_ret_pairs; k++)
        if (scan->visit(p->map, &op->ret_pairs[k], scan->arg, err) < 0)
            return STORE_FAILED;
    p->begun = true;
    if (op->n_ret_pairs)
        strcpy(p->after, op->ret_pairs[op->n_ret_pairs - 1].key);
    return STORE_DONE;
}

/* One step of all maps that are being read; those that have ended make room for others. */
static enum store_result scan_step(struct scan *scan, struct vm_error **err)
{
    enum store_result result = STORE_DONE;
    begin_scans(scan);
    size_t n = scan->n;
    if (store_run(scan->store, scan->ops, n, err) < 0)
        result = STORE_FAILED;
    scan->n = 0;
    for (size_t i = 0; i < n && result == STORE_DONE; i++) {
        result = take_scan(scan, i, err);
        if (scan->ops[i].n_ret_pairs && scan->ops[i].ret_more)
            scan->places[scan->n++] = scan->places[i];
    }
    store_ops_finish(scan->ops, n);
    return result;
}

enum store_result store_scan_many(struct store *s, const char *const *names, size_t n,
                                  const char *prefix, store_pairs_fn *visit, void *arg,
                                  size_t *ret_missing, struct vm_error **err)
{
    struct scan scan = {.store = s, .names = names, .n_names = n, .prefix = prefix,
                        .visit = visit, .arg = arg, .ret_missing = ret_missing};
    enum store_result result = STORE_DONE;
    while (result == STORE_DONE && (scan.n || scan.next < n))
        result = scan_step(&scan, err);
    return result;
}

struct one_map {
    store_pair_fn *visit;
    void *arg;
};

static int visit_one_map(size_t map, const struct store_pair *pair, void *arg,
                         struct vm_error **err)
{
    struct one_map *one = arg;
    (void)map;
    return one->visit(pair, one->arg, err);
}

enum store_result store_scan(struct store *s, const char *name, const char *prefix,
                             store_pair_fn *visit, void *arg, struct vm_error **err)
{
    struct one_map one = {visit, arg};
    size_t missing;
    return store_scan_many(s, &name, 1, prefix, visit_one_map, &one, &missing, err);
}

/* SPDX-License-Identifier: Apache-2.0 */
#include "repo/catalogue.h"
#include "repo/names.h"

#include "base/clock.h"
#include "base/fault.h"
#include "base/log.h"

#include <stdlib.h>

#define EPOCH_KEY "epoch"
#define WRITERS_KEY "writers" /* of map "repository": numbers given out so far */

enum { TRIES = 64, SHARD_NAME_SIZE = 8, KEY_SIZE = IMAGE_NAME_MAX + 8 };

/* ---- names of shards and keys ---- */

static unsigned shard_of(const char *name)
{
    uint32_t h = 2166136261u;
    for (; *name; name++)
        h = (h ^ (unsigned char)*name) * 16777619u;
    return h % CATALOGUE_SHARDS;
}

static const char *shard_name(unsigned shard, char out[SHARD_NAME_SIZE])
{
    snprintf(out, SHARD_NAME_SIZE, "cat.%02x", shard & 0xff);
    return out;
}

static const char *name_key(const char *name, char out[KEY_SIZE])
{
    snprintf(out, KEY_SIZE, "n:%s", name);
    return out;
}

static const char *writer_key(uint64_t number, char out[KEY_SIZE])
{
    snprintf(out, KEY_SIZE, "w:%016" PRIx64, number);
    return out;
}

int catalogue_init(struct store *s, struct vm_error **err)
{
    char names[CATALOGUE_SHARDS][SHARD_NAME_SIZE];
    struct store_op ops[CATALOGUE_SHARDS];
    uint8_t first[8];
    put_le64(first, 1);
    struct store_pair set = {EPOCH_KEY, first, sizeof(first)};
    for (unsigned i = 0; i < CATALOGUE_SHARDS; i++)
        ops[i] = (struct store_op){.kind = STORE_UPDATE, .area = STORE_MAP,
                                   .name = shard_name(i, names[i]), .presence = STORE_NEW,
                                   .sets = &set, .n_sets = 1};
    return store_run(s, ops, CATALOGUE_SHARDS, err);
}

/* ---- reading ---- */

static int lost_shard(const char *shard, struct vm_error **err)
{
    return error_set(err, VM_ERROR_CORRUPT, "part %s of the catalogue is lost", shard);
}

/* Values of keys of one shard, appended to out[i]. */
static int get_values(struct store *s, unsigned shard, const char *const *keys, size_t n,
                      struct buffer *out, struct vm_error **err)
{
    char name[SHARD_NAME_SIZE];
    struct store_pair pairs[4];
    for (size_t i = 0; i < n; i++)
        pairs[i] = (struct store_pair){.key = keys[i]};
    struct store_op op = {.kind = STORE_GET, .area = STORE_MAP, .name = shard_name(shard, name),
                          .pairs = pairs, .n_pairs = n};
    if (store_run(s, &op, 1, err) < 0)
        return -1;
    bool failed = false;
    for (size_t i = 0; i < n && op.result == STORE_DONE; i++) {
        buffer_reset(&out[i]);
        buffer_put(&out[i], pairs[i].value, pairs[i].len);
        failed |= out[i].failed;
    }
    enum store_result result = op.result;
    store_ops_finish(&op, 1);
    if (result != STORE_DONE)
        return lost_shard(name, err);
    return failed ? error_nomem(err) : 0;
}

static int get_value(struct store *s, unsigned shard, const char *key, struct buffer *out,
                     struct vm_error **err)
{
    return get_values(s, shard, &key, 1, out, err);
}

static int not_found(const char *name, struct vm_error **err)
{
    return error_set(err, VM_ERROR_NOT_FOUND, "the repository has no image %s", name);
}

int catalogue_find(struct store *s, const char *name, struct image *ret_image,
                   struct vm_error **err)
{
    char key[KEY_SIZE];
    cleanup_buffer struct buffer value = {0};
    if (image_name_check(name, err) < 0 ||
        get_value(s, shard_of(name), name_key(name, key), &value, err) < 0)
        return -1;
    if (!value.len)
        return not_found(name, err);
    return image_read(name, value.data, value.len, ret_image, err);
}

struct listing {
    catalogue_visit_fn *visit;
    void *arg;
    struct image image;
};

static int list_pair(const struct store_pair *pair, void *arg, struct vm_error **err)
{
    struct listing *l = arg;
    if (image_read(pair->key + 2, pair->value, pair->len, &l->image, err) < 0)
        return -1;
    return l->visit(&l->image, l->arg, err);
}

int catalogue_list(struct store *s, catalogue_visit_fn *visit, void *arg, struct vm_error **err)
{
    cleanup_free struct listing *l = calloc(1, sizeof(*l));
    if (!l)
        return error_nomem(err);
    l->visit = visit;
    l->arg = arg;
    for (unsigned i = 0; i < CATALOGUE_SHARDS; i++) {
        char name[SHARD_NAME_SIZE];
        enum store_result r = store_scan(s, shard_name(i, name), "n:", list_pair, l, err);
        if (r == STORE_MISSING)
            return lost_shard(name, err);
        if (r != STORE_DONE)
            return -1;
    }
    return 0;
}

/* ---- guarded updates ---- */

struct change {
    unsigned shard;
    struct store_pair compares[4];
    size_t n_compares;
    struct store_pair set;   /* key NULL: none */
    const char *erase;       /* NULL: none */
};

static enum store_result apply(struct store *s, const struct change *c, struct vm_error **err)
{
    char name[SHARD_NAME_SIZE];
    struct store_op op = {.kind = STORE_UPDATE, .area = STORE_MAP,
                          .name = shard_name(c->shard, name), .compares = c->compares,
                          .n_compares = c->n_compares, .sets = &c->set,
                          .n_sets = c->set.key != NULL, .erases = &c->erase,
                          .n_erases = c->erase != NULL};
    store_run(s, &op, 1, err);
    if (op.result == STORE_MISSING) {
        lost_shard(name, err);
        return STORE_FAILED;
    }
    return op.result;
}

static struct store_pair pair_of(const char *key, const struct buffer *value)
{
    return (struct store_pair){key, value ? value->data : NULL, value ? value->len : 0};
}

int catalogue_delete(struct store *s, const char *name, struct vm_error **err)
{
    char key[KEY_SIZE];
    if (image_name_check(name, err) < 0)
        return -1;
    const char *const keys[] = {EPOCH_KEY, name_key(name, key)};
    for (int i = 0; i < TRIES; i++) {
        cleanup_buffer struct buffer epoch = {0}, value = {0};
        struct buffer values[2] = {{0}, {0}};
        int got = get_values(s, shard_of(name), keys, 2, values, err);
        epoch = values[0];
        value = values[1];
        if (got < 0)
            return -1;
        if (!value.len)
            return not_found(name, err);
        struct change c = {.shard = shard_of(name), .n_compares = 2, .erase = key,
                           .compares = {pair_of(EPOCH_KEY, &epoch), pair_of(key, &value)}};
        if (FAULT("repo.delete") == FAULT_ERROR)
            return error_errno(err, fault_errno(), "cannot delete image %s", name);
        enum store_result r = apply(s, &c, err);
        (void)FAULT("repo.deleted");
        if (r == STORE_DONE)
            return 0;
        if (r == STORE_FAILED)
            return -1;
    }
    return error_set(err, VM_ERROR_CONFLICT, "image %s changes all the time; try again", name);
}

/* ---- registrations ---- */

struct registration {
    struct store *store;
    uint64_t number;
    char name[IMAGE_NAME_MAX + 1];
    char key[KEY_SIZE];  /* w:NUMBER */
    struct buffer epoch; /* as it was acknowledged */
    struct buffer value; /* of the registration in the shard of the name */
    unsigned parent_shard;
    bool has_parent_shard; /* another one than that of the name */
    struct buffer parent_value;
    bool ended;
};

uint64_t registration_number(const struct registration *r)
{
    return r->number;
}

static int next_number(struct store *s, uint64_t *ret_number, struct vm_error **err)
{
    for (int i = 0; i < TRIES * TRIES; i++) {
        cleanup_buffer struct buffer was = {0};
        uint8_t next[8];
        if (store_get(s, REPOSITORY_MAP, WRITERS_KEY, &was, err) == STORE_FAILED)
            return -1;
        uint64_t number = was.len == 8 ? get_le64(was.data) : 0;
        if (number >= NUMBER_WRITER_MAX)
            return error_set(err, VM_ERROR_REFUSED, "the repository gave out its last number");
        put_le64(next, number + 1);
        struct store_pair compare = pair_of(WRITERS_KEY, &was), set = {WRITERS_KEY, next, 8};
        struct store_op op = {.kind = STORE_UPDATE, .area = STORE_MAP, .name = REPOSITORY_MAP,
                              .compares = &compare, .n_compares = 1, .sets = &set, .n_sets = 1};
        if (store_run(s, &op, 1, err) < 0)
            return -1;
        if (op.result == STORE_DONE) {
            *ret_number = number + 1;
            return 0;
        }
    }
    return error_set(err, VM_ERROR_CONFLICT, "too many writers begin at once; try again");
}

static void write_registration(const struct buffer *epoch, const struct image *parent,
                               struct buffer *out)
{
    buffer_reset(out);
    buffer_put(out, epoch->data, epoch->len);
    buffer_put_le64(out, (uint64_t)(clock_wall_ns() / NSEC_PER_SEC));
    size_t n = parent ? strlen(parent->name) : 0;
    buffer_put_u8(out, (uint8_t)n);
    if (!parent)
        return;
    buffer_put(out, parent->name, n);
    image_write(parent, out);
}

/* Register in one shard, if the epoch is that of the registration and, where asked, the parent is there. */
static enum store_result register_in(struct registration *r, unsigned shard, struct buffer *value,
                                     const struct image *parent, bool is_target,
                                     struct vm_error **err)
{
    char name[KEY_SIZE], parent_name[KEY_SIZE];
    cleanup_buffer struct buffer parent_value = {0};
    write_registration(&r->epoch, parent, value);
    struct change c = {.shard = shard, .n_compares = 1,
                       .compares = {pair_of(EPOCH_KEY, &r->epoch)}};
    if (is_target)
        c.compares[c.n_compares++] = pair_of(name_key(r->name, name), NULL);
    if (parent) {
        image_write(parent, &parent_value);
        c.compares[c.n_compares++] = pair_of(name_key(parent->name, parent_name), &parent_value);
    }
    if (value->failed || parent_value.failed) {
        error_nomem(err);
        return STORE_FAILED;
    }
    c.set = pair_of(r->key, value);
    return apply(r->store, &c, err);
}

/* Why a registration did not hold: name taken, parent gone, or (1) the epoch went on. */
static int explain(struct registration *r, const struct image *parent, struct vm_error **err)
{
    char key[KEY_SIZE];
    cleanup_buffer struct buffer value = {0};
    if (get_value(r->store, shard_of(r->name), name_key(r->name, key), &value, err) < 0)
        return -1;
    if (value.len)
        return error_set(err, VM_ERROR_CONFLICT, "there is an image %s already", r->name);
    if (parent) {
        cleanup_free struct image *now = malloc(sizeof(*now));
        if (!now)
            return error_nomem(err);
        if (catalogue_find(r->store, parent->name, now, err) < 0)
            return -1;
        if (now->writer != parent->writer)
            return error_set(err, VM_ERROR_NOT_FOUND, "image %s was replaced meanwhile",
                             parent->name);
    }
    return 1;
}

static int unregister_in(struct registration *r, unsigned shard, const struct buffer *value,
                         struct vm_error **err)
{
    struct change c = {.shard = shard, .n_compares = 1, .compares = {pair_of(r->key, value)},
                       .erase = r->key};
    return apply(r->store, &c, err) == STORE_FAILED ? -1 : 0;
}

/* 1: registered; 0: a guard did not hold and nothing is registered; -1. */
static int register_once(struct registration *r, const struct image *parent, struct vm_error **err)
{
    unsigned target = shard_of(r->name);
    if (get_value(r->store, target, EPOCH_KEY, &r->epoch, err) < 0)
        return -1;
    r->has_parent_shard = parent && shard_of(parent->name) != target;
    if (r->has_parent_shard) {
        r->parent_shard = shard_of(parent->name);
        enum store_result done =
            register_in(r, r->parent_shard, &r->parent_value, parent, false, err);
        if (done != STORE_DONE)
            return done == STORE_FAILED ? -1 : 0;
    }
    enum store_result done =
        register_in(r, target, &r->value, r->has_parent_shard ? NULL : parent, true, err);
    if (done == STORE_DONE)
        return 1;
    if (r->has_parent_shard)
        unregister_in(r, r->parent_shard, &r->parent_value, done == STORE_FAILED ? NULL : err);
    return done == STORE_FAILED ? -1 : 0;
}

static void free_registration(struct registration *r)
{
    buffer_finish(&r->epoch);
    buffer_finish(&r->value);
    buffer_finish(&r->parent_value);
    free(r);
}

struct registration *catalogue_register(struct store *s, const char *name,
                                        const struct image *parent, struct vm_error **err)
{
    if (image_name_check(name, err) < 0)
        return NULL;
    struct registration *r = calloc(1, sizeof(*r));
    if (!r) {
        error_nomem(err);
        return NULL;
    }
    r->store = s;
    strcpy(r->name, name);
    int done = next_number(s, &r->number, err) < 0 ? -1 : 0;
    writer_key(r->number, r->key);
    for (int i = 0; !done && i < TRIES; i++) {
        done = register_once(r, parent, err);
        if (!done && explain(r, parent, err) < 0)
            done = -1;
    }
    (void)FAULT("repo.register");
    if (done > 0)
        return r;
    if (!done)
        error_set(err, VM_ERROR_CONFLICT, "the catalogue changes all the time; try again");
    free_registration(r);
    return NULL;
}

/* Is the name ours (1), free (0) or another's (2)? */
static int read_back(struct registration *r, const struct buffer *value, struct vm_error **err)
{
    char key[KEY_SIZE];
    cleanup_buffer struct buffer now = {0};
    if (get_value(r->store, shard_of(r->name), name_key(r->name, key), &now, err) < 0)
        return -1;
    if (!now.len)
        return 0;
    return now.len == value->len && !memcmp(now.data, value->data, now.len) ? 1 : 2;
}

/*
 * The commit's answer did not come. Remove the registration, so that a commit that is still under way
 * fails, then look: whatever is there now stays.
 */
static int resolve_commit(struct registration *r, const struct buffer *value,
                          struct vm_error *cause, struct vm_error **err)
{
    struct vm_error *error = NULL;
    if (unregister_in(r, shard_of(r->name), &r->value, &error) == 0) {
        int there = read_back(r, value, &error);
        if (there == 1) {
            error_free(cause);
            return 0;
        }
        if (there >= 0)
            return error_propagate(err, cause);
    }
    error_free(error);
    error_propagate(err, cause);
    return error_wrap(err, "image %s may or may not be committed", r->name);
}

static int refuse_commit(struct registration *r, const struct buffer *value, struct vm_error **err)
{
    int there = read_back(r, value, err);
    if (there < 0)
        return -1;
    if (there == 1)
        return 0;
    if (there == 2)
        return error_set(err, VM_ERROR_CONFLICT, "there is an image %s already", r->name);
    return error_set(err, VM_ERROR_REFUSED,
                     "the repository's collector took this writer for dead; image %s is not "
                     "committed, begin again",
                     r->name);
}

int catalogue_commit(struct registration *r, const struct image *image, struct vm_error **err)
{
    char key[KEY_SIZE];
    cleanup_buffer struct buffer value = {0};
    image_write(image, &value);
    if (value.failed)
        return error_nomem(err);
    struct change c = {.shard = shard_of(r->name), .n_compares = 3, .erase = r->key,
                       .compares = {pair_of(EPOCH_KEY, &r->epoch), pair_of(r->key, &r->value),
                                    pair_of(name_key(r->name, key), NULL)},
                       .set = pair_of(key, &value)};
    struct vm_error *cause = NULL;
    if (FAULT("repo.commit") == FAULT_ERROR)
        return error_errno(err, fault_errno(), "cannot commit image %s", r->name);
    enum store_result done = apply(r->store, &c, &cause);
    (void)FAULT("repo.committed");
    int result = 0;
    if (done == STORE_FAILED)
        result = resolve_commit(r, &value, cause, err);
    else if (done != STORE_DONE)
        result = refuse_commit(r, &value, err);
    if (result < 0)
        return -1;
    if (r->has_parent_shard)
        unregister_in(r, r->parent_shard, &r->parent_value, NULL);
    r->ended = true;
    return 0;
}

void catalogue_unregister(struct registration *r)
{
    if (!r)
        return;
    cleanup_error struct vm_error *err = NULL;
    if (!r->ended && (unregister_in(r, shard_of(r->name), &r->value, &err) < 0 ||
                      (r->has_parent_shard &&
                       unregister_in(r, r->parent_shard, &r->parent_value, &err) < 0)))
        log_warn("a writer's registration stays behind until it is fenced", "writer=%" PRIu64
                 " error=%s", r->number, log_q(error_message(err)));
    free_registration(r);
}

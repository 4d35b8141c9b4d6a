/* SPDX-License-Identifier: Apache-2.0 */
#include "repo/catalogue.h"
#include "repo/catalogue_shard.h"
#include "repo/names.h"

#include "proto/fields.h"

#include "base/clock.h"
#include "base/fault.h"
#include "base/log.h"

#include <stdlib.h>

enum { RAISE_BATCH = 64 };
_Static_assert(CATALOGUE_SHARDS % RAISE_BATCH == 0, "epochs are raised by whole batches");

#define NUMBER_KEY "number" /* of map "repository": the next number */

int catalogue_init(struct store *s, struct vm_error **err)
{
    char names[CATALOGUE_SHARDS][SHARD_NAME_SIZE];
    struct store_op ops[CATALOGUE_SHARDS];
    uint8_t first[8];
    put_le64(first, 1);
    struct store_pair set = {SHARD_EPOCH, first, sizeof(first)};
    for (unsigned i = 0; i < CATALOGUE_SHARDS; i++)
        ops[i] = (struct store_op){.kind = STORE_UPDATE, .area = STORE_MAP,
                                   .name = shard_name(i, names[i]), .presence = STORE_NEW,
                                   .sets = &set, .n_sets = 1};
    return store_run(s, ops, CATALOGUE_SHARDS, err);
}

int catalogue_next_number(struct store *s, uint64_t *ret_number, struct vm_error **err)
{
    for (int i = 0; i < CATALOGUE_TRIES * CATALOGUE_TRIES; i++) {
        cleanup_buffer struct buffer was = {0};
        uint8_t next[8];
        if (store_get(s, REPOSITORY_MAP, NUMBER_KEY, &was, err) == STORE_FAILED)
            return -1;
        if (was.len && was.len != 8)
            return error_set(err, VM_ERROR_CORRUPT, "the repository's next number is lost");
        uint64_t number = was.len ? get_le64(was.data) : 1;
        if (number > NUMBER_WRITER_MAX)
            return error_set(err, VM_ERROR_REFUSED, "the repository gave out its last number");
        put_le64(next, number + 1);
        struct store_pair compare = shard_pair(NUMBER_KEY, &was), set = {NUMBER_KEY, next, 8};
        struct store_op op = {.kind = STORE_UPDATE, .area = STORE_MAP, .name = REPOSITORY_MAP,
                              .compares = &compare, .n_compares = 1, .sets = &set, .n_sets = 1};
        if (store_run(s, &op, 1, err) < 0)
            return -1;
        if (op.result == STORE_DONE) {
            *ret_number = number;
            return 0;
        }
    }
    return error_set(err, VM_ERROR_CONFLICT, "too many writers begin at once; try again");
}

/* ---- names ---- */

static int not_found(const char *name, struct vm_error **err)
{
    return error_set(err, VM_ERROR_NOT_FOUND, "the repository has no image %s", name);
}

/* The image and the value that says so. */
static int find_value(struct store *s, const char *name, struct image *ret_image,
                      struct buffer *value, struct vm_error **err)
{
    char key[SHARD_KEY_SIZE];
    if (image_name_check(name, err) < 0 ||
        shard_get(s, shard_of(name), shard_name_key(name, key), value, err) < 0)
        return -1;
    return value->len ? image_read(name, value->data, value->len, ret_image, err)
                      : not_found(name, err);
}

int catalogue_find(struct store *s, const char *name, struct image *ret_image,
                   struct vm_error **err)
{
    cleanup_buffer struct buffer value = {0};
    return find_value(s, name, ret_image, &value, err);
}

static bool has_same_roots(const struct image *a, const struct image *b)
{
    bool same = a->n_files == b->n_files;
    for (unsigned i = 0; same && i < a->n_files; i++)
        same = recipe_ref_equal(&a->files[i].root, &b->files[i].root);
    return same;
}

int catalogue_find_again(struct store *s, const struct image *was, struct image *ret_now,
                         enum image_fate *ret_fate, struct vm_error **err)
{
    cleanup_error struct vm_error *problem = NULL;
    *ret_fate = IMAGE_GONE;
    if (catalogue_find(s, was->name, ret_now, &problem) < 0)
        return problem->kind == VM_ERROR_NOT_FOUND ? 0 : error_propagate(err, steal_ptr(&problem));
    if (ret_now->writer == was->writer && ret_now->created_s == was->created_s)
        *ret_fate = has_same_roots(was, ret_now) ? IMAGE_SAME : IMAGE_MOVED;
    return 0;
}

/* An answer did not come: is the entry as it was? Then, or if that cannot be told, the cause counts. */
static int look_after_erasing(struct store *s, const char *name, const char *key,
                              const struct buffer *was, struct vm_error *cause,
                              struct vm_error **err)
{
    cleanup_buffer struct buffer now = {0};
    bool told = shard_get(s, shard_of(name), key, &now, NULL) == 0;
    bool same = now.len == was->len && (!now.len || !memcmp(now.data, was->data, now.len));
    bool erased = told && !same;
    error_propagate(erased ? NULL : err, cause);
    return erased ? 0 : -1;
}

/* number: of the image that is meant; 0: whichever has the name. */
static int delete_number(struct store *s, const char *name, uint64_t number, struct vm_error **err)
{
    char key[SHARD_KEY_SIZE];
    cleanup_free struct image *image = malloc(sizeof(*image));
    if (!image)
        return error_nomem(err);
    if (image_name_check(name, err) < 0)
        return -1;
    shard_name_key(name, key);
    for (int i = 0; i < CATALOGUE_TRIES; i++) {
        cleanup_buffer struct buffer value = {0};
        bool erased;
        if (shard_get(s, shard_of(name), key, &value, err) < 0)
            return -1;
        if (!value.len)
            return not_found(name, err);
        if (number && image_read(name, value.data, value.len, image, err) < 0)
            return -1;
        if (number && image->writer != number)
            return error_set(err, VM_ERROR_CONFLICT, "image %s was replaced by another one", name);
        if (FAULT("repo.delete") == FAULT_ERROR)
            return error_errno(err, fault_errno(), "cannot delete image %s", name);
        struct vm_error *cause = NULL;
        int done = shard_erase(s, shard_of(name), key, &value, &erased, &cause);
        (void)FAULT("repo.deleted");
        if (done < 0)
            return look_after_erasing(s, name, key, &value, cause, err);
        if (erased)
            return 0;
    }
    return error_set(err, VM_ERROR_CONFLICT, "image %s changes all the time; try again", name);
}

int catalogue_delete(struct store *s, const char *name, struct vm_error **err)
{
    return delete_number(s, name, 0, err);
}

int catalogue_delete_image(struct store *s, const struct image *image, struct vm_error **err)
{
    return delete_number(s, image->name, image->writer, err);
}

struct listing {
    catalogue_visit_fn *visit;
    catalogue_lease_fn *visit_lease;
    catalogue_damaged_fn *damaged;
    catalogue_registered_fn *visit_registered;
    void *arg;
    struct image image;
    struct lease lease;
};

/* Scan all shards with a listing in place of the visitor's argument. */
static int scan_listing(struct store *s, const char *prefix, shard_pair_fn *each,
                        const struct listing *how, struct vm_error **err)
{
    cleanup_free struct listing *l = malloc(sizeof(*l));
    if (!l)
        return error_nomem(err);
    *l = *how;
    return shard_scan_all(s, prefix, each, l, err);
}

/* An entry that cannot be used: a failure, unless it is for somebody to be told. */
static int bad_entry(const struct listing *l, const char *name, struct vm_error *problem,
                     struct vm_error **err)
{
    if (!l->damaged)
        return error_propagate(err, problem);
    l->damaged(name && image_name_check(name, NULL) == 0 ? name : NULL, problem, l->arg);
    error_free(problem);
    return 0;
}

static int list_name(unsigned shard, const struct store_pair *pair, void *arg,
                     struct vm_error **err)
{
    struct listing *l = arg;
    struct vm_error *problem = NULL;
    if (image_read(pair->key + 2, pair->value, pair->len, &l->image, &problem) < 0)
        return bad_entry(l, pair->key + 2, problem, err);
    return l->visit(&l->image, l->arg, err);
}

int catalogue_list(struct store *s, catalogue_visit_fn *visit, catalogue_damaged_fn *damaged,
                   void *arg, struct vm_error **err)
{
    return scan_listing(s, SHARD_NAMES, list_name,
                        &(struct listing){.visit = visit, .damaged = damaged, .arg = arg}, err);
}

void catalogue_skip(const char *name, const struct vm_error *problem, void *arg)
{
    (void)name;
    (void)arg;
    log_warn("an entry of the catalogue is left out", "error=%s", log_q(error_message(problem)));
}

/* ---- leases ---- */

static int lease_once(struct store *s, const char *name, struct lease *lease, bool *ret_taken,
                      struct vm_error **err)
{
    char key[SHARD_KEY_SIZE], of[SHARD_KEY_SIZE];
    cleanup_buffer struct buffer image = {0}, value = {0};
    if (find_value(s, name, &lease->image, &image, err) < 0)
        return -1;
    buffer_put_le64(&value, lease->taken_s);
    buffer_put_u8(&value, (uint8_t)strlen(lease->holder));
    buffer_put(&value, lease->holder, strlen(lease->holder));
    shard_put_image(&value, &lease->image);
    if (value.failed)
        return error_nomem(err);
    struct shard_change c = {
        .shard = shard_of(name), .n_compares = 1,
        .compares = {shard_pair(shard_name_key(name, of), &image)},
        .set = shard_pair(shard_number_key(SHARD_LEASES, lease->number, key), &value)};
    enum store_result done = shard_apply(s, &c, err);
    *ret_taken = done == STORE_DONE;
    /* It may be there, without anybody who knows of it. */
    if (done == STORE_FAILED)
        catalogue_lease_drop(s, lease, NULL);
    return done == STORE_FAILED ? -1 : 0;
}

int catalogue_lease(struct store *s, const char *name, const char *holder, struct lease *ret_lease,
                    struct vm_error **err)
{
    cleanup_free struct lease *lease = calloc(1, sizeof(*lease));
    if (!lease)
        return error_nomem(err);
    if (strlen(holder) > IMAGE_NAME_MAX)
        return error_set(err, VM_ERROR_USAGE, "\"%.40s...\" is too long for a lease's holder",
                         holder);
    strcpy(lease->holder, holder);
    lease->taken_s = (uint64_t)(clock_wall_ns() / NSEC_PER_SEC);
    if (catalogue_next_number(s, &lease->number, err) < 0)
        return -1;
    for (int i = 0; i < CATALOGUE_TRIES; i++) {
        bool taken;
        if (lease_once(s, name, lease, &taken, err) < 0)
            return -1;
        if (taken) {
            *ret_lease = *lease;
            return 0;
        }
    }
    return error_set(err, VM_ERROR_CONFLICT, "image %s changes all the time; try again", name);
}

int catalogue_lease_drop(struct store *s, const struct lease *lease, struct vm_error **err)
{
    char key[SHARD_KEY_SIZE];
    bool erased;
    return shard_erase(s, shard_of(lease->image.name),
                       shard_number_key(SHARD_LEASES, lease->number, key), NULL, &erased, err);
}

static int lease_damaged(const char *key, const char *holder, struct vm_error **err)
{
    char told[STORE_KEY_MAX + 1];
    snprintf(told, sizeof(told), "%s", key);
    field_make_text(told, STORE_KEY_MAX);
    return error_set(err, VM_ERROR_CORRUPT,
                     "lease %s of %s is damaged; deleting the image %s removes it", told, holder,
                     told);
}

static int read_lease(const struct store_pair *pair, struct lease *lease, struct vm_error **err)
{
    struct cursor c = cursor_init(pair->value, pair->len);
    lease->number = shard_key_number(pair->key);
    lease->taken_s = cursor_le64(&c);
    size_t n = cursor_u8(&c);
    const uint8_t *holder = n <= IMAGE_NAME_MAX ? cursor_take(&c, n) : NULL;
    if (!holder)
        return lease_damaged(pair->key, "somebody", err);
    memcpy(lease->holder, holder, n);
    lease->holder[n] = 0;
    cleanup_error struct vm_error *problem = NULL;
    if (lease->number && shard_take_image(&c, pair->key, &lease->image, &problem) == 0)
        return 0;
    return problem && problem->kind != VM_ERROR_CORRUPT
               ? error_propagate(err, steal_ptr(&problem))
               : lease_damaged(pair->key, lease->holder, err);
}

static int list_lease(unsigned shard, const struct store_pair *pair, void *arg,
                      struct vm_error **err)
{
    struct listing *l = arg;
    struct vm_error *problem = NULL;
    if (read_lease(pair, &l->lease, &problem) < 0)
        return bad_entry(l, NULL, problem, err);
    return l->visit_lease ? l->visit_lease(&l->lease, l->arg, err)
                          : l->visit(&l->lease.image, l->arg, err);
}

int catalogue_leases(struct store *s, catalogue_lease_fn *visit, catalogue_damaged_fn *damaged,
                     void *arg, struct vm_error **err)
{
    (void)FAULT("repo.leases");
    return scan_listing(s, SHARD_LEASES, list_lease,
                        &(struct listing){.visit_lease = visit, .damaged = damaged, .arg = arg},
                        err);
}

/* ---- entries that are damaged ---- */

struct damaged_search {
    struct store *store;
    const char *name; /* of an image, or key of a lease, as it was told */
    bool removed;
    struct image image;
    struct lease lease;
};

/* What a later version wrote is not. */
static bool is_damaged(struct damaged_search *d, const struct store_pair *pair)
{
    cleanup_error struct vm_error *problem = NULL;
    int result = !strncmp(pair->key, SHARD_LEASES, 2)
                     ? read_lease(pair, &d->lease, &problem)
                     : image_read(pair->key + 2, pair->value, pair->len, &d->image, &problem);
    return result < 0 && problem->kind == VM_ERROR_CORRUPT;
}

static int remove_damaged(unsigned shard, const struct store_pair *pair, void *arg,
                          struct vm_error **err)
{
    struct damaged_search *d = arg;
    cleanup_buffer struct buffer guard = {0};
    char told[STORE_KEY_MAX + 1];
    bool erased = false;
    strcpy(told, pair->key);
    field_make_text(told, STORE_KEY_MAX);
    if (strcmp(d->name, strncmp(told, SHARD_LEASES, 2) ? told + 2 : told) || !is_damaged(d, pair))
        return 0;
    buffer_put(&guard, pair->value, pair->len);
    if (guard.failed)
        return error_nomem(err);
    if (shard_erase(d->store, shard, pair->key, &guard, &erased, err) < 0)
        return -1;
    d->removed |= erased;
    return 0;
}

int catalogue_delete_damaged(struct store *s, const char *name, bool *ret_removed,
                             struct vm_error **err)
{
    cleanup_free struct damaged_search *d = calloc(1, sizeof(*d));
    if (!d)
        return error_nomem(err);
    d->store = s;
    d->name = name;
    if (shard_scan_all(s, SHARD_NAMES, remove_damaged, d, err) < 0 ||
        shard_scan_all(s, SHARD_LEASES, remove_damaged, d, err) < 0)
        return -1;
    *ret_removed = d->removed;
    return 0;
}

/* ---- for collectors ---- */

static int list_registered(unsigned shard, const struct store_pair *pair, void *arg,
                           struct vm_error **err)
{
    struct listing *l = arg;
    struct registered r = {.number = shard_key_number(pair->key), .shard = shard, .pair = pair};
    if (pair->len < REGISTRATION_MIN || pair->len - REGISTRATION_MIN > IMAGE_NAME_MAX || !r.number)
        return error_set(err, VM_ERROR_CORRUPT, "registration %.40s makes no sense", pair->key);
    const uint8_t *value = pair->value;
    r.epoch = get_le64(value);
    r.registered_s = get_le64(value + 8);
    memcpy(r.name, value + REGISTRATION_MIN, pair->len - REGISTRATION_MIN);
    return l->visit_registered(&r, l->arg, err);
}

int catalogue_registered(struct store *s, catalogue_registered_fn *visit, void *arg,
                         struct vm_error **err)
{
    return scan_listing(s, SHARD_WRITERS, list_registered,
                        &(struct listing){.visit_registered = visit, .arg = arg}, err);
}

int catalogue_fence(struct store *s, const struct registered *r, bool *ret_fenced,
                    struct vm_error **err)
{
    cleanup_buffer struct buffer guard = {0};
    buffer_put(&guard, r->pair->value, r->pair->len);
    return guard.failed ? error_nomem(err)
                        : shard_erase(s, r->shard, r->pair->key, &guard, ret_fenced, err);
}

static int list_pin(unsigned shard, const struct store_pair *pair, void *arg, struct vm_error **err)
{
    struct listing *l = arg;
    struct cursor c = cursor_init(pair->value, pair->len);
    cursor_le16(&c);
    if (shard_take_image(&c, pair->key, &l->image, err) < 0)
        return -1;
    return l->visit(&l->image, l->arg, err);
}

int catalogue_roots(struct store *s, catalogue_visit_fn *visit, void *arg, struct vm_error **err)
{
    const struct listing how = {.visit = visit, .arg = arg};
    if (scan_listing(s, SHARD_NAMES, list_name, &how, err) < 0 ||
        scan_listing(s, SHARD_LEASES, list_lease, &how, err) < 0)
        return -1;
    return scan_listing(s, SHARD_PINS, list_pin, &how, err);
}

struct root_search {
    const struct image *root;
    bool found;
};

static int compare_root(const struct image *image, void *arg, struct vm_error **err)
{
    struct root_search *search = arg;
    cleanup_buffer struct buffer a = {0}, b = {0};
    image_write(image, &a);
    image_write(search->root, &b);
    if (a.failed || b.failed)
        return error_nomem(err);
    search->found |= !strcmp(image->name, search->root->name) && a.len == b.len &&
                     !memcmp(a.data, b.data, a.len);
    return 0;
}

int catalogue_root_is_current(struct store *s, const struct image *root, bool *ret_current,
                              struct vm_error **err)
{
    struct root_search search = {.root = root};
    if (catalogue_roots(s, compare_root, &search, err) < 0)
        return -1;
    *ret_current = search.found;
    return 0;
}

static int drop_pin(unsigned shard, const struct store_pair *pair, void *arg, struct vm_error **err)
{
    char key[SHARD_KEY_SIZE];
    cleanup_buffer struct buffer writer = {0};
    struct store *s = arg;
    bool erased;
    uint64_t number = shard_key_number(pair->key);
    if (pair->len < 2 || !number)
        return error_set(err, VM_ERROR_CORRUPT, "pin %.40s makes no sense", pair->key);
    if (shard_get(s, get_le16(pair->value), shard_number_key(SHARD_WRITERS, number, key), &writer,
                  err) < 0)
        return -1;
    return writer.len ? 0 : shard_erase(s, shard, pair->key, NULL, &erased, err);
}

int catalogue_drop_pins(struct store *s, struct vm_error **err)
{
    return shard_scan_all(s, SHARD_PINS, drop_pin, s, err);
}

/* The epochs of some shards, from the first on, as they are; for store_ops_finish. */
static int read_epochs(struct store *s, unsigned first, struct store_op ops[RAISE_BATCH],
                       char names[RAISE_BATCH][SHARD_NAME_SIZE],
                       struct store_pair epochs[RAISE_BATCH], struct vm_error **err)
{
    for (unsigned i = 0; i < RAISE_BATCH; i++) {
        epochs[i] = (struct store_pair){.key = SHARD_EPOCH};
        ops[i] = (struct store_op){.kind = STORE_GET, .area = STORE_MAP,
                                   .name = shard_name(first + i, names[i]), .pairs = &epochs[i],
                                   .n_pairs = 1};
    }
    if (store_run(s, ops, RAISE_BATCH, err) < 0)
        return -1;
    for (unsigned i = 0; i < RAISE_BATCH; i++) {
        if (ops[i].result == STORE_MISSING)
            return shard_lost(names[i], err);
        if (epochs[i].len != 8)
            return error_set(err, VM_ERROR_CORRUPT,
                             "part %s of the catalogue has lost its epoch", names[i]);
    }
    return 0;
}

/* Those that are lower than the target, once; *ret_left is set if some had changed meanwhile. */
static int raise_lower(struct store *s, const struct store_op reads[RAISE_BATCH],
                       const struct store_pair epochs[RAISE_BATCH], uint64_t target, bool *ret_left,
                       struct vm_error **err)
{
    struct store_op ops[RAISE_BATCH];
    uint8_t is[8];
    size_t n = 0;
    put_le64(is, target);
    const struct store_pair set = {SHARD_EPOCH, is, sizeof(is)};
    for (unsigned i = 0; i < RAISE_BATCH; i++)
        if (get_le64(epochs[i].value) < target)
            ops[n++] = (struct store_op){.kind = STORE_UPDATE, .area = STORE_MAP,
                                         .name = reads[i].name, .compares = &epochs[i],
                                         .n_compares = 1, .sets = &set, .n_sets = 1};
    if (store_run(s, ops, n, err) < 0)
        return -1;
    for (size_t i = 0; i < n; i++) {
        if (ops[i].result == STORE_MISSING)
            return shard_lost(ops[i].name, err);
        *ret_left |= ops[i].result == STORE_MISMATCH;
    }
    return 0;
}

static int raise_some(struct store *s, unsigned first, uint64_t target, struct vm_error **err)
{
    struct store_op reads[RAISE_BATCH] = {0};
    char names[RAISE_BATCH][SHARD_NAME_SIZE];
    struct store_pair epochs[RAISE_BATCH];
    for (int i = 0; i < CATALOGUE_TRIES; i++) {
        bool left = false;
        int result = read_epochs(s, first, reads, names, epochs, err);
        if (!result)
            result = raise_lower(s, reads, epochs, target, &left, err);
        store_ops_finish(reads, RAISE_BATCH);
        if (result < 0 || !left)
            return result;
    }
    return error_set(err, VM_ERROR_CONFLICT, "the catalogue changes all the time; try again");
}

int catalogue_raise_epochs(struct store *s, uint64_t target, struct vm_error **err)
{
    for (unsigned i = 0; i < CATALOGUE_SHARDS; i += RAISE_BATCH)
        if (raise_some(s, i, target, err) < 0)
            return -1;
    return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
#include "repo/catalogue_shard.h"
#include "repo/catalogue.h"

#include <inttypes.h>
#include <stdio.h>

unsigned shard_of(const char *name)
{
    uint32_t h = 2166136261u;
    for (; *name; name++)
        h = (h ^ (unsigned char)*name) * 16777619u;
    return h % CATALOGUE_SHARDS;
}

const char *shard_name(unsigned shard, char out[SHARD_NAME_SIZE])
{
    snprintf(out, SHARD_NAME_SIZE, "cat.%02x", shard & 0xff);
    return out;
}

const char *shard_name_key(const char *name, char out[SHARD_KEY_SIZE])
{
    snprintf(out, SHARD_KEY_SIZE, SHARD_NAMES "%s", name);
    return out;
}

const char *shard_number_key(const char *prefix, uint64_t number, char out[SHARD_KEY_SIZE])
{
    snprintf(out, SHARD_KEY_SIZE, "%s%016" PRIx64, prefix, number);
    return out;
}

uint64_t shard_key_number(const char *key)
{
    return strlen(key) == 18 ? strtoull(key + 2, NULL, 16) : 0;
}

int shard_lost(const char *shard, struct vm_error **err)
{
    return error_set(err, VM_ERROR_CORRUPT, "part %s of the catalogue is lost", shard);
}

int shard_get_many(struct store *s, unsigned shard, const char *const *keys, size_t n,
                   struct buffer *out, struct vm_error **err)
{
    char name[SHARD_NAME_SIZE];
    struct store_pair pairs[SHARD_GET_MAX];
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
        return shard_lost(name, err);
    return failed ? error_nomem(err) : 0;
}

int shard_get(struct store *s, unsigned shard, const char *key, struct buffer *out,
              struct vm_error **err)
{
    return shard_get_many(s, shard, &key, 1, out, err);
}

enum store_result shard_apply(struct store *s, const struct shard_change *c, struct vm_error **err)
{
    char name[SHARD_NAME_SIZE];
    struct store_op op = {.kind = STORE_UPDATE, .area = STORE_MAP,
                          .name = shard_name(c->shard, name), .compares = c->compares,
                          .n_compares = c->n_compares, .sets = &c->set,
                          .n_sets = c->set.key != NULL, .erases = &c->erase,
                          .n_erases = c->erase != NULL};
    store_run(s, &op, 1, err);
    if (op.result == STORE_MISSING) {
        shard_lost(name, err);
        return STORE_FAILED;
    }
    return op.result;
}

int shard_erase(struct store *s, unsigned shard, const char *key, const struct buffer *guard,
                bool *ret_erased, struct vm_error **err)
{
    struct shard_change c = {.shard = shard, .n_compares = guard != NULL, .erase = key};
    if (guard)
        c.compares[0] = shard_pair(key, guard);
    enum store_result done = shard_apply(s, &c, err);
    *ret_erased = done == STORE_DONE;
    return done == STORE_FAILED ? -1 : 0;
}

struct scan {
    shard_pair_fn *visit;
    void *arg;
};

static int scan_pair(size_t shard, const struct store_pair *pair, void *arg, struct vm_error **err)
{
    struct scan *scan = arg;
    return scan->visit((unsigned)shard, pair, scan->arg, err);
}

int shard_scan_all(struct store *s, const char *prefix, shard_pair_fn *visit, void *arg,
                   struct vm_error **err)
{
    char text[CATALOGUE_SHARDS][SHARD_NAME_SIZE];
    const char *names[CATALOGUE_SHARDS];
    struct scan scan = {visit, arg};
    size_t missing;
    for (unsigned i = 0; i < CATALOGUE_SHARDS; i++)
        names[i] = shard_name(i, text[i]);
    enum store_result r =
        store_scan_many(s, names, CATALOGUE_SHARDS, prefix, scan_pair, &scan, &missing, err);
    if (r == STORE_MISSING)
        return shard_lost(names[missing], err);
    return r == STORE_DONE ? 0 : -1;
}

void shard_put_image(struct buffer *out, const struct image *image)
{
    size_t n = strlen(image->name);
    buffer_put_u8(out, (uint8_t)n);
    buffer_put(out, image->name, n);
    image_write(image, out);
}

int shard_take_image(struct cursor *c, const char *key, struct image *ret_image,
                     struct vm_error **err)
{
    char name[IMAGE_NAME_MAX + 1] = "";
    size_t n = cursor_u8(c);
    const uint8_t *text = n <= IMAGE_NAME_MAX ? cursor_take(c, n) : NULL;
    if (!text)
        return error_set(err, VM_ERROR_CORRUPT, "entry %.40s of the catalogue makes no sense", key);
    memcpy(name, text, n);
    return image_read(name, c->p, cursor_left(c), ret_image, err);
}

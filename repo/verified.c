/* SPDX-License-Identifier: Apache-2.0 */
#include "repo/verified.h"
#include "repo/names.h"

enum { MAPS = 256, MAP_NAME_SIZE = 16 };

void verified_finish(struct verified *v)
{
    free(v->items);
    *v = (struct verified){0};
}

static const char *map_name(unsigned map, char out[MAP_NAME_SIZE])
{
    snprintf(out, MAP_NAME_SIZE, "scrub.%02x", map % MAPS);
    return out;
}

static unsigned map_of(uint64_t pack)
{
    return (unsigned)((pack / 64 + number_writer(pack)) % MAPS);
}

static int load_pair(size_t map, const struct store_pair *pair, void *arg, struct vm_error **err)
{
    struct verified *v = arg;
    (void)map;
    uint64_t pack;
    if (!object_number(PACK_PREFIX, pair->key, &pack) || pair->len != 8)
        return error_set(err, VM_ERROR_CORRUPT, "\"%.40s\" is no entry of a scrub", pair->key);
    if (v->n == v->cap) {
        size_t cap = 2 * v->cap + 256;
        struct verified_pack *items = realloc(v->items, cap * sizeof(*items));
        if (!items)
            return error_nomem(err);
        v->items = items;
        v->cap = cap;
    }
    v->items[v->n++] = (struct verified_pack){pack, get_le64(pair->value)};
    return 0;
}

static int by_pack(const void *a, const void *b)
{
    const struct verified_pack *x = a, *y = b;
    return x->pack < y->pack ? -1 : x->pack > y->pack;
}

int verified_load(struct store *s, struct verified *v, struct vm_error **err)
{
    char text[MAPS][MAP_NAME_SIZE];
    const char *names[MAPS];
    v->n = 0;
    for (unsigned i = 0; i < MAPS; i++)
        names[i] = map_name(i, text[i]);
    if (store_scan_many(s, names, MAPS, NULL, load_pair, v, NULL, err) == STORE_FAILED)
        return -1;
    if (v->n)
        qsort(v->items, v->n, sizeof(*v->items), by_pack);
    return 0;
}

uint64_t verified_at(const struct verified *v, uint64_t pack)
{
    struct verified_pack key = {pack, 0};
    const struct verified_pack *found =
        v->n ? bsearch(&key, v->items, v->n, sizeof(key), by_pack) : NULL;
    return found ? found->at_s : 0;
}

int verified_set(struct store *s, const uint64_t *packs, size_t n, uint64_t at_s,
                 struct vm_error **err)
{
    struct store_op ops[VERIFIED_BATCH];
    struct store_pair sets[VERIFIED_BATCH];
    char keys[VERIFIED_BATCH][OBJECT_NAME_SIZE], maps[VERIFIED_BATCH][MAP_NAME_SIZE];
    uint8_t value[8];
    put_le64(value, at_s);
    for (size_t i = 0; i < n; i++) {
        sets[i] = (struct store_pair){object_name(PACK_PREFIX, packs[i], keys[i]), value, 8};
        ops[i] = (struct store_op){.kind = STORE_UPDATE, .area = STORE_MAP,
                                   .name = map_name(map_of(packs[i]), maps[i]),
                                   .presence = STORE_EITHER, .sets = &sets[i], .n_sets = 1};
    }
    return store_run(s, ops, n, err);
}

int verified_forget(struct store *s, const uint64_t *packs, size_t n, struct vm_error **err)
{
    struct store_op ops[FORGET_BATCH];
    const char *erases[FORGET_BATCH];
    char keys[FORGET_BATCH][OBJECT_NAME_SIZE], maps[FORGET_BATCH][MAP_NAME_SIZE];
    for (size_t i = 0; i < n; i++) {
        erases[i] = object_name(PACK_PREFIX, packs[i], keys[i]);
        ops[i] = (struct store_op){.kind = STORE_UPDATE, .area = STORE_MAP,
                                   .name = map_name(map_of(packs[i]), maps[i]),
                                   .erases = &erases[i], .n_erases = 1};
    }
    return store_run(s, ops, n, err);
}

/* SPDX-License-Identifier: Apache-2.0 */
#include "repo/index.h"
#include "repo/names.h"

#include "base/fault.h"
#include "base/log.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>

enum {
    LOOKUP_BATCH = 512,
    INSERT_BATCH = 512,
    ERASE_BATCH = 500, /* each is compared and erased */
    MOVE_BATCH = 512,
    CHECK_EVERY = 4096, /* entries inserted into one shard before its size is estimated again */
    STALE_TRIES = 8,
    HASH_BYTES = 9,
};

#define LEVEL_KEY "!"
#define SHARDS_KEY "index"

struct index {
    struct store *store;
    pthread_mutex_t lock; /* what follows */
    uint64_t shard_keys;
    uint32_t n_shards;
    uint32_t n_inserted[CHECK_EVERY]; /* by shard modulo the size: a rough count is enough */
};

/* ---- keys ---- */

static const char letters[] = "-0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ_abcdefghijklmnopqrstuvwxyz";

struct index_entry index_entry_make(enum index_kind kind, const struct page_id *id,
                                    const void *value, size_t len)
{
    struct index_entry e = {.hash = get_le32(id->bytes + 4), .len = (uint8_t)len};
    e.key[0] = (char)kind;
    for (int i = 0; i < HASH_BYTES / 3; i++) {
        const uint8_t *p = id->bytes + 3ul * (unsigned)i;
        uint32_t bits = (uint32_t)p[0] << 16 | (uint32_t)p[1] << 8 | p[2];
        for (int j = 0; j < 4; j++)
            e.key[1 + 4 * i + j] = letters[bits >> (18 - 6 * j) & 63];
    }
    if (len)
        memcpy(e.value, value, len);
    return e;
}

/* The 9 bytes behind a key, or false if it is no key of an entry. */
static bool key_hash(const char *key, uint8_t ret_bytes[HASH_BYTES])
{
    if (strlen(key) != INDEX_KEY_TEXT)
        return false;
    for (int i = 0; i < HASH_BYTES / 3; i++) {
        uint32_t bits = 0;
        for (int j = 0; j < 4; j++) {
            const char *at = strchr(letters, key[1 + 4 * i + j]);
            if (!at)
                return false;
            bits = bits << 6 | (uint32_t)(at - letters);
        }
        ret_bytes[3 * i] = (uint8_t)(bits >> 16);
        ret_bytes[3 * i + 1] = (uint8_t)(bits >> 8);
        ret_bytes[3 * i + 2] = (uint8_t)bits;
    }
    return true;
}

/* ---- linear hashing ---- */

static unsigned level_below(uint32_t n_shards)
{
    return 31u - (unsigned)__builtin_clz(n_shards);
}

static uint32_t shard_of(uint32_t hash, uint32_t n_shards)
{
    unsigned level = level_below(n_shards);
    uint32_t wide = hash & ((2u << level) - 1);
    return wide < n_shards ? wide : hash & ((1u << level) - 1);
}

/* How many bits of the hash tell that the key is in this shard. */
static unsigned shard_level(uint32_t shard, uint32_t n_shards)
{
    unsigned level = level_below(n_shards);
    bool split = (shard & ((1u << level) - 1)) < n_shards - (1u << level);
    return split ? level + 1 : level;
}

static const char *shard_name(uint32_t shard, char out[OBJECT_NAME_SIZE])
{
    snprintf(out, OBJECT_NAME_SIZE, "index.%06x", shard);
    return out;
}

static void level_text(unsigned level, char out[4])
{
    snprintf(out, 4, "%02u", level);
}

static void shards_text(uint32_t n, char out[12])
{
    snprintf(out, 12, "%08x", n);
}

static int read_n_shards(struct store *s, uint32_t *ret_n, struct vm_error **err)
{
    cleanup_buffer struct buffer b = {0};
    enum store_result r = store_get(s, REPOSITORY_MAP, SHARDS_KEY, &b, err);
    if (r == STORE_FAILED)
        return -1;
    buffer_put_u8(&b, 0);
    char again[12], *text = (char *)b.data;
    unsigned long n = b.failed ? 0 : strtoul(text, NULL, 16);
    shards_text((uint32_t)n, again);
    if (!n || n > INDEX_SHARDS_MAX || strcmp(again, text))
        return error_set(err, VM_ERROR_CORRUPT, "the number of the index's shards is not there");
    *ret_n = (uint32_t)n;
    return 0;
}

static uint32_t known_n_shards(struct index *x)
{
    SCOPE_LOCK(&x->lock);
    return x->n_shards;
}

static int refresh(struct index *x, struct vm_error **err)
{
    uint32_t n;
    if (read_n_shards(x->store, &n, err) < 0)
        return -1;
    SCOPE_LOCK(&x->lock);
    x->n_shards = n;
    return 0;
}

/* Make a shard with that level, or give one that is there the level. */
static int make_shard(struct store *s, uint32_t shard, unsigned level, enum store_presence presence,
                      struct vm_error **err)
{
    char name[OBJECT_NAME_SIZE], text[4];
    level_text(level, text);
    struct store_pair set = {LEVEL_KEY, text, 2};
    struct store_op op = {.kind = STORE_UPDATE, .area = STORE_MAP, .name = shard_name(shard, name),
                          .presence = presence, .sets = &set, .n_sets = 1};
    return store_run(s, &op, 1, err);
}

int index_init(struct store *s, const char **ret_key, char ret_value[INDEX_INIT_VALUE],
               struct vm_error **err)
{
    for (uint32_t i = 0; i < INDEX_SHARDS_FIRST; i++)
        if (make_shard(s, i, shard_level(i, INDEX_SHARDS_FIRST), STORE_NEW, err) < 0)
            return -1;
    shards_text(INDEX_SHARDS_FIRST, ret_value);
    *ret_key = SHARDS_KEY;
    return 0;
}

struct index *index_open(struct store *s, struct vm_error **err)
{
    uint32_t n;
    if (read_n_shards(s, &n, err) < 0)
        return NULL;
    struct index *x = calloc(1, sizeof(*x));
    if (!x) {
        error_nomem(err);
        return NULL;
    }
    x->store = s;
    x->n_shards = n;
    x->shard_keys = INDEX_SHARD_KEYS;
    pthread_mutex_init(&x->lock, NULL);
    return x;
}

void index_close(struct index *x)
{
    if (!x)
        return;
    pthread_mutex_destroy(&x->lock);
    free(x);
}

void index_limit_shards(struct index *x, uint64_t keys)
{
    x->shard_keys = keys;
}

/* ---- batches by shard ---- */

static int by_shard(const void *a, const void *b, void *n_shards)
{
    uint32_t n = *(const uint32_t *)n_shards;
    uint32_t x = shard_of((*(struct index_entry *const *)a)->hash, n);
    uint32_t y = shard_of((*(struct index_entry *const *)b)->hash, n);
    return x < y ? -1 : x > y;
}

/* Pointers to the entries, those of one shard together. The caller frees it. */
static struct index_entry **sort_entries(struct index_entry *entries, size_t n, uint32_t n_shards,
                                         struct vm_error **err)
{
    struct index_entry **sorted = malloc((n + 1) * sizeof(struct index_entry *));
    if (!sorted) {
        error_nomem(err);
        return NULL;
    }
    for (size_t i = 0; i < n; i++)
        sorted[i] = &entries[i];
    qsort_r(sorted, n, sizeof(struct index_entry *), by_shard, &n_shards);
    return sorted;
}

/* How many of the sorted entries, at most `max`, belong to the shard of the first. */
static size_t group_size(struct index_entry *const *sorted, size_t n, uint32_t n_shards, size_t max)
{
    uint32_t shard = shard_of(sorted[0]->hash, n_shards);
    size_t i = 1;
    while (i < n && i < max && shard_of(sorted[i]->hash, n_shards) == shard)
        i++;
    return i;
}

/* One group of entries that lie in one shard, as an operation on it. */
struct group {
    struct index_entry **entries;
    size_t n;
    uint32_t shard;
    char name[OBJECT_NAME_SIZE], level[4];
    struct store_pair *pairs; /* one more than entries: the level, first */
};

/* The groups of at most `batch` entries; *ret_groups with its pairs is one allocation. */
static size_t make_groups(struct index_entry **sorted, size_t n, uint32_t n_shards, size_t batch,
                          struct group **ret_groups, struct vm_error **err)
{
    size_t n_groups = 0, i = 0;
    struct group *groups = malloc(n * (sizeof(*groups) + 2 * sizeof(struct store_pair)));
    if (!groups) {
        error_nomem(err);
        return 0;
    }
    struct store_pair *pairs = (struct store_pair *)(groups + n);
    while (i < n) {
        struct group *g = &groups[n_groups++];
        g->entries = sorted + i;
        g->n = group_size(sorted + i, n - i, n_shards, batch);
        g->shard = shard_of(sorted[i]->hash, n_shards);
        g->pairs = pairs;
        shard_name(g->shard, g->name);
        level_text(shard_level(g->shard, n_shards), g->level);
        pairs[0] = (struct store_pair){LEVEL_KEY, g->level, 2};
        for (size_t j = 0; j < g->n; j++)
            pairs[1 + j] = (struct store_pair){sorted[i + j]->key, sorted[i + j]->value,
                                               sorted[i + j]->len};
        pairs += g->n + 1;
        i += g->n;
    }
    *ret_groups = groups;
    return n_groups;
}

static int mend_levels(struct index *x, struct index_entry *entries, size_t n,
                       struct vm_error **err);

/* Some level was not what we thought: the number of shards is read anew, or mended if it was. */
static int catch_up(struct index *x, struct index_entry *entries, size_t n, int tries,
                    struct vm_error **err)
{
    if (refresh(x, err) < 0)
        return -1;
    return tries ? mend_levels(x, entries, n, err) : 0;
}

/* ---- looking up ---- */

static bool level_matches(const struct store_pair *pair, const char level[4])
{
    return pair->len == 2 && !memcmp(pair->value, level, 2);
}

/* False if the shard has another level than we thought. A shard that was lost has no entries. */
static bool take_answers(const struct store_op *op, struct group *g)
{
    if (op->result != STORE_DONE)
        return true;
    if (!level_matches(&op->pairs[0], g->level))
        return false;
    for (size_t i = 0; i < g->n; i++) {
        const struct store_pair *p = &op->pairs[1 + i];
        bool good = p->len && p->len <= INDEX_VALUE_MAX;
        g->entries[i]->len = good ? (uint8_t)p->len : 0;
        if (good)
            memcpy(g->entries[i]->value, p->value, p->len);
    }
    return true;
}

/* 1: done; 0: some shard was split meanwhile; -1. */
static int lookup_once(struct index *x, struct index_entry *entries, size_t n, uint32_t n_shards,
                       struct vm_error **err)
{
    cleanup_free struct index_entry **sorted = sort_entries(entries, n, n_shards, err);
    cleanup_free struct group *groups = NULL;
    if (!sorted)
        return -1;
    size_t n_groups = make_groups(sorted, n, n_shards, LOOKUP_BATCH, &groups, err);
    cleanup_free struct store_op *ops = calloc(n_groups + 1, sizeof(*ops));
    if (!n_groups || !ops)
        return n_groups ? error_nomem(err) : -1;
    for (size_t i = 0; i < n_groups; i++)
        ops[i] = (struct store_op){.kind = STORE_GET, .area = STORE_MAP, .name = groups[i].name,
                                   .pairs = groups[i].pairs, .n_pairs = groups[i].n + 1};
    int result = store_run(x->store, ops, n_groups, err) < 0 ? -1 : 1;
    for (size_t i = 0; i < n_groups && result > 0; i++)
        if (!take_answers(&ops[i], &groups[i]))
            result = 0;
    store_ops_finish(ops, n_groups);
    return result;
}

int index_lookup(struct index *x, struct index_entry *entries, size_t n, struct vm_error **err)
{
    for (size_t i = 0; i < n; i++)
        entries[i].len = 0;
    for (int tries = 0; n && tries < STALE_TRIES; tries++) {
        int done = lookup_once(x, entries, n, known_n_shards(x), err);
        if (done)
            return done < 0 ? -1 : 0;
        if (catch_up(x, entries, n, tries, err) < 0)
            return -1;
    }
    return 0; /* a shard that is split all the time: a hint that is missing, no more */
}

/* ---- inserting ---- */

static int check_size(struct index *x, uint32_t shard, struct vm_error **err);

/* Remember how much went into the shard; is it time to look at its size? */
static bool count_inserted(struct index *x, uint32_t shard, size_t n)
{
    SCOPE_LOCK(&x->lock);
    uint32_t *count = &x->n_inserted[shard % CHECK_EVERY];
    *count += (uint32_t)n;
    if (*count < CHECK_EVERY && *count < x->shard_keys)
        return false;
    *count = 0;
    return true;
}

/* A shard was lost. It begins anew: what it held is a hint, which rebuilding the index restores. */
static int replace_shard(struct index *x, uint32_t shard, struct vm_error **err)
{
    if (refresh(x, err) < 0)
        return -1;
    log_warn("a shard of the index was lost; begun anew", "repository=%s shard=%u",
             log_q(store_text(x->store)), shard);
    return make_shard(x->store, shard, shard_level(shard, known_n_shards(x)), STORE_NEW, err);
}

static int insert_once(struct index *x, struct index_entry *entries, size_t n, uint32_t n_shards,
                       struct vm_error **err)
{
    cleanup_free struct index_entry **sorted = sort_entries(entries, n, n_shards, err);
    cleanup_free struct group *groups = NULL;
    if (!sorted)
        return -1;
    size_t n_groups = make_groups(sorted, n, n_shards, INSERT_BATCH, &groups, err);
    cleanup_free struct store_op *ops = calloc(n_groups + 1, sizeof(*ops));
    if (!n_groups || !ops)
        return n_groups ? error_nomem(err) : -1;
    for (size_t i = 0; i < n_groups; i++)
        ops[i] = (struct store_op){.kind = STORE_UPDATE, .area = STORE_MAP,
                                   .name = groups[i].name, .compares = groups[i].pairs,
                                   .n_compares = 1, .sets = groups[i].pairs + 1,
                                   .n_sets = groups[i].n};
    if (store_run(x->store, ops, n_groups, err) < 0)
        return -1;
    int result = 1;
    for (size_t i = 0; i < n_groups; i++) {
        if (ops[i].result == STORE_MISSING && replace_shard(x, groups[i].shard, err) < 0)
            return -1;
        if (ops[i].result != STORE_DONE)
            result = 0;
        else if (count_inserted(x, groups[i].shard, groups[i].n) &&
                 check_size(x, groups[i].shard, err) < 0)
            return -1;
    }
    return result;
}

int index_insert(struct index *x, struct index_entry *entries, size_t n, struct vm_error **err)
{
    for (int tries = 0; n && tries < STALE_TRIES; tries++) {
        int done = insert_once(x, entries, n, known_n_shards(x), err);
        if (done)
            return done < 0 ? -1 : 0;
        if (catch_up(x, entries, n, tries, err) < 0)
            return -1;
    }
    return 0;
}

/* Those of the group whose value still is the given one, as compares; their keys to erase. */
static size_t still_there(const struct store_op *get, const struct group *g,
                          struct store_pair *compares, const char **keys)
{
    size_t n = 0;
    for (size_t i = 0; get->result == STORE_DONE && i < g->n; i++) {
        const struct index_entry *e = g->entries[i];
        const struct store_pair *is = &get->pairs[1 + i];
        if (is->len != e->len || memcmp(is->value, e->value, e->len))
            continue;
        keys[n] = e->key;
        compares[n++] = (struct store_pair){e->key, e->value, e->len};
    }
    return n;
}

/* 1: done; 0: something changed between reading and erasing; -1. */
static int erase_groups(struct index *x, struct group *groups, size_t n_groups, size_t n,
                        struct vm_error **err)
{
    cleanup_free struct store_op *ops = calloc(2 * n_groups, sizeof(*ops));
    cleanup_free struct store_pair *compares = calloc(n, sizeof(*compares));
    cleanup_free const char **keys = calloc(n, sizeof(*keys));
    struct store_op *erasing = ops ? ops + n_groups : NULL;
    size_t n_erasing = 0, used = 0;
    if (!ops || !compares || !keys)
        return error_nomem(err);
    for (size_t i = 0; i < n_groups; i++)
        ops[i] = (struct store_op){.kind = STORE_GET, .area = STORE_MAP, .name = groups[i].name,
                                   .pairs = groups[i].pairs, .n_pairs = groups[i].n + 1};
    int result = store_run(x->store, ops, n_groups, err) < 0 ? -1 : 1;
    for (size_t i = 0; i < n_groups && result > 0; i++) {
        size_t m = still_there(&ops[i], &groups[i], compares + used, keys + used);
        if (!m)
            continue;
        erasing[n_erasing++] =
            (struct store_op){.kind = STORE_UPDATE, .area = STORE_MAP, .name = groups[i].name,
                              .compares = compares + used, .n_compares = m,
                              .erases = keys + used, .n_erases = m};
        used += m;
    }
    store_ops_finish(ops, n_groups);
    if (result > 0 && store_run(x->store, erasing, n_erasing, err) < 0)
        return -1;
    for (size_t i = 0; i < n_erasing && result > 0; i++)
        if (erasing[i].result == STORE_MISMATCH)
            result = 0;
    return result;
}

static int erase_once(struct index *x, struct index_entry *entries, size_t n, struct vm_error **err)
{
    uint32_t n_shards = known_n_shards(x);
    cleanup_free struct index_entry **sorted = sort_entries(entries, n, n_shards, err);
    cleanup_free struct group *groups = NULL;
    if (!sorted)
        return -1;
    size_t n_groups = make_groups(sorted, n, n_shards, ERASE_BATCH, &groups, err);
    return n_groups ? erase_groups(x, groups, n_groups, n, err) : -1;
}

int index_erase(struct index *x, struct index_entry *entries, size_t n, struct vm_error **err)
{
    for (int tries = 0; n && tries < STALE_TRIES; tries++) {
        int done = erase_once(x, entries, n, err);
        if (done)
            return done < 0 ? -1 : 0;
    }
    return 0; /* hints that change all the time are not stale */
}

/* ---- splitting ---- */

/* The shard's keys, estimated from how densely its first thousand lie (hashes are uniform). */
static int estimate(struct store *s, uint32_t shard, uint64_t *ret_keys, struct vm_error **err)
{
    char name[OBJECT_NAME_SIZE];
    uint64_t total = 0;
    static const char kinds[][2] = {"e", "p", "t"};
    enum { KINDS = sizeof(kinds) / sizeof(*kinds) };
    struct store_op ops[KINDS];
    for (size_t k = 0; k < KINDS; k++)
        ops[k] = (struct store_op){.kind = STORE_SCAN, .area = STORE_MAP,
                                   .name = shard_name(shard, name), .prefix = kinds[k],
                                   .max = STORE_KEYS_MAX / 4};
    int result = store_run(s, ops, KINDS, err);
    for (size_t k = 0; k < KINDS && !result; k++) {
        uint8_t bytes[HASH_BYTES];
        uint64_t n = ops[k].n_ret_pairs, span = 1ull << 32;
        if (ops[k].ret_more && n && key_hash(ops[k].ret_pairs[n - 1].key, bytes))
            span = (uint64_t)get_be32(bytes) + 1;
        total += n * (1ull << 32) / span;
    }
    store_ops_finish(ops, KINDS);
    if (!result)
        *ret_keys = total;
    return result;
}

struct moved {
    struct store_pair pairs[MOVE_BATCH];
    const char *keys[MOVE_BATCH];
    size_t n;
};

/* Of what a scan answered, the pairs that belong to the shard `to`. */
static void select_moved(const struct store_op *scan, uint32_t to, unsigned level,
                         struct moved *ret)
{
    ret->n = 0;
    for (size_t i = 0; i < scan->n_ret_pairs; i++) {
        uint8_t bytes[HASH_BYTES];
        if (!key_hash(scan->ret_pairs[i].key, bytes) ||
            (get_le32(bytes + 4) & ((1u << level) - 1)) != to)
            continue;
        ret->pairs[ret->n] = scan->ret_pairs[i];
        ret->keys[ret->n++] = scan->ret_pairs[i].key;
    }
}

static int move_some(struct store *s, uint32_t from, uint32_t to, const struct moved *moved,
                     bool erase, struct vm_error **err)
{
    char from_name[OBJECT_NAME_SIZE], to_name[OBJECT_NAME_SIZE];
    struct store_op put = {.kind = STORE_UPDATE, .area = STORE_MAP, .name = shard_name(to, to_name),
                           .presence = STORE_EITHER, .sets = moved->pairs, .n_sets = moved->n};
    struct store_op drop = {.kind = STORE_UPDATE, .area = STORE_MAP,
                            .name = shard_name(from, from_name), .erases = moved->keys,
                            .n_erases = moved->n};
    if (!moved->n)
        return 0;
    if (store_run(s, &put, 1, err) < 0)
        return -1;
    return erase ? store_run(s, &drop, 1, err) : 0;
}

/* Copy to shard `to` what belongs there by `level` bits, and erase it from `from` if told so. */
static int move_keys(struct store *s, uint32_t from, uint32_t to, unsigned level, bool erase,
                     struct vm_error **err)
{
    char name[OBJECT_NAME_SIZE], after[STORE_KEY_MAX + 1] = LEVEL_KEY;
    cleanup_free struct moved *moved = malloc(sizeof(*moved));
    if (!moved)
        return error_nomem(err);
    struct store_op scan = {.kind = STORE_SCAN, .area = STORE_MAP, .name = shard_name(from, name),
                            .max = MOVE_BATCH, .after = after};
    int result = 0;
    do {
        result = store_run(s, &scan, 1, err);
        if (result < 0 || !scan.n_ret_pairs)
            break;
        select_moved(&scan, to, level, moved);
        result = move_some(s, from, to, moved, erase, err);
        strcpy(after, scan.ret_pairs[scan.n_ret_pairs - 1].key);
    } while (!result && scan.ret_more);
    store_ops_finish(&scan, 1);
    return result;
}

static int raise_n_shards(struct index *x, uint32_t n, bool *ret_done, struct vm_error **err)
{
    char was[12], is[12];
    shards_text(n, was);
    shards_text(n + 1, is);
    struct store_pair compare = {SHARDS_KEY, was, 8}, set = {SHARDS_KEY, is, 8};
    struct store_op op = {.kind = STORE_UPDATE, .area = STORE_MAP, .name = REPOSITORY_MAP,
                          .compares = &compare, .n_compares = 1, .sets = &set, .n_sets = 1};
    if (store_run(x->store, &op, 1, err) < 0)
        return -1;
    *ret_done = op.result == STORE_DONE;
    return 0;
}

/*
 * The last part of a split, of a shard that still has the level before: from then on nothing is
 * inserted there that belongs to the other half, to which the rest is moved. Anybody may do it.
 */
static int finish_split(struct index *x, uint32_t from, unsigned level, struct vm_error **err)
{
    char name[OBJECT_NAME_SIZE], was[4], is[4];
    level_text(level - 1, was);
    level_text(level, is);
    struct store_pair compare = {LEVEL_KEY, was, 2}, set = {LEVEL_KEY, is, 2};
    struct store_op op = {.kind = STORE_UPDATE, .area = STORE_MAP, .name = shard_name(from, name),
                          .compares = &compare, .n_compares = 1, .sets = &set, .n_sets = 1};
    if (store_run(x->store, &op, 1, err) < 0)
        return -1;
    return op.result == STORE_DONE
               ? move_keys(x->store, from, from | 1u << (level - 1), level, true, err)
               : 0;
}

/* Who split it has died, or is slow: does the shard have fewer bits than it should? */
static int mend_level(struct index *x, uint32_t shard, unsigned level, struct vm_error **err)
{
    char name[OBJECT_NAME_SIZE];
    cleanup_buffer struct buffer text = {0};
    if (store_get(x->store, shard_name(shard, name), LEVEL_KEY, &text, err) == STORE_FAILED)
        return -1;
    buffer_put_u8(&text, 0);
    if (text.failed)
        return error_nomem(err);
    unsigned stored = (unsigned)strtoul((const char *)text.data, NULL, 10);
    for (unsigned l = stored + 1; stored && l <= level && !(shard >> (l - 1)); l++)
        if (finish_split(x, shard, l, err) < 0)
            return -1;
    return 0;
}

static int mend_levels(struct index *x, struct index_entry *entries, size_t n,
                       struct vm_error **err)
{
    uint32_t n_shards = known_n_shards(x);
    cleanup_free struct index_entry **sorted = sort_entries(entries, n, n_shards, err);
    if (!sorted)
        return -1;
    for (size_t i = 0; i < n; i += group_size(sorted + i, n - i, n_shards, n)) {
        uint32_t shard = shard_of(sorted[i]->hash, n_shards);
        if (mend_level(x, shard, shard_level(shard, n_shards), err) < 0)
            return -1;
    }
    return 0;
}

/* Add shard number `n`, made from what belongs there of the shard that it splits. */
static int split(struct index *x, uint32_t n, struct vm_error **err)
{
    unsigned level = level_below(n) + 1; /* of both halves, afterwards */
    uint32_t from = n & ((1u << (level - 1)) - 1);
    bool ours = false;
    if (make_shard(x->store, n, level, STORE_EITHER, err) < 0 ||
        move_keys(x->store, from, n, level, false, err) < 0 ||
        raise_n_shards(x, n, &ours, err) < 0)
        return -1;
    (void)FAULT("repo.index-split");
    if (ours && finish_split(x, from, level, err) < 0)
        return -1;
    return refresh(x, err);
}

/* `shard` grew: split if those of its kind, the unsplit ones of this round, are near the limit. */
static int check_size(struct index *x, uint32_t shard, struct vm_error **err)
{
    uint32_t n = known_n_shards(x);
    uint64_t keys;
    if (n >= INDEX_SHARDS_MAX || shard_level(shard, n) != level_below(n))
        return 0;
    if (estimate(x->store, shard, &keys, err) < 0)
        return -1;
    return keys >= x->shard_keys ? split(x, n, err) : 0;
}

int index_stat(struct index *x, struct index_stat *ret_stat, struct vm_error **err)
{
    uint64_t keys;
    if (refresh(x, err) < 0)
        return -1;
    uint32_t n = known_n_shards(x);
    /* The shard that is split last in a round: it stands for 2^level of the hash space. */
    uint32_t shard = (1u << level_below(n)) - 1;
    if (estimate(x->store, shard, &keys, err) < 0)
        return -1;
    *ret_stat = (struct index_stat){n, keys << shard_level(shard, n)};
    return 0;
}

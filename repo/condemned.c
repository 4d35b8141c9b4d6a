/* SPDX-License-Identifier: Apache-2.0 */
#include "repo/condemned.h"
#include "repo/names.h"

#include "base/log.h"

#define LIST_PREFIX "condemned."

enum {
    MAPS = 64,
    MAP_NAME_SIZE = 16,
    KEY_SIZE = 16 + 1 + OBJECT_NAME_SIZE,
    STATE_SIZE = 80,
    BATCH = 64,
    MAKE_BATCH = 512,
    PER_MAP = 50000,
};

void object_set_finish(struct object_set *s)
{
    number_set_finish(&s->packs);
    number_set_finish(&s->trees);
}

static const char *entry_object(bool is_pack, uint64_t number, char out[OBJECT_NAME_SIZE])
{
    return object_name(is_pack ? PACK_PREFIX : TREE_PREFIX, number, out);
}

/* What the keys of a list begin with. */
static size_t list_prefix(const struct condemned_list *list, char out[KEY_SIZE])
{
    return (size_t)snprintf(out, KEY_SIZE, "%016" PRIx64 ".", list->number);
}

static const char *entry_key(const struct condemned_list *list, bool is_pack, uint64_t number,
                             char out[KEY_SIZE])
{
    size_t n = list_prefix(list, out);
    entry_object(is_pack, number, out + n);
    return out;
}

static const char *map_name(uint64_t map, char out[MAP_NAME_SIZE])
{
    snprintf(out, MAP_NAME_SIZE, LIST_PREFIX "%02x", (unsigned)(map % MAPS));
    return out;
}

static const char *entry_map(const struct condemned_list *list, uint64_t number,
                             char out[MAP_NAME_SIZE])
{
    return map_name(number % list->maps, out);
}

static int map_lost(const char *map, struct vm_error **err)
{
    return error_set(err, VM_ERROR_CORRUPT, "part %s of the condemned list is lost", map);
}

int condemned_init(struct store *s, struct vm_error **err)
{
    char names[MAPS][MAP_NAME_SIZE];
    struct store_op ops[MAPS];
    for (unsigned i = 0; i < MAPS; i++)
        ops[i] = (struct store_op){.kind = STORE_UPDATE, .area = STORE_MAP,
                                   .name = map_name(i, names[i]), .presence = STORE_NEW};
    return store_run(s, ops, MAPS, err);
}

/* ---- the state ---- */

static void state_text(const struct condemned_state *state, char out[STATE_SIZE])
{
    if (state->is_open)
        snprintf(out, STATE_SIZE, "open %016" PRIx64 " %016" PRIx64 " %016" PRIx64, state->epoch,
                 state->list.number, state->list.maps);
    else
        snprintf(out, STATE_SIZE, "closed %016" PRIx64, state->epoch);
}

static bool parse_state(const char *text, struct condemned_state *ret)
{
    char again[STATE_SIZE];
    *ret = (struct condemned_state){.is_open = !strncmp(text, "open ", 5)};
    if (ret->is_open)
        sscanf(text, "open %" SCNx64 " %" SCNx64 " %" SCNx64, &ret->epoch, &ret->list.number,
               &ret->list.maps);
    else
        sscanf(text, "closed %" SCNx64, &ret->epoch);
    state_text(ret, again);
    return !strcmp(text, again) && (!ret->is_open || (ret->list.maps && ret->list.maps <= MAPS));
}

int condemned_read_state(struct store *s, struct condemned_state *ret_state, struct vm_error **err)
{
    cleanup_buffer struct buffer b = {0};
    if (store_get(s, REPOSITORY_MAP, CONDEMNED_KEY, &b, err) == STORE_FAILED)
        return -1;
    buffer_put_u8(&b, 0);
    if (!b.failed && parse_state((const char *)b.data, ret_state))
        return 0;
    return error_set(err, VM_ERROR_CORRUPT, "the state of collections is lost");
}

/* Guarded: from one state to the next. */
static int change_state(struct store *s, const struct condemned_state *from,
                        const struct condemned_state *to, bool *ret_changed, struct vm_error **err)
{
    char was[STATE_SIZE], is[STATE_SIZE];
    state_text(from, was);
    state_text(to, is);
    struct store_pair compare = {CONDEMNED_KEY, was, strlen(was)};
    struct store_pair set = {CONDEMNED_KEY, is, strlen(is)};
    struct store_op op = {.kind = STORE_UPDATE, .area = STORE_MAP, .name = REPOSITORY_MAP,
                          .compares = &compare, .n_compares = 1, .sets = &set, .n_sets = 1};
    if (store_run(s, &op, 1, err) < 0)
        return -1;
    *ret_changed = op.result == STORE_DONE;
    return 0;
}

/* ---- reading a list ---- */

struct loading {
    struct object_set *set;
    struct number_set *claimed; /* packs; or NULL */
    size_t prefix;
};

/* The names of the first n maps. */
struct map_names {
    char text[MAPS][MAP_NAME_SIZE];
    const char *names[MAPS];
};

static void name_maps(struct map_names *m, uint64_t n)
{
    for (uint64_t i = 0; i < n; i++)
        m->names[i] = map_name(i, m->text[i]);
}

static int load_pair(size_t map, const struct store_pair *pair, void *arg, struct vm_error **err)
{
    const struct loading *l = arg;
    (void)map;
    const char *object = pair->key + l->prefix;
    bool claimed = l->claimed && pair->len == 1 && *(const char *)pair->value == 'd';
    uint64_t number;
    if (object_number(PACK_PREFIX, object, &number))
        return claimed && number_set_add(l->claimed, number, err) < 0
                   ? -1
                   : number_set_add(&l->set->packs, number, err);
    if (object_number(TREE_PREFIX, object, &number))
        return number_set_add(&l->set->trees, number, err);
    return error_set(err, VM_ERROR_CORRUPT, "\"%.60s\" is no entry of a condemned list", pair->key);
}

int condemned_load(struct store *s, const struct condemned_list *list, struct object_set *set,
                   struct number_set *claimed, struct vm_error **err)
{
    char prefix[KEY_SIZE];
    struct loading l = {set, claimed, list_prefix(list, prefix)};
    struct map_names maps;
    size_t lost;
    name_maps(&maps, list->maps);
    enum store_result r =
        store_scan_many(s, maps.names, list->maps, prefix, load_pair, &l, &lost, err);
    if (r == STORE_MISSING)
        return map_lost(maps.names[lost], err);
    return r == STORE_DONE ? 0 : -1;
}

int condemned_load_open(struct store *s, struct condemned_state *ret_state, struct object_set *set,
                        struct vm_error **err)
{
    for (;;) {
        struct condemned_state after;
        if (condemned_read_state(s, ret_state, err) < 0)
            return -1;
        if (!ret_state->is_open)
            return 0;
        if (condemned_load(s, &ret_state->list, set, NULL, err) < 0 ||
            condemned_read_state(s, &after, err) < 0)
            return -1;
        if (after.is_open && after.list.number == ret_state->list.number)
            return 0;
        object_set_finish(set); /* it was closed meanwhile, and another one may be open */
    }
}

/* ---- taking entries off ---- */

struct batch {
    struct store *store;
    const struct condemned_list *list;
    const char *value; /* that an entry must have to be erased */
    size_t n;
    struct {
        bool is_pack;
        uint64_t number;
        char map[MAP_NAME_SIZE], key[KEY_SIZE];
    } entries[BATCH];
    struct store_op ops[BATCH];
    struct object_set *lost; /* rescue: what is being removed, or is gone; NULL: not looked at */
};

static int erase_entries(struct batch *b, struct vm_error **err)
{
    struct store_pair compares[BATCH];
    const char *keys[BATCH];
    for (size_t i = 0; i < b->n; i++) {
        keys[i] = b->entries[i].key;
        compares[i] = (struct store_pair){keys[i], b->value, 1};
        b->ops[i] = (struct store_op){.kind = STORE_UPDATE, .area = STORE_MAP,
                                      .name = b->entries[i].map, .compares = &compares[i],
                                      .n_compares = 1, .erases = &keys[i], .n_erases = 1};
    }
    return store_run(b->store, b->ops, b->n, err);
}

/* An entry was not "c": is it off the list, and does its object exist? */
static int look_at_entry(struct batch *b, size_t i, struct vm_error **err)
{
    cleanup_buffer struct buffer value = {0};
    char object[OBJECT_NAME_SIZE];
    bool is_pack = b->entries[i].is_pack;
    struct store_op size = {.kind = STORE_SIZE, .area = is_pack ? STORE_PACK : STORE_BLOB,
                            .name = entry_object(is_pack, b->entries[i].number, object)};
    if (store_get(b->store, b->entries[i].map, b->entries[i].key, &value, err) == STORE_FAILED ||
        store_run(b->store, &size, 1, err) < 0)
        return -1;
    if (!value.len && size.result == STORE_DONE)
        return 0;
    return number_set_add(is_pack ? &b->lost->packs : &b->lost->trees, b->entries[i].number, err);
}

static int run_batch(struct batch *b, struct vm_error **err)
{
    if (erase_entries(b, err) < 0)
        return -1;
    for (size_t i = 0; i < b->n; i++) {
        if (b->ops[i].result == STORE_MISSING)
            return map_lost(b->entries[i].map, err);
        if (b->lost && b->ops[i].result != STORE_DONE && look_at_entry(b, i, err) < 0)
            return -1;
    }
    b->n = 0;
    return 0;
}

static int add_to_batch(struct batch *b, bool is_pack, uint64_t number, struct vm_error **err)
{
    if (b->n == BATCH && run_batch(b, err) < 0)
        return -1;
    b->entries[b->n].is_pack = is_pack;
    b->entries[b->n].number = number;
    entry_map(b->list, number, b->entries[b->n].map);
    entry_key(b->list, is_pack, number, b->entries[b->n].key);
    b->n++;
    return 0;
}

static int run_set(struct batch *b, const struct object_set *objects, struct vm_error **err)
{
    size_t at = 0;
    for (uint64_t number; (number = number_set_next(&objects->packs, &at));)
        if (add_to_batch(b, true, number, err) < 0)
            return -1;
    at = 0;
    for (uint64_t number; (number = number_set_next(&objects->trees, &at));)
        if (add_to_batch(b, false, number, err) < 0)
            return -1;
    return run_batch(b, err);
}

int condemned_rescue(struct store *s, const struct condemned_list *list,
                     const struct object_set *objects, struct object_set *lost,
                     struct vm_error **err)
{
    struct batch b = {.store = s, .list = list, .value = "c", .lost = lost};
    return run_set(&b, objects, err);
}

int condemned_spare(struct store *s, const struct condemned_list *list,
                    const struct object_set *marked, struct vm_error **err)
{
    struct batch b = {.store = s, .list = list, .value = "c"};
    return run_set(&b, marked, err);
}

int condemned_erase(struct store *s, const struct condemned_list *list, bool is_pack,
                    const uint64_t *numbers, size_t n, struct vm_error **err)
{
    struct batch b = {.store = s, .list = list, .value = "d"};
    for (size_t i = 0; i < n; i++)
        if (add_to_batch(&b, is_pack, numbers[i], err) < 0)
            return -1;
    return run_batch(&b, err);
}

/* ---- making and opening ---- */

/* Entries of one map of the list that is being made. */
struct making {
    struct store *store;
    const struct condemned_list *list;
    char map[MAP_NAME_SIZE];
    size_t n;
    char keys[MAKE_BATCH][KEY_SIZE];
};

static int make_entries(struct making *m, struct vm_error **err)
{
    struct store_pair sets[MAKE_BATCH];
    for (size_t i = 0; i < m->n; i++)
        sets[i] = (struct store_pair){m->keys[i], "c", 1};
    struct store_op op = {.kind = STORE_UPDATE, .area = STORE_MAP, .name = m->map, .sets = sets,
                          .n_sets = m->n};
    if (m->n && store_run(m->store, &op, 1, err) < 0)
        return -1;
    bool lost = m->n && op.result == STORE_MISSING;
    m->n = 0;
    return lost ? map_lost(m->map, err) : 0;
}

static int make_map(struct making *m, uint64_t map, const struct object_set *objects,
                    struct vm_error **err)
{
    const struct number_set *sets[] = {&objects->trees, &objects->packs};
    map_name(map, m->map);
    for (int is_pack = 0; is_pack < 2; is_pack++) {
        size_t at = 0;
        for (uint64_t number; (number = number_set_next(sets[is_pack], &at));) {
            if (number % m->list->maps != map)
                continue;
            entry_key(m->list, is_pack, number, m->keys[m->n++]);
            if (m->n == MAKE_BATCH && make_entries(m, err) < 0)
                return -1;
        }
    }
    return make_entries(m, err);
}

int condemned_make(struct store *s, uint64_t number, const struct object_set *objects,
                   struct condemned_list *ret_list, struct vm_error **err)
{
    uint64_t maps = 1 + (objects->packs.n + objects->trees.n) / PER_MAP;
    struct condemned_list list = {number, maps < MAPS ? maps : MAPS};
    struct making m = {.store = s, .list = &list};
    for (uint64_t i = 0; i < list.maps; i++)
        if (make_map(&m, i, objects, err) < 0)
            return -1;
    *ret_list = list;
    return 0;
}

int condemned_publish(struct store *s, const struct condemned_list *list,
                      const struct object_set *objects, const struct condemned_state *started,
                      bool *ret_open, struct vm_error **err)
{
    struct condemned_state open = {.is_open = true, .epoch = started->epoch + 1, .list = *list};
    /*
     * If its answer is lost the list may be open: whoever looks next adopts it, or sweeps it away.
     */
    if (change_state(s, started, &open, ret_open, err) < 0)
        return -1;
    return *ret_open ? 0 : condemned_spare(s, list, objects, err);
}

/* Of entries that could not be claimed: one that is "d" was, before. */
static int look_at_claims(struct store *s, const struct store_op *claims, size_t n,
                          enum condemned_claim *ret_claims, struct vm_error **err)
{
    for (size_t i = 0; i < n; i++) {
        cleanup_buffer struct buffer now = {0};
        ret_claims[i] = claims[i].result == STORE_DONE ? CONDEMNED_CLAIMED : CONDEMNED_RESCUED;
        if (claims[i].result == STORE_MISSING)
            return map_lost(claims[i].name, err);
        if (claims[i].result != STORE_MISMATCH)
            continue;
        if (store_get(s, claims[i].name, claims[i].sets->key, &now, err) == STORE_FAILED)
            return -1;
        if (now.len == 1 && now.data[0] == 'd')
            ret_claims[i] = CONDEMNED_CLAIMED;
    }
    return 0;
}

int condemned_claim(struct store *s, const struct condemned_list *list, bool is_pack,
                    const uint64_t *numbers, size_t n, enum condemned_claim *ret_claims,
                    struct vm_error **err)
{
    char maps[FORGET_BATCH][MAP_NAME_SIZE], keys[FORGET_BATCH][KEY_SIZE];
    struct store_pair compares[FORGET_BATCH], sets[FORGET_BATCH];
    struct store_op ops[FORGET_BATCH];
    for (size_t i = 0; i < n; i++) {
        entry_key(list, is_pack, numbers[i], keys[i]);
        compares[i] = (struct store_pair){keys[i], "c", 1};
        sets[i] = (struct store_pair){keys[i], "d", 1};
        ops[i] = (struct store_op){.kind = STORE_UPDATE, .area = STORE_MAP,
                                   .name = entry_map(list, numbers[i], maps[i]),
                                   .compares = &compares[i], .n_compares = 1, .sets = &sets[i],
                                   .n_sets = 1};
    }
    if (store_run(s, ops, n, err) < 0)
        return -1;
    return look_at_claims(s, ops, n, ret_claims, err);
}

int condemned_close(struct store *s, const struct condemned_state *state, struct vm_error **err)
{
    cleanup_object_set struct object_set left = {{0}, {0}};
    struct condemned_state closed = {.epoch = state->epoch};
    bool changed;
    if (condemned_load(s, &state->list, &left, NULL, err) < 0)
        return -1;
    if (left.packs.n || left.trees.n) {
        log_warn("a collection leaves its list open: the next one goes on with it",
                 "packs=%zu trees=%zu", left.packs.n, left.trees.n);
        return 0;
    }
    return change_state(s, state, &closed, &changed, err);
}

/* ---- what is left of lists that were never opened ---- */

struct sweep {
    struct store *store;
    struct map_names maps;
    char open[KEY_SIZE]; /* what the keys of the open list begin with; "": none is open */
    size_t n;
    struct {
        size_t map;
        char key[KEY_SIZE];
    } entries[BATCH];
};

/* Should the list have been opened meanwhile, its entries are spared. */
static int sweep_entries(struct sweep *w, struct vm_error **err)
{
    struct store_op ops[BATCH];
    struct store_pair compares[BATCH];
    const char *keys[BATCH];
    for (size_t i = 0; i < w->n; i++) {
        keys[i] = w->entries[i].key;
        compares[i] = (struct store_pair){keys[i], "c", 1};
        ops[i] = (struct store_op){.kind = STORE_UPDATE, .area = STORE_MAP,
                                   .name = w->maps.names[w->entries[i].map],
                                   .compares = &compares[i], .n_compares = 1,
                                   .erases = &keys[i], .n_erases = 1};
    }
    size_t n = w->n;
    w->n = 0;
    return store_run(w->store, ops, n, err);
}

static int sweep_one(size_t map, const struct store_pair *pair, void *arg, struct vm_error **err)
{
    struct sweep *w = arg;
    if (w->open[0] && !strncmp(pair->key, w->open, strlen(w->open)))
        return 0;
    w->entries[w->n].map = map;
    snprintf(w->entries[w->n++].key, KEY_SIZE, "%s", pair->key);
    return w->n == BATCH ? sweep_entries(w, err) : 0;
}

int condemned_sweep(struct store *s, struct vm_error **err)
{
    struct condemned_state state;
    struct sweep w = {.store = s};
    size_t lost;
    if (condemned_read_state(s, &state, err) < 0)
        return -1;
    if (state.is_open)
        list_prefix(&state.list, w.open);
    name_maps(&w.maps, MAPS);
    enum store_result r =
        store_scan_many(s, w.maps.names, MAPS, NULL, sweep_one, &w, &lost, err);
    if (r == STORE_MISSING)
        return map_lost(w.maps.names[lost], err);
    return r == STORE_DONE ? sweep_entries(&w, err) : -1;
}

/* SPDX-License-Identifier: Apache-2.0 */
#include "repo/condemned.h"
#include "repo/forwarding.h"
#include "repo/names.h"

#define LIST_PREFIX "condemned."

enum { LIST_NAME_SIZE = 48, STATE_SIZE = 80, BATCH = 64, MAKE_BATCH = 512, PER_MAP = 50000 };

void object_set_finish(struct object_set *s)
{
    number_set_finish(&s->packs);
    number_set_finish(&s->trees);
}

static const char *entry_key(bool is_pack, uint64_t number, char out[OBJECT_NAME_SIZE])
{
    return object_name(is_pack ? PACK_PREFIX : TREE_PREFIX, number, out);
}

static const char *list_name(const struct condemned_list *list, uint64_t map,
                             char out[LIST_NAME_SIZE])
{
    snprintf(out, LIST_NAME_SIZE, LIST_PREFIX "%016" PRIx64 ".%" PRIx64, list->number, map);
    return out;
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
    return !strcmp(text, again) && (!ret->is_open || ret->list.maps);
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

static int load_pair(const struct store_pair *pair, void *arg, struct vm_error **err)
{
    struct object_set *set = arg;
    uint64_t number;
    if (object_number(PACK_PREFIX, pair->key, &number))
        return number_set_add(&set->packs, number, err);
    if (object_number(TREE_PREFIX, pair->key, &number))
        return number_set_add(&set->trees, number, err);
    return error_set(err, VM_ERROR_CORRUPT, "\"%.40s\" is no entry of a condemned list", pair->key);
}

static enum store_result load_maps(struct store *s, const struct condemned_list *list,
                                   struct object_set *set, struct vm_error **err)
{
    enum store_result result = STORE_DONE;
    for (uint64_t i = 0; i < list->maps && result == STORE_DONE; i++) {
        char name[LIST_NAME_SIZE];
        result = store_scan(s, list_name(list, i, name), NULL, load_pair, set, err);
    }
    return result;
}

int condemned_load(struct store *s, const struct condemned_list *list, struct object_set *set,
                   struct vm_error **err)
{
    return load_maps(s, list, set, err) == STORE_FAILED ? -1 : 0;
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
        enum store_result result = load_maps(s, &ret_state->list, set, err);
        if (result == STORE_FAILED)
            return -1;
        if (result == STORE_DONE)
            return 0;
        /*
         * The list is gone: it was closed meanwhile, or, if it is still named, it was never whole.
         */
        if (condemned_read_state(s, &after, err) < 0)
            return -1;
        if (after.is_open && after.list.number == ret_state->list.number)
            return 0;
        object_set_finish(set);
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
        char map[LIST_NAME_SIZE], key[OBJECT_NAME_SIZE];
    } entries[BATCH];
    struct store_op ops[BATCH];
    bool lost; /* rescue: some entry is being removed, or its object is gone */
    bool rescuing;
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
    struct store_op size = {.kind = STORE_SIZE, .name = b->entries[i].key,
                            .area = b->entries[i].is_pack ? STORE_PACK : STORE_BLOB};
    if (store_get(b->store, b->entries[i].map, b->entries[i].key, &value, err) == STORE_FAILED ||
        store_run(b->store, &size, 1, err) < 0)
        return -1;
    bool there = size.result == STORE_DONE;
    if (!there && b->entries[i].is_pack) {
        cleanup_forwarding struct forwarding f = {0};
        if (forwarding_get(b->store, b->entries[i].number, &f, err) < 0)
            return -1;
        there = f.n > 0;
    }
    b->lost |= value.len || !there;
    return 0;
}

static int run_batch(struct batch *b, struct vm_error **err)
{
    if (erase_entries(b, err) < 0)
        return -1;
    for (size_t i = 0; b->rescuing && i < b->n; i++)
        if (b->ops[i].result != STORE_DONE && look_at_entry(b, i, err) < 0)
            return -1;
    b->n = 0;
    return 0;
}

static int add_to_batch(struct batch *b, bool is_pack, uint64_t number, struct vm_error **err)
{
    if (b->n == BATCH && run_batch(b, err) < 0)
        return -1;
    b->entries[b->n].is_pack = is_pack;
    b->entries[b->n].number = number;
    list_name(b->list, number % b->list->maps, b->entries[b->n].map);
    entry_key(is_pack, number, b->entries[b->n].key);
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
                     const struct object_set *objects, bool *ret_lost, struct vm_error **err)
{
    struct batch b = {.store = s, .list = list, .value = "c", .rescuing = true};
    if (run_set(&b, objects, err) < 0)
        return -1;
    *ret_lost = b.lost;
    return 0;
}

int condemned_spare(struct store *s, const struct condemned_list *list,
                    const struct object_set *marked, struct vm_error **err)
{
    struct batch b = {.store = s, .list = list, .value = "c"};
    return run_set(&b, marked, err);
}

int condemned_erase(struct store *s, const struct condemned_list *list, bool is_pack,
                    uint64_t number, struct vm_error **err)
{
    struct batch b = {.store = s, .list = list, .value = "d"};
    return add_to_batch(&b, is_pack, number, err) < 0 ? -1 : run_batch(&b, err);
}

/* ---- making and opening ---- */

/* One step of making a map; *made turns false if the map was swept away. */
static int make_entries(struct store *s, const char *map, char (*keys)[OBJECT_NAME_SIZE], size_t n,
                        enum store_presence presence, bool *made, struct vm_error **err)
{
    struct store_pair sets[MAKE_BATCH];
    for (size_t i = 0; i < n; i++)
        sets[i] = (struct store_pair){keys[i], "c", 1};
    struct store_op op = {.kind = STORE_UPDATE, .area = STORE_MAP, .name = map,
                          .presence = presence, .sets = sets, .n_sets = n};
    if (store_run(s, &op, 1, err) < 0)
        return -1;
    *made &= op.result == STORE_DONE;
    return 0;
}

/* The entries of one map of the list. */
static int make_map(struct store *s, const struct condemned_list *list, uint64_t map,
                    const struct object_set *objects, bool *made, struct vm_error **err)
{
    char name[LIST_NAME_SIZE], keys[MAKE_BATCH][OBJECT_NAME_SIZE];
    const struct number_set *sets[] = {&objects->trees, &objects->packs};
    size_t n = 0;
    list_name(list, map, name);
    if (make_entries(s, name, NULL, 0, STORE_NEW, made, err) < 0)
        return -1;
    for (int is_pack = 0; is_pack < 2; is_pack++) {
        size_t at = 0;
        for (uint64_t number; (number = number_set_next(sets[is_pack], &at));) {
            if (number % list->maps != map)
                continue;
            entry_key(is_pack, number, keys[n++]);
            if (n == MAKE_BATCH && make_entries(s, name, keys, n, STORE_PRESENT, made, err) < 0)
                return -1;
            n %= MAKE_BATCH;
        }
    }
    return n ? make_entries(s, name, keys, n, STORE_PRESENT, made, err) : 0;
}

int condemned_make(struct store *s, uint64_t number, const struct object_set *objects,
                   struct condemned_list *ret_list, bool *ret_made, struct vm_error **err)
{
    struct condemned_list list = {number, 1 + (objects->packs.n + objects->trees.n) / PER_MAP};
    *ret_made = true;
    for (uint64_t i = 0; i < list.maps; i++)
        if (make_map(s, &list, i, objects, ret_made, err) < 0)
            return -1;
    *ret_list = list;
    return 0;
}

static int remove_maps(struct store *s, const struct condemned_list *list, struct vm_error **err)
{
    for (uint64_t i = 0; i < list->maps; i++) {
        char name[LIST_NAME_SIZE];
        if (store_remove(s, STORE_MAP, list_name(list, i, name), err) == STORE_FAILED)
            return -1;
    }
    return 0;
}

int condemned_publish(struct store *s, const struct condemned_list *list,
                      const struct condemned_state *started, bool *ret_open, struct vm_error **err)
{
    struct condemned_state open = {.is_open = true, .epoch = started->epoch + 1, .list = *list};
    /*
     * If its answer is lost the list may be open: whoever looks next adopts it, or sweeps it away.
     */
    if (change_state(s, started, &open, ret_open, err) < 0)
        return -1;
    return *ret_open ? 0 : remove_maps(s, list, err);
}

int condemned_claim(struct store *s, const struct condemned_list *list, bool is_pack,
                    uint64_t number, enum condemned_claim *ret_claim, struct vm_error **err)
{
    char map[LIST_NAME_SIZE], key[OBJECT_NAME_SIZE];
    cleanup_buffer struct buffer now = {0};
    entry_key(is_pack, number, key);
    list_name(list, number % list->maps, map);
    struct store_pair compare = {key, "c", 1}, set = {key, "d", 1};
    struct store_op op = {.kind = STORE_UPDATE, .area = STORE_MAP, .name = map,
                          .compares = &compare, .n_compares = 1, .sets = &set, .n_sets = 1};
    if (store_run(s, &op, 1, err) < 0)
        return -1;
    *ret_claim = op.result == STORE_DONE ? CONDEMNED_CLAIMED : CONDEMNED_RESCUED;
    if (op.result != STORE_MISMATCH)
        return 0;
    if (store_get(s, map, key, &now, err) == STORE_FAILED)
        return -1;
    if (now.len == 1 && now.data[0] == 'd')
        *ret_claim = CONDEMNED_BEFORE;
    return 0;
}

int condemned_close(struct store *s, const struct condemned_state *state, struct vm_error **err)
{
    cleanup_object_set struct object_set left = {{0}, {0}};
    struct condemned_state closed = {.epoch = state->epoch};
    bool changed;
    if (condemned_load(s, &state->list, &left, err) < 0)
        return -1;
    if (left.packs.n || left.trees.n)
        return 0;
    if (change_state(s, state, &closed, &changed, err) < 0)
        return -1;
    return changed ? remove_maps(s, &state->list, err) : 0;
}

struct sweep {
    struct store *store;
    char open[OBJECT_NAME_SIZE];
};

static int sweep_one(const char *name, void *arg, struct vm_error **err)
{
    struct sweep *w = arg;
    if (w->open[0] && !strncmp(name, w->open, strlen(w->open)))
        return 0;
    return store_remove(w->store, STORE_MAP, name, err) == STORE_FAILED ? -1 : 0;
}

int condemned_sweep(struct store *s, struct vm_error **err)
{
    struct condemned_state state;
    struct sweep w = {.store = s};
    if (condemned_read_state(s, &state, err) < 0)
        return -1;
    if (state.is_open)
        object_name(LIST_PREFIX, state.list.number, w.open);
    return store_list(s, STORE_MAP, LIST_PREFIX, sweep_one, &w, err);
}

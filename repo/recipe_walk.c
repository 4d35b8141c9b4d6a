/* SPDX-License-Identifier: Apache-2.0 */
#include "repo/recipe_walk.h"
#include "repo/tree.h"

#include <stdlib.h>
#include <xxhash.h>

/* Nodes seen: open addressing; len 0 is free. */
struct seen {
    uint64_t tree;
    uint32_t offset;
    uint16_t check; /* of what else the reference says: another one is another node */
    bool used, damaged;
};

struct recipe_walk {
    struct store *store;
    struct recipe_visitor visitor;
    struct seen *seen;
    uint64_t n_seen, mask;
    struct recipe_leaf leaf;
};

struct recipe_walk *recipe_walk_create(struct store *s, const struct recipe_visitor *visitor,
                                       struct vm_error **err)
{
    enum { FIRST_SIZE = 4096 };
    struct recipe_walk *w = calloc(1, sizeof(*w));
    struct seen *seen = calloc(FIRST_SIZE, sizeof(*seen));
    if (!w || !seen) {
        free(w);
        free(seen);
        error_nomem(err);
        return NULL;
    }
    w->store = s;
    w->visitor = *visitor;
    w->seen = seen;
    w->mask = FIRST_SIZE - 1;
    return w;
}

void recipe_walk_destroy(struct recipe_walk *w)
{
    if (!w)
        return;
    free(w->seen);
    free(w);
}

uint64_t recipe_walk_nodes(const struct recipe_walk *w)
{
    return w->n_seen;
}

static struct seen key_of(const struct recipe_ref *ref, unsigned level)
{
    uint64_t rest[2] = {ref->hash, (uint64_t)level << 32 | ref->len};
    return (struct seen){ref->tree, ref->offset, (uint16_t)XXH3_64bits(rest, sizeof(rest)), true,
                         false};
}

static struct seen *find(struct seen *table, uint64_t mask, const struct seen *key)
{
    uint64_t place[2] = {key->tree, key->offset};
    uint64_t i = XXH3_64bits(place, sizeof(place)) & mask;
    while (table[i].used && (table[i].tree != key->tree || table[i].offset != key->offset ||
                             table[i].check != key->check))
        i = (i + 1) & mask;
    return &table[i];
}

static int grow(struct recipe_walk *w, struct vm_error **err)
{
    uint64_t size = 2 * (w->mask + 1);
    struct seen *table = calloc(size, sizeof(*table));
    if (!table)
        return error_nomem(err);
    for (uint64_t i = 0; i <= w->mask; i++)
        if (w->seen[i].used)
            *find(table, size - 1, &w->seen[i]) = w->seen[i];
    free(w->seen);
    w->seen = table;
    w->mask = size - 1;
    return 0;
}

static int remember(struct recipe_walk *w, const struct seen *node, struct vm_error **err)
{
    if (w->n_seen >= (w->mask + 1) / 4 * 3 && grow(w, err) < 0)
        return -1;
    *find(w->seen, w->mask, node) = *node;
    w->n_seen++;
    return 0;
}

/* What the reading of a node came to: damage is no failure of the walk. */
static int take_problem(struct recipe_walk *w, const struct recipe_ref *ref,
                        struct vm_error *problem, bool *ret_damaged, struct vm_error **err)
{
    if (problem->kind != VM_ERROR_CORRUPT && problem->kind != VM_ERROR_NOT_FOUND)
        return error_propagate(err, problem);
    if (w->visitor.unreadable)
        w->visitor.unreadable(ref, problem, w->visitor.arg);
    error_free(problem);
    *ret_damaged = true;
    return 0;
}

static int walk_node(struct recipe_walk *w, const struct recipe_ref *ref, unsigned level,
                     uint64_t number, bool *ret_damaged, struct vm_error **err);

static int walk_children(struct recipe_walk *w, const struct recipe_inner *inner, uint64_t number,
                         bool *ret_damaged, struct vm_error **err)
{
    for (unsigned i = 0; i < RECIPE_FANOUT; i++)
        if (walk_node(w, &inner->children[i], inner->level - 1, number * RECIPE_FANOUT + i,
                      ret_damaged, err) < 0)
            return -1;
    return 0;
}

static int walk_content(struct recipe_walk *w, const struct recipe_ref *ref,
                        const struct buffer *node, unsigned level, uint64_t number,
                        bool *ret_damaged, struct vm_error **err)
{
    struct vm_error *problem = NULL;
    if (w->visitor.node && w->visitor.node(ref, node->data, node->len, w->visitor.arg, err) < 0)
        return -1;
    if (!level) {
        if (recipe_leaf_read(node->data, node->len, &w->leaf, &problem) < 0)
            return take_problem(w, ref, problem, ret_damaged, err);
        return w->visitor.leaf(&w->leaf, number, ret_damaged, w->visitor.arg, err);
    }
    cleanup_free struct recipe_inner *inner = malloc(sizeof(*inner));
    if (!inner)
        return error_nomem(err);
    if (recipe_inner_read(node->data, node->len, level, inner, &problem) < 0)
        return take_problem(w, ref, problem, ret_damaged, err);
    return walk_children(w, inner, number, ret_damaged, err);
}

static int walk_node(struct recipe_walk *w, const struct recipe_ref *ref, unsigned level,
                     uint64_t number, bool *ret_damaged, struct vm_error **err)
{
    if (recipe_ref_is_zero(ref))
        return 0;
    struct seen key = key_of(ref, level);
    const struct seen *seen = find(w->seen, w->mask, &key);
    if (seen->used) {
        *ret_damaged |= seen->damaged;
        return 0;
    }
    cleanup_buffer struct buffer node = {0};
    struct vm_error *problem = NULL;
    int result = tree_read_node(w->store, ref, &node, &problem) < 0
                     ? take_problem(w, ref, problem, &key.damaged, err)
                     : walk_content(w, ref, &node, level, number, &key.damaged, err);
    if (result < 0 || remember(w, &key, err) < 0)
        return -1;
    *ret_damaged |= key.damaged;
    return 0;
}

int recipe_walk_file(struct recipe_walk *w, const struct recipe_ref *root, uint64_t size,
                     bool *ret_damaged, struct vm_error **err)
{
    *ret_damaged = false;
    return walk_node(w, root, recipe_depth(size), 0, ret_damaged, err);
}

/* SPDX-License-Identifier: Apache-2.0 */
#include "repo/tree.h"

#include <stdlib.h>

struct node {
    struct recipe_inner content;
    bool dirty;
    struct node *children[RECIPE_FANOUT]; /* level 2 and above, as far as they are loaded */
};

struct file_tree {
    struct store *store;
    uint64_t size;
    unsigned depth;
    struct recipe_ref root;
    struct node *top; /* NULL until needed; never for depth 0 */
};

static void free_node(struct node *n)
{
    if (!n)
        return;
    for (unsigned i = 0; n->content.level > 1 && i < RECIPE_FANOUT; i++)
        free_node(n->children[i]);
    free(n);
}

void file_tree_destroy(struct file_tree *t)
{
    if (!t)
        return;
    free_node(t->top);
    free(t);
}

uint64_t file_tree_leaves(const struct file_tree *t)
{
    return (t->size + RECIPE_LEAF_BYTES - 1) / RECIPE_LEAF_BYTES;
}

unsigned file_tree_leaf_pages(const struct file_tree *t, uint64_t leaf)
{
    uint64_t pages = (t->size + PAGE_BYTES - 1) / PAGE_BYTES, first = leaf * RECIPE_LEAF_PAGES;
    if (first >= pages)
        return 0;
    return pages - first < RECIPE_LEAF_PAGES ? (unsigned)(pages - first) : RECIPE_LEAF_PAGES;
}

static struct node *load_node(struct file_tree *t, const struct recipe_ref *ref, unsigned level,
                              struct vm_error **err)
{
    cleanup_buffer struct buffer b = {0};
    /* Level 1 has no children in memory: its struct ends before them. */
    size_t size = level > 1 ? sizeof(struct node) : offsetof(struct node, children);
    cleanup_free struct node *n = calloc(1, size);
    if (!n) {
        error_nomem(err);
        return NULL;
    }
    n->content.level = level;
    if (recipe_ref_is_zero(ref))
        return steal_ptr(&n);
    if (tree_read_node(t->store, ref, &b, err) < 0 ||
        recipe_inner_read(b.data, b.len, level, &n->content, err) < 0)
        return NULL;
    return steal_ptr(&n);
}

/* Put nodes above the root of a smaller file, of which it is the first child. */
static int raise_root(struct file_tree *t, unsigned depth, struct vm_error **err)
{
    struct recipe_ref none = {0};
    struct node **at = &t->top;
    if (depth == t->depth || recipe_ref_is_zero(&t->root))
        return 0;
    for (unsigned level = t->depth; level > depth; level--) {
        struct node *n = load_node(t, &none, level, err);
        if (!n)
            return -1;
        n->dirty = true;
        *at = n;
        at = level > 1 ? &n->children[0] : NULL;
        if (level == depth + 1)
            n->content.children[0] = t->root;
    }
    return 0;
}

struct file_tree *file_tree_create(struct store *s, uint64_t size, const struct recipe_ref *root,
                                   uint64_t root_size, struct vm_error **err)
{
    if (size > RECIPE_FILE_MAX || root_size > size) {
        error_set(err, VM_ERROR_REFUSED,
                  "a file of %llu bytes: it must fit 64 TiB and be no smaller than its parent's",
                  (unsigned long long)size);
        return NULL;
    }
    struct file_tree *t = calloc(1, sizeof(*t));
    if (!t) {
        error_nomem(err);
        return NULL;
    }
    t->store = s;
    t->size = size;
    t->depth = recipe_depth(size);
    t->root = root ? *root : (struct recipe_ref){0};
    if (raise_root(t, recipe_depth(root_size), err) < 0) {
        file_tree_destroy(t);
        return NULL;
    }
    return t;
}

static unsigned position(uint64_t leaf, unsigned level)
{
    return leaf >> (8 * (level - 1)) & (RECIPE_FANOUT - 1);
}

/* The level-1 node above the leaf, loaded; dirty marks the way to it as changed. */
static struct node *node_above(struct file_tree *t, uint64_t leaf, bool dirty,
                               struct vm_error **err)
{
    if (!t->top && !(t->top = load_node(t, &t->root, t->depth, err)))
        return NULL;
    struct node *n = t->top;
    n->dirty |= dirty;
    while (n->content.level > 1) {
        unsigned i = position(leaf, n->content.level);
        if (!n->children[i])
            n->children[i] = load_node(t, &n->content.children[i], n->content.level - 1, err);
        n = n->children[i];
        if (!n)
            return NULL;
        n->dirty |= dirty;
    }
    return n;
}

int file_tree_get(struct file_tree *t, uint64_t leaf, struct recipe_ref *ret_ref,
                  struct vm_error **err)
{
    if (!t->depth) {
        *ret_ref = t->root;
        return 0;
    }
    struct node *n = node_above(t, leaf, false, err);
    if (!n)
        return -1;
    *ret_ref = n->content.children[position(leaf, 1)];
    return 0;
}

int file_tree_set(struct file_tree *t, uint64_t leaf, const struct recipe_ref *ref,
                  struct vm_error **err)
{
    if (!t->depth) {
        t->root = *ref;
        return 0;
    }
    struct node *n = node_above(t, leaf, true, err);
    if (!n)
        return -1;
    n->content.children[position(leaf, 1)] = *ref;
    return 0;
}

static int write_node(struct node *n, struct tree_writer *tw, struct recipe_ref *ret_ref,
                      struct vm_error **err)
{
    cleanup_buffer struct buffer b = {0};
    for (unsigned i = 0; n->content.level > 1 && i < RECIPE_FANOUT; i++)
        if (n->children[i] && n->children[i]->dirty &&
            write_node(n->children[i], tw, &n->content.children[i], err) < 0)
            return -1;
    recipe_inner_write(&n->content, &b);
    if (b.failed)
        return error_nomem(err);
    n->dirty = false;
    return tree_writer_add(tw, b.data, b.len, true, ret_ref, err);
}

int file_tree_finish(struct file_tree *t, struct tree_writer *tw, struct recipe_ref *ret_root,
                     struct vm_error **err)
{
    if (t->top && t->top->dirty && write_node(t->top, tw, &t->root, err) < 0)
        return -1;
    *ret_root = t->root;
    return 0;
}

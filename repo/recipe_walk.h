/* SPDX-License-Identifier: Apache-2.0 */
/*
 * recipe_walk: visits every node of many recipes once, though they share most of them.
 *
 *     w = recipe_walk_create(store, &visitor, &err)
 *     for each file of each image: recipe_walk_file(w, &root, size, &damaged, &err)
 *
 * What the visitor says of a node's damage is remembered with it: every file that contains a
 * damaged node is told so, also those that reach it by a way walked before. Nodes that cannot be
 * read, or are not what their reference says, are damage, too, and told to `unreadable`.
 *
 * Memory: 16 bytes per distinct node, twice that at most: 8 MiB per TiB of distinct content.
 * Threads: one.
 */
#ifndef VMMIG_REPO_RECIPE_WALK_H
#define VMMIG_REPO_RECIPE_WALK_H

#include "base/cleanup.h"
#include "repo/recipe.h"
#include "repo/store.h"

struct recipe_walk;

struct recipe_visitor {
    /* A node's bytes, before its children. May be NULL. */
    int (*node)(const struct recipe_ref *ref, const void *data, size_t len, void *arg,
                struct vm_error **err);
    /*
     * A leaf, decoded, and which one of the file that is being walked. *ret_damaged says whether
     * something it refers to is damaged.
     */
    int (*leaf)(const struct recipe_leaf *leaf, uint64_t number, bool *ret_damaged, void *arg,
                struct vm_error **err);
    /* A node that is gone or damaged, as `problem` says. May be NULL. */
    void (*unreadable)(const struct recipe_ref *ref, const struct vm_error *problem, void *arg);
    void *arg;
};

struct recipe_walk *recipe_walk_create(struct store *s, const struct recipe_visitor *visitor,
                                       struct vm_error **err);
void recipe_walk_destroy(struct recipe_walk *w);
DEFINE_CLEANUP(recipe_walk, struct recipe_walk *, recipe_walk_destroy)

int recipe_walk_file(struct recipe_walk *w, const struct recipe_ref *root, uint64_t size,
                     bool *ret_damaged, struct vm_error **err);
/* Distinct nodes so far. */
uint64_t recipe_walk_nodes(const struct recipe_walk *w);

#endif

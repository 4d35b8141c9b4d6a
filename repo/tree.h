/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tree: nodes of recipes on the store. Many nodes share one object ("a tree"), which is created
 * once and never changed:
 *
 *      0  8   "VMMIGTR1"
 *      8  u64 the tree's number
 *     16  16  the repository's UUID
 *     32      nodes (repo/recipe.h), one after the other
 *
 * tree_writer gathers nodes into trees of about 2 MiB. file_tree is the recipe of one file in
 * memory: its inner nodes, loaded as far as they are needed (6 KiB per GiB), changed in place,
 * written once.
 *
 * Threads: a tree_writer and a file_tree belong to one thread; tree_read_node is for any.
 */
#ifndef VMMIG_REPO_TREE_H
#define VMMIG_REPO_TREE_H

#include "base/uuid.h"
#include "repo/index.h"
#include "repo/number_set.h"
#include "repo/recipe.h"

enum { TREE_HEADER = 32, TREE_GOOD = 2 << 20, TREE_MAX = TREE_GOOD + RECIPE_NODE_MAX };

/* The node's bytes in place of what `out` holds. CORRUPT, or NOT_FOUND if the tree is gone. */
int tree_read_node(struct store *s, const struct recipe_ref *ref, struct buffer *out,
                   struct vm_error **err);
int tree_read_leaf(struct store *s, const struct recipe_ref *ref, struct recipe_leaf *ret_leaf,
                   struct vm_error **err);
/*
 * Every node of a tree, in order. CORRUPT if its header, or what would be the next node, makes no
 * sense; NOT_FOUND; or what `visit` failed with.
 */
int tree_each_node(struct store *s, uint64_t tree, const struct uuid *repository,
                   int (*visit)(const struct recipe_ref *ref, const void *node, size_t len,
                                void *arg, struct vm_error **err),
                   void *arg, struct vm_error **err);
int tree_header_check(const uint8_t header[TREE_HEADER], uint64_t tree,
                      const struct uuid *repository, struct vm_error **err);

/* ---- writing nodes ---- */

struct tree_writer;

/*
 * `writer` is the writer's number, with which the trees' numbers begin. Nothing that lies in a tree
 * of *condemned is shared; what is shared is added to *shared. Both outlive the tree_writer.
 */
struct tree_writer *tree_writer_create(struct store *s, struct index *index,
                                       const struct uuid *repository, uint64_t writer,
                                       const struct number_set *condemned,
                                       struct number_set *shared, struct vm_error **err);
void tree_writer_destroy(struct tree_writer *tw);
DEFINE_CLEANUP(tree_writer, struct tree_writer *, tree_writer_destroy)
/*
 * Store a node, or, if may_exist says that another version may have the same one, find it by the
 * index and share it. Stored nodes are durable after tree_writer_finish.
 */
int tree_writer_add(struct tree_writer *tw, const void *node, size_t len, bool may_exist,
                    struct recipe_ref *ret_ref, struct vm_error **err);
/* As tree_read_node, also for nodes that this writer has not stored yet. */
int tree_writer_read(struct tree_writer *tw, const struct recipe_ref *ref, struct buffer *out,
                     struct vm_error **err);
int tree_writer_finish(struct tree_writer *tw, struct vm_error **err);

struct tree_writer_stat {
    uint64_t nodes, shared, bytes; /* shared: nodes found; bytes: stored */
};
struct tree_writer_stat tree_writer_stat(const struct tree_writer *tw);

/* ---- the recipe of a file ---- */

struct file_tree;

/*
 * A file of that size, beginning with the recipe at `root` (NULL: all zero) of a file of root_size
 * bytes, which is at most `size`.
 */
struct file_tree *file_tree_create(struct store *s, uint64_t size, const struct recipe_ref *root,
                                   uint64_t root_size, struct vm_error **err);
void file_tree_destroy(struct file_tree *t);
DEFINE_CLEANUP(file_tree, struct file_tree *, file_tree_destroy)
uint64_t file_tree_leaves(const struct file_tree *t);
/* Pages of that leaf that lie within the file; the last one may have fewer than the others. */
unsigned file_tree_leaf_pages(const struct file_tree *t, uint64_t leaf);
/* The reference to leaf number `leaf`. */
int file_tree_get(struct file_tree *t, uint64_t leaf, struct recipe_ref *ret_ref,
                  struct vm_error **err);
int file_tree_set(struct file_tree *t, uint64_t leaf, const struct recipe_ref *ref,
                  struct vm_error **err);
/* Write what changed; the root. */
int file_tree_finish(struct file_tree *t, struct tree_writer *tw, struct recipe_ref *ret_root,
                     struct vm_error **err);

#endif

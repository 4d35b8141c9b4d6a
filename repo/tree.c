/* SPDX-License-Identifier: Apache-2.0 */
#include "repo/tree.h"
#include "repo/names.h"

#include "base/fault.h"

#include <stdlib.h>

static const char magic[8] = {'V', 'M', 'M', 'I', 'G', 'T', 'R', '1'};

static void header_write(uint8_t out[TREE_HEADER], uint64_t tree, const struct uuid *repository)
{
    memcpy(out, magic, 8);
    put_le64(out + 8, tree);
    memcpy(out + 16, repository->bytes, 16);
}

int tree_header_check(const uint8_t header[TREE_HEADER], uint64_t tree,
                      const struct uuid *repository, struct vm_error **err)
{
    uint8_t want[TREE_HEADER];
    header_write(want, tree, repository);
    if (!memcmp(header, want, TREE_HEADER))
        return 0;
    return error_set(err, VM_ERROR_CORRUPT,
                     "tree %016" PRIx64 ": its header is not that of this tree of this repository",
                     tree);
}

/* ---- reading ---- */

static int check_node(const struct recipe_ref *ref, const void *node, size_t len,
                      struct vm_error **err)
{
    if (len == ref->len && recipe_ref_hash(ref->tree, node, len) == ref->hash)
        return 0;
    return error_set(err, VM_ERROR_CORRUPT, "tree %016" PRIx64 ", node at %u: %s", ref->tree,
                     ref->offset, len == ref->len ? "its checksum is wrong" : "it ends too early");
}

int tree_read_node(struct store *s, const struct recipe_ref *ref, struct buffer *out,
                   struct vm_error **err)
{
    size_t got = 0;
    buffer_reset(out);
    uint8_t *to = ref->len <= RECIPE_NODE_MAX ? buffer_grow(out, ref->len) : NULL;
    if (!to)
        return out->failed ? error_nomem(err)
                           : error_set(err, VM_ERROR_CORRUPT, "a node of %u bytes", ref->len);
    enum store_result r = store_read(s, STORE_BLOB, tree_name(ref->tree), ref->offset, to, ref->len,
                                     &got, err);
    if (r == STORE_MISSING)
        return error_set(err, VM_ERROR_NOT_FOUND, "tree %016" PRIx64 " is gone", ref->tree);
    if (r != STORE_DONE)
        return -1;
    return check_node(ref, to, got, err);
}

int tree_read_leaf(struct store *s, const struct recipe_ref *ref, struct recipe_leaf *ret_leaf,
                   struct vm_error **err)
{
    cleanup_buffer struct buffer b = {0};
    if (recipe_ref_is_zero(ref)) {
        memset(ret_leaf, 0, sizeof(*ret_leaf));
        return 0;
    }
    if (tree_read_node(s, ref, &b, err) < 0)
        return -1;
    return recipe_leaf_read(b.data, b.len, ret_leaf, err);
}

/* The whole object. */
static int read_tree(struct store *s, uint64_t tree, struct buffer *out, struct vm_error **err)
{
    size_t got = 0;
    uint8_t *to = buffer_grow(out, TREE_MAX);
    if (!to)
        return error_nomem(err);
    enum store_result r = store_read(s, STORE_BLOB, tree_name(tree), 0, to, TREE_MAX, &got, err);
    if (r == STORE_MISSING)
        return error_set(err, VM_ERROR_NOT_FOUND, "tree %016" PRIx64 " is gone", tree);
    out->len = got;
    return r == STORE_DONE ? 0 : -1;
}

int tree_each_node(struct store *s, uint64_t tree, const struct uuid *repository,
                   int (*visit)(const struct recipe_ref *ref, const void *node, size_t len,
                                void *arg, struct vm_error **err),
                   void *arg, struct vm_error **err)
{
    cleanup_buffer struct buffer b = {0};
    if (read_tree(s, tree, &b, err) < 0)
        return -1;
    if (b.len < TREE_HEADER)
        return error_set(err, VM_ERROR_CORRUPT, "tree %016" PRIx64 ": it ends too early", tree);
    if (tree_header_check(b.data, tree, repository, err) < 0)
        return -1;
    for (size_t at = TREE_HEADER, n; at < b.len; at += n) {
        n = recipe_node_len(b.data + at, b.len - at);
        if (!n)
            return error_set(err, VM_ERROR_CORRUPT,
                             "tree %016" PRIx64 ", node at %zu: it makes no sense",
                             tree, at);
        struct recipe_ref ref = {tree, (uint32_t)at, (uint32_t)n,
                                 recipe_ref_hash(tree, b.data + at, n)};
        if (visit(&ref, b.data + at, n, arg, err) < 0)
            return -1;
    }
    return 0;
}

/* ---- writing nodes ---- */

struct tree_writer {
    struct store *store;
    struct index *index;
    struct uuid repository;
    uint64_t writer, n_trees;
    uint64_t number;    /* of the tree being filled, 0 for none */
    struct buffer tree; /* its bytes */
    struct page_hasher hasher;
    struct index_entry *entries; /* of the nodes in it */
    size_t n_entries, entries_cap;
    const struct number_set *condemned;
    struct number_set *shared;
    struct tree_writer_stat stat;
};

struct tree_writer *tree_writer_create(struct store *s, struct index *index,
                                       const struct uuid *repository, uint64_t writer,
                                       const struct number_set *condemned,
                                       struct number_set *shared, struct vm_error **err)
{
    struct tree_writer *tw = calloc(1, sizeof(*tw));
    if (!tw) {
        error_nomem(err);
        return NULL;
    }
    tw->store = s;
    tw->index = index;
    tw->repository = *repository;
    tw->writer = writer;
    tw->condemned = condemned;
    tw->shared = shared;
    if (page_hasher_init(&tw->hasher, err) < 0) {
        tree_writer_destroy(tw);
        return NULL;
    }
    return tw;
}

void tree_writer_destroy(struct tree_writer *tw)
{
    if (!tw)
        return;
    page_hasher_finish(&tw->hasher);
    buffer_finish(&tw->tree);
    free(tw->entries);
    free(tw);
}

int tree_writer_read(struct tree_writer *tw, const struct recipe_ref *ref, struct buffer *out,
                     struct vm_error **err)
{
    if (!tw->number || ref->tree != tw->number)
        return tree_read_node(tw->store, ref, out, err);
    buffer_reset(out);
    /* The reference may come from the index, where anything can stand. */
    if (ref->offset > tw->tree.len || ref->len > tw->tree.len - ref->offset)
        return error_set(err, VM_ERROR_CORRUPT, "tree %016" PRIx64 " has no node at %u", ref->tree,
                         ref->offset);
    if (check_node(ref, tw->tree.data + ref->offset, ref->len, err) < 0)
        return -1;
    buffer_put(out, tw->tree.data + ref->offset, ref->len);
    return out->failed ? error_nomem(err) : 0;
}

static int store_tree(struct tree_writer *tw, struct vm_error **err)
{
    if (!tw->number)
        return 0;
    if (tw->tree.failed)
        return error_nomem(err);
    if (FAULT("repo.tree") == FAULT_ERROR)
        return error_errno(err, fault_errno(), "cannot store tree %016" PRIx64, tw->number);
    enum store_result r = store_create(tw->store, STORE_BLOB, tree_name(tw->number), tw->tree.data,
                                       tw->tree.len, err);
    if (r == STORE_EXISTS)
        return error_set(err, VM_ERROR_CORRUPT, "tree %016" PRIx64 " exists already", tw->number);
    if (r != STORE_DONE)
        return -1;
    (void)FAULT("repo.tree-stored");
    tw->stat.bytes += tw->tree.len;
    tw->number = 0;
    buffer_reset(&tw->tree);
    size_t n = tw->n_entries;
    tw->n_entries = 0;
    return index_insert(tw->index, tw->entries, n, err);
}

int tree_writer_finish(struct tree_writer *tw, struct vm_error **err)
{
    return store_tree(tw, err);
}

static void begin_tree(struct tree_writer *tw)
{
    uint8_t header[TREE_HEADER];
    tw->number = tw->writer << NUMBER_COUNT_BITS | ++tw->n_trees;
    header_write(header, tw->number, &tw->repository);
    buffer_put(&tw->tree, header, sizeof(header));
}

/* Is this very node stored already? 1 with its reference, 0, or -1. */
static int find_node(struct tree_writer *tw, const struct index_entry *key, const void *node,
                     size_t len, struct recipe_ref *ret_ref, struct vm_error **err)
{
    struct index_entry e = *key;
    cleanup_buffer struct buffer there = {0};
    if (index_lookup(tw->index, &e, 1, err) < 0)
        return -1;
    if (e.len != RECIPE_REF_BYTES)
        return 0;
    struct recipe_ref ref = recipe_ref_read(e.value);
    bool ours = number_set_has(tw->shared, ref.tree); /* rescued, if it was condemned */
    if (ref.len != len || (!ours && number_set_has(tw->condemned, ref.tree)))
        return 0;
    struct vm_error *gone = NULL;
    if (tree_writer_read(tw, &ref, &there, &gone) < 0) {
        /* Collected or damaged: the index is a hint. Anything else is a failure of the store. */
        bool hint = gone->kind == VM_ERROR_NOT_FOUND || gone->kind == VM_ERROR_CORRUPT;
        error_propagate(hint ? NULL : err, gone);
        return hint ? 0 : -1;
    }
    if (there.len != len || memcmp(there.data, node, len) != 0)
        return 0;
    *ret_ref = ref;
    return number_set_add(tw->shared, ref.tree, err) < 0 ? -1 : 1;
}

static int note_entry(struct tree_writer *tw, const struct index_entry *key,
                      const struct recipe_ref *ref, struct vm_error **err)
{
    if (tw->n_entries == tw->entries_cap) {
        size_t cap = 2 * tw->entries_cap + 256;
        struct index_entry *entries = realloc(tw->entries, cap * sizeof(*entries));
        if (!entries)
            return error_nomem(err);
        tw->entries = entries;
        tw->entries_cap = cap;
    }
    struct index_entry *e = &tw->entries[tw->n_entries++];
    *e = *key;
    e->len = RECIPE_REF_BYTES;
    recipe_ref_write(ref, e->value);
    return 0;
}

int tree_writer_add(struct tree_writer *tw, const void *node, size_t len, bool may_exist,
                    struct recipe_ref *ret_ref, struct vm_error **err)
{
    struct page_id id;
    if (!len) {
        *ret_ref = (struct recipe_ref){0};
        return 0;
    }
    if (page_hasher_hash(&tw->hasher, node, len, &id, err) < 0)
        return -1;
    struct index_entry key = index_entry_make(INDEX_NODE, &id, NULL, 0);
    int found = may_exist ? find_node(tw, &key, node, len, ret_ref, err) : 0;
    if (found < 0)
        return -1;
    tw->stat.nodes++;
    tw->stat.shared += (unsigned)found;
    if (found)
        return 0;
    if (tw->number && tw->tree.len >= TREE_GOOD && store_tree(tw, err) < 0)
        return -1;
    if (!tw->number)
        begin_tree(tw);
    struct recipe_ref ref = {tw->number, (uint32_t)tw->tree.len, (uint32_t)len,
                             recipe_ref_hash(tw->number, node, len)};
    buffer_put(&tw->tree, node, len);
    if (tw->tree.failed)
        return error_nomem(err);
    *ret_ref = ref;
    return note_entry(tw, &key, &ref, err);
}

struct tree_writer_stat tree_writer_stat(const struct tree_writer *tw)
{
    return tw->stat;
}

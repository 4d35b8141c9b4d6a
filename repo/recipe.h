/* SPDX-License-Identifier: Apache-2.0 */
/*
 * recipe: where the pages of a file are. A tree of nodes: a leaf names the place of each of up to
 * 1024 pages (4 MiB), an inner node refers to up to 256 nodes of the level below. Nodes are stored
 * in trees (objects that hold many nodes, repo/tree.h) and never changed; versions of a file share
 * the nodes in which they do not differ. This module is their codec; no I/O.
 *
 * A node (little endian); what a reference covers is told by level and position alone:
 *
 *     u8   level: 0 for a leaf
 *     u8   zero
 *     leaf:   u16  packs, P
 *             u16  runs, R
 *             u16  zero
 *             P *  u64  a pack's number
 *             R *  run: u16 pages | 0x8000 if they are zero
 *                       unless zero: u16 index of the pack, u32 offset of the record / 8, u16
 *                       length of the record (header and payload) / 8, rounded up, u8 first page
 *                       within the record
 *             for each page that is not zero, in order: the first four bytes of its identity
 *     inner:  u16  children, C
 *             u32  zero
 *             C *  reference
 *
 * A reference is 24 bytes: u64 the tree's number, u32 offset, u32 length, u64 XXH3-64 of the node
 * seeded with the tree's number. All zero means that every page below is zero. Trailing zero pages
 * and zero children are left out, so that a node has one encoding.
 *
 * A location of a page is (pack, offset and length of the record, page within the record).
 */
#ifndef VMMIG_REPO_RECIPE_H
#define VMMIG_REPO_RECIPE_H

#include "base/bytes.h"
#include "repo/page.h"

enum {
    RECIPE_LEAF_PAGES = 1024,
    RECIPE_LEAF_BYTES = RECIPE_LEAF_PAGES * PAGE_BYTES,
    RECIPE_FANOUT = 256,
    RECIPE_LEVELS = 4, /* leaf and three above: 64 TiB */
    RECIPE_REF_BYTES = 24,
    RECIPE_NODE_MAX = 8 + RECIPE_LEAF_PAGES * (8 + 11 + 4),
};

#define RECIPE_FILE_MAX ((uint64_t)RECIPE_LEAF_BYTES << 24)

struct recipe_ref {
    uint64_t tree;
    uint32_t offset, len; /* len 0: zeros */
    uint64_t hash;
};

static inline bool recipe_ref_is_zero(const struct recipe_ref *r)
{
    return !r->len;
}

/* What may be asked for, or one of the many that are nothing. */
static inline bool recipe_ref_is_good(const struct recipe_ref *r)
{
    return r->len ? r->len <= RECIPE_NODE_MAX : !r->tree && !r->offset && !r->hash;
}

static inline bool recipe_ref_equal(const struct recipe_ref *a, const struct recipe_ref *b)
{
    return a->tree == b->tree && a->offset == b->offset && a->len == b->len && a->hash == b->hash;
}

struct recipe_page {
    uint64_t pack;
    uint32_t offset; /* of the record, in bytes */
    uint32_t len;    /* of the record, rounded up to 8; 0: a page of zeros */
    uint8_t page;    /* within the record */
    uint8_t id[4];   /* the first bytes of its identity */
};

struct recipe_leaf {
    struct recipe_page pages[RECIPE_LEAF_PAGES];
};

struct recipe_inner {
    unsigned level;
    struct recipe_ref children[RECIPE_FANOUT];
};

/* Levels above the leaves that a file of that size has: 0..3. */
unsigned recipe_depth(uint64_t size);
uint64_t recipe_ref_hash(uint64_t tree, const void *node, size_t len);
void recipe_ref_write(const struct recipe_ref *ref, uint8_t out[RECIPE_REF_BYTES]);
struct recipe_ref recipe_ref_read(const uint8_t in[RECIPE_REF_BYTES]);

/* Append the node. A leaf or inner node that is all zero is not stored: nothing is appended. */
void recipe_leaf_write(const struct recipe_leaf *leaf, struct buffer *out);
void recipe_inner_write(const struct recipe_inner *node, struct buffer *out);
/* Exactly one node; CORRUPT if it is not one of that level. */
int recipe_leaf_read(const uint8_t *data, size_t len, struct recipe_leaf *ret_leaf,
                     struct vm_error **err);
int recipe_inner_read(const uint8_t *data, size_t len, unsigned level,
                      struct recipe_inner *ret_node, struct vm_error **err);

/* Bytes of the node that `data` begins with, which other bytes may follow; 0 if there is none. */
size_t recipe_node_len(const uint8_t *data, size_t len);

#endif

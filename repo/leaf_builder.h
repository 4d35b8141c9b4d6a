/* SPDX-License-Identifier: Apache-2.0 */
/*
 * leaf_builder: puts leaves of recipes together while their pages find their places.
 *
 * A page's place is known at once when it is shared; the place of a new one only when its record
 * has been compressed and laid out. So leaves wait here, complete, until all their pages have
 * places, and are then written.
 *
 * At most LEAVES_OPEN leaves are being filled (the least recently touched is taken as complete, and
 * read back if it is touched again) and about LEAVES_WAITING wait; 48 KiB each. Threads: one.
 */
#ifndef VMMIG_REPO_LEAF_BUILDER_H
#define VMMIG_REPO_LEAF_BUILDER_H

#include "repo/dedup.h"
#include "repo/pack_writer.h"
#include "repo/tree.h"

enum { LEAVES_OPEN = 16, LEAVES_WAITING = 32 };

/*
 * A record of new pages from several extents, referred to before it is handed to the pack_writer.
 */
struct mixed_record {
    unsigned refs; /* places that name it, and the one who fills it */
    bool emitted;
    struct record_place place;
};

void mixed_record_unref(struct mixed_record *m);

/* Where a page is: at `stored` (len 0: zeros), or in a record that is not laid out yet. */
struct place {
    struct recipe_page stored; /* its `page` and `id` hold in every case */
    struct cached_footer *footer; /* with `record`; pinned */
    uint32_t record;
    struct mixed_record *mixed; /* counted in its refs */
};

struct leaf_builder;

struct leaf_builder *leaf_builder_create(struct pack_writer *pw, struct tree_writer *tw,
                                         struct vm_error **err);
void leaf_builder_destroy(struct leaf_builder *b);
DEFINE_CLEANUP(leaf_builder, struct leaf_builder *, leaf_builder_destroy)

/* A segment's part of its leaf. */
struct leaf_part {
    struct leaf *leaf;
    unsigned first; /* page within the leaf */
    const struct recipe_page *before; /* SEGMENT_PAGES pages as they were in the base, or NULL */
};

/* Open the leaf in which a segment lies; the part is good until leaf_builder_advance. */
int leaf_builder_open(struct leaf_builder *b, struct file_tree *t, uint64_t segment,
                      struct leaf_part *ret_part, struct vm_error **err);
/* Page i of the part is zero, or in a record of a footer, or in a mixed record (NULL: not). */
void leaf_builder_place_zero(struct leaf_part *part, unsigned i);
void leaf_builder_place(struct leaf_part *part, unsigned i, const struct page_id *id,
                        const struct record_place *place, unsigned page);
void leaf_builder_place_mixed(struct leaf_part *part, unsigned i, const struct page_id *id,
                              struct mixed_record *mixed, unsigned page);
/* Write what can be written. */
int leaf_builder_advance(struct leaf_builder *b, struct vm_error **err);
/* All mixed records are emitted: wait for the records, write every leaf. */
int leaf_builder_finish(struct leaf_builder *b, struct vm_error **err);

#endif

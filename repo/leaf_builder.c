/* SPDX-License-Identifier: Apache-2.0 */
#include "repo/leaf_builder.h"

#include <stdlib.h>

enum { SEGMENTS_PER_LEAF = RECIPE_LEAF_PAGES / SEGMENT_PAGES };

struct leaf {
    struct leaf *next;
    struct file_tree *tree;
    uint64_t number;
    struct place places[RECIPE_LEAF_PAGES];
    bool set[RECIPE_LEAF_PAGES];
    unsigned n_set;
    bool has_new; /* some page is in a record of this writer: no other version has this leaf */
    bool complete;
    uint64_t touched_at;
    struct recipe_leaf *base; /* as it was before, or NULL if it was all zero */
};

struct leaf_builder {
    struct pack_writer *pw;
    struct tree_writer *tw;
    struct leaf *leaves; /* open and waiting ones */
    unsigned n_open, n_waiting;
    uint64_t clock;
};

void mixed_record_unref(struct mixed_record *m)
{
    if (!m || --m->refs)
        return;
    if (m->emitted)
        footer_cache_unpin(m->place.footer);
    free(m);
}

struct leaf_builder *leaf_builder_create(struct pack_writer *pw, struct tree_writer *tw,
                                         struct vm_error **err)
{
    struct leaf_builder *b = calloc(1, sizeof(*b));
    if (!b) {
        error_nomem(err);
        return NULL;
    }
    b->pw = pw;
    b->tw = tw;
    return b;
}

static void clear_place(struct place *p)
{
    if (p->footer)
        footer_cache_unpin(p->footer);
    mixed_record_unref(p->mixed);
    *p = (struct place){.footer = NULL};
}

static void free_leaf(struct leaf *l)
{
    for (unsigned i = 0; i < RECIPE_LEAF_PAGES; i++)
        clear_place(&l->places[i]);
    free(l->base);
    free(l);
}

void leaf_builder_destroy(struct leaf_builder *b)
{
    if (!b)
        return;
    while (b->leaves) {
        struct leaf *l = b->leaves;
        b->leaves = l->next;
        free_leaf(l);
    }
    free(b);
}

/* ---- opening ---- */

static struct leaf *find_leaf(struct leaf_builder *b, const struct file_tree *t, uint64_t number)
{
    struct leaf *l = b->leaves;
    while (l && (l->tree != t || l->number != number))
        l = l->next;
    return l;
}

static void set_complete(struct leaf_builder *b, struct leaf *l, bool complete)
{
    if (l->complete == complete)
        return;
    l->complete = complete;
    b->n_open += complete ? -1u : 1u;
    b->n_waiting += complete ? 1u : -1u;
}

static int load_base(struct leaf_builder *b, struct leaf *l, struct vm_error **err)
{
    struct recipe_ref ref;
    cleanup_buffer struct buffer node = {0};
    if (file_tree_get(l->tree, l->number, &ref, err) < 0)
        return -1;
    if (recipe_ref_is_zero(&ref))
        return 0;
    l->base = malloc(sizeof(*l->base));
    if (!l->base)
        return error_nomem(err);
    if (tree_writer_read(b->tw, &ref, &node, err) < 0 ||
        recipe_leaf_read(node.data, node.len, l->base, err) < 0)
        return -1;
    for (unsigned i = 0; i < RECIPE_LEAF_PAGES; i++)
        l->places[i].stored = l->base->pages[i];
    return 0;
}

static struct leaf *new_leaf(struct leaf_builder *b, struct file_tree *t, uint64_t number,
                             struct vm_error **err)
{
    struct leaf *l = calloc(1, sizeof(*l));
    if (!l) {
        error_nomem(err);
        return NULL;
    }
    l->tree = t;
    l->number = number;
    if (load_base(b, l, err) < 0) {
        free_leaf(l);
        return NULL;
    }
    l->next = b->leaves;
    b->leaves = l;
    b->n_open++;
    return l;
}

/* Too many are open: the one that was not touched for longest is taken as complete. */
static void limit_open(struct leaf_builder *b)
{
    while (b->n_open > LEAVES_OPEN) {
        struct leaf *oldest = NULL;
        for (struct leaf *l = b->leaves; l; l = l->next)
            if (!l->complete && (!oldest || l->touched_at < oldest->touched_at))
                oldest = l;
        set_complete(b, oldest, true);
    }
}

int leaf_builder_open(struct leaf_builder *b, struct file_tree *t, uint64_t segment,
                      struct leaf_part *ret_part, struct vm_error **err)
{
    uint64_t number = segment / SEGMENTS_PER_LEAF;
    struct leaf *l = find_leaf(b, t, number);
    if (!l)
        l = new_leaf(b, t, number, err);
    if (!l)
        return -1;
    set_complete(b, l, false);
    l->touched_at = ++b->clock;
    unsigned first = (unsigned)(segment % SEGMENTS_PER_LEAF) * SEGMENT_PAGES;
    *ret_part = (struct leaf_part){l, first, l->base ? l->base->pages + first : NULL};
    return 0;
}

/* ---- places ---- */

static struct place *begin_place(struct leaf_part *part, unsigned i)
{
    struct leaf *l = part->leaf;
    struct place *p = &l->places[part->first + i];
    l->n_set += !l->set[part->first + i];
    l->set[part->first + i] = true;
    clear_place(p);
    return p;
}

void leaf_builder_place_zero(struct leaf_part *part, unsigned i)
{
    begin_place(part, i);
}

static void begin_stored(struct place *p, const struct page_id *id, unsigned page)
{
    memcpy(p->stored.id, id->bytes, sizeof(p->stored.id));
    p->stored.page = (uint8_t)page;
}

/* From footer and record to pack, offset and length; false if the record is not laid out yet. */
static bool settle(struct place *p)
{
    if (p->mixed && p->mixed->emitted) {
        p->footer = p->mixed->place.footer;
        p->record = p->mixed->place.record;
        footer_cache_pin(p->footer);
        mixed_record_unref(p->mixed);
        p->mixed = NULL;
    }
    if (p->mixed)
        return false;
    if (!p->footer)
        return true;
    if (!record_is_laid(p->footer, p->record))
        return false;
    const struct footer_record *r = &p->footer->footer.records[p->record];
    p->stored.pack = p->footer->footer.pack;
    p->stored.offset = r->offset;
    p->stored.len = record_room(r->len);
    footer_cache_unpin(p->footer);
    p->footer = NULL;
    return true;
}

void leaf_builder_place(struct leaf_part *part, unsigned i, const struct page_id *id,
                        const struct record_place *place, unsigned page)
{
    struct place *p = begin_place(part, i);
    begin_stored(p, id, page);
    p->footer = place->footer;
    p->record = place->record;
    footer_cache_pin(p->footer);
    part->leaf->has_new |= place->footer->own;
    settle(p);
}

void leaf_builder_place_mixed(struct leaf_part *part, unsigned i, const struct page_id *id,
                              struct mixed_record *mixed, unsigned page)
{
    struct place *p = begin_place(part, i);
    begin_stored(p, id, page);
    p->mixed = mixed;
    mixed->refs++;
    part->leaf->has_new = true;
}

/* ---- writing ---- */

static bool settle_leaf(struct leaf *l)
{
    bool all = true;
    for (unsigned i = 0; i < RECIPE_LEAF_PAGES; i++)
        all &= settle(&l->places[i]);
    return all;
}

static int write_leaf(struct leaf_builder *b, struct leaf *l, struct vm_error **err)
{
    cleanup_free struct recipe_leaf *content = malloc(sizeof(*content));
    cleanup_buffer struct buffer node = {0};
    struct recipe_ref ref;
    if (!content)
        return error_nomem(err);
    for (unsigned i = 0; i < RECIPE_LEAF_PAGES; i++)
        content->pages[i] = l->places[i].stored;
    recipe_leaf_write(content, &node);
    if (node.failed)
        return error_nomem(err);
    if (tree_writer_add(b->tw, node.data, node.len, !l->has_new, &ref, err) < 0)
        return -1;
    return file_tree_set(l->tree, l->number, &ref, err);
}

/* All that a waiting leaf's places need to be laid out. */
static int wait_for_leaf(struct leaf_builder *b, struct leaf *l, struct vm_error **err)
{
    for (unsigned i = 0; i < RECIPE_LEAF_PAGES; i++) {
        struct place *p = &l->places[i];
        if (!settle(p) && p->footer && pack_writer_wait_laid(b->pw, p->footer, p->record, err) < 0)
            return -1;
    }
    return 0;
}

static int write_settled(struct leaf_builder *b, struct vm_error **err)
{
    for (struct leaf **at = &b->leaves; *at;) {
        struct leaf *l = *at;
        if (!l->complete || !settle_leaf(l)) {
            at = &l->next;
            continue;
        }
        if (write_leaf(b, l, err) < 0)
            return -1;
        *at = l->next;
        b->n_waiting--;
        free_leaf(l);
    }
    return 0;
}

int leaf_builder_advance(struct leaf_builder *b, struct vm_error **err)
{
    for (struct leaf *l = b->leaves; l; l = l->next)
        if (!l->complete && l->n_set >= file_tree_leaf_pages(l->tree, l->number))
            set_complete(b, l, true);
    limit_open(b);
    if (write_settled(b, err) < 0)
        return -1;
    if (b->n_waiting <= LEAVES_WAITING)
        return 0;
    for (struct leaf *l = b->leaves; l; l = l->next)
        if (l->complete && wait_for_leaf(b, l, err) < 0)
            return -1;
    return write_settled(b, err);
}

int leaf_builder_finish(struct leaf_builder *b, struct vm_error **err)
{
    for (struct leaf *l = b->leaves; l; l = l->next) {
        set_complete(b, l, true);
        if (wait_for_leaf(b, l, err) < 0)
            return -1;
    }
    return write_settled(b, err);
}

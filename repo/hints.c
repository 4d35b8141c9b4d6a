/* SPDX-License-Identifier: Apache-2.0 */
#include "repo/hints.h"

#include <stdlib.h>

enum { ENTRIES_BATCH = 8192 };

struct hints {
    struct index *index;
    hints_apply apply;
    struct page_hasher hasher;
    uint64_t applied;
    struct index_entry entries[ENTRIES_BATCH];
    size_t n;
};

struct hints *hints_create(struct index *x, hints_apply apply, struct vm_error **err)
{
    struct hints *h = calloc(1, sizeof(*h));
    if (!h) {
        error_nomem(err);
        return NULL;
    }
    h->index = x;
    h->apply = apply;
    if (page_hasher_init(&h->hasher, err) < 0) {
        hints_destroy(h);
        return NULL;
    }
    return h;
}

void hints_destroy(struct hints *h)
{
    if (!h)
        return;
    page_hasher_finish(&h->hasher);
    free(h);
}

int hints_flush(struct hints *h, struct vm_error **err)
{
    size_t n = h->n;
    h->applied += n;
    h->n = 0;
    return h->apply(h->index, h->entries, n, err);
}

static int add(struct hints *h, enum index_kind kind, const struct page_id *id, const void *value,
               size_t len, struct vm_error **err)
{
    if (h->n == ENTRIES_BATCH && hints_flush(h, err) < 0)
        return -1;
    h->entries[h->n++] = index_entry_make(kind, id, value, len);
    return 0;
}

int hints_add_footer(struct hints *h, const struct footer *f, struct vm_error **err)
{
    uint8_t value[8];
    put_le64(value, f->pack);
    for (uint32_t i = 0; i < f->n_records; i++) {
        const struct footer_record *r = &f->records[i];
        struct page_id extent;
        if (r->mask && (page_hasher_extent(&h->hasher, &f->ids[r->first_page], r->mask, &extent,
                                           err) < 0 ||
                        add(h, INDEX_EXTENT, &extent, value, sizeof(value), err) < 0))
            return -1;
    }
    for (uint32_t i = 0; i < f->n_pages; i++)
        if (index_samples(&f->ids[i]) &&
            add(h, INDEX_PAGE, &f->ids[i], value, sizeof(value), err) < 0)
            return -1;
    return 0;
}

int hints_add_node(struct hints *h, const struct recipe_ref *ref, const void *node, size_t len,
                   struct vm_error **err)
{
    struct page_id id;
    uint8_t value[RECIPE_REF_BYTES];
    recipe_ref_write(ref, value);
    if (page_hasher_hash(&h->hasher, node, len, &id, err) < 0)
        return -1;
    return add(h, INDEX_NODE, &id, value, sizeof(value), err);
}

uint64_t hints_applied(const struct hints *h)
{
    return h->applied;
}

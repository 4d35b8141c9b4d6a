/* SPDX-License-Identifier: Apache-2.0 */
#include "repo/footer_cache.h"
#include "repo/names.h"
#include "repo/progress.h"
#include "repo/recipe_walk.h"
#include "repo/scrub.h"

#include <stdlib.h>

enum { PACKS_BATCH = 8, ENTRIES_BATCH = 8192 };

struct rebuild {
    struct repo *repo;
    struct progress progress;
    struct page_hasher hasher;
    struct rebuild_report report;
    uint64_t packs[PACKS_BATCH];
    size_t n_packs;
    struct index_entry entries[ENTRIES_BATCH];
    size_t n_entries;
};

static int flush_entries(struct rebuild *b, struct vm_error **err)
{
    b->report.entries += b->n_entries;
    size_t n = b->n_entries;
    b->n_entries = 0;
    return index_insert(repo_index(b->repo), b->entries, n, err);
}

static int add_entry(struct rebuild *b, enum index_kind kind, const struct page_id *id,
                     const void *value, size_t len, struct vm_error **err)
{
    if (b->n_entries == ENTRIES_BATCH && flush_entries(b, err) < 0)
        return -1;
    b->entries[b->n_entries++] = index_entry_make(kind, id, value, len);
    return 0;
}

static int enter_footer(struct rebuild *b, const struct footer *f, struct vm_error **err)
{
    uint8_t value[8];
    put_le64(value, f->pack);
    for (uint32_t i = 0; i < f->n_records; i++) {
        const struct footer_record *r = &f->records[i];
        struct page_id extent;
        if (r->mask && (page_hasher_extent(&b->hasher, &f->ids[r->first_page], r->mask, &extent,
                                           err) < 0 ||
                        add_entry(b, INDEX_EXTENT, &extent, value, sizeof(value), err) < 0))
            return -1;
    }
    for (uint32_t i = 0; i < f->n_pages; i++)
        if (index_samples(&f->ids[i]) &&
            add_entry(b, INDEX_PAGE, &f->ids[i], value, sizeof(value), err) < 0)
            return -1;
    return 0;
}

static int enter_packs(struct rebuild *b, struct vm_error **err)
{
    struct footer footers[PACKS_BATCH];
    struct vm_error *problems[PACKS_BATCH];
    size_t n = b->n_packs;
    b->n_packs = 0;
    if (footer_read_many(repo_store(b->repo), b->packs, n, footers, problems, err) < 0)
        return -1;
    int result = 0;
    for (size_t i = 0; i < n; i++) {
        b->report.unreadable += problems[i] != NULL;
        b->report.packs += footers[i].n_records > 0;
        if (!result && footers[i].n_records)
            result = enter_footer(b, &footers[i], err);
        error_free(problems[i]);
        footer_finish(&footers[i]);
    }
    return result < 0 ? -1 : progress_add(&b->progress, n, UINT64_MAX, err);
}

static int take_pack(const char *name, void *arg, struct vm_error **err)
{
    struct rebuild *b = arg;
    if (object_number(PACK_PREFIX, name, &b->packs[b->n_packs]))
        b->n_packs++;
    return b->n_packs == PACKS_BATCH ? enter_packs(b, err) : 0;
}

static int visit_node(const struct recipe_ref *ref, const void *data, size_t len, void *arg,
                      struct vm_error **err)
{
    struct rebuild *b = arg;
    struct page_id id;
    uint8_t value[RECIPE_REF_BYTES];
    recipe_ref_write(ref, value);
    if (page_hasher_hash(&b->hasher, data, len, &id, err) < 0)
        return -1;
    return add_entry(b, INDEX_NODE, &id, value, sizeof(value), err);
}

static int visit_leaf(const struct recipe_leaf *leaf, uint64_t number, bool *ret_damaged, void *arg,
                      struct vm_error **err)
{
    return 0;
}

static int enter_image(const struct image *image, void *arg, struct vm_error **err)
{
    for (unsigned i = 0; i < image->n_files; i++) {
        bool damaged;
        if (recipe_walk_file(arg, &image->files[i].root, image->files[i].size, &damaged, err) < 0)
            return -1;
    }
    return 0;
}

static int rebuild(struct rebuild *b, struct vm_error **err)
{
    struct store *s = repo_store(b->repo);
    struct recipe_visitor visitor = {.node = visit_node, .leaf = visit_leaf, .arg = b};
    CLEANUP(recipe_walk) struct recipe_walk *walk = recipe_walk_create(s, &visitor, err);
    if (!walk || page_hasher_init(&b->hasher, err) < 0)
        return -1;
    int result = store_list(s, STORE_PACK, PACK_PREFIX, take_pack, b, err);
    if (!result)
        result = enter_packs(b, err);
    if (!result)
        result = catalogue_list(s, enter_image, walk, err);
    if (!result)
        result = flush_entries(b, err);
    page_hasher_finish(&b->hasher);
    return result;
}

int repo_rebuild_index(struct repo *r, const struct repo_control *control,
                       struct rebuild_report *ret_report, struct vm_error **err)
{
    struct repo_stat stat;
    cleanup_free struct rebuild *b = calloc(1, sizeof(*b));
    if (!b)
        return error_nomem(err);
    if (repo_stat(r, &stat, err) < 0)
        return -1;
    b->repo = r;
    progress_init(&b->progress, control, stat.packs);
    int result = rebuild(b, err);
    if (!result) {
        progress_end(&b->progress, 0);
        *ret_report = b->report;
    }
    progress_finish(&b->progress);
    return result;
}

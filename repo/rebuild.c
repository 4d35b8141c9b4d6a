/* SPDX-License-Identifier: Apache-2.0 */
#include "repo/footer_cache.h"
#include "repo/hints.h"
#include "repo/names.h"
#include "repo/progress.h"
#include "repo/recipe_walk.h"
#include "repo/scrub.h"

#include <stdlib.h>

enum { PACKS_BATCH = 8 };

struct rebuild {
    struct repo *repo;
    struct progress progress;
    struct hints *hints;
    struct rebuild_report report;
    uint64_t packs[PACKS_BATCH];
    size_t n_packs;
};

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
            result = hints_add_footer(b->hints, &footers[i], err);
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
    return hints_add_node(b->hints, ref, data, len, err);
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
    CLEANUP(hints)
    struct hints *hints = hints_create(repo_index(b->repo), index_insert, err);
    if (!walk || !hints)
        return -1;
    b->hints = hints;
    int result = store_list(s, STORE_PACK, PACK_PREFIX, take_pack, b, err);
    if (!result)
        result = enter_packs(b, err);
    if (!result)
        result = catalogue_list(s, enter_image, catalogue_skip, walk, err);
    if (!result)
        result = hints_flush(hints, err);
    b->report.entries = hints_applied(hints);
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

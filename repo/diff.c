/* SPDX-License-Identifier: Apache-2.0 */
#include "repo/footer_cache.h"
#include "repo/forwarding.h"
#include "repo/repo.h"

#include <stdlib.h>

enum { FOOTERS_BYTES = 16 << 20, RENEWALS_MAX = 4 };

/* One side of a comparison; tree NULL: the image has no such file, which is as zeros. */
struct side {
    struct image image;
    struct file_tree *tree;
    struct recipe_leaf leaf;
};

struct diff {
    struct repo *repo;
    struct footer_cache *footers;
    struct forwards *forwards;
    struct side a, b;
    image_diff_fn *visit;
    void *arg;
    struct image_difference pending; /* len 0: none; grows while differences adjoin */
    uint64_t size;
};

static int flush(struct diff *d, struct vm_error **err)
{
    if (!d->pending.len)
        return 0;
    uint64_t end = d->pending.offset + d->pending.len;
    if (end > d->size)
        d->pending.len -= end - d->size;
    int result = d->visit(&d->pending, d->arg, err);
    d->pending.len = 0;
    return result;
}

static int report_page(struct diff *d, uint64_t offset, struct vm_error **err)
{
    if (d->pending.len && d->pending.offset + d->pending.len == offset) {
        d->pending.len += PAGE_BYTES;
        return 0;
    }
    if (flush(d, err) < 0)
        return -1;
    d->pending.offset = offset;
    d->pending.len = PAGE_BYTES;
    return 0;
}

/* From the footer of the pack that the place names; false if that has no such page. */
static int identity_at(struct diff *d, const struct recipe_page *p, struct page_id *ret_id,
                       bool *ret_found, struct vm_error **err)
{
    *ret_found = false;
    if (!footer_cache_knows(d->footers, p->pack) &&
        footer_cache_load(d->footers, &p->pack, 1, err) < 0)
        return -1;
    const struct cached_footer *f = footer_cache_get(d->footers, p->pack);
    for (uint32_t i = 0; f && i < f->footer.n_records && !*ret_found; i++) {
        const struct footer_record *r = &f->footer.records[i];
        if (r->offset == p->offset && p->page < r->n_pages) {
            *ret_id = f->footer.ids[r->first_page + p->page];
            *ret_found = true;
        }
    }
    return 0;
}

/* The whole identity of a page, from its pack's footer, or where its pack's forwarding leads. */
static int identity(struct diff *d, const struct recipe_page *p, struct page_id *ret_id,
                    struct vm_error **err)
{
    struct recipe_page place = *p;
    bool found, forwarded = false;
    if (identity_at(d, &place, ret_id, &found, err) < 0 ||
        (!found && forwards_find(d->forwards, &place, &forwarded, err) < 0) ||
        (forwarded && identity_at(d, &place, ret_id, &found, err) < 0))
        return -1;
    return found ? 0
                 : error_set(err, VM_ERROR_CORRUPT, "pack %016llx has no page at %u.%u",
                             (unsigned long long)p->pack, p->offset, p->page);
}

/* 1 if they are the same, 0 if not. */
static int same_page(struct diff *d, const struct recipe_page *a, const struct recipe_page *b,
                     struct vm_error **err)
{
    struct page_id id_a, id_b;
    if (!a->len || !b->len)
        return !a->len && !b->len;
    if (memcmp(a->id, b->id, sizeof(a->id)) != 0)
        return 0;
    if (a->pack == b->pack && a->offset == b->offset && a->page == b->page)
        return 1;
    if (identity(d, a, &id_a, err) < 0 || identity(d, b, &id_b, err) < 0)
        return -1;
    return page_id_equal(&id_a, &id_b);
}

static int load_side(struct diff *d, struct side *s, uint64_t leaf, struct recipe_ref *ret_ref,
                     struct vm_error **err)
{
    *ret_ref = (struct recipe_ref){0};
    if (s->tree && leaf < file_tree_leaves(s->tree) &&
        file_tree_get(s->tree, leaf, ret_ref, err) < 0)
        return -1;
    return 0;
}

static int compare_leaf(struct diff *d, uint64_t number, bool differs[RECIPE_LEAF_PAGES],
                        struct vm_error **err)
{
    memset(differs, 0, RECIPE_LEAF_PAGES * sizeof(*differs));
    struct recipe_ref a, b;
    if (load_side(d, &d->a, number, &a, err) < 0 || load_side(d, &d->b, number, &b, err) < 0)
        return -1;
    if (recipe_ref_equal(&a, &b))
        return 0;
    struct store *s = repo_store(d->repo);
    if (tree_read_leaf(s, &a, &d->a.leaf, err) < 0 || tree_read_leaf(s, &b, &d->b.leaf, err) < 0)
        return -1;
    for (unsigned i = 0; i < RECIPE_LEAF_PAGES; i++) {
        int same = same_page(d, &d->a.leaf.pages[i], &d->b.leaf.pages[i], err);
        if (same < 0)
            return -1;
        differs[i] = !same;
    }
    return 0;
}

static int open_side(struct diff *d, struct side *s, struct vm_error **err)
{
    const struct image_entry *e = image_find_file(&s->image, d->pending.file);
    file_tree_destroy(s->tree);
    s->tree = NULL;
    if (!e)
        return 0;
    s->tree = file_tree_create(repo_store(d->repo), e->size, &e->root, e->size, err);
    return s->tree ? 0 : -1;
}

static int renew_side(struct diff *d, struct side *s, bool *ret_moved, struct vm_error **err)
{
    enum image_fate fate;
    cleanup_free struct image *now = malloc(sizeof(*now));
    if (!now)
        return error_nomem(err);
    if (catalogue_find_again(repo_store(d->repo), &s->image, now, &fate, err) < 0)
        return -1;
    if (fate == IMAGE_GONE)
        return error_set(err, VM_ERROR_NOT_FOUND, "image %s was deleted meanwhile", s->image.name);
    if (fate != IMAGE_MOVED)
        return 0;
    *ret_moved = true;
    s->image = *now;
    return open_side(d, s, err);
}

/* Something is not there, as `problem` says: 0 if an image was moved. Takes the problem over. */
static int renew(struct diff *d, struct vm_error *problem, struct vm_error **err)
{
    cleanup_error struct vm_error *kept = problem;
    bool moved = false, lacks = problem->kind == VM_ERROR_CORRUPT ||
                                problem->kind == VM_ERROR_NOT_FOUND;
    if (lacks && (renew_side(d, &d->a, &moved, err) < 0 || renew_side(d, &d->b, &moved, err) < 0))
        return -1;
    return moved ? 0 : error_propagate(err, steal_ptr(&kept));
}

static int diff_leaf(struct diff *d, uint64_t number, struct vm_error **err)
{
    bool differs[RECIPE_LEAF_PAGES];
    struct vm_error *problem = NULL;
    for (int i = 0; compare_leaf(d, number, differs, &problem) < 0; i++) {
        if (i == RENEWALS_MAX)
            return error_propagate(err, problem);
        if (renew(d, problem, err) < 0)
            return -1;
        problem = NULL;
    }
    for (unsigned i = 0; i < RECIPE_LEAF_PAGES; i++)
        if (differs[i] &&
            report_page(d, number * RECIPE_LEAF_BYTES + (uint64_t)i * PAGE_BYTES, err) < 0)
            return -1;
    return 0;
}

/* Two files; one of the images may have none of that name. */
static int diff_file(struct diff *d, const char *name, struct vm_error **err)
{
    const struct image_entry *a = image_find_file(&d->a.image, name);
    const struct image_entry *b = image_find_file(&d->b.image, name);
    uint64_t size_a = a ? a->size : 0, size_b = b ? b->size : 0;
    d->size = size_a > size_b ? size_a : size_b;
    d->pending = (struct image_difference){.file = name};
    int result = open_side(d, &d->a, err) < 0 || open_side(d, &d->b, err) < 0 ? -1 : 0;
    for (uint64_t i = 0; !result && i * RECIPE_LEAF_BYTES < d->size; i++)
        result = diff_leaf(d, i, err);
    return result < 0 ? -1 : flush(d, err);
}

static int diff_images(struct diff *d, const struct image *a, const struct image *b,
                       struct vm_error **err)
{
    d->a.image = *a;
    d->b.image = *b;
    for (unsigned i = 0; i < a->n_files; i++)
        if (diff_file(d, a->files[i].name, err) < 0)
            return -1;
    for (unsigned i = 0; i < b->n_files; i++)
        if (!image_find_file(a, b->files[i].name) && diff_file(d, b->files[i].name, err) < 0)
            return -1;
    return 0;
}

int image_diff(struct repo *r, const char *a, const char *b, image_diff_fn *visit, void *arg,
               struct vm_error **err)
{
    cleanup_free struct image *image_a = malloc(sizeof(*image_a));
    cleanup_free struct image *image_b = malloc(sizeof(*image_b));
    cleanup_free struct diff *d = calloc(1, sizeof(*d));
    if (!image_a || !image_b || !d)
        return error_nomem(err);
    if (catalogue_find(repo_store(r), a, image_a, err) < 0 ||
        catalogue_find(repo_store(r), b, image_b, err) < 0)
        return -1;
    d->repo = r;
    d->visit = visit;
    d->arg = arg;
    d->footers = footer_cache_create(repo_store(r), FOOTERS_BYTES, err);
    d->forwards = d->footers ? forwards_create(repo_store(r), err) : NULL;
    int result = d->forwards ? diff_images(d, image_a, image_b, err) : -1;
    file_tree_destroy(d->a.tree);
    file_tree_destroy(d->b.tree);
    forwards_destroy(d->forwards);
    footer_cache_destroy(d->footers);
    return result;
}

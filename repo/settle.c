/* SPDX-License-Identifier: Apache-2.0 */
#include "repo/settle.h"
#include "repo/forwarding.h"
#include "repo/quarantine.h"
#include "repo/recipe_walk.h"

#include "base/fault.h"
#include "base/log.h"

#include <stdlib.h>

struct settling {
    struct repo *repo;
    struct store *store;
    struct forwards *forwards;
    struct recipe_walk *walk; /* its "damaged" means: leads through a forwarding */
    bool unreadable;          /* the image that is looked at has a node that cannot be read */
    struct pack_presence presence;
    struct quarantine quarantine;
    const struct number_set *condemned; /* of the image that is being settled, or none */
    struct object_set *shared;          /* likewise; NULL: nothing is settled yet */
    bool moved;                         /* something of that image has another place now */
    uint64_t settled;
    struct recipe_leaf leaf;
};

/* Is `to` known to be damaged, and where the recipe leads not? Then it must not be left. */
static int is_worse(struct settling *s, const struct recipe_page *to,
                    const struct recipe_page *from, bool *ret_worse, struct vm_error **err)
{
    const struct number_set none = {0};
    *ret_worse = quarantine_has(&s->quarantine, to->pack, to->offset) &&
                 !quarantine_has_record(&s->quarantine, from->pack, from->offset);
    return *ret_worse ? pack_is_safe(&s->presence, &none, from->pack, ret_worse, err) : 0;
}

/*
 * To where its forwarding leads, if that may be named: the pack is there, and not condemned, or
 * shared already. A forwarding may outlive its target, beside a pack that a writer shares. A page
 * that stays is held by the image as it was.
 */
static int follow_page(struct settling *s, struct recipe_page *page, bool *ret_changed,
                       struct vm_error **err)
{
    const struct number_set none = {0};
    struct recipe_page to = *page;
    bool found, safe, worse;
    if (forwards_find(s->forwards, &to, &found, err) < 0)
        return -1;
    if (!found)
        return 0;
    if (is_worse(s, &to, page, &worse, err) < 0)
        return -1;
    if (worse)
        return 0;
    bool ours = s->shared && number_set_has(&s->shared->packs, to.pack);
    if (pack_is_safe(&s->presence, ours || !s->condemned ? &none : s->condemned, to.pack, &safe,
                     err) < 0)
        return -1;
    if (!safe)
        return 0;
    *page = to;
    *ret_changed = true;
    return s->shared ? number_set_add(&s->shared->packs, to.pack, err) : 0;
}

/* Every page of the leaf where it is now; *ret_changed. */
static int follow_leaf(struct settling *s, struct recipe_leaf *leaf, bool *ret_changed,
                       struct vm_error **err)
{
    const struct number_set *known = forwards_known(s->forwards);
    *ret_changed = false;
    for (unsigned i = 0; i < RECIPE_LEAF_PAGES; i++) {
        struct recipe_page *p = &leaf->pages[i];
        if (p->len && number_set_has(known, p->pack) && follow_page(s, p, ret_changed, err) < 0)
            return -1;
    }
    return 0;
}

static int visit_leaf(const struct recipe_leaf *leaf, uint64_t number, bool *ret_damaged, void *arg,
                      struct vm_error **err)
{
    struct settling *s = arg;
    s->leaf = *leaf;
    return follow_leaf(s, &s->leaf, ret_damaged, err);
}

static void visit_unreadable(const struct recipe_ref *ref, const struct vm_error *problem,
                             void *arg)
{
    ((struct settling *)arg)->unreadable = true;
}

/* ---- one image ---- */

static int settle_leaf(struct settling *s, struct file_tree *tree, uint64_t number,
                       struct tree_writer *tw, struct vm_error **err)
{
    struct recipe_ref ref;
    cleanup_buffer struct buffer node = {0};
    bool changed;
    if (file_tree_get(tree, number, &ref, err) < 0)
        return -1;
    if (recipe_ref_is_zero(&ref))
        return 0;
    if (tree_read_leaf(s->store, &ref, &s->leaf, err) < 0 ||
        follow_leaf(s, &s->leaf, &changed, err) < 0)
        return -1;
    if (!changed)
        return 0;
    s->moved = true;
    recipe_leaf_write(&s->leaf, &node);
    if (node.failed)
        return error_nomem(err);
    if (tree_writer_add(tw, node.data, node.len, true, &ref, err) < 0)
        return -1;
    return file_tree_set(tree, number, &ref, err);
}

/* Another list may be open from now on: what was known to be there may go. */
static int checkpoint(struct settling *s, struct registration *r, struct vm_error **err)
{
    bool changed;
    if (registration_checkpoint(r, s->shared, &changed, err) < 0)
        return -1;
    if (changed)
        pack_presence_forget(&s->presence);
    return 0;
}

static int settle_file(struct settling *s, struct image_entry *file, struct registration *r,
                       struct tree_writer *tw, struct vm_error **err)
{
    CLEANUP(file_tree)
    struct file_tree *tree = file_tree_create(s->store, file->size, &file->root, file->size, err);
    if (!tree)
        return -1;
    for (uint64_t i = 0; i < file_tree_leaves(tree); i++) {
        if (settle_leaf(s, tree, i, tw, err) < 0 || (i % 256 == 255 && checkpoint(s, r, err) < 0))
            return -1;
    }
    return file_tree_finish(tree, tw, &file->root, err);
}

static int settle_files(struct settling *s, struct image *image, struct registration *r,
                        struct vm_error **err)
{
    CLEANUP(tree_writer)
    struct tree_writer *tw = tree_writer_create(
        s->store, repo_index(s->repo), repo_uuid(s->repo), registration_number(r),
        &registration_condemned(r)->trees, &s->shared->trees, err);
    if (!tw)
        return -1;
    for (unsigned i = 0; i < image->n_files; i++)
        if (settle_file(s, &image->files[i], r, tw, err) < 0)
            return -1;
    if (!s->moved)
        return 0;
    if (tree_writer_finish(tw, err) < 0)
        return -1;
    (void)FAULT("repo.settle-stored");
    return catalogue_commit(r, image, s->shared, err);
}

static int settle_image(struct settling *s, const struct image *image, struct vm_error **err)
{
    cleanup_object_set struct object_set shared = {{0}, {0}};
    CLEANUP(registration) struct registration *r = catalogue_register_swap(s->store, image, err);
    cleanup_free struct image *swapped = malloc(sizeof(*swapped));
    if (!swapped || !r)
        return r ? error_nomem(err) : -1;
    /* Only what is found after registering may be named. */
    forwards_forget(s->forwards);
    pack_presence_forget(&s->presence);
    *swapped = *image;
    s->shared = &shared;
    s->condemned = &registration_condemned(r)->packs;
    s->moved = false;
    int result = settle_files(s, swapped, r, err);
    s->shared = NULL;
    s->condemned = NULL;
    if (result < 0)
        return -1;
    s->settled += s->moved;
    (void)FAULT("repo.settled");
    return 0;
}

/* ---- all ---- */

/* Changed, fenced, deleted meanwhile, or damaged: a later collection sees to it. */
static bool is_left(const struct vm_error *problem)
{
    return problem->kind == VM_ERROR_CONFLICT || problem->kind == VM_ERROR_REFUSED ||
           problem->kind == VM_ERROR_NOT_FOUND || problem->kind == VM_ERROR_CORRUPT;
}

static int look_at_image(const struct image *image, void *arg, struct vm_error **err)
{
    struct settling *s = arg;
    struct vm_error *problem = NULL;
    bool any = false;
    s->unreadable = false;
    for (unsigned i = 0; i < image->n_files; i++) {
        bool through;
        if (recipe_walk_file(s->walk, &image->files[i].root, image->files[i].size, &through, err) <
            0)
            return -1;
        any |= through;
    }
    if (!any || s->unreadable || settle_image(s, image, &problem) == 0)
        return 0;
    if (!is_left(problem))
        return error_propagate(err, problem);
    log_info("an image keeps its old places", "image=%s reason=%s", log_q(image->name),
             log_q(error_message(problem)));
    error_free(problem);
    return 0;
}

int settle_images(struct repo *r, uint64_t *ret_images, struct vm_error **err)
{
    struct settling *s = calloc(1, sizeof(*s));
    *ret_images = 0;
    if (!s)
        return error_nomem(err);
    struct recipe_visitor visitor = {.leaf = visit_leaf, .unreadable = visit_unreadable, .arg = s};
    s->repo = r;
    s->store = repo_store(r);
    s->presence.store = s->store;
    s->forwards = forwards_create(s->store, err);
    int result = s->forwards ? forwards_scan(s->forwards, err) : -1;
    if (!result)
        result = quarantine_load(s->store, &s->quarantine, err);
    if (!result && forwards_known(s->forwards)->n) {
        s->walk = recipe_walk_create(s->store, &visitor, err);
        result = s->walk ? catalogue_list(s->store, look_at_image, catalogue_skip, s, err) : -1;
    }
    *ret_images = s->settled;
    recipe_walk_destroy(s->walk);
    pack_presence_forget(&s->presence);
    quarantine_finish(&s->quarantine);
    forwards_destroy(s->forwards);
    free(s);
    return result;
}

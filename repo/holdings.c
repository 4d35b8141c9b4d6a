/* SPDX-License-Identifier: Apache-2.0 */
#include "repo/holdings.h"
#include "repo/forwarding.h"
#include "repo/recipe_walk.h"

#include <stdlib.h>

struct holdings {
    struct object_set *set;
    struct alive *alive;
    struct forwards *forwards;
    struct recipe_walk *walk;
    char problem[256]; /* of the first node that could not be read */
};

static int visit_node(const struct recipe_ref *ref, const void *data, size_t len, void *arg,
                      struct vm_error **err)
{
    struct holdings *h = arg;
    return number_set_add(&h->set->trees, ref->tree, err);
}

static int add_page(struct holdings *h, const struct recipe_page *p, struct vm_error **err)
{
    if (h->alive && alive_add(h->alive, p->pack, p->offset, p->len, err) < 0)
        return -1;
    return number_set_add(&h->set->packs, p->pack, err);
}

static int visit_leaf(const struct recipe_leaf *leaf, uint64_t number, bool *ret_damaged, void *arg,
                      struct vm_error **err)
{
    struct holdings *h = arg;
    const struct number_set *forwarded = forwards_known(h->forwards);
    uint64_t last = 0;
    for (unsigned i = 0; i < RECIPE_LEAF_PAGES; i++) {
        struct recipe_page p = leaf->pages[i];
        if (!p.len || (p.pack == last && !h->alive && !forwarded->n))
            continue;
        last = p.pack;
        bool found = false;
        if (add_page(h, &p, err) < 0 || (number_set_has(forwarded, p.pack) &&
                                         forwards_find(h->forwards, &p, &found, err) < 0))
            return -1;
        if (found && add_page(h, &p, err) < 0)
            return -1;
    }
    return 0;
}

static void visit_unreadable(const struct recipe_ref *ref, const struct vm_error *problem,
                             void *arg)
{
    struct holdings *h = arg;
    if (!h->problem[0])
        snprintf(h->problem, sizeof(h->problem), "%s", error_message(problem));
}

struct holdings *holdings_create(struct store *s, struct object_set *set, struct alive *alive,
                                 struct vm_error **err)
{
    struct holdings *h = calloc(1, sizeof(*h));
    if (!h) {
        error_nomem(err);
        return NULL;
    }
    struct recipe_visitor visitor = {visit_node, visit_leaf, visit_unreadable, h};
    h->set = set;
    h->alive = alive;
    h->forwards = forwards_create(s, err);
    if (!h->forwards || forwards_scan(h->forwards, err) < 0 ||
        !(h->walk = recipe_walk_create(s, &visitor, err))) {
        holdings_destroy(h);
        return NULL;
    }
    return h;
}

void holdings_destroy(struct holdings *h)
{
    if (!h)
        return;
    recipe_walk_destroy(h->walk);
    forwards_destroy(h->forwards);
    free(h);
}

int holdings_add(struct holdings *h, const struct image *image, struct vm_error **err)
{
    for (unsigned i = 0; i < image->n_files; i++) {
        bool damaged;
        if (recipe_walk_file(h->walk, &image->files[i].root, image->files[i].size, &damaged, err) <
            0)
            return -1;
        if (damaged)
            return error_set(err, VM_ERROR_CORRUPT, "image %s: %s", image->name, h->problem);
    }
    return 0;
}

/* ---- what outlives a collection ---- */

struct outliving {
    const struct number_set *going;
    struct pack_presence presence;
    struct forwards *forwards;
};

static int page_outlives(struct outliving *o, const struct recipe_page *p, bool *ret_outlives,
                         struct vm_error **err)
{
    struct recipe_page to = *p;
    bool found;
    if (pack_is_safe(&o->presence, o->going, p->pack, ret_outlives, err) < 0)
        return -1;
    if (*ret_outlives)
        return 0;
    if (forwards_find(o->forwards, &to, &found, err) < 0)
        return -1;
    return found ? pack_is_safe(&o->presence, o->going, to.pack, ret_outlives, err) : 0;
}

static int outlive_leaf(const struct recipe_leaf *leaf, uint64_t number, bool *ret_damaged,
                        void *arg, struct vm_error **err)
{
    for (unsigned i = 0; i < RECIPE_LEAF_PAGES; i++) {
        bool outlives = true;
        if (leaf->pages[i].len && page_outlives(arg, &leaf->pages[i], &outlives, err) < 0)
            return -1;
        *ret_damaged |= !outlives;
    }
    return 0;
}

int holdings_outlive(struct store *s, const struct image *image, const struct number_set *going,
                     bool *ret_outlive, struct vm_error **err)
{
    CLEANUP(forwards) struct forwards *forwards = forwards_create(s, err);
    struct outliving o = {going, {.store = s}, forwards};
    const struct recipe_visitor visitor = {.leaf = outlive_leaf, .arg = &o};
    CLEANUP(recipe_walk)
    struct recipe_walk *walk = forwards ? recipe_walk_create(s, &visitor, err) : NULL;
    int result = walk ? 0 : -1;
    *ret_outlive = true;
    for (unsigned i = 0; !result && *ret_outlive && i < image->n_files; i++) {
        bool damaged;
        result = recipe_walk_file(walk, &image->files[i].root, image->files[i].size, &damaged, err);
        *ret_outlive = !result && !damaged;
    }
    pack_presence_forget(&o.presence);
    return result;
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What an image stores, and with whom it shares: its records as a set, then the leaves of every
 * other image against that set. The set is bounded: of a large image only those records are kept
 * whose hash ends in k zero bits, and sizes are scaled by 2^k.
 */
#include "repo/repo.h"

#include <stdlib.h>
#include <xxhash.h>

enum { SET_MAX = 1 << 20, SET_SIZE = 2 * SET_MAX, WALKS_MAX = 4 };

struct record_key {
    uint64_t pack;
    uint32_t offset, len; /* len 0: free */
};

struct member {
    struct record_key key;
    unsigned seen_by;  /* the image that counted it last, so that it counts once for each */
    bool shared;
};

struct record_set {
    struct member *members; /* SET_SIZE, open addressing */
    size_t n;
    unsigned sample_bits;
};

static uint64_t key_hash(const struct record_key *k)
{
    uint64_t place[2] = {k->pack, k->offset};
    return XXH3_64bits(place, sizeof(place));
}

static bool is_sampled(const struct record_set *set, uint64_t hash)
{
    return !(hash >> 40 & ((1u << set->sample_bits) - 1));
}

/* Where the key is, or would be. */
static struct member *find(struct record_set *set, const struct record_key *k, uint64_t hash)
{
    size_t i = hash % SET_SIZE;
    while (set->members[i].key.len && (set->members[i].key.pack != k->pack ||
                                       set->members[i].key.offset != k->offset))
        i = (i + 1) % SET_SIZE;
    return &set->members[i];
}

/* Keep half of the records. */
static int thin_out(struct record_set *set, struct vm_error **err)
{
    struct member *old = set->members;
    set->members = calloc(SET_SIZE, sizeof(*set->members));
    if (!set->members) {
        set->members = old;
        return error_nomem(err);
    }
    set->sample_bits++;
    set->n = 0;
    for (size_t i = 0; i < SET_SIZE; i++) {
        uint64_t hash = key_hash(&old[i].key);
        if (old[i].key.len && is_sampled(set, hash)) {
            *find(set, &old[i].key, hash) = old[i];
            set->n++;
        }
    }
    free(old);
    return 0;
}

struct walk {
    struct repo *repo;
    struct record_set set;
    struct image_show *show;
    unsigned image; /* number of the one that is being walked; 1 is the shown one */
    uint64_t bytes; /* shared with it */
    struct recipe_leaf leaf;
};

static int add_page(struct walk *w, const struct recipe_page *p, struct vm_error **err)
{
    struct record_key key = {p->pack, p->offset, p->len};
    uint64_t hash = key_hash(&key);
    if (!is_sampled(&w->set, hash))
        return 0;
    struct member *m = find(&w->set, &key, hash);
    if (m->key.len)
        return 0;
    *m = (struct member){.key = key};
    return ++w->set.n > SET_MAX ? thin_out(&w->set, err) : 0;
}

static void compare_page(struct walk *w, const struct recipe_page *p)
{
    struct record_key key = {p->pack, p->offset, p->len};
    uint64_t hash = key_hash(&key);
    if (!is_sampled(&w->set, hash))
        return;
    struct member *m = find(&w->set, &key, hash);
    if (!m->key.len || m->seen_by == w->image)
        return;
    m->seen_by = w->image;
    m->shared = true;
    w->bytes += (uint64_t)m->key.len << w->set.sample_bits;
}

static int walk_leaf(struct walk *w, struct vm_error **err)
{
    const struct recipe_page *last = NULL;
    for (unsigned i = 0; i < RECIPE_LEAF_PAGES; i++) {
        const struct recipe_page *p = &w->leaf.pages[i];
        if (!p->len)
            continue;
        if (w->image == 1)
            w->show->sizes.data_bytes += PAGE_BYTES;
        if (last && last->pack == p->pack && last->offset == p->offset)
            continue;
        last = p;
        if (w->image > 1)
            compare_page(w, p);
        else if (add_page(w, p, err) < 0)
            return -1;
    }
    return 0;
}

static int walk_file(struct walk *w, const struct image_entry *file, struct vm_error **err)
{
    struct store *s = repo_store(w->repo);
    CLEANUP(file_tree) struct file_tree *t =
        file_tree_create(s, file->size, &file->root, file->size, err);
    if (!t)
        return -1;
    for (uint64_t i = 0; i < file_tree_leaves(t); i++) {
        struct recipe_ref ref;
        if (file_tree_get(t, i, &ref, err) < 0)
            return -1;
        if (recipe_ref_is_zero(&ref))
            continue;
        if (w->image == 1)
            w->show->sizes.recipe_bytes += ref.len + RECIPE_REF_BYTES;
        if (tree_read_leaf(s, &ref, &w->leaf, err) < 0 || walk_leaf(w, err) < 0)
            return -1;
    }
    return 0;
}

static int walk_image(struct walk *w, const struct image *image, struct vm_error **err)
{
    w->image++;
    w->bytes = 0;
    for (unsigned i = 0; i < image->n_files; i++)
        if (walk_file(w, &image->files[i], err) < 0)
            return error_wrap(err, "image %s", image->name);
    return 0;
}

/*
 * The image, with other roots if collections give it these meanwhile. *ret_fate: MOVED, all was
 * walked; else what has become of it, and *ret_problem tells what is not there.
 */
static int walk_while_moved(struct walk *w, struct image *image, void (*again)(struct walk *w),
                            enum image_fate *ret_fate, struct vm_error **ret_problem,
                            struct vm_error **err)
{
    cleanup_free struct image *now = malloc(sizeof(*now));
    *ret_fate = IMAGE_MOVED;
    if (!now)
        return error_nomem(err);
    for (int i = 0; i < WALKS_MAX && *ret_fate == IMAGE_MOVED; i++) {
        cleanup_error struct vm_error *problem = NULL;
        if (walk_image(w, image, &problem) == 0)
            return 0;
        if (problem->kind != VM_ERROR_CORRUPT && problem->kind != VM_ERROR_NOT_FOUND)
            return error_propagate(err, steal_ptr(&problem));
        if (catalogue_find_again(repo_store(w->repo), image, now, ret_fate, err) < 0)
            return -1;
        if (*ret_fate == IMAGE_MOVED)
            *image = *now;
        error_clear(ret_problem);
        *ret_problem = steal_ptr(&problem);
        again(w);
    }
    return *ret_fate == IMAGE_MOVED ? error_propagate(err, steal_ptr(ret_problem)) : 0;
}

static void nothing_again(struct walk *w)
{
    w->bytes = 0;
}

/* The shown image, from its beginning. */
static void all_again(struct walk *w)
{
    memset(w->set.members, 0, SET_SIZE * sizeof(*w->set.members));
    w->set.n = 0;
    w->set.sample_bits = 0;
    w->show->sizes = (struct image_sizes){0};
    w->image = 0;
}

static int walk_shown(struct walk *w, struct vm_error **err)
{
    cleanup_error struct vm_error *problem = NULL;
    enum image_fate fate;
    if (walk_while_moved(w, &w->show->image, all_again, &fate, &problem, err) < 0)
        return -1;
    return fate == IMAGE_MOVED ? 0 : error_propagate(err, steal_ptr(&problem));
}

/* One that is deleted meanwhile shares nothing; one that cannot be read is counted as such. */
static int compare_image(const struct image *listed, void *arg, struct vm_error **err)
{
    struct walk *w = arg;
    struct image_show *show = w->show;
    cleanup_error struct vm_error *problem = NULL;
    cleanup_free struct image *image = malloc(sizeof(*image));
    enum image_fate fate;
    if (!image)
        return error_nomem(err);
    if (!strcmp(listed->name, show->image.name))
        return 0;
    *image = *listed;
    if (walk_while_moved(w, image, nothing_again, &fate, &problem, err) < 0)
        return -1;
    show->sizes.unreadable += fate == IMAGE_SAME;
    if (!w->bytes)
        return 0;
    struct image_sharer *sharers =
        realloc(show->sharers, (show->n_sharers + 1) * sizeof(*sharers));
    if (!sharers)
        return error_nomem(err);
    show->sharers = sharers;
    struct image_sharer *one = &sharers[show->n_sharers++];
    strcpy(one->name, listed->name);
    one->bytes = w->bytes;
    return 0;
}

static int by_bytes(const void *a, const void *b)
{
    const struct image_sharer *x = a, *y = b;
    if (x->bytes != y->bytes)
        return x->bytes < y->bytes ? 1 : -1;
    return strcmp(x->name, y->name);
}

static void sum_up(struct walk *w)
{
    struct image_sizes *sizes = &w->show->sizes;
    for (size_t i = 0; i < SET_SIZE; i++) {
        const struct member *m = &w->set.members[i];
        uint64_t bytes = (uint64_t)m->key.len << w->set.sample_bits;
        sizes->stored_bytes += bytes;
        sizes->shared_bytes += m->shared ? bytes : 0;
    }
    sizes->unique_bytes = sizes->stored_bytes - sizes->shared_bytes;
    sizes->estimated = w->set.sample_bits > 0 || sizes->unreadable;
    if (w->show->n_sharers)
        qsort(w->show->sharers, w->show->n_sharers, sizeof(*w->show->sharers), by_bytes);
}

static void note_damaged(const char *name, const struct vm_error *problem, void *arg)
{
    struct walk *w = arg;
    (void)name;
    (void)problem;
    w->show->sizes.unreadable++;
}

int image_show(struct repo *r, const char *name, struct image_show *ret_show, struct vm_error **err)
{
    cleanup_free struct walk *w = calloc(1, sizeof(*w));
    cleanup_free struct image_show *show = calloc(1, sizeof(*show));
    if (!w || !show || !(w->set.members = calloc(SET_SIZE, sizeof(*w->set.members))))
        return error_nomem(err);
    w->repo = r;
    w->show = show;
    int result = catalogue_find(repo_store(r), name, &show->image, err);
    if (!result)
        result = walk_shown(w, err);
    if (!result)
        result = catalogue_list(repo_store(r), compare_image, note_damaged, w, err);
    if (!result) {
        show->sizes.virtual_bytes = image_size(&show->image);
        sum_up(w);
        *ret_show = *show;
        show->sharers = NULL;
    }
    free(w->set.members);
    free(show->sharers);
    return result;
}

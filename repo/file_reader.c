/* SPDX-License-Identifier: Apache-2.0 */
#include "repo/file_reader.h"
#include "repo/catalogue.h"

#include <pthread.h>
#include <stdlib.h>

enum { LEAVES_CACHED = 64, IDLE_READERS = 16, RENEWALS_MAX = 3 };

struct cached_leaf {
    uint64_t number;
    bool valid;
    uint64_t used_at;
    struct recipe_leaf leaf;
};

struct file_reader {
    struct store *store;
    uint64_t size;
    char image[IMAGE_NAME_MAX + 1], file[IMAGE_FILE_NAME_MAX + 1]; /* "": its root is for good */
    uint64_t writer, created_s; /* which image of that name it is */
    pthread_mutex_t lock; /* what follows */
    struct recipe_ref root;
    unsigned renewals;
    struct file_tree *tree;
    struct cached_leaf *leaves;
    uint64_t clock;
    struct page_reader *idle[IDLE_READERS];
    unsigned n_idle;
    struct page_reader_stat stat;
};

struct file_reader *file_reader_create(struct store *s, const struct recipe_ref *root,
                                       uint64_t size, struct vm_error **err)
{
    struct file_reader *r = calloc(1, sizeof(*r));
    if (!r) {
        error_nomem(err);
        return NULL;
    }
    r->store = s;
    r->size = size;
    r->root = *root;
    pthread_mutex_init(&r->lock, NULL);
    r->leaves = calloc(LEAVES_CACHED, sizeof(*r->leaves));
    r->tree = file_tree_create(s, size, root, size, err);
    if (!r->leaves || !r->tree) {
        if (r->tree)
            error_nomem(err);
        file_reader_destroy(r);
        return NULL;
    }
    return r;
}

struct file_reader *file_reader_open(struct store *s, const struct image *image,
                                     const struct image_entry *file, struct vm_error **err)
{
    struct file_reader *r = file_reader_create(s, &file->root, file->size, err);
    if (!r)
        return NULL;
    strcpy(r->image, image->name);
    strcpy(r->file, file->name);
    r->writer = image->writer;
    r->created_s = image->created_s;
    return r;
}

/* Begin again with that root, unless another thread has done so. */
static int take_root(struct file_reader *r, const struct recipe_ref *root, struct vm_error **err)
{
    SCOPE_LOCK(&r->lock);
    if (recipe_ref_equal(&r->root, root))
        return 0;
    struct file_tree *tree = file_tree_create(r->store, r->size, root, r->size, err);
    if (!tree)
        return -1;
    file_tree_destroy(r->tree);
    r->tree = tree;
    r->root = *root;
    r->renewals++;
    for (unsigned i = 0; i < LEAVES_CACHED; i++)
        r->leaves[i].valid = false;
    return 0;
}

static unsigned renewals(struct file_reader *r)
{
    SCOPE_LOCK(&r->lock);
    return r->renewals;
}

/*
 * Something is gone or damaged, as `problem` says. 0: since `before`, the image has other recipes;
 * try again. Takes the problem over.
 */
static int renew(struct file_reader *r, unsigned before, struct vm_error *problem,
                 struct vm_error **err)
{
    cleanup_error struct vm_error *kept = problem, *unknown = NULL;
    cleanup_free struct image *image = malloc(sizeof(*image));
    bool lacks = problem->kind == VM_ERROR_CORRUPT || problem->kind == VM_ERROR_NOT_FOUND;
    if (!r->image[0] || !lacks || !image)
        return error_propagate(err, steal_ptr(&kept));
    if (catalogue_find(r->store, r->image, image, &unknown) < 0) {
        if (unknown->kind == VM_ERROR_NOT_FOUND)
            return error_set(err, VM_ERROR_NOT_FOUND, "image %s was deleted meanwhile", r->image);
        return error_propagate(err, steal_ptr(&kept));
    }
    const struct image_entry *e = image_find_file(image, r->file);
    if (image->writer != r->writer || image->created_s != r->created_s || !e || e->size != r->size)
        return error_set(err, VM_ERROR_NOT_FOUND, "image %s was replaced meanwhile", r->image);
    if (take_root(r, &e->root, err) < 0)
        return -1;
    return renewals(r) != before ? 0 : error_propagate(err, steal_ptr(&kept));
}

void file_reader_destroy(struct file_reader *r)
{
    if (!r)
        return;
    for (unsigned i = 0; i < r->n_idle; i++)
        page_reader_destroy(r->idle[i]);
    file_tree_destroy(r->tree);
    free(r->leaves);
    pthread_mutex_destroy(&r->lock);
    free(r);
}

uint64_t file_reader_size(const struct file_reader *r)
{
    return r->size;
}

struct page_reader_stat file_reader_stat(struct file_reader *r)
{
    SCOPE_LOCK(&r->lock);
    return r->stat;
}

/* ---- leaves ---- */

static bool copy_cached(struct file_reader *r, uint64_t number, struct recipe_leaf *ret_leaf)
{
    for (unsigned i = 0; i < LEAVES_CACHED; i++) {
        struct cached_leaf *c = &r->leaves[i];
        if (c->valid && c->number == number) {
            c->used_at = ++r->clock;
            *ret_leaf = c->leaf;
            return true;
        }
    }
    return false;
}

static void keep_leaf(struct file_reader *r, uint64_t number, const struct recipe_leaf *leaf)
{
    struct cached_leaf *oldest = &r->leaves[0];
    for (unsigned i = 1; i < LEAVES_CACHED; i++)
        if (r->leaves[i].used_at < oldest->used_at)
            oldest = &r->leaves[i];
    oldest->number = number;
    oldest->valid = true;
    oldest->used_at = ++r->clock;
    oldest->leaf = *leaf;
}

static int leaf_ref(struct file_reader *r, uint64_t number, struct recipe_ref *ret_ref,
                    struct vm_error **err)
{
    SCOPE_LOCK(&r->lock);
    return file_tree_get(r->tree, number, ret_ref, err);
}

static int load_leaf(struct file_reader *r, uint64_t number, struct recipe_leaf *ret_leaf,
                     struct vm_error **err)
{
    struct recipe_ref ref;
    unsigned before;
    {
        SCOPE_LOCK(&r->lock);
        before = r->renewals;
        if (copy_cached(r, number, ret_leaf))
            return 0;
    }
    if (leaf_ref(r, number, &ref, err) < 0 || tree_read_leaf(r->store, &ref, ret_leaf, err) < 0)
        return -1;
    SCOPE_LOCK(&r->lock);
    if (r->renewals == before)
        keep_leaf(r, number, ret_leaf);
    return 0;
}

int file_reader_leaf(struct file_reader *r, uint64_t number, struct recipe_leaf *ret_leaf,
                     struct vm_error **err)
{
    for (int i = 0;; i++) {
        struct vm_error *problem = NULL;
        unsigned before = renewals(r);
        if (load_leaf(r, number, ret_leaf, &problem) == 0)
            return 0;
        if (i == RENEWALS_MAX)
            return error_propagate(err, problem);
        if (renew(r, before, problem, err) < 0)
            return -1;
    }
}

/* ---- reading ---- */

static struct page_reader *borrow_reader(struct file_reader *r, struct vm_error **err)
{
    SCOPE_LOCK(&r->lock);
    return r->n_idle ? r->idle[--r->n_idle] : page_reader_create(r->store, err);
}

static void return_reader(struct file_reader *r, struct page_reader *reader,
                          const struct page_reader_stat *before)
{
    struct page_reader_stat after = page_reader_stat(reader);
    SCOPE_LOCK(&r->lock);
    r->stat.requests += after.requests - before->requests;
    r->stat.bytes += after.bytes - before->bytes;
    r->stat.records += after.records - before->records;
    if (r->n_idle < IDLE_READERS)
        r->idle[r->n_idle++] = reader;
    else
        page_reader_destroy(reader);
}

/* n bytes at `offset` of a leaf's 4 MiB. */
static int read_in_leaf(struct page_reader *reader, const struct recipe_leaf *leaf, size_t offset,
                        uint8_t *out, size_t len, struct vm_error **err)
{
    size_t first = offset / PAGE_BYTES, end = (offset + len + PAGE_BYTES - 1) / PAGE_BYTES;
    bool aligned = !(offset % PAGE_BYTES) && !(len % PAGE_BYTES);
    if (aligned)
        return page_reader_read(reader, leaf->pages + first, end - first, out, err);
    cleanup_free uint8_t *bounce = malloc((end - first) * PAGE_BYTES);
    if (!bounce)
        return error_nomem(err);
    if (page_reader_read(reader, leaf->pages + first, end - first, bounce, err) < 0)
        return -1;
    memcpy(out, bounce + offset % PAGE_BYTES, len);
    return 0;
}

static int read_leaves(struct file_reader *r, struct page_reader *reader, struct recipe_leaf *leaf,
                       uint64_t offset, uint8_t *out, size_t len, struct vm_error **err)
{
    int tries = 0;
    while (len) {
        size_t in_leaf = offset % RECIPE_LEAF_BYTES, left = RECIPE_LEAF_BYTES - in_leaf;
        size_t n = len < left ? len : left;
        struct vm_error *problem = NULL;
        unsigned before = renewals(r);
        if (file_reader_leaf(r, offset / RECIPE_LEAF_BYTES, leaf, err) < 0)
            return -1;
        if (read_in_leaf(reader, leaf, in_leaf, out, n, &problem) < 0) {
            if (tries++ == RENEWALS_MAX)
                return error_propagate(err, problem);
            if (renew(r, before, problem, err) < 0)
                return -1;
            continue;
        }
        offset += n;
        out += n;
        len -= n;
    }
    return 0;
}

int file_reader_read(struct file_reader *r, uint64_t offset, void *out, size_t len,
                     struct vm_error **err)
{
    if (offset > r->size || len > r->size - offset)
        return error_set(err, VM_ERROR_USAGE, "%zu bytes at %llu are beyond the file's end", len,
                         (unsigned long long)offset);
    cleanup_free struct recipe_leaf *leaf = malloc(sizeof(*leaf));
    struct page_reader *reader = leaf ? borrow_reader(r, err) : NULL;
    if (!reader)
        return leaf ? -1 : error_nomem(err);
    struct page_reader_stat before = page_reader_stat(reader);
    int result = read_leaves(r, reader, leaf, offset, out, len, err);
    return_reader(r, reader, &before);
    return result;
}

static int read_pages(struct file_reader *r, struct page_reader *reader, uint64_t leaf_number,
                      const unsigned *pages, size_t n, void *out, struct vm_error **err)
{
    cleanup_free struct recipe_leaf *leaf = malloc(sizeof(*leaf));
    struct recipe_page places[RECIPE_LEAF_PAGES];
    if (!leaf)
        return error_nomem(err);
    for (int tries = 0;; tries++) {
        struct vm_error *problem = NULL;
        unsigned before = renewals(r);
        if (file_reader_leaf(r, leaf_number, leaf, err) < 0)
            return -1;
        for (size_t i = 0; i < n; i++)
            places[i] = leaf->pages[pages[i]];
        if (page_reader_read(reader, places, n, out, &problem) == 0)
            return 0;
        if (tries == RENEWALS_MAX)
            return error_propagate(err, problem);
        if (renew(r, before, problem, err) < 0)
            return -1;
    }
}

int file_reader_pages(struct file_reader *r, uint64_t leaf, const unsigned *pages, size_t n,
                      void *out, struct vm_error **err)
{
    struct page_reader *reader = borrow_reader(r, err);
    if (!reader)
        return -1;
    struct page_reader_stat before = page_reader_stat(reader);
    int result = read_pages(r, reader, leaf, pages, n, out, err);
    return_reader(r, reader, &before);
    return result;
}

static int find_data(struct file_reader *r, uint64_t offset, uint64_t *ret_start, uint64_t *ret_len,
                     struct vm_error **err)
{
    uint64_t leaf = offset / RECIPE_LEAF_BYTES, n = 0;
    uint64_t end = (r->size + RECIPE_LEAF_BYTES - 1) / RECIPE_LEAF_BYTES;
    struct recipe_ref ref = {0};
    for (; leaf < end && recipe_ref_is_zero(&ref); leaf += recipe_ref_is_zero(&ref))
        if (leaf_ref(r, leaf, &ref, err) < 0)
            return -1;
    while (leaf + n < end && !recipe_ref_is_zero(&ref)) {
        n++;
        if (leaf + n < end && leaf_ref(r, leaf + n, &ref, err) < 0)
            return -1;
    }
    uint64_t start = leaf * RECIPE_LEAF_BYTES;
    *ret_start = start < offset ? offset : start;
    uint64_t stop = (leaf + n) * RECIPE_LEAF_BYTES;
    stop = stop < r->size ? stop : r->size;
    *ret_len = n && stop > *ret_start ? stop - *ret_start : 0;
    return 0;
}

int file_reader_next_data(struct file_reader *r, uint64_t offset, uint64_t *ret_start,
                          uint64_t *ret_len, struct vm_error **err)
{
    for (int i = 0;; i++) {
        struct vm_error *problem = NULL;
        unsigned before = renewals(r);
        if (find_data(r, offset, ret_start, ret_len, &problem) == 0)
            return 0;
        if (i == RENEWALS_MAX)
            return error_propagate(err, problem);
        if (renew(r, before, problem, err) < 0)
            return -1;
    }
}

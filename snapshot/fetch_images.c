/* SPDX-License-Identifier: Apache-2.0 */
#include "snapshot/fetcher.h"

#include "base/cleanup.h"

#include <string.h>

struct source { /* a file's reader and those who use it */
    struct file_reader *reader;
    struct recipe_ref root;
    unsigned users;
    bool retired; /* not in the table any more */
};

struct entry {
    struct image image;
    struct source *sources[IMAGE_FILES_MAX];
    uint64_t used_at;
    bool valid;
};

struct fetch_images {
    struct repo *repo;
    pthread_mutex_t lock; /* what follows */
    struct entry *entries;
    uint64_t clock;
};

struct fetch_images *fetch_images_create(struct repo *r, struct vm_error **err)
{
    struct fetch_images *t = calloc(1, sizeof(*t));
    struct entry *entries = calloc(FETCHER_IMAGES_MAX, sizeof(*entries));
    if (!t || !entries) {
        free(t);
        free(entries);
        error_nomem(err);
        return NULL;
    }
    t->repo = r;
    t->entries = entries;
    pthread_mutex_init(&t->lock, NULL);
    return t;
}

static void put_source(struct source *s)
{
    if (s->users || !s->retired)
        return;
    file_reader_destroy(s->reader);
    free(s);
}

static void retire_source(struct source **s)
{
    if (!*s)
        return;
    (*s)->retired = true;
    put_source(*s);
    *s = NULL;
}

static void retire_entry(struct entry *e)
{
    for (unsigned i = 0; i < IMAGE_FILES_MAX; i++)
        retire_source(&e->sources[i]);
    e->valid = false;
}

void fetch_images_destroy(struct fetch_images *t)
{
    if (!t)
        return;
    for (unsigned i = 0; i < FETCHER_IMAGES_MAX; i++)
        retire_entry(&t->entries[i]);
    pthread_mutex_destroy(&t->lock);
    free(t->entries);
    free(t);
}

static struct entry *find(struct fetch_images *t, const char *name, uint64_t number)
{
    for (unsigned i = 0; i < FETCHER_IMAGES_MAX; i++) {
        struct entry *e = &t->entries[i];
        if (e->valid && e->image.writer == number && !strcmp(e->image.name, name)) {
            e->used_at = ++t->clock;
            return e;
        }
    }
    return NULL;
}

static struct entry *add(struct fetch_images *t, const struct image *image)
{
    struct entry *e = find(t, image->name, image->writer);
    if (!e) {
        e = &t->entries[0];
        for (unsigned i = 0; i < FETCHER_IMAGES_MAX; i++)
            if (!t->entries[i].valid || (e->valid && t->entries[i].used_at < e->used_at))
                e = &t->entries[i];
        retire_entry(e);
    }
    /* A collection may have moved roots: readers of the old ones go. */
    for (unsigned i = 0; i < IMAGE_FILES_MAX; i++)
        if (e->sources[i] && !recipe_ref_equal(&e->sources[i]->root, &image->files[i].root))
            retire_source(&e->sources[i]);
    e->image = *image;
    e->valid = true;
    e->used_at = ++t->clock;
    return e;
}

void fetch_image_note(struct fetch_images *t, const struct image *image)
{
    SCOPE_LOCK(&t->lock);
    add(t, image);
}

/* ---- finding ---- */

struct lease_search {
    const char *name;
    uint64_t number;
    struct image *image;
    bool found;
};

static int match_lease(const struct lease *lease, void *arg, struct vm_error **err)
{
    struct lease_search *s = arg;
    (void)err;
    if (lease->image.writer == s->number && !strcmp(lease->image.name, s->name)) {
        *s->image = lease->image;
        s->found = true;
    }
    return 0;
}

static int look_up(struct fetch_images *t, const char *name, uint64_t number,
                   struct image *ret_image, struct vm_error **err)
{
    cleanup_error struct vm_error *absent = NULL;
    if (catalogue_find(repo_store(t->repo), name, ret_image, &absent) == 0) {
        if (ret_image->writer == number)
            return 0;
    } else if (absent->kind != VM_ERROR_NOT_FOUND) {
        return error_propagate(err, steal_ptr(&absent));
    }
    struct lease_search search = {.name = name, .number = number, .image = ret_image};
    if (catalogue_leases(repo_store(t->repo), match_lease, catalogue_skip, &search, err) < 0)
        return -1;
    return search.found ? 0
                        : error_set(err, VM_ERROR_NOT_FOUND,
                                    "image %s was deleted, and nothing keeps its data", name);
}

int fetch_image(struct fetch_images *t, const char *name, uint64_t number, struct image *ret_image,
                struct vm_error **err)
{
    {
        SCOPE_LOCK(&t->lock);
        struct entry *e = find(t, name, number);
        if (e) {
            *ret_image = e->image;
            return 0;
        }
    }
    if (look_up(t, name, number, ret_image, err) < 0)
        return -1;
    fetch_image_note(t, ret_image);
    return 0;
}

/* ---- reading ---- */

static struct source *get_source(struct fetch_images *t, const struct image *image, unsigned file,
                                 struct vm_error **err)
{
    SCOPE_LOCK(&t->lock);
    struct entry *e = add(t, image);
    struct source *s = e->sources[file];
    if (!s) {
        s = calloc(1, sizeof(*s));
        if (!s) {
            error_nomem(err);
            return NULL;
        }
        s->root = image->files[file].root;
        s->reader = file_reader_create(repo_store(t->repo), &s->root, image->files[file].size, err);
        if (!s->reader) {
            free(s);
            return NULL;
        }
        e->sources[file] = s;
    }
    s->users++;
    return s;
}

static int read_from(struct fetch_images *t, const struct image *image, unsigned file,
                     uint64_t offset, void *out, size_t len, struct vm_error **err)
{
    if (file >= image->n_files)
        return error_set(err, VM_ERROR_PROTOCOL, "image %s has no file %u", image->name, file);
    struct source *s = get_source(t, image, file, err);
    if (!s)
        return -1;
    int r = file_reader_read(s->reader, offset, out, len, err);
    SCOPE_LOCK(&t->lock);
    s->users--;
    put_source(s);
    return r;
}

static int check_page(struct page_hasher *h, const struct recipe_page *page, const uint8_t *data,
                      struct vm_error **err)
{
    struct page_id id;
    bool same = page_all_zero(data);
    if (page->len) {
        if (page_hasher_hash(h, data, PAGE_BYTES, &id, err) < 0)
            return -1;
        same = !memcmp(id.bytes, page->id, sizeof(page->id));
    }
    return same ? 0 : error_set(err, VM_ERROR_CORRUPT, "other data than the image has");
}

static int check_pages(struct file_reader *r, uint64_t offset, const uint8_t *data, size_t len,
                       struct vm_error **err)
{
    struct page_hasher h;
    cleanup_free struct recipe_leaf *leaf = malloc(sizeof(*leaf));
    if (!leaf)
        return error_nomem(err);
    if (file_reader_leaf(r, offset / RECIPE_LEAF_BYTES, leaf, err) < 0 ||
        page_hasher_init(&h, err) < 0)
        return -1;
    int result = 0;
    for (size_t at = 0; result == 0 && at < len; at += PAGE_BYTES)
        result = check_page(&h, &leaf->pages[(offset + at) / PAGE_BYTES % RECIPE_LEAF_PAGES],
                            data + at, err);
    page_hasher_finish(&h);
    return result;
}

int fetch_check(struct fetch_images *t, const struct image *image, unsigned file, uint64_t offset,
                const uint8_t *data, size_t len, struct vm_error **err)
{
    struct source *s = get_source(t, image, file, err);
    if (!s)
        return -1;
    int r = check_pages(s->reader, offset, data, len, err);
    SCOPE_LOCK(&t->lock);
    s->users--;
    put_source(s);
    return r;
}

int fetch_read(struct fetch_images *t, const char *name, uint64_t number, unsigned file,
               uint64_t offset, void *out, size_t len, struct vm_error **err)
{
    struct vm_error *first = NULL;
    cleanup_free struct image *image = malloc(sizeof(*image));
    if (!image)
        return error_nomem(err);
    if (fetch_image(t, name, number, image, err) < 0)
        return -1;
    if (read_from(t, image, file, offset, out, len, &first) == 0)
        return 0;
    /* What a collection moved is found from the root as it is now. */
    cleanup_free struct image *now = malloc(sizeof(*now));
    bool moved = now && (first->kind == VM_ERROR_CORRUPT || first->kind == VM_ERROR_NOT_FOUND) &&
                 look_up(t, name, number, now, NULL) == 0 &&
                 !recipe_ref_equal(&now->files[file].root, &image->files[file].root);
    if (!moved)
        return error_propagate(err, first);
    error_free(first);
    return read_from(t, now, file, offset, out, len, err);
}

/* SPDX-License-Identifier: Apache-2.0 */
#include "repo/scrub.h"
#include "repo/footer_cache.h"
#include "repo/names.h"
#include "repo/progress.h"
#include "repo/recipe_walk.h"

#include "base/queue.h"

#include <stdlib.h>
#include <unistd.h>

enum { THREADS_MAX = 8, QUEUE_SIZE = 64, FOOTERS_BYTES = 32 << 20, BAD_MAX = 1 << 20 };

/* A record that is damaged, or with WHOLE_PACK all of a pack. */
struct bad {
    uint64_t pack, offset;
};
#define WHOLE_PACK UINT64_MAX

struct bad_list {
    struct bad *items; /* sorted before the walk */
    size_t n, cap;
};

struct scrub {
    struct repo *repo;
    struct store *store;
    scrub_fn *found;
    void *arg;
    struct queue *packs; /* numbers, each in a malloc'd uint64_t */
    struct failure failure;
    struct progress progress;
    pthread_mutex_t lock; /* report, and the calls of found */
    struct scrub_report report;
    struct bad_list bad;  /* found by reading packs */
    struct bad_list gone; /* packs that recipes name and that are not there */
    struct footer_cache *footers; /* of the walk */
};

static void report_damage(struct scrub *s, const char *what)
{
    SCOPE_LOCK(&s->lock);
    s->report.damaged++;
    s->found(SCRUB_PACK, what, s->arg);
}

static int add_bad(struct bad_list *list, uint64_t pack, uint64_t offset, struct vm_error **err)
{
    if (list->n == BAD_MAX)
        return error_set(err, VM_ERROR_CORRUPT, "more than %d records are damaged or lost; is this "
                         "the repository's whole store?", BAD_MAX);
    if (list->n == list->cap) {
        size_t cap = 2 * list->cap + 64;
        struct bad *items = realloc(list->items, cap * sizeof(*items));
        if (!items)
            return error_nomem(err);
        list->items = items;
        list->cap = cap;
    }
    list->items[list->n++] = (struct bad){pack, offset};
    return 0;
}

static int note_bad(struct scrub *s, uint64_t pack, uint64_t offset, const char *what,
                    struct vm_error **err)
{
    report_damage(s, what);
    SCOPE_LOCK(&s->lock);
    return add_bad(&s->bad, pack, offset, err);
}

static int by_place(const void *a, const void *b)
{
    const struct bad *x = a, *y = b;
    if (x->pack != y->pack)
        return x->pack < y->pack ? -1 : 1;
    return x->offset < y->offset ? -1 : x->offset > y->offset;
}

static bool is_bad(const struct bad_list *list, uint64_t pack, uint64_t offset)
{
    struct bad key = {pack, offset};
    return list->n && bsearch(&key, list->items, list->n, sizeof(key), by_place);
}

/* ---- packs ---- */

struct pack_check {
    struct scrub *scrub;
    struct page_hasher hasher;
    struct record_codec codec;
    struct buffer data;
    uint8_t pages[RECORD_RAW_MAX];
};

static int check_record(struct pack_check *c, const struct footer *f, uint32_t number,
                        struct vm_error **err)
{
    const struct footer_record *r = &f->records[number];
    struct vm_error *problem = NULL;
    unsigned n;
    if (record_decode(&c->codec, c->data.data + r->offset, r->len, f->pack, r->offset, c->pages, &n,
                      &problem) < 0) {
        int noted = note_bad(c->scrub, f->pack, r->offset, error_message(problem), err);
        error_free(problem);
        return noted;
    }
    bool same = n == r->n_pages;
    for (unsigned i = 0; same && i < n; i++) {
        struct page_id id;
        if (page_hasher_hash(&c->hasher, c->pages + (size_t)i * PAGE_BYTES, PAGE_BYTES, &id, err) <
            0)
            return -1;
        same = page_id_equal(&id, &f->ids[r->first_page + i]);
    }
    char what[128];
    snprintf(what, sizeof(what),
             "pack %016" PRIx64 ", record at %u: its pages are not those that the footer names",
             f->pack, r->offset);
    return same ? 0 : note_bad(c->scrub, f->pack, r->offset, what, err);
}

/* The footer of a whole pack in c->data, after its header was compared. */
static int read_footer(struct pack_check *c, uint64_t pack, struct footer *ret_footer,
                       struct vm_error **problem)
{
    const struct buffer *d = &c->data;
    size_t size;
    if (d->len < PACK_HEADER + PACK_TRAILER)
        return error_set(problem, VM_ERROR_CORRUPT, "pack %016" PRIx64 ": it is too short", pack);
    if (pack_header_check(d->data, pack, repo_uuid(c->scrub->repo), problem) < 0 ||
        pack_trailer_parse(d->data + d->len - PACK_TRAILER, pack, d->len, &size, problem) < 0)
        return -1;
    return footer_parse(d->data + d->len - size, size, pack, d->len, ret_footer, problem);
}

static int check_pack(struct pack_check *c, uint64_t pack, struct vm_error **err)
{
    struct scrub *s = c->scrub;
    struct vm_error *problem = NULL;
    struct footer f;
    buffer_reset(&c->data);
    enum store_result r = store_read_all(s->store, STORE_PACK, pack_name(pack), PACK_MAX, &c->data,
                                         &problem);
    if (r == STORE_MISSING)
        return 0; /* it went meanwhile; the walk finds out whether it is missed */
    if (r == STORE_FAILED && problem->kind != VM_ERROR_CORRUPT)
        return error_propagate(err, problem);
    if (r == STORE_FAILED || read_footer(c, pack, &f, &problem) < 0) {
        int noted = note_bad(s, pack, WHOLE_PACK, error_message(problem), err);
        error_free(problem);
        return noted;
    }
    int result = 0;
    for (uint32_t i = 0; !result && i < f.n_records; i++)
        result = check_record(c, &f, i, err);
    pthread_mutex_lock(&s->lock);
    s->report.packs++;
    s->report.bytes += c->data.len;
    s->report.records += f.n_records;
    s->report.pages += f.n_pages;
    pthread_mutex_unlock(&s->lock);
    footer_finish(&f);
    return result < 0 ? -1 : progress_add(&s->progress, c->data.len, UINT64_MAX, err);
}

static void *check_packs(void *arg)
{
    struct scrub *s = arg;
    struct pack_check c = {.scrub = s};
    struct vm_error *error = NULL;
    uint64_t *pack;
    int result = page_hasher_init(&c.hasher, &error);
    if (!result)
        result = record_codec_init(&c.codec, RECORD_LZ4, 0, &error);
    while (!result && (pack = queue_get(s->packs))) {
        result = check_pack(&c, *pack, &error);
        free(pack);
    }
    if (result < 0) {
        failure_set(&s->failure, error);
        queue_abort(s->packs);
    }
    page_hasher_finish(&c.hasher);
    record_codec_finish(&c.codec);
    buffer_finish(&c.data);
    return NULL;
}

static int queue_pack(const char *name, void *arg, struct vm_error **err)
{
    struct scrub *s = arg;
    uint64_t number, *pack;
    if (!object_number(PACK_PREFIX, name, &number))
        return 0;
    if (!(pack = malloc(sizeof(*pack))))
        return error_nomem(err);
    *pack = number;
    if (queue_put(s->packs, pack))
        return 0;
    free(pack);
    return failure_report(&s->failure, err);
}

static int scrub_packs(struct scrub *s, struct vm_error **err)
{
    pthread_t threads[THREADS_MAX];
    long processors = sysconf(_SC_NPROCESSORS_ONLN);
    unsigned n = 0, wanted = processors < 1 ? 1 : processors > THREADS_MAX ? THREADS_MAX
                                                                           : (unsigned)processors;
    struct vm_error *error = NULL;
    for (int rc = 0; n < wanted && !rc; n += !rc) {
        rc = pthread_create(&threads[n], NULL, check_packs, s);
        if (rc) {
            error_errno(&error, rc, "cannot start a thread");
            failure_set(&s->failure, error);
            queue_abort(s->packs);
            error = NULL;
        }
    }
    if (store_list(s->store, STORE_PACK, PACK_PREFIX, queue_pack, s, &error) < 0)
        failure_set(&s->failure, error);
    queue_close(s->packs);
    while (n)
        pthread_join(threads[--n], NULL);
    return failure_report(&s->failure, err);
}

/* ---- recipes ---- */

static const struct footer_record *find_record(const struct footer *f, uint32_t offset)
{
    uint32_t low = 0, high = f->n_records;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (f->records[middle].offset < offset)
            low = middle + 1;
        else
            high = middle;
    }
    return low < f->n_records && f->records[low].offset == offset ? &f->records[low] : NULL;
}

/* Does the pack hold that page where the recipe says? */
static int page_is_there(struct scrub *s, const struct recipe_page *p, bool *ret_there,
                         struct vm_error **err)
{
    *ret_there = false;
    if (is_bad(&s->bad, p->pack, p->offset) || is_bad(&s->bad, p->pack, WHOLE_PACK) ||
        is_bad(&s->gone, p->pack, WHOLE_PACK))
        return 0;
    if (!footer_cache_knows(s->footers, p->pack) &&
        footer_cache_load(s->footers, &p->pack, 1, err) < 0)
        return -1;
    const struct cached_footer *c = footer_cache_get(s->footers, p->pack);
    if (!c) {
        if (add_bad(&s->gone, p->pack, WHOLE_PACK, err) < 0)
            return -1;
        qsort(s->gone.items, s->gone.n, sizeof(*s->gone.items), by_place);
        char what[64];
        snprintf(what, sizeof(what), "pack %016" PRIx64 ", which images need, is gone", p->pack);
        report_damage(s, what);
        return 0;
    }
    const struct footer_record *r = find_record(&c->footer, p->offset);
    *ret_there = r && p->page < r->n_pages && p->len >= r->len &&
                 !memcmp(c->footer.ids[r->first_page + p->page].bytes, p->id, sizeof(p->id));
    return 0;
}

static int visit_leaf(const struct recipe_leaf *leaf, uint64_t number, bool *ret_damaged, void *arg,
                      struct vm_error **err)
{
    struct scrub *s = arg;
    for (unsigned i = 0; i < RECIPE_LEAF_PAGES; i++) {
        const struct recipe_page *p = &leaf->pages[i];
        bool there = true;
        if (p->len && page_is_there(s, p, &there, err) < 0)
            return -1;
        *ret_damaged |= !there;
    }
    return progress_add(&s->progress, 0, UINT64_MAX, err);
}

static void visit_unreadable(const struct recipe_ref *ref, const struct vm_error *problem,
                             void *arg)
{
    (void)ref;
    report_damage(arg, error_message(problem));
}

struct image_walk {
    struct scrub *scrub;
    struct recipe_walk *walk;
};

static int scrub_image(const struct image *image, void *arg, struct vm_error **err)
{
    struct image_walk *w = arg;
    struct scrub *s = w->scrub;
    bool touched = false;
    for (unsigned i = 0; i < image->n_files; i++) {
        bool damaged;
        if (recipe_walk_file(w->walk, &image->files[i].root, image->files[i].size, &damaged, err) <
            0)
            return -1;
        touched |= damaged;
    }
    s->report.images++;
    if (touched) {
        s->report.images_touched++;
        s->found(SCRUB_IMAGE, image->name, s->arg);
    }
    return 0;
}

static int scrub_images(struct scrub *s, struct vm_error **err)
{
    struct recipe_visitor visitor = {.leaf = visit_leaf, .unreadable = visit_unreadable, .arg = s};
    struct image_walk w = {.scrub = s};
    s->footers = footer_cache_create(s->store, FOOTERS_BYTES, err);
    w.walk = s->footers ? recipe_walk_create(s->store, &visitor, err) : NULL;
    if (s->bad.n)
        qsort(s->bad.items, s->bad.n, sizeof(*s->bad.items), by_place);
    int result = w.walk ? catalogue_list(s->store, scrub_image, &w, err) : -1;
    if (w.walk)
        s->report.nodes = recipe_walk_nodes(w.walk);
    recipe_walk_destroy(w.walk);
    footer_cache_destroy(s->footers);
    return result;
}

int repo_scrub(struct repo *r, const struct repo_control *control, scrub_fn *found, void *arg,
               struct scrub_report *ret_report, struct vm_error **err)
{
    struct repo_stat stat;
    struct scrub s = {.repo = r, .store = repo_store(r), .found = found, .arg = arg};
    if (repo_stat(r, &stat, err) < 0 || !(s.packs = queue_create(QUEUE_SIZE, free, err)))
        return -1;
    failure_init(&s.failure);
    pthread_mutex_init(&s.lock, NULL);
    progress_init(&s.progress, control, stat.pack_bytes);
    int result = scrub_packs(&s, err);
    if (!result)
        result = scrub_images(&s, err);
    if (!result) {
        progress_end(&s.progress, 0);
        *ret_report = s.report;
    }
    progress_finish(&s.progress);
    pthread_mutex_destroy(&s.lock);
    failure_finish(&s.failure);
    queue_destroy(s.packs);
    free(s.bad.items);
    free(s.gone.items);
    return result;
}

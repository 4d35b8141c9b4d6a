/* SPDX-License-Identifier: Apache-2.0 */
#include "repo/scrub.h"
#include "repo/footer_cache.h"
#include "repo/forwarding.h"
#include "repo/heal.h"
#include "repo/names.h"
#include "repo/progress.h"
#include "repo/recipe_walk.h"
#include "repo/verified.h"

#include "base/clock.h"
#include "base/fault.h"
#include "base/queue.h"

#include <stdlib.h>
#include <unistd.h>

enum {
    THREADS_MAX = 8,
    QUEUE_SIZE = 64,
    FOOTERS_BYTES = 32 << 20,
    BAD_MAX = 1 << 20,
    TEXTS_MAX = 1000, /* findings that are told with their reason */
    WALKS_MAX = 4,    /* of an image whose recipes are replaced meanwhile */
};

/* A record that is damaged, or with WHOLE_PACK all of a pack. */
struct bad {
    uint64_t pack, offset;
    uint8_t n_pages; /* of the record */
    char *what;      /* NULL: there were too many to keep all reasons */
};
#define WHOLE_PACK QUARANTINED_PACK

struct bad_list {
    struct bad *items; /* sorted before the walk */
    size_t n, cap;
};

struct scrub {
    struct repo *repo;
    struct store *store;
    scrub_fn *found;
    void *arg;
    const struct scrub_options *options;
    struct quarantine quarantine; /* as it was at first */
    struct verified verified;     /* likewise */
    struct number_set listed;     /* packs that were there */
    uint64_t now_s;
    struct queue *packs; /* numbers, each in a malloc'd uint64_t */
    struct failure failure;
    struct progress progress;
    pthread_mutex_t lock; /* report, and the calls of found */
    struct scrub_report report;
    struct bad_list bad;  /* found by reading packs */
    struct bad_list gone; /* packs that recipes name and that are not there */
    size_t n_texts;
    uint64_t fresh[VERIFIED_BATCH]; /* packs that were verified and are not remembered as such yet */
    size_t n_fresh;
    struct footer_cache *footers; /* of the walk */
    struct forwards *forwards;    /* likewise */
    char *unreadable[TEXTS_MAX];  /* nodes of the image that is being walked */
    size_t n_unreadable;
};

static void report_damage(struct scrub *s, const char *what)
{
    SCOPE_LOCK(&s->lock);
    s->report.damaged++;
    s->found(SCRUB_PACK, what, s->arg);
}

static int add_bad(struct bad_list *list, const struct bad *bad, struct vm_error **err)
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
    list->items[list->n++] = *bad;
    return 0;
}

static void free_bad(struct bad_list *list)
{
    for (size_t i = 0; i < list->n; i++)
        free(list->items[i].what);
    free(list->items);
}

/* Told at the end of the packs, when it is known what was healed. */
static int note_bad(struct scrub *s, uint64_t pack, uint64_t offset, uint8_t n_pages,
                    const char *what, struct vm_error **err)
{
    SCOPE_LOCK(&s->lock);
    struct bad bad = {pack, offset, n_pages, s->n_texts < TEXTS_MAX ? strdup(what) : NULL};
    s->n_texts += bad.what != NULL;
    return add_bad(&s->bad, &bad, err);
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
    struct bad key = {.pack = pack, .offset = offset};
    return list->n && bsearch(&key, list->items, list->n, sizeof(key), by_place);
}

/* ---- packs ---- */

struct pack_check {
    struct scrub *scrub;
    struct page_hasher hasher;
    struct record_codec codec;
    struct buffer data;
    uint32_t bad[PACK_RECORDS_MAX]; /* offsets, of the pack that is being checked */
    size_t n_bad;
    uint8_t pages[RECORD_RAW_MAX];
};

static int find_bad(struct pack_check *c, uint64_t pack, uint32_t offset, uint8_t n_pages,
                    const char *what, struct vm_error **err)
{
    c->bad[c->n_bad++] = offset;
    return note_bad(c->scrub, pack, offset, n_pages, what, err);
}

/*
 * A repository that may only be read, or that is full, is scrubbed all the same. `result` is what
 * was returned with `problem`.
 */
static int unless_read_only(int result, struct vm_error *problem, struct vm_error **err)
{
    if (result < 0 && problem->kind != VM_ERROR_DENIED && problem->kind != VM_ERROR_NO_SPACE)
        return error_propagate(err, problem);
    error_free(problem);
    return 0;
}

/* Those that are verified, and not remembered as such yet, are. Under the lock. */
static int remember_fresh(struct scrub *s, struct vm_error **err)
{
    struct vm_error *problem = NULL;
    size_t n = s->n_fresh;
    s->n_fresh = 0;
    (void)FAULT("repo.scrub-remember");
    int result = n ? verified_set(s->store, s->fresh, n, s->now_s, &problem) : 0;
    return unless_read_only(result, problem, err);
}

/* What was found of the pack goes into the quarantine, before anybody is told. */
static int conclude_pack(struct pack_check *c, uint64_t pack, struct vm_error **err)
{
    struct scrub *s = c->scrub;
    struct vm_error *problem = NULL;
    const struct quarantined *known;
    size_t n = quarantine_of(&s->quarantine, pack, &known);
    bool same = n == c->n_bad;
    for (size_t i = 0; same && i < n; i++)
        same = known[i].offset == c->bad[i];
    int result = same ? 0 : quarantine_set(s->store, pack, c->bad, c->n_bad, &problem);
    if (unless_read_only(result, problem, err) < 0)
        return -1;
    SCOPE_LOCK(&s->lock);
    s->fresh[s->n_fresh++] = pack;
    return s->n_fresh == VERIFIED_BATCH ? remember_fresh(s, err) : 0;
}

static int check_record(struct pack_check *c, const struct footer *f, uint32_t number,
                        struct vm_error **err)
{
    const struct footer_record *r = &f->records[number];
    struct vm_error *problem = NULL;
    unsigned n;
    if (record_decode(&c->codec, c->data.data + r->offset, r->len, f->pack, r->offset, c->pages, &n,
                      &problem) < 0) {
        int noted = find_bad(c, f->pack, r->offset, r->n_pages, error_message(problem), err);
        error_free(problem);
        return noted;
    }
    bool same = n == r->n_pages;
    struct page_id ids[RECORD_PAGES_MAX];
    if (same && page_hasher_pages(&c->hasher, c->pages, n, ids, err) < 0)
        return -1;
    for (unsigned i = 0; same && i < n; i++)
        same = page_id_equal(&ids[i], &f->ids[r->first_page + i]);
    char what[128];
    snprintf(what, sizeof(what),
             "pack %016" PRIx64 ", record at %u: its pages are not those that the footer names",
             f->pack, r->offset);
    return same ? 0 : find_bad(c, f->pack, r->offset, r->n_pages, what, err);
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
    c->n_bad = 0;
    enum store_result r = store_read_all(s->store, STORE_PACK, pack_name(pack), PACK_MAX, &c->data,
                                         &problem);
    if (r == STORE_MISSING)
        return 0; /* it went meanwhile; the walk finds out whether it is missed */
    if (r == STORE_FAILED && problem->kind != VM_ERROR_CORRUPT)
        return error_propagate(err, problem);
    if (r == STORE_FAILED || read_footer(c, pack, &f, &problem) < 0) {
        int noted = find_bad(c, pack, WHOLE_PACK, 0, error_message(problem), err);
        error_free(problem);
        return noted < 0 ? -1 : conclude_pack(c, pack, err);
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
    if (result < 0 || conclude_pack(c, pack, err) < 0)
        return -1;
    return progress_add(&s->progress, c->data.len, UINT64_MAX, err);
}

static void *check_packs(void *arg)
{
    struct scrub *s = arg;
    struct pack_check *c = calloc(1, sizeof(*c));
    struct vm_error *error = NULL;
    uint64_t *pack;
    int result = c ? page_hasher_init(&c->hasher, &error) : error_nomem(&error);
    if (!result)
        result = record_codec_init(&c->codec, RECORD_LZ4, 0, &error);
    if (c)
        c->scrub = s;
    while (!result && (pack = queue_get(s->packs))) {
        result = check_pack(c, *pack, &error);
        free(pack);
    }
    if (result < 0) {
        failure_set(&s->failure, error);
        queue_abort(s->packs);
    }
    if (c) {
        page_hasher_finish(&c->hasher);
        record_codec_finish(&c->codec);
        buffer_finish(&c->data);
    }
    free(c);
    return NULL;
}

/* A pack that is not read this time: what is known of it counts. */
static int known_bad(struct scrub *s, uint64_t pack, struct vm_error **err)
{
    const struct quarantined *known;
    size_t n = quarantine_of(&s->quarantine, pack, &known);
    char what[96];
    for (size_t i = 0; i < n; i++) {
        int length = snprintf(what, sizeof(what), "pack %016" PRIx64, pack);
        if (known[i].offset != WHOLE_PACK)
            snprintf(what + length, sizeof(what) - (size_t)length, ", record at %u",
                     known[i].offset);
        strcat(what, ": quarantined");
        if (note_bad(s, pack, known[i].offset, 0, what, err) < 0)
            return -1;
    }
    return 0;
}

static int queue_pack(const char *name, void *arg, struct vm_error **err)
{
    struct scrub *s = arg;
    uint64_t number, *pack;
    if (!object_number(PACK_PREFIX, name, &number))
        return 0;
    if (number_set_add(&s->listed, number, err) < 0)
        return -1;
    uint64_t at = verified_at(&s->verified, number);
    /* A time that is still to come is that of a clock that was wrong. */
    if (s->options->older_than_s && at && at <= s->now_s &&
        at + s->options->older_than_s > s->now_s) {
        s->report.packs_skipped++;
        uint64_t ago = s->now_s - at;
        s->report.oldest_s = ago > s->report.oldest_s ? ago : s->report.oldest_s;
        return known_bad(s, number, err);
    }
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
    if (failure_report(&s->failure, err) < 0)
        return -1;
    SCOPE_LOCK(&s->lock);
    return remember_fresh(s, err);
}

/* What is remembered of packs that went without a collection that knew of it. */
static int forget_gone(struct scrub *s, struct vm_error **err)
{
    struct vm_error *problem = NULL;
    int result = 0;
    for (size_t i = 0; !result && i < s->verified.n; i++)
        if (!number_set_has(&s->listed, s->verified.items[i].pack))
            result = verified_forget(s->store, &s->verified.items[i].pack, 1, &problem);
    for (size_t i = 0; !result && i < s->quarantine.n; i++)
        if (!number_set_has(&s->listed, s->quarantine.items[i].pack))
            result = quarantine_forget(s->store, &s->quarantine.items[i].pack, 1, &problem);
    return unless_read_only(result, problem, err);
}

/* Are all pages of the damaged record elsewhere, by the pack's forwarding, and not damaged there? */
static bool is_healed(const struct scrub *s, const struct bad *bad, const struct forwarding *f)
{
    if (bad->offset == WHOLE_PACK || !bad->n_pages)
        return false;
    for (uint8_t i = 0; i < bad->n_pages; i++) {
        struct recipe_page p = {.offset = (uint32_t)bad->offset, .page = i};
        if (!forwarding_find(f, &p) || is_bad(&s->bad, p.pack, p.offset) ||
            is_bad(&s->bad, p.pack, WHOLE_PACK))
            return false;
    }
    return true;
}

static int tell_damage(struct scrub *s, struct vm_error **err)
{
    cleanup_forwarding struct forwarding f = {0};
    cleanup_pack_presence struct pack_presence presence = {.store = s->store};
    if (s->bad.n)
        qsort(s->bad.items, s->bad.n, sizeof(*s->bad.items), by_place);
    for (size_t i = 0; i < s->bad.n; i++) {
        const struct bad *bad = &s->bad.items[i];
        if (f.pack != bad->pack) {
            forwarding_finish(&f);
            if (forwarding_get(s->store, bad->pack, &f, err) < 0 ||
                forwarding_drop_gone(&f, &presence, err) < 0)
                return -1;
        }
        if (is_healed(s, bad, &f))
            s->report.healed++;
        else
            report_damage(s, bad->what ? bad->what : "one more record is damaged");
    }
    return 0;
}

static int heal_and_tell(struct scrub *s, struct vm_error **err)
{
    struct vm_error *problem = NULL;
    uint64_t healed;
    int result = s->options->heal ? heal_quarantined(s->repo, 0, 0, &healed, &problem) : 0;
    if (unless_read_only(result, problem, err) < 0)
        return -1;
    return tell_damage(s, err);
}

/* ---- recipes ---- */

/* Does the pack hold that page where the recipe says? */
static int page_is_here(struct scrub *s, const struct recipe_page *p, bool *ret_there,
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
        struct bad gone = {.pack = p->pack, .offset = WHOLE_PACK};
        if (add_bad(&s->gone, &gone, err) < 0)
            return -1;
        qsort(s->gone.items, s->gone.n, sizeof(*s->gone.items), by_place);
        return 0;
    }
    const struct footer_record *r = footer_record_at(&c->footer, p->offset);
    *ret_there = r && p->page < r->n_pages && p->len >= r->len &&
                 !memcmp(c->footer.ids[r->first_page + p->page].bytes, p->id, sizeof(p->id));
    return 0;
}

static void note_unreadable(struct scrub *s, const char *what)
{
    for (size_t i = 0; i < s->n_unreadable; i++)
        if (!strcmp(s->unreadable[i], what))
            return;
    char *copy = s->n_unreadable < TEXTS_MAX ? strdup(what) : NULL;
    if (copy)
        s->unreadable[s->n_unreadable++] = copy;
}

static void forget_unreadable(struct scrub *s)
{
    while (s->n_unreadable)
        free(s->unreadable[--s->n_unreadable]);
}

/* There, or where its forwarding says. */
static int page_is_there(struct scrub *s, const struct recipe_page *p, bool *ret_there,
                         struct vm_error **err)
{
    struct recipe_page to = *p;
    bool found;
    if (page_is_here(s, p, ret_there, err) < 0)
        return -1;
    if (*ret_there)
        return 0;
    if (forwards_find(s->forwards, &to, &found, err) < 0 ||
        (found && page_is_here(s, &to, ret_there, err) < 0))
        return -1;
    if (!*ret_there && is_bad(&s->gone, p->pack, WHOLE_PACK)) {
        char what[64];
        snprintf(what, sizeof(what), "pack %016" PRIx64 ", which images need, is gone", p->pack);
        note_unreadable(s, what);
    }
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
    note_unreadable(arg, error_message(problem));
}

struct image_walk {
    struct scrub *scrub;
    struct recipe_walk *walk;
    char told[TEXTS_MAX][64]; /* packs and nodes that were told, by the beginning of the finding */
    size_t n_told;
};

/* Each once, though several images need it. */
static void tell_unreadable(struct image_walk *w)
{
    struct scrub *s = w->scrub;
    for (size_t i = 0; i < s->n_unreadable; i++) {
        size_t known = 0;
        while (known < w->n_told &&
               strncmp(w->told[known], s->unreadable[i], sizeof(w->told[0]) - 1) != 0)
            known++;
        if (known < w->n_told)
            continue;
        if (w->n_told < TEXTS_MAX)
            snprintf(w->told[w->n_told++], sizeof(w->told[0]), "%s", s->unreadable[i]);
        report_damage(s, s->unreadable[i]);
    }
}

static int walk_image(struct image_walk *w, const struct image *image, bool *ret_touched,
                      struct vm_error **err)
{
    *ret_touched = false;
    forget_unreadable(w->scrub);
    for (unsigned i = 0; i < image->n_files; i++) {
        bool damaged;
        if (recipe_walk_file(w->walk, &image->files[i].root, image->files[i].size, &damaged, err) <
            0)
            return -1;
        *ret_touched |= damaged;
    }
    return 0;
}

/*
 * Something of an image is not there: has it been deleted, or do other recipes take the place of
 * those that were read? Then they are in *image.
 */
static int is_still_there(struct scrub *s, struct image *image, bool *ret_there, bool *ret_same,
                          struct vm_error **err)
{
    struct vm_error *problem = NULL;
    cleanup_free struct image *now = malloc(sizeof(*now));
    if (!now)
        return error_nomem(err);
    *ret_there = catalogue_find(s->store, image->name, now, &problem) == 0;
    if (!*ret_there && problem->kind != VM_ERROR_NOT_FOUND)
        return error_propagate(err, problem);
    error_free(problem);
    *ret_same = *ret_there;
    for (unsigned i = 0; *ret_same && i < image->n_files; i++)
        *ret_same = now->n_files == image->n_files &&
                    recipe_ref_equal(&now->files[i].root, &image->files[i].root);
    if (*ret_there)
        *image = *now;
    return 0;
}

static int scrub_image(const struct image *listed, void *arg, struct vm_error **err)
{
    struct image_walk *w = arg;
    struct scrub *s = w->scrub;
    cleanup_free struct image *image = malloc(sizeof(*image));
    bool touched, there = true, same = false;
    if (!image)
        return error_nomem(err);
    *image = *listed;
    for (int i = 0; i < WALKS_MAX && there && !same; i++) {
        if (walk_image(w, image, &touched, err) < 0)
            return -1;
        same = !touched;
        if (touched && is_still_there(s, image, &there, &same, err) < 0)
            return -1;
        forwards_forget(s->forwards);
    }
    s->report.images++;
    if (there && touched) {
        tell_unreadable(w);
        s->report.images_touched++;
        s->found(SCRUB_IMAGE, image->name, s->arg);
    }
    forget_unreadable(s);
    return 0;
}

/* What a lease alone keeps, its image having been deleted or replaced, is named as the lease's. */
static int scrub_lease(const struct lease *lease, void *arg, struct vm_error **err)
{
    struct image_walk *w = arg;
    struct scrub *s = w->scrub;
    cleanup_free struct image *image = malloc(sizeof(*image));
    bool touched, there, same = false, current = false;
    char what[2 * IMAGE_NAME_MAX + 32];
    if (!image)
        return error_nomem(err);
    *image = lease->image;
    if (walk_image(w, image, &touched, err) < 0 ||
        (touched && (is_still_there(s, image, &there, &same, err) < 0 ||
                     catalogue_root_is_current(s->store, &lease->image, &current, err) < 0)))
        return -1;
    if (touched && !same && current) {
        tell_unreadable(w);
        s->report.images_touched++;
        snprintf(what, sizeof(what), "%s, as leased by %s", lease->image.name, lease->holder);
        s->found(SCRUB_IMAGE, what, s->arg);
    }
    forwards_forget(s->forwards);
    forget_unreadable(s);
    return 0;
}

/* It is no image that could be walked. */
static void tell_damaged_entry(const char *name, const struct vm_error *problem, void *arg)
{
    struct image_walk *w = arg;
    report_damage(w->scrub, error_message(problem));
    if (!name)
        return;
    w->scrub->report.images_touched++;
    w->scrub->found(SCRUB_IMAGE, name, w->scrub->arg);
}

static int scrub_images(struct scrub *s, struct vm_error **err)
{
    struct recipe_visitor visitor = {.leaf = visit_leaf, .unreadable = visit_unreadable, .arg = s};
    cleanup_free struct image_walk *w = calloc(1, sizeof(*w));
    if (!w)
        return error_nomem(err);
    w->scrub = s;
    s->footers = footer_cache_create(s->store, FOOTERS_BYTES, err);
    s->forwards = s->footers ? forwards_create(s->store, err) : NULL;
    w->walk = s->forwards ? recipe_walk_create(s->store, &visitor, err) : NULL;
    int result = w->walk ? catalogue_list(s->store, scrub_image, tell_damaged_entry, w, err) : -1;
    if (!result)
        result = catalogue_leases(s->store, scrub_lease, tell_damaged_entry, w, err);
    if (w->walk)
        s->report.nodes = recipe_walk_nodes(w->walk);
    recipe_walk_destroy(w->walk);
    forwards_destroy(s->forwards);
    footer_cache_destroy(s->footers);
    forget_unreadable(s);
    return result;
}

/* ---- forwardings ---- */

static int take_forwarded(const struct forwarding *f, void *arg, struct vm_error **err)
{
    return number_set_add(arg, f->pack, err);
}

/* Read anew: collections give forwardings other targets before they remove the old ones. */
static int scrub_forwarding(struct scrub *s, uint64_t pack, struct vm_error **err)
{
    cleanup_forwarding struct forwarding f = {0};
    cleanup_pack_presence struct pack_presence presence = {.store = s->store};
    char what[128];
    size_t at = 0;
    if (forwarding_get(s->store, pack, &f, err) < 0 ||
        forwarding_drop_gone(&f, &presence, err) < 0)
        return -1;
    uint64_t gone = number_set_next(&presence.gone, &at);
    if (!gone)
        return 0;
    snprintf(what, sizeof(what),
             "the forwarding of pack %016" PRIx64 " leads to pack %016" PRIx64 ", which is gone",
             pack, gone);
    SCOPE_LOCK(&s->lock);
    s->report.forwardings++;
    s->found(SCRUB_FORWARDING, what, s->arg);
    return 0;
}

static int scrub_forwardings(struct scrub *s, struct vm_error **err)
{
    cleanup_number_set struct number_set packs = {0};
    size_t at = 0;
    if (forwarding_list(s->store, take_forwarded, &packs, err) < 0)
        return -1;
    for (uint64_t pack; (pack = number_set_next(&packs, &at));)
        if (scrub_forwarding(s, pack, err) < 0)
            return -1;
    return 0;
}

static int scrub_all(struct scrub *s, struct vm_error **err)
{
    if (quarantine_load(s->store, &s->quarantine, err) < 0 ||
        verified_load(s->store, &s->verified, err) < 0 || scrub_packs(s, err) < 0 ||
        forget_gone(s, err) < 0 || heal_and_tell(s, err) < 0 || scrub_forwardings(s, err) < 0)
        return -1;
    return scrub_images(s, err);
}

int scrub_run(struct repo *r, const struct scrub_options *options, scrub_fn *found, void *arg,
              struct scrub_report *ret_report, struct vm_error **err)
{
    struct repo_stat stat;
    struct scrub *s = calloc(1, sizeof(*s));
    if (!s)
        return error_nomem(err);
    s->repo = r;
    s->store = repo_store(r);
    s->options = options;
    s->found = found;
    s->arg = arg;
    s->now_s = (uint64_t)(clock_wall_ns() / NSEC_PER_SEC);
    failure_init(&s->failure);
    pthread_mutex_init(&s->lock, NULL);
    int result = repo_stat(r, &stat, err);
    progress_init(&s->progress, options->control, result ? 0 : stat.pack_bytes);
    s->packs = result ? NULL : queue_create(QUEUE_SIZE, free, err);
    result = s->packs ? scrub_all(s, err) : -1;
    if (!result) {
        progress_end(&s->progress, 0);
        *ret_report = s->report;
    }
    progress_finish(&s->progress);
    pthread_mutex_destroy(&s->lock);
    failure_finish(&s->failure);
    queue_destroy(s->packs);
    quarantine_finish(&s->quarantine);
    verified_finish(&s->verified);
    number_set_finish(&s->listed);
    free_bad(&s->bad);
    free_bad(&s->gone);
    free(s);
    return result;
}

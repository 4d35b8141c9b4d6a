/* SPDX-License-Identifier: Apache-2.0 */
#include "repo/collect.h"
#include "repo/footer_cache.h"
#include "repo/holdings.h"
#include "repo/names.h"
#include "repo/progress.h"

#include "base/clock.h"
#include "base/fault.h"
#include "base/io.h"
#include "base/log.h"

#include <inttypes.h>
#include <stdlib.h>
#include <time.h>

enum { POLL_MS = 100, FENCE_AFTER_S = 60, TRIES = 16 };

struct collection {
    struct repo *repo;
    struct store *store;
    const struct collect_options *options;
    struct collect_report report;
    struct condemned_state state; /* the open list, from step 5 or 6 on */
    struct page_hasher hasher;
    struct progress *progress;
};

/* ---- steps 2 to 4: candidates ---- */

static int take_pack(const char *name, void *arg, struct vm_error **err)
{
    uint64_t number;
    return object_number(PACK_PREFIX, name, &number) ? number_set_add(arg, number, err) : 0;
}

static int take_tree(const char *name, void *arg, struct vm_error **err)
{
    uint64_t number;
    return object_number(TREE_PREFIX, name, &number) ? number_set_add(arg, number, err) : 0;
}

static int list_objects(struct store *s, struct object_set *ret, struct vm_error **err)
{
    if (store_list(s, STORE_PACK, PACK_PREFIX, take_pack, &ret->packs, err) < 0)
        return -1;
    return store_list(s, STORE_BLOB, TREE_PREFIX, take_tree, &ret->trees, err);
}

static int take_writer(const struct registered *r, void *arg, struct vm_error **err)
{
    return number_set_add(arg, r->number, err);
}

struct marking {
    struct store *store;
    struct holdings *holdings;
};

/* A root that cannot be read matters only if it still is one. */
static int mark_image(const struct image *image, void *arg, struct vm_error **err)
{
    struct marking *m = arg;
    struct vm_error *problem = NULL;
    bool current;
    if (holdings_add(m->holdings, image, &problem) == 0)
        return 0;
    if (problem->kind != VM_ERROR_CORRUPT)
        return error_propagate(err, problem);
    cleanup_error struct vm_error *kept = problem;
    if (catalogue_root_is_current(m->store, image, &current, err) < 0)
        return -1;
    return current ? error_set(err, VM_ERROR_CORRUPT,
                               "%s; nothing is removed before that is settled", error_message(kept))
                   : 0;
}

static int mark(struct store *s, struct object_set *ret_marked, struct vm_error **err)
{
    CLEANUP(holdings) struct holdings *h = holdings_create(s, ret_marked, err);
    struct marking m = {s, h};
    return h ? catalogue_roots(s, mark_image, &m, err) : -1;
}

/* Are there objects that nothing names, but that a registered writer may be about to name? */
static bool any_exempt(const struct number_set *all, const struct number_set *marked,
                       const struct number_set *writers)
{
    size_t at = 0;
    for (uint64_t number; (number = number_set_next(all, &at));)
        if (!number_set_has(marked, number) && number_set_has(writers, number_writer(number)))
            return true;
    return false;
}

static int subtract(const struct number_set *all, const struct number_set *marked,
                    const struct number_set *exempt, struct number_set *ret, struct vm_error **err)
{
    size_t at = 0;
    for (uint64_t number; (number = number_set_next(all, &at));)
        if (!number_set_has(marked, number) && !number_set_has(exempt, number_writer(number)) &&
            number_set_add(ret, number, err) < 0)
            return -1;
    return 0;
}

/* *ret_exempt: something is garbage if its writer is dead. */
static int find_candidates(struct collection *c, struct object_set *ret, bool *ret_exempt,
                           struct vm_error **err)
{
    cleanup_object_set struct object_set all = {{0}, {0}}, marked = {{0}, {0}};
    cleanup_number_set struct number_set writers = {0};
    if (list_objects(c->store, &all, err) < 0)
        return -1;
    (void)FAULT("repo.collect-listed");
    /* After the list: who has a pack in it and is not registered now has ended. */
    if (catalogue_registered(c->store, take_writer, &writers, err) < 0 ||
        mark(c->store, &marked, err) < 0)
        return -1;
    *ret_exempt = any_exempt(&all.packs, &marked.packs, &writers) ||
                  any_exempt(&all.trees, &marked.trees, &writers);
    if (subtract(&all.packs, &marked.packs, &writers, &ret->packs, err) < 0)
        return -1;
    return subtract(&all.trees, &marked.trees, &writers, &ret->trees, err);
}

/* ---- steps 1 and 5: open or adopt ---- */

/* 1: a list is open, in c->state; 0: there is nothing to collect; -1. */
static int open_or_adopt(struct collection *c, struct vm_error **err)
{
    for (int i = 0; i < TRIES; i++) {
        cleanup_object_set struct object_set candidates = {{0}, {0}};
        struct condemned_list list;
        uint64_t number;
        bool open, exempt, made;
        if (condemned_sweep(c->store, err) < 0 ||
            condemned_read_state(c->store, &c->state, err) < 0)
            return -1;
        c->report.adopted = c->state.is_open;
        if (c->state.is_open)
            return 1;
        if (find_candidates(c, &candidates, &exempt, err) < 0)
            return -1;
        /* An empty list, too, begins an epoch: it tells which writers live. */
        if (!candidates.packs.n && !candidates.trees.n && !exempt)
            return 0;
        if (catalogue_next_number(c->store, &number, err) < 0 ||
            condemned_make(c->store, number, &candidates, &list, &made, err) < 0)
            return -1;
        (void)FAULT("repo.collect-made");
        if (!made)
            continue;
        if (condemned_publish(c->store, &list, &c->state, &open, err) < 0)
            return -1;
        (void)FAULT("repo.collect-published");
        if (open) {
            c->state = (struct condemned_state){true, c->state.epoch + 1, list};
            return 1;
        }
    }
    return error_set(err, VM_ERROR_CONFLICT, "too many collections begin at once; try again");
}

/* ---- step 7: mark again ---- */

static int mark_again(struct collection *c, struct vm_error **err)
{
    cleanup_object_set struct object_set marked = {{0}, {0}}, listed = {{0}, {0}},
                                         spared = {{0}, {0}};
    const struct number_set none = {0};
    if (condemned_load(c->store, &c->state.list, &listed, err) < 0 ||
        mark(c->store, &marked, err) < 0)
        return -1;
    c->report.condemned = listed.packs.n + listed.trees.n;
    /* What is listed and marked: listed, less what is listed and not marked. */
    cleanup_object_set struct object_set garbage = {{0}, {0}};
    if (subtract(&listed.packs, &marked.packs, &none, &garbage.packs, err) < 0 ||
        subtract(&listed.trees, &marked.trees, &none, &garbage.trees, err) < 0 ||
        subtract(&listed.packs, &garbage.packs, &none, &spared.packs, err) < 0 ||
        subtract(&listed.trees, &garbage.trees, &none, &spared.trees, err) < 0)
        return -1;
    return condemned_spare(c->store, &c->state.list, &spared, err);
}

/* ---- step 8: wait or fence ---- */

struct waiting {
    struct collection *c;
    bool fence; /* the time is over */
    unsigned n; /* writers that are still to answer */
};

static int look_at_writer(const struct registered *r, void *arg, struct vm_error **err)
{
    struct waiting *w = arg;
    bool fenced = false;
    if (r->epoch >= w->c->state.epoch)
        return 0;
    if (w->fence && catalogue_fence(w->c->store, r, &fenced, err) < 0)
        return -1;
    if (fenced) {
        w->c->report.writers_fenced++;
        log_warn("a writer that did not answer was fenced", "writer=%" PRIu64 " image=%s",
                 r->number, log_q(r->name));
    }
    w->n += !fenced;
    return 0;
}

static int wait_or_fence(struct collection *c, struct vm_error **err)
{
    int64_t fence_after = c->options->fence_after_ns ? c->options->fence_after_ns
                                                     : FENCE_AFTER_S * NSEC_PER_SEC;
    int64_t deadline = clock_mono_ns() + fence_after;
    struct waiting w = {.c = c};
    do {
        w.n = 0;
        w.fence = clock_mono_ns() >= deadline;
        if (catalogue_registered(c->store, look_at_writer, &w, err) < 0 ||
            progress_add(c->progress, 0, UINT64_MAX, err) < 0)
            return -1;
        if (w.n)
            nanosleep(&(struct timespec){.tv_nsec = POLL_MS * NSEC_PER_MSEC}, NULL);
    } while (w.n);
    return catalogue_drop_pins(c->store, err);
}

/* ---- step 9: delete ---- */

/*
 * Entries of the index that name the pack. Hints: a pack that cannot be read leaves its entries
 * behind.
 */
static int erase_hints(struct collection *c, uint64_t pack, struct vm_error **err)
{
    struct footer f;
    struct vm_error *problem;
    uint8_t value[8];
    if (footer_read_many(c->store, &pack, 1, &f, &problem, err) < 0)
        return -1;
    error_free(problem);
    size_t n = 0;
    cleanup_free struct index_entry *entries =
        calloc((size_t)f.n_pages + f.n_records + 1, sizeof(*entries));
    int result = entries ? 0 : error_nomem(err);
    put_le64(value, pack);
    for (uint32_t i = 0; !result && i < f.n_records; i++) {
        const struct footer_record *r = &f.records[i];
        struct page_id extent;
        if (!r->mask)
            continue;
        result = page_hasher_extent(&c->hasher, &f.ids[r->first_page], r->mask, &extent, err);
        entries[n++] = index_entry_make(INDEX_EXTENT, &extent, value, sizeof(value));
    }
    for (uint32_t i = 0; !result && i < f.n_pages; i++)
        if (index_samples(&f.ids[i]))
            entries[n++] = index_entry_make(INDEX_PAGE, &f.ids[i], value, sizeof(value));
    if (!result)
        result = index_erase(repo_index(c->repo), entries, n, err);
    footer_finish(&f);
    return result;
}

static int remove_object(struct collection *c, bool is_pack, uint64_t number, struct vm_error **err)
{
    char name[OBJECT_NAME_SIZE];
    enum store_area area = is_pack ? STORE_PACK : STORE_BLOB;
    struct store_op size = {.kind = STORE_SIZE, .area = area,
                            .name = object_name(is_pack ? PACK_PREFIX : TREE_PREFIX, number, name)};
    if (store_run(c->store, &size, 1, err) < 0 || (is_pack && erase_hints(c, number, err) < 0))
        return -1;
    enum store_result removed = store_remove(c->store, area, name, err);
    if (removed == STORE_FAILED)
        return -1;
    if (removed == STORE_DONE) {
        *(is_pack ? &c->report.packs : &c->report.trees) += 1;
        c->report.bytes += size.ret_size;
    }
    return 0;
}

static int delete_entry(struct collection *c, bool is_pack, uint64_t number, struct vm_error **err)
{
    bool claimed;
    if (condemned_claim(c->store, &c->state.list, is_pack, number, &claimed, err) < 0)
        return -1;
    if (!claimed)
        return 0;
    (void)FAULT("repo.collect-claimed");
    if (remove_object(c, is_pack, number, err) < 0)
        return -1;
    (void)FAULT("repo.collect-removed");
    if (condemned_erase(c->store, &c->state.list, is_pack, number, err) < 0)
        return -1;
    return progress_add(c->progress, 1, UINT64_MAX, err);
}

static int delete_all(struct collection *c, struct vm_error **err)
{
    cleanup_object_set struct object_set listed = {{0}, {0}};
    if (condemned_load(c->store, &c->state.list, &listed, err) < 0)
        return -1;
    c->progress->now.total = listed.packs.n + listed.trees.n;
    size_t at = 0;
    for (uint64_t number; (number = number_set_next(&listed.packs, &at));)
        if (delete_entry(c, true, number, err) < 0)
            return -1;
    at = 0;
    for (uint64_t number; (number = number_set_next(&listed.trees, &at));)
        if (delete_entry(c, false, number, err) < 0)
            return -1;
    return 0;
}

/* ---- all of it ---- */

static int collect(struct collection *c, struct vm_error **err)
{
    int open = open_or_adopt(c, err);
    if (open <= 0)
        return open;
    if (catalogue_raise_epochs(c->store, c->state.epoch, err) < 0)
        return -1;
    (void)FAULT("repo.collect-raised");
    if (mark_again(c, err) < 0)
        return -1;
    (void)FAULT("repo.collect-marked");
    if (wait_or_fence(c, err) < 0 || delete_all(c, err) < 0)
        return -1;
    (void)FAULT("repo.collect-deleted");
    return condemned_close(c->store, &c->state, err);
}

/* What writers left that turned out to be dead is garbage only now. */
static int collect_twice(struct collection *c, struct vm_error **err)
{
    int result = collect(c, err);
    if (result < 0 || !c->report.writers_fenced)
        return result;
    bool adopted = c->report.adopted;
    uint64_t condemned = c->report.condemned;
    result = collect(c, err);
    c->report.adopted |= adopted;
    c->report.condemned += condemned;
    return result;
}

static int collect_with_ballast(struct collection *c, struct vm_error **err)
{
    struct vm_error *error = NULL;
    int result = collect_twice(c, &error);
    if (result < 0 && error->kind == VM_ERROR_NO_SPACE && store_ballast_take(c->store, NULL) == 0) {
        error_clear(&error);
        result = collect_twice(c, &error);
    }
    /* What cannot be set aside now is tried again by the next collection. */
    if (result == 0)
        store_ballast_refill(c->store, NULL);
    return result < 0 ? error_propagate(err, error) : 0;
}

int repo_collect(struct repo *r, const struct collect_options *options,
                 struct collect_report *ret_report, struct vm_error **err)
{
    struct progress progress;
    struct collection c = {.repo = r, .store = repo_store(r), .options = options,
                           .progress = &progress};
    if (page_hasher_init(&c.hasher, err) < 0)
        return -1;
    progress_init(&progress, &options->control, 0);
    int result = collect_with_ballast(&c, err);
    if (!result) {
        progress_end(&progress, 0);
        *ret_report = c.report;
    }
    progress_finish(&progress);
    page_hasher_finish(&c.hasher);
    return result < 0 ? error_wrap(err, "collection") : 0;
}

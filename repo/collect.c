/* SPDX-License-Identifier: Apache-2.0 */
#include "repo/collect.h"
#include "repo/footer_cache.h"
#include "repo/forwarding.h"
#include "repo/hints.h"
#include "repo/holdings.h"
#include "repo/names.h"
#include "repo/progress.h"
#include "repo/quarantine.h"
#include "repo/repack.h"
#include "repo/settle.h"
#include "repo/tree.h"
#include "repo/verified.h"

#include "base/clock.h"
#include "base/fault.h"
#include "base/io.h"
#include "base/log.h"

#include <inttypes.h>
#include <stdlib.h>
#include <time.h>

enum { POLL_MS = 100, FENCE_AFTER_S = 60, TRIES = 16, HINTS_BATCH = 8 };

_Static_assert((int)REPACK_BATCH <= (int)FORGET_BATCH,
               "a batch of packs that were moved is deleted at once");

struct collection {
    struct repo *repo;
    struct store *store;
    const struct collect_options *options;
    struct collect_report report;
    struct condemned_state state; /* the open list, from step 5 or 6 on */
    struct object_set listed, marked; /* of the open list, after step 7 */
    struct alive alive;               /* records of listed packs that are marked */
    struct number_set repack;         /* listed packs that stay on the list to be repacked */
    struct hints *hints; /* which erases entries */
    struct progress *progress;
};

static void forget_list(struct collection *c)
{
    object_set_finish(&c->listed);
    object_set_finish(&c->marked);
    number_set_finish(&c->repack);
    alive_finish(&c->alive);
}

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

static int take_forwarding(const struct forwarding *f, void *arg, struct vm_error **err)
{
    return number_set_add(arg, f->pack, err);
}

/* A forwarding stands for its pack. */
static int list_objects(struct store *s, struct object_set *ret, struct vm_error **err)
{
    if (forwarding_list(s, take_forwarding, &ret->packs, err) < 0)
        return -1;
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
    bool told; /* that nothing is removed */
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
    m->told = current;
    return current ? error_set(err, VM_ERROR_CORRUPT,
                               "%s; nothing is removed before that image is deleted, and its leases "
                               "are dropped, which \"vmmig repo scrub\" names",
                               error_message(kept))
                   : 0;
}

static int mark(struct store *s, struct object_set *ret_marked, struct alive *alive,
                struct vm_error **err)
{
    /* One that its writer left behind, or that came late, marks nothing. */
    if (catalogue_drop_pins(s, err) < 0)
        return -1;
    CLEANUP(holdings) struct holdings *h = holdings_create(s, ret_marked, alive, err);
    struct marking m = {s, h};
    cleanup_error struct vm_error *problem = NULL;
    if (!h || catalogue_roots(s, mark_image, &m, &problem) == 0)
        return h ? 0 : -1;
    /* What a damaged root held is not known. */
    return problem->kind == VM_ERROR_CORRUPT && !m.told
               ? error_set(err, VM_ERROR_CORRUPT, "%s; nothing is removed before that",
                           error_message(problem))
               : error_propagate(err, steal_ptr(&problem));
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

/* *ret_writers: somebody is registered, who may be dead, and what it stored garbage. */
static int find_candidates(struct collection *c, struct object_set *ret, bool *ret_writers,
                           struct vm_error **err)
{
    cleanup_object_set struct object_set all = {{0}, {0}}, marked = {{0}, {0}};
    cleanup_number_set struct number_set writers = {0};
    cleanup_alive struct alive alive = {.salt = c->state.epoch};
    if (list_objects(c->store, &all, err) < 0)
        return -1;
    (void)FAULT("repo.collect-listed");
    /* After the list: who has a pack in it and is not registered now has ended. */
    if (catalogue_registered(c->store, take_writer, &writers, err) < 0 ||
        mark(c->store, &marked, c->options->repack ? &alive : NULL, err) < 0)
        return -1;
    if (c->options->repack && repack_choose(c->repo, c->options, &alive, &writers, &ret->packs,
                                            &c->report.more_to_repack, err) < 0)
        return -1;
    *ret_writers = writers.n > 0;
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
        bool open, writers;
        if (condemned_sweep(c->store, err) < 0 ||
            condemned_read_state(c->store, &c->state, err) < 0)
            return -1;
        c->report.adopted = c->state.is_open;
        if (c->state.is_open)
            return 1;
        if (find_candidates(c, &candidates, &writers, err) < 0)
            return -1;
        /* An empty list, too, begins an epoch: it tells which writers live. */
        if (!candidates.packs.n && !candidates.trees.n && !writers)
            return 0;
        if (catalogue_next_number(c->store, &number, err) < 0 ||
            condemned_make(c->store, number, &candidates, &list, err) < 0)
            return -1;
        (void)FAULT("repo.collect-made");
        if (condemned_publish(c->store, &list, &candidates, &c->state, &open, err) < 0)
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
    cleanup_object_set struct object_set spared = {{0}, {0}};
    cleanup_number_set struct number_set claimed = {0}, chosen = {0};
    const struct number_set none = {0};
    bool more;
    forget_list(c);
    c->alive = (struct alive){.only = &c->listed.packs, .salt = c->state.epoch};
    if (condemned_load(c->store, &c->state.list, &c->listed, &claimed, err) < 0 ||
        mark(c->store, &c->marked, &c->alive, err) < 0)
        return -1;
    c->report.condemned = c->listed.packs.n + c->listed.trees.n;
    if (c->options->repack &&
        repack_choose(c->repo, c->options, &c->alive, &none, &chosen, &more, err) < 0)
        return -1;
    /* Of what somebody has begun to remove nothing is left to be moved. */
    if (subtract(&chosen, &claimed, &none, &c->repack, err) < 0)
        return -1;
    /* What is listed and marked: listed, less what is listed and not marked. */
    cleanup_object_set struct object_set garbage = {{0}, {0}};
    cleanup_number_set struct number_set used = {0};
    if (subtract(&c->listed.packs, &c->marked.packs, &none, &garbage.packs, err) < 0 ||
        subtract(&c->listed.trees, &c->marked.trees, &none, &garbage.trees, err) < 0 ||
        subtract(&c->listed.packs, &garbage.packs, &none, &used, err) < 0 ||
        subtract(&used, &c->repack, &none, &spared.packs, err) < 0 ||
        subtract(&c->listed.trees, &garbage.trees, &none, &spared.trees, err) < 0)
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

static int erase_footers(struct collection *c, const uint64_t *packs, size_t n,
                         struct vm_error **err)
{
    struct footer footers[HINTS_BATCH];
    struct vm_error *problems[HINTS_BATCH];
    if (footer_read_many(c->store, packs, n, footers, problems, err) < 0)
        return -1;
    int result = 0;
    for (size_t i = 0; i < n; i++) {
        error_free(problems[i]);
        if (!result)
            result = hints_add_footer(c->hints, &footers[i], err);
        footer_finish(&footers[i]);
    }
    return result;
}

static int erase_node(const struct recipe_ref *ref, const void *node, size_t len, void *arg,
                      struct vm_error **err)
{
    struct collection *c = arg;
    return hints_add_node(c->hints, ref, node, len, err);
}

static int erase_nodes(struct collection *c, uint64_t tree, struct vm_error **err)
{
    struct vm_error *problem = NULL;
    if (tree_each_node(c->store, tree, repo_uuid(c->repo), erase_node, c, &problem) == 0)
        return 0;
    bool hint = problem->kind == VM_ERROR_CORRUPT || problem->kind == VM_ERROR_NOT_FOUND;
    error_propagate(hint ? NULL : err, problem);
    return hint ? 0 : -1;
}

/* They are hints: an object that cannot be read leaves its entries behind. */
static int erase_hints(struct collection *c, bool is_pack, const uint64_t *numbers, size_t n,
                       struct vm_error **err)
{
    for (size_t i = 0; is_pack && i < n; i += HINTS_BATCH)
        if (erase_footers(c, numbers + i, n - i < HINTS_BATCH ? n - i : HINTS_BATCH, err) < 0)
            return -1;
    for (size_t i = 0; !is_pack && i < n; i++)
        if (erase_nodes(c, numbers[i], err) < 0)
            return -1;
    return hints_flush(c->hints, err);
}

/* What is known of packs that are gone. */
static int forget_packs(struct collection *c, const uint64_t *packs, size_t n,
                        struct vm_error **err)
{
    uint64_t dead[FORGET_BATCH];
    size_t n_dead = 0;
    /* Who claimed a pack that is marked had made its forwarding before. */
    for (size_t i = 0; i < n; i++)
        if (!number_set_has(&c->marked.packs, packs[i]))
            dead[n_dead++] = packs[i];
    if (forwarding_erase(c->store, dead, n_dead, err) < 0 ||
        verified_forget(c->store, packs, n, err) < 0)
        return -1;
    return quarantine_forget(c->store, packs, n, err);
}

/* The objects, and what is known of them. Counts what was there. */
static int remove_objects(struct collection *c, bool is_pack, const uint64_t *numbers, size_t n,
                          uint64_t *ret_objects, uint64_t *ret_bytes, struct vm_error **err)
{
    char names[FORGET_BATCH][OBJECT_NAME_SIZE];
    struct store_op sizes[FORGET_BATCH], removals[FORGET_BATCH];
    for (size_t i = 0; i < n; i++) {
        object_name(is_pack ? PACK_PREFIX : TREE_PREFIX, numbers[i], names[i]);
        sizes[i] = (struct store_op){.kind = STORE_SIZE, .name = names[i],
                                     .area = is_pack ? STORE_PACK : STORE_BLOB};
        removals[i] = sizes[i];
        removals[i].kind = STORE_REMOVE;
    }
    if (store_run(c->store, sizes, n, err) < 0 || erase_hints(c, is_pack, numbers, n, err) < 0 ||
        store_run(c->store, removals, n, err) < 0)
        return -1;
    for (size_t i = 0; i < n; i++) {
        *ret_objects += removals[i].result == STORE_DONE;
        *ret_bytes += removals[i].result == STORE_DONE ? sizes[i].ret_size : 0;
    }
    return is_pack ? forget_packs(c, numbers, n, err) : 0;
}

/* Claim n <= FORGET_BATCH entries, and remove what could be claimed. */
static int delete_entries(struct collection *c, bool is_pack, const uint64_t *numbers, size_t n,
                          uint64_t *ret_objects, uint64_t *ret_bytes, struct vm_error **err)
{
    enum condemned_claim claims[FORGET_BATCH];
    uint64_t claimed[FORGET_BATCH];
    size_t n_claimed = 0;
    if (condemned_claim(c->store, &c->state.list, is_pack, numbers, n, claims, err) < 0)
        return -1;
    for (size_t i = 0; i < n; i++)
        if (claims[i] == CONDEMNED_CLAIMED)
            claimed[n_claimed++] = numbers[i];
    if (!n_claimed)
        return 0;
    (void)FAULT("repo.collect-claimed");
    if (remove_objects(c, is_pack, claimed, n_claimed, ret_objects, ret_bytes, err) < 0)
        return -1;
    (void)FAULT("repo.collect-removed");
    if (condemned_erase(c->store, &c->state.list, is_pack, claimed, n_claimed, err) < 0)
        return -1;
    return progress_add(c->progress, n_claimed, UINT64_MAX, err);
}

/* All of one kind but what is to be repacked. */
static int delete_kind(struct collection *c, bool is_pack, struct vm_error **err)
{
    const struct number_set *listed = is_pack ? &c->listed.packs : &c->listed.trees;
    uint64_t *count = is_pack ? &c->report.packs : &c->report.trees, batch[FORGET_BATCH], number;
    size_t at = 0, n = 0;
    do {
        number = number_set_next(listed, &at);
        if (number && !(is_pack && number_set_has(&c->repack, number)))
            batch[n++] = number;
        if (n && (!number || n == FORGET_BATCH)) {
            if (delete_entries(c, is_pack, batch, n, count, &c->report.bytes, err) < 0)
                return -1;
            n = 0;
        }
    } while (number);
    return 0;
}

static int spare_all(struct collection *c, const struct number_set *packs, struct vm_error **err)
{
    const struct object_set spared = {*packs, {0}};
    return condemned_spare(c->store, &c->state.list, &spared, err);
}

/* The packs of a batch that were moved go, the others come off the list. */
static int end_batch(struct collection *c, const struct repack_batch *b, struct vm_error **err)
{
    cleanup_number_set struct number_set stay = {0};
    uint64_t moved[REPACK_BATCH];
    size_t n_moved = 0;
    for (size_t i = 0; i < b->n; i++) {
        if (b->moved[i])
            moved[n_moved++] = b->packs[i];
        else if (number_set_add(&stay, b->packs[i], err) < 0)
            return -1;
    }
    if (delete_entries(c, true, moved, n_moved, &c->report.repacked, &c->report.repacked_from,
                       err) < 0)
        return -1;
    return spare_all(c, &stay, err);
}

static int repack_batches(struct collection *c, struct vm_error **err)
{
    struct repack_batch batch;
    int more = 0;
    CLEANUP(repacker)
    struct repacker *rp = repacker_create(c->repo, c->options, &c->alive, &c->repack, err);
    while (rp && (more = repacker_next(rp, &batch, err)) > 0)
        if (end_batch(c, &batch, err) < 0)
            return -1;
    if (rp)
        c->report.repacked_to += repacker_bytes(rp);
    return rp ? more : -1;
}

/* Too little space, or a fence, leaves packs as they are: they come off the list. */
static int repack_all(struct collection *c, struct vm_error **err)
{
    struct vm_error *problem = NULL;
    if (!c->repack.n || repack_batches(c, &problem) == 0)
        return 0;
    if (problem->kind != VM_ERROR_NO_SPACE && problem->kind != VM_ERROR_REFUSED)
        return error_propagate(err, problem);
    c->report.repack_lacked_space = problem->kind == VM_ERROR_NO_SPACE;
    c->report.more_to_repack = true;
    log_warn("packs were not repacked", "reason=%s", log_q(error_message(problem)));
    error_free(problem);
    return spare_all(c, &c->repack, err);
}

static int delete_all(struct collection *c, struct vm_error **err)
{
    progress_restart(c->progress, c->listed.packs.n + c->listed.trees.n);
    if (delete_kind(c, true, err) < 0 || delete_kind(c, false, err) < 0)
        return -1;
    (void)FAULT("repo.collect-garbage-gone");
    return repack_all(c, err);
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

/* Needs space; without it, what forwardings keep alive is kept. */
static int settle(struct collection *c, struct vm_error **err)
{
    struct vm_error *problem = NULL;
    uint64_t n;
    if (settle_images(c->repo, &n, &problem) < 0 && problem->kind != VM_ERROR_NO_SPACE)
        return error_propagate(err, problem);
    error_free(problem);
    c->report.settled += n;
    return 0;
}

static int settle_and_collect(struct collection *c, struct vm_error **err)
{
    if (settle(c, err) < 0 || collect(c, err) < 0)
        return -1;
    return c->report.repacked ? settle(c, err) : 0;
}

/*
 * What writers left that turned out to be dead is garbage only now; and a list that was open already
 * does not know of what became garbage since.
 */
static int collect_twice(struct collection *c, struct vm_error **err)
{
    int result = settle_and_collect(c, err);
    if (result < 0 || !(c->report.writers_fenced || c->report.adopted))
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
    CLEANUP(hints) struct hints *hints = hints_create(repo_index(r), index_erase, err);
    if (!hints)
        return -1;
    c.hints = hints;
    progress_init(&progress, &options->control, 0);
    int result = collect_with_ballast(&c, err);
    if (!result) {
        progress_end(&progress, 0);
        *ret_report = c.report;
    }
    progress_finish(&progress);
    forget_list(&c);
    return result < 0 ? error_wrap(err, "collection") : 0;
}

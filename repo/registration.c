/* SPDX-License-Identifier: Apache-2.0 */
/* Writers: the steps "a writer" of docs/repository-collection.md, in their order. */
#include "repo/catalogue.h"
#include "repo/catalogue_shard.h"
#include "repo/forwarding.h"
#include "repo/holdings.h"
#include "repo/names.h"

#include "base/clock.h"
#include "base/fault.h"
#include "base/log.h"

#include <inttypes.h>
#include <stdlib.h>

struct registration {
    struct store *store;
    uint64_t number;
    char name[IMAGE_NAME_MAX + 1];
    char what[IMAGE_NAME_MAX + 24]; /* that it commits, for messages */
    char key[SHARD_KEY_SIZE], pin[SHARD_KEY_SIZE]; /* w:NUMBER, p:NUMBER */
    char target[SHARD_KEY_SIZE];                   /* what the commit sets, in name's shard */
    struct buffer before;                          /* what it must be until then; empty: nothing */
    struct buffer epoch;                           /* as it was acknowledged */
    struct buffer value;                           /* of the registration */
    uint64_t registered_s;
    unsigned parent_shard;
    bool pinned, ended;
    struct image *parent;   /* pinned; NULL without one */
    struct object_set held; /* what the parent refers to, once that was needed */
    bool held_known;
    struct object_set condemned;
};

uint64_t registration_number(const struct registration *r)
{
    return r->number;
}

const struct object_set *registration_condemned(const struct registration *r)
{
    return &r->condemned;
}

/* The epoch of the shard, then the list that is open: in this order, so that no list is missed. */
static int look(struct registration *r, struct condemned_state *ret_state, struct vm_error **err)
{
    if (shard_get(r->store, shard_of(r->name), SHARD_EPOCH, &r->epoch, err) < 0)
        return -1;
    if (r->epoch.len != 8)
        return error_set(err, VM_ERROR_CORRUPT, "an epoch of the catalogue is lost");
    object_set_finish(&r->condemned);
    return condemned_load_open(r->store, ret_state, &r->condemned, err);
}

static void write_registration(struct registration *r, struct buffer *out)
{
    buffer_put(out, r->epoch.data, r->epoch.len);
    buffer_put_le64(out, r->registered_s);
    buffer_put(out, r->name, strlen(r->name));
}

/* 1: registered; 0: a guard did not hold; -1. */
static int register_once(struct registration *r, struct condemned_state *ret_state,
                         struct vm_error **err)
{
    if (look(r, ret_state, err) < 0)
        return -1;
    buffer_reset(&r->value);
    write_registration(r, &r->value);
    if (r->value.failed)
        return error_nomem(err);
    struct shard_change c = {.shard = shard_of(r->name), .n_compares = 2,
                       .compares = {shard_pair(SHARD_EPOCH, &r->epoch),
                                    shard_pair(r->target, &r->before)},
                       .set = shard_pair(r->key, &r->value)};
    enum store_result done = shard_apply(r->store, &c, err);
    return done == STORE_FAILED ? -1 : done == STORE_DONE;
}

/* Is the target the value (1), as it was before (0) or something else (2)? -1. */
static int look_at_target(struct registration *r, const struct buffer *value, struct vm_error **err)
{
    cleanup_buffer struct buffer now = {0};
    if (shard_get(r->store, shard_of(r->name), r->target, &now, err) < 0)
        return -1;
    if (value && now.len == value->len && !memcmp(now.data, value->data, now.len))
        return 1;
    bool same =
        now.len == r->before.len && (!now.len || !memcmp(now.data, r->before.data, now.len));
    return same ? 0 : 2;
}

static int target_changed(const struct registration *r, struct vm_error **err)
{
    return r->before.len ? error_set(err, VM_ERROR_CONFLICT, "%s was replaced meanwhile", r->what)
                         : error_set(err, VM_ERROR_CONFLICT, "there is an image %s already",
                                     r->name);
}

static int pin_parent(struct registration *r, const struct image *parent, struct vm_error **err)
{
    char key[SHARD_KEY_SIZE];
    cleanup_buffer struct buffer value = {0}, pin = {0};
    image_write(parent, &value);
    buffer_put_le16(&pin, (uint16_t)shard_of(r->name));
    shard_put_image(&pin, parent);
    if (value.failed || pin.failed || !(r->parent = malloc(sizeof(*r->parent))))
        return error_nomem(err);
    *r->parent = *parent;
    r->parent_shard = shard_of(parent->name);
    struct shard_change c = {
        .shard = r->parent_shard, .n_compares = 1,
        .compares = {shard_pair(shard_name_key(parent->name, key), &value)},
        .set = shard_pair(shard_number_key(SHARD_PINS, r->number, r->pin), &pin)};
    r->pinned = true; /* perhaps; it is taken away in any case */
    enum store_result done = shard_apply(r->store, &c, err);
    if (done == STORE_MISMATCH)
        return error_set(err, VM_ERROR_NOT_FOUND, "image %s was deleted or replaced meanwhile",
                         parent->name);
    return done == STORE_DONE ? 0 : -1;
}

/* The registration itself first: once it is gone nothing can be committed. */
static int unregister(struct registration *r, struct vm_error **err)
{
    bool erased;
    return shard_erase(r->store, shard_of(r->name), r->key, NULL, &erased, err);
}

static int unpin(struct registration *r, struct vm_error **err)
{
    bool erased;
    return r->pinned ? shard_erase(r->store, r->parent_shard, r->pin, NULL, &erased, err) : 0;
}

static void free_registration(struct registration *r)
{
    buffer_finish(&r->epoch);
    buffer_finish(&r->before);
    buffer_finish(&r->value);
    object_set_finish(&r->condemned);
    object_set_finish(&r->held);
    free(r->parent);
    free(r);
}

static void intersect(const struct number_set *a, const struct number_set *b,
                      struct number_set *out, bool *ret_failed)
{
    size_t at = 0;
    for (uint64_t number; (number = number_set_next(a, &at));)
        if (number_set_has(b, number) && number_set_add(out, number, NULL) < 0)
            *ret_failed = true;
}

/* Parts of the parent that the image keeps are as good as shared: all it refers to counts. */
static int know_held(struct registration *r, struct vm_error **err)
{
    if (!r->parent || r->held_known)
        return 0;
    CLEANUP(holdings) struct holdings *h = holdings_create(r->store, &r->held, NULL, err);
    if (!h || holdings_add(h, r->parent, err) < 0)
        return -1;
    r->held_known = true;
    return 0;
}

/* What a writer wants off the list. */
struct wanting {
    const struct registration *r;
    const struct object_set *shared;
    struct object_set wanted;
};

/* Where forwardings of what is shared or held lead. */
static int want_targets(const struct forwarding *f, void *arg, struct vm_error **err)
{
    struct wanting *w = arg;
    if (!number_set_has(&w->shared->packs, f->pack) && !number_set_has(&w->r->held.packs, f->pack))
        return 0;
    for (size_t i = 0; i < f->n; i++)
        if (number_set_has(&w->r->condemned.packs, f->runs[i].to.pack) &&
            number_set_add(&w->wanted.packs, f->runs[i].to.pack, err) < 0)
            return -1;
    return 0;
}

static int want_all(struct registration *r, struct wanting *w, struct vm_error **err)
{
    struct object_set *wanted = &w->wanted;
    const struct object_set *shared = w->shared;
    bool failed = false;
    intersect(&r->condemned.packs, &shared->packs, &wanted->packs, &failed);
    intersect(&r->condemned.trees, &shared->trees, &wanted->trees, &failed);
    intersect(&r->condemned.packs, &r->held.packs, &wanted->packs, &failed);
    intersect(&r->condemned.trees, &r->held.trees, &wanted->trees, &failed);
    if (failed)
        return error_nomem(err);
    /* Forwardings are read after the list, and anew for each: others commit them meanwhile. */
    return forwarding_list(r->store, want_targets, w, err);
}

static bool any_of(const struct number_set *a, const struct number_set *b)
{
    size_t at = 0;
    for (uint64_t number; (number = number_set_next(a, &at));)
        if (number_set_has(b, number))
            return true;
    return false;
}

/*
 * What is shared must stay where it is: a record that nobody named before may not be forwarded. What
 * the parent holds may be where forwardings lead. A forwarding of a pack that stays may lose its
 * target: nobody follows it then.
 */
static int check_lost(struct registration *r, const struct object_set *shared,
                      const struct object_set *lost, struct vm_error **err)
{
    bool safe = !lost->trees.n && !any_of(&lost->packs, &shared->packs);
    if (safe && lost->packs.n && r->parent &&
        holdings_outlive(r->store, r->parent, &lost->packs, &safe, err) < 0)
        return -1;
    return safe ? 0
                : error_set(err, VM_ERROR_REFUSED,
                            "a collection removes what %s shares; begin again", r->what);
}

/* Take what is shared off the list. REFUSED if something of it is being removed, or is gone. */
static int rescue(struct registration *r, const struct condemned_state *state,
                  const struct object_set *shared, struct vm_error **err)
{
    struct wanting w = {.r = r, .shared = shared};
    cleanup_object_set struct object_set lost = {{0}, {0}};
    if (!r->condemned.packs.n && !r->condemned.trees.n)
        return 0;
    int result = know_held(r, err);
    if (!result)
        result = want_all(r, &w, err);
    if (!result)
        result = condemned_rescue(r->store, &state->list, &w.wanted, &lost, err);
    object_set_finish(&w.wanted);
    return result < 0 ? -1 : check_lost(r, shared, &lost, err);
}

static int register_writer(struct registration *r, struct condemned_state *ret_state,
                           struct vm_error **err)
{
    for (int i = 0; i < CATALOGUE_TRIES; i++) {
        int done = register_once(r, ret_state, err);
        if (done)
            return done < 0 ? -1 : 0;
        int there = look_at_target(r, NULL, err);
        if (there)
            return there < 0 ? -1 : target_changed(r, err);
    }
    return error_set(err, VM_ERROR_CONFLICT, "the catalogue changes all the time; try again");
}

static struct registration *new_registration(struct store *s, const char *name,
                                             struct vm_error **err)
{
    struct registration *r = calloc(1, sizeof(*r));
    if (!r) {
        error_nomem(err);
        return NULL;
    }
    r->store = s;
    r->registered_s = (uint64_t)(clock_wall_ns() / NSEC_PER_SEC);
    strcpy(r->name, name);
    snprintf(r->what, sizeof(r->what), "image %s", name);
    shard_name_key(name, r->target);
    return r;
}

/* Takes r over: registered, with its parent pinned, or freed. */
static struct registration *begin_registration(struct registration *r, const struct image *parent,
                                               struct vm_error **err)
{
    struct condemned_state state;
    const struct object_set nothing = {{0}, {0}};
    int done = r->before.failed ? error_nomem(err)
                                : catalogue_next_number(r->store, &r->number, err);
    shard_number_key(SHARD_WRITERS, r->number, r->key);
    if (done < 0 || register_writer(r, &state, err) < 0) {
        r->ended = done < 0; /* an answer may have been lost: take back what may be there */
        catalogue_unregister(r);
        return NULL;
    }
    (void)FAULT("repo.register");
    if (parent && (pin_parent(r, parent, err) < 0 || rescue(r, &state, &nothing, err) < 0)) {
        catalogue_unregister(r);
        return NULL;
    }
    return r;
}

struct registration *catalogue_register(struct store *s, const char *name,
                                        const struct image *parent, struct vm_error **err)
{
    if (image_name_check(name, err) < 0)
        return NULL;
    struct registration *r = new_registration(s, name, err);
    return r ? begin_registration(r, parent, err) : NULL;
}

struct registration *catalogue_register_replace(struct store *s, const char *name,
                                                const struct image *before,
                                                const struct image *parent, struct vm_error **err)
{
    struct registration *r =
        image_name_check(name, err) < 0 ? NULL : new_registration(s, name, err);
    if (!r)
        return NULL;
    if (before)
        image_write(before, &r->before);
    return begin_registration(r, parent, err);
}

struct registration *catalogue_register_swap(struct store *s, const struct image *image,
                                             struct vm_error **err)
{
    struct registration *r = new_registration(s, image->name, err);
    if (!r)
        return NULL;
    image_write(image, &r->before);
    return begin_registration(r, image, err);
}

struct registration *catalogue_register_forward(struct store *s, uint64_t pack,
                                                const struct buffer *before, struct vm_error **err)
{
    struct registration *r = new_registration(s, pack_name(pack), err);
    if (!r)
        return NULL;
    snprintf(r->what, sizeof(r->what), "the forwarding of %s", r->name);
    shard_number_key(SHARD_FORWARDS, pack, r->target);
    buffer_put(&r->before, before->data, before->len);
    return begin_registration(r, NULL, err);
}

static int fenced(struct registration *r, struct vm_error **err)
{
    r->ended = true;
    unpin(r, NULL);
    return error_set(err, VM_ERROR_REFUSED,
                     "the repository's collector took this writer for dead; %s is not "
                     "committed, begin again",
                     r->what);
}

/*
 * Is the epoch the one that was acknowledged? 1: yes; 0: no; -1, also if the registration is gone.
 */
static int epoch_is_known(struct registration *r, struct vm_error **err)
{
    const char *const keys[] = {SHARD_EPOCH, r->key};
    struct buffer values[2] = {{0}, {0}};
    int result = shard_get_many(r->store, shard_of(r->name), keys, 2, values, err);
    if (!result && !values[1].len)
        result = fenced(r, err);
    else if (!result)
        result = values[0].len == r->epoch.len &&
                 !memcmp(values[0].data, r->epoch.data, r->epoch.len);
    buffer_finish(&values[0]);
    buffer_finish(&values[1]);
    return result;
}

/* An answer did not come: is this the registration by now? */
static bool has_value(struct registration *r, const struct buffer *value)
{
    cleanup_buffer struct buffer now = {0};
    return shard_get(r->store, shard_of(r->name), r->key, &now, NULL) == 0 &&
           now.len == value->len && !memcmp(now.data, value->data, now.len);
}

static int acknowledge(struct registration *r, struct vm_error **err)
{
    cleanup_buffer struct buffer value = {0};
    write_registration(r, &value);
    if (value.failed)
        return error_nomem(err);
    struct shard_change c = {
        .shard = shard_of(r->name),
        .n_compares = 2,
        .compares = {shard_pair(SHARD_EPOCH, &r->epoch), shard_pair(r->key, &r->value)},
        .set = shard_pair(r->key, &value)};
    struct vm_error *cause = NULL;
    enum store_result done = shard_apply(r->store, &c, &cause);
    if (done == STORE_MISMATCH)
        return 0;
    if (done == STORE_FAILED && !has_value(r, &value))
        return error_propagate(err, cause);
    error_free(cause);
    struct buffer old = r->value;
    r->value = value;
    value = old;
    return 1;
}

int registration_checkpoint(struct registration *r, const struct object_set *shared,
                            bool *ret_changed, struct vm_error **err)
{
    struct condemned_state state;
    *ret_changed = false;
    for (int i = 0; i < CATALOGUE_TRIES; i++) {
        int known = epoch_is_known(r, err);
        if (known)
            return known < 0 ? -1 : 0;
        *ret_changed = true;
        if (look(r, &state, err) < 0 || rescue(r, &state, shared, err) < 0)
            return -1;
        (void)FAULT("repo.rescued");
        int done = acknowledge(r, err);
        if (done)
            return done < 0 ? -1 : 0;
    }
    return error_set(err, VM_ERROR_CONFLICT, "the catalogue changes all the time; try again");
}

/*
 * The commit's answer did not come. Remove the registration, so that a commit that is still under
 * way fails, then look: whatever is there now stays.
 */
static int resolve_commit(struct registration *r, const struct buffer *value,
                          struct vm_error *cause, struct vm_error **err)
{
    struct vm_error *error = NULL;
    if (unregister(r, &error) == 0) {
        int there = look_at_target(r, value, &error);
        if (there == 1) {
            error_free(cause);
            return 0;
        }
        if (there >= 0)
            return error_propagate(err, cause);
    }
    error_free(error);
    error_propagate(err, cause);
    return error_wrap(err, "%s may or may not be committed", r->what);
}

/* Why a guard did not hold. 1: it is committed; 0: the epoch went on, try again; -1. */
static int explain_mismatch(struct registration *r, const struct buffer *value,
                            struct vm_error **err)
{
    int there = look_at_target(r, value, err);
    return there == 2 ? target_changed(r, err) : there;
}

/* One attempt. 1: committed; 0: acknowledge and try again; -1. */
static int commit_once(struct registration *r, const struct buffer *value, struct vm_error **err)
{
    struct shard_change c = {.shard = shard_of(r->name),
                             .n_compares = 3,
                             .erase = r->key,
                             .compares = {shard_pair(SHARD_EPOCH, &r->epoch),
                                          shard_pair(r->key, &r->value),
                                          shard_pair(r->target, &r->before)},
                             .set = shard_pair(r->target, value)};
    struct vm_error *cause = NULL;
    if (FAULT("repo.commit") == FAULT_ERROR)
        return error_errno(err, fault_errno(), "cannot commit %s", r->what);
    enum store_result done = shard_apply(r->store, &c, &cause);
    (void)FAULT("repo.committed");
    if (done == STORE_DONE)
        return 1;
    if (done == STORE_FAILED)
        return resolve_commit(r, value, cause, err) < 0 ? -1 : 1;
    return explain_mismatch(r, value, err);
}

int catalogue_commit_forward(struct registration *r, const struct buffer *value,
                             const struct object_set *shared, struct vm_error **err)
{
    for (int i = 0; i < CATALOGUE_TRIES; i++) {
        int done = commit_once(r, value, err);
        if (done < 0)
            return -1;
        if (done) {
            r->ended = true;
            unpin(r, NULL); /* what stays behind, a collection takes away */
            return 0;
        }
        bool changed;
        if (registration_checkpoint(r, shared, &changed, err) < 0)
            return -1;
    }
    return error_set(err, VM_ERROR_CONFLICT, "collections follow each other too fast; try again");
}

int catalogue_commit(struct registration *r, const struct image *image,
                     const struct object_set *shared, struct vm_error **err)
{
    cleanup_buffer struct buffer value = {0};
    image_write(image, &value);
    return value.failed ? error_nomem(err) : catalogue_commit_forward(r, &value, shared, err);
}

void catalogue_unregister(struct registration *r)
{
    if (!r)
        return;
    cleanup_error struct vm_error *err = NULL;
    if (!r->ended && (unregister(r, &err) < 0 || unpin(r, &err) < 0))
        log_warn("a writer's registration stays behind until it is fenced", "writer=%" PRIu64
                 " error=%s", r->number, log_q(error_message(err)));
    free_registration(r);
}

/* SPDX-License-Identifier: Apache-2.0 */
#include "repo/store_fault.h"
#include "repo/store_driver.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { MAX_ARMED = 8, MAX_POINTS = 128, POINT_MAX = 48, ALWAYS = -1 };

enum action { ERROR, UNKNOWN, TORN, LOST, FLIP, DELAY, MISSING, NO_ACTION };
static const char *const action_names[] = {"error", "unknown", "torn", "lost", "flip", "delay",
                                           "missing"};
static const char *const kind_names[] = {"create", "read", "size", "remove",
                                         "get",    "scan", "update"};

struct armed {
    char point[POINT_MAX];
    enum action action;
    int argument;
    int passage; /* counted down to 0, or ALWAYS */
};

struct count {
    char point[POINT_MAX];
    unsigned n;
};

struct store_fault {
    struct store store;
    struct store *inner;
    store_fault_hook_fn *hook;
    void *hook_arg;
    pthread_mutex_t lock; /* what follows */
    struct armed armed[MAX_ARMED];
    size_t n_armed;
    struct count counts[MAX_POINTS];
    size_t n_counts;
};

static struct store_fault *fault_of(struct store *s)
{
    return (struct store_fault *)s;
}

static void point_of(const struct store_op *op, char out[POINT_MAX])
{
    snprintf(out, POINT_MAX, "%s.%.*s", kind_names[op->kind], (int)strcspn(op->name, "."),
             op->name);
}

static bool point_matches(const char *armed, const char *point)
{
    size_t kind = strcspn(point, ".") + 1;
    return !strcmp(armed, point) || (!strncmp(armed, point, kind) && !strcmp(armed + kind, "any"));
}

static bool op_matches(const char *armed, const char *point, const struct store_op *op)
{
    size_t kind = strcspn(point, ".") + 1;
    return point_matches(armed, point) ||
           (!strncmp(armed, point, kind) && !strcmp(armed + kind, op->name));
}

/* Count the passage; the action that it meets. */
static struct armed pass(struct store_fault *f, const char *point, const struct store_op *op)
{
    SCOPE_LOCK(&f->lock);
    size_t i = 0;
    while (i < f->n_counts && strcmp(f->counts[i].point, point))
        i++;
    if (i == f->n_counts && i < MAX_POINTS)
        snprintf(f->counts[f->n_counts++].point, POINT_MAX, "%s", point);
    if (i < MAX_POINTS)
        f->counts[i].n++;
    struct armed hit = {.action = NO_ACTION};
    for (i = 0; i < f->n_armed; i++) {
        struct armed *a = &f->armed[i];
        if (!op_matches(a->point, point, op))
            continue;
        if (a->passage == ALWAYS || (a->passage > 0 && !--a->passage))
            hit = *a;
    }
    return hit;
}

static int run_torn(struct store_fault *f, struct store_op *op, struct vm_error **err)
{
    struct store_op half = *op;
    half.len /= 2;
    int rc = store_run(f->inner, &half, 1, err);
    op->result = half.result;
    return rc;
}

static int run_acting(struct store_fault *f, struct store_op *op, const struct armed *a,
                      struct vm_error **err)
{
    struct timespec delay = {a->argument / 1000, a->argument % 1000 * 1000000L};
    switch (a->action) {
    case ERROR:
        if (store_answer_unreadable(op, a->argument))
            return 0;
        return error_errno(err, a->argument, "cannot access %s", op->name);
    case LOST:
        op->result = STORE_DONE;
        return 0;
    case MISSING:
        op->result = STORE_MISSING;
        return 0;
    case TORN:
        return run_torn(f, op, err);
    case DELAY:
        nanosleep(&delay, NULL);
        break;
    default:
        break;
    }
    if (store_run(f->inner, op, 1, err) < 0)
        return -1;
    if (a->action == UNKNOWN) {
        op->result = STORE_FAILED;
        return error_errno(err, ETIMEDOUT, "no answer about %s", op->name);
    }
    if (a->action == FLIP && op->ret_len)
        ((uint8_t *)op->out)[op->ret_len / 2] ^= 4;
    return 0;
}

static void run_plain(struct store_fault *f, struct store_op *ops, size_t n,
                      struct vm_error **first)
{
    struct vm_error *one = NULL;
    if (store_run(f->inner, ops, n, &one) < 0)
        error_propagate(*first ? NULL : first, one);
}

/* Operations that nothing happens to run together, as they would without this store. */
static int fault_run(struct store *s, struct store_op *ops, size_t n, struct vm_error **err)
{
    struct store_fault *f = fault_of(s);
    struct vm_error *first = NULL;
    size_t start = 0;
    for (size_t i = 0; i < n; i++) {
        struct vm_error *one = NULL;
        char point[POINT_MAX];
        store_fault_between_fn *between = f->hook ? f->hook(&ops[i], f->hook_arg) : NULL;
        point_of(&ops[i], point);
        struct armed a = pass(f, point, &ops[i]);
        if (!between && a.action == NO_ACTION)
            continue;
        run_plain(f, ops + start, i - start, &first);
        start = i + 1;
        if (between)
            between();
        if (run_acting(f, &ops[i], &a, &one) < 0)
            error_propagate(first ? NULL : &first, one);
    }
    run_plain(f, ops + start, n - start, &first);
    return first ? error_propagate(err, first) : 0;
}

/* ---- arming ---- */

static int parse_errno(const char *name)
{
    static const struct {
        const char *name;
        int value;
    } known[] = {{"EIO", EIO}, {"ENOSPC", ENOSPC}, {"ETIMEDOUT", ETIMEDOUT}, {"EACCES", EACCES}};
    for (size_t i = 0; i < sizeof(known) / sizeof(*known); i++)
        if (!strcmp(known[i].name, name))
            return known[i].value;
    return atoi(name);
}

/* POINT=ACTION[:ARGUMENT][@N]; takes the text apart. */
static bool parse_one(char *text, struct armed *ret)
{
    *ret = (struct armed){.passage = 1, .argument = EIO};
    char *equals = strchr(text, '='), *at = strchr(text, '@');
    if (!equals || equals - text >= POINT_MAX || !strchr(text, '.'))
        return false;
    if (at) {
        *at++ = 0;
        ret->passage = !strcmp(at, "*") ? ALWAYS : atoi(at);
        if (!ret->passage)
            return false;
    }
    *equals++ = 0;
    char *colon = strchr(equals, ':');
    if (colon) {
        *colon++ = 0;
        ret->argument = parse_errno(colon);
    }
    strcpy(ret->point, text);
    for (int i = 0; i < NO_ACTION; i++) {
        if (!strcmp(action_names[i], equals)) {
            ret->action = (enum action)i;
            return ret->argument != 0;
        }
    }
    return false;
}

int store_fault_arm(struct store *s, const char *spec, struct vm_error **err)
{
    struct store_fault *f = fault_of(s);
    cleanup_free char *copy = strdup(spec);
    if (!copy)
        return error_nomem(err);
    SCOPE_LOCK(&f->lock);
    f->n_armed = 0;
    char *save = NULL;
    for (char *one = strtok_r(copy, ", ", &save); one; one = strtok_r(NULL, ", ", &save)) {
        if (f->n_armed == MAX_ARMED || !parse_one(one, &f->armed[f->n_armed]))
            return error_set(err, VM_ERROR_USAGE, "cannot arm \"%s\"", spec);
        f->n_armed++;
    }
    return 0;
}

unsigned store_fault_passages(struct store *s, const char *point)
{
    struct store_fault *f = fault_of(s);
    SCOPE_LOCK(&f->lock);
    unsigned n = 0;
    for (size_t i = 0; i < f->n_counts; i++)
        if (point_matches(point, f->counts[i].point))
            n += f->counts[i].n;
    return n;
}

void store_fault_set_hook(struct store *s, store_fault_hook_fn *hook, void *arg)
{
    fault_of(s)->hook = hook;
    fault_of(s)->hook_arg = arg;
}

/* ---- what passes through ---- */

static void fault_close(struct store *s)
{
    struct store_fault *f = fault_of(s);
    store_close(f->inner);
    pthread_mutex_destroy(&f->lock);
    free(f);
}

static int fault_set_data_pool(struct store *s, const char *pool, struct vm_error **err)
{
    return store_set_data_pool(fault_of(s)->inner, pool, err);
}

static int fault_list(struct store *s, enum store_area area, const char *prefix,
                      store_list_fn *visit, void *arg, struct vm_error **err)
{
    return store_list(fault_of(s)->inner, area, prefix, visit, arg, err);
}

static int fault_space(struct store *s, struct store_space *ret_space, struct vm_error **err)
{
    return store_space(fault_of(s)->inner, ret_space, err);
}

static int fault_ballast_take(struct store *s, struct vm_error **err)
{
    return store_ballast_take(fault_of(s)->inner, err);
}

static int fault_ballast_refill(struct store *s, struct vm_error **err)
{
    return store_ballast_refill(fault_of(s)->inner, err);
}

static const struct store_driver fault_driver = {
    .close = fault_close,
    .set_data_pool = fault_set_data_pool,
    .run = fault_run,
    .list = fault_list,
    .space = fault_space,
    .ballast_take = fault_ballast_take,
    .ballast_refill = fault_ballast_refill,
};

struct store *store_fault_create(struct store *inner, struct vm_error **err)
{
    struct store_fault *f = calloc(1, sizeof(*f));
    char *text = strdup(store_text(inner));
    if (!f || !text) {
        free(f);
        free(text);
        error_nomem(err);
        return NULL;
    }
    f->store = (struct store){&fault_driver, text};
    f->inner = inner;
    pthread_mutex_init(&f->lock, NULL);
    return &f->store;
}

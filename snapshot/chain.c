/* SPDX-License-Identifier: Apache-2.0 */
#include "snapshot/chain.h"

#include <stdlib.h>
#include <string.h>

enum { DAY_S = 86400, MONDAY = 4 /* 1970 began on a Thursday */ };

/* ---- names ---- */

int snapshot_name_check(const char *name, struct vm_error **err)
{
    if (strlen(name) <= SNAPSHOT_NAME_MAX && vm_name_is_valid(name))
        return 0;
    return error_set(err, VM_ERROR_USAGE,
                     "\"%.80s\" cannot be a snapshot's name: 1 to %d of A-Z a-z 0-9 . _ -, not "
                     "beginning with '-' or '.'",
                     name, SNAPSHOT_NAME_MAX);
}

int snapshot_image_name(const char *vm, const char *name, char out[IMAGE_NAME_MAX + 1],
                        struct vm_error **err)
{
    if (vm_name_check(vm, err) < 0 || snapshot_name_check(name, err) < 0)
        return -1;
    snprintf(out, IMAGE_NAME_MAX + 1, "%s@%s", vm, name);
    return 0;
}

int snapshot_split_name(const char *image, char ret_vm[VM_NAME_MAX + 1],
                        char ret_name[SNAPSHOT_NAME_MAX + 1], struct vm_error **err)
{
    const char *at = strchr(image, '@');
    if (!at || at == image || at - image > VM_NAME_MAX || strlen(at + 1) > SNAPSHOT_NAME_MAX)
        return error_set(err, VM_ERROR_USAGE, "\"%.160s\" is not the name of a snapshot: VM@NAME",
                         image);
    memcpy(ret_vm, image, (size_t)(at - image));
    ret_vm[at - image] = 0;
    strcpy(ret_name, at + 1);
    return vm_name_check(ret_vm, err) < 0 ? -1 : snapshot_name_check(ret_name, err);
}

/* ---- list ---- */

struct listing {
    const char *vm;
    struct snapshot_entry *list;
    size_t n, cap;
};

static int add(const struct image *image, void *arg, struct vm_error **err)
{
    struct listing *l = arg;
    struct snapshot_entry e = {.created_s = image->created_s,
                               .size = image_size(image),
                               .stored = image->bytes_added,
                               .writer = image->writer,
                               .memory = image_find_file(image, SNAPSHOT_STATE_FILE) != NULL};
    if (!image_find_file(image, SNAPSHOT_DEFINITION_FILE) ||
        snapshot_split_name(image->name, e.vm, e.name, NULL) < 0 || (l->vm && strcmp(l->vm, e.vm)))
        return 0;
    strcpy(e.parent, image->parent);
    if (l->n == l->cap) {
        size_t cap = l->cap ? 2 * l->cap : 64;
        struct snapshot_entry *more = realloc(l->list, cap * sizeof(*more));
        if (!more)
            return error_nomem(err);
        l->list = more;
        l->cap = cap;
    }
    l->list[l->n++] = e;
    return 0;
}

/*
 * By VM; then by the order in which they began, which the repository counts. Clocks do not tell it: those of two hosts
 * differ, and one may be set back.
 */
static int compare(const void *x, const void *y)
{
    const struct snapshot_entry *a = x, *b = y;
    int vm = strcmp(a->vm, b->vm);
    if (vm)
        return vm;
    return (a->writer > b->writer) - (a->writer < b->writer);
}

int snapshot_list(struct repo *r, const char *vm, struct snapshot_entry **ret_list, size_t *ret_n,
                  struct vm_error **err)
{
    struct listing l = {.vm = vm};
    if (vm && vm_name_check(vm, err) < 0)
        return -1;
    if (catalogue_list(repo_store(r), add, catalogue_skip, &l, err) < 0) {
        free(l.list);
        return -1;
    }
    if (l.n)
        qsort(l.list, l.n, sizeof(*l.list), compare);
    *ret_list = l.list;
    *ret_n = l.n;
    return 0;
}

static int by_writer(const void *a, const void *b)
{
    const uint64_t *x = a, *y = b;
    return (*x > *y) - (*x < *y);
}

int snapshot_list_limit(struct snapshot_entry *list, size_t *n, size_t most, struct vm_error **err)
{
    size_t kept = 0;
    if (*n <= most)
        return 0;
    cleanup_free uint64_t *writers = calloc(*n, sizeof(*writers));
    if (!writers)
        return error_nomem(err);
    for (size_t i = 0; i < *n; i++)
        writers[i] = list[i].writer;
    qsort(writers, *n, sizeof(*writers), by_writer);
    uint64_t oldest = writers[*n - most];
    for (size_t i = 0; i < *n; i++)
        if (list[i].writer >= oldest)
            list[kept++] = list[i];
    *n = kept;
    return 0;
}

int snapshot_newest(struct repo *r, const char *vm, struct image *ret_image, struct vm_error **err)
{
    cleanup_free struct snapshot_entry *list = NULL;
    size_t n;
    char name[IMAGE_NAME_MAX + 1];
    struct vm_error *gone = NULL;
    ret_image->name[0] = 0;
    if (snapshot_list(r, vm, &list, &n, err) < 0)
        return -1;
    if (!n)
        return 0;
    snprintf(name, sizeof(name), "%s@%s", list[n - 1].vm, list[n - 1].name);
    if (catalogue_find(repo_store(r), name, ret_image, &gone) == 0)
        return 0;
    ret_image->name[0] = 0;
    if (gone->kind != VM_ERROR_NOT_FOUND)
        return error_propagate(err, gone);
    error_free(gone); /* deleted just now: as if there were none */
    return 0;
}

int snapshot_delete(struct repo *r, const char *image, struct vm_error **err)
{
    char vm[VM_NAME_MAX + 1], name[SNAPSHOT_NAME_MAX + 1];
    return snapshot_split_name(image, vm, name, err) < 0
               ? -1
               : catalogue_delete(repo_store(r), image, err);
}

/* ---- retention ---- */

static uint64_t day_of(uint64_t seconds)
{
    return seconds / DAY_S;
}

static uint64_t week_of(uint64_t seconds)
{
    return (seconds / DAY_S + 7 - MONDAY) / 7;
}

/* Keep the newest of each of the last `count` periods that have one. */
static void keep_periods(const struct snapshot_entry *list, size_t n, unsigned count,
                         uint64_t (*period)(uint64_t), bool *drop)
{
    uint64_t last = UINT64_MAX;
    for (size_t i = n; i-- && count;) {
        uint64_t of = period(list[i].created_s);
        if (of == last)
            continue;
        last = of;
        drop[i] = false;
        count--;
    }
}

void snapshot_choose(const struct snapshot_entry *list, size_t n, const struct snapshot_rule *rule,
                     bool *drop)
{
    for (size_t i = 0; i < n; i++)
        drop[i] = n - i > rule->last;
    keep_periods(list, n, rule->daily, day_of, drop);
    keep_periods(list, n, rule->weekly, week_of, drop);
}

/* SPDX-License-Identifier: Apache-2.0 */
#include "repo/quarantine.h"
#include "repo/names.h"

#include "base/clock.h"

#include <stdlib.h>

enum { HEAD = 8, ALIGN = 8 };

void quarantine_finish(struct quarantine *q)
{
    free(q->items);
    *q = (struct quarantine){0};
}

static int add(struct quarantine *q, uint64_t pack, uint32_t offset, struct vm_error **err)
{
    if (q->n == q->cap) {
        size_t cap = 2 * q->cap + 64;
        struct quarantined *items = realloc(q->items, cap * sizeof(*items));
        if (!items)
            return error_nomem(err);
        q->items = items;
        q->cap = cap;
    }
    q->items[q->n++] = (struct quarantined){pack, offset};
    return 0;
}

static int load_pair(const struct store_pair *pair, void *arg, struct vm_error **err)
{
    uint64_t pack;
    const uint8_t *value = pair->value;
    if (!object_number(PACK_PREFIX, pair->key, &pack) || pair->len < HEAD || pair->len % 4)
        return error_set(err, VM_ERROR_CORRUPT, "\"%.40s\" is no entry of the quarantine",
                         pair->key);
    if (pair->len == HEAD)
        return add(arg, pack, QUARANTINED_PACK, err);
    for (size_t at = HEAD; at < pair->len; at += 4)
        if (add(arg, pack, get_le32(value + at) * ALIGN, err) < 0)
            return -1;
    return 0;
}

static int by_place(const void *a, const void *b)
{
    const struct quarantined *x = a, *y = b;
    if (x->pack != y->pack)
        return x->pack < y->pack ? -1 : 1;
    return x->offset < y->offset ? -1 : x->offset > y->offset;
}

int quarantine_load(struct store *s, struct quarantine *q, struct vm_error **err)
{
    q->n = 0;
    if (store_scan(s, QUARANTINE_MAP, NULL, load_pair, q, err) == STORE_FAILED)
        return -1;
    if (q->n) /* in order, whatever the store says */
        qsort(q->items, q->n, sizeof(*q->items), by_place);
    return 0;
}

/* The first item at or behind that place. */
static size_t lower_bound(const struct quarantine *q, uint64_t pack, uint32_t offset)
{
    size_t low = 0, high = q->n;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        const struct quarantined *i = &q->items[middle];
        if (i->pack < pack || (i->pack == pack && i->offset < offset))
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

bool quarantine_has_record(const struct quarantine *q, uint64_t pack, uint32_t offset)
{
    size_t i = lower_bound(q, pack, offset);
    return i < q->n && q->items[i].pack == pack && q->items[i].offset == offset;
}

bool quarantine_has(const struct quarantine *q, uint64_t pack, uint32_t offset)
{
    return quarantine_has_record(q, pack, offset) ||
           quarantine_has_record(q, pack, QUARANTINED_PACK);
}

size_t quarantine_of(const struct quarantine *q, uint64_t pack, const struct quarantined **ret)
{
    size_t i = lower_bound(q, pack, 0), n = 0;
    while (i + n < q->n && q->items[i + n].pack == pack)
        n++;
    *ret = n ? &q->items[i] : NULL;
    return n;
}

static int check_room(struct store *s, struct vm_error **err)
{
    cleanup_quarantine struct quarantine q = {0};
    size_t packs = 0;
    if (quarantine_load(s, &q, err) < 0)
        return -1;
    for (size_t i = 0; i < q.n; i++)
        packs += !i || q.items[i].pack != q.items[i - 1].pack;
    return packs < QUARANTINE_MAX
               ? 0
               : error_set(err, VM_ERROR_REFUSED, "%d packs are damaged; is this the repository's "
                                                  "whole store?", QUARANTINE_MAX);
}

int quarantine_forget(struct store *s, const uint64_t *packs, size_t n, struct vm_error **err)
{
    const char *erases[FORGET_BATCH];
    char keys[FORGET_BATCH][OBJECT_NAME_SIZE];
    for (size_t i = 0; i < n; i++)
        erases[i] = object_name(PACK_PREFIX, packs[i], keys[i]);
    struct store_op op = {.kind = STORE_UPDATE, .area = STORE_MAP, .name = QUARANTINE_MAP,
                          .erases = erases, .n_erases = n};
    return store_run(s, &op, 1, err);
}

int quarantine_set(struct store *s, uint64_t pack, const uint32_t *offsets, size_t n,
                   struct vm_error **err)
{
    cleanup_buffer struct buffer value = {0};
    bool whole = n == 1 && offsets[0] == QUARANTINED_PACK;
    if (!n)
        return quarantine_forget(s, &pack, 1, err);
    if (check_room(s, err) < 0)
        return -1;
    buffer_put_le64(&value, (uint64_t)(clock_wall_ns() / NSEC_PER_SEC));
    for (size_t i = 0; i < n && !whole; i++)
        buffer_put_le32(&value, offsets[i] / ALIGN);
    struct store_pair set = {pack_name(pack), value.data, value.len};
    struct store_op op = {.kind = STORE_UPDATE, .area = STORE_MAP, .name = QUARANTINE_MAP,
                          .presence = STORE_EITHER, .sets = &set, .n_sets = 1};
    return value.failed ? error_nomem(err) : store_run(s, &op, 1, err);
}

/* SPDX-License-Identifier: Apache-2.0 */
#include "repo/alive.h"

#include <stdlib.h>
#include <xxhash.h>

enum { FIRST_SIZE = 4096 };

void alive_finish(struct alive *a)
{
    free(a->slots);
    a->slots = NULL;
    a->n = a->size = 0;
}

bool alive_knows(const struct alive *a, uint64_t pack)
{
    if (a->only && !number_set_has(a->only, pack))
        return false;
    uint64_t hash = XXH3_64bits_withSeed(&pack, sizeof(pack), a->salt);
    return !(hash & ((1ull << a->sample_bits) - 1));
}

static struct alive_record *find(struct alive_record *slots, size_t size, uint64_t pack,
                                 uint32_t offset)
{
    uint64_t key[2] = {pack, offset};
    size_t i = XXH3_64bits(key, sizeof(key)) & (size - 1);
    while (slots[i].len && (slots[i].pack != pack || slots[i].offset != offset))
        i = (i + 1) & (size - 1);
    return &slots[i];
}

/* All that still belong here, into a table of that size. */
static int resize(struct alive *a, size_t size, struct vm_error **err)
{
    struct alive_record *slots = calloc(size, sizeof(*slots));
    if (!slots)
        return error_nomem(err);
    size_t n = 0;
    for (size_t i = 0; i < a->size; i++) {
        const struct alive_record *r = &a->slots[i];
        if (r->len && alive_knows(a, r->pack)) {
            *find(slots, size, r->pack, r->offset) = *r;
            n++;
        }
    }
    free(a->slots);
    a->slots = slots;
    a->size = size;
    a->n = n;
    return 0;
}

static int make_room(struct alive *a, struct vm_error **err)
{
    if (a->n == ALIVE_MAX) {
        a->sample_bits++;
        return resize(a, a->size, err);
    }
    if (4 * (a->n + 1) > 3 * a->size)
        return resize(a, a->size ? 2 * a->size : FIRST_SIZE, err);
    return 0;
}

int alive_add(struct alive *a, uint64_t pack, uint32_t offset, uint32_t len, struct vm_error **err)
{
    if (pack == a->last_pack && offset == a->last_offset)
        return 0;
    a->last_pack = pack;
    a->last_offset = offset;
    if (!alive_knows(a, pack))
        return 0;
    if (make_room(a, err) < 0)
        return -1;
    struct alive_record *r = find(a->slots, a->size, pack, offset);
    if (!r->len && alive_knows(a, pack)) {
        *r = (struct alive_record){pack, offset, len, a->next_order++};
        a->n++;
    }
    return 0;
}

static int compare_places(const void *a, const void *b)
{
    const struct alive_record *x = a, *y = b;
    if (x->pack != y->pack)
        return x->pack < y->pack ? -1 : 1;
    return x->offset < y->offset ? -1 : x->offset > y->offset;
}

static int compare_orders(const void *a, const void *b)
{
    const struct alive_record *x = a, *y = b;
    return x->order < y->order ? -1 : x->order > y->order;
}

int alive_by_pack(const struct alive *a, struct alive_record **ret, size_t *ret_n,
                  struct vm_error **err)
{
    struct alive_record *records = malloc((a->n + 1) * sizeof(*records));
    size_t n = 0;
    if (!records)
        return error_nomem(err);
    for (size_t i = 0; i < a->size; i++)
        if (a->slots[i].len)
            records[n++] = a->slots[i];
    qsort(records, n, sizeof(*records), compare_places);
    *ret = records;
    *ret_n = n;
    return 0;
}

void alive_sort_by_order(struct alive_record *records, size_t n)
{
    qsort(records, n, sizeof(*records), compare_orders);
}

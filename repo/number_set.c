/* SPDX-License-Identifier: Apache-2.0 */
#include "repo/number_set.h"

#include <stdlib.h>

void number_set_finish(struct number_set *s)
{
    free(s->slots);
    *s = (struct number_set){0};
}

static size_t slot_of(const struct number_set *s, uint64_t number)
{
    size_t i = (size_t)((number * 0x9e3779b97f4a7c15ULL) >> 20) & (s->size - 1);
    while (s->slots[i] && s->slots[i] != number)
        i = (i + 1) & (s->size - 1);
    return i;
}

static int grow(struct number_set *s, struct vm_error **err)
{
    struct number_set larger = {.n = s->n, .size = s->size ? 2 * s->size : 64};
    larger.slots = calloc(larger.size, sizeof(*larger.slots));
    if (!larger.slots)
        return error_nomem(err);
    for (size_t i = 0; i < s->size; i++)
        if (s->slots[i])
            larger.slots[slot_of(&larger, s->slots[i])] = s->slots[i];
    free(s->slots);
    *s = larger;
    return 0;
}

int number_set_add(struct number_set *s, uint64_t number, struct vm_error **err)
{
    if (number_set_has(s, number))
        return 0;
    if (3 * (s->n + 1) > 2 * s->size && grow(s, err) < 0)
        return -1;
    s->slots[slot_of(s, number)] = number;
    s->n++;
    return 0;
}

bool number_set_has(const struct number_set *s, uint64_t number)
{
    return s->size && s->slots[slot_of(s, number)] == number;
}

uint64_t number_set_next(const struct number_set *s, size_t *at)
{
    while (*at < s->size) {
        uint64_t number = s->slots[(*at)++];
        if (number)
            return number;
    }
    return 0;
}

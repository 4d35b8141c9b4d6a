/* SPDX-License-Identifier: Apache-2.0 */
/*
 * number_set: a set of numbers of packs or trees (never 0). Zero-initialised is empty and valid.
 * 8 bytes per slot, at most two thirds full. Threads: one at a time.
 */
#ifndef VMMIG_REPO_NUMBER_SET_H
#define VMMIG_REPO_NUMBER_SET_H

#include "base/error.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct number_set {
    uint64_t *slots;
    size_t n, size; /* size: 0 or a power of two */
};

void number_set_finish(struct number_set *s);
int number_set_add(struct number_set *s, uint64_t number, struct vm_error **err);
bool number_set_has(const struct number_set *s, uint64_t number);
/*
 * The next number at or behind slot *at (begin with 0), or 0 at the end. Nothing may be added
 * meanwhile.
 */
uint64_t number_set_next(const struct number_set *s, size_t *at);

static inline void number_set_cleanup(struct number_set *s)
{
    number_set_finish(s);
}
#define cleanup_number_set __attribute__((cleanup(number_set_cleanup)))

#endif

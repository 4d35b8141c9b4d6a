/* SPDX-License-Identifier: Apache-2.0 */
/*
 * alive: the records that recipes name, in the order in which they name them first; of all packs,
 * or of some. What tells how much of a pack is dead, and what a repacking moves, in which order.
 *
 * Memory: 24 bytes per record, at most ALIVE_MAX of them, thrice that while it grows. When more are
 * alive, only the packs of a sample are kept, half as many each time; another `salt`, another
 * sample. Threads: one.
 */
#ifndef VMMIG_REPO_ALIVE_H
#define VMMIG_REPO_ALIVE_H

#include "repo/number_set.h"

enum { ALIVE_MAX = 1 << 19 };

struct alive_record {
    uint64_t pack;
    uint32_t offset, len; /* len 0: a free slot */
    uint32_t order;
};

/* `salt` and `only` (packs of interest; NULL: all) are the caller's; all else zero at first. */
struct alive {
    uint64_t salt;
    const struct number_set *only;
    struct alive_record *slots;
    size_t n, size;
    unsigned sample_bits;
    uint32_t next_order;
    uint64_t last_pack; /* added last: recipes name the same record again and again */
    uint32_t last_offset;
};

void alive_finish(struct alive *a);
static inline void alive_cleanup(struct alive *a)
{
    alive_finish(a);
}
#define cleanup_alive __attribute__((cleanup(alive_cleanup)))

/* Is that pack in the sample, so that all its records that were added are here? */
bool alive_knows(const struct alive *a, uint64_t pack);
int alive_add(struct alive *a, uint64_t pack, uint32_t offset, uint32_t len, struct vm_error **err);
/* Copies of the records, by pack and offset, or by order; the caller frees them. */
int alive_by_pack(const struct alive *a, struct alive_record **ret, size_t *ret_n,
                  struct vm_error **err);
void alive_sort_by_order(struct alive_record *records, size_t n);

#endif

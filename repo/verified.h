/* SPDX-License-Identifier: Apache-2.0 */
/*
 * verified: when each pack was read and compared last, by any scrub.
 *
 * Maps "scrub.00" to "scrub.ff" have a key per pack, the name of the pack: u64 seconds since 1970.
 * Pack NUMBER is in map (NUMBER / 64 + NUMBER / 2^24) mod 256. No map, no key: never.
 *
 * Memory: 16 bytes per pack. Threads: one at a time; the functions that take a store: any.
 */
#ifndef VMMIG_REPO_VERIFIED_H
#define VMMIG_REPO_VERIFIED_H

#include "repo/number_set.h"
#include "repo/store.h"

enum { VERIFIED_BATCH = 64 };

struct verified_pack {
    uint64_t pack, at_s;
};

/* Zero-initialised is empty and valid; in order of pack. */
struct verified {
    struct verified_pack *items;
    size_t n, cap;
};

void verified_finish(struct verified *v);
int verified_load(struct store *s, struct verified *v, struct vm_error **err);
/* 0: never. */
uint64_t verified_at(const struct verified *v, uint64_t pack);
/* Remember n <= VERIFIED_BATCH packs as verified at that time. */
int verified_set(struct store *s, const uint64_t *packs, size_t n, uint64_t at_s,
                 struct vm_error **err);
/* Forget n <= FORGET_BATCH packs that are gone. */
int verified_forget(struct store *s, const uint64_t *packs, size_t n, struct vm_error **err);

#endif

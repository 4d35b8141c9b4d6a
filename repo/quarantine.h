/* SPDX-License-Identifier: Apache-2.0 */
/*
 * quarantine: what scrubs found to be damaged, as far as packs go. It is not shared any more, and
 * not returned as data (a reader that is at work hears of it within a minute; until then the record's
 * checksum alone tells it); a forwarding (repo/forwarding.h) says where its pages are once they were
 * stored again.
 *
 * Map "quarantine" has a key per pack, the name of the pack: u64 when it was found (seconds since
 * 1970, shown only), then u32 offset / 8 for each damaged record, ascending; none: all of the pack.
 * No map, or no key: nothing is damaged.
 *
 * Memory: 12 bytes per damaged record, of at most QUARANTINE_MAX packs. Threads: one at a time;
 * the functions that take a store: any.
 */
#ifndef VMMIG_REPO_QUARANTINE_H
#define VMMIG_REPO_QUARANTINE_H

#include "repo/store.h"

enum { QUARANTINE_MAX = 50000 };

struct quarantined {
    uint64_t pack;
    uint32_t offset; /* of the record; QUARANTINED_PACK: all of the pack */
};
#define QUARANTINED_PACK UINT32_MAX

/* Zero-initialised is empty and valid. In order of pack and offset. */
struct quarantine {
    struct quarantined *items;
    size_t n, cap;
};

void quarantine_finish(struct quarantine *q);
static inline void quarantine_cleanup(struct quarantine *q)
{
    quarantine_finish(q);
}
#define cleanup_quarantine __attribute__((cleanup(quarantine_cleanup)))

/* What is quarantined now, in place of what *q holds. */
int quarantine_load(struct store *s, struct quarantine *q, struct vm_error **err);
/* Is that record damaged? Those of a pack that is damaged as a whole may be good. */
bool quarantine_has_record(const struct quarantine *q, uint64_t pack, uint32_t offset);
/* Is that record, or all of its pack, damaged? */
bool quarantine_has(const struct quarantine *q, uint64_t pack, uint32_t offset);
/* Where the pack's items begin, and how many there are. */
size_t quarantine_of(const struct quarantine *q, uint64_t pack, const struct quarantined **ret);
/*
 * What a scrub found of a pack, in place of what was known: n damaged records, or one item of
 * QUARANTINED_PACK; n 0: all is well. REFUSED with QUARANTINE_MAX packs in it.
 */
int quarantine_set(struct store *s, uint64_t pack, const uint32_t *offsets, size_t n,
                   struct vm_error **err);
/* n <= FORGET_BATCH packs are gone. */
int quarantine_forget(struct store *s, const uint64_t *packs, size_t n, struct vm_error **err);

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * heal: pages of quarantined records that are stored elsewhere as well, found by their identities,
 * and the forwardings that lead there. A scrub does it when it is told to, and every writer after
 * its commit, as what it stored anew may be what was damaged.
 *
 * A pack whose footer is damaged, or that is gone, cannot be healed: its pages' identities are not
 * known. Memory: 64 bytes per page, of at most HEAL_PAGES_MAX at a time, and one footer.
 * Threads: any.
 */
#ifndef VMMIG_REPO_HEAL_H
#define VMMIG_REPO_HEAL_H

#include "repo/repo.h"

enum { HEAL_PAGES_MAX = 1 << 17 };

/*
 * Look in what the index names, and in the first n_own packs of that writer. *ret_records: damaged
 * records of which all pages are forwarded now, and were not before.
 */
int heal_quarantined(struct repo *r, uint64_t writer, uint64_t n_own, uint64_t *ret_records,
                     struct vm_error **err);

#endif

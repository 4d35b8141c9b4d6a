/* SPDX-License-Identifier: Apache-2.0 */
/*
 * chain: the snapshots of a repository as a list, and which of them a retention rule keeps. A snapshot needs no
 * other one: any of them can be deleted.
 *
 * Threads: any.
 */
#ifndef VMMIG_SNAPSHOT_CHAIN_H
#define VMMIG_SNAPSHOT_CHAIN_H

#include "snapshot/snapshot.h"

struct snapshot_entry {
    char vm[VM_NAME_MAX + 1], name[SNAPSHOT_NAME_MAX + 1];
    char parent[IMAGE_NAME_MAX + 1];
    uint64_t created_s, size, stored, writer;
    bool memory; /* not --disk-only */
};

/*
 * Of that VM (NULL: of all), oldest first: an allocated array (free it). Older is what began earlier in this
 * repository, whatever clocks said.
 */
int snapshot_list(struct repo *r, const char *vm, struct snapshot_entry **ret_list, size_t *ret_n,
                  struct vm_error **err);
/* Of the list, in its order, only the newest `most` stay, of whichever VM: in the first *n elements. */
int snapshot_list_limit(struct snapshot_entry *list, size_t *n, size_t most, struct vm_error **err);
/* The newest of a VM; its name is "" if there is none. */
int snapshot_newest(struct repo *r, const char *vm, struct image *ret_image,
                    struct vm_error **err);
int snapshot_delete(struct repo *r, const char *image, struct vm_error **err);

/* Keep the newest so many, and the newest of each of the last so many days and weeks that have one. */
struct snapshot_rule {
    unsigned last, daily, weekly; /* all 0: USAGE */
};
/* drop[i]: list[i] is not kept. The list is that of one VM, oldest first. Days are UTC's, weeks begin on Monday. */
void snapshot_choose(const struct snapshot_entry *list, size_t n, const struct snapshot_rule *rule,
                     bool *drop);

#endif

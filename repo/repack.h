/* SPDX-License-Identifier: Apache-2.0 */
/*
 * repack: what is alive in packs that are worth it, stored again in new ones: dense, compressed with
 * zstd, in the order in which images name it; and the forwardings that say so. A part of
 * collections (repo/collect.h), which claim and remove the old packs afterwards.
 *
 *     repack_choose(repo, &options, &alive, &exempt, &packs, &more, &err)
 *     rp = repacker_create(repo, &options, &alive, &packs, &err)
 *     while (repacker_next(rp, &batch, &err) > 0) ... for each pack of the batch that was moved ...
 *     repacker_destroy(rp)
 *
 * A record that cannot be read, or whose pages are not what the footer says, stays where it is, and
 * its pack with it.
 *
 * Memory: REPACK_BATCH footers (of at most 570 KiB, mostly 100) and as many new ones, three packs,
 * the records of REPACK_PACKS_MAX packs (repo/alive.h). Space: what is alive in a batch is stored
 * twice meanwhile. Threads: one.
 */
#ifndef VMMIG_REPO_REPACK_H
#define VMMIG_REPO_REPACK_H

#include "repo/alive.h"
#include "repo/collect.h"

enum { REPACK_BATCH = 32, REPACK_PACKS_MAX = 2048 };

/*
 * Add packs to *ret: those whose dead share, codec or damage makes them worth it, none of the
 * exempt writers', at most REPACK_PACKS_MAX. *ret_more: others are, too.
 */
int repack_choose(struct repo *r, const struct collect_options *options, const struct alive *alive,
                  const struct number_set *exempt, struct number_set *ret, bool *ret_more,
                  struct vm_error **err);

struct repacker;

struct repack_batch {
    size_t n;
    uint64_t packs[REPACK_BATCH];
    bool moved[REPACK_BATCH]; /* all of it that is alive is forwarded, durably */
};

/* The packs of *packs; all their records that are alive are in *alive. Both outlive the repacker. */
struct repacker *repacker_create(struct repo *r, const struct collect_options *options,
                                 const struct alive *alive, const struct number_set *packs,
                                 struct vm_error **err);
void repacker_destroy(struct repacker *rp);
DEFINE_CLEANUP(repacker, struct repacker *, repacker_destroy)
/* 1 with a batch, 0 at the end, -1; then nothing of that batch was moved. */
int repacker_next(struct repacker *rp, struct repack_batch *ret, struct vm_error **err);
/* Bytes of the new packs so far. */
uint64_t repacker_bytes(const struct repacker *rp);

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * collect: removes packs and trees that nothing names, and repacks what is half dead.
 * docs/repository-collection.md is the protocol: steps 1 to 10 of "a collector" are the functions of
 * collect.c.
 *
 * Any number of collections may run at once, on any hosts, beside writers and readers; they do each
 * other's work. One that dies or is cancelled leaves its list open, and the next one goes on with
 * it.
 *
 * A collection reads the recipes of all images (twice), but no data. Memory: 16 MiB per TiB of
 * distinct content, and 64 MiB for repacking. Threads: any; each call works in its own thread.
 */
#ifndef VMMIG_REPO_COLLECT_H
#define VMMIG_REPO_COLLECT_H

#include "repo/repo.h"

struct collect_options {
    /*
     * A writer that has not answered for so long is taken for dead (it then fails, and harms
     * nothing). 0: one minute.
     */
    int64_t fence_after_ns;
    /*
     * Also repack (repo/repack.h): packs of which at least dead_percent (0: 25) of the bytes are
     * dead, and those with damaged records whose other records can be saved; with `recompress` also
     * those that are still compressed with LZ4, which is what makes a repository that is written
     * once smaller. zstd_level 0: 9. At most 2048 packs at a time: while `more_to_repack` is
     * reported, another collection finds more.
     *
     *     repo_collect(r, &(struct collect_options){.repack = true, .recompress = true, ...}, ...)
     */
    bool repack, recompress;
    unsigned dead_percent;
    int zstd_level;
    struct repo_control control; /* progress: objects removed, of those condemned */
};

enum { COLLECT_DEAD_PERCENT = 25, COLLECT_ZSTD_LEVEL = 9 };

struct collect_report {
    bool adopted;            /* it went on with a list that was open */
    uint64_t condemned;      /* objects on the list when it was opened or adopted */
    uint64_t packs, trees;   /* removed */
    uint64_t bytes;          /* of those */
    uint64_t writers_fenced;
    uint64_t repacked;       /* packs that were moved into new ones; not counted in `packs` */
    uint64_t repacked_from, repacked_to; /* their bytes, and those of the new ones */
    uint64_t settled;        /* images whose recipes name the new places now */
    bool more_to_repack;
    bool repack_lacked_space; /* some packs stayed as they were */
};

/*
 * Collect once: 0 also if there was nothing to do. CORRUPT if a recipe cannot be read: what it
 * refers to is not known then, and nothing is removed; scrub names the image.
 */
int repo_collect(struct repo *r, const struct collect_options *options,
                 struct collect_report *ret_report, struct vm_error **err);

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * scrub: reads everything again, and says what is damaged and which images that touches; and the
 * index, made anew from what the packs and trees hold.
 *
 * A scrub reads packs whole and compares every record's checksum and every page's SHA-256; then it
 * walks the recipes of all images and leases and compares every page they name with the footer of its pack.
 * Images that come, and packs that go, while it runs are no damage. What it finds damaged is
 * quarantined (repo/quarantine.h) before it is told; what is whole again leaves the quarantine.
 *
 * It remembers when each pack was verified, some packs at a time: one that ends early is gone on
 * with by a scrub with older_than_s, which reads only what was not verified for so long.
 *
 * Without the right to write, and in a full repository, it finds as much and remembers nothing.
 *
 * Threads: packs are read by as many threads as there are processors. Memory: one pack per thread,
 * 32 MiB of footers, 14 MiB per TiB of distinct content.
 */
#ifndef VMMIG_REPO_SCRUB_H
#define VMMIG_REPO_SCRUB_H

#include "repo/repo.h"

enum scrub_kind {
    SCRUB_PACK,  /* something stored is damaged: `what` says what and where */
    SCRUB_IMAGE, /* an image that refers to damaged or lost data: `what` is its name; if only a lease
                  * keeps it, "NAME, as leased by HOLDER" */
    SCRUB_FORWARDING, /* a forwarding that leads to a pack that is gone: no damage by itself, since
                       * nobody follows it, and what needs it is named as touched */
};

/* Called once per finding, in one thread at a time. */
typedef void scrub_fn(enum scrub_kind kind, const char *what, void *arg);

struct scrub_report {
    uint64_t packs, bytes, records, pages; /* read and compared */
    uint64_t images, nodes;
    uint64_t damaged;        /* packs, records and nodes with findings */
    uint64_t images_touched;
    uint64_t healed;         /* damaged records whose pages are all forwarded; not in `damaged` */
    uint64_t forwardings;    /* that lead to packs that are gone; not in `damaged` */
    uint64_t packs_skipped;  /* verified recently enough */
    uint64_t oldest_s;       /* ago, of all packs that are there now */
};

struct scrub_options {
    uint64_t older_than_s; /* packs that were verified within are not read; 0: all are read */
    bool heal;             /* repo/heal.h */
    const struct repo_control *control; /* may be NULL */
};

/* 0 also if there is damage: ret_report->damaged and images_touched tell. */
int scrub_run(struct repo *r, const struct scrub_options *options, scrub_fn *found, void *arg,
              struct scrub_report *ret_report, struct vm_error **err);
/* All of it, healing nothing. */
static inline int repo_scrub(struct repo *r, const struct repo_control *control, scrub_fn *found,
                             void *arg, struct scrub_report *ret_report, struct vm_error **err)
{
    const struct scrub_options options = {.control = control};
    return scrub_run(r, &options, found, arg, ret_report, err);
}

struct rebuild_report {
    uint64_t packs, entries; /* of the index, entered */
    uint64_t unreadable;     /* packs without a good footer; scrub names them */
};
/*
 * Enter what packs and recipes hold into the index, also into shards that were lost. Writers may be
 * at work meanwhile.
 */
int repo_rebuild_index(struct repo *r, const struct repo_control *control,
                       struct rebuild_report *ret_report, struct vm_error **err);

#endif

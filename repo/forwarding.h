/* SPDX-License-Identifier: Apache-2.0 */
/*
 * forwarding: where the pages of a pack are that is gone, or that holds damaged records.
 *
 * Key f:PACK of the catalogue, in the shard of the name "pack.PACK" (little endian):
 *
 *     0  u16 1
 *     2  u16 packs, P
 *     4  u32 runs, R
 *     8      P * u64: NUMBER of a pack
 *            R runs, in order: u32 offset of the record / 8, u8 first page within it, u8 pages; then
 *            where these are: u16 which of the packs (from 0), u32 offset of the record / 8, u16
 *            length of the record / 8, rounded up, u8 first page within it, u8 zero
 *            u64 XXH3-64 of all before, seeded with PACK
 *
 * A place that a forwarding names is never forwarded again: who moves it changes the forwarding.
 *
 * Setting one is a commit as that of an image, by a registered writer: guarded by epoch,
 * registration and former value, after which collections mark what it names as long as an image
 * needs it. A forwarding can outlive its target, beside a pack that is there: who is going to rely
 * on it alone looks at pack_is_safe.
 *
 *     forwards = forwards_create(store, &err)
 *     forwards_find(forwards, &page, &found, &err)     a reader's: looks at the store
 *     forwards_scan(forwards, &err)                    a collector's: all at once, then
 *     forwards_known(forwards)                         which packs have one
 *
 * Memory: 8 bytes per pack that has one, after forwards_scan, and FORWARDS_CACHED tables of at most
 * 100 KiB. Threads: one.
 */
#ifndef VMMIG_REPO_FORWARDING_H
#define VMMIG_REPO_FORWARDING_H

#include "repo/number_set.h"
#include "repo/recipe.h"
#include "repo/store.h"

enum { FORWARD_RUNS_MAX = 3900, FORWARD_PACKS_MAX = 256, FORWARDS_CACHED = 64 };

/* n pages of the record at `offset`, from `first` on, are at `to` and behind it. */
struct forward_run {
    uint32_t offset;
    uint8_t first, n;
    struct recipe_page to; /* without the identity */
};

/* Zero-initialised but for the pack: nothing is forwarded. Runs are in order. */
struct forwarding {
    uint64_t pack;
    struct forward_run *runs;
    size_t n;
    struct buffer value; /* as it was read */
};

void forwarding_finish(struct forwarding *f);
static inline void forwarding_cleanup(struct forwarding *f)
{
    forwarding_finish(f);
}
#define cleanup_forwarding __attribute__((cleanup(forwarding_cleanup)))

/* Append the value; CORRUPT if it is none. */
int forwarding_write(const struct forwarding *f, struct buffer *out, struct vm_error **err);
int forwarding_read(uint64_t pack, const void *data, size_t len, struct forwarding *ret,
                    struct vm_error **err);
/* The pack's forwarding; with no runs if there is none. */
int forwarding_get(struct store *s, uint64_t pack, struct forwarding *ret, struct vm_error **err);
/*
 * Where a page is now, in place of what *page says. The identity stays. False, and nothing changed,
 * if it is not forwarded.
 */
bool forwarding_find(const struct forwarding *f, struct recipe_page *page);
/*
 * The runs of both, those of `more` where both have the same pages. REFUSED if it would be too
 * large for a value.
 */
int forwarding_merge(struct forwarding *f, const struct forward_run *more, size_t n,
                     struct vm_error **err);
/*
 * Which packs are there. One is asked about once, until it is forgotten: who decides what may be
 * named forgets after registering, and whenever another list is open.
 */
struct pack_presence {
    struct store *store;
    struct number_set there, gone;
};
void pack_presence_forget(struct pack_presence *p);
static inline void pack_presence_cleanup(struct pack_presence *p)
{
    pack_presence_forget(p);
}
#define cleanup_pack_presence __attribute__((cleanup(pack_presence_cleanup)))
/* Is it there, and not condemned? Only then may a registered writer rely on a forwarding to it. */
int pack_is_safe(struct pack_presence *p, const struct number_set *condemned, uint64_t pack,
                 bool *ret_safe, struct vm_error **err);
/* Drop the runs to packs that are gone: nobody can follow them, ever. */
int forwarding_drop_gone(struct forwarding *f, struct pack_presence *p, struct vm_error **err);

/*
 * Set it, if the pack's forwarding still has the value that was read. *ret_set is false, without an
 * error, if it changed, or if a pack that it names is condemned or gone.
 */
int forwarding_commit(struct store *s, const struct forwarding *f, bool *ret_set,
                      struct vm_error **err);
/* Erase those of n <= FORGET_BATCH packs; for collectors, whose mark found that nobody needs them. */
int forwarding_erase(struct store *s, const uint64_t *packs, size_t n, struct vm_error **err);

/* Call visit for every forwarding, in no order. */
typedef int forwarding_visit_fn(const struct forwarding *f, void *arg, struct vm_error **err);
int forwarding_list(struct store *s, forwarding_visit_fn *visit, void *arg, struct vm_error **err);

/* ---- many at once ---- */

struct forwards;

struct forwards *forwards_create(struct store *s, struct vm_error **err);
void forwards_destroy(struct forwards *f);
DEFINE_CLEANUP(forwards, struct forwards *, forwards_destroy)
/* Which packs have one, in place of what was known. */
int forwards_scan(struct forwards *f, struct vm_error **err);
const struct number_set *forwards_known(const struct forwards *f);
/* Forget the tables: they are read again. */
void forwards_forget(struct forwards *f);
/* As forwarding_find, with the table read if it is not here. */
int forwards_find(struct forwards *f, struct recipe_page *page, bool *ret_found,
                  struct vm_error **err);

#endif

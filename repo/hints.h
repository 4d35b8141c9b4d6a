/* SPDX-License-Identifier: Apache-2.0 */
/*
 * hints: the entries that the index has of what is stored, derived again from what is stored: to
 * enter them when the index is rebuilt, to erase them when their object goes.
 *
 *     h = hints_create(index, index_insert or index_erase, &err)
 *     for what is stored: hints_add_footer(h, ...), hints_add_node(h, ...)
 *     hints_flush(h, &err)
 *
 * Entries gather, and are applied thousands at a time; those that no flush followed are lost.
 *
 * Memory: 400 KiB. Threads: one.
 */
#ifndef VMMIG_REPO_HINTS_H
#define VMMIG_REPO_HINTS_H

#include "base/cleanup.h"
#include "repo/index.h"
#include "repo/pack.h"
#include "repo/recipe.h"

struct hints;

typedef int (*hints_apply)(struct index *x, struct index_entry *entries, size_t n,
                           struct vm_error **err);

/* `x` outlives it. */
struct hints *hints_create(struct index *x, hints_apply apply, struct vm_error **err);
void hints_destroy(struct hints *h);
DEFINE_CLEANUP(hints, struct hints *, hints_destroy)
/* A pack's: one for each extent that was stored whole, one for each page that is sampled. */
int hints_add_footer(struct hints *h, const struct footer *f, struct vm_error **err);
/* The one of a recipe's node. */
int hints_add_node(struct hints *h, const struct recipe_ref *ref, const void *node, size_t len,
                   struct vm_error **err);
int hints_flush(struct hints *h, struct vm_error **err);
/* Entries applied so far. */
uint64_t hints_applied(const struct hints *h);

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * holdings: the packs and trees that images refer to, also by way of forwardings. Nodes shared by
 * several images are read once.
 *
 * Memory: 8 MiB per TiB of distinct content, and forwardings (repo/forwarding.h). Threads: one.
 */
#ifndef VMMIG_REPO_HOLDINGS_H
#define VMMIG_REPO_HOLDINGS_H

#include "repo/alive.h"
#include "repo/condemned.h"
#include "repo/image.h"

struct holdings;

/*
 * What is found is added to *set, and records to *alive (NULL: not); both outlive the holdings. Of a
 * page that is forwarded both places count.
 */
struct holdings *holdings_create(struct store *s, struct object_set *set, struct alive *alive,
                                 struct vm_error **err);
void holdings_destroy(struct holdings *h);
DEFINE_CLEANUP(holdings, struct holdings *, holdings_destroy)
/* CORRUPT if a node of its recipes is damaged or gone: what it refers to is not known then. */
int holdings_add(struct holdings *h, const struct image *image, struct vm_error **err);

/*
 * Does all that the image refers to outlive these packs, which are going, or are gone? Each page
 * must be in another pack that is there, or its forwarding must lead to one.
 */
int holdings_outlive(struct store *s, const struct image *image, const struct number_set *going,
                     bool *ret_outlive, struct vm_error **err);

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * settle: recipes of images that lead through forwardings are written anew, with the places where
 * the pages are, and the image's roots replaced, guarded by their old value. What nothing needs any
 * more then, the next collection finds: the old leaves, the forwardings, and what they kept alive.
 *
 * Leases are left alone: their holders have read their roots. A part of collections
 * (repo/collect.h). Memory: 8 MiB per TiB of distinct content, and forwardings. Threads: one.
 */
#ifndef VMMIG_REPO_SETTLE_H
#define VMMIG_REPO_SETTLE_H

#include "repo/repo.h"

/*
 * *ret_images: how many were settled. An image that is changed meanwhile, or cannot be read, is left
 * as it is.
 */
int settle_images(struct repo *r, uint64_t *ret_images, struct vm_error **err);

#endif

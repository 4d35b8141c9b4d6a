/* SPDX-License-Identifier: Apache-2.0 */
/*
 * copy: images from one repository to another, on stores of any kind.
 *
 * What the target has is neither read nor hashed again: the identities of pages come from the
 * footers of the source's packs, and only pages that the target does not find are read. Those are
 * hashed before they are stored, so that damage of the source is CORRUPT and never copied. An image
 * keeps its name, its files, its parent's name and the time of its making.
 *
 * Each image is a commit of its own, in the order in which they were made; a copy that is repeated
 * after a failure goes on where it ended. A name that the target has with the same content is left
 * as it is; with other content it is CONFLICT, before anything is copied.
 *
 * Memory: that of an import, and 16 MiB of footers. Threads: any.
 */
#ifndef VMMIG_REPO_COPY_H
#define VMMIG_REPO_COPY_H

#include "repo/repo.h"

struct copy_report {
    uint64_t images, present;      /* copied; there already */
    uint64_t bytes;                /* size of all of them */
    uint64_t bytes_read;           /* of the source's packs, footers not counted */
    uint64_t bytes_stored;         /* added to the target */
};

/* `name`: of the one image; NULL: all. CONFLICT if both are the same repository. */
int repo_copy(struct repo *from, struct repo *to, const char *name,
              const struct repo_control *control, struct copy_report *ret_report,
              struct vm_error **err);

#endif

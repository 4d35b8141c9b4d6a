/* SPDX-License-Identifier: Apache-2.0 */
/*
 * rbd_image: RADOS block images under the names that QEMU has for them (vmm/rbd_name.h), by the
 * program `rbd`.
 *
 * An image has an id of its own, which no other of its pool ever has: so one that was made here is
 * told from another that somebody put under its name since. `limits`, which may be NULL, are those
 * of the program (snapshot/run_tool.h), which is run once or twice. Threads: any.
 */
#ifndef VMMIG_SNAPSHOT_RBD_IMAGE_H
#define VMMIG_SNAPSHOT_RBD_IMAGE_H

#include "base/error.h"
#include "snapshot/run_tool.h"
#include "vmm/rbd_name.h"

#include <stdbool.h>

#define RBD_IMAGE_ID_MAX 128
/* Whatever its id is: for a name that nobody else can have. */
#define RBD_IMAGE_ANY "-"

/* "rbd:" at its beginning. */
bool rbd_image_is(const char *name);
/* NOT_FOUND if there is none of that name. */
int rbd_image_id(const char *name, const struct run_tool_limits *limits, char ret_id[RBD_IMAGE_ID_MAX],
                 struct vm_error **err);
/*
 * A name in the same pool and namespace that nobody else has or will have: what is made under it is known to be ours
 * before it has an id.
 */
int rbd_image_draft(const char *name, char ret_draft[RBD_NAME_TEXT_MAX], struct vm_error **err);
/* The image keeps its id. Fails if there is one of the other name. */
int rbd_image_rename(const char *from, const char *to, const struct run_tool_limits *limits, struct vm_error **err);
/*
 * Remove it if its id is that one, or whatever there is of it, if RBD_IMAGE_ANY. One that is not
 * there is fine. Whoever had it open and died counts as a user for half a minute: it is tried for
 * that long, or for the seconds of `limits`.
 */
int rbd_image_remove(const char *name, const char *id, const struct run_tool_limits *limits, struct vm_error **err);

#endif

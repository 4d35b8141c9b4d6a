/* SPDX-License-Identifier: Apache-2.0 */
/*
 * store_fault: a store in front of another one that fails as a test tells it to. Only tests link
 * it.
 *
 *     struct store *s = store_fault_create(inner, &err);
 *     store_fault_arm(s, "create.pack=error:ENOSPC@3, update.cat=unknown", &err);
 *
 * A point is KIND.CLASS: the kind of the operation (create, read, size, remove, get, scan,
 * update) and the name of the object up to its first dot; CLASS `any` means every object, and the
 * whole name that one. An armed point acts at its Nth passage (`@N`, default 1, `@*` always):
 *
 *     error[:ERRNO]  the operation fails and did not happen (ERRNO by name or number; default EIO,
 *                    which read and size answer with STORE_UNREADABLE)
 *     unknown        the operation happens and fails: the caller cannot tell (ETIMEDOUT)
 *     torn           create: half of the content is stored, and success reported
 *     lost           create, update, remove: nothing happens, and success is reported
 *     flip           read: one bit of what was read is wrong
 *     delay:MS       the operation comes later
 *     missing        nothing happens, and there is no such object: as if its pool were gone
 *
 * Threads: as any store; arming and the hook are for before the threads start.
 */
#ifndef VMMIG_REPO_STORE_FAULT_H
#define VMMIG_REPO_STORE_FAULT_H

#include "repo/store.h"

/* Owns `inner` from success on. */
struct store *store_fault_create(struct store *inner, struct vm_error **err);
/* Replaces what was armed; "" disarms. USAGE for a spec outside the grammar. */
int store_fault_arm(struct store *s, const char *spec, struct vm_error **err);
/* How often a point (KIND.CLASS, KIND.any) was passed since the store was made. */
unsigned store_fault_passages(struct store *s, const char *point);

/*
 * Called for each operation, in the calling thread: where a test lets something else happen. What it
 * returns, if it is not NULL, runs before that operation, and after those before it in its batch.
 */
typedef void store_fault_between_fn(void);
typedef store_fault_between_fn *store_fault_hook_fn(const struct store_op *op, void *arg);
void store_fault_set_hook(struct store *s, store_fault_hook_fn *hook, void *arg);

#endif

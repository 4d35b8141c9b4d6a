/* SPDX-License-Identifier: Apache-2.0 */
/*
 * store_dir_env: the maps of a dir: repository, in one LMDB environment.
 *
 * LMDB forbids to open an environment twice in one process, so environments are shared: acquire
 * returns the one that is open already. Changes of one batch are one transaction, hence one fsync.
 *
 * LMDB needs pages to erase, too. So the environment's file keeps a MiB of blocks behind its end that
 * nobody else can take: on a full disk writers fail for want of packs, and names, registrations and
 * leases can still be erased.
 * Threads: any.
 */
#ifndef VMMIG_REPO_STORE_DIR_ENV_H
#define VMMIG_REPO_STORE_DIR_ENV_H

#include "repo/store.h"

struct dir_env;

/* The environment in FOLDER/maps, made if it is not there. */
struct dir_env *dir_env_acquire(const char *folder, struct vm_error **err);
void dir_env_release(struct dir_env *env);

/*
 * Run those operations that are_changes says are (UPDATE and REMOVE of maps), all durably or none.
 */
int dir_env_change(struct dir_env *env, struct store_op *ops, size_t n,
                   bool (*are_changes)(const struct store_op *op), struct vm_error **err);
/* Run the GET and SCAN operations among ops, all against the same state. */
int dir_env_look(struct dir_env *env, struct store_op *ops, size_t n, struct vm_error **err);
int dir_env_list(struct dir_env *env, const char *prefix, store_list_fn *visit, void *arg,
                 struct vm_error **err);

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * store_driver: what a driver of repo/store.h implements. Every function is required; each means
 * what the function of its name in store.h says. Arguments were checked against the limits there.
 */
#ifndef VMMIG_REPO_STORE_DRIVER_H
#define VMMIG_REPO_STORE_DRIVER_H

#include "repo/store.h"

/*
 * For drivers: READ or SIZE failed with that errno. True if that is an answer, which it then is.
 */
bool store_answer_unreadable(struct store_op *op, int errnum);

struct store_driver {
    void (*close)(struct store *s);
    int (*set_data_pool)(struct store *s, const char *pool, struct vm_error **err);
    int (*run)(struct store *s, struct store_op *ops, size_t n, struct vm_error **err);
    int (*list)(struct store *s, enum store_area area, const char *prefix, store_list_fn *visit,
                void *arg, struct vm_error **err);
    int (*space)(struct store *s, struct store_space *ret_space, struct vm_error **err);
    int (*ballast_take)(struct store *s, struct vm_error **err);
    int (*ballast_refill)(struct store *s, struct vm_error **err);
};

/* The first member of a driver's own struct. */
struct store {
    const struct store_driver *driver;
    char *text;
};

struct store *store_dir_open(const struct repo_url *url, int flags, struct vm_error **err);
struct store *store_rados_open(const struct repo_url *url, int flags, struct vm_error **err);

/*
 * Fill in op->pairs (GET) or op->ret_pairs (SCAN). The driver calls store_answer_pair for each pair
 * it found, in any order for GET, in order of keys for SCAN, then store_answer_done.
 */
int store_answer_pair(struct store_op *op, const char *key, size_t key_len, const void *value,
                      size_t len, struct vm_error **err);
int store_answer_done(struct store_op *op, struct vm_error **err);

#endif

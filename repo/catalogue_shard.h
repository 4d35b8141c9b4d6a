/* SPDX-License-Identifier: Apache-2.0 */
/*
 * catalogue_shard: keys and guarded updates of the catalogue's shards; for the catalogue's own
 * files alone. Threads: any.
 */
#ifndef VMMIG_REPO_CATALOGUE_SHARD_H
#define VMMIG_REPO_CATALOGUE_SHARD_H

#include "repo/image.h"
#include "repo/store.h"

enum {
    CATALOGUE_TRIES = 64, /* of updates whose guard did not hold */
    SHARD_NAME_SIZE = 8,
    SHARD_KEY_SIZE = IMAGE_NAME_MAX + 8,
    SHARD_GET_MAX = 4,
    REGISTRATION_MIN = 16, /* bytes of a registration before the name */
};

#define SHARD_EPOCH "epoch"
#define SHARD_NAMES "n:"
#define SHARD_LEASES "l:"
#define SHARD_WRITERS "w:"
#define SHARD_PINS "p:"
#define SHARD_FORWARDS "f:"

unsigned shard_of(const char *name);
const char *shard_name(unsigned shard, char out[SHARD_NAME_SIZE]);
/* n:NAME */
const char *shard_name_key(const char *name, char out[SHARD_KEY_SIZE]);
/* PREFIX and the number; and back, 0 if it is none. */
const char *shard_number_key(const char *prefix, uint64_t number, char out[SHARD_KEY_SIZE]);
uint64_t shard_key_number(const char *key);
/* CORRUPT: that shard is not there. */
int shard_lost(const char *shard, struct vm_error **err);

/*
 * The values of n <= SHARD_GET_MAX keys, in place of what out[i] hold; empty for a key that is not
 * there.
 */
int shard_get_many(struct store *s, unsigned shard, const char *const *keys, size_t n,
                   struct buffer *out, struct vm_error **err);
int shard_get(struct store *s, unsigned shard, const char *key, struct buffer *out,
              struct vm_error **err);

struct shard_change {
    unsigned shard;
    struct store_pair compares[4];
    size_t n_compares;
    struct store_pair set; /* key NULL: none */
    const char *erase;     /* NULL: none */
};

/* DONE, MISMATCH, or FAILED with an error. */
enum store_result shard_apply(struct store *s, const struct shard_change *c, struct vm_error **err);
/* Erase a key, if it has the guard's value (NULL: in any case). */
int shard_erase(struct store *s, unsigned shard, const char *key, const struct buffer *guard,
                bool *ret_erased, struct vm_error **err);
/* `value` NULL: compare with "not there". */
static inline struct store_pair shard_pair(const char *key, const struct buffer *value)
{
    return (struct store_pair){key, value ? value->data : NULL, value ? value->len : 0};
}

typedef int shard_pair_fn(unsigned shard, const struct store_pair *pair, void *arg,
                          struct vm_error **err);
/* Call visit for the keys of all shards with that prefix, in each shard in order. */
int shard_scan_all(struct store *s, const char *prefix, shard_pair_fn *visit, void *arg,
                   struct vm_error **err);

/* An image's name and value, one after the other, as pins and leases hold them. */
void shard_put_image(struct buffer *out, const struct image *image);
int shard_take_image(struct cursor *c, const char *key, struct image *ret_image,
                     struct vm_error **err);

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * index: from identities to the packs that may hold them. A hint and nothing more: an entry may
 * be missing or name a pack that is gone, and who uses it looks into the pack's footer. It is
 * sampled: one entry per extent that was stored whole, one page identity in sixteen (chosen by its
 * last byte), one per node of a recipe.
 *
 * Keys are text: a letter for the kind, and the first 9 bytes of a SHA-256 in base64 (URL
 * alphabet). Values are 8 bytes (a pack's number) or 24 (a recipe_ref).
 *
 * Shards are maps "index.NNNNNN". The shard of a key is taken from bytes 4..7 of its hash by linear
 * hashing: with N shards and 2^L <= N < 2^(L+1), it is h mod 2^(L+1) if that is < N, else h mod
 * 2^L. N is in key "index" of map "repository". Every shard has its level in key "!": writing
 * compares it, so that a client with an old N writes nothing to the wrong place, and reads N again.
 * A shard that nears 100,000 keys makes the next one split: copy, then raise N, then raise the
 * level of the old one, then erase there what moved. A crash in between leaves duplicates, which
 * the next split of that shard erases.
 *
 * Threads: any number may look up and insert.
 */
#ifndef VMMIG_REPO_INDEX_H
#define VMMIG_REPO_INDEX_H

#include "repo/page.h"
#include "repo/store.h"

enum {
    INDEX_KEY_TEXT = 13, /* kind and 12 letters */
    INDEX_VALUE_MAX = 24,
    INDEX_INIT_VALUE = 12,
    INDEX_SHARD_KEYS = 80000, /* a shard is split before it has more (estimated) */
    INDEX_SHARDS_FIRST = 16,
    INDEX_SHARDS_MAX = 1 << 22,
};

enum index_kind { INDEX_EXTENT = 'e', INDEX_PAGE = 'p', INDEX_NODE = 't' };

struct index_entry {
    char key[INDEX_KEY_TEXT + 1];
    uint32_t hash;
    uint8_t len; /* of the value; lookup: 0 if there is none */
    uint8_t value[INDEX_VALUE_MAX];
};

struct index;

/* Is this page's identity one of the sixteenth that has entries? */
static inline bool index_samples(const struct page_id *id)
{
    return !(id->bytes[PAGE_ID_BYTES - 1] & 15);
}

/* An entry with its key, and a value of len bytes (NULL, 0 to look one up). */
struct index_entry index_entry_make(enum index_kind kind, const struct page_id *id,
                                    const void *value, size_t len);

/*
 * Make the first shards of a new repository; those that are there stay. *ret_key and ret_value are
 * what the caller sets in map "repository" for index_open to find.
 */
int index_init(struct store *s, const char **ret_key, char ret_value[INDEX_INIT_VALUE],
               struct vm_error **err);
/* `s` is used until index_close. */
struct index *index_open(struct store *s, struct vm_error **err);
void index_close(struct index *x);
/* Split shards at that many keys instead of INDEX_SHARD_KEYS; before threads start. */
void index_limit_shards(struct index *x, uint64_t keys);
DEFINE_CLEANUP(index, struct index *, index_close)

/* Fill in value and len of n entries. */
int index_lookup(struct index *x, struct index_entry *entries, size_t n, struct vm_error **err);
/* Add or replace n entries; their order changes. Splits shards that grew. */
int index_insert(struct index *x, struct index_entry *entries, size_t n, struct vm_error **err);
/* Erase those of n entries whose value still is the given one; their order changes. */
int index_erase(struct index *x, struct index_entry *entries, size_t n, struct vm_error **err);

struct index_stat {
    uint32_t shards;
    uint64_t keys; /* estimated from one shard */
};
int index_stat(struct index *x, struct index_stat *ret_stat, struct vm_error **err);

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * names: what a repository's objects are called.
 *
 *     pack   pack.NUMBER
 *     blob   tree.NUMBER
 *     map    repository       what holds for the whole: format, UUID, counters
 *     map    cat.00 .. cat.ff the catalogue
 *     map    index.SHARD      SHARD: 6 hexadecimal digits
 *     map    condemned.XX     what a collection is about to remove (repo/condemned.h)
 *     map    scrub.XX         when packs were verified last (repo/verified.h)
 *     map    quarantine       damaged packs (repo/quarantine.h)
 *
 * NUMBER is 16 hexadecimal digits: the writer's number in the upper 40 bits, the writer's own count
 * in the lower 24, so that no name is ever used twice.
 */
#ifndef VMMIG_REPO_NAMES_H
#define VMMIG_REPO_NAMES_H

#include <inttypes.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    OBJECT_NAME_SIZE = 32,
    NUMBER_COUNT_BITS = 24,
    FORGET_BATCH = 64, /* objects of which a collection removes all traces at a time */
};

#define REPOSITORY_MAP "repository"
#define QUARANTINE_MAP "quarantine"
#define PACK_PREFIX "pack."
#define TREE_PREFIX "tree."
#define NUMBER_WRITER_MAX (((uint64_t)1 << (64 - NUMBER_COUNT_BITS)) - 1)
#define NUMBER_COUNT_MAX (((uint64_t)1 << NUMBER_COUNT_BITS) - 1)

static inline uint64_t number_writer(uint64_t number)
{
    return number >> NUMBER_COUNT_BITS;
}

static inline const char *object_name(const char *prefix, uint64_t number,
                                      char out[OBJECT_NAME_SIZE])
{
    snprintf(out, OBJECT_NAME_SIZE, "%s%016" PRIx64, prefix, number);
    return out;
}
#define pack_name(number) object_name(PACK_PREFIX, number, (char[OBJECT_NAME_SIZE]){0})
#define tree_name(number) object_name(TREE_PREFIX, number, (char[OBJECT_NAME_SIZE]){0})

/* The number in a name with that prefix; false if it is none that object_name makes. */
static inline bool object_number(const char *prefix, const char *name, uint64_t *ret_number)
{
    char again[OBJECT_NAME_SIZE];
    size_t n = strlen(prefix);
    if (strncmp(name, prefix, n))
        return false;
    *ret_number = strtoull(name + n, NULL, 16);
    return !strcmp(object_name(prefix, *ret_number, again), name);
}

#endif

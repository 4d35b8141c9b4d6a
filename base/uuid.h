/* SPDX-License-Identifier: Apache-2.0 */
/* uuid: random (version 4) identifiers of attempts, jobs and nonces. */
#ifndef VMMIG_BASE_UUID_H
#define VMMIG_BASE_UUID_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#define UUID_TEXT_SIZE 37 /* with the terminating NUL */

struct uuid {
    uint8_t bytes[16];
};

/* Fresh, from getrandom(2), which cannot fail once the system is up; aborts if the kernel lacks it. */
struct uuid uuid_new(void);
/* Lower-case canonical text in `out`; returns out. */
const char *uuid_format(const struct uuid *u, char out[UUID_TEXT_SIZE]);
#define uuid_text(u) uuid_format(u, (char[UUID_TEXT_SIZE]){0})
/* Canonical text of either case; false if it is anything else. */
bool uuid_parse(const char *text, struct uuid *ret_uuid);

static inline bool uuid_equal(const struct uuid *a, const struct uuid *b)
{
    return !memcmp(a, b, sizeof(*a));
}

static inline bool uuid_is_nil(const struct uuid *u)
{
    static const struct uuid nil;
    return uuid_equal(u, &nil);
}

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sha256_pair: SHA-256 of two pages at once, with the instructions that x86 processors have for it.
 *
 * Each of them waits for the one before it, so that one message alone leaves the processor idle
 * half of the time; the rounds of a second one go in between, and both take little longer than one.
 * OpenSSL hashes one message at a time.
 *
 * Threads: any.
 */
#ifndef VMMIG_REPO_SHA256_PAIR_H
#define VMMIG_REPO_SHA256_PAIR_H

#include "repo/page.h"

/* Has this processor what sha256_pair needs? Without it sha256_pair must not be called. */
bool sha256_pair_is_there(void);
void sha256_pair(const void *a, const void *b, struct page_id *ret_a, struct page_id *ret_b);

#endif

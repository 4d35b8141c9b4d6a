/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What every page of the bare guest's memory must hold, word by word.
 *
 * A base page is a function of its address and the seed. A worked page is a function of its
 * address, the seed, its owner and its sequence number too:
 *
 *     word 0      PAGES_MAGIC
 *     word 1      address of the page
 *     word 2      vCPU that writes it
 *     word 3      sequence number, from 1
 *     words 4-510 of the pattern, below
 *     word 511    checksum of words 0-510, so that the page can be judged from outside
 *
 * With PAGES_RANDOM words 4-510 are all new with each sequence number. With PAGES_SEQ they are as
 * in the base page, except that number n puts a new value into 4 of 252 slots, where it stays until
 * number n+63. So a page that missed one of its last 63 updates differs from the true one, even if
 * the newest update arrived.
 */
#ifndef VMMIG_BARE_PAGES_H
#define VMMIG_BARE_PAGES_H

#include <stdint.h>

#define PAGES_WORDS 512
#define PAGES_MAGIC 0x74736575676d7600ull
#define PAGES_BASE 0 /* as a sequence number: the base page */

/* PAGES_FILL_HALF: text and random, in turn every 64 KiB. */
enum pages_fill { PAGES_FILL_ZERO, PAGES_FILL_TEXT, PAGES_FILL_RANDOM, PAGES_FILL_HALF };
enum pages_pattern { PAGES_SEQ, PAGES_RANDOM };

struct pages_style {
    enum pages_fill fill;
    enum pages_pattern pattern;
    uint64_t seed;
};

/* What the page at address holds with this sequence number (or PAGES_BASE). */
void pages_render(const struct pages_style *style, uint64_t address, uint64_t vcpu,
                  uint64_t sequence, uint64_t ret_words[PAGES_WORDS]);

/* The first word in which the two differ, or PAGES_WORDS. */
unsigned pages_compare(const uint64_t *a, const uint64_t *b);

#endif

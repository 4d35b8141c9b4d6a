/* SPDX-License-Identifier: Apache-2.0 */
#include "pages.h"

enum {
    BODY_FIRST = 4,
    CHECKSUM = PAGES_WORDS - 1,
    SLOT_TURN = 63,
    SLOT_GROUPS = 4,
    SLOT_DISTANCE = 126
};

/* Sixteen common words, eight bytes each: LZ4 makes a third of a page of them. */
static const char vocabulary[16][8] = {
    "the     ", "memory  ", "of a    ", "virtual ", "machine ", "that was", " written", " before ",
    "and then", " copied ", "to the  ", "other   ", "host in ", "rounds, ", "until   ", "nothing ",
};

static uint64_t mix(uint64_t x)
{
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return x ^ x >> 31;
}

static uint64_t key_of(const struct pages_style *style, uint64_t address, uint64_t sequence)
{
    return mix(mix(style->seed ^ address) + sequence);
}

static void fill_random(uint64_t key, uint64_t *words)
{
    for (unsigned i = 0; i < PAGES_WORDS; i++)
        words[i] = mix(key += 0x9e3779b97f4a7c15ull);
}

static void fill_text(uint64_t key, uint64_t *words)
{
    const uint64_t *vocabulary_words = (const void *)vocabulary;

    for (unsigned i = 0; i < PAGES_WORDS; i += 16) {
        uint64_t choice = mix(key += 0x9e3779b97f4a7c15ull);

        for (unsigned j = 0; j < 16; j++, choice >>= 4)
            words[i + j] = vocabulary_words[choice & 15];
    }
}

static void fill_base(const struct pages_style *style, uint64_t address, uint64_t *words)
{
    switch (style->fill) {
    case PAGES_FILL_ZERO:
        for (unsigned i = 0; i < PAGES_WORDS; i++)
            words[i] = 0;
        break;
    case PAGES_FILL_TEXT:
        fill_text(key_of(style, address, PAGES_BASE), words);
        break;
    case PAGES_FILL_RANDOM:
        fill_random(key_of(style, address, PAGES_BASE), words);
        break;
    case PAGES_FILL_HALF:
        (address >> 16 & 1 ? fill_random : fill_text)(key_of(style, address, PAGES_BASE), words);
        break;
    }
}

/* Slot n % 63 of each group was last written by number n; numbers 0 and below left the base page.
 */
static void update_slots(const struct pages_style *style, uint64_t address, uint64_t sequence,
                         uint64_t *words)
{
    uint64_t first = sequence > SLOT_TURN - 1 ? sequence - (SLOT_TURN - 1) : 1;

    for (uint64_t number = first; number <= sequence; number++) {
        uint64_t value = key_of(style, address, number);

        for (unsigned group = 0; group < SLOT_GROUPS; group++)
            words[BODY_FIRST + group * SLOT_DISTANCE + number % SLOT_TURN] = value + group;
    }
}

void pages_render(const struct pages_style *style, uint64_t address, uint64_t vcpu,
                  uint64_t sequence, uint64_t ret_words[PAGES_WORDS])
{
    uint64_t sum = 0;

    if (sequence == PAGES_BASE) {
        fill_base(style, address, ret_words);
        return;
    }
    if (style->pattern == PAGES_RANDOM) {
        fill_random(key_of(style, address, sequence), ret_words);
    } else {
        fill_base(style, address, ret_words);
        update_slots(style, address, sequence, ret_words);
    }
    ret_words[0] = PAGES_MAGIC;
    ret_words[1] = address;
    ret_words[2] = vcpu;
    ret_words[3] = sequence;
    for (unsigned i = 0; i < CHECKSUM; i++)
        sum += ret_words[i] * (2 * i + 1);
    ret_words[CHECKSUM] = mix(sum);
}

unsigned pages_compare(const uint64_t *a, const uint64_t *b)
{
    unsigned i = 0;

    while (i < PAGES_WORDS && a[i] == b[i])
        i++;
    return i;
}

/* SPDX-License-Identifier: Apache-2.0 */
/* One line of console text, put together in memory. What does not fit is cut off. */
#ifndef VMMIG_BARE_TEXT_H
#define VMMIG_BARE_TEXT_H

#include <stdint.h>

struct text {
    char bytes[160];
    unsigned length;
};

static inline void text_char(struct text *text, char c)
{
    if (text->length < sizeof(text->bytes))
        text->bytes[text->length++] = c;
}

static inline void text_string(struct text *text, const char *string)
{
    while (*string)
        text_char(text, *string++);
}

static inline void text_number(struct text *text, uint64_t value, unsigned base)
{
    char digits[20];
    unsigned count = 0;

    do {
        digits[count++] = "0123456789abcdef"[value % base];
        value /= base;
    } while (value);
    while (count)
        text_char(text, digits[--count]);
}

static inline void text_decimal(struct text *text, uint64_t value)
{
    text_number(text, value, 10);
}

static inline void text_hex(struct text *text, uint64_t value)
{
    text_number(text, value, 16);
}

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * text: what people type and read: numbers with units, words that were nearly right, lines of 80
 * columns. Pure functions; any thread.
 */
#ifndef VMMIG_BASE_TEXT_H
#define VMMIG_BASE_TEXT_H

#include "base/error.h"

#include <stdint.h>
#include <stdio.h>

#define TEXT_COLUMNS 80

/* A decimal number without sign, nothing behind it. USAGE. */
int text_parse_u64(const char *text, uint64_t *ret_value, struct vm_error **err);
/*
 * Bytes a second: a number, with a fraction if need be, and K M G T (thousands), KiB MiB GiB TiB
 * (1024), or bit kbit mbit gbit (bits, thousands), in either case, "/s" behind if one likes. "MB"
 * and "Mb" are refused, since people mean different things. USAGE.
 */
int text_parse_rate(const char *text, uint64_t *ret_bytes_per_second, struct vm_error **err);
/*
 * The one of `words` (ended by NULL) that is most like `word`, if it is like it at all; else NULL.
 */
const char *text_nearest(const char *word, const char *const *words);
/*
 * Print text, wrapped to TEXT_COLUMNS, every line but the first indented by `indent` columns; the
 * first begins at column `column`. A newline in the text ends a line. Ends with a newline.
 */
void text_wrap(FILE *out, const char *text, int column, int indent);
/* "1.5 GiB" in `out`; returns out. */
#define TEXT_SIZE_MAX 16
const char *text_format_size(uint64_t bytes, char out[TEXT_SIZE_MAX]);
#define text_size(bytes) text_format_size(bytes, (char[TEXT_SIZE_MAX]){0})

#endif

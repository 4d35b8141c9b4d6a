/* SPDX-License-Identifier: Apache-2.0 */
#include "base/text.h"

#include <stdbool.h>
#include <stddef.h>
#include <string.h>
#include <strings.h>

enum { WORD_MAX = 64 };

int text_parse_u64(const char *text, uint64_t *ret_value, struct vm_error **err)
{
    uint64_t value = 0;
    const char *p = text;
    for (; *p >= '0' && *p <= '9'; p++)
        if (__builtin_mul_overflow(value, 10, &value) ||
            __builtin_add_overflow(value, (uint64_t)(*p - '0'), &value))
            return error_set(err, VM_ERROR_USAGE, "the number is too large");
    if (p == text || *p)
        return error_set(err, VM_ERROR_USAGE, "a number is expected");
    *ret_value = value;
    return 0;
}

static const struct {
    const char *suffix;
    double factor;
} rate_units[] = {
    {"", 1},           {"K", 1e3},      {"M", 1e6},      {"G", 1e9},
    {"T", 1e12},       {"KiB", 1024.0}, {"MiB", 1048576.0}, {"GiB", 1073741824.0},
    {"TiB", 1099511627776.0}, {"bit", 0.125}, {"kbit", 125.0}, {"mbit", 125e3}, {"gbit", 125e6},
};

static int bad_rate(struct vm_error **err)
{
    return error_set(err, VM_ERROR_USAGE,
                     "a rate in bytes a second is expected, as 100M, 1G, 64MiB or 1gbit");
}

/* Digits, and a fraction; returns what is behind, NULL if there is no number. */
static const char *scan_decimal(const char *text, double *ret_value)
{
    double value = 0, place = 1;
    const char *p = text;
    for (; *p >= '0' && *p <= '9'; p++)
        value = value * 10 + (*p - '0');
    if (p == text)
        return NULL;
    if (*p == '.') {
        const char *fraction = ++p;
        for (; *p >= '0' && *p <= '9'; p++)
            value += (*p - '0') * (place /= 10);
        if (p == fraction)
            return NULL;
    }
    *ret_value = value;
    return p;
}

int text_parse_rate(const char *text, uint64_t *ret_bytes_per_second, struct vm_error **err)
{
    double value;
    const char *suffix = scan_decimal(text, &value);
    if (!suffix)
        return bad_rate(err);
    size_t n = strlen(suffix);
    if (n >= 2 && !strcmp(suffix + n - 2, "/s"))
        n -= 2;
    for (size_t i = 0; i < sizeof(rate_units) / sizeof(*rate_units); i++) {
        if (strlen(rate_units[i].suffix) != n || strncasecmp(suffix, rate_units[i].suffix, n))
            continue;
        double bytes = value * rate_units[i].factor + 0.5;
        if (bytes >= 1e18)
            return error_set(err, VM_ERROR_USAGE, "the rate is too large");
        *ret_bytes_per_second = (uint64_t)bytes;
        return 0;
    }
    return bad_rate(err);
}

static unsigned min3(unsigned a, unsigned b, unsigned c)
{
    unsigned least = a < b ? a : b;
    return least < c ? least : c;
}

/* Levenshtein distance of two words of at most WORD_MAX characters. */
static unsigned distance(const char *a, const char *b)
{
    size_t n = strlen(b);
    unsigned row[WORD_MAX + 1];
    for (size_t j = 0; j <= n; j++)
        row[j] = (unsigned)j;
    for (size_t i = 1; a[i - 1]; i++) {
        unsigned diagonal = row[0];
        row[0] = (unsigned)i;
        for (size_t j = 1; j <= n; j++) {
            unsigned above = row[j];
            row[j] = min3(above + 1, row[j - 1] + 1, diagonal + (a[i - 1] != b[j - 1]));
            diagonal = above;
        }
    }
    return row[n];
}

const char *text_nearest(const char *word, const char *const *words)
{
    const char *best = NULL;
    size_t length = strlen(word);
    if (!length || length > WORD_MAX)
        return NULL;
    unsigned least = (unsigned)length / 3 + 1;
    for (; *words; words++) {
        if (strlen(*words) > WORD_MAX)
            continue;
        unsigned d = distance(word, *words);
        if (length >= 3 && !strncmp(*words, word, length))
            d = 1;
        if (d < least || (d == least && !best)) {
            least = d;
            best = *words;
        }
    }
    return best;
}

void text_wrap(FILE *out, const char *text, int column, int indent)
{
    bool first_word = true;
    while (*text) {
        size_t n = strcspn(text, " \n");
        if (!first_word && column + 1 + (int)n > TEXT_COLUMNS) {
            fprintf(out, "\n%*s", indent, "");
            column = indent;
            first_word = true;
        }
        column += fprintf(out, first_word ? "%.*s" : " %.*s", (int)n, text);
        first_word = false;
        text += n;
        if (*text == '\n') {
            fputc('\n', out);
            if (text[1] && text[1] != '\n')
                fprintf(out, "%*s", indent, "");
            column = indent;
            first_word = true;
        }
        text += *text != 0;
    }
    fputc('\n', out);
}

const char *text_format_size(uint64_t bytes, char out[TEXT_SIZE_MAX])
{
    static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
    double value = (double)bytes;
    unsigned unit = 0;
    while (value >= 1000 && unit < 6) {
        value /= 1024;
        unit++;
    }
    snprintf(out, TEXT_SIZE_MAX, unit && value < 99.95 ? "%.1f %s" : "%.0f %s", value, units[unit]);
    return out;
}

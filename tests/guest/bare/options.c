/* SPDX-License-Identifier: Apache-2.0 */
#include "options.h"

#include <stddef.h>

const char *options_number(const char *text, uint64_t *ret_value)
{
    unsigned base = 10;
    const char *first;
    uint64_t value = 0;

    if (text[0] == '0' && text[1] == 'x') {
        base = 16;
        text += 2;
    }
    for (first = text;; text++) {
        unsigned digit = (unsigned)(*text - '0');

        if (digit > 9)
            digit = (unsigned)(*text - 'a') + 10;
        if (digit >= base)
            break;
        value = value * base + digit;
    }
    *ret_value = value;
    return text > first ? text : NULL;
}

static bool ends(const char *text)
{
    return *text == '\0' || *text == ' ';
}

/* What follows `name=` if the text starts with it. */
static const char *after_name(const char *text, const char *name)
{
    while (*name && *text == *name) {
        text++;
        name++;
    }
    return *name == '\0' && *text == '=' ? text + 1 : NULL;
}

static unsigned parse_choice(const char *text, const char *const *choices)
{
    for (unsigned i = 0; choices[i]; i++) {
        size_t at = 0;

        while (choices[i][at] && text[at] == choices[i][at])
            at++;
        if (choices[i][at] == '\0' && ends(text + at))
            return i;
    }
    platform_panic("option value", (uint8_t)*text);
}

static void parse_extra(const char *text, struct options *options)
{
    struct platform_range range;
    const char *next = options_number(text, &range.start);

    if (next && *next == '+')
        next = options_number(next + 1, &range.end);
    if (!next || !ends(next) || options->extra_count == PLATFORM_MAX_RANGES)
        platform_panic("option extra", options->extra_count);
    range.end += range.start;
    if (range.start % 4096 || range.end % 4096 || range.end > PLATFORM_MAPPED_END)
        platform_panic("option extra", range.end);
    options->extra[options->extra_count++] = range;
}

static void parse_option(const char *text, struct options *options)
{
    static const char *const fills[] = {"zero", "text", "random", "half", NULL};
    static const char *const patterns[] = {"seq", "random", NULL};
    static const char *const idles[] = {"sleep", "spin", NULL};
    const struct {
        const char *name;
        uint64_t *value;
    } numbers[] = {
        {"vcpus", &options->vcpus},     {"dirty", &options->dirty_mib},
        {"rate", &options->rate_mbps},  {"scan", &options->scan_mbps},
        {"hb", &options->heartbeat_ms}, {"tsc_khz", &options->tsc_khz},
        {"seed", &options->style.seed},     {"writer", &options->writer_pages},
    };
    const char *value;

    for (unsigned i = 0; i < sizeof(numbers) / sizeof(numbers[0]); i++) {
        value = after_name(text, numbers[i].name);
        if (!value)
            continue;
        value = options_number(value, numbers[i].value);
        if (!value || !ends(value))
            platform_panic("option number", i);
    }
    if ((value = after_name(text, "fill")))
        options->style.fill = (enum pages_fill)parse_choice(value, fills);
    if ((value = after_name(text, "pattern")))
        options->style.pattern = (enum pages_pattern)parse_choice(value, patterns);
    if ((value = after_name(text, "idle")))
        options->spin = parse_choice(value, idles) == 1;
    if ((value = after_name(text, "extra")))
        parse_extra(value, options);
}

void options_parse(const char *command_line, uint64_t tsc_khz, struct options *ret_options)
{
    *ret_options = (struct options){
        .vcpus = 1,
        .dirty_mib = 64,
        .rate_mbps = 20,
        .scan_mbps = 200,
        .heartbeat_ms = 20,
        .tsc_khz = tsc_khz,
        .style = {.fill = PAGES_FILL_TEXT, .pattern = PAGES_SEQ, .seed = 1},
    };
    for (const char *at = command_line; *at;) {
        while (*at == ' ')
            at++;
        parse_option(at, ret_options);
        while (!ends(at))
            at++;
    }
    if (ret_options->vcpus == 0 || ret_options->vcpus > PLATFORM_MAX_VCPUS)
        platform_panic("option vcpus", ret_options->vcpus);
    if (ret_options->heartbeat_ms == 0 || ret_options->tsc_khz == 0)
        platform_panic("option hb or tsc_khz", 0);
}

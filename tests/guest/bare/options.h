/* SPDX-License-Identifier: Apache-2.0 */
/* The bare guest's command line (worker.h lists the options). */
#ifndef VMMIG_BARE_OPTIONS_H
#define VMMIG_BARE_OPTIONS_H

#include <stdbool.h>
#include <stdint.h>

#include "pages.h"
#include "platform.h"

struct options {
    uint64_t vcpus;
    uint64_t dirty_mib;
    uint64_t rate_mbps;
    uint64_t scan_mbps;
    uint64_t heartbeat_ms;
    uint64_t tsc_khz;
    uint64_t writer_pages;
    struct pages_style style;
    struct platform_range extra[PLATFORM_MAX_RANGES];
    unsigned extra_count;
    bool spin;
};

/* Reads the command line over the defaults. A value that is none panics. */
void options_parse(const char *command_line, uint64_t tsc_khz, struct options *ret_options);

/* A decimal or 0x number. Returns what follows it, or NULL. */
const char *options_number(const char *text, uint64_t *ret_value);

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * run_tool: a program that does one thing and ends: qemu-img, rbd.
 *
 *     char *out = run_tool(argv, "make the image /x", NULL, &err)
 *
 * Returns what it said on standard output (free it), up to RUN_TOOL_OUTPUT_MAX bytes. When it fails
 * the last line of its standard error is the reason: NOT_FOUND for exit status 2 (which is rbd's
 * for an image that is not there), NO_SPACE if it says so, else FAILED. One that takes longer than
 * its limits allow is killed: TIMEOUT, or CANCELLED. It ends with the agent: what it makes is not
 * made after the next agent has taken back what was made. Threads: any.
 */
#ifndef VMMIG_SNAPSHOT_RUN_TOOL_H
#define VMMIG_SNAPSHOT_RUN_TOOL_H

#include "base/error.h"

enum { RUN_TOOL_SECONDS = 60, RUN_TOOL_OUTPUT_MAX = 64 << 10 };

struct run_tool_limits {
    int seconds;   /* 0: RUN_TOOL_SECONDS */
    int cancel_fd; /* a latch (base/io.h), or -1 */
};

/* limits: NULL for RUN_TOOL_SECONDS, and nobody cancels it. */
char *run_tool(const char *const *argv, const char *what, const struct run_tool_limits *limits,
               struct vm_error **err);

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/* peak: the most memory of this process that was resident at once. */
#ifndef VMMIG_TESTS_PEAK_H
#define VMMIG_TESTS_PEAK_H

#include "base/cleanup.h"
#include "base/io.h"

#include <stdlib.h>
#include <string.h>

/* KiB, or -1; getrusage would count what the parent had before exec. */
static inline long peak_kib(void)
{
    cleanup_free char *status = NULL;
    size_t len;
    if (io_read_file("/proc/self/status", 1 << 16, &status, &len, NULL) < 0)
        return -1;
    const char *line = strstr(status, "VmHWM:");
    return line ? atol(line + 6) : -1;
}

#endif

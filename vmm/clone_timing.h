/* SPDX-License-Identifier: Apache-2.0 */
/* clone_timing: when a clone's VMM was started, and when its guest ran. */
#ifndef VMMIG_VMM_CLONE_TIMING_H
#define VMMIG_VMM_CLONE_TIMING_H

#include <stdint.h>

struct clone_timing {
    int64_t spawned_ns, running_ns; /* monotonic: before fork; when the VMM said that it runs */
};

#endif

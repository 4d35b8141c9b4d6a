/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/attach_steering.h"

#include "base/clock.h"
#include "proto/attach.h"

#include <stdbool.h>

enum { STRIKES = 2, FIRST_PERCENT = 20, STEP_PERCENT = 10, LIMIT_SHARE = 4 };

static int64_t long_ns(const struct attach_steering *s)
{
    int64_t limit = s->limit_ns ? s->limit_ns : ATTACH_STEERING_LIMIT_MS * NSEC_PER_MSEC;
    int64_t share = limit / LIMIT_SHARE, least = ATTACH_ROUND_MIN_MS * NSEC_PER_MSEC * 3 / 2;
    return share > least ? share : least;
}

unsigned attach_steer(struct attach_steering *s, const struct attach_round *round)
{
    bool losing = round->number >= 2 && round->left * 2 > round->carried &&
                  round->took_ns - 2 * round->rtt_ns >= long_ns(s);
    s->strikes = losing ? s->strikes + 1 : 0;
    if (s->strikes < STRIKES)
        return s->percent;
    s->strikes = 0;
    unsigned next = s->percent ? s->percent + STEP_PERCENT : FIRST_PERCENT;
    return s->percent = next < ATTACH_THROTTLE_MAX ? next : ATTACH_THROTTLE_MAX;
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * converge: when to pause the guest. A pure judge of one pre-copy migration: the engine tells it what
 * it measures, it answers whether to pause now, and says what pause it predicts.
 *
 *     struct converge c;
 *     converge_init(&c, limit_ns, cheap_rounds, now);
 *     at each new round, and every few milliseconds between:
 *         switch (converge_judge(&c, &input)) { ...
 *
 * The predicted pause is everything that happens while the guest stands: what is dirty, at the rate
 * at which this migration really moves memory; what is in flight; device state, loading and the
 * hand-over's own synced writes.
 *
 * Judgement is given at the start of a round, when the dirty log was just read and `remaining` is
 * exact. Three ways lead to a pause:
 *   - the prediction is within the limit. While another round promises to shorten it markedly and
 *     all such rounds together cost less than a share of the migration's time, the judge still waits:
 *     a short pause is worth more than a slightly shorter migration. The share is a tenth, and no round is begun for
 *     the last 5 ms; of a VMM whose rounds cost little beyond their pages it is a fifth, down to 1 ms.
 *   - the guest is throttled as far as the VMM goes, or many rounds brought nothing: then at the best
 *     local minimum, rather than never. Which rounds count as that is ever less strict: one that was
 *     lucky may never come again. The result says that the limit was not met.
 *   - the engine is told by the user to pause now (not decided here).
 *
 * Times in nanoseconds, memory in bytes, rates in bytes a second. One thread.
 */
#ifndef VMMIG_MIGRATE_CONVERGE_H
#define VMMIG_MIGRATE_CONVERGE_H

#include <stdbool.h>
#include <stdint.h>

enum converge_verdict {
    CONVERGE_CONTINUE,
    CONVERGE_PAUSE,      /* within the limit */
    CONVERGE_PAUSE_OVER, /* the limit cannot be met; this is the best there is */
};

struct converge_input {
    int64_t now_ns;
    unsigned round;            /* 1: the first pass, in which the dirty set is not known */
    uint64_t remaining;        /* guest memory known to be dirty and not yet given out */
    uint64_t drain_rate;       /* guest memory that leaves for good a second; 0: unknown */
    int64_t in_flight_ns;      /* time to empty what is buffered on the way */
    int64_t fixed_ns;          /* device state, loading, hand-over */
    unsigned throttle_percent; /* 0..99 */
};

struct converge {
    int64_t limit_ns, started_ns;
    bool cheap_rounds;
    unsigned judged_round;     /* the last round judged */
    int64_t round_started_ns;
    int64_t last_predicted_ns; /* at the former round */
    int64_t best_predicted_ns;
    int64_t refined_ns;        /* time spent on rounds after the limit was already met */
    bool refining;
    unsigned rounds_without_gain;
    int64_t predicted_ns;      /* the newest prediction; INT64_MAX while unknown */
};

/* cheap_rounds: a round costs little beyond its pages, and is worth it sooner. */
void converge_init(struct converge *c, int64_t limit_ns, bool cheap_rounds, int64_t now_ns);
/* Judge; c->predicted_ns is renewed. */
enum converge_verdict converge_judge(struct converge *c, const struct converge_input *in);

#endif

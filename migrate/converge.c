/* SPDX-License-Identifier: Apache-2.0 */
#include "migrate/converge.h"

#include "base/clock.h"

/* Beyond that a VMM cannot throttle: QEMU's max-cpu-throttle. */
enum { FULL_THROTTLE_PERCENT = 99 };
/* Rounds without a better prediction after which waiting is over, unthrottled and fully throttled. */
enum { PATIENCE_ROUNDS = 40, PATIENCE_ROUNDS_THROTTLED = 4 };
/* A round "helps" when it shortens the prediction to less than this share. */
static const double MARKED_GAIN = 0.75;
/* Refinement, where rounds are dear and where they are cheap. */
static const struct refinement {
    double share;            /* of the elapsed time that it may cost */
    int64_t short_enough_ns; /* what is left may take so long to leave, and is worth no other round */
} refinements[] = {{0.10, 5 * NSEC_PER_MSEC}, {0.20, NSEC_PER_MSEC}};

void converge_init(struct converge *c, int64_t limit_ns, bool cheap_rounds, int64_t now_ns)
{
    *c = (struct converge){
        .limit_ns = limit_ns,
        .cheap_rounds = cheap_rounds,
        .started_ns = now_ns,
        .round_started_ns = now_ns,
        .judged_round = 1,
        .last_predicted_ns = INT64_MAX,
        .best_predicted_ns = INT64_MAX,
        .predicted_ns = INT64_MAX,
    };
}

static int64_t drain_ns(const struct converge_input *in)
{
    if (!in->remaining)
        return 0;
    if (!in->drain_rate)
        return INT64_MAX / 4;
    double ns = (double)in->remaining / (double)in->drain_rate * (double)NSEC_PER_SEC;
    return ns > (double)(INT64_MAX / 4) ? INT64_MAX / 4 : (int64_t)ns;
}

/* The limit is met: is one more round worth its time? It lasts as long as the pause would now. */
static bool refine(struct converge *c, const struct converge_input *in)
{
    const struct refinement *r = &refinements[c->cheap_rounds];
    int64_t round_ns = drain_ns(in) + in->in_flight_ns;
    double budget = r->share * (double)(in->now_ns - c->started_ns);
    bool helped = !c->refining || (double)c->predicted_ns < MARKED_GAIN * (double)c->last_predicted_ns;
    if (!helped || round_ns <= r->short_enough_ns || (double)(c->refined_ns + round_ns) > budget)
        return false;
    c->refining = true;
    c->refined_ns += round_ns;
    return true;
}

/*
 * Is this about as good as it was at best? How much worse it may be doubles each time that patience is over: a round that
 * was lucky once may never come again.
 */
static bool patience_is_over(const struct converge *c, const struct converge_input *in)
{
    unsigned patience = in->throttle_percent >= FULL_THROTTLE_PERCENT ? PATIENCE_ROUNDS_THROTTLED
                                                                      : PATIENCE_ROUNDS;
    unsigned times = c->rounds_without_gain / patience;
    unsigned doublings = times < 20 ? times : 20; /* that far no two predictions are from each other */
    return times && (double)c->predicted_ns <= (double)c->best_predicted_ns * (1 + 0.025 * (double)(1u << doublings));
}

static enum converge_verdict judge_round(struct converge *c, const struct converge_input *in)
{
    if (c->predicted_ns <= c->limit_ns)
        return refine(c, in) ? CONVERGE_CONTINUE : CONVERGE_PAUSE;
    c->refining = false;
    if ((double)c->predicted_ns < 0.95 * (double)c->best_predicted_ns)
        c->rounds_without_gain = 0;
    else
        c->rounds_without_gain++;
    if (c->predicted_ns < c->best_predicted_ns)
        c->best_predicted_ns = c->predicted_ns;
    return patience_is_over(c, in) ? CONVERGE_PAUSE_OVER : CONVERGE_CONTINUE;
}

enum converge_verdict converge_judge(struct converge *c, const struct converge_input *in)
{
    if (in->round < 2)
        return CONVERGE_CONTINUE;
    if (in->round == c->judged_round)
        return CONVERGE_CONTINUE;
    c->predicted_ns = drain_ns(in) + in->in_flight_ns + in->fixed_ns;
    enum converge_verdict verdict = judge_round(c, in);
    c->judged_round = in->round;
    c->round_started_ns = in->now_ns;
    c->last_predicted_ns = c->predicted_ns;
    return verdict;
}

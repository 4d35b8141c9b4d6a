/* SPDX-License-Identifier: Apache-2.0 */
#include "migrate/policy.h"

#include "base/clock.h"

#include <string.h>

/* Judging an interval: share of the workers' time that waiting, or encoding, must have taken. */
#define BLOCKED_SHARE 0.3
#define UNBLOCKED_SHARE 0.1
#define BUSY_SHARE 0.5
#define LINK_GROWTH 1.5
#define LINK_WEIGHT 0.5
/* What was believed before was a guess. */
#define FIRST_LINK_WEIGHT 0.8
#define SEEN_WEIGHT 0.3
/* A change of mode is taken back below this share of the former page rate. */
#define TRIAL_SHARE 0.92
/* A cheaper mode is as good as the one in use from this share of its page rate on. */
#define CHEAPER_SHARE 0.985
/* Bytes per page that differ by less are the same. */
#define SAME_BYTES 1.02
/* A mode has far fewer bytes than another below this share. */
#define FEWER_BYTES 0.85
#define THIRD_OF_BYTES 0.33
/* The link is full from this share of its rate on. */
#define FULL_SHARE 0.9
/* Weight of a full batch in the averages; batches below the minimum say too little. */
#define BATCH_WEIGHT 0.25
#define PROBE_WEIGHT 0.4
#define BATCH_PAGES_MIN 8
/* What remains of the sums of times with every batch. */
#define TIME_FADE 0.95
/* And what they begin with: one batch whose thread had to wait is no busy machine. */
#define TIME_PRIOR_NS 1e7
#define CREDIT_MAX_NS 1e9
/* Sums of what the link carried: what remains with every interval; they say something after so many. */
#define CARRIED_FADE 0.75
#define CARRIED_INTERVALS 2
#define CARRYING_LEAST_NS 1e6 /* the kernel counts in ticks, and may have seen none */

/* Until they are measured: pages of a Linux guest. */
static const struct policy_mode mode_defaults[PAGE_MODE_COUNT] = {
    [PAGE_MODE_RAW] = {.bytes_per_page = GUEST_PAGE_SIZE, .ns_per_page = 100},
    [PAGE_MODE_LZ4] = {.bytes_per_page = 1500, .ns_per_page = 4000},
    [PAGE_MODE_ZSTD_1] = {.bytes_per_page = 1060, .ns_per_page = 5000},
    [PAGE_MODE_ZSTD_2] = {.bytes_per_page = 1010, .ns_per_page = 6000},
    [PAGE_MODE_ZSTD_3] = {.bytes_per_page = 970, .ns_per_page = 8500},
};
#define SCAN_NS_DEFAULT 300

static bool is_allowed(const struct policy *p, enum page_mode mode)
{
    switch (p->config.compress) {
    case POLICY_NONE:
        return mode == PAGE_MODE_RAW;
    case POLICY_LZ4:
        return mode == PAGE_MODE_LZ4;
    case POLICY_ZSTD:
        return mode >= PAGE_MODE_ZSTD_1;
    case POLICY_AUTO:
        break;
    }
    return true;
}

static double min_double(double a, double b)
{
    return a < b ? a : b;
}

double policy_predict(const struct policy *p, enum page_mode mode)
{
    const struct policy_mode *m = &p->modes[mode];
    double ns = p->scan_ns_per_page + m->ns_per_page + m->bytes_per_page * p->send_ns_per_byte;
    double stretch = p->cpu_ns > 0 && p->wall_ns > p->cpu_ns ? p->wall_ns / p->cpu_ns : 1;
    double cores = min_double(p->config.cores, p->config.workers / stretch);
    return min_double(p->link_rate / m->bytes_per_page, cores * NSEC_PER_SEC / ns);
}

static bool is_eligible(const struct policy *p, enum page_mode mode)
{
    return is_allowed(p, mode) && p->modes[mode].barred_until_ns <= p->now_ns;
}

/* How many of the pages a second of `mode` are enough of one that puts fewer bytes on the wire. */
static double share_for_bytes(const struct policy *p, enum page_mode mode, enum page_mode fewer)
{
    bool cheap = mode == PAGE_MODE_RAW &&
                 p->modes[fewer].bytes_per_page > p->modes[mode].bytes_per_page * THIRD_OF_BYTES;
    return cheap ? POLICY_TIE : POLICY_BYTES_SHARE;
}

/* It would fill the link, and one that puts far fewer bytes there promises enough. */
static bool wastes_link(const struct policy *p, enum page_mode mode, double best_rate)
{
    if (policy_predict(p, mode) < p->link_rate / p->modes[mode].bytes_per_page)
        return false;
    for (unsigned i = mode + 1; i < PAGE_MODE_COUNT; i++) {
        double enough = best_rate * share_for_bytes(p, mode, (enum page_mode)i);
        if (is_eligible(p, (enum page_mode)i) && policy_predict(p, (enum page_mode)i) >= enough &&
            p->modes[i].bytes_per_page < p->modes[mode].bytes_per_page * FEWER_BYTES)
            return true;
    }
    return false;
}

/* All that are good enough waste the link: the best of the others. */
static enum page_mode frugal_mode(const struct policy *p, double best_rate)
{
    enum page_mode best = p->mode;
    double rate = 0;
    for (unsigned i = 0; i < PAGE_MODE_COUNT; i++) {
        double promised = policy_predict(p, (enum page_mode)i);
        if (is_eligible(p, (enum page_mode)i) && promised > rate &&
            !wastes_link(p, (enum page_mode)i, best_rate)) {
            best = (enum page_mode)i;
            rate = promised;
        }
    }
    return best;
}

/* The cheapest of those that promise about as much as the best. */
static enum page_mode best_mode(const struct policy *p)
{
    double best_rate = 0;
    for (unsigned i = 0; i < PAGE_MODE_COUNT; i++) {
        double rate = policy_predict(p, (enum page_mode)i);
        if (is_eligible(p, (enum page_mode)i) && rate > best_rate)
            best_rate = rate;
    }
    for (unsigned i = 0; i < PAGE_MODE_COUNT; i++) {
        if (is_eligible(p, (enum page_mode)i) &&
            policy_predict(p, (enum page_mode)i) >= best_rate * POLICY_TIE &&
            !wastes_link(p, (enum page_mode)i, best_rate))
            return (enum page_mode)i;
    }
    return frugal_mode(p, best_rate);
}

void policy_init(struct policy *p, const struct policy_config *config)
{
    *p = (struct policy){
        .config = *config,
        .scan_ns_per_page = SCAN_NS_DEFAULT,
        .link_rate = config->link_rate > 0 ? config->link_rate : POLICY_LINK_INITIAL,
        .probe_credit = POLICY_PROBE_CREDIT,
        .wall_ns = TIME_PRIOR_NS,
        .cpu_ns = TIME_PRIOR_NS,
    };
    memcpy(p->modes, mode_defaults, sizeof(p->modes));
    for (unsigned i = 0; i < PAGE_MODE_COUNT; i++)
        p->modes[i].bar_ns = POLICY_BAR;
    p->doubtful = PAGE_MODE_COUNT;
    p->mode = best_mode(p);
}

static void bar_mode(struct policy *p, enum page_mode mode)
{
    struct policy_mode *m = &p->modes[mode];
    if (m->barred_until_ns > p->now_ns)
        return;
    m->barred_until_ns = p->now_ns + m->bar_ns;
    m->bar_ns = m->bar_ns < POLICY_BAR_MAX ? 2 * m->bar_ns : POLICY_BAR_MAX;
}

/*
 * `failed` was slower than `than`: then whatever costs more than that is not trusted either. Or it put more bytes on
 * the wire and was no faster: nor is a mode that puts still more there.
 */
static void bar_failed(struct policy *p, enum page_mode failed, enum page_mode than)
{
    bar_mode(p, failed);
    for (unsigned i = than + 1; failed > than && i < PAGE_MODE_COUNT; i++)
        bar_mode(p, (enum page_mode)i);
    for (unsigned i = 0; i < failed && failed < than; i++)
        bar_mode(p, (enum page_mode)i);
}

static bool has_more_bytes(const struct policy *p, enum page_mode mode, enum page_mode than)
{
    return p->modes[mode].bytes_per_page > p->modes[than].bytes_per_page * SAME_BYTES;
}

/* A change during a trial goes on with what the trial began with. */
static void change_mode(struct policy *p, enum page_mode mode)
{
    /* The link seemed fast enough for a cheaper mode, and was not: not every few intervals. */
    bool back = p->trial.active && (mode == p->trial.from || mode == p->trial.left);
    if (back && p->mode < mode)
        bar_mode(p, p->mode);
    if (!p->trial.active) {
        p->trial.active = p->page_rate > 0;
        p->trial.from = p->mode;
        p->trial.rate_before = p->page_rate;
    } else if (mode == p->trial.from) {
        p->trial.active = false;
    }
    p->trial.left = p->mode;
    p->trial.forced = false;
    p->trial.intervals = 0;
    p->trial.rate_sum = 0;
    p->page_rate = 0;
    p->carried.intervals = 0;
    p->mode = mode;
}

/* Raw pages are alike: what is known of them stays true. */
static bool is_fresh(const struct policy *p, enum page_mode mode)
{
    const struct policy_mode *m = &p->modes[mode];
    return mode == PAGE_MODE_RAW ||
           (m->measured_batch && p->batches - m->measured_batch <= POLICY_FRESH);
}

static void reconsider(struct policy *p)
{
    enum page_mode best = best_mode(p);
    double now = policy_predict(p, p->mode), share = best < p->mode ? CHEAPER_SHARE : POLICY_GAIN;
    p->doubtful = PAGE_MODE_COUNT;
    if (best == p->mode || (p->trial.active && p->trial.forced))
        return;
    /* The link limits, so the cores do not: a lighter mode would only fill it sooner. */
    if (p->link_known && has_more_bytes(p, best, p->mode))
        return;
    if (best > p->mode && wastes_link(p, p->mode, now))
        share = share_for_bytes(p, p->mode, best);
    if (policy_predict(p, best) < now * share)
        return;
    if (is_fresh(p, best))
        change_mode(p, best);
    else
        p->doubtful = best;
}

/* The mode that a change waits for; else that whose figures are oldest, if its turn has come. */
bool policy_wants_probe(struct policy *p, enum page_mode *ret_mode)
{
    int oldest = p->doubtful < PAGE_MODE_COUNT ? (int)p->doubtful : -1;
    if (p->probe_credit <= 0 || (oldest < 0 && p->batches < p->next_probe))
        return false;
    for (int i = PAGE_MODE_RAW + 1; p->doubtful == PAGE_MODE_COUNT && i < PAGE_MODE_COUNT; i++) {
        if (i != (int)p->mode && is_allowed(p, (enum page_mode)i) &&
            (oldest < 0 || p->modes[i].last_batch < p->modes[oldest].last_batch))
            oldest = i;
    }
    if (oldest < 0)
        return false;
    p->modes[oldest].last_batch = p->batches;
    p->next_probe = p->batches + POLICY_PROBE_GAP;
    *ret_mode = (enum page_mode)oldest;
    return true;
}

enum page_mode policy_choose(struct policy *p)
{
    p->batches++;
    return p->mode;
}

static void average(double *value, double seen, double weight)
{
    *value += (seen - *value) * weight;
}

void policy_note_batch(struct policy *p, const struct page_sample *sample)
{
    struct policy_mode *m = &p->modes[sample->mode];
    double pages = sample->pages, weight = BATCH_WEIGHT * pages / PAGE_BATCH_MAX;

    if (sample->pages < BATCH_PAGES_MIN)
        return;
    p->seen_encode_ns += sample->wall_ns;
    average(&p->scan_ns_per_page, (double)sample->scan_ns / pages, weight);
    p->wall_ns = p->wall_ns * TIME_FADE + (double)sample->wall_ns;
    p->cpu_ns = p->cpu_ns * TIME_FADE + (double)sample->cpu_ns;
    average(&m->bytes_per_page, (double)sample->bytes / pages, m->measured ? weight : 1);
    average(&m->ns_per_page, (double)(sample->cpu_ns - sample->scan_ns) / pages,
            m->measured ? weight : 1);
    m->measured = true;
    m->last_batch = m->measured_batch = p->batches;
    reconsider(p);
}

/* Raw has no figures of its own on these pages: then the other's are taken as they are. */
void policy_note_probe(struct policy *p, const struct page_sample *used,
                       const struct page_sample *other)
{
    const struct policy_mode *u = &p->modes[used->mode];
    struct policy_mode *m = &p->modes[other->mode];
    double pages = other->pages;
    p->probe_credit -= (double)(used->cpu_ns + other->cpu_ns);
    if (other->pages < BATCH_PAGES_MIN || used->mode == other->mode)
        return;
    double bytes = (double)other->bytes / pages, ns = (double)other->cpu_ns / pages;
    if (used->mode != PAGE_MODE_RAW && u->measured && used->bytes && used->cpu_ns > 0) {
        bytes = u->bytes_per_page * (double)other->bytes / (double)used->bytes;
        ns = u->ns_per_page * (double)other->cpu_ns / (double)used->cpu_ns;
    }
    average(&m->bytes_per_page, bytes, m->measured ? PROBE_WEIGHT : 1);
    average(&m->ns_per_page, ns, m->measured ? PROBE_WEIGHT : 1);
    m->measured = true;
    m->measured_batch = p->batches;
    reconsider(p);
}

void policy_note_send(struct policy *p, uint64_t bytes, int64_t cpu_ns)
{
    if (bytes >= BATCH_PAGES_MIN * GUEST_PAGE_SIZE)
        average(&p->send_ns_per_byte, (double)cpu_ns / (double)bytes, BATCH_WEIGHT);
}

/* ---- the link ---- */

/* Bytes of a raw page for one in the present mode: a link that carries so much more is as good as
 * one without a limit. */
static double raw_share(const struct policy *p)
{
    return p->modes[PAGE_MODE_RAW].bytes_per_page / p->modes[p->mode].bytes_per_page;
}

static void note_carried(struct policy *p, const struct policy_link_sample *seen)
{
    p->carried.bytes = p->carried.bytes * CARRIED_FADE + (double)seen->bytes;
    p->carried.carrying_ns = p->carried.carrying_ns * CARRIED_FADE + (double)seen->carrying_ns;
    p->carried.interval_ns = p->carried.interval_ns * CARRIED_FADE + (double)seen->interval_ns;
    p->carried.intervals++;
}

/*
 * Bytes a second while the link carried any, as if its connections did so one after the other. If they do at once, the
 * link is faster.
 */
static double carried_rate(const struct policy *p)
{
    double carrying_ns = min_double(p->carried.carrying_ns, p->carried.interval_ns);
    return p->carried.bytes * NSEC_PER_SEC / (carrying_ns + CARRYING_LEAST_NS);
}

/* Nobody waits for the link, and pages are not lacking. */
static void doubt_link_rate(struct policy *p)
{
    p->link_known = false;
    if (p->seen_rate > p->link_measured * POLICY_LINK_SURPRISE)
        p->link_measured = 0;
    if (p->link_measured > 0 && p->now_ns < p->link_trusted_ns + POLICY_LINK_TRUST)
        return;
    if (p->link_rate >= carried_rate(p) * LINK_GROWTH)
        return;
    p->link_rate = min_double(POLICY_LINK_FASTEST, p->link_rate * LINK_GROWTH);
    p->link_trusted_ns = p->now_ns;
}

static void learn_link_rate(struct policy *p, double blocked_share, bool busy, double rate)
{
    average(&p->seen_rate, rate, p->seen_rate > 0 ? SEEN_WEIGHT : 1);
    if (blocked_share >= BLOCKED_SHARE) {
        if (p->link_rate > 2 * rate)
            p->link_rate = 2 * rate;
        average(&p->link_rate, rate, p->link_known ? LINK_WEIGHT : FIRST_LINK_WEIGHT);
        p->link_known = true;
        p->link_measured = p->link_rate;
        p->link_trusted_ns = p->now_ns;
    } else if (busy && p->link_rate < rate * raw_share(p) * LINK_GROWTH &&
               (blocked_share < UNBLOCKED_SHARE || !p->link_known)) {
        doubt_link_rate(p);
    }
    double least = p->link_measured > 0 ? min_double(rate, p->seen_rate) : rate;
    if (p->link_rate < least)
        p->link_rate = least;
}

/* Of the pages a second before, what the mode on trial must bring. */
static double trial_share(const struct policy *p, double rate)
{
    enum page_mode from = p->trial.from;
    bool full = rate * p->modes[p->mode].bytes_per_page > p->link_rate * FULL_SHARE;
    if (has_more_bytes(p, p->mode, from))
        return full && share_for_bytes(p, p->mode, from) < POLICY_TIE ? 1 / POLICY_BYTES_SHARE
                                                                       : POLICY_GAIN;
    return has_more_bytes(p, from, p->mode) && from < p->mode
               ? TRIAL_SHARE * share_for_bytes(p, from, p->mode)
               : TRIAL_SHARE;
}

/*
 * A mode that brought less than the one before, or no more for more bytes: back, and let it be for a while. Where a
 * dearer mode all but fills the link, a lighter one would take the rest of the link for nothing.
 */
static void end_trial(struct policy *p, double rate)
{
    bool forced = p->trial.forced;
    if (rate <= p->trial.rate_before * (forced ? 1 : trial_share(p, rate))) {
        bar_failed(p, p->mode, p->trial.from);
        change_mode(p, p->trial.from);
        return;
    }
    p->trial.active = false;
    p->modes[p->mode].bar_ns = POLICY_BAR;
    if (forced)
        bar_failed(p, p->trial.from, p->mode);
}

static void judge_trial(struct policy *p, double rate, bool link_limits)
{
    if (!p->trial.active)
        return;
    if (++p->trial.intervals > POLICY_TRIAL_SETTLE)
        p->trial.rate_sum += rate;
    if (link_limits && p->trial.forced && !p->trial.on_credit && rate <= p->trial.rate_before) {
        end_trial(p, rate);
        return;
    }
    if (p->trial.intervals >= POLICY_TRIAL_LENGTH)
        end_trial(p, p->trial.rate_sum / (POLICY_TRIAL_LENGTH - POLICY_TRIAL_SETTLE));
}

/* Compression pays because the link is slow: is it? Costs at most the time that the trial takes. */
static void challenge(struct policy *p, bool on_credit)
{
    if (!is_eligible(p, PAGE_MODE_RAW) || p->mode == PAGE_MODE_RAW || p->trial.active)
        return;
    change_mode(p, PAGE_MODE_RAW);
    p->trial.forced = true;
    p->trial.on_credit = on_credit;
}

/* Not for nothing while the link is what limits: raw pages would take it from others. */
static void challenge_on_credit(struct policy *p)
{
    const struct policy_mode *raw = &p->modes[PAGE_MODE_RAW];
    double interval_ns =
        POLICY_LINK_BATCHES * PAGE_BATCH_MAX * raw->bytes_per_page * NSEC_PER_SEC / p->link_rate;
    if (interval_ns < POLICY_LINK_INTERVAL)
        interval_ns = POLICY_LINK_INTERVAL;
    if (p->trial_credit < interval_ns * POLICY_TRIAL_LENGTH)
        return;
    p->trial_credit -= interval_ns * POLICY_TRIAL_LENGTH;
    challenge(p, true);
}

static bool has_room_for_raw(const struct policy *p)
{
    return p->carried.intervals >= CARRIED_INTERVALS &&
           carried_rate(p) > p->page_rate * p->modes[PAGE_MODE_RAW].bytes_per_page * POLICY_ROOM;
}

static void judge_interval(struct policy *p, const struct policy_link_sample *seen)
{
    double seconds = (double)seen->interval_ns / NSEC_PER_SEC;
    double worker_ns = (double)seen->interval_ns * p->config.workers;
    int64_t for_link_ns = seen->blocked_ns < seen->carrying_ns ? seen->blocked_ns : seen->carrying_ns;
    double blocked_share = (double)for_link_ns / worker_ns;
    double other_end_share = (double)(seen->blocked_ns - for_link_ns) / worker_ns;
    bool busy = (double)p->seen_encode_ns / worker_ns + other_end_share >= BUSY_SHARE;
    bool cores_lack = seen->cores_full || other_end_share >= BLOCKED_SHARE;
    double page_rate = (double)seen->pages / seconds;

    note_carried(p, seen);
    learn_link_rate(p, blocked_share, busy, (double)seen->bytes / seconds);
    if (blocked_share < BLOCKED_SHARE && !busy && !cores_lack)
        return;
    average(&p->page_rate, page_rate, p->page_rate > 0 ? LINK_WEIGHT : 1);
    judge_trial(p, page_rate, blocked_share >= BLOCKED_SHARE);
    if (blocked_share >= BLOCKED_SHARE)
        challenge_on_credit(p);
    else if (cores_lack && has_room_for_raw(p))
        challenge(p, false);
}

/* Acknowledgements come in lumps of a batch: an interval must hold several to say something. */
void policy_note_link(struct policy *p, const struct policy_link_sample *sample)
{
    struct policy_link_sample *seen = &p->seen;
    seen->interval_ns += sample->interval_ns;
    seen->bytes += sample->bytes;
    seen->pages += sample->pages;
    seen->blocked_ns += sample->blocked_ns;
    seen->carrying_ns += sample->carrying_ns;
    seen->cores_full = sample->cores_full;
    bool enough = seen->interval_ns >= POLICY_LINK_INTERVAL &&
                  seen->pages >= POLICY_LINK_BATCHES * PAGE_BATCH_MAX;
    if (!enough && seen->interval_ns < POLICY_LINK_INTERVAL_MAX)
        return;

    p->now_ns += seen->interval_ns;
    p->trial_credit = min_double(
        CREDIT_MAX_NS, p->trial_credit + POLICY_TRIAL_SHARE * (double)seen->interval_ns);
    p->probe_credit = min_double(CREDIT_MAX_NS,
                                 p->probe_credit + POLICY_PROBE_SHARE * p->config.workers *
                                                       (double)seen->interval_ns);
    /* Nothing at all comes through: the connection is gone, and says nothing about the link. */
    if (seen->bytes)
        judge_interval(p, seen);
    *seen = (struct policy_link_sample){0};
    p->seen_encode_ns = 0;
    reconsider(p);
}

bool policy_compress_parse(const char *name, enum policy_compress *ret_compress)
{
    static const char *const names[] = {"auto", "lz4", "zstd", "none"};
    for (unsigned i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        if (!strcmp(name, names[i])) {
            *ret_compress = (enum policy_compress)i;
            return true;
        }
    }
    return false;
}

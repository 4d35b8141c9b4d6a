/* SPDX-License-Identifier: Apache-2.0 */
/* The policy on simulated links, cores and pages: what it chooses, how soon, at what cost. */
#include "migrate/policy.h"

#include "base/clock.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <cmocka.h>

enum { STEP_NS = 5000000, BATCH = 256 };

struct content {
    double bytes[PAGE_MODE_COUNT]; /* per page */
    double ns[PAGE_MODE_COUNT];    /* CPU time per page beyond the scan */
};

/* Measured by tests/bench/codec on one core; the memory of a Linux guest. */
static const struct content linux_memory = {{4112, 1490, 1060, 1010, 970},
                                            {60, 3800, 4900, 5900, 8000}};
static const struct content incompressible = {{4112, 4112, 4112, 4112, 4112},
                                              {60, 230, 400, 400, 400}};
static const struct content text = {{4112, 180, 120, 118, 116}, {60, 500, 1200, 1500, 2000}};

#define MBIT 125e3
#define GBIT 125e6
#define SCAN_NS 250.0

/* What lies around the policy. */
struct world {
    struct policy policy;
    const struct content *content;
    double link; /* bytes a second */
    double cores;
    unsigned workers;
    double source, given; /* pages a second that the VMM gives, 0: any; those not yet taken */
    double receiver[PAGE_MODE_COUNT]; /* pages a second that the other end applies; 0: any */
    bool starved; /* that is so for lack of cores, and no worker waits to send */
    double send_ns;                   /* CPU time per byte */
    double time, pages;
    double probed; /* CPU seconds */
    unsigned changes;
};

static double min_double(double a, double b)
{
    return a < b ? a : b;
}

/* Pages a second that a mode yields in truth. */
static double true_rate(const struct world *w, enum page_mode mode)
{
    double ns = SCAN_NS + w->content->ns[mode] + w->content->bytes[mode] * w->send_ns;
    double rate =
        min_double(w->link / w->content->bytes[mode], min_double(w->cores, w->workers) * 1e9 / ns);
    if (w->receiver[mode])
        rate = min_double(rate, w->receiver[mode]);
    return rate;
}

static double best_rate(const struct world *w)
{
    double best = 0;
    for (unsigned i = 0; i < PAGE_MODE_COUNT; i++)
        best = true_rate(w, (enum page_mode)i) > best ? true_rate(w, (enum page_mode)i) : best;
    return best;
}

static struct page_sample probe_of(const struct world *w, enum page_mode mode)
{
    return (struct page_sample){
        .mode = mode,
        .pages = PAGE_PROBE_PAGES,
        .bytes = (uint64_t)(PAGE_PROBE_PAGES * w->content->bytes[mode]),
        .cpu_ns = (int64_t)(PAGE_PROBE_PAGES * w->content->ns[mode]),
    };
}

/* Of all connections together: who shares the link carries for longer. */
static double carrying_share(const struct world *w, double rate)
{
    double used = rate / w->link;
    return used < 1 ? min_double(w->workers, used / (1 - used)) : w->workers;
}

/* One batch; returns the seconds that it took. Adds to what the link saw. */
static double run_batch(struct world *w, struct policy_link_sample *seen, double *encode_s)
{
    enum page_mode chosen = policy_choose(&w->policy), mode = chosen;
    double per_page = (SCAN_NS + w->content->ns[mode]) * 1e-9;
    double seconds = BATCH / true_rate(w, mode);
    /* Workers beyond the cores wait for one: their batches take longer on the wall. */
    double stretch = w->workers > w->cores ? w->workers / w->cores : 1;
    struct page_sample sample = {.mode = mode,
                                 .pages = BATCH,
                                 .bytes = (uint64_t)(BATCH * w->content->bytes[mode]),
                                 .scan_ns = (int64_t)(BATCH * SCAN_NS),
                                 .cpu_ns = (int64_t)(BATCH * per_page * 1e9),
                                 .wall_ns = (int64_t)(BATCH * per_page * 1e9 * stretch)};
    policy_note_batch(&w->policy, &sample);
    if (w->send_ns > 0)
        policy_note_send(&w->policy, sample.bytes, (int64_t)((double)sample.bytes * w->send_ns));
    seen->bytes += sample.bytes;
    seen->pages += BATCH;
    *encode_s += BATCH * per_page * stretch;
    if (policy_wants_probe(&w->policy, &mode)) {
        struct page_sample a = probe_of(w, chosen), b = probe_of(w, mode);
        w->probed += (double)(a.cpu_ns + b.cpu_ns) * 1e-9;
        policy_note_probe(&w->policy, &a, &b);
    }
    return seconds;
}

static void run(struct world *w, double seconds)
{
    double end = w->time + seconds;
    while (w->time < end) {
        struct policy_link_sample seen = {.interval_ns = STEP_NS};
        double used = 0, encode = 0, step = STEP_NS * 1e-9;
        enum page_mode before = w->policy.mode;
        w->given += w->source > 0 ? w->source * step : 1e9;
        for (; used < step && w->given >= BATCH; w->given -= BATCH)
            used += run_batch(w, &seen, &encode);
        /* Long batches stand for what was acknowledged in their time. */
        double elapsed = used > step || w->source <= 0 ? used : step;
        seen.interval_ns = (int64_t)(elapsed * 1e9);
        double waited = used * w->workers - encode;
        seen.cores_full = w->starved;
        if (waited > 0 && !w->starved)
            seen.blocked_ns = (int64_t)(waited * 1e9);
        seen.carrying_ns = (int64_t)(carrying_share(w, (double)seen.bytes / elapsed) * elapsed * 1e9);
        policy_note_link(&w->policy, &seen);
        w->time += elapsed;
        w->pages += (double)seen.pages;
        w->changes += w->policy.mode != before;
    }
}

static struct world new_world(const struct content *content, double link, double cores,
                              enum policy_compress compress)
{
    struct world w = {.content = content, .link = link, .cores = cores, .workers = 4};
    if (w.workers < cores)
        w.workers = (unsigned)cores;
    policy_init(&w.policy, &(struct policy_config){
                               .compress = compress, .workers = w.workers, .cores = cores});
    return w;
}

#define M(mode) (1u << PAGE_MODE_##mode)
#define ANY_ZSTD (M(ZSTD_1) | M(ZSTD_2) | M(ZSTD_3))

static const struct {
    const char *name;
    const struct content *content;
    double link, cores;
    enum policy_compress compress;
    unsigned expected;
} table[] = {
    {"100 Mbit/s", &linux_memory, 100 * MBIT, 2, POLICY_AUTO, M(ZSTD_3)},
    {"1 Gbit/s", &linux_memory, GBIT, 2, POLICY_AUTO, M(ZSTD_3) | M(ZSTD_2)},
    {"1 Gbit/s, one core", &linux_memory, GBIT, 1, POLICY_AUTO, M(ZSTD_2) | M(ZSTD_1)},
    {"1 Gbit/s, a third of a core", &linux_memory, GBIT, 0.33, POLICY_AUTO, M(LZ4)},
    {"10 Gbit/s", &linux_memory, 10 * GBIT, 2, POLICY_AUTO, M(LZ4)},
    {"10 Gbit/s, one core", &linux_memory, 10 * GBIT, 1, POLICY_AUTO, M(RAW)},
    {"10 Gbit/s, 8 cores", &linux_memory, 10 * GBIT, 8, POLICY_AUTO, ANY_ZSTD},
    {"40 Gbit/s", &linux_memory, 40 * GBIT, 2, POLICY_AUTO, M(RAW)},
    {"unshaped", &linux_memory, 1e11, 2, POLICY_AUTO, M(RAW)},
    {"incompressible, 10 Mbit/s", &incompressible, 10 * MBIT, 2, POLICY_AUTO, M(RAW)},
    {"incompressible, 1 Gbit/s", &incompressible, GBIT, 2, POLICY_AUTO, M(RAW)},
    {"incompressible, unshaped", &incompressible, 1e11, 2, POLICY_AUTO, M(RAW)},
    {"text, 10 Gbit/s", &text, 10 * GBIT, 2, POLICY_AUTO, M(LZ4)},
    {"text, 100 Mbit/s", &text, 100 * MBIT, 2, POLICY_AUTO, ANY_ZSTD},
    {"none, 10 Mbit/s", &linux_memory, 10 * MBIT, 2, POLICY_NONE, M(RAW)},
    {"lz4, 10 Mbit/s", &linux_memory, 10 * MBIT, 2, POLICY_LZ4, M(LZ4)},
    {"lz4, unshaped", &linux_memory, 1e11, 2, POLICY_LZ4, M(LZ4)},
    {"zstd, 10 Mbit/s", &linux_memory, 10 * MBIT, 2, POLICY_ZSTD, M(ZSTD_3)},
    {"zstd, unshaped", &linux_memory, 1e11, 2, POLICY_ZSTD, M(ZSTD_1)},
};

static void each_link_gets_its_mode(void **state)
{
    for (unsigned i = 0; i < sizeof(table) / sizeof(table[0]); i++) {
        struct world w =
            new_world(table[i].content, table[i].link, table[i].cores, table[i].compress);
        run(&w, 3);
        if (!(table[i].expected & 1u << w.policy.mode))
            fail_msg("%s: %s; link %.0f", table[i].name, page_mode_name(w.policy.mode),
                     w.policy.link_rate);
        w.changes = 0;
        w.pages = 0;
        double start = w.time;
        run(&w, 10);
        if (table[i].compress == POLICY_AUTO && w.pages / (w.time - start) < 0.94 * best_rate(&w))
            fail_msg("%s: %.0f pages/s of %.0f", table[i].name, w.pages / (w.time - start),
                     best_rate(&w));
        if (w.probed > 0.02 * w.workers * w.time)
            fail_msg("%s: probes took %.1f %%", table[i].name, 100 * w.probed / w.time);
        if (w.changes > 4)
            fail_msg("%s: %u changes of mode", table[i].name, w.changes);
    }
}

/* A migration over a fast link is short: what is lost until raw is chosen counts. */
static void compression_turns_itself_off_at_once(void **state)
{
    struct world w = new_world(&incompressible, 2e9, 2, POLICY_AUTO);
    run(&w, 1);
    assert_int_equal(w.policy.mode, PAGE_MODE_RAW);
    assert_true(w.pages > 0.97 * best_rate(&w));
    w = new_world(&linux_memory, 3e9, 2, POLICY_AUTO);
    run(&w, 1);
    assert_int_equal(w.policy.mode, PAGE_MODE_RAW);
    assert_true(w.pages > 0.85 * best_rate(&w));
}

/* Who believes in a fast link compresses nothing until the link was heard of, and soon what it needs. */
static void one_may_begin_with_a_fast_link(void **state)
{
    struct world w = new_world(&linux_memory, 1e11, 2, POLICY_AUTO);
    policy_init(&w.policy, &(struct policy_config){
                               .workers = w.workers, .cores = 2, .link_rate = POLICY_LINK_FASTEST});
    run(&w, 1);
    assert_int_equal(w.policy.mode, PAGE_MODE_RAW);
    assert_int_equal(w.changes, 0);
    w = new_world(&linux_memory, GBIT, 2, POLICY_AUTO);
    policy_init(&w.policy, &(struct policy_config){
                               .workers = w.workers, .cores = 2, .link_rate = POLICY_LINK_FASTEST});
    run(&w, 0.2);
    assert_true(w.policy.mode >= PAGE_MODE_ZSTD_1);
}

static void a_link_that_changes_is_followed(void **state)
{
    static const double links[] = {10 * GBIT, 100 * MBIT, 40 * GBIT, GBIT, 10 * MBIT, 10 * GBIT};
    static const unsigned expected[] = {M(LZ4), ANY_ZSTD, M(RAW), ANY_ZSTD, ANY_ZSTD, M(LZ4)};
    struct world w = new_world(&linux_memory, GBIT, 2, POLICY_AUTO);
    for (unsigned i = 0; i < sizeof(links) / sizeof(links[0]); i++) {
        w.link = links[i];
        run(&w, 4);
        if (!(expected[i] & 1u << w.policy.mode))
            fail_msg("link %u: %s", i, page_mode_name(w.policy.mode));
    }
}

static void contents_that_change_are_followed(void **state)
{
    struct world w = new_world(&linux_memory, GBIT, 2, POLICY_AUTO);
    for (unsigned i = 0; i < 4; i++) {
        w.content = i % 2 ? &incompressible : &linux_memory;
        run(&w, 3);
        if (i % 2)
            assert_int_equal(w.policy.mode, PAGE_MODE_RAW);
        else
            assert_true(w.policy.mode >= PAGE_MODE_ZSTD_1);
    }
}

/* The link looks fast enough for raw only to who does not see that there is little to send. */
static void lack_of_pages_teaches_nothing(void **state)
{
    struct world w = new_world(&linux_memory, GBIT, 2, POLICY_AUTO);
    run(&w, 2);
    assert_true(w.policy.mode >= PAGE_MODE_ZSTD_1);
    w.source = 2000;
    w.given = 0;
    run(&w, 5);
    assert_true(w.policy.mode >= PAGE_MODE_ZSTD_1);
    assert_true(w.policy.link_rate < 2 * GBIT);
}

/* The first pass goes over much memory that is zero: encoders that only look say nothing about the link. */
static void zero_pages_teach_nothing(void **state)
{
    struct world w = new_world(&linux_memory, GBIT, 2, POLICY_AUTO);
    for (unsigned i = 0; i < 400; i++) {
        struct page_sample sample = {.mode = policy_choose(&w.policy), .wall_ns = 4 * STEP_NS};
        policy_note_batch(&w.policy, &sample);
        policy_note_link(&w.policy,
                         &(struct policy_link_sample){.interval_ns = STEP_NS, .bytes = 100});
    }
    assert_true(w.policy.link_rate < 1.1 * GBIT);
    assert_true(w.policy.mode >= PAGE_MODE_ZSTD_1);
}

/* The cores give zstd almost as many pages as the link would take of LZ4: then LZ4 is tried, and not kept. */
static void more_bytes_must_bring_more_pages(void **state)
{
    struct world w = new_world(&linux_memory, GBIT, 0.43, POLICY_AUTO);
    double bytes = 0, pages = 0;
    for (unsigned i = 0; i < 2000; i++) {
        double before = w.pages, each = w.content->bytes[w.policy.mode];
        run(&w, 0.005);
        bytes += (w.pages - before) * each;
        pages += w.pages - before;
    }
    assert_true(pages / w.time > 0.94 * best_rate(&w));
    if (bytes / pages > 1.06 * linux_memory.bytes[PAGE_MODE_ZSTD_1])
        fail_msg("%.0f bytes per page", bytes / pages);
}

/*
 * Memory in stretches: such that the link limits, and such that zstd takes one core all its time.
 * That the link has room then does not make it faster, and figures from the stretch before say
 * nothing about this one.
 */
static void a_link_that_was_measured_is_not_tried_with_more_bytes(void **state)
{
    static const struct content dense = {{4112, 3200, 2900, 2850, 2750},
                                         {60, 5000, 11000, 12000, 14000}};
    static const struct content light = {{4112, 1446, 609, 605, 600},
                                         {60, 3200, 7000, 8000, 9500}};
    struct world w = new_world(&dense, GBIT, 1, POLICY_AUTO);
    double bytes = 0, least = 0;
    for (unsigned i = 0; i < 240; i++) {
        w.content = i % 80 < 20 ? &dense : &light;
        double before = w.pages, each = w.content->bytes[w.policy.mode];
        run(&w, 0.005);
        if (w.content == &dense)
            continue;
        bytes += (w.pages - before) * each;
        least += (w.pages - before) * w.content->bytes[PAGE_MODE_ZSTD_1];
    }
    if (bytes > 1.03 * least)
        fail_msg("%.3f of the bytes of zstd-1", bytes / least);
}

static void note_batch_of(struct policy *p, enum page_mode mode, unsigned bytes, unsigned ns)
{
    policy_choose(p);
    struct page_sample sample = {.mode = mode,
                                 .pages = BATCH,
                                 .bytes = BATCH * bytes,
                                 .scan_ns = BATCH * 250,
                                 .cpu_ns = BATCH * (250 + ns),
                                 .wall_ns = BATCH * (250 + ns)};
    policy_note_batch(p, &sample);
}

/* LZ4 did well, on pages that were sent long ago. */
static void figures_of_other_pages_are_no_reason_for_a_change(void **state)
{
    enum page_mode asked = PAGE_MODE_COUNT;
    struct policy p;
    policy_init(&p, &(struct policy_config){.workers = 2, .cores = 2});
    note_batch_of(&p, PAGE_MODE_LZ4, 100, 500);
    for (unsigned i = 0; i < 2 * POLICY_FRESH; i++) {
        p.mode = PAGE_MODE_ZSTD_1;
        note_batch_of(&p, PAGE_MODE_ZSTD_1, 2900, 11000);
    }
    assert_true(policy_predict(&p, PAGE_MODE_LZ4) > 2 * policy_predict(&p, p.mode));
    assert_int_equal(p.mode, PAGE_MODE_ZSTD_1);
    assert_true(policy_wants_probe(&p, &asked));
    assert_int_equal(asked, PAGE_MODE_LZ4);
    struct page_sample used = {
        .mode = p.mode, .pages = 16, .bytes = 16 * 2900, .cpu_ns = 16 * 11000};
    struct page_sample other = {
        .mode = asked, .pages = 16, .bytes = 16 * 1400, .cpu_ns = 16 * 2000};
    policy_note_probe(&p, &used, &other);
    assert_int_equal(p.mode, PAGE_MODE_LZ4);
}

/* LZ4 would bring a fifth more pages and fill the link with half as many bytes again. */
static void a_few_pages_more_are_not_worth_a_full_link(void **state)
{
    static const struct content easy = {{4112, 1490, 1060, 1010, 970},
                                        {60, 2000, 5500, 6500, 8500}};
    struct world w = new_world(&easy, GBIT, 0.39, POLICY_AUTO);
    unsigned lz4 = 0;
    run(&w, 0.3); /* until it is known what the link takes */
    for (unsigned i = 0; i < 1000; i++) {
        run(&w, 0.005);
        lz4 += w.policy.mode < PAGE_MODE_ZSTD_1;
    }
    if (lz4 > 100) /* now and then it is looked whether the link is faster meanwhile */
        fail_msg("%u of 1000 steps with LZ4", lz4);
}

static void an_outage_is_forgotten_soon(void **state)
{
    struct world w = new_world(&linux_memory, 10 * GBIT, 2, POLICY_AUTO);
    run(&w, 2);
    enum page_mode mode = w.policy.mode;
    for (unsigned i = 0; i < 500; i++)
        policy_note_link(&w.policy, &(struct policy_link_sample){.interval_ns = 10 * NSEC_PER_MSEC,
                                                                 .blocked_ns = 40 * NSEC_PER_MSEC,
                                                                 .carrying_ns = 40 * NSEC_PER_MSEC});
    run(&w, 0.3);
    assert_int_equal(w.policy.mode, mode);
}

/* The other end applies compressed pages slowly: no prediction knows that, the trial finds out. */
static void a_change_that_made_it_slower_is_taken_back(void **state)
{
    struct world w = new_world(&linux_memory, 10 * GBIT, 8, POLICY_AUTO);
    for (unsigned i = PAGE_MODE_LZ4; i < PAGE_MODE_COUNT; i++)
        w.receiver[i] = 150e3;
    run(&w, 10);
    w.pages = 0;
    double start = w.time;
    run(&w, 20);
    assert_true(w.pages / (w.time - start) > 0.85 * best_rate(&w));
}

static const double starved_rates[PAGE_MODE_COUNT] = {300e3, 130e3, 90e3, 80e3, 70e3};

/* Every core is busy at both ends: what compression takes is what lacks, and no worker waits for anything. */
static void lack_of_cores_is_no_slow_link(void **state)
{
    struct world w = new_world(&linux_memory, 1e11, 2, POLICY_AUTO);
    memcpy(w.receiver, starved_rates, sizeof(starved_rates));
    w.starved = true;
    run(&w, 1);
    assert_int_equal(w.policy.mode, PAGE_MODE_RAW);
    assert_true(w.pages > 0.8 * 300e3);
}

/* Who waits for an end that has no cores does not wait for the link, which has nothing to carry. */
static void waiting_for_the_other_end_is_no_slow_link(void **state)
{
    struct world w = new_world(&linux_memory, 1e11, 2, POLICY_AUTO);
    memcpy(w.receiver, starved_rates, sizeof(starved_rates));
    run(&w, 1);
    assert_int_equal(w.policy.mode, PAGE_MODE_RAW);
    assert_true(w.policy.link_rate >= POLICY_LINK_INITIAL);
    assert_true(w.pages > 0.8 * 300e3);
}

/* There, raw pages would fill the link: they are not tried again and again. */
static void lack_of_cores_fills_no_slow_link(void **state)
{
    struct world w = new_world(&linux_memory, GBIT, 2, POLICY_AUTO);
    memcpy(w.receiver, starved_rates, sizeof(starved_rates));
    w.starved = true;
    double bytes = 0;
    for (unsigned i = 0; i < 400; i++) {
        double before = w.pages, each = w.content->bytes[w.policy.mode];
        run(&w, 0.005);
        bytes += (w.pages - before) * each;
    }
    if (bytes / w.pages > 1.1 * linux_memory.bytes[PAGE_MODE_ZSTD_1])
        fail_msg("%.0f bytes per page", bytes / w.pages);
    assert_true(w.pages / w.time > 0.97 * starved_rates[PAGE_MODE_ZSTD_3]);
}

/* Encryption makes bytes dear: then fewer bytes win although encoding alone would be slower. */
static void the_cost_of_sending_counts(void **state)
{
    struct world w = new_world(&text, 1e11, 2, POLICY_AUTO);
    run(&w, 2);
    assert_int_equal(w.policy.mode, PAGE_MODE_RAW);
    w = new_world(&text, 1e11, 2, POLICY_AUTO);
    w.send_ns = 0.8;
    run(&w, 2);
    assert_int_equal(w.policy.mode, PAGE_MODE_LZ4);
    assert_true(policy_predict(&w.policy, PAGE_MODE_RAW) < 1.1 * true_rate(&w, PAGE_MODE_RAW));
}

static void names_are_parsed(void **state)
{
    enum policy_compress compress = POLICY_AUTO;
    assert_true(policy_compress_parse("none", &compress));
    assert_int_equal(compress, POLICY_NONE);
    assert_true(policy_compress_parse("auto", &compress));
    assert_true(policy_compress_parse("lz4", &compress));
    assert_true(policy_compress_parse("zstd", &compress));
    assert_int_equal(compress, POLICY_ZSTD);
    assert_false(policy_compress_parse("zst", &compress));
    assert_false(policy_compress_parse("", &compress));
    assert_int_equal(compress, POLICY_ZSTD);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(each_link_gets_its_mode),
        cmocka_unit_test(compression_turns_itself_off_at_once),
        cmocka_unit_test(one_may_begin_with_a_fast_link),
        cmocka_unit_test(a_link_that_changes_is_followed),
        cmocka_unit_test(contents_that_change_are_followed),
        cmocka_unit_test(lack_of_pages_teaches_nothing),
        cmocka_unit_test(zero_pages_teach_nothing),
        cmocka_unit_test(more_bytes_must_bring_more_pages),
        cmocka_unit_test(a_link_that_was_measured_is_not_tried_with_more_bytes),
        cmocka_unit_test(figures_of_other_pages_are_no_reason_for_a_change),
        cmocka_unit_test(a_few_pages_more_are_not_worth_a_full_link),
        cmocka_unit_test(an_outage_is_forgotten_soon),
        cmocka_unit_test(a_change_that_made_it_slower_is_taken_back),
        cmocka_unit_test(lack_of_cores_is_no_slow_link),
        cmocka_unit_test(waiting_for_the_other_end_is_no_slow_link),
        cmocka_unit_test(lack_of_cores_fills_no_slow_link),
        cmocka_unit_test(the_cost_of_sending_counts),
        cmocka_unit_test(names_are_parsed),
    };
    return cmocka_run_group_tests_name("policy", tests, NULL, NULL);
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * policy: which mode makes the migration fastest on this link, with these pages, on these cores.
 *
 *     struct policy policy;
 *     policy_init(&policy, &(struct policy_config){.compress = POLICY_AUTO, .workers = channels,
 *                                                  .cores = cores});
 *     for each batch:
 *         page_encoder_encode(enc, batch, policy_choose(&policy), &out, &err);
 *         policy_note_batch(&policy, &out.sample);
 *         ... send it ...
 *         if (policy_wants_probe(&policy, &other))
 *             page_encoder_probe(enc, mode, &a), page_encoder_probe(enc, other, &b),
 *             policy_note_probe(&policy, &a, &b);
 *     and now and then (each acknowledgement, or a timer):
 *         policy_note_send(&policy, bytes, cpu_ns);
 *         policy_note_link(&policy, &(struct policy_link_sample){...});
 *
 * Prediction. For each mode: pages a second, as the link takes them (link rate / bytes per page)
 * or as the cores yield them (cores / CPU time per page), whichever is less. Bytes and times per
 * page are moving averages of what the encoders measured. Of the modes that promise about as much
 * as the best (POLICY_TIE), it takes the cheapest: the core that is spared is the guest's; but not
 * one that fills the link where another has far fewer bytes: others need the link, too. LZ4 that
 * fills it must even promise a third more than zstd (POLICY_BYTES_SHARE), and so must raw pages
 * where those would shrink to a third: the bytes are certain, the share of the cores is not. It
 * changes to a dearer mode if that promises POLICY_GAIN times as much, and to a cheaper one as
 * soon as that is as good: compression that would make the migration slower turns itself off, on a
 * fast link as well as for pages that do not compress. While the link is what limits, it takes no
 * mode with more bytes.
 *
 * Proof. A prediction knows nothing of the other end. So a change of mode is on trial: if then
 * fewer pages a second are acknowledged than before (or hardly more, for more bytes), it is taken
 * back, and all modes that cost more than the former one are barred for POLICY_BAR, each time twice
 * as long.
 *
 * Raw against the prediction. Where compression looks good because the link looks slow, raw is
 * tried in truth now and then: it may be the other end that is slow. Such trials are paid from a
 * credit of POLICY_TRIAL_SHARE of the time passed; so a short migration has none. It is cores that
 * lack, and not the link, where no core of this host is idle or workers wait for the other end,
 * while the link would take these pages raw as fast as they come (POLICY_ROOM): then raw is tried
 * at once, and given up as soon as the link limits after all.
 *
 * Probes. What other modes would do is measured on a few pages of a batch that was encoded already,
 * in the mode in use and in the other, and nothing of it is sent: so a probe costs CPU time, at
 * most POLICY_PROBE_SHARE of the workers' (and POLICY_PROBE_CREDIT at the beginning), and no bytes;
 * and both figures are of the same pages.
 *
 * The link's rate is known only while the link is what limits: while workers wait for it, which is
 * while they wait to be allowed to send (blocked) and the link has something to carry. Who waits
 * while it has not waits for the other end. While hardly anybody waits for the link and pages are
 * not lacking, it is faster than believed, and the estimate grows step by step until somebody
 * waits, or the mode changes, or raw pages would fit, or it is more than the link showed while it
 * carried something. Not so soon if the link was what limited before: then pages have come that
 * compress better or more slowly, and the link is still what was measured, unless more gets through
 * than that (POLICY_LINK_SURPRISE) or POLICY_LINK_TRUST has passed; to find out costs the bytes of
 * a mode that is too light. While pages are lacking nothing is learnt but a lower bound. It begins
 * with POLICY_LINK_INITIAL, or with what the user believes: with POLICY_LINK_FASTEST pages go raw
 * until the link shows its rate, which takes a few batches.
 *
 * Figures age: what lies in a guest's memory changes from one batch to the next, and those of a
 * mode that was not used or probed for POLICY_FRESH batches are of other pages. They are no reason
 * for a change: that mode is probed first.
 *
 * State without I/O, clock or allocation. Threads: one at a time; the workers of a migration share
 * one policy under a lock of the caller's.
 */
#ifndef VMMIG_MIGRATE_POLICY_H
#define VMMIG_MIGRATE_POLICY_H

#include "migrate/page_encoder.h"

#include <stdbool.h>
#include <stdint.h>

#define POLICY_LINK_INITIAL 125e6 /* bytes a second: 1 Gbit/s */
#define POLICY_LINK_FASTEST 1e11
/* The link is judged after so many ns and batches, or after the longer time. */
#define POLICY_LINK_INTERVAL 20000000
#define POLICY_LINK_BATCHES 4
#define POLICY_LINK_INTERVAL_MAX 2000000000
#define POLICY_GAIN 1.04           /* a change to a dearer mode must promise this */
#define POLICY_TIE 0.97            /* from this share of the best on, a mode is as good */
#define POLICY_BYTES_SHARE 0.75    /* of the pages that are promised, for fewer bytes */
#define POLICY_TRIAL_SHARE 0.025   /* of the time, for trials of raw */
#define POLICY_PROBE_SHARE 0.01    /* of the workers' time */
#define POLICY_PROBE_CREDIT 1e6    /* ns */
#define POLICY_PROBE_GAP 4         /* batches between two probes, at least */
#define POLICY_FRESH 12            /* batches */
#define POLICY_LINK_TRUST 1000000000 /* ns */
#define POLICY_LINK_SURPRISE 1.25
#define POLICY_ROOM 1.5            /* for the bytes of raw pages, by what the link carried while it carried */
#define POLICY_TRIAL_SETTLE 1      /* intervals after a change that are not judged, */
#define POLICY_TRIAL_LENGTH 4      /* and after which the trial ends */
#define POLICY_BAR 2000000000      /* ns */
#define POLICY_BAR_MAX 64000000000 /* ns */

enum policy_compress { POLICY_AUTO, POLICY_LZ4, POLICY_ZSTD, POLICY_NONE };

struct policy_config {
    enum policy_compress compress; /* POLICY_ZSTD chooses among the levels */
    unsigned workers;              /* threads that encode and send */
    double cores;                  /* that they may use together */
    double link_rate;              /* bytes a second, believed until measured; 0: POLICY_LINK_INITIAL */
};

/* What happened on the link in an interval. */
struct policy_link_sample {
    int64_t interval_ns;
    uint64_t bytes; /* acknowledged, meta and payload */
    uint64_t pages; /* acknowledged: the sum of page_sample.pages */
    int64_t blocked_ns;  /* that all workers together waited to be allowed to send */
    int64_t carrying_ns; /* in which the connections, one for each worker, had bytes under way: the sum */
    bool cores_full;     /* no core of this host is idle: migrate/cores.h */
};

/* What is known about a mode. */
struct policy_mode {
    double bytes_per_page;
    double ns_per_page;              /* CPU time beyond the scan, which is the same in every mode */
    bool measured;                   /* else these are defaults */
    uint64_t last_batch;             /* number of the batch that was last encoded or probed in it */
    uint64_t measured_batch;         /* and of that from which the figures are; counts from 1 */
    int64_t barred_until_ns, bar_ns; /* the next bar lasts bar_ns */
};

struct policy {
    struct policy_config config;
    enum page_mode mode; /* the choice, apart from samples */
    struct policy_mode modes[PAGE_MODE_COUNT];
    double scan_ns_per_page, send_ns_per_byte;
    double wall_ns, cpu_ns; /* of encoding, sums that fade */
    double link_rate; /* bytes a second */
    bool link_known;  /* was the limit when last judged */
    double link_measured;        /* the rate when it last was; 0: never, or it has changed since */
    int64_t link_trusted_ns;     /* from then on */
    struct {
        double bytes, carrying_ns, interval_ns;
        unsigned intervals;
    } carried;                   /* sums that fade; the number is of those since the change of mode */
    double seen_rate;            /* acknowledged a second, smoothed: acknowledgements are lumpy */
    enum page_mode doubtful;     /* is probed before anything changes; PAGE_MODE_COUNT: none */
    uint64_t batches;
    uint64_t next_probe; /* not before this batch */
    double probe_credit, trial_credit; /* ns */

    /* The interval that is not judged yet. */
    struct policy_link_sample seen;
    int64_t seen_encode_ns;
    int64_t now_ns; /* sum of all intervals */

    double page_rate; /* acknowledged a second while the pages were not lacking; 0: unknown */
    struct {
        bool active;
        bool forced;               /* of raw, against the prediction, */
        bool on_credit;            /* although the link limits */
        enum page_mode from, left; /* the mode at its begin, and that before the present one */
        double rate_before;        /* in `from` */
        unsigned intervals;        /* since the change */
        double rate_sum;
    } trial;
};

void policy_init(struct policy *p, const struct policy_config *config);
/* The mode for the next batch. */
enum page_mode policy_choose(struct policy *p);
void policy_note_batch(struct policy *p, const struct page_sample *sample);
/* Whether the last batch's pages should be probed, and in which mode beside the one in use. */
bool policy_wants_probe(struct policy *p, enum page_mode *ret_mode);
/* The same pages in the mode of a batch, and in another. */
void policy_note_probe(struct policy *p, const struct page_sample *used,
                       const struct page_sample *other);
/* CPU time that it took to encrypt and send so many bytes. */
void policy_note_send(struct policy *p, uint64_t bytes, int64_t cpu_ns);
void policy_note_link(struct policy *p, const struct policy_link_sample *sample);
/* Pages a second that a mode promises, for logs and tests. */
double policy_predict(const struct policy *p, enum page_mode mode);

/* "auto", "lz4", "zstd", "none"; false if it is none of these. */
bool policy_compress_parse(const char *name, enum policy_compress *ret_compress);

#endif

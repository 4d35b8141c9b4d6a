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
 *     and now and then (each acknowledgement, or a timer):
 *         policy_note_link(&policy, acked_bytes, interval_ns, blocked_ns);
 *
 * For each mode it predicts pages a second: what the link takes (link rate / bytes per page) or what
 * the cores yield (cores / CPU time per page, workers / wall time per page), whichever is less. It
 * changes to a mode that promises POLICY_GAIN more, and to raw as soon as raw is as good: compression
 * that would make the migration slower turns itself off, on a fast link as well as for pages that do not
 * compress.
 *
 * Bytes and times per page are moving averages of what the encoders measured. Modes not in use are
 * sampled, one batch at a time; the time that this costs is paid from a credit of
 * POLICY_SAMPLE_SHARE of the time predicted for all batches.
 *
 * The link's rate is known only while the link is what limits, that is while workers wait for it
 * (blocked). While nobody waits and the encoders are busy, the link is faster than believed, and the
 * estimate grows step by step until somebody waits or the mode changes. While pages are lacking
 * nothing is learnt. It begins with POLICY_LINK_INITIAL.
 *
 * State without I/O, clock or allocation. Threads: one at a time; the workers of a migration share one
 * policy under a lock of the caller's.
 */
#ifndef VMMIG_MIGRATE_POLICY_H
#define VMMIG_MIGRATE_POLICY_H

#include "migrate/page_encoder.h"

#include <stdbool.h>
#include <stdint.h>

#define POLICY_LINK_INITIAL 125e6      /* bytes a second: 1 Gbit/s */
#define POLICY_LINK_INTERVAL 20000000  /* ns of observations before the link is judged */
#define POLICY_GAIN 1.08               /* a change of mode must promise this */
#define POLICY_SAMPLE_SHARE 0.03       /* of the time, for sampling other modes */
#define POLICY_SAMPLE_GAP 32           /* batches between two samples, at least */

enum policy_compress { POLICY_AUTO, POLICY_LZ4, POLICY_ZSTD, POLICY_NONE };

struct policy_config {
    enum policy_compress compress; /* POLICY_ZSTD chooses among the levels */
    unsigned workers;              /* threads that encode */
    double cores;                  /* that they may use together */
};

/* What is known about a mode. */
struct policy_mode {
    double bytes_per_page;
    double cpu_ns_per_page, wall_ns_per_page;
    bool measured;         /* else these are defaults */
    uint64_t last_batch;   /* number of the batch that was last encoded in this mode */
};

struct policy {
    struct policy_config config;
    enum page_mode mode; /* the choice, apart from samples */
    struct policy_mode modes[PAGE_MODE_COUNT];
    double link_rate; /* bytes a second */
    uint64_t batches;
    uint64_t next_sample; /* not before this batch */
    double sample_credit; /* ns */
    /* Observations of the link that are not judged yet. */
    uint64_t seen_bytes;
    int64_t seen_ns, seen_blocked_ns, seen_encode_ns;
};

void policy_init(struct policy *p, const struct policy_config *config);
/* The mode for the next batch. */
enum page_mode policy_choose(struct policy *p);
void policy_note_batch(struct policy *p, const struct page_sample *sample);
/*
 * In an interval, `acked_bytes` of batches (meta and payload) were acknowledged, and the workers
 * together waited `blocked_ns` for the link: socket full, or too much unacknowledged.
 */
void policy_note_link(struct policy *p, uint64_t acked_bytes, int64_t interval_ns,
                      int64_t blocked_ns);
/* Pages a second that a mode promises, for logs and tests. */
double policy_predict(const struct policy *p, enum page_mode mode);

/* "auto", "lz4", "zstd", "none"; false if it is none of these. */
bool policy_compress_parse(const char *name, enum policy_compress *ret_compress);

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sender_state: what the two halves of a sender share: its threads and life (sender.c), and its
 * pilot (sender_pilot.c). Nobody else includes it.
 *
 * The pilot runs in sender_run's thread: it measures, tells the policy, judges when the guest is to
 * be paused, pauses it, and waits for the end of the VMM's stream. The driver's and the workers'
 * threads only count for it.
 */
#ifndef VMMIG_MIGRATE_SENDER_STATE_H
#define VMMIG_MIGRATE_SENDER_STATE_H

#include "migrate/sender.h"

#include "base/queue.h"

#include <pthread.h>
#include <stdatomic.h>

struct page_worker {
    struct sender *s;
    unsigned number; /* of the channel, from 1 */
    struct queue *batches;
    struct page_encoder *encoder;
    atomic_uint_fast64_t frames;    /* given to the channel */
    struct page_encoder_stats stats; /* as of the last batch; under the policy lock */
    pthread_t thread;
    bool started;
};

struct sender {
    struct sender_params params;
    struct rate_limit limit;
    int cancel; /* latch: the copy failed */
    int halt;   /* that, or the caller's latch: everything that this sender started ends */
    struct channel_sender *channels[SENDER_CHANNELS_MAX + 1];
    struct page_worker workers[SENDER_CHANNELS_MAX];
    struct queue *chunks;
    unsigned futile, skipped; /* chunks in a row that did not shrink; not tried since. The byte worker's */
    pthread_t byte_thread;
    bool byte_thread_started;
    atomic_uint_fast64_t pages_given, zero_pages_given; /* by the driver */
    atomic_uint_fast64_t pages_out;                     /* of those: with the channels, or needless */
    atomic_uint_fast64_t bytes_given, bytes_out;        /* the loader's: by the driver; with channel 0 */
    atomic_uint_fast64_t pages_acked, page_bytes_acked, blocked_ns; /* for the policy */

    pthread_mutex_t policy_lock; /* taken alone */
    struct policy policy;

    pthread_mutex_t lock; /* guards what follows */
    pthread_cond_t changed;
    struct vm_error *error; /* the first failure */
    bool source_done, new_round, failed;
    bool recorded_runs; /* sender_note_recorded */
    struct sender_progress progress;
};

/* Of all channels; their rate and what they carry, of those for pages. */
struct link_totals {
    uint64_t rate, unacked, acked, sent;
    int64_t send_cpu_ns, carrying_ns;
    int64_t outage_ns;
    int64_t rtt_ns; /* the longest of the connections' least */
};

/* Also what *p has of the channels. Takes s->lock. */
void sender_read_channels(struct sender *s, struct link_totals *ret, struct sender_progress *p);
/* Until the driver is done, or the sender failed. -1: it has to. */
int sender_pilot_run(struct sender *s, struct vm_error **err);
/* The VMM paused the guest by itself if the pilot did not: when, it knows best. */
void sender_note_pause(struct sender *s);

#endif

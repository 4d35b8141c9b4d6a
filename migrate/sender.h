/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sender: the source's end of one copy. It takes a running guest's memory and state out of its VMM and
 * puts them into the channels, pauses the guest when that is due, and returns when the destination has
 * applied every byte. Who runs the guest afterwards is not its business (migrate/handover.h).
 *
 *     struct sender *s = sender_create(&params, &err);
 *     sender_run(s, &err);            blocks; the guest is paused when it returned 0
 *     sender_progress(s, &p);         meanwhile, from any thread
 *     sender_destroy(s);
 *
 * Threads: sender_run makes one worker per page channel (encodes), one for channel 0 (the bytes of the
 * VMM's loader), beside the driver's and the channels' own. All are gone when it returns.
 *
 *     VMM -> driver -> queue per channel -> encoder -> channel -> peer
 *
 * Every arrow is bounded and pushes back, so the VMM waits for the link. What lies between the VMM
 * and the peer adds to the pause, so channels are kept to SENDER_IN_FLIGHT_MS of the link's rate. In
 * the first pass, while its end is far, they may hold SENDER_AHEAD_MS: where the link limits the
 * encoders get ahead, and what they gained keeps the link busy where memory takes them longer.
 *
 * Channel 0 carries, besides bytes, a barrier: "all pages up to these numbers of the other channels
 * must be in place before the bytes behind me are loaded" (migrate/stream_frames.h).
 *
 * Failure: sender_run returns -1 and the reason; the guest may stand then, and resuming it is the
 * caller's. How long a lost link, or a destination that takes nothing, is waited for while the guest stands is the
 * caller's as well: params.cancel_fd ends whatever sender_run waits for, up to the last acknowledgement.
 */
#ifndef VMMIG_MIGRATE_SENDER_H
#define VMMIG_MIGRATE_SENDER_H

#include "base/cleanup.h"
#include "base/error.h"
#include "migrate/channel.h"
#include "migrate/page_encoder.h"
#include "migrate/policy.h"
#include "vmm/guest.h"

#include <stdbool.h>
#include <stdint.h>

#define SENDER_IN_FLIGHT_MS 20
/* Far from the end of the first pass: more than so long at the present rate. */
#define SENDER_AHEAD_MS 80
#define SENDER_FAR_MS 300
#define SENDER_WINDOW_MIN (256u << 10)
#define SENDER_WINDOW_MAX (4u << 20)
#define SENDER_WINDOW_ALL (8u << 20) /* of all page channels: what is in flight is memory of the agent's */
#define SENDER_CHANNELS_MAX 8

struct sender_params {
    struct guest *guest;
    struct uuid attempt;
    struct channel_token token;
    unsigned channels;                  /* page channels, 1..SENDER_CHANNELS_MAX */
    const struct guest_region *regions; /* those that the destination has mapped, in their order */
    unsigned n_regions;
    bool destination_zero;              /* they hold nothing but zeros there: zero pages need not be sent */
    bool was_running;                   /* false: the guest is paused already. Its user may change that: see
                                         * sender_note_recorded */
    enum policy_compress compress;
    int64_t downtime_limit_ns;
    double cores;                       /* that encoding may use */
    uint64_t max_bandwidth;             /* bytes a second on the wire; 0: no limit */
    int64_t outage_limit_ns;            /* how long a lost link is waited for; 0: the channels' default */
    int (*connect)(void *arg, int64_t deadline_ns, int cancel_fd, struct conn **ret_conn,
                   struct vm_error **err);
    void *connect_arg;
    int cancel_fd;
};

struct sender_progress {
    struct guest_source_progress source;
    uint64_t link_rate;          /* wire bytes a second, all channels */
    uint64_t wire_bytes, resent_bytes, acked_resent_bytes, stream_bytes;
    unsigned connected, reconnects;
    unsigned throttle_max_percent;
    int64_t predicted_pause_ns;  /* -1: unknown */
    int64_t paused_at_ns;        /* monotonic; 0: the guest runs */
    uint64_t moved_bytes;        /* since the guest stands: what left, and what came back of it; grows or it is stuck */
    int64_t outage_ns;           /* since the guest stands: some channel is without a connection */
    int64_t rtt_ns;              /* of the link, the least; since the guest stands */
    /* Its user has the guest run: so it was when we, or the VMM for the copy's end, had it stand. Else it is his
     * doing, and whoever takes the guest leaves it paused. */
    bool runs;
    bool limit_missed;           /* paused at the best minimum, above the limit */
    enum page_mode mode;         /* how pages are compressed at the moment */
    struct page_encoder_stats pages; /* sums over the channels */
};

struct sender;

struct sender *sender_create(const struct sender_params *params, struct vm_error **err);
int sender_run(struct sender *s, struct vm_error **err);
void sender_progress(struct sender *s, struct sender_progress *ret_progress);
/*
 * Whether its user has the guest run (progress.runs) is durable as `runs`; until that is said of a change, the guest is
 * not paused: after a crash nobody could tell its user's pause from ours.
 */
void sender_note_recorded(struct sender *s, bool runs);
void sender_destroy(struct sender *s);
DEFINE_CLEANUP(sender, struct sender *, sender_destroy)

#endif

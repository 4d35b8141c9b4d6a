/* SPDX-License-Identifier: Apache-2.0 */
/*
 * receiver: the destination's end of one copy (the other is migrate/sender.h). Frames of the page
 * channels are decoded into the sink's mapped memory; the bytes of channel 0 go to the VMM's loader,
 * those behind the barrier only when every page is in place.
 *
 *     struct receiver *r = receiver_create(&params, &err);
 *     receiver_serve(r, conn, &hello)      a thread of the listener's, for each data connection
 *     receiver_wait(r, &err)               another: 0 when the guest is loaded completely, and paused
 *     receiver_stop(r)                     ends everything; receiver_serve returns
 *     receiver_destroy(r)                  after all receiver_serve have returned
 *
 * A data connection that is lost is waited for: the sender comes back within its outage limit. When for idle_limit_ns
 * none was there, or nothing came over those that were, receiver_wait ends with TIMEOUT: also of a sender that stands
 * still and keeps its connections. Time in which this process itself stood does not count. What the peer sends is
 * validated frame by frame; the first error ends the copy, and is told to the sender.
 *
 * Threads: as above; receiver_stats from any. A crash loses the copy: the source still has the guest.
 */
#ifndef VMMIG_MIGRATE_RECEIVER_H
#define VMMIG_MIGRATE_RECEIVER_H

#include "base/cleanup.h"
#include "base/error.h"
#include "migrate/channel.h"
#include "vmm/guest.h"

#include <stdbool.h>
#include <stdint.h>

struct receiver;

struct receiver_params {
    struct guest *guest; /* a sink; outlives the receiver */
    struct uuid attempt;
    struct channel_token token;
    unsigned channels;                  /* page channels; channel 0 comes on top */
    const struct guest_region *regions; /* mapped ones, in the order told to the sender */
    unsigned n_regions;
    const unsigned *sink_regions; /* which of the sink's each of these is; NULL: they are the
                                     sink's, in its order */
    bool charge_vmm; /* the VMM is in a cgroup of its own: guest pages are to be charged to that */
    int64_t idle_limit_ns;              /* without a sign of the sender; 0: 60 s */
    int cancel_fd;
};

struct receiver_stats {
    uint64_t wire_bytes, frames, connections;
    int64_t load_ns; /* from the last byte until the VMM had loaded it; 0 until then */
};

struct receiver *receiver_create(const struct receiver_params *params, struct vm_error **err);
/* Serve a data connection of this attempt until it ends. conn stays the caller's. */
void receiver_serve(struct receiver *r, struct conn *conn, const struct channel_hello *hello);
int receiver_wait(struct receiver *r, struct vm_error **err);
void receiver_stop(struct receiver *r);
void receiver_stats(struct receiver *r, struct receiver_stats *ret_stats);
/* Bytes that the kernel has given for the guest's memory so far, as far as that can be told. */
uint64_t receiver_memory(const struct receiver *r);
void receiver_destroy(struct receiver *r);
DEFINE_CLEANUP(receiver, struct receiver *, receiver_destroy)

#endif

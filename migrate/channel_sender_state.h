/* SPDX-License-Identifier: Apache-2.0 */
/*
 * channel_sender_state: what the two halves of a channel's sending side share, and nobody else.
 * channel_sender.c is the user's half: it appends to the queue and waits for room in it.
 * channel_sender_thread.c is the channel's thread, which owns the connection: it connects, writes
 * frames, reads acknowledgements, watches for a stall and makes the connection again. So encoding
 * and encrypting overlap, and frames are released while the user is busy elsewhere.
 */
#ifndef VMMIG_MIGRATE_CHANNEL_SENDER_STATE_H
#define VMMIG_MIGRATE_CHANNEL_SENDER_STATE_H

#include "migrate/channel.h"
#include "migrate/channel_wire.h"
#include "migrate/rate_meter.h"

#include <pthread.h>
#include <stdbool.h>

#define CHANNEL_ATTEMPT_MIN_MS 1000 /* to connect and be answered; grows while that is too short */
#define CHANNEL_ATTEMPT_MAX_MS 10000

/* A frame from send until it is acknowledged. */
struct pending {
    struct pending *next;
    uint64_t seq;
    size_t total; /* header, meta and payload */
    size_t reached; /* bytes of it that were ever written */
    int64_t written_at;
    bool waited; /* for the window: the sender was not what was slow */
    void (*release)(void *arg);
    void *release_arg;
    uint8_t header[CHANNEL_HEADER_SIZE];
    int n_iov;
    struct iovec iov[]; /* [0] is the header */
};

/* Where in the queue the channel's thread writes. */
struct write_position {
    struct pending *frame; /* NULL: everything is written */
    size_t offset;
    int index; /* of frame->iov, and the offset therein */
    size_t index_offset;
    unsigned copies; /* fault: how many times the frame is still to be written; 0: once, as usual */
    uint8_t header[CHANNEL_HEADER_SIZE]; /* what is written as frame->iov[0] */
};

struct channel_sender {
    struct channel_sender_params params;
    pthread_t thread;
    int stop_fd, wake_fd;
    int halt_fd; /* epoll: stop_fd or the user's latch */

    pthread_mutex_t lock;
    pthread_cond_t changed;
    /* Guarded by the lock: */
    struct pending *head, *tail; /* not acknowledged, in order; only the thread removes */
    unsigned n_pending;
    uint64_t last_seq;
    uint64_t applied; /* acknowledged, and gone from the queue */
    uint64_t heard;   /* acknowledged, as the receiver last said */
    int64_t busy_since; /* since when something is outstanding */
    bool open;
    bool ending;     /* the last frame is END */
    bool finished;   /* and it was acknowledged */
    bool sleeping;   /* the thread waits for a frame */
    bool releasing;  /* acknowledged frames are being given back */
    struct vm_error *error;
    size_t window, window_min, window_max;
    unsigned window_ms; /* 0: `window` is the bound */
    struct rate_meter meter;
    struct channel_sender_stats stats;
    int64_t disconnected_since; /* 0: connected */
    struct write_position at;   /* frame may be set by send, the rest is the thread's */

    /* The channel's thread only: */
    struct conn *conn;
    bool refused; /* by the receiver, for good: whatever the kind, no connection mends it */
    int64_t outage_since; /* 0: none; ends with an acknowledgement */
    int64_t attempt_ns;   /* how long the next attempt to connect may take */
    int64_t carrying_ns;  /* of former connections */
    int64_t last_sign; /* of life: a message came, or bytes left */
    uint64_t drained;
    uint64_t written_seq; /* highest frame ever written completely */
    size_t allowance;     /* bytes granted by the rate limit, usable from `allowed_from` on */
    int64_t allowed_from;
    size_t in_len;
    uint8_t in[4 * (CHANNEL_MESSAGE_SIZE + CHANNEL_TEXT_MAX)];
};

/* Give the frames of a list back to their owner. Without the lock. */
void channel_sender_release(struct pending *list);
/* pthread_create's function; arg is the sender. */
void *channel_sender_thread(void *arg);

#endif

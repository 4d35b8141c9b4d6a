/* SPDX-License-Identifier: Apache-2.0 */
/*
 * channel: numbered, acknowledged frames, in one direction, over a connection that may be lost and
 * made again.
 *
 * What it promises: every frame is applied at the receiver exactly once and in order, whatever
 * happens to connections, as long as one can be made within the outage limit; and no byte of a
 * frame that the receiver acknowledged is sent again.
 *
 *     sending side                                  receiving side
 *     s = channel_sender_create(&params)            r = channel_receiver_create(&params)
 *     channel_sender_send(s, &frame) ...            for every connection that comes for it:
 *     channel_sender_flush(s, deadline)                 channel_hello_receive(conn, &hello)
 *     channel_sender_end(s, deadline)                   channel_receiver_run(r, conn, &hello)
 *     channel_sender_destroy(s)                     channel_receiver_destroy(r)
 *
 * The wire (docs/migration-wire.md). The sender connects and says hello: the attempt, the
 * channel's number and the session's secret token. The receiver answers with the number of the
 * last frame that it applied; the sender drops frames up to there and goes on behind. Then frames
 * flow one way, and acknowledgements the other: `applied`, cumulative, at once when the receiver
 * has caught up and every few frames otherwise, and in any case every CHANNEL_BEAT_MS, so that a
 * receiver that is busy applying a frame is told apart from a link that is dead.
 *
 * When a connection breaks, or for CHANNEL_STALL_MS neither a message of the receiver came nor a
 * byte left this host while something is outstanding, the sender drops it and connects again,
 * every CHANNEL_RETRY_MS, until `outage_limit` is over: then TIMEOUT. The clock of an outage stops
 * when a frame is acknowledged, not when a connection is made. A slow link is not a dead one: what
 * counts is that bytes leave. What a new connection does not mend (DENIED, VERSION, PROTOCOL,
 * REFUSED, NOT_FOUND, CORRUPT, the receiver's own error) ends the channel at once, with that
 * error.
 *
 * A receiver serves one connection at a time: a new one takes over from a former one, half open or
 * not, and is answered once the frame that was being applied is finished.
 *
 * Bounds: CHANNEL_META_MAX, CHANNEL_PAYLOAD_MAX and CHANNEL_IOV_MAX per frame, the window and
 * CHANNEL_FRAMES_MAX per sender. A receiver allocates CHANNEL_META_MAX + 64 KiB once. Lengths are
 * checked before anything is read into memory or reserved.
 *
 * A crash of either side loses the channel: numbers live in memory.
 */
#ifndef VMMIG_MIGRATE_CHANNEL_H
#define VMMIG_MIGRATE_CHANNEL_H

#include "base/cleanup.h"
#include "base/error.h"
#include "base/uuid.h"
#include "migrate/conn.h"
#include "migrate/rate_limit.h"

#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#define CHANNEL_META_MAX (64u << 10)
#define CHANNEL_PAYLOAD_MAX (4u << 20)
#define CHANNEL_IOV_MAX 1024
#define CHANNEL_FRAMES_MAX 4096 /* unacknowledged, per sender */
#define CHANNEL_WINDOW_DEFAULT (8u << 20)
#define CHANNEL_TYPE_MAX 0x7fff /* frame types up to here are the user's; those above are ours */
#define CHANNELS_MAX 64
#define CHANNEL_BEAT_MS 250
#define CHANNEL_STALL_MS 1500
#define CHANNEL_RETRY_MS 200
#define CHANNEL_OUTAGE_LIMIT_MS 30000

struct channel_token {
    uint8_t bytes[16]; /* secret; travels on the control connection only */
};

/* Fresh, from the system's random generator. */
struct channel_token channel_token_new(void);

/* Which channel of which migration. */
struct channel_id {
    struct uuid attempt;
    struct channel_token token;
    uint16_t number; /* below CHANNELS_MAX */
};

/* ---- Sending side ---- */

struct channel_sender;

struct channel_frame {
    uint16_t type;
    const void *meta;
    size_t meta_len;
    const struct iovec *payload; /* the array is copied, what it points to is not */
    int n_payload;
    /*
     * Called exactly once for every frame given to channel_sender_send, also when that fails: the
     * frame was applied at the receiver, or the channel is broken or destroyed. Until then meta and
     * payload stay valid and unchanged (they are summed once and may be sent again), so memory into
     * which a running guest writes must be copied first. Comes from the channel's own
     * thread or from within send, end or destroy; must not call the channel. May be NULL.
     */
    void (*release)(void *arg);
    void *release_arg;
};

struct channel_sender_params {
    struct channel_id id;
    /*
     * Make a connection to the receiver (conn_dial with CONN_CHANNEL). From the channel's own
     * thread, one call at a time. UNREACHABLE, TIMEOUT and SYSTEM are tried again.
     */
    int (*connect)(void *arg, int64_t deadline_ns, int cancel_fd, struct conn **ret_conn,
                   struct vm_error **err);
    void *connect_arg;
    struct rate_limit *limit; /* shared with other channels, or NULL; outlives the sender */
    int64_t outage_limit_ns;  /* 0: CHANNEL_OUTAGE_LIMIT_MS */
    int cancel_fd;            /* latch: everything ends with CANCELLED; -1: none */
};

struct channel_sender_stats {
    uint64_t frames;            /* given to send */
    uint64_t frames_acked;
    uint64_t bytes_sent;        /* headers, meta and payload of frames, those sent again included */
    uint64_t bytes_acked;       /* each frame counted once */
    uint64_t bytes_resent;      /* sent again, after a connection was lost, not acknowledged */
    uint64_t bytes_acked_resent; /* sent again though acknowledged: broken promise unless 0 */
    uint64_t reconnects;        /* connections made after the first */
    uint64_t bytes_unacked;     /* now: given to send, not acknowledged */
    uint64_t window;            /* now, bytes */
    uint64_t rate;              /* bytes a second acknowledged while busy, smoothed; 0: unknown */
    int64_t ack_delay_ns;       /* smoothed: from a frame's last byte to its acknowledgement */
    int64_t cpu_ns;             /* CPU time of the channel's thread: encrypting and sending */
    int64_t carrying_ns;        /* conn_carrying_ns() of all connections, as of the last acknowledgement */
    int64_t rtt_ns;             /* the least round trip that the kernel saw; 0: unknown */
    int64_t outage_ns;          /* now without a working connection for so long; 0: connected */
};

/* Starts the channel's thread, which begins to connect. Does not wait. `params` is copied. */
struct channel_sender *channel_sender_create(const struct channel_sender_params *params,
                                             struct vm_error **err);
/* Drops the connection, releases all frames, joins the thread. Does not wait for anything else. */
void channel_sender_destroy(struct channel_sender *s);
/* Wait until the receiver has answered for the first time. */
int channel_sender_wait_open(struct channel_sender *s, int64_t deadline_ns, struct vm_error **err);
/*
 * Give a frame to the channel. Blocks while the unacknowledged bytes exceed the window, also
 * throughout an outage; so what is in flight is bounded by the window plus one frame. send, flush
 * and end are for one thread at a time. Once the channel failed, each returns that error.
 */
int channel_sender_send(struct channel_sender *s, const struct channel_frame *frame,
                        struct vm_error **err);
/* Wait until everything is acknowledged (applied at the receiver), and released. */
int channel_sender_flush(struct channel_sender *s, int64_t deadline_ns, struct vm_error **err);
/* Tell the receiver that nothing more comes, and flush. Only stats and destroy may follow. */
int channel_sender_end(struct channel_sender *s, int64_t deadline_ns, struct vm_error **err);
/* The same in two steps, so that several channels end together: flush must follow. */
int channel_sender_begin_end(struct channel_sender *s, struct vm_error **err);

/* Any thread: */

/* Bound of the unacknowledged bytes. A job gives each of its channels an equal share. */
void channel_sender_set_window(struct channel_sender *s, size_t bytes);
/*
 * Bound it by time instead: what is acknowledged in `ms` at the measured rate, within [min, max].
 * All that is in flight when a guest is paused adds to its pause. Each channel measures its own
 * rate, so together they hold the link's. Never less than two round trips' worth, which would
 * starve the link.
 */
void channel_sender_set_window_time(struct channel_sender *s, unsigned ms, size_t min, size_t max);
void channel_sender_get_stats(struct channel_sender *s, struct channel_sender_stats *ret_stats);

/* ---- Receiving side ---- */

struct channel_receiver;

/*
 * What becomes of frames. All are called by the thread in channel_receiver_run, one at a time.
 * An error is final: the sender is told its kind and message, and run returns it.
 */
struct channel_receiver_ops {
    /*
     * A frame begins. Its header and meta are verified (sum, length), its payload is not. Say
     * where payload_len bytes go: fill ret_iov (room for CHANNEL_IOV_MAX; the lengths add up to
     * payload_len) and return the number of entries, or -1. meta is valid until commit or abort.
     */
    int (*begin)(void *arg, uint16_t type, const void *meta, size_t meta_len, size_t payload_len,
                 struct iovec *ret_iov, struct vm_error **err);
    /* The payload is complete and verified: apply the frame. May block (that is back-pressure). */
    int (*commit)(void *arg, struct vm_error **err);
    /* The connection was lost in the midst of the frame; it will begin again. May be NULL. */
    void (*abort)(void *arg);
};

struct channel_receiver_params {
    struct channel_id id;
    struct channel_receiver_ops ops;
    void *arg;
    int cancel_fd; /* or -1 */
};

struct channel_receiver_stats {
    uint64_t frames_applied;
    uint64_t bytes_applied;   /* headers, meta, payload */
    uint64_t frames_repeated; /* came again though applied; our sender never does that */
    uint64_t connections;
};

/* What a connection says it is for. */
struct channel_hello {
    struct channel_id id;
    uint64_t first_seq; /* the lowest number that the sender still has */
};

/* Read and validate it, to find the receiver it is for. PROTOCOL, VERSION, or as conn_read_full. */
int channel_hello_receive(struct conn *conn, struct channel_hello *ret_hello, int64_t deadline_ns,
                          int cancel_fd, struct vm_error **err);
/* There is no such receiver: say so. The sender ends with `reason`'s kind and message. */
int channel_hello_refuse(struct conn *conn, const struct vm_error *reason, int64_t deadline_ns,
                         int cancel_fd, struct vm_error **err);

struct channel_receiver *channel_receiver_create(const struct channel_receiver_params *params,
                                                 struct vm_error **err);
/* When no thread is in run any more. */
void channel_receiver_destroy(struct channel_receiver *r);

enum channel_run_result {
    CHANNEL_ENDED = 0, /* the sender has ended the channel; everything was applied */
    CHANNEL_LOST = 1,  /* the connection broke or another took over; wait for the next */
};

/*
 * Serve a connection until it ends, breaks, or another takes over. Verifies the hello (a wrong
 * token is DENIED, said to the peer and returned as CHANNEL_LOST: it does not harm the channel).
 * conn stays the caller's. After CHANNEL_ENDED keep answering connections for as long as the
 * session lives: the last acknowledgement may be lost, and the sender asks again. Returns enum
 * channel_run_result, or -1: an error of an op, PROTOCOL, or CANCELLED. Any thread may call.
 */
int channel_receiver_run(struct channel_receiver *r, struct conn *conn,
                         const struct channel_hello *hello, struct vm_error **err);
void channel_receiver_get_stats(struct channel_receiver *r,
                                struct channel_receiver_stats *ret_stats);
/*
 * When the sender was last heard of, monotonic: a connection of its, or a byte of a frame. 0: never; INT64_MAX: a frame
 * is being applied, so that it is not the sender who is slow. Any thread.
 */
int64_t channel_receiver_heard_ns(struct channel_receiver *r);

DEFINE_CLEANUP(channel_sender, struct channel_sender *, channel_sender_destroy)
DEFINE_CLEANUP(channel_receiver, struct channel_receiver *, channel_receiver_destroy)

#endif

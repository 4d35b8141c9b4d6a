/* SPDX-License-Identifier: Apache-2.0 */
/*
 * pair: both ends of a channel in one process, and between them a link that a test can cut.
 *
 *     struct pair *p = pair_create(&(struct pair_settings){.link = cut_after_100, ...});
 *     pair_send(p, 5, 1000);                  five frames of 1000 bytes
 *     assert_int_equal(channel_sender_flush(p->sender, ...), 0);
 *     pair_check(p);                          all applied, once, in order, unharmed
 *     pair_destroy(p);
 *
 * Frames are numbered by their meta, and their payload follows from the number, so the receiving
 * end notices whatever is lost, repeated, reordered or damaged, at once.
 */
#ifndef VMMIG_TESTS_CHANNEL_PAIR_H
#define VMMIG_TESTS_CHANNEL_PAIR_H

#include "migrate/channel.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

/* What becomes of one connection. Bytes are counted from its start; UINT64_MAX: never. */
struct link_plan {
    uint64_t cut_forward;   /* cut when so many bytes have gone from sender to receiver */
    uint64_t cut_backward;  /* the other way */
    uint64_t hang_forward;  /* from there on nothing passes, either way, and nobody is told */
    uint64_t flip_forward;  /* the byte there is damaged */
    uint64_t hold_backward; /* from there on nothing passes back, for hold_ms */
    int hold_ms;
    uint64_t rate;          /* forward, bytes a second; 0: no limit */
    bool refuse;            /* connecting fails */
};
#define LINK_CLEAN                                                                                 \
    (struct link_plan)                                                                             \
    {                                                                                              \
        .cut_forward = UINT64_MAX, .cut_backward = UINT64_MAX, .hang_forward = UINT64_MAX,         \
        .flip_forward = UINT64_MAX, .hold_backward = UINT64_MAX                                    \
    }

struct pair_settings {
    /* The plan of connection number n (0, 1, ...); NULL: all clean. */
    struct link_plan (*plan)(void *arg, unsigned n);
    void *plan_arg;
    struct conn_context *dial, *accept; /* NULL: plain */
    bool tcp; /* over loopback, without a relay: no plans */
    struct rate_limit *limit;
    int64_t outage_limit_ns;
    int cancel_fd;                   /* 0: none */
    void (*on_commit)(void *arg, uint64_t number); /* may block; may be NULL */
    void *commit_arg;
    uint64_t fail_commit_at;         /* frame number whose commit fails; 0: none */
    bool wrong_token;
};

#define PAIR_CONNECTIONS_MAX 2048

struct pair {
    struct pair_settings settings;
    struct conn_context *plain;
    struct channel_sender *sender;
    struct channel_receiver *receiver;
    struct channel_id id;
    uint64_t sent;
    atomic_uint_fast64_t applied, released, aborted;
    atomic_uint connections;
    atomic_bool ended;
    struct vm_error *receiver_error; /* of the first run that failed; read it after pair_stop */
    pthread_mutex_t lock;
    pthread_t threads[2 * PAIR_CONNECTIONS_MAX];
    unsigned n_threads;
    int listener; /* of a pair over TCP */
    char address[32];
    int stop; /* latch */
    /* The frame being received. */
    uint64_t number;
    size_t len;
    uint8_t *got;
};

struct pair *pair_create(const struct pair_settings *settings);
/* Send n frames of `len` payload bytes; fails the test on an error. */
void pair_send(struct pair *p, unsigned n, size_t len);
/* The same, but returns the error. */
int pair_try_send(struct pair *p, size_t len, struct vm_error **err);
/* Flush, end the channel, and check. */
void pair_end(struct pair *p);
/* Everything sent was applied exactly once, and no acknowledged byte twice. */
void pair_check(struct pair *p);
/* End sender and receiver's threads; the receiver's state may be read after. */
void pair_stop(struct pair *p);
void pair_destroy(struct pair *p);

int64_t in_ms(int ms); /* a deadline */

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * meeting: the two ends of a connection, over TCP on loopback.
 *
 *     meet(&m, near, far);        m.dialled and m.accepted, or why there are none
 *     part(&m);
 */
#ifndef VMMIG_TESTS_CHANNEL_MEETING_H
#define VMMIG_TESTS_CHANNEL_MEETING_H

#include "base/clock.h"
#include "migrate/conn.h"

#include <pthread.h>

static inline int64_t in_ms(int ms)
{
    return clock_mono_ns() + ms * NSEC_PER_MSEC;
}

struct meeting {
    int listener;
    char address[32];
    struct conn_context *accept_ctx;
    struct conn *accepted, *dialled;
    struct vm_error *accept_err, *dial_err;
    pthread_t thread;
};

struct conn_context *plain_context(void);
/* Dial as one, accept as the other. */
void meet(struct meeting *m, struct conn_context *dial, struct conn_context *accept);
void part(struct meeting *m);
/* The halves of it. Listen; `fn` is the thread that accepts, in most cases accept_thread. */
void meeting_open(struct meeting *m, struct conn_context *accept_ctx, void *(*fn)(void *));
void meeting_open_at(struct meeting *m, const char *at, struct conn_context *accept_ctx, void *(*fn)(void *));
void *accept_thread(void *arg);
/* A connection without any protocol. */
int raw_dial(const struct meeting *m);
/* One line of that kind, with that text in it. */
void assert_error(struct vm_error *err, enum vm_error_kind kind, const char *text);

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * loop: the event loop of a process (libevent behind it; no other file includes libevent).
 *
 *     struct loop *loop = loop_create(&err);
 *     struct loop_watch *w = loop_watch_fd(loop, fd, LOOP_READ, on_readable, arg, &err);
 *     loop_run(loop);                        // until loop_stop
 *     loop_watch_destroy(w);
 *     loop_destroy(loop);
 *
 * Callbacks run in the thread that is in loop_run. A callback may destroy any watch, its own
 * included. Only loop_post and loop_stop may be called from other threads.
 */
#ifndef VMMIG_BASE_LOOP_H
#define VMMIG_BASE_LOOP_H

#include "base/cleanup.h"
#include "base/error.h"

#include <stdint.h>

struct loop;
struct loop_watch;

enum { LOOP_READ = 1, LOOP_WRITE = 2 };

typedef void loop_fd_fn(int fd, int ready, void *arg); /* ready: LOOP_READ | LOOP_WRITE */
typedef void loop_fn(void *arg);

struct loop *loop_create(struct vm_error **err);
void loop_destroy(struct loop *loop);
/* Run callbacks until loop_stop. */
int loop_run(struct loop *loop, struct vm_error **err);
void loop_stop(struct loop *loop);

/* Call fn while fd is ready for `events`. The fd stays the caller's and outlives the watch. */
struct loop_watch *loop_watch_fd(struct loop *loop, int fd, int events, loop_fd_fn *fn, void *arg,
                                 struct vm_error **err);
/* Change what is watched (0: nothing, for now). */
int loop_watch_set_events(struct loop_watch *w, int events, struct vm_error **err);
/* Call fn every interval_ns. */
struct loop_watch *loop_watch_timer(struct loop *loop, int64_t interval_ns, loop_fn *fn, void *arg,
                                    struct vm_error **err);
/* Call fn after each delivery of the signal. One watch per signal and process. */
struct loop_watch *loop_watch_signal(struct loop *loop, int signum, loop_fn *fn, void *arg,
                                     struct vm_error **err);
void loop_watch_destroy(struct loop_watch *w);

/* From any thread: call fn(arg) once, soon, in the loop's thread, in the order of posting. */
int loop_post(struct loop *loop, loop_fn *fn, void *arg, struct vm_error **err);

DEFINE_CLEANUP(loop, struct loop *, loop_destroy)

#endif

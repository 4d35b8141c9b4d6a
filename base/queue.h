/* SPDX-License-Identifier: Apache-2.0 */
/*
 * queue: pointers from one thread to another, first in, first out, bounded.
 *
 *     producers: queue_put (waits while it is full), at the end queue_close
 *     consumer:  while ((item = queue_get(q))) ...        NULL: closed and empty
 *     anyone:    queue_abort, when things go wrong: puts fail, gets return NULL at once
 *
 * Items that are left in an aborted queue are the destroyer's: queue_destroy gives each to `dispose`.
 */
#ifndef VMMIG_BASE_QUEUE_H
#define VMMIG_BASE_QUEUE_H

#include "base/cleanup.h"
#include "base/error.h"

#include <stdbool.h>
#include <stdint.h>

struct queue;

struct queue *queue_create(unsigned capacity, void (*dispose)(void *item), struct vm_error **err);
void queue_destroy(struct queue *q);
DEFINE_CLEANUP(queue, struct queue *, queue_destroy)

/* Hand over an item (not NULL). False if the queue was closed or aborted: it stays the caller's. */
bool queue_put(struct queue *q, void *item);
/* The next item; NULL once closed and empty, or aborted. */
void *queue_get(struct queue *q);
/* As queue_get, but NULL also when nothing came until the deadline; *ret_ended tells which. */
void *queue_get_until(struct queue *q, int64_t deadline_ns, bool *ret_ended);
/* No more puts; what is inside is still got. */
void queue_close(struct queue *q);
void queue_abort(struct queue *q);
/* Wait until every item that was put was got, and its consumer came back for another. False if aborted. */
bool queue_wait_idle(struct queue *q);
unsigned queue_length(struct queue *q);

#endif

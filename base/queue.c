/* SPDX-License-Identifier: Apache-2.0 */
#include "base/queue.h"

#include "base/cond.h"

struct queue {
    pthread_mutex_t lock;
    pthread_cond_t filled;  /* an item came: each wakes one consumer */
    pthread_cond_t emptied; /* an item was taken, or all are done with */
    void (*dispose)(void *item);
    bool closed, aborted;
    unsigned busy_consumers; /* hold an item that they got */
    unsigned capacity, first, n;
    void *items[];
};

struct queue *queue_create(unsigned capacity, void (*dispose)(void *item), struct vm_error **err)
{
    struct queue *q = calloc(1, sizeof(*q) + capacity * sizeof(*q->items));
    if (!q) {
        error_nomem(err);
        return NULL;
    }
    cond_init(&q->filled);
    cond_init(&q->emptied);
    pthread_mutex_init(&q->lock, NULL);
    q->dispose = dispose;
    q->capacity = capacity;
    return q;
}

void queue_destroy(struct queue *q)
{
    if (!q)
        return;
    for (; q->n; q->n--) {
        if (q->dispose)
            q->dispose(q->items[q->first]);
        q->first = (q->first + 1) % q->capacity;
    }
    pthread_cond_destroy(&q->filled);
    pthread_cond_destroy(&q->emptied);
    pthread_mutex_destroy(&q->lock);
    free(q);
}

bool queue_put(struct queue *q, void *item)
{
    SCOPE_LOCK(&q->lock);
    while (q->n == q->capacity && !q->closed && !q->aborted)
        pthread_cond_wait(&q->emptied, &q->lock);
    if (q->closed || q->aborted)
        return false;
    q->items[(q->first + q->n) % q->capacity] = item;
    q->n++;
    pthread_cond_signal(&q->filled);
    return true;
}

void *queue_get_until(struct queue *q, int64_t deadline_ns, bool *ret_ended)
{
    SCOPE_LOCK(&q->lock);
    /* The consumer is back: what it got before is done with. */
    if (q->busy_consumers)
        q->busy_consumers--;
    if (!q->n)
        pthread_cond_broadcast(&q->emptied);
    while (!q->n && !q->closed && !q->aborted &&
           cond_wait_until(&q->filled, &q->lock, deadline_ns))
        ;
    *ret_ended = q->aborted || (q->closed && !q->n);
    if (!q->n || q->aborted)
        return NULL;
    void *item = q->items[q->first];
    q->first = (q->first + 1) % q->capacity;
    q->n--;
    q->busy_consumers++;
    pthread_cond_broadcast(&q->emptied);
    return item;
}

void *queue_get(struct queue *q)
{
    bool ended;
    return queue_get_until(q, INT64_MAX, &ended);
}

static void wake_all(struct queue *q)
{
    pthread_cond_broadcast(&q->filled);
    pthread_cond_broadcast(&q->emptied);
}

void queue_close(struct queue *q)
{
    SCOPE_LOCK(&q->lock);
    q->closed = true;
    wake_all(q);
}

void queue_abort(struct queue *q)
{
    SCOPE_LOCK(&q->lock);
    q->aborted = true;
    wake_all(q);
}

bool queue_wait_idle(struct queue *q)
{
    SCOPE_LOCK(&q->lock);
    while ((q->n || q->busy_consumers) && !q->aborted)
        pthread_cond_wait(&q->emptied, &q->lock);
    return !q->aborted;
}

unsigned queue_length(struct queue *q)
{
    SCOPE_LOCK(&q->lock);
    return q->n;
}

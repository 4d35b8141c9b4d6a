/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Every SLICE_MS all vCPUs are kicked out of the guest and kept out for as many milliseconds as the percentage
 * says: they sleep in vmmig_vcpu_enter. What is left of the slice begins when the last of them has woken, or one whose
 * thread wakes late, busy cores being what they are, would be kicked out again, and not run at all.
 */
#include "dirtylog/attach_internal.h"

enum { SLICE_MS = 100 };

void attach_throttle_init(struct attach_throttle *t)
{
    pthread_mutex_init(&t->lock, NULL);
    cond_init(&t->changed);
    atomic_init(&t->sleep_until_ns, 0);
}

static void kick_all(struct vmmig_attach *a)
{
    for (unsigned i = 0; i < a->config.n_vcpus; i++)
        a->config.callbacks.kick(a->config.arg, i);
}

/* Until then, or until the percentage is another one. */
static void wait_until(struct attach_throttle *t, unsigned percent, int64_t then)
{
    while (t->percent == percent && cond_wait_until(&t->changed, &t->lock, then))
        ;
}

static void *throttle_main(void *arg)
{
    struct vmmig_attach *a = arg;
    struct attach_throttle *t = &a->throttle;
    SCOPE_LOCK(&t->lock);
    while (t->percent) {
        unsigned percent = t->percent;
        int64_t sleep_ns = percent * (int64_t)SLICE_MS * NSEC_PER_MSEC / 100;
        int64_t until = clock_mono_ns() + sleep_ns;
        atomic_store(&t->sleep_until_ns, until);
        pthread_mutex_unlock(&t->lock);
        kick_all(a);
        pthread_mutex_lock(&t->lock);
        wait_until(t, percent, until);
        while (t->percent == percent && t->sleepers)
            pthread_cond_wait(&t->changed, &t->lock);
        wait_until(t, percent, clock_mono_ns() + SLICE_MS * NSEC_PER_MSEC - sleep_ns);
    }
    return NULL;
}

static void wake(struct attach_throttle *t)
{
    atomic_store(&t->sleep_until_ns, 0);
    pthread_cond_broadcast(&t->changed);
}

int attach_throttle_set(struct vmmig_attach *a, unsigned percent, struct vm_error **err)
{
    struct attach_throttle *t = &a->throttle;
    pthread_mutex_lock(&t->lock);
    t->percent = percent;
    wake(t);
    bool start = percent && !t->started, end = !percent && t->started;
    int failed = start ? pthread_create(&t->thread, NULL, throttle_main, a) : 0;
    if (failed)
        t->percent = 0;
    t->started = percent && !failed;
    pthread_mutex_unlock(&t->lock);
    if (failed)
        return error_errno(err, failed, "cannot start a thread");
    if (end) {
        pthread_join(t->thread, NULL);
        SCOPE_LOCK(&t->lock);
        wake(t); /* of what the thread set on its last way round */
    }
    return 0;
}

void attach_throttle_sleep(struct attach_throttle *t)
{
    if (!atomic_load_explicit(&t->sleep_until_ns, memory_order_relaxed))
        return;
    SCOPE_LOCK(&t->lock);
    int64_t until = atomic_load(&t->sleep_until_ns);
    if (clock_mono_ns() >= until)
        return;
    t->sleepers++;
    while (atomic_load(&t->sleep_until_ns) == until && clock_mono_ns() < until)
        cond_wait_until(&t->changed, &t->lock, until);
    if (--t->sleepers == 0)
        pthread_cond_broadcast(&t->changed);
}

void attach_throttle_finish(struct vmmig_attach *a)
{
    attach_throttle_set(a, 0, NULL);
    pthread_cond_destroy(&a->throttle.changed);
    pthread_mutex_destroy(&a->throttle.lock);
}

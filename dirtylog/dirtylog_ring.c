/* SPDX-License-Identifier: Apache-2.0 */
/*
 * KVM's dirty rings. Entries are collected into a bitmap of our own, by whoever harvests and by vCPU threads
 * whose ring is full; KVM_RESET_DIRTY_RINGS then write protects those pages again. Hence a page is in the
 * collection before it is protected, and is copied after that: nothing leaves the collection while a reset
 * is outstanding.
 *
 * A reset can end early (Linux 6.17 on): when the calling thread has a signal to take, KVM stops where it is. It says
 * how many entries it took, so the rest is asked for again; but up to 64 pages that it had gathered and
 * not yet protected are forgotten then, and what the guest writes there would never be logged any more. So
 * signals are blocked around it. What cannot be blocked (SIGSTOP, a freezer, a debugger) shows in one of two ways: KVM
 * took fewer entries than there were, or the thread slept. The pages of such a reset are `unsure`: every
 * harvest reports them from then on.
 */
#include "base/clock.h"
#include "dirtylog/dirtylog_driver.h"

#include <errno.h>
#include <linux/kvm.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>

/* A kicked vCPU leaves KVM_RUN at once, when its thread gets a CPU. What it still buffers comes later. */
enum { KICK_WAIT_MS = 5 };
/* Resets in a row of which KVM did none, and none is expected of it any more. */
enum { RESETS_MAX = 1000 };

struct ring {
    struct kvm_dirty_gfn *entries;
    uint32_t next; /* the first that was not collected */
};

struct page {
    unsigned slot; /* our index; DIRTYLOG_SLOTS_MAX: of no slot that is tracked */
    uint64_t number;
};

struct ring_state {
    pthread_mutex_t lock; /* guards everything here, and the order of collect and reset */
    struct ring *rings;
    size_t ring_size;
    bool collecting;      /* the slots below are valid */
    uint64_t *collected[DIRTYLOG_SLOTS_MAX];
    uint64_t *unsure[DIRTYLOG_SLOTS_MAX];
    bool any_unsure;
    struct page *batch;   /* of the entries that were collected for the next reset: room for all there are */
    size_t n_batch, unreset; /* entries that KVM has yet to take; none of them may be harvested */
};

static struct ring_state *state_of(struct dirtylog *log)
{
    return log->state;
}

static void destroy(struct dirtylog *log)
{
    struct ring_state *s = state_of(log);
    if (!s)
        return;
    for (unsigned i = 0; s->rings && i < log->params.n_vcpus; i++)
        if (s->rings[i].entries)
            munmap(s->rings[i].entries, s->ring_size);
    free(s->rings);
    free(s->batch);
    pthread_mutex_destroy(&s->lock);
    free(s);
    log->state = NULL;
}

static int create(struct dirtylog *log, const struct dirtylog_params *params, struct vm_error **err)
{
    struct ring_state *s = calloc(1, sizeof(*s));
    if (!s)
        return error_nomem(err);
    log->state = s;
    pthread_mutex_init(&s->lock, NULL);
    s->ring_size = log->params.ring_entries * sizeof(struct kvm_dirty_gfn);
    s->rings = calloc(params->n_vcpus + 1, sizeof(*s->rings));
    s->batch = calloc((size_t)params->n_vcpus * log->params.ring_entries + 1, sizeof(*s->batch));
    if (!s->rings || !s->batch)
        return error_nomem(err);
    for (unsigned i = 0; i < params->n_vcpus; i++) {
        void *entries = mmap(NULL, s->ring_size, PROT_READ | PROT_WRITE, MAP_SHARED,
                             params->vcpu_fds[i], KVM_DIRTY_LOG_PAGE_OFFSET * sysconf(_SC_PAGESIZE));
        if (entries == MAP_FAILED)
            return error_errno(err, errno, "cannot map the dirty ring of vCPU %u", i);
        s->rings[i].entries = entries;
    }
    return 0;
}

/* KVM's slot number, with the address space in its upper half, is not our index. */
static void collect_page(struct dirtylog *log, uint32_t id, uint64_t number)
{
    struct ring_state *s = state_of(log);
    struct page page = {DIRTYLOG_SLOTS_MAX, number};
    for (unsigned i = 0; s->collecting && i < log->n_slots; i++)
        if (log->slots[i].id == id && number < log->slots[i].size / DIRTYLOG_PAGE)
            page.slot = i;
    if (page.slot < DIRTYLOG_SLOTS_MAX)
        s->collected[page.slot][number / 64] |= 1ULL << (number % 64);
    s->batch[s->n_batch++] = page;
    s->unreset++;
}

/* Under the lock. */
static void collect_ring(struct dirtylog *log, struct ring *ring)
{
    const uint32_t mask = log->params.ring_entries - 1;
    for (unsigned n = 0; n <= mask; n++, ring->next++) {
        struct kvm_dirty_gfn *e = &ring->entries[ring->next & mask];
        if (!(__atomic_load_n(&e->flags, __ATOMIC_ACQUIRE) & KVM_DIRTY_GFN_F_DIRTY))
            break;
        collect_page(log, e->slot, e->offset);
        __atomic_store_n(&e->flags, KVM_DIRTY_GFN_F_RESET, __ATOMIC_RELEASE);
    }
}

/* ---- Reset ---- */

static long sleeps_of_thread(void)
{
    struct rusage usage;
    return getrusage(RUSAGE_THREAD, &usage) == 0 ? usage.ru_nvcsw : 0;
}

static void be_unsure(struct ring_state *s)
{
    for (size_t i = 0; i < s->n_batch; i++) {
        const struct page *p = &s->batch[i];
        if (s->collecting && p->slot < DIRTYLOG_SLOTS_MAX)
            s->unsure[p->slot][p->number / 64] |= 1ULL << (p->number % 64);
    }
    s->any_unsure = true;
}

/* Signals are blocked. Returns how many entries KVM took, or -1. */
static int reset_once(struct dirtylog *log, struct vm_error **err)
{
    struct ring_state *s = state_of(log);
    long sleeps = sleeps_of_thread();
    int n = ioctl(log->params.vm_fd, KVM_RESET_DIRTY_RINGS, 0);
    if (n < 0 && errno != EINTR)
        return error_errno(err, errno, "cannot reset the dirty rings");
    n = n < 0 ? 0 : n;
    s->unreset -= (size_t)n < s->unreset ? (size_t)n : s->unreset;
    if (s->unreset || sleeps_of_thread() != sleeps)
        be_unsure(s);
    return n;
}

static int reset_all(struct dirtylog *log, struct vm_error **err)
{
    struct ring_state *s = state_of(log);
    int n = 0;
    for (unsigned idle = 0; s->unreset && idle < RESETS_MAX && n >= 0; idle = n ? 0 : idle + 1)
        n = reset_once(log, err);
    if (n < 0 || s->unreset)
        be_unsure(s);
    s->n_batch = 0;
    if (n < 0)
        return -1;
    return !s->unreset ? 0
                       : error_set(err, VM_ERROR_CONFLICT,
                                   "KVM resets fewer entries of the dirty rings than were collected: "
                                   "does the VMM reset them itself?");
}

static int reset(struct dirtylog *log, struct vm_error **err)
{
    sigset_t all, before;
    if (!state_of(log)->unreset)
        return 0;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int r = reset_all(log, err);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return r;
}

static int collect_all(struct dirtylog *log, struct vm_error **err)
{
    struct ring_state *s = state_of(log);
    SCOPE_LOCK(&s->lock);
    for (unsigned i = 0; i < log->params.n_vcpus; i++)
        collect_ring(log, &s->rings[i]);
    return reset(log, err);
}

static void free_collected(struct ring_state *s)
{
    s->collecting = s->any_unsure = false;
    for (unsigned i = 0; i < DIRTYLOG_SLOTS_MAX; i++) {
        free(steal_ptr(&s->collected[i]));
        free(steal_ptr(&s->unsure[i]));
    }
}

static int start(struct dirtylog *log, struct vm_error **err)
{
    struct ring_state *s = state_of(log);
    SCOPE_LOCK(&s->lock);
    for (unsigned i = 0; i < log->n_slots; i++) {
        s->collected[i] = calloc(dirtylog_words(log->slots[i].size) + 1, sizeof(uint64_t));
        s->unsure[i] = calloc(dirtylog_words(log->slots[i].size) + 1, sizeof(uint64_t));
        if (!s->collected[i] || !s->unsure[i]) {
            free_collected(s);
            return error_nomem(err);
        }
    }
    s->collecting = true;
    return 0;
}

/* What is left in the rings must not fill them: a later start would begin with full ones. */
static void stop(struct dirtylog *log)
{
    struct ring_state *s = state_of(log);
    collect_all(log, NULL);
    SCOPE_LOCK(&s->lock);
    free_collected(s);
}

/* The processor may hold page numbers back until the vCPU leaves the guest. */
static void flush_vcpus(struct dirtylog *log)
{
    const struct dirtylog_params *p = &log->params;
    if (!p->kick || !p->in_guest)
        return;
    int64_t deadline = clock_mono_ns() + KICK_WAIT_MS * NSEC_PER_MSEC;
    for (unsigned i = 0; i < p->n_vcpus; i++)
        if (p->in_guest(p->arg, i))
            p->kick(p->arg, i);
    for (unsigned i = 0; i < p->n_vcpus; i++)
        while (p->in_guest(p->arg, i) && clock_mono_ns() < deadline)
            sched_yield();
}

static int begin_harvest(struct dirtylog *log, struct vm_error **err)
{
    flush_vcpus(log);
    return collect_all(log, err);
}

static int harvest(struct dirtylog *log, unsigned slot, uint64_t *bitmap, struct vm_error **err)
{
    struct ring_state *s = state_of(log);
    size_t words = dirtylog_words(log->slots[slot].size);
    SCOPE_LOCK(&s->lock);
    /* A vCPU whose ring was full since begin_harvest may have failed at it: no page may be copied then. */
    if (reset(log, err) < 0)
        return -1;
    memcpy(bitmap, s->collected[slot], words * sizeof(*bitmap));
    memset(s->collected[slot], 0, words * sizeof(*bitmap));
    for (size_t i = 0; s->any_unsure && i < words; i++)
        bitmap[i] |= s->unsure[slot][i];
    return 0;
}

/*
 * The rings of the others are collected too: KVM_RESET_DIRTY_RINGS handles all, and a full one is seldom
 * alone.
 */
static bool vcpu_exit(struct dirtylog *log, unsigned vcpu, uint32_t exit_reason)
{
    (void)vcpu;
    if (exit_reason != KVM_EXIT_DIRTY_RING_FULL)
        return false;
    atomic_fetch_add(&log->ring_full, 1);
    return collect_all(log, NULL) == 0;
}

const struct dirtylog_driver dirtylog_ring_driver = {.kind = DIRTYLOG_RING,
                                                     .uses_kvm = true,
                                                     .create = create,
                                                     .destroy = destroy,
                                                     .start = start,
                                                     .stop = stop,
                                                     .begin_harvest = begin_harvest,
                                                     .harvest = harvest,
                                                     .vcpu_exit = vcpu_exit};

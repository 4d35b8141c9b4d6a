/* SPDX-License-Identifier: Apache-2.0 */
/*
 * KVM's dirty rings. Entries are collected into a bitmap of our own, by whoever harvests and by vCPU threads
 * whose ring is full; KVM_RESET_DIRTY_RINGS then write protects those pages again. Hence a page is in the
 * collection before it is protected, and is copied after that.
 */
#include "base/clock.h"
#include "dirtylog/dirtylog_driver.h"

#include <errno.h>
#include <linux/kvm.h>
#include <sched.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

/* A kicked vCPU leaves KVM_RUN at once, when its thread gets a CPU. What it still buffers comes later. */
enum { KICK_WAIT_MS = 5 };

struct ring {
    struct kvm_dirty_gfn *entries;
    uint32_t next; /* the first that was not collected */
};

struct ring_state {
    pthread_mutex_t lock; /* guards everything here, and the order of collect and reset */
    struct ring *rings;
    size_t ring_size;
    bool collecting;      /* the slots below are valid */
    uint64_t *collected[DIRTYLOG_SLOTS_MAX];
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
    if (!s->rings)
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
static void collect_page(struct dirtylog *log, uint32_t id, uint64_t page)
{
    struct ring_state *s = state_of(log);
    for (unsigned i = 0; s->collecting && i < log->n_slots; i++) {
        if (log->slots[i].id == id && page < log->slots[i].size / DIRTYLOG_PAGE) {
            s->collected[i][page / 64] |= 1ULL << (page % 64);
            return;
        }
    }
}

/* Under the lock. */
static unsigned collect_ring(struct dirtylog *log, struct ring *ring)
{
    const uint32_t mask = log->params.ring_entries - 1;
    unsigned n = 0;
    for (; n <= mask; n++, ring->next++) {
        struct kvm_dirty_gfn *e = &ring->entries[ring->next & mask];
        if (!(__atomic_load_n(&e->flags, __ATOMIC_ACQUIRE) & KVM_DIRTY_GFN_F_DIRTY))
            break;
        collect_page(log, e->slot, e->offset);
        __atomic_store_n(&e->flags, KVM_DIRTY_GFN_F_RESET, __ATOMIC_RELEASE);
    }
    return n;
}

static int reset(struct dirtylog *log, unsigned collected, struct vm_error **err)
{
    if (collected && ioctl(log->params.vm_fd, KVM_RESET_DIRTY_RINGS, 0) < 0)
        return error_errno(err, errno, "cannot reset the dirty rings");
    return 0;
}

static int collect_all(struct dirtylog *log, struct vm_error **err)
{
    struct ring_state *s = state_of(log);
    unsigned n = 0;
    SCOPE_LOCK(&s->lock);
    for (unsigned i = 0; i < log->params.n_vcpus; i++)
        n += collect_ring(log, &s->rings[i]);
    return reset(log, n, err);
}

static void free_collected(struct ring_state *s)
{
    s->collecting = false;
    for (unsigned i = 0; i < DIRTYLOG_SLOTS_MAX; i++)
        free(steal_ptr(&s->collected[i]));
}

static int start(struct dirtylog *log, struct vm_error **err)
{
    struct ring_state *s = state_of(log);
    SCOPE_LOCK(&s->lock);
    for (unsigned i = 0; i < log->n_slots; i++) {
        s->collected[i] = calloc(dirtylog_words(log->slots[i].size) + 1, sizeof(uint64_t));
        if (!s->collected[i]) {
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
    size_t bytes = dirtylog_words(log->slots[slot].size) * sizeof(*bitmap);
    (void)err;
    SCOPE_LOCK(&s->lock);
    memcpy(bitmap, s->collected[slot], bytes);
    memset(s->collected[slot], 0, bytes);
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

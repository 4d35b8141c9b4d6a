/* SPDX-License-Identifier: Apache-2.0 */
/*
 * vmm_move: moves a guest from one VMM to another that waits for it, on this host, without agents:
 * the attach driver's two halves and a memcpy between them.
 *
 * usage: vmm_move FROM_SOCKET TO_SOCKET ROUNDS
 *
 * The guest is paused after that many rounds; at the end it runs in the second VMM, and the first
 * has ended. Prints what it did, or one line on stderr and status 1.
 */
#include "base/clock.h"
#include "base/cond.h"
#include "base/fault.h"
#include "vmm/attach.h"

#include <stdio.h>
#include <string.h>

struct move {
    struct attach *from, *to;
    const struct guest_region *regions;
    unsigned n_regions, rounds, round;
    uint64_t pages, state_bytes;
    int64_t paused_ns;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool done;
    struct vm_error *error;
};

static int on_pages(void *arg, struct page_batch *batch, struct vm_error **err)
{
    static const uint8_t zero[GUEST_PAGE_SIZE];
    struct move *m = arg;
    for (unsigned i = 0; i < batch->n; i++) {
        const struct page_ref *p = &batch->pages[i];
        uint8_t *to = m->regions[page_addr_region(p->addr)].base +
                      page_addr_number(p->addr) * GUEST_PAGE_SIZE;
        m->pages++;
        if (p->data)
            memcpy(to, p->data, GUEST_PAGE_SIZE);
        else if (memcmp(to, zero, GUEST_PAGE_SIZE)) /* not where nothing is: that would take memory */
            memset(to, 0, GUEST_PAGE_SIZE);
    }
    page_batch_unref(batch);
    return 0;
}

static int on_bytes(void *arg, const void *data, size_t n, struct vm_error **err)
{
    struct move *m = arg;
    cleanup_free uint8_t *copy = malloc(n);
    m->state_bytes += n;
    if (FAULT("move.state") == FAULT_CORRUPT && copy && n) {
        memcpy(copy, data, n);
        copy[n / 2] ^= 1;
        data = copy;
    }
    return guest_sink_bytes(attach_guest(m->to), data, n, INT64_MAX, -1, err);
}

static int on_memory_done(void *arg, struct vm_error **err)
{
    return 0;
}

static void on_done(void *arg, struct vm_error *err)
{
    struct move *m = arg;
    SCOPE_LOCK(&m->lock);
    m->done = true;
    m->error = err;
    pthread_cond_broadcast(&m->changed);
}

static void on_round(void *arg, unsigned round)
{
    struct move *m = arg;
    m->round = round;
    if (round > m->rounds && !m->paused_ns) {
        m->paused_ns = clock_mono_ns();
        guest_pause(attach_guest(m->from), NULL);
    }
}

static const struct guest_source_events events = {.pages = on_pages,
                                                  .bytes = on_bytes,
                                                  .memory_done = on_memory_done,
                                                  .done = on_done,
                                                  .round = on_round};

static int open_ends(struct move *m, const char *from, const char *to, struct vm_error **err)
{
    cleanup_qemu_definition struct qemu_definition d = {0};
    m->from = attach_connect(from, 5000, err);
    if (!m->from || attach_define(m->from, &d, err) < 0)
        return -1;
    m->to = attach_sink_connect(&d, to, 5000, err);
    return m->to ? guest_sink_regions(attach_guest(m->to), &m->regions, &m->n_regions) : -1;
}

static int copy(struct move *m, struct vm_error **err)
{
    struct guest_source_params params = {
        .channels = 1, .regions = m->regions, .n_regions = m->n_regions};
    if (guest_source_start(attach_guest(m->from), &params, &events, m, err) < 0)
        return -1;
    pthread_mutex_lock(&m->lock);
    while (!m->done)
        pthread_cond_wait(&m->changed, &m->lock);
    pthread_mutex_unlock(&m->lock);
    guest_source_stop(attach_guest(m->from), NULL);
    if (!m->error)
        return 0;
    error_propagate(err, m->error);
    return -1;
}

static int hand_over(struct move *m, struct vm_error **err)
{
    if (copy(m, err) < 0 || guest_sink_finish(attach_guest(m->to), INT64_MAX, -1, err) < 0)
        return -1;
    return guest_resume(attach_guest(m->to), err);
}

int main(int argc, char **argv)
{
    cleanup_error struct vm_error *err = NULL;
    struct move m = {.rounds = argc == 4 ? (unsigned)atoi(argv[3]) : 0};
    if (!m.rounds) {
        fprintf(stderr, "usage: vmm_move FROM_SOCKET TO_SOCKET ROUNDS\n");
        return 2;
    }
    pthread_mutex_init(&m.lock, NULL);
    cond_init(&m.changed);
    int r = fault_init(&err) < 0 ? -1 : open_ends(&m, argv[1], argv[2], &err);
    if (r == 0) {
        r = hand_over(&m, &err);
        if (r < 0)
            guest_resume(attach_guest(m.from), NULL);
        else
            guest_quit(attach_guest(m.from), NULL);
    }
    if (r < 0)
        fprintf(stderr, "vmm_move: %s\n", error_message(err));
    else
        printf("rounds=%u pages=%llu state=%llu pause_us=%lld\n", m.round,
               (unsigned long long)m.pages, (unsigned long long)m.state_bytes,
               (long long)(clock_mono_ns() - m.paused_ns) / 1000);
    attach_destroy(m.from);
    attach_destroy(m.to);
    return r < 0;
}

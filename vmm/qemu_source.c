/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/qemu_source.h"

#include "base/clock.h"
#include "base/io.h"
#include "base/log.h"
#include "vmm/qemu_stream.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <pthread.h>
#include <string.h>
#include <sys/socket.h>

struct qemu_source {
    struct qemu_source_params params; /* regions is our own copy */
    int fd, stop_latch;
    pthread_t thread;
    atomic_bool stopping;

    /* The thread's own. */
    struct qemu_stream *parser; /* NULL: params.opaque */
    struct page_pool *pool;
    struct page_slab *slab; /* being read into */
    size_t begin, end;      /* its bytes that were read and not yet parsed */
    struct pool_batch *open[QEMU_SOURCE_CHANNELS_MAX];
    uint8_t bytes[QEMU_SOURCE_BYTES_MAX];
    size_t n_bytes;

    atomic_uint_fast64_t bytes_read, pages, zero_pages, rest_bytes;
    atomic_bool opaque;
};

/* Only the thread counts; others read. */
static void count(atomic_uint_fast64_t *counter, uint64_t n)
{
    atomic_fetch_add_explicit(counter, n, memory_order_relaxed);
}

/* ---- handing over ---- */

static int flush_batch(struct qemu_source *s, unsigned channel, struct vm_error **err)
{
    struct pool_batch *batch = steal_ptr(&s->open[channel]);
    if (!batch)
        return 0;
    count(&s->pages, batch->base.n);
    count(&s->zero_pages, batch->zero_pages);
    return s->params.events->pages(s->params.arg, &batch->base, err);
}

static int give_bytes(struct qemu_source *s, const void *data, size_t n, struct vm_error **err)
{
    count(&s->rest_bytes, n);
    return s->params.events->bytes(s->params.arg, data, n, err);
}

static int flush_bytes(struct qemu_source *s, struct vm_error **err)
{
    size_t n = s->n_bytes;
    s->n_bytes = 0;
    return n ? give_bytes(s, s->bytes, n, err) : 0;
}

static int flush_all(struct qemu_source *s, struct vm_error **err)
{
    for (unsigned i = 0; i < s->params.channels; i++) {
        if (flush_batch(s, i, err) < 0)
            return -1;
    }
    return flush_bytes(s, err);
}

static int stopped(struct vm_error **err)
{
    return error_set(err, VM_ERROR_CANCELLED, "cancelled");
}

/* ---- the parser's events ---- */

static struct pool_batch *take_batch(struct qemu_source *s, unsigned channel, struct vm_error **err)
{
    struct pool_batch *batch = page_pool_take_batch(s->pool, channel, false);
    if (!batch) {
        if (flush_all(s, err) < 0)
            return NULL;
        batch = page_pool_take_batch(s->pool, channel, true);
    }
    if (!batch)
        stopped(err);
    return batch;
}

/* Another stripe begins and the batch is large enough to be worth its way. */
static bool stripe_ends(const struct pool_batch *batch, uint64_t addr)
{
    uint64_t last = batch->base.pages[batch->base.n - 1].addr;
    return batch->base.n >= QEMU_SOURCE_BATCH_GOOD &&
           last / PAGE_STRIPE_PAGES != addr / PAGE_STRIPE_PAGES;
}

static int on_page(void *arg, unsigned region, uint64_t offset, const uint8_t *data,
                   struct vm_error **err)
{
    struct qemu_source *s = arg;
    uint64_t addr = page_addr(region, offset / GUEST_PAGE_SIZE);
    unsigned channel = page_stripe_channel(addr, s->params.channels);
    struct pool_batch *batch = s->open[channel];
    if (batch && (stripe_ends(batch, addr) || !page_pool_fits(batch, addr, s->slab, data))) {
        if (flush_batch(s, channel, err) < 0)
            return -1;
    }
    if (!s->open[channel] && !(s->open[channel] = take_batch(s, channel, err)))
        return -1;
    batch = s->open[channel];
    page_pool_add(batch, addr, s->slab, data);
    return batch->base.n == PAGE_BATCH_MAX ? flush_batch(s, channel, err) : 0;
}

/* Many bytes of the slab that is being read into: it stays for them. */
static int give_held(struct qemu_source *s, const void *data, size_t n, struct vm_error **err)
{
    if (!s->params.events->held_bytes)
        return give_bytes(s, data, n, err);
    struct pool_batch *holder = take_batch(s, 0, err);
    if (!holder)
        return -1;
    page_pool_hold(holder, s->slab);
    count(&s->rest_bytes, n);
    return s->params.events->held_bytes(s->params.arg, data, n, &holder->base, err);
}

static int on_rest(void *arg, const void *data, size_t n, struct vm_error **err)
{
    struct qemu_source *s = arg;
    if (n > sizeof(s->bytes) - s->n_bytes && flush_bytes(s, err) < 0)
        return -1;
    if (n >= sizeof(s->bytes))
        return give_held(s, data, n, err);
    memcpy(s->bytes + s->n_bytes, data, n);
    s->n_bytes += n;
    return 0;
}

static int on_machine(void *arg, const char *name, struct vm_error **err)
{
    log_debug("migration stream begins", "machine=%s", log_q(name));
    return 0;
}

static int match_region(const struct guest_region *region, unsigned number,
                        struct qemu_stream_block *blocks, unsigned n, struct vm_error **err)
{
    for (unsigned i = 0; i < n; i++) {
        if (strcmp(blocks[i].name, region->name) != 0)
            continue;
        if (blocks[i].used_length != region->size)
            return error_set(err, VM_ERROR_REFUSED,
                             "memory %s has %" PRIu64 " bytes in QEMU's migration stream, %" PRIu64
                             " at the destination",
                             region->name, blocks[i].used_length, region->size);
        blocks[i].region = (int)number;
        return 0;
    }
    return error_set(err, VM_ERROR_REFUSED,
                     "QEMU's migration stream has no memory named %s, which the destination has",
                     region->name);
}

static int on_blocks(void *arg, struct qemu_stream_block *blocks, unsigned n, struct vm_error **err)
{
    struct qemu_source *s = arg;
    for (unsigned i = 0; i < s->params.n_regions; i++) {
        if (match_region(&s->params.regions[i], i, blocks, n, err) < 0)
            return -1;
    }
    return 0;
}

static int memory_done(struct qemu_source *s, struct vm_error **err)
{
    if (flush_all(s, err) < 0)
        return -1;
    return s->params.events->memory_done(s->params.arg, err);
}

static int on_memory_end(void *arg, struct vm_error **err)
{
    return memory_done(arg, err);
}

static int on_opaque(void *arg, const char *section, struct vm_error **err)
{
    struct qemu_source *s = arg;
    log_warn("memory goes through QEMU's loader: the stream cannot be taken apart", "section=%s",
             log_q(section));
    atomic_store(&s->opaque, true);
    return 0;
}

static const struct qemu_stream_events PARSER_EVENTS = {
    .machine = on_machine,
    .blocks = on_blocks,
    .page = on_page,
    .rest = on_rest,
    .memory_end = on_memory_end,
    .opaque = on_opaque,
};

/* ---- the thread ---- */

/* A slab with room behind `end`. What was not parsed yet stays in one piece: it moves along. */
static int make_room(struct qemu_source *s, struct vm_error **err)
{
    if (s->slab && s->begin == s->end && page_pool_slab_unused(s->pool, s->slab))
        s->begin = s->end = 0;
    if (s->slab && s->end < PAGE_POOL_SLAB)
        return 0;
    struct page_slab *next = page_pool_take_slab(s->pool, false);
    if (!next) {
        if (flush_all(s, err) < 0)
            return -1;
        next = page_pool_take_slab(s->pool, true);
    }
    if (!next)
        return stopped(err);
    size_t left = s->end - s->begin;
    if (s->slab) {
        memcpy(next->data, s->slab->data + s->begin, left);
        page_pool_put_slab(s->pool, s->slab);
    }
    s->slab = next;
    s->begin = 0;
    s->end = left;
    return 0;
}

/* Wait for the socket; if that takes long, what was begun is handed over first. */
static int wait_for_data(struct qemu_source *s, struct vm_error **err)
{
    cleanup_error struct vm_error *waited = NULL;
    int64_t idle = clock_mono_ns() + QEMU_SOURCE_IDLE_MS * NSEC_PER_MSEC;
    if (io_wait(s->fd, POLLIN, idle, s->stop_latch, &waited) == 0)
        return 0;
    if (waited->kind != VM_ERROR_TIMEOUT)
        return error_propagate(err, steal_ptr(&waited));
    if (flush_all(s, err) < 0)
        return -1;
    return io_wait(s->fd, POLLIN, INT64_MAX, s->stop_latch, err);
}

/* Read into the slab: bytes, or 0 at the end of the file. */
static ssize_t read_some(struct qemu_source *s, struct vm_error **err)
{
    while (!atomic_load_explicit(&s->stopping, memory_order_relaxed)) {
        ssize_t n = recv(s->fd, s->slab->data + s->end, PAGE_POOL_SLAB - s->end, MSG_DONTWAIT);
        if (n >= 0)
            return n;
        if (errno == EAGAIN || errno == EWOULDBLOCK) {
            if (wait_for_data(s, err) < 0)
                return -1;
        } else if (errno != EINTR) {
            return error_errno(err, errno, "cannot read QEMU's migration stream");
        }
    }
    return stopped(err);
}

static int parse(struct qemu_source *s, struct vm_error **err)
{
    size_t consumed = s->end - s->begin;
    const uint8_t *data = s->slab->data + s->begin;
    int r = s->parser ? qemu_stream_feed(s->parser, data, consumed, &consumed, err)
                      : on_rest(s, data, consumed, err);
    s->begin += consumed;
    return r;
}

static int end_of_file(struct qemu_source *s, struct vm_error **err)
{
    if (s->parser && qemu_stream_end(s->parser, err) < 0)
        return -1;
    return atomic_load(&s->opaque) ? memory_done(s, err) : flush_all(s, err);
}

static int run(struct qemu_source *s, struct vm_error **err)
{
    for (;;) {
        if (make_room(s, err) < 0)
            return -1;
        ssize_t n = read_some(s, err);
        if (n < 0)
            return -1;
        if (n == 0)
            return end_of_file(s, err);
        s->end += (size_t)n;
        count(&s->bytes_read, (uint64_t)n);
        if (parse(s, err) < 0)
            return -1;
    }
}

/*
 * A background snapshot that QEMU cannot write to its end leaves the guest's memory write-protected, with nobody to
 * lift that: so the stream is read on, for nobody, until QEMU has no more.
 */
static void drain(struct qemu_source *s)
{
    while (s->slab) {
        ssize_t n = recv(s->fd, s->slab->data, PAGE_POOL_SLAB, 0);
        if (n == 0 || (n < 0 && errno != EINTR && errno != EAGAIN))
            return;
        if (n < 0 && errno == EAGAIN && io_wait(s->fd, POLLIN, INT64_MAX, -1, NULL) < 0)
            return;
    }
}

static void *source_thread(void *arg)
{
    struct qemu_source *s = arg;
    struct vm_error *err = NULL;
    pthread_setname_np(pthread_self(), "vmmig-source");
    bool failed = run(s, &err) < 0;
    for (unsigned i = 0; i < s->params.channels; i++) {
        if (s->open[i])
            page_batch_unref(&steal_ptr(&s->open[i])->base);
    }
    if (failed && s->params.background)
        drain(s);
    if (s->slab)
        page_pool_put_slab(s->pool, steal_ptr(&s->slab));
    s->params.ended(s->params.ended_arg, err);
    return NULL;
}

/* ---- from outside ---- */

int qemu_source_socketpair(int *ret_ours, int *ret_qemus, struct vm_error **err)
{
    int fds[2];
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) < 0)
        return error_errno(err, errno, "socketpair");
    *ret_ours = fds[0];
    *ret_qemus = fds[1];
    return 0;
}

static void source_free(struct qemu_source *s)
{
    page_pool_close(s->pool);
    qemu_stream_destroy(s->parser);
    close_fd(&s->fd);
    close_fd(&s->stop_latch);
    free((void *)(uintptr_t)s->params.regions);
    free(s);
}

static int source_init(struct qemu_source *s, const struct qemu_source_params *params,
                       struct vm_error **err)
{
    size_t pool_bytes = params->pool_bytes ? params->pool_bytes : QEMU_SOURCE_POOL_DEFAULT;
    if (!params->channels || params->channels > QEMU_SOURCE_CHANNELS_MAX ||
        params->n_regions > GUEST_REGIONS_MAX || pool_bytes < QEMU_SOURCE_POOL_MIN)
        return error_set(err, VM_ERROR_USAGE,
                         "a migration source of %u channels, %u regions, %zu bytes",
                         params->channels, params->n_regions, pool_bytes);
    struct guest_region *regions = calloc(params->n_regions + 1, sizeof(*regions));
    s->params.regions = regions;
    if (!regions)
        return error_nomem(err);
    if (params->n_regions)
        memcpy(regions, params->regions, params->n_regions * sizeof(*regions));
    s->fd = fcntl(params->fd, F_DUPFD_CLOEXEC, 0);
    if (s->fd < 0)
        return error_errno(err, errno, "cannot take over QEMU's migration stream");
    s->stop_latch = io_latch_new(err);
    if (s->stop_latch < 0)
        return -1;
    s->pool = page_pool_create((unsigned)(pool_bytes / PAGE_POOL_SLAB), err);
    if (!s->pool)
        return -1;
    atomic_store(&s->opaque, params->opaque);
    if (params->opaque)
        return 0;
    s->parser = qemu_stream_create(&PARSER_EVENTS, s, err);
    if (s->parser && params->background)
        qemu_stream_set_background(s->parser);
    return s->parser ? 0 : -1;
}

struct qemu_source *qemu_source_create(const struct qemu_source_params *params,
                                       struct vm_error **err)
{
    struct qemu_source *s = calloc(1, sizeof(*s));
    if (!s) {
        error_nomem(err);
        return NULL;
    }
    s->params = *params;
    s->params.regions = NULL;
    s->fd = s->stop_latch = -1;
    int r = source_init(s, params, err);
    if (r == 0 && (r = pthread_create(&s->thread, NULL, source_thread, s)) != 0)
        error_errno(err, r, "cannot start the thread of a migration source");
    if (r != 0) {
        source_free(s);
        return NULL;
    }
    return s;
}

void qemu_source_counters(struct qemu_source *s, struct qemu_source_counters *ret_counters)
{
    *ret_counters = (struct qemu_source_counters){
        .bytes_read = atomic_load(&s->bytes_read),
        .pages = atomic_load(&s->pages),
        .zero_pages = atomic_load(&s->zero_pages),
        .rest_bytes = atomic_load(&s->rest_bytes),
        .opaque = atomic_load(&s->opaque),
    };
}

void qemu_source_destroy(struct qemu_source *s)
{
    if (!s)
        return;
    atomic_store(&s->stopping, true);
    io_latch_set(s->stop_latch);
    page_pool_stop(s->pool);
    pthread_join(s->thread, NULL);
    source_free(s);
}

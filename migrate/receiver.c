/* SPDX-License-Identifier: Apache-2.0 */
#include "migrate/receiver.h"

#include "base/cond.h"
#include "base/io.h"
#include "base/log.h"
#include "migrate/page_decoder.h"
#include "migrate/stream_frames.h"

#include <lz4.h>
#include <sys/stat.h>

#define IDLE_LIMIT_NS (60 * NSEC_PER_SEC)
/* The VMM reads its stream at its own pace, but a VMM that takes nothing for so long is stuck. */
#define LOADER_LIMIT_NS (60 * NSEC_PER_SEC)
#define LOOK_NS (200 * NSEC_PER_MSEC)

struct page_lane {
    struct receiver *r;
    struct page_decoder *decoder;
    struct channel_receiver *channel;
    uint64_t applied; /* frames; under the receiver's lock */
    struct page_meta meta; /* of the frame that is being received, for charge_vmm */
    bool complained;
};

/* Channel 0: one frame at a time. */
struct byte_lane {
    struct channel_receiver *channel;
    uint16_t type;
    struct stream_bytes head;
    struct stream_barrier barrier;
    size_t payload_len;
    uint8_t *received, *decoded; /* STREAM_BYTES_MAX each */
};

struct receiver {
    struct receiver_params params;
    unsigned sink_regions[GUEST_REGIONS_MAX];
    int cancel; /* latch of all that this receiver waits in */
    unsigned n_lanes;
    struct page_lane lanes[CHANNELS_MAX];
    struct byte_lane bytes;

    pthread_mutex_t lock; /* guards what follows */
    pthread_cond_t changed;
    unsigned serving;         /* connections */
    int64_t last_served_ns;   /* when the last of them went */
    bool bytes_ended, failed, stopped;
    bool holds_bytes;         /* channel 0 waits for pages of the others */
    struct vm_error *error;
    int64_t load_ns;
};

static void receiver_fail(struct receiver *r, struct vm_error *why)
{
    pthread_mutex_lock(&r->lock);
    if (r->failed) {
        error_free(why);
    } else {
        r->failed = true;
        r->error = why;
    }
    pthread_cond_broadcast(&r->changed);
    pthread_mutex_unlock(&r->lock);
    io_latch_set(r->cancel);
}

/* ---- Page channels ---- */

/* The regions that pages come for may be some of the sink's only. */
static uint64_t sink_addr(const struct receiver *r, uint64_t addr)
{
    return page_addr(r->sink_regions[page_addr_region(addr)], page_addr_number(addr));
}

/*
 * Have the VMM fault in what is about to be written. Pages that become zero are left out: they may
 * stay holes. Failing costs only the right account, so it is said once and no more.
 */
static void charge_vmm(struct page_lane *lane, const void *meta, size_t meta_len, size_t payload_len)
{
    struct page_meta *m = &lane->meta;
    uint64_t addrs[PAGE_BATCH_MAX];
    unsigned n = 0, unit = 0, left = 0;
    cleanup_error struct vm_error *err = NULL;
    if (page_meta_read(meta, meta_len, payload_len, m, NULL) < 0)
        return;
    for (unsigned r = 0; r < m->n_runs; r++) {
        for (uint32_t i = 0; i < m->runs[r].count; i++) {
            while (!left && unit < m->n_units)
                left = m->units[unit++].pages;
            left--;
            if (m->units[unit - 1].kind != PAGE_ZERO)
                addrs[n++] = sink_addr(lane->r, m->runs[r].addr + i);
        }
    }
    if (!n || guest_sink_populate(lane->r->params.guest, addrs, n, &err) == 0 || lane->complained)
        return;
    lane->complained = true;
    log_warn("guest pages are charged to the agent", "error=%s", log_q(error_message(err)));
}

static int pages_begin(void *arg, uint16_t type, const void *meta, size_t meta_len,
                       size_t payload_len, struct iovec *ret_iov, struct vm_error **err)
{
    struct page_lane *lane = arg;
    unsigned n = 0;
    if (type != FRAME_PAGES)
        return error_set(err, VM_ERROR_PROTOCOL, "a frame of type %u on a page channel", type);
    if (page_decoder_begin(lane->decoder, meta, meta_len, payload_len, ret_iov, &n, err) < 0)
        return -1;
    if (lane->r->params.charge_vmm)
        charge_vmm(lane, meta, meta_len, payload_len);
    return (int)n;
}

static int pages_commit(void *arg, struct vm_error **err)
{
    struct page_lane *lane = arg;
    if (page_decoder_commit(lane->decoder, err) < 0)
        return -1;
    SCOPE_LOCK(&lane->r->lock);
    lane->applied++;
    if (lane->r->holds_bytes)
        pthread_cond_broadcast(&lane->r->changed);
    return 0;
}

/* ---- Channel 0 ---- */

static int bytes_begin(void *arg, uint16_t type, const void *meta, size_t meta_len,
                       size_t payload_len, struct iovec *ret_iov, struct vm_error **err)
{
    struct receiver *r = arg;
    struct byte_lane *lane = &r->bytes;
    lane->type = type;
    lane->payload_len = payload_len;
    if (type == FRAME_BARRIER) {
        if (payload_len)
            return error_set(err, VM_ERROR_PROTOCOL, "a barrier has %zu bytes of payload",
                             payload_len);
        return stream_barrier_unpack(meta, meta_len, r->n_lanes, &lane->barrier, err);
    }
    if (type != FRAME_BYTES)
        return error_set(err, VM_ERROR_PROTOCOL, "a frame of type %u on channel 0", type);
    if (stream_bytes_unpack(meta, meta_len, payload_len, &lane->head, err) < 0)
        return -1;
    ret_iov[0] = (struct iovec){lane->received, payload_len};
    return 1;
}

/* Until every page channel has applied as many frames as the barrier says. */
static int wait_for_pages(struct receiver *r, struct vm_error **err)
{
    SCOPE_LOCK(&r->lock);
    r->holds_bytes = true;
    for (unsigned i = 0; i < r->n_lanes; i++)
        while (r->lanes[i].applied < r->bytes.barrier.frames[i] && !r->failed && !r->stopped)
            pthread_cond_wait(&r->changed, &r->lock);
    r->holds_bytes = false;
    if (r->failed || r->stopped)
        return error_set(err, VM_ERROR_CANCELLED, "the copy was stopped");
    return 0;
}

static int bytes_commit(void *arg, struct vm_error **err)
{
    struct receiver *r = arg;
    struct byte_lane *lane = &r->bytes;
    if (lane->type == FRAME_BARRIER)
        return wait_for_pages(r, err);
    const uint8_t *data = lane->received;
    if (lane->head.encoding == STREAM_LZ4) {
        int n = LZ4_decompress_safe((const char *)lane->received, (char *)lane->decoded,
                                    (int)lane->payload_len, STREAM_BYTES_MAX);
        if (n < 0 || (uint32_t)n != lane->head.length)
            return error_set(err, VM_ERROR_PROTOCOL, "a frame of bytes does not decode");
        data = lane->decoded;
    }
    return guest_sink_bytes(r->params.guest, data, lane->head.length,
                            clock_mono_ns() + LOADER_LIMIT_NS, r->cancel, err);
}

static const struct channel_receiver_ops page_ops = {.begin = pages_begin,
                                                     .commit = pages_commit};
static const struct channel_receiver_ops byte_ops = {.begin = bytes_begin,
                                                     .commit = bytes_commit};

/* ---- Connections ---- */

void receiver_serve(struct receiver *r, struct conn *conn, const struct channel_hello *hello)
{
    unsigned number = hello->id.number;
    struct vm_error *err = NULL;
    pthread_setname_np(pthread_self(), "vmmig-receiver");
    if (number > r->n_lanes) {
        cleanup_error struct vm_error *reason = NULL;
        error_set(&reason, VM_ERROR_PROTOCOL, "there is no data channel %u", number);
        channel_hello_refuse(conn, reason, clock_mono_ns() + NSEC_PER_SEC, r->cancel, NULL);
        return;
    }
    pthread_mutex_lock(&r->lock);
    r->serving++;
    pthread_mutex_unlock(&r->lock);
    struct channel_receiver *channel =
        number ? r->lanes[number - 1].channel : r->bytes.channel;
    int result = channel_receiver_run(channel, conn, hello, &err);
    if (result < 0)
        receiver_fail(r, err);
    SCOPE_LOCK(&r->lock);
    r->serving--;
    r->last_served_ns = clock_mono_ns();
    if (result == CHANNEL_ENDED && number == 0)
        r->bytes_ended = true;
    pthread_cond_broadcast(&r->changed);
}

/* With the lock. INT64_MAX: what came is being applied. */
static int64_t last_heard_ns(struct receiver *r)
{
    int64_t last = r->last_served_ns;
    for (unsigned i = r->holds_bytes; i <= r->n_lanes; i++) {
        int64_t heard = channel_receiver_heard_ns(i ? r->lanes[i - 1].channel : r->bytes.channel);
        last = heard > last ? heard : last;
    }
    return last;
}

/* For how long nothing has come, by looks at it: what lies between two that are far apart was not watched. */
struct silence {
    int64_t looked_ns, heard_ns, length_ns;
};

static int64_t silence_look(struct silence *s, int64_t heard_ns)
{
    int64_t now = clock_mono_ns(), passed = now - s->looked_ns;
    bool heard = heard_ns == INT64_MAX || heard_ns != s->heard_ns;
    s->length_ns = heard ? 0 : s->length_ns + (passed < 2 * LOOK_NS ? passed : LOOK_NS);
    s->looked_ns = now;
    s->heard_ns = heard_ns;
    return s->length_ns;
}

static int too_silent(const struct receiver *r, struct vm_error **err)
{
    return error_set(err, VM_ERROR_TIMEOUT, "%s for %d s",
                     r->serving ? "nothing came from the source" : "no data connection",
                     (int)(r->params.idle_limit_ns / NSEC_PER_SEC));
}

/* Channel 0 was ended by the sender: the barrier was passed, all bytes are with the VMM. */
static int wait_for_bytes(struct receiver *r, struct vm_error **err)
{
    struct silence silence = {.looked_ns = clock_mono_ns()};
    SCOPE_LOCK(&r->lock);
    while (!r->bytes_ended && !r->failed && !r->stopped) {
        cond_wait_until(&r->changed, &r->lock, clock_mono_ns() + LOOK_NS);
        bool cancelled = r->params.cancel_fd >= 0 && io_latch_is_set(r->params.cancel_fd);
        if (cancelled)
            return error_set(err, VM_ERROR_CANCELLED, "cancelled");
        if (silence_look(&silence, last_heard_ns(r)) > r->params.idle_limit_ns)
            return too_silent(r, err);
    }
    if (r->failed)
        return error_propagate(err, error_copy(r->error));
    return r->stopped ? error_set(err, VM_ERROR_CANCELLED, "the copy was stopped") : 0;
}

int receiver_wait(struct receiver *r, struct vm_error **err)
{
    if (wait_for_bytes(r, err) < 0)
        return -1;
    int64_t start = clock_mono_ns();
    if (guest_sink_finish(r->params.guest, start + LOADER_LIMIT_NS, r->cancel, err) < 0)
        return -1;
    SCOPE_LOCK(&r->lock);
    r->load_ns = clock_mono_ns() - start;
    return 0;
}

void receiver_stop(struct receiver *r)
{
    pthread_mutex_lock(&r->lock);
    r->stopped = true;
    pthread_cond_broadcast(&r->changed);
    pthread_mutex_unlock(&r->lock);
    io_latch_set(r->cancel);
}

void receiver_stats(struct receiver *r, struct receiver_stats *ret_stats)
{
    *ret_stats = (struct receiver_stats){0};
    for (unsigned i = 0; i <= r->n_lanes; i++) {
        struct channel_receiver_stats st;
        channel_receiver_get_stats(i ? r->lanes[i - 1].channel : r->bytes.channel, &st);
        ret_stats->wire_bytes += st.bytes_applied;
        ret_stats->frames += st.frames_applied;
        ret_stats->connections += st.connections;
    }
    SCOPE_LOCK(&r->lock);
    ret_stats->load_ns = r->load_ns;
}

/* ---- Life ---- */

static struct channel_receiver *make_channel(struct receiver *r, unsigned number,
                                             const struct channel_receiver_ops *ops, void *arg,
                                             struct vm_error **err)
{
    struct channel_receiver_params params = {
        .id = {.attempt = r->params.attempt,
               .token = r->params.token,
               .number = (uint16_t)number},
        .ops = *ops,
        .arg = arg,
        .cancel_fd = r->cancel};
    return channel_receiver_create(&params, err);
}

static int make_lanes(struct receiver *r, struct vm_error **err)
{
    const struct receiver_params *p = &r->params;
    for (unsigned i = 0; i < p->channels; i++) {
        struct page_lane *lane = &r->lanes[i];
        struct page_decoder_config config = {.regions = p->regions,
                                             .n_regions = p->n_regions,
                                             .channel = i,
                                             .n_channels = p->channels,
                                             .may_punch = true};
        lane->r = r;
        lane->decoder = page_decoder_create(&config, err);
        lane->channel = lane->decoder ? make_channel(r, i + 1, &page_ops, lane, err) : NULL;
        if (!lane->channel)
            return -1;
        r->n_lanes++;
    }
    r->bytes.received = malloc(STREAM_BYTES_MAX);
    r->bytes.decoded = malloc(STREAM_BYTES_MAX);
    if (!r->bytes.received || !r->bytes.decoded)
        return error_nomem(err);
    r->bytes.channel = make_channel(r, 0, &byte_ops, r, err);
    return r->bytes.channel ? 0 : -1;
}

struct receiver *receiver_create(const struct receiver_params *params, struct vm_error **err)
{
    if (!params->channels || params->channels >= CHANNELS_MAX) {
        error_set(err, VM_ERROR_PROTOCOL, "%u page channels; 1 to %d are possible",
                  params->channels, CHANNELS_MAX - 1);
        return NULL;
    }
    CLEANUP(receiver) struct receiver *r = calloc(1, sizeof(*r));
    if (!r) {
        error_nomem(err);
        return NULL;
    }
    r->params = *params;
    if (!r->params.idle_limit_ns)
        r->params.idle_limit_ns = IDLE_LIMIT_NS;
    r->last_served_ns = clock_mono_ns();
    pthread_mutex_init(&r->lock, NULL);
    cond_init(&r->changed);
    r->cancel = io_latch_new(err);
    if (r->cancel < 0 || make_lanes(r, err) < 0)
        return NULL;
    for (unsigned i = 0; i < params->n_regions && i < GUEST_REGIONS_MAX; i++)
        r->sink_regions[i] = params->sink_regions ? params->sink_regions[i] : i;
    r->params.regions = NULL; /* the decoders have copies */
    r->params.sink_regions = NULL;
    return steal_ptr(&r);
}

uint64_t receiver_memory(const struct receiver *r)
{
    const struct guest_region *regions;
    unsigned n;
    uint64_t sum = 0;
    struct stat st;
    guest_sink_regions(r->params.guest, &regions, &n);
    for (unsigned i = 0; i < n; i++)
        if (regions[i].file > 0 && fstat(regions[i].file, &st) == 0)
            sum += (uint64_t)st.st_blocks * 512;
    return sum;
}

void receiver_destroy(struct receiver *r)
{
    if (!r)
        return;
    for (unsigned i = 0; i < CHANNELS_MAX; i++) {
        channel_receiver_destroy(r->lanes[i].channel);
        page_decoder_destroy(r->lanes[i].decoder);
    }
    channel_receiver_destroy(r->bytes.channel);
    free(r->bytes.received);
    free(r->bytes.decoded);
    close_fd(&r->cancel);
    error_free(r->error);
    pthread_cond_destroy(&r->changed);
    pthread_mutex_destroy(&r->lock);
    free(r);
}

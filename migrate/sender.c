/* SPDX-License-Identifier: Apache-2.0 */
#include "migrate/sender.h"

#include "base/cond.h"
#include "base/io.h"
#include "migrate/sender_state.h"
#include "migrate/stream_frames.h"

#include <lz4.h>

/* Batches that wait for an encoder; more would only lengthen the pause. */
enum { QUEUE_BATCHES = 4, QUEUE_CHUNKS = 16 };
/* Of all encoders together. With the driver's slabs and what is in flight it keeps the agent below
 * 100 MiB, whatever the guest's size. */
#define ENCODER_MEMORY (44ul << 20)
_Static_assert(SENDER_CHANNELS_MAX * PAGE_ENCODER_MEMORY_MIN <= ENCODER_MEMORY, "no encoder takes more than its share");
/* While so many chunks in a row did not shrink, only one in as many is tried. */
enum { BYTES_PATIENCE = 16 };
enum { SETTLE_STEP_MS = 2 };
enum { OPEN_TIMEOUT_MS = 15000, OPEN_STEP_MS = 50 };

/* A frame on its way: what must stay until it is acknowledged. */
struct page_frame {
    struct sender *s;
    struct encoded_batch encoded;
    struct page_batch *batch; /* NULL unless the encoded batch borrows from it */
};

/* The next frame for channel 0: bytes, or a barrier if length is 0. */
struct byte_frame {
    size_t length;
    struct stream_barrier barrier;
    uint8_t meta[STREAM_BARRIER_META_MAX];
    struct page_batch *holder; /* of the data, NULL: they are the frame's own */
    const uint8_t *data;
    uint8_t own[];
};

/* ---- Failure: the first one counts, and everything stops ---- */

static void sender_fail(struct sender *s, struct vm_error *why)
{
    pthread_mutex_lock(&s->lock);
    if (s->failed) {
        error_free(why);
    } else {
        s->failed = true;
        s->error = why;
    }
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->lock);
    io_latch_set(s->cancel);
    queue_abort(s->chunks);
    for (unsigned i = 0; i < s->params.channels; i++)
        queue_abort(s->workers[i].batches);
}

static bool sender_failed(struct sender *s)
{
    SCOPE_LOCK(&s->lock);
    return s->failed;
}

/* ---- Page workers: batches of one channel, encoded and sent in their order ---- */

static void release_page_frame(void *arg)
{
    struct page_frame *f = arg;
    atomic_fetch_add(&f->s->pages_acked, f->encoded.sample.pages);
    atomic_fetch_add(&f->s->page_bytes_acked, f->encoded.meta_len + f->encoded.payload_len);
    encoded_batch_finish(&f->encoded);
    page_batch_unref(f->batch);
    free(f);
}

static void dispose_batch(void *item)
{
    page_batch_unref(item);
}

/* What would another mode have made of the batch? Asked before it goes: then its memory goes, too. */
static void probe(struct page_worker *w, enum page_mode used)
{
    struct sender *s = w->s;
    struct page_sample a, b;
    enum page_mode other;
    pthread_mutex_lock(&s->policy_lock);
    bool wanted = policy_wants_probe(&s->policy, &other);
    pthread_mutex_unlock(&s->policy_lock);
    if (!wanted)
        return;
    page_encoder_probe(w->encoder, used, true, &a);
    page_encoder_probe(w->encoder, other, false, &b);
    SCOPE_LOCK(&s->policy_lock);
    policy_note_probe(&s->policy, &a, &b);
}

/* Encode the batch and give it to the channel. */
static int send_batch(struct page_worker *w, struct page_batch *batch, struct vm_error **err)
{
    struct sender *s = w->s;
    struct page_frame *f = calloc(1, sizeof(*f));
    if (!f)
        return error_nomem(err);
    f->s = s;
    f->batch = batch;
    page_batch_ref(batch);
    pthread_mutex_lock(&s->policy_lock);
    enum page_mode mode = policy_choose(&s->policy);
    pthread_mutex_unlock(&s->policy_lock);
    if (page_encoder_encode(w->encoder, batch, mode, &f->encoded, err) < 0) {
        release_page_frame(f);
        return -1;
    }
    pthread_mutex_lock(&s->policy_lock);
    policy_note_batch(&s->policy, &f->encoded.sample);
    w->stats = *page_encoder_stats(w->encoder);
    pthread_mutex_unlock(&s->policy_lock);
    if (!f->encoded.borrows_input)
        page_batch_unref(steal_ptr(&f->batch));
    if (!f->encoded.meta_len) {
        release_page_frame(f);
        return 0;
    }
    struct channel_frame frame = {.type = FRAME_PAGES,
                                  .meta = f->encoded.meta,
                                  .meta_len = f->encoded.meta_len,
                                  .payload = f->encoded.payload,
                                  .n_payload = (int)f->encoded.n_payload,
                                  .release = release_page_frame,
                                  .release_arg = f};
    probe(w, mode);
    int64_t before = clock_mono_ns();
    if (channel_sender_send(s->channels[w->number], &frame, err) < 0)
        return -1;
    atomic_fetch_add(&s->blocked_ns, clock_mono_ns() - before);
    atomic_fetch_add(&w->frames, 1);
    return 0;
}

static void *page_worker_main(void *arg)
{
    struct page_worker *w = arg;
    struct page_batch *batch;
    pthread_setname_np(pthread_self(), "vmmig-encoder");
    while ((batch = queue_get(w->batches))) {
        struct vm_error *err = NULL;
        int sent = send_batch(w, batch, &err);
        atomic_fetch_add(&w->s->pages_out, batch->n);
        page_batch_unref(batch);
        if (sent < 0) {
            sender_fail(w->s, err);
            break;
        }
    }
    return NULL;
}

/* ---- Channel 0: the loader's bytes and the barrier ---- */

static void free_byte_frame(void *arg)
{
    struct byte_frame *f = arg;
    page_batch_unref(f->holder);
    free(f);
}

/* With room for n bytes of its own. */
static struct byte_frame *new_byte_frame(size_t n, struct vm_error **err)
{
    struct byte_frame *f = malloc(sizeof(*f) + n);
    if (!f) {
        error_nomem(err);
        return NULL;
    }
    *f = (struct byte_frame){.length = n, .data = f->own};
    return f;
}

/* Each takes the frame over. */
static int send_barrier(struct sender *s, struct byte_frame *f, struct vm_error **err)
{
    struct channel_frame frame = {.type = FRAME_BARRIER,
                                  .meta = f->meta,
                                  .meta_len = stream_barrier_pack(&f->barrier, f->meta),
                                  .release = free_byte_frame,
                                  .release_arg = f};
    return channel_sender_send(s->channels[0], &frame, err);
}

/* The user or the policy may have turned it off; and what did not shrink for long is tried rarely. */
static bool may_compress(struct sender *s)
{
    if (s->params.compress == POLICY_NONE)
        return false;
    if (s->futile >= BYTES_PATIENCE && ++s->skipped < BYTES_PATIENCE)
        return false;
    s->skipped = 0;
    SCOPE_LOCK(&s->policy_lock);
    return s->policy.mode != PAGE_MODE_RAW;
}

/* A shorter frame with the same bytes, or NULL if they do not shrink. */
static struct byte_frame *shrink(struct sender *s, const struct byte_frame *f, size_t *ret_len)
{
    int room = (int)(f->length - f->length / 32);
    struct byte_frame *out = new_byte_frame((size_t)room, NULL);
    int n = out ? LZ4_compress_default((const char *)f->data, (char *)out->own, (int)f->length, room) : 0;
    s->futile = n > 0 ? 0 : s->futile + 1;
    if (n <= 0) {
        free(out);
        return NULL;
    }
    *ret_len = (size_t)n;
    return out;
}

static int send_bytes(struct sender *s, struct byte_frame *f, struct vm_error **err)
{
    struct stream_bytes head = {(uint32_t)f->length, STREAM_PLAIN};
    size_t n = f->length;
    struct byte_frame *shorter = may_compress(s) ? shrink(s, f, &n) : NULL;
    if (shorter) {
        head.encoding = STREAM_LZ4;
        free_byte_frame(f);
        f = shorter;
    }
    stream_bytes_pack(&head, f->meta);
    struct iovec iov = {(void *)(uintptr_t)f->data, n};
    struct channel_frame frame = {.type = FRAME_BYTES,
                                  .meta = f->meta,
                                  .meta_len = STREAM_BYTES_META,
                                  .payload = &iov,
                                  .n_payload = 1,
                                  .release = free_byte_frame,
                                  .release_arg = f};
    return channel_sender_send(s->channels[0], &frame, err);
}

static void *byte_worker_main(void *arg)
{
    struct sender *s = arg;
    pthread_setname_np(pthread_self(), "vmmig-bytes");
    struct byte_frame *f;
    while ((f = queue_get(s->chunks))) {
        struct vm_error *err = NULL;
        size_t length = f->length;
        if ((f->length ? send_bytes(s, f, &err) : send_barrier(s, f, &err)) < 0) {
            sender_fail(s, err);
            break;
        }
        atomic_fetch_add(&s->bytes_out, length);
    }
    return NULL;
}

/* ---- What the driver gives ---- */

static int stopped(struct vm_error **err)
{
    return error_set(err, VM_ERROR_CANCELLED, "the copy was stopped");
}

static int on_pages(void *arg, struct page_batch *batch, struct vm_error **err)
{
    struct sender *s = arg;
    unsigned zero = 0;
    for (unsigned i = 0; i < batch->n; i++)
        zero += !batch->pages[i].data;
    atomic_fetch_add(&s->pages_given, batch->n);
    atomic_fetch_add(&s->zero_pages_given, zero);
    if (queue_put(s->workers[batch->channel].batches, batch))
        return 0;
    page_batch_unref(batch);
    return stopped(err);
}

static int put_chunk(struct sender *s, struct byte_frame *f, struct vm_error **err)
{
    if (queue_put(s->chunks, f))
        return 0;
    free_byte_frame(f);
    return stopped(err);
}

static int on_bytes(void *arg, const void *data, size_t n, struct vm_error **err)
{
    struct sender *s = arg;
    atomic_fetch_add(&s->bytes_given, n);
    for (const uint8_t *p = data; n;) {
        size_t length = n < STREAM_BYTES_MAX ? n : STREAM_BYTES_MAX;
        struct byte_frame *f = new_byte_frame(length, err);
        if (!f)
            return -1;
        memcpy(f->own, p, length);
        if (put_chunk(s, f, err) < 0)
            return -1;
        p += length;
        n -= length;
    }
    return 0;
}

static int on_held_bytes(void *arg, const void *data, size_t n, struct page_batch *holder, struct vm_error **err)
{
    struct sender *s = arg;
    struct byte_frame *f = n <= STREAM_BYTES_MAX ? new_byte_frame(0, err) : NULL;
    if (!f) {
        int r = n <= STREAM_BYTES_MAX ? -1 : on_bytes(arg, data, n, err);
        page_batch_unref(holder);
        return r;
    }
    atomic_fetch_add(&s->bytes_given, n);
    f->length = n;
    f->data = data;
    f->holder = holder;
    return put_chunk(s, f, err);
}

/* Every page was given to us; when the workers are idle, their channels' numbers are final. */
static int on_memory_done(void *arg, struct vm_error **err)
{
    struct sender *s = arg;
    struct byte_frame *f = new_byte_frame(0, err);
    if (!f)
        return -1;
    f->barrier.n = s->params.channels;
    for (unsigned i = 0; i < s->params.channels; i++) {
        if (!queue_wait_idle(s->workers[i].batches)) {
            free_byte_frame(f);
            return stopped(err);
        }
        f->barrier.frames[i] = atomic_load(&s->workers[i].frames);
    }
    return put_chunk(s, f, err);
}

static void on_done(void *arg, struct vm_error *err)
{
    struct sender *s = arg;
    if (err) {
        sender_fail(s, err);
        return;
    }
    SCOPE_LOCK(&s->lock);
    s->source_done = true;
    pthread_cond_broadcast(&s->changed);
}

static void on_round(void *arg, unsigned round)
{
    struct sender *s = arg;
    SCOPE_LOCK(&s->lock);
    s->new_round = true;
    pthread_cond_broadcast(&s->changed);
}

static bool is_paused(struct sender *s)
{
    SCOPE_LOCK(&s->lock);
    return s->progress.paused_at_ns != 0;
}

/* Once the guest stands there is no other round to wait for, and over a long link that is a round trip. */
static int flush_while_it_runs(struct sender *s, struct channel_sender *channel, struct vm_error **err)
{
    struct vm_error *why = NULL;
    while (channel_sender_flush(channel, clock_mono_ns() + SETTLE_STEP_MS * NSEC_PER_MSEC, &why) < 0) {
        if (why->kind != VM_ERROR_TIMEOUT)
            return error_propagate(err, why);
        error_free(steal_ptr(&why));
        if (is_paused(s))
            break;
    }
    return 0;
}

/* The driver's thread waits here, so nothing is put into the queues meanwhile, and no worker is in a send. */
static int on_settle(void *arg, int64_t *ret_rtt_ns, struct vm_error **err)
{
    struct sender *s = arg;
    int64_t rtt_ns = 0;
    for (unsigned i = 0; i < s->params.channels; i++)
        if (!queue_wait_idle(s->workers[i].batches))
            return stopped(err);
    for (unsigned i = 1; i <= s->params.channels; i++) {
        struct channel_sender_stats st;
        if (flush_while_it_runs(s, s->channels[i], err) < 0)
            return -1;
        channel_sender_get_stats(s->channels[i], &st);
        rtt_ns = st.rtt_ns > rtt_ns ? st.rtt_ns : rtt_ns;
    }
    *ret_rtt_ns = rtt_ns;
    return 0;
}

static const struct guest_source_events source_events = {.pages = on_pages,
                                                         .settle = on_settle,
                                                         .bytes = on_bytes,
                                                         .held_bytes = on_held_bytes,
                                                         .memory_done = on_memory_done,
                                                         .done = on_done,
                                                         .round = on_round};

/* ---- Life ---- */

struct sender *sender_create(const struct sender_params *params, struct vm_error **err)
{
    CLEANUP(sender) struct sender *s = calloc(1, sizeof(*s));
    if (!s) {
        error_nomem(err);
        return NULL;
    }
    s->params = *params;
    s->cancel = s->halt = -1;
    s->progress.predicted_pause_ns = -1;
    s->progress.runs = s->recorded_runs = params->was_running;
    pthread_mutex_init(&s->lock, NULL);
    pthread_mutex_init(&s->policy_lock, NULL);
    cond_init(&s->changed);
    rate_limit_init(&s->limit, params->max_bandwidth);
    policy_init(&s->policy, &(struct policy_config){.compress = params->compress,
                                                    .workers = params->channels,
                                                    .cores = params->cores,
                                                    .link_rate = params->guest->ops->mapped_source
                                                                     ? POLICY_LINK_FASTEST
                                                                     : 0});
    s->cancel = io_latch_new(err);
    s->halt = s->cancel < 0 ? -1 : io_latch_either(s->cancel, params->cancel_fd, err);
    s->chunks = s->halt < 0 ? NULL : queue_create(QUEUE_CHUNKS, free_byte_frame, err);
    if (!s->chunks)
        return NULL;
    for (unsigned i = 0; i < params->channels; i++) {
        struct page_worker *w = &s->workers[i];
        struct page_encoder_config config = {.regions = params->regions,
                                             .n_regions = params->n_regions,
                                             .channel = i,
                                             .n_channels = params->channels,
                                             .memory = ENCODER_MEMORY,
                                             .destination_zero = params->destination_zero,
                                             .mapped_source = params->guest->ops->mapped_source};
        *w = (struct page_worker){.s = s, .number = i + 1};
        w->batches = queue_create(QUEUE_BATCHES, dispose_batch, err);
        w->encoder = w->batches ? page_encoder_create(&config, err) : NULL;
        if (!w->encoder)
            return NULL;
    }
    return steal_ptr(&s);
}

void sender_note_recorded(struct sender *s, bool runs)
{
    SCOPE_LOCK(&s->lock);
    s->recorded_runs = runs;
}

/* Until the receiver answered on the channel; looks at the caller's latch between. */
static int wait_open(struct sender *s, struct channel_sender *channel, int64_t deadline_ns,
                     struct vm_error **err)
{
    for (;;) {
        struct vm_error *why = NULL;
        int64_t step = clock_mono_ns() + OPEN_STEP_MS * NSEC_PER_MSEC;
        if (channel_sender_wait_open(channel, step < deadline_ns ? step : deadline_ns, &why) == 0)
            return 0;
        int64_t now = clock_mono_ns();
        /* A channel that gave up says so at once, perhaps with the same kind. */
        if (why->kind != VM_ERROR_TIMEOUT || now < step || now >= deadline_ns)
            return error_propagate(err, why);
        error_free(why);
        if (io_latch_is_set(s->halt))
            return error_set(err, VM_ERROR_CANCELLED, "cancelled");
    }
}

static int open_channels(struct sender *s, struct vm_error **err)
{
    const struct sender_params *p = &s->params;
    size_t share = SENDER_WINDOW_ALL / p->channels;
    if (share > SENDER_WINDOW_MAX)
        share = SENDER_WINDOW_MAX;
    for (unsigned i = 0; i <= p->channels; i++) {
        struct channel_sender_params params = {
            .id = {.attempt = p->attempt, .token = p->token, .number = (uint16_t)i},
            .connect = p->connect,
            .connect_arg = p->connect_arg,
            .limit = p->max_bandwidth ? &s->limit : NULL,
            .outage_limit_ns = p->outage_limit_ns,
            .cancel_fd = s->halt};
        s->channels[i] = channel_sender_create(&params, err);
        if (!s->channels[i])
            return -1;
        channel_sender_set_window_time(s->channels[i], SENDER_IN_FLIGHT_MS, SENDER_WINDOW_MIN, share);
    }
    int64_t deadline = clock_mono_ns() + OPEN_TIMEOUT_MS * NSEC_PER_MSEC;
    for (unsigned i = 0; i <= p->channels; i++)
        if (wait_open(s, s->channels[i], deadline, err) < 0)
            return error_wrap(err, "data channel %u", i);
    return 0;
}

static int start_workers(struct sender *s, struct vm_error **err)
{
    int failed = pthread_create(&s->byte_thread, NULL, byte_worker_main, s);
    s->byte_thread_started = !failed;
    for (unsigned i = 0; i < s->params.channels && !failed; i++) {
        struct page_worker *w = &s->workers[i];
        failed = pthread_create(&w->thread, NULL, page_worker_main, w);
        w->started = !failed;
    }
    return failed ? error_errno(err, failed, "cannot start a thread") : 0;
}

/* No more items come: the workers finish what there is (or stop, if the sender failed). */
static void join_workers(struct sender *s)
{
    queue_close(s->chunks);
    for (unsigned i = 0; i < s->params.channels; i++)
        queue_close(s->workers[i].batches);
    for (unsigned i = 0; i < s->params.channels; i++) {
        struct page_worker *w = &s->workers[i];
        if (w->started)
            pthread_join(w->thread, NULL);
        w->started = false;
    }
    if (s->byte_thread_started)
        pthread_join(s->byte_thread, NULL);
    s->byte_thread_started = false;
}

/* Copy until the VMM gave everything away and the workers put all of it into the channels. */
static int copy(struct sender *s, struct vm_error **err)
{
    const struct sender_params *p = &s->params;
    struct guest_source_params source = {.channels = p->channels,
                                         .max_bandwidth = 0,
                                         .downtime_limit_ns = p->downtime_limit_ns,
                                         .regions = p->regions,
                                         .n_regions = p->n_regions};
    if (start_workers(s, err) < 0 ||
        guest_source_start(p->guest, &source, &source_events, s, err) < 0)
        return -1;
    struct vm_error *failure = NULL;
    if (sender_pilot_run(s, &failure) < 0)
        sender_fail(s, failure);
    if (!sender_failed(s))
        join_workers(s);
    sender_note_pause(s);
    struct vm_error *stop_error = NULL;
    if (guest_source_stop(p->guest, &stop_error) < 0)
        sender_fail(s, stop_error);
    return 0;
}

/* All at once: the guest stands. The receiver loads when it has heard the end of channel 0. */
static int end_channels(struct sender *s, struct vm_error **err)
{
    for (unsigned i = s->params.channels + 1; i-- > 0;)
        if (channel_sender_begin_end(s->channels[i], err) < 0)
            return -1;
    for (unsigned i = s->params.channels + 1; i-- > 0;)
        if (channel_sender_flush(s->channels[i], INT64_MAX, err) < 0)
            return -1;
    return 0;
}

/* The copy failed: the destination must see its connections end, and not wait for more. */
static void close_channels(struct sender *s)
{
    struct channel_sender *open[SENDER_CHANNELS_MAX + 1];
    pthread_mutex_lock(&s->lock);
    memcpy(open, s->channels, sizeof(open));
    memset(s->channels, 0, sizeof(s->channels));
    pthread_mutex_unlock(&s->lock);
    for (unsigned i = 0; i <= SENDER_CHANNELS_MAX; i++)
        channel_sender_destroy(open[i]);
}

int sender_run(struct sender *s, struct vm_error **err)
{
    struct vm_error *failure = NULL;
    if (open_channels(s, &failure) < 0 || copy(s, &failure) < 0)
        sender_fail(s, failure);
    join_workers(s);
    if (!sender_failed(s) && end_channels(s, &failure) < 0)
        sender_fail(s, failure);
    struct link_totals link;
    struct sender_progress last = {0};
    sender_read_channels(s, &link, &last);
    if (sender_failed(s))
        close_channels(s);
    SCOPE_LOCK(&s->lock);
    s->progress.wire_bytes = last.wire_bytes;
    s->progress.stream_bytes = last.stream_bytes;
    return s->failed ? error_propagate(err, steal_ptr(&s->error)) : 0;
}

void sender_progress(struct sender *s, struct sender_progress *ret_progress)
{
    pthread_mutex_lock(&s->lock);
    *ret_progress = s->progress;
    pthread_mutex_unlock(&s->lock);
    if (ret_progress->paused_at_ns) { /* so the channels are there */
        struct link_totals link;
        sender_read_channels(s, &link, ret_progress);
        ret_progress->outage_ns = link.outage_ns;
        ret_progress->rtt_ns = link.rtt_ns;
        ret_progress->moved_bytes = ret_progress->wire_bytes + link.acked;
    }
    SCOPE_LOCK(&s->policy_lock);
    for (unsigned i = 0; i < s->params.channels; i++) {
        const struct page_encoder_stats *st = &s->workers[i].stats;
        for (int k = 0; k < PAGE_KIND_COUNT; k++) {
            ret_progress->pages.kinds[k].pages += st->kinds[k].pages;
            ret_progress->pages.kinds[k].bytes_out += st->kinds[k].bytes_out;
            ret_progress->pages.kinds[k].cpu_ns += st->kinds[k].cpu_ns;
        }
        ret_progress->pages.meta_bytes += st->meta_bytes;
    }
}

void sender_destroy(struct sender *s)
{
    if (!s)
        return;
    for (unsigned i = 0; i <= SENDER_CHANNELS_MAX; i++)
        channel_sender_destroy(s->channels[i]);
    for (unsigned i = 0; i < SENDER_CHANNELS_MAX; i++) {
        queue_destroy(s->workers[i].batches);
        page_encoder_destroy(s->workers[i].encoder);
    }
    queue_destroy(s->chunks);
    close_fd(&s->halt);
    close_fd(&s->cancel);
    rate_limit_finish(&s->limit);
    error_free(s->error);
    pthread_cond_destroy(&s->changed);
    pthread_mutex_destroy(&s->policy_lock);
    pthread_mutex_destroy(&s->lock);
    free(s);
}

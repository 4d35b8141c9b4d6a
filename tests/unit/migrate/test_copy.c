/* SPDX-License-Identifier: Apache-2.0 */
/* Both ends of a copy in one process: a guest made of plain memory, whose pages change while they are
 * sent, over real connections. */
#include "base/bytes.h"
#include "base/clock.h"
#include "base/cond.h"
#include "base/io.h"
#include "migrate/receiver.h"
#include "migrate/sender.h"
#include "migrate/stream_frames.h"

#include <arpa/inet.h>
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <poll.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <cmocka.h>

enum { SINK_REGION = 3 }; /* of the one that is copied, among those that the sink has */
enum { PAGES = 4096, CHANNELS = 2, STATE_BYTES = 300000, ROUNDS_BEFORE_CALM = 4 };
#define MEMORY ((size_t)PAGES * GUEST_PAGE_SIZE)

/* ---- A guest whose memory is an array ---- */

struct toy {
    struct guest guest;
    struct guest_region region;
    /* Source: */
    const struct guest_source_events *events;
    void *arg;
    unsigned channels;
    pthread_t thread;
    bool started, stopping, paused;
    bool streams; /* its pages come as the loader's bytes */
    const uint8_t *settles_at; /* the other end's memory: rounds begin when it is the same; NULL: at once */
    unsigned settled, unsettled;
    uint64_t state_bytes; /* as it says of itself */
    int64_t rtt_ns; /* as the engine said */
    atomic_bool user_stopped; /* by who owns it */
    unsigned round;
    atomic_bool done; /* all was given away */
    uint32_t random;
    uint8_t *state; /* STATE_BYTES */
    pthread_mutex_t lock;
    pthread_cond_t changed;
    /* Sink: */
    uint8_t *loaded;
    size_t n_loaded;
    const uint8_t *expected_memory; /* what must be in place when device state comes */
    size_t expected_prefix;
    bool memory_was_complete;
    bool withholds; /* the last bytes are not acknowledged until the receiver is stopped */
    atomic_uint populated, misplaced; /* pages asked for of the region that the sink calls SINK_REGION, and of others */
};

static struct toy *toy_of(struct guest *g)
{
    return (struct toy *)g;
}

static uint32_t next_random(struct toy *t)
{
    t->random = t->random * 1664525 + 1013904223;
    return t->random >> 8;
}

static void change_page(struct toy *t, unsigned page)
{
    uint8_t *p = t->region.base + (size_t)page * GUEST_PAGE_SIZE;
    switch (next_random(t) % 4) {
    case 0:
        memset(p, 0, GUEST_PAGE_SIZE);
        break;
    case 1:
        for (unsigned i = 0; i < GUEST_PAGE_SIZE; i += 4)
            put_le32(p + i, next_random(t) << 8 ^ next_random(t));
        break;
    case 2:
        memset(p, (int)(next_random(t) & 0xff), GUEST_PAGE_SIZE);
        break;
    default:
        put_le32(p + next_random(t) % (GUEST_PAGE_SIZE - 4), next_random(t));
    }
}

static void free_batch(struct page_batch *b)
{
    free(b);
}

/* Pages first..first+n as batches that hold copies, as a driver's buffers do. */
static int give(struct toy *t, const unsigned *pages, unsigned n, struct vm_error **err)
{
    for (unsigned i = 0; t->streams && i < n; i++)
        if (t->events->bytes(t->arg, t->region.base + (size_t)pages[i] * GUEST_PAGE_SIZE, GUEST_PAGE_SIZE, err) < 0)
            return -1;
    for (unsigned i = 0; !t->streams && i < n;) {
        unsigned stripe = pages[i] / PAGE_STRIPE_PAGES;
        struct page_batch *b = calloc(1, sizeof(*b) + PAGE_BATCH_MAX * GUEST_PAGE_SIZE);
        uint8_t *copy = (uint8_t *)(b + 1);
        atomic_init(&b->refs, 1);
        b->release = free_batch;
        b->channel = page_stripe_channel(pages[i], t->channels);
        for (b->n = 0; i < n && pages[i] / PAGE_STRIPE_PAGES == stripe; i++, b->n++) {
            memcpy(copy + (size_t)b->n * GUEST_PAGE_SIZE,
                   t->region.base + (size_t)pages[i] * GUEST_PAGE_SIZE, GUEST_PAGE_SIZE);
            b->pages[b->n] =
                (struct page_ref){page_addr(0, pages[i]), copy + (size_t)b->n * GUEST_PAGE_SIZE};
        }
        if (t->events->pages(t->arg, b, err) < 0)
            return -1;
    }
    return 0;
}

static int settle(struct toy *t, struct vm_error **err)
{
    if (!t->settles_at)
        return 0;
    if (t->events->settle(t->arg, &t->rtt_ns, err) < 0)
        return -1;
    bool same = !memcmp(t->settles_at, t->region.base, MEMORY);
    t->settled += same;
    t->unsettled += !same;
    return 0;
}

static int give_all(struct toy *t, struct vm_error **err)
{
    unsigned dirty[PAGES], n = PAGES;
    for (unsigned i = 0; i < PAGES; i++)
        dirty[i] = i;
    for (t->round = 1;; t->round++) {
        if (t->round > 1)
            t->events->round(t->arg, t->round);
        if (give(t, dirty, n, err) < 0)
            return -1;
        pthread_mutex_lock(&t->lock);
        bool paused = t->paused, stopping = t->stopping;
        pthread_mutex_unlock(&t->lock);
        if (stopping)
            return error_set(err, VM_ERROR_CANCELLED, "stopped");
        if (paused)
            return 0;
        if (settle(t, err) < 0)
            return -1;
        n = 0;
        unsigned changes = t->round < ROUNDS_BEFORE_CALM ? PAGES / 4 : 8;
        for (unsigned page = next_random(t) % 8; page < PAGES && n < changes;
             page += 1 + next_random(t) % (PAGES / changes))
            dirty[n++] = page;
        for (unsigned i = 0; i < n; i++)
            change_page(t, dirty[i]);
        usleep(2000);
    }
}

static void *source_main(void *arg)
{
    struct toy *t = arg;
    struct vm_error *err = NULL;
    int r = t->events->bytes(t->arg, "head", 4, &err);
    if (r == 0)
        r = give_all(t, &err);
    if (r == 0)
        r = t->events->memory_done(t->arg, &err);
    for (size_t at = 0; r == 0 && at < STATE_BYTES; at += 50000)
        r = t->events->bytes(t->arg, t->state + at, 50000, &err);
    t->events->done(t->arg, r == 0 ? NULL : err);
    atomic_store(&t->done, true);
    return NULL;
}

static int toy_pause(struct guest *g, struct vm_error **err)
{
    SCOPE_LOCK(&toy_of(g)->lock);
    toy_of(g)->paused = true;
    return 0;
}

static int toy_status(struct guest *g, struct guest_status *ret_status, struct vm_error **err)
{
    SCOPE_LOCK(&toy_of(g)->lock);
    bool stands = toy_of(g)->paused || atomic_load(&toy_of(g)->user_stopped);
    *ret_status = (struct guest_status){.state = stands ? GUEST_PAUSED : GUEST_RUNNING};
    return 0;
}

static int toy_source_start(struct guest *g, const struct guest_source_params *params,
                            const struct guest_source_events *events, void *arg,
                            struct vm_error **err)
{
    struct toy *t = toy_of(g);
    t->events = events;
    t->arg = arg;
    t->channels = params->channels;
    t->started = pthread_create(&t->thread, NULL, source_main, t) == 0;
    return 0;
}

static int toy_source_progress(struct guest *g, struct guest_source_progress *ret,
                               struct vm_error **err)
{
    *ret = (struct guest_source_progress){.round = toy_of(g)->round,
                                          .total = MEMORY,
                                          .remaining = 8 * GUEST_PAGE_SIZE,
                                          .state_bytes = toy_of(g)->state_bytes,
                                          .paused_at_ns = atomic_load(&toy_of(g)->user_stopped)};
    return 0;
}

static int toy_source_stop(struct guest *g, struct vm_error **err)
{
    struct toy *t = toy_of(g);
    pthread_mutex_lock(&t->lock);
    t->stopping = true;
    pthread_mutex_unlock(&t->lock);
    if (t->started)
        pthread_join(t->thread, NULL);
    t->started = false;
    return 0;
}

static int toy_sink_bytes(struct guest *g, const void *data, size_t n, int64_t deadline_ns,
                          int cancel_fd, struct vm_error **err)
{
    struct toy *t = toy_of(g);
    if (t->streams)
        return t->n_loaded += n, 0;
    if (t->n_loaded == t->expected_prefix)
        t->memory_was_complete = !memcmp(t->region.base, t->expected_memory, MEMORY);
    if (t->n_loaded + n > STATE_BYTES + 4)
        return error_set(err, VM_ERROR_FAILED, "too many bytes");
    if (t->withholds && t->n_loaded + n == STATE_BYTES + 4)
        return io_wait(-1, 0, INT64_MAX, cancel_fd, err);
    memcpy(t->loaded + t->n_loaded, data, n);
    t->n_loaded += n;
    return 0;
}

static int toy_sink_finish(struct guest *g, int64_t deadline_ns, int cancel_fd,
                           struct vm_error **err)
{
    return 0;
}

static int toy_sink_populate(struct guest *g, const uint64_t *addrs, unsigned n, struct vm_error **err)
{
    for (unsigned i = 0; i < n; i++)
        atomic_fetch_add(page_addr_region(addrs[i]) == SINK_REGION ? &toy_of(g)->populated : &toy_of(g)->misplaced, 1);
    return 0;
}

static const struct guest_ops toy_ops = {.driver = "toy",
                                         .pause = toy_pause,
                                         .status = toy_status,
                                         .source_start = toy_source_start,
                                         .source_progress = toy_source_progress,
                                         .source_stop = toy_source_stop,
                                         .sink_populate = toy_sink_populate,
                                         .sink_bytes = toy_sink_bytes,
                                         .sink_finish = toy_sink_finish};

static void toy_init(struct toy *t)
{
    *t = (struct toy){.guest.ops = &toy_ops, .random = 42, .expected_prefix = 4};
    strcpy(t->region.name, "ram");
    t->region.size = MEMORY;
    t->region.page_size = GUEST_PAGE_SIZE;
    t->region.base = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    t->state = malloc(STATE_BYTES);
    t->loaded = malloc(STATE_BYTES + 4);
    pthread_mutex_init(&t->lock, NULL);
    for (unsigned i = 0; i < STATE_BYTES; i++)
        t->state[i] = (uint8_t)next_random(t);
}

static void toy_finish(struct toy *t)
{
    munmap(t->region.base, MEMORY);
    free(t->state);
    free(t->loaded);
    pthread_mutex_destroy(&t->lock);
}

/* ---- The two ends, and a listener between them ---- */

struct world {
    struct toy source, sink;
    struct channel_id id; /* of channel 0 */
    struct conn_context *context;
    struct receiver *receiver;
    char address[64];
    int listen_fd;
    pthread_t listener;
    int cancel;
    int64_t cancelled_ns; /* by cancel_soon */
    pthread_mutex_t lock;
    pthread_cond_t changed;
    unsigned serving;
    struct conn *newest; /* of channel 1 */
    unsigned connections;
};

struct served {
    struct world *w;
    int fd;
};

static void *serve_main(void *arg)
{
    struct served s = *(struct served *)arg;
    free(arg);
    int64_t deadline = clock_mono_ns() + 5 * NSEC_PER_SEC;
    struct conn *conn = conn_accept(s.w->context, s.fd, deadline, s.w->cancel, NULL);
    struct channel_hello hello;
    if (conn && channel_hello_receive(conn, &hello, deadline, s.w->cancel, NULL) == 0) {
        pthread_mutex_lock(&s.w->lock);
        s.w->connections++;
        if (hello.id.number == 1)
            s.w->newest = conn;
        pthread_mutex_unlock(&s.w->lock);
        receiver_serve(s.w->receiver, conn, &hello);
        pthread_mutex_lock(&s.w->lock);
        if (s.w->newest == conn)
            s.w->newest = NULL;
        pthread_mutex_unlock(&s.w->lock);
    }
    conn_destroy(conn);
    SCOPE_LOCK(&s.w->lock);
    s.w->serving--;
    pthread_cond_broadcast(&s.w->changed);
    return NULL;
}

static void *listen_main(void *arg)
{
    struct world *w = arg;
    while (io_wait(w->listen_fd, 1 /* POLLIN */, INT64_MAX, w->cancel, NULL) == 0) {
        struct served *s = malloc(sizeof(*s));
        pthread_t thread;
        *s = (struct served){w, accept4(w->listen_fd, NULL, NULL, SOCK_CLOEXEC)};
        pthread_mutex_lock(&w->lock);
        w->serving++;
        pthread_mutex_unlock(&w->lock);
        pthread_create(&thread, NULL, serve_main, s);
        pthread_detach(thread);
    }
    return NULL;
}

static int dial(void *arg, int64_t deadline_ns, int cancel_fd, struct conn **ret_conn,
                struct vm_error **err)
{
    struct world *w = arg;
    *ret_conn = conn_dial(w->context, w->address, CONN_CHANNEL, deadline_ns, cancel_fd, err);
    return *ret_conn ? 0 : -1;
}

static int64_t idle_limit_ns; /* of the receiver; 0: its own */

static struct sender *make_world_at(struct world *w, enum policy_compress compress, bool was_running,
                                    uint64_t max_bandwidth)
{
    struct vm_error *err = NULL;
    struct uuid attempt = uuid_new();
    struct channel_token token = channel_token_new();
    memset(w, 0, sizeof(*w));
    w->id = (struct channel_id){attempt, token, 0};
    toy_init(&w->source);
    toy_init(&w->sink);
    for (unsigned i = 0; i < PAGES; i += 2)
        change_page(&w->source, i);
    memset(w->sink.region.base, 0xaa, MEMORY); /* of an earlier guest, say */
    w->sink.expected_memory = w->source.region.base;
    w->cancel = io_latch_new(NULL);
    pthread_mutex_init(&w->lock, NULL);
    cond_init(&w->changed);
    struct sockaddr_in bound;
    socklen_t size = sizeof(bound);
    w->context = conn_context_create(&(struct conn_settings){.insecure_plain = true}, &err);
    w->listen_fd = conn_listen("127.0.0.1:0", &err);
    assert_null(err);
    assert_return_code(getsockname(w->listen_fd, (struct sockaddr *)&bound, &size), errno);
    snprintf(w->address, sizeof(w->address), "127.0.0.1:%d", ntohs(bound.sin_port));
    struct receiver_params r = {.guest = &w->sink.guest, .attempt = attempt, .token = token,
                                .channels = CHANNELS, .regions = &w->sink.region, .n_regions = 1,
                                .sink_regions = (const unsigned[]){SINK_REGION}, .charge_vmm = true,
                                .idle_limit_ns = idle_limit_ns, .cancel_fd = -1};
    w->receiver = receiver_create(&r, &err);
    struct sender_params s = {.guest = &w->source.guest, .attempt = attempt, .token = token,
                              .channels = CHANNELS, .regions = &w->source.region, .n_regions = 1,
                              .was_running = was_running, .compress = compress, .cores = 2,
                              .max_bandwidth = max_bandwidth,
                              .downtime_limit_ns = 300 * NSEC_PER_MSEC, .connect = dial,
                              .connect_arg = w, .cancel_fd = w->cancel};
    pthread_create(&w->listener, NULL, listen_main, w);
    struct sender *sender = sender_create(&s, &err);
    assert_non_null(sender);
    return sender;
}

static struct sender *make_world_of(struct world *w, enum policy_compress compress, bool was_running)
{
    return make_world_at(w, compress, was_running, 0);
}

static struct sender *make_world(struct world *w, enum policy_compress compress)
{
    return make_world_of(w, compress, true);
}

static void end_world(struct world *w)
{
    receiver_stop(w->receiver);
    io_latch_set(w->cancel);
    pthread_join(w->listener, NULL);
    pthread_mutex_lock(&w->lock);
    while (w->serving)
        pthread_cond_wait(&w->changed, &w->lock);
    pthread_mutex_unlock(&w->lock);
    receiver_destroy(w->receiver);
    conn_context_destroy(w->context);
    close(w->listen_fd);
    close(w->cancel);
    toy_finish(&w->source);
    toy_finish(&w->sink);
}

static void expect_whole(struct world *w)
{
    assert_memory_equal(w->sink.region.base, w->source.region.base, MEMORY);
    assert_int_equal(w->sink.n_loaded, STATE_BYTES + 4);
    assert_memory_equal(w->sink.loaded, "head", 4);
    assert_memory_equal(w->sink.loaded + 4, w->source.state, STATE_BYTES);
    assert_true(w->sink.memory_was_complete);
}

static void copy_with(enum policy_compress compress)
{
    struct world w;
    struct vm_error *err = NULL;
    struct sender *s = make_world(&w, compress);
    int sent = sender_run(s, &err);
    assert_string_equal(error_message(err), "no error");
    assert_int_equal(sent, 0);
    assert_int_equal(receiver_wait(w.receiver, &err), 0);
    expect_whole(&w);
    struct sender_progress p;
    sender_progress(s, &p);
    assert_true(p.paused_at_ns > 0 && p.runs);
    assert_int_equal(p.acked_resent_bytes, 0);
    assert_true(p.wire_bytes > 0);
    /* Half of its pages were written, a quarter of these with zeros. */
    assert_true(atomic_load(&w.sink.populated) > PAGES / 4);
    assert_int_equal(atomic_load(&w.sink.misplaced), 0);
    sender_destroy(s);
    end_world(&w);
}

/*
 * A driver that asks before a round has all of the former one arrive first: also what is with the
 * channels, 20 ms' worth at this rate, much longer than the comparison takes.
 */
static void a_round_begins_when_the_former_one_has_arrived(void **state)
{
    struct world w;
    struct vm_error *err = NULL;
    struct sender *s = make_world_at(&w, POLICY_NONE, true, 100 << 20);
    w.source.settles_at = w.sink.region.base;
    assert_int_equal(sender_run(s, &err), 0);
    assert_int_equal(receiver_wait(w.receiver, &err), 0);
    assert_true(w.source.settled >= 1);
    assert_int_equal(w.source.unsettled, 0);
    assert_true(w.source.rtt_ns > 0 && w.source.rtt_ns < NSEC_PER_SEC); /* the kernel's: this link is TCP */
    expect_whole(&w);
    sender_destroy(s);
    end_world(&w);
}

static void memory_and_state_arrive_whole(void **state)
{
    copy_with(POLICY_AUTO);
}

/* 64 MB of it: what is measured of so short a copy may be ten times the 100 MB a second of its limit. */
static void device_state_is_part_of_the_predicted_pause(void **state)
{
    int64_t predicted[2];
    for (int large = 0; large < 2; large++) {
        struct world w;
        struct vm_error *err = NULL;
        struct sender_progress p;
        struct sender *s = make_world_at(&w, POLICY_NONE, true, 100 << 20);
        w.source.state_bytes = large ? 64 << 20 : 0;
        assert_int_equal(sender_run(s, &err), 0);
        assert_int_equal(receiver_wait(w.receiver, &err), 0);
        sender_progress(s, &p);
        predicted[large] = p.predicted_pause_ns;
        sender_destroy(s);
        end_world(&w);
    }
    assert_true(predicted[1] >= predicted[0] + 10 * NSEC_PER_MSEC);
}

/* Of memory that goes through the loader the pause is predicted as of any other: within the limit it begins. */
static void memory_that_is_streamed_is_measured(void **state)
{
    struct world w;
    struct vm_error *err = NULL;
    struct sender_progress p;
    struct sender *s = make_world_at(&w, POLICY_NONE, true, 100 << 20);
    w.source.streams = w.sink.streams = true;
    assert_int_equal(sender_run(s, &err), 0);
    assert_int_equal(receiver_wait(w.receiver, &err), 0);
    sender_progress(s, &p);
    assert_true(w.sink.n_loaded > MEMORY);
    assert_false(p.limit_missed);
    assert_in_range(p.predicted_pause_ns, 1, 300 * NSEC_PER_MSEC);
    assert_true(p.link_rate > 0);
    sender_destroy(s);
    end_world(&w);
}

/* A channel of the copy that is connected, and of which the sender says no more than that frame. */
static struct channel_sender *silent_channel(struct world *w, unsigned number, const struct channel_frame *frame)
{
    struct channel_sender_params params = {.id = w->id, .connect = dial, .connect_arg = w, .cancel_fd = -1};
    struct vm_error *err = NULL;
    params.id.number = (uint16_t)number;
    struct channel_sender *channel = channel_sender_create(&params, &err);
    assert_int_equal(channel_sender_wait_open(channel, clock_mono_ns() + 10 * NSEC_PER_SEC, &err), 0);
    if (frame)
        assert_int_equal(channel_sender_send(channel, frame, &err), 0);
    return channel;
}

/* Its connections stay: one that said nothing, and one that announced pages which do not come. */
static void a_sender_that_stands_still_is_not_waited_for(void **state)
{
    struct world w;
    struct vm_error *err = NULL;
    struct stream_barrier barrier = {.n = CHANNELS, .frames = {1, UINT64_MAX}};
    uint8_t meta[STREAM_BARRIER_META_MAX];
    idle_limit_ns = 500 * NSEC_PER_MSEC;
    struct sender *s = make_world(&w, POLICY_LZ4);
    idle_limit_ns = 0;
    struct channel_frame frame = {.type = FRAME_BARRIER, .meta = meta, .meta_len = stream_barrier_pack(&barrier, meta)};
    struct channel_sender *silent = silent_channel(&w, 1, NULL), *waits = silent_channel(&w, 0, &frame);
    int64_t before = clock_mono_ns();
    assert_int_equal(receiver_wait(w.receiver, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_TIMEOUT);
    assert_non_null(strstr(error_message(err), "nothing came from the source"));
    assert_true(clock_mono_ns() - before >= 400 * NSEC_PER_MSEC);
    error_free(err);
    channel_sender_destroy(silent);
    channel_sender_destroy(waits);
    sender_destroy(s);
    end_world(&w);
}

/* Writes down what the guest's user wishes now, some looks of the pilot's later. */
struct recorder {
    struct sender *sender;
    struct world *world;
    bool runs;          /* what he comes to wish */
    bool paused_before; /* the guest was, though that was not written down */
};

static void *recorder_main(void *arg)
{
    struct recorder *r = arg;
    struct sender_progress p;
    do {
        poll(NULL, 0, 1);
        sender_progress(r->sender, &p);
    } while (p.runs != r->runs);
    poll(NULL, 0, 100);
    pthread_mutex_lock(&r->world->source.lock);
    r->paused_before = r->world->source.paused;
    pthread_mutex_unlock(&r->world->source.lock);
    sender_note_recorded(r->sender, r->runs);
    return NULL;
}

/*
 * Whose guest it is stops it, or lets it go on, while it is copied: that is what it does afterwards. It is not paused
 * before that is on record.
 */
static void the_users_own_stop_counts(void **state)
{
    for (int stopped = 0; stopped < 2; stopped++) {
        struct world w;
        struct vm_error *err = NULL;
        struct sender_progress p;
        struct sender *s = make_world_of(&w, POLICY_LZ4, stopped);
        struct recorder recorder = {.sender = s, .world = &w, .runs = !stopped};
        pthread_t thread;
        atomic_store(&w.source.user_stopped, stopped);
        assert_int_equal(pthread_create(&thread, NULL, recorder_main, &recorder), 0);
        assert_int_equal(sender_run(s, &err), 0);
        pthread_join(thread, NULL);
        assert_false(recorder.paused_before);
        sender_progress(s, &p);
        assert_int_equal(p.runs, !stopped);
        assert_int_equal(receiver_wait(w.receiver, &err), 0);
        expect_whole(&w);
        sender_destroy(s);
        end_world(&w);
    }
}

static void every_compression_brings_the_same_memory(void **state)
{
    copy_with(POLICY_NONE);
    copy_with(POLICY_LZ4);
    copy_with(POLICY_ZSTD);
}

static void *run_main(void *arg)
{
    struct vm_error *err = NULL;
    sender_run(arg, &err);
    return err;
}

/* The driver gave everything away and the guest stands: it must not stand until the last acknowledgement comes. */
static void a_copy_is_cancelled_to_its_end(void **state)
{
    struct world w;
    pthread_t thread;
    void *ended;
    struct sender_progress p, later;
    struct sender *s = make_world(&w, POLICY_LZ4);
    w.sink.withholds = true;
    pthread_create(&thread, NULL, run_main, s);
    while (!atomic_load(&w.source.done))
        usleep(1000);
    /* Until it stands still. */
    sender_progress(s, &p);
    for (int64_t still = clock_mono_ns(); clock_mono_ns() - still < 300 * NSEC_PER_MSEC; p = later) {
        usleep(10000);
        sender_progress(s, &later);
        if (later.moved_bytes != p.moved_bytes)
            still = clock_mono_ns();
    }
    assert_true(p.paused_at_ns > 0 && p.moved_bytes > STATE_BYTES);
    assert_int_equal(p.outage_ns, 0);
    io_latch_set(w.cancel);
    int64_t before = clock_mono_ns();
    pthread_join(thread, &ended);
    assert_true(clock_mono_ns() - before < 5 * NSEC_PER_SEC);
    struct vm_error *err = ended;
    assert_int_equal(err->kind, VM_ERROR_CANCELLED);
    error_free(err);
    sender_destroy(s);
    end_world(&w);
}

static void *break_connections(void *arg)
{
    struct world *w = arg;
    for (int i = 0; i < 20; i++) {
        usleep(3000);
        SCOPE_LOCK(&w->lock);
        if (w->newest)
            conn_shutdown(w->newest);
    }
    return NULL;
}

static void lost_connections_do_not_matter(void **state)
{
    struct world w;
    struct vm_error *err = NULL;
    pthread_t breaker;
    struct sender *s = make_world(&w, POLICY_LZ4);
    pthread_create(&breaker, NULL, break_connections, &w);
    int sent = sender_run(s, &err);
    pthread_join(breaker, NULL);
    assert_string_equal(error_message(err), "no error");
    assert_int_equal(sent, 0);
    assert_int_equal(receiver_wait(w.receiver, &err), 0);
    expect_whole(&w);
    struct sender_progress p;
    sender_progress(s, &p);
    assert_int_equal(p.acked_resent_bytes, 0);
    assert_true(w.connections > CHANNELS + 1);
    sender_destroy(s);
    end_world(&w);
}

static void *cancel_soon(void *arg)
{
    struct world *w = arg;
    usleep(5000);
    w->cancelled_ns = clock_mono_ns();
    io_latch_set(w->cancel);
    return NULL;
}

static void a_cancel_ends_it_at_once(void **state)
{
    struct world w;
    struct vm_error *err = NULL;
    pthread_t canceller;
    struct sender *s = make_world(&w, POLICY_LZ4);
    w.sink.withholds = true; /* it does not end before that, however late the other thread is */
    pthread_create(&canceller, NULL, cancel_soon, &w);
    assert_int_equal(sender_run(s, &err), -1);
    int64_t ended_ns = clock_mono_ns();
    assert_int_equal(err->kind, VM_ERROR_CANCELLED);
    error_clear(&err);
    pthread_join(canceller, NULL);
    assert_true(ended_ns - w.cancelled_ns < 2 * NSEC_PER_SEC);
    sender_destroy(s);
    end_world(&w);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(memory_and_state_arrive_whole),
        cmocka_unit_test(a_round_begins_when_the_former_one_has_arrived),
        cmocka_unit_test(device_state_is_part_of_the_predicted_pause),
        cmocka_unit_test(memory_that_is_streamed_is_measured),
        cmocka_unit_test(a_sender_that_stands_still_is_not_waited_for),
        cmocka_unit_test(the_users_own_stop_counts),
        cmocka_unit_test(every_compression_brings_the_same_memory),
        cmocka_unit_test(lost_connections_do_not_matter),
        cmocka_unit_test(a_copy_is_cancelled_to_its_end),
        cmocka_unit_test(a_cancel_ends_it_at_once),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

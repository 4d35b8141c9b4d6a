/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/qemu_source.h"

#include "base/bytes.h"
#include "base/cond.h"
#include "base/io.h"
#include "tests/unit/vmm/stream_maker.h"

#include <inttypes.h>
#include <setjmp.h>
#include <stdarg.h>
#include <sys/socket.h>
#include <cmocka.h>

enum { RAM_PAGES = 8192, VGA_PAGES = 64, M1_PAGES = 2048, HELD_MAX = 256 };

static const struct maker_block BLOCKS[] = {
    {"vga.vram", (uint64_t)VGA_PAGES *GUEST_PAGE_SIZE},
    {"pc.ram", (uint64_t)RAM_PAGES *GUEST_PAGE_SIZE},
    {"m1", (uint64_t)M1_PAGES *GUEST_PAGE_SIZE},
};
static const struct guest_region REGIONS[] = {
    {.name = "m1", .size = (uint64_t)M1_PAGES * GUEST_PAGE_SIZE},
    {.name = "pc.ram", .size = (uint64_t)RAM_PAGES * GUEST_PAGE_SIZE},
};

/* Generous: a test that waits this long has failed. */
static int64_t deadline(void)
{
    return clock_mono_ns() + 20 * NSEC_PER_SEC;
}

/* ---- the engine's part ---- */

struct engine {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    unsigned channels;
    uint32_t fill[2][RAM_PAGES]; /* what each page was filled with last; 0: zero */
    uint64_t pages, batches;
    unsigned last_batch; /* its pages */
    struct buffer bytes;
    bool memory_done;
    size_t bytes_before_done;
    uint64_t pages_before_done;
    bool hold; /* keep what comes in `held` */
    struct page_batch *held[HELD_MAX];
    struct {
        const void *data;
        size_t at, n; /* in `bytes` */
    } lent[HELD_MAX];
    unsigned n_held;
    unsigned fail_at; /* fail at this batch */
    bool ended;
    struct vm_error *err;
    const char *broken; /* what a callback found wrong; an assertion is for the test's own thread */
};

#define EXPECT(e, condition)                                                                       \
    do {                                                                                           \
        if (!(condition))                                                                          \
            (e)->broken = #condition;                                                              \
    } while (0)

static void engine_init(struct engine *e)
{
    memset(e, 0, sizeof(*e));
    pthread_mutex_init(&e->lock, NULL);
    cond_init(&e->changed);
}

static void engine_release(struct engine *e)
{
    SCOPE_LOCK(&e->lock);
    while (e->n_held)
        page_batch_unref(e->held[--e->n_held]);
}

static void engine_finish(struct engine *e)
{
    engine_release(e);
    if (e->broken)
        fail_msg("%s", e->broken);
    buffer_finish(&e->bytes);
    error_clear(&e->err);
    pthread_cond_destroy(&e->changed);
    pthread_mutex_destroy(&e->lock);
}

/* A page consists of one 32-bit number again and again. */
static uint32_t page_number(struct engine *e, const uint8_t *data)
{
    EXPECT(e, memcmp(data, data + 4, GUEST_PAGE_SIZE - 4) == 0);
    return get_le32(data);
}

static void check_batch(struct engine *e, const struct page_batch *b)
{
    EXPECT(e, b->n >= 1 && b->n <= PAGE_BATCH_MAX);
    for (unsigned i = 0; i < b->n; i++) {
        uint64_t addr = b->pages[i].addr;
        EXPECT(e, page_stripe_channel(addr, e->channels) == b->channel);
        EXPECT(e, page_addr_region(addr) < 2);
        for (unsigned j = 0; j < i; j++)
            EXPECT(e, b->pages[j].addr != addr);
    }
}

static int on_pages(void *arg, struct page_batch *b, struct vm_error **err)
{
    struct engine *e = arg;
    SCOPE_LOCK(&e->lock);
    check_batch(e, b);
    for (unsigned i = 0; i < b->n; i++) {
        uint64_t addr = b->pages[i].addr;
        e->fill[page_addr_region(addr)][page_addr_number(addr)] =
            b->pages[i].data ? page_number(e, b->pages[i].data) : 0;
    }
    e->pages += b->n;
    e->batches++;
    e->last_batch = b->n;
    if (e->hold) {
        EXPECT(e, e->n_held < HELD_MAX);
        e->held[e->n_held++ % HELD_MAX] = b;
    } else {
        page_batch_unref(b);
    }
    pthread_cond_broadcast(&e->changed);
    return e->fail_at == e->batches ? error_set(err, VM_ERROR_UNREACHABLE, "the link is gone") : 0;
}

static int on_bytes(void *arg, const void *data, size_t n, struct vm_error **err)
{
    struct engine *e = arg;
    SCOPE_LOCK(&e->lock);
    buffer_put(&e->bytes, data, n);
    pthread_cond_broadcast(&e->changed);
    return 0;
}

static int on_held_bytes(void *arg, const void *data, size_t n, struct page_batch *holder, struct vm_error **err)
{
    struct engine *e = arg;
    size_t at = e->bytes.len;
    on_bytes(e, data, n, NULL);
    SCOPE_LOCK(&e->lock);
    EXPECT(e, e->n_held < HELD_MAX && !holder->n);
    e->lent[e->n_held % HELD_MAX].data = data;
    e->lent[e->n_held % HELD_MAX].at = at;
    e->lent[e->n_held % HELD_MAX].n = n;
    e->held[e->n_held++ % HELD_MAX] = holder;
    return 0;
}

static int on_memory_done(void *arg, struct vm_error **err)
{
    struct engine *e = arg;
    SCOPE_LOCK(&e->lock);
    EXPECT(e, !e->memory_done);
    e->memory_done = true;
    e->bytes_before_done = e->bytes.len;
    e->pages_before_done = e->pages;
    return 0;
}

static void on_ended(void *arg, struct vm_error *err)
{
    struct engine *e = arg;
    SCOPE_LOCK(&e->lock);
    EXPECT(e, !e->ended);
    e->ended = true;
    e->err = err;
    pthread_cond_broadcast(&e->changed);
}

static const struct guest_source_events EVENTS = {
    .pages = on_pages, .bytes = on_bytes, .memory_done = on_memory_done};
static const struct guest_source_events HOLDING = {
    .pages = on_pages, .bytes = on_bytes, .held_bytes = on_held_bytes, .memory_done = on_memory_done};

#define WAIT_FOR(e, condition)                                                                     \
    do {                                                                                           \
        SCOPE_LOCK(&(e)->lock);                                                                    \
        int64_t until = deadline();                                                                \
        while (!(condition))                                                                       \
            assert_true(cond_wait_until(&(e)->changed, &(e)->lock, until));                        \
    } while (0)

/* ---- the source under test, and QEMU's end of its stream ---- */

struct rig {
    struct engine engine;
    struct qemu_source *source;
    int ours, qemu;
};

/* What is sent before rig_start is there as a whole when the source begins (up to 200 KiB). */
static void rig_open(struct rig *r)
{
    engine_init(&r->engine);
    r->source = NULL;
    assert_int_equal(qemu_source_socketpair(&r->ours, &r->qemu, NULL), 0);
}

static void rig_start(struct rig *r, const struct qemu_source_params *like)
{
    struct qemu_source_params params = *like;
    r->engine.channels = params.channels;
    params.fd = r->ours;
    params.events = r->engine.hold ? &HOLDING : &EVENTS;
    params.arg = params.ended_arg = &r->engine;
    params.ended = on_ended;
    r->source = qemu_source_create(&params, NULL);
    assert_non_null(r->source);
    close_fd(&r->ours);
}

static void rig_send(struct rig *r, const struct buffer *b)
{
    assert_false(b->failed);
    assert_int_equal(io_write_full(r->qemu, b->data, b->len, deadline(), -1, NULL), 0);
}

static void rig_finish(struct rig *r)
{
    close_fd(&r->qemu);
    qemu_source_destroy(r->source);
    engine_finish(&r->engine);
}

static const struct qemu_source_params USUAL = {.channels = 4, .regions = REGIONS, .n_regions = 2};

/* ---- streams ---- */

static void put_page(struct buffer *b, const char *name, uint64_t page, uint32_t number)
{
    maker_page(b, name, page, number ? 1 : 0);
    for (unsigned i = 0; number && i < GUEST_PAGE_SIZE; i += 4)
        put_le32(b->data + b->len - GUEST_PAGE_SIZE + i, number);
}

static void begin_stream(struct buffer *b)
{
    maker_header(b, "pc-q35-7.2");
    maker_ram(b, BLOCKS, 3);
}

static void end_stream(struct buffer *b)
{
    maker_records(b, MAKER_END);
    maker_eos(b);
    maker_devices(b, 200000);
}

/* All of the stream but pages of mapped blocks, and what memory_done must come behind. */
struct expected {
    uint32_t fill[2][RAM_PAGES];
    struct buffer rest;
    size_t rest_before_done;
};

/*
 * Rounds over the memory as QEMU makes them, in ascending order: the first over all, the others
 * over some; about 25 MiB with the zero pages, so several slabs.
 */
static void make_rounds(struct buffer *b, struct expected *ret)
{
    unsigned seed = 7;
    uint32_t number = 1;
    memset(ret->fill, 0, sizeof(ret->fill));
    begin_stream(b);
    begin_stream(&ret->rest);
    for (int round = 0; round < 4; round++) {
        maker_records(b, MAKER_PART);
        maker_records(&ret->rest, MAKER_PART);
        for (unsigned i = 0; i < 3; i++) {
            const char *name = BLOCKS[i].name;
            for (uint64_t page = 0; page < BLOCKS[i].size / GUEST_PAGE_SIZE; page++) {
                if (round && rand_r(&seed) % 8)
                    continue;
                uint32_t v = rand_r(&seed) % 2 ? number++ : 0;
                put_page(b, name, page, v);
                if (i == 0)
                    put_page(&ret->rest, name, page, v);
                else
                    ret->fill[i == 1][page] = v;
                name = NULL;
            }
        }
        maker_eos(b);
        maker_eos(&ret->rest);
    }
    end_stream(b);
    end_stream(&ret->rest);
    struct buffer devices = {0};
    maker_footer(&devices);
    maker_devices(&devices, 200000);
    ret->rest_before_done = ret->rest.len - devices.len;
    buffer_finish(&devices);
}

/* ---- tests ---- */

static void check_outcome(struct engine *e, const struct expected *x)
{
    assert_null(e->err);
    assert_true(e->memory_done);
    assert_memory_equal(e->fill, x->fill, sizeof(x->fill));
    assert_int_equal(e->bytes.len, x->rest.len);
    assert_memory_equal(e->bytes.data, x->rest.data, x->rest.len);
    assert_int_equal(e->bytes_before_done, x->rest_before_done);
    assert_int_equal(e->pages_before_done, e->pages);
}

static void pages_bytes_and_the_end_of_memory_arrive_whatever_the_channels(void **state)
{
    (void)state;
    cleanup_buffer struct buffer in = {0};
    static struct expected x;
    make_rounds(&in, &x);
    static const unsigned channels[] = {1, 3, QEMU_SOURCE_CHANNELS_MAX};
    for (int i = 0; i < 3; i++) {
        struct rig r;
        struct qemu_source_params params = USUAL;
        params.channels = channels[i];
        params.pool_bytes = i == 1 ? QEMU_SOURCE_POOL_MIN : 0;
        rig_open(&r);
        rig_start(&r, &params);
        rig_send(&r, &in);
        close_fd(&r.qemu);
        WAIT_FOR(&r.engine, r.engine.ended);
        check_outcome(&r.engine, &x);
        struct qemu_source_counters c;
        qemu_source_counters(r.source, &c);
        assert_int_equal(c.bytes_read, in.len);
        assert_int_equal(c.pages, r.engine.pages);
        assert_in_range(c.zero_pages, c.pages * 4 / 10, c.pages * 6 / 10);
        assert_int_equal(c.rest_bytes, x.rest.len);
        assert_false(c.opaque);
        rig_finish(&r);
    }
    buffer_finish(&x.rest);
}

static void a_full_round_comes_in_full_batches(void **state)
{
    (void)state;
    cleanup_buffer struct buffer in = {0};
    begin_stream(&in);
    maker_records(&in, MAKER_PART);
    for (uint64_t page = 0; page < RAM_PAGES; page++)
        put_page(&in, page ? NULL : "pc.ram", page, 0);
    maker_eos(&in);
    maker_records(&in, MAKER_END);
    maker_eos(&in);
    struct rig r;
    rig_open(&r);
    rig_send(&r, &in);
    close_fd(&r.qemu);
    rig_start(&r, &USUAL);
    WAIT_FOR(&r.engine, r.engine.ended);
    assert_int_equal(r.engine.pages, RAM_PAGES);
    assert_int_equal(r.engine.batches, RAM_PAGES / PAGE_BATCH_MAX);
    rig_finish(&r);
}

/* A stripe's pages stay together unless they are few. */
static void a_large_batch_ends_with_its_stripe(void **state)
{
    (void)state;
    static const unsigned pages[] = {200, 200, 100, 100};
    cleanup_buffer struct buffer in = {0};
    begin_stream(&in);
    maker_records(&in, MAKER_PART);
    for (unsigned stripe = 0; stripe < 4; stripe++)
        for (unsigned i = 0; i < pages[stripe]; i++)
            put_page(&in, stripe + i ? NULL : "pc.ram", stripe * PAGE_STRIPE_PAGES + i, 0);
    struct rig r;
    rig_open(&r);
    rig_send(&r, &in);
    struct qemu_source_params params = USUAL;
    params.channels = 1;
    rig_start(&r, &params);
    WAIT_FOR(&r.engine, r.engine.pages == 600);
    assert_int_equal(r.engine.batches, 3);
    assert_int_equal(r.engine.last_batch, 200);
    rig_finish(&r);
}

static void a_page_that_comes_again_begins_the_next_batch(void **state)
{
    (void)state;
    cleanup_buffer struct buffer in = {0};
    begin_stream(&in);
    maker_records(&in, MAKER_PART);
    static const uint64_t order[] = {5, 3, 9, 4, 3, 5, 9, 9, 0};
    for (unsigned i = 0; i < 9; i++)
        put_page(&in, i ? NULL : "pc.ram", order[i], 100 + i);
    struct rig r;
    rig_open(&r);
    rig_send(&r, &in);
    rig_start(&r, &USUAL);
    WAIT_FOR(&r.engine, r.engine.pages == 9);
    assert_int_equal(r.engine.batches, 3); /* 5 3 9 4, 3 5 9, 9 0: check_batch saw no page twice */
    assert_int_equal(r.engine.fill[1][3], 104);
    assert_int_equal(r.engine.fill[1][9], 107);
    rig_finish(&r);
}

static void what_was_begun_is_handed_over_while_the_stream_pauses(void **state)
{
    (void)state;
    cleanup_buffer struct buffer in = {0};
    begin_stream(&in);
    maker_records(&in, MAKER_PART);
    put_page(&in, "vga.vram", 1, 11);
    put_page(&in, "pc.ram", 1, 12);
    put_page(&in, NULL, 300, 13);
    size_t whole = in.len;
    put_page(&in, NULL, 301, 14);
    size_t more = in.len - whole;
    in.len -= more / 2; /* a record that is there by half */
    struct rig r;
    rig_open(&r);
    rig_start(&r, &USUAL);
    rig_send(&r, &in);
    WAIT_FOR(&r.engine, r.engine.pages == 2 && r.engine.bytes.len);
    assert_false(r.engine.ended);
    assert_false(r.engine.memory_done);
    assert_int_equal(r.engine.bytes.len, whole - 2 * (8 + GUEST_PAGE_SIZE) - strlen("pc.ram") - 1);
    rig_finish(&r);
}

struct writer {
    int fd;
    const struct buffer *in;
    pthread_t thread;
};

static void *writer_thread(void *arg)
{
    struct writer *w = arg;
    io_write_full(w->fd, w->in->data, w->in->len, deadline(), -1, NULL);
    close_fd(&w->fd);
    return NULL;
}

/* The pool is a bound; and whoever holds all of it was given every page that was read. */
static void a_reader_without_memory_waits_and_goes_on_when_a_batch_is_released(void **state)
{
    (void)state;
    enum { POOL = 3 };
    struct rig r;
    struct qemu_source_params params = USUAL;
    params.pool_bytes = POOL * PAGE_POOL_SLAB;
    rig_open(&r);
    r.engine.hold = true;
    rig_start(&r, &params);
    cleanup_buffer struct buffer in = {0};
    begin_stream(&in);
    maker_records(&in, MAKER_PART);
    /* From stripe to stripe, so that no batch ever gets full. */
    uint64_t sent = 0;
    for (uint64_t i = 0; i < 200; i++)
        for (uint64_t stripe = 0; stripe < RAM_PAGES / PAGE_STRIPE_PAGES; stripe++)
            put_page(&in, sent++ ? NULL : "pc.ram", stripe * PAGE_STRIPE_PAGES + i,
                     1 + (uint32_t)i);
    maker_eos(&in);
    end_stream(&in);
    struct writer w = {.fd = steal_fd(&r.qemu), .in = &in};
    pthread_create(&w.thread, NULL, writer_thread, &w);

    const size_t record = 8 + GUEST_PAGE_SIZE;
    WAIT_FOR(&r.engine, r.engine.pages >= POOL * PAGE_POOL_SLAB / record - POOL - 1);
    struct qemu_source_counters c;
    qemu_source_counters(r.source, &c);
    assert_true(c.bytes_read <= POOL * PAGE_POOL_SLAB);
    {
        SCOPE_LOCK(&r.engine.lock);
        r.engine.hold = false;
    }
    engine_release(&r.engine);
    pthread_join(w.thread, NULL);
    WAIT_FOR(&r.engine, r.engine.ended);
    assert_null(r.engine.err);
    assert_int_equal(r.engine.pages, sent);
    rig_finish(&r);
}

/* Batches of zero pages pin no slab; their number is bounded all the same; none is kept back. */
static void batches_are_bounded_too(void **state)
{
    (void)state;
    cleanup_buffer struct buffer in = {0};
    begin_stream(&in);
    maker_records(&in, MAKER_PART);
    put_page(&in, "pc.ram", PAGE_STRIPE_PAGES, 0); /* of the other channel */
    for (unsigned i = 0; i < PAGE_POOL_BATCHES + 50; i++)
        put_page(&in, NULL, 77, 0); /* each begins a batch */
    maker_eos(&in);
    maker_records(&in, MAKER_END);
    maker_eos(&in);
    struct rig r;
    rig_open(&r);
    rig_send(&r, &in);
    struct qemu_source_params params = USUAL;
    params.channels = 2;
    r.engine.hold = true;
    rig_start(&r, &params);
    WAIT_FOR(&r.engine, r.engine.n_held == PAGE_POOL_BATCHES);
    {
        SCOPE_LOCK(&r.engine.lock);
        r.engine.hold = false;
    }
    engine_release(&r.engine);
    close_fd(&r.qemu);
    WAIT_FOR(&r.engine, r.engine.ended);
    assert_null(r.engine.err);
    assert_int_equal(r.engine.pages, PAGE_POOL_BATCHES + 51);
    rig_finish(&r);
}

static void destroy_ends_it_wherever_it_waits(void **state)
{
    (void)state;
    for (int where = 0; where < 3; where++) {
        struct rig r;
        struct qemu_source_params params = USUAL;
        params.pool_bytes = QEMU_SOURCE_POOL_MIN;
        rig_open(&r);
        r.engine.hold = where == 2;
        rig_start(&r, &params);
        cleanup_buffer struct buffer in = {0};
        if (where > 0) {
            begin_stream(&in);
            maker_records(&in, MAKER_PART);
            for (uint64_t page = 0; page < 600; page++)
                put_page(&in, page ? NULL : "pc.ram", page, 5);
            in.len = where == 1 ? in.len : QEMU_SOURCE_POOL_MIN;
            rig_send(&r, &in);
            WAIT_FOR(&r.engine, r.engine.pages >= (where == 1 ? 600 : 500));
        }
        qemu_source_destroy(steal_ptr(&r.source));
        assert_true(r.engine.ended);
        assert_int_equal(r.engine.err->kind, VM_ERROR_CANCELLED);
        rig_finish(&r);
    }
}

/* `count` pages from `first` on, each with its own number. */
static void put_numbered(struct buffer *b, uint64_t first, unsigned count)
{
    for (uint64_t page = first; page < first + count; page++)
        put_page(b, page == first ? "pc.ram" : NULL, page, 1000 + (uint32_t)page);
}

/* Neither what is read later nor the source's end touches the bytes of a batch that is held. */
static void a_held_batch_stays_as_it_is_and_outlives_its_source(void **state)
{
    (void)state;
    struct rig r;
    rig_open(&r);
    r.engine.hold = true;
    rig_start(&r, &USUAL);
    cleanup_buffer struct buffer first = {0}, second = {0};
    begin_stream(&first);
    maker_records(&first, MAKER_PART);
    put_numbered(&first, 0, 1000);
    rig_send(&r, &first);
    WAIT_FOR(&r.engine, r.engine.pages == 1000);
    put_numbered(&second, 1000, 1000);
    rig_send(&r, &second);
    WAIT_FOR(&r.engine, r.engine.pages == 2000);
    qemu_source_destroy(steal_ptr(&r.source));
    for (unsigned i = 0; i < r.engine.n_held; i++) {
        const struct page_batch *b = r.engine.held[i];
        for (unsigned k = 0; k < b->n; k++)
            assert_int_equal(page_number(&r.engine, b->pages[k].data),
                             1000 + page_addr_number(b->pages[k].addr));
    }
    rig_finish(&r); /* releases them: the pool goes */
}

static void regions_must_be_blocks_of_the_stream(void **state)
{
    (void)state;
    static const struct {
        struct guest_region region;
        const char *message;
    } cases[] = {
        {{.name = "pc.ram2", .size = 4096},
         "QEMU's migration stream has no memory named pc.ram2, which the destination has"},
        {{.name = "pc.ram", .size = 4096},
         "memory pc.ram has 33554432 bytes in QEMU's migration stream, 4096 at the destination"},
    };
    for (int i = 0; i < 2; i++) {
        struct rig r;
        rig_open(&r);
        rig_start(&r, &(struct qemu_source_params){
                          .channels = 1, .regions = &cases[i].region, .n_regions = 1});
        cleanup_buffer struct buffer in = {0};
        begin_stream(&in);
        rig_send(&r, &in);
        WAIT_FOR(&r.engine, r.engine.ended);
        assert_string_equal(error_message(r.engine.err), cases[i].message);
        assert_int_equal(r.engine.err->kind, VM_ERROR_REFUSED);
        assert_int_equal(r.engine.pages, 0);
        rig_finish(&r);
    }
}

static void errors_end_it_and_are_told(void **state)
{
    (void)state;
    static const struct {
        const char *what;
        enum vm_error_kind kind;
    } cases[] = {
        {"QEMU closed its migration stream after ", VM_ERROR_FAILED},
        {"QEMU's migration stream at byte ", VM_ERROR_PROTOCOL},
        {"the link is gone", VM_ERROR_UNREACHABLE},
    };
    for (int i = 0; i < 3; i++) {
        struct rig r;
        rig_open(&r);
        r.engine.fail_at = i == 2;
        rig_start(&r, &USUAL);
        cleanup_buffer struct buffer in = {0};
        begin_stream(&in);
        maker_records(&in, MAKER_PART);
        put_page(&in, "pc.ram", 1, 1);
        if (i == 1)
            put_page(&in, "pc.rom", 1, 1);
        rig_send(&r, &in);
        if (i == 0)
            close_fd(&r.qemu);
        WAIT_FOR(&r.engine, r.engine.ended);
        assert_memory_equal(error_message(r.engine.err), cases[i].what, strlen(cases[i].what));
        assert_int_equal(r.engine.err->kind, cases[i].kind);
        assert_false(r.engine.memory_done);
        rig_finish(&r);
    }
}

/* Asked for, without parsing; and found, at a section that has no length. */
static void an_opaque_stream_is_bytes_up_to_its_end(void **state)
{
    (void)state;
    for (int asked = 0; asked < 2; asked++) {
        cleanup_buffer struct buffer in = {0};
        if (asked) {
            for (unsigned i = 0; i < 3000000; i++)
                buffer_put_u8(&in, (uint8_t)(i * 2654435761u >> 13));
        } else {
            maker_header(&in, "pc-q35-8.0");
            maker_section(&in, MAKER_FULL, 1, "virtio-mem-early", 1);
            maker_ram(&in, BLOCKS, 3);
            maker_records(&in, MAKER_PART);
            for (uint64_t page = 0; page < 1000; page++)
                put_page(&in, page ? NULL : "pc.ram", page, 3);
            maker_eos(&in);
            end_stream(&in);
        }
        struct rig r;
        struct qemu_source_params params = USUAL;
        params.opaque = asked;
        rig_open(&r);
        rig_start(&r, &params);
        rig_send(&r, &in);
        close_fd(&r.qemu);
        WAIT_FOR(&r.engine, r.engine.ended);
        assert_null(r.engine.err);
        assert_int_equal(r.engine.pages, 0);
        assert_int_equal(r.engine.bytes.len, in.len);
        assert_memory_equal(r.engine.bytes.data, in.data, in.len);
        assert_true(r.engine.memory_done);
        assert_int_equal(r.engine.bytes_before_done, in.len);
        struct qemu_source_counters c;
        qemu_source_counters(r.source, &c);
        assert_true(c.opaque);
        rig_finish(&r);
    }
}

/* Many at once are lent and not copied; as long as somebody has them they stay what they were. */
static void bytes_are_lent(void **state)
{
    (void)state;
    cleanup_buffer struct buffer in = {0};
    for (unsigned i = 0; i < 6000000; i++)
        buffer_put_u8(&in, (uint8_t)(i * 2654435761u >> 13));
    struct rig r;
    struct qemu_source_params params = USUAL;
    params.opaque = true;
    rig_open(&r);
    r.engine.hold = true;
    int buffer = 4 << 20; /* so that much is read at once */
    setsockopt(r.qemu, SOL_SOCKET, SO_SNDBUF, &buffer, sizeof(buffer));
    rig_start(&r, &params);
    rig_send(&r, &in);
    close_fd(&r.qemu);
    WAIT_FOR(&r.engine, r.engine.ended);
    assert_null(r.engine.err);
    assert_int_equal(r.engine.bytes.len, in.len);
    assert_memory_equal(r.engine.bytes.data, in.data, in.len);
    assert_true(r.engine.n_held > 0 && r.engine.n_held <= HELD_MAX);
    for (unsigned i = 0; i < r.engine.n_held; i++)
        assert_memory_equal(r.engine.lent[i].data, in.data + r.engine.lent[i].at, r.engine.lent[i].n);
    rig_finish(&r);
}

static void impossible_parameters_are_refused(void **state)
{
    (void)state;
    struct qemu_source_params wrong[] = {USUAL, USUAL, USUAL, USUAL};
    wrong[0].channels = 0;
    wrong[1].channels = QEMU_SOURCE_CHANNELS_MAX + 1;
    wrong[2].pool_bytes = PAGE_POOL_SLAB;
    wrong[3].n_regions = GUEST_REGIONS_MAX + 1;
    for (int i = 0; i < 4; i++) {
        cleanup_error struct vm_error *err = NULL;
        assert_null(qemu_source_create(&wrong[i], &err));
        assert_int_equal(err->kind, VM_ERROR_USAGE);
    }
    qemu_source_destroy(NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(pages_bytes_and_the_end_of_memory_arrive_whatever_the_channels),
        cmocka_unit_test(a_full_round_comes_in_full_batches),
        cmocka_unit_test(a_large_batch_ends_with_its_stripe),
        cmocka_unit_test(a_page_that_comes_again_begins_the_next_batch),
        cmocka_unit_test(what_was_begun_is_handed_over_while_the_stream_pauses),
        cmocka_unit_test(a_reader_without_memory_waits_and_goes_on_when_a_batch_is_released),
        cmocka_unit_test(batches_are_bounded_too),
        cmocka_unit_test(destroy_ends_it_wherever_it_waits),
        cmocka_unit_test(a_held_batch_stays_as_it_is_and_outlives_its_source),
        cmocka_unit_test(regions_must_be_blocks_of_the_stream),
        cmocka_unit_test(errors_end_it_and_are_told),
        cmocka_unit_test(an_opaque_stream_is_bytes_up_to_its_end),
        cmocka_unit_test(bytes_are_lent),
        cmocka_unit_test(impossible_parameters_are_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

/* SPDX-License-Identifier: Apache-2.0 */
/* Encoder and decoder together: what goes in comes out, and as little as possible travels. */
#include "page_fixture.h"

#include "base/clock.h"

#include <malloc.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/mman.h>
#include <cmocka.h>

static const unsigned small_guest[FIXTURE_REGIONS] = {512, 3, 300};
static struct prng rng;

static void assert_ok(int result, struct vm_error *err)
{
    if (result < 0)
        fail_msg("%s", error_message(err));
}

/* One channel: a guest at each end, and what is between them. */
struct link {
    struct fixture guest;
    struct page_encoder *enc;
    struct page_decoder *dec;
};

static void link_init(struct link *l, struct page_encoder_config config)
{
    struct vm_error *err = NULL;
    fixture_init(&l->guest, small_guest);
    config.regions = l->guest.source;
    config.n_regions = FIXTURE_REGIONS;
    config.n_channels = 1;
    l->enc = page_encoder_create(&config, &err);
    l->dec = page_decoder_create(&(struct page_decoder_config){.regions = l->guest.destination,
                                                               .n_regions = FIXTURE_REGIONS,
                                                               .n_channels = 1},
                                 &err);
    assert_non_null(l->enc);
    assert_non_null(l->dec);
}

static void link_finish(struct link *l)
{
    page_encoder_destroy(l->enc);
    page_decoder_destroy(l->dec);
    fixture_finish(&l->guest);
}

static uint8_t *source_page(struct link *l, uint64_t addr)
{
    return fixture_page(l->guest.source, addr);
}

static uint8_t *destination_page(struct link *l, uint64_t addr)
{
    return fixture_page(l->guest.destination, addr);
}

/* Encode `n` pages from `first` on. */
static struct encoded_batch encode(struct link *l, uint64_t first, unsigned n, enum page_mode mode)
{
    struct vm_error *err = NULL;
    struct encoded_batch out = {0};
    struct page_batch *batch = batch_new(0);
    for (unsigned i = 0; i < n; i++)
        batch_add(batch, first + i, source_page(l, first + i));
    assert_ok(page_encoder_encode(l->enc, batch, mode, &out, &err), err);
    page_batch_unref(batch);
    return out;
}

static void assert_equal_pages(struct link *l, uint64_t first, unsigned n)
{
    for (unsigned i = 0; i < n; i++)
        assert_memory_equal(source_page(l, first + i), destination_page(l, first + i),
                            GUEST_PAGE_SIZE);
}

/* Encode, deliver, compare. Returns the bytes that travelled. */
static size_t transfer(struct link *l, uint64_t first, unsigned n, enum page_mode mode)
{
    struct vm_error *err = NULL;
    struct encoded_batch out = encode(l, first, n, mode);
    size_t bytes = out.meta_len + out.payload_len;
    if (out.meta_len)
        assert_ok(deliver(l->dec, &out, -1, &err), err);
    encoded_batch_finish(&out);
    assert_equal_pages(l, first, n);
    return bytes;
}

static uint64_t pages_of(struct link *l, enum page_kind kind)
{
    return page_encoder_stats(l->enc)->kinds[kind].pages;
}

/* ---- what is sent ---- */

static void fresh_zero_pages_are_not_sent(void **state)
{
    struct link l;
    link_init(&l, (struct page_encoder_config){.destination_zero = true});
    assert_int_equal(transfer(&l, 0, 256, PAGE_MODE_LZ4), 0);
    assert_int_equal(pages_of(&l, PAGE_FRESH_ZERO), 256);
    link_finish(&l);
}

static void zero_pages_are_named_if_the_destination_may_hold_something(void **state)
{
    struct link l;
    link_init(&l, (struct page_encoder_config){.destination_zero = false});
    memset(destination_page(&l, 0), 0xaa, (size_t)256 * GUEST_PAGE_SIZE);
    assert_int_equal(transfer(&l, 0, 256, PAGE_MODE_RAW),
                     PAGE_META_HEADER_SIZE + PAGE_META_RUN_SIZE + PAGE_META_UNIT_SIZE);
    assert_int_equal(pages_of(&l, PAGE_ZERO), 256);
    link_finish(&l);
}

static void a_page_that_becomes_zero_and_comes_back_is_right(void **state)
{
    struct link l;
    uint8_t page[GUEST_PAGE_SIZE];
    link_init(&l, (struct page_encoder_config){.destination_zero = true});
    fill_page(&rng, page, CONTENT_TEXT);
    for (unsigned round = 0; round < 3; round++) {
        memcpy(source_page(&l, 7), page, sizeof(page));
        assert_true(transfer(&l, 7, 1, PAGE_MODE_LZ4) > 0);
        memset(source_page(&l, 7), 0, sizeof(page));
        assert_true(transfer(&l, 7, 1, PAGE_MODE_LZ4) > 0);
        assert_int_equal(transfer(&l, 7, 1, PAGE_MODE_LZ4), 0);
    }
    link_finish(&l);
}

static void unchanged_pages_are_not_sent(void **state)
{
    struct link l;
    link_init(&l, (struct page_encoder_config){.destination_zero = true});
    for (unsigned i = 0; i < 64; i++)
        fill_page(&rng, source_page(&l, i), (enum page_content)(1 + i % (CONTENT_COUNT - 1)));
    assert_true(transfer(&l, 0, 64, PAGE_MODE_ZSTD_1) > 0);
    assert_int_equal(transfer(&l, 0, 64, PAGE_MODE_ZSTD_1), 0);
    assert_int_equal(transfer(&l, 0, 64, PAGE_MODE_RAW), 0);
    assert_int_equal(pages_of(&l, PAGE_SAME), 128);
    source_page(&l, 5)[GUEST_PAGE_SIZE - 1] ^= 1;
    assert_true(transfer(&l, 0, 64, PAGE_MODE_LZ4) > 0);
    assert_int_equal(pages_of(&l, PAGE_SAME), 128 + 63);
    link_finish(&l);
}

/* The same contents at another address are another page: nothing may be taken for sent there. */
static void equal_contents_at_two_addresses_are_two_pages(void **state)
{
    struct link l;
    link_init(&l, (struct page_encoder_config){.destination_zero = true});
    fill_page(&rng, source_page(&l, 0), CONTENT_TEXT);
    for (unsigned i = 1; i < 512; i++)
        memcpy(source_page(&l, i), source_page(&l, 0), GUEST_PAGE_SIZE);
    transfer(&l, 0, 256, PAGE_MODE_LZ4);
    transfer(&l, 256, 256, PAGE_MODE_LZ4);
    assert_int_equal(pages_of(&l, PAGE_SAME), 0);
    link_finish(&l);
}

/* Nor where two pages share an entry of the table, since the guest is larger than that. */
static void pages_that_share_an_entry_are_told_apart(void **state)
{
    static uint8_t page[GUEST_PAGE_SIZE];
    struct guest_region huge = {.size = 64ull << 30};
    struct vm_error *err = NULL;
    struct page_encoder *enc =
        page_encoder_create(&(struct page_encoder_config){.regions = &huge,
                                                          .n_regions = 1,
                                                          .n_channels = 1,
                                                          .memory = PAGE_ENCODER_MEMORY_MIN,
                                                          .destination_zero = true},
                            &err);
    assert_non_null(enc);
    fill_page(&rng, page, CONTENT_TEXT);
    unsigned batches = 4 * PAGE_ENCODER_MEMORY_MIN / 16 / PAGE_BATCH_MAX;
    for (unsigned b = 0; b < batches; b++) {
        struct encoded_batch out = {0};
        struct page_batch *batch = batch_new(0);
        for (unsigned i = 0; i < PAGE_BATCH_MAX; i++)
            batch_add(batch, (uint64_t)b * PAGE_BATCH_MAX + i, page);
        assert_ok(page_encoder_encode(enc, batch, PAGE_MODE_RAW, &out, &err), err);
        encoded_batch_finish(&out);
        page_batch_unref(batch);
    }
    assert_int_equal(page_encoder_stats(enc)->kinds[PAGE_RAW].pages, batches * PAGE_BATCH_MAX);
    page_encoder_destroy(enc);
}

static void small_changes_travel_as_deltas(void **state)
{
    struct link l;
    link_init(&l, (struct page_encoder_config){.destination_zero = true});
    for (unsigned i = 0; i < 32; i++)
        fill_page(&rng, source_page(&l, i), CONTENT_RANDOM);
    transfer(&l, 0, 32, PAGE_MODE_LZ4);
    for (unsigned round = 0; round < 3; round++) {
        for (unsigned i = 0; i < 32; i++)
            touch_page(&rng, source_page(&l, i));
        size_t bytes = transfer(&l, 0, 32, PAGE_MODE_LZ4);
        /* The first pass keeps nothing, the second keeps, from the third on it pays. */
        assert_int_equal(pages_of(&l, PAGE_DELTA), round * 32);
        assert_true(round == 0 || bytes < 32 * 150);
    }
    link_finish(&l);
}

static void touch_pages(struct link *l, uint64_t first, unsigned n)
{
    for (unsigned i = 0; i < n; i++)
        touch_page(&rng, source_page(l, first + i));
}

/* More pages than the cache holds pass through: those whose deltas work keep their place. */
static void a_sweep_leaves_former_versions_of_hot_pages(void **state)
{
    const uint64_t hot = 160, other = page_addr(2, 0);
    struct link l;
    link_init(&l, (struct page_encoder_config){.destination_zero = true, .memory = 1});
    for (unsigned i = 0; i < 256; i++) {
        fill_page(&rng, source_page(&l, hot + i), CONTENT_TEXT);
        fill_page(&rng, source_page(&l, other + i), CONTENT_TEXT);
    }
    for (unsigned round = 0; round < 3; round++) {
        touch_pages(&l, hot, 256);
        transfer(&l, hot, 256, PAGE_MODE_LZ4);
    }
    assert_int_equal(pages_of(&l, PAGE_DELTA), 256);
    for (unsigned round = 0; round < 5; round++) {
        touch_pages(&l, other, 256);
        transfer(&l, other, 256, PAGE_MODE_LZ4);
    }
    /* Some of them found no room: otherwise this test says nothing. */
    uint64_t before = pages_of(&l, PAGE_DELTA);
    assert_true(before < 256 + 3 * 256);
    touch_pages(&l, hot, 256);
    transfer(&l, hot, 256, PAGE_MODE_LZ4);
    assert_int_equal(pages_of(&l, PAGE_DELTA), before + 256);
    link_finish(&l);
}

/* A raw page changes the destination, and no former version is kept: an old one is forgotten. */
static void deltas_never_refer_to_an_outdated_version(void **state)
{
    struct link l;
    link_init(&l, (struct page_encoder_config){.destination_zero = true});
    fill_page(&rng, source_page(&l, 3), CONTENT_TEXT);
    for (unsigned i = 0; i < 40; i++) {
        static const enum page_mode modes[] = {PAGE_MODE_LZ4, PAGE_MODE_LZ4, PAGE_MODE_LZ4,
                                               PAGE_MODE_RAW, PAGE_MODE_ZSTD_2};
        touch_page(&rng, source_page(&l, 3));
        if (i % 13 == 7)
            memset(source_page(&l, 3), 0, GUEST_PAGE_SIZE);
        transfer(&l, 3, 1, modes[i % 5]);
    }
    assert_true(pages_of(&l, PAGE_DELTA) >= 8);
    link_finish(&l);
}

static void pages_that_do_not_compress_are_sent_from_where_they_are(void **state)
{
    struct link l;
    link_init(&l, (struct page_encoder_config){.destination_zero = true});
    for (unsigned i = 0; i < 64; i++)
        fill_page(&rng, source_page(&l, i), CONTENT_RANDOM);
    for (unsigned mode = 0; mode < PAGE_MODE_COUNT; mode++) {
        touch_page(&rng, source_page(&l, 0));
        for (unsigned i = 0; i < 64; i++)
            source_page(&l, i)[9]++;
        struct encoded_batch out = encode(&l, 0, 64, mode == 0 ? PAGE_MODE_RAW : PAGE_MODE_LZ4);
        if (mode == 0) {
            assert_true(out.borrows_input);
            assert_int_equal(out.n_payload, 1); /* side by side: one piece */
            assert_ptr_equal(out.payload[0].iov_base, source_page(&l, 0));
            assert_true(out.memory_size < 4096);
        }
        assert_true(out.payload_len <= 64 * GUEST_PAGE_SIZE);
        struct vm_error *err = NULL;
        assert_ok(deliver(l.dec, &out, -1, &err), err);
        encoded_batch_finish(&out);
        assert_equal_pages(&l, 0, 64);
    }
    link_finish(&l);
}

static void compressible_pages_shrink(void **state)
{
    static const double most[PAGE_MODE_COUNT] = {1.01, 0.6, 0.45, 0.45, 0.45};
    for (unsigned mode = 0; mode < PAGE_MODE_COUNT; mode++) {
        struct link l;
        link_init(&l, (struct page_encoder_config){.destination_zero = true});
        for (unsigned i = 0; i < 256; i++)
            fill_page(&rng, source_page(&l, i), CONTENT_TEXT);
        size_t bytes = transfer(&l, 0, 256, (enum page_mode)mode);
        if ((double)bytes > most[mode] * 256 * GUEST_PAGE_SIZE)
            fail_msg("%s: %zu bytes", page_mode_name((enum page_mode)mode), bytes);
        link_finish(&l);
    }
}

/* ---- source memory that changes ---- */

static void a_mapped_source_is_sent_as_it_was_when_encoded(void **state)
{
    for (unsigned mode = 0; mode < PAGE_MODE_COUNT; mode++) {
        struct link l;
        struct vm_error *err = NULL;
        uint8_t former[8 * GUEST_PAGE_SIZE];
        link_init(&l,
                  (struct page_encoder_config){.destination_zero = true, .mapped_source = true});
        for (unsigned i = 0; i < 8; i++)
            fill_page(&rng, source_page(&l, i), i % 2 ? CONTENT_RANDOM : CONTENT_TEXT);
        memcpy(former, source_page(&l, 0), sizeof(former));
        struct encoded_batch out = encode(&l, 0, 8, (enum page_mode)mode);
        assert_false(out.borrows_input);
        for (unsigned i = 0; i < 8; i++)
            touch_page(&rng, source_page(&l, i));
        /* What is on its way owes nothing to the encoder either. */
        for (unsigned i = 8; i < 16; i++)
            fill_page(&rng, source_page(&l, i), CONTENT_RANDOM);
        struct encoded_batch next = encode(&l, 8, 8, (enum page_mode)mode);
        encoded_batch_finish(&next);
        assert_ok(deliver(l.dec, &out, -1, &err), err);
        encoded_batch_finish(&out);
        assert_memory_equal(destination_page(&l, 0), former, sizeof(former));
        assert_true(transfer(&l, 0, 8, (enum page_mode)mode) > 0);
        link_finish(&l);
    }
}

struct scribbler {
    uint8_t *page;
    atomic_bool stop;
};

/* A guest that flips a page between two versions, as fast as it can. */
static void *scribble(void *arg)
{
    struct scribbler *s = arg;
    atomic_uchar *byte = (atomic_uchar *)(void *)s->page;
    for (unsigned char version = 0; !atomic_load(&s->stop); version ^= 1) {
        for (unsigned i = 0; i < GUEST_PAGE_SIZE; i += 64)
            atomic_store_explicit(&byte[i], version, memory_order_relaxed);
    }
    return NULL;
}

static void a_page_that_changes_while_it_is_read_is_right_at_the_end(void **state)
{
    for (unsigned trial = 0; trial < 30; trial++) {
        struct link l;
        struct scribbler s = {0};
        struct vm_error *err = NULL;
        pthread_t thread;
        link_init(&l,
                  (struct page_encoder_config){.destination_zero = true, .mapped_source = true});
        s.page = source_page(&l, 0);
        fill_page(&rng, s.page, trial % 2 ? CONTENT_RANDOM : CONTENT_TEXT);
        assert_int_equal(pthread_create(&thread, NULL, scribble, &s), 0);
        for (unsigned i = 0; i < 200; i++) {
            struct encoded_batch out = encode(&l, 0, 1, (enum page_mode)(i % PAGE_MODE_COUNT));
            if (out.meta_len)
                assert_ok(deliver(l.dec, &out, -1, &err), err);
            encoded_batch_finish(&out);
        }
        atomic_store(&s.stop, true);
        pthread_join(thread, NULL);
        transfer(&l, 0, 1, PAGE_MODE_LZ4); /* compares */
        link_finish(&l);
    }
}

/* ---- bounds ---- */

/* A sanitizer's allocator keeps memory of its own. */
#ifdef __has_feature
#define CLANG_ASAN __has_feature(address_sanitizer)
#else
#define CLANG_ASAN 0
#endif
#if defined(__SANITIZE_ADDRESS__) || CLANG_ASAN
enum { ALLOCATOR_IS_PLAIN = false };
#else
enum { ALLOCATOR_IS_PLAIN = true };
#endif

static size_t rss_anon(void)
{
    size_t kib = 0;
    char line[256];
    cleanup_fclose FILE *f = fopen("/proc/self/status", "r");
    assert_non_null(f);
    while (fgets(line, sizeof(line), f))
        sscanf(line, "RssAnon: %zu kB", &kib);
    assert_true(kib > 0);
    return kib << 10;
}

/* Pages of a huge guest, each new: everything that the encoder may remember gets filled. */
static void encode_many(struct page_encoder *enc, unsigned n_channels, unsigned batches)
{
    static uint8_t pages[PAGE_BATCH_MAX][GUEST_PAGE_SIZE];
    for (unsigned b = 0; b < batches; b++) {
        struct vm_error *err = NULL;
        struct encoded_batch out = {0};
        struct page_batch *batch = batch_new(0);
        for (unsigned i = 0; i < PAGE_BATCH_MAX; i++) {
            put_le64(pages[i], prng_next(&rng) | 1);
            uint64_t stripe = (uint64_t)(b / 2 * 37) * n_channels;
            batch_add(batch, stripe * PAGE_STRIPE_PAGES + i, pages[i]);
        }
        assert_ok(page_encoder_encode(enc, batch, PAGE_MODE_ZSTD_3, &out, &err), err);
        encoded_batch_finish(&out);
        page_batch_unref(batch);
    }
}

static void memory_is_bounded_for_any_guest(void **state)
{
    const size_t budget = 64 << 20;
    const unsigned n_channels = 8;
    struct guest_region huge[2] = {{.size = 4ull << 40}, {.size = 8ull << 40}};
    struct page_encoder_config config = {.regions = huge,
                                         .n_regions = 2,
                                         .n_channels = n_channels,
                                         .memory = budget,
                                         .destination_zero = true};
    malloc_trim(0); /* what former tests left must not be there to be used again */
    size_t total = 0, before = rss_anon();
    struct page_encoder *enc = NULL;
    for (unsigned i = n_channels; i-- > 0;) {
        struct vm_error *err = NULL;
        page_encoder_destroy(enc);
        config.channel = i;
        enc = page_encoder_create(&config, &err);
        assert_non_null(enc);
        total += page_encoder_memory(enc);
    }
    assert_true(total <= budget);
    encode_many(enc, n_channels, 1500);
    assert_true(page_encoder_stats(enc)->kinds[PAGE_ZSTD].pages > 300000);
    size_t after = rss_anon(), grown = after > before ? after - before : 0;
    print_message("one of 8 encoders: %zu KiB allowed, %zu KiB grown\n",
                  page_encoder_memory(enc) >> 10, grown >> 10);
    /* 1 MiB for the pages that are encoded, 1 MiB for the allocator. */
    if (ALLOCATOR_IS_PLAIN)
        assert_true(grown <= page_encoder_memory(enc) + (2 << 20));
    else
        print_message("NOT CHECKED under a sanitizer: what the process grew by\n");
    page_encoder_destroy(enc);
}

/* A guest so large that one bit stands for several pages: more is sent than need be, never less. */
static void coarse_bits_cost_bytes_only(void **state)
{
    struct link l;
    struct vm_error *err = NULL;
    link_init(&l, (struct page_encoder_config){.destination_zero = true});
    struct guest_region huge = {.size = 16ull << 40};
    page_encoder_destroy(l.enc);
    l.enc = page_encoder_create(&(struct page_encoder_config){.regions = &huge,
                                                              .n_regions = 1,
                                                              .n_channels = 1,
                                                              .memory = PAGE_ENCODER_MEMORY_MIN,
                                                              .destination_zero = true},
                                &err);
    assert_non_null(l.enc);
    assert_int_equal(transfer(&l, 0, 256, PAGE_MODE_LZ4), 0);
    for (unsigned round = 0; round < 3; round++) {
        fill_page(&rng, source_page(&l, 0), CONTENT_TEXT);
        assert_true(transfer(&l, 0, 2, PAGE_MODE_LZ4) > 0);
        assert_int_equal(pages_of(&l, PAGE_ZERO), 1 + round); /* page 1, once; then page 0 */
        memset(source_page(&l, 0), 0, GUEST_PAGE_SIZE);
        assert_true(transfer(&l, 0, 2, PAGE_MODE_LZ4) > 0);
        assert_int_equal(transfer(&l, 0, 2, PAGE_MODE_LZ4), 0);
    }
    /* Of two neighbours that held something, the second must not pass for fresh. */
    for (unsigned i = 0; i < 2; i++)
        fill_page(&rng, source_page(&l, i), CONTENT_TEXT);
    transfer(&l, 0, 2, PAGE_MODE_LZ4);
    for (unsigned i = 0; i < 2; i++) {
        memset(source_page(&l, i), 0, GUEST_PAGE_SIZE);
        transfer(&l, i, 1, PAGE_MODE_LZ4);
    }
    link_finish(&l);
}

static void pages_from_nowhere_are_refused(void **state)
{
    static const uint64_t addresses[] = {512, (uint64_t)1 << 48 | 3, (uint64_t)3 << 48, UINT64_MAX};
    struct link l;
    link_init(&l, (struct page_encoder_config){.destination_zero = true});
    for (unsigned i = 0; i < sizeof(addresses) / sizeof(addresses[0]); i++) {
        struct vm_error *err = NULL;
        struct encoded_batch out = {0};
        struct page_batch *batch = batch_new(0);
        batch_add(batch, addresses[i], source_page(&l, 0));
        assert_int_equal(page_encoder_encode(l.enc, batch, PAGE_MODE_RAW, &out, &err), -1);
        assert_int_equal(err->kind, VM_ERROR_PROTOCOL);
        assert_null(out.memory);
        error_free(err);
        page_batch_unref(batch);
    }
    link_finish(&l);
}

/* ---- everything at once ---- */

enum { SOUP_CHANNELS = 3 };

struct soup {
    struct fixture guest;
    struct page_encoder *enc[SOUP_CHANNELS];
    struct page_decoder *dec[SOUP_CHANNELS];
    uint8_t stream[PAGE_BATCH_MAX][8 + GUEST_PAGE_SIZE]; /* pages as QEMU's stream has them */
};

static void soup_init(struct soup *s, bool destination_zero, bool mapped_source)
{
    static const unsigned pages[FIXTURE_REGIONS] = {1500, 5, 700};
    struct vm_error *err = NULL;
    fixture_init(&s->guest, pages);
    if (!destination_zero) {
        for (unsigned i = 0; i < FIXTURE_REGIONS; i++)
            memset(s->guest.destination[i].base, 0x5a, s->guest.destination[i].size);
    }
    for (unsigned i = 0; i < SOUP_CHANNELS; i++) {
        s->enc[i] = page_encoder_create(
            &(struct page_encoder_config){.regions = s->guest.source,
                                          .n_regions = FIXTURE_REGIONS,
                                          .channel = i,
                                          .n_channels = SOUP_CHANNELS,
                                          .memory = 1, /* the least: entries make room */
                                          .destination_zero = destination_zero,
                                          .mapped_source = mapped_source},
            &err);
        s->dec[i] =
            page_decoder_create(&(struct page_decoder_config){.regions = s->guest.destination,
                                                              .n_regions = FIXTURE_REGIONS,
                                                              .channel = i,
                                                              .n_channels = SOUP_CHANNELS,
                                                              .may_punch = destination_zero},
                                &err);
        assert_true(s->enc[i] && s->dec[i]);
    }
}

static void soup_finish(struct soup *s)
{
    for (unsigned i = 0; i < SOUP_CHANNELS; i++) {
        page_encoder_destroy(s->enc[i]);
        page_decoder_destroy(s->dec[i]);
    }
    fixture_finish(&s->guest);
}

static void change_page(uint8_t *page, const uint8_t *other)
{
    switch (prng_below(&rng, 6)) {
    case 0:
        fill_page(&rng, page, (enum page_content)prng_below(&rng, CONTENT_COUNT));
        break;
    case 1:
        memcpy(page, other, GUEST_PAGE_SIZE);
        break;
    case 2:
        break; /* written with what it held */
    default:
        touch_page(&rng, page);
    }
}

static void soup_send(struct soup *s, struct page_batch *batch)
{
    struct vm_error *err = NULL;
    struct encoded_batch out = {0};
    unsigned channel = batch->channel;
    enum page_mode mode = (enum page_mode)prng_below(&rng, PAGE_MODE_COUNT);
    assert_ok(page_encoder_encode(s->enc[channel], batch, mode, &out, &err), err);
    while (out.meta_len && prng_below(&rng, 4) == 0) {
        ssize_t cut = (ssize_t)prng_below(&rng, out.payload_len + 1);
        assert_ok(deliver(s->dec[channel], &out, cut, &err), err);
    }
    if (out.meta_len)
        assert_ok(deliver(s->dec[channel], &out, -1, &err), err);
    encoded_batch_finish(&out);
    for (unsigned i = 0; i < batch->n; i++) {
        uint64_t addr = batch->pages[i].addr;
        if (memcmp(fixture_page(s->guest.source, addr), fixture_page(s->guest.destination, addr),
                   GUEST_PAGE_SIZE) != 0)
            fail_msg("page %#llx differs after mode %s", (unsigned long long)addr,
                     page_mode_name(mode));
    }
    page_batch_unref(batch);
}

/* One pass over a region, in batches for each channel as a driver makes them. */
static void soup_pass(struct soup *s, unsigned region)
{
    struct guest_region *source = &s->guest.source[region];
    uint64_t pages = source->size / GUEST_PAGE_SIZE;
    struct page_batch *open[SOUP_CHANNELS] = {0};
    bool copied = prng_below(&rng, 2);
    for (uint64_t p = 0; p < pages; p++) {
        uint64_t addr = page_addr(region, p);
        unsigned channel = page_stripe_channel(addr, SOUP_CHANNELS);
        uint8_t *data = source->base + p * GUEST_PAGE_SIZE;
        if (!open[channel])
            open[channel] = batch_new(channel);
        struct page_batch *batch = open[channel];
        if (copied && channel == 0)
            data = memcpy(s->stream[batch->n] + 8, data, GUEST_PAGE_SIZE);
        bool flagged = page_is_zero(data) && prng_below(&rng, 2);
        batch_add(batch, addr, flagged ? NULL : data);
        if (batch->n == PAGE_BATCH_MAX) {
            soup_send(s, batch);
            open[channel] = NULL;
        }
    }
    for (unsigned i = 0; i < SOUP_CHANNELS; i++) {
        if (open[i])
            soup_send(s, open[i]);
    }
}

static void memory_is_equal_after_many_rounds(void **state)
{
    for (unsigned variant = 0; variant < 4; variant++) {
        static struct soup s;
        soup_init(&s, variant & 1, variant & 2);
        for (unsigned round = 0; round < 25; round++) {
            for (unsigned i = 0; i < FIXTURE_REGIONS; i++) {
                struct guest_region *source = &s.guest.source[i];
                uint64_t pages = source->size / GUEST_PAGE_SIZE;
                /* A small hot set, as guests have it. */
                for (uint64_t n = round ? pages / 8 : pages; n > 0; n--) {
                    uint64_t p = prng_below(&rng, round % 5 ? pages / 5 + 1 : pages);
                    change_page(source->base + p * GUEST_PAGE_SIZE,
                                source->base + prng_below(&rng, pages) * GUEST_PAGE_SIZE);
                }
                soup_pass(&s, i);
                assert_memory_equal(source->base, s.guest.destination[i].base, source->size);
            }
        }
        for (unsigned i = 0; i < SOUP_CHANNELS; i++) {
            const struct page_encoder_stats *stats = page_encoder_stats(s.enc[i]);
            for (unsigned kind = 0; kind < PAGE_KIND_COUNT; kind++) {
                if (kind != PAGE_FRESH_ZERO && !stats->kinds[kind].pages)
                    fail_msg("channel %u had no %s page", i, page_kind_name((enum page_kind)kind));
            }
        }
        soup_finish(&s);
    }
}

int main(void)
{
    const char *seed = getenv("VMMIG_TEST_SEED");
    rng.state = seed ? strtoull(seed, NULL, 0) : (uint64_t)clock_wall_ns();
    print_message("VMMIG_TEST_SEED=%llu repeats this run\n", (unsigned long long)rng.state);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(fresh_zero_pages_are_not_sent),
        cmocka_unit_test(zero_pages_are_named_if_the_destination_may_hold_something),
        cmocka_unit_test(a_page_that_becomes_zero_and_comes_back_is_right),
        cmocka_unit_test(unchanged_pages_are_not_sent),
        cmocka_unit_test(equal_contents_at_two_addresses_are_two_pages),
        cmocka_unit_test(pages_that_share_an_entry_are_told_apart),
        cmocka_unit_test(small_changes_travel_as_deltas),
        cmocka_unit_test(a_sweep_leaves_former_versions_of_hot_pages),
        cmocka_unit_test(deltas_never_refer_to_an_outdated_version),
        cmocka_unit_test(pages_that_do_not_compress_are_sent_from_where_they_are),
        cmocka_unit_test(compressible_pages_shrink),
        cmocka_unit_test(a_mapped_source_is_sent_as_it_was_when_encoded),
        cmocka_unit_test(a_page_that_changes_while_it_is_read_is_right_at_the_end),
        cmocka_unit_test(memory_is_bounded_for_any_guest),
        cmocka_unit_test(coarse_bits_cost_bytes_only),
        cmocka_unit_test(pages_from_nowhere_are_refused),
        cmocka_unit_test(memory_is_equal_after_many_rounds),
    };
    return cmocka_run_group_tests_name("page_codec", tests, NULL, NULL);
}

/* SPDX-License-Identifier: Apache-2.0 */
/* What arrives from a peer that is wrong, hostile, or cut off; and zero pages in shared memory. */
#include "page_fixture.h"

#include "base/clock.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/mman.h>
#include <cmocka.h>

static struct prng rng;

static const unsigned guest_pages[FIXTURE_REGIONS] = {600, 20, 64};

static struct page_decoder *new_decoder(struct fixture *guest, unsigned n_channels, bool may_punch)
{
    struct vm_error *err = NULL;
    struct page_decoder *dec =
        page_decoder_create(&(struct page_decoder_config){.regions = guest->destination,
                                                          .n_regions = FIXTURE_REGIONS,
                                                          .n_channels = n_channels,
                                                          .may_punch = may_punch},
                            &err);
    assert_non_null(dec);
    return dec;
}

/*
 * Three batches by a real encoder, over every second page. Two are delivered, the third is
 * returned: it has zero and raw pages, blocks and deltas.
 */
static struct encoded_batch make_batch(struct fixture *guest, struct page_decoder *dec,
                                       enum page_mode mode)
{
    struct vm_error *err = NULL;
    struct encoded_batch out = {0};
    struct page_encoder *enc =
        page_encoder_create(&(struct page_encoder_config){.regions = guest->source,
                                                          .n_regions = FIXTURE_REGIONS,
                                                          .n_channels = 1,
                                                          .destination_zero = true},
                            &err);
    assert_non_null(enc);
    uint8_t *pages = guest->source[0].base;
    for (unsigned round = 0; round < 3; round++) {
        struct page_batch *batch = batch_new(0);
        for (unsigned i = 0; i < 100; i++) {
            /* text in the first pages, noise in the middle, in the last a few changes per round */
            enum page_content content = i < 50 ? CONTENT_TEXT : CONTENT_RANDOM;
            uint8_t *page = pages + (size_t)(2 * i) * GUEST_PAGE_SIZE;
            if (i >= 80 && round)
                touch_page(&rng, page);
            else if (i % 10 == 9 && round == 2)
                memset(page, 0, GUEST_PAGE_SIZE);
            else
                fill_page(&rng, page, content);
            batch_add(batch, page_addr(0, 2 * i), page);
        }
        encoded_batch_finish(&out);
        if (page_encoder_encode(enc, batch, mode, &out, &err) < 0)
            fail_msg("%s", error_message(err));
        if (round < 2 && deliver(dec, &out, -1, &err) < 0)
            fail_msg("%s", error_message(err));
        page_batch_unref(batch);
    }
    page_encoder_destroy(enc);
    return out;
}

/* ---- meta ---- */

/* Three runs and two units: a valid meta that each case spoils in one place. */
static struct page_meta plain_meta(void)
{
    return (struct page_meta){
        .n_pages = 8,
        .n_runs = 3,
        .n_units = 2,
        .payload_len = 5 * GUEST_PAGE_SIZE,
        .runs = {{page_addr(0, 10), 4}, {page_addr(0, 2), 2}, {page_addr(1, 5), 2}},
        .units = {{PAGE_ZERO, 3, 0}, {PAGE_RAW, 5, 5 * GUEST_PAGE_SIZE}},
    };
}

struct meta_case {
    const char *error; /* part of it; NULL: valid */
    struct page_meta meta;
};

static void change(struct meta_case *c, unsigned *n, const char *error, struct page_meta meta)
{
    c[(*n)++] = (struct meta_case){error, meta};
}

#define SPOIL(error, ...)                                                                          \
    do {                                                                                           \
        struct page_meta m = plain_meta();                                                         \
        __VA_ARGS__;                                                                               \
        change(cases, &n, error, m);                                                               \
    } while (0)

static unsigned make_cases(struct meta_case *cases)
{
    unsigned n = 0;
    SPOIL(NULL, (void)0);
    SPOIL("page count", m.n_pages = 0);
    SPOIL("page count", m.n_pages = PAGE_BATCH_MAX + 1);
    SPOIL("run or unit count", m.n_runs = 0);
    SPOIL("run or unit count", m.n_units = 0);
    SPOIL("run or unit count", m.n_pages = 2);
    SPOIL("run or unit count", m.n_units = 9);
    SPOIL("runs do not", m.n_pages = 7);
    SPOIL("runs do not", m.n_pages = 9);
    SPOIL("runs do not", m.runs[1].count = 0);
    SPOIL("runs do not", m.runs[1].count = UINT32_MAX);
    SPOIL("runs do not", m.runs[0].count = UINT32_MAX - 4; m.runs[1].count = 11);
    SPOIL("named twice", m.runs[1].addr = page_addr(0, 9));
    SPOIL("named twice", m.runs[1].addr = page_addr(0, 13));
    SPOIL("named twice", m.runs[2].addr = page_addr(0, 2));
    SPOIL("outside", m.runs[0].addr = page_addr(0, 597));
    SPOIL("outside", m.runs[0].addr = page_addr(0, 600));
    SPOIL("outside", m.runs[2].addr = page_addr(1, 19));
    SPOIL("outside", m.runs[0].addr = page_addr(0, (1ull << 48) - 2));
    SPOIL("does not exist", m.runs[2].addr = page_addr(3, 0));
    SPOIL("does not exist", m.runs[2].addr = UINT64_MAX);
    SPOIL("unit of unknown kind", m.units[0].kind = PAGE_SAME);
    SPOIL("fit its kind", m.units[0].kind = PAGE_RAW);
    SPOIL("fit its kind", m.units[0].len = 1; m.payload_len++);
    SPOIL("units do not", m.units[0].pages = 2);
    SPOIL("units do not", m.units[0].pages = 0);
    SPOIL("units do not", m.units[1].pages = 6);
    SPOIL("units do not", m.units[1].pages = 65535);
    SPOIL("units do not", m.units[1].len = UINT32_MAX);
    SPOIL("units do not", m.payload_len++);
    SPOIL("units do not", m.payload_len--);
    SPOIL("fit its kind", m.units[1].kind = PAGE_LZ4);
    SPOIL("fit its kind", m.units[1].kind = PAGE_ZSTD);
    SPOIL("fit its kind", m.units[1].kind = PAGE_DELTA);
    SPOIL("fit its kind", m.units[1].kind = PAGE_ZSTD; m.units[1].len = m.payload_len = 0);
    SPOIL("fit its kind", m.units[1].kind = PAGE_LZ4; m.units[1].len = m.payload_len = 0);
    SPOIL("fit its kind", m.units[0] = (struct page_unit){PAGE_ZERO, 7, 0};
          m.units[1] = (struct page_unit){PAGE_DELTA, 1, 4}; m.payload_len = 4);
    SPOIL("fit its kind", m.n_pages = 21; m.runs[0].count = 17; m.units[0].pages = 4;
          m.units[1] = (struct page_unit){PAGE_LZ4, 17, 100}; m.payload_len = 100);
    SPOIL("out of range", m.payload_len = PAGE_PAYLOAD_MAX + 1);
    return n;
}

static void spoiled_meta_is_refused(void **state)
{
    struct meta_case cases[64];
    unsigned n = make_cases(cases);
    struct fixture guest;
    fixture_init(&guest, guest_pages);
    struct page_decoder *dec = new_decoder(&guest, 1, false);
    for (unsigned i = 0; i < n; i++) {
        struct vm_error *err = NULL;
        struct iovec iov[PAGE_DECODER_IOV_MAX];
        unsigned n_iov;
        /* Counts beyond the arrays are spoiled in a copy whose length is right otherwise. */
        struct page_meta meta = cases[i].meta;
        size_t len = page_meta_size(&meta);
        cleanup_free uint8_t *bytes = malloc(len);
        page_meta_write(&meta, bytes);
        int result = page_decoder_begin(dec, bytes, len, meta.payload_len, iov, &n_iov, &err);
        if (!cases[i].error) {
            assert_int_equal(result, 0);
            continue;
        }
        if (result == 0 || err->kind != VM_ERROR_PROTOCOL || !strstr(err->message, cases[i].error))
            fail_msg("case %u: expected '%s', got '%s'", i, cases[i].error, error_message(err));
        error_clear(&err);
        assert_int_equal(page_decoder_commit(dec, &err), -1); /* nothing has begun */
        error_free(err);
    }
    page_decoder_destroy(dec);
    fixture_finish(&guest);
}

static void meta_of_a_wrong_length_is_refused(void **state)
{
    struct page_meta meta = plain_meta();
    uint8_t bytes[PAGE_META_MAX + 1] = {0};
    size_t right = page_meta_size(&meta);
    page_meta_write(&meta, bytes);
    for (size_t len = 0; len <= right + 1; len++) {
        struct vm_error *err = NULL;
        cleanup_free uint8_t *exact = malloc(len + !len);
        memcpy(exact, bytes, len);
        assert_int_equal(page_meta_read(exact, len, meta.payload_len, &meta, &err),
                         len == right ? 0 : -1);
        error_free(err);
    }
    /* Magic, and what is reserved in the header and in a unit. */
    static const size_t fixed[] = {0, 3, 10, 11,
                                   PAGE_META_HEADER_SIZE + 3 * PAGE_META_RUN_SIZE + 1};
    for (unsigned i = 0; i < sizeof(fixed) / sizeof(fixed[0]); i++) {
        struct vm_error *err = NULL;
        bytes[fixed[i]] ^= 0x80;
        assert_int_equal(page_meta_read(bytes, right, meta.payload_len, &meta, &err), -1);
        bytes[fixed[i]] ^= 0x80;
        error_free(err);
    }
}

static void meta_survives_a_round_trip(void **state)
{
    struct page_meta meta = plain_meta(), again;
    struct vm_error *err = NULL;
    uint8_t bytes[PAGE_META_MAX];
    page_meta_write(&meta, bytes);
    assert_int_equal(page_meta_read(bytes, page_meta_size(&meta), meta.payload_len, &again, &err),
                     0);
    assert_int_equal(again.n_pages, meta.n_pages);
    for (unsigned i = 0; i < meta.n_runs; i++) {
        assert_int_equal(again.runs[i].addr, meta.runs[i].addr);
        assert_int_equal(again.runs[i].count, meta.runs[i].count);
    }
    for (unsigned i = 0; i < meta.n_units; i++) {
        assert_int_equal(again.units[i].kind, meta.units[i].kind);
        assert_int_equal(again.units[i].pages, meta.units[i].pages);
        assert_int_equal(again.units[i].len, meta.units[i].len);
    }
}

/* The example of docs/migration-pages.md: what is on the wire does not change by accident. */
static void meta_is_these_bytes(void **state)
{
    static const uint8_t expected[] = {
        /* header */ 0x56, 0x50, 0x42, 0x31, 5, 0, 3, 0, 2, 0, 0, 0, 0, 0x20, 0, 0,
        /* runs */ 10, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, //
        2, 0, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0,             //
        5, 0, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0,             //
        /* units */ 1, 0, 3, 0, 0, 0, 0, 0,             //
        2, 0, 2, 0, 0, 0x20, 0, 0,
    };
    struct fixture guest;
    struct vm_error *err = NULL;
    struct encoded_batch out = {0};
    fixture_init(&guest, guest_pages);
    struct page_encoder *enc = page_encoder_create(
        &(struct page_encoder_config){
            .regions = guest.source, .n_regions = FIXTURE_REGIONS, .n_channels = 1},
        &err);
    struct page_batch *batch = batch_new(0);
    for (unsigned i = 0; i < 3; i++)
        batch_add(batch, 10 + i, NULL);
    for (unsigned i = 2; i <= 5; i += 3) {
        fill_page(&rng, fixture_page(guest.source, page_addr(1, i)), CONTENT_RANDOM);
        batch_add(batch, page_addr(1, i), fixture_page(guest.source, page_addr(1, i)));
    }
    assert_int_equal(page_encoder_encode(enc, batch, PAGE_MODE_LZ4, &out, &err), 0);
    assert_int_equal(out.meta_len, sizeof(expected));
    assert_memory_equal(out.meta, expected, sizeof(expected));
    encoded_batch_finish(&out);
    page_batch_unref(batch);
    page_encoder_destroy(enc);
    fixture_finish(&guest);
}

static int begin_plain(struct page_decoder *dec, struct vm_error **err)
{
    struct page_meta meta = plain_meta();
    struct iovec iov[PAGE_DECODER_IOV_MAX];
    unsigned n;
    uint8_t bytes[PAGE_META_MAX];
    page_meta_write(&meta, bytes);
    return page_decoder_begin(dec, bytes, page_meta_size(&meta), meta.payload_len, iov, &n, err);
}

static void pages_that_are_not_this_decoders_are_refused(void **state)
{
    struct fixture guest;
    struct vm_error *err = NULL;
    fixture_init(&guest, guest_pages);
    /* With three channels region 1 begins with a stripe of another one. */
    struct page_decoder *dec = new_decoder(&guest, 3, false);
    assert_int_equal(begin_plain(dec, &err), -1);
    assert_non_null(strstr(err->message, "another channel"));
    error_clear(&err);
    page_decoder_destroy(dec);

    uint8_t *base = guest.destination[1].base;
    guest.destination[1].base = NULL;
    dec = new_decoder(&guest, 1, false);
    assert_int_equal(begin_plain(dec, &err), -1);
    assert_non_null(strstr(err->message, "region 1 does not exist"));
    error_clear(&err);
    page_decoder_destroy(dec);
    guest.destination[1].base = base;
    fixture_finish(&guest);
}

/* ---- payload ---- */

/* Pages that `meta` does not name. */
static uint64_t sum_others(const struct fixture *guest, const struct page_meta *meta)
{
    uint64_t sum = 0;
    for (unsigned r = 0; r < FIXTURE_REGIONS; r++) {
        for (uint64_t p = 0; p < guest_pages[r]; p++) {
            bool named = false;
            for (unsigned i = 0; i < meta->n_runs && !named; i++)
                named = page_addr(r, p) - meta->runs[i].addr < meta->runs[i].count;
            const uint64_t *w =
                (const uint64_t *)(const void *)(guest->destination[r].base + p * GUEST_PAGE_SIZE);
            for (unsigned i = 0; i < GUEST_PAGE_SIZE / 8 && !named; i++)
                sum = sum * 31 + w[i];
        }
    }
    return sum;
}

/* Flip bytes of a valid batch: whatever comes of it, no page is written that meta does not name. */
static void flipped_bytes_stay_within_the_named_pages(void **state)
{
    unsigned accepted = 0, refused = 0;
    for (unsigned trial = 0; trial < 300; trial++) {
        struct fixture guest;
        struct vm_error *err = NULL;
        struct page_meta named;
        fixture_init(&guest, guest_pages);
        struct page_decoder *dec = new_decoder(&guest, 1, trial & 1);
        struct encoded_batch out =
            make_batch(&guest, dec, trial % 3 ? PAGE_MODE_LZ4 : PAGE_MODE_ZSTD_1);
        for (unsigned r = 0; r < FIXTURE_REGIONS; r++)
            guest.destination[r].base[guest.destination[r].size - 1] = 0x77;
        uint8_t *packed = out.payload[out.n_payload - 1].iov_base; /* own memory: deltas, blocks */
        size_t packed_len = out.payload[out.n_payload - 1].iov_len;
        cleanup_free uint8_t *meta = malloc(out.meta_len);
        memcpy(meta, out.meta, out.meta_len);
        for (uint64_t flips = 1 + prng_below(&rng, 3); flips > 0; flips--) {
            if (trial % 4 == 0)
                meta[prng_below(&rng, out.meta_len)] ^= (uint8_t)(1 << prng_below(&rng, 8));
            else
                packed[prng_below(&rng, packed_len)] ^= (uint8_t)(1 << prng_below(&rng, 8));
        }
        out.meta = meta;
        if (page_meta_read(meta, out.meta_len, out.payload_len, &named, NULL) < 0)
            named.n_runs = 0;
        uint64_t before = sum_others(&guest, &named);
        if (deliver(dec, &out, -1, &err) < 0)
            refused++;
        else
            accepted++;
        assert_int_equal(sum_others(&guest, &named), before);
        error_free(err);
        encoded_batch_finish(&out);
        page_decoder_destroy(dec);
        fixture_finish(&guest);
    }
    print_message("%u refused, %u accepted\n", refused, accepted);
    assert_true(refused > 100 && accepted > 10);
}

static int deliver_unit(struct page_decoder *dec, struct page_unit unit, uint64_t addr,
                        const uint8_t *payload, struct vm_error **err)
{
    struct page_meta meta = {.n_pages = unit.pages,
                             .n_runs = 1,
                             .n_units = 1,
                             .payload_len = unit.len,
                             .runs = {{addr, unit.pages}},
                             .units = {unit}};
    uint8_t bytes[PAGE_META_MAX];
    page_meta_write(&meta, bytes);
    struct iovec iov = {(void *)(uintptr_t)payload, unit.len};
    struct encoded_batch out = {.meta = bytes,
                                .meta_len = page_meta_size(&meta),
                                .payload = &iov,
                                .n_payload = unit.len > 0,
                                .payload_len = unit.len};
    return deliver(dec, &out, -1, err);
}

static void units_that_yield_another_size_are_refused(void **state)
{
    struct fixture guest;
    fixture_init(&guest, guest_pages);
    for (unsigned mode = PAGE_MODE_LZ4; mode < PAGE_MODE_COUNT; mode++) {
        for (int pages = 7; pages <= 9; pages++) {
            struct page_decoder *dec = new_decoder(&guest, 1, false);
            struct vm_error *err = NULL;
            struct encoded_batch out = {0};
            struct page_batch *batch = batch_new(0);
            struct page_encoder *enc = page_encoder_create(
                &(struct page_encoder_config){
                    .regions = guest.source, .n_regions = FIXTURE_REGIONS, .n_channels = 1},
                &err);
            for (unsigned i = 0; i < 8; i++) {
                uint8_t *page = guest.source[0].base + (size_t)i * GUEST_PAGE_SIZE;
                fill_page(&rng, page, CONTENT_TEXT);
                batch_add(batch, i, page);
            }
            assert_int_equal(page_encoder_encode(enc, batch, (enum page_mode)mode, &out, &err), 0);
            assert_int_equal(out.n_payload, 1);
            struct page_unit unit = {mode == PAGE_MODE_LZ4 ? PAGE_LZ4 : PAGE_ZSTD, (uint16_t)pages,
                                     (uint32_t)out.payload_len};
            int result = deliver_unit(dec, unit, 0, out.payload[0].iov_base, &err);
            assert_int_equal(result, pages == 8 ? 0 : -1);
            if (result < 0) {
                assert_int_equal(err->kind, VM_ERROR_PROTOCOL);
                error_clear(&err);
                /* The pages are undefined now; the decoder does not go on as if nothing were. */
                assert_int_equal(begin_plain(dec, &err), -1);
                error_clear(&err);
            }
            encoded_batch_finish(&out);
            page_batch_unref(batch);
            page_encoder_destroy(enc);
            page_decoder_destroy(dec);
        }
    }
    fixture_finish(&guest);
}

/* A frame that says that it needs a window of gigabytes gets no memory. */
static void a_giant_zstd_window_is_refused(void **state)
{
    static const uint8_t frame[] = {0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xa8, 0x03, 0x00, 0x00, 0, 0, 0};
    struct fixture guest;
    struct vm_error *err = NULL;
    fixture_init(&guest, guest_pages);
    struct page_decoder *dec = new_decoder(&guest, 1, false);
    assert_int_equal(
        deliver_unit(dec, (struct page_unit){PAGE_ZSTD, 256, sizeof(frame)}, 0, frame, &err), -1);
    error_free(err);
    page_decoder_destroy(dec);
    fixture_finish(&guest);
}

/* ---- connections that break ---- */

static void a_cut_batch_can_be_received_again(void **state)
{
    static const enum page_mode modes[] = {PAGE_MODE_RAW, PAGE_MODE_LZ4, PAGE_MODE_ZSTD_3};
    for (unsigned i = 0; i < 3; i++) {
        struct fixture guest;
        struct vm_error *err = NULL;
        fixture_init(&guest, guest_pages);
        struct page_decoder *dec = new_decoder(&guest, 1, false);
        struct encoded_batch out = make_batch(&guest, dec, modes[i]);
        for (size_t cut = 0; cut < out.payload_len; cut += 1 + out.payload_len / 97) {
            if (deliver(dec, &out, (ssize_t)cut, &err) < 0)
                fail_msg("%s", error_message(err));
        }
        assert_int_equal(deliver(dec, &out, (ssize_t)out.payload_len, &err), 0);
        assert_int_equal(deliver(dec, &out, -1, &err), 0);
        assert_memory_equal(guest.source[0].base, guest.destination[0].base, guest.source[0].size);
        assert_int_equal(page_decoder_stats(dec)->batches, 3);
        encoded_batch_finish(&out);
        page_decoder_destroy(dec);
        fixture_finish(&guest);
    }
}

/* The channel must not let that happen; if it does, then not silently. */
static void a_delta_applied_twice_is_noticed(void **state)
{
    struct fixture guest;
    struct vm_error *err = NULL;
    fixture_init(&guest, guest_pages);
    struct page_decoder *dec = new_decoder(&guest, 1, false);
    struct encoded_batch out = make_batch(&guest, dec, PAGE_MODE_LZ4);
    assert_int_equal(deliver(dec, &out, -1, &err), 0);
    assert_true(page_decoder_stats(dec)->kinds[PAGE_DELTA].pages > 10);
    assert_int_equal(page_decoder_commit(dec, &err), -1);
    error_clear(&err);
    for (uint64_t p = 160; p < 200; p++) /* the pages with deltas: another former version */
        fill_page(&rng, guest.destination[0].base + p * GUEST_PAGE_SIZE, CONTENT_RANDOM);
    assert_int_equal(deliver(dec, &out, -1, &err), -1);
    assert_non_null(strstr(err->message, "delta"));
    error_free(err);
    encoded_batch_finish(&out);
    page_decoder_destroy(dec);
    fixture_finish(&guest);
}

/* ---- zero pages ---- */

static unsigned resident(uint8_t *base, unsigned n)
{
    unsigned char present[64];
    unsigned sum = 0;
    assert_true(n <= sizeof(present));
    assert_int_equal(mincore(base, (size_t)n * GUEST_PAGE_SIZE, present), 0);
    for (unsigned i = 0; i < n; i++)
        sum += present[i] & 1;
    return sum;
}

/* Huge pages never: they are the guest's own, reserved. */
static void zero_pages_give_memory_back_where_that_is_allowed(void **state)
{
    enum { KEPT, GIVEN_BACK, HUGE, CASES };
    for (unsigned i = 0; i < CASES; i++) {
        struct fixture guest;
        struct vm_error *err = NULL;
        fixture_init(&guest, guest_pages);
        if (i == HUGE)
            guest.destination[2].page_size = 2 << 20;
        struct page_decoder *dec = new_decoder(&guest, 1, i != KEPT);
        uint8_t *base = guest.destination[2].base;
        memset(base, 0x11, (size_t)40 * GUEST_PAGE_SIZE);
        struct page_unit many = {PAGE_ZERO, 32, 0}, few = {PAGE_ZERO, 4, 0};
        assert_int_equal(deliver_unit(dec, many, page_addr(2, 0), NULL, &err), 0);
        assert_int_equal(deliver_unit(dec, few, page_addr(2, 34), NULL, &err), 0);
        assert_int_equal(resident(base, 40), i == GIVEN_BACK ? 8 : 40);
        /* Holes stay holes. */
        assert_int_equal(resident(base + (size_t)40 * GUEST_PAGE_SIZE, 24), 0);
        many.pages = 24;
        assert_int_equal(deliver_unit(dec, many, page_addr(2, 40), NULL, &err), 0);
        assert_int_equal(resident(base + (size_t)40 * GUEST_PAGE_SIZE, 24), 0);
        for (unsigned page = 0; page < 64; page++)
            assert_int_equal(page_is_zero(base + (size_t)page * GUEST_PAGE_SIZE),
                             page < 32 || (page >= 34 && page < 38) || page >= 40);
        page_decoder_destroy(dec);
        fixture_finish(&guest);
    }
}

/* The kernel's: it may be one that takes a hole in a huge page for made, and does nothing. */
int __real_madvise(void *addr, size_t length, int advice);
int __wrap_madvise(void *addr, size_t length, int advice);
static bool madvise_lies;

int __wrap_madvise(void *addr, size_t length, int advice)
{
    return madvise_lies && advice == MADV_REMOVE ? 0 : __real_madvise(addr, length, advice);
}

static void zero_pages_in_huge_pages_are_cleared(void **state)
{
    struct fixture guest;
    struct vm_error *err = NULL;
    fixture_init(&guest, guest_pages);
    guest.destination[2].page_size = 2 << 20;
    struct page_decoder *dec = new_decoder(&guest, 1, true);
    uint8_t *base = guest.destination[2].base;
    memset(base, 0x11, (size_t)64 * GUEST_PAGE_SIZE);
    madvise_lies = true;
    struct page_unit many = {PAGE_ZERO, 32, 0};
    assert_int_equal(deliver_unit(dec, many, page_addr(2, 8), NULL, &err), 0);
    madvise_lies = false;
    for (unsigned i = 0; i < 64; i++)
        assert_int_equal(page_is_zero(base + (size_t)i * GUEST_PAGE_SIZE), i >= 8 && i < 40);
    page_decoder_destroy(dec);
    fixture_finish(&guest);
}

/* Memory that cannot be given back is cleared instead. */
static void zero_pages_in_private_memory_are_cleared(void **state)
{
    struct fixture guest;
    struct vm_error *err = NULL;
    fixture_init(&guest, guest_pages);
    uint8_t *shared = guest.destination[2].base;
    int file = guest.destination[2].file;
    guest.destination[2].file = 0;
    guest.destination[2].base = mmap(NULL, guest.destination[2].size, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memset(guest.destination[2].base, 0x22, guest.destination[2].size);
    struct page_decoder *dec = new_decoder(&guest, 1, true);
    assert_int_equal(
        deliver_unit(dec, (struct page_unit){PAGE_ZERO, 64, 0}, page_addr(2, 0), NULL, &err), 0);
    for (unsigned i = 0; i < 64; i++)
        assert_true(page_is_zero(guest.destination[2].base + (size_t)i * GUEST_PAGE_SIZE));
    page_decoder_destroy(dec);
    munmap(guest.destination[2].base, guest.destination[2].size);
    guest.destination[2].base = shared;
    guest.destination[2].file = file;
    fixture_finish(&guest);
}

static void zero_is_found_wherever_a_byte_is_not(void **state)
{
    uint8_t memory[GUEST_PAGE_SIZE + 8] = {0};
    for (unsigned offset = 0; offset <= 8; offset += 8) {
        uint8_t *page = memory + offset;
        assert_true(page_is_zero(page));
        for (unsigned i = 0; i < GUEST_PAGE_SIZE; i++) {
            page[i] = 0x80;
            assert_false(page_is_zero(page));
            page[i] = 0;
        }
    }
    memory[0] = memory[GUEST_PAGE_SIZE + 1] = 1;
    assert_true(page_is_zero(memory + 1)); /* looks no further than its page */
}

int main(void)
{
    const char *seed = getenv("VMMIG_TEST_SEED");
    rng.state = seed ? strtoull(seed, NULL, 0) : (uint64_t)clock_wall_ns();
    print_message("VMMIG_TEST_SEED=%llu repeats this run\n", (unsigned long long)rng.state);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(spoiled_meta_is_refused),
        cmocka_unit_test(meta_of_a_wrong_length_is_refused),
        cmocka_unit_test(meta_survives_a_round_trip),
        cmocka_unit_test(meta_is_these_bytes),
        cmocka_unit_test(pages_that_are_not_this_decoders_are_refused),
        cmocka_unit_test(flipped_bytes_stay_within_the_named_pages),
        cmocka_unit_test(units_that_yield_another_size_are_refused),
        cmocka_unit_test(a_giant_zstd_window_is_refused),
        cmocka_unit_test(a_cut_batch_can_be_received_again),
        cmocka_unit_test(a_delta_applied_twice_is_noticed),
        cmocka_unit_test(zero_pages_give_memory_back_where_that_is_allowed),
        cmocka_unit_test(zero_pages_in_huge_pages_are_cleared),
        cmocka_unit_test(zero_pages_in_private_memory_are_cleared),
        cmocka_unit_test(zero_is_found_wherever_a_byte_is_not),
    };
    return cmocka_run_group_tests_name("page_decoder", tests, NULL, NULL);
}

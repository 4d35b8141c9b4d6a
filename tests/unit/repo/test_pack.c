/* SPDX-License-Identifier: Apache-2.0 */
#include "tests/unit/repo/repo_test.h"
#include "repo/pack.h"

#include <openssl/sha.h>

static struct uuid repository = {{1, 2, 3}};

/* A page that compresses to about a third. */
static void make_page(uint8_t *page, uint64_t seed)
{
    memset(page, (int)seed | 1, PAGE_BYTES);
    test_fill_random(page, PAGE_BYTES / 3, seed);
}

/* ---- identity ---- */

static void a_page_is_identified_by_sha256(void **state)
{
    uint8_t page[PAGE_BYTES];
    struct page_hasher h;
    struct page_id id;
    make_page(page, 7);
    assert_int_equal(page_hasher_init(&h, NULL), 0);
    for (int i = 0; i < 2; i++) {
        uint8_t want[32];
        page[0] = (uint8_t)i;
        SHA256(page, PAGE_BYTES, want);
        assert_int_equal(page_hasher_hash(&h, page, PAGE_BYTES, &id, NULL), 0);
        assert_memory_equal(id.bytes, want, 32);
    }
    page_hasher_finish(&h);
}

/* With and without what the processor can do for two of them at once. */
static void pages_in_a_row_are_identified_alike(void **state)
{
    enum { MOST = 33 };
    static uint8_t pages[MOST * PAGE_BYTES + 1];
    struct page_hasher h;
    assert_int_equal(page_hasher_init(&h, NULL), 0);
    for (unsigned round = 0; round < 2 * (MOST + 1); round++) {
        unsigned n = round % (MOST + 1);
        uint8_t *first = pages + n % 2; /* at any address */
        struct page_id ids[MOST + 1], unset;
        memset(&unset, 0xee, sizeof(unset));
        memset(ids, 0xee, sizeof(ids));
        test_fill_random(pages, sizeof(pages), round);
        h.in_pairs = h.in_pairs && round <= MOST;
        assert_int_equal(page_hasher_pages(&h, first, n, ids, NULL), 0);
        for (unsigned i = 0; i < n; i++) {
            uint8_t want[32];
            SHA256(first + (size_t)i * PAGE_BYTES, PAGE_BYTES, want);
            assert_memory_equal(ids[i].bytes, want, 32);
        }
        assert_memory_equal(&ids[n], &unset, sizeof(unset));
    }
    page_hasher_finish(&h);
}

static void zeros_are_told_from_almost_zeros(void **state)
{
    uint8_t page[PAGE_BYTES] = {0};
    assert_true(page_all_zero(page));
    for (int i = 0; i < PAGE_BYTES; i++) {
        page[i] = 1;
        assert_false(page_all_zero(page));
        page[i] = 0;
    }
}

static void an_extent_knows_where_its_zeros_are(void **state)
{
    struct page_hasher h;
    struct page_id ids[2] = {{{1}}, {{2}}}, a, b, whole;
    uint8_t by_hand[16 * 32] = {0}, want[32];
    page_hasher_init(&h, NULL);
    page_hasher_extent(&h, ids, 0x0101, &a, NULL);
    page_hasher_extent(&h, ids, 0x8001, &b, NULL);
    assert_false(page_id_equal(&a, &b));
    by_hand[0] = 1;
    by_hand[15 * 32] = 2;
    SHA256(by_hand, sizeof(by_hand), want);
    assert_memory_equal(b.bytes, want, 32);
    page_hasher_hash(&h, by_hand, sizeof(by_hand), &whole, NULL);
    assert_true(page_id_equal(&whole, &b));
    page_hasher_finish(&h);
}

/* ---- records ---- */

static size_t encode(enum record_compression compression, unsigned n_pages, bool shrinks,
                     uint8_t *raw, uint8_t *record, uint64_t pack, uint64_t offset)
{
    struct record_codec c;
    for (unsigned i = 0; i < n_pages; i++)
        shrinks ? make_page(raw + i * PAGE_BYTES, i + 1)
                : test_fill_random(raw + i * PAGE_BYTES, PAGE_BYTES, i + 1);
    assert_int_equal(record_codec_init(&c, compression, 3, NULL), 0);
    size_t len = record_encode(&c, raw, n_pages, 0, record);
    record_seal(record, len, pack, offset);
    record_codec_finish(&c);
    return len;
}

static void records_come_back_in_every_compression(void **state)
{
    static uint8_t raw[RECORD_RAW_MAX], record[RECORD_MAX], out[RECORD_RAW_MAX];
    struct record_codec decoder;
    record_codec_init(&decoder, RECORD_LZ4, 0, NULL);
    for (int compression = RECORD_RAW; compression <= RECORD_ZSTD; compression++) {
        for (int shrinks = 0; shrinks < 2; shrinks++) {
            for (unsigned n = 1; n <= 16; n += 5) {
                cleanup_error struct vm_error *err = NULL;
                size_t len = encode(compression, n, shrinks, raw, record, 9, 64);
                bool smaller = len < n * PAGE_BYTES / 2;
                assert_int_equal(smaller, shrinks && compression != RECORD_RAW);
                unsigned got = 0;
                record_decode(&decoder, record, len, 9, 64, out, &got, &err);
                assert_ok(err);
                assert_int_equal(got, n);
                assert_memory_equal(out, raw, n * PAGE_BYTES);
            }
        }
    }
    record_codec_finish(&decoder);
}

static void no_flipped_bit_gets_through(void **state)
{
    static uint8_t raw[RECORD_RAW_MAX], record[RECORD_MAX], out[RECORD_RAW_MAX];
    struct record_codec c;
    size_t len = encode(RECORD_LZ4, 2, true, raw, record, 9, 64);
    record_codec_init(&c, RECORD_LZ4, 0, NULL);
    for (size_t i = 0; i < len; i += i < 24 ? 1 : 97) {
        cleanup_error struct vm_error *err = NULL;
        unsigned n;
        record[i] ^= 0x10;
        assert_int_equal(record_decode(&c, record, len, 9, 64, out, &n, &err), -1);
        assert_int_equal(err->kind, VM_ERROR_CORRUPT);
        record[i] ^= 0x10;
    }
    record_codec_finish(&c);
}

static void a_record_belongs_to_its_place(void **state)
{
    static uint8_t raw[RECORD_RAW_MAX], record[RECORD_MAX];
    size_t len = encode(RECORD_LZ4, 2, true, raw, record, 9, 64);
    struct record_info info;
    assert_int_equal(record_check(record, len, 9, 64, &info, NULL), 0);
    assert_int_equal(record_check(record, len, 9, 72, &info, NULL), -1);
    assert_int_equal(record_check(record, len, 8, 64, &info, NULL), -1);
    assert_int_equal(record_check(record, len - 1, 9, 64, &info, NULL), -1);
    assert_int_equal(record_check(record, 15, 9, 64, &info, NULL), -1);
}

/* ---- packs ---- */

static struct footer sample_footer(void)
{
    struct footer f = {.pack = 77, .n_records = 3, .n_pages = 16 + 2 + 16};
    f.records = calloc(3, sizeof(*f.records));
    f.ids = calloc(f.n_pages, sizeof(*f.ids));
    f.records[0] = (struct footer_record){PACK_HEADER, 1000, 0, 0xffff, 16};
    f.records[1] = (struct footer_record){PACK_HEADER + 1000, 500, 16, 0, 2};
    f.records[2] = (struct footer_record){PACK_HEADER + 1504, 70, 18, 0xffff, 16};
    test_fill_random(f.ids, f.n_pages * sizeof(*f.ids), 5);
    return f;
}

enum { BODY = PACK_HEADER + 1576 };

static void a_footer_comes_back(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    cleanup_buffer struct buffer b = {0};
    struct footer f = sample_footer(), got = {0};
    footer_write(&f, &b);
    assert_int_equal(b.len, footer_size(3, 34));
    size_t size = 0;
    pack_trailer_parse(b.data + b.len - PACK_TRAILER, 77, BODY + b.len, &size, &err);
    assert_ok(err);
    assert_int_equal(size, b.len);
    footer_parse(b.data, b.len, 77, BODY + b.len, &got, &err);
    assert_ok(err);
    assert_int_equal(got.n_pages, 34);
    for (int i = 0; i < 3; i++) {
        assert_int_equal(got.records[i].offset, f.records[i].offset);
        assert_int_equal(got.records[i].len, f.records[i].len);
        assert_int_equal(got.records[i].mask, f.records[i].mask);
        assert_int_equal(got.records[i].n_pages, f.records[i].n_pages);
        assert_int_equal(got.records[i].first_page, f.records[i].first_page);
    }
    assert_memory_equal(got.ids, f.ids, 34 * sizeof(*f.ids));
    assert_int_equal(footer_record_of(&got, 0), 0);
    assert_int_equal(footer_record_of(&got, 15), 0);
    assert_int_equal(footer_record_of(&got, 16), 1);
    assert_int_equal(footer_record_of(&got, 17), 1);
    assert_int_equal(footer_record_of(&got, 33), 2);
    footer_finish(&got);
    footer_finish(&f);
}

static void a_damaged_footer_is_refused(void **state)
{
    cleanup_buffer struct buffer b = {0};
    struct footer f = sample_footer(), got;
    footer_write(&f, &b);
    for (size_t i = 0; i < b.len; i++) {
        cleanup_error struct vm_error *err = NULL;
        b.data[i] ^= 1;
        assert_int_equal(footer_parse(b.data, b.len, 77, BODY + b.len, &got, &err), -1);
        assert_int_equal(err->kind, VM_ERROR_CORRUPT);
        b.data[i] ^= 1;
    }
    assert_int_equal(footer_parse(b.data, b.len, 78, BODY + b.len, &got, NULL), -1);
    assert_int_equal(footer_parse(b.data, b.len, 77, BODY + b.len - 8, &got, NULL), -1);
    assert_int_equal(footer_parse(b.data + 1, b.len - 1, 77, BODY + b.len, &got, NULL), -1);
    footer_finish(&f);
}

/* Consistent checksums do not make nonsense acceptable. */
static void a_footer_that_lies_is_refused(void **state)
{
    static const struct footer_record lies[] = {
        {8, 1000, 0, 0xffff, 16},                 /* within the header */
        {PACK_HEADER, 1600, 0, 0xffff, 16},       /* into the next record */
        {PACK_HEADER, 1000, 0, 0x7fff, 16},       /* mask and pages differ */
        {PACK_HEADER, 1000, 0, 0, 17},            /* too many pages */
        {PACK_HEADER, RECORD_HEADER, 0, 0, 16},   /* nothing in it */
        {PACK_HEADER, RECORD_MAX + 8, 0, 0, 16},  /* too long */
        {PACK_HEADER, 1000, 0, 0, 15},            /* a page too few */
    };
    for (size_t i = 0; i < sizeof(lies) / sizeof(*lies); i++) {
        cleanup_buffer struct buffer b = {0};
        struct footer f = sample_footer(), got;
        f.records[0] = lies[i];
        footer_write(&f, &b);
        assert_int_equal(footer_parse(b.data, b.len, 77, BODY + b.len, &got, NULL), -1);
        footer_finish(&f);
    }
}

static void a_header_names_pack_and_repository(void **state)
{
    uint8_t header[PACK_HEADER];
    struct uuid other = {{9}};
    pack_header_write(header, 5, &repository);
    assert_int_equal(pack_header_check(header, 5, &repository, NULL), 0);
    assert_int_equal(pack_header_check(header, 6, &repository, NULL), -1);
    assert_int_equal(pack_header_check(header, 5, &other, NULL), -1);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_page_is_identified_by_sha256),
        cmocka_unit_test(pages_in_a_row_are_identified_alike),
        cmocka_unit_test(zeros_are_told_from_almost_zeros),
        cmocka_unit_test(an_extent_knows_where_its_zeros_are),
        cmocka_unit_test(records_come_back_in_every_compression),
        cmocka_unit_test(no_flipped_bit_gets_through),
        cmocka_unit_test(a_record_belongs_to_its_place),
        cmocka_unit_test(a_footer_comes_back),
        cmocka_unit_test(a_damaged_footer_is_refused),
        cmocka_unit_test(a_footer_that_lies_is_refused),
        cmocka_unit_test(a_header_names_pack_and_repository),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

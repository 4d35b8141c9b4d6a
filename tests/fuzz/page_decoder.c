/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Fuzzer of migrate/page_decoder: batches as a hostile peer may send them, some cut off, into a
 * guest of three small regions. Asserted: no byte is written but those of pages that an accepted
 * meta names; the pieces for the payload add up and lie in those pages or in memory that is not the
 * guest's; a decoder that refused a payload takes no more.
 *
 * Input: any number of  u16 length of meta, u32 length of payload, u8 (odd: cut), meta, payload;
 * what is missing at the end is zero.
 */
#include "migrate/page_decoder.h"

#include <assert.h>

/* Built by libFuzzer's driver. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { REGIONS = 3, PAGES = 40 + 3 + 21, HEADER = 7 };

static const unsigned region_pages[REGIONS] = {40, 3, 21};

struct machine {
    struct guest_region regions[REGIONS];
    uint8_t *memory, *shadow; /* PAGES pages each; the regions side by side */
};

static void machine_init(struct machine *m)
{
    size_t page = 0;
    m->memory = malloc((size_t)PAGES * GUEST_PAGE_SIZE);
    m->shadow = malloc((size_t)PAGES * GUEST_PAGE_SIZE);
    assert(m->memory && m->shadow);
    for (size_t i = 0; i < PAGES; i++) /* every third page is zero */
        memset(m->memory + i * GUEST_PAGE_SIZE, (int)(i % 3 * i), GUEST_PAGE_SIZE);
    memcpy(m->shadow, m->memory, (size_t)PAGES * GUEST_PAGE_SIZE);
    for (unsigned i = 0; i < REGIONS; i++) {
        m->regions[i] = (struct guest_region){.name = "ram",
                                              .size = (uint64_t)region_pages[i] * GUEST_PAGE_SIZE,
                                              .base = m->memory + page * GUEST_PAGE_SIZE};
        page += region_pages[i];
    }
}

/* Offset of a named page in memory and shadow. */
static size_t offset_of(const struct machine *m, uint64_t addr)
{
    unsigned region = page_addr_region(addr);
    assert(region < REGIONS && page_addr_number(addr) < region_pages[region]);
    return (size_t)(m->regions[region].base - m->memory) + page_addr_number(addr) * GUEST_PAGE_SIZE;
}

/* Let the shadow follow in the pages that are named, and compare the whole. */
static void compare(const struct machine *m, const struct page_meta *named)
{
    for (unsigned i = 0; named && i < named->n_runs; i++) {
        size_t offset = offset_of(m, named->runs[i].addr);
        size_t len = (size_t)named->runs[i].count * GUEST_PAGE_SIZE;
        memcpy(m->shadow + offset, m->memory + offset, len);
    }
    assert(!memcmp(m->memory, m->shadow, (size_t)PAGES * GUEST_PAGE_SIZE));
}

/* The next bytes of the payload, zeros behind its end, at most `limit` of them. */
static size_t fill(const struct iovec *iov, unsigned n, struct cursor *payload, size_t limit)
{
    size_t total = 0;
    for (unsigned i = 0; i < n; i++) {
        assert(iov[i].iov_len > 0);
        size_t wanted = total + iov[i].iov_len <= limit ? iov[i].iov_len
                        : total < limit                 ? limit - total
                                                        : 0;
        size_t given = wanted < cursor_left(payload) ? wanted : cursor_left(payload);
        memcpy(iov[i].iov_base, cursor_take(payload, given), given);
        memset((uint8_t *)iov[i].iov_base + given, 0, wanted - given);
        total += iov[i].iov_len;
    }
    return total;
}

/* False: the decoder is of no use any more. */
static bool one_batch(struct machine *m, struct page_decoder *dec, struct cursor *in)
{
    struct iovec iov[PAGE_DECODER_IOV_MAX];
    unsigned n = 0;
    struct page_meta named;
    size_t meta_len = cursor_le16(in), payload_len = cursor_le32(in);
    bool cut = cursor_u8(in) & 1;
    if (in->failed)
        return false;
    if (meta_len > cursor_left(in))
        meta_len = cursor_left(in);
    uint8_t *meta = malloc(meta_len + 1);
    assert(meta);
    memcpy(meta, cursor_take(in, meta_len), meta_len);
    bool begun = page_decoder_begin(dec, meta, meta_len, payload_len, iov, &n, NULL) == 0;
    bool valid = page_meta_read(meta, meta_len, payload_len, &named, NULL) == 0;
    free(meta);
    assert(valid || !begun);
    if (!begun) {
        compare(m, NULL);
        assert(page_decoder_commit(dec, NULL) < 0);
        return true;
    }
    size_t limit = cut ? payload_len / 2 : payload_len;
    assert(fill(iov, n, in, limit) == payload_len);
    bool good = cut || page_decoder_commit(dec, NULL) == 0;
    compare(m, &named);
    return good;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct machine m;
    struct cursor in = cursor_init(data, size);
    machine_init(&m);
    struct page_decoder *dec = page_decoder_create(
        &(struct page_decoder_config){.regions = m.regions, .n_regions = REGIONS, .n_channels = 1},
        NULL);
    assert(dec);
    while (cursor_left(&in) >= HEADER && one_batch(&m, dec, &in))
        ;
    page_decoder_destroy(dec);
    free(m.memory);
    free(m.shadow);
    return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
#include "migrate/page_format.h"

static const struct {
    const char *name;
    uint8_t number;
} kinds[PAGE_KIND_COUNT] = {
#define X(id, name, number) {name, number},
    PAGE_KINDS(X)
#undef X
};

const char *page_kind_name(enum page_kind kind)
{
    return (unsigned)kind < PAGE_KIND_COUNT ? kinds[kind].name : "unknown";
}

/* The vectors that every machine has; nothing but loads and ors, so wider ones gain little. */
typedef uint64_t page_vector __attribute__((vector_size(16), aligned(1), may_alias));

bool page_is_zero(const uint8_t *page)
{
    const page_vector *v = (const page_vector *)page;
    enum { VECTORS = GUEST_PAGE_SIZE / sizeof(*v), STEP = 16 };

    /* Nearly all other pages show it at their begin, middle or end. */
    if (get_le64(page) | get_le64(page + GUEST_PAGE_SIZE / 2) |
        get_le64(page + GUEST_PAGE_SIZE - 8))
        return false;
    for (unsigned i = 0; i < VECTORS; i += STEP) {
        page_vector any = v[i];
        for (unsigned j = 1; j < STEP; j++)
            any |= v[i + j];
        if (any[0] | any[1])
            return false;
    }
    return true;
}

void page_meta_write(const struct page_meta *meta, uint8_t *out)
{
    put_le32(out, PAGE_META_MAGIC);
    put_le16(out + 4, (uint16_t)meta->n_pages);
    put_le16(out + 6, (uint16_t)meta->n_runs);
    put_le16(out + 8, (uint16_t)meta->n_units);
    put_le16(out + 10, 0);
    put_le32(out + 12, meta->payload_len);
    out += PAGE_META_HEADER_SIZE;
    for (unsigned i = 0; i < meta->n_runs; i++, out += PAGE_META_RUN_SIZE) {
        put_le64(out, meta->runs[i].addr);
        put_le32(out + 8, meta->runs[i].count);
    }
    for (unsigned i = 0; i < meta->n_units; i++, out += PAGE_META_UNIT_SIZE) {
        out[0] = kinds[meta->units[i].kind].number;
        out[1] = 0;
        put_le16(out + 2, meta->units[i].pages);
        put_le32(out + 4, meta->units[i].len);
    }
}

static int invalid(struct vm_error **err, const char *what)
{
    return error_set(err, VM_ERROR_PROTOCOL, "invalid page batch: %s", what);
}

static int read_header(struct cursor *c, size_t payload_len, struct page_meta *meta,
                       struct vm_error **err)
{
    uint32_t magic = cursor_le32(c);
    meta->n_pages = cursor_le16(c);
    meta->n_runs = cursor_le16(c);
    meta->n_units = cursor_le16(c);
    uint16_t reserved = cursor_le16(c);
    meta->payload_len = cursor_le32(c);
    if (c->failed)
        return invalid(err, "shorter than its header");
    if (magic != PAGE_META_MAGIC || reserved)
        return invalid(err, "wrong magic");
    if (meta->n_pages < 1 || meta->n_pages > PAGE_BATCH_MAX)
        return invalid(err, "page count out of range");
    if (meta->n_runs < 1 || meta->n_runs > meta->n_pages || meta->n_units < 1 ||
        meta->n_units > meta->n_pages)
        return invalid(err, "run or unit count out of range");
    if (meta->payload_len != payload_len || payload_len > PAGE_PAYLOAD_MAX)
        return invalid(err, "payload length disagrees or is out of range");
    if (cursor_left(c) != page_meta_size(meta) - PAGE_META_HEADER_SIZE)
        return invalid(err, "length does not match its counts");
    return 0;
}

static int read_runs(struct cursor *c, struct page_meta *meta, struct vm_error **err)
{
    unsigned left = meta->n_pages;
    for (unsigned i = 0; i < meta->n_runs; i++) {
        struct page_run *run = &meta->runs[i];
        run->addr = cursor_le64(c);
        run->count = cursor_le32(c);
        if (run->count < 1 || run->count > left)
            return invalid(err, "runs do not add up");
        left -= run->count;
    }
    return left ? invalid(err, "runs do not add up") : 0;
}

/* All runs together hold at most PAGE_BATCH_MAX pages: a small hash set of them is quick. */
static int check_duplicates(const struct page_meta *meta, struct vm_error **err)
{
    enum { SLOTS = 2 * PAGE_BATCH_MAX };
    uint64_t slots[SLOTS];
    uint8_t used[SLOTS] = {0};

    if (meta->n_runs == 1)
        return 0;
    for (unsigned i = 0; i < meta->n_runs; i++) {
        for (uint32_t j = 0; j < meta->runs[i].count; j++) {
            uint64_t addr = meta->runs[i].addr + j;
            unsigned slot = (unsigned)((addr * 0x9E3779B97F4A7C15u) >> 32) % SLOTS;
            for (; used[slot]; slot = (slot + 1) % SLOTS) {
                if (slots[slot] == addr)
                    return invalid(err, "a page is named twice");
            }
            used[slot] = 1;
            slots[slot] = addr;
        }
    }
    return 0;
}

static bool kind_of_number(uint8_t number, enum page_kind *ret_kind)
{
    for (unsigned i = 0; number && i < PAGE_KIND_COUNT; i++) {
        if (kinds[i].number == number) {
            *ret_kind = (enum page_kind)i;
            return true;
        }
    }
    return false;
}

static bool unit_is_valid(const struct page_unit *unit)
{
    uint32_t plain = unit->pages * GUEST_PAGE_SIZE;
    switch (unit->kind) {
    case PAGE_ZERO:
        return unit->len == 0;
    case PAGE_RAW:
        return unit->len == plain;
    case PAGE_LZ4:
        return unit->pages <= PAGE_LZ4_PAGES_MAX && unit->len > 0 && unit->len < plain;
    case PAGE_DELTA:
        return unit->pages == 1 && unit->len > PAGE_DELTA_CHECK_SIZE && unit->len < plain;
    case PAGE_ZSTD:
        return unit->len > 0 && unit->len < plain;
    case PAGE_FRESH_ZERO:
    case PAGE_SAME:
    case PAGE_KIND_COUNT:
        break;
    }
    return false;
}

static int read_units(struct cursor *c, struct page_meta *meta, struct vm_error **err)
{
    unsigned pages_left = meta->n_pages;
    uint32_t bytes_left = meta->payload_len;
    for (unsigned i = 0; i < meta->n_units; i++) {
        struct page_unit *unit = &meta->units[i];
        uint8_t number = cursor_u8(c);
        uint8_t reserved = cursor_u8(c);
        unit->pages = cursor_le16(c);
        unit->len = cursor_le32(c);
        if (!kind_of_number(number, &unit->kind) || reserved)
            return invalid(err, "unit of unknown kind");
        if (unit->pages < 1 || unit->pages > pages_left || unit->len > bytes_left)
            return invalid(err, "units do not add up");
        if (!unit_is_valid(unit))
            return invalid(err, "unit whose length does not fit its kind");
        pages_left -= unit->pages;
        bytes_left -= unit->len;
    }
    return pages_left || bytes_left ? invalid(err, "units do not add up") : 0;
}

int page_meta_read(const void *data, size_t len, size_t payload_len, struct page_meta *ret_meta,
                   struct vm_error **err)
{
    struct cursor c = cursor_init(data, len);
    if (read_header(&c, payload_len, ret_meta, err) < 0 || read_runs(&c, ret_meta, err) < 0 ||
        check_duplicates(ret_meta, err) < 0 || read_units(&c, ret_meta, err) < 0)
        return -1;
    return 0;
}

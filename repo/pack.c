/* SPDX-License-Identifier: Apache-2.0 */
#include "repo/pack.h"

#include <xxhash.h>

static const char header_magic[8] = {'V', 'M', 'M', 'I', 'G', 'P', 'K', '1'};
static const char trailer_magic[8] = {'V', 'M', 'M', 'I', 'G', 'P', 'K', 'E'};

static int damaged(struct vm_error **err, uint64_t pack, const char *how)
{
    return error_set(err, VM_ERROR_CORRUPT, "pack %016llx: %s", (unsigned long long)pack, how);
}

void footer_finish(struct footer *f)
{
    free(f->records);
    free(f->ids);
    *f = (struct footer){0};
}

uint32_t footer_record_of(const struct footer *f, uint32_t page)
{
    uint32_t low = 0, high = f->n_records;
    while (high - low > 1) {
        uint32_t middle = low + (high - low) / 2;
        if (f->records[middle].first_page <= page)
            low = middle;
        else
            high = middle;
    }
    return low;
}

const struct footer_record *footer_record_at(const struct footer *f, uint32_t offset)
{
    uint32_t low = 0, high = f->n_records;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (f->records[middle].offset < offset)
            low = middle + 1;
        else
            high = middle;
    }
    return low < f->n_records && f->records[low].offset == offset ? &f->records[low] : NULL;
}

int pack_trailer_parse(const uint8_t trailer[PACK_TRAILER], uint64_t pack, uint64_t pack_size,
                       size_t *ret_footer_size, struct vm_error **err)
{
    if (memcmp(trailer + 16, trailer_magic, 8))
        return damaged(err, pack, "it does not end as a pack does");
    if (get_le64(trailer + 8) != pack)
        return damaged(err, pack, "it bears another pack's number");
    uint32_t n_records = get_le32(trailer), n_pages = get_le32(trailer + 4);
    if (!n_records || n_records > PACK_RECORDS_MAX || n_pages < n_records ||
        n_pages > PACK_PAGES_MAX || footer_size(n_records, n_pages) + PACK_HEADER > pack_size)
        return damaged(err, pack, "its trailer makes no sense");
    *ret_footer_size = footer_size(n_records, n_pages);
    return 0;
}

static int parse_records(struct footer *f, struct cursor *c, uint64_t body, struct vm_error **err)
{
    uint64_t end = PACK_HEADER;
    uint32_t page = 0;
    for (uint32_t i = 0; i < f->n_records; i++) {
        struct footer_record *r = &f->records[i];
        uint64_t offset = (uint64_t)cursor_le32(c) * RECORD_ALIGN;
        r->len = cursor_le32(c);
        r->n_pages = cursor_u8(c);
        r->compression = cursor_u8(c);
        r->mask = cursor_le16(c);
        r->first_page = (uint16_t)page;
        page += r->n_pages;
        if (offset < end || r->len <= RECORD_HEADER || r->len > RECORD_MAX ||
            offset + r->len > body || !r->n_pages || r->n_pages > RECORD_PAGES_MAX ||
            page > f->n_pages || r->compression > RECORD_ZSTD ||
            (r->mask && __builtin_popcount(r->mask) != r->n_pages))
            return damaged(err, f->pack, "its footer makes no sense");
        r->offset = (uint32_t)offset;
        end = offset + r->len;
    }
    return page == f->n_pages ? 0 : damaged(err, f->pack, "its footer makes no sense");
}

int footer_parse(const uint8_t *data, size_t len, uint64_t pack, uint64_t pack_size,
                 struct footer *ret_footer, struct vm_error **err)
{
    size_t size;
    if (len < PACK_TRAILER || len > pack_size)
        return damaged(err, pack, "it is too short");
    const uint8_t *trailer = data + len - PACK_TRAILER;
    if (pack_trailer_parse(trailer, pack, pack_size, &size, err) < 0)
        return -1;
    if (size != len)
        return damaged(err, pack, "its footer has another size");
    if (XXH3_64bits_withSeed(data, len - 8, pack) != get_le64(trailer + 24))
        return damaged(err, pack, "the checksum of its footer is wrong");

    struct footer f = {
        .pack = pack, .n_records = get_le32(trailer), .n_pages = get_le32(trailer + 4)};
    f.records = calloc(f.n_records, sizeof(*f.records));
    f.ids = malloc(f.n_pages * sizeof(*f.ids));
    struct cursor c = cursor_init(data, len - PACK_TRAILER);
    if (!f.records || !f.ids) {
        footer_finish(&f);
        return error_nomem(err);
    }
    if (parse_records(&f, &c, pack_size - len, err) < 0) {
        footer_finish(&f);
        return -1;
    }
    memcpy(f.ids, cursor_take(&c, f.n_pages * sizeof(*f.ids)), f.n_pages * sizeof(*f.ids));
    *ret_footer = f;
    return 0;
}

void footer_write(const struct footer *f, struct buffer *out)
{
    size_t start = out->len;
    for (uint32_t i = 0; i < f->n_records; i++) {
        const struct footer_record *r = &f->records[i];
        buffer_put_le32(out, r->offset / RECORD_ALIGN);
        buffer_put_le32(out, r->len);
        buffer_put_u8(out, r->n_pages);
        buffer_put_u8(out, r->compression);
        buffer_put_le16(out, r->mask);
    }
    buffer_put(out, f->ids, f->n_pages * sizeof(*f->ids));
    buffer_put_le32(out, f->n_records);
    buffer_put_le32(out, f->n_pages);
    buffer_put_le64(out, f->pack);
    buffer_put(out, trailer_magic, sizeof(trailer_magic));
    if (!out->failed)
        buffer_put_le64(out, XXH3_64bits_withSeed(out->data + start, out->len - start, f->pack));
}

void pack_header_write(uint8_t out[PACK_HEADER], uint64_t pack, const struct uuid *repository)
{
    memcpy(out, header_magic, 8);
    put_le64(out + 8, pack);
    memcpy(out + 16, repository->bytes, 16);
}

int pack_header_check(const uint8_t header[PACK_HEADER], uint64_t pack,
                      const struct uuid *repository, struct vm_error **err)
{
    uint8_t want[PACK_HEADER];
    pack_header_write(want, pack, repository);
    return memcmp(header, want, PACK_HEADER) ? damaged(err, pack, "its header is not that of this "
                                                                  "pack of this repository")
                                             : 0;
}

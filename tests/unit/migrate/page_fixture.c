/* SPDX-License-Identifier: Apache-2.0 */
#include "page_fixture.h"

#include <assert.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

const char *const page_content_names[CONTENT_COUNT] = {"zero",     "text",   "kernel",
                                                       "repeated", "sparse", "random"};

/* splitmix64 */
uint64_t prng_next(struct prng *r)
{
    uint64_t z = r->state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

static void fill_text(struct prng *r, uint8_t *page)
{
    static const char *const words[] = {"page",  "guest", "memory", "the",    "of",   "and",
                                        "batch", "hash",  "error:", "return", "int ", "migrate",
                                        "0x7f",  "\n",    "    ",   "{};"};
    for (unsigned i = 0; i < GUEST_PAGE_SIZE; i++) {
        const char *word = words[prng_below(r, sizeof(words) / sizeof(words[0]))];
        for (; *word && i < GUEST_PAGE_SIZE; word++)
            page[i++] = (uint8_t)*word;
        if (i < GUEST_PAGE_SIZE)
            page[i] = prng_below(r, 12) ? ' ' : (uint8_t)('a' + prng_below(r, 26));
    }
}

static void fill_kernel(struct prng *r, uint8_t *page)
{
    uint64_t *w = (uint64_t *)(void *)page;
    uint64_t base = 0xffff888000000000u + (prng_next(r) & 0x3fffff000u);
    for (unsigned i = 0; i < GUEST_PAGE_SIZE / 8; i++) {
        switch (i % 16 < 4 ? prng_below(r, 4) : 3 + prng_below(r, 6)) {
        case 0:
            w[i] = base + prng_below(r, 1 << 14) * 8;
            break;
        case 1:
            w[i] = prng_below(r, 4096);
            break;
        case 2:
            w[i] = prng_next(r);
            break;
        case 3:
            w[i] = base + i * 8;
            break;
        default:
            w[i] = 0;
        }
    }
}

void fill_page(struct prng *r, uint8_t *page, enum page_content content)
{
    uint8_t pattern[8];
    memset(page, 0, GUEST_PAGE_SIZE);
    switch (content) {
    case CONTENT_TEXT:
        fill_text(r, page);
        break;
    case CONTENT_KERNEL:
        fill_kernel(r, page);
        break;
    case CONTENT_REPEATED:
        put_le64(pattern, prng_next(r) | 1);
        for (unsigned i = 0, period = 1 + (unsigned)prng_below(r, 8); i < GUEST_PAGE_SIZE; i++)
            page[i] = pattern[i % period];
        break;
    case CONTENT_SPARSE:
        page[prng_below(r, GUEST_PAGE_SIZE)] = (uint8_t)(1 + prng_below(r, 255));
        break;
    case CONTENT_RANDOM:
        for (unsigned i = 0; i < GUEST_PAGE_SIZE; i += 8)
            put_le64(page + i, prng_next(r));
        break;
    case CONTENT_ZERO:
    case CONTENT_COUNT:
        break;
    }
}

void touch_page(struct prng *r, uint8_t *page)
{
    for (unsigned i = 1 + (unsigned)prng_below(r, 6); i > 0; i--)
        page[prng_below(r, GUEST_PAGE_SIZE)] += (uint8_t)(1 + prng_below(r, 255));
}

/* Regions with an even number are files as well, as a destination's are. */
static void map_region(struct guest_region *region, unsigned number, unsigned pages)
{
    *region = (struct guest_region){.size = (uint64_t)pages * GUEST_PAGE_SIZE,
                                    .page_size = GUEST_PAGE_SIZE};
    snprintf(region->name, sizeof(region->name), "ram%u", number);
    int file = memfd_create(region->name, MFD_CLOEXEC);
    assert(file > 0 && ftruncate(file, (off_t)region->size) == 0);
    region->base = mmap(NULL, region->size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    assert(region->base != MAP_FAILED);
    if (number % 2 == 0)
        region->file = file;
    else
        close(file);
}

static void unmap_region(struct guest_region *region)
{
    munmap(region->base, region->size);
    if (region->file)
        close(region->file);
}

void fixture_init(struct fixture *f, const unsigned pages[FIXTURE_REGIONS])
{
    *f = (struct fixture){0};
    for (unsigned i = 0; i < FIXTURE_REGIONS; i++) {
        map_region(&f->source[i], i, pages[i]);
        map_region(&f->destination[i], i, pages[i]);
        f->size += f->source[i].size;
    }
}

void fixture_finish(struct fixture *f)
{
    for (unsigned i = 0; i < FIXTURE_REGIONS; i++) {
        unmap_region(&f->source[i]);
        unmap_region(&f->destination[i]);
    }
}

uint8_t *fixture_page(struct guest_region *regions, uint64_t addr)
{
    return regions[page_addr_region(addr)].base + page_addr_number(addr) * GUEST_PAGE_SIZE;
}

static void batch_free(struct page_batch *batch)
{
    free(batch);
}

struct page_batch *batch_new(unsigned channel)
{
    struct page_batch *batch = calloc(1, sizeof(*batch));
    assert(batch);
    batch->refs = 1;
    batch->release = batch_free;
    batch->channel = channel;
    return batch;
}

void batch_add(struct page_batch *batch, uint64_t addr, const uint8_t *data)
{
    assert(batch->n < PAGE_BATCH_MAX);
    batch->pages[batch->n++] = (struct page_ref){addr, data};
}

/* At most `left` bytes from one list of pieces to another of the same length. */
static void copy_payload(const struct iovec *from, const struct iovec *to, size_t left)
{
    size_t from_done = 0, to_done = 0;
    while (left) {
        size_t n = from->iov_len - from_done;
        if (n > to->iov_len - to_done)
            n = to->iov_len - to_done;
        if (n > left)
            n = left;
        memcpy((uint8_t *)to->iov_base + to_done, (const uint8_t *)from->iov_base + from_done, n);
        left -= n;
        if ((from_done += n) == from->iov_len) {
            from++;
            from_done = 0;
        }
        if ((to_done += n) == to->iov_len) {
            to++;
            to_done = 0;
        }
    }
}

int deliver(struct page_decoder *dec, const struct encoded_batch *out, ssize_t cut,
            struct vm_error **err)
{
    struct iovec iov[PAGE_DECODER_IOV_MAX];
    unsigned n;
    size_t total = 0;
    /* A copy of exactly that size, so that a sanitizer sees a read beyond it. */
    cleanup_free uint8_t *meta = malloc(out->meta_len);
    assert(meta);
    memcpy(meta, out->meta, out->meta_len);
    if (page_decoder_begin(dec, meta, out->meta_len, out->payload_len, iov, &n, err) < 0)
        return -1;
    for (unsigned i = 0; i < n; i++)
        total += iov[i].iov_len;
    assert(total == out->payload_len);
    copy_payload(out->payload, iov, cut >= 0 ? (size_t)cut : total);
    return cut >= 0 ? 0 : page_decoder_commit(dec, err);
}

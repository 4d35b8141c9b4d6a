/* SPDX-License-Identifier: Apache-2.0 */
/*
 * codec: how fast pages are encoded and decoded, and to what size, on one core.
 *
 *     build/tests/bench/codec                    synthetic contents
 *     build/tests/bench/codec MEMORY.raw         the pages of a file, e.g. QMP pmemsave of a guest
 *
 * Per contents and mode: MB/s of guest memory in and out, bytes per page, ratio. Then what it costs
 * to find zero and unchanged pages, deltas of pages with a few changed bytes, and blocks against
 * single pages. Pages lie apart by eight bytes, as in QEMU's stream. Best of three runs, CPU time.
 */
#include "page_fixture.h"

#include "base/clock.h"

#include <lz4.h>
#include <stdio.h>

enum { PAGES = 16384, STRIDE = GUEST_PAGE_SIZE + 8, RUNS = 3 };

struct memory {
    const char *name;
    unsigned pages;
    uint8_t *data; /* pages at multiples of STRIDE */
};

static struct prng rng = {1};

static void check(int result, struct vm_error *err)
{
    if (result < 0) {
        fprintf(stderr, "codec: %s\n", error_message(err));
        exit(1);
    }
}

static uint8_t *page_of(const struct memory *m, unsigned i)
{
    return m->data + (size_t)i * STRIDE;
}

/* ---- contents ---- */

static struct memory new_memory(const char *name, unsigned pages)
{
    struct memory m = {name, pages, calloc(pages, STRIDE)};
    if (!m.data)
        check(-1, NULL);
    return m;
}

static struct memory synthetic(enum page_content content)
{
    struct memory m = new_memory(page_content_names[content], PAGES);
    for (unsigned i = 0; i < PAGES; i++)
        fill_page(&rng, page_of(&m, i), content);
    return m;
}

/* A third each of slabs and text, the rest of all kinds, in stretches. */
static struct memory mixture(void)
{
    struct memory m = new_memory("mixture", PAGES);
    for (unsigned i = 0; i < PAGES; i++) {
        unsigned stretch = i / 8 % 6;
        enum page_content content = stretch < 2   ? CONTENT_KERNEL
                                    : stretch < 4 ? CONTENT_TEXT
                                                  : (enum page_content)(1 + i / 48 % 5);
        fill_page(&rng, page_of(&m, i), content);
    }
    return m;
}

/* Pages of a file that are not zero. */
static struct memory from_file(const char *path)
{
    struct memory m = {.name = "file"};
    uint8_t page[GUEST_PAGE_SIZE];
    size_t room = 0;
    cleanup_fclose FILE *f = fopen(path, "rb");
    if (!f) {
        perror(path);
        exit(1);
    }
    while (fread(page, sizeof(page), 1, f) == 1) {
        if (page_is_zero(page))
            continue;
        if (m.pages == room) {
            room = room ? 2 * room : 1024;
            m.data = realloc(m.data, room * STRIDE);
            if (!m.data)
                check(-1, NULL);
        }
        memcpy(page_of(&m, m.pages++), page, sizeof(page));
    }
    return m;
}

/* ---- encoding and decoding ---- */

struct figures {
    double encode_s, decode_s;
    uint64_t bytes;
};

struct codec {
    struct guest_region region;
    struct page_encoder *enc;
    struct page_decoder *dec;
    struct page_batch *batch;
    uint8_t *guest;
};

static void codec_init(struct codec *c, const struct memory *m)
{
    struct vm_error *err = NULL;
    *c = (struct codec){.region = {.size = (uint64_t)m->pages * GUEST_PAGE_SIZE}};
    c->guest = calloc(m->pages, GUEST_PAGE_SIZE);
    c->region.base = c->guest;
    c->batch = batch_new(0);
    c->enc = page_encoder_create(&(struct page_encoder_config){.regions = &c->region,
                                                               .n_regions = 1,
                                                               .n_channels = 1,
                                                               .memory = 256 << 20,
                                                               .destination_zero = true},
                                 &err);
    c->dec = page_decoder_create(
        &(struct page_decoder_config){.regions = &c->region, .n_regions = 1, .n_channels = 1},
        &err);
    if (!c->guest || !c->enc || !c->dec)
        check(-1, err);
}

static void codec_finish(struct codec *c)
{
    page_encoder_destroy(c->enc);
    page_decoder_destroy(c->dec);
    page_batch_unref(c->batch);
    free(c->guest);
}

/* All pages once; the destination is compared. */
static struct figures pass(struct codec *c, const struct memory *m, enum page_mode mode)
{
    struct figures f = {0};
    for (unsigned first = 0; first < m->pages; first += PAGE_BATCH_MAX) {
        struct vm_error *err = NULL;
        struct encoded_batch out = {0};
        c->batch->n = 0;
        for (unsigned i = first; i < m->pages && i < first + PAGE_BATCH_MAX; i++)
            batch_add(c->batch, i, page_of(m, i));
        int64_t start = clock_thread_cpu_ns();
        check(page_encoder_encode(c->enc, c->batch, mode, &out, &err), err);
        f.encode_s += (double)(clock_thread_cpu_ns() - start) * 1e-9;
        f.bytes += out.meta_len + out.payload_len;
        start = clock_thread_cpu_ns();
        if (out.meta_len)
            check(deliver(c->dec, &out, -1, &err), err);
        f.decode_s += (double)(clock_thread_cpu_ns() - start) * 1e-9;
        encoded_batch_finish(&out);
        for (unsigned i = 0; i < c->batch->n; i++) {
            if (memcmp(c->guest + (size_t)(first + i) * GUEST_PAGE_SIZE, page_of(m, first + i),
                       GUEST_PAGE_SIZE) != 0) {
                fprintf(stderr, "codec: page %u differs\n", first + i);
                exit(1);
            }
        }
    }
    return f;
}

static void keep_best(struct figures *best, struct figures f)
{
    if (!best->bytes && best->encode_s == 0) {
        *best = f;
        return;
    }
    best->encode_s = f.encode_s < best->encode_s ? f.encode_s : best->encode_s;
    best->decode_s = f.decode_s < best->decode_s ? f.decode_s : best->decode_s;
}

static void print_row(const char *contents, const char *what, unsigned pages, struct figures f)
{
    double bytes = (double)pages * GUEST_PAGE_SIZE;
    printf("%-9s %-8s %9.0f %8.3f", contents, what, bytes / f.encode_s / 1e6,
           f.encode_s * 1e6 / pages);
    if (f.bytes)
        printf(" %9.0f %10.1f %8.2f\n", bytes / f.decode_s / 1e6, (double)f.bytes / pages,
               bytes / (double)f.bytes);
    else
        printf(" %9s %10s %8s\n", "-", "0", "-");
}

static void bench_modes(const struct memory *m)
{
    for (unsigned mode = 0; mode < PAGE_MODE_COUNT; mode++) {
        struct figures best = {0};
        for (unsigned run = 0; run < RUNS; run++) {
            struct codec c;
            codec_init(&c, m);
            keep_best(&best, pass(&c, m, (enum page_mode)mode));
            codec_finish(&c);
        }
        print_row(m->name, page_mode_name((enum page_mode)mode), m->pages, best);
    }
}

/* The second pass finds nothing changed, the later ones a few bytes in each page. */
static void bench_rounds(struct memory *m)
{
    struct figures same = {0}, delta = {0};
    struct codec c;
    codec_init(&c, m);
    pass(&c, m, PAGE_MODE_LZ4);
    for (unsigned run = 0; run < RUNS; run++)
        keep_best(&same, pass(&c, m, PAGE_MODE_LZ4));
    for (unsigned run = 0; run < RUNS + 1; run++) {
        for (unsigned i = 0; i < m->pages; i++)
            touch_page(&rng, page_of(m, i));
        struct figures f = pass(&c, m, PAGE_MODE_LZ4);
        if (run)
            keep_best(&delta, f);
    }
    codec_finish(&c);
    print_row(m->name, "same", m->pages, same);
    print_row(m->name, "delta", m->pages, delta);
}

static void bench_blocks(const struct memory *m)
{
    static uint8_t block[16 * GUEST_PAGE_SIZE], out[sizeof(block)];
    static const unsigned sizes[] = {1, 4, 16};
    printf("\nLZ4 of %s in blocks of", m->name);
    for (unsigned s = 0; s < 3; s++) {
        uint64_t bytes = 0;
        for (unsigned i = 0; i + sizes[s] <= m->pages; i += sizes[s]) {
            for (unsigned j = 0; j < sizes[s]; j++)
                memcpy(block + (size_t)j * GUEST_PAGE_SIZE, page_of(m, i + j), GUEST_PAGE_SIZE);
            int len = (int)(sizes[s] * GUEST_PAGE_SIZE);
            int n = LZ4_compress_default((const char *)block, (char *)out, len, len - 1);
            bytes += (uint64_t)(n > 0 ? n : len);
        }
        printf("%s %u KiB: ratio %.2f", s ? "," : "", sizes[s] * 4,
               (double)m->pages * GUEST_PAGE_SIZE / (double)bytes);
    }
    printf("\n");
}

int main(int argc, char **argv)
{
    if (argc > 2 || (argc == 2 && argv[1][0] == '-')) {
        fprintf(stderr, "usage: codec [MEMORY.raw]\n");
        return 2;
    }
    struct memory all[4];
    unsigned n = 0;
    if (argc == 2) {
        all[n++] = from_file(argv[1]);
    } else {
        all[n++] = synthetic(CONTENT_ZERO);
        all[n++] = synthetic(CONTENT_TEXT);
        all[n++] = synthetic(CONTENT_RANDOM);
        all[n++] = mixture();
    }
    printf("%-9s %-8s %9s %8s %9s %10s %8s\n", "contents", "mode", "enc MB/s", "us/page",
           "dec MB/s", "bytes/page", "ratio");
    for (unsigned i = 0; i < n; i++)
        bench_modes(&all[i]);
    bench_rounds(&all[n - 1]);
    bench_blocks(&all[n - 1]);
    for (unsigned i = 0; i < n; i++)
        free(all[i].data);
    return 0;
}

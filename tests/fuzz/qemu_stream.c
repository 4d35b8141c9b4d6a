/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Fuzzer of vmm/qemu_stream: arbitrary bytes as a migration stream, every other block mapped.
 * Asserted: bounds of what is consumed and reported; rest comes out of the input, and without the
 * pages taken out; the same bytes in one piece and in small ones have the same events and error.
 */
#include "vmm/qemu_stream.h"

#include "base/bytes.h"

#include <assert.h>

/* Built by libFuzzer's driver. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

struct seen {
    const uint8_t *data; /* the bytes of the present feed */
    size_t size;
    uint64_t events; /* a hash of all except rest */
    uint64_t rest;   /* a hash of rest, byte by byte */
    size_t rest_bytes, page_bytes;
    uint64_t lengths[GUEST_REGIONS_MAX];
    unsigned n_blocks;
    bool listed, ended;
};

static void mix(uint64_t *hash, const void *data, size_t n)
{
    const uint8_t *p = data;
    for (size_t i = 0; i < n; i++)
        *hash = (*hash ^ p[i]) * 0x100000001b3ull;
}

static void mix_event(struct seen *s, char type, uint64_t value)
{
    mix(&s->events, &type, 1);
    mix(&s->events, &value, sizeof(value));
}

static int on_machine(void *arg, const char *name, struct vm_error **err)
{
    mix_event(arg, 'm', strlen(name));
    return 0;
}

static int on_blocks(void *arg, struct qemu_stream_block *blocks, unsigned n, struct vm_error **err)
{
    struct seen *s = arg;
    assert(!s->listed && n <= GUEST_REGIONS_MAX);
    s->listed = true;
    s->n_blocks = n;
    for (unsigned i = 0; i < n; i++) {
        assert(blocks[i].name[0] && strlen(blocks[i].name) < GUEST_REGION_NAME_MAX);
        assert(blocks[i].used_length % GUEST_PAGE_SIZE == 0);
        blocks[i].region = i % 2 ? QEMU_STREAM_UNMAPPED : (int)i;
        s->lengths[i] = blocks[i].used_length;
        mix_event(s, 'b', blocks[i].used_length);
    }
    return 0;
}

static int on_page(void *arg, unsigned region, uint64_t offset, const uint8_t *page,
                   struct vm_error **err)
{
    struct seen *s = arg;
    assert(s->listed && !s->ended && region < s->n_blocks && region % 2 == 0);
    assert(offset % GUEST_PAGE_SIZE == 0 && offset < s->lengths[region]);
    assert(!page || (page >= s->data && page + GUEST_PAGE_SIZE <= s->data + s->size));
    mix_event(s, 'p', offset + region);
    if (page)
        mix(&s->events, page, GUEST_PAGE_SIZE);
    s->page_bytes += page ? GUEST_PAGE_SIZE : 1;
    return 0;
}

static int on_rest(void *arg, const void *data, size_t n, struct vm_error **err)
{
    struct seen *s = arg;
    const uint8_t *p = data;
    assert(n && p >= s->data && p + n <= s->data + s->size);
    s->rest_bytes += n;
    mix(&s->rest, p, n);
    return 0;
}

static int on_memory_end(void *arg, struct vm_error **err)
{
    struct seen *s = arg;
    assert(!s->ended);
    s->ended = true;
    mix_event(s, 'e', s->rest_bytes);
    return 0;
}

static int on_opaque(void *arg, const char *section, struct vm_error **err)
{
    struct seen *s = arg;
    assert(!s->page_bytes);
    mix_event(s, 'o', s->rest_bytes + strlen(section));
    return on_memory_end(arg, err);
}

static const struct qemu_stream_events EVENTS = {on_machine, on_blocks,     on_page,
                                                 on_rest,    on_memory_end, on_opaque};

/* Parse in feeds that grow by `cut`; the error, or NULL. */
static struct vm_error *parse(struct seen *s, const uint8_t *data, size_t size, size_t cut,
                              bool background)
{
    struct vm_error *err = NULL;
    CLEANUP(qemu_stream) struct qemu_stream *p = qemu_stream_create(&EVENTS, s, &err);
    *s = (struct seen){0};
    if (p && background)
        qemu_stream_set_background(p);
    size_t done = 0, end = 0;
    while (p && end < size) {
        end = cut > size - end ? size : end + cut;
        s->size = end - done;
        uint8_t *piece = malloc(s->size);
        if (!piece)
            abort();
        memcpy(piece, data + done, s->size);
        s->data = piece;
        size_t consumed = 0;
        int r = qemu_stream_feed(p, piece, s->size, &consumed, &err);
        free(piece);
        if (r < 0)
            return err;
        assert(!err && consumed <= s->size && s->size - consumed < QEMU_STREAM_RECORD_MAX);
        done += consumed;
        assert(s->rest_bytes + s->page_bytes <= done);
    }
    if (p)
        qemu_stream_end(p, &err);
    assert(s->ended == !err);
    assert(err || done == size);
    return err;
}

static void run(const uint8_t *data, size_t size, bool background)
{
    struct seen whole, pieces;
    cleanup_error struct vm_error *first = parse(&whole, data, size, size, background);
    cleanup_error struct vm_error *second = parse(&pieces, data, size, 1 + size % 61, background);
    assert(!first == !second);
    assert(whole.events == pieces.events);
    if (first)
        assert(strcmp(first->message, second->message) == 0);
    else
        assert(whole.rest == pieces.rest && whole.rest_bytes == pieces.rest_bytes);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    run(data, size, false);
    run(data, size, true);
    return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/qemu_stream.h"

#include "base/bytes.h"
#include "tests/unit/vmm/stream_maker.h"

#include <inttypes.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <cmocka.h>

static const struct maker_block BLOCKS[] = {
    {"pc.ram", 64 * GUEST_PAGE_SIZE},
    {"vga.vram", 16 * GUEST_PAGE_SIZE},
    {"m1", 32 * GUEST_PAGE_SIZE},
    {"/rom@etc/acpi/tables", 4 * GUEST_PAGE_SIZE},
};
enum { N_BLOCKS = sizeof(BLOCKS) / sizeof(BLOCKS[0]), PAGES_MAX = 64 };

/* ---- a parser, and what comes out of it ---- */

struct outcome {
    const char *const *mapped; /* names, in the order of their regions */
    int n_mapped;
    struct buffer text; /* the events, one a line, except rest */
    struct buffer rest;
    int fail_in; /* this many events from now, a callback fails */
    bool background;
};

static int note(struct outcome *o, struct vm_error **err, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
static int note(struct outcome *o, struct vm_error **err, const char *fmt, ...)
{
    char line[512];
    va_list args;
    va_start(args, fmt);
    vsnprintf(line, sizeof(line), fmt, args);
    va_end(args);
    buffer_put(&o->text, line, strlen(line));
    if (o->fail_in && --o->fail_in == 0)
        return error_set(err, VM_ERROR_CANCELLED, "enough");
    return 0;
}

static int on_machine(void *arg, const char *name, struct vm_error **err)
{
    return note(arg, err, "machine %s\n", name);
}

static int on_blocks(void *arg, struct qemu_stream_block *blocks, unsigned n, struct vm_error **err)
{
    struct outcome *o = arg;
    for (unsigned i = 0; i < n; i++) {
        assert_int_equal(blocks[i].region, QEMU_STREAM_UNMAPPED);
        for (int m = 0; m < o->n_mapped; m++) {
            if (strcmp(blocks[i].name, o->mapped[m]) == 0)
                blocks[i].region = m;
        }
        if (note(o, err, "block %s %" PRIu64 "\n", blocks[i].name, blocks[i].used_length) < 0)
            return -1;
    }
    return 0;
}

static int on_page(void *arg, unsigned region, uint64_t offset, const uint8_t *data,
                   struct vm_error **err)
{
    if (data) {
        for (unsigned i = 1; i < GUEST_PAGE_SIZE; i++)
            assert_int_equal(data[i], data[0]);
    }
    return note(arg, err, "page %u %" PRIx64 " %02x\n", region, offset, data ? data[0] : 0);
}

static int on_rest(void *arg, const void *data, size_t n, struct vm_error **err)
{
    struct outcome *o = arg;
    assert_true(n > 0);
    buffer_put(&o->rest, data, n);
    return 0;
}

static int on_memory_end(void *arg, struct vm_error **err)
{
    struct outcome *o = arg;
    return note(o, err, "memory_end after %zu\n", o->rest.len);
}

static int on_opaque(void *arg, const char *section, struct vm_error **err)
{
    struct outcome *o = arg;
    return note(o, err, "opaque %s after %zu\n", section, o->rest.len);
}

static const struct qemu_stream_events EVENTS = {on_machine, on_blocks,     on_page,
                                                 on_rest,    on_memory_end, on_opaque};

static void outcome_finish(struct outcome *o)
{
    buffer_finish(&o->text);
    buffer_finish(&o->rest);
}

static void outcome_text(struct outcome *o, const char *expected)
{
    buffer_put_u8(&o->text, 0);
    assert_string_equal((char *)o->text.data, expected);
}

/*
 * Parse, in feeds of `cut` bytes (0: random, of `seed`), as a reader with a small buffer would:
 * what is left over comes again. The bytes lie in memory of exactly their size, so that a sanitizer
 * sees each byte read beyond.
 */
static int parse(struct outcome *o, const struct buffer *in, size_t cut, unsigned seed,
                 struct vm_error **err)
{
    CLEANUP(qemu_stream) struct qemu_stream *p = qemu_stream_create(&EVENTS, o, err);
    assert_non_null(p);
    if (o->background)
        qemu_stream_set_background(p);
    size_t done = 0, end = 0;
    while (end < in->len) {
        size_t more = cut ? cut : 1 + (size_t)rand_r(&seed) % 9000;
        end = more > in->len - end ? in->len : end + more;
        uint8_t *piece = malloc(end - done);
        assert_non_null(piece);
        memcpy(piece, in->data + done, end - done);
        size_t consumed = 0;
        int r = qemu_stream_feed(p, piece, end - done, &consumed, err);
        free(piece);
        if (r < 0)
            return -1;
        assert_true(consumed <= end - done);
        done += consumed;
        assert_true(end - done < QEMU_STREAM_RECORD_MAX);
    }
    return qemu_stream_end(p, err);
}

/* ---- streams ---- */

/* A guest's memory as a loader of the stream sees it: the byte each page is filled with. */
struct memory {
    uint8_t fill[N_BLOCKS][PAGES_MAX];
};

/*
 * A random but legal stream of several sections, and the memory that it describes. Blocks go to and
 * fro, names are written or left to CONTINUE as QEMU may choose.
 */
static void make_stream(struct buffer *b, unsigned seed, struct memory *ret_memory)
{
    memset(ret_memory, 0, sizeof(*ret_memory));
    maker_header(b, "pc-q35-7.2");
    maker_ram(b, BLOCKS, N_BLOCKS);
    int named = -1;
    unsigned sections = 1 + (unsigned)rand_r(&seed) % 4;
    for (unsigned s = 0; s <= sections; s++) {
        maker_records(b, s == sections ? MAKER_END : MAKER_PART);
        unsigned pages = (unsigned)rand_r(&seed) % 60;
        int block = named < 0 ? 0 : named;
        for (unsigned i = 0; i < pages; i++) {
            if (rand_r(&seed) % 4 == 0)
                block = rand_r(&seed) % N_BLOCKS;
            uint64_t page = (uint64_t)rand_r(&seed) % (BLOCKS[block].size / GUEST_PAGE_SIZE);
            uint8_t fill = rand_r(&seed) % 3 ? maker_fill(page, s * 100 + i) : 0;
            bool again = block == named && rand_r(&seed) % 8;
            maker_page(b, again ? NULL : BLOCKS[block].name, page, fill);
            named = block;
            ret_memory->fill[block][page] = fill;
        }
        maker_eos(b);
    }
    maker_devices(b, 3000);
    assert_false(b->failed);
}

/* Load `rest` into m as QEMU's loader would, with nothing but the stream to go by. */
static void load(const struct buffer *rest, struct memory *m)
{
    struct cursor c = cursor_init(rest->data, rest->len);
    cursor_take(&c, 8 + 1);
    cursor_take(&c, cursor_be32(&c));
    const uint64_t start = 1 + 4 + 4 + 4 + 4;
    cursor_take(&c, start + 8);
    for (int i = 0; i < N_BLOCKS; i++)
        cursor_take(&c, 1 + strlen(BLOCKS[i].name) + 8);
    cursor_take(&c, 8 + 5);
    int block = -1;
    for (uint8_t type = 0; type != MAKER_END;) {
        type = cursor_u8(&c);
        assert_true(type == MAKER_PART || type == MAKER_END);
        assert_int_equal(cursor_be32(&c), MAKER_RAM_ID);
        for (uint64_t word; !((word = cursor_be64(&c)) & MAKER_EOS);) {
            if (!(word & MAKER_CONTINUE)) {
                size_t n = cursor_u8(&c);
                const uint8_t *name = cursor_take(&c, n);
                assert_non_null(name);
                for (block = N_BLOCKS - 1; block >= 0; block--) {
                    if (strlen(BLOCKS[block].name) == n && !memcmp(BLOCKS[block].name, name, n))
                        break;
                }
            }
            assert_in_range(block, 0, N_BLOCKS - 1);
            const uint8_t *data = cursor_take(&c, word & MAKER_PAGE ? GUEST_PAGE_SIZE : 1);
            assert_non_null(data);
            m->fill[block][(word & ~0xfffull) / GUEST_PAGE_SIZE] = *data;
        }
        assert_int_equal(cursor_u8(&c), 0x7e);
        assert_int_equal(cursor_be32(&c), MAKER_RAM_ID);
    }
    assert_false(c.failed);
}

/* Apply the pages taken out, from the text of the events. */
static void load_pages(const struct outcome *o, struct memory *m)
{
    cleanup_free char *text = strndup((char *)o->text.data, o->text.len);
    char *save = NULL;
    for (char *line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save)) {
        unsigned region, fill;
        uint64_t offset;
        if (sscanf(line, "page %u %" SCNx64 " %x", &region, &offset, &fill) != 3)
            continue;
        for (int i = 0; i < N_BLOCKS; i++) {
            if (strcmp(BLOCKS[i].name, o->mapped[region]) == 0)
                m->fill[i][offset / GUEST_PAGE_SIZE] = (uint8_t)fill;
        }
    }
}

/* ---- tests ---- */

static void a_small_stream_is_taken_apart(void **state)
{
    (void)state;
    const char *const mapped[] = {"m1", "pc.ram"};
    cleanup_buffer struct buffer in = {0}, rest = {0};
    for (int i = 0; i < 2; i++) {
        struct buffer *b = i ? &rest : &in; /* `rest`: what must be left of `in` */
        maker_header(b, "pc-q35-7.2");
        maker_ram(b, BLOCKS, N_BLOCKS);
        maker_records(b, MAKER_PART);
        if (b == &in) {
            maker_page(b, "pc.ram", 3, 0x33);
            maker_page(b, NULL, 4, 0);
        }
        maker_page(b, "vga.vram", 1, 0x11);
        maker_page(b, NULL, 2, 0x12);
        maker_eos(b);
        maker_records(b, MAKER_END);
        maker_page(b, NULL, 3, 0); /* CONTINUE: vga.vram, of the section before */
        if (b == &in)
            maker_page(b, "m1", 31, 0x44);
        maker_eos(b);
        maker_devices(b, 100);
    }
    struct outcome o = {.mapped = mapped, .n_mapped = 2};
    assert_int_equal(parse(&o, &in, in.len, 0, NULL), 0);
    assert_int_equal(o.rest.len, rest.len);
    assert_memory_equal(o.rest.data, rest.data, rest.len);
    char expected[512];
    size_t devices = 1 + 4 + 1 + strlen("timer") + 8 + 100 + 1;
    snprintf(expected, sizeof(expected),
             "machine pc-q35-7.2\nblock pc.ram 262144\nblock vga.vram 65536\nblock m1 131072\n"
             "block /rom@etc/acpi/tables 16384\npage 1 3000 33\npage 1 4000 00\npage 0 1f000 44\n"
             "memory_end after %zu\n",
             rest.len - devices - 5);
    outcome_text(&o, expected);
    outcome_finish(&o);
}

static void without_mapped_blocks_the_stream_stays_as_it_is(void **state)
{
    (void)state;
    for (unsigned seed = 0; seed < 50; seed++) {
        cleanup_buffer struct buffer in = {0};
        struct memory m;
        make_stream(&in, seed, &m);
        struct outcome o = {0};
        assert_int_equal(parse(&o, &in, 0, seed, NULL), 0);
        assert_int_equal(o.rest.len, in.len);
        assert_memory_equal(o.rest.data, in.data, in.len);
        outcome_finish(&o);
    }
}

static void pages_and_rest_together_make_the_same_memory(void **state)
{
    (void)state;
    for (unsigned seed = 0; seed < 400; seed++) {
        const char *mapped[N_BLOCKS];
        struct outcome o = {.mapped = mapped};
        for (int i = 0; i < N_BLOCKS; i++) {
            if (seed >> i & 1)
                mapped[o.n_mapped++] = BLOCKS[i].name;
        }
        cleanup_buffer struct buffer in = {0};
        struct memory expected, loaded = {0};
        make_stream(&in, seed, &expected);
        assert_int_equal(parse(&o, &in, in.len, 0, NULL), 0);
        load(&o.rest, &loaded);
        load_pages(&o, &loaded);
        assert_memory_equal(&loaded, &expected, sizeof(loaded));
        outcome_finish(&o);
    }
}

static void cuts_change_nothing(void **state)
{
    (void)state;
    const char *const mapped[] = {"m1", "pc.ram"};
    for (unsigned seed = 0; seed < 30; seed++) {
        cleanup_buffer struct buffer in = {0};
        struct memory m;
        make_stream(&in, seed, &m);
        struct outcome whole = {.mapped = mapped, .n_mapped = 2};
        assert_int_equal(parse(&whole, &in, in.len, 0, NULL), 0);
        for (unsigned cut = 0; cut < 6; cut++) {
            if (cut == 1 && seed > 0)
                continue; /* byte by byte is slow */
            struct outcome o = {.mapped = mapped, .n_mapped = 2};
            assert_int_equal(parse(&o, &in, cut, seed, NULL), 0);
            assert_int_equal(o.text.len, whole.text.len);
            assert_memory_equal(o.text.data, whole.text.data, o.text.len);
            assert_int_equal(o.rest.len, whole.rest.len);
            assert_memory_equal(o.rest.data, whole.rest.data, o.rest.len);
            outcome_finish(&o);
        }
        outcome_finish(&whole);
    }
}

static void a_section_without_length_makes_the_stream_opaque(void **state)
{
    (void)state;
    const char *const mapped[] = {"pc.ram"};
    for (int when = 0; when < 3; when++) {
        cleanup_buffer struct buffer in = {0};
        maker_header(&in, "pc-q35-8.0");
        if (when == 0)
            maker_section(&in, MAKER_FULL, 1, "virtio-mem-early", 1);
        maker_ram(&in, BLOCKS, N_BLOCKS);
        if (when == 1)
            maker_section(&in, MAKER_START, 3, "dirty-bitmap", 1);
        maker_records(&in, MAKER_PART);
        maker_page(&in, "vga.vram", 1, 0x11);
        maker_eos(&in);
        if (when == 2)
            maker_section(&in, MAKER_START, 4, "vfio", 1);
        maker_records(&in, MAKER_PART);
        maker_page(&in, "pc.ram", 1, 0x11);
        maker_eos(&in);
        struct outcome o = {.mapped = mapped, .n_mapped = 1};
        assert_int_equal(parse(&o, &in, when ? 7 : in.len, 0, NULL), 0);
        assert_int_equal(o.rest.len, in.len);
        assert_memory_equal(o.rest.data, in.data, in.len);
        buffer_put_u8(&o.text, 0);
        assert_non_null(strstr((char *)o.text.data, when == 0 ? "opaque virtio-mem-early after 23\n"
                                                    : when == 1 ? "opaque dirty-bitmap after "
                                                                : "opaque vfio after "));
        assert_null(strstr((char *)o.text.data, "page"));
        assert_null(strstr((char *)o.text.data, "memory_end"));
        outcome_finish(&o);
    }
}

static void what_newer_versions_add_passes(void **state)
{
    (void)state;
    cleanup_buffer struct buffer in = {0};
    maker_header(&in, "pc-q35-10.0");
    buffer_put_u8(&in, 0x05);
    maker_name(&in, "configuration/uuid");
    buffer_put_be32(&in, 1);
    buffer_put(&in, "0123456789abcdef", 16);
    buffer_put_u8(&in, 0x05);
    maker_name(&in, "configuration/target-page-bits");
    buffer_put_be32(&in, 1);
    buffer_put_be32(&in, 12);
    maker_ram(&in, BLOCKS, N_BLOCKS);
    buffer_put_u8(&in, 0x08); /* SWITCHOVER_START */
    buffer_put_be16(&in, 11);
    buffer_put_be16(&in, 0);
    maker_records(&in, MAKER_END);
    buffer_put_be64(&in, 0x200); /* MULTIFD_FLUSH */
    maker_eos(&in);
    maker_devices(&in, 10);
    struct outcome o = {0};
    assert_int_equal(parse(&o, &in, 1, 0, NULL), 0);
    assert_memory_equal(o.rest.data, in.data, in.len);
    outcome_finish(&o);
}

/* ---- what is refused ---- */

enum spoiled {
    BAD_MAGIC,
    BAD_VERSION,
    BAD_MACHINE_LENGTH,
    BAD_MACHINE_NAME,
    LATE_CONFIG,
    STRAY_SUBSECTION,
    CAPABILITY,
    PAGE_BITS_16,
    RETURN_PATH,
    PACKAGED,
    UNKNOWN_TYPE,
    EARLY_EOF,
    RAM_VERSION_5,
    RAM_TWICE,
    RAM_IN_ONE_PIECE,
    RAM_WITHOUT_START,
    PART_OF_ANOTHER,
    STRAY_FOOTER,
    FOOTER_OF_ANOTHER,
    NO_MEM_SIZE,
    BLOCK_WITHOUT_NAME,
    BLOCK_WITH_BAD_NAME,
    BLOCK_TWICE,
    BLOCK_TOO_LONG,
    BLOCK_NOT_OF_PAGES,
    TOO_MANY_BLOCKS,
    UNKNOWN_BLOCK,
    BLOCK_NAME_WITH_NUL,
    CONTINUE_OF_NOTHING,
    BEHIND_THE_BLOCK,
    FAR_BEHIND_THE_BLOCK,
    MISALIGNED,
    PAGE_AND_ZERO,
    FILLED_PAGE,
    XBZRLE,
    COMPRESSED,
    HOOK,
    SECOND_MEM_SIZE,
    DEVICE_AMID_PAGES,
};

static const struct {
    enum spoiled what;
    enum vm_error_kind kind;
    const char *message; /* behind "QEMU's migration stream at byte N: " */
} SPOILED[] = {
    {BAD_MAGIC, VM_ERROR_PROTOCOL, "begins with 0x51455678: not a stream"},
    {BAD_VERSION, VM_ERROR_PROTOCOL, "version 2, not 3"},
    {BAD_MACHINE_LENGTH, VM_ERROR_PROTOCOL, "a machine name of 4294967295 bytes"},
    {BAD_MACHINE_NAME, VM_ERROR_PROTOCOL, "the machine's name contains byte 0x0a"},
    {LATE_CONFIG, VM_ERROR_PROTOCOL, "the configuration is not the first section"},
    {STRAY_SUBSECTION, VM_ERROR_PROTOCOL, "a subsection outside of the configuration"},
    {CAPABILITY, VM_ERROR_REFUSED, "made with the capability x-ignore-shared; turn it off"},
    {PAGE_BITS_16, VM_ERROR_REFUSED, "the guest's pages have 16 bits, not 12"},
    {RETURN_PATH, VM_ERROR_REFUSED,
     "command 1 of 0 bytes: turn the capabilities return-path and postcopy-ram off"},
    {PACKAGED, VM_ERROR_REFUSED,
     "command 7 of 4 bytes: turn the capabilities return-path and postcopy-ram off"},
    {UNKNOWN_TYPE, VM_ERROR_PROTOCOL, "a section of the unknown type 0x55"},
    {EARLY_EOF, VM_ERROR_PROTOCOL, "ends before the memory does"},
    {RAM_VERSION_5, VM_ERROR_PROTOCOL, "memory of instance 0, version 5, not 0 and 4"},
    {RAM_TWICE, VM_ERROR_PROTOCOL, "a second beginning of memory, or one in one piece"},
    {RAM_IN_ONE_PIECE, VM_ERROR_PROTOCOL, "a second beginning of memory, or one in one piece"},
    {RAM_WITHOUT_START, VM_ERROR_PROTOCOL, "section 2 goes on but never began"},
    {PART_OF_ANOTHER, VM_ERROR_PROTOCOL, "section 3 goes on but never began"},
    {STRAY_FOOTER, VM_ERROR_PROTOCOL, "the footer of section 2 is misplaced"},
    {FOOTER_OF_ANOTHER, VM_ERROR_PROTOCOL, "the footer of section 9 is misplaced"},
    {NO_MEM_SIZE, VM_ERROR_PROTOCOL, "memory begins with flags 0x010, not its size"},
    {BLOCK_WITHOUT_NAME, VM_ERROR_PROTOCOL, "a memory block without a name"},
    {BLOCK_WITH_BAD_NAME, VM_ERROR_PROTOCOL, "a memory block's name contains byte 0x1b"},
    {BLOCK_TWICE, VM_ERROR_PROTOCOL, "memory block m1 is listed twice"},
    {BLOCK_TOO_LONG, VM_ERROR_PROTOCOL,
     "memory block m1 of 8192 bytes: not whole pages, or more than the sum of all"},
    {BLOCK_NOT_OF_PAGES, VM_ERROR_PROTOCOL,
     "memory block m1 of 4095 bytes: not whole pages, or more than the sum of all"},
    {TOO_MANY_BLOCKS, VM_ERROR_PROTOCOL, "more than 256 memory blocks"},
    {UNKNOWN_BLOCK, VM_ERROR_PROTOCOL, "a page of a memory block that is not in the list"},
    {BLOCK_NAME_WITH_NUL, VM_ERROR_PROTOCOL, "a page of a memory block that is not in the list"},
    {CONTINUE_OF_NOTHING, VM_ERROR_PROTOCOL, "a page of a memory block that is not in the list"},
    {BEHIND_THE_BLOCK, VM_ERROR_PROTOCOL, "a page at 0x10000 behind the end of block vga.vram"},
    {FAR_BEHIND_THE_BLOCK, VM_ERROR_PROTOCOL,
     "a page at 0xfffffffffffff000 behind the end of block vga.vram"},
    {MISALIGNED, VM_ERROR_PROTOCOL, "a record with flags 0x408"},
    {PAGE_AND_ZERO, VM_ERROR_PROTOCOL, "a record with flags 0x00a"},
    {FILLED_PAGE, VM_ERROR_PROTOCOL, "a page that is to be filled with 0x01"},
    {XBZRLE, VM_ERROR_REFUSED, "an XBZRLE page: turn the capability xbzrle off"},
    {COMPRESSED, VM_ERROR_REFUSED, "a compressed page: turn the capability compress off"},
    {HOOK, VM_ERROR_REFUSED, "a record of RDMA: migrate into the socket only"},
    {SECOND_MEM_SIZE, VM_ERROR_PROTOCOL, "a record with flags 0x004"},
    {DEVICE_AMID_PAGES, VM_ERROR_REFUSED,
     "the section of \"vfio\" comes amid memory and cannot be told apart from it"},
};

static void spoil_preamble(struct buffer *b, enum spoiled what)
{
    buffer_put_be32(b, what == BAD_MAGIC ? 0x51455678 : 0x5145564d);
    buffer_put_be32(b, what == BAD_VERSION ? 2 : 3);
    if (what != STRAY_SUBSECTION) {
        buffer_put_u8(b, 0x07);
        buffer_put_be32(b, what == BAD_MACHINE_LENGTH ? 0xffffffff : 4);
        buffer_put(b, what == BAD_MACHINE_NAME ? "pc\n1" : "pc-1", 4);
    }
    if (what == LATE_CONFIG) {
        buffer_put_u8(b, 0x07);
        buffer_put_be32(b, 0);
    }
    if (what == STRAY_SUBSECTION || what == CAPABILITY) {
        buffer_put_u8(b, 0x05);
        maker_name(b, "configuration/capabilities");
        buffer_put_be32(b, 1);
        buffer_put_be32(b, 1);
        maker_name(b, "x-ignore-shared");
    }
    if (what == PAGE_BITS_16) {
        buffer_put_u8(b, 0x05);
        maker_name(b, "configuration/target-page-bits");
        buffer_put_be32(b, 1);
        buffer_put_be32(b, 16);
    }
    if (what == RETURN_PATH || what == PACKAGED) {
        buffer_put_u8(b, 0x08);
        buffer_put_be16(b, what == RETURN_PATH ? 1 : 7);
        buffer_put_be16(b, what == RETURN_PATH ? 0 : 4);
    }
    if (what == UNKNOWN_TYPE)
        buffer_put_u8(b, 0x55);
    if (what == EARLY_EOF)
        buffer_put_u8(b, 0x00);
    if (what == STRAY_FOOTER)
        maker_footer(b);
    if (what == RAM_WITHOUT_START)
        maker_records(b, MAKER_PART);
    if (what == RAM_IN_ONE_PIECE)
        maker_section(b, MAKER_FULL, MAKER_RAM_ID, "ram", 4);
}

static void spoil_block_list(struct buffer *b, enum spoiled what)
{
    maker_section(b, MAKER_START, MAKER_RAM_ID, "ram", what == RAM_VERSION_5 ? 5 : 4);
    if (what == NO_MEM_SIZE) {
        buffer_put_be64(b, MAKER_EOS);
        return;
    }
    unsigned many = what == TOO_MANY_BLOCKS ? 257 : 0;
    uint64_t vga = 16 * GUEST_PAGE_SIZE;
    buffer_put_be64(b, (vga + GUEST_PAGE_SIZE + many * GUEST_PAGE_SIZE) | 0x04);
    maker_name(b, "vga.vram");
    buffer_put_be64(b, vga);
    for (unsigned i = 0; i < many; i++) {
        char name[16];
        snprintf(name, sizeof(name), "b%u", i);
        maker_name(b, name);
        buffer_put_be64(b, GUEST_PAGE_SIZE);
    }
    if (what == BLOCK_TWICE) {
        maker_name(b, "m1");
        buffer_put_be64(b, 0);
    }
    maker_name(b, what == BLOCK_WITHOUT_NAME ? "" : what == BLOCK_WITH_BAD_NAME ? "m\x1b[" : "m1");
    buffer_put_be64(b, what == BLOCK_TOO_LONG       ? 2 * GUEST_PAGE_SIZE
                       : what == BLOCK_NOT_OF_PAGES ? GUEST_PAGE_SIZE - 1
                                                    : GUEST_PAGE_SIZE);
    maker_eos(b);
}

static uint64_t spoiled_word(enum spoiled what)
{
    switch (what) {
    case BEHIND_THE_BLOCK:
        return 0x10000 | MAKER_PAGE;
    case FAR_BEHIND_THE_BLOCK:
        return ~0xfffull | MAKER_PAGE;
    case MISALIGNED:
        return 0x400 | MAKER_PAGE;
    case PAGE_AND_ZERO:
        return MAKER_PAGE | MAKER_ZERO;
    case XBZRLE:
        return 0x40 | MAKER_CONTINUE;
    case COMPRESSED:
        return 0x100;
    case HOOK:
        return 0x80;
    case SECOND_MEM_SIZE:
        return 0x1000 | 0x04;
    default:
        return MAKER_PAGE;
    }
}

static void spoil_records(struct buffer *b, enum spoiled what)
{
    maker_records(b, MAKER_PART);
    if (what == CONTINUE_OF_NOTHING)
        maker_page(b, NULL, 0, 0x11);
    if (what == UNKNOWN_BLOCK)
        maker_page(b, "vga.vra", 0, 0x11);
    buffer_put_be64(b, what == FILLED_PAGE ? MAKER_ZERO : spoiled_word(what));
    if (what == BLOCK_NAME_WITH_NUL) {
        buffer_put_u8(b, 3);
        buffer_put(b, "m1\0", 3);
    }
    maker_name(b, "vga.vram");
    buffer_put_u8(b, 0x01);
}

static void make_spoiled(struct buffer *b, enum spoiled what)
{
    spoil_preamble(b, what);
    spoil_block_list(b, what);
    if (what == RAM_TWICE)
        maker_section(b, MAKER_START, MAKER_RAM_ID, "ram", 4);
    if (what == FOOTER_OF_ANOTHER || what == PART_OF_ANOTHER) {
        b->len -= what == FOOTER_OF_ANOTHER ? 5 : 0;
        buffer_put_u8(b, what == FOOTER_OF_ANOTHER ? 0x7e : MAKER_PART);
        buffer_put_be32(b, what == FOOTER_OF_ANOTHER ? 9 : 3);
    }
    if (what == DEVICE_AMID_PAGES) {
        maker_records(b, MAKER_PART);
        maker_page(b, "m1", 0, 0x11);
        maker_eos(b);
        maker_section(b, MAKER_START, 4, "vfio", 1);
    }
    spoil_records(b, what);
}

static void what_the_format_does_not_allow_is_refused_by_name(void **state)
{
    (void)state;
    const char *const mapped[] = {"m1"};
    for (size_t i = 0; i < sizeof(SPOILED) / sizeof(SPOILED[0]); i++) {
        cleanup_buffer struct buffer in = {0};
        make_spoiled(&in, SPOILED[i].what);
        for (size_t cut = 0; cut < 2; cut++) {
            cleanup_error struct vm_error *err = NULL;
            struct outcome o = {.mapped = mapped, .n_mapped = 1};
            assert_int_equal(parse(&o, &in, cut ? cut : in.len, 0, &err), -1);
            const char *at = "QEMU's migration stream at byte ";
            assert_memory_equal(error_message(err), at, strlen(at));
            const char *colon = strchr(error_message(err), ':');
            assert_non_null(colon);
            assert_string_equal(colon + 2, SPOILED[i].message);
            assert_int_equal(err->kind, SPOILED[i].kind);
            outcome_finish(&o);
        }
    }
}

static void an_early_end_is_an_error_wherever_it_comes(void **state)
{
    (void)state;
    cleanup_buffer struct buffer in = {0};
    maker_header(&in, "pc");
    maker_ram(&in, BLOCKS, N_BLOCKS);
    maker_records(&in, MAKER_PART);
    maker_page(&in, "m1", 0, 0);
    maker_eos(&in);
    maker_records(&in, MAKER_END);
    buffer_put_be64(&in, MAKER_EOS);
    const size_t memory = in.len;
    maker_footer(&in);
    maker_devices(&in, 5);
    for (size_t n = 0, whole = in.len; n <= whole; n++) {
        cleanup_error struct vm_error *err = NULL;
        struct outcome o = {0};
        in.len = n;
        assert_int_equal(parse(&o, &in, 100, 0, &err), n < memory ? -1 : 0);
        if (n < memory)
            assert_int_equal(err->kind, VM_ERROR_FAILED);
        outcome_finish(&o);
    }
}

static void a_callbacks_error_comes_through_unchanged_and_ends_it(void **state)
{
    (void)state;
    const char *const mapped[] = {"pc.ram"};
    cleanup_buffer struct buffer in = {0};
    struct memory m;
    make_stream(&in, 4, &m);
    for (int i = 1; i < 12; i++) {
        cleanup_error struct vm_error *err = NULL, *again = NULL;
        struct outcome o = {.mapped = mapped, .n_mapped = 1, .fail_in = i};
        CLEANUP(qemu_stream) struct qemu_stream *p = qemu_stream_create(&EVENTS, &o, NULL);
        size_t consumed;
        assert_int_equal(qemu_stream_feed(p, in.data, in.len, &consumed, &err), -1);
        assert_string_equal(error_message(err), "enough");
        assert_int_equal(qemu_stream_feed(p, in.data, in.len, &consumed, &again), -1);
        assert_string_equal(error_message(again), "QEMU's migration stream failed before");
        outcome_finish(&o);
    }
}

/* Pages in any order, no END; the first device ends memory, wherever feeds are cut. */
static void a_background_snapshots_memory_ends_at_the_first_device(void **state)
{
    (void)state;
    const char *const mapped[] = {"pc.ram"};
    cleanup_buffer struct buffer in = {0};
    maker_header(&in, "pc");
    maker_ram(&in, BLOCKS, N_BLOCKS);
    maker_records(&in, MAKER_PART);
    maker_page(&in, "pc.ram", 3, 7);
    maker_page(&in, NULL, 1, 0);
    maker_eos(&in);
    maker_records(&in, MAKER_PART);
    maker_page(&in, NULL, 0, 9);
    maker_eos(&in);
    const size_t memory = in.len;
    maker_devices(&in, 50);
    const size_t pages = 2 * (8 + 4096) + 8 + 1 + 7; /* of which one names its block */
    for (size_t cut = 0; cut < 70; cut++) {
        char expected[128];
        cleanup_error struct vm_error *err = NULL;
        struct outcome o = {.mapped = mapped, .n_mapped = 1, .background = true};
        assert_int_equal(parse(&o, &in, cut, 5, &err), 0);
        snprintf(expected, sizeof(expected),
                 "page 0 3000 07\npage 0 1000 00\npage 0 0 09\nmemory_end after %zu\n",
                 memory - pages);
        buffer_put_u8(&o.text, 0);
        assert_non_null(strstr((char *)o.text.data, expected));
        assert_int_equal(o.rest.len, in.len - pages);
        outcome_finish(&o);
    }
    /* Not in other streams, and not before memory has begun. */
    cleanup_error struct vm_error *err = NULL;
    struct outcome o = {.mapped = mapped, .n_mapped = 1};
    assert_int_equal(parse(&o, &in, 100, 0, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_REFUSED);
    outcome_finish(&o);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_small_stream_is_taken_apart),
        cmocka_unit_test(without_mapped_blocks_the_stream_stays_as_it_is),
        cmocka_unit_test(pages_and_rest_together_make_the_same_memory),
        cmocka_unit_test(cuts_change_nothing),
        cmocka_unit_test(a_section_without_length_makes_the_stream_opaque),
        cmocka_unit_test(what_newer_versions_add_passes),
        cmocka_unit_test(a_background_snapshots_memory_ends_at_the_first_device),
        cmocka_unit_test(what_the_format_does_not_allow_is_refused_by_name),
        cmocka_unit_test(an_early_end_is_an_error_wherever_it_comes),
        cmocka_unit_test(a_callbacks_error_comes_through_unchanged_and_ends_it),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

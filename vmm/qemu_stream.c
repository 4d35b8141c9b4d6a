/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/qemu_stream.h"

#include "base/bytes.h"
#include "base/fault.h"

#include <inttypes.h>
#include <stdarg.h>

enum {
    STREAM_MAGIC = 0x5145564d,
    STREAM_VERSION = 3,
    RAM_VERSION = 4,
    MACHINE_NAME_MAX = 255,
    PAGE_BITS = 12,
    COMMAND_SWITCHOVER_START = 11,
};

/* What the first byte between sections says. */
enum section_type {
    TYPE_EOF = 0x00,
    TYPE_START = 0x01,
    TYPE_PART = 0x02,
    TYPE_END = 0x03,
    TYPE_FULL = 0x04,
    TYPE_SUBSECTION = 0x05,
    TYPE_CONFIG = 0x07,
    TYPE_COMMAND = 0x08,
    TYPE_FOOTER = 0x7e,
    TYPE_NONE = 0xff, /* ours: nothing came before */
};

/* The low bits of a record's word; the others are the offset in the block. */
enum record_flags {
    RECORD_FULL = 0x01,
    RECORD_ZERO = 0x02,
    RECORD_MEM_SIZE = 0x04,
    RECORD_PAGE = 0x08,
    RECORD_EOS = 0x10,
    RECORD_CONTINUE = 0x20,
    RECORD_XBZRLE = 0x40,
    RECORD_HOOK = 0x80,
    RECORD_COMPRESS_PAGE = 0x100,
    RECORD_MULTIFD_FLUSH = 0x200,
    RECORD_FLAGS = GUEST_PAGE_SIZE - 1,
};

enum state {
    STATE_HEADER,   /* magic and version */
    STATE_SECTION,  /* between sections */
    STATE_MEM_SIZE, /* the word before the block list */
    STATE_BLOCKS,   /* in the block list */
    STATE_RECORDS,  /* in a section of memory */
    STATE_PASS,     /* all is rest */
};

struct qemu_stream {
    const struct qemu_stream_events *events;
    void *arg;

    enum state state;
    bool failed;
    bool ram_begun;             /* its START was seen */
    bool taken;                 /* a page was left out of rest */
    bool background;            /* qemu_stream_set_background */
    enum section_type previous; /* between sections: of what came last */
    enum section_type section;  /* that we are in */
    uint32_t ram_id;
    uint64_t list_left; /* bytes of memory that the blocks still to be listed have */
    int named;          /* block named last, -1: none */

    /* During a feed. */
    const uint8_t *record; /* where the present record begins */
    const uint8_t *rest;   /* consumed, but not yet handed over as rest, from here on */
    uint64_t fed;          /* offset in the stream of the bytes being fed */
    const uint8_t *data;

    unsigned n_blocks;
    uint8_t name_len[GUEST_REGIONS_MAX];
    struct qemu_stream_block blocks[GUEST_REGIONS_MAX];
};

/*
 * A step parses one record at the cursor, which it moves behind it. STEP_MORE: it is not there
 * completely (whatever the step did to the cursor is void). Nothing is changed, and no event
 * called, before the record is known to be complete and sound.
 */
enum { STEP_ERROR = -1, STEP_MORE = 0, STEP_DONE = 1 };

__attribute__((format(printf, 4, 5))) static int broken(const struct qemu_stream *p,
                                                        struct vm_error **err,
                                                        enum vm_error_kind kind, const char *fmt,
                                                        ...)
{
    va_list args;
    va_start(args, fmt);
    error_vset(err, kind, 0, fmt, args);
    va_end(args);
    return error_wrap(err, "QEMU's migration stream at byte %" PRIu64,
                      p->fed + (uint64_t)(p->record - p->data));
}

/* A name of 1..255 printable characters, NUL-terminated in `out`. */
static int read_name(const struct qemu_stream *p, struct cursor *c, const char *of,
                     char out[GUEST_REGION_NAME_MAX], struct vm_error **err)
{
    size_t n = cursor_u8(c);
    const uint8_t *text = cursor_take(c, n);
    if (!text)
        return STEP_MORE;
    if (!n)
        return broken(p, err, VM_ERROR_PROTOCOL, "a %s without a name", of);
    for (size_t i = 0; i < n; i++) {
        if (text[i] < 0x20 || text[i] > 0x7e)
            return broken(p, err, VM_ERROR_PROTOCOL, "a %s's name contains byte 0x%02x", of,
                          text[i]);
    }
    memcpy(out, text, n);
    out[n] = '\0';
    return STEP_DONE;
}

/* Hand over what was consumed up to `end`. */
static int emit_rest(struct qemu_stream *p, const uint8_t *end, struct vm_error **err)
{
    const uint8_t *begin = p->rest;
    p->rest = end;
    return begin == end ? 0 : p->events->rest(p->arg, begin, (size_t)(end - begin), err);
}

static int step_header(struct qemu_stream *p, struct cursor *c, struct vm_error **err)
{
    uint32_t magic = cursor_be32(c), version = cursor_be32(c);
    if (c->failed)
        return STEP_MORE;
    if (magic != STREAM_MAGIC)
        return broken(p, err, VM_ERROR_PROTOCOL, "begins with 0x%08" PRIx32 ": not a stream",
                      magic);
    if (version != STREAM_VERSION)
        return broken(p, err, VM_ERROR_PROTOCOL, "version %" PRIu32 ", not %d", version,
                      STREAM_VERSION);
    p->state = STATE_SECTION;
    return STEP_DONE;
}

/* A section that has no length: from its first byte on everything is rest. */
static int go_opaque(struct qemu_stream *p, struct cursor *c, const char *section,
                     struct vm_error **err)
{
    if (p->taken)
        return broken(p, err, VM_ERROR_REFUSED,
                      "the section of \"%s\" comes amid memory and cannot be told apart from it",
                      section);
    if (emit_rest(p, p->record, err) < 0 || p->events->opaque(p->arg, section, err) < 0)
        return STEP_ERROR;
    c->p = p->record;
    p->state = STATE_PASS;
    return STEP_DONE;
}

static int step_config(struct qemu_stream *p, struct cursor *c, struct vm_error **err)
{
    char name[MACHINE_NAME_MAX + 1];
    uint32_t n = cursor_be32(c);
    if (n > MACHINE_NAME_MAX)
        return broken(p, err, VM_ERROR_PROTOCOL, "a machine name of %" PRIu32 " bytes", n);
    const uint8_t *text = cursor_take(c, n);
    if (!text)
        return STEP_MORE;
    for (uint32_t i = 0; i < n; i++) {
        if (text[i] < 0x20 || text[i] > 0x7e)
            return broken(p, err, VM_ERROR_PROTOCOL, "the machine's name contains byte 0x%02x",
                          text[i]);
    }
    memcpy(name, text, n);
    name[n] = '\0';
    return p->events->machine(p->arg, name, err) < 0 ? STEP_ERROR : STEP_DONE;
}

/*
 * Capabilities that change what the stream holds, or leave memory out of it: x-ignore-shared,
 * mapped-ram. QEMU lists those that are on, and writes no list when none is.
 */
static int step_capabilities(const struct qemu_stream *p, struct cursor *c, struct vm_error **err)
{
    char name[GUEST_REGION_NAME_MAX];
    uint32_t n = cursor_be32(c);
    if (c->failed)
        return STEP_MORE;
    if (!n)
        return STEP_DONE;
    int r = read_name(p, c, "capability", name, err);
    if (r != STEP_DONE)
        return r;
    return broken(p, err, VM_ERROR_REFUSED, "made with the capability %s; turn it off", name);
}

static int step_subsection(struct qemu_stream *p, struct cursor *c, struct vm_error **err)
{
    char name[GUEST_REGION_NAME_MAX];
    int r = read_name(p, c, "configuration subsection", name, err);
    if (r != STEP_DONE)
        return r;
    cursor_be32(c); /* version */
    if (strcmp(name, "configuration/capabilities") == 0)
        return step_capabilities(p, c, err);
    if (strcmp(name, "configuration/uuid") == 0)
        return cursor_take(c, 16) ? STEP_DONE : STEP_MORE;
    if (strcmp(name, "configuration/target-page-bits") != 0)
        return go_opaque(p, c, name, err);
    uint32_t bits = cursor_be32(c);
    if (c->failed)
        return STEP_MORE;
    if (bits != PAGE_BITS)
        return broken(p, err, VM_ERROR_REFUSED, "the guest's pages have %" PRIu32 " bits, not %d",
                      bits, PAGE_BITS);
    return STEP_DONE;
}

/* A background snapshot's memory ends where the first device begins; what was consumed of it is rest. */
static int end_of_background(struct qemu_stream *p, struct cursor *c, struct vm_error **err)
{
    c->p = p->record;
    p->state = STATE_PASS;
    if (emit_rest(p, p->record, err) < 0 || p->events->memory_end(p->arg, err) < 0)
        return STEP_ERROR;
    return STEP_DONE;
}

/* START or FULL, whose header names it. */
static int step_named_section(struct qemu_stream *p, struct cursor *c, enum section_type type,
                              struct vm_error **err)
{
    char name[GUEST_REGION_NAME_MAX];
    uint32_t id = cursor_be32(c);
    int r = read_name(p, c, "section", name, err);
    if (r != STEP_DONE)
        return r;
    uint32_t instance = cursor_be32(c), version = cursor_be32(c);
    if (c->failed)
        return STEP_MORE;
    /* A test has no QEMU at hand that writes one before the memory. */
    bool another = strcmp(name, "ram") != 0 || FAULT("stream.opaque") == FAULT_ERROR;
    if (another)
        return p->background && p->ram_begun && type == TYPE_FULL ? end_of_background(p, c, err)
                                                                  : go_opaque(p, c, name, err);
    if (type != TYPE_START || p->ram_begun)
        return broken(p, err, VM_ERROR_PROTOCOL,
                      "a second beginning of memory, or one in one piece");
    if (instance != 0 || version != RAM_VERSION)
        return broken(p, err, VM_ERROR_PROTOCOL,
                      "memory of instance %" PRIu32 ", version %" PRIu32 ", not 0 and %d", instance,
                      version, RAM_VERSION);
    p->ram_begun = true;
    p->ram_id = id;
    p->section = type;
    p->state = STATE_MEM_SIZE;
    return STEP_DONE;
}

/* PART or END, whose header has nothing but the id. */
static int step_numbered_section(struct qemu_stream *p, struct cursor *c, enum section_type type,
                                 struct vm_error **err)
{
    uint32_t id = cursor_be32(c);
    if (c->failed)
        return STEP_MORE;
    if (!p->ram_begun || id != p->ram_id)
        return broken(p, err, VM_ERROR_PROTOCOL, "section %" PRIu32 " goes on but never began", id);
    p->section = type;
    p->state = STATE_RECORDS;
    return STEP_DONE;
}

static int step_footer(struct qemu_stream *p, struct cursor *c, struct vm_error **err)
{
    uint32_t id = cursor_be32(c);
    if (c->failed)
        return STEP_MORE;
    if ((p->previous != TYPE_START && p->previous != TYPE_PART) || id != p->ram_id)
        return broken(p, err, VM_ERROR_PROTOCOL, "the footer of section %" PRIu32 " is misplaced",
                      id);
    return STEP_DONE;
}

/* The only command that needs no answer and changes nothing before the memory's end. */
static int step_command(const struct qemu_stream *p, struct cursor *c, struct vm_error **err)
{
    uint16_t command = cursor_be16(c), len = cursor_be16(c);
    if (c->failed)
        return STEP_MORE;
    if (command != COMMAND_SWITCHOVER_START || len != 0)
        return broken(
            p, err, VM_ERROR_REFUSED,
            "command %u of %u bytes: turn the capabilities return-path and postcopy-ram off",
            command, len);
    return STEP_DONE;
}

static int step_section(struct qemu_stream *p, struct cursor *c, struct vm_error **err)
{
    uint8_t type = cursor_u8(c);
    int r;
    switch (type) {
    case TYPE_CONFIG:
        if (p->previous != TYPE_NONE)
            return broken(p, err, VM_ERROR_PROTOCOL, "the configuration is not the first section");
        r = step_config(p, c, err);
        break;
    case TYPE_SUBSECTION:
        if (p->previous != TYPE_CONFIG && p->previous != TYPE_SUBSECTION)
            return broken(p, err, VM_ERROR_PROTOCOL, "a subsection outside of the configuration");
        r = step_subsection(p, c, err);
        break;
    case TYPE_START:
    case TYPE_FULL:
        r = step_named_section(p, c, type, err);
        break;
    case TYPE_PART:
    case TYPE_END:
        r = step_numbered_section(p, c, type, err);
        break;
    case TYPE_COMMAND:
        r = step_command(p, c, err);
        break;
    case TYPE_FOOTER:
        r = step_footer(p, c, err);
        break;
    case TYPE_EOF:
        return broken(p, err, VM_ERROR_PROTOCOL, "ends before the memory does");
    default:
        return broken(p, err, VM_ERROR_PROTOCOL, "a section of the unknown type 0x%02x", type);
    }
    if (r == STEP_DONE)
        p->previous = type;
    return r;
}

static int list_done(struct qemu_stream *p, struct vm_error **err)
{
    p->state = STATE_RECORDS;
    return p->events->blocks(p->arg, p->blocks, p->n_blocks, err) < 0 ? STEP_ERROR : STEP_DONE;
}

static int step_mem_size(struct qemu_stream *p, struct cursor *c, struct vm_error **err)
{
    uint64_t word = cursor_be64(c);
    if (c->failed)
        return STEP_MORE;
    if ((word & RECORD_FLAGS) != RECORD_MEM_SIZE)
        return broken(p, err, VM_ERROR_PROTOCOL, "memory begins with flags 0x%03x, not its size",
                      (unsigned)(word & RECORD_FLAGS));
    p->list_left = word & ~(uint64_t)RECORD_FLAGS;
    p->state = STATE_BLOCKS;
    return p->list_left ? STEP_DONE : list_done(p, err);
}

static int find_block(const struct qemu_stream *p, const void *name, size_t n)
{
    for (unsigned i = 0; i < p->n_blocks; i++) {
        if (p->name_len[i] == n && memcmp(p->blocks[i].name, name, n) == 0)
            return (int)i;
    }
    return -1;
}

static int step_block(struct qemu_stream *p, struct cursor *c, struct vm_error **err)
{
    if (p->n_blocks == GUEST_REGIONS_MAX)
        return broken(p, err, VM_ERROR_PROTOCOL, "more than %d memory blocks", GUEST_REGIONS_MAX);
    struct qemu_stream_block *b = &p->blocks[p->n_blocks];
    int r = read_name(p, c, "memory block", b->name, err);
    if (r != STEP_DONE)
        return r;
    b->used_length = cursor_be64(c);
    if (c->failed)
        return STEP_MORE;
    size_t n = strlen(b->name);
    if (find_block(p, b->name, n) >= 0)
        return broken(p, err, VM_ERROR_PROTOCOL, "memory block %s is listed twice", b->name);
    if (b->used_length % GUEST_PAGE_SIZE || b->used_length > p->list_left)
        return broken(p, err, VM_ERROR_PROTOCOL,
                      "memory block %s of %" PRIu64
                      " bytes: not whole pages, or more than the sum of all",
                      b->name, b->used_length);
    b->region = QEMU_STREAM_UNMAPPED;
    p->name_len[p->n_blocks++] = (uint8_t)n;
    p->list_left -= b->used_length;
    return p->list_left ? STEP_DONE : list_done(p, err);
}

/* Leave the present record, which ends at `end`, out of rest. */
static int take_page(struct qemu_stream *p, unsigned region, uint64_t offset, const uint8_t *data,
                     const uint8_t *end, struct vm_error **err)
{
    if (emit_rest(p, p->record, err) < 0)
        return STEP_ERROR;
    p->rest = end;
    p->taken = true;
    return p->events->page(p->arg, region, offset, data, err) < 0 ? STEP_ERROR : STEP_DONE;
}

static int step_page(struct qemu_stream *p, struct cursor *c, uint64_t word, struct vm_error **err)
{
    int block = p->named;
    if (!(word & RECORD_CONTINUE)) {
        size_t n = cursor_u8(c);
        const uint8_t *name = cursor_take(c, n);
        if (!name)
            return STEP_MORE;
        block = find_block(p, name, n);
    }
    if (block < 0)
        return broken(p, err, VM_ERROR_PROTOCOL,
                      "a page of a memory block that is not in the list");
    const struct qemu_stream_block *b = &p->blocks[block];
    uint64_t offset = word & ~(uint64_t)RECORD_FLAGS;
    if (offset >= b->used_length)
        return broken(p, err, VM_ERROR_PROTOCOL,
                      "a page at 0x%" PRIx64 " behind the end of block %s", offset, b->name);
    bool zero = word & RECORD_ZERO;
    const uint8_t *data = cursor_take(c, zero ? 1 : GUEST_PAGE_SIZE);
    if (!data)
        return STEP_MORE;
    if (zero && *data)
        return broken(p, err, VM_ERROR_PROTOCOL, "a page that is to be filled with 0x%02x", *data);
    p->named = block;
    if (b->region >= 0)
        return take_page(p, (unsigned)b->region, offset, zero ? NULL : data, c->p, err);
    return STEP_DONE;
}

static int end_of_records(struct qemu_stream *p, struct cursor *c, struct vm_error **err)
{
    if (p->section != TYPE_END) {
        p->state = STATE_SECTION;
        return STEP_DONE;
    }
    p->state = STATE_PASS;
    if (emit_rest(p, c->p, err) < 0 || p->events->memory_end(p->arg, err) < 0)
        return STEP_ERROR;
    return STEP_DONE;
}

static int step_record(struct qemu_stream *p, struct cursor *c, struct vm_error **err)
{
    uint64_t word = cursor_be64(c);
    if (c->failed)
        return STEP_MORE;
    unsigned flags = (unsigned)(word & RECORD_FLAGS);
    switch (flags & ~(unsigned)RECORD_CONTINUE) {
    case RECORD_PAGE:
    case RECORD_ZERO:
        return step_page(p, c, word, err);
    case RECORD_EOS:
        return end_of_records(p, c, err);
    case RECORD_MULTIFD_FLUSH: /* some versions write it with multifd off, to no effect */
        return STEP_DONE;
    case RECORD_XBZRLE:
        return broken(p, err, VM_ERROR_REFUSED, "an XBZRLE page: turn the capability xbzrle off");
    case RECORD_COMPRESS_PAGE:
        return broken(p, err, VM_ERROR_REFUSED,
                      "a compressed page: turn the capability compress off");
    case RECORD_HOOK:
        return broken(p, err, VM_ERROR_REFUSED, "a record of RDMA: migrate into the socket only");
    default:
        return broken(p, err, VM_ERROR_PROTOCOL, "a record with flags 0x%03x", flags);
    }
}

static int step(struct qemu_stream *p, struct cursor *c, struct vm_error **err)
{
    switch (p->state) {
    case STATE_HEADER:
        return step_header(p, c, err);
    case STATE_SECTION:
        return step_section(p, c, err);
    case STATE_MEM_SIZE:
        return step_mem_size(p, c, err);
    case STATE_BLOCKS:
        return step_block(p, c, err);
    case STATE_RECORDS:
        return step_record(p, c, err);
    case STATE_PASS:
        break;
    }
    c->p = c->end;
    return STEP_DONE;
}

struct qemu_stream *qemu_stream_create(const struct qemu_stream_events *events, void *arg,
                                       struct vm_error **err)
{
    struct qemu_stream *p = calloc(1, sizeof(*p));
    if (!p) {
        error_nomem(err);
        return NULL;
    }
    p->events = events;
    p->arg = arg;
    p->previous = TYPE_NONE;
    p->named = -1;
    return p;
}

void qemu_stream_destroy(struct qemu_stream *p)
{
    free(p);
}

void qemu_stream_set_background(struct qemu_stream *p)
{
    p->background = true;
}

int qemu_stream_feed(struct qemu_stream *p, const void *data, size_t len, size_t *ret_consumed,
                     struct vm_error **err)
{
    if (p->failed)
        return error_set(err, VM_ERROR_PROTOCOL, "QEMU's migration stream failed before");
    struct cursor c = cursor_init(data, len);
    p->data = p->rest = c.p;
    int r = STEP_DONE;
    while (r == STEP_DONE && cursor_left(&c)) {
        struct cursor record = c;
        p->record = c.p;
        r = step(p, &record, err);
        if (r == STEP_DONE)
            c.p = record.p;
    }
    if (r == STEP_ERROR || emit_rest(p, c.p, err) < 0) {
        p->failed = true;
        return -1;
    }
    *ret_consumed = (size_t)(c.p - p->data);
    p->fed += *ret_consumed;
    return 0;
}

int qemu_stream_end(const struct qemu_stream *p, struct vm_error **err)
{
    if (p->state == STATE_PASS)
        return 0;
    return error_set(err, VM_ERROR_FAILED,
                     "QEMU closed its migration stream after %" PRIu64
                     " bytes, before the memory was complete",
                     p->fed);
}

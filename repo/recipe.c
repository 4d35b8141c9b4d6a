/* SPDX-License-Identifier: Apache-2.0 */
#include "repo/recipe.h"
#include "repo/pack.h"

#include <xxhash.h>

enum { ZERO_RUN = 0x8000, NODE_HEADER = 8, RUN_BYTES = 11 };

unsigned recipe_depth(uint64_t size)
{
    unsigned depth = 0;
    for (uint64_t span = RECIPE_LEAF_BYTES; span < size && depth < RECIPE_LEVELS - 1; depth++)
        span *= RECIPE_FANOUT;
    return depth;
}

uint64_t recipe_ref_hash(uint64_t tree, const void *node, size_t len)
{
    return XXH3_64bits_withSeed(node, len, tree);
}

void recipe_ref_write(const struct recipe_ref *ref, uint8_t out[RECIPE_REF_BYTES])
{
    put_le64(out, ref->tree);
    put_le32(out + 8, ref->offset);
    put_le32(out + 12, ref->len);
    put_le64(out + 16, ref->hash);
}

struct recipe_ref recipe_ref_read(const uint8_t in[RECIPE_REF_BYTES])
{
    return (struct recipe_ref){get_le64(in), get_le32(in + 8), get_le32(in + 12),
                               get_le64(in + 16)};
}

/* ---- writing ---- */

static bool page_is_hole(const struct recipe_page *p)
{
    return !p->len;
}

/* Do the pages at i and i + 1 belong to one run? */
static bool continues(const struct recipe_page *a, const struct recipe_page *b)
{
    if (page_is_hole(a) || page_is_hole(b))
        return page_is_hole(a) && page_is_hole(b);
    return a->pack == b->pack && a->offset == b->offset && a->len == b->len &&
           b->page == a->page + 1;
}

static unsigned run_length(const struct recipe_leaf *leaf, unsigned from, unsigned end)
{
    unsigned n = 1;
    while (from + n < end && continues(&leaf->pages[from + n - 1], &leaf->pages[from + n]))
        n++;
    return n;
}

struct pack_table {
    uint64_t packs[RECIPE_LEAF_PAGES];
    unsigned n;
};

/* The index of the pack, added if it is new; looked for from the end, where it usually is. */
static unsigned pack_index(struct pack_table *t, uint64_t pack)
{
    for (unsigned i = t->n; i-- > 0;)
        if (t->packs[i] == pack)
            return i;
    t->packs[t->n] = pack;
    return t->n++;
}

static void write_run(const struct recipe_page *p, unsigned n, struct pack_table *packs,
                      struct buffer *out)
{
    if (page_is_hole(p)) {
        buffer_put_le16(out, (uint16_t)(n | ZERO_RUN));
        return;
    }
    buffer_put_le16(out, (uint16_t)n);
    buffer_put_le16(out, (uint16_t)pack_index(packs, p->pack));
    buffer_put_le32(out, p->offset / RECORD_ALIGN);
    buffer_put_le16(out, (uint16_t)(record_room(p->len) / RECORD_ALIGN));
    buffer_put_u8(out, p->page);
}

void recipe_leaf_write(const struct recipe_leaf *leaf, struct buffer *out)
{
    unsigned end = RECIPE_LEAF_PAGES, n_runs = 0;
    while (end && page_is_hole(&leaf->pages[end - 1]))
        end--;
    if (!end)
        return;
    struct pack_table packs = {.n = 0};
    cleanup_buffer struct buffer runs = {0};
    for (unsigned i = 0; i < end; n_runs++) {
        unsigned n = run_length(leaf, i, end);
        write_run(&leaf->pages[i], n, &packs, &runs);
        i += n;
    }
    buffer_put_le16(out, 0);
    buffer_put_le16(out, (uint16_t)packs.n);
    buffer_put_le16(out, (uint16_t)n_runs);
    buffer_put_le16(out, 0);
    for (unsigned i = 0; i < packs.n; i++)
        buffer_put_le64(out, packs.packs[i]);
    buffer_put(out, runs.data, runs.len);
    out->failed |= runs.failed;
    for (unsigned i = 0; i < end; i++)
        if (!page_is_hole(&leaf->pages[i]))
            buffer_put(out, leaf->pages[i].id, sizeof(leaf->pages[i].id));
}

void recipe_inner_write(const struct recipe_inner *node, struct buffer *out)
{
    unsigned n = RECIPE_FANOUT;
    while (n && recipe_ref_is_zero(&node->children[n - 1]))
        n--;
    if (!n)
        return;
    buffer_put_u8(out, (uint8_t)node->level);
    buffer_put_u8(out, 0);
    buffer_put_le16(out, (uint16_t)n);
    buffer_put_le32(out, 0);
    for (unsigned i = 0; i < n; i++) {
        uint8_t *to = buffer_grow(out, RECIPE_REF_BYTES);
        if (to)
            recipe_ref_write(&node->children[i], to);
    }
}

/* ---- reading ---- */

static int damaged(struct vm_error **err)
{
    return error_set(err, VM_ERROR_CORRUPT, "a node of a recipe makes no sense");
}

/* One run into leaf->pages[at..]; returns its pages, 0 if it makes no sense. */
static unsigned read_run(struct cursor *c, const uint8_t *packs, unsigned n_packs, unsigned at,
                         struct recipe_leaf *leaf)
{
    unsigned head = cursor_le16(c), n = head & ~ZERO_RUN;
    if (c->failed || !n || n > RECIPE_LEAF_PAGES - at)
        return 0;
    if (head & ZERO_RUN)
        return n;
    unsigned pack = cursor_le16(c);
    uint64_t offset = (uint64_t)cursor_le32(c) * RECORD_ALIGN;
    uint32_t len = (uint32_t)cursor_le16(c) * RECORD_ALIGN;
    unsigned page = cursor_u8(c);
    if (c->failed || pack >= n_packs || offset < PACK_HEADER || offset + len > PACK_BODY_MAX ||
        len <= RECORD_HEADER || len > RECORD_MAX || page + n > RECORD_PAGES_MAX)
        return 0;
    for (unsigned i = 0; i < n; i++)
        leaf->pages[at + i] = (struct recipe_page){.pack = get_le64(packs + 8ul * pack),
                                                   .offset = (uint32_t)offset,
                                                   .len = len,
                                                   .page = (uint8_t)(page + i)};
    return n;
}

int recipe_leaf_read(const uint8_t *data, size_t len, struct recipe_leaf *ret_leaf,
                     struct vm_error **err)
{
    struct cursor c = cursor_init(data, len);
    unsigned level = cursor_le16(&c), n_packs = cursor_le16(&c), n_runs = cursor_le16(&c);
    unsigned zero = cursor_le16(&c), end = 0;
    const uint8_t *packs = cursor_take(&c, 8ul * n_packs);
    if (c.failed || level || zero || !n_packs || n_packs > RECIPE_LEAF_PAGES || !n_runs)
        return damaged(err);
    memset(ret_leaf, 0, sizeof(*ret_leaf));
    for (unsigned i = 0; i < n_runs; i++) {
        unsigned n = read_run(&c, packs, n_packs, end, ret_leaf);
        if (!n)
            return damaged(err);
        end += n;
    }
    for (unsigned i = 0; i < end; i++) {
        struct recipe_page *p = &ret_leaf->pages[i];
        const uint8_t *id = page_is_hole(p) ? NULL : cursor_take(&c, sizeof(p->id));
        if (id)
            memcpy(p->id, id, sizeof(p->id));
    }
    return c.failed || cursor_left(&c) ? damaged(err) : 0;
}

int recipe_inner_read(const uint8_t *data, size_t len, unsigned level,
                      struct recipe_inner *ret_node, struct vm_error **err)
{
    struct cursor c = cursor_init(data, len);
    unsigned got_level = cursor_le16(&c), n = cursor_le16(&c), zero = cursor_le32(&c);
    if (c.failed || got_level != level || !level || zero || !n || n > RECIPE_FANOUT ||
        cursor_left(&c) != (size_t)n * RECIPE_REF_BYTES)
        return damaged(err);
    memset(ret_node, 0, sizeof(*ret_node));
    ret_node->level = level;
    for (unsigned i = 0; i < n; i++) {
        struct recipe_ref ref = recipe_ref_read(cursor_take(&c, RECIPE_REF_BYTES));
        if (!recipe_ref_is_good(&ref))
            return damaged(err);
        ret_node->children[i] = ref;
    }
    return 0;
}

static size_t leaf_len(struct cursor *c)
{
    size_t len = cursor_left(c), n_ids = 0;
    unsigned n_packs, n_runs;
    cursor_le16(c);
    n_packs = cursor_le16(c);
    n_runs = cursor_le16(c);
    cursor_le16(c);
    cursor_take(c, 8ul * n_packs);
    for (unsigned i = 0; i < n_runs && !c->failed; i++) {
        unsigned head = cursor_le16(c);
        if (head & ZERO_RUN)
            continue;
        n_ids += head;
        cursor_take(c, RUN_BYTES - 2);
    }
    cursor_take(c, n_ids * sizeof(((struct recipe_page *)0)->id));
    return c->failed ? 0 : len - cursor_left(c);
}

size_t recipe_node_len(const uint8_t *data, size_t len)
{
    struct cursor c = cursor_init(data, len);
    if (len < NODE_HEADER)
        return 0;
    size_t n = data[0] ? NODE_HEADER + (size_t)get_le16(data + 2) * RECIPE_REF_BYTES : leaf_len(&c);
    return n <= len && n <= RECIPE_NODE_MAX ? n : 0;
}

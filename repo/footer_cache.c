/* SPDX-License-Identifier: Apache-2.0 */
#include "repo/footer_cache.h"
#include "repo/names.h"

#include "base/log.h"

#include <stdlib.h>
#include <xxhash.h>

enum {
    BYTES_PER_PAGE = PAGE_ID_BYTES + 2, /* its identity, and its share of the record */
    TABLE_FIRST = 1024,
    LOAD_BATCH = 8,
    UNREADABLE = 256, /* packs remembered as such, the latest ones */
    PAGE_BITS = 14,
    SLOTS_MAX = 1 << 20,
};

/*
 * The table: open addressing with linear probing. An entry is slot << PAGE_BITS | page, plus one so
 * that 0 is free; 34 bits, and above them 30 bits of the identity, which spare most looks at the
 * footer.
 */
struct footer_cache {
    struct store *store;
    size_t max_pages, n_pages;
    uint64_t *table;
    uint64_t table_mask;
    struct cached_footer **slots;
    unsigned n_slots, slots_cap;
    uint64_t unreadable[UNREADABLE];
    unsigned next_unreadable;
    const struct number_set *forbidden; /* NULL: none */
    const struct quarantine *avoided;   /* NULL: none */
    uint64_t clock, loads;
};

_Static_assert(PACK_PAGES_MAX <= 1 << PAGE_BITS, "a page's number fits");

/* Pages that fit into `limit` bytes together with a table of so many entries, four fifths full. */
static size_t pages_beside(size_t limit, size_t table_size)
{
    size_t table = table_size * sizeof(uint64_t);
    size_t fit = limit > table ? (limit - table) / BYTES_PER_PAGE : 0;
    return fit < table_size / 5 * 4 ? fit : table_size / 5 * 4;
}

struct footer_cache *footer_cache_create(struct store *s, size_t limit, struct vm_error **err)
{
    struct footer_cache *c = calloc(1, sizeof(*c));
    if (!c) {
        error_nomem(err);
        return NULL;
    }
    c->store = s;
    size_t size = TABLE_FIRST;
    while (pages_beside(limit, 2 * size) > pages_beside(limit, size))
        size *= 2;
    c->max_pages = pages_beside(limit, size);
    c->table_mask = size - 1;
    c->table = calloc(size, sizeof(*c->table));
    if (!c->table) {
        footer_cache_destroy(c);
        error_nomem(err);
        return NULL;
    }
    return c;
}

static void free_footer(struct cached_footer *f)
{
    footer_finish(&f->footer);
    free(f);
}

void footer_cache_destroy(struct footer_cache *c)
{
    if (!c)
        return;
    for (unsigned i = 0; i < c->n_slots; i++)
        if (c->slots[i])
            free_footer(c->slots[i]);
    free(c->slots);
    free(c->table);
    free(c);
}

/* ---- the table ---- */

static uint64_t home_of(const struct footer_cache *c, const struct page_id *id)
{
    return get_le64(id->bytes) & c->table_mask;
}

static uint64_t tag_of(const struct page_id *id)
{
    return (uint64_t)(get_le32(id->bytes + 8) & 0x3fffffff) << 34;
}

static uint64_t make_entry(const struct cached_footer *f, uint32_t page)
{
    return tag_of(&f->footer.ids[page]) | (((uint64_t)f->slot << PAGE_BITS | page) + 1);
}

static const struct page_id *entry_id(const struct footer_cache *c, uint64_t entry,
                                      struct footer_hit *ret_hit)
{
    uint64_t place = (entry & 0x3ffffffff) - 1;
    ret_hit->footer = c->slots[place >> PAGE_BITS];
    ret_hit->page = place & ((1 << PAGE_BITS) - 1);
    return &ret_hit->footer->footer.ids[ret_hit->page];
}

static void table_insert(struct footer_cache *c, struct cached_footer *f, uint32_t page)
{
    uint64_t i = home_of(c, &f->footer.ids[page]);
    while (c->table[i])
        i = (i + 1) & c->table_mask;
    c->table[i] = make_entry(f, page);
    c->n_pages++;
}

/* Remove an entry, moving those behind it up, so that no probe ends too early. */
static void table_remove(struct footer_cache *c, struct cached_footer *f, uint32_t page)
{
    uint64_t i = home_of(c, &f->footer.ids[page]), entry = make_entry(f, page);
    while (c->table[i] != entry)
        i = (i + 1) & c->table_mask;
    for (uint64_t j = i;;) {
        j = (j + 1) & c->table_mask;
        if (!c->table[j])
            break;
        struct footer_hit hit;
        uint64_t home = home_of(c, entry_id(c, c->table[j], &hit));
        if (((j - home) & c->table_mask) >= ((j - i) & c->table_mask)) {
            c->table[i] = c->table[j];
            i = j;
        }
    }
    c->table[i] = 0;
    c->n_pages--;
}

unsigned footer_cache_find(struct footer_cache *c, const struct page_id *id,
                           struct footer_hit *hits, unsigned max)
{
    unsigned n = 0;
    uint64_t tag = tag_of(id);
    for (uint64_t i = home_of(c, id); c->table[i] && n < max; i = (i + 1) & c->table_mask) {
        if (c->table[i] >> 34 << 34 != tag)
            continue;
        if (page_id_equal(entry_id(c, c->table[i], &hits[n]), id))
            hits[n++].footer->used_at = ++c->clock;
    }
    return n;
}

/* ---- footers ---- */

static void evict(struct footer_cache *c, struct cached_footer *f)
{
    for (uint32_t i = 0; i < f->footer.n_pages; i++)
        table_remove(c, f, i);
    c->slots[f->slot] = NULL;
    free_footer(f);
}

/* Let the least recently hit footers go until n more pages fit; pinned ones stay. */
static void make_room(struct footer_cache *c, size_t n)
{
    while (c->n_pages + n > c->max_pages) {
        struct cached_footer *oldest = NULL;
        for (unsigned i = 0; i < c->n_slots; i++) {
            struct cached_footer *f = c->slots[i];
            if (f && !f->pins && (!oldest || f->used_at < oldest->used_at))
                oldest = f;
        }
        if (!oldest)
            return;
        evict(c, oldest);
    }
}

void footer_cache_trim(struct footer_cache *c)
{
    make_room(c, 0);
}

/* Pinned footers may exceed the limit; the table must hold them all the same. */
static int grow_table(struct footer_cache *c, size_t n, struct vm_error **err)
{
    uint64_t size = c->table_mask + 1;
    while (c->n_pages + n >= size - size / 8)
        size *= 2;
    if (size == c->table_mask + 1)
        return 0;
    uint64_t *table = calloc(size, sizeof(*table));
    if (!table)
        return error_nomem(err);
    free(c->table);
    c->table = table;
    c->table_mask = size - 1;
    c->n_pages = 0;
    for (unsigned i = 0; i < c->n_slots; i++)
        for (uint32_t page = 0; c->slots[i] && page < c->slots[i]->footer.n_pages; page++)
            table_insert(c, c->slots[i], page);
    return 0;
}

static int take_slot(struct footer_cache *c, struct cached_footer *f, struct vm_error **err)
{
    unsigned i = 0;
    while (i < c->n_slots && c->slots[i])
        i++;
    if (i == c->slots_cap) {
        unsigned cap = c->slots_cap ? 2 * c->slots_cap : 64;
        struct cached_footer **slots =
            cap <= SLOTS_MAX ? realloc(c->slots, cap * sizeof(struct cached_footer *)) : NULL;
        if (!slots)
            return error_nomem(err);
        c->slots = slots;
        c->slots_cap = cap;
    }
    if (i == c->n_slots)
        c->n_slots++;
    c->slots[i] = f;
    f->slot = i;
    f->used_at = ++c->clock;
    return 0;
}

/* Takes the footer's content over. */
static int adopt(struct footer_cache *c, struct footer *footer, struct vm_error **err)
{
    make_room(c, footer->n_pages);
    struct cached_footer *f = calloc(1, sizeof(*f));
    if (!f)
        return error_nomem(err);
    f->footer = *footer;
    *footer = (struct footer){0};
    f->n_laid = UINT32_MAX;
    if (grow_table(c, f->footer.n_pages, err) < 0 || take_slot(c, f, err) < 0) {
        free_footer(f);
        return -1;
    }
    for (uint32_t i = 0; i < f->footer.n_pages; i++)
        table_insert(c, f, i);
    return 0;
}

struct cached_footer *footer_cache_get(struct footer_cache *c, uint64_t pack)
{
    for (unsigned i = 0; i < c->n_slots; i++)
        if (c->slots[i] && c->slots[i]->footer.pack == pack)
            return c->slots[i];
    return NULL;
}

bool footer_cache_knows(const struct footer_cache *c, uint64_t pack)
{
    for (unsigned i = 0; i < c->n_slots; i++)
        if (c->slots[i] && c->slots[i]->footer.pack == pack)
            return true;
    for (unsigned i = 0; i < UNREADABLE; i++)
        if (c->unreadable[i] == pack)
            return true;
    return c->forbidden && number_set_has(c->forbidden, pack);
}

static void remember_unreadable(struct footer_cache *c, uint64_t pack)
{
    c->unreadable[c->next_unreadable++ % UNREADABLE] = pack;
}

void footer_cache_forbid(struct footer_cache *c, const struct number_set *packs)
{
    c->forbidden = packs;
    for (unsigned i = 0; i < c->n_slots; i++) {
        struct cached_footer *f = c->slots[i];
        if (!f || f->own || !number_set_has(packs, f->footer.pack))
            continue;
        for (uint32_t page = 0; page < f->footer.n_pages; page++)
            table_remove(c, f, page);
        f->footer.n_pages = 0;
        if (!f->pins)
            evict(c, f);
    }
}

void footer_cache_avoid(struct footer_cache *c, const struct quarantine *q)
{
    c->avoided = q;
}

/* Damaged records get identities that no page has; all different, as the table needs it. */
static void disown_damaged(struct footer_cache *c, struct footer *f)
{
    const struct quarantined *items;
    if (!c->avoided || !quarantine_of(c->avoided, f->pack, &items))
        return;
    for (uint32_t i = 0; i < f->n_records; i++) {
        const struct footer_record *r = &f->records[i];
        if (!quarantine_has(c->avoided, f->pack, r->offset))
            continue;
        for (uint32_t page = r->first_page; page < r->first_page + r->n_pages; page++) {
            uint64_t name[2] = {f->pack, page};
            memset(f->ids[page].bytes, 0xff, PAGE_ID_BYTES);
            put_le64(f->ids[page].bytes, XXH3_64bits(name, sizeof(name)));
        }
    }
}

static int load_batch(struct footer_cache *c, const uint64_t *packs, size_t n,
                      struct vm_error **err)
{
    struct footer footers[LOAD_BATCH];
    struct vm_error *problems[LOAD_BATCH];
    if (footer_read_many(c->store, packs, n, footers, problems, err) < 0)
        return -1;
    int result = 0;
    for (size_t i = 0; i < n; i++) {
        c->loads++;
        if (problems[i])
            log_warn("a pack's footer is damaged; nothing is shared with it", "error=%s",
                     log_q(error_message(problems[i])));
        error_clear(&problems[i]);
        if (!footers[i].n_records)
            remember_unreadable(c, packs[i]);
        else if (!result) {
            disown_damaged(c, &footers[i]);
            result = adopt(c, &footers[i], err);
        }
        footer_finish(&footers[i]);
    }
    return result;
}

int footer_cache_load(struct footer_cache *c, const uint64_t *packs, size_t n,
                      struct vm_error **err)
{
    for (size_t i = 0; i < n; i += LOAD_BATCH)
        if (load_batch(c, packs + i, n - i < LOAD_BATCH ? n - i : LOAD_BATCH, err) < 0)
            return -1;
    return 0;
}

/* ---- a writer's own packs ---- */

struct cached_footer *footer_cache_begin_own(struct footer_cache *c, uint64_t pack,
                                             struct vm_error **err)
{
    struct cached_footer *f = calloc(1, sizeof(*f));
    if (!f) {
        error_nomem(err);
        return NULL;
    }
    f->own = true;
    f->pins = 1;
    f->footer.pack = pack;
    f->footer.records = calloc(PACK_RECORDS_MAX, sizeof(*f->footer.records));
    f->footer.ids = malloc(PACK_PAGES_MAX * sizeof(*f->footer.ids));
    if (!f->footer.records || !f->footer.ids || grow_table(c, PACK_PAGES_MAX, err) < 0 ||
        take_slot(c, f, err) < 0) {
        if (err && !*err)
            error_nomem(err);
        free_footer(f);
        return NULL;
    }
    return f;
}

uint32_t footer_cache_add_record(struct footer_cache *c, struct cached_footer *f,
                                 const struct page_id *ids, unsigned n, uint16_t mask)
{
    struct footer *own = &f->footer;
    uint32_t number = own->n_records++;
    own->records[number].first_page = (uint16_t)own->n_pages;
    own->records[number].n_pages = (uint8_t)n;
    own->records[number].mask = mask;
    for (unsigned i = 0; i < n; i++) {
        own->ids[own->n_pages] = ids[i];
        table_insert(c, f, own->n_pages++);
    }
    return number;
}

void footer_cache_end_own(struct cached_footer *f)
{
    struct footer *own = &f->footer;
    struct footer_record *records =
        realloc(own->records, (own->n_records + 1) * sizeof(*own->records));
    struct page_id *ids = realloc(own->ids, (own->n_pages + 1) * sizeof(*own->ids));
    own->records = records ? records : own->records;
    own->ids = ids ? ids : own->ids;
    f->pins--;
}

void footer_cache_pin(struct cached_footer *f)
{
    f->pins++;
}

void footer_cache_unpin(struct cached_footer *f)
{
    f->pins--;
}

uint64_t footer_cache_loads(const struct footer_cache *c)
{
    return c->loads;
}

bool cached_footer_identity(const struct cached_footer *f, uint32_t offset, unsigned page,
                            struct page_id *ret_id)
{
    const struct footer_record *r = footer_record_at(&f->footer, offset);
    if (!r || page >= r->n_pages)
        return false;
    *ret_id = f->footer.ids[r->first_page + page];
    return true;
}

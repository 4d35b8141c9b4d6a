/* SPDX-License-Identifier: Apache-2.0 */
#include "repo/heal.h"
#include "repo/footer_cache.h"
#include "repo/forwarding.h"
#include "repo/names.h"
#include "repo/quarantine.h"

#include "base/fault.h"

#include <stdlib.h>

enum { KEYS = 4096 };

/* A page of a damaged record, and where else it is (pack 0: not known). */
struct lost {
    struct page_id id;
    uint64_t pack;
    uint32_t offset;
    uint8_t page, pages; /* of how many in its record */
    struct recipe_page to;
};

struct heal {
    struct repo *repo;
    struct store *store;
    struct quarantine quarantine;
    struct page_hasher hasher;
    struct pack_presence presence; /* of the packs that forwardings name */
    struct lost *lost;
    size_t n_lost;
    struct index_entry keys[KEYS];
    size_t n_keys;
    struct number_set candidates; /* packs that may hold some of them */
    uint64_t healed;
};

/* ---- what is lost ---- */

static void add_key(struct heal *h, enum index_kind kind, const struct page_id *id)
{
    if (h->n_keys < KEYS)
        h->keys[h->n_keys++] = index_entry_make(kind, id, NULL, 0);
}

static int lose_record(struct heal *h, const struct footer *f, const struct footer_record *r,
                       const struct forwarding *forwarding, struct vm_error **err)
{
    struct page_id extent;
    if (h->n_lost + r->n_pages > HEAL_PAGES_MAX)
        return 0; /* another time */
    if (r->mask) {
        if (page_hasher_extent(&h->hasher, &f->ids[r->first_page], r->mask, &extent, err) < 0)
            return -1;
        add_key(h, INDEX_EXTENT, &extent);
    }
    size_t first = h->n_lost;
    bool all = true;
    for (uint8_t i = 0; i < r->n_pages; i++) {
        struct recipe_page p = {.offset = r->offset, .page = i};
        bool known = forwarding_find(forwarding, &p) &&
                     !quarantine_has(&h->quarantine, p.pack, p.offset);
        const struct page_id *id = &f->ids[r->first_page + i];
        all &= known;
        if (index_samples(id))
            add_key(h, INDEX_PAGE, id);
        h->lost[h->n_lost++] = (struct lost){*id, f->pack, r->offset, i, r->n_pages,
                                             known ? p : (struct recipe_page){0}};
    }
    h->n_lost = all ? first : h->n_lost;
    return 0;
}

static int lose_pack(struct heal *h, const struct footer *f, struct vm_error **err)
{
    cleanup_forwarding struct forwarding forwarding = {0};
    if (forwarding_get(h->store, f->pack, &forwarding, err) < 0 ||
        forwarding_drop_gone(&forwarding, &h->presence, err) < 0)
        return -1;
    for (uint32_t i = 0; i < f->n_records; i++)
        if (quarantine_has(&h->quarantine, f->pack, f->records[i].offset) &&
            lose_record(h, f, &f->records[i], &forwarding, err) < 0)
            return -1;
    return 0;
}

static int with_footer(struct heal *h, uint64_t pack,
                       int (*fn)(struct heal *, const struct footer *, struct vm_error **),
                       struct vm_error **err)
{
    struct footer f;
    struct vm_error *problem = NULL;
    if (footer_read_many(h->store, &pack, 1, &f, &problem, err) < 0)
        return -1;
    error_free(problem);
    int result = f.n_records ? fn(h, &f, err) : 0;
    footer_finish(&f);
    return result;
}

static int find_lost(struct heal *h, struct vm_error **err)
{
    for (size_t i = 0; i < h->quarantine.n; i++) {
        uint64_t pack = h->quarantine.items[i].pack;
        if ((!i || pack != h->quarantine.items[i - 1].pack) &&
            with_footer(h, pack, lose_pack, err) < 0)
            return -1;
    }
    return 0;
}

/* ---- where else it is ---- */

static int by_id(const void *a, const void *b)
{
    return memcmp(((const struct lost *)a)->id.bytes, ((const struct lost *)b)->id.bytes,
                  PAGE_ID_BYTES);
}

static int search_pack(struct heal *h, const struct footer *f, struct vm_error **err)
{
    for (uint32_t i = 0; i < f->n_pages; i++) {
        struct lost key = {.id = f->ids[i]};
        struct lost *l = bsearch(&key, h->lost, h->n_lost, sizeof(key), by_id);
        const struct footer_record *r = l ? &f->records[footer_record_of(f, i)] : NULL;
        if (!l || quarantine_has(&h->quarantine, f->pack, r->offset))
            continue;
        while (l > h->lost && !by_id(l - 1, &key))
            l--;
        for (; l < h->lost + h->n_lost && !by_id(l, &key); l++)
            if (!l->to.pack)
                l->to = (struct recipe_page){.pack = f->pack, .offset = r->offset,
                                             .len = record_room(r->len),
                                             .page = (uint8_t)(i - r->first_page)};
    }
    return 0;
}

static int find_candidates(struct heal *h, uint64_t writer, uint64_t n_own, struct vm_error **err)
{
    if (index_lookup(repo_index(h->repo), h->keys, h->n_keys, err) < 0)
        return -1;
    for (size_t i = 0; i < h->n_keys; i++)
        if (h->keys[i].len == 8 &&
            number_set_add(&h->candidates, get_le64(h->keys[i].value), err) < 0)
            return -1;
    for (uint64_t i = 1; i <= n_own; i++)
        if (number_set_add(&h->candidates, writer << NUMBER_COUNT_BITS | i, err) < 0)
            return -1;
    return 0;
}

/* ---- forwardings ---- */

static int by_place(const void *a, const void *b)
{
    const struct lost *x = a, *y = b;
    if (x->pack != y->pack)
        return x->pack < y->pack ? -1 : 1;
    if (x->offset != y->offset)
        return x->offset < y->offset ? -1 : 1;
    return (int)x->page - (int)y->page;
}

static bool continues(const struct forward_run *run, const struct lost *l)
{
    return run->offset == l->offset && run->first + run->n == l->page &&
           run->to.pack == l->to.pack && run->to.offset == l->to.offset &&
           run->to.page + run->n == l->to.page;
}

/* The pages of one pack. */
static int forward_pack(struct heal *h, const struct lost *lost, size_t n, struct vm_error **err)
{
    cleanup_forwarding struct forwarding f = {0};
    cleanup_free struct forward_run *runs = calloc(n, sizeof(*runs));
    size_t n_runs = 0;
    uint64_t whole = 0;
    unsigned found = 0;
    bool set;
    if (!runs)
        return error_nomem(err);
    for (size_t i = 0; i < n; i++) {
        found = lost[i].page ? found : 0;
        if (!lost[i].to.pack)
            continue;
        found++;
        whole += found == lost[i].pages;
        if (n_runs && continues(&runs[n_runs - 1], &lost[i]))
            runs[n_runs - 1].n++;
        else
            runs[n_runs++] = (struct forward_run){lost[i].offset, lost[i].page, 1, lost[i].to};
    }
    if (!n_runs)
        return 0;
    if (forwarding_get(h->store, lost->pack, &f, err) < 0 ||
        forwarding_drop_gone(&f, &h->presence, err) < 0 ||
        forwarding_merge(&f, runs, n_runs, err) < 0)
        return -1;
    if (f.n > FORWARD_RUNS_MAX)
        return 0;
    if (forwarding_commit(h->store, &f, &set, err) < 0)
        return -1;
    h->healed += set ? whole : 0;
    return 0;
}

static int forward_all(struct heal *h, struct vm_error **err)
{
    qsort(h->lost, h->n_lost, sizeof(*h->lost), by_place);
    for (size_t i = 0; i < h->n_lost;) {
        size_t n = 1;
        while (i + n < h->n_lost && h->lost[i + n].pack == h->lost[i].pack)
            n++;
        if (forward_pack(h, &h->lost[i], n, err) < 0)
            return -1;
        (void)FAULT("repo.healed");
        i += n;
    }
    return 0;
}

/* ---- all ---- */

static int heal(struct heal *h, uint64_t writer, uint64_t n_own, struct vm_error **err)
{
    if (quarantine_load(h->store, &h->quarantine, err) < 0)
        return -1;
    if (!h->quarantine.n)
        return 0;
    h->lost = calloc(HEAL_PAGES_MAX, sizeof(*h->lost));
    if (!h->lost)
        return error_nomem(err);
    if (find_lost(h, err) < 0)
        return -1;
    if (!h->n_lost)
        return 0;
    if (find_candidates(h, writer, n_own, err) < 0)
        return -1;
    qsort(h->lost, h->n_lost, sizeof(*h->lost), by_id);
    size_t at = 0;
    for (uint64_t pack; (pack = number_set_next(&h->candidates, &at));)
        if (with_footer(h, pack, search_pack, err) < 0)
            return -1;
    return forward_all(h, err);
}

int heal_quarantined(struct repo *r, uint64_t writer, uint64_t n_own, uint64_t *ret_records,
                     struct vm_error **err)
{
    struct heal *h = calloc(1, sizeof(*h));
    if (!h)
        return error_nomem(err);
    h->repo = r;
    h->store = repo_store(r);
    h->presence.store = h->store;
    int result = page_hasher_init(&h->hasher, err);
    if (!result)
        result = heal(h, writer, n_own, err);
    if (!result)
        *ret_records = h->healed;
    page_hasher_finish(&h->hasher);
    quarantine_finish(&h->quarantine);
    pack_presence_forget(&h->presence);
    number_set_finish(&h->candidates);
    free(h->lost);
    free(h);
    return result;
}

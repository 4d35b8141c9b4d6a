/* SPDX-License-Identifier: Apache-2.0 */
#include "repo/forwarding.h"
#include "repo/catalogue.h"
#include "repo/catalogue_shard.h"
#include "repo/names.h"
#include "repo/pack.h"
#include "repo/record.h"

#include <stdlib.h>
#include <xxhash.h>

enum { HEAD = 8, RUN = 16, CHECK = 8, VERSION = 1, ALIGN = 8 };

void forwarding_finish(struct forwarding *f)
{
    free(f->runs);
    buffer_finish(&f->value);
    *f = (struct forwarding){.pack = f->pack};
}

static int damaged(uint64_t pack, struct vm_error **err)
{
    return error_set(err, VM_ERROR_CORRUPT, "the forwarding of pack %016" PRIx64 " makes no sense",
                     pack);
}

/* Which of `packs` it is; appended if it is not there. */
static unsigned pack_index(uint64_t *packs, unsigned *n, uint64_t pack)
{
    unsigned i = 0;
    while (i < *n && packs[i] != pack)
        i++;
    if (i == *n && i < FORWARD_PACKS_MAX)
        packs[(*n)++] = pack;
    return i;
}

int forwarding_write(const struct forwarding *f, struct buffer *out, struct vm_error **err)
{
    uint64_t packs[FORWARD_PACKS_MAX];
    unsigned n = 0, most = 0;
    for (size_t i = 0; i < f->n; i++) {
        unsigned index = pack_index(packs, &n, f->runs[i].to.pack);
        most = index > most ? index : most;
    }
    if (f->n > FORWARD_RUNS_MAX || most >= FORWARD_PACKS_MAX)
        return error_set(err, VM_ERROR_REFUSED, "the forwarding of pack %016" PRIx64
                         " would be too large", f->pack);
    size_t start = out->len;
    buffer_put_le16(out, VERSION);
    buffer_put_le16(out, (uint16_t)n);
    buffer_put_le32(out, (uint32_t)f->n);
    for (unsigned i = 0; i < n; i++)
        buffer_put_le64(out, packs[i]);
    for (size_t i = 0; i < f->n; i++) {
        const struct forward_run *r = &f->runs[i];
        buffer_put_le32(out, r->offset / ALIGN);
        buffer_put_u8(out, r->first);
        buffer_put_u8(out, r->n);
        buffer_put_le16(out, (uint16_t)pack_index(packs, &n, r->to.pack));
        buffer_put_le32(out, r->to.offset / ALIGN);
        buffer_put_le16(out, (uint16_t)(r->to.len / ALIGN));
        buffer_put_u8(out, r->to.page);
        buffer_put_u8(out, 0);
    }
    if (!out->failed)
        buffer_put_le64(out, XXH3_64bits_withSeed(out->data + start, out->len - start, f->pack));
    return out->failed ? error_nomem(err) : 0;
}

static bool read_runs(struct cursor *c, const uint64_t *packs, unsigned n_packs,
                      struct forwarding *f)
{
    uint64_t last = 0;
    for (size_t i = 0; i < f->n; i++) {
        struct forward_run *r = &f->runs[i];
        uint64_t offset = (uint64_t)cursor_le32(c) * ALIGN;
        r->first = cursor_u8(c);
        r->n = cursor_u8(c);
        unsigned index = cursor_le16(c);
        uint64_t to = (uint64_t)cursor_le32(c) * ALIGN;
        r->to.len = (uint32_t)cursor_le16(c) * ALIGN;
        r->to.page = cursor_u8(c);
        uint64_t place = offset << 8 | r->first;
        /* The bounds that recipes have, since it goes into them. */
        if (cursor_u8(c) || index >= n_packs || offset < PACK_HEADER || offset > PACK_BODY_MAX ||
            to < PACK_HEADER || to + r->to.len > PACK_BODY_MAX || r->to.len <= RECORD_HEADER ||
            r->to.len > RECORD_MAX || !r->n || r->first + r->n > RECORD_PAGES_MAX ||
            r->to.page + r->n > RECORD_PAGES_MAX || (i && place <= last))
            return false;
        last = place + r->n - 1;
        r->offset = (uint32_t)offset;
        r->to.offset = (uint32_t)to;
        r->to.pack = packs[index];
    }
    return true;
}

int forwarding_read(uint64_t pack, const void *data, size_t len, struct forwarding *ret,
                    struct vm_error **err)
{
    struct cursor c = cursor_init(data, len);
    uint64_t packs[FORWARD_PACKS_MAX];
    unsigned version = cursor_le16(&c), n_packs = cursor_le16(&c);
    size_t n = cursor_le32(&c);
    if (version != VERSION || n_packs > FORWARD_PACKS_MAX || n > FORWARD_RUNS_MAX || !n ||
        len != HEAD + 8 * (size_t)n_packs + n * RUN + CHECK ||
        XXH3_64bits_withSeed(data, len - CHECK, pack) !=
            get_le64((const uint8_t *)data + len - CHECK))
        return damaged(pack, err);
    for (unsigned i = 0; i < n_packs; i++)
        packs[i] = cursor_le64(&c);
    struct forwarding f = {.pack = pack, .runs = calloc(n, sizeof(*f.runs)), .n = n};
    buffer_put(&f.value, data, len);
    int result = !f.runs || f.value.failed ? error_nomem(err)
                 : read_runs(&c, packs, n_packs, &f) ? 0 : damaged(pack, err);
    if (result < 0)
        forwarding_finish(&f);
    else
        *ret = f;
    return result;
}

static unsigned shard_of_pack(uint64_t pack)
{
    return shard_of(pack_name(pack));
}

int forwarding_get(struct store *s, uint64_t pack, struct forwarding *ret, struct vm_error **err)
{
    char key[SHARD_KEY_SIZE];
    cleanup_buffer struct buffer value = {0};
    if (shard_get(s, shard_of_pack(pack), shard_number_key(SHARD_FORWARDS, pack, key), &value,
                  err) < 0)
        return -1;
    if (value.len)
        return forwarding_read(pack, value.data, value.len, ret, err);
    *ret = (struct forwarding){.pack = pack};
    return 0;
}

bool forwarding_find(const struct forwarding *f, struct recipe_page *page)
{
    size_t low = 0, high = f->n;
    while (low < high) { /* the first run that begins behind the page */
        size_t middle = low + (high - low) / 2;
        const struct forward_run *r = &f->runs[middle];
        if (r->offset < page->offset || (r->offset == page->offset && r->first <= page->page))
            low = middle + 1;
        else
            high = middle;
    }
    if (!low)
        return false;
    const struct forward_run *r = &f->runs[low - 1];
    if (r->offset != page->offset || page->page >= r->first + r->n)
        return false;
    page->pack = r->to.pack;
    page->offset = r->to.offset;
    page->len = r->to.len;
    page->page = (uint8_t)(page->page - r->first + r->to.page);
    return true;
}

/* ---- changing ---- */

static int by_place(const void *a, const void *b)
{
    const struct forward_run *x = a, *y = b;
    if (x->offset != y->offset)
        return x->offset < y->offset ? -1 : 1;
    return (int)x->first - (int)y->first;
}

/* May the run stay beside those of `more`? */
static bool is_beside(const struct forward_run *run, const struct forward_run *more, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (more[i].offset == run->offset && more[i].first < run->first + run->n &&
            run->first < more[i].first + more[i].n)
            return false;
    return true;
}

int forwarding_merge(struct forwarding *f, const struct forward_run *more, size_t n,
                     struct vm_error **err)
{
    struct forward_run *runs = calloc(f->n + n + 1, sizeof(*runs));
    size_t kept = 0;
    if (!runs)
        return error_nomem(err);
    for (size_t i = 0; i < f->n; i++)
        if (is_beside(&f->runs[i], more, n))
            runs[kept++] = f->runs[i];
    memcpy(runs + kept, more, n * sizeof(*runs));
    qsort(runs, kept + n, sizeof(*runs), by_place);
    free(f->runs);
    f->runs = runs;
    f->n = kept + n;
    return 0;
}

/* ---- what may be relied upon ---- */

void pack_presence_forget(struct pack_presence *p)
{
    number_set_finish(&p->there);
    number_set_finish(&p->gone);
}

static int pack_is_there(struct pack_presence *p, uint64_t pack, bool *ret_there,
                         struct vm_error **err)
{
    *ret_there = number_set_has(&p->there, pack);
    if (*ret_there || number_set_has(&p->gone, pack))
        return 0;
    struct store_op size = {.kind = STORE_SIZE, .area = STORE_PACK, .name = pack_name(pack)};
    if (store_run(p->store, &size, 1, err) < 0)
        return -1;
    *ret_there = size.result == STORE_DONE;
    if (size.result == STORE_UNREADABLE) /* neither: nothing to rely on, and nothing to give up */
        return 0;
    return number_set_add(*ret_there ? &p->there : &p->gone, pack, err);
}

int pack_is_safe(struct pack_presence *p, const struct number_set *condemned, uint64_t pack,
                 bool *ret_safe, struct vm_error **err)
{
    *ret_safe = false;
    return number_set_has(condemned, pack) ? 0 : pack_is_there(p, pack, ret_safe, err);
}

int forwarding_drop_gone(struct forwarding *f, struct pack_presence *p, struct vm_error **err)
{
    size_t kept = 0;
    for (size_t i = 0; i < f->n; i++) {
        bool there;
        if (pack_is_there(p, f->runs[i].to.pack, &there, err) < 0)
            return -1;
        if (there || !number_set_has(&p->gone, f->runs[i].to.pack))
            f->runs[kept++] = f->runs[i];
    }
    f->n = kept;
    return 0;
}

static int targets_are_safe(struct store *s, const struct forwarding *f,
                            const struct object_set *condemned, bool *ret_safe,
                            struct vm_error **err)
{
    cleanup_pack_presence struct pack_presence p = {.store = s};
    *ret_safe = true;
    for (size_t i = 0; i < f->n && *ret_safe; i++)
        if (pack_is_safe(&p, &condemned->packs, f->runs[i].to.pack, ret_safe, err) < 0)
            return -1;
    return 0;
}

/* A guard that does not hold, and a fence, are answers. */
static int answer(struct vm_error *problem, struct vm_error **err)
{
    bool is_answer = problem->kind == VM_ERROR_CONFLICT || problem->kind == VM_ERROR_REFUSED;
    error_propagate(is_answer ? NULL : err, problem);
    return is_answer ? 0 : -1;
}

int forwarding_commit(struct store *s, const struct forwarding *f, bool *ret_set,
                      struct vm_error **err)
{
    cleanup_buffer struct buffer value = {0};
    cleanup_object_set struct object_set shared = {{0}, {0}};
    struct vm_error *problem = NULL;
    bool safe;
    *ret_set = false;
    if (forwarding_write(f, &value, &problem) < 0)
        return answer(problem, err); /* that it is too large is one */
    CLEANUP(registration)
    struct registration *r = catalogue_register_forward(s, f->pack, &f->value, &problem);
    if (!r)
        return answer(problem, err);
    /* What is condemned from here on, the commit rescues. */
    for (size_t i = 0; i < f->n; i++)
        if (number_set_add(&shared.packs, f->runs[i].to.pack, err) < 0)
            return -1;
    if (targets_are_safe(s, f, registration_condemned(r), &safe, err) < 0 || !safe)
        return safe ? -1 : 0;
    if (catalogue_commit_forward(r, &value, &shared, &problem) < 0)
        return answer(problem, err);
    *ret_set = true;
    return 0;
}

int forwarding_erase(struct store *s, const uint64_t *packs, size_t n, struct vm_error **err)
{
    char names[FORGET_BATCH][SHARD_NAME_SIZE], keys[FORGET_BATCH][SHARD_KEY_SIZE];
    const char *erases[FORGET_BATCH];
    struct store_op ops[FORGET_BATCH];
    for (size_t i = 0; i < n; i++) {
        erases[i] = shard_number_key(SHARD_FORWARDS, packs[i], keys[i]);
        ops[i] = (struct store_op){.kind = STORE_UPDATE, .area = STORE_MAP,
                                   .name = shard_name(shard_of_pack(packs[i]), names[i]),
                                   .erases = &erases[i], .n_erases = 1};
    }
    if (store_run(s, ops, n, err) < 0)
        return -1;
    for (size_t i = 0; i < n; i++)
        if (ops[i].result == STORE_MISSING)
            return shard_lost(names[i], err);
    return 0;
}

struct listing {
    forwarding_visit_fn *visit;
    void *arg;
};

static int list_one(unsigned shard, const struct store_pair *pair, void *arg, struct vm_error **err)
{
    struct listing *l = arg;
    cleanup_forwarding struct forwarding f = {0};
    uint64_t pack = shard_key_number(pair->key);
    if (!pack)
        return error_set(err, VM_ERROR_CORRUPT, "forwarding %.40s makes no sense", pair->key);
    if (forwarding_read(pack, pair->value, pair->len, &f, err) < 0)
        return -1;
    return l->visit(&f, l->arg, err);
}

int forwarding_list(struct store *s, forwarding_visit_fn *visit, void *arg, struct vm_error **err)
{
    struct listing l = {visit, arg};
    return shard_scan_all(s, SHARD_FORWARDS, list_one, &l, err);
}

/* ---- many at once ---- */

struct table {
    struct forwarding forwarding;
    uint64_t used_at; /* 0: free */
};

struct forwards {
    struct store *store;
    struct number_set known;
    struct table tables[FORWARDS_CACHED];
    uint64_t clock;
};

struct forwards *forwards_create(struct store *s, struct vm_error **err)
{
    struct forwards *f = calloc(1, sizeof(*f));
    if (!f) {
        error_nomem(err);
        return NULL;
    }
    f->store = s;
    return f;
}

void forwards_forget(struct forwards *f)
{
    for (unsigned i = 0; i < FORWARDS_CACHED; i++) {
        forwarding_finish(&f->tables[i].forwarding);
        f->tables[i].used_at = 0;
    }
}

void forwards_destroy(struct forwards *f)
{
    if (!f)
        return;
    forwards_forget(f);
    number_set_finish(&f->known);
    free(f);
}

static int know_one(unsigned shard, const struct store_pair *pair, void *arg, struct vm_error **err)
{
    struct forwards *f = arg;
    uint64_t pack = shard_key_number(pair->key);
    return pack ? number_set_add(&f->known, pack, err) : 0;
}

int forwards_scan(struct forwards *f, struct vm_error **err)
{
    forwards_forget(f);
    number_set_finish(&f->known);
    return shard_scan_all(f->store, SHARD_FORWARDS, know_one, f, err);
}

const struct number_set *forwards_known(const struct forwards *f)
{
    return &f->known;
}

static struct table *find_table(struct forwards *f, uint64_t pack)
{
    for (unsigned i = 0; i < FORWARDS_CACHED; i++)
        if (f->tables[i].used_at && f->tables[i].forwarding.pack == pack)
            return &f->tables[i];
    return NULL;
}

static struct table *load_table(struct forwards *f, uint64_t pack, struct vm_error **err)
{
    struct table *t = &f->tables[0];
    for (unsigned i = 1; i < FORWARDS_CACHED; i++)
        if (f->tables[i].used_at < t->used_at)
            t = &f->tables[i];
    forwarding_finish(&t->forwarding);
    t->used_at = 0;
    return forwarding_get(f->store, pack, &t->forwarding, err) < 0 ? NULL : t;
}

int forwards_find(struct forwards *f, struct recipe_page *page, bool *ret_found,
                  struct vm_error **err)
{
    struct table *t = find_table(f, page->pack);
    if (!t && !(t = load_table(f, page->pack, err)))
        return -1;
    t->used_at = ++f->clock;
    *ret_found = forwarding_find(&t->forwarding, page);
    return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
#include "repo/repack.h"
#include "repo/forwarding.h"
#include "repo/names.h"
#include "repo/pack_writer.h"
#include "repo/quarantine.h"

#include "base/fault.h"
#include "base/log.h"

#include <stdlib.h>

enum { READ_BATCH = 32, RECORD_ROOM = RECORD_MAX + RECORD_ALIGN };

/* What became of a record of the batch. */
struct moved {
    uint64_t pack;
    uint32_t offset;
    uint8_t n_pages;
    struct record_place to; /* footer NULL: it was forwarded before, or it cannot be read */
};

struct repacker {
    struct repo *repo;
    struct store *store;
    const struct number_set *packs;
    struct number_set sources;      /* packs whose forwardings name one of `packs` */
    struct alive_record *records;   /* all, by order of their packs' first, then by order */
    size_t n_records, next;         /* next: the first of the next batch */
    struct registration *registration;
    struct failure failure;
    struct workers *workers;
    struct footer_cache *cache;
    struct pack_writer *writer;
    struct page_hasher hasher;
    struct record_codec codec;
    struct quarantine quarantine;
    uint8_t *data;                  /* READ_BATCH records */
    /* of the batch */
    struct repack_batch *batch;
    struct footer footers[REPACK_BATCH];
    struct forwarding forwardings[REPACK_BATCH];
    bool keep[REPACK_BATCH]; /* something alive in it cannot be read */
    struct pack_presence presence; /* of the packs that forwardings name */
    struct moved *moved;
    size_t n_moved;
};

/* ---- the order of packs ---- */

/* Records by order, but all of a pack's batch together: packs by their first record. */
static int order_records(struct repacker *rp, const struct alive *alive, struct vm_error **err)
{
    struct alive_record *all;
    size_t n;
    if (alive_by_pack(alive, &all, &n, err) < 0)
        return -1;
    rp->records = all;
    for (size_t i = 0; i < n; i++)
        if (number_set_has(rp->packs, all[i].pack))
            rp->records[rp->n_records++] = all[i];
    alive_sort_by_order(rp->records, rp->n_records);
    return 0;
}

static size_t batch_index(const struct repack_batch *b, uint64_t pack)
{
    size_t i = 0;
    while (i < b->n && b->packs[i] != pack)
        i++;
    return i;
}

/*
 * The next packs by their first records; their records come to the front of what is left. The number
 * of these records.
 */
static size_t take_batch(struct repacker *rp, struct repack_batch *b)
{
    struct alive_record *left = rp->records + rp->next;
    size_t n = rp->n_records - rp->next, taken = 0;
    b->n = 0;
    for (size_t i = 0; i < n && b->n < REPACK_BATCH; i++)
        if (batch_index(b, left[i].pack) == b->n)
            b->packs[b->n++] = left[i].pack;
    for (size_t i = 0; i < n; i++) {
        if (batch_index(b, left[i].pack) == b->n)
            continue;
        struct alive_record r = left[i];
        left[i] = left[taken];
        left[taken++] = r;
    }
    alive_sort_by_order(left, taken);
    alive_sort_by_order(left + taken, n - taken);
    rp->next += taken;
    return taken;
}

/* ---- life ---- */

static int find_source(const struct forwarding *f, void *arg, struct vm_error **err)
{
    struct repacker *rp = arg;
    for (size_t i = 0; i < f->n; i++)
        if (number_set_has(rp->packs, f->runs[i].to.pack))
            return number_set_add(&rp->sources, f->pack, err);
    return 0;
}

static int open_writer(struct repacker *rp, int zstd_level, struct vm_error **err)
{
    /* No pack has number 0: this registration is for storing packs alone. */
    const struct buffer nothing = {0};
    rp->registration = catalogue_register_forward(rp->store, 0, &nothing, err);
    rp->workers = rp->registration ? workers_create(0, RECORD_ZSTD, zstd_level, err) : NULL;
    rp->cache = rp->workers ? footer_cache_create(rp->store, 0, err) : NULL;
    if (!rp->cache)
        return -1;
    struct pack_writer_setup setup = {.store = rp->store, .index = repo_index(rp->repo),
                                      .cache = rp->cache, .workers = rp->workers,
                                      .failure = &rp->failure, .repository = *repo_uuid(rp->repo),
                                      .writer = registration_number(rp->registration)};
    rp->writer = pack_writer_create(&setup, err);
    return rp->writer ? 0 : -1;
}

struct repacker *repacker_create(struct repo *r, const struct collect_options *options,
                                 const struct alive *alive, const struct number_set *packs,
                                 struct vm_error **err)
{
    struct repacker *rp = calloc(1, sizeof(*rp));
    if (!rp) {
        error_nomem(err);
        return NULL;
    }
    int level = options->zstd_level ? options->zstd_level : COLLECT_ZSTD_LEVEL;
    rp->repo = r;
    rp->store = repo_store(r);
    rp->presence.store = rp->store;
    rp->packs = packs;
    failure_init(&rp->failure);
    if (!(rp->data = malloc((size_t)READ_BATCH * RECORD_ROOM)))
        error_nomem(err);
    if (!rp->data || page_hasher_init(&rp->hasher, err) < 0 ||
        record_codec_init(&rp->codec, RECORD_LZ4, 0, err) < 0 ||
        quarantine_load(rp->store, &rp->quarantine, err) < 0 ||
        order_records(rp, alive, err) < 0 ||
        forwarding_list(rp->store, find_source, rp, err) < 0 || open_writer(rp, level, err) < 0) {
        repacker_destroy(rp);
        return NULL;
    }
    return rp;
}

static void end_batch(struct repacker *rp)
{
    for (size_t i = 0; i < rp->n_moved; i++)
        if (rp->moved[i].to.footer)
            footer_cache_unpin(rp->moved[i].to.footer);
    free(rp->moved);
    rp->moved = NULL;
    rp->n_moved = 0;
    pack_presence_forget(&rp->presence);
    for (size_t i = 0; i < REPACK_BATCH; i++) {
        footer_finish(&rp->footers[i]);
        forwarding_finish(&rp->forwardings[i]);
    }
}

void repacker_destroy(struct repacker *rp)
{
    if (!rp)
        return;
    pack_writer_destroy(rp->writer);
    end_batch(rp);
    footer_cache_destroy(rp->cache);
    workers_destroy(rp->workers);
    catalogue_unregister(rp->registration);
    page_hasher_finish(&rp->hasher);
    record_codec_finish(&rp->codec);
    quarantine_finish(&rp->quarantine);
    number_set_finish(&rp->sources);
    failure_finish(&rp->failure);
    free(rp->records);
    free(rp->data);
    free(rp);
}

uint64_t repacker_bytes(const struct repacker *rp)
{
    struct pack_writer_stat stat;
    pack_writer_stat(rp->writer, &stat);
    return stat.bytes;
}

/* A pack's forwarding, as far as it leads somewhere. */
static int get_forwarding(struct repacker *rp, uint64_t pack, struct forwarding *ret,
                          struct vm_error **err)
{
    return forwarding_get(rp->store, pack, ret, err) < 0
               ? -1
               : forwarding_drop_gone(ret, &rp->presence, err);
}

/* ---- moving records ---- */

/* Are its pages those that the footer names, if there is a footer? */
static bool agrees(const struct footer *f, uint32_t offset, const struct page_id *ids, unsigned n)
{
    const struct footer_record *r = footer_record_at(f, offset);
    if (!f->n_records)
        return true;
    return r && r->n_pages == n && !memcmp(&f->ids[r->first_page], ids, n * sizeof(*ids));
}

/*
 * Are all its pages forwarded already, to packs that stay and to what is not known to be damaged?
 * Then it does not matter what is here. What is condemned may be about to go, though the forwarding
 * names it. Without a footer nobody knows how many pages there are.
 */
static int is_forwarded(struct repacker *rp, size_t in_batch, uint32_t offset, bool *ret_is,
                        struct vm_error **err)
{
    const struct footer_record *r = footer_record_at(&rp->footers[in_batch], offset);
    const struct number_set *condemned = &registration_condemned(rp->registration)->packs;
    *ret_is = r != NULL;
    for (uint8_t i = 0; *ret_is && i < r->n_pages; i++) {
        struct recipe_page p = {.offset = offset, .page = i};
        *ret_is = forwarding_find(&rp->forwardings[in_batch], &p) &&
                  !quarantine_has(&rp->quarantine, p.pack, p.offset);
        if (*ret_is && pack_is_safe(&rp->presence, condemned, p.pack, ret_is, err) < 0)
            return -1;
    }
    return 0;
}

static int emit_record(struct repacker *rp, struct moved *m, uint8_t *pages,
                       const struct page_id *ids, uint16_t mask, struct vm_error **err)
{
    struct page_id extent;
    if (mask && page_hasher_extent(&rp->hasher, ids, mask, &extent, err) < 0) {
        pack_writer_return_memory(rp->writer, pages);
        return -1;
    }
    if (pack_writer_emit(rp->writer, pages, ids, m->n_pages, mask, mask ? &extent : NULL, &m->to,
                         err) < 0)
        return -1;
    footer_cache_pin(m->to.footer);
    return 0;
}

/* The record's pages and their identities, checked. *ret_n 0: it is damaged. */
static int read_record(struct repacker *rp, const struct alive_record *r, const struct store_op *op,
                       uint8_t *pages, struct page_id *ids, unsigned *ret_n, struct vm_error **err)
{
    cleanup_error struct vm_error *problem = NULL;
    const struct footer *footer = &rp->footers[batch_index(rp->batch, r->pack)];
    unsigned n = 0;
    *ret_n = 0;
    if (op->result != STORE_DONE || quarantine_has_record(&rp->quarantine, r->pack, r->offset) ||
        record_decode(&rp->codec, op->out, op->ret_len, r->pack, r->offset, pages, &n, &problem) < 0)
        return 0;
    if (page_hasher_pages(&rp->hasher, pages, n, ids, err) < 0)
        return -1;
    *ret_n = agrees(footer, r->offset, ids, n) ? n : 0;
    return 0;
}

static int move_record(struct repacker *rp, const struct alive_record *r, const struct store_op *op,
                       struct vm_error **err)
{
    struct moved *m = &rp->moved[rp->n_moved++];
    *m = (struct moved){.pack = r->pack, .offset = r->offset};
    size_t in_batch = batch_index(rp->batch, r->pack);
    struct page_id ids[RECORD_PAGES_MAX];
    unsigned n = 0;
    bool forwarded;
    if (is_forwarded(rp, in_batch, r->offset, &forwarded, err) < 0)
        return -1;
    if (forwarded)
        return 0;
    uint8_t *pages = pack_writer_page_memory(rp->writer, err);
    if (!pages)
        return -1;
    int result = read_record(rp, r, op, pages, ids, &n, err);
    m->n_pages = (uint8_t)n;
    if (n)
        return emit_record(rp, m, pages, ids, get_le16((const uint8_t *)op->out + 14), err);
    pack_writer_return_memory(rp->writer, pages);
    if (result < 0)
        return -1;
    rp->keep[in_batch] = true;
    log_warn("a pack with a damaged record stays", "pack=%016" PRIx64 " offset=%u", r->pack,
             r->offset);
    return 0;
}

static int move_records(struct repacker *rp, const struct alive_record *records, size_t n,
                        struct vm_error **err)
{
    struct store_op ops[READ_BATCH];
    char names[READ_BATCH][OBJECT_NAME_SIZE];
    for (size_t i = 0; i < n; i++)
        ops[i] = (struct store_op){.kind = STORE_READ, .area = STORE_PACK,
                                   .name = object_name(PACK_PREFIX, records[i].pack, names[i]),
                                   .offset = records[i].offset, .len = records[i].len,
                                   .out = rp->data + i * RECORD_ROOM};
    for (size_t i = 0; i < n; i++)
        if (records[i].len > RECORD_ROOM)
            ops[i].len = RECORD_ROOM;
    if (store_run(rp->store, ops, n, err) < 0)
        return -1;
    for (size_t i = 0; i < n; i++)
        if (move_record(rp, &records[i], &ops[i], err) < 0)
            return -1;
    return 0;
}

/* ---- forwardings ---- */

static int by_old_place(const void *a, const void *b)
{
    const struct moved *x = a, *y = b;
    if (x->pack != y->pack)
        return x->pack < y->pack ? -1 : 1;
    return x->offset < y->offset ? -1 : x->offset > y->offset;
}

static struct recipe_page new_place(const struct moved *m, uint8_t page)
{
    const struct footer_record *r = &m->to.footer->footer.records[m->to.record];
    return (struct recipe_page){.pack = m->to.footer->footer.pack, .offset = r->offset,
                                .len = record_room(r->len),
                                .page = page};
}

/* Where a run that leads into the batch leads from now on. False: some of it cannot be told. */
static bool follow_run(const struct repacker *rp, size_t in_batch, struct forward_run *run,
                       bool *ret_needed)
{
    struct moved key = {.pack = run->to.pack, .offset = run->to.offset};
    const struct moved *m = bsearch(&key, rp->moved, rp->n_moved, sizeof(key), by_old_place);
    *ret_needed = m != NULL;
    if (!m || m->to.footer) {
        run->to = m ? new_place(m, run->to.page) : run->to;
        return true;
    }
    struct recipe_page first = run->to;
    for (uint8_t i = 0; i < run->n; i++) {
        struct recipe_page p = {.offset = run->to.offset, .page = (uint8_t)(run->to.page + i)};
        if (!forwarding_find(&rp->forwardings[in_batch], &p))
            return false;
        first = i ? first : p;
        if (p.pack != first.pack || p.offset != first.offset || p.page != first.page + i)
            return false;
    }
    run->to = first;
    return true;
}

/* A forwarding that names packs of the batch, with the new places instead. */
static int retarget(struct repacker *rp, uint64_t source, struct vm_error **err)
{
    cleanup_forwarding struct forwarding f = {0};
    size_t kept = 0;
    bool changed = false, set = true, needed;
    if (get_forwarding(rp, source, &f, err) < 0)
        return -1;
    for (size_t i = 0; i < f.n; i++) {
        struct forward_run run = f.runs[i];
        size_t in_batch = batch_index(rp->batch, run.to.pack);
        if (in_batch < rp->batch->n) {
            if (!follow_run(rp, in_batch, &run, &needed))
                rp->keep[in_batch] = true;
            changed = true;
            if (!needed)
                continue;
        }
        f.runs[kept++] = run;
    }
    f.n = kept;
    if (changed && kept && forwarding_commit(rp->store, &f, &set, err) < 0)
        return -1;
    for (size_t i = 0; !set && i < rp->batch->n; i++)
        rp->keep[i] = true;
    return 0;
}

static int retarget_all(struct repacker *rp, struct vm_error **err)
{
    size_t at = 0;
    for (uint64_t source; (source = number_set_next(&rp->sources, &at));)
        if (retarget(rp, source, err) < 0)
            return -1;
    return 0;
}

/* The forwarding of one pack of the batch, whose records in rp->moved these are. */
static int forward_pack(struct repacker *rp, size_t in_batch, const struct moved *moved, size_t n,
                        struct vm_error **err)
{
    cleanup_forwarding struct forwarding f = {0};
    size_t n_runs = 0;
    bool set = true;
    cleanup_free struct forward_run *runs = calloc(n + 1, sizeof(*runs));
    if (!runs)
        return error_nomem(err);
    for (size_t i = 0; i < n; i++)
        if (moved[i].to.footer)
            runs[n_runs++] = (struct forward_run){moved[i].offset, 0, moved[i].n_pages,
                                                  new_place(&moved[i], 0)};
    if (get_forwarding(rp, rp->batch->packs[in_batch], &f, err) < 0 ||
        forwarding_merge(&f, runs, n_runs, err) < 0)
        return -1;
    if (f.n > FORWARD_RUNS_MAX)
        set = false;
    else if (n_runs && forwarding_commit(rp->store, &f, &set, err) < 0)
        return -1;
    rp->batch->moved[in_batch] = set && !rp->keep[in_batch];
    return 0;
}

static int forward_all(struct repacker *rp, struct vm_error **err)
{
    qsort(rp->moved, rp->n_moved, sizeof(*rp->moved), by_old_place);
    if (retarget_all(rp, err) < 0)
        return -1;
    for (size_t i = 0; i < rp->n_moved;) {
        size_t n = 1;
        while (i + n < rp->n_moved && rp->moved[i + n].pack == rp->moved[i].pack)
            n++;
        if (forward_pack(rp, batch_index(rp->batch, rp->moved[i].pack), &rp->moved[i], n, err) < 0)
            return -1;
        (void)FAULT("repo.repack-forwarded");
        i += n;
    }
    return 0;
}

/* ---- a batch ---- */

static int prepare_batch(struct repacker *rp, size_t n_records, struct vm_error **err)
{
    struct vm_error *problems[REPACK_BATCH];
    struct repack_batch *b = rp->batch;
    bool changed;
    const struct object_set nothing = {{0}, {0}};
    /* Other collections hear of it, and know that it lives. */
    if (registration_checkpoint(rp->registration, &nothing, &changed, err) < 0)
        return -1;
    rp->moved = calloc(n_records + 1, sizeof(*rp->moved));
    if (!rp->moved)
        return error_nomem(err);
    if (footer_read_many(rp->store, b->packs, b->n, rp->footers, problems, err) < 0)
        return -1;
    for (size_t i = 0; i < b->n; i++) {
        error_free(problems[i]);
        b->moved[i] = rp->keep[i] = false;
    }
    for (size_t i = 0; i < b->n; i++)
        if (get_forwarding(rp, b->packs[i], &rp->forwardings[i], err) < 0)
            return -1;
    return 0;
}

static int repack_batch(struct repacker *rp, const struct alive_record *records, size_t n,
                        struct vm_error **err)
{
    if (prepare_batch(rp, n, err) < 0)
        return -1;
    for (size_t i = 0; i < n; i += READ_BATCH)
        if (move_records(rp, records + i, n - i < READ_BATCH ? n - i : READ_BATCH, err) < 0)
            return -1;
    if (pack_writer_finish(rp->writer, err) < 0)
        return -1;
    (void)FAULT("repo.repack-stored");
    return forward_all(rp, err);
}

int repacker_next(struct repacker *rp, struct repack_batch *ret, struct vm_error **err)
{
    size_t first = rp->next, n = take_batch(rp, ret);
    rp->batch = ret;
    int result = n ? repack_batch(rp, rp->records + first, n, err) : 0;
    end_batch(rp);
    return result < 0 ? -1 : n > 0;
}

/* ---- choosing ---- */

struct choice {
    const struct collect_options *options;
    const struct quarantine *quarantine;
    struct number_set *chosen;
    bool more;
};

/* A pack of which `alive` bytes of records are alive. */
static int judge(struct choice *c, const struct footer *f, uint64_t pack, uint64_t alive,
                 struct vm_error **err)
{
    unsigned dead_percent = c->options->dead_percent ? c->options->dead_percent
                                                     : COLLECT_DEAD_PERCENT;
    const struct quarantined *items;
    uint64_t total = 0, lz4 = 0;
    for (uint32_t i = 0; i < f->n_records; i++) {
        uint64_t len = record_room(f->records[i].len);
        total += len;
        lz4 += f->records[i].compression == RECORD_LZ4 ? len : 0;
    }
    uint64_t dead = total > alive ? total - alive : 0;
    bool worth = quarantine_of(c->quarantine, pack, &items) > 0 ||
                 (total && dead * 100 >= total * dead_percent) ||
                 (c->options->recompress && lz4 * 10 >= total && lz4);
    if (!worth)
        return 0;
    if (c->chosen->n >= REPACK_PACKS_MAX) {
        c->more = true;
        return 0;
    }
    return number_set_add(c->chosen, pack, err);
}

static int judge_many(struct choice *c, struct store *s, const uint64_t *packs,
                      const uint64_t *alive, size_t n, struct vm_error **err)
{
    struct footer footers[REPACK_BATCH];
    struct vm_error *problems[REPACK_BATCH];
    if (footer_read_many(s, packs, n, footers, problems, err) < 0)
        return -1;
    int result = 0;
    for (size_t i = 0; i < n; i++) {
        if (!result)
            result = judge(c, &footers[i], packs[i], alive[i], err);
        error_free(problems[i]);
        footer_finish(&footers[i]);
    }
    return result;
}

int repack_choose(struct repo *r, const struct collect_options *options, const struct alive *alive,
                  const struct number_set *exempt, struct number_set *ret, bool *ret_more,
                  struct vm_error **err)
{
    cleanup_quarantine struct quarantine q = {0};
    cleanup_free struct alive_record *records = NULL;
    struct choice c = {options, &q, ret, alive->sample_bits > 0};
    uint64_t packs[REPACK_BATCH], bytes[REPACK_BATCH];
    size_t n_records, n = 0;
    if (quarantine_load(repo_store(r), &q, err) < 0 ||
        alive_by_pack(alive, &records, &n_records, err) < 0)
        return -1;
    for (size_t i = 0; i < n_records;) {
        packs[n] = records[i].pack;
        bytes[n] = 0;
        for (; i < n_records && records[i].pack == packs[n]; i++)
            bytes[n] += records[i].len;
        n += !number_set_has(exempt, number_writer(packs[n]));
        if (n < REPACK_BATCH && i < n_records)
            continue;
        if (judge_many(&c, repo_store(r), packs, bytes, n, err) < 0)
            return -1;
        n = 0;
    }
    *ret_more = c.more;
    return 0;
}

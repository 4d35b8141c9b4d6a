/* SPDX-License-Identifier: Apache-2.0 */
#include "repo/image_writer.h"
#include "repo/leaf_builder.h"

#include "base/cond.h"
#include "base/queue.h"

#include <stdlib.h>

enum { IDLE_MS = 500 };

struct image_file {
    struct image_file *next;
    struct image_writer *writer;
    struct file_tree *tree;
    struct recipe_ref root;
};

/* The record that new pages of broken extents fill, while it is being filled. */
struct filling {
    struct mixed_record *record;
    uint8_t *pages;
    struct page_id ids[RECORD_PAGES_MAX];
    unsigned n;
};

struct image_writer {
    struct image_writer_setup setup;
    struct failure failure;
    struct workers *workers;
    struct footer_cache *cache;
    struct quarantine quarantine; /* as it was when the writer began */
    struct pack_writer *packs;
    struct tree_writer *trees;
    struct dedup *dedup;
    struct leaf_builder *leaves;
    struct filling filling;
    struct object_set shared;
    struct image_file *files;
    struct queue *ordered; /* segments, to the sequencer */
    pthread_t sequencer;
    bool sequencing;

    pthread_mutex_t lock; /* what follows */
    pthread_cond_t freed;  /* a segment was given back, or all ends */
    pthread_cond_t hashed; /* a segment was hashed */
    struct segment *free_segments[SEGMENTS_MAX];
    unsigned n_free, n_segments;
    struct image_writer_stat stat;
};

/* What the writer keeps with each segment. */
struct slot {
    struct segment segment;
    struct image_writer *writer;
    struct leaf_part part;
    bool hashed;
    segment_read_fn *read; /* NULL: the data is there */
    void *read_arg;
};

static struct slot *slot_of(struct segment *s)
{
    return (struct slot *)s;
}

static void fail_with(struct image_writer *w, struct vm_error *error)
{
    failure_set(&w->failure, error);
    SCOPE_LOCK(&w->lock);
    pthread_cond_broadcast(&w->freed);
}

/* ---- segments ---- */

static struct segment *new_segment(struct image_writer *w, struct vm_error **err)
{
    struct slot *slot = calloc(1, sizeof(*slot));
    void *data = slot ? aligned_alloc(PAGE_BYTES, SEGMENT_BYTES) : NULL;
    if (!data) {
        free(slot);
        error_nomem(err);
        return NULL;
    }
    slot->segment.data = data;
    slot->writer = w;
    w->n_segments++;
    return &slot->segment;
}

struct segment *image_writer_segment(struct image_writer *w, struct image_file *file,
                                     uint64_t number, struct vm_error **err)
{
    SCOPE_LOCK(&w->lock);
    while (!w->n_free && w->n_segments == SEGMENTS_MAX && !failure_is_set(&w->failure))
        pthread_cond_wait(&w->freed, &w->lock);
    if (failure_report(&w->failure, err) < 0)
        return NULL;
    struct segment *s = w->n_free ? w->free_segments[--w->n_free] : new_segment(w, err);
    if (!s)
        return NULL;
    s->file = file;
    s->number = number;
    s->before = NULL;
    memset(s->given, 0, sizeof(s->given));
    slot_of(s)->hashed = false;
    slot_of(s)->read = NULL;
    return s;
}

static void give_back(struct image_writer *w, struct segment *s)
{
    SCOPE_LOCK(&w->lock);
    w->free_segments[w->n_free++] = s;
    pthread_cond_broadcast(&w->freed);
}

static void hash_job(struct worker *worker, struct job *job)
{
    struct segment *s = (struct segment *)job;
    struct image_writer *w = slot_of(s)->writer;
    struct vm_error *error = NULL;
    if (slot_of(s)->read)
        segment_find_extents(s);
    else if (segment_hash(s, &worker->hasher, &error) < 0)
        failure_set(&w->failure, error);
    SCOPE_LOCK(&w->lock);
    slot_of(s)->hashed = true;
    pthread_cond_broadcast(&w->hashed);
}

void image_writer_put(struct image_writer *w, struct segment *s)
{
    workers_submit(w->workers, &s->job, hash_job);
    queue_put(w->ordered, s);
}

void image_writer_put_known(struct image_writer *w, struct segment *s, segment_read_fn *read,
                            void *arg)
{
    slot_of(s)->read = read;
    slot_of(s)->read_arg = arg;
    image_writer_put(w, s);
}

/* The data of new pages, if it was left where it is so far. */
static int read_new(struct segment *s, struct vm_error **err)
{
    const struct slot *slot = slot_of(s);
    bool wanted[SEGMENT_PAGES], any = false;
    for (unsigned i = 0; i < SEGMENT_PAGES; i++) {
        wanted[i] = s->state[i] == PAGE_UNKNOWN || s->state[i] == PAGE_AGAIN;
        any |= wanted[i];
    }
    return any && slot->read ? slot->read(s, wanted, slot->read_arg, err) : 0;
}

static int wait_hashed(struct image_writer *w, struct segment *s, struct vm_error **err)
{
    SCOPE_LOCK(&w->lock);
    while (!slot_of(s)->hashed)
        pthread_cond_wait(&w->hashed, &w->lock);
    return failure_report(&w->failure, err);
}

/* ---- placing ---- */

static int emit_filling(struct image_writer *w, struct vm_error **err)
{
    struct filling *f = &w->filling;
    if (!f->record)
        return 0;
    struct mixed_record *m = f->record;
    uint8_t *pages = f->pages;
    f->record = NULL;
    f->pages = NULL;
    int result = pack_writer_emit(w->packs, pages, f->ids, f->n, 0, NULL, &m->place, err);
    if (!result) {
        m->emitted = true;
        footer_cache_pin(m->place.footer);
    }
    mixed_record_unref(m);
    return result;
}

static int begin_filling(struct image_writer *w, struct vm_error **err)
{
    struct filling *f = &w->filling;
    f->pages = pack_writer_page_memory(w->packs, err);
    if (!f->pages)
        return -1;
    f->record = calloc(1, sizeof(*f->record));
    if (!f->record) {
        pack_writer_return_memory(w->packs, f->pages);
        f->pages = NULL;
        return error_nomem(err);
    }
    f->record->refs = 1;
    f->n = 0;
    return 0;
}

static int place_known(struct image_writer *w, struct segment *s, unsigned i, struct vm_error **err)
{
    const struct footer_hit *hit = &s->hits[i];
    if (!hit->footer->own &&
        number_set_add(&w->shared.packs, hit->footer->footer.pack, err) < 0)
        return -1;
    struct record_place place = {hit->footer,
                                 footer_record_of(&hit->footer->footer, hit->page)};
    unsigned first = hit->footer->footer.records[place.record].first_page;
    leaf_builder_place(&slot_of(s)->part, i, &s->ids[i], &place, hit->page - first);
    return 0;
}

/* A new page goes into the record being filled, unless it is in there already. */
static int place_mixed(struct image_writer *w, struct segment *s, unsigned i, struct vm_error **err)
{
    struct filling *f = &w->filling;
    unsigned at = 0;
    while (f->record && at < f->n && !page_id_equal(&f->ids[at], &s->ids[i]))
        at++;
    if (!f->record && begin_filling(w, err) < 0)
        return -1;
    if (at == f->n) {
        memcpy(f->pages + (size_t)at * PAGE_BYTES, s->data + (size_t)i * PAGE_BYTES, PAGE_BYTES);
        f->ids[f->n++] = s->ids[i];
    }
    leaf_builder_place_mixed(&slot_of(s)->part, i, &s->ids[i], f->record, at);
    return f->n == RECORD_PAGES_MAX ? emit_filling(w, err) : 0;
}

static int place_whole(struct image_writer *w, struct segment *s, unsigned extent,
                       struct vm_error **err)
{
    struct page_id ids[EXTENT_PAGES];
    struct record_place place;
    unsigned n = 0, first = extent * EXTENT_PAGES;
    /* What was gathered so far belongs into the pack of its neighbours: whoever finds them finds it. */
    if (w->filling.record && pack_writer_is_last(w->packs) && emit_filling(w, err) < 0)
        return -1;
    const struct page_id *id = dedup_extent_id(w->dedup, s, extent, err);
    uint8_t *pages = id ? pack_writer_page_memory(w->packs, err) : NULL;
    if (!pages)
        return -1;
    for (unsigned i = first; i < first + EXTENT_PAGES; i++) {
        if (s->state[i] == PAGE_ZEROS)
            continue;
        memcpy(pages + (size_t)n * PAGE_BYTES, s->data + (size_t)i * PAGE_BYTES, PAGE_BYTES);
        ids[n++] = s->ids[i];
    }
    if (pack_writer_emit(w->packs, pages, ids, n, s->mask[extent], id, &place, err) < 0)
        return -1;
    n = 0;
    for (unsigned i = first; i < first + EXTENT_PAGES; i++) {
        if (s->state[i] == PAGE_ZEROS)
            leaf_builder_place_zero(&slot_of(s)->part, i);
        else
            leaf_builder_place(&slot_of(s)->part, i, &s->ids[i], &place, n++);
    }
    return 0;
}

static int place_extent(struct image_writer *w, struct segment *s, unsigned extent,
                        struct vm_error **err)
{
    unsigned first = extent * EXTENT_PAGES;
    for (unsigned i = first; i < first + EXTENT_PAGES; i++)
        dedup_find_again(w->dedup, s, i);
    if (segment_extent_is_whole(s, extent))
        return place_whole(w, s, extent, err);
    for (unsigned i = first; i < first + EXTENT_PAGES; i++) {
        int done = 0;
        if (s->state[i] == PAGE_ZEROS)
            leaf_builder_place_zero(&slot_of(s)->part, i);
        else if (s->state[i] == PAGE_KNOWN)
            done = place_known(w, s, i, err);
        else if (s->state[i] != PAGE_ABSENT)
            done = place_mixed(w, s, i, err);
        if (done < 0)
            return -1;
    }
    return 0;
}

static void count_segment(struct image_writer *w, const struct segment *s)
{
    uint64_t n[PAGE_AGAIN + 1] = {0};
    for (unsigned i = 0; i < SEGMENT_PAGES; i++)
        n[s->state[i]]++;
    struct pack_writer_stat packs;
    pack_writer_stat(w->packs, &packs);
    struct tree_writer_stat trees = tree_writer_stat(w->trees);
    struct dedup_stat dedup = dedup_stat(w->dedup);
    SCOPE_LOCK(&w->lock);
    w->stat.pages_zero += n[PAGE_ZEROS];
    w->stat.pages_shared += n[PAGE_KNOWN];
    w->stat.pages_new += n[PAGE_UNKNOWN] + n[PAGE_AGAIN];
    w->stat.pages_again += n[PAGE_AGAIN];
    w->stat.packs = packs.packs;
    w->stat.bytes_stored = packs.bytes + trees.bytes;
    w->stat.footers_loaded = footer_cache_loads(w->cache);
    w->stat.index_lookups = dedup.lookups;
    w->stat.index_hits = dedup.index_hits;
    w->stat.nodes = trees.nodes;
    w->stat.nodes_shared = trees.shared;
}

/* ---- the sequencer ---- */

static int open_parts(struct image_writer *w, struct segment **batch, size_t n,
                      struct vm_error **err)
{
    for (size_t i = 0; i < n; i++) {
        if (wait_hashed(w, batch[i], err) < 0 ||
            leaf_builder_open(w->leaves, batch[i]->file->tree, batch[i]->number,
                              &slot_of(batch[i])->part, err) < 0)
            return -1;
        batch[i]->before = slot_of(batch[i])->part.before;
    }
    return 0;
}

static int checkpoint(struct image_writer *w, struct vm_error **err)
{
    bool changed = false;
    if (w->setup.checkpoint &&
        w->setup.checkpoint(w->setup.checkpoint_arg, &w->shared, &changed, err) < 0)
        return -1;
    if (changed)
        footer_cache_forbid(w->cache, &w->setup.condemned->packs);
    return 0;
}

/* Segments are given back, and leave the batch, as soon as they are placed: others are read meanwhile. */
static int sequence_batch(struct image_writer *w, struct segment **batch, size_t n,
                          struct vm_error **err)
{
    footer_cache_trim(w->cache);
    if (checkpoint(w, err) < 0 || open_parts(w, batch, n, err) < 0 ||
        dedup_find(w->dedup, batch, n, err) < 0)
        return -1;
    for (size_t i = 0; i < n; i++) {
        dedup_settle(w->dedup, batch[i]);
        if (read_new(batch[i], err) < 0)
            return -1;
        for (unsigned e = 0; e < SEGMENT_EXTENTS; e++)
            if (place_extent(w, batch[i], e, err) < 0)
                return -1;
        count_segment(w, batch[i]);
        give_back(w, batch[i]);
        batch[i] = NULL;
    }
    return leaf_builder_advance(w->leaves, err);
}

/* Wait a while for one segment, take what else is there. False at the end. */
static bool next_batch(struct image_writer *w, struct segment *batch[DEDUP_BATCH], size_t *ret_n)
{
    bool ended = false;
    size_t n = 0;
    batch[0] = queue_get_until(w->ordered, clock_mono_ns() + IDLE_MS * NSEC_PER_MSEC, &ended);
    n += batch[0] != NULL;
    while (n && n < DEDUP_BATCH && queue_length(w->ordered)) {
        batch[n] = queue_get(w->ordered);
        n += batch[n] != NULL;
    }
    *ret_n = n;
    return n || !ended;
}

/* Without work, too, collections are answered. */
static void *sequence(void *arg)
{
    struct image_writer *w = arg;
    struct segment *batch[DEDUP_BATCH + 1];
    size_t n;
    while (next_batch(w, batch, &n)) {
        struct vm_error *error = NULL;
        if (!failure_is_set(&w->failure) && sequence_batch(w, batch, n, &error) < 0)
            fail_with(w, error);
        for (size_t i = 0; i < n; i++) {
            if (!batch[i])
                continue;
            wait_hashed(w, batch[i], NULL);
            give_back(w, batch[i]);
        }
    }
    return NULL;
}

static void end_sequencer(struct image_writer *w)
{
    if (!w->sequencing)
        return;
    queue_close(w->ordered);
    pthread_join(w->sequencer, NULL);
    w->sequencing = false;
}

/*
 * The last packs are stored while the trees are: nobody sees either before the commit, and who finds
 * a node of these trees in the index has found its pages first, in packs that are there.
 */
static int finish_files(struct image_writer *w, struct vm_error **err)
{
    if (failure_report(&w->failure, err) < 0 || emit_filling(w, err) < 0)
        return -1;
    pack_writer_close(w->packs);
    if (leaf_builder_finish(w->leaves, err) < 0)
        return -1;
    for (struct image_file *f = w->files; f; f = f->next)
        if (file_tree_finish(f->tree, w->trees, &f->root, err) < 0)
            return -1;
    return tree_writer_finish(w->trees, err) < 0 ? -1 : pack_writer_finish(w->packs, err);
}

int image_writer_finish(struct image_writer *w, struct vm_error **err)
{
    end_sequencer(w);
    if (finish_files(w, err) < 0)
        return -1;
    struct segment nothing = {.number = 0};
    memset(nothing.state, 0,
           sizeof(nothing.state)); /* all PAGE_ABSENT: brings the totals up to date */
    count_segment(w, &nothing);
    return 0;
}

/* ---- files ---- */

struct image_file *image_writer_add_file(struct image_writer *w, uint64_t size,
                                         const struct recipe_ref *base, uint64_t base_size,
                                         struct vm_error **err)
{
    cleanup_free struct image_file *f = calloc(1, sizeof(*f));
    if (!f) {
        error_nomem(err);
        return NULL;
    }
    f->writer = w;
    f->tree = file_tree_create(w->setup.store, size, base, base_size, err);
    if (!f->tree)
        return NULL;
    f->next = w->files;
    w->files = f;
    return steal_ptr(&f);
}

struct recipe_ref image_writer_root(const struct image_file *file)
{
    return file->root;
}

const struct object_set *image_writer_shared(const struct image_writer *w)
{
    return &w->shared;
}

void image_writer_stat(struct image_writer *w, struct image_writer_stat *ret_stat)
{
    SCOPE_LOCK(&w->lock);
    *ret_stat = w->stat;
}

/* ---- life ---- */

static int create_parts(struct image_writer *w, struct vm_error **err)
{
    const struct image_writer_setup *s = &w->setup;
    w->workers = workers_create(0, s->compression, s->zstd_level, err);
    w->cache = w->workers ? footer_cache_create(s->store, s->cache_bytes, err) : NULL;
    if (!w->cache)
        return -1;
    footer_cache_forbid(w->cache, &s->condemned->packs);
    if (quarantine_load(s->store, &w->quarantine, err) < 0)
        return -1;
    footer_cache_avoid(w->cache, &w->quarantine);
    struct pack_writer_setup packs = {s->store,    s->index,      w->cache, w->workers,
                                      &w->failure, s->repository, s->writer};
    if (!(w->packs = pack_writer_create(&packs, err)) ||
        !(w->trees = tree_writer_create(s->store, s->index, &s->repository, s->writer,
                                        &s->condemned->trees, &w->shared.trees, err)) ||
        !(w->dedup = dedup_create(s->index, w->cache,
                                  s->records_max ? s->records_max : DEDUP_RECORDS_MAX, err)) ||
        !(w->leaves = leaf_builder_create(w->packs, w->trees, err)) ||
        !(w->ordered = queue_create(SEGMENTS_MAX, NULL, err)))
        return -1;
    int rc = pthread_create(&w->sequencer, NULL, sequence, w);
    if (rc)
        return error_errno(err, rc, "cannot start a thread");
    w->sequencing = true;
    return 0;
}

struct image_writer *image_writer_create(const struct image_writer_setup *setup,
                                         struct vm_error **err)
{
    struct image_writer *w = calloc(1, sizeof(*w));
    if (!w) {
        error_nomem(err);
        return NULL;
    }
    w->setup = *setup;
    failure_init(&w->failure);
    pthread_mutex_init(&w->lock, NULL);
    cond_init(&w->freed);
    cond_init(&w->hashed);
    if (create_parts(w, err) < 0) {
        image_writer_destroy(w);
        return NULL;
    }
    return w;
}

static void free_segments(struct image_writer *w)
{
    for (unsigned i = 0; i < w->n_free; i++) {
        free(w->free_segments[i]->data);
        free(slot_of(w->free_segments[i]));
    }
}

void image_writer_destroy(struct image_writer *w)
{
    if (!w)
        return;
    if (w->sequencing) {
        struct vm_error *error = NULL;
        error_set(&error, VM_ERROR_CANCELLED, "the image was given up");
        fail_with(w, error);
    }
    end_sequencer(w);
    mixed_record_unref(w->filling.record);
    pack_writer_return_memory(w->packs, w->filling.pages);
    leaf_builder_destroy(w->leaves);
    dedup_destroy(w->dedup);
    tree_writer_destroy(w->trees);
    pack_writer_destroy(w->packs);
    footer_cache_destroy(w->cache);
    workers_destroy(w->workers);
    queue_destroy(w->ordered);
    free_segments(w);
    while (w->files) {
        struct image_file *f = w->files;
        w->files = f->next;
        file_tree_destroy(f->tree);
        free(f);
    }
    object_set_finish(&w->shared);
    quarantine_finish(&w->quarantine);
    failure_finish(&w->failure);
    pthread_cond_destroy(&w->freed);
    pthread_cond_destroy(&w->hashed);
    pthread_mutex_destroy(&w->lock);
    free(w);
}

/* SPDX-License-Identifier: Apache-2.0 */
#include "repo/pack_writer.h"
#include "repo/names.h"

#include "base/cond.h"
#include "base/fault.h"
#include "base/queue.h"

#include <stdlib.h>

enum {
    PACKS_IN_FLIGHT = 3,
    RECORDS_IN_FLIGHT = 32,
    PACK_FULL = 6 << 20,
    PACK_GOOD = 4 << 20, /* closed at this size if going on would mean to wait for compression */
    UPLOADERS = 2,
    INDEX_GOOD = 2048, /* entries that the index takes at once: each of its shards is one write */
};

/* What is to go into the index. */
struct entry_list {
    struct index_entry *entries;
    size_t n, cap;
};

struct done_record {
    uint8_t *data; /* compressed, waiting for those before it */
    uint32_t len;
};

/* Its memory is used again for the next pack. */
struct open_pack {
    bool used;
    struct cached_footer *footer;
    struct buffer body; /* header and records in order; empty from when the pack is stored */
    size_t size;        /* of the pack, from then on */
    struct done_record *done;
    uint32_t n_emitted, n_laid; /* records */
    bool closed;
    bool durable;
    struct entry_list entries;
};

struct record_job {
    struct job job;
    struct pack_writer *pw;
    struct open_pack *pack;
    uint32_t number;
    uint8_t *pages;
    unsigned n_pages;
    uint16_t mask;
};

struct pack_writer {
    struct pack_writer_setup s;
    struct queue *uploads;
    pthread_t uploaders[UPLOADERS];
    unsigned n_uploaders;
    struct open_pack *current; /* of the emitting thread */
    struct open_pack packs[PACKS_IN_FLIGHT]; /* likewise: current and those on their way */
    uint64_t n_started;

    pthread_mutex_t lock; /* what follows, the packs' records, and footers while they are laid */
    pthread_cond_t changed;
    uint8_t *free_memory[RECORDS_IN_FLIGHT];
    unsigned n_free, n_memory, in_flight;
    struct entry_list stored; /* of packs that are durable */
    unsigned n_indexing;      /* threads that put some of them into the index */
    struct pack_writer_stat stat;
};

static int failed(struct pack_writer *pw, struct vm_error **err)
{
    return failure_report(pw->s.failure, err);
}

/* Every waiter looks again. */
static void fail_with(struct pack_writer *pw, struct vm_error *error)
{
    failure_set(pw->s.failure, error);
    SCOPE_LOCK(&pw->lock);
    pthread_cond_broadcast(&pw->changed);
}

/* ---- memory of records ---- */

uint8_t *pack_writer_page_memory(struct pack_writer *pw, struct vm_error **err)
{
    SCOPE_LOCK(&pw->lock);
    while (!pw->n_free && pw->n_memory == RECORDS_IN_FLIGHT && !failure_is_set(pw->s.failure))
        pthread_cond_wait(&pw->changed, &pw->lock);
    if (failed(pw, err) < 0)
        return NULL;
    if (pw->n_free)
        return pw->free_memory[--pw->n_free];
    uint8_t *pages = malloc(RECORD_RAW_MAX);
    if (!pages)
        error_nomem(err);
    else
        pw->n_memory++;
    return pages;
}

void pack_writer_return_memory(struct pack_writer *pw, uint8_t *pages)
{
    if (!pages)
        return;
    SCOPE_LOCK(&pw->lock);
    pw->free_memory[pw->n_free++] = pages;
    pthread_cond_broadcast(&pw->changed);
}

/* ---- layout ---- */

/* The next record in order goes to the end of the body. Under the lock. */
static void lay_record(struct open_pack *p, uint8_t *record, uint32_t len)
{
    struct footer_record *entry = &p->footer->footer.records[p->n_laid];
    uint64_t offset = p->body.len;
    size_t padding = record_room(len) - len;
    record_seal(record, len, p->footer->footer.pack, offset);
    buffer_put(&p->body, record, len);
    buffer_put(&p->body, (const uint8_t[RECORD_ALIGN]){0}, padding);
    entry->offset = (uint32_t)offset;
    entry->len = len;
    entry->compression = record_compression(record);
    p->footer->n_laid = ++p->n_laid;
}

static void upload_if_complete(struct pack_writer *pw, struct open_pack *p)
{
    if (p->closed && p->n_laid == p->n_emitted)
        queue_put(pw->uploads, p);
}

static void take_compressed(struct pack_writer *pw, struct open_pack *p, uint32_t number,
                            uint8_t *record, uint32_t len)
{
    SCOPE_LOCK(&pw->lock);
    if (number != p->n_laid) {
        struct done_record *done = &p->done[number];
        done->len = len;
        done->data = malloc(len);
        if (done->data)
            memcpy(done->data, record, len);
        else
            p->body.failed = true;
        return;
    }
    lay_record(p, record, len);
    while (p->n_laid < p->n_emitted && p->done[p->n_laid].data) {
        struct done_record *next = &p->done[p->n_laid];
        lay_record(p, next->data, next->len);
        free(next->data);
        next->data = NULL;
    }
    upload_if_complete(pw, p);
}

static void compress_record(struct worker *worker, struct job *job)
{
    struct record_job *r = (struct record_job *)job;
    struct pack_writer *pw = r->pw;
    size_t len = record_encode(&worker->codec, r->pages, r->n_pages, r->mask, worker->scratch);
    take_compressed(pw, r->pack, r->number, worker->scratch, (uint32_t)len);
    SCOPE_LOCK(&pw->lock);
    if (r->pack->body.failed) {
        struct vm_error *error = NULL;
        error_nomem(&error);
        failure_set(pw->s.failure, error);
    }
    pw->free_memory[pw->n_free++] = r->pages;
    free(r);
    pw->in_flight--; /* from here on the pack and the writer may be gone */
    pthread_cond_broadcast(&pw->changed);
}

/* ---- the index ---- */

/* Room for n more. */
static int entry_list_grow(struct entry_list *l, size_t n, struct vm_error **err)
{
    if (l->n + n <= l->cap)
        return 0;
    size_t cap = 2 * l->cap + n + 256;
    struct index_entry *entries = realloc(l->entries, cap * sizeof(*entries));
    if (!entries)
        return error_nomem(err);
    l->entries = entries;
    l->cap = cap;
    return 0;
}

/* Put what durable packs left into the index, if there are at least so many. */
static int index_stored(struct pack_writer *pw, size_t at_least, struct vm_error **err)
{
    struct entry_list taken = {0};
    {
        SCOPE_LOCK(&pw->lock);
        if (pw->stored.n < at_least)
            return 0;
        taken = pw->stored;
        pw->stored = (struct entry_list){0};
        pw->n_indexing++;
    }
    int result = index_insert(pw->s.index, taken.entries, taken.n, err);
    free(taken.entries);
    SCOPE_LOCK(&pw->lock);
    pw->n_indexing--;
    pthread_cond_broadcast(&pw->changed);
    return result;
}

static void wait_indexing(struct pack_writer *pw)
{
    SCOPE_LOCK(&pw->lock);
    while (pw->n_indexing)
        pthread_cond_wait(&pw->changed, &pw->lock);
}

/* ---- storing ---- */

static int create_pack(struct pack_writer *pw, struct open_pack *p, struct vm_error **err)
{
    uint64_t number = p->footer->footer.pack;
    footer_write(&p->footer->footer, &p->body);
    if (p->body.failed)
        return error_nomem(err);
    if (FAULT("repo.pack") == FAULT_ERROR)
        return error_errno(err, fault_errno(), "cannot store pack %016" PRIx64, number);
    p->size = p->body.len;
    enum store_result r =
        store_create_given(pw->s.store, STORE_PACK, pack_name(number), &p->body, err);
    if (r == STORE_EXISTS)
        return error_set(err, VM_ERROR_CORRUPT, "pack %016" PRIx64 " exists already", number);
    if (r != STORE_DONE)
        return -1;
    (void)FAULT("repo.pack-stored");
    return 0;
}

/* The pack is durable. From the end of this on it may be gone. */
static int note_stored(struct pack_writer *pw, struct open_pack *p, struct vm_error **err)
{
    SCOPE_LOCK(&pw->lock);
    if (entry_list_grow(&pw->stored, p->entries.n, err) < 0)
        return -1;
    for (size_t i = 0; i < p->entries.n; i++)
        pw->stored.entries[pw->stored.n++] = p->entries.entries[i];
    pw->stat.packs++;
    pw->stat.records += p->n_emitted;
    pw->stat.pages += p->footer->footer.n_pages;
    pw->stat.bytes += p->size;
    p->durable = true;
    pthread_cond_broadcast(&pw->changed);
    return 0;
}

static void *upload(void *arg)
{
    struct pack_writer *pw = arg;
    struct open_pack *p;
    while ((p = queue_get(pw->uploads))) {
        struct vm_error *error = NULL;
        if (failure_is_set(pw->s.failure))
            continue;
        if (create_pack(pw, p, &error) < 0 || note_stored(pw, p, &error) < 0 ||
            index_stored(pw, INDEX_GOOD, &error) < 0)
            fail_with(pw, error);
    }
    return NULL;
}

/* ---- packs, by the emitting thread ---- */

/* The pack is done with; its memory stays. */
static void release_pack(struct open_pack *p)
{
    for (uint32_t i = 0; i < p->n_emitted; i++) {
        free(p->done[i].data);
        p->done[i].data = NULL;
    }
    if (p->footer)
        footer_cache_end_own(p->footer);
    buffer_reset(&p->body);
    p->footer = NULL;
    p->n_emitted = p->n_laid = 0;
    p->entries.n = 0;
    p->closed = p->durable = p->used = false;
}

static int begin_pack(struct pack_writer *pw, struct open_pack *p, struct vm_error **err)
{
    uint8_t header[PACK_HEADER];
    uint64_t number = pw->s.writer << NUMBER_COUNT_BITS | ++pw->n_started;
    if (pw->n_started > NUMBER_COUNT_MAX)
        return error_set(err, VM_ERROR_REFUSED, "one writer cannot store more than %llu packs",
                         (unsigned long long)NUMBER_COUNT_MAX);
    if (!p->done && !(p->done = calloc(PACK_RECORDS_MAX, sizeof(*p->done))))
        return error_nomem(err);
    pack_header_write(header, number, &pw->s.repository);
    buffer_put(&p->body, header, sizeof(header));
    if (p->body.failed)
        return error_nomem(err);
    p->footer = footer_cache_begin_own(pw->s.cache, number, err);
    p->used = p->footer != NULL;
    return p->used ? 0 : -1;
}

static bool is_durable(struct pack_writer *pw, const struct open_pack *p)
{
    SCOPE_LOCK(&pw->lock);
    return p->durable;
}

/* Release those that are durable; the number that remains. */
static unsigned reap_packs(struct pack_writer *pw)
{
    unsigned n = 0;
    for (unsigned i = 0; i < PACKS_IN_FLIGHT; i++) {
        struct open_pack *p = &pw->packs[i];
        if (p->used && is_durable(pw, p))
            release_pack(p);
        n += p->used;
    }
    return n;
}

/* Until at most `max` packs are in flight. */
static int wait_packs(struct pack_writer *pw, unsigned max, struct vm_error **err)
{
    while (reap_packs(pw) > max) {
        SCOPE_LOCK(&pw->lock);
        bool any = false;
        for (unsigned i = 0; i < PACKS_IN_FLIGHT; i++)
            any |= pw->packs[i].durable;
        if (failed(pw, err) < 0)
            return -1;
        if (!any)
            pthread_cond_wait(&pw->changed, &pw->lock);
    }
    return failed(pw, err);
}

static int open_next(struct pack_writer *pw, struct vm_error **err)
{
    if (wait_packs(pw, PACKS_IN_FLIGHT - 1, err) < 0)
        return -1;
    struct open_pack *p = pw->packs;
    while (p->used)
        p++;
    if (begin_pack(pw, p, err) < 0) {
        buffer_reset(&p->body);
        return -1;
    }
    pw->current = p;
    return 0;
}

static void close_current(struct pack_writer *pw)
{
    struct open_pack *p = pw->current;
    pw->current = NULL;
    if (!p)
        return;
    SCOPE_LOCK(&pw->lock);
    p->closed = true;
    upload_if_complete(pw, p);
}

/*
 * Could the pack take n more records, if none of those in flight shrinks? Waits for compression to
 * tell.
 */
static bool has_room(struct pack_writer *pw, struct open_pack *p, unsigned n)
{
    if (p->footer->footer.n_pages + n * RECORD_PAGES_MAX > PACK_PAGES_MAX ||
        p->n_emitted + n > PACK_RECORDS_MAX)
        return false;
    SCOPE_LOCK(&pw->lock);
    for (;;) {
        size_t at_most =
            p->body.len + (p->n_emitted - p->n_laid + (size_t)n) * (RECORD_MAX + RECORD_ALIGN);
        if (at_most <= PACK_FULL || failure_is_set(pw->s.failure))
            return true;
        if (p->body.len >= PACK_GOOD || p->n_laid == p->n_emitted)
            return false;
        pthread_cond_wait(&pw->changed, &pw->lock);
    }
}

static int note_entries(struct open_pack *p, const struct page_id *ids, unsigned n,
                        const struct page_id *extent, struct vm_error **err)
{
    struct entry_list *l = &p->entries;
    uint8_t value[8];
    put_le64(value, p->footer->footer.pack);
    if (entry_list_grow(l, n + 1, err) < 0)
        return -1;
    if (extent)
        l->entries[l->n++] = index_entry_make(INDEX_EXTENT, extent, value, sizeof(value));
    for (unsigned i = 0; i < n; i++)
        if (index_samples(&ids[i]))
            l->entries[l->n++] = index_entry_make(INDEX_PAGE, &ids[i], value, sizeof(value));
    return 0;
}

bool pack_writer_is_last(struct pack_writer *pw)
{
    return pw->current && !has_room(pw, pw->current, 2);
}

int pack_writer_emit(struct pack_writer *pw, uint8_t *pages, const struct page_id *ids, unsigned n,
                     uint16_t mask, const struct page_id *extent, struct record_place *ret_place,
                     struct vm_error **err)
{
    if (pw->current && !has_room(pw, pw->current, 1))
        close_current(pw);
    struct record_job *job = NULL;
    if ((!pw->current && open_next(pw, err) < 0) ||
        note_entries(pw->current, ids, n, extent, err) < 0) {
        pack_writer_return_memory(pw, pages);
        return -1;
    }
    job = malloc(sizeof(*job));
    if (!job) {
        pack_writer_return_memory(pw, pages);
        return error_nomem(err);
    }
    struct open_pack *p = pw->current;
    ret_place->footer = p->footer;
    ret_place->record = footer_cache_add_record(pw->s.cache, p->footer, ids, n, mask);
    *job = (struct record_job){.pw = pw, .pack = p, .number = ret_place->record, .pages = pages,
                               .n_pages = n, .mask = mask};
    pthread_mutex_lock(&pw->lock);
    p->n_emitted++;
    pw->in_flight++;
    pthread_mutex_unlock(&pw->lock);
    workers_submit(pw->s.workers, &job->job, compress_record);
    return 0;
}

int pack_writer_wait_laid(struct pack_writer *pw, const struct cached_footer *f, uint32_t record,
                          struct vm_error **err)
{
    if (record_is_laid(f, record))
        return 0;
    SCOPE_LOCK(&pw->lock);
    while (!record_is_laid(f, record) && !failure_is_set(pw->s.failure))
        pthread_cond_wait(&pw->changed, &pw->lock);
    return failed(pw, err);
}

void pack_writer_close(struct pack_writer *pw)
{
    close_current(pw);
}

int pack_writer_finish(struct pack_writer *pw, struct vm_error **err)
{
    close_current(pw);
    /* What is durable so far is indexed while the last packs are stored. */
    if (index_stored(pw, 1, err) < 0 || wait_packs(pw, 0, err) < 0)
        return -1;
    wait_indexing(pw);
    return failed(pw, err) < 0 ? -1 : index_stored(pw, 1, err);
}

void pack_writer_stat(struct pack_writer *pw, struct pack_writer_stat *ret_stat)
{
    SCOPE_LOCK(&pw->lock);
    *ret_stat = pw->stat;
}

/* ---- life ---- */

struct pack_writer *pack_writer_create(const struct pack_writer_setup *setup, struct vm_error **err)
{
    struct pack_writer *pw = calloc(1, sizeof(*pw));
    if (!pw) {
        error_nomem(err);
        return NULL;
    }
    pw->s = *setup;
    pthread_mutex_init(&pw->lock, NULL);
    cond_init(&pw->changed);
    pw->uploads = queue_create(PACKS_IN_FLIGHT, NULL, err);
    while (pw->uploads && pw->n_uploaders < UPLOADERS) {
        int rc = pthread_create(&pw->uploaders[pw->n_uploaders], NULL, upload, pw);
        if (rc) {
            error_errno(err, rc, "cannot start a thread");
            break;
        }
        pw->n_uploaders++;
    }
    if (pw->n_uploaders < UPLOADERS) {
        pack_writer_destroy(pw);
        return NULL;
    }
    return pw;
}

static void wait_compression(struct pack_writer *pw)
{
    SCOPE_LOCK(&pw->lock);
    while (pw->in_flight)
        pthread_cond_wait(&pw->changed, &pw->lock);
}

void pack_writer_destroy(struct pack_writer *pw)
{
    if (!pw)
        return;
    wait_compression(pw);
    if (pw->uploads)
        queue_abort(pw->uploads);
    for (unsigned i = 0; i < pw->n_uploaders; i++)
        pthread_join(pw->uploaders[i], NULL);
    queue_destroy(pw->uploads);
    for (unsigned i = 0; i < PACKS_IN_FLIGHT; i++) {
        release_pack(&pw->packs[i]);
        buffer_finish(&pw->packs[i].body);
        free(pw->packs[i].done);
        free(pw->packs[i].entries.entries);
    }
    for (unsigned i = 0; i < pw->n_free; i++)
        free(pw->free_memory[i]);
    free(pw->stored.entries);
    pthread_cond_destroy(&pw->changed);
    pthread_mutex_destroy(&pw->lock);
    free(pw);
}

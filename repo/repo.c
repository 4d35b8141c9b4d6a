/* SPDX-License-Identifier: Apache-2.0 */
#include "repo/repo.h"
#include "repo/condemned.h"
#include "repo/heal.h"
#include "repo/names.h"

#include "base/clock.h"
#include "base/log.h"

#include <stdlib.h>
#include <unistd.h>

#define FORMAT_KEY "format"
#define FORMAT "1"
#define UUID_KEY "uuid"
#define DATA_POOL_KEY "data-pool"

enum {
    CACHE_BASE = 8 << 20,
    CACHE_PER_TIB = 48 << 20,
    CACHE_RAM_PART = 8, /* of the memory that the machine has, at most */
    TEXT_MAX = 256,
    CHECKPOINT_MS = 500,
    PARENT_TRIES = 16, /* collections may give a parent other roots meanwhile */
};

struct repo {
    struct store *store;
    struct index *index;
    struct uuid uuid;
    struct repo_tuning tuning;
};

/* ---- making ---- */

static int found_remains(const char *name, void *arg, struct vm_error **err)
{
    (void)arg;
    return error_set(err, VM_ERROR_REFUSED,
                     "there is %s, of a repository whose head is lost: a new one would use its names "
                     "again; empty the place, or name another",
                     name);
}

/* What a former repository left would be found under numbers that the new one gives out. */
static int check_place(struct store *s, struct vm_error **err)
{
    cleanup_buffer struct buffer format = {0};
    enum store_result head = store_get(s, REPOSITORY_MAP, FORMAT_KEY, &format, err);
    if (head != STORE_MISSING)
        return head == STORE_FAILED
                   ? -1
                   : error_set(err, VM_ERROR_CONFLICT, "there is a repository already");
    if (store_list(s, STORE_PACK, PACK_PREFIX, found_remains, NULL, err) < 0)
        return -1;
    return store_list(s, STORE_BLOB, TREE_PREFIX, found_remains, NULL, err);
}

static int init_store(struct store *s, const struct repo_init_options *options,
                      struct vm_error **err)
{
    struct store_pair sets[5] = {{FORMAT_KEY, FORMAT, strlen(FORMAT)}};
    char shards[INDEX_INIT_VALUE], text[UUID_TEXT_SIZE];
    struct uuid uuid = uuid_new();
    const char *pool = options ? options->data_pool : NULL;
    if (pool && store_set_data_pool(s, pool, err) < 0)
        return -1;
    if (pool && strlen(pool) >= TEXT_MAX)
        return error_set(err, VM_ERROR_USAGE, "the pool's name is too long");
    if (check_place(s, err) < 0 || catalogue_init(s, err) < 0 || condemned_init(s, err) < 0 ||
        index_init(s, &sets[1].key, shards, err) < 0)
        return -1;
    sets[1].value = shards;
    sets[1].len = strlen(shards);
    sets[2] = (struct store_pair){UUID_KEY, uuid_format(&uuid, text), UUID_TEXT_SIZE - 1};
    sets[3] = (struct store_pair){CONDEMNED_KEY, CONDEMNED_FIRST, strlen(CONDEMNED_FIRST)};
    sets[4] = (struct store_pair){DATA_POOL_KEY, pool, pool ? strlen(pool) : 0};
    struct store_op op = {.kind = STORE_UPDATE, .area = STORE_MAP, .name = REPOSITORY_MAP,
                          .presence = STORE_NEW, .sets = sets, .n_sets = pool ? 5 : 4};
    if (store_run(s, &op, 1, err) < 0)
        return -1;
    if (op.result == STORE_EXISTS)
        return error_set(err, VM_ERROR_CONFLICT, "there is a repository already");
    return 0;
}

int repo_init(const char *url_text, const struct repo_init_options *options, struct vm_error **err)
{
    struct repo_url url;
    if (repo_url_parse(url_text, &url, err) < 0)
        return -1;
    CLEANUP(store) struct store *s = store_open(&url, STORE_OPEN_CREATE, err);
    repo_url_finish(&url);
    if (!s || init_store(s, options, err) < 0)
        return error_wrap(err, "cannot make repository %s", url_text);
    /* Space that there is not now cannot be set aside; the next collection tries again. */
    store_ballast_refill(s, NULL);
    return 0;
}

/* ---- opening ---- */

static int get_text(struct store *s, const char *key, char out[TEXT_MAX], struct vm_error **err)
{
    cleanup_buffer struct buffer b = {0};
    out[0] = 0;
    enum store_result r = store_get(s, REPOSITORY_MAP, key, &b, err);
    if (r == STORE_FAILED)
        return -1;
    if (r == STORE_MISSING)
        return error_set(err, VM_ERROR_NOT_FOUND,
                         "there is no repository; \"vmmig repo init\" makes one");
    size_t n = b.len < TEXT_MAX ? b.len : TEXT_MAX - 1;
    if (n)
        memcpy(out, b.data, n);
    out[n] = 0;
    return 0;
}

static int read_head(struct store *s, struct repo *r, struct vm_error **err)
{
    char text[TEXT_MAX];
    if (get_text(s, FORMAT_KEY, text, err) < 0)
        return -1;
    if (strcmp(text, FORMAT) != 0)
        return error_set(err, VM_ERROR_VERSION, "it has format \"%s\"; this vmmig knows %s", text,
                         FORMAT);
    if (get_text(s, UUID_KEY, text, err) < 0)
        return -1;
    if (!uuid_parse(text, &r->uuid))
        return error_set(err, VM_ERROR_CORRUPT, "its UUID is lost");
    if (get_text(s, DATA_POOL_KEY, text, err) < 0)
        return -1;
    return text[0] ? store_set_data_pool(s, text, err) : 0;
}

struct repo *repo_open_store(struct store *s, struct vm_error **err)
{
    struct repo *r = calloc(1, sizeof(*r));
    if (!r) {
        error_nomem(err);
        return NULL;
    }
    if (read_head(s, r, err) < 0 || !(r->index = index_open(s, err))) {
        error_wrap(err, "repository %s", store_text(s));
        free(r);
        return NULL;
    }
    r->store = s;
    return r;
}

struct repo *repo_open(const char *url_text, struct vm_error **err)
{
    struct repo_url url;
    if (repo_url_parse(url_text, &url, err) < 0)
        return NULL;
    CLEANUP(store) struct store *s = store_open(&url, 0, err);
    repo_url_finish(&url);
    if (!s) {
        error_wrap(err, "repository %s", url_text);
        return NULL;
    }
    struct repo *r = repo_open_store(s, err);
    if (r)
        s = NULL;
    return r;
}

void repo_close(struct repo *r)
{
    if (!r)
        return;
    index_close(r->index);
    store_close(r->store);
    free(r);
}

struct store *repo_store(struct repo *r)
{
    return r->store;
}

struct index *repo_index(struct repo *r)
{
    return r->index;
}

const struct uuid *repo_uuid(const struct repo *r)
{
    return &r->uuid;
}

void repo_tune(struct repo *r, const struct repo_tuning *tuning)
{
    r->tuning = *tuning;
}

/* ---- statistics ---- */

enum { SIZES_BATCH = 64 };

struct counting {
    struct store *store;
    enum store_area area;
    const char *prefix;
    char names[SIZES_BATCH][STORE_NAME_MAX + 1];
    size_t n;
    uint64_t objects, bytes;
};

static int count_sizes(struct counting *c, struct vm_error **err)
{
    struct store_op ops[SIZES_BATCH];
    for (size_t i = 0; i < c->n; i++)
        ops[i] = (struct store_op){.kind = STORE_SIZE, .area = c->area, .name = c->names[i]};
    if (store_run(c->store, ops, c->n, err) < 0)
        return -1;
    for (size_t i = 0; i < c->n; i++) {
        c->objects += ops[i].result == STORE_DONE;
        c->bytes += ops[i].result == STORE_DONE ? ops[i].ret_size : 0;
    }
    c->n = 0;
    return 0;
}

static int count_object(const char *name, void *arg, struct vm_error **err)
{
    struct counting *c = arg;
    uint64_t number;
    if (!object_number(c->prefix, name, &number))
        return 0;
    snprintf(c->names[c->n++], STORE_NAME_MAX + 1, "%s", name);
    return c->n == SIZES_BATCH ? count_sizes(c, err) : 0;
}

static int count_all(struct store *s, enum store_area area, const char *prefix,
                     uint64_t *ret_objects, uint64_t *ret_bytes, struct vm_error **err)
{
    struct counting c = {.store = s, .area = area, .prefix = prefix};
    if (store_list(s, area, prefix, count_object, &c, err) < 0 || count_sizes(&c, err) < 0)
        return -1;
    *ret_objects = c.objects;
    *ret_bytes = c.bytes;
    return 0;
}

static int count_image(const struct image *image, void *arg, struct vm_error **err)
{
    struct repo_stat *stat = arg;
    (void)err;
    stat->images++;
    stat->image_bytes += image_size(image);
    return 0;
}

static int count_lease(const struct lease *lease, void *arg, struct vm_error **err)
{
    struct repo_stat *stat = arg;
    (void)err;
    if (stat->leases++ && stat->oldest_lease_s <= lease->taken_s)
        return 0;
    stat->oldest_lease_s = lease->taken_s;
    strcpy(stat->oldest_lease_holder, lease->holder);
    strcpy(stat->oldest_lease_image, lease->image.name);
    return 0;
}

static void count_damaged(const char *name, const struct vm_error *problem, void *arg)
{
    struct repo_stat *stat = arg;
    (void)name;
    (void)problem;
    stat->damaged++;
}

int repo_stat(struct repo *r, struct repo_stat *ret_stat, struct vm_error **err)
{
    struct repo_stat stat = {.uuid = r->uuid};
    if (catalogue_list(r->store, count_image, count_damaged, &stat, err) < 0 ||
        catalogue_leases(r->store, count_lease, count_damaged, &stat, err) < 0 ||
        count_all(r->store, STORE_PACK, PACK_PREFIX, &stat.packs, &stat.pack_bytes, err) < 0 ||
        count_all(r->store, STORE_BLOB, TREE_PREFIX, &stat.trees, &stat.tree_bytes, err) < 0 ||
        index_stat(r->index, &stat.index, err) < 0 || store_space(r->store, &stat.space, err) < 0)
        return -1;
    *ret_stat = stat;
    return 0;
}

/* ---- writing an image ---- */

struct image_session {
    struct repo *repo;
    struct image image, parent; /* parent.name is "" without one */
    struct image_file *files[IMAGE_FILES_MAX];
    struct registration *registration;
    struct image_writer *writer;
    int64_t next_checkpoint_ns;
};

/* The sequencer's, now and then: answers collections. */
static int session_checkpoint(void *arg, const struct object_set *shared, bool *ret_changed,
                              struct vm_error **err)
{
    struct image_session *s = arg;
    int64_t now = clock_mono_ns();
    if (now < s->next_checkpoint_ns)
        return 0;
    unsigned ms = s->repo->tuning.checkpoint_ms;
    s->next_checkpoint_ns = now + (ms ? ms : CHECKPOINT_MS) * NSEC_PER_MSEC;
    return registration_checkpoint(s->registration, shared, ret_changed, err);
}

/* Footers for so much unique data as the index tells. */
static int cache_size(struct repo *r, size_t *ret_bytes, struct vm_error **err)
{
    struct index_stat stat;
    if (index_stat(r->index, &stat, err) < 0)
        return -1;
    /* Two keys per 64 KiB. The index is a hint, which may say anything. */
    double tib = (double)stat.keys * (EXTENT_BYTES / 2) / ((uint64_t)1 << 40);
    double most = (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE) / CACHE_RAM_PART;
    double wanted = tib * CACHE_PER_TIB;
    *ret_bytes = r->tuning.cache_bytes
                     ? r->tuning.cache_bytes
                     : CACHE_BASE + (size_t)(wanted < most ? wanted : most);
    return 0;
}

/* With the parent, if it has a name: as it is when it is pinned. */
static int register_session(struct image_session *s, struct vm_error **err)
{
    struct store *store = s->repo->store;
    struct image *parent = s->parent.name[0] ? &s->parent : NULL;
    for (int i = 0;; i++) {
        cleanup_error struct vm_error *problem = NULL;
        enum image_fate fate = IMAGE_GONE;
        s->registration = catalogue_register(store, s->image.name, parent, &problem);
        if (s->registration)
            return 0;
        cleanup_free struct image *now = malloc(sizeof(*now));
        if (!now)
            return error_nomem(err);
        if (parent && problem->kind == VM_ERROR_NOT_FOUND && i < PARENT_TRIES &&
            catalogue_find_again(store, parent, now, &fate, err) < 0)
            return -1;
        if (fate == IMAGE_GONE)
            return error_propagate(err, steal_ptr(&problem));
        *parent = *now;
    }
}

struct image_session *image_session_begin(struct repo *r, const char *name, const char *parent,
                                          struct vm_error **err)
{
    CLEANUP(image_session) struct image_session *s = calloc(1, sizeof(*s));
    if (!s) {
        error_nomem(err);
        return NULL;
    }
    s->repo = r;
    if (image_name_check(name, err) < 0 ||
        (parent && catalogue_find(r->store, parent, &s->parent, err) < 0))
        return NULL;
    strcpy(s->image.name, name);
    strcpy(s->image.parent, s->parent.name);
    if (register_session(s, err) < 0)
        return NULL;
    struct image_writer_setup setup = {.store = r->store, .index = r->index, .repository = r->uuid,
                                       .writer = registration_number(s->registration),
                                       .condemned = registration_condemned(s->registration),
                                       .checkpoint = session_checkpoint, .checkpoint_arg = s,
                                       .records_max = r->tuning.records_max,
                                       .compression = RECORD_LZ4};
    if (cache_size(r, &setup.cache_bytes, err) < 0 ||
        !(s->writer = image_writer_create(&setup, err)))
        return NULL;
    return steal_ptr(&s);
}

void image_session_end(struct image_session *s)
{
    if (!s)
        return;
    image_writer_destroy(s->writer);
    catalogue_unregister(s->registration);
    free(s);
}

struct image_writer *image_session_writer(struct image_session *s)
{
    return s->writer;
}

uint64_t image_session_number(const struct image_session *s)
{
    return registration_number(s->registration);
}

struct image_file *image_session_file(struct image_session *s, const char *name, uint64_t size,
                                      struct vm_error **err)
{
    unsigned n = s->image.n_files;
    if (!image_file_name_is_good(name) || image_find_file(&s->image, name) ||
        n == IMAGE_FILES_MAX) {
        error_set(err, VM_ERROR_USAGE, "\"%.80s\" cannot be one more file of image %s", name,
                  s->image.name);
        return NULL;
    }
    const struct image_entry *base = image_find_file(&s->parent, name);
    if (base && base->size > size)
        base = NULL; /* a file that shrank shares by content alone */
    struct image_file *f = image_writer_add_file(s->writer, size, base ? &base->root : NULL,
                                                 base ? base->size : 0, err);
    if (!f)
        return NULL;
    strcpy(s->image.files[n].name, name);
    s->image.files[n].size = size;
    s->files[n] = f;
    s->image.n_files++;
    return f;
}

/* What was stored may be what was damaged elsewhere. That it could not be healed is no failure. */
static void heal_others(struct image_session *s, uint64_t n_packs)
{
    cleanup_error struct vm_error *problem = NULL;
    uint64_t healed = 0;
    if (heal_quarantined(s->repo, s->image.writer, n_packs, &healed, &problem) < 0)
        log_warn("damaged records were not healed", "reason=%s", log_q(error_message(problem)));
    else if (healed)
        log_info("damaged records were healed", "image=%s records=%" PRIu64,
                 log_q(s->image.name), healed);
}

void image_session_describe(struct image_session *s, const struct image *as)
{
    strcpy(s->image.parent, as->parent);
    s->image.created_s = as->created_s;
}

void image_session_date(struct image_session *s, uint64_t created_s)
{
    s->image.created_s = created_s;
}

int image_session_commit(struct image_session *s, struct import_report *ret_report,
                         struct vm_error **err)
{
    struct image_writer_stat stat;
    if (!s->image.n_files)
        return error_set(err, VM_ERROR_USAGE, "image %s has no files", s->image.name);
    if (image_writer_finish(s->writer, err) < 0)
        return -1;
    image_writer_stat(s->writer, &stat);
    for (unsigned i = 0; i < s->image.n_files; i++)
        s->image.files[i].root = image_writer_root(s->files[i]);
    if (!s->image.created_s)
        s->image.created_s = (uint64_t)(clock_wall_ns() / NSEC_PER_SEC);
    s->image.writer = registration_number(s->registration);
    s->image.bytes_added = stat.bytes_stored;
    const struct object_set *shared = image_writer_shared(s->writer);
    if (catalogue_commit(s->registration, &s->image, shared, err) < 0)
        return -1;
    heal_others(s, stat.packs);
    if (ret_report)
        *ret_report = (struct import_report){image_size(&s->image), stat};
    return 0;
}

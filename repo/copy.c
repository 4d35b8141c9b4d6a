/* SPDX-License-Identifier: Apache-2.0 */
#include "repo/copy.h"

#include "repo/footer_cache.h"
#include "repo/progress.h"

#include <stdlib.h>

enum { FOOTERS_BYTES = 16 << 20, LEAF_SEGMENTS = RECIPE_LEAF_PAGES / SEGMENT_PAGES };

struct copy {
    struct repo *from, *to;
    struct footer_cache *footers;
    struct progress *progress;
    struct image_writer *writer;
    uint64_t stored_before; /* by the images that are done */
    struct recipe_leaf leaf;
};

/* A file under way; in use by this thread and by the writer's sequencer. */
struct copy_file {
    struct file_reader *reader; /* any thread */
    struct page_hasher hasher;  /* the sequencer's, as the rest */
    uint8_t data[SEGMENT_BYTES];
};

static void copy_file_free(struct copy_file *f)
{
    if (!f)
        return;
    file_reader_destroy(f->reader);
    page_hasher_finish(&f->hasher);
    free(f);
}
DEFINE_CLEANUP(copy_file, struct copy_file *, copy_file_free)

static struct copy_file *open_file(struct store *s, const struct image *image,
                                   const struct image_entry *entry, struct vm_error **err)
{
    CLEANUP(copy_file) struct copy_file *f = calloc(1, sizeof(*f));
    if (!f) {
        error_nomem(err);
        return NULL;
    }
    f->reader = file_reader_open(s, image, entry, err);
    if (!f->reader || page_hasher_init(&f->hasher, err) < 0)
        return NULL;
    return steal_ptr(&f);
}

/* ---- data that the target lacks ---- */

static int check_page(struct copy_file *f, struct segment *s, unsigned page, const uint8_t *data,
                      struct vm_error **err)
{
    struct page_id id;
    if (page_hasher_hash(&f->hasher, data, PAGE_BYTES, &id, err) < 0)
        return -1;
    if (!page_id_equal(&id, &s->ids[page]))
        return error_set(err, VM_ERROR_CORRUPT,
                         "the page at %llu is not what its identity says; scrub tells what it "
                         "touches",
                         (unsigned long long)(s->number * SEGMENT_BYTES +
                                              (uint64_t)page * PAGE_BYTES));
    memcpy(s->data + (size_t)page * PAGE_BYTES, data, PAGE_BYTES);
    return 0;
}

/* The sequencer's, as segment_read_fn. */
static int read_segment(struct segment *s, const bool wanted[SEGMENT_PAGES], void *arg,
                        struct vm_error **err)
{
    struct copy_file *f = arg;
    unsigned which[SEGMENT_PAGES], in_leaf[SEGMENT_PAGES], n = 0;
    for (unsigned i = 0; i < SEGMENT_PAGES; i++) {
        if (!wanted[i])
            continue;
        in_leaf[n] = (unsigned)(s->number % LEAF_SEGMENTS) * SEGMENT_PAGES + i;
        which[n++] = i;
    }
    if (file_reader_pages(f->reader, s->number / LEAF_SEGMENTS, in_leaf, n, f->data, err) < 0)
        return -1;
    for (unsigned i = 0; i < n; i++)
        if (check_page(f, s, which[i], f->data + (size_t)i * PAGE_BYTES, err) < 0)
            return -1;
    return 0;
}

/* ---- identities ---- */

/* Of the pages from `first` on that lie in the same pack. False: the pack does not tell. */
static bool identify_pack(const struct cached_footer *f, const struct recipe_page *pages,
                          unsigned first, struct segment *s)
{
    for (unsigned i = first; i < SEGMENT_PAGES; i++) {
        const struct recipe_page *p = &pages[i];
        if (s->state[i] != PAGE_ABSENT || p->pack != f->footer.pack)
            continue;
        if (!cached_footer_identity(f, p->offset, p->page, &s->ids[i]) ||
            memcmp(s->ids[i].bytes, p->id, sizeof(p->id)) != 0)
            return false;
        s->state[i] = PAGE_UNKNOWN;
    }
    return true;
}

/* Fill state and ids of a segment; *ret_known is false if some identity is not to be had. */
static int identify(struct copy *c, const struct recipe_page *pages, struct segment *s,
                    bool *ret_known, struct vm_error **err)
{
    for (unsigned i = 0; i < SEGMENT_PAGES; i++)
        s->state[i] = pages[i].len ? PAGE_ABSENT : PAGE_ZEROS;
    *ret_known = true;
    for (unsigned i = 0; i < SEGMENT_PAGES && *ret_known; i++) {
        if (s->state[i] != PAGE_ABSENT)
            continue;
        footer_cache_trim(c->footers);
        if (!footer_cache_knows(c->footers, pages[i].pack) &&
            footer_cache_load(c->footers, &pages[i].pack, 1, err) < 0)
            return -1;
        const struct cached_footer *f = footer_cache_get(c->footers, pages[i].pack);
        *ret_known = f && identify_pack(f, pages, i, s);
    }
    return 0;
}

/* A footer that is lost or moved: read the data, which is verified, and hash it. */
static int read_whole(struct copy_file *f, struct segment *s, struct vm_error **err)
{
    uint64_t offset = s->number * SEGMENT_BYTES, left = file_reader_size(f->reader) - offset;
    size_t len = left < SEGMENT_BYTES ? (size_t)left : SEGMENT_BYTES;
    memset(s->data + len, 0, SEGMENT_BYTES - len);
    memset(s->given, true, sizeof(s->given));
    return file_reader_read(f->reader, offset, s->data, len, err);
}

static int copy_segment(struct copy *c, struct copy_file *f, struct image_file *out,
                        uint64_t number, const struct recipe_page *pages, struct vm_error **err)
{
    bool known;
    struct segment *s = image_writer_segment(c->writer, out, number, err);
    if (!s)
        return -1;
    int result = identify(c, pages, s, &known, err);
    if (!result && known) {
        image_writer_put_known(c->writer, s, read_segment, f);
        return 0;
    }
    if (!result)
        result = read_whole(f, s, err);
    if (result < 0)
        memset(s->given, 0, sizeof(s->given));
    image_writer_put(c->writer, s);
    return result;
}

static int copy_leaf(struct copy *c, struct copy_file *f, struct image_file *out, uint64_t number,
                     struct vm_error **err)
{
    struct image_writer_stat stat;
    uint64_t left = file_reader_size(f->reader) - number * RECIPE_LEAF_BYTES;
    if (file_reader_leaf(f->reader, number, &c->leaf, err) < 0)
        return -1;
    for (unsigned i = 0; i < LEAF_SEGMENTS; i++) {
        const struct recipe_page *pages = c->leaf.pages + (size_t)i * SEGMENT_PAGES;
        bool any = false;
        for (unsigned p = 0; p < SEGMENT_PAGES; p++)
            any |= pages[p].len != 0;
        if (any && copy_segment(c, f, out, number * LEAF_SEGMENTS + i, pages, err) < 0)
            return -1;
    }
    image_writer_stat(c->writer, &stat);
    return progress_add(c->progress, left < RECIPE_LEAF_BYTES ? left : RECIPE_LEAF_BYTES,
                        c->stored_before + stat.bytes_stored, err);
}

/* ---- images ---- */

struct files {
    struct copy_file *list[IMAGE_FILES_MAX];
    unsigned n;
};

static int copy_files(struct copy *c, struct image_session *session, const struct image *image,
                      struct files *files, struct vm_error **err)
{
    c->writer = image_session_writer(session);
    for (unsigned i = 0; i < image->n_files; i++) {
        const struct image_entry *entry = &image->files[i];
        struct image_file *out = image_session_file(session, entry->name, entry->size, err);
        struct copy_file *f = out ? open_file(repo_store(c->from), image, entry, err) : NULL;
        if (!f)
            return -1;
        files->list[files->n++] = f;
        for (uint64_t at = 0; at * RECIPE_LEAF_BYTES < entry->size; at++)
            if (copy_leaf(c, f, out, at, err) < 0)
                return -1;
    }
    return 0;
}

static int copy_image(struct copy *c, const struct image *image, struct copy_report *report,
                      struct vm_error **err)
{
    struct files files = {.n = 0};
    struct import_report imported;
    struct image_session *session = image_session_begin(c->to, image->name, NULL, err);
    if (!session)
        return -1;
    image_session_describe(session, image);
    int result = copy_files(c, session, image, &files, err);
    if (!result)
        result = image_session_commit(session, &imported, err);
    image_session_end(session); /* its sequencer used the files until now */
    while (files.n) {
        struct copy_file *f = files.list[--files.n];
        report->bytes_read += file_reader_stat(f->reader).bytes;
        copy_file_free(f);
    }
    if (result < 0)
        return error_wrap(err, "cannot copy image %s", image->name);
    report->images++;
    c->stored_before += imported.written.bytes_stored;
    return 0;
}

/* ---- what is there already ---- */

static int compare_files(struct file_reader *ra, struct file_reader *rb, bool *ret_same,
                         struct vm_error **err)
{
    cleanup_free struct recipe_leaf *leaves = malloc(2 * sizeof(*leaves));
    if (!leaves)
        return error_nomem(err);
    for (uint64_t at = 0; *ret_same && at * RECIPE_LEAF_BYTES < file_reader_size(ra); at++) {
        if (file_reader_leaf(ra, at, &leaves[0], err) < 0 ||
            file_reader_leaf(rb, at, &leaves[1], err) < 0)
            return -1;
        for (unsigned i = 0; *ret_same && i < RECIPE_LEAF_PAGES; i++) {
            const struct recipe_page *pa = &leaves[0].pages[i], *pb = &leaves[1].pages[i];
            *ret_same = !pa->len == !pb->len &&
                        (!pa->len || !memcmp(pa->id, pb->id, sizeof(pa->id)));
        }
    }
    return 0;
}

static int is_same(struct copy *c, const struct image *a, const struct image *b, bool *ret_same,
                   struct vm_error **err)
{
    *ret_same = a->n_files == b->n_files && a->created_s == b->created_s;
    for (unsigned i = 0; *ret_same && i < a->n_files; i++) {
        const struct image_entry *e = image_find_file(b, a->files[i].name);
        *ret_same = e && e->size == a->files[i].size;
        if (!*ret_same)
            break;
        CLEANUP(file_reader)
        struct file_reader *ra = file_reader_open(repo_store(c->from), a, &a->files[i], err);
        CLEANUP(file_reader)
        struct file_reader *rb = ra ? file_reader_open(repo_store(c->to), b, e, err) : NULL;
        if (!rb || compare_files(ra, rb, ret_same, err) < 0)
            return -1;
    }
    return 0;
}

/* Is an image of that name there? CONFLICT if it is another one. */
static int is_present(struct copy *c, const struct image *image, bool *ret_present,
                      struct vm_error **err)
{
    cleanup_error struct vm_error *failure = NULL;
    cleanup_free struct image *there = malloc(sizeof(*there));
    if (!there)
        return error_nomem(err);
    *ret_present = false;
    if (catalogue_find(repo_store(c->to), image->name, there, &failure) < 0)
        return failure->kind == VM_ERROR_NOT_FOUND ? 0
                                                   : error_propagate(err, steal_ptr(&failure));
    if (is_same(c, image, there, ret_present, err) < 0)
        return -1;
    if (!*ret_present)
        return error_set(err, VM_ERROR_CONFLICT,
                         "%s has another image named %s; nothing was copied",
                         store_text(repo_store(c->to)), image->name);
    return 0;
}

/* ---- all ---- */

struct image_list {
    struct image *images;
    size_t n, room;
    struct vm_error *left_out; /* the first entry of the catalogue that is no image */
};

static void note_left_out(const char *name, const struct vm_error *problem, void *arg)
{
    struct image_list *l = arg;
    (void)name;
    if (!l->left_out)
        l->left_out = error_copy(problem);
}

static int add_image(const struct image *image, void *arg, struct vm_error **err)
{
    struct image_list *l = arg;
    if (l->n == l->room) {
        size_t room = l->room ? 2 * l->room : 16;
        struct image *more = realloc(l->images, room * sizeof(*more));
        if (!more)
            return error_nomem(err);
        l->images = more;
        l->room = room;
    }
    l->images[l->n++] = *image;
    return 0;
}

static int by_age(const void *a, const void *b)
{
    const struct image *x = a, *y = b;
    return (x->writer > y->writer) - (x->writer < y->writer);
}

static int choose_images(struct copy *c, const char *name, struct image_list *l,
                         struct copy_report *report, struct vm_error **err)
{
    struct image *one = NULL;
    int result;
    if (name) {
        one = malloc(sizeof(*one));
        result = !one ? error_nomem(err) : catalogue_find(repo_store(c->from), name, one, err);
        if (!result)
            result = add_image(one, l, err);
        free(one);
    } else {
        result = catalogue_list(repo_store(c->from), add_image, note_left_out, l, err);
    }
    if (result < 0)
        return -1;
    size_t kept = 0;
    for (size_t i = 0; i < l->n; i++) {
        bool present;
        if (is_present(c, &l->images[i], &present, err) < 0)
            return -1;
        report->bytes += image_size(&l->images[i]);
        report->present += present;
        if (!present)
            l->images[kept++] = l->images[i];
    }
    l->n = kept;
    if (kept)
        qsort(l->images, kept, sizeof(*l->images), by_age);
    return 0;
}

static int copy_images(struct copy *c, const struct image_list *l,
                       const struct repo_control *control, struct copy_report *report,
                       struct vm_error **err)
{
    struct progress progress;
    uint64_t total = 0;
    int result = 0;
    for (size_t i = 0; i < l->n; i++)
        total += image_size(&l->images[i]);
    progress_init(&progress, control, total);
    c->progress = &progress;
    for (size_t i = 0; !result && i < l->n; i++)
        result = copy_image(c, &l->images[i], report, err);
    report->bytes_stored = c->stored_before;
    if (!result)
        progress_end(&progress, c->stored_before);
    progress_finish(&progress);
    return result;
}

int repo_copy(struct repo *from, struct repo *to, const char *name,
              const struct repo_control *control, struct copy_report *ret_report,
              struct vm_error **err)
{
    struct copy_report report = {0};
    struct image_list images = {0};
    cleanup_error struct vm_error *left_out = NULL;
    if (uuid_equal(repo_uuid(from), repo_uuid(to)))
        return error_set(err, VM_ERROR_CONFLICT, "%s is the repository that is to be copied",
                         store_text(repo_store(to)));
    cleanup_free struct copy *c = calloc(1, sizeof(*c));
    if (!c)
        return error_nomem(err);
    c->from = from;
    c->to = to;
    c->footers = footer_cache_create(repo_store(from), FOOTERS_BYTES, err);
    int result = c->footers ? choose_images(c, name, &images, &report, err) : -1;
    if (!result)
        result = copy_images(c, &images, control, &report, err);
    footer_cache_destroy(c->footers);
    free(images.images);
    left_out = images.left_out;
    if (!result && left_out) {
        error_propagate(err, steal_ptr(&left_out));
        return error_wrap(err, "all but this was copied");
    }
    if (!result)
        *ret_report = report;
    return result;
}

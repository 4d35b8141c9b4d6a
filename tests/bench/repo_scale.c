/* SPDX-License-Identifier: Apache-2.0 */
/*
 * repo_scale: how a repository in a folder behaves when it is large. It is made of footers, keys
 * and recipes alone: the records of its packs are holes, so that a TiB takes some ten GB.
 *
 *     repo_scale make FOLDER GIB         images of 16 GiB, a quarter of every second shared with the
 *                                        one before
 *     repo_scale share FOLDER GIB        one more image of GIB, of which nothing is new: stretches of
 *                                        4 MiB from all over
 *     repo_scale collect FOLDER          delete one image, and collect
 *
 * One JSON object each, with the seconds that it took and the most memory that was resident.
 * tests/bench/repo_scale.py runs all three for several sizes.
 */
#include "tests/peak.h"
#include "repo/collect.h"
#include "repo/names.h"

#include "base/clock.h"
#include "base/heap.h"
#include "base/io.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
    IMAGE_GIB = 16,
    IMAGE_LEAVES = IMAGE_GIB * 256,
    LEAF_EXTENTS = RECIPE_LEAF_PAGES / EXTENT_PAGES,
    SHARED_OF = 4,                 /* every fourth leaf of every second image is the former's */
    RECORD_BYTES = 24 << 10,       /* of a record of 16 pages: LZ4 on disks makes about that */
    PACK_LEAVES = 4,               /* 16 MiB of pages in 6 MiB of records */
    PACK_RECORDS = PACK_LEAVES * LEAF_EXTENTS,
    PACK_PAGES = PACK_RECORDS * EXTENT_PAGES,
    KEYS = 1 << 18,                /* entries of the index in one insertion */
};

/*
 * Making is synced once, at its end. On the way each transaction would write the random pages of the
 * index to the disk again, hundreds of times each.
 */
static bool sync_later;

int fdatasync(int fd)
{
    return sync_later ? 0 : (int)syscall(SYS_fdatasync, fd);
}

int fsync(int fd)
{
    return sync_later ? 0 : (int)syscall(SYS_fsync, fd);
}

static uint64_t mix(uint64_t x)
{
    x += 0x9e3779b97f4a7c15;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
    x = (x ^ x >> 27) * 0x94d049bb133111eb;
    return x ^ x >> 31;
}

/* The identity of a page that no data has: all that matters is that it is spread as a SHA-256. */
static struct page_id id_of(uint64_t image, uint64_t page)
{
    struct page_id id;
    uint64_t seed = mix(image << 40 ^ page);
    for (unsigned i = 0; i < 4; i++)
        put_le64(id.bytes + 8 * i, mix(seed + i));
    return id;
}

/* Where leaf `leaf` of an image comes from: itself, or the image before it. */
static uint64_t owner_of(uint64_t image, uint64_t leaf)
{
    return image % 2 && leaf % SHARED_OF == 0 ? image - 1 : image;
}

/* ---- making ---- */

struct maker {
    struct repo *repo;
    const char *folder;
    struct page_hasher hasher;
    uint64_t image, writer; /* the image's number from 0, its writer's number */
    uint64_t former;        /* the writer of the image before */
    struct tree_writer *trees;
    struct file_tree *file;
    struct object_set shared;
    struct index_entry *keys;
    size_t n_keys;
    struct footer footer;
};

static uint64_t pack_number(uint64_t writer, uint64_t leaf)
{
    return writer << NUMBER_COUNT_BITS | (leaf / PACK_LEAVES + 1);
}

/* A pack whose records are a hole. */
static int write_pack(struct maker *m, struct vm_error **err)
{
    cleanup_buffer struct buffer b = {0};
    uint8_t header[PACK_HEADER];
    char path[4096];
    const char *name = pack_name(m->footer.pack);
    unsigned h = 2166136261u;
    for (const char *c = name; *c; c++)
        h = (h ^ (unsigned char)*c) * 16777619u;
    snprintf(path, sizeof(path), "%s/packs/%02x/%s", m->folder, (h ^ h >> 8 ^ h >> 16) % 256, name);
    cleanup_close int fd = open(path, O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0600);
    pack_header_write(header, m->footer.pack, repo_uuid(m->repo));
    footer_write(&m->footer, &b);
    off_t at = PACK_HEADER + (off_t)m->footer.n_records * RECORD_BYTES;
    if (b.failed)
        return error_nomem(err);
    if (fd < 0 || pwrite(fd, header, sizeof(header), 0) != sizeof(header) ||
        pwrite(fd, b.data, b.len, at) != (ssize_t)b.len)
        return error_errno(err, errno, "cannot write %s", path);
    m->footer.n_records = m->footer.n_pages = 0;
    return 0;
}

static int flush_keys(struct maker *m, struct vm_error **err)
{
    size_t n = m->n_keys;
    m->n_keys = 0;
    return index_insert(repo_index(m->repo), m->keys, n, err);
}

static int add_key(struct maker *m, enum index_kind kind, const struct page_id *id, uint64_t pack,
                   struct vm_error **err)
{
    uint8_t value[8];
    put_le64(value, pack);
    m->keys[m->n_keys++] = index_entry_make(kind, id, value, sizeof(value));
    return m->n_keys == KEYS ? flush_keys(m, err) : 0;
}

/* One record of the leaf, in the pack that is being made. */
static int make_record(struct maker *m, const struct page_id *ids, struct vm_error **err)
{
    struct footer *f = &m->footer;
    struct page_id extent;
    memcpy(&f->ids[f->n_pages], ids, EXTENT_PAGES * sizeof(*ids));
    f->records[f->n_records] = (struct footer_record){
        .offset = PACK_HEADER + f->n_records * RECORD_BYTES, .len = RECORD_BYTES,
        .first_page = (uint16_t)f->n_pages, .mask = 0xffff, .n_pages = EXTENT_PAGES,
        .compression = RECORD_LZ4};
    f->n_records++;
    f->n_pages += EXTENT_PAGES;
    for (unsigned i = 0; i < EXTENT_PAGES; i++)
        if (index_samples(&ids[i]) && add_key(m, INDEX_PAGE, &ids[i], f->pack, err) < 0)
            return -1;
    if (page_hasher_extent(&m->hasher, ids, 0xffff, &extent, err) < 0)
        return -1;
    return add_key(m, INDEX_EXTENT, &extent, f->pack, err);
}

static int make_leaf(struct maker *m, uint64_t leaf, struct vm_error **err)
{
    static struct recipe_leaf node;
    struct page_id ids[RECIPE_LEAF_PAGES];
    uint64_t owner = owner_of(m->image, leaf), pack;
    bool own = owner == m->image;
    pack = pack_number(own ? m->writer : m->former, leaf);
    if (own && pack != m->footer.pack && m->footer.n_records && write_pack(m, err) < 0)
        return -1;
    if (own)
        m->footer.pack = pack;
    else if (number_set_add(&m->shared.packs, pack, err) < 0)
        return -1;
    /* The first leaf of an image's pack may be the former image's: then the others come earlier. */
    uint64_t before = leaf % PACK_LEAVES;
    for (uint64_t l = leaf - before; l < leaf; l++)
        before -= owner_of(owner, l) != owner;
    for (unsigned i = 0; i < RECIPE_LEAF_PAGES; i++) {
        struct recipe_page *p = &node.pages[i];
        ids[i] = id_of(owner, leaf * RECIPE_LEAF_PAGES + i);
        *p = (struct recipe_page){
            .pack = pack, .len = RECORD_BYTES, .page = i % EXTENT_PAGES,
            .offset = PACK_HEADER + (uint32_t)(before * LEAF_EXTENTS + i / EXTENT_PAGES) *
                                        RECORD_BYTES};
        memcpy(p->id, ids[i].bytes, sizeof(p->id));
    }
    for (unsigned i = 0; own && i < RECIPE_LEAF_PAGES; i += EXTENT_PAGES)
        if (make_record(m, ids + i, err) < 0)
            return -1;
    cleanup_buffer struct buffer b = {0};
    struct recipe_ref ref;
    recipe_leaf_write(&node, &b);
    if (b.failed)
        return error_nomem(err);
    if (tree_writer_add(m->trees, b.data, b.len, false, &ref, err) < 0)
        return -1;
    return file_tree_set(m->file, leaf, &ref, err);
}

static int make_image(struct maker *m, struct vm_error **err)
{
    struct image image = {.n_files = 1, .files[0] = {.name = "disk0.raw",
                                                     .size = (uint64_t)IMAGE_GIB << 30}};
    struct object_set nothing = {{0}, {0}};
    snprintf(image.name, sizeof(image.name), "image%" PRIu64, m->image);
    CLEANUP(registration)
    struct registration *r = catalogue_register(repo_store(m->repo), image.name, NULL, err);
    if (!r)
        return -1;
    m->writer = image.writer = registration_number(r);
    CLEANUP(tree_writer)
    struct tree_writer *trees =
        tree_writer_create(repo_store(m->repo), repo_index(m->repo), repo_uuid(m->repo), m->writer,
                           &nothing.trees, &m->shared.trees, err);
    CLEANUP(file_tree)
    struct file_tree *file =
        trees ? file_tree_create(repo_store(m->repo), image.files[0].size, NULL, 0, err) : NULL;
    if (!file)
        return -1;
    m->trees = trees;
    m->file = file;
    for (uint64_t leaf = 0; leaf < IMAGE_LEAVES; leaf++)
        if (make_leaf(m, leaf, err) < 0)
            return -1;
    if ((m->footer.n_records && write_pack(m, err) < 0) ||
        file_tree_finish(file, trees, &image.files[0].root, err) < 0 ||
        tree_writer_finish(trees, err) < 0 || flush_keys(m, err) < 0 ||
        catalogue_commit(r, &image, &m->shared, err) < 0)
        return -1;
    m->former = m->writer;
    return 0;
}

static int make(const char *url, const char *folder, unsigned gib, struct vm_error **err)
{
    sync_later = true;
    if (repo_init(url, NULL, err) < 0)
        return -1;
    CLEANUP(repo) struct repo *r = repo_open(url, err);
    struct maker m = {.repo = r, .folder = folder, .keys = calloc(KEYS, sizeof(*m.keys)),
                      .footer = {.records = calloc(PACK_RECORDS, sizeof(*m.footer.records)),
                                 .ids = calloc(PACK_PAGES, sizeof(*m.footer.ids))}};
    int result = !r ? -1
                 : !m.keys || !m.footer.records || !m.footer.ids
                     ? error_nomem(err)
                     : page_hasher_init(&m.hasher, err);
    uint64_t images = (uint64_t)gib / IMAGE_GIB;
    for (m.image = 0; !result && m.image < images; m.image++)
        result = make_image(&m, err);
    page_hasher_finish(&m.hasher);
    object_set_finish(&m.shared);
    footer_finish(&m.footer);
    free(m.keys);
    sync_later = false;
    sync();
    if (!result)
        printf("{\"images\": %" PRIu64, images);
    return result;
}

/* ---- sharing ---- */

static int nothing_is_read(struct segment *s, const bool wanted[SEGMENT_PAGES], void *arg,
                           struct vm_error **err)
{
    (void)arg;
    (void)err;
    for (unsigned i = 0; i < SEGMENT_PAGES; i++)
        if (wanted[i])
            memset(s->data + (size_t)i * PAGE_BYTES, 1, PAGE_BYTES);
    return 0;
}

static int put_segment(struct image_writer *w, struct image_file *f, uint64_t number,
                       uint64_t images, struct vm_error **err)
{
    enum { PER_LEAF = RECIPE_LEAF_PAGES / SEGMENT_PAGES };
    struct segment *s = image_writer_segment(w, f, number, err);
    if (!s)
        return -1;
    uint64_t at = mix(number / PER_LEAF), image = at % images, leaf = at / images % IMAGE_LEAVES;
    image = owner_of(image, leaf);
    for (unsigned i = 0; i < SEGMENT_PAGES; i++) {
        s->state[i] = PAGE_UNKNOWN;
        s->ids[i] = id_of(image, leaf * RECIPE_LEAF_PAGES + number % PER_LEAF * SEGMENT_PAGES + i);
    }
    image_writer_put_known(w, s, nothing_is_read, NULL);
    return 0;
}

static int count_one(const struct image *image, void *arg, struct vm_error **err)
{
    (void)err;
    *(uint64_t *)arg += !strncmp(image->name, "image", 5);
    return 0;
}

static int share(const char *url, unsigned gib, struct vm_error **err)
{
    struct import_report report;
    uint64_t images = 0, segments = (uint64_t)gib << 10;
    CLEANUP(repo) struct repo *r = repo_open(url, err);
    if (!r || catalogue_list(repo_store(r), count_one, NULL, &images, err) < 0)
        return -1;
    CLEANUP(image_session)
    struct image_session *session = image_session_begin(r, "shares", NULL, err);
    struct image_file *f =
        session ? image_session_file(session, "disk0.raw", segments * SEGMENT_BYTES, err) : NULL;
    if (!f)
        return -1;
    for (uint64_t i = 0; i < segments; i++)
        if (put_segment(image_session_writer(session), f, i, images, err) < 0)
            return -1;
    if (image_session_commit(session, &report, err) < 0)
        return -1;
    printf("{\"pages\": %" PRIu64 ", \"shared\": %" PRIu64 ", \"lookups\": %" PRIu64
           ", \"footers\": %" PRIu64 ", \"stored\": %" PRIu64,
           segments * SEGMENT_PAGES, report.written.pages_shared, report.written.index_lookups,
           report.written.footers_loaded, report.written.bytes_stored);
    return 0;
}

/* ---- collecting ---- */

static int collect(const char *url, struct vm_error **err)
{
    struct collect_options options = {.control.cancel_fd = -1};
    struct collect_report report;
    CLEANUP(repo) struct repo *r = repo_open(url, err);
    if (!r || catalogue_delete(repo_store(r), "image1", err) < 0 ||
        repo_collect(r, &options, &report, err) < 0)
        return -1;
    printf("{\"packs\": %" PRIu64 ", \"trees\": %" PRIu64, report.packs, report.trees);
    return 0;
}

int main(int argc, char **argv)
{
    cleanup_error struct vm_error *err = NULL;
    heap_give_back();
    char url[4096];
    int64_t started = clock_mono_ns();
    unsigned gib = argc > 3 ? (unsigned)atoi(argv[3]) : 0;
    int result = 2;
    if (argc > 2) {
        snprintf(url, sizeof(url), "dir:%s", argv[2]);
        if (!strcmp(argv[1], "make") && gib >= 2 * IMAGE_GIB)
            result = make(url, argv[2], gib, &err);
        else if (!strcmp(argv[1], "share") && gib)
            result = share(url, gib, &err);
        else if (!strcmp(argv[1], "collect"))
            result = collect(url, &err);
    }
    if (result == 2)
        fprintf(stderr, "usage: repo_scale make|share FOLDER GIB | collect FOLDER\n");
    else if (result < 0)
        fprintf(stderr, "%s\n", error_message(err));
    else
        printf(", \"seconds\": %.3f, \"rss_kib\": %ld}\n",
               (double)(clock_mono_ns() - started) / 1e9, peak_kib());
    return result < 0 ? 1 : result;
}

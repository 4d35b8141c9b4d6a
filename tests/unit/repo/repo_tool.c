/* SPDX-License-Identifier: Apache-2.0 */
/*
 * repo_tool: the functions of repo/repo.h as commands, for the system tests. One JSON object per
 * line on standard output; errors as "KIND: message" on standard error, with the kind's exit
 * status.
 *
 *     repo_tool URL init [DATA-POOL] | stat | list | collect [FENCE-AFTER-MS
 *     [repack|recompress [DEAD-PERCENT [ZSTD-LEVEL]]]] | scrub [OLDER-THAN-S [heal]] |
 *     rebuild-index
 *     repo_tool URL import FILE NAME [FORMAT|- [PARENT]] | export NAME FILE | show NAME |
 *     delete NAME | diff A B | scatter NAME | lease NAME HOLDER | unlease HOLDER FILE
 *
 * `unlease` writes what the holder leases into the file, and drops the lease.
 *
 * VMMIG_TUNE="CACHE-BYTES RECORDS-MAX [SHARD-KEYS]" sets what repo_tune does, for measurements, and how
 * many keys a shard of the index may have. `scatter` tells for
 * the first file of an image how many records a MiB refers to, and how much is read to restore it.
 */
#include "tests/peak.h"
#include "repo/collect.h"
#include "repo/repo.h"
#include "repo/scrub.h"

#include "base/clock.h"
#include "base/fault.h"
#include "base/heap.h"
#include "base/io.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>

static const char *arg_of(int argc, char **argv, int i)
{
    return i < argc && strcmp(argv[i], "-") != 0 ? argv[i] : NULL;
}

static int list_one(const struct image *image, void *arg, struct vm_error **err)
{
    (void)arg;
    (void)err;
    printf("{\"name\": \"%s\", \"size\": %" PRIu64 ", \"files\": %u}\n", image->name,
           image_size(image), image->n_files);
    return 0;
}

static int diff_one(const struct image_difference *d, void *arg, struct vm_error **err)
{
    (void)arg;
    (void)err;
    printf("{\"file\": \"%s\", \"offset\": %" PRIu64 ", \"len\": %" PRIu64 "}\n", d->file,
           d->offset, d->len);
    return 0;
}

/* What a verb takes from usage_begin on: not the start of this program, nor opening the repository. */
struct usage {
    int64_t at_ns;
    double cpu;
};

static double cpu_seconds(void)
{
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (double)u.ru_utime.tv_sec + (double)u.ru_stime.tv_sec +
           (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec) / 1e6;
}

static struct usage usage_begin(void)
{
    return (struct usage){clock_mono_ns(), cpu_seconds()};
}

static void print_usage(const struct usage *began)
{
    printf(", \"seconds\": %.3f, \"cpu\": %.3f, \"rss_kib\": %ld}\n",
           (double)(clock_mono_ns() - began->at_ns) / 1e9, cpu_seconds() - began->cpu, peak_kib());
}

static int run_import(struct repo *r, int argc, char **argv, struct vm_error **err)
{
    struct import_options o = {.format = arg_of(argc, argv, 5), .parent = arg_of(argc, argv, 6),
                               .control.cancel_fd = -1};
    struct import_report report;
    struct usage began = usage_begin();
    if (image_import(r, argv[3], argv[4], &o, &report, err) < 0)
        return -1;
    const struct image_writer_stat *w = &report.written;
    printf("{\"size\": %" PRIu64 ", \"zero\": %" PRIu64 ", \"shared\": %" PRIu64
           ", \"new\": %" PRIu64 ", \"again\": %" PRIu64 ", \"stored\": %" PRIu64
           ", \"footers\": %" PRIu64 ", \"lookups\": %" PRIu64 ", \"hits\": %" PRIu64
           ", \"nodes\": %" PRIu64 ", \"nodes_shared\": %" PRIu64,
           report.size, w->pages_zero, w->pages_shared, w->pages_new, w->pages_again,
           w->bytes_stored, w->footers_loaded, w->index_lookups, w->index_hits, w->nodes,
           w->nodes_shared);
    print_usage(&began);
    return 0;
}

static int run_export(struct repo *r, int argc, char **argv, struct vm_error **err)
{
    struct repo_control control = {.cancel_fd = -1};
    struct usage began = usage_begin();
    if (image_export(r, argv[3], argc > 5 ? argv[5] : NULL, argv[4], &control, err) < 0)
        return -1;
    printf("{\"exported\": true");
    print_usage(&began);
    return 0;
}

static int run_show(struct repo *r, char **argv, struct vm_error **err)
{
    static struct image_show s;
    if (image_show(r, argv[3], &s, err) < 0)
        return -1;
    printf("{\"name\": \"%s\", \"parent\": \"%s\", \"virtual\": %" PRIu64 ", \"data\": %" PRIu64
           ", \"stored\": %" PRIu64 ", \"shared\": %" PRIu64 ", \"unique\": %" PRIu64
           ", \"recipe\": %" PRIu64 ", \"unreadable\": %" PRIu64
           ", \"estimated\": %s, \"sharers\": {",
           s.image.name, s.image.parent, s.sizes.virtual_bytes, s.sizes.data_bytes,
           s.sizes.stored_bytes, s.sizes.shared_bytes, s.sizes.unique_bytes, s.sizes.recipe_bytes,
           s.sizes.unreadable, s.sizes.estimated ? "true" : "false");
    for (size_t i = 0; i < s.n_sharers; i++)
        printf("%s\"%s\": %" PRIu64, i ? ", " : "", s.sharers[i].name, s.sharers[i].bytes);
    printf("}}\n");
    free(s.sharers);
    return 0;
}

static int by_number(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

/* Distinct records of one MiB, and their bytes. */
static unsigned count_records(const struct recipe_page *pages, uint64_t *bytes)
{
    uint64_t places[SEGMENT_PAGES];
    unsigned n = 0;
    for (unsigned i = 0; i < SEGMENT_PAGES; i++) {
        uint64_t place = pages[i].pack << 20 ^ pages[i].offset / 8;
        bool seen = !pages[i].len;
        for (unsigned j = 0; j < n && !seen; j++)
            seen = places[j] == place;
        if (seen)
            continue;
        places[n++] = place;
        *bytes += pages[i].len;
    }
    return n;
}

static int run_scatter(struct repo *r, char **argv, struct vm_error **err)
{
    static struct image image;
    static struct recipe_leaf leaf;
    uint64_t counts[1 << 16], n = 0, data = 0, stored = 0;
    if (catalogue_find(repo_store(r), argv[3], &image, err) < 0)
        return -1;
    CLEANUP(file_tree)
    struct file_tree *t = file_tree_create(repo_store(r), image.files[0].size, &image.files[0].root,
                                           image.files[0].size, err);
    for (uint64_t i = 0; t && i < file_tree_leaves(t); i++) {
        struct recipe_ref ref;
        if (file_tree_get(t, i, &ref, err) < 0 ||
            tree_read_leaf(repo_store(r), &ref, &leaf, err) < 0)
            return -1;
        for (unsigned j = 0; j < RECIPE_LEAF_PAGES; j++)
            data += leaf.pages[j].len ? PAGE_BYTES : 0;
        for (unsigned j = 0; j < RECIPE_LEAF_PAGES && n < 1 << 16; j += SEGMENT_PAGES) {
            counts[n] = count_records(leaf.pages + j, &stored);
            n += counts[n] > 0;
        }
    }
    if (!n)
        return t ? error_set(err, VM_ERROR_NOT_FOUND, "image %s is empty", argv[3]) : -1;
    qsort(counts, n, sizeof(*counts), by_number);
    printf("{\"median\": %" PRIu64 ", \"p90\": %" PRIu64 ", \"most\": %" PRIu64
           ", \"data\": %" PRIu64 ", \"read\": %" PRIu64 "}\n",
           counts[n / 2], counts[n * 9 / 10], counts[n - 1], data, stored);
    return 0;
}

static int run_stat(struct repo *r, struct vm_error **err)
{
    struct repo_stat s;
    if (repo_stat(r, &s, err) < 0)
        return -1;
    printf("{\"uuid\": \"%s\", \"images\": %" PRIu64 ", \"image_bytes\": %" PRIu64
           ", \"packs\": %" PRIu64 ", \"pack_bytes\": %" PRIu64 ", \"trees\": %" PRIu64
           ", \"tree_bytes\": %" PRIu64 ", \"shards\": %u, \"keys\": %" PRIu64 "}\n",
           uuid_text(&s.uuid), s.images, s.image_bytes, s.packs, s.pack_bytes, s.trees,
           s.tree_bytes, s.index.shards, s.index.keys);
    return 0;
}

static int run_collect(struct repo *r, int argc, char **argv, struct vm_error **err)
{
    struct collect_options o = {.control.cancel_fd = -1};
    struct collect_report report;
    o.fence_after_ns = argc > 3 ? atol(argv[3]) * NSEC_PER_MSEC : 0;
    o.recompress = argc > 4 && !strcmp(argv[4], "recompress");
    o.repack = argc > 4;
    o.dead_percent = argc > 5 ? (unsigned)atoi(argv[5]) : 0;
    o.zstd_level = argc > 6 ? atoi(argv[6]) : 0;
    if (repo_collect(r, &o, &report, err) < 0)
        return -1;
    printf("{\"adopted\": %s, \"condemned\": %" PRIu64 ", \"packs\": %" PRIu64
           ", \"trees\": %" PRIu64 ", \"bytes\": %" PRIu64 ", \"fenced\": %" PRIu64
           ", \"repacked\": %" PRIu64 ", \"repacked_from\": %" PRIu64 ", \"repacked_to\": %" PRIu64
           ", \"settled\": %" PRIu64 ", \"lacked_space\": %s}\n",
           report.adopted ? "true" : "false", report.condemned, report.packs, report.trees,
           report.bytes, report.writers_fenced, report.repacked, report.repacked_from,
           report.repacked_to, report.settled, report.repack_lacked_space ? "true" : "false");
    return 0;
}

static void print_finding(enum scrub_kind kind, const char *what, void *arg)
{
    (void)arg;
    static const char *const kinds[] = {[SCRUB_PACK] = "damage", [SCRUB_IMAGE] = "image",
                                        [SCRUB_FORWARDING] = "forwarding"};
    printf("{\"%s\": \"%s\"}\n", kinds[kind], what);
}

static int run_scrub(struct repo *r, int argc, char **argv, struct vm_error **err)
{
    struct scrub_report report;
    struct scrub_options o = {.heal = argc > 4};
    o.older_than_s = argc > 3 ? (uint64_t)atol(argv[3]) : 0;
    if (scrub_run(r, &o, print_finding, NULL, &report, err) < 0)
        return -1;
    printf("{\"packs\": %" PRIu64 ", \"bytes\": %" PRIu64 ", \"images\": %" PRIu64
           ", \"damaged\": %" PRIu64 ", \"touched\": %" PRIu64 ", \"healed\": %" PRIu64
           ", \"skipped\": %" PRIu64 ", \"oldest\": %" PRIu64 "}\n",
           report.packs, report.bytes, report.images, report.damaged, report.images_touched,
           report.healed, report.packs_skipped, report.oldest_s);
    return 0;
}

static int run_rebuild(struct repo *r, struct vm_error **err)
{
    struct rebuild_report report;
    if (repo_rebuild_index(r, NULL, &report, err) < 0)
        return -1;
    printf("{\"packs\": %" PRIu64 ", \"entries\": %" PRIu64 "}\n", report.packs, report.entries);
    return 0;
}

/* ---- leases ---- */

static int run_lease(struct repo *r, char **argv, struct vm_error **err)
{
    static struct lease lease;
    return catalogue_lease(repo_store(r), argv[3], argv[4], &lease, err);
}

struct lease_search {
    const char *holder;
    bool found;
    struct lease lease;
};

static int find_lease(const struct lease *lease, void *arg, struct vm_error **err)
{
    struct lease_search *s = arg;
    (void)err;
    if (strcmp(lease->holder, s->holder) != 0)
        return 0;
    s->found = true;
    s->lease = *lease;
    return 0;
}

/* The first file of what is leased, into `path`; then the lease is dropped. */
static int run_unlease(struct repo *r, char **argv, struct vm_error **err)
{
    static struct lease_search search;
    enum { PART = 1 << 20 };
    search.holder = argv[3];
    if (catalogue_leases(repo_store(r), find_lease, NULL, &search, err) < 0)
        return -1;
    if (!search.found)
        return error_set(err, VM_ERROR_NOT_FOUND, "%s holds no lease", argv[3]);
    const struct image_entry *e = &search.lease.image.files[0];
    CLEANUP(file_reader)
    struct file_reader *f = file_reader_create(repo_store(r), &e->root, e->size, err);
    cleanup_free uint8_t *part = malloc(PART);
    FILE *out = fopen(argv[4], "wb");
    int result = f && part && out ? 0 : -1;
    for (uint64_t at = 0; !result && at < e->size; at += PART) {
        size_t n = e->size - at < PART ? (size_t)(e->size - at) : PART;
        result = file_reader_read(f, at, part, n, err);
        if (!result && fwrite(part, 1, n, out) != n)
            result = error_errno(err, errno, "cannot write %s", argv[4]);
    }
    if (out && fclose(out) != 0 && !result)
        result = error_errno(err, errno, "cannot write %s", argv[4]);
    return result < 0 ? -1 : catalogue_lease_drop(repo_store(r), &search.lease, err);
}

static void tune(struct repo *r)
{
    struct repo_tuning tuning = {0};
    const char *text = getenv("VMMIG_TUNE");
    uint64_t shard_keys = 0;
    if (!r || !text || sscanf(text, "%zu %u %" SCNu64, &tuning.cache_bytes, &tuning.records_max,
                              &shard_keys) < 2)
        return;
    repo_tune(r, &tuning);
    if (shard_keys)
        index_limit_shards(repo_index(r), shard_keys);
}

static int run(int argc, char **argv, struct vm_error **err)
{
    const char *verb = argc > 2 ? argv[2] : "";
    struct repo_init_options init = {.data_pool = arg_of(argc, argv, 3)};
    if (!strcmp(verb, "init"))
        return repo_init(argv[1], &init, err);
    CLEANUP(repo) struct repo *r = argc > 2 ? repo_open(argv[1], err) : NULL;
    if (argc > 2 && !r)
        return -1;
    tune(r);
    if (!strcmp(verb, "stat"))
        return run_stat(r, err);
    if (!strcmp(verb, "collect"))
        return run_collect(r, argc, argv, err);
    if (!strcmp(verb, "scrub"))
        return run_scrub(r, argc, argv, err);
    if (!strcmp(verb, "rebuild-index"))
        return run_rebuild(r, err);
    if (!strcmp(verb, "list"))
        return catalogue_list(repo_store(r), list_one, NULL, NULL, err);
    if (!strcmp(verb, "import") && argc > 4)
        return run_import(r, argc, argv, err);
    if (!strcmp(verb, "export") && argc > 4)
        return run_export(r, argc, argv, err);
    if (!strcmp(verb, "show") && argc > 3)
        return run_show(r, argv, err);
    if (!strcmp(verb, "delete") && argc > 3)
        return catalogue_delete(repo_store(r), argv[3], err);
    if (!strcmp(verb, "lease") && argc > 4)
        return run_lease(r, argv, err);
    if (!strcmp(verb, "unlease") && argc > 4)
        return run_unlease(r, argv, err);
    if (!strcmp(verb, "scatter") && argc > 3)
        return run_scatter(r, argv, err);
    if (!strcmp(verb, "diff") && argc > 4)
        return image_diff(r, argv[3], argv[4], diff_one, NULL, err);
    return error_set(err, VM_ERROR_USAGE, "usage: repo_tool URL VERB ...; see its source");
}

int main(int argc, char **argv)
{
    cleanup_error struct vm_error *err = NULL;
    heap_give_back(); /* as the programs that users have */
    if (fault_init(&err) == 0 && run(argc, argv, &err) == 0)
        return 0;
    fprintf(stderr, "%s: %s\n", error_kind_name(err->kind), error_message(err));
    return error_kind_status(err->kind);
}

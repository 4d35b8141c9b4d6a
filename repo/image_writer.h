/* SPDX-License-Identifier: Apache-2.0 */
/*
 * image_writer: turns the pages of files into packs and recipes.
 *
 *     w = image_writer_create(&setup, &err)
 *     file = image_writer_add_file(w, size, base, &err)             as often as there are files
 *     loop: segment = image_writer_segment(w, file, number, &err)   memory, waits for its turn
 *           fill segment->data, set segment->given[page]
 *           image_writer_put(w, segment)                            takes it back
 *     image_writer_finish(w, &err)                                  all packs and trees are durable
 *     image_writer_root(file)                                       what the catalogue is to name
 *     image_writer_destroy(w)
 *
 * Segments come in any order, of any file, from any number of threads; pages that are never given
 * are those of `base` (the recipe of a former version), or zero. A segment given twice: the later
 * put counts. A file's pages beyond its size must be zero.
 *
 * Inside: workers hash, one thread (the sequencer) looks up, places new pages into records and
 * keeps the recipes, workers compress, two threads store packs. All memory is bounded: SEGMENTS_MAX
 * MiB of segments, three packs, the footer cache, 32 KiB per leaf being put together, 6 KiB per GiB
 * of a file.
 *
 * Errors: the first one ends everything; every function returns it from then on. After a crash what
 * was written is garbage that no commit names.
 */
#ifndef VMMIG_REPO_IMAGE_WRITER_H
#define VMMIG_REPO_IMAGE_WRITER_H

#include "base/uuid.h"
#include "repo/condemned.h"
#include "repo/dedup.h"
#include "repo/pack_writer.h"
#include "repo/tree.h"

enum { SEGMENTS_MAX = 9 };

struct image_writer;
struct image_file;

struct image_writer_setup {
    struct store *store;
    struct index *index;
    struct uuid repository;
    uint64_t writer;     /* the number under which it is registered */
    /* Nothing of it is shared; changes in checkpoints alone. */
    const struct object_set *condemned;
    /*
     * Called by the sequencer before each batch and twice a second without work, while nothing is
     * shared; *ret_changed: *condemned did change. `shared`: the packs and trees of others that
     * were shared so far. NULL: never.
     */
    int (*checkpoint)(void *arg, const struct object_set *shared, bool *ret_changed,
                      struct vm_error **err);
    void *checkpoint_arg;
    size_t cache_bytes;  /* of the footer cache */
    unsigned records_max; /* per MiB; 0: DEDUP_RECORDS_MAX */
    enum record_compression compression;
    int zstd_level;
};

struct image_writer *image_writer_create(const struct image_writer_setup *setup,
                                         struct vm_error **err);
void image_writer_destroy(struct image_writer *w);
DEFINE_CLEANUP(image_writer, struct image_writer *, image_writer_destroy)

/* The file belongs to the writer. `base` may be NULL; its size may differ from this file's. */
struct image_file *image_writer_add_file(struct image_writer *w, uint64_t size,
                                         const struct recipe_ref *base, uint64_t base_size,
                                         struct vm_error **err);
struct segment *image_writer_segment(struct image_writer *w, struct image_file *file,
                                     uint64_t number, struct vm_error **err);
void image_writer_put(struct image_writer *w, struct segment *segment);
/*
 * As image_writer_put, for a segment whose identities are known: the caller has filled state (ABSENT,
 * ZEROS, UNKNOWN) and ids instead of data and given. `read` is called by the sequencer if some pages
 * are new: it fills data where wanted[page], after checking that it is what ids says. It gets the
 * segment's `number` and `ids`.
 */
typedef int segment_read_fn(struct segment *s, const bool wanted[SEGMENT_PAGES], void *arg,
                            struct vm_error **err);
void image_writer_put_known(struct image_writer *w, struct segment *segment, segment_read_fn *read,
                            void *arg);
int image_writer_finish(struct image_writer *w, struct vm_error **err);
struct recipe_ref image_writer_root(const struct image_file *file);
/* The packs and trees of others that were shared; after finish. */
const struct object_set *image_writer_shared(const struct image_writer *w);

struct image_writer_stat {
    uint64_t pages_zero, pages_shared, pages_new; /* so far */
    uint64_t pages_again; /* of the new: stored before, again for the bound */
    uint64_t bytes_stored;                        /* packs and trees */
    uint64_t footers_loaded, index_lookups, index_hits;
    uint64_t nodes, nodes_shared;
    uint64_t packs; /* stored; their numbers count from 1 */
};
/* From any thread, at any time. */
void image_writer_stat(struct image_writer *w, struct image_writer_stat *ret_stat);

#endif

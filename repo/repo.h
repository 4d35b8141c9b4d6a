/* SPDX-License-Identifier: Apache-2.0 */
/*
 * repo: the repository as its users see it: open it, put images in, get them out. Everything else
 * in this folder serves these functions; docs/repository-format.md is the format on the store.
 *
 *     struct repo *r = repo_open("dir:/var/lib/vmmig/repo", &err);
 *     image_import(r, "debian.qcow2", "debian12", &(struct import_options){0}, &report, &err);
 *     image_export(r, "debian12", NULL, "/tmp/debian.raw", NULL, &err);
 *     repo_close(r);
 *
 * Threads: any; a repository may be used by several at once. Any number of processes and hosts may
 * have the same repository open (a dir: repository: processes of one host).
 *
 * Memory of one import: at most 64 MiB, librados' own included, and 64 MiB per TiB of unique data in
 * the repository, in a program that has called heap_give_back (base/heap.h). Of one export: 4 MiB per
 * thread and what it read.
 *
 * Crash: what image_import acknowledged is there, whole; an import that did not end left nothing
 * visible.
 */
#ifndef VMMIG_REPO_REPO_H
#define VMMIG_REPO_REPO_H

#include "repo/catalogue.h"
#include "repo/file_reader.h"
#include "repo/image_writer.h"
#include "repo/repo_control.h"

struct repo;

struct repo_init_options {
    const char *data_pool; /* rados: packs go to this pool (it may be erasure coded); NULL: to that
                              of the URL */
};

/* Make an empty repository there. CONFLICT if there is one. */
int repo_init(const char *url, const struct repo_init_options *options, struct vm_error **err);
/* NOT_FOUND if there is none; VERSION if it is of another version. */
struct repo *repo_open(const char *url, struct vm_error **err);
/* As repo_open, on a store that is open already (which it then owns, on success). */
struct repo *repo_open_store(struct store *s, struct vm_error **err);
void repo_close(struct repo *r);
DEFINE_CLEANUP(repo, struct repo *, repo_close)
struct store *repo_store(struct repo *r);
struct index *repo_index(struct repo *r);
const struct uuid *repo_uuid(const struct repo *r);

/* For measurements and tests, before the first writer: what is 0 is as always. */
struct repo_tuning {
    size_t cache_bytes;   /* of a writer's footer cache */
    unsigned records_max; /* that a MiB of an image may refer to */
    unsigned checkpoint_ms; /* how often a writer at work looks whether a collection has begun */
};
void repo_tune(struct repo *r, const struct repo_tuning *tuning);

struct repo_stat {
    struct uuid uuid;
    uint64_t images, image_bytes; /* names, and the sum of their sizes */
    uint64_t damaged;             /* entries of the catalogue that cannot be used: not counted */
    uint64_t leases, oldest_lease_s; /* of the oldest: when it was taken, by whom, of what */
    char oldest_lease_holder[IMAGE_NAME_MAX + 1], oldest_lease_image[IMAGE_NAME_MAX + 1];
    uint64_t packs, pack_bytes, trees, tree_bytes;
    struct index_stat index;
    struct store_space space;
};
/* Lists all objects: seconds per million of packs. */
int repo_stat(struct repo *r, struct repo_stat *ret_stat, struct vm_error **err);

/* ---- writing an image ---- */

/*
 * For writers of any kind (import, snapshots): registers under `name`, and gives an image_writer to
 * fill.
 *
 *     s = image_session_begin(r, "web1@monday", parent or NULL, &err)
 *     for each file:
 *         file = image_session_file(s, "disk0.raw", size, &err)
 *         image_writer_segment, image_writer_put ... on image_session_writer(s)
 *     image_session_commit(s, &report, &err)
 *     image_session_end(s)       always; without a commit nothing remains visible
 *
 * What a file is not given it has of the parent's file of that name, or it is zero.
 */
struct image_session;

struct import_report {
    uint64_t size;                    /* bytes of all files */
    struct image_writer_stat written;
};

struct image_session *image_session_begin(struct repo *r, const char *name, const char *parent,
                                          struct vm_error **err);
void image_session_end(struct image_session *s);
DEFINE_CLEANUP(image_session, struct image_session *, image_session_end)
struct image_writer *image_session_writer(struct image_session *s);
/* The number that the image will have as image.writer: no other image ever had it. */
uint64_t image_session_number(const struct image_session *s);
struct image_file *image_session_file(struct image_session *s, const char *name, uint64_t size,
                                      struct vm_error **err);
/* For an image that is copied from elsewhere: take over its parent's name and its time. */
void image_session_describe(struct image_session *s, const struct image *as);
/* When it was made, if not at the commit. */
void image_session_date(struct image_session *s, uint64_t created_s);
int image_session_commit(struct image_session *s, struct import_report *ret_report,
                         struct vm_error **err);

struct import_options {
    const char *format; /* of the file: NULL looks; "raw", "qcow2" or another that qemu-img knows */
    const char *parent; /* an image whose later version this is; NULL: none */
    const char *file_name; /* within the image; NULL: "disk0.raw" */
    struct repo_control control;
};

/*
 * The disk image at `path`, as image `name`. Holes and zeros take no space. Formats other than raw
 * are read through qemu-nbd; a file that names further files (backing, data) is REFUSED unless
 * `format` is given: a guest that wrote its header would choose what is read.
 */
int image_import(struct repo *r, const char *path, const char *name,
                 const struct import_options *options, struct import_report *ret_report,
                 struct vm_error **err);

/* ---- reading ---- */

/*
 * File `file` of the image (NULL: its only one, or "disk0.raw") as a raw file with holes at `path`,
 * which must not exist; or into a block device, zeros included. After a failure no file remains. As
 * cp, it does not sync.
 */
int image_export(struct repo *r, const char *name, const char *file, const char *path,
                 const struct repo_control *control, struct vm_error **err);

/*
 * The same on descriptors that somebody opened already, with rights that may be less than ours: no
 * path is opened. `fd` of an import is one of source_prepare (repo/source.h), of an export one of
 * image_export_target; both stay the caller's. `path`: what messages call it.
 *
 * A target that is a file has no name until image_export_keep gives it one: whoever dies before
 * leaves nothing. Where a file system makes no files without a name (NFS) it has it from the start,
 * and image_export_undo removes it after a failure. CONFLICT if the name is taken, also by then.
 */
int image_import_fd(struct repo *r, int fd, const char *path, const char *name,
                    const struct import_options *options, struct import_report *ret_report,
                    struct vm_error **err);
int image_export_target(const char *path, int *ret_fd, struct vm_error **err);
int image_export_fd(struct repo *r, const char *name, const char *file, int fd, const char *path,
                    const struct repo_control *control, struct vm_error **err);
int image_export_keep(const char *path, int fd, struct vm_error **err);
void image_export_undo(const char *path, int fd);

struct image_sizes {
    uint64_t virtual_bytes;
    uint64_t data_bytes;   /* pages that are not zero */
    uint64_t stored_bytes; /* of the records that hold them, each counted once */
    uint64_t shared_bytes; /* of those: in records that other images use, too */
    uint64_t unique_bytes; /* the rest */
    uint64_t recipe_bytes; /* leaves and inner nodes */
    uint64_t unreadable;   /* other images whose recipes are damaged: their sharing is not counted */
    bool estimated;        /* because of these, or from a sample of the records of a large image */
};
struct image_sharer {
    char name[IMAGE_NAME_MAX + 1];
    uint64_t bytes; /* stored bytes that both use */
};
struct image_show {
    struct image image;
    struct image_sizes sizes;
    struct image_sharer *sharers; /* most first; the caller frees it */
    size_t n_sharers;
};
/* Reads the recipes of all images. CORRUPT if those of the image itself are damaged. */
int image_show(struct repo *r, const char *name, struct image_show *ret_show,
               struct vm_error **err);

/*
 * Call visit for each stretch in which file by file of that name a and b differ, in order; a file
 * that only one has differs as a whole from zeros. Content is compared by identity, no data is
 * read.
 */
struct image_difference {
    const char *file;
    uint64_t offset, len;
};
typedef int image_diff_fn(const struct image_difference *d, void *arg, struct vm_error **err);
int image_diff(struct repo *r, const char *a, const char *b, image_diff_fn *visit, void *arg,
               struct vm_error **err);

#endif

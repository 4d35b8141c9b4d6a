/* SPDX-License-Identifier: Apache-2.0 */
#include "repo/progress.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { THREADS_MAX = 8 };

struct export {
    struct file_reader *reader;
    const char *path;
    int fd;
    bool sparse; /* holes need not be written */
    uint64_t n_leaves;
    _Atomic uint64_t next_leaf;
    struct failure failure;
    struct progress progress;
};

static int write_range(struct export *x, const uint8_t *data, size_t len, uint64_t offset,
                       struct vm_error **err)
{
    for (size_t done = 0; done < len;) {
        ssize_t n = pwrite(x->fd, data + done, len - done, (off_t)(offset + done));
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return error_errno(err, errno, "cannot write %s", x->path);
        done += (size_t)n;
    }
    return 0;
}

/* Write the stretches of a leaf that are data, or all of it. */
static int write_leaf(struct export *x, const struct recipe_leaf *leaf, const uint8_t *data,
                      size_t len, uint64_t offset, struct vm_error **err)
{
    size_t n_pages = (len + PAGE_BYTES - 1) / PAGE_BYTES;
    for (size_t i = 0; i < n_pages;) {
        size_t n = 0;
        while (i + n < n_pages && (!x->sparse || leaf->pages[i + n].len))
            n++;
        size_t start = i * PAGE_BYTES, end = (i + n) * PAGE_BYTES;
        end = end < len ? end : len;
        if (n && write_range(x, data + start, end - start, offset + start, err) < 0)
            return -1;
        i += n + 1;
    }
    return 0;
}

static int export_leaf(struct export *x, uint64_t number, struct recipe_leaf *leaf, uint8_t *data,
                       struct vm_error **err)
{
    uint64_t offset = number * RECIPE_LEAF_BYTES, left = file_reader_size(x->reader) - offset;
    size_t len = left < RECIPE_LEAF_BYTES ? (size_t)left : RECIPE_LEAF_BYTES;
    bool any = !x->sparse;
    if (file_reader_leaf(x->reader, number, leaf, err) < 0)
        return -1;
    for (size_t i = 0; !any && i < RECIPE_LEAF_PAGES; i++)
        any = leaf->pages[i].len;
    if (any && (file_reader_read(x->reader, offset, data, len, err) < 0 ||
                write_leaf(x, leaf, data, len, offset, err) < 0))
        return -1;
    return progress_add(&x->progress, len, UINT64_MAX, err);
}

static void *export_leaves(void *arg)
{
    struct export *x = arg;
    struct vm_error *error = NULL;
    cleanup_free struct recipe_leaf *leaf = malloc(sizeof(*leaf));
    cleanup_free uint8_t *data = malloc(RECIPE_LEAF_BYTES);
    if (!leaf || !data) {
        error_nomem(&error);
        failure_set(&x->failure, error);
        return NULL;
    }
    for (;;) {
        uint64_t number = x->next_leaf++;
        if (number >= x->n_leaves || failure_is_set(&x->failure))
            return NULL;
        if (export_leaf(x, number, leaf, data, &error) < 0) {
            failure_set(&x->failure, error);
            return NULL;
        }
    }
}

static int run_threads(struct export *x, struct vm_error **err)
{
    pthread_t threads[THREADS_MAX];
    long processors = sysconf(_SC_NPROCESSORS_ONLN);
    unsigned wanted = processors < 2 ? 2 : processors > THREADS_MAX ? THREADS_MAX
                                                                    : (unsigned)processors;
    unsigned n = 0;
    for (; n < wanted; n++) {
        int rc = pthread_create(&threads[n], NULL, export_leaves, x);
        if (rc) {
            struct vm_error *error = NULL;
            error_errno(&error, rc, "cannot start a thread");
            failure_set(&x->failure, error);
            break;
        }
    }
    while (n)
        pthread_join(threads[--n], NULL);
    return failure_report(&x->failure, err);
}

/* ---- exporting ---- */

/* A file of that size, empty before; or a block device that is large enough. */
static int size_target(struct export *x, struct vm_error **err)
{
    struct stat st;
    off_t size = (off_t)file_reader_size(x->reader);
    if (fstat(x->fd, &st) < 0)
        return error_errno(err, errno, "cannot look at %s", x->path);
    x->sparse = S_ISREG(st.st_mode);
    if (!x->sparse && !S_ISBLK(st.st_mode))
        return error_set(err, VM_ERROR_USAGE, "%s is neither a file nor a block device", x->path);
    if (x->sparse && st.st_size)
        return error_set(err, VM_ERROR_CONFLICT, "%s is not empty", x->path);
    if (x->sparse && ftruncate(x->fd, size) < 0)
        return error_errno(err, errno, "cannot size %s", x->path);
    if (x->sparse)
        return 0;
    off_t room = lseek(x->fd, 0, SEEK_END);
    return room >= size ? 0
                        : error_set(err, VM_ERROR_NO_SPACE, "%s has %lld bytes, %lld are needed",
                                    x->path, (long long)room, (long long)size);
}

static int export_to(struct export *x, struct vm_error **err)
{
    if (size_target(x, err) < 0)
        return -1;
    uint64_t size = file_reader_size(x->reader);
    x->n_leaves = (size + RECIPE_LEAF_BYTES - 1) / RECIPE_LEAF_BYTES;
    if (run_threads(x, err) < 0)
        return -1;
    progress_end(&x->progress, 0);
    return 0;
}

static const struct image_entry *choose_file(const struct image *image, const char *file,
                                             struct vm_error **err)
{
    const struct image_entry *e = image_find_file(image, file ? file : "disk0.raw");
    if (!e && !file && image->n_files == 1)
        e = &image->files[0];
    if (!e)
        error_set(err, VM_ERROR_NOT_FOUND, "image %s has no file %s", image->name,
                  file ? file : "disk0.raw; name one of its files");
    return e;
}

/* Of damage the message says what to do. */
static int export_failed(const char *name, struct vm_error *cause, struct vm_error **err)
{
    if (cause->kind != VM_ERROR_CORRUPT) {
        error_propagate(err, cause);
        return error_wrap(err, "cannot export image %s", name);
    }
    error_set(err, VM_ERROR_CORRUPT,
              "cannot export image %s: %s; \"vmmig repo scrub\" names all that is damaged", name,
              error_message(cause));
    error_free(cause);
    return -1;
}

int image_export_fd(struct repo *r, const char *name, const char *file, int fd, const char *path,
                    const struct repo_control *control, struct vm_error **err)
{
    cleanup_free struct image *image = malloc(sizeof(*image));
    if (!image)
        return error_nomem(err);
    if (catalogue_find(repo_store(r), name, image, err) < 0)
        return -1;
    const struct image_entry *entry = choose_file(image, file, err);
    CLEANUP(file_reader) struct file_reader *reader =
        entry ? file_reader_open(repo_store(r), image, entry, err) : NULL;
    if (!reader)
        return -1;
    struct export x = {.reader = reader, .path = path, .fd = fd};
    failure_init(&x.failure);
    progress_init(&x.progress, control, entry->size);
    struct vm_error *cause = NULL;
    int result = export_to(&x, &cause);
    progress_finish(&x.progress);
    failure_finish(&x.failure);
    return result < 0 ? export_failed(name, cause, err) : 0;
}

int image_export(struct repo *r, const char *name, const char *file, const char *path,
                 const struct repo_control *control, struct vm_error **err)
{
    cleanup_close int fd = -1;
    if (image_export_target(path, &fd, err) < 0)
        return error_wrap(err, "cannot export image %s", name);
    if (image_export_fd(r, name, file, fd, path, control, err) < 0 ||
        image_export_keep(path, fd, err) < 0) {
        image_export_undo(path, fd);
        return -1;
    }
    return 0;
}

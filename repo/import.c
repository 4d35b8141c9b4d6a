/* SPDX-License-Identifier: Apache-2.0 */
#include "repo/progress.h"
#include "repo/source.h"

struct import {
    struct source *source;
    struct image_writer *writer;
    struct image_file *file;
    struct progress *progress;
    bool whole; /* without a parent: what is not given is zero anyway */
};

/* Is the whole of [offset, offset + len) zero, by what the source says of its extents? */
static int range_is_zero(struct source *src, uint64_t offset, uint64_t len, bool *ret_zero,
                         struct vm_error **err)
{
    *ret_zero = true;
    while (len && *ret_zero) {
        uint64_t extent;
        if (source_extent(src, offset, &extent, ret_zero, err) < 0)
            return -1;
        extent = extent < len ? extent : len;
        offset += extent;
        len -= extent;
    }
    return 0;
}

/* Read what the source has of a segment; the rest of it becomes zero. */
static int read_segment(struct source *src, struct segment *s, uint64_t offset, size_t len,
                        struct vm_error **err)
{
    memset(s->data + len, 0, SEGMENT_BYTES - len);
    for (size_t done = 0; done < len;) {
        uint64_t extent;
        bool zero;
        if (source_extent(src, offset + done, &extent, &zero, err) < 0)
            return -1;
        size_t n = extent < len - done ? (size_t)extent : len - done;
        if (zero)
            memset(s->data + done, 0, n);
        else if (source_read(src, offset + done, s->data + done, n, err) < 0)
            return -1;
        done += n;
    }
    for (size_t i = 0; i * PAGE_BYTES < len; i++)
        s->given[i] = true;
    return 0;
}

static int import_segment(struct import *im, uint64_t number, size_t len, struct vm_error **err)
{
    struct image_writer_stat stat;
    uint64_t offset = number * SEGMENT_BYTES;
    bool zero = false;
    if (im->whole && range_is_zero(im->source, offset, len, &zero, err) < 0)
        return -1;
    if (!zero) {
        struct segment *s = image_writer_segment(im->writer, im->file, number, err);
        if (!s)
            return -1;
        int done = read_segment(im->source, s, offset, len, err);
        if (done < 0)
            memset(s->given, 0, sizeof(s->given));
        image_writer_put(im->writer, s);
        if (done < 0)
            return -1;
    }
    image_writer_stat(im->writer, &stat);
    return progress_add(im->progress, len, stat.bytes_stored, err);
}

static int import_all(struct import *im, struct vm_error **err)
{
    uint64_t size = source_size(im->source);
    for (uint64_t offset = 0; offset < size; offset += SEGMENT_BYTES) {
        uint64_t left = size - offset;
        size_t len = left < SEGMENT_BYTES ? (size_t)left : SEGMENT_BYTES;
        if (import_segment(im, offset / SEGMENT_BYTES, len, err) < 0)
            return -1;
    }
    return 0;
}

static int import_into(struct image_session *session, struct source *src,
                       const struct import_options *o, struct import_report *ret_report,
                       struct vm_error **err)
{
    struct progress progress;
    const char *name = o->file_name ? o->file_name : "disk0.raw";
    struct import im = {.source = src, .writer = image_session_writer(session),
                        .progress = &progress, .whole = !o->parent};
    im.file = image_session_file(session, name, source_size(src), err);
    if (!im.file)
        return -1;
    progress_init(&progress, &o->control, source_size(src));
    struct import_report report;
    int result = import_all(&im, err);
    if (!result)
        result = image_session_commit(session, &report, err);
    if (!result) {
        progress_end(&progress, report.written.bytes_stored);
        if (ret_report)
            *ret_report = report;
    }
    progress_finish(&progress);
    return result;
}

int image_import_fd(struct repo *r, int fd, const char *path, const char *name,
                    const struct import_options *options, struct import_report *ret_report,
                    struct vm_error **err)
{
    CLEANUP(source) struct source *src = source_open_fd(fd, path, err);
    if (!src)
        return -1;
    if (!source_size(src))
        return error_set(err, VM_ERROR_USAGE, "%s is empty", path);
    CLEANUP(image_session)
    struct image_session *session = image_session_begin(r, name, options->parent, err);
    if (!session || import_into(session, src, options, ret_report, err) < 0)
        return error_wrap(err, "cannot import %s", path);
    return 0;
}

int image_import(struct repo *r, const char *path, const char *name,
                 const struct import_options *options, struct import_report *ret_report,
                 struct vm_error **err)
{
    cleanup_close int fd = -1;
    if (source_prepare(path, options->format, &fd, err) < 0)
        return -1;
    return image_import_fd(r, fd, path, name, options, ret_report, err);
}

/* SPDX-License-Identifier: Apache-2.0 */
/* repo_images: images of made-up content, into and out of a repository. */
#ifndef VMMIG_TESTS_REPO_IMAGES_H
#define VMMIG_TESTS_REPO_IMAGES_H

#include "tests/unit/repo/repo_test.h"
#include "repo/repo.h"

enum { MIB = 1 << 20 };

/*
 * Pages as they are on a disk: some zero, most compressible, some not; all different, from a seed.
 */
static inline void make_content(uint8_t *to, size_t bytes, uint64_t seed)
{
    for (size_t i = 0; i * PAGE_BYTES < bytes; i++) {
        uint8_t *page = to + i * PAGE_BYTES;
        memset(page, 0, PAGE_BYTES);
        if (i % 11 == 3 || (i / 64) % 9 == 5)
            continue;
        test_fill_random(page, i % 5 ? PAGE_BYTES / 3 : PAGE_BYTES, seed * 1000003 + i + 1);
    }
}

static inline int put_all(struct repo *r, const char *name, const char *parent, const uint8_t *from,
                   size_t size, struct import_report *ret_report, struct vm_error **err)
{
    CLEANUP(image_session) struct image_session *s = image_session_begin(r, name, parent, err);
    struct image_file *f = s ? image_session_file(s, "disk0.raw", size, err) : NULL;
    if (!f)
        return -1;
    for (size_t at = 0; at < size; at += SEGMENT_BYTES) {
        struct segment *seg = image_writer_segment(image_session_writer(s), f, at / SEGMENT_BYTES,
                                                   err);
        if (!seg)
            return -1;
        size_t len = size - at < SEGMENT_BYTES ? size - at : SEGMENT_BYTES;
        memset(seg->data, 0, SEGMENT_BYTES);
        memcpy(seg->data, from + at, len);
        for (size_t i = 0; i * PAGE_BYTES < len; i++)
            seg->given[i] = true;
        image_writer_put(image_session_writer(s), seg);
    }
    return image_session_commit(s, ret_report, err);
}

/* The whole file disk0.raw of an image. */
static inline int get_all(struct repo *r, const char *name, uint8_t *out, size_t size,
                          struct vm_error **err)
{
    cleanup_free struct image *image = malloc(sizeof(*image));
    if (catalogue_find(repo_store(r), name, image, err) < 0)
        return -1;
    CLEANUP(file_reader)
    struct file_reader *f =
        file_reader_open(repo_store(r), image, &image->files[0], err);
    return f ? file_reader_read(f, 0, out, size, err) : -1;
}

#endif

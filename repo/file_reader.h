/* SPDX-License-Identifier: Apache-2.0 */
/*
 * file_reader: the content of one file of an image, at any offset.
 *
 *     r = file_reader_create(store, &entry->root, entry->size, &err)
 *     file_reader_read(r, offset, out, len, &err)
 *     file_reader_destroy(r)
 *
 * What is returned was verified (checksums of tree nodes and records); anything damaged or gone is
 * CORRUPT with its name, never data.
 *
 * Threads: any number may read at the same time; each reads its records by itself, so several
 * threads that read ahead of each other fill the pipe. Memory: 24 KiB for each of LEAVES_CACHED
 * leaves, 6 KiB per GiB of the file that was touched, and per thread at work what one leaf stores.
 */
#ifndef VMMIG_REPO_FILE_READER_H
#define VMMIG_REPO_FILE_READER_H

#include "repo/image.h"
#include "repo/page_reader.h"
#include "repo/tree.h"

struct file_reader;

struct file_reader *file_reader_create(struct store *s, const struct recipe_ref *root,
                                       uint64_t size, struct vm_error **err);
/*
 * The same, of a file of an image that nobody leases: collections may replace the image's recipes by
 * others of the same content, which are then read. If the image is deleted or replaced, reads fail
 * sooner or later; they never return another image's content.
 */
struct file_reader *file_reader_open(struct store *s, const struct image *image,
                                     const struct image_entry *file, struct vm_error **err);
void file_reader_destroy(struct file_reader *r);
DEFINE_CLEANUP(file_reader, struct file_reader *, file_reader_destroy)
uint64_t file_reader_size(const struct file_reader *r);

/* len bytes at offset; beyond the end is USAGE. */
int file_reader_read(struct file_reader *r, uint64_t offset, void *out, size_t len,
                     struct vm_error **err);
/*
 * The first stretch at or behind `offset` that is not known to be zero, in whole leaves (4 MiB) cut
 * at the file's end: *ret_len is 0 if nothing but zeros follows.
 */
int file_reader_next_data(struct file_reader *r, uint64_t offset, uint64_t *ret_start,
                          uint64_t *ret_len, struct vm_error **err);
/*
 * n pages of a leaf, by their places within it, one after the other into `out`: with them where they
 * are by now, also if they were moved since the leaf was read.
 */
int file_reader_pages(struct file_reader *r, uint64_t leaf, const unsigned *pages, size_t n,
                      void *out, struct vm_error **err);
/* The decoded leaf, copied. */
int file_reader_leaf(struct file_reader *r, uint64_t leaf, struct recipe_leaf *ret_leaf,
                     struct vm_error **err);

struct page_reader_stat file_reader_stat(struct file_reader *r);

#endif

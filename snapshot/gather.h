/* SPDX-License-Identifier: Apache-2.0 */
/*
 * gather: pages in any order, of several files and from several threads, put together into the segments that an
 * image_writer takes.
 *
 *     g = gather_create(writer, &err)
 *     gather_page(g, file, number, data, &err)          data NULL: zeros
 *     gather_write(g, file, size, offset, data, len, &err)
 *     gather_flush(g)                                   what is begun goes to the writer
 *     gather_destroy(g)                                 after a flush, or when the image is given up
 *
 * A page that comes twice: the later one counts, if the two calls do not overlap. Memory: GATHER_SEGMENTS of
 * the writer's own segments. Errors are the writer's. Threads: any.
 */
#ifndef VMMIG_SNAPSHOT_GATHER_H
#define VMMIG_SNAPSHOT_GATHER_H

#include "repo/image_writer.h"

enum { GATHER_SEGMENTS = 5 };

struct gather;

struct gather *gather_create(struct image_writer *w, struct vm_error **err);
void gather_flush(struct gather *g);
void gather_destroy(struct gather *g);
DEFINE_CLEANUP(gather, struct gather *, gather_destroy)

int gather_page(struct gather *g, struct image_file *file, uint64_t number, const uint8_t *data,
                struct vm_error **err);
/*
 * Whole pages of a file of `size` bytes, or up to its end; data NULL: zeros. PROTOCOL if it is neither. Segments that
 * become zero as a whole cost no memory to speak of.
 */
int gather_write(struct gather *g, struct image_file *file, uint64_t size, uint64_t offset,
                 const uint8_t *data, uint64_t len, struct vm_error **err);

#endif

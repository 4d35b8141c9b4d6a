/* SPDX-License-Identifier: Apache-2.0 */
/*
 * image: what a name in the catalogue stands for: files, each with its size and the root of its
 * recipe. No I/O.
 *
 * A disk image has one file, "disk0.raw"; a snapshot of a VM has its disks, its memory, its device
 * state and its definition. As the value in the catalogue (little endian):
 *
 *      0  u16 2
 *      2  u16 files, 1..64
 *      4  u32 zero
 *      8  u64 when it was made (a snapshot: when the guest stood), seconds since 1970
 *     16  u64 number of the writer
 *     24  u64 bytes that its commit added to the store (packs and trees)
 *     32  u8  length of the parent's name (0: none), and the name
 *         per file: u8 length of its name, the name, u64 size in bytes, 24 bytes root
 *         (repo/recipe.h)
 *         u64 XXH3-64 of all before, seeded with that of the image's name
 *
 * Whatever version it is, it ends with that checksum: so damage is told from a later version.
 *
 * Names of images: 1 to 128 of A-Z a-z 0-9 . _ - : @ + /, in parts between slashes that are not
 * empty and do not begin with a dot or a dash. Names of files: 1 to 64 of the same without / : @ +.
 */
#ifndef VMMIG_REPO_IMAGE_H
#define VMMIG_REPO_IMAGE_H

#include "repo/recipe.h"

enum { IMAGE_NAME_MAX = 128, IMAGE_FILE_NAME_MAX = 64, IMAGE_FILES_MAX = 64 };

struct image_entry {
    char name[IMAGE_FILE_NAME_MAX + 1];
    uint64_t size;
    struct recipe_ref root;
};

struct image {
    char name[IMAGE_NAME_MAX + 1]; /* the key, not in the value */
    char parent[IMAGE_NAME_MAX + 1];
    uint64_t created_s, writer, bytes_added;
    unsigned n_files;
    struct image_entry files[IMAGE_FILES_MAX];
};

/* USAGE with the rule in the message. */
int image_name_check(const char *name, struct vm_error **err);
bool image_file_name_is_good(const char *name);

void image_write(const struct image *image, struct buffer *out);
/* CORRUPT if it is no such value of that name, or that is none; VERSION if a later vmmig wrote it. */
int image_read(const char *name, const void *data, size_t len, struct image *ret_image,
               struct vm_error **err);
/* The checksum at the end of a value. */
uint64_t image_value_check(const char *name, const void *data, size_t len);
/* Sum of the files' sizes. */
uint64_t image_size(const struct image *image);
/* The file of that name, or NULL. */
const struct image_entry *image_find_file(const struct image *image, const char *name);

#endif

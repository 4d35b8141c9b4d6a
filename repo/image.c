/* SPDX-License-Identifier: Apache-2.0 */
#include "repo/image.h"

#include "proto/fields.h"

#include <ctype.h>
#include <stdio.h>
#include <xxhash.h>

enum { VERSION = 2, CHECK = 8, SHOWN_MAX = 255 };

static bool letters_are_good(const char *name, size_t n, const char *others)
{
    for (size_t i = 0; i < n; i++)
        if (!isascii(name[i]) || (!isalnum((unsigned char)name[i]) && !strchr(others, name[i])))
            return false;
    return n > 0 && name[0] != '.' && name[0] != '-';
}

int image_name_check(const char *name, struct vm_error **err)
{
    size_t len = strlen(name);
    bool good = len && len <= IMAGE_NAME_MAX;
    for (const char *part = name; good; part++) {
        size_t n = strcspn(part, "/");
        good = letters_are_good(part, n, "._-:@+");
        part += n;
        if (!*part)
            break;
    }
    return good ? 0
                : error_set(
                      err, VM_ERROR_USAGE,
                      "\"%.140s\" is no name of an image: 1 to %d letters, digits and ._-:@+, in "
                      "parts between slashes that begin with neither dot nor dash",
                      name, IMAGE_NAME_MAX);
}

bool image_file_name_is_good(const char *name)
{
    size_t n = strlen(name);
    return n <= IMAGE_FILE_NAME_MAX && letters_are_good(name, n, "._-");
}

static void put_text(struct buffer *out, const char *text)
{
    size_t n = strlen(text);
    buffer_put_u8(out, (uint8_t)n);
    buffer_put(out, text, n);
}

uint64_t image_value_check(const char *name, const void *data, size_t len)
{
    return XXH3_64bits_withSeed(data, len, XXH3_64bits(name, strlen(name)));
}

void image_write(const struct image *image, struct buffer *out)
{
    size_t start = out->len;
    buffer_put_le16(out, VERSION);
    buffer_put_le16(out, (uint16_t)image->n_files);
    buffer_put_le32(out, 0);
    buffer_put_le64(out, image->created_s);
    buffer_put_le64(out, image->writer);
    buffer_put_le64(out, image->bytes_added);
    put_text(out, image->parent);
    for (unsigned i = 0; i < image->n_files; i++) {
        put_text(out, image->files[i].name);
        buffer_put_le64(out, image->files[i].size);
        uint8_t *root = buffer_grow(out, RECIPE_REF_BYTES);
        if (root)
            recipe_ref_write(&image->files[i].root, root);
    }
    if (!out->failed)
        buffer_put_le64(out, image_value_check(image->name, out->data + start, out->len - start));
}

static void get_text(struct cursor *c, char *out, size_t max)
{
    size_t n = cursor_u8(c);
    const uint8_t *text = n <= max ? cursor_take(c, n) : NULL;
    if (text && !memchr(text, 0, n))
        memcpy(out, text, n);
    else
        c->failed = true;
}

static void read_file(struct cursor *c, struct image_entry *file)
{
    get_text(c, file->name, IMAGE_FILE_NAME_MAX);
    file->size = cursor_le64(c);
    const uint8_t *root = cursor_take(c, RECIPE_REF_BYTES);
    if (root)
        file->root = recipe_ref_read(root);
    if (!image_file_name_is_good(file->name) || file->size > RECIPE_FILE_MAX ||
        !recipe_ref_is_good(&file->root))
        c->failed = true;
}

/* By the name under which it can be deleted (catalogue_delete_damaged). */
static int entry_damaged(const char *name, struct vm_error **err)
{
    char told[SHOWN_MAX + 1];
    snprintf(told, sizeof(told), "%s", name);
    field_make_text(told, SHOWN_MAX);
    return error_set(err, VM_ERROR_CORRUPT,
                     "the catalogue's entry of image %s is damaged; deleting the image removes it",
                     told);
}

int image_read(const char *name, const void *data, size_t len, struct image *ret_image,
               struct vm_error **err)
{
    bool whole = len >= CHECK && !image_name_check(name, NULL) &&
                 image_value_check(name, data, len - CHECK) ==
                     get_le64((const uint8_t *)data + len - CHECK);
    struct cursor c = cursor_init(data, whole ? len - CHECK : 0);
    unsigned version = cursor_le16(&c);
    if (!c.failed && version > VERSION)
        return error_set(err, VM_ERROR_VERSION, "image %s was written by a later version of vmmig",
                         name);
    struct image *image = ret_image;
    memset(image, 0, sizeof(*image));
    image->n_files = cursor_le16(&c);
    uint32_t zero = cursor_le32(&c);
    image->created_s = cursor_le64(&c);
    image->writer = cursor_le64(&c);
    image->bytes_added = cursor_le64(&c);
    get_text(&c, image->parent, IMAGE_NAME_MAX);
    bool good = version == VERSION && !zero && image->n_files &&
                image->n_files <= IMAGE_FILES_MAX &&
                (!image->parent[0] || !image_name_check(image->parent, NULL));
    for (unsigned i = 0; good && i < image->n_files; i++)
        read_file(&c, &image->files[i]);
    if (!good || c.failed || cursor_left(&c))
        return entry_damaged(name, err);
    strcpy(image->name, name);
    return 0;
}

uint64_t image_size(const struct image *image)
{
    uint64_t size = 0;
    for (unsigned i = 0; i < image->n_files; i++)
        size += image->files[i].size;
    return size;
}

const struct image_entry *image_find_file(const struct image *image, const char *name)
{
    for (unsigned i = 0; i < image->n_files; i++)
        if (!strcmp(image->files[i].name, name))
            return &image->files[i];
    return NULL;
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Fuzzer of repo/recipe and repo/image: arbitrary bytes as nodes and as an entry of the catalogue.
 * Asserted: what is accepted keeps to the bounds, and comes back when it is written and read again.
 */
#include "repo/image.h"
#include "repo/pack.h"

#include <assert.h>

/* Built by libFuzzer's driver. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static struct recipe_leaf leaf, again;
static struct recipe_inner inner, inner_again;
static struct image image, image_again;

static bool same_page(const struct recipe_page *a, const struct recipe_page *b)
{
    return a->pack == b->pack && a->offset == b->offset && a->len == b->len && a->page == b->page &&
           !memcmp(a->id, b->id, sizeof(a->id));
}

static void try_leaf(const uint8_t *data, size_t size)
{
    struct buffer b = {0};
    bool any = false;
    if (recipe_leaf_read(data, size, &leaf, NULL) < 0)
        return;
    for (unsigned i = 0; i < RECIPE_LEAF_PAGES; i++) {
        const struct recipe_page *p = &leaf.pages[i];
        any |= p->len;
        assert(!p->len || (p->page < RECORD_PAGES_MAX && p->len <= RECORD_MAX &&
                           p->offset + p->len <= PACK_BODY_MAX));
    }
    recipe_leaf_write(&leaf, &b);
    assert(b.len <= RECIPE_NODE_MAX && any == (b.len > 0));
    if (any) {
        assert(recipe_leaf_read(b.data, b.len, &again, NULL) == 0);
        for (unsigned i = 0; i < RECIPE_LEAF_PAGES; i++)
            assert(same_page(&leaf.pages[i], &again.pages[i]));
    }
    buffer_finish(&b);
}

static void try_inner(const uint8_t *data, size_t size)
{
    struct buffer b = {0};
    if (recipe_inner_read(data, size, 1, &inner, NULL) < 0)
        return;
    recipe_inner_write(&inner, &b);
    if (b.len) {
        assert(recipe_inner_read(b.data, b.len, 1, &inner_again, NULL) == 0);
        for (unsigned i = 0; i < RECIPE_FANOUT; i++)
            assert(recipe_ref_equal(&inner.children[i], &inner_again.children[i]));
    }
    buffer_finish(&b);
}

/* With the right checksum, behind which nobody would get by chance. */
static void try_image(const uint8_t *data, size_t size)
{
    struct buffer value = {0}, b = {0};
    image_read("name", data, size, &image, NULL);
    buffer_put(&value, data, size);
    buffer_put_le64(&value, image_value_check("name", data, size));
    if (image_read("name", value.data, value.len, &image, NULL) == 0) {
        assert(image.n_files >= 1 && image.n_files <= IMAGE_FILES_MAX);
        image_write(&image, &b);
        assert(b.len == value.len && !memcmp(b.data, value.data, b.len));
        assert(image_read("name", b.data, b.len, &image_again, NULL) == 0);
    }
    buffer_finish(&value);
    buffer_finish(&b);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    try_leaf(data, size);
    try_inner(data, size);
    try_image(data, size);
    return 0;
}

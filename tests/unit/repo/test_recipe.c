/* SPDX-License-Identifier: Apache-2.0 */
#include "tests/unit/repo/repo_test.h"
#include "repo/pack.h"
#include "repo/recipe.h"

static struct recipe_leaf leaf, got;

static void set_page(unsigned i, uint64_t pack, uint32_t record, uint8_t page)
{
    leaf.pages[i] = (struct recipe_page){.pack = pack, .offset = PACK_HEADER + record * 70000,
                                         .len = 5000, .page = page};
    put_le32(leaf.pages[i].id, i * 2654435761u);
}

/* Whatever follows it, and not with a byte less. */
static void assert_length_is_told(const struct buffer *node)
{
    cleanup_buffer struct buffer two = {0};
    buffer_put(&two, node->data, node->len);
    buffer_put(&two, node->data, node->len);
    assert_false(two.failed);
    assert_int_equal(recipe_node_len(two.data, two.len), node->len);
    for (size_t i = 0; i < node->len; i++)
        assert_int_equal(recipe_node_len(two.data, i), 0);
}

static void assert_leaf_comes_back(size_t at_most)
{
    cleanup_error struct vm_error *err = NULL;
    cleanup_buffer struct buffer b = {0};
    recipe_leaf_write(&leaf, &b);
    assert_false(b.failed);
    assert_true(b.len <= at_most && b.len <= RECIPE_NODE_MAX);
    assert_length_is_told(&b);
    recipe_leaf_read(b.data, b.len, &got, &err);
    assert_ok(err);
    for (unsigned i = 0; i < RECIPE_LEAF_PAGES; i++) {
        const struct recipe_page *a = &leaf.pages[i], *c = &got.pages[i];
        assert_true(a->pack == c->pack && a->offset == c->offset && a->page == c->page);
        assert_int_equal(a->len, c->len);
        assert_memory_equal(a->id, c->id, 4);
    }
}

static int clear(void **state)
{
    memset(&leaf, 0, sizeof(leaf));
    return 0;
}

static void a_sequential_leaf_costs_five_bytes_a_page(void **state)
{
    for (unsigned i = 0; i < RECIPE_LEAF_PAGES; i++)
        set_page(i, 1 + i / 512, i % 512 / 16, i % 16);
    assert_leaf_comes_back(5 * RECIPE_LEAF_PAGES);
}

static void the_most_scattered_leaf_comes_back(void **state)
{
    for (unsigned i = 0; i < RECIPE_LEAF_PAGES; i++)
        set_page(i, 1000000 + i, i % 119, i * 7 % 16);
    assert_leaf_comes_back(RECIPE_NODE_MAX);
}

static void zeros_among_pages_come_back(void **state)
{
    for (unsigned i = 0; i < 700; i += 3)
        set_page(i, 5, i % 119, i % 16);
    set_page(1, 5, 0, 1);
    assert_leaf_comes_back(RECIPE_NODE_MAX);
}

static void a_leaf_of_zeros_is_not_stored(void **state)
{
    struct buffer b = {0};
    recipe_leaf_write(&leaf, &b);
    assert_int_equal(b.len, 0);
}

static void inner_nodes_come_back(void **state)
{
    cleanup_error struct vm_error *err = NULL;
    cleanup_buffer struct buffer b = {0};
    struct recipe_inner node = {.level = 2}, back;
    node.children[0] = (struct recipe_ref){7, 32, 100, 0x1234};
    node.children[200] = (struct recipe_ref){UINT64_MAX, 1 << 20, RECIPE_NODE_MAX, 1};
    recipe_inner_write(&node, &b);
    assert_int_equal(b.len, 8 + 201 * RECIPE_REF_BYTES);
    assert_length_is_told(&b);
    recipe_inner_read(b.data, b.len, 2, &back, &err);
    assert_ok(err);
    assert_int_equal(back.level, 2);
    for (int i = 0; i < RECIPE_FANOUT; i++)
        assert_true(recipe_ref_equal(&node.children[i], &back.children[i]));
    assert_int_equal(recipe_inner_read(b.data, b.len, 1, &back, NULL), -1);
    assert_int_equal(recipe_inner_read(b.data, b.len - 1, 2, &back, NULL), -1);
    struct recipe_inner zeros = {.level = 1};
    cleanup_buffer struct buffer none = {0};
    recipe_inner_write(&zeros, &none);
    assert_int_equal(none.len, 0);
}

static void nonsense_is_refused(void **state)
{
    cleanup_buffer struct buffer b = {0};
    for (unsigned i = 0; i < 40; i++)
        set_page(i, 1 + i / 16, i % 3, i % 16);
    recipe_leaf_write(&leaf, &b);
    /* Every proper prefix, and one byte more. */
    for (size_t n = 0; n < b.len; n++)
        assert_int_equal(recipe_leaf_read(b.data, n, &got, NULL), -1);
    buffer_put_u8(&b, 0);
    assert_int_equal(recipe_leaf_read(b.data, b.len, &got, NULL), -1);
    b.len--;
    static const struct {
        unsigned at;
        uint16_t value;
    } lies[] = {
        {0, 1},           /* an inner node */
        {2, 0},           /* no packs */
        {2, 2000},        /* too many */
        {4, 0},           /* no runs */
        {8 + 3 * 8, 0},   /* an empty run */
        {8 + 3 * 8, 900}, /* a run beyond the record */
        {8 + 3 * 8 + 2, 3},         /* a pack that is not in the table */
        {8 + 3 * 8 + 6, 0xffff},    /* a record beyond the pack */
        {8 + 3 * 8 + 8, 1},         /* a record without payload */
        {8 + 3 * 8 + 8, 0xffff},    /* a record too long */
    };
    for (size_t i = 0; i < sizeof(lies) / sizeof(*lies); i++) {
        uint16_t was = get_le16(b.data + lies[i].at);
        put_le16(b.data + lies[i].at, lies[i].value);
        cleanup_error struct vm_error *err = NULL;
        assert_int_equal(recipe_leaf_read(b.data, b.len, &got, &err), -1);
        assert_int_equal(err->kind, VM_ERROR_CORRUPT);
        put_le16(b.data + lies[i].at, was);
    }
    assert_int_equal(recipe_leaf_read(b.data, b.len, &got, NULL), 0);
}

static void the_depth_follows_from_the_size(void **state)
{
    assert_int_equal(recipe_depth(1), 0);
    assert_int_equal(recipe_depth(4ull << 20), 0);
    assert_int_equal(recipe_depth((4ull << 20) + 1), 1);
    assert_int_equal(recipe_depth(1ull << 30), 1);
    assert_int_equal(recipe_depth((1ull << 30) + 1), 2);
    assert_int_equal(recipe_depth(256ull << 30), 2);
    assert_int_equal(recipe_depth(RECIPE_FILE_MAX), 3);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(a_sequential_leaf_costs_five_bytes_a_page, clear),
        cmocka_unit_test_setup(the_most_scattered_leaf_comes_back, clear),
        cmocka_unit_test_setup(zeros_among_pages_come_back, clear),
        cmocka_unit_test_setup(a_leaf_of_zeros_is_not_stored, clear),
        cmocka_unit_test_setup(inner_nodes_come_back, clear),
        cmocka_unit_test_setup(nonsense_is_refused, clear),
        cmocka_unit_test(the_depth_follows_from_the_size),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

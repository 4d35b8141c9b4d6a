/* SPDX-License-Identifier: Apache-2.0 */
/* Pages in any order become the file that they make in order. */
#include "repo/repo.h"
#include "snapshot/gather.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

enum { PAGES = 3000, TAIL = 100, SIZE = PAGES * PAGE_BYTES + TAIL };

static void fill(uint8_t page[PAGE_BYTES], unsigned number)
{
    memset(page, 0, PAGE_BYTES);
    if (number % 7)
        for (unsigned i = 0; i < PAGE_BYTES; i += 4)
            memcpy(page + i, (uint32_t[]){number * 2654435761u + i}, 4);
}

static void pages_in_any_order_make_the_file(void **state)
{
    (void)state;
    char folder[] = "/tmp/vmmig-gather-XXXXXX", url[64], command[96];
    cleanup_error struct vm_error *err = NULL;
    uint8_t page[PAGE_BYTES], read[PAGE_BYTES];
    struct import_report report;
    cleanup_free struct image *image = calloc(1, sizeof(*image));
    assert_non_null(mkdtemp(folder));
    snprintf(url, sizeof(url), "dir:%s/repo", folder);
    assert_int_equal(repo_init(url, &(struct repo_init_options){0}, &err), 0);
    struct repo *r = repo_open(url, &err);
    assert_non_null(r);
    struct image_session *s = image_session_begin(r, "a", NULL, &err);
    struct image_file *f = image_session_file(s, "disk0.raw", SIZE, &err);
    struct gather *g = gather_create(image_session_writer(s), &err);
    assert_non_null(g);
    for (unsigned i = 0; i < PAGES; i++) {
        unsigned number = (unsigned)((uint64_t)i * 1009 % PAGES); /* far apart, each once */
        fill(page, number);
        assert_int_equal(gather_page(g, f, number, number % 7 ? page : NULL, &err), 0);
    }
    /* A page again, and the end, which is no whole page. */
    fill(page, 5000);
    assert_int_equal(gather_write(g, f, SIZE, 8 * PAGE_BYTES, page, PAGE_BYTES, &err), 0);
    assert_int_equal(gather_write(g, f, SIZE, PAGES * PAGE_BYTES, page, TAIL, &err), 0);
    /* What is not whole pages is refused. */
    assert_int_equal(gather_write(g, f, SIZE, 512, page, 512, NULL), -1);
    assert_int_equal(gather_write(g, f, SIZE, 0, page, 512, NULL), -1);
    assert_int_equal(gather_write(g, f, SIZE, SIZE + 1, NULL, PAGE_BYTES, NULL), -1);
    assert_int_equal(gather_write(g, f, SIZE, PAGES * PAGE_BYTES, page, PAGE_BYTES, NULL), -1);
    gather_destroy(g);
    assert_int_equal(image_session_commit(s, &report, &err), 0);
    image_session_end(s);
    assert_int_equal(catalogue_find(repo_store(r), "a", image, &err), 0);
    struct file_reader *reader =
        file_reader_create(repo_store(r), &image->files[0].root, SIZE, &err);
    for (unsigned i = 0; i <= PAGES; i++) {
        size_t n = i < PAGES ? PAGE_BYTES : TAIL;
        fill(page, i == 8 || i == PAGES ? 5000 : i);
        assert_int_equal(file_reader_read(reader, (uint64_t)i * PAGE_BYTES, read, n, &err), 0);
        assert_memory_equal(read, page, n);
    }
    file_reader_destroy(reader);
    repo_close(r);
    snprintf(command, sizeof(command), "rm -rf %s", folder);
    assert_int_equal(system(command), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(pages_in_any_order_make_the_file)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}

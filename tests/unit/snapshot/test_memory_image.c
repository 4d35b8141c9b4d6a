/* SPDX-License-Identifier: Apache-2.0 */
/* Guest memory that a VMM shares, on its way into an image: what it has no pages for takes none here, nor there. */
#include "repo/repo.h"
#include "snapshot/memory_image.h"

#include <dirent.h>
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

enum { PAGES = 2048, WRITTEN = 700, CLEARED = 701, SIZE = PAGES * PAGE_BYTES };

struct fixture {
    char folder[32];
    struct repo *repo;
    struct image_session *session;
    struct gather *gather;
    struct qemu_json vm;
    struct memory_image *image;
    int memfd;
    uint8_t *memory; /* as the agent maps it */
};

static void begin(struct fixture *f)
{
    char url[64];
    struct vm_error *err = NULL;
    strcpy(f->folder, "/tmp/vmmig-memory-XXXXXX");
    assert_non_null(mkdtemp(f->folder));
    snprintf(url, sizeof(url), "dir:%s/repo", f->folder);
    assert_int_equal(repo_init(url, &(struct repo_init_options){0}, &err), 0);
    f->repo = repo_open(url, &err);
    f->session = image_session_begin(f->repo, "a", NULL, &err);
    f->gather = gather_create(image_session_writer(f->session), &err);
    assert_non_null(f->gather);
    struct qemu_ram *ram = qemu_definition_add_ram(&f->vm.definition);
    ram->block = strdup("high");
    ram->backend = strdup("high");
    ram->size = SIZE;
    ram->page_size = PAGE_BYTES;
    assert_int_equal(qemu_json_name_files(&f->vm, &err), 0);
    struct memory_image_setup setup = {.vm = &f->vm,
                                       .session = f->session,
                                       .gather = f->gather,
                                       .scratch_dir = f->folder,
                                       .repeats = true};
    f->image = memory_image_create(&setup, &err);
    assert_non_null(f->image);
    f->memfd = memfd_create("guest", MFD_CLOEXEC);
    assert_return_code(ftruncate(f->memfd, SIZE), errno);
    f->memory = mmap(NULL, SIZE, PROT_READ, MAP_SHARED, f->memfd, 0);
}

static void end(struct fixture *f)
{
    char command[64];
    repo_close(f->repo);
    qemu_json_finish(&f->vm);
    munmap(f->memory, SIZE);
    close(f->memfd);
    snprintf(command, sizeof(command), "rm -rf %s", f->folder);
    assert_int_equal(system(command), 0);
}

static void keep(struct page_batch *batch)
{
    (void)batch; /* it is the test's */
}

/* Pages first, first + 1 ... come, as a driver that maps them gives them. */
static void give(struct fixture *f, unsigned first, unsigned n)
{
    struct vm_error *err = NULL;
    struct page_batch batch = {.release = keep, .n = n, .file = f->memfd, .file_start = f->memory};
    atomic_init(&batch.refs, 1);
    for (unsigned i = 0; i < n; i++)
        batch.pages[i] = (struct page_ref){page_addr(0, first + i), f->memory + (size_t)(first + i) * PAGE_BYTES};
    assert_int_equal(memory_image_events()->pages(f->image, &batch, &err), 0);
}

static void write_guest(struct fixture *f, unsigned page, uint8_t byte)
{
    uint8_t contents[PAGE_BYTES];
    memset(contents, byte, sizeof(contents));
    assert_int_equal(pwrite(f->memfd, contents, sizeof(contents), (off_t)page * PAGE_BYTES), sizeof(contents));
}

/* Of the files without a name in the folder. */
static uint64_t blocks_aside(const struct fixture *f)
{
    uint64_t blocks = 0;
    char path[300], target[300];
    DIR *fds = opendir("/proc/self/fd");
    for (struct dirent *d; (d = readdir(fds));) {
        struct stat st;
        snprintf(path, sizeof(path), "/proc/self/fd/%s", d->d_name);
        ssize_t n = readlink(path, target, sizeof(target) - 1);
        target[n > 0 ? n : 0] = 0;
        if (!strncmp(target, f->folder, strlen(f->folder)) && strstr(target, "(deleted)") && stat(path, &st) == 0)
            blocks += (uint64_t)st.st_blocks;
    }
    closedir(fds);
    return blocks;
}

static uint64_t blocks_of(int fd)
{
    struct stat st;
    assert_return_code(fstat(fd, &st), errno);
    return (uint64_t)st.st_blocks;
}

static void store(struct fixture *f, struct image *ret_image)
{
    struct vm_error *err = NULL;
    struct import_report report;
    assert_int_equal(memory_image_events()->memory_done(f->image, &err), 0);
    memory_image_events()->done(f->image, NULL);
    assert_int_equal(memory_image_wait(f->image, INT64_MAX, -1, &err), 1);
    assert_int_equal(memory_image_store_pages(f->image, -1, &err), 0);
    memory_image_destroy(f->image);
    gather_destroy(f->gather);
    assert_int_equal(image_session_commit(f->session, &report, &err), 0);
    image_session_end(f->session);
    assert_int_equal(catalogue_find(repo_store(f->repo), "a", ret_image, &err), 0);
}

static void holes_of_a_guest_stay_holes(void **state)
{
    (void)state;
    struct fixture f = {.memfd = -1};
    struct vm_error *err = NULL;
    uint8_t read[PAGE_BYTES], expected[PAGE_BYTES];
    cleanup_free struct image *image = calloc(1, sizeof(*image));
    begin(&f);
    /* A VMM that says of all of it that it was written. */
    for (unsigned page = 0; page < PAGES; page += PAGE_BATCH_MAX)
        give(&f, page, PAGE_BATCH_MAX);
    assert_int_equal(blocks_of(f.memfd), 0);
    assert_int_equal(blocks_aside(&f), 0);
    write_guest(&f, WRITTEN, 1);
    write_guest(&f, CLEARED, 2);
    give(&f, WRITTEN, 2);
    write_guest(&f, CLEARED, 0);
    give(&f, CLEARED, 3);
    store(&f, image);
    struct file_reader *reader = file_reader_create(repo_store(f.repo), &image->files[0].root, SIZE, &err);
    for (unsigned page = WRITTEN - 1; page <= CLEARED + 3; page++) {
        memset(expected, page == WRITTEN, sizeof(expected));
        assert_int_equal(file_reader_read(reader, (uint64_t)page * PAGE_BYTES, read, PAGE_BYTES, &err), 0);
        assert_memory_equal(read, expected, PAGE_BYTES);
    }
    file_reader_destroy(reader);
    end(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(holes_of_a_guest_stay_holes)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}

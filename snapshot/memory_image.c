/* SPDX-License-Identifier: Apache-2.0 */
#include "snapshot/memory_image.h"

#include "base/fault.h"
#include "base/io.h"
#include "snapshot/snapshot.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>

enum { COPY_BYTES = 1 << 20 };

struct block {
    struct image_file *file;
    uint8_t *seen; /* a bit per page */
    int aside;     /* setup.repeats: a file without a name, else -1 */
};

struct memory_image {
    struct memory_image_setup setup;
    struct guest_region *regions;
    unsigned n;
    struct block blocks[GUEST_REGIONS_MAX];
    uint64_t total;
    uint8_t *room; /* setup.repeats: for the pages of one batch */
    atomic_uint_fast64_t done;
    int state_fd;
    uint64_t state_bytes;
    bool memory_done;
    int over; /* latch */
    pthread_mutex_t lock;
    struct vm_error *error; /* under lock, once it is over */
};

/* ---- events ---- */

/* True: it comes for the first time. */
static bool note_page(struct memory_image *m, struct block *b, uint64_t page)
{
    uint8_t bit = (uint8_t)(1u << page % 8);
    bool first = !(b->seen[page / 8] & bit);
    if (first)
        atomic_fetch_add(&m->done, GUEST_PAGE_SIZE);
    b->seen[page / 8] |= bit;
    return first;
}

static int write_aside(struct block *b, uint64_t page, const struct iovec *run, int n, struct vm_error **err)
{
    ssize_t want = (ssize_t)n * GUEST_PAGE_SIZE;
    ssize_t done = pwritev(b->aside, run, n, (off_t)(page * GUEST_PAGE_SIZE));
    return done == want ? 0
                        : error_errno(err, done < 0 ? errno : ENOSPC,
                                      "cannot keep the guest's memory aside");
}

static const uint8_t zeros[GUEST_PAGE_SIZE];

/* The page's contents; NULL: there is nothing to be written, since what was never written reads as zeros. */
static const uint8_t *contents(struct memory_image *m, const struct page_batch *batch, unsigned i)
{
    const struct page_ref *p = &batch->pages[i];
    const uint8_t *data = p->data && batch->file ? m->room + (size_t)i * GUEST_PAGE_SIZE : p->data;
    bool first = note_page(m, &m->blocks[page_addr_region(p->addr)], page_addr_number(p->addr));
    if (data && memcmp(data, zeros, GUEST_PAGE_SIZE))
        return data;
    return first ? NULL : zeros;
}

/*
 * Pages that follow each other in one write. A guest's memory that has a file is read from there: to read its holes
 * through the mapping would fill them, at this process's expense.
 */
static int keep_aside(struct memory_image *m, const struct page_batch *batch, struct vm_error **err)
{
    struct iovec run[PAGE_BATCH_MAX];
    uint64_t start = 0;
    int n = 0;
    if (batch->file && page_batch_copy(batch, m->room, err) < 0)
        return -1;
    for (unsigned i = 0; i < batch->n; i++) {
        const struct page_ref *p = &batch->pages[i];
        const uint8_t *data = contents(m, batch, i);
        if (n && (!data || p->addr != start + (uint64_t)n)) {
            if (write_aside(&m->blocks[page_addr_region(start)], page_addr_number(start), run, n, err) < 0)
                return -1;
            n = 0;
        }
        if (!data)
            continue;
        start = n ? start : p->addr;
        run[n++] = (struct iovec){(void *)(uintptr_t)data, GUEST_PAGE_SIZE};
    }
    return n ? write_aside(&m->blocks[page_addr_region(start)], page_addr_number(start), run, n, err) : 0;
}

static int gather_pages(struct memory_image *m, const struct page_batch *batch, struct vm_error **err)
{
    for (unsigned i = 0; i < batch->n; i++) {
        const struct page_ref *p = &batch->pages[i];
        struct block *b = &m->blocks[page_addr_region(p->addr)];
        uint64_t page = page_addr_number(p->addr);
        note_page(m, b, page);
        if (gather_page(m->setup.gather, b->file, page, p->data, err) < 0)
            return -1;
    }
    return 0;
}

static int on_pages(void *arg, struct page_batch *batch, struct vm_error **err)
{
    struct memory_image *m = arg;
    int r;
    if (FAULT("snapshot.memory") == FAULT_ERROR)
        r = error_errno(err, fault_errno(), "cannot take the guest's memory");
    else
        r = m->setup.repeats ? keep_aside(m, batch, err) : gather_pages(m, batch, err);
    page_batch_unref(batch);
    return r;
}

static int on_bytes(void *arg, const void *data, size_t n, struct vm_error **err)
{
    struct memory_image *m = arg;
    if (n > SNAPSHOT_STATE_MAX - m->state_bytes)
        return error_set(err, VM_ERROR_REFUSED, "the VM's device state is larger than %llu MiB",
                         SNAPSHOT_STATE_MAX >> 20);
    for (size_t done = 0; done < n;) {
        ssize_t w = pwrite(m->state_fd, (const char *)data + done, n - done,
                           (off_t)(m->state_bytes + done));
        if (w < 0 && errno != EINTR)
            return error_errno(err, errno, "cannot keep the VM's device state");
        done += w > 0 ? (size_t)w : 0;
    }
    m->state_bytes += n;
    return 0;
}

static int on_memory_done(void *arg, struct vm_error **err)
{
    struct memory_image *m = arg;
    (void)err;
    m->memory_done = true;
    return 0;
}

static int on_opened(void *arg, int fd, struct vm_error **err)
{
    struct memory_image *m = arg;
    return guard_stream(m->setup.guard, fd, err);
}

static void on_done(void *arg, struct vm_error *err)
{
    struct memory_image *m = arg;
    uint64_t done = atomic_load(&m->done);
    if (!err && (!m->memory_done || done != m->total))
        error_set(&err, VM_ERROR_REFUSED,
                  "the VMM gave %" PRIu64 " of %" PRIu64
                  " bytes of the guest's memory page by page: memory that comes and goes "
                  "(virtio-mem) cannot be snapshotted",
                  done, m->total);
    pthread_mutex_lock(&m->lock);
    m->error = err;
    pthread_mutex_unlock(&m->lock);
    io_latch_set(m->over);
}

static const struct guest_source_events events = {
    .pages = on_pages,
    .bytes = on_bytes,
    .memory_done = on_memory_done,
    .done = on_done,
    .opened = on_opened,
};

const struct guest_source_events *memory_image_events(void)
{
    return &events;
}

const struct guest_region *memory_image_regions(const struct memory_image *m, unsigned *ret_n)
{
    *ret_n = m->n;
    return m->regions;
}

void memory_image_progress(struct memory_image *m, uint64_t *ret_done, uint64_t *ret_total)
{
    *ret_done = atomic_load(&m->done);
    *ret_total = m->total;
}

int memory_image_wait(struct memory_image *m, int64_t deadline_ns, int cancel_fd,
                      struct vm_error **err)
{
    cleanup_error struct vm_error *waited = NULL;
    if (io_wait(m->over, POLLIN, deadline_ns, cancel_fd, &waited) < 0)
        return waited->kind == VM_ERROR_TIMEOUT ? 0 : error_propagate(err, steal_ptr(&waited));
    SCOPE_LOCK(&m->lock);
    return m->error ? error_propagate(err, error_copy(m->error)) : 1;
}

/* ---- pages that were kept aside ---- */

/* From `at` up to the end of the hole or the data that begins there, at most COPY_BYTES of data. */
static int next_stretch(int fd, uint64_t at, uint64_t size, uint64_t *ret_end, bool *ret_data,
                        struct vm_error **err)
{
    off_t data = lseek(fd, (off_t)at, SEEK_DATA);
    if (data < 0 && errno != ENXIO)
        return error_errno(err, errno, "cannot read the guest's memory again");
    *ret_data = data >= 0 && (uint64_t)data == at;
    *ret_end = *ret_data ? at + COPY_BYTES : data < 0 ? size : (uint64_t)data;
    *ret_end = *ret_end > size ? size : *ret_end;
    return 0;
}

static int store_block(struct memory_image *m, struct block *b, uint64_t size, uint8_t *buffer,
                       int cancel_fd, struct vm_error **err)
{
    for (uint64_t at = 0, end = 0; at < size; at = end) {
        bool data = false;
        if (io_latch_is_set(cancel_fd))
            return error_set(err, VM_ERROR_CANCELLED, "cancelled");
        if (next_stretch(b->aside, at, size, &end, &data, err) < 0)
            return -1;
        if (data && pread(b->aside, buffer, end - at, (off_t)at) != (ssize_t)(end - at))
            return error_errno(err, errno, "cannot read the guest's memory again");
        if (gather_write(m->setup.gather, b->file, size, at, data ? buffer : NULL, end - at, err) <
            0)
            return -1;
    }
    return 0;
}

int memory_image_store_pages(struct memory_image *m, int cancel_fd, struct vm_error **err)
{
    cleanup_free uint8_t *buffer = malloc(COPY_BYTES);
    if (!buffer)
        return error_nomem(err);
    for (unsigned i = 0; i < m->n && m->setup.repeats; i++)
        if (store_block(m, &m->blocks[i], m->regions[i].size, buffer, cancel_fd, err) < 0)
            return -1;
    return 0;
}

/* ---- device state ---- */

int memory_image_store_state(struct memory_image *m, struct vm_error **err)
{
    struct image_file *file =
        image_session_file(m->setup.session, SNAPSHOT_STATE_FILE, m->state_bytes, err);
    cleanup_free uint8_t *buffer = malloc(COPY_BYTES);
    if (!file)
        return -1;
    if (!buffer)
        return error_nomem(err);
    for (uint64_t at = 0; at < m->state_bytes;) {
        uint64_t left = m->state_bytes - at;
        ssize_t n = pread(m->state_fd, buffer, left < COPY_BYTES ? left : COPY_BYTES, (off_t)at);
        if (n < 0)
            return error_errno(err, errno, "cannot read the VM's device state again");
        /* Less than asked for only at the end: pages stay whole. */
        if ((n < COPY_BYTES && at + (uint64_t)n != m->state_bytes) ||
            gather_write(m->setup.gather, file, m->state_bytes, at, buffer, (uint64_t)n, err) < 0)
            return err && *err ? -1 : error_set(err, VM_ERROR_FAILED, "device state was cut short");
        at += (uint64_t)n;
    }
    return 0;
}

/* ---- life ---- */

static int make_aside(struct block *b, const char *folder, uint64_t size, struct vm_error **err)
{
    b->aside = open(folder, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    if (b->aside < 0 || ftruncate(b->aside, (off_t)size) < 0)
        return error_errno(err, errno, "cannot make a file for the guest's memory in %s", folder);
    return 0;
}

static int add_blocks(struct memory_image *m, struct vm_error **err)
{
    const struct memory_image_setup *s = &m->setup;
    if (qemu_definition_regions(&s->vm->definition, &m->regions, &m->n, err) < 0)
        return -1;
    for (unsigned i = 0; i < m->n; i++) {
        struct block *b = &m->blocks[i];
        uint64_t size = m->regions[i].size;
        b->file = image_session_file(s->session, s->vm->ram_files[i], size, err);
        if (!b->file)
            return -1;
        b->seen = calloc(1, size / GUEST_PAGE_SIZE / 8 + 1);
        if (!b->seen)
            return error_nomem(err);
        if (s->repeats && make_aside(b, s->scratch_dir, size, err) < 0)
            return -1;
        m->total += size;
    }
    return 0;
}

struct memory_image *memory_image_create(const struct memory_image_setup *setup,
                                         struct vm_error **err)
{
    CLEANUP(memory_image) struct memory_image *m = calloc(1, sizeof(*m));
    if (!m) {
        error_nomem(err);
        return NULL;
    }
    m->setup = *setup;
    m->over = -1;
    for (unsigned i = 0; i < GUEST_REGIONS_MAX; i++)
        m->blocks[i].aside = -1;
    pthread_mutex_init(&m->lock, NULL);
    m->state_fd = open(setup->scratch_dir, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    if (m->state_fd < 0) {
        error_errno(err, errno, "cannot make a file for device state in %s", setup->scratch_dir);
        return NULL;
    }
    m->room = setup->repeats ? malloc((size_t)PAGE_BATCH_MAX * GUEST_PAGE_SIZE) : NULL;
    if (setup->repeats && !m->room) {
        error_nomem(err);
        return NULL;
    }
    m->over = io_latch_new(err);
    if (m->over < 0 || add_blocks(m, err) < 0)
        return NULL;
    return steal_ptr(&m);
}

void memory_image_destroy(struct memory_image *m)
{
    if (!m)
        return;
    for (unsigned i = 0; i < m->n; i++) {
        free(m->blocks[i].seen);
        close_fd(&m->blocks[i].aside);
    }
    free(m->room);
    free(m->regions);
    close_fd(&m->state_fd);
    close_fd(&m->over);
    error_free(m->error);
    pthread_mutex_destroy(&m->lock);
    free(m);
}

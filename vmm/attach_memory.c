/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/attach_private.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

/* Holes of hugetlb memory are found by reading; a piece at a time. */
#define PROBE_BYTES (2u << 20)
#define PROBE_PAGES (PROBE_BYTES / GUEST_PAGE_SIZE)

/* ---- Mapping ---- */

/* Long enough, and never shorter than that: no access to the mapping can fault for the VMM's doing. */
static int check_file(int fd, uint64_t bytes, const char *what, struct vm_error **err)
{
    struct stat st;
    int seals = fcntl(fd, F_GET_SEALS);
    if (seals < 0 || !(seals & F_SEAL_SHRINK) || fstat(fd, &st) < 0)
        return error_set(err, VM_ERROR_PROTOCOL, "%s: its file is not sealed against shrinking",
                         what);
    if (st.st_size < 0 || (uint64_t)st.st_size < bytes)
        return error_set(err, VM_ERROR_PROTOCOL, "%s: its file is too short", what);
    return 0;
}

/* Whether memory is huge pages decides how it is read and unmapped: that is not believed. */
static int check_pages(int fd, const Vmmig__Attach__Slot *slot, struct vm_error **err)
{
    struct statfs fs;
    if (fstatfs(fd, &fs) < 0)
        return error_errno(err, errno, "%s: its file cannot be examined", slot->name);
    uint64_t page = fs.f_type == HUGETLBFS_MAGIC ? (uint64_t)fs.f_bsize : GUEST_PAGE_SIZE;
    if (slot->page_size != page || slot->size % page || slot->memfd_offset % page)
        return error_set(err, VM_ERROR_PROTOCOL,
                         "%s: its memory has pages of %llu bytes, the VMM says %llu", slot->name,
                         (unsigned long long)page, (unsigned long long)slot->page_size);
    return 0;
}

static void *map_file(int fd, uint64_t bytes, uint64_t offset, bool writable, const char *what,
                      struct vm_error **err)
{
    /* Huge pages for its holes are the VMM's to reserve. */
    void *base = mmap(NULL, bytes, PROT_READ | (writable ? PROT_WRITE : 0), MAP_SHARED | MAP_NORESERVE, fd,
                      (off_t)offset);
    if (base == MAP_FAILED) {
        error_errno(err, errno, "%s: cannot map it", what);
        return NULL;
    }
    /* The guest's memory does not belong into a core file of the agent. */
    madvise(base, bytes, MADV_DONTDUMP);
    return base;
}

/* The same file with a position of its own: looking for holes moves it. */
static int reopen(int fd, bool writable, struct vm_error **err)
{
    char path[32];
    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    int own = open(path, (writable ? O_RDWR : O_RDONLY) | O_CLOEXEC);
    if (own < 0)
        error_errno(err, errno, "cannot open the guest's memory");
    return own;
}

/* What the process runs by now may be another program, of more rights: that file would be its owner's. */
static bool is_of_user(int fd, uid_t uid)
{
    struct stat st;
    return fstat(fd, &st) == 0 && st.st_uid == uid;
}

/*
 * The memory of that process, also when its number is another's one day. Reading a page that its guest has not written
 * leaves it the template's.
 */
static int open_process(const struct attach_client *client, struct vm_error **err)
{
    const struct process_identity *p = &client->process;
    char path[32];
    snprintf(path, sizeof(path), "/proc/%d/mem", p->pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 && errno != ENOENT)
        return error_set(err, VM_ERROR_REFUSED,
                         "this guest is a clone, whose memory is private to its VMM (pid %d), and the agent may "
                         "not read it there: %s",
                         p->pid, strerror(errno));
    bool lives = fd >= 0 && process_alive(p);
    if (lives && is_of_user(fd, client->uid))
        return fd;
    close_fd(&fd);
    return lives ? error_set(err, VM_ERROR_REFUSED, "the VMM (pid %d) runs with other rights than it had", p->pid)
                 : error_set(err, VM_ERROR_VMM_DIED, "the VMM (pid %d) ended", p->pid);
}

/* hugetlbfs has no write(), and memory that is short there kills whoever writes a mapping of it. */
static void make_sink_region(struct attach_region *r)
{
    r->region.file = r->fd;
    r->region.file_offset = r->offset;
    if (r->region.page_size == GUEST_PAGE_SIZE)
        return;
    r->region.remote = (uintptr_t)r->region.base;
    r->region.process = getpid();
    r->region.process_fd = -1;
}

static int map_region(struct attach_memory_map *m, const Vmmig__Attach__Slot *slot, int fd,
                      bool writable, struct vm_error **err)
{
    struct attach_region *r = &m->regions[m->n];
    *r = (struct attach_region){.pages = slot->size / GUEST_PAGE_SIZE,
                                .fd = -1,
                                .offset = slot->memfd_offset,
                                .dirty = (const uint64_t *)(const void *)((const uint8_t *)m->bitmap +
                                                                          slot->bitmap_offset)};
    snprintf(r->region.name, sizeof(r->region.name), "%s", slot->name);
    r->region.size = slot->size;
    r->region.page_size = slot->page_size;
    if (slot->private_at) {
        r->fd = fd;
        r->offset = slot->private_at;
        m->list[m->n++] = r->region;
        return 0;
    }
    if (check_file(fd, slot->memfd_offset + slot->size, slot->name, err) < 0 || check_pages(fd, slot, err) < 0)
        return -1;
    r->region.base = map_file(fd, slot->size, slot->memfd_offset, writable, slot->name, err);
    if (!r->region.base)
        return -1;
    r->fd = reopen(fd, writable, err);
    if (r->fd > 0 && writable)
        make_sink_region(r);
    m->list[m->n++] = r->region;
    return r->fd < 0 ? -1 : 0;
}

static int map_private(struct attach_memory_map *m, const Vmmig__Attach__Slot *slot,
                       const struct attach_client *client, bool writable, struct vm_error **err)
{
    if (writable)
        return error_set(err, VM_ERROR_REFUSED, "memory slot %s is a template's: no guest can be put there",
                         slot->name);
    int fd = open_process(client, err);
    return fd < 0 ? -1 : map_region(m, slot, fd, false, err);
}

static int map_slots(struct attach_memory_map *m, const struct attach_answer *a,
                     const struct attach_client *client, bool writable, struct vm_error **err)
{
    const Vmmig__Attach__Memory *memory = a->message.memory;
    const int *fd = a->fds;
    for (size_t i = 0; i < memory->n_slots; i++) {
        const Vmmig__Attach__Slot *slot = memory->slots[i];
        if ((slot->private_at ? map_private(m, slot, client, writable, err)
                              : map_region(m, slot, *fd++, writable, err)) < 0)
            return -1;
    }
    return 0;
}

static int map_answer(struct attach_memory_map *m, const struct attach_answer *a,
                      const struct attach_client *client, bool writable, struct vm_error **err)
{
    const Vmmig__Attach__Memory *memory = a->message.memory;
    size_t files = 0;
    for (size_t i = 0; i < memory->n_slots; i++)
        files += !memory->slots[i]->private_at;
    if ((size_t)a->n_fds != files + 1)
        return error_set(err, VM_ERROR_PROTOCOL, "the VMM passed %d descriptors for %zu memory slots",
                         a->n_fds, files);
    m->generation = memory->generation;
    m->bitmap_size = memory->bitmap_size;
    int bitmap_fd = a->fds[files];
    if (check_file(bitmap_fd, m->bitmap_size, "the dirty bitmap", err) < 0)
        return -1;
    m->bitmap = map_file(bitmap_fd, m->bitmap_size, 0, false, "the dirty bitmap", err);
    return m->bitmap ? map_slots(m, a, client, writable, err) : -1;
}

static int check_total(const Vmmig__Attach__Memory *memory, uint64_t *ret_total, struct vm_error **err)
{
    long pages = sysconf(_SC_PHYS_PAGES), page_size = sysconf(_SC_PAGESIZE);
    uint64_t most = (uint64_t)(pages > 0 ? pages : 1) * (uint64_t)page_size * ATTACH_OVERCOMMIT, total = 0;
    for (size_t i = 0; i < memory->n_slots; i++)
        total += memory->slots[i]->size; /* each is checked: there is no overflow */
    *ret_total = total;
    if (total <= most)
        return 0;
    return error_set(err, VM_ERROR_REFUSED,
                     "the guest's memory slots are %llu bytes, more than %d times the memory of this host",
                     (unsigned long long)total, ATTACH_OVERCOMMIT);
}

int attach_memory_ask(struct attach_client *c, struct attach_answer *ret_answer, struct vm_error **err)
{
    uint64_t total;
    cleanup_attach_answer struct attach_answer a = {.n_fds = 0};
    if (attach_request(c, VMMIG__ATTACH__TYPE__GET_MEMORY, NULL, -1, VMMIG__ATTACH__TYPE__MEMORY, &a, err) < 0 ||
        check_total(a.message.memory, &total, err) < 0)
        return -1;
    atomic_store(&c->memory, total);
    *ret_answer = a;
    a = (struct attach_answer){.n_fds = 0};
    return 0;
}

int attach_memory_map(struct attach_memory_map *m, struct attach_client *c, bool writable,
                      struct vm_error **err)
{
    cleanup_attach_answer struct attach_answer a = {.n_fds = 0};
    *m = (struct attach_memory_map){.n = 0};
    if (attach_memory_ask(c, &a, err) < 0)
        return -1;
    if (map_answer(m, &a, c, writable, err) == 0)
        return 0;
    attach_memory_unmap(m);
    return -1;
}

void attach_memory_unmap(struct attach_memory_map *m)
{
    for (unsigned i = 0; i < m->n; i++) {
        if (m->regions[i].region.base)
            munmap(m->regions[i].region.base, m->regions[i].region.size);
        close_fd(&m->regions[i].fd);
    }
    if (m->bitmap)
        munmap(m->bitmap, m->bitmap_size);
    *m = (struct attach_memory_map){.n = 0};
}

/* ---- Holes ---- */

int attach_holes_init(struct attach_holes *h, const struct attach_region *r, struct vm_error **err)
{
    struct stat st;
    *h = (struct attach_holes){.region = r, .probe_start = UINT64_MAX};
    if (fstat(r->fd, &st) < 0)
        return error_errno(err, errno, "cannot look at the memory of %s", r->region.name);
    h->dense = st.st_blocks * 512 >= st.st_size;
    if (r->region.page_size == GUEST_PAGE_SIZE || h->dense)
        return 0;
    h->probe = malloc(PROBE_BYTES);
    return h->probe ? 0 : error_nomem(err);
}

void attach_holes_finish(struct attach_holes *h)
{
    free(h->probe);
    *h = (struct attach_holes){0};
}

/*
 * Only holes are forgotten: to look for the end of a stretch of data again and again, while it is gone through
 * piece by piece, would take time that grows with its square.
 */
void attach_holes_renew(struct attach_holes *h, uint64_t page)
{
    if (page < h->data_start || page >= h->data_end)
        h->data_start = h->data_end = 0;
    h->probe_start = UINT64_MAX;
}

/* hugetlb answers SEEK_DATA with everything, but reading a hole gives zeros without filling it. */
static bool probe_has(struct attach_holes *h, uint64_t page)
{
    static const uint8_t zero[GUEST_PAGE_SIZE];
    const struct attach_region *r = h->region;
    uint64_t start = page / PROBE_PAGES * PROBE_PAGES;
    if (start != h->probe_start) {
        uint64_t at = start * GUEST_PAGE_SIZE;
        size_t n = r->region.size - at < PROBE_BYTES ? (size_t)(r->region.size - at) : PROBE_BYTES;
        h->probe_start = start;
        h->probe_zero = pread(r->fd, h->probe, n, (off_t)(r->offset + at)) == (ssize_t)n;
        for (size_t i = 0; h->probe_zero && i < n; i += GUEST_PAGE_SIZE)
            h->probe_zero = !memcmp(h->probe + i, zero, GUEST_PAGE_SIZE);
    }
    return !h->probe_zero;
}

/* The next stretch of data at or behind the page. Where the file system cannot tell, all of it. */
static void seek_data(struct attach_holes *h, uint64_t page)
{
    const struct attach_region *r = h->region;
    off_t from = (off_t)(r->offset + page * GUEST_PAGE_SIZE);
    off_t data = lseek(r->fd, from, SEEK_DATA);
    h->data_start = page;
    h->data_end = r->pages;
    if (data < 0 && errno == ENXIO)
        h->data_start = r->pages;
    if (data < 0)
        return;
    off_t hole = lseek(r->fd, data, SEEK_HOLE);
    h->data_start = ((uint64_t)data - r->offset) / GUEST_PAGE_SIZE;
    if (hole > data)
        h->data_end = ((uint64_t)hole - r->offset + GUEST_PAGE_SIZE - 1) / GUEST_PAGE_SIZE;
}

bool attach_holes_has(struct attach_holes *h, uint64_t page)
{
    if (h->dense)
        return true;
    if (h->probe)
        return probe_has(h, page);
    if (page >= h->data_end)
        seek_data(h, page);
    return page >= h->data_start;
}

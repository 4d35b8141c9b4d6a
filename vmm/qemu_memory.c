/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/qemu_memory.h"

#include "vmm/qemu_address.h"

#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <linux/memfd.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>

enum { MEMFD_NAME_MAX = 249, POPULATE_BATCH = 256 };

struct qemu_memory {
    unsigned n;
    struct guest_region *regions;
    int fds[GUEST_REGIONS_MAX];
    uint64_t remote[GUEST_REGIONS_MAX]; /* where QEMU has the memfd; 0 if it is none */
    struct process_identity process;
    int process_fd; /* its pidfd; -1 until bind */
};

static int new_memfd(const char *vm, const struct guest_region *r, struct vm_error **err)
{
    char name[MEMFD_NAME_MAX + 1];
    unsigned flags = MFD_CLOEXEC;
    snprintf(name, sizeof(name), "vmmig-%.64s-%.170s", vm, r->name);
    if (r->page_size > GUEST_PAGE_SIZE)
        flags |= MFD_HUGETLB | (unsigned)__builtin_ctzll(r->page_size) << MFD_HUGE_SHIFT;
    cleanup_close int fd = memfd_create(name, flags);
    if (fd < 0)
        return error_errno(err, errno, "cannot make memory with pages of %" PRIu64 " KiB for %s",
                           r->page_size >> 10, r->name);
    if (ftruncate(fd, (off_t)r->size) < 0)
        return error_errno(err, errno, "cannot make %" PRIu64 " MiB of memory for %s",
                           r->size >> 20, r->name);
    return steal_fd(&fd);
}

static int map_region(struct qemu_memory *m, unsigned i, struct vm_error **err)
{
    struct guest_region *r = &m->regions[i];
    /* Huge pages are reserved by mapping them, so that QEMU cannot run out of them later. */
    int flags = MAP_SHARED | (r->page_size > GUEST_PAGE_SIZE ? 0 : MAP_NORESERVE);
    void *base = mmap(NULL, r->size, PROT_READ | PROT_WRITE, flags, m->fds[i], 0);
    if (base == MAP_FAILED && errno == ENOMEM && r->page_size > GUEST_PAGE_SIZE)
        return error_set(err, VM_ERROR_NO_SPACE,
                         "not enough huge pages of %" PRIu64 " KiB for %" PRIu64 " MiB of %s",
                         r->page_size >> 10, r->size >> 20, r->name);
    if (base == MAP_FAILED)
        return error_errno(err, errno, "cannot map %" PRIu64 " MiB of %s", r->size >> 20, r->name);
    r->base = base;
    r->file = r->page_size > GUEST_PAGE_SIZE ? 0 : m->fds[i]; /* hugetlbfs has no write() */
    madvise(base, r->size, MADV_DONTDUMP);
    return 0;
}

struct qemu_memory *qemu_memory_create_unmapped(const struct qemu_definition *d,
                                                struct vm_error **err)
{
    CLEANUP(qemu_memory) struct qemu_memory *m = calloc(1, sizeof(*m));
    if (!m) {
        error_nomem(err);
        return NULL;
    }
    m->process_fd = -1;
    for (unsigned i = 0; i < GUEST_REGIONS_MAX; i++)
        m->fds[i] = -1;
    if (qemu_definition_regions(d, &m->regions, &m->n, err) < 0)
        return NULL;
    return steal_ptr(&m);
}

struct qemu_memory *qemu_memory_create(const char *vm, const struct qemu_definition *d,
                                       struct vm_error **err)
{
    CLEANUP(qemu_memory) struct qemu_memory *m = qemu_memory_create_unmapped(d, err);
    bool may = qemu_address_may();
    for (unsigned i = 0; m && i < m->n; i++) {
        m->regions[i].zero = true; /* a new memfd, or new private memory: a QEMU that waits writes nothing there */
        if (may && qemu_argv_is_private(d, i))
            continue;
        m->fds[i] = new_memfd(vm, &m->regions[i], err);
        if (m->fds[i] < 0 || map_region(m, i, err) < 0)
            return NULL;
    }
    return steal_ptr(&m);
}

void qemu_memory_destroy(struct qemu_memory *m)
{
    if (!m)
        return;
    for (unsigned i = 0; i < m->n; i++) {
        if (m->regions[i].base)
            munmap(m->regions[i].base, m->regions[i].size);
        close_fd(&m->fds[i]);
    }
    close_fd(&m->process_fd);
    free(m->regions);
    free(m);
}

const struct guest_region *qemu_memory_regions(const struct qemu_memory *m, unsigned *ret_n)
{
    *ret_n = m->n;
    return m->regions;
}

const int *qemu_memory_fds(const struct qemu_memory *m)
{
    return m->fds;
}

/* A line of /proc/PID/maps: does it map one of our files from its beginning, whole? */
static void take_mapping(struct qemu_memory *m, const struct stat *files, const char *line)
{
    uint64_t from, to, offset, inode;
    unsigned major_no, minor_no;
    if (sscanf(line, "%" SCNx64 "-%" SCNx64 " %*s %" SCNx64 " %x:%x %" SCNu64, &from, &to, &offset,
               &major_no, &minor_no, &inode) != 6)
        return;
    for (unsigned i = 0; i < m->n; i++)
        if (m->fds[i] >= 0 && files[i].st_ino == inode && files[i].st_dev == makedev(major_no, minor_no) && !offset &&
            to - from >= m->regions[i].size)
            m->remote[i] = from;
}

static int bind_files(struct qemu_memory *m, struct vm_error **err)
{
    struct stat files[GUEST_REGIONS_MAX];
    char path[32];
    for (unsigned i = 0; i < m->n; i++)
        if (m->fds[i] >= 0 && fstat(m->fds[i], &files[i]) < 0)
            return error_errno(err, errno, "cannot look at the memory of %s", m->regions[i].name);
    snprintf(path, sizeof(path), "/proc/%d/maps", m->process.pid);
    cleanup_fclose FILE *maps = fopen(path, "re");
    if (!maps)
        return error_errno(err, errno, "cannot read %s", path);
    cleanup_free char *line = NULL;
    size_t cap = 0;
    while (getline(&line, &cap, maps) > 0)
        take_mapping(m, files, line);
    for (unsigned i = 0; i < m->n; i++) {
        if (m->fds[i] < 0)
            continue;
        if (!m->remote[i])
            return error_set(err, VM_ERROR_FAILED, "QEMU has not mapped the memory made for %s",
                             m->regions[i].name);
        if (!m->regions[i].file)
            close_fd(&m->fds[i]);
    }
    return 0;
}

int qemu_memory_bind(struct qemu_memory *m, struct qemu *q, struct vm_error **err)
{
    m->process = qemu_guest(q)->process;
    m->process_fd = (int)syscall(SYS_pidfd_open, m->process.pid, 0);
    if (m->process_fd < 0)
        return error_errno(err, errno, "cannot watch process %d", m->process.pid);
    /* What the descriptor is of was QEMU a moment ago. */
    if (!process_alive(&m->process))
        return error_set(err, VM_ERROR_VMM_DIED, "QEMU (process %d) ended", m->process.pid);
    return bind_files(m, err) < 0
               ? -1
               : qemu_address_find(q, m->process_fd, m->regions, m->n, err);
}

static unsigned gather(const struct qemu_memory *m, const uint64_t *addrs, unsigned n,
                       struct iovec *remote)
{
    unsigned gathered = 0;
    for (unsigned i = 0; i < n; i++) {
        unsigned region = page_addr_region(addrs[i]);
        uint64_t page = page_addr_number(addrs[i]);
        if (region >= m->n || page >= m->regions[region].size / GUEST_PAGE_SIZE ||
            !m->remote[region])
            continue;
        uint64_t at = m->remote[region] + page * GUEST_PAGE_SIZE;
        remote[gathered++] = (struct iovec){(void *)(uintptr_t)at, 1};
    }
    return gathered;
}

static int populate_batch(struct qemu_memory *m, const uint64_t *addrs, unsigned n,
                          struct vm_error **err)
{
    struct iovec remote[POPULATE_BATCH];
    char bytes[POPULATE_BATCH];
    unsigned gathered = gather(m, addrs, n, remote);
    if (!gathered)
        return 0;
    struct iovec local = {bytes, gathered};
    ssize_t got = process_vm_readv(m->process.pid, &local, 1, remote, gathered, 0);
    if (got < 0 && errno == ESRCH)
        return error_set(err, VM_ERROR_VMM_DIED, "QEMU (process %d) ended", m->process.pid);
    if (got < 0)
        return error_errno(err, errno, "cannot reach the memory of QEMU (process %d)",
                           m->process.pid);
    if ((unsigned)got < gathered)
        return error_set(err, VM_ERROR_NO_SPACE, "no memory for the guest's pages");
    return 0;
}

/* A byte of each page is read at QEMU's address: that faults it in on QEMU's account. */
int qemu_memory_populate(struct qemu_memory *m, const uint64_t *addrs, unsigned n,
                         struct vm_error **err)
{
    for (unsigned done = 0; done < n; done += POPULATE_BATCH) {
        unsigned some = n - done < POPULATE_BATCH ? n - done : POPULATE_BATCH;
        if (populate_batch(m, addrs + done, some, err) < 0)
            return -1;
    }
    return 0;
}

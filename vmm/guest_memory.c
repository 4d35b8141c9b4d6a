/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/guest_memory.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

/* It is no child of ours: once it ended its number is free for another process. */
static bool has_ended(const struct guest_region *r)
{
    struct pollfd p = {.fd = r->process_fd, .events = POLLIN};
    return poll(&p, 1, 0) != 0;
}

static int process_ended(const struct guest_region *r, struct vm_error **err)
{
    return error_set(err, VM_ERROR_VMM_DIED, "the VM's process %d ended", r->process);
}

static int remote_failed(const struct guest_region *r, ssize_t n, struct vm_error **err)
{
    if (n < 0 && errno == ESRCH)
        return process_ended(r, err);
    /* What lies there was found to be memory: a fault means that there is none left. */
    if (n >= 0 || errno == EFAULT || errno == ENOMEM)
        return error_set(err, VM_ERROR_NO_SPACE, "no memory for the guest's pages of %s", r->name);
    return error_errno(err, errno, "cannot reach the memory %s of process %d", r->name, r->process);
}

static int write_remote(const struct guest_region *r, uint64_t offset, const void *data, size_t len,
                        struct vm_error **err)
{
    struct iovec from = {(void *)(uintptr_t)data, len};
    struct iovec to = {(void *)(uintptr_t)(r->remote + offset), len};
    if (has_ended(r))
        return process_ended(r, err);
    ssize_t n = process_vm_writev(r->process, &from, 1, &to, 1, 0);
    return n == (ssize_t)len ? 0 : remote_failed(r, n, err);
}

static int write_file(const struct guest_region *r, uint64_t offset, const uint8_t *data, size_t len,
                      struct vm_error **err)
{
    for (size_t done = 0; done < len;) {
        ssize_t n = pwrite(r->file, data + done, len - done, (off_t)(r->file_offset + offset + done));
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return error_set(err, VM_ERROR_NO_SPACE, "no memory for the guest's pages of %s: %s",
                             r->name, strerror(n ? errno : ENOSPC));
        done += (size_t)n;
    }
    return 0;
}

int guest_region_write(const struct guest_region *r, uint64_t offset, const void *data, size_t len,
                       struct vm_error **err)
{
    if (r->remote)
        return write_remote(r, offset, data, len, err);
    if (r->file)
        return write_file(r, offset, data, len, err);
    memcpy(r->base + offset, data, len);
    return 0;
}

int guest_region_look(const struct guest_region *r, uint64_t offset, uint8_t *room,
                      const uint8_t **ret_page, struct vm_error **err)
{
    *ret_page = room;
    if (r->file && pread(r->file, room, GUEST_PAGE_SIZE, (off_t)(r->file_offset + offset)) == (ssize_t)GUEST_PAGE_SIZE)
        return 0;
    if (r->remote) {
        struct iovec to = {room, GUEST_PAGE_SIZE};
        struct iovec from = {(void *)(uintptr_t)(r->remote + offset), GUEST_PAGE_SIZE};
        if (has_ended(r))
            return process_ended(r, err);
        ssize_t n = process_vm_readv(r->process, &to, 1, &from, 1, 0);
        return n == (ssize_t)GUEST_PAGE_SIZE ? 0 : remote_failed(r, n, err);
    }
    *ret_page = r->base + offset;
    return 0;
}

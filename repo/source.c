/* SPDX-License-Identifier: Apache-2.0 */
#include "repo/source_driver.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

struct source *source_open_fd(int fd, const char *name, struct vm_error **err)
{
    struct stat st;
    if (fstat(fd, &st) < 0) {
        error_errno(err, errno, "cannot look at %s", name);
        return NULL;
    }
    return S_ISSOCK(st.st_mode) ? source_nbd_open(fd, name, err) : source_raw_open(fd, name, err);
}

void source_close(struct source *s)
{
    if (s)
        s->driver->close(s);
}

uint64_t source_size(const struct source *s)
{
    return s->size;
}

int source_extent(struct source *s, uint64_t offset, uint64_t *ret_len, bool *ret_zero,
                  struct vm_error **err)
{
    return s->driver->extent(s, offset, ret_len, ret_zero, err);
}

int source_read(struct source *s, uint64_t offset, void *out, size_t len, struct vm_error **err)
{
    return s->driver->read(s, offset, out, len, err);
}

/* ---- raw files and block devices ---- */

struct source_raw {
    struct source source;
    int fd;
    char *path;
    uint64_t data_start, data_end; /* data that was found last; holes may be written to meanwhile */
};

/* Behind the end of a file there is no hole, though lseek says the same. Leaves errno as it is. */
static bool raw_shrank(const struct source_raw *r)
{
    int lseek_errno = errno;
    struct stat st;
    bool shrank = fstat(r->fd, &st) == 0 && S_ISREG(st.st_mode) &&
                  (uint64_t)st.st_size < r->source.size;
    errno = lseek_errno;
    return shrank;
}

/*
 * Where data that is not on the disk yet ends is told by a look at each of its pages, so not asked
 * for again from every offset within it.
 */
static int raw_extent(struct source *s, uint64_t offset, uint64_t *ret_len, bool *ret_zero,
                      struct vm_error **err)
{
    struct source_raw *r = (struct source_raw *)s;
    if (offset >= r->data_start && offset < r->data_end) {
        *ret_len = r->data_end - offset;
        *ret_zero = false;
        return 0;
    }
    off_t data = lseek(r->fd, (off_t)offset, SEEK_DATA);
    if (data < 0 && errno == ENXIO && raw_shrank(r))
        return error_set(err, VM_ERROR_FAILED, "%s shrank while it was read", r->path);
    if (data < 0 && errno != ENXIO) { /* a device, or a file system that cannot tell */
        *ret_len = s->size - offset;
        *ret_zero = false;
        return 0;
    }
    if (data < 0 || (uint64_t)data > s->size)
        data = (off_t)s->size; /* a hole up to the end */
    *ret_zero = (uint64_t)data > offset;
    if (*ret_zero) {
        *ret_len = (uint64_t)data - offset;
        return 0;
    }
    off_t hole = lseek(r->fd, (off_t)offset, SEEK_HOLE);
    if (hole <= (off_t)offset)
        return error_set(err, VM_ERROR_FAILED, "%s shrank while it was read", r->path);
    r->data_start = offset;
    r->data_end = (uint64_t)hole < s->size ? (uint64_t)hole : s->size;
    *ret_len = r->data_end - offset;
    return 0;
}

static int raw_read(struct source *s, uint64_t offset, void *out, size_t len, struct vm_error **err)
{
    struct source_raw *r = (struct source_raw *)s;
    for (size_t done = 0; done < len;) {
        ssize_t n = pread(r->fd, (char *)out + done, len - done, (off_t)(offset + done));
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return error_errno(err, errno, "cannot read %s", r->path);
        if (!n)
            return error_set(err, VM_ERROR_FAILED, "%s shrank while it was read", r->path);
        done += (size_t)n;
    }
    return 0;
}

static void raw_close(struct source *s)
{
    struct source_raw *r = (struct source_raw *)s;
    close_fd(&r->fd);
    free(r->path);
    free(r);
}

static const struct source_driver raw_driver = {raw_close, raw_extent, raw_read};

static int raw_size(int fd, const char *path, uint64_t *ret_size, struct vm_error **err)
{
    struct stat st;
    if (fstat(fd, &st) < 0)
        return error_errno(err, errno, "cannot look at %s", path);
    *ret_size = (uint64_t)st.st_size;
    if (S_ISBLK(st.st_mode) && ioctl(fd, BLKGETSIZE64, ret_size) < 0)
        return error_errno(err, errno, "cannot tell the size of %s", path);
    if (!S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode))
        return error_set(err, VM_ERROR_USAGE, "%s is neither a file nor a block device", path);
    return 0;
}

struct source *source_raw_open(int from, const char *name, struct vm_error **err)
{
    uint64_t size;
    cleanup_close int fd = fcntl(from, F_DUPFD_CLOEXEC, 3);
    if (fd < 0) {
        error_errno(err, errno, "cannot read %s", name);
        return NULL;
    }
    if (raw_size(fd, name, &size, err) < 0)
        return NULL;
    struct source_raw *r = calloc(1, sizeof(*r));
    char *copy = strdup(name);
    if (!r || !copy) {
        free(r);
        free(copy);
        error_nomem(err);
        return NULL;
    }
    posix_fadvise(fd, 0, 0, POSIX_FADV_SEQUENTIAL);
    r->source = (struct source){&raw_driver, size};
    r->fd = steal_fd(&fd);
    r->path = copy;
    return &r->source;
}

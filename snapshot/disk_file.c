/* SPDX-License-Identifier: Apache-2.0 */
#include "snapshot/disk_file.h"

#include "base/fault.h"
#include "snapshot/qemu_nbd.h"
#include "snapshot/rbd_image.h"
#include "snapshot/run_tool.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct disk_file {
    char *path;
    int fd;               /* raw */
    struct qemu_nbd *nbd; /* others */
};

static int make_formatted(const char *path, const char *format, uint64_t size, int cancel_fd,
                          struct vm_error **err)
{
    const struct run_tool_limits limits = {.cancel_fd = cancel_fd};
    char bytes[32], what[256];
    const char *argv[] = {"qemu-img", "create", "-q", "-f", format, "--", path, bytes, NULL};
    snprintf(bytes, sizeof(bytes), "%" PRIu64, size);
    snprintf(what, sizeof(what), "make the %s image %.180s", format, path);
    cleanup_free char *said = run_tool(argv, what, &limits, err);
    return said ? 0 : -1;
}

int disk_file_make(const char *path, const char *format, uint64_t size, disk_file_made *made, void *arg,
                   int cancel_fd, struct vm_error **err)
{
    if (rbd_image_is(path)) /* exclusive by itself */
        return make_formatted(path, format, size, cancel_fd, err);
    /* Exclusive in either case: qemu-img would write over what is there. */
    cleanup_close int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0)
        return error_errno(err, errno, "cannot make %s", path);
    if (made(arg, err) < 0)
        return -1;
    FAULT("restore.format");
    if (!strcmp(format, "raw"))
        return ftruncate(fd, (off_t)size) < 0 ? error_errno(err, errno, "cannot size %s", path) : 0;
    return make_formatted(path, format, size, cancel_fd, err);
}

struct disk_file *disk_file_open(const char *path, const char *format, int cancel_fd, struct vm_error **err)
{
    CLEANUP(disk_file) struct disk_file *f = calloc(1, sizeof(*f));
    if (!f || !(f->path = strdup(path))) {
        if (f)
            f->fd = -1;
        error_nomem(err);
        return NULL;
    }
    f->fd = -1;
    if (strcmp(format, "raw") != 0 || rbd_image_is(path)) {
        f->nbd = qemu_nbd_start(path, format, cancel_fd, err);
        return f->nbd ? steal_ptr(&f) : NULL;
    }
    f->fd = open(path, O_WRONLY | O_NOFOLLOW | O_CLOEXEC);
    if (f->fd < 0) {
        error_errno(err, errno, "cannot write %s", path);
        return NULL;
    }
    return steal_ptr(&f);
}

int disk_file_write(struct disk_file *f, uint64_t offset, const void *data, size_t len,
                    struct vm_error **err)
{
    if (f->nbd)
        return qemu_nbd_write(f->nbd, offset, data, len, err);
    for (size_t done = 0; done < len;) {
        ssize_t n = pwrite(f->fd, (const char *)data + done, len - done, (off_t)(offset + done));
        if (n < 0 && errno != EINTR)
            return error_errno(err, errno, "cannot write %s", f->path);
        done += n > 0 ? (size_t)n : 0;
    }
    return 0;
}

int disk_file_finish(struct disk_file *f, struct vm_error **err)
{
    CLEANUP(disk_file) struct disk_file *owned = f;
    if (f->nbd && qemu_nbd_finish(f->nbd, err) < 0)
        return -1;
    if (f->fd >= 0 && fdatasync(f->fd) < 0)
        return error_errno(err, errno, "cannot complete %s", f->path);
    return 0;
}

void disk_file_close(struct disk_file *f)
{
    if (!f)
        return;
    qemu_nbd_stop(f->nbd);
    close_fd(&f->fd);
    free(f->path);
    free(f);
}

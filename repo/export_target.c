/* SPDX-License-Identifier: Apache-2.0 */
/* The file of an export: it belongs to the command, whoever writes it. */
#include "repo/repo.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* A file without a name in that folder, or with one where the file system cannot do that. */
static int make_file(const char *path)
{
    const char *slash = strrchr(path, '/');
    cleanup_free char *folder = slash ? strndup(path, (size_t)(slash - path) + 1) : strdup(".");
    int fd = folder ? open(folder, O_WRONLY | O_TMPFILE | O_CLOEXEC, 0600) : -1;
    if (fd < 0 && folder && (errno == EOPNOTSUPP || errno == EISDIR))
        fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    return fd;
}

int image_export_target(const char *path, int *ret_fd, struct vm_error **err)
{
    struct stat st;
    bool there = lstat(path, &st) == 0;
    if (there && (stat(path, &st) < 0 || !S_ISBLK(st.st_mode)))
        return error_errno(err, EEXIST, "cannot make %s", path);
    int fd = there ? open(path, O_WRONLY | O_CLOEXEC) : make_file(path);
    if (fd < 0)
        return error_errno(err, errno, "cannot make %s", path);
    *ret_fd = fd;
    return 0;
}

/* Its links tell whether the file has a name. */
static bool is_file(int fd, bool named)
{
    struct stat st;
    return fstat(fd, &st) == 0 && S_ISREG(st.st_mode) && (st.st_nlink > 0) == named;
}

int image_export_keep(const char *path, int fd, struct vm_error **err)
{
    char self[64];
    snprintf(self, sizeof(self), "/proc/self/fd/%d", fd);
    if (is_file(fd, false) && linkat(AT_FDCWD, self, AT_FDCWD, path, AT_SYMLINK_FOLLOW) < 0)
        return error_errno(err, errno, "cannot name what was exported %s", path);
    return 0;
}

void image_export_undo(const char *path, int fd)
{
    if (is_file(fd, true))
        unlink(path);
}

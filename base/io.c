/* SPDX-License-Identifier: Apache-2.0 */
#include "base/io.h"

#include "base/cleanup.h"
#include "base/clock.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/openat2.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { MAX_PASSED_FDS = 64, RENAMES_MAX = 100 };

int io_wait(int fd, short events, int64_t deadline_ns, int cancel_fd, struct vm_error **err)
{
    for (;;) {
        struct pollfd p[2] = {{.fd = fd, .events = events}, {.fd = cancel_fd, .events = POLLIN}};
        int n = poll(p, 2, clock_ms_until(deadline_ns));
        if (n < 0 && errno != EINTR)
            return error_errno(err, errno, "poll");
        if (n > 0 && p[1].revents)
            return error_set(err, VM_ERROR_CANCELLED, "cancelled");
        if (n > 0 && p[0].revents)
            return 0;
        if (n == 0 && clock_mono_ns() >= deadline_ns)
            return error_set(err, VM_ERROR_TIMEOUT, "no answer within the time limit");
    }
}

static bool would_block(int errnum)
{
    return errnum == EAGAIN || errnum == EWOULDBLOCK;
}

ssize_t io_read_some(int fd, void *out, size_t n, int64_t deadline_ns, int cancel_fd,
                     struct vm_error **err)
{
    for (;;) {
        if (io_wait(fd, POLLIN, deadline_ns, cancel_fd, err) < 0)
            return -1;
        ssize_t got = read(fd, out, n);
        if (got >= 0)
            return got;
        if (errno != EINTR && !would_block(errno))
            return error_errno(err, errno, "read");
    }
}

int io_read_full(int fd, void *out, size_t n, int64_t deadline_ns, int cancel_fd,
                 struct vm_error **err)
{
    char *p = out;
    while (n) {
        ssize_t got = io_read_some(fd, p, n, deadline_ns, cancel_fd, err);
        if (got < 0)
            return -1;
        if (got == 0)
            return error_set(err, VM_ERROR_UNREACHABLE, "the other side closed the connection");
        p += got;
        n -= (size_t)got;
    }
    return 0;
}

int io_write_full(int fd, const void *data, size_t n, int64_t deadline_ns, int cancel_fd,
                  struct vm_error **err)
{
    struct iovec iov = {(void *)(uintptr_t)data, n};
    return io_writev_full(fd, &iov, 1, deadline_ns, cancel_fd, err);
}

/* One write without waiting; sockets must not raise SIGPIPE nor block. */
static ssize_t write_now(int fd, struct iovec *iov, int n)
{
    struct msghdr msg = {.msg_iov = iov, .msg_iovlen = (size_t)n};
    ssize_t put = sendmsg(fd, &msg, MSG_NOSIGNAL | MSG_DONTWAIT);
    return put < 0 && errno == ENOTSOCK ? writev(fd, iov, n) : put;
}

int io_writev_full(int fd, struct iovec *iov, int n, int64_t deadline_ns, int cancel_fd,
                   struct vm_error **err)
{
    while (n) {
        if (!iov->iov_len) {
            iov++;
            n--;
            continue;
        }
        ssize_t put = write_now(fd, iov, n > IOV_MAX ? IOV_MAX : n);
        if (put < 0 && errno != EINTR && !would_block(errno))
            return error_errno(err, errno, "write");
        if (put < 0) {
            if (io_wait(fd, POLLOUT, deadline_ns, cancel_fd, err) < 0)
                return -1;
            continue;
        }
        while (n && (size_t)put >= iov->iov_len) {
            put -= (ssize_t)iov->iov_len;
            iov++;
            n--;
        }
        if (put) {
            iov->iov_base = (char *)iov->iov_base + put;
            iov->iov_len -= (size_t)put;
        }
    }
    return 0;
}

int io_set_nonblocking(int fd, bool on, struct vm_error **err)
{
    int flags = fcntl(fd, F_GETFL);
    if (flags < 0 || fcntl(fd, F_SETFL, on ? flags | O_NONBLOCK : flags & ~O_NONBLOCK) < 0)
        return error_errno(err, errno, "fcntl");
    return 0;
}

int io_open_within(const char *root, const char *path, int flags)
{
    if (!*root)
        return open(path, flags | O_CLOEXEC);
    struct open_how how = {.flags = (unsigned)(flags | O_CLOEXEC), .resolve = RESOLVE_IN_ROOT};
    cleanup_close int top = open(root, O_PATH | O_DIRECTORY | O_CLOEXEC);
    int fd = -1;
    /* EAGAIN: something was renamed meanwhile, and the kernel is not sure that it stayed inside. */
    for (int tries = 0; top >= 0 && fd < 0 && tries < RENAMES_MAX && (!tries || errno == EAGAIN);
         tries++)
        fd = (int)syscall(SYS_openat2, top, path, &how, sizeof(how));
    return fd;
}

int io_look_at(const char *root, const char *path, mode_t type, struct vm_error **err)
{
    struct stat st;
    cleanup_close int fd = io_open_within(root, path, O_PATH);
    if (fd < 0 || fstat(fd, &st) < 0)
        return error_errno(err, errno, "cannot look at %s", path);
    if ((st.st_mode & S_IFMT) != type)
        return error_set(err, VM_ERROR_REFUSED, "%s is not a %s", path,
                         type == S_IFBLK ? "block device" : "file");
    return steal_fd(&fd);
}

int io_open_type(const char *root, const char *path, mode_t type, struct vm_error **err)
{
    char self[64];
    cleanup_close int place = io_look_at(root, path, type, err);
    if (place < 0)
        return -1;
    snprintf(self, sizeof(self), "/proc/self/fd/%d", place);
    int fd = open(self, O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    return fd < 0 ? error_errno(err, errno, "cannot open %s", path) : fd;
}

int io_read_all(int fd, const char *path, size_t max, char **ret_data, size_t *ret_len,
                struct vm_error **err)
{
    size_t cap = 4096, len = 0;
    cleanup_free char *data = malloc(cap + 1);
    if (!data)
        return error_nomem(err);
    for (;;) {
        ssize_t n = read(fd, data + len, cap - len);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return error_errno(err, errno, "cannot read %s", path);
        if (n == 0)
            break;
        len += (size_t)n;
        if (len > max)
            return error_set(err, VM_ERROR_REFUSED, "%s is larger than %zu bytes", path, max);
        if (len == cap) {
            cap *= 2;
            char *more = realloc(data, cap + 1);
            if (!more)
                return error_nomem(err);
            data = more;
        }
    }
    data[len] = 0;
    *ret_data = steal_ptr(&data);
    if (ret_len)
        *ret_len = len;
    return 0;
}

int io_read_file(const char *path, size_t max, char **ret_data, size_t *ret_len,
                 struct vm_error **err)
{
    cleanup_close int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return error_errno(err, errno, "cannot open %s", path);
    return io_read_all(fd, path, max, ret_data, ret_len, err);
}

int io_sync_folder_of(const char *path, struct vm_error **err)
{
    cleanup_free char *folder = strdup(path);
    if (!folder)
        return error_nomem(err);
    char *slash = strrchr(folder, '/');
    if (slash)
        slash[slash == folder] = 0;
    const char *name = slash ? folder : ".";
    cleanup_close int fd = open(name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    /* EINVAL: a file system that keeps nothing, as that of cgroups. */
    if (fd < 0 || (fsync(fd) < 0 && errno != EINVAL))
        return error_errno(err, errno, "cannot sync folder %s", name);
    return 0;
}

int io_write_file_durably(const char *path, const void *data, size_t len, mode_t mode,
                          struct vm_error **err)
{
    cleanup_free char *temporary = NULL;
    if (asprintf(&temporary, "%s.%d.tmp", path, getpid()) < 0)
        return error_nomem(err);
    /* What lies there is a dead process's, or was put there by somebody who may write here. */
    unlink(temporary);
    cleanup_close int fd = open(temporary, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, mode);
    if (fd < 0)
        return error_errno(err, errno, "cannot create %s", temporary);
    if (io_write_full(fd, data, len, INT64_MAX, -1, err) < 0) {
        unlink(temporary);
        return error_wrap(err, "cannot write %s", temporary);
    }
    if (fsync(fd) < 0 || rename(temporary, path) < 0) {
        error_errno(err, errno, "cannot write %s", path);
        unlink(temporary);
        return -1;
    }
    return io_sync_folder_of(path, err);
}

/*
 * The new entry is on the disk, too: what is written into the folder later is worth nothing without
 * it.
 */
static int make_folder(const char *path, mode_t mode, struct vm_error **err)
{
    if (mkdir(path, mode) < 0)
        return errno == EEXIST ? 0 : error_errno(err, errno, "cannot make folder %s", path);
    return io_sync_folder_of(path, err);
}

int io_make_folders(const char *path, mode_t mode, struct vm_error **err)
{
    cleanup_free char *copy = strdup(path);
    if (!copy)
        return error_nomem(err);
    for (char *p = copy + 1; *p; p++) {
        if (*p != '/')
            continue;
        *p = 0;
        if (make_folder(copy, mode, err) < 0)
            return -1;
        *p = '/';
    }
    return make_folder(copy, mode, err);
}

int io_send_fds(int socket, const void *data, size_t n, const int *fds, int n_fds,
                struct vm_error **err)
{
    if (n_fds > MAX_PASSED_FDS)
        return error_set(err, VM_ERROR_USAGE, "at most %d descriptors can be passed at once",
                         MAX_PASSED_FDS);
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof(int) * MAX_PASSED_FDS)] = {0};
    struct iovec iov = {(void *)(uintptr_t)data, n};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};
    if (n_fds) {
        msg.msg_control = control;
        msg.msg_controllen = CMSG_SPACE(sizeof(int) * (size_t)n_fds);
        struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(sizeof(int) * (size_t)n_fds);
        memcpy(CMSG_DATA(c), fds, sizeof(int) * (size_t)n_fds);
    }
    ssize_t put;
    do {
        put = sendmsg(socket, &msg, MSG_NOSIGNAL);
    } while (put < 0 && errno == EINTR);
    if (put < 0)
        return error_errno(err, errno, "cannot pass descriptors");
    /* The descriptors went with the first byte; the rest is ordinary data. */
    return io_write_full(socket, (const char *)data + put, n - (size_t)put, INT64_MAX, -1, err);
}

/*
 * Take the descriptors out of a received message; those over max are closed. Returns how many came.
 */
static int take_fds(struct msghdr *msg, int *ret_fds, int max_fds)
{
    int n = 0;
    for (struct cmsghdr *c = CMSG_FIRSTHDR(msg); c; c = CMSG_NXTHDR(msg, c)) {
        if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
            continue;
        int count = (int)((c->cmsg_len - CMSG_LEN(0)) / sizeof(int));
        for (int i = 0; i < count; i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(c) + sizeof(int) * (size_t)i, sizeof(fd));
            if (n < max_fds)
                ret_fds[n] = fd;
            else
                close(fd);
            n++;
        }
    }
    return n;
}

ssize_t io_recv_fds(int socket, void *data, size_t n, int *ret_fds, int max_fds, int *ret_n_fds,
                    struct vm_error **err)
{
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof(int) * MAX_PASSED_FDS)];
    struct iovec iov = {data, n};
    struct msghdr msg = {.msg_iov = &iov,
                         .msg_iovlen = 1,
                         .msg_control = control,
                         .msg_controllen = sizeof(control)};
    ssize_t got;
    do {
        got = recvmsg(socket, &msg, MSG_CMSG_CLOEXEC);
    } while (got < 0 && errno == EINTR);
    if (got < 0)
        return error_errno(err, errno, "cannot receive");
    int count = take_fds(&msg, ret_fds, max_fds);
    if (count > max_fds || msg.msg_flags & MSG_CTRUNC) {
        for (int i = 0; i < count && i < max_fds; i++)
            close(ret_fds[i]);
        return error_set(err, VM_ERROR_PROTOCOL, "more descriptors were passed than expected");
    }
    *ret_n_fds = count;
    return got;
}

int io_latch_new(struct vm_error **err)
{
    int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (fd < 0)
        return error_errno(err, errno, "cannot make an eventfd");
    return fd;
}

void io_latch_set(int fd)
{
    eventfd_write(fd, 1);
}

bool io_latch_is_set(int fd)
{
    struct pollfd p = {.fd = fd, .events = POLLIN};
    return poll(&p, 1, 0) > 0;
}

int io_latch_either(int a, int b, struct vm_error **err)
{
    const int latches[] = {a, b};
    cleanup_close int either = epoll_create1(EPOLL_CLOEXEC);
    if (either < 0)
        return error_errno(err, errno, "cannot make an epoll descriptor");
    for (int i = 0; i < 2; i++) {
        struct epoll_event e = {.events = EPOLLIN};
        if (latches[i] >= 0 && epoll_ctl(either, EPOLL_CTL_ADD, latches[i], &e) < 0)
            return error_errno(err, errno, "cannot watch a latch");
    }
    return steal_fd(&either);
}

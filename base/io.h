/* SPDX-License-Identifier: Apache-2.0 */
/*
 * io: whole reads and writes on descriptors, with a deadline and a way to interrupt them.
 *
 * Deadlines are monotonic nanoseconds (base/clock.h), INT64_MAX for none. `cancel_fd` is an eventfd
 * (or -1): once it is readable every wait ends with CANCELLED; so a thread that blocks here is
 * stopped by another without signals. Descriptors may be blocking or not; sockets are never waited
 * for inside read or write.
 */
#ifndef VMMIG_BASE_IO_H
#define VMMIG_BASE_IO_H

#include "base/error.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

/* Wait for `events` (POLLIN, POLLOUT) on fd: 0, or TIMEOUT or CANCELLED. */
int io_wait(int fd, short events, int64_t deadline_ns, int cancel_fd, struct vm_error **err);
/* Exactly n bytes. An end of file before that is UNREACHABLE ("closed the connection"). */
int io_read_full(int fd, void *out, size_t n, int64_t deadline_ns, int cancel_fd,
                 struct vm_error **err);
/* Between 1 and n bytes; 0 at end of file. */
ssize_t io_read_some(int fd, void *out, size_t n, int64_t deadline_ns, int cancel_fd,
                     struct vm_error **err);
int io_write_full(int fd, const void *data, size_t n, int64_t deadline_ns, int cancel_fd,
                  struct vm_error **err);
/* All of iov, which is consumed (modified). */
int io_writev_full(int fd, struct iovec *iov, int n, int64_t deadline_ns, int cancel_fd,
                   struct vm_error **err);

int io_set_nonblocking(int fd, bool on, struct vm_error **err);
/*
 * open(2), as a process would whose root directory is `root` ("": this one's): links, absolute ones
 * too, do not lead out of it. -1 and errno.
 */
int io_open_within(const char *root, const char *path, int flags);
/*
 * A descriptor to read from of a path, within `root`, that somebody else named. What is not of that
 * type (S_IFREG, S_IFBLK) is refused without being opened: a device may act on that, a FIFO may
 * wait for ever.
 */
int io_open_type(const char *root, const char *path, mode_t type, struct vm_error **err);
/* Likewise, O_PATH: one that may be looked at only. */
int io_look_at(const char *root, const char *path, mode_t type, struct vm_error **err);
/* All of a file of at most `max` bytes, NUL behind it; free *ret_data. `path`: for messages. */
int io_read_all(int fd, const char *path, size_t max, char **ret_data, size_t *ret_len,
                struct vm_error **err);
/* The same by its path. */
int io_read_file(const char *path, size_t max, char **ret_data, size_t *ret_len,
                 struct vm_error **err);
/*
 * Replace the file at path: a temporary file beside it, fsync, rename, fsync of the folder. After
 * a crash the file is the old or the new one, never a mixture, and after return it is the new one.
 * What lies under the temporary file's name (PATH.PID.tmp) is removed, a link not followed.
 */
int io_write_file_durably(const char *path, const void *data, size_t len, mode_t mode,
                          struct vm_error **err);
/* fsync of the folder that a path is in: a rename there is on disk then. */
int io_sync_folder_of(const char *path, struct vm_error **err);
/* Make the folder and those above it. An existing folder is fine. */
int io_make_folders(const char *path, mode_t mode, struct vm_error **err);

/* Send n bytes (n > 0) with descriptors attached (SCM_RIGHTS) over a Unix socket; fds stay the caller's. */
int io_send_fds(int socket, const void *data, size_t n, const int *fds, int n_fds,
                struct vm_error **err);
/*
 * Receive up to n bytes and up to max_fds descriptors (close-on-exec, the caller's). Descriptors
 * beyond max_fds are closed and the call fails with PROTOCOL. Returns the bytes, 0 at end of file.
 */
ssize_t io_recv_fds(int socket, void *data, size_t n, int *ret_fds, int max_fds, int *ret_n_fds,
                    struct vm_error **err);

/* eventfd used as a latch: io_latch_set makes it readable for good. */
int io_latch_new(struct vm_error **err);
void io_latch_set(int fd);
bool io_latch_is_set(int fd);
/*
 * A latch that is set once either of two is; `b` may be -1. It is waited for and looked at as they are, but not set
 * itself. Close it before them.
 */
int io_latch_either(int a, int b, struct vm_error **err);

#endif

/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/attach_reader.h"

#include "base/clock.h"
#include "base/fault.h"
#include "base/io.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

struct attach_reader {
    int socket;      /* of the child; its end is the child's */
    uint8_t *shared; /* with the child, which reads into it */
};

enum { ANSWER_ENDED = -1 }; /* else an errno, or 0 */

/* ---- The child: forked from a program with threads, so without anything that takes a lock ---- */

static void close_all_but(int a, int b)
{
    int low = a < b ? a : b, high = a < b ? b : a;
    if (low > 0)
        close_range(0, (unsigned)low - 1, 0);
    if (high > low + 1)
        close_range((unsigned)low + 1, (unsigned)high - 1, 0);
    close_range((unsigned)high + 1, ~0U, 0);
}

/*
 * Have the pages there. Whoever reads the file of a process's memory keeps its map of memory locked while it waits for
 * one; this way of reading does not. Whether the pid is still that process's is not known, so what is read is not used.
 */
static void fetch(pid_t pid, const struct attach_stretch *s)
{
    uint8_t seen[ATTACH_READER_STRETCHES_MAX];
    struct iovec pages[ATTACH_READER_STRETCHES_MAX], local = {seen, sizeof(seen)};
    unsigned n = 0;
    for (uint64_t at = 0; at < s->size && n < ATTACH_READER_STRETCHES_MAX; at += GUEST_PAGE_SIZE)
        pages[n++] = (struct iovec){(void *)(uintptr_t)(s->address + at), 1};
    process_vm_readv(pid, &local, 1, pages, n, 0);
}

static int read_stretch(pid_t pid, int fd, const struct attach_stretch *s, uint8_t *to)
{
    fetch(pid, s);
    for (uint64_t done = 0; done < s->size;) {
        ssize_t n = pread(fd, to + done, s->size - done, (off_t)(s->address + done));
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n ? errno : ANSWER_ENDED;
        done += (uint64_t)n;
    }
    return 0;
}

static void serve(pid_t pid, int fd, int socket, uint8_t *shared)
{
    struct attach_stretch stretches[ATTACH_READER_STRETCHES_MAX];
    ssize_t got;
    while ((got = recv(socket, stretches, sizeof(stretches), 0)) > 0) {
        int answer = 0;
        uint8_t *to = shared;
        for (size_t i = 0; i < (size_t)got / sizeof(*stretches) && !answer; i++) {
            answer = read_stretch(pid, fd, &stretches[i], to);
            to += stretches[i].size;
        }
        if (send(socket, &answer, sizeof(answer), MSG_NOSIGNAL) < 0)
            break;
    }
}

/* A child of nobody here: whoever waits for children waits for this one no longer than until it has a child. */
static int start_child(pid_t pid, int fd, int socket, uint8_t *shared, struct vm_error **err)
{
    pid_t child = fork();
    if (child < 0)
        return error_errno(err, errno, "cannot start a process");
    if (child == 0) {
        pid_t reader = fork();
        if (reader != 0)
            _exit(reader < 0);
        prctl(PR_SET_NAME, "vmmig-reader");
        close_all_but(fd, socket);
        serve(pid, fd, socket, shared);
        _exit(0);
    }
    int status;
    while (waitpid(child, &status, 0) < 0)
        if (errno != EINTR)
            return error_errno(err, errno, "cannot start a process");
    return status ? error_set(err, VM_ERROR_SYSTEM, "cannot start a process") : 0;
}

/* ---- The agent ---- */

struct attach_reader *attach_reader_create(pid_t pid, int fd, struct vm_error **err)
{
    int ends[2];
    CLEANUP(attach_reader) struct attach_reader *r = calloc(1, sizeof(*r));
    if (!r) {
        error_nomem(err);
        return NULL;
    }
    r->socket = -1;
    r->shared = mmap(NULL, ATTACH_READER_BYTES_MAX, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (r->shared == MAP_FAILED) {
        error_nomem(err);
        return NULL;
    }
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) < 0) {
        error_errno(err, errno, "cannot make a socket");
        return NULL;
    }
    r->socket = ends[0];
    cleanup_close int theirs = ends[1];
    return start_child(pid, fd, theirs, r->shared, err) < 0 ? NULL : steal_ptr(&r);
}

void attach_reader_destroy(struct attach_reader *r)
{
    if (!r)
        return;
    close_fd(&r->socket);
    if (r->shared != MAP_FAILED)
        munmap(r->shared, ATTACH_READER_BYTES_MAX);
    free(r);
}

static int ask(struct attach_reader *r, const struct attach_stretch *stretches, unsigned n, int cancel_fd,
               int *ret_answer, struct vm_error **err)
{
    cleanup_error struct vm_error *why = NULL;
    int64_t limit = fault_patience_ns(ATTACH_READER_LIMIT_MS);
    if (send(r->socket, stretches, n * sizeof(*stretches), MSG_NOSIGNAL) < 0)
        return error_errno(err, errno, "the process that reads the guest's memory");
    if (io_wait(r->socket, POLLIN, clock_mono_ns() + limit, cancel_fd, &why) < 0)
        return why->kind == VM_ERROR_TIMEOUT
                   ? error_set(err, VM_ERROR_TIMEOUT,
                               "the guest's memory cannot be read: what lies behind it has not answered for %.0f s",
                               (double)limit / NSEC_PER_SEC)
                   : error_propagate(err, steal_ptr(&why));
    if (recv(r->socket, ret_answer, sizeof(*ret_answer), 0) != (ssize_t)sizeof(*ret_answer))
        return error_set(err, VM_ERROR_FAILED, "the process that reads the guest's memory ended");
    return 0;
}

int attach_reader_read(struct attach_reader *r, const struct attach_stretch *stretches, unsigned n, uint8_t *out,
                       int cancel_fd, struct vm_error **err)
{
    uint64_t size = 0;
    int answer;
    for (unsigned i = 0; i < n; i++)
        size += stretches[i].size;
    if (n > ATTACH_READER_STRETCHES_MAX || size > ATTACH_READER_BYTES_MAX)
        return error_set(err, VM_ERROR_USAGE, "%llu bytes in %u stretches to read", (unsigned long long)size, n);
    if (ask(r, stretches, n, cancel_fd, &answer, err) < 0)
        return -1;
    if (answer == ANSWER_ENDED)
        return error_set(err, VM_ERROR_VMM_DIED, "the VMM ended");
    if (answer)
        return error_errno(err, answer, "the guest's memory cannot be read");
    memcpy(out, r->shared, size);
    return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/qemu_gate.h"

#include "base/cleanup.h"
#include "base/clock.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>

enum { LOOK_AGAIN_MS = 1 };

bool qemu_gate_fits(const struct qmp_version *v)
{
    return v->major == 7 || (v->major == 8 && v->minor < 2);
}

/* The least room that the kernel grants, filled to the brim. */
static int fill(struct qemu_gate *gate, struct vm_error **err)
{
    static const char filler[256];
    int least = 1;
    socklen_t n = sizeof(gate->room);
    if (getsockopt(gate->fd, SOL_SOCKET, SO_SNDBUF, &gate->room, &n) < 0 ||
        setsockopt(gate->fd, SOL_SOCKET, SO_SNDBUF, &least, sizeof(least)) < 0)
        return error_errno(err, errno, "cannot set the size of a socket's buffer");
    for (;;) {
        ssize_t sent = send(gate->fd, filler, sizeof(filler), MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent < 0 && errno == EAGAIN)
            return 0;
        if (sent < 0 && errno != EINTR)
            return error_errno(err, errno, "cannot write to a socket");
        gate->filler += sent > 0 ? (uint64_t)sent : 0;
    }
}

int qemu_gate_close(struct qemu_gate *gate, int qemus, struct vm_error **err)
{
    *gate = (struct qemu_gate){.fd = fcntl(qemus, F_DUPFD_CLOEXEC, 0)};
    if (gate->fd < 0)
        return error_errno(err, errno, "cannot copy a descriptor");
    if (fill(gate, err) == 0)
        return 0;
    close_fd(&gate->fd);
    return -1;
}

void qemu_gate_open(struct qemu_gate *gate)
{
    int room = gate->room / 2; /* the kernel told twice what it was asked for */
    if (gate->fd >= 0)
        setsockopt(gate->fd, SOL_SOCKET, SO_SNDBUF, &room, sizeof(room));
    close_fd(&gate->fd);
}

/* ---- who stands there ---- */

/* Does that thread wait in a sendmsg to the socket? */
static bool waits(pid_t pid, const char *task, const struct stat *socket)
{
    char path[96], text[128] = "";
    struct stat st;
    long number;
    unsigned long fd;
    snprintf(path, sizeof(path), "/proc/%d/task/%.16s/syscall", pid, task);
    cleanup_close int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0 || read(file, text, sizeof(text) - 1) <= 0 ||
        sscanf(text, "%ld %lx", &number, &fd) != 2 || number != SYS_sendmsg)
        return false;
    snprintf(path, sizeof(path), "/proc/%d/fd/%lu", pid, fd);
    return stat(path, &st) == 0 && st.st_ino == socket->st_ino && st.st_dev == socket->st_dev;
}

static bool anybody_waits(pid_t pid, const struct stat *socket)
{
    char path[48];
    bool found = false;
    struct dirent *e;
    snprintf(path, sizeof(path), "/proc/%d/task", pid);
    DIR *tasks = opendir(path);
    while (tasks && !found && (e = readdir(tasks)))
        found = *e->d_name != '.' && waits(pid, e->d_name, socket);
    if (tasks)
        closedir(tasks);
    return found;
}

bool qemu_gate_wait(const struct qemu_gate *gate, pid_t pid, int64_t deadline_ns)
{
    struct stat st;
    if (fstat(gate->fd, &st) < 0)
        return false;
    while (!anybody_waits(pid, &st)) {
        if (clock_mono_ns() >= deadline_ns)
            return false;
        poll(NULL, 0, LOOK_AGAIN_MS);
    }
    return true;
}

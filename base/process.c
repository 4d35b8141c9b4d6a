/* SPDX-License-Identifier: Apache-2.0 */
#include "base/process.h"

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/clock.h"

#include <dirent.h>
#include <errno.h>
#include <inttypes.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>

enum { ARGV_BYTES_MAX = 1 << 20 };

static int read_small_file(const char *path, char *out, size_t size)
{
    cleanup_close int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    ssize_t n = read(fd, out, size - 1);
    if (n < 0)
        return -1;
    out[n] = 0;
    return 0;
}

static int read_boot_id(struct uuid *ret, struct vm_error **err)
{
    char text[64];
    if (read_small_file("/proc/sys/kernel/random/boot_id", text, sizeof(text)) < 0)
        return error_errno(err, errno, "cannot read the boot id");
    text[strcspn(text, "\n")] = 0;
    if (!uuid_parse(text, ret))
        return error_set(err, VM_ERROR_SYSTEM, "the kernel's boot id '%s' is not a UUID", text);
    return 0;
}

enum existence { IS_THERE, IS_NOT, CANNOT_TELL };

struct process_stat {
    bool runs, exits;
    uint64_t start;
};

/* The kernel's PF_EXITING, of the first thread: exit, or a signal, ends all of them. */
enum { FLAG_EXITING = 4 };

/*
 * Whether there is such a process, whether it runs, whether its end has begun, and its start time.
 * One whose first thread is a zombie runs until its other threads have ended too: those of a VMM
 * may still be vCPUs. Where reading fails for another reason than that there is none (no descriptor
 * left, no memory), errno says why.
 */
static enum existence read_stat(pid_t pid, struct process_stat *ret)
{
    char path[32], text[1024], state;
    unsigned flags;
    long threads;
    snprintf(path, sizeof(path), "/proc/%d/stat", pid);
    if (read_small_file(path, text, sizeof(text)) < 0)
        return errno == ENOENT || errno == ESRCH ? IS_NOT : CANNOT_TELL;
    errno = EIO; /* of what follows: it is not as the kernel writes it */
    /* The second field is the name in parentheses, which may itself contain any character. */
    const char *after = strrchr(text, ')');
    if (!after)
        return CANNOT_TELL;
    if (sscanf(after + 1,
               " %c %*d %*d %*d %*d %*d %u %*u %*u %*u %*u %*u %*u %*d %*d %*d %*d %ld %*d "
               "%" SCNu64,
               &state, &flags, &threads, &ret->start) != 4)
        return CANNOT_TELL;
    ret->runs = (state != 'Z' && state != 'X' && state != 'x') || threads > 1;
    ret->exits = flags & FLAG_EXITING;
    return IS_THERE;
}

int process_identify(pid_t pid, struct process_identity *ret_id, struct vm_error **err)
{
    struct process_stat stat;
    struct process_identity id = {.pid = pid};
    enum existence found = read_stat(pid, &stat);
    if (found == CANNOT_TELL)
        return error_errno(err, errno, "cannot read the state of process %d", pid);
    if (found == IS_NOT || !stat.runs)
        return error_set(err, VM_ERROR_NOT_FOUND, "no process %d is running", pid);
    if (read_boot_id(&id.boot, err) < 0)
        return -1;
    id.start = stat.start;
    *ret_id = id;
    return 0;
}

int process_user(pid_t pid, uid_t *ret_user, struct vm_error **err)
{
    char path[32], text[4096];
    snprintf(path, sizeof(path), "/proc/%d/status", pid);
    if (read_small_file(path, text, sizeof(text)) < 0)
        return errno == ENOENT || errno == ESRCH
                   ? error_set(err, VM_ERROR_NOT_FOUND, "no process %d is running", pid)
                   : error_errno(err, errno, "cannot read the state of process %d", pid);
    const char *line = strstr(text, "\nUid:");
    if (!line || sscanf(line + 1, "Uid: %*u %u", ret_user) != 1)
        return error_set(err, VM_ERROR_SYSTEM, "the kernel does not say whose process %d is", pid);
    return 0;
}

/* Where something cannot be read, nobody can know: say alive, which makes callers wait. */
static bool look(const struct process_identity *id, bool *ret_exits)
{
    struct uuid boot;
    struct process_stat stat = {.exits = false};
    *ret_exits = false;
    if (read_boot_id(&boot, NULL) == 0 && !uuid_equal(&boot, &id->boot))
        return false;
    enum existence found = read_stat(id->pid, &stat);
    *ret_exits = stat.exits;
    return found == CANNOT_TELL || (found == IS_THERE && stat.start == id->start && stat.runs);
}

bool process_alive(const struct process_identity *id)
{
    bool exits;
    return look(id, &exits);
}

bool process_has_ended(const struct process_identity *id, int begins_ms, int timeout_ms)
{
    enum { LOOK_MS = 5 };
    int64_t now = clock_mono_ns();
    int64_t begins = now + begins_ms * NSEC_PER_MSEC, ends = now + timeout_ms * NSEC_PER_MSEC;
    bool exits;
    while (look(id, &exits)) {
        if (clock_mono_ns() >= (exits ? ends : begins))
            return false;
        poll(NULL, 0, LOOK_MS);
    }
    return true;
}

int process_kill(const struct process_identity *id, int timeout_ms, struct vm_error **err)
{
    int64_t deadline = clock_mono_ns() + timeout_ms * NSEC_PER_MSEC;
    cleanup_close int fd = (int)syscall(SYS_pidfd_open, id->pid, 0);
    if (fd < 0 && errno != ESRCH)
        return error_errno(err, errno, "cannot open process %d", id->pid);
    /* The pidfd is of whoever has the pid now: only then compare the start time. */
    if (fd < 0 || !process_alive(id))
        return 0;
    if (syscall(SYS_pidfd_send_signal, fd, SIGKILL, NULL, 0) < 0 && errno != ESRCH)
        return error_errno(err, errno, "cannot kill process %d", id->pid);
    while (process_alive(id)) {
        struct pollfd p = {.fd = fd, .events = POLLIN};
        int ms = clock_ms_until(deadline);
        if (ms == 0)
            return error_set(err, VM_ERROR_TIMEOUT, "process %d did not end within %d ms of SIGKILL",
                             id->pid, timeout_ms);
        poll(&p, 1, ms);
    }
    return 0;
}

bool process_identity_equal(const struct process_identity *a, const struct process_identity *b)
{
    return uuid_equal(&a->boot, &b->boot) && a->pid == b->pid && a->start == b->start;
}

static int read_cmdline(pid_t pid, struct buffer *out, struct vm_error **err)
{
    char path[32];
    snprintf(path, sizeof(path), "/proc/%d/cmdline", pid);
    cleanup_close int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return error_errno(err, errno, "cannot read the command line of process %d", pid);
    out->limit = ARGV_BYTES_MAX;
    for (;;) {
        uint8_t *to = buffer_grow(out, 4096);
        if (!to)
            return error_set(err, VM_ERROR_NO_SPACE, "the command line of process %d is too long",
                             pid);
        ssize_t n = read(fd, to, 4096);
        if (n < 0)
            return error_errno(err, errno, "cannot read the command line of process %d", pid);
        out->len -= 4096 - (size_t)n;
        if (n == 0)
            return 0;
    }
}

int process_argv(pid_t pid, char ***ret_argv, struct vm_error **err)
{
    cleanup_buffer struct buffer text = {0};
    if (read_cmdline(pid, &text, err) < 0)
        return -1;
    if (!text.len || text.data[text.len - 1])
        return error_set(err, VM_ERROR_NOT_FOUND, "process %d has no command line", pid);
    size_t argc = 0;
    for (size_t i = 0; i < text.len; i++)
        argc += !text.data[i];
    char **argv = malloc((argc + 1) * sizeof(*argv) + text.len);
    if (!argv)
        return error_nomem(err);
    char *strings = memcpy(argv + argc + 1, text.data, text.len);
    for (size_t i = 0; i < argc; i++) {
        argv[i] = strings;
        strings += strlen(strings) + 1;
    }
    argv[argc] = NULL;
    *ret_argv = argv;
    return 0;
}

static bool is_same_file(const struct stat *a, const struct stat *b)
{
    if (S_ISBLK(a->st_mode) && S_ISBLK(b->st_mode)) /* a device has many names */
        return a->st_rdev == b->st_rdev;
    return a->st_dev == b->st_dev && a->st_ino == b->st_ino;
}

bool process_has_open(pid_t pid, const struct stat *file)
{
    char folder[32];
    snprintf(folder, sizeof(folder), "/proc/%d/fd", pid);
    DIR *dir = opendir(folder);
    if (!dir)
        return false;
    bool found = false;
    struct dirent *entry;
    while (!found && (entry = readdir(dir))) {
        struct stat st;
        found = fstatat(dirfd(dir), entry->d_name, &st, 0) == 0 && is_same_file(&st, file);
    }
    closedir(dir);
    return found;
}

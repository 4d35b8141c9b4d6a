/* SPDX-License-Identifier: Apache-2.0 */
#include "snapshot/run_tool.h"

#include "base/cleanup.h"
#include "base/clock.h"
#include "base/io.h"
#include "proto/fields.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/close_range.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum { NOT_THERE = 2, REASON_MAX = 256 };

/* Between fork and exec: only what is safe there. */
static _Noreturn void become(const char *const *argv, int out, int errors, int report, pid_t agent)
{
    int null = open("/dev/null", O_RDONLY | O_CLOEXEC);
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) == 0 && getppid() == agent && null >= 0 && dup2(null, 0) == 0 &&
        dup2(out, 1) == 1 && dup2(errors, 2) == 2 && syscall(SYS_close_range, 3u, ~0u, CLOSE_RANGE_CLOEXEC) == 0)
        execvp(argv[0], (char *const *)(uintptr_t)argv);
    int failed = errno;
    _exit(write(report, &failed, sizeof(failed)) == sizeof(failed) ? 127 : 126);
}

/* 0, or why it is not run. */
static int start(const char *const *argv, int out, int errors, pid_t *ret_pid)
{
    int reports[2], failed = 0;
    if (pipe2(reports, O_CLOEXEC) < 0)
        return errno;
    cleanup_close int from = reports[0], to = reports[1];
    pid_t agent = getpid();
    *ret_pid = _Fork();
    if (*ret_pid == 0)
        become(argv, out, errors, to, agent);
    if (*ret_pid < 0)
        return errno;
    close_fd(&to); /* exec closes the other copy */
    if (read(from, &failed, sizeof(failed)) != sizeof(failed))
        return 0;
    while (waitpid(*ret_pid, NULL, 0) < 0 && errno == EINTR)
        ;
    return failed;
}

enum { LATE = -1, CANCELLED = -2 };

/* Its status; LATE or CANCELLED when it had to be killed. */
static int wait_for(pid_t pid, const struct run_tool_limits *limits)
{
    int status = 0, killed = 0;
    cleanup_close int fd = (int)syscall(SYS_pidfd_open, pid, 0);
    if (fd >= 0) {
        cleanup_error struct vm_error *why = NULL;
        int64_t deadline = clock_mono_ns() + limits->seconds * NSEC_PER_SEC;
        if (io_wait(fd, POLLIN, deadline, limits->cancel_fd, &why) < 0)
            killed = why->kind == VM_ERROR_CANCELLED ? CANCELLED : LATE;
    }
    if (killed)
        kill(pid, SIGKILL);
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
        ;
    return killed ? killed : WIFEXITED(status) ? WEXITSTATUS(status) : 128;
}

static char *read_all(int fd)
{
    char *text = calloc(1, RUN_TOOL_OUTPUT_MAX + 1);
    if (text && pread(fd, text, RUN_TOOL_OUTPUT_MAX, 0) < 0)
        *text = 0;
    return text;
}

/* The last line, made fit for an error. */
static const char *last_line(char *text)
{
    char *end = text + strlen(text);
    while (end > text && end[-1] == '\n')
        *--end = 0;
    char *line = strrchr(text, '\n');
    line = line ? line + 1 : text;
    field_make_text(line, REASON_MAX);
    return line;
}

static enum vm_error_kind kind_of(int status, const char *reason)
{
    if (strstr(reason, "No space left on device"))
        return VM_ERROR_NO_SPACE;
    return status == NOT_THERE ? VM_ERROR_NOT_FOUND : VM_ERROR_FAILED;
}

char *run_tool(const char *const *argv, const char *what, const struct run_tool_limits *given,
               struct vm_error **err)
{
    pid_t pid = 0;
    struct run_tool_limits limits = given ? *given : (struct run_tool_limits){0, -1};
    limits.seconds = limits.seconds ? limits.seconds : RUN_TOOL_SECONDS;
    cleanup_close int out = memfd_create("output", MFD_CLOEXEC), errors = memfd_create("errors", MFD_CLOEXEC);
    if (out < 0 || errors < 0) {
        error_errno(err, errno, "cannot run %s", argv[0]);
        return NULL;
    }
    int failed = start(argv, out, errors, &pid);
    if (failed) {
        error_errno(err, failed, "cannot run %s, which would %s", argv[0], what);
        return NULL;
    }
    int status = wait_for(pid, &limits);
    cleanup_free char *text = read_all(status ? errors : out);
    if (!text)
        error_nomem(err);
    else if (status == CANCELLED)
        error_set(err, VM_ERROR_CANCELLED, "cancelled");
    else if (status == LATE)
        error_set(err, VM_ERROR_TIMEOUT, "%s did not %s within %d s", argv[0], what, limits.seconds);
    else if (!status)
        return steal_ptr(&text);
    else {
        const char *reason = last_line(text);
        error_set(err, kind_of(status, reason), "%s cannot %s: %s", argv[0], what, reason);
    }
    return NULL;
}

/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/spawn.h"

#include "base/cleanup.h"
#include "base/io.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/close_range.h>
#include <poll.h>
#include <pwd.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>

enum { GROUPS_MAX = 64, LOG_TAIL = 4096 };

/* Everything that the child needs, made before fork: between fork and exec nothing may allocate. */
struct plan {
    const char *binary, *cwd;
    char *const *argv;
    char *const *envp;
    const int *fds;
    unsigned n_fds;
    int log, cgroup, report;
    int gate;  /* the child goes on when a byte comes */
    int agent; /* a pidfd: or ends when this process has ended */
    bool change_user, foreign_cwd;
    uid_t uid;
    gid_t gid;
    gid_t groups[GROUPS_MAX];
    int n_groups;
};

/* What the child says when it fails before exec: the step, then errno. The grandchild's pid first.
 */
enum step { STEP_FORK, STEP_FDS, STEP_CGROUP, STEP_GATE, STEP_CWD, STEP_USER, STEP_EXEC };

struct report {
    pid_t pid;
    enum step step;
    int error; /* 0: this report says the pid only */
};

size_t spawn_log_size(const char *log_path)
{
    struct stat st;
    return stat(log_path, &st) == 0 ? (size_t)st.st_size : 0;
}

/* "program: ...", as programs begin what they have to complain of. */
static bool is_complaint(const char *line)
{
    size_t word = strcspn(line, " :");
    return word && line[word] == ':' && line[word + 1] == ' ';
}

/* The last line of the text that says why; cuts the text into lines. */
static const char *find_reason(char *text)
{
    static const char generic[] = "load of migration failed"; /* the reason stands before it */
    const char *last = "", *complaint = NULL;
    char *rest = NULL;
    for (char *line = strtok_r(text, "\r\n", &rest); line; line = strtok_r(NULL, "\r\n", &rest)) {
        if (strstr(line, generic) && *last)
            continue;
        last = line;
        if (is_complaint(line))
            complaint = line;
    }
    return complaint ? complaint : last;
}

void spawn_log_last_line(const char *log_path, size_t offset, char out[SPAWN_MESSAGE_MAX])
{
    char tail[LOG_TAIL + 1];
    out[0] = 0;
    cleanup_close int fd = open(log_path, O_RDONLY | O_CLOEXEC);
    size_t size = spawn_log_size(log_path);
    if (fd < 0 || size <= offset)
        return;
    size_t from = size - offset > LOG_TAIL ? size - LOG_TAIL : offset;
    ssize_t n = pread(fd, tail, LOG_TAIL, (off_t)from);
    if (n <= 0)
        return;
    tail[n] = 0;
    snprintf(out, SPAWN_MESSAGE_MAX, "%.*s", SPAWN_MESSAGE_MAX - 1, find_reason(tail));
    for (char *c = out; *c; c++)
        if ((unsigned char)*c < ' ' || *c == 0x7f)
            *c = '?';
}

/* Between the birth and exec, see spawn_params.born. */
static int wait_at_gate(const struct plan *p)
{
    struct pollfd both[] = {{.fd = p->gate, .events = POLLIN}, {.fd = p->agent, .events = POLLIN}};
    char go = 0;
    while (poll(both, 2, -1) < 0)
        if (errno != EINTR)
            return -1;
    if (!both[0].revents || read(p->gate, &go, 1) != 1 || !go) {
        errno = ECANCELED;
        return -1;
    }
    return 0;
}

/* The child. Async-signal-safe calls only; raw ones where glibc would call other threads. */

static void reset_signals(void)
{
    struct sigaction plain = {.sa_handler = SIG_DFL};
    sigset_t none;
    for (int signum = 1; signum < NSIG; signum++)
        sigaction(signum, &plain, NULL);
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
}

static int keep_fd(int fd)
{
    return fcntl(fd, F_SETFD, 0);
}

static int set_fds(const struct plan *p)
{
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    if (null < 0 || dup2(null, 0) < 0 || dup2(p->log, 1) < 0 || dup2(p->log, 2) < 0)
        return -1;
    if (syscall(SYS_close_range, 3u, ~0u, CLOSE_RANGE_CLOEXEC) < 0)
        return -1;
    for (unsigned i = 0; i < p->n_fds; i++)
        if (keep_fd(p->fds[i]) < 0)
            return -1;
    return 0;
}

static int set_user(const struct plan *p)
{
    if (!p->change_user)
        return 0;
    if (syscall(SYS_setgroups, (size_t)p->n_groups, p->groups) < 0)
        return -1;
    if (syscall(SYS_setresgid, p->gid, p->gid, p->gid) < 0)
        return -1;
    return (int)syscall(SYS_setresuid, p->uid, p->uid, p->uid);
}

static _Noreturn void child_fail(const struct plan *p, enum step step)
{
    struct report r = {.step = step, .error = errno};
    if (write(p->report, &r, sizeof(r)) != sizeof(r))
        _exit(126);
    _exit(127);
}

static _Noreturn void child_main(const struct plan *p)
{
    reset_signals();
    setsid();
    umask(022);
    if (p->cgroup >= 0 && write(p->cgroup, "0", 1) != 1)
        child_fail(p, STEP_CGROUP);
    if (set_fds(p) < 0)
        child_fail(p, STEP_FDS);
    if (wait_at_gate(p) < 0)
        child_fail(p, STEP_GATE);
    if (!p->foreign_cwd && chdir(p->cwd) < 0)
        child_fail(p, STEP_CWD);
    if (set_user(p) < 0)
        child_fail(p, STEP_USER);
    if (p->foreign_cwd && chdir(p->cwd) < 0 && chdir("/") < 0)
        child_fail(p, STEP_CWD);
    execve(p->binary, p->argv, p->envp);
    child_fail(p, STEP_EXEC);
}

/* In between: its end makes init the parent of the VMM, as it will be after a restart of the agent. */
static _Noreturn void middle_main(const struct plan *p)
{
    struct report r = {.pid = _Fork()};
    if (r.pid == 0)
        child_main(p);
    if (r.pid < 0)
        child_fail(p, STEP_FORK);
    _exit(write(p->report, &r, sizeof(r)) == sizeof(r) ? 0 : 126);
}

/* The parent. */

static int child_error(const struct plan *p, const struct report *r, struct vm_error **err)
{
    switch (r->step) {
    case STEP_FORK:
        return error_errno(err, r->error, "cannot start a process");
    case STEP_FDS:
        return error_errno(err, r->error, "cannot hand descriptors to the VMM");
    case STEP_CGROUP:
        return error_errno(err, r->error, "cannot put the VMM into its cgroup");
    case STEP_GATE:
        return error_set(err, VM_ERROR_CANCELLED, "the start of %s was given up", p->binary);
    case STEP_CWD:
        return error_errno(err, r->error, "cannot enter the folder %s", p->cwd);
    case STEP_USER:
        return error_errno(err, r->error, "cannot become user %u", p->uid);
    case STEP_EXEC:
        return error_errno(err, r->error, "cannot run %s", p->binary);
    }
    return error_set(err, VM_ERROR_SYSTEM, "cannot run %s", p->binary);
}

/*
 * The process is there; is it known? One that died at once is not an error here. Its identity then is
 * one that runs no more.
 */
static int identify(pid_t pid, struct process_identity *ret, struct vm_error **err)
{
    struct vm_error *gone = NULL;
    if (process_identify(pid, ret, &gone) == 0)
        return 0;
    if (gone->kind != VM_ERROR_NOT_FOUND)
        return error_propagate(err, gone);
    error_free(gone);
    *ret = (struct process_identity){.pid = pid};
    return 0;
}

/* The child waits at the gate: let the caller take note of it, then let it go on. */
static int open_gate(const struct spawn_params *params, pid_t pid, int gate,
                     struct process_identity *ret_process, struct vm_error **err)
{
    char go = identify(pid, ret_process, err) == 0 &&
              (!params->born || params->born(ret_process, params->born_arg, err) == 0);
    if (write(gate, &go, 1) != 1 && go)
        return error_errno(err, errno, "cannot start a process");
    return go ? 0 : -1;
}

/* What the pipe says until it is closed by the exec, or by the child's end. */
static int read_reports(struct plan *p, const struct spawn_params *params, int from, int gate,
                        struct process_identity *ret_process, struct vm_error **err)
{
    struct report r, failed = {0};
    bool born = false;
    int opened = 0;
    while (read(from, &r, sizeof(r)) == sizeof(r)) {
        if (r.error) {
            failed = r;
        } else {
            born = true;
            opened = open_gate(params, r.pid, gate, ret_process, err);
        }
    }
    if (opened < 0)
        return -1;
    if (failed.error)
        return child_error(p, &failed, err);
    return born ? 0 : error_set(err, VM_ERROR_SYSTEM, "cannot start a process");
}

/* Fork twice, learn the pid, and see the exec happen (the report's pipe closes by itself). */
static int run(struct plan *p, const struct spawn_params *params,
               struct process_identity *ret_process, struct vm_error **err)
{
    int reports[2], gates[2];
    if (pipe2(reports, O_CLOEXEC) < 0)
        return error_errno(err, errno, "cannot make a pipe");
    cleanup_close int from = reports[0];
    cleanup_close int to = reports[1];
    if (pipe2(gates, O_CLOEXEC) < 0)
        return error_errno(err, errno, "cannot make a pipe");
    cleanup_close int gate_out = gates[0];
    cleanup_close int gate_in = gates[1];
    cleanup_close int agent = (int)syscall(SYS_pidfd_open, getpid(), 0);
    if (agent < 0)
        return error_errno(err, errno, "cannot watch this process");
    p->report = to;
    p->gate = gate_out;
    p->agent = agent;
    pid_t middle = _Fork();
    if (middle == 0)
        middle_main(p);
    if (middle < 0)
        return error_errno(err, errno, "cannot start a process");
    close_fd(&to);
    int r = read_reports(p, params, from, gate_in, ret_process, err);
    while (waitpid(middle, NULL, 0) < 0 && errno == EINTR)
        ;
    return r;
}

static int find_user(const char *user, struct plan *p, struct vm_error **err)
{
    char text[16384];
    struct passwd entry, *found = NULL;
    int rc = getpwnam_r(user, &entry, text, sizeof(text), &found);
    if (!found)
        return rc ? error_errno(err, rc, "cannot look up user %s", user)
                  : error_set(err, VM_ERROR_NOT_FOUND, "there is no user %s", user);
    p->n_groups = GROUPS_MAX;
    if (getgrouplist(user, entry.pw_gid, p->groups, &p->n_groups) < 0)
        return error_set(err, VM_ERROR_USAGE, "user %s is in more than %d groups", user,
                         GROUPS_MAX);
    p->uid = entry.pw_uid;
    p->gid = entry.pw_gid;
    p->change_user = true;
    return 0;
}

static int open_cgroup(const char *folder, struct vm_error **err)
{
    char path[512];
    if (io_make_folders(folder, 0755, err) < 0)
        return error_wrap(err, "cannot make the cgroup %s", folder);
    snprintf(path, sizeof(path), "%s/cgroup.procs", folder);
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        error_errno(err, errno, "cannot open %s", path);
    return fd;
}

/* ---- Its socket ---- */

static int new_socket(int type, struct vm_error **err)
{
    int fd = socket(AF_UNIX, type | SOCK_CLOEXEC, 0);
    if (fd < 0)
        error_errno(err, errno, "cannot make a socket");
    return fd;
}

/* Remove a socket file behind which nobody listens any more. */
static int remove_stale(const struct sockaddr_un *address, int type, struct vm_error **err)
{
    struct stat st;
    if (lstat(address->sun_path, &st) < 0)
        return 0;
    if (!S_ISSOCK(st.st_mode))
        return error_set(err, VM_ERROR_CONFLICT, "%s exists and is not a socket",
                         address->sun_path);
    cleanup_close int fd = new_socket(type, err);
    if (fd < 0)
        return -1;
    if (io_set_nonblocking(fd, true, err) < 0)
        return -1;
    if (connect(fd, (const struct sockaddr *)address, sizeof(*address)) == 0 ||
        errno != ECONNREFUSED)
        return error_set(err, VM_ERROR_CONFLICT, "another VM has the socket %s",
                         address->sun_path);
    unlink(address->sun_path);
    return 0;
}

int spawn_bind(const char *path, int type, struct vm_error **err)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof(address.sun_path))
        return error_set(err, VM_ERROR_USAGE, "the name of the VMM's socket is too long: %s", path);
    strcpy(address.sun_path, path);
    cleanup_close int fd = new_socket(type, err);
    if (fd < 0 || remove_stale(&address, type, err) < 0)
        return -1;
    /* Bound with no permission for others from the first instant. */
    if (fchmod(fd, 0600) < 0 || bind(fd, (const struct sockaddr *)&address, sizeof(address)) < 0)
        return error_errno(err, errno, "cannot make the socket %s", path);
    return steal_fd(&fd);
}

/* ---- The whole ---- */

int spawn_process(const struct spawn_params *params, struct process_identity *ret_process,
                  struct vm_error **err)
{
    static char path[] = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    static char home[] = "HOME=/", lang[] = "LANG=C.UTF-8";
    static char *const envp[] = {path, home, lang, NULL};
    struct plan p = {.binary = params->binary,
                     .cwd = params->cwd ? params->cwd : "/",
                     .foreign_cwd = params->foreign_cwd,
                     .argv = params->argv,
                     .envp = envp,
                     .fds = params->fds,
                     .n_fds = params->n_fds,
                     .cgroup = -1};
    if (params->user && *params->user && find_user(params->user, &p, err) < 0)
        return -1;
    cleanup_close int log =
        open(params->log_path, O_WRONLY | O_CREAT | O_APPEND | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (log < 0)
        return error_errno(err, errno, "cannot open the log %s", params->log_path);
    cleanup_close int cgroup = params->cgroup ? open_cgroup(params->cgroup, err) : -1;
    if (params->cgroup && cgroup < 0)
        return -1;
    p.log = log;
    p.cgroup = cgroup;
    return run(&p, params, ret_process, err);
}

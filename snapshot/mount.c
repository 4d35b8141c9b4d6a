/* SPDX-License-Identifier: Apache-2.0 */
#include "snapshot/mount.h"

#include "base/clock.h"
#include "base/io.h"
#include "base/log.h"
#include "base/process.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>

#define START_TIMEOUT_NS (20 * NSEC_PER_SEC)
enum { ANSWER_TIMEOUT_S = 5, WORDS_MAX = 40, LINE_MAX_BYTES = 512 };

struct mount {
    struct mount_setup setup; /* with copies */
    char *copies[10];
    unsigned n_copies;
    pthread_mutex_t lock;
    bool adopted; /* the holder's version was looked at */
};

static const char *copy(struct mount *m, const char *text, bool *failed)
{
    char *made = strdup(text ? text : "");
    *failed |= !made;
    return m->copies[m->n_copies++] = made;
}

struct mount *mount_create(const struct mount_setup *setup, struct vm_error **err)
{
    struct mount *m = calloc(1, sizeof(*m));
    bool failed = !m;
    if (m) {
        pthread_mutex_init(&m->lock, NULL);
        m->setup = *setup;
        m->setup.repository = copy(m, setup->repository, &failed);
        m->setup.folder = copy(m, setup->folder, &failed);
        m->setup.cache = copy(m, setup->cache, &failed);
        m->setup.control = copy(m, setup->control, &failed);
        m->setup.log = copy(m, setup->log, &failed);
        m->setup.owner = copy(m, setup->owner, &failed);
        m->setup.group = copy(m, setup->group, &failed);
        m->setup.cgroup = copy(m, setup->cgroup, &failed);
        m->setup.libexec = copy(m, setup->libexec, &failed);
    }
    if (!failed)
        return m;
    mount_destroy(m);
    error_nomem(err);
    return NULL;
}

void mount_destroy(struct mount *m)
{
    if (!m)
        return;
    for (unsigned i = 0; i < m->n_copies; i++)
        free(m->copies[i]);
    pthread_mutex_destroy(&m->lock);
    free(m);
}

void mount_path(const struct mount *m, const char *image, const char *file, char out[4096])
{
    char folder[3 * MOUNT_NAME_MAX + 1];
    mount_escape(image, folder);
    snprintf(out, 4096, "%s/%s/%s", m->setup.folder, folder, file);
}

/* "IMAGE/FILE", as it stands below the mount. */
static bool split(const char *below, char ret_image[MOUNT_NAME_MAX + 1],
                  char ret_file[MOUNT_FILE_NAME_MAX + 1])
{
    char folder[3 * MOUNT_NAME_MAX + 1];
    const char *slash = strchr(below, '/');
    if (!slash || (size_t)(slash - below) >= sizeof(folder) || strlen(slash + 1) > MOUNT_FILE_NAME_MAX ||
        strchr(slash + 1, '/'))
        return false;
    snprintf(folder, sizeof(folder), "%.*s", (int)(slash - below), below);
    strcpy(ret_file, slash + 1);
    return mount_unescape(folder, ret_image) == 0;
}

bool mount_parse(const struct mount *m, const char *path, char ret_image[MOUNT_NAME_MAX + 1],
                 char ret_file[MOUNT_FILE_NAME_MAX + 1])
{
    size_t n = strlen(m->setup.folder);
    return !strncmp(path, m->setup.folder, n) && path[n] == '/' &&
           split(path + n + 1, ret_image, ret_file);
}

bool mount_has(const struct mount *m, const char *path, pid_t pid, char ret_image[MOUNT_NAME_MAX + 1],
               char ret_file[MOUNT_FILE_NAME_MAX + 1])
{
    struct stat file;
    return mount_parse(m, path, ret_image, ret_file) && stat(path, &file) == 0 &&
           process_has_open(pid, &file);
}

/* ---- asking the holder ---- */

static int ask_that(struct mount *m, const struct mount_message *request,
                    struct mount_packet *ret_answer, struct vm_error **err)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct timeval limit = {.tv_sec = ANSWER_TIMEOUT_S};
    if (strlen(m->setup.control) >= sizeof(address.sun_path))
        return error_set(err, VM_ERROR_USAGE, "the path of a socket has at most %zu bytes",
                         sizeof(address.sun_path) - 1);
    strcpy(address.sun_path, m->setup.control);
    cleanup_close int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit)) < 0)
        return error_errno(err, errno, "socket");
    if (connect(fd, (struct sockaddr *)&address, sizeof(address)) < 0)
        return errno == ENOENT || errno == ECONNREFUSED
                   ? error_set(err, VM_ERROR_NOT_FOUND, "nothing is mounted at %s", m->setup.folder)
                   : error_set(err, VM_ERROR_UNREACHABLE, "the mount at %s does not answer: %s",
                               m->setup.folder, strerror(errno));
    if (mount_send(fd, request, NULL, NULL, 0, err) < 0)
        return -1;
    int r = mount_receive(fd, ret_answer, NULL, 0, NULL, err);
    if (r < 0)
        return error_wrap(err, "the mount at %s does not answer", m->setup.folder);
    if (r == 0)
        return error_set(err, VM_ERROR_UNREACHABLE, "the mount at %s ended", m->setup.folder);
    if (ret_answer->m.type != MOUNT_FAILED)
        return 0;
    int kind = ret_answer->m.kind;
    return error_set(err,
                     kind >= 0 && kind < VM_ERROR_KIND_COUNT ? (enum vm_error_kind)kind
                                                             : VM_ERROR_FAILED,
                     "%s", (char *)ret_answer->payload);
}

static int ask(struct mount *m, enum mount_type type, struct mount_packet *ret_answer,
               struct vm_error **err)
{
    struct mount_message request = mount_message(type, 1, NULL);
    return ask_that(m, &request, ret_answer, err);
}

int mount_status(struct mount *m, struct mount_state *ret_state, struct vm_error **err)
{
    cleanup_free struct mount_packet *p = malloc(sizeof(*p));
    if (!p)
        return error_nomem(err);
    if (ask(m, MOUNT_STATUS, p, err) < 0)
        return -1;
    if (p->m.type != MOUNT_STATE || p->m.payload_len < MOUNT_STATE_MIN)
        return error_set(err, VM_ERROR_VERSION, "the mount at %s is of another version",
                         m->setup.folder);
    *ret_state = (struct mount_state){0};
    memcpy(ret_state, p->payload,
           p->m.payload_len < sizeof(*ret_state) ? p->m.payload_len : sizeof(*ret_state));
    return 0;
}

static void detach_dead(struct mount *m)
{
    struct stat st;
    if (stat(m->setup.folder, &st) == 0 || (errno != ENOTCONN && errno != ECONNABORTED))
        return;
    log_warn("the holder of a mount has died", "mount=%s", m->setup.folder);
    umount2(m->setup.folder, MNT_DETACH);
}

/* CONFLICT if the tree is shown elsewhere, too: there it would be dead. */
static int check_shown_once(const char *folder, struct vm_error **err)
{
    struct stat st;
    unsigned major, minor;
    char line[2 * 4096], place[4096];
    FILE *mounts = fopen("/proc/self/mountinfo", "re");
    int r = 0;
    if (!mounts || stat(folder, &st) < 0)
        r = error_errno(err, errno, "cannot look where images are mounted");
    while (r == 0 && fgets(line, sizeof(line), mounts))
        if (sscanf(line, "%*u %*u %u:%u %*s %4095s", &major, &minor, place) == 3 &&
            makedev(major, minor) == st.st_dev && strcmp(place, folder) != 0)
            r = error_set(err, VM_ERROR_CONFLICT, "images are mounted at %s, too: unmount that first", place);
    if (mounts)
        fclose(mounts);
    return r;
}

int mount_stop(struct mount *m, struct vm_error **err)
{
    cleanup_error struct vm_error *failed = NULL;
    cleanup_free struct mount_packet *p = malloc(sizeof(*p));
    struct mount_state state;
    if (!p)
        return error_nomem(err);
    if (mount_status(m, &state, &failed) < 0) {
        if (failed->kind != VM_ERROR_NOT_FOUND)
            return error_propagate(err, steal_ptr(&failed));
        detach_dead(m);
        return 0;
    }
    cleanup_close int process = (int)syscall(SYS_pidfd_open, state.pid, 0);
    if (check_shown_once(state.folder, err) < 0 || ask(m, MOUNT_STOP, p, err) < 0)
        return -1;
    struct pollfd ended = {.fd = process, .events = POLLIN};
    if (process >= 0 && poll(&ended, 1, ANSWER_TIMEOUT_S * 1000) <= 0)
        return error_set(err, VM_ERROR_TIMEOUT, "the mount at %s does not end", m->setup.folder);
    return 0;
}

/* ---- starting it ---- */

static void join_cgroup(const char *folder)
{
    char path[4096], pid[16];
    mkdir(folder, 0755);
    snprintf(path, sizeof(path), "%s/cgroup.procs", folder);
    int n = snprintf(pid, sizeof(pid), "%d", getpid());
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0 || write(fd, pid, (size_t)n) < 0)
        return; /* it runs in the agent's then */
    close(fd);
}

/* The grandchild: in a session of its own, output into the log, its first line to `ready`. */
static void become_holder(struct mount *m, const char *const *argv, int log, int ready)
{
    sigset_t none;
    sigemptyset(&none);
    if (*m->setup.cgroup)
        join_cgroup(m->setup.cgroup);
    int null = open("/dev/null", O_RDWR);
    if (dup2(null, 0) < 0 || dup2(ready, 1) < 0 || dup2(log, 2) < 0)
        _exit(127);
    syscall(SYS_close_range, 3u, ~0u, 0);
    for (int signum = 1; signum < NSIG; signum++)
        signal(signum, SIG_DFL);
    sigprocmask(SIG_SETMASK, &none, NULL);
    execv(argv[0], (char *const *)(uintptr_t)argv);
    _exit(127);
}

static int fork_holder(struct mount *m, const char *const *argv, int log, int ready,
                       struct vm_error **err)
{
    pid_t child = fork();
    if (child < 0)
        return error_errno(err, errno, "fork");
    if (child == 0) {
        setsid();
        pid_t holder = fork();
        if (holder == 0)
            become_holder(m, argv, log, ready);
        _exit(holder < 0);
    }
    int status = 0;
    while (waitpid(child, &status, 0) < 0 && errno == EINTR)
        ;
    return WIFEXITED(status) && WEXITSTATUS(status) == 0
               ? 0
               : error_set(err, VM_ERROR_SYSTEM, "cannot start %s", argv[0]);
}

/* The last line of the log behind `offset`. */
static void last_words(const char *path, off_t offset, char out[LINE_MAX_BYTES])
{
    cleanup_close int fd = open(path, O_RDONLY | O_CLOEXEC);
    char text[4096] = "";
    ssize_t n = fd < 0 ? 0 : pread(fd, text, sizeof(text) - 1, offset);
    n = n < 0 ? 0 : n;
    while (n > 0 && text[n - 1] == '\n')
        n--;
    text[n] = 0;
    const char *line = strrchr(text, '\n');
    snprintf(out, LINE_MAX_BYTES, "%.*s", LINE_MAX_BYTES - 1, line ? line + 1 : text);
}

static int wait_ready(struct mount *m, int ready, off_t log_size, struct vm_error **err)
{
    char line[16], words[LINE_MAX_BYTES];
    ssize_t n = io_read_some(ready, line, sizeof(line), clock_mono_ns() + START_TIMEOUT_NS, -1, err);
    if (n > 0)
        return 0;
    if (n < 0)
        return error_wrap(err, "the mount at %s does not start", m->setup.folder);
    last_words(m->setup.log, log_size, words);
    return error_set(err, VM_ERROR_FAILED, "nothing can be mounted at %s: %s", m->setup.folder,
                     *words ? words : "its process ended");
}

/* A mount point whose holder died is in the way. */
static int clear_folder(struct mount *m, struct vm_error **err)
{
    detach_dead(m);
    if (mount_is_there(m->setup.folder))
        return error_set(err, VM_ERROR_CONFLICT,
                         "there is a mount at %s already, whose process does not answer at %s",
                         m->setup.folder, m->setup.control);
    return io_make_folders(m->setup.folder, 0755, err);
}

static int start(struct mount *m, struct vm_error **err)
{
    const struct mount_setup *s = &m->setup;
    char holder[4096], fetcher[4096], size[32], timeout[32], record[32];
    struct stat st;
    int ready[2];
    if (clear_folder(m, err) < 0)
        return -1;
    snprintf(holder, sizeof(holder), "%s/vmmig-mount", s->libexec);
    snprintf(fetcher, sizeof(fetcher), "%s/vmmig-fetch", s->libexec);
    snprintf(size, sizeof(size), "%llu", (unsigned long long)s->cache_size);
    snprintf(timeout, sizeof(timeout), "%llu", (unsigned long long)s->read_timeout_ms);
    snprintf(record, sizeof(record), "%llu", (unsigned long long)s->record_ms);
    if (access(holder, X_OK) < 0)
        return error_errno(err, errno, "cannot run %s", holder);
    const char *argv[WORDS_MAX] = {
        holder, "--mount", s->folder, "--repository", s->repository, "--cache", s->cache,
        "--cache-size", size, "--control", s->control, "--fetcher", fetcher, "--owner", s->owner,
        "--read-timeout", timeout, "--record", record, *s->group ? "--group" : NULL, s->group};
    cleanup_close int log = open(s->log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (log < 0 || fstat(log, &st) < 0)
        return error_errno(err, errno, "cannot open the log %s", s->log);
    if (pipe2(ready, O_CLOEXEC) < 0)
        return error_errno(err, errno, "pipe");
    cleanup_close int ours = ready[0], theirs = ready[1];
    if (fork_holder(m, argv, log, theirs, err) < 0)
        return -1;
    close_fd(&theirs);
    return wait_ready(m, ours, st.st_size, err);
}

/* A holder that an earlier agent started. */
static int adopt(struct mount *m, const struct mount_state *state, struct vm_error **err)
{
    const struct mount_setup *s = &m->setup;
    cleanup_error struct vm_error *failed = NULL;
    cleanup_free struct mount_packet *p = malloc(sizeof(*p));
    if (!p)
        return error_nomem(err);
    if (strcmp(state->software, "vmmig " VMMIG_VERSION) && ask(m, MOUNT_REFRESH, p, NULL) == 0)
        log_info("a mount got new fetchers", "mount=%s", s->folder);
    if (state->cache_limit != s->cache_size || state->read_timeout_ms != s->read_timeout_ms) {
        struct mount_message limits = mount_message(MOUNT_LIMITS, 1, NULL);
        limits.len = s->cache_size;
        limits.offset = s->read_timeout_ms;
        if (ask_that(m, &limits, p, &failed) < 0)
            log_warn("a mount keeps its former cache-size and disk-timeout until nobody uses it",
                     "mount=%s reason=%s", s->folder, log_q(error_message(failed)));
    }
    m->adopted = true;
    return 0;
}

int mount_ensure(struct mount *m, struct vm_error **err)
{
    SCOPE_LOCK(&m->lock);
    struct mount_state state;
    cleanup_error struct vm_error *failed = NULL;
    if (mount_status(m, &state, &failed) < 0) {
        if (failed->kind != VM_ERROR_NOT_FOUND)
            return error_propagate(err, steal_ptr(&failed));
        m->adopted = true;
        return start(m, err);
    }
    if (strncmp(state.repository, m->setup.repository, sizeof(state.repository) - 1) ||
        strncmp(state.folder, m->setup.folder, sizeof(state.folder) - 1)) { /* which a state has in part */
        if (mount_stop(m, err) < 0)
            return error_wrap(err, "the mount of this agent shows %s at %s", state.repository,
                              state.folder);
        return start(m, err);
    }
    return m->adopted ? 0 : adopt(m, &state, err);
}

static bool is_empty(int fd)
{
    int own = openat(fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *d = own < 0 ? NULL : fdopendir(own);
    unsigned n = 0;
    while (d && readdir(d))
        n++;
    if (d)
        closedir(d);
    return d && n <= 2;
}

/* Nobody may even ask to write there: what a mapping has written the kernel would show to clones, until it drops it. */
static int bind_read_only(const char *folder, int to)
{
    struct mount_attr read_only = {.attr_set = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV};
    cleanup_close int tree = open_tree(AT_FDCWD, folder, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);
    return tree < 0 || mount_setattr(tree, "", AT_EMPTY_PATH, &read_only, sizeof(read_only)) < 0
               ? -1
               : move_mount(tree, "", to, "", MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH);
}

/* By its descriptor: what is looked at is what is mounted over, whatever becomes of the path. */
int mount_bind(struct mount *m, const char *dir, uid_t owner, struct vm_error **err)
{
    struct stat st;
    cleanup_close int fd = open(dir, O_PATH | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &st) < 0)
        return errno == ENOTCONN ? error_set(err, VM_ERROR_CONFLICT,
                                             "%s is a mount whose process has ended: vmmig unmount %s first", dir, dir)
                                 : error_errno(err, errno, "%s", dir);
    if (owner && st.st_uid != owner)
        return error_set(err, VM_ERROR_DENIED, "%s belongs to another user (%u)", dir, st.st_uid);
    if (!S_ISDIR(st.st_mode) || !is_empty(fd))
        return error_set(err, VM_ERROR_CONFLICT, "%s is not an empty folder", dir);
    if (mount_ensure(m, err) < 0)
        return -1;
    return bind_read_only(m->setup.folder, fd) < 0 ? error_errno(err, errno, "cannot mount at %s", dir) : 0;
}

int mount_unbind(const char *dir, struct vm_error **err)
{
    if (!mount_is_there(dir))
        return error_set(err, VM_ERROR_REFUSED, "no images are mounted at %s", dir);
    if (umount2(dir, UMOUNT_NOFOLLOW) == 0)
        return 0;
    return errno == EBUSY ? error_set(err, VM_ERROR_CONFLICT, "%s is in use", dir)
                          : error_errno(err, errno, "cannot unmount %s", dir);
}

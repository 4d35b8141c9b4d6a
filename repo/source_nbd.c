/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Disk images that are not raw: qemu-img says what they are, and a qemu-nbd that ends with the
 * connection serves them, read-only.
 */
#include "repo/source_driver.h"

#include "base/bytes.h"
#include "base/clock.h"
#include "base/fault.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <libnbd.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

enum { INFO_MAX = 1 << 20, READ_MAX = 1 << 20, ANSWER_MS = 60 * 1000 };

extern char **environ;

/* ---- what qemu-img says ---- */

static int spawn_tool(char *const argv[], int out, pid_t *ret_pid, struct vm_error **err)
{
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, out, 1);
    posix_spawn_file_actions_adddup2(&actions, out, 2);
    int rc = posix_spawnp(ret_pid, argv[0], &actions, NULL, argv, environ);
    posix_spawn_file_actions_destroy(&actions);
    return rc ? error_errno(err, rc, "cannot run qemu-img, which reads formats other than raw") : 0;
}

static int read_all(int fd, struct buffer *out, struct vm_error **err)
{
    for (;;) {
        uint8_t *to = buffer_grow(out, 4096);
        if (!to)
            return error_set(err, VM_ERROR_FAILED, "qemu-img says too much");
        ssize_t n = read(fd, to, 4096);
        out->len -= 4096 - (n > 0 ? (size_t)n : 0);
        if (n < 0 && errno != EINTR)
            return error_errno(err, errno, "cannot read what qemu-img says");
        if (!n)
            return 0;
    }
}

/* The last line of a text, for a message. */
static const char *last_line(char *text)
{
    size_t n = strlen(text);
    while (n && text[n - 1] == '\n')
        text[--n] = 0;
    char *at = strrchr(text, '\n');
    return at ? at + 1 : text;
}

/*
 * Run `qemu-img VERB --output=json -U [EXTRA] [-f FORMAT] -- PATH`; its exit status, -1 with an
 * error.
 */
static int run_tool(const char *verb, const char *extra, const char *path, const char *format,
                    struct buffer *out, struct vm_error **err)
{
    const char *words[12] = {"qemu-img", verb, "--output=json", "-U"};
    size_t n = 4;
    if (extra)
        words[n++] = extra;
    if (format) {
        words[n++] = "-f";
        words[n++] = format;
    }
    words[n++] = "--";
    words[n] = path;
    char *argv[12];
    memcpy(argv, words, sizeof(argv)); /* exec takes char *, and changes nothing */
    int fds[2], status = 0;
    pid_t pid;
    if (pipe2(fds, O_CLOEXEC) < 0)
        return error_errno(err, errno, "cannot make a pipe");
    cleanup_close int from = fds[0], to = fds[1];
    if (spawn_tool(argv, to, &pid, err) < 0)
        return -1;
    close_fd(&to);
    int done = read_all(from, out, err);
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
        ;
    buffer_put_u8(out, 0);
    if (done < 0 || out->failed)
        return done < 0 ? -1 : error_nomem(err);
    if (!WIFEXITED(status))
        return error_set(err, VM_ERROR_FAILED, "qemu-img died on %s", path);
    return WEXITSTATUS(status);
}

/* Does the description of one file name further ones? */
static const char *further_file(const json_t *info)
{
    const json_t *data =
        json_object_get(json_object_get(json_object_get(info, "format-specific"), "data"),
                        "data-file");
    const char *backing = json_string_value(json_object_get(info, "backing-filename"));
    return backing ? backing : json_string_value(data);
}

/* QEMU reads what a truncated image lacks as zeros: so its structure is checked first. */
static int check_structure(const char *path, const char *format, struct vm_error **err)
{
    enum { CHECK_GOOD = 0, CHECK_LEAKS = 3, CHECK_UNSUPPORTED = 63 };
    cleanup_buffer struct buffer out = {.limit = INFO_MAX};
    int status = run_tool("check", NULL, path, format, &out, err);
    if (status < 0)
        return -1;
    if (status == CHECK_GOOD || status == CHECK_LEAKS || status == CHECK_UNSUPPORTED)
        return 0;
    return error_set(err, VM_ERROR_CORRUPT,
                     "%s is damaged: \"qemu-img check\" finds parts of it missing or inconsistent",
                     path);
}

static int take_format(const char *path, const char *format, const json_t *info, char **ret_format,
                       struct vm_error **err)
{
    const char *name = json_string_value(json_object_get(info, "format"));
    const char *further = further_file(info);
    if (!name)
        return error_set(err, VM_ERROR_CORRUPT, "qemu-img does not say what %s is", path);
    if (further && !format)
        return error_set(err, VM_ERROR_REFUSED,
                         "%s is a %s image that builds upon %s; say its format explicitly if that "
                         "is meant",
                         path, name, further);
    if (strcmp(name, "raw") != 0 && check_structure(path, name, err) < 0)
        return -1;
    *ret_format = strdup(name);
    return *ret_format ? 0 : error_nomem(err);
}

int source_probe(const char *path, const char *format, char **ret_format, struct vm_error **err)
{
    cleanup_buffer struct buffer out = {.limit = INFO_MAX};
    int status = run_tool("info", "--backing-chain", path, format, &out, err);
    if (status < 0)
        return -1;
    if (status)
        return error_set(err, VM_ERROR_CORRUPT, "%s cannot be read: %s", path,
                         last_line((char *)out.data));
    json_t *chain = json_loads((const char *)out.data, 0, NULL);
    int result = take_format(path, format, json_array_get(chain, 0), ret_format, err);
    json_decref(chain);
    return result;
}

/* ---- reading through qemu-nbd ---- */

static const nbd_completion_callback no_completion;

struct source_nbd {
    struct source source;
    struct nbd_handle *nbd;
    char *path;
    bool has_extents;
    /* The extent that the server described last. */
    uint64_t start, end;
    bool zero;
};

static int fail(struct source_nbd *n, const char *what, struct vm_error **err)
{
    return error_set(err, VM_ERROR_FAILED, "%s %s: %s", what, n->path, nbd_get_error());
}

static void nbd_source_close(struct source *s)
{
    struct source_nbd *n = (struct source_nbd *)s;
    nbd_close(n->nbd); /* its qemu-nbd ends with the connection */
    free(n->path);
    free(n);
}

/* The server may be anybody's: it answers, or is given up. 1 once `done` says so. */
static int wait_for(struct source_nbd *n, int (*done)(struct source_nbd *n, int64_t arg),
                    int64_t arg, const char *what, struct vm_error **err)
{
    int64_t deadline = clock_mono_ns() + fault_patience_ns(ANSWER_MS);
    for (;;) {
        int r = done(n, arg);
        if (r)
            return r < 0 ? fail(n, what, err) : 0;
        int64_t left = deadline - clock_mono_ns();
        if (left <= 0)
            return error_set(err, VM_ERROR_TIMEOUT, "%s %s: qemu-nbd does not answer", what, n->path);
        if (nbd_poll(n->nbd, (int)(left / NSEC_PER_MSEC) + 1) < 0)
            return fail(n, what, err);
    }
}

static int is_answered(struct source_nbd *n, int64_t cookie)
{
    return nbd_aio_command_completed(n->nbd, (uint64_t)cookie);
}

/* `cookie` is that of a command that was just given. */
static int wait_for_answer(struct source_nbd *n, int64_t cookie, const char *what,
                           struct vm_error **err)
{
    return cookie < 0 ? fail(n, what, err) : wait_for(n, is_answered, cookie, what, err);
}

static int take_extents(void *arg, const char *context, uint64_t offset, uint32_t *entries,
                        size_t n_entries, int *error)
{
    struct source_nbd *n = arg;
    (void)error;
    if (strcmp(context, LIBNBD_CONTEXT_BASE_ALLOCATION) != 0)
        return 0;
    n->start = n->end = offset;
    for (size_t i = 0; i + 1 < n_entries; i += 2) {
        bool zero = entries[i + 1] & LIBNBD_STATE_ZERO;
        if (i && zero != n->zero)
            break;
        n->zero = zero;
        n->end += entries[i];
    }
    return 0;
}

static int nbd_source_extent(struct source *s, uint64_t offset, uint64_t *ret_len, bool *ret_zero,
                             struct vm_error **err)
{
    struct source_nbd *n = (struct source_nbd *)s;
    if (!n->has_extents) {
        *ret_len = s->size - offset;
        *ret_zero = false;
        return 0;
    }
    if (offset < n->start || offset >= n->end) {
        uint64_t ask = s->size - offset < (1u << 30) ? s->size - offset : 1u << 30;
        nbd_extent_callback callback = {.callback = take_extents, .user_data = n};
        n->start = n->end = 0;
        int64_t cookie = nbd_aio_block_status(n->nbd, ask, offset, callback, no_completion, 0);
        if (wait_for_answer(n, cookie, "cannot ask for the extents of", err) < 0)
            return -1;
        if (offset < n->start || offset >= n->end)
            return error_set(err, VM_ERROR_FAILED, "qemu-nbd does not describe %s at %llu", n->path,
                             (unsigned long long)offset);
        if (n->end > s->size)
            n->end = s->size;
    }
    *ret_len = n->end - offset;
    *ret_zero = n->zero;
    return 0;
}

static int nbd_source_read(struct source *s, uint64_t offset, void *out, size_t len,
                           struct vm_error **err)
{
    struct source_nbd *n = (struct source_nbd *)s;
    for (size_t done = 0; done < len;) {
        size_t step = len - done < READ_MAX ? len - done : READ_MAX;
        int64_t cookie = nbd_aio_pread(n->nbd, (char *)out + done, step, offset + done,
                                       no_completion, 0);
        if (wait_for_answer(n, cookie, "cannot read", err) < 0)
            return -1;
        done += step;
    }
    return 0;
}

static const struct source_driver nbd_driver = {nbd_source_close, nbd_source_extent,
                                                nbd_source_read};

static int is_connected(struct source_nbd *n, int64_t arg)
{
    return nbd_aio_is_dead(n->nbd) || nbd_aio_is_closed(n->nbd) ? -1 : nbd_aio_is_ready(n->nbd);
}

static int connect_server(struct source_nbd *n, int fd, struct vm_error **err)
{
    n->nbd = nbd_create();
    int own = n->nbd ? fcntl(fd, F_DUPFD_CLOEXEC, 3) : -1;
    if (own < 0 || nbd_add_meta_context(n->nbd, LIBNBD_CONTEXT_BASE_ALLOCATION) < 0 ||
        nbd_aio_connect_socket(n->nbd, own) < 0)
        return fail(n, "qemu-nbd does not serve", err);
    if (wait_for(n, is_connected, 0, "qemu-nbd does not serve", err) < 0)
        return -1;
    int64_t size = nbd_get_size(n->nbd);
    if (size < 0)
        return fail(n, "cannot tell the size of", err);
    n->source.size = (uint64_t)size;
    n->has_extents = nbd_can_meta_context(n->nbd, LIBNBD_CONTEXT_BASE_ALLOCATION) > 0;
    return 0;
}

struct source *source_nbd_open(int fd, const char *name, struct vm_error **err)
{
    struct source_nbd *n = calloc(1, sizeof(*n));
    if (!n || !(n->path = strdup(name))) {
        free(n);
        error_nomem(err);
        return NULL;
    }
    n->source.driver = &nbd_driver;
    if (connect_server(n, fd, err) < 0) {
        nbd_source_close(&n->source);
        return NULL;
    }
    return &n->source;
}

/* ---- serving ---- */

/*
 * A session of its own, so that Ctrl-C on the terminal does not reach it: who reads may outlive
 * who opened. The shell is there because LISTEN_PID has to name the process that becomes qemu-nbd.
 */
static int spawn_server(const char *path, const char *format, int listener, struct vm_error **err)
{
    cleanup_free char *option = NULL;
    if (asprintf(&option, "--format=%s", format) < 0)
        return error_nomem(err);
    const char *words[] = {"sh", "-c", "LISTEN_FDS=1 LISTEN_PID=$$ exec qemu-nbd \"$@\"", "sh",
                           "--read-only", option, "--", path, NULL};
    char *argv[9];
    memcpy(argv, words, sizeof(argv)); /* exec takes char *, and changes nothing */
    posix_spawn_file_actions_t actions;
    posix_spawnattr_t attributes;
    pid_t pid;
    posix_spawn_file_actions_init(&actions);
    posix_spawnattr_init(&attributes);
    posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSID);
    posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDWR, 0);
    posix_spawn_file_actions_adddup2(&actions, 0, 1);
    posix_spawn_file_actions_adddup2(&actions, 0, 2);
    posix_spawn_file_actions_adddup2(&actions, listener, 3);
    int rc = posix_spawnp(&pid, argv[0], &actions, &attributes, argv, environ);
    posix_spawn_file_actions_destroy(&actions);
    posix_spawnattr_destroy(&attributes);
    return rc ? error_errno(err, rc, "cannot run qemu-nbd, which reads formats other than raw") : 0;
}

int source_nbd_serve(const char *path, const char *format, int *ret_fd, struct vm_error **err)
{
    /* An abstract name that the kernel chooses: no file is left behind. */
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    socklen_t size = sizeof(sa_family_t);
    cleanup_close int bound = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    /* Not 3, which dup2 would leave close-on-exec. */
    cleanup_close int listener = bound < 0 ? -1 : fcntl(bound, F_DUPFD_CLOEXEC, 4);
    cleanup_close int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (listener < 0 || fd < 0 || bind(listener, (struct sockaddr *)&address, size) < 0 ||
        listen(listener, 1) < 0)
        return error_errno(err, errno, "cannot make a socket for qemu-nbd");
    size = sizeof(address);
    if (getsockname(listener, (struct sockaddr *)&address, &size) < 0 ||
        connect(fd, (struct sockaddr *)&address, size) < 0)
        return error_errno(err, errno, "cannot connect to qemu-nbd");
    if (spawn_server(path, format, listener, err) < 0)
        return -1;
    *ret_fd = steal_fd(&fd);
    return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Disk images that are not raw: qemu-img says what they are, and a qemu-nbd that ends with the
 * connection serves them, read-only: also one that nobody spoke over. Reading them is
 * repo/source_nbd.c's: so a command that only hands the descriptor on needs no libnbd.
 */
#include "repo/source.h"

#include "base/activation.h"
#include "base/bytes.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

enum { INFO_MAX = 1 << 20 };

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
 * Run `qemu-img VERB --output=json OPTION... [-f FORMAT] -- PATH`; its exit status, -1 with an error.
 * With -U also of a file that is in use.
 */
static int run_tool(const char *verb, const char *const *options, const char *path, const char *format,
                    struct buffer *out, struct vm_error **err)
{
    const char *words[12] = {"qemu-img", verb, "--output=json"};
    size_t n = 3;
    while (*options)
        words[n++] = *options++;
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
    int status = run_tool("check", (const char *[]){"-U", NULL}, path, format, &out, err);
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
    *ret_format = strdup(name);
    return *ret_format ? 0 : error_nomem(err);
}

/* Of the file and of all that it builds upon: QEMU checks none of them when it opens them. */
static int check_chain(const char *path, const json_t *chain, struct vm_error **err)
{
    size_t i;
    json_t *info;
    json_array_foreach(chain, i, info) {
        const char *format = json_string_value(json_object_get(info, "format"));
        const char *name = json_string_value(json_object_get(info, "filename"));
        if (!format || (i && !name))
            return error_set(err, VM_ERROR_CORRUPT,
                             "qemu-img does not say what %s builds upon", path);
        if (!strcmp(format, "raw"))
            continue;
        bool named = i && !strncmp(name, "json:", 5); /* which says the format itself */
        if (check_structure(i ? name : path, named ? NULL : format, err) < 0)
            return -1;
    }
    return 0;
}

/* Of all files that the image consists of; `in_use`: although QEMU has one of them locked. */
static int describe(const char *path, const char *format, bool in_use, struct buffer *out, struct vm_error **err)
{
    const char *options[] = {"--backing-chain", in_use ? "-U" : NULL, NULL};
    return run_tool("info", options, path, format, out, err);
}

/*
 * The format of the file, with the checks of repo.h's image_import. `format`: what the user said, or NULL. What is in use
 * can be read if it is raw; of others qemu-nbd would fail, and say the reason to nobody.
 */
static int find_format(const char *path, const char *format, char **ret_format, struct vm_error **err)
{
    cleanup_buffer struct buffer locked = {.limit = INFO_MAX}, again = {.limit = INFO_MAX};
    struct buffer *out = &locked;
    int status = describe(path, format, false, out, err);
    bool in_use = status > 0 && strstr((char *)out->data, "\" lock");
    if (in_use)
        status = describe(path, format, true, out = &again, err);
    if (status < 0)
        return -1;
    if (status)
        return error_set(err, VM_ERROR_CORRUPT, "%s cannot be read: %s", path,
                         last_line((char *)out->data));
    json_t *chain = json_loads((const char *)out->data, 0, NULL);
    int result = take_format(path, format, json_array_get(chain, 0), ret_format, err);
    if (!result)
        result = check_chain(path, chain, err);
    json_decref(chain);
    if (!result && in_use && strcmp(*ret_format, "raw") != 0)
        return error_set(err, VM_ERROR_CONFLICT,
                         "%s is in use, by a running VM perhaps: `vmmig snapshot` keeps the disks of one", path);
    return result;
}

/* ---- serving ---- */

/* Detached: who reads may outlive who opened. */
static int spawn_server(const char *path, const char *format, int listener, int farewell,
                        struct vm_error **err)
{
    const int fds[] = {listener, farewell};
    cleanup_free char *option = NULL;
    pid_t pid;
    if (asprintf(&option, "--format=%s", format) < 0)
        return error_nomem(err);
    const char *argv[] = {"qemu-nbd", "--read-only", option, "--", path, NULL};
    return activation_spawn(argv, fds, 2, true, &pid, err);
}

static int make_socket(void)
{
    return socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
}

/*
 * qemu-nbd ends with a connection only if that one got through the handshake: else, as when its
 * holder dies or is refused before, it waits for the next one, for ever. So the next one waits in the
 * queue already: the whole of a handshake, and then the end. qemu-nbd takes it up only if it needs
 * it. Its near end is the server's own, which keeps it open and has the answers.
 */
static int say_farewell(int fd)
{
    static const char handshake[] = "\0\0\0\3"                     /* fixed newstyle, no zeroes */
                                    "IHAVEOPT\0\0\0\1\0\0\0\0"; /* the export without a name */
    ssize_t len = sizeof(handshake) - 1;
    return send(fd, handshake, (size_t)len, MSG_NOSIGNAL) == len ? shutdown(fd, SHUT_WR) : -1;
}

/* A socket at which a qemu-nbd of its own serves the file. */
static int serve(const char *path, const char *format, int *ret_fd, struct vm_error **err)
{
    /* An abstract name that the kernel chooses: no file is left behind. */
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    socklen_t size = sizeof(sa_family_t);
    cleanup_close int listener = make_socket();
    cleanup_close int fd = make_socket();
    cleanup_close int farewell = make_socket();
    if (listener < 0 || fd < 0 || farewell < 0 ||
        bind(listener, (struct sockaddr *)&address, size) < 0 || listen(listener, 2) < 0)
        return error_errno(err, errno, "cannot make a socket for qemu-nbd");
    size = sizeof(address);
    if (getsockname(listener, (struct sockaddr *)&address, &size) < 0 ||
        connect(fd, (struct sockaddr *)&address, size) < 0 ||
        connect(farewell, (struct sockaddr *)&address, size) < 0 || say_farewell(farewell) < 0)
        return error_errno(err, errno, "cannot connect to qemu-nbd");
    if (spawn_server(path, format, listener, farewell, err) < 0)
        return -1;
    *ret_fd = steal_fd(&fd);
    return 0;
}

/* ---- both ---- */

int source_prepare(const char *path, const char *format, int *ret_fd, struct vm_error **err)
{
    cleanup_free char *found = NULL;
    /* Absolute, so that QEMU takes no part of it for a protocol. */
    cleanup_free char *absolute = realpath(path, NULL);
    if (!absolute || access(absolute, R_OK) < 0)
        return error_errno(err, errno, "cannot read %s", path);
    if (!format || strcmp(format, "raw") != 0) {
        if (find_format(absolute, format, &found, err) < 0)
            return -1;
        format = found;
    }
    if (strcmp(format, "raw") != 0)
        return serve(absolute, format, ret_fd, err);
    int fd = open(absolute, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return error_errno(err, errno, "cannot open %s", path);
    *ret_fd = fd;
    return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/qemu_spawn.h"

#include "base/cleanup.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>

/*
 * The user's argv and one more monitor on the listener. The launch daemonizes: if QEMU did so once
 * more, the process that was started would not be the VM. One allocation; `extra` has the two
 * values.
 */
static char **make_argv(char *const *argv, int listener, char extra[2][96])
{
    size_t count = 0, n = 0;
    while (argv[count])
        count++;
    char **all = calloc(count + 5, sizeof(*all));
    if (!all)
        return NULL;
    for (size_t i = 0; i < count; i++)
        if (strcmp(argv[i], "-daemonize") && strcmp(argv[i], "--daemonize"))
            all[n++] = argv[i];
    snprintf(extra[0], 96, "socket,id=%s,fd=%d,server=on,wait=off", QEMU_SPAWN_MONITOR_ID,
             listener);
    snprintf(extra[1], 96, "chardev=%s,mode=control", QEMU_SPAWN_MONITOR_ID);
    static char chardev[] = "-chardev", mon[] = "-mon";
    all[n] = chardev;
    all[n + 1] = extra[0];
    all[n + 2] = mon;
    all[n + 3] = extra[1];
    return all;
}

static int connect_qmp(const char *path, struct vm_error **err)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof(address.sun_path), "%s", path);
    cleanup_close int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return error_errno(err, errno, "cannot make a socket");
    if (connect(fd, (const struct sockaddr *)&address, sizeof(address)) < 0)
        return error_errno(err, errno, "cannot connect to %s", path);
    return steal_fd(&fd);
}

static int spawn_with(const struct qemu_launch *launch, int listener,
                      struct process_identity *ret_process, int *ret_fd, struct vm_error **err)
{
    char extra[2][96];
    int fds[QEMU_SPAWN_FDS_MAX + 1];
    if (launch->n_fds > QEMU_SPAWN_FDS_MAX)
        return error_set(err, VM_ERROR_USAGE, "a QEMU can be given %d descriptors",
                         QEMU_SPAWN_FDS_MAX);
    if (launch->n_fds)
        memcpy(fds, launch->fds, launch->n_fds * sizeof(*fds));
    fds[launch->n_fds] = listener;
    cleanup_free char **argv = make_argv(launch->argv, listener, extra);
    if (!argv)
        return error_nomem(err);
    if (listen(listener, 1) < 0)
        return error_errno(err, errno, "cannot listen at %s", launch->qmp_path);
    /* Connected before the QEMU runs: so the connection says when it is ready, or that it ended. */
    cleanup_close int fd = connect_qmp(launch->qmp_path, err);
    if (fd < 0)
        return -1;
    struct spawn_params params = {.binary = launch->binary,
                                  .argv = argv,
                                  .cwd = launch->cwd,
                                  .foreign_cwd = launch->foreign_cwd,
                                  .log_path = launch->log_path,
                                  .fds = fds,
                                  .n_fds = launch->n_fds + 1,
                                  .user = launch->user,
                                  .cgroup = launch->cgroup,
                                  .born = launch->born,
                                  .born_arg = launch->born_arg};
    if (spawn_process(&params, ret_process, err) < 0)
        return -1;
    *ret_fd = steal_fd(&fd);
    return 0;
}

int qemu_spawn_process(const struct qemu_launch *launch, struct process_identity *ret_process,
                       int *ret_fd, struct vm_error **err)
{
    cleanup_close int listener = spawn_bind(launch->qmp_path, SOCK_STREAM, err);
    if (listener < 0)
        return -1;
    if (spawn_with(launch, listener, ret_process, ret_fd, err) == 0)
        return 0;
    unlink(launch->qmp_path);
    return -1;
}

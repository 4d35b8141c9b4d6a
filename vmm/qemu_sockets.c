/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/qemu_sockets.h"

#include "base/cleanup.h"
#include "vmm/qemu_argv.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>

/* Somebody who has too many that wait listens, too. */
static bool somebody_listens(const char *path, int type)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof(address.sun_path))
        return false; /* QEMU will say so */
    strcpy(address.sun_path, path);
    cleanup_close int fd = socket(AF_UNIX, type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    return fd >= 0 && (connect(fd, (struct sockaddr *)&address, sizeof(address)) == 0 ||
                       errno == EAGAIN);
}

static int check_path(const char *option, const char *path, size_t n, const char *cwd,
                      struct vm_error **err)
{
    cleanup_free char *full = NULL;
    if (asprintf(&full, "%s%s%.*s", *path == '/' ? "" : cwd, *path == '/' ? "" : "/", (int)n,
                 path) < 0)
        return error_nomem(err);
    if (!somebody_listens(full, SOCK_STREAM))
        return 0;
    return error_set(err, VM_ERROR_REFUSED,
                     "the VM's -%s would take the socket %s away from a program that listens there "
                     "on this host: end that one, or give one of the two another path",
                     option, full);
}

/* "unix:PATH,server=on": -qmp, -serial, -monitor, -vnc and their like. */
static int check_text(const struct qemu_option *o, const char *cwd, struct vm_error **err)
{
    static const char unix_prefix[] = "unix:";
    const char *path = o->value + strlen(unix_prefix);
    if (strncmp(o->value, unix_prefix, strlen(unix_prefix)) || strstr(path, ",server=off"))
        return 0;
    return check_path(o->name, path, strcspn(path, ","), cwd, err);
}

static int check_chardev(const struct qemu_option *o, const char *cwd, struct vm_error **err)
{
    cleanup_qemu_props struct qemu_props p = {0};
    if (qemu_props_parse(o->value, qemu_option_implied_key(o->name), &p, err) < 0)
        return -1;
    const char *backend = qemu_props_get(&p, "backend"), *path = qemu_props_get(&p, "path");
    if (!backend || strcmp(backend, "socket") || !path || !qemu_props_is_on(&p, "server"))
        return 0;
    return check_path(o->name, path, strlen(path), cwd, err);
}

int qemu_sockets_check_free(char *const *argv, const char *cwd, struct vm_error **err)
{
    cleanup_qemu_argv struct qemu_argv a = {0};
    if (qemu_argv_parse(argv, &a, err) < 0)
        return -1;
    for (unsigned i = 0; i < a.n; i++) {
        const struct qemu_option *o = &a.options[i];
        if (o->value && (!strcmp(o->name, "chardev") ? check_chardev : check_text)(o, cwd, err) < 0)
            return -1;
    }
    return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * An nbdkit plugin: a disk that can be written once, front to back or not, and never read. What a client writes
 * goes to the agent (snapshot/push_wire.h) over the socket that it was started with. It has one client in its life.
 *
 *     nbdkit -f nbdkit-vmmig-plugin.so fd=4 size=BYTES
 */
#define NBDKIT_API_VERSION 2
#include "snapshot/push_wire.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include <nbdkit-plugin.h>

#define THREAD_MODEL NBDKIT_THREAD_MODEL_SERIALIZE_ALL_REQUESTS

static int agent = -1;
static int64_t disk_size = -1;

static int push_config(const char *key, const char *value)
{
    if (!strcmp(key, "fd"))
        return nbdkit_parse_int("fd", value, &agent);
    if (!strcmp(key, "size"))
        return (disk_size = nbdkit_parse_size(value)) < 0 ? -1 : 0;
    nbdkit_error("unknown parameter '%s'", key);
    return -1;
}

static int push_config_complete(void)
{
    if (agent >= 0 && disk_size >= 0)
        return 0;
    nbdkit_error("fd= and size= are needed");
    return -1;
}

/* nbdkit calls this for one client at a time. */
static void *push_open(int readonly)
{
    static bool had_one;
    (void)readonly;
    if (had_one) {
        nbdkit_error("this disk has had its client");
        return NULL;
    }
    had_one = true;
    return NBDKIT_HANDLE_NOT_NEEDED;
}

static int64_t push_get_size(void *handle)
{
    (void)handle;
    return disk_size;
}

static int write_all(struct iovec *iov, int n)
{
    while (n) {
        ssize_t done = writev(agent, iov, n);
        if (done < 0 && errno == EINTR)
            continue;
        if (done < 0) {
            nbdkit_error("the agent is gone: %m");
            errno = EIO;
            return -1;
        }
        while (n && (size_t)done >= iov->iov_len) {
            done -= (ssize_t)iov->iov_len;
            iov++;
            n--;
        }
        if (n) {
            iov->iov_base = (char *)iov->iov_base + done;
            iov->iov_len -= (size_t)done;
        }
    }
    return 0;
}

static int say(enum push_op op, uint64_t offset, uint64_t len, const void *data)
{
    struct push_message m = {.op = op, .offset = offset, .len = len};
    struct iovec iov[2] = {{&m, sizeof(m)}, {(void *)(uintptr_t)data, data ? (size_t)len : 0}};
    return write_all(iov, data ? 2 : 1);
}

static void push_close(void *handle)
{
    (void)handle;
    say(PUSH_CLOSE, 0, 0, NULL);
}

/* nbdkit wants it; nobody reads. */
static int push_pread(void *handle, void *buf, uint32_t count, uint64_t offset, uint32_t flags)
{
    (void)handle, (void)buf, (void)count, (void)offset, (void)flags;
    nbdkit_error("this disk cannot be read");
    errno = EIO;
    return -1;
}

static int push_pwrite(void *handle, const void *buf, uint32_t count, uint64_t offset,
                       uint32_t flags)
{
    (void)handle, (void)flags;
    for (uint32_t done = 0; done < count;) {
        uint32_t n = count - done < PUSH_WRITE_MAX ? count - done : PUSH_WRITE_MAX;
        if (say(PUSH_WRITE, offset + done, n, (const char *)buf + done) < 0)
            return -1;
        done += n;
    }
    return 0;
}

static int push_zero(void *handle, uint32_t count, uint64_t offset, uint32_t flags)
{
    (void)handle, (void)flags;
    return say(PUSH_ZERO, offset, count, NULL);
}

static int push_no(void *handle)
{
    (void)handle;
    return 0;
}

static struct nbdkit_plugin plugin = {
    .name = "vmmig",
    .longname = "write end of a vmmig repository",
    .config = push_config,
    .config_complete = push_config_complete,
    .open = push_open,
    .close = push_close,
    .get_size = push_get_size,
    .can_flush = push_no,
    .can_trim = push_no,
    .pread = push_pread,
    .pwrite = push_pwrite,
    .zero = push_zero,
};

/* Which nbdkit looks up by name; its header does not declare it. */
struct nbdkit_plugin *plugin_init(void);

NBDKIT_REGISTER_PLUGIN(plugin)

/* SPDX-License-Identifier: Apache-2.0 */
#include "snapshot/mount_wire.h"

#include "base/cleanup.h"
#include "base/process.h"

#include <errno.h>
#include <mntent.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>

struct mount_message mount_message(enum mount_type type, uint32_t id, const char *name)
{
    struct mount_message m = {.version = MOUNT_WIRE_VERSION, .type = type, .id = id};
    snprintf(m.name, sizeof(m.name), "%s", name ? name : "");
    return m;
}

union fds_control {
    struct cmsghdr header;
    char space[CMSG_SPACE(sizeof(int) * MOUNT_FILES_MAX)];
};

int mount_send(int socket, const struct mount_message *m, const void *payload, const int *fds,
               int n_fds, struct vm_error **err)
{
    union fds_control control = {0};
    struct iovec iov[2] = {{(void *)(uintptr_t)m, sizeof(*m)},
                           {(void *)(uintptr_t)payload, m->payload_len}};
    struct msghdr h = {.msg_iov = iov, .msg_iovlen = m->payload_len ? 2 : 1};
    if (n_fds) {
        h.msg_control = control.space;
        h.msg_controllen = CMSG_SPACE(sizeof(int) * (size_t)n_fds);
        struct cmsghdr *c = CMSG_FIRSTHDR(&h);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(sizeof(int) * (size_t)n_fds);
        memcpy(CMSG_DATA(c), fds, sizeof(int) * (size_t)n_fds);
    }
    ssize_t n;
    do
        n = sendmsg(socket, &h, MSG_NOSIGNAL);
    while (n < 0 && errno == EINTR);
    if (n >= 0)
        return 0;
    error_errno(err, errno, "cannot send to the other side of the mount");
    return errno == EAGAIN || errno == ENOBUFS ? -1 : error_set_kind(err, VM_ERROR_UNREACHABLE);
}

/* Take the descriptors out of the control message; those beyond `max` are closed. */
static bool take_fds(struct msghdr *h, int *ret_fds, int max, int *ret_n)
{
    int n = 0, received = 0;
    for (struct cmsghdr *c = CMSG_FIRSTHDR(h); c; c = CMSG_NXTHDR(h, c)) {
        if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
            continue;
        int count = (int)((c->cmsg_len - CMSG_LEN(0)) / sizeof(int)), fd;
        for (int i = 0; i < count; i++, received++) {
            memcpy(&fd, CMSG_DATA(c) + (size_t)i * sizeof(int), sizeof(fd));
            if (n < max)
                ret_fds[n++] = fd;
            else
                close(fd);
        }
    }
    *ret_n = n;
    return received == n && !(h->msg_flags & MSG_CTRUNC);
}

static bool is_well_formed(const struct mount_packet *p, ssize_t n, int flags)
{
    return n >= (ssize_t)sizeof(p->m) && !(flags & MSG_TRUNC) &&
           p->m.payload_len <= MOUNT_PAYLOAD_MAX &&
           (size_t)n == sizeof(p->m) + p->m.payload_len &&
           memchr(p->m.name, 0, MOUNT_NAME_MAX + 1);
}

int mount_receive(int socket, struct mount_packet *p, int *ret_fds, int max_fds, int *ret_n_fds,
                  struct vm_error **err)
{
    union fds_control control;
    struct iovec iov = {p, sizeof(*p)};
    struct msghdr h = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.space,
                       .msg_controllen = sizeof(control.space)};
    ssize_t n;
    int none;
    do
        n = recvmsg(socket, &h, MSG_CMSG_CLOEXEC);
    while (n < 0 && errno == EINTR);
    if (n < 0)
        return error_errno(err, errno, "cannot hear the other side of the mount");
    int *n_fds = ret_n_fds ? ret_n_fds : &none;
    bool good = take_fds(&h, ret_fds, max_fds, n_fds);
    if (n == 0 && !*n_fds)
        return 0;
    if (good && is_well_formed(p, n, h.msg_flags)) {
        p->payload[p->m.payload_len] = 0;
        return 1;
    }
    for (int i = 0; i < *n_fds; i++)
        close(ret_fds[i]);
    *n_fds = 0;
    return error_set(err, VM_ERROR_PROTOCOL, "the other side of the mount sent a malformed message");
}

void mount_escape(const char *image, char out[3 * MOUNT_NAME_MAX + 1])
{
    char *to = out;
    for (; *image && to < out + 3 * MOUNT_NAME_MAX - 2; image++) {
        if (*image == '/')
            to = stpcpy(to, "%2F");
        else
            *to++ = *image;
    }
    *to = 0;
}

int mount_unescape(const char *folder, char out[MOUNT_NAME_MAX + 1])
{
    size_t n = 0;
    for (; *folder; folder++) {
        char c = *folder;
        if (c == '%') {
            if (strncmp(folder, "%2F", 3))
                return -1;
            c = '/';
            folder += 2;
        }
        if (n == MOUNT_NAME_MAX)
            return -1;
        out[n++] = c;
    }
    out[n] = 0;
    return n ? 0 : -1;
}

/* ---- lives ---- */

static unsigned boot_digits(const struct process_identity *id)
{
    const uint8_t *b = id->boot.bytes;
    return (unsigned)b[0] << 24 | (unsigned)b[1] << 16 | (unsigned)b[2] << 8 | b[3];
}

int mount_life(char out[MOUNT_LIFE_SIZE], struct vm_error **err)
{
    struct process_identity me;
    if (process_identify(getpid(), &me, err) < 0)
        return -1;
    snprintf(out, MOUNT_LIFE_SIZE, "%08x.%x.%llx", boot_digits(&me), (unsigned)me.pid,
             (unsigned long long)me.start);
    return 0;
}

bool mount_life_is_over(const char *life)
{
    struct process_identity id;
    unsigned boot, pid;
    unsigned long long start;
    int end = 0;
    if (sscanf(life, "%8x.%x.%llx%n", &boot, &pid, &start, &end) != 3 || life[end] ||
        process_identify(getpid(), &id, NULL) < 0)
        return false;
    if (boot != boot_digits(&id))
        return true;
    id.pid = (int32_t)pid;
    id.start = start;
    return !process_alive(&id);
}

/* ---- the mount point ---- */

/* The uppermost of what is mounted there. Its holder may be dead, so it is not looked into. */
bool mount_is_there(const char *folder)
{
    char text[4 * 4096];
    struct mntent entry;
    bool found = false;
    FILE *mounts = setmntent("/proc/self/mounts", "re");
    while (mounts && getmntent_r(mounts, &entry, text, sizeof(text)))
        if (!strcmp(entry.mnt_dir, folder))
            found = !strcmp(entry.mnt_type, "fuse.vmmig");
    if (mounts)
        endmntent(mounts);
    return found;
}

/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/write_protection.h"

#include "base/cleanup.h"

#include <dirent.h>
#include <errno.h>
#include <inttypes.h>
#include <linux/userfaultfd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

static void close_folder(DIR **d)
{
    if (*d)
        closedir(*d);
}

/* ---- one userfaultfd ---- */

/* Ranges that another userfaultfd has are refused by the kernel, and left. */
static void lift_range(int uffd, uint64_t start, uint64_t end)
{
    struct uffdio_range range = {.start = start, .len = end - start};
    struct uffdio_writeprotect none = {.range = range, .mode = 0};
    ioctl(uffd, UFFDIO_WRITEPROTECT, &none);
    ioctl(uffd, UFFDIO_UNREGISTER, &range);
    ioctl(uffd, UFFDIO_WAKE, &range);
}

/* Does the line "VmFlags: rd wr ..." say that writes are tracked by a userfaultfd? */
static bool says_protected(const char *flags)
{
    return strstr(flags, " uw ") || strstr(flags, " uw\n");
}

/* For every protected mapping; uffd -1 only counts them. */
static int each_mapping(pid_t pid, int uffd, unsigned *ret_n, struct vm_error **err)
{
    char path[48];
    char *line = NULL;
    size_t cap = 0;
    uint64_t start = 0, end = 0, from, to;
    snprintf(path, sizeof(path), "/proc/%d/smaps", pid);
    cleanup_fclose FILE *smaps = fopen(path, "re");
    if (!smaps)
        return error_errno(err, errno, "cannot read %s", path);
    *ret_n = 0;
    while (getline(&line, &cap, smaps) > 0) {
        char mode[5];
        if (sscanf(line, "%" SCNx64 "-%" SCNx64 " %4[rwxsp-]", &from, &to, mode) == 3) {
            start = from;
            end = to;
        } else if (!strncmp(line, "VmFlags:", 8) && says_protected(line)) {
            ++*ret_n;
            if (uffd >= 0)
                lift_range(uffd, start, end);
        }
    }
    free(line);
    return 0;
}

/* ---- all of a process ---- */

static bool is_userfaultfd(int folder, const char *name)
{
    char target[64] = "";
    return readlinkat(folder, name, target, sizeof(target) - 1) > 0 &&
           !strcmp(target, "anon_inode:[userfaultfd]");
}

/* *ret_n: mappings that were protected, as each userfaultfd of the process found them. */
static int lift_all(pid_t pid, int pidfd, DIR *fds, unsigned *ret_n, struct vm_error **err)
{
    struct dirent *e;
    unsigned n;
    *ret_n = 0;
    while ((e = readdir(fds))) {
        if (!is_userfaultfd(dirfd(fds), e->d_name))
            continue;
        cleanup_close int uffd = (int)syscall(SYS_pidfd_getfd, pidfd, atoi(e->d_name), 0);
        if (uffd < 0)
            return error_errno(err, errno, "cannot borrow a userfaultfd of process %d", pid);
        if (each_mapping(pid, uffd, &n, err) < 0)
            return -1;
        *ret_n += n;
    }
    return 0;
}

static int lift(pid_t pid, int pidfd, bool *ret_found, struct vm_error **err)
{
    char path[48];
    unsigned before, after = 0;
    snprintf(path, sizeof(path), "/proc/%d/fd", pid);
    __attribute__((cleanup(close_folder))) DIR *fds = opendir(path);
    if (!fds)
        return error_errno(err, errno, "cannot read %s", path);
    if (lift_all(pid, pidfd, fds, &before, err) < 0 ||
        (before && each_mapping(pid, -1, &after, err) < 0))
        return -1;
    if (after)
        return error_set(err, VM_ERROR_FAILED, "%u mappings of process %d stay write-protected",
                         after, pid);
    *ret_found = before != 0;
    return 0;
}

int write_protection_lift(const struct process_identity *process, bool *ret_found,
                          struct vm_error **err)
{
    cleanup_error struct vm_error *failed = NULL;
    cleanup_close int pidfd = (int)syscall(SYS_pidfd_open, process->pid, 0);
    /* The pidfd is of that very process, if it still is after the pidfd was made. */
    if (pidfd >= 0 && process_alive(process)) {
        if (lift(process->pid, pidfd, ret_found, &failed) == 0)
            return 0;
        if (process_alive(process))
            return error_propagate(err, steal_ptr(&failed));
    }
    *ret_found = false;
    return 0;
}

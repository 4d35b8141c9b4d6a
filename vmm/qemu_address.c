/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/qemu_address.h"

#include "base/log.h"
#include "vmm/qemu_internal.h"

#include <inttypes.h>
#include <linux/capability.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

bool qemu_address_may(void)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[_LINUX_CAPABILITY_U32S_3] = {0};
    return syscall(SYS_capget, &header, data) == 0 &&
           data[CAP_TO_INDEX(CAP_SYS_PTRACE)].effective & CAP_TO_MASK(CAP_SYS_PTRACE);
}

/* ---- What QEMU says ---- */

/* A memory region's name is the block's, but for the device's path that the block may begin with. */
static bool is_name_of(const char *name, size_t len, const char *region)
{
    size_t all = strlen(region);
    return all >= len && !memcmp(region + all - len, name, len) &&
           (all == len || region[all - len - 1] == '/');
}

/* "  0000000100000000-000000017fffffff (prio 0, ram): pc.ram @0000000080000000 KVM" */
static bool parse_range(const char *line, size_t len, const char *region,
                        struct qemu_address_range *ret)
{
    char text[GUEST_REGION_NAME_MAX + 128];
    uint64_t start, end, offset = 0;
    int priority, at = 0;
    if (len >= sizeof(text))
        return false;
    memcpy(text, line, len);
    text[len] = 0;
    if (sscanf(text, " %" SCNx64 "-%" SCNx64 " (prio %d, ram): %n", &start, &end, &priority, &at) < 3 ||
        !at)
        return false;
    const char *name = text + at, *mark = strstr(name, " @");
    size_t name_len = mark ? (size_t)(mark - name) : strcspn(name, " ");
    if ((mark && sscanf(mark, " @%" SCNx64, &offset) != 1) || !is_name_of(name, name_len, region))
        return false;
    *ret = (struct qemu_address_range){start, offset};
    return true;
}

bool qemu_address_parse_tree(const char *text, const char *region,
                             struct qemu_address_range *ret_range)
{
    static const char memory[] = " AS \"memory\", root: system";
    bool inside = false;
    for (const char *line = text; *line;) {
        size_t len = strcspn(line, "\r\n");
        if (!strncmp(line, "FlatView", strlen("FlatView")))
            inside = false;
        else if (len >= strlen(memory) && !memcmp(line, memory, strlen(memory)))
            inside = true;
        else if (inside && parse_range(line, len, region, ret_range))
            return true;
        line += len;
        line += strspn(line, "\r\n");
    }
    return false;
}

bool qemu_address_parse_host(const char *text, const char *region, uint64_t *ret_address)
{
    const char *open = strchr(text, '('), *close = open ? strstr(open, ") is ") : NULL;
    if (!close || !is_name_of(open + 1, (size_t)(close - open - 1), region))
        return false;
    return sscanf(close, ") is %" SCNx64, ret_address) == 1;
}

/* ---- Whether it is so ---- */

/* One stretch, or several without a gap, that can be read and written. */
static bool is_memory(int pid, uint64_t start, uint64_t size)
{
    char path[32], may[8];
    snprintf(path, sizeof(path), "/proc/%d/maps", pid);
    cleanup_fclose FILE *maps = fopen(path, "re");
    cleanup_free char *line = NULL;
    size_t cap = 0;
    uint64_t from, to, at = start;
    while (maps && at - start < size && getline(&line, &cap, maps) > 0)
        if (sscanf(line, "%" SCNx64 "-%" SCNx64 " %7s", &from, &to, may) == 3 && from <= at &&
            at < to && may[0] == 'r' && may[1] == 'w')
            at = to;
    return at - start >= size;
}

/* The first byte can be had. */
static bool is_open(int pid, uint64_t address)
{
    char byte;
    struct iovec to = {&byte, 1}, from = {(void *)(uintptr_t)address, 1};
    return process_vm_readv(pid, &to, 1, &from, 1, 0) == 1;
}

static int ask(struct qemu *q, const char *command, json_t **ret, const char **ret_text,
               struct vm_error **err)
{
    if (qemu_command(q, "human-monitor-command", json_pack("{s:s}", "command-line", command), ret,
                     err) < 0)
        return -1;
    *ret_text = json_is_string(*ret) ? json_string_value(*ret) : "";
    return 0;
}

static int find_one(struct qemu *q, const char *tree, int process_fd, struct guest_region *r,
                    struct vm_error **err)
{
    struct qemu_address_range range;
    char command[48];
    const char *text;
    uint64_t at = 0;
    CLEANUP(json) json_t *reply = NULL;
    const char *why = "it is nowhere in the guest's memory";
    if (qemu_address_parse_tree(tree, r->name, &range)) {
        snprintf(command, sizeof(command), "gpa2hva 0x%" PRIx64, range.start);
        if (ask(q, command, &reply, &text, err) < 0)
            return -1;
        why = !qemu_address_parse_host(text, r->name, &at) || at < range.offset
                  ? "QEMU does not say where"
              : !is_memory(q->guest.process.pid, at - range.offset, r->size)
                  ? "QEMU names a place that is no memory"
              : !is_open(q->guest.process.pid, at) ? "the kernel does not allow it"
                                                   : NULL;
    }
    if (why) {
        log_info("memory is not written in QEMU's own mapping", "region=%s why=%s", log_q(r->name),
                 log_q(why));
        return 0;
    }
    r->remote = at - range.offset;
    r->process = q->guest.process.pid;
    r->process_fd = process_fd;
    return 0;
}

int qemu_address_find(struct qemu *q, int process_fd, struct guest_region *regions, unsigned n,
                      struct vm_error **err)
{
    CLEANUP(json) json_t *reply = NULL;
    const char *tree;
    if (!qemu_address_may()) {
        log_info("memory is not written in QEMU's own mapping", "why=%s",
                 log_q("that needs CAP_SYS_PTRACE"));
        return 0;
    }
    if (ask(q, "info mtree -f", &reply, &tree, err) < 0)
        return -1;
    for (unsigned i = 0; i < n; i++)
        if (!regions[i].base && find_one(q, tree, process_fd, &regions[i], err) < 0)
            return -1;
    return 0;
}

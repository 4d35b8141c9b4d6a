/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- Memory ---- */

static void add_slot(struct memory *m, const char *name, uint64_t address, uint64_t offset,
                     uint64_t size)
{
    struct vmmig_slot *s = &m->slots[m->n_slots];
    *s = (struct vmmig_slot){.kvm_slot = m->n_slots++,
                             .guest_address = address,
                             .size = size,
                             .host = m->host + offset,
                             .memfd = m->memfd,
                             .memfd_offset = offset};
    snprintf(s->name, sizeof(s->name), "%s", name);
}

int memory_create(struct memory *m, const struct options *o)
{
    uint64_t low = o->memory < o->below_4g ? o->memory : o->below_4g;
    *m = (struct memory){.size = o->memory};
    /* vmmig: a memfd that can be sealed, mapped shared, is what the agent maps too. */
    m->memfd =
        memfd_create("guest", MFD_CLOEXEC | MFD_ALLOW_SEALING | (o->hugetlb ? MFD_HUGETLB : 0));
    if (m->memfd < 0 || ftruncate(m->memfd, (off_t)m->size) < 0)
        return complain("cannot make %llu MiB of guest memory: %s",
                        (unsigned long long)m->size >> 20, strerror(errno));
    void *host =
        mmap(NULL, m->size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, m->memfd, 0);
    if (host == MAP_FAILED)
        return complain("cannot map the guest's memory: %s", strerror(errno));
    if (o->hugetlb && fallocate(m->memfd, 0, 0, (off_t)m->size) < 0)
        return complain("there are no huge pages for %llu MiB of guest memory: %s",
                        (unsigned long long)m->size >> 20, strerror(errno));
    m->host = host;
    add_slot(m, "low", 0, 0, low);
    if (m->size > low)
        add_slot(m, "high", FOUR_GIB, low, m->size - low);
    return 0;
}

int memory_map(const struct memory *m, int vm_fd)
{
    for (unsigned i = 0; i < m->n_slots; i++) {
        const struct vmmig_slot *s = &m->slots[i];
        struct kvm_userspace_memory_region region = {.slot = s->kvm_slot,
                                                     .guest_phys_addr = s->guest_address,
                                                     .memory_size = s->size,
                                                     .userspace_addr = (uintptr_t)s->host};
        if (ioctl(vm_fd, KVM_SET_USER_MEMORY_REGION, &region) < 0)
            return complain("KVM does not take memory slot %s: %s", s->name, strerror(errno));
    }
    return 0;
}

void *memory_at(const struct memory *m, uint64_t address, uint64_t size)
{
    for (unsigned i = 0; i < m->n_slots; i++) {
        const struct vmmig_slot *s = &m->slots[i];
        if (address >= s->guest_address && size <= s->size &&
            address - s->guest_address <= s->size - size)
            return (uint8_t *)s->host + (address - s->guest_address);
    }
    return NULL;
}

/* ---- Multiboot ---- */

enum {
    HEADER_MAGIC = 0x1badb002,
    HEADER_WITHIN = 8192,
    HEADER_ADDRESSES = 1 << 16, /* the header says where the image goes: a flat file will do */
    INFO_ADDRESS = 0x1000,
    INFO_COMMAND_LINE = 1 << 2,
    INFO_MAP = 1 << 6,
    COMMAND_LINE_MAX = 2048,
    HOLE_START = 0xa0000,
    HOLE_END = 0x100000,
};

struct header {
    uint32_t magic, flags, checksum;
    uint32_t header_at, load_at, load_end, zero_end, entry;
};

/* What the kernel is told, at INFO_ADDRESS. */
struct __attribute__((packed)) info {
    uint32_t flags, unused1[3], command_line, unused2[6], map_size, map_at, unused3[9];
    struct __attribute__((packed)) range {
        uint32_t size; /* of what follows */
        uint64_t start, length;
        uint32_t type; /* 1: memory */
    } map[3];
    char words[COMMAND_LINE_MAX];
};

static bool find_header(const uint8_t *file, size_t size, struct header *ret_header, size_t *ret_at)
{
    for (size_t at = 0; at + sizeof(*ret_header) <= size && at < HEADER_WITHIN; at += 4) {
        memcpy(ret_header, file + at, sizeof(*ret_header));
        *ret_at = at;
        if (ret_header->magic == HEADER_MAGIC &&
            ret_header->magic + ret_header->flags + ret_header->checksum == 0)
            return ret_header->flags & HEADER_ADDRESSES;
    }
    return false;
}

static int place(struct memory *m, const char *path, const uint8_t *file, size_t size,
                 uint32_t *ret_entry)
{
    struct header h;
    size_t at;
    if (!find_header(file, size, &h, &at) || h.load_at > h.header_at ||
        h.header_at - h.load_at > at)
        return complain("%s is no multiboot kernel with load addresses", path);
    size_t from = at - (h.header_at - h.load_at), n = size - from;
    if (h.load_end)
        n = h.load_end > h.load_at && h.load_end - h.load_at <= n ? h.load_end - h.load_at : 0;
    void *to = memory_at(m, h.load_at, n);
    if (!n || !to || h.load_at < HOLE_END)
        return complain("%s does not fit the guest's memory from 1 MiB on", path);
    memcpy(to, file + from, n);
    *ret_entry = h.entry;
    return 0;
}

static int place_info(struct memory *m, const char *command_line)
{
    const struct vmmig_slot *high = m->n_slots > 1 ? &m->slots[1] : NULL;
    struct info *info = memory_at(m, INFO_ADDRESS, sizeof(*info));
    const uint32_t rest = sizeof(struct range) - sizeof(uint32_t);
    if (strlen(command_line) >= sizeof(info->words))
        return complain("--append is longer than %d bytes", COMMAND_LINE_MAX - 1);
    *info = (struct info){
        .flags = INFO_COMMAND_LINE | INFO_MAP,
        .command_line = INFO_ADDRESS + offsetof(struct info, words),
        .map_size = (high ? 3 : 2) * sizeof(struct range),
        .map_at = INFO_ADDRESS + offsetof(struct info, map),
        .map = {{rest, 0, HOLE_START, 1}, {rest, HOLE_END, m->slots[0].size - HOLE_END, 1}}};
    if (high)
        info->map[2] = (struct range){rest, high->guest_address, high->size, 1};
    strcpy(info->words, command_line);
    return 0;
}

int memory_load_kernel(struct memory *m, const char *path, const char *command_line,
                       uint32_t *ret_entry, uint32_t *ret_info)
{
    struct stat st;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &st) < 0)
        return complain("cannot open %s: %s", path, strerror(errno));
    void *file =
        st.st_size ? mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0) : MAP_FAILED;
    close(fd);
    if (file == MAP_FAILED)
        return complain("cannot read %s", path);
    int r = place(m, path, file, (size_t)st.st_size, ret_entry);
    munmap(file, (size_t)st.st_size);
    *ret_info = INFO_ADDRESS;
    return r < 0 ? -1 : place_info(m, command_line);
}

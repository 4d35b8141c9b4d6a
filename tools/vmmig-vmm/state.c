/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static const char magic[8] = {'V', 'M', 'M', 'I', 'G', 'V', 'M', 'M'};

struct file_header {
    char magic[8];
    uint32_t version, sections;
};

struct section_header {
    uint32_t type, instance;
    uint64_t size;
};

static uint64_t hash(const uint8_t *bytes, size_t size)
{
    uint64_t h = 0xcbf29ce484222325u;
    for (size_t i = 0; i < size; i++)
        h = (h ^ bytes[i]) * 0x100000001b3u;
    return h;
}

/* ---- Writing ---- */

static void append(struct state *s, const void *bytes, size_t size)
{
    if (s->failed || size > STATE_BYTES_MAX - s->size) {
        s->failed = true;
        return;
    }
    if (size)
        memcpy(s->bytes + s->size, bytes, size);
    s->size += size;
}

void state_begin(struct state *s)
{
    struct file_header h = {.version = STATE_VERSION};
    memcpy(h.magic, magic, sizeof(magic));
    *s = (struct state){.bytes = malloc(STATE_BYTES_MAX)};
    s->failed = !s->bytes;
    append(s, &h, sizeof(h));
}

void state_put(struct state *s, enum state_type type, unsigned instance, const void *bytes,
               size_t size)
{
    struct section_header h = {type, instance, size};
    append(s, &h, sizeof(h));
    append(s, bytes, size);
    if (!s->failed)
        ((struct file_header *)(void *)s->bytes)->sections++;
}

int state_write(struct state *s, int fd)
{
    uint64_t sum = s->failed ? 0 : hash(s->bytes, s->size);
    append(s, &sum, sizeof(sum));
    if (s->failed)
        return complain("the guest's state does not fit %u bytes", STATE_BYTES_MAX);
    for (size_t at = 0; at < s->size;) {
        ssize_t n = write(fd, s->bytes + at, s->size - at);
        if (n <= 0)
            return complain("cannot write the guest's state: %s", strerror(errno));
        at += (size_t)n;
    }
    return 0;
}

void state_finish(struct state *s)
{
    free(s->bytes);
    *s = (struct state){0};
}

/* ---- Reading ---- */

/* The next section; its contents stand at *at - size. False: there is none that is whole. */
static bool next_section(const uint8_t *bytes, size_t size, size_t *at,
                         struct section_header *ret_header)
{
    if (size - *at < sizeof(*ret_header))
        return false;
    memcpy(ret_header, bytes + *at, sizeof(*ret_header));
    *at += sizeof(*ret_header);
    if (ret_header->size > size - *at)
        return false;
    *at += (size_t)ret_header->size;
    return true;
}

static bool is_known(uint32_t type)
{
    return (type >= STATE_MACHINE && type <= STATE_WRITER) ||
           (type >= STATE_CPUID && type <= STATE_MP_STATE);
}

int state_check(const uint8_t *bytes, size_t size)
{
    struct file_header h;
    struct section_header seen[STATE_SECTIONS_MAX];
    uint64_t sum;
    size_t at = sizeof(h);
    if (size < sizeof(h) + sizeof(sum) || memcmp(bytes, magic, sizeof(magic)))
        return complain("this is no state of a vmmig-vmm guest");
    memcpy(&h, bytes, sizeof(h));
    size -= sizeof(sum);
    memcpy(&sum, bytes + size, sizeof(sum));
    if (h.version != STATE_VERSION)
        return complain("the guest's state has version %u, this vmmig-vmm reads %u", h.version,
                        STATE_VERSION);
    if (sum != hash(bytes, size))
        return complain("the guest's state is damaged: its checksum is wrong");
    if (h.sections > STATE_SECTIONS_MAX)
        return complain("the guest's state is damaged: %u sections", h.sections);
    for (uint32_t i = 0; i < h.sections; i++) {
        if (!next_section(bytes, size, &at, &seen[i]) || !is_known(seen[i].type))
            return complain("the guest's state is damaged: section %u", i);
        for (uint32_t j = 0; j < i; j++)
            if (seen[j].type == seen[i].type && seen[j].instance == seen[i].instance)
                return complain("the guest's state is damaged: section %u is there twice", i);
    }
    return at == size ? 0 : complain("the guest's state is damaged: bytes behind its sections");
}

int state_read(struct state *s, int fd)
{
    struct stat st;
    *s = (struct state){0};
    if (fstat(fd, &st) < 0 || st.st_size < 0 || st.st_size > STATE_BYTES_MAX)
        return complain("the guest's state is larger than %u bytes", STATE_BYTES_MAX);
    s->bytes = malloc((size_t)st.st_size + 1);
    if (!s->bytes)
        return complain("no memory");
    while (s->size < (size_t)st.st_size) {
        ssize_t n = pread(fd, s->bytes + s->size, (size_t)st.st_size - s->size, (off_t)s->size);
        if (n <= 0)
            return complain("cannot read the guest's state");
        s->size += (size_t)n;
    }
    return state_check(s->bytes, s->size);
}

const void *state_get(const struct state *s, enum state_type type, unsigned instance, size_t min,
                      size_t max, size_t *ret_size)
{
    struct section_header h;
    size_t at = sizeof(struct file_header), end = s->size - sizeof(uint64_t);
    while (next_section(s->bytes, end, &at, &h)) {
        if (h.type != type || h.instance != instance)
            continue;
        if (h.size < min || h.size > max) {
            complain("section %u.%u of the guest's state has %llu bytes", type, instance,
                     (unsigned long long)h.size);
            return NULL;
        }
        *ret_size = (size_t)h.size;
        return s->bytes + at - h.size;
    }
    complain("section %u.%u is missing from the guest's state", type, instance);
    return NULL;
}

int state_copy(const struct state *s, enum state_type type, unsigned instance, void *ret_bytes,
               size_t size)
{
    size_t n;
    const void *bytes = state_get(s, type, instance, size, size, &n);
    if (!bytes)
        return -1;
    memcpy(ret_bytes, bytes, size);
    return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
#include "base/fault.h"
#include "dirtylog/attach_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>

/* ---- Checks of the VMM's slots ---- */

static bool overlap(uint64_t a, uint64_t a_size, uint64_t b, uint64_t b_size)
{
    return a < b + b_size && b < a + a_size;
}

/* KVM's second address space, what a vCPU sees in SMM, is in the upper half of a slot's number. */
enum { ADDRESS_SPACE_SHIFT = 16 };

static int check_shape(const struct vmmig_slot *s, struct vm_error **err)
{
    if (!attach_slot_name_is_valid(s->name))
        return error_set(err, VM_ERROR_USAGE,
                         "a memory slot's name is 1 to %d letters, digits or . _ -",
                         ATTACH_SLOT_NAME_MAX);
    if (s->kvm_slot >> ADDRESS_SPACE_SHIFT)
        return error_set(err, VM_ERROR_USAGE,
                         "memory slot %s is of KVM's address space %u: guests with SMM cannot be migrated", s->name,
                         s->kvm_slot >> ADDRESS_SPACE_SHIFT);
    if (!s->size || s->size % DIRTYLOG_PAGE || s->size > ATTACH_SLOT_BYTES_MAX ||
        s->guest_address % DIRTYLOG_PAGE || s->guest_address > UINT64_MAX - s->size)
        return error_set(err, VM_ERROR_USAGE,
                         "memory slot %s: address and size must be multiples of %u, and not zero",
                         s->name, DIRTYLOG_PAGE);
    return 0;
}

static int check_overlap(const struct vmmig_slot *a, const struct vmmig_slot *b,
                         struct vm_error **err)
{
    struct stat sa, sb;
    if (!strcmp(a->name, b->name) || a->kvm_slot == b->kvm_slot)
        return error_set(err, VM_ERROR_USAGE, "memory slots %s and %s have one name or number",
                         a->name, b->name);
    if (overlap(a->guest_address, a->size, b->guest_address, b->size))
        return error_set(err, VM_ERROR_USAGE, "memory slots %s and %s overlap in the guest", a->name,
                         b->name);
    if (fstat(a->memfd, &sa) == 0 && fstat(b->memfd, &sb) == 0 && sa.st_dev == sb.st_dev &&
        sa.st_ino == sb.st_ino && overlap(a->memfd_offset, a->size, b->memfd_offset, b->size))
        return error_set(err, VM_ERROR_USAGE, "memory slots %s and %s overlap in their memfd",
                         a->name, b->name);
    return 0;
}

static int check_memfd(const struct vmmig_slot *s, uint64_t *ret_page_size, struct vm_error **err)
{
    struct stat st;
    struct statfs fs;
    if (fstat(s->memfd, &st) < 0 || fstatfs(s->memfd, &fs) < 0)
        return error_errno(err, errno, "memory slot %s: its memfd cannot be examined", s->name);
    uint64_t page = fs.f_type == HUGETLBFS_MAGIC ? (uint64_t)fs.f_bsize : DIRTYLOG_PAGE;
    if (s->memfd_offset % page || s->size % page)
        return error_set(err, VM_ERROR_USAGE,
                         "memory slot %s does not begin and end with a page of its memory (%llu bytes)",
                         s->name, (unsigned long long)page);
    if (s->memfd_offset > UINT64_MAX - s->size || (uint64_t)st.st_size < s->memfd_offset + s->size)
        return error_set(err, VM_ERROR_USAGE,
                         "memory slot %s needs %llu bytes of its memfd, which has %llu", s->name,
                         (unsigned long long)(s->memfd_offset + s->size),
                         (unsigned long long)st.st_size);
    int seals = fcntl(s->memfd, F_GET_SEALS);
    if (seals < 0 || (!(seals & F_SEAL_SHRINK) && fcntl(s->memfd, F_ADD_SEALS, F_SEAL_SHRINK) < 0))
        return error_set(err, VM_ERROR_USAGE,
                         "memory slot %s: its memory is no memfd that was made with MFD_ALLOW_SEALING",
                         s->name);
    *ret_page_size = page;
    return 0;
}

/* One line of /proc/self/maps: does it map the next bytes of the slot, shared? Then go on behind it. */
static bool match_mapping(const struct vmmig_slot *s, const struct stat *st, const char *line,
                          uint64_t *at)
{
    unsigned long long start, end, offset, inode;
    char flags[8];
    if (sscanf(line, "%llx-%llx %7s %llx %*x:%*x %llu", &start, &end, flags, &offset, &inode) != 5)
        return false;
    if (*at < start || *at >= end || flags[3] != 's' || inode != (unsigned long long)st->st_ino)
        return false;
    if (offset + (*at - start) != s->memfd_offset + (*at - (uintptr_t)s->host))
        return false;
    *at = end;
    return true;
}

/* A private mapping, or one of something else, would lose what the guest writes. */
static int check_mapping(const struct vmmig_slot *s, struct vm_error **err)
{
    struct stat st;
    char line[512];
    cleanup_fclose FILE *maps = fopen("/proc/self/maps", "re");
    if (!maps || fstat(s->memfd, &st) < 0)
        return error_errno(err, errno, "memory slot %s: its mapping cannot be examined", s->name);
    uint64_t at = (uintptr_t)s->host, end = at + s->size;
    while (at < end && fgets(line, sizeof(line), maps))
        match_mapping(s, &st, line, &at);
    if (at < end)
        return error_set(err, VM_ERROR_USAGE,
                         "memory slot %s: its memfd is not mapped, shared, at %p", s->name, s->host);
    return 0;
}

/* Has the library put a template's file there? */
static bool maps_file(const struct attach_memory *m, const struct vmmig_slot *s)
{
    for (unsigned i = 0; i < m->n_files; i++)
        if (m->files[i].host == s->host && m->files[i].size == s->size)
            return true;
    return false;
}

static int check_slots(const struct attach_memory *m, const struct vmmig_slot *slots, unsigned n,
                       uint64_t *ret_page_sizes, struct vm_error **err)
{
    if (!n || n > VMMIG_SLOTS_MAX)
        return error_set(err, VM_ERROR_USAGE, "%u memory slots; 1 to %d are possible", n,
                         VMMIG_SLOTS_MAX);
    for (unsigned i = 0; i < n; i++) {
        if (check_shape(&slots[i], err) < 0)
            return -1;
        for (unsigned j = 0; j < i; j++)
            if (check_overlap(&slots[j], &slots[i], err) < 0)
                return -1;
        if (check_memfd(&slots[i], &ret_page_sizes[i], err) < 0 ||
            (!maps_file(m, &slots[i]) && check_mapping(&slots[i], err) < 0))
            return -1;
    }
    return 0;
}

/* ---- The set of slots ---- */

static void drop_slots(struct attach_memory *m)
{
    for (unsigned i = 0; i < m->n_slots; i++)
        close_fd(&m->slots[i].slot.memfd);
    m->n_slots = 0;
    if (m->bitmap)
        munmap(m->bitmap, m->bitmap_size);
    m->bitmap = NULL;
    close_fd(&m->bitmap_fd);
}

static int make_bitmap(struct attach_memory *m, struct vm_error **err)
{
    m->bitmap_size = 0;
    for (unsigned i = 0; i < m->n_slots; i++) {
        m->slots[i].bitmap_offset = m->bitmap_size;
        m->bitmap_size += dirtylog_words(m->slots[i].slot.size) * sizeof(uint64_t);
    }
    m->bitmap_fd = memfd_create("vmmig-dirty", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (m->bitmap_fd < 0 || ftruncate(m->bitmap_fd, (off_t)m->bitmap_size) < 0 ||
        fcntl(m->bitmap_fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) < 0)
        return error_errno(err, errno, "cannot make the dirty bitmap");
    void *bitmap =
        mmap(NULL, m->bitmap_size, PROT_READ | PROT_WRITE, MAP_SHARED, m->bitmap_fd, 0);
    if (bitmap == MAP_FAILED)
        return error_errno(err, errno, "cannot map the dirty bitmap");
    m->bitmap = bitmap;
    return 0;
}

static int take_slots(struct attach_memory *m, const struct vmmig_slot *slots, unsigned n,
                      const uint64_t *page_sizes, struct vm_error **err)
{
    for (unsigned i = 0; i < n; i++) {
        struct attach_slot *s = &m->slots[i];
        s->slot = slots[i];
        s->page_size = page_sizes[i];
        s->marks = NULL;
        s->maps_file = maps_file(m, &slots[i]);
        s->slot.memfd = fcntl(slots[i].memfd, F_DUPFD_CLOEXEC, 0);
        if (s->slot.memfd < 0)
            return error_errno(err, errno, "cannot keep the memfd of memory slot %s", slots[i].name);
        m->n_slots = i + 1;
    }
    return make_bitmap(m, err);
}

static void untrack_locked(struct attach_memory *m)
{
    dirtylog_stop(m->log);
    pthread_rwlock_wrlock(&m->marks_lock);
    atomic_store(&m->tracking, false);
    for (unsigned i = 0; i < m->n_slots; i++)
        free(steal_ptr(&m->slots[i].marks));
    pthread_rwlock_unlock(&m->marks_lock);
}

int attach_memory_set(struct attach_memory *m, const struct vmmig_slot *slots, unsigned n,
                      struct vm_error **err)
{
    uint64_t page_sizes[VMMIG_SLOTS_MAX];
    SCOPE_LOCK(&m->memory_lock);
    untrack_locked(m);
    m->told++;
    int r = check_slots(m, slots, n, page_sizes, err);
    drop_slots(m);
    if (r < 0)
        return -1;
    if (take_slots(m, slots, n, page_sizes, err) == 0)
        return 0;
    drop_slots(m);
    return -1;
}

void attach_memory_init(struct attach_memory *m)
{
    pthread_mutex_init(&m->memory_lock, NULL);
    pthread_rwlock_init(&m->marks_lock, NULL);
    m->bitmap_fd = -1;
}

void attach_memory_finish(struct attach_memory *m)
{
    if (m->log)
        untrack_locked(m);
    drop_slots(m);
    dirtylog_destroy(m->log);
    pthread_rwlock_destroy(&m->marks_lock);
    pthread_mutex_destroy(&m->memory_lock);
}

/* ---- Tracking ---- */

static int make_marks(struct attach_memory *m, struct vm_error **err)
{
    for (unsigned i = 0; i < m->n_slots; i++) {
        struct attach_slot *s = &m->slots[i];
        s->marks = calloc(dirtylog_words(s->slot.size), sizeof(*s->marks));
        if (!s->marks)
            return error_nomem(err);
        atomic_store(&s->marked, false);
    }
    return 0;
}

static int start_log(struct attach_memory *m, struct vm_error **err)
{
    struct dirtylog_slot slots[VMMIG_SLOTS_MAX];
    for (unsigned i = 0; i < m->n_slots; i++) {
        const struct vmmig_slot *s = &m->slots[i].slot;
        slots[i] =
            (struct dirtylog_slot){s->kvm_slot, s->kvm_flags, s->guest_address, s->size, s->host};
    }
    return dirtylog_start(m->log, slots, m->n_slots, err);
}

int attach_memory_track(struct attach_memory *m, const char *record_path, uint64_t *ret_generation,
                        struct vm_error **err)
{
    SCOPE_LOCK(&m->memory_lock);
    if (!m->n_slots)
        return error_set(err, VM_ERROR_REFUSED, "the VMM has not told its memory slots");
    if (atomic_load(&m->tracking))
        return error_set(err, VM_ERROR_CONFLICT, "dirty pages are being tracked already");
    if (record_path && dirtylog_record(m->log, record_path, err) < 0)
        return -1;
    /* Devices' marks count from before the log starts: what is neither marked nor logged is not written. */
    pthread_rwlock_wrlock(&m->marks_lock);
    int made = make_marks(m, err);
    atomic_store(&m->tracking, made == 0);
    pthread_rwlock_unlock(&m->marks_lock);
    if (made < 0 || start_log(m, err) < 0) {
        untrack_locked(m);
        return -1;
    }
    m->first_harvest = true;
    *ret_generation = ++m->generation;
    return 0;
}

bool attach_memory_untrack(struct attach_memory *m, uint64_t generation)
{
    SCOPE_LOCK(&m->memory_lock);
    if (generation != m->generation)
        return false;
    untrack_locked(m);
    return true;
}

static uint64_t *bitmap_of(struct attach_memory *m, unsigned slot)
{
    return (uint64_t *)(void *)(m->bitmap + m->slots[slot].bitmap_offset);
}

static void set_all(uint64_t *bitmap, uint64_t pages)
{
    memset(bitmap, 0xff, pages / 64 * 8);
    if (pages % 64)
        bitmap[pages / 64] = (1ULL << (pages % 64)) - 1;
}

/* `marked` is taken back before the words are read: a mark made meanwhile is found now, or next time. */
static uint64_t merge_marks(struct attach_slot *s, uint64_t *bitmap)
{
    uint64_t found = 0;
    if (!atomic_exchange(&s->marked, false))
        return 0;
    for (size_t i = 0; i < dirtylog_words(s->slot.size); i++) {
        if (!atomic_load_explicit(&s->marks[i], memory_order_relaxed))
            continue;
        uint64_t bits = atomic_exchange(&s->marks[i], 0);
        found += (uint64_t)__builtin_popcountll(bits);
        bitmap[i] |= bits;
    }
    return found;
}

static int check_tracking(const struct attach_memory *m, uint64_t generation, struct vm_error **err)
{
    if (atomic_load(&m->tracking) && generation == m->generation)
        return 0;
    return error_set(err, VM_ERROR_CONFLICT,
                     "the VMM changed the guest's memory slots while they were copied");
}

int attach_memory_check(struct attach_memory *m, uint64_t generation, struct vm_error **err)
{
    SCOPE_LOCK(&m->memory_lock);
    return check_tracking(m, generation, err);
}

int attach_memory_harvest(struct attach_memory *m, uint64_t generation, uint64_t *ret_pages,
                          uint64_t *ret_ring_full, struct vm_error **err)
{
    struct dirtylog_stats before, after;
    uint64_t marked = 0;
    SCOPE_LOCK(&m->memory_lock);
    if (check_tracking(m, generation, err) < 0)
        return -1;
    dirtylog_get_stats(m->log, &before);
    if (dirtylog_begin_harvest(m->log, err) < 0)
        return -1;
    for (unsigned i = 0; i < m->n_slots; i++) {
        if (m->first_harvest && FAULT("attach.first.harvest") != FAULT_DROP)
            set_all(bitmap_of(m, i), m->slots[i].slot.size / DIRTYLOG_PAGE);
        if (dirtylog_harvest(m->log, i, bitmap_of(m, i), err) < 0)
            return -1;
        marked += merge_marks(&m->slots[i], bitmap_of(m, i));
    }
    m->first_harvest = false;
    dirtylog_get_stats(m->log, &after);
    *ret_pages = after.pages - before.pages + marked;
    *ret_ring_full = after.ring_full;
    return 0;
}

int attach_memory_clear(struct attach_memory *m, uint64_t generation, unsigned slot, uint64_t first, uint64_t n,
                        struct vm_error **err)
{
    SCOPE_LOCK(&m->memory_lock);
    if (check_tracking(m, generation, err) < 0)
        return -1;
    if (slot >= m->n_slots)
        return error_set(err, VM_ERROR_USAGE, "there is no memory slot %u", slot);
    uint64_t *bitmap = bitmap_of(m, slot);
    if (dirtylog_clear(m->log, slot, first, n, bitmap, err) < 0)
        return -1;
    memset(bitmap + first / 64, 0, (n + 63) / 64 * 8);
    return 0;
}

/* ---- Memory of a guest that is waited for ---- */

static int check_told(const struct attach_memory *m, uint64_t told, struct vm_error **err)
{
    if (!told || told == m->told)
        return 0;
    return error_set(err, VM_ERROR_CONFLICT, "the VMM changed its memory slots while it waited for the guest");
}

int attach_memory_check_told(struct attach_memory *m, uint64_t told, struct vm_error **err)
{
    SCOPE_LOCK(&m->memory_lock);
    return check_told(m, told, err);
}

/* ---- Memory that is shared with other guests ---- */

int attach_memory_map_file(struct attach_memory *m, uint64_t told, unsigned slot, int fd, struct vm_error **err)
{
    struct stat st;
    SCOPE_LOCK(&m->memory_lock);
    if (check_told(m, told, err) < 0)
        return -1;
    if (slot >= m->n_slots)
        return error_set(err, VM_ERROR_USAGE, "there is no memory slot %u", slot);
    struct attach_slot *s = &m->slots[slot];
    if (s->page_size != DIRTYLOG_PAGE)
        return error_set(err, VM_ERROR_REFUSED, "memory slot %s has huge pages: it cannot be a template's",
                         s->slot.name);
    if (fd < 0 || fstat(fd, &st) < 0 || !S_ISREG(st.st_mode) || (uint64_t)st.st_size != s->slot.size)
        return error_set(err, VM_ERROR_PROTOCOL, "the file for memory slot %s is none, or not as large as it",
                         s->slot.name);
    /* From here on it is not what its memfd says, whether that works or not. */
    if (!maps_file(m, &s->slot)) {
        if (m->n_files == VMMIG_SLOTS_MAX)
            return error_set(err, VM_ERROR_REFUSED, "too many files were mapped as memory already");
        m->files[m->n_files++] = (struct attach_file_mapping){s->slot.host, s->slot.size};
    }
    s->maps_file = true;
    if (mmap(s->slot.host, s->slot.size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, fd,
             0) == MAP_FAILED)
        return error_errno(err, errno, "cannot map a file as memory slot %s", s->slot.name);
    return 0;
}

/* ---- Memory that is to be there ---- */

int attach_memory_populate(struct attach_memory *m, uint64_t told, unsigned slot, uint64_t first, uint64_t n,
                           struct vm_error **err)
{
    SCOPE_LOCK(&m->memory_lock);
    if (check_told(m, told, err) < 0)
        return -1;
    if (slot >= m->n_slots)
        return error_set(err, VM_ERROR_USAGE, "there is no memory slot %u", slot);
    const struct vmmig_slot *s = &m->slots[slot].slot;
    if (m->slots[slot].maps_file)
        return error_set(err, VM_ERROR_REFUSED, "memory slot %s is a template's", s->name);
    uint64_t pages = s->size / DIRTYLOG_PAGE;
    if (first >= pages || n > pages - first)
        return error_set(err, VM_ERROR_USAGE, "memory slot %s ends before page %llu", s->name,
                         (unsigned long long)(first + n));
    if (fallocate(s->memfd, FALLOC_FL_KEEP_SIZE, (off_t)(s->memfd_offset + first * DIRTYLOG_PAGE),
                  (off_t)(n * DIRTYLOG_PAGE)) < 0)
        return error_errno(err, errno, "there is no memory for %s", s->name);
    return 0;
}

static void mark_range(struct attach_slot *s, uint64_t first, uint64_t last)
{
    for (uint64_t page = first; page <= last; page++)
        atomic_fetch_or_explicit(&s->marks[page / 64], 1ULL << (page % 64), memory_order_relaxed);
    atomic_store(&s->marked, true);
}

/*
 * The fence stands between the caller's write and the question whether anybody tracks: an agent that began
 * later reads memory after it said so.
 */
void attach_memory_mark(struct attach_memory *m, uint64_t guest_address, uint64_t size)
{
    atomic_thread_fence(memory_order_seq_cst);
    if (!atomic_load(&m->tracking) || !size)
        return;
    pthread_rwlock_rdlock(&m->marks_lock);
    for (unsigned i = 0; atomic_load(&m->tracking) && i < m->n_slots; i++) {
        const struct vmmig_slot *s = &m->slots[i].slot;
        uint64_t start = guest_address > s->guest_address ? guest_address : s->guest_address;
        uint64_t last = guest_address + (size - 1), slot_last = s->guest_address + (s->size - 1);
        if (last > slot_last)
            last = slot_last;
        if (start <= last && guest_address <= last)
            mark_range(&m->slots[i], (start - s->guest_address) / DIRTYLOG_PAGE,
                       (last - s->guest_address) / DIRTYLOG_PAGE);
    }
    pthread_rwlock_unlock(&m->marks_lock);
}

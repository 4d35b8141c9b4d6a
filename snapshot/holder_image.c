/* SPDX-License-Identifier: Apache-2.0 */
/* Images, their files, and the cache. */
#include "base/cleanup.h"
#include "base/clock.h"
#include "base/log.h"
#include "snapshot/holder.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <string.h>

/* ---- the tables ---- */

static bool is_template(const char *name)
{
    return !strncmp(name, "t:", 2) && strchr(name, '@');
}

static struct image_dir **bucket_of_name(struct holder *h, const char *name)
{
    uint32_t hash = 2166136261u;
    for (const char *c = name; *c; c++)
        hash = (hash ^ (uint8_t)*c) * 16777619u;
    return &h->of_name[hash % HOLDER_BUCKETS];
}

/* The numbers of an image and its files follow one another. */
static struct image_dir **bucket_of_ino(struct holder *h, uint64_t ino)
{
    return &h->of_ino[(ino - HOLDER_FIRST_INO) / (MOUNT_FILES_MAX + 1) % HOLDER_BUCKETS];
}

static void enter(struct holder *h, struct image_dir *d)
{
    struct image_dir **named = bucket_of_name(h, d->name), **numbered = bucket_of_ino(h, d->ino);
    d->next_of_name = *named;
    d->next_of_ino = *numbered;
    *named = *numbered = d;
    d->next = h->images;
    if (h->images)
        h->images->newer = d;
    else
        h->oldest = d;
    h->images = d;
    h->n_images++;
}

static void leave(struct holder *h, struct image_dir *d)
{
    struct image_dir **p;
    for (p = bucket_of_name(h, d->name); *p != d; p = &(*p)->next_of_name)
        ;
    *p = d->next_of_name;
    for (p = bucket_of_ino(h, d->ino); *p != d; p = &(*p)->next_of_ino)
        ;
    *p = d->next_of_ino;
    *(d->newer ? &d->newer->next : &h->images) = d->next;
    *(d->next ? &d->next->newer : &h->oldest) = d->newer;
    h->n_images--;
}

static void image_free(struct holder *h, struct image_dir *d)
{
    leave(h, d);
    for (unsigned i = 0; i < d->n_nodes; i++) {
        struct node *n = &d->nodes[i];
        for (uint64_t c = 0; n->chunks && c < n->n_chunks; c++)
            if (n->chunks[c] & CHUNK_COUNTED)
                h->cache_used -= MOUNT_CHUNK;
        close_fd(&n->fd);
        free(n->chunks);
    }
    if (h->hand_image == d)
        h->hand_image = NULL;
    free(d->touches);
    free(d);
}

struct image_dir *image_get(struct holder *h, const char *name, uint64_t number,
                            const struct mount_file *files, unsigned n_files)
{
    for (struct image_dir *d = *bucket_of_name(h, name); d; d = d->next_of_name)
        if (d->number == number && !strcmp(d->name, name))
            return d;
    struct image_dir *d = calloc(1, sizeof(*d) + n_files * sizeof(*d->nodes));
    if (!d)
        return NULL;
    strcpy(d->name, name);
    d->number = number;
    d->ino = h->next_ino;
    h->next_ino += MOUNT_FILES_MAX + 1;
    d->template = is_template(name);
    d->n_nodes = n_files;
    d->used_ns = clock_mono_ns();
    for (unsigned i = 0; i < n_files; i++) {
        struct node *n = &d->nodes[i];
        *n = (struct node){.image = d, .index = i, .ino = d->ino + 1 + i, .size = files[i].size,
                           .fd = -1};
        n->n_chunks = (n->size + MOUNT_CHUNK - 1) / MOUNT_CHUNK;
        snprintf(n->name, sizeof(n->name), "%.*s", MOUNT_FILE_NAME_MAX, files[i].name);
    }
    enter(h, d);
    if (h->n_images > h->trim_beyond)
        image_trim(h);
    return d;
}

struct image_dir *image_find_held(struct holder *h, const char *name)
{
    for (struct image_dir *d = *bucket_of_name(h, name); d; d = d->next_of_name)
        if (d->lease && d->open && !strcmp(d->name, name))
            return d;
    return NULL;
}

struct image_dir *image_of_ino(struct holder *h, uint64_t ino)
{
    struct image_dir *d = ino < HOLDER_FIRST_INO ? NULL : *bucket_of_ino(h, ino);
    while (d && (ino < d->ino || ino > d->ino + MOUNT_FILES_MAX))
        d = d->next_of_ino;
    return d;
}

struct node *node_of_ino(struct holder *h, uint64_t ino)
{
    struct image_dir *d = image_of_ino(h, ino);
    uint64_t index = d ? ino - d->ino : 0;
    return index && index <= d->n_nodes ? &d->nodes[index - 1] : NULL;
}

static bool is_idle(const struct image_dir *d)
{
    for (unsigned i = 0; i < d->n_nodes; i++)
        if (d->nodes[i].waiters)
            return false;
    return !d->lookups && !d->open && !d->openers && !d->lease && !d->leasing && !d->tasks;
}

static int by_time(const void *a, const void *b)
{
    const int64_t *x = a, *y = b;
    return (*x > *y) - (*x < *y);
}

/* Of the idle ones, but the newest image, the time of use up to which they have to go; INT64_MIN: none. */
static int64_t choose_limit(const struct holder *h)
{
    size_t n = 0, excess = h->n_images - HOLDER_IMAGES_MAX;
    cleanup_free int64_t *times = calloc(h->n_images, sizeof(*times));
    for (const struct image_dir *d = h->images->next; times && d; d = d->next)
        if (is_idle(d))
            times[n++] = d->used_ns;
    if (!n)
        return INT64_MIN;
    qsort(times, n, sizeof(*times), by_time);
    return times[(excess < n ? excess : n) - 1];
}

void image_trim(struct holder *h)
{
    if (h->n_images > HOLDER_IMAGES_MAX) {
        int64_t limit = choose_limit(h);
        for (struct image_dir *d = h->images->next, *next; d && h->n_images > HOLDER_IMAGES_MAX; d = next) {
            next = d->next;
            if (d->used_ns <= limit && is_idle(d))
                image_free(h, d);
        }
    }
    /* Those that the kernel keeps are not looked at for each one that comes. */
    h->trim_beyond = h->n_images + HOLDER_IMAGES_MAX / 2;
}

void images_destroy(struct holder *h)
{
    while (h->images)
        image_free(h, h->images);
}

/* ---- the cache ---- */

int node_prepare(struct holder *h, struct node *n, struct vm_error **err)
{
    if (n->chunks)
        return 0;
    char path[4096];
    snprintf(path, sizeof(path), "%s/vmmig-XXXXXX", h->options.cache);
    cleanup_close int fd = mkostemp(path, O_CLOEXEC);
    if (fd < 0)
        return error_errno(err, errno, "cannot make a file in the cache %s", h->options.cache);
    unlink(path);
    if (ftruncate(fd, (off_t)n->size) < 0)
        return error_errno(err, errno, "cannot make a file of %llu bytes in the cache %s",
                           (unsigned long long)n->size, h->options.cache);
    n->chunks = calloc(n->n_chunks + 1, 1);
    if (!n->chunks)
        return error_nomem(err);
    n->fd = steal_fd(&fd);
    return 0;
}

static void set_state(struct node *n, uint64_t chunk, enum chunk state)
{
    n->chunks[chunk] = (uint8_t)((n->chunks[chunk] & ~CHUNK_STATE) | state);
}

static bool punch(const struct node *n, uint64_t chunk)
{
    if (fallocate(n->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                  (off_t)(chunk * MOUNT_CHUNK), MOUNT_CHUNK) == 0)
        return true;
    log_error("the cache cannot give room back", "image=%s file=%s errno=%d", n->image->name,
              n->name, errno);
    return false;
}

/* False if its room is still taken; its content is not believed any more even so. */
static bool drop_chunk(struct holder *h, struct node *n, uint64_t chunk)
{
    bool punched = punch(n, chunk);
    set_state(n, chunk, CHUNK_ABSENT);
    if (n->image->prefetching)
        n->chunks[chunk] |= CHUNK_DROPPED;
    if (!punched)
        return false;
    n->chunks[chunk] &= (uint8_t)~CHUNK_COUNTED;
    h->cache_used -= MOUNT_CHUNK;
    h->state.evicted++;
    return true;
}

/* The next node, from the image that was first used to the last, round and round. */
static void turn_hand(struct holder *h)
{
    h->hand_chunk = 0;
    h->hand_node++;
    if (h->hand_image && h->hand_node < h->hand_image->n_nodes)
        return;
    h->hand_image = h->hand_image && h->hand_image->newer ? h->hand_image->newer : h->oldest;
    h->hand_node = 0;
}

/* A clock: what was read since the hand passed stays once more. */
static void evict(struct holder *h, uint64_t limit)
{
    unsigned turns = 0;
    while (h->cache_used > limit && turns < 3 * (h->n_images + 1) * MOUNT_FILES_MAX) {
        struct node *n = h->hand_image && h->hand_node < h->hand_image->n_nodes
                             ? &h->hand_image->nodes[h->hand_node]
                             : NULL;
        for (; n && n->chunks && h->hand_chunk < n->n_chunks && h->cache_used > limit;
             h->hand_chunk++) {
            uint8_t *c = &n->chunks[h->hand_chunk];
            if (!(*c & CHUNK_COUNTED) || (*c & CHUNK_PENDING))
                continue;
            if (*c & CHUNK_USED) {
                *c &= (uint8_t)~CHUNK_USED;
            } else if (!drop_chunk(h, n, h->hand_chunk)) {
                h->hand_chunk++;
                return;
            }
        }
        if (h->cache_used > limit) {
            turn_hand(h);
            turns++;
        }
    }
}

void images_limit(struct holder *h, uint64_t cache_size)
{
    h->options.cache_size = cache_size;
    if (h->cache_used > cache_size)
        evict(h, cache_size - cache_size / 16);
}

void images_make_room(struct holder *h)
{
    if (!h->state.cache_full)
        log_warn("the cache's file system is full", "cache=%s used=%llu limit=%llu",
                 h->options.cache, (unsigned long long)h->cache_used,
                 (unsigned long long)h->options.cache_size);
    h->state.cache_full = 1;
    uint64_t room = h->cache_used / 16 + HOLDER_FETCH_MAX;
    evict(h, h->cache_used > room ? h->cache_used - room : 0);
}

/* ---- reading ---- */

static bool is_there(const struct node *n, uint64_t chunk)
{
    unsigned state = n->chunks[chunk] & CHUNK_STATE;
    return state == CHUNK_DATA || state == CHUNK_ZERO;
}

static bool all_there(const struct node *n, uint64_t offset, size_t len)
{
    for (uint64_t c = offset / MOUNT_CHUNK; c * MOUNT_CHUNK < offset + len; c++)
        if (!is_there(n, c))
            return false;
    return true;
}

static void reply_read(struct holder *h, struct node *n, fuse_req_t req, uint64_t offset,
                       size_t len)
{
    for (uint64_t c = offset / MOUNT_CHUNK; c * MOUNT_CHUNK < offset + len; c++)
        n->chunks[c] |= CHUNK_USED;
    ssize_t got = pread(n->fd, h->read_buffer, len, (off_t)offset);
    if (got == (ssize_t)len) {
        fuse_reply_buf(req, (char *)h->read_buffer, len);
        return;
    }
    log_error("the cache cannot be read", "image=%s file=%s errno=%d", n->image->name, n->name,
              got < 0 ? errno : 0);
    h->state.failed_reads++;
    fuse_reply_err(req, EIO);
}

static void node_arrived(struct holder *h, struct node *n, uint64_t offset, uint64_t len,
                         uint32_t stored);
static void node_lost(struct holder *h, struct node *n, uint64_t offset, uint64_t len);

static void fetched(struct holder *h, struct task *t, const struct mount_packet *answer)
{
    struct node *n = t->node;
    for (uint64_t at = 0; at < t->message.len; at += MOUNT_CHUNK)
        n->chunks[(t->message.offset + at) / MOUNT_CHUNK] &= (uint8_t)~CHUNK_PENDING;
    if (answer->m.type == MOUNT_OK) {
        h->state.fetched_bytes += t->message.len;
        node_arrived(h, n, t->message.offset, t->message.len, answer->m.count);
    } else if (answer->m.kind == VM_ERROR_CANCELLED) { /* withdrawn */
        node_lost(h, n, t->message.offset, t->message.len);
    } else {
        log_error("data of an image cannot be had", "image=%s file=%s offset=%llu reason=%s",
                  n->image->name, n->name, (unsigned long long)t->message.offset,
                  log_q((const char *)answer->payload));
        node_lost(h, n, t->message.offset, t->message.len);
    }
}

static void fetch(struct holder *h, struct node *n, uint64_t first, uint64_t count)
{
    struct task *t = task_new(h, MOUNT_FETCH, n->image->name, fetched);
    if (!t)
        return;
    uint64_t offset = first * MOUNT_CHUNK, len = count * MOUNT_CHUNK;
    t->message.number = n->image->number;
    t->message.file = n->index;
    t->message.offset = offset;
    t->message.len = offset + len > n->size ? n->size - offset : len;
    t->fds[0] = n->fd;
    t->n_fds = 1;
    t->image = n->image;
    t->node = n;
    t->transient_retry = true;
    for (uint64_t c = first; c < first + count; c++) {
        set_state(n, c, CHUNK_FETCHING);
        n->chunks[c] |= CHUNK_PENDING;
    }
    h->state.fetches++;
    task_submit(h, t);
}

/* Ask for the absent chunks of a stretch, in requests of at most HOLDER_FETCH_MAX. */
static void fetch_absent(struct holder *h, struct node *n, uint64_t offset, uint64_t len)
{
    uint64_t c = offset / MOUNT_CHUNK, end = (offset + len + MOUNT_CHUNK - 1) / MOUNT_CHUNK;
    end = end < n->n_chunks ? end : n->n_chunks;
    while (c < end) {
        uint64_t first = c;
        while (c < end && (n->chunks[c] & CHUNK_STATE) == CHUNK_ABSENT &&
               (c - first) * MOUNT_CHUNK < HOLDER_FETCH_MAX)
            c++;
        if (c > first)
            fetch(h, n, first, c - first);
        else
            c++;
    }
}

static void touch(struct node *n, uint64_t offset, size_t len)
{
    struct image_dir *d = n->image;
    for (uint64_t c = offset / MOUNT_CHUNK; d->recording && c * MOUNT_CHUNK < offset + len; c++) {
        if ((n->chunks[c] & CHUNK_TOUCHED) || d->n_touches == HOLDER_TOUCHES_MAX)
            continue;
        n->chunks[c] |= CHUNK_TOUCHED;
        d->touches[d->n_touches++] = (struct mount_touch){n->index, (uint32_t)c};
    }
}

static bool may_time_out(const struct node *n)
{
    return strncmp(n->name, "memory", 6) && strcmp(n->name, "device.state");
}

static void wait_for_data(struct holder *h, struct node *n, fuse_req_t req, uint64_t offset,
                          size_t len)
{
    struct waiter *w = calloc(1, sizeof(*w));
    if (!w) {
        fuse_reply_err(req, ENOMEM);
        return;
    }
    w->req = req;
    w->offset = offset;
    w->len = len;
    w->deadline_ns =
        may_time_out(n)
            ? clock_mono_ns() + (int64_t)h->options.read_timeout_ms * NSEC_PER_MSEC
            : INT64_MAX;
    w->next = n->waiters;
    n->waiters = w;
    h->n_waiters++;
    h->state.waits++;
    fetch_absent(h, n, offset, len);
    tree_throttle(h);
}

void node_read(struct holder *h, struct node *n, fuse_req_t req, uint64_t offset, size_t len)
{
    h->state.reads++;
    if (offset >= n->size) {
        fuse_reply_buf(req, NULL, 0);
        return;
    }
    len = len > HOLDER_FETCH_MAX ? HOLDER_FETCH_MAX : len;
    len = len > n->size - offset ? (size_t)(n->size - offset) : len;
    touch(n, offset, len);
    bool in_sequence = n->next_offset == offset && offset;
    n->next_offset = offset + len;
    if (all_there(n, offset, len))
        reply_read(h, n, req, offset, len);
    else
        wait_for_data(h, n, req, offset, len);
    if (in_sequence)
        fetch_absent(h, n, offset + len, HOLDER_READ_AHEAD);
}

/* Answer the waiters for whom `is_due`; what they get is told by whether their data is there. */
static void settle_waiters(struct holder *h, struct node *n, uint64_t offset, uint64_t len,
                           bool lost, int64_t now_ns)
{
    for (struct waiter **p = &n->waiters; *p;) {
        struct waiter *w = *p;
        bool there = all_there(n, w->offset, w->len);
        bool failed = (lost && w->offset < offset + len && w->offset + w->len > offset) ||
                      w->deadline_ns <= now_ns;
        if (!there && !failed) {
            p = &w->next;
            continue;
        }
        *p = w->next;
        if (there) {
            reply_read(h, n, w->req, w->offset, w->len);
        } else {
            h->state.failed_reads++;
            fuse_reply_err(w->req, EIO);
        }
        free(w);
        h->n_waiters--;
    }
    tree_throttle(h);
}

/* A PREFETCH says that a chunk is there which was dropped since: what it may have written goes. */
static bool is_too_late(struct node *n, uint64_t chunk)
{
    if (!(n->chunks[chunk] & CHUNK_DROPPED))
        return false;
    if (!(n->chunks[chunk] & CHUNK_PENDING)) /* else another is writing there */
        punch(n, chunk);
    return true;
}

static void node_arrived(struct holder *h, struct node *n, uint64_t offset, uint64_t len,
                         uint32_t stored)
{
    for (uint64_t c = offset / MOUNT_CHUNK; c * MOUNT_CHUNK < offset + len; c++) {
        if (is_there(n, c))
            continue;
        bool data = stored >> (c - offset / MOUNT_CHUNK) & 1;
        set_state(n, c, data ? CHUNK_DATA : CHUNK_ZERO);
        n->chunks[c] |= CHUNK_USED;
        if (data && !(n->chunks[c] & CHUNK_COUNTED)) {
            n->chunks[c] |= CHUNK_COUNTED;
            h->cache_used += MOUNT_CHUNK;
        }
        if (data)
            h->state.cache_full = 0;
    }
    settle_waiters(h, n, offset, len, false, INT64_MIN);
    images_limit(h, h->options.cache_size);
}

void image_read_ahead(struct image_dir *d)
{
    d->prefetching = true;
    for (unsigned i = 0; i < d->n_nodes; i++)
        for (uint64_t c = 0; c < d->nodes[i].n_chunks; c++)
            d->nodes[i].chunks[c] &= (uint8_t)~CHUNK_DROPPED;
}

void node_read_ahead(struct holder *h, struct node *n, uint64_t offset, uint64_t len, uint32_t stored)
{
    uint64_t end = offset + len;
    if (offset % MOUNT_CHUNK || len > HOLDER_FETCH_MAX || offset > n->size || end > n->size ||
        (end % MOUNT_CHUNK && end != n->size))
        return;
    h->state.prefetched_bytes += len;
    for (uint64_t at = offset; at < end; at += MOUNT_CHUNK)
        if (!is_there(n, at / MOUNT_CHUNK) && !is_too_late(n, at / MOUNT_CHUNK))
            node_arrived(h, n, at, end - at < MOUNT_CHUNK ? end - at : MOUNT_CHUNK,
                         stored >> (at - offset) / MOUNT_CHUNK & 1);
}

void image_closed(struct holder *h, struct image_dir *d)
{
    for (unsigned i = 0; i < d->n_nodes; i++)
        if (d->nodes[i].waiters)
            return;
    tasks_withdraw(h, d);
}

static void node_lost(struct holder *h, struct node *n, uint64_t offset, uint64_t len)
{
    for (uint64_t c = offset / MOUNT_CHUNK; c * MOUNT_CHUNK < offset + len; c++)
        if ((n->chunks[c] & CHUNK_STATE) == CHUNK_FETCHING) {
            set_state(n, c, CHUNK_ABSENT);
            punch(n, c); /* a part may have been written */
        }
    settle_waiters(h, n, offset, len, true, INT64_MIN);
    /* Waiters that also wait for other chunks go on waiting; evicted chunks are asked for again. */
}

/* ---- time ---- */

static void recorded(struct holder *h, struct task *t, const struct mount_packet *answer)
{
    (void)h;
    if (answer->m.type == MOUNT_FAILED)
        log_warn("the working set of a template was not stored", "image=%s reason=%s",
                 t->message.name, log_q((const char *)answer->payload));
    else
        log_info("the working set of a template was stored", "image=%s chunks=%u",
                 t->message.name, t->message.count);
}

void image_record(struct holder *h, struct image_dir *d)
{
    if (!d->recording)
        return;
    d->recording = false;
    d->recorded = true;
    struct task *t = d->n_touches ? task_new(h, MOUNT_RECORD, d->name, recorded) : NULL;
    if (!t) {
        free(steal_ptr(&d->touches));
        return;
    }
    uint32_t most = MOUNT_PAYLOAD_MAX / sizeof(struct mount_touch);
    uint32_t n = d->n_touches < most ? d->n_touches : most;
    t->message.number = d->number;
    t->message.count = n;
    t->message.payload_len = n * (uint32_t)sizeof(struct mount_touch);
    t->payload = steal_ptr(&d->touches);
    task_submit(h, t);
}

void image_record_nothing(struct image_dir *d)
{
    if (!d->recording)
        return;
    d->recording = d->by_vmm = false;
    free(steal_ptr(&d->touches));
    for (unsigned i = 0; i < d->n_nodes; i++)
        for (uint64_t c = 0; d->nodes[i].chunks && c < d->nodes[i].n_chunks; c++)
            d->nodes[i].chunks[c] &= (uint8_t)~CHUNK_TOUCHED;
}

void nodes_expire(struct holder *h, int64_t now_ns)
{
    for (struct image_dir *d = h->images; d; d = d->next) {
        for (unsigned i = 0; i < d->n_nodes; i++) {
            struct node *n = &d->nodes[i];
            if (!n->waiters)
                continue;
            settle_waiters(h, n, 0, 0, false, now_ns);
            for (struct waiter *w = n->waiters; w; w = w->next)
                fetch_absent(h, n, w->offset, w->len);
        }
        if (!d->recording || now_ns < d->record_until_ns)
            continue;
        if (d->by_vmm)
            image_record(h, d);
        else
            image_record_nothing(d);
    }
}

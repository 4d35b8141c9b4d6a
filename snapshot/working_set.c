/* SPDX-License-Identifier: Apache-2.0 */
#include "snapshot/working_set.h"

#include "base/cleanup.h"

#include <string.h>

#define MAGIC "VMMIGWS1"
#define HOT_FILE "hot"
enum { HEADER = 16, ENTRY = 8, ODD = PAGE_BYTES / 2 };

int working_set_name(const char *image, char out[IMAGE_NAME_MAX + 1], struct vm_error **err)
{
    if (snprintf(out, IMAGE_NAME_MAX + 1, "%s+ws", image) <= IMAGE_NAME_MAX)
        return 0;
    return error_set(err, VM_ERROR_REFUSED, "the name of image %s is too long to have a working set",
                     image);
}

static uint64_t data_offset(uint32_t n)
{
    uint64_t bytes = HEADER + (uint64_t)n * ENTRY;
    return (bytes + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES + ODD;
}

static int check_entries(const struct image *image, const struct mount_touch *list, uint32_t n,
                         struct vm_error **err)
{
    if (!n || n > WORKING_SET_MAX)
        return error_set(err, VM_ERROR_CORRUPT, "a working set of %u chunks", n);
    for (uint32_t i = 0; i < n; i++)
        if (list[i].file >= image->n_files ||
            (uint64_t)list[i].chunk * MOUNT_CHUNK >= image->files[list[i].file].size)
            return error_set(err, VM_ERROR_CORRUPT, "the working set of %s names what is not there",
                             image->name);
    return 0;
}

/* ---- storing: the file's bytes, one after the other ---- */

struct maker {
    const struct image *image;
    const struct mount_touch *list;
    uint32_t n;
    working_set_read_fn *read;
    void *arg;
    uint8_t *head;
    uint64_t data, at, have; /* `have`: number of the chunk in `chunk`, plus 1 */
    uint8_t *chunk;
};

static int load_chunk(struct maker *m, uint64_t index, struct vm_error **err)
{
    const struct mount_touch *t = &m->list[index];
    uint64_t offset = (uint64_t)t->chunk * MOUNT_CHUNK;
    uint64_t left = m->image->files[t->file].size - offset;
    size_t len = left < MOUNT_CHUNK ? (size_t)left : MOUNT_CHUNK;
    if (m->have == index + 1)
        return 0;
    memset(m->chunk, 0, MOUNT_CHUNK);
    if (m->read(m->arg, t->file, offset, m->chunk, len, err) < 0)
        return -1;
    m->have = index + 1;
    return 0;
}

static int make_bytes(struct maker *m, uint8_t *out, size_t len, struct vm_error **err)
{
    while (len) {
        size_t n;
        const uint8_t *from;
        if (m->at < m->data) {
            n = (size_t)(m->data - m->at);
            from = m->head + m->at;
        } else {
            uint64_t index = (m->at - m->data) / MOUNT_CHUNK;
            size_t in = (size_t)((m->at - m->data) % MOUNT_CHUNK);
            if (load_chunk(m, index, err) < 0)
                return -1;
            n = MOUNT_CHUNK - in;
            from = m->chunk + in;
        }
        n = n < len ? n : len;
        memcpy(out, from, n);
        m->at += n;
        out += n;
        len -= n;
    }
    return 0;
}

static int put_segments(struct maker *m, struct image_session *s, uint64_t size,
                        struct vm_error **err)
{
    struct image_file *file = image_session_file(s, HOT_FILE, size, err);
    struct image_writer *w = image_session_writer(s);
    if (!file)
        return -1;
    for (uint64_t number = 0; number * SEGMENT_BYTES < size; number++) {
        uint64_t left = size - number * SEGMENT_BYTES;
        size_t len = left < SEGMENT_BYTES ? (size_t)left : SEGMENT_BYTES;
        struct segment *segment = image_writer_segment(w, file, number, err);
        if (!segment)
            return -1;
        memset(segment->data, 0, SEGMENT_BYTES);
        memset(segment->given, 0, sizeof(segment->given));
        struct vm_error *failed = NULL;
        if (make_bytes(m, segment->data, len, &failed) == 0)
            for (size_t i = 0; i * PAGE_BYTES < len; i++)
                segment->given[i] = true;
        image_writer_put(w, segment);
        if (failed)
            return error_propagate(err, failed);
    }
    return 0;
}

static void put_header(struct maker *m)
{
    memcpy(m->head, MAGIC, 8);
    put_le32(m->head + 8, m->n);
    for (uint32_t i = 0; i < m->n; i++) {
        put_le32(m->head + HEADER + (size_t)i * ENTRY, m->list[i].file);
        put_le32(m->head + HEADER + (size_t)i * ENTRY + 4, m->list[i].chunk);
    }
}

int working_set_store(struct repo *r, const struct image *image, const struct mount_touch *list,
                      uint32_t n, working_set_read_fn *read, void *arg, struct vm_error **err)
{
    char name[IMAGE_NAME_MAX + 1];
    struct import_report report;
    if (working_set_name(image->name, name, err) < 0 || check_entries(image, list, n, err) < 0)
        return -1;
    struct maker m = {.image = image, .list = list, .n = n, .read = read, .arg = arg,
                      .data = data_offset(n)};
    cleanup_free uint8_t *head = calloc(1, m.data), *chunk = malloc(MOUNT_CHUNK);
    if (!head || !chunk)
        return error_nomem(err);
    m.head = head;
    m.chunk = chunk;
    put_header(&m);
    CLEANUP(image_session) struct image_session *s = image_session_begin(r, name, NULL, err);
    if (!s || put_segments(&m, s, m.data + (uint64_t)n * MOUNT_CHUNK, err) < 0)
        return -1;
    if (image_session_commit(s, &report, err) < 0)
        return -1;
    /* Was it deleted meanwhile? Then nobody would ever delete this. */
    cleanup_free struct image *still = malloc(sizeof(*still));
    cleanup_error struct vm_error *gone = NULL;
    if (still && catalogue_find(repo_store(r), image->name, still, &gone) < 0 &&
        gone->kind == VM_ERROR_NOT_FOUND)
        return catalogue_delete(repo_store(r), name, err);
    return 0;
}

/* ---- reading ---- */

static int read_header(struct working_set *ws, const struct image *image, uint64_t size,
                       struct vm_error **err)
{
    uint8_t head[HEADER];
    if (size < HEADER || file_reader_read(ws->reader, 0, head, HEADER, err) < 0)
        return size < HEADER ? error_set(err, VM_ERROR_CORRUPT, "it is too short") : -1;
    ws->n = get_le32(head + 8);
    if (memcmp(head, MAGIC, 8) || !ws->n || ws->n > WORKING_SET_MAX)
        return error_set(err, VM_ERROR_CORRUPT, "it is no working set");
    ws->data = data_offset(ws->n);
    if (size != ws->data + (uint64_t)ws->n * MOUNT_CHUNK)
        return error_set(err, VM_ERROR_CORRUPT, "its size does not fit");
    cleanup_free uint8_t *raw = malloc((size_t)ws->n * ENTRY);
    ws->list = calloc(ws->n, sizeof(*ws->list));
    if (!raw || !ws->list)
        return error_nomem(err);
    if (file_reader_read(ws->reader, HEADER, raw, (size_t)ws->n * ENTRY, err) < 0)
        return -1;
    for (uint32_t i = 0; i < ws->n; i++)
        ws->list[i] = (struct mount_touch){get_le32(raw + (size_t)i * ENTRY),
                                           get_le32(raw + (size_t)i * ENTRY + 4)};
    return check_entries(image, ws->list, ws->n, err);
}

int working_set_open(struct repo *r, const struct image *image, struct working_set *ret_set,
                     struct vm_error **err)
{
    char name[IMAGE_NAME_MAX + 1];
    struct working_set ws = {0};
    cleanup_error struct vm_error *absent = NULL;
    cleanup_free struct image *hot = malloc(sizeof(*hot));
    if (!hot)
        return error_nomem(err);
    if (working_set_name(image->name, name, NULL) < 0)
        return 0;
    if (catalogue_find(repo_store(r), name, hot, &absent) < 0)
        return absent->kind == VM_ERROR_NOT_FOUND ? 0 : error_propagate(err, steal_ptr(&absent));
    const struct image_entry *file = image_find_file(hot, HOT_FILE);
    if (!file)
        return error_set(err, VM_ERROR_CORRUPT, "image %s has no file " HOT_FILE, name);
    ws.reader = file_reader_open(repo_store(r), hot, file, err);
    if (!ws.reader || read_header(&ws, image, file->size, err) < 0) {
        working_set_finish(&ws);
        return error_wrap(err, "image %s", name);
    }
    *ret_set = ws;
    return 1;
}

void working_set_finish(struct working_set *ws)
{
    file_reader_destroy(ws->reader);
    free(ws->list);
    *ws = (struct working_set){0};
}

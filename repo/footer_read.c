/* SPDX-License-Identifier: Apache-2.0 */
#include "repo/footer_cache.h"
#include "repo/names.h"

#include <stdlib.h>

/* A tail that holds the footer of nearly every pack; larger ones are read in a second step. */
enum { TAIL = 256 << 10, BATCH = 8 };

struct tail {
    uint64_t pack, pack_size;
    char name[OBJECT_NAME_SIZE];
    struct buffer data;
    bool missing, unreadable;
};

/* One step for all: sizes. */
static int read_sizes(struct store *s, struct tail *tails, size_t n, struct vm_error **err)
{
    struct store_op ops[BATCH];
    for (size_t i = 0; i < n; i++)
        ops[i] = (struct store_op){.kind = STORE_SIZE, .area = STORE_PACK, .name = tails[i].name};
    if (store_run(s, ops, n, err) < 0)
        return -1;
    for (size_t i = 0; i < n; i++) {
        tails[i].missing = ops[i].result != STORE_DONE;
        tails[i].unreadable = ops[i].result == STORE_UNREADABLE;
        tails[i].pack_size = ops[i].ret_size;
    }
    return 0;
}

/* One step for all: the last want[i] bytes, into data; 0 for none. */
static int read_ends(struct store *s, struct tail *tails, const size_t *want, size_t n,
                     struct vm_error **err)
{
    struct store_op ops[BATCH];
    struct tail *of[BATCH];
    size_t n_ops = 0;
    for (size_t i = 0; i < n; i++) {
        if (!want[i])
            continue;
        buffer_reset(&tails[i].data);
        void *out = buffer_grow(&tails[i].data, want[i]);
        if (!out)
            return error_nomem(err);
        of[n_ops] = &tails[i];
        ops[n_ops++] = (struct store_op){.kind = STORE_READ, .area = STORE_PACK,
                                         .name = tails[i].name, .out = out, .len = want[i],
                                         .offset = tails[i].pack_size - want[i]};
    }
    if (store_run(s, ops, n_ops, err) < 0)
        return -1;
    for (size_t i = 0; i < n_ops; i++) {
        of[i]->missing = ops[i].result != STORE_DONE;
        of[i]->unreadable = ops[i].result == STORE_UNREADABLE;
        of[i]->data.len = ops[i].ret_len;
    }
    return 0;
}

/* The footer's size by the trailer at the end of data; 0 with a problem if there is none. */
static size_t wanted_footer(const struct tail *t, struct vm_error **problem)
{
    size_t size = 0;
    if (t->data.len < PACK_TRAILER)
        error_set(problem, VM_ERROR_CORRUPT, "pack %016" PRIx64 ": it is too short", t->pack);
    else if (pack_trailer_parse(t->data.data + t->data.len - PACK_TRAILER, t->pack, t->pack_size,
                                &size, problem) < 0)
        size = 0;
    return size;
}

static int read_batch(struct store *s, struct tail *tails, size_t n, struct footer *footers,
                      struct vm_error **problems, struct vm_error **err)
{
    size_t want[BATCH] = {0}, again[BATCH] = {0};
    if (read_sizes(s, tails, n, err) < 0)
        return -1;
    for (size_t i = 0; i < n; i++)
        if (!tails[i].missing)
            want[i] = tails[i].pack_size < TAIL ? tails[i].pack_size : TAIL;
    if (read_ends(s, tails, want, n, err) < 0)
        return -1;
    for (size_t i = 0; i < n; i++) {
        if (tails[i].missing)
            continue;
        want[i] = wanted_footer(&tails[i], &problems[i]);
        again[i] = want[i] > tails[i].data.len ? want[i] : 0;
    }
    if (read_ends(s, tails, again, n, err) < 0)
        return -1;
    for (size_t i = 0; i < n; i++) {
        if (tails[i].unreadable && !problems[i])
            error_set(&problems[i], VM_ERROR_CORRUPT, "pack %016" PRIx64 ": the disk cannot read it",
                      tails[i].pack);
        if (tails[i].missing || !want[i])
            continue;
        struct cursor c = cursor_init(tails[i].data.data, tails[i].data.len);
        const uint8_t *footer =
            want[i] <= tails[i].data.len ? cursor_take(&c, tails[i].data.len - want[i]) : NULL;
        if (!footer)
            error_set(&problems[i], VM_ERROR_CORRUPT, "pack %016" PRIx64 ": it is too short",
                      tails[i].pack);
        else if (footer_parse(c.p, want[i], tails[i].pack, tails[i].pack_size, &footers[i],
                              &problems[i]) < 0)
            footers[i] = (struct footer){.pack = tails[i].pack};
    }
    return 0;
}

int footer_read_many(struct store *s, const uint64_t *packs, size_t n, struct footer *footers,
                     struct vm_error **problems, struct vm_error **err)
{
    memset(footers, 0, n * sizeof(*footers));
    memset(problems, 0, n * sizeof(struct vm_error *));
    int result = 0;
    for (size_t i = 0; i < n && !result; i += BATCH) {
        struct tail tails[BATCH];
        size_t m = n - i < BATCH ? n - i : BATCH;
        memset(tails, 0, sizeof(tails));
        for (size_t j = 0; j < m; j++) {
            tails[j].pack = packs[i + j];
            object_name(PACK_PREFIX, packs[i + j], tails[j].name);
        }
        result = read_batch(s, tails, m, footers + i, problems + i, err);
        for (size_t j = 0; j < m; j++)
            buffer_finish(&tails[j].data);
    }
    for (size_t i = 0; i < n && result; i++) {
        footer_finish(&footers[i]);
        error_clear(&problems[i]);
    }
    return result;
}

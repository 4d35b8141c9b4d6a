/* SPDX-License-Identifier: Apache-2.0 */
/* Reading through the qemu-nbd that repo/source_prepare.c started. */
#include "repo/source_driver.h"

#include "base/clock.h"
#include "base/fault.h"

#include <fcntl.h>
#include <libnbd.h>
#include <string.h>

enum { READ_MAX = 1 << 20, ANSWER_MS = 60 * 1000 };

static const nbd_completion_callback no_completion;

struct source_nbd {
    struct source source;
    struct nbd_handle *nbd;
    char *path;
    bool has_extents;
    /* The extent that the server described last. */
    uint64_t start, end;
    bool zero;
};

static int fail(struct source_nbd *n, const char *what, struct vm_error **err)
{
    return error_set(err, VM_ERROR_FAILED, "%s %s: %s", what, n->path, nbd_get_error());
}

static void nbd_source_close(struct source *s)
{
    struct source_nbd *n = (struct source_nbd *)s;
    nbd_close(n->nbd); /* its qemu-nbd ends with the connection */
    free(n->path);
    free(n);
}

/* The server may be anybody's: it answers, or is given up. 1 once `done` says so. */
static int wait_for(struct source_nbd *n, int (*done)(struct source_nbd *n, int64_t arg),
                    int64_t arg, const char *what, struct vm_error **err)
{
    int64_t deadline = clock_mono_ns() + fault_patience_ns(ANSWER_MS);
    for (;;) {
        int r = done(n, arg);
        if (r)
            return r < 0 ? fail(n, what, err) : 0;
        int64_t left = deadline - clock_mono_ns();
        if (left <= 0)
            return error_set(err, VM_ERROR_TIMEOUT, "%s %s: qemu-nbd does not answer", what, n->path);
        if (nbd_poll(n->nbd, (int)(left / NSEC_PER_MSEC) + 1) < 0)
            return fail(n, what, err);
    }
}

static int is_answered(struct source_nbd *n, int64_t cookie)
{
    return nbd_aio_command_completed(n->nbd, (uint64_t)cookie);
}

/* `cookie` is that of a command that was just given. */
static int wait_for_answer(struct source_nbd *n, int64_t cookie, const char *what,
                           struct vm_error **err)
{
    return cookie < 0 ? fail(n, what, err) : wait_for(n, is_answered, cookie, what, err);
}

static int take_extents(void *arg, const char *context, uint64_t offset, uint32_t *entries,
                        size_t n_entries, int *error)
{
    struct source_nbd *n = arg;
    (void)error;
    if (strcmp(context, LIBNBD_CONTEXT_BASE_ALLOCATION) != 0)
        return 0;
    n->start = n->end = offset;
    for (size_t i = 0; i + 1 < n_entries; i += 2) {
        bool zero = entries[i + 1] & LIBNBD_STATE_ZERO;
        if (i && zero != n->zero)
            break;
        n->zero = zero;
        n->end += entries[i];
    }
    return 0;
}

static int nbd_source_extent(struct source *s, uint64_t offset, uint64_t *ret_len, bool *ret_zero,
                             struct vm_error **err)
{
    struct source_nbd *n = (struct source_nbd *)s;
    if (!n->has_extents) {
        *ret_len = s->size - offset;
        *ret_zero = false;
        return 0;
    }
    if (offset < n->start || offset >= n->end) {
        uint64_t ask = s->size - offset < (1u << 30) ? s->size - offset : 1u << 30;
        nbd_extent_callback callback = {.callback = take_extents, .user_data = n};
        n->start = n->end = 0;
        int64_t cookie = nbd_aio_block_status(n->nbd, ask, offset, callback, no_completion, 0);
        if (wait_for_answer(n, cookie, "cannot ask for the extents of", err) < 0)
            return -1;
        if (offset < n->start || offset >= n->end)
            return error_set(err, VM_ERROR_FAILED, "qemu-nbd does not describe %s at %llu", n->path,
                             (unsigned long long)offset);
        if (n->end > s->size)
            n->end = s->size;
    }
    *ret_len = n->end - offset;
    *ret_zero = n->zero;
    return 0;
}

static int nbd_source_read(struct source *s, uint64_t offset, void *out, size_t len,
                           struct vm_error **err)
{
    struct source_nbd *n = (struct source_nbd *)s;
    for (size_t done = 0; done < len;) {
        size_t step = len - done < READ_MAX ? len - done : READ_MAX;
        int64_t cookie = nbd_aio_pread(n->nbd, (char *)out + done, step, offset + done,
                                       no_completion, 0);
        if (wait_for_answer(n, cookie, "cannot read", err) < 0)
            return -1;
        done += step;
    }
    return 0;
}

static const struct source_driver nbd_driver = {nbd_source_close, nbd_source_extent,
                                                nbd_source_read};

static int is_connected(struct source_nbd *n, int64_t arg)
{
    return nbd_aio_is_dead(n->nbd) || nbd_aio_is_closed(n->nbd) ? -1 : nbd_aio_is_ready(n->nbd);
}

static int connect_server(struct source_nbd *n, int fd, struct vm_error **err)
{
    n->nbd = nbd_create();
    int own = n->nbd ? fcntl(fd, F_DUPFD_CLOEXEC, 3) : -1;
    if (own < 0 || nbd_add_meta_context(n->nbd, LIBNBD_CONTEXT_BASE_ALLOCATION) < 0 ||
        nbd_aio_connect_socket(n->nbd, own) < 0)
        return fail(n, "qemu-nbd does not serve", err);
    if (wait_for(n, is_connected, 0, "qemu-nbd does not serve", err) < 0)
        return -1;
    int64_t size = nbd_get_size(n->nbd);
    if (size < 0)
        return fail(n, "cannot tell the size of", err);
    n->source.size = (uint64_t)size;
    n->has_extents = nbd_can_meta_context(n->nbd, LIBNBD_CONTEXT_BASE_ALLOCATION) > 0;
    return 0;
}

struct source *source_nbd_open(int fd, const char *name, struct vm_error **err)
{
    struct source_nbd *n = calloc(1, sizeof(*n));
    if (!n || !(n->path = strdup(name))) {
        free(n);
        error_nomem(err);
        return NULL;
    }
    n->source.driver = &nbd_driver;
    if (connect_server(n, fd, err) < 0) {
        nbd_source_close(&n->source);
        return NULL;
    }
    return &n->source;
}

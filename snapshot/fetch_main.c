/* SPDX-License-Identifier: Apache-2.0 */
/* vmmig-fetch: see snapshot/fetcher.h. */
#include "base/cleanup.h"
#include "base/fault.h"
#include "base/heap.h"
#include "base/log.h"
#include "base/options.h"
#include "base/queue.h"
#include "snapshot/fetcher.h"
#include "snapshot/working_set.h"

#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <string.h>

enum { PIECE = 1 << 20, QUEUE_MAX = 512, LEASES_MAX = 4096 };

struct fetcher {
    const char *repository, *owner, *life;
    uint64_t socket;
    bool help;
    char holder[IMAGE_NAME_MAX + 1]; /* whose leases are ours */
    struct repo *repo;
    struct fetch_images *images;
    struct queue *demand, *ahead;
    pthread_rwlock_t leasing; /* shared: a lease is being taken; else: they are being listed */
    pthread_mutex_t lock;     /* what follows */
    uint64_t taken[LEASES_MAX]; /* numbers of leases that this process took */
    unsigned n_taken;
};

struct request {
    struct mount_packet packet;
    int fds[MOUNT_FILES_MAX];
    int n_fds;
};

static void request_free(void *item)
{
    struct request *q = item;
    for (int i = 0; i < q->n_fds; i++)
        close(q->fds[i]);
    free(q);
}

/* ---- answers ---- */

static void answer(struct fetcher *f, struct mount_message *m, const void *payload, size_t len)
{
    m->payload_len = (uint32_t)len;
    if (mount_send((int)f->socket, m, payload, NULL, 0, NULL) < 0)
        _exit(1); /* the holder is gone, or has other fetchers now */
}

static void answer_error(struct fetcher *f, const struct request *q, const struct vm_error *e)
{
    struct mount_message m = mount_message(MOUNT_FAILED, q->packet.m.id, NULL);
    size_t n = strlen(error_message(e));
    m.kind = (int32_t)e->kind;
    answer(f, &m, error_message(e), n < MOUNT_PAYLOAD_MAX ? n : MOUNT_PAYLOAD_MAX);
}

static void answer_ok(struct fetcher *f, const struct request *q, uint64_t number, uint32_t count)
{
    struct mount_message m = mount_message(MOUNT_OK, q->packet.m.id, NULL);
    m.number = number;
    m.count = count;
    answer(f, &m, NULL, 0);
}

/* ---- names ---- */

static int do_find(struct fetcher *f, struct request *q, struct vm_error **err)
{
    cleanup_free struct image *image = malloc(sizeof(*image));
    struct mount_file files[MOUNT_FILES_MAX] = {0};
    if (!image)
        return error_nomem(err);
    if (catalogue_find(repo_store(f->repo), q->packet.m.name, image, err) < 0)
        return -1;
    fetch_image_note(f->images, image);
    for (unsigned i = 0; i < image->n_files; i++) {
        snprintf(files[i].name, sizeof(files[i].name), "%s", image->files[i].name);
        files[i].size = image->files[i].size;
    }
    struct mount_message m = mount_message(MOUNT_FOUND, q->packet.m.id, NULL);
    m.number = image->writer;
    m.count = image->n_files;
    answer(f, &m, files, image->n_files * sizeof(*files));
    return 0;
}

struct listing {
    struct fetcher *f;
    uint32_t id;
    size_t len;
    char names[MOUNT_PAYLOAD_MAX];
};

static void send_names(struct listing *l, bool last)
{
    struct mount_message m = mount_message(MOUNT_NAMES, l->id, NULL);
    m.flags = last ? MOUNT_LAST : 0;
    answer(l->f, &m, l->names, l->len);
    l->len = 0;
}

static int list_one(const struct image *image, void *arg, struct vm_error **err)
{
    struct listing *l = arg;
    size_t n = strlen(image->name) + 1;
    (void)err;
    if (l->len + n > sizeof(l->names))
        send_names(l, false);
    memcpy(l->names + l->len, image->name, n);
    l->len += n;
    return 0;
}

static int do_list(struct fetcher *f, struct request *q, struct vm_error **err)
{
    cleanup_free struct listing *l = calloc(1, sizeof(*l));
    if (!l)
        return error_nomem(err);
    l->f = f;
    l->id = q->packet.m.id;
    if (catalogue_list(repo_store(f->repo), list_one, catalogue_skip, l, err) < 0)
        return -1;
    send_names(l, true);
    return 0;
}

/* ---- leases ---- */

static int take_lease(struct fetcher *f, const char *name, struct lease *ret_lease,
                      struct vm_error **err)
{
    pthread_rwlock_rdlock(&f->leasing);
    int r = catalogue_lease(repo_store(f->repo), name, f->holder, ret_lease, err);
    if (r == 0) {
        SCOPE_LOCK(&f->lock);
        f->taken[f->n_taken++ % LEASES_MAX] = ret_lease->number;
    }
    pthread_rwlock_unlock(&f->leasing);
    return r;
}

static int do_lease(struct fetcher *f, struct request *q, struct vm_error **err)
{
    const struct mount_message *m = &q->packet.m;
    cleanup_free struct lease *lease = malloc(sizeof(*lease));
    if (!lease)
        return error_nomem(err);
    if (take_lease(f, m->name, lease, err) < 0)
        return -1;
    if (lease->image.writer != m->number) {
        catalogue_lease_drop(repo_store(f->repo), lease, NULL);
        return error_set(err, VM_ERROR_NOT_FOUND, "image %s was replaced by another one", m->name);
    }
    fetch_image_note(f->images, &lease->image);
    (void)FAULT("mount.leased");
    struct mount_message ok = mount_message(MOUNT_OK, m->id, m->name);
    ok.number = lease->number;
    answer(f, &ok, NULL, 0);
    return 0;
}

static int do_drop(struct fetcher *f, struct request *q, struct vm_error **err)
{
    cleanup_free struct lease *lease = calloc(1, sizeof(*lease));
    if (!lease)
        return error_nomem(err);
    lease->number = q->packet.m.number;
    snprintf(lease->image.name, sizeof(lease->image.name), "%.*s", MOUNT_NAME_MAX, q->packet.m.name);
    if (catalogue_lease_drop(repo_store(f->repo), lease, err) < 0)
        return -1;
    answer_ok(f, q, 0, 0);
    return 0;
}

struct sweep {
    struct fetcher *f;
    const uint64_t *keep;
    uint32_t n_keep;
    struct lease *found; /* of another life of this mount */
    unsigned n_found;
};

static bool is_kept(struct sweep *s, uint64_t number)
{
    for (uint32_t i = 0; i < s->n_keep; i++)
        if (s->keep[i] == number)
            return true;
    SCOPE_LOCK(&s->f->lock);
    unsigned n = s->f->n_taken < LEASES_MAX ? s->f->n_taken : LEASES_MAX;
    for (unsigned i = 0; i < n; i++)
        if (s->f->taken[i] == number)
            return true;
    return false;
}

/* Was it of an earlier holder of this mount? One that knew no lives can only have been its predecessor. */
static bool is_left_over(const struct fetcher *f, const char *holder)
{
    size_t n = strlen(f->owner);
    if (!f->life || strncmp(holder, f->owner, n))
        return false;
    return !holder[n] || (holder[n] == ' ' && mount_life_is_over(holder + n + 1));
}

static int sweep_one(const struct lease *lease, void *arg, struct vm_error **err)
{
    struct sweep *s = arg;
    (void)err;
    if (strcmp(lease->holder, s->f->holder) ? !is_left_over(s->f, lease->holder)
                                            : is_kept(s, lease->number))
        return 0;
    struct lease *more = realloc(s->found, (s->n_found + 1) * sizeof(*more));
    if (!more)
        return error_nomem(err);
    s->found = more;
    more[s->n_found++] = *lease;
    return 0;
}

static int do_keep(struct fetcher *f, struct request *q, struct vm_error **err)
{
    struct sweep s = {.f = f, .keep = (const uint64_t *)q->packet.payload,
                      .n_keep = q->packet.m.payload_len / (uint32_t)sizeof(uint64_t)};
    (void)FAULT("mount.keeping");
    pthread_rwlock_wrlock(&f->leasing);
    int r = catalogue_leases(repo_store(f->repo), sweep_one, catalogue_skip, &s, err);
    pthread_rwlock_unlock(&f->leasing);
    for (unsigned i = 0; r == 0 && i < s.n_found; i++)
        r = catalogue_lease_drop(repo_store(f->repo), &s.found[i], err);
    free(s.found);
    if (r == 0)
        answer_ok(f, q, 0, s.n_found);
    return r;
}

/* ---- data ---- */

static bool is_zero(const uint8_t *data, size_t n)
{
    return n == 0 || (data[0] == 0 && !memcmp(data, data + 1, n - 1));
}

/* Write what is not zero to its place; a bit per chunk that was. */
static int write_chunks(int fd, const uint8_t *data, uint64_t offset, size_t len,
                        uint32_t *ret_stored, struct vm_error **err)
{
    uint32_t stored = 0;
    for (size_t at = 0; at < len; at += MOUNT_CHUNK) {
        size_t n = len - at < MOUNT_CHUNK ? len - at : MOUNT_CHUNK;
        if (is_zero(data + at, n))
            continue;
        ssize_t put = pwrite(fd, data + at, n, (off_t)(offset + at));
        if (put != (ssize_t)n)
            return error_errno(err, put < 0 ? errno : ENOSPC, "cannot write to the cache");
        stored |= 1u << (at / MOUNT_CHUNK);
    }
    *ret_stored = stored;
    return 0;
}

static int do_fetch(struct fetcher *f, struct request *q, struct vm_error **err)
{
    const struct mount_message *m = &q->packet.m;
    uint32_t stored;
    if (q->n_fds != 1 || m->len > PIECE || m->offset % MOUNT_CHUNK)
        return error_set(err, VM_ERROR_PROTOCOL, "a malformed FETCH");
    cleanup_free uint8_t *data = malloc(m->len + 1);
    if (!data)
        return error_nomem(err);
    if (FAULT("mount.fetch") == FAULT_ERROR)
        return error_errno(err, fault_errno(), "the repository cannot be read");
    if (fetch_read(f->images, m->name, m->number, m->file, m->offset, data, m->len, err) < 0 ||
        write_chunks(q->fds[0], data, m->offset, m->len, &stored, err) < 0)
        return -1;
    (void)FAULT("mount.fetched");
    answer_ok(f, q, 0, stored);
    return 0;
}

/* ---- the working set ---- */

struct ahead { /* one PREFETCH, shared by the pieces it is cut into */
    struct fetcher *f;
    struct request *q; /* owned, with its descriptors */
    struct image *image;
    struct working_set ws;
    atomic_uint next, left, failed;
};

static void have(struct ahead *a, const struct mount_touch *t, uint64_t len, uint32_t stored)
{
    struct mount_message m = mount_message(MOUNT_HAVE, a->q->packet.m.id, NULL);
    m.file = t->file;
    m.offset = (uint64_t)t->chunk * MOUNT_CHUNK;
    m.len = len;
    m.count = stored;
    answer(a->f, &m, NULL, 0);
}

static int read_piece(struct ahead *a, uint32_t first, uint8_t *data, struct vm_error **err)
{
    uint32_t n = a->ws.n - first;
    n = n < PIECE / MOUNT_CHUNK ? n : PIECE / MOUNT_CHUNK;
    (void)FAULT("mount.ahead");
    if (file_reader_read(a->ws.reader, a->ws.data + (uint64_t)first * MOUNT_CHUNK, data,
                         (size_t)n * MOUNT_CHUNK, err) < 0)
        return -1;
    for (uint32_t i = 0; i < n; i++) {
        const struct mount_touch *t = &a->ws.list[first + i];
        uint64_t offset = (uint64_t)t->chunk * MOUNT_CHUNK;
        uint64_t left = a->image->files[t->file].size - offset;
        size_t len = left < MOUNT_CHUNK ? (size_t)left : MOUNT_CHUNK;
        const uint8_t *chunk = data + (size_t)i * MOUNT_CHUNK;
        uint32_t stored;
        if (fetch_check(a->f->images, a->image, t->file, offset, chunk, MOUNT_CHUNK, err) < 0)
            return error_wrap(err, "the working set of %s", a->image->name);
        if (write_chunks(a->q->fds[t->file], chunk, offset, len, &stored, err) < 0)
            return -1;
        have(a, t, len, stored);
    }
    return 0;
}

static void end_ahead(struct ahead *a)
{
    answer_ok(a->f, a->q, 0, a->failed ? 0 : a->ws.n);
    working_set_finish(&a->ws);
    free(a->image);
    request_free(a->q);
    free(a);
}

/* Take pieces until there are none; several threads do. */
static void work_ahead(struct ahead *a)
{
    cleanup_free uint8_t *data = malloc(PIECE);
    for (;;) {
        uint32_t first = atomic_fetch_add(&a->next, PIECE / MOUNT_CHUNK);
        cleanup_error struct vm_error *err = NULL;
        if (!data || first >= a->ws.n)
            break;
        if (read_piece(a, first, data, &err) < 0) {
            log_warn("reading ahead failed; it is read when it is needed", "reason=%s",
                     log_q(error_message(err)));
            a->failed = 1;
            atomic_store(&a->next, a->ws.n);
        }
    }
    if (atomic_fetch_sub(&a->left, 1) == 1)
        end_ahead(a);
}

/* 1: the request was taken over. */
static int do_prefetch(struct fetcher *f, struct request *q, struct vm_error **err)
{
    const struct mount_message *m = &q->packet.m;
    struct ahead *a = calloc(1, sizeof(*a));
    struct image *image = malloc(sizeof(*image));
    int r = a && image ? fetch_image(f->images, m->name, m->number, image, err) : error_nomem(err);
    if (r == 0)
        r = working_set_open(f->repo, image, &a->ws, err);
    if (r == 1 && (unsigned)q->n_fds != image->n_files)
        r = error_set(err, VM_ERROR_PROTOCOL, "PREFETCH without the files");
    if (r <= 0) {
        if (r == 0)
            answer_ok(f, q, 0, 0);
        if (a)
            working_set_finish(&a->ws);
        free(a);
        free(image);
        return r;
    }
    a->f = f;
    a->q = q;
    a->image = image;
    a->left = FETCHER_AHEAD;
    for (int i = 0; i < FETCHER_AHEAD; i++)
        if (!queue_put(f->ahead, a))
            _exit(1);
    return 1;
}

struct recording {
    struct fetcher *f;
    const struct mount_message *m;
};

static int read_recorded(void *arg, unsigned file, uint64_t offset, void *out, size_t len,
                         struct vm_error **err)
{
    struct recording *r = arg;
    return fetch_read(r->f->images, r->m->name, r->m->number, file, offset, out, len, err);
}

static int do_record(struct fetcher *f, struct request *q, struct vm_error **err)
{
    const struct mount_message *m = &q->packet.m;
    struct recording r = {f, m};
    cleanup_free struct image *image = malloc(sizeof(*image));
    if (!image)
        return error_nomem(err);
    if ((uint64_t)m->count * sizeof(struct mount_touch) != m->payload_len)
        return error_set(err, VM_ERROR_PROTOCOL, "a malformed RECORD");
    if (fetch_image(f->images, m->name, m->number, image, err) < 0 ||
        working_set_store(f->repo, image, (const struct mount_touch *)q->packet.payload, m->count,
                          read_recorded, &r, err) < 0)
        return -1;
    answer_ok(f, q, 0, 0);
    return 0;
}

/* ---- threads ---- */

static int handle(struct fetcher *f, struct request *q, struct vm_error **err)
{
    switch (q->packet.m.type) {
    case MOUNT_FIND:
        return do_find(f, q, err);
    case MOUNT_LIST:
        return do_list(f, q, err);
    case MOUNT_LEASE:
        return do_lease(f, q, err);
    case MOUNT_DROP:
        return do_drop(f, q, err);
    case MOUNT_KEEP:
        return do_keep(f, q, err);
    case MOUNT_FETCH:
        return do_fetch(f, q, err);
    case MOUNT_PREFETCH:
        return do_prefetch(f, q, err);
    case MOUNT_RECORD:
        return do_record(f, q, err);
    default:
        return error_set(err, VM_ERROR_VERSION, "unknown request %u", q->packet.m.type);
    }
}

static void *demand_thread(void *arg)
{
    struct fetcher *f = arg;
    struct request *q;
    while ((q = queue_get(f->demand))) {
        cleanup_error struct vm_error *err = NULL;
        int r = handle(f, q, &err);
        if (r < 0)
            answer_error(f, q, err);
        if (r <= 0)
            request_free(q);
    }
    return NULL;
}

static void *ahead_thread(void *arg)
{
    struct fetcher *f = arg;
    struct ahead *a;
    while ((a = queue_get(f->ahead)))
        work_ahead(a);
    return NULL;
}

/* Until the holder closes. */
static int receive(struct fetcher *f, struct vm_error **err)
{
    struct mount_message hello = mount_message(MOUNT_HELLO, 0, NULL);
    answer(f, &hello, NULL, 0);
    for (;;) {
        struct request *q = malloc(sizeof(*q));
        if (!q)
            return error_nomem(err);
        q->n_fds = 0;
        int r = mount_receive((int)f->socket, &q->packet, q->fds, MOUNT_FILES_MAX, &q->n_fds, err);
        if (r <= 0 || !queue_put(f->demand, q)) {
            request_free(q);
            return r < 0 ? -1 : 0;
        }
    }
}

static int serve(struct fetcher *f, struct vm_error **err)
{
    pthread_t threads[FETCHER_DEMAND + FETCHER_AHEAD];
    pthread_rwlock_init(&f->leasing, NULL);
    pthread_mutex_init(&f->lock, NULL);
    f->demand = queue_create(QUEUE_MAX, request_free, err);
    f->ahead = f->demand ? queue_create(QUEUE_MAX, NULL, err) : NULL;
    f->images = f->ahead ? fetch_images_create(f->repo, err) : NULL;
    if (!f->images)
        return -1;
    for (int i = 0; i < FETCHER_DEMAND + FETCHER_AHEAD; i++) {
        int failed = pthread_create(&threads[i], NULL,
                                    i < FETCHER_DEMAND ? demand_thread : ahead_thread, f);
        if (failed)
            return error_errno(err, failed, "cannot start a thread");
    }
    int r = receive(f, err);
    queue_close(f->demand);
    for (int i = 0; i < FETCHER_DEMAND; i++)
        pthread_join(threads[i], NULL);
    queue_close(f->ahead);
    for (int i = FETCHER_DEMAND; i < FETCHER_DEMAND + FETCHER_AHEAD; i++)
        pthread_join(threads[i], NULL);
    fetch_images_destroy(f->images);
    queue_destroy(f->demand);
    queue_destroy(f->ahead);
    return r;
}

#define MEMBER(name) .offset = offsetof(struct fetcher, name)
static const struct option rows[] = {
    {"socket", "FD", option_parse_u64, .max = 1024, .required = true, MEMBER(socket),
     .text = "The connection to the holder"},
    {"repository", "URL", option_parse_text, .required = true, MEMBER(repository),
     .text = "The repository"},
    {"owner", "NAME", option_parse_text, .required = true, MEMBER(owner),
     .text = "Whose leases are the mount's"},
    {"life", "LIFE", option_parse_text, MEMBER(life), .text = "Which holder's of that owner"},
    {"help", NULL, option_parse_flag, MEMBER(help), .text = "This text"},
    {NULL}};
#undef MEMBER

static int run(int argc, char **argv, struct vm_error **err)
{
    static struct fetcher f;
    struct positionals p;
    if (argc == 2 && !strcmp(argv[1], "--help")) {
        puts("usage: vmmig-fetch OPTION...\n\nReads a repository for vmmig-mount, which starts it.\n");
        options_print_help(stdout, rows, "--");
        return 0;
    }
    if (options_parse(rows, argc - 1, argv + 1, &f, &p, err) < 0 || fault_init(err) < 0)
        return -1;
    signal(SIGPIPE, SIG_IGN);
    int n = snprintf(f.holder, sizeof(f.holder), f.life ? "%s %s" : "%s", f.owner, f.life);
    if (n >= (int)sizeof(f.holder))
        return error_set(err, VM_ERROR_USAGE, "--owner: too long");
    f.repo = repo_open(f.repository, err);
    if (!f.repo)
        return -1;
    int r = serve(&f, err);
    repo_close(f.repo);
    return r;
}

int main(int argc, char **argv)
{
    cleanup_error struct vm_error *err = NULL;
    heap_give_back();
    if (run(argc, argv, &err) == 0)
        return 0;
    fprintf(stderr, "vmmig-fetch: %s\n", error_message(err));
    return error_kind_status(err ? err->kind : VM_ERROR_FAILED);
}

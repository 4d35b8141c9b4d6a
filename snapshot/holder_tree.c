/* SPDX-License-Identifier: Apache-2.0 */
/* The FUSE file system of the holder. */
#include "base/cleanup.h"
#include "base/clock.h"
#include "base/log.h"
#include "snapshot/holder.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <string.h>
#include <sys/stat.h>

#define NAME_TIMEOUT_S 1.0 /* how long the kernel may keep what a name stands for */
#define FOREVER_S 1e6
enum { REQUESTS_PER_TURN = 64 };

static struct holder *of(fuse_req_t req)
{
    return fuse_req_userdata(req);
}

static int errno_of(const struct mount_packet *answer)
{
    switch (answer->m.kind) {
    case VM_ERROR_NOT_FOUND:
    case VM_ERROR_USAGE:
        return ENOENT;
    case VM_ERROR_DENIED:
        return EACCES;
    default:
        return EIO;
    }
}

/* ---- attributes ---- */

static struct stat attributes(const struct holder *h, uint64_t ino, bool folder, uint64_t size)
{
    return (struct stat){
        .st_ino = ino,
        .st_mode = folder ? S_IFDIR | 0550 : S_IFREG | 0660,
        .st_nlink = folder ? 2 : 1,
        .st_uid = h->uid,
        .st_gid = h->gid,
        .st_size = (off_t)size,
        .st_blocks = (blkcnt_t)((size + 511) / 512),
        .st_blksize = MOUNT_CHUNK,
    };
}

static void tree_getattr(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
    struct holder *h = of(req);
    struct node *n = node_of_ino(h, ino);
    (void)fi;
    if (!n && ino != FUSE_ROOT_ID && !image_of_ino(h, ino)) {
        fuse_reply_err(req, ESTALE);
        return;
    }
    struct stat st = attributes(h, ino, !n, n ? n->size : 0);
    fuse_reply_attr(req, &st, n ? FOREVER_S : NAME_TIMEOUT_S);
}

static void refuse_setattr(fuse_req_t req, fuse_ino_t ino, struct stat *attr, int to_set,
                           struct fuse_file_info *fi)
{
    (void)ino, (void)attr, (void)to_set, (void)fi;
    fuse_reply_err(req, EROFS);
}

/* ---- names ---- */

static void reply_folder(struct holder *h, fuse_req_t req, struct image_dir *d)
{
    struct fuse_entry_param e = {
        .ino = d->ino,
        .attr = attributes(h, d->ino, true, 0),
        .attr_timeout = FOREVER_S,
        .entry_timeout = NAME_TIMEOUT_S,
    };
    d->lookups++;
    d->used_ns = clock_mono_ns();
    fuse_reply_entry(req, &e);
}

static void found(struct holder *h, struct task *t, const struct mount_packet *answer)
{
    const struct mount_file *files = (const struct mount_file *)answer->payload;
    unsigned n = answer->m.count;
    struct image_dir *held = image_find_held(h, t->message.name);
    if (answer->m.type != MOUNT_FOUND) {
        /* Deleted, or out of reach, and yet in use: who uses it may open it once more. */
        if (held && held->template)
            reply_folder(h, t->req, held);
        else
            fuse_reply_err(t->req, errno_of(answer));
        return;
    }
    if (n > MOUNT_FILES_MAX || answer->m.payload_len != n * sizeof(*files)) {
        fuse_reply_err(t->req, EIO);
        return;
    }
    struct image_dir *d = image_get(h, t->message.name, answer->m.number, files, n);
    if (d)
        reply_folder(h, t->req, d);
    else
        fuse_reply_err(t->req, ENOMEM);
}

static void lookup_image(struct holder *h, fuse_req_t req, const char *folder)
{
    char name[MOUNT_NAME_MAX + 1];
    if (mount_unescape(folder, name) < 0) {
        fuse_reply_err(req, ENOENT);
        return;
    }
    struct image_dir *held = image_find_held(h, name);
    if (held && held->template) {
        reply_folder(h, req, held);
        return;
    }
    struct task *t = task_new(h, MOUNT_FIND, name, found);
    if (!t) {
        fuse_reply_err(req, EAGAIN);
        return;
    }
    t->req = req;
    t->transient_retry = true;
    t->deadline_ns = clock_mono_ns() + (int64_t)h->options.read_timeout_ms * NSEC_PER_MSEC;
    task_submit(h, t);
}

static void tree_lookup(fuse_req_t req, fuse_ino_t parent, const char *name)
{
    struct holder *h = of(req);
    if (parent == FUSE_ROOT_ID) {
        lookup_image(h, req, name);
        return;
    }
    struct image_dir *d = image_of_ino(h, parent);
    for (unsigned i = 0; d && i < d->n_nodes; i++) {
        struct node *n = &d->nodes[i];
        if (strcmp(n->name, name))
            continue;
        struct fuse_entry_param e = {.ino = n->ino,
                                     .attr = attributes(h, n->ino, false, n->size),
                                     .attr_timeout = FOREVER_S,
                                     .entry_timeout = FOREVER_S};
        d->lookups++;
        fuse_reply_entry(req, &e);
        return;
    }
    fuse_reply_err(req, d ? ENOENT : ESTALE);
}

static void tree_forget(fuse_req_t req, fuse_ino_t ino, uint64_t count)
{
    struct image_dir *d = ino == FUSE_ROOT_ID ? NULL : image_of_ino(of(req), ino);
    if (d)
        d->lookups -= count < d->lookups ? count : d->lookups;
    fuse_reply_none(req);
}

/* ---- listing ---- */

struct listing { /* an open root */
    struct names *names; /* those of others, too, once it is complete */
    fuse_req_t req;
    struct fuse_file_info fi;
    bool failed;
};

static void names_unref(struct holder *h, struct names *n)
{
    if (!n || --n->users)
        return;
    h->names_bytes -= n->len;
    free(n->text);
    free(n);
}

static void listing_free(struct holder *h, struct listing *l)
{
    names_unref(h, l->names);
    free(l);
}

static bool add_name(struct holder *h, struct names *n, const char *name)
{
    char escaped[3 * MOUNT_NAME_MAX + 1];
    mount_escape(name, escaped);
    size_t len = strlen(escaped) + 1;
    bool room = n->len + len <= HOLDER_LIST_MAX && h->names_bytes + len <= HOLDER_LISTS_MAX;
    char *more = room ? realloc(n->text, n->len + len) : NULL;
    if (!more)
        return false;
    n->text = more;
    memcpy(more + n->len, escaped, len);
    n->len += len;
    h->names_bytes += len;
    return true;
}

/* However many have the root open, what they see takes room once as long as it is the same. */
static void share_names(struct holder *h, struct listing *l)
{
    struct names *own = l->names, *newest = h->newest_names;
    bool same = newest && newest->len == own->len && (!own->len || !memcmp(newest->text, own->text, own->len));
    if (!same) {
        names_unref(h, newest);
        own->users++;
        h->newest_names = own;
        return;
    }
    names_unref(h, own);
    newest->users++;
    l->names = newest;
}

static void listed(struct holder *h, struct task *t, const struct mount_packet *answer)
{
    struct listing *l = t->arg;
    if (answer->m.type != MOUNT_NAMES) {
        fuse_reply_err(l->req, errno_of(answer));
        listing_free(h, l);
        return;
    }
    const char *end = (const char *)answer->payload + answer->m.payload_len;
    for (const char *name = (const char *)answer->payload; name < end && !l->failed; name += strlen(name) + 1)
        l->failed = !add_name(h, l->names, name);
    if (!(answer->m.flags & MOUNT_LAST))
        return;
    if (l->failed) {
        fuse_reply_err(l->req, EOVERFLOW);
        listing_free(h, l);
        return;
    }
    share_names(h, l);
    if (fuse_reply_open(l->req, &l->fi) < 0) /* it was interrupted: no release will come */
        listing_free(h, l);
}

static void tree_opendir(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
    struct holder *h = of(req);
    fi->fh = 0;
    if (ino != FUSE_ROOT_ID) {
        fuse_reply_open(req, fi);
        return;
    }
    struct listing *l = calloc(1, sizeof(*l));
    struct names *names = l ? calloc(1, sizeof(*names)) : NULL;
    struct task *t = names ? task_new(h, MOUNT_LIST, NULL, listed) : NULL;
    if (!t) {
        free(names);
        free(l);
        fuse_reply_err(req, ENOMEM);
        return;
    }
    names->users = 1;
    l->names = names;
    fi->fh = (uint64_t)(uintptr_t)l;
    l->req = req;
    l->fi = *fi;
    t->arg = l;
    t->deadline_ns = clock_mono_ns() + (int64_t)h->options.read_timeout_ms * NSEC_PER_MSEC;
    task_submit(h, t);
}

/* Append an entry; false when the buffer is full. `next`: where the reading goes on behind it. */
static bool put_entry(fuse_req_t req, char *out, size_t size, size_t *used, const char *name,
                      bool folder, uint64_t ino, off_t next)
{
    struct stat st = {.st_ino = ino, .st_mode = folder ? S_IFDIR : S_IFREG};
    size_t n = fuse_add_direntry(req, out + *used, size - *used, name, &st, next);
    if (n > size - *used)
        return false;
    *used += n;
    return true;
}

static void tree_readdir(fuse_req_t req, fuse_ino_t ino, size_t size, off_t offset,
                         struct fuse_file_info *fi)
{
    struct holder *h = of(req);
    const struct listing *l = (const struct listing *)(uintptr_t)fi->fh;
    const struct names *names = l ? l->names : NULL;
    const struct image_dir *d = ino == FUSE_ROOT_ID ? NULL : image_of_ino(h, ino);
    size_t used = 0;
    size = size < HOLDER_FETCH_MAX ? size : HOLDER_FETCH_MAX;
    char *out = (char *)h->read_buffer;
    /* Offsets: 1 and 2 behind "." and "..", then 3 + the place in the list. */
    bool more = true;
    if (offset < 1)
        more = put_entry(req, out, size, &used, ".", true, ino, 1);
    if (more && offset < 2)
        more = put_entry(req, out, size, &used, "..", true, FUSE_ROOT_ID, 2);
    size_t at = offset > 3 ? (size_t)offset - 3 : 0;
    while (more && names && at < names->len) {
        size_t next = at + strlen(names->text + at) + 1;
        more = put_entry(req, out, size, &used, names->text + at, true, 1, (off_t)next + 3);
        at = next;
    }
    for (; more && d && at < d->n_nodes; at++)
        more = put_entry(req, out, size, &used, d->nodes[at].name, false, d->nodes[at].ino,
                         (off_t)at + 4);
    fuse_reply_buf(req, out, used);
}

static void tree_releasedir(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
    struct listing *l = (struct listing *)(uintptr_t)fi->fh;
    (void)ino;
    if (l)
        listing_free(of(req), l);
    fuse_reply_err(req, 0);
}

/* ---- files ---- */

static void dropped(struct holder *h, struct task *t, const struct mount_packet *answer)
{
    (void)h;
    if (answer->m.type == MOUNT_FAILED)
        log_warn("a lease was not dropped; the next mount of this host does", "image=%s reason=%s",
                 t->message.name, log_q((const char *)answer->payload));
}

void tree_drop_lease(struct holder *h, const char *image, uint64_t number)
{
    struct task *t = task_new(h, MOUNT_DROP, image, dropped);
    if (!t) { /* the fetcher that comes next drops what is not held */
        log_warn("a lease was not dropped: too much is waiting", "image=%s", image);
        return;
    }
    t->message.number = number;
    t->transient_retry = true;
    task_submit(h, t);
}

/* The last user of an image has gone, if that is so. */
static void end_use(struct holder *h, struct image_dir *d)
{
    if (d->open)
        return;
    image_closed(h, d);
    uint64_t lease = d->lease;
    d->lease = 0;
    if (lease)
        tree_drop_lease(h, d->name, lease);
}

static void prefetched(struct holder *h, struct task *t, const struct mount_packet *answer)
{
    struct image_dir *d = t->image;
    if (answer->m.type == MOUNT_HAVE) {
        if (answer->m.file < d->n_nodes)
            node_read_ahead(h, &d->nodes[answer->m.file], answer->m.offset, answer->m.len,
                            answer->m.count);
        return;
    }
    d->prefetching = false;
    /* Without a known working set this first use makes one. */
    if (answer->m.type == MOUNT_OK && answer->m.count) {
        d->recording = false;
        d->recorded = true;
        free(steal_ptr(&d->touches));
    }
    d->open--;
    end_use(h, d);
}

/* Read ahead what is known to be needed. */
static void read_ahead(struct holder *h, struct image_dir *d)
{
    struct task *t = d->asked ? NULL : task_new(h, MOUNT_PREFETCH, d->name, prefetched);
    if (!t)
        return;
    for (unsigned i = 0; i < d->n_nodes; i++) {
        cleanup_error struct vm_error *err = NULL;
        if (node_prepare(h, &d->nodes[i], &err) < 0) {
            log_warn("nothing is read ahead", "reason=%s", log_q(error_message(err)));
            free(t);
            return;
        }
        t->fds[i] = d->nodes[i].fd;
    }
    t->n_fds = (int)d->n_nodes;
    t->message.number = d->number;
    t->image = d;
    t->transient_retry = true;
    image_read_ahead(d);
    d->open++; /* it stays while it is read */
    d->asked = true;
    task_submit(h, t);
}

static void record_from_now(struct holder *h, struct image_dir *d)
{
    d->record_until_ns = clock_mono_ns() + (int64_t)h->options.record_ms * NSEC_PER_MSEC;
}

/* A VMM may be about to run: find out what it needs, unless that is known. */
static void record(struct holder *h, struct image_dir *d)
{
    if (d->recorded || d->recording)
        return;
    d->touches = calloc(HOLDER_TOUCHES_MAX, sizeof(*d->touches));
    if (!d->touches)
        return;
    d->recording = true;
    d->by_vmm = false;
    d->n_touches = 0;
    record_from_now(h, d);
}

static bool is_memory(const struct node *n)
{
    return !strncmp(n->name, "memory", 6);
}

static bool is_state(const struct node *n)
{
    return !strcmp(n->name, "device.state");
}

static bool has_open(const struct image_dir *d, bool (*is)(const struct node *n))
{
    for (unsigned i = 0; i < d->n_nodes; i++)
        if (d->nodes[i].open && is(&d->nodes[i]))
            return true;
    return false;
}

/* A VMM has both open at once; whoever looks at the files, or copies them, has not. */
static void look_for_vmm(struct holder *h, struct image_dir *d)
{
    if (!d->recording || d->by_vmm || !has_open(d, is_state) || !has_open(d, is_memory))
        return;
    d->by_vmm = true;
    record_from_now(h, d);
}

static void reply_open(struct holder *h, struct opener *o, int error)
{
    cleanup_error struct vm_error *err = NULL;
    if (!error && node_prepare(h, o->node, &err) < 0) {
        log_error("a file cannot be opened", "image=%s reason=%s", o->node->image->name,
                  log_q(error_message(err)));
        error = err->sys_errno == ENOSPC ? ENOSPC : EIO;
    }
    if (error) {
        fuse_reply_err(o->req, error);
        return;
    }
    o->fi.keep_cache = 1;
    o->node->open++;
    o->node->image->open++;
    if (fuse_reply_open(o->req, &o->fi) < 0) { /* it was interrupted: no release will come */
        o->node->open--;
        o->node->image->open--;
    }
}

void tree_opened(struct holder *h, struct image_dir *d, int error)
{
    struct opener *list = steal_ptr(&d->openers);
    if (!error && d->template) {
        read_ahead(h, d);
        for (const struct opener *o = list; o; o = o->next)
            if (is_state(o->node))
                record(h, d);
    }
    while (list) {
        struct opener *o = list;
        list = o->next;
        reply_open(h, o, error);
        free(o);
    }
    look_for_vmm(h, d);
    end_use(h, d);
}

static void leased(struct holder *h, struct task *t, const struct mount_packet *answer)
{
    struct image_dir *d = t->image;
    d->leasing = false;
    int error = answer->m.type == MOUNT_OK ? 0 : errno_of(answer);
    if (!error)
        d->lease = answer->m.number;
    /* The name may be another image's by now, which the kernel does not know yet: it asks again on ESTALE. */
    tree_opened(h, d, error == ENOENT ? ESTALE : error);
}

static void tree_open(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
    struct holder *h = of(req);
    struct node *n = node_of_ino(h, ino);
    struct opener *o = n ? calloc(1, sizeof(*o)) : NULL;
    if (!o) {
        fuse_reply_err(req, n ? ENOMEM : ESTALE);
        return;
    }
    struct image_dir *d = n->image;
    *o = (struct opener){.next = d->openers, .req = req, .node = n, .fi = *fi};
    d->openers = o;
    d->used_ns = clock_mono_ns();
    if (d->lease) {
        tree_opened(h, d, 0);
        return;
    }
    if (d->leasing)
        return;
    struct task *t = task_new(h, MOUNT_LEASE, d->name, leased);
    if (!t) {
        tree_opened(h, d, EAGAIN);
        return;
    }
    t->message.number = d->number;
    t->image = d;
    t->transient_retry = true;
    t->deadline_ns = clock_mono_ns() + (int64_t)h->options.read_timeout_ms * NSEC_PER_MSEC;
    d->leasing = true;
    task_submit(h, t);
}

static void tree_release(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
    struct holder *h = of(req);
    struct node *n = node_of_ino(h, ino);
    (void)fi;
    fuse_reply_err(req, 0);
    if (!n || !n->open)
        return;
    struct image_dir *d = n->image;
    n->open--;
    d->open--;
    d->used_ns = clock_mono_ns();
    unsigned files = 0;
    for (unsigned i = 0; i < d->n_nodes; i++)
        files += d->nodes[i].open;
    if (!files)
        image_record_nothing(d);
    end_use(h, d);
}

static void tree_read(fuse_req_t req, fuse_ino_t ino, size_t size, off_t offset,
                      struct fuse_file_info *fi)
{
    struct node *n = node_of_ino(of(req), ino);
    (void)fi;
    if (!n || !n->chunks || offset < 0)
        fuse_reply_err(req, n ? EIO : ESTALE);
    else
        node_read(of(req), n, req, (uint64_t)offset, size);
}

/* ---- what somebody wrote is forgotten ---- */

/*
 * The kernel keeps the pages of a write that is refused. To have it forget them waits until nobody reads them, and
 * whoever reads them may be waiting for this process: so it has a thread of its own, which does nothing else. While
 * that one waits, what is written to a file grows into one range: there are no more ranges than files.
 */
struct written {
    struct written *next;
    fuse_ino_t ino;
    off_t from, to;
};

struct forgetter {
    struct fuse_session *session;
    pthread_t thread;
    pthread_mutex_t lock; /* guards the rest */
    pthread_cond_t changed;
    struct written *list;
    bool ended;
};

/* NULL: it is over. */
static struct written *next_written(struct forgetter *f)
{
    SCOPE_LOCK(&f->lock);
    while (!f->list && !f->ended)
        pthread_cond_wait(&f->changed, &f->lock);
    struct written *w = f->ended ? NULL : f->list;
    if (w)
        f->list = w->next;
    return w;
}

static void *forget(void *arg)
{
    struct forgetter *f = arg;
    struct written *w;
    while ((w = next_written(f))) {
        fuse_lowlevel_notify_inval_inode(f->session, w->ino, w->from, w->to - w->from);
        free(w);
    }
    return NULL;
}

static void free_forgetter(struct forgetter *f)
{
    while (f->list) {
        struct written *w = f->list;
        f->list = w->next;
        free(w);
    }
    pthread_cond_destroy(&f->changed);
    pthread_mutex_destroy(&f->lock);
    free(f);
}

static int start_forgetter(struct holder *h, struct vm_error **err)
{
    struct forgetter *f = calloc(1, sizeof(*f));
    if (!f)
        return error_nomem(err);
    f->session = h->session;
    pthread_mutex_init(&f->lock, NULL);
    pthread_cond_init(&f->changed, NULL);
    int failed = pthread_create(&f->thread, NULL, forget, f);
    if (failed) {
        free_forgetter(f);
        return error_errno(err, failed, "cannot start a thread");
    }
    h->forgetter = f;
    return 0;
}

/* After unmounting: nobody reads any more. */
static void stop_forgetter(struct holder *h)
{
    struct forgetter *f = steal_ptr(&h->forgetter);
    if (!f)
        return;
    pthread_mutex_lock(&f->lock);
    f->ended = true;
    pthread_cond_signal(&f->changed);
    pthread_mutex_unlock(&f->lock);
    pthread_join(f->thread, NULL);
    free_forgetter(f);
}

static int add_written(struct forgetter *f, fuse_ino_t ino, off_t from, off_t to)
{
    SCOPE_LOCK(&f->lock);
    struct written **at = &f->list;
    while (*at && (*at)->ino != ino)
        at = &(*at)->next;
    if (!*at && !(*at = calloc(1, sizeof(**at))))
        return -1;
    struct written *w = *at;
    bool fresh = !w->to;
    w->ino = ino;
    w->from = fresh || from < w->from ? from : w->from;
    w->to = to > w->to ? to : w->to;
    pthread_cond_signal(&f->changed);
    return 0;
}

static void forget_written(struct holder *h, fuse_ino_t ino, off_t offset, size_t size)
{
    off_t page = 4096, from = offset / page * page;
    off_t to = (offset + (off_t)size + page - 1) / page * page;
    cleanup_error struct vm_error *err = NULL;
    if ((h->forgetter || start_forgetter(h, &err) == 0) && add_written(h->forgetter, ino, from, to) == 0)
        return;
    log_error("what somebody wrote to a file of the mount may stay in the kernel's cache", "reason=%s",
              err ? log_q(error_message(err)) : "out of memory");
}

/* Only somebody who maps a file shared and writes into it, or calls write, comes here. */
static void refuse_write(fuse_req_t req, fuse_ino_t ino, const char *data, size_t size,
                         off_t offset, struct fuse_file_info *fi)
{
    struct holder *h = of(req);
    struct node *n = node_of_ino(h, ino);
    (void)data, (void)fi;
    log_error("somebody wrote to a file of the mount: the write is discarded",
              "image=%s file=%s pid=%d", n ? n->image->name : "?", n ? n->name : "?",
              fuse_req_ctx(req)->pid);
    fuse_reply_err(req, EROFS); /* which frees req */
    forget_written(h, ino, offset, size);
}

static void tree_flush(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
    (void)ino, (void)fi;
    fuse_reply_err(req, ENOSYS); /* the kernel does not ask again */
}

static void tree_init(void *arg, struct fuse_conn_info *conn)
{
    (void)arg;
    conn->want &= ~(unsigned)(FUSE_CAP_WRITEBACK_CACHE | FUSE_CAP_ATOMIC_O_TRUNC);
    conn->want |= conn->capable & (FUSE_CAP_ASYNC_READ | FUSE_CAP_PARALLEL_DIROPS);
    conn->max_background = HOLDER_BACKGROUND_MAX;
    conn->congestion_threshold = HOLDER_BACKGROUND_MAX;
}

static const struct fuse_lowlevel_ops operations = {
    .init = tree_init,
    .lookup = tree_lookup,
    .forget = tree_forget,
    .getattr = tree_getattr,
    .setattr = refuse_setattr,
    .opendir = tree_opendir,
    .readdir = tree_readdir,
    .releasedir = tree_releasedir,
    .open = tree_open,
    .release = tree_release,
    .read = tree_read,
    .write = refuse_write,
    .flush = tree_flush,
};

/* ---- the session ---- */

static void on_fuse(int fd, int ready, void *arg)
{
    struct holder *h = arg;
    (void)fd, (void)ready;
    for (int i = 0; i < REQUESTS_PER_TURN && !h->fuse_paused; i++) {
        int n = fuse_session_receive_buf(h->session, &h->buf);
        if (n == -EINTR)
            continue;
        if (n == -EAGAIN)
            return;
        if (n <= 0 || fuse_session_exited(h->session)) { /* somebody unmounted it */
            loop_stop(h->loop);
            return;
        }
        fuse_session_process_buf(h->session, &h->buf);
    }
}

void tree_throttle(struct holder *h)
{
    bool pause = h->n_waiters >= HOLDER_WAITERS_MAX;
    if (pause == h->fuse_paused || !h->fuse_watch)
        return;
    h->fuse_paused = pause;
    loop_watch_set_events(h->fuse_watch, pause ? 0 : LOOP_READ, NULL);
}

int tree_mount(struct holder *h, struct vm_error **err)
{
    char options[] = "fsname=vmmig,subtype=vmmig,allow_other,default_permissions,nosuid,nodev,"
                     "noexec,noatime";
    char program[] = "vmmig-mount", dash_o[] = "-o";
    char *argv[] = {program, dash_o, options, NULL};
    struct fuse_args args = FUSE_ARGS_INIT(3, argv);
    h->session = fuse_session_new(&args, &operations, sizeof(operations), h);
    fuse_opt_free_args(&args);
    if (!h->session)
        return error_set(err, VM_ERROR_SYSTEM, "libfuse refuses to make a session");
    if (fuse_session_mount(h->session, h->options.mount) < 0)
        return error_errno(err, errno ? errno : EIO, "cannot mount at %s", h->options.mount);
    h->mounted = true;
    h->fuse_fd = fuse_session_fd(h->session);
    if (fcntl(h->fuse_fd, F_SETFL, O_NONBLOCK) < 0)
        return error_errno(err, errno, "/dev/fuse");
    h->fuse_watch = loop_watch_fd(h->loop, h->fuse_fd, LOOP_READ, on_fuse, h, err);
    return h->fuse_watch ? 0 : -1;
}

void tree_unmount(struct holder *h)
{
    loop_watch_destroy(steal_ptr(&h->fuse_watch));
    if (h->mounted)
        fuse_session_unmount(h->session);
    stop_forgetter(h);
    names_unref(h, steal_ptr(&h->newest_names));
    if (h->session)
        fuse_session_destroy(h->session);
    free(h->buf.mem);
    h->session = NULL;
    h->mounted = false;
}

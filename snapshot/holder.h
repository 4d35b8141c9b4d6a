/* SPDX-License-Identifier: Apache-2.0 */
/*
 * holder: the process vmmig-mount, which holds a mount and its cache. It is small and apart because
 * guests that map its files die with it: it opens no repository and no network connection, has one
 * thread (and, once somebody tried to write, one that waits for the kernel), and does nothing else.
 * Fetchers (vmmig-fetch), which it starts and starts again, read the repository and write verified
 * data into the cache's files; what a fetcher has not said to be there is never given to a reader,
 * so that a fetcher may crash at any instant.
 *
 *     vmmig-mount --mount DIR --repository URL --cache DIR --cache-size N --control SOCKET ...
 *
 * The tree: DIR/IMAGE/FILE, IMAGE as mount_escape writes it. A name is looked up when it is used;
 * an open file stays what it was when its image is deleted or its name gets another one: opening
 * the first file of an image takes a lease in the repository, closing (or unmapping) the last one
 * drops it. Names of templates by digest ("t:NAME@DIGEST") never stand for anything else.
 *
 * Reads. A chunk of 64 KiB is present or not. Present: it comes from the cache. Not: it is fetched,
 * with what follows when reads come in sequence. Of files named memory* and of device.state, which
 * guests need, a read waits as long as it takes; of all others it fails with EIO after read-timeout
 * without an answer. What the repository reports as damaged is EIO at once. Writing is EROFS; O_RDWR
 * opens are accepted.
 *
 * Reads that wait hold up no others: the kernel stops asking at HOLDER_BACKGROUND_MAX (of a page
 * cache's miss, whatever the file) and the holder at HOLDER_WAITERS_MAX, both of which are more than
 * the virtual CPUs of a host's guests have under way.
 *
 * Cache: an unlinked file per file of an image, sparse, below the cache's folder; nothing is left
 * when the holder ends, and what others put into the folder is not looked at. At the limit the
 * chunks that were not read for longest go; so does a sixteenth whenever the file system has no
 * room. A reading guest's pages are in the kernel's page cache once, whatever the number of clones.
 *
 * Working set. Of a template's first use by a VMM, the order is recorded in which its chunks are read, for some
 * seconds, and a fetcher stores it beside the template; it is read ahead at every later first use on any host. Such a
 * use is one that has the device state and memory open at once, and lasts until the recording is over: of a look at
 * the files, or a VMM that ended at once, nothing is stored.
 *
 * Memory: 1 MiB of buffers, 1 byte per 64 KiB of each file that was opened, HOLDER_TASKS_MAX
 * requests to fetchers and HOLDER_WAITERS_MAX waiting reads (beyond these /dev/fuse is not read),
 * HOLDER_IMAGES_MAX images without users, HOLDER_LISTS_MAX of names in folders that are open. An image whose name the
 * kernel keeps in its own cache is kept, too: 400 bytes, and 200 for each of its files.
 *
 * This header is for the holder's files alone.
 */
#ifndef VMMIG_SNAPSHOT_HOLDER_H
#define VMMIG_SNAPSHOT_HOLDER_H

#define FUSE_USE_VERSION 314

#include "base/loop.h"
#include "snapshot/mount_wire.h"

#include <fuse_lowlevel.h>
#include <stdbool.h>
#include <stdint.h>

enum {
    HOLDER_TASKS_MAX = 4096,
    HOLDER_FETCHES_MAX = 3840, /* of these may be FETCH: names and leases are asked for beside them */
    HOLDER_BACKGROUND_MAX = 12288, /* reads for the page cache that the kernel has at most under way */
    HOLDER_WAITERS_MAX = 16384,
    HOLDER_IMAGES_MAX = 128,
    HOLDER_FETCHERS_MAX = 4,
    HOLDER_IN_FLIGHT = 48,       /* requests to one fetcher */
    HOLDER_FETCH_MAX = 1 << 20,  /* bytes of one request */
    HOLDER_READ_AHEAD = 1 << 20, /* bytes, of reads in sequence */
    HOLDER_TOUCHES_MAX = MOUNT_PAYLOAD_MAX / sizeof(struct mount_touch),
    HOLDER_LIST_MAX = 16 << 20,  /* bytes of names in one listing */
    HOLDER_LISTS_MAX = 64 << 20, /* bytes of names in all that are open, equal ones once */
    HOLDER_BUCKETS = 4096,
    HOLDER_FIRST_INO = 1000,
};

struct holder_options {
    const char *mount, *repository, *cache, *control, *fetcher, *owner, *group;
    uint64_t cache_size, read_timeout_ms, record_ms;
    bool help;
};

/* ---- images and files: holder_image.c ---- */

enum chunk { CHUNK_ABSENT, CHUNK_FETCHING, CHUNK_ZERO, CHUNK_DATA };
/*
 * Bits of a chunk's byte beside its state. A fetcher writes into the cache's file before it says so: what it says
 * of a chunk that was dropped from the cache in between is no longer true. So a chunk is not dropped while a FETCH
 * of it is out (PENDING), and of one that was dropped while a PREFETCH of its image runs (DROPPED) that PREFETCH
 * is not believed any more.
 */
enum {
    CHUNK_STATE = 3,
    CHUNK_USED = 4,
    CHUNK_TOUCHED = 8,
    CHUNK_PENDING = 16,
    CHUNK_DROPPED = 32,
    CHUNK_COUNTED = 64, /* it takes room in the cache, whatever its state */
};

struct waiter { /* a FUSE read that waits */
    struct waiter *next;
    fuse_req_t req;
    uint64_t offset;
    size_t len;
    int64_t deadline_ns;
};

struct node {
    struct image_dir *image;
    unsigned index;
    uint64_t ino, size;
    char name[MOUNT_FILE_NAME_MAX + 1];
    int fd;          /* the cache's file; -1 before the first open */
    uint8_t *chunks; /* NULL before the first open */
    uint64_t n_chunks, next_offset;
    unsigned open;
    struct waiter *waiters;
};

struct opener { /* an open that waits for the lease */
    struct opener *next;
    fuse_req_t req;
    struct node *node;
    struct fuse_file_info fi;
};

struct image_dir {
    struct image_dir *next, *newer; /* the newest stands first */
    struct image_dir *next_of_name, *next_of_ino; /* in the holder's tables */
    char name[MOUNT_NAME_MAX + 1];
    uint64_t number, ino; /* the number of its commit: never given twice */
    uint64_t lookups;     /* that the kernel holds, of the folder and its files */
    unsigned open;        /* files */
    uint64_t lease;       /* 0: none */
    bool leasing, template, prefetching;
    unsigned tasks; /* requests to fetchers that point here: it is not freed before they end */
    struct opener *openers;
    int64_t used_ns;
    /* recording of the working set */
    bool asked; /* for a working set that is known */
    bool recording, recorded;
    bool by_vmm; /* what is recorded is a VMM's use */
    int64_t record_until_ns;
    struct mount_touch *touches;
    uint32_t n_touches;
    unsigned n_nodes;
    struct node nodes[];
};

/* What the root had when it was opened; of several folders that had the same there is one. */
struct names {
    unsigned users;
    size_t len;
    char *text; /* escaped, each with its NUL */
};

struct holder {
    struct holder_options options;
    struct loop *loop;
    struct fuse_session *session;
    struct fuse_buf buf;
    int fuse_fd;
    struct loop_watch *fuse_watch;
    bool fuse_paused, mounted, stopping;
    uid_t uid;
    gid_t gid;
    char life[MOUNT_LIFE_SIZE];
    struct image_dir *images, *oldest, *of_name[HOLDER_BUCKETS], *of_ino[HOLDER_BUCKETS];
    unsigned n_images, trim_beyond;
    uint64_t next_ino;
    struct names *newest_names; /* a user of them itself */
    size_t names_bytes;         /* of all that are there */
    unsigned n_waiters;
    uint64_t cache_used;
    struct image_dir *hand_image; /* where eviction goes on */
    unsigned hand_node;
    uint64_t hand_chunk;
    struct mount_state state; /* its counters */
    struct fetchers *fetchers;
    struct control_socket *control;
    struct forgetter *forgetter; /* NULL: nobody ever wrote */
    uint8_t *read_buffer; /* HOLDER_FETCH_MAX */
};

/* Find by name and number, or add. NULL without memory. */
struct image_dir *image_get(struct holder *h, const char *name, uint64_t number,
                            const struct mount_file *files, unsigned n_files);
/* The image of that name that has open files, newest first; NULL. */
struct image_dir *image_find_held(struct holder *h, const char *name);
struct image_dir *image_of_ino(struct holder *h, uint64_t ino);
struct node *node_of_ino(struct holder *h, uint64_t ino);
/* Free those without users beyond HOLDER_IMAGES_MAX. */
void image_trim(struct holder *h);
void images_destroy(struct holder *h);

/* The cache's file, ready to be filled. */
int node_prepare(struct holder *h, struct node *n, struct vm_error **err);
/* Serve or queue a read. */
void node_read(struct holder *h, struct node *n, fuse_req_t req, uint64_t offset, size_t len);
/* A PREFETCH begins. */
void image_read_ahead(struct image_dir *d);
/*
 * It says: `len` bytes at offset are in the cache's file; a bit per chunk: it is not all zero.
 */
void node_read_ahead(struct holder *h, struct node *n, uint64_t offset, uint64_t len, uint32_t stored);
/* The cache has another limit. */
void images_limit(struct holder *h, uint64_t cache_size);
/* The cache's file system has no room: make some. */
void images_make_room(struct holder *h);
/* Nobody has it open any more: what was not asked for yet is not asked for. */
void image_closed(struct holder *h, struct image_dir *d);
/* Fail readers whose time is over; called twice a second. */
void nodes_expire(struct holder *h, int64_t now_ns);
/* The recording is over: have it stored. */
void image_record(struct holder *h, struct image_dir *d);
/* It was no VMM's use, or a short one: the next one is recorded. */
void image_record_nothing(struct image_dir *d);

/* ---- requests to fetchers: holder_fetchers.c ---- */

struct task;
/* An answer (type OK, FOUND, NAMES, HAVE or FAILED); the last one ends the task. */
typedef void task_fn(struct holder *h, struct task *t, const struct mount_packet *answer);

struct task {
    struct task *next;
    struct mount_message message;
    void *payload; /* owned */
    int fds[MOUNT_FILES_MAX];
    int n_fds;
    struct fetcher *at; /* NULL: waits to be sent */
    int64_t not_before_ns, deadline_ns; /* deadline 0: none; FAILED with TIMEOUT then */
    bool transient_retry; /* UNREACHABLE, TIMEOUT, NO_SPACE are tried again */
    task_fn *done;
    fuse_req_t req;
    struct image_dir *image; /* counted in its `tasks` */
    struct node *node;
    void *arg;
};

int fetchers_start(struct holder *h, struct vm_error **err);
void fetchers_stop(struct holder *h);
/* A zeroed task; NULL when there are too many. */
struct task *task_new(struct holder *h, enum mount_type type, const char *name, task_fn *done);
void task_submit(struct holder *h, struct task *t);
/* Those FETCH requests for the image that no fetcher has yet end with FAILED, CANCELLED. */
void tasks_withdraw(struct holder *h, struct image_dir *d);
void fetchers_tick(struct holder *h, int64_t now_ns);
/* Start new ones, and end the old once one of them answers. */
void fetchers_refresh(struct holder *h);
unsigned fetchers_connected(const struct holder *h, pid_t *ret_newest);

/* ---- FUSE: holder_tree.c ---- */

int tree_mount(struct holder *h, struct vm_error **err);
void tree_unmount(struct holder *h);
/* Reading from /dev/fuse goes on or not, by what is pending. */
void tree_throttle(struct holder *h);
void tree_opened(struct holder *h, struct image_dir *d, int error);
void tree_drop_lease(struct holder *h, const char *image, uint64_t number);

#endif

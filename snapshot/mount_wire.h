/* SPDX-License-Identifier: Apache-2.0 */
/*
 * mount_wire: what the holder of a mount says to its fetchers and to the agent, over SOCK_SEQPACKET
 * Unix sockets of one host. One packet is one message: struct mount_message, `payload_len` bytes,
 * and perhaps descriptors. Numbers are in the host's byte order.
 *
 *     holder -> fetcher                          fetcher -> holder (the same id)
 *                                                HELLO     first, once
 *     FIND     name                              FOUND     number, payload: count * mount_file
 *     LIST                                       NAMES ... payload: names, each with its NUL; the
 *                                                          last one has flag LAST
 *     LEASE    name, number                      OK        lease in `number`, name; dropped if
 *                                                          nobody waits for it any more
 *     DROP     name, number: the lease           OK
 *     KEEP     payload: numbers of the leases that are held; others of this holder, and those of
 *              holders of the same owner that are dead, are dropped
 *                                                OK
 *     FETCH    name, number, file, offset, len;  OK        what was asked for is in the file;
 *              fd of the cache's file                      count: bit i: chunk i is not all zero
 *     PREFETCH name, number; an fd per file      HAVE ...  file, offset, len; count as in FETCH
 *                                                OK        count: stretches of the working set, 0:
 *                                                          none is known
 *     RECORD   name, number; payload:            OK
 *              count * mount_touch
 *                                                FAILED    kind, payload: the message
 *
 *     agent -> holder                            holder -> agent
 *     STATUS                                     STATE     payload: struct mount_state
 *     REFRESH  start new fetchers, end the old   OK
 *     STOP     unmount and end                   OK | FAILED (CONFLICT while files are open)
 *     RECORD   name: what was read so far is     OK | FAILED (NOT_FOUND)
 *              the working set
 *     LIMITS   len: of the cache, offset: read   OK
 *              timeout in ms; as from the start
 *
 * Leases are taken for "OWNER LIFE", LIFE being that of the holder (mount_life), so that those of another one that
 * lives are left alone whatever its OWNER is. From holders of before it is "OWNER" alone.
 *
 * A fetcher of another MOUNT_WIRE_VERSION is not used. Threads: sending is atomic, receiving is for
 * one thread.
 */
#ifndef VMMIG_SNAPSHOT_MOUNT_WIRE_H
#define VMMIG_SNAPSHOT_MOUNT_WIRE_H

#include "base/error.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define MOUNT_WIRE_VERSION 1

enum {
    MOUNT_NAME_MAX = 128, /* of an image */
    MOUNT_FILE_NAME_MAX = 64,
    MOUNT_FILES_MAX = 64,
    MOUNT_CHUNK = 64 << 10, /* what is present or not */
    MOUNT_PAYLOAD_MAX = 48 << 10,
};

enum mount_type {
    MOUNT_HELLO = 1, MOUNT_FIND, MOUNT_FOUND, MOUNT_LIST, MOUNT_NAMES, MOUNT_LEASE, MOUNT_DROP,
    MOUNT_KEEP, MOUNT_FETCH, MOUNT_PREFETCH, MOUNT_HAVE, MOUNT_RECORD, MOUNT_OK, MOUNT_FAILED,
    MOUNT_STATUS = 50, MOUNT_STATE, MOUNT_REFRESH, MOUNT_STOP, MOUNT_LIMITS,
};

enum { MOUNT_LAST = 1 }; /* flags */

struct mount_message {
    uint32_t version, type, id, flags;
    uint64_t number, offset, len;
    uint32_t file, count;
    int32_t kind; /* of FAILED: enum vm_error_kind */
    uint32_t payload_len;
    char name[MOUNT_NAME_MAX + 8];
};

struct mount_file {
    char name[MOUNT_FILE_NAME_MAX + 8];
    uint64_t size;
};

struct mount_touch {
    uint32_t file, chunk;
};

struct mount_state {
    int32_t pid;
    uint32_t fetchers;       /* that are connected */
    int32_t fetcher_pid;     /* of the newest */
    uint32_t images, open_files, leases;
    uint64_t cache_used, cache_limit; /* bytes */
    uint64_t reads, waits;   /* FUSE reads; of those, that had to wait for the store */
    uint64_t fetches, fetched_bytes, prefetched_bytes;
    uint64_t failed_reads, evicted;
    uint64_t fetcher_starts;
    char repository[512], folder[512], software[64];
    /* Further members are zero from a holder that does not know them: */
    uint64_t cache_full; /* 1: the cache's file system had no room when it was last written to */
    uint64_t read_timeout_ms;
};
#define MOUNT_STATE_MIN offsetof(struct mount_state, cache_full)

struct mount_packet {
    struct mount_message m;
    uint8_t payload[MOUNT_PAYLOAD_MAX + 1];
};

/*
 * 0; -1 with sys_errno EAGAIN when the other side's buffer is full (nothing was sent); UNREACHABLE
 * when it is gone.
 */
int mount_send(int socket, const struct mount_message *m, const void *payload, const int *fds,
               int n_fds, struct vm_error **err);
/*
 * 1: a message, checked: lengths agree, the name ends with a NUL, a NUL is behind the payload. 0:
 * the other side is gone. -1: PROTOCOL, or sys_errno EAGAIN on a non-blocking socket. Descriptors
 * are the caller's.
 */
int mount_receive(int socket, struct mount_packet *ret_packet, int *ret_fds, int max_fds,
                  int *ret_n_fds, struct vm_error **err);

/* "BOOT.PID.START" of this process, in hexadecimal digits: no other process ever has the same. */
enum { MOUNT_LIFE_SIZE = 36 };
int mount_life(char out[MOUNT_LIFE_SIZE], struct vm_error **err);
/* Is it certain that the process of that life runs no more? */
bool mount_life_is_over(const char *life);
/* Is a holder's tree mounted exactly there, alive or not? */
bool mount_is_there(const char *folder);

/* A message of that type, all else zero. `name` may be NULL. */
struct mount_message mount_message(enum mount_type type, uint32_t id, const char *name);

/*
 * Names of images as names of folders: '/' is written "%2F"; nothing else is changed, and '%' is in
 * no image's name. unescape: false for a folder's name that no image has.
 */
void mount_escape(const char *image, char out[3 * MOUNT_NAME_MAX + 1]);
int mount_unescape(const char *folder, char out[MOUNT_NAME_MAX + 1]);

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * mount_tool: for the tests of mounts and clones.
 *
 *     mount_tool store URL NAME FILE=PATH...     an image of these files
 *     mount_tool leases URL                      a line per lease: IMAGE HOLDER
 *     mount_tool status|refresh|stop SOCKET      of a mount's holder; status as a JSON object
 *     mount_tool record SOCKET NAME
 */
#include "base/cleanup.h"
#include "repo/repo.h"
#include "snapshot/mount_wire.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

static int store_file(struct image_session *s, char *word, struct vm_error **err)
{
    char *path = strchr(word, '=');
    struct stat st;
    *path++ = 0;
    cleanup_close int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &st) < 0)
        return error_errno(err, errno, "%s", path);
    struct image_file *file = image_session_file(s, word, (uint64_t)st.st_size, err);
    if (!file)
        return -1;
    for (uint64_t i = 0; i * SEGMENT_BYTES < (uint64_t)st.st_size; i++) {
        struct segment *segment = image_writer_segment(image_session_writer(s), file, i, err);
        if (!segment)
            return -1;
        memset(segment->data, 0, SEGMENT_BYTES);
        memset(segment->given, 0, sizeof(segment->given));
        ssize_t n = pread(fd, segment->data, SEGMENT_BYTES, (off_t)(i * SEGMENT_BYTES));
        for (ssize_t p = 0; p * PAGE_BYTES < n; p++)
            segment->given[p] = true;
        image_writer_put(image_session_writer(s), segment);
    }
    return 0;
}

static int store_one(struct repo *r, const char *name, int n, char **files, struct vm_error **err)
{
    struct import_report report;
    CLEANUP(image_session) struct image_session *s = image_session_begin(r, name, NULL, err);
    if (!s)
        return -1;
    for (int i = 0; i < n; i++) {
        cleanup_free char *word = strdup(files[i]);
        if (!word)
            return error_nomem(err);
        if (store_file(s, word, err) < 0)
            return -1;
    }
    return image_session_commit(s, &report, err);
}

/* NAME may be several, with commas between them. */
static int run_store(int argc, char **argv, struct vm_error **err)
{
    CLEANUP(repo) struct repo *r = repo_open(argv[2], err);
    char *rest = argv[3];
    while (r && rest)
        if (store_one(r, strsep(&rest, ","), argc - 4, argv + 4, err) < 0)
            return -1;
    return r ? 0 : -1;
}

static int print_lease(const struct lease *lease, void *arg, struct vm_error **err)
{
    (void)arg, (void)err;
    printf("%s %s\n", lease->image.name, lease->holder);
    return 0;
}

static int run_leases(char **argv, struct vm_error **err)
{
    CLEANUP(repo) struct repo *r = repo_open(argv[2], err);
    return r ? catalogue_leases(repo_store(r), print_lease, NULL, NULL, err) : -1;
}

static void print_state(const struct mount_state *s)
{
    printf("{\"pid\": %d, \"fetchers\": %u, \"fetcher_pid\": %d, \"images\": %u, \"open_files\": %u,"
           " \"leases\": %u, \"cache_used\": %" PRIu64 ", \"cache_limit\": %" PRIu64
           ", \"reads\": %" PRIu64 ", \"waits\": %" PRIu64 ", \"fetches\": %" PRIu64
           ", \"fetched_bytes\": %" PRIu64 ", \"prefetched_bytes\": %" PRIu64
           ", \"failed_reads\": %" PRIu64 ", \"evicted\": %" PRIu64 ", \"fetcher_starts\": %" PRIu64
           ", \"cache_full\": %" PRIu64 "}\n",
           s->pid, s->fetchers, s->fetcher_pid, s->images, s->open_files, s->leases, s->cache_used,
           s->cache_limit, s->reads, s->waits, s->fetches, s->fetched_bytes, s->prefetched_bytes,
           s->failed_reads, s->evicted, s->fetcher_starts, s->cache_full);
}

static int ask(char **argv, enum mount_type type, const char *name, struct vm_error **err)
{
    static struct mount_packet p;
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof(address.sun_path), "%s", argv[2]);
    cleanup_close int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (connect(fd, (struct sockaddr *)&address, sizeof(address)) < 0)
        return error_errno(err, errno, "%s", argv[2]);
    struct mount_message m = mount_message(type, 1, name);
    if (mount_send(fd, &m, NULL, NULL, 0, err) < 0)
        return -1;
    int r = mount_receive(fd, &p, NULL, 0, NULL, err);
    if (r <= 0)
        return r < 0 ? -1 : error_set(err, VM_ERROR_UNREACHABLE, "the mount ended");
    if (p.m.type == MOUNT_FAILED)
        return error_set(err, (enum vm_error_kind)p.m.kind, "%s", (char *)p.payload);
    if (p.m.type == MOUNT_STATE)
        print_state((const struct mount_state *)p.payload);
    return 0;
}

static int run(int argc, char **argv, struct vm_error **err)
{
    const char *verb = argc > 2 ? argv[1] : "";
    if (!strcmp(verb, "store") && argc > 4)
        return run_store(argc, argv, err);
    if (!strcmp(verb, "leases"))
        return run_leases(argv, err);
    if (!strcmp(verb, "status"))
        return ask(argv, MOUNT_STATUS, NULL, err);
    if (!strcmp(verb, "refresh"))
        return ask(argv, MOUNT_REFRESH, NULL, err);
    if (!strcmp(verb, "stop"))
        return ask(argv, MOUNT_STOP, NULL, err);
    if (!strcmp(verb, "record") && argc > 3)
        return ask(argv, MOUNT_RECORD, argv[3], err);
    return error_set(err, VM_ERROR_USAGE, "see the source");
}

int main(int argc, char **argv)
{
    cleanup_error struct vm_error *err = NULL;
    if (run(argc, argv, &err) == 0)
        return 0;
    fprintf(stderr, "%s: %s\n", error_kind_name(err->kind), error_message(err));
    return error_kind_status(err->kind);
}

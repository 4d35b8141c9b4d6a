/* SPDX-License-Identifier: Apache-2.0 */
#include "agent/makings.h"

#include "agent/repository.h"
#include "agent/vms.h"
#include "base/bytes.h"
#include "base/clock.h"
#include "base/io.h"
#include "base/log.h"
#include "snapshot/rbd_image.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

enum { NOTES_MAX = 1 << 20, LINES_MAX = 128, KILL_TIMEOUT_MS = 10000, PATH_BYTES = 4096, IDENTITY_MAX = 96, END_S = 5 };
#define REST '~' /* behind the VM's name: the note of what is left to be done, and no name has it */
#define AGAIN_NS (60 * NSEC_PER_SEC)

/* ---- taking notes ---- */

static void folder_of(const struct config *config, char out[PATH_BYTES])
{
    snprintf(out, PATH_BYTES, "%s/making", config->state_dir);
}

int making_begin(struct making *m, const struct config *config, const char *vm,
                 struct vm_error **err)
{
    char folder[PATH_BYTES];
    folder_of(config, folder);
    if (io_make_folders(folder, 0700, err) < 0)
        return -1;
    snprintf(m->path, sizeof(m->path), "%.3900s/%s", folder, vm);
    m->fd = open(m->path, O_WRONLY | O_CREAT | O_EXCL | O_APPEND | O_CLOEXEC, 0600);
    if (m->fd >= 0)
        return 0;
    return errno == EEXIST
               ? error_set(err, VM_ERROR_CONFLICT,
                           "what is left of a VM %s that was being made when the agent died could not be taken back: "
                           "the agent's log says why; start it again when that is mended", vm)
               : error_errno(err, errno, "cannot make %s", m->path);
}

static int write_line(struct making *m, const char *line, int n, struct vm_error **err)
{
    if (n >= PATH_BYTES + 64)
        return error_set(err, VM_ERROR_USAGE, "a path is too long");
    return write(m->fd, line, (size_t)n) == n ? 0
                                              : error_errno(err, errno, "cannot write %s", m->path);
}

#define LINE(m, err, ...)                                                                          \
    ({                                                                                             \
        char line_[PATH_BYTES + 64];                                                               \
        write_line(m, line_, snprintf(line_, sizeof(line_), __VA_ARGS__), err);                    \
    })

int making_lease(struct making *m, const char *holder, struct vm_error **err)
{
    return LINE(m, err, "lease %s\n", holder);
}

/* Which file it is, as a text. The number of an inode is given again at once, so its birth is part of that. */
static int identify(const char *path, char out[IDENTITY_MAX], struct statx *ret)
{
    if (statx(AT_FDCWD, path, AT_SYMLINK_NOFOLLOW, STATX_BASIC_STATS | STATX_BTIME, ret) < 0)
        return -1;
    snprintf(out, IDENTITY_MAX, "%" PRIu32 ":%" PRIu32 ":%" PRIu64 ":%" PRId64 ".%" PRIu32,
             (uint32_t)ret->stx_dev_major, (uint32_t)ret->stx_dev_minor, (uint64_t)ret->stx_ino,
             (int64_t)ret->stx_btime.tv_sec, (uint32_t)ret->stx_btime.tv_nsec);
    return 0;
}

int making_file(struct making *m, const char *path, struct vm_error **err)
{
    struct statx st;
    char identity[IDENTITY_MAX];
    if (identify(path, identity, &st) < 0)
        return error_errno(err, errno, "%s", path);
    return LINE(m, err, "file %s %s\n", identity, path);
}

int making_image(struct making *m, const char *name, const char *id, struct vm_error **err)
{
    return LINE(m, err, "image %s %s\n", id, name);
}

int making_socket(struct making *m, const char *path, struct vm_error **err)
{
    return LINE(m, err, "socket %s\n", path);
}

int making_cgroup(struct making *m, const char *path, struct vm_error **err)
{
    return LINE(m, err, "cgroup %s\n", path);
}

int making_born(const struct process_identity *process, void *arg, struct vm_error **err)
{
    return LINE(arg, err, "process %" PRId32 " %" PRIu64 " %s\n", process->pid, process->start,
                uuid_text(&process->boot));
}

void making_end(struct making *m)
{
    if (m->fd < 0)
        return;
    unlink(m->path);
    close_fd(&m->fd);
}

/* ---- what a note says ---- */

struct notes {
    struct process_identity process; /* pid 0: none */
    char *files[LINES_MAX], *sockets[LINES_MAX], *cgroups[LINES_MAX], *leases[LINES_MAX], *images[LINES_MAX];
    unsigned n_files, n_sockets, n_cgroups, n_leases, n_images;
};

static void keep_line(char **list, unsigned *n, char *line)
{
    if (*n < LINES_MAX)
        list[(*n)++] = line;
}

static void read_process(const char *line, struct process_identity *ret)
{
    struct process_identity p;
    char boot[UUID_TEXT_SIZE];
    if (sscanf(line, "%" SCNd32 " %" SCNu64 " %36s", &p.pid, &p.start, boot) == 3 &&
        uuid_parse(boot, &p.boot))
        *ret = p;
}

/* A last line that is not complete was never acted upon. */
static void parse(char *text, struct notes *ret)
{
    char *end;
    for (char *line = text; (end = strchr(line, '\n')); line = end + 1) {
        *end = 0;
        if (!strncmp(line, "lease ", 6))
            keep_line(ret->leases, &ret->n_leases, line + 6);
        else if (!strncmp(line, "file ", 5))
            keep_line(ret->files, &ret->n_files, line + 5);
        else if (!strncmp(line, "image ", 6))
            keep_line(ret->images, &ret->n_images, line + 6);
        else if (!strncmp(line, "socket ", 7))
            keep_line(ret->sockets, &ret->n_sockets, line + 7);
        else if (!strncmp(line, "cgroup ", 7))
            keep_line(ret->cgroups, &ret->n_cgroups, line + 7);
        else if (!strncmp(line, "process ", 8))
            read_process(line + 8, &ret->process);
    }
}

/* *ret_text is what `ret` points into: free it. */
static int read_notes(const char *path, char **ret_text, struct notes *ret, struct vm_error **err)
{
    size_t len;
    if (io_read_file(path, NOTES_MAX, ret_text, &len, err) < 0)
        return -1;
    *ret = (struct notes){.n_files = 0};
    parse(*ret_text, ret);
    return 0;
}

static void put_line(struct buffer *text, const char *kind, const char *line)
{
    buffer_put(text, kind, strlen(kind));
    buffer_put(text, line, strlen(line));
    buffer_put(text, "\n", 1);
}

/*
 * Another note takes the place of this one: of what is left to be done, however long that takes. It
 * names leases, and images if they are to go: what nobody else can ever have, and never a file, a
 * socket or a process, which by then may be somebody else's, or the VM's own. Without room for it
 * leases and images stay for ever: that is better than to act upon the former note again.
 */
static void leave_rest(const char *path, const struct notes *notes, bool images)
{
    char rest[2 * PATH_BYTES];
    struct uuid unique = uuid_new();
    cleanup_buffer struct buffer text = {0};
    cleanup_error struct vm_error *err = NULL;
    for (unsigned i = 0; i < notes->n_leases; i++)
        put_line(&text, "lease ", notes->leases[i]);
    for (unsigned i = 0; images && i < notes->n_images; i++)
        put_line(&text, "image ", notes->images[i]);
    snprintf(rest, sizeof(rest), "%s%c%.8s", path, REST, uuid_text(&unique));
    if (text.len && (text.failed || io_write_file_durably(rest, text.data, text.len, 0600, &err) < 0))
        log_error("leases or images of a VM that was being made stay", "note=%s error=%s", log_q(path),
                  log_q(err ? error_message(err) : "no memory"));
    unlink(path);
}

/* ---- after a crash ---- */

static void remove_file(const char *line)
{
    struct statx st;
    char identity[IDENTITY_MAX];
    size_t n = strcspn(line, " ");
    const char *path = line + n + 1;
    if (!line[n] || identify(path, identity, &st) < 0 || strlen(identity) != n || strncmp(identity, line, n) != 0)
        return;
    if ((S_ISDIR(st.stx_mode) ? rmdir(path) : unlink(path)) < 0)
        log_warn("what a VM that was being made left stays there", "path=%s errno=%d", log_q(path),
                 errno);
}

static bool is_vm(struct agent *agent, const char *name, const struct process_identity *process)
{
    CLEANUP(vm) struct vm *vm = vms_get(agent->vms, name, NULL);
    return vm && process_identity_equal(&vm_definition(vm)->process, process);
}

static void undo(const char *name, const struct notes *notes)
{
    cleanup_error struct vm_error *err = NULL;
    log_warn("a VM was being made when the agent died; it is removed", "vm=%s", log_q(name));
    if (notes->process.pid && process_kill(&notes->process, KILL_TIMEOUT_MS, &err) < 0)
        log_error("a VM that was being made does not end", "vm=%s error=%s", log_q(name),
                  log_q(error_message(err)));
    for (unsigned i = 0; i < notes->n_sockets; i++)
        unlink(notes->sockets[i]);
    for (unsigned i = notes->n_files; i > 0; i--)
        remove_file(notes->files[i - 1]);
    for (unsigned i = 0; i < notes->n_cgroups; i++)
        rmdir(notes->cgroups[i]);
}

static void settle(struct agent *agent, const char *folder, const char *name)
{
    char path[2 * PATH_BYTES];
    cleanup_free char *text = NULL;
    struct notes notes;
    snprintf(path, sizeof(path), "%s/%s", folder, name);
    if (read_notes(path, &text, &notes, NULL) < 0) {
        log_warn("notes of a VM that was being made cannot be read", "path=%s", log_q(path));
        return;
    }
    bool made = notes.process.pid && is_vm(agent, name, &notes.process);
    if (!made)
        undo(name, &notes);
    leave_rest(path, &notes, !made);
}

/* ---- what may take long: leases, and images in Ceph ---- */

struct makings {
    struct agent *agent;
    pthread_t thread;
    int stop, poke; /* latches; a poke is taken back */
};

struct dropping {
    struct store *store;
    const struct notes *notes;
};

static int drop_if_listed(const struct lease *lease, void *arg, struct vm_error **err)
{
    const struct dropping *d = arg;
    for (unsigned i = 0; i < d->notes->n_leases; i++)
        if (!strcmp(lease->holder, d->notes->leases[i]))
            return catalogue_lease_drop(d->store, lease, err);
    return 0;
}

static int drop_leases(struct makings *m, const struct notes *notes, struct vm_error **err)
{
    struct repo *repo = notes->n_leases ? repository_get(m->agent->repository, err) : NULL;
    if (!repo)
        return notes->n_leases ? -1 : 0;
    struct dropping d = {repo_store(repo), notes};
    return catalogue_leases(d.store, drop_if_listed, NULL, &d, err);
}

static int remove_image(char *line, struct vm_error **err)
{
    char *name = strchr(line, ' ');
    if (!name)
        return 0;
    *name++ = 0;
    return rbd_image_remove(name, line, NULL, err);
}

/* The note goes when all of it is done. */
static void settle_rest(struct makings *m, const char *path)
{
    cleanup_free char *text = NULL;
    struct notes notes;
    bool done = true;
    if (read_notes(path, &text, &notes, NULL) < 0)
        return;
    for (unsigned i = 0; i <= notes.n_images; i++) {
        cleanup_error struct vm_error *err = NULL;
        if ((i < notes.n_images ? remove_image(notes.images[i], &err) : drop_leases(m, &notes, &err)) == 0)
            continue;
        log_warn("what a VM that was being made left stays there for now", "error=%s", log_q(error_message(err)));
        done = false;
    }
    if (done)
        unlink(path);
}

/* rests: those of what is left to be done; or the others. */
static void for_each_note(struct makings *m, bool rests)
{
    char folder[PATH_BYTES], path[2 * PATH_BYTES];
    struct dirent *e;
    folder_of(m->agent->config, folder);
    DIR *dir = opendir(folder);
    while (dir && (e = readdir(dir))) {
        if (*e->d_name == '.' || rests != !!strchr(e->d_name, REST))
            continue;
        snprintf(path, sizeof(path), "%s/%s", folder, e->d_name);
        if (rests)
            settle_rest(m, path);
        else
            settle(m->agent, folder, e->d_name);
    }
    if (dir)
        closedir(dir);
}

static void *settle_rests(void *arg)
{
    struct makings *m = arg;
    uint64_t pokes;
    while (!io_latch_is_set(m->stop)) {
        for_each_note(m, true);
        io_wait(m->poke, POLLIN, clock_mono_ns() + AGAIN_NS, m->stop, NULL);
        if (read(m->poke, &pokes, sizeof(pokes)) < 0)
            continue; /* nobody did */
    }
    return NULL;
}

/* ---- all of them ---- */

void making_leave(struct making *m, struct agent *agent, bool made)
{
    cleanup_free char *text = NULL;
    struct notes notes;
    cleanup_error struct vm_error *err = NULL;
    if (m->fd < 0)
        return;
    if (read_notes(m->path, &text, &notes, &err) == 0)
        leave_rest(m->path, &notes, !made);
    else
        log_error("leases or images of a VM that was being made stay", "error=%s", log_q(error_message(err)));
    making_end(m);
    if (agent->makings)
        io_latch_set(agent->makings->poke);
}

struct makings *makings_start(struct agent *agent, struct vm_error **err)
{
    struct makings *m = calloc(1, sizeof(*m));
    if (!m) {
        error_nomem(err);
        return NULL;
    }
    m->agent = agent;
    m->stop = io_latch_new(err);
    m->poke = m->stop < 0 ? -1 : io_latch_new(err);
    if (m->poke >= 0) {
        for_each_note(m, false);
        int failed = pthread_create(&m->thread, NULL, settle_rests, m);
        if (!failed)
            return m;
        error_errno(err, failed, "cannot start a thread");
    }
    close_fd(&m->stop);
    close_fd(&m->poke);
    free(m);
    return NULL;
}

bool makings_finish(struct makings *m)
{
    struct timespec until;
    if (!m)
        return true;
    io_latch_set(m->stop);
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += END_S;
    if (pthread_clockjoin_np(m->thread, NULL, CLOCK_MONOTONIC, &until) != 0)
        return false;
    close_fd(&m->stop);
    close_fd(&m->poke);
    free(m);
    return true;
}

/* SPDX-License-Identifier: Apache-2.0 */
#include "agent/makings.h"

#include "agent/repository.h"
#include "agent/vms.h"
#include "base/io.h"
#include "base/log.h"
#include "snapshot/rbd_image.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

enum { NOTES_MAX = 1 << 20, LINES_MAX = 128, KILL_TIMEOUT_MS = 10000, FINISH_TIMEOUT_S = 2, PATH_BYTES = 4096 };

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
                           "a VM %s that was being made when the agent died is not cleaned up yet", vm)
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

int making_file(struct making *m, const char *path, struct vm_error **err)
{
    struct stat st;
    if (lstat(path, &st) < 0)
        return error_errno(err, errno, "%s", path);
    return LINE(m, err, "file %" PRIu64 ":%" PRIu64 " %s\n", (uint64_t)st.st_dev,
                (uint64_t)st.st_ino, path);
}

int making_image(struct making *m, const char *name, const char *id, struct vm_error **err)
{
    return LINE(m, err, "image %s %s\n", id, name);
}

int making_socket(struct making *m, const char *path, struct vm_error **err)
{
    return LINE(m, err, "socket %s\n", path);
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

/* ---- after a crash ---- */

struct notes {
    struct process_identity process; /* pid 0: none */
    char *files[LINES_MAX], *sockets[LINES_MAX], *leases[LINES_MAX], *images[LINES_MAX];
    unsigned n_files, n_sockets, n_leases, n_images;
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
        else if (!strncmp(line, "process ", 8))
            read_process(line + 8, &ret->process);
    }
}

static void remove_file(const char *line)
{
    uint64_t dev, ino;
    int at = 0;
    struct stat st;
    if (sscanf(line, "%" SCNu64 ":%" SCNu64 " %n", &dev, &ino, &at) != 2 || !at)
        return;
    const char *path = line + at;
    if (lstat(path, &st) < 0 || st.st_dev != dev || st.st_ino != ino)
        return;
    if ((S_ISDIR(st.st_mode) ? rmdir(path) : unlink(path)) < 0)
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
}

/* ---- what may take long: leases, and images in Ceph ---- */

struct makings {
    struct agent *agent;
    pthread_t thread;
    char *holders[LINES_MAX], *paths[LINES_MAX]; /* and the notes that they are from */
    unsigned n;
    char *images[LINES_MAX]; /* of VMs that are no more: "ID NAME" */
    unsigned n_images;
};

static int drop_if_listed(const struct lease *lease, void *arg, struct vm_error **err)
{
    struct makings *m = arg;
    for (unsigned i = 0; i < m->n; i++)
        if (!strcmp(lease->holder, m->holders[i]))
            return catalogue_lease_drop(repo_store(repository_get(m->agent->repository, NULL)),
                                        lease, err);
    return 0;
}

/* False: one stays, and so do the notes, for the next start. */
static bool remove_images(struct makings *m)
{
    bool all = true;
    for (unsigned i = 0; i < m->n_images; i++) {
        cleanup_error struct vm_error *err = NULL;
        char *name = strchr(m->images[i], ' ');
        if (!name)
            continue;
        *name++ = 0;
        if (rbd_image_remove(name, m->images[i], &err) == 0)
            continue;
        all = false;
        log_warn("what a VM that was being made left stays there", "error=%s", log_q(error_message(err)));
    }
    return all;
}

static void *settle_slowly(void *arg)
{
    struct makings *m = arg;
    cleanup_error struct vm_error *err = NULL;
    bool all = remove_images(m);
    struct repo *repo = repository_get(m->agent->repository, &err);
    if (!repo || catalogue_leases(repo_store(repo), drop_if_listed, NULL, m, &err) < 0) {
        log_warn("leases of VMs that were being made stay in the repository", "error=%s",
                 log_q(error_message(err)));
        return NULL; /* the notes stay for the next start */
    }
    for (unsigned i = 0; i < m->n && all; i++)
        unlink(m->paths[i]);
    return NULL;
}

/* ---- all of them ---- */

static void settle_one(struct makings *m, const char *folder, const char *name)
{
    char path[2 * PATH_BYTES];
    cleanup_free char *text = NULL;
    size_t len;
    struct notes notes = {.n_files = 0};
    cleanup_error struct vm_error *err = NULL;
    snprintf(path, sizeof(path), "%s/%s", folder, name);
    if (io_read_file(path, NOTES_MAX, &text, &len, &err) < 0) {
        log_warn("notes of a VM that was being made cannot be read", "path=%s", log_q(path));
        return;
    }
    parse(text, &notes);
    if (!notes.process.pid || !is_vm(m->agent, name, &notes.process)) {
        undo(name, &notes);
        for (unsigned i = 0; i < notes.n_images && m->n_images < LINES_MAX; i++)
            if ((m->images[m->n_images] = strdup(notes.images[i])))
                m->n_images++;
    }
    if (!notes.n_leases) {
        unlink(path);
        return;
    }
    for (unsigned i = 0; i < notes.n_leases && m->n < LINES_MAX; i++) {
        m->holders[m->n] = strdup(notes.leases[i]);
        m->paths[m->n] = strdup(path);
        m->n += m->holders[m->n] && m->paths[m->n];
    }
}

struct makings *makings_settle(struct agent *agent)
{
    char folder[PATH_BYTES];
    struct dirent *e;
    folder_of(agent->config, folder);
    DIR *dir = opendir(folder);
    if (!dir)
        return NULL;
    struct makings *m = calloc(1, sizeof(*m));
    if (m)
        m->agent = agent;
    while (m && (e = readdir(dir)))
        if (*e->d_name != '.')
            settle_one(m, folder, e->d_name);
    closedir(dir);
    if (m && m->n && pthread_create(&m->thread, NULL, settle_slowly, m) == 0)
        return m;
    free(m);
    return NULL;
}

bool makings_finish(struct makings *m)
{
    struct timespec limit;
    if (!m)
        return true;
    clock_gettime(CLOCK_MONOTONIC, &limit);
    limit.tv_sec += FINISH_TIMEOUT_S;
    if (pthread_clockjoin_np(m->thread, NULL, CLOCK_MONOTONIC, &limit))
        return false;
    for (unsigned i = 0; i < m->n; i++) {
        free(m->holders[i]);
        free(m->paths[i]);
    }
    for (unsigned i = 0; i < m->n_images; i++)
        free(m->images[i]);
    free(m);
    return true;
}

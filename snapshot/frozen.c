/* SPDX-License-Identifier: Apache-2.0 */
#include "snapshot/frozen.h"

#include "base/cleanup.h"
#include "base/clock.h"
#include "base/io.h"
#include "base/log.h"
#include "snapshot/guest_agent.h"
#include "vmm/spawn.h"

#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#define ATTEMPT_NS (5 * NSEC_PER_SEC)
#define RESTORED_NS (10 * NSEC_PER_SEC)

void thawer_paths(const struct thawer *t, char ret_binary[FROZEN_PATH_MAX], char ret_log[FROZEN_PATH_MAX])
{
    snprintf(ret_binary, FROZEN_PATH_MAX, "%s/vmmig-guard", t->libexec_dir);
    snprintf(ret_log, FROZEN_PATH_MAX, "%s/guard.log", t->log_dir);
}

void frozen_path(const struct thawer *t, const struct process_identity *process,
                 char out[FROZEN_PATH_MAX])
{
    snprintf(out, FROZEN_PATH_MAX, "%s/%" PRId32 "-%" PRIu64 ".frozen", t->dir, process->pid,
             process->start);
}

/* Before the socket's path, which is absolute: whoever listens there has to be the VMM (snapshot/guest_agent.h). */
#define OWN "own:"

int frozen_note(const char *path, const char *socket, struct vm_error **err)
{
    return io_write_file_durably(path, socket, strlen(socket), 0600, err);
}

static int note_own(const char *path, const char *socket, struct vm_error **err)
{
    char text[FROZEN_PATH_MAX];
    int n = snprintf(text, sizeof(text), OWN "%s", socket);
    return n < (int)sizeof(text) ? frozen_note(path, text, err)
                                 : error_set(err, VM_ERROR_USAGE, "the path of the guest's agent is too long");
}

bool frozen_is_noted(const char *path)
{
    return access(path, F_OK) == 0;
}

void frozen_forget(const char *path)
{
    unlink(path);
}

int frozen_thaw_later(const struct thawer *t, const struct process_identity *process,
                      struct vm_error **err)
{
    char binary[FROZEN_PATH_MAX], log[FROZEN_PATH_MAX], path[FROZEN_PATH_MAX], pid[16], start[24];
    struct process_identity thawing;
    thawer_paths(t, binary, log);
    frozen_path(t, process, path);
    snprintf(pid, sizeof(pid), "%" PRId32, process->pid);
    snprintf(start, sizeof(start), "%" PRIu64, process->start);
    const char *argv[] = {binary, "--frozen", path, "--process", pid, "--start", start, NULL};
    struct spawn_params spawn = {
        .binary = binary, .argv = (char *const *)(uintptr_t)argv, .log_path = log};
    return spawn_process(&spawn, &thawing, err);
}

/* ---- a guest that goes on ---- */

#define STOOD "the guest's file systems are frozen, as they were when it was snapshotted"

int frozen_expect(const struct thawer *t, const struct process_identity *process, char *const *argv,
                  const char *cwd, struct vm_error **err)
{
    char path[FROZEN_PATH_MAX];
    cleanup_free char *socket = guest_agent_find(argv, cwd);
    if (!socket)
        return error_set(err, VM_ERROR_NOT_FOUND, "the VM's command line names no socket of the guest's agent");
    frozen_path(t, process, path);
    return note_own(path, socket, err);
}

static int thaw_through(const struct process_identity *process, char *const *argv, const char *cwd,
                        struct vm_error **err)
{
    int64_t deadline = clock_mono_ns() + RESTORED_NS;
    cleanup_free char *socket = guest_agent_find(argv, cwd);
    CLEANUP(guest_agent) struct guest_agent *ga = socket ? guest_agent_open(socket, process, deadline, err) : NULL;
    return ga ? guest_agent_thaw(ga, deadline, err) : -1;
}

int frozen_thaw_restored(const struct thawer *t, const struct process_identity *process, char *const *argv,
                         const char *cwd, bool runs, struct vm_error **err)
{
    char path[FROZEN_PATH_MAX];
    frozen_path(t, process, path);
    if (frozen_expect(t, process, argv, cwd, err) < 0)
        return error_wrap(err, STOOD "; thaw them by hand (guest-fsfreeze-thaw)");
    if (runs && thaw_through(process, argv, cwd, err) == 0) {
        frozen_forget(path);
        return 0;
    }
    if (frozen_thaw_later(t, process, NULL) < 0)
        return error_wrap(err, STOOD ", and could not be thawed: do so by hand (guest-fsfreeze-thaw)");
    return runs ? error_wrap(err, STOOD "; trying again to thaw them until they are")
                : error_set(err, VM_ERROR_CONFLICT, STOOD "; they are thawed soon after it goes on");
}

/* ---- the process that tries ---- */

/* The note that is open; a later one is another file, even if it says the same. */
static bool is_note(int fd, const char *path)
{
    struct stat ours, there;
    return fstat(fd, &ours) == 0 && stat(path, &there) == 0 && ours.st_ino == there.st_ino &&
           ours.st_dev == there.st_dev;
}

/* 1: there is nothing to thaw any more. */
static int attempt(int note, const char *path, const char *noted, const struct process_identity *process,
                   struct vm_error **err)
{
    int64_t deadline = clock_mono_ns() + ATTEMPT_NS;
    bool own = !strncmp(noted, OWN, strlen(OWN));
    CLEANUP(guest_agent)
    struct guest_agent *ga = guest_agent_open(own ? noted + strlen(OWN) : noted, own ? process : NULL, deadline, err);
    if (!ga)
        return -1;
    if (!is_note(note, path)) /* while we waited for the socket: what is frozen now is another's */
        return 1;
    if (guest_agent_thaw(ga, deadline, err) < 0)
        return -1;
    frozen_forget(path); /* before the next one gets the socket */
    log_info("the guest's file systems are thawed", "note=%s", log_q(path));
    return 0;
}

static void keep_trying(int note, const char *path, const char *noted,
                        const struct process_identity *process)
{
    bool told = false;
    for (int pause_s = 1; process_alive(process);) {
        cleanup_error struct vm_error *err = NULL;
        if (!is_note(note, path) || attempt(note, path, noted, process, &err) >= 0)
            return;
        if (!told)
            log_error("the guest's file systems may still be frozen; trying to thaw them again",
                      "note=%s error=%s", log_q(path), log_q(error_message(err)));
        told = true;
        poll(NULL, 0, pause_s * 1000);
        pause_s = pause_s * 2 < FROZEN_PAUSE_MAX_S ? pause_s * 2 : FROZEN_PAUSE_MAX_S;
    }
    frozen_forget(path);
}

void frozen_thaw(const char *path, const struct process_identity *process)
{
    cleanup_free char *noted = NULL;
    cleanup_error struct vm_error *err = NULL;
    size_t n;
    cleanup_close int note = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
    if (note < 0 || flock(note, LOCK_EX | LOCK_NB) < 0)
        return;
    if (io_read_all(note, path, FROZEN_PATH_MAX, &noted, &n, &err) < 0)
        log_error("whose file systems are frozen is not known", "error=%s",
                  log_q(error_message(err)));
    else
        keep_trying(note, path, noted, process);
}

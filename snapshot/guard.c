/* SPDX-License-Identifier: Apache-2.0 */
#include "snapshot/guard.h"

#include "base/clock.h"
#include "base/io.h"
#include "base/log.h"
#include "vmm/attach.h"
#include "vmm/spawn.h"
#include "vmm/write_protection.h"

#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>

enum { END_TIMEOUT_MS = 5000, NOTE_MAX = 128 };

struct guard {
    int socket;
    struct process_identity process, vmm;
    bool attach;
    char note_path[GUARD_PATH_MAX];
};

/* ---- the note ---- */

static int write_note(const struct guard *g, struct vm_error **err)
{
    char text[NOTE_MAX];
    int n = snprintf(text, sizeof(text), "%" PRId32 " %" PRIu64 " %" PRId32 " %" PRIu64 " %d\n",
                     g->vmm.pid, g->vmm.start, g->process.pid, g->process.start, g->attach);
    return io_write_file_durably(g->note_path, text, (size_t)n, 0600, err);
}

struct note {
    struct process_identity vmm, guard;
    int attach;
};

/* False: there is none of this VMM, which is of the boot that the note is of. */
static bool read_note(const char *path, const struct process_identity *vmm, struct note *ret)
{
    cleanup_free char *text = NULL;
    size_t n;
    cleanup_error struct vm_error *absent = NULL;
    if (io_read_file(path, NOTE_MAX, &text, &n, &absent) < 0)
        return false;
    *ret = (struct note){.vmm = *vmm, .guard = *vmm};
    return sscanf(text, "%" SCNd32 " %" SCNu64 " %" SCNd32 " %" SCNu64 " %d", &ret->vmm.pid, &ret->vmm.start,
               &ret->guard.pid, &ret->guard.start, &ret->attach) == 5 &&
           process_identity_equal(&ret->vmm, vmm);
}

bool guard_is_noted(const char *note_path, const struct process_identity *vmm, pid_t guard)
{
    struct note note;
    return read_note(note_path, vmm, &note) && note.guard.pid == guard;
}

bool guard_lives(const char *note_path, const struct process_identity *vmm)
{
    struct note note;
    return read_note(note_path, vmm, &note) && process_alive(&note.guard);
}

int guard_settle_before(const char *note_path, const struct process_identity *process,
                        struct vm_error **err)
{
    struct note note;
    bool found = false;
    int r = 0;
    if (!read_note(note_path, process, &note))
        return 0;
    if (note.attach)
        r = process_alive(&note.guard) ? process_kill(&note.guard, END_TIMEOUT_MS, err) : 0;
    else if (!process_alive(&note.guard))
        r = write_protection_lift(process, &found, err);
    if (found)
        log_warn("the guest's memory was left write-protected; it is free again", "pid=%d",
                 process->pid);
    return r;
}

/* Whoever tries already is not disturbed. */
static void thaw_later(const struct thawer *thawer, const struct process_identity *vmm)
{
    char path[FROZEN_PATH_MAX];
    cleanup_error struct vm_error *err = NULL;
    frozen_path(thawer, vmm, path);
    if (frozen_is_noted(path) && frozen_thaw_later(thawer, vmm, &err) < 0)
        log_error("the guest's file systems may still be frozen", "error=%s",
                  log_q(error_message(err)));
}

void guard_settle(const char *note_path, const struct thawer *thawer, struct guest *guest)
{
    struct note note;
    cleanup_error struct vm_error *err = NULL;
    bool noted = read_note(note_path, &guest->process, &note);
    if (noted && note.attach && attach_let_go(attach_from_guest(guest), &err) < 0)
        log_error("a guest that was paused for a snapshot still stands", "pid=%d error=%s",
                  guest->process.pid, log_q(error_message(err)));
    if (!noted || !process_alive(&note.guard)) /* else the guard does so */
        thaw_later(thawer, &guest->process);
    if (noted)
        unlink(note_path);
}

/* ---- its life ---- */

struct guard *guard_start(const struct guard_params *params, struct vm_error **err)
{
    char fd[16], pid[16], start[24];
    char binary[FROZEN_PATH_MAX], log[FROZEN_PATH_MAX], frozen[FROZEN_PATH_MAX];
    int pair[2];
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0) {
        error_errno(err, errno, "cannot make a socket");
        return NULL;
    }
    cleanup_close int ours = pair[0], theirs = pair[1];
    snprintf(fd, sizeof(fd), "%d", theirs);
    snprintf(pid, sizeof(pid), "%" PRId32, params->process.pid);
    snprintf(start, sizeof(start), "%" PRIu64, params->process.start);
    thawer_paths(&params->thawer, binary, log);
    frozen_path(&params->thawer, &params->process, frozen);
    const char *argv[] = {binary, "--socket", fd, "--frozen", frozen,
                          params->attach ? "--attach" : "--qmp", params->socket_path,
                          "--process", pid, "--start", start, "--note", params->note_path, NULL};
    struct spawn_params spawn = {.binary = binary,
                                 .argv = (char *const *)(uintptr_t)argv,
                                 .log_path = log,
                                 .fds = &theirs,
                                 .n_fds = 1};
    struct guard *g = calloc(1, sizeof(*g));
    if (!g) {
        error_nomem(err);
        return NULL;
    }
    g->vmm = params->process;
    g->attach = params->attach;
    snprintf(g->note_path, sizeof(g->note_path), "%s", params->note_path);
    if (spawn_process(&spawn, &g->process, err) < 0) {
        free(g);
        return NULL;
    }
    g->socket = steal_fd(&ours);
    if (write_note(g, err) == 0)
        return g;
    guard_end(g);
    return NULL;
}

int guard_stream(struct guard *g, int fd, struct vm_error **err)
{
    char word = GUARD_STREAM;
    return io_send_fds(g->socket, &word, 1, &fd, 1, err) < 0
               ? error_wrap(err, "the snapshot's guard (%d)", g->process.pid)
               : 0;
}

void guard_end(struct guard *g)
{
    if (!g)
        return;
    char word = GUARD_END;
    cleanup_close int process = (int)syscall(SYS_pidfd_open, g->process.pid, 0);
    struct pollfd ended = {.fd = process, .events = POLLIN};
    if (send(g->socket, &word, 1, MSG_NOSIGNAL) == 1 && process_alive(&g->process))
        poll(&ended, 1, END_TIMEOUT_MS);
    close_fd(&g->socket);
    unlink(g->note_path);
    free(g);
}

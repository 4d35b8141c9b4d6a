/* SPDX-License-Identifier: Apache-2.0 */
#include "snapshot/guard.h"

#include "base/clock.h"
#include "base/io.h"
#include "base/log.h"
#include "snapshot/guest_agent.h"
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

enum { END_TIMEOUT_MS = 5000, NOTE_MAX = 2 * GUARD_PATH_MAX };
#define THAW_NS (10 * NSEC_PER_SEC)

struct guard {
    int socket;
    struct process_identity process, vmm;
    bool attach;
    char note_path[GUARD_PATH_MAX];
};

/* ---- the note ---- */

static int write_note(const struct guard *g, const char *guest_agent, struct vm_error **err)
{
    char text[NOTE_MAX];
    int n = snprintf(text, sizeof(text), "%" PRId32 " %" PRIu64 " %" PRId32 " %" PRIu64 " %d\n%s",
                     g->vmm.pid, g->vmm.start, g->process.pid, g->process.start, g->attach, guest_agent);
    return io_write_file_durably(g->note_path, text, (size_t)n, 0600, err);
}

struct note {
    struct process_identity vmm, guard;
    int attach;
    const char *guest_agent;
    char *text;
};

/* False: there is none of this VMM. */
static bool read_note(const char *path, const struct process_identity *vmm, struct note *ret)
{
    char *text = NULL;
    size_t n;
    cleanup_error struct vm_error *absent = NULL;
    if (io_read_file(path, NOTE_MAX, &text, &n, &absent) < 0)
        return false;
    *ret = (struct note){.vmm = *vmm, .guard = *vmm, .text = text};
    char *line = strchr(text, '\n');
    ret->guest_agent = line ? line + 1 : "";
    if (sscanf(text, "%" SCNd32 " %" SCNu64 " %" SCNd32 " %" SCNu64 " %d", &ret->vmm.pid, &ret->vmm.start,
               &ret->guard.pid, &ret->guard.start, &ret->attach) == 5 &&
        process_identity_equal(&ret->vmm, vmm))
        return true;
    free(text);
    return false;
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
    free(note.text);
    if (found)
        log_warn("the guest's memory was left write-protected; it is free again", "pid=%d",
                 process->pid);
    return r;
}

static void thaw(const char *guest_agent)
{
    cleanup_error struct vm_error *err = NULL;
    int64_t deadline = clock_mono_ns() + THAW_NS;
    CLEANUP(guest_agent) struct guest_agent *ga = guest_agent_open(guest_agent, deadline, &err);
    if (!ga || guest_agent_thaw(ga, deadline, &err) < 0)
        log_error("the guest's file systems may still be frozen", "error=%s",
                  log_q(error_message(err)));
}

void guard_settle(const char *note_path, struct guest *guest)
{
    struct note note;
    cleanup_error struct vm_error *err = NULL;
    if (!read_note(note_path, &guest->process, &note))
        return;
    if (note.attach && attach_let_go(attach_from_guest(guest), &err) < 0)
        log_error("a guest that was paused for a snapshot still stands", "pid=%d error=%s",
                  guest->process.pid, log_q(error_message(err)));
    if (*note.guest_agent && !process_alive(&note.guard))
        thaw(note.guest_agent);
    free(note.text);
    unlink(note_path);
}

/* ---- its life ---- */

struct guard *guard_start(const struct guard_params *params, struct vm_error **err)
{
    char fd[16], pid[16], start[24];
    int pair[2];
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0) {
        error_errno(err, errno, "cannot make a socket");
        return NULL;
    }
    cleanup_close int ours = pair[0], theirs = pair[1];
    snprintf(fd, sizeof(fd), "%d", theirs);
    snprintf(pid, sizeof(pid), "%" PRId32, params->process.pid);
    snprintf(start, sizeof(start), "%" PRIu64, params->process.start);
    const char *argv[] = {params->binary, "--socket", fd,
                          params->attach ? "--attach" : "--qmp", params->socket_path,
                          "--process", pid, "--start", start, "--note", params->note_path, NULL};
    struct spawn_params spawn = {.binary = params->binary,
                                 .argv = (char *const *)(uintptr_t)argv,
                                 .log_path = params->log_path,
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
    if (write_note(g, "", err) == 0)
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

int guard_frozen(struct guard *g, const char *guest_agent, struct vm_error **err)
{
    char packet[GUARD_PATH_MAX + 1] = {GUARD_FROZEN};
    int n = snprintf(packet + 1, GUARD_PATH_MAX, "%s", guest_agent ? guest_agent : "");
    if (n >= GUARD_PATH_MAX)
        return error_set(err, VM_ERROR_USAGE, "the path of the guest's agent is too long");
    if (write_note(g, packet + 1, err) < 0)
        return -1;
    if (send(g->socket, packet, (size_t)n + 1, MSG_NOSIGNAL) < 0)
        return error_errno(err, errno, "the snapshot's guard (%d)", g->process.pid);
    return 0;
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

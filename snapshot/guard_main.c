/* SPDX-License-Identifier: Apache-2.0 */
/* vmmig-guard: snapshot/guard.h says what it does. */
#include "snapshot/guard.h"

#include "base/clock.h"
#include "base/io.h"
#include "base/log.h"
#include "base/options.h"
#include "vmm/attach.h"
#include "vmm/qemu.h"
#include "vmm/qemu_settings.h"
#include "vmm/qemu_snapshot.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { DRAIN_BYTES = 1 << 20, ATTACH_MS = 2000, TRY_AGAIN_MS = 50 };
#define NO_SOCKET UINT64_MAX
#define GIVE_UP_NS (60 * NSEC_PER_SEC)

struct watch {
    uint64_t socket, pid, start;
    char *qmp, *attach, *note; /* qmp or attach: where the VMM answers; NULL: there is but to thaw */
    char *frozen;
    bool help;
    int stream; /* -1: QEMU writes no memory */
    bool ended;
};

/* ---- while the agent lives ---- */

static void note(struct watch *w, char word, int fd)
{
    if (word == GUARD_STREAM && fd >= 0) {
        close_fd(&w->stream);
        w->stream = fd;
        return;
    }
    close_fd(&fd);
    w->ended |= word == GUARD_END;
}

/* Until it says that it is through, or is gone; a connection that fails counts as that. */
static void listen_to_agent(struct watch *w)
{
    while (!w->ended) {
        char word;
        int fd = -1, n_fds = 0;
        if (io_recv_fds((int)w->socket, &word, 1, &fd, 1, &n_fds, NULL) <= 0)
            return;
        note(w, word, n_fds ? fd : -1);
    }
}

/* ---- the agent is gone ---- */

static void *drain(void *arg)
{
    struct watch *w = arg;
    static char nobody[DRAIN_BYTES];
    for (;;) {
        ssize_t n = recv(w->stream, nobody, sizeof(nobody), 0);
        if (n == 0 || (n < 0 && errno != EINTR && errno != EAGAIN))
            return NULL;
        struct pollfd p = {.fd = w->stream, .events = POLLIN};
        if (n < 0 && errno == EAGAIN)
            poll(&p, 1, -1);
    }
}

/* The VMM is of the same boot as we are. */
static int identify(const struct watch *w, struct process_identity *ret, struct vm_error **err)
{
    if (process_identify(getpid(), ret, err) < 0)
        return -1;
    ret->pid = (pid_t)w->pid;
    ret->start = w->start;
    return 0;
}

static bool lives(const struct watch *w)
{
    struct process_identity p;
    return identify(w, &p, NULL) < 0 || process_alive(&p); /* nobody can know */
}

static const char *socket_of(const struct watch *w)
{
    return w->qmp ? w->qmp : w->attach;
}

static int check_process(const struct watch *w, const struct guest *g, struct vm_error **err)
{
    return g->process.start == w->start
               ? 0
               : error_set(err, VM_ERROR_REFUSED, "another process answers at %s", socket_of(w));
}

static int sweep_qemu(struct watch *w, struct vm_error **err)
{
    bool found;
    CLEANUP(qemu) struct qemu *q = qemu_attach(w->qmp, ATTACH_MS, err);
    if (!q || check_process(w, qemu_guest(q), err) < 0 || qemu_snapshot_sweep(q, &found, err) < 0)
        return -1;
    qemu_settings_recover(q);
    return 0;
}

static int let_go(struct watch *w, struct vm_error **err)
{
    CLEANUP(attach) struct attach *a = attach_connect(w->attach, ATTACH_MS, err);
    return !a || check_process(w, attach_guest(a), err) < 0 ? -1 : attach_let_go(a, err);
}

static int sweep(struct watch *w, struct vm_error **err)
{
    return w->qmp ? sweep_qemu(w, err) : let_go(w, err);
}

/* The next agent has swept itself, and taken the note away; or it has written that of another snapshot by now. */
static bool is_taken_over(const struct watch *w)
{
    struct process_identity vmm;
    return identify(w, &vmm, NULL) < 0 || !guard_is_noted(w->note, &vmm, getpid());
}

static void sweep_soon(struct watch *w)
{
    int64_t deadline = clock_mono_ns() + GIVE_UP_NS;
    for (;;) {
        cleanup_error struct vm_error *err = NULL;
        if (sweep(w, &err) == 0) {
            log_info("nothing of the snapshot is left in the VM", "socket=%s", log_q(socket_of(w)));
            return;
        }
        if (!lives(w) || is_taken_over(w))
            return;
        if (clock_mono_ns() >= deadline) {
            log_error("what the snapshot left in the VM stays there", "error=%s",
                      log_q(error_message(err)));
            return;
        }
        poll(NULL, 0, TRY_AGAIN_MS);
    }
}

static int thaw(const struct watch *w, struct vm_error **err)
{
    struct process_identity vmm;
    if (identify(w, &vmm, err) < 0)
        return -1;
    frozen_thaw(w->frozen, &vmm);
    return 0;
}

static int take_over(struct watch *w, struct vm_error **err)
{
    pthread_t drainer;
    bool draining = w->stream >= 0;
    int failed = draining ? pthread_create(&drainer, NULL, drain, w) : 0;
    if (failed)
        return error_errno(err, failed, "cannot start a thread");
    log_warn("the agent ended while it took a snapshot", "socket=%s pid=%llu", log_q(socket_of(w)),
             (unsigned long long)w->pid);
    sweep_soon(w);
    if (draining) {
        pthread_join(drainer, NULL);
        if (!is_taken_over(w)) /* else what is in the VM now is that of the next agent's */
            sweep_soon(w); /* now that QEMU has come to its end: what its user had set */
    }
    return thaw(w, err); /* may take for ever */
}

/* ---- the program ---- */

#define MEMBER(name) .offset = offsetof(struct watch, name)
static const struct option rows[] = {
    {"socket", "FD", option_parse_u64, .max = 1024 * 1024, MEMBER(socket),
     .text = "The connection to the agent"},
    {"qmp", "PATH", option_parse_text, MEMBER(qmp), .text = "QEMU's monitor"},
    {"attach", "PATH", option_parse_text, MEMBER(attach),
     .text = "Or the socket of a VMM that links libvmmig-attach"},
    {"note", "PATH", option_parse_text, MEMBER(note),
     .text = "A file that is gone when another agent has taken over"},
    {"frozen", "PATH", option_parse_text, .required = true, MEMBER(frozen),
     .text = "The note of file systems that are frozen. With nothing else: thaw them"},
    {"process", "PID", option_parse_u64, .max = INT32_MAX, .required = true, MEMBER(pid),
     .text = "The VMM's process"},
    {"start", "TICKS", option_parse_u64, .max = INT64_MAX, .required = true, MEMBER(start),
     .text = "When that process began"},
    {"help", NULL, option_parse_flag, MEMBER(help), .text = "This text"},
    {NULL}};
#undef MEMBER

static int run(int argc, char **argv, struct vm_error **err)
{
    static struct watch w = {.socket = NO_SOCKET, .stream = -1};
    struct positionals p;
    if (argc == 2 && !strcmp(argv[1], "--help")) {
        puts("usage: vmmig-guard OPTION...\n\nStands beside a snapshot that the agent takes, and "
             "lets the guest go on if\nthe agent dies meanwhile. Or thaws a guest's file systems. The agent "
             "starts it.\n");
        options_print_help(stdout, rows, "--");
        return 0;
    }
    if (options_parse(rows, argc - 1, argv + 1, &w, &p, err) < 0)
        return -1;
    bool watching = w.socket != NO_SOCKET;
    if (watching != (w.qmp || w.attach) || watching != !!w.note || (w.qmp && w.attach))
        return error_set(err, VM_ERROR_USAGE,
                         "--socket and --note come with either --qmp or --attach");
    signal(SIGPIPE, SIG_IGN);
    if (!watching)
        return thaw(&w, err);
    listen_to_agent(&w);
    return w.ended ? 0 : take_over(&w, err);
}

int main(int argc, char **argv)
{
    cleanup_error struct vm_error *err = NULL;
    if (run(argc, argv, &err) == 0)
        return 0;
    fprintf(stderr, "vmmig-guard: %s\n", error_message(err));
    return error_kind_status(err ? err->kind : VM_ERROR_FAILED);
}

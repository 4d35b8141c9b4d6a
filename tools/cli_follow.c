/* SPDX-License-Identifier: Apache-2.0 */
#include "tools/cli_follow.h"

#include "base/io.h"
#include "base/uuid.h"
#include "tools/cli_print.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/signalfd.h>
#include <unistd.h>

#define PLAIN_INTERVAL_NS (5 * NSEC_PER_SEC)
enum { TERMINAL_INTERVAL_MS = 200, PLAIN_INTERVAL_MS = 1000, LINE_MAX_BYTES = 1024 };

struct follow {
    const struct cli *cli;
    struct client *client;
    const char *vm;      /* "": a job of the repository */
    struct uuid job;     /* known if vm is "" */
    int signal_fd;
    const struct cli_follow_hooks *hooks; /* NULL: of a VM */
    struct cli_progress progress;
    int interrupts;
    int64_t leave_at_ns; /* INT64_MAX: stay until the end */
};

int cli_follow_prepare(struct vm_error **err)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGINT);
    int fd = -1;
    if (sigprocmask(SIG_BLOCK, &set, NULL) == 0)
        fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    return fd < 0 ? error_errno(err, errno, "cannot take over Ctrl-C") : fd;
}

/* What fits into the terminal's line. */
static int terminal_width(void)
{
    struct winsize w;
    if (ioctl(STDERR_FILENO, TIOCGWINSZ, &w) < 0 || w.ws_col < 20)
        return 80;
    return w.ws_col;
}

void cli_progress_close(struct cli_progress *p)
{
    if (p->line_open)
        fputs("\r\033[K", stderr);
    p->line_open = false;
}

void cli_progress_show(struct cli_progress *p, const Vmmig__Control__Job *job)
{
    char line[LINE_MAX_BYTES];
    cli_format_progress(job, line, sizeof(line));
    if (isatty(STDERR_FILENO)) {
        fprintf(stderr, "\r%.*s\033[K", terminal_width() - 1, line);
        fflush(stderr);
        p->line_open = true;
        return;
    }
    int64_t now = clock_mono_ns();
    if (!*job->vm && !p->printed_ns) /* work that is short says only what came of it */
        p->printed_ns = now;
    if ((!*job->vm || !strcmp(p->phase, job->phase)) && now - p->printed_ns < PLAIN_INTERVAL_NS)
        return;
    fprintf(stderr, "%s\n", line);
    snprintf(p->phase, sizeof(p->phase), "%s", job->phase);
    p->printed_ns = now;
}

/* What `vmmig cancel` takes. */
static const char *subject(const struct follow *f)
{
    return *f->vm ? f->vm : uuid_text(&f->job);
}

/* Tell the agent, over a connection of its own: this one is busy with the watch. */
static void cancel(struct follow *f)
{
    cleanup_error struct vm_error *err = NULL;
    CLEANUP(client) struct client *c = client_open(&f->cli->at, &err);
    cleanup_control_message struct control_message answer = {0};
    Vmmig__Control__Cancel m = VMMIG__CONTROL__CANCEL__INIT;
    m.vm = (char *)(uintptr_t)f->vm;
    if (!*f->vm)
        m.job = (ProtobufCBinaryData){sizeof(f->job.bytes), f->job.bytes};
    if (!c || client_call(c, VMMIG__CONTROL__TYPE__CANCEL, &m.base,
                              VMMIG__CONTROL__TYPE__JOB, &answer, &err) < 0)
        fprintf(stderr, "vmmig: %s\n", error_message(err));
    else
        fprintf(stderr, "vmmig: cancelling; Ctrl-C again leaves without waiting for it\n");
}

/* A Ctrl-C came. */
static void on_interrupt(struct follow *f)
{
    cli_progress_close(&f->progress);
    if (!f->interrupts && f->hooks && f->hooks->ctrl_c_cancels)
        f->interrupts++;
    switch (++f->interrupts) {
    case 1:
        fprintf(stderr,
                "vmmig: the job goes on in the background; Ctrl-C again cancels it now, "
                "`vmmig cancel %s` later\n", subject(f));
        f->leave_at_ns = clock_mono_ns() + FOLLOW_GRACE_NS;
        break;
    case 2:
        cancel(f);
        f->leave_at_ns = INT64_MAX;
        break;
    default:
        f->leave_at_ns = 0;
    }
}

static bool take_interrupt(struct follow *f)
{
    struct signalfd_siginfo info;
    return read(f->signal_fd, &info, sizeof(info)) == sizeof(info);
}

/* The next report. 1, 0 if the user left, -1. */
static int next_report(struct follow *f, struct control_message *ret, struct vm_error **err)
{
    for (;;) {
        cleanup_error struct vm_error *failure = NULL;
        if (f->leave_at_ns != INT64_MAX && clock_mono_ns() >= f->leave_at_ns)
            return 0;
        if (client_receive(f->client, VMMIG__CONTROL__TYPE__JOB, f->leave_at_ns, f->signal_fd,
                               ret, &failure) == 0)
            return 1;
        if (failure->kind == VM_ERROR_CANCELLED && take_interrupt(f))
            on_interrupt(f);
        else if (failure->kind != VM_ERROR_TIMEOUT || f->leave_at_ns == INT64_MAX)
            return error_propagate(err, steal_ptr(&failure));
    }
}

/* Say what it came to. */
static int conclude(const struct follow *f, const Vmmig__Control__Job *job, struct vm_error **err)
{
    bool done = job->state == VMMIG__CONTROL__JOB_STATE__DONE;
    enum vm_error_kind kind = job->error ? error_kind_parse(job->error->kind) : VM_ERROR_FAILED;
    if (f->cli->json && !f->hooks) {
        if (cli_print_json(cli_json_job(job), err) < 0)
            return -1;
        return done ? 0 : error_kind_status(kind);
    }
    if (done && f->hooks)
        return f->hooks->conclude(job, f->hooks->arg, err);
    if (!done)
        return error_set(err, kind, "%s", job->error ? job->error->message : "the job failed");
    cli_print_summary(stdout, job);
    return 0;
}

static int follow(struct follow *f, struct vm_error **err)
{
    for (;;) {
        cleanup_control_message struct control_message m = {0};
        int r = next_report(f, &m, err);
        if (r < 0) {
            cli_progress_close(&f->progress);
            if (err && !f->hooks && (*err)->kind == VM_ERROR_UNREACHABLE)
                error_wrap(err, "%s: the job's end was not seen, ask `vmmig status %s`", f->vm,
                           f->vm);
            return -1;
        }
        if (r == 0)
            return CLI_STATUS_INTERRUPTED;
        if (m.job->state != VMMIG__CONTROL__JOB_STATE__RUNNING) {
            cli_progress_close(&f->progress);
            return conclude(f, m.job, err);
        }
        if (!f->cli->json)
            cli_progress_show(&f->progress, m.job);
    }
}

static int watch_and_follow(struct follow *f, const Vmmig__Control__Job *job,
                            struct vm_error **err)
{
    Vmmig__Control__Watch watch = VMMIG__CONTROL__WATCH__INIT;
    if (job)
        watch.job = job->id;
    else
        watch.vm = (char *)(uintptr_t)f->vm;
    watch.interval_ms = isatty(STDERR_FILENO) ? TERMINAL_INTERVAL_MS : PLAIN_INTERVAL_MS;
    if (client_send(f->client, VMMIG__CONTROL__TYPE__WATCH, &watch.base, err) < 0)
        return -1;
    return follow(f, err);
}

int cli_follow(const struct cli *cli, struct client *c, const char *vm,
               const Vmmig__Control__Job *job, int signal_fd, struct vm_error **err)
{
    struct follow f = {.cli = cli, .client = c, .vm = vm, .signal_fd = signal_fd,
                       .leave_at_ns = INT64_MAX};
    return watch_and_follow(&f, job, err);
}

int cli_follow_with(const struct cli *cli, struct client *c, const Vmmig__Control__Job *job,
                    const struct cli_follow_hooks *hooks, int signal_fd, struct vm_error **err)
{
    struct follow f = {.cli = cli, .client = c, .vm = "", .signal_fd = signal_fd, .hooks = hooks,
                       .leave_at_ns = INT64_MAX};
    memcpy(f.job.bytes, job->id.data, sizeof(f.job.bytes));
    return watch_and_follow(&f, job, err);
}

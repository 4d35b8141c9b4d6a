/* SPDX-License-Identifier: Apache-2.0 */
#include "tools/cli_local.h"

#include "base/clock.h"
#include "base/fault.h"
#include "base/heap.h"
#include "client/client.h"
#include "repo/service.h"
#include "tools/cli_follow.h"

struct work {
    struct cli_repo_view *view;
    struct cli_progress progress;
    int64_t started_ns;
};

static void show(const struct repo_progress *p, void *arg)
{
    struct work *w = arg;
    const Vmmig__Control__Repo *m = w->view->request;
    Vmmig__Control__Job job = VMMIG__CONTROL__JOB__INIT;
    if (w->view->cli->json)
        return;
    job.kind = client_word(repo_service_verb_name(m->verb));
    job.peer = *m->to ? m->to : m->image;
    job.phase = client_word("working");
    job.total = p->total;
    job.remaining = p->total - p->done;
    job.stored_bytes = p->stored;
    job.elapsed_ns = clock_mono_ns() - w->started_ns;
    cli_progress_show(&w->progress, &job);
}

static int take(const Vmmig__Control__RepoResult *part, void *arg, struct vm_error **err)
{
    struct work *w = arg;
    cli_progress_close(&w->progress);
    return cli_repo_part(w->view, part, err);
}

int cli_local_enter(const struct cli *c, struct vm_error **err)
{
    (void)c, (void)err;
    heap_give_back();
    return 0;
}

int cli_local_repo(const struct cli *c, struct cli_repo_view *view, int64_t *ret_elapsed_ns,
                   struct vm_error **err)
{
    struct work w = {.view = view, .started_ns = clock_mono_ns()};
    bool is_long = repo_service_is_long(view->request->verb);
    /* A Ctrl-C makes it readable, which cancels. */
    cleanup_close int signal_fd = is_long ? cli_follow_prepare(err) : -1;
    if (is_long && signal_fd < 0)
        return -1;
    struct repo_service service = {.fd = view->fd, .control = {show, &w, signal_fd},
                                   .emit = take, .arg = &w};
    if (fault_init(err) < 0)
        return -1;
    int result = repo_service_run(c->repo, view->request, &service, err);
    cli_progress_close(&w.progress);
    if (result == 0 && is_long)
        *ret_elapsed_ns = clock_mono_ns() - w.started_ns;
    return result;
}

int cli_local_pki_init(const struct cli *c, const char *dir, struct vm_error **err)
{
    (void)c;
    return pki_init(dir, err);
}

int cli_local_pki_issue(const struct cli *c, const char *dir, const struct pki_host *host,
                        struct vm_error **err)
{
    (void)c;
    return pki_issue(dir, host, err);
}

int cli_local_pki_revoke(const struct cli *c, const char *dir, const char *host, struct vm_error **err)
{
    (void)c;
    return pki_revoke(dir, host, err);
}

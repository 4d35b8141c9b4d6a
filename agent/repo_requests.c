/* SPDX-License-Identifier: Apache-2.0 */
#include "agent/repo_requests.h"

#include "agent/answers.h"
#include "base/log.h"
#include "repo/service.h"
#include "repo/template.h"

#include <string.h>

/* A request that became a job. */
struct repo_job {
    const char *url;
    struct control_message request;
    int fd;
    struct job *job;
};

static void repo_job_free(void *arg)
{
    struct repo_job *j = arg;
    if (!j)
        return;
    control_message_finish(&j->request);
    close_fd(&j->fd);
    free(j);
}
DEFINE_CLEANUP(repo_job, struct repo_job *, repo_job_free)

static void show_progress(const struct repo_progress *p, void *arg)
{
    const struct repo_job *j = arg;
    struct job_progress progress = {.phase = JOB_PHASE_WORKING, .predicted_pause_ns = -1,
                                    .pause_ns = -1, .total = p->total,
                                    .remaining = p->total - p->done,
                                    .stored_bytes = p->stored};
    job_update(j->job, &progress);
}

static int keep_result(const Vmmig__Control__RepoResult *part, void *arg, struct vm_error **err)
{
    const struct repo_job *j = arg;
    size_t len = vmmig__control__repo_result__get_packed_size(part);
    cleanup_free uint8_t *data = malloc(len ? len : 1);
    if (!data)
        return error_nomem(err);
    vmmig__control__repo_result__pack(part, data);
    return job_set_result(j->job, data, len, err);
}

static int run_job(struct job *job, void *arg, struct vm_error **err)
{
    struct repo_job *j = arg;
    struct repo_service service = {.fd = j->fd, .emit = keep_result, .arg = j,
                                   .control = {show_progress, j, job_cancel_fd(job)}};
    struct repo_progress begin = {0};
    j->job = job;
    show_progress(&begin, j);
    return repo_service_run(j->url, j->request.repo, &service, err);
}

static struct repo_job *make_job(struct control_session *s, const Vmmig__Control__Repo *m,
                                 struct vm_error **err)
{
    CLEANUP(repo_job) struct repo_job *j = calloc(1, sizeof(*j));
    size_t len = vmmig__control__repo__get_packed_size(m);
    cleanup_free uint8_t *data = malloc(len ? len : 1);
    if (!j || !data) {
        error_nomem(err);
        return NULL;
    }
    j->fd = -1;
    vmmig__control__repo__pack(m, data);
    if (control_unpack(VMMIG__CONTROL__TYPE__REPO, data, len, &j->request, err) < 0)
        return NULL;
    j->url = control_agent(s)->config->repository;
    j->fd = control_take_fd(s);
    return steal_ptr(&j);
}

static enum job_kind kind_of(Vmmig__Control__RepoVerb verb)
{
    for (enum job_kind kind = 0; kind < JOB_KIND_COUNT; kind++)
        if (!strcmp(job_kind_name(kind), repo_service_verb_name(verb)))
            return kind;
    return JOB_KIND_COUNT; /* no long verb: the unit test has them all */
}

static int start_job(struct control_session *s, const Vmmig__Control__Repo *m,
                     struct vm_error **err)
{
    struct agent *agent = control_agent(s);
    struct uuid id;
    struct job_status status;
    CLEANUP(repo_job) struct repo_job *j = make_job(s, m, err);
    if (!j)
        return -1;
    struct job_params params = {.kind = kind_of(m->verb), .run = run_job, .arg = j,
                                .peer = *m->to ? m->to : m->image, .free_arg = repo_job_free};
    if (job_start(agent->jobs, &params, &id, err) < 0)
        return -1;
    j = NULL;
    if (job_get(agent->jobs, &id, &status, err) < 0)
        return -1;
    cleanup_job_answer struct job_answer a = {0};
    job_answer_init(&a, &status);
    return control_reply(s, VMMIG__CONTROL__TYPE__JOB, &a.message.base, err);
}

static int reply_part(const Vmmig__Control__RepoResult *part, void *arg, struct vm_error **err)
{
    return control_reply(arg, VMMIG__CONTROL__TYPE__REPO_RESULT, &part->base, err);
}

/* Templates are published by those who may, and stay what they are: so do the images that they consist of. */
static int check_template(const Vmmig__Control__Repo *m, struct vm_error **err)
{
    bool writes = m->verb == VMMIG__CONTROL__REPO_VERB__IMAGE_IMPORT ||
                  m->verb == VMMIG__CONTROL__REPO_VERB__IMAGE_DELETE;
    if (!writes || !template_owns(m->image))
        return 0;
    return error_set(err, VM_ERROR_REFUSED,
                     "image %s is a template's: use vmmig template publish and template delete",
                     m->image);
}

int repo_request_handle(struct control_session *s, const struct control_message *message,
                        struct vm_error **err)
{
    const Vmmig__Control__Repo *m = message->repo;
    struct repo_service service = {.fd = -1, .control.cancel_fd = control_stop_fd(s),
                                   .emit = reply_part, .arg = s};
    if (repo_service_names_place(m) && !control_peer_is_owner(s))
        return error_set(err, VM_ERROR_DENIED,
                         "only root and the agent's own user may have the agent open %s; use "
                         "--repo to do it with your own rights",
                         m->to);
    if (check_template(m, err) < 0)
        return -1;
    if (repo_service_is_long(m->verb))
        return start_job(s, m, err);
    if (m->verb == VMMIG__CONTROL__REPO_VERB__IMAGE_DELETE)
        log_info("deleting an image", "image=%s", log_q(m->image));
    return repo_service_run(control_agent(s)->config->repository, m, &service, err);
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * service: what the commands `vmmig repo` and `vmmig image` do, as requests and results of the
 * control protocol (proto/control.proto, Repo and RepoResult). The agent runs it for its clients,
 * the command runs it itself for --repo URL; so there is one implementation of both.
 *
 *     struct repo_service s = {.fd = fd, .control = {progress, arg, cancel_fd}, .emit = emit};
 *     repo_service_run("dir:/var/lib/vmmig/repo", request, &s, &err);
 *
 * Parts of the result are given to `emit` as they come, each valid during the call; all but the
 * last have `more` set. The request was checked by control_unpack or control_check; what it means
 * (names, URLs) is checked here.
 *
 * No path is opened: what IMAGE_IMPORT reads is a descriptor of source_prepare (repo/source.h),
 * what IMAGE_EXPORT writes is one of image_export_target. But a URL is opened with the rights of
 * this process: an agent asks repo_service_names_place before it takes one from a client.
 *
 * Threads: any. Memory: that of the functions in repo/repo.h, and 1 MiB.
 */
#ifndef VMMIG_REPO_SERVICE_H
#define VMMIG_REPO_SERVICE_H

#include "proto/control.h"
#include "repo/repo_control.h"

#include <stdbool.h>

/* Of what a scrub finds so much is named; the images that are touched have room beside the damage. */
enum { SERVICE_FINDINGS_MAX = 1000, SERVICE_DAMAGE_MAX = 500 };

typedef int repo_service_emit_fn(const Vmmig__Control__RepoResult *part, void *arg,
                                 struct vm_error **err);

struct repo_service {
    int fd; /* IMAGE_IMPORT, IMAGE_EXPORT; else -1 */
    struct repo_control control;
    repo_service_emit_fn *emit;
    void *arg;
};

int repo_service_run(const char *url, const Vmmig__Control__Repo *request,
                     const struct repo_service *service, struct vm_error **err);

/* Does it take long, so that it is to be watched and cancelled? */
bool repo_service_is_long(Vmmig__Control__RepoVerb verb);
bool repo_service_wants_fd(Vmmig__Control__RepoVerb verb);
/* Does the request name a place of this host that the client might not be allowed to touch? */
bool repo_service_names_place(const Vmmig__Control__Repo *request);
/* "import", "gc": stable, for logs and jobs. */
const char *repo_service_verb_name(Vmmig__Control__RepoVerb verb);

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cli_repo: how the commands `repo` and `image` reach a repository: the agent's, or with --repo URL
 * one that this process opens itself. Both give the same results (repo/service.h), printed here.
 *
 * In the agent the work is a job: Ctrl-C leaves it running (tools/cli_follow.h), but for an export,
 * whose file is this command's: there it cancels. Without an agent Ctrl-C cancels.
 */
#ifndef VMMIG_TOOLS_CLI_REPO_H
#define VMMIG_TOOLS_CLI_REPO_H

#include "proto/control.h"
#include "tools/cli.h"

#include <jansson.h>

/*
 * Do what the request says and print the result; `fd` (-1: none) goes with it and stays the
 * caller's. 0, -1, or an exit status.
 */
int cli_repo_run(const struct cli *c, const Vmmig__Control__Repo *request, int fd,
                 struct vm_error **err);

/* Printing: parts of the result as they come, then the end. As the caller's locale and terminal. */
struct cli_repo_view {
    const struct cli *cli;
    const Vmmig__Control__Repo *request;
    int fd;
    json_t *object;        /* with --json all that is printed, else the counts, which come last */
    uint64_t differing, n; /* bytes and stretches of a diff, images of a list, so far */
    bool damaged;
};
int cli_repo_part(struct cli_repo_view *v, const Vmmig__Control__RepoResult *part,
                  struct vm_error **err);
/* elapsed_ns: -1 if it is nobody's business. The exit status. */
int cli_repo_end(struct cli_repo_view *v, int64_t elapsed_ns, struct vm_error **err);

#endif

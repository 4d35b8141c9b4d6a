/* SPDX-License-Identifier: Apache-2.0 */
/*
 * repository: the agent's repository (`repository` in its configuration), opened when it is first needed and
 * then kept open, so that an agent starts without it.
 *
 * repository_get: NOT_FOUND, UNREACHABLE... as repo_open says, again at every call until it succeeds. What it returns
 * is good for any thread and as long as the agent runs.
 */
#ifndef VMMIG_AGENT_REPOSITORY_H
#define VMMIG_AGENT_REPOSITORY_H

#include "base/cleanup.h"
#include "base/error.h"
#include "repo/repo.h"

struct repository;

/* USAGE if it is no URL of a repository. */
struct repository *repository_create(const char *url, struct vm_error **err);
void repository_destroy(struct repository *r);
DEFINE_CLEANUP(repository, struct repository *, repository_destroy)
struct repo *repository_get(struct repository *r, struct vm_error **err);

#endif

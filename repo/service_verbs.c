/* SPDX-License-Identifier: Apache-2.0 */
#include "repo/service.h"

static const struct verb {
    const char *name;
    bool is_long, wants_fd;
} verbs[] = {
    [VMMIG__CONTROL__REPO_VERB__REPO_NONE] = {"none", false, false},
    [VMMIG__CONTROL__REPO_VERB__REPO_INIT] = {"init", false, false},
    [VMMIG__CONTROL__REPO_VERB__REPO_STAT] = {"stat", false, false},
    [VMMIG__CONTROL__REPO_VERB__REPO_GC] = {"gc", true, false},
    [VMMIG__CONTROL__REPO_VERB__REPO_SCRUB] = {"scrub", true, false},
    [VMMIG__CONTROL__REPO_VERB__REPO_REBUILD_INDEX] = {"rebuild-index", true, false},
    [VMMIG__CONTROL__REPO_VERB__REPO_COPY] = {"copy", true, false},
    [VMMIG__CONTROL__REPO_VERB__IMAGE_IMPORT] = {"import", true, true},
    [VMMIG__CONTROL__REPO_VERB__IMAGE_EXPORT] = {"export", true, true},
    [VMMIG__CONTROL__REPO_VERB__IMAGE_LIST] = {"list", false, false},
    [VMMIG__CONTROL__REPO_VERB__IMAGE_SHOW] = {"show", false, false},
    [VMMIG__CONTROL__REPO_VERB__IMAGE_DELETE] = {"delete", false, false},
    [VMMIG__CONTROL__REPO_VERB__IMAGE_DIFF] = {"diff", false, false},
};

bool repo_service_is_long(Vmmig__Control__RepoVerb verb)
{
    return verbs[verb].is_long;
}

bool repo_service_wants_fd(Vmmig__Control__RepoVerb verb)
{
    return verbs[verb].wants_fd;
}

const char *repo_service_verb_name(Vmmig__Control__RepoVerb verb)
{
    return verbs[verb].name;
}

bool repo_service_names_place(const Vmmig__Control__Repo *request)
{
    return request->verb == VMMIG__CONTROL__REPO_VERB__REPO_COPY;
}

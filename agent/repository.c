/* SPDX-License-Identifier: Apache-2.0 */
#include "agent/repository.h"

#include "repo/url.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

struct repository {
    char *url;
    pthread_mutex_t lock;
    struct repo *repo; /* under lock until it is set */
};

struct repository *repository_create(const char *url, struct vm_error **err)
{
    struct repo_url parsed;
    if (repo_url_parse(url, &parsed, err) < 0) {
        error_wrap(err, "repository");
        return NULL;
    }
    repo_url_finish(&parsed);
    struct repository *r = calloc(1, sizeof(*r));
    if (!r || !(r->url = strdup(url))) {
        free(r);
        error_nomem(err);
        return NULL;
    }
    pthread_mutex_init(&r->lock, NULL);
    return r;
}

void repository_destroy(struct repository *r)
{
    if (!r)
        return;
    repo_close(r->repo);
    pthread_mutex_destroy(&r->lock);
    free(r->url);
    free(r);
}

struct repo *repository_get(struct repository *r, struct vm_error **err)
{
    SCOPE_LOCK(&r->lock);
    if (!r->repo)
        r->repo = repo_open(r->url, err);
    return r->repo;
}

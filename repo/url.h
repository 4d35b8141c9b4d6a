/* SPDX-License-Identifier: Apache-2.0 */
/*
 * url: the name of a repository.
 *
 *     dir:/var/lib/vmmig/repo                         a folder of this host
 *     rados:POOL[/NAMESPACE][?conf=FILE&id=USER]      a Ceph pool; a namespace is one tenant
 *
 * A name part is percent-decoded (%20), so that every byte but NUL can be written. A URL is parsed
 * before anything is touched; what makes no sense is USAGE with the offending part in the message.
 * Threads: any.
 */
#ifndef VMMIG_REPO_URL_H
#define VMMIG_REPO_URL_H

#include "base/error.h"

enum repo_url_scheme { REPO_URL_DIR, REPO_URL_RADOS };

struct repo_url {
    enum repo_url_scheme scheme;
    char *path;       /* dir: absolute */
    char *pool;       /* rados */
    char *name_space; /* rados: "" for the default namespace */
    char *conf;       /* rados: the configuration file, NULL for Ceph's default search */
    char *id;         /* rados: the user, "admin" if not given */
    char *text;       /* as given, for messages */
};

int repo_url_parse(const char *text, struct repo_url *ret_url, struct vm_error **err);
void repo_url_finish(struct repo_url *url);

#endif

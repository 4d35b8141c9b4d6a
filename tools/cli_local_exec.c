/* SPDX-License-Identifier: Apache-2.0 */
#include "tools/cli_local.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define PROGRAM "vmmig-local"

/* Beside this program, where both were built; else where it is installed. */
int cli_local_enter(const struct cli *c, struct vm_error **err)
{
    char beside[PATH_MAX];
    ssize_t n = readlink("/proc/self/exe", beside, sizeof(beside) - sizeof(PROGRAM));
    char *name = n > 0 ? memrchr(beside, '/', (size_t)n) : NULL;
    if (name) {
        strcpy(name + 1, PROGRAM);
        execv(beside, c->argv);
        if (errno != ENOENT)
            return error_errno(err, errno, "cannot run %s", beside);
    }
    execv(LIBEXEC_DIR "/" PROGRAM, c->argv);
    return error_errno(err, errno, "cannot run %s", LIBEXEC_DIR "/" PROGRAM);
}

int cli_local_repo(const struct cli *c, struct cli_repo_view *view, int64_t *ret_elapsed_ns,
                   struct vm_error **err)
{
    (void)view, (void)ret_elapsed_ns;
    return cli_local_enter(c, err);
}

int cli_local_pki_init(const struct cli *c, const char *dir, struct vm_error **err)
{
    (void)dir;
    return cli_local_enter(c, err);
}

int cli_local_pki_issue(const struct cli *c, const char *dir, const struct pki_host *host,
                        struct vm_error **err)
{
    (void)dir, (void)host;
    return cli_local_enter(c, err);
}

int cli_local_pki_revoke(const struct cli *c, const char *dir, const char *host, struct vm_error **err)
{
    (void)dir, (void)host;
    return cli_local_enter(c, err);
}

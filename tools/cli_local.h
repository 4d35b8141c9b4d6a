/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cli_local: what a command does in its own process, without an agent: a repository that is named by
 * its URL, and certificates.
 *
 * To load the libraries for that (librados above all) takes longer than an agent takes to answer, so
 * `vmmig` is linked with none of them: there (cli_local_exec.c) each of these becomes the program
 * vmmig-local, with the same command line. That one has the same commands, and does the work
 * (cli_local.c). So nothing may have been done before: a command that opens or makes files for the
 * repository is entered first.
 */
#ifndef VMMIG_TOOLS_CLI_LOCAL_H
#define VMMIG_TOOLS_CLI_LOCAL_H

#include "tools/cli_repo.h"
#include "tools/pki.h"

/* The program that can do the work goes on from here. */
int cli_local_enter(const struct cli *c, struct vm_error **err);

/*
 * Do what the view's request says in the repository c->repo; parts of the result go to the view.
 * Ctrl-C cancels. *ret_elapsed_ns stays as it is unless the work is of the long kind.
 */
int cli_local_repo(const struct cli *c, struct cli_repo_view *view, int64_t *ret_elapsed_ns,
                   struct vm_error **err);
int cli_local_pki_init(const struct cli *c, const char *dir, struct vm_error **err);
int cli_local_pki_issue(const struct cli *c, const char *dir, const struct pki_host *host,
                        struct vm_error **err);
int cli_local_pki_revoke(const struct cli *c, const char *dir, const char *host, struct vm_error **err);

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * frozen: which guests' file systems stand frozen, or may: a note for each, from before the freeze
 * until the thaw. A guest that is left so is lost to its user, since all that writes in it waits.
 * So the note is a file, and a process that does nothing else (vmmig-guard) tries to thaw until it
 * has, whatever becomes of agents.
 *
 *     frozen_path(&thawer, &process, path)          the note of the guest in that VMM
 *     frozen_note(path, socket, &err)               about to freeze, through its agent's socket
 *     frozen_forget(path)                           thawed
 *     frozen_thaw_later(&thawer, &process, &err)    who noted it could not: another process goes on
 * trying frozen_thaw(path, &process)                   what that process does
 *     frozen_expect(&thawer, &process, argv, cwd, &err)
 *                                                   a guest will go on in that VMM, in which they
 * stand frozen; whoever listens at the socket must be that VMM, or its user's
 *     frozen_thaw_restored(&thawer, &process, argv, cwd, runs, &err)
 *                                                   it has come there; if it runs it is thawed at
 * once, if that is possible
 *
 * frozen_thaw returns when the guest is thawed, when somebody else has done so (the note is gone,
 * or is another one), when somebody else is trying (the note is locked), or when the VMM has ended.
 * Between two attempts lie one second, then two, up to FROZEN_PAUSE_MAX_S, since one who holds the
 * socket keeps others from it. Of a guest that stands it is tried until it runs. One that is sent
 * away takes the note along: the other host's agent notes it of its own VMM before the guest is
 * there (frozen_expect). Threads: any.
 */
#ifndef VMMIG_SNAPSHOT_FROZEN_H
#define VMMIG_SNAPSHOT_FROZEN_H

#include "base/error.h"
#include "base/process.h"

enum { FROZEN_PATH_MAX = 4096, FROZEN_PAUSE_MAX_S = 16 };
struct thawer {
    const char *libexec_dir; /* where vmmig-guard is */
    const char *log_dir;     /* its output is appended to guard.log */
    const char *dir;         /* where notes lie */
};

void thawer_paths(const struct thawer *t, char ret_binary[FROZEN_PATH_MAX], char ret_log[FROZEN_PATH_MAX]);
void frozen_path(const struct thawer *t, const struct process_identity *process,
                 char out[FROZEN_PATH_MAX]);
int frozen_note(const char *path, const char *socket, struct vm_error **err);
bool frozen_is_noted(const char *path);
void frozen_forget(const char *path);
int frozen_thaw_later(const struct thawer *t, const struct process_identity *process,
                      struct vm_error **err);
void frozen_thaw(const char *path, const struct process_identity *process);
/* NOT_FOUND: the VMM's command line names no socket of the guest's agent. */
int frozen_expect(const struct thawer *t, const struct process_identity *process, char *const *argv,
                  const char *cwd, struct vm_error **err);
/* -1: it is not thawed yet, and is tried again; or what to do by hand. */
int frozen_thaw_restored(const struct thawer *t, const struct process_identity *process, char *const *argv,
                         const char *cwd, bool runs, struct vm_error **err);

#endif

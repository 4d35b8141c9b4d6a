/* SPDX-License-Identifier: Apache-2.0 */
#include "base/clock.h"
#include "dirtylog/vmmig-attach.h"
#include "vmm/attach_private.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>

enum { TIMEOUT_MS = 30000, STEP_MS = 2, GREETING_MS = 5000, KILL_TIMEOUT_MS = 5000 };

static void free_argv(char ***argv)
{
    for (char **word = *argv; word && *word; word++)
        free(*word);
    free(*argv);
}

/* What stands for the socket and the VM's name in a VMM's words, and counts of what was found. */
struct place {
    const char *mark, *text;
    unsigned found;
};

enum { PLACE_SOCKET, PLACE_NAME, PLACES };

/* The first of them in the word; NULL if there is none. */
static struct place *find_place(struct place *places, const char *word, const char **ret_at)
{
    struct place *first = NULL;
    for (unsigned i = 0; i < PLACES; i++) {
        const char *at = strstr(word, places[i].mark);
        if (!at || (first && at > *ret_at))
            continue;
        *ret_at = at;
        first = &places[i];
    }
    return first;
}

static char *replace(const char *word, struct place *places)
{
    cleanup_buffer struct buffer out = {0};
    struct place *place;
    for (const char *at; (place = find_place(places, word, &at)); place->found++) {
        buffer_put(&out, word, (size_t)(at - word));
        buffer_put(&out, place->text, strlen(place->text));
        word = at + strlen(place->mark);
    }
    buffer_put(&out, word, strlen(word) + 1);
    return out.failed ? NULL : (char *)steal_ptr(&out.data);
}

static int make_argv(const struct attach_launch *l, int fd, char ***ret_argv, struct vm_error **err)
{
    char socket[32];
    struct place places[PLACES] = {{VMMIG_SOCKET_WORD, socket, 0}, {VMMIG_NAME_WORD, l->name, 0}};
    char *const *argv = l->spawn.argv;
    size_t n = 0;
    snprintf(socket, sizeof(socket), VMMIG_SOCKET_FD "%d", fd);
    while (argv[n])
        n++;
    __attribute__((cleanup(free_argv))) char **all = calloc(n + 1, sizeof(*all));
    for (size_t i = 0; all && i < n; i++) {
        all[i] = replace(argv[i], places);
        if (!all[i])
            return error_nomem(err);
    }
    if (!all)
        return error_nomem(err);
    if (!places[PLACE_SOCKET].found)
        return error_set(err, VM_ERROR_REFUSED,
                         "the VMM's command line does not say where its socket is: " VMMIG_SOCKET_WORD
                         " must stand there");
    *ret_argv = steal_ptr(&all);
    return 0;
}

static int explain_end(const struct attach_launch *l, size_t log_offset, pid_t pid,
                       struct vm_error **err)
{
    char line[SPAWN_MESSAGE_MAX];
    spawn_log_last_line(l->spawn.log_path, log_offset, line);
    return error_set(err, VM_ERROR_VMM_DIED, "the VMM (process %d) ended%s%s", pid, *line ? ": " : "",
                     line);
}

/* The socket is bound, and refuses until the VMM listens at it. */
static struct attach *wait_for(const struct attach_launch *l, const struct process_identity *process,
                               size_t log_offset, struct vm_error **err)
{
    int64_t deadline =
        clock_mono_ns() + (l->timeout_ms ? l->timeout_ms : TIMEOUT_MS) * NSEC_PER_MSEC;
    for (;;) {
        struct vm_error *failure = NULL;
        bool alive = process_alive(process);
        struct attach *a = attach_connect(l->socket_path, GREETING_MS, &failure);
        if (a)
            return a;
        if (!alive) {
            error_free(failure);
            explain_end(l, log_offset, process->pid, err);
            return NULL;
        }
        if (failure->sys_errno != ECONNREFUSED) {
            error_propagate(err, failure);
            return NULL;
        }
        error_free(failure);
        if (clock_mono_ns() > deadline) {
            error_set(err, VM_ERROR_TIMEOUT, "the VMM (process %d) does not listen at its socket",
                      process->pid);
            return NULL;
        }
        poll(NULL, 0, STEP_MS);
    }
}

static struct attach *start(const struct attach_launch *l, char *const *argv, int socket,
                            struct vm_error **err)
{
    struct process_identity process;
    struct spawn_params params = l->spawn;
    size_t log_offset = spawn_log_size(l->spawn.log_path);
    params.argv = argv;
    params.fds = &socket;
    params.n_fds = 1;
    if (spawn_process(&params, &process, err) < 0)
        return NULL;
    CLEANUP(attach) struct attach *a = wait_for(l, &process, log_offset, err);
    if (a && process_identity_equal(&a->guest.process, &process))
        return steal_ptr(&a);
    if (a) {
        error_set(err, VM_ERROR_REFUSED, "the VMM went on in another process (%d)",
                  a->guest.process.pid);
        process_kill(&a->guest.process, KILL_TIMEOUT_MS, NULL);
    }
    process_kill(&process, KILL_TIMEOUT_MS, NULL);
    return NULL;
}

struct attach *attach_spawn(const struct attach_launch *l, struct vm_error **err)
{
    cleanup_close int socket = spawn_bind(l->socket_path, SOCK_SEQPACKET, err);
    __attribute__((cleanup(free_argv))) char **argv = NULL;
    if (socket < 0)
        return NULL;
    struct attach *a = make_argv(l, socket, &argv, err) < 0
                           ? NULL
                           : start(l, argv, socket, err);
    if (!a)
        unlink(l->socket_path);
    return a;
}

struct attach *attach_sink_spawn(const struct qemu_definition *definition,
                                 const struct attach_launch *launch, struct vm_error **err)
{
    struct attach_launch l = *launch;
    l.spawn.argv = definition->argv;
    l.spawn.cwd = definition->cwd;
    CLEANUP(attach) struct attach *a = attach_spawn(&l, err);
    if (!a)
        return NULL;
    if (attach_sink_make(a, definition, err) == 0)
        return steal_ptr(&a);
    guest_kill(&a->guest, KILL_TIMEOUT_MS, NULL);
    unlink(l.socket_path);
    return NULL;
}

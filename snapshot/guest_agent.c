/* SPDX-License-Identifier: Apache-2.0 */
#include "snapshot/guest_agent.h"

#include "base/clock.h"
#include "base/io.h"
#include "base/log.h"
#include "vmm/qemu_argv.h"

#include <errno.h>
#include <jansson.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>

static const char port_name[] = "org.qemu.guest_agent.0";
enum { PROGRAM_LOOK_MS = 5, QUEUE_LOOK_MS = 20 };

struct guest_agent {
    int fd;
    bool frozen;
    bool unanswered; /* an answer may still come: whoever says something else has to skip it */
    char line[GUEST_AGENT_LINE];
    size_t n; /* bytes of `line` that were read */
};

static void json_free(json_t **j)
{
    json_decref(*j);
}
#define cleanup_json __attribute__((cleanup(json_free)))

/* ---- where it is ---- */

static bool option_is(const struct qemu_option *o, const char *name, struct qemu_props *ret_props)
{
    return !strcmp(o->name, name) && o->value &&
           qemu_props_parse(o->value, qemu_option_implied_key(o->name), ret_props, NULL) == 0;
}

static bool equal(const struct qemu_props *p, const char *key, const char *value)
{
    const char *found = qemu_props_get(p, key);
    return found && !strcmp(found, value);
}

/* The id of the chardev behind the agent's port; free it. */
static char *find_port(const struct qemu_argv *a)
{
    for (unsigned i = 0; i < a->n; i++) {
        cleanup_qemu_props struct qemu_props p = {0};
        if (option_is(&a->options[i], "device", &p) && equal(&p, "driver", "virtserialport") &&
            equal(&p, "name", port_name) && qemu_props_get(&p, "chardev"))
            return strdup(qemu_props_get(&p, "chardev"));
    }
    return NULL;
}

char *guest_agent_find(char *const *argv, const char *cwd)
{
    cleanup_qemu_argv struct qemu_argv a = {0};
    if (qemu_argv_parse(argv, &a, NULL) < 0)
        return NULL;
    cleanup_free char *chardev = find_port(&a);
    for (unsigned i = 0; chardev && i < a.n; i++) {
        cleanup_qemu_props struct qemu_props p = {0};
        if (!option_is(&a.options[i], "chardev", &p) || !equal(&p, "backend", "socket") ||
            !equal(&p, "id", chardev) || !qemu_props_get(&p, "path"))
            continue;
        char *whole = NULL;
        const char *path = qemu_props_get(&p, "path");
        return asprintf(&whole, "%s%s%s", *path == '/' ? "" : cwd, *path == '/' ? "" : "/", path) < 0
                   ? NULL
                   : whole;
    }
    return NULL;
}

/* ---- lines ---- */

/* The next line, NUL-terminated, without what came before the last 0xff; *ret_marked: there was one. */
static int read_line(struct guest_agent *ga, int64_t deadline, char **ret_line, size_t *ret_used,
                     bool *ret_marked, struct vm_error **err)
{
    for (;;) {
        char *end = memchr(ga->line, '\n', ga->n);
        if (end) {
            *end = 0;
            char *from = memrchr(ga->line, 0xff, (size_t)(end - ga->line));
            *ret_line = from ? from + 1 : ga->line;
            *ret_marked = from;
            *ret_used = (size_t)(end + 1 - ga->line);
            return 0;
        }
        if (ga->n == sizeof(ga->line))
            return error_set(err, VM_ERROR_PROTOCOL, "the guest's agent says too much");
        ssize_t n =
            io_read_some(ga->fd, ga->line + ga->n, sizeof(ga->line) - ga->n, deadline, -1, err);
        if (n <= 0)
            return n ? -1 : error_set(err, VM_ERROR_UNREACHABLE, "QEMU closed the connection");
        ga->n += (size_t)n;
    }
}

/* The next line, decoded; with `marked` the next one that has the mark. NULL: *err, or it is no JSON. */
static json_t *read_reply(struct guest_agent *ga, bool marked, int64_t deadline, struct vm_error **err)
{
    char *line = NULL;
    size_t used = 0;
    for (bool is_marked = false;;) {
        if (read_line(ga, deadline, &line, &used, &is_marked, err) < 0)
            return NULL;
        json_t *reply = is_marked || !marked ? json_loads(line, 0, NULL) : NULL;
        memmove(ga->line, ga->line + used, ga->n - used);
        ga->n -= used;
        if (is_marked || !marked)
            return reply ? reply : json_object();
    }
}

/* Say a command; what it returned is the caller's, NULL if it failed. */
static json_t *ask(struct guest_agent *ga, const char *text, int64_t deadline, struct vm_error **err)
{
    ga->unanswered = true;
    if (io_write_full(ga->fd, text, strlen(text), deadline, -1, err) < 0)
        return NULL;
    cleanup_json json_t *reply = read_reply(ga, false, deadline, err);
    if (!reply)
        return NULL;
    json_t *value = json_object_get(reply, "return"), *refusal = json_object_get(reply, "error");
    const char *why = json_string_value(json_object_get(refusal, "desc"));
    if (!value && !refusal) {
        error_set(err, VM_ERROR_PROTOCOL, "the guest's agent answers what cannot be understood");
        return NULL;
    }
    ga->unanswered = false;
    if (!value)
        error_set(err, VM_ERROR_FAILED, "the guest's agent refuses: %s",
                  why ? log_q(why) : "it does not say why");
    return json_incref(value);
}

/* The same; *ret_value is what it returned, if that is a number. */
static int command(struct guest_agent *ga, const char *text, int64_t deadline, int64_t *ret_value,
                   struct vm_error **err)
{
    cleanup_json json_t *value = ask(ga, text, deadline, err);
    if (!value)
        return -1;
    *ret_value = json_integer_value(value);
    return 0;
}

/* What was said to others before us is skipped, and what the agent says of the byte that begins this. */
static int synchronise(struct guest_agent *ga, int64_t deadline, struct vm_error **err)
{
    char text[96];
    int64_t id = clock_mono_ns() & 0xffffffff;
    snprintf(text, sizeof(text),
             "\xff{\"execute\":\"guest-sync-delimited\",\"arguments\":{\"id\":%lld}}\n",
             (long long)id);
    if (io_write_full(ga->fd, text, strlen(text), deadline, -1, err) < 0)
        return -1;
    for (;;) {
        cleanup_json json_t *reply = read_reply(ga, true, deadline, err);
        if (!reply)
            return -1;
        if (json_integer_value(json_object_get(reply, "return")) == id) {
            ga->unanswered = false;
            return 0;
        }
    }
}

/* ---- connecting ---- */

/* QEMU takes one at a time; where the queue behind that one is full, too, nobody says when there will be room. */
static int connect_to(int fd, const char *path, int64_t deadline, struct vm_error **err)
{
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof(a.sun_path))
        return error_set(err, VM_ERROR_USAGE, "the path of the guest's agent is too long: %s", path);
    strcpy(a.sun_path, path);
    while (connect(fd, (struct sockaddr *)&a, sizeof(a)) < 0) {
        if (errno != EAGAIN)
            return error_errno(err, errno, "%s", path);
        if (clock_mono_ns() >= deadline)
            return error_set(err, VM_ERROR_TIMEOUT, "%s: others have it, and wait for it", path);
        poll(NULL, 0, QUEUE_LOOK_MS);
    }
    return 0;
}

/* Who listens there? Another VM's socket, or a program's, is not talked to because a command line
 * from elsewhere names it. */
static int check_owner(int fd, const char *path, const struct process_identity *vmm, struct vm_error **err)
{
    struct ucred owner;
    socklen_t size = sizeof(owner);
    uid_t user;
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &owner, &size) < 0)
        return error_errno(err, errno, "%s", path);
    if (owner.pid == vmm->pid || (process_user(vmm->pid, &user, err) == 0 && user == owner.uid))
        return 0;
    error_clear(err);
    return error_set(err, VM_ERROR_REFUSED,
                     "%s is not the VM's own: process %d of user %u listens there", path, owner.pid,
                     owner.uid);
}

struct guest_agent *guest_agent_open(const char *path, const struct process_identity *vmm, int64_t deadline_ns,
                                     struct vm_error **err)
{
    CLEANUP(guest_agent) struct guest_agent *ga = calloc(1, sizeof(*ga));
    if (!ga) {
        error_nomem(err);
        return NULL;
    }
    ga->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (ga->fd < 0) {
        error_errno(err, errno, "cannot make a socket");
        return NULL;
    }
    if (io_set_nonblocking(ga->fd, true, err) < 0 || connect_to(ga->fd, path, deadline_ns, err) < 0 ||
        (vmm && check_owner(ga->fd, path, vmm, err) < 0) || synchronise(ga, deadline_ns, err) < 0) {
        error_wrap(err, "the guest's agent");
        return NULL;
    }
    return steal_ptr(&ga);
}

/* ---- file systems ---- */

int guest_agent_freeze(struct guest_agent *ga, int64_t deadline_ns, unsigned *ret_n,
                       struct vm_error **err)
{
    int64_t n;
    ga->frozen = true; /* also if the answer is lost */
    int r = command(ga, "{\"execute\":\"guest-fsfreeze-freeze\"}\n", deadline_ns, &n, err);
    ga->frozen = ga->unanswered || (r == 0 && n > 0);
    if (r == 0)
        *ret_n = n > 0 && n < 1 << 20 ? (unsigned)n : 0;
    return r;
}

int guest_agent_thaw(struct guest_agent *ga, int64_t deadline_ns, struct vm_error **err)
{
    int64_t n;
    if ((ga->unanswered && synchronise(ga, deadline_ns, err) < 0) ||
        command(ga, "{\"execute\":\"guest-fsfreeze-thaw\"}\n", deadline_ns, &n, err) < 0)
        return -1;
    ga->frozen = false;
    return 0;
}

bool guest_agent_is_frozen(const struct guest_agent *ga)
{
    return ga->frozen;
}

/* ---- interfaces ---- */

static json_t *interfaces(struct guest_agent *ga, int64_t deadline, struct vm_error **err)
{
    return ask(ga, "{\"execute\":\"guest-network-get-interfaces\"}\n", deadline, err);
}

static bool has_mac(const json_t *interface, const char *mac)
{
    const char *found = json_string_value(json_object_get(interface, "hardware-address"));
    return found && !strcasecmp(found, mac);
}

static unsigned count_mac(const json_t *list, const char *mac)
{
    unsigned n = 0;
    for (size_t i = 0; i < json_array_size(list); i++)
        n += has_mac(json_array_get(list, i), mac);
    return n;
}

static int wait_program(struct guest_agent *ga, int64_t pid, int64_t deadline, struct vm_error **err)
{
    char text[96];
    snprintf(text, sizeof(text),
             "{\"execute\":\"guest-exec-status\",\"arguments\":{\"pid\":%lld}}\n", (long long)pid);
    for (;;) {
        cleanup_json json_t *status = ask(ga, text, deadline, err);
        if (!status)
            return -1;
        int64_t code = json_integer_value(json_object_get(status, "exitcode"));
        if (json_is_true(json_object_get(status, "exited")))
            return code ? error_set(err, VM_ERROR_FAILED, "its `ip` ended with status %lld", (long long)code)
                        : 0;
        if (clock_mono_ns() >= deadline)
            return error_set(err, VM_ERROR_TIMEOUT, "its `ip` does not end");
        poll(NULL, 0, PROGRAM_LOOK_MS);
    }
}

/* The name is the guest's own, and a word for its own program. */
static int run_ip(struct guest_agent *ga, const char *name, const char *mac, int64_t deadline,
                  struct vm_error **err)
{
    cleanup_json json_t *say = json_pack(
        "{s:s, s:{s:s, s:[s, s, s, s, s, s]}}", "execute", "guest-exec", "arguments", "path", "ip", "arg",
        "link", "set", "dev", name, "address", mac);
    cleanup_free char *text = say ? json_dumps(say, JSON_COMPACT) : NULL;
    char *line = NULL;
    if (!text || asprintf(&line, "%s\n", text) < 0)
        return error_nomem(err);
    cleanup_json json_t *started = ask(ga, line, deadline, err);
    free(line);
    return started ? wait_program(ga, json_integer_value(json_object_get(started, "pid")), deadline, err)
                   : -1;
}

int guest_agent_set_mac(struct guest_agent *ga, const char *from, const char *to, int64_t deadline_ns,
                        struct vm_error **err)
{
    cleanup_json json_t *before = interfaces(ga, deadline_ns, err);
    if (!before)
        return -1;
    if (!count_mac(before, from))
        return error_set(err, VM_ERROR_NOT_FOUND, "none of its interfaces has it");
    for (size_t i = 0; i < json_array_size(before); i++) {
        const json_t *one = json_array_get(before, i);
        const char *name = json_string_value(json_object_get(one, "name"));
        if (name && has_mac(one, from) && run_ip(ga, name, to, deadline_ns, err) < 0)
            return -1;
    }
    cleanup_json json_t *after = interfaces(ga, deadline_ns, err);
    if (!after)
        return -1;
    return count_mac(after, to) && !count_mac(after, from)
               ? 0
               : error_set(err, VM_ERROR_FAILED, "its interface does not take another one");
}

void guest_agent_close(struct guest_agent *ga)
{
    if (!ga)
        return;
    close_fd(&ga->fd);
    free(ga);
}

/* SPDX-License-Identifier: Apache-2.0 */
#include "agent/supervisor.h"

#include "base/cleanup.h"
#include "base/io.h"
#include "snapshot/run_tool.h"

#include <pwd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { CGROUP_TEXT_MAX = 64 << 10, PASSWD_BYTES = 16 << 10 };

static bool ends_with(const char *text, size_t n, const char *tail)
{
    size_t t = strlen(tail);
    return n > t && !memcmp(text + n - t, tail, t);
}

static bool begins_with(const char *text, size_t n, const char *head)
{
    return n >= strlen(head) && !memcmp(text, head, strlen(head));
}

/* The innermost unit of a cgroup's path counts. Libvirt's own folders:
 * "machine/qemu-1-web1.libvirt-qemu". */
static void look_at_part(struct supervisor *s, const char *part, size_t n)
{
    enum supervisor_kind kind = SUPERVISOR_NONE;
    unsigned uid;
    if (begins_with(part, n, "machine-qemu\\x2d") || ends_with(part, n, ".libvirt-qemu") ||
        begins_with(part, n, "libvirtd.service") || begins_with(part, n, "virtqemud.service"))
        kind = SUPERVISOR_LIBVIRT;
    else if (ends_with(part, n, ".service"))
        kind = SUPERVISOR_SYSTEMD;
    else if (!ends_with(part, n, ".scope"))
        return;
    if (sscanf(part, "user@%u.service", &uid) == 1) {
        s->of_user = true;
        s->uid = uid;
        kind = SUPERVISOR_NONE; /* what is in it has units of its own */
    }
    s->kind = kind;
    snprintf(s->unit, sizeof(s->unit), "%.*s", kind ? (int)n : 0, part);
}

static struct supervisor supervisor_of_path(const char *path)
{
    struct supervisor s = {SUPERVISOR_NONE};
    for (const char *at = path; *at && *at != '\n';) {
        size_t n = strcspn(at, "/\n");
        look_at_part(&s, at, n);
        at += n + (at[n] == '/');
    }
    return s;
}

struct supervisor supervisor_of_cgroup(const char *text)
{
    struct supervisor s = {SUPERVISOR_NONE};
    /* "ID:CONTROLLERS:PATH" */
    for (const char *line = text; line && *line && !s.kind; line = strchr(line, '\n')) {
        line += *line == '\n';
        const char *path = strchr(line, ':');
        path = path ? strchr(path + 1, ':') : NULL;
        if (path)
            s = supervisor_of_path(path + 1);
    }
    return s;
}

/* The value of "KEY=" in lines of text; its length. */
static const char *find_value(const char *text, const char *key, size_t *ret_n)
{
    size_t k = strlen(key);
    for (const char *line = text; line; line = strchr(line, '\n')) {
        line += *line == '\n';
        if (!strncmp(line, key, k) && line[k] == '=') {
            *ret_n = strcspn(line + k + 1, "\n");
            return line + k + 1;
        }
    }
    *ret_n = 0;
    return "";
}

bool supervisor_restarts(const char *properties)
{
    static const char *const never[] = {"no", "on-success", "on-watchdog"};
    size_t n;
    const char *restart = find_value(properties, "Restart", &n);
    bool found = false;
    for (size_t i = 0; i < sizeof(never) / sizeof(*never); i++)
        found |= strlen(never[i]) == n && !memcmp(never[i], restart, n);
    if (!found)
        return true;
    find_value(properties, "RestartForceExitStatus", &n);
    return n > 0;
}

static int ask_systemd(const struct supervisor *s, char **ret_properties, struct vm_error **err)
{
    static const char asked[] = "--property=Restart,RestartForceExitStatus";
    char machine[128], bytes[PASSWD_BYTES];
    struct passwd entry, *found = NULL;
    if (s->of_user && (getpwuid_r(s->uid, &entry, bytes, sizeof(bytes), &found) || !found))
        return error_set(err, VM_ERROR_NOT_FOUND, "there is no user %u", s->uid);
    snprintf(machine, sizeof(machine), "--machine=%.100s@.host", found ? found->pw_name : "");
    const char *const of_system[] = {"systemctl", "show", asked, "--", s->unit, NULL};
    const char *const of_user[] = {"systemctl", "--user", machine, "show",
                                   asked,       "--",     s->unit, NULL};
    *ret_properties = run_tool(s->of_user ? of_user : of_system,
                               "say whether the unit would be started again", NULL, err);
    return *ret_properties ? 0 : -1;
}

static int check_unit(const struct supervisor *s, struct vm_error **err)
{
    cleanup_free char *properties = NULL;
    if (ask_systemd(s, &properties, err) < 0) {
        error_wrap(err, "the VM belongs to the unit %s of systemd", s->unit);
        return error_set_kind(err, VM_ERROR_REFUSED);
    }
    if (!supervisor_restarts(properties))
        return 0;
    return error_set(err, VM_ERROR_REFUSED,
                     "systemd would start the VM again here once it has moved: its unit %s has "
                     "Restart=. Give it Restart=no "
                     "(systemctl %sedit --runtime %s, section [Service]) and send it then",
                     s->unit, s->of_user ? "--user " : "", s->unit);
}

static int read_supervisor(pid_t pid, struct supervisor *ret, struct vm_error **err)
{
    char path[32];
    cleanup_free char *text = NULL;
    size_t n;
    snprintf(path, sizeof(path), "/proc/%d/cgroup", pid);
    if (io_read_file(path, CGROUP_TEXT_MAX, &text, &n, err) < 0)
        return -1;
    *ret = supervisor_of_cgroup(text);
    return 0;
}

int supervisor_check(const struct process_identity *process, char out_note[SUPERVISOR_NOTE_MAX],
                     struct vm_error **err)
{
    struct supervisor its, own;
    cleanup_error struct vm_error *why = NULL;
    *out_note = 0;
    if (read_supervisor(process->pid, &its, &why) < 0)
        return process_alive(process)
                   ? error_propagate(err, steal_ptr(&why))
                   : error_set(err, VM_ERROR_VMM_DIED, "the VM's process %d ended", process->pid);
    if (read_supervisor(getpid(), &own, err) < 0)
        return -1;
    if (its.kind == own.kind && its.of_user == own.of_user && its.uid == own.uid &&
        !strcmp(its.unit, own.unit))
        return 0;
    if (its.kind == SUPERVISOR_LIBVIRT)
        snprintf(out_note, SUPERVISOR_NOTE_MAX,
                 "libvirt here may be told to start it again (%.60s): undefine the domain, and "
                 "take it from a cluster manager",
                 its.unit);
    return its.kind == SUPERVISOR_SYSTEMD ? check_unit(&its, err) : 0;
}

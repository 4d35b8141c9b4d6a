/* SPDX-License-Identifier: Apache-2.0 */
#include "agent/config.h"

#include "base/io.h"
#include "base/options.h"
#include "base/text.h"
#include "repo/url.h"

#include <grp.h>
#include <pwd.h>
#include <stddef.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>

static int copy_text(const char *value, char **member, struct vm_error **err)
{
    char *copy = strdup(value);
    if (!copy)
        return error_nomem(err);
    free(*member);
    *member = copy;
    return 0;
}

static int parse_text(const struct option *o, const char *value, void *member,
                      struct vm_error **err)
{
    (void)o;
    if (field_check_text("it", value, 0, CONFIG_FILE_MAX, err) < 0)
        return -1;
    return copy_text(value, member, err);
}

/* A group or user of this host, or "none". */
static int copy_account(const char *value, bool exists, const char *what, void *member,
                        struct vm_error **err)
{
    if (!*value)
        return error_set(err, VM_ERROR_USAGE, "a name, or none, is expected");
    if (!strcmp(value, "none"))
        return copy_text("", member, err);
    return exists ? copy_text(value, member, err)
                  : error_set(err, VM_ERROR_USAGE, "there is no %s named %s", what, value);
}

static int parse_user(const struct option *o, const char *value, void *member,
                      struct vm_error **err)
{
    (void)o;
    return copy_account(value, getpwnam(value), "user", member, err);
}

static int parse_group(const struct option *o, const char *value, void *member,
                       struct vm_error **err)
{
    (void)o;
    return copy_account(value, getgrnam(value), "group", member, err);
}

static int parse_path(const struct option *o, const char *value, void *member,
                      struct vm_error **err)
{
    (void)o;
    if (field_check_path("it", value, err) < 0)
        return -1;
    return copy_text(value, member, err);
}

static int parse_repository(const struct option *o, const char *value, void *member,
                            struct vm_error **err)
{
    (void)o;
    struct repo_url url;
    if (repo_url_parse(value, &url, err) < 0)
        return -1;
    repo_url_finish(&url);
    return copy_text(value, member, err);
}

static int parse_path_or_none(const struct option *o, const char *value, void *member,
                              struct vm_error **err)
{
    return !strcmp(value, "none") ? copy_text("", member, err) : parse_path(o, value, member, err);
}

/* bind(2) takes 107 bytes; say so here, where the line is known. */
static int parse_socket(const struct option *o, const char *value, void *member,
                        struct vm_error **err)
{
    size_t max = sizeof(((struct sockaddr_un *)0)->sun_path) - 1;
    if (strlen(value) > max)
        return error_set(err, VM_ERROR_USAGE, "the path of a socket has at most %zu bytes", max);
    return parse_path(o, value, member, err);
}

static int parse_endpoint(const struct option *o, const char *value, void *member,
                          struct vm_error **err)
{
    (void)o;
    struct endpoint *e = member;
    if (!strcmp(value, "none")) {
        *e = (struct endpoint){0};
        return 0;
    }
    return endpoint_parse(value, DEFAULT_PEER_PORT, e, err);
}

static int parse_log_level(const struct option *o, const char *value, void *member,
                           struct vm_error **err)
{
    (void)o;
    if (!log_level_parse(value, member))
        return error_set(err, VM_ERROR_USAGE, "one of error, warn, info, debug is expected");
    return 0;
}

static int parse_vmm(const struct option *o, const char *value, void *member,
                     struct vm_error **err)
{
    struct config_vmms *vmms = member;
    if (vmms->n == CONFIG_LIST_MAX)
        return error_set(err, VM_ERROR_USAGE, "at most %d may be listed", CONFIG_LIST_MAX);
    if (parse_path(o, value, &vmms->list[vmms->n], err) < 0)
        return -1;
    vmms->n++;
    return 0;
}

static int parse_peer(const struct option *o, const char *value, void *member, struct vm_error **err)
{
    (void)o;
    struct config_peers *peers = member;
    struct endpoint e;
    if (peers->n == CONFIG_LIST_MAX)
        return error_set(err, VM_ERROR_USAGE, "at most %d may be listed", CONFIG_LIST_MAX);
    if (endpoint_parse(value, DEFAULT_PEER_PORT, &e, err) < 0)
        return -1;
    if (strcmp(e.host, value))
        return error_set(err, VM_ERROR_USAGE, "the name of a host is expected, as in its certificate");
    if (copy_text(value, &peers->list[peers->n], err) < 0)
        return -1;
    peers->n++;
    return 0;
}

static bool is_device_name(const char *name)
{
    size_t n = strlen(name);
    return n >= 1 && n <= 15 && !strpbrk(name, "/ \t=,:");
}

/* "NAME = NAME"; how it is written in the file is taken apart by parse_line. */
static int parse_map(const struct option *o, const char *value, void *member,
                     struct vm_error **err)
{
    (void)o;
    struct config_maps *maps = member;
    cleanup_free char *from = strdup(value);
    if (!from)
        return error_nomem(err);
    char *to = strstr(from, " = ");
    if (!to)
        return error_set(err, VM_ERROR_USAGE, "map NAME = NAME is expected");
    *to = 0;
    to += 3;
    if (!is_device_name(from) || !is_device_name(to))
        return error_set(err, VM_ERROR_USAGE, "network devices have names of 1 to 15 characters");
    for (unsigned i = 0; i < maps->n; i++)
        if (!strcmp(maps->list[i].from, from))
            return error_set(err, VM_ERROR_USAGE, "%s is mapped twice", from);
    if (maps->n == CONFIG_LIST_MAX)
        return error_set(err, VM_ERROR_USAGE, "at most %d may be listed", CONFIG_LIST_MAX);
    struct config_map *m = &maps->list[maps->n++];
    if (copy_text(to, &m->to, err) < 0)
        return -1;
    m->from = steal_ptr(&from);
    return 0;
}

#define MEMBER(m) .offset = offsetof(struct config, m)

static const struct option config_options[] = {
    {"host", "NAME", parse_text, MEMBER(host),
     .text =
         "What this host calls itself, in logs and towards other agents. The kernel's host name "
         "if it is not set"},
    {"state-dir", "DIR", parse_path, MEMBER(state_dir), .def = "/var/lib/vmmig",
     .text = "What must survive a crash: the VMs and the hand-overs under way. On a local disk"},
    {"runtime-dir", "DIR", parse_path, MEMBER(runtime_dir), .def = "/run/vmmig",
     .text = "Sockets; may be lost when the host boots"},
    {"control-socket", "PATH", parse_socket, MEMBER(control_socket),
     .text =
         "Where `vmmig` finds the agent. control.sock in the runtime directory if it is not set"},
    {"control-group", "GROUP", parse_group, MEMBER(control_group), .def = "none",
     .text = "Its members may drive the agent, besides root and the agent's own user. They can run "
             "VMMs of the list below with any arguments, and name folders in which the agent makes "
             "disks: trust them as you trust root"},
    {"listen", "ADDRESS[:PORT]", parse_endpoint, MEMBER(listen), .def = "[::]:16550",
     .text = "Where other agents reach this one; none: it takes no VMs"},
    {"ca", "FILE", parse_path, MEMBER(ca_file), .def = "/etc/vmmig/pki/ca.crt",
     .text = "Certificate of the cluster's authority; a peer without one of its certificates gets "
             "nothing"},
    {"cert", "FILE", parse_path, MEMBER(cert_file), .def = "/etc/vmmig/pki/host.crt",
     .text = "This host's certificate"},
    {"key", "FILE", parse_path, MEMBER(key_file), .def = "/etc/vmmig/pki/host.key",
     .text = "Its private key. An agent without these three works for its own host alone; they are "
             "read when they are there, and again when they change"},
    {"control-peer", "HOST", parse_peer, MEMBER(control_peers), .repeatable = true,
     .text = "Root of that host, as its certificate names it first, may drive this agent as root "
             "of this one may, with `vmmig --agent` there. Nobody else is obeyed over the network"},
    {"crl", "FILE", parse_path, MEMBER(crl_file),
     .text =
         "The authority's list of revoked certificates (`vmmig pki revoke` makes it): a peer that "
         "is in it gets nothing. It is read again when it changes. Every certificate counts if "
         "this is not set"},
    {"insecure-plain", "yes|no", option_parse_flag, MEMBER(insecure_plain), .def = "no",
     .text = "Talk to peers in plain TCP, without certificates: whoever reaches the port can take "
             "and give VMs. For benchmarks and tests in networks that nobody else is in"},
    {"vmm", "PATH", parse_vmm, MEMBER(vmms), .def = "/usr/bin/qemu-system-x86_64",
     .repeatable = true,
     .text = "A QEMU that may be run as a VM, here or by a peer. The first `vmm` line replaces the "
             "default"},
    {"attach-vmm", "PATH", parse_vmm, MEMBER(attach_vmms), .repeatable = true,
     .text = "A VMM that links libvmmig-attach and may be run as a VM, here or by a peer, with any "
             "arguments"},
    {"repository", "URL", parse_repository, MEMBER(repository), .def = "dir:/var/lib/vmmig/repo",
     .text = "Where images, snapshots and templates are: dir:PATH, or "
             "rados:POOL[/NAMESPACE][?conf=FILE&id=USER]"},
    {"log-dir", "DIR", parse_path, MEMBER(log_dir), .def = "/var/log/vmmig",
     .text = "Where each VM's output goes, NAME.log"},
    {"vm-cgroup", "DIR", parse_path_or_none, MEMBER(vm_cgroup), .def = "none",
     .text =
         "A cgroup, as /sys/fs/cgroup/vmmig.slice (where the installed unit is), below which "
         "each VM gets a cgroup of its own, to which its memory is charged; none: VMs share the "
         "agent's"},
    {"vm-user", "USER", parse_user, MEMBER(vm_user), .def = "none",
     .text = "Whom VMs run as; none: the agent's own user. An agent that is root then takes no VM "
             "of another host and starts none out of the repository. That user must be able to "
             "open the VMs' disks and taps and /dev/kvm, and to make the sockets that their "
             "command lines name: /run/vmmig/vms is a folder for those. All VMs of a host run as "
             "the same user: one whose guest breaks out of its VMM reaches the others'"},
    {"mount-dir", "DIR", parse_path, MEMBER(mount_dir), .def = "/run/vmmig/images",
     .text = "Where the repository's images appear as files, for clones. The same on all hosts "
             "between which clones move"},
    {"cache-dir", "DIR", parse_path, MEMBER(cache_dir), .def = "/var/cache/vmmig",
     .text = "Where data of the repository is kept that was read through mount-dir"},
    {"cache-size", "SIZE", option_parse_size, MEMBER(cache_size), .min = 1 << 20, .max = 1ULL << 50,
     .def = "8G", .text = "Most that the cache takes"},
    {"disk-timeout", "MS", option_parse_u64, MEMBER(disk_timeout_ms), .min = 100, .max = 86400000,
     .def = "30000", .unit = "ms",
     .text = "When a clone's read from its template's disk fails because the repository does not "
             "answer; reads of memory wait as long as it takes"},
    {"record-time", "MS", option_parse_u64, MEMBER(record_ms), .min = 10, .max = 600000,
     .def = "5000", .unit = "ms",
     .text = "For how long the first use of a template tells what later ones read ahead"},
    {"clone-dir", "DIR", parse_path, MEMBER(clone_dir), .def = "/var/lib/vmmig/clones",
     .text = "Where the disks of clones are, a folder each. On storage that hosts share, where "
             "clones are to move"},
    {"libexec-dir", "DIR", parse_path, MEMBER(libexec_dir),
     .text =
         "Where vmmig-mount, vmmig-fetch and vmmig-guard are. The installed ones if it is not set"},
    {"publish-group", "GROUP", parse_group, MEMBER(publish_group), .def = "none",
     .text = "Whose members may publish and delete templates, besides root; none: whoever may "
             "drive the agent"},
    {"scratch-dir", "DIR", parse_path, MEMBER(scratch_dir), .def = "/var/lib/vmmig/scratch",
     .text = "Room for what guests overwrite while a snapshot of them is stored. On a local disk"},
    {"nbdkit-plugin", "PATH", parse_path, MEMBER(nbdkit_plugin),
     .text = "nbdkit's plugin through which disks leave a VM. The installed one if it is not set"},
    {"map", "NAME = NAME", parse_map, MEMBER(maps), .repeatable = true,
     .text = "What a tap or bridge in a peer's command line is called on this host"},
    {"max-vms", "N", option_parse_u64, MEMBER(max_vms), .min = 1, .max = CONFIG_VMS_MAX,
     .def = "256", .unit = "VMs", .text = "How many VMs this agent keeps"},
    {"max-jobs", "N", option_parse_u64, MEMBER(max_jobs), .min = 1, .max = CONFIG_JOBS_MAX,
     .def = "8", .unit = "jobs",
     .text = "How many migrations and jobs of the repository may be under way at once"},
    {"max-clients", "N", option_parse_u64, MEMBER(max_clients), .min = 1, .max = CONFIG_CLIENTS_MAX,
     .def = "32", .unit = "connections", .text = "How many commands may talk to the agent at once"},
    {"max-bandwidth", "RATE", option_parse_rate, MEMBER(max_bandwidth), .max = 1ULL << 50,
     .def = "0",
     .text = "Most that one migration puts on the wire, as 100M (bytes) or 1gbit; 0: no "
             "limit"},
    {"connect-timeout", "MS", option_parse_u64, MEMBER(connect_timeout_ms), .min = 100,
     .max = 600000, .def = "10000", .unit = "ms", .text = "How long dialling a peer may take"},
    {"peer-timeout", "MS", option_parse_u64, MEMBER(peer_timeout_ms), .min = 1000, .max = 86400000,
     .def = "60000", .unit = "ms",
     .text = "How long a lost peer is waited for before a migration in mid-copy is undone. The "
             "destination waits 10 s longer for a source of which nothing comes, also if it is "
             "connected"},
    {"log-level", "LEVEL", parse_log_level, MEMBER(log_level), .def = "info",
     .text = "error, warn, info or debug"},
    {NULL}};

#undef MEMBER

/* Cut white space off both ends, in place. */
static char *trim(char *text)
{
    text += strspn(text, " \t");
    size_t n = strlen(text);
    while (n && strchr(" \t\r", text[n - 1]))
        text[--n] = 0;
    return text;
}

/*
 * Take `key = value` apart. "map NAME = NAME" has the key "map" and the value "NAME = NAME", which
 * is rebuilt in `value` with single blanks.
 */
static int split_line(char *line, char **ret_key, char *value, size_t size, struct vm_error **err)
{
    char *equals = strchr(line, '=');
    if (!equals)
        return error_set(err, VM_ERROR_USAGE, "`key = value` is expected");
    *equals = 0;
    char *key = trim(line);
    char *right = trim(equals + 1);
    size_t n = strcspn(key, " \t");
    int length;
    if (key[n]) {
        char *subject = trim(key + n);
        key[n] = 0;
        length = snprintf(value, size, "%s = %s", subject, right);
    } else {
        length = snprintf(value, size, "%s", right);
    }
    if (length < 0 || (size_t)length >= size)
        return error_set(err, VM_ERROR_USAGE, "the line is too long");
    *ret_key = key;
    return 0;
}

static int parse_line(struct config *c, char *line, bool *seen, struct vm_error **err)
{
    char value[FIELD_PATH_MAX + 64], *key = NULL;
    line = trim(line);
    if (!*line || *line == '#')
        return 0;
    if (split_line(line, &key, value, sizeof(value), err) < 0)
        return -1;
    const struct option *o = option_find(config_options, "", key, err);
    if (!o)
        return -1;
    if (seen[o - config_options] && !o->repeatable)
        return error_set(err, VM_ERROR_USAGE, "%s is given twice", key);
    seen[o - config_options] = true;
    return option_set(o, "", value, c, err);
}

static int parse_text_lines(struct config *c, const char *name, const char *text, bool *seen,
                            struct vm_error **err)
{
    cleanup_free char *copy = strdup(text);
    if (!copy)
        return error_nomem(err);
    char *next = copy;
    for (unsigned number = 1; next; number++) {
        char *line = strsep(&next, "\n");
        if (parse_line(c, line, seen, err) < 0)
            return error_wrap(err, "%s:%u", name, number);
    }
    return 0;
}

/* Plain TCP has no use for certificates; whoever names both has misunderstood one of them. */
static int settle_security(struct config *c, const bool *seen, struct vm_error **err)
{
    char **files[] = {&c->ca_file, &c->cert_file, &c->key_file, &c->crl_file};
    static const char *const names[] = {"ca", "cert", "key", "crl"};
    for (int i = 0; c->insecure_plain && i < 4; i++) {
        if (seen[option_find(config_options, "", names[i], err) - config_options])
            return error_set(err, VM_ERROR_USAGE,
                             "insecure-plain and %s exclude each other: leave one out", names[i]);
        free(steal_ptr(files[i]));
    }
    return 0;
}

static int set_missing(struct config *c, const bool *seen, struct vm_error **err)
{
    char host[256] = "";
    for (const struct option *o = config_options; o->name; o++)
        if (o->def && !seen[o - config_options] && option_set(o, "", o->def, c, err) < 0)
            return -1;
    if (settle_security(c, seen, err) < 0)
        return -1;
    if (!c->host) {
        gethostname(host, sizeof(host) - 1);
        if (copy_text(*host ? host : "localhost", &c->host, err) < 0)
            return -1;
    }
    if (!c->libexec_dir && copy_text(LIBEXEC_DIR, &c->libexec_dir, err) < 0)
        return -1;
    if (!c->nbdkit_plugin && copy_text(NBDKIT_PLUGIN, &c->nbdkit_plugin, err) < 0)
        return -1;
    if (c->control_socket)
        return 0;
    cleanup_free char *path = NULL;
    if (asprintf(&path, "%s/control.sock", c->runtime_dir) < 0)
        return error_nomem(err);
    return option_set(option_find(config_options, "", "control-socket", err), "", path, c, err);
}

struct config *config_parse(const char *name, const char *text, struct vm_error **err)
{
    bool seen[sizeof(config_options) / sizeof(*config_options)] = {false};
    CLEANUP(config) struct config *c = calloc(1, sizeof(*c));
    if (!c) {
        error_nomem(err);
        return NULL;
    }
    int r = parse_text_lines(c, name, text, seen, err);
    if (r == 0 && set_missing(c, seen, err) < 0)
        r = error_wrap(err, "%s", name);
    if (r < 0) {
        error_set_kind(err, VM_ERROR_USAGE);
        return NULL;
    }
    return steal_ptr(&c);
}

struct config *config_load(const char *path, struct vm_error **err)
{
    cleanup_free char *text = NULL;
    size_t len = 0;
    if (!path)
        return config_parse("defaults", "", err);
    if (io_read_file(path, CONFIG_FILE_MAX, &text, &len, err) < 0)
        return NULL;
    if (strlen(text) != len) {
        error_set(err, VM_ERROR_USAGE, "%s is not a text file", path);
        return NULL;
    }
    return config_parse(path, text, err);
}

void config_destroy(struct config *c)
{
    if (!c)
        return;
    char *texts[] = {c->host,    c->state_dir, c->runtime_dir, c->control_socket, c->control_group,
                     c->ca_file, c->cert_file, c->key_file,    c->vm_user,    c->log_dir,
                     c->vm_cgroup,  c->repository, c->scratch_dir, c->nbdkit_plugin,
                     c->mount_dir,  c->cache_dir,  c->clone_dir,  c->libexec_dir,
                     c->publish_group, c->crl_file};
    for (size_t i = 0; i < sizeof(texts) / sizeof(*texts); i++)
        free(texts[i]);
    for (unsigned i = 0; i < c->vmms.n; i++)
        free(c->vmms.list[i]);
    for (unsigned i = 0; i < c->attach_vmms.n; i++)
        free(c->attach_vmms.list[i]);
    for (unsigned i = 0; i < c->control_peers.n; i++)
        free(c->control_peers.list[i]);
    for (unsigned i = 0; i < c->maps.n; i++) {
        free(c->maps.list[i].from);
        free(c->maps.list[i].to);
    }
    free(c);
}

const char *config_map_name(const struct config *c, const char *name)
{
    for (unsigned i = 0; i < c->maps.n; i++)
        if (!strcmp(c->maps.list[i].from, name))
            return c->maps.list[i].to;
    return name;
}

static const char *find_binary(const struct config_vmms *list, const char *argv0)
{
    for (unsigned i = 0; i < list->n; i++) {
        const char *path = list->list[i];
        const char *slash = strrchr(path, '/');
        if (!strcmp(path, argv0) || !strcmp(slash + 1, argv0))
            return path;
    }
    return NULL;
}

const char *config_find_vmm(const struct config *c, const char *argv0)
{
    return find_binary(&c->vmms, argv0);
}

const char *config_find_attach_vmm(const struct config *c, const char *argv0)
{
    return find_binary(&c->attach_vmms, argv0);
}

bool config_obeys(const struct config *c, const char *host)
{
    for (unsigned i = 0; i < c->control_peers.n; i++)
        if (!strcasecmp(c->control_peers.list[i], host))
            return true;
    return false;
}

void config_print_help(FILE *out)
{
    options_print_help(out, config_options, "");
}

void config_print_manual(FILE *out)
{
    options_print_manual(out, config_options, "");
}

void config_print_sample(FILE *out)
{
    fputs("# vmmigd.conf: what is commented out is the default.\n", out);
    for (const struct option *o = config_options; o->name; o++) {
        fputs("\n# ", out);
        char text[512];
        snprintf(text, sizeof(text), "%s.", o->text);
        for (char *line = text; line;) {
            char *cut = NULL;
            if (strlen(line) > TEXT_COLUMNS - 2) {
                cut = line + TEXT_COLUMNS - 2;
                while (*cut != ' ')
                    cut--;
                *cut++ = 0;
            }
            fprintf(out, cut ? "%s\n# " : "%s\n", line);
            line = cut;
        }
        if (strchr(o->argument, '='))
            fprintf(out, "#%s %s\n", o->name, o->argument);
        else
            fprintf(out, "#%s = %s\n", o->name, o->def ? o->def : o->argument);
    }
}

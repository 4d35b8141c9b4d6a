/* SPDX-License-Identifier: Apache-2.0 */
/* vmmig-mount: see snapshot/holder.h. */
#include "base/cleanup.h"
#include "base/clock.h"
#include "base/io.h"
#include "base/log.h"
#include "base/options.h"
#include "snapshot/holder.h"
#include "snapshot/holder_control.h"

#include <dirent.h>
#include <errno.h>
#include <grp.h>
#include <signal.h>
#include <stddef.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>

#define TICK_NS (200 * NSEC_PER_MSEC)
enum { FILES_WANTED = 65536 };

#define MEMBER(name) .offset = offsetof(struct holder_options, name)
static const struct option rows[] = {
    {"mount", "DIR", option_parse_text, MEMBER(mount), .required = true, .text = "Where the tree appears"},
    {"repository", "URL", option_parse_text, MEMBER(repository), .required = true,
     .text = "The repository whose images it shows"},
    {"cache", "DIR", option_parse_text, MEMBER(cache), .required = true,
     .text = "Folder for the cache's files"},
    {"cache-size", "SIZE", option_parse_size, MEMBER(cache_size), .min = 1 << 20,
     .max = 1ULL << 50, .def = "4G", .text = "Most that the cache takes"},
    {"control", "SOCKET", option_parse_text, MEMBER(control), .required = true,
     .text = "Socket at which the agent finds it again"},
    {"fetcher", "PATH", option_parse_text, MEMBER(fetcher), .required = true, .text = "vmmig-fetch"},
    {"owner", "NAME", option_parse_text, MEMBER(owner), .required = true,
     .text = "Whose leases in the repository are this mount's"},
    {"group", "GROUP", option_parse_text, MEMBER(group), .text = "Who may read the files, besides root"},
    {"read-timeout", "MS", option_parse_u64, MEMBER(read_timeout_ms), .min = 100, .max = 86400000,
     .def = "30000", .unit = "ms", .text = "When the read of a disk fails"},
    {"record", "MS", option_parse_u64, MEMBER(record_ms), .min = 10, .max = 600000, .def = "5000",
     .unit = "ms", .text = "How long the first use of a template is recorded"},
    {"help", NULL, option_parse_flag, MEMBER(help), .text = "This text"},
    {NULL}};
#undef MEMBER

static void on_tick(void *arg)
{
    struct holder *h = arg;
    int64_t now = clock_mono_ns();
    if (h->stopping && !control_count_open(h, NULL))
        loop_stop(h->loop);
    nodes_expire(h, now);
    fetchers_tick(h, now);
    image_trim(h);
}

/* Guests die with the mount: a signal ends it only once nobody uses it. */
static void on_stop(void *arg)
{
    struct holder *h = arg;
    h->stopping = true;
    if (control_count_open(h, NULL))
        log_warn("files are in use: the mount ends when they are closed", "mount=%s",
                 h->options.mount);
    else
        loop_stop(h->loop);
}

/* The cache's files have no names, so that whatever has one is not ours. */
static int check_cache(const char *path, struct vm_error **err)
{
    if (io_make_folders(path, 0700, err) < 0)
        return -1;
    DIR *dir = opendir(path);
    if (!dir)
        return error_errno(err, errno, "cannot open the cache %s", path);
    for (struct dirent *e; (e = readdir(dir));)
        if (strcmp(e->d_name, ".") && strcmp(e->d_name, ".."))
            log_warn("a file in the cache's folder is not the cache's: it is not looked at",
                     "file=%s/%s", path, log_q(e->d_name));
    closedir(dir);
    return 0;
}

static int find_group(struct holder *h, struct vm_error **err)
{
    h->uid = geteuid();
    h->gid = getegid();
    if (!h->options.group)
        return 0;
    const struct group *g = getgrnam(h->options.group);
    if (!g)
        return error_set(err, VM_ERROR_NOT_FOUND, "there is no group named %s", h->options.group);
    h->gid = g->gr_gid;
    return 0;
}

static int prepare(struct holder *h, struct vm_error **err)
{
    struct rlimit files = {FILES_WANTED, FILES_WANTED};
    if (setrlimit(RLIMIT_NOFILE, &files) < 0) {
        getrlimit(RLIMIT_NOFILE, &files);
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }
    h->next_ino = HOLDER_FIRST_INO;
    h->read_buffer = malloc(HOLDER_FETCH_MAX);
    if (!h->read_buffer)
        return error_nomem(err);
    if (mount_is_there(h->options.mount))
        return error_set(err, VM_ERROR_CONFLICT, "there is a mount at %s already",
                         h->options.mount);
    if (access(h->options.mount, X_OK) < 0)
        return error_errno(err, errno, "cannot mount at %s", h->options.mount);
    if (mount_life(h->life, err) < 0)
        return -1;
    return find_group(h, err) < 0 ? -1 : check_cache(h->options.cache, err);
}

/* Tell who started it that it is ready: a line on the standard output. */
static void say_ready(void)
{
    puts("ready");
    fflush(stdout);
}

static int serve(struct holder *h, struct vm_error **err)
{
    h->loop = loop_create(err);
    if (!h->loop || !loop_watch_signal(h->loop, SIGTERM, on_stop, h, err) ||
        !loop_watch_signal(h->loop, SIGINT, on_stop, h, err) ||
        !loop_watch_timer(h->loop, TICK_NS, on_tick, h, err))
        return -1;
    if (control_open(h, err) < 0 || tree_mount(h, err) < 0 || fetchers_start(h, err) < 0)
        return -1;
    say_ready();
    return loop_run(h->loop, err);
}

static int run(int argc, char **argv, struct vm_error **err)
{
    static struct holder h;
    struct positionals p;
    if (options_set_defaults(rows, &h.options, err) < 0)
        return -1;
    if (argc == 2 && !strcmp(argv[1], "--help")) {
        puts("usage: vmmig-mount OPTION...\n\nHolds a mount of a repository; the agent starts it.\n");
        options_print_help(stdout, rows, "--");
        return 0;
    }
    if (options_parse(rows, argc - 1, argv + 1, &h.options, &p, err) < 0)
        return -1;
    signal(SIGPIPE, SIG_IGN);
    int r = prepare(&h, err) < 0 ? -1 : serve(&h, err);
    tree_unmount(&h);
    control_close(&h);
    fetchers_stop(&h);
    images_destroy(&h);
    free(h.read_buffer);
    return r;
}

int main(int argc, char **argv)
{
    cleanup_error struct vm_error *err = NULL;
    if (run(argc, argv, &err) == 0)
        return 0;
    fprintf(stderr, "vmmig-mount: %s\n", error_message(err));
    return error_kind_status(err ? err->kind : VM_ERROR_FAILED);
}

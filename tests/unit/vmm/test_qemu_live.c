/* SPDX-License-Identifier: Apache-2.0 */
/* The QEMU driver with real QEMUs: attach, launch, pause, resume, and how a source ends. */
#include "live.h"

#include "base/clock.h"
#include "base/io.h"

#include <errno.h>
#include <inttypes.h>
#include <signal.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

static void test_spawn_and_attach(void **state)
{
    struct vm_error *err = NULL;
    struct qemu *q = live_spawn("a", &err, "-m", "64", "-S", "-daemonize", NULL);
    if (!q)
        fail_msg("%s", error_message(err));
    assert_int_equal(qmp_version(qemu_qmp(q))->major >= 7, 1);
    assert_run_state(q, GUEST_PAUSED);
    struct process_identity process = qemu_guest(q)->process;
    assert_true(process_alive(&process));
    qemu_destroy(q); /* as when the agent ends */
    assert_true(process_alive(&process));

    q = qemu_attach(live_path("a", ".qmp"), 5000, &err);
    if (!q)
        fail_msg("%s", error_message(err));
    assert_true(process_identity_equal(&process, &qemu_guest(q)->process));
    live_end(q);
    assert_false(process_alive(&process));
}

static void test_spawn_failures(void **state)
{
    struct vm_error *err = NULL;
    struct stat st;
    assert_null(live_spawn("a", &err, "-drive", "file=/nonexistent/disk.raw", NULL));
    assert_error(&err, VM_ERROR_VMM_DIED, "Could not open '/nonexistent/disk.raw'");
    assert_int_equal(stat(live_path("a", ".qmp"), &st), -1);

    char *argv[] = {(char[]){"x"}, NULL};
    struct qemu_launch launch = {.binary = "/nonexistent/qemu",
                                 .argv = argv,
                                 .qmp_path = live_path("a", ".qmp"),
                                 .log_path = live_path("a", ".log")};
    assert_null(qemu_spawn(&launch, &err));
    assert_error(&err, VM_ERROR_NOT_FOUND, "cannot run /nonexistent/qemu");
    assert_int_equal(stat(live_path("a", ".qmp"), &st), -1);
    launch.binary = LIVE_BINARY;
    launch.cwd = "/nonexistent/folder";
    assert_null(qemu_spawn(&launch, &err));
    assert_error(&err, VM_ERROR_NOT_FOUND, "cannot enter the folder /nonexistent/folder");
    /* Another host's word is entered as the VMM's user, and does without. */
    char private[] = "/tmp/vmmig-test-cwd.XXXXXX", proc_path[64], there[64] = "";
    char *none[] = {(char[]){"qemu"},     (char[]){"-machine"}, (char[]){"none"},
                    (char[]){"-display"}, (char[]){"none"},     NULL};
    assert_non_null(mkdtemp(private)); /* 0700 */
    assert_int_equal(chmod(live_dir, 0711), 0);
    launch.argv = none;
    launch.cwd = private;
    launch.user = "nobody";
    launch.foreign_cwd = true;
    struct qemu *q = live_note(qemu_spawn(&launch, &err));
    if (!q)
        fail_msg("%s", error_message(err));
    snprintf(proc_path, sizeof(proc_path), "/proc/%d/cwd", qemu_guest(q)->process.pid);
    assert_true(readlink(proc_path, there, sizeof(there) - 1) > 0);
    assert_string_equal(there, "/");
    live_end(q);
    assert_int_equal(rmdir(private), 0);
    launch.argv = argv;
    launch.foreign_cwd = false;
    launch.cwd = "/";
    launch.user = "no-such-user";
    assert_null(qemu_spawn(&launch, &err));
    assert_error(&err, VM_ERROR_NOT_FOUND, "no user no-such-user");
    launch.user = NULL;
    launch.binary = "/bin/cat"; /* not a QEMU: it ends, or says nothing */
    assert_null(qemu_spawn(&launch, &err));
    assert_error(&err, VM_ERROR_VMM_DIED, "cat");
}

/* A line of /proc/PID/FILE that begins with `key`, without it; "" if there is none. */
static const char *proc_line(const struct qemu *q, const char *file, const char *key)
{
    static char line[512];
    char path[64];
    snprintf(path, sizeof(path), "/proc/%d/%s", ((const struct guest *)q)->process.pid, file);
    FILE *f = fopen(path, "re");
    assert_non_null(f);
    bool found = false;
    while (!found && fgets(line, sizeof(line), f))
        found = !strncmp(line, key, strlen(key));
    fclose(f);
    line[found ? strcspn(line, "\n") : 0] = 0;
    return found ? line + strlen(key) : line;
}

/* What a VM inherits from the agent: nothing but what it is given, under a user of its own. */
static void test_isolation(void **state)
{
    struct vm_error *err = NULL;
    char fd_text[32], proc_path[64], expected[128];
    char *argv[] = {(char[]){"qemu"},        (char[]){"-accel"},   (char[]){"tcg"},
                    (char[]){"-nodefaults"}, (char[]){"-display"}, (char[]){"none"},
                    (char[]){"-m"},          (char[]){"32"},       NULL};
    int given[2], hidden[2];
    assert_int_equal(pipe(given), 0); /* not even close-on-exec */
    assert_int_equal(pipe(hidden), 0);
    setenv("VMMIG_TEST_SECRET", "x", 1);
    signal(SIGPIPE, SIG_IGN);
    assert_int_equal(chmod(live_dir, 0711), 0);
    struct qemu_launch launch = {.binary = LIVE_BINARY,
                                 .argv = argv,
                                 .fds = given,
                                 .n_fds = 1,
                                 .user = "nobody",
                                 .qmp_path = live_path("a", ".qmp"),
                                 .log_path = live_path("a", ".log")};
    struct qemu *q = live_note(qemu_spawn(&launch, &err));
    if (!q)
        fail_msg("%s", error_message(err));
    assert_string_equal(proc_line(q, "status", "Uid:\t"), "65534\t65534\t65534\t65534");
    assert_string_equal(proc_line(q, "status", "PPid:\t"), "1");
    assert_int_equal(getsid(qemu_guest(q)->process.pid), qemu_guest(q)->process.pid);
    assert_string_equal(proc_line(q, "environ", "VMMIG_TEST_SECRET"), "");
    snprintf(proc_path, sizeof(proc_path), "/proc/%d/fd/%d", qemu_guest(q)->process.pid, given[0]);
    snprintf(fd_text, sizeof(fd_text), "/proc/self/fd/%d", given[0]);
    char there[64] = "", here[64] = "";
    assert_true(readlink(proc_path, there, sizeof(there) - 1) > 0);
    assert_true(readlink(fd_text, here, sizeof(here) - 1) > 0);
    assert_string_equal(there, here);
    snprintf(fd_text, sizeof(fd_text), "/proc/self/fd/%d", hidden[0]);
    memset(here, 0, sizeof(here));
    assert_true(readlink(fd_text, here, sizeof(here) - 1) > 0);
    snprintf(expected, sizeof(expected), "ls -l /proc/%d/fd | grep -qF '%s'",
             qemu_guest(q)->process.pid, here);
    assert_int_not_equal(system(expected), 0);
    live_end(q);
}

static void test_pause_resume(void **state)
{
    struct vm_error *err = NULL;
    struct qemu *q = live_spawn("a", &err, "-m", "64", NULL);
    assert_non_null(q);
    assert_run_state(q, GUEST_RUNNING);
    assert_ok(guest_pause(qemu_guest(q), why));
    assert_run_state(q, GUEST_PAUSED);
    assert_ok(guest_pause(qemu_guest(q), why));
    assert_ok(guest_resume(qemu_guest(q), why));
    assert_run_state(q, GUEST_RUNNING);
    assert_ok(guest_resume(qemu_guest(q), why));
    assert_ok(guest_announce(qemu_guest(q), why));
    assert_ok(guest_kill(qemu_guest(q), 5000, why));
    struct guest_status status;
    assert_int_equal(guest_status(qemu_guest(q), &status, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_VMM_DIED);
    error_clear(&err);
    assert_int_equal(guest_resume(qemu_guest(q), &err), -1);
    assert_int_equal(err->kind, VM_ERROR_VMM_DIED);
    error_clear(&err);
    live_end(q);
}

static void test_move_and_back(void **state)
{
    struct live_move m = {.populate = true};
    struct vm_error *err = NULL;
    char loader[160];
    snprintf(loader, sizeof(loader), "loader,file=%s,addr=0x1000000,force-raw=on",
             live_path("random", ".bin"));
    struct qemu *q = live_spawn("a", &err, "-M", "q35", "-m", "128", "-device", loader, "-S", NULL);
    if (!q)
        fail_msg("%s", error_message(err));
    assert_ok(live_move(&m, q, "b", why));
    assert_true(m.memory_done);
    assert_run_state(q, GUEST_POSTMIGRATE);
    assert_run_state(m.to, GUEST_PAUSED);
    assert_same_memory(q, m.to, 0, 64 << 20);
    assert_true(m.bytes < 4 << 20);
    /* The hand-over is undone: the source goes on. */
    assert_ok(guest_resume(qemu_guest(q), why));
    assert_run_state(q, GUEST_RUNNING);
    live_move_finish(&m);
}

/* A destination of another user gets at its memory and its monitor through what it inherits. */
static void test_move_to_another_user(void **state)
{
    struct live_move m = {.user = "nobody", .populate = true};
    struct vm_error *err = NULL;
    assert_int_equal(chmod(live_dir, 0777), 0); /* for what the comparison writes */
    struct qemu *q = live_spawn("a", &err, "-m", "64", NULL);
    assert_non_null(q);
    assert_ok(live_move(&m, q, "b", why));
    assert_string_equal(proc_line(m.to, "status", "Uid:\t"), "65534\t65534\t65534\t65534");
    assert_same_memory(q, m.to, 0, 64 << 20);
    live_move_finish(&m);
}

/* What a migration leaves behind when it does not come to its end. */

static struct qemu *spawn_with(bool shared, bool running)
{
    struct vm_error *err = NULL;
    char loader[160];
    const char *machine = shared ? "q35,memory-backend=m" : "q35";
    const char *object = shared ? "memory-backend-memfd,id=m,size=128M,share=on"
                                : "memory-backend-ram,id=unused,size=4k";
    snprintf(loader, sizeof(loader), "loader,file=%s,addr=0x1000000,force-raw=on",
             live_path("random", ".bin"));
    struct qemu *q = live_spawn("a", &err, "-M", machine, "-m", "128", "-object", object, "-device",
                                loader, running ? NULL : "-S", NULL);
    if (!q)
        fail_msg("%s", error_message(err));
    return q;
}

static struct qemu *spawn_with_memory(bool running)
{
    return spawn_with(false, running);
}

static void block_third_batch(struct live_move *m)
{
    m->block = m->batches == 3;
    pthread_cond_broadcast(&m->changed);
}

/* Wait until the source stands in the middle of memory. */
static void wait_blocked(struct live_move *m)
{
    SCOPE_LOCK(&m->lock);
    while (!m->block)
        pthread_cond_wait(&m->changed, &m->lock);
}

static void unblock(struct live_move *m)
{
    SCOPE_LOCK(&m->lock);
    m->on_batch = NULL;
    m->block = false;
    pthread_cond_broadcast(&m->changed);
}

static void stop_in_the_middle(bool running, bool pause, enum guest_run_state expected)
{
    struct live_move m = {.on_batch = block_third_batch};
    struct qemu *q = spawn_with_memory(running);
    struct vm_error *err = NULL;
    struct guest_status status;
    struct guest_source_progress progress;
    assert_ok(live_prepare(&m, q, "b", why));
    assert_ok(live_start(&m, why));
    wait_blocked(&m);
    assert_ok(guest_status(qemu_guest(q), &status, why));
    assert_true(status.migrating);
    assert_ok(guest_source_progress(qemu_guest(q), &progress, why));
    assert_true(progress.total >= 128 << 20);
    assert_true(progress.remaining > 0 && progress.bytes_out > 0);
    assert_int_equal(progress.round, 1);
    /* One migration at a time. */
    assert_int_equal(live_start(&m, &err), -1);
    assert_error(&err, VM_ERROR_CONFLICT, "already being migrated");
    if (pause)
        assert_ok(guest_pause(qemu_guest(q), why));
    unblock(&m);
    assert_ok(guest_source_stop(qemu_guest(q), why));
    assert_true(m.done);
    assert_int_equal(live_wait(&m, &err), -1);
    assert_error(&err, VM_ERROR_CANCELLED, "stopped");
    assert_ok(guest_status(qemu_guest(q), &status, why));
    assert_false(status.migrating);
    assert_int_equal(status.state, expected);
    /* And the whole of it works afterwards. */
    assert_ok(guest_source_stop(qemu_guest(q), why));
    assert_ok(guest_kill(qemu_guest(m.to), 5000, why));
    qemu_destroy(m.to);
    qemu_definition_finish(&m.definition);
    struct live_move again = {0};
    assert_ok(live_move(&again, q, "b", why));
    assert_same_memory(q, again.to, 0, 128 << 20);
    live_move_finish(&again);
}

static void test_stop_leaves_running(void **state)
{
    stop_in_the_middle(true, false, GUEST_RUNNING);
}

static void test_stop_leaves_paused(void **state)
{
    stop_in_the_middle(true, true, GUEST_PAUSED);
}

static void test_stop_of_a_paused_guest(void **state)
{
    stop_in_the_middle(false, false, GUEST_PAUSED);
}

/* The engine's error ends the source, and is its error; the guest runs on. */
static int refuse_pages(void *arg, struct page_batch *batch, struct vm_error **err)
{
    page_batch_unref(batch);
    return error_set(err, VM_ERROR_NO_SPACE, "no room for pages");
}

static int ignore_bytes(void *arg, const void *data, size_t n, struct vm_error **err)
{
    return 0;
}

static int ignore_memory_done(void *arg, struct vm_error **err)
{
    return 0;
}

static void note_done(void *arg, struct vm_error *err)
{
    struct live_move *m = arg;
    SCOPE_LOCK(&m->lock);
    m->done = true;
    m->error = err;
    pthread_cond_broadcast(&m->changed);
}

static void test_callback_fails(void **state)
{
    struct live_move m = {0};
    struct vm_error *err = NULL;
    struct qemu *q = spawn_with_memory(true);
    assert_ok(live_prepare(&m, q, "b", why));
    struct guest_source_params params = {
        .channels = 1, .regions = m.regions, .n_regions = m.n_regions};
    struct guest_source_events events = {.pages = refuse_pages,
                                         .bytes = ignore_bytes,
                                         .memory_done = ignore_memory_done,
                                         .done = note_done};
    assert_ok(guest_source_start(qemu_guest(q), &params, &events, &m, why));
    assert_int_equal(live_wait(&m, &err), -1);
    assert_error(&err, VM_ERROR_NO_SPACE, "no room for pages");
    assert_ok(guest_source_stop(qemu_guest(q), why));
    assert_run_state(q, GUEST_RUNNING);
    live_move_finish(&m);
}

static void test_source_dies(void **state)
{
    struct live_move m = {.on_batch = block_third_batch};
    struct vm_error *err = NULL;
    struct qemu *q = spawn_with_memory(true);
    assert_ok(live_prepare(&m, q, "b", why));
    assert_ok(live_start(&m, why));
    wait_blocked(&m);
    assert_ok(guest_kill(qemu_guest(q), 5000, why));
    unblock(&m);
    assert_int_equal(live_wait(&m, &err), -1);
    assert_int_equal(err->kind, VM_ERROR_VMM_DIED);
    error_clear(&err);
    assert_ok(guest_source_stop(qemu_guest(q), why));
    live_move_finish(&m);
}

static void test_sink_rejects(void **state)
{
    struct live_move m = {0};
    struct vm_error *err = NULL;
    struct qemu *q = spawn_with_memory(false);
    int64_t deadline = clock_mono_ns() + 20 * NSEC_PER_SEC;
    assert_ok(live_prepare(&m, q, "b", why));
    assert_int_equal(guest_resume(qemu_guest(m.to), &err), -1);
    assert_error(&err, VM_ERROR_REFUSED, "not been loaded");
    assert_ok(guest_sink_bytes(qemu_guest(m.to), "this is no stream", 17, deadline, -1, why));
    assert_int_equal(guest_sink_finish(qemu_guest(m.to), deadline, -1, &err), -1);
    assert_error(&err, VM_ERROR_VMM_DIED, "Not a migration stream");
    live_move_finish(&m);
}

static void test_sink_waits_no_longer(void **state)
{
    struct live_move m = {0};
    struct vm_error *err = NULL;
    struct qemu *q = spawn_with_memory(false);
    assert_ok(live_prepare(&m, q, "b", why));
    /* Nothing was ever given to it. */
    assert_int_equal(
        guest_sink_finish(qemu_guest(m.to), clock_mono_ns() + 20 * NSEC_PER_MSEC, -1, &err), -1);
    assert_error(&err, VM_ERROR_TIMEOUT, "not loaded the guest");
    cleanup_close int cancel = io_latch_new(&err);
    io_latch_set(cancel);
    assert_int_equal(guest_sink_finish(qemu_guest(m.to), INT64_MAX, cancel, &err), -1);
    assert_error(&err, VM_ERROR_CANCELLED, "");
    live_move_finish(&m);
}

/* QEMU itself refuses: its words, and nothing is left under way. */
static void test_qemu_refuses(void **state)
{
    struct live_move m = {0};
    struct vm_error *err = NULL;
    struct qemu *q = live_spawn("a", &err, "-M", "q35", "-m", "64", "-drive",
                                "driver=null-co,read-zeroes=on,if=none,id=n0", "-device",
                                "nvme,drive=n0,serial=1,id=nv", "-S", NULL);
    if (!q)
        fail_msg("%s", error_message(err));
    assert_int_equal(live_move(&m, q, "b", &err), -1);
    assert_error(&err, VM_ERROR_REFUSED, "non-migratable device");
    assert_ok(guest_source_stop(qemu_guest(q), why));
    assert_run_state(q, GUEST_PAUSED);
    live_move_finish(&m);
}

/* An idle guest that nobody pauses is given away completely, too, and never comes back by itself.
 */
static void test_idle_guest_completes(void **state)
{
    struct live_move m = {0};
    struct qemu *q = spawn_with_memory(true);
    assert_ok(live_prepare(&m, q, "b", why));
    assert_ok(live_start(&m, why));
    assert_ok(live_wait(&m, why));
    assert_true(m.rounds >= 2); /* the dirty log was read again before the end */
    assert_run_state(q, GUEST_POSTMIGRATE);
    assert_ok(guest_source_stop(qemu_guest(q), why));
    assert_run_state(q, GUEST_POSTMIGRATE);
    assert_ok(guest_sink_finish(qemu_guest(m.to), clock_mono_ns() + 20 * NSEC_PER_SEC, -1, why));
    assert_run_state(m.to, GUEST_PAUSED);
    assert_same_memory(q, m.to, 0, 128 << 20);
    live_move_finish(&m);
}

static json_int_t parameter(struct qemu *q, const char *name)
{
    CLEANUP(json) json_t *parameters = live_qmp(q, "query-migrate-parameters", "");
    return qmp_integer(parameters, name);
}

static bool capability(struct qemu *q, const char *name)
{
    CLEANUP(json) json_t *list = live_qmp(q, "query-migrate-capabilities", "");
    size_t i;
    json_t *c;
    json_array_foreach(list, i, c) if (!strcmp(qmp_string(c, "capability"), name)) return qmp_bool(
        c, "state");
    return false;
}

static void assert_settings_of_the_user(struct qemu *q)
{
    assert_true(capability(q, "xbzrle") && capability(q, "pause-before-switchover") &&
                capability(q, "x-ignore-shared"));
    assert_false(capability(q, "auto-converge") || capability(q, "events"));
    assert_int_equal(parameter(q, "downtime-limit"), 2000);
    assert_int_equal(parameter(q, "max-bandwidth"), 12345678);
    assert_int_equal(parameter(q, "cpu-throttle-increment"), 7);
    json_t *parameters = live_qmp(q, "query-migrate-parameters", "");
    assert_string_equal(qmp_string(parameters, "tls-creds"), "other");
    json_decref(parameters);
}

/*
 * Whatever was set before, QEMU migrates as the driver wants; the limit ends with the pause. Afterwards all is set as
 * it was, also when the copy was given up.
 */
static void check_parameters(bool given_up)
{
    struct live_move m = {.on_batch = block_third_batch};
    struct qemu *q = spawn_with_memory(true);
    json_decref(live_qmp(q, "migrate-set-capabilities",
                         "{\"capabilities\": [{\"capability\": \"xbzrle\", \"state\": true}, "
                         "{\"capability\": \"pause-before-switchover\", \"state\": true}, "
                         "{\"capability\": \"x-ignore-shared\", \"state\": true}]}"));
    json_decref(live_qmp(q, "migrate-set-parameters",
                         "{\"downtime-limit\": 2000, \"tls-creds\": \"other\", \"max-bandwidth\": 12345678, "
                         "\"cpu-throttle-increment\": 7}"));
    assert_ok(live_prepare(&m, q, "b", why));
    struct guest_source_params params = {
        .channels = 1, .regions = m.regions, .n_regions = m.n_regions, .max_bandwidth = 50 << 20};
    assert_ok(live_start_with(&m, &params, why));
    wait_blocked(&m);
    assert_int_equal(parameter(q, "max-bandwidth"), 50 << 20);
    struct guest_source_progress progress;
    assert_ok(guest_source_progress(qemu_guest(q), &progress, why));
    assert_int_equal(parameter(q, "downtime-limit"), progress.one_round ? 0 : 1);
    assert_true(capability(q, "auto-converge") && capability(q, "events"));
    assert_false(capability(q, "xbzrle") || capability(q, "pause-before-switchover") ||
                 capability(q, "x-ignore-shared"));
    if (!given_up) {
        assert_ok(guest_pause(qemu_guest(q), why));
        assert_int_equal(parameter(q, "max-bandwidth"), 0);
    }
    unblock(&m);
    if (!given_up)
        assert_ok(live_wait(&m, why));
    assert_ok(guest_source_stop(qemu_guest(q), why));
    assert_settings_of_the_user(q);
    live_move_finish(&m);
}

static void test_parameters(void **state)
{
    check_parameters(false);
}

static void test_parameters_of_one_given_up(void **state)
{
    check_parameters(true);
}

/* Somebody between us and QEMU passes bytes on, but no descriptors. */
struct relay {
    int listener;
    char target[108];
};

static void *relay_main(void *arg)
{
    struct relay *r = arg;
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    char data[4096];
    int client = accept(r->listener, NULL, NULL), server = socket(AF_UNIX, SOCK_STREAM, 0);
    strcpy(address.sun_path, r->target);
    assert_int_equal(connect(server, (struct sockaddr *)&address, sizeof(address)), 0);
    for (;;) {
        fd_set ready;
        FD_ZERO(&ready);
        FD_SET(client, &ready);
        FD_SET(server, &ready);
        select((client > server ? client : server) + 1, &ready, NULL, NULL, NULL);
        int from = FD_ISSET(client, &ready) ? client : server;
        ssize_t n = read(from, data, sizeof(data));
        if (n <= 0 || write(from == client ? server : client, data, (size_t)n) != n)
            break;
    }
    close(client);
    close(server);
    return NULL;
}

static void test_attach_through_a_relay(void **state)
{
    struct vm_error *err = NULL;
    struct qemu *q = live_spawn("a", &err, "-m", "64", "-S", NULL);
    struct process_identity process = qemu_guest(q)->process;
    qemu_destroy(q);
    struct relay r = {.listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)};
    snprintf(r.target, sizeof(r.target), "%s", live_path("a", ".qmp"));
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof(address.sun_path), "%s", live_path("relay", ".qmp"));
    assert_int_equal(bind(r.listener, (struct sockaddr *)&address, sizeof(address)), 0);
    assert_int_equal(listen(r.listener, 1), 0);
    pthread_t thread;
    pthread_create(&thread, NULL, relay_main, &r);
    assert_null(qemu_attach(address.sun_path, 5000, &err));
    assert_error(&err, VM_ERROR_REFUSED, "cannot attach");
    pthread_join(thread, NULL);
    close(r.listener);
    assert_ok(process_kill(&process, 5000, why));
}

/* Of this process, to the socket of that name. */
static void cut_connection_to(const char *path)
{
    unsigned cut = 0;
    for (int fd = 3; fd < 1024; fd++) {
        struct sockaddr_un peer = {.sun_family = AF_UNSPEC};
        socklen_t n = sizeof(peer);
        if (getpeername(fd, (struct sockaddr *)&peer, &n) < 0 || peer.sun_family != AF_UNIX ||
            strcmp(peer.sun_path, path))
            continue;
        assert_int_equal(shutdown(fd, SHUT_RDWR), 0);
        cut++;
    }
    assert_int_equal(cut, 1);
}

/* Nobody waits for the end of one that lives on: its guest may stand meanwhile. */
static void test_a_lost_connection_is_no_end(void **state)
{
    enum { AS_LONG_AS_FOR_AN_END_MS = 5000 };
    struct vm_error *err = NULL;
    struct guest_status status;
    struct qemu *q = live_spawn("a", &err, "-m", "64", "-S", NULL);
    cut_connection_to(live_path("a", ".qmp"));
    int64_t began = clock_mono_ns();
    assert_int_equal(guest_status(qemu_guest(q), &status, &err), -1);
    assert_error(&err, VM_ERROR_UNREACHABLE, "still runs, but QMP is lost");
    assert_true(clock_mono_ns() - began < AS_LONG_AS_FOR_AN_END_MS * NSEC_PER_MSEC);
    qemu_destroy(q);
}

/* Memory of cgroup `path`: shared pages, such as memfds, or private ones. */
static uint64_t charged(const char *path, const char *const *keys)
{
    char file[256], *text;
    size_t n;
    uint64_t bytes = 0;
    snprintf(file, sizeof(file), "%s/memory.stat", path);
    assert_ok(io_read_file(file, 1 << 20, &text, &n, why));
    for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n"))
        for (const char *const *key = keys; *key; key++)
            if (!strncmp(line, *key, strlen(*key)))
                bytes = strtoull(line + strlen(*key), NULL, 10);
    free(text);
    return bytes;
}

static uint64_t charge_of_move(const char *cgroup, bool shared, bool populate)
{
    static const char *const shmem[] = {"shmem ", NULL}, *const anon[] = {"anon ", "rss ", NULL};
    struct live_move m = {.populate = populate, .cgroup = cgroup};
    assert_ok(live_move(&m, spawn_with(shared, false), "b", why));
    uint64_t bytes = charged(cgroup, shared ? shmem : anon);
    live_move_finish(&m);
    return bytes;
}

static char test_cgroup[128];

static int remove_cgroup(void **state)
{
    int rc = live_kill_all(state);
    if (*test_cgroup)
        rc |= rmdir(test_cgroup);
    return rc;
}

/* Guest memory is charged to the VMM's cgroup, not to that of whoever decodes pages. */
static void test_memory_is_charged_to_the_vm(void **state)
{
    struct stat st;
    bool v1 = stat("/sys/fs/cgroup/memory/memory.stat", &st) == 0;
    snprintf(test_cgroup, sizeof(test_cgroup), "/sys/fs/cgroup/%svmmig-test-%d",
             v1 ? "memory/" : "", getpid());
    if (mkdir(test_cgroup, 0755) < 0) {
        print_message("SKIPPED: cannot make a memory cgroup: %s\n", strerror(errno));
        test_cgroup[0] = 0;
        skip();
    }
    uint64_t private = charge_of_move(test_cgroup, false, false);
    uint64_t with = charge_of_move(test_cgroup, true, true);
    uint64_t without = charge_of_move(test_cgroup, true, false);
    assert_true(private >= 8 << 20);
    assert_true(with >= 8 << 20);
    assert_true(without < 2 << 20); /* why populate is there */
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        live_test(test_spawn_and_attach),
        live_test(test_spawn_failures),
        live_test(test_isolation),
        live_test(test_pause_resume),
        live_test(test_move_and_back),
        live_test(test_move_to_another_user),
        live_test(test_stop_leaves_running),
        live_test(test_stop_leaves_paused),
        live_test(test_stop_of_a_paused_guest),
        live_test(test_callback_fails),
        live_test(test_source_dies),
        live_test(test_sink_rejects),
        live_test(test_sink_waits_no_longer),
        live_test(test_qemu_refuses),
        live_test(test_idle_guest_completes),
        live_test(test_parameters),
        live_test(test_parameters_of_one_given_up),
        live_test(test_attach_through_a_relay),
        live_test(test_a_lost_connection_is_no_end),
        cmocka_unit_test_teardown(test_memory_is_charged_to_the_vm, remove_cgroup),
    };
    return cmocka_run_group_tests(tests, live_setup, live_teardown);
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * standin_vmm: a VMM that links libvmmig-attach and runs no guest: its "vCPU" is a thread that
 * writes memory and marks what it wrote. So tests of the agent and the command need neither KVM nor
 * a guest.
 *
 *     standin_vmm --socket PATH [--memory MIB] [--rate MIB_PER_S] [--working MIB] [--machine TEXT]
 *                 [--incoming] [--by-hand] [--still] [--firmware] [--save-writes] [--hugetlb]
 *                 [--fail CALLBACK] [--hang CALLBACK]
 *
 * --working: how much of the memory the writer goes round in. --by-hand: do not tell how a
 * destination is started. --still: the guest is paused, by the VMM itself.
 * --firmware: its memory is full of something from the start, also with --incoming. --save-writes:
 * saving its state writes to its memory, as some devices do. --hugetlb: memory of huge pages, of
 * which the second half is never written. Its state is a hash of all its memory, which `load`
 * compares with what arrived: one page that is missing, stale or torn fails the load. SIGUSR1 has
 * it tell its memory anew. SIGUSR2 is its user's wish that the guest stand, or go on: it does
 * unless an agent has it. A callback `pause-late` is `pause` that has stopped the guest before it
 * fails or hangs. SIGHUP: it breaks ("triple fault").
 */
#include "dirtylog/vmmig-attach.h"

#include <errno.h>
#include <getopt.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#include <xxhash.h>

#define PAGE 4096u
#define MIB (1ull << 20)
#define HIGH_ADDRESS (4ull << 30)
#define SLICE_NS 1000000

struct slot {
    uint8_t *memory;
    uint64_t size;
    int fd;
};

struct state {
    uint64_t writes, hash;
};

struct vmm {
    struct vmmig_attach *attach;
    struct slot slots[2];
    double rate; /* pages a slice */
    uint64_t working, writes;
    pthread_t writer;
    bool save_writes;
    pthread_mutex_t lock; /* of what follows, and of the writer's beginning and end */
    bool running, held;   /* held: an agent has the guest */
    atomic_bool stop, quit;
    const char *fails, *hangs; /* callbacks */
    struct vmmig_slot told[2];
};

static void die(const char *what)
{
    perror(what);
    exit(1);
}

/* ---- The writer ---- */

static uint64_t mix(uint64_t x)
{
    x = (x ^ x >> 31) * 0x9e3779b97f4a7c15u;
    return x ^ x >> 29;
}

/* Half of what is written shrinks, the other half does not. */
static void write_page(struct vmm *v, uint64_t page)
{
    uint64_t *words = (uint64_t *)(void *)(v->slots[1].memory + page * PAGE);
    uint64_t seed = ++v->writes;
    for (unsigned i = 0; i < PAGE / sizeof(*words); i++)
        words[i] = page % 2 ? mix(seed + i) : seed << 16 | i % 7;
    vmmig_mark_dirty(v->attach, HIGH_ADDRESS + page * PAGE, PAGE);
}

static void *writer_main(void *arg)
{
    struct vmm *v = arg;
    double due = 0;
    struct timespec next;
    clock_gettime(CLOCK_MONOTONIC, &next);
    while (!atomic_load(&v->stop)) {
        vmmig_vcpu_enter(v->attach, 0);
        for (due += v->rate; due >= 1; due--)
            write_page(v, v->writes % v->working);
        vmmig_vcpu_exit(v->attach, 0, 0);
        next.tv_nsec += SLICE_NS;
        if (next.tv_nsec >= 1000000000) {
            next.tv_nsec -= 1000000000;
            next.tv_sec++;
        }
        clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &next, NULL);
    }
    return NULL;
}

/* ---- Callbacks ---- */

static void say(const char *text)
{
    printf("%s\n", text);
    fflush(stdout);
}

/* --fail CALLBACK, --hang CALLBACK: a VMM that does not do what the header asks of it. */
static int misbehave(const struct vmm *v, const char *callback)
{
    while (!strcmp(v->hangs, callback))
        pause();
    return strcmp(v->fails, callback) ? 0 : -EIO;
}

static void stop_writer(struct vmm *v)
{
    atomic_store(&v->stop, true);
    pthread_join(v->writer, NULL);
    v->running = false;
}

/* 0 or an errno value. */
static int start_writer(struct vmm *v)
{
    atomic_store(&v->stop, false);
    int failed = pthread_create(&v->writer, NULL, writer_main, v);
    v->running = !failed;
    return failed;
}

static int on_pause(void *arg)
{
    struct vmm *v = arg;
    if (misbehave(v, "pause") < 0)
        return -EIO;
    pthread_mutex_lock(&v->lock);
    v->held = true;
    if (v->running) {
        stop_writer(v);
        say("paused");
    }
    pthread_mutex_unlock(&v->lock);
    return misbehave(v, "pause-late");
}

static int on_resume(void *arg)
{
    struct vmm *v = arg;
    if (misbehave(v, "resume") < 0)
        return -EIO;
    pthread_mutex_lock(&v->lock);
    v->held = false;
    bool starts = !v->running;
    int failed = starts ? start_writer(v) : 0;
    if (starts && !failed)
        say("running");
    pthread_mutex_unlock(&v->lock);
    return -failed;
}

static int on_release(void *arg)
{
    struct vmm *v = arg;
    pthread_mutex_lock(&v->lock);
    v->held = false;
    pthread_mutex_unlock(&v->lock);
    say("released");
    return 0;
}

/* Read through its file: that fills no holes. */
static uint64_t hash_memory(const struct vmm *v)
{
    static uint8_t piece[MIB];
    XXH3_state_t *hash = XXH3_createState();
    XXH3_64bits_reset(hash);
    for (int i = 0; i < 2; i++)
        for (uint64_t at = 0; at < v->slots[i].size; at += MIB) {
            if (pread(v->slots[i].fd, piece, MIB, (off_t)at) != (ssize_t)MIB)
                die("memory");
            XXH3_64bits_update(hash, piece, MIB);
        }
    uint64_t digest = XXH3_64bits_digest(hash);
    XXH3_freeState(hash);
    return digest;
}

static int on_save(void *arg, int fd)
{
    struct vmm *v = arg;
    if (v->save_writes)
        write_page(v, v->writes % v->working);
    struct state s = {v->writes, hash_memory(v)};
    if (misbehave(v, "save") < 0)
        return -EIO;
    return write(fd, &s, sizeof(s)) == sizeof(s) ? 0 : -EIO;
}

static int on_load(void *arg, int fd)
{
    struct vmm *v = arg;
    struct state s;
    if (misbehave(v, "load") < 0)
        return -EIO;
    if (read(fd, &s, sizeof(s)) != sizeof(s))
        return -EIO;
    if (s.hash != hash_memory(v)) {
        say("memory is not what it was");
        return -EILSEQ;
    }
    v->writes = s.writes;
    pthread_mutex_lock(&v->lock);
    v->held = true;
    pthread_mutex_unlock(&v->lock);
    say("loaded");
    return 0;
}

static int on_quit(void *arg)
{
    struct vmm *v = arg;
    atomic_store(&v->quit, true);
    return 0;
}

static void on_kick(void *arg, unsigned vcpu)
{
    (void)arg; /* it looks at its `stop` often enough */
    (void)vcpu;
}

static void on_log(void *arg, const char *text)
{
    (void)arg;
    say(text);
}

/* ---- Life ---- */

static void make_slot(struct slot *s, uint64_t size, bool hugetlb)
{
    s->size = size;
    s->fd = memfd_create("standin", MFD_CLOEXEC | MFD_ALLOW_SEALING | (hugetlb ? MFD_HUGETLB : 0));
    if (s->fd < 0 || ftruncate(s->fd, (off_t)size) < 0)
        die("memory");
    s->memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, s->fd, 0);
    if (s->memory == MAP_FAILED)
        die("memory");
}

/* Without KVM there is nothing in the log but what is marked: a recording of nothing. */
static const char *empty_recording(const struct vmm *v)
{
    static char path[32];
    int fd = memfd_create("recording", 0);
    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    dprintf(fd, "vmmig-trace 1\nslots %llu %llu\n", (unsigned long long)v->slots[0].size / PAGE,
            (unsigned long long)v->slots[1].size / PAGE);
    return path;
}

static void must(int result, const struct vmmig_error *error)
{
    if (result == 0)
        return;
    fprintf(stderr, "standin_vmm: %s\n", error->text);
    exit(1);
}

static void attach(struct vmm *v, const char *socket, const char *machine,
                   const char *const *incoming_argv)
{
    struct vmmig_error error = {0};
    struct vmmig_slot *slots = v->told;
    struct vmmig_config config = {.size = VMMIG_CONFIG_SIZE,
                                  .socket_path = socket,
                                  .vmm = "standin 1",
                                  .machine = machine,
                                  .tracking = VMMIG_TRACKING_TRACE,
                                  .trace_path = empty_recording(v),
                                  .vm_fd = -1,
                                  .n_vcpus = 1,
                                  .agent_uid = (uid_t)-1,
                                  .callback_timeout_ms = *v->hangs ? 500 : 0,
                                  .incoming_argv = incoming_argv,
                                  .callbacks = {.pause = on_pause,
                                                .resume = on_resume,
                                                .release = on_release,
                                                .save = on_save,
                                                .load = on_load,
                                                .kick = on_kick,
                                                .quit = on_quit,
                                                .log = on_log},
                                  .arg = v};
    must(vmmig_create(&config, &v->attach, &error), &error);
    for (unsigned i = 0; i < 2; i++) {
        slots[i] = (struct vmmig_slot){.kvm_slot = i,
                                       .guest_address = i ? HIGH_ADDRESS : 0,
                                       .size = v->slots[i].size,
                                       .host = v->slots[i].memory,
                                       .memfd = v->slots[i].fd};
        snprintf(slots[i].name, sizeof(slots[i].name), "%s", i ? "high" : "low");
    }
    must(vmmig_set_slots(v->attach, slots, 2, &error), &error);
}

static uint64_t number(const char *text)
{
    char *end;
    unsigned long long n = strtoull(text, &end, 10);
    if (end == text || *end) {
        fprintf(stderr, "standin_vmm: %s is no number\n", text);
        exit(2);
    }
    return n;
}

struct options {
    const char *socket, *machine, *memory, *rate, *working, *fail, *hang;
    bool incoming, by_hand, still, firmware, save_writes, hugetlb;
};

static struct options parse(int argc, char **argv)
{
    static const struct option rows[] = {
        {"socket", required_argument, NULL, 's'},  {"memory", required_argument, NULL, 'm'},
        {"rate", required_argument, NULL, 'r'},    {"working", required_argument, NULL, 'w'},
        {"machine", required_argument, NULL, 'M'}, {"incoming", no_argument, NULL, 'i'},
        {"fail", required_argument, NULL, 'f'},    {"hang", required_argument, NULL, 'h'},
        {"by-hand", no_argument, NULL, 'b'},       {"still", no_argument, NULL, 'S'},
        {"firmware", no_argument, NULL, 'F'},      {"save-writes", no_argument, NULL, 'W'},
        {"hugetlb", no_argument, NULL, 'H'},
        {0}};
    struct options o = {.machine = "standin/1", .memory = "64", .rate = "10", .working = "8", .fail = "", .hang = ""};
    for (int c; (c = getopt_long(argc, argv, "", rows, NULL)) != -1;) {
        switch (c) {
        case 's': o.socket = optarg; break;
        case 'm': o.memory = optarg; break;
        case 'r': o.rate = optarg; break;
        case 'w': o.working = optarg; break;
        case 'M': o.machine = optarg; break;
        case 'f': o.fail = optarg; break;
        case 'h': o.hang = optarg; break;
        case 'i': o.incoming = true; break;
        case 'b': o.by_hand = true; break;
        case 'S': o.still = true; break;
        case 'F': o.firmware = true; break;
        case 'W': o.save_writes = true; break;
        case 'H': o.hugetlb = true; break;
        default: exit(2);
        }
    }
    if (!o.socket) {
        fprintf(stderr, "standin_vmm: --socket is missing\n");
        exit(2);
    }
    return o;
}

/* SIGUSR1: the memory changed, as far as the library can tell. */
static volatile sig_atomic_t retell, wished, breaks;

static void on_signal(int signum)
{
    if (signum == SIGUSR1)
        retell = 1;
    else if (signum == SIGHUP)
        breaks = 1;
    else
        wished = 1;
}

/* SIGUSR2 */
static void pause_or_go_on(struct vmm *v)
{
    pthread_mutex_lock(&v->lock);
    if (v->held) {
        say("the agent has it");
    } else if (v->running) {
        stop_writer(v);
        vmmig_set_state(v->attach, VMMIG_PAUSED, NULL);
        say("paused"); /* what it says the library knows */
    } else if (start_writer(v) == 0) {
        vmmig_set_state(v->attach, VMMIG_RUNNING, NULL);
        say("running");
    }
    pthread_mutex_unlock(&v->lock);
}

int main(int argc, char **argv)
{
    signal(SIGUSR1, on_signal);
    signal(SIGUSR2, on_signal);
    signal(SIGHUP, on_signal);
    struct options o = parse(argc, argv);
    struct vmm v = {.lock = PTHREAD_MUTEX_INITIALIZER,
                    .rate = (double)(number(o.rate) * MIB) / PAGE / 1000,
                    .working = number(o.working) * MIB / PAGE,
                    .save_writes = o.save_writes,
                    .fails = o.fail,
                    .hangs = o.hang};
    const char *const incoming[] = {argv[0],   "--socket", VMMIG_SOCKET_WORD, "--memory", o.memory,
                                    "--rate",  o.rate,     "--working",       o.working,  "--machine",
                                    o.machine, "--incoming", o.hugetlb ? "--hugetlb" : NULL, NULL};
    make_slot(&v.slots[0], 2 * MIB, o.hugetlb);
    make_slot(&v.slots[1], number(o.memory) * MIB, o.hugetlb);
    for (int i = 0; i < 2 && o.firmware; i++)
        memset(v.slots[i].memory, 0xaa, v.slots[i].size);
    attach(&v, o.socket, o.machine, o.by_hand ? NULL : incoming);
    if (o.incoming) {
        vmmig_set_state(v.attach, VMMIG_INCOMING, NULL);
        say("ready");
    } else if (!o.still) {
        for (uint64_t page = 0; page < v.slots[1].size / PAGE / (o.hugetlb ? 2 : 1); page += 2 + page % 3)
            write_page(&v, page);
        if (on_resume(&v) < 0)
            die("writer");
        vmmig_set_state(v.attach, VMMIG_RUNNING, NULL);
    }
    if (!o.incoming)
        say("ready");
    for (; !atomic_load(&v.quit); usleep(2000)) {
        if (wished) {
            wished = 0;
            pause_or_go_on(&v);
        }
        if (breaks) {
            breaks = 0;
            vmmig_set_state(v.attach, VMMIG_BROKEN, "triple fault");
            say("broken");
        }
        if (!retell)
            continue;
        retell = 0;
        must(vmmig_set_slots(v.attach, v.told, 2, NULL), &(struct vmmig_error){.text = "slots"});
        say("told its memory");
    }
    vmmig_destroy(v.attach);
    return 0;
}

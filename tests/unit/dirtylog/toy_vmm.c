/* SPDX-License-Identifier: Apache-2.0 */
#include "tests/unit/dirtylog/toy_vmm.h"

#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

const uint8_t *toy_vmm_state(void)
{
    static uint8_t state[TOY_STATE];
    for (unsigned i = 0; !state[1] && i < TOY_STATE; i++)
        state[i] = (uint8_t)(i * 2654435761u >> 13);
    return state;
}

/* ---- The device ---- */

static void device_write(struct toy_vmm *v, uint64_t page, bool forget)
{
    uint64_t *word = (uint64_t *)(void *)(v->memory[1] + page * DIRTYLOG_PAGE);
    __atomic_fetch_add(word + 1, 1, __ATOMIC_RELAXED);
    if (!forget)
        vmmig_mark_dirty(v->attach, TINY_VM_DATA_ADDRESS + page * DIRTYLOG_PAGE + 8, 8);
}

static void *device_main(void *arg)
{
    struct toy_vmm *v = arg;
    for (uint64_t i = 0; !atomic_load(&v->device_stop); i++) {
        device_write(v, TOY_DEVICE_FIRST + i % TOY_DEVICE_PAGES, v->params.forget_marks);
        atomic_fetch_add(&v->device_writes, 1);
        if (i % 64 == 0)
            usleep(200); /* its pace, not a wait for anything */
    }
    return NULL;
}

static void stop_device(struct toy_vmm *v)
{
    if (!v->device_started)
        return;
    atomic_store(&v->device_stop, true);
    pthread_join(v->device, NULL);
    v->device_started = false;
}

static void start_device(struct toy_vmm *v)
{
    if (!v->params.device || v->device_started)
        return;
    atomic_store(&v->device_stop, false);
    v->device_started = pthread_create(&v->device, NULL, device_main, v) == 0;
}

/* ---- Callbacks ---- */

static int misbehave(struct toy_vmm *v, enum toy_step step)
{
    atomic_fetch_add(&v->calls[step], 1);
    while (atomic_load(&v->hang[step]))
        usleep(500);
    return v->fail[step];
}

static void run_vcpus(struct toy_vmm *v)
{
    unsigned n = v->params.vcpus;
    if (atomic_exchange(&v->running, true) || !v->vm)
        return;
    /* Each its own range, and half of the next one's. */
    uint64_t share = TOY_DEVICE_FIRST / (n + 1);
    for (unsigned i = 0; i < n; i++)
        tiny_vm_run_free(v->vm, i, i * share, share + share / 2);
    start_device(v);
}

static int on_pause(void *arg)
{
    struct toy_vmm *v = arg;
    int r = v->params.pauses_first ? 0 : misbehave(v, TOY_PAUSE);
    if (r < 0)
        return r;
    if (v->vm && atomic_load(&v->running))
        tiny_vm_stop(v->vm);
    stop_device(v);
    atomic_store(&v->running, false);
    return v->params.pauses_first ? misbehave(v, TOY_PAUSE) : 0;
}

static int on_resume(void *arg)
{
    struct toy_vmm *v = arg;
    int r = misbehave(v, TOY_RESUME);
    if (r == 0)
        run_vcpus(v);
    return r;
}

static int on_release(void *arg)
{
    struct toy_vmm *v = arg;
    int r = misbehave(v, TOY_RELEASE);
    atomic_store(&v->released, r == 0);
    return r;
}

static int on_save(void *arg, int fd)
{
    struct toy_vmm *v = arg;
    int r = misbehave(v, TOY_SAVE);
    if (v->params.write_on_save)
        device_write(v, TOY_SAVE_PAGE, v->params.forget_mark_on_save);
    if (r == 0 && write(fd, toy_vmm_state(), TOY_STATE) != (ssize_t)TOY_STATE)
        return -EIO;
    return r;
}

static int on_load(void *arg, int fd)
{
    struct toy_vmm *v = arg;
    int r = misbehave(v, TOY_LOAD);
    v->loaded = malloc(TOY_STATE + 1);
    ssize_t n = read(fd, v->loaded, TOY_STATE + 1);
    v->n_loaded = n < 0 ? 0 : (size_t)n;
    return r;
}

static int on_quit(void *arg)
{
    struct toy_vmm *v = arg;
    atomic_store(&v->quit, true);
    return 0;
}

static void on_kick(void *arg, unsigned vcpu)
{
    struct toy_vmm *v = arg;
    if (v->vm)
        tiny_vm_kick(v->vm, vcpu);
}

static bool on_vcpu_exit(void *arg, unsigned vcpu, uint32_t reason)
{
    return vmmig_vcpu_exit(arg, vcpu, reason);
}

static void on_vcpu_enter(void *arg, unsigned vcpu)
{
    vmmig_vcpu_enter(arg, vcpu);
}

/* ---- Life ---- */

static void must(int result, const struct vmmig_error *error)
{
    if (result == 0)
        return;
    fprintf(stderr, "toy_vmm: %s\n", error->text);
    abort();
}

static void open_library(struct toy_vmm *v)
{
    static atomic_uint number;
    static const char *const argv[] = {"/usr/bin/toy-vmm", "--socket", VMMIG_SOCKET_WORD, NULL};
    struct vmmig_error error = {0};
    static const int no_vcpus[1];
    snprintf(v->path, sizeof(v->path), "/tmp/vmmig-toy-%d-%u", getpid(), atomic_fetch_add(&number, 1));
    struct vmmig_config config = {
        .size = VMMIG_CONFIG_SIZE,
        .socket_path = v->params.socket ? v->params.socket : v->path,
        .vmm = "toy 1",
        .machine = "toy/1",
        .tracking = v->vm ? (enum vmmig_tracking)tiny_vm_kind(v->vm) : VMMIG_TRACKING_PLAIN,
        .ring_entries = v->params.ring_entries,
        .vm_fd = v->vm ? tiny_vm_fd(v->vm) : -1,
        .vcpu_fds = v->vm ? tiny_vm_vcpu_fds(v->vm) : no_vcpus,
        .n_vcpus = v->vm ? v->params.vcpus : 1,
        .agent_uid = v->params.agent_uid ? v->params.agent_uid : (uid_t)-1,
        .callback_timeout_ms = v->params.callback_timeout_ms,
        .incoming_argv = argv,
        .callbacks = {.pause = on_pause,
                      .resume = on_resume,
                      .release = on_release,
                      .save = on_save,
                      .load = on_load,
                      .quit = on_quit,
                      .kick = on_kick},
        .arg = v,
        .takes_files = !v->params.takes_no_files,
        .state_bytes = TOY_STATE};
    must(vmmig_create(&config, &v->attach, &error), &error);
    for (unsigned i = 0; i < 2; i++) {
        v->slots[i] = (struct vmmig_slot){.kvm_slot = i,
                                          .guest_address = i ? TINY_VM_DATA_ADDRESS : 0,
                                          .size = v->sizes[i],
                                          .host = v->memory[i],
                                          .memfd = v->memfds[i]};
        snprintf(v->slots[i].name, sizeof(v->slots[i].name), "%s", i ? "high" : "low");
    }
    must(vmmig_set_slots(v->attach, v->slots, 2, &error), &error);
}

struct toy_vmm *toy_vmm_create(const struct toy_params *params)
{
    struct toy_vmm *v = calloc(1, sizeof(*v));
    v->params = *params;
    v->params.vcpus = params->vcpus ? params->vcpus : 1;
    v->vm = tiny_vm_create(&(struct tiny_vm_params){
        .kind = params->kind,
        .ring_entries = params->ring_entries,
        .vcpus = v->params.vcpus,
        .data_size = (params->pages ? params->pages : TOY_PAGES) * DIRTYLOG_PAGE});
    for (unsigned i = 0; i < 2; i++) {
        v->memory[i] = tiny_vm_slots(v->vm)[i].host;
        v->sizes[i] = tiny_vm_slots(v->vm)[i].size;
        v->memfds[i] = tiny_vm_memfd(v->vm, i);
    }
    open_library(v);
    tiny_vm_on_exit(v->vm, on_vcpu_enter, on_vcpu_exit, v->attach);
    tiny_vm_write(v->vm, 0, TOY_QUIET_PAGE, 1);
    return v;
}

struct toy_vmm *toy_vmm_create_incoming(const struct toy_vmm *like)
{
    struct toy_vmm *v = calloc(1, sizeof(*v));
    v->params = like->params;
    v->params.device = false;
    for (unsigned i = 0; i < 2; i++) {
        v->sizes[i] = like->sizes[i];
        v->memfds[i] = memfd_create("toy", MFD_CLOEXEC | MFD_ALLOW_SEALING);
        if (ftruncate(v->memfds[i], (off_t)v->sizes[i]) < 0)
            abort();
        v->memory[i] =
            mmap(NULL, v->sizes[i], PROT_READ | PROT_WRITE, MAP_SHARED, v->memfds[i], 0);
    }
    open_library(v);
    vmmig_set_state(v->attach, VMMIG_INCOMING, NULL);
    return v;
}

void toy_vmm_destroy(struct toy_vmm *v)
{
    for (unsigned i = 0; i < TOY_STEPS; i++)
        atomic_store(&v->hang[i], false);
    if (v->vm)
        tiny_vm_stop(v->vm);
    stop_device(v);
    vmmig_destroy(v->attach);
    if (v->vm) {
        tiny_vm_destroy(v->vm);
    } else {
        for (unsigned i = 0; i < 2; i++) {
            munmap(v->memory[i], v->sizes[i]);
            close(v->memfds[i]);
        }
    }
    free(v->loaded);
    free(v);
}

void toy_vmm_run(struct toy_vmm *v)
{
    run_vcpus(v);
    vmmig_set_state(v->attach, VMMIG_RUNNING, NULL);
}

void toy_vmm_wait_progress(struct toy_vmm *v)
{
    /* The pass that ends next may have written its last page already. */
    uint64_t before = tiny_vm_passes(v->vm, 0);
    while (tiny_vm_passes(v->vm, 0) < before + 2)
        sched_yield();
}

/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

/* Pages that KVM needs for itself, below the firmware's place. */
enum { IDENTITY_MAP = 0xfffbc000, TSS = 0xfffbd000 };
/* Of a saved state, its vCPUs' are the most. */
enum { VCPU_STATE_BYTES = 12 << 10 };

/* ---- The guest runs, or stands ---- */

static int run(struct vmm *vmm)
{
    events_tell(&vmm->events, "RESUME");
    if (vcpus_resume(vmm) < 0)
        return -EIO;
    writer_resume(&vmm->writer);
    return 0;
}

static void stand(struct vmm *vmm)
{
    vcpus_pause(vmm);
    writer_pause(&vmm->writer);
    events_tell(&vmm->events, "STOP");
}

/* ---- vmmig: the library's callbacks ---- */

static int on_pause(void *arg)
{
    struct vmm *vmm = arg;
    pthread_mutex_lock(&vmm->lock);
    vmm->held = true;
    stand(vmm);
    pthread_mutex_unlock(&vmm->lock);
    return 0;
}

static int on_resume(void *arg)
{
    struct vmm *vmm = arg;
    pthread_mutex_lock(&vmm->lock);
    int r = run(vmm);
    vmm->held = r < 0; /* then it stays the agent's, which may have it go on elsewhere */
    pthread_mutex_unlock(&vmm->lock);
    return r;
}

static int on_release(void *arg)
{
    struct vmm *vmm = arg;
    pthread_mutex_lock(&vmm->lock);
    vmm->held = false;
    pthread_mutex_unlock(&vmm->lock);
    return 0;
}

static int on_save(void *arg, int fd)
{
    struct vmm *vmm = arg;
    struct state state;
    state_begin(&state);
    serial_save(&vmm->serial, &state);
    writer_save(&vmm->writer, &state);
    int r = vmm->vm_fd >= 0 ? cpu_save(vmm, &state) : 0;
    if (r == 0)
        r = state_write(&state, fd);
    state_finish(&state);
    return r < 0 ? -EIO : 0;
}

static int on_load(void *arg, int fd)
{
    struct vmm *vmm = arg;
    struct state state;
    int r = state_read(&state, fd);
    if (r == 0 && (serial_load(&vmm->serial, &state) < 0 || writer_load(&vmm->writer, &state) < 0 ||
                   (vmm->vm_fd >= 0 && cpu_load(vmm, &state) < 0)))
        r = -1;
    state_finish(&state);
    return r < 0 ? -EINVAL : 0;
}

static void on_vcpu_kick(void *arg, unsigned vcpu)
{
    vcpus_kick(arg, vcpu);
}

/* main() waits for this signal. */
static int on_quit(void *arg)
{
    (void)arg;
    return kill(getpid(), SIGTERM) < 0 ? -errno : 0;
}

static void on_log(void *arg, const char *text)
{
    (void)arg;
    complain("%s", text);
}

static int attach(struct vmm *vmm)
{
    const struct options *o = &vmm->options;
    struct vmmig_error error;
    char machine[128];
    /* All that two VMMs must have in common; the sizes of memory are compared by the agent. */
    snprintf(machine, sizeof(machine), "vmmig-vmm/%d vcpus=%u%s%s", STATE_VERSION, o->vcpus,
             o->writer_rate ? " writer" : "", vmm->vm_fd < 0 ? " no-kvm" : "");
    struct vmmig_config config = {.size = VMMIG_CONFIG_SIZE,
                                  .socket_path = o->attach,
                                  .vmm = "vmmig-vmm 1",
                                  .machine = machine,
                                  .state = o->incoming ? VMMIG_INCOMING : VMMIG_RUNNING,
                                  .tracking = vmm->tracking,
                                  .ring_entries = o->ring_entries,
                                  .trace_path = o->trace,
                                  .record_path = o->record,
                                  .vm_fd = vmm->vm_fd,
                                  .vcpu_fds = vmm->vcpus.fds,
                                  .n_vcpus = vmm->vcpus.n,
                                  .agent_uid = (uid_t)-1,
                                  .incoming_argv = o->incoming_argv,
                                  .callbacks = {.pause = on_pause,
                                                .resume = on_resume,
                                                .release = on_release,
                                                .save = on_save,
                                                .load = on_load,
                                                .kick = on_vcpu_kick,
                                                .quit = on_quit,
                                                .log = on_log},
                                  .arg = vmm,
                                  .takes_files = !o->hugetlb,
                                  .state_bytes = o->vcpus * VCPU_STATE_BYTES};
    if (vmmig_create(&config, &vmm->attach, &error) < 0 ||
        vmmig_set_slots(vmm->attach, vmm->memory.slots, vmm->memory.n_slots, &error) < 0)
        return complain("%s", error.text);
    return 0;
}

/* vmmig: an agent may have come, and paused the guest, before it ran at all: then it is the agent's to set going, which
 * it will, since it was told at the start that the guest runs. */
static int set_going(struct vmm *vmm)
{
    pthread_mutex_lock(&vmm->lock);
    int r = vmm->held ? 0 : run(vmm);
    pthread_mutex_unlock(&vmm->lock);
    return r;
}

/* SIGUSR2: the user's own pause, and its end. vmmig: not while an agent has the guest. */
static void pause_or_go_on(struct vmm *vmm)
{
    pthread_mutex_lock(&vmm->lock);
    if (vmm->held) {
        complain("the agent has the guest: it is not paused, or set going, by its user");
    } else if (atomic_load(&vmm->vcpus.going)) {
        stand(vmm);
        vmmig_set_state(vmm->attach, VMMIG_PAUSED, NULL);
    } else if (run(vmm) == 0) {
        vmmig_set_state(vmm->attach, VMMIG_RUNNING, NULL);
    }
    pthread_mutex_unlock(&vmm->lock);
}

/* ---- The machine ---- */

static int create_vm(struct vmm *vmm)
{
    const struct options *o = &vmm->options;
    struct vmmig_error error;
    struct kvm_pit_config pit = {.flags = KVM_PIT_SPEAKER_DUMMY};
    uint64_t identity_map = IDENTITY_MAP;
    vmm->kvm_fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    vmm->vm_fd = vmm->kvm_fd < 0 ? -1 : ioctl(vmm->kvm_fd, KVM_CREATE_VM, 0);
    if (vmm->vm_fd < 0)
        return complain("cannot make a VM with /dev/kvm: %s", strerror(errno));
    /* vmmig: before the first vCPU. */
    if (vmmig_prepare_vm(vmm->vm_fd, o->tracking, o->ring_entries, &vmm->tracking, &error) < 0)
        return complain("--tracking: %s", error.text);
    if (ioctl(vmm->vm_fd, KVM_SET_IDENTITY_MAP_ADDR, &identity_map) < 0 ||
        ioctl(vmm->vm_fd, KVM_SET_TSS_ADDR, TSS) < 0 ||
        ioctl(vmm->vm_fd, KVM_CREATE_IRQCHIP, 0) < 0 ||
        ioctl(vmm->vm_fd, KVM_CREATE_PIT2, &pit) < 0)
        return complain("KVM offers no interrupt controller or timer: %s", strerror(errno));
    return memory_map(&vmm->memory, vmm->vm_fd) < 0 ? -1 : vcpus_create(vmm);
}

static int load_kernel(struct vmm *vmm)
{
    const struct options *o = &vmm->options;
    uint32_t entry, info;
    if (o->incoming || !o->kernel)
        return 0;
    if (memory_load_kernel(&vmm->memory, o->kernel, o->append, &entry, &info) < 0)
        return -1;
    return vmm->vm_fd < 0 ? 0 : vcpus_set_entry(vmm, entry, info);
}

static int start(struct vmm *vmm)
{
    const struct options *o = &vmm->options;
    vmm->tracking = o->tracking;
    vmm->kvm_fd = vmm->vm_fd = -1;
    vmm->vcpus.n = o->vcpus;
    vmm->held = o->incoming; /* vmmig: a guest that is waited for is the agent's before it is there */
    pthread_mutex_init(&vmm->lock, NULL);
    pthread_mutex_init(&vmm->vcpus.lock, NULL);
    pthread_cond_init(&vmm->vcpus.changed, NULL);
    if (serial_open(&vmm->serial, o->serial) < 0 || events_open(&vmm->events, o->events) < 0 ||
        memory_create(&vmm->memory, o) < 0)
        return -1;
    if (o->tracking != VMMIG_TRACKING_TRACE && create_vm(vmm) < 0)
        return -1;
    if (load_kernel(vmm) < 0 ||
        writer_start(&vmm->writer, &vmm->memory, &vmm->attach, o->writer_rate) < 0 ||
        (vmm->vm_fd >= 0 && vcpus_start(vmm) < 0) || attach(vmm) < 0)
        return -1;
    return o->incoming ? 0 : set_going(vmm);
}

static void stop(struct vmm *vmm)
{
    vcpus_stop(vmm);
    writer_stop(&vmm->writer);
    vmmig_destroy(vmm->attach);
}

int main(int argc, char **argv)
{
    static struct vmm vmm;
    sigset_t ends;
    int signum;
    if (options_parse(argc, argv, &vmm.options) < 0)
        return 2;
    if (vmm.options.help) {
        options_help();
        return 0;
    }
    /* Before any thread is made: they all leave these signals to sigwait. */
    sigemptyset(&ends);
    sigaddset(&ends, SIGTERM);
    sigaddset(&ends, SIGINT);
    sigaddset(&ends, SIGUSR2);
    pthread_sigmask(SIG_BLOCK, &ends, NULL);
    signal(SIGPIPE, SIG_IGN);
    int r = start(&vmm);
    while (r == 0 && sigwait(&ends, &signum) == 0 && signum == SIGUSR2)
        pause_or_go_on(&vmm);
    stop(&vmm);
    return r < 0 ? 1 : 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

enum { KICK_SIGNAL = SIGUSR1, MULTIBOOT_EAX = 0x2badb002 };

/* ---- Life ---- */

static void on_kick(int signum)
{
    (void)signum; /* it interrupts KVM_RUN, and does nothing else */
}

static int create_one(struct vmm *vmm, unsigned number, size_t run_size)
{
    struct vcpu *v = &vmm->vcpus.list[number];
    v->vmm = vmm;
    v->number = number;
    v->fd = ioctl(vmm->vm_fd, KVM_CREATE_VCPU, number);
    if (v->fd < 0)
        return complain("cannot make vCPU %u: %s", number, strerror(errno));
    void *run = mmap(NULL, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, v->fd, 0);
    if (run == MAP_FAILED)
        return complain("cannot map vCPU %u: %s", number, strerror(errno));
    v->run = run;
    vmm->vcpus.fds[number] = v->fd;
    return cpu_set_cpuid(vmm, v);
}

int vcpus_create(struct vmm *vmm)
{
    struct vcpus *all = &vmm->vcpus;
    struct sigaction action = {.sa_handler = on_kick};
    int run_size = ioctl(vmm->kvm_fd, KVM_GET_VCPU_MMAP_SIZE, 0);
    sigaction(KICK_SIGNAL, &action, NULL);
    if (run_size < (int)sizeof(struct kvm_run))
        return complain("KVM does not tell the size of kvm_run");
    for (unsigned i = 0; i < all->n; i++)
        if (create_one(vmm, i, (size_t)run_size) < 0)
            return -1;
    return 0;
}

/* 32-bit protected mode, flat segments, paging and interrupts off. */
int vcpus_set_entry(struct vmm *vmm, uint32_t entry, uint32_t info)
{
    int fd = vmm->vcpus.list[0].fd;
    struct kvm_sregs s;
    struct kvm_regs regs = {.rip = entry, .rax = MULTIBOOT_EAX, .rbx = info, .rflags = 2};
    if (ioctl(fd, KVM_GET_SREGS, &s) < 0)
        return complain("cannot read vCPU 0: %s", strerror(errno));
    s.cs = (struct kvm_segment){
        .limit = UINT32_MAX, .selector = 8, .type = 11, .present = 1, .s = 1, .db = 1, .g = 1};
    s.ds = (struct kvm_segment){
        .limit = UINT32_MAX, .selector = 16, .type = 3, .present = 1, .s = 1, .db = 1, .g = 1};
    s.es = s.fs = s.gs = s.ss = s.ds;
    s.cr0 = 0x11;
    if (ioctl(fd, KVM_SET_SREGS, &s) < 0 || ioctl(fd, KVM_SET_REGS, &regs) < 0)
        return complain("cannot set vCPU 0: %s", strerror(errno));
    return 0;
}

/* ---- Exits ---- */

static void port_io(struct vmm *vmm, bool out, unsigned port, unsigned size, uint8_t *data)
{
    if (port >= SERIAL_PORT && port < SERIAL_PORT + SERIAL_PORTS && size == 1) {
        if (out)
            serial_write(&vmm->serial, port, *data);
        else
            serial_read(&vmm->serial, port, data);
    } else if (port >= WRITER_PORT && port < WRITER_PORT + WRITER_PORTS && size == 4) {
        uint32_t value;
        memcpy(&value, data, sizeof(value));
        if (out)
            writer_write(&vmm->writer, port - WRITER_PORT, value);
        else
            value = writer_read(&vmm->writer, port - WRITER_PORT);
        memcpy(data, &value, sizeof(value));
    } else if (!out) {
        memset(data, 0xff, size); /* nobody there */
    }
}

static void handle_io(struct vcpu *v)
{
    struct kvm_run *run = v->run;
    uint8_t *data = (uint8_t *)run + run->io.data_offset;
    for (uint32_t i = 0; i < run->io.count; i++, data += run->io.size)
        port_io(v->vmm, run->io.direction == KVM_EXIT_IO_OUT, run->io.port, run->io.size, data);
}

/* The guest will not run again. The process stays, so that somebody can see why. */
static void break_down(struct vcpu *v, const char *why)
{
    struct vcpus *all = &v->vmm->vcpus;
    pthread_mutex_lock(&all->lock);
    bool first = !all->broken;
    all->broken = true;
    atomic_store(&all->going, false);
    pthread_mutex_unlock(&all->lock);
    for (unsigned i = 0; i < all->n; i++)
        vcpus_kick(v->vmm, i);
    if (!first)
        return;
    complain("vCPU %u: %s", v->number, why);
    /* vmmig: so that users see it. */
    vmmig_set_state(v->vmm->attach, VMMIG_BROKEN, why);
}

static void handle_exit(struct vcpu *v)
{
    char why[64];
    switch (v->run->exit_reason) {
    case KVM_EXIT_IO:
        handle_io(v);
        break;
    case KVM_EXIT_MMIO:
        if (!v->run->mmio.is_write)
            memset(v->run->mmio.data, 0xff, sizeof(v->run->mmio.data));
        break;
    case KVM_EXIT_INTR:
        break;
    case KVM_EXIT_SHUTDOWN:
        break_down(v, "triple fault");
        break;
    default:
        snprintf(why, sizeof(why), "KVM exit %u", v->run->exit_reason);
        break_down(v, why);
    }
}

/* ---- Running ---- */

static void run_once(struct vcpu *v)
{
    struct vmmig_attach *attach = v->vmm->attach;
    /* vmmig: around every KVM_RUN of a guest that runs. */
    vmmig_vcpu_enter(attach, v->number);
    int r = ioctl(v->fd, KVM_RUN, 0);
    int why = errno;
    /* A kick that comes from here on makes the next KVM_RUN return at once. */
    __atomic_store_n(&v->run->immediate_exit, 0, __ATOMIC_SEQ_CST);
    bool interrupted = r < 0 && (why == EINTR || why == EAGAIN);
    if (vmmig_vcpu_exit(attach, v->number, r < 0 ? UINT32_MAX : v->run->exit_reason) || interrupted)
        return;
    if (r < 0)
        break_down(v, strerror(why));
    else
        handle_exit(v);
}

/*
 * vmmig: `pause` wants I/O completed. What an exit for `in` or a read of MMIO brought is in the
 * vCPU's registers only after KVM_RUN was called again; immediate_exit keeps the guest from running
 * then.
 */
static void complete_io(struct vcpu *v)
{
    __atomic_store_n(&v->run->immediate_exit, 1, __ATOMIC_SEQ_CST);
    while (ioctl(v->fd, KVM_RUN, 0) == 0)
        handle_exit(v); /* an access in several pieces: this is the next one */
    __atomic_store_n(&v->run->immediate_exit, 0, __ATOMIC_SEQ_CST);
}

/* Wait until the guest shall run. False: the thread shall end. */
static bool stand(struct vcpu *v, bool ran)
{
    struct vcpus *all = &v->vmm->vcpus;
    if (ran)
        complete_io(v);
    pthread_mutex_lock(&all->lock);
    all->standing++;
    pthread_cond_broadcast(&all->changed);
    while (!atomic_load(&all->going) && !all->end)
        pthread_cond_wait(&all->changed, &all->lock);
    all->standing--;
    bool end = all->end;
    all->threads -= end;
    pthread_cond_broadcast(&all->changed);
    pthread_mutex_unlock(&all->lock);
    return !end;
}

static void *vcpu_main(void *arg)
{
    struct vcpu *v = arg;
    bool ran = false;
    while (stand(v, ran)) {
        ran = true;
        while (atomic_load(&v->vmm->vcpus.going))
            run_once(v);
    }
    return NULL;
}

int vcpus_start(struct vmm *vmm)
{
    for (unsigned i = 0; i < vmm->vcpus.n; i++) {
        struct vcpu *v = &vmm->vcpus.list[i];
        v->started = pthread_create(&v->thread, NULL, vcpu_main, v) == 0;
        if (!v->started)
            return complain("cannot start the thread of vCPU %u", i);
        vmm->vcpus.threads++;
        char name[16];
        snprintf(name, sizeof(name), "CPU %u", i);
        pthread_setname_np(v->thread, name);
    }
    return 0;
}

/* vmmig: called from any thread, also when the vCPU stands, and until vmmig_destroy; does not block. */
void vcpus_kick(struct vmm *vmm, unsigned number)
{
    struct vcpu *v = &vmm->vcpus.list[number];
    pthread_mutex_lock(&vmm->vcpus.lock);
    if (v->started) {
        __atomic_store_n(&v->run->immediate_exit, 1, __ATOMIC_SEQ_CST);
        pthread_kill(v->thread, KICK_SIGNAL);
    }
    pthread_mutex_unlock(&vmm->vcpus.lock);
}

/* vmmig: returns when no vCPU is in KVM_RUN, be it that they stand, be it that they have ended. */
void vcpus_pause(struct vmm *vmm)
{
    struct vcpus *all = &vmm->vcpus;
    atomic_store(&all->going, false);
    for (unsigned i = 0; i < all->n; i++)
        vcpus_kick(vmm, i);
    pthread_mutex_lock(&all->lock);
    while (all->standing < all->threads)
        pthread_cond_wait(&all->changed, &all->lock);
    pthread_mutex_unlock(&all->lock);
}

int vcpus_resume(struct vmm *vmm)
{
    struct vcpus *all = &vmm->vcpus;
    pthread_mutex_lock(&all->lock);
    bool broken = all->broken;
    atomic_store(&all->going, !broken);
    pthread_cond_broadcast(&all->changed);
    pthread_mutex_unlock(&all->lock);
    return broken ? complain("the guest is broken and cannot run") : 0;
}

void vcpus_stop(struct vmm *vmm)
{
    struct vcpus *all = &vmm->vcpus;
    pthread_mutex_lock(&all->lock);
    all->end = true;
    atomic_store(&all->going, false);
    pthread_cond_broadcast(&all->changed);
    pthread_mutex_unlock(&all->lock);
    for (unsigned i = 0; i < all->n; i++)
        vcpus_kick(vmm, i);
    for (unsigned i = 0; i < all->n; i++) {
        struct vcpu *v = &all->list[i];
        pthread_mutex_lock(&all->lock);
        bool started = v->started;
        v->started = false; /* it is not kicked any more */
        pthread_mutex_unlock(&all->lock);
        if (started)
            pthread_join(v->thread, NULL);
    }
}

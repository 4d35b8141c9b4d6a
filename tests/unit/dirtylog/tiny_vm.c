/* SPDX-License-Identifier: Apache-2.0 */
#include "tests/unit/dirtylog/tiny_vm.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

/* Where things lie in slot 0. */
enum {
    CODE = 0x1000,
    PML4 = 0x10000,
    POINTERS = 0x11000,
    TSS = 0x13000,
    GDT = 0x16000,
    DIRECTORIES = 0x20000, /* one page per GiB, 40 of them */
    GIB_MAPPED = 40,
    OWN_SIZE = 1 << 20,
};

enum { PORT_DONE = 0x10, TSS_BITMAP = 104, PORTS_BITMAP = 8192, CPUID_MAX = 256 };

struct tiny_vcpu {
    struct tiny_vm *vm;
    unsigned number;
    int fd;
    struct kvm_run *run;
    pthread_t thread;
    bool free_running;
    uint64_t first, n;
    atomic_bool stop, inside;
    atomic_uint_fast64_t passes;
};

struct tiny_vm {
    struct tiny_vm_params params;
    enum dirtylog_kind kind;
    int kvm, fd;
    int memfds[2];
    struct dirtylog_slot slots[2];
    size_t run_size;
    struct tiny_vcpu vcpus[TINY_VM_VCPUS_MAX];
    int vcpu_fds[TINY_VM_VCPUS_MAX];
    tiny_vm_enter_fn *on_enter;
    tiny_vm_exit_fn *on_exit;
    void *arg;
};

/*
 * rbx: first page's address, rcx: behind the last. Adds one to each page's first word, then says so and
 * begins again:
 *     1: mov %rbx,%rax;  2: incq (%rax); add $4096,%rax; cmp %rcx,%rax; jb 2b; out %al,$PORT; jmp 1b
 */
static const uint8_t guest_code[] = {0x48, 0x89, 0xd8, 0x48, 0xff, 0x00, 0x48, 0x05, 0x00, 0x10,
                                     0x00, 0x00, 0x48, 0x39, 0xc8, 0x72, 0xf2, 0xe6, PORT_DONE,
                                     0xeb, 0xeb};

static void must(bool ok, const char *what)
{
    if (ok)
        return;
    fprintf(stderr, "tiny_vm: %s: %s\n", what, strerror(errno));
    abort();
}

static void on_signal(int signum)
{
    (void)signum; /* it interrupts KVM_RUN, nothing else */
}

bool tiny_vm_available(void)
{
    cleanup_close int fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (fd >= 0 && ioctl(fd, KVM_GET_API_VERSION, 0) == KVM_API_VERSION)
        return true;
    fprintf(stderr, "SKIPPED: NO /dev/kvm: %s\n", strerror(errno));
    return false;
}

static void add_slot(struct tiny_vm *vm, unsigned number, uint64_t address, uint64_t size, bool huge)
{
    int fd = memfd_create("tiny-vm", MFD_CLOEXEC | MFD_ALLOW_SEALING | (huge ? MFD_HUGETLB : 0));
    must(fd >= 0 && ftruncate(fd, (off_t)size) == 0, "memfd");
    void *host = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    must(host != MAP_FAILED, "mmap of guest memory");
    struct kvm_userspace_memory_region region = {.slot = number,
                                                 .guest_phys_addr = address,
                                                 .memory_size = size,
                                                 .userspace_addr = (uintptr_t)host};
    must(ioctl(vm->fd, KVM_SET_USER_MEMORY_REGION, &region) == 0, "memory slot");
    vm->memfds[number] = fd;
    vm->slots[number] = (struct dirtylog_slot){number, 0, address, size, host};
}

/* Accessed and dirty are set already: the processor writes no page table. */
static void fill_tables(struct tiny_vm *vm)
{
    uint8_t *m = vm->slots[0].host;
    uint64_t *pml4 = (void *)(m + PML4), *pointers = (void *)(m + POINTERS);
    pml4[0] = POINTERS | 0x27;
    for (uint64_t gib = 0; gib < GIB_MAPPED; gib++) {
        uint64_t *directory = (void *)(m + DIRECTORIES + gib * 4096);
        pointers[gib] = (DIRECTORIES + gib * 4096) | 0x27;
        for (uint64_t i = 0; i < 512; i++)
            directory[i] = (gib << 30) | i << 21 | 0xe7;
    }
    static const uint64_t gdt[] = {0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0x00cff3000000ffff,
                                   0x00affb000000ffff};
    memcpy(m + GDT, gdt, sizeof(gdt));
    m[TSS + 102] = TSS_BITMAP;
    m[TSS + TSS_BITMAP + PORTS_BITMAP] = 0xff;
    memcpy(m + CODE, guest_code, sizeof(guest_code));
}

static void set_cpuid(struct tiny_vm *vm, int vcpu)
{
    struct kvm_cpuid2 *cpuid =
        calloc(1, sizeof(*cpuid) + CPUID_MAX * sizeof(struct kvm_cpuid_entry2));
    must(cpuid != NULL, "memory");
    cpuid->nent = CPUID_MAX;
    must(ioctl(vm->kvm, KVM_GET_SUPPORTED_CPUID, cpuid) == 0, "CPUID");
    must(ioctl(vcpu, KVM_SET_CPUID2, cpuid) == 0, "set CPUID");
    free(cpuid);
}

static void set_state(int vcpu)
{
    struct kvm_sregs s;
    must(ioctl(vcpu, KVM_GET_SREGS, &s) == 0, "sregs");
    s.cr3 = PML4;
    s.cr4 = 0x20;
    s.cr0 = 0x80000001;
    s.efer = 0x500;
    s.cs = (struct kvm_segment){.limit = ~0u, .selector = 0x23, .type = 11, .present = 1,
                                .dpl = 3, .s = 1, .l = 1, .g = 1};
    s.ds = (struct kvm_segment){.limit = ~0u, .selector = 0x1b, .type = 3, .present = 1,
                                .dpl = 3, .db = 1, .s = 1, .g = 1};
    s.es = s.ss = s.fs = s.gs = s.ds;
    s.gdt = (struct kvm_dtable){.base = GDT, .limit = 39};
    s.tr = (struct kvm_segment){.base = TSS, .limit = TSS_BITMAP + PORTS_BITMAP, .selector = 0x28,
                                .type = 11, .present = 1};
    must(ioctl(vcpu, KVM_SET_SREGS, &s) == 0, "set sregs");
}

static void add_vcpu(struct tiny_vm *vm, unsigned number)
{
    struct tiny_vcpu *v = &vm->vcpus[number];
    v->vm = vm;
    v->number = number;
    v->fd = ioctl(vm->fd, KVM_CREATE_VCPU, number);
    must(v->fd >= 0, "vCPU");
    vm->vcpu_fds[number] = v->fd;
    v->run = mmap(NULL, vm->run_size, PROT_READ | PROT_WRITE, MAP_SHARED, v->fd, 0);
    must(v->run != MAP_FAILED, "kvm_run");
    set_cpuid(vm, v->fd);
    set_state(v->fd);
}

struct tiny_vm *tiny_vm_create(const struct tiny_vm_params *params)
{
    struct tiny_vm *vm = calloc(1, sizeof(*vm));
    struct vm_error *err = NULL;
    struct sigaction action = {.sa_handler = on_signal};
    sigaction(SIGUSR1, &action, NULL);
    must(vm != NULL, "memory");
    vm->params = *params;
    vm->params.vcpus = params->vcpus ? params->vcpus : 1;
    vm->kind = params->kind;
    vm->kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    vm->fd = ioctl(vm->kvm, KVM_CREATE_VM, 0);
    must(vm->fd >= 0, "KVM VM");
    ioctl(vm->fd, KVM_SET_TSS_ADDR, 0xfffbd000);
    vm->run_size = (size_t)ioctl(vm->kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
    if (dirtylog_prepare(vm->fd, &vm->kind, params->ring_entries, &err) < 0) {
        fprintf(stderr, "tiny_vm: %s\n", error_message(err));
        abort();
    }
    add_slot(vm, 0, 0, OWN_SIZE, false);
    add_slot(vm, TINY_VM_DATA_SLOT, TINY_VM_DATA_ADDRESS, params->data_size, params->hugetlb);
    fill_tables(vm);
    for (unsigned i = 0; i < vm->params.vcpus; i++)
        add_vcpu(vm, i);
    return vm;
}

void tiny_vm_destroy(struct tiny_vm *vm)
{
    tiny_vm_stop(vm);
    for (unsigned i = 0; i < vm->params.vcpus; i++) {
        munmap(vm->vcpus[i].run, vm->run_size);
        close(vm->vcpus[i].fd);
    }
    for (unsigned i = 0; i < 2; i++) {
        munmap(vm->slots[i].host, vm->slots[i].size);
        close(vm->memfds[i]);
    }
    close(vm->fd);
    close(vm->kvm);
    free(vm);
}

enum dirtylog_kind tiny_vm_kind(const struct tiny_vm *vm)
{
    return vm->kind;
}

int tiny_vm_fd(const struct tiny_vm *vm)
{
    return vm->fd;
}

const int *tiny_vm_vcpu_fds(const struct tiny_vm *vm)
{
    return vm->vcpu_fds;
}

const struct dirtylog_slot *tiny_vm_slots(const struct tiny_vm *vm)
{
    return vm->slots;
}

int tiny_vm_memfd(const struct tiny_vm *vm, unsigned slot)
{
    return vm->memfds[slot];
}

uint8_t *tiny_vm_data(const struct tiny_vm *vm)
{
    return vm->slots[TINY_VM_DATA_SLOT].host;
}

uint64_t tiny_vm_count(const struct tiny_vm *vm, uint64_t page)
{
    return __atomic_load_n((uint64_t *)(void *)(tiny_vm_data(vm) + page * DIRTYLOG_PAGE),
                           __ATOMIC_ACQUIRE);
}

void tiny_vm_on_exit(struct tiny_vm *vm, tiny_vm_enter_fn *enter, tiny_vm_exit_fn *fn, void *arg)
{
    vm->on_enter = enter;
    vm->on_exit = fn;
    vm->arg = arg;
}

static void set_range(struct tiny_vcpu *v, uint64_t first, uint64_t n)
{
    struct kvm_regs regs = {.rip = CODE,
                            .rflags = 2,
                            .rsp = 0x8000,
                            .rbx = TINY_VM_DATA_ADDRESS + first * DIRTYLOG_PAGE,
                            .rcx = TINY_VM_DATA_ADDRESS + (first + n) * DIRTYLOG_PAGE};
    must(ioctl(v->fd, KVM_SET_REGS, &regs) == 0, "set regs");
}

/* One KVM_RUN. True: the guest finished a pass. */
static bool run_once(struct tiny_vcpu *v)
{
    struct tiny_vm *vm = v->vm;
    if (vm->on_enter)
        vm->on_enter(vm->arg, v->number);
    atomic_store(&v->inside, true);
    int r = ioctl(v->fd, KVM_RUN, 0);
    int why = errno;
    atomic_store(&v->inside, false);
    uint32_t reason = r < 0 ? KVM_EXIT_INTR : v->run->exit_reason;
    v->run->immediate_exit = 0;
    if (vm->on_exit && vm->on_exit(vm->arg, v->number, reason))
        return false;
    if (r < 0) {
        errno = why;
        must(why == EINTR || why == EAGAIN, "KVM_RUN");
        return false;
    }
    if (reason == KVM_EXIT_DIRTY_RING_FULL)
        return false;
    if (reason != KVM_EXIT_IO || v->run->io.port != PORT_DONE) {
        fprintf(stderr, "tiny_vm: vCPU %u left the guest: reason %u\n", v->number, reason);
        abort();
    }
    return true;
}

/* The exit of `out` is complete only once the vCPU was entered again. */
static void complete_io(struct tiny_vcpu *v)
{
    v->run->immediate_exit = 1;
    must(ioctl(v->fd, KVM_RUN, 0) < 0 && errno == EINTR, "completion of I/O");
    v->run->immediate_exit = 0;
}

void tiny_vm_write(struct tiny_vm *vm, unsigned vcpu, uint64_t first, uint64_t n)
{
    struct tiny_vcpu *v = &vm->vcpus[vcpu];
    set_range(v, first, n);
    while (!run_once(v))
        ;
    complete_io(v);
}

static void *free_main(void *arg)
{
    struct tiny_vcpu *v = arg;
    set_range(v, v->first, v->n);
    while (!atomic_load(&v->stop))
        if (run_once(v))
            atomic_fetch_add(&v->passes, 1);
    return NULL;
}

void tiny_vm_run_free(struct tiny_vm *vm, unsigned vcpu, uint64_t first, uint64_t n)
{
    struct tiny_vcpu *v = &vm->vcpus[vcpu];
    v->first = first;
    v->n = n;
    atomic_store(&v->stop, false);
    must(pthread_create(&v->thread, NULL, free_main, v) == 0, "thread");
    v->free_running = true;
}

void tiny_vm_kick(void *vm, unsigned vcpu)
{
    struct tiny_vcpu *v = &((struct tiny_vm *)vm)->vcpus[vcpu];
    v->run->immediate_exit = 1;
    if (v->free_running)
        pthread_kill(v->thread, SIGUSR1);
}

bool tiny_vm_in_guest(void *vm, unsigned vcpu)
{
    return atomic_load(&((struct tiny_vm *)vm)->vcpus[vcpu].inside);
}

void tiny_vm_stop(struct tiny_vm *vm)
{
    for (unsigned i = 0; i < vm->params.vcpus; i++) {
        struct tiny_vcpu *v = &vm->vcpus[i];
        if (!v->free_running)
            continue;
        atomic_store(&v->stop, true);
        tiny_vm_kick(vm, i);
        pthread_join(v->thread, NULL);
        v->free_running = false;
        complete_io(v);
    }
}

uint64_t tiny_vm_passes(struct tiny_vm *vm, unsigned vcpu)
{
    return atomic_load(&vm->vcpus[vcpu].passes);
}

/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>

enum { CPUID_MAX = 256, MSRS_MAX = 512, MSR_TSC = 0x10, TSC_TOLERANCE_PPM = 250 };
/* Of leaves 1 and 0x80000001, in ECX. */
enum { CPUID_VMX = 1u << 5, CPUID_SVM = 1u << 2 };

struct machine {
    uint32_t vcpus, tsc_khz;
};

struct cpuid {
    struct kvm_cpuid2 head;
    struct kvm_cpuid_entry2 entries[CPUID_MAX];
};

struct msrs {
    struct kvm_msrs head;
    struct kvm_msr_entry entries[MSRS_MAX];
};

struct msr_list {
    struct kvm_msr_list head;
    uint32_t indices[MSRS_MAX];
};

/* ---- CPUID ---- */

/* What KVM_GET_SUPPORTED_CPUID says of the host, or KVM_GET_CPUID2 of a vCPU. */
static int get_cpuid(int fd, unsigned long request, struct cpuid *ret_cpuid)
{
    *ret_cpuid = (struct cpuid){.head = {.nent = CPUID_MAX}};
    return ioctl(fd, request, ret_cpuid) < 0 ? complain("cannot read CPUID: %s", strerror(errno))
                                             : 0;
}

int cpu_set_cpuid(struct vmm *vmm, struct vcpu *vcpu)
{
    struct cpuid c;
    if (get_cpuid(vmm->kvm_fd, KVM_GET_SUPPORTED_CPUID, &c) < 0)
        return -1;
    for (uint32_t i = 0; i < c.head.nent; i++) {
        struct kvm_cpuid_entry2 *e = &c.entries[i];
        if (e->function == 1) /* the local APIC's number, and how many there are */
            e->ebx = (e->ebx & 0xffff) | vcpu->number << 24 | vmm->vcpus.n << 16;
        if (e->function == 0xb || e->function == 0x1f)
            e->edx = vcpu->number;
        /* No guests within the guest: what KVM has of those is not in the saved state. */
        if (e->function == 1)
            e->ecx &= ~(uint32_t)CPUID_VMX;
        if (e->function == 0x80000001)
            e->ecx &= ~(uint32_t)CPUID_SVM;
    }
    return ioctl(vcpu->fd, KVM_SET_CPUID2, &c) < 0
               ? complain("vCPU %u: cannot set CPUID: %s", vcpu->number, strerror(errno))
               : 0;
}

/* Feature bits that a guest may rely on; those that a vCPU's own state makes are left out. */
static const struct {
    uint32_t function, eax, ebx, ecx, edx;
} features[] = {
    {1, 0, 0, ~(1u << 27), ~0u},
    {7, 0, ~0u, ~(1u << 4), ~0u},
    {0xd, ~0u, 0, 0, ~0u},
    {0x80000001, 0, 0, ~0u, ~0u},
};

static bool covers(const struct kvm_cpuid_entry2 *host, const struct kvm_cpuid_entry2 *guest)
{
    for (size_t i = 0; i < sizeof(features) / sizeof(*features); i++)
        if (features[i].function == guest->function && guest->index == 0)
            return !((guest->eax & ~host->eax & features[i].eax) |
                     (guest->ebx & ~host->ebx & features[i].ebx) |
                     (guest->ecx & ~host->ecx & features[i].ecx) |
                     (guest->edx & ~host->edx & features[i].edx));
    return true;
}

/* A guest must not come to a CPU that has less than the one on which it began. */
static int check_cpuid(const struct cpuid *host, const struct cpuid *guest)
{
    for (uint32_t i = 0; i < guest->head.nent; i++) {
        const struct kvm_cpuid_entry2 *g = &guest->entries[i];
        for (uint32_t j = 0; j < host->head.nent; j++) {
            const struct kvm_cpuid_entry2 *h = &host->entries[j];
            if (h->function == g->function && h->index == g->index && !covers(h, g))
                return complain("the guest's CPU has features that this host's lacks (CPUID %#x)",
                                g->function);
        }
    }
    return 0;
}

/* ---- What has one ioctl each way, in the order in which it is set; the last one is read first ---- */

static const struct item {
    enum state_type type;
    const char *name;
    unsigned long get, set;
    size_t size;
} items[] = {
    {STATE_REGS, "registers", KVM_GET_REGS, KVM_SET_REGS, sizeof(struct kvm_regs)},
    {STATE_SREGS, "system registers", KVM_GET_SREGS, KVM_SET_SREGS, sizeof(struct kvm_sregs)},
    {STATE_XCRS, "XCRs", KVM_GET_XCRS, KVM_SET_XCRS, sizeof(struct kvm_xcrs)},
    {STATE_DEBUGREGS, "debug registers", KVM_GET_DEBUGREGS, KVM_SET_DEBUGREGS,
     sizeof(struct kvm_debugregs)},
    {STATE_LAPIC, "local APIC", KVM_GET_LAPIC, KVM_SET_LAPIC, sizeof(struct kvm_lapic_state)},
    {STATE_EVENTS, "events", KVM_GET_VCPU_EVENTS, KVM_SET_VCPU_EVENTS,
     sizeof(struct kvm_vcpu_events)},
    {STATE_MP_STATE, "MP state", KVM_GET_MP_STATE, KVM_SET_MP_STATE, sizeof(struct kvm_mp_state)},
};
enum { N_ITEMS = sizeof(items) / sizeof(*items), ITEM_MAX = 4096 };

static int save_item(const struct vcpu *v, const struct item *item, struct state *state)
{
    uint64_t bytes[ITEM_MAX / 8] = {0};
    if (ioctl(v->fd, item->get, bytes) < 0)
        return complain("vCPU %u: cannot read its %s: %s", v->number, item->name, strerror(errno));
    state_put(state, item->type, v->number, bytes, item->size);
    return 0;
}

static int load_item(const struct vcpu *v, const struct item *item, const struct state *state)
{
    uint64_t bytes[ITEM_MAX / 8] = {0};
    if (state_copy(state, item->type, v->number, bytes, item->size) < 0)
        return -1;
    if (ioctl(v->fd, item->set, bytes) < 0)
        return complain("vCPU %u: cannot set its %s: %s", v->number, item->name, strerror(errno));
    return 0;
}

/* ---- FPU and vector registers ---- */

static size_t xsave_size(const struct vmm *vmm)
{
    int size = ioctl(vmm->vm_fd, KVM_CHECK_EXTENSION, KVM_CAP_XSAVE2);
    return size > (int)sizeof(struct kvm_xsave) ? (size_t)size : sizeof(struct kvm_xsave);
}

static int save_xsave(struct vmm *vmm, const struct vcpu *v, struct state *state)
{
    size_t size = xsave_size(vmm);
    void *xsave = calloc(1, size);
    int r = xsave ? ioctl(v->fd, size > sizeof(struct kvm_xsave) ? KVM_GET_XSAVE2 : KVM_GET_XSAVE,
                          xsave)
                  : -1;
    if (r == 0)
        state_put(state, STATE_XSAVE, v->number, xsave, size);
    free(xsave);
    return r < 0 ? complain("vCPU %u: cannot read its FPU: %s", v->number, strerror(errno)) : 0;
}

static int load_xsave(struct vmm *vmm, const struct vcpu *v, const struct state *state)
{
    size_t size = xsave_size(vmm), n;
    const void *saved =
        state_get(state, STATE_XSAVE, v->number, sizeof(struct kvm_xsave), size, &n);
    void *xsave = saved ? calloc(1, size) : NULL;
    if (!xsave)
        return -1;
    memcpy(xsave, saved, n);
    int r = ioctl(v->fd, KVM_SET_XSAVE, xsave);
    free(xsave);
    return r < 0 ? complain("vCPU %u: cannot set its FPU: %s", v->number, strerror(errno)) : 0;
}

/* ---- MSRs: all that KVM lists and that can be read ---- */

static int save_msrs(struct vmm *vmm, const struct vcpu *v, struct state *state)
{
    struct msr_list list = {.head = {.nmsrs = MSRS_MAX}};
    struct msrs msrs = {.head = {0}};
    if (ioctl(vmm->kvm_fd, KVM_GET_MSR_INDEX_LIST, &list) < 0)
        return complain("KVM does not tell its MSRs: %s", strerror(errno));
    for (uint32_t i = 0; i < list.head.nmsrs; i++) {
        struct msrs one = {.head = {.nmsrs = 1}, .entries = {{.index = list.indices[i]}}};
        if (ioctl(v->fd, KVM_GET_MSRS, &one) == 1)
            msrs.entries[msrs.head.nmsrs++] = one.entries[0];
    }
    state_put(state, STATE_MSRS, v->number, msrs.entries, msrs.head.nmsrs * sizeof(*msrs.entries));
    return 0;
}

/* One by one, so that the one which this host does not take can be named. */
static int load_msrs(const struct vcpu *v, const struct state *state)
{
    size_t size;
    const struct kvm_msr_entry *saved =
        state_get(state, STATE_MSRS, v->number, 0, MSRS_MAX * sizeof(*saved), &size);
    if (!saved)
        return -1;
    for (size_t i = 0; i < size / sizeof(*saved); i++) {
        struct msrs one = {.head = {.nmsrs = 1}};
        memcpy(one.entries, (const uint8_t *)saved + i * sizeof(*saved), sizeof(*saved));
        if (ioctl(v->fd, KVM_SET_MSRS, &one) != 1)
            return complain("vCPU %u: this host does not take MSR %#x", v->number,
                            one.entries[0].index);
    }
    return 0;
}

/* ---- A vCPU ---- */

/*
 * To read the MP state has KVM carry out what is pending of INIT and SIPI: the vCPU is reset, or
 * gets the registers of its start. What was read before that would be of another vCPU than the MP
 * state says.
 */
static int save_vcpu(struct vmm *vmm, const struct vcpu *v, struct state *state)
{
    struct cpuid c;
    if (save_item(v, &items[N_ITEMS - 1], state) < 0 || get_cpuid(v->fd, KVM_GET_CPUID2, &c) < 0)
        return -1;
    state_put(state, STATE_CPUID, v->number, c.entries, c.head.nent * sizeof(*c.entries));
    if (save_xsave(vmm, v, state) < 0 || save_msrs(vmm, v, state) < 0)
        return -1;
    for (unsigned i = 0; i < N_ITEMS - 1; i++)
        if (save_item(v, &items[i], state) < 0)
            return -1;
    return 0;
}

static int load_cpuid(const struct vcpu *v, const struct state *state)
{
    struct cpuid host, c = {.head = {0}};
    size_t size;
    const void *entries = state_get(state, STATE_CPUID, v->number, 0, sizeof(c.entries), &size);
    if (!entries || get_cpuid(v->fd, KVM_GET_CPUID2, &host) < 0)
        return -1;
    memcpy(c.entries, entries, size);
    c.head.nent = (uint32_t)(size / sizeof(*c.entries));
    if (check_cpuid(&host, &c) < 0)
        return -1;
    return ioctl(v->fd, KVM_SET_CPUID2, &c) < 0
               ? complain("vCPU %u: cannot set its CPUID: %s", v->number, strerror(errno))
               : 0;
}

/* CPUID first, since it says what else there is; MSRs after the local APIC, whose deadline timer is
 * one. */
static int load_vcpu(struct vmm *vmm, const struct vcpu *v, const struct state *state)
{
    if (load_cpuid(v, state) < 0 || load_xsave(vmm, v, state) < 0)
        return -1;
    for (unsigned i = 0; i < N_ITEMS; i++) {
        if (load_item(v, &items[i], state) < 0)
            return -1;
        if (items[i].type == STATE_LAPIC && load_msrs(v, state) < 0)
            return -1;
    }
    return 0;
}

/* ---- What vCPUs share ---- */

static const unsigned chips[] = {KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC};

static int save_shared(struct vmm *vmm, struct state *state)
{
    struct kvm_pit_state2 pit = {0};
    struct kvm_clock_data clock = {0};
    for (unsigned i = 0; i < 3; i++) {
        struct kvm_irqchip chip = {.chip_id = chips[i]};
        if (ioctl(vmm->vm_fd, KVM_GET_IRQCHIP, &chip) < 0)
            return complain("cannot read an interrupt controller: %s", strerror(errno));
        state_put(state, STATE_PIC, chips[i], &chip, sizeof(chip));
    }
    if (ioctl(vmm->vm_fd, KVM_GET_PIT2, &pit) < 0 || ioctl(vmm->vm_fd, KVM_GET_CLOCK, &clock) < 0)
        return complain("cannot read the timer or the clock: %s", strerror(errno));
    clock.flags = 0; /* the guest's time goes on from where it stood */
    state_put(state, STATE_PIT, 0, &pit, sizeof(pit));
    state_put(state, STATE_CLOCK, 0, &clock, sizeof(clock));
    return 0;
}

static int load_shared(struct vmm *vmm, const struct state *state)
{
    struct kvm_irqchip chip;
    struct kvm_pit_state2 pit;
    struct kvm_clock_data clock;
    for (unsigned i = 0; i < 3; i++) {
        if (state_copy(state, STATE_PIC, chips[i], &chip, sizeof(chip)) < 0)
            return -1;
        chip.chip_id = chips[i];
        if (ioctl(vmm->vm_fd, KVM_SET_IRQCHIP, &chip) < 0)
            return complain("cannot set an interrupt controller: %s", strerror(errno));
    }
    if (state_copy(state, STATE_PIT, 0, &pit, sizeof(pit)) < 0 ||
        state_copy(state, STATE_CLOCK, 0, &clock, sizeof(clock)) < 0)
        return -1;
    if (ioctl(vmm->vm_fd, KVM_SET_PIT2, &pit) < 0 || ioctl(vmm->vm_fd, KVM_SET_CLOCK, &clock) < 0)
        return complain("cannot set the timer or the clock: %s", strerror(errno));
    return 0;
}

/* The guest measured its TSC once. Another speed will do if the host can scale, or is as good as
 * equal. */
static int set_tsc_khz(struct vmm *vmm, uint32_t khz)
{
    for (unsigned i = 0; i < vmm->vcpus.n; i++) {
        int fd = vmm->vcpus.list[i].fd;
        int64_t host = ioctl(fd, KVM_GET_TSC_KHZ, 0), apart = host > khz ? host - khz : khz - host;
        if (host > 0 && apart && ioctl(fd, KVM_SET_TSC_KHZ, khz) < 0 &&
            apart * 1000000 > host * TSC_TOLERANCE_PPM)
            return complain("the guest's TSC has %u kHz, this host's %lld, and it cannot scale",
                            khz, (long long)host);
    }
    return 0;
}

/* ---- All ---- */

int cpu_save(struct vmm *vmm, struct state *state)
{
    int khz = ioctl(vmm->vcpus.list[0].fd, KVM_GET_TSC_KHZ, 0);
    struct machine machine = {vmm->vcpus.n, khz > 0 ? (uint32_t)khz : 0};
    state_put(state, STATE_MACHINE, 0, &machine, sizeof(machine));
    for (unsigned i = 0; i < vmm->vcpus.n; i++)
        if (save_vcpu(vmm, &vmm->vcpus.list[i], state) < 0)
            return -1;
    return save_shared(vmm, state);
}

int cpu_load(struct vmm *vmm, const struct state *state)
{
    struct machine machine;
    if (state_copy(state, STATE_MACHINE, 0, &machine, sizeof(machine)) < 0)
        return -1;
    if (machine.vcpus != vmm->vcpus.n)
        return complain("the guest has %u vCPUs, this VMM %u", machine.vcpus, vmm->vcpus.n);
    if (set_tsc_khz(vmm, machine.tsc_khz) < 0)
        return -1;
    for (unsigned i = 0; i < vmm->vcpus.n; i++)
        if (load_vcpu(vmm, &vmm->vcpus.list[i], state) < 0)
            return -1;
    return load_shared(vmm, state);
}

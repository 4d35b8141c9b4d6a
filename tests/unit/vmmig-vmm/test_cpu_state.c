/* SPDX-License-Identifier: Apache-2.0 */
/* What vmmig-vmm saves of a vCPU fits together, whatever the vCPU was about to do. */
#include "tools/vmmig-vmm/vmm.h"

#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>
#include <cmocka.h>

enum { INIT = 5 << 8, SIPI = 6 << 8, VECTOR = 0x10, APIC = 0xfee00000 };

/* Two vCPUs, which nobody runs. */
static void create(struct vmm *vmm)
{
    struct kvm_pit_config pit = {.flags = KVM_PIT_SPEAKER_DUMMY};
    *vmm = (struct vmm){.options = {.vcpus = 2}, .vcpus = {.n = 2}};
    vmm->kvm_fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    vmm->vm_fd = ioctl(vmm->kvm_fd, KVM_CREATE_VM, 0);
    assert_return_code(vmm->vm_fd, errno);
    assert_return_code(ioctl(vmm->vm_fd, KVM_SET_TSS_ADDR, 0xfffbd000), errno);
    assert_return_code(ioctl(vmm->vm_fd, KVM_CREATE_IRQCHIP, 0), errno);
    assert_return_code(ioctl(vmm->vm_fd, KVM_CREATE_PIT2, &pit), errno);
    assert_int_equal(vcpus_create(vmm), 0);
    /* From then on it is known by its local APIC. */
    struct kvm_lapic_state lapic;
    assert_return_code(ioctl(vmm->vcpus.fds[1], KVM_GET_LAPIC, &lapic), errno);
    assert_return_code(ioctl(vmm->vcpus.fds[1], KVM_SET_LAPIC, &lapic), errno);
}

/* As vCPU 0 says it to vCPU 1. */
static void tell(const struct vmm *vmm, uint32_t what)
{
    struct kvm_msi msi = {.address_lo = APIC | 1 << 12, .data = what};
    assert_int_equal(ioctl(vmm->vm_fd, KVM_SIGNAL_MSI, &msi), 1);
}

/* It was told to start, and has not run since: saved with the registers of its start, or as not started yet. */
static void a_vcpu_is_saved_as_it_is_started(void **state)
{
    (void)state;
    struct vmm vmm;
    struct state saved;
    struct kvm_mp_state mp;
    struct kvm_sregs sregs;
    struct kvm_regs regs;
    int fd = memfd_create("state", MFD_CLOEXEC);
    create(&vmm);
    tell(&vmm, INIT);
    tell(&vmm, SIPI | VECTOR);
    state_begin(&saved);
    assert_int_equal(cpu_save(&vmm, &saved), 0);
    assert_int_equal(state_write(&saved, fd), 0);
    state_finish(&saved);
    assert_int_equal(state_read(&saved, fd), 0);
    assert_int_equal(state_copy(&saved, STATE_MP_STATE, 1, &mp, sizeof(mp)), 0);
    assert_int_equal(state_copy(&saved, STATE_SREGS, 1, &sregs, sizeof(sregs)), 0);
    assert_int_equal(state_copy(&saved, STATE_REGS, 1, &regs, sizeof(regs)), 0);
    assert_int_equal(mp.mp_state, KVM_MP_STATE_RUNNABLE);
    assert_int_equal(sregs.cs.base, VECTOR << 12);
    assert_int_equal(regs.rip, 0);
    state_finish(&saved);
    for (unsigned i = 0; i < 2; i++)
        close(vmm.vcpus.fds[i]);
    close(vmm.vm_fd);
    close(vmm.kvm_fd);
    close(fd);
}

int main(void)
{
    if (access("/dev/kvm", R_OK | W_OK) < 0) {
        fprintf(stderr, "SKIPPED: NO /dev/kvm: %m\n");
        return 77;
    }
    const struct CMUnitTest tests[] = {cmocka_unit_test(a_vcpu_is_saved_as_it_is_started)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}

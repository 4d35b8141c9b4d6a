/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tiny_vm: a KVM VM in this process, for tests and measurements of dirty tracking. Its vCPUs run ring-3
 * code from their first instruction (where KVM has no hardware to lean on, ring 0 is emulated), which
 * writes pages and says when it is done.
 *
 *     if (!tiny_vm_available()) exit(77)             77: skipped
 *     struct tiny_vm *vm = tiny_vm_create(&(struct tiny_vm_params){...});
 *     tiny_vm_write(vm, 0, first, n)                 the guest writes these pages of its data slot once
 *     tiny_vm_run_free(vm, 1, first, n)              ... again and again, in a thread, until
 *     tiny_vm_stop(vm)
 *
 * Two slots: number 0 with the guest's own things, number 1, at 4 GiB, with the data. Every write adds
 * one to the first word of its page. Anything that fails aborts the program: it is a test's.
 */
#ifndef VMMIG_TESTS_TINY_VM_H
#define VMMIG_TESTS_TINY_VM_H

#include "dirtylog/dirtylog.h"

#define TINY_VM_VCPUS_MAX 8
#define TINY_VM_DATA_SLOT 1
#define TINY_VM_DATA_ADDRESS (4ull << 30)

struct tiny_vm;

struct tiny_vm_params {
    enum dirtylog_kind kind; /* AUTO is allowed */
    unsigned ring_entries;
    unsigned vcpus;          /* 0: 1 */
    uint64_t data_size;      /* a multiple of 2 MiB, at most 32 GiB */
    bool hugetlb;
};

bool tiny_vm_available(void);
struct tiny_vm *tiny_vm_create(const struct tiny_vm_params *params);
void tiny_vm_destroy(struct tiny_vm *vm);

enum dirtylog_kind tiny_vm_kind(const struct tiny_vm *vm);
int tiny_vm_fd(const struct tiny_vm *vm);
const int *tiny_vm_vcpu_fds(const struct tiny_vm *vm);
/* Both slots. */
const struct dirtylog_slot *tiny_vm_slots(const struct tiny_vm *vm);
int tiny_vm_memfd(const struct tiny_vm *vm, unsigned slot);
uint8_t *tiny_vm_data(const struct tiny_vm *vm);
uint64_t tiny_vm_count(const struct tiny_vm *vm, uint64_t page);

/* Who is told of each return from KVM_RUN (dirtylog_vcpu_exit, or the library). True: run on. */
typedef bool tiny_vm_exit_fn(void *arg, unsigned vcpu, uint32_t exit_reason);
typedef void tiny_vm_enter_fn(void *arg, unsigned vcpu);
void tiny_vm_on_exit(struct tiny_vm *vm, tiny_vm_enter_fn *enter, tiny_vm_exit_fn *fn, void *arg);

void tiny_vm_write(struct tiny_vm *vm, unsigned vcpu, uint64_t first, uint64_t n);
void tiny_vm_run_free(struct tiny_vm *vm, unsigned vcpu, uint64_t first, uint64_t n);
/* Make a running vCPU leave KVM_RUN once; it goes on by itself. For dirtylog_params. */
void tiny_vm_kick(void *vm, unsigned vcpu);
bool tiny_vm_in_guest(void *vm, unsigned vcpu);
/* End all free runs; returns when the vCPUs stand. */
void tiny_vm_stop(struct tiny_vm *vm);
/* Pages written by a vCPU's free run so far, in whole passes. */
uint64_t tiny_vm_passes(struct tiny_vm *vm, unsigned vcpu);

#endif

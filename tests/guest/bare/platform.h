/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The machine under the bare guest: the seam between the worker, which is the same everywhere, and
 * what starts it. One image links one implementation: platform_pc.c with boot_pc.S is a PC, QEMU's or
 * vmmig-vmm's.
 *
 * Calling sequence: the boot stub brings every vCPU to ring 3 in long mode with the low 64 GiB
 * mapped one to one and calls the platform, which on vCPU 0 calls worker_boot() once with what it
 * found out about the machine. The worker calls platform_start_vcpus(); each further vCPU then
 * enters worker_run().
 *
 * Everything here runs in ring 3 with interrupts off. Nothing may assume that the TSC is
 * continuous: a migration makes it jump.
 */
#ifndef VMMIG_BARE_PLATFORM_H
#define VMMIG_BARE_PLATFORM_H

#include <stdbool.h>
#include <stdint.h>

#define PLATFORM_MAX_VCPUS 16
#define PLATFORM_MAX_RANGES 8
#define PLATFORM_MAPPED_END (64ull << 30)

/* Usable RAM, page aligned, without the guest's own image. */
struct platform_range {
    uint64_t start;
    uint64_t end;
};

struct platform_machine {
    struct platform_range ranges[PLATFORM_MAX_RANGES];
    unsigned range_count;
    uint64_t tsc_khz;
    const char *command_line; /* of the worker's options (worker.h); NUL-terminated */
};

/* Starts vCPUs 1 to count-1; each calls worker_run(). Returns when all have arrived; if they have
 * not within five seconds of guest time, panics. */
void platform_start_vcpus(unsigned count);

/* Sends bytes to the console. Never blocks: what it does not take at once waits in memory, up to 32
 * KiB (what is more is lost), and goes with the next call. Only one vCPU may be in here at a time. */
void platform_console_write(const char *bytes, unsigned length);

/* Something waits to be sent: call platform_console_write, if only with no bytes. */
bool platform_console_waits(void);

/* The next byte that the console received, or -1. */
int platform_console_read(void);

/* A register of a device, 32 bits; all ones where there is none. */
uint32_t platform_port_read(uint16_t port);
void platform_port_write(uint16_t port, uint32_t value);

/* Gives the host CPU away for about a millisecond, or less. */
void platform_idle(void);

/* Prints "PANIC reason value" and stops this vCPU for good. */
_Noreturn void platform_panic(const char *reason, uint64_t value);

static inline uint64_t platform_tsc(void)
{
    uint32_t low, high;

    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
    return (uint64_t)high << 32 | low;
}

static inline void platform_relax(void)
{
    __asm__ volatile("pause" ::: "memory");
}

#endif

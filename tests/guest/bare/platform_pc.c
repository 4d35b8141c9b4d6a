/* SPDX-License-Identifier: Apache-2.0 */
/* The bare guest's machine: a PC as QEMU and vmmig-vmm make it, started by multiboot. See platform.h and
 * boot_pc.S. */
#include "platform.h"

#include <stddef.h>

#include "text.h"
#include "worker.h"

enum {
    UART = 0x3f8,
    UART_FIFO_DEPTH = 16,
    UART_RECEIVED = 0x01,
    UART_ROOM = 0x20,
    CONSOLE_QUEUE = 32768,
    PIT_HZ = 1193182,
    TRAMPOLINE = 0x8000,
    TICK_VECTOR = 0x40,
    SLEEP_VECTOR =
        3, /* a breakpoint: KVM without hardware support delivers no other software interrupt */
    SPURIOUS_VECTOR = 0xff,
};

/* Local APIC registers, by their offset in its page. */
enum {
    APIC_SPURIOUS = 0x0f0,
    APIC_COMMAND = 0x300,
    APIC_TIMER = 0x320,
    APIC_TIMER_START = 0x380,
    APIC_TIMER_DIVIDE = 0x3e0,
};

#define APIC_BASE 0xfee00000u
#define APIC_TIMER_PERIODIC (1u << 17)
#define APIC_INIT_ALL_OTHERS 0x000c4500u
#define APIC_STARTUP_ALL_OTHERS 0x000c4600u
#define APIC_TICKS_PER_MS 1000000u /* QEMU's and KVM's local APIC counts nanoseconds */

struct multiboot_info {
    uint32_t flags;
    uint32_t unused1[3];
    uint32_t command_line;
    uint32_t unused2[6];
    uint32_t map_length;
    uint32_t map_address;
};

struct __attribute__((packed)) multiboot_range {
    uint32_t size; /* of what follows */
    uint64_t start;
    uint64_t length;
    uint32_t type;
};

enum {
    MULTIBOOT_HAS_COMMAND_LINE = 1 << 2,
    MULTIBOOT_HAS_MAP = 1 << 6,
    MULTIBOOT_RAM = 1,
};

struct idt_entry {
    uint16_t offset_low;
    uint16_t selector;
    uint16_t flags;
    uint16_t offset_middle;
    uint32_t offset_high;
    uint32_t unused;
};

/* What boot_pc.S offers. */
extern const uint8_t image_end[]; /* bare.ld */
extern uint64_t bss_start[], bss_end[];
extern const uint8_t pc_trampoline[], pc_trampoline_end[];
extern const uint8_t pc_sleep_entry[], pc_tick_entry[], pc_spurious_entry[], pc_exception_entries[];
extern uint64_t pc_high_directories[60 * 512];
extern struct idt_entry pc_idt[256];
extern volatile uint32_t pc_vcpus_arrived;
extern uint32_t pc_multiboot_info;

/* What it calls. */
_Noreturn void pc_main(unsigned vcpu);
_Noreturn void pc_exception(const uint64_t *frame, uint64_t address);

static uint64_t tsc_khz;
static char command_line[512];

static inline void out8(uint16_t port, uint8_t value)
{
    __asm__ volatile("outb %0, %1" ::"a"(value), "Nd"(port));
}

static inline uint8_t in8(uint16_t port)
{
    uint8_t value;

    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

uint32_t platform_port_read(uint16_t port)
{
    uint32_t value;

    __asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port) : "memory");
    return value;
}

void platform_port_write(uint16_t port, uint32_t value)
{
    __asm__ volatile("outl %0, %1" ::"a"(value), "Nd"(port) : "memory");
}

static void apic_write(unsigned reg, uint32_t value)
{
    *(volatile uint32_t *)(uintptr_t)(APIC_BASE + reg) = value;
}

/* What the console has not taken yet: a host that reads it late must not lose a line. */
static struct {
    char bytes[CONSOLE_QUEUE];
    unsigned first, length;
} unsent;

bool platform_console_waits(void)
{
    return unsent.length > 0;
}

static void send_unsent(void)
{
    while (unsent.length && in8(UART + 5) & UART_ROOM) {
        for (unsigned i = 0; i < UART_FIFO_DEPTH && unsent.length; i++) {
            out8(UART, (uint8_t)unsent.bytes[unsent.first]);
            unsent.first = (unsent.first + 1) % CONSOLE_QUEUE;
            unsent.length--;
        }
    }
}

void platform_console_write(const char *bytes, unsigned length)
{
    for (unsigned i = 0; i < length && unsent.length < CONSOLE_QUEUE; i++)
        unsent.bytes[(unsent.first + unsent.length++) % CONSOLE_QUEUE] = bytes[i];
    send_unsent();
}

int platform_console_read(void)
{
    return in8(UART + 5) & UART_RECEIVED ? in8(UART) : -1;
}

void platform_idle(void)
{
    __asm__ volatile("int3" ::: "memory");
}

void platform_panic(const char *reason, uint64_t value)
{
    struct text line = {.length = 0};

    text_string(&line, "PANIC ");
    text_string(&line, reason);
    text_string(&line, " ");
    text_hex(&line, value);
    text_string(&line, "\n");
    platform_console_write(line.bytes, line.length);
    for (;;) {
        send_unsent();
        platform_idle();
    }
}

/* Runs in ring 0, on whatever the vCPU was doing. Never returns; halts once all was said. */
void pc_exception(const uint64_t *frame, uint64_t address)
{
    struct text line = {.length = 0};

    text_string(&line, "PANIC exception ");
    text_decimal(&line, frame[0]);
    text_string(&line, " error ");
    text_hex(&line, frame[1]);
    text_string(&line, " rip ");
    text_hex(&line, frame[2]);
    text_string(&line, " cr2 ");
    text_hex(&line, address);
    text_string(&line, "\n");
    platform_console_write(line.bytes, line.length);
    while (platform_console_waits())
        send_unsent();
    for (;;)
        __asm__ volatile("cli; hlt");
}

static void set_gate(unsigned vector, const uint8_t *entry, unsigned ring)
{
    uintptr_t offset = (uintptr_t)entry;

    pc_idt[vector] = (struct idt_entry){
        .offset_low = (uint16_t)offset,
        .selector = 0x08,
        .flags = (uint16_t)(0x8e00 | ring << 13),
        .offset_middle = (uint16_t)(offset >> 16),
        .offset_high = (uint32_t)(offset >> 32),
    };
}

static void init_idt(void)
{
    for (unsigned vector = 0; vector < 32; vector++)
        set_gate(vector, pc_exception_entries + 16 * vector, 0);
    set_gate(TICK_VECTOR, pc_tick_entry, 0);
    set_gate(SPURIOUS_VECTOR, pc_spurious_entry, 0);
    set_gate(SLEEP_VECTOR, pc_sleep_entry, 3);
}

/* A periodic tick, so that one which gets lost costs a millisecond and not the guest. */
static void init_apic(void)
{
    apic_write(APIC_SPURIOUS, 0x100 | SPURIOUS_VECTOR);
    apic_write(APIC_TIMER_DIVIDE, 0x0b);
    apic_write(APIC_TIMER, APIC_TIMER_PERIODIC | TICK_VECTOR);
    apic_write(APIC_TIMER_START, APIC_TICKS_PER_MS);
}

static void init_uart(void)
{
    out8(UART + 1, 0x00); /* no interrupts */
    out8(UART + 3, 0x80);
    out8(UART + 0, 0x01); /* 115200 baud */
    out8(UART + 1, 0x00);
    out8(UART + 3, 0x03); /* 8 bits, no parity */
    out8(UART + 2, 0x07); /* FIFOs on and empty */
}

/* Reads the PIT's channel 2 and the TSC as nearly at once as possible: an interruption of the vCPU
 * between the two makes the bracket wide, and the narrowest of a few tries wins. */
static uint64_t read_pit_at(uint16_t *ret_count)
{
    uint64_t best_width = ~0ull, best_time = 0;

    for (int try = 0; try < 8; try++) {
        uint64_t before = platform_tsc(), width;
        uint16_t count;

        out8(0x43, 0x80); /* latch channel 2 */
        width = platform_tsc() - before;
        count = in8(0x42);
        count = (uint16_t)(count | in8(0x42) << 8);
        if (width < best_width) {
            best_width = width;
            best_time = before + width / 2;
            *ret_count = count;
        }
    }
    return best_time;
}

static uint64_t measure_tsc_khz(void)
{
    uint16_t first, last;
    uint64_t start, end;

    out8(0x61, (in8(0x61) & 0xfc) | 0x01); /* gate on, speaker off */
    out8(0x43, 0xb4);                      /* channel 2, both bytes, mode 2 */
    out8(0x42, 0xff);
    out8(0x42, 0xff);
    start = read_pit_at(&first);
    do {
        end = read_pit_at(&last);
    } while ((uint16_t)(first - last) < PIT_HZ / 100);
    return (end - start) * PIT_HZ / (uint16_t)(first - last) / 1000;
}

/* Until two measurements agree: a vCPU that was off its CPU for 55 ms has missed a turn of the
 * counter. */
static uint64_t calibrate_tsc(void)
{
    uint64_t former = measure_tsc_khz();

    for (int try = 0; try < 10; try++) {
        uint64_t khz = measure_tsc_khz();
        uint64_t difference = khz > former ? khz - former : former - khz;

        if (difference < khz / 100)
            return khz;
        former = khz;
    }
    platform_panic("tsc kHz", former);
}

/* Adds the part of [start, end) that lies above the image and below what is mapped. */
static void add_range(struct platform_machine *machine, uint64_t start, uint64_t end)
{
    const uint64_t free_from = ((uintptr_t)image_end + 0x1fffff) & ~0x1fffffull;

    start = (start + 4095) & ~4095ull;
    end &= ~4095ull;
    if (start < free_from)
        start = free_from;
    if (end > PLATFORM_MAPPED_END)
        end = PLATFORM_MAPPED_END;
    if (start >= end)
        return;
    if (machine->range_count == PLATFORM_MAX_RANGES)
        platform_panic("memory ranges", machine->range_count);
    machine->ranges[machine->range_count++] = (struct platform_range){start, end};
}

static void read_multiboot(struct platform_machine *machine)
{
    const struct multiboot_info *info = (const void *)(uintptr_t)pc_multiboot_info;

    if (!(info->flags & MULTIBOOT_HAS_MAP))
        platform_panic("multiboot flags", info->flags);
    for (uint32_t at = 0; at + sizeof(struct multiboot_range) <= info->map_length;) {
        const struct multiboot_range *range = (const void *)(uintptr_t)(info->map_address + at);

        if (range->type == MULTIBOOT_RAM)
            add_range(machine, range->start, range->start + range->length);
        at += range->size + 4;
    }
    if (info->flags & MULTIBOOT_HAS_COMMAND_LINE) {
        const char *from = (const void *)(uintptr_t)info->command_line;

        for (size_t i = 0; i < sizeof(command_line) - 1 && from[i]; i++)
            command_line[i] = from[i];
    }
    machine->command_line = command_line;
}

static void wait_us(uint64_t microseconds)
{
    uint64_t start = platform_tsc();

    while (platform_tsc() - start < microseconds * tsc_khz / 1000)
        platform_relax();
}

void platform_start_vcpus(unsigned count)
{
    uint8_t *to = (uint8_t *)TRAMPOLINE;

    if (count == 1)
        return;
    __asm__("" : "+r"(to)); /* a low address is no null pointer */
    for (size_t i = 0; i < (size_t)(pc_trampoline_end - pc_trampoline); i++)
        to[i] = pc_trampoline[i];
    apic_write(APIC_COMMAND, APIC_INIT_ALL_OTHERS);
    wait_us(1000);
    apic_write(APIC_COMMAND, APIC_STARTUP_ALL_OTHERS | TRAMPOLINE >> 12);
    for (unsigned waited = 0; pc_vcpus_arrived < count; waited++) {
        if (waited == 5000)
            platform_panic("vcpus arrived", pc_vcpus_arrived);
        wait_us(1000);
    }
}

void pc_main(unsigned vcpu)
{
    if (vcpu == 0) {
        struct platform_machine machine = {.range_count = 0};

        for (uint64_t *word = bss_start; word < bss_end; word++)
            *word = 0;
        out8(0x21, 0xff); /* no interrupt but the tick */
        out8(0xa1, 0xff);
        init_uart();
        init_idt();
        for (uint64_t i = 0; i < 60 * 512; i++)
            pc_high_directories[i] = (i + 4 * 512) << 21 | 0x87;
        tsc_khz = calibrate_tsc();
        machine.tsc_khz = tsc_khz;
        read_multiboot(&machine);
        init_apic();
        worker_boot(&machine);
    } else {
        init_apic();
    }
    worker_run(vcpu);
}

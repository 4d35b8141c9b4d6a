/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Boot stub for a PC: from multiboot (vCPU 0) or a startup IPI (the others) to ring 3 in long mode,
 * and the few pieces of ring 0 that remain: sleeping, the timer tick, exceptions.
 *
 * As little as possible runs in ring 0: where nested KVM has no hardware to lean on, each such
 * instruction is emulated, a thousand times slower than ring 3. Hence the static page tables for
 * the low 4 GiB (the C code adds the rest from ring 3), and ring 3 does its own port I/O: by IOPL 3,
 * and by an I/O bitmap in the TSS, since such a KVM may judge by the bitmap alone.
 *
 * The image is a flat binary; the multiboot header carries the load addresses (flag 16), since QEMU
 * takes ELF by multiboot only as 32-bit files.
 */
#define MULTIBOOT_MAGIC 0x1badb002
#define MULTIBOOT_FLAGS 0x00010003 /* page aligned, memory map, addresses below are valid */
#define MAX_VCPUS 16               /* PLATFORM_MAX_VCPUS */
#define RING0_STACK 4096
#define RING3_STACK 16384
#define TSS_SIZE 256
#define TSS_BITMAP 104             /* ports 0 to 0x3ff, and a byte of ones */
#define TSS_LIMIT (TSS_BITMAP + 128)

#define CODE64_RING0 0x08
#define DATA_RING0 0x10
#define DATA_RING3 0x1b
#define CODE64_RING3 0x23
#define CODE32_RING0 0x28
#define FIRST_TSS 0x30

#define APIC_EOI 0xfee000b0

    .section .text.head, "ax"
    .code32
    .globl _start
multiboot_header:
    .long MULTIBOOT_MAGIC, MULTIBOOT_FLAGS, -(MULTIBOOT_MAGIC + MULTIBOOT_FLAGS)
    .long multiboot_header, image_start, image_load_end, 0, _start
_start:
    cli
    mov %ebx, pc_multiboot_info
enter_long_mode:
    mov $pml4, %eax
    mov %eax, %cr3
    mov $0x20, %eax             /* PAE */
    mov %eax, %cr4
    mov $0xc0000080, %ecx       /* EFER: long mode */
    rdmsr
    or $0x100, %eax
    wrmsr
    mov $0x80000001, %eax       /* paging, protection; caches on */
    mov %eax, %cr0
    lgdt gdt_pointer
    ljmp $CODE64_RING0, $in_long_mode

    .code64
in_long_mode:
    mov $1, %edi
    lock xadd %edi, pc_vcpus_arrived
    cmp $MAX_VCPUS, %edi
    jae halt
    mov $DATA_RING0, %eax
    mov %eax, %ss

    /* This vCPU's TSS: rsp0, and a descriptor that points to it. */
    lea 1(%rdi), %eax
    imul $RING0_STACK, %eax
    add $ring0_stacks, %eax
    mov %edi, %ebx
    shl $8, %ebx
    add $tss, %ebx
    mov %rax, 4(%rbx)
    mov %eax, %esp
    mov %edi, %ecx
    shl $4, %ecx
    mov %bx, gdt + FIRST_TSS + 2(%rcx)
    shr $16, %ebx
    mov %bl, gdt + FIRST_TSS + 4(%rcx)
    mov %bh, gdt + FIRST_TSS + 7(%rcx)
    add $FIRST_TSS, %ecx
    ltr %cx
    lidt idt_pointer

    lea 1(%rdi), %eax
    imul $RING3_STACK, %eax
    add $ring3_stacks, %eax
    pushq $DATA_RING3
    push %rax
    pushq $0x3002               /* IOPL 3, interrupts off */
    pushq $CODE64_RING3
    pushq $in_ring3
    iretq
in_ring3:
    xor %ebp, %ebp
    call pc_main                /* vCPU number in edi */
    ud2
halt:
    cli
    hlt
    jmp halt

/* pc_trampoline is copied below 1 MiB and entered in real mode at its first byte. */
    .section .text
    .code16
    .globl pc_trampoline, pc_trampoline_end
pc_trampoline:
    cli
    mov %cs, %ax
    mov %ax, %ds
    lgdtl trampoline_gdt_pointer - pc_trampoline
    mov $1, %eax
    mov %eax, %cr0
    ljmpl $CODE32_RING0, $trampoline32
trampoline_gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt
pc_trampoline_end:
    .code32
trampoline32:
    mov $DATA_RING0, %eax
    mov %eax, %ds
    jmp enter_long_mode

    .code64
/* int3 from ring 3: sleeps until the next tick. A tick that is already pending ends it at once. */
    .globl pc_sleep_entry, pc_tick_entry, pc_spurious_entry, pc_exception_entries
pc_sleep_entry:
    sti
    hlt
    cli
    iretq

pc_tick_entry:
    push %rax
    mov $APIC_EOI, %eax
    movl $0, (%rax)
    pop %rax
pc_spurious_entry:
    iretq

/* 32 entries of 16 bytes each. Those without an error code of the CPU's push a zero. */
    .balign 16
pc_exception_entries:
    .set vector, 0
    .rept 32
    .balign 16
    .if !(vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21)
    pushq $0
    .endif
    pushq $vector
    jmp exception
    .set vector, vector + 1
    .endr
exception:
    mov %rsp, %rdi              /* vector, error code, rip ... */
    mov %cr2, %rsi
    and $-16, %rsp
    call pc_exception
    jmp halt

    .section .data
    .balign 16
gdt:
    .quad 0
    .quad 0x00af9b000000ffff    /* 08: ring 0, 64-bit code */
    .quad 0x00cf93000000ffff    /* 10: ring 0, data */
    .quad 0x00cff3000000ffff    /* 18: ring 3, data */
    .quad 0x00affb000000ffff    /* 20: ring 3, 64-bit code */
    .quad 0x00cf9b000000ffff    /* 28: ring 0, 32-bit code */
    .rept MAX_VCPUS
    .quad 0x0000890000000000 + TSS_LIMIT, 0 /* 30...: one TSS per vCPU; its address comes at boot */
    .endr
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt
idt_pointer:
    .word 256 * 16 - 1
    .quad pc_idt
    .balign TSS_SIZE
tss:
    .rept MAX_VCPUS
    .skip 102
    .word TSS_BITMAP
    .skip 128
    .byte 0xff
    .balign TSS_SIZE
    .endr
    .globl pc_vcpus_arrived, pc_multiboot_info
pc_vcpus_arrived:
    .long 0
pc_multiboot_info:
    .long 0

/* Identity mapping in 2 MiB pages, all open to ring 3; pc_main() fills in what lies above 4 GiB. */
    .balign 4096
pml4:
    .quad page_pointers + 7
    .fill 511, 8, 0
page_pointers:
    .set index, 0
    .rept 4
    .quad low_directories + index * 4096 + 7
    .set index, index + 1
    .endr
    .rept 60
    .quad pc_high_directories + (index - 4) * 4096 + 7
    .set index, index + 1
    .endr
    .fill 448, 8, 0
low_directories:
    .set index, 0
    .rept 2048
    .quad index * 0x200000 + 0x87
    .set index, index + 1
    .endr

    .section .bss
    .globl pc_high_directories, pc_idt
    .balign 4096
pc_high_directories:
    .skip 60 * 4096
pc_idt:
    .skip 256 * 16

    .section .stacks, "aw", @nobits
    .balign 16
ring0_stacks:
    .skip MAX_VCPUS * RING0_STACK
ring3_stacks:
    .skip MAX_VCPUS * RING3_STACK

    .section .note.GNU-stack, "", @progbits

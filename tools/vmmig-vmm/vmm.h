/* SPDX-License-Identifier: Apache-2.0 */
/*
 * vmmig-vmm: a small VMM for one KVM guest, and the example of how a VMM uses libvmmig-attach.
 *
 *     main.c        the machine is put together; the library's callbacks
 *     options.c     the command line
 *     memory.c      guest memory out of a memfd; multiboot kernels
 *     vcpus.c       the vCPUs' threads: run, pause, resume
 *     cpu_state.c   what the state of vCPUs, interrupt controllers and clocks is
 *     serial.c      the console
 *     writer.c      a device that writes guest memory by itself
 *     events.c      tells somebody when the guest runs, and when it stands
 *     state.c       the file that a guest's state travels in
 *
 * It needs nothing but KVM, libc and the library. vmmig-attach.h says what the library asks of a VMM; where
 * this one does its part, a comment begins with "vmmig:". docs/attach.md walks through them.
 *
 * Threads: one per vCPU, the writer's, the library's, and main, which waits for a signal to end. What is
 * read or written by several of them has a lock beside it.
 *
 * Errors: a function that returns int returns 0, or -1 after complain() has said why on stderr.
 */
#ifndef VMMIG_VMM_H
#define VMMIG_VMM_H

#include <linux/kvm.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <vmmig-attach.h>

#define VMM_VCPUS_MAX 8
#define VMM_ARGV_MAX 64
#define PAGE 4096u
#define FOUR_GIB (4ull << 30)

/* A line on stderr. Returns -1. */
int complain(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* ---- options.c ---- */

struct options {
    uint64_t memory, below_4g; /* bytes */
    bool hugetlb;
    unsigned vcpus;
    const char *name; /* by which vmmig knows the VM; NULL: that does not matter */
    const char *kernel, *append;
    const char *serial, *events; /* on the heap; events: NULL: nobody listens */
    uint64_t writer_rate; /* pages a second; 0: no such device */
    const char *attach;
    enum vmmig_tracking tracking;
    const char *trace; /* of VMMIG_TRACKING_TRACE */
    unsigned ring_entries;
    const char *record;
    bool incoming, help;
    /* The same command line for a VMM that waits for this guest, ended by NULL. */
    const char *incoming_argv[VMM_ARGV_MAX + 2];
};

int options_parse(int argc, char **argv, struct options *ret_options);
void options_help(void);

/* ---- state.c: the file that a guest's state travels in ---- */

/*
 * "VMMIGVMM", u32 version, u32 number of sections; each section u32 type, u32 instance, u64 size and that many
 * bytes; at the end u64, the FNV-1a hash of all before. Little-endian. Each section is there once for each
 * instance; contents are what the module that wrote it says, KVM's structures mostly.
 */
#define STATE_VERSION 1
#define STATE_BYTES_MAX (4u << 20)
#define STATE_SECTIONS_MAX 256

enum state_type {
    STATE_MACHINE = 1, /* once each: */
    STATE_PIC,         /* instances: KVM_IRQCHIP_PIC_MASTER, ..._SLAVE, ..._IOAPIC */
    STATE_PIT,
    STATE_CLOCK,
    STATE_SERIAL,
    STATE_WRITER,
    STATE_CPUID = 32, /* once per vCPU: */
    STATE_REGS,
    STATE_SREGS,
    STATE_XSAVE,
    STATE_XCRS,
    STATE_DEBUGREGS,
    STATE_LAPIC,
    STATE_MSRS,
    STATE_EVENTS,
    STATE_MP_STATE,
};

struct state {
    uint8_t *bytes;
    size_t size;
    bool failed; /* out of memory, or larger than STATE_BYTES_MAX */
};

/* Writing: begin, put ..., write. */
void state_begin(struct state *s);
void state_put(struct state *s, enum state_type type, unsigned instance, const void *bytes, size_t size);
int state_write(struct state *s, int fd);
/* Reading. The whole file is checked before anything of it is used. */
int state_read(struct state *s, int fd);
int state_check(const uint8_t *bytes, size_t size);
/* A section whose size is between min and max; NULL, and complains, if there is none. */
const void *state_get(const struct state *s, enum state_type type, unsigned instance, size_t min,
                      size_t max, size_t *ret_size);
/* ... of exactly this size, copied. */
int state_copy(const struct state *s, enum state_type type, unsigned instance, void *ret_bytes,
               size_t size);
void state_finish(struct state *s);

/* ---- memory.c ---- */

struct memory {
    int memfd;
    uint8_t *host;
    uint64_t size;
    struct vmmig_slot slots[2]; /* below and above the PCI hole */
    unsigned n_slots;
};

int memory_create(struct memory *m, const struct options *o);
/* Tell KVM. */
int memory_map(const struct memory *m, int vm_fd);
/* Where [address, address + size) of the guest is mapped; NULL if not all of it is memory in one piece. */
void *memory_at(const struct memory *m, uint64_t address, uint64_t size);
/* Put a multiboot kernel into memory. *ret_entry, *ret_info: what EIP and EBX are at its start. */
int memory_load_kernel(struct memory *m, const char *path, const char *command_line,
                       uint32_t *ret_entry, uint32_t *ret_info);

/* ---- serial.c: a 16550 at 0x3f8, polled ---- */

#define SERIAL_PORT 0x3f8
#define SERIAL_PORTS 8
#define SERIAL_FIFO 64

struct serial_state {
    uint8_t divisor[2], interrupts, line, modem, scratch, n_in, n_out;
    uint8_t in[SERIAL_FIFO], out[SERIAL_FIFO]; /* not read by the guest, not taken by the peer yet */
};

struct serial {
    pthread_mutex_t lock;
    int in_fd, out_fd; /* -1: nobody there */
    struct serial_state state;
};

/* where: stdio, null, file:PATH or unix:PATH, a socket that is connected to. */
int serial_open(struct serial *s, const char *where);
void serial_read(struct serial *s, unsigned port, uint8_t *ret_value);
void serial_write(struct serial *s, unsigned port, uint8_t value);
void serial_save(struct serial *s, struct state *state);
int serial_load(struct serial *s, const struct state *state);

/* A connection to whoever listens at that path; complains of the option. */
int connect_to(const char *option, const char *path);

/* ---- events.c ---- */

/*
 * Lines "RESUME 1700000000.123456", before a vCPU may run, and "STOP ...", when none does any more, with the time of
 * day. The end of the connection is the end of the VMM.
 */
struct events {
    int fd; /* -1: nobody listens */
};

int events_open(struct events *e, const char *path);
void events_tell(const struct events *e, const char *what);

/* ---- writer.c: writes guest memory by itself ---- */

/*
 * Registers, 32 bits each, from WRITER_PORT on. The guest gives it 1 + PAGES pages of memory, by writing ADDRESS
 * and then PAGES; PAGES reads as 0 if they were refused. The device goes round the last PAGES of them, and gives
 * page number s % PAGES its contents of sequence number s = 1, 2, 3 ..., then adds one to COMPLETED.
 * The first page is its own notes: it is written at the start, and whenever the machine's state was
 * saved, after one was added to SAVES.
 *
 * Words of such a page, 64 bits each, i = 2 ... 510:
 *     0    sequence number (the first page: SAVES)
 *     1    the page's address
 *     i    (word 0 * 0x9e3779b97f4a7c15 + word 1 + i) * 0xbf58476d1ce4e5b9
 *     511  sum of words 0 to 510
 */
#define WRITER_PORT 0x300
#define WRITER_PORTS 20
enum writer_register { WRITER_ID = 0, WRITER_ADDRESS = 4, WRITER_PAGES = 8, WRITER_COMPLETED = 12,
                       WRITER_SAVES = 16 };
#define WRITER_ID_VALUE 0x31525756u
#define WRITER_PAGES_MAX 65536u

struct writer_state {
    uint64_t address; /* of the first page */
    uint32_t pages, completed, saves, unused;
};

struct writer {
    uint64_t rate;
    const struct memory *memory;
    struct vmmig_attach *const *attach; /* there before the guest runs */
    pthread_mutex_t lock; /* guards what follows; held while pages are written */
    struct writer_state state;
    bool going;
    atomic_bool end;
    pthread_t thread;
    bool started;
};

int writer_start(struct writer *w, const struct memory *memory, struct vmmig_attach *const *attach,
                 uint64_t rate);
void writer_stop(struct writer *w);
uint32_t writer_read(struct writer *w, unsigned reg);
void writer_write(struct writer *w, unsigned reg, uint32_t value);
/* When it returns, the device does not write any more, and what it wrote is marked. */
void writer_pause(struct writer *w);
void writer_resume(struct writer *w);
void writer_save(struct writer *w, struct state *state);
int writer_load(struct writer *w, const struct state *state);

/* ---- vcpus.c ---- */

struct vmm;

struct vcpu {
    struct vmm *vmm;
    unsigned number;
    int fd;
    struct kvm_run *run;
    pthread_t thread;
    bool started;
};

struct vcpus {
    unsigned n;
    struct vcpu list[VMM_VCPUS_MAX];
    int fds[VMM_VCPUS_MAX];
    atomic_bool going; /* they shall run */
    pthread_mutex_t lock;
    pthread_cond_t changed;
    unsigned threads;
    unsigned standing; /* threads that wait, their vCPU's I/O completed */
    bool broken, end;
};

int vcpus_create(struct vmm *vmm);
/* vCPU 0 as a multiboot kernel expects it. */
int vcpus_set_entry(struct vmm *vmm, uint32_t entry, uint32_t info);
/* Their threads, which wait for vcpus_resume. */
int vcpus_start(struct vmm *vmm);
/* When it returns no vCPU is in KVM_RUN, and none has an exit that is not completed. */
void vcpus_pause(struct vmm *vmm);
/* -1 if the guest is broken. */
int vcpus_resume(struct vmm *vmm);
void vcpus_kick(struct vmm *vmm, unsigned number);
void vcpus_stop(struct vmm *vmm);

/* ---- cpu_state.c ---- */

/* The CPU that guests see: this host's. */
int cpu_set_cpuid(struct vmm *vmm, struct vcpu *vcpu);
/* vCPUs, interrupt controllers, timers and clocks; the guest stands. */
int cpu_save(struct vmm *vmm, struct state *state);
int cpu_load(struct vmm *vmm, const struct state *state);

/* ---- The machine ---- */

struct vmm {
    struct options options;
    int kvm_fd, vm_fd; /* -1 with VMMIG_TRACKING_TRACE, which needs no KVM */
    enum vmmig_tracking tracking;
    struct memory memory;
    struct vcpus vcpus;
    struct serial serial;
    struct writer writer;
    struct events events;
    struct vmmig_attach *attach;
    pthread_mutex_t lock; /* of `held`, and of pausing and resuming */
    bool held;            /* the guest is the agent's: waited for, loaded or paused, until `resume` or `release` */
};

#endif

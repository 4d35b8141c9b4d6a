/* SPDX-License-Identifier: Apache-2.0 */
/*
 * vmmig-attach: lets a VMM's guests be migrated by vmmig.
 *
 * KVM tells only the process that made a VM which pages of it were written. So a VMM links this
 * library, and vmmig's node agent, a process of its own, asks it over a Unix socket: it gets the
 * guest's memory as memfds, maps them, and reads and writes guest memory itself. The library has a
 * thread, which sleeps unless an agent is there; without one nothing is tracked and the guest is as
 * fast as ever.
 *
 * Calling sequence
 *
 *     vmmig_prepare_vm(vm_fd, VMMIG_TRACKING_AUTO, 0, &tracking, &error)   before the first vCPU
 *     ... KVM_SET_USER_MEMORY_REGION, memory from memfds made with MFD_ALLOW_SEALING;
 * KVM_CREATE_VCPU ... struct vmmig_config config = {VMMIG_CONFIG_SIZE};
 *     ... fill it: below, field by field ...
 *     vmmig_create(&config, &attach, &error)       the socket is there
 *     vmmig_set_slots(attach, slots, n, &error)    agents are answered from now on
 *     ... the vCPUs are set going: not by a VMM that waits for a guest, nor if `pause` was called
 * by then ...
 *
 *     each vCPU's thread, for ever:
 *         vmmig_vcpu_enter(attach, i)              sleeps for a while, when the guest is throttled
 *         ioctl(vcpu_fd, KVM_RUN, 0)
 *         if (vmmig_vcpu_exit(attach, i, reason))  the exit was the library's: run again
 *             continue;
 *         ... the VMM's own handling ...
 *
 *     whatever writes guest memory beside the vCPUs (devices, firmware loaders, vhost):
 *         memcpy(guest, data, n)
 *         vmmig_mark_dirty(attach, guest_address, n)    after the write, never before
 *
 *     vmmig_destroy(attach)
 *
 * A migration, as the VMM sees it: callbacks `pause`, `save`, then `quit`, or the agent kills the
 * process, since the guest runs elsewhere; or, when the migration is given up, `resume`. A VMM that
 * was started to take a guest in: `load`, then `resume`.
 *
 * Pause and resume belong to the agent from the moment that `pause` or `load` is called until
 * `resume` or `release` is called. In between the VMM must not run the guest for any reason of its
 * own, or two copies of it may run. `release` comes where `resume` would, for a guest that was
 * paused before it was moved: it stands still, and is the VMM's again.
 *
 * Threads. vmmig_vcpu_enter and vmmig_vcpu_exit are called by the thread of that vCPU,
 * vmmig_mark_dirty and vmmig_set_state by any, the rest by one thread at a time. Callbacks come
 * from threads of the library, each in a new one, in which all signals are blocked: a thread that a
 * callback makes has to unblock the signal of its kicks. They come one at a time, but for `resume`
 * and `release` after a timeout (below), and for `kick` and `log`, which may come beside any. They
 * come until vmmig_destroy returns: `pause` must return then, too, as soon as no vCPU is in
 * KVM_RUN, whatever ends them. A callback may call vmmig_mark_dirty and vmmig_set_state, nothing
 * else of the library.
 *
 * Devices that write guest memory by themselves, in the kernel or in another process (vhost,
 * vhost-user, VFIO), are not told when a harvest is due: the VMM has to mark what they write, soon
 * after they did, and the last of it in `pause`. Memory that the VMM gives back to the host (a
 * balloon, free page reporting, MADV_REMOVE, a hole that is punched) changes without a vCPU's
 * write: it is to be marked like a write of zeros.
 *
 * The dirty log of the slots that it was told of is the library's. A VMM that calls
 * KVM_GET_DIRTY_LOG, KVM_CLEAR_DIRTY_LOG or KVM_RESET_DIRTY_RINGS for one of them, for its display,
 * say, takes away what the library would have found: those pages are lost. So it is with
 * KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, which vmmig_prepare_vm enables, or not, by itself.
 *
 * Errors. Functions return 0, or -1 and fill *error (if it is not NULL): an errno value and one
 * line of text. Callbacks return 0 or a negative errno value; the agent shows it and gives the
 * migration up, the guest runs on. A callback that does not return within VMMIG_CALLBACK_SECONDS is
 * reported likewise. It is left alone: its thread goes on, and `resume` or `release` may be called
 * while it is still under way. A `pause` of a guest that ran, if it fails, or when it comes back so
 * late, is taken back by `resume`; a `save` that comes back late is ignored. A `release` that
 * failed is called again.
 *
 * An agent that dies leaves the VMM as it is: tracking and throttling end; a guest that the agent
 * had paused stays paused, since the agent's journal knows whether it runs elsewhere by now. The
 * next agent resumes or kills it.
 *
 * Units: bytes and guest physical addresses. Guest pages are 4 KiB whatever the memory behind them.
 *
 * Security. The socket is made with mode 0600; a peer must be root, the VMM's own user, or
 * config.agent_uid. What an agent sends is checked. The library seals the memfds against shrinking
 * (F_SEAL_SHRINK).
 */
#ifndef VMMIG_ATTACH_H
#define VMMIG_ATTACH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define VMMIG_PUBLIC __attribute__((visibility("default")))
#else
#define VMMIG_PUBLIC
#endif

#define VMMIG_NAME_MAX 64      /* with the NUL */
#define VMMIG_SLOTS_MAX 32
#define VMMIG_VCPUS_MAX 256
#define VMMIG_CALLBACK_SECONDS 10
#define VMMIG_STATE_MAX (256u << 20) /* bytes that `save` may write */

struct vmmig_attach;

struct vmmig_error {
    int code; /* errno value */
    char text[256];
};

/* How written pages are found. */
enum vmmig_tracking {
    VMMIG_TRACKING_AUTO = 0,   /* the best that this host's KVM offers: BITMAP, else PLAIN */
    VMMIG_TRACKING_BITMAP = 1, /* dirty bitmap with manual protect, Linux 5.7 */
    VMMIG_TRACKING_RING = 2,   /* dirty ring, Linux 5.11; pays for very large memory that is seldom written */
    VMMIG_TRACKING_PLAIN = 3,  /* dirty bitmap, any Linux */
    VMMIG_TRACKING_TRACE = 4,  /* replays config.trace_path, without KVM: to test a VMM's integration */
};

enum vmmig_run_state {
    VMMIG_RUNNING = 1,
    VMMIG_PAUSED = 2,
    VMMIG_INCOMING = 3, /* waits for a guest; nothing is loaded, and nobody but the agent writes its memory */
    VMMIG_BROKEN = 4,   /* will not run again: a triple fault, an internal error, powered off */
};

/*
 * A piece of guest memory, as registered with KVM_SET_USER_MEMORY_REGION, in KVM's first address space. Guests with SMM
 * cannot be moved: what they write by way of the second one is in another log.
 */
struct vmmig_slot {
    /* Both ends must agree on names, guest addresses, sizes and order. Letters, digits, '.', '_', '-'. */
    char name[VMMIG_NAME_MAX];
    uint32_t kvm_slot;      /* its number, at most 65535 */
    uint32_t kvm_flags;     /* without KVM_MEM_LOG_DIRTY_PAGES, which is the library's */
    uint64_t guest_address;
    uint64_t size;          /* a multiple of 4096 */
    void *host;             /* where this process has it mapped */
    int memfd;              /* what is mapped there, shared; stays the VMM's */
    uint64_t memfd_offset;
};

struct vmmig_callbacks {
    /*
     * Stop the vCPUs. When it returns 0: no vCPU is in KVM_RUN, exits that need KVM_RUN to be completed (I/O,
     * MMIO) are completed, no device writes guest memory any more, and all that was written is marked.
     * Fine if the guest stands already. If it fails after it has stopped some of that, `resume` follows, as after one
     * that did not; until `resume` has returned 0 the guest counts as paused.
     */
    int (*pause)(void *arg);
    /*
     * Let the vCPUs run, after `pause` or after `load`. Fine if they run already. It may fail only as long as
     * no vCPU has run: then the guest goes on in the VMM that it came from.
     */
    int (*resume)(void *arg);
    /*
     * Optional. The guest, which stands, is the VMM's again: after `pause` or `load`, instead of
     * `resume`. Whether it is to run is for the VMM to decide, as it was before; it may call
     * vmmig_set_state. If it fails the guest stays the agent's, which asks again.
     */
    int (*release)(void *arg);
    /*
     * Write everything but memory that makes up the guest (vCPUs, interrupt controllers, clocks, devices)
     * to fd, an empty file; the format is the VMM's own. The guest is paused. This may still write guest
     * memory, if that is marked. At most VMMIG_STATE_MAX bytes.
     */
    int (*save)(void *arg, int fd);
    /* Take the state that another VMM's `save` wrote. Guest memory is complete. The guest stays paused. */
    int (*load)(void *arg, int fd);
    /*
     * Make the vCPU leave KVM_RUN soon (a signal to its thread, and kvm_run.immediate_exit), and call
     * vmmig_vcpu_exit. Called from any of the library's threads; must not block.
     */
    void (*kick)(void *arg, unsigned vcpu);
    /* Optional: the guest runs elsewhere. Have the process end, soon after this returned. */
    int (*quit)(void *arg);
    /* Optional: a line for the VMM's log. */
    void (*log)(void *arg, const char *text);
};

struct vmmig_config {
    size_t size;                 /* VMMIG_CONFIG_SIZE */
    /*
     * Where agents connect; at most 107 bytes. A dead socket there is replaced. Or "fd:N": a socket that this
     * process inherited, bound by whoever started it; an agent that starts a VMM names it so, since it may not
     * write into the agent's folder. Take the text as it is given.
     */
    const char *socket_path;
    const char *vmm;             /* "myvmm 1.2": shown to users */
    /*
     * Two VMMs exchange guests if this text is equal: the state's format, the machine (number and model of
     * vCPUs, devices). "myvmm/3 cpus=4 net=virtio". At most 255 bytes.
     */
    const char *machine;
    /*
     * At first: VMMIG_RUNNING if the VMM is about to set the guest going, VMMIG_INCOMING if it
     * waits for one. An agent may pause a guest before it ever ran: of one that is RUNNING it knows
     * that it is to go on at the end, and says `resume`. VMMIG_PAUSED, which 0 means too: the VMM's
     * user is to set it going, by vmmig_set_state.
     */
    enum vmmig_run_state state;
    enum vmmig_tracking tracking; /* as vmmig_prepare_vm said */
    unsigned ring_entries;       /* as given to it */
    const char *trace_path;      /* for VMMIG_TRACKING_TRACE */
    const char *record_path;     /* write a recording of each tracking there; NULL: do not */
    int vm_fd;                   /* -1 for VMMIG_TRACKING_TRACE */
    const int *vcpu_fds;         /* of vCPU 0, 1, ...; copied. None may be added later */
    unsigned n_vcpus;
    uid_t agent_uid;             /* one more user whose agent may connect; (uid_t)-1: nobody */
    unsigned callback_timeout_ms; /* instead of VMMIG_CALLBACK_SECONDS, if shorter; 0: that */
    /*
     * Command line, ended by NULL, of a VMM that would wait for this guest on any host, VMMIG_SOCKET_WORD standing
     * where its socket's path belongs; argv[0] a path. Copied. NULL: a destination must be started by hand, and the
     * guest cannot be snapshotted. Where the name of the VM belongs, by which vmmig knows it, VMMIG_NAME_WORD may
     * stand: a VM that is restored under another name, or cloned, then has sockets and files of its own.
     */
    const char *const *incoming_argv;
    struct vmmig_callbacks callbacks;
    void *arg;                   /* of all callbacks */
    /*
     * Templates: while the VMM waits for a guest, the library may put a private mapping of a
     * template's file in place of the memory at `host` of a slot, the file descriptor of which the
     * VMM then has no use for. So a clone begins at once, and shares with others what it does not
     * write. Only for a VMM that reaches guest memory through `host` alone: not for one whose
     * memfds others map (vhost-user), or that has huge pages. An agent that moves or snapshots such
     * a guest reads its memory out of this process, for which it has to be root, or may trace it.
     */
    bool takes_files;
    uint64_t state_bytes;        /* about how many `save` writes: they are part of the predicted pause. 0: few */
};

#define VMMIG_CONFIG_SIZE sizeof(struct vmmig_config)
#define VMMIG_SOCKET_WORD "@socket@"
#define VMMIG_NAME_WORD "@name@"
#define VMMIG_SOCKET_FD "fd:"

/*
 * Choose how to track (want: AUTO, or one by force) and switch on in the VM what that needs. ring_entries: per
 * vCPU, a power of two from 1024; 0: 16384. Once per VM, before its first vCPU is made.
 */
VMMIG_PUBLIC int vmmig_prepare_vm(int vm_fd, enum vmmig_tracking want, unsigned ring_entries,
                                  enum vmmig_tracking *ret_tracking, struct vmmig_error *error);

/*
 * Everything in config is copied. Memory is none until told otherwise; agents that connect wait until the first call
 * of vmmig_set_slots, however that ends.
 */
VMMIG_PUBLIC int vmmig_create(const struct vmmig_config *config, struct vmmig_attach **ret_attach,
                              struct vmmig_error *error);
/*
 * End the library's threads, remove the socket. Waits for a callback that is under way; none comes later. vCPUs must
 * have left vmmig_vcpu_enter for good. NULL is fine.
 */
VMMIG_PUBLIC void vmmig_destroy(struct vmmig_attach *attach);

/*
 * All of the guest's memory, now. What is not told is neither copied nor tracked: what else the
 * guest has in memory slots of KVM without a memfd (ROMs that it can write, flash, a display's
 * memory) belongs into `save`.
 *
 * May be called again: before KVM is told that memory goes, without that slot; after KVM was told
 * that memory came; for memory that moves, both. The order matters: to end tracking the library
 * tells KVM each slot that it knows of once more, and KVM would make a slot anew that is there no
 * more. A migration that is under way is given up, at either end, since what it knows is void.
 *
 * Slots that overlap, in the guest or in a memfd, are refused, as are those of KVM's second address
 * space, and a memfd that is too short, cannot be sealed, or is not what is mapped, shared, at
 * `host`; until the next call the guest has no memory that could be migrated then.
 */
VMMIG_PUBLIC int vmmig_set_slots(struct vmmig_attach *attach, const struct vmmig_slot *slots,
                                 unsigned n, struct vmmig_error *error);

/*
 * What the guest does, when it changes by anything but a callback. detail: the VMM's own word for
 * it, or NULL. While the agent has the guest paused only VMMIG_BROKEN is taken, and all else is
 * ignored without a word: a VMM that keeps to the rule about `pause` and `load` above knows it. A
 * guest that is BROKEN is not moved; a migration that is under way ends.
 */
VMMIG_PUBLIC void vmmig_set_state(struct vmmig_attach *attach, enum vmmig_run_state state,
                                  const char *detail);

/*
 * [guest_address, guest_address + size) was written by something else than a vCPU. Cheap when nothing is
 * tracked. Addresses outside the slots are ignored.
 */
VMMIG_PUBLIC void vmmig_mark_dirty(struct vmmig_attach *attach, uint64_t guest_address,
                                   uint64_t size);

/*
 * Before each KVM_RUN in which the guest may run: not one with immediate_exit, to complete I/O for
 * `pause`. Sleeps up to 100 ms at a time when the agent throttles the guest, and then leaves it a
 * part of the time, however late the thread wakes.
 */
VMMIG_PUBLIC void vmmig_vcpu_enter(struct vmmig_attach *attach, unsigned vcpu);
/* After each such KVM_RUN, with kvm_run.exit_reason (or UINT32_MAX after an error). True: call KVM_RUN again. */
VMMIG_PUBLIC bool vmmig_vcpu_exit(struct vmmig_attach *attach, unsigned vcpu, uint32_t exit_reason);

/* "bitmap", "ring" ...; NULL if there is none of that number. */
VMMIG_PUBLIC const char *vmmig_tracking_name(enum vmmig_tracking tracking);
/* -1 if the name is of none. */
VMMIG_PUBLIC int vmmig_tracking_parse(const char *name, enum vmmig_tracking *ret_tracking);

#ifdef __cplusplus
}
#endif

#endif

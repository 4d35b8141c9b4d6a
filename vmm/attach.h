/* SPDX-License-Identifier: Apache-2.0 */
/*
 * attach: the driver of vmm/guest.h for VMMs that link libvmmig-attach (dirtylog/vmmig-attach.h). Guest memory is
 * mapped here, at both ends: pages are read out of it and written into it without a relay. That of a clone, which is
 * private to its VMM, is read out of the VMM's process instead.
 *
 *     attach_connect("/run/web2.vmm", 5000, &err)         adopt a VMM that runs
 *     attach_define(a, &definition, &err)                  what a destination must be
 *     attach_sink_connect(definition, path, 5000, &err)    adopt one that waits for the guest
 *     attach_spawn(&launch, &err)                          start one
 *     attach_sink_spawn(definition, &launch, &err)         start one that waits for the guest
 *     attach_guest(a)                                      what the engines use
 *
 * What the calls of guest.h do here, beyond what is said there:
 *
 * source  One thread. Round 1 is all memory, what its memfds have no pages for coming as zero pages. Each
 *         round: the VMM reads the dirty log into a bitmap that it shares (HARVEST); then piece by piece
 *         of ATTACH_PIECE bytes the VMM protects these pages anew (CLEAR), and only after that their addresses go
 *         out, so that whoever copies them copies what the log has not seen yet. The next round begins when they have
 *         arrived (events->settle), and 5 ms after this one at the earliest. When the engine has paused the guest:
 *         what is left, then the device state is saved, then one more harvest (saving may write memory), then
 *         memory_done, the state as bytes, done. Pages point into the guest's memory (ops->mapped_source), a clone's
 *         into a copy of 1 MiB for each batch under way. To read a page that a clone has not touched waits for the
 *         mount: a copy that waits can be stopped at any time, and ends with TIMEOUT after 60 s (vmm/attach_reader.h).
 *         Throttling, of a guest that writes too fast for its downtime limit: vmm/attach_steering.h.
 *         After a complete copy tracking stays on, since ending it is dear for a large guest and the VMM is about
 *         to be killed; `resume` ends it.
 * sink    INCOMING: memory is mapped for writing; bytes gather in a file that sink_finish has the VMM load.
 * resume  REFUSED when the guest is not loaded or broken; TIMEOUT when a callback of the VMM hangs.
 * status  POSTMIGRATE is never said: such a guest is PAUSED.
 * announce Nothing: guests of such VMMs announce themselves through their devices.
 *
 * spawn   The agent binds the socket and hands it to the VMM, whose command line names it as "fd:N" where
 *         VMMIG_SOCKET_WORD stood (dirtylog/vmmig-attach.h): a VMM without privileges need not write into the agent's
 *         folder, and a restarted agent finds it by the path. A VMM that ends before it listens is VMM_DIED with the
 *         last line of its log; one that goes on in another process is REFUSED and ended. A failed spawn leaves
 *         no process and no socket.
 *
 * A region is a memory slot, in the VMM's order. What the VMM tells is checked: memfds must be long enough and sealed
 * against shrinking, so that no later access faults; a process whose memory is read must be its socket's user's
 * still. Memory is read through its file, which leaves holes as they are, and a destination's is written so that a VMM
 * which punches holes into its huge pages while none is left gets an error, and the agent no signal.
 *
 * Errors: VMM_DIED when the process ended; UNREACHABLE when only the connection did (the next call connects anew,
 * unless a copy was under way, which has failed then). Callbacks of the VMM that fail, and slots that change, come
 * with the library's own words and kind. Memory: two bits per page of the guest, whose slots may be ATTACH_OVERCOMMIT
 * times the host's memory together: at most a thousandth of that.
 */
#ifndef VMMIG_VMM_ATTACH_H
#define VMMIG_VMM_ATTACH_H

#include "base/cleanup.h"
#include "base/error.h"
#include "vmm/guest.h"
#include "vmm/qemu_definition.h"
#include "vmm/spawn.h"

#include <stdbool.h>
#include <stdint.h>

#define ATTACH_PIECE (32u << 20)
#define ATTACH_OVERCOMMIT 16

/* binary of a definition whose VMM does not say how a destination is started. */
#define ATTACH_NO_BINARY "none"

struct attach;

struct attach_info {
    char *vmm;      /* "myvmm 1.2" */
    char *machine;  /* equal at both ends */
    char *tracking; /* "bitmap", "ring" ... */
    unsigned n_vcpus;
    bool populates;   /* its library gets memory when it is asked to */
    char **incoming_argv; /* ended by NULL; empty: destinations are started by hand */
    bool takes_files;     /* its guest's memory can be a template's */
    uint64_t state_bytes; /* about that many of device state; 0: few */
}; /* constant as long as the handle lives */

/*
 * Adopt the VMM behind a socket. REFUSED with sys_errno EPROTOTYPE if what listens there is no such VMM (a QEMU,
 * for example).
 */
struct attach *attach_connect(const char *path, int timeout_ms, struct vm_error **err);
/* Closes the connection; the VMM runs on, nothing tracked. */
void attach_destroy(struct attach *a);
DEFINE_CLEANUP(attach, struct attach *, attach_destroy)

struct guest *attach_guest(struct attach *a);
/* The driver's own handle behind a guest; NULL if it is another driver's. */
struct attach *attach_from_guest(struct guest *g);
const struct attach_info *attach_info(const struct attach *a);

/* By whose doing does the guest stand? */
enum attach_stands {
    ATTACH_STANDS_NOT,
    ATTACH_STANDS_VMMS,     /* its VMM's, or that one's user's; no agent has it */
    ATTACH_STANDS_PAUSED,   /* an agent's, which paused it while it ran */
    ATTACH_STANDS_BORROWED, /* an agent's, which paused it when its VMM had it stand */
    ATTACH_STANDS_LOADED,   /* an agent's, which had it loaded; or the library is too old to say more */
};
int attach_query_stands(struct attach *a, enum attach_stands *ret_stands, struct vm_error **err);
/* A guest that an agent has, and left so, goes on, or is its VMM's again if that had it stand.
 * Nothing if there is none. */
int attach_let_go(struct attach *a, struct vm_error **err);
/*
 * The copy that guest_source_stop left complete is not the last thing that the guest is needed for: tracking
 * ends, and its memory is unmapped. guest_resume does it, too.
 */
void attach_end_copy(struct attach *a);
/* When the VMM last said that the guest goes on; what guest_resume does after that is no pause. Monotonic; 0: never. */
int64_t attach_resumed_ns(struct attach *a);

/*
 * The guest as a definition that can travel: accel "attach", machine as the VMM says, argv its incoming_argv (or its
 * name alone, and binary ATTACH_NO_BINARY), ram its slots, no disks, NICs or devices. qemu_definition_finish it.
 */
int attach_define(struct attach *a, struct qemu_definition *ret_definition, struct vm_error **err);
/* Does this definition describe such a guest (and not one of QEMU's)? */
bool attach_is_definition(const struct qemu_definition *d);

/*
 * Adopt a VMM that was started to take the guest of the definition in. REFUSED by name if it does not wait, or is
 * another machine, or a QEMU.
 */
struct attach *attach_sink_connect(const struct qemu_definition *definition, const char *path,
                                   int timeout_ms, struct vm_error **err);
/* The guest runs: unmap its memory. Nobody may be in, or come to, a call of the sink. */
void attach_sink_release(struct attach *a);

struct attach_launch {
    struct spawn_params spawn; /* fds: none. argv has VMMIG_SOCKET_WORD, as a word or within one */
    const char *socket_path;   /* at most 107 bytes */
    const char *name;          /* of the VM: stands where VMMIG_NAME_WORD stood */
    int timeout_ms;            /* until it answers; 0: 30 s */
};

struct attach *attach_spawn(const struct attach_launch *launch, struct vm_error **err);
/* With the definition's command line: launch->spawn.argv and cwd do not matter. Checked as by attach_sink_connect. */
struct attach *attach_sink_spawn(const struct qemu_definition *definition,
                                 const struct attach_launch *launch, struct vm_error **err);

#endif

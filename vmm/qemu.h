/* SPDX-License-Identifier: Apache-2.0 */
/*
 * qemu: the driver of vmm/guest.h for QEMU 7.2 or later, unmodified, under KVM or TCG.
 *
 *     qemu_attach("/run/web1.qmp", 5000, &err)         adopt a QEMU that runs
 *     qemu_spawn(&launch, &err)                        start one
 *     qemu_sink_spawn(&params, &err)                   start one that waits for a guest     (below)
 *     qemu_sink_attach(definition, path, 5000, &err)   adopt one that was prepared for a guest
 *     qemu_guest(q)                                    what the engines use
 *
 * What the calls of guest.h do here, beyond what is said there:
 *
 * pause   `stop`. After it QEMU never starts the guest by itself, whatever becomes of a migration.
 * A bandwidth limit of a running migration is lifted first: it must not lengthen the pause. resume
 * `cont`, then the run state is read. REFUSED means that surely no vCPU ran; after TIMEOUT nobody
 *         knows, and guest_status has to be asked again. A guest that is still INCOMING is refused,
 *         since QEMU would remember the `cont` and run at the end of loading.
 * source  Every capability of QEMU's migration is turned off but `events` and `auto-converge`, TLS
 * too (the stream is local); all that is set is set back afterwards (vmm/qemu_settings.h).
 * downtime-limit is 1 ms: with 0 QEMU 7.2 would never look at the dirty log again before the pause.
 * So an idle guest may be paused by QEMU itself at the very end. `done` succeeds only at an end of
 * file with migration status `completed` and run state `postmigrate`. While QEMU writes device
 * state into a stream that nobody drains it answers nothing: progress and status may say TIMEOUT
 * then. sink    Capability `late-block-activate`; `stop` while inmigrate, so that loading never
 * starts the guest. sink_regions has the regions in the order of the definition. `-incoming` begins
 * with the first byte. When QEMU rejects what it loads it ends: VMM_DIED with the last line of its
 * log.
 *
 * Charging. A page of guest memory is charged to the cgroup of whose mapping is touched first.
 * Pages that the agent writes through `base` or `file` would be the agent's. qemu_sink_populate has
 * the kernel fault them in through QEMU's own mapping (process_vm_readv), so that they are QEMU's;
 * the engine calls it for pages that it is about to write, also after it made a hole where they
 * were. Pages of hugetlb are not charged to memory cgroups at all.
 *
 * Ownership: guest_unref(qemu_guest(q)) closes the connection and unmaps; QEMU runs on. Memfds of a
 * sink are QEMU's and the mapping's; the agent holds no descriptor of them.
 */
#ifndef VMMIG_VMM_QEMU_H
#define VMMIG_VMM_QEMU_H

#include "base/cleanup.h"
#include "base/error.h"
#include "vmm/guest.h"
#include "vmm/qemu_definition.h"
#include "vmm/qemu_portable.h"
#include "vmm/qemu_spawn.h"
#include "vmm/qmp.h"

struct qemu;

/*
 * Adopt the QEMU behind a QMP socket. Which process it is comes from the socket, and is proved by finding
 * a descriptor, sent through QMP, open in that process; a relay in between is refused. It may live in
 * other mount and network namespaces, not in a pid namespace that this one cannot see.
 */
struct qemu *qemu_attach(const char *qmp_path, int timeout_ms, struct vm_error **err);
/* Start a QEMU and wait until QMP answers. When it fails nothing is left. */
struct qemu *qemu_spawn(const struct qemu_launch *launch, struct vm_error **err);
void qemu_destroy(struct qemu *q);
DEFINE_CLEANUP(qemu, struct qemu *, qemu_destroy)

struct guest *qemu_guest(struct qemu *q);
/* The driver's own handle behind a guest; NULL if the guest is not QEMU's. */
struct qemu *qemu_from_guest(struct guest *g);
/* For vmm/ itself, and for tests: the QMP connection. */
struct qmp *qemu_qmp(struct qemu *q);

/* The sink. */

struct qemu_sink_params {
    const char *vm; /* name of the VM; memory is called vmmig-VM-BLOCK in /proc/PID/maps */
    const struct qemu_definition *definition; /* validated by qemu_definition_validate */
    /*
     * How to start it. argv is made from the definition's (qemu_argv_destination) and fds are the
     * memory's: both are ignored here. cwd NULL: that of the definition.
     */
    struct qemu_launch launch;
    const struct qemu_name_map *maps; /* names of taps and bridges on this host */
    unsigned n_maps;
};

/*
 * A QEMU that waits for the guest of the definition, paused, its memory within reach; what it has (devices,
 * memory, CPUs, machine) is compared with the definition before this returns (qemu_verify).
 */
struct qemu *qemu_sink_spawn(const struct qemu_sink_params *params, struct vm_error **err);
/* One of that definition that starts anew, and stands before its first instruction; compared likewise. */
struct qemu *qemu_boot_spawn(const struct qemu_sink_params *params, struct vm_error **err);
/*
 * A QEMU that somebody else prepared for this guest, with -incoming defer; REFUSED by name in any other
 * state, or if it is not the same machine. Its memory is not mapped.
 */
struct qemu *qemu_sink_attach(const struct qemu_definition *definition, const char *qmp_path,
                              int timeout_ms, struct vm_error **err);
/*
 * The guest runs, and nothing will be written into its memory from here any more: unmap it, so that
 * it is the VMM's alone and ends with it. Nobody may be in, or come to, a call of the sink.
 */
void qemu_sink_release(struct qemu *q);
/*
 * Have the pages at `addrs` (vmm/page_batch.h; of mapped regions) present, charged to QEMU, before
 * they are written. Pages that are present already stay as they are, at about a tenth of the cost.
 * Any thread. 0, or VMM_DIED, or SYSTEM when the kernel refuses (then they are charged to the
 * agent; writing them is possible nevertheless).
 */
int qemu_sink_populate(struct qemu *q, const uint64_t *addrs, unsigned n, struct vm_error **err);

#endif

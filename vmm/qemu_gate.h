/* SPDX-License-Identifier: Apache-2.0 */
/*
 * qemu_gate: holds QEMU's migration at its very first byte, while the guest runs.
 *
 *     qemu_gate_close(&gate, qemus, &err)      the stream's socket is full before QEMU gets it
 *     ... QMP migrate ...
 *     qemu_gate_wait(&gate, pid, deadline)     QEMU's thread stands at the gate
 *     ... pause the guest, do what has to be done in the same instant ...
 *     qemu_gate_open(&gate)                    and read: first come gate.filler bytes that are not QEMU's
 *
 * Why. Before a background snapshot QEMU touches every page of the guest's memory, tens of ms per GiB, then writes the
 * head of its stream, and only then pauses the guest and protects the memory. We have to pause the guest before, since
 * its disks are to be of the same instant: a QEMU that begins in that pause lengthens it by all of its preparation. So
 * it begins earlier, and finds no room for the head of its stream until we make some.
 *
 * QEMU 7.2 to 8.1 hold no lock there, and answer on their monitor; later ones would not (qemu_gate_fits).
 * Threads: one.
 */
#ifndef VMMIG_VMM_QEMU_GATE_H
#define VMMIG_VMM_QEMU_GATE_H

#include "base/error.h"
#include "vmm/qmp.h"

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

struct qemu_gate {
    int fd;          /* a copy of QEMU's end; -1: there is no gate */
    uint64_t filler; /* bytes that come before QEMU's */
    int room;        /* SO_SNDBUF when it is open */
};

#define QEMU_GATE_NONE ((struct qemu_gate){.fd = -1})

bool qemu_gate_fits(const struct qmp_version *version);
int qemu_gate_close(struct qemu_gate *gate, int qemus, struct vm_error **err);
/* False: not by the deadline; what it does meanwhile is not lost. */
bool qemu_gate_wait(const struct qemu_gate *gate, pid_t pid, int64_t deadline_ns);
/* Also for a gate that there is not. */
void qemu_gate_open(struct qemu_gate *gate);

#endif

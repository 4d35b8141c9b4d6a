/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The work of the bare guest: it fills its memory, rewrites a part of it at a set rate, checks all
 * of it round and round, and tells on its console what it found. A page that a migration lost,
 * brought in an old version or mixed from two is seen from inside.
 *
 * Options, in the command line, separated by spaces (others are ignored):
 *
 *     vcpus=N            vCPUs to use, all of the machine's (default 1)
 *     dirty=MIB          working set of all vCPUs together (default 64)
 *     rate=MBPS          how much of it is rewritten per second, 10^6 bytes (default 20; 0: none)
 *     scan=MBPS          how much memory is checked per second besides (default 200; 0: none)
 *     fill=zero          base pages are zero and never touched;
 *     fill=text          they compress, by LZ4 to about a third (the default);
 *     fill=random        they do not compress
 *     fill=half          half of them do
 *     pattern=seq        a rewrite changes six words of its page (the default);
 *     pattern=random     it changes all of them
 *     seed=N             of all contents (default 1)
 *     hb=MS              between heartbeats (default 20)
 *     extra=START+SIZE   more memory, not announced by the firmware, as of a DIMM; may repeat
 *     writer=PAGES       give vmmig-vmm's writer that many pages, and check what it writes (default 0)
 *     tsc_khz=N          instead of the platform's measurement
 *     idle=spin          burn the CPU rather than sleep
 *
 * Console output, a line each:
 *
 *     vmmig-guest ready mem=MIB worked=PAGES vcpus=N tsc_khz=N
 *     hb N TSC [cycles=N checked=N [written=N] errors=N] [gap=US]
 *         Heartbeat: running number, TSC in hexadecimal. Every tenth has the totals: complete
 *         rewrites of the working set (of the slowest vCPU), pages checked, pages that the writer has
 *         written, checks failed. gap= is
 *         for how long vCPU 0 stood still since the last heartbeat, by the TSC, if 1 ms or more.
 *     BAD page=ADDRESS expected=SEQ found=SEQ word=N
 *         A failed check: sequence numbers (0 in a base page; "none" without a valid header), and
 *         the first wrong word, 512 if it is the table of sequence numbers that is wrong. At most
 *         16 are printed, all are counted, and the page is put right.
 *     verified checked=N [written=N] errors=N
 *     added START SIZE
 *     PANIC ...
 *         The guest has stopped.
 *
 * Console input, a line each:
 *
 *     verify [MIB]       check all memory, or so much of each vCPU's, at full speed, then print "verified" with the
 *                        totals
 *     add START SIZE     take this memory in (0x...), as of a DIMM plugged now
 *     back MS            set the clock back, as a migration to a host with another TSC may
 *
 * The first megabytes, where the guest itself lies, are not checked.
 *
 * Time is the TSC. After a jump forward no more than 100 ms of work is made up for; after a jump
 * backward the pace is taken up from there.
 */
#ifndef VMMIG_BARE_WORKER_H
#define VMMIG_BARE_WORKER_H

#include "platform.h"

/* On vCPU 0: reads the options, starts the other vCPUs. */
void worker_boot(struct platform_machine *machine);

/* On each vCPU, for ever. */
_Noreturn void worker_run(unsigned vcpu);

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The bare guest's driver of vmmig-vmm's writer (tools/vmmig-vmm/vmm.h says what that is): it gives the device
 * memory, and checks that memory holds what the device says that it wrote.
 *
 * Pages in which the device may be writing at the moment are left for later. What is wrong is reported once
 * for each check, and put right by the device itself on its next way round.
 */
#ifndef VMMIG_BARE_WRITER_H
#define VMMIG_BARE_WRITER_H

#include <stdint.h>

#include "platform.h"

/* What is wrong with a page: its address, the sequence number that it should and that it does have. */
typedef void writer_report_fn(uint64_t address, uint64_t expected, uint64_t found, unsigned word);

/* Takes 1 + pages pages from the end of the last range. Panics if there is no such device, or no room. */
void writer_init(struct platform_machine *machine, uint64_t pages);

/* Checks some of the pages; all of them if asked to. Returns how many were wrong, and adds to *checked. */
uint64_t writer_check(bool all, writer_report_fn *report, uint64_t *checked);

/* How many pages the device has written. */
uint32_t writer_completed(void);

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/* holder_control: the socket at which an agent finds a holder again; for the holder alone. */
#ifndef VMMIG_SNAPSHOT_HOLDER_CONTROL_H
#define VMMIG_SNAPSHOT_HOLDER_CONTROL_H

#include "snapshot/holder.h"

int control_open(struct holder *h, struct vm_error **err);
void control_close(struct holder *h);
/* Files that are open, and leases held (may be NULL). */
unsigned control_count_open(const struct holder *h, unsigned *ret_leases);

#endif

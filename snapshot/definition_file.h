/* SPDX-License-Identifier: Apache-2.0 */
/*
 * definition_file: the VM's definition as a file of the image that is being written (docs/snapshot-format.md).
 */
#ifndef VMMIG_SNAPSHOT_DEFINITION_FILE_H
#define VMMIG_SNAPSHOT_DEFINITION_FILE_H

#include "repo/repo.h"
#include "snapshot/gather.h"
#include "vmm/qemu_json.h"

int definition_file_store(const struct qemu_json *vm, struct image_session *session, struct gather *gather,
                          struct vm_error **err);

#endif

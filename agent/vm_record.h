/* SPDX-License-Identifier: Apache-2.0 */
/*
 * vm_record: the files in which agent/vms.c remembers VMs. A file is the 8 bytes VM_RECORD_MAGIC,
 * the le64 XXH3 of what follows, and a message Vm of proto/record.proto.
 *
 * Reading: CORRUPT if anything about the file is not as written, also a name that is not the
 * file's. Writing and removing are durable when they return (base/io.h).
 */
#ifndef VMMIG_AGENT_VM_RECORD_H
#define VMMIG_AGENT_VM_RECORD_H

#include "agent/vms.h"

#define VM_RECORD_MAGIC "VMMIGVM1"
#define VM_RECORD_SUFFIX ".vm"
#define VM_RECORD_MAX (1u << 20)

int vm_record_write(const char *folder, const struct vm_definition *d, struct vm_error **err);
/*
 * Keep room on the disk for the record that this definition will have: vm_record_write then does
 * not fail because others filled the disk meanwhile. A file beside the record, which the write
 * turns into it; a crash leaves it to the next vm_record_read_all, which removes it.
 */
int vm_record_reserve(const char *folder, const struct vm_definition *d, struct vm_error **err);
/* The record will not be written after all. */
void vm_record_release(const char *folder, const char *name);
/* NOT_FOUND is not an error: nothing to remove. */
int vm_record_remove(const char *folder, const char *name, struct vm_error **err);
/*
 * Read all records of a folder: an allocated array, at most `max` (NO_SPACE beyond). Damaged ones
 * are logged and renamed; left-over temporary files are removed. vm_definition_finish each, free
 * the array.
 */
int vm_record_read_all(const char *folder, unsigned max, struct vm_definition **ret_list,
                       unsigned *ret_n, struct vm_error **err);
/* What the file of VM `name` holds: CORRUPT, or vm_definition_finish it. */
int vm_record_parse(const char *data, size_t len, const char *name, struct vm_definition *ret,
                    struct vm_error **err);

#endif

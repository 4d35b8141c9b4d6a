/* SPDX-License-Identifier: Apache-2.0 */
/*
 * restore: a VM from a snapshot, in steps between which the caller starts its VMM.
 *
 *     r = restore_open(repo, "web1@nightly", "restore web1", cancel_fd, &err)     lease, definition
 *     restore_name(r, "web1b", &err)                                   paths of its own, if that is
 * another name restore_place_disks(r, "web1b", "/srv/disks" or NULL, user, &err)     where they go;
 * CONFLICT if one is there restore_make_disks(r, note, arg, &err)                           empty
 * ones, each told as it is made restore_fill_disks(r, &control, &err) restore_give_disks(r, user,
 * &err)                                nobody but us had them until now guest = a VMM that waits
 * for the guest of restore_definition(r) restore_load(r, guest, &control, &err) memory and device
 * state; the guest stands guest_resume(guest, &err), restore_thaw(r, guest, &thawer, true, &err)
 *     restore_keep(r)                                                  the disks stay
 *     restore_close(r)                                                 always; without keep they
 * are removed
 *
 * What is read from the repository is verified there, and the definition is validated. Disks are
 * files or RADOS block images (snapshot/disk_file.h), wherever they were before. With a folder they
 * are called VM-diskN.FORMAT there; with "rbd:POOL[/NAMESPACE][:id=USER][:conf=FILE]" for a folder
 * they are images VM-diskN there. REFUSED by name: a disk that is neither. A lease keeps the
 * snapshot readable meanwhile, though it be deleted.
 *
 * Memory: 1 MiB, and what a file_reader takes. Threads: one.
 */
#ifndef VMMIG_SNAPSHOT_RESTORE_H
#define VMMIG_SNAPSHOT_RESTORE_H

#include "repo/repo.h"
#include "snapshot/frozen.h"
#include "vmm/guest.h"
#include "vmm/qemu_definition.h"

struct restore;

enum { RESTORE_REMOVE_S = 5 };

struct restore_control {
    int cancel_fd;
    /* `done` of `total` bytes of all files. Called often. */
    void (*progress)(void *arg, uint64_t done, uint64_t total);
    void *arg;
};

/* cancel_fd: a latch (base/io.h), or -1: what takes long ends then. */
struct restore *restore_open(struct repo *repo, const char *image, const char *holder, int cancel_fd,
                             struct vm_error **err);
/*
 * False: the lease, or an image in Ceph, could not be taken back; for images that is tried for
 * RESTORE_REMOVE_S. NULL is fine.
 */
bool restore_close(struct restore *r);
DEFINE_CLEANUP(restore, struct restore *, restore_close)

/* It has disks alone: fill them, then start a VMM that boots from them; there is nothing to load. */
bool restore_boots(const struct restore *r);
const struct qemu_definition *restore_definition(const struct restore *r);
/* File systems of the guest stand frozen when it goes on: they did so at the instant. */
bool restore_is_frozen(const struct restore *r);
/*
 * The guest is there, and `runs` or stands: see that its file systems are thawed, if they are frozen. 0 if
 * there is nothing to be done. An error is what its user should know, or do by hand.
 */
int restore_thaw(const struct restore *r, const struct guest *guest, const struct thawer *thawer, bool runs,
                 struct vm_error **err);
/*
 * The VM is called that. With another name than it had, the sockets that its QEMU makes, and the
 * files that it writes, are its own (vmm/qemu_own.h): the former VM may run beside it. What it
 * connects to stays.
 */
int restore_name(struct restore *r, const char *vm, struct vm_error **err);
/*
 * user: whom VMs run as; "" or NULL: us. REFUSED without a folder where that user may make nothing:
 * where a disk was is what the snapshot says.
 */
int restore_place_disks(struct restore *r, const char *vm, const char *folder, const char *user,
                        struct vm_error **err);
/*
 * A file that was just made: its path. Or an image in Ceph that is made now: its name and its id
 * (snapshot/rbd_image.h), which is RBD_IMAGE_ANY under the name at which it begins.
 */
typedef int restore_note(void *arg, const char *path, const char *image, struct vm_error **err);
/* Each is told to `note` before the next one is made, so that what a crash leaves is known. */
int restore_make_disks(struct restore *r, restore_note *note, void *arg, struct vm_error **err);
int restore_fill_disks(struct restore *r, const struct restore_control *c, struct vm_error **err);
int restore_give_disks(const struct restore *r, const char *user, struct vm_error **err);
int restore_load(struct restore *r, struct guest *guest, const struct restore_control *c,
                 struct vm_error **err);
void restore_keep(struct restore *r);

#endif

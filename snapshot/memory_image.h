/* SPDX-License-Identifier: Apache-2.0 */
/*
 * memory_image: the memory and device state of a guest, as its VMM gives them away, on their way into an image:
 * one file per memory block, and the bytes of device state aside until they are complete.
 *
 *     m = memory_image_create(&setup, &err)
 *     guest_source_start(guest, params with memory_image_regions(m), memory_image_events(), m, &err)
 *     memory_image_wait(m, deadline, cancel_fd, &err)     1: all of it is there, 0: not yet
 *     guest_source_stop(guest, &err)
 *     memory_image_store_pages(m, cancel_fd, &err)        setup.repeats: the guest may run on meanwhile
 *     memory_image_store_state(m, session, gather, &err)  the file device.state
 *     memory_image_destroy(m)                             after guest_source_stop
 *
 * Every page of every block has to come: FAILED otherwise. Memory: a bit per page, and 1 MiB if they
 * repeat. Device state lies in a file without a name. Threads: events in the driver's; the rest one.
 */
#ifndef VMMIG_SNAPSHOT_MEMORY_IMAGE_H
#define VMMIG_SNAPSHOT_MEMORY_IMAGE_H

#include "repo/repo.h"
#include "snapshot/gather.h"
#include "snapshot/guard.h"
#include "vmm/guest.h"
#include "vmm/qemu_json.h"

struct memory_image;

struct memory_image_setup {
    const struct qemu_json *vm;
    struct image_session *session;
    struct gather *gather;
    const char *scratch_dir;
    struct guard *guard; /* gets a copy of the stream; NULL if the guest's VMM has none */
    /* Pages come again when they were written: they are kept aside, in scratch_dir, until the last one came. */
    bool repeats;
};

struct memory_image *memory_image_create(const struct memory_image_setup *setup,
                                         struct vm_error **err);
void memory_image_destroy(struct memory_image *m);
DEFINE_CLEANUP(memory_image, struct memory_image *, memory_image_destroy)

const struct guest_source_events *memory_image_events(void);
const struct guest_region *memory_image_regions(const struct memory_image *m, unsigned *ret_n);
int memory_image_wait(struct memory_image *m, int64_t deadline_ns, int cancel_fd,
                      struct vm_error **err);
/* If pages repeat: all of them into the image, now that the last one came. */
int memory_image_store_pages(struct memory_image *m, int cancel_fd, struct vm_error **err);
int memory_image_store_state(struct memory_image *m, struct vm_error **err);
/* Bytes of memory, and those that came (counted once). Any thread. */
void memory_image_progress(struct memory_image *m, uint64_t *ret_done, uint64_t *ret_total);

#endif

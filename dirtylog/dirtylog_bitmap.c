/* SPDX-License-Identifier: Apache-2.0 */
/*
 * KVM's dirty bitmap, with and without manual protect.
 *
 * KVM_CLEAR_DIRTY_LOG protects the pages and empties the TLBs of all vCPUs before it returns. It touches only bits that
 * are set in both KVM's bitmap and ours, so one that was set after our harvest, and is not in ours, stays. Where the
 * processor keeps a list of written pages by itself (PML), an entry that reaches KVM's bitmap late finds its page
 * protected or makes it dirty once more: never the other way round, since the list is emptied at every exit, and
 * paused vCPUs have left the guest. Neither ioctl is cut short by signals.
 */
#include "dirtylog/dirtylog_driver.h"

#include <linux/kvm.h>
#include <sys/ioctl.h>

static int get(struct dirtylog *log, unsigned slot, uint64_t *bitmap, struct vm_error **err)
{
    struct kvm_dirty_log get = {.slot = log->slots[slot].id, .dirty_bitmap = bitmap};
    if (ioctl(log->params.vm_fd, KVM_GET_DIRTY_LOG, &get) == 0)
        return 0;
    return dirtylog_ioctl_failed(log, slot, "cannot read the dirty log", err);
}

static int clear(struct dirtylog *log, unsigned slot, uint64_t first, uint64_t n,
                 const uint64_t *bitmap, struct vm_error **err)
{
    struct kvm_clear_dirty_log clear = {
        .slot = log->slots[slot].id,
        .num_pages = (uint32_t)n,
        .first_page = first,
        .dirty_bitmap = (void *)(uintptr_t)(bitmap + first / 64),
    };
    if (ioctl(log->params.vm_fd, KVM_CLEAR_DIRTY_LOG, &clear) == 0)
        return 0;
    return dirtylog_ioctl_failed(log, slot, "cannot clear the dirty log", err);
}

/* A slot larger than the 16 TiB that fit num_pages is cleared in pieces by whoever asks for pieces. */
static int clear_pieces(struct dirtylog *log, unsigned slot, uint64_t first, uint64_t n,
                        const uint64_t *bitmap, struct vm_error **err)
{
    const uint64_t most = UINT32_MAX & ~(uint64_t)(DIRTYLOG_CLEAR_ALIGN - 1);
    for (uint64_t piece; n; first += piece, n -= piece) {
        piece = n < most ? n : most;
        if (clear(log, slot, first, piece, bitmap, err) < 0)
            return -1;
    }
    return 0;
}

const struct dirtylog_driver dirtylog_bitmap_driver = {
    .kind = DIRTYLOG_BITMAP, .uses_kvm = true, .harvest = get, .clear = clear_pieces};

/* Its harvest protects the pages that it reports: nothing is left to clear. */
const struct dirtylog_driver dirtylog_plain_driver = {
    .kind = DIRTYLOG_PLAIN, .uses_kvm = true, .harvest = get};

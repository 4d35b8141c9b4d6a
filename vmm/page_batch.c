/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/page_batch.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

/* How many pages from this one on lie side by side. */
static unsigned run_at(const struct page_batch *batch, unsigned first)
{
    unsigned n = 1;
    while (first + n < batch->n &&
           batch->pages[first + n].data == batch->pages[first].data + (size_t)n * GUEST_PAGE_SIZE)
        n++;
    return n;
}

static int read_pages(uint8_t *to, const struct page_batch *batch, const uint8_t *from, size_t size,
                      struct vm_error **err)
{
    uint64_t at = batch->file_offset + (uint64_t)(from - batch->file_start);
    for (size_t done = 0; done < size;) {
        ssize_t n = pread(batch->file, to + done, size - done, (off_t)(at + done));
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return error_errno(err, n ? errno : ENODATA, "cannot read the guest's memory");
        done += (size_t)n;
    }
    return 0;
}

int page_batch_copy(const struct page_batch *batch, uint8_t *room, struct vm_error **err)
{
    for (unsigned i = 0, run; i < batch->n; i += run) {
        const uint8_t *from = batch->pages[i].data;
        run = from ? run_at(batch, i) : 1;
        size_t size = (size_t)run * GUEST_PAGE_SIZE;
        uint8_t *to = room + (size_t)i * GUEST_PAGE_SIZE;
        if (from && batch->file && read_pages(to, batch, from, size, err) < 0)
            return -1;
        if (from && !batch->file)
            memcpy(to, from, size);
    }
    return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * page_decoder: encoded batches (migrate/page_format.h) into guest memory. One per channel.
 *
 *     CLEANUP(page_decoder) struct page_decoder *dec = page_decoder_create(&config, &err);
 *
 *     struct iovec iov[PAGE_DECODER_IOV_MAX];
 *     page_decoder_begin(dec, meta, meta_len, payload_len, iov, &n, &err);
 *     ... read payload_len bytes into iov ...
 *     page_decoder_commit(dec, &err);
 *     ... acknowledge ...
 *
 * begin validates meta completely; from then on nothing that the payload holds can make the decoder
 * write anywhere but into the pages named. commit checks that each unit yields exactly its pages.
 *
 * A connection that is cut. Between begin and commit the payload may stop at any byte. The next
 * begin forgets the batch under way: nothing of it has reached guest memory. What is not allowed is
 * to commit a batch twice (a delta applies to the page as it was before), or to let a cut batch go
 * and continue with another: the channel numbers batches, applies them in order, and drops those
 * below the number that it has committed. A commit that fails leaves the pages of that batch
 * undefined and the decoder unusable: the migration has failed.
 *
 * Writing. vmm/guest_memory.h says through what. Memory that runs out is NO_SPACE where the kernel says so.
 *
 * Zero pages. Reading a hole of a shared mapping (not of its file) allocates a page just as writing does. An encoder
 * that knows the memory to begin as zero does not name such pages. For the others: a run of
 * PAGE_DECODER_PUNCH_MIN pages or more is given back to the system with MADV_REMOVE if `may_punch`
 * (not for memory that was preallocated or locked; of huge pages never); what is left is compared,
 * and cleared only if need be.
 *
 * Guest memory must stay as it is while the decoder lives. Nobody else writes it meanwhile.
 *
 * Memory: PAGE_DECODER_MEMORY_MAX bytes, whatever arrives. Threads: one at a time per decoder; two
 * decoders may work on one guest at once, since their pages differ: a page of another channel's
 * stripe is refused. Errors: PROTOCOL for whatever the peer got wrong, NO_SPACE without memory.
 */
#ifndef VMMIG_MIGRATE_PAGE_DECODER_H
#define VMMIG_MIGRATE_PAGE_DECODER_H

#include "base/cleanup.h"
#include "base/error.h"
#include "migrate/page_format.h"
#include "vmm/guest.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#define PAGE_DECODER_IOV_MAX 1
#define PAGE_DECODER_PUNCH_MIN 16u
#define PAGE_DECODER_MEMORY_MAX (3ul << 20)

struct page_decoder;

struct page_decoder_config {
    /* Copied. A page of a region that cannot be reached is refused. */
    const struct guest_region *regions;
    unsigned n_regions;
    unsigned channel, n_channels;
    bool may_punch;
};

struct page_decoder_stats {
    struct {
        uint64_t pages;
        uint64_t bytes_in; /* payload */
    } kinds[PAGE_KIND_COUNT];
    uint64_t batches;
    int64_t cpu_ns; /* of begin and commit */
};

struct page_decoder *page_decoder_create(const struct page_decoder_config *config,
                                         struct vm_error **err);
void page_decoder_destroy(struct page_decoder *dec);
DEFINE_CLEANUP(page_decoder, struct page_decoder *, page_decoder_destroy)

/*
 * A new batch. ret_iov (PAGE_DECODER_IOV_MAX entries) says where its payload_len bytes go, in
 * order; valid until commit or the next begin. *ret_n may be 0 (only zero pages): then commit at
 * once. The meta is not needed any more after return.
 */
int page_decoder_begin(struct page_decoder *dec, const void *meta, size_t meta_len,
                       size_t payload_len, struct iovec *ret_iov, unsigned *ret_n,
                       struct vm_error **err);
/* The payload is complete: put everything in place. Once per begin. */
int page_decoder_commit(struct page_decoder *dec, struct vm_error **err);

const struct page_decoder_stats *page_decoder_stats(const struct page_decoder *dec);

#endif

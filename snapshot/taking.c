/* SPDX-License-Identifier: Apache-2.0 */
#include "snapshot/taking.h"

#include "base/clock.h"
#include "base/fault.h"
#include "base/io.h"
#include "snapshot/chain.h"
#include "snapshot/definition_file.h"

#include <string.h>

void taking_tell(struct taking *s, enum snapshot_phase phase)
{
    struct image_writer_stat stat = {0};
    s->progress.phase = phase;
    if (s->session)
        image_writer_stat(image_session_writer(s->session), &stat);
    if (s->memory)
        memory_image_progress(s->memory, &s->progress.memory_done, &s->progress.memory_total);
    s->progress.stored = stat.bytes_stored;
    if (s->p->progress)
        s->p->progress(s->p->arg, &s->progress);
}

int taking_begin(struct taking *s, const struct image *parent, struct vm_error **err)
{
    char image[IMAGE_NAME_MAX + 1];
    const char *name = *parent->name ? parent->name : NULL;
    if (snapshot_image_name(s->p->vm, s->p->name, image, err) < 0 ||
        !(s->session = image_session_begin(s->p->repo, image, name, err)) ||
        !(s->gather = gather_create(image_session_writer(s->session), err)))
        return -1;
    strcpy(s->report->image, image);
    strcpy(s->report->parent, parent->name);
    return 0;
}

int taking_start_memory(struct taking *s, bool background, struct vm_error **err)
{
    struct guest_source_params source = {.channels = 1, .background = background};
    source.regions = memory_image_regions(s->memory, &source.n_regions);
    if (guest_source_start(s->p->guest, &source, memory_image_events(), s->memory, err) < 0)
        return -1;
    s->sourcing = true;
    FAULT("snapshot.waiting");
    return 0;
}

int taking_stop_memory(struct taking *s, struct vm_error **err)
{
    if (!s->sourcing)
        return 0;
    s->sourcing = false;
    return guest_source_stop(s->p->guest, err);
}

void taking_date(struct taking *s)
{
    image_session_date(s->session, (uint64_t)(clock_wall_ns() / NSEC_PER_SEC));
}

int taking_commit(struct taking *s, struct vm_error **err)
{
    struct import_report written;
    taking_tell(s, SNAPSHOT_COMMITTING);
    if ((s->memory && memory_image_store_state(s->memory, err) < 0) ||
        definition_file_store(&s->vm, s->session, s->gather, err) < 0)
        return -1;
    gather_flush(s->gather);
    FAULT("snapshot.commit");
    if (io_latch_is_set(s->p->cancel_fd))
        return error_set(err, VM_ERROR_CANCELLED, "cancelled");
    if (image_session_commit(s->session, &written, err) < 0)
        return -1;
    FAULT("snapshot.committed");
    s->report->stored = written.written.bytes_stored;
    return 0;
}

void taking_finish(struct taking *s)
{
    memory_image_destroy(s->memory);
    gather_destroy(s->gather);
    image_session_end(s->session);
    qemu_json_finish(&s->vm);
}

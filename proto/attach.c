/* SPDX-License-Identifier: Apache-2.0 */
#include "proto/attach.h"

#include "proto/fields.h"
#include "proto/frame.h"
#include "proto/unpack.h"

#include <string.h>

static int out_of_range(const char *what, struct vm_error **err)
{
    return error_set(err, VM_ERROR_PROTOCOL, "%s is out of range", what);
}

bool attach_slot_name_is_valid(const char *name)
{
    static const char allowed[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-";
    size_t n = strnlen(name, ATTACH_SLOT_NAME_MAX + 1);
    return n >= 1 && n <= ATTACH_SLOT_NAME_MAX && strspn(name, allowed) == n;
}

static int check_hello(const Vmmig__Attach__Hello *m, struct vm_error **err)
{
    if (!m->version_min || m->version_min > m->version_max)
        return out_of_range("the range of versions", err);
    return field_check_text("the software's name", m->software, 0, ATTACH_WORD_MAX, err);
}

static int check_incoming(const Vmmig__Attach__Welcome *m, struct vm_error **err)
{
    size_t bytes = 0;
    if (m->n_incoming_argv > ATTACH_ARGC_MAX)
        return out_of_range("the number of arguments", err);
    for (size_t i = 0; i < m->n_incoming_argv; i++) {
        if (field_check_text("an argument", m->incoming_argv[i], 0, ATTACH_ARGV_BYTES, err) < 0)
            return -1;
        bytes += strlen(m->incoming_argv[i]) + 1;
    }
    return bytes > ATTACH_ARGV_BYTES ? out_of_range("the command line", err) : 0;
}

static int check_welcome(const Vmmig__Attach__Welcome *m, struct vm_error **err)
{
    if (m->version < ATTACH_VERSION_MIN || m->version > ATTACH_VERSION_MAX)
        return error_set(err, VM_ERROR_VERSION,
                         "the VMM speaks version %u of the attach protocol, this agent %d to %d",
                         m->version, ATTACH_VERSION_MIN, ATTACH_VERSION_MAX);
    if (m->pid <= 0 || !m->n_vcpus || m->n_vcpus > ATTACH_VCPUS_MAX)
        return out_of_range("the process or its vCPUs", err);
    if (m->state_bytes > ATTACH_STATE_BYTES_MAX)
        return out_of_range("the state's size", err);
    if (field_check_text("the VMM's name", m->vmm, 1, ATTACH_WORD_MAX, err) < 0 ||
        field_check_text("the machine", m->machine, 1, ATTACH_WORD_MAX, err) < 0 ||
        field_check_text("the tracking", m->tracking, 1, ATTACH_WORD_MAX, err) < 0)
        return -1;
    return check_incoming(m, err);
}

static int check_error(const Vmmig__Attach__Error *m, struct vm_error **err)
{
    if (field_check_text("the kind of error", m->kind, 1, ATTACH_WORD_MAX, err) < 0)
        return -1;
    return field_check_text("the error's message", m->message, 1, ATTACH_TEXT_MAX, err);
}

static int check_ok(const Vmmig__Attach__Ok *m, struct vm_error **err)
{
    (void)m;
    (void)err;
    return 0;
}

static int check_empty(const Vmmig__Attach__Empty *m, struct vm_error **err)
{
    (void)m;
    (void)err;
    return 0;
}

static int check_state(const Vmmig__Attach__State *m, struct vm_error **err)
{
    if (m->state < VMMIG__ATTACH__RUN_STATE__RUN_RUNNING ||
        m->state > VMMIG__ATTACH__RUN_STATE__RUN_BROKEN || m->throttle_percent > ATTACH_THROTTLE_MAX ||
        m->before > VMMIG__ATTACH__RUN_STATE__RUN_BROKEN)
        return out_of_range("the state", err);
    return field_check_text("the state's detail", m->detail, 0, ATTACH_WORD_MAX, err);
}

static int check_slot(const Vmmig__Attach__Slot *s, uint64_t bitmap_size, struct vm_error **err)
{
    if (!attach_slot_name_is_valid(s->name))
        return error_set(err, VM_ERROR_PROTOCOL, "a memory slot's name is malformed");
    if (!s->size || s->size % ATTACH_PAGE || s->size > ATTACH_SLOT_BYTES_MAX)
        return out_of_range("a memory slot's size", err);
    if (s->page_size < ATTACH_PAGE || s->page_size & (s->page_size - 1) || s->page_size > 1u << 30)
        return out_of_range("a memory slot's page size", err);
    if (s->memfd_offset % s->page_size || s->memfd_offset > UINT64_MAX / 4)
        return out_of_range("a memory slot's place in its memfd", err);
    if (s->private_at % ATTACH_PAGE || s->private_at > INT64_MAX - s->size)
        return out_of_range("a memory slot's place in its process", err);
    uint64_t bitmap = (s->size / ATTACH_PAGE + 63) / 64 * 8;
    if (s->bitmap_offset % 8 || s->bitmap_offset > bitmap_size ||
        bitmap > bitmap_size - s->bitmap_offset)
        return out_of_range("a memory slot's bitmap", err);
    return 0;
}

static int check_memory(const Vmmig__Attach__Memory *m, struct vm_error **err)
{
    if (!m->n_slots || m->n_slots > ATTACH_SLOTS_MAX)
        return out_of_range("the number of memory slots", err);
    if (!m->bitmap_size || m->bitmap_size > ATTACH_SLOTS_MAX * (ATTACH_SLOT_BYTES_MAX >> 15))
        return out_of_range("the dirty bitmap's size", err);
    for (size_t i = 0; i < m->n_slots; i++) {
        if (check_slot(m->slots[i], m->bitmap_size, err) < 0)
            return -1;
        for (size_t j = 0; j < i; j++)
            if (!strcmp(m->slots[i]->name, m->slots[j]->name))
                return error_set(err, VM_ERROR_PROTOCOL, "two memory slots are called %s",
                                 m->slots[i]->name);
    }
    return 0;
}

static int check_harvested(const Vmmig__Attach__Harvested *m, struct vm_error **err)
{
    (void)m; /* two counters; any value is one */
    (void)err;
    return 0;
}

static int check_clear(const Vmmig__Attach__Clear *m, struct vm_error **err)
{
    if (m->slot >= ATTACH_SLOTS_MAX || m->first % 64 || !m->pages ||
        m->first > ATTACH_SLOT_BYTES_MAX / ATTACH_PAGE || m->pages > ATTACH_SLOT_BYTES_MAX / ATTACH_PAGE)
        return out_of_range("the range to clear", err);
    return 0;
}

static int check_populate(const Vmmig__Attach__Populate *m, struct vm_error **err)
{
    if (!m->n_runs || m->n_runs > ATTACH_RUNS_MAX)
        return out_of_range("the number of runs", err);
    for (size_t i = 0; i < m->n_runs; i++)
        if (m->runs[i]->slot >= ATTACH_SLOTS_MAX || !m->runs[i]->pages ||
            m->runs[i]->first > ATTACH_SLOT_BYTES_MAX / ATTACH_PAGE ||
            m->runs[i]->pages > ATTACH_SLOT_BYTES_MAX / ATTACH_PAGE)
            return out_of_range("a run of pages", err);
    return 0;
}

static int check_throttle(const Vmmig__Attach__Throttle *m, struct vm_error **err)
{
    return m->percent > ATTACH_THROTTLE_MAX ? out_of_range("the throttling", err) : 0;
}

static int check_saved(const Vmmig__Attach__Saved *m, struct vm_error **err)
{
    return m->size > ATTACH_STATE_BYTES_MAX ? out_of_range("the state's size", err) : 0;
}

static int check_load(const Vmmig__Attach__Load *m, struct vm_error **err)
{
    return m->size > ATTACH_STATE_BYTES_MAX ? out_of_range("the state's size", err) : 0;
}

static int check_map_file(const Vmmig__Attach__MapFile *m, struct vm_error **err)
{
    return m->slot >= ATTACH_SLOTS_MAX ? out_of_range("the memory slot", err) : 0;
}

/* One table: a type, its descriptor, its check. */

#define X(id, member, Name)                                                                        \
    static int check_##id(const ProtobufCMessage *m, struct vm_error **err)                        \
    {                                                                                              \
        return check_##member((const Vmmig__Attach__##Name *)m, err);                              \
    }
ATTACH_MESSAGES(X)
#undef X

static const struct kind {
    unsigned type;
    const char *name;
    const ProtobufCMessageDescriptor *descriptor;
    int (*check)(const ProtobufCMessage *m, struct vm_error **err);
} kinds[] = {
#define X(id, member, Name)                                                                        \
    {VMMIG__ATTACH__TYPE__##id, #id, &vmmig__attach__##member##__descriptor, check_##id},
    ATTACH_MESSAGES(X)
#undef X
};

static const struct kind *find_kind(unsigned type)
{
    for (size_t i = 0; i < sizeof(kinds) / sizeof(*kinds); i++)
        if (kinds[i].type == type)
            return &kinds[i];
    return NULL;
}

const char *attach_type_name(unsigned type)
{
    const struct kind *k = find_kind(type);
    return k ? k->name : "?";
}

static int unknown(unsigned type, struct vm_error **err)
{
    return error_set(err, VM_ERROR_VERSION, "the attach protocol has no message %u here", type);
}

int attach_pack(unsigned type, const ProtobufCMessage *message, struct buffer *out,
                struct vm_error **err)
{
    const struct kind *k = find_kind(type);
    if (!k)
        return unknown(type, err);
    if (!message)
        return frame_put(out, (uint16_t)type, NULL, 0, err);
    cleanup_error struct vm_error *wrong = NULL;
    if (k->check(message, &wrong) < 0)
        return error_set(err, VM_ERROR_USAGE, "message %s: %s", k->name, error_message(wrong));
    if (protobuf_c_message_get_packed_size(message) > ATTACH_PACKET_MAX - FRAME_HEADER_SIZE)
        return error_set(err, VM_ERROR_USAGE, "message %s is too long", k->name);
    return frame_put_message(out, (uint16_t)type, message, err);
}

static int unpack_frame(const struct frame *frame, struct attach_message *ret_message,
                        struct vm_error **err)
{
    const struct kind *k = find_kind(frame->type);
    if (!k)
        return unknown(frame->type, err);
    ProtobufCMessage *m = unpack_message(k->descriptor, frame->data, frame->len);
    if (!m)
        return error_set(err, VM_ERROR_PROTOCOL, "message %s is malformed", k->name);
    if (k->check(m, err) < 0) {
        protobuf_c_message_free_unpacked(m, NULL);
        return error_wrap(err, "message %s", k->name);
    }
    ret_message->type = (Vmmig__Attach__Type)frame->type;
    ret_message->any = m;
    return 0;
}

int attach_unpack(const void *packet, size_t len, struct attach_message *ret_message,
                  struct vm_error **err)
{
    cleanup_frame_decoder struct frame_decoder decoder = {0};
    struct cursor in = cursor_init(packet, len);
    struct frame frame;
    int r = frame_decode(&decoder, &in, &frame, err);
    if (r < 0)
        return -1;
    if (!r || cursor_left(&in))
        return error_set(err, VM_ERROR_PROTOCOL, "a packet is not exactly one message");
    return unpack_frame(&frame, ret_message, err);
}

void attach_message_finish(struct attach_message *m)
{
    if (m->any)
        protobuf_c_message_free_unpacked(m->any, NULL);
    *m = (struct attach_message){0};
}

unsigned attach_version_choose(const Vmmig__Attach__Hello *hello)
{
    unsigned version =
        hello->version_max < ATTACH_VERSION_MAX ? hello->version_max : ATTACH_VERSION_MAX;
    return version >= hello->version_min && version >= ATTACH_VERSION_MIN ? version : 0;
}

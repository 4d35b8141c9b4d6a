/* SPDX-License-Identifier: Apache-2.0 */
#include "proto/peer.h"
#include "proto/unpack.h"

#include <string.h>

static int bad(const char *field, struct vm_error **err)
{
    return error_set(err, VM_ERROR_PROTOCOL, "the peer's message is malformed: %s", field);
}

/* No longer than max, and nothing that could forge a log line or a terminal's text. */
static bool text_ok(const char *text, size_t max)
{
    size_t n = strnlen(text, max + 1);
    if (n > max)
        return false;
    for (const unsigned char *t = (const unsigned char *)text; *t; t++)
        if (*t < 0x20 || *t == 0x7f)
            return false;
    return true;
}

static int check_error(const Vmmig__Peer__Error *e, struct vm_error **err)
{
    if (!text_ok(e->kind, PEER_NAME_MAX) || !text_ok(e->message, PEER_TEXT_MAX))
        return bad("error", err);
    return 0;
}

static int check_hello(const Vmmig__Peer__Hello *h, struct vm_error **err)
{
    if (h->version_min > h->version_max)
        return bad("version range", err);
    if (!text_ok(h->software, PEER_NAME_MAX) || !text_ok(h->host, PEER_NAME_MAX))
        return bad("hello", err);
    return 0;
}

static int check_hello_ok(const Vmmig__Peer__HelloOk *h, struct vm_error **err)
{
    if (h->version < PEER_VERSION_MIN || h->version > PEER_VERSION_MAX)
        return error_set(err, VM_ERROR_VERSION, "the peer chose protocol version %u; this agent "
                         "speaks %d to %d", h->version, PEER_VERSION_MIN, PEER_VERSION_MAX);
    if (!text_ok(h->software, PEER_NAME_MAX) || !text_ok(h->host, PEER_NAME_MAX))
        return bad("hello answer", err);
    return 0;
}

static int check_ram(const Vmmig__Peer__Definition *d, struct vm_error **err)
{
    if (!d->n_ram || d->n_ram > PEER_REGIONS_MAX)
        return bad("number of memory regions", err);
    for (size_t i = 0; i < d->n_ram; i++) {
        const Vmmig__Peer__Ram *r = d->ram[i];
        if (!*r->block || !text_ok(r->block, PEER_NAME_MAX) ||
            !text_ok(r->backend, PEER_NAME_MAX))
            return bad("memory region's name", err);
        if (!r->size || r->size % 4096 || r->size > PEER_REGION_BYTES_MAX)
            return bad("memory region's size", err);
        if (r->page_size < 4096 || r->page_size & (r->page_size - 1) || r->page_size > 1ULL << 30)
            return bad("memory region's page size", err);
    }
    return 0;
}

static int check_disks(const Vmmig__Peer__Definition *d, struct vm_error **err)
{
    if (d->n_disks > PEER_DISKS_MAX)
        return bad("number of disks", err);
    for (size_t i = 0; i < d->n_disks; i++) {
        const Vmmig__Peer__Disk *k = d->disks[i];
        if (!text_ok(k->name, PEER_NAME_MAX) || !text_ok(k->node, PEER_NAME_MAX) ||
            !text_ok(k->file, PEER_TEXT_MAX) || !text_ok(k->driver, PEER_NAME_MAX) ||
            !text_ok(k->format, PEER_NAME_MAX) || !text_ok(k->device, PEER_TEXT_MAX))
            return bad("disk", err);
    }
    return 0;
}

static int check_devices(const Vmmig__Peer__Definition *d, struct vm_error **err)
{
    if (d->n_nics > PEER_NICS_MAX || d->n_devices > PEER_DEVICES_MAX)
        return bad("number of devices", err);
    for (size_t i = 0; i < d->n_nics; i++)
        if (!text_ok(d->nics[i]->id, PEER_NAME_MAX) || !text_ok(d->nics[i]->kind, PEER_NAME_MAX) ||
            !text_ok(d->nics[i]->name, PEER_NAME_MAX))
            return bad("network interface", err);
    for (size_t i = 0; i < d->n_devices; i++)
        if (!text_ok(d->devices[i]->path, PEER_TEXT_MAX) ||
            !text_ok(d->devices[i]->type, PEER_NAME_MAX))
            return bad("device", err);
    return 0;
}

static int check_definition(const Vmmig__Peer__Definition *d, struct vm_error **err)
{
    if (!d->n_argv || d->n_argv > PEER_ARGC_MAX)
        return bad("number of arguments", err);
    for (size_t i = 0; i < d->n_argv; i++)
        if (strnlen(d->argv[i], PEER_ARG_MAX + 1) > PEER_ARG_MAX)
            return bad("argument", err);
    if (d->boot.len != 16 || d->n_version != 3 || !d->n_cpus ||
        !text_ok(d->binary, PEER_NAME_MAX) || !text_ok(d->cwd, PEER_TEXT_MAX) ||
        !text_ok(d->machine, PEER_NAME_MAX) || !text_ok(d->accel, PEER_NAME_MAX) ||
        !text_ok(d->cpu_model, PEER_NAME_MAX) || !text_ok(d->cpu_features, 4 * PEER_TEXT_MAX))
        return bad("definition", err);
    return check_ram(d, err) < 0 || check_disks(d, err) < 0 ? -1 : check_devices(d, err);
}

static int check_prepare(const Vmmig__Peer__Prepare *p, struct vm_error **err)
{
    if (!p->definition)
        return bad("no definition", err);
    if (check_definition(p->definition, err) < 0)
        return -1;
    if (!p->channels || p->channels > PEER_CHANNELS_MAX)
        return bad("number of channels", err);
    if (p->token.len != 16)
        return bad("token", err);
    if (!text_ok(p->dest_socket, PEER_TEXT_MAX))
        return bad("path of the prepared VMM", err);
    if (p->n_offers > PEER_DISKS_MAX)
        return bad("number of questions about disks", err);
    for (size_t i = 0; i < p->n_offers; i++)
        if (p->offers[i]->disk >= p->definition->n_disks || p->offers[i]->nonce.len != 16)
            return bad("question about a disk", err);
    return 0;
}

static int check_prepared(const Vmmig__Peer__Prepared *p, struct vm_error **err)
{
    if (p->n_mapped > PEER_REGIONS_MAX)
        return bad("number of mapped regions", err);
    if (p->n_answers > PEER_DISKS_MAX)
        return bad("number of answers about disks", err);
    for (size_t i = 0; i < p->n_answers; i++)
        if (p->answers[i]->secret.len != 16 || p->answers[i]->boot.len != 16 ||
            !text_ok(p->answers[i]->text, PEER_TEXT_MAX))
            return bad("answer about a disk", err);
    return 0;
}

static int check_handover(const Vmmig__Peer__Handover *h, struct vm_error **err)
{
    if (h->attempt.len != 16)
        return bad("attempt", err);
    if (h->message > 255)
        return bad("hand-over message", err);
    if (h->duration_ns > PEER_DURATION_MAX_NS)
        return bad("duration", err);
    if (h->run != VMMIG__PEER__RUN__AS_PREPARED && h->run != VMMIG__PEER__RUN__RUNS &&
        h->run != VMMIG__PEER__RUN__STANDS)
        return bad("run state", err);
    if (!text_ok(h->vm, PEER_NAME_MAX))
        return bad("name of the VM", err);
    if (h->reason && check_error(h->reason, err) < 0)
        return -1;
    if (h->prepared && check_prepared(h->prepared, err) < 0)
        return -1;
    return h->prepare ? check_prepare(h->prepare, err) : 0;
}

int peer_unpack(unsigned type, const void *data, size_t len, struct peer_message *ret_message,
                struct vm_error **err)
{
    struct peer_message m = {.type = (Vmmig__Peer__Type)type};
    int checked = -1;
    switch (type) {
    case VMMIG__PEER__TYPE__HELLO:
        m.hello = (Vmmig__Peer__Hello *)unpack_message(&vmmig__peer__hello__descriptor, data, len);
        checked = m.hello ? check_hello(m.hello, err) : bad("hello", err);
        break;
    case VMMIG__PEER__TYPE__HELLO_OK:
        m.hello_ok = (Vmmig__Peer__HelloOk *)unpack_message(&vmmig__peer__hello_ok__descriptor, data, len);
        checked = m.hello_ok ? check_hello_ok(m.hello_ok, err) : bad("hello answer", err);
        break;
    case VMMIG__PEER__TYPE__ERROR:
        m.error = (Vmmig__Peer__Error *)unpack_message(&vmmig__peer__error__descriptor, data, len);
        checked = m.error ? check_error(m.error, err) : bad("error", err);
        break;
    case VMMIG__PEER__TYPE__HANDOVER:
        m.handover = (Vmmig__Peer__Handover *)unpack_message(&vmmig__peer__handover__descriptor, data, len);
        checked = m.handover ? check_handover(m.handover, err) : bad("hand-over", err);
        break;
    default:
        return error_set(err, VM_ERROR_PROTOCOL, "the peer sent a message of unknown type %u", type);
    }
    if (checked < 0) {
        peer_message_finish(&m);
        return -1;
    }
    *ret_message = m;
    return 0;
}

void peer_message_finish(struct peer_message *m)
{
    /* All members are pointers to messages, which know their own type. */
    if (m->hello)
        protobuf_c_message_free_unpacked(&m->hello->base, NULL);
    m->hello = NULL;
}

void peer_pack(const ProtobufCMessage *message, struct buffer *out)
{
    uint8_t *to = buffer_grow(out, protobuf_c_message_get_packed_size(message));
    if (to)
        protobuf_c_message_pack(message, to);
}

unsigned peer_version_choose(const Vmmig__Peer__Hello *hello)
{
    unsigned version =
        hello->version_max < PEER_VERSION_MAX ? hello->version_max : PEER_VERSION_MAX;
    return version >= PEER_VERSION_MIN && version >= hello->version_min ? version : 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
#include "migrate/channel_wire.h"

#include "base/bytes.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <xxhash.h>

static const char header_magic[4] = "VMGF";
static const char hello_magic[4] = "VMGH";
static const char message_magic[4] = "VMGA";

enum { HEADER_SUM_AT = 32, HELLO_SUM_AT = 48, MESSAGE_SUM_AT = 24 };

static int set_damaged(const char *what, struct vm_error **err)
{
    return error_set(err, VM_ERROR_UNREACHABLE, "a %s was damaged on the way", what);
}

struct channel_token channel_token_new(void)
{
    struct channel_token token;
    size_t n = 0;
    while (n < sizeof(token.bytes)) {
        ssize_t got = getrandom(token.bytes + n, sizeof(token.bytes) - n, 0);
        if (got > 0)
            n += (size_t)got;
        else if (errno != EINTR)
            abort(); /* the kernel has no random generator */
    }
    return token;
}

/* Seeding the sum of `meta` with that of the header makes one sum of both, without copying. */
static uint64_t header_sum(const uint8_t *header, const void *meta, size_t meta_len)
{
    return XXH3_64bits_withSeed(meta, meta_len, XXH3_64bits(header, HEADER_SUM_AT));
}

void channel_header_write(uint8_t out[CHANNEL_HEADER_SIZE], const struct channel_header *header,
                          const void *meta)
{
    memcpy(out, header_magic, 4);
    put_le16(out + 4, header->type);
    put_le16(out + 6, 0);
    put_le64(out + 8, header->seq);
    put_le32(out + 16, header->meta_len);
    put_le32(out + 20, header->payload_len);
    put_le64(out + 24, header->payload_sum);
    put_le64(out + HEADER_SUM_AT, header_sum(out, meta, header->meta_len));
}

int channel_header_parse(const uint8_t in[CHANNEL_HEADER_SIZE], struct channel_header *ret_header,
                         struct vm_error **err)
{
    struct channel_header h = {.type = get_le16(in + 4),
                               .seq = get_le64(in + 8),
                               .meta_len = get_le32(in + 16),
                               .payload_len = get_le32(in + 20),
                               .payload_sum = get_le64(in + 24)};
    if (memcmp(in, header_magic, 4))
        return error_set(err, VM_ERROR_PROTOCOL, "no frame where one should begin");
    if (get_le16(in + 6))
        return error_set(err, VM_ERROR_PROTOCOL, "a frame has unknown flags");
    if (h.meta_len > CHANNEL_META_MAX || h.payload_len > CHANNEL_PAYLOAD_MAX)
        return error_set(err, VM_ERROR_PROTOCOL, "a frame of %u and %u bytes is too long",
                         h.meta_len, h.payload_len);
    if (h.type > CHANNEL_TYPE_MAX && h.type != CHANNEL_TYPE_END)
        return error_set(err, VM_ERROR_PROTOCOL, "a frame has the unknown type %u", h.type);
    if (h.type == CHANNEL_TYPE_END && (h.meta_len || h.payload_len))
        return error_set(err, VM_ERROR_PROTOCOL, "the frame that ends a channel is not empty");
    *ret_header = h;
    return 0;
}

int channel_header_verify(const uint8_t in[CHANNEL_HEADER_SIZE], const void *meta,
                          struct vm_error **err)
{
    if (header_sum(in, meta, get_le32(in + 16)) != get_le64(in + HEADER_SUM_AT))
        return set_damaged("frame's header", err);
    return 0;
}

void channel_hello_write(uint8_t out[CHANNEL_HELLO_SIZE], const struct channel_hello *hello)
{
    memcpy(out, hello_magic, 4);
    put_le16(out + 4, CHANNEL_WIRE_VERSION);
    put_le16(out + 6, hello->id.number);
    memcpy(out + 8, hello->id.attempt.bytes, 16);
    memcpy(out + 24, hello->id.token.bytes, 16);
    put_le64(out + 40, hello->first_seq);
    put_le64(out + HELLO_SUM_AT, XXH3_64bits(out, HELLO_SUM_AT));
}

int channel_hello_parse(const uint8_t in[CHANNEL_HELLO_SIZE], struct channel_hello *ret_hello,
                        struct vm_error **err)
{
    struct channel_hello h = {.id.number = get_le16(in + 6), .first_seq = get_le64(in + 40)};
    memcpy(h.id.attempt.bytes, in + 8, 16);
    memcpy(h.id.token.bytes, in + 24, 16);
    if (memcmp(in, hello_magic, 4))
        return error_set(err, VM_ERROR_PROTOCOL, "a channel does not begin with its hello");
    if (XXH3_64bits(in, HELLO_SUM_AT) != get_le64(in + HELLO_SUM_AT))
        return set_damaged("channel's hello", err);
    if (get_le16(in + 4) != CHANNEL_WIRE_VERSION)
        return error_set(err, VM_ERROR_VERSION, "a channel of version %u, this side has version %u",
                         get_le16(in + 4), CHANNEL_WIRE_VERSION);
    if (h.id.number >= CHANNELS_MAX || !h.first_seq)
        return error_set(err, VM_ERROR_PROTOCOL, "a channel's hello has number %u, frame %llu",
                         h.id.number, (unsigned long long)h.first_seq);
    *ret_hello = h;
    return 0;
}

static uint64_t message_sum(const uint8_t *in, size_t text_len)
{
    return XXH3_64bits_withSeed(in + CHANNEL_MESSAGE_SIZE, text_len,
                                XXH3_64bits(in, MESSAGE_SUM_AT));
}

size_t channel_message_write(uint8_t out[CHANNEL_MESSAGE_SIZE + CHANNEL_TEXT_MAX],
                             const struct channel_message *message)
{
    bool refused = message->kind == CHANNEL_REFUSED;
    size_t text_len = refused ? strnlen(message->text, CHANNEL_TEXT_MAX) : 0;
    memcpy(out, message_magic, 4);
    put_le16(out + 4, (uint16_t)message->kind);
    /* The exit status is the stable number of a kind. */
    put_le16(out + 6, refused ? (uint16_t)error_kind_status(message->error_kind) : 0);
    put_le64(out + 8, message->applied);
    put_le32(out + 16, (uint32_t)text_len);
    put_le32(out + 20, 0);
    memcpy(out + CHANNEL_MESSAGE_SIZE, message->text, text_len);
    put_le64(out + MESSAGE_SUM_AT, message_sum(out, text_len));
    return CHANNEL_MESSAGE_SIZE + text_len;
}

static enum vm_error_kind kind_of_status(int status)
{
    for (int kind = 0; kind < VM_ERROR_KIND_COUNT; kind++)
        if (error_kind_status((enum vm_error_kind)kind) == status)
            return (enum vm_error_kind)kind;
    return VM_ERROR_FAILED;
}

ssize_t channel_message_parse(const uint8_t *in, size_t len, struct channel_message *ret_message,
                              struct vm_error **err)
{
    if (len < CHANNEL_MESSAGE_SIZE)
        return 0;
    uint16_t kind = get_le16(in + 4);
    uint32_t text_len = get_le32(in + 16);
    if (memcmp(in, message_magic, 4) || text_len > CHANNEL_TEXT_MAX)
        return error_set(err, VM_ERROR_PROTOCOL, "no acknowledgement where one should begin");
    if (len < CHANNEL_MESSAGE_SIZE + text_len)
        return 0;
    if (message_sum(in, text_len) != get_le64(in + MESSAGE_SUM_AT))
        return set_damaged("channel's acknowledgement", err);
    if (kind < CHANNEL_ANSWER || kind > CHANNEL_REFUSED)
        return error_set(err, VM_ERROR_PROTOCOL, "an acknowledgement has the unknown kind %u",
                         kind);
    ret_message->kind = kind;
    ret_message->applied = get_le64(in + 8);
    ret_message->error_kind = kind_of_status(get_le16(in + 6));
    memcpy(ret_message->text, in + CHANNEL_MESSAGE_SIZE, text_len);
    ret_message->text[text_len] = 0;
    for (uint32_t i = 0; i < text_len; i++)
        if ((unsigned char)ret_message->text[i] < ' ' || ret_message->text[i] == 0x7f)
            ret_message->text[i] = '?';
    return (ssize_t)(CHANNEL_MESSAGE_SIZE + text_len);
}

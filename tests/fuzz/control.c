/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The checks of control messages. The first two bytes are the frame's type, the rest its payload. A
 * message that passes is what the header promises, and passes the check of its sender, too.
 */
#include "base/bytes.h"
#include "proto/control.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void require(bool condition)
{
    if (!condition)
        abort();
}

static void check_promises(const struct control_message *m)
{
    struct endpoint e;
    switch (m->type) {
    case VMMIG__CONTROL__TYPE__SEND:
        require(vm_name_is_valid(m->send->vm));
        require(endpoint_parse(m->send->to, 1, &e, NULL) == 0);
        require(m->send->connections <= CONTROL_CONNECTIONS_MAX);
        break;
    case VMMIG__CONTROL__TYPE__WATCH:
        require(m->watch->job.len == 16 || vm_name_is_valid(m->watch->vm));
        break;
    case VMMIG__CONTROL__TYPE__RUN:
        require(vm_name_is_valid(m->run->vm) && m->run->n_argv && *m->run->argv[0]);
        break;
    case VMMIG__CONTROL__TYPE__VM:
        require(!m->vm->job || m->vm->job->id.len == 16);
        break;
    default:
        break;
    }
}

static void check_message(unsigned type, const uint8_t *data, size_t size)
{
    cleanup_control_message struct control_message m = {0};
    if (control_unpack(type, data, size, &m, NULL) < 0)
        return;
    check_promises(&m);
    require(control_check(type, m.any, NULL) == 0);
}

/* The same bytes as text: addresses survive being written, and any text can be made showable. */
static void check_text(const uint8_t *data, size_t size)
{
    char *text = malloc(size + 1);
    struct endpoint e, again;
    require(text != NULL);
    memcpy(text, data, size);
    text[size] = 0;
    if (endpoint_parse(text, 7, &e, NULL) == 0) {
        require(endpoint_parse(endpoint_text(&e), 8, &again, NULL) == 0);
        require(!strcmp(e.host, again.host) && e.port == again.port);
    }
    field_make_text(text, 100);
    require(field_check_text("it", text, 0, 100, NULL) == 0);
    free(text);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 2)
        return 0;
    check_message(get_le16(data), data + 2, size - 2);
    check_text(data + 2, size - 2);
    return 0;
}

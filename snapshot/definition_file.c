/* SPDX-License-Identifier: Apache-2.0 */
#include "snapshot/definition_file.h"

#include "base/cleanup.h"
#include "snapshot/snapshot.h"

#include <string.h>

int definition_file_store(const struct qemu_json *vm, struct image_session *session, struct gather *gather,
                          struct vm_error **err)
{
    cleanup_free char *text = qemu_json_write(vm, err);
    if (!text)
        return -1;
    size_t n = strlen(text);
    struct image_file *file = image_session_file(session, SNAPSHOT_DEFINITION_FILE, n, err);
    return file ? gather_write(gather, file, n, 0, (const uint8_t *)text, n, err) : -1;
}

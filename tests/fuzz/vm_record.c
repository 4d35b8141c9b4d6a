/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Fuzzer of agent/vm_record: arbitrary bytes behind a right head, so that they get past it. Asserted: what is accepted
 * is the VM of that name, with a command line and an identity.
 */
#include "agent/vm_record.h"

#include <assert.h>
#include <endian.h>
#include <string.h>
#include <xxhash.h>

#define NAME "web1"
enum { HEAD = 16, SIZE_MAX_HERE = 64 << 10 };

/* Built by libFuzzer's driver. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static char file[HEAD + SIZE_MAX_HERE];
    struct vm_definition d;
    if (size > SIZE_MAX_HERE)
        return -1;
    if (vm_record_parse((const char *)data, size, NAME, &d, NULL) == 0) /* as it is: of a checksum found by chance */
        vm_definition_finish(&d);
    memcpy(file, VM_RECORD_MAGIC, 8);
    uint64_t sum = htole64(XXH3_64bits(data, size));
    memcpy(file + 8, &sum, sizeof(sum));
    memcpy(file + HEAD, data, size);
    if (vm_record_parse(file, HEAD + size, NAME, &d, NULL) < 0)
        return 0;
    assert(!strcmp(d.name, NAME) && d.process.pid > 0 && *d.socket_path == '/' && d.argv[0]);
    vm_definition_finish(&d);
    return 0;
}

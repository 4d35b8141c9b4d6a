/* SPDX-License-Identifier: Apache-2.0 */
/* Compiled with -mavx2: nothing but checksum_best may lead here. */
#define XXH_INLINE_ALL
#define CHECKSUM_NAME checksum_avx2
#include "migrate/checksum_code.h"

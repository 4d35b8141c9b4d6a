/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm.h"

#include <stdio.h>
#include <sys/socket.h>
#include <time.h>

int events_open(struct events *e, const char *path)
{
    e->fd = path ? connect_to("--events", path) : -1;
    return path && e->fd < 0 ? -1 : 0;
}

/* Whoever listens is not waited for. */
void events_tell(const struct events *e, const char *what)
{
    char line[64];
    struct timespec now;
    if (e->fd < 0)
        return;
    clock_gettime(CLOCK_REALTIME, &now);
    int n = snprintf(line, sizeof(line), "%s %lld.%06ld\n", what, (long long)now.tv_sec, now.tv_nsec / 1000);
    if (send(e->fd, line, (size_t)n, MSG_NOSIGNAL | MSG_DONTWAIT) < 0)
        complain("--events: nobody takes '%s'", what);
}

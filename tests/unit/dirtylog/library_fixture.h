/* SPDX-License-Identifier: Apache-2.0 */
/*
 * library_fixture: VMMs without KVM that link libvmmig-attach, and what is said at their sockets, packet by packet.
 *
 *     struct toy_vmm *v = new_vmm();
 *     int fd = dial(v->path);
 *     hello(fd);
 *     expect_type(fd, VMMIG__ATTACH__TYPE__WELCOME);
 *     ask(fd, VMMIG__ATTACH__TYPE__HARVEST, NULL);
 *     expect_error(fd, "conflict: ...");
 *     close(fd);
 *     toy_vmm_destroy(v);
 *
 * What is not as expected fails the test.
 */
#ifndef VMMIG_TESTS_LIBRARY_FIXTURE_H
#define VMMIG_TESTS_LIBRARY_FIXTURE_H

#include "proto/attach.h"
#include "tests/unit/dirtylog/toy_vmm.h"
#include "vmm/attach.h"

enum { MIB = 1 << 20 };

/* Memory of 1 and 4 MiB; waits for a guest. */
struct toy_vmm *new_vmm_with(unsigned callback_timeout_ms);
/* Its callbacks return, if late on a busy machine. */
struct toy_vmm *new_vmm(void);
/* One that is going to hang. */
struct toy_vmm *new_impatient_vmm(void);
struct attach *agent_of(const struct toy_vmm *v);

int dial(const char *path);
void send_raw(int fd, const void *data, size_t n);
void ask(int fd, unsigned type, const ProtobufCMessage *message);
void hello(int fd);
/* The type of the next answer, 0 at the end; an ERROR's text in `text`. */
unsigned listen_for(int fd, char text[256]);
void expect_error(int fd, const char *expected);
void expect_type(int fd, unsigned type);
/* And closes. */
void expect_end(int fd);

#endif

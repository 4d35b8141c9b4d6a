/* SPDX-License-Identifier: Apache-2.0 */
/*
 * rbd_name: which RADOS block image QEMU means. Two notations: "rbd:POOL[/NAMESPACE]/IMAGE[@SNAP][:KEY=VALUE...]"
 * with backslash escapes, and "json:{...}" with the options of the rbd driver. Pure.
 */
#ifndef VMMIG_VMM_RBD_NAME_H
#define VMMIG_VMM_RBD_NAME_H

#include "vmm/qemu_argv.h"

#include <stdbool.h>

#define RBD_NAME_PART_MAX 128

struct rbd_name {
    char pool[RBD_NAME_PART_MAX];
    char space[RBD_NAME_PART_MAX]; /* namespace; "" for the pool's own */
    char image[RBD_NAME_PART_MAX];
    char snapshot[RBD_NAME_PART_MAX];
    char conf[256]; /* configuration file; "" for the default */
    char user[RBD_NAME_PART_MAX]; /* without "client."; "" for the default */
};

#define RBD_NAME_TEXT_MAX 1600

/* A file name as QEMU reports or takes it. False if it is not one of an rbd image, or does not fit. */
bool rbd_name_parse(const char *filename, struct rbd_name *ret);
/* The options below `prefix` ("" or "file.") of a block option. */
bool rbd_name_from_props(const struct qemu_props *p, const char *prefix, struct rbd_name *ret);
/* "rbd:POOL/..." with what is not "". False if it does not fit. */
bool rbd_name_format(const struct rbd_name *name, char out[RBD_NAME_TEXT_MAX]);
/* The same image of the same pool; configuration files and users are not compared. */
bool rbd_name_equal(const struct rbd_name *a, const struct rbd_name *b);
/*
 * Two file names of QEMU's: the same text, or the same image: QEMU has one name for the node that has it open, and
 * another for the format upon that. Two that name configuration files name the same one: else it is another cluster.
 */
bool rbd_name_same_file(const char *a, const char *b);

#endif

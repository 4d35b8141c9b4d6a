/* SPDX-License-Identifier: Apache-2.0 */
/*
 * agent: what the parts of vmmigd share. Made by agent/main.c, valid for as long as any thread of
 * the agent runs; every member is itself safe to use from any thread.
 */
#ifndef VMMIG_AGENT_AGENT_H
#define VMMIG_AGENT_AGENT_H

#include "agent/config.h"
#include "agent/jobs.h"
#include "agent/vms.h"
#include "base/loop.h"

struct control;
struct makings;
struct mount;
struct repository;
struct transfer;

struct agent {
    const struct config *config;
    struct loop *loop;
    struct job_table *jobs;
    struct vms *vms;
    struct transfer *transfer; /* agent/transfer.h */
    _Atomic(struct control *) control; /* agent/control.h; NULL: not yet */
    struct repository *repository; /* agent/repository.h */
    struct mount *mount;           /* snapshot/mount.h */
    struct makings *makings;       /* agent/makings.h */
    int64_t started_ns; /* wall clock */
};

#endif

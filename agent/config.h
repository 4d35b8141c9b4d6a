/* SPDX-License-Identifier: Apache-2.0 */
/*
 * config: the agent's configuration. One table (config_options) says of every key its type, unit,
 * bounds, default and meaning; the parser, `vmmigd --help`, the sample file and the manual come
 * from it.
 *
 *     CLEANUP(config) struct config *config = config_load("/etc/vmmig/vmmigd.conf", &err);
 *
 * The file has lines `key = value`; `#` begins a comment line. A key that may be repeated adds to a
 * list. `map NAME = NAME` says what a tap or bridge of another host is called here.
 * An unknown key, a value out of bounds and a key given twice are errors (USAGE) that name file
 * and line. Read once at start, constant from then on: any thread may read it.
 */
#ifndef VMMIG_AGENT_CONFIG_H
#define VMMIG_AGENT_CONFIG_H

#include "base/cleanup.h"
#include "base/error.h"
#include "base/log.h"
#include "proto/fields.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#define CONFIG_LIST_MAX 64
#define CONFIG_FILE_MAX (64 << 10)
#define CONFIG_VMS_MAX 512
#define CONFIG_JOBS_MAX 64
#define CONFIG_CLIENTS_MAX 256
#define CONFIG_DEFAULT_PATH "/etc/vmmig/vmmigd.conf"

struct config_map {
    char *from; /* what the peer's command line says */
    char *to;   /* what it is called on this host */
};

struct config_maps {
    struct config_map list[CONFIG_LIST_MAX];
    unsigned n;
};

struct config_vmms {
    char *list[CONFIG_LIST_MAX];
    unsigned n;
};

struct config_peers {
    char *list[CONFIG_LIST_MAX];
    unsigned n;
};

struct config {
    char *host;            /* what this host calls itself, in logs and towards peers */
    char *state_dir;       /* durable: VM records, journal */
    char *runtime_dir;     /* sockets; may be lost in a reboot */
    char *control_socket;
    char *control_group;   /* its members may drive the agent; "": root and the agent's user */
    struct endpoint listen; /* host "": none, this agent takes no VMs */
    char *ca_file, *cert_file, *key_file; /* NULL, all three, with insecure_plain */
    char *crl_file;      /* NULL: no certificate was revoked */
    struct config_peers control_peers; /* hosts whose root may drive this agent */
    bool insecure_plain; /* plain TCP with peers */
    struct config_vmms vmms; /* QEMUs that may be run as a VM */
    struct config_vmms attach_vmms; /* and VMMs that link libvmmig-attach */
    char *log_dir;         /* what VMMs print */
    char *vm_cgroup;       /* folder of a cgroup in which each VM gets one; "": the agent's */
    char *vm_user;         /* whom VMs run as; "" for the agent's own user */
    char *repository;      /* URL (repo/url.h) */
    char *scratch_dir;     /* what a snapshot under way keeps aside */
    char *nbdkit_plugin;   /* takes disks out of VMs */
    char *mount_dir;       /* where the repository's images appear as files */
    char *cache_dir;       /* what was read of them */
    char *clone_dir;       /* disks of clones */
    char *libexec_dir;     /* vmmig-mount, vmmig-fetch, vmmig-guard */
    char *publish_group;   /* whose members may publish templates; "": whoever may drive the agent */
    uint64_t cache_size;
    uint64_t disk_timeout_ms; /* when reading a disk without an answer fails */
    uint64_t record_ms;       /* how long the first use of a template is recorded */
    struct config_maps maps;
    uint64_t max_vms, max_jobs, max_clients;
    uint64_t max_bandwidth;      /* bytes a second of one migration, 0: no limit */
    uint64_t connect_timeout_ms; /* how long dialling a peer may take */
    uint64_t peer_timeout_ms;    /* how long a lost peer is waited for; then undone */
    enum log_level log_level;
};

/* The defaults, then the file. `path` NULL: the defaults alone. */
struct config *config_load(const char *path, struct vm_error **err);
/* As config_load, from text; `name` stands for the file in errors. */
struct config *config_parse(const char *name, const char *text, struct vm_error **err);
void config_destroy(struct config *c);
DEFINE_CLEANUP(config, struct config *, config_destroy)

/* What `name` of a peer's command line is called here; `name` itself if no map says otherwise. */
const char *config_map_name(const struct config *c, const char *name);
/* The listed binary that `argv0` (a path, or a bare name) means, or NULL: not allowed. */
const char *config_find_vmm(const struct config *c, const char *argv0);
const char *config_find_attach_vmm(const struct config *c, const char *argv0);
/* May the root of that host, as its certificate names it, drive this agent? */
bool config_obeys(const struct config *c, const char *host);

/* For --help, the sample configuration and the manual. 80 columns. */
void config_print_help(FILE *out);
void config_print_sample(FILE *out);
void config_print_manual(FILE *out);

#endif

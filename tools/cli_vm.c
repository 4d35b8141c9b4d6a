/* SPDX-License-Identifier: Apache-2.0 */
#include "base/clock.h"
#include "base/uuid.h"
#include "tools/cli.h"
#include "client/client.h"
#include "tools/cli_follow.h"
#include "tools/cli_print.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

/* A name that the agent would refuse is the user's error, and needs no agent to tell. */
static int check_vm_name(const struct cli *c, struct vm_error **err)
{
    if (vm_name_check(c->args.list[0], err) == 0)
        return 0;
    return error_wrap(err, "'%.80s'", c->args.list[0]);
}

/* Ask for a VM, and say `done` (a format with its name and process), or the JSON object. */
static int ask_vm(const struct cli *c, unsigned type, const ProtobufCMessage *request,
                  const char *done, struct vm_error **err)
{
    cleanup_control_message struct control_message answer = {0};
    if (client_ask(&c->at, type, request, VMMIG__CONTROL__TYPE__VM, &answer, err) < 0)
        return -1;
    if (c->json)
        return cli_print_json(cli_json_vm(answer.vm), err);
    printf("%s: %s (process %d)\n", answer.vm->vm, done, answer.vm->pid);
    return 0;
}

static int run_run(const struct cli *c, struct vm_error **err)
{
    Vmmig__Control__Run m = VMMIG__CONTROL__RUN__INIT;
    char cwd[FIELD_PATH_MAX + 1];
    if (check_vm_name(c, err) < 0)
        return -1;
    if (c->at.agent)
        strcpy(cwd, "/"); /* that of this command is another host's */
    else if (!getcwd(cwd, sizeof(cwd)))
        return error_errno(err, errno, "cannot tell the current directory");
    m.vm = client_word(c->args.list[0]);
    m.argv = c->args.rest;
    m.n_argv = (size_t)c->args.n_rest;
    m.cwd = cwd;
    return ask_vm(c, VMMIG__CONTROL__TYPE__RUN, &m.base, "started", err);
}

static int run_attach(const struct cli *c, struct vm_error **err)
{
    Vmmig__Control__Attach m = VMMIG__CONTROL__ATTACH__INIT;
    if (check_vm_name(c, err) < 0)
        return -1;
    if (!c->qmp == !c->vmm_socket)
        return error_set(err, VM_ERROR_USAGE, c->qmp ? "--qmp and --socket exclude each other"
                                                     : "--qmp PATH or --socket PATH is required");
    const char *given = c->qmp ? c->qmp : c->vmm_socket;
    char *path = cli_resolve(c, given);
    if (!path)
        return error_errno(err, errno, "--%s %s", c->qmp ? "qmp" : "socket", given);
    m.vm = client_word(c->args.list[0]);
    *(c->qmp ? &m.qmp_path : &m.socket_path) = path;
    int r = ask_vm(c, VMMIG__CONTROL__TYPE__ATTACH, &m.base, "attached", err);
    free(path);
    return r;
}

static int run_list(const struct cli *c, struct vm_error **err)
{
    cleanup_control_message struct control_message answer = {0};
    Vmmig__Control__List m = VMMIG__CONTROL__LIST__INIT;
    if (client_ask(&c->at, VMMIG__CONTROL__TYPE__LIST, &m.base, VMMIG__CONTROL__TYPE__VMS, &answer, err) < 0)
        return -1;
    if (c->json)
        return cli_print_json(cli_json_vms(answer.vms), err);
    cli_print_vms(stdout, answer.vms);
    return 0;
}

static int status_of_agent(const struct cli *c, struct vm_error **err)
{
    cleanup_control_message struct control_message answer = {0};
    Vmmig__Control__Info m = VMMIG__CONTROL__INFO__INIT;
    if (client_ask(&c->at, VMMIG__CONTROL__TYPE__INFO, &m.base, VMMIG__CONTROL__TYPE__AGENT, &answer, err) < 0)
        return -1;
    if (c->json)
        return cli_print_json(cli_json_agent(answer.agent), err);
    cli_print_agent(stdout, answer.agent);
    return 0;
}

static int run_status(const struct cli *c, struct vm_error **err)
{
    cleanup_control_message struct control_message answer = {0};
    Vmmig__Control__Status m = VMMIG__CONTROL__STATUS__INIT;
    if (!c->args.n)
        return status_of_agent(c, err);
    m.vm = client_word(c->args.list[0]);
    if (check_vm_name(c, err) < 0 || client_ask(&c->at, VMMIG__CONTROL__TYPE__STATUS, &m.base,
                                         VMMIG__CONTROL__TYPE__VM, &answer, err) < 0)
        return -1;
    if (c->json)
        return cli_print_json(cli_json_vm(answer.vm), err);
    cli_print_vm(stdout, answer.vm);
    return 0;
}

static int run_detach(const struct cli *c, struct vm_error **err)
{
    Vmmig__Control__Detach m = VMMIG__CONTROL__DETACH__INIT;
    if (check_vm_name(c, err) < 0)
        return -1;
    m.vm = client_word(c->args.list[0]);
    return ask_vm(c, VMMIG__CONTROL__TYPE__DETACH, &m.base, "detached", err);
}

/* Stay with the job, or say that it began. */
static int follow_or_leave(const struct cli *c, struct client *client,
                           const Vmmig__Control__Job *job, int signal_fd, struct vm_error **err)
{
    if (!c->background)
        return cli_follow(c, client, job->vm, job, signal_fd, err);
    if (c->json)
        return cli_print_json(cli_json_job(job), err);
    printf("%s: %s to %s has begun; `vmmig watch %s` follows it\n", job->vm, job->kind, job->peer,
           job->vm);
    return 0;
}

static int run_send(const struct cli *c, struct vm_error **err)
{
    cleanup_control_message struct control_message answer = {0};
    struct endpoint to;
    Vmmig__Control__Send m = VMMIG__CONTROL__SEND__INIT;
    if (check_vm_name(c, err) < 0)
        return -1;
    if (endpoint_parse(c->to, DEFAULT_PEER_PORT, &to, err) < 0)
        return error_wrap(err, "--to %.80s", c->to);
    m.vm = client_word(c->args.list[0]);
    m.to = client_word(c->to);
    m.downtime_limit_ms = (uint32_t)c->downtime_limit_ms;
    m.max_bandwidth = c->max_bandwidth;
    m.connections = (uint32_t)c->connections;
    m.compress = c->compress;
    if (c->dest_qmp && c->dest_socket)
        return error_set(err, VM_ERROR_USAGE, "--dest-qmp and --dest-socket exclude each other");
    m.dest_qmp = client_word(c->dest_qmp ? c->dest_qmp : "");
    m.dest_socket = client_word(c->dest_socket ? c->dest_socket : "");
    m.assume_shared = c->assume_shared;
    m.check = c->check;
    if (c->check && (c->dest_qmp || c->dest_socket))
        return error_set(
            err, VM_ERROR_USAGE,
            "--check would end the VMM that waits at the destination: leave one of them out");
    cleanup_close int signal_fd = c->background ? -1 : cli_follow_prepare(err);
    if (!c->background && signal_fd < 0)
        return -1;
    CLEANUP(client) struct client *client = client_open(&c->at, err);
    if (!client || client_call(client, VMMIG__CONTROL__TYPE__SEND, &m.base,
                                   VMMIG__CONTROL__TYPE__JOB, &answer, err) < 0)
        return -1;
    return follow_or_leave(c, client, answer.job, signal_fd, err);
}

static int run_watch(const struct cli *c, struct vm_error **err)
{
    if (check_vm_name(c, err) < 0)
        return -1;
    cleanup_close int signal_fd = cli_follow_prepare(err);
    if (signal_fd < 0)
        return -1;
    CLEANUP(client) struct client *client = client_open(&c->at, err);
    return client ? cli_follow(c, client, c->args.list[0], NULL, signal_fd, err) : -1;
}

static int run_jobs(const struct cli *c, struct vm_error **err)
{
    cleanup_control_message struct control_message answer = {0};
    Vmmig__Control__Jobs m = VMMIG__CONTROL__JOBS__INIT;
    if (client_ask(&c->at, VMMIG__CONTROL__TYPE__JOBS, &m.base, VMMIG__CONTROL__TYPE__JOB_LIST, &answer, err) <
        0)
        return -1;
    if (c->json)
        return cli_print_json(cli_json_jobs(answer.job_list), err);
    cli_print_jobs(stdout, answer.job_list);
    return 0;
}

/* Is the argument the id of a job, and not the name of a VM that has one like it? */
static bool names_job(const struct cli *c, struct uuid *ret_id)
{
    cleanup_control_message struct control_message answer = {0};
    cleanup_error struct vm_error *ignored = NULL;
    Vmmig__Control__Status m = VMMIG__CONTROL__STATUS__INIT;
    m.vm = client_word(c->args.list[0]);
    return uuid_parse(c->args.list[0], ret_id) &&
           client_ask(&c->at, VMMIG__CONTROL__TYPE__STATUS, &m.base, VMMIG__CONTROL__TYPE__VM,
                   &answer, &ignored) < 0;
}

/* It is no job: the command that asked for it says what came of it. */
static int say_clone_is_cancelled(const struct cli *c, struct vm_error **err)
{
    const char *vm = c->args.list[0];
    if (c->json)
        return cli_print_json(json_pack("{s:s, s:s, s:b}", "vm", vm, "kind", "clone", "cancelling", 1), err);
    printf("%s: clone is being cancelled\n", vm);
    return 0;
}

static int run_cancel(const struct cli *c, struct vm_error **err)
{
    cleanup_control_message struct control_message answer = {0};
    Vmmig__Control__Cancel m = VMMIG__CONTROL__CANCEL__INIT;
    struct uuid id;
    if (check_vm_name(c, err) < 0)
        return -1;
    if (names_job(c, &id))
        m.job = (ProtobufCBinaryData){sizeof(id.bytes), id.bytes};
    else
        m.vm = client_word(c->args.list[0]);
    if (client_ask(&c->at, VMMIG__CONTROL__TYPE__CANCEL, &m.base, CLIENT_ANY, &answer, err) < 0)
        return -1;
    if (answer.type == VMMIG__CONTROL__TYPE__OK)
        return say_clone_is_cancelled(c, err);
    if (answer.type != VMMIG__CONTROL__TYPE__JOB)
        return error_set(err, VM_ERROR_PROTOCOL, "the agent's answer is no job");
    if (c->json)
        return cli_print_json(cli_json_job(answer.job), err);
    printf("%s: %s is being cancelled\n", *answer.job->vm ? answer.job->vm : answer.job->peer,
           answer.job->kind);
    return 0;
}

static int run_resolve(const struct cli *c, struct vm_error **err)
{
    Vmmig__Control__Resolve m = VMMIG__CONTROL__RESOLVE__INIT;
    struct endpoint host;
    if (check_vm_name(c, err) < 0)
        return -1;
    if (c->here == c->gone)
        return error_set(err, VM_ERROR_USAGE, "one of --here and --gone is required");
    if (c->here && !c->fenced)
        return error_set(err, VM_ERROR_USAGE,
                         "--here needs --i-fenced HOST: if that host still runs the VM, two copies "
                         "would run");
    if (c->fenced && endpoint_parse(c->fenced, DEFAULT_PEER_PORT, &host, err) < 0)
        return error_wrap(err, "--i-fenced %.80s", c->fenced);
    m.vm = client_word(c->args.list[0]);
    m.verdict = c->here ? VMMIG__CONTROL__VERDICT__HERE : VMMIG__CONTROL__VERDICT__GONE;
    m.fenced_host = client_word(c->fenced ? c->fenced : "");
    cleanup_control_message struct control_message answer = {0};
    if (client_ask(&c->at, VMMIG__CONTROL__TYPE__RESOLVE, &m.base, VMMIG__CONTROL__TYPE__OK, &answer, err) < 0)
        return -1;
    if (c->json)
        return cli_print_json(json_pack("{s:s, s:s}", "vm", m.vm, "decided",
                                        c->here ? "here" : "gone"), err);
    printf("%s: decided: %s\n", m.vm,
           c->here ? "it runs here" : "the copy here is given up");
    return 0;
}

#define MEMBER(m) .offset = offsetof(struct cli, m)

static const struct option attach_options[] = {
    {"qmp", "PATH", option_parse_text, MEMBER(qmp),
     .text = "QMP socket of a QEMU, which nobody else may be using"},
    {"socket", "PATH", option_parse_text, MEMBER(vmm_socket),
     .text = "Socket of a VMM that links libvmmig-attach. The agent's own control socket is named "
             "before the command, as in `vmmig --socket PATH attach`"},
    {NULL}};

static const struct option send_options[] = {
    {"to", "HOST[:PORT]", option_parse_text, MEMBER(to), .required = true,
     .text =
         "The agent that takes it. The certificate there must bear this name. The port is 16550 "
         "unless another is given"},
    {"downtime-limit", "MS", option_parse_u64, MEMBER(downtime_limit_ms),
     .min = CONTROL_DOWNTIME_MS_MIN, .max = CONTROL_DOWNTIME_MS_MAX, .unit = "ms", .def = "300",
     .text =
         "How long the guest may stand at the end. If it dirties memory too fast for that, it is "
         "slowed down"},
    {"max-bandwidth", "RATE", option_parse_rate, MEMBER(max_bandwidth),
     .min = CONTROL_BANDWIDTH_MIN, .max = CONTROL_BANDWIDTH_MAX,
     .text = "Most to put on the wire, in bytes a second as 100M or 64MiB, in bits as 1gbit. The "
             "agent's limit holds besides"},
    {"connections", "N", option_parse_u64, MEMBER(connections), .min = 1,
     .max = CONTROL_CONNECTIONS_MAX, .unit = "connections",
     .text = "How many data connections. The agent chooses if it is not given"},
    {"compress", "auto|none|lz4|zstd", option_parse_choice, MEMBER(compress), .def = "auto",
     .choices = "auto|none|lz4|zstd", .text = "auto measures what is fastest, page by page"},
    {"dest-qmp", "PATH", option_parse_text, MEMBER(dest_qmp),
     .text = "A QEMU that waits at the destination, started with -incoming defer, for a VM whose "
             "command line does not tell any more what it is, say after a live snapshot. It must "
             "have the VM's devices and disks, and is ended if the migration fails. Without it the "
             "agent there starts one"},
    {"dest-socket", "PATH", option_parse_text, MEMBER(dest_socket),
     .text = "The same for a VMM that links libvmmig-attach: the socket of one that waits there"},
    {"assume-shared", NULL, option_parse_flag, MEMBER(assume_shared),
     .text = "Vouch that the disks at both ends are the same, where the agents cannot prove it. If "
             "they are not, the guest's data is destroyed"},
    {"check", NULL, option_parse_flag, MEMBER(check),
     .text = "Move nothing: find out whether it could be sent now, at both ends. The agent there "
             "starts a VMM for it, and ends it again"},
    {"background", NULL, option_parse_flag, MEMBER(background), .text = "Return when it has begun"},
    {NULL}};

static const struct option resolve_options[] = {
    {"here", NULL, option_parse_flag, MEMBER(here), .text = "The VM is to run on this host"},
    {"gone", NULL, option_parse_flag, MEMBER(gone), .text = "Give up the copy on this host"},
    {"i-fenced", "HOST", option_parse_text, MEMBER(fenced),
     .text = "The other host, which you made sure is off and stays off. With --here"},
    {NULL}};

#undef MEMBER

static const struct cli_command commands[] = {
    {"run", "NAME -- VMM [ARGUMENT]...", 1, 1, true, NULL, "start a VM under the agent",
     "Start a VM from its QEMU command line, to which the agent adds a QMP socket of its own, "
     "nothing else. Or from that of a VMM that links libvmmig-attach, in which @socket@ stands "
     "where its socket is named. The binary must be one that the agent's configuration lists. The "
     "VM outlives the agent. Relative paths are those of the current directory. Of its environment "
     "it has PATH, HOME and LANG only. A disk that is to be sent along must not go through the "
     "host's page cache: cache=none.\n\n"
     "    vmmig run web1 -- qemu-system-x86_64 -accel kvm -m 4G \\\n"
     "        -drive file=/srv/vms/web1.qcow2,if=virtio,cache=none\n\n"
     "    vmmig run web2 -- vmmig-vmm --attach @socket@ --kernel guest.bin",
     run_run},
    {"attach", "NAME --qmp|--socket PATH", 1, 1, false, attach_options,
     "adopt a VM that already runs",
     "Adopt a VM that runs already: a QEMU (7.2 or later) through its QMP socket, a VMM that links "
     "libvmmig-attach through its own. The VM is not touched.\n\n"
     "    vmmig attach web1 --qmp /run/vmmig/vms/web1.qmp\n\n"
     "    vmmig attach web2 --socket /run/web2.vmm",
     run_attach},
    {"list", "", 0, 0, false, NULL, "the VMs of this host",
     "List the VMs of the agent with what they do now.", run_list},
    {"status", "[NAME]", 0, 1, false, NULL, "one VM, or the agent itself",
     "Tell about one VM: its state, its process, its job, a hand-over that is not finished. "
     "Without a name, about the agent.",
     run_status},
    {"send", "NAME --to HOST", 1, 1, false, send_options, "live-migrate a VM to another host",
     "Move a running VM to another host. The guest runs on while its memory is copied, stands for "
     "a moment, and runs there; if anything fails it runs on here. Its disks are on storage that "
     "both hosts see under the same name, and do not go through a host's page cache (cache=none). "
     "Its sockets are made there under the same names, by the `vm-user` of that agent, who has to "
     "be allowed to. The command follows the job and prints a summary: total time, the guest's "
     "pause, bytes on the wire and saved, rounds, throttling.\n\n"
     "The job belongs to the agent. The first Ctrl-C leaves it running and says so; a second one "
     "within three seconds cancels it.\n\n"
     "A VM that systemd would start again here, with Restart= of its unit, is refused: give the "
     "unit Restart=no first. One of libvirt's moves, and a note says so: undefine the domain here, "
     "and take it from a cluster manager that would miss it. Other supervisors, as a loop in a "
     "shell or a container's restart policy, are not seen: end them.\n\n"
     "    vmmig send web1 --to host2 --downtime-limit 100",
     run_send},
    {"watch", "NAME", 1, 1, false, NULL, "follow a VM's job until it ends",
     "Follow the job of a VM as `send` does in the foreground, with its exit status. If none "
     "runs, the last one is shown.",
     run_watch},
    {"jobs", "", 0, 0, false, NULL, "what is and was under way",
     "List the jobs that run and the last ones that ended, newest first. A restart of the agent "
     "forgets those that ended.",
     run_jobs},
    {"cancel", "NAME|JOB", 1, 1, false, NULL, "cancel the job of a VM, or of the repository",
     "Ask the job of a VM, or that of the repository with that id, to end early: a migration is "
     "undone and the guest runs on at the source. Once the source has committed itself only the "
     "destination decides, and the answer is \"too late\". What there is of a clone that is being "
     "made is taken back.",
     run_cancel},
    {"resolve", "NAME --here --i-fenced HOST|--gone", 1, 1, false, resolve_options,
     "decide a hand-over that is in doubt",
     "When a host dies in the instant of a hand-over, the other one may not know who owns the "
     "guest, and leaves it paused. This command decides, and only you can know: make sure that the "
     "other host is off first. Two copies of a VM on one disk destroy it. Status and doctor say "
     "which verdicts mean something.\n\n"
     "    vmmig resolve web1 --here --i-fenced host2\n\n"
     "Also for a VM that stands here after it was sent, when the journal's record of that is "
     "damaged.",
     run_resolve},
    {"detach", "NAME", 1, 1, false, NULL, "forget a VM, which runs on",
     "The agent forgets the VM and does not touch it. Also for the record of a VM that has ended. "
     "Its disks stay, those of a clone and of a restored VM, too.",
     run_detach},
    {NULL}};

static const struct cli_object objects[] = {
    {"a VM (run, attach, status NAME, detach; list: an array `vms`)",
     "vm, state (running, paused, incoming, postmigrate, broken, unreachable, ended, arriving), "
     "presence (present, unreachable, ended), detail, origin (run, attached, received), pid, "
     "since, driver (qemu, attach), vmm and tracking (what a VMM that links libvmmig-attach calls "
     "itself, and how it finds written pages; null for others), job (a job, or null), handover "
     "(null, or attempt, state, text, peer, in_doubt, can_here, can_gone, settled), and in the answer "
     "about one VM qmp or socket, and argv"},
    {"a job (send, watch, cancel; jobs: an array `jobs`)",
     "job, kind (send, check, receive, snapshot, restore; of the repository: import, export, gc, scrub, rebuild-index, "
     "copy), vm (null: of the repository), peer (or the image), state (running, done, failed, "
     "cancelled), cancelling, started, elapsed_ms, error, phase (preparing, copying, paused, deciding, finishing, "
     "undoing; working), round, total_bytes, remaining_bytes, dirty_rate, working_set_bytes (null if not "
     "known), link_rate, wire_bytes, resent_bytes, opaque_bytes, pages (zero, same, delta, lz4, "
     "zstd, raw: each with pages and wire_bytes), throttle_percent, throttle_max_percent, connections, reconnects, "
     "predicted_pause_ms, pause_ms, note, stored_bytes"},
    {"the agent (status)",
     "software, host, pid, started, listen, vms, jobs_running, rss_anon_bytes, certificate_ends (null: it has none), "
     "certificate (what is wrong with it, or soon will be; null: nothing)"},
    {"resolve", "vm, decided (here, gone)"},
    {"cancel, of a clone", "vm, kind (clone), cancelling"},
    {NULL}};

const struct cli_family cli_family_vm = {"Virtual machines", commands, objects};

# SPDX-License-Identifier: Apache-2.0
"""Compares migrations of the same guest, in turn (A B C A B C ...), in one run: vmmig against QEMU's own.

    /usr/bin/python3 tests/bench/migrate.py [--case NAME]... [--link RATE]... [--rounds N] [--tls]
                                             [--json FILE]
    /usr/bin/python3 tests/bench/migrate.py --markdown FILE...     the tables of such files: docs/bench/migrate.md

Cases:
    linux-1gbit      Linux with 1 GiB, working, over 1 Gbit/s
    random-unshaped  1 GiB that does not compress, over a link without a limit
    unmapped         the same, with a destination that the user prepared: none of its memory is the agent's, who writes
                     it from outside
    unreachable      the same by agents that may not do that: pages go through QEMU's own loader
    modes            vmmig alone, auto beside every --compress: 100 Mbit/s, 1 and 10 Gbit/s and no limit,
                     memory that compresses, does not, and is zero

The guest is booted once and goes back and forth. Prints medians with their spread, and for every metric
vmmig's ratio to the best of QEMU's modes. VMMIG_BUILD names the build folder.

Metrics: total_ms as a user waits for it, from the command until he is told that it is done, the start of
the destination's QEMU included, with every tool; copy_ms the same without that start, with every tool;
pause_ms as a host sees the guest stand still (the stamps of its console's ticks); wire_bytes all that
both hosts sent; cpu_s of both agents and both VMMs without their vCPUs' threads, source_cpu_s and
destination_cpu_s each side's; others_pct how much of the machine's CPU time went elsewhere meanwhile, or was
stolen by the machine's host: above a few percent, the row says little. With --others PERCENT a migration beside which
more went elsewhere is not counted: another one follows, up to REPEATS times.

A machine that is a virtual one itself may give free memory back to its host, 2 s after it became free, and to take it
again costs a destination more CPU time than the rest of its work. So each migration begins only when what the last one
freed has gone: every tool finds the machine alike.

Another program may use Race: with limit_s, a migration that takes longer is cancelled, and Unfinished raised.
"""
import argparse
import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE), os.path.join(os.path.dirname(HERE), 'flow')]

from agents import PKI, UNPRIVILEGED, Cluster, eventually  # noqa: E402
from lab import BareGuest, LinuxGuest, QmpError, linux_guest  # noqa: E402
from lab.guests import built  # noqa: E402

MODES = {
    'qemu-plain': ([], {}),
    'qemu-multifd': (['multifd'], {'multifd-channels': 2}),
    'qemu-multifd-zstd': (['multifd'], {'multifd-channels': 2, 'multifd-compression': 'zstd'}),
    'qemu-xbzrle': (['xbzrle'], {'xbzrle-cache-size': 512 << 20}),  # all that any of these guests rewrites
}
# All may throttle the guest, as vmmig does, and begin no post-copy before memory went once.
# QEMU's modes that are not raced by default: with post-copy the guest runs before its memory is there.
OTHER_MODES = {'qemu-postcopy': (['postcopy-ram'], {})}
CAPABILITIES = ['multifd', 'xbzrle', 'auto-converge', 'events', 'postcopy-ram']
# The tools that are vmmig, with the options of `vmmig send`.
VMMIG = {
    'vmmig-qemu': [],
    'vmmig-lz4': ['--compress', 'lz4'],
    'vmmig-zstd': ['--compress', 'zstd'],
    'vmmig-none': ['--compress', 'none'],
}
METRICS = {'total_ms': 'ms', 'copy_ms': 'ms', 'pause_ms': 'ms', 'wire_bytes': 'B', 'cpu_s': 's', 'others_pct': '%'}
SETTLE_S = 3
HANGS_S = 600  # no migration here takes that long
REPEATS = 6
HZ = os.sysconf('SC_CLK_TCK')


def cpu_times(path):
    with open(path, encoding='ascii') as file:
        fields = file.read().rpartition(')')[2].split()
    return int(fields[11]) + int(fields[12])


def vcpu_threads(pid):
    found = []
    for task in os.listdir(f'/proc/{pid}/task'):
        with contextlib.suppress(OSError):
            with open(f'/proc/{pid}/task/{task}/comm', encoding='ascii') as file:
                found += [task] if file.read().startswith('CPU ') else []
    return found


def cpu_of(pid, vcpus=None):
    """CPU seconds of a process and the threads that it had, without its vCPUs' threads. Of those, threads may end
    before the process does: vcpus, an empty dictionary at first, is where a caller that looks again and again keeps
    what they had used."""
    total = cpu_times(f'/proc/{pid}/stat')
    vcpus = {} if vcpus is None else vcpus
    for task in vcpu_threads(pid):
        with contextlib.suppress(OSError):
            vcpus[task] = cpu_times(f'/proc/{pid}/task/{task}/stat')
    return (total - sum(vcpus.values())) / HZ


def machine_cpu():
    """Seconds that all CPUs were busy, or stolen."""
    with open('/proc/stat', encoding='ascii') as file:
        user, nice, system, _, _, irq, softirq, steal = (int(n) for n in file.readline().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / HZ


def family_cpu(root):
    """Seconds of a process and all its descendants, children that have ended included."""
    children, times = {}, {}
    for pid in filter(str.isdigit, os.listdir('/proc')):
        with contextlib.suppress(OSError):
            with open(f'/proc/{pid}/stat', encoding='ascii', errors='replace') as file:
                fields = file.read().rpartition(')')[2].split()
            children.setdefault(int(fields[1]), []).append(int(pid))
            times[int(pid)] = sum(map(int, fields[11:15])) / HZ
    total, todo = 0, [root]
    while todo:
        pid = todo.pop()
        total += times.get(pid, 0)
        todo += children.get(pid, [])
    return total


def use_tls(qmp, endpoint, agent):
    """QEMU's own, with the agent's certificate."""
    folder = f'{PKI}-{endpoint}'
    os.makedirs(agent.host.path(folder), exist_ok=True)
    for name, qemus in (('ca.crt', 'ca-cert.pem'), ('host.crt', f'{endpoint}-cert.pem'),
                        ('host.key', f'{endpoint}-key.pem')):
        link = agent.host.path(f'{folder}/{qemus}')
        if not os.path.lexists(link):
            os.symlink(f'{PKI}/{name}', link)
    with contextlib.suppress(QmpError):  # there was none
        qmp('object-del', id='bench-tls')
    qmp('object-add', **{'qom-type': 'tls-creds-x509', 'id': 'bench-tls', 'endpoint': endpoint, 'dir': folder,
                         'verify-peer': True})
    qmp('migrate-set-parameters', **{'tls-creds': 'bench-tls'})


def start_agents(cluster, wrapper=()):
    """Agents that can take guests of vmmig-vmm in, and log what until_prepared() reads."""
    for agent in cluster.agents:
        agent.options['attach-vmm'] = built('tools/vmmig-vmm/vmmig-vmm')
        agent.options['log-level'] = 'info'
        agent.start(wrapper=wrapper)


class Unfinished(Exception):
    """A migration that took longer than Race.limit_s: it was cancelled, and the guest runs where it was."""


class Race:
    """One guest that every tool moves in turn."""

    limit_s = None
    boot_s = 600  # Debian under TCG, on a slow machine

    def __init__(self, cluster, vm, dest_qmp=False, wrapper=()):
        self.cluster, self.vm, self.dest_qmp = cluster, vm, dest_qmp
        self.wrapper = wrapper  # the command that runs each VMM
        self.here, self.there = cluster.agents
        self.console = cluster.console(vm.name)
        self.options = []
        self.damaged = dict.fromkeys([*VMMIG, *MODES, *OTHER_MODES], 0)
        self.boot()

    def boot(self):
        mark = self.console.mark()
        self.here.host.popen([*self.wrapper, *self.vm.argv()], name=self.vm.name)
        self.console.wait_for('ready', timeout=self.boot_s, after=mark)
        self.console.wait_ticks(20)
        for pid in self.vmm_pids():
            assert vcpu_threads(pid), 'a VMM whose vCPUs cannot be told from its other threads'

    def is_vmm(self, argv):
        return 'qemu-system' in argv[0] and self.vm.qmp_path in ' '.join(argv)

    def vmm_pids(self, *agents):
        """Of both hosts, or of these."""
        return [pid for agent in agents or (self.here, self.there)
                for pid, argv in agent.host.processes().items() if self.is_vmm(argv)]

    def let_run(self, whether):
        """Or let it stand still, while another guest is moved on the same machine."""
        for pid in self.vmm_pids():
            os.kill(pid, signal.SIGCONT if whether else signal.SIGSTOP)

    def end(self):
        """Kills the guest's VMM."""
        for pid in self.vmm_pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
            eventually('its end', lambda pid=pid: self.ended(pid))

    def run(self, tool):
        """One migration. Returns its metrics."""
        move = (lambda: self.vmmig(VMMIG[tool])) if tool in VMMIG else \
            lambda: self.native(*{**MODES, **OTHER_MODES}[tool])
        mark = self.console.mark()
        agents = [agent.process.pid for agent in (self.here, self.there)]
        time.sleep(SETTLE_S)
        before = [cpu_of(pid) for pid in agents]
        sent = sum(agent.host.bytes_sent() for agent in (self.here, self.there))
        began, busy, ours = time.monotonic(), machine_cpu(), family_cpu(os.getpid())
        total, copy, cpu = move()
        others = machine_cpu() - busy - (family_cpu(os.getpid()) - ours)
        others /= (time.monotonic() - began) * os.cpu_count()
        sent = sum(agent.host.bytes_sent() for agent in (self.here, self.there)) - sent
        cpu = [vmm + cpu_of(pid) - used for vmm, pid, used in zip(cpu, agents, before)]
        self.here, self.there = self.there, self.here
        pause = self.judge(tool, mark)
        return {'total_ms': total * 1000, 'copy_ms': copy * 1000, 'pause_ms': pause * 1000, 'wire_bytes': sent,
                'cpu_s': sum(cpu), 'others_pct': max(0, others * 100), 'source_cpu_s': cpu[0],
                'destination_cpu_s': cpu[1]}

    def judge(self, tool, mark):
        """The pause. A guest whose memory QEMU's own migration damaged (TCG, before QEMU 9.0) is counted and
        booted anew; one that vmmig damaged ends the benchmark."""
        try:
            self.console.wait_ticks(20, timeout=30)
            self.console.check(after=mark)
            return self.console.pause(after=mark)
        except (AssertionError, TimeoutError):
            if tool in VMMIG:
                raise
            self.damaged[tool] += 1
            self.end()
            self.forget_sockets(self.here)
            self.boot()
            return float('nan')

    def forget_sockets(self, agent):
        """Of a QEMU that was killed; one that ended by itself has removed them."""
        for path in (self.vm.qmp_path, self.vm.judge_path):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(agent.host.path(path))

    def start_destination(self):
        self.there.host.popen([*self.wrapper, *self.vm.argv(incoming='defer')], name=self.vm.name)
        eventually('the destination', lambda: os.path.exists(self.there.host.path(self.vm.judge_path)))
        return self.vm.qmp(self.there.host)

    def until_prepared(self):
        """Seconds from the command to the destination's readiness, as the source's agent logged them."""
        said = self.here.log()
        begin, ready = (re.findall(rf'^ts=\S+T(\d+):(\d+):([\d.]+)Z .*{what}', said, re.MULTILINE)[-1]
                        for what in ('msg="job begins" kind=send', 'to=SRC_SENDING'))
        begin, ready = (int(h) * 3600 + int(m) * 60 + float(sec) for h, m, sec in (begin, ready))
        return (ready - begin) % 86400

    def vmmig(self, options):
        self.here.vmmig('attach', self.vm.name, '--qmp', self.vm.qmp_path)
        options = [*options, *self.options]
        if self.dest_qmp:
            self.start_destination()
            options += ['--dest-qmp', self.vm.qmp_path]
        try:
            total, cpu = self.send(options)
        except Unfinished:
            self.here.vmmig('detach', self.vm.name)
            raise
        target = self.there.json('status', self.vm.name)['pid']
        self.there.vmmig('detach', self.vm.name)
        return total, total - self.until_prepared(), (cpu, cpu_of(target))

    def send(self, options):
        """Runs `vmmig send`. Returns how long it took, and the CPU seconds of the source's VMM; what it said is
        self.last."""
        source = self.here.json('status', self.vm.name)['pid']
        vcpus = {}
        used = last = cpu_of(source, vcpus)
        start = time.monotonic()
        job = self.here.popen('send', self.vm.name, '--to', self.there.host.name, '--json', *options)
        # The source's VMM ends before the command does: read its CPU time as long as it is there.
        while job.poll() is None:
            with contextlib.suppress(OSError):
                last = cpu_of(source, vcpus)
            if self.late(start):
                self.here.vmmig('cancel', self.vm.name, check=False)
                job.wait(HANGS_S)
            time.sleep(0.005)
        total = time.monotonic() - start
        said = job.communicate()[0]
        if job.returncode and self.late(start):
            raise Unfinished
        assert job.returncode == 0, said
        self.last = json.loads(said)
        return total, last - used

    def late(self, start):
        return self.limit_s and time.monotonic() - start > self.limit_s

    def ended(self, pid):
        self.here.host.reap()
        self.there.host.reap()
        return not os.path.exists(f'/proc/{pid}')

    def native(self, capabilities, parameters):
        source, began = self.vm.qmp(self.here.host), time.monotonic()
        target = self.start_destination()
        source_pid, = self.vmm_pids(self.here)
        target_pid, = self.vmm_pids(self.there)
        for qmp, endpoint, agent in ((source, 'client', self.here), (target, 'server', self.there)):
            qmp('migrate-set-capabilities', capabilities=[
                {'capability': name, 'state': name in [*capabilities, 'events', 'auto-converge']}
                for name in CAPABILITIES])
            qmp('migrate-set-parameters', **{'max-bandwidth': 100 << 30, 'downtime-limit': 300,
                                             'multifd-channels': 2, 'multifd-compression': 'none', **parameters})
            if not self.cluster.plain:
                use_tls(qmp, endpoint, agent)
        target('migrate-incoming', uri='tcp:0.0.0.0:4444')
        used = cpu_of(source_pid)
        start = time.monotonic()
        source('migrate', uri=f'tcp:{self.there.host.name}:4444')
        while (info := source('query-migrate'))['status'] not in ('completed', 'failed'):
            assert time.monotonic() - start < HANGS_S, f'QEMU is {info["status"]} for ever'
            if 'postcopy-ram' in capabilities and info['status'] == 'active' \
                    and info.get('ram', {}).get('dirty-sync-count', 0) > 1:
                source('migrate-start-postcopy')
            elif self.late(began) and info['status'] == 'active':
                self.abandon(source, target_pid)
            time.sleep(0.005)
        assert info['status'] == 'completed', info
        eventually('the guest', lambda: target('query-status')['status'] == 'running')
        total, copy = time.monotonic() - began, time.monotonic() - start
        cpu = cpu_of(source_pid) - used, cpu_of(target_pid)
        os.kill(source_pid, 9)
        eventually('the end of the source', lambda: self.ended(source_pid))
        self.forget_sockets(self.here)
        return total, copy, cpu

    def abandon(self, source, target_pid):
        """Ends a migration of QEMU's that does not come to an end."""
        source('migrate_cancel')
        eventually('the cancelling', lambda: source('query-migrate')['status'] == 'cancelled')
        os.kill(target_pid, 9)
        eventually('the end of the destination', lambda: self.ended(target_pid))
        self.forget_sockets(self.there)
        raise Unfinished


def linux_1gbit(plain):
    kernel, initrd = linux_guest(os.environ.get('VMMIG_CACHE', '/var/tmp/vmmig-cache'))
    vm = LinuxGuest('bench', mem_mib=1024, kernel=kernel, initrd=initrd, work_mib=192, rate_mbps=5, tick_ms=20)
    return Cluster(rate='1gbit', plain=plain), vm, False, ['vmmig-qemu', *MODES]


def random_guest():
    return BareGuest('bench', mem_mib=1024, dirty_mib=8, rate_mbps=5, scan_mbps=0, fill='random')


def random_unshaped(plain):
    return Cluster(plain=plain), random_guest(), False, ['vmmig-qemu', *MODES]


def unmapped(plain):
    return Cluster(plain=plain), random_guest(), True, ['vmmig-qemu', 'qemu-plain']


def unreachable(plain):
    return Cluster(plain=plain, wrapper=UNPRIVILEGED), random_guest(), True, ['vmmig-qemu', 'qemu-plain']


CASES = {'linux-1gbit': linux_1gbit, 'random-unshaped': random_unshaped, 'unmapped': unmapped,
         'unreachable': unreachable}
# Link, and how much memory is moved over it.
LINKS = {'100mbit': 64, '1gbit': 384, '10gbit': 512, None: 512}
FILLS = ['text', 'random', 'zero']


def undisturbed(contest, tool, others, repeats=REPEATS):
    """A migration beside which no more than that share of the machine's CPU time went elsewhere, or the last one."""
    for _ in range(repeats):
        run = contest.run(tool)
        if run['others_pct'] <= others:
            break
    return run


def race(name, cluster, vm, dest_qmp, tools, rounds, others=100):
    results = {tool: [] for tool in tools}
    with cluster:
        # Of QEMUs that may more than the agents these could not see enough.
        contest = Race(cluster, vm, dest_qmp, wrapper=UNPRIVILEGED if name == 'unreachable' else ())
        contest.run(tools[0])  # warms up: not counted
        for _ in range(rounds):
            for tool in tools:
                results[tool].append(undisturbed(contest, tool, others))
                print(f'  {name} {tool}: ' + ', '.join(f'{m} {v:.4g}' for m, v in results[tool][-1].items()),
                      file=sys.stderr, flush=True)
    return results, contest.damaged


def modes(rounds, plain, links=None):
    """Yields a name, its results and what was damaged, for every link and content."""
    for rate, mib in LINKS.items():
        for fill in FILLS:
            if links and (rate or 'unshaped') not in links:
                continue
            name = f'{fill}-{rate or "unshaped"}'
            vm = BareGuest('bench', mem_mib=mib, dirty_mib=4, rate_mbps=1, scan_mbps=0, fill=fill)
            yield name, *race(name, Cluster(rate=rate, plain=plain), vm, False, list(VMMIG), rounds)


def run_case(name, rounds, plain, links=None, others=100):
    """Yields a name, its results and what was damaged."""
    if name == 'modes':
        yield from modes(rounds, plain, links)
    else:
        yield name, *race(name, *CASES[name](plain), rounds, others)


def median(runs, metric):
    """Of the runs that have the metric."""
    values = [run[metric] for run in runs if run[metric] == run[metric]]
    return statistics.median(values) if values else float('nan')


def show(name, results, damaged):
    print(f'\n{name}\n{"":22}' + ''.join(f'{metric:>24}' for metric in METRICS))
    middle = {tool: {m: median(runs, m) for m in METRICS} for tool, runs in results.items()}
    for tool, runs in results.items():
        cells = []
        for metric in METRICS:
            values = [run[metric] for run in runs if run[metric] == run[metric]] or [float('nan')]
            cells.append(f'{middle[tool][metric]:.4g} ({min(values):.4g}-{max(values):.4g})')
        print(f'{tool:22}' + ''.join(f'{cell:>24}' for cell in cells)
              + (f'   damaged the guest {damaged[tool]} times' if damaged[tool] else ''))
    best = {m: min(middle[tool][m] for tool in results if tool != 'vmmig-qemu') for m in METRICS}
    ratios = [middle['vmmig-qemu'][m] / best[m] if best[m] else float('nan') for m in METRICS]
    print(f'{"vmmig / best other":22}' + ''.join(f'{ratio:>24.2f}' for ratio in ratios))


UNITS = {'ms': (1, 'ms'), 'B': (1e-6, 'MB'), 's': (1, 's'), '%': (1, '%')}
TITLES = {
    'linux-1gbit': 'Linux with 1 GiB under TCG, at work, over 1 Gbit/s',
    'random-unshaped': '1 GiB that does not compress, over a link without a limit',
    'unmapped': 'the same into a destination that the user prepared',
    'unreachable': 'the same by agents that may not write into it',
}


def short(value):
    return f'{value:.3g}' if value < 1000 else f'{value:.0f}'


def markdown_table(case, rows):
    """rows: the results of one case. Bold is vmmig's where a peer is better."""
    tools = list(dict.fromkeys(row['tool'] for row in rows))
    found = {(row['tool'], row['metric']): row for row in rows}
    metrics = [metric for metric in METRICS if metric != 'others_pct']
    yield f'| {TITLES.get(case, case)} | ' + ' | '.join(
        f'{metric.rpartition("_")[0].replace("_", " ")}, {UNITS[METRICS[metric]][1]}' for metric in metrics) + ' |'
    yield '|---' * (len(metrics) + 1) + '|'
    for tool in tools:
        cells = []
        for metric in metrics:
            scale = UNITS[METRICS[metric]][0]
            runs = [run * scale for run in found[tool, metric]['runs'] if run == run]
            if not runs:
                cells.append('—')
                continue
            middle = found[tool, metric]['median'] * scale
            best = min(found[other, metric]['median'] for other in tools) * scale
            mark = '**' if tool == 'vmmig-qemu' and middle > best else ''
            cells.append(f'{mark}{short(middle)}{mark} ({short(min(runs))}–{short(max(runs))})')
        lost = found[tool, metrics[0]]['damaged_guests']
        yield f'| {tool}{f" (damaged the guest {lost} times)" if lost else ""} | ' + ' | '.join(cells) + ' |'


def markdown(paths):
    yield '# Migrations beside QEMU\'s own'
    yield ''
    yield 'Made by `tests/bench/migrate.py`, which says what is measured and how; no figure is typed by hand. Medians,'
    yield 'with the smallest and largest of the runs, which took turns. Where a peer is better, vmmig\'s figure is bold.'
    for path in paths:
        with open(path, encoding='utf-8') as file:
            run = json.load(file)
        machine = run['machine']
        for case in dict.fromkeys(row['case'] for row in run['results']):
            rows = [row for row in run['results'] if row['case'] == case]
            yield ''
            others = max(max(row['runs']) for row in rows if row['metric'] == 'others_pct')
            yield (f'{machine["cpus"]} cores, Linux {machine["kernel"]}, {machine["qemu"]}, '
                   f'{"TLS on both sides" if machine["tls"] else "without TLS"}; {len(rows[0]["runs"])} of each tool, '
                   f'while at most {others:.0f} % of the CPU time went elsewhere.')
            yield ''
            yield from markdown_table(case, rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--case', action='append', choices=[*CASES, 'modes'])
    parser.add_argument('--link', action='append', choices=[link or 'unshaped' for link in LINKS],
                        help='only these links of the case modes')
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--tls', action='store_true', help='both sides with TLS')
    parser.add_argument('--json', metavar='FILE')
    parser.add_argument('--others', metavar='PERCENT', type=float, default=100,
                        help='what may go elsewhere of the CPU time beside a migration that counts')
    parser.add_argument('--markdown', metavar='FILE', nargs='+', help='measure nothing, show what these files hold')
    options = parser.parse_args()
    if options.markdown:
        print('\n'.join(markdown(options.markdown)))
        return
    version = subprocess.run(['qemu-system-x86_64', '--version'], capture_output=True, text=True,
                             check=True).stdout.splitlines()[0]
    machine = {'cpus': os.cpu_count(), 'kernel': os.uname().release, 'qemu': version, 'tls': options.tls,
               'others': options.others}
    results = []
    for case in options.case or CASES:
        for name, found, damaged in run_case(case, options.rounds, not options.tls, options.link,
                                             options.others):
            show(name, found, damaged)
            results += [{'case': name, 'tool': tool, 'metric': metric, 'unit': unit,
                         'runs': [run[metric] for run in runs],
                         'median': median(runs, metric), 'damaged_guests': damaged[tool]}
                        for tool, runs in found.items() for metric, unit in METRICS.items()]
    if options.json:
        with open(options.json, 'w', encoding='utf-8') as file:
            json.dump({'machine': machine, 'results': results}, file, indent=1)


if __name__ == '__main__':
    main()

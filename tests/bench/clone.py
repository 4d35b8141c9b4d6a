#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""How fast a VM is there: vmmig clone beside QEMU's own ways, in one run.

usage: clone.py [--rounds N] [--cold N] [--clones N] [--store dir|rados] [--json FILE]

A bare guest of 512 MiB. Times in ms, medians: from exec of QEMU until it says that the guest runs
(start), from typing the command (typed), and from typing it to the guest's first sign of life (alive).
A cold clone is one on a host that has nothing of the template, nor a mount; the first of all is without a
working set. waits: reads of a clone, until that sign, that had to wait for the repository.

Sharing: the physical memory of all clones' guest mappings, beside what they need: the pages whose content
differs from the template's, each clone's own, and one copy of those that any of them has mapped of it.

rados: a cluster of two OSDs on this machine; only clones are measured then.
"""
import argparse
import array
import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE), *(os.path.join(os.path.dirname(HERE), part) for part in ('flow', 'ceph'))]

import cluster as ceph_cluster  # noqa: E402
from agents import Cluster, eventually  # noqa: E402
from lab import BareGuest  # noqa: E402
from lab.guests import built  # noqa: E402
from lab.qmp import Qmp  # noqa: E402

MEMORY_MIB = 512
REPO = '/var/lib/vmmig/repo'
MOUNT = '/run/vmmig/images'
PAGE = 4096


def make_agent(cluster, url=None):
    agent = cluster.agents[0]
    url = url or 'dir:' + agent.host.path(REPO)
    folder = os.path.dirname(os.path.dirname(built('agent/vmmigd')))
    agent.options.update({'nbdkit-plugin': f'{folder}/snapshot/nbdkit-vmmig-plugin.so',
                          'libexec-dir': f'{folder}/snapshot', 'cache-dir': '/var/lib/vmmig/cache',
                          'record-time': '1000', 'repository': url})
    agent.host.run([built('tests/unit/repo/repo_tool'), url, 'init'])
    return agent.start()


def make_template(cluster, url=None, **guest):
    """An agent with a template bench:v1, the guest that it was made of and which has ended, and the file in
    which QEMU saved it (beside the snapshot `one` on its disk)."""
    agent = make_agent(cluster, url)
    vm = BareGuest('web1', mem_mib=MEMORY_MIB, dirty_mib=4, rate_mbps=1, **guest)
    disk = os.path.join(cluster.shared, 'web1.qcow2')
    subprocess.run(['qemu-img', 'create', '-q', '-f', 'qcow2', disk, '1G'], check=True)
    vm.options = ['-blockdev', f'driver=qcow2,node-name=d0,file.driver=file,file.filename={disk}',
                  '-device', 'virtio-blk-pci,drive=d0']
    console = cluster.console('web1')
    process = agent.host.popen(vm.argv(), name='web1')
    console.wait_for('ready', timeout=60)
    agent.vmmig('attach', 'web1', '--qmp', vm.qmp_path)
    agent.vmmig('snapshot', 'web1', 'first')
    agent.vmmig('template', 'publish', 'web1@first', 'bench:v1')
    q = vm.qmp(agent.host)
    saved = os.path.join(cluster.shared, 'saved')
    q('stop')
    q('human-monitor-command', command_line='savevm one')
    q('migrate', uri=f'exec:cat > {saved}')
    eventually('saved', lambda: q('query-migrate').get('status') == 'completed', timeout=60)
    q('quit')
    process.wait()
    return agent, vm, saved


def end(agent, clones):
    for clone in clones:
        os.kill(clone['pid'], signal.SIGKILL)
    for clone in clones:
        eventually('ended', lambda c=clone: agent.json('status', c['vm'])['state'] == 'ended')
        agent.vmmig('detach', clone['vm'])
        subprocess.run(['rm', '-rf', agent.host.path(f'/var/lib/vmmig/clones/{clone["vm"]}')], check=True)


def mapped(pid):
    """KiB of the guest's RAM in that process: shared with others, and its own."""
    shared = own = 0
    inside = False
    with open(f'/proc/{pid}/smaps', encoding='ascii', errors='replace') as smaps:
        for line in smaps:
            if re.match(r'^[0-9a-f]+-[0-9a-f]+ ', line):
                inside = line.rstrip().endswith('memory.raw')
            elif inside and line.startswith(('Shared_Clean', 'Private_Clean')):
                shared += int(line.split()[1])
            elif inside and line.startswith('Private_Dirty'):
                own += int(line.split()[1])
    return shared, own


def measure_clones(agent, rounds):
    start, typed = [], []
    for i in range(rounds + 1):
        agent.cluster.console(f'c{i}')
        began = time.monotonic()
        made, = agent.json('clone', 'bench:v1', '--as', f'c{i}')['clones']
        took = 1000 * (time.monotonic() - began)
        if i:  # the first one makes the model of the overlay, and reads from the repository
            start.append(made['start_ms'])
            typed.append(took)
        else:
            first = took
            time.sleep(2)
        end(agent, [made])
    return {'first_typed': first, 'start': statistics.median(start), 'typed': statistics.median(typed)}


def measure_cold(agent, rounds):
    """The first is the first clone of the template at all, which has no working set yet."""
    found = []
    os.makedirs(agent.host.path(MOUNT), exist_ok=True)
    for i in range(rounds + 1):
        eventually('nobody uses the mount', lambda: agent.vmmig('unmount', MOUNT, check=False).returncode == 0)
        console = agent.cluster.console(f'cold{i}')
        began = time.monotonic()
        made, = agent.json('clone', 'bench:v1', '--as', f'cold{i}')['clones']
        typed = time.monotonic()
        alive = console.wait_for('^hb ').at
        seen = agent.json('mount', MOUNT)
        eventually('the working set', lambda: agent.json('template', 'show', 'bench:v1')['working_set'])
        end(agent, [made])
        found.append({'start_ms': made['start_ms'], 'typed_ms': 1000 * (typed - began),
                      'alive_ms': 1000 * (alive - began), 'waits': seen['waits'],
                      'fetched_mib': seen['fetched_bytes'] / 2 ** 20})
    return {'first': found[0], 'later': {key: statistics.median(run[key] for run in found[1:]) for key in found[0]}}


def pages_of(pid):
    """Of the guest's RAM in that process, pages that are there: page number -> (frame, is it of the file)."""
    with open(f'/proc/{pid}/maps', encoding='ascii', errors='replace') as maps:
        ranges = [tuple(int(word, 16) for word in line.split()[0].split('-') + [line.split()[2]])
                  for line in maps if line.rstrip().endswith('memory.raw')]
    found = {}
    with open(f'/proc/{pid}/pagemap', 'rb', buffering=0) as pagemap:
        for low, high, offset in ranges:
            pagemap.seek(low // PAGE * 8)
            entries = array.array('Q', pagemap.read((high - low) // PAGE * 8))
            for number, entry in enumerate(entries, offset // PAGE):
                if entry >> 63:
                    found[number] = (entry & (1 << 55) - 1, entry >> 61 & 1)
    return found, ranges


def count_changed(pid, ranges, numbers, template):
    """How many of these pages differ from the template's."""
    changed = 0
    with open(f'/proc/{pid}/mem', 'rb', buffering=0) as memory:
        for number in numbers:
            low, _, offset = next(r for r in ranges if 0 <= number * PAGE - r[2] < r[1] - r[0])
            at = low + number * PAGE - offset
            changed += os.pread(memory.fileno(), PAGE, at) != os.pread(template, PAGE, number * PAGE)
    return changed


def measure_sharing(agent, n, template_name='bench:v1'):
    for i in range(n):
        agent.cluster.console(f'many-{i + 1}')
    made = agent.json('clone', template_name, '--as', 'many', '--count', str(n))['clones']
    time.sleep(1)  # of work
    frames, touched, written = set(), set(), 0
    image = made[0]['template']
    for clone in made:
        os.kill(clone['pid'], signal.SIGSTOP)
    path = f'/proc/{agent.host.pid}/root{MOUNT}/t:{image}/memory.raw'
    with open(path, 'rb', buffering=0) as template:
        for clone in made:
            pages, ranges = pages_of(clone['pid'])
            frames |= {frame for frame, _ in pages.values()}
            touched |= {number for number, (_, of_file) in pages.items() if of_file}
            written += count_changed(clone['pid'], ranges, [k for k, (_, of_file) in pages.items() if not of_file],
                                     template.fileno())
    for clone in made:
        os.kill(clone['pid'], signal.SIGCONT)
    seen = agent.json('mount', MOUNT)
    end(agent, made)
    return {'clones': n, 'resident_mib': len(frames) * PAGE / 2 ** 20, 'written_mib': written * PAGE / 2 ** 20,
            'template_touched_mib': len(touched) * PAGE / 2 ** 20, 'cache_mib': seen['cache_bytes'] / 2 ** 20,
            'resident_over_need': len(frames) / (written + len(touched))}


def until_running(process, path):
    began = time.monotonic()
    eventually('QMP', lambda: os.path.exists(path))
    q = Qmp(path)
    while q('query-status')['status'] in ('inmigrate', 'prelaunch', 'restore-vm'):
        time.sleep(.0005)
    return q, 1000 * (time.monotonic() - began)


def measure_qemu(agent, vm, words, rounds):
    times = []
    for _ in range(rounds):
        path = agent.host.path(vm.judge_path)
        for old in (path, agent.host.path(vm.qmp_path)):
            if os.path.exists(old):
                os.unlink(old)
        began = time.monotonic()
        process = agent.host.popen([*vm.argv(), *words], name='other')
        q, _ = until_running(process, path)
        times.append(1000 * (time.monotonic() - began))
        q('quit')
        process.wait()
    return statistics.median(times)


@contextlib.contextmanager
def store(cluster, kind):
    """The URL of a repository; None: the agent's own."""
    if kind == 'dir':
        yield None
        return
    with tempfile.TemporaryDirectory() as folder, \
            ceph_cluster.CephCluster(folder, osds=2, network_of=cluster.hosts[0].pid) as ceph:
        ceph.create_pool('images')
        yield f'rados:images?conf={ceph.conf}'


def show(result):
    clone, cold = result['clone'], result['cold']
    print(f'{result["store"]}: medians, ms      start    typed    alive   waits   fetched MiB')
    print(f'clone                  {clone["start"]:7.1f}  {clone["typed"]:7.1f}')
    for name, run in (('cold', cold['later']), ('cold, the first ever', cold['first'])):
        print(f'{name:22} {run["start_ms"]:7.1f}  {run["typed_ms"]:7.1f}  {run["alive_ms"]:7.1f}  {run["waits"]:6.0f}'
              f'  {run["fetched_mib"]:8.1f}')
    for name in ('incoming_file', 'loadvm'):
        if name in result:
            print(f'-{name:21} {result[name]:7.1f}')
    if 'sharing' in result:
        s = result['sharing']
        print(f'{s["clones"]} clones: resident {s["resident_mib"]:.1f} MiB; they wrote {s["written_mib"]:.1f} and touched '
              f'{s["template_touched_mib"]:.1f} MiB of the template: {s["resident_over_need"]:.2f} of their need')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=20)
    parser.add_argument('--cold', type=int, default=5)
    parser.add_argument('--clones', type=int, default=50)
    parser.add_argument('--store', choices=('dir', 'rados'), default='dir')
    parser.add_argument('--json')
    options = parser.parse_args()
    result = {'store': options.store}
    with Cluster(hosts=1, start=False, plain=True) as cluster, store(cluster, options.store) as url:
        agent, vm, saved = make_template(cluster, url, scan_mbps=0)  # it touches what it works with
        result['cold'] = measure_cold(agent, options.cold)
        result['clone'] = measure_clones(agent, options.rounds)
        if options.store == 'dir':
            result['sharing'] = measure_sharing(agent, options.clones)
            few = max(3, options.rounds // 4)
            result['incoming_file'] = measure_qemu(agent, vm, ['-incoming', f'exec:cat {saved}'], few)
            result['loadvm'] = measure_qemu(agent, vm, ['-loadvm', 'one'], few)
    show(result)
    if options.json:
        with open(options.json, 'w', encoding='ascii') as file:
            json.dump(result, file, indent=1)


if __name__ == '__main__':
    main()

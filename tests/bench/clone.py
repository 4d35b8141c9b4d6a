#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""How fast a VM is there: vmmig clone beside QEMU's own ways, in one run.

usage: clone.py [--rounds N] [--clones N] [--json FILE]

A bare guest of 512 MiB. Times in ms, medians: from exec of QEMU until it says that the guest runs
(start), and from typing the command (typed). Sharing: resident memory of all clones' guest mappings
beside what they wrote plus one copy of what they touched of the template.
"""
import argparse
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

from agents import Cluster, eventually  # noqa: E402
from lab import BareGuest  # noqa: E402
from lab.guests import built  # noqa: E402
from lab.qmp import Qmp  # noqa: E402

MEMORY_MIB = 512
REPO = '/var/lib/vmmig/repo'


def make_agent(cluster):
    agent = cluster.agents[0]
    folder = os.path.dirname(os.path.dirname(built('agent/vmmigd')))
    agent.options.update({'nbdkit-plugin': f'{folder}/snapshot/nbdkit-vmmig-plugin.so',
                          'libexec-dir': f'{folder}/snapshot', 'cache-dir': '/var/lib/vmmig/cache',
                          'record-time': '1000'})
    subprocess.run([built('tests/unit/repo/repo_tool'), 'dir:' + agent.host.path(REPO), 'init'], check=True)
    return agent.start()


def make_template(cluster, **guest):
    """An agent with a template bench:v1, the guest that it was made of and which has ended, and the file in
    which QEMU saved it (beside the snapshot `one` on its disk)."""
    agent = make_agent(cluster)
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


def measure_sharing(agent, n):
    for i in range(n):
        agent.cluster.console(f'many-{i + 1}')
    made = agent.json('clone', 'bench:v1', '--as', 'many', '--count', str(n))['clones']
    time.sleep(1)
    pairs = [mapped(clone['pid']) for clone in made]
    touched = max(shared for shared, _ in pairs)
    written = sum(own for _, own in pairs)
    mount = agent.json('mount', '/run/vmmig/images')
    end(agent, made)
    return {'clones': n, 'written_mib': written / 1024, 'template_touched_mib': touched / 1024,
            'cache_mib': mount['cache_bytes'] / 2 ** 20,
            'resident_over_need': (written + touched) / (written + touched) if written + touched else 0}


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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=20)
    parser.add_argument('--clones', type=int, default=50)
    parser.add_argument('--json')
    options = parser.parse_args()
    result = {}
    with Cluster(hosts=1, start=False, plain=True) as cluster:
        agent, vm, saved = make_template(cluster)
        result['clone'] = measure_clones(agent, options.rounds)
        result['sharing'] = measure_sharing(agent, options.clones)
        few = max(3, options.rounds // 4)
        result['incoming_file'] = measure_qemu(agent, vm, ['-incoming', f'exec:cat {saved}'], few)
        result['loadvm'] = measure_qemu(agent, vm, ['-loadvm', 'one'], few)
    print(f'clone           start {result["clone"]["start"]:7.1f} ms   typed {result["clone"]["typed"]:7.1f} ms   '
          f'(the first: {result["clone"]["first_typed"]:.0f} ms)')
    print(f'-incoming file  start {result["incoming_file"]:7.1f} ms')
    print(f'-loadvm         start {result["loadvm"]:7.1f} ms')
    s = result['sharing']
    print(f'{s["clones"]} clones: wrote {s["written_mib"]:.1f} MiB, touched {s["template_touched_mib"]:.1f} MiB of the '
          'template')
    if options.json:
        with open(options.json, 'w', encoding='ascii') as file:
            json.dump(result, file, indent=1)


if __name__ == '__main__':
    main()

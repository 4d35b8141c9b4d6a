# SPDX-License-Identifier: Apache-2.0
"""Clones of a guest of 512 MiB (the bare guest: no operating system): vmmig clone beside QEMU's -incoming file, -loadvm
and a cold boot of the same guest.

    start      start_ms: from exec of QEMU until the guest runs (of a cold boot: until it says that it is ready);
               request_ms: until it has answered a request that touches 50 MiB, of vmmig from typing the command, of the
               others from exec; typed_ms: from typing `vmmig clone` until it says that the clone runs. One round of
               all is not counted, and there are 2 s before each start
    1, 10, 50  resident_bytes: the memory of so many guests together, a page that they share counted once, without
               QEMU's own; need_bytes: what they wrote, and one copy of what they touched of the template
"""
import os
import re
import sys
import time

import clone
from agents import Cluster
from lab import BareGuest

REQUEST_MIB = 50
PLANS = {True: {'rounds': 5, 'counts': (1, 10)}, False: {'rounds': 20, 'counts': (1, 10, 50)}}
PEER_COUNTS = (1, 10)  # 50 of them do not fit


def answered_ms(console, began, mark=0):
    console.send(f'verify {REQUEST_MIB}')
    line = console.wait_for('^verified', after=mark)
    assert line.text.endswith('errors=0'), line.text
    return 1000 * (line.at - began)


class Scene:
    """An agent with a template, and the same guest as QEMU itself saved it."""

    def __init__(self, cluster):
        self.cluster = cluster
        self.agent, self.vm, self.saved = clone.make_template(cluster, scan_mbps=0)
        self.number = 0

    def clone(self, count=1):
        """Consoles and what the command said."""
        self.number += 1
        name = f'c{self.number}'
        names = [name] if count == 1 else [f'{name}-{i + 1}' for i in range(count)]
        consoles = [self.cluster.console(n) for n in names]
        words = [] if count == 1 else ['--count', str(count)]
        return consoles, self.agent.json('clone', 'bench:v1', '--as', name, *words)['clones']

    def vmmig(self):
        began = time.monotonic()
        (console,), made = self.clone()
        typed_ms = 1000 * (time.monotonic() - began)
        run = {'start_ms': made[0]['start_ms'], 'request_ms': answered_ms(console, began), 'typed_ms': typed_ms}
        clone.end(self.agent, made)
        return run

    def start_peer(self, words, number=0):
        """A QEMU, its QMP client, and when it was started."""
        vm = BareGuest(f'web1{number or ""}', **{k: getattr(self.vm, k) for k in
                                                 ('mem_mib', 'dirty_mib', 'rate_mbps', 'scan_mbps')})
        vm.options = self.vm.options if not number else [*self.vm.options[:1], self.vm.options[1] + ',read-only=on',
                                                         *self.vm.options[2:]]
        console = self.cluster.console(vm.name)
        for path in (vm.judge_path, vm.qmp_path):
            if os.path.exists(self.agent.host.path(path)):
                os.unlink(self.agent.host.path(path))
        mark, began = console.mark(), time.monotonic()
        process = self.agent.host.popen([*vm.argv(), *words], name='peer')
        return vm, console, mark, began, process

    def peer(self, words):
        vm, console, mark, began, process = self.start_peer(words)
        if words:
            q, _ = clone.until_running(process, self.agent.host.path(vm.judge_path))
            q('cont')  # it was saved while it stood still
        else:
            console.wait_for('ready', after=mark)
            q = vm.qmp(self.agent.host)
        started = time.monotonic() - began
        run = {'start_ms': 1000 * started, 'request_ms': answered_ms(console, began, mark)}
        q('quit')
        process.wait()
        return run

    def peers(self):
        return {'qemu-incoming-file': ['-incoming', f'exec:cat {self.saved}'], 'qemu-loadvm': ['-loadvm', 'one'],
                'qemu-cold-boot': []}


def resident(pid):
    """Bytes of the guest's RAM in that process, shared ones as their part."""
    total, inside = 0, False
    with open(f'/proc/{pid}/smaps', encoding='ascii', errors='replace') as smaps:
        for line in smaps:
            if found := re.match(r'^([0-9a-f]+)-([0-9a-f]+) ', line):
                inside = int(found.group(2), 16) - int(found.group(1), 16) == clone.MEMORY_MIB << 20
            elif inside and line.startswith('Pss:'):
                total += int(line.split()[1]) << 10
    return total


def measure_many(results, scene, counts):
    for count in counts:
        _, made = scene.clone(count)
        time.sleep(1)  # of work
        pairs = [clone.mapped(vm['pid']) for vm in made]
        need = (max(shared for shared, _ in pairs) + sum(own for _, own in pairs)) << 10
        results.add(str(count), 'vmmig-dir', 'resident_bytes', [sum(resident(vm['pid']) for vm in made)])
        results.add(str(count), 'vmmig-dir', 'need_bytes', [need])
        clone.end(scene.agent, made)
    for count in [n for n in counts if n in PEER_COUNTS]:
        total = 0
        started = [scene.start_peer(['-snapshot', *scene.peers()['qemu-incoming-file']], i) for i in range(count)]
        for vm, _, _, _, process in started:
            q, _ = clone.until_running(process, scene.agent.host.path(vm.judge_path))
            total += resident(process.pid)
            q('quit')
            process.wait()
        results.add(str(count), 'qemu-incoming-file', 'resident_bytes', [total])


def run(results, quick, _):
    plan = PLANS[quick]
    with Cluster(hosts=1, start=False, plain=True) as cluster:
        scene = Scene(cluster)
        tools = {'vmmig-dir': scene.vmmig, **{name: lambda words=words: scene.peer(words)
                                              for name, words in scene.peers().items()}}
        found = {tool: [] for tool in tools}
        for number in range(plan['rounds'] + 1):
            for tool, measure in tools.items():
                time.sleep(2)
                run = measure()
                found[tool] += [run] if number else []
                print(f'  {tool}: {run}', file=sys.stderr, flush=True)
        for tool, runs in found.items():
            results.add_all('start', tool, runs)
        results.save()
        measure_many(results, scene, plan['counts'])

#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""How long a guest stands still for a snapshot, beside what QEMU itself needs for that.

usage: snapshot.py [--rounds N] [--memory MIB] [--json FILE]

A bare guest, all of whose memory is filled, with a raw disk and a qcow2 one. In each round, in turn, from the STOP to
the RESUME that QEMU reports, in ms:

    state      stop, device state, cont: QEMU's xen-save-devices-state into /dev/null
    protect    the same, and QEMU protects memory: background-snapshot into a program that reads and forgets
    vmmig      vmmig snapshot; the first is of everything, the others are incremental

extra is vmmig beyond the median of state, and beyond that of protect.
"""
import argparse
import json
import os
import statistics
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), os.path.join(os.path.dirname(HERE), 'flow'),
                os.path.join(os.path.dirname(HERE), 'flow', 'snapshot')]

from agents import Cluster, eventually  # noqa: E402
from lab import BareGuest  # noqa: E402
from snapshots import disks, make_agent, start  # noqa: E402


class Pauses:
    """Of a QEMU, as it reports them on a monitor."""

    def __init__(self, qmp):
        self.qmp = qmp

    def during(self, work):
        """How long the guest stood, in ms, while `work` was done."""
        self.qmp('query-status')
        self.qmp.events.clear()
        work()
        eventually('a guest that runs', lambda: self.qmp('query-status')['status'] == 'running')
        at = {event['event']: event['timestamp'] for event in self.qmp.events}
        stopped, resumed = (at[name]['seconds'] * 1000 + at[name]['microseconds'] / 1000
                            for name in ('STOP', 'RESUME'))
        return resumed - stopped


def protect(qmp):
    qmp('migrate-set-capabilities', capabilities=[{'capability': 'background-snapshot', 'state': True}])
    qmp('migrate', uri='exec:cat > /dev/null')
    qmp.wait_migration('completed')
    qmp('migrate-set-capabilities', capabilities=[{'capability': 'background-snapshot', 'state': False}])


def measure(agent, vm, rounds):
    qmp = vm.qmp(agent.host)
    pauses = Pauses(qmp)
    result = {'state': [], 'protect': [], 'vmmig': [], 'said': [], 'stored_mib': []}
    for i in range(rounds + 1):
        result['state'].append(pauses.during(lambda: qmp('xen-save-devices-state', filename='/dev/null')))
        result['protect'].append(pauses.during(lambda: protect(qmp)))
        done = {}
        result['vmmig'].append(pauses.during(
            lambda i=i, done=done: done.update(agent.json('snapshot', vm.name, f's{i}', timeout=300))))
        result['said'].append(done['pause_ms'])
        result['stored_mib'].append(done['snapshot']['stored_bytes'] / 2 ** 20)
    return result


def show(name, values):
    print(f'{name:10} {" ".join(f"{value:7.1f}" for value in values)}   median {statistics.median(values):6.1f}   '
          f'max {max(values):6.1f}')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--memory', type=int, default=1024)
    parser.add_argument('--json')
    options = parser.parse_args()
    with Cluster(hosts=1, start=False, plain=True) as cluster:
        agent = make_agent(cluster)
        vm = BareGuest('web1', mem_mib=options.memory, dirty_mib=64, rate_mbps=20)
        disks(cluster, vm)
        start(agent, vm)
        result = measure(agent, vm, options.rounds)
    for name in ('state', 'protect', 'vmmig', 'said'):
        show(name, result[name])
    for name in ('state', 'protect'):
        own = statistics.median(result[name])
        show(f'- {name}', [value - own for value in result['vmmig']])
    if options.json:
        with open(options.json, 'w', encoding='ascii') as file:
            json.dump(result, file, indent=1)


if __name__ == '__main__':
    main()

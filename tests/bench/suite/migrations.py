# SPDX-License-Identifier: Apache-2.0
"""Migrations: vmmig, over QEMU and over libvmmig-attach, beside each of QEMU's own modes; every load over every link.

Loads of the bare guest, which runs in QEMU and in vmmig-vmm (KVM):
    bare-idle           text that LZ4 makes a third of, 1 MB/s of it rewritten
    scrub-10, -50, -200 a working set of a quarter of the memory, rewritten at so many MB/s
    random              memory that does not compress, idle
Loads of a Debian guest (debian.py), which runs in QEMU under TCG:
    idle, pagecache, sqlite

One guest goes back and forth between two test hosts; in each round every tool moves it once. A migration that is not
done within the limit is cancelled and counts as not converged; so does one whose pause is longer than the limit
of 300 ms that all were given.
"""
import sys

from attach import AttachRace
from lab import BareGuest, VmmGuest
from lab.guests import built
from migrate import MODES, OTHER_MODES, Race, Unfinished

from agents import Cluster

from .debian import DebianGuest

LINKS = ('100mbit', '1gbit', '10gbit', None)
BARE = {'bare-idle': {'fill': 'text', 'dirty': 16, 'rate_mbps': 1}, 'scrub-10': {'dirty': 4, 'rate_mbps': 10},
        'scrub-50': {'dirty': 4, 'rate_mbps': 50}, 'scrub-200': {'dirty': 4, 'rate_mbps': 200},
        'random': {'fill': 'random', 'dirty': 16, 'rate_mbps': 1}}
DEBIAN = ('idle', 'pagecache', 'sqlite')
PEERS = [*MODES, *OTHER_MODES]
DOWNTIME_MS = 300
QUICK = {'links': ('1gbit', None), 'loads': ('bare-idle', 'scrub-50', 'random', 'sqlite'), 'mib': 512, 'rounds': 2,
         'limit_s': 15}
FULL = {'links': LINKS, 'loads': (*BARE, *DEBIAN), 'mib': 1024, 'rounds': 3, 'limit_s': 120}


def bare(load, mib):
    options = dict(BARE[load])
    return {'mem_mib': mib, 'dirty_mib': mib // options.pop('dirty'), 'scan_mbps': 0, **options}


def once(race, tool):
    """One migration, as {metric: value}."""
    try:
        run = race.run(tool)
    except Unfinished:
        return {'total_ms': None, 'converged': 0}
    del run['copy_ms']
    if run['pause_ms'] != run['pause_ms']:  # the guest was damaged
        run['pause_ms'] = None
    return {**run, 'memory_bytes': race.vm.mem_mib << 20, 'converged': int(run['pause_ms'] is not None and run['pause_ms'] <= DOWNTIME_MS)}


def race(results, case, races, rounds):
    """races: {tool: (race, the tool's name in it)}"""
    found = {tool: [] for tool in races}
    for number in range(rounds):
        for tool, (contest, name) in races.items():
            contest.let_run(True)
            contest.console.wait_ticks(20)
            found[tool].append(once(contest, name))
            print(f'  {case} {tool} {number + 1}: ' + ', '.join(
                f'{metric} {value:.4g}' for metric, value in found[tool][-1].items() if value is not None),
                file=sys.stderr, flush=True)
            contest.let_run(False)
    for tool, runs in found.items():
        results.add_all(case, tool, runs)


def run(results, quick, inputs):
    plan = QUICK if quick else FULL
    Race.limit_s = plan['limit_s']
    with Cluster(plain=True, start=False) as cluster:
        for agent in cluster.agents:
            agent.options['attach-vmm'] = built('tools/vmmig-vmm/vmmig-vmm')
            agent.options['log-level'] = 'info'
            agent.start()
        for load in plan['loads']:
            name = load.replace('-', '')
            if load in BARE:
                attach = AttachRace(cluster, VmmGuest(f'a{name}', **bare(load, plan['mib'])))
                attach.let_run(False)
                qemu = Race(cluster, BareGuest(f'q{name}', **bare(load, plan['mib'])))
                races = {'vmmig-qemu': (qemu, 'vmmig-qemu'), 'vmmig-attach': (attach, 'vmmig-qemu')}
            else:
                qemu = Race(cluster, DebianGuest.on(cluster, f'q{name}', load, inputs))
                races = {'vmmig-qemu': (qemu, 'vmmig-qemu')}
            races.update({peer: (qemu, peer) for peer in PEERS})
            for link in plan['links']:
                for host in cluster.hosts:
                    host.set_rate(link)
                race(results, f'{link or "unshaped"}/{load}', races, plan['rounds'])
            for contest in dict.fromkeys(r for r, _ in races.values()):
                contest.let_run(True)
                contest.end()

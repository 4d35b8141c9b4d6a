# SPDX-License-Identifier: Apache-2.0
"""Migrations: vmmig, over QEMU and over libvmmig-attach, beside each of QEMU's own modes; every load over every link.

Loads of the bare guest, which runs in QEMU and in vmmig-vmm (KVM):
    bare-idle           text that LZ4 makes a third of, 1 MB/s of it rewritten
    scrub-10, -50, -200 a working set of a quarter of the memory, rewritten at so many MB/s
    random              memory that does not compress, idle
Loads of a Debian guest (debian.py), which runs in QEMU under TCG:
    idle, pagecache (reads all of /usr again and again), sqlite (transactions of a hundred rows of 1 KB)
Debian runs under TCG on both sides, since the kernel of a virtual machine in a virtual machine is too slow here; a
guest under TCG moves in one round, and QEMU's own migration of one may damage it (a bug of QEMU before 9.0).

One guest goes back and forth between two test hosts on the same cores; in each round every tool moves it once, and one
migration before the first round is not counted. Nothing is encrypted. All may throttle the guest, and all were given
a limit of 300 ms for its pause. Multifd has two channels; xbzrle a cache that holds all that the guest rewrites;
post-copy begins once memory went over once, unless QEMU is done by then.

    total_ms    from the command to the answer that the guest runs there, the start of the destination's QEMU included
    pause_ms    the longest time for which the guest did not run, by its console's ticks as the test host saw them
    wire_bytes  all that both hosts sent
    cpu_s       both agents and both VMMs, vCPUs left out; source_cpu_s and destination_cpu_s each side's
    others_pct  what everything else on the machine took of the cores meanwhile, its own host included
    finished    1 if it came to an end within the limit of this program and the guest's memory was whole; one that did
                not has no other figures, and is not tried again in that case
    within_limit    1 if the pause was no longer than the limit
"""
import sys

from attach import AttachRace
from lab import BareGuest, VmmGuest
from migrate import MODES, OTHER_MODES, Race, Unfinished, start_agents, undisturbed

from agents import Cluster

from .debian import DebianGuest

LINKS = ('100mbit', '1gbit', '10gbit', None)
BARE = {'bare-idle': {'fill': 'text', 'dirty': 16, 'rate_mbps': 1}, 'scrub-10': {'dirty': 4, 'rate_mbps': 10},
        'scrub-50': {'dirty': 4, 'rate_mbps': 50}, 'scrub-200': {'dirty': 4, 'rate_mbps': 200},
        'random': {'fill': 'random', 'dirty': 16, 'rate_mbps': 1}}
DEBIAN = ('idle', 'pagecache', 'sqlite')
PEERS = [*MODES, *OTHER_MODES]
DOWNTIME_MS = 300
QUIET_PCT = 15
QUICK = {'loads': {'bare-idle': ('1gbit',), 'scrub-50': ('1gbit', None), 'random': (None,), 'sqlite': ('1gbit',)},
         'mib': 512, 'rounds': 2, 'limit_s': 15}
FULL = {'loads': dict.fromkeys((*BARE, *DEBIAN), LINKS), 'mib': 512, 'rounds': 3, 'limit_s': 90}


def bare(load, mib):
    options = dict(BARE[load])
    return {'mem_mib': mib, 'dirty_mib': mib // options.pop('dirty'), 'scan_mbps': 0, **options}


def once(race, tool):
    """One migration, as {metric: value}; again if it was disturbed."""
    try:
        run = undisturbed(race, tool, QUIET_PCT, repeats=2)
    except Unfinished:
        return {'finished': 0}
    # A pause that nobody could tell: the guest was damaged.
    pause = run.pop('stall_ms', run['pause_ms'])
    if pause != pause:
        return {'finished': 0}
    del run['copy_ms']
    return {**run, 'pause_ms': pause, 'finished': 1, 'within_limit': int(pause <= DOWNTIME_MS),
            'memory_bytes': race.vm.mem_mib << 20}


def take_turns(case, races, rounds):
    """races: {tool: (race, the tool's name in it)}. Returns {tool: [run...]}."""
    found = {tool: [] for tool in races}
    for _ in range(rounds):
        for tool, (contest, name) in races.items():
            if found[tool] and not found[tool][-1]['finished']:
                continue
            contest.let_run(True)
            contest.console.wait_ticks(20)
            found[tool].append(once(contest, name))
            print(f'  {case} {tool}: ' + ', '.join(f'{m} {v:.4g}' for m, v in found[tool][-1].items()),
                  file=sys.stderr, flush=True)
            contest.let_run(False)
    return found


def contestants(cluster, load, mib, inputs):
    """{tool: (race, the tool's name in it)}, every guest booted, moved once and standing still."""
    name = load.replace('-', '')
    races = {}
    if load in BARE:
        races['vmmig-qemu'] = Race(cluster, BareGuest(f'q{name}', **bare(load, mib))), 'vmmig-qemu'
        races['vmmig-qemu'][0].let_run(False)
        races['vmmig-attach'] = AttachRace(cluster, VmmGuest(f'a{name}', **bare(load, mib))), 'vmmig-qemu'
    else:
        races['vmmig-qemu'] = Race(cluster, DebianGuest.on(cluster, f'q{name}', load, inputs)), 'vmmig-qemu'
    for race, tool in races.values():
        race.let_run(True)
        race.run(tool)
        race.let_run(False)
    return races | {peer: (races['vmmig-qemu'][0], peer) for peer in PEERS}


def end(races):
    for contest in {id(race): race for race, _ in races.values()}.values():
        contest.let_run(True)
        contest.end()


def run(results, quick, inputs):
    plan = QUICK if quick else FULL
    Race.limit_s = plan['limit_s']
    for load, links in plan['loads'].items():
        cases = {link: case for link in links if not results.has(case := f'{link or "unshaped"}/{load}')}
        if not cases:
            continue
        with results.cell(load), Cluster(plain=True, start=False) as cluster:
            start_agents(cluster)
            races = contestants(cluster, load, plan['mib'], inputs)
            for link, case in cases.items():
                for host in cluster.hosts:
                    host.set_rate(link)
                for tool, runs in take_turns(case, races, plan['rounds']).items():
                    results.add_all(case, tool, runs)
                results.save()
            end(races)

# SPDX-License-Identifier: Apache-2.0
"""What the attach driver reaches: migrations beside QEMU's multifd, the cost of tracking, and how near the machine's
limits that is, all in one run.

    /usr/bin/python3 tests/bench/attach.py [--part side-by-side|tracking]... [--rounds N] [--others PERCENT]
                                            [--gib N]... [--json FILE]

side-by-side: the self-checking guest with 2 GiB, half of which does not compress, once in vmmig-vmm and once in QEMU,
dirtying 1 MiB/s, then 200 MiB/s. vmmig and QEMU's multifd (2 channels, no TLS) move them in turn, A B A B, between two
test hosts of one machine, which a veth pair connects. The guest that is not moved is stopped meanwhile.
    total_ms     from the command until the user is told that it is done, starting the destination included
    copy_ms      the same from when the destination waits
    pause_ms     of the hand-over, as the guest's console shows it
    stall_ms     the longest time at all for which the guest did not run: for lack of a core, it may be, while memory
                 was copied
    MiB_per_s    guest memory by copy_ms
    cpu_s_per_GiB    CPU of both agents and both VMMs without their vCPUs, by guest memory
    huge_MiB     of the destination's guest memory that is in huge pages: QEMU asks for them, and gets what the
                 machine's memory is not too fragmented for
    others_pct   what everything else on the machine used of its CPUs meanwhile: above a few, do not trust the run.
                 --others PERCENT: a run beside which more did is not counted, another one follows, up to 6 times
tracking: tests/bench/tracking.c, for each driver and size.
limits: tests/bench/limits.c, and the share of them that the migration reaches.

Prints tables with medians and ratios. VMMIG_BUILD names the build folder. Another program may call
side_by_side(), tracking() and limits(), which return what --json writes.
"""
import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE), os.path.join(os.path.dirname(HERE), 'flow')]

from agents import Cluster  # noqa: E402
from lab import BareGuest, VmmGuest  # noqa: E402
from lab.guests import built  # noqa: E402
from migrate import HZ, Race, cpu_of, cpu_times, start_agents, undisturbed  # noqa: E402

MEMORY_MIB = 2048
DIRTY = {1: {'dirty_mib': 64, 'rate_mbps': 1}, 200: {'dirty_mib': 256, 'rate_mbps': 210}}
METRICS = ('total_ms', 'copy_ms', 'pause_ms', 'stall_ms', 'MiB_per_s', 'cpu_s_per_GiB', 'wire_MB', 'huge_MiB',
           'others_pct')
DRIVERS = ('bitmap', 'ring', 'plain')
# What is promised: metric, dirty rate, how vmmig compares with QEMU (or with a number).
PROMISES = (('MiB_per_s', None, '>=', 2, 'QEMU'), ('cpu_s_per_GiB', None, '<=', 0.5, 'QEMU'),
            ('pause_ms', 1, '<=', 10, None), ('pause_ms', 200, '<=', 1, 'QEMU'))


def huge_mib(pid):
    with open(f'/proc/{pid}/smaps_rollup', encoding='ascii') as file:
        return sum(int(kib) for kib in re.findall(r'^(?:AnonHuge|ShmemPmdMapped).*?(\d+) kB', file.read(), re.M)) / 1024


class HandOverRace(Race):
    """A race whose pause is that of the hand-over."""

    def judge(self, tool, mark):
        self.stall = super().judge(tool, mark)
        return max(self.console.hand_overs(after=mark), default=float('nan'))

    def run(self, tool):
        run = super().run(tool)
        return {**run, 'stall_ms': self.stall * 1000, 'huge_MiB': sum(map(huge_mib, self.vmm_pids()))}


class Watch(threading.Thread):
    """The CPU seconds of a process until it ends, or until stop()."""

    def __init__(self, pid):
        super().__init__()
        self.pid, self.over = pid, threading.Event()
        self.first = self.last = cpu_times(f'/proc/{pid}/stat') / HZ
        self.start()

    def run(self):
        while not self.over.wait(0.01):
            with contextlib.suppress(OSError):
                self.last = cpu_times(f'/proc/{self.pid}/stat') / HZ

    def stop(self):
        self.over.set()
        self.join()
        return self.last - self.first


class AttachRace(HandOverRace):
    """A guest of vmmig-vmm that vmmig moves. Its VMMs are the agents' children and no longer this program's: what
    they use is no other's, either."""

    def run(self, tool):
        run = super().run(tool)
        share = 100 * self.vmms / (run['total_ms'] / 1000 * os.cpu_count())
        return {**run, 'others_pct': max(0, run['others_pct'] - share)}

    def send(self, options):
        watch = Watch(self.here.json('status', self.vm.name)['pid'])
        try:
            sent = super().send(options)
        finally:
            self.vmms = watch.stop()
        self.vmms += cpu_times(f"/proc/{self.there.json('status', self.vm.name)['pid']}/stat") / HZ
        return sent

    def boot(self):
        super().boot()
        self.here.vmmig('attach', self.vm.name, '--socket', self.vm.attach_path)

    def vmmig(self, options):
        total, cpu = self.send(options)
        return total, total - self.until_prepared(), (cpu, cpu_of(self.there.json('status', self.vm.name)['pid']))

    def is_vmm(self, argv):
        return argv[0].endswith('vmmig-vmm') and self.vm.attach_path in argv

    def end(self):
        super().end()
        self.here.vmmig('detach', self.vm.name)


def per_guest(run):
    gib = MEMORY_MIB / 1024
    return {**{metric: run[metric] for metric in ('total_ms', 'copy_ms', 'pause_ms', 'stall_ms', 'huge_MiB',
                                             'others_pct')},
            'MiB_per_s': MEMORY_MIB * 1000 / run['copy_ms'], 'cpu_s_per_GiB': run['cpu_s'] / gib,
            'wire_MB': run['wire_bytes'] / 1e6}


def side_by_side(rounds=3, rates=(1, 200), others=100):
    """{rate: {'vmmig': [run...], 'qemu': [run...]}}"""
    found = {}
    with Cluster(plain=True, start=False) as cluster:
        start_agents(cluster)
        for rate in rates:
            guest = {'mem_mib': MEMORY_MIB, 'scan_mbps': 0, 'fill': 'half', **DIRTY[rate]}
            races = {'vmmig': AttachRace(cluster, VmmGuest(f'attach{rate}', **guest))}
            races['vmmig'].let_run(False)
            races['qemu'] = HandOverRace(cluster, BareGuest(f'qemu{rate}', **guest))
            races['qemu'].let_run(False)
            tools = {'vmmig': 'vmmig-qemu', 'qemu': 'qemu-multifd'}
            found[rate] = {name: [] for name in races}
            for number in range(rounds + 1):  # the first warms up
                for name, race in races.items():
                    race.let_run(True)
                    race.console.wait_ticks(50)
                    run = per_guest(undisturbed(race, tools[name], others if number else 100))
                    race.let_run(False)
                    if number:
                        found[rate][name].append(run)
                    print(f'  {rate} MiB/s {name}{"" if number else " (warming up)"}: '
                          + ', '.join(f'{metric} {value:.4g}' for metric, value in run.items()),
                          file=sys.stderr, flush=True)
            for race in races.values():
                race.let_run(True)
            races['vmmig'].console.verify()
            for race in races.values():
                race.end()
    return found


def tracking(sizes=(1, 4, 16), drivers=DRIVERS):
    """A list of what tests/bench/tracking.c prints, one for each driver and size."""
    return [json.loads(subprocess.run([built('tests/bench/tracking'), driver, str(gib)], check=True,
                                      capture_output=True, text=True).stdout)
            for gib in sizes for driver in drivers]


def limits():
    return json.loads(subprocess.run([built('tests/bench/limits')], check=True, capture_output=True, text=True).stdout)


def median(runs, metric):
    return statistics.median(run[metric] for run in runs)


def promises(found):
    """What was promised, and what was measured: a list of dictionaries."""
    rows = []
    for metric, rate, sign, bound, of in PROMISES:
        for each in [rate] if rate else found:
            if each not in found:
                continue
            value = median(found[each]['vmmig'], metric)
            value = value / median(found[each]['qemu'], metric) if of else value
            rows.append({'metric': metric, 'dirty_MiB_per_s': each, 'of': of, 'measured': value,
                         'promised': f'{sign} {bound}', 'kept': value >= bound if sign == '>=' else value <= bound})
    return rows


def show_side_by_side(found, limit):
    for rate, tools in found.items():
        print(f'\n2 GiB, half incompressible, dirtying {rate} MiB/s\n{"":8}' + ''.join(f'{m:>24}' for m in METRICS))
        for tool, runs in tools.items():
            cells = (f'{median(runs, m):.4g} ({min(r[m] for r in runs):.4g}-{max(r[m] for r in runs):.4g})'
                     for m in METRICS)
            print(f'{tool:8}' + ''.join(f'{cell:>24}' for cell in cells))
        print(f'{"ratio":8}' + ''.join(f'{median(tools["vmmig"], m) / median(tools["qemu"], m):>24.2f}'
                                 for m in METRICS if m not in ('huge_MiB', 'others_pct')))
    print()
    for row in promises(found):
        print(f'{row["metric"]} at {row["dirty_MiB_per_s"]} MiB/s{" by QEMU" if row["of"] else ""}: '
              f'{row["measured"]:.3g}, promised {row["promised"]}: {"kept" if row["kept"] else "NOT KEPT"}')
    rate = min(found)
    reached = median(found[rate]['vmmig'], 'MiB_per_s') * (1 << 20)
    print(f'\nThe machine, all {limit["cores"]} cores: '
          + ', '.join(f'{name} {limit[name] / 1e6:.0f} MB/s' for name in ('memcpy', 'lz4_compress', 'lz4_decompress')))
    print(f'vmmig moves {reached / 1e6:.0f} MB/s of guest memory: {100 * reached / limit["memcpy"]:.0f} % of memcpy, '
          f'{100 * reached / limit["lz4_compress"]:.0f} % of LZ4 compression')


def show_tracking(rows):
    columns = ('start', 'first', *(f'{what}_{share}' for share in (0, 1, 10, 100) for what in ('harvest', 'clear')))
    print(f'\nCost of tracking, ms per GiB of guest memory\n{"":12}' + ''.join(f'{name:>13}' for name in columns)
          + f'{"slowdown":>10}')
    for row in rows:
        print(f'{row["driver"]:7}{row["gib"]:>5}' + ''.join(f'{row[name + "_ms"] / row["gib"]:>13.4f}' for name in columns)
              + f'{100 * row["slowdown"]:>9.0f}%')


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--part', action='append', choices=['side-by-side', 'tracking'])
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--others', type=float, default=100, metavar='PERCENT')
    parser.add_argument('--rate', type=int, action='append', choices=list(DIRTY))
    parser.add_argument('--gib', type=int, action='append')
    parser.add_argument('--json', metavar='FILE')
    options = parser.parse_args()
    parts = options.part or ['side-by-side', 'tracking']
    said = {'machine': {'cpus': os.cpu_count(), 'kernel': os.uname().release}, 'limits': limits()}
    if 'side-by-side' in parts:
        found = side_by_side(options.rounds, options.rate or tuple(DIRTY), options.others)
        show_side_by_side(found, said['limits'])
        said.update(side_by_side=found, promises=promises(found))
    if 'tracking' in parts:
        said['tracking'] = tracking(options.gib or (1, 4, 16))
        show_tracking(said['tracking'])
    if options.json:
        with open(options.json, 'w', encoding='utf-8') as file:
            json.dump(said, file, indent=1)


if __name__ == '__main__':
    main()

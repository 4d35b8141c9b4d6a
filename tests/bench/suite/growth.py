# SPDX-License-Identifier: Apache-2.0
"""Cost against work. Case: what grows / how much of it.

    memory-filled, memory-sparse   total_ms of migrations over an unshaped link, by MiB of guest memory
    images                         milliseconds to import one image more, to list all and to collect, by images
    unique                         tests/bench/repo_scale.c, by GiB of unique data: to delete an image and collect, and to look
                                   up what is all there
"""
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from agents import Cluster
from attach import AttachRace
from lab import BareGuest, VmmGuest
from lab.guests import built
from migrate import Race

from .migrations import once

PLANS = {True: {'filled': (256, 1024, 4096), 'sparse': (256, 1024, 4096), 'images': (1, 10, 100), 'unique': (32, 64, 128),
               'rounds': 2},
         False: {'filled': (256, 1024, 4096, 8192), 'sparse': (256, 1024, 4096, 16384), 'images': (1, 10, 100, 1000),
                 'unique': (64, 256, 1024), 'rounds': 3}}
PEER = 'qemu-multifd'
LOOKED_UP_GIB = 4


def memory(results, plan):
    Race.limit_s = 120
    with Cluster(plain=True, start=False) as cluster:
        for agent in cluster.agents:
            agent.options['attach-vmm'] = built('tools/vmmig-vmm/vmmig-vmm')
            agent.options['log-level'] = 'info'
            agent.start()
        for fill in ('filled', 'sparse'):
            for mib in plan[fill]:
                guest = {'mem_mib': mib, 'dirty_mib': 4, 'rate_mbps': 1, 'scan_mbps': 0,
                         'fill': 'text' if fill == 'filled' else 'zero'}
                for make, tools in ((lambda: Race(cluster, BareGuest(f'q{fill}{mib}', **guest)),
                                     {'vmmig-qemu': 'vmmig-qemu', PEER: PEER}),
                                    (lambda: AttachRace(cluster, VmmGuest(f'a{fill}{mib}', **guest)),
                                     {'vmmig-attach': 'vmmig-qemu'})):
                    contest, found = make(), {}
                    for _ in range(plan['rounds']):
                        for tool, name in tools.items():
                            found.setdefault(tool, []).append(once(contest, name))
                    contest.end()
                    for tool, runs in found.items():
                        print(f'  memory-{fill}/{mib} {tool}: {[run["total_ms"] for run in runs]}', file=sys.stderr,
                              flush=True)
                        for metric in ('total_ms', 'cpu_s'):
                            results.add(f'memory-{fill}/{mib}', tool, metric, [run.get(metric) for run in runs])


def timed_ms(*argv):
    began = time.monotonic()
    subprocess.run(argv, check=True, capture_output=True)
    return 1000 * (time.monotonic() - began)


def images(results, plan):
    """Each has 1 MiB of its own."""
    vmmig = built('tools/vmmig')
    with tempfile.TemporaryDirectory(dir='/var/tmp') as folder:
        store, path = ['--repo', f'dir:{folder}/store'], pathlib.Path(folder, 'image.raw')
        subprocess.run([vmmig, 'repo', 'init', *store], check=True, capture_output=True)
        known = 0
        for goal in plan['images']:
            took = []
            for known in range(known + 1, goal + 1):
                path.write_bytes(os.urandom(1 << 20))
                took.append(timed_ms(vmmig, 'image', 'import', path, f'i{known}', '--format', 'raw', *store))
            results.add(f'images/{goal}', 'vmmig-dir', 'import_ms', took[-10:])
            for metric, words in (('list_ms', ['image', 'list']), ('collect_ms', ['repo', 'gc'])):
                results.add(f'images/{goal}', 'vmmig-dir', metric,
                            [timed_ms(vmmig, *words, *store) for _ in range(plan['rounds'])])


def unique(results, plan):
    for gib in plan['unique']:
        with tempfile.TemporaryDirectory(dir='/var/tmp') as folder:
            for verb, words in (('make', [str(gib)]), ('share', [str(LOOKED_UP_GIB)]), ('collect', [])):
                said = json.loads(subprocess.run([built('tests/bench/repo_scale'), verb, folder, *words], check=True,
                                                 capture_output=True, text=True).stdout)
                print(f'  unique/{gib} {verb}: {said}', file=sys.stderr, flush=True)
                results.add(f'unique/{gib}', 'vmmig-dir', f'{verb}_s', [said['seconds']])
                results.add(f'unique/{gib}', 'vmmig-dir', f'{verb}_peak_rss_bytes', [said['rss_kib'] << 10])


def run(results, quick, _):
    memory(results, PLANS[quick])
    images(results, PLANS[quick])
    unique(results, PLANS[quick])

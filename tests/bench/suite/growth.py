# SPDX-License-Identifier: Apache-2.0
"""Cost against work. Case: what grows / how much of it.

    memory-filled, memory-sparse   migrations over a link without a limit, by MiB of guest memory
    images                         milliseconds to import one image more, to list all and to collect, by images
    unique                         tests/bench/repo_scale.c, by GiB of unique data: seconds to collect after an image
                                   was deleted, and to import 4 GiB that are all there; the most memory each took

Memory ends where both copies fit this machine: filled at 8 GiB, sparse at 16. Named are places where a cost grows
faster than the work to the power of 1.15.
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
from migrate import Race, start_agents

from .migrations import end, take_turns

PLANS = {True: {'filled': (256, 1024, 2048), 'sparse': (256, 1024, 4096), 'images': (1, 10, 100),
                'unique': (32, 64, 128), 'rounds': 2},
         False: {'filled': (256, 1024, 4096, 8192), 'sparse': (256, 1024, 4096, 16384), 'images': (1, 10, 100, 1000),
                 'unique': (64, 256, 1024), 'rounds': 3}}
PEER = 'qemu-multifd'
LOOKED_UP_GIB = 4


def move_one(results, cluster, case, guest, rounds):
    name = case.replace('/', '')
    attach = AttachRace(cluster, VmmGuest(f'a{name}', **guest))
    attach.let_run(False)
    qemu = Race(cluster, BareGuest(f'q{name}', **guest))
    qemu.let_run(False)
    races = {'vmmig-qemu': (qemu, 'vmmig-qemu'), 'vmmig-attach': (attach, 'vmmig-qemu'), PEER: (qemu, PEER)}
    found = take_turns(case, races, rounds)
    end(races)
    for tool, runs in found.items():
        results.add(case, tool, 'total_ms', [run.get('total_ms') for run in runs])


def memory(results, plan):
    Race.limit_s = 120
    for fill, contents in (('filled', 'text'), ('sparse', 'zero')):
        for mib in plan[fill]:
            with results.cell(f'memory-{fill}/{mib}'), Cluster(plain=True, start=False) as cluster:
                start_agents(cluster)
                guest = {'mem_mib': mib, 'dirty_mib': 4, 'rate_mbps': 1, 'scan_mbps': 0, 'fill': contents}
                move_one(results, cluster, f'memory-{fill}/{mib}', guest, plan['rounds'])


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
                if verb == 'make':
                    continue
                results.add(f'unique/{gib}', 'vmmig-dir', f'{verb}_s', [said['seconds']])
                results.add(f'unique/{gib}', 'vmmig-dir', f'{verb}_peak_rss_bytes', [said['rss_kib'] << 10])


def run(results, quick, _):
    for part in (memory, images, unique):
        with results.cell(part.__name__):
            part(results, PLANS[quick])
            results.save()

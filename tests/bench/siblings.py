#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""What two sibling guests take in the repository, and in those of restic and borg.

usage: siblings.py [--inputs DIR] [--work DIR] [--seconds N] [--load idle|pagecache|sqlite] [--json FILE]

A Debian guest that works, under TCG, is snapshotted and published; two clones of it work on for N seconds and are
snapshotted. `snapshots`: by how much the repository grew with the template and with each of them. `files`: the
same disks and memories, four files, imported by each tool into an empty store. DIR as for repo_peers.py.

Needs what repo_peers.py needs.
"""
import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / 'suite'), str(HERE.parent), str(HERE.parent / 'flow')]

import clone  # noqa: E402
import repo_peers  # noqa: E402
from agents import Cluster, eventually  # noqa: E402
from debian import DebianGuest  # noqa: E402
from lab.guests import built  # noqa: E402

TOOLS = ('vmmig', 'restic', 'borg')
SIBLINGS = ('a', 'b')


def stored(agent):
    stat = agent.json('repo', 'stat')
    return stat['pack_bytes'] + stat['tree_bytes']


def work(console, seconds):
    """Until the guest has said so many ticks of 20 ms more."""
    console.wait_ticks(50 * seconds, 60 + 10 * seconds)


def make_siblings(cluster, inputs, folder, options):
    """Bytes that each step added; the files are in the folder then."""
    agent = clone.make_agent(cluster)
    vm = DebianGuest.on(cluster, 'web1', options.load, inputs)
    console = cluster.console('web1')
    agent.host.popen(vm.argv(), name='web1')
    console.wait_for('ready', timeout=600)
    work(console, options.seconds)
    agent.vmmig('attach', 'web1', '--qmp', vm.qmp_path)
    sizes = [stored(agent)]
    agent.vmmig('snapshot', 'web1', 'first', timeout=600)
    agent.vmmig('template', 'publish', 'web1@first', 'debian:v1')
    vm.qmp(agent.host)('quit')
    sizes.append(stored(agent))
    consoles = [cluster.console(name) for name in SIBLINGS]
    made = [agent.json('clone', 'debian:v1', '--as', name)['clones'][0] for name in SIBLINGS]
    for one in consoles:
        work(one, options.seconds)
    read = []
    for name in SIBLINGS:
        said = agent.json('snapshot', name, 'now', timeout=600)
        read.append(said['snapshot']['disk_read_bytes'])
        sizes.append(stored(agent))
    for one in made:
        os.kill(one['pid'], signal.SIGKILL)
    for name in SIBLINGS:
        eventually('its end', lambda name=name: agent.json('status', name)['state'] == 'ended')
        for file in ('disk0', 'memory'):
            subprocess.run([built('tests/unit/repo/repo_tool'), 'dir:' + agent.host.path(clone.REPO), 'export',
                            f'{name}@now', folder / f'{name}-{file}.raw', f'{file}.raw'], check=True,
                           stdout=subprocess.DEVNULL)
    added = [after - before for before, after in zip(sizes, sizes[1:])]
    return {'template_bytes': added[0], 'sibling_bytes': added[1:], 'disk_read_bytes': read}


def show(result):
    s = result['snapshots']
    print(f'in the repository, MB: the template {s["template_bytes"] / 1e6:.1f}, the siblings '
          f'{" and ".join(f"{n / 1e6:.1f}" for n in s["sibling_bytes"])}; of their disks '
          f'{" and ".join(f"{n / 1e6:.1f}" for n in s["disk_read_bytes"])} were read')
    print(f'their files, {result["files"]["input_data_bytes"] / 1e6:.0f} MB, in an empty store, MB:')
    for name, m in result['files']['medians'].items():
        repacked = f'; after gc --repack {m["repacked_bytes"] / 1e6:.1f}' if 'repacked_bytes' in m else ''
        print(f'    {name:8} {m["stored_bytes"] / 1e6:8.1f}{repacked}')


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n', maxsplit=1)[0])
    parser.add_argument('--inputs', type=pathlib.Path)
    parser.add_argument('--work', type=pathlib.Path)
    parser.add_argument('--seconds', type=int, default=10)
    parser.add_argument('--load', choices=('idle', 'pagecache', 'sqlite'), default='sqlite')
    parser.add_argument('--json', type=pathlib.Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work or '/var/tmp') as folder:
        folder = pathlib.Path(folder)
        with Cluster(hosts=1, start=False, plain=True) as cluster:
            found = make_siblings(cluster, options.inputs or folder / 'inputs', folder, options)
        files = [folder / f'{name}-{file}.raw' for name in SIBLINGS for file in ('disk0', 'memory')]
        result = {'load': options.load, 'seconds': options.seconds, 'snapshots': found,
                  'files': repo_peers.measure(files, folder, 1, TOOLS)}
    show(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + '\n')


if __name__ == '__main__':
    main()

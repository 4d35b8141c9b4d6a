#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""An import into Ceph, with client and cluster on this machine, against the bound that the costs of CPU set.

usage: repo_rados.py [--inputs DIR] [--work DIR] [--rounds N] [--page FILE]
(DIR as for repo_peers.py)

The files are a Debian disk, and the memory of two guests booted from it.
Each round measures what the daemons of a cluster (one monitor, one manager, three OSDs, two
copies) take in CPU to store as many bytes as the import does, written as objects of a pack's size by a client that does
nothing else; what vmmig takes in CPU to hash, look up and compress the same files into a folder; and how long the import
into the cluster takes. The bound is the sum of the first two over all cores. Caches of the operating system are warm.
What keeps an import from its bound is told by what vmmig and the cluster took in CPU for it in truth, and by how much of
the cores' time nobody took.

--page writes it as a page for docs/bench.
"""
import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import bench_page
import repo_peers

sys.path.insert(0, str(repo_peers.ROOT / 'tests/ceph'))

import cluster as ceph_cluster  # noqa: E402

OBJECT, IN_FLIGHT = 8 << 20, 8
TICK = os.sysconf('SC_CLK_TCK')


def daemons_cpu(ceph):
    total = 0
    for daemon in ceph.daemons.values():
        fields = pathlib.Path(f'/proc/{daemon.pid}/stat').read_text(encoding='ascii').rsplit(')', 1)[1].split()
        total += int(fields[11]) + int(fields[12])
    return total / TICK


def idle_seconds():
    """Of all cores, waiting for a disk included."""
    fields = pathlib.Path('/proc/stat').read_text(encoding='ascii').split()
    return (int(fields[4]) + int(fields[5])) / TICK


def write_plain(ceph, size):
    """CPU seconds of the daemons, and of this client, for so many bytes in objects."""
    with ceph.rados.open_ioctx('images') as io:
        io.set_namespace('plain')
        data, before, own, flights = os.urandom(OBJECT), daemons_cpu(ceph), time.process_time(), []
        for i in range(0, size, OBJECT):
            flights.append(io.aio_write_full(f'o{i}', data[:min(OBJECT, size - i)]))
            if len(flights) == IN_FLIGHT:
                flights.pop(0).wait_for_complete_and_cb()
        for flight in flights:
            flight.wait_for_complete_and_cb()
        used = daemons_cpu(ceph) - before, time.process_time() - own
        for i in range(0, size, OBJECT):
            io.remove_object(f'o{i}')
        return used


def import_all(url, paths):
    """Seconds, CPU seconds of the client, bytes stored."""
    build = pathlib.Path(os.environ.get('VMMIG_BUILD', repo_peers.ROOT / 'build'))

    def run(*words):
        out = subprocess.run([build / 'tests/unit/repo/repo_tool', url, *map(str, words)], check=True,
                             stdout=subprocess.PIPE, text=True).stdout
        return json.loads(out) if out else None
    run('init')
    done = [run('import', path, path.stem, 'raw') for path in paths]
    return [sum(d[key] for d in done) for key in ('seconds', 'cpu', 'stored')]


def one_round(ceph, number, paths, work):
    with tempfile.TemporaryDirectory(dir=work) as folder:
        _, client_cpu, stored = import_all(f'dir:{folder}/repo', paths)
    cluster_cpu, sending_cpu = write_plain(ceph, stored)
    before, idle = daemons_cpu(ceph), idle_seconds()
    seconds, own_cpu, _ = import_all(f'rados:images/round{number}?conf={ceph.conf}', paths)
    their_cpu, idle = daemons_cpu(ceph) - before, idle_seconds() - idle
    bound = (client_cpu + cluster_cpu + sending_cpu) / os.cpu_count()
    row = [f'{stored / 1e6:.1f}', f'{cluster_cpu:.2f}', f'{cluster_cpu / stored * 1e9:.2f}', f'{sending_cpu:.2f}',
           f'{client_cpu:.2f}', f'{bound:.2f}', f'{seconds:.2f}', f'{bound / seconds:.2f}', f'{own_cpu:.2f}',
           f'{their_cpu:.2f}', f'{idle:.2f}']
    print(*row, sep='; ', flush=True)
    return bound / seconds, row


HEAD = ['stored, MB', 'CPU of the cluster, s', 'ns per byte', 'of sending, s', 'of hash and compression, s', 'bound, s',
        'import, s', 'of the bound', 'its own CPU, s', 'CPU of the cluster for it, s', 'idle, s of CPU']


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n', maxsplit=1)[0])
    parser.add_argument('--inputs', type=pathlib.Path)
    parser.add_argument('--work', default='/var/tmp')
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--page', type=pathlib.Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        paths = repo_peers.make_inputs(args.inputs or pathlib.Path(folder, 'inputs'))
        with ceph_cluster.CephCluster(pathlib.Path(folder, 'ceph')) as ceph:
            ceph.create_pool('images')
            ceph.wait_clean()
            print(*HEAD, sep='; ', flush=True)
            rounds = [one_round(ceph, i, paths, folder) for i in range(args.rounds)]
    median = f'Median {statistics.median(ratio for ratio, _ in rounds):.2f} of the bound.'
    print(median)
    if args.page:
        bench_page.write(args.page, __file__, 'An import into Ceph, and its bound', __doc__.split('\n\n')[2],
                         bench_page.table(HEAD, [row for _, row in rounds]), median)
    return 0


if __name__ == '__main__':
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""Repositories: vmmig on a folder beside restic, borg, casync and qemu-img; and on Ceph beside `rbd` images.

    disk         a Debian disk of 2 GiB, 549 MB of it data
    memory       the memories of two guests booted from it, 768 MiB each
    versions     versions of the disk, each with 2 % of its 2 GiB rewritten
    siblings     disks of VMs with the same system, a hundredth of each its own
    export       the disk and the memories back, compared with what went in
    verify       everything stored, read and checked, by the tools that have such a command
    collect      the space of half of the versions and siblings freed, once they were deleted

Every tool takes its step before the next step begins, and a step has ended when the kernel has written everything. What
is rewritten lies in runs of 4 to 64 KiB, half of whose bytes compress. restic encrypts, and works without its cache;
borg has LZ4, chunks of 64 KiB and no encryption; casync has its defaults; qemu-img writes compressed qcow2 (zstd) with
as many coroutines as it can have, a file for each image. Of the steps that repeat, total_s is of all of them, and
stored_bytes is what the store takes after the last one. cpu_s and peak_rss_bytes are those of the tool's own processes;
cluster_cpu_s is that of the cluster's daemons on the same cores. On Ceph stored_bytes is one copy's, and what the
key-value maps take on the OSDs is not in it.
"""
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time

import repo_peers
import repo_rados
from cluster import CephCluster

PLANS = {True: {'rounds': 1, 'versions': 4, 'siblings': 2}, False: {'rounds': 3, 'versions': 20, 'siblings': 10}}
PAGE = 4096
POOL = 'bench'


class Vmmig(repo_peers.Vmmig):
    def delete(self, names):
        for name in names:
            self.vmmig('image', 'delete', name)

    def collect(self):
        self.vmmig('repo', 'gc')

    def verify(self):
        self.vmmig('repo', 'scrub')


class VmmigRados(Vmmig):
    def url(self):
        return self.store

    def bytes(self):
        stat = self.vmmig('repo', 'stat')
        return stat['pack_bytes'] + stat['tree_bytes']


class Rbd:
    """Images of RBD, as they are: thin, and neither compressed nor deduplicated. Without the versions and siblings, of
    which it would take a snapshot or a clone instead."""
    cases = ('disk', 'memory', 'export')

    def __init__(self, ceph, prefix):
        self.ceph, self.prefix = ceph, prefix

    def rbd(self, *words):
        return repo_peers.run('rbd', '-c', self.ceph.conf, '-p', POOL, *words)

    def init(self):
        self.rbd('pool', 'init', POOL)

    def put(self, path, name):
        self.rbd('import', '--no-progress', path, f'{self.prefix}{name}')

    def get(self, name, path):
        self.rbd('export', '--no-progress', f'{self.prefix}{name}', path)

    def bytes(self):
        return sum(image['used_size'] for image in json.loads(self.rbd('du', '--format', 'json'))['images']
                   if image['name'].startswith(self.prefix))


class Restic(repo_peers.Restic):
    def delete(self, names):
        snapshots = json.loads(self.restic('snapshots', '--json'))
        self.restic('forget', *(one['id'] for one in snapshots if one['tags'][0] in names))

    def collect(self):
        self.restic('prune')

    def verify(self):
        self.restic('check', '--read-data')


class Borg(repo_peers.Borg):
    def delete(self, names):
        repo_peers.run('borg', 'delete', self.store, *names, env=self.env)

    def collect(self):
        repo_peers.run('borg', 'compact', '--threshold', '0', self.store, env=self.env)

    def verify(self):
        repo_peers.run('borg', 'check', '--verify-data', self.store, env=self.env)


class Casync(repo_peers.Casync):
    cases = ('disk', 'memory', 'versions', 'siblings', 'export', 'collect')  # it cannot verify

    def delete(self, names):
        for name in names:
            (self.store / f'{name}.caibx').unlink()

    def collect(self):
        repo_peers.run('casync', 'gc', f'--store={self.store}/chunks', *self.store.glob('*.caibx'))


class QemuImg(repo_peers.QemuImg):
    cases = ('disk', 'memory', 'versions', 'siblings', 'export')  # deleting is all; and its check reads tables only

    def put(self, path, name):
        repo_peers.run('qemu-img', 'convert', '-f', 'raw', '-c', '-W', '-m', '16', '-O', 'qcow2', '-o',
                       'compression_type=zstd', path, self.store / name)


LOCAL = {'vmmig-dir': Vmmig, 'restic': Restic, 'borg': Borg, 'casync': Casync, 'qemu-img': QemuImg}


def rewrite(path, share, seed):
    draw = random.Random(seed)
    size, left = path.stat().st_size, int(path.stat().st_size * share)
    with open(path, 'r+b') as file:
        while left > 0:
            pages = draw.randint(1, 16)
            file.seek(draw.randrange(size // PAGE - pages) * PAGE)
            file.write((draw.randbytes(PAGE // 2) + draw.randbytes(256) * 8) * pages)
            left -= pages * PAGE


def copy(source, target):
    subprocess.run(['cp', '--sparse=always', source, target], check=True)
    return target


def data_bytes(path):
    """Bytes of the pages that are not zero."""
    zeros, total, at = bytes(PAGE), 0, 0
    with open(path, 'rb', buffering=0) as file:
        size = path.stat().st_size
        while at < size:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA) // PAGE * PAGE
            except OSError:  # no more data
                break
            chunk = memoryview(os.pread(file.fileno(), 256 * PAGE, at))
            total += sum(chunk[i:i + PAGE] != zeros for i in range(0, len(chunk), PAGE)) * PAGE
            at += len(chunk)
    return total


CASES = ('disk', 'memory', 'versions', 'siblings', 'export', 'verify', 'collect')


class Contest:
    """Every tool with a store of its own, and one case after the other; one that lacks a case has .cases."""

    def __init__(self, tools, folder, found, ceph):
        self.tools, self.folder, self.found, self.ceph = tools, folder, found, ceph

    def measure(self, case, tool, *calls, data=0):
        """Adds a run: of calls (function, arguments...), with so many bytes of data."""
        os.sync()
        began, cluster = time.monotonic(), repo_rados.daemons_cpu(self.ceph)
        repo_peers.usage.update(cpu_s=0, peak_rss_bytes=0)
        for function, *arguments in calls:
            function(*arguments)
        os.sync()
        run = {'total_s': time.monotonic() - began, **repo_peers.usage, 'stored_bytes': self.tools[tool].bytes(),
               'data_bytes': data}
        if tool in ('vmmig-rados', 'rbd'):
            run['cluster_cpu_s'] = repo_rados.daemons_cpu(self.ceph) - cluster
        self.found.setdefault((case, tool), []).append(run)
        print(f'  {case} {tool}: {run["total_s"]:.2f} s, {run["stored_bytes"] / 1e6:.1f} MB', file=sys.stderr,
              flush=True)

    def contestants(self, case):
        return [(name, tool) for name, tool in self.tools.items() if case in getattr(tool, 'cases', CASES)]

    def put(self, case, *paths):
        data = sum(map(data_bytes, paths))
        for name, tool in self.contestants(case):
            self.measure(case, name, *((tool.put, path, path.stem) for path in paths), data=data)

    def get(self, paths, digests):
        data = sum(map(data_bytes, paths))
        for name, tool in self.tools.items():
            outs = [self.folder / f'out-{path.name}' for path in paths]
            self.measure('export', name, *((tool.get, path.stem, out) for path, out in zip(paths, outs)), data=data)
            for path, out in zip(paths, outs):
                assert repo_peers.digest(out) == digests[path], f'{name}: {path.name} came out changed'
                out.unlink()

    def verify(self):
        for name, tool in self.contestants('verify'):
            self.measure('verify', name, (tool.verify,))

    def collect(self, names):
        for name, tool in self.contestants('collect'):
            tool.delete(names)
            self.measure('collect', name, (tool.collect,))


def versions(plan, disk, folder):
    """Yields (case, path) of the versions and siblings; the file is gone when the next one is asked for."""
    version = copy(disk, folder / 'version.raw')
    for number in range(plan['versions']):
        rewrite(version, 0.02, number)
        version = version.rename(folder / f'v{number}.raw')
        yield 'versions', version
    version.unlink()
    for number in range(plan['siblings']):
        sibling = copy(disk, folder / f's{number}.raw')
        rewrite(sibling, 0.01, 1000 + number)
        yield 'siblings', sibling
        sibling.unlink()


def one_round(number, plan, inputs, folder, ceph, found):
    (folder / 'stores').mkdir()
    tools = {name: kind(folder / 'stores' / name) for name, kind in LOCAL.items()}
    tools |= {'vmmig-rados': VmmigRados(f'rados:{POOL}/round{number}?conf={ceph.conf}&id=admin'), 'rbd': Rbd(ceph, f'round{number}-')}
    contest = Contest(tools, folder, found, ceph)
    for tool in tools.values():
        tool.init()
    digests = {path: repo_peers.digest(path) for path in inputs}
    contest.put('disk', inputs[0])
    contest.put('memory', *inputs[1:])
    names = []
    for case, path in versions(plan, inputs[0], folder):
        contest.put(case, path)
        names.append(path.stem)
    contest.get(inputs, digests)
    contest.verify()
    contest.collect(names[::2])


def add(results, case, tool, runs, steps):
    """steps: how many of the runs are one round's. What grows with them is told as it is after the last of each round,
    and step by step as a case of its own."""
    results.add_all(case, tool, [{key: value for key, value in run.items() if key != 'stored_bytes'} for run in runs])
    results.add(case, tool, 'stored_bytes', [run['stored_bytes'] for run in runs[steps - 1::steps]])
    for step in range(steps if steps > 1 else 0):
        results.add(f'{case}/{step + 1}', tool, 'stored_bytes', [run['stored_bytes'] for run in runs[step::steps]])


def run(results, quick, inputs):
    plan, found = PLANS[quick], {}
    paths = repo_peers.make_inputs(inputs)
    with tempfile.TemporaryDirectory(dir='/var/tmp') as ceph_folder, CephCluster(ceph_folder) as ceph:
        ceph.create_pool(POOL)
        for number in range(plan['rounds']):
            with results.cell(f'round {number}'), tempfile.TemporaryDirectory(dir='/var/tmp') as folder:
                one_round(number, plan, paths, pathlib.Path(folder), ceph, found)
    for (case, tool), runs in found.items():
        add(results, case, tool, runs, plan.get(case, 1))

# SPDX-License-Identifier: Apache-2.0
"""Repositories: vmmig on a folder and on Ceph, beside restic, borg, casync and qemu-img.

    disk       a Debian disk
    memory     the memories of two guests booted from it
    versions   versions of the disk, each with 2 % of its 2 GiB rewritten
    siblings   disks of VMs with the same system, a hundredth of each its own
    export     the disk and the memories back, compared with what went in
    verify     everything stored, read and checked
    collect    half of the versions and siblings deleted and their space freed

Every tool takes its step before the next step begins. stored_bytes is what the store takes after the step.
"""
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time

import repo_peers
from cluster import CephCluster

PLANS = {True: {'rounds': 1, 'versions': 4, 'siblings': 2}, False: {'rounds': 3, 'versions': 20, 'siblings': 10}}
RUN = 64 << 10


class Vmmig(repo_peers.Vmmig):
    def delete(self, name):
        self.vmmig('image', 'delete', name)

    def collect(self):
        self.vmmig('repo', 'gc')

    def verify(self):
        self.vmmig('repo', 'scrub')


class VmmigRados(Vmmig):
    """store: a URL. What the key-value maps take on the OSDs is not counted; the other bytes are one copy's."""

    def vmmig(self, *words):
        build = pathlib.Path(os.environ['VMMIG_BUILD'])
        return repo_peers.json.loads(repo_peers.run(build / 'tools/vmmig', *words, '--json', '--repo', self.store))

    def bytes(self):
        stat = self.vmmig('repo', 'stat')
        return stat['pack_bytes'] + stat['tree_bytes']


class Restic(repo_peers.Restic):
    def delete(self, name):
        snapshot, = repo_peers.json.loads(self.restic('snapshots', '--tag', name, '--json'))
        self.restic('forget', snapshot['id'])

    def collect(self):
        self.restic('prune')

    def verify(self):
        self.restic('check', '--read-data')


class Borg(repo_peers.Borg):
    def delete(self, name):
        repo_peers.run('borg', 'delete', f'{self.store}::{name}', env=self.env)

    def collect(self):
        repo_peers.run('borg', 'compact', '--threshold', '0', self.store, env=self.env)

    def verify(self):
        repo_peers.run('borg', 'check', '--verify-data', self.store, env=self.env)


class Casync(repo_peers.Casync):
    verify = None  # it has no such command

    def delete(self, name):
        (self.store / f'{name}.caibx').unlink()

    def collect(self):
        repo_peers.run('casync', 'gc', f'--store={self.store}/chunks', *self.store.glob('*.caibx'))


class QemuImg(repo_peers.QemuImg):
    collect = None  # deleting is all

    def delete(self, name):
        (self.store / name).unlink()

    def verify(self):
        for path in self.store.iterdir():
            repo_peers.run('qemu-img', 'check', '-q', path)


TOOLS = {'vmmig-dir': Vmmig, 'restic': Restic, 'borg': Borg, 'casync': Casync, 'qemu-img': QemuImg}


def rewrite(path, share, seed):
    """In runs of 64 KiB, half of whose bytes compress."""
    draw = random.Random(seed)
    size = path.stat().st_size
    with open(path, 'r+b') as file:
        for _ in range(int(size * share) // RUN):
            file.seek(draw.randrange(size // RUN) * RUN)
            file.write(draw.randbytes(RUN // 2) + draw.randbytes(512) * (RUN // 1024))


def copy(source, target):
    subprocess.run(['cp', '--sparse=always', source, target], check=True)
    return target


class Contest:
    """Every tool with a store of its own, and one case after the other."""

    def __init__(self, results, tools, folder):
        self.results, self.tools, self.folder = results, tools, folder
        self.found = {}

    def measure(self, case, tool, *calls, paths=()):
        """Adds a run: of calls (function, arguments...). paths: the images whose data it reads or writes."""
        began = time.monotonic()
        repo_peers.usage.update(cpu_s=0, peak_rss_bytes=0)
        for function, *arguments in calls:
            function(*arguments)
        run = {'total_s': time.monotonic() - began, **repo_peers.usage, 'stored_bytes': self.tools[tool].bytes(),
               'data_bytes': sum(path.stat().st_blocks * 512 for path in paths)}
        self.found.setdefault((case, tool), []).append(run)
        print(f'  {case} {tool}: {run["total_s"]:.2f} s, {run["stored_bytes"] / 1e6:.1f} MB', file=sys.stderr, flush=True)

    def put(self, case, *paths):
        for name, tool in self.tools.items():
            self.measure(case, name, *((tool.put, path, path.stem) for path in paths), paths=paths)

    def get(self, paths, digests):
        for name, tool in self.tools.items():
            outs = [self.folder / f'out-{path.name}' for path in paths]
            self.measure('export', name, *((tool.get, path.stem, out) for path, out in zip(paths, outs)), paths=paths)
            for path, out in zip(paths, outs):
                assert repo_peers.digest(out) == digests[path], f'{name}: {path.name} came out changed'
                out.unlink()

    def verify(self):
        for name, tool in self.tools.items():
            if tool.verify:
                self.measure('verify', name, (tool.verify,))

    def collect(self, names):
        for name, tool in self.tools.items():
            self.measure('collect', name, *((tool.delete, n) for n in names), *([(tool.collect,)] if tool.collect else []))


def one_round(results, plan, inputs, folder, ceph, found):
    (folder / 'stores').mkdir()
    tools = {name: kind(folder / 'stores' / name) for name, kind in TOOLS.items()}
    tools['vmmig-rados'] = VmmigRados(f'rados:bench/round{len(found.get(("disk", "restic"), []))}?conf={ceph.conf}&id=admin')
    contest = Contest(results, tools, folder)
    contest.found = found
    for tool in tools.values():
        tool.init()
    digests = {path: repo_peers.digest(path) for path in inputs}
    contest.put('disk', inputs[0])
    contest.put('memory', *inputs[1:])
    names = []
    version = copy(inputs[0], folder / 'version.raw')
    for number in range(plan['versions']):
        rewrite(version, 0.02, number)
        names.append(f'v{number}')
        version = version.rename(folder / f'v{number}.raw')
        contest.put('versions', version)
    version.unlink()
    for number in range(plan['siblings']):
        sibling = copy(inputs[0], folder / f's{number}.raw')
        rewrite(sibling, 0.01, 1000 + number)
        names.append(sibling.stem)
        contest.put('siblings', sibling)
        sibling.unlink()
    contest.get(inputs, digests)
    contest.verify()
    contest.collect(names[::2])


def run(results, quick, inputs):
    plan, found = PLANS[quick], {}
    paths = repo_peers.make_inputs(inputs)
    with tempfile.TemporaryDirectory(dir='/var/tmp') as ceph_folder, CephCluster(ceph_folder) as ceph:
        ceph.create_pool('bench')
        for _ in range(plan['rounds']):
            with tempfile.TemporaryDirectory(dir='/var/tmp') as folder:
                one_round(results, plan, paths, pathlib.Path(folder), ceph, found)
    for (case, tool), runs in found.items():
        results.add_all(case, tool, runs)
